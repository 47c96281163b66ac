"""What `InfluenceModule.verify` gives back: a page for people, and the same as plain values."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

GOOD, FAIR = 0.95, 0.8  # of rank correlations; conventions, for words only
WIDTH = 100


@dataclass(frozen=True)
class Check:
    """One question that the report asks.

    Args:
        name: short, such as "staleness".
        question: in plain words.
        answer: in plain words, with what to do if it is bad; "" if it was left out.
        figures: what was measured, by name.
        value: the figure that the verdict is about, a rank correlation or a share; NaN if there is none.
        left_out: why the question was not asked, and what to pass to have it asked; "" if it was.
    """

    name: str
    question: str
    answer: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    value: float = math.nan
    left_out: str = ""

    @property
    def verdict(self) -> str:
        """good, fair, poor, or not measured."""
        if math.isnan(self.value):
            return "left out" if self.left_out else "not measured"
        return "good" if self.value >= GOOD else "fair" if self.value >= FAIR else "poor"


@dataclass(frozen=True)
class VerificationReport:
    """Whether a file's scores can be trusted, as far as was asked; `print` shows the page.

    Args:
        file: that was asked.
        model: name of its class.
        num_examples: of the training set.
        damping: that scores were asked with.
        checks: the questions and answers, in order.
        seconds: that it took.
        minutes: that it was allowed to take.
    """

    file: str
    model: str
    num_examples: int
    damping: str
    checks: tuple[Check, ...]
    seconds: float
    minutes: float

    def __getitem__(self, name: str) -> Check:
        """The check of that name.

        Raises:
            KeyError: if there is none.
        """
        found = {check.name: check for check in self.checks}
        if name not in found:
            raise KeyError(f"no check {name!r}; there are {', '.join(found)}")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; what was not measured is None."""
        checks = [{**asdict(check), "verdict": check.verdict} for check in self.checks]
        return _plain({**asdict(self), "checks": checks})

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON text; options are those of `json.dumps`."""
        return json.dumps(self.to_dict(), **({"indent": 2, "allow_nan": False} | options))

    def __str__(self) -> str:
        asked = [check for check in self.checks if not check.left_out]
        left_out = [check for check in self.checks if check.left_out]
        lines = [
            f"Do the scores of {self.file} tell the truth about {self.model}?",
            f"{self.num_examples:,} training examples; damping {self.damping}; {self.seconds:.0f} s of at most "
            f"{60 * self.minutes:.0f} s.",
        ]
        for check in asked:
            value = "" if math.isnan(check.value) else f"{check.value:.3f}, "
            lines += ["", f"{check.name}: {value}{check.verdict}. {check.question}", *_wrapped(check.answer)]
        if left_out:
            lines += ["", "Left out:"]
        for check in left_out:
            lines += _wrapped(f"{check.name}: {check.left_out}")
        if asked:
            lines += ["", *textwrap.wrap(_SCALE, WIDTH)]
        return "\n".join(lines)


_SCALE = (
    "Numbers are mean Spearman rank correlations over queries (of coverage, a share). good: from "
    f"{GOOD}; fair: from {FAIR}, trust the ends of the list rather than single places; poor: below. None of them "
    "says how well scores predict retraining; for that, train again (evaluation.retrain_subsets)."
)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")


def _plain(value: Any) -> Any:
    """Mappings, lists, numbers and strings only; NaN and infinities are None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
