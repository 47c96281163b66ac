"""Which epochs are captured: the final one where it is certain, otherwise each in turn, or those named."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, Timer

from lightning_influence.errors import CaptureError
from lightning_influence.training.options import Epochs, Rows


class CaptureSchedule:
    """What to do in each epoch of a run.

    With `epochs="last"`, only the final epoch's rows are recorded if nothing can end the run early.
    Otherwise every epoch's are, and each complete epoch replaces the one before ("rolling").

    Args:
        trainer: at the start of training, when the number of batches is known.
        epochs: that were asked for; of every n-th, the final one is one where it is certain.
        rows: "final" records no epoch's rows: they are made after training.
        merges: whether the epochs become one row an example.

    Raises:
        CaptureError: if no epoch that was asked for will come.
    """

    def __init__(
        self, trainer: Trainer, epochs: Epochs = "last", rows: Rows = "online", *, merges: bool = False
    ) -> None:
        self.final_epoch = certain_final_epoch(trainer)
        self._epochs = epochs
        self._rows, self._merges = rows, merges
        if isinstance(epochs, list) and 0 <= (trainer.max_epochs or -1) <= min(epochs):
            raise CaptureError(
                f"`epochs={epochs}` names epochs counted from 0, of which `max_epochs={trainer.max_epochs}` "
                "has none; name smaller ones, or train longer."
            )

    def start_epoch(self, trainer: Trainer) -> None:
        """A stop that was asked for, and only waits for `min_epochs`, makes this epoch the final one."""
        if trainer.should_stop and trainer.current_epoch + 1 >= (trainer.min_epochs or 0):
            self.final_epoch = trainer.current_epoch

    @property
    def is_rolling(self) -> bool:
        """Whether every epoch may be the last."""
        return self._epochs == "last" and self.final_epoch is None

    def wants(self, epoch: int) -> bool:
        """Whether this epoch is one of those that the file is to hold."""
        final = self.final_epoch
        if isinstance(self._epochs, list):
            return epoch in self._epochs
        if isinstance(self._epochs, int):
            return ((epoch + 1) if final is None else (final - epoch)) % self._epochs == 0
        return self._epochs == "every" or final is None or epoch == final

    def count(self) -> int | None:
        """How many epochs the file is to hold, where that is certain."""
        return None if self.final_epoch is None else sum(map(self.wants, range(self.final_epoch + 1)))

    def records_rows(self, epoch: int) -> bool:
        """Whether this epoch's rows are written as it goes."""
        return self._rows == "online" and self.wants(epoch)

    def prepares_bases(self, epoch: int) -> bool:
        """Whether covariances of this epoch, whose rows are not recorded, give the bases of rows to come."""
        if self._rows == "final":
            return self.wants(epoch)
        is_over = self.final_epoch is not None and epoch >= self.final_epoch
        return not is_over and self.wants(epoch + 1) and not self.wants(epoch)

    def keeps_covariances(self, epoch: int) -> bool:
        """Whether an epoch whose rows are recorded gives the bases of the next."""
        is_over = self.final_epoch is not None and epoch >= self.final_epoch
        return not is_over and self.wants(epoch + 1)

    def describe(self) -> str:
        """What is captured, for the user."""
        if self._rows == "final":
            return "all rows after training"
        if self._epochs == "last":
            return "each epoch (training may stop early)" if self.is_rolling else "the final epoch"
        if isinstance(self._epochs, list):
            return f"epochs {', '.join(map(str, self._epochs))}{', merged,' if self._merges else ''}"
        every = "every epoch" if self._epochs in ("every", 1) else f"every {self._epochs}th epoch"
        return f"{every}, {'merged' if self._merges else 'each as a segment'},"


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
