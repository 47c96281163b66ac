"""Per-example gradients of a model's own loss, or of a measurement, outside of a training loop."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_influence.errors import QueryError
from lightning_influence.layers import TrackedLayer, UseShape
from lightning_influence.step import LossKind, StepCapture, StepGradients

Measurement = Callable[[nn.Module, Any], Tensor]
ModuleT = TypeVar("ModuleT", bound=nn.Module)
MEASUREMENT = "`measurement=`, a function (model, batch) -> [q]"
_LOGGING: tuple[str, ...] = ("log", "log_dict")


@dataclass(frozen=True)
class Answer:
    """What a model says of a batch.

    Args:
        total: what is back-propagated, a scalar.
        values: each example's part of the sum that `total` is, shape [n]; None if it is not known.
    """

    total: Tensor
    values: Tensor | None = None


Objective = Callable[[nn.Module, Any], Answer]


def example_gradients(
    model: nn.Module,
    layers: Mapping[str, TrackedLayer],
    batch: Any,
    *,
    loss: LossKind = "auto",
    measurement: Measurement | None = None,
) -> StepGradients:
    """Gradients of each example's loss (or of *minus* its measurement), in eval mode.

    The model is left as it was: no `.grad` is touched, nothing is logged, modes are put back.

    Args:
        model: a `LightningModule`, or any module if there is a measurement.
        layers: those whose gradients are wanted.
        batch: as `training_step` takes it, on the model's device.
        loss: how the loss's scale is known, as in `InfluenceCallback`.
        measurement: `measurement(model, batch) -> [q]`.

    Raises:
        QueryError: if there is no differentiable loss or measurement.
        CaptureError: if the gradients cannot be tied to the batch's examples.
    """
    capture = StepCapture(layers, loss=loss if measurement is None else "sum")
    objective = training_objective if measurement is None else partial(_minus_measured, measurement)
    with back_propagated(model, capture, batch, objective) as answer:
        return capture.gradients(None if answer.values is None else len(answer.values))


def shapes_seen(
    model: nn.Module, layers: Mapping[str, TrackedLayer], batch: Any, objective: Objective | None = None
) -> dict[str, list[UseShape]]:
    """The shapes of each layer's output gradients for a batch, in eval mode; as `example_gradients`."""
    capture = StepCapture(layers, loss="sum")
    with back_propagated(model, capture, batch, objective or training_objective):
        return capture.shapes()


@contextmanager
def back_propagated(
    model: nn.Module,
    capture: StepCapture,
    batch: Any,
    objective: Objective,
    *,
    scale: float = 1.0,
    before_backward: Callable[[Tensor], None] | None = None,
) -> Iterator[Answer]:
    """The forward and backward of a batch, seen by `capture`, in eval mode; all is put back on leaving.

    Args:
        model: see `example_gradients`.
        capture: of the layers whose gradients are wanted.
        batch: on the model's device.
        objective: what of the batch is minimised.
        scale: that it is multiplied with, for gradients in half precision.
        before_backward: called with what will be back-propagated.
    """
    sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if sizes and not any(sizes):
        raise QueryError("The batch holds no example; pass at least one.")
    with torch.inference_mode(False), torch.enable_grad(), asked_of(model, capture.layers):
        batch = apply_to_collection(batch, Tensor, _usable_in_autograd)
        with capture:
            answer = objective(model, batch)
            answer = Answer(answer.total if scale == 1 else answer.total * scale, answer.values)
            if before_backward is not None:
                before_backward(answer.total)
                capture.set_open(True)
            answer.total.backward()  # not autograd.grad, which reentrant checkpointing refuses
        yield answer


def _covered_parameters(layers: Mapping[str, TrackedLayer]) -> list[nn.Parameter]:
    """The parameters that the layers' gradients cover."""
    return [parameter for layer in layers.values() for parameter in layer.parameters.values()]


class NoLossError(QueryError):
    """`training_step` returned None, which in training skips the batch."""


def training_objective(model: nn.Module, batch: Any, *, instead: str = MEASUREMENT) -> Answer:
    """The loss that the model's own `training_step` returns.

    Args:
        model: a `LightningModule`.
        batch: as `training_step` takes it.
        instead: what to pass where that does not work, for messages.

    Raises:
        NoLossError: if the step returned None.
        QueryError: if there is no differentiable loss.
    """
    if not isinstance(model, LightningModule) or not model.automatic_optimization:
        raise QueryError(
            f"{type(model).__name__} has no `training_step` that only returns a loss (it is a plain module, "
            f"or optimizes manually); pass {instead}."
        )
    takes_index = len(inspect.signature(model.training_step).parameters) > 1
    try:
        output = model.training_step(*((batch, 0) if takes_index else (batch,)))
    except Exception as error:  # the user's code, in a way it may not be made for
        raise QueryError(
            f"`training_step` of {type(model).__name__} failed when it was asked about a batch, in eval mode "
            f"and without a trainer: {type(error).__name__}: {error} Mend that, or pass {instead}."
        ) from error
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise (NoLossError if loss is None else QueryError)(
            f"`training_step` of {type(model).__name__} returned no differentiable loss, got "
            f"{type(loss).__name__}; pass {instead}."
        )
    return Answer(loss)


def summed_objective(function: Measurement, name: str, model: nn.Module, batch: Any) -> Answer:
    """The sum of what a user's function says of each example.

    Args:
        function: of model and batch.
        name: of the function, with the shape that it must return, for messages.
        model: for the function.
        batch: for the function.

    Raises:
        QueryError: if the function returns something else than one value an example.
    """
    values = function(model, batch)
    if not isinstance(values, Tensor) or values.ndim != 1 or not values.requires_grad:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise QueryError(f"{name}, got {found}.")
    return Answer(values.sum(), values)


def _minus_measured(measurement: Measurement, model: nn.Module, batch: Any) -> Answer:
    expected = "`measurement(model, batch)` must return a differentiable tensor of shape [q], one value a query"
    answer = summed_objective(measurement, expected, model, batch)
    return Answer(-answer.total, answer.values)


def copy_to_ask(model: ModuleT, layers: Mapping[str, TrackedLayer]) -> tuple[ModuleT, dict[str, TrackedLayer]]:
    """A deep copy of a model in training, without its trainer, and its layers."""
    clone = copy.deepcopy(model, {id(t): t.detach().clone() for t in _tensors_in_graphs(model)})
    for name in ("forward", "training_step"):  # a compiled model's are bound to the original
        vars(clone).pop(name, None)
    return clone, {name: layer.of_copy(clone) for name, layer in layers.items()}


def _tensors_in_graphs(model: nn.Module) -> Iterator[Tensor]:
    """Attributes that are part of a graph, such as a hidden state that is kept; deepcopy refuses them."""
    values = [value for module in model.modules() for value in vars(module).values()]
    while values:
        value = values.pop()
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                yield value
        elif isinstance(value, list | tuple):
            values += value
        elif isinstance(value, dict):
            values += value.values()


def copied(batch: Any) -> Any:
    """A batch of its own, for asking again later; training may change the one it has."""
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().clone())


@contextmanager
def kept_random_states() -> Iterator[None]:
    """`isolate_rng`, which does not put the states back after an exception."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


@contextmanager
def without_other_processes() -> Iterator[None]:
    """Ask in this process alone: a step that talks to others, who are not asked, would wait for ever."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    with _RefusingCollectives():
        yield


class _RefusingCollectives(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            raise QueryError("`training_step` talks to other processes, which are not asked.")
        return func(*args, **(kwargs or {}))


@contextmanager
def asked_of(model: nn.Module, layers: Mapping[str, TrackedLayer]) -> Iterator[None]:
    """Eval mode, gradients for the covered parameters, no logging; everything is put back after."""
    with ExitStack() as restored:
        for parameter in model.parameters():
            restored.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        for module in model.modules():
            restored.callback(setattr, module, "training", module.training)
        for parameter in _covered_parameters(layers):
            restored.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        restored.enter_context(_without_logging(model))
        restored.enter_context(_without_others_looking())
        model.eval()
        restored.enter_context(_kept_state(model))
        yield


@contextmanager
def _kept_state(model: nn.Module) -> Iterator[None]:
    """Buffers and attributes are put back; a step that writes to parameters, as an average, is refused."""
    owners = [(module, dict(module._buffers), dict(vars(module))) for module in model.modules()]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for module, owned, attributes in owners:
            module._buffers.update(owned)
            vars(module).clear()  # of what a step keeps for the next one, such as a hidden state
            vars(module).update(attributes)
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)
    changed = [name for name, parameter in model.named_parameters() if parameter._version != versions.get(name)]
    if changed:
        raise QueryError(
            f"Asking {type(model).__name__} wrote to its parameters {', '.join(changed[:3])}, so its answers "
            "would change; pass `measurement=`, a function (model, batch) -> [q] that changes nothing."
        )


@contextmanager
def _without_others_looking() -> Iterator[None]:
    """Function modes of others, such as another callback's loss tap, see nothing of what we ask; ours do."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with torch._C._EnableTorchFunction():
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@contextmanager
def _without_logging(model: nn.Module) -> Iterator[None]:
    """`self.log` and `self.log_dict` do nothing: there is no loop to collect what they say."""
    modules = [vars(module) for module in model.modules() if isinstance(module, LightningModule)]
    own = [{name: attributes[name] for name in _LOGGING if name in attributes} for attributes in modules]
    for attributes in modules:
        attributes.update(dict.fromkeys(_LOGGING, _ignore))
    try:
        yield
    finally:
        for attributes, before in zip(modules, own, strict=True):
            for name in _LOGGING:
                del attributes[name]
            attributes.update(before)


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _usable_in_autograd(tensor: Tensor) -> Tensor:
    if tensor.is_inference():
        return tensor.clone()
    # a leaf of ours, so that the backward leaves nothing in the user's `.grad`
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor
