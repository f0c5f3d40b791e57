"""The arguments of `fdeint` and `solve`, checked: every mistake is an error that names argument, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .history import Exact, ShortMemory, SumOfExponentials
from .schemes import METHODS, Scheme
from .schemes.base import check_order
from .schemes.one_step import OneStep
from .schemes.ordinary import ODE_METHODS
from .sweeps.grid import Grid
from .system.layout import StateLayout, describe

MOST_STEPS = 2**31 - 1  # PETSc counts steps in 32 bits, as it is usually built


_NARROW = (torch.float16, torch.bfloat16)  # taken, and integrated in float32


def check_method(method: str) -> Scheme:
    """The scheme of this name."""
    if not isinstance(method, str) or method not in METHODS:
        hint = "; it is a method of pfde.odeint" if isinstance(method, str) and method in ODE_METHODS else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}: got {method!r}{hint}")
    return METHODS[method]


def check_surroundings() -> None:
    """Raise RuntimeError inside a transform of torch.func or in forward mode: what a solve does is not seen by them."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        raise RuntimeError(
            "a solve inside torch.func (vmap, grad, jacrev, ...) or forward mode is not implemented: use "
            "torch.autograd.grad or backward(), and a batch as a leading dimension of y0"
        )


def check_state(y0: Any) -> tuple[StateLayout, Tensor]:
    """The layout of y0, a tensor or a tuple of tensors, and the flat state (d,) on y0's graph."""
    is_tuple = isinstance(y0, tuple | list)
    parts = tuple(y0) if is_tuple else (y0,)
    if not parts:
        raise ValueError("y0 must hold at least one tensor: got an empty tuple")
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"y0 must be a tensor or a tuple of tensors: got {describe(part)}")
        if part.layout != torch.strided:
            raise TypeError(f"y0 must be dense: got {part.layout}; use y0.to_dense()")
        if part.dtype not in (*_NARROW, torch.float32, torch.float64, torch.complex64, torch.complex128):
            raise TypeError(
                f"y0 must be float32 or float64, or complex: got {part.dtype}; use y0.double() or y0.float()"
            )
        if part.dtype.to_real() != parts[0].dtype.to_real() or part.device != parts[0].device:
            raise TypeError(
                f"the tensors of y0 must share precision and device: got {parts[0].dtype} on {parts[0].device} and "
                f"{part.dtype} on {part.device}"
            )
    is_complex = tuple(part.is_complex() for part in parts)
    narrow = parts[0].dtype if parts[0].dtype in _NARROW else None
    layout = StateLayout(tuple(part.shape for part in parts), is_tuple, is_complex if any(is_complex) else (), narrow)
    parts = parts if narrow is None else tuple(part.float() for part in parts)
    flat = [(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1) for x in parts]
    return layout, torch.cat(flat) if is_tuple else flat[0]


def check_times(t: Any) -> list[float]:
    """The output times as doubles, none before its predecessor."""
    times = finite_times(t)
    for i in range(1, len(times)):
        if times[i] < times[i - 1]:
            raise ValueError(
                f"t must be increasing (a time may be repeated): got t[{i - 1}]={times[i - 1]:g}, t[{i}]={times[i]:g}"
            )
    return times


def finite_times(t: Any) -> list[float]:
    """The output times as doubles, at least one."""
    if not isinstance(t, Tensor):
        try:
            t = torch.as_tensor(t, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"t must be a one-dimensional tensor of times: got {describe(t)}") from None
    if t.dim() != 1 or len(t) < 1:
        raise ValueError(f"t must be one-dimensional with at least one time, where y is y0: got shape {tuple(t.shape)}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"t must be floating point: got {t.dtype}; use t.double()")
    times: list[float] = t.double().tolist()
    if not all(map(math.isfinite, times)):
        raise ValueError(f"t must be finite: got {times[:8]}")
    if not math.isfinite(times[-1] - times[0]):
        raise ValueError(
            f"t[-1] - t[0] must be finite in float64: got t[0]={times[0]:g}, t[-1]={times[-1]:g}; move or scale "
            "the times"
        )
    return times


def count_steps(distance: float, h: float) -> float:
    """How many steps of length h there are in a distance. Raises ValueError for more than PETSc can count."""
    steps = abs(distance) / h
    if not steps <= MOST_STEPS:
        raise ValueError(
            f"step_size={h:g} would make {steps:.3g} steps of an interval of {abs(distance):g}, above "
            f"{MOST_STEPS}, the most that PETSc counts: increase step_size"
        )
    return steps


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


def positive_step(step_size: Any) -> float:
    """step_size as a number."""
    h = as_number("step_size", step_size)
    if not h > 0:
        raise ValueError(f"step_size must be positive, for decreasing t too: got {h:g}")
    if math.isinf(h):
        raise ValueError("step_size must be finite: got inf; for one step give the distance of two times")
    return h


def as_number(name: str, value: Any) -> float:
    """A float. Raises TypeError or ValueError."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} requires a gradient, which is not implemented: pass float({name})")
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number: got {describe(value)}")
    return float(value)


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


def check_parameters(func: Callable[..., Any], params: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """The tensors of func that require a gradient: a module's own, and those of `params`."""
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, y): got {type(func).__name__}")
    found: list[Tensor] = list(func.parameters()) if isinstance(func, nn.Module) else []
    if any(type(p).__module__.startswith("torch.distributed") for p in found):
        raise ValueError(
            "func is sharded (torch.distributed.fully_shard, or DTensor parameters), and is whole only while a module "
            "of it runs; the backward pass of a solve, which evaluates it again, is no such time: leave func out of "
            "what is sharded, and average its gradients over the ranks (DistributedDataParallel, or by hand)"
        )
    if isinstance(params, Tensor | nn.Module) or not isinstance(params, Iterable | None):
        raise TypeError(f"params must be a sequence of tensors, such as (a, b): got {describe(params)}")
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


def check_history(history: Any, grid: Grid) -> Any:
    """The history, None for one to be chosen, and that it can be had on this grid."""
    history = check_kind("history", history, (Exact, SumOfExponentials, ShortMemory), None)
    if isinstance(history, ShortMemory) and grid.points is not None:
        raise ValueError(
            f"history={history} needs a uniform grid: give step_size, or use SumOfExponentials() or Exact()"
        )
    if isinstance(history, Exact) and history.algorithm is not None and grid.points is not None:
        raise ValueError(f"history={history} needs a uniform grid: leave algorithm out on a nonuniform one")
    return history


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """PETSc options by name, without a leading dash."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping of PETSc option names to values: got {type(options).__name__}")
    for name in options:
        if not isinstance(name, str) or not name or name.startswith("-") or " " in name:
            raise ValueError(f"options: names are PETSc's without the dash, such as 'snes_rtol': got {name!r}")
        if not isinstance(options[name], str | bool | int | float):
            raise TypeError(
                f"options: a value must be a number, a string or a bool: got {name!r}: {describe(options[name])}"
            )
    return dict(options)


def check_solver_options(options: Mapping[str, Any], scheme: Scheme | OneStep) -> None:
    """Raise ValueError for options of the stage solver where a method has none (its TS would read and ignore them)."""
    for name in options:
        if not scheme.implicit and name.startswith(("snes_", "ksp_", "pc_", "fde_jacobian")):
            raise ValueError(
                f"options: {name!r} does not apply to method {scheme.name!r}, which is explicit and solves no "
                "equations: remove it"
            )


def check_prefix(prefix: str) -> str:
    """An options prefix, as PETSc takes it."""
    if not isinstance(prefix, str):
        raise TypeError(f"options_prefix must be a string: got {describe(prefix)}")
    if prefix.startswith("-") or " " in prefix:
        raise ValueError(f"options_prefix must be without dash and spaces, such as 'block1_': got {prefix!r}")
    return prefix
