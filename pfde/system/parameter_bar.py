"""The cotangents of the parameters, as the products of one adjoint sweep sum them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .reached import finish


class ParameterBar:
    """The cotangents of a sequence of parameters, summed in place; None where nothing arrived."""

    def __init__(self, count: int) -> None:
        self.bars: list[Tensor | None] = [None] * count
        self.first = self.rate = 0.0  # the cotangents of t_0 and h, in t_n = t_0 + n h, through f's argument t
        self.time = 0.0  # that of f's argument t in the last product
        self.outside: dict[GradientEdge, Tensor] = {}  # at the borders of graphs that f did not make

    def add_outside(self, edges: Sequence[GradientEdge], bars: Sequence[Tensor | None]) -> None:
        """Add the cotangents at such borders."""
        for edge, bar in zip(edges, bars, strict=True):
            if bar is not None:
                total = self.outside.get(edge)
                self.outside[edge] = bar.clone() if total is None else total.add_(bar)

    def finish(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums, once the sweep is over, those at the borders taken through to the parameters."""
        if self.outside:
            self.add(finish(self.outside, parameters))
            self.outside = {}
        return self.bars

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
