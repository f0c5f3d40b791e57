"""What f gave in the forward pass, one number a step, for the backward pass to compare with what f gives again.

    m_n = sum_i <w, f_i>          over the values f_i that step n is made of; w random in [1/2, 3/2], the same for all

Equal bits are the rule: the same operations on the same states. Where they differ, rounding is told from another
function by evaluating f once more, as the forward pass did (without a graph some of torch's kernels are others), and at
states that differ by rounding (some states are built again and not kept). A difference that rounding has explained once
is allowed from then on. On several ranks, where one cannot evaluate f alone, half of the digits must agree. Cost: one
inner product a step in both passes, and 8 bytes.

NOTE 1. Rounding has any sign in each component: (1 + eps) y would tell nothing of a difference quotient, which is far
larger on noise than on a smooth y. Its size is that of what a state is summed from: y_n = y_0 + X_n has the rounding
of y_0, however small y_n is by then.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# f once more: as the forward pass had it (None), or at states that are `moved` by so much
Again = Callable[[float | None], Sequence[Tensor]]

_FAR = 64.0  # times what moving the states by rounding changes: more is not rounding
_OWN = 4.0  # eps of f's size: its own rounding, for few components the moved states may show none


def moved(y: Tensor, by: float, start: Tensor | None = None) -> Tensor:
    """y, each component by this part of its size, and of that at the start, up or down at random (NOTE 1)."""
    if by == 0.0:
        return y
    size = y.abs() if start is None else y.abs() + start.abs()
    signs = torch.randint(2, y.shape, generator=torch.Generator().manual_seed(2)).mul_(2).sub_(1)
    return torch.addcmul(y, size, signs.to(y), value=by)


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
            self._largest = max(self._largest, size, *(abs(x) for x in self._kept if math.isfinite(x)))
            return difference <= math.sqrt(eps) * self._largest
        now = self.of(again(None))
        if now == kept:
            self._allowed = 4.0 * difference
            return True
        noise = abs(self.of(again(None)) - now)  # of kernels that add in any order; another function draws or counts
        if noise > 0.0 and (values[0].device.type == "cpu" or noise > math.sqrt(eps) * float(values[0].norm())):
            return False
        spread = abs(self.of(again(2.0 * eps)) - self.of(again(0.0)))
        allowed = _FAR * (spread + noise) + _OWN * eps * sum(float(x.norm()) for x in values)
        if difference <= allowed:
            self._allowed = max(self._allowed, allowed)
            return True
        return False
