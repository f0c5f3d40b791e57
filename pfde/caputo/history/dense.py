"""The exact history on a nonuniform grid: every weight computed, block by block, as it is needed.

There is no Toeplitz structure to exploit: N^2 / 2 weights for each channel, O(N^2 d) multiplications, as matrix
products over blocks of 32 steps; a few blocks of weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .base import Convolution

BLOCK = 32  # steps whose reads share one pass over the earlier rows
COLUMNS = 512  # columns of weights computed at a time

Matrix = Callable[[int, int, int, int], Tensor]


class DenseConvolution(Convolution):
    """One direction of the history over I buffers `rows`, (N, d) each, that the caller owns.

    matrix : (n0, n1, j0, j1) -> (O, I, n1 - n0, j1 - j0, G), float64: the weights of the rows of the steps j0..j1-1 in
        the reads of the steps n0..n1-1; only those of rows passed before the read are used
    """

    def __init__(
        self, matrix: Matrix, outputs: int, rows: Sequence[Tensor], *, reverse: bool, group: Tensor | None
    ) -> None:
        self._matrix, self._reverse, self._group = matrix, reverse, group
        self._rows = [x.detach() for x in rows]
        self._N, d = rows[0].shape
        self._W = rows[0].new_zeros(outputs, BLOCK, d)
        self._expected = self._N if reverse else 1
        self._local: Tensor | None = None
        self._lo = 0  # the first step of the block in increasing order

    def read(self, n: int) -> tuple[Tensor, ...]:
        if n != self._expected:
            raise RuntimeError(f"read out of order: got n = {n}, expected {self._expected}")
        tau = self._N - n if self._reverse else n - 1
        if tau % BLOCK == 0:
            m = min(BLOCK, self._N - tau)
            self._enter(n - m + 1 if self._reverse else n, m)
        self._expected += -1 if self._reverse else 1
        assert self._local is not None
        at, m = n - self._lo, self._local.shape[2]
        passed = slice(at + 1, m) if self._reverse else slice(0, at)
        for i, x in enumerate(self._rows):
            block = x[self._lo - 1 : self._lo - 1 + m][passed]
            for o in range(len(self._W)):
                self._W[o, at].add_(self._product(self._local[o, i, at : at + 1, passed], block)[0])
        return self._W[:, at].unbind(0)

    def push(self, n: int, values: Sequence[Tensor]) -> None:
        for buffer, x in zip(self._rows, values, strict=True):
            buffer[n - 1].copy_(x)

    @property
    def workspace_bytes(self) -> int:
        return self._W.numel() * self._W.element_size()

    def _enter(self, lo: int, m: int) -> None:
        """W = the part of all rows passed before the block of the steps lo..lo+m-1, whose own weights are kept."""
        self._lo = lo
        self._W.zero_()
        first, last = (lo + m, self._N + 1) if self._reverse else (1, lo)
        for j0 in range(first, last, COLUMNS):
            j1 = min(j0 + COLUMNS, last)
            weights = self._like(self._matrix(lo, lo + m, j0, j1))
            for i, x in enumerate(self._rows):
                for o in range(len(self._W)):
                    self._W[o, :m].add_(self._product(weights[o, i], x[j0 - 1 : j1 - 1]))
        self._local = self._like(self._matrix(lo, lo + m, lo, lo + m))

    def _like(self, weights: Tensor) -> Tensor:
        return weights.to(dtype=self._W.dtype, device=self._W.device)

    def _product(self, weights: Tensor, x: Tensor) -> Tensor:
        """(reads, rows, G) times (rows, d), each component with the weights of its order."""
        if self._group is None:
            return weights[..., 0] @ x
        total = x.new_zeros(len(weights), x.shape[1])
        for row, values in enumerate(x):  # a row at a time: one number for each read and component
            total += weights[:, row].index_select(1, self._group) * values
        return total
