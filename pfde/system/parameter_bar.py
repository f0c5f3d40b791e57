"""The cotangents of the parameters, as the products of one adjoint sweep sum them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ParameterBar:
    """The cotangents of a sequence of parameters, summed in place; None where nothing arrived."""

    def __init__(self, count: int) -> None:
        self.bars: list[Tensor | None] = [None] * count
        self.first = self.rate = 0.0  # the cotangents of t_0 and h, in t_n = t_0 + n h, through f's argument t
        self.time = 0.0  # that of f's argument t in the last product

    def add_time(self, n: int, bar: Tensor | None) -> None:
        """Add the cotangent of t_n."""
        self.time = 0.0 if bar is None else float(bar)
        self.first += self.time
        self.rate += n * self.time

    def add(self, bars: Sequence[Tensor | None]) -> None:
        """Add one cotangent for each parameter; None adds nothing."""
        sums, terms = [], []
        for i, (total, bar) in enumerate(zip(self.bars, bars, strict=True)):
            if bar is None:
                continue
            if total is None:
                self.bars[i] = bar.clone()  # autograd may have handed out a view of the incoming cotangent
            else:
                sums.append(total)
                terms.append(bar)
        if sums:
            torch._foreach_add_(sums, terms)
