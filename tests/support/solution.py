"""A `Solution` of a method of `odeint`, also where `solve` would take its name as one of `fdeint`."""

from pfde.api.engines import OneStepEngine
from pfde.solving.engine import ENGINES, engine_of
from pfde.solving.request import Request


def solve_ode(func, y0, t, *, method="dopri5", **keywords):
    """What `odeint` returns as y, with what it cost."""
    assert any(isinstance(engine, OneStepEngine) for engine in ENGINES)
    return engine_of("odeint", method).solve(Request.together(func=func, y0=y0, t=t, method=method, **keywords))
