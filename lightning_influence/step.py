"""One step's per-example gradients: the hooks on the layers and the tap on the loss, together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.errors import LayerError, RowIndexError
from lightning_influence.gradients import FactoredGradient, LayerGradient, LentGradient, RowGradient
from lightning_influence.layers import GradientCapture, TrackedLayer, UseShape
from lightning_influence.losses import LossScale, LossTap, declared_scale

LossKind = Literal["auto", "mean", "sum"]


@dataclass(frozen=True)
class StepGradients:
    """What one step says about its n examples.

    Args:
        gradients: of each tracked layer, float32, of the examples' own summed losses.
        scale: of the loss, with each example's loss and label.
    """

    gradients: dict[str, LayerGradient]
    scale: LossScale

    def __len__(self) -> int:
        return len(self.scale.losses)

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients."""
        return sum(gradient.nbytes for gradient in self.gradients.values())

    def taken(self) -> StepGradients:
        """The same without lent gradients."""
        gradients = {n: g.taken() if isinstance(g, LentGradient) else g for n, g in self.gradients.items()}
        return StepGradients(gradients, self.scale)

    def changed_source(self) -> str | None:
        """A layer whose tensors were changed in place since they were copied; None if there is none."""
        lent = {n: g for n, g in self.gradients.items() if isinstance(g, LentGradient)}
        return next((name for name, gradient in lent.items() if not gradient.has_kept_source), None)

    def check_lent(self) -> None:
        """After the last look at lent gradients.

        Raises:
            LayerError: naming a layer whose tensors were changed in place meanwhile.
        """
        for name, gradient in self.gradients.items():
            if isinstance(gradient, LentGradient) and not gradient.is_intact:
                raise LayerError(
                    f"Layer {name!r}: its input or output gradient was changed in place after the backward, while "
                    "it was recorded in the background; change a copy, or pass `background=False`."
                )

    def with_zeros(self, layers: Mapping[str, TrackedLayer]) -> StepGradients:
        """The same for just these layers, in their order; those that the step did not use have zero gradients."""
        zeros = self.scale.losses
        gradients = {
            name: self.gradients[name] if name in self.gradients else _zeros(layer, len(self), zeros)
            for name, layer in layers.items()
        }
        return StepGradients(gradients, self.scale)


class _Eager:
    """Compiled code would run without the hooks, so while any capture is active it runs eagerly.

    Two callbacks' captures end in the order in which they began, and the second would put back the
    stance of the first. So the first one sets it, and the last one puts it back.
    """

    def __init__(self) -> None:
        self._active = 0
        self._stance = ExitStack()

    def __enter__(self) -> None:
        if self._active == 0 and "torch._dynamo" in sys.modules:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._active += 1

    def __exit__(self, *error: object) -> None:
        self._active -= 1
        if self._active == 0:
            self._stance.close()


_EAGER = _Eager()  # the stance belongs to the process, and so does this
_ACTIVE: list[StepCapture] = []  # of all callbacks: their hooks sit on the same layers


class StepCapture:
    """Context manager around one training step, forward and backward.

    Args:
        layers: the tracked layers.
        loss: "auto" recognises the loss function that is called; "mean" and "sum" declare that the
            back-propagated value is the mean or the sum over the batch's examples of their losses.
    """

    def __init__(self, layers: Mapping[str, TrackedLayer], *, loss: LossKind = "auto") -> None:
        self.layers = layers
        self.loss = loss
        self._tap = LossTap()
        self._hooks = GradientCapture(layers)
        self._active = ExitStack()

    def __enter__(self) -> StepCapture:
        self.set_open(True)
        with ExitStack() as entered:
            entered.enter_context(_EAGER)
            entered.enter_context(self._hooks)
            if self.loss == "auto":
                entered.enter_context(self._tap)
            _ACTIVE.append(self)
            entered.callback(_ACTIVE.remove, self)
            self._active = entered.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._active.close()

    def keep(self, layers: Mapping[str, TrackedLayer]) -> None:
        """Go on with some of the layers only."""
        self.layers = self._hooks.layers = layers

    def set_open(self, is_open: bool) -> None:
        """Whether gradients that flow now belong to the step; True on entering."""
        self._hooks.is_open = self._tap.is_open = is_open

    @contextmanager
    def closed_to_others(self) -> Iterator[None]:
        """Gradients that flow within are this capture's alone, and not those of another callback's."""
        others = [(other, other.hooks.is_open) for other in _ACTIVE if other is not self]
        try:
            for other, _ in others:
                other.set_open(False)
            yield
        finally:
            for other, was_open in others:
                other.set_open(was_open)

    @property
    def hooks(self) -> GradientCapture:
        """On the layers."""
        return self._hooks

    @property
    def tap(self) -> LossTap:
        """On the loss; it sees nothing if the loss is declared."""
        return self._tap

    def keep_graph(self, is_kept: bool) -> None:
        """Whether the graph of the next step is kept until its backward, for others' passes through it."""
        self._hooks.keeps_edges = self._tap.keeps_graph = is_kept

    def accounted_for(self) -> Tensor | None:
        """The part of what was back-propagated that recognised losses make up; None if none was seen."""
        return self._tap.accounted_for()

    @property
    def changed(self) -> list[str]:
        """Layers whose input was changed in place before the backward."""
        return self._hooks.changed

    @property
    def unseen(self) -> list[str]:
        """Layers of which no call took part in a backward."""
        return self._hooks.unseen

    def shapes(self) -> dict[str, list[UseShape]]:
        """What the output gradients of each layer's uses looked like, in the order of the backward."""
        return self._hooks.shapes()

    def raw_calls(self) -> tuple[dict[str, list[LayerGradient]], dict[str, str]]:
        """Gradients of each use of the layers that were seen, as back-propagated, and why others have none."""
        return self._hooks.calls()

    def gradients(
        self,
        n: int | None = None,
        *,
        backpropagated_factor: float = 1.0,
        reduce: Mapping[str, Callable[[LayerGradient], LayerGradient]] | None = None,
        names: Collection[str] | None = None,
        kept: Tensor | None = None,
    ) -> StepGradients:
        """Per-example gradients after the backward; forgets the step.

        Args:
            n: the number of examples in the batch; None takes the number of rows that layers saw.
            backpropagated_factor: with a declared loss, what it was multiplied with before the
                backward (1 / accumulation, times the AMP scale).
            reduce: by layer, what to make of its gradients at once, so that its inputs need no copy.
            names: of the layers to make gradients of; None takes all.
            kept: a mask [n] of the examples that are wanted; None takes all.

        Raises:
            LossNotRecognizedError: if the loss's scale cannot be known.
            LayerError: if no layer was seen.
            RowIndexError: if a layer's rows are not the batch's n examples.
        """
        step = self.since_last(
            n, backpropagated_factor=backpropagated_factor, reduce=reduce, names=names, kept=kept
        )
        self.clear()
        wanted = self.layers if names is None else names
        return step.with_zeros({name: layer for name, layer in self.layers.items() if name in wanted})

    def since_last(
        self,
        n: int | None = None,
        *,
        backpropagated_factor: float = 1.0,
        reduce: Mapping[str, Callable[[LayerGradient], LayerGradient]] | None = None,
        names: Collection[str] | None = None,
        kept: Tensor | None = None,
        foreign: Iterable[Tensor] | None = None,
        copies: bool = False,
    ) -> StepGradients:
        """Gradients of the backwards since the last call, of the layers that they reached; else as `gradients`.

        With `reduce`, even an empty one, an example that is not finite in one of these layers is NaN in all, so
        that it enters no layer's sums. With `foreign`, which are tensors that live on, gradients of whole
        batches are lent: nothing is computed yet, and only what shares memory with these is copied, or with
        `copies` everything.
        """
        names = self.layers.keys() if names is None else names
        raw = self._hooks.gradients(names)
        if not raw:
            raise LayerError(
                f"None of the {len(self.layers)} tracked layers took part in a backward; they are: "
                f"{', '.join(self.layers)}. Do they run through their `__call__`, with gradients enabled?"
            )
        n = len(next(iter(raw.values()))) if n is None else n
        for name, gradient in raw.items():
            check_rows(name, gradient, n)
        scale = self._scale(n, backpropagated_factor)
        nearest = self.layers.get(self._hooks.nearest_to_loss)
        if nearest is not None and nearest.batch_dim != 0:
            scale = scale.of_positions_first()
        gradients: dict[str, LayerGradient] = {}
        if foreign is not None and kept is None:
            outside = self._hooks.outside() | {tensor.untyped_storage().data_ptr() for tensor in foreign}
            lent = {name: LentGradient.of(g, scale.factor, outside) for name, g in raw.items()}
            gradients.update({name: g.copied() if copies else g for name, g in lent.items()})
            self.forget_reached()
            return StepGradients(gradients, scale)
        factor, finite = scale.factor, None
        if reduce is not None:
            factor, finite = _jointly_finite(raw.values(), factor)
            finite = finite if kept is None else finite[kept.to(finite.device)]
        shared, reduce = self._hooks.storages(), reduce or {}
        for name in raw:
            own = frozenset() if name in reduce else shared
            gradient = raw[name].rescaled(factor, own)
            if kept is not None:
                gradient = gradient[kept.to(gradient.device)]
            if finite is not None:
                gradient = gradient.knowing(finite)
            gradients[name] = reduce[name](gradient) if name in reduce else gradient
        self.forget_reached()
        return StepGradients(gradients, scale if kept is None else scale.of_examples(kept))

    def forget_reached(self) -> None:
        """Forget what backwards have reached so far, losses too; later ones of the step are seen by themselves."""
        self._hooks.clear_reached()
        self._tap.clear_reached()

    def clear(self) -> None:
        """Forget the step, so that its activations can be freed."""
        self._hooks.clear()
        self._tap.clear()

    def _scale(self, n: int, backpropagated_factor: float) -> LossScale:
        if self.loss == "auto":
            return self._tap.scale(n)
        return declared_scale(self.loss, n, backpropagated_factor)


def check_rows(name: str, gradient: LayerGradient, n: int) -> None:
    """Refuse gradients of a layer that are not those of n examples.

    Raises:
        RowIndexError: naming the layer.
    """
    if len(gradient) != n:
        raise RowIndexError(
            f"Layer {name!r} saw {len(gradient)} rows in a batch of {n} examples. Its inputs must have one row "
            "an example; leave the layer out with `layers=`, or, if a "
            "batch holds other rows than the sampler's indices say, pass `index_fn=`."
        )


def _jointly_finite(gradients: Iterable[LayerGradient], factor: Tensor) -> tuple[Tensor, Tensor]:
    """The factor, NaN for examples that are not finite in all layers when multiplied by it; and which are, [n]."""
    finite = torch.stack([gradient.is_finite(factor).to(factor.device) for gradient in gradients]).all(0)
    return (factor if finite.all() else factor.where(finite, torch.nan)), finite


def _zeros(layer: TrackedLayer, n: int, like: Tensor) -> LayerGradient:
    """The gradient of a layer that the step did not use."""
    o, i = layer.shape
    if layer.adapter.is_table:
        rows = torch.zeros(n, 1, dtype=torch.int64, device=like.device)
        return RowGradient(o, rows, torch.zeros(n, 1, i, device=like.device, dtype=torch.float32))
    zeros = torch.zeros(n, 1, i + o, device=like.device, dtype=torch.float32)
    return FactoredGradient(zeros[..., :i], zeros[..., i:])
