"""The history as recent lags and a sum of exponentials, for kernels that decay smoothly.

    kappa_k = exact (k < n0),     kappa_k ~ sum_q W_q exp(-s_q (k - n0))   (k >= n0, all the way to N)

The nodes s_q depend on the number of steps and on the tolerance alone, so that one set serves a learnable order over
its whole range and all components of a vector of orders; the weights W = P kappa are a linear function of the exact
kernel (`nodes`), so that W' = P kappa' is their derivative in alpha, exactly. What is integrated is the scheme with the
compressed kernel; its adjoint, here as everywhere, is exact to rounding. How far it is from the exact kernel is the
certificate: the largest relative error over all lags (Braess, Hackbusch 2009, doi:10.1007/978-3-642-03413-8_10; Jiang,
Zhang, Zhang, Zhang 2017, doi:10.4208/cicp.OA-2016-0136).

On a nonuniform grid (product integration) the kernel u^(alpha-1) / Gamma(alpha) itself is the sum, and every weight
but that of the nearest row is the exact integral of the exponentials against the interpolant (`Intervals`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Bounded, Intervals
from .bounded import Block
from .nodes import Fit, certificate, certificate_continuous, exponential_nodes, sample_distances, sample_points


@dataclass(frozen=True)
class SumOfExponentials(Bounded):
    """The compressed history: time O(N Q d), memory O(Q d), whatever N is.

    Parameters
    ----------
    tolerance : largest relative error of the kernel over all lags, in (0, 0.1]; what was reached is
        `stats.history_error`. About 1e-13 is rounding level; what a kernel does not allow is an error
    """

    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, int | float):
            raise TypeError(f"tolerance must be a number: got {self.tolerance!r}")
        if not 0 < self.tolerance <= 0.1:
            raise ValueError(f"tolerance must be in (0, 0.1], such as 1e-10: got {self.tolerance:g}")

    def compress(self, steps: int, h: float, window: int, exponents: tuple[float, float]) -> ExponentialLags:
        """The compression of kernels over `steps` lags, like k^-beta, beta in `exponents`, from `window` on."""
        return _lags(self.tolerance, steps, min(window, steps + 1), exponents)

    def compress_intervals(self, times: Tensor, exponents: tuple[float, float]) -> ExponentialIntervals:
        """The compression of the power kernel on a nonuniform grid."""
        return ExponentialIntervals(self.tolerance, times, exponents)


class ExponentialLags:
    """A linear map from kernels on a uniform grid to their recent lags and weights of exponentials."""

    def __init__(self, tolerance: float, steps: int, window: int, exponents: tuple[float, float]) -> None:
        self.steps, self.window, self._tolerance = steps, window, tolerance
        self.nodes = torch.empty(0, dtype=torch.float64)
        if window <= steps:
            # kappa_k ~ k^-beta, k >= n0, in units of n0: distances x = k / n0 from 1 on
            ratio = max(2.0, steps / window)
            self.nodes = exponential_nodes(ratio, tolerance, exponents) / window
            self._points = sample_points(window, steps)
            self._fit = Fit(self.nodes, (self._points - window).double(), self._points.double() ** (sum(exponents) / 2))

    def weights(self, kernel: Tensor) -> Tensor:
        """W (C, Q, G) of a kernel (C, N+1, G); differentiable."""
        if not len(self.nodes):
            return kernel.new_zeros(len(kernel), 0, kernel.shape[2])
        return self._fit.weights(kernel[:, self._points])

    def lags(self, kernel: Tensor, weights: Tensor, count: int) -> Tensor:
        """The compressed kernel at the lags 0..count-1, (C, count, G); lags beyond N as the exponentials go on."""
        exact = kernel[:, : min(self.window, count)]
        if not len(self.nodes):
            return torch.nn.functional.pad(exact, (0, 0, 0, count - exact.shape[1]))
        k = torch.arange(count - exact.shape[1], dtype=torch.float64)
        return torch.cat([exact, torch.exp(-k[:, None] * self.nodes) @ weights], dim=1)

    def dense(self, kernel: Tensor) -> Tensor:
        """The compressed kernel at all lags, (C, N+1, G), on the graph."""
        return self.lags(kernel, self.weights(kernel), kernel.shape[1])

    def start(self, sigma: Tensor) -> Tensor:
        """The start column (C, N+1, G): exact."""
        return sigma

    def error(self, kernel: Tensor, weights: Tensor) -> float:
        """The certificate: the largest relative error over all lags. Raises ValueError above the tolerance."""
        if not len(self.nodes):
            return 0.0
        return _within(certificate(kernel, self.window, self.nodes, weights), self._tolerance)


@functools.lru_cache(maxsize=16)
def _lags(tolerance: float, steps: int, window: int, exponents: tuple[float, float]) -> ExponentialLags:
    return ExponentialLags(tolerance, steps, window, exponents)


def _within(error: float, tolerance: float) -> float:
    if not error <= tolerance:
        raise ValueError(
            f"tolerance={tolerance:g} of SumOfExponentials cannot be met by this kernel in double precision: the best "
            f"relative error found is {error:.2g}; use a tolerance of {_next(error):g} or more, or history=pfde.Exact()"
        )
    return error


def _next(error: float) -> float:
    """A tolerance above the error, one digit, rounded up; its nodes are others, so not below what all kernels allow."""
    if not math.isfinite(error):
        return math.inf
    enough = max(1.2 * error, 1e-14)
    digit = 10.0 ** math.floor(math.log10(enough))
    return float(f"{math.ceil(enough / digit) * digit:.0e}")


class ExponentialIntervals:
    """The power kernel u^(alpha-1) / Gamma(alpha) on the distances of a nonuniform grid."""

    def __init__(self, tolerance: float, times: Tensor, exponents: tuple[float, float]) -> None:
        self._tolerance = tolerance
        self._nearest = float(times.diff().min())
        self._ratio = max(2.0, float(times[-1] - times[0]) / self._nearest)
        scaled = exponential_nodes(self._ratio, tolerance, exponents)
        self.nodes = scaled / self._nearest
        self._points = sample_distances(self._ratio)
        self._fit = Fit(scaled, self._points, self._points ** (sum(exponents) / 2))

    def weights(self, kernel: Any) -> Tensor:
        """w (Q, G) of kernel: distances (P,) -> values (P, G); differentiable."""
        return self._fit.weights(kernel(self._points * self._nearest))

    def error(self, kernel: Any, weights: Tensor) -> float:
        """The certificate: the largest relative error over all distances. Raises ValueError above the tolerance."""
        found = certificate_continuous(
            lambda x: kernel(x * self._nearest), self._ratio, self.nodes * self._nearest, weights
        )
        return _within(found, self._tolerance)


class LagKernel:
    """A Toeplitz kernel in blocks, in either direction: only lags matter.

    near : (O, I, L + b, G), lag k at index k; modes : (O, I, Q, G), of exp(-s_q (k - L - 1)); nodes : (Q,)
    """

    uniform = True

    def __init__(self, near: Tensor, modes: Tensor, nodes: Tensor, steps: int, size: int) -> None:
        self._near, self._weights, self._nodes = near, modes, nodes
        self.outputs, self.inputs, self.modes, self._G = modes.shape
        self.steps, self.size = steps, size
        self.lags = near.shape[2] - size
        # A set of modes for each input, weighted on their way out; or for each output, weighted on their way in.
        self._outward = self.inputs <= self.outputs
        self.sets = min(self.inputs, self.outputs) if self.modes else 0

    def block(self, start: int, m: int) -> Block:
        """The same wherever it lies."""
        u, s = torch.arange(m, dtype=torch.float64), self._nodes
        distance = torch.arange(m)[:, None] + self.lags - torch.arange(self.lags + m)
        local = torch.where((distance > 0)[:, :, None], self._near[:, :, distance.clamp(min=0)], 0.0)
        out, into = torch.exp(-u[:, None] * s), torch.exp(-(m - 1 - u) * s[:, None])
        own = torch.eye(self.sets, dtype=torch.float64)[:, :, None, None]
        weights = self._weights if self.sets else self._weights[:0]
        scales: dict[str, Tensor] = {}
        if not self.sets:
            outward, inward = out.new_zeros(self.outputs, 0, m, 0), out.new_zeros(0, self.inputs, 0, m)
        elif self._outward:
            inward = own * into
            outward = out * (weights[..., 0].unsqueeze(2) if self._G == 1 else 1.0)
            outward = outward.expand(self.outputs, self.sets, m, self.modes)
            if self._G > 1:
                scales["outward_scale"] = weights
        else:
            outward = own * out
            inward = into * (weights[..., 0].unsqueeze(3) if self._G == 1 else 1.0)
            inward = inward.expand(self.sets, self.inputs, self.modes, m)
            if self._G > 1:
                scales["inward_scale"] = weights
        if self._G == 1:
            local = local[..., 0]
        return Block(local, outward, inward, -m * s, **scales)


class IntervalKernel:
    """A kernel on a nonuniform grid in blocks, in one direction of travel.

    The weight of column j in row n, for the channel c whose rule is intervals[c], is near[n] for j = n - 1 and

        sum_q w_q exp(-s_q (t_n - t_{j+1})) g^c_qj      for j <= n - 2.

    near : (O, I, N+1, G), modes : (O, I, Q, G), both with the channels along O forward and along I in reverse
    """

    uniform = False
    lags = 1

    def __init__(
        self,
        near: Tensor,
        modes: Tensor,
        nodes: Tensor,
        times: Tensor,
        intervals: tuple[Intervals, ...],
        size: int,
        *,
        reverse: bool,
    ) -> None:
        self._near, self._weights, self._nodes, self._t, self._intervals = near, modes, nodes, times, intervals
        self._reverse, self.size, self.steps = reverse, size, len(times) - 1
        self.outputs, self.inputs, self.modes, self._G = modes.shape
        self.sets = self.inputs if reverse else self.outputs * self.inputs

    def block(self, start: int, m: int) -> Block:
        """The weights of these steps."""
        return self._reverse_block(start, m) if self._reverse else self._forward_block(start, m)

    def _forward_block(self, start: int, m: int) -> Block:
        t, s, N = self._t, self._nodes, self.steps
        reads, rows = torch.arange(start + 1, start + m + 1), torch.arange(start, start + m + 1)  # steps n, columns j
        g = self._moments(rows)  # (C, Q, m + 1)
        outward = torch.zeros(self.outputs, self.sets, m, self.modes, dtype=torch.float64)
        inward = torch.zeros(self.sets, self.inputs, self.modes, m, dtype=torch.float64)
        scale = torch.zeros(self.outputs, self.sets, self.modes, self._G, dtype=torch.float64)
        out = torch.exp(-(t[reads] - t[start])[:, None] * s)
        into = torch.exp(-(t[start + m] - t[(rows[:-1] + 1).clamp(max=N)]) * s[:, None])
        for c in range(self.outputs):
            for i in range(self.inputs):
                r = c * self.inputs + i
                outward[c, r], inward[r, i], scale[c, r] = out, into * g[c, :, :-1], self._weights[c, i]
        distance = t[reads][:, None] - t[(rows + 1).clamp(max=N)]
        local = self._local(reads[:, None] - rows, distance, reads, g.unsqueeze(1).expand(-1, self.inputs, -1, -1))
        return self._assemble(local, outward, inward, (t[start] - t[start + m]) * s, scale)

    def _reverse_block(self, start: int, m: int) -> Block:
        t, s, N = self._t, self._nodes, self.steps
        end = N - start
        reads, rows = torch.arange(end, end - m, -1), torch.arange(end + 1, end - m, -1)  # columns j, steps n
        g = self._moments(reads)  # (C, Q, m)
        after = t[min(end + 1, N)]
        outward = torch.zeros(self.outputs, self.sets, m, self.modes, dtype=torch.float64)
        inward = torch.zeros(self.sets, self.inputs, self.modes, m, dtype=torch.float64)
        out = torch.exp(-(after - t[(reads + 1).clamp(max=N)]) * s[:, None])  # (Q, m)
        into = torch.exp(-(t[rows[:-1].clamp(max=N)] - t[end - m + 1]) * s[:, None])
        into[:, rows[:-1] > N] = 0.0
        for i in range(self.inputs):
            inward[i, i] = into
            outward[:, i] = (g[i] * out).T
        distance = t[rows.clamp(max=N)] - t[(reads + 1).clamp(max=N)][:, None]
        lag = rows - reads[:, None]
        local = self._local(lag, distance, rows.clamp(max=N), g.unsqueeze(0).expand(self.outputs, -1, -1, -1))
        local[:, :, :, rows > N] = 0.0
        return self._assemble(local, outward, inward, (t[end - m + 1] - after) * s, self._weights)

    def _moments(self, columns: Tensor) -> Tensor:
        """g^c_qj of consecutive columns in any order, (C, Q, columns); zero where j = 0 or j = N."""
        lo, hi = int(columns.min()), int(columns.max())
        inner = slice(max(lo, 1), min(hi, self.steps - 1) + 1)
        g = torch.zeros(len(self._intervals), self.modes, hi - lo + 1, dtype=torch.float64)
        if inner.stop > inner.start:
            for c, rule in enumerate(self._intervals):
                g[c, :, inner.start - lo : inner.stop - lo] = rule.moments(self._nodes, inner.start, inner.stop)
        return g[:, :, columns - lo]

    def _local(self, lag: Tensor, distance: Tensor, rows: Tensor, g: Tensor) -> Tensor:
        """(O, I, reads, ring, G): near at lag 1, the exponentials beyond, zero at lag 0 and below.

        lag, distance : (reads, ring); rows : n, of each read, in reverse of each row of the ring; g : (O, I, Q, *), of
        the rows of the ring, in reverse of the reads
        """
        decays = torch.exp(-distance.clamp(min=0)[:, :, None] * self._nodes)  # (reads, ring, Q)
        along = "u" if self._reverse else "v"
        far = torch.einsum(f"uvq,oiqg,oiq{along}->oiuvg", decays, self._weights, g)
        near = self._near[:, :, rows]
        near = near[:, :, None] if self._reverse else near[:, :, :, None]
        lag = lag[:, :, None]
        return torch.where(lag == 1, near, torch.where(lag > 1, far, 0.0))

    def _assemble(self, local: Tensor, outward: Tensor, inward: Tensor, decay: Tensor, scale: Tensor) -> Block:
        if self._G == 1:
            return Block(local[..., 0], outward * scale[..., 0].unsqueeze(2), inward, decay)
        return Block(local, outward, inward, decay, outward_scale=scale)
