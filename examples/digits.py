"""Why does the model think so? Influence on scikit-learn's handwritten digits.

A small network learns 1,437 images of digits, 5 % of them with a wrong label. While it trains,
`InfluenceCallback` stores every example's gradient. The file then answers, without the training data:
which images taught the model its answer to a test image, which labels are wrong, and what would have
happened without some images. The last answer is compared with what does happen: we retrain.
In a second part the same is asked of a file into which every epoch's gradients were merged.

Writes `digits.png`, `digits_trajectory.png` and `digits_over_time.png`. Takes about two minutes on 2 cores. Needs
`pip install lightning-influence[examples]`.
"""

# %%
# A plain LightningModule and real data
# -------------------------------------
# The learning rate decays to zero, so gradients stored during the last epoch are those of the final model.

import argparse
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import HeuristicDamping, InfluenceCallback, InfluenceModule

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seed", type=int, default=0, help="of the split, the wrong labels and the training")
parser.add_argument("--output", type=Path, default=Path("digits.png"), help="where the picture goes")
args = parser.parse_args()

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # no tips, no devices
warnings.filterwarnings("ignore", message=".*(many workers|logging interval|LeafSpec).*")
torch.set_num_threads(1)  # the model is so small that two threads would wait for each other

EPOCHS, BATCH_SIZE, LEARNING_RATE, MOMENTUM = 20, 64, 0.1, 0.9


class LitDigits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), LEARNING_RATE, MOMENTUM)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset, np.ndarray]:
    """Training set, test set, and which training labels were made wrong."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images / 16, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    generator = np.random.default_rng(seed)
    is_flipped = np.zeros(len(train_y), dtype=bool)
    is_flipped[generator.choice(len(train_y), round(0.05 * len(train_y)), replace=False)] = True
    train_y[is_flipped] = (train_y[is_flipped] + generator.integers(1, 10, is_flipped.sum())) % 10
    train, test = (
        TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y))
        for x, y in ((train_x, train_y), (test_x, test_y))
    )
    return train, test, is_flipped


def fit(*callbacks: Callback) -> tuple[Trainer, float]:
    """Train, and say how long it took."""
    seed_everything(args.seed, verbose=False)
    model, (train, test, _) = LitDigits(), load_data(args.seed)
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tempfile.mkdtemp(dir=workdir.name),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(test, len(test))
    start = time.perf_counter()
    trainer.fit(model, *loaders)
    return trainer, time.perf_counter() - start


# %%
# Train with one callback, keep two files
# ---------------------------------------
# Of all this, only the checkpoint and the file beside it are used below: no model, no training data.

versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
print(f"seed {args.seed}, {os.cpu_count()} cores, 1 thread, {versions}\n")
workdir = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
trainer, _ = fit(InfluenceCallback(f"{workdir.name}/influence.h5"))
checkpoint = trainer.checkpoint_callback.best_model_path  # Lightning saves one after every epoch
del trainer

influence = InfluenceModule.from_checkpoint(checkpoint, LitDigits)
print(influence.summary())

# %%
# Which images taught the model this?
# -----------------------------------
# We ask about the test images whose true label the model finds least likely. A score is the effect on
# that log-likelihood of giving a training image more weight: a positive one helps (a proponent), a
# negative one harms (an opponent). The damping is the rule of the literature, 0.1 of each layer's mean
# eigenvalue: nothing is tuned on the answers below, and another damping needs no new training.

DAMPING, QUERIES, SHOWN = HeuristicDamping(0.1), 6, 5
_, test, is_flipped = load_data(args.seed)
images, labels = test.tensors
with torch.no_grad():
    logits = influence.model(images)
accuracy = (logits.argmax(1) == labels).float().mean()
hardest = cross_entropy(logits, labels, reduction="none").topk(QUERIES).indices
queries, answers = (images[hardest], labels[hardest]), logits[hardest].argmax(1)
proponents = influence.top_k(queries, k=SHOWN, damping=DAMPING)
opponents = influence.top_k(queries, k=SHOWN, largest=False, damping=DAMPING)
print(f"\nTest accuracy {accuracy:.1%}. We ask about the {QUERIES} hardest test images.")
shares = [is_flipped[found.indices].mean() for found in (proponents, opponents)]
print("Wrong labels among their top {} proponents: {:.0%}, opponents: {:.0%}.".format(SHOWN, *shares))

# %%
# Which labels are wrong?
# -----------------------
# A wrong label fits nothing else, so the model has to bend for that one image: its influence on
# itself is large. No query is needed.

self_influence = influence.self_influence(damping=DAMPING).numpy()
suspects = np.argsort(-self_influence)[: is_flipped.sum()]
precision, auc = is_flipped[suspects].mean(), roc_auc_score(is_flipped, self_influence)
print(f"\nOf the {len(suspects)} largest self-influences, as many as there are wrong labels, {precision:.0%}")
print(f"have a wrong label (precision); AUC {auc:.3f}.")

# %%
# What if they had not been there?
# --------------------------------
# For each query we take away its top 20 proponents, its top 20 opponents, or 20 random images.
# `removal_effect` predicts the change of the query's log-likelihood. The truth is retraining from the
# same initial weights without them, against retraining with all, averaged over four orders of the data
# to see above the noise of one. All 19 runs of an order are trained at once, as a batch of models.

GROUP, ORDERS = 20, 4
scores = influence.scores(queries, damping=DAMPING)
generator = np.random.default_rng(args.seed)
groups = []
for row in scores:
    chance = torch.from_numpy(generator.choice(len(row), GROUP, replace=False))
    groups += [row.topk(GROUP).indices, row.topk(GROUP, largest=False).indices, chance]


def forward(parameters: list[Tensor], images: Tensor) -> Tensor:
    """Logits [g, n, 10] of g networks whose parameters are stacked."""
    x = images.expand(len(parameters[0]), -1, -1)
    for weight, bias in zip(parameters[0::2], parameters[1::2], strict=True):
        x = torch.baddbmm(bias[:, None], x if weight is parameters[0] else x.relu(), weight.mT)
    return x


def log_likelihoods(parameters: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood of each label under each network, [g, n]."""
    log_probabilities = forward(parameters, images).log_softmax(-1)
    return log_probabilities.gather(-1, labels.expand(len(parameters[0]), -1)[..., None])[..., 0]


def retrain(keep: Tensor, order: int) -> list[Tensor]:
    """Stacked parameters of g networks, network g trained on the images where keep [g, N] is 1."""
    seed_everything(args.seed, verbose=False)  # the initial weights of `fit`
    initial = [p.detach() for p in LitDigits().parameters()]
    parameters = [p.expand(len(keep), *p.shape).clone().requires_grad_() for p in initial]
    images, labels = load_data(args.seed)[0].tensors
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM)
    steps = EPOCHS * math.ceil(len(images) / BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(order)
    for _ in range(EPOCHS):
        for n in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            losses = -log_likelihoods(parameters, images[n], labels[n]) * keep[:, n]
            optimizer.zero_grad()
            (losses.sum(1) / keep[:, n].sum(1).clamp(min=1)).sum().backward()
            optimizer.step()
            scheduler.step()
    return [p.detach() for p in parameters]


keep = torch.ones(1 + len(groups), scores.shape[1])
for row, group in zip(keep[1:], groups, strict=True):
    row[group] = 0
retrained = torch.stack([log_likelihoods(retrain(keep, order), *queries) for order in range(ORDERS)])
actual = (retrained[:, 1:] - retrained[:, :1]).mean(0)  # [group, query]
own = torch.arange(QUERIES).repeat_interleave(3)  # the query that each group was chosen for
own_actual = actual[range(len(groups)), own]

print(f"\nPredicted against actual change when {GROUP} images are removed ({len(groups)} groups), in nats:")
print("damping, times the mean   Spearman  Pearson   actual/predicted   Spearman, all groups x all queries")
for factor in (10.0, 1.0, 0.1):  # the last one is drawn below
    effects = [influence.removal_effect(queries, group, damping=HeuristicDamping(factor)) for group in groups]
    predicted = torch.stack(effects)
    own_predicted = predicted[range(len(groups)), own]
    ratio = (own_predicted @ own_actual) / (own_predicted @ own_predicted)
    rho, r = spearmanr(own_predicted, own_actual)[0], pearsonr(own_predicted, own_actual)[0]
    rho_all = spearmanr(predicted.flatten(), actual.flatten())[0]
    print(f"{factor:>23g}   {rho:8.3f}  {r:7.3f}   {ratio:16.2f}   {rho_all:8.3f}")

# %%
# The picture
# -----------
# Training images are loaded again here, for the eye only.

BLUE, RED, GREY, ORANGE = "#2166ac", "#b2182b", "#8c8c8c", "#e08214"
train, _, _ = load_data(args.seed)
figure = plt.figure(figsize=(16, 9.5), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(2.6, 1), wspace=0.03)
left.suptitle("Which training images speak for the true label, and which against it?", fontsize=15)


def draw(axis: plt.Axes, image: Tensor, caption: str, color: str, width: float = 1.5) -> None:
    axis.imshow(image.reshape(8, 8), cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(caption, fontsize=9, color=color)
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=width)


grid = left.subplots(QUERIES, 2 + 2 * SHOWN, width_ratios=[1] * (1 + SHOWN) + [0.15] + [1] * SHOWN)
for q, axes in enumerate(grid):
    draw(axes[0], queries[0][q], f"is {queries[1][q]}, read as {answers[q]}", "black")
    axes[1 + SHOWN].axis("off")
    for found, color, start in ((proponents, BLUE, 1), (opponents, RED, 2 + SHOWN)):
        for axis, index, score in zip(axes[start:], found.indices[q], found.scores[q], strict=False):
            wrong = is_flipped[index]
            caption = f"{'wrong ' if wrong else ''}label {train[index][1]}\n{score:+,.0f}"
            draw(axis, train[index][0], caption, ORANGE if wrong else color, 3.5 if wrong else 1.5)
grid[0, 0].set_title("test image")
grid[0, 1 + SHOWN // 2].set_title("proponents, with their scores", color=BLUE)
grid[0, 2 + SHOWN + SHOWN // 2].set_title("opponents, with their scores", color=RED)

effects, ranking = right.subplots(2, 1)
for kind, (name, color) in enumerate((("proponents", BLUE), ("opponents", RED), ("random images", GREY))):
    effects.scatter(own_predicted[kind::3], own_actual[kind::3], s=50, color=color, label=name, zorder=2)
effects.axhline(0, color="lightgray", zorder=1)
effects.axvline(0, color="lightgray", zorder=1)
effects.set(title=f"{GROUP} images removed, and retrained", ylabel="actual change of log-likelihood")
effects.set(xlabel="predicted change of log-likelihood")
effects.legend(title="what was removed", frameon=False)

ranking.plot(*roc_curve(is_flipped, self_influence)[:2], color=ORANGE, linewidth=2.5)
ranking.plot([0, 1], [0, 1], color=GREY, linestyle="--")
ranking.set(title=f"Wrong labels by self-influence: AUC {auc:.3f}", ylabel="share of wrong labels found")
ranking.set(xlabel="share of right labels suspected")
figure.savefig(args.output, dpi=110)
print(f"\nThe picture is in {args.output}.")

# %%
# The whole trajectory
# --------------------
# By the last epoch most images are learnt and say little. `epochs="every"` adds up what each image said in all
# epochs, weighted by their learning rates, in one row an image, for the same final weights: the training is the
# same to the last bit. Which of the two files predicts retraining better? We train on random halves of the images
# and look at all test images: the linear datamodeling score is the rank correlation, over the halves, of a test
# image's log-likelihood with the sum of its scores of the images in the half, averaged over the test images.

HALVES, HALF_ORDERS = 64, 4
trajectory_path = f"{workdir.name}/trajectory.h5"
fit(InfluenceCallback(trajectory_path, epochs="every"))
trajectory = InfluenceModule.attach(influence.model, trajectory_path)  # checks that the weights are the same
files = {"the final epoch": influence, "all epochs": trajectory}
everything = (images, labels)

halves = torch.zeros(HALVES, len(train))
for half in halves:
    half[torch.from_numpy(generator.choice(len(train), len(train) // 2, replace=False))] = 1
trained = torch.stack([log_likelihoods(retrain(halves, order), *everything) for order in range(HALF_ORDERS)])
truth = trained.mean(0)  # [half, query]


def datamodeling_score(file: InfluenceModule, factor: float) -> float:
    predicted = halves @ file.scores(everything, damping=HeuristicDamping(factor)).nan_to_num().T
    return statistics.mean(spearmanr(p, t)[0] for p, t in zip(predicted.T, truth.T, strict=True))


print("\nBytes an image: " + ", ".join(f"{n} {f.store.attributes['bytes_per_row']:,}" for n, f in files.items()))
print(f"Linear datamodeling score, {HALVES} halves, {HALF_ORDERS} orders each, {len(labels)} test images:")
print("damping, times the mean   " + "   ".join(f"{name:>15}" for name in files))
for factor in (10.0, 1.0, 0.1, 0.01):
    found = [datamodeling_score(file, factor) for file in files.values()]
    print(f"{factor:>23g}   " + "   ".join(f"{value:15.3f}" for value in found))

print(
    f"\nThe {len(groups)} removals of above, predicted by each file: rank correlation, and actual/predicted size"
)
for factor in (10.0, 1.0, 0.1):
    line = f"{factor:>23g}   "
    for file in files.values():
        effects = [file.removal_effect(queries, group, damping=HeuristicDamping(factor)) for group in groups]
        own_predicted = torch.stack(effects)[range(len(groups)), own]
        ratio = (own_predicted @ own_actual) / (own_predicted @ own_predicted)
        line += f"{spearmanr(own_predicted, own_actual)[0]:7.3f}, {ratio:5.2f}   "
    print(line)

figure = plt.figure(figsize=(15, 9.5), layout="constrained")
sides = figure.subfigures(1, 2, wspace=0.04)
for side, (name, file) in zip(sides, files.items(), strict=True):
    found = file.top_k(queries, k=SHOWN, damping=DAMPING)
    side.suptitle(f"Proponents by the gradients of {name}", fontsize=14)
    for q, axes in enumerate(side.subplots(QUERIES, 1 + SHOWN)):
        draw(axes[0], queries[0][q], f"is {queries[1][q]}, read as {answers[q]}", "black")
        for axis, index, score in zip(axes[1:], found.indices[q], found.scores[q], strict=True):
            wrong = is_flipped[index]
            caption = f"{'wrong ' if wrong else ''}label {train[index][1]}\n{score:+,.1f}"
            draw(axis, train[index][0], caption, ORANGE if wrong else BLUE, 3.5 if wrong else 1.5)
both = args.output.with_stem(f"{args.output.stem}_trajectory")
figure.savefig(both, dpi=110)
print(f"\nThe picture is in {both}.")

# %%
# Influence over time
# -------------------
# Kept apart as segments, the epochs show when an image had its say: by its gradient in that epoch, and for the
# query as the final model sees it.

segments_path = f"{workdir.name}/segments.h5"
fit(InfluenceCallback(segments_path, epochs=2, trajectory="segments"))
by_epoch = InfluenceModule.attach(influence.model, segments_path).scores_by_segment(queries, damping=DAMPING)
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for found, color in ((proponents, BLUE), (opponents, RED)):
    for index in found.indices[0, :3].tolist():
        values = [float(scores[0, index]) for scores in by_epoch.values()]
        label = f"image {index}, {'wrong ' if is_flipped[index] else ''}label {train[index][1]}"
        axis.plot(list(by_epoch), values, marker="o", color=color, alpha=0.7, label=label)
axis.axhline(0, color="lightgray", zorder=1)
axis.set(xlabel="epoch", ylabel="score", title=f"Test image that is {queries[1][0]}, read as {answers[0]}")
axis.legend(fontsize=8, frameon=False)
over_time = args.output.with_stem(f"{args.output.stem}_over_time")
figure.savefig(over_time, dpi=110)
print(f"\nInfluence over time is in {over_time}.")

# %%
# What did it cost?
# -----------------
# The same training with and without the callback, in turns. Both validate and save a checkpoint after
# every epoch, as runs do.

fit()  # warm up
pairs = []
for _ in range(11):
    _, plain = fit()
    _, captured = fit(InfluenceCallback(f"{workdir.name}/cost.h5"))
    pairs.append((captured / plain, plain))
ratios, seconds = zip(*pairs, strict=True)
spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(pairs)} pairs"
print(f"\nWhole run with the callback over without: median {statistics.median(ratios):.2f}, {spread};")
print(f"a run without takes {statistics.median(seconds):.2f} s, so tenths of a second weigh much here.")

# %%
# What we learn
# -------------

print("""
A positive score: more weight on this training image would make the query's label likelier; negative: less.
What worked: from its file alone, without the training data, the model points at the wrong labels and ranks
what removing images does, and the damping hardly matters for either. What did not: the size of the effects.
At 0.1 of the mean eigenvalue they come out several times too large; 10 times the mean is nearer. And the
first columns are the easy test, as each group was chosen to raise, to lower or to leave its query; every
group against every query (last column) has many effects too small to rank so well.
The gradients of all epochs give sizes that are nearer, but predict the retraining of this small network on easy
images about as well as those of the final epoch alone: one in twenty of its labels is wrong, so it goes on
learning until the end. On larger tasks they predict far better (examples/benchmarks/lds.py).""")
