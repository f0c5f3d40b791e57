"""The arguments of `fdeint` and `solve`, checked: every mistake is an error that names argument, value and remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .schemes import METHODS, Scheme
from .schemes.base import check_order
from .sweeps.discretisation import Grid
from .system.torch_function import StateLayout, describe


def check_method(method: str) -> Scheme:
    """The scheme of this name."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}: got {method!r}")
    return METHODS[method]


def check_state(y0: Any) -> tuple[StateLayout, Tensor]:
    """The layout of y0, a tensor or a tuple of tensors, and the flat state (d,) on y0's graph."""
    is_tuple = isinstance(y0, tuple | list)
    parts = tuple(y0) if is_tuple else (y0,)
    if not parts:
        raise ValueError("y0 must hold at least one tensor: got an empty tuple")
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"y0 must be a tensor or a tuple of tensors: got {describe(part)}")
        if part.is_complex():
            raise TypeError(f"y0 must be real: got {part.dtype}; integrate torch.view_as_real(y0) instead")
        if part.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"y0 must be float32 or float64: got {part.dtype}; use y0.double() or y0.float()")
        if part.dtype != parts[0].dtype or part.device != parts[0].device:
            raise TypeError(
                f"the tensors of y0 must share dtype and device: got {parts[0].dtype} on {parts[0].device} and "
                f"{part.dtype} on {part.device}"
            )
    layout = StateLayout(tuple(part.shape for part in parts), is_tuple)
    if layout.size == 0:
        raise ValueError(f"y0 must have entries: got shape {tuple(parts[0].shape)}")
    return layout, torch.cat([part.reshape(-1) for part in parts]) if is_tuple else y0.reshape(-1)


def check_times(t: Any) -> list[float]:
    """The output times as doubles."""
    if not isinstance(t, Tensor):
        t = torch.as_tensor(t, dtype=torch.float64)
    if t.dim() != 1 or len(t) < 2:
        raise ValueError(f"t must be one-dimensional with at least two times: got shape {tuple(t.shape)}")
    if t.requires_grad:
        raise ValueError("t requires a gradient, which the methods for fractional orders do not give: pass t.detach()")
    if not t.dtype.is_floating_point:
        raise TypeError(f"t must be floating point: got {t.dtype}; use t.double()")
    times = t.double().tolist()
    for i in range(1, len(times)):
        if not times[i] > times[i - 1]:
            raise ValueError(f"t must be strictly increasing: got t[{i - 1}]={times[i - 1]:g}, t[{i}]={times[i]:g}")
    return times


def check_grid(times: list[float], step_size: float | None, resolution: float) -> tuple[Grid, tuple[int, ...]]:
    """The uniform grid, and the step numbers of the times.

    resolution : relative spacing of the numbers that t was given in (eps of its dtype), for what counts as whole
    """
    t0, t1 = times[0], times[-1]
    if step_size is None:
        steps = len(times) - 1
        h = (t1 - t0) / steps
    else:
        h = float(step_size)
        if not 0 < h <= (t1 - t0) * (1 + 1e-9):
            raise ValueError(f"step_size must be in (0, t[-1] - t[0] = {t1 - t0:g}]: got {step_size:g}")
        steps = round((t1 - t0) / h)
    # t carries a rounding error of its own: one unit of the larger end, seen in steps of h
    slack = 1e-9 * steps + 4 * resolution * max(abs(t0), abs(t1)) / h
    outputs = []
    for i, time in enumerate(times):
        n = (time - t0) / h
        if abs(n - round(n)) > min(0.1, slack) or (step_size is None and round(n) != i):
            if step_size is None:
                raise ValueError(
                    f"t must be uniformly spaced when it is the grid: t[{i}]={time:g} is not t[0] + {i} h with "
                    f"h={h:g}; give step_size"
                )
            raise ValueError(
                f"every t[i] - t[0] must be a whole number of steps: got t[{i}] - t[0] = {time - t0:g} with "
                f"step_size={h:g}, {n:g} steps; choose a step_size that divides it"
            )
        outputs.append(round(n))
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"step_size={h:g} is larger than the smallest distance between times in t; reduce it")
    return Grid(t0, (t1 - t0) / steps, steps, t1), tuple(outputs)


def check_alpha(alpha: Any, layout: StateLayout, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """alpha as a float64-convertible tensor, and the (d,) index of each component's order (None for one order)."""
    if not isinstance(alpha, Tensor):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise TypeError(f"alpha must be a number or a tensor: got {describe(alpha)}")
        alpha = torch.tensor(float(alpha), dtype=torch.float64)
    if not alpha.dtype.is_floating_point:
        raise TypeError(f"alpha must be floating point: got {alpha.dtype}; use alpha.double()")
    check_order("alpha", alpha.detach().reshape(-1).tolist())
    if alpha.numel() == 1:
        return alpha, None
    if layout.is_tuple:
        raise ValueError(f"alpha must be a single number for a tuple y0: got shape {tuple(alpha.shape)}")
    index = torch.arange(alpha.numel(), device=device).reshape(alpha.shape)
    try:
        return alpha, index.expand(layout.shapes[0]).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"alpha must broadcast to y0's shape {tuple(layout.shapes[0])}: got {tuple(alpha.shape)}"
        ) from None


def check_parameters(func: Callable[..., Any], params: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """The tensors of func that require a gradient: a module's own, and those of `params`."""
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, y): got {type(func).__name__}")
    found = list(func.parameters()) if isinstance(func, nn.Module) else []
    for p in () if params is None else params:
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be a sequence of tensors: got {describe(p)} in it")
        found.append(p)
    return tuple({id(p): p for p in found if p.requires_grad}.values())


def check_kind(name: str, value: Any, kinds: tuple[type, ...], default: Any) -> Any:
    """`value`, or the default for None. Raises TypeError for another kind."""
    if value is None:
        return default
    if not isinstance(value, kinds):
        allowed = " or ".join(f"pfde.{kind.__name__}()" for kind in kinds)
        raise TypeError(f"{name} must be {allowed}: got {value!r}")
    return value


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """PETSc options by name, without a leading dash."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping of PETSc option names to values: got {type(options).__name__}")
    for name in options:
        if not isinstance(name, str) or not name or name.startswith("-"):
            raise ValueError(f"options: names are PETSc's without the dash, such as 'snes_rtol': got {name!r}")
    return dict(options)
