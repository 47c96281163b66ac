"""What the command line asks about: a model of digits, its file, and a question.

`python command_line.py` trains a small network on 1,437 images of scikit-learn's handwritten digits, of which it
gives 72 a wrong label (seed 0), and leaves `influence.h5` and `last.ckpt`. The README's terminal session goes on
from there. Takes seconds. Needs `pip install lightning-influence[cli,examples]`.
"""

import argparse
import logging

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence import InfluenceCallback

EPOCHS, BATCH_SIZE, SEED, TRAIN, WRONG = 10, 32, 0, 1437, 72


class Digits(LightningModule):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)]


def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))


def wrong_labels() -> Tensor:
    """Dataset indices of the examples whose labels are one too high."""
    return torch.randperm(TRAIN, generator=torch.Generator().manual_seed(SEED))[:WRONG]


def training_set() -> TensorDataset:
    images, labels = digits()[:TRAIN]
    labels[wrong_labels()] = (labels[wrong_labels()] + 1) % 10
    return TensorDataset(images, labels)


def question() -> Subset:
    """A digit that the model was not trained on, with its label."""
    return Subset(digits(), [TRAIN])


def train(epochs: int = EPOCHS) -> Digits:
    """Leave `influence.h5` and `last.ckpt` in the current folder."""
    torch.manual_seed(SEED)
    model = Digits()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[InfluenceCallback("influence.h5")],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(training_set(), batch_size=BATCH_SIZE, shuffle=True))
    trainer.save_checkpoint("last.ckpt")
    return model


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # no tips, no devices
    torch.set_num_threads(1)
    train()
