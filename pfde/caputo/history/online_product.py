"""The exact history: an online triangular Toeplitz product with every term, in O(N^2), or O(N log^2 N) by FFT.

Count the steps in the direction of travel, tau = n - 1 forward and tau = N - n in reverse.  Steps are grouped in
superblocks of M.  On entering one, a *pull* adds the influence of all earlier rows on its M steps to a workspace W:
a product with an M x L Toeplitz matrix, whose rows at lags beyond M / 2 are interpolated from r of them where the
kernel proves smooth (`skeleton`: r = 16 in float32, 32 in float64, so r / M of the flops), or a few FFTs.  Inside it,
at an offset u with 2^p the largest power of two dividing u >= b, a *push* adds the influence of the last 2^p rows on
the next 2^p steps (Hairer, Lubich, Schlichte 1985, SIAM J. Sci. Stat. Comput. 6, doi:10.1137/0906037); what remains
are fewer than b recent rows, added by a matrix-vector product at the read itself.
All three are one operation: the block T[i, v] = kappa[|a + i - b - v|]
mapping buffer rows b.. to a... With table[q] = kappa[Q - q] forward (Q = last index) and kappa[q] in reverse it reads

    T[i, v] = table[origin - i + v],     origin = b - a + (Q forward | 0 in reverse),

so a direction is index arithmetic, and the transpose cannot disagree with its operator.

Symbols: N steps, d components, I inputs, O outputs, G groups of components of one order alpha; W is (M, O, d).
Errors, in units eps of the rounding: direct and blocked commit at most N eps sum_j |kappa_{n-j}| |X_j|, to which
interpolation adds a few eps of the same sum (its residual, at most 16 eps of the largest |kappa| among M lags; about
1 eps in float32 and 3..9 eps in float64 for the schemes, mostly the rounding of their kernels); the FFT commits
c log2(N) eps |kappa|_2 |X|_2 over the segment transformed, relative to the norm and not to each c_n (tests hold both
to 50 eps of these sizes); the nearest rows are always summed directly.

NOTE 1. Superblocks sit at tau = 0, M, 2M, ... whatever the first read is, and resuming inside one replays its pushes:
a resumed sweep returns bitwise what an uninterrupted one would have.

NOTE 2. Interpolation is for one kernel per channel (no groups); the last superblock, when cut short, interpolates on
the full one that ends with the buffer.  A rough kernel, or a superblock of fewer than 3 r rows, gets dense pulls.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .base import Convolution
from .skeleton import NODES, TOLERANCE, Skeleton
from .toeplitz import Toeplitz

# Sizes, measured on one core of an EPYC 9004 (MKL, float32 and float64); see `exact` for the rule made of them.
BLOCKED_ROWS = 64  # rows per pull by products: beyond it a product is no faster per row
SKELETON_ROWS = 128, 512  # the most rows where far ones are interpolated, of N / 8 and of N / 16
SKELETON_NUMBERS = 2**20  # the most numbers T[nodes] may have, unless 1/16 of a buffer is more
FFT_FROM = 1024  # the smallest push by FFT; 128, 256 and 512 were slower at N = 1e4, larger ones not tried
GROUP_FFT_FROM = 32  # the same with groups: an estimate, not measured
SEGMENT = 4  # FFT length over M in a pull: 8 was slower, 2 equal within the noise (N = 1e4, d = 64 and 1024)
COLUMNS = 64  # components transformed together: two cache lines of each row at least, and n x 64 numbers in L2


def _base(d: int) -> int:
    """Rows left to the reads: below this a push costs more in calls than it saves in arithmetic."""
    return 16 if d >= 2048 else 32


@dataclass
class _Transform:
    """Blocks of m steps by FFTs of length n over segments of S rows; `spectra[s]` belongs to the distance s S."""

    m: int
    S: int
    n: int
    spectra: list[torch.Tensor] = field(default_factory=list)


def _smooth(n: int) -> int:
    """The smallest even 2^p 3^q 5^r >= n (r, q <= 1), lengths at which every FFT library is fast."""
    p = 1 << max(1, (n - 1).bit_length())
    return min(x for x in (p, p // 8 * 5, p // 4 * 3, p // 16 * 15) if x >= n and x % 2 == 0)


class ExactConvolution(Convolution):
    """Both directions of the exact history; the module describes the algorithm.

    Owns W and the kernel's tables, matrices and spectra; borrows `rows` and, with groups, `kernel`.
    """

    def __init__(
        self,
        kernel: torch.Tensor,
        rows: Sequence[torch.Tensor],
        reverse: bool,
        group: torch.Tensor | None,
        algorithm: str,
    ) -> None:
        self.algorithm = algorithm
        self._rows = tuple(x.detach() for x in rows)
        self._reverse, self._group = reverse, group
        self._N, self._d = rows[0].shape
        self._O, self._I = kernel.shape[:2]
        # Temporaries stay below 1/16 of a buffer (but 2^15 numbers), kernel matrices too (but 2^17).
        self._limit = max(2**15, self._N * self._d // 16)
        self._plan()
        kernel = kernel.detach().to(rows[0].dtype)
        self._tabulate(kernel.unsqueeze(3) if group is None else kernel)
        self._beta = 0 if self._M == 1 else 1
        # One output of one order is the common case; plain vectors spare it some calls a read.
        plain = self._O == 1 and group is None
        self._vectors = [(x, t[0, 0]) for x, t in zip(self._rows, self._toeplitz.tables, strict=True)] if plain else []
        self._new_workspace()
        self._replay: ExactConvolution | None = None

    def _plan(self) -> None:
        N, grouped, fft = self._N, self._group is not None, self.algorithm == "fft"
        self._b = _base(self._d)
        few, many = (BLOCKED_ROWS, BLOCKED_ROWS) if fft or grouped else SKELETON_ROWS
        M = max(-(-N // 64) * 4, min(-(-N // 32) * 4, few))  # N / 16 rows, N / 8 while that is few
        self._M = M = 1 if self.algorithm == "direct" else M if fft else min(M, many)
        first = (GROUP_FFT_FROM if grouped else FFT_FROM) if fft else 2 * N + 8
        n = _smooth(SEGMENT * M)
        self._pull = _Transform(M, n - M + 1, n) if fft else None
        sizes = [m for m in (2**p for p in range(M.bit_length())) if first <= m < M]
        self._push = {m: _Transform(m, m, 2 * m) for m in sizes}
        per_column = n * (4 + self._O + (4 * self._O * self._I if grouped else 0))
        self._columns = max(1, min(COLUMNS, self._limit // per_column))
        self._tall = min(M, first // 2)

    def _tabulate(self, kernel: torch.Tensor) -> None:
        N, bound = self._N, max(2**17, self._limit)
        # Lags beyond N occur only in blocks that stick out at an end of the buffer; zeros spare the special cases.
        self._Q = N + self._M + (self._pull.S if self._pull else 0)
        self._toeplitz = Toeplitz(kernel, self._group, self._Q, self._reverse, self._limit, bound)
        self._skeleton = self._interpolate()
        if self._skeleton is None and not self._pull:
            self._M = self._tall = min(self._M, BLOCKED_ROWS)
        # Pushes by products are corners of one matrix, pulls its column slices.
        wide = self._tall if self._pull else min(N, self._M + self._skeleton.D) if self._skeleton else N
        numbers = kernel.numel() // (N + 1) * self._tall * wide
        self._wide = wide if numbers <= bound else min(wide, 256)
        if self._M > 1:
            self._toeplitz.keep(self._tall if self._reverse else self._Q - self._wide, self._tall, self._wide)
        if self._toeplitz.tables and self._pull:
            self._pull.spectra = [self._spectrum(self._pull, s, None) for s in range(-(-N // self._pull.S))]
            for transform in self._push.values():
                transform.spectra = [self._spectrum(transform, 0, None)]

    def _interpolate(self) -> Skeleton | None:
        """The pulls' far part if there is enough of it, its matrices are not too large, and the kernel is smooth."""
        M, dtype = self._M, self._rows[0].dtype
        D = M // 2
        length = self._N - M - D
        if self._pull or self._group is not None or NODES[dtype] > M // 3 or length < M:
            return None
        if NODES[dtype] * self._O * self._I * length > max(SKELETON_NUMBERS, self._limit):
            return None
        skeleton = Skeleton(self._toeplitz, M, D, length, dtype)
        if not skeleton.residual() <= TOLERANCE:
            return None
        skeleton.keep()
        return skeleton

    def _spectrum(self, transform: _Transform, s: int, group: torch.Tensor | None) -> torch.Tensor:
        m, S = transform.m, transform.S
        origin = m + s * S if self._reverse else self._Q - (s + 1) * S
        return self._toeplitz.spectrum(origin, m, S, transform.n, group)

    def _new_workspace(self) -> None:
        self._W = self._rows[0].new_empty((self._M, self._O, self._d))
        self._W2 = self._W.view(self._M * self._O, self._d)
        self._V = self._W.new_empty((self._skeleton.r * self._O, self._d) if self._skeleton else (0, self._d))
        self._next: int | None = None
        self._start = 0

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, n: int) -> tuple[torch.Tensor, ...]:
        tau = self._N - n if self._reverse else n - 1
        u = tau - self._start
        if tau != self._next:
            self._resume(n, tau)
            u = tau - self._start
        elif self._M == 1:
            self._start, u = tau, 0
        elif u == self._M:
            self._enter(tau)
            u = 0
        elif u % self._b == 0:
            self._advance(u)
        self._next = tau + 1
        w = self._M - 1 - u if self._reverse else u
        r = tau if self._M == 1 else u % self._b
        if not self._vectors:
            rows = self._W[w]
            if r or self._M == 1:
                self._recent(rows, tau, r)
            return rows.unbind(0)
        row = self._W2[w]
        if r or self._M == 1:
            beta = self._beta
            b, q = (self._N - tau, 1) if self._reverse else (tau - r, self._Q - r)
            for x, table in self._vectors:
                row.addmv_(x[b : b + r].t(), table[q : q + r], beta=beta)
                beta = 1
        return (row,)

    def _resume(self, n: int, tau: int) -> None:
        if not 0 <= tau < self._N or self._next is not None:
            steps = f"1..{self._N}" if self._next is None else self._next_step()
            raise RuntimeError(
                f"read out of order: got n = {n}, expected {steps}; open a new convolution to start over"
            )
        if self._M == 1:
            self._start = tau
        else:
            self._enter(tau - tau % self._M)
            for u in range(self._b, tau - self._start + 1, self._b):
                self._advance(u)

    def _next_step(self) -> str:
        assert self._next is not None
        n = self._N - self._next if self._reverse else self._next + 1
        return str(n) if 1 <= n <= self._N else "none, all steps are read"

    def push(self, n: int, values: Sequence[torch.Tensor]) -> None:
        for buffer, x in zip(self._rows, values, strict=True):
            buffer[n - 1].copy_(x)

    def rows(self, n0: int, n1: int) -> tuple[torch.Tensor, ...]:
        """c_n0, ..., c_{n1-1} of a forward history as one (n1 - n0, d) tensor per output, in any order of calls.

        Needs the rows of the steps before n1 - 1, leaves the position of `read` alone, and equals what `read`
        returned bit for bit. Views valid until the next call. Blocks aligned to `block` (steps 1 + k block, ...) are
        the cheapest to ask for.
        """
        if self._reverse or not 1 <= n0 < n1 <= self._N + 1:
            raise RuntimeError(
                f"rows(n0, n1) needs a forward history and 1 <= n0 < n1 <= {self._N + 1}: got {n0}, {n1}"
            )
        if self._replay is None:
            self._replay = copy.copy(self)
            self._replay._new_workspace()
        self._replay._next = None
        first, last = divmod(n0 - 1, self._M), divmod(n1 - 2, self._M)
        if first[0] == last[0] and self._M > 1:  # one superblock: its workspace keeps what was read
            for n in range(n0, n1):
                self._replay.read(n)
            return self._replay._W[first[1] : last[1] + 1].unbind(1)
        out = self._W.new_empty((self._O, n1 - n0, self._d))
        for k, n in enumerate(range(n0, n1)):
            for o, c in enumerate(self._replay.read(n)):
                out[o, k] = c
        return out.unbind(0)

    @property
    def block(self) -> int:
        """Steps that share one pass over the whole history (1 when every step makes its own)."""
        return self._M

    @property
    def interpolated(self) -> bool:
        """Whether the pulls take far rows by interpolation."""
        return self._skeleton is not None

    @property
    def workspace_bytes(self) -> int:
        transforms = [*self._push.values(), *([self._pull] if self._pull else [])]
        held = [self._W, self._V, *self._toeplitz.tables, *self._toeplitz.matrices]
        held += [x for t in transforms for x in t.spectra]
        if self._replay is not None:
            held += [self._replay._W, self._replay._V]
        if self._skeleton:
            held += [self._skeleton.P, *self._skeleton.matrices]
        grouped = self._group is not None
        per_column = 4 + self._O + (4 * self._O * self._I if grouped else 0)
        temporary = per_column * self._pull.n * self._columns if self._pull else 0
        temporary = max(temporary, 2 * self._limit if grouped else 0) * self._W.element_size()
        return sum(x.numel() * x.element_size() for x in held) + temporary

    # -- the block operation, in travel coordinates: steps t.. of W += rows [first, t) ---------------------------

    def _enter(self, start: int) -> None:
        """Open the superblock at `start`: W = the pull of all rows before it."""
        self._start = start
        m = min(self._M, self._N - start)
        if start == 0:
            self._W2.zero_()
        elif self._pull:
            self._transform(self._pull, start, m, 0, 0)
        else:
            # What lies more than D before the block, made a full one at the end of the buffer, is interpolated.
            near = max(0, min(start, self._N - self._M) - self._skeleton.D) if self._skeleton else 0
            self._product(start, m, near, 0)
            if self._skeleton and near:
                inputs = [x[self._N - near :] if self._reverse else x[:near] for x in self._rows]
                w, at = self._at(start, m), 0 if self._reverse else self._M - m
                out = self._W.view(self._M, -1)[w : w + m]
                self._skeleton.pull(out, at, inputs, self._V)

    def _advance(self, u: int) -> None:
        """Push the last 2^p rows, 2^p dividing u, on the next 2^p steps."""
        size, t = u & -u, self._start + u
        m = min(size, self._M - u, self._N - t)
        if size in self._push:
            self._transform(self._push[size], t, m, t - size, 1)
        else:
            self._product(t, m, t - size, 1)

    def _recent(self, out: torch.Tensor, tau: int, r: int) -> None:
        """One step's block, m = 1: out (O, d) plus, or in a direct convolution equal to, the r rows before it."""
        b, q = (self._N - tau, 1) if self._reverse else (tau - r, self._Q - r)
        beta = self._beta
        for i, x in enumerate(self._rows):
            self._toeplitz.multiply(out, i, q, 1, x[b : b + r], beta)
            beta = 1

    def _product(self, t: int, m: int, first: int, beta: int) -> None:
        """By matrix products, in pieces where the matrix of the whole would be too large to keep."""
        w = self._at(t, m)
        out = self._W2[w * self._O : (w + m) * self._O]
        a = self._N - t - m if self._reverse else t
        for hi in range(t, first, -self._wide):
            lo = max(first, hi - self._wide)
            b, e = (self._N - hi, self._N - lo) if self._reverse else (lo, hi)
            origin = b - a + (0 if self._reverse else self._Q)
            for i, x in enumerate(self._rows):
                self._toeplitz.multiply(out, i, origin, m, x[b:e], beta)
                beta = 1

    def _at(self, t: int, m: int) -> int:
        """The first row in W of the steps t..t+m-1 (W is in the order of the buffers)."""
        u = t - self._start
        return self._M - u - m if self._reverse else u

    def _transform(self, transform: _Transform, t: int, m: int, first: int, beta: int) -> None:
        """By FFTs of some components at a time, summed over the segments before they are transformed back."""
        n, w = transform.n, self._at(t, m)
        lo = transform.m - m if self._reverse else 0
        for c in range(0, self._d, self._columns):
            columns = slice(c, min(c + self._columns, self._d))
            total = self._total(transform, t, first, columns)
            for o in range(self._O):
                y = torch.fft.irfft(total[o], n=n, dim=0)[lo : lo + m]
                out = self._W[w : w + m, o, columns]
                out.add_(y) if beta else out.copy_(y)

    def _total(self, transform: _Transform, t: int, first: int, columns: slice) -> list[torch.Tensor]:
        """sum_i sum_s (spectrum of segment s) * DFT(segment s of X^i), one (n/2 + 1, columns) per output."""
        S = transform.S
        total: list[torch.Tensor] = []
        group = None if self._group is None else self._group[columns]
        for s, hi in enumerate(range(t, first, -S)):
            lo = max(first, hi - S)
            b, e = (self._N - hi, self._N - lo) if self._reverse else (lo, hi)
            if not transform.spectra:
                kernels = self._spectrum(transform, s, group)
            else:
                kernels = transform.spectra[s] if group is None else transform.spectra[s].index_select(1, group)
            for i, x in enumerate(self._rows):
                part = x[b:e, columns]
                if e - b < S and not self._reverse:
                    part = torch.nn.functional.pad(part, (0, 0, S - e + b, 0))
                part = torch.fft.rfft(part, n=transform.n, dim=0)
                if total:
                    for o in range(self._O):
                        total[o].addcmul_(part, kernels[i, :, o].T)
                else:
                    total = [part * kernels[i, :, o].T for o in range(self._O)]
        return total
