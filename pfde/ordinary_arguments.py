"""The arguments of `odeint` and `odeint_event`, checked: a mistake is an error that names argument, value, remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .arguments import as_number, count_steps, finite_times, positive_step
from .gradients import Backprop, Continuous, Discrete, Symplectic
from .ordinary_problem import Accuracy, Split
from .schedules import Foreign, Revolve
from .schemes import METHODS
from .schemes.one_step import OneStep
from .schemes.ordinary import ODE_METHODS, one_step_method
from .sweeps.control import Limits, Tolerance
from .system.layout import StateLayout, describe
from .system.mass import Mass

Gradient = Discrete | Symplectic | Continuous | Backprop

# torchdiffeq's names beside ours
_LIMITS = {
    "first_step": "first_step",
    "min_step": "min_step",
    "max_step": "max_step",
    "max_num_steps": "max_num_steps",
    "safety": "safety",
    "ifactor": "grow",
    "dfactor": "shrink",
}
_NOT_IMPLEMENTED = ("norm", "step_t", "jump_t", "grid_points", "eps", "perturb", "interp", "grid_constructor", "dtype")


def check_ode_method(method: str | None) -> OneStep:
    """The one-step method of this name; None is dopri5, as in torchdiffeq."""
    name = "dopri5" if method is None else method
    if not isinstance(name, str) or name not in ODE_METHODS:
        hint = f"; {name!r} is a method of pfde.fdeint" if isinstance(name, str) and name in METHODS else ""
        raise ValueError(f"method must be one of {', '.join(ODE_METHODS)}, or 'petsc:...': got {method!r}{hint}")
    return one_step_method(name)


def check_monotone(t: Any) -> list[float]:
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


def check_pieces(times: list[float], step_size: float | None, scheme: OneStep) -> tuple[int, ...] | None:
    """How many equal steps there are between two output times, which are distinct; None for adaptive steps."""
    if step_size is None:
        return None if scheme.adaptive else (1,) * (len(times) - 1)
    h = positive_step(step_size)
    pieces = []
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
        pieces.append(m)
    count_steps(sum(pieces) * h, h)
    return tuple(pieces)


def check_tolerance(name: str, value: Any, layout: StateLayout, like: Tensor) -> Tolerance:
    """A tolerance: a number, or one for each entry of the flat state, (d,)."""
    if isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.dim() > 0):
        parts = value if isinstance(value, tuple | list) else (value,)
        if len(parts) != len(layout.shapes):
            raise ValueError(f"{name} must have one entry for each part of y0, {len(layout.shapes)}: got {len(parts)}")
        flat = [_spread(name, part, layout, i, like) for i, part in enumerate(parts)]
        result = torch.cat(flat)
        if not bool((result >= 0).all()):
            raise ValueError(f"{name} must not be negative: got {float(result.min()):g}")
        return result
    number = as_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative: got {number:g}")
    return number


def _spread(name: str, part: Any, layout: StateLayout, i: int, like: Tensor) -> Tensor:
    shape = layout.shapes[i]
    if not isinstance(part, Tensor):
        part = torch.tensor(as_number(f"an entry of {name}", part), dtype=torch.float64)
    value = part.detach().to(dtype=like.dtype, device=like.device)
    try:
        flat = value.expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to y0's shape {tuple(shape)}: got {tuple(value.shape)}") from None
    return flat.repeat_interleave(2) if layout.is_complex and layout.is_complex[i] else flat


def check_accuracy(rtol: Any, atol: Any, limits: Limits, layout: StateLayout, like: Tensor) -> Accuracy:
    """rtol and atol, not both zero."""
    accuracy = Accuracy(
        check_tolerance("rtol", rtol, layout, like), check_tolerance("atol", atol, layout, like), limits
    )
    if not bool(torch.as_tensor(accuracy.rtol).max() > 0) and not bool(torch.as_tensor(accuracy.atol).min() > 0):
        raise ValueError("rtol and atol must not both be 0: no step would be accepted")
    return accuracy


def take_options(
    options: Mapping[str, Any] | None, step_size: float | None, scheme: OneStep
) -> tuple[float | None, Limits, bool, dict[str, Any]]:
    """(step_size, limits of adaptive steps, whether a limit ends the solve, what is left for PETSc)."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping of names to values: got {type(options).__name__}")
    rest = dict(options or {})
    for name in _NOT_IMPLEMENTED:
        if name in rest:
            raise ValueError(
                f"options: {name!r} is not implemented: remove it (torchdiffeq's {name} has no counterpart)"
            )
    if "step_size" in rest:
        other = rest.pop("step_size")
        if step_size is not None and other != step_size:
            raise ValueError(f"step_size is given twice: step_size={step_size}, options={{'step_size': {other}}}")
        step_size = other
    adaptive = scheme.adaptive and step_size is None
    on_limit = rest.pop("on_limit", "raise")
    if on_limit not in ("raise", "return"):
        raise ValueError(f"options: 'on_limit' must be 'raise' or 'return': got {on_limit!r}")
    found: dict[str, Any] = {}
    for name, ours in _LIMITS.items():
        if name in rest:
            value = rest.pop(name)
            if not adaptive:
                raise ValueError(
                    f"options: {name!r} does not apply to fixed steps (method {scheme.name!r}, step_size={step_size}): "
                    "remove it"
                )
            found[ours] = None if name == "first_step" and value is None else as_number(f"options: {name!r}", value)
    if "on_limit" in (options or {}) and not adaptive:
        raise ValueError(f"options: 'on_limit' does not apply to fixed steps (method {scheme.name!r}): remove it")
    if "max_num_steps" in found:
        count = found["max_num_steps"]
        if not (math.isfinite(count) and count == int(count)):
            raise ValueError(f"options: 'max_num_steps' must be a whole number: got {count:g}")
        found["max_num_steps"] = int(count)
    limits = Limits(**found)
    _check_limits(limits)
    return step_size, limits, on_limit == "return", rest


def _check_limits(limits: Limits) -> None:
    positive = {"max_step": limits.max_step, "max_num_steps": limits.max_num_steps, "safety": limits.safety}
    if limits.first_step is not None:
        positive["first_step"] = limits.first_step
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"options: {name!r} must be positive: got {value:g}")
    if not 0 <= limits.min_step <= limits.max_step:
        raise ValueError(f"options: 'min_step' must be in [0, max_step={limits.max_step:g}]: got {limits.min_step:g}")
    if limits.first_step is not None and limits.first_step < limits.min_step:
        raise ValueError(
            f"options: 'first_step' must not be below min_step={limits.min_step:g}: got {limits.first_step:g}"
        )
    if not 0 < limits.shrink < 1:
        raise ValueError(f"options: 'dfactor' must be in (0, 1): got {limits.shrink:g}")
    if not limits.grow > 1:
        raise ValueError(f"options: 'ifactor' must be above 1: got {limits.grow:g}")


def check_ode_gradient(gradient: Any, scheme: OneStep, pieces: tuple[int, ...] | None) -> Gradient:
    """How the solve is differentiated."""
    if gradient is None:
        return Discrete()
    if not isinstance(gradient, Discrete | Symplectic | Continuous | Backprop):
        raise TypeError(
            "gradient must be pfde.Discrete(), pfde.Symplectic(), pfde.Continuous() or pfde.Backprop(): got "
            f"{gradient!r}"
        )
    if isinstance(gradient, Continuous):
        _check_continuous(gradient)
    if pieces is None and isinstance(gradient, Discrete):
        plan = gradient.plan
        if isinstance(plan, Foreign) or (isinstance(plan, Revolve) and plan.snapshots is None):
            raise ValueError(
                f"schedule={gradient.schedule!r} needs to know the number of steps, which adaptive steps do not: use "
                "pfde.Online(snapshots=...), or fixed steps by step_size"
            )
    return gradient


def _check_continuous(gradient: Continuous) -> None:
    for name in ("rtol", "atol", "step_size"):
        value = getattr(gradient, name)
        if value is not None and not as_number(f"gradient: {name}", value) >= 0:
            raise ValueError(f"gradient: {name} must not be negative: got {value:g}")
    if gradient.method is not None and check_ode_method(gradient.method).implicit:
        raise ValueError(f"gradient: method of the backward pass must be explicit: got {gradient.method!r}")


def check_split(func: Callable[..., Any], scheme: OneStep) -> None:
    """Raise TypeError where an implicit-explicit method has no two parts of f."""
    if scheme.split and not isinstance(func, Split):
        raise TypeError(
            f"method {scheme.name!r} needs func in two parts: give pfde.Split(stiff, nonstiff), or use another method"
        )


def check_mass(mass: Any, layout: StateLayout, like: Tensor, scheme: OneStep, adaptive: bool) -> Mass | None:
    """The mass matrix, (n, n) or its diagonal (n,), n the last dimension of y0."""
    if mass is None:
        return None
    if not isinstance(mass, Tensor):
        raise TypeError(f"mass must be a tensor: got {describe(mass)}")
    if not scheme.implicit or scheme.split:
        raise ValueError(
            f"mass does not apply to method {scheme.name!r}: use an implicit one, such as 'cn', 'beuler' or 'sdirk4'"
        )
    if adaptive:
        raise ValueError(
            f"mass needs fixed steps, as the error estimate of {scheme.name!r} would need its inverse: give step_size"
        )
    if mass.requires_grad:
        raise ValueError("mass requires a gradient, which is not implemented: pass mass.detach()")
    if layout.is_tuple or layout.is_complex or not layout.shapes[0]:
        raise ValueError("mass needs y0 to be one real tensor with at least one dimension")
    n = layout.shapes[0][-1]
    if tuple(mass.shape) not in ((n,), (n, n)):
        raise ValueError(f"mass must be ({n}, {n}) or ({n},), for the last dimension of y0: got {tuple(mass.shape)}")
    return Mass(mass.to(dtype=like.dtype, device=like.device))
