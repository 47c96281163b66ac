"""Which passages taught a language model to write this? Influence through a transformer.

A decoder-only transformer learns to write Python, character by character, from the standard library. One
callback stores the gradient of every passage, through embeddings, attention and layer norms. Then the
model completes a line, and we ask as Grosse et al. 2023 (arXiv:2308.03296) did of large models: which
training passages raised the likelihood of this completion? In which layers, and for which characters?
Then we take the passages away and train again, to see whether the answers are true. In the end, on a narrower
model with less text, scores are compared with their reference: conjugate gradients on the Gauss-Newton matrix.

Prints text, and writes `char_transformer.png`. Takes about four minutes on 2 cores. Needs
`pip install lightning-influence[examples]`.
"""

# %%
# A character model and its text
# ------------------------------
# Nothing here knows of influence. The text is cut into windows of 64 characters; a window is an example.
# Which text it is depends on the version of Python, so your passages may differ from another's.

import argparse
import logging
import os
import platform
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import lightning
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, capture, compute_influences
from lightning_influence.solvers import ConjugateGradient, EKFACPreconditioner

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seed", type=int, default=0, help="of the training")
parser.add_argument("--output", type=Path, default=Path("char_transformer.png"), help="where the picture goes")
args = parser.parse_args()

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # no tips, no devices
warnings.filterwarnings("ignore", message=".*(many workers|logging interval|LeafSpec).*")
torch.set_num_threads(1)

WINDOW, WIDTH, HEADS, BLOCKS = 64, 64, 4, 2
EPOCHS, BATCH_SIZE, LEARNING_RATE = 8, 32, 5e-3
TRAINING_FILES = ("json", "logging/__init__.py", "logging/handlers.py", "csv.py")
HELD_OUT_FILES = ("queue.py", "shelve.py", "cmd.py")


def read_library(names: tuple[str, ...]) -> dict[str, str]:
    """Source texts of modules and packages of the standard library, by their paths."""
    library = Path(os.__file__).parent
    files = [file for name in names for file in sorted((library / name).glob("*.py")) or [library / name]]
    return {file.relative_to(library).as_posix(): file.read_text(encoding="utf-8") for file in files}


sources = read_library(TRAINING_FILES)
text, held_out = "".join(sources.values()), "".join(read_library(HELD_OUT_FILES).values())
characters = "".join(sorted(set(text + held_out)))
numbers = {character: number for number, character in enumerate(characters)}


def encode(string: str) -> Tensor:
    """Character numbers, shape [s]."""
    return torch.tensor([numbers[character] for character in string])


def decode(ids: Tensor) -> str:
    return "".join(characters[i] for i in ids)


def windows(string: str) -> TensorDataset:
    """Inputs and next characters, both [n, WINDOW]; the last window is padded, its padding has no loss."""
    ids = encode(string)
    n = -(-(len(ids) - 1) // WINDOW)
    inputs, targets = torch.zeros(n * WINDOW, dtype=torch.long), torch.full((n * WINDOW,), -100)
    inputs[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
    return TensorDataset(inputs.view(n, WINDOW), targets.view(n, WINDOW))


class Block(nn.Module):
    """Causal self-attention and a perceptron, each on normalized inputs and added to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.attention_norm(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class LitWriter(LightningModule):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(len(characters), width), nn.Embedding(WINDOW, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, len(characters))
        for embedding in (self.character, self.position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each next character, [n, s, characters]."""
        s = ids.shape[1]
        mask = torch.ones(s, s, dtype=torch.bool).triu(1)  # True: not to be looked at
        x = self.character(ids) + self.position(torch.arange(s))
        for block in self.blocks:
            x = block(x, mask)
        return self.output(self.norm(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, targets = batch
        return cross_entropy(self(ids).flatten(0, 1), targets.flatten())  # ignores targets of -100

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, steps, pct_start=0.1, final_div_factor=1e4
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(data: TensorDataset, *callbacks: Callback, width: int = WIDTH, epochs: int = EPOCHS) -> Trainer:
    seed_everything(args.seed, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        gradient_clip_val=1.0,
        default_root_dir=tempfile.mkdtemp(dir=workdir.name),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitWriter(width), DataLoader(data, BATCH_SIZE, shuffle=True))
    return trainer


def mean_loss(model: nn.Module, data: TensorDataset) -> float:
    """Nats per character, in eval mode."""
    with torch.no_grad():
        logits = torch.cat([model.eval()(ids) for ids in data.tensors[0].split(500)])
    return float(cross_entropy(logits.flatten(0, 1), data.tensors[1].flatten()))


# %%
# Train with one callback
# -----------------------
# The learning rate decays to zero, so gradients stored during the last epoch are those of the final model.
# A window's gradient takes 466 KB. The file keeps 32 KB of it, the leading coordinates in the Fisher's
# eigenbasis; the default of 8 KB is too coarse for this model. The summary says how coarse 32 KB are.

versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
print(f"seed {args.seed}, {os.cpu_count()} cores, 1 thread, {versions}\n")
workdir = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
train = windows(text)
path, start = Path(workdir.name, "influence.h5"), time.perf_counter()
trainer = fit(train, InfluenceCallback(path, bytes_per_example=32_768))  # the one extra line
seconds, checkpoint = time.perf_counter() - start, trainer.checkpoint_callback.best_model_path
del trainer

influence = InfluenceModule.from_checkpoint(checkpoint, LitWriter)
model = influence.model
print(influence.summary())
print(f"file: {path.stat().st_size / 1e6:.1f} MB; training took {seconds:.0f} s, writing the file included")
losses = mean_loss(model, train), mean_loss(model, windows(held_out))
print("{:,} windows; nats per character: training {:.2f}, held out {:.2f}".format(len(train), *losses))
assert influence.coverage.share == 1, influence.coverage  # every parameter: embeddings, attention, norms

# %%
# What does it write?
# -------------------
# Lines begun in modules that it has not read, completed with the likeliest character each time.

PROMPTS = ("            raise ", "def __init__(self, ", "            except ")
LONGEST = 24


def complete(model: nn.Module, prompt: str) -> str:
    """To the end of the line, or of the patience."""
    ids = encode(prompt)[None]
    with torch.no_grad():
        while ids.shape[1] < len(prompt) + LONGEST and not decode(ids[0, len(prompt) :]).endswith("\n"):
            ids = torch.cat([ids, model.eval()(ids)[:, -1:].argmax(-1)], dim=1)
    return decode(ids[0, len(prompt) :])


def questions(prompts: tuple[str, ...], completions: list[str]) -> tuple[Tensor, Tensor]:
    """A batch as in training, [q, WINDOW], where only the completions' characters have a loss."""
    batch = [windows(prompt + completion).tensors for prompt, completion in zip(prompts, completions, strict=True)]
    ids, targets = (torch.cat(tensors) for tensors in zip(*batch, strict=True))
    for row, prompt in zip(targets, prompts, strict=True):
        row[: len(prompt) - 1] = -100
    return ids, targets


def log_likelihood(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of each completion given its prompt, in nats, [q]."""
    ids, targets = batch
    return -cross_entropy(model(ids).mT, targets, reduction="none").sum(1)


completions = [complete(model, prompt) for prompt in PROMPTS]
batch = questions(PROMPTS, completions)
with torch.no_grad():
    before = log_likelihood(model, batch)
print("\nPrompts from code that it has not read, and what it makes of them:")
for prompt, completion, nats in zip(PROMPTS, completions, before, strict=True):
    assert prompt in held_out
    line = f"{prompt!r} -> {completion!r}"
    print(f"  {line:50} {nats:6.1f} nats, {text.count(completion)} times in the training text")

# %%
# Which passages taught it this?
# ------------------------------
# The measurement is the log-likelihood of the completion given the prompt. (We would get the same without
# `measurement=`, as the loss of `training_step` ignores the prompt's targets, too.) For comparison, a score
# without curvature is the plain dot product of the two gradients, in the coordinates that the file holds.

SHOWN, TOP = 4, 20
starts = np.cumsum([0, *map(len, sources.values())])
files = np.array(list(sources))[np.searchsorted(starts, np.arange(len(train)) * WINDOW, side="right") - 1]
passages = [text[n * WINDOW : (n + 1) * WINDOW + 1] for n in range(len(train))]
found = influence.top_k(batch, TOP, measurement=log_likelihood)
plain = influence.top_k(batch, TOP, measurement=log_likelihood, curvature="identity")
for q, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
    for name, answer in (("influence", found), ("dot product of gradients", plain)):
        print(f"\n{prompt!r} -> {completion!r}: the top {SHOWN} passages by {name}")
        for index, score in zip(answer.indices[q, :SHOWN], answer.scores[q, :SHOWN], strict=True):
            print(f"{score:10,.0f}  {files[index]:20}  {passages[index]!r}")


def shares_text(passage: str, completion: str, n: int = 5) -> bool:
    """Whether the passage has n characters in a row of the completion (all of it, if it is shorter)."""
    line = completion.strip()
    return any(line[i : i + n] in passage for i in range(max(1, len(line) - n + 1)))


sharing = torch.tensor([[shares_text(passage, completion) for passage in passages] for completion in completions])
print(f"\nPassages with 5 characters in a row of the completion, among the top {TOP} and among all:")
print("completion                         influence   dot product   all")
for q, completion in enumerate(completions):
    shares = [sharing[q, answer.indices[q]].float().mean() for answer in (found, plain)]
    print("{!r:34} {:9.0%}   {:11.0%}   {:.0%}".format(completion, *shares, sharing[q].float().mean()))

# %%
# In which layers?
# ----------------
# A score is a sum over the layers. What each adds can have either sign, so we average sizes.

by_layer = influence.scores(batch, measurement=log_likelihood, per_layer=True)  # a dict of [q, N]
sizes = {name: float(scores.abs().mean()) for name, scores in by_layer.items()}
shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
numel = {name: sum(p.numel() for key, p in model.named_parameters() if key.startswith(name)) for name in sizes}
first = int(found.indices[0, 0])
print("\nlayer                        of parameters   of all scores              of the first score above")
for name, share in shares.items():
    bar, adds = "█" * round(100 * share), by_layer[name][0, first]
    print(f"{name:28} {numel[name] / sum(numel.values()):13.1%} {share:9.1%} {bar:18} {adds:+12,.0f}")

# %%
# For which characters?
# ---------------------
# The log-likelihood of a completion is a sum over its characters. We ask about each alone: the same text
# once for each character, with a loss there only.

ids, targets = batch[0][:1], batch[1][:1]
places = (targets[0] >= 0).nonzero()[:, 0]
alone = torch.full((len(places), WINDOW), -100)
alone[range(len(places)), places] = targets[0, places]
by_character = influence.scores((ids.expand(len(places), -1), alone), measurement=log_likelihood)  # [s, N]
scores = influence.scores(batch, measurement=log_likelihood)
error = float((by_character.sum(0) - scores[0]).abs().max() / scores[0].abs().max())
print(f"\n{PROMPTS[0]!r} -> {completions[0]!r}, character by character. Summed, the scores")
print(f"are those of the whole completion, up to {error:.0e} of the largest. The first passage above,")
print(f"{passages[first]!r}, speaks for:")
for part in torch.arange(len(places)).split(12):
    print("  " + "".join(f"{completions[0][i]!r:>8}" for i in part))
    print("  " + "".join(f"{by_character[i, first]:+8,.0f}" for i in part))

print("\nThe passage that speaks most for each character (together where it is the same for several):")
strongest, lengths = by_character.argmax(1).unique_consecutive(return_counts=True)
ends = lengths.cumsum(0)
for index, start, end in zip(strongest, ends - lengths, ends, strict=True):
    score = by_character[start:end, index].sum()
    print(f"{completions[0][start:end]!r:>10} {score:+8,.0f}  {files[index]:20}  {passages[index]!r}")

# %%
# Are the answers true?
# ---------------------
# We take away the top 50 passages of each of the three questions, train again, and ask for the log-likelihood
# of the same completions. The order of training stays: a passage is taken away by removing its loss. What
# happens without as many random passages says how much is due to the noise of training: the model chose
# each completion, so any other training run is likely to like it less.

GROUP = 50
rankings = {
    "influence": scores,
    "dot product": influence.scores(batch, measurement=log_likelihood, curvature="identity"),
    "chance": torch.from_numpy(np.random.default_rng([args.seed, 1]).random((len(PROMPTS), len(train)))),
}
print(f"\nTrained again without the top {GROUP} passages of each question: change of the log-likelihood, in nats")
print("top by       removed " + "".join(f"{completion!r:>36}" for completion in completions))
for name, values in rankings.items():
    removed = values.topk(GROUP).indices.unique()
    kept = train.tensors[1].index_fill(0, removed, -100)
    retrained = fit(TensorDataset(train.tensors[0], kept)).lightning_module.eval()
    with torch.no_grad():
        change = log_likelihood(retrained, batch) - before
    print(f"{name:12} {len(removed):7} " + "".join(f"{nats:+36.2f}" for nats in change))
    predicted = influence.removal_effect(batch, removed, measurement=log_likelihood)
    print(f"{'':13}predicted" + "".join(f"{nats:+36.2f}" for nats in predicted))

# %%
# Against the reference
# ---------------------
# EK-FAC takes the curvature layer by layer, each as Kronecker factors. What that costs is seen against the
# Gauss-Newton matrix of the loss over all parameters at once, (G + damping)⁻¹ times the query's gradient, solved
# for by conjugate gradients with the training data at hand. It is exact, and slow: hence half of the width, and
# the first 10,240 characters of one file. Queries are windows of code that was not read. Also for the perceptrons
# alone, as Grosse et al. have them: both sides then hold all other parameters fixed. The file's factors are made
# of the training labels; a second file's, of 4 labels for each character that the model drew itself, which is
# G's own kind.

REFERENCE_WIDTH, REFERENCE_EPOCHS, REFERENCE_FILE, REFERENCE_WINDOWS, QUERIES = 32, 30, "csv.py", 160, 3
start = time.perf_counter()
short = windows(sources[REFERENCE_FILE][: REFERENCE_WINDOWS * WINDOW + 1])
narrow_path, drawn_path = (Path(workdir.name, name) for name in ("narrow.h5", "drawn.h5"))
callback = InfluenceCallback(narrow_path, bytes_per_example=32_768)
narrow = fit(short, callback, width=REFERENCE_WIDTH, epochs=REFERENCE_EPOCHS).lightning_module.eval()
capture(
    narrow, DataLoader(short, BATCH_SIZE), drawn_path, bytes_per_example=32_768, fisher="sampled", fisher_samples=4
)
sources_of_labels = {"training": narrow_path, "drawn": drawn_path}
narrow_influences = {name: InfluenceModule.attach(narrow, file) for name, file in sources_of_labels.items()}
asked = tuple(tensor[:: len(tensor) // QUERIES][:QUERIES] for tensor in windows(held_out).tensors)
factors = [
    narrow_influences["drawn"].store.factors(name)["Lambda"] for name in narrow_influences["drawn"].store.layers
]
mean_eigenvalue = float(np.concatenate([eigenvalues.ravel() for eigenvalues in factors]).mean())


def window_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.mT, targets, reduction="none").sum(1)


def reference(damping: float, *, only_mlp: bool) -> Tensor:
    """Scores [q, N] by their definition."""
    for name, parameter in narrow.named_parameters():
        parameter.requires_grad_(not only_mlp or ".mlp." in name)
    solver = ConjugateGradient(rtol=2e-2, maxiter=80, block=True)
    if not only_mlp:  # sooner, but no other solution
        solver = replace(
            solver, preconditioner=EKFACPreconditioner.from_store(narrow, drawn_path, damping=damping)
        )
    options = {"loss": window_losses, "curvature": "gauss-newton", "hessian_regularization": damping}
    found = compute_influences(narrow, DataLoader(short, 64), [asked], solver=solver, **options)
    narrow.requires_grad_(True)
    return found


print(
    f"\n{len(short)} windows, {sum(p.numel() for p in narrow.parameters()):,} parameters, {QUERIES} queries: "
    "agreement with conjugate gradients\non the Gauss-Newton matrix, mean over queries; the damping is the mean "
    f"eigenvalue, {mean_eigenvalue:.2g}\nlayers        labels      Spearman   Pearson   top {TOP // 2} in common"
)
for layers, only_mlp in (("all", False), ("perceptrons", True)):
    truth = reference(mean_eigenvalue, only_mlp=only_mlp)
    for name, each in narrow_influences.items():
        by_layer = each.scores(asked, damping=mean_eigenvalue, per_layer=True)
        own = torch.stack([by_layer[layer] for layer in by_layer if not only_mlp or ".mlp." in layer]).sum(0)
        pairs = list(zip(own, truth, strict=True))
        tops = zip(*(values.topk(TOP // 2).indices.tolist() for values in (own, truth)), strict=True)
        shared = np.mean([len({*a} & {*b}) / (TOP // 2) for a, b in tops])
        rho, r = (np.mean([measure(a, b)[0] for a, b in pairs]) for measure in (spearmanr, pearsonr))
        print(f"{layers:13} {name:9} {rho:10.3f} {r:9.3f} {shared:10.0%}")
print(f"This part took {time.perf_counter() - start:.0f} s.")

# %%
# The picture
# -----------
# The passages that speak most for a character, and where in the network the scores come from.

candidates = strongest.unique()
strengths, places_of = by_character[:, candidates].max(0)
order = strengths.topk(min(14, len(candidates))).indices
order = order[places_of[order].argsort(stable=True)]  # in the order of what they speak for
rows = candidates[order]
values = by_character[:, rows].T
limit = float(values.abs().quantile(0.99))
figure = plt.figure(figsize=(17, 7), layout="constrained")
heat, bars = figure.subplots(1, 2, width_ratios=(2.2, 1))
image = heat.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
heat.set_xticks(range(len(places)), [repr(character)[1:-1] for character in completions[0]], family="monospace")
heat.set_yticks(range(len(rows)), [repr(passages[index])[1:-1] for index in rows], family="monospace", fontsize=8)
heat.set(title=f"{PROMPTS[0].strip()} {completions[0].strip()}: which passage speaks for which character?")
figure.colorbar(image, ax=heat, label="score; blue: makes the character likelier", pad=0.01, extend="both")
bars.barh(list(shares), list(shares.values()), color="#2166ac")
bars.invert_yaxis()
bars.set(title="What the layers add", xlabel="share in the sizes of all scores")
figure.savefig(args.output, dpi=110)
print(f"\nThe picture is in {args.output}.")

# %%
# What we learn
# -------------

print("""
A positive score: more weight on this passage in training would make the completion likelier. The top passages
by influence have characters in a row with the completion far more often than passages in general, and more
often than those by plain dot products. Where no passage contains the completion, it is pieced together:
different passages speak for different characters. Trained again without the top passages, the model likes
its completions less, and by more than without random ones. The predicted changes have the right sign and order
of magnitude, but single ones are several times off: it is a first-order prediction for many passages at once,
and one training run. With the reference, scores agree in part: better for the perceptrons alone, and hardly better
with labels that the model drew. So it is not the labels that make the difference, but what is left: that layers
are taken one by one, and as Kronecker products.""")
