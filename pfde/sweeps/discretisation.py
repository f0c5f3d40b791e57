"""A scheme on its grid, with its weights in the dtype and on the device of the state.

The bridge between the frozen description of a method (scheme, grid, orders, history) and what the sweeps use at each
step: the local weight, the start column, and the histories of the forward, tangent and adjoint directions. The
weights' derivatives in alpha come from the weight formulas by forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..history import Convolution, Exact
from ..schemes import Scheme
from ..schemes.base import StepData, Weights
from ..system.base import Weight, add_scaled


class Grid(NamedTuple):
    """The uniform grid t_n = t0 + n h, n = 0..steps, ending at t1 exactly."""

    t0: float
    h: float
    steps: int
    t1: float

    def time(self, n: int) -> float:
        """t_n."""
        return self.t1 if n == self.steps else self.t0 + n * self.h

    def times(self) -> list[float]:
        """All t_n, n = 0..steps."""
        return [self.time(n) for n in range(self.steps + 1)]


class Orders(NamedTuple):
    """The orders alpha: (G,) distinct values, float64 on the CPU, and the component's index among them.

    group : (d,) int64 on the state's device, or None when all components share one order (G = 1)
    """

    alpha: Tensor
    group: Tensor | None

    def pick(self, values: Tensor) -> Weight:
        """One value for each order (G,) as a weight of the state: a number, or a tensor of shape (d,)."""
        return float(values[0]) if self.group is None else values[self.group]

    def collect(self, values: Tensor) -> Tensor:
        """Sum a value of each component (d,) into one for each order, (G,) float64 on the CPU: pick's transpose."""
        if self.group is None:
            return values.double().sum().reshape(1).cpu()
        sums = torch.zeros(len(self.alpha), dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self.group, values.double()).cpu()


class StepWeights:
    """Weights in the dtype and on the device of the state, ready to be used step by step."""

    def __init__(self, weights: Weights, orders: Orders, dtype: torch.dtype, device: torch.device) -> None:
        self._orders = orders
        kernel = weights.kernel.to(dtype=dtype, device=device)
        self.kernel = kernel[..., 0].contiguous() if orders.group is None else kernel.contiguous()
        self.local = orders.pick(weights.local.to(dtype=dtype, device=device))
        self.start: Tensor | None = None
        if weights.start is not None:
            self.start = weights.start.to(dtype=dtype, device=device)
            self._start_values = weights.start[..., 0].tolist() if orders.group is None else None

    def add_start(self, channel: int, n: int, r: Tensor, slope: Tensor | None) -> Tensor:
        """r += sigma_n F_0 of one channel, in place."""
        if self.start is None or slope is None:
            return r
        values = self._start_values
        return add_scaled(r, self._orders.pick(self.start[channel, n]) if values is None else values[channel][n], slope)

    def start_transpose(self, channel: int, rows: Tensor) -> Tensor:
        """sum_n sigma_n rows[n-1], (d,): the transpose of the start column."""
        assert self.start is not None
        sigma = self.start[channel, 1:]
        if self._orders.group is None:
            return sigma[:, 0] @ rows
        total = rows.new_zeros(rows.shape[1])
        for i in range(0, len(rows), 64):  # in pieces: one number for each row and component
            total += (sigma[i : i + 64][:, self._orders.group] * rows[i : i + 64]).sum(0)
        return total


_KEPT_NUMBERS = 2**16


def _weights(scheme: Scheme, alpha: tuple[float, ...], h: float, steps: int) -> Weights:
    """The weights, float64."""
    with torch.no_grad():
        return scheme.weights(torch.tensor(alpha, dtype=torch.float64), h, steps)


def _weights_dot(scheme: Scheme, alpha: tuple[float, ...], h: float, steps: int) -> Weights:
    """Their derivatives in alpha, by forward mode."""
    order = torch.tensor(alpha, dtype=torch.float64)
    with torch.no_grad(), forward_ad.dual_level():
        weights = scheme.weights(forward_ad.make_dual(order, torch.ones_like(order)), h, steps)
        start = None if weights.start is None else _tangent(weights.start)
        return Weights(_tangent(weights.kernel), start, _tangent(weights.local))


def _tangent(dual: Tensor) -> Tensor:
    value, tangent = forward_ad.unpack_dual(dual)
    return torch.zeros_like(value) if tangent is None else tangent


@cache
def _kept(table: Callable[[Scheme, tuple[float, ...], float, int], Weights]) -> Callable[..., Weights]:
    return lru_cache(maxsize=8)(table)


@dataclass(frozen=True, eq=False)
class Discretisation:
    """A scheme on a grid for given orders, with the way its history is evaluated."""

    scheme: Scheme
    grid: Grid
    orders: Orders
    history: Exact
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def weights(self) -> StepWeights:
        """The weights."""
        return self._on_device(_weights)

    @cached_property
    def weights_dot(self) -> StepWeights:
        """Their derivatives in alpha."""
        return self._on_device(_weights_dot)

    def _on_device(self, table: Callable[[Scheme, tuple[float, ...], float, int], Weights]) -> StepWeights:
        alpha, steps = self.orders.alpha, self.grid.steps
        # What is small and used again, a fixed order in a training loop, is kept; a large table lives with its solve.
        keep = _kept(table) if len(alpha) * steps <= _KEPT_NUMBERS else table
        weights = keep(self.scheme, tuple(alpha.tolist()), self.grid.h, steps)
        return StepWeights(weights, self.orders, self.dtype, self.device)

    def at(self, n: int, *, keep: bool = False) -> StepData:
        """What a step needs to know of where it is."""
        return StepData(n, self.grid.time(n), self.weights.local, n == self.grid.steps, keep)

    def forward_history(self, rows: Tensor, channels: slice = slice(None)) -> Convolution:
        """c_n = sum_{j<n} kappa_{n-j} X_j, one output for each channel."""
        return self.history.convolution(self.weights.kernel[channels].unsqueeze(1), [rows], group=self.orders.group)

    def tangent_history(self, x_dot: Tensor, x: Tensor, alpha_dot: Tensor) -> Convolution:
        """The derivative of `forward_history` along X_dot and alpha_dot, (G,): kappa X_dot + (kappa' alpha_dot) X."""
        kernel, kernel_dot = self.weights.kernel, self.weights_dot.kernel
        scale = alpha_dot.to(dtype=self.dtype, device=self.device)
        scaled = kernel_dot * (scale[0] if self.orders.group is None else scale)
        return self.history.convolution(torch.stack([kernel, scaled], dim=1), [x_dot, x], group=self.orders.group)

    def adjoint_history(self, rows: list[Tensor], *, alpha: bool) -> Convolution:
        """X_bar_n = sum_{k>n} kappa_{k-n} r_bar_k over channels; with `alpha`, a second output with kappa'."""
        kernels = [self.weights.kernel, self.weights_dot.kernel] if alpha else [self.weights.kernel]
        return self.history.convolution(torch.stack(kernels), rows, reverse=True, group=self.orders.group)
