"""What question do influence scores answer? Leave-one-out retraining, and the proximal Bregman response.

Remove an example, train again: that is what an influence score is taken to predict. For a linear model it does.
For a network it does badly (Basu et al. 2021, arXiv:2006.14651), and Bae et al. 2022 (arXiv:2209.05364) say what
it predicts instead: the proximal Bregman response (PBRF), the change of weights that removes the example while it
keeps the network's other outputs and stays near the trained weights. Here both models are put side by side:

- linear regression with weight decay on the diabetes data of Efron et al. (2004): 342 patients, 100 to ask about;
- a network, 64-32-10, on scikit-learn's digits: 600 images, a tenth of them with random labels, 40 to ask about.

Then the network's gap between EK-FAC and PBRF is taken apart: which of the approximations costs how much?

    python examples/loo_vs_pbrf.py

Writes `loo_vs_pbrf.png`. Takes two minutes. Needs `pip install lightning-influence[examples]`.
"""

# %%
import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, capture
from lightning_influence.evaluation import Comparison, compare, leave_one_out, pbrf
from lightning_influence.solvers import Exact, GaussNewtonOperator, Objective, compute_influences

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("loo_vs_pbrf.png"), help="where the picture goes")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--removed", type=int, default=40, help="how many training examples are removed, each alone")
parser.add_argument("--steps", type=int, default=300, help="of each training of the network")
args = parser.parse_args()
torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers.*")
start = time.perf_counter()
generator = torch.Generator().manual_seed(args.seed)


# %%
# Linear regression
# -----------------
# Loss ½ (y - x·b)², weight decay 0.01, which is the damping of PBRF. Scores are by the exact Hessian, and
# leave-one-out is trained to the end.
def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square() / 2


DECAY = 0.01
features, progression = (torch.tensor(array) for array in load_diabetes(return_X_y=True))
x = (features - features.mean(0)) / features.std(0)
y = (progression - progression.mean()) / progression.std()
order = torch.randperm(len(x), generator=generator)
x, y = x[order], y[order]
train, queries = [(x[:342], y[:342])], [(x[342:], y[342:])]
removed = torch.randperm(342, generator=generator)[: args.removed]

linear = nn.Linear(10, 1, bias=False).double()
linear.weight.data.zero_()
hessian = x[:342].T @ x[:342] / 342 + DECAY * torch.eye(10, dtype=torch.float64)
to_the_end = {"loss": half_square, "weight_decay": DECAY, "steps": 1000, "learning_rate": 0.05}
without = leave_one_out(linear, train, removed, **to_the_end)
linear.weight.data[:] = torch.linalg.solve(hessian, x[:342].T @ y[:342] / 342)
response = pbrf(linear, train, (x[removed], y[removed]), loss=half_square, damping=DECAY)
scores = compute_influences(
    linear, train, queries, loss=half_square, solver=Exact(), hessian_regularization=DECAY, dtype=torch.float64
)[:, removed]
of_linear = compare(
    {"influence": scores}, {"leave-one-out": without.scores(queries), "PBRF": response.scores(queries)}
)
print(f"Linear regression on diabetes, {len(removed)} of 342 removed, seed {args.seed}\n{of_linear}\n")


# %%
# A network
# ---------
# Trained by full-batch Adam with weight decay, so that leave-one-out from the same initial weights ("cold")
# differs by the example alone and by no noise. "Warm" trains on from the trained weights. Scores: full EK-FAC at
# the final weights, from a file of uncompressed rows, with exact labels.
def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


TRAIN, QUERIES, NET_DECAY = 600, 40, 1e-3
DAMPING, DAMPINGS = 0.1, (0.01, 0.1, 0.3, 1.0)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=generator)
images, labels = images[order].float() / 16, labels[order].clone()
labels[: TRAIN // 10] = torch.randint(0, 10, (TRAIN // 10,), generator=generator)
data = [(images[:TRAIN], labels[:TRAIN])]
asked = (images[TRAIN : TRAIN + QUERIES], labels[TRAIN : TRAIN + QUERIES])
removed = torch.randperm(TRAIN, generator=generator)[: args.removed]
chosen = (images[removed], labels[removed])
torch.manual_seed(args.seed)
net = Net()
recipe = {"loss": losses, "weight_decay": NET_DECAY, "steps": args.steps, "learning_rate": 1e-2}
cold = leave_one_out(net, data, removed, **recipe)
torch.nn.utils.vector_to_parameters(cold.baseline, net.parameters())
with torch.no_grad():
    error = float((net(images[TRAIN:]).argmax(1) != labels[TRAIN:]).float().mean())
    loss = float(losses(net(data[0][0]), data[0][1]).mean())
print(f"Network on digits: training loss {loss:.3f}, test error {error:.1%}")
warm = leave_one_out(net, data, removed, **{**recipe, "learning_rate": 1e-3})


def of_network(damping: float) -> Tensor:
    """Scores of PBRF."""
    return pbrf(net, data, chosen, loss=losses, damping=damping).scores([asked])


with tempfile.TemporaryDirectory() as folder:
    loader = DataLoader(TensorDataset(*data[0]), batch_size=100)
    modules = {
        fisher: InfluenceModule.attach(
            net, capture(net, loader, f"{folder}/{fisher}.h5", codec="pairs-float32", fisher=fisher)
        )
        for fisher in ("exact", "empirical")
    }
    by_file = {
        (fisher, damping): module.scores(asked, damping=damping)[:, removed]
        for fisher, module in modules.items()
        for damping in DAMPINGS
    }
    dot_products = modules["exact"].scores(asked, curvature="identity")[:, removed]

responses = {damping: of_network(damping) for damping in DAMPINGS}
references = {
    "leave-one-out, cold": cold.scores([asked]),
    "leave-one-out, warm": warm.scores([asked]),
    "PBRF": responses[DAMPING],
}
scores = {"influence (EK-FAC)": by_file["exact", DAMPING], "PBRF itself": references["PBRF"]}
of_net = compare(scores, references)
print(f"{args.removed} of {TRAIN} removed, damping {DAMPING}\n{of_net}\n")

# %%
# Which approximation costs what
# ------------------------------
# From the Gauss-Newton matrix itself down to EK-FAC, one approximation after another, with PBRF's own damping.
objective = Objective(net, losses, dtype=torch.float64)
(batch,) = objective.batches(data)
(query_batch,) = objective.batches([asked], "asked")
rows, queried = (objective.gradients(each, chunk_size=64) for each in (batch, query_batch))
G = GaussNewtonOperator(objective, [batch]).dense()
sizes = torch.tensor([where.stop - where.start for where in objective.slices.values()])
layer_of = torch.repeat_interleave(torch.arange(len(sizes)) // 2, sizes)  # a weight and a bias each
same_layer = layer_of[:, None] == layer_of


def dense(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return queried @ torch.linalg.solve(damped, rows[removed].T)


for damping in DAMPINGS:
    parts = {
        "Gauss-Newton, whole": dense(G, damping),
        "Gauss-Newton, layer by layer": dense(G * same_layer, damping),
        "EK-FAC, exact labels": by_file["exact", damping],
        "EK-FAC, empirical labels": by_file["empirical", damping],
        "gradient dot product": dot_products,
    }
    taken_apart = compare(parts, {"PBRF": responses[damping]})
    print(f"What an approximation costs, damping {damping}\n{taken_apart}\n")


# %%
# The picture
# -----------
def scatter(axis: plt.Axes, comparison: Comparison, method: str, reference: str, title: str) -> None:
    row = comparison[method, reference]
    axis.scatter(comparison.scores[method].flatten(), comparison.references[reference].flatten(), s=3, alpha=0.5)
    title = f"{title}\nPearson {row.pearson:.2f}, Spearman {row.spearman:.2f}"
    axis.set(title=title, xlabel=method, ylabel=reference)


figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
scatter(axes[0], of_linear, "influence", "leave-one-out", "linear regression")
scatter(axes[1], of_linear, "influence", "PBRF", "linear regression")
scatter(axes[2], of_net, "influence (EK-FAC)", "leave-one-out, cold", "network")
scatter(axes[3], of_net, "influence (EK-FAC)", "PBRF", "network")
figure.savefig(args.output, dpi=150)
print(f"{args.output}: a point for each query and removed example; {time.perf_counter() - start:.0f} s")
