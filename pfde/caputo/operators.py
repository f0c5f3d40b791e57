"""The histories of a scheme on its grid: one operator, read in three directions.

    forward   c_n^c       = sum_{j<n} kappa^c_nj X_j
    tangent   c_dot_n^c   = sum_{j<n} kappa^c_nj X_dot_j + (alpha_dot kappa'^c_nj) X_j
    adjoint   X_bar_j     = sum_c sum_{n>j} kappa^c_nj r_bar^c_n,      Z_j = sum_c sum_{n>j} kappa'^c_nj r_bar^c_n

with kappa' = d kappa / d alpha. Each direction is a table of (channel, derivative) entries, outputs by inputs; how an
entry becomes a convolution depends on the history (all rows kept, or a bounded state) and on the grid: four operators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dual import differentiate
from .grid import Grid, Orders
from .history import Bounded, Convolution, Exact, History
from .history.base import Compression
from .history.bounded import BLOCK, GROUPED_BLOCK, BlockKernel, BoundedConvolution
from .history.dense import DenseConvolution
from .history.exponentials import IntervalKernel, LagKernel
from .intervals import Quadrature, quadrature
from .schemes import Scheme
from .schemes.base import Weights
from .special import reciprocal_gamma

WeightsOfRow = Callable[[int], Tensor]  # n -> the weights of the rows 1..n-1, (n-1, G)
Entry = tuple[int, int]  # channel, and 0 for kappa or 1 for its derivative


class Where(NamedTuple):
    """What a history acts on: `width` is d."""

    scheme: Scheme
    grid: Grid
    orders: Orders
    width: int
    dtype: torch.dtype
    device: torch.device


class HistoryOperator(ABC):
    """The history of one solve.

    Attributes
    ----------
    bounded : whether it keeps a bounded state, and not the rows of all steps
    rereads : whether its forward convolution can be asked for any rows again (`rows`)
    error : the certificate: bound on the relative error of its kernel
    """

    bounded = False
    rereads = False
    error = 0.0

    def __init__(self, where: Where) -> None:
        self.scheme, self.grid, self.orders, self.width, self.dtype, self.device = where

    @abstractmethod
    def step_weights(self, derivative: int) -> Weights:
        """Start column (C, N+1, G) and local weights, (G,) or (N+1, G); float64. Its kernel is not to be used."""

    @abstractmethod
    def convolution(
        self, entries: list[list[Entry]], rows: Sequence[Tensor], *, reverse: bool, scale: Tensor | None = None
    ) -> Convolution:
        """The convolution with these entries, (outputs, inputs), those of the derivative times `scale`, (G,)."""

    def forward(self, rows: Sequence[Tensor], channels: slice = slice(None)) -> Convolution:
        """c_n, one output for each channel."""
        entries = [[(c, 0)] for c in range(self.scheme.channels)[channels]]
        return self.convolution(entries, rows, reverse=False)

    def tangent(self, rows: Sequence[Tensor], alpha_dot: Tensor) -> Convolution:
        """The derivative of `forward` along X_dot and alpha_dot, (G,); the inputs are X_dot and X."""
        entries = [[(c, 0), (c, 1)] for c in range(self.scheme.channels)]
        return self.convolution(entries, rows, reverse=False, scale=alpha_dot)

    def adjoint(self, rows: Sequence[Tensor], *, alpha: bool) -> Convolution:
        """X_bar_n; with `alpha`, Z_n as a second output. The inputs are r_bar, by channel."""
        entries = [[(c, derivative) for c in range(self.scheme.channels)] for derivative in range(1 + alpha)]
        return self.convolution(entries, rows, reverse=True)

    @abstractmethod
    def graph(self, alpha: Tensor, h: Tensor | None = None) -> tuple[list[WeightsOfRow], Weights]:
        """The same on alpha's graph, and that of h on a uniform grid: by channel, n -> the weights of the rows 1..n-1,
        (n-1, G); and `step_weights`."""

    def _arrange(self, tables: Callable[[int], Tensor], entries: list[list[Entry]], scale: Tensor | None) -> Tensor:
        """(O, I, *) from tables(derivative), (C, *, G)."""

        def entry(c: int, derivative: int) -> Tensor:
            table = tables(derivative)[c]
            return table * scale if derivative and scale is not None else table

        return torch.stack([torch.stack([entry(*e) for e in line]) for line in entries])


class ExactLags(HistoryOperator):
    """All rows, uniform grid."""

    rereads = True

    def __init__(self, history: Exact, where: Where) -> None:
        super().__init__(where)
        self._history = history
        self._weights: dict[int, Weights] = {}

    def step_weights(self, derivative: int) -> Weights:
        if derivative not in self._weights:
            self._weights[derivative] = lag_weights(self.scheme, self.orders.alpha, self.grid, derivative)
        return self._weights[derivative]

    def convolution(
        self, entries: list[list[Entry]], rows: Sequence[Tensor], *, reverse: bool, scale: Tensor | None = None
    ) -> Convolution:
        if scale is not None:
            scale = scale.to(dtype=self.dtype, device=self.device)
        kernel = self._arrange(self._kernel, entries, scale)
        group = self.orders.group
        return self._history.convolution(
            kernel[..., 0] if group is None else kernel, rows, reverse=reverse, group=group
        )

    def graph(self, alpha: Tensor, h: Tensor | None = None) -> tuple[list[WeightsOfRow], Weights]:
        weights = self.scheme.weights(alpha, self.grid.h if h is None else h, self.grid.steps)
        return [_toeplitz_rows(channel) for channel in weights.kernel], weights

    def _kernel(self, derivative: int) -> Tensor:
        return self.step_weights(derivative).kernel.to(dtype=self.dtype, device=self.device)


class BoundedLags(HistoryOperator):
    """Recent rows and modes, uniform grid."""

    bounded = True

    def __init__(self, history: Bounded, where: Where) -> None:
        super().__init__(where)
        self._history = history
        self.error = self._tables(0).error

    def step_weights(self, derivative: int) -> Weights:
        return self._tables(derivative).step

    def convolution(
        self, entries: list[list[Entry]], rows: Sequence[Tensor], *, reverse: bool, scale: Tensor | None = None
    ) -> Convolution:
        near = self._arrange(lambda derivative: self._tables(derivative).near, entries, scale)
        modes = self._arrange(lambda derivative: self._tables(derivative).modes, entries, scale)
        kernel = LagKernel(near, modes, self._tables(0).nodes, self.grid.steps, self._size)
        return _bounded(self, kernel, rows, reverse)

    def graph(self, alpha: Tensor, h: Tensor | None = None) -> tuple[list[WeightsOfRow], Weights]:
        weights = self.scheme.weights(alpha, self.grid.h if h is None else h, self.grid.steps)
        compression = compress(self._history, self.scheme, self.grid)
        start = None if weights.start is None else compression.start(weights.start)
        rows = [_toeplitz_rows(channel) for channel in compression.dense(weights.kernel)]
        return rows, weights._replace(start=start)

    @property
    def _size(self) -> int:
        return BLOCK if self.orders.group is None else GROUPED_BLOCK

    def _tables(self, derivative: int) -> _LagTables:
        return lag_tables(self._history, self.scheme, self.orders.alpha, self.grid, self._size, derivative)


class Intervals(HistoryOperator):
    """A nonuniform grid; product integration only."""

    def __init__(self, where: Where) -> None:
        super().__init__(where)
        self._found: dict[tuple[str, int], Any] = {}
        self.times = self.grid.times()
        self.rules: tuple[Quadrature, ...] = tuple(quadrature(rule, self.times) for rule in self.scheme.rules)

    def step_weights(self, derivative: int) -> Weights:
        weights: Weights = self._once("weights", lambda a: interval_weights(self.scheme, self.rules, a), derivative)
        return weights

    def _once(self, name: str, function: Callable[[Tensor], Any], derivative: int) -> Any:
        """The function at the orders, or its derivative there, computed when it is first asked for."""
        if (name, derivative) not in self._found:
            self._found[name, derivative] = derive(function, self.orders.alpha, derivative)
        return self._found[name, derivative]


class ExactIntervals(Intervals):
    """All rows, nonuniform grid."""

    def convolution(
        self, entries: list[list[Entry]], rows: Sequence[Tensor], *, reverse: bool, scale: Tensor | None = None
    ) -> Convolution:
        wanted = {e for line in entries for e in line}

        def matrix(n0: int, n1: int, j0: int, j1: int) -> Tensor:
            at = (j0, j1, n0, n1) if reverse else (n0, n1, j0, j1)
            found = {}
            for c, derivative in wanted:
                block = derive(partial(_block, self.rules[c], at), self.orders.alpha, derivative)
                block = block * scale if derivative and scale is not None else block
                found[c, derivative] = block.transpose(0, 1) if reverse else block
            return torch.stack([torch.stack([found[e] for e in line]) for line in entries])

        return DenseConvolution(matrix, len(entries), rows, reverse=reverse, group=self.orders.group)

    def graph(self, alpha: Tensor, h: Tensor | None = None) -> tuple[list[WeightsOfRow], Weights]:
        def rows(rule: Quadrature) -> WeightsOfRow:
            return lambda n: rule.block(alpha, n, n + 1, 1, n)[0]

        return [rows(rule) for rule in self.rules], interval_weights(self.scheme, self.rules, alpha)


class BoundedIntervals(Intervals):
    """The power kernel as a sum of exponentials, nonuniform grid."""

    bounded = True

    def __init__(self, history: Bounded, where: Where) -> None:
        super().__init__(where)
        self._compression = history.compress_intervals(self.times, self.scheme.exponents)
        self.error = self._compression.error(lambda x: power_kernel(x, self.orders.alpha), self._modes(0))

    def _modes(self, derivative: int) -> Tensor:
        modes: Tensor = self._once("modes", self._fit, derivative)
        return modes

    def _fit(self, alpha: Tensor) -> Tensor:
        return self._compression.weights(lambda x: power_kernel(x, alpha))

    def convolution(
        self, entries: list[list[Entry]], rows: Sequence[Tensor], *, reverse: bool, scale: Tensor | None = None
    ) -> Convolution:
        channels = self.scheme.channels
        near = self._arrange(lambda derivative: self.step_weights(derivative).kernel, entries, scale)
        modes = self._arrange(lambda derivative: self._modes(derivative).expand(channels, -1, -1), entries, scale)
        size = BLOCK if self.orders.group is None else GROUPED_BLOCK
        kernel = IntervalKernel(near, modes, self._compression.nodes, self.times, self.rules, size, reverse=reverse)
        return _bounded(self, kernel, rows, reverse)

    def graph(self, alpha: Tensor, h: Tensor | None = None) -> tuple[list[WeightsOfRow], Weights]:
        weights, modes = interval_weights(self.scheme, self.rules, alpha), self._fit(alpha)
        nodes, t = self._compression.nodes, self.times

        def rows(rule: Quadrature, near: Tensor) -> WeightsOfRow:
            def row(n: int) -> Tensor:
                if n < 3:
                    return near[2 : n + 1]
                decays = torch.exp(-(t[n] - t[2:n]) * nodes[:, None]) * rule.moments(nodes, 1, n - 1)
                return torch.cat([decays.T @ modes, near[n : n + 1]])

            return row

        return [rows(*pair) for pair in zip(self.rules, weights.kernel, strict=True)], weights


def _block(rule: Quadrature, at: tuple[int, int, int, int], alpha: Tensor) -> Tensor:
    return rule.block(alpha, *at)


def history_operator(history: History, where: Where) -> HistoryOperator:
    """The operator of this history. Raises ValueError where the history cannot reach its tolerance."""
    if isinstance(history, Exact):
        return ExactLags(history, where) if where.grid.points is None else ExactIntervals(where)
    assert isinstance(history, Bounded), "a history is exact or bounded"
    return BoundedLags(history, where) if where.grid.points is None else BoundedIntervals(history, where)


def _bounded(operator: HistoryOperator, kernel: BlockKernel, rows: Sequence[Tensor], reverse: bool) -> Convolution:
    assert not rows, "a bounded history keeps its rows itself"
    group = operator.orders.group
    return BoundedConvolution(kernel, operator.width, operator.dtype, operator.device, reverse=reverse, group=group)


def _toeplitz_rows(kernel: Tensor) -> WeightsOfRow:
    return lambda n: kernel[1:n].flip(0)


# -- weights and their derivatives ---------------------------------------------------------------------------------


def power_kernel(x: Tensor, alpha: Tensor) -> Tensor:
    """x^(alpha-1) / Gamma(alpha), (P, G), for the distances x (P,)."""
    return x[:, None] ** (alpha - 1) * reciprocal_gamma(alpha)


def interval_weights(scheme: Scheme, rules: Sequence[Quadrature], alpha: Tensor) -> Weights:
    """The weights on a nonuniform grid: near (C, N+1, G) as kernel, start (C, N+1, G), local (N+1, G)."""
    near = torch.stack([rule.near(alpha) for rule in rules])
    start = torch.stack([rule.start(alpha) for rule in rules]) if scheme.uses_initial_slope else None
    return Weights(near, start, rules[0].local(alpha))


def derive(function: Callable[[Tensor], Weights | Tensor], alpha: Tensor, order: int) -> Any:
    """function(alpha), float64 without graph, or with order 1 its derivative along (1, ..., 1)."""
    if order:
        return differentiate(function, alpha)
    with torch.no_grad():
        return function(alpha)


_KEPT_NUMBERS = 2**16  # what is small and used again, a fixed order in a training loop, is kept between solves


def lag_weights(scheme: Scheme, alpha: Tensor, grid: Grid, derivative: int) -> Weights:
    """The weights on a uniform grid, or their derivatives."""
    small = len(alpha) * grid.steps <= _KEPT_NUMBERS
    return (_kept_lag_weights if small else _lag_weights)(scheme, tuple(alpha.tolist()), grid, derivative)


def _lag_weights(scheme: Scheme, alpha: tuple[float, ...], grid: Grid, derivative: int) -> Weights:
    order = torch.tensor(alpha, dtype=torch.float64)
    weights: Weights = derive(lambda a: scheme.weights(a, grid.h, grid.steps), order, derivative)
    return weights


_kept_lag_weights = lru_cache(maxsize=8)(_lag_weights)


def compress(history: Bounded, scheme: Scheme, grid: Grid) -> Compression:
    """How this history compresses the scheme's kernels on this grid."""
    return history.compress(grid.steps, grid.h, scheme.window, scheme.exponents)


class _LagTables(NamedTuple):
    """A compressed kernel (or its derivative): near (C, L + b, G), modes (C, Q, G), nodes (Q,), the rest, the error."""

    near: Tensor
    modes: Tensor
    nodes: Tensor
    step: Weights
    error: float


def lag_tables(history: Bounded, scheme: Scheme, alpha: Tensor, grid: Grid, size: int, derivative: int) -> _LagTables:
    """The compressed kernel on a uniform grid, or its derivative."""
    make = _kept_lag_tables if len(alpha) * grid.steps <= _KEPT_NUMBERS else _few_lag_tables
    return make(history, scheme, tuple(alpha.tolist()), grid, size, derivative)


def _lag_tables(
    history: Bounded, scheme: Scheme, alpha: tuple[float, ...], grid: Grid, size: int, derivative: int
) -> _LagTables:
    weights = _lag_weights(scheme, alpha, grid, derivative)
    compression = compress(history, scheme, grid)
    modes = compression.weights(weights.kernel)
    near = compression.lags(weights.kernel, modes, compression.window - 1 + size)
    start = None if weights.start is None else compression.start(weights.start)
    error = 0.0 if derivative else compression.error(weights.kernel, modes)
    return _LagTables(near, modes, compression.nodes, Weights(near, start, weights.local), error)


_kept_lag_tables = lru_cache(maxsize=8)(_lag_tables)
_few_lag_tables = lru_cache(maxsize=2)(_lag_tables)  # the value and the derivative of the solve at hand
