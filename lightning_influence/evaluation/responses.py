"""What giving training examples another weight does to a model: its parameters after each, and what follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.solvers import Objective, SolveInfo
from lightning_influence.solvers.objective import Batch, Loss

CHUNK_ROWS = 16  # sets of parameters that are run at a time


@dataclass(frozen=True)
class Responses:
    """A model's parameters after each of m examples, alone, got another weight in the mean training loss.

    Args:
        objective: model and loss, as functions of the parameters.
        parameters: of each response, shape [m, p].
        baseline: where no weight was changed, shape [p].
        epsilon: what was added to the weight 1/N that an example has; -1/N removes it.
        info: how each response was found. Its residual is the size of the gradient that is left over the one at
            the start.
    """

    objective: Objective
    parameters: Tensor
    baseline: Tensor
    epsilon: float
    info: SolveInfo

    def scores(self, query_loader: Iterable[Any], *, measurement: Loss | None = None) -> Tensor:
        """How each query's measurement responded: (f_q(response m) - f_q(baseline)) / epsilon.

        These are what influence scores estimate, in their sign and units: positive where weight on the example
        raises f, and minus the score over N is what removing it does.

        Args:
            query_loader: yields pairs (inputs, targets).
            measurement: `measurement(outputs, targets) -> [q]`; None for minus the loss.

        Returns:
            Shape [q, m].
        """
        batches = self.objective.batches(query_loader, "query_loader")
        changes = [self._changes(batch, measurement) for batch in batches]
        return torch.cat(changes) / self.epsilon

    def _changes(self, batch: Batch, measurement: Loss | None) -> Tensor:
        """Of one batch, [q, m]."""

        def measured(parameters: Tensor) -> Tensor:
            if measurement is None:
                return -self.objective.losses(parameters, batch)
            return measurement(self.objective.outputs(parameters, batch.inputs), batch.targets)

        with torch.no_grad():
            before = measured(self.baseline)  # [q]
            after = torch.func.vmap(measured, chunk_size=CHUNK_ROWS)(self.parameters)  # [m, q]
        return (after - before).T
