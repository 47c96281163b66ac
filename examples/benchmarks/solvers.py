"""Error and time of every solver against the dense solution, on three small problems.

    python examples/benchmarks/solvers.py

Problems: softmax regression on scikit-learn's digits (650 parameters; its Hessian is its Gauss-Newton matrix), and
a 64-16-10 network on the same digits, with its Gauss-Newton matrix, and with its Hessian regularized above its
negative eigenvalues. Right-hand sides: gradients of ten test images. Everything is in float64 on one thread.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
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

TRAIN = 1000


@dataclass
class Problem:
    name: str
    operator: GaussNewtonOperator | HessianOperator
    vectors: Tensor
    rows: Tensor
    preconditioner: EKFACPreconditioner


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 300) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(epochs):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def problems(seed: int, folder: str) -> list[Problem]:
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x, y = images.double() / 16, labels
    torch.manual_seed(seed)
    linear = trained(nn.Sequential(nn.Linear(64, 10)).double(), x[:TRAIN], y[:TRAIN])
    network = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    network = trained(network, x[:TRAIN], y[:TRAIN])
    loader = DataLoader(TensorDataset(x[:TRAIN], y[:TRAIN]), batch_size=250)
    found = []
    for name, model, make, regularization in (
        ("softmax regression", linear, HessianOperator, 1e-2),
        ("network, Gauss-Newton", network, GaussNewtonOperator, 1e-2),
        ("network, Hessian", network, HessianOperator, 0.1),
    ):
        operator = make.from_loader(model, loader, loss=losses, hessian_regularization=regularization)
        path = capture(
            model,
            loader,
            f"{folder}/{len(found)}.h5",
            training_loss=lambda model, batch: losses(model(batch[0]), batch[1]),
            codec="pairs-float32",
        )
        objective = Objective(model, losses)
        (queries,) = objective.batches([(x[TRAIN : TRAIN + 10], y[TRAIN : TRAIN + 10])])
        rows = torch.cat([objective.gradients(batch, chunk_size=64) for batch in operator.batches])
        preconditioner = EKFACPreconditioner.from_store(model, path, damping=regularization)
        found.append(Problem(name, operator, objective.gradients(queries), rows, preconditioner))
    return found


def methods(M: EKFACPreconditioner) -> dict[str, Solver]:
    return {
        "Exact": Exact(),
        "ConjugateGradient": ConjugateGradient(rtol=1e-6),
        "ConjugateGradient, block": ConjugateGradient(rtol=1e-6, block=True),
        "ConjugateGradient, EK-FAC": ConjugateGradient(rtol=1e-6, preconditioner=M),
        "LiSSA": LiSSA(maxiter=300),
        "EK-FAC alone": PreconditionedNeumann(M, maxiter=1),
        "EK-FAC + Neumann, 100 iterations": PreconditionedNeumann(M, step=None, maxiter=100),
        "Arnoldi, rank 50": Arnoldi(rank=50),
        "Nystroem, rank 100": Nystroem(rank=100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the table says what did not converge
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, seed {args.seed}, {TRAIN} training images, 10 queries")
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
    for name, solver in methods(problem.preconditioner).items():
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
