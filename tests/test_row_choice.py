"""Bytes for an error: as few as measured to be enough, and the error is what other examples find, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lightning_influence.codecs import EigenCodec, allocate
from lightning_influence.functional.kronecker import Eigenbasis, eigenbasis
from lightning_influence.gradients import DenseGradient
from lightning_influence.row_choice import DEFAULT_BYTES, UNLIMITED, RowTrial, bytes_untried

SHAPES = {"one": (24, 30), "two": (16, 40)}


def drawn(n: int, seed: int) -> dict[str, DenseGradient]:
    """Gradients whose coordinates fall over three decades, in no basis."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (o, i) in SHAPES.items():
        sizes = torch.logspace(0, -1.5, o).unsqueeze(1) * torch.logspace(0, -1.5, i)
        found[name] = DenseGradient(torch.randn(n, o, i, generator=generator) * sizes)
    return found


def bases() -> dict[str, Eigenbasis]:
    return {name: eigenbasis(torch.eye(i), torch.eye(o)) for name, (o, i) in SHAPES.items()}


def trial() -> tuple[RowTrial, dict[str, torch.Tensor], dict[str, DenseGradient]]:
    gradients = drawn(128, 0)
    known = bases()
    Lambdas = {name: known[name].rotate(g).square().mean(0) for name, g in drawn(512, 1).items()}
    return RowTrial(known, Lambdas, gradients), Lambdas, gradients


def test_the_error_is_one_minus_spearman_of_decoded_rows() -> None:
    """The slow twin, from decoded rows and dense gradients, in float64."""
    tried, Lambdas, gradients = trial()
    chosen, known = allocate(Lambdas, 300), bases()
    coded, exact = torch.zeros(16, 128, dtype=torch.float64), torch.zeros(16, 128, dtype=torch.float64)
    for name, gradient in gradients.items():
        Lambda, rotated = Lambdas[name].double(), known[name].rotate(gradient).double()
        asked = (rotated[:16] / (Lambda + 0.1 * Lambda.mean())).flatten(1)
        codec = EigenCodec.of(known[name], chosen[name])
        decoded = codec.decode(codec.encode(gradient))
        coded += asked @ known[name].rotate_dense(decoded).double().flatten(1).T
        exact += asked @ rotated.flatten(1).T
    others = [[n for n in range(128) if n != q] for q in range(16)]
    expected = np.mean([spearmanr(coded[q, rest], exact[q, rest]).statistic for q, rest in enumerate(others)])
    assert tried.error(chosen) == pytest.approx(1 - expected, abs=1e-4)  # float32 may swap near ties


@pytest.mark.parametrize("error", [0.3, 0.1, 0.03, 0.005])
def test_the_fewest_bytes_that_reach_an_error_are_found(error: float) -> None:
    tried, Lambdas, _ = trial()
    nbytes = tried.least_bytes(error)
    assert tried.error(allocate(Lambdas, nbytes)) <= error
    assert tried.error(allocate(Lambdas, int(0.85 * nbytes))) > error


def test_fewer_bytes_are_needed_for_a_larger_error() -> None:
    tried, _, _ = trial()
    sizes = [tried.least_bytes(error) for error in (0.003, 0.01, 0.03, 0.1, 0.3)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]


def test_other_examples_find_the_same_error() -> None:
    """Within .02, as correlations of 128 scores of 16 queries scatter."""
    tried, Lambdas, _ = trial()
    chosen = allocate(Lambdas, tried.least_bytes(0.05))
    assert RowTrial(bases(), Lambdas, drawn(128, 7)).error(chosen) == pytest.approx(0.05, abs=0.02)


def test_no_more_than_the_most_is_taken() -> None:
    assert trial()[0].least_bytes(1e-9, most=200) <= 200


def test_too_few_examples_get_the_usual_bytes_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"`error_budget` .* 4 are too few .* up to 8,192 bytes"):
        assert bytes_untried(4, UNLIMITED) == DEFAULT_BYTES
    with pytest.warns(UserWarning, match="up to 100 bytes"):
        assert bytes_untried(4, 100) == 100
