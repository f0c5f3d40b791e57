"""The arguments of Caputo solves, checked: every mistake is an error that names argument, value and remedy."""

from __future__ import annotations

from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..solving.arguments import as_number, count_steps, positive_step
from ..solving.engine import names_of, other_function
from ..system.layout import StateLayout, describe
from .grid import Grid
from .history import Bounded, Exact, History, ShortMemory, SumOfExponentials
from .schemes import METHODS, Scheme
from .schemes.base import check_order


def check_method(method: Any) -> Scheme:
    """The scheme of this name, or the scheme itself."""
    if isinstance(method, Scheme):
        return method
    if not isinstance(method, str) or method not in METHODS:
        other = other_function("fdeint", method)
        hint = "" if other is None else f"; it is a method of pfde.{other}"
        raise ValueError(f"method must be one of {names_of('fdeint')}: got {method!r}{hint}")
    return METHODS[method]


def check_grid(
    times: list[float], step_size: float | None, scheme: Scheme, least: int = 1
) -> tuple[Grid, tuple[int, ...]]:
    """The grid, and the step numbers of the times, which are distinct.

    Without step_size the times are the grid, uniform or not; each interval in equal parts if that needs `least` steps.
    """
    t0, t1 = times[0], times[-1]
    if len(times) == 1:
        if step_size is not None:
            positive_step(step_size)
        return Grid(t0, 0.0, 0, t1), (0,)
    if step_size is None:
        steps = len(times) - 1
        h = (t1 - t0) / steps
    else:
        h = as_number("step_size", step_size)
        if not 0 < h <= (t1 - t0) * (1 + 1e-9):
            raise ValueError(f"step_size must be in (0, t[-1] - t[0] = {t1 - t0:g}]: got {h:g}")
        steps = round(count_steps(t1 - t0, h))
    parts = -(-least // steps) if step_size is None else 1
    # t carries a rounding error of its own, often that of float32 even where it is float64 by now; seen in steps of h
    slack = 1e-9 * steps + 4 * torch.finfo(torch.float32).eps * max(abs(t0), abs(t1)) / h
    outputs = []
    for i, time in enumerate(times):
        n = (time - t0) / h
        if abs(n - round(n)) > min(0.1, slack) or (step_size is None and round(n) != i):
            if step_size is None:
                return _nonuniform(times, i, scheme, parts), tuple(range(0, steps * parts + 1, parts))
            raise ValueError(
                f"every t[i] - t[0] must be a whole number of steps: got t[{i}] - t[0] = {time - t0:g} with "
                f"step_size={h:g}, {n:g} steps; choose a step_size that divides it"
            )
        outputs.append(round(n) * parts)
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"step_size={h:g} is larger than the smallest distance between times in t; reduce it")
    steps *= parts
    return Grid(t0, (t1 - t0) / steps, steps, t1), tuple(outputs)


def _nonuniform(times: list[float], i: int, scheme: Scheme, parts: int) -> Grid:
    """The times, each interval in parts, as the grid; t[i] is the first that is not where a uniform one would be."""
    steps = len(times) - 1
    if not scheme.rules:
        h = (times[-1] - times[0]) / steps
        able = ", ".join(name for name, other in METHODS.items() if other.rules)
        raise ValueError(
            f"t must be uniformly spaced for method {scheme.name!r} when it is the grid: t[{i}]={times[i]:g} is not "
            f"t[0] + {i} h with h={h:g}; give step_size, or use one of the methods {able}, which take any grid"
        )
    points = [t + (k / parts) * (t1 - t) for t, t1 in pairwise(times) for k in range(parts)]
    return Grid(times[0], (times[-1] - times[0]) / (steps * parts), steps * parts, times[-1], (*points, times[-1]))


def check_ends(t: Any, grid: Grid) -> Tensor | None:
    """t_0 and t_N on t's graph, (2,), where t requires a gradient."""
    if not isinstance(t, Tensor) or not t.requires_grad:
        return None
    if grid.points is not None:
        raise ValueError(
            "t requires a gradient, which a nonuniform grid does not have: pass t.detach(), or a uniform grid"
        )
    return torch.stack([t[0], t[-1]])


def as_order(alpha: Any) -> Tensor:
    """alpha as a tensor, checked: a number, a tensor, or an array or a (nested) sequence of such."""
    order = alpha if isinstance(alpha, Tensor) else _order_of(alpha)
    if not order.dtype.is_floating_point:
        raise TypeError(f"alpha must be floating point: got {order.dtype}; use alpha.double()")
    try:
        check_order("alpha", order.detach().reshape(-1).tolist())
    except ValueError as error:
        if not order.requires_grad:
            raise
        raise ValueError(
            f"{error}. An optimizer does not keep it there: learn raw, and use alpha = torch.sigmoid(raw), as "
            "pfde.nn.FDEBlock(alpha=..., learn_alpha=True) does"
        ) from None
    return order


def _order_of(alpha: Any) -> Tensor:
    """What is no tensor as one, float64; tensors within it stay on their graphs."""
    if isinstance(alpha, Tensor):
        return alpha.double()
    if isinstance(alpha, list | tuple) and alpha:
        try:
            return torch.stack([_order_of(entry) for entry in alpha])
        except RuntimeError as error:
            raise ValueError(f"alpha must be rectangular where it is a nested sequence: {error}") from None
    if not isinstance(alpha, bool | list | tuple) and isinstance(alpha, Real):
        return torch.tensor(float(alpha), dtype=torch.float64)
    if hasattr(alpha, "__array__") and getattr(getattr(alpha, "dtype", None), "kind", "") in "fiu":
        return torch.tensor(alpha, dtype=torch.float64)
    raise TypeError(f"alpha must be a number or a tensor, or an array or a sequence of numbers: got {describe(alpha)}")


def check_alpha(alpha: Any, layout: StateLayout, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """alpha as a float64-convertible tensor, and the (d,) index of each component's order (None for one order)."""
    alpha = as_order(alpha)
    if alpha.numel() == 1:
        return alpha, None
    if layout.is_tuple:
        raise ValueError(f"alpha must be a single number for a tuple y0: got shape {tuple(alpha.shape)}")
    index = torch.arange(alpha.numel(), device=device).reshape(alpha.shape)
    try:
        group = index.expand(layout.shapes[0]).reshape(-1)
        return alpha, group.repeat_interleave(2) if layout.is_complex else group
    except RuntimeError:
        raise ValueError(
            f"alpha must broadcast to y0's shape {tuple(layout.shapes[0])}: got {tuple(alpha.shape)}"
        ) from None


def check_history(history: Any, grid: Grid) -> History | None:
    """The history, None for one to be chosen, and that it can be had on this grid."""
    if history is None:
        return None
    if not isinstance(history, Exact | Bounded):
        allowed = " or ".join(f"pfde.{kind.__name__}()" for kind in (Exact, SumOfExponentials, ShortMemory))
        raise TypeError(f"history must be {allowed}: got {history!r}")
    if grid.points is not None and not history.any_grid:
        raise history.uniform_error()
    return history
