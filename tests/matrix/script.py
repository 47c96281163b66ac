"""Trains one situation; Lightning starts this script once more for each further rank.

python -m tests.matrix.script NAME FOLDER [captured] [still]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.matrix.running import train_here
from tests.matrix.situations import SITUATIONS


def main(name: str, folder: str, *flags: str) -> None:
    """Rank 0 saves what there is to know."""
    torch.set_num_threads(1)
    (situation,) = [each for each in SITUATIONS if each.name == name]
    trained = train_here(situation, Path(folder), is_captured="captured" in flags, is_still="still" in flags)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save(vars(trained), Path(folder) / "trained.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
