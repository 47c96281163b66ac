"""One recorded call of a loss function.

Recording keeps only detached arguments; everything else is worked out in `read_call`, once the
step is over. So a training step pays one hook, and an odd argument cannot fail inside it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.losses.functions import Arguments

_signature = functools.cache(inspect.signature)


@dataclass(frozen=True, eq=False)
class CallGraph:
    """What keeps the graph of a call alive.

    Args:
        args: the positional arguments as they were given.
        kwargs: the named arguments, likewise.
        edge: of the value, as it was returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edge: GradientEdge


@dataclass(eq=False)
class LossCall:
    """A call of a recognised loss function.

    Args:
        function: the function of `torch.nn.functional`.
        args: its positional arguments, tensors detached (they keep sharing their memory).
        kwargs: its named arguments, likewise.
        value: what it returned, detached.
        constant: c = d(back-propagated) / d(loss value), of the loss value's shape; None until a
            backward reached the call, the sum over backwards if several did.
        graph: the call's place in the graph, where it is wanted.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor
    constant: Tensor | None = None
    graph: CallGraph | None = None
    _versions: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.args = tuple(_detached(value) for value in self.args)
        self.kwargs = {name: _detached(value) for name, value in self.kwargs.items()}
        self._versions = self._current_versions()

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__

    def add_constant(self, gradient: Tensor) -> None:
        """The tensor hook of the loss value. Returns None: a returned tensor would replace it."""
        gradient = gradient.detach()
        self.constant = gradient if self.constant is None else self.constant + gradient

    def arguments(self) -> Arguments:
        """The arguments by name, defaults filled in, half precision raised to float32."""
        if self._current_versions() != self._versions:
            raise LossNotRecognizedError(
                f"An argument of {self.name} was changed in place after the call, so the losses "
                "cannot be computed again; copy it before changing it, or declare "
                '`loss="mean"` or `loss="sum"`.'
            )
        bound = _signature(self.function).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return {name: at_least_float32(value) for name, value in bound.arguments.items()}

    def arguments_in_graph(self) -> dict[str, Tensor]:
        """The arguments that gradients flow into, by name, as they were given; needs `graph`."""
        assert self.graph is not None
        given = _signature(self.function).bind(*self.graph.args, **self.graph.kwargs).arguments
        return {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}

    def _current_versions(self) -> list[int]:
        values = (*self.args, *self.kwargs.values())
        return [v._version for v in values if isinstance(v, Tensor)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def at_least_float32(value: Any) -> Any:
    """Half precision as float32, anything else as it is."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value
