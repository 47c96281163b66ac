"""Hooks that see a step's layer inputs and output gradients, and leave everything as it was.

A forward hook registers a *tensor* hook on the layer's output, with the input in its closure. Of the
ways to get at output gradients this is the one that is right under in-place activations, reused
modules, both kinds of activation checkpointing and autocast, and that needs no second backward;
module backward hooks raise, and `autograd.grad` on saved outputs is silently wrong, after an
in-place ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_influence.errors import LayerError
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers.coverage import TrackedLayer


class _Call(NamedTuple):
    layer_input: Tensor
    output_grad: Tensor
    is_intact: bool  # the input is as the forward saw it


class GradientCapture:
    """Context manager: records (input, output gradient) for every call of the tracked layers.

    Nothing is attached to a module outside the `with` block, and nothing that the hooks do can
    raise or change a gradient. A layer called several times contributes the sum of its calls, as
    further shared positions.

    Attributes:
        is_open: whether gradients that flow now are recorded. Closed outside of the real backward, it
            leaves out inner ones (adversarial examples, other callbacks' gradients).
    """

    def __init__(self, layers: Mapping[str, TrackedLayer]) -> None:
        self.layers = layers
        self.is_open = True
        self._records: dict[str, list[_Call]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> GradientCapture:
        self._remove()
        self._records = {name: [] for name in self.layers}
        for name, layer in self.layers.items():
            hook = self._forward_hook(layer.module, self._records[name])
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Forget the records, so that a step's activations can be freed."""
        self._records = {}

    @property
    def unseen(self) -> list[str]:
        """Layers of which no call took part in a backward."""
        return [name for name in self.layers if not self._records.get(name)]

    @property
    def changed(self) -> list[str]:
        """Layers whose input was changed in place before the backward; theirs cannot be known."""
        return [name for name in self.layers if not all(c.is_intact for c in self._records.get(name, ()))]

    def gradients(self) -> dict[str, LayerGradient]:
        """Gradients as back-propagated (no scale divided out) of every layer that was seen.

        Raises:
            LayerError: naming the layer whose inputs do not have the batch first, or were changed.
        """
        return {name: self._gradient(name) for name in self.layers if self._records.get(name)}

    def _gradient(self, name: str) -> LayerGradient:
        layer, records = self.layers[name], self._records[name]
        if not all(call.is_intact for call in records):
            raise LayerError(
                f"Layer {name!r}: its input was changed in place between forward and backward, so its gradients "
                "are not known; change a copy, or leave the layer out with `layers=`."
            )
        try:
            calls = [layer.gradient(call.layer_input, call.output_grad) for call in records]
        except LayerError as error:
            raise LayerError(f"Layer {name!r}: {error}") from error
        if len(calls) == 1:
            return calls[0]
        if len({len(call) for call in calls}) > 1:
            raise LayerError(
                f"Layer {name!r} was called {len(calls)} times in one step with different numbers of "
                f"rows: {[len(call) for call in calls]}; rows must be the batch's examples in every call."
            )
        return LayerGradient(
            torch.cat([call.inputs for call in calls], dim=1),
            torch.cat([call.output_grads for call in calls], dim=1),
        )

    def _forward_hook(self, tracked: nn.Module, records: list[_Call]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if module is not tracked:  # a copy of the model that was made meanwhile has the hook too
                return
            if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
                return
            layer_input = next(iter((*args, *kwargs.values())), None)
            if not isinstance(layer_input, Tensor):
                return  # such a layer is reported as unseen
            with torch._C.DisableTorchFunction():  # what we do here is not for the loss tap to look at
                seen, version, shape = layer_input.detach(), layer_input._version, output.shape

                def record(grad: Tensor) -> None:  # a hook that returns a tensor would replace the gradient
                    if self.is_open:
                        records.append(_Call(seen, grad.detach().reshape(shape), seen._version == version))

                _in_graph(output).register_hook(record)

        return hook


def _in_graph(output: Tensor) -> Tensor:
    """The tensor whose gradient hook is sure to fire.

    `nn.Linear` with a bias returns a view for inputs of more than two dimensions. An in-place
    activation then rewires the graph from the view's base, past hooks on the view itself.
    """
    base = output._base
    if base is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
