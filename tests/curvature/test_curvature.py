"""Each curvature's damped inverse equals the dense matrix's, and damping means what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_influence.curvature import (
    AbsoluteDamping,
    Curvature,
    Damping,
    HeuristicDamping,
    as_damping,
    basis_of,
    get_curvature,
    register_curvature,
)
from lightning_influence.curvature import base as registry
from lightning_influence.functional.covariance import covariance
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, eigenbasis
from lightning_influence.gradients import FactoredGradient, LayerGradient
from tests.reference import curvature as dense
from tests.reference.activations import LayerActivations
from tests.reference.factors import unvec, vec
from tests.reference.models import random

# float64; the smallest damped eigenvalue is some 1e-2 of the largest
EXACT = {"rtol": 1e-9, "atol": 1e-10}
HEURISTIC, ABSOLUTE = dense.heuristic_damping(0.1), dense.absolute_damping(0.3)
CASES = {
    "ekfac-heuristic": ("ekfac", HeuristicDamping(0.1), dense.ekfac_curvature(HEURISTIC)),
    "ekfac-absolute": ("ekfac", AbsoluteDamping(0.3), dense.ekfac_curvature(ABSOLUTE)),
    "kfac-heuristic": ("kfac", HeuristicDamping(0.1), dense.kfac_curvature(HEURISTIC)),
    "kfac-absolute": ("kfac", AbsoluteDamping(0.3), dense.kfac_curvature(ABSOLUTE)),
    "diagonal-heuristic": ("diagonal", HeuristicDamping(0.1), dense.diagonal_curvature(HEURISTIC)),
    "diagonal-absolute": ("diagonal", AbsoluteDamping(0.3), dense.diagonal_curvature(ABSOLUTE)),
    "identity": ("identity", HeuristicDamping(0.1), dense.identity_curvature),
}


def layer(s: int = 2, shape: tuple[int, int] = (3, 4)) -> LayerGradient:
    o, i = shape
    mixing_in, mixing_out = random(i, i, seed=5), random(o, o, seed=6)
    return FactoredGradient(random(20, s, i, seed=1) @ mixing_in, random(20, s, o, seed=2) @ mixing_out)


def factors(gradient: LayerGradient) -> tuple[Eigenbasis, Tensor]:
    basis = eigenbasis(*covariance(gradient))
    return basis, second_moment_sum(gradient, basis) / len(gradient)


def preconditioned(gradient: LayerGradient, curvature: str, damping: Damping) -> Tensor:
    basis, Lambda = factors(gradient)
    inverse = get_curvature(curvature).inverse_eigenvalues(basis, Lambda, damping)
    own = basis_of(get_curvature(curvature), basis)
    return own.rotate_back(own.rotate(gradient) * inverse)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (3, 1)])
@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_inverse_equals_the_dense_matrix(case: str, s: int, shape: tuple[int, int]) -> None:
    curvature, damping, reference = CASES[case]
    gradient = layer(s, shape)
    matrix = reference(LayerActivations(gradient.inputs, gradient.output_grads))
    expected = unvec(torch.linalg.solve(matrix, vec(gradient.dense()).T).T, shape)
    torch.testing.assert_close(preconditioned(gradient, curvature, damping), expected, **EXACT)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal"])
def test_huge_damping_gives_the_order_of_plain_dot_products(curvature: str) -> None:
    gradient = layer()
    plain = gradient.dense().flatten(1) @ gradient.dense().flatten(1).T
    damped = preconditioned(gradient, curvature, AbsoluteDamping(1e9)).flatten(1) @ gradient.dense().flatten(1).T
    assert torch.equal(damped.argsort(dim=1), plain.argsort(dim=1))
    # 1 / (Lambda + damping) differs from 1 / damping by Lambda / damping, some 1e-7 here
    torch.testing.assert_close(1e9 * damped, plain, rtol=1e-5, atol=1e-4)


def test_damping_has_no_effect_on_the_identity() -> None:
    gradient = layer()
    few, much = (preconditioned(gradient, "identity", AbsoluteDamping(value)) for value in (1e-3, 1e3))
    assert torch.equal(few, much)


def test_ekfac_ignores_the_scale_of_the_covariances() -> None:
    gradient = layer()
    A, S = covariance(gradient)
    basis, other = eigenbasis(A, S), eigenbasis(17 * A, S / 5)
    inverses = [
        get_curvature("ekfac").inverse_eigenvalues(
            each, second_moment_sum(gradient, each) / len(gradient), HeuristicDamping()
        )
        for each in (basis, other)
    ]
    torch.testing.assert_close(*inverses, **EXACT)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "identity"])
def test_a_layer_without_gradient_says_nothing(curvature: str) -> None:
    nothing = FactoredGradient(random(5, 1, 4), torch.zeros(5, 1, 3, dtype=torch.float64))
    assert not preconditioned(nothing, curvature, HeuristicDamping()).any()  # zeros, not NaN


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal"])
def test_a_direction_without_gradient_is_damped_and_finite(curvature: str) -> None:
    gradient = layer(1)
    gradient.output_grads[..., 0] = 0
    assert bool(preconditioned(gradient, curvature, HeuristicDamping()).isfinite().all())


def test_heuristic_damping_is_a_share_of_the_mean() -> None:
    assert HeuristicDamping(0.25)(torch.tensor([[2.0, 6.0]])).item() == 1.0
    assert HeuristicDamping().factor == 1.0


@pytest.mark.parametrize("factor", [0.0, -0.1, math.nan, math.inf])
def test_heuristic_damping_refuses_other_than_positive_factors(factor: float) -> None:
    with pytest.raises(ValueError, match="`factor` must be positive and finite"):
        HeuristicDamping(factor)


@pytest.mark.parametrize("make", [as_damping, AbsoluteDamping])
@pytest.mark.parametrize("value", [0, 0.0, -1e-3, math.nan, math.inf])
def test_a_damping_number_must_be_positive(value: float, make) -> None:
    with pytest.raises(ValueError, match=r"`damping` must be positive and finite.*HeuristicDamping\(\)"):
        make(value)


@pytest.mark.parametrize("value", [True, "0.1", None, [0.1]])
def test_a_damping_must_be_a_number_or_a_rule(value: object) -> None:
    with pytest.raises(TypeError, match=r"must be a positive number, a rule such as HeuristicDamping"):
        as_damping(value)


def test_a_number_is_an_absolute_damping() -> None:
    assert as_damping(2) == AbsoluteDamping(2.0)
    rule = HeuristicDamping(0.3)
    assert as_damping(rule) is rule


def test_any_callable_is_a_rule() -> None:
    gradient = layer()
    found = preconditioned(gradient, "ekfac", as_damping(lambda eigenvalues: eigenvalues.max()))
    basis, Lambda = factors(gradient)
    assert torch.equal(found, preconditioned(gradient, "ekfac", AbsoluteDamping(Lambda.max().item())))
    assert basis.shape == Lambda.shape


def test_an_unknown_curvature_lists_the_known() -> None:
    known = r"\['diagonal', 'ekfac', 'empirical_fisher', 'identity', 'kfac'\]"
    with pytest.raises(ValueError, match=f"must be one of {known}, got 'hessian'"):
        get_curvature("hessian")


def test_the_diagonal_has_the_mean_of_lambda() -> None:
    basis, Lambda = factors(layer())
    torch.testing.assert_close(basis.diagonal(Lambda).mean(), Lambda.mean(), **EXACT)


class Halved:
    """Twice the identity."""

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        return torch.full_like(Lambda, 0.5)


def test_an_own_curvature_is_taken_as_it_is() -> None:
    own: Curvature = Halved()
    assert get_curvature(own) is own


def test_a_registered_curvature_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CURVATURES", dict(registry._CURVATURES))
    own = Halved()
    register_curvature("halved", own)
    assert get_curvature("halved") is own
