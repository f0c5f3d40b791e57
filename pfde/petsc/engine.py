"""The engine of PETSc's own integrators, the methods `petsc:...` of `odeint`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..solving.arguments import as_number, check_options, divided, monotone_times
from ..solving.autograd import solve_on_graph
from ..solving.engine import WHOLE_STATES, Engine, named, register
from ..solving.initial_value import draws_numbers
from ..solving.repeats import Repeats, distinct, require_entries, rest, rests
from ..solving.request import Request
from ..solving.stats import Solution, Stats
from ..system.layout import describe
from ..system.petsc_options import solver_options
from ..system.torch_function import TorchFunction
from .problem import PetscProblem
from .setting import PetscMethod, parse_method

_PREFIX = "petsc:"


@register
class PetscEngine(Engine):
    """PETSc's own integrators, differentiated by TSAdjoint."""

    function = "odeint"
    equation = "ordinary"

    @property
    def names(self) -> Sequence[str]:
        return (f"'{_PREFIX}...'",)

    def takes(self, method: object) -> bool:
        return isinstance(method, PetscMethod) or (isinstance(method, str) and method.startswith(_PREFIX))

    def check_method(self, method: Any) -> PetscMethod:
        return _method(method)

    def solve_event(self, request: Request, event: Any) -> tuple[Solution[Any], Any]:
        raise _refusal(request)

    def solve(self, request: Request) -> Solution[Any]:
        peers, grad = request.peers, torch.is_grad_enabled()
        options, repeats = peers.call(_check, request)
        peers.same({"options": options, "options_prefix": request.options_prefix})
        stats, still = Stats(_name(request)), rests(repeats, request.layout)
        own_options = solver_options(options, request.options_prefix, peers, private=True)
        with (
            nullcontext("") if still else own_options as prefix,
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
        ):
            flat = request.flat.clone() if request.flat.is_inference() else request.flat
            problem = peers.call(_prepare, request, repeats, flat, prefix, stats)
            needed = problem.needs_gradient(flat)
            peers.same(
                {
                    "t, with step_size": (problem.times, request.step_size, repeats.rows),
                    "rtol and atol": (problem.rtol, problem.atol),
                    "the dtype of y0": flat.dtype,
                    "the kind of device of y0": flat.device.type,
                    "torch.is_grad_enabled()": torch.is_grad_enabled(),
                    "whether y0 or a parameter requires a gradient": (needed, flat.requires_grad),
                }
            )
            _refuse_random_numbers(problem, flat)
            with problem.autocast.suspended():
                if still:
                    y = rest(flat, len(repeats.times), problem.parameters)
                elif needed:
                    y = solve_on_graph(problem, flat)
                else:
                    y = problem.integrate(flat)
        return Solution(request.t, problem.layout.finish(repeats.expand(y)), stats, "completed")


def _check(request: Request) -> tuple[dict[str, Any], Repeats]:
    """The options and the output times."""
    if request.mass is not None or request.gradient is not None:
        raise _refusal(request)
    return check_options(request.options), distinct(monotone_times(request.t))


def _prepare(request: Request, repeats: Repeats, flat: Tensor, prefix: str, stats: Stats) -> PetscProblem:
    """The problem that is asked for. Raises ValueError or TypeError. Not collective."""
    name = _name(request)
    method = _method(request.method)
    if not request.peers.alone:
        require_entries(request.layout, WHOLE_STATES)
    if request.moving is not None:
        raise ValueError(f"t requires a gradient, which method {name!r} does not have: pass t.detach()")
    if request.step_size is not None:
        divided(repeats.times, request.step_size)
    return PetscProblem(
        method=method,
        func=request.func,
        layout=request.layout,
        times=tuple(repeats.times),
        parameters=request.parameters,
        step_size=request.step_size,
        rtol=_one_number("rtol", request.rtol, name),
        atol=_one_number("atol", request.atol, name),
        options_prefix=prefix,
        peers=request.peers,
        stats=stats,
        dtype=flat.dtype,
        device=flat.device,
        autocast=request.autocast,
    )


def _refuse_random_numbers(problem: PetscProblem, y0: Tensor) -> None:
    """Raise ValueError where func draws any. Collective."""
    function = TorchFunction(
        problem.func,
        problem.layout,
        problem.parameters,
        y0.dtype,
        y0.device,
        None,
        problem.peers,
        autocast=problem.autocast,
    )
    draws = problem.peers.call(draws_numbers, problem.stats, function, y0, problem.times[0])
    if problem.peers.largest(int(draws)):
        raise ValueError(
            f"func draws random numbers, which method {problem.method.name!r} would draw anew at each of PETSc's "
            "calls: use a method of pfde's own, or draw the numbers outside func"
        )


def _method(method: Any) -> PetscMethod:
    return method if isinstance(method, PetscMethod) else parse_method(method)


def _name(request: Request) -> str:
    return str(named(request.method))


def _refusal(request: Request) -> ValueError:
    return ValueError(
        f"method {_name(request)!r} has no events, no mass and one gradient only, PETSc's: leave these out"
    )


def _one_number(name: str, value: Any, method: str) -> float:
    if isinstance(value, Tensor | Sequence) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise ValueError(f"{name} must be one number for method {method!r}: got {describe(value)}")
    return as_number(name, value)
