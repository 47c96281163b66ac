"""What the user asks of a capture, checked once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_influence.fisher import FisherKind, LabelSource
from lightning_influence.layer_plan import CodecName
from lightning_influence.row_choice import DEFAULT_BYTES, UNLIMITED
from lightning_influence.step import LossKind

Epochs = Literal["last", "every"] | int | list[int]
Rows = Literal["online", "final"]
TrajectoryMode = Literal["merge", "segments"]
IndexFn = Callable[[Any], "Sequence[int] | Tensor"]


@dataclass(frozen=True)
class CaptureOptions:
    """The arguments of `InfluenceCallback`, which documents them.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if an argument has another value than it may have.
    """

    path: Path
    layers: Sequence[str] | None = None
    epochs: Epochs = "last"
    trajectory: TrajectoryMode = "merge"
    rows: Rows = "online"
    codec: CodecName = "auto"
    fisher: FisherKind = "empirical"
    fisher_samples: int = 1
    loss: LossKind = "auto"
    bytes_per_example: int | None = None
    error_budget: float | None = None
    covariance_positions: int | None = 32
    index_fn: IndexFn | None = None
    index_key: str | int | None = None
    num_examples: int | None = None
    background: bool = True

    def __post_init__(self) -> None:
        check_choice("codec", self.codec, get_args(CodecName))
        check_choice("fisher", self.fisher, get_args(FisherKind))
        check_choice("loss", self.loss, get_args(LossKind))
        check_choice("rows", self.rows, get_args(Rows))
        check_choice("trajectory", self.trajectory, get_args(TrajectoryMode))
        if isinstance(self.layers, str):
            raise TypeError(f"`layers` must be a list of names or glob patterns, got the string {self.layers!r}.")
        if self.index_fn is not None and not callable(self.index_fn):
            raise TypeError(f"`index_fn` must be a function from a batch to indices, got {self.index_fn!r}.")
        if self.index_fn is not None and self.index_key is not None:
            raise ValueError("`index_fn` and `index_key` both say where a batch's indices are; pass one of them.")
        for name in ("bytes_per_example", "covariance_positions", "num_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive or None, got {value}.")
        if self.fisher_samples < 1:
            raise ValueError(f"`fisher_samples` must be positive, got {self.fisher_samples}.")
        if self.error_budget is not None and not 0 < self.error_budget < 1:
            raise ValueError(
                f"`error_budget` is 1 minus a rank correlation, between 0 and 1, got {self.error_budget}; "
                "0.02 is a common choice."
            )
        if self.error_budget is not None and self.codec not in ("auto", "eigen"):
            raise ValueError(
                f"`error_budget` chooses bytes of eigen-coordinates, of which `codec={self.codec!r}` has none; "
                "pass `codec='auto'` or leave it out."
            )
        _check_epochs(self.epochs)
        if self.rows == "final" and self.epochs != "last":
            raise ValueError(
                f'`rows="final"` captures rows once, after training, and goes with `epochs="last"` only, '
                f"got `epochs={self.epochs!r}`."
            )

        if self.merges and self.codec not in ("auto", "eigen"):
            raise ValueError(
                "Merged rows are sums over epochs, which are stored as eigen-coordinates: `codec` must be "
                f"'auto' or 'eigen', got {self.codec!r}; or pass "
                '`trajectory="segments"`, which keeps epochs apart.'
            )

        self._check_fisher()

    def _check_fisher(self) -> None:
        if self.fisher != "sampled" and self.fisher_samples != 1:
            raise ValueError(
                f'`fisher_samples` counts the labels of `fisher="sampled"`, got {self.fisher_samples} with '
                f"`fisher={self.fisher!r}`."
            )
        if self.fisher == "empirical":
            return
        if self.loss != "auto":
            raise ValueError(
                f"`fisher={self.fisher!r}` draws labels from what the loss function says of the prediction, so "
                f"`loss` must be 'auto', got {self.loss!r}; or pass `fisher=\"empirical\"`."
            )
        if self.merges:
            raise ValueError(
                f"Merged epochs have the training labels' Fisher only, got `fisher={self.fisher!r}`; pass "
                '`trajectory="segments"` or `epochs="last"`, or `fisher="empirical"`.'
            )

    @property
    def label_source(self) -> LabelSource | None:
        """Where labels come from besides the training set."""
        return None if self.fisher == "empirical" else LabelSource(self.fisher, self.fisher_samples)

    @property
    def most_bytes(self) -> int:
        """That rows of the eigen codec may take."""
        if self.bytes_per_example is not None:
            return self.bytes_per_example
        return DEFAULT_BYTES if self.error_budget is None else UNLIMITED

    @property
    def facts(self) -> dict[str, float]:
        """What the file says of the error that was asked for."""
        return {} if self.error_budget is None else {"error_budget": self.error_budget}

    @property
    def merges(self) -> bool:
        """Whether the captured epochs become one row an example."""
        return self.epochs != "last" and self.trajectory == "merge"

    @property
    def keeps_segments(self) -> bool:
        """Whether a captured epoch stays in the file when a later one is added."""
        return self.epochs != "last" and self.trajectory == "segments"


def check_choice(name: str, value: object, choices: Sequence[Hashable]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: naming the argument and the choices.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_epochs(epochs: object) -> None:
    if epochs in ("last", "every"):
        return
    is_number = isinstance(epochs, int) and not isinstance(epochs, bool) and epochs >= 1
    is_list = isinstance(epochs, list) and len(epochs) > 0
    if is_list and all(isinstance(e, int) and not isinstance(e, bool) and e >= 0 for e in epochs):  # type: ignore[attr-defined]
        return
    if not is_number:
        raise ValueError(
            "`epochs` must be 'last', 'every', a number n >= 1 (every n-th) or a list of epochs, counted from 0, "
            f"got {epochs!r}."
        )
