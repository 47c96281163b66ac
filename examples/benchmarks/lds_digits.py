"""Do scores predict retraining? Ours, kronfluence's EK-FAC, conjugate gradients and baselines, on real digits.

A network of 6,570 parameters learns 1,000 of scikit-learn's digits. For the truth it is trained again on 100
random halves of them, with 8 seeds each: that takes half a minute, since `retrain_subsets` trains many models at
once, and is kept in `--cache`. Then each method scores all training images for 100 test images, for several
models trained on everything (`--runs`), at several dampings, and gets its linear datamodeling score (Park et al.
2023, arXiv:2303.14186): the rank correlation over the halves between the sum of the scores of the images in a half
and the test image's log-likelihood after training on it.

    python examples/benchmarks/lds_digits.py
    python examples/benchmarks/lds_digits.py --methods ours dot random        # without the extra `bench`
    python examples/benchmarks/lds_digits.py --methods ours dot random --brittleness

Dampings are factors of the mean eigenvalue, of each layer's block (ours, kronfluence) or of the whole Gauss-Newton
matrix (conjugate gradients). All are shown: the best is chosen with the truth at hand, for every method alike.
Errors are bootstrap standard errors; queries and halves are drawn anew, the same ones for all methods, so
differences are paired. Runs are not drawn; their range is shown, and, under "seeds", the rank correlation between
the scores of two of them; under "mean", the score of their mean. "advised" is `recommend_damping()`, which does
not see the truth. About four minutes on one core.

With `--brittleness`, each method's top images of 30 test images are taken away, and the network is trained again
without them, with 2 seeds: how many predictions flip? One to two minutes more.

Needs the extra `bench`: kronfluence and scikit-learn.
"""

# %%
from __future__ import annotations

import argparse
import functools
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import HeuristicDamping, InfluenceCallback, InfluenceModule, compute_influences
from lightning_influence.evaluation import (
    Recipe,
    Retraining,
    margins,
    random_subsets,
    remove_top_k,
    retrain_subsets,
)
from lightning_influence.metrics import (
    bootstrap_rank_correlations,
    rank_correlations,
    rank_stability,
    subset_predictions,
)
from lightning_influence.solvers import ConjugateGradient, GaussNewtonOperator

TRAIN, QUERIES, HALVES, SEEDS = 1000, 100, 100, 8
EPOCHS, BATCH_SIZE, LEARNING_RATE, MOMENTUM = 20, 64, 0.1, 0.9
WATCHED, REMOVED = 30, (10, 20, 40, 80)
FACTORS, FACTORS_OF_WHOLE = (0.01, 0.1, 1.0, 10.0), (0.1, 1.0, 10.0, 100.0)
REFERENCE = "kronfluence EK-FAC, training labels"  # as ours; the better of its two
DEFAULTS = {"ours": "1", "kronfluence": "1e-8"}  # conjugate gradients have none
Scores = dict[str, Tensor]  # [q, N] by the damping's name

# %%
# The data, the network, and how both are trained, here and in every retraining
# -----------------------------------------------------------------------------


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Training set and queries, the same ones always."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[:TRAIN], order[TRAIN : TRAIN + QUERIES]
    train, queries = (TensorDataset((images[part] / 16).float(), labels[part]) for part in parts)
    return train, queries


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


RECIPE = Recipe(
    loss=lambda net, batch: cross_entropy(net(batch[0]), batch[1]),
    optimizer=functools.partial(SGD, lr=LEARNING_RATE, momentum=MOMENTUM),
    epochs=EPOCHS,
    batch_size=BATCH_SIZE,
    scheduler=CosineAnnealingLR,
)


class Digits(LightningModule):
    """The same training in Lightning, for a callback to watch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = RECIPE.optimizer(self.parameters())
        scheduler = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(train: TensorDataset, run: int, *callbacks: InfluenceCallback) -> Digits:
    """On all images; the same weights with any callbacks."""
    seed_everything(1000 + run, verbose=False)
    model = Digits()
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, BATCH_SIZE, shuffle=True))
    return model.eval()


def make_truth(train: TensorDataset, queries: TensorDataset, cache: Path) -> Retraining:
    """Log-likelihoods of the queries after training on halves."""
    images, labels = queries.tensors
    return retrain_subsets(
        make_net,
        train,
        random_subsets(TRAIN, HALVES),
        train=RECIPE,
        measure=lambda net: -losses(net(images), labels),
        seeds=SEEDS,
        cache=cache,
    )


# %%
# The methods
# -----------


def by_ours(train: TensorDataset, queries: TensorDataset, run: int, folder: Path) -> Iterator[tuple[str, Scores]]:
    """Files of the final epoch and of all epochs, at the callback's defaults, and with fewer bytes."""
    kinds: dict[str, dict[str, Any]] = {
        "ours, every epoch": {"epochs": "every"},
        "ours, every epoch, 1,024 bytes": {"epochs": "every", "bytes_per_example": 1024},
        "ours, final epoch": {},
    }
    for name, options in kinds.items():
        path = folder / f"{len(name)}.h5"
        model = fit(train, run, InfluenceCallback(path, on_error="raise", **options))
        influence = InfluenceModule.attach(model, path)
        found = {f"{f:g}": influence.scores(queries.tensors, damping=HeuristicDamping(f)) for f in FACTORS}
        found["advised"] = influence.scores(queries.tensors, damping=influence.recommend_damping().damping)
        if not run:
            print(f"{name}: {int(influence.store.attributes['bytes_per_row']):,} bytes an image")
        yield name, found


def by_dot_product(
    train: TensorDataset, queries: TensorDataset, run: int, folder: Path
) -> Iterator[tuple[str, Scores]]:
    """Of gradients at the final weights, exact: a file of one more pass."""
    path = folder / "dot.h5"
    model = fit(train, run, InfluenceCallback(path, on_error="raise", rows="final", codec="pairs-float32"))
    yield (
        "gradient dot product",
        {"none": InfluenceModule.attach(model, path).scores(queries.tensors, curvature="identity")},
    )


def by_conjugate_gradients(
    train: TensorDataset, queries: TensorDataset, run: int, folder: Path
) -> Iterator[tuple[str, Scores]]:
    """The Gauss-Newton matrix itself, solved for each query."""
    net = fit(train, run).net
    data, asked = DataLoader(train, 250), DataLoader(queries, QUERIES)
    operator = GaussNewtonOperator.from_loader(net, data, loss=losses)
    signs = torch.randint(2, (64, operator.size), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    mean_eigenvalue = float(
        (signs * operator.curvature_product(signs)).sum() / signs.numel()
    )  # Hutchinson's trace
    found = {}
    for factor in FACTORS_OF_WHOLE:
        found[f"{factor:g}"] = compute_influences(
            net,
            data,
            asked,
            loss=losses,
            solver=ConjugateGradient(rtol=1e-3, block=True),
            curvature="gauss-newton",
            hessian_regularization=factor * mean_eigenvalue,
        )
    yield "conjugate gradients, Gauss-Newton", found


def by_kronfluence(
    train: TensorDataset, queries: TensorDataset, run: int, folder: Path
) -> Iterator[tuple[str, Scores]]:
    """EK-FAC of the same run, with labels that are drawn (its default), and training labels (as ours)."""
    import kronfluence.factor.config as config
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Digit(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs, labels = model(batch[0]), batch[1]
            if sample:
                labels = torch.multinomial(outputs.detach().softmax(-1), 1).squeeze(-1)
            return losses(outputs, labels).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return losses(model(batch[0]), batch[1]).sum()

    task = Digit()
    model = prepare_model(fit(train, run).net, task)
    analyzer = Analyzer("lds", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder), log_level=40)
    scale = config.HEURISTIC_DAMPING_SCALE
    for labels, is_empirical in (("drawn labels", False), ("training labels", True)):
        given = FactorArguments("ekfac", use_empirical_fisher=is_empirical)
        analyzer.fit_all_factors(labels, train, per_device_batch_size=250, factor_args=given)
        found = {}
        for name, factor in {"1e-8": None, **{f"{factor:g}": factor for factor in FACTORS}}.items():
            config.HEURISTIC_DAMPING_SCALE = factor or scale  # .1 as it comes
            analyzer.compute_pairwise_scores(
                f"{labels} {name}",
                labels,
                queries,
                train,
                per_device_query_batch_size=QUERIES,
                per_device_train_batch_size=250,
                score_args=ScoreArguments(damping_factor=1e-8 if factor is None else None),
            )
            found[name] = analyzer.load_pairwise_scores(f"{labels} {name}")["all_modules"]
        config.HEURISTIC_DAMPING_SCALE = scale
        yield f"kronfluence EK-FAC, {labels}", found


def by_chance(
    train: TensorDataset, queries: TensorDataset, run: int, folder: Path
) -> Iterator[tuple[str, Scores]]:
    """Random numbers."""
    yield "random", {"none": torch.randn(QUERIES, TRAIN, generator=torch.Generator().manual_seed(run))}


Method = Callable[[TensorDataset, TensorDataset, int, Path], Iterator[tuple[str, Scores]]]
METHODS: dict[str, Method] = {
    "ours": by_ours,
    "kronfluence": by_kronfluence,
    "cg": by_conjugate_gradients,
    "dot": by_dot_product,
    "random": by_chance,
}

# %%
# The table
# ---------


WIDTHS = (38, 15, 9, 16, 17, 9, 7, 7, 0)
HEAD = ("", "best", "at", "runs", "over kronfluence", "default", "seeds", "mean", "dampings")


def report(truth: Retraining, scores: dict[str, Scores]) -> None:
    """Of scores [runs, q, N], by method and damping."""
    actual = truth.mean_outputs.T
    sums = {(m, d): subset_predictions(v, truth.subsets) for m, found in scores.items() for d, v in found.items()}
    drawn = dict(zip(sums, bootstrap_rank_correlations(list(sums.values()), actual), strict=True))
    by_run = {key: rank_correlations(values, actual).nanmean(-1) for key, values in sums.items()}
    lds = {key: float(values.mean()) for key, values in by_run.items()}
    best = {method: max(found, key=lambda d: lds[method, d]) for method, found in scores.items()}
    against = (REFERENCE, best[REFERENCE]) if REFERENCE in best else None

    print("\n" + _line(HEAD))
    for key in sorted(best.items(), key=lambda key: -lds[key]):
        method, runs, gain = key[0], by_run[key], ""
        if against and key != against:
            gain = f"{lds[key] - lds[against]:+.3f} ± {float((drawn[key] - drawn[against]).std()):.3f}"
        default = (method, next((d for start, d in DEFAULTS.items() if method.startswith(start)), ""))
        columns = (
            method,
            f"{lds[key]:.3f} ± {float(drawn[key].std()):.3f}",
            key[1],
            f"{float(runs.min()):.3f} .. {float(runs.max()):.3f}",
            gain,
            f"{lds[default]:.3f}" if default in lds else "",
            f"{float(rank_stability(scores[method][key[1]])):.2f}" if len(runs) > 1 else "",
            f"{float(rank_correlations(sums[key].mean(0), actual).nanmean()):.3f}",
            ", ".join(f"{d}: {lds[method, d]:.3f}" for d in scores[method] if d != "none"),
        )
        print(_line(columns), flush=True)


def _line(columns: Sequence[str]) -> str:
    return " ".join(f"{text:{width}}" for text, width in zip(columns, WIDTHS, strict=True))


def report_brittleness(
    train: TensorDataset, queries: TensorDataset, scores: dict[str, Scores], cache: Path
) -> None:
    """Of the first run's scores, at their default damping, or else the first."""
    images, labels = (tensor[:WATCHED] for tensor in queries.tensors)
    retrain = functools.partial(
        retrain_subsets,
        make_net,
        train,
        train=RECIPE,
        measure=lambda net: margins(net, images, labels),
        seeds=2,
        cache=cache.with_stem(f"{cache.stem}-brittleness"),
    )
    print(f"\nShare of {WATCHED} predictions that flip without their top images, and median number that flips one")
    print(f"{'':44}" + "".join(f"{k:>8}" for k in REMOVED))
    for name, found in scores.items():
        default = next((d for start, d in DEFAULTS.items() if name.startswith(start)), next(iter(found)))
        removal = remove_top_k(found[default][:WATCHED], REMOVED, retrain=retrain)
        shares = "".join(f"{share:8.2f}" for share in removal.flipped.tolist())
        print(f"{name:44}{shares}{float(removal.data_support.nanmedian()):8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--runs", type=int, default=3, help="models that are trained on all images")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/lightning-influence/digits.npz").expanduser())
    parser.add_argument("--brittleness", action="store_true", help="remove top images, and train again")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}; {args.runs} runs, truth {HALVES} x {SEEDS}")

    train, queries = load_data()
    begin = time.perf_counter()
    truth = make_truth(train, queries, args.cache)
    print(f"truth: {time.perf_counter() - begin:.0f} s; agrees with itself at {truth.reliability:.3f}, so that a")
    print(f"perfect prediction would score about {truth.reliability**0.5:.3f}", flush=True)

    scores: dict[str, dict[str, list[Tensor]]] = {}
    for method in args.methods:
        begin = time.perf_counter()
        for run in range(args.runs):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                for name, found in METHODS[method](train, queries, run, Path(folder)):
                    for damping, values in found.items():
                        scores.setdefault(name, {}).setdefault(damping, []).append(values)
        print(f"{method}: {time.perf_counter() - begin:.0f} s", flush=True)
    report(truth, {name: {d: torch.stack(values) for d, values in of.items()} for name, of in scores.items()})
    if args.brittleness:
        first = {name: {damping: values[0] for damping, values in of.items()} for name, of in scores.items()}
        report_brittleness(train, queries, first, args.cache)


if __name__ == "__main__":
    main()
