"""Output times that are repeated, and solves in which nothing moves.

The solve is on the distinct times T of t; Y is the solution there, and r(i) says which of them t_i is:

    y_i = Y_r(i) + f(T_r(i), Y_r(i)) (t_i - T_r(i))

The last term is zero, but its derivative is not: y_i = y(t_i) moves with its own t_i, also where another output is at
the same time. T_r is one of the t_i, the first; the last of all for the end, with which the grid moves.

Where all times are one, or the state has no entries, no step is taken: y_i = y_0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..system.layout import StateLayout
from ..system.random import see_whether_it_draws
from ..system.torch_function import TorchFunction
from .initial_value import P, examined


class Repeats(NamedTuple):
    """The distinct times of t.

    times : T, in their order
    rows : r(i), for each t_i its place in T; None where all are distinct
    chosen : for each T its place in t
    """

    times: list[float]
    rows: tuple[int, ...] | None
    chosen: tuple[int, ...]

    def own(self, t: Tensor) -> Tensor:
        """T on the graph of t."""
        return t if self.rows is None else t[list(self.chosen)]

    def expand(self, y: Tensor) -> Tensor:
        """y at t, (len(t), d), from Y, (len(T), d), or less of it where a solve ended early."""
        if self.rows is None:
            return y
        rows = [r for r in self.rows if r < len(y)]
        return y.index_select(0, torch.tensor(rows, device=y.device))

    def move(self, y: Tensor, t: Tensor, slope: Callable[[float, Tensor], Tensor]) -> Tensor:
        """y, (len(t), d), with each row on the graph of its own t_i; slope(t, y) is f there. Collective."""
        if self.rows is None:
            return y
        y = y.reshape(len(y), -1)
        rows = self.rows[: len(y)]
        often, zero = Counter(rows), torch.zeros_like(y[0]).detach()
        rates = {r: slope(self.times[r], y[rows.index(r)].detach()) for r in often if often[r] > 1}
        rate = torch.stack([rates.get(r, zero) for r in rows])
        shift = t - t[[self.chosen[r] for r in self.rows]]
        return y + rate * shift[: len(y)].to(rate).unsqueeze(1)


def distinct(times: Sequence[float]) -> Repeats:
    """The distinct times of a monotone sequence."""
    rows, chosen = [0], [0]
    for i in range(1, len(times)):
        if times[i] != times[i - 1]:
            chosen.append(i)
        rows.append(len(chosen) - 1)
    found = [times[i] for i in chosen]
    if len(found) == len(times):
        return Repeats(found, None, tuple(chosen))
    if len(found) > 1:
        chosen[-1] = len(times) - 1
    return Repeats(found, tuple(rows), tuple(chosen))


def rests(times: Repeats, layout: StateLayout) -> bool:
    """Whether nothing moves."""
    return len(times.times) == 1 or layout.size == 0


def stay(problem: P, y0: Tensor, times: Repeats, inputs: Iterable[Tensor | None]) -> Tensor:
    """y at the distinct times, (len(T), d), where nothing moves: y0, which shares no memory with it. Collective.

    problem : of which no more is needed than to examine its function, as in every solve
    inputs : what a solve would depend on beside y0; their gradients are zero
    """
    grad = torch.is_grad_enabled()
    with nullcontext() if grad else torch.inference_mode(False), torch.set_grad_enabled(grad):
        y0 = y0.clone() if y0.is_inference() else y0
        examined(problem, y0)
        return rest(y0, len(times.times), (*inputs, *problem.parameters))


def rest(y0: Tensor, count: int, inputs: Iterable[Tensor | None]) -> Tensor:
    """y0, `count` times, on the graph of the inputs as well."""
    y = y0.expand(count, -1).clone()
    for x in inputs:
        if x is not None and x.requires_grad:
            nothing = x.reshape(-1)[:0].sum()
            y = y - (nothing.real if nothing.is_complex() else nothing).to(y)
    return y


def slope_of(function: TorchFunction) -> Callable[[float, Tensor], Tensor]:
    """f(t, y) without a graph, and without an effect on torch's random numbers."""

    def slope(t: float, y: Tensor) -> Tensor:
        with torch.no_grad():
            return see_whether_it_draws(lambda: function.evaluate(0, t, y), y.device, again=False)[0]

    return slope


def require_entries(layout: StateLayout, where: str) -> None:
    """Raise ValueError for a state without entries."""
    if layout.size == 0:
        shapes = ", ".join(str(tuple(shape)) for shape in layout.shapes)
        raise ValueError(f"y0 must have entries {where}: got shape {shapes}")


def check_rest(times: Repeats, count: int, t: Any) -> None:
    """Raise ValueError where a Caputo equation has all its output times at the base point, and these are to move."""
    if len(times.times) == 1 and count > 1 and isinstance(t, Tensor) and t.requires_grad:
        raise ValueError(
            "t requires a gradient, but all its times are t[0], where the derivative of y with respect to t is "
            "infinite for alpha < 1: pass t.detach()"
        )
