"""The arguments that all functions of the API share, checked: an error names argument, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..system.layout import StateLayout, describe
from ..system.real import real

MOST_STEPS = 2**31 - 1  # PETSc counts steps in 32 bits, as it is usually built


_NARROW = (torch.float16, torch.bfloat16)  # taken, and integrated in float32


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
    flat = [real(x).reshape(-1) for x in parts]
    return layout, torch.cat(flat) if is_tuple else flat[0]


def increasing_times(t: Any) -> list[float]:
    """The output times as doubles, none before its predecessor."""
    times = finite_times(t)
    for i in range(1, len(times)):
        if times[i] < times[i - 1]:
            raise ValueError(
                f"t must be increasing (a time may be repeated): got t[{i - 1}]={times[i - 1]:g}, t[{i}]={times[i]:g}"
            )
    return times


def monotone_times(t: Any) -> list[float]:
    """The output times as doubles, increasing or decreasing; a time may be repeated."""
    times = finite_times(t)
    direction = 1.0 if times[-1] > times[0] else -1.0
    for i in range(1, len(times)):
        if (times[i] - times[i - 1]) * direction < 0:
            raise ValueError(
                "t must be increasing or decreasing (a time may be repeated): got "
                f"t[0]={times[0]:g}, t[{i - 1}]={times[i - 1]:g}, t[{i}]={times[i]:g}, t[-1]={times[-1]:g}"
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


def divided(times: Sequence[float], step_size: Any) -> tuple[int, ...]:
    """How many steps of this length there are between two times, which are distinct. Raises ValueError."""
    h = positive_step(step_size)
    steps_between = []
    for i in range(len(times) - 1):
        steps = count_steps(times[i + 1] - times[i], h)
        m = round(steps)
        # t carries a rounding error of its own, often that of float32 even where it is float64 by now
        slack = 1e-9 * m + 4 * torch.finfo(torch.float32).eps * max(abs(times[i]), abs(times[i + 1])) / h
        if m < 1 or abs(steps - m) > min(0.1, slack):
            distance = f"got t[{i + 1}] - t[{i}] = {times[i + 1] - times[i]:g} with step_size={h:g}"
            if m < 1:
                raise ValueError(f"step_size must not be longer than an interval of t: {distance}; reduce it")
            raise ValueError(
                f"every t[i] - t[0] must be a whole number of steps: {distance}, {steps:g} steps; choose a step_size "
                "that divides it"
            )
        steps_between.append(m)
    count_steps(sum(steps_between) * h, h)
    return tuple(steps_between)


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


def check_solver_options(options: Mapping[str, Any], method: str, *, implicit: bool) -> None:
    """Raise ValueError for options of the stage solver where a method has none (its TS would read and ignore them)."""
    for name in options:
        if not implicit and name.startswith(("snes_", "ksp_", "pc_", "fde_jacobian")):
            raise ValueError(
                f"options: {name!r} does not apply to method {method!r}, which is explicit and solves no "
                "equations: remove it"
            )


def check_prefix(prefix: str) -> str:
    """An options prefix, as PETSc takes it."""
    if not isinstance(prefix, str):
        raise TypeError(f"options_prefix must be a string: got {describe(prefix)}")
    if prefix.startswith("-") or " " in prefix:
        raise ValueError(f"options_prefix must be without dash and spaces, such as 'block1_': got {prefix!r}")
    return prefix
