"""What does it cost to make the eigenbasis from a sample of the positions?

Layers used on images and sequences see many positions in each example. `covariance_positions=` takes some of
them for the covariances, always the same number and drawn with a fixed seed. This script trains the CNN and the
transformer of `capture_cost.py` several times from the same seed, with samples of different sizes, and prints
the mean Spearman correlation of all scores of 24 held-out queries with those of the run that took all positions.
Every run keeps all coordinates, so that nothing but the basis differs.

Takes about five minutes on 2 cores.
"""

# %%
import logging
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from capture_cost import Classifier, Workload, make_workload

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.metrics import mean_rank_correlation

EPOCHS, QUERIES, SEED = 4, 24, 0


def scores(workload: Workload, positions: int | None) -> Tensor:
    """Of the last examples, which are not trained on, after a run with a sample of this size."""
    seed_everything(SEED, verbose=False)
    kept = TensorDataset(*(tensor[:-QUERIES] for tensor in workload.data.tensors))
    model = Classifier(workload.make_net(), workload.learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "influence.h5"
        callback = InfluenceCallback(
            path, codec="eigen", bytes_per_example=10**6, covariance_positions=positions, on_error="raise"
        )
        trainer = Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, torch.utils.data.DataLoader(kept, workload.batch_size, shuffle=True))
        queries = tuple(tensor[-QUERIES:] for tensor in workload.data.tensors)
        return InfluenceModule.attach(model, path).scores(queries)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, seed {SEED}, {EPOCHS} epochs")
    for name in ("cnn", "transformer"):
        workload = make_workload(name, None)
        everything = scores(workload, None)
        for positions in (64, 32, 16, 8):
            agreement = mean_rank_correlation(scores(workload, positions), everything)
            print(
                f"{workload.name}: {positions:3d} positions of each example, Spearman {agreement:.4f}", flush=True
            )


if __name__ == "__main__":
    main()
