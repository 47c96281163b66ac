"""A model and its loss as functions of one flat vector of parameters, for `torch.func`.

The parameters that want gradients are joined, flattened, in `named_parameters` order: p numbers. Batches are
pairs (inputs, targets); `loss(model(inputs), targets)` is the loss of each example, shape [n], of which element
n depends on example n only. The model runs in eval mode, and is neither copied nor changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """Examples in the objective's dtype and on its device.

    Args:
        inputs: what the model is called with.
        targets: what the loss compares with.
        size: how many examples, n.
    """

    inputs: Any
    targets: Any
    size: int


class Objective:
    """The losses of a model's examples as a function of its parameters.

    Args:
        model: any module; called as `model(inputs)`.
        loss: `loss(outputs, targets) -> [n]`, each example's own loss, summed over its positions.
        dtype: to compute in, such as `torch.float64`; None for the parameters' own.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, dtype: torch.dtype | None = None) -> None:
        self.model, self.loss = model, loss
        trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("`model` has no parameter that requires a gradient.")
        first = next(iter(trainable.values()))
        self.dtype, self.device = dtype or first.dtype, first.device
        self.shapes = {name: p.shape for name, p in trainable.items()}
        self.parameters = torch.cat([p.flatten().to(self.dtype) for p in trainable.values()])
        others = {name: p.detach() for name, p in model.named_parameters() if name not in trainable}
        self._fixed = {name: self._cast(value) for name, value in (*others.items(), *model.named_buffers())}

    @property
    def size(self) -> int:
        """The number p of parameters."""
        return len(self.parameters)

    @property
    def slices(self) -> dict[str, slice]:
        """Where in the flat vector each parameter is."""
        ends = torch.tensor([0, *(shape.numel() for shape in self.shapes.values())]).cumsum(0).tolist()
        return {name: slice(*ends[k : k + 2]) for k, name in enumerate(self.shapes)}

    def outputs(self, parameters: Tensor, inputs: Any) -> Any:
        """What the model returns at the given parameters [p]."""
        named = {name: parameters[where].view(self.shapes[name]) for name, where in self.slices.items()}
        with _evaluating(self.model), twice_differentiable():
            return torch.func.functional_call(self.model, {**self._fixed, **named}, (inputs,))

    def losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """The loss of each example at the given parameters [p], shape [n]."""
        return self.loss(self.outputs(parameters, batch.inputs), batch.targets)

    def gradients(self, batch: Batch, *, loss: Loss | None = None, chunk_size: int | None = None) -> Tensor:
        """Gradients of each example's loss (or of another function of outputs and targets), shape [n, p]."""
        function = loss or self.loss

        def values(parameters: Tensor) -> Tensor:
            return function(self.outputs(parameters, batch.inputs), batch.targets)

        return torch.func.jacrev(values, chunk_size=chunk_size)(self.parameters).detach()

    def directional(self, batch: Batch, directions: Tensor, *, chunk_size: int | None = None) -> Tensor:
        """Inner products of each direction [q, p] with each example's gradient, shape [q, n].

        They are forward-mode derivatives of the losses, so no gradient of one example alone is made.
        """

        def along(direction: Tensor) -> Tensor:
            return self._along(direction, batch)

        return torch.func.vmap(along, chunk_size=chunk_size)(directions).detach()

    def input_derivatives(self, batch: Batch, directions: Tensor, *, chunk_size: int | None = None) -> Tensor:
        """Derivatives of `directional` by the examples' own inputs, shape [q, n, *features]."""
        if not isinstance(batch.inputs, Tensor) or not batch.inputs.is_floating_point():
            raise ValueError(
                'mode="perturbation" needs inputs that are one tensor of floating-point numbers, got '
                f"{_described(batch.inputs)}."
            )

        def by_inputs(direction: Tensor) -> Tensor:
            def summed(inputs: Tensor) -> Tensor:
                return self._along(direction, Batch(inputs, batch.targets, batch.size)).sum()

            return torch.func.grad(summed)(batch.inputs)

        return torch.func.vmap(by_inputs, chunk_size=chunk_size)(directions).detach()

    def batches(self, loader: Iterable[Any], argument: str = "train_loader") -> list[Batch]:
        """A loader's batches, in memory, so that every product sees the same examples.

        Raises:
            TypeError: if a batch is not a pair.
            ValueError: if the loader shuffles or leaves examples out, has none, or the losses are not [n].
        """
        check_order(loader, argument)
        batches = [self._batch(batch, argument) for batch in loader]
        if not batches:
            raise ValueError(f"`{argument}` has no batch.")
        return batches

    def _batch(self, batch: Any, argument: str) -> Batch:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"`{argument}` must yield pairs (inputs, targets), got {_described(batch)}.")
        inputs, targets = tree_map(self._cast, tuple(batch))
        with torch.no_grad():
            losses = self.losses(self.parameters, Batch(inputs, targets, 0))
        n = len(inputs) if isinstance(inputs, Tensor) else None
        if losses.ndim != 1 or n not in (None, len(losses)):
            raise ValueError(
                f"`loss` must return one number for each example, shape [{n or 'n'}], got {tuple(losses.shape)}; "
                'use reduction="none" and sum over all dimensions but the first.'
            )
        if not bool(losses.isfinite().all()):
            raise ValueError(f"`{argument}`: {int((~losses.isfinite()).sum())} losses of a batch are not finite.")
        return Batch(inputs, targets, len(losses))

    def _along(self, direction: Tensor, batch: Batch) -> Tensor:
        return torch.func.jvp(lambda p: self.losses(p, batch), (self.parameters,), (direction,))[1]

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)


def check_order(loader: Iterable[Any], argument: str) -> None:
    """Refuse a loader whose batches are not all of its dataset's examples in order.

    Raises:
        TypeError: if it can be iterated only once.
        ValueError: if it shuffles or drops a batch.
    """
    if isinstance(loader, Iterator):
        raise TypeError(f"`{argument}` must be a loader or a list of batches, got an iterator.")
    if not isinstance(loader, DataLoader):
        return
    batches = loader.batch_sampler
    is_plain = batches is None or type(batches) is BatchSampler
    sampler = batches.sampler if type(batches) is BatchSampler else loader.sampler
    if not is_plain or not isinstance(sampler, SequentialSampler):
        raise ValueError(
            f"`{argument}` draws by {type(sampler if is_plain else batches).__name__}, so that its order need not "
            "be the dataset's; pass a DataLoader with shuffle=False, or list(loader) for one draw's order."
        )
    if getattr(batches, "drop_last", False):
        raise ValueError(f"`{argument}` leaves examples out; pass a DataLoader with drop_last=False.")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain operations: the fused kernels have no second or forward-mode derivatives."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [module for module in model.modules() if module.training]
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module in modes:
            module.training = True
