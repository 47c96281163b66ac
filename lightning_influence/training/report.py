"""What capture tells the user: one line at its start, one at its end, and warnings that say what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_influence.layer_record import LayerPlan
from lightning_influence.layers import NOT_CHOSEN, Coverage
from lightning_influence.recorder import RecordedCounts, expected_bytes_per_row, expected_file_bytes

STALE_BELOW = 0.9


def announce(
    path: Path,
    plans: Mapping[str, LayerPlan],
    coverage: Coverage,
    *,
    is_rolling: bool,
    bytes_per_example: int,
    num_examples: int,
) -> None:
    """One line on what will be captured; one warning that names what is not."""
    codecs = [plan.codec for plan in plans.values()]
    when = "each epoch (training may stop early)" if is_rolling else "the final epoch"
    row = expected_bytes_per_row(plans, bytes_per_example)
    size = expected_file_bytes(plans, row, num_examples)
    rank_zero_info(
        f"InfluenceCallback: captures {when} into {path}: {len(codecs)} layers ("
        + ", ".join(f"{codecs.count(codec)} as {codec}" for codec in dict.fromkeys(codecs))
        + f"), {coverage.share:.1%} of the trainable parameters, {row:,} bytes per row, about "
        f"{size / 1e6:.1f} MB for {num_examples:,} examples"
    )
    if any(layer.reason != NOT_CHOSEN for layer in coverage.uncovered):
        rank_zero_warn(f"InfluenceCallback: {coverage}")


def report_file(
    trainer: Trainer, path: Path, epoch: int | None, counts: RecordedCounts, staleness: float, note: str
) -> None:
    """The finished file's numbers, to the log and to the user's loggers."""
    size = path.stat().st_size / 1e6
    metrics = {
        "influence/rows_written": counts.written,
        "influence/rows_missing": counts.missing,
        "influence/rows_invalid": counts.invalid,
        "influence/staleness_spearman": staleness,
        "influence/file_megabytes": size,
    }
    for logger in trainer.loggers:
        try:
            logger.log_metrics(metrics, step=trainer.global_step)
        except Exception as error:  # the file is written, whatever a logger thinks of its numbers
            rank_zero_warn(f"InfluenceCallback: {type(logger).__name__} did not take {metrics}: {error}")
    aged = f"staleness {staleness:.3f}" if staleness == staleness else f"staleness not measured ({note})"
    rank_zero_info(
        f"InfluenceCallback: epoch {epoch} is in {path}: {counts.written:,} rows, "
        f"{counts.missing:,} missing, {counts.invalid:,} invalid, {size:.1f} MB, {aged}"
    )
    if counts.invalid:
        rank_zero_warn(
            f"InfluenceCallback: {counts.invalid:,} rows have non-finite gradients; they are marked "
            "invalid and are in no factor."
        )


def warn_if_stale(staleness: float) -> None:
    """Say what to do about rows that aged; NaN, not measured, is not old."""
    if staleness < STALE_BELOW:
        rank_zero_warn(
            f"InfluenceCallback: rows aged within the epoch (Spearman {staleness:.3f} with the final "
            f"weights, below {STALE_BELOW}). Let the learning rate decay towards zero in the final epoch."
        )


def warn_of_no_file(path: Path, wanted: int | None) -> None:
    """Training is over, and no epoch was captured whole."""
    rank_zero_warn(
        "InfluenceCallback: training ended without a complete captured epoch"
        + (f" (epoch {wanted} was to be captured)" if wanted is not None else "")
        + f", so {path} was not written. Train at least one whole epoch, from its start."
    )


def warn_of_partial_epoch(path: Path, epoch: int | None, finished_epoch: int | None) -> None:
    """An epoch's last batch was never reached."""
    left = "No file was written." if finished_epoch is None else f"{path} holds epoch {finished_epoch}."
    rank_zero_warn(
        f"InfluenceCallback: epoch {epoch} ended before its last batch, so its rows are not whole and were "
        f"dropped. {left}"
    )
