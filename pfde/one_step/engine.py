"""The engine of one-step methods: from a request to a problem, and to its solution, with or without an event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import StepLimitError
from ..solving.arguments import as_number, check_options, check_solver_options, monotone_times
from ..solving.engine import WHOLE_STATES, Engine, register
from ..solving.execution import execute, require_same
from ..solving.gradients import Continuous
from ..solving.repeats import Repeats, distinct, require_entries, slope_of
from ..solving.request import Request
from ..solving.stats import Solution, Stats
from .arguments import (
    check_accuracy,
    check_mass,
    check_method,
    check_split,
    check_step_gradient,
    check_steps_between,
    take_options,
)
from .continuous import ContinuousProblem
from .events import Event, EventSearch
from .methods import METHODS, OneStep
from .problem import OrdinaryProblem
from .tableaux import AdditiveTableau, Tableau


class Prepared(NamedTuple):
    """A problem, with the inputs of its solve, its output times, and the search for an event."""

    problem: OrdinaryProblem
    t: Tensor | None
    repeats: Repeats
    options: dict[str, Any]
    search: EventSearch | None


@register
class OneStepEngine(Engine):
    """One-step methods of pfde's own."""

    function = "odeint"
    equation = "ordinary"

    @property
    def names(self) -> Sequence[str]:
        return tuple(METHODS)

    def takes(self, method: object) -> bool:
        return isinstance(method, OneStep | Tableau | AdditiveTableau) or (
            isinstance(method, str) and method in METHODS
        )

    def check_method(self, method: Any) -> OneStep:
        return check_method(method)

    def solve(self, request: Request) -> Solution[Any]:
        return _solve(request, request.peers.call(prepare, request, None))

    def solve_event(self, request: Request, event: Event) -> tuple[Solution[Any], EventSearch]:
        """The solution up to an event, and where that is. Collective."""
        prepared = request.peers.call(prepare, request, event)
        assert prepared.search is not None
        return _solve(request, prepared), prepared.search


def prepare(request: Request, event: Event | None) -> Prepared:
    """The problem that is asked for. Raises ValueError or TypeError. Not collective."""
    scheme = check_method(request.method)
    layout, flat = request.state
    repeats = distinct(monotone_times(request.t))
    times = repeats.times
    if event is not None or not request.peers.alone:
        require_entries(layout, WHOLE_STATES if event is None else "to look for an event")
    size, limits, stop, rest = take_options(request.options, request.step_size, scheme)
    search = None if event is None else EventSearch(event, layout, flat)
    steps_between: tuple[int, ...] | None
    if event is not None and (size is not None or not scheme.adaptive):
        times, steps_between = event.fixed_steps(times, None if size is None else as_number("step_size", size))
    else:
        steps_between = check_steps_between(times, size, scheme)
    options = check_options(rest)
    check_solver_options(options, scheme.name, implicit=scheme.implicit)
    check_split(request.func, scheme)
    problem = OrdinaryProblem(
        scheme=scheme,
        times=tuple(times),
        steps_between=steps_between,
        gradient=check_step_gradient(request.gradient, None if event is not None else steps_between),
        accuracy=check_accuracy(request.rtol, request.atol, limits, layout, flat.detach()),
        mass=check_mass(request.mass, layout, flat.detach(), scheme, steps_between is None),
        stop_at_limit=stop,
        terminal=search,
        open_end=event is not None,
        layout=layout,
        func=request.func,
        parameters=request.parameters,
        peers=request.peers,
        options_prefix=request.options_prefix,
        stats=Stats(scheme.name),
        autocast=request.autocast,
    )
    if request.moving is not None and request.mass is not None and repeats.rows is not None:
        raise ValueError("t requires a gradient and has repeated times, which mass does not have: pass t.detach()")
    t = None if request.moving is None else repeats.own(request.moving)
    return Prepared(problem, t, repeats, options, search)


def _solve(request: Request, prepared: Prepared) -> Solution[Any]:
    problem, t, repeats, options, _ = prepared
    flat, tolerances = request.flat, (request.rtol, request.atol)
    require_same(
        request,
        problem,
        options,
        {
            "method": problem.scheme.name,
            "t, with step_size": (problem.times, problem.steps_between, repeats.rows, t is None),
            "rtol and atol": [x for x in tolerances if isinstance(x, int | float)],
            "whether y0, t or a parameter requires a gradient": (
                problem.needs_gradient(flat, t),
                flat.requires_grad,
                t is not None,
            ),
            "options": (options, problem.accuracy.limits),
        },
    )
    solvable = ContinuousProblem if isinstance(problem.gradient, Continuous) else None
    try:
        y = execute(problem, flat, (t,), repeats, options, solvable=solvable)
    except StepLimitError as error:
        if isinstance(error.y, Tensor):
            error.y = problem.layout.unflatten(error.y)
        raise
    complete = len(y) == len(repeats.times)
    y = repeats.expand(y)
    if request.moving is not None and torch.is_grad_enabled():
        y = repeats.move(y, request.moving, slope_of(problem.function(flat)))
    reached = request.t if complete else request.t[: len(y)]
    return Solution(reached, problem.layout.finish(y), problem.stats, "completed" if complete else "limit")
