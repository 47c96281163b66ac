"""Scores are those of the whole file at once, in float64, whatever is in memory at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.curvature import HeuristicDamping
from lightning_influence.functional.ranking import top_k
from lightning_influence.query import InfluenceQuery
from lightning_influence.query.best import BestSoFar
from lightning_influence.query.budget import parse_bytes, queries_at_once, rows_at_once
from lightning_influence.query.places import Places
from lightning_influence.query.reading import read_chunks
from lightning_influence.store import StoreReader
from lightning_influence.store.pages import Pages, release
from tests.plain_loop import decoded_rows
from tests.reference.scores import loss_influence_scores, self_influence
from tests.test_curvature_matrix import CURVATURES, FILES, N, asked, close, dense_matrix

CHUNKS = (1, 7, N - 1, N, N + 1)
RULE = HeuristicDamping(0.1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FILES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    return FILES[request.param](tmp_path_factory.mktemp("file") / "rows.h5")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    return FILES["pairs-int8"](tmp_path_factory.mktemp("pairs") / "rows.h5")


def set_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, queries: int | None = None) -> None:
    monkeypatch.setattr("lightning_influence.query.asked.rows_at_once", lambda codecs, count, budget: rows)
    if queries is not None:
        monkeypatch.setattr("lightning_influence.query.asked.queries_at_once", lambda layers, budget: queries)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_chunks_and_threads_do_not_matter(
    file: InfluenceQuery, curvature: str, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    queries = asked(file)
    rows = {name: decoded_rows(file, name).double() for name in file.layers}
    matrices = {name: dense_matrix(curvature, file.layers[name], rows[name], RULE) for name in rows}
    expected = loss_influence_scores({n: g.dense().double() for n, g in queries.items()}, rows, matrices)
    own = self_influence(rows, matrices)
    for number, chunk in [*((1, chunk) for chunk in CHUNKS), (2, 7)]:
        torch.set_num_threads(number)
        set_chunks(monkeypatch, chunk)
        # float32 of rows, queries and factors, as without chunks (`test_curvature_matrix`)
        found = file.scores(queries, curvature=curvature, damping=RULE)
        close(found, expected, 5e-5)
        close(file.self_influence(curvature=curvature, damping=RULE), own, 5e-5)
        top = file.top_k(queries, 4, curvature=curvature, damping=RULE)
        assert torch.equal(top.scores, found.sort(dim=1, descending=True).values[:, :4])
        assert torch.equal(found.gather(1, top.indices), top.scores)


@pytest.mark.parametrize("curvature", ["ekfac", "empirical_fisher"])
def test_queries_that_are_answered_in_lots_have_the_same_answers(
    pairs: InfluenceQuery, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = asked(pairs)
    together = pairs.scores(queries, curvature=curvature), pairs.top_k(queries, 3, curvature=curvature)
    groups = pairs.group_scores(queries, np.arange(N) % 3, curvature=curvature)
    for lot in (1, 2):
        set_chunks(monkeypatch, 6, lot)
        close(pairs.scores(queries, curvature=curvature), together[0].double(), 1e-5)
        top = pairs.top_k(queries, 3, curvature=curvature)
        assert torch.equal(top.indices, together[1].indices)
        close(top.scores, together[1].scores.double(), 1e-5)
        found = pairs.group_scores(queries, np.arange(N) % 3, curvature=curvature)
        close(found.scores, groups.scores.double(), 1e-5)


def test_a_budget_of_one_byte_reads_row_by_row_and_answers_the_same(pairs: InfluenceQuery) -> None:
    queries, small = asked(pairs), InfluenceQuery(pairs.store, memory_budget=1)
    close(small.scores(queries), pairs.scores(queries).double(), 1e-5)
    close(small.self_influence(), pairs.self_influence().double(), 1e-5)
    assert torch.equal(small.top_k(queries, 5).indices, pairs.top_k(queries, 5).indices)
    every = range(N)
    close(small.scores_between(every), pairs.scores_between(every).double(), 1e-5)


def test_top_k_never_makes_all_scores(pairs: InfluenceQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, 4)
    widths = []
    add = BestSoFar.add

    def watched(self: BestSoFar, indices: Tensor, scores: Tensor) -> None:
        widths.append(scores.shape[1])
        add(self, indices, scores)

    monkeypatch.setattr(BestSoFar, "add", watched)
    pairs.top_k(asked(pairs), 2)
    assert widths == [4] * (N // 4)


# --- the running top-k ----------------------------------------------------------------------------

VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, float("nan"), float("inf"), float("-inf")])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), largest=st.booleans())
def test_the_best_so_far_are_those_of_all_at_once_to_the_bit(data: st.DataObject, largest: bool) -> None:
    q, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    scores = torch.tensor(data.draw(st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=q, max_size=q)))
    k = data.draw(st.integers(1, n))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    best, numbers = BestSoFar(k, largest=largest), 3 * torch.arange(n) + 5  # dataset indices, of a subset
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        best.add(numbers[start:stop], scores[:, start:stop])
    indices, values = best.result()
    expected, places = top_k(scores, k, largest=largest)
    assert torch.equal(indices, numbers[places])
    assert torch.equal(values.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 10, 11])
@pytest.mark.parametrize("chosen", [None, [7, 0, 3, 9], []])
def test_each_row_is_read_once_and_ascending(step: int, chosen: list[int] | None) -> None:
    array = np.arange(40).reshape(10, 4)
    places = Places(10, None if chosen is None else np.array(chosen, np.int64))
    seen = []
    for chunk in read_chunks({"a": {"x": array}}, places, step, CPU):
        assert len(chunk.arrays["a"]["x"]) <= step
        seen += chunk.arrays["a"]["x"][:, 0].tolist()
    assert seen == [4 * row for row in (range(10) if chosen is None else sorted(chosen))]


def test_leaving_early_leaves_no_thread() -> None:
    before = threading.active_count()
    for _ in read_chunks({"a": {"x": np.zeros((10, 2))}}, Places(10), 2, CPU):
        break
    assert threading.active_count() == before


def test_rows_of_a_map_are_not_copied(tmp_path: Path) -> None:
    mapped = write_bytes(tmp_path / "rows", 4 * 2**16)
    for chunk in read_chunks({"a": {"x": mapped}}, Places(4), 2, CPU):
        (found,) = chunk.arrays["a"].values()
        assert found.data_ptr() == mapped[chunk.rows].__array_interface__["data"][0]


def write_bytes(path: Path, size: int) -> np.memmap:
    np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tofile(path)
    return np.memmap(path, mode="r").reshape(4, -1)


def mapped_megabytes(path: Path) -> float:
    """How much of a file counts as this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found / 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is mapped")
def test_pages_are_given_back_after_use(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    mapped = write_bytes(path, 24 * 2**20).reshape(96, -1)
    seen = []
    for chunk in read_chunks({"a": {"x": mapped}}, Places(96), 1, CPU):  # of 256 KB, 1 MB at a time
        assert chunk.arrays["a"]["x"].any()
        seen.append(mapped_megabytes(path))
    # those before, these, the next, and at the edges what the system maps around a page, up to 2 MB
    assert max(seen) <= 8
    assert mapped_megabytes(path) <= 2
    Pages(mapped).touch(slice(0, 96))
    assert mapped_megabytes(path) == 24
    Pages(mapped).release(slice(32, 64))
    assert 12 <= mapped_megabytes(path) <= 18
    release(mapped)
    assert mapped_megabytes(path) <= 1
    assert mapped[3].any()  # read again


def test_memory_that_may_be_changed_is_not_given_back(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    write_bytes(path, 4 * 2**12)
    changed = np.memmap(path, mode="c")
    changed[:] = 7
    release(changed)
    assert (changed == 7).all()


def test_pages_are_the_same_memory() -> None:
    array = np.arange(6.0).reshape(2, 3)
    array.flags.writeable = False
    other = Pages(array).array
    assert other.flags.writeable
    assert np.shares_memory(array, other)
    assert np.array_equal(array, other)


# --- the budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [("1GB", 10**9), ("1 gb", 10**9), ("1.5MB", 1_500_000), ("2GiB", 2**31), ("64KiB", 2**16), ("7", 7), (8, 8)],
)
def test_budgets_are_bytes(said: str | int, expected: int) -> None:
    assert parse_bytes(said) == expected


@pytest.mark.parametrize("said", [0, -1, "", "GB", "-1GB", "1XB", "1iB", True, 1.5, None, "0"])
def test_other_budgets_are_refused(pairs: InfluenceQuery, said: object) -> None:
    with pytest.raises(ValueError, match="`memory_budget` must be a positive number of bytes"):
        InfluenceQuery(pairs.store, memory_budget=said)  # type: ignore[arg-type]


def test_a_smaller_budget_holds_fewer_rows_and_queries(file: InfluenceQuery) -> None:
    layers = list(file.layers.values())
    codecs = [layer.codec for layer in layers]
    rows = [rows_at_once(codecs, 10, 10**power) for power in range(10)]
    queries = [queries_at_once(layers, 10**power) for power in range(10)]
    assert rows == sorted(rows)
    assert queries == sorted(queries)
    assert rows[0] == queries[0] == 1
    assert rows_at_once(codecs, 1000, 10**6) < rows_at_once(codecs, 1, 10**6)


def test_a_reader_opened_again_gives_the_same_bits(pairs: InfluenceQuery) -> None:
    queries = asked(pairs)
    assert torch.equal(InfluenceQuery(StoreReader(pairs.store.path)).scores(queries), pairs.scores(queries))
