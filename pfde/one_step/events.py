"""Terminal events of an ordinary equation: where one entry of g(t, y(t)) first changes its sign.

A step over whose ends the sign changes is bisected on its dense output. The event's time t* is a function of all that y
depends on, by g(t*, y(t*)) = 0 (implicit function theorem): with y' the derivative of the dense output at t*,

    dt* = -dg|_{t*} / (g_t + g_y . y'),    dy(t*) = dy|_{t*} + y' dt*

where d.|_{t*} is the change at a fixed time, of the solution on the steps taken. One Newton step for t*, whose value is
nothing but whose graph is this formula, brings it to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PfdeError
from ..solving.arguments import as_number, count_steps, positive_step
from ..system.autocast import autocast_now
from ..system.layout import StateLayout, describe
from .methods.base import Interval

_FIXED_STEPS = 10**6  # without t_max
_FAR, _FAR_SINGLE = 1e300, 1e30


class Event:
    """An event that is looked for.

    Parameters
    ----------
    event_fn : (t, y) -> tensor
    t0 : where the solve starts
    reverse_time : towards smaller times
    t_max : where to give up
    """

    def __init__(
        self, event_fn: Callable[[Tensor, Any], Tensor], t0: Any, *, reverse_time: bool, t_max: float | None
    ) -> None:
        if not callable(event_fn):
            raise TypeError(f"event_fn must be callable as event_fn(t, y): got {type(event_fn).__name__}")
        if not isinstance(t0, Tensor):
            t0 = torch.tensor(as_number("t0", t0), dtype=torch.float64)
        if t0.numel() != 1 or not t0.dtype.is_floating_point:
            raise ValueError(f"t0 must be a number or a 0-d floating-point tensor: got {describe(t0)}")
        self.t0, self.direction = t0.reshape(()), -1.0 if reverse_time else 1.0
        self.event_fn, self.t_max = event_fn, None if t_max is None else as_number("t_max", t_max)
        start = float(t0.detach())
        if not math.isfinite(start):
            raise ValueError(f"t0 must be finite: got {start}")
        if self.t_max is not None and not (self.t_max - start) * self.direction > 0:
            where = "below" if reverse_time else "above"
            raise ValueError(f"t_max must be {where} t0={start:g}: got {self.t_max:g}")

    def times(self, y0: Any) -> Tensor:
        """t0, on its graph, and the time at which to give up; (2,) float64."""
        parts = y0 if isinstance(y0, tuple | list) else (y0,)
        double = all(isinstance(part, Tensor) and part.dtype.to_real() == torch.float64 for part in parts)
        far = self.direction * (_FAR if double else _FAR_SINGLE) if self.t_max is None else self.t_max
        start = self.t0.double()
        if not (far - float(start.detach())) * self.direction > 0:
            raise ValueError(
                f"t_max must be given for t0={float(start.detach()):g}, beyond where a search without it ends, {far:g}"
            )
        return torch.stack([start, start.new_tensor(far)])

    def fixed_steps(self, times: Sequence[float], step_size: float | None) -> tuple[list[float], tuple[int, ...]]:
        """t0 and the time at which to give up, a whole number of steps off, and how many steps there may be."""
        if step_size is None:
            raise ValueError("step_size must be given for a method without adaptive steps, to look for an event")
        h = positive_step(step_size)
        start, far = times
        steps = _FIXED_STEPS
        if self.t_max is not None:
            steps = max(1, math.ceil(count_steps(far - start, h) * (1 - 1e-12)))
        far = start + self.direction * steps * h
        if not math.isfinite(far - start) or far == start:
            raise ValueError(
                f"step_size={h:g} is too {'small' if far == start else 'large'} for t0={start:g} in "
                f"float64: {steps} steps, the most that are taken, end at {far:g}"
            )
        return [start, far], (steps,)


class EventSearch:
    """The search for an event in one solve: `forward.Terminal`.

    event : what is looked for
    layout : of the state
    like : a state, for its dtype and device
    """

    def __init__(self, event: Event, layout: StateLayout, like: Tensor) -> None:
        self._event, self._layout = event, layout
        self._like, self._autocast = like.detach(), autocast_now(like.device)
        self._signs: Tensor | None = None
        self._entry = 0
        self._rate: Tensor | None = None
        self.time: float | None = None

    # -- during the solve ----------------------------------------------------------------------------------------

    def crossed(self, at: Interval, y: Tensor, y1: Tensor) -> bool:
        """Whether a sign changes over this step, from y to y1."""
        if self._signs is None:
            self._signs = self._values(float(at.t), y).sign()
        new = self._values(float(at.t1), y1).sign()
        if bool(((self._signs != 0) & (new != self._signs)).any()):
            return True
        self._signs = new
        return False

    def locate(self, at: Interval, dense: Callable[[float, int], Tensor]) -> float:
        """The time of the event in a step that crosses it; dense(theta, k) is y or, k = 1, its derivative in theta."""
        assert self._signs is not None
        signs, low, high = self._signs, 0.0, 1.0
        while low < (middle := 0.5 * (low + high)) < high:
            new = self._values(at.t + middle * at.h, dense(middle, 0)).sign()
            if bool(((signs != 0) & (new != signs)).any()):
                high = middle
            else:
                low = middle
        t = float(at.t1) if high == 1.0 else float(at.t + high * at.h)
        new = self._values(t, dense(high, 0)).sign()
        crossed = torch.nonzero((signs != 0) & (new != signs)).flatten()
        self._entry = int(crossed[0]) if len(crossed) else 0
        self._rate, self.time = dense(high, 1) / at.h, t
        return t

    def _values(self, t: float, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self._call(torch.full((), t, dtype=y.dtype, device=y.device), self._layout.unflatten(y))

    def _call(self, t: Tensor, y: Any) -> Tensor:
        with self._autocast.active():
            value = self._event.event_fn(t, y)
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point or value.numel() == 0:
            raise TypeError(f"event_fn must return a real floating-point tensor: got {describe(value)}")
        if not bool(torch.isfinite(value.detach()).all()):
            raise PfdeError(f"event_fn returned NaN or inf at t={float(t):.6g}: check it and the solution there")
        return value.reshape(-1)

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def finish(self, y: Any) -> tuple[Tensor, Any]:
        """(t*, y at t0 and t*) with their graphs, from y on the frozen steps. Raises PfdeError without an event."""
        event = self._event
        if self.time is None or self._rate is None:
            raise PfdeError(
                f"no event up to t={event.t_max if event.t_max is not None else 'the last step'}: move t_max, or check "
                "the sign of event_fn"
            )
        t = torch.tensor(self.time, dtype=event.t0.dtype, device=event.t0.device)
        is_tuple = self._layout.is_tuple
        last = tuple(part[1] for part in y) if is_tuple else y[1]
        rate = self._layout.unflatten(self._rate)
        if torch.is_grad_enabled():
            t = self._moving(t, last, rate)
        if not t.requires_grad:
            return t, y

        def move(part: Tensor, rate: Tensor) -> Tensor:
            shift = (t - t.detach()).to(device=part.device, dtype=part.dtype.to_real())
            return torch.stack([part[0], part[1] + rate * shift])

        return t, (tuple(map(move, y, rate)) if is_tuple else move(y, rate))

    def _moving(self, t: Tensor, y: Any, rate: Any) -> Tensor:
        """t*, on the graph of all that the event depends on."""
        parts, rates = (y, rate) if self._layout.is_tuple else ((y,), (rate,))
        clock = t.to(self._like)

        def value(time: Tensor, parts: Any) -> Tensor:
            state = tuple(parts) if isinstance(y, tuple) else parts[0]
            return self._call(time, state)[self._entry]

        leaves = [clock.clone().requires_grad_(), *(part.detach().requires_grad_() for part in parts)]
        g = value(leaves[0], leaves[1:])
        slope = 0.0
        if g.requires_grad:
            bars = torch.autograd.grad(g, leaves, allow_unused=True)
            for bar, dot in zip(bars, (torch.ones_like(clock), *rates), strict=True):
                if bar is not None:
                    slope += float((bar.conj() * dot).real.sum() if bar.is_complex() else (bar * dot).sum())
        moving = value(clock, parts)
        if not moving.requires_grad:
            return t
        if slope == 0.0:
            raise PfdeError(
                f"the event at t={self.time:.6g} has no derivative: g_t + g_y . y' is 0 there (it touches zero, and "
                "does not cross it); detach y0 and the parameters, or choose another event_fn"
            )
        return t - ((moving - moving.detach()) / slope).to(t)
