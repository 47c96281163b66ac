"""The command line answers as the Python interface does, and says in one line what it cannot do."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_influence import (
    GlobalDamping,
    HeuristicDamping,
    InfluenceCallback,
    InfluenceModule,
    TrainingDamping,
    WeightDecayDamping,
)
from lightning_influence.cli import main
from lightning_influence.cli import progress as progress_module
from lightning_influence.cli.dampings import damping_of
from lightning_influence.cli.progress import progress
from lightning_influence.errors import QueryError
from lightning_influence.store import StoreReader
from lightning_influence.trajectory import merge_segments

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
ASK = ["--checkpoint", "last.ckpt", "--model", "command_line:Digits", "--data"]
SOURCE = """
import torch
from torch.utils.data import DataLoader, Subset
from command_line import TRAIN, Digits, digits

class NotAModel:
    pass

class Needy(Digits):
    def __init__(self, depth):
        super().__init__()

def questions():
    return Subset(digits(), [TRAIN, TRAIN + 1, TRAIN + 2])

def loader():
    return DataLoader(questions(), batch_size=2)

def one_batch():
    images, labels = zip(*questions())
    return torch.stack(images), torch.stack(labels)

def batches():
    images, labels = one_batch()
    yield images[:1], labels[:1]
    yield images[1:], labels[1:]

def talking():
    print("loading")
    return one_batch()

def nothing():
    return []

def number():
    return 3

def raises():
    raise KeyError("no such split")

def raises_later():
    yield one_batch()
    raise KeyError("no such shard")

def unusable():
    return [torch.zeros(2, 3)]

def empty_later():
    images, labels = one_batch()
    yield images, labels
    yield images[:0], labels[:0]

def not_a_number():
    images, labels = one_batch()
    images[2] = float("nan")
    return images, labels

def failing(model, batch):
    return batch[5]

def first_logit(model, batch):
    return model.net(batch[0])[:, 0]

not_a_function = 3
"""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*weights_only"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of digits, its checkpoint, one of segments and one that is merged."""
    folder, before, path = tmp_path_factory.mktemp("cli"), os.getcwd(), sys.path[:]
    shutil.copy(ROOT / "examples" / "command_line.py", folder)
    (folder / "asking.py").write_text(SOURCE)
    try:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        import command_line

        command_line.train(epochs=2)
        for trajectory in ("segments", "merge"):
            trainer = Trainer(
                max_epochs=2,
                callbacks=[InfluenceCallback(f"{trajectory}.h5", epochs="every", trajectory=trajectory)],
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            data = torch.utils.data.Subset(command_line.training_set(), range(100))
            trainer.fit(command_line.Digits(), DataLoader(data, batch_size=32, shuffle=True))
            trainer.save_checkpoint(f"{trajectory}.ckpt")
    finally:
        os.chdir(before)
        sys.path[:] = path
    return folder


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; what the command line adds to the path is taken back."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return trained


@pytest.fixture
def influence(folder: Path) -> InfluenceModule:
    sys.path.insert(0, str(folder))
    import command_line

    return InfluenceModule.from_checkpoint("last.ckpt", command_line.Digits, store="influence.h5")


@pytest.fixture
def query(folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    import asking

    return asking.one_batch()


def answer(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line on stderr of a command that fails."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-influence: ")
    assert err.count("\n") == 1
    return err


# info


def test_info_tells_what_is_in_the_file(folder, capsys):
    found = json.loads(answer(capsys, "info", "influence.h5", "--json"))
    (segment,) = found["segments"]
    with h5py.File("influence.h5") as file:
        assert found["num_examples"] == len(file["rows/written"]) == 1437
        assert found["bytes"] == os.path.getsize("influence.h5")
        assert segment["rows_written"] == file["rows/written"][:].sum()
        assert segment["weights_sha256"] == file.attrs["weights_hash_end"].decode()
        assert segment["staleness_spearman"] == file.attrs["staleness_spearman"]
        assert segment["learning_rate"] == pytest.approx(file["rows/learning_rate"][:].mean())
        for layer in segment["layers"]:
            arrays = file[f"layers/{layer['name']}/rows"].values()
            assert layer["bytes_per_row"] == sum(array.nbytes for array in arrays) / 1437
            Lambda = file[f"layers/{layer['name']}/factors/Lambda"][:]
            assert layer["gradient"] == [*Lambda.shape]
            assert layer["mean_eigenvalue"] == pytest.approx(Lambda.mean(), rel=1e-5)
            assert layer["largest_eigenvalue"] == Lambda.max()
    assert (segment["epoch"], segment["step_end"], segment["coverage"]) == (1, 90, 1.0)


def test_info_is_text_for_people(folder, capsys):
    text = answer(capsys, "info", "influence.h5")
    digest = StoreReader("influence.h5").attributes["weights_hash_end"]
    for part in (
        "1,437 written, 0 invalid, 0 missing; 218 bytes each",
        "in epoch 1, optimizer steps 45 to 90, mean learning rate",
        f"SHA-256 {digest[:16]}…, at optimizer step 90",
        "staleness: Spearman",
        "cross_entropy (mean); empirical Fisher",
        "100.0% of the trainable parameters are attributed",
        "net.0  pairs int8  64 x 65",
        "damping: --damping training is advised, by the weight decay and the learning rates",
    ):
        assert part in text


def test_info_advises_the_damping_of_the_python_interface(folder, capsys, influence):
    expected = influence.recommend_damping()
    found = json.loads(answer(capsys, "info", "influence.h5", "--json"))["damping"]
    assert found["reason"] == expected.reason
    assert found["advised"] == str(expected.damping)
    assert damping_of(found["as_argument"]) == expected.damping
    values = found["spearman_at_factor"]
    assert {float(factor): value for factor, value in values.items()} == pytest.approx(expected.sensitivity)
    assert f"0.1*mean {values['0.1']:.3f}" in answer(capsys, "info", "influence.h5")


def test_info_advises_the_default_where_training_is_unknown(capsys):
    path = str(GOLDEN / "schema_v3.h5")
    assert json.loads(answer(capsys, "info", path, "--json"))["damping"]["as_argument"] == "1*mean"
    assert "--damping 1*mean is advised, the default, since nothing" in answer(capsys, "info", path)


def test_info_tells_of_a_damaged_file_what_it_can(folder, capsys, tmp_path):
    path = shutil.copy("influence.h5", tmp_path)
    with h5py.File(path, "r+") as file:
        file["layers/net.2/factors/Q_A"][0, 0] += 1
    assert "damping: no advice: " in answer(capsys, "info", path)
    assert json.loads(answer(capsys, "info", path, "--json"))["damping"]["advised"] is None


def test_info_names_what_is_not_attributed(folder, capsys, tmp_path):
    path = shutil.copy("influence.h5", tmp_path)
    coverage = StoreReader(path).document("coverage")
    coverage[0] |= {"covered": 100, "reason": "it is pruned"}
    text = json.dumps(coverage).encode()
    rewrite_document(path, "coverage", text)
    assert "not net.0 (Linear, 4,060 parameters): it is pruned" in answer(capsys, "info", path)
    (segment,) = json.loads(answer(capsys, "info", path, "--json"))["segments"]
    assert segment["coverage"] == pytest.approx((100 + 650) / 4810)


def test_info_tells_of_merged_epochs(folder, capsys):
    text = answer(capsys, "info", "merge.h5")
    assert "epochs 0 (0.01), 1 (0.009" in text
    assert "merged by these learning rates" in text
    (segment,) = json.loads(answer(capsys, "info", "merge.h5", "--json"))["segments"]
    assert [each["epoch"] for each in segment["merged_epochs"]] == [0, 1]
    assert segment["staleness_spearman"] is None  # JSON has no NaN


def test_info_tells_of_each_segment(folder, capsys):
    found = json.loads(answer(capsys, "info", "segments.h5", "--json"))
    assert [segment["epoch"] for segment in found["segments"]] == [0, 1]
    assert "earlier segment 0: 100 rows, in epoch 0" in answer(capsys, "info", "segments.h5")


def test_info_tells_of_the_labels_that_were_drawn(folder, capsys, tmp_path):
    path = shutil.copy("influence.h5", tmp_path)
    sizes = {"effective_samples_S": 23.4, "effective_samples_Lambda": 21.6}
    with h5py.File(path, "r+") as file:
        file.attrs.update({"fisher": np.bytes_("sampled"), "fisher_samples": 2, **sizes})
    assert "sampled Fisher (2 labels an example; effective sample sizes 23 of S and 22" in answer(
        capsys, "info", path
    )
    (segment,) = json.loads(answer(capsys, "info", path, "--json"))["segments"]
    assert segment["fisher_samples"] == 2
    assert {name: segment[name] for name in sizes} == sizes


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_files_of_every_version_are_described_and_sound(version, capsys):
    path = str(GOLDEN / f"schema_v{version}.h5")
    assert "18 written, 0 invalid, 2 missing" in answer(capsys, "info", path)
    assert json.loads(answer(capsys, "info", path, "--json"))["schema_version"] == version
    assert "sound" in answer(capsys, "verify", path)


# verify


@pytest.mark.parametrize("name", ["influence.h5", "segments.h5", "merge.h5"])
def test_a_captured_file_is_sound(folder, capsys, name):
    assert f"{name}: sound" in answer(capsys, "verify", name)


def problems(capsys: pytest.CaptureFixture, path: str) -> str:
    assert main(["verify", path]) == 1
    return capsys.readouterr().out


def rewrite_document(path: str, name: str, text: bytes) -> None:
    with h5py.File(path, "r+") as file:
        del file[f"documents/{name}"]
        made = file["documents"].create_dataset(name, data=np.frombuffer(text, np.uint8))
        made.attrs["crc32"] = zlib.crc32(text)


@pytest.mark.parametrize(
    "where", ["layers/net.0/rows/inputs", "layers/net.2/factors/Q_A", "rows/loss", "documents/layers"]
)
def test_a_flipped_bit_is_found_wherever_it_is(folder, capsys, tmp_path, where):
    path = shutil.copy("influence.h5", tmp_path)
    with h5py.File(path) as file:
        offset = file[where].id.get_offset() + file[where].nbytes // 2
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    found = problems(capsys, path)
    assert f"{where} has checksum" in found
    assert "sound" not in found


def test_all_damaged_arrays_are_named(folder, capsys, tmp_path):
    path = shutil.copy("segments.h5", tmp_path)
    with h5py.File(path, "r+") as file:
        for where in ("layers/net.0/rows/inputs", "segments/0/layers/net.2/rows/inputs"):
            file[where][3] += 1
    found = problems(capsys, path)
    assert "segment 1: layers/net.0/rows/inputs has checksum" in found
    assert "segment 0: layers/net.2/rows/inputs has checksum" in found
    assert "2 problems" in found


@pytest.mark.parametrize("name", ["rows_written", "rows_invalid", "rows_missing", "bytes_per_row"])
def test_a_count_that_does_not_fit_the_rows_is_found(folder, capsys, tmp_path, name):
    path = shutil.copy("influence.h5", tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs[name] = int(file.attrs[name]) + 7
    assert f"attribute `{name}` is" in problems(capsys, path)


def test_documents_that_make_no_sense_are_found(folder, capsys, tmp_path):
    path = shutil.copy("influence.h5", tmp_path)
    rewrite_document(path, "coverage", b'{"a": 1}')
    assert "a document cannot be read" in problems(capsys, path)
    assert "a document cannot be read" in refusal(capsys, "info", path)


def test_files_that_cannot_be_opened_are_not_sound(folder, capsys, tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    assert "is not HDF5" in problems(capsys, str(tmp_path / "text.h5"))
    whole = Path("influence.h5").read_bytes()
    (tmp_path / "half.h5").write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in problems(capsys, str(tmp_path / "half.h5"))
    assert "there is no file" in refusal(capsys, "verify", "absent.h5")


# top


@pytest.mark.parametrize("data", ["asking:questions", "asking:loader", "asking:one_batch", "asking:batches"])
def test_top_gives_the_largest_scores_however_queries_are_returned(folder, capsys, influence, query, data):
    scores = influence.scores(query).numpy()
    found = json.loads(answer(capsys, "top", "influence.h5", *ASK, data, "--k", "4", "--json"))
    assert [entry["query"] for entry in found] == [0, 1, 2]
    labels, losses, steps = (influence.store.column(name) for name in ("label", "loss", "step"))
    for entry, row in zip(found, scores, strict=True):
        assert "bottom" not in entry
        best = np.argsort(-row)[:4]
        assert [each["index"] for each in entry["top"]] == best.tolist()
        assert [each["rank"] for each in entry["top"]] == [1, 2, 3, 4]
        np.testing.assert_allclose([each["score"] for each in entry["top"]], row[best], rtol=1e-4)
        assert [each["label"] for each in entry["top"]] == labels[best].tolist()
        assert [each["loss"] for each in entry["top"]] == losses[best].tolist()
        assert [each["step"] for each in entry["top"]] == steps[best].tolist()


def test_what_the_users_code_prints_is_no_part_of_the_answer(folder, capsys, tmp_path):
    arguments = ["influence.h5", *ASK, "asking:talking"]
    assert main(["top", *arguments, "--k", "1", "--json"]) == 0
    found = capsys.readouterr()
    assert len(json.loads(found.out)) == 3
    assert found.err == "loading\n"
    assert main(["export", *arguments, "--to", str(tmp_path / "table.npz")]) == 0
    assert "loading" not in capsys.readouterr().out


def test_bottom_gives_the_smallest_scores_too(folder, capsys, influence, query):
    scores = influence.scores(query).numpy()
    arguments = ("top", "influence.h5", *ASK, "asking:one_batch", "--k", "3", "--bottom")
    found = json.loads(answer(capsys, *arguments, "--json"))
    for entry, row in zip(found, scores, strict=True):
        assert [each["index"] for each in entry["bottom"]] == np.argsort(row)[:3].tolist()
    text = answer(capsys, *arguments)
    assert text.index("query 2: largest scores (proponents)") < text.index("query 2: smallest scores (opponents)")
    assert str(found[2]["bottom"][0]["index"]) in text.splitlines()[-3]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--damping", "0.01"], {"damping": 0.01}),
        (["--damping", "2*mean"], {"damping": HeuristicDamping(2.0)}),
        (["--damping", "2*overall_mean"], {"damping": GlobalDamping(2.0)}),
        (["--damping", "3*weight_decay"], {"damping": WeightDecayDamping(3.0)}),
        (["--damping", "training"], {"damping": TrainingDamping()}),
        (["--curvature", "kfac"], {"curvature": "kfac"}),
        (["--curvature=identity"], {"curvature": "identity"}),
        (["--segments", "{1: 2.0}"], {"segments": {1: 2.0}}),
        (["--layers", "[net.2]"], {"layers": ["net.2"]}),
        (["--layers", "net.2"], {"layers": "net.2"}),
        (["--layers=[net.*]"], {}),
        (["--layers=*"], {}),
        (["--subset", "5:40,100,41"], {"subset": [*range(5, 40), 100, 41]}),
        (["--measurement", "asking:first_logit"], {"measurement": lambda model, batch: model.net(batch[0])[:, 0]}),
    ],
)
def test_options_are_those_of_the_python_interface(folder, capsys, influence, query, arguments, options):
    scores, indices = influence.top_k(query, 2, **options)[::-1]
    found = json.loads(
        answer(capsys, "top", "influence.h5", *ASK, "asking:one_batch", "--k=2", "--json", *arguments)
    )
    assert [[each["index"] for each in entry["top"]] for entry in found] == indices.tolist()
    shown = [[each["score"] for each in entry["top"]] for entry in found]
    torch.testing.assert_close(torch.tensor(shown), scores)


def test_segments_can_be_weighed(folder, capsys):
    ask = ["--checkpoint", "segments.ckpt", *ASK[2:], "asking:one_batch", "--k=1", "--json"]
    results = [
        json.loads(answer(capsys, "top", "segments.h5", *ask, "--segments", segments))
        for segments in ("mean", "{0: 0.5, 1: 0.5}", "last")
    ]
    assert results[0] == results[1] != results[2]


def test_arguments_may_stand_in_a_file(folder, capsys, tmp_path):
    config = tmp_path / "question.yaml"
    config.write_text(
        "checkpoint: last.ckpt\nmodel: command_line:Digits\ndata: asking:one_batch\ndamping: 0.01\nk: 2\n"
    )
    spelled = answer(capsys, "top", "influence.h5", *ASK, "asking:one_batch", "--damping=0.01", "--k=2")
    assert answer(capsys, "top", "influence.h5", "--config", str(config)) == spelled


def test_fewer_rows_than_are_shown_by_default_are_all_shown(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[main.__module__], "DEFAULT_K", 5000)
    found = json.loads(answer(capsys, "top", "influence.h5", *ASK, "asking:one_batch", "--json"))
    assert [len(entry["top"]) for entry in found] == [1437] * 3


# self-influence and export


def test_a_missing_file_is_told_even_if_the_table_exists(folder, capsys, tmp_path):
    (tmp_path / "table.csv").touch()
    assert "there is no file absent.h5" in refusal(capsys, "export", "absent.h5", f"--to={tmp_path / 'table.csv'}")


def test_self_influence_comes_in_order(folder, capsys, influence):
    values = influence.self_influence(damping=0.05).numpy()
    found = json.loads(answer(capsys, "self-influence", "influence.h5", "--top=5", "--damping=0.05", "--json"))
    best = np.argsort(-values)[:5]
    assert [each["index"] for each in found] == best.tolist()
    np.testing.assert_allclose([each["self_influence"] for each in found], values[best], rtol=1e-5)
    text = answer(capsys, "self-influence", "influence.h5", "--top=5", "--damping=0.05")
    assert [line.split()[1] for line in text.splitlines()] == ["index", *map(str, best)]


@pytest.mark.parametrize("curvature", ["ekfac", "empirical_fisher"])
def test_self_influence_of_some_examples_and_layers(folder, capsys, influence, curvature):
    subset = [*range(100, 120), 7]
    options = {"layers": ["net.2"], "curvature": curvature}
    values = influence.self_influence(subset=subset, **options).numpy()
    ask = ["--top=3", "--subset=100:120,7", "--layers=[net.2]", f"--curvature={curvature}", "--json"]
    found = json.loads(answer(capsys, "self-influence", "influence.h5", *ask))
    best = np.argsort(-values)[:3]
    assert [each["index"] for each in found] == [subset[place] for place in best]
    np.testing.assert_allclose([each["self_influence"] for each in found], values[best], rtol=1e-5)


def test_fewer_examples_than_are_shown_by_default_are_all_shown(folder, capsys):
    ask = ["top", "influence.h5", *ASK, "asking:one_batch", "--json", "--subset=3:7"]
    assert [len(entry["top"]) for entry in json.loads(answer(capsys, *ask))] == [4, 4, 4]


def test_examples_without_rows_are_left_out(capsys):
    text = answer(capsys, "self-influence", str(GOLDEN / "schema_v3.h5"))
    assert len(text.splitlines()) == 1 + 18  # of 20, two of which have no row


def test_a_table_has_every_example(folder, capsys, influence, query, tmp_path):
    target = tmp_path / "table.csv"
    assert "1,437 examples" in answer(capsys, "export", "influence.h5", "--to", str(target))
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == [*range(1437)]
    for name in ("written", "valid", "label", "loss", "step", "learning_rate", "occurrences"):
        stored = [float(row[name]) for row in rows]
        np.testing.assert_allclose(stored, influence.store.column(name), rtol=1e-6)
    found = [float(row["self_influence"]) for row in rows]
    np.testing.assert_allclose(found, influence.self_influence(), rtol=1e-5)
    assert not any(name.startswith("score") for name in rows[0])


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_arrow_tables_are_those_of_text(folder, capsys, tmp_path, suffix):
    arrow = pytest.importorskip("pyarrow")
    target = tmp_path / f"table.{suffix}"
    for path in (target, tmp_path / "table.npz"):
        answer(capsys, "export", "influence.h5", f"--to={path}", *ASK, "asking:batches")
    if suffix == "parquet":
        from pyarrow import parquet

        table = parquet.read_table(target)
    else:
        table = arrow.ipc.open_file(target).read_all()
    with np.load(tmp_path / "table.npz") as file:
        expected = dict(file)
    for number, row in enumerate(expected.pop("scores")):
        expected[f"score_{number}"] = row
    assert table.column_names == list(expected)
    for name, column in expected.items():
        np.testing.assert_array_equal(table[name].to_numpy(), column)


def test_without_pyarrow_it_says_what_to_install(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refusal(capsys, "export", "influence.h5", f"--to={tmp_path / 'a.parquet'}")


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_a_table_has_the_scores_of_queries(folder, capsys, influence, query, tmp_path, suffix):
    target = tmp_path / f"table.{suffix}"
    assert "3 queries" in answer(capsys, "export", "influence.h5", f"--to={target}", *ASK, "asking:batches")
    if suffix == "npz":
        with np.load(target) as arrays:
            found = arrays["scores"]
            assert arrays["label"].tolist() == influence.store.column("label").tolist()
    else:
        with target.open() as file:
            rows = list(csv.DictReader(file))
            found = [[float(row[f"score_{q}"]) for row in rows] for q in range(3)]
    expected = influence.scores(query).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


# merge


def test_segments_are_merged_into_a_file_that_answers(folder, capsys, tmp_path):
    target = tmp_path / "merged.h5"
    line = answer(capsys, "merge", "segments.h5", f"--to={target}", "--bytes_per_example=300")
    found = StoreReader(target)
    assert "2 segments merged for the weights of segment 1, 100 rows of " in line
    assert 200 < found.attributes["bytes_per_row"] <= 300
    assert "merged by these learning rates" in answer(capsys, "info", str(target))
    assert "sound" in answer(capsys, "verify", str(target))
    equal = str(tmp_path / "equal.h5")
    answer(capsys, "merge", "segments.h5", "--to", equal, "--weighting=mean")
    assert "0 (1), 1 (1), merged equally for" in answer(capsys, "info", equal)
    ask = ["--checkpoint", "segments.ckpt", *ASK[2:], "asking:one_batch", "--k=5", "--json"]
    merge_segments(StoreReader("segments.h5"), tmp_path / "other.h5", bytes_per_example=300)
    one, other = (answer(capsys, "top", str(path), *ask) for path in (target, tmp_path / "other.h5"))
    assert one == other


# what it cannot do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`--checkpoint` is missing"),
        (["--checkpoint=last.ckpt", "--model=command_line:Digits"], "`--data` is missing"),
        ([*ASK, "nowhere:questions"], "the module 'nowhere' cannot be imported"),
        ([*ASK, "asking:absent"], "'asking' has no 'absent'"),
        ([*ASK, "asking.py:loader"], "must be module:name"),
        ([*ASK, "asking"], "must be module:name"),
        ([*ASK, "asking:not_a_function"], "must name a function that returns queries, got int"),
        ([*ASK, "asking:number"], "must return a DataLoader, a Dataset, one batch"),
        ([*ASK, "asking:nothing"], "gave no queries"),
        ([*ASK, "asking:raises"], "failed: KeyError: 'no such split'"),
        ([*ASK, "asking:raises_later"], "failed: KeyError: 'no such shard'"),
        ([*ASK, "asking:unusable"], "`training_step` of Digits failed"),
        ([*ASK, "asking:loader", "--model=asking:NotAModel"], "`--model` must name a LightningModule's class"),
        ([*ASK, "asking:loader", "--model=asking:Needy"], "cannot be loaded as Needy: TypeError"),
        ([*ASK, "asking:loader", "--model_args.width=3"], "cannot be loaded as Digits: RuntimeError"),
        ([*ASK, "asking:loader", "--model_args.depth=3"], "'depth', which Digits does not take; it takes: width"),
        ([*ASK, "asking:loader", "--checkpoint=absent.ckpt"], "`--checkpoint absent.ckpt` cannot be loaded"),
        ([*ASK, "asking:loader", "--checkpoint=merge.ckpt"], "weights are not those of influence.h5"),
        ([*ASK, "asking:loader", "--device=abacus"], "`--device abacus` cannot be used"),
        ([*ASK, "asking:loader", "--damping=-1"], "`--damping` must be a positive number"),
        ([*ASK, "asking:loader", "--damping=much"], "`--damping` must be a positive number"),
        ([*ASK, "asking:loader", "--damping=2*much"], "`--damping` must be a positive number"),
        ([*ASK, "asking:loader", "--curvature=flat"], "`curvature` must be one of"),
        ([*ASK, "asking:loader", "--segments={5: 1.0}"], "`segments` names 5"),
        ([*ASK, "asking:loader", "--layers=[conv]"], "`layers` must be names or patterns of layers"),
        ([*ASK, "asking:loader", "--subset=many"], "`--subset` must be indices and ranges such as 0:100,205"),
        ([*ASK, "asking:loader", "--subset=5:5"], "`--subset 5:5` must name examples from 0 to 1436"),
        ([*ASK, "asking:loader", "--subset=1430:1438"], "must name examples from 0 to 1436"),
        ([*ASK, "asking:loader", "--subset=1:4,2"], "names an example twice"),
        ([*ASK, "asking:loader", "--k=5", "--subset=1:4"], "`k` must be an integer from 1 to 3"),
        ([*ASK, "asking:loader", "--k=0"], "`k` must be an integer from 1 to 1437"),
        ([*ASK, "asking:loader", "--measurement=asking:not_a_function"], "must name a function of (model, batch)"),
        (
            [*ASK, "asking:loader", "--measurement=asking:failing"],
            "`--measurement asking:failing` failed: IndexError",
        ),
        ([*ASK, "asking:empty_later"], "gave a batch without any query"),
        ([*ASK, "asking:not_a_number"], "query 2: its scores are not finite"),
    ],
)
def test_a_question_that_cannot_be_answered_is_told_in_one_line(folder, capsys, arguments, message):
    assert message in refusal(capsys, "top", "influence.h5", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "absent.h5"], "there is no file absent.h5"),
        (["info", "last.ckpt"], "is not HDF5"),
        (["self-influence", "influence.h5", "--top=0"], "`--top` must be at least 1, got 0"),
        (["export", "influence.h5", "--to=table.csv", *ASK, "asking:not_a_number"], "query 2: its scores are not"),
        (
            ["merge", "influence.h5", "--to=table.csv"],
            "has one segment up to number 1, so there is nothing to merge",
        ),
        (["merge", "segments.h5", "--to=segments.h5"], "is the file that is merged"),
        (["merge", "segments.h5", "--to=table.csv", "--bytes_per_example=0"], "must be at least 1, got 0"),
        (["export", "influence.h5", "--to=table.xls"], "`--to` must end in .csv, .npz, .parquet or .arrow"),
        (["export", "influence.h5", "--to=nowhere/table.csv"], "there is no folder"),
        (["export", "influence.h5", "--to=table.csv", "--model=command_line:Digits"], "`--checkpoint` is missing"),
    ],
)
def test_other_commands_say_in_one_line_what_is_wrong(folder, capsys, arguments, message):
    assert message in refusal(capsys, *arguments)
    assert not Path("table.csv").exists()


def test_the_file_itself_is_not_overwritten(folder, capsys, tmp_path):
    path = shutil.copy("influence.h5", tmp_path / "gradients.npz")
    assert "is the file of gradients itself" in refusal(capsys, "export", str(path), f"--to={path}")
    assert "sound" in answer(capsys, "verify", str(path))


def test_a_checkpoint_of_objects_is_not_unpickled_unless_asked_for(folder, capsys, tmp_path):
    checkpoint = torch.load("last.ckpt", weights_only=True) | {"extra": Path("an object")}
    torch.save(checkpoint, tmp_path / "objects.ckpt")
    ask = ["top", "influence.h5", *ASK, "asking:loader", f"--checkpoint={tmp_path / 'objects.ckpt'}", "--k=1"]
    assert "holds more than plain values" in refusal(capsys, *ask)
    assert "query 2" in answer(capsys, *ask, "--weights_only=false")


def test_a_traceback_can_be_asked_for(folder):
    with pytest.raises(QueryError, match="no such split") as raised:
        main(["top", "influence.h5", *ASK, "asking:raises", "--traceback"])
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info"], ["top", "influence.h5", "--k=many"]])
def test_arguments_that_cannot_be_parsed_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_without_jsonargparse_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert "pip install 'lightning-influence[cli]'" in refusal(capsys, "info", "influence.h5")


def test_a_reader_that_goes_away_is_no_error(folder, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["info", "influence.h5"]) == 141
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_and_for_what_takes_over_a_second(monkeypatch, capsys):
    assert list(progress([0.6, 0.6])) == [0.6, 0.6]
    assert [time.sleep(seconds) for seconds in progress([0.6, 0.6])] == [None, None]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([0.6, 0.6])) == [0.6, 0.6]
    assert sys.stderr.getvalue() == ""
    assert [time.sleep(seconds) for seconds in progress([0.6, 0.6])] == [None, None]
    assert "2/2" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    ("arguments", "bar"),
    [
        (["self-influence", "influence.h5", "--json"], "self-influence: "),
        (["top", "influence.h5", *ASK, "asking:batches", "--json"], "it"),
        (["verify", "influence.h5"], "B/s"),
        (["export", "influence.h5", "--to=progress.csv"], "self-influence: "),
        (["merge", "segments.h5", "--to=progress.h5"], "merging: "),
    ],
)
def test_bars_leave_the_answer_alone(folder, monkeypatch, capsys, arguments, bar):
    plain = answer(capsys, *arguments)
    monkeypatch.setattr(progress_module, "DELAY", 0)
    assert answer(capsys, *arguments) == plain
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert answer(capsys, *arguments) == plain
    assert bar in sys.stderr.getvalue()


def test_the_script_is_what_is_tested_here():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lightning-influence": f"{main.__module__.removesuffix('.main')}:main"}


def test_it_runs_as_a_process(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_influence.cli"]
    ask = [*command, "top", "influence.h5", *ASK, "asking:raises"]
    done = subprocess.run(ask, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lightning-influence: `--data asking:raises` failed: KeyError")
