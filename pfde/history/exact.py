"""The exact history: an online triangular Toeplitz product with every term, in O(N^2), or O(N^(3/2) log N) by FFT.

Count the steps in the direction of travel, tau = n - 1 forward and tau = N - n in reverse.  Steps are grouped in
superblocks of M.  On entering one, a *pull* adds the influence of all earlier rows on its M steps to a workspace W:
a product with an M x L Toeplitz matrix, or a few FFTs.  Inside it, at an offset u with 2^p the largest power of two
dividing u >= b, a *push* adds the influence of the last 2^p rows on the next 2^p steps (Hairer, Lubich, Schlichte
1985, SIAM J. Sci. Stat. Comput. 6, doi:10.1137/0906037); what remains are fewer than b recent rows, added by a
matrix-vector product at the read itself.  All three are one operation: the block T[i, v] = kappa[|a + i - b - v|]
mapping buffer rows b.. to a... With table[q] = kappa[Q - q] forward (Q = last index) and kappa[q] in reverse it reads

    T[i, v] = table[origin - i + v],     origin = b - a + (Q forward | 0 in reverse),

so a direction is index arithmetic, and the transpose cannot disagree with its operator.

Symbols: N steps, d components, I inputs, O outputs, G groups of components of one order alpha; W is (M, O, d).
Errors, in units eps of the rounding: direct and blocked commit at most N eps sum_j |kappa_{n-j}| |X_j| (observed:
a few eps), the FFT c log2(N) eps |kappa|_2 |X|_2 over the segment transformed (Higham 2002, sec. 24.1), which is
relative to the norm, not to each c_n; the nearest rows are always summed directly.

NOTE 1. Superblocks sit at tau = 0, M, 2M, ... whatever the first read is, and resuming inside one replays its pushes:
a resumed sweep returns bitwise what an uninterrupted one would have.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .base import Convolution

ALGORITHMS = ("direct", "blocked", "fft")


@dataclass(frozen=True)
class Exact:
    """The history with all its terms.

    `algorithm`: "direct", one matrix-vector product per step: N^2 d / 2 multiplications at the speed of memory, no
    workspace; "blocked", the same count at the speed of matrix products; "fft", O(N^(3/2) log N) d.  Both use a workspace
    of about N / 16 rows per output.  None chooses by the sizes; see `_choose`.
    """

    algorithm: str | None = None

    def __post_init__(self) -> None:
        if self.algorithm is not None and self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be None or one of {ALGORITHMS}: got {self.algorithm!r}")

    def convolution(
        self,
        kernel: torch.Tensor,
        rows: Sequence[torch.Tensor],
        *,
        reverse: bool = False,
        group: torch.Tensor | None = None,
    ) -> Convolution:
        """The convolution of the I buffers `rows`, each (N, d), with `kernel`, (O, I, N+1) or (O, I, N+1, G).

        kernel[..., 0] is ignored.  `group`, (d,) int64, gives each component its last kernel index; it is required
        with four axes and not allowed with three.  The buffers are read in place, hence must be contiguous.
        """
        _validate(kernel, rows, group)
        N, d = rows[0].shape
        groups = 0 if group is None else kernel.shape[3]
        algorithm = self.algorithm or _choose(N, d, groups)
        return ExactConvolution(kernel, rows, reverse, group, algorithm)


def _validate(kernel: torch.Tensor, rows: Sequence[torch.Tensor], group: torch.Tensor | None) -> None:
    if len(rows) == 0:
        raise ValueError("rows must hold one (N, d) buffer per input channel: got none")
    first = rows[0]
    for i, x in enumerate(rows):
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rows[{i}] must be float32 or float64: got {x.dtype}")
        if x.dim() != 2 or x.shape != first.shape or 0 in x.shape:
            raise ValueError(f"rows[{i}] must be a non-empty (N, d), like rows[0] {tuple(first.shape)}: got {tuple(x.shape)}")
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


# Sizes, measured on one core of an EPYC 9004 (MKL, float32 and float64); see `_choose` for the rule made of them.
BLOCKED_ROWS = 64  # rows per pull by products: beyond it a product is no faster per row
FFT_FROM = 512  # the smallest push by FFT; below it a product is faster
GROUP_FFT_FROM = 32  # the same with groups, whose products are not matrix products
SEGMENT = 4  # FFT length over M in a pull: longer ones waste less padding but leave the cache
COLUMNS = 64  # components transformed together: two cache lines of each row at least, and n x 64 numbers in L2


def _choose(N: int, d: int, groups: int) -> str:
    return "direct" if N < 64 else "blocked" if N < 2048 else "fft"


def _base(N: int, d: int) -> int:
    """Rows left to the reads: a product of 8 recent rows costs less than calling it where d is small."""
    return 8 if d >= 2048 else 16 if d >= 256 else 32


@dataclass
class _Transform:
    """Blocks of m steps by FFTs of length n over segments of S rows; `spectra[s]` belongs to distance s S."""

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
        self._kernel = kernel.detach().to(rows[0].dtype)
        if group is None:
            self._kernel = self._kernel.unsqueeze(3)
        self._reverse, self._group = reverse, group
        self._N, self._d = rows[0].shape
        self._O, self._I, _, self._G = self._kernel.shape
        # Temporaries stay below 1/16 of a buffer (but 2^15 numbers), kernel matrices too (but 2^17).
        self._limit = max(2**15, self._N * self._d // 16)
        self._plan()
        self._tabulate()
        self._panels = self._split()
        self._beta = 0 if self._M == 1 else 1
        # The common case, one input, one output, one order, is spared some 5 us a read.
        scalar = self._O == self._I == 1 and group is None
        self._single = (self._rows[0], self._tables[0][0, 0]) if scalar else None
        self._new_workspace()
        self._replay: ExactConvolution | None = None

    # -- plan: sizes, tables, matrices, spectra; fixed before the first read -------------------------------------

    def _plan(self) -> None:
        N, fft = self._N, self.algorithm == "fft"
        self._b = _base(N, self._d)
        self._M = 1 if self.algorithm == "direct" else -(-N // 16) if fft else min(-(-N // 16), BLOCKED_ROWS)
        self._fft_from = (FFT_FROM if self._group is None else GROUP_FFT_FROM) if fft else 2 * N + 16
        if self._M > 1:
            self._M = -(-self._M // 8) * 8
        M = self._M
        n = _smooth(SEGMENT * M)
        self._pull = _Transform(M, n - M + 1, n) if fft else None
        sizes = [m for m in (2**p for p in range(M.bit_length())) if self._fft_from <= m < M]
        self._push = {m: _Transform(m, m, 2 * m) for m in sizes}
        columns = 2 * self._limit // ((4 + self._O) * n)
        self._columns = max(1, min(COLUMNS, columns))

    def _tabulate(self) -> None:
        N, M, size = self._N, self._M, self._G * self._O * self._I
        bound = max(2**17, self._limit)
        # Lags beyond N occur only in blocks that stick out at an end of the buffer; zeros spare the special cases.
        self._Q = N + M + (self._pull.S if self._pull else 0)
        tabulated = self._group is None or size * self._Q <= bound
        every = torch.arange(self._G, device=self._kernel.device)
        inputs = range(self._I)
        self._tables = [self._gather(i, 0, self._Q + 1, every) for i in inputs] if tabulated else []
        # Pushes by products are corners of one matrix, pulls its column slices.
        self._tall = min(M, self._fft_from // 2)
        wide = self._tall if self._pull else N
        self._wide = wide if size * self._tall * wide <= bound else min(wide, 256)
        self._corner = self._tall if self._reverse else self._Q - self._wide
        self._matrices: list[torch.Tensor] = []
        if M > 1 and size * self._tall * self._wide <= bound:
            self._matrices = [self._build(i, self._corner, self._tall, self._wide, None) for i in inputs]
        if tabulated and self._pull:
            self._pull.spectra = [self._spectrum(self._pull, s, None) for s in range(-(-N // self._pull.S))]
            for transform in self._push.values():
                transform.spectra = [self._spectrum(transform, 0, None)]

    def _gather(self, i: int, q: int, length: int, group: torch.Tensor) -> torch.Tensor:
        """table[q : q + length] of the given groups, (len(group), O, length), from the kernel."""
        k = q if self._reverse else self._Q - q - length + 1
        lo, hi = max(k, 1), min(k + length, self._N + 1)
        if hi <= lo:
            return self._kernel.new_zeros((len(group), self._O, length))
        part = self._kernel[:, i, lo:hi].index_select(2, group).permute(2, 0, 1)
        part = torch.nn.functional.pad(part, (lo - k, k + length - hi))
        return (part if self._reverse else part.flip(2)).contiguous()

    def _window(self, i: int, q: int, length: int, group: torch.Tensor | None) -> torch.Tensor:
        """The same, a view of the tables where it can be; group None means all of them."""
        if not self._tables:
            assert group is not None
            return self._gather(i, q, length, group)
        part = self._tables[i][:, :, q : q + length]
        return part if group is None else part.index_select(0, group)

    def _build(self, i: int, origin: int, m: int, l: int, group: torch.Tensor | None) -> torch.Tensor:
        """T[g, (i, o), v] = table[g, o, origin - i + v], (groups, m O, l): rows interleave the outputs as W does."""
        w = self._window(i, origin - m + 1, m + l - 1, group)
        return w.unfold(2, l, 1).flip(2).transpose(1, 2).reshape(w.shape[0], m * self._O, l)

    def _toeplitz(self, i: int, origin: int, m: int, l: int, group: torch.Tensor | None) -> torch.Tensor:
        """The same as a slice of the matrices where it is one."""
        if self._matrices:
            v = max(0, origin - self._corner)
            u = v - (origin - self._corner)
            if u + m <= self._tall and v + l <= self._wide:
                part = self._matrices[i][:, u * self._O : (u + m) * self._O, v : v + l]
                return part if group is None else part.index_select(0, group)
        return self._build(i, origin, m, l, group)

    def _spectrum(self, transform: _Transform, s: int, group: torch.Tensor | None) -> torch.Tensor:
        """The DFT of w -> table[origin - w], -S < w < m, (I, O, n/2 + 1, groups), for the segment at distance s S."""
        m, S, n = transform.m, transform.S, transform.n
        origin = m + s * S if self._reverse else self._Q - (s + 1) * S
        spectra = []
        for i in range(self._I):
            w = self._window(i, origin - m + 1, m + S - 1, group)
            gap = w.new_zeros((*w.shape[:2], n - m - S + 1))
            spectra.append(torch.fft.rfft(torch.cat([w[..., :m].flip(2), gap, w[..., m:].flip(2)], dim=2)))
        return torch.stack(spectra).permute(0, 2, 3, 1).contiguous()

    def _split(self) -> list[tuple[torch.Tensor, slice | torch.Tensor]]:
        """(group, its components): few large groups are multiplied one by one; none: many, component by component."""
        if self._group is None or self._G * 16 > self._d:
            return []
        panels: list[tuple[torch.Tensor, slice | torch.Tensor]] = []
        for g in range(self._G):
            index = torch.nonzero(self._group == g).squeeze(1)
            if len(index):
                lo, hi = int(index[0]), int(index[-1]) + 1
                which = torch.tensor([g], device=index.device)
                panels.append((which, slice(lo, hi) if hi - lo == len(index) else index))
        return panels

    def _new_workspace(self) -> None:
        self._W = self._rows[0].new_empty((self._M, self._O, self._d))
        self._W2 = self._W.view(self._M * self._O, self._d)
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
        if self._O > 1:
            rows = self._W[w]
            if r or self._M == 1:
                self._recent(rows, tau, r)
            return rows.unbind(0)
        row = self._W2[w]
        if self._single:
            if r or self._M == 1:
                x, table = self._single
                b, q = (self._N - tau, 1) if self._reverse else (tau - r, self._Q - r)
                row.addmv_(x[b : b + r].t(), table[q : q + r], beta=self._beta)
        elif r or self._M == 1:
            self._recent(row.unsqueeze(0), tau, r)
        return (row,)

    def _resume(self, n: int, tau: int) -> None:
        if not 0 <= tau < self._N or self._next is not None:
            steps = f"1..{self._N}" if self._next is None else f"{self._next_step()}"
            raise RuntimeError(f"read out of order: got n = {n}, expected {steps}; open a new convolution to start over")
        if self._M == 1:
            self._start = tau
            return
        self._enter(tau - tau % self._M)
        for u in range(self._b, tau - self._start + 1, self._b):
            self._advance(u)

    def _next_step(self) -> str:
        assert self._next is not None
        n = self._N - self._next if self._reverse else self._next + 1
        return str(n) if 1 <= n <= self._N else "none, all steps are read"

    def rows(self, n0: int, n1: int) -> tuple[torch.Tensor, ...]:
        if self._reverse or not 1 <= n0 < n1 <= self._N + 1:
            raise RuntimeError(f"rows(n0, n1) needs a forward history and 1 <= n0 < n1 <= {self._N + 1}: got {n0}, {n1}")
        if self._replay is None:
            self._replay = copy.copy(self)
        replay = self._replay
        replay._new_workspace()
        out = self._W.new_empty((self._O, n1 - n0, self._d))
        for k, n in enumerate(range(n0, n1)):
            for o, c in enumerate(replay.read(n)):
                out[o, k] = c
        return out.unbind(0)

    @property
    def block(self) -> int:
        return self._M

    @property
    def workspace_bytes(self) -> int:
        transforms = [*self._push.values(), *([self._pull] if self._pull else [])]
        held = [self._W, *self._tables, *self._matrices, *(x for t in transforms for x in t.spectra)]
        if self._replay is not None:
            held.append(self._replay._W)
        temporary = (4 + self._O) * self._pull.n * self._columns if self._pull else 0
        if self._group is not None:
            temporary += 2 * self._limit
        return sum(x.numel() * x.element_size() for x in held) + temporary * self._W.element_size()

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
            self._product(start, m, 0, 0)

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
            if self._group is not None:
                self._grouped(out, i, q, 1, x[b : b + r], beta)
            else:
                out.addmm_(self._tables[i][0, :, q : q + r], x[b : b + r], beta=beta)
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
                if self._group is None:
                    out.addmm_(self._toeplitz(i, origin, m, e - b, None)[0], x[b:e], beta=beta)
                else:
                    self._grouped(out, i, origin, m, x[b:e], beta)
                beta = 1

    def _at(self, t: int, m: int) -> int:
        """The first row in W of the steps t..t+m-1 (W is in the order of the buffers)."""
        u = t - self._start
        return self._M - u - m if self._reverse else u

    def _grouped(self, out: torch.Tensor, i: int, origin: int, m: int, x: torch.Tensor, beta: int) -> None:
        """out = beta out + T_g(c) x column by column; temporaries of at most about `_limit` numbers."""
        if beta == 0:
            out.zero_()
        for which, index in self._panels:
            if isinstance(index, slice):
                T = self._toeplitz(i, origin, m, len(x), which)[0]
                out[:, index].addmm_(T, x[:, index])
                continue
            piece = max(1, self._limit // len(index))
            for v in range(0, len(x), piece):
                part = x[v : v + piece].index_select(1, index)
                out.index_add_(1, index, self._toeplitz(i, origin + v, m, len(part), which)[0] @ part)
        if self._panels:
            return
        assert self._group is not None
        piece = max(1, min(len(x), self._limit // len(out)))
        columns = max(1, self._limit // (len(out) * piece))
        for v in range(0, len(x), piece):
            part = x[v : v + piece]
            for c in range(0, self._d, columns):
                T = self._toeplitz(i, origin + v, m, len(part), self._group[c : c + columns])
                y = torch.bmm(T, part[:, c : c + columns].t().unsqueeze(2))
                out[:, c : c + columns] += y.squeeze(2).t()

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
        S, total = transform.S, []
        group = None if self._group is None else self._group[columns]
        for s, hi in enumerate(range(t, first, -S)):
            lo = max(first, hi - S)
            b, e = (self._N - hi, self._N - lo) if self._reverse else (lo, hi)
            if not transform.spectra:
                kernels = self._spectrum(transform, s, group)
            else:
                kernels = transform.spectra[s] if group is None else transform.spectra[s].index_select(3, group)
            for i, x in enumerate(self._rows):
                part = x[b:e, columns]
                if e - b < S and not self._reverse:
                    part = torch.nn.functional.pad(part, (0, 0, S - e + b, 0))
                part = torch.fft.rfft(part, n=transform.n, dim=0)
                if total:
                    for o in range(self._O):
                        total[o].addcmul_(part, kernels[i, o])
                else:
                    total = [part * kernels[i, o] for o in range(self._O)]
        return total
