"""The slow twins of gradients, activations and factors agree with each other and with theory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.reference.activations import LayerActivations, collect_activations
from tests.reference.curvature import ekfac_matrix, kfac_matrix
from tests.reference.factors import covariances, eigenbasis, eigenvalue_correction, fisher_block, unvec, vec
from tests.reference.gradients import (
    flat_gradients,
    linear_layer_names,
    parameter_gradients,
    per_example_gradients,
)
from tests.reference.models import (
    classification_examples,
    classification_loss,
    random,
    seeded_classifier,
    seeded_token_model,
    token_examples,
    token_loss,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums of a few dozen terms in another order


# Gradients and activations


@pytest.mark.parametrize("n", [1, 6])
def test_sum_of_per_example_gradients_is_the_batch_gradient(n: int) -> None:
    model = seeded_classifier()
    examples = classification_examples(n)
    summed = flat_gradients(model, examples, classification_loss).sum(dim=0)
    batch_model = seeded_classifier().double()
    features, labels = (torch.stack(column) for column in zip(*examples, strict=True))
    F.cross_entropy(batch_model(features.double()), labels, reduction="sum").backward()
    expected = torch.cat([p.grad.flatten() for p in batch_model.parameters()])
    torch.testing.assert_close(summed, expected, **EXACT)


def test_gradients_equal_finite_differences() -> None:
    model = seeded_classifier().double()
    (example,) = classification_examples(1)
    example = (example[0].double(), example[1])
    gradient = per_example_gradients(model, [example], classification_loss, ["first"])["first"][0]
    step = 1e-6
    with torch.no_grad():
        for o, i in [(0, 0), (3, 1), (2, 4)]:
            model.first.weight[o, i] += step
            above = classification_loss(model, example)
            model.first.weight[o, i] -= 2 * step
            below = classification_loss(model, example)
            model.first.weight[o, i] += step
            # central differences: error O(step²) plus rounding eps/step, together below 1e-8
            assert gradient[o, i].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-8)


def test_bias_gradient_is_the_last_column() -> None:
    model, examples = seeded_classifier(), classification_examples(4)
    by_parameter = parameter_gradients(model, examples, classification_loss)
    by_layer = per_example_gradients(model, examples, classification_loss, ["first", "last"])
    assert by_layer["first"].shape == (4, 4, 6)
    assert by_layer["last"].shape == (4, 3, 5)
    assert torch.equal(by_layer["first"][..., :-1], by_parameter["first.weight"])
    assert torch.equal(by_layer["first"][..., -1], by_parameter["first.bias"])


def test_without_or_with_a_frozen_bias_there_is_no_bias_column() -> None:
    without, frozen = seeded_classifier(has_bias=False), seeded_classifier()
    frozen.first.bias.requires_grad_(False)
    examples = classification_examples(3)
    for model in (without, frozen):
        gradients = per_example_gradients(model, examples, classification_loss, ["first"])
        activations = collect_activations(model, examples, classification_loss, ["first"])
        assert gradients["first"].shape == (3, 4, 5)
        assert activations["first"].inputs.shape == (3, 1, 5)


def test_model_is_left_as_it_was() -> None:
    model = seeded_classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_activations(model, classification_examples(2), classification_loss, ["first"])
    flat_gradients(model, classification_examples(2), classification_loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert not model.first._forward_hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("has_bias", [True, False])
def test_sums_of_outer_products_are_the_gradients(has_bias: bool) -> None:
    model, examples = seeded_classifier(has_bias=has_bias), classification_examples(5)
    layers = linear_layer_names(model)
    assert layers == ["first", "last"]
    gradients = per_example_gradients(model, examples, classification_loss, layers)
    activations = collect_activations(model, examples, classification_loss, layers)
    for name in layers:
        torch.testing.assert_close(activations[name].gradients(), gradients[name], **EXACT)


def test_sums_of_outer_products_are_the_gradients_of_sequences_and_reused_layers() -> None:
    model, examples = seeded_token_model(), token_examples([5, 2, 4])
    layers = linear_layer_names(model)
    gradients = per_example_gradients(model, examples, token_loss, layers)
    activations = collect_activations(model, examples, token_loss, layers)
    assert activations["down"].inputs.shape == (3, 5, 7)
    assert activations["mix"].inputs.shape == (3, 10, 4)  # called twice, no bias
    for name in layers:
        torch.testing.assert_close(activations[name].gradients(), gradients[name], **EXACT)


def test_unused_layer_has_zero_gradient_and_no_positions() -> None:
    model = seeded_classifier()
    model.unused = torch.nn.Linear(2, 3)
    examples = classification_examples(2)
    gradients = per_example_gradients(model, examples, classification_loss, ["unused"])["unused"]
    activations = collect_activations(model, examples, classification_loss, ["unused"])["unused"]
    assert torch.equal(gradients, torch.zeros(2, 3, 3, dtype=torch.float64))
    assert torch.equal(activations.gradients(), gradients)
    assert activations.inputs.shape == (2, 0, 3)


def test_activations_of_another_layer_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"nn\.Linear layer, got LayerNorm"):
        collect_activations(seeded_classifier(), classification_examples(1), classification_loss, ["norm"])


# Factors


def test_vec_turns_two_sided_products_into_kronecker_products() -> None:
    L, G, R = random(3, 3, seed=1), random(3, 4, seed=2), random(4, 4, seed=3)
    torch.testing.assert_close(torch.kron(R.T.contiguous(), L) @ vec(G), vec(L @ G @ R), **EXACT)
    assert torch.equal(unvec(vec(G), (3, 4)), G)
    assert vec(G)[1 * 3 + 2] == G[2, 1]


def test_gradient_of_one_position_is_the_kronecker_product_of_input_and_output_gradient() -> None:
    d, a = random(3, seed=1), random(5, seed=2)
    torch.testing.assert_close(vec(torch.outer(d, a)), torch.kron(a, d), **EXACT)


def test_covariances_count_inputs_by_position_and_output_gradients_by_example() -> None:
    a, d = random(4, 3, 5, seed=1), random(4, 3, 2, seed=2)
    A, S = covariances(a, d)
    torch.testing.assert_close(A, torch.einsum("nsi,nsj->ij", a, a) / 12, **EXACT)
    torch.testing.assert_close(S, torch.einsum("nso,nsp->op", d, d) / 4, **EXACT)


def test_positions_without_gradient_do_not_count() -> None:
    a, d = random(4, 3, 5, seed=1), random(4, 3, 2, seed=2)
    d[:, 2] = 0
    A, S = covariances(a, d)
    A_short, S_short = covariances(a[:, :2], d[:, :2])
    torch.testing.assert_close(A, A_short, **EXACT)
    torch.testing.assert_close(S, S_short, **EXACT)
    everywhere = torch.ones(4, 3, dtype=torch.bool)
    A_all, S_all = covariances(a, d, valid=everywhere)
    torch.testing.assert_close(A_all, torch.einsum("nsi,nsj->ij", a, a) / 12, **EXACT)
    torch.testing.assert_close(S_all, S, **EXACT)


def test_ignored_and_padded_tokens_do_not_count() -> None:
    examples = token_examples([5, 2, 4])  # the last target of each is ignored
    head = collect_activations(seeded_token_model(), examples, token_loss, ["head"])["head"]
    A, _ = covariances(head.inputs, head.output_grads)
    kept = torch.cat([head.inputs[0, :4], head.inputs[1, :1], head.inputs[2, :3]])
    torch.testing.assert_close(A, kept.T @ kept / 8, **EXACT)


def test_eigenbasis_rebuilds_the_covariances() -> None:
    A, S = covariances(random(9, 1, 4), random(9, 1, 3, seed=1))
    basis = eigenbasis(A, S)
    torch.testing.assert_close(basis.Q_A @ torch.diag(basis.eigenvalues_A) @ basis.Q_A.T, A, **EXACT)
    torch.testing.assert_close(basis.Q_S @ torch.diag(basis.eigenvalues_S) @ basis.Q_S.T, S, **EXACT)


@pytest.mark.parametrize(("n", "s", "i", "o"), [(1, 1, 3, 2), (7, 1, 2, 5), (6, 4, 5, 3)])
def test_lambda_equals_diagonal_of_rotated_fisher(n: int, s: int, i: int, o: int) -> None:
    layer = LayerActivations(random(n, s, i, seed=1), random(n, s, o, seed=2))
    gradients = layer.gradients()
    basis = eigenbasis(*covariances(layer.inputs, layer.output_grads))
    Lambda = eigenvalue_correction(gradients, basis.Q_A, basis.Q_S)
    Q = torch.kron(basis.Q_A, basis.Q_S)
    rotated = Q.T @ fisher_block(gradients) @ Q
    torch.testing.assert_close(vec(Lambda), rotated.diagonal(), **EXACT)


def test_lambda_is_the_best_diagonal_in_its_basis() -> None:
    layer = LayerActivations(random(8, 2, 4, seed=1), random(8, 2, 3, seed=2))
    F_block = fisher_block(layer.gradients())
    A, S = covariances(layer.inputs, layer.output_grads)
    basis = eigenbasis(A, S)
    Lambda = eigenvalue_correction(layer.gradients(), basis.Q_A, basis.Q_S)
    ekfac_error = (ekfac_matrix(basis.Q_A, basis.Q_S, Lambda, 0.0) - F_block).norm()
    assert ekfac_error < (kfac_matrix(A, S, 0.0) - F_block).norm()


def test_trace_of_lambda_is_the_mean_squared_gradient_norm() -> None:
    layer = LayerActivations(random(8, 2, 4, seed=1), random(8, 2, 3, seed=2))
    basis = eigenbasis(*covariances(layer.inputs, layer.output_grads))
    Lambda = eigenvalue_correction(layer.gradients(), basis.Q_A, basis.Q_S)
    norms = layer.gradients().flatten(1).norm(dim=1)
    torch.testing.assert_close(Lambda.sum(), (norms**2).mean(), **EXACT)


@pytest.mark.parametrize("s", [1, 3])
def test_lambda_approaches_products_of_eigenvalues_when_inputs_and_gradients_are_independent(s: int) -> None:
    n, i, o = 20_000, 4, 3
    a = random(n, s, i, seed=1) @ random(i, i, seed=3)
    d = random(n, s, o, seed=2) @ random(o, o, seed=4)
    basis = eigenbasis(*covariances(a, d))
    gradients = torch.einsum("nso,nsi->noi", d, a)
    Lambda = eigenvalue_correction(gradients, basis.Q_A, basis.Q_S)
    expected = torch.outer(basis.eigenvalues_S, basis.eigenvalues_A)
    # (xy)² of independent normals has variance 8, so one entry's relative error has standard
    # deviation sqrt(8 / 20,000) = 2 %; 10 % is five of them.
    torch.testing.assert_close(Lambda, expected, rtol=0.1, atol=0.0)
