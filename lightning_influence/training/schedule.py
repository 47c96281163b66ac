"""Which epochs are captured: the final one where it is certain, otherwise each one in turn."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, Timer


class CaptureSchedule:
    """What to do in each epoch of a run.

    If nothing can end the run early, only the final epoch's rows are recorded. Otherwise every
    epoch's are, and each complete epoch replaces the one before ("rolling").

    Args:
        trainer: at the start of training, when the number of batches is known.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.final_epoch = certain_final_epoch(trainer)

    @property
    def is_rolling(self) -> bool:
        """Whether every epoch may be the last."""
        return self.final_epoch is None

    def records_rows(self, epoch: int) -> bool:
        """Whether this epoch's rows are written."""
        return self.is_rolling or epoch == self.final_epoch

    def prepares_bases(self, epoch: int) -> bool:
        """Whether this epoch's covariances give the bases of the next."""
        return self.final_epoch is not None and epoch == self.final_epoch - 1


def certain_final_epoch(trainer: Trainer) -> int | None:
    """The number of the last epoch, or None if something may end the run before it is over."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs is None or epochs < 1:
        return None
    # The batch norm update of weight averaging adds an epoch without any backward.
    may_stop = (EarlyStopping, Timer, StochasticWeightAveraging)
    if any(isinstance(callback, may_stop) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return None
    batches = trainer.num_training_batches
    if steps != -1:
        automatic = trainer.lightning_module.automatic_optimization
        if not automatic or math.isinf(batches):
            return None
        if steps < epochs * math.ceil(batches / trainer.accumulate_grad_batches):
            return None
    return epochs - 1
