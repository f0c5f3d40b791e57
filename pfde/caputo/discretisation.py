"""A scheme on its grid, with its weights in the dtype and on the device of the state.

The bridge between the frozen description of a method (scheme, grid, orders, history) and what the sweeps use at each
step: the local weight, the start column, and the histories of the three directions (`kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..system.base import System, Weight, add_scaled
from .grid import Grid, Orders
from .history import History
from .operators import HistoryOperator, Where, history_operator
from .schemes import Scheme
from .schemes.base import StepData, Weights


class StepWeights:
    """Local weights and start column in the dtype and on the device of the state, ready to be used step by step."""

    def __init__(self, weights: Weights, orders: Orders, dtype: torch.dtype, device: torch.device) -> None:
        self._orders = orders
        one = orders.group is None
        local = weights.local.to(dtype=dtype, device=device)
        self._local: Weight | None = orders.pick(local) if local.dim() == 1 else None
        self._locals = local[:, 0].cpu().numpy() if one and local.dim() == 2 else local
        self.has_start = weights.start is not None
        if weights.start is not None:
            # of one order, plain numbers: N of them as a list would take four times the memory
            self._start = weights.start[..., 0].numpy() if one else weights.start.to(dtype=dtype, device=device)

    def local(self, n: int) -> Weight:
        """The local weight of step n."""
        if self._local is not None:
            return self._local
        return float(self._locals[n]) if self._orders.group is None else self._orders.pick(self._locals[n])

    def add_start(self, channel: int, n: int, r: Tensor, slope: Tensor | None) -> Tensor:
        """r += sigma_n F_0 of one channel, in place; the transpose of sigma_n, too, is a product with it."""
        if not self.has_start or slope is None:
            return r
        sigma = self._start[channel, n]
        return add_scaled(r, float(sigma) if self._orders.group is None else self._orders.pick(sigma), slope)


@dataclass(frozen=True, eq=False)
class Discretisation:
    """A scheme on a grid for given orders, with the way its history is evaluated, for a state of `width` entries."""

    scheme: Scheme
    grid: Grid
    orders: Orders
    history: History
    width: int
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def operator(self) -> HistoryOperator:
        """The history. Raises ValueError where it cannot reach its tolerance."""
        where = Where(self.scheme, self.grid, self.orders, self.width, self.dtype, self.device)
        return history_operator(self.history, where)

    @cached_property
    def weights(self) -> StepWeights:
        """The weights."""
        return StepWeights(self.operator.step_weights(0), self.orders, self.dtype, self.device)

    @cached_property
    def weights_dot(self) -> StepWeights:
        """Their derivatives in alpha."""
        return StepWeights(self.operator.step_weights(1), self.orders, self.dtype, self.device)

    def at(self, n: int, *, keep: System | None = None) -> StepData:
        """What a step needs to know of where it is; `keep` linearises what is to be kept."""
        return StepData(n, self.grid.time(n), self.weights.local(n), n == self.grid.steps, keep)
