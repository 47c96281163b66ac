"""Error and time of every solver against the dense solution, on six small problems.

    python examples/benchmarks/solvers.py

Problems: ridge regression on scikit-learn's diabetes data (11 parameters); softmax regression on its digits (650
parameters; its Hessian is its Gauss-Newton matrix); a 64-16-10 network on the same digits, with its Gauss-Newton
matrix, and with its Hessian regularized above its negative eigenvalues; a small convolutional network, and a
transformer with one block that reads an image as 8 rows. Right-hand sides: gradients of ten held-out examples.
"EK-FAC alone" is what a file answers, made by `capture`. Everything is in float64 on one thread.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import capture
from lightning_influence.solvers import (
    Arnoldi,
    ConjugateGradient,
    EKFACPreconditioner,
    Exact,
    GaussNewtonOperator,
    HessianOperator,
    LiSSA,
    Nystroem,
    Objective,
    PreconditionedNeumann,
    Solver,
    SolverError,
)
from lightning_influence.solvers.objective import Loss

TRAIN = 1000
SMALL = 250  # for networks whose products cost more


@dataclass
class Problem:
    name: str
    operator: GaussNewtonOperator | HessianOperator
    vectors: Tensor
    rows: Tensor
    preconditioner: EKFACPreconditioner


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 300, loss: Loss = cross_entropy) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss(model(x), y).mean().backward()
        optimizer.step()
    return model


class RowTransformer(nn.Module):
    """An image [n, 64] as 8 tokens, its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.embed(images.unflatten(1, (8, 8)))).mean(1))


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square() / 2


def class_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def networks() -> dict[str, nn.Module]:
    return {
        "softmax regression": nn.Sequential(nn.Linear(64, 10)),
        "network": nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)),
        "CNN": nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3), nn.Tanh()),
            *(nn.Flatten(), nn.Linear(8, 10)),
        ),
        "transformer": RowTransformer(),
    }


def problems(seed: int, folder: str) -> Iterator[Problem]:
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    digits = images.double() / 16, labels
    features, progression = (torch.tensor(array) for array in load_diabetes(return_X_y=True))
    diabetes = features / features.std(0), (progression - progression.mean()) / progression.std()
    torch.manual_seed(seed)
    sizes = {"CNN": SMALL, "transformer": SMALL}
    models = {}
    for name, model in networks().items():
        x, y = (values[: sizes.get(name, TRAIN)] for values in digits)
        models[name] = trained(model.double(), x, y)
    ridge = trained(
        nn.Sequential(nn.Linear(10, 1)).double(), diabetes[0][:400], diabetes[1][:400], loss=half_squares
    )
    network, cnn, transformer = (models[name] for name in ("network", "CNN", "transformer"))
    for name, model, data, size, loss, make, regularization in (
        ("ridge regression", ridge, diabetes, 400, half_squares, HessianOperator, 1e-2),
        ("softmax regression", models["softmax regression"], digits, TRAIN, class_losses, HessianOperator, 1e-2),
        ("network, Gauss-Newton", network, digits, TRAIN, class_losses, GaussNewtonOperator, 1e-2),
        ("network, Hessian", network, digits, TRAIN, class_losses, HessianOperator, 0.1),
        ("CNN, Gauss-Newton", cnn, digits, SMALL, class_losses, GaussNewtonOperator, 1e-2),
        (
            "transformer, Gauss-Newton",
            transformer,
            digits,
            SMALL,
            class_losses,
            GaussNewtonOperator,
            1.0,
        ),
    ):
        x, y = data
        loader = DataLoader(TensorDataset(x[:size], y[:size]), batch_size=250)
        operator = make.from_loader(model, loader, loss=loss, hessian_regularization=regularization)
        path = capture(
            model,
            loader,
            f"{folder}/{name}.h5",
            training_loss=lambda model, batch, loss=loss: loss(model(batch[0]), batch[1]),
        )
        objective = Objective(model, loss)
        (queries,) = objective.batches([(x[size : size + 10], y[size : size + 10])])
        rows = torch.cat([objective.gradients(batch, chunk_size=64) for batch in operator.batches])
        preconditioner = EKFACPreconditioner.from_store(model, path, damping=regularization)
        yield Problem(name, operator, objective.gradients(queries), rows, preconditioner)


def methods(M: EKFACPreconditioner, size: int) -> dict[str, Solver]:
    rank, sketch = min(size, 50), min(size, 100)
    return {
        "Exact": Exact(),
        "ConjugateGradient": ConjugateGradient(rtol=1e-6),
        "ConjugateGradient, block": ConjugateGradient(rtol=1e-6, block=True),
        "ConjugateGradient, EK-FAC": ConjugateGradient(rtol=1e-6, preconditioner=M),
        "LiSSA": LiSSA(maxiter=300),
        "EK-FAC alone": PreconditionedNeumann(M, maxiter=1),
        "EK-FAC + Neumann, 100 iterations": PreconditionedNeumann(M, step=None, maxiter=100),
        f"Arnoldi, rank {rank}": Arnoldi(rank=rank),
        f"Nystroem, rank {sketch}": Nystroem(rank=sketch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the table says what did not converge
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sizes = f"{TRAIN} or {SMALL} images, 400 patients"
    print(f"torch {torch.__version__}, seed {args.seed}, {sizes}, 10 queries")
    with tempfile.TemporaryDirectory() as folder:
        for problem in problems(args.seed, folder):
            report(problem)


def report(problem: Problem) -> None:
    operator, vectors = problem.operator, problem.vectors
    eigenvalues, Q = torch.linalg.eigh(operator.dense())
    truth = (vectors @ Q / eigenvalues) @ Q.T
    print(
        f"\n{problem.name}: {operator.size} parameters, eigenvalues {eigenvalues[0]:.2g} to {eigenvalues[-1]:.2g}"
    )
    print(f"{'':34s}{'iterations':>10s}{'error':>10s}{'residual':>10s}{'Pearson':>9s}{'seconds':>9s}")
    for name, solver in methods(problem.preconditioner, operator.size).items():
        start = time.perf_counter()
        try:
            solution = solver.solve(operator, vectors)
        except SolverError as error:
            print(f"{name:34s} {str(error).split('. ')[0].split('; ')[0]}")
            continue
        seconds = time.perf_counter() - start
        error = float(((solution.value - truth).norm(dim=1) / truth.norm(dim=1)).max())
        pair = torch.stack([(solution.value @ problem.rows.T).flatten(), (truth @ problem.rows.T).flatten()])
        print(
            f"{name:34s}{int(solution.info.iterations.max()):10d}{error:10.1e}"
            f"{float(solution.info.residual.max()):10.1e}{float(torch.corrcoef(pair)[0, 1]):9.4f}{seconds:9.2f}"
        )


if __name__ == "__main__":
    main()
