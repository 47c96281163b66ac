"""Do several runs predict retraining better than one, and how should their scores be averaged?

From the predictions that `lds.py` has kept: sums of scores over random halves of the training set, one training
run a seed. The mean over seeds is what `InfluenceModule.ensemble` of these runs predicts; `standardized` divides
each run's scores of a query by their standard deviation first, and `ranks` averages their ranks over the halves.
Errors are bootstrap standard errors of the difference to single runs, over queries and halves (`lds_scores.py`).
Each line takes the damping at which single runs are best.

    python examples/benchmarks/lds.py --methods final merged kronfluence     # trains, keeps predictions
    python examples/benchmarks/ensemble.py                                   # seconds
"""

# %%
from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lds_scores import Prediction, lds, predictions_folder, usable
from lds_tasks import DEFAULT_CACHE, TASKS, Task, load_truth
from scipy.stats import rankdata
from torch import Tensor

from lightning_influence.metrics import bootstrap_rank_correlations

FAMILIES = ("final epoch", "every epoch, merged", "kronfluence EK-FAC", "gradient dot product")


# %%
# Averages
# --------


def averages(runs: Tensor) -> dict[str, Tensor]:
    """By name: one prediction [q, subsets] of the predictions of several runs, [runs, q, subsets]."""
    return {
        "mean": runs.mean(0),
        "standardized": (runs / runs.std(2, keepdim=True)).mean(0),
        "ranks": torch.from_numpy(rankdata(runs, axis=-1)).mean(0),
    }


def truth_of(task: Task, cache: Path) -> Tensor:
    """Mean log-likelihoods, [q, subsets]."""
    return torch.from_numpy(usable(load_truth(task, cache))).double().mean(1).T


def kept(task: Task, cache: Path) -> Iterator[tuple[str, Tensor]]:
    """What each method predicts, at the damping that is best for single runs: name and [runs, q, subsets]."""
    actual = truth_of(task, cache)
    methods: dict[str, dict[str, list[np.ndarray]]] = {}
    for path in sorted(predictions_folder(task, cache).glob("*.npz")):
        found = Prediction.load(path)
        if found.family in FAMILIES:
            name = ", ".join(part for part in (found.family, found.variant) if part)
            for damping, sums in found.sums.items():
                methods.setdefault(name, {}).setdefault(damping, []).append(sums)
    for name, dampings in methods.items():
        runs = {damping: torch.from_numpy(np.stack(sums)) for damping, sums in dampings.items()}
        best = max(runs, key=lambda damping: float(np.mean([lds(run, actual) for run in runs[damping]])))
        yield f"{name} (damping {best})", runs[best]


# %%
# The table
# ---------


def main() -> None:
    for name in args.task:
        task = TASKS[name]
        actual = truth_of(task, args.cache)
        for method, runs in kept(task, args.cache):
            joined = averages(runs)
            single = float(np.mean([lds(run, actual) for run in runs]))
            drawn = bootstrap_rank_correlations([runs, *(sums[None] for sums in joined.values())], actual)
            errors = (drawn[1:] - drawn[0]).std(1)
            gains = [
                f"{average} {lds(sums, actual):.3f} ({lds(sums, actual) - single:+.3f} ± {error:.3f})"
                for (average, sums), error in zip(joined.items(), errors, strict=True)
            ]
            print(f"{name}: {method:58} {len(runs)} runs: single {single:.3f}  {'  '.join(gains)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where `lds.py` keeps its predictions")
    args = parser.parse_args()
    main()
