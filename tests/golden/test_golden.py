"""Files of every schema version open for ever, and answer as they did on the day they were written."""

import json
from pathlib import Path

import pytest
import torch

from lightning_influence import HeuristicDamping, InfluenceModule
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader
from tests.golden.make_schema_v1 import captured, golden_batch, golden_net

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "identity"])
def test_a_file_of_schema_1_answers_as_it_did(curvature: str) -> None:
    store = StoreReader(FOLDER / "schema_v1.h5")
    store.verify_rows()
    asked = captured(golden_net(), 2, first=40).gradients(2).gradients
    found = InfluenceQuery(store).scores(asked, damping=HeuristicDamping(), curvature=curvature)
    expected = torch.tensor(json.loads((FOLDER / "schema_v1.json").read_text())[curvature])
    rounding = 1e-5 * expected[:, :18].abs().max().item()  # machines sum products in different orders
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=rounding, equal_nan=True)


def test_a_file_of_schema_1_belongs_to_its_weights() -> None:
    influence = InfluenceModule.attach(golden_net(), FOLDER / "schema_v1.h5")
    measured = influence.scores(golden_batch(2), measurement=lambda net, batch: net(batch[0])[:, 0])
    assert measured.shape == (2, 20)
    assert measured.isnan().sum() == 4  # two examples without a row
