"""What capture tells the user: one line at its start, one at its end, and warnings that say what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_influence.layer_plan import INT8_ERROR, LayerPlan, expected_bytes_per_row, expected_file_bytes
from lightning_influence.layers import NOT_CHOSEN, Coverage
from lightning_influence.recorder import RecordedCounts
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.staleness import Agreement, wanted_spearman

STALE_BELOW = 0.9


def announce(
    options: CaptureOptions,
    plans: Mapping[str, LayerPlan],
    coverage: Coverage,
    *,
    when: str,
    num_examples: int,
) -> None:
    """One line on what will be captured; one warning that names what is not."""
    waiting = ""
    if options.merges:
        each = num_examples * expected_bytes_per_row(plans, options.most_bytes) / 1e6
        waiting = f", and {each:.1f} MB beside it for each captured epoch until they are merged"
        plans = {name: replace(plan, codec="eigen") for name, plan in plans.items()}
    codecs = [plan.codec for plan in plans.values()]
    row = expected_bytes_per_row(plans, options.most_bytes)
    is_bound = options.error_budget is not None and "eigen" in codecs
    size = expected_file_bytes(plans, row, num_examples)
    rank_zero_info(
        f"InfluenceCallback: captures {when} into {options.path}: {len(codecs)} layers ("
        + ", ".join(f"{codecs.count(codec)} as {codec}" for codec in dict.fromkeys(codecs))
        + f"), {coverage.share:.1%} of the trainable parameters, {'at most ' * is_bound}{row:,} bytes per row, "
        f"{'at most' if is_bound else 'about'} "
        f"{size / 1e6:.1f} MB for {num_examples:,} examples{waiting}"
    )
    if any(layer.reason != NOT_CHOSEN for layer in coverage.uncovered):
        rank_zero_warn(f"InfluenceCallback: {coverage}")


def say_who_makes_rows(has_core: bool) -> None:
    """Of epochs that are merged, on a CPU."""
    rank_zero_info(
        "InfluenceCallback: a second thread makes the rows while training goes on"
        if has_core
        else "InfluenceCallback: rows are made between the steps of training, as torch has a thread for more than "
        "half of the cores; with fewer (`torch.set_num_threads`) a second thread would make them meanwhile"
    )


def say_what_is_copied(layer: str) -> None:
    """Of a model that changes what the second thread would read."""
    rank_zero_info(
        f"InfluenceCallback: the input or output gradient of layer {layer!r} is changed in place after the "
        "backward, so batches are copied for the second thread"
    )


def report_file(
    trainer: Trainer,
    path: Path,
    *,
    epoch: int | None,
    counts: RecordedCounts,
    agreement: Agreement,
    seconds: float,
    merged: Sequence[int] = (),
) -> None:
    """The finished file's numbers, to the log and to the user's loggers."""
    size = path.stat().st_size / 1e6
    coverage = counts.written / (counts.written + counts.missing)
    metrics = {
        "influence/rows_written": counts.written,
        "influence/rows_missing": counts.missing,
        "influence/rows_invalid": counts.invalid,
        "influence/staleness_spearman": agreement.staleness,
        "influence/codec_spearman": agreement.codec,
        "influence/file_megabytes": size,
        "influence/coverage_percent": 100 * coverage,
        "influence/finish_seconds": seconds,
    }
    for logger in trainer.loggers:
        try:
            logger.log_metrics(metrics, step=trainer.global_step)
        except Exception as error:  # the file is written, whatever a logger thinks of its numbers
            rank_zero_warn(f"InfluenceCallback: {type(logger).__name__} did not take {metrics}: {error}")
    aged = f"staleness {agreement.staleness:.3f}"
    if agreement.note:
        aged = f"staleness not measured ({agreement.note})"
    aged += f", {coarseness(agreement)}"
    subject = f"epochs {', '.join(map(str, merged))} are merged" if merged else f"epoch {epoch} is"
    rank_zero_info(
        f"InfluenceCallback: {subject} in {path}: {counts.written:,} rows, "
        f"{counts.missing:,} missing, {counts.invalid:,} invalid ({coverage:.1%} of the dataset), "
        f"{size:.1f} MB, {aged}"
    )
    if counts.invalid:
        rank_zero_warn(
            f"InfluenceCallback: {counts.invalid:,} rows have non-finite gradients; they are marked "
            "invalid and are in no factor."
        )


def coarseness(agreement: Agreement) -> str:
    """What rounding and cutting cost, in words."""
    if math.isnan(agreement.codec):
        return "what rounding costs was not measured"
    return f"rounding leaves Spearman {agreement.codec:.3f} of exact gradients' scores"


def warn_of_losses(
    agreement: Agreement,
    plans: Mapping[str, LayerPlan],
    normalizations: Sequence[str] | None,
    options: CaptureOptions,
) -> None:
    """Say what to do about rows that aged or are coarse; NaN, not measured, is neither.

    Args:
        agreement: as measured.
        plans: of the layers.
        normalizations: the layers that `normalizations_over_the_batch` found in the captured epoch, or None.
        options: what the user asked for.
    """
    wanted = wanted_spearman(options.error_budget)
    if agreement.codec < wanted:
        advice = _advice(agreement.fine_bytes, plans, options)
        rank_zero_warn(
            f"InfluenceCallback: the stored rows are coarse (Spearman {agreement.codec:.3f} with exact "
            f"gradients, below {wanted:g}). What helps: {'; '.join(advice)}. Scores "
            "that are summed over many examples lose less."
        )
    if agreement.staleness < STALE_BELOW:
        cause = (
            'Let the learning rate decay towards zero in the final epoch, or pass `rows="final"`, which captures '
            "the rows by one pass over the data after training."
        )
        if normalizations:
            cause += (
                f" Part of it is that {normalizations[0]} and its like normalize over the batch in training and "
                "not when asked: `.eval()` them in the last two epochs, if training is as good with that."
            )
        rank_zero_warn(
            f"InfluenceCallback: rows aged within the epoch (Spearman {agreement.staleness:.3f} with the final "
            f"weights, below {STALE_BELOW}). {cause}"
        )


def _advice(fine_bytes: int | None, plans: Mapping[str, LayerPlan], options: CaptureOptions) -> list[str]:
    """What makes rows finer; `fine_bytes` as `Agreement` has them."""
    kinds = {("eigen", "") if options.merges else (plan.codec, plan.dtype) for plan in plans.values()}
    advice, has_eigen, has_budget = (
        [],
        any(codec == "eigen" for codec, _ in kinds),
        options.error_budget is not None,
    )
    if has_eigen and fine_bytes != 0:
        advice.append(_advice_on_bytes(fine_bytes, options))
    if {("pairs", "int8"), ("dense", "int8")} & kinds:
        instead = f"an `error_budget` below {INT8_ERROR}" if has_budget else '`codec="pairs-float16"`'
        advice.append(f"bring the inputs to one scale, or pass {instead}")
    elif has_eigen and fine_bytes == 0:
        has_decided = has_budget and options.bytes_per_example is None
        more = "smaller `error_budget`" if has_decided else "larger `bytes_per_example`"
        advice.append(f"shuffle the data, as the first examples decide what rows keep, or pass a {more}")
    return advice or ["bring the inputs to one scale"]


def _advice_on_bytes(fine_bytes: int | None, options: CaptureOptions) -> str:
    most, has_budget = options.bytes_per_example, options.error_budget is not None
    if has_budget and (most is None or (fine_bytes is not None and fine_bytes <= most)):  # it has decided
        return "pass a smaller `error_budget`"
    if fine_bytes is None:
        instead = "and a smaller `error_budget` if rows take less" if has_budget else "or an `error_budget`"
        return f"pass a larger `bytes_per_example`, {instead}"
    wanted = f"pass `bytes_per_example={fine_bytes}` for {wanted_spearman(options.error_budget):g}"
    return wanted if has_budget else f"{wanted}, or an `error_budget`"


def normalizations_over_the_batch(model: nn.Module) -> list[str]:
    """The layers whose batch statistics make an example's gradient depend on its batch."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]


def warn_of_coupling(normalizations: Sequence[str]) -> None:
    """Say what rows hold where examples depend on their batch."""
    if normalizations:
        rank_zero_warn(
            f"InfluenceCallback: {', '.join(normalizations[:3])} normalize over the batch in training, so a row "
            "holds what the batch's loss owes to its example, and scores of queries, in eval mode, are "
            "approximate."
        )


def warn_of_no_check() -> None:
    """What processes average is not what each has back-propagated."""
    rank_zero_warn(
        "InfluenceCallback: with a `ddp_comm_hook`, captured gradients cannot be compared with `.grad`, so a "
        "layer whose weight is also used outside of its forward would not be noticed; train an epoch without the "
        "hook to see the coverage."
    )


def warn_of_weights(factor: Tensor) -> None:
    """Unreduced losses may carry a weight for each example, which rows do not keep."""
    known = factor[factor.isfinite() & (factor > 0)] if factor.ndim else factor
    if known.ndim and len(known) and float(known.max()) > 1.001 * float(known.min()):
        rank_zero_warn(
            "InfluenceCallback: the examples' losses are weighted differently in the first batch "
            f"(largest weight {float(known.max() / known.min()):.3g} times the smallest). Rows hold gradients "
            "of the unweighted losses: multiply scores and effects of a training example by its weight."
        )


def warn_of_other_terms(share: float) -> None:
    """Part of what is back-propagated is no recognised loss."""
    rank_zero_warn(
        f"InfluenceCallback: {share:.1%} of the loss does not come from a recognised loss function. Its "
        "gradient is part of the rows, scaled like the recognised loss; if it is a mean or a sum over other "
        'things, declare the whole loss with `loss="mean"` or `loss="sum"`.'
    )


def warn_of_no_file(path: Path, wanted: int | None) -> None:
    """Training is over, and no epoch was captured whole."""
    rank_zero_warn(
        "InfluenceCallback: training ended without a complete captured epoch"
        + (f" (epoch {wanted} was to be captured)" if wanted is not None else "")
        + f", so {path} was not written. Train at least one whole epoch, or call `capture(model, loader, path)`."
    )


def warn_of_partial_epoch(
    path: Path,
    epoch: int | None,
    finished_epoch: int | None,
    kept: Path | None = None,
    waiting: Sequence[int] = (),
) -> None:
    """An epoch's last batch was never reached; its rows may be kept for a run that is resumed."""
    left = "No file was written." if finished_epoch is None else f"{path} holds epoch {finished_epoch}."
    if waiting:
        left = f"Epochs {', '.join(map(str, waiting))}, which are whole, will be merged."
    rows = "dropped"
    if kept is not None:
        rows = f"left in {kept.name} (delete it and *.resume* if training will not be resumed from a checkpoint)"
    rank_zero_warn(
        f"InfluenceCallback: epoch {epoch} ended before its last batch, so its rows are not whole and were "
        f"{rows}. {left}"
    )


def warn_of_part_of_epoch(path: Path, epoch: int, counts: RecordedCounts) -> None:
    """Training ended within the first epoch that was captured."""
    rank_zero_warn(
        f"InfluenceCallback: epoch {epoch} ended before its last batch, and no whole one was captured before: "
        f"{path} holds the {counts.written:,} of {counts.written + counts.missing:,} examples that it has seen, "
        "with factors of these alone (its attribute `is_whole` is false). Train a whole epoch, or call "
        "`capture(model, loader, path)`."
    )


def warn_of_resumed_epoch(path: Path, epoch: int, counts: RecordedCounts) -> None:
    """Training was resumed within the epoch that was captured."""
    rank_zero_warn(
        f"InfluenceCallback: training was resumed within epoch {epoch}, and a resumed epoch draws its examples "
        f"anew: {counts.missing:,} of {counts.written + counts.missing:,} examples are missing from {path} "
        "(its column `written` says which). For all of them, train one more epoch, or call "
        "`capture(model, loader, path)`."
    )
