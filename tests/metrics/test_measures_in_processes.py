"""Two gloo ranks with unequal shares of the queries, and with none, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from lightning_influence.metrics import LinearDatamodelingScore
from tests.metrics.test_measures import CASES, Q, in_batches

pytestmark = pytest.mark.ddp


def _one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name, (_, _, make, _) in CASES.items():
        for shares in ("unequal", "none"):
            metric = make()
            for number, batch in enumerate(in_batches(name, Q)):
                if (
                    number % 3 == 0
                    if rank == 1 and shares == "unequal"
                    else (rank == 0 and (shares == "none" or number % 3))
                ):
                    metric.update(*batch)
            found[name, shares] = metric.compute()
    metric = LinearDatamodelingScore(num_bootstraps=20)
    for batch in in_batches("LDS", Q)[rank::2]:
        metric.update(*batch)
    found["LDS", "error"] = metric.compute()["standard_error"]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")  # a rank without a query
def test_two_processes_give_the_answer_of_one(tmp_path: Path) -> None:
    start_processes(_one_process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, (function, arguments, _, _) in CASES.items():
            for shares in ("unequal", "none"):
                expected = function(*arguments).double()
                torch.testing.assert_close(found[name, shares].double(), expected, rtol=0, atol=1e-6)
        assert 0 < float(found["LDS", "error"]) < 0.5
