"""The same steps on autograd's graph: the oracle of the discrete adjoint, and the baseline it is measured against.

Weights, steps and stages are those of the forward sweep; the history is a sum over the rows of X in blocks, each block
stacked once so that autograd keeps N x d values of X and not N^2 d. What autograd keeps of f comes on top: memory is
O(N (d + f's graph)), time O(N^2 d).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..schemes import Scheme
from ..schemes.base import StepData
from ..system.base import System
from .discretisation import Grid, Orders

_BLOCK = 16


class _GraphHistory:
    """c_n = sum_{1<=j<n} kappa_{n-j} X_j on the graph; `append` adds X_n."""

    def __init__(self, kernel: Tensor, group: Tensor | None) -> None:
        self._kernel = kernel if group is None else kernel[:, group]  # (N+1, 1) or (N+1, d)
        self._blocks: list[Tensor] = []
        self._recent: list[Tensor] = []

    def append(self, x: Tensor) -> None:
        """Add the next row."""
        self._recent.append(x)
        if len(self._recent) == _BLOCK:
            self._blocks.append(torch.stack(self._recent))
            self._recent.clear()

    def read(self, n: int) -> Tensor | float:
        """c_n, when rows 1..n-1 have been added."""
        total: Tensor | float = 0.0
        scalar = self._kernel.shape[1] == 1
        for i, block in enumerate(self._blocks):
            first = n - 1 - i * _BLOCK  # the lag of the block's first row
            kernel = self._kernel[first - _BLOCK + 1 : first + 1].flip(0)
            total = total + (kernel[:, 0] @ block if scalar else (kernel * block).sum(0))
        for i, x in enumerate(self._recent):
            lag = n - 1 - len(self._blocks) * _BLOCK - i
            total = total + self._kernel[lag] * x
        return total


def backprop(
    scheme: Scheme, grid: Grid, orders: Orders, system: System, y0: Tensor, outputs: Iterable[int]
) -> dict[int, Tensor]:
    """y_n at the given steps, on the graph of y0, orders.alpha and what f uses.

    `system` evaluates f on the graph (`system.torch_system.GraphSystem`).
    """
    weights = scheme.weights(orders.alpha, grid.h, grid.steps)
    kernel, local = weights.kernel.to(y0), weights.local.to(y0)
    start = None if weights.start is None else weights.start.to(y0)

    def pick(values: Tensor) -> Tensor:
        return values[0] if orders.group is None else values[orders.group]

    slope = system.evaluate(0, grid.t0, y0) if scheme.uses_initial_slope else None
    histories = [_GraphHistory(k, orders.group) for k in kernel]
    w, y = pick(local), y0
    wanted, found = set(outputs), {0: y0}
    for n in range(1, grid.steps + 1):
        r = [y0 + history.read(n) for history in histories]
        if slope is not None:
            assert start is not None
            r = [part + pick(start[c, n]) * slope for c, part in enumerate(r)]
        at = StepData(n, grid.time(n), w, n == grid.steps)
        stage = scheme.step(system, at, tuple(r), y0, y)
        y = stage.y
        if stage.x is not None:
            for history in histories:
                history.append(stage.x)
        if n in wanted:
            found[n] = y
    return {n: value for n, value in found.items() if n in wanted}
