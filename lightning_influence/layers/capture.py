"""Hooks that see a step's layer inputs and output gradients, and leave everything as it was.

A forward hook registers a *tensor* hook on the layer's output, with the input in its closure. Of the
ways to get at output gradients this is the one that is right under in-place activations, reused
modules, both kinds of activation checkpointing and autocast, and that needs no second backward;
module backward hooks raise, and `autograd.grad` on saved outputs is silently wrong, after an
in-place ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_influence.errors import LayerError
from lightning_influence.gradients import LayerGradient, add_calls
from lightning_influence.layers.base import LayerAdapter, LayerCall
from lightning_influence.layers.linear import LinearAdapter
from lightning_influence.layers.tracked import LinearUse, Source, TrackedLayer
from lightning_influence.layers.uses import WeightUses


class UseShape(NamedTuple):
    """The shape of an output gradient, and which of its dimensions counts examples (None: not known)."""

    shape: tuple[int, ...]
    batch_dim: int | None


@dataclass
class _Use:
    """A use of a layer's matrix whose gradient has arrived.

    Args:
        use: what the layer makes a gradient of.
        seen: the inputs.
    """

    use: LinearUse | tuple[int, LayerCall]
    seen: _Seen

    @property
    def is_intact(self) -> bool:
        """Whether the inputs are still as the forward saw them."""
        return self.seen.is_intact


Records = dict[str, list[_Use]]


class _Seen:
    """A forward's tensors, detached, and whether they stay as they are."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
        self.outside = [value for value in values if isinstance(value, Tensor) and not _is_computed(value)]
        self._versions = [value._version for value in self.values if isinstance(value, Tensor)]

    @property
    def is_intact(self) -> bool:
        return self._versions == [value._version for value in self.values if isinstance(value, Tensor)]


class GradientCapture:
    """Context manager: records (input, output gradient) for every use of the tracked layers' weights.

    Nothing is attached to a module outside the `with` block, and nothing that the hooks do can
    raise or change a gradient. A layer called several times contributes the sum of its calls, as
    further shared positions.

    Attributes:
        is_open: whether gradients that flow now are recorded. Closed outside of the real backward, it
            leaves out inner ones (adversarial examples, other callbacks' gradients).
        nearest_to_loss: the layer whose gradient came first; "" before the backward.
        keeps_edges: whether `edges` are collected; set it before entering.
        edges: of all watched outputs, in the order of the forward.
    """

    def __init__(self, layers: Mapping[str, TrackedLayer]) -> None:
        self.layers = layers
        self.is_open = True
        self.nearest_to_loss = ""
        self.keeps_edges = False
        self.edges: list[GradientEdge] = []
        self._records: Records = {}
        self._active = ExitStack()
        self._uses: WeightUses | None = None

    def __enter__(self) -> GradientCapture:
        self._active.close()
        self.nearest_to_loss, self.edges = "", []
        self._records = {name: [] for name in self.layers}
        with ExitStack() as entered:
            for name, layer in self.layers.items():
                for number, source in enumerate(layer.sources):
                    if source.adapter.is_called and not self._is_seen_by_use(layer, source):
                        hook = self._forward_hook(source, number, name)
                        handle = source.module.register_forward_hook(hook, with_kwargs=True)
                        entered.callback(handle.remove)
            self._uses = (
                WeightUses(self.layers, self._record_linear) if WeightUses.are_needed(self.layers) else None
            )
            if self._uses is not None:
                entered.enter_context(self._uses)
            self._active = entered.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._active.close()

    def clear(self) -> None:
        """Forget the step, so that its activations can be freed."""
        self.clear_reached()
        self.edges = []
        if self._uses is not None:
            self._uses.clear()

    def clear_reached(self) -> None:
        """Forget what backwards have brought so far; later ones of the same step are still recorded."""
        self.nearest_to_loss = ""
        for records in self._records.values():
            records.clear()

    @contextmanager
    def apart(self, records: Records) -> Iterator[None]:
        """What flows within is recorded in `records`, and all questions are about these; the step's own stay."""
        kept = {name: [*own] for name, own in self._records.items()}, self.nearest_to_loss, self.is_open
        self._show(records)
        try:
            yield
        finally:
            records.update({name: [*found] for name, found in self._records.items()})
            self._show(kept[0])
            _, self.nearest_to_loss, self.is_open = kept

    def _show(self, records: Records) -> None:
        for name, own in self._records.items():  # the hooks know these lists
            own[:] = records.get(name, [])

    @property
    def unseen(self) -> list[str]:
        """Layers of which no use took part in a backward."""
        return [name for name in self.layers if not self._records.get(name)]

    @property
    def changed(self) -> list[str]:
        """Layers whose input was changed in place before the backward; theirs cannot be known."""
        return [name for name in self.layers if not all(use.is_intact for use in self._records.get(name, ()))]

    def shapes(self) -> dict[str, list[UseShape]]:
        """What the output gradients of each layer's uses looked like, in the order of the backward."""
        return {
            name: [_shape_of(record.use) for record in self._records[name]]
            for name in self.layers
            if self._records.get(name)
        }

    def outside(self) -> set[int]:
        """Addresses of inputs that the step has not computed itself: batches, buffers, what a model remembers."""
        seen = [record.seen for records in self._records.values() for record in records]
        return {value.untyped_storage().data_ptr() for own in seen for value in own.outside}

    def storages(self) -> set[int]:
        """Addresses of the model's own tensors that the records refer to."""
        uses = [record.use for records in self._records.values() for record in records]
        tensors = [
            value
            for use in uses
            for value in ((use.layer_input,) if isinstance(use, LinearUse) else use[1].arguments)
            if isinstance(value, Tensor)
        ]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def calls(self) -> tuple[dict[str, list[LayerGradient]], dict[str, str]]:
        """Gradients of each use by itself, and by layer why they cannot be had.

        Their sums over the rows are right even before it is known which dimension counts examples.
        """
        calls, failures = {}, {}
        for name in self.layers:
            if self._records.get(name):
                try:
                    calls[name] = [self.layers[name].gradient(record.use) for record in self._records[name]]
                except LayerError as error:
                    failures[name] = str(error)
                except Exception as error:  # of somebody's own adapter, or a use that none of ours is made for
                    failures[name] = f"its adapter raised {type(error).__name__}: {error}"
        return calls, failures

    def gradients(self, names: Collection[str] | None = None) -> dict[str, LayerGradient]:
        """Gradients as back-propagated (no scale divided out) of every layer that was seen, or some of them.

        Raises:
            LayerError: naming the layer whose inputs do not have the batch first, or were changed.
        """
        wanted = self.layers if names is None else names
        return {name: self._gradient(name) for name in self.layers if name in wanted and self._records.get(name)}

    def _gradient(self, name: str) -> LayerGradient:
        layer, records = self.layers[name], self._records[name]
        if not all(record.is_intact for record in records):
            raise LayerError(
                f"Layer {name!r}: its input was changed in place between forward and backward, so its gradients "
                "are not known; change a copy, or leave the layer out with `layers=`."
            )
        try:
            calls = [layer.gradient(record.use) for record in records]
        except LayerError as error:
            raise LayerError(f"Layer {name!r}: {error}") from error
        if len({len(call) for call in calls}) > 1:
            raise LayerError(
                f"Layer {name!r} was called {len(calls)} times in one step with different numbers of "
                f"rows: {[len(call) for call in calls]}; rows must be the batch's examples in every call."
            )
        return add_calls(calls)

    def _forward_hook(self, source: Source, number: int, name: str) -> Callable[..., None]:
        records, layer = self._records[name], self.layers[name]

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if module is not source.module:  # a copy of the model that was made meanwhile has the hook too
                return
            if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
                return
            if not layer.is_trainable:  # now, as while another optimizer is toggled
                return
            if not isinstance(next(iter((*args, *kwargs.values())), None), Tensor):
                return  # such a layer is reported as unseen
            with torch._C.DisableTorchFunction():  # what we do here is not for the loss tap to look at
                seen, own_shape = _Seen((*args, *kwargs.values())), output.shape
                memory = _remembered(source, seen.values[0])
                is_broadcast = False

                def record(grad: Tensor) -> None:
                    values = seen.values
                    named = dict(zip(kwargs, values[len(args) :], strict=True))
                    call = LayerCall(values[: len(args)], named, grad, memory)
                    records.append(_Use((number, call), seen))

                def on_broadcast(result: Tensor, shape: torch.Size) -> None:
                    nonlocal is_broadcast
                    if not source.adapter.is_table and _has_examples(own_shape, shape, result.shape):
                        return
                    is_broadcast = True
                    self._on_gradient(name, result, lambda grad: record_shared(grad, shape), is_output=False)

                def record_shared(grad: Tensor, shape: torch.Size) -> None:
                    """Of an output that was broadcast from this shape: expand the input alike."""
                    layer_input = seen.values[0]
                    rest = layer_input.shape[len(own_shape) - 1 :]
                    expanded = layer_input.reshape((*shape[:-1], *rest)).expand((*grad.shape[:-1], *rest))
                    call = LayerCall((expanded,), {}, grad.sum_to_size(*grad.shape[:-1], shape[-1]), memory)
                    records.append(_Use((number, call), seen))

                self._on_gradient(name, output, lambda grad: None if is_broadcast else record(grad))
                if self._uses is not None and source.adapter.keeps_positions:
                    self._uses.watch(output, on_broadcast)

        return hook

    @staticmethod
    def _is_seen_by_use(layer: TrackedLayer, source: Source) -> bool:
        """Whether the module's call is one of `F.linear` that `WeightUses` sees."""
        return not layer.calls_are_all and isinstance(source.adapter, LinearAdapter)

    def _record_linear(
        self, name: str, layer_input: Tensor, output: Tensor, first_row: int, has_bias: bool, batch_dim: int | None
    ) -> None:
        """Expect the gradient of an `F.linear`'s output; its leading dimensions become those of the input."""
        if not self.layers[name].is_trainable:
            return
        seen, records, leading = _Seen((layer_input,)), self._records[name], layer_input.shape[:-1]

        def record(grad: Tensor) -> None:
            grad = grad.reshape(*leading, grad.shape[-1])
            records.append(_Use(LinearUse(seen.values[0], grad, first_row, has_bias, batch_dim), seen))

        self._on_gradient(name, output, record)

    def _on_gradient(
        self, name: str, output: Tensor, record: Callable[[Tensor], None], *, is_output: bool = True
    ) -> None:
        """Record the gradient of a layer's output, or of what it was broadcast to, which may be a view of it."""
        shape = output.shape

        def hook(grad: Tensor) -> None:  # a hook that returns a tensor would replace the gradient
            if self.is_open:
                self.nearest_to_loss = self.nearest_to_loss or name
                record(grad.detach().reshape(shape))

        hooked = _in_graph(output) if is_output else output
        hooked.register_hook(hook)
        if self.keeps_edges:
            self.edges.append(get_gradient_edge(hooked))


def _is_computed(value: Tensor) -> bool:
    """Whether training has made the tensor for this step, in memory of its own."""
    return value.requires_grad and not (value if value._base is None else value._base).is_leaf


def _remembered(source: Source, layer_input: Tensor) -> Any:
    if type(source.adapter).remember is LayerAdapter.remember:  # nothing, as nearly all do
        return None
    try:
        with torch.no_grad():
            return source.adapter.remember(source.module, layer_input)
    except Exception:  # of somebody's own adapter; its gradient will say what it misses
        return None


def _has_examples(own: torch.Size, shape: torch.Size, result: torch.Size) -> bool:
    """Whether an output has the examples of what it becomes, so that it is shared by an example's positions only.

    Args:
        own: shape of the layer's output.
        shape: that it had when it was broadcast.
        result: that it became.
    """
    return len(shape) == len(result) and own[0] == shape[0] == result[0]


def _shape_of(use: LinearUse | tuple[int, LayerCall]) -> UseShape:
    if isinstance(use, LinearUse):
        return UseShape(tuple(use.output_grad.shape), use.batch_dim)
    return UseShape(tuple(use[1].output_grad.shape), None)


def _in_graph(output: Tensor) -> Tensor:
    """The tensor whose gradient hook is sure to fire.

    `nn.Linear` with a bias returns a view for inputs of more than two dimensions. An in-place
    activation then rewires the graph from the view's base, past hooks on the view itself.
    """
    base = output._base
    if base is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
