"""Do scores predict retraining? The linear datamodeling score, against other methods and against bytes.

Three small models (`lds_tasks.py`) were trained again on many random halves of their training examples. Scores of
a model that was trained on all examples predict what a half does to a query: the sum of the scores of the
examples in it. The linear datamodeling score (Park et al. 2023, arXiv:2303.14186) is the Spearman correlation,
over the halves, of that sum and the query's log-likelihood, averaged over the seeds of a half; then the mean
over the queries.

    python examples/benchmarks/lds.py --task mlp cnn transformer --methods final merged segments dot kfac
    python examples/benchmarks/lds.py --task mlp cnn transformer --methods merged-later
    python examples/benchmarks/lds.py --task mlp cnn transformer --methods diagonal fisher fisher-merged
    python examples/benchmarks/lds.py --task transformer --methods linear     # only layers that kronfluence has
    python examples/benchmarks/lds.py --task mlp cnn --methods labels         # labels that the model predicts
    python examples/benchmarks/lds.py --task mlp cnn transformer --methods kronfluence
    python examples/benchmarks/lds.py --methods --picture lds.png      # from the results that there are

Everything is measured on several training runs of the full data (`--seeds`), the same runs for each method, and
at several factors of `HeuristicDamping`. The factor that is best in the mean over the runs is chosen for each
method with the truth at hand, so compare it with others' best. Errors are bootstrap standard errors: queries and
halves are drawn anew, the same ones for all methods, so that differences are paired; runs are not drawn.
Predictions and truth are kept in `--cache`, results in `--results`; what is measured again replaces the old.

The truth takes the longest: about 40 minutes on one core for all tasks. Needs the extra `examples`, for
`kronfluence` the extra `bench`, and Debian's package `dataset-fashion-mnist`.
"""

# %%
from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lds_scores import (
    REFERENCE,
    Prediction,
    describe_truth,
    draw,
    evaluate,
    predictions_folder,
    print_table,
    save_results,
)
from lds_tasks import DEFAULT_CACHE, TASKS, Task, compute_truth, example_losses, load_truth, run_quietly
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.curvature import HeuristicDamping
from lightning_influence.store import StoreReader
from lightning_influence.trajectory import merge_segments

METHODS = (
    "final",
    "merged",
    "segments",
    "merged-later",
    "dot",
    "kfac",
    "diagonal",
    "fisher",
    "fisher-merged",
    "linear",
    "labels",
    "kronfluence",
)
UNCOMPRESSED = 10**9  # bytes an example: more than any of these gradients has


# %%
# What is captured and how it is asked
# ------------------------------------


@dataclass(frozen=True)
class Capture:
    """A way to get scores; family and variant are its name.

    Args:
        family: a curve of the picture.
        variant: a point of it.
        options: of `InfluenceCallback`.
        asked: of `InfluenceModule.scores`.
        is_damped: whether damping matters.
        further_factors: of damping, beside the task's.
        merges_later: whether the file's segments are merged before it is asked.
    """

    family: str
    variant: str
    options: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    is_damped: bool = True
    further_factors: tuple[float, ...] = ()
    merges_later: bool = False

    def factors(self, task: Task) -> tuple[float, ...]:
        """Of damping."""
        if not self.is_damped:
            return (1.0,)
        weak = () if "curvature" in self.asked else task.weak_factors
        return weak + task.damping_factors + self.further_factors


def captures(task: Task, method: str) -> list[Capture]:
    """All that belongs to a method."""
    whole = {"codec": "eigen", "bytes_per_example": UNCOMPRESSED}
    if method == "dot":
        return [Capture("gradient dot product", "", whole, {"curvature": "identity"}, is_damped=False)]
    if method == "kfac":
        return [Capture("K-FAC, final epoch", "", whole, {"curvature": "kfac"})]
    if method == "diagonal":
        return [Capture("diagonal, final epoch", "", whole, {"curvature": "diagonal"})]
    fisher, more = {"curvature": "empirical_fisher"}, (100.0,)
    if method == "fisher":
        return [Capture("empirical Fisher, final epoch", "", whole, fisher, further_factors=more)]
    if method == "fisher-merged":
        merged = _with_budget("empirical Fisher, every epoch, merged", 8192, fisher, epochs="every")
        return [replace(merged, further_factors=more)]
    if method == "labels":
        kinds: dict[str, dict[str, Any]] = {
            f"{k} drawn": {"fisher": "sampled", "fisher_samples": k} for k in (1, 8)
        }
        if task.name != "transformer":  # its positions are flattened before the loss
            kinds["exact"] = {"fisher": "exact"}
        reference = Capture(*REFERENCE, whole)
        return [reference] + [Capture("labels, final epoch", name, {**whole, **o}) for name, o in kinds.items()]
    if method == "linear":
        names = [f"net.{n}" for n, m in task.net(0).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        asked = {"layers": names}
        final = Capture("linear layers only, final epoch", "uncompressed", whole, asked)
        return [final, _with_budget("linear layers only, merged", UNCOMPRESSED, asked, epochs="every")]
    if method == "final":
        kept = [Capture(*REFERENCE, whole)]
        if task.name == "mlp":  # pairs have no budget
            pairs = {"pairs, int8": "auto", "pairs, float16": "pairs-float16"}
            return kept + [Capture("final epoch", name, {"codec": codec}) for name, codec in pairs.items()]
        return kept + [_with_budget("final epoch", budget) for budget in task.budgets]
    if method == "merged":
        every = [_with_budget("every epoch, merged", b, epochs="every") for b in (*task.budgets, UNCOMPRESSED)]
        one = task.budgets[-2]
        some = [_with_budget(f"every {name} epoch, merged", one, epochs=n) for n, name in ((2, "2nd"), (3, "3rd"))]
        parts = {"first half of the epochs": range(task.epochs // 2)}
        parts["last third of the epochs"] = range(task.epochs - task.epochs // 3, task.epochs)
        some += [_with_budget(f"{name}, merged", one, epochs=list(epochs)) for name, epochs in parts.items()]
        return every + some
    if method == "merged-later":
        kept = _with_budget("every epoch, segments merged later", 8192, epochs="every", trajectory="segments")
        return [replace(kept, merges_later=True)]
    by_rate = {"segments": "learning_rate"}
    return [_with_budget("every epoch, segments", 8192, by_rate, epochs="every", trajectory="segments")]


def _with_budget(family: str, budget: int, asked: Mapping[str, Any] | None = None, **options: Any) -> Capture:
    variant = "uncompressed" if budget == UNCOMPRESSED else f"{budget:,} bytes"
    return Capture(family, variant, {"bytes_per_example": budget, **options}, asked or {})


# %%
# The full-data runs
# ------------------


class Learner(LightningModule):
    """A task's network, trained as its task says."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        self.task, self.net = task, task.net(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.net(inputs).flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> Any:
        optimizer = self.task.make_optimizer(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(task: Task, seed: int, *callbacks: InfluenceCallback) -> Learner:
    """On all examples; the same weights with any callbacks."""
    seed_everything(seed, verbose=False)
    model = Learner(task, seed)
    trainer = Trainer(
        max_epochs=task.epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(*task.train), task.batch_size, shuffle=True))
    return model.eval()


# %%
# Predictions
# -----------


def sum_over_halves(scores: Tensor, subsets: np.ndarray) -> np.ndarray:
    """Scores [q, n] summed over the examples in each half, [q, subsets]."""
    if not scores.isfinite().all():
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite.")
    return (scores.double() @ torch.tensor(subsets.T, dtype=torch.float64)).numpy()


def _merged(path: Path) -> Path:
    """One row an example of the file's segments, in as many bytes as a segment's row may have."""
    merge_segments(StoreReader(path), path.with_name("merged.h5"), bytes_per_example=8192)
    return path.with_name("merged.h5")


def predict(task: Task, chosen: list[Capture], seed: int) -> Iterator[Prediction]:
    """Train with the callback, ask the file; the options of all captures are the same."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "influence.h5"
        model = train(task, seed, InfluenceCallback(path, on_error="raise", **chosen[0].options))
        for capture in chosen:
            influence = InfluenceModule.attach(model, _merged(path) if capture.merges_later else path)
            rows = len(influence.store.segments) if "segments" in capture.asked else 1
            sums = {
                (f"{factor:g}" if capture.is_damped else "none"): sum_over_halves(
                    influence.scores(task.queries, damping=HeuristicDamping(factor), **capture.asked),
                    task.subsets(),
                )
                for factor in capture.factors(task)
            }
            size = rows * float(influence.store.attributes["bytes_per_row"])
            yield Prediction(capture.family, capture.variant, seed, sums, size)


def predict_by_kronfluence(task: Task, seed: int) -> Iterator[Prediction]:
    """EK-FAC and K-FAC of the same run, from training labels; of its linear layers and convolutions only."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as KronfluenceTask

    class Summed(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return example_losses(model, batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return example_losses(model, batch).sum()

    loss = Summed()
    model = prepare_model(train(task, seed).net, loss)
    data, queries = TensorDataset(*task.train), TensorDataset(*task.queries)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("lds", model, loss, cpu=True, disable_tqdm=True, output_dir=folder, log_level=40)
        for strategy in ("ekfac", "kfac"):
            given = FactorArguments(strategy, use_empirical_fisher=True)
            analyzer.fit_all_factors(strategy, data, per_device_batch_size=200, factor_args=given)
            sums = {}
            for name, damping in {"0.1": None, "1e-8 added": 1e-8}.items():  # None: .1 times the mean eigenvalue
                analyzer.compute_pairwise_scores(
                    f"{strategy} {name}",
                    strategy,
                    queries,
                    data,
                    per_device_query_batch_size=20,
                    per_device_train_batch_size=200,
                    score_args=ScoreArguments(damping_factor=damping),
                )
                scores = analyzer.load_pairwise_scores(f"{strategy} {name}")["all_modules"]
                sums[name] = sum_over_halves(scores, task.subsets())
            yield Prediction(f"kronfluence {strategy.upper().replace('KFAC', 'K-FAC')}", "", seed, sums)


def measure(task: Task, methods: Sequence[str], seeds: int) -> Iterator[Prediction]:
    """Of each run of each method; captures with the same options share their runs."""
    groups: dict[str, list[Capture]] = {}
    for capture in (
        capture for method in methods if method != "kronfluence" for capture in captures(task, method)
    ):
        groups.setdefault(str(sorted(capture.options.items())), []).append(capture)
    for seed in range(seeds):
        for group in groups.values():
            if not (args.resume and all(_is_kept(task, capture, seed) for capture in group)):
                yield from predict(task, group, seed)
        if "kronfluence" in methods:
            yield from predict_by_kronfluence(task, seed)


def _is_kept(task: Task, capture: Capture, seed: int) -> bool:
    """Whether there is a prediction of an earlier call."""
    return (
        Prediction(capture.family, capture.variant, seed, {}).file(predictions_folder(task, args.cache)).exists()
    )


def main() -> None:
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {args.seeds} runs of each task")
    for name in args.task:
        task = TASKS[name]
        truth = compute_truth(task, args.cache, args.workers) if args.truth else load_truth(task, args.cache)
        begin = time.perf_counter()
        for prediction in measure(task, args.methods, args.seeds):
            prediction.save(predictions_folder(task, args.cache))
            seconds, begin = time.perf_counter() - begin, time.perf_counter()
            named = f"{prediction.family}, {prediction.variant}".strip(", ")
            print(f"{name}: {named}, run {prediction.seed}, {seconds:.0f} s", flush=True)
        facts, results = describe_truth(task, truth), evaluate(task, truth, args.cache)
        save_results(args.results, task, facts, results)
        print_table(task, facts, results)
    if args.picture:
        draw(args.results, args.picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS[:-3])
    parser.add_argument("--seeds", type=int, default=3, help="training runs on all examples")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where truth and predictions are kept")
    parser.add_argument("--resume", action="store_true", help="keep predictions that are there")
    parser.add_argument("--workers", type=int, default=1, help="processes that make the truth")
    parser.add_argument("--truth", action=argparse.BooleanOptionalAction, default=True, help="complete it first")
    parser.add_argument("--results", type=Path, default=Path("lds.json"))
    parser.add_argument("--picture", type=Path, help="draw one from the results")
    args = parser.parse_args()
    run_quietly()
    main()
