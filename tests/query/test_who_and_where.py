"""Questions about some examples, layers, positions and groups are parts and sums of the whole answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_influence.curvature import GlobalDamping, HeuristicDamping
from lightning_influence.errors import QueryError
from lightning_influence.gradients import DenseGradient
from lightning_influence.query import InfluenceQuery
from lightning_influence.query.segment import OpenSegment
from tests.plain_loop import decoded_rows, query_gradients, record
from tests.reference.models import classification_examples, seeded_classifier
from tests.reference.scores import loss_influence_scores
from tests.test_curvature_matrix import CURVATURES, FILES, asked, close, dense_matrix

N = 20
GAPS = [4, 18, 19]
TOKENWISE = ["down", "head"]  # the layers that see each of three positions once
SUBSETS: dict[str, tuple[Any, list[int]]] = {
    "list": ([9, 2, 17, 3], [9, 2, 17, 3]),
    "tuple": ((5,), [5]),
    "range": (range(3, 9), [*range(3, 9)]),
    "array": (np.array([11, 1], np.int32), [11, 1]),
    "tensor": (torch.tensor([0, 19, 7]), [0, 19, 7]),
    "mask": (np.arange(N) % 7 == 0, [0, 7, 14]),
    "tensor-mask": (torch.arange(N) > 16, [17, 18, 19]),
    "list-mask": ([True] * 2 + [False] * (N - 2), [0, 1]),
    "none": ([], []),
}


@pytest.fixture(scope="module", params=["pairs-float32", "eigen-8-bits-some", "dense-float32"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    return FILES[request.param](tmp_path_factory.mktemp("file") / "rows.h5")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    return FILES["pairs-float32"](tmp_path_factory.mktemp("vectors") / "rows.h5")


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    return FILES["pairs-float16-of-sequences"](tmp_path_factory.mktemp("sequences") / "rows.h5")


@pytest.fixture(scope="module")
def gappy(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    """Example 4 has an infinite gradient; 18 and 19 were not seen."""
    examples = classification_examples(N)
    examples[4] = (torch.full((5,), torch.inf), examples[4][1])
    path = tmp_path_factory.mktemp("gappy") / "run.h5"
    return record(path, seeded_classifier(), examples, order=[*range(18), 3])


# --- subsets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ekfac", "empirical_fisher"])
@pytest.mark.parametrize("case", SUBSETS)
def test_a_subset_has_its_part_of_the_answers_in_its_order(
    file: InfluenceQuery, case: str, curvature: str
) -> None:
    subset, indices = SUBSETS[case]
    queries, options = asked(file), {"curvature": curvature}
    scores, own = file.scores(queries, **options), file.self_influence(**options)
    found = file.scores(queries, subset=subset, **options)
    assert found.shape == (3, len(indices))
    torch.testing.assert_close(found, scores[:, indices], rtol=1e-5, atol=1e-5 * float(scores.abs().max()))
    found = file.self_influence(subset=subset, **options)
    torch.testing.assert_close(found, own[indices], rtol=1e-5, atol=1e-5 * float(own.max()))


def test_no_queries_have_no_answers(vectors: InfluenceQuery) -> None:
    none = {name: gradient[:0] for name, gradient in asked(vectors).items()}
    assert vectors.scores(none).shape == (0, N)
    top = vectors.top_k(none, 4)
    assert top.indices.shape == top.scores.shape == (0, 4)
    assert top.indices.dtype == torch.int64
    assert vectors.group_scores(none, np.arange(N) % 3).scores.shape == (0, 3)
    assert vectors.removal_effect(none, [1]).shape == (0,)


def test_queries_that_layers_have_not_alike_are_refused(vectors: InfluenceQuery) -> None:
    queries = asked(vectors)
    for others in ({"first": queries["first"]}, {**queries, "last": queries["last"][:1]}, {}):
        for ask in (vectors.scores, vectors.top_k, lambda q: vectors.removal_effect(q, [1])):
            with pytest.raises(QueryError, match="gradients of as many queries for each layer"):
                ask(others)
    only = vectors.scores({"first": queries["first"]}, layers="first")
    torch.testing.assert_close(only, vectors.scores(queries, layers="first"))


@pytest.mark.parametrize("largest", [True, False])
def test_the_best_of_a_subset_are_named_by_their_dataset_indices(file: InfluenceQuery, largest: bool) -> None:
    queries, subset = asked(file), [13, 2, 8, 19, 5]
    scores = file.scores(queries)[:, subset]
    order = scores.argsort(dim=1, descending=largest)[:, :3]
    top = file.top_k(queries, 3, largest=largest, subset=subset)
    assert torch.equal(top.indices, torch.tensor(subset)[order])
    close(top.scores, scores.gather(1, order).double(), 1e-5)


def test_k_is_at_most_the_valid_rows_of_the_subset(gappy: InfluenceQuery) -> None:
    with pytest.raises(ValueError, match="from 1 to 2, the number of valid rows, got 3"):
        gappy.top_k(asked(gappy), 3, subset=[3, 4, 5, 19])
    assert sorted(gappy.top_k(asked(gappy), 2, subset=[3, 4, 5, 19]).indices[0].tolist()) == [3, 5]


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ([1, 1], "`subset` names an example twice"),
        ([0, N], rf"`subset` must lie in 0\.\.{N - 1}, .* got 0\.\.{N}"),
        ([-1], rf"`subset` must lie in 0\.\.{N - 1}"),
        ([0.5], "`subset` must be integers, dataset indices, or a mask of bools, got float64"),
        (["a"], "`subset` must be integers"),
        ([True, False], rf"`subset` is a mask of shape \(2,\), but .* has {N} examples"),
    ],
)
def test_impossible_subsets_are_refused(vectors: InfluenceQuery, subset: Any, message: str) -> None:
    for ask in (vectors.self_influence, lambda **options: vectors.top_k(asked(vectors), 1, **options)):
        with pytest.raises(QueryError, match=message):
            ask(subset=subset)


def test_a_removal_may_be_named_by_a_mask(vectors: InfluenceQuery) -> None:
    mask = np.arange(N) % 6 == 1
    expected = vectors.removal_effect(asked(vectors), np.flatnonzero(mask))
    assert torch.equal(vectors.removal_effect(asked(vectors), mask), expected)


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["kfac", "empirical_fisher"])
@pytest.mark.parametrize("damping", [HeuristicDamping(0.5), GlobalDamping(0.5)])
@pytest.mark.parametrize(
    ("layers", "names"),
    [("first", ["first"]), (["l*"], ["last"]), (["last", "first"], ["first", "last"]), ("*", ["first", "last"])],
)
def test_chosen_layers_have_what_they_add_to_the_scores(
    file: InfluenceQuery, layers: Any, names: list[str], damping: Any, curvature: str
) -> None:
    queries, options = asked(file), {"damping": damping, "curvature": curvature}
    by_layer = file.scores_by_layer(queries, **options)
    expected = sum(by_layer[name] for name in names)
    close(file.scores(queries, layers=layers, **options), expected.double(), 1e-6)
    assert list(file.scores_by_layer(queries, layers=layers, **options)) == names
    whole = file.self_influence(**options)
    parts = file.self_influence(layers="first", **options) + file.self_influence(layers="last", **options)
    close(parts, whole.double(), 1e-6)
    effect = file.removal_effect(queries, [2, 6], layers=layers, **options)
    close(effect, -expected[:, [2, 6]].sum(1).double() / N, 1e-5)


@pytest.mark.parametrize(
    ("layers", "fitting"),
    [(["first", "head"], "'head' fits none"), ("x*", r"'x\*' fits none"), ([], "none is named"), ([3], "3 fits")],
)
def test_layers_that_are_not_there_are_refused_with_those_that_are(
    vectors: InfluenceQuery, layers: Any, fitting: str
) -> None:
    with pytest.raises(QueryError, match=rf"`layers` must be names .*rows\.h5, but {fitting}.*are first, last"):
        vectors.self_influence(layers=layers)


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "identity"])
def test_scores_of_positions_are_those_of_their_outer_products(sequences: InfluenceQuery, curvature: str) -> None:
    queries, rule = asked(sequences), HeuristicDamping(0.1)
    options: dict[str, Any] = {"curvature": curvature, "damping": rule, "layers": TOKENWISE}
    found = sequences.scores(queries, per_token=True, **options)
    assert found.shape == (3, N, 3)
    close(found.sum(2), sequences.scores(queries, **options).double(), 1e-5)
    matrices = {
        name: dense_matrix(curvature, sequences.layers[name], decoded_rows(sequences, name).double(), rule)
        for name in TOKENWISE
    }
    asking = {name: g.dense().double() for name, g in queries.items()}
    for s in range(3):
        rows = {name: outer_products(sequences, name, s) for name in TOKENWISE}
        close(found[..., s], loss_influence_scores(asking, rows, matrices), 5e-5)


def outer_products(file: InfluenceQuery, name: str, s: int) -> Tensor:
    """The product d a^T of one position of each row, float64 [n, o, i], by the file's description."""
    arrays = {key: torch.from_numpy(np.array(a)).double() for key, a in file.store.rows(name).items()}
    inputs, grads = (arrays[key] * arrays[f"{key}_scales"] for key in ("inputs", "output_grads"))
    if file.layers[name].codec.get_config()["has_bias"]:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
    return torch.einsum("no,ni->noi", grads[:, s], inputs[:, s])


def test_positions_of_layers_and_subsets(sequences: InfluenceQuery) -> None:
    queries = asked(sequences)
    whole = sequences.scores(queries, per_token=True, layers=TOKENWISE)
    by_layer = sequences.scores_by_layer(queries, per_token=True)
    close(by_layer["down"] + by_layer["head"], whole.double(), 1e-6)
    assert by_layer["mix"].shape == (3, N, 6)  # is called twice a step
    for name in by_layer:
        some = sequences.scores(queries, per_token=True, subset=[8, 1], layers=name)
        close(some, by_layer[name][:, [8, 1]].double(), 1e-5)


def test_a_layer_on_vectors_has_one_position(vectors: InfluenceQuery) -> None:
    found = vectors.scores(asked(vectors), per_token=True)
    assert found.shape == (3, N, 1)
    close(found[..., 0], vectors.scores(asked(vectors)).double(), 1e-6)


@pytest.mark.parametrize("kind", ["eigen-8-bits", "dense-int8"])
def test_rows_that_are_sums_have_no_positions(tmp_path: Path, kind: str) -> None:
    file = FILES[kind](tmp_path / "rows.h5")
    codec = kind.split("-")[0]
    said = rf'`per_token` needs rows .* \({codec}\).* in .*rows\.h5 are sums.*codec="pairs"'
    with pytest.raises(QueryError, match=said):
        file.scores(asked(file), per_token=True)


def test_positions_cannot_be_had_of_a_curvature_of_whole_rows(sequences: InfluenceQuery) -> None:
    with pytest.raises(QueryError, match="`per_token` cannot be had with a curvature that is made of the rows"):
        sequences.scores(asked(sequences), per_token=True, curvature="empirical_fisher")


def test_layers_of_other_positions_are_not_added_up(sequences: InfluenceQuery) -> None:
    said = r"same number of positions, but those of .* \(down: 3, mix: 6, head: 3\)"
    with pytest.raises(QueryError, match=said):
        sequences.scores(asked(sequences), per_token=True)


# --- groups ---------------------------------------------------------------------------------------

LABELS = np.array(["cat", "dog", "ape", "dog"] * 5)
GROUPS: dict[str, tuple[Any, dict[Any, list[int]]]] = {
    "strings": (LABELS, {n: np.flatnonzero(n == LABELS).tolist() for n in ("ape", "cat", "dog")}),
    "list": (LABELS.tolist(), {n: np.flatnonzero(n == LABELS).tolist() for n in ("ape", "cat", "dog")}),
    "tensor": (torch.arange(N) % 3 - 1, {n: [m for m in range(N) if m % 3 - 1 == n] for n in (-1, 0, 1)}),
    "mapping": (
        {"b": [3, 1], "a": range(5), 7: torch.arange(N) > 15},
        {"b": [3, 1], "a": [*range(5)], 7: [16, 17]},
    ),
    "one": ({"x": [2]}, {"x": [2]}),
}


@pytest.mark.parametrize("curvature", ["ekfac", "empirical_fisher"])
@pytest.mark.parametrize("case", GROUPS)
def test_groups_have_the_sums_of_their_examples(
    gappy: InfluenceQuery, case: str, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, members = GROUPS[case]
    queries = asked(gappy)
    scores = gappy.scores(queries, curvature=curvature)
    kept = {name: [m for m in each if m not in GAPS] for name, each in members.items()}
    for chunk in (1, 7, N):
        monkeypatch.setattr("lightning_influence.query.asked.rows_at_once", lambda *args, chunk=chunk: chunk)
        found = gappy.group_scores(queries, groups, curvature=curvature)
        assert found.groups == list(members)
        assert found.counts.tolist() == [len(each) for each in kept.values()]
        expected = torch.stack([scores[:, each].sum(1) for each in kept.values()], 1)
        torch.testing.assert_close(found.scores, expected, rtol=1e-5, atol=1e-5 * float(scores.nan_to_num().max()))
        effects = [gappy.removal_effect(queries, each, curvature=curvature) for each in kept.values()]
        torch.testing.assert_close(
            found.removal_effects, torch.stack(effects, 1), rtol=1e-4, atol=1e-5 * float(scores.nan_to_num().max())
        )


def test_a_group_without_a_row_has_no_score(gappy: InfluenceQuery) -> None:
    found = gappy.group_scores(asked(gappy), {"gone": [18, 4], "empty": [], "here": [1, 18]})
    assert found.scores.isnan().all(0).tolist() == [True, True, False]
    assert found.removal_effects is not None
    assert found.removal_effects.isnan().all(0).tolist() == [True, True, False]
    assert found.counts.tolist() == [0, 0, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_sums_of_a_query_that_is_not_finite_are_not_finite(gappy: InfluenceQuery, value: float) -> None:
    queries = {name: DenseGradient(gradient.dense().clone()) for name, gradient in asked(gappy).items()}
    for gradient in queries.values():
        gradient.values[1, 0, 0] = value
    found = gappy.group_scores(queries, {"some": [1, 2], "without": GAPS, "both": [4, 5]})
    assert found.removal_effects is not None
    for sums in (found.scores, found.removal_effects):
        assert sums.isfinite().tolist() == [[True, False, True], [False] * 3, [True, False, True]]


def test_groups_of_layers_add_up(vectors: InfluenceQuery) -> None:
    queries, options = asked(vectors), {"curvature": "kfac", "damping": GlobalDamping(0.1)}
    parts = [vectors.group_scores(queries, LABELS, layers=name, **options) for name in ("first", "last")]
    whole = vectors.group_scores(queries, LABELS, **options)
    close(parts[0].scores + parts[1].scores, whole.scores.double(), 1e-6)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 1], rf"one label for each of the {N} examples of .*rows\.h5, .* got shape \(2,\)"),
        (np.zeros((N, 2)), rf"got shape \({N}, 2\)"),
        ({}, "`groups` is empty"),
        ({"a": [N]}, r"`groups\['a'\]` must lie in 0\.\."),
        ({"a": [1, 1]}, r"`groups\['a'\]` names an example twice"),
        ({"a": [True]}, r"`groups\['a'\]` is a mask of shape \(1,\)"),
    ],
)
def test_impossible_groups_are_refused(vectors: InfluenceQuery, groups: Any, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        vectors.group_scores(asked(vectors), groups)


# --- between training examples --------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_scores_between_rows_are_their_inner_products_under_the_dense_inverse(
    file: InfluenceQuery, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = HeuristicDamping(0.1)
    rows = {name: decoded_rows(file, name).double() for name in file.layers}
    matrices = {name: dense_matrix(curvature, file.layers[name], rows[name], rule) for name in rows}
    expected = loss_influence_scores(rows, rows, matrices)
    options: dict[str, Any] = {"curvature": curvature, "damping": rule}
    found = file.scores_between(range(N), **options)
    close(found, expected, 5e-5)
    close(found.T, found.double(), 5e-5)
    close(found.diagonal(), file.self_influence(**options).double(), 5e-5)
    monkeypatch.setattr("lightning_influence.query.asked.queries_at_once", lambda layers, budget: 2)
    some = file.scores_between([4, 11, 2], np.arange(N) % 5 == 0, **options)
    close(some, expected[[4, 11, 2]][:, ::5], 5e-5)


def test_scores_between_rows_are_those_of_the_same_examples_as_queries(vectors: InfluenceQuery) -> None:
    own = query_gradients(seeded_classifier(), classification_examples(N))
    close(vectors.scores_between(range(N)), vectors.scores(own).double(), 1e-5)


def test_rows_that_are_not_there_have_no_scores_between(gappy: InfluenceQuery) -> None:
    missing = gappy.scores_between([4, 3, 18], [19, 3, 7]).isnan()
    assert missing.tolist() == [[True] * 3, [True, False, False], [True] * 3]


def test_rows_that_are_queries_are_made_whole_some_at_a_time(
    file: InfluenceQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decoded = OpenSegment.decoded

    def watched(self: OpenSegment, name: str, indices: np.ndarray) -> DenseGradient:
        sizes.append(len(indices))
        return decoded(self, name, indices)

    monkeypatch.setattr(OpenSegment, "decoded", watched)
    monkeypatch.setattr("lightning_influence.query.prepared.preconditioned_at_once", lambda layer, budget: 3)
    found = file.scores_between(range(N))
    assert sizes == [3, 3, 3, 3, 3, 3, 2] * len(file.layers)
    monkeypatch.undo()
    close(found, file.scores_between(range(N)).double(), 1e-5)


@pytest.mark.parametrize("name", ["indices", "other_indices"])
def test_impossible_pairs_are_refused(vectors: InfluenceQuery, name: str) -> None:
    given = {"indices": [1], "other_indices": [2], name: [N]}
    with pytest.raises(QueryError, match=rf"`{name}` must lie in 0\.\.{N - 1}"):
        vectors.scores_between(**given)


# --- other options, dtypes ------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["dampng", "k", "measurement", "subset"])
def test_unknown_options_are_refused(vectors: InfluenceQuery, option: str) -> None:
    with pytest.raises(TypeError, match=f"'{option}'"):
        vectors.removal_effect(asked(vectors), [1], **{option: 1})  # type: ignore[arg-type]


def test_segments_cannot_be_chosen_where_each_is_answered(vectors: InfluenceQuery) -> None:
    with pytest.raises(ValueError, match="`segments` cannot be chosen where each is answered"):
        vectors.scores_by_segment(asked(vectors), segments="mean")
    found = vectors.scores_by_segment(asked(vectors), subset=[5, 2], layers="first")
    (only,) = found.values()
    close(only, vectors.scores(asked(vectors), subset=[5, 2], layers="first").double(), 1e-6)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-6), (torch.bfloat16, 0.02)])
def test_gradients_of_another_precision_are_answered_in_float32(
    file: InfluenceQuery, dtype: torch.dtype, share: float
) -> None:
    queries = asked(file)
    others = {name: DenseGradient(g.dense().to(dtype)) for name, g in queries.items()}
    found = file.scores(others)
    assert found.dtype == torch.float32
    close(found, file.scores(queries).double(), share)
