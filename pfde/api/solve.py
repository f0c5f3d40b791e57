"""`solve`: by the methods of `fdeint` and of `odeint`, with what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ..caputo.history import History
from ..solving.engine import Engine, engine_of, named, names_of
from ..solving.gradients import Gradient
from ..solving.request import Request
from ..solving.stats import Solution
from ..system.peers import CALL, Peers
from . import engines as engines
from .opaque import opaque
from .types import Func, Method, State

LEAST_STEPS = 100  # where neither a step size nor a method says how many


@opaque
def solve(
    func: Func,
    y0: State,
    t: Tensor,
    alpha: Any = 1.0,
    *,
    method: Method | None = None,
    rtol: Any = None,
    atol: Any = None,
    step_size: float | None = None,
    gradient: Gradient | None = None,
    history: History | None = None,
    params: Sequence[Tensor] | None = None,
    mass: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
    comm: Any | None = None,
) -> Solution[State]:
    """Integrate as `fdeint` or `odeint` does and return a `Solution`: y with its times and what the solve cost.

    Arguments and errors are those of `fdeint` for its methods, with alpha = 1 by default, and those of `odeint` for
    the others, which need alpha = 1 and have no history. "euler" and "beuler" are taken as methods of `fdeint`, unless
    rtol, atol or mass, which only `odeint` has, are given.

    method : None chooses. For alpha = 1 without a history it is "dopri5", as in `odeint`; else "trapezoid", without
        step_size on the grid t with its intervals in equal parts, as many as make it 100 steps or more
    """
    chosen, least_steps = (method, 1) if method is not None else _choose(alpha, history)
    ordinary = {"rtol": rtol, "atol": atol, "mass": mass}
    given = {name: value for name, value in ordinary.items() if value is not None}
    peers = Peers(comm)
    peers.same({CALL: "solve", "method": named(chosen), "which of rtol, atol and mass are given": sorted(given)})
    engine = peers.call(engine_for, alpha, chosen, history, given)
    request = Request.together(
        func=func,
        y0=y0,
        t=t,
        alpha=alpha,
        method=chosen,
        step_size=step_size,
        gradient=gradient,
        history=history,
        params=params,
        options=options,
        options_prefix=options_prefix,
        comm=comm,
        least_steps=least_steps,
        **given,
    )
    return engine.solve(request)


def _choose(alpha: Any, history: Any) -> tuple[Method, int]:
    """The method where none is given, and in how many steps at least."""
    return ("dopri5", 1) if is_one(alpha) and history is None else ("trapezoid", LEAST_STEPS)


def is_one(alpha: Any) -> bool:
    """Whether alpha is the number 1."""
    return isinstance(alpha, Real) and bool(alpha == 1)


def engine_for(alpha: Any, method: Any, history: Any, given: Mapping[str, Any] | None = None) -> Engine:
    """The engine of a method of either function. Raises ValueError for arguments that do not go together.

    given : those that `odeint` alone has; a method that both functions have is taken as one of `odeint` with them
    """
    caputo, ordinary = engine_of("fdeint", method), engine_of("odeint", method)
    if ordinary.takes(method) and (given or not caputo.takes(method)):
        _require_ordinary(alpha, history, method)
        return ordinary
    for name in given or ():
        raise ValueError(f"{name} does not apply to method {method!r}: leave it out, or use a method of pfde.odeint")
    return caputo


def _require_ordinary(alpha: Any, history: Any, method: Any) -> None:
    """Raise ValueError unless alpha is the number 1 and no history is given."""
    if not is_one(alpha):
        value = "a tensor" if isinstance(alpha, Tensor) else f"{alpha!r}"
        raise ValueError(
            f"alpha must be the number 1 for method {method!r}, which is for ordinary equations: got {value}; use one "
            f"of {names_of('fdeint')}"
        )
    if history is not None:
        raise ValueError(f"history does not apply to method {method!r}, which has none: leave it out")
