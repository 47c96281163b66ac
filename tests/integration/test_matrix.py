"""The quick rows of `python -m tests.training_matrix`, which prints them all."""

from pathlib import Path

import pytest

from tests.matrix.rows import measure
from tests.matrix.situation import Situation
from tests.matrix.situations import SITUATIONS

QUICK = [situation for situation in SITUATIONS if situation.is_quick]


@pytest.mark.parametrize("situation", QUICK, ids=lambda situation: situation.name)
def test_training_file_rows_gradients_and_factors_are_as_expected(situation: Situation, tmp_path: Path) -> None:
    row = measure(situation, tmp_path)
    assert not row.flaws, row


def test_every_situation_has_a_name_of_its_own() -> None:
    assert len({situation.name for situation in SITUATIONS}) == len(SITUATIONS)
