"""The interface of a history: a strictly causal convolution read online, one row per step, in either direction.

A scheme with N steps and state in R^d has I inputs X^i of shape (N, d), step n in row n - 1, and a kernel
kappa[o, i, k] for the lags k = 1..N.  Its history is, with O outputs,

    forward   (C X)_n^o   = sum_i sum_{j<n} kappa[o, i, n-j] X^i_j,    read in the order n = 1, 2, ..., N,
    reverse   (C^T X)_n^o = sum_i sum_{j>n} kappa[o, i, j-n] X^i_j,    read in the order n = N, ..., 2, 1.

The second is the transpose of the first when its kernel is the first's with o and i exchanged.  The word *online*
is the difficulty: row n of X is computed from c_n, so reading c_n may only touch the rows that were passed before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Kernel = Callable[[torch.Tensor], torch.Tensor]


class Convolution(ABC):
    """One pass of a history: every step is read, then its rows are pushed.

    `exact` keeps the rows in buffers that the caller owns and may alias elsewhere, `bounded` in a ring and modes of its
    own. Rows not yet passed may hold anything (NaN, or live data of another part of the sweep): they are not touched.
    """

    @abstractmethod
    def read(self, n: int) -> tuple[torch.Tensor, ...]:
        """c_n, one (d,) tensor per output: views of the workspace, valid until the next read.

        The first read may name any n (a resumed sweep: all rows passed before must be final); from there on the
        order is n + 1, n + 2, ... forward and n - 1, n - 2, ... in reverse, and RuntimeError is raised otherwise.
        """

    @abstractmethod
    def push(self, n: int, values: Sequence[torch.Tensor]) -> None:
        """Row n of every input, (d,) each, is now final: to be called after step n was read, and before the next."""

    @property
    @abstractmethod
    def workspace_bytes(self) -> int:
        """Bytes planned beyond the caller's buffers and kernel: rows, matrices, spectra, temporaries.

        What BLAS and FFT libraries allocate inside is not in it; resident memory can exceed it by some megabytes.
        """


class Compression(Protocol):
    """A linear map from the kernels of a uniform grid, (C, N+1, G) float64, to their recent lags and exponentials.

    window : the lag from which the exponentials exp(-s_q (k - window)) take over; nodes : s, (Q,)
    """

    window: int
    nodes: torch.Tensor

    def weights(self, kernel: torch.Tensor) -> torch.Tensor:
        """W (C, Q, G); differentiable."""

    def lags(self, kernel: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
        """The compressed kernel at the lags 0..count-1, (C, count, G)."""

    def dense(self, kernel: torch.Tensor) -> torch.Tensor:
        """The compressed kernel at all lags, (C, N+1, G); differentiable."""

    def start(self, sigma: torch.Tensor) -> torch.Tensor:
        """The start column, (C, N+1, G)."""

    def error(self, kernel: torch.Tensor, weights: torch.Tensor) -> float:
        """The largest relative error over all lags. Raises ValueError where it is above what was promised."""


class IntervalCompression(Protocol):
    """The power kernel u^(alpha-1) / Gamma(alpha) on the distances of a nonuniform grid as a sum of exponentials.

    nodes : s, (Q,); a kernel is a function of distances (P,) with values (P, G)
    """

    nodes: torch.Tensor

    def weights(self, kernel: Kernel) -> torch.Tensor:
        """w (Q, G); differentiable."""

    def error(self, kernel: Kernel, weights: torch.Tensor) -> float:
        """The largest relative error over all distances. Raises ValueError where it is above what was promised."""


class History:
    """How the memory term of a scheme is evaluated: the values of `history`; frozen, hashable.

    There are two kinds: `Exact` keeps the rows of all steps, those derived from `Bounded` a state of bounded size.
    """

    @property
    def any_grid(self) -> bool:
        """Whether it can be had on a nonuniform grid."""
        return False

    def uniform_error(self) -> ValueError:
        """The error of a nonuniform grid, where it cannot be had."""
        return ValueError(f"history={self} needs a uniform grid: give step_size, or use SumOfExponentials() or Exact()")


class Bounded(History, ABC):
    """A history with a bounded state: recent lags and a sum of exponentials.

    One of your own derives from this class, and gives `compress`; with `compress_intervals` it may be had on
    nonuniform grids too. Its adjoint is pfde's: a history is a linear map from kernels to compressed kernels.
    """

    @property
    def any_grid(self) -> bool:
        return type(self).compress_intervals is not Bounded.compress_intervals

    @abstractmethod
    def compress(self, steps: int, h: float, window: int, exponents: tuple[float, float]) -> Compression:
        """The compression of kernels over `steps` steps of size h.

        From the lag `window` on they are smooth and decay like k^-beta, with beta somewhere in `exponents`.
        """

    def compress_intervals(self, times: torch.Tensor, exponents: tuple[float, float]) -> IntervalCompression:
        """The compression of the power kernel on a nonuniform grid, the times (N+1,) float64; optional."""
        raise self.uniform_error()


class Intervals(Protocol):
    """The weights of one product-integration rule on a nonuniform grid, as a history sees them."""

    def moments(self, s: torch.Tensor, j0: int, j1: int) -> torch.Tensor:
        """g (Q, j1 - j0): the weight of column j in a row n >= j + 2 is sum_q w_q exp(-s_q (t_n - t_{j+1})) g_qj."""


def validate(kernel: torch.Tensor, rows: Sequence[torch.Tensor], group: torch.Tensor | None) -> None:
    """Raise ValueError or TypeError unless kernel, buffers and groups fit each other."""
    if len(rows) == 0:
        raise ValueError("rows must hold one (N, d) buffer per input channel: got none")
    first = rows[0]
    for i, x in enumerate(rows):
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rows[{i}] must be float32 or float64: got {x.dtype}")
        if x.dim() != 2 or x.shape != first.shape or 0 in x.shape:
            raise ValueError(
                f"rows[{i}] must be a non-empty (N, d), like rows[0] {tuple(first.shape)}: got {tuple(x.shape)}"
            )
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(f"rows[{i}] must have rows[0]'s {first.dtype}, {first.device}: got {x.dtype}, {x.device}")
        if not x.is_contiguous():
            raise ValueError(f"rows[{i}] must be contiguous, it is read in place: got strides {x.stride()}")
    N, d = first.shape
    axes = 3 if group is None else 4
    if kernel.dim() != axes or tuple(kernel.shape[1:3]) != (len(rows), N + 1) or 0 in kernel.shape:
        expected = f"(O, {len(rows)}, {N + 1}" + (")" if group is None else ", G)")
        raise ValueError(
            f"kernel must be {expected} for {len(rows)} rows of {N} steps "
            f"{'without' if group is None else 'with'} group: got {tuple(kernel.shape)}"
        )
    if kernel.device != first.device:
        raise ValueError(f"kernel must be on the device of rows, {first.device}: got {kernel.device}")
    if group is not None:
        if group.dtype != torch.int64 or tuple(group.shape) != (d,) or group.device != first.device:
            raise ValueError(f"group must be int64, ({d},), on {first.device}: got {group.dtype}, {tuple(group.shape)}")
        if int(group.min()) < 0 or int(group.max()) >= kernel.shape[3]:
            raise ValueError(
                f"group must index the kernel's last axis, 0..{kernel.shape[3] - 1}: "
                f"got {int(group.min())}..{int(group.max())}"
            )
