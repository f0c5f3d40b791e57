"""The engine of Caputo equations: from a request to a problem, and to its solution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..solving.arguments import check_options, check_solver_options, increasing_times
from ..solving.engine import WHOLE_STATES, Engine, register
from ..solving.execution import execute, require_same
from ..solving.gradients import check_gradient
from ..solving.repeats import Repeats, check_rest, distinct, require_entries
from ..solving.request import Request
from ..solving.stats import Solution, Stats
from .arguments import check_alpha, check_ends, check_grid, check_history, check_method
from .problem import CaputoProblem
from .schemes import METHODS, Scheme


class Prepared(NamedTuple):
    """A problem, with the inputs of its solve and its output times."""

    problem: CaputoProblem
    alpha: Tensor
    ends: Tensor | None
    repeats: Repeats
    options: dict[str, Any]


@register
class CaputoEngine(Engine):
    """Schemes with a history."""

    function = "fdeint"
    equation = "caputo"

    @property
    def names(self) -> Sequence[str]:
        return tuple(METHODS)

    def takes(self, method: object) -> bool:
        return isinstance(method, Scheme) or (isinstance(method, str) and method in METHODS)

    def check_method(self, method: Any) -> Scheme:
        return check_method(method)

    def solve(self, request: Request) -> Solution[Any]:
        problem, alpha, ends, repeats, options = request.peers.call(prepare, request)
        flat = request.flat
        require_same(
            request,
            problem,
            options,
            {
                "method": problem.scheme.name,
                "t, with step_size": (problem.grid, problem.outputs, repeats.rows),
                "history": problem.history,
                "whether y0, alpha or a parameter requires a gradient": (
                    problem.needs_gradient(flat, alpha, ends),
                    flat.requires_grad,
                    alpha.requires_grad,
                ),
                "whether t requires a gradient": ends is not None,
            },
        )
        y = execute(problem, flat, (alpha, ends), repeats, options)
        return Solution(request.t, problem.layout.finish(repeats.expand(y)), problem.stats, "completed")


def prepare(request: Request) -> Prepared:
    """The problem that is asked for. Raises ValueError or TypeError. Not collective."""
    scheme = check_method(request.method)
    times = increasing_times(request.t)
    repeats = distinct(times)
    check_rest(repeats, len(times), request.t)
    grid, outputs = check_grid(repeats.times, request.step_size, scheme, request.least_steps)
    if not request.peers.alone:
        require_entries(request.layout, WHOLE_STATES)
    alpha, group = check_alpha(request.alpha, request.layout, request.flat.device)
    problem = CaputoProblem(
        scheme=scheme,
        grid=grid,
        outputs=outputs,
        history=check_history(request.history, grid),
        gradient=check_gradient(request.gradient, "caputo"),
        group=group,
        layout=request.layout,
        func=request.func,
        parameters=request.parameters,
        peers=request.peers,
        options_prefix=request.options_prefix,
        stats=Stats(scheme.name),
        autocast=request.autocast,
    )
    options = check_options(request.options)
    check_solver_options(options, scheme.name, implicit=scheme.implicit)
    return Prepared(problem, alpha, check_ends(request.t, grid), repeats, options)
