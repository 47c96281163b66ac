"""The tap sees what was back-propagated, changes nothing and leaves nothing behind."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.losses import LossTap

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 0])


def train_step(model: nn.Module) -> Tensor:
    loss = F.cross_entropy(model(X), LABELS)
    loss.backward()
    return loss


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_loss_and_gradients_are_bit_identical_under_the_tap():
    def step(model):
        loss = F.cross_entropy(F.dropout(model(X), 0.5), LABELS, label_smoothing=0.1)
        loss = loss + F.mse_loss(model(X), X[:, :2], reduction="none").mean()
        loss.backward()
        return loss

    plain, tapped = linear(), linear()
    expected = step(plain)
    torch.manual_seed(0)
    nn.Linear(3, 2)  # the same random state before dropout
    with LossTap():
        loss = step(tapped)
    assert torch.equal(loss, expected)
    assert torch.equal(tapped.weight.grad, plain.weight.grad)


@pytest.mark.skipif("weight" not in F.l1_loss.__code__.co_varnames, reason="torch too old")
def test_weight_that_l1_loss_drops_under_a_mode_is_restored():
    output, weight = X.clone().requires_grad_(), torch.tensor([[1.0, 2.0, 0.0]]).expand(4, 3)
    expected = F.l1_loss(output, X + 1 + X**2, weight=weight)
    with LossTap() as tap:
        assert torch.equal(F.l1_loss(output, X + 1 + X**2, weight=weight), expected)
        unweighted = F.l1_loss(output, X + 1 + X**2)
    assert torch.equal(unweighted, F.l1_loss(output, X + 1 + X**2))
    assert ["weight" in call.kwargs for call in tap.calls] == [True, False]


def test_modules_are_seen():
    logits = torch.zeros(4, 2, requires_grad=True)
    with LossTap() as tap:
        nn.CrossEntropyLoss(reduction="sum")(logits, LABELS).backward()
    assert tap.scale(4).description["reduction"] == "sum"


def test_in_place_scaling_of_the_loss_is_seen():
    logits = torch.zeros(4, 2, requires_grad=True)
    with LossTap() as tap:
        loss = F.cross_entropy(logits, LABELS)
        loss *= 0.5
        loss /= 2
        loss.backward()
    assert tap.scale(4).factor == 16


def test_losses_for_logging_only_are_ignored():
    model = linear()
    with LossTap() as tap:
        F.mse_loss(model(X), X[:, :2], reduction="sum").item()
        with torch.no_grad():
            F.l1_loss(model(X), X[:, :2])
        train_step(model)
    assert [call.name for call in tap.calls] == ["mse_loss", "cross_entropy"]
    assert tap.scale(4).description["function"] == "cross_entropy"


def test_loss_of_weight_zero_is_ignored_beside_another():
    model = linear()
    with LossTap() as tap:
        output = model(X)
        total = 0.0 * F.mse_loss(output, X[:, :2], reduction="sum")
        (total + F.cross_entropy(output, LABELS)).backward()
    assert tap.scale(4).description["terms"] == [{"function": "cross_entropy", "reduction": "mean", "weight": 1.0}]


def test_no_recognised_loss_is_refused_with_what_to_declare():
    model = linear()
    with LossTap() as tap:
        F.mse_loss(model(X), X[:, :2])
        (-model(X).log_softmax(1).gather(1, LABELS[:, None]).mean()).backward()
    with pytest.raises(LossNotRecognizedError, match="No recognised loss took part") as refusal:
        tap.scale(4)
    message = str(refusal.value)
    assert "seen in the forward: mse_loss" in message
    assert "cross_entropy, nll_loss, mse_loss, l1_loss" in message
    assert '`loss="mean"` or `loss="sum"`' in message


def test_only_loss_of_weight_zero_is_refused():
    with LossTap() as tap:
        (0 * F.cross_entropy(linear()(X), LABELS)).backward()
    with pytest.raises(LossNotRecognizedError, match="with weight zero only"):
        tap.scale(4)


def test_arguments_changed_in_place_after_the_call_are_refused():
    target = X[:, :2].clone()
    with LossTap() as tap:
        F.l1_loss(linear()(X), target).backward()
    target.zero_()
    with pytest.raises(LossNotRecognizedError, match="An argument of l1_loss was changed in pl"):
        tap.scale(4)


def test_failure_of_our_own_reaches_the_user_only_in_scale(monkeypatch):
    def fail(*args):
        raise RuntimeError("cannot hook")

    monkeypatch.setattr(Tensor, "register_hook", fail)
    with LossTap() as tap:
        train_step(linear())
    with pytest.raises(LossNotRecognizedError, match="cross_entropy: RuntimeError: cannot hook"):
        tap.scale(4)


def test_error_of_the_users_loss_reaches_the_user():
    with LossTap(), pytest.raises(ValueError, match="Expected input batch_size"):
        F.cross_entropy(torch.zeros(3, 2, requires_grad=True), LABELS)


def test_exception_in_the_users_code_leaves_no_mode_active():
    before = len(_get_current_function_mode_stack())

    def fail():
        with LossTap():
            train_step(linear())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(_get_current_function_mode_stack()) == before


def test_entering_again_forgets_the_last_step():
    tap = LossTap()
    for batches in (1, 2):
        with tap:
            for _ in range(batches):
                train_step(linear())
        assert len(tap.calls) == batches
    tap.clear()
    assert tap.calls == []


def test_late_backward_of_an_earlier_step_does_not_count():
    tap = LossTap()
    with tap:
        late = F.mse_loss(linear()(X), X[:, :2], reduction="sum")
    with tap:
        train_step(linear())
        late.backward()
    assert tap.scale(4).description["function"] == "cross_entropy"


def test_graph_is_freed_though_the_tap_keeps_the_arguments():
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient

    gc.disable()  # reference counts alone must do: no cycle
    try:
        with LossTap() as tap:
            output = Identity.apply(linear()(X))
            node = weakref.ref(output.grad_fn)
            loss = F.cross_entropy(output, LABELS)
            loss.backward()
            value = weakref.ref(loss)
        del output, loss
        assert (node(), value()) == (None, None)
    finally:
        gc.enable()
    assert not any(argument.requires_grad for argument in tap.calls[0].args)
    assert not tap.calls[0].constant.requires_grad


def checkpointed_step(reentrant: bool) -> LossTap:
    model, x = linear(), X.clone().requires_grad_()
    with LossTap() as tap:
        loss = checkpoint(lambda x: F.cross_entropy(model(x), LABELS), x, use_reentrant=reentrant)
        (0.5 * loss).backward()
    return tap


def test_loss_inside_activation_checkpointing_counts_once():
    scale = checkpointed_step(reentrant=False).scale(4)
    assert scale.factor == 8
    assert len(scale.description["terms"]) == 1


def test_loss_inside_reentrant_checkpointing_is_refused():
    """Its first forward has no graph, and the second runs where modes are not active."""
    with pytest.raises(LossNotRecognizedError, match="No recognised loss took part"):
        checkpointed_step(reentrant=True).scale(4)


@pytest.mark.parametrize("compiled", ["submodule", "whole_step"])
def test_compiled_models_train_the_same_under_the_tap(compiled):
    plain, tapped = linear(), linear()
    train_step(plain)
    torch.compiler.reset()
    with LossTap() as tap:
        if compiled == "submodule":
            train_step(torch.compile(tapped, backend="eager"))
        else:
            loss = torch.compile(lambda x: F.cross_entropy(tapped(x), LABELS), backend="eager")
            loss(X).backward()
    assert torch.equal(tapped.weight.grad, plain.weight.grad)
    assert tap.scale(4).factor == 4


def test_second_mode_around_the_tap_sees_the_call_too():
    with torch.device("cpu"), LossTap() as outer, LossTap() as inner:
        train_step(linear())
    assert outer.scale(4).factor == inner.scale(4).factor == 4


def test_loss_of_our_own_is_hidden_by_disable_torch_function():
    model = linear()
    with LossTap() as tap:
        train_step(model)
        with torch._C.DisableTorchFunction():
            (7 * F.cross_entropy(model(X), LABELS, reduction="sum")).backward()
    assert tap.scale(4).factor == 4
