"""Every layer with every flag against autograd: `python -m tests.layer_table`.

Prints the relative error of the per-example gradients in float64 and float32, both against autograd in
float64 one example at a time, and how many of the layer's parameters are covered. Fails if an error is above
its bound, if parameters are not covered and no reason was expected, or if a registered adapter has no row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn

from lightning_influence.layers.base import _ADAPTERS
from lightning_influence.layers.coverage import LayerReport, track_layers
from tests.layers.case import Case, Uncovered
from tests.layers.cases import CASES
from tests.layers.running import run
from tests.layers.uncovered import UNCOVERED

# Sums of up to some hundred products in another order; a term's rounding is 1e-16 and 6e-8.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def main() -> int:
    """Print the table; 1 if a row is wrong or an adapter has none."""
    torch.set_num_threads(1)  # the layers are small
    failures = []
    print(f"{'layer':<28} {'flags':<44} {'float64':>8} {'float32':>8} {'covered':>9}")
    for layer, flags, *columns, failure in rows():
        print(f"{layer:<28} {flags:<44} {columns[0]:>8} {columns[1]:>8} {columns[2]:>9}  {columns[3]}{failure}")
        failures += [f"{layer}({flags}){failure}"] if failure else []
    failures += [f"no row for the adapter {name}" for name in adapters_without_row()]
    print(f"\n{len(CASES)} rows with a bound, {len(UNCOVERED)} uncovered; {len(failures)} wrong")
    for failure in failures:
        print(f"  {failure}")
    return bool(failures)


def rows() -> Iterator[tuple[str, ...]]:
    """Layer, flags, both errors, covered parameters, reason, and what is wrong with the row."""
    for case in CASES:
        try:
            yield _covered(case)
        except Exception as error:  # a row that cannot be computed is a wrong one; the others still print
            yield case.layer, case.flags, "-", "-", "-", "", f"  <- {type(error).__name__}: {error}"
    yield from map(_uncovered, UNCOVERED)


def _covered(case: Case) -> tuple[str, ...]:
    errors = {dtype: run(case, dtype).error for dtype in BOUNDS}
    failure = "".join(f"  <- above {BOUNDS[d]:.0e}" for d, error in errors.items() if not error <= BOUNDS[d])
    layers = run(case, torch.float64).coverage.layers
    covered, total = sum(layer.covered for layer in layers), sum(layer.parameters for layer in layers)
    reason = "; ".join(layer.reason for layer in layers if layer.reason)
    if (case.reason not in reason) if case.reason else reason:
        failure += f"  <- expected {case.reason!r}"
    return (case.layer, case.flags, *(f"{e:.1e}" for e in errors.values()), f"{covered}/{total}", reason, failure)


def _uncovered(case: Uncovered) -> tuple[str, ...]:
    found = [layer for layer in reports(case) if layer.reason]
    covered, total = sum(layer.covered for layer in found), sum(layer.parameters for layer in found)
    reasons = list(dict.fromkeys(layer.reason for layer in found))
    failure = "" if any(case.reason in reason for reason in reasons) else f"  <- expected {case.reason!r}"
    return case.layer, case.flags, "-", "-", f"{covered}/{total}", "; ".join(reasons), failure


def reports(case: Uncovered) -> tuple[LayerReport, ...]:
    """What is said of an uncovered layer and what is inside of it."""
    model = nn.ModuleDict({"layer": case.make(), "other": nn.Linear(1, 1)})  # something has to be covered
    return tuple(layer for layer in track_layers(model)[1].layers if layer.name != "other")


def adapters_without_row() -> list[str]:
    """Registered adapters that serve no case."""
    served = {
        type(source.adapter)
        for case in CASES
        for layer in track_layers(case.make())[0].values()
        for source in layer.sources
    }
    return [type(adapter).__name__ for group in _ADAPTERS for adapter in group if type(adapter) not in served]


if __name__ == "__main__":
    sys.exit(main())
