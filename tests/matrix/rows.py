"""One line of the table: a situation is run, measured, and compared with what is expected of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tests.matrix.measuring import Contents, contents, file_status
from tests.matrix.running import Trained, train
from tests.matrix.situation import Situation, matches


@dataclass(frozen=True)
class Row:
    """What was found.

    Args:
        training: whether it is bit-identical with and without capture.
        file: which epochs the file holds.
        rows: written/missing/invalid in the latest of them.
        ratio: the median of stored/true, the worst of all epochs in the file.
        factors: the largest relative error.
        flaws: what is not as expected.
    """

    training: str
    file: str
    rows: str
    ratio: float
    factors: float
    flaws: tuple[str, ...] = ()


def measure(situation: Situation, folder: Path) -> Row:
    """Run a situation and compare it with what is expected of it."""
    plain = train(situation, folder / "plain", is_captured=False, is_still=False)
    moving = train(situation, folder / "moving", is_captured=True, is_still=False)
    training = "identical" if plain.digest == moving.digest else "differs"
    file, held = file_status(folder / "moving" / "influence.h5")
    if not held:
        row = Row(training, file, "-", math.nan, math.nan)
        return replace(row, flaws=tuple(filter(None, [*_flaws(row, situation, moving), moving.flaw])))
    still = train(situation, folder / "still", is_captured=True, is_still=True)
    still_file, still_held = file_status(folder / "still" / "influence.h5")
    found = [contents(reader, situation, still.weights) for reader in still_held]
    row = Row(
        training=training,
        file=file,
        rows=contents(held[-1], situation, still.weights).rows,
        ratio=max((each.ratio for each in found), key=lambda ratio: abs(ratio - 1), default=math.nan),
        factors=max((each.factors for each in found), default=math.nan),
    )
    flaws = [*_flaws(row, situation, moving), moving.flaw, _other(row, still_file, found)]
    return replace(row, flaws=tuple(filter(None, flaws)))


def _flaws(row: Row, situation: Situation, moving: Trained) -> list[str]:
    """What is not as expected."""
    expected = situation.expected
    flaws = ["training differs"] if row.training != "identical" else []
    if not matches(expected.file, row.file):
        flaws.append(f"expected the file to be {expected.file!r}")
    if not matches(expected.rows, row.rows):
        flaws.append(f"expected rows {expected.rows!r}")
    if row.rows != "-" and situation.is_exact:
        if not abs(row.ratio - 1) <= expected.tolerance:
            flaws.append(f"expected stored/true within {expected.tolerance:.0e} of 1")
        if not row.factors <= expected.factors:
            flaws.append(f"expected factors within {expected.factors:.0e}")
    if expected.said and not any(re.search(expected.said, each, re.DOTALL) for each in moving.said):
        flaws.append(f"expected a warning {expected.said!r}")
    if flaws and not expected.said.startswith("stopped"):  # why there is no file
        flaws += [each[:300] for each in moving.said if "stopped" in each]
    return flaws


def _other(row: Row, still_file: str, found: list[Contents]) -> str:
    """Whether the run whose weights stand still came to another end."""
    rows = found[-1].rows if found else "-"
    return "" if (still_file, rows) == (row.file, row.rows) else f"with still weights it is {still_file}, {rows}"
