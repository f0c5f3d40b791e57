"""`odeint_event`: an ordinary equation up to an event."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..one_step.events import Event
from ..solving.engine import engine_of
from ..solving.gradients import Continuous, Gradient
from ..solving.request import Request
from . import engines as engines
from .opaque import opaque
from .types import Func, OrdinaryMethod, State


@opaque
def odeint_event(
    func: Func,
    y0: State,
    t0: float | Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    t_max: float | None = None,
    method: OrdinaryMethod | None = "dopri5",
    rtol: float | Tensor | Sequence[Any] = 1e-7,
    atol: float | Tensor | Sequence[Any] = 1e-9,
    step_size: float | None = None,
    gradient: Gradient | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
) -> tuple[Tensor, State]:
    """Integrate until event_fn(t, y) changes sign; return the time of the event and y at t0 and there.

    The event is terminal. It is located on the dense output of the step that brackets it, to rounding; the
    solution up to there is that of the steps taken, which are frozen, and the event's time depends on y0, t0 and the
    parameters (of func and of event_fn) through event_fn(t*, y(t*)) = 0:

        dt* = -(dg|_t*) / (g_t + g_y . y'(t*)),    y' the derivative of the dense output     (implicit function theorem)

    Parameters
    ----------
    event_fn : (t, y) -> tensor; the event is where one of its entries first changes its sign. Zero at t0 is no event
    reverse_time : integrate towards smaller times
    t_max : where to give up, beyond t0 in the direction of integration; None goes on until max_num_steps
    step_size : fixed steps of this length; needed where `odeint` would take t as the grid
    others : as in `odeint`; gradient may be Discrete, Symplectic or Backprop

    Returns
    -------
    (t*, y) : 0-d tensor of t0's dtype (float64 for a number), and (2, *y0.shape), a tuple of such for a tuple y0

    Raises ValueError and what `odeint` raises; pfde.PfdeError where t_max comes before the event.
    """
    event = Event(event_fn, t0, reverse_time=reverse_time, t_max=t_max)
    if isinstance(gradient, Continuous):
        raise ValueError("gradient=pfde.Continuous() has no events: use pfde.Discrete() or pfde.Symplectic()")
    request = Request(
        func=func,
        y0=y0,
        t=event.times(y0),
        method=method,
        rtol=rtol,
        atol=atol,
        step_size=step_size,
        gradient=gradient,
        params=params,
        options=options,
        options_prefix=options_prefix,
    )
    solution, search = engine_of("odeint", method).solve_event(request, event)
    found: tuple[Tensor, State] = search.finish(solution.y)
    return found
