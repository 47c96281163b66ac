"""How long does a question take, against reading the file once and against a pass over the training data?

An MLP (784-256-128-10) is trained on 60,000 Fashion-MNIST images and captured with both codecs, pairs and
eigen-coordinates. 1 and 100 test images then ask for the scores of all training examples.

    python examples/benchmarks/query_speed.py                          # a few minutes on a quiet machine
    python examples/benchmarks/query_speed.py --kronfluence            # and the peer, which takes longer
    python examples/benchmarks/query_speed.py --matmul-precision medium
    python examples/benchmarks/query_speed.py --codes                  # only the products, half a minute
    python examples/benchmarks/query_speed.py --progressive            # could a bound on the rest drop rows?

- "read": the sum of all row arrays, memory-mapped, in the page cache: the time of reading them once.
- "kernels": the codecs' products of all rows with queries that are preconditioned already.
- "scores", "top_k": `InfluenceModule`'s, from the batch to the answer, with the queries' own gradients.
- "matmul": float32 products of as many multiply-adds as the eigen codec's coordinates take.
- kronfluence: pairwise scores of the same model, queries and examples, at two sizes of the training set, from
  which its time is taken to grow linearly; its factors are not timed.

What is compared is timed in turn, `--repeats` times, and medians are printed: processor seconds of the process,
which what else the machine does changes little, and wall time. `--check` queries are compared with products of the
stored rows in float64, made in another way. Needs the extra `examples`, for `--kronfluence` the extra `bench`, and
Debian's package `dataset-fashion-mnist`.
"""

# %%
from __future__ import annotations

import argparse
import dataclasses
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lds_tasks import TASKS, Data, fashion_images, run_quietly
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.codecs import EigenCodec, PairsCodec
from lightning_influence.functional.code_products import code_products
from lightning_influence.functional.quantize import dequantize_int8, quantize_int8
from lightning_influence.functional.rotated import quantize_rotated, restore_rotated
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.metrics import rank_correlations
from lightning_influence.query import described_layers
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreReader

CHUNK = 4096
SHARES = (0.25, 0.5, 0.75)
CODECS: dict[str, dict[str, Any]] = {
    "pairs, int8": {"codec": "pairs"},
    "eigen, 4,096 bytes": {"codec": "eigen", "bytes_per_example": 4096},
}


# %%
# The run and its files
# ---------------------


class Learner(LightningModule):
    """A net trained by stochastic gradient descent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.net(inputs).flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def capture(make_net: Callable[[], nn.Module], data: Data, path: Path, **options: Any) -> InfluenceModule:
    """Train for two epochs, the first of which gives the eigenbasis."""
    seed_everything(args.seed, verbose=False)
    model = Learner(make_net())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[InfluenceCallback(path, on_error="raise", **options)],
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(model, DataLoader(TensorDataset(*data), 128, shuffle=True))
    return InfluenceModule.attach(model.eval(), path)


def layers_of(store: StoreReader) -> dict[str, ScoredLayer]:
    return {
        entry["name"]: ScoredLayer.from_arrays(
            store.factors(entry["name"]),
            entry["codec"],
            entry["config"],
            KroneckerStructure(**entry.get("structure", {})),
        )
        for entry in described_layers(store)
    }


def chunks(arrays: Mapping[str, np.ndarray], step: int = CHUNK) -> Iterator[dict[str, Tensor]]:
    """Rows of a layer, without a copy."""
    count = len(next(iter(arrays.values())))
    for start in range(0, count, step):
        yield {name: torch.from_numpy(np.asarray(array[start : start + step])) for name, array in arrays.items()}


# %%
# What is timed
# -------------


def read_once(store: StoreReader) -> None:
    """Add up all row arrays, as 8-byte integers."""
    for name in store.layers:
        for array in store.rows(name).values():
            flat = np.asarray(array).reshape(-1).view(np.uint8)
            torch.from_numpy(flat[: len(flat) // 8 * 8].view(np.int64)).sum()


def kernels(store: StoreReader, layers: Mapping[str, ScoredLayer], queries: int) -> Callable[[], None]:
    """The codecs' products with some preconditioned queries; their time does not depend on the values."""
    generator = torch.Generator().manual_seed(0)
    projected = {
        name: layer.codec.project(torch.randn(queries, *layer.basis.shape, generator=generator), layer.basis)
        for name, layer in layers.items()
    }

    def run() -> None:
        for name, layer in layers.items():
            for arrays in chunks(store.rows(name)):
                layer.scores(projected[name], arrays)

    return run


def matmul(store: StoreReader, layers: Mapping[str, ScoredLayer], queries: int) -> Callable[[], None]:
    coordinates = sum(len(layer.codec.coordinates) for layer in layers.values())
    one, other = torch.randn(queries, coordinates), torch.randn(CHUNK, coordinates)

    def run() -> None:
        for start in range(0, store.num_examples, CHUNK):
            one @ other[: store.num_examples - start].T

    return run


def interleaved(timed: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Medians of processor and wall seconds, by name."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for repeat in range(args.repeats + 1):
        for name, function in timed.items():
            begin = time.process_time(), time.perf_counter()
            function()
            if repeat:  # the first warms up
                found[name].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    return {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in found.items()}  # type: ignore[misc]


def print_times(title: str, times: Mapping[str, tuple[float, float]], unit: str) -> None:
    print(f"\n{title}\n{'':24}{'processor s':>12}{'wall s':>10}{'x ' + unit:>12}")
    for name, (processor, wall) in times.items():
        print(f"{name:24}{processor:12.4f}{wall:10.4f}{processor / times[unit][0]:12.2f}", flush=True)


# %%
# Whether it is right
# -------------------


def exact_scores(influence: InfluenceModule, layers: Mapping[str, ScoredLayer], batch: Data) -> Tensor:
    """Products of the preconditioned queries with the stored rows in float64, [q, n]."""
    net: Any = influence.model.net
    gradients = [
        torch.autograd.grad(cross_entropy(net(x[None]), y[None]), [*net.parameters()])
        for x, y in zip(*batch, strict=True)
    ]
    total: Any = 0
    for number, (name, layer) in enumerate(layers.items()):
        G = torch.stack([torch.cat([g[2 * number], g[2 * number + 1][:, None]], 1) for g in gradients])
        basis = dataclasses.replace(layer.basis, Q_A=layer.basis.Q_A.double(), Q_S=layer.basis.Q_S.double())
        Lambda = layer.Lambda.double()
        coordinates = basis.Q_S.T @ G.double() @ basis.Q_A / (Lambda + Lambda.mean())
        total = total + torch.cat(
            [_exact_products(layer, coordinates, basis, rows) for rows in chunks(influence.store.rows(name))], 1
        )
    return total


def _exact_products(layer: ScoredLayer, coordinates: Tensor, basis: Any, arrays: dict[str, Tensor]) -> Tensor:
    codec = layer.codec
    if isinstance(codec, EigenCodec):
        return coordinates.flatten(1)[:, codec.coordinates] @ codec.vectors(arrays).double().T
    assert isinstance(codec, PairsCodec)
    rows = codec.decode_gradient(arrays)
    queries = basis.Q_S @ coordinates @ basis.Q_A.T
    left, right = rows.output_grads[:, 0].double(), rows.inputs[:, 0].double()
    return torch.stack([((left @ query) * right).sum(1) for query in queries])


def check(influence: InfluenceModule, layers: Mapping[str, ScoredLayer], queries: Data) -> None:
    batch = tuple(tensor[: args.check] for tensor in queries)
    exact, scores = exact_scores(influence, layers, batch), influence.scores(batch)
    top = influence.top_k(batch, 10)
    best = exact.topk(10, dim=1)
    off = float((scores.double() - exact).abs().max() / exact.abs().max())
    same = int((top.indices == best.indices).all(1).sum())
    print(
        f"against float64: off by at most {off:.1e} of the largest score; the 10 best are the same, in the same "
        f"order, for {same} of {len(exact)} queries",
        flush=True,
    )


# %%
# The peer
# --------


def kronfluence_times(net: nn.Module, data: Data, queries: Data) -> dict[int, dict[int, float]]:
    """Processor seconds of its pairwise scores: by number of queries and of training examples."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task as KronfluenceTask

    class Summed(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    loss = Summed()
    model = prepare_model(net, loss)
    found: dict[int, dict[int, float]] = {1: {}, len(queries[0]): {}}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("speed", model, loss, cpu=True, disable_tqdm=True, output_dir=folder, log_level=40)
        some = TensorDataset(*(tensor[:2000] for tensor in data))  # factors of fewer are as fast to ask
        factors = FactorArguments("ekfac", use_empirical_fisher=True)
        analyzer.fit_all_factors("ekfac", some, per_device_batch_size=200, factor_args=factors)
        for count in (args.peer_examples // 4, args.peer_examples):
            for q in found:
                begin = time.process_time()
                analyzer.compute_pairwise_scores(
                    f"{q} {count}",
                    "ekfac",
                    TensorDataset(*(tensor[:q] for tensor in queries)),
                    TensorDataset(*(tensor[:count] for tensor in data)),
                    per_device_query_batch_size=q,
                    per_device_train_batch_size=500,
                )
                found[q][count] = time.process_time() - begin
    return found


def print_peer(
    times: Mapping[int, Mapping[int, float]], ours: Mapping[tuple[str, int], float], count: int
) -> None:
    print("\nkronfluence, processor s:")
    for q, by_count in times.items():
        (few, begin), (many, end) = by_count.items()
        whole = end + (end - begin) / (many - few) * (count - many)
        measured = ", ".join(f"{n:,} examples {seconds:.1f}" for n, seconds in by_count.items())
        ratios = ", ".join(f"{whole / own:,.0f} x ours ({name})" for (name, n), own in ours.items() if n == q)
        print(f"{q:4} queries: {measured}; {count:,}: {whole:.1f}; {ratios}", flush=True)


# %%
# Progressive top-k: would a bound drop rows?
# -------------------------------------------
# After the leading coordinates of every layer a row cannot enter the top k if its score so far plus
# |rest of the query| |rest of the row| is below the k-th best score. The best case for it: that score and the
# norms of the rests are known beforehand and cost nothing.


def survivors(influence: InfluenceModule, batch: Any, k: int = 10) -> dict[float, tuple[float, float]]:
    """Shares of the rows that are left after a share of the coordinates: for a query, and for any of them."""
    layers = layers_of(influence.store)
    asked, kept = influence._gradients(batch, None), {}
    for name, layer in layers.items():
        eigenvalues = layer.Lambda + layer.Lambda.mean()
        coordinates = (layer.basis.rotate(asked[name]) / eigenvalues).flatten(1)[:, layer.codec.coordinates]
        whitened = coordinates * layer.codec.whitening
        kept[name] = (whitened, layer.codec)
    so_far: dict[float, tuple[Any, Any]] = {}
    for share in (*SHARES, 1.0):
        partial, query_rest, row_rest = 0.0, 0.0, 0.0
        for name, (whitened, codec) in kept.items():
            cut = round(share * whitened.shape[1])
            rows = torch.cat(
                [codec.vectors(part) / codec.whitening for part in chunks(influence.store.rows(name))]
            )
            partial = partial + whitened[:, :cut] @ rows[:, :cut].T
            query_rest = query_rest + whitened[:, cut:].square().sum(1, keepdim=True)
            row_rest = row_rest + rows[:, cut:].square().sum(1)
        so_far[share] = (partial, query_rest.sqrt() * row_rest.sqrt())
    threshold = so_far[1.0][0].topk(k, dim=1).values[:, -1:]
    left = {share: partial + bound >= threshold for share, (partial, bound) in so_far.items()}
    return {share: (float(kept.float().mean()), float(kept.any(0).float().mean())) for share, kept in left.items()}


def progressive(folder: Path) -> None:
    images, queries = fashion_images(args.examples, args.queries)
    task = TASKS["transformer"]
    cases = {
        "MLP, Fashion-MNIST": (mlp, images, queries),
        "transformer, text": (lambda: task.net(args.seed), task.train, task.queries),
    }
    print(f"\nrows that a bound leaves after a share of the coordinates, 4,096 bytes, k = 10\n{'':24}", end="")
    print("".join(f"{share:>10.0%}" for share in (*SHARES, 1.0)))
    for number, (name, (make_net, data, asked)) in enumerate(cases.items()):
        influence = capture(make_net, data, folder / f"progressive{number}.h5", **CODECS["eigen, 4,096 bytes"])
        batch = tuple(tensor[:20] for tensor in asked)
        one, any_of_them = zip(*survivors(influence, batch).values(), strict=True)
        print(f"{name:24}" + "".join(f"{share:10.1%}" for share in one))
        print(f"{'  any of 20 queries':24}" + "".join(f"{share:10.1%}" for share in any_of_them), flush=True)


# %%
# Codes alone
# -----------


def codes_alone() -> None:
    """Products with 4,096 coordinates of 8,192 drawn rows of 8, 4 and 2 bits, and how they were made before."""
    for bits in (8, 4, 2):
        values = torch.randn(8192, 4096, generator=torch.Generator().manual_seed(args.seed))
        codes, scales = quantize_int8(values) if bits == 8 else quantize_rotated(values, bits)
        for q in (1, args.queries):
            asked = torch.randn(q, 4096)

            def whole(
                asked: Tensor = asked, codes: Tensor = codes, scales: Tensor = scales, bits: int = bits
            ) -> None:
                rows = dequantize_int8(codes, scales) if bits == 8 else restore_rotated(codes, scales, bits)
                asked @ rows.T

            timed: dict[str, Callable[[], Any]] = {
                "read": lambda codes=codes, scales=scales: (codes.view(torch.int64).sum(), scales.sum()),
                "products": functools.partial(code_products, asked, codes, scales, bits),
                "rows made whole": whole,
                "matmul": lambda asked=asked, values=values: asked @ values.T,
            }
            print_times(f"{bits} bits, {q} queries", interleaved(timed), "read")


def what_ranks_lose(influence: InfluenceModule, batch: Data) -> None:
    """Scores from queries of a rank, against exact ones."""
    exact = influence.scores(batch)
    for rank in args.ranks:
        found = influence.scores(batch, rank=rank)
        spearman = rank_correlations(found, exact).mean()
        common = [
            len({*a.tolist()} & {*b.tolist()}) for a, b in zip(exact.topk(10)[1], found.topk(10)[1], strict=True)
        ]
        print(f"rank {rank}: Spearman {spearman:.4f}, {statistics.mean(common) / 10:.0%} of the top 10 in common")


# %%
def main(folder: Path) -> None:
    data, queries = fashion_images(args.examples, args.queries)
    one = tuple(tensor[:1] for tensor in queries)
    ours: dict[tuple[str, int], float] = {}
    for number, (name, options) in enumerate(CODECS.items()):
        influence = capture(mlp, data, folder / f"{number}.h5", **options)
        store, layers = influence.store, layers_of(influence.store)
        print(f"\n{name}: {store.attributes['bytes_per_row']:,} bytes an example, {store.num_examples:,} examples")
        check(influence, layers, queries)
        for batch, q in ((one, 1), (queries, args.queries)):
            timed: dict[str, Callable[[], Any]] = {
                "read": lambda store=store: read_once(store),
                "kernels": kernels(store, layers, q),
                "scores": lambda batch=batch, influence=influence: influence.scores(batch),
                "top_k": lambda batch=batch, influence=influence: influence.top_k(batch, 10),
            }
            if all(isinstance(layer.codec, PairsCodec) for layer in layers.values()):
                for rank in args.ranks:
                    timed[f"rank {rank}"] = functools.partial(influence.scores, batch, rank=rank)
            if all(isinstance(layer.codec, EigenCodec) for layer in layers.values()):
                timed["matmul"] = matmul(store, layers, q)
            times = interleaved(timed)
            print_times(f"{name}, {q} {'query' if q == 1 else 'queries'}", times, "read")
            if "matmul" in times:
                print(f"kernels run at {times['matmul'][0] / times['kernels'][0]:.0%} of float32's matmul rate")
            ours[name, q] = times["scores"][0]
            for rank in args.ranks if f"rank {args.ranks[0]}" in times else ():
                ours[f"{name}, rank {rank}", q] = times[f"rank {rank}"][0]
        if "rank" in " ".join(times):
            what_ranks_lose(influence, queries)
    if args.kronfluence:
        seed_everything(args.seed, verbose=False)
        print_peer(kronfluence_times(mlp(), data, queries), ours, args.examples)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64], help="of queries, for pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matmul-precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--check", type=int, default=5, help="queries that are compared with float64")
    parser.add_argument("--kronfluence", action="store_true")
    parser.add_argument(
        "--peer-examples", type=int, default=6000, help="the larger of kronfluence's training sets"
    )
    parser.add_argument("--progressive", action="store_true", help="only the study of progressive top-k")
    parser.add_argument("--codes", action="store_true", help="only products with drawn codes")
    args = parser.parse_args()
    run_quietly()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, seed {args.seed}", end=", ")
    print(f"float32 matmul precision {args.matmul_precision}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        if args.codes:
            codes_alone()
        elif args.progressive:
            progressive(Path(scratch))
        else:
            main(Path(scratch))
