"""Every way of training against what is expected of it: `python -m tests.training_matrix [--only NAME]`.

Each situation trains three times: without capture, with it and, if that leaves a file, at learning rate 0. The
columns:

- training: whether weights, optimizer states and random states are bit-identical with and without capture.
- file: which epochs it holds, all checksums compared.
- rows: written/missing/invalid of the latest epoch.
- stored/true: the median ratio of stored gradients to autograd's in float64.
- factors: the largest relative error of A, S and Lambda against a single process in float32.

Fails if a row is not as expected.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.matrix.rows import Row, measure
from tests.matrix.situation import Situation
from tests.matrix.situations import SITUATIONS

WIDTHS = (44, 10, 22, 8, 12, 8)


def main() -> int:
    """Print the table; 1 if a row is not as expected."""
    parser = argparse.ArgumentParser(prog="python -m tests.training_matrix")
    parser.add_argument("--only", metavar="NAME", help="situations whose name contains this")
    wanted = parser.parse_args().only or ""
    torch.set_num_threads(1)  # the models are small
    situations = [situation for situation in SITUATIONS if wanted in situation.name]
    print(line("situation", "training", "file", "rows", "stored/true", "factors", "as expected"))
    wrong = [situation.name for situation in situations if not print_row(situation)]
    print(f"\n{len(situations)} situations, {len(wrong)} not as expected")
    for name in wrong:
        print(f"  {name}")
    return bool(wrong) or not situations


def print_row(situation: Situation) -> bool:
    """Whether it is as expected."""
    with tempfile.TemporaryDirectory() as folder, silence():
        try:
            row = measure(situation, Path(folder))
        except (Exception, SystemExit) as error:  # the other rows still print
            row = Row("-", "-", "-", float("nan"), float("nan"), (f"{type(error).__name__}: {error}",))
    columns = (row.training, row.file, row.rows, number(row.ratio, "{:.6f}"), number(row.factors, "{:.0e}"))
    print(line(situation.name, *columns, "yes" if not row.flaws else f"NO: {'; '.join(row.flaws)}"), flush=True)
    return not row.flaws


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing of what Lightning and its processes print."""
    sys.stdout.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        yield
    finally:
        sys.stdout.flush()
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(nowhere)


def number(value: float, how: str) -> str:
    """A dash where there is none."""
    return how.format(value) if value == value else "-"


def line(*columns: str) -> str:
    """Columns of fixed width; the last one takes what it needs."""
    return (
        " ".join(f"{column:<{width}}" for column, width in zip(columns, WIDTHS, strict=False)) + f" {columns[-1]}"
    )


if __name__ == "__main__":
    sys.exit(main())
