"""`nn.MultiheadAttention`: projections in and out, which it applies inside of one function.

Its packed projection is one matrix [3 e, e] of the rows of q, k and v; where keys and values have sizes
of their own there are three matrices with thirds of the one bias. `layers.uses` sees their uses.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_influence.errors import LayerError
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers.base import LayerAdapter, register_adapter
from lightning_influence.layers.linear import LinearAdapter


def is_plain_attention(module: nn.Module) -> bool:
    """Whether a module computes what `nn.MultiheadAttention` computes."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and not parametrize.is_parametrized(module)
        and not parametrize.is_parametrized(module.out_proj)
    )


class _InsideAttention(LayerAdapter):
    """A matrix that the module's call does not show."""

    is_called = False

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> LayerGradient:
        """Never: the uses by `F.linear` are seen instead."""
        raise LayerError("its weight is used inside of attention, which was called in an unknown way.")


class PackedProjection(_InsideAttention):
    """q, k and v in one matrix [3 e, e]."""

    part = "in_proj"
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has the packed weight."""
        return is_plain_attention(module) and module._parameters.get("in_proj_weight") is not None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(3 e, e)."""
        assert isinstance(module, nn.MultiheadAttention)
        return 3 * module.embed_dim, module.embed_dim


class SeparateProjection(_InsideAttention):
    """One of q, k and v, with its third of the bias.

    Args:
        part: "q_proj", "k_proj" or "v_proj".
    """

    bias_name = "in_proj_bias"

    def __init__(self, part: str) -> None:
        self.part = part  # type: ignore[misc]
        self.weight_name = f"{part}_weight"  # type: ignore[misc]

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has weights of different sizes."""
        return is_plain_attention(module) and module._parameters.get(self.weight_name) is not None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(e, size of q, k or v)."""
        o, i = module.get_parameter(self.weight_name).shape
        return o, i

    def bias_column(self, module: nn.Module, bias: Tensor) -> Tensor:
        """The third that belongs to this projection."""
        return bias.chunk(3)["qkv".index(self.part[0])]


class AttentionOutput(LinearAdapter):
    """`out_proj`, a submodule that attention does not call."""

    is_called = False


register_adapter(PackedProjection())
register_adapter(SeparateProjection("q_proj"), SeparateProjection("k_proj"), SeparateProjection("v_proj"))
