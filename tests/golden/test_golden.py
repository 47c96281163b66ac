"""Files of every schema version open for ever, and answer as they did on the day they were written."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_influence import HeuristicDamping, InfluenceModule
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader
from tests.golden import make_schema_v1, make_schema_v2, make_schema_v3, make_schema_v4, make_schema_v5

FOLDER = Path(__file__).parent
MAKERS = {1: make_schema_v1, 2: make_schema_v2, 3: make_schema_v3, 4: make_schema_v4, 5: make_schema_v5}
every_version = pytest.mark.parametrize(("version", "maker"), MAKERS.items(), ids=["v1", "v2", "v3", "v4", "v5"])


@every_version
@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "identity"])
def test_a_file_answers_as_it_did(version: int, maker: ModuleType, curvature: str) -> None:
    store = StoreReader(FOLDER / f"schema_v{version}.h5")
    store.verify_rows()
    assert store.attributes["schema_version"] == version
    asked = maker.captured(maker.golden_net(), 2, first=40).gradients(2).gradients
    found = InfluenceQuery(store).scores(asked, damping=HeuristicDamping(0.1), curvature=curvature)
    check_scores(found, json.loads((FOLDER / f"schema_v{version}.json").read_text())[curvature])


def check_scores(found: torch.Tensor, answers: list[list[float]]) -> None:
    expected = torch.tensor(answers)
    rounding = 1e-5 * expected[:, :18].abs().max().item()  # machines sum products in different orders
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("curvature", make_schema_v3.CURVATURES)
def test_an_earlier_segment_answers_as_it_did(curvature: str) -> None:
    store = StoreReader(FOLDER / "schema_v3.h5")
    assert store.segments == (make_schema_v3.EARLIER, make_schema_v3.LATEST)
    earlier = store.segment(make_schema_v3.EARLIER)
    assert (earlier.layers, store.layers) == (("head",), ("head", "tokens"))
    net = make_schema_v3.golden_net(make_schema_v3.EARLIER)
    asked = make_schema_v3.captured(net, 2, first=40).gradients(2).gradients
    found = InfluenceQuery(earlier).scores(asked, damping=HeuristicDamping(0.1), curvature=curvature)
    check_scores(found, json.loads((FOLDER / "schema_v3.json").read_text())["earlier"][curvature])


def test_the_example_drawn_twice_occurs_twice() -> None:
    store = StoreReader(FOLDER / "schema_v3.h5")
    for number in store.segments:
        assert store.segment(number).column("occurrences").tolist() == [2, *[1] * 17, 0, 0]


@every_version
def test_a_file_belongs_to_its_weights(version: int, maker: ModuleType) -> None:
    influence = InfluenceModule.attach(maker.golden_net(), FOLDER / f"schema_v{version}.h5")
    measured = influence.scores(maker.golden_batch(2), measurement=lambda net, batch: net(batch[0])[:, 0])
    assert measured.shape == (2, 20)
    assert measured.isnan().sum() == 4  # two examples without a row
