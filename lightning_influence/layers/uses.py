"""Uses of weights and outputs that no module's call shows: in attention, by `F.linear`, by broadcasting.

`nn.MultiheadAttention` hands its weights to one function and calls no submodule; an output layer may be
written `F.linear(x, embedding.weight)`; an embedding of positions is looked up once and added to every
example of the batch. A `TorchFunctionMode` sees these calls. It changes nothing: attention runs through
torch's own code, with only its name `linear` bound to a function that also looks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch's documentation uses)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.layers.tracked import TrackedLayer

logger = logging.getLogger(__name__)

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_VIEWS = frozenset({"unsqueeze", "squeeze", "view", "reshape", "__getitem__"})
_EXPANSIONS = frozenset({"expand", "repeat"})
RecordLinear = Callable[[str, Tensor, Tensor, int, bool, "int | None"], None]


class _Watched(NamedTuple):
    """An output that may be broadcast, or a sum of such, and what to do when it is."""

    output: Tensor  # kept, so that its id stays its own
    ndim: int  # of the layer's own output
    on_broadcast: tuple[Callable[[Tensor, torch.Size], None], ...]

    def is_shared(self, result: Tensor) -> bool:
        """Whether it became a larger tensor, or one with a dimension for a single example."""
        return result.numel() > self.output.numel() or result.ndim > self.ndim

    def tell(self, result: Tensor) -> None:
        """Say that it became this tensor."""
        for on_broadcast in self.on_broadcast:
            on_broadcast(result, self.output.shape)


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
        self._attention = _attention_with(self._linear_in_attention)
        self._attention_batch = 1
        self._watched: dict[int, _Watched] = {}
        self._looks = (
            dict.fromkeys(_ADDITIONS, self._see_addition)
            | dict.fromkeys(_VIEWS, self._see_view)
            | dict.fromkeys(_EXPANSIONS, self._see_expansion)
        )

    @staticmethod
    def are_needed(layers: Mapping[str, TrackedLayer]) -> bool:
        """Whether there is anything for it to see."""
        return any(not layer.calls_are_all for layer in layers.values())

    def watch(self, output: Tensor, on_broadcast: Callable[[Tensor, torch.Size], None]) -> None:
        """Call `on_broadcast` if the output is added to a larger tensor or expanded to one.

        It gets the larger tensor, and the shape that the output had then.
        """
        self._watched[id(output)] = _Watched(output, output.ndim, (on_broadcast,))

    def clear(self) -> None:
        """Forget the step."""
        self._watched = {}

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
        if func is F.multi_head_attention_forward and set(types) <= {Tensor}:  # not tensors of other classes
            return self._attend(args, kwargs)
        result = func(*args, **kwargs)
        if func is F.linear:
            self._guarded(self._see_linear, result, None, *args, **kwargs)
        elif self._watched and (look := self._looks.get(getattr(func, "__name__", ""))) is not None:
            self._guarded(look, result, args, kwargs)
        return result

    def _attend(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Torch's own attention, with its calls of `linear` seen; their inputs are [positions, batch, ...]."""
        query = args[0] if args else kwargs["query"]
        self._attention_batch = query.shape[1] if query.ndim == 3 else 1
        return self._attention(*args, **kwargs)

    def _linear_in_attention(self, layer_input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(layer_input, weight, bias)
        self._guarded(self._see_linear, output, self._attention_batch, layer_input, weight, bias)
        return output

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

    def _see_addition(self, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = [watched for argument in args[:2] if (watched := self._watched.get(id(argument))) is not None]
        if not found or kwargs:  # `alpha` would scale the gradient
            return
        alike = len({(watched.output.shape, watched.ndim) for watched in found}) == 1
        if len(found) == 2 and alike:  # what becomes of the sum becomes of both
            tells = found[0].on_broadcast + found[1].on_broadcast
            self._watched[id(result)] = _Watched(result, found[0].ndim, tells)
            return
        for watched in found:
            if watched.is_shared(result):
                watched.tell(result)

    def _see_view(self, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Dimensions of size 1 come and go without a change to the gradient."""
        watched = self._watched.get(id(args[0]))
        if watched is None or not isinstance(result, Tensor):
            return
        if [size for size in result.shape if size > 1] == [size for size in watched.output.shape if size > 1]:
            self._watched[id(result)] = watched._replace(output=result)

    def _see_expansion(self, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watched = self._watched.get(id(args[0]))
        if watched is None or not watched.is_shared(result):
            return
        if torch.broadcast_shapes(watched.output.shape, result.shape) == result.shape:  # not a larger `repeat`
            watched.tell(result)

    def _guarded(self, look: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            with torch._C.DisableTorchFunction():  # what we do here is not for the loss tap to look at
                look(*args, **kwargs)
        except Exception as error:  # not the user's: training goes on, the comparison with .grad tells
            self.failure = f"{type(error).__name__}: {error}"
            logger.debug("a use of a weight could not be looked at", exc_info=error)


def _attention_with(linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """`F.multi_head_attention_forward` with another `linear`, also in the functions that it calls.

    Where torch has other functions than these, its own is returned, and the projections are reported as unseen.
    """
    changed: dict[str, Any] = {"linear": linear, "has_torch_function": lambda _: False}
    attention: Any = F.multi_head_attention_forward
    for name in ("_in_projection_packed", "_in_projection"):
        function = vars(F).get(name)
        if not isinstance(function, FunctionType):
            return attention
        changed[name] = _rebound(function, changed)
    return _rebound(attention, changed)


def _rebound(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The same code with other values for some of its global names."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
