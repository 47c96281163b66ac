"""Why a module's parameters are not attributed, and what to do about it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

NOT_CHOSEN = "not named in `layers`"

# Types of which a subclass with its own forward may or may not compute the same.
_LAYERS = (
    nn.Linear,
    _ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    _NormBase,
    nn.MultiheadAttention,
)
_QUANTIZED = ("torch.ao.nn", "torch.nn.qat", "torch.nn.quantized", "torch.nn.intrinsic", "torchao.")
_OWN_ADAPTER = "register an adapter for it (`register_adapter`)"


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what `kind` computes, with a weight that is a parameter of its own."""
    weight = module._parameters.get("weight")  # not recomputed, as by pruning or weight norm
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and not parametrize.is_parametrized(module)
        and weight is not None
        and not is_lazy(weight)
    )


def why_unsupported(module: nn.Module) -> str:
    """What to say of a module that no adapter matches."""
    return (
        _why_not_itself(module)
        or _why_not_its_weight(module)
        or _why_not_its_type(module)
        or f"this type of layer is not supported; {_OWN_ADAPTER}"
    )


def _why_not_its_weight(module: nn.Module) -> str:
    """The weight is made anew at each call, from other parameters."""
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
        return (
            "its weight is computed from other parameters (torch.nn.utils.parametrizations); call "
            "`torch.nn.utils.parametrize.remove_parametrizations` before training, or leave the layer out"
        )
    names = {*module._parameters, *module._buffers}
    stems = {name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")}
    if any(f"{stem}_mask" in names for stem in stems):
        return (
            "it is pruned: its weight is computed from `weight_orig` and a mask; call "
            "`torch.nn.utils.prune.remove` before training, or prune after it"
        )
    if {"weight_g", "weight_v"} <= names or stems:
        return (
            "its weight is computed from other parameters (torch.nn.utils.weight_norm or spectral_norm); call "
            "`torch.nn.utils.remove_weight_norm` or `remove_spectral_norm` before training, or leave the layer out"
        )
    return ""


def _why_not_itself(module: nn.Module) -> str:
    """A state or an option of a layer that is covered otherwise."""
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return "its size is not known yet (a lazy module); run a batch through the model before `fit`"
    if type(module).__module__.startswith(_QUANTIZED):
        return "it is quantized; train without quantization (quantize after training), or leave the layer out"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return (
            "`max_norm` rescales the rows that are looked up, in place and in each forward, which no gradient "
            "shows; build it without, and penalize long rows in the loss"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
        return (
            "`scale_grad_by_freq` divides an example's gradient by the number of look-ups in the whole batch; "
            "build it without"
        )
    if isinstance(module, nn.SyncBatchNorm):
        return (
            "its statistics are those of all processes, which one process does not see; "
            "use nn.BatchNorm, or pass `sync_batchnorm=False` to the Trainer"
        )
    return ""


def _why_not_its_type(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return (
            f"nn.{type(module).__name__} applies its weights inside of one fused function, where the gradient at "
            "each time step cannot be seen; write the recurrence with nn.Linear layers, which are covered"
        )
    if isinstance(module, nn.Bilinear):
        return (
            "nn.Bilinear multiplies two inputs; write it as nn.Linear on their flattened outer product, which is "
            f"covered, or {_OWN_ADAPTER}"
        )
    if isinstance(module, nn.PReLU):
        return f"nn.PReLU's slope is not supported; use nn.LeakyReLU, or {_OWN_ADAPTER}"
    bases = (kind for kind in type(module).__mro__ if issubclass(kind, nn.Module))
    base = next(kind for kind in bases if kind.__module__.startswith("torch.nn."))
    if isinstance(module, _LAYERS) and type(module).forward is not base.forward:
        return f"it has a `forward` of its own, which may differ from that of nn.{base.__name__}; {_OWN_ADAPTER}"
    is_container = isinstance(module, nn.ParameterList | nn.ParameterDict)
    if is_container or next(module.children(), None) is not None:
        return (
            "these parameters are the module's own, outside of any layer; put them into an nn.Embedding or "
            "nn.Linear, or register an adapter for the module (`register_adapter`)"
        )
    return ""
