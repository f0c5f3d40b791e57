"""The interface of a history: a strictly causal convolution read online, one row per step, in either direction.

A scheme with N steps and state in R^d owns I buffers X^i of shape (N, d), step n living in row n - 1, and a kernel
kappa[o, i, k] for the lags k = 1..N.  Its history is, with O outputs,

    forward   (C X)_n^o   = sum_i sum_{j<n} kappa[o, i, n-j] X^i_j,    read in the order n = 1, 2, ..., N,
    reverse   (C^T X)_n^o = sum_i sum_{j>n} kappa[o, i, j-n] X^i_j,    read in the order n = N, ..., 2, 1.

The second is the transpose of the first when its kernel is the first's with o and i exchanged.  The word *online*
is the difficulty: row n of X is computed from c_n, so reading c_n may only touch the rows that were passed before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Convolution(ABC):
    """One pass of a history over buffers that the caller owns, fills between reads, and may alias elsewhere.

    A convolution never writes to the buffers and never copies them as a whole.  Rows not yet passed may hold anything
    (NaN, or live data of another part of the sweep): they are not touched.
    """

    @abstractmethod
    def read(self, n: int) -> tuple[torch.Tensor, ...]:
        """c_n, one (d,) tensor per output: views of the workspace, valid until the next read.

        The first read may name any n (a resumed sweep: all rows passed before must be final); from there on the
        order is n + 1, n + 2, ... forward and n - 1, n - 2, ... in reverse, and RuntimeError is raised otherwise.
        """

    @abstractmethod
    def rows(self, n0: int, n1: int) -> tuple[torch.Tensor, ...]:
        """c_n0, ..., c_{n1-1} of a forward history as one (n1 - n0, d) tensor per output, in any order of calls.

        Needs the rows of the steps before n1 - 1, leaves the position of `read` alone, and equals what `read`
        returned bit for bit.  Blocks aligned to `block` (steps 1 + k block, ...) are the cheapest to ask for.
        """

    @property
    @abstractmethod
    def block(self) -> int:
        """Steps that share one pass over the whole history (1 when every step makes its own)."""

    @property
    @abstractmethod
    def workspace_bytes(self) -> int:
        """Peak bytes held by `read` beyond the caller's buffers and kernel: rows, matrices, spectra, temporaries."""
