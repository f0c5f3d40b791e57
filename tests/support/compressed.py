"""The problem on which compressed histories and nonuniform grids are tested: orders, start, times."""

import torch

from pfde.caputo.schemes import METHODS

ORDERS = torch.tensor([0.35, 0.8], dtype=torch.float64)
GRIDDED = [name for name, scheme in METHODS.items() if scheme.rules]
START = torch.tensor([0.4, -0.9], dtype=torch.float64)


def times(steps):
    return torch.linspace(0.2, 1.4, steps + 1, dtype=torch.float64)
