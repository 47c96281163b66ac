"""What `lds.py` makes of its predictions: scores and their errors, a table, a JSON file, a picture."""

# %%
from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lds_tasks import TASKS, Task, Truth
from torch import Tensor

from lightning_influence.metrics import bootstrap_rank_correlations, rank_correlations, split_half_reliability

DRAWN = (  # families, one colour each
    "every epoch, merged",
    "every 2nd epoch, merged",
    "every 3rd epoch, merged",
    "first half of the epochs, merged",
    "last third of the epochs, merged",
    "every epoch, segments",
    "final epoch",
    "kronfluence EK-FAC",
    "kronfluence K-FAC",
    "gradient dot product",
)
REFERENCE = ("final epoch", "uncompressed")  # family and variant that the others are compared with


# %%
# Predictions
# -----------


@dataclass(frozen=True)
class Prediction:
    """What the scores of one run say of each half.

    Args:
        family: of methods; a curve of the picture.
        variant: a point of it; with the family, the method's name.
        seed: of the run.
        sums: of the scores of a half's examples, by the name of the damping, each [q, subsets].
        bytes_per_example: of the file's rows; NaN where there is no file.
    """

    family: str
    variant: str
    seed: int
    sums: Mapping[str, np.ndarray]
    bytes_per_example: float = math.nan

    def file(self, folder: Path) -> Path:
        """Where it is kept."""
        return folder / (re.sub(r"\W+", "-", f"{self.family} {self.variant} {self.seed}") + ".npz")

    def save(self, folder: Path) -> None:
        """Replace an earlier one of the same name."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            "_family": self.family,
            "_variant": self.variant,
            "_seed": self.seed,
            "_bytes": self.bytes_per_example,
            **self.sums,
        }
        part = self.file(folder).with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(self.file(folder))  # whole at any time, for those who read meanwhile

    @classmethod
    def load(cls, path: Path) -> Prediction:
        with np.load(path) as file:
            sums = {name: file[name] for name in file.files if not name.startswith("_")}
            names = str(file["_family"]), str(file["_variant"]), int(file["_seed"])
            return cls(*names, sums, float(file["_bytes"]))


def predictions_folder(task: Task, cache: Path) -> Path:
    return cache / f"predictions-{task.name}-{task.fingerprint()}"


# %%
# Their scores
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


def lds(sums: Tensor, truth: Tensor) -> float:
    """The mean over queries of the Spearman correlation over halves; both [q, subsets]."""
    return float(rank_correlations(sums, truth).nanmean())


def evaluate(task: Task, truth: Truth, cache: Path) -> list[Result]:
    """All predictions that are kept."""
    actual = torch.from_numpy(usable(truth)).double().mean(1).T
    paths = sorted(predictions_folder(task, cache).glob("*.npz"))
    by_name: dict[tuple[str, str, str], list[Prediction]] = {}
    for prediction in sorted(map(Prediction.load, paths), key=lambda prediction: prediction.seed):
        for damping in prediction.sums:
            by_name.setdefault((prediction.family, prediction.variant, damping), []).append(prediction)
    sums = [torch.from_numpy(np.stack([run.sums[name[-1]] for run in runs])) for name, runs in by_name.items()]
    drawn = bootstrap_rank_correlations(sums, actual).numpy()
    results = []
    for (family, variant, damping), runs, values, found in zip(
        by_name, by_name.values(), sums, drawn, strict=True
    ):
        scores, size = [lds(run, actual) for run in values], runs[0].bytes_per_example
        size_or_none = None if math.isnan(size) else size
        mean, error = float(np.mean(scores)), float(found.std(ddof=1))
        results.append(Result(task.name, family, variant, damping, size_or_none, scores, mean, error))
    finals = [n for n, result in enumerate(results) if (result.family, result.variant) == REFERENCE]
    if finals:
        reference = max(finals, key=lambda n: results[n].lds)
        for result, found in zip(results, drawn, strict=True):
            result.gain = result.lds - results[reference].lds
            result.gain_error = float((found - drawn[reference]).std(ddof=1))
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
    found = split_half_reliability(torch.from_numpy(log_likelihoods))
    return {
        "subsets": subsets,
        "seeds": seeds,
        "queries": q,
        "agreement": found,
        "ceiling": math.sqrt(max(found, 0)),
    }


def print_table(task: Task, facts: Mapping[str, Any], results: list[Result]) -> None:
    print(
        f"\n{task.name}: {len(task.train[0]):,} examples, {facts['queries']} queries; truth: {facts['subsets']} "
        f"halves x {facts['seeds']} seeds, agrees with itself at {facts['agreement']:.3f}; a perfect prediction "
        f"would score about {facts['ceiling']:.3f}"
    )
    print(f"{'':40}{'bytes':>9}  {'best LDS':15}{'runs':18}{'over final':16}damping: LDS")
    for chosen in sorted(best(results), key=lambda r: (r.family, r.bytes_per_example or 0)):
        size = "" if chosen.bytes_per_example is None else f"{chosen.bytes_per_example:,.0f}"
        gain = "" if chosen.gain is None else f"{chosen.gain:+.3f} ± {chosen.gain_error:.3f}"
        runs = f"{len(chosen.lds_by_seed)}: {min(chosen.lds_by_seed):.3f} .. {max(chosen.lds_by_seed):.3f}"
        same = [r for r in results if (r.family, r.variant) == (chosen.family, chosen.variant)]
        dampings = ", ".join(f"{r.damping}: {r.lds:.3f}" for r in sorted(same, key=lambda r: _number(r.damping)))
        name = ", ".join(part for part in (chosen.family, chosen.variant) if part)
        print(f"{name:40}{size:>9}  {chosen.lds:.3f} ± {chosen.error:.3f}  {runs}  {gain:16}{dampings}")


def _number(damping: str) -> float:
    return float(damping.split()[0]) if damping[0].isdigit() else 0.0


def save_results(file: Path, task: Task, facts: Mapping[str, Any], results: list[Result]) -> None:
    """Put a task's results in the place of its former ones."""
    stored = json.loads(file.read_text()) if file.exists() else {}
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    stored[task.name] = {"machine": machine, "truth": facts, "results": [vars(result) for result in results]}
    file.write_text(json.dumps(stored, indent=1))


def draw(file: Path, picture: Path) -> None:
    """Bytes per example against the best score, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stored = json.loads(file.read_text())
    tasks = [name for name in TASKS if name in stored]
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.4), squeeze=False)
    for panel, name in zip(panels[0], tasks, strict=True):
        by_family: dict[str, list[Result]] = {}
        for result in best([Result(**entry) for entry in stored[name]["results"]]):
            by_family.setdefault(result.family, []).append(result)
        for number, family in enumerate(DRAWN):
            color, points = f"C{number}", by_family.get(family, [])
            if not points:
                continue
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
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.savefig(picture, dpi=130)
    print(f"picture: {picture}")
