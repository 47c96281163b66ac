"""One thread a test process: two processes share two cores."""

import torch

torch.set_num_threads(1)
