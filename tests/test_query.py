"""Answers from a file equal the slow twins' from model and data, and the same question has one answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_influence.curvature import AbsoluteDamping, HeuristicDamping
from lightning_influence.errors import CorruptStoreError, QueryError
from lightning_influence.layers import track_layers
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader
from tests.plain_loop import query_gradients, record, train_epoch
from tests.reference.activations import collect_activations
from tests.reference.curvature import (
    absolute_damping,
    diagonal_curvature,
    ekfac_curvature,
    empirical_fisher_curvature,
    heuristic_damping,
    identity_curvature,
    kfac_curvature,
)
from tests.reference.gradients import linear_layer_names, per_example_gradients
from tests.reference.models import (
    classification_examples,
    classification_loss,
    seeded_classifier,
    seeded_token_model,
    token_examples,
    token_loss,
)
from tests.reference.scores import reference_scores, self_influence

N = 12
SHUFFLED = [7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 4, 6]
CURVATURES = {
    "ekfac": ekfac_curvature(heuristic_damping(1.0)),
    "kfac": kfac_curvature(heuristic_damping(1.0)),
    "diagonal": diagonal_curvature(heuristic_damping(1.0)),
    "empirical_fisher": empirical_fisher_curvature(heuristic_damping(1.0)),
    "identity": identity_curvature,
}
MODELS = {
    "vectors": (
        seeded_classifier,
        classification_examples,
        classification_loss,
    ),
    "sequences": (seeded_token_model, lambda n, *, seed=0: token_examples([6] * n, seed=seed), token_loss),
}
# Share of the largest score. Worst of four seeds: 8e-7 for float32, and for the others, whose rows are off
# by half a step of their group, .0003 (float16), .008 (int8) and .006 (eigen).
TOLERANCES = {"pairs-float32": 5e-6, "pairs-float16": 1e-3, "pairs": 0.02, "eigen": 0.02}


def close(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=share * largest)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    """A file of twelve vectors."""
    path = tmp_path_factory.mktemp("query") / "run.h5"
    return record(path, seeded_classifier(), classification_examples(N), order=SHUFFLED)


@pytest.fixture(scope="module")
def asked() -> dict:
    return query_gradients(seeded_classifier(), classification_examples(3, seed=9))


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("codec", TOLERANCES)
@pytest.mark.parametrize("kind", MODELS)
def test_scores_equal_the_reference(tmp_path: Path, kind: str, codec: str, curvature: str) -> None:
    make, data, loss = MODELS[kind]
    model, examples, queries = make(), data(N), data(3, seed=9)
    query = record(tmp_path / "run.h5", model, examples, codec=codec, order=SHUFFLED, bytes_per_example=10**6)
    found = query.scores(query_gradients(model, queries), curvature=curvature)
    names = linear_layer_names(model)
    expected = reference_scores(model, examples, queries, loss, names, curvature=CURVATURES[curvature])
    assert found.shape == (3, N)
    close(found, expected, TOLERANCES[codec])


@pytest.mark.parametrize("value", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_each_damping_is_answered_from_the_same_file(
    recorded: InfluenceQuery, asked: dict, curvature: str, value: float
) -> None:
    reference = {"ekfac": ekfac_curvature, "kfac": kfac_curvature}[curvature](absolute_damping(value))
    expected = reference_scores(
        seeded_classifier(),
        classification_examples(N),
        classification_examples(3, seed=9),
        classification_loss,
        ["first", "last"],
        curvature=reference,
    )
    # 1e-4 is .03 of the mean eigenvalue: float32 eigenvalues, divided by little
    close(recorded.scores(asked, damping=value, curvature=curvature), expected, share=1e-3)


def test_scores_by_layer_add_up_to_the_scores(recorded: InfluenceQuery, asked: dict) -> None:
    by_layer = recorded.scores_by_layer(asked, curvature="kfac")
    assert list(by_layer) == ["first", "last"]
    assert not torch.equal(by_layer["first"], by_layer["last"])
    torch.testing.assert_close(sum(by_layer.values()), recorded.scores(asked, curvature="kfac"))


def test_a_layer_of_the_scores_is_that_layers_reference(recorded: InfluenceQuery, asked: dict) -> None:
    data, queries = classification_examples(N), classification_examples(3, seed=9)
    for name, found in recorded.scores_by_layer(asked).items():
        curvature = ekfac_curvature(heuristic_damping(1.0))
        expected = reference_scores(
            seeded_classifier(), data, queries, classification_loss, [name], curvature=curvature
        )
        close(found, expected, 5e-6)


def test_the_same_query_twice_gives_the_same_bits(recorded: InfluenceQuery, asked: dict) -> None:
    first = recorded.scores(asked)
    recorded.scores(asked, damping=1e-3)
    recorded.scores(asked, damping=HeuristicDamping(5.0), curvature="kfac")
    recorded.self_influence(damping=7.0)
    assert torch.equal(recorded.scores(asked), first)
    assert torch.equal(InfluenceQuery(StoreReader(recorded.store.path)).scores(asked), first)


def test_queries_do_not_depend_on_the_others_in_the_batch(recorded: InfluenceQuery, asked: dict) -> None:
    together = recorded.scores(asked)
    apart = [recorded.scores({name: g[q : q + 1] for name, g in asked.items()}) for q in range(3)]
    close(torch.cat(apart), together, share=1e-5)  # matrix products of another size


def test_chunk_size_does_not_matter(
    recorded: InfluenceQuery, asked: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recorded.scores(asked), recorded.self_influence()
    monkeypatch.setattr("lightning_influence.query.asked.rows_at_once", lambda codecs, queries, budget: 5)
    close(recorded.scores(asked), whole[0], share=1e-5)
    close(recorded.self_influence(), whole[1], share=1e-5)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_self_influence_equals_the_reference(recorded: InfluenceQuery, curvature: str) -> None:
    model, examples, layers = seeded_classifier(), classification_examples(N), ["first", "last"]
    activations = collect_activations(model, examples, classification_loss, layers)
    expected = self_influence(
        per_example_gradients(model, examples, classification_loss, layers),
        {name: CURVATURES[curvature](activations[name]) for name in layers},
    )
    close(recorded.self_influence(curvature=curvature), expected, share=1e-4)


def test_self_influence_is_the_score_of_an_example_for_itself(recorded: InfluenceQuery) -> None:
    own = query_gradients(seeded_classifier(), classification_examples(N))
    close(recorded.self_influence(), recorded.scores(own).diagonal(), share=1e-5)


def test_a_copy_of_the_query_has_the_largest_normalised_score(recorded: InfluenceQuery) -> None:
    own = query_gradients(seeded_classifier(), classification_examples(N))
    # Cauchy-Schwarz: score_qm <= sqrt(score_qq score_mm), equal at m = q
    cosines = recorded.scores(own) / recorded.self_influence().sqrt()
    assert torch.equal(cosines.argmax(dim=1), torch.arange(N))


def test_huge_damping_gives_the_order_of_plain_dot_products(recorded: InfluenceQuery, asked: dict) -> None:
    plain = recorded.scores(asked, curvature="identity")
    damped = recorded.scores(asked, damping=1e8)
    assert torch.equal(damped.argsort(dim=1), plain.argsort(dim=1))


def test_top_k_are_the_largest_scores(recorded: InfluenceQuery, asked: dict) -> None:
    scores = recorded.scores(asked)
    top = recorded.top_k(asked, 4)
    assert torch.equal(top.scores, scores.sort(dim=1, descending=True).values[:, :4])
    assert torch.equal(scores.gather(1, top.indices), top.scores)
    bottom = recorded.top_k(asked, 4, largest=False)
    assert torch.equal(bottom.scores, scores.sort(dim=1).values[:, :4])


@pytest.mark.parametrize("k", [0, -1, N + 1, 2.0, True, "3"])
def test_a_k_that_the_file_cannot_give_is_refused(recorded: InfluenceQuery, asked: dict, k: Any) -> None:
    with pytest.raises(ValueError, match=f"`k` must be an integer from 1 to {N}, the number of valid rows"):
        recorded.top_k(asked, k)


@pytest.fixture(scope="module")
def gappy(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    """Example 4 has an infinite gradient; 10 and 11 were not seen."""
    examples = classification_examples(N)
    examples[4] = (torch.full((5,), torch.inf), examples[4][1])
    path = tmp_path_factory.mktemp("gappy") / "run.h5"
    return record(path, seeded_classifier(), examples, order=range(10))


def test_missing_and_invalid_rows_have_nan_scores(gappy: InfluenceQuery, asked: dict) -> None:
    scores, own = gappy.scores(asked), gappy.self_influence()
    without = torch.zeros(N, dtype=torch.bool)
    without[[4, 10, 11]] = True
    assert torch.equal(scores.isnan(), without.expand(3, -1))
    assert torch.equal(own.isnan(), without)


@pytest.mark.parametrize("largest", [True, False])
def test_missing_and_invalid_rows_are_never_among_the_best(
    gappy: InfluenceQuery, asked: dict, largest: bool
) -> None:
    top = gappy.top_k(asked, 9, largest=largest)
    assert not set(top.indices.flatten().tolist()) & {4, 10, 11}
    assert bool(top.scores.isfinite().all())
    with pytest.raises(ValueError, match="from 1 to 9, the number of valid rows, got 10"):
        gappy.top_k(asked, 10)


def test_removal_effect_is_minus_the_mean_score_share(recorded: InfluenceQuery, asked: dict) -> None:
    scores = recorded.scores(asked)
    expected = -(scores[:, 3] + scores[:, 8]) / N
    for indices in ([3, 8], np.array([3, 8]), torch.tensor([3, 8])):
        torch.testing.assert_close(recorded.removal_effect(asked, indices), expected)


def test_removal_effect_counts_the_examples_that_were_trained_on(gappy: InfluenceQuery, asked: dict) -> None:
    scores = gappy.scores(asked)
    torch.testing.assert_close(gappy.removal_effect(asked, [3]), -scores[:, 3] / 10)


def test_removing_an_example_seen_twice_removes_both(tmp_path: Path, asked: dict) -> None:
    examples = classification_examples(N)
    twice = record(tmp_path / "twice.h5", seeded_classifier(), examples, order=[*SHUFFLED, 3])
    # The same epoch by definition: a dataset that holds the example twice.
    both = record(tmp_path / "both.h5", seeded_classifier(), [*examples, examples[3]], order=[*SHUFFLED, N])
    for indices, copies in (([3], [3, N]), ([3, 8], [3, N, 8]), ([8], [8])):
        found = twice.removal_effect(asked, indices, curvature="kfac")
        expected = both.removal_effect(asked, copies, curvature="kfac")
        torch.testing.assert_close(found, expected)


def test_removing_nothing_changes_nothing(recorded: InfluenceQuery, asked: dict) -> None:
    assert not recorded.removal_effect(asked, []).any()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3, 3], "names an example twice"),
        ([3, N], rf"must lie in 0\.\.{N - 1}, .* got 3\.\.{N}"),
        ([-1], rf"must lie in 0\.\.{N - 1}"),
        ([3, 4], r"1 of `indices` have no valid row .* \(the first is 4\)"),
        ([10, 11], r"2 of `indices` have no valid row"),
    ],
)
def test_impossible_removals_are_refused(
    gappy: InfluenceQuery, asked: dict, indices: list[int], message: str
) -> None:
    with pytest.raises(QueryError, match=message):
        gappy.removal_effect(asked, indices)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"damping": 0.0}, ValueError),
        ({"damping": -0.1}, ValueError),
        ({"damping": "0.1"}, TypeError),
        ({"curvature": "hessian"}, ValueError),
    ],
)
def test_impossible_questions_are_refused(
    recorded: InfluenceQuery, asked: dict, options: dict, error: type[Exception]
) -> None:
    with pytest.raises(error, match="must be"):
        recorded.scores(asked, **options)


def test_a_number_and_its_rule_give_the_same_bits(recorded: InfluenceQuery, asked: dict) -> None:
    by_rule = recorded.scores(asked, damping=AbsoluteDamping(0.02))
    assert torch.equal(recorded.scores(asked, damping=0.02), by_rule)


Change = Callable[[list, dict, dict], None]  # of the layers' document, the factors, other documents


def tampered(path: Path, codec: str, change: Change) -> Path:
    """A finished file with right checksums whose layers or factors are not as we write them."""
    model, examples = seeded_token_model(), token_examples([6] * N)
    recorder = train_epoch(path, model, examples, codec=codec)
    layers = recorder.factors()
    described = [
        {
            "name": name,
            "has_bias": recorder.plans[name].has_bias,
            "codec": layer.codec.codec_id,
            "config": layer.codec.get_config(),
        }
        for name, layer in layers.items()
    ]
    factors = {name: layer.to_arrays() for name, layer in layers.items()}
    documents = {"layers": described, "coverage": track_layers(model)[1].to_builtins()}
    change(described, factors, documents)
    recorder.writer.finish(attributes={}, documents=documents, factors=factors)
    return path


def test_an_unchanged_file_opens(tmp_path: Path) -> None:
    for codec in ("pairs", "eigen"):
        path = tampered(tmp_path / f"{codec}.h5", codec, lambda described, factors, documents: None)
        InfluenceQuery(StoreReader(path))


def put(target: Any, *keys: Any, value: Any) -> None:
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value


DOCUMENTS: dict[str, Change] = {
    "no-list": lambda d, f, docs: put(docs, "layers", value={"down": 1}),
    "names-only": lambda d, f, docs: put(docs, "layers", value=["down", "mix", "head"]),
    "null": lambda d, f, docs: put(docs, "layers", value=None),
    "missing": lambda d, f, docs: docs.pop("layers") and None,
    "fewer": lambda d, f, docs: d.pop() and None,
    "twice": lambda d, f, docs: d.append(copy.deepcopy(d[0])),
    "nameless": lambda d, f, docs: d[0].pop("name") and None,
    "other-name": lambda d, f, docs: put(d, 0, "name", value="encoder"),
    "numbered": lambda d, f, docs: put(d, 0, "name", value=3),
    "no-codec": lambda d, f, docs: d[0].pop("codec") and None,
    "unknown-codec": lambda d, f, docs: put(d, 0, "codec", value="zip"),
    "list-codec": lambda d, f, docs: put(d, 0, "codec", value=["pairs"]),
    "no-config": lambda d, f, docs: d[0].pop("config") and None,
    "null-config": lambda d, f, docs: put(d, 0, "config", value=None),
    "other-positions": lambda d, f, docs: put(d, 0, "config", "positions", value=5),
    "huge-positions": lambda d, f, docs: put(d, 0, "config", "positions", value=10**12),
    "negative-positions": lambda d, f, docs: put(d, 0, "config", "positions", value=-6),
    "text-positions": lambda d, f, docs: put(d, 0, "config", "positions", value="many"),
    "other-dtype": lambda d, f, docs: put(d, 0, "config", "dtype", value="float16"),
    "unknown-dtype": lambda d, f, docs: put(d, 0, "config", "dtype", value="int4"),
    "other-structure": lambda d, f, docs: put(d, 0, "structure", value={"groups": 2}),
    "diagonal-structure": lambda d, f, docs: put(d, 0, "structure", value={"full_A": False}),
    "unknown-structure": lambda d, f, docs: put(d, 0, "structure", value={"sides": 2}),
    "null-structure": lambda d, f, docs: put(d, 0, "structure", value=None),
    "zero-groups": lambda d, f, docs: put(d, 0, "structure", value={"groups": 0}),
    "list-dtype": lambda d, f, docs: put(d, 0, "config", "dtype", value=["int8"]),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    path = tampered(tmp_path / "run.h5", "pairs", DOCUMENTS[case])
    with pytest.raises(CorruptStoreError, match=r"run\.h5"):
        InfluenceQuery(StoreReader(path))


def reshaped(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(described: list, factors: dict, documents: dict) -> None:
        factors["mix"][name] = np.ascontiguousarray(change(factors["mix"][name]))

    return apply


FACTORS: dict[str, Change] = {
    "no-basis": lambda d, f, docs: f["mix"].pop("Q_A") is None and None,
    "no-Lambda": lambda d, f, docs: f["mix"].pop("Lambda") is None and None,
    "no-coordinates": lambda d, f, docs: f["mix"].pop("coordinates") is None and None,
    "smaller-basis": reshaped("Q_A", lambda a: a[:-1, :-1]),
    "oblong-basis": reshaped("Q_S", lambda a: a[:, :-1]),
    "flat-Lambda": reshaped("Lambda", lambda a: a.reshape(-1)),
    "smaller-Lambda": reshaped("Lambda", lambda a: a[:-1]),
    "fewer-eigenvalues": reshaped("eigenvalues_A", lambda a: a[:-1]),
    "fewer-coordinates": reshaped("coordinates", lambda a: a[:-1]),
    "fewer-weights": reshaped("whitening", lambda a: a[:-1]),
    "coordinate-outside": reshaped("coordinates", lambda a: a + 16),
    "negative-coordinate": reshaped("coordinates", lambda a: a - 16),
    "real-coordinates": reshaped("coordinates", lambda a: a.astype(np.float32)),
    "integer-Lambda": reshaped("Lambda", lambda a: a.astype(np.int64)),
    "double-basis": reshaped("Q_A", lambda a: a.astype(np.float64)),
    "double-whitening": reshaped("whitening", lambda a: a.astype(np.float64)),
}


@pytest.mark.parametrize("case", FACTORS)
def test_factors_that_do_not_fit_are_refused_by_layer(tmp_path: Path, case: str) -> None:
    path = tampered(tmp_path / "run.h5", "eigen", FACTORS[case])
    with pytest.raises(CorruptStoreError, match=r"run\.h5.*layer 'mix'"):
        InfluenceQuery(StoreReader(path))
