"""What f gave in the forward pass, one number a step, for the backward pass to compare with what f gives again.

    m_n = sum_i <w, f_i>          over values f_i that step n is made of; w random in [1/2, 3/2], the same for all

Equal bits are the rule: the same operations on the same states. Where they differ, rounding is told from another
function by evaluating f once more as the forward pass did: without a graph some of torch's kernels are others. Where
the states themselves are built again by other operations, f is also evaluated at states that differ by rounding, to see
what that changes. A difference that has been explained once is allowed from then on. On several ranks, where one cannot
evaluate f alone, half of the digits must agree. Cost of a step, for `pece` twice: an inner product in both passes, 8
bytes.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import PfdeError

Groups = Sequence[Sequence[Tensor]]  # for each mark of a step the values that it is the sum of
Again = Callable[[Tensor | None], Groups]  # f once more; with a tensor, at states moved by it times their size

REMEDY = (
    "func must give the same values again; between the passes change nothing that it uses in place (optimizer.step(), "
    "p.data.copy_(), a number or a list that it reads), keep no state in it from call to call, draw random numbers "
    "with torch's default generator only, or keep its graphs: gradient=pfde.Discrete(store='graph') or pfde.Backprop()"
)
_FAR = 64.0  # times what moving the states by rounding changes: more is not rounding
_NEAR = 4.0  # rounding errors, in units of eps |f|: kernels that round by where their operands lie in memory


class Marks:
    """The marks of one solve.

    alone : whether f may be evaluated on this rank without the others

    Attributes
    ----------
    mismatch : the first step, in the order of the backward pass, at which f was another
    """

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        self._kept: list[array[float]] = []
        self._allowed: list[float] = []
        self._weights: Tensor | None = None
        self._largest = 0.0
        self.mismatch: int | None = None

    def take_mismatch(self) -> int | None:
        """The mismatch, told once."""
        mismatch, self.mismatch = self.mismatch, None
        return mismatch

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

    def keep(self, n: int, groups: Groups) -> None:
        """Keep the marks of step n, the first time that it is taken."""
        for i, values in enumerate(groups):
            if i == len(self._kept):
                self._kept.append(array("d"))
                self._allowed.append(0.0)
            kept = self._kept[i]
            if n >= len(kept):
                kept.extend([math.nan] * (n - len(kept)))
                kept.append(self.of(values))

    def compare(self, n: int, groups: Groups, again: Again, *, exact: Sequence[bool]) -> None:
        """Note a mismatch unless step n's values are what they were.

        exact : for each group, whether it is taken at the states of the forward pass, to the bit
        """
        if self.mismatch is not None:
            return
        for i, values in enumerate(groups):
            kept, mark = self._kept[i][n], self.of(values)
            if mark != kept and not self._is_rounding(i, mark, kept, values, again, exact[i]):
                self.mismatch = n

    def explain(self, n: int, again: Again, *, exact: Sequence[bool]) -> None:
        """Step n could not be reversed: note a mismatch if that is because f is another."""
        if self._alone and self.mismatch is None:
            try:
                self.compare(n, again(None), again, exact=exact)
            except PfdeError:
                self.mismatch = n

    def _is_rounding(
        self, i: int, mark: float, kept: float, values: Sequence[Tensor], again: Again, exact: bool
    ) -> bool:
        difference, eps = abs(mark - kept), torch.finfo(values[0].dtype).eps
        if difference <= self._allowed[i]:
            return True
        size = max(float(x.norm()) for x in values)
        if not self._alone:
            if self._largest == 0.0:
                self._largest = max(abs(x) for x in self._kept[i] if math.isfinite(x))
            self._largest = max(self._largest, size)
            return difference <= math.sqrt(eps) * self._largest

        now = again(None)[i]
        if self.of(now) == kept:
            self._allowed[i] = 4.0 * difference
            return True
        if exact and values[0].device.type == "cpu":
            return difference <= _NEAR * eps * size
        # of kernels that add in any order, of Newton's method with an old Jacobian; another function draws, or counts
        noise = _distance(again(None)[i], now)
        if not noise <= math.sqrt(eps) * size:  # NaN, too
            return False
        assert self._weights is not None
        moved = again(2.0 * eps * (self._weights - 1.0).sign())[i]
        # states that were built again are not those of `now`: from where they were moved, f has changed the least
        shift = min(_distance(moved, now), _distance(moved, values))
        spread = _FAR * (shift + noise + eps * size)
        if not difference <= spread:
            return False
        self._allowed[i] = max(self._allowed[i], spread)
        return True


def shaken(y: Tensor, shake: Tensor | None, part: Tensor) -> Tensor:
    """A copy of y, moved by rounding of the size of y and of one of the terms that it is the sum of."""
    return y.clone() if shake is None else y + shake * (y.abs() + part.abs())


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((x - y).norm()) for x, y in zip(one, other, strict=True))
