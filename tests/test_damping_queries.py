"""Queries with rules over all layers equal dense inverses; advice comes from the file alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_influence.curvature import (
    EKFAC,
    AnyDamping,
    GlobalDamping,
    HeuristicDamping,
    TrainingDamping,
    WeightDecayDamping,
)
from lightning_influence.damping_advice import FACTORS
from lightning_influence.query import DEFAULT_DAMPING, InfluenceQuery
from tests.plain_loop import query_gradients, record
from tests.reference.activations import collect_activations
from tests.reference.curvature import (
    Curvature,
    absolute_damping,
    ekfac_curvature,
    global_damping,
    heuristic_damping,
    kfac_curvature,
)
from tests.reference.gradients import per_example_gradients
from tests.reference.models import classification_examples, classification_loss, seeded_classifier
from tests.reference.scores import loss_influence_scores, self_influence

N, LAYERS = 12, ["first", "last"]
MAKERS: dict[str, Callable[..., Curvature]] = {"ekfac": ekfac_curvature, "kfac": kfac_curvature}
MODEL, EXAMPLES = seeded_classifier(), classification_examples(N)
QUERIES = classification_examples(3, seed=9)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    return record(tmp_path_factory.mktemp("damping") / "run.h5", MODEL, EXAMPLES)


def dense_matrices(make: Callable[..., Curvature], damping: dict[str, Callable]) -> dict[str, torch.Tensor]:
    activations = collect_activations(MODEL, EXAMPLES, classification_loss, LAYERS)
    return {name: make(damping[name])(activations[name]) for name in LAYERS}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = float(expected.abs().max())  # float32 rows and factors
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * largest)


def dense_gradients(examples: list) -> dict[str, torch.Tensor]:
    return per_example_gradients(MODEL, examples, classification_loss, LAYERS)


@pytest.mark.parametrize("curvature", MAKERS)
def test_global_damping_equals_the_dense_inverse_of_all_layers(recorded: InfluenceQuery, curvature: str) -> None:
    make = MAKERS[curvature]
    undamped = dense_matrices(make, dict.fromkeys(LAYERS, absolute_damping(0.0)))
    matrices = dense_matrices(make, dict.fromkeys(LAYERS, global_damping(0.3, undamped.values())))
    expected = loss_influence_scores(dense_gradients(QUERIES), dense_gradients(EXAMPLES), matrices)
    asked = query_gradients(MODEL, QUERIES)
    close(recorded.scores(asked, damping=GlobalDamping(0.3), curvature=curvature), expected)
    own = recorded.self_influence(damping=GlobalDamping(0.3), curvature=curvature)
    close(own, self_influence(dense_gradients(EXAMPLES), matrices))


def test_a_mapping_equals_the_dense_inverses_of_each_layer(recorded: InfluenceQuery) -> None:
    matrices = dense_matrices(ekfac_curvature, {"first": absolute_damping(0.02), "last": heuristic_damping(2.0)})
    expected = loss_influence_scores(dense_gradients(QUERIES), dense_gradients(EXAMPLES), matrices)
    damping: AnyDamping = {"first": 0.02, "l*": HeuristicDamping(2.0)}
    close(recorded.scores(query_gradients(MODEL, QUERIES), damping=damping), expected)


def test_a_global_rule_sees_the_eigenvalues_of_an_own_curvature(recorded: InfluenceQuery) -> None:
    class Doubled(EKFAC):
        def inverse_eigenvalues(self, basis, Lambda, damping):  # type: ignore[no-untyped-def]
            return super().inverse_eigenvalues(basis, 2 * Lambda, damping)

    asked, damping = query_gradients(MODEL, QUERIES), GlobalDamping(0.5)
    doubled = recorded.scores(asked, damping=damping, curvature=Doubled())
    torch.testing.assert_close(2 * doubled, recorded.scores(asked, damping=damping))


def test_a_damping_without_effect_has_none_through_a_global_rule(recorded: InfluenceQuery) -> None:
    asked = query_gradients(MODEL, QUERIES)
    found = recorded.scores(asked, damping=GlobalDamping(0.5), curvature="identity")
    assert torch.equal(found, recorded.scores(asked, curvature="identity"))


@pytest.mark.parametrize("damping", [WeightDecayDamping(), TrainingDamping()])
def test_a_file_that_does_not_say_how_it_was_trained_is_named(
    recorded: InfluenceQuery, damping: AnyDamping
) -> None:
    with pytest.raises(ValueError, match=r"run\.h5 does not say how its layers were trained; capture in training"):
        recorded.scores(query_gradients(MODEL, QUERIES), damping=damping)


def test_without_facts_of_training_the_advice_is_the_default(recorded: InfluenceQuery) -> None:
    advice = recorded.recommend_damping()
    assert advice.damping == DEFAULT_DAMPING
    assert "run.h5 does not say how its layers were trained" in advice.reason


def test_sensitivity_is_the_rank_correlation_of_scores_between_rows(recorded: InfluenceQuery) -> None:
    advice = recorded.recommend_damping()
    gradients = dense_gradients(EXAMPLES)
    others = ~torch.eye(N, dtype=torch.bool)

    def ranks(damping: Callable) -> torch.Tensor:
        matrices = dense_matrices(ekfac_curvature, dict.fromkeys(LAYERS, damping))
        scores = loss_influence_scores(gradients, gradients, matrices)[others].view(N, N - 1)
        return scores.argsort(1).argsort(1).double()

    for factor in FACTORS:
        pairs = zip(
            ranks(heuristic_damping(factor)), ranks(heuristic_damping(DEFAULT_DAMPING.factor)), strict=True
        )
        expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean().item()
        assert advice.sensitivity[factor] == pytest.approx(expected, abs=0.01)  # float32 may swap neighbors


def test_advice_prints_its_reason_and_table(recorded: InfluenceQuery) -> None:
    printed = str(recorded.recommend_damping())
    assert printed.startswith("HeuristicDamping(factor=")
    assert "Spearman" in printed


def test_sensitivity_of_too_few_rows_is_not_a_number(tmp_path: Path) -> None:
    few = record(tmp_path / "run.h5", MODEL, EXAMPLES[:2])
    assert all(math.isnan(value) for value in few.recommend_damping().sensitivity.values())
