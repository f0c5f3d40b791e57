"""The arguments of one-step solves, checked: a mistake is an error that names argument, value, remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..schedules import Foreign, Revolve
from ..solving.arguments import as_number, divided
from ..solving.engine import names_of, other_function
from ..solving.gradients import Continuous, Discrete, Gradient, check_gradient
from ..system.layout import StateLayout, describe
from ..system.mass import Mass
from .control import Accuracy, Limits, Tolerance
from .methods import METHODS, OneStep, method_of
from .split import Split
from .tableaux import AdditiveTableau, Tableau

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


def check_method(method: Any) -> OneStep:
    """The one-step method of this name, of this tableau, or the method itself; None is dopri5, as in torchdiffeq."""
    if isinstance(method, OneStep):
        return method
    if isinstance(method, Tableau | AdditiveTableau):
        return method_of(method)
    name = "dopri5" if method is None else method
    if not isinstance(name, str) or name not in METHODS:
        other = other_function("odeint", method)
        hint = "" if other is None else f"; {method!r} is a method of pfde.{other}"
        raise ValueError(f"method must be one of {names_of('odeint')}: got {method!r}{hint}")
    return METHODS[name]


def check_steps_between(times: list[float], step_size: Any, scheme: OneStep) -> tuple[int, ...] | None:
    """How many equal steps there are between two output times, which are distinct; None for adaptive steps."""
    if step_size is None:
        return None if scheme.adaptive else (1,) * (len(times) - 1)
    return divided(times, step_size)


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
        flat: Tensor = value.expand(shape).reshape(-1)
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


def check_step_gradient(value: Any, steps_between: tuple[int, ...] | None) -> Gradient:
    """How the solve is differentiated."""
    gradient = check_gradient(value, "ordinary")
    if isinstance(gradient, Continuous):
        _check_continuous(gradient)
    if steps_between is None and isinstance(gradient, Discrete):
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
    if gradient.method is not None and check_method(gradient.method).implicit:
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
