"""Models that several test modules solve."""

import torch
from torch import nn


class Net(nn.Module):
    """A nonlinear right-hand side on two components that depends on t."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(11)
        self.W = nn.Parameter(torch.randn(2, 2, generator=g, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(2, generator=g, dtype=torch.float64))

    def forward(self, t, y):
        return torch.tanh(self.W @ y + self.b) * (1 + t) - 0.5 * y
