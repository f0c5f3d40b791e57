"""The cotangents of the parameters, as the products of one adjoint sweep sum them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .reached import finish
from .sums import BLOCK, wider


class ParameterBar:
    """The cotangents of a sequence of parameters, summed in place; None where nothing arrived.

    A sweep over N steps of s stages adds s N products: long sums (`sums`), those of half precision in single.
    """

    def __init__(self, count: int) -> None:
        self._block: list[Tensor | None] = [None] * count
        self._whole: list[Tensor | None] = [None] * count  # of the blocks before, in float64
        self._dtypes: list[torch.dtype | None] = [None] * count
        self._terms = 0
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
        if self._terms == BLOCK:
            self._fold()
        self._terms += 1
        sums, terms = [], []
        for i, (total, bar) in enumerate(zip(self._block, bars, strict=True)):
            if bar is None:
                continue
            if total is None:
                # a copy: autograd may have handed out a view of the incoming cotangent
                self._block[i] = bar.to(torch.promote_types(bar.dtype, torch.float32), copy=True)
                self._dtypes[i] = bar.dtype
            else:
                sums.append(total)
                terms.append(bar)
        if sums:
            torch._foreach_add_(sums, terms)

    def _fold(self) -> None:
        """Add the blocks of narrow parameters to what came before."""
        self._terms = 0
        for i, block in enumerate(self._block):
            if block is None or block.dtype == (wide := wider(block.dtype)):
                continue
            whole = self._whole[i]
            self._whole[i] = block.to(wide) if whole is None else whole.add_(block)
            self._block[i] = None

    @property
    def bars(self) -> list[Tensor | None]:
        """The sums, in the parameters' dtypes."""
        found: list[Tensor | None] = []
        for whole, block, dtype in zip(self._whole, self._block, self._dtypes, strict=True):
            total = block if whole is None else whole if block is None else whole + block
            found.append(None if total is None else total.to(dtype))
        return found
