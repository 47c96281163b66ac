"""Which damping predicts retraining? Rules against the best factor that the truth would choose.

For each task of `lds_tasks.py` a model is trained on all examples with the callback; its file is asked at many
factors of `HeuristicDamping`, and with each rule. The linear datamodeling score says how well that predicts models
that were trained again on halves (see `lds.py`). A rule's loss is the score at the best factor, chosen with the
truth at hand, minus its own.

    python examples/benchmarks/damping.py --workers 2
    python examples/benchmarks/damping.py --task mlp cnn transformer --seeds 3

Rules from training alone (`TrainingDamping`) have two numbers, which were chosen here, so that the worst loss over
all tasks is small. So that this is no circle, they are also chosen without each task in turn, and judged on that
one; fixed factors likewise. Rules from the rows alone (`damping_from_rows.py`) have none, or an obvious one.

Files, models and scores are kept in `--files`; what is there is not made again. The truth takes about 70 minutes
on one core (see `lds.py`, whose cache it shares); all else a minute or two for each task, kind of file and seed.
"""

# %%
from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damping_from_rows import RULES as RULES_FROM_ROWS
from lds import UNCOMPRESSED, Learner, sum_over_halves, train
from lds_scores import lds, usable
from lds_tasks import DEFAULT_CACHE, OTHER_TASKS, TASKS, Task, compute_truth, find_task, run_quietly

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.curvature import GlobalDamping, HeuristicDamping, TrainingDamping, WeightDecayDamping

FACTORS = (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
GLOBAL = (0.1, 0.3, 1.0)
DECAYS, STOPPINGS = (1.0, 2.0, 3.0), (0.02, 0.05, 0.1)
CHOSEN = TrainingDamping()
Scores = dict[str, float]


# %%
# Files
# -----


def kinds(task: Task) -> dict[str, dict[str, Any]]:
    """Options of the callback; where the default budget cuts rows short, also without one."""
    found: dict[str, dict[str, Any]] = {"final": {}, "merged": {"epochs": "every"}}
    if "transformer" in task.name:
        whole = {"bytes_per_example": UNCOMPRESSED}
        found |= {"final, uncompressed": whole, "merged, uncompressed": {"epochs": "every", **whole}}
    return found


def captured(task: Task, kind: str, seed: int) -> InfluenceModule:
    """The file of a run and its model, made where they are missing."""
    stem = args.files / f"{task.name}, {kind}, {seed}".replace(", ", "-").replace(" ", "-")
    path, weights = stem.with_suffix(".h5"), stem.with_suffix(".pt")
    if not weights.exists():
        model = train(task, seed, InfluenceCallback(path, on_error="raise", **kinds(task)[kind]))
        torch.save(model.state_dict(), weights)
    model = Learner(task, seed)
    model.load_state_dict(torch.load(weights))
    return InfluenceModule.attach(model.eval(), path)


# %%
# Scores
# ------


def dampings() -> dict[str, Any]:
    """All that every file is asked with, by name."""
    found: dict[str, Any] = {f"layer {factor:g}": HeuristicDamping(factor) for factor in FACTORS}
    found |= {f"global {factor:g}": GlobalDamping(factor) for factor in GLOBAL}
    found |= {f"decay {factor:g}": WeightDecayDamping(factor) for factor in DECAYS}
    return found | {training_name(d, s): TrainingDamping(d, s) for d in DECAYS for s in STOPPINGS}


def training_name(decay: float, stopping: float) -> str:
    return f"training {decay:g} {stopping:g}"


def score(task: Task, influence: InfluenceModule, truth: np.ndarray, damping: Any) -> float:
    """The linear datamodeling score; NaN if the rule does not apply to the file."""
    try:
        sums = sum_over_halves(influence.scores(task.queries, damping=damping), task.subsets())
    except ValueError as error:
        if "had no weight decay" not in str(error):
            raise
        return float("nan")
    return lds(torch.as_tensor(sums), torch.as_tensor(truth))


def measure(task: Task, truth: np.ndarray) -> Iterator[tuple[str, Scores]]:
    """Of each kind of file, the scores of each damping, means over the seeds, and what rules from rows choose."""
    for kind in kinds(task):
        by_seed = []
        for seed in range(args.seeds):
            kept = args.files / f"{task.name}, {kind}, {seed}.json".replace(", ", "-").replace(" ", "-")
            scores: Scores = json.loads(kept.read_text()) if kept.exists() else {}
            missing = {name: damping for name, damping in dampings().items() if name not in scores}
            if missing or any(name not in scores for name in RULES_FROM_ROWS):
                influence = captured(task, kind, seed)
                scores |= {name: score(task, influence, truth, damping) for name, damping in missing.items()}
                scores |= {name: rule(influence, FACTORS) for name, rule in RULES_FROM_ROWS.items()}
                kept.write_text(json.dumps(scores))
                print(f"{task.name}, {kind}, run {seed} is measured", flush=True)
            by_seed.append(scores)
        yield (
            kind,
            {name: float(np.mean([scores[name] for scores in by_seed])) for name in by_seed[0]}
            | {
                f"{name}: score": float(np.mean([scores[f"layer {scores[name]:g}"] for scores in by_seed]))
                for name in RULES_FROM_ROWS
            },
        )


# %%
# Losses
# ------

Files = Mapping[tuple[str, str], Scores]  # by task and kind


def loss(scores: Scores, name: str) -> float:
    return max(scores[f"layer {factor:g}"] for factor in FACTORS) - scores[name]


def worst(files: Files, name: str) -> float:
    return max(loss(scores, name) for scores in files.values())


def chosen_without(files: Files, names: list[str]) -> dict[tuple[str, str], str]:
    """For each file, the one of these dampings of which the worst loss on all other tasks is smallest."""
    best = {}
    for task in {task for task, _ in files}:
        others = {key: scores for key, scores in files.items() if key[0] != task}
        best[task] = min(names, key=lambda name: worst(others, name))
    return {(task, kind): best[task] for task, kind in files}


def print_scores(files: Files) -> None:
    print("\n| task, file | " + " | ".join(f"{factor:g}" for factor in FACTORS) + " |")
    print("|---" * (len(FACTORS) + 1) + "|")
    for (task, kind), scores in files.items():
        print(f"| {task}, {kind} | " + " | ".join(f"{scores[f'layer {f:g}']:.3f}" for f in FACTORS) + " |")


def print_losses(files: Files) -> None:
    fixed = [f"layer {factor:g}" for factor in FACTORS]
    trained = [training_name(d, s) for d in DECAYS for s in STOPPINGS]
    several = len({task for task, _ in files}) > 1
    held_out = (
        {"layer": chosen_without(files, fixed), "training": chosen_without(files, trained)} if several else {}
    )
    rules: dict[str, Callable[[tuple[str, str]], float]] = {
        name: (lambda key, name=name: loss(files[key], name))
        for name in ["layer 0.1", "layer 0.3", "layer 1", *(f"global {f:g}" for f in GLOBAL), "decay 3"]
    }
    rules[training_name(CHOSEN.decay, CHOSEN.stopping)] = lambda key: loss(
        files[key], training_name(CHOSEN.decay, CHOSEN.stopping)
    )
    for name, choice in held_out.items():
        rules[f"{name}, chosen on other tasks"] = lambda key, choice=choice: loss(files[key], choice[key])
    for name in RULES_FROM_ROWS:
        rules[name] = lambda key, name=name: loss(files[key], f"{name}: score")
    print("\n| loss of | " + " | ".join(", ".join(key) for key in files) + " | mean | worst |")
    print("|---" * (len(files) + 3) + "|")
    for name, rule in rules.items():
        losses = np.array([rule(key) for key in files])
        cells = [f"{x:.3f}" if np.isfinite(x) else "" for x in (*losses, np.nanmean(losses), np.nanmax(losses))]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, choice in held_out.items():
        print(f"{name}, chosen without each task: " + "; ".join(f"{task}: {n}" for (task, _), n in choice.items()))
    for name in RULES_FROM_ROWS:
        print(f"factors of {name}: " + "; ".join(f"{', '.join(key)}: {files[key][name]:g}" for key in files))


def main() -> None:
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {args.seeds} runs of each task")
    args.files.mkdir(parents=True, exist_ok=True)
    files: dict[tuple[str, str], Scores] = {}
    for name in args.task:
        task = find_task(name)
        truth = usable(compute_truth(task, args.cache, args.workers)).mean(1).T
        files |= {(name, kind): scores for kind, scores in measure(task, truth)}
    print_scores(files)
    print_losses(files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*TASKS, *OTHER_TASKS]
    parser.add_argument("--task", nargs="+", choices=every, default=every)
    parser.add_argument("--seeds", type=int, default=1, help="training runs on all examples")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where the truth is kept")
    parser.add_argument("--files", type=Path, default=DEFAULT_CACHE / "damping", help="of captures")
    parser.add_argument("--workers", type=int, default=1, help="processes that make the truth")
    args = parser.parse_args()
    run_quietly()
    main()
