# %% [markdown]
"""How much memory does a question take, and does it grow with the training set?

Synthetic rows of real shape, one seed: those of an MLP 784-256-128-10, as `pairs` in int8 (1,666 bytes an example)
and as `eigen` codes of 2,048 coordinates (2,176 bytes); 10,000, 100,000 and 1,000,000 of them, in files of their
own that are removed after. Each question is asked in a process of its own, which reports its peak resident memory,
with mapped pages of the file counted; what Python, torch and the file's factors take is measured before.

    python examples/benchmarks/query_memory.py

needs 3 GB of disk in TMPDIR, half a gigabyte of memory, and about two minutes.
"""

# %%
from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lightning_influence.codecs import Codec, EigenCodec, PairsCodec
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import FactoredGradient
from lightning_influence.query import InfluenceQuery
from lightning_influence.row_file import specs
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreReader, StoreWriter

SIZES = (10_000, 100_000, 1_000_000)
LAYERS = {"first": (256, 785), "second": (128, 257), "third": (10, 129)}
COORDINATES = {"first": 1280, "second": 640, "third": 128}
QUERIES = 1
BLOCK = 10_000  # rows written at a time
FLAT = 0.10


def layer(name: str, codec: str) -> ScoredLayer:
    """A random eigenbasis, falling eigenvalues, and the codec."""
    shape, generator = LAYERS[name], torch.Generator().manual_seed(len(name))
    Q_S, Q_A = (torch.linalg.qr(torch.randn(d, d, generator=generator))[0] for d in shape)
    falling = [1 / torch.arange(1.0, d + 1) for d in shape]
    basis, Lambda = Eigenbasis(Q_A, Q_S, falling[1], falling[0]), torch.outer(*falling)
    made: Codec = PairsCodec(shape, has_bias=True)
    if codec == "eigen":
        kept = Lambda.flatten().argsort(descending=True)[: COORDINATES[name]]
        made = EigenCodec(basis, kept, Lambda.flatten()[kept].sqrt())
    return ScoredLayer(basis, Lambda, made)


def gradients(name: str, count: int, seed: int) -> FactoredGradient:
    """Random ones of one position."""
    o, i = LAYERS[name]
    generator = torch.Generator().manual_seed(seed)
    bare = torch.randn(count, 1, i - 1, generator=generator)
    return FactoredGradient(bare, torch.randn(count, 1, o, generator=generator)).with_ones()


def write(path: Path, codec: str, count: int) -> None:
    """A whole file; the same block of rows again and again."""
    layers = {name: layer(name, codec) for name in LAYERS}
    rows = {
        name: {
            key: array.numpy()
            for key, array in each.codec.encode(gradients(name, min(BLOCK, count), seed=0)).items()
        }
        for name, each in layers.items()
    }
    writer = StoreWriter(path, num_examples=count, store_id="synthetic-rows")
    writer.create({name: specs(each.codec) for name, each in layers.items()})
    for start in range(0, count, BLOCK):
        indices = np.arange(start, min(start + BLOCK, count))
        columns = {"valid": np.ones(len(indices), np.uint8), "loss": np.zeros(len(indices), np.float32)}
        arrays = {name: {key: array[: len(indices)] for key, array in own.items()} for name, own in rows.items()}
        writer.write_rows(indices, columns=columns, arrays=arrays)
    described = [
        {"name": name, "has_bias": True, "codec": each.codec.codec_id, "config": each.codec.get_config()}
        for name, each in layers.items()
    ]
    writer.finish(
        attributes={},
        documents={"layers": described},
        factors={name: each.to_arrays() for name, each in layers.items()},
    )


def peak() -> float:
    """Of this process's resident memory so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ask(path: Path, budget: str, question: str) -> None:
    """In a process of its own: print the peaks before and after, and the seconds."""
    query = InfluenceQuery(StoreReader(path), memory_budget=budget)
    queries = {name: gradients(name, QUERIES, seed=1) for name in LAYERS}
    warm = np.arange(16)
    query.removal_effect(queries, warm)
    query.self_influence(subset=warm)
    before, start = peak(), time.perf_counter()
    if question == "top_k":
        query.top_k(queries, 10)
    elif question == "self_influence":
        query.self_influence()
    elif question == "group_scores":
        query.group_scores(queries, np.arange(query.num_examples) % 10)
    else:
        query.top_k(queries, 10, subset=np.arange(0, query.num_examples, 2))
    print(f"{before:.1f} {peak():.1f} {time.perf_counter() - start:.2f}")


def child(*arguments: str) -> str:
    """This script in another process, which inherits this one's peak; so this one writes no file."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# %%
def main() -> None:
    """Write, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--memory-budget", default="1GB")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        write(Path(options.write[0]), options.write[1], int(options.write[2]))
        return
    if options.ask:
        ask(Path(options.ask[0]), options.memory_budget, options.ask[1])
        return
    print(f"synthetic rows of real shape, {QUERIES} query, memory_budget={options.memory_budget}, 1 thread")
    head = ("N", 10), ("file, MB", 9), ("before, MB", 11), ("peak, MB", 9), ("seconds", 8)
    print(f"{'codec':6} {'question':16}", *(f"{name:>{width}}" for name, width in head))
    is_flat = True
    for codec in ("pairs", "eigen"):
        peaks: dict[str, list[float]] = {}
        for count in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "rows.h5"
                child("--write", str(path), codec, str(count))
                for question in ("top_k", "top_k of half", "self_influence", "group_scores"):
                    said = child("--memory-budget", options.memory_budget, "--ask", str(path), question)
                    before, after, seconds = map(float, said.split())
                    peaks.setdefault(question, []).append(after)
                    print(
                        f"{codec:6} {question:16} {count:10,} {path.stat().st_size / 1e6:9.0f} {before:11.0f} "
                        f"{after:9.0f} {seconds:8.2f}",
                        flush=True,
                    )
        for question, each in peaks.items():
            growth = max(each) / each[0] - 1
            is_flat &= growth <= FLAT
            print(f"{codec:6} {question:16} largest peak over that of the smallest N: {growth:+.1%}")
    print(f"goal: flat within {FLAT:.0%}: {'met' if is_flat else 'missed'}")


if __name__ == "__main__":
    main()
