"""Tiny nets, data and one-line runs for tests that train with a real `Trainer`.

A task is a net and a function `loss(outputs, targets)`; its module calls the net `net`, so a layer
`first` of the net is `net.first` in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader
from tests.reference.factors import Eigenbasis
from tests.reference.models import classification_examples, token_examples

Loss = Callable[[Tensor, Tensor], Tensor]
STILL = partial(torch.optim.SGD, lr=0.0)  # the weights never move: every row belongs to the same ones


class Task(LightningModule):
    """The loss of a net's outputs and the batch's targets."""

    def __init__(
        self,
        net: nn.Module,
        loss: Loss = F.cross_entropy,
        optimizer: Callable[..., torch.optim.Optimizer] = STILL,
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer = net, loss, optimizer

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class ManualTask(Task):
    """The same with the loop written by hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Mlp(nn.Module):
    """5 -> 4 -> 4 -> 3 on vectors or, position by position, on sequences; in-place activations."""

    def __init__(self, *, has_bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, bias=has_bias)
        self.middle = nn.Linear(4, 4, bias=has_bias)
        self.last = nn.Linear(4, 3, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu_(self.middle(F.relu_(self.first(x)))))


class Pooled(nn.Module):
    """An `Mlp` over positions [n, s, 5] whose mean is the example's logits."""

    def __init__(self, *, has_bias: bool = True) -> None:
        super().__init__()
        self.body = Mlp(has_bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=1)


class Reused(nn.Module):
    """The middle layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.middle(torch.tanh(self.middle(x)))))


class Checkpointed(nn.Module):
    """The middle layers' activations are computed a second time in the backward."""

    def __init__(self, *, use_reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(5, 4)
        layers = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(6, 4)
        self.block = nn.Sequential(*layers)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=self.use_reentrant)
        return self.last(torch.tanh(hidden))


class Dropping(nn.Module):
    """Dropout after an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(F.relu_(self.first(x))))


class Tied(nn.Module):
    """Two layers share their weight; two others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.right(torch.tanh(self.left(torch.tanh(self.first(x)))))))


class UsedOutside(nn.Module):
    """A weight that also works where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return self.last(torch.tanh(F.linear(x, self.middle.weight)))


class Unbatched(nn.Module):
    """Runs a layer on one vector that belongs to no example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.prompt, self.shared = nn.Parameter(torch.ones(5)), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.shared(self.prompt)))


class PositionsFirst(nn.Module):
    """Layers that run on [s, n, 5], as in recurrent nets with `batch_first=False`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(0, 1)).mean(dim=0)


def seeded(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A net whose weights are always the same."""
    torch.manual_seed(3)
    return make(*args, **kwargs)


def vector_data(n: int = 22, *, seed: int = 0) -> TensorDataset:
    """Inputs [n, 5], classes [n]; 22 examples in batches of 4 end with a batch of 2."""
    features, labels = zip(*classification_examples(n, seed=seed), strict=True)
    return TensorDataset(torch.stack(features), torch.stack(labels))


def position_data(n: int = 22, *, seed: int = 0) -> TensorDataset:
    """Inputs [n, 6, 5], classes [n]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 6, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (n,), generator=generator))


def token_data(n: int = 22, *, seed: int = 0) -> TensorDataset:
    """Tokens [n, 6] and next tokens, of which 1 to 5 at the end are ignored (-100)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (n, 7), generator=generator)
    targets = tokens[:, 1:].clone()
    for row, ignored in enumerate(torch.randint(1, 6, (n,), generator=generator).tolist()):
        targets[row, -ignored:] = -100
    return TensorDataset(tokens[:, :-1].clone(), targets)


class RaggedTokens(Dataset):
    """Sequences of 2 to 7 tokens; `padded` collates them."""

    def __init__(self, n: int = 22) -> None:
        self.examples = token_examples([2 + 5 * row % 6 for row in range(n)])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.examples[index]


def padded(examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of sequences, as long as its longest; padding is ignored."""
    tokens, targets = zip(*examples, strict=True)
    return (
        pad_sequence(tokens, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=-100),
    )


def train(
    model: LightningModule,
    data: Dataset,
    *callbacks: Any,
    batch_size: int = 4,
    loader_options: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> Trainer:
    """Fit quietly on the CPU, in shuffled order, leaving nothing on the disk by itself."""
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**{**quiet, **trainer_options}, callbacks=list(callbacks))
    trainer.fit(model, DataLoader(data, batch_size=batch_size, shuffle=True, **loader_options or {}))
    return trainer


def float16(init_scale: float = 1024.0, **options: Any) -> dict[str, Any]:
    """Trainer options for float16 with a loss scale, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **options)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}


def stored_gradients(path: Path) -> dict[str, Tensor]:
    """What a file's rows stand for, [N, o, i] a layer; NaN where there is no valid row."""
    query = InfluenceQuery(StoreReader(path))
    gradients = {}
    for name, layer in query.layers.items():
        decoded = layer.codec.decode(stored_arrays(query.store, name))
        gradients[name] = decoded.masked_fill(~query.valid[:, None, None], torch.nan)
    return gradients


def stored_arrays(store: StoreReader, layer: str) -> dict[str, Tensor]:
    """A layer's row arrays, all rows."""
    return {key: torch.tensor(rows) for key, rows in store.rows(layer).items()}


def stored_factors(path: Path) -> dict[str, tuple[Eigenbasis, Tensor]]:
    """By layer, the reference's eigenbasis object with the file's entries, and Lambda; float64."""
    store = StoreReader(path)
    factors = {}
    for name in store.layers:
        arrays = {key: torch.from_numpy(array).double() for key, array in store.factors(name).items()}
        names = ("Q_A", "Q_S", "eigenvalues_A", "eigenvalues_S")
        factors[name] = Eigenbasis(*(arrays[key] for key in names)), arrays["Lambda"]
    return factors
