"""`LossTap`: sees the loss functions that a training step calls, and what becomes of their values.

A `TorchFunctionMode` sees each call, a tensor hook on its value the derivative c of whatever is
back-propagated; the arithmetic is in `lightning_influence.losses.scale`. Nothing is changed: the
value goes back as it came, and the hook returns None.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch's documentation uses)
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.losses.call import CallGraph, LossCall
from lightning_influence.losses.functions import RULES
from lightning_influence.losses.scale import LossScale, scale_of_calls


class LossTap(TorchFunctionMode):
    """Context manager that finds the scale of a training step's gradients.

    Enter it for the forward, backward included or not; ask for `scale` after the backward, inside
    or outside the `with`. Entering again forgets the last step. Between the two it keeps the
    loss's arguments (logits and targets, not their graph) alive: `clear` lets them go.

    Attributes:
        is_open: whether gradients that flow now are the step's.
        keeps_graph: whether calls know their place in the graph, which they keep alive until `forget_graph`.
        retained: tensors that were told to keep their gradient (`retain_grad`), while the graph is kept.

    A loss of one's own inside the `with`, which is not the user's, belongs under
    `torch._C.DisableTorchFunction()`.

    Example:
        >>> logits = torch.zeros(4, 2, requires_grad=True)
        >>> with LossTap() as tap:
        ...     loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
        ...     (0.5 * loss).backward()
        >>> tap.scale(4).factor  # the mean over 4 and the constant 0.5 are taken out
        tensor(8.)
        >>> (logits.grad * tap.scale(4).factor)[0]
        tensor([-0.5000,  0.5000])
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_open = True
        self.keeps_graph = False
        self.retained: list[Tensor] = []
        self._calls: list[LossCall] = []
        self._failure: str | None = None

    def __enter__(self) -> LossTap:
        self.clear()
        super().__enter__()
        return self

    # Without `disable`, dynamo traces this method when the user's model is compiled, and miscompiles.
    @torch.compiler.disable
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls the function; records it if it is a recognised loss that needs a gradient."""
        kwargs = kwargs or {}
        if func is Tensor.retain_grad and self.keeps_graph:
            self.retained.append(args[0])
        if func not in RULES:
            return func(*args, **kwargs)
        if func is F.l1_loss:
            kwargs = _with_dropped_weight(kwargs)
        value = func(*args, **kwargs)
        try:
            self._record(func, args, kwargs, value)
        except Exception as error:  # not the user's: training goes on, `scale` reports it
            self._failure = f"{func.__name__}: {type(error).__name__}: {error}"
        return value

    @property
    def calls(self) -> list[LossCall]:
        """The recorded calls, also those that no backward reached (their `constant` is None)."""
        return list(self._calls)

    def clear(self) -> None:
        """Forgets all calls, and lets go of their arguments."""
        self._calls, self.retained = [], []
        self._failure = None

    def clear_reached(self) -> None:
        """Forgets the calls that a backward has reached; another backward may reach the others."""
        self._calls = [call for call in self._calls if call.constant is None]

    def forget_graph(self) -> None:
        """Let go of the graph; the calls stay."""
        self.retained = []
        for call in self._calls:
            call.graph = None

    def accounted_for(self) -> Tensor | None:
        """The part of what was back-propagated that the recorded losses make up; None without any."""
        parts = [(call.constant * call.value).sum() for call in self._calls if call.constant is not None]
        return torch.stack([part.float() for part in parts]).sum() if parts else None

    def scale(self, n: int) -> LossScale:
        """The factor, losses and labels of the step that was just back-propagated.

        Cost: the loss functions' forward once more, without a graph.

        Args:
            n: number of examples in the step.

        Raises:
            LossNotRecognizedError: no recognised loss took part, or its scale cannot be known.
            ValueError: `n` is not positive.
        """
        if self._failure is not None:
            raise LossNotRecognizedError(
                f"A loss call could not be recorded ({self._failure}); declare "
                '`loss="mean"` or `loss="sum"` instead.'
            )
        return scale_of_calls(self._calls, n)

    def _record(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
    ) -> None:
        if not value.requires_grad:
            return
        with torch._C.DisableTorchFunction():
            call = LossCall(func, args, kwargs, value.detach())  # no reference to the graph: no cycle
            if self.keeps_graph:
                call.graph = CallGraph(args, kwargs, get_gradient_edge(value))
            value.register_hook(lambda c: call.add_constant(c) if self.is_open else None)
        self._calls.append(call)


def _with_dropped_weight(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Adds the `weight` that `l1_loss` forgets to pass on to a mode (seen in torch 2.13).

    Without it a weighted `l1_loss` would train on the unweighted one, under any mode. The value is
    read from the frame of the user's call.
    """
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    is_dropped = frame.f_code is F.l1_loss.__code__ and "weight" not in kwargs
    weight = frame.f_locals.get("weight") if is_dropped else None
    return kwargs if weight is None else kwargs | {"weight": weight}
