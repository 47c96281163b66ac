"""Whether a training step's graph may be passed through more often than the step itself does.

Torch's own nodes keep no count of their runs. A node whose backward is Python code can do anything, once more for
each label: count, log, move statistics.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge
from torch.nn.modules._functions import BackwardHookFunction

from lightning_influence.errors import UnsupportedTrainingError


def check_graph(loss: Tensor, edges: Iterable[GradientEdge], *, kind: str) -> None:
    """Refuse Python code of the user's between a loss and the outputs of its layers; nothing is run.

    Args:
        loss: of the step.
        edges: of the layers' outputs.
        kind: of the Fisher, for the message.

    Raises:
        UnsupportedTrainingError: naming the `torch.autograd.Function`, or the hooks.
    """
    for node in _nodes_to(loss.grad_fn, {edge.node for edge in edges}):
        name = _own_code(node)
        if name:
            raise UnsupportedTrainingError(
                f"The backward runs {name}, which would run once more for each label that "
                f'`fisher="{kind}"` draws, and might change training; take it out, or pass `fisher="empirical"`.'
            )


def _own_code(node: Any) -> str:
    """What of the user's a node runs; "" if nothing."""
    if not isinstance(node, BackwardCFunction):
        return ""
    function = getattr(node, "_forward_cls", type(node))
    if function is BackwardHookFunction:
        return "a full backward hook of a module"
    is_torch = function.__module__.partition(".")[0] == "torch"
    return "" if is_torch else f"the `torch.autograd.Function` {function.__name__!r}"


def _nodes_to(root: Any, ends: set[Any]) -> Iterable[Any]:
    """The nodes of a graph that a backward from the root to the ends runs; without recursion, graphs are deep."""
    leads: dict[Any, bool] = {}  # whether a node is to be run; False while its inputs are looked at
    waiting = [(root, False)]
    while waiting:
        node, is_expanded = waiting.pop()
        inputs = [below for below, _ in node.next_functions if below is not None]
        if is_expanded:
            leads[node] = any(leads[below] or below in ends for below in inputs)
        elif node not in leads:
            leads[node] = False
            waiting += [(node, True), *((below, False) for below in inputs)]
    return [node for node, is_run in leads.items() if is_run]
