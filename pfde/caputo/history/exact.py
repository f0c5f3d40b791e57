"""The exact history: all its terms, by the algorithm that suits the sizes (`online_product`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .base import Convolution, History, validate
from .online_product import ExactConvolution

ALGORITHMS = ("direct", "blocked", "fft")


@dataclass(frozen=True)
class Exact(History):
    """The history with all its terms.

    `algorithm`: "direct", one matrix-vector product per step: N^2 d / 2 multiplications at the speed of memory, no
    workspace; "blocked", the same count or, for smooth kernels, a fraction of it, at the speed of matrix products;
    "fft", O(N log(N)^2 d).  The last two use a workspace of about N / 16 rows per output, N / 8 while that is at most
    64, and 128 where blocked interpolates.  None chooses by the sizes; see `_choose`.
    """

    algorithm: str | None = None

    def __post_init__(self) -> None:
        if self.algorithm is not None and self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be None or one of {ALGORITHMS}: got {self.algorithm!r}")

    @property
    def any_grid(self) -> bool:
        """With the algorithm left open: on a nonuniform grid there is one."""
        return self.algorithm is None

    def uniform_error(self) -> ValueError:
        return ValueError(f"history={self} needs a uniform grid: leave algorithm out on a nonuniform one")

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
        validate(kernel, rows, group)
        N, d = rows[0].shape
        algorithm = self.algorithm or _choose(N, d, 0 if group is None else kernel.shape[3])
        return ExactConvolution(kernel, rows, reverse, group, algorithm)


def _choose(N: int, d: int, groups: int) -> str:
    """A rule made from runs at d = 1, 64, 1024, 8192, N = 16 .. 16384, one core of a shared machine, both dtypes.

    Blocked, interpolating, was the fastest to N = 16384 at d = 1, 64 (to 8192 at 1024), and is left beyond, where its
    matrices may grow too large.  Direct and blocked cross near N = 512, 512, 128, 64.  With groups, from fewer runs
    (float32, 3 each) and without interpolation: few, multiplied one by one, favour blocked from N = 32 (to 2048; FFT
    beyond is a guess); many favour FFT at N = 256, and no algorithm clearly at 128.
    """
    few, long = groups * 16 <= d, 3072 if groups else 24576
    if (few and long <= N) or (not few and N >= 128):
        return "fft"
    small = (N < 32 or not few) if groups else (N < 64 or (N < 512 and N * d < 2**17))
    return "direct" if small else "blocked"
