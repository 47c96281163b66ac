"""Do scores predict retraining? The linear datamodeling score, against other methods and against bytes.

Three small models (`lds_tasks.py`) were trained again on many random halves of their training examples. Scores of
a model that was trained on all examples predict what a half does to a query: the sum of the scores of the
examples in it. The linear datamodeling score (Park et al. 2023, arXiv:2303.14186) is the Spearman correlation,
over the halves, of that sum and the query's log-likelihood, averaged over the seeds of a half; then the mean
over the queries.

    python examples/benchmarks/lds.py --task mlp cnn transformer --methods final merged segments dot kfac
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
import inspect
import itertools
import json
import logging
import math
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lds_tasks import DEFAULT_CACHE, TASKS, Task, Truth, compute_truth, example_losses, load_truth
from lightning.pytorch import LightningModule, Trainer, seed_everything
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.curvature import HeuristicDamping

METHODS = ("final", "merged", "segments", "dot", "kfac", "kronfluence")
UNCOMPRESSED = 10**9  # bytes an example: more than any of these gradients has
DRAWS = 200  # of the bootstrap
REFERENCE = ("final epoch", "uncompressed")  # what the others are compared with


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
    """

    family: str
    variant: str
    options: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    is_damped: bool = True


def captures(task: Task, method: str) -> list[Capture]:
    """All that belongs to a method."""
    whole = {"codec": "eigen", "bytes_per_example": UNCOMPRESSED}
    if method == "dot":
        return [Capture("gradient dot product", "", whole, {"curvature": "identity"}, is_damped=False)]
    if method == "kfac":
        return [Capture("K-FAC, final epoch", "", whole, {"curvature": "kfac"})]
    if method == "final":
        kept = [Capture(*REFERENCE, whole)]
        if task.name == "mlp":  # pairs have no budget
            pairs = {"pairs, int8": "auto", "pairs, float16": "pairs-float16"}
            return kept + [Capture("final epoch", name, {"codec": codec}) for name, codec in pairs.items()]
        return kept + [_with_budget("final epoch", budget) for budget in task.budgets]
    if method == "merged":
        _require("trajectory", InfluenceCallback, "merge epochs")
        every = [_with_budget("every epoch, merged", b, epochs="every") for b in (*task.budgets, UNCOMPRESSED)]
        some = [
            _with_budget(f"every {name} epoch, merged", budget, epochs=n)
            for n, name in ((2, "2nd"), (3, "3rd"))
            for budget in (8192, 16384, UNCOMPRESSED)
        ]
        return every + some
    _require("trajectory", InfluenceCallback, "keep segments apart from merged rows")
    _require("segments", InfluenceModule.scores, "score segments together")
    return [
        _with_budget(
            "every epoch, segments", budget, {"segments": "learning_rate"}, epochs="every", trajectory="segments"
        )
        for budget in (1024, 8192)
    ]


def _with_budget(family: str, budget: int, asked: Mapping[str, Any] | None = None, **options: Any) -> Capture:
    variant = "uncompressed" if budget == UNCOMPRESSED else f"{budget:,} bytes"
    return Capture(family, variant, {"bytes_per_example": budget, **options}, asked or {})


def _require(argument: str, function: Any, what: str) -> None:
    if argument not in inspect.signature(function).parameters:
        raise SystemExit(f"This version of lightning_influence cannot {what}: {function} has no {argument!r}.")


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

    def configure_optimizers(self) -> dict:
        optimizer = self.task.make_optimizer(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(task: Task, seed: int, callback: InfluenceCallback | None = None) -> Learner:
    """On all examples; the same weights with any callback."""
    seed_everything(seed, verbose=False)
    model = Learner(task, seed)
    trainer = Trainer(
        max_epochs=task.epochs,
        accelerator="cpu",
        callbacks=[callback] if callback else [],
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


@dataclass(frozen=True)
class Prediction:
    """What the scores of one run say of each half.

    Args:
        sums: of the scores of a half's examples, by the name of the damping, each [q, subsets].
        bytes_per_example: of the file's rows; NaN where there is no file.
    """

    sums: dict[str, np.ndarray]
    bytes_per_example: float = math.nan


def sum_over_halves(scores: Tensor, subsets: np.ndarray) -> np.ndarray:
    """Scores [q, n] summed over the examples in each half, [q, subsets]."""
    if not scores.isfinite().all():
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite.")
    return (scores.double() @ torch.tensor(subsets.T, dtype=torch.float64)).numpy()


def predict(task: Task, capture: Capture, seed: int) -> Prediction:
    """Train with the callback, ask the file."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "influence.h5"
        model = train(task, seed, InfluenceCallback(path, on_error="raise", **capture.options))
        influence = InfluenceModule.attach(model, path)
        rows = len(influence.store.segments) if "segments" in capture.asked else 1
        sums = {
            (f"{factor:g}" if capture.is_damped else "none"): sum_over_halves(
                influence.scores(task.queries, damping=HeuristicDamping(factor), **capture.asked), task.subsets()
            )
            for factor in (task.damping_factors if capture.is_damped else (1.0,))
        }
        return Prediction(sums, rows * float(influence.store.attributes["bytes_per_row"]))


def predict_by_kronfluence(task: Task, strategy: str, seed: int) -> Prediction:
    """The same run's EK-FAC or K-FAC of kronfluence, from training labels."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as KronfluenceTask

    class Summed(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return example_losses(model, batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return example_losses(model, batch).sum()

    model, loss = prepare_model(train(task, seed).net, Summed()), Summed()
    data, queries = TensorDataset(*task.train), TensorDataset(*task.queries)
    sums = {}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("lds", model, loss, cpu=True, disable_tqdm=True, output_dir=folder, log_level=40)
        analyzer.fit_all_factors(
            strategy,
            data,
            per_device_batch_size=200,
            factor_args=FactorArguments(strategy, use_empirical_fisher=True),
        )
        for name, damping in {"0.1": None, "1e-8 added": 1e-8}.items():  # None is .1 times the mean eigenvalue
            analyzer.compute_pairwise_scores(
                name,
                strategy,
                queries,
                data,
                per_device_query_batch_size=20,
                per_device_train_batch_size=200,
                score_args=ScoreArguments(damping_factor=damping),
            )
            scores = analyzer.load_pairwise_scores(name)["all_modules"]
            sums[name] = sum_over_halves(scores, task.subsets())
    return Prediction(sums)


def predict_all(task: Task, method: str) -> Iterator[tuple[str, str, int, Prediction]]:
    """Family, variant, seed and prediction, of each run of a method."""
    for seed in range(args.seeds):
        if method == "kronfluence":
            for family, strategy in {"kronfluence EK-FAC": "ekfac", "kronfluence K-FAC": "kfac"}.items():
                yield family, "", seed, predict_by_kronfluence(task, strategy, seed)
            continue
        for capture in captures(task, method):
            yield capture.family, capture.variant, seed, predict(task, capture, seed)


def predictions_folder(task: Task) -> Path:
    return args.cache / f"predictions-{task.name}-{task.fingerprint()}"


def measure(task: Task, method: str) -> None:
    """Make a method's predictions and keep them."""
    folder = predictions_folder(task)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for family, variant, seed, prediction in predict_all(task, method):
        name = re.sub(r"\W+", "-", f"{family} {variant} {seed}")
        named = {"family": family, "variant": variant, "seed": seed, "bytes": prediction.bytes_per_example}
        np.savez(folder / f"{name}.npz", **prediction.sums, **{f"_{key}": value for key, value in named.items()})
        seconds = time.perf_counter() - begin
        print(f"{task.name}: {family}, {variant or method}, seed {seed} ({seconds:.0f} s)", flush=True)
        begin = time.perf_counter()


# %%
# Scores of the predictions
# -------------------------


@dataclass
class Result:
    """A method's score at one damping.

    Args:
        task: its name.
        family: as the capture's.
        variant: as the capture's.
        damping: its name.
        bytes_per_example: None where there is no file.
        lds_by_seed: of each run.
        lds: their mean.
        error: its bootstrap standard error.
        gain: over the final epoch alone, uncompressed, at its best damping.
        gain_error: the bootstrap standard error of that difference.
    """

    task: str
    family: str
    variant: str
    damping: str
    bytes_per_example: float | None
    lds_by_seed: list[float]
    lds: float
    error: float
    gain: float | None = None
    gain_error: float | None = None


def usable(truth: Truth) -> np.ndarray:
    """Log-likelihoods of the seeds that are there for every half, [subsets, seeds, q]."""
    complete = np.isfinite(truth.log_likelihoods).all((0, 2))
    if not complete.any():
        raise SystemExit("The truth needs at least one model of each half; run with --truth.")
    return truth.log_likelihoods[:, complete]


def agreement(log_likelihoods: np.ndarray) -> float:
    """How well the truth would agree with itself, had it been made twice: Spearman and Brown's formula."""
    seeds = log_likelihoods.shape[1]
    if seeds < 2:
        return math.nan
    found = []
    for part in itertools.combinations(range(seeds), seeds // 2):
        other = sorted(set(range(seeds)) - set(part))[: seeds // 2]
        one, two = (log_likelihoods[:, list(chosen)].mean(1).T for chosen in (part, other))
        found.append(row_correlations(rankdata(one, axis=-1), rankdata(two, axis=-1)).mean())
    r, longer = float(np.mean(found)), seeds / (seeds // 2)
    return longer * r / (1 + (longer - 1) * r)


def row_correlations(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Pearson correlation over the last dimension."""
    one, two = (values - values.mean(-1, keepdims=True) for values in (one, two))
    norms = np.sqrt((one**2).sum(-1) * (two**2).sum(-1))
    return (one * two).sum(-1) / np.where(norms > 0, norms, np.inf)


def lds(sums: np.ndarray, truth: np.ndarray) -> float:
    """The mean over queries of the Spearman correlation over halves; both [q, subsets]."""
    return float(
        np.mean([spearmanr(predicted, actual).statistic for predicted, actual in zip(sums, truth, strict=True)])
    )


def bootstrap(sums: list[np.ndarray], truth: np.ndarray) -> np.ndarray:
    """Scores of each method on queries and halves that are drawn anew, [methods, draws].

    Args:
        sums: of each method, [seeds, q, subsets]; the mean is over seeds, too.
        truth: [q, subsets].
    """
    random = np.random.default_rng(0)
    q, num_subsets = truth.shape
    drawn = np.zeros((len(sums), DRAWS))
    for draw in range(DRAWS):
        halves, queries = random.integers(num_subsets, size=num_subsets), random.integers(q, size=q)
        ranks = rankdata(truth[:, halves], axis=-1)
        for number, values in enumerate(sums):
            found = row_correlations(rankdata(values[..., halves], axis=-1), ranks)
            drawn[number, draw] = found[:, queries].mean()
    return drawn


def evaluate(task: Task, truth: Truth) -> list[Result]:
    """All predictions that are kept."""
    actual = usable(truth).mean(1).T
    by_name: dict[tuple[str, str, str], list[tuple[int, np.ndarray, float]]] = {}
    for path in sorted(predictions_folder(task).glob("*.npz")):
        with np.load(path) as file:
            family, variant, seed = str(file["_family"]), str(file["_variant"]), int(file["_seed"])
            for damping in (name for name in file.files if not name.startswith("_")):
                entry = (seed, file[damping], float(file["_bytes"]))
                by_name.setdefault((family, variant, damping), []).append(entry)
    results = []
    for (family, variant, damping), entries in by_name.items():
        scores = [lds(sums, actual) for _, sums, _ in sorted(entries, key=lambda entry: entry[0])]
        size = entries[0][2]
        size_or_none = None if math.isnan(size) else size
        mean = float(np.mean(scores))
        results.append(Result(task.name, family, variant, damping, size_or_none, scores, mean, math.nan))
    stacked = [np.stack([sums for _, sums, _ in entries]) for entries in by_name.values()]
    drawn = bootstrap(stacked, actual)
    finals = [n for n, result in enumerate(results) if (result.family, result.variant) == REFERENCE]
    reference = max(finals, key=lambda n: results[n].lds, default=None)
    for number, result in enumerate(results):
        result.error = float(drawn[number].std(ddof=1))
        if reference is not None:
            result.gain = result.lds - results[reference].lds
            result.gain_error = float((drawn[number] - drawn[reference]).std(ddof=1))
    return results


def best(results: list[Result]) -> list[Result]:
    """Of each family and variant the best damping."""
    found: dict[tuple[str, str, str], Result] = {}
    for result in results:
        name = (result.task, result.family, result.variant)
        if name not in found or result.lds > found[name].lds:
            found[name] = result
    return list(found.values())


# %%
# The table and the picture
# -------------------------


def describe_truth(task: Task, truth: Truth) -> dict[str, Any]:
    """What the truth is made of, and what it allows."""
    log_likelihoods = usable(truth)
    subsets, seeds, q = log_likelihoods.shape
    found = agreement(log_likelihoods)
    return {"subsets": subsets, "seeds": seeds, "queries": q, "agreement": found, "ceiling": math.sqrt(found)}


def print_table(task: Task, facts: Mapping[str, Any], results: list[Result]) -> None:
    print(
        f"\n{task.name}: {len(task.train[0]):,} examples, {facts['queries']} queries; truth: {facts['subsets']} "
        f"halves x {facts['seeds']} seeds, agrees with itself at {facts['agreement']:.3f}; a perfect prediction "
        f"would score about {facts['ceiling']:.3f}"
    )
    print(f"{'':40}{'bytes':>9}  {'best LDS':15}{'runs':15}{'over final':16}damping: LDS")
    for chosen in sorted(best(results), key=lambda r: (r.family, r.bytes_per_example or 0)):
        size = "" if chosen.bytes_per_example is None else f"{chosen.bytes_per_example:,.0f}"
        gain = "" if chosen.gain is None else f"{chosen.gain:+.3f} ± {chosen.gain_error:.3f}"
        runs = f"{min(chosen.lds_by_seed):.3f} .. {max(chosen.lds_by_seed):.3f}"
        same = [r for r in results if (r.family, r.variant) == (chosen.family, chosen.variant)]
        dampings = ", ".join(f"{r.damping}: {r.lds:.3f}" for r in sorted(same, key=lambda r: _number(r.damping)))
        name = ", ".join(part for part in (chosen.family, chosen.variant) if part)
        print(f"{name:40}{size:>9}  {chosen.lds:.3f} ± {chosen.error:.3f}  {runs}  {gain:16}{dampings}")


def _number(damping: str) -> float:
    return float(damping.split()[0]) if damping[0].isdigit() else 0.0


def save_results(task: Task, facts: Mapping[str, Any], results: list[Result]) -> None:
    """Put a task's results in the place of its former ones."""
    stored = json.loads(args.results.read_text()) if args.results.exists() else {}
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    stored[task.name] = {"machine": machine, "truth": facts, "results": [vars(result) for result in results]}
    args.results.write_text(json.dumps(stored, indent=1))


def draw(picture: Path) -> None:
    """Bytes per example against the best score, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stored = json.loads(args.results.read_text())
    tasks = [name for name in TASKS if name in stored]
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.4), squeeze=False)
    families: dict[str, str] = {}  # the same colour in every panel
    for panel, name in zip(panels[0], tasks, strict=True):
        by_family: dict[str, list[Result]] = {}
        for result in best([Result(**entry) for entry in stored[name]["results"]]):
            by_family.setdefault(result.family, []).append(result)
        for family, points in by_family.items():
            color = families.setdefault(family, f"C{len(families) % 10}")
            if len(points) == 1 and not points[0].variant:  # a baseline, without a file of its own
                panel.axhline(points[0].lds, color=color, linestyle="--", linewidth=1, label=family)
                continue
            points.sort(key=lambda result: result.bytes_per_example or 0)
            sizes, values = [p.bytes_per_example for p in points], [p.lds for p in points]
            panel.errorbar(
                sizes, values, [p.error for p in points], color=color, marker="o", capsize=2, label=family
            )
        panel.set(xscale="log", xlabel="bytes per example", title=name, ylim=(0, None))
    panels[0][0].set_ylabel("linear datamodeling score")
    handles: dict[str, Any] = {}
    for panel in panels[0]:
        handles.update({label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)})
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(picture, dpi=130)
    print(f"picture: {picture}")


def main() -> None:
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {args.seeds} runs of each task")
    for name in args.task:
        task = TASKS[name]
        truth = compute_truth(task, args.cache, args.workers) if args.truth else load_truth(task, args.cache)
        for method in args.methods:
            measure(task, method)
        facts, results = describe_truth(task, truth), evaluate(task, truth)
        save_results(task, facts, results)
        print_table(task, facts, results)
    if args.picture:
        draw(args.picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS[:-1])
    parser.add_argument("--seeds", type=int, default=3, help="training runs on all examples")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where truth and predictions are kept")
    parser.add_argument("--workers", type=int, default=1, help="processes that make the truth")
    parser.add_argument("--truth", action=argparse.BooleanOptionalAction, default=True, help="complete it first")
    parser.add_argument("--results", type=Path, default=Path("lds.json"))
    parser.add_argument("--picture", type=Path, help="draw one from the results")
    args = parser.parse_args()
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of few workers, staleness, short files
    torch.set_num_threads(1)
    main()
