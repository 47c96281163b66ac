"""`InfluenceModule.verify` and `scores_of`: what the report measures, and that it says what it leaves out."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import HeuristicDamping, InfluenceCallback, InfluenceModule, capture
from lightning_influence.errors import QueryError
from lightning_influence.evaluation import pbrf, report_pbrf
from lightning_influence.evaluation.report import Check, VerificationReport
from lightning_influence.evaluation.report_file import Drawn, halves_check, top_overlap
from lightning_influence.evaluation.report_reference import (
    GaussNewtonReference,
    Sample,
    ceiling_of,
    gauss_newton_check,
    judged,
)
from lightning_influence.evaluation.report_run import Verification
from lightning_influence.solvers import GaussNewtonOperator
from tests.integration.lifecycle_models import HandwrittenLoss, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
N, QUERIES = 96, 6
ASKED_OF_FILES = ["coverage", "staleness", "storage", "damping", "halves"]
NEED_DATA = ["rows", "gauss-newton", "pbrf"]


def each_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


class Small(LightningModule):
    """A multilayer perceptron from 4 features to 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OfMappings(Small):
    """Its batches are no pairs, and its loss has no arguments of the batch's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["features"], batch["label"]), batch_idx)


class Mappings(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        features, label = super().__getitem__(index)
        return {"features": features, "label": label}


def tensors(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    noise = torch.randn(n, 3, generator=generator)
    return x, (x[:, :3] + 0.7 * noise).argmax(1)


class Run(NamedTuple):
    influence: InfluenceModule
    loader: DataLoader
    queries: tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("verified")
    model, loader = Small(), DataLoader(TensorDataset(*tensors(N, 1)), 16, shuffle=True)
    callback = InfluenceCallback(folder / "influence.h5", codec="pairs-float32", rows="final")
    make_trainer(folder, callback, max_epochs=4).fit(model, loader)
    return Run(InfluenceModule.attach(model, folder / "influence.h5"), loader, tensors(QUERIES, 2))


@pytest.fixture(scope="module")
def report(run: Run) -> VerificationReport:
    return run.influence.verify(run.loader, run.queries, net=run.influence.model.net, loss=each_loss, minutes=30)


def damping_vector(run: Run) -> Tensor:
    """The default damping of each parameter, in the net's order."""
    parts = []
    for name, p in run.influence.model.net.named_parameters():
        Lambda = run.influence.store.factors(f"net.{name.split('.')[0]}")["Lambda"]
        parts.append(torch.full((p.numel(),), float(Lambda.mean())))
    return torch.cat(parts).double()


def exact_scores(run: Run) -> Tensor:
    """By the dense Gauss-Newton matrix, float64, [q, N] in the dataset's order."""
    x, y = tensors(N, 1)
    operator = GaussNewtonOperator.from_loader(
        run.influence.model.net, [(x, y)], loss=each_loss, dtype=torch.float64
    )
    gradients = [
        operator.objective.gradients(operator.objective.batches([pair])[0]) for pair in (run.queries, (x, y))
    ]
    H = operator.dense() + torch.diag(damping_vector(run))
    return gradients[0] @ torch.linalg.solve(H, gradients[1].T)


def mean_over_queries(measure: Any, scores: Tensor, others: Tensor) -> float:
    return float(np.mean([measure(a, b)[0] for a, b in zip(scores, others, strict=True)]))


def test_asks_everything_that_there_is_data_for(report: VerificationReport):
    assert [check.name for check in report.checks] == [*ASKED_OF_FILES, *NEED_DATA]
    assert not [check.left_out for check in report.checks if check.left_out]
    assert report.num_examples == N


def test_agreement_with_the_gauss_newton_matrix_is_that_with_the_dense_one(report: VerificationReport, run: Run):
    stored, exact = run.influence.scores(run.queries), exact_scores(run)
    found = report["gauss-newton"].figures
    assert found["largest_residual"] < 2e-3
    assert found["examples"] == N
    assert report["gauss-newton"].value == pytest.approx(mean_over_queries(spearmanr, stored, exact), abs=3e-3)
    assert found["pearson"] == pytest.approx(mean_over_queries(pearsonr, stored, exact), abs=3e-3)
    assert found["top_overlap"] == pytest.approx(top_overlap(stored.double(), exact), abs=0.04)


def test_size_of_the_matrix_is_that_of_its_diagonal(report: VerificationReport, run: Run):
    operator = GaussNewtonOperator.from_loader(run.influence.model.net, [tensors(N, 1)], loss=each_loss)
    store = run.influence.store
    factors = sum(float(store.factors(name)["Lambda"].sum()) for name in store.layers)
    ratio = float(operator.dense().trace()) / factors
    assert report["gauss-newton"].figures["size_against_factors"] == pytest.approx(ratio, rel=0.25)  # four probes


def test_rows_of_the_final_weights_say_what_gradients_say(report: VerificationReport):
    assert report["rows"].value > 0.9999
    assert report["rows"].figures["top_overlap"] == 1
    assert report["staleness"].verdict == "good"


def test_responses_are_those_of_pbrf(report: VerificationReport, run: Run):
    x, y = tensors(N, 1)
    damping = {
        name: float(run.influence.store.factors(f"net.{name.split('.')[0]}")["Lambda"].mean())
        for name, _ in run.influence.model.net.named_parameters()
    }
    responses = pbrf(run.influence.model.net, [(x, y)], (x, y), loss=each_loss, damping=damping)
    scores = responses.scores([run.queries])
    exact = exact_scores(run)
    assert mean_over_queries(pearsonr, scores, exact) > 0.99  # first order holds for one of 96 examples
    figures = report["pbrf"].figures
    assert figures["changed_examples"] == 12
    assert figures["largest_residual"] <= 1e-2
    everywhere = mean_over_queries(pearsonr, run.influence.scores(run.queries), scores)
    assert figures["pearson"] == pytest.approx(everywhere, abs=0.25)  # of 12 examples instead of 96


def test_leaves_out_what_needs_data_and_says_what_to_pass(run: Run):
    report = run.influence.verify()
    assert [check.name for check in report.checks if not check.left_out] == ASKED_OF_FILES
    assert all("`train_loader` was not passed" in report[name].left_out for name in NEED_DATA)
    assert "Left out:" in str(report)


def test_asks_models_whose_batches_are_no_pairs(tmp_path: Path, run: Run):
    model = OfMappings()
    model.load_state_dict(run.influence.model.state_dict())
    influence = InfluenceModule.attach(model, run.influence.store.path)
    loader = DataLoader(Mappings(*tensors(N, 1)), 32)
    features, labels = run.queries
    report = influence.verify(loader, {"features": features, "label": labels}, minutes=30)
    exact = mean_over_queries(spearmanr, run.influence.scores(run.queries), exact_scores(run))
    assert report["gauss-newton"].value == pytest.approx(exact, abs=3e-3)
    assert "pass `loss=`" in report["pbrf"].left_out


def test_asks_plain_modules_with_a_loss(tmp_path: Path):
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), TensorDataset(*tensors(N, 1))

    def training_loss(model: nn.Module, batch: Any) -> Tensor:
        return each_loss(model(batch[0]), batch[1])

    path = capture(net, DataLoader(data, 16), tmp_path / "plain.h5", training_loss=training_loss)
    influence = InfluenceModule.attach(net, path)
    report = influence.verify(DataLoader(data, 16), tensors(QUERIES, 2), loss=each_loss, minutes=30)
    assert not [check for check in report.checks if check.left_out and check.name != "storage"]
    without = influence.verify(DataLoader(data, 16), tensors(QUERIES, 2))
    assert all("no `training_step`" in without[name].left_out for name in NEED_DATA)


def test_leaves_out_the_matrix_of_a_loss_that_is_not_recognized(tmp_path: Path):
    model, data = HandwrittenLoss(), TensorDataset(torch.randn(24, 3), torch.arange(24) % 2)
    callback = InfluenceCallback(tmp_path / "own.h5", loss="mean", codec="pairs-float32")
    make_trainer(tmp_path, callback, max_epochs=2).fit(model, DataLoader(data, 8))
    influence = InfluenceModule.attach(model, tmp_path / "own.h5")
    report = influence.verify(DataLoader(data, 8), data[:4])
    assert not report["rows"].left_out
    assert "No recognised loss" in report["gauss-newton"].left_out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda outputs, targets: 2 * each_loss(outputs, targets), "not what `training_step` minimizes"),
        (lambda outputs, targets: outputs.nosuch, "no attribute 'nosuch'"),
    ],
)
def test_leaves_out_responses_to_another_loss(run: Run, change: Any, said: str):
    report = run.influence.verify(run.loader, run.queries, net=run.influence.model.net, loss=change, minutes=30)
    assert said in report["pbrf"].left_out
    assert report["gauss-newton"].value == pytest.approx(report["gauss-newton"].figures["spearman"])


def test_refuses_a_loader_of_another_dataset(run: Run):
    report = run.influence.verify(DataLoader(TensorDataset(*tensors(N + 1, 1)), 16), run.queries)
    assert "has 97 examples, the file has rows of 96" in report["rows"].left_out


def test_says_when_the_time_is_too_short(run: Run):
    report = run.influence.verify(run.loader, run.queries, minutes=1e-3)
    assert "pass more `minutes=`" in report["gauss-newton"].left_out


def test_a_part_of_the_training_set_is_held_against_itself(run: Run):
    x, y = tensors(N, 1)
    small = Verification(
        run.influence._engine(),
        run.influence.model,
        run.influence._tracked,
        loss_kind="auto",
        damping=HeuristicDamping(),
        minutes=30,
        seed=0,
    )
    subject = small._subject(run.influence.model, run.queries)
    rows = [np.arange(start, start + 16) for start in range(0, 64, 16)]
    part = Sample(rows, [(x[own], y[own]) for own in rows])
    reference = GaussNewtonReference(subject, part, seconds=1800, seed=0)
    check = gauss_newton_check(subject, reference)
    assert not reference.is_whole
    assert check.figures["examples"] == 64
    assert "agrees with itself" in check.answer
    assert check.value - 0.3 < check.figures["reference_halves"] < 1


@pytest.mark.parametrize(
    ("found", "value"),
    [
        ({"spearman": 0.3}, 0.3),  # the reference is of all examples
        ({"spearman": 0.3, "reference_ceiling": 0.9}, 0.3),
        ({"spearman": 0.3, "reference_ceiling": 0.7}, None),
        ({"spearman": 0.85, "reference_ceiling": 0.7}, 0.85),
    ],
)
def test_scores_are_not_called_poor_where_the_reference_is(found: dict[str, float], value: float | None):
    assert judged(found) == value if value is not None else np.isnan(judged(found))


def test_the_ceiling_of_a_reference_is_that_of_doubled_halves():
    generator = np.random.default_rng(0)
    truth, halves = generator.normal(size=20000), generator.normal(size=(2, 20000))
    halves = truth + 1.5 * halves
    found = ceiling_of(np.corrcoef(halves)[0, 1])
    assert found == pytest.approx(np.corrcoef(truth, halves.mean(0))[0, 1], abs=0.01)
    assert ceiling_of(-0.1) == 0


def test_refuses_no_time(run: Run):
    with pytest.raises(ValueError, match="`minutes` must be positive and finite, got 0"):
        run.influence.verify(minutes=0)


def test_takes_training_examples_where_there_are_no_queries(run: Run):
    report = run.influence.verify(run.loader, minutes=30)
    assert report["gauss-newton"].figures["queries"] == 8
    assert report["gauss-newton"].figures["examples"] == N - 16


def test_leaves_everything_as_it_was(run: Run):
    model = run.influence.model.train()
    model.net[1].eval()  # modes may be mixed
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes, grads = [m.training for m in model.modules()], [p.grad for p in model.parameters()]
    state = torch.get_rng_state()
    run.influence.verify(run.loader, run.queries, net=model.net, loss=each_loss, minutes=30)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is grad and p.requires_grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_json_holds_what_the_page_says(report: VerificationReport):
    found = json.loads(report.to_json())
    assert [check["name"] for check in found["checks"]] == [check.name for check in report.checks]
    page = " ".join(str(report).split())
    for check in report.checks:
        assert f"{check.name}: " in page
        assert " ".join(check.answer.split()) in page
    assert found["checks"][0]["verdict"] == report.checks[0].verdict


def test_what_is_not_a_number_is_null_in_json():
    report = VerificationReport("f", "M", 1, "d", (Check("a", "b?", "c."),), 0.0, 1.0)
    assert json.loads(report.to_json())["checks"][0]["value"] is None
    assert report["a"].verdict == "not measured"


def test_halves_agree_where_rows_are_alike_and_not_where_few_decide(tmp_path: Path):
    def agreement(x: Tensor) -> float:
        torch.manual_seed(0)
        net, data = nn.Sequential(nn.Linear(4, 3)), TensorDataset(x, torch.arange(len(x)) % 3)

        def losses(model: nn.Module, batch: Any) -> Tensor:
            return each_loss(model(batch[0]), batch[1])

        path = capture(
            net, DataLoader(data, 64), tmp_path / "rows.h5", training_loss=losses, codec="pairs-float32"
        )
        engine = InfluenceModule.attach(net, path)._engine()
        drawn = Drawn.of(engine.store, None, 0)
        return halves_check(engine, drawn, HeuristicDamping(0.01), seed=0, seconds=60).value

    x = tensors(256, 3)[0]
    outliers = x * torch.where(torch.arange(256) % 64 == 0, 30.0, 1.0)[:, None]
    assert agreement(x) > 0.97
    assert agreement(outliers) < agreement(x) - 0.02


def test_handed_in_examples_score_as_their_rows_do(run: Run):
    x, y = tensors(N, 1)
    for curvature in ("ekfac", "kfac", "diagonal", "identity"):
        stored = run.influence.scores(run.queries, curvature=curvature)
        found = run.influence.scores_of(run.queries, (x[10:20], y[10:20]), curvature=curvature)
        torch.testing.assert_close(found, stored[:, 10:20], rtol=1e-3, atol=1e-3 * float(stored.abs().mean()))


def test_handed_in_examples_have_no_rows_for_a_curvature_of_rows(run: Run):
    with pytest.raises(QueryError, match="handed-in examples have none"):
        run.influence.scores_of(run.queries, run.queries, curvature="empirical_fisher")


@pytest.mark.parametrize(("residual", "verdict"), [(0.01, "poor"), (0.1, "poor"), (170.0, "not measured")])
def test_responses_that_did_not_converge_say_nothing_of_the_scores(residual: float, verdict: str) -> None:
    scores = torch.arange(8.0).expand(2, 8)
    subject = SimpleNamespace(file_scores=scores)
    used = Sample([np.arange(8)], [None])
    found = report_pbrf._answer(cast(Any, subject), used, np.arange(8), -scores, residual)
    assert found.verdict == verdict
    assert ("says nothing of the scores" in found.answer) == (verdict == "not measured")
    assert found.figures["spearman"] == -1
