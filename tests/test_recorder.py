"""What a recorder writes is what training saw, however it was batched, ordered, buffered or spooled."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_influence import recorder as recorder_module
from lightning_influence.errors import CaptureError
from lightning_influence.functional.kronecker import eigenbasis
from lightning_influence.gradients import FactoredGradient
from lightning_influence.layer_plan import expected_bytes_per_row, expected_file_bytes, plan_layers
from lightning_influence.layers import track_layers
from lightning_influence.query import InfluenceQuery
from lightning_influence.recorder import RecordedCounts, Recorder
from lightning_influence.step import StepCapture, StepGradients
from lightning_influence.store import StoreReader, StoreWriter
from tests.plain_loop import (
    capture_step,
    decoded_rows,
    finish,
    make_plans,
    query_gradients,
    record,
    train_epoch,
)
from tests.reference.activations import collect_activations
from tests.reference.factors import covariances, eigenvalue_correction
from tests.reference.gradients import per_example_gradients
from tests.reference.models import (
    Example,
    classification_examples,
    classification_loss,
    seeded_classifier,
    seeded_token_model,
    token_examples,
    token_loss,
)

# Everything is float32 with sums of some dozen terms; rows agree to 1e-5 of the largest entry.
LAYERS = ["first", "last"]
N = 12
SHUFFLED = [7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 4, 6]
WHOLE = 10**6  # a budget that keeps every coordinate


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=share * largest)


def with_bad_example(index: int) -> list[Example]:
    """Examples of which one has an infinite input."""
    examples = classification_examples(N)
    x, y = examples[index]
    examples[index] = (torch.full_like(x, torch.inf), y)
    return examples


def test_rows_are_the_summed_gradients_at_their_dataset_index(tmp_path: Path) -> None:
    model, examples = seeded_classifier(), classification_examples(N)
    query = record(tmp_path / "run.h5", model, examples, order=SHUFFLED)
    expected = per_example_gradients(model, examples, classification_loss, LAYERS)
    for name in LAYERS:
        close(decoded_rows(query, name), expected[name])


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_sequences_are_recorded_with_ignored_positions(tmp_path: Path, codec: str) -> None:
    model, examples = seeded_token_model(), token_examples([6] * N)
    query = record(tmp_path / "run.h5", model, examples, codec=codec, bytes_per_example=WHOLE)
    expected = per_example_gradients(model, examples, token_loss, ["down", "mix", "head"])
    for name, gradients in expected.items():
        # int8 in groups of 64 whitened coordinates: worst of four seeds .7 % of the largest entry
        close(decoded_rows(query, name), gradients, share=1e-5 if codec != "eigen" else 0.015)


def test_columns_say_what_the_step_was(tmp_path: Path) -> None:
    model, examples = seeded_classifier(), classification_examples(N)
    store = record(tmp_path / "run.h5", model, examples, order=SHUFFLED, batch_size=5).store
    losses = [classification_loss(model, example).item() for example in examples]
    np.testing.assert_allclose(store.column("loss"), losses, rtol=1e-5)
    assert store.column("label").tolist() == [int(y) for _, y in examples]
    steps = np.empty(N, int)
    steps[SHUFFLED] = np.arange(N) // 5
    assert store.column("step").tolist() == steps.tolist()
    np.testing.assert_allclose(store.column("learning_rate"), 0.1 / (1 + steps), rtol=1e-6)
    assert store.column("written").all()
    assert store.column("valid").all()


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_factors_equal_the_reference(tmp_path: Path, codec: str) -> None:
    model, examples = seeded_classifier(), classification_examples(N)
    layers = finish(train_epoch(tmp_path / "run.h5", model, examples, codec=codec), model)
    activations = collect_activations(model, examples, classification_loss, LAYERS)
    for name in LAYERS:
        basis, seen = layers[name].basis, activations[name]
        A, S = covariances(seen.inputs, seen.output_grads)
        # the spool's float16 pairs are off by 2^-11 of themselves; covariances are of the originals
        close(basis.Q_A @ basis.eigenvalues_A.diag() @ basis.Q_A.T, A)
        close(basis.Q_S @ basis.eigenvalues_S.diag() @ basis.Q_S.T, S)
        Lambda = eigenvalue_correction(seen.gradients(), basis.Q_A.double(), basis.Q_S.double())
        close(layers[name].Lambda, Lambda, share=1e-5 if codec != "eigen" else 2e-3)


def test_examples_that_were_not_seen_are_missing(tmp_path: Path) -> None:
    recorder = train_epoch(
        tmp_path / "run.h5", seeded_classifier(), classification_examples(N), order=[1, 4, 5], num_examples=N
    )
    finish(recorder, seeded_classifier())
    store = StoreReader(tmp_path / "run.h5")
    assert np.flatnonzero(store.column("written")).tolist() == [1, 4, 5]
    assert np.flatnonzero(store.column("valid")).tolist() == [1, 4, 5]
    counts = {name: store.attributes[name] for name in ("rows_written", "rows_invalid", "rows_missing")}
    assert counts == {"rows_written": 3, "rows_invalid": 0, "rows_missing": 9}


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_an_example_with_infinite_gradient_is_invalid_and_in_no_factor(tmp_path: Path, codec: str) -> None:
    model = seeded_classifier()
    recorder = train_epoch(tmp_path / "run.h5", model, with_bad_example(4), codec=codec)
    layers = finish(recorder, model)
    store = StoreReader(tmp_path / "run.h5")
    assert np.flatnonzero(~store.column("valid").astype(bool)).tolist() == [4]
    assert store.column("written").all()
    assert store.attributes["rows_invalid"] == 1
    others = [index for index in range(N) if index != 4]
    without = train_epoch(
        tmp_path / "other.h5", model, classification_examples(N), codec=codec, order=others, batch_size=11
    )
    for name, layer in without.factors().items():
        close(layers[name].Lambda, layer.Lambda, share=1e-4)  # other batches: sums in another order
        close(layers[name].basis.eigenvalues_A, layer.basis.eigenvalues_A)
    without.discard()


class SideBySide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x[:, :4]) + self.right(x[:, 4:])


def side_by_side(path: Path, codec: str, kept: list[int], bad_label: int, **options) -> Recorder:
    """Of steps of four, reduced where the recorder wants it; example 9 overflows in one layer only."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(N, 8, generator=generator), torch.arange(N) % 3
    inputs[9, :4], inputs[9, 4:], labels[9] = 1e6, 1e25, bad_label
    torch.manual_seed(0)
    model = SideBySide()
    layers, _ = track_layers(model, None)
    capture = StepCapture(layers)

    def gradients(rows: list[int], **reduce) -> StepGradients:
        with capture:
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        return capture.gradients(len(rows), **reduce)

    plans = plan_layers(layers, gradients([0]).gradients, codec)  # type: ignore[arg-type]
    bases = {name: eigenbasis(torch.eye(5), torch.eye(3)) for name in plans} if codec == "eigen" else {}
    writer = StoreWriter(path, num_examples=N, store_id="side-by-side")
    recorder = Recorder(writer, plans, bases=bases, keep_covariances=True, **options)
    for start in range(0, len(kept), 4):
        rows = kept[start : start + 4]
        reduce = {name: partial(recorder.reduce, name) for name in recorder.reduced_layers}
        recorder.update(gradients(rows, reduce=reduce), np.array(rows), step_index=start, learning_rate=0.1)
    return recorder


@pytest.mark.parametrize("bad_label", [0, 1, 2])  # of two of them, the example has a gradient
@pytest.mark.parametrize("options", [{"codec": "eigen"}, {"codec": "pairs-float32", "at_once": True}])
def test_an_example_that_is_not_finite_in_one_layer_is_in_no_layers_factors(
    options: dict, bad_label: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "FIRST_EXAMPLES", 4)
    found = side_by_side(tmp_path / "all.h5", kept=[*range(N)], bad_label=bad_label, **options)
    others = [index for index in range(N) if index != 9]
    expected = side_by_side(tmp_path / "others.h5", kept=others, bad_label=bad_label, **options)
    layers, expected_layers = found.factors(), expected.factors()
    assert found.counts() == RecordedCounts(N, 1, 0)
    for name, metric in expected.covariances.items():
        for one, other in zip(found.covariances[name].sums, metric.sums, strict=True):
            torch.testing.assert_close(one, other)
        close(layers[name].Lambda, expected_layers[name].Lambda)
    found.discard()
    expected.discard()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_finite_is_asked_of_rescaled_gradients(dtype: torch.dtype) -> None:
    grads = torch.tensor([1.0, 1e15, torch.nan, 1e25], dtype=dtype).view(4, 1, 1)
    gradient = FactoredGradient(torch.ones(4, 1, 2, dtype=dtype), grads)
    for factor in (torch.tensor(1.0), torch.tensor(1e10), torch.tensor([1.0, 1e10, 1.0, 1e-20])):
        assert gradient.is_finite(factor).tolist() == gradient.rescaled(factor).is_finite().tolist()


def test_an_epoch_without_any_finite_gradient_is_refused(tmp_path: Path) -> None:
    model = seeded_classifier()
    with torch.no_grad():
        model.first.weight.fill_(torch.nan)
    recorder = train_epoch(tmp_path / "run.h5", model, classification_examples(N))
    with pytest.raises(CaptureError, match="No row with a finite gradient was recorded"):
        recorder.factors()
    recorder.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", [1, 4])
def test_of_a_repeated_index_the_last_row_counts(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "BLOCK_EXAMPLES", block)
    model, examples = seeded_classifier(), classification_examples(N)
    recorder = train_epoch(tmp_path / "run.h5", model, examples)
    recorder.update(capture_step(model, [examples[7]]), np.array([2]), step_index=9, learning_rate=0.5)
    finish(recorder, model)
    query = InfluenceQuery(StoreReader(tmp_path / "run.h5"))
    rows = decoded_rows(query, "first")
    close(rows[2], rows[7])
    assert query.store.column("step")[2] == 9
    assert query.store.attributes["rows_written"] == N


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_block_size_does_not_matter(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = seeded_token_model(), token_examples([6] * N)
    asked = query_gradients(model, examples[:3])
    scores = []
    for block in (1, 5, 1024):
        monkeypatch.setattr(recorder_module, "BLOCK_EXAMPLES", block)
        path = tmp_path / f"{block}.h5"
        query = record(path, model, examples, codec=codec, bytes_per_example=WHOLE, batch_size=3)
        scores.append(query.scores(asked))
    # pairs: sums in another order, near the smallest eigenvalues 1e-3 of the largest score.
    # eigen: each block size whitens with its first block's Lambda, so int8 rounds another way.
    share = 1e-3 if codec != "eigen" else 0.05
    close(scores[0], scores[2], share)
    close(scores[1], scores[2], share)


def test_block_bytes_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = seeded_classifier(), classification_examples(N)
    whole = record(tmp_path / "whole.h5", model, examples)
    monkeypatch.setattr(recorder_module, "BLOCK_BYTES", 1)
    each = record(tmp_path / "each.h5", model, examples)
    assert torch.equal(decoded_rows(each, "first"), decoded_rows(whole, "first"))


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_batch_size_does_not_matter(tmp_path: Path, batch_size: int) -> None:
    model, examples = seeded_classifier(), classification_examples(N)
    asked = query_gradients(model, examples[:3])
    one = record(tmp_path / "a.h5", model, examples, batch_size=batch_size, order=SHUFFLED).scores(asked)
    other = record(tmp_path / "b.h5", model, examples, batch_size=7).scores(asked)
    close(one, other, share=1e-4)


def test_spooled_rows_equal_those_with_the_same_basis_within_float16(tmp_path: Path) -> None:
    model, examples = seeded_token_model(), token_examples([6] * N)
    options = {"codec": "eigen", "bytes_per_example": WHOLE}
    first = train_epoch(tmp_path / "spooled.h5", model, examples, keep_covariances=True, **options)
    first._flush()
    bases = first.next_bases()
    finish(first, model)
    spooled = InfluenceQuery(StoreReader(tmp_path / "spooled.h5"))
    direct = record(tmp_path / "direct.h5", model, examples, bases=bases, **options)
    for name, layer in direct.layers.items():
        assert torch.equal(layer.basis.Q_A, spooled.layers[name].basis.Q_A)
        close(spooled.layers[name].Lambda, layer.Lambda, share=2e-3)  # twice float16's 2^-11
        # float16 before int8: where it tips a code over, one step, 1/127 of a group's largest
        close(decoded_rows(spooled, name), decoded_rows(direct, name), share=0.02)


def test_next_bases_are_those_of_the_eigen_layers_alone(tmp_path: Path) -> None:
    model, examples = seeded_classifier(), classification_examples(N)
    pairs = train_epoch(tmp_path / "run.h5", model, examples, keep_covariances=True)
    pairs.factors()
    assert pairs.next_bases() == {}
    pairs.discard()


def test_rows_and_basis_of_different_epochs_fit_together(tmp_path: Path) -> None:
    model, examples = seeded_token_model(), token_examples([6] * N)
    before = train_epoch(
        tmp_path / "before.h5", seeded_token_model(), token_examples([6] * N, seed=3), codec="eigen"
    )
    before._flush()
    bases = before.next_bases()
    before.discard()
    query = record(tmp_path / "run.h5", model, examples, codec="eigen", bases=bases, bytes_per_example=WHOLE)
    activations = collect_activations(model, examples, token_loss, ["mix"])["mix"]
    basis = bases["mix"]
    expected = eigenvalue_correction(activations.gradients(), basis.Q_A.double(), basis.Q_S.double())
    close(query.layers["mix"].Lambda, expected)


def test_longer_examples_than_the_first_batchs_are_padded_in_blocks(tmp_path: Path) -> None:
    model = seeded_token_model()
    examples = token_examples([6, 6, 4, 4, 4, 3, 3])
    recorder = train_epoch(tmp_path / "run.h5", model, examples[:2], codec="pairs-float32", num_examples=7)
    for start, stop in ((2, 5), (5, 7)):
        step = capture_step(model, examples[start:stop])
        recorder.update(step, np.arange(start, stop), step_index=start, learning_rate=0.1)
    finish(recorder, model)
    expected = per_example_gradients(model, examples, token_loss, ["mix"])["mix"]
    close(decoded_rows(InfluenceQuery(StoreReader(tmp_path / "run.h5")), "mix"), expected)


@pytest.mark.parametrize("codec", ["pairs", "eigen"])
def test_discard_leaves_nothing_on_the_disk(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "BLOCK_EXAMPLES", 4)
    recorder = train_epoch(tmp_path / "run.h5", seeded_classifier(), classification_examples(N), codec=codec)
    assert list(tmp_path.iterdir())  # the partial file, or the spool's folder
    recorder.discard()
    recorder.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", ["pairs", "eigen"])
def test_finish_leaves_one_file(tmp_path: Path, codec: str) -> None:
    record(tmp_path / "run.h5", seeded_classifier(), classification_examples(N), codec=codec)
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


def test_discard_keeps_an_older_file(tmp_path: Path) -> None:
    model, examples = seeded_classifier(), classification_examples(N)
    record(tmp_path / "run.h5", model, examples)
    before = (tmp_path / "run.h5").read_bytes()
    train_epoch(tmp_path / "run.h5", model, examples).discard()
    assert (tmp_path / "run.h5").read_bytes() == before


def test_an_exception_while_the_spool_is_read_leaves_no_spool(tmp_path: Path) -> None:
    (tmp_path / "run.h5").mkdir()  # a file cannot take its place
    recorder = train_epoch(tmp_path / "run.h5", seeded_classifier(), classification_examples(N), codec="eigen")
    with pytest.raises(Exception, match="is a directory"):
        recorder.factors()
    recorder.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


def test_counts_tell_written_invalid_and_missing(tmp_path: Path) -> None:
    recorder = train_epoch(
        tmp_path / "run.h5", seeded_classifier(), with_bad_example(4), order=range(10), num_examples=20
    )
    recorder.factors()
    assert recorder.counts() == RecordedCounts(written=10, invalid=1, missing=10)
    recorder.discard()


def test_stored_rows_are_the_rows_as_written(tmp_path: Path) -> None:
    model, examples = seeded_classifier(), classification_examples(N)
    recorder = train_epoch(tmp_path / "run.h5", model, examples)
    layers = recorder.factors()
    rows = recorder.stored_rows([7, 2])["first"]
    recorder.discard()
    expected = per_example_gradients(model, [examples[7], examples[2]], classification_loss, ["first"])
    close(layers["first"].codec.decode(rows), expected["first"])


@pytest.mark.parametrize("codec", ["pairs", "pairs-float16", "pairs-float32", "eigen", "auto"])
def test_announced_bytes_are_those_of_the_file(tmp_path: Path, codec: str) -> None:
    model, examples = seeded_token_model(), token_examples([6] * N)
    expected = expected_bytes_per_row(make_plans(model, examples, codec), 100)
    query = record(tmp_path / "run.h5", model, examples, codec=codec, bytes_per_example=100)
    taken = sum(layer.codec.bytes_per_row for layer in query.layers.values())
    assert query.store.attributes["bytes_per_row"] == taken
    if codec.startswith("pairs"):
        assert taken == expected
    else:  # each layer's last group may be short: a scale of 4 bytes a layer at most
        assert taken <= expected + 4 * len(query.layers)


def test_announced_file_size_is_near_the_files() -> None:
    plans = make_plans(seeded_classifier(), classification_examples(2), "pairs")
    # A, S and Lambda: 4 bytes x (16 + 36 + 24 + 9 + 25 + 15)
    assert expected_file_bytes(plans, 40, 10) == 10 * (40 + 30) + 4 * 125


def test_auto_takes_pairs_for_vectors_and_eigen_for_sequences() -> None:
    vectors = make_plans(seeded_classifier(), classification_examples(2), "auto")
    sequences = make_plans(seeded_token_model(), token_examples([4, 4]), "auto")
    assert {plan.codec for plan in vectors.values()} == {"pairs"}
    assert {plan.codec for plan in sequences.values()} == {"eigen"}


def test_an_unknown_codec_is_refused() -> None:
    tracked, _ = track_layers(seeded_classifier())
    with pytest.raises(ValueError, match=r"`codec` must be one of auto, pairs, .* got 'zip'"):
        plan_layers(tracked, {}, "zip")  # type: ignore[arg-type]


def test_a_layer_that_a_step_did_not_use_has_zero_rows(tmp_path: Path) -> None:
    model, examples = seeded_classifier(), classification_examples(4)
    step = capture_step(model, examples)
    unused = FactoredGradient(torch.zeros(4, 1, 6), torch.zeros(4, 1, 4))
    step.gradients["first"] = unused
    recorder = Recorder(
        StoreWriter(tmp_path / "run.h5", num_examples=4, store_id="unused-layer-1"),
        make_plans(model, examples, "pairs-float32"),
    )
    recorder.update(step, np.arange(4), step_index=0, learning_rate=0.1)
    finish(recorder, model)
    query = InfluenceQuery(StoreReader(tmp_path / "run.h5"))
    assert not decoded_rows(query, "first").any()
    assert bool(query.scores(query_gradients(model, examples)).isfinite().all())
