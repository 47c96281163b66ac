"""`InfluenceCallback`: captures per-example gradients while a Lightning `Trainer` trains."""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_influence.attachment import STATE_KEY, attachment_state
from lightning_influence.errors import StoreError
from lightning_influence.fisher import FisherKind
from lightning_influence.layer_plan import CodecName
from lightning_influence.step import LossKind
from lightning_influence.store import StoreReader
from lightning_influence.training.checkpoints import CheckpointAttachment, saves_on_exception
from lightning_influence.training.options import CaptureOptions, Epochs, Rows, TrajectoryMode, check_choice
from lightning_influence.training.session import CaptureSession

logger = logging.getLogger(__name__)
P = ParamSpec("P")
OnError = Literal["warn", "raise"]


def _guarded(
    hook: Callable[Concatenate[InfluenceCallback, P], None],
) -> Callable[Concatenate[InfluenceCallback, P], None]:
    """A failure of ours ends capture; it ends training only with `on_error="raise"`."""

    @functools.wraps(hook)
    def wrapped(self: InfluenceCallback, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            self._fail(error)

    return wrapped


class InfluenceCallback(Callback):
    """Writes the factors and per-example gradients of the final epoch to one file, while training.

    Training is not changed: weights, logged values and checkpoints are the same to the last bit. (A copy
    of the model is asked in eval mode, once at the start and about a few batches at the end; captured
    batches of a compiled model run eagerly.)
    What is stored is the gradient of each example's own loss, summed over its positions, with batch
    mean, gradient accumulation and AMP scale divided out, at the row of its dataset index. If the
    run may stop early (early stopping, a time or step limit), each epoch is captured in turn and
    replaces the one before, so that the file always holds the last complete one.

    Args:
        path: of the file; an older file there is replaced when the new one is complete.
        layers: names or glob patterns of the layers to attribute (`["encoder.*"]`); None takes all
            that are supported. What is left out is reported.
        epochs: which epochs are captured: "last"; or "every", a number n (every n-th, counted back from
            the final one where that is certain) or a list (counted from 0).
        trajectory: what becomes of several captured epochs. "merge": one row an example, the sum of its gradients
            weighted by the epochs' learning rates, for the final weights; until training is over, each epoch's
            rows wait beside the file, where they take as much disk as the training set's float16 gradients
            (inputs and output gradients for layers used on vectors). "segments": each a segment of the file,
            so that checkpoints of several epochs have their rows; adding a segment copies the ones before it.
        rows: "online", as training goes, at no extra pass, at the weights of their step; or "final": the last
            epoch gives the eigenbasis only, and one pass over its examples after training gives the
            rows at the final weights, in eval mode.
        codec: how gradients are stored: "pairs" (inputs and output gradients, int8; also
            "pairs-float16" and "pairs-float32"; layers whose gradients are no such pairs store them
            densely), "eigen" (leading eigen-coordinates), or "auto": pairs for layers used on vectors, eigen
            for all others.
        fisher: of which labels the gradients are whose covariances and eigenvalues precondition a query; rows are
            those of the training labels in any case. "empirical": the training labels, at no extra cost.
            "sampled": labels drawn from what the model predicts, anew in each step, from a random generator of
            their own; "exact": the expectation over all labels, for at most 64 numbers or classes that the model
            predicts of an example. Each label costs a backward without weight gradients; the log says what that
            took. Hooks of yours on tensors run once more for each label; full backward hooks of modules and
            `torch.autograd.Function`s would too, and end capture if the first step has any. Both are the
            Gauss-Newton matrix of the recognised loss: cross-entropy (also `nll_loss` of log-probabilities),
            binary cross-entropy, square error, Gaussian with a given variance, Poisson.
        fisher_samples: labels drawn for each example, with "sampled".
        loss: "auto" recognises the functions of `torch.nn.functional`; for any other loss, "mean"
            or "sum" declares what the value that `training_step` returns is over the examples.
        bytes_per_example: budget of the eigen codec over all its layers. None: 8,192, or with `error_budget` as
            many as it needs. The first 256 examples of the epoch decide which coordinates are kept, so shuffle
            data that is in an order.
        error_budget: of scores, as 1 minus their Spearman correlation with those of exact gradients: .02 keeps the
            order of the examples at .98. Rows then get the fewest bytes that reach it on the first examples, at
            most `bytes_per_example`; the file says what they were found to lose in the end, and a warning does
            where that is more.
        covariance_positions: of layers used on sequences or images, how many positions of each example enter
            the covariances from which the eigenbasis is made, drawn with a fixed seed among those that carry
            gradient; None takes all. Rows do not depend on it, eigenvalues only as they do on the basis
            (`examples/benchmarks/covariance_positions.py` measures what it does to scores). Epochs that are
            merged have no such covariances.
        on_error: "warn": a failure of ours ends capture with one warning, and training goes on;
            "raise": it ends training.
        index_fn: a function from a batch to the dataset index of each row, for data whose sampler
            does not know them.
        index_key: where in the batch these indices are, if they are part of it.
        num_examples: length of a dataset that does not tell it, such as a stream.
        background: let a second thread make rows while training goes on, of epochs that are merged, on a CPU with
            at least twice as many cores as torch has threads. If a layer's inputs are changed in place after
            the backward, which the first batches of an epoch tell, batches are copied for it.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[InfluenceCallback("influence.h5")])
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "influence.h5",
        *,
        layers: list[str] | None = None,
        epochs: Epochs = "last",
        trajectory: TrajectoryMode = "merge",
        rows: Rows = "online",
        codec: CodecName = "auto",
        fisher: FisherKind = "empirical",
        fisher_samples: int = 1,
        loss: LossKind = "auto",
        bytes_per_example: int | None = None,
        error_budget: float | None = None,
        covariance_positions: int | None = 32,
        on_error: OnError = "warn",
        index_fn: Callable[[Any], Sequence[int] | Tensor] | None = None,
        index_key: str | int | None = None,
        num_examples: int | None = None,
        background: bool = True,
    ) -> None:
        super().__init__()
        check_choice("on_error", on_error, get_args(OnError))
        self.options = CaptureOptions(
            Path(path),
            layers=layers,
            epochs=epochs,
            trajectory=trajectory,
            rows=rows,
            codec=codec,
            fisher=fisher,
            fisher_samples=fisher_samples,
            loss=loss,
            bytes_per_example=bytes_per_example,
            error_budget=error_budget,
            covariance_positions=covariance_positions,
            index_fn=index_fn,
            index_key=index_key,
            num_examples=num_examples,
            background=background,
        )
        self.on_error = on_error
        self._id = uuid.uuid4().hex[:12]  # of this callback and its copies in other processes
        # Lightning asks for the key at every hook of every batch
        self._state_key = self._generate_state_key(path=str(self.options.path))
        self._session: CaptureSession | None = None
        self._finished: CaptureSession | None = None  # the last one that has a file
        self._attachment = CheckpointAttachment()

    @property
    def state_key(self) -> str:
        """Two callbacks that write to different files can live in one trainer."""
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        """What ties a checkpoint to its file; plain strings, loadable with `weights_only=True`."""
        self._save_for_resume()
        return self._attachment_state()

    def _attachment_state(self) -> dict[str, Any]:
        # a fit that had nothing left to train, or whose capture failed, leaves the file before it
        session = self._session if self._session is not None and self._session.has_started else self._finished
        if session is None:
            return self._state_of_spawned()
        trainer = session.trainer
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        status = "capturing" if session.finished_epoch is None else "complete"
        return attachment_state(session.store_id, session.path, Path(folder), status)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the file that the checkpoint belongs to."""
        if self._session is not None and STATE_KEY in state_dict:
            self._session.resume(state_dict[STATE_KEY])

    @_guarded
    def _save_for_resume(self) -> None:
        if self._session is not None:
            self._session.save_state()

    def _state_of_spawned(self) -> dict[str, Any]:
        """Processes that the trainer has spawned cannot tell this one what they wrote; their file can."""
        path = self.options.path.absolute()
        try:
            store_id = StoreReader(path).store_id
        except StoreError:
            return {}
        is_own = store_id.endswith(self._id)
        return attachment_state(store_id, path, path.parent, "complete") if is_own else {}

    @_guarded
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the layers and watch the dataloader that is about to be made."""
        if stage != "fit":
            return
        self._retire()
        self._attachment.install(trainer, self._attachment_state)
        self._session = CaptureSession(self.options, trainer, pl_module, uuid.uuid4().hex[:20] + self._id)
        self._session.start(self)

    @_guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide which epochs are captured."""
        if self._session is not None:
            self._session.start_training()

    @_guarded
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        if self._session is not None:
            self._session.start_epoch()

    @_guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch's indices; arm the hooks where gradients are wanted."""
        if self._session is not None:
            self._session.start_batch(batch, batch_idx)

    @_guarded
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Count backwards; prepare the check against `.grad`."""
        if self._session is not None:
            self._session.before_backward(loss)

    @_guarded
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the captured gradients against `.grad`, once a run."""
        if self._session is not None:
            self._session.after_backward()

    @_guarded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note which gradients are applied, with manual optimization."""
        if self._session is not None:
            self._session.before_step(optimizer)

    @_guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the gradients; after the last batch, finish the file."""
        if self._session is not None:
            self._session.end_batch(outputs)

    @_guarded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop an epoch that did not reach its last batch."""
        if self._session is not None:
            self._session.end_epoch()

    @_guarded
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if no file was written."""
        if self._session is not None:
            self._session.end_training()

    @_guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge what a run has left that was killed while it merged."""
        if self._session is not None:
            self._session.merge_late()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook and no unfinished file that no checkpoint needs (Lightning calls no `teardown` here)."""
        if saves_on_exception(trainer):  # after us, as Lightning orders callbacks
            self._save_for_resume()
        try:
            self._merge_what_there_is()
        finally:
            self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave everything as it was."""
        if stage == "fit":
            self._close()

    def _merge_what_there_is(self) -> None:
        """Of an interrupted run the whole epochs are worth a file; its own exception is not to be hidden."""
        try:
            if self._session is not None:
                self._session.merge_after_exception()
        except Exception as error:
            rank_zero_warn(f"InfluenceCallback: {type(error).__name__} while captured epochs were merged: {error}")

    def _close(self) -> None:
        """Clean up after the session, whatever happens; it stays known to later checkpoints."""
        if self._session is None:
            return
        try:
            self._session.close()
        except Exception:  # cleaning up must not hide the user's own exception
            logger.exception("InfluenceCallback could not clean up after itself")

    def _retire(self) -> None:
        """Be done with the session; the last one that has a file stays known to checkpoints."""
        self._close()
        if self._session is not None and self._session.finished_epoch is not None:
            self._finished = self._session
        self._session = None

    def _fail(self, error: Exception) -> None:
        session = self._session
        if session is not None and session.fail(error):  # once the other processes know, this is called again
            return
        self._retire()
        if self.on_error == "raise":
            raise error
        logger.debug("capture failed", exc_info=error)
        rank_zero_warn(
            f"InfluenceCallback has stopped capturing; training goes on. {type(error).__name__}: {error}"
        )
