"""The same steps on autograd's graph: the oracle of the discrete adjoint, and the baseline it is measured against.

Weights, steps and stages are those of the forward sweep; the history is a sum over the rows of X in blocks, each block
stacked once so that autograd keeps N x d values of X and not N^2 d; a compressed history is summed here with every term
of its kernel, so that its recurrence is tested by its definition. What autograd keeps of f comes on top: memory is
O(N (d + f's graph)), time O(N^2 d).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..system.base import Stepping
from .discretisation import Discretisation
from .operators import WeightsOfRow
from .schemes.base import StepData

_BLOCK = 16


class _GraphHistory:
    """c_n = sum_{1<=j<n} kappa_nj X_j on the graph; `append` adds X_n."""

    def __init__(self, rows: WeightsOfRow, group: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        self._rows, self._group, self._like = rows, group, (dtype, device)
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
        if n == 1:
            return total
        dtype, device = self._like
        weights = self._rows(n).to(dtype=dtype, device=device)
        weights = weights[:, 0] if self._group is None else weights[:, self._group]
        for i, block in enumerate(self._blocks):
            part = weights[i * _BLOCK : (i + 1) * _BLOCK]
            total = total + (part @ block if self._group is None else (part * block).sum(0))
        for i, x in enumerate(self._recent):
            total = total + weights[len(self._blocks) * _BLOCK + i] * x
        return total


def backprop(
    discretisation: Discretisation,
    alpha: Tensor,
    system: Stepping,
    y0: Tensor,
    outputs: Iterable[int],
    h: Tensor | None = None,
) -> dict[int, Tensor]:
    """y_n at the given steps, on the graph of y0, alpha, (G,) float64, h, 0-d float64, and what f uses.

    `system` evaluates f on the graph (`system.torch_system.GraphSystem`).
    """
    scheme, grid, orders = discretisation.scheme, discretisation.grid, discretisation.orders
    rows, weights = discretisation.operator.graph(alpha, h)
    local, start = weights.local.to(y0), None if weights.start is None else weights.start.to(y0)

    def pick(values: Tensor) -> Tensor:
        return values[0] if orders.group is None else values[orders.group]

    slope = system.evaluate(0, grid.t0, y0) if scheme.uses_initial_slope else None
    histories = [_GraphHistory(channel, orders.group, y0.dtype, y0.device) for channel in rows]
    y = y0
    wanted, found = set(outputs), {0: y0}
    for n in range(1, grid.steps + 1):
        r = [y0 + history.read(n) for history in histories]
        if slope is not None:
            assert start is not None
            r = [part + pick(start[c, n]) * slope for c, part in enumerate(r)]
        w = pick(local if local.dim() == 1 else local[n])
        at = StepData(n, grid.time(n), w, n == grid.steps)
        stage = scheme.step(system, at, tuple(r), y0, y)
        y = stage.y
        if stage.x is not None:
            for history in histories:
                history.append(stage.x)
        if n in wanted:
            found[n] = y
    return {n: value for n, value in found.items() if n in wanted}
