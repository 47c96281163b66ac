"""Backwards through the graph of a training step, before its own, that leave nothing behind.

They run from the model's predictions to the outputs of its layers, not to the weights: no weight gradient is
made, no `.grad` touched, and the hooks that join processes, which sit at the weights, see nothing. They are
made by `torch.autograd.grad` to the layers' gradient edges, which is right under in-place activations too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.fisher.kinds import LabelSource
from lightning_influence.gradients import LayerGradient
from lightning_influence.losses import predictives
from lightning_influence.step import StepCapture, check_rows

LabelGradients = dict[str, LayerGradient]


class LabelPasses:
    """Makes gradients under labels of the model's own, with an own random generator.

    Args:
        source: of the labels.
        model: whose buffers are put back where a pass changes them (a checkpointed batch normalization does).
        seed: of the labels; processes need different ones.

    Attributes:
        per_example: labels of an example, of the last step.
    """

    def __init__(self, source: LabelSource, model: nn.Module, *, seed: int = 0) -> None:
        self.source, self.per_example = source, 0
        self._model, self._seed = model, seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._moving = _running_statistics(model)  # buffers that a pass changes, as far as is known
        self._is_first = True  # step: more may
        self._waiting: list[dict] = []
        self._reached: set[str] = set()
        self._scale = 1.0

    def run(
        self,
        capture: StepCapture,
        loss: Tensor,
        n: int,
        *,
        scale: float = 1.0,
        after_pass: Callable[[], None] | None,
    ) -> None:
        """All passes of a step, just before its own backward.

        Args:
            capture: around the step, whose graph is kept.
            loss: that will be back-propagated.
            n: number of examples.
            scale: what pulls are multiplied with, for gradients in half precision.
            after_pass: called after each pass, to call `each`; None: `each` is called later.

        Raises:
            UnsupportedTrainingError: if the graph cannot be passed through twice.
            LossNotRecognizedError: if the step's loss has no labels to draw.
        """
        self._waiting, self._reached, self._scale = [], set(), scale
        capture.set_open(False)
        # what we do here is not for loss taps to look at, ours or another callback's
        with capture.closed_to_others(), torch._C.DisableTorchFunction():
            self._run(capture, loss, n, after_pass)

    def _run(self, capture: StepCapture, loss: Tensor, n: int, after_pass: Callable[[], None] | None) -> None:
        with self._undisturbed(capture):
            found = predictives(loss, capture.tap.calls, n)
        if not found:
            return
        self._check_passes(found)
        edges = [*capture.hooks.edges]
        for pulls in self.source.pulls(found, self._generator(found[0].prediction.device)):
            records: dict = {}
            with self._undisturbed(capture), capture.hooks.apart(records):
                capture.hooks.is_open = True
                _pull(pulls, edges, self._scale)
            self._reached |= {name for name, uses in records.items() if uses}
            self._waiting.append(records)
            if after_pass is not None:
                after_pass()
        self._is_first = False
        capture.tap.forget_graph()
        capture.hooks.edges = []

    def each(
        self, capture: StepCapture, n: int, *, kept: Tensor | None = None, is_copied: bool = False
    ) -> Iterator[LabelGradients]:
        """The gradients of the passes that wait, each once; whose batch dimensions must be known now.

        Args:
            capture: as for `run`.
            n: number of examples.
            kept: a mask [n] of the examples that are wanted; None takes all.
            is_copied: whether they are kept beyond the step.
        """
        while self._waiting:
            with capture.hooks.apart(self._waiting.pop(0)):
                raw = capture.hooks.gradients()
            for name, gradient in raw.items():
                check_rows(name, gradient, n)
            factor = torch.tensor(1 / self._scale, dtype=torch.float32)
            found = {name: g.rescaled(factor, None if is_copied else frozenset()) for name, g in raw.items()}
            if kept is not None:
                found = {name: gradient[kept.to(gradient.device)] for name, gradient in found.items()}
            yield found

    def check_reached(self, names: Collection[str]) -> None:
        """Refuse a step whose own backward reached layers that these passes did not.

        Raises:
            UnsupportedTrainingError: naming one.
        """
        missed = [name for name in names if name not in self._reached]
        if self._reached and missed:
            raise UnsupportedTrainingError(
                f"Layer {missed[0]!r} gets a gradient from the step's loss, but not through the prediction that "
                f'labels are drawn from (`fisher="{self.source.kind}"`): its activations are checkpointed with '
                "`use_reentrant=True` (pass False), or a term of the loss that is no likelihood uses it; pass "
                '`fisher="empirical"`.'
            )

    def _check_passes(self, found: list) -> None:
        passes = self.source.passes(found)
        if self.per_example not in (0, passes):
            raise UnsupportedTrainingError(
                f"The step's losses have {passes} labels an example, and had {self.per_example} before, so "
                f'that steps would not weigh alike with `fisher="{self.source.kind}"`; pass `fisher="sampled"`.'
            )
        self.per_example = passes

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    @contextmanager
    def _undisturbed(self, capture: StepCapture) -> Iterator[None]:
        """Put back what a backward changes besides weights' gradients.

        These are random states and buffers, since checkpointed parts of a model run again in each pass, and the
        gradients of tensors that retain them, which would add up.
        """
        watched = list(self._model.buffers()) if self._is_first else self._moving
        before = [buffer.detach().clone() for buffer in watched]
        grads = [(tensor, tensor.grad) for tensor in capture.tap.retained]
        devices = {p.device for p in self._model.parameters() if p.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices=list(devices)):
                yield
        finally:
            known = {id(buffer) for buffer in self._moving}
            for buffer, value in zip(watched, before, strict=True):
                # by value: batch normalization updates its statistics past their version counter
                if id(buffer) in known or not torch.equal(buffer, value):
                    buffer.data.copy_(value)  # not to the notice of a backward that has saved it
                    self._moving += [buffer] if id(buffer) not in known else []
            for tensor, grad in grads:
                tensor.grad = grad


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """Of batch normalization and its like: which may be frozen, or skipped, in the first step and move later."""
    modules = [module for module in model.modules() if hasattr(module, "running_mean")]
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


def _pull(pulls: list[tuple[Tensor, Tensor]], edges: list, scale: float) -> None:
    predictions = [prediction for prediction, _ in pulls]
    values = [(value * scale).to(prediction.dtype) for prediction, value in pulls]
    try:
        with torch._C._EnableTorchFunction():  # of the model's own parts that run again
            torch.autograd.grad(predictions, edges, values, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error) or "checkpointing is not compatible with .grad()" in str(error).lower():
            raise UnsupportedTrainingError(
                "The model checkpoints activations with `use_reentrant=True`, through which gradients under drawn "
                'labels cannot be taken; pass `use_reentrant=False` to `checkpoint`, or `fisher="empirical"`.'
            ) from error
        raise
