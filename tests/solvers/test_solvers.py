"""Every solver against the dense solution, and against SciPy's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from lightning_influence.solvers import (
    Arnoldi,
    ConjugateGradient,
    CurvatureOperator,
    DenseOperator,
    DivergenceError,
    Exact,
    LiSSA,
    Nystroem,
    PreconditionedNeumann,
    Solver,
    SolverError,
)
from lightning_influence.solvers.base import Draft
from tests.reference.models import random
from tests.solvers.problems import spd, spd_operator, symmetric


class DensePreconditioner:
    """M as a matrix, for tests."""

    def __init__(self, matrix: Tensor) -> None:
        self.eigenvalues, self.Q = torch.linalg.eigh(matrix)

    def solve(self, vectors: Tensor) -> Tensor:
        return (vectors @ self.Q / self.eigenvalues) @ self.Q.T

    def inverse_root(self, vectors: Tensor) -> Tensor:
        return (vectors @ self.Q / self.eigenvalues.sqrt()) @ self.Q.T


def near(matrix: Tensor, *, seed: int = 9) -> DensePreconditioner:
    """A preconditioner that is right up to 20 percent."""
    noise = random(*matrix.shape, seed=seed)
    eigenvalues, Q = torch.linalg.eigh(matrix)
    root = (Q * eigenvalues.sqrt()) @ Q.T
    wrong = torch.eye(len(matrix)).double() + 0.2 * symmetric(noise) / torch.linalg.norm(symmetric(noise), 2)
    return DensePreconditioner(symmetric(root @ wrong @ root))


SIZE = 20
CONVERGENT: dict[str, Solver] = {
    "exact": Exact(),
    "cg": ConjugateGradient(rtol=1e-9),
    "cg block": ConjugateGradient(rtol=1e-9, block=True),
    "cg preconditioned": ConjugateGradient(rtol=1e-9, preconditioner=near(spd(SIZE))),
    "cg block preconditioned": ConjugateGradient(rtol=1e-9, block=True, preconditioner=near(spd(SIZE))),
    "cg from x0": ConjugateGradient(rtol=1e-9, x0=random(SIZE, seed=8)),
    "lissa": LiSSA(rtol=1e-9, maxiter=10_000),
    "lissa with a scale": LiSSA(rtol=1e-9, maxiter=10_000, scale=1.0),
    "neumann": PreconditionedNeumann(near(spd(SIZE)), rtol=1e-9),
    "neumann with its own step": PreconditionedNeumann(
        DensePreconditioner(0.1 * torch.eye(SIZE).double()), step=None, rtol=1e-9, maxiter=10_000
    ),
    "arnoldi of full rank": Arnoldi(rank=SIZE),
    "nystroem of full rank": Nystroem(rank=SIZE),
}


@pytest.mark.parametrize("solver", CONVERGENT.values(), ids=CONVERGENT)
def test_solution_equals_the_dense_one(solver: Solver) -> None:
    operator, vectors = spd_operator(SIZE), random(5, SIZE, seed=1)
    found = solver.solve(operator, vectors)
    truth = torch.linalg.solve(operator.matrix, vectors.T).T
    # a residual of 1e-9 and a condition of 100 leave 1e-7 of an error
    assert float((found.value - truth).norm() / truth.norm()) < 1e-7
    assert bool(found.info.converged.all())
    rest = (vectors - found.value @ operator.matrix).norm(dim=1) / vectors.norm(dim=1)
    torch.testing.assert_close(found.info.residual, rest)


@pytest.mark.parametrize("name", CONVERGENT)
def test_regularization_is_part_of_the_system(name: str) -> None:
    matrix, vectors = spd(SIZE), random(3, SIZE, seed=1)
    solver = CONVERGENT[name]
    if name == "neumann":  # which needs a preconditioner that knows of it
        solver = PreconditionedNeumann(near(matrix + 0.5 * torch.eye(SIZE).double()), rtol=1e-9)
    operator = DenseOperator(symmetric(matrix), regularization=0.5)
    truth = torch.linalg.solve(matrix + 0.5 * torch.eye(SIZE).double(), vectors.T).T
    torch.testing.assert_close(solver.solve(operator, vectors).value, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", CONVERGENT.values(), ids=CONVERGENT)
def test_a_row_of_zeros_has_the_solution_zero(solver: Solver) -> None:
    vectors = torch.stack([torch.zeros(SIZE).double(), random(SIZE, seed=1)])
    found = solver.solve(spd_operator(SIZE), vectors)
    assert float(found.value[0].abs().max()) < 1e-9
    assert bool(found.info.converged.all())


@pytest.mark.parametrize(
    "name",
    ["exact", "cg", "cg preconditioned", "lissa", "neumann", "arnoldi of full rank", "nystroem of full rank"],
)
def test_rows_do_not_depend_on_one_another(name: str) -> None:
    operator, vectors = spd_operator(SIZE), random(4, SIZE, seed=2)
    together = CONVERGENT[name].solve(operator, vectors)
    alone = CONVERGENT[name].solve(operator, vectors[1:2])
    torch.testing.assert_close(alone.value[0], together.value[1])
    assert int(alone.info.iterations[0]) == int(together.info.iterations[1])


def scipy_cg(matrix: Tensor, vector: Tensor, maxiter: int, M: DensePreconditioner | None) -> np.ndarray:
    apply = None
    if M is not None:
        size = len(vector)
        apply = scipy.sparse.linalg.LinearOperator(
            (size, size), matvec=lambda v: M.solve(torch.from_numpy(v).reshape(1, -1))[0].numpy(), dtype=np.float64
        )
    return scipy.sparse.linalg.cg(matrix.numpy(), vector.numpy(), rtol=1e-12, M=apply, maxiter=maxiter)[0]


@pytest.mark.parametrize("is_preconditioned", [False, True])
def test_conjugate_gradient_takes_the_iterates_of_scipy(is_preconditioned: bool) -> None:
    operator, vectors = spd_operator(50, condition=100), random(3, 50, seed=1)
    M = near(operator.matrix) if is_preconditioned else None
    options = {"preconditioner": M} if M is not None else {}
    for maxiter in (1, 2, 5, 10):
        with pytest.warns(UserWarning, match="did not converge"):
            found = ConjugateGradient(rtol=1e-12, maxiter=maxiter, **options).solve(operator, vectors)
        expected = np.stack([scipy_cg(operator.matrix, vector, maxiter, M) for vector in vectors])
        np.testing.assert_allclose(found.value.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_preconditioned_conjugate_gradient_needs_fewer_iterations() -> None:
    operator, vectors = spd_operator(50, condition=1000), random(3, 50, seed=1)
    plain = ConjugateGradient(rtol=1e-8).solve(operator, vectors).info.iterations
    preconditioned = ConjugateGradient(rtol=1e-8, preconditioner=near(operator.matrix)).solve(operator, vectors)
    assert int(preconditioned.info.iterations.max()) < int(plain.min()) / 2


def test_block_conjugate_gradient_needs_fewer_iterations() -> None:
    operator, vectors = spd_operator(60, condition=1000), random(10, 60, seed=1)
    rows = ConjugateGradient(rtol=1e-8).solve(operator, vectors).info.iterations
    block = ConjugateGradient(rtol=1e-8, block=True).solve(operator, vectors).info.iterations
    assert int(block.max()) < int(rows.min()) / 2


@pytest.mark.parametrize("rank", [1, 6])
def test_block_conjugate_gradient_takes_dependent_right_hand_sides(rank: int) -> None:
    operator = spd_operator(30)
    vectors = random(8, rank, seed=1) @ random(rank, 30, seed=2)
    found = ConjugateGradient(rtol=1e-8, block=True).solve(operator, vectors)
    truth = torch.linalg.solve(operator.matrix, vectors.T).T
    torch.testing.assert_close(found.value, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_block_conjugate_gradient_takes_more_right_hand_sides_than_unknowns() -> None:
    operator, vectors = spd_operator(6), random(9, 6, seed=1)
    found = ConjugateGradient(rtol=1e-10, block=True).solve(operator, vectors)
    torch.testing.assert_close(found.value, torch.linalg.solve(operator.matrix, vectors.T).T)
    assert int(found.info.iterations.max()) == 1  # they span all directions


def test_arnoldi_finds_the_eigenpairs_of_scipy() -> None:
    Q, _ = torch.linalg.qr(random(80, 80, seed=4))
    spectrum = torch.cat([torch.tensor([9.0, -8.0, 5.0, 3.0]).double(), torch.linspace(-0.5, 0.5, 76).double()])
    matrix = symmetric((Q * spectrum) @ Q.T)
    found = Arnoldi(rank=4, tolerance=1e-8).eigenpairs(DenseOperator(matrix))
    expected, vectors = scipy.sparse.linalg.eigsh(matrix.numpy(), k=4, which="LM")
    order = np.argsort(-np.abs(expected))
    np.testing.assert_allclose(found.eigenvalues.numpy(), expected[order], rtol=1e-8)
    overlap = np.abs((found.vectors.numpy() * vectors[:, order].T).sum(1))
    np.testing.assert_allclose(overlap, 1, rtol=1e-8)
    assert found.converged
    assert found.iterations < 40


def test_arnoldi_goes_on_where_the_space_is_exhausted() -> None:
    operator = DenseOperator(torch.eye(10).double() * 2)  # every vector is an eigenvector
    found = Arnoldi(rank=5).eigenpairs(operator)
    torch.testing.assert_close(found.eigenvalues, torch.full((5,), 2.0).double())
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(5).double())


@pytest.mark.parametrize("solver", [Arnoldi(rank=3), Nystroem(rank=3)], ids=["arnoldi", "nystroem"])
def test_low_rank_curvature_with_regularization_is_solved_exactly(solver: Solver) -> None:
    factor = random(3, 30, seed=6)
    operator = DenseOperator(symmetric(factor.T @ factor), regularization=0.1)
    vectors = random(4, 30, seed=7)
    found = solver.solve(operator, vectors)
    truth = torch.linalg.solve(operator.dense(), vectors.T).T
    torch.testing.assert_close(found.value, truth, rtol=1e-6, atol=1e-6)
    assert found.info.eigenvalues is not None
    expected = torch.linalg.eigvalsh(factor @ factor.T).flip(0)
    torch.testing.assert_close(found.info.eigenvalues, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [Arnoldi, Nystroem])
def test_dropping_the_complement_gives_the_pseudo_inverse(make: type[Arnoldi] | type[Nystroem]) -> None:
    factor = random(3, 30, seed=6)
    matrix = symmetric(factor.T @ factor)
    vectors = random(4, 30, seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Nyström's residual is that of what is dropped
        found = make(rank=3, complement="drop").solve(DenseOperator(matrix), vectors)
    torch.testing.assert_close(
        found.value, vectors @ torch.linalg.pinv(matrix, hermitian=True), rtol=1e-6, atol=1e-8
    )


def test_the_residual_falls_with_the_rank() -> None:
    operator, vectors = (
        DenseOperator(symmetric(spd(40, condition=1e4)), regularization=1e-2),
        random(2, 40, seed=1),
    )
    for make in (Arnoldi, Nystroem):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            residuals = [make(rank=rank).solve(operator, vectors).info.residual.max() for rank in (5, 15, 30)]
        assert residuals[0] > 2 * residuals[1] > 4 * residuals[2]


def test_one_neumann_step_is_the_preconditioners_answer() -> None:
    operator, vectors = spd_operator(SIZE), random(2, SIZE, seed=1)
    M = near(operator.matrix)
    with pytest.warns(UserWarning, match="did not converge"):
        found = PreconditionedNeumann(M, maxiter=1).solve(operator, vectors)
    torch.testing.assert_close(found.value, M.solve(vectors))


def test_dampened_lissa_solves_the_shifted_system() -> None:
    operator, vectors = spd_operator(SIZE), random(2, SIZE, seed=1)
    found = LiSSA(dampen=0.1, scale=2.0, rtol=1e-10, maxiter=5000).solve(operator, vectors)
    shifted = operator.matrix + 0.1 * 2.0 * torch.eye(SIZE).double()
    torch.testing.assert_close(found.value, torch.linalg.solve(shifted, vectors.T).T)
    assert bool(found.info.converged.all())
    assert float(found.info.residual.min()) > 0.1  # of the system that was asked for


def batched(noise: float) -> DenseOperator:
    """Four batches around a well-conditioned mean."""
    parts = torch.stack([noise * symmetric(random(SIZE, SIZE, seed=20 + k)) / 10 for k in range(4)])
    return DenseOperator(parts - parts.mean(0) + symmetric(spd(SIZE, condition=4)))


def test_sampled_batches_scatter_around_the_solution() -> None:
    operator, vectors = batched(0.5), random(1, SIZE, seed=1)
    truth = torch.linalg.solve(operator.matrix, vectors.T).T
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(40):
            solver = LiSSA(scale=2.0, sampling="batch", maxiter=150, seed=seed)
            found.append(solver.solve(operator, vectors).value)
    error = [float((value - truth).norm() / truth.norm()) for value in found]
    mean_error = float((torch.stack(found).mean(0) - truth).norm() / truth.norm())
    assert min(error) > 1e-3  # each has noise
    assert mean_error < 0.35 * sum(error) / len(error)  # forty draws leave a sixth of it, and little bias


def test_a_decaying_step_reduces_the_noise_of_sampled_batches() -> None:
    operator, vectors = batched(0.5), random(1, SIZE, seed=1)
    M = DensePreconditioner(torch.eye(SIZE).double())
    truth = torch.linalg.solve(operator.matrix, vectors.T).T

    def error(step: object) -> float:
        solver = PreconditionedNeumann(M, step=step, sampling="batch", maxiter=400, rtol=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float((solver.solve(operator, vectors).value - truth).norm() / truth.norm())

    assert error(lambda k: 1 / (1 + k / 20)) < 0.5 * error(1.0)


def test_lissa_says_that_it_diverges_and_what_scale_would_do() -> None:
    with pytest.raises(DivergenceError, match=r"LiSSA diverges with scale 0.4 .*eigenvalue is about 1.*`scale`"):
        LiSSA(scale=0.4).solve(spd_operator(SIZE), random(2, SIZE, seed=1))


def test_slow_divergence_is_not_taken_for_slow_convergence() -> None:
    operator = spd_operator(SIZE)  # largest eigenvalue 1: each step multiplies the error by -1.04
    with pytest.raises(DivergenceError, match="LiSSA diverges"):
        LiSSA(scale=0.49, maxiter=100).solve(operator, random(2, SIZE, seed=1))


def test_neumann_says_that_it_diverges() -> None:
    M = DensePreconditioner(0.3 * torch.eye(SIZE).double())
    with pytest.raises(DivergenceError, match=r"eigenvalue is about 3\.3.*`step` must be below 0\.6"):
        PreconditionedNeumann(M).solve(spd_operator(SIZE), random(2, SIZE, seed=1))


def test_conjugate_gradient_refuses_negative_curvature() -> None:
    operator = DenseOperator(torch.diag(torch.tensor([1.0, -1.0]).double()))
    for solver in (ConjugateGradient(), ConjugateGradient(block=True)):
        with pytest.raises(SolverError, match="not positive definite"):
            solver.solve(operator, torch.tensor([[0.0, 1.0]]).double())


def test_exact_solves_an_indefinite_matrix_and_refuses_a_singular_one() -> None:
    operator = DenseOperator(torch.diag(torch.tensor([1.0, -2.0]).double()))
    assert Exact().solve(operator, torch.tensor([[1.0, 1.0]]).double()).value.tolist() == [[1.0, -0.5]]
    with pytest.raises(SolverError, match="singular"):
        Exact().solve(DenseOperator(torch.diag(torch.tensor([1.0, 0.0]))), torch.ones(1, 2))


def test_nystroem_refuses_negative_curvature() -> None:
    operator = DenseOperator(torch.diag(torch.tensor([1.0, -2.0, 3.0]).double()))
    with pytest.raises(SolverError, match="negative eigenvalues"):
        Nystroem(rank=3).solve(operator, torch.ones(1, 3).double())


@pytest.mark.parametrize(
    "solver",
    [ConjugateGradient(maxiter=2), ConjugateGradient(maxiter=2, block=True), LiSSA(maxiter=2), Nystroem(rank=2)],
    ids=["cg", "cg block", "lissa", "nystroem"],
)
def test_what_does_not_converge_is_said(solver: Solver) -> None:
    with pytest.warns(UserWarning, match=r"of 2 right-hand sides did not converge; .*raise"):
        found = solver.solve(spd_operator(SIZE), random(2, SIZE, seed=1))
    assert not bool(found.info.converged.any())
    assert float(found.info.residual.min()) > 1e-3


class Wrong(Exact):
    """Claims that twice the negative solution is one."""

    def _solve(self, operator: CurvatureOperator, vectors: Tensor) -> Draft:
        return Draft(-2 * super()._solve(operator, vectors).value, 1, torch.ones(len(vectors), dtype=torch.bool))


def test_what_is_worse_than_zero_is_said_whatever_the_criterion_says() -> None:
    with pytest.warns(UserWarning, match=r"Wrong: 2 of 2 solutions are worse than x = 0; .* is 3;"):
        Wrong().solve(spd_operator(), random(2, 20))


def test_arnoldi_says_that_its_eigenpairs_are_not_right() -> None:
    with pytest.warns(UserWarning, match="did not converge"):
        found = Arnoldi(rank=5, maxiter=6).solve(spd_operator(SIZE), random(2, SIZE, seed=1))
    assert not bool(found.info.converged.any())


@pytest.mark.parametrize("vectors", [torch.ones(SIZE), torch.ones(2, 3), torch.full((1, SIZE), torch.nan)])
def test_unfit_vectors_are_refused(vectors: Tensor) -> None:
    with pytest.raises(ValueError, match="`vectors` must"):
        Exact().solve(spd_operator(SIZE), vectors)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ConjugateGradient(rtol=0), "rtol"),
        (lambda: ConjugateGradient(atol=-1), "atol"),
        (lambda: ConjugateGradient(maxiter=0), "maxiter"),
        (lambda: LiSSA(scale=-1), "scale"),
        (lambda: LiSSA(dampen=1), "dampen"),
        (lambda: LiSSA(sampling="some"), "sampling"),
        (lambda: PreconditionedNeumann(near(spd(3)), step=0), "step"),
        (lambda: Arnoldi(rank=0), "rank"),
        (lambda: Arnoldi(rank=1, complement="keep"), "complement"),
        (lambda: Nystroem(rank=0), "rank"),
        (lambda: DenseOperator(torch.eye(2), regularization=-1), "hessian_regularization"),
        (lambda: DenseOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "matrix"),
    ],
)
def test_impossible_settings_are_refused_by_name(make: object, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must"):
        make()


def test_a_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="`x0` must have shape"):
        ConjugateGradient(x0=torch.ones(3)).solve(spd_operator(SIZE), random(2, SIZE, seed=1))


def test_a_solver_leaves_the_right_hand_sides_alone() -> None:
    vectors = random(2, SIZE, seed=1)
    for solver in CONVERGENT.values():
        kept = vectors.clone()
        solver.solve(spd_operator(SIZE), vectors)
        assert torch.equal(kept, vectors)
