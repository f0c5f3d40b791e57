"""A history whose memory does not grow with the number of steps: recent rows and a few modes.

The weight of row j in step n is exact in a band of L lags and separable beyond it,

    kappa_{n,j} = sum_q w_q exp(-s_q d(n, j)),        d additive along the steps,

so that all that lies behind the band enters through Q modes z_q, whatever N is. With tau the number of a step in the
direction of travel (n - 1 forward, N - n in reverse), the steps of a block tau = start .. start + b - 1 read

    c = E_out z + (local weights) (the rows of the band and of the block, as they come),

and once a block is complete the modes take in its oldest b rows of the ring and decay: z <- z + expm1(-s) z + E_in X.
Both are matrix products, 4 Q d multiplications a step at their speed. The ring holds L + b rows. Inside a block rows
act on later ones by pushes, as in `exact`: at an offset u with 2^p dividing u the last 2^p rows on the next 2^p steps.

A kernel (`BlockKernel`) says how its blocks look: constant ones on a uniform grid, new ones for each block on a
nonuniform grid. The transpose of a convolution is another one, with the kernel's transpose, travelling backwards.

NOTE 1. Blocks lie at multiples of b steps, whatever the first read is, and `restore` replays what the block has done
so far: a restored history returns bitwise what an uninterrupted one would have.

NOTE 2. In float32 exp(-s b) of a slow mode would round to 1 - 6e-8; expm1(-s b) keeps the decay to full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .base import Convolution

BLOCK = 32  # steps a block: measured optimum of 16, 32, 64 for Q = 20 .. 45 and d = 64 .. 8192
GROUPED_BLOCK = 8  # with several orders, whose local weights act elementwise
PUSH_FROM = 2048  # entries of a state from which pushes begin at 8 rows, else at 16


class Block(NamedTuple):
    """The weights of one block of m steps with O outputs, I inputs, R sets of Q modes and G orders.

    All float64 on the CPU; the axis G is absent where a kernel has one order.
    local : (O, I, m, L + m[, G]): of ring row v in step u, zero unless v < L + u
    outward : (O, R, m, Q), outward_scale : (O, R, Q, G) or None
    inward : (R, I, Q, m), inward_scale : (R, I, Q, G) or None, of the oldest m rows of the ring
    decay : (Q,), exponents over the whole block, <= 0
    """

    local: Tensor
    outward: Tensor
    inward: Tensor
    decay: Tensor
    outward_scale: Tensor | None = None
    inward_scale: Tensor | None = None


class BlockKernel(Protocol):
    """A kernel in blocks of `size` steps, in one direction of travel."""

    steps: int
    size: int
    lags: int  # L
    outputs: int
    inputs: int
    sets: int  # R
    modes: int  # Q
    uniform: bool  # whether every full block is the same

    def block(self, start: int, m: int) -> Block:
        """The weights of the steps start .. start + m - 1, in travel order."""


class BoundedConvolution(Convolution):
    """One direction of a bounded history; the module describes the algorithm.

    Owns its modes and ring. Rows come by `push`, in the order of travel, after the read of their step.
    """

    def __init__(
        self,
        kernel: BlockKernel,
        d: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        reverse: bool,
        group: Tensor | None,
    ) -> None:
        self._kernel, self._reverse, self._group = kernel, reverse, group
        self._d, self._dtype, self._device = d, dtype, device
        b, L = kernel.size, kernel.lags
        like = torch.zeros(0, dtype=dtype, device=device)
        self._ring = [like.new_zeros(L + b, d) for _ in range(kernel.inputs)]
        self._modes = [like.new_zeros(kernel.modes, d) for _ in range(kernel.sets)]
        self._W = like.new_empty(b, kernel.outputs, d)
        self._base = min(b, 8 if d >= PUSH_FROM else 16) if group is None else b
        self._start, self._u = 0, 0  # the block, and the rows it has
        self._entered = False
        self._weights: BlockWeights | None = None

    # -- the interface -------------------------------------------------------------------------------------------

    def read(self, n: int) -> tuple[Tensor, ...]:
        u, kernel = self._u, self._kernel
        if (kernel.steps - n if self._reverse else n - 1) != self._start + u:
            at = self._start + u
            expected = kernel.steps - at if self._reverse else at + 1
            raise RuntimeError(f"read out of order: got n = {n}, expected {expected}")
        if not self._entered:
            self._enter()
        elif u and u % self._base == 0:
            self._advance(u)
        assert self._weights is not None
        return self._weights.recent(self._W[u], self._ring, u, u % self._base)

    def push(self, n: int, values: Sequence[Tensor]) -> None:
        at = self._kernel.lags + self._u
        for ring, x in zip(self._ring, values, strict=True):
            ring[at].copy_(x)
        self._u += 1
        if self._u == self._kernel.size:
            self._turn()

    @property
    def workspace_bytes(self) -> int:
        held = [*self._ring, *self._modes, self._W]
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def block(self) -> int:
        """Steps of a block."""
        return self._kernel.size

    @property
    def state_bytes(self) -> tuple[int, int]:
        """Bytes of `state`: between two blocks, and before the last step of one."""
        kernel, row = self._kernel, self._d * self._W.element_size()
        least = kernel.sets * kernel.modes + kernel.inputs * kernel.lags
        return least * row, (least + kernel.inputs * (kernel.size - 1)) * row

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs to go on from here: views, valid until the next push."""
        rows = self._kernel.lags + self._u
        found = {f"modes{r}": z for r, z in enumerate(self._modes)}
        return found | {f"rows{i}": ring[:rows] for i, ring in enumerate(self._ring)}

    def restore(self, steps: int, state: dict[str, Tensor]) -> None:
        """Go on behind the first `steps` steps of travel, whose `state` this was."""
        size = self._kernel.size
        self._start, self._u = steps - steps % size, steps % size
        for r, z in enumerate(self._modes):
            z.copy_(state[f"modes{r}"])
        for i, ring in enumerate(self._ring):
            rows = state[f"rows{i}"]
            ring[: len(rows)].copy_(rows)
        self._entered = False

    # -- blocks --------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Begin a block, or begin it once more and replay what it has done up to its row u."""
        kernel = self._kernel
        m = min(kernel.size, kernel.steps - self._start)
        if self._weights is None or not kernel.uniform:
            block = kernel.block(self._start, kernel.size if kernel.uniform else m)
            self._weights = BlockWeights(block, self._dtype, self._device, self._group)
        self._weights.enter(self._W[:m], self._modes, self._ring)
        self._entered = True
        for u in range(self._base, self._u + 1, self._base):
            self._advance(u)

    def _advance(self, u: int) -> None:
        """Push the last 2^p rows of the block, 2^p dividing u, on its next 2^p steps."""
        assert self._weights is not None
        size = u & -u
        m = min(size, self._kernel.size - u, self._kernel.steps - self._start - u)
        self._weights.push(self._W, self._ring, u, m, size)

    def _turn(self) -> None:
        """The block is complete: the modes take in the oldest rows, the youngest L become the band."""
        kernel = self._kernel
        b, L = kernel.size, kernel.lags
        assert self._weights is not None
        self._weights.absorb(self._modes, self._ring, b)
        for ring in self._ring:
            if b >= L:
                ring[:L].copy_(ring[b:])
            else:
                ring[:L].copy_(ring[b:].clone())
        self._start, self._u, self._entered = self._start + b, 0, False


class BlockWeights:
    """A block's weights in the dtype and on the device of the state, as they are multiplied."""

    def __init__(self, block: Block, dtype: torch.dtype, device: torch.device, group: Tensor | None) -> None:
        def like(values: Tensor) -> Tensor:
            return values.to(dtype=dtype, device=device)

        def interleaved(values: Tensor) -> list[Tensor]:
            """(O, S, m, columns) as S matrices (m O, columns), whose rows interleave the outputs, as those of W."""
            return [like(part.transpose(0, 1).reshape(-1, part.shape[-1])) for part in values.unbind(1)]

        self._outputs, self._group = len(block.local), group
        self._lags = block.local.shape[3] - block.local.shape[2]
        self._inward = [[like(part) if bool(part.any()) else None for part in line] for line in block.inward]
        self._decay = like(torch.expm1(block.decay)).unsqueeze(1)
        if group is None:
            self._local, self._outward = interleaved(block.local), interleaved(block.outward)
            self._rows = [list(part) for part in self._local] if self._outputs == 1 else []
        else:
            self._grouped, self._outward_grouped = like(block.local), like(block.outward)
            self._outward_scale = None if block.outward_scale is None else like(block.outward_scale)
            self._inward_scale = None if block.inward_scale is None else like(block.inward_scale)

    def enter(self, W: Tensor, modes: list[Tensor], ring: list[Tensor]) -> None:
        """W (m, O, d) = the modes' part and, with one order, the band's."""
        if self._group is not None:
            self._enter_grouped(W, modes)
            return
        flat, beta = W.view(-1, W.shape[2]), 0
        parts = [*zip(self._outward, modes, strict=True)]
        if self._lags:
            parts += [(matrix[:, : self._lags], x[: self._lags]) for matrix, x in zip(self._local, ring, strict=True)]
        for matrix, x in parts:
            flat.addmm_(matrix[: len(flat)], x, beta=beta)
            beta = 1
        if not parts:
            flat.zero_()

    def _enter_grouped(self, W: Tensor, modes: list[Tensor]) -> None:
        W.zero_()
        for o in range(self._outputs):
            for r, z in enumerate(modes):
                scaled = z if self._outward_scale is None else z * self._outward_scale[o, r][:, self._group]
                W[:, o].add_(self._outward_grouped[o, r, : len(W)] @ scaled)

    def push(self, W: Tensor, ring: list[Tensor], u: int, m: int, size: int) -> None:
        """W[u : u + m] += the part of the last `size` rows of the block."""
        lo, hi = self._lags + u - size, self._lags + u
        rows = slice(u * self._outputs, (u + m) * self._outputs)
        out = W[u : u + m].view(m * self._outputs, -1)
        for matrix, x in zip(self._local, ring, strict=True):
            out.addmm_(matrix[rows, lo:hi], x[lo:hi])

    def recent(self, out: Tensor, ring: list[Tensor], u: int, r: int) -> tuple[Tensor, ...]:
        """out (O, d), row u of W, plus the part of the last r rows of the block; of several orders, all rows."""
        hi = self._lags + u
        if self._group is not None:
            self._recent_grouped(out, ring, u)
        elif r and self._rows:
            for rows, x in zip(self._rows, ring, strict=True):
                out[0].addmv_(x[hi - r : hi].t(), rows[u][hi - r : hi])
        elif r:
            at = slice(u * self._outputs, (u + 1) * self._outputs)
            for matrix, x in zip(self._local, ring, strict=True):
                out.addmm_(matrix[at, hi - r : hi], x[hi - r : hi])
        return out.unbind(0)

    def _recent_grouped(self, out: Tensor, ring: list[Tensor], u: int) -> None:
        assert self._group is not None
        hi = self._lags + u
        for i, x in enumerate(ring):
            for o in range(self._outputs):
                weights = self._grouped[o, i, u, :hi].index_select(1, self._group)
                out[o].add_((weights * x[:hi]).sum(0))

    def absorb(self, modes: list[Tensor], ring: list[Tensor], b: int) -> None:
        """The modes decay and take in the oldest b rows."""
        for r, z in enumerate(modes):
            z.addcmul_(z, self._decay)
            for i, x in enumerate(ring):
                matrix = self._inward[r][i]
                if matrix is None:
                    continue
                if self._group is None or self._inward_scale is None:
                    z.addmm_(matrix, x[:b])
                else:
                    z.addcmul_(matrix @ x[:b], self._inward_scale[r, i][:, self._group])
