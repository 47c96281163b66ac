"""Lightning's own kind of progress bar, for people who wait at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

DELAY = 1  # seconds that nobody needs a bar for


def progress(steps: Iterable[Any] | None, **options: Any) -> Any:
    """The steps, with tqdm's bar on stderr if that is a terminal and they take over a second.

    Args:
        steps: to go through; None to call the bar's `update`.
        options: of `tqdm`.
    """
    from tqdm.auto import tqdm

    return tqdm(steps, delay=DELAY, disable=None, leave=False, file=sys.stderr, **options)
