"""Uses of weights and outputs that no module's call shows: in attention, by `F.linear`, by broadcasting.

`nn.MultiheadAttention` hands its weights to one function and calls no submodule; an output layer may be
written `F.linear(x, embedding.weight)`; an embedding of positions is looked up once and added to every
example of the batch. A `TorchFunctionMode` sees these calls. It changes nothing: attention runs through
torch's own code, with only its name `linear` bound to a function that also looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch's documentation uses)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.layers.tracked import TrackedLayer

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
RecordLinear = Callable[[str, Tensor, Tensor, int, bool, "int | None"], None]


class _Lookup(NamedTuple):
    """An output that may be broadcast, and what to do when it is."""

    output: Tensor  # kept, so that its id stays its own
    on_broadcast: Callable[[Tensor], None]


class WeightUses(TorchFunctionMode):
    """Context manager that sees uses of the tracked layers' weights and outputs outside of their modules.

    Args:
        layers: the tracked layers, by name.
        record_linear: called with the name of a layer, input and output of an `F.linear` with its weight, the
            first of the weight's rows that were used, whether the layer's bias was added, and the batch dimension
            (None: the layer's own).

    Attributes:
        failure: what went wrong while looking; empty if nothing did.
    """

    def __init__(self, layers: Mapping[str, TrackedLayer], record_linear: RecordLinear) -> None:
        super().__init__()
        self.failure = ""
        self._record_linear = record_linear
        self._owners: dict[int, tuple[str, Tensor, Tensor | None]] = {}
        for name, layer in layers.items():
            if not layer.calls_are_all:
                weight, bias = layer.parameters["weight"], layer.parameters.get("bias")
                self._owners[id(weight)] = (name, weight, bias)
        self._lookups: dict[int, _Lookup] = {}

    @staticmethod
    def are_needed(layers: Mapping[str, TrackedLayer]) -> bool:
        """Whether there is anything for it to see."""
        return any(not layer.calls_are_all for layer in layers.values())

    def watch(self, output: Tensor, on_broadcast: Callable[[Tensor], None]) -> None:
        """Call `on_broadcast` with the sum if the output is added to a larger tensor."""
        self._lookups[id(output)] = _Lookup(output, on_broadcast)

    def clear(self) -> None:
        """Forget the step."""
        self._lookups = {}

    # Without `disable`, dynamo traces this method when the user's model is compiled, and miscompiles.
    @torch.compiler.disable
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls the function; looks at it if it is an attention, a linear function or an addition."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attend(args, kwargs)
        result = func(*args, **kwargs)
        if func is F.linear:
            self._guarded(self._see_linear, result, None, *args, **kwargs)
        elif self._lookups and getattr(func, "__name__", "") in _ADDITIONS:
            self._guarded(self._see_addition, result, args)
        return result

    def _attend(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Torch's own attention, with its calls of `linear` seen; their inputs are [positions, batch, ...]."""
        query = args[0] if args else kwargs["query"]
        batch = query.shape[1] if query.ndim == 3 else 1

        def linear(layer_input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            output = F.linear(layer_input, weight, bias)
            self._guarded(self._see_linear, output, batch, layer_input, weight, bias)
            return output

        return _attention_with(linear)(*args, **kwargs)

    def _see_linear(
        self,
        output: Tensor,
        attention_batch: int | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        whole = weight if id(weight) in self._owners else weight._base
        if whole is None or id(whole) not in self._owners or not output.requires_grad:
            return
        name, whole, known_bias = self._owners[id(whole)]
        whole_bias = bias if bias is None or bias._base is None else bias._base
        has_bias = whole_bias is not None and whole_bias is known_bias
        if weight.shape[1:] != whole.shape[1:] or weight.stride() != whole.stride():
            return  # not some of the rows; the comparison with .grad tells
        first_row = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
        if attention_batch is not None and output.ndim == 2:  # positions and batch are flattened
            shape = (-1, attention_batch)
            self._record_linear(name, input.unflatten(0, shape), output, first_row, has_bias, 1)
        else:
            batch_dim = None if attention_batch is None else 1
            self._record_linear(name, input, output, first_row, has_bias, batch_dim)

    def _see_addition(self, result: Any, args: tuple[Any, ...]) -> None:
        for argument in args[:2]:
            lookup = self._lookups.get(id(argument))
            if lookup is not None and isinstance(result, Tensor) and result.shape != lookup.output.shape:
                lookup.on_broadcast(result)

    def _guarded(self, look: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            with torch._C.DisableTorchFunction():  # what we do here is not for the loss tap to look at
                look(*args, **kwargs)
        except Exception as error:  # not the user's: training goes on, the comparison with .grad tells
            self.failure = f"{type(error).__name__}: {error}"


def _attention_with(linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """`F.multi_head_attention_forward` with another `linear`, also in the functions that it calls."""
    changed: dict[str, Any] = {"linear": linear, "has_torch_function": lambda _: False}
    for name in ("_in_projection_packed", "_in_projection"):
        changed[name] = _rebound(getattr(F, name), changed)
    return _rebound(F.multi_head_attention_forward, changed)


def _rebound(function: Callable[..., Any], names: dict[str, Any]) -> FunctionType:
    """The same code with other values for some of its global names."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
