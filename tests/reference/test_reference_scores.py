"""The slow twins of curvatures and scores agree with each other and with theory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.reference.activations import LayerActivations
from tests.reference.curvature import (
    absolute_damping,
    ekfac_curvature,
    ekfac_matrix,
    heuristic_damping,
    identity_curvature,
    kfac_curvature,
    kfac_matrix,
)
from tests.reference.factors import covariances, eigenbasis, eigenvalue_correction, unvec, vec
from tests.reference.gradients import linear_layer_names, per_example_gradients
from tests.reference.models import (
    classification_examples,
    classification_loss,
    random,
    seeded_classifier,
    seeded_token_model,
    token_examples,
    token_loss,
)
from tests.reference.scores import (
    influence_scores,
    loss_influence_scores,
    reference_scores,
    removal_effect,
    self_influence,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums of a few dozen terms in another order


def ekfac_parts(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients [n, o, i], Q_A, Q_S and Lambda of random activations."""
    layer = LayerActivations(random(9, 2, 4, seed=seed), random(9, 2, 3, seed=seed + 1))
    basis = eigenbasis(*covariances(layer.inputs, layer.output_grads))
    gradients = layer.gradients()
    Lambda = eigenvalue_correction(gradients, basis.Q_A, basis.Q_S)
    return gradients, basis.Q_A, basis.Q_S, Lambda


def test_ekfac_inverse_is_symmetric_positive_and_rotates_as_published() -> None:
    gradients, Q_A, Q_S, Lambda = ekfac_parts()
    H = ekfac_matrix(Q_A, Q_S, Lambda, 0.3)
    inverse = torch.linalg.inv(H)
    torch.testing.assert_close(inverse, inverse.T, **EXACT)
    assert torch.linalg.eigvalsh(inverse).min() > 0
    # Grosse et al. 2023, arXiv:2308.03296: rotate, divide, rotate back
    G = gradients[0]
    expected = Q_S @ ((Q_S.T @ G @ Q_A) / (Lambda + 0.3)) @ Q_A.T
    torch.testing.assert_close(unvec(inverse @ vec(G), (3, 4)), expected, **EXACT)


def test_kfac_is_ekfac_with_products_of_eigenvalues() -> None:
    A, S = covariances(random(9, 2, 4, seed=1), random(9, 2, 3, seed=2))
    basis = eigenbasis(A, S)
    products = torch.outer(basis.eigenvalues_S, basis.eigenvalues_A)
    torch.testing.assert_close(kfac_matrix(A, S, 0.2), ekfac_matrix(basis.Q_A, basis.Q_S, products, 0.2), **EXACT)


def test_heuristic_damping_scales_with_each_layers_own_mean() -> None:
    Lambda = random(3, 4) ** 2
    assert heuristic_damping(0.1)(Lambda) == pytest.approx(0.1 * Lambda.mean().item())
    assert absolute_damping(0.7)(Lambda) == 0.7


def test_ekfac_ignores_the_scale_of_the_covariances() -> None:
    layer = LayerActivations(random(9, 2, 4, seed=1), random(9, 2, 3, seed=2))
    A, S = covariances(layer.inputs, layer.output_grads)
    basis = eigenbasis(17.0 * A, S / 5.0)
    Lambda = eigenvalue_correction(layer.gradients(), basis.Q_A, basis.Q_S)
    torch.testing.assert_close(
        ekfac_matrix(basis.Q_A, basis.Q_S, Lambda, 0.3),
        ekfac_curvature(absolute_damping(0.3))(layer),
        **EXACT,
    )


@pytest.mark.parametrize("curvature", [ekfac_curvature, kfac_curvature])
def test_infinite_damping_gives_dot_products(curvature) -> None:
    model, examples = seeded_classifier(), classification_examples(12)
    queries = classification_examples(3, seed=9)
    arguments = (model, examples, queries, classification_loss, ["first", "last"])
    damping = 1e9
    damped = reference_scores(*arguments, curvature=curvature(absolute_damping(damping)))
    plain = reference_scores(*arguments, curvature=identity_curvature)
    # (Lambda + damping)⁻¹ differs from 1 / damping by Lambda / damping, about 1e-9
    torch.testing.assert_close(damping * damped, plain, rtol=1e-6, atol=1e-8)
    assert torch.equal(damped.argsort(dim=1), plain.argsort(dim=1))


def test_plain_scores_are_dot_products_of_gradients() -> None:
    model, examples = seeded_classifier(), classification_examples(6)
    layers = ["first", "last"]
    flat = [
        gradient.flatten(1)
        for gradient in per_example_gradients(model, examples, classification_loss, layers).values()
    ]
    scores = reference_scores(model, examples, examples, classification_loss, layers, curvature=identity_curvature)
    torch.testing.assert_close(scores, torch.cat(flat, 1) @ torch.cat(flat, 1).T, **EXACT)


def classifier_scores() -> Tensor:
    """EK-FAC scores of 12 examples among themselves, [n, n]."""
    model, examples = seeded_classifier(), classification_examples(12)
    return reference_scores(
        model,
        examples,
        examples,
        classification_loss,
        ["first", "last"],
        curvature=ekfac_curvature(heuristic_damping(0.1)),
    )


def test_scores_among_examples_are_symmetric_and_positive_semidefinite() -> None:
    scores = classifier_scores()
    torch.testing.assert_close(scores, scores.T, **EXACT)
    assert torch.linalg.eigvalsh(scores).min() > -1e-10 * scores.diagonal().max()


def test_copy_of_the_query_has_the_largest_normalised_score() -> None:
    scores = classifier_scores()
    # Cauchy-Schwarz in the H⁻¹ inner product: K_qm <= sqrt(K_qq K_mm), equal at m = q
    cosines = scores / scores.diagonal().sqrt()
    assert torch.equal(cosines.argmax(dim=1), torch.arange(12))


def test_copy_of_the_query_outranks_all_with_no_more_self_influence() -> None:
    scores = classifier_scores()
    own = scores.diagonal()
    no_larger = own[None, :] <= own[:, None]
    assert bool((scores <= own[:, None] + 1e-12)[no_larger].all())
    strongest = int(own.argmax())
    assert int(scores[strongest].argmax()) == strongest


def test_self_influence_is_the_diagonal_and_positive() -> None:
    gradients, Q_A, Q_S, Lambda = ekfac_parts()
    matrices = {"layer": ekfac_matrix(Q_A, Q_S, Lambda, 0.1)}
    own = self_influence({"layer": gradients}, matrices)
    one_by_one = [vec(G) @ torch.linalg.inv(matrices["layer"]) @ vec(G) for G in gradients]
    torch.testing.assert_close(own, torch.stack(one_by_one), **EXACT)
    assert bool((own > 0).all())


def test_measurement_minus_loss_is_the_default() -> None:
    gradients, Q_A, Q_S, Lambda = ekfac_parts()
    matrices = {"layer": ekfac_matrix(Q_A, Q_S, Lambda, 0.1)}
    torch.testing.assert_close(
        loss_influence_scores({"layer": gradients}, {"layer": gradients}, matrices),
        -influence_scores({"layer": gradients}, {"layer": gradients}, matrices),
        **EXACT,
    )


def test_scores_of_layers_add_up() -> None:
    model, examples = seeded_token_model(), token_examples([4, 3, 5, 4, 2])
    layers = linear_layer_names(model)
    curvature = ekfac_curvature(heuristic_damping(0.1))
    together = reference_scores(model, examples, examples[:2], token_loss, layers, curvature=curvature)
    apart = [
        reference_scores(model, examples, examples[:2], token_loss, [name], curvature=curvature) for name in layers
    ]
    assert together.shape == (2, 5)
    torch.testing.assert_close(together, torch.stack(apart).sum(dim=0), **EXACT)


def test_scores_follow_a_permutation_of_the_examples() -> None:
    model, examples = seeded_classifier(), classification_examples(8)
    queries = classification_examples(2, seed=5)
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    curvature = ekfac_curvature(heuristic_damping(0.1))
    scores = reference_scores(model, examples, queries, classification_loss, ["first"], curvature=curvature)
    permuted = reference_scores(
        model, [examples[m] for m in order], queries, classification_loss, ["first"], curvature=curvature
    )
    torch.testing.assert_close(permuted, scores[:, order], **EXACT)


def test_removal_effect_is_minus_the_mean_score_share() -> None:
    scores = random(2, 5)
    expected = -(scores[:, 1] + scores[:, 4]) / 5
    torch.testing.assert_close(removal_effect(scores, [1, 4]), expected, **EXACT)
