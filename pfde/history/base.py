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
from collections.abc import Sequence
from typing import Protocol

import torch


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


class Bounded(ABC):
    """A history with a bounded state: frozen, hashable."""

    @abstractmethod
    def compress(self, steps: int, h: float, window: int, exponents: tuple[float, float]) -> Compression:
        """The compression of kernels over `steps` steps of size h.

        From the lag `window` on they are smooth and decay like k^-beta, with beta somewhere in `exponents`.
        """


class Intervals(Protocol):
    """The weights of one product-integration rule on a nonuniform grid, as a history sees them."""

    def moments(self, s: torch.Tensor, j0: int, j1: int) -> torch.Tensor:
        """g (Q, j1 - j0): the weight of column j in a row n >= j + 2 is sum_q w_q exp(-s_q (t_n - t_{j+1})) g_qj."""


class Toeplitz:
    """The Toeplitz blocks T[i, v] = table[origin - i + v] of a kernel, as matrices and as spectra.

    `kernel` is (O, I, N+1, G); table[q] = kappa[Q - q] forward and kappa[q] in reverse, zero at the lags outside 1..N.
    `components`, (d,), gives each component its index into G, and None means that all share one kernel; `group` below
    selects some indices, or None all.  Up to `bound` numbers the table is held; beyond (many groups) its parts are
    gathered from the kernel whenever they are needed.  Temporaries keep to about `limit` numbers.
    """

    def __init__(
        self, kernel: torch.Tensor, components: torch.Tensor | None, Q: int, reverse: bool, limit: int, bound: int
    ) -> None:
        self.kernel, self.components, self.Q, self.reverse = kernel, components, Q, reverse
        self.limit, self.bound = limit, bound
        self.O, self.I, steps, self.G = kernel.shape
        self.N = steps - 1
        self.every = torch.arange(self.G, device=kernel.device)
        held = self.G == 1 or kernel.numel() // steps * Q <= bound
        self.tables = [self._gather(i, 0, Q + 1, self.every) for i in range(self.I)] if held else []
        self.matrices: list[torch.Tensor] = []
        self.panels = [] if components is None else _panels(components, self.G)

    def keep(self, corner: int, tall: int, wide: int) -> None:
        """Hold the block of `tall` rows, `wide` columns with origin `corner`, unless it is too large."""
        if self.O * self.I * self.G * tall * wide <= self.bound:
            self.corner, self.tall, self.wide = corner, tall, wide
            self.matrices = [self._build(i, corner, tall, wide, None) for i in range(self.I)]

    def multiply(self, out: torch.Tensor, i: int, origin: int, m: int, x: torch.Tensor, beta: int) -> None:
        """out = beta out + T x for out (m O, d), x (length, d); each component with the T of its group."""
        if self.components is None:
            out.addmm_(self.block(i, origin, m, len(x), None)[0], x, beta=beta)
            return
        if beta == 0:
            out.zero_()
        for which, index in self.panels:
            if isinstance(index, slice):
                out[:, index].addmm_(self.block(i, origin, m, len(x), which)[0], x[:, index])
                continue
            piece = max(1, self.limit // len(index))
            for v in range(0, len(x), piece):
                part = x[v : v + piece].index_select(1, index)
                out.index_add_(1, index, self.block(i, origin + v, m, len(part), which)[0] @ part)
        if not self.panels:
            self._componentwise(out, i, origin, m, x)

    def _componentwise(self, out: torch.Tensor, i: int, origin: int, m: int, x: torch.Tensor) -> None:
        assert self.components is not None
        piece = max(1, min(len(x), self.limit // len(out)))
        columns = max(1, self.limit // (len(out) * piece))
        for v in range(0, len(x), piece):
            part = x[v : v + piece]
            for c in range(0, x.shape[1], columns):
                T = self.block(i, origin + v, m, len(part), self.components[c : c + columns])
                out[:, c : c + columns] += torch.bmm(T, part[:, c : c + columns].t().unsqueeze(2)).squeeze(2).t()

    def block(self, i: int, origin: int, m: int, length: int, group: torch.Tensor | None) -> torch.Tensor:
        """T of input i, (groups, m O, length): rows interleave the outputs; a slice of what is held if it can be."""
        if self.matrices:
            v = max(0, origin - self.corner)
            u = v - (origin - self.corner)
            if u + m <= self.tall and v + length <= self.wide:
                part = self.matrices[i][:, u * self.O : (u + m) * self.O, v : v + length]
                return part if group is None else part.index_select(0, group)
        return self._build(i, origin, m, length, group)

    def spectrum(self, origin: int, m: int, S: int, n: int, group: torch.Tensor | None) -> torch.Tensor:
        """The DFT of length n of w -> table[origin - w], -S < w < m, (I, groups, O, n/2 + 1).

        Multiplication by it is the block of m rows and S columns, in the first m entries of the circular product.
        """
        spectra = []
        for i in range(self.I):
            w = self._window(i, origin - m + 1, m + S - 1, group)
            gap = w.new_zeros((*w.shape[:2], n - m - S + 1))
            spectra.append(torch.fft.rfft(torch.cat([w[..., :m].flip(2), gap, w[..., m:].flip(2)], dim=2)))
        return torch.stack(spectra)

    def _build(self, i: int, origin: int, m: int, length: int, group: torch.Tensor | None) -> torch.Tensor:
        # torch has no negative strides: a Hankel view, its rows reversed by a copy, is the Toeplitz matrix.
        w = self._window(i, origin - m + 1, m + length - 1, group)
        return w.unfold(2, length, 1).flip(2).transpose(1, 2).reshape(w.shape[0], m * self.O, length)

    def window(self, i: int, q: int, length: int) -> torch.Tensor:
        """table[q : q + length] of input i without groups, (O, length)."""
        return self._window(i, q, length, None)[0]

    def _window(self, i: int, q: int, length: int, group: torch.Tensor | None) -> torch.Tensor:
        """table[q : q + length] of input i, (groups, O, length); a view of the table held if it can be."""
        if self.tables:
            part = self.tables[i][:, :, q : q + length]
            return part if group is None else part.index_select(0, group)
        return self._gather(i, q, length, self.every if group is None else group)

    def _gather(self, i: int, q: int, length: int, group: torch.Tensor) -> torch.Tensor:
        k = q if self.reverse else self.Q - q - length + 1
        lo, hi = max(k, 1), min(k + length, self.N + 1)
        if hi <= lo:
            return self.kernel.new_zeros((len(group), self.O, length))
        part = self.kernel[:, i, lo:hi].index_select(2, group).permute(2, 0, 1)
        part = torch.nn.functional.pad(part, (lo - k, k + length - hi))
        return (part if self.reverse else part.flip(2)).contiguous()


def _panels(group: torch.Tensor, groups: int) -> list[tuple[torch.Tensor, slice | torch.Tensor]]:
    """(group, its components) where the groups are large enough to be multiplied one by one, else nothing."""
    if groups * 16 > len(group):
        return []
    panels: list[tuple[torch.Tensor, slice | torch.Tensor]] = []
    for g in range(groups):
        index = torch.nonzero(group == g).squeeze(1)
        if len(index):
            lo, hi = int(index[0]), int(index[-1]) + 1
            panels.append((torch.tensor([g], device=group.device), slice(lo, hi) if hi - lo == len(index) else index))
    return panels


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
