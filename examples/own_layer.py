"""How does a layer of my own become attributed? An adapter of three methods says what its gradient is.

A cosine layer looks at the direction of its input only: y = W x / |x|. Without the adapter, training runs as
ever and the coverage report names the layer as left out.
"""

# %%
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    FactoredGradient,
    InfluenceCallback,
    InfluenceModule,
    LayerAdapter,
    register_adapter,
)

# %%
# The layer, and what it does with its input
# ------------------------------------------
# At each position the gradient of W is the outer product of the output's gradient [n, o] and of what W was
# multiplied with, here the normalized input [n, i]. `FactoredGradient` takes both as [n, positions, ...].


class CosineLinear(torch.nn.Linear):
    def forward(self, x):
        return functional.linear(functional.normalize(x, dim=-1), self.weight, self.bias)


class CosineAdapter(LayerAdapter):
    def matches(self, module):
        return type(module) is CosineLinear

    def shape(self, module):
        return module.out_features, module.in_features

    def gradient(self, module, layer_input, output_grad):
        return FactoredGradient(functional.normalize(layer_input, dim=-1)[:, None], output_grad[:, None])


register_adapter(CosineAdapter())

# %%
# In every run, captured gradients are compared with what `.grad` gained. Had we forgotten to normalize, the
# layer would be left out, and the report would say by how much its gradients differ.


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(CosineLinear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


# %%
# Train and look at the report
# ----------------------------

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
with tempfile.TemporaryDirectory() as folder:
    path, model = Path(folder) / "influence.h5", Digits()
    trainer = Trainer(
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[InfluenceCallback(path)],
    )
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    print(InfluenceModule.attach(model, path).summary())
