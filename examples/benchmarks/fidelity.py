"""What do the stored rows lose? Scores from the file against uncompressed EK-FAC at the final weights.

Three models are trained with several callbacks, one for each way to store rows. The reference are the scores of
full gradients of all examples in float32, all positions in the covariances, at the final weights, with the same
training labels and damping (0.1 times each layer's mean eigenvalue). Each line is the mean over queries of the
Spearman and the Pearson correlation over all examples, and of the share of the reference's top 10 in the top 10:
of the whole path, of the codec alone (rows of the final weights, compressed), and of the online gradients alone
(rows as training went, exact).

    python examples/benchmarks/fidelity.py                           # all three, one seed
    python examples/benchmarks/fidelity.py --workload w3 --seeds 3 --epochs 8
    python examples/benchmarks/fidelity.py --results fidelity.json --picture examples/benchmarks/fidelity.png

Also: two captures of the same weights whose data come in another order must agree (self-noise; with labels drawn
from the model, their noise too), and two other ways to store gradients (`fidelity_baselines.py`), from the final
weights' gradients. One thread. Needs the extra `examples` and Debian's package `dataset-fashion-mnist`; about 4 GB
of disk for the exact rows (`TMPDIR`).
"""

# %%
from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity_baselines import low_rank_scores, random_scores, read_layers
from lds import Learner, train
from lds_tasks import TASKS, Data, Task, example_losses, fashion_images, run_quietly
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, capture
from lightning_influence.curvature import HeuristicDamping
from lightning_influence.query import InfluenceQuery

EXACT = {"codec": "pairs-float32"}
TOP = 10


# %%
# The workloads
# -------------


@dataclass(frozen=True)
class Workload:
    """A task and the ways to store its rows.

    Args:
        task: network, data and optimizer.
        options: of `InfluenceCallback`, by the name of the curve and point.
        goal: Spearman of the whole path, and the bytes that it may take.
        budgets: of the baselines, bytes.
        ranks: of the low-rank baseline; none where gradients have rank one.
    """

    task: Task
    options: Mapping[tuple[str, str], Mapping[str, Any]]
    goal: tuple[float, int]
    budgets: tuple[int, ...]
    ranks: tuple[int, ...]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def ours(codec: str, *budgets: int) -> dict[tuple[str, str], dict[str, Any]]:
    name = "eigen" if codec == "eigen" else "default"
    return {(name, f"{b:,} bytes"): {"codec": codec, "bytes_per_example": b} for b in budgets}


def workloads() -> dict[str, Workload]:
    few, many = (1024, 2048, 4096, 8192), (1024, 2048, 4096, 8192, 16384, 32768)
    images = functools.partial(fashion_images, 10_000, 100)
    pairs = {("pairs", dtype): {"codec": f"pairs{end}"} for dtype, end in (("int8", ""), ("float16", "-float16"))}
    w1 = dataclasses.replace(TASKS["mlp"], name="w1", make_net=mlp, read_data=images, epochs=10)
    w2 = dataclasses.replace(TASKS["cnn"], name="w2", read_data=functools.partial(fashion_images, 4000, 100))
    w3 = dataclasses.replace(TASKS["transformer"], name="w3")
    return {
        "w1": Workload(w1, pairs | ours("eigen", *few[:3]), (0.95, 2048), (*few, 16384), ()),
        "w2": Workload(w2, ours("auto", 512, *few), (0.97, 8192), few, (1, 2, 4, 8)),
        "w3": Workload(w3, ours("auto", *many), (0.95, 9216), many, (1, 2, 4, 8)),
    }


# %%
# Captures
# --------


def minus_losses(model: nn.Module, batch: Data) -> Tensor:
    return -example_losses(model.net if isinstance(model, Learner) else model, batch)


def at_final_weights(net: nn.Module, data: Data, path: Path, **options: Any) -> Path:
    """A file of the network as it is now."""
    loader = DataLoader(TensorDataset(*data), 64)
    return capture(net, loader, path, training_loss=example_losses, **options)


def scores_of(net: nn.Module, path: Path, queries: Data) -> tuple[Tensor, int]:
    """Scores [q, n], and the bytes of a row."""
    influence = InfluenceModule.attach(net, path)
    scores = influence.scores(queries, measurement=minus_losses, damping=HeuristicDamping(0.1))
    return scores, int(influence.store.attributes["bytes_per_row"])


# %%
# The comparison
# --------------


@dataclass(frozen=True)
class Result:
    """How scores agree with the reference, in the mean over queries.

    Args:
        workload: its name.
        seed: of weights and order.
        part: "whole", "codec", "online", "noise".
        family: a curve of the picture.
        variant: a point of it.
        nbytes: of a row.
        spearman: over all examples.
        pearson: over all examples.
        top: share of the reference's top 10 that is in the top 10.
    """

    workload: str
    seed: int
    part: str
    family: str
    variant: str
    nbytes: float
    spearman: float
    pearson: float
    top: float


def compare(found: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """Spearman, Pearson, top-10 overlap of scores [q, n]."""
    pearson = _correlation(found.double().numpy(), reference.double().numpy())
    spearman = _correlation(rankdata(found.numpy(), axis=1), rankdata(reference.numpy(), axis=1))
    tops = zip(found.topk(TOP).indices.tolist(), reference.topk(TOP).indices.tolist(), strict=True)
    return spearman, pearson, float(np.mean([len({*one} & {*two}) / TOP for one, two in tops]))


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    one, two = (values - values.mean(1, keepdims=True) for values in (one, two))
    return float(((one * two).sum(1) / np.sqrt((one**2).sum(1) * (two**2).sum(1))).mean())


def measure(name: str, workload: Workload, seed: int, folder: Path) -> Iterator[Result]:
    """One training run."""
    task = workload.task
    paths = {names: folder / f"{number}.h5" for number, names in enumerate(workload.options)}
    callbacks = [
        InfluenceCallback(path, on_error="raise", **workload.options[names]) for names, path in paths.items()
    ]
    exact_online = InfluenceCallback(folder / "online.h5", on_error="raise", **EXACT)
    net = train(task, seed, *callbacks, exact_online).eval()
    inner = net.net
    exact = at_final_weights(inner, task.train, folder / "exact.h5", covariance_positions=None, **EXACT)
    reference, whole_bytes = scores_of(inner, exact, task.queries)

    def result(part: str, names: tuple[str, str], nbytes: float, found: Tensor) -> Result:
        return Result(name, seed, part, *names, nbytes, *compare(found, reference))

    yield result("online", ("exact", ""), whole_bytes, scores_of(net, folder / "online.h5", task.queries)[0])
    (folder / "online.h5").unlink()
    for names, path in paths.items():
        found, nbytes = scores_of(net, path, task.queries)
        yield result("whole", names, nbytes, found)
        path.unlink()
    for names, options in workload.options.items():
        path = at_final_weights(inner, task.train, folder / "final.h5", **options)
        found, nbytes = scores_of(inner, path, task.queries)
        yield result("codec", names, nbytes, found)
    yield self_noise(name, workload, seed, inner, folder, training_loss=example_losses)
    yield self_noise(name, workload, seed, net, folder, fisher="sampled")
    if seed == 0 and args.baselines:
        yield from baselines(result, workload, inner, exact, folder)


def self_noise(name: str, workload: Workload, seed: int, net: nn.Module, folder: Path, **options: Any) -> Result:
    """Two captures of the same weights, whose data come in another order; as pairs, or with the most bytes."""
    (inputs, targets), queries = workload.task.data
    curve, point = next((names for names in workload.options if names[0] == "pairs"), list(workload.options)[-1])
    options |= workload.options[curve, point]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))
    found, nbytes = {}, 0
    for path, rows in ((folder / "one.h5", torch.arange(len(inputs))), (folder / "two.h5", order)):
        loader = DataLoader(TensorDataset(inputs[rows], targets[rows]), 64)
        found[path.stem], nbytes = scores_of(net, capture(net, loader, path, **options), queries)
    drawn = ", labels drawn" if "fisher" in options else ""
    return Result(
        name, seed, "noise", curve, point + drawn, nbytes, *compare(found["two"], found["one"][:, order])
    )


def baselines(result: Any, workload: Workload, net: nn.Module, exact: Path, folder: Path) -> Iterator[Result]:
    """From the final weights' exact gradients."""
    asked = at_final_weights(net, workload.task.queries, folder / "queries.h5", **EXACT)
    training, queries = (InfluenceQuery(InfluenceModule.attach(net, path).store) for path in (exact, asked))
    layers = read_layers(training, queries)
    for budget in workload.budgets:
        for is_whitened, family in ((False, "random projection"), (True, "random projection, whitened")):
            found, nbytes = random_scores(layers, budget, is_whitened=is_whitened)
            yield result("codec", (family, f"{budget:,} bytes"), nbytes, found)
    if workload.ranks:
        for rank, (found, nbytes) in zip(workload.ranks, low_rank_scores(layers, workload.ranks), strict=True):
            yield result("codec", ("low rank", f"rank {rank}"), nbytes, found)


# %%
# The tables and the picture
# --------------------------


def print_table(name: str, workload: Workload, results: list[Result]) -> None:
    n, q = len(workload.task.train[0]), len(workload.task.queries[0])
    print(f"\n{name}: {n:,} examples, {q} queries, {workload.task.epochs} epochs")
    print(f"{'part':8}{'stored as':46}{'bytes':>9}  Spearman (range of seeds)  Pearson  top 10")
    by_name: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        by_name.setdefault((result.part, result.family, result.variant), []).append(result)
    for (part, family, variant), runs in by_name.items():
        spearman, pearson, top = (
            np.mean([getattr(r, key) for r in runs]) for key in ("spearman", "pearson", "top")
        )
        low, high = min(r.spearman for r in runs), max(r.spearman for r in runs)
        stored = f"{family}, {variant}".strip(", ")
        print(
            f"{part:8}{stored:46}{runs[0].nbytes:9,.0f}  {spearman:.4f}  ({low:.4f} to {high:.4f})"
            f"    {pearson:.4f}   {top:.3f}"
        )
    wanted, most = workload.goal
    fitting = {v for v in by_name if v[0] == "whole" and by_name[v][0].nbytes <= most}
    found = max(float(np.mean([r.spearman for r in by_name[v]])) for v in fitting)
    print(f"goal: the whole path at most {most:,} bytes, Spearman >= {wanted}: {found:.4f}")


def draw(results: list[Result], names: list[str], picture: Path) -> None:
    """Bytes an example against Spearman, one panel a workload, of the final weights' gradients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, sharey=True)
    colors: dict[str, str] = {}
    for panel, name in zip(panels[0], names, strict=True):
        curves: dict[str, list[Result]] = {}
        for result in results:
            if result.workload == name and result.part == "codec" and result.seed == 0:
                curves.setdefault(result.family, []).append(result)
        for family, points in curves.items():
            color = colors.setdefault(family, f"C{len(colors)}")
            points.sort(key=lambda point: point.nbytes)
            sizes, values = [point.nbytes for point in points], [point.spearman for point in points]
            panel.plot(sizes, values, color=color, marker="o", label=family)
        panel.set(xscale="log", xlabel="bytes per example", title=name)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8, loc="lower right")
    panels[0][0].set(ylabel="Spearman with uncompressed EK-FAC", ylim=(0, 1.02))
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    print(f"picture: {picture}")


def main() -> None:
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {args.seeds} seeds")
    kept = json.loads(args.results.read_text()) if args.results and args.results.exists() else []
    results = [result for result in (Result(**entry) for entry in kept) if result.workload not in args.workload]
    for name in args.workload:
        workload, begin = workloads()[name], time.perf_counter()
        if args.epochs:
            workload = dataclasses.replace(workload, task=dataclasses.replace(workload.task, epochs=args.epochs))
        own: list[Result] = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                own += measure(name, workload, seed, Path(folder))
        print_table(name, workload, own)
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
        results += own
    if args.results:
        args.results.write_text(json.dumps([vars(result) for result in results], indent=1))
    if args.picture:
        draw(results, sorted({result.workload for result in results}), args.picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="*", choices=("w1", "w2", "w3"), default=["w1", "w2", "w3"])
    parser.add_argument("--seeds", type=int, default=1, help="training runs; the baselines are of the first")
    parser.add_argument("--epochs", type=int, help="instead of the workload's")
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, help="keep all numbers there, as JSON")
    parser.add_argument("--picture", type=Path, help="draw one, with the baselines")
    args = parser.parse_args()
    run_quietly()
    main()
