"""Sums of slopes: what a step adds to y, and what rounding loses of it.

    y_{n+1} = y_n + (carry + h sum_i w_i K_i)

The increments are summed before they are added to y, whose size they do not have; in float32 what the last addition
loses is carried to the next step (Kahan), so that the rounding of N steps does not grow with N. A sum is the same to
the bit whether it is on autograd's graph or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def value_of(h: float | Tensor) -> float:
    """h as a number, off its graph."""
    return float(h.detach()) if isinstance(h, Tensor) else h


def combine(
    y: Tensor,
    h: float | Tensor,
    weights: Sequence[tuple[int, float]],
    slopes: Sequence[Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """y + h sum_i w_i K_i, a new tensor, or `out`; y itself where there is no weight and no `out`."""
    if not weights:
        return y if out is None else out.copy_(y)
    if isinstance(h, Tensor):  # with the value that a number h gives, to the bit
        value = combine(y.detach(), float(h.detach()), weights, [k.detach() for k in slopes])
        return with_value(y + _scaled_sum(h, weights, slopes), value)
    w, total = weighted_sum(weights, slopes)
    return torch.add(y, total, alpha=h * w, out=out)


def weighted_sum(
    weights: Sequence[tuple[int, float]], slopes: Sequence[Tensor] | Mapping[int, Tensor]
) -> tuple[float, Tensor]:
    """w and sum_i (w_i / w) K_i, w the weight of largest size: with w left out it costs no operation more than terms.

    The sum may be a slope itself.
    """
    pivot, w = weights[-1]
    for i, other in weights:
        if abs(other) > abs(w):
            pivot, w = i, other
    total = slopes[pivot]
    fresh = False
    for i, other in weights:
        if i != pivot:
            total = total.add_(slopes[i], alpha=other / w) if fresh else total.add(slopes[i], alpha=other / w)
            fresh = True
    return w, total


def _scaled_sum(h: Tensor, weights: Sequence[tuple[int, float]], slopes: Sequence[Tensor]) -> Tensor:
    """sum_i (h w_i) K_i, on the graphs of h and K_i."""
    (i, w), *rest = weights
    total = slopes[i] * (h * w).to(slopes[i])
    for i, w in rest:
        total = total + slopes[i] * (h * w).to(total)
    return total


def with_value(y: Tensor, value: Tensor) -> Tensor:
    """`value`, to the bit, on the graph of y."""
    return value + (y - y.detach())


class Advance(NamedTuple):
    """y_{n+1} and what it lacks of its sum; with y_{n+1} = y_n + factor increment.

    mark : the sum of the slopes without a graph
    """

    y: Tensor
    carry: Tensor | None
    increment: Tensor
    factor: float
    mark: Tensor


def advance(
    y: Tensor,
    h: float | Tensor,
    weights: Sequence[tuple[int, float]],
    slopes: Sequence[Tensor],
    carry: Tensor | None,
    out: Tensor | None = None,
) -> Advance:
    """`combine` for a step: y + (carry + h sum_i w_i K_i), and what its rounding loses."""
    if isinstance(h, Tensor):
        value, lost, _, _, mark = advance(y.detach(), float(h.detach()), weights, [k.detach() for k in slopes], carry)
        increment = _scaled_sum(h, weights, slopes)
        return Advance(with_value(y + increment, value), lost, increment, 1.0, mark)
    w, total = weighted_sum(weights, slopes)
    mark = total.detach().reshape(-1)
    if carry is None:
        return Advance(torch.add(y, total, alpha=h * w, out=out), None, total, h * w, mark)
    increment = torch.add(carry.view_as(y), total, alpha=h * w)
    y1 = torch.add(y, increment, out=out)
    lost = y.detach() - y1.detach()
    return Advance(y1, lost.add_(increment.detach()).reshape(-1), total, h * w, mark)


def add_lost(total: Tensor, terms: Sequence[Tensor], carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """total + (carry + sum of the terms), a new tensor where there is anything to add, and what its rounding loses."""
    increment, fresh = carry, False
    for x in terms:
        if increment is None:
            increment = x
        else:
            increment, fresh = increment.add_(x) if fresh else increment + x, True
    if increment is None:
        return total, None
    result = total + increment
    return result, None if carry is None else (total - result).add_(increment)


def no_carry(y: Tensor) -> Tensor | None:
    """The carry of a sum that begins with y: zero, or None where rounding needs none."""
    return None if y.dtype == torch.float64 else torch.zeros_like(y)


def accumulate(total: Tensor | None, weight: float, x: Tensor) -> Tensor:
    """total + weight x, in place where there is a total."""
    return x * weight if total is None else total.add_(x, alpha=weight)


def inner(x: Tensor, y: Tensor) -> float:
    """<x, y>, in double precision."""
    return float(torch.dot(x, y)) if x.dtype == torch.float64 else float((x.double() * y.double()).sum())


def nonzero(weights: Sequence[float]) -> list[tuple[int, float]]:
    """(index, weight) of the weights that are not zero."""
    return [(i, w) for i, w in enumerate(weights) if w]


def polynomial(p: Sequence[float], theta: float, derivative: int) -> float:
    """sum_k p_k theta^(k+1), or its derivative."""
    if derivative:
        return sum((k + 1) * x * theta**k for k, x in enumerate(p))
    return sum(x * theta ** (k + 1) for k, x in enumerate(p))
