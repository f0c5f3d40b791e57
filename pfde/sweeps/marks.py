"""What f gave in the forward pass, one number a step, for the backward pass to compare with what f gives again.

    m_n = sum_i <w, f_i>          over the values f_i that step n is made of; w random in [1/2, 3/2], the same for all

Equal bits are the rule: the same operations on the same states. Where they differ, rounding is told from another
function by evaluating f once more, as the forward pass did (without a graph some of torch's kernels are others), and at
states that differ by rounding (some states are built again and not kept). A difference that rounding has explained once
is allowed from then on. On several ranks, where one cannot evaluate f alone, half of the digits must agree. Cost: one
inner product a step in both passes, and 8 bytes.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Again = Callable[[float], Sequence[Tensor]]  # f once more, at the states times this factor

REMEDY = (
    "func must give the same values again; between the passes change nothing that it uses in place (optimizer.step(), "
    "p.data.copy_(), a number or a list that it reads), keep no state in it from call to call, draw random numbers "
    "with torch's default generator only, or keep its graphs: gradient=pfde.Discrete(store='graph') or pfde.Backprop()"
)
_FAR = 64.0  # times what moving the states by rounding changes: more is not rounding


class Marks:
    """The marks of one solve.

    alone : whether f may be evaluated on this rank without the others

    Attributes
    ----------
    mismatch : the first step, in the order of the backward pass, at which f was another
    """

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        self._kept = array("d")
        self._weights: Tensor | None = None
        self._allowed = 0.0
        self._largest = 0.0
        self.mismatch: int | None = None

    def of(self, values: Sequence[Tensor]) -> float:
        """The mark of these values, each (d,)."""
        w = self._weights
        if w is None:
            like, generator = values[0], torch.Generator().manual_seed(1)
            w = torch.rand(like.numel(), generator=generator, dtype=like.dtype).add_(0.5).to(like.device)
            self._weights = w
        if len(values) == 1:
            return torch.dot(values[0], w).item()
        return math.fsum(torch.dot(x, w).item() for x in values)

    def keep(self, n: int, values: Sequence[Tensor]) -> None:
        """Keep the mark of step n, the first time that it is taken."""
        kept = self._kept
        if n >= len(kept) and values:
            kept.extend([math.nan] * (n - len(kept)))
            kept.append(self.of(values))

    def compare(self, n: int, values: Sequence[Tensor], again: Again) -> None:
        """Note a mismatch unless step n's values are what they were."""
        if not values or self.mismatch is not None or n >= len(self._kept):
            return
        kept, mark = self._kept[n], self.of(values)
        if mark != kept and not math.isnan(kept) and not self._is_rounding(mark, kept, values, again):
            self.mismatch = n

    def _is_rounding(self, mark: float, kept: float, values: Sequence[Tensor], again: Again) -> bool:
        difference, eps = abs(mark - kept), torch.finfo(values[0].dtype).eps
        if difference <= self._allowed:
            return True
        if not self._alone:
            size = max(float(x.norm()) for x in values)
            self._largest = max(self._largest, size)
            return difference <= math.sqrt(eps) * self._largest
        now = self.of(again(1.0))
        if now == kept:
            self._allowed = 4.0 * difference
            return True
        noise = abs(self.of(again(1.0)) - now)  # of kernels that add in any order; another function draws or counts
        if noise > 0.0 and (values[0].device.type == "cpu" or noise > math.sqrt(eps) * float(values[0].norm())):
            return False
        spread = abs(self.of(again(1.0 + 2.0 * eps)) - now)
        if difference <= _FAR * (spread + noise):
            self._allowed = max(self._allowed, _FAR * (spread + noise))
            return True
        return False
