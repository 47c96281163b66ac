"""Ties checkpoints of weights only to the file, as `Callback.state_dict` does for all others.

Lightning asks no callback for such a checkpoint (`save_weights_only=True`), so our states are added to
what is saved, under one key of their own. Neither the model nor what Lightning dumped is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import Strategy

from lightning_influence.attachment import CHECKPOINT_KEY

State = Callable[[], dict[str, Any]]


class CheckpointAttachment:
    """Adds one callback's state to every checkpoint that has no callbacks' states.

    It stays after training, for checkpoints that are saved then, until `install` is called for the next.
    """

    def __init__(self) -> None:
        self._saving: _Saving | None = None
        self._state: State | None = None

    def install(self, trainer: Trainer, state: State) -> None:
        """Attach what `state` returns at the time of a checkpoint.

        Args:
            trainer: whose checkpoints are meant, no longer those of an earlier one.
            state: gives plain builtins; of these the strings are kept, and nothing is if there are none.
        """
        self.uninstall()
        attributes = vars(trainer.strategy)
        saving = attributes.get("save_checkpoint")
        if not isinstance(saving, _Saving):  # else another callback's, which is shared
            saving = attributes["save_checkpoint"] = _Saving(trainer.strategy)
        saving.states.append(state)
        self._saving, self._state = saving, state

    def uninstall(self) -> None:
        """Put everything back; may be called at any time and more than once."""
        if self._saving is not None and self._state is not None:
            self._saving.states.remove(self._state)
            self._saving.retire()
        self._saving = self._state = None


def saves_on_exception(trainer: Trainer) -> bool:
    """Whether another callback saves a checkpoint when training ends with an exception."""
    return any(
        isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


class _Saving:
    """Stands in for `strategy.save_checkpoint`; can be copied and pickled with the strategy."""

    def __init__(self, strategy: Strategy) -> None:
        self.states: list[State] = []
        self._strategy = strategy
        self._replaced = vars(strategy).get("save_checkpoint")  # set by someone else; mostly there is none

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "callbacks" not in checkpoint:
            found = [_strings(state()) for state in self.states]
            states = [*checkpoint.get(CHECKPOINT_KEY, ()), *filter(None, found)]
            if states:
                checkpoint = {**checkpoint, CHECKPOINT_KEY: states}
        if self._replaced is not None:
            self._replaced(checkpoint, *args, **kwargs)
        else:
            type(self._strategy).save_checkpoint(self._strategy, checkpoint, *args, **kwargs)

    def retire(self) -> None:
        """Leave the strategy as it was if nothing is to be added any more."""
        attributes = vars(self._strategy)
        if self.states or attributes.get("save_checkpoint") is not self:  # or someone else has replaced it since
            return
        del attributes["save_checkpoint"]
        if self._replaced is not None:
            attributes["save_checkpoint"] = self._replaced


def _strings(state: dict[str, Any]) -> dict[str, str]:
    """What names the file. What only a resumed run needs is not for a checkpoint of weights."""
    return {key: value for key, value in state.items() if isinstance(value, str)}
