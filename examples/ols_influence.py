"""Which patients decide a linear regression? Influence where it is known exactly.

For ordinary least squares, statistics has known since the 1970s what each example does to the fit: leverage,
studentized residuals, Cook's distance. The influence function of a neural network is the same idea, to first
order. Here both are computed for the diabetes data of Efron et al. (2004): 442 patients, ten measurements,
disease progression after a year. They are compared three ways: in closed form, through this package's solvers, and
from a file that `capture` wrote. Then ten patients are removed, and the fit is made again.

Writes `ols_influence.png`. Takes seconds. Needs `pip install lightning-influence[examples]`.
"""

# %%
# Derivation
# ----------
# Least squares minimizes J(b) = (1/n) sum_m ½ (y_m - x_m·b)². With r_m = y_m - x_m·b:
#
#     gradient of example m   grad L_m = -r_m x_m
#     Hessian                 H = XᵀX / n
#
# Give example m the weight 1 + e in J. The new minimum b(e) satisfies  grad J(b(e)) + (e/n) grad L_m(b(e)) = 0.
# Differentiate by e at 0:   H db/de + grad L_m / n = 0,   hence
#
#     db/de = -(1/n) H⁻¹ grad L_m = (XᵀX)⁻¹ x_m r_m                            [the influence function]
#
# Removal is e = -1. To first order it changes b by -(XᵀX)⁻¹ x_m r_m. Exactly (Sherman & Morrison's formula for
# the inverse of XᵀX - x_m x_mᵀ) it changes b by
#
#     -(XᵀX)⁻¹ x_m r_m / (1 - h_m)      with the leverage h_m = x_mᵀ (XᵀX)⁻¹ x_m.
#
# So first order is wrong by the factor 1 - h_m, which is near 1 unless the example is alone in its corner of
# feature space. From the same two numbers per example, r_m and h_m, come the classical statistics:
#
#     studentized residual    t_m = r_m / (s sqrt(1 - h_m)),  s² = rᵀr / (n - k)
#     Cook's distance         D_m = ||X (b - b_without_m)||² / (k s²) = t_m² h_m / (k (1 - h_m))
#
# An example moves the fit if it is far from the line *and* has leverage; the influence plot shows both.

import argparse
import logging
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import pearsonr
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, capture
from lightning_influence.solvers import ConjugateGradient, Exact, ols_influence

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("ols_influence.png"), help="where the picture goes")
args = parser.parse_args()
torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # what `capture` wrote is said below

features, progression = load_diabetes(return_X_y=True)
features = np.sqrt(len(features)) * features  # standard deviation 1
X = torch.tensor(np.column_stack([np.ones(len(features)), features]))
y = torch.tensor((progression - progression.mean()) / progression.std())
n, k = X.shape

# %%
# Closed form, and through the solvers
# ------------------------------------
# `solver=` makes the same statistics from autograd gradients and Hessian-vector products, as for any model.

truth = ols_influence(X, y)
print(f"{n} patients, {k} coefficients; R² {1 - float(truth.residuals.square().mean()):.3f}")
for solver in (Exact(), ConjugateGradient(rtol=1e-12)):
    found = ols_influence(X, y, solver=solver)
    errors = {
        name: float((getattr(found, name) - getattr(truth, name)).abs().max())
        for name in ("leverage", "studentized_residuals", "cooks_distance", "coefficient_changes")
    }
    listed = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    print(f"largest error through {type(solver).__name__}: {listed}")

# %%
# From a file
# -----------
# One pass over the data stores every example's gradient, and K-FAC's factors. With one output K-FAC's curvature is
# G = mean(r²) H, so that scores times mean(r²) are -grad f_qᵀ H⁻¹ grad L_m: exact influence, up to rounding.
# The measurement is the prediction of each patient, so score[m, m] says what m does to its own prediction.

model = nn.Sequential(nn.Linear(k - 1, 1)).double()
with torch.no_grad():
    model[0].weight.copy_(truth.coefficients[1:])
    model[0].bias.copy_(truth.coefficients[:1])


def half_squares(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1) / 2


data = TensorDataset(X[:, 1:], y[:, None])
mean_square = float(truth.residuals.square().mean())
with tempfile.TemporaryDirectory() as folder:
    path = capture(
        model,
        DataLoader(data, batch_size=64),
        f"{folder}/ols.h5",
        training_loss=half_squares,
        codec="pairs-float32",
    )
    scores = InfluenceModule.attach(model, path).scores(
        data[:], damping=1e-9, curvature="kfac", measurement=lambda model, batch: model(batch[0])[:, 0]
    )
predicted = -scores.double() * mean_square / n  # what removing m does to prediction q, [q, m]
actual = -X @ truth.coefficient_changes.T
own, own_actual = predicted.diagonal(), actual.diagonal()
print(f"removal from the file against refitting: Pearson {pearsonr(predicted.flatten(), actual.flatten())[0]:.5f}")
gap = (own - own_actual * (1 - truth.leverage)).abs().max() / own_actual.abs().max()
print(f"own predictions: the file says (1 - h) times the truth, up to {float(gap):.0e} of the largest")

# %%
# Ten patients at once
# --------------------
# The influences of single examples add up; removal of a group does not quite.

chosen = truth.cooks_distance.topk(10).indices
print("\n patient  leverage  studentized residual  Cook's distance  largest change of a coefficient / its error")
for m in chosen.tolist():
    change = float(truth.scaled_coefficient_changes[m].abs().max())
    print(
        f"{m:8d} {float(truth.leverage[m]):9.3f} {float(truth.deleted_studentized_residuals[m]):21.2f} "
        f"{float(truth.cooks_distance[m]):16.4f} {change:20.2f}"
    )
keep = torch.ones(n, dtype=torch.bool)
keep[chosen] = False
refitted = torch.linalg.lstsq(X[keep], y[keep, None]).solution[:, 0]
moved = X @ (refitted - truth.coefficients)
expected = predicted[:, chosen].sum(1)
slope = float((expected * moved).sum() / moved.square().sum())
print(
    f"\nwithout all ten, the {n} predictions change as the file says: Pearson {pearsonr(expected, moved)[0]:.4f}, "
    f"predicted sizes {slope:.2f} of the actual ones"
)

# %%
# The influence plot
# ------------------

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
area = 600 * truth.cooks_distance / truth.cooks_distance.max()
left.scatter(truth.leverage, truth.deleted_studentized_residuals, s=area, alpha=0.5)
for m in chosen[:5].tolist():
    left.annotate(str(m), (float(truth.leverage[m]), float(truth.deleted_studentized_residuals[m])))
for level in (-2, 2):
    left.axhline(level, color="gray", linewidth=0.8)
left.axvline(2 * k / n, color="gray", linewidth=0.8)
left.set(xlabel="leverage", ylabel="studentized residual", title="area: Cook's distance; lines: 2, and 2 k / n")
right.scatter(own_actual, own, s=8, c=truth.leverage)
limits = [float(own_actual.min()), float(own_actual.max())]
right.plot(limits, limits, color="gray", linewidth=0.8)
right.set(
    xlabel="actual change of the patient's own prediction without it",
    ylabel="predicted from the file",
    title="first order lacks 1 / (1 - leverage)",
)
figure.savefig(args.output, dpi=120)
print(f"wrote {args.output}")
