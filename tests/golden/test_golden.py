"""Files of every schema version open for ever, and answer as they did on the day they were written."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_influence import HeuristicDamping, InfluenceModule
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader
from tests.golden import make_schema_v1, make_schema_v2

FOLDER = Path(__file__).parent
MAKERS = {1: make_schema_v1, 2: make_schema_v2}
every_version = pytest.mark.parametrize(("version", "maker"), MAKERS.items(), ids=["v1", "v2"])


@every_version
@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "identity"])
def test_a_file_answers_as_it_did(version: int, maker: ModuleType, curvature: str) -> None:
    store = StoreReader(FOLDER / f"schema_v{version}.h5")
    store.verify_rows()
    assert store.attributes["schema_version"] == version
    asked = maker.captured(maker.golden_net(), 2, first=40).gradients(2).gradients
    found = InfluenceQuery(store).scores(asked, damping=HeuristicDamping(), curvature=curvature)
    expected = torch.tensor(json.loads((FOLDER / f"schema_v{version}.json").read_text())[curvature])
    rounding = 1e-5 * expected[:, :18].abs().max().item()  # machines sum products in different orders
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=rounding, equal_nan=True)


@every_version
def test_a_file_belongs_to_its_weights(version: int, maker: ModuleType) -> None:
    influence = InfluenceModule.attach(maker.golden_net(), FOLDER / f"schema_v{version}.h5")
    measured = influence.scores(maker.golden_batch(2), measurement=lambda net, batch: net(batch[0])[:, 0])
    assert measured.shape == (2, 20)
    assert measured.isnan().sum() == 4  # two examples without a row
