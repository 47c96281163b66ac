"""Trains one situation; Lightning starts this script once more for each further rank.

python -m tests.matrix.script NAME FOLDER PARENT [captured] [still]

PARENT is the id of the process that waits for it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.matrix.children import end_with_parent
from tests.matrix.running import train_and_save
from tests.matrix.situations import SITUATIONS


def main(name: str, folder: str, parent: str, *flags: str) -> None:
    """Train the situation of this name."""
    if "LOCAL_RANK" not in os.environ:  # the first; the others are in its group
        end_with_parent(int(parent))
    torch.set_num_threads(1)
    (situation,) = [each for each in SITUATIONS if each.name == name]
    train_and_save(situation, Path(folder), is_captured="captured" in flags, is_still="still" in flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
