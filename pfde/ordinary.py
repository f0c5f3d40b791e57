"""The torch door for ordinary equations: `odeint` and `odeint_event`. Check the arguments, hand over to autograd.

M y'(t) = f(t, y(t), theta),   y(t_0) = y_0          (M the identity unless `mass` is given)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    as_number,
    check_options,
    check_parameters,
    check_prefix,
    check_solver_options,
    check_state,
    check_surroundings,
)
from .autograd import Solve
from .continuous import ContinuousProblem
from .errors import StepLimitError
from .events import EventSearch
from .gradients import Backprop, Continuous, Discrete
from .initial_value import Solution, Stats, draws_numbers, look
from .native import NativeProblem
from .native_setting import parse_native
from .opaque import opaque
from .ordinary_arguments import (
    Gradient,
    check_accuracy,
    check_mass,
    check_monotone,
    check_ode_gradient,
    check_ode_method,
    check_pieces,
    check_split,
    take_options,
)
from .ordinary_problem import OrdinaryProblem
from .petsc_options import solver_options
from .repeats import Repeats, distinct, require_entries, rest, rests, slope_of, stay
from .system.autocast import autocast_now
from .system.layout import describe
from .system.peers import CALL, Peers
from .system.torch_function import TorchFunction

Func = Callable[[Tensor, Any], Any]
_WHERE = "on every rank of comm; leave ranks without a part of the state out of comm"


@opaque
def odeint(
    func: Func,
    y0: Any,
    t: Tensor,
    *,
    method: str | None = "dopri5",
    rtol: float | Tensor | Sequence[Any] = 1e-7,
    atol: float | Tensor | Sequence[Any] = 1e-9,
    step_size: float | None = None,
    gradient: Gradient | None = None,
    params: Sequence[Tensor] | None = None,
    mass: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
    comm: Any | None = None,
) -> Any:
    """Integrate y' = func(t, y), y(t[0]) = y0, differentiably; torchdiffeq's calls work as they are.

    Parameters
    ----------
    func : nn.Module or callable, (t, y) -> dy of y's shape and dtype; t is a 0-d tensor of y's real dtype.
        `pfde.Split(stiff, nonstiff)` for ark2, ark3, ark4
    y0 : tensor, float32 or float64 or complex, of any shape; or a tuple of tensors
    t : (T,) increasing or decreasing output times; may require a gradient, in all its entries. A repeated time is one
        more output there, and no step
    method : explicit: "euler", "midpoint", "heun2", "ralston", "bosh3", "rk4" (the 3/8 rule), "rk4_classic",
        "fehlberg", "dopri5", "tsit5", "dopri8"; implicit: "beuler", "cn", "implicit_midpoint", "sdirk4", "esdirk3",
        "esdirk4"; implicit-explicit: "ark2", "ark3", "ark4"; PETSc's own: "petsc:rk:5dp" and the like. docs/odes.md
    rtol, atol : tolerances of adaptive steps: numbers, tensors that broadcast to y0, or one for each part of a tuple
    step_size : fixed steps of this length, of which every interval of t has a whole number. None: adaptive steps for a
        method with an embedded pair (bosh3, fehlberg, dopri5, tsit5, dopri8, sdirk4, esdirk3, esdirk4, ark2, ark3,
        ark4), with the outputs on the dense output; else t itself is the grid
    gradient : `pfde.Discrete()` (default), `pfde.Symplectic()`, `pfde.Continuous()`, `pfde.Backprop()`. Adaptive steps
        are frozen: the gradient is that of the solution on the steps taken, which move with t[0] and t[-1]
    params : tensors that func uses and that are to get a gradient, beyond those of an nn.Module
    mass : M of M y' = func(t, y), for implicit methods on fixed steps: (n, n) or its diagonal (n,), n the last
        dimension of y0; singular for an index-1 differential-algebraic equation with consistent y0
    options : torchdiffeq's "step_size", "first_step", "min_step", "max_step", "max_num_steps", "safety", "ifactor",
        "dfactor"; "on_limit": "return", for `solve` to return what was reached instead of raising StepLimitError;
        and PETSc options of an implicit method's solvers, such as "snes_rtol", and "fde_jacobian" (see `fdeint`)
    options_prefix : PETSc options prefix of this solve's TS, SNES and KSP
    comm : mpi4py communicator of the ranks that share one state, as in `fdeint`; error norms are over all ranks

    Returns
    -------
    (T, *y0.shape) tensor, y0 first, on the graph of y0, t and the parameters; a tuple of such for a tuple y0

    Raises
    ------
    ValueError, TypeError : a mistake in the arguments, or what func returns
    pfde.StepLimitError : adaptive steps became too small (where func is NaN or inf, for one) or too many
    pfde.NonFiniteError : func returned NaN or inf, with fixed steps
    pfde.ConvergenceError : an implicit stage or its adjoint did not converge
    pfde.PeerError : another rank of comm failed

    Examples
    --------
    >>> y = pfde.odeint(model, y0, torch.linspace(0, 1, 11), method="dopri5", rtol=1e-6, atol=1e-8)
    >>> y[-1].square().mean().backward()
    """
    Peers(comm).same({CALL: "odeint"})
    return solve_ode(
        func,
        y0,
        t,
        method=method,
        rtol=rtol,
        atol=atol,
        step_size=step_size,
        gradient=gradient,
        params=params,
        mass=mass,
        options=options,
        options_prefix=options_prefix,
        comm=comm,
    ).y


def solve_ode(
    func: Func,
    y0: Any,
    t: Tensor,
    *,
    method: str | None = "dopri5",
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    step_size: float | None = None,
    gradient: Gradient | None = None,
    params: Sequence[Tensor] | None = None,
    mass: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
    comm: Any | None = None,
    event: EventSearch | None = None,
) -> Solution:
    """Integrate as `odeint` does and return a `Solution`; with `event`, up to it."""
    peers = Peers(comm)
    peers.same({"method": method})  # the ranks are to take the same path
    if isinstance(method, str) and method.startswith("petsc:"):
        error = None
        if event is not None or mass is not None or gradient is not None:
            error = ValueError(
                f"method {method!r} has no events, no mass and one gradient only, PETSc's: leave these out"
            )
        peers.agree(error)
        return _native(func, y0, t, method, rtol, atol, step_size, params, options, options_prefix, peers)

    def prepare() -> tuple[OrdinaryProblem, Repeats, Tensor, Tensor | None, dict[str, Any]]:
        check_surroundings()
        scheme = check_ode_method(method)
        layout, flat = check_state(y0)
        repeats = distinct(check_monotone(t))
        times = repeats.times
        if event is not None or not peers.alone:
            require_entries(layout, _WHERE if event is None else "to look for an event")
        size, limits, stop, rest = take_options(options, step_size, scheme)
        if event is not None:
            event.attach(layout, flat)
        pieces: tuple[int, ...] | None
        if event is not None and (size is not None or not scheme.adaptive):
            pieces = event.pieces(times, None if size is None else as_number("step_size", size))
        else:
            pieces = check_pieces(times, size, scheme)
        extra = check_options(rest)
        check_solver_options(extra, scheme)
        check_split(func, scheme)
        problem = OrdinaryProblem(
            scheme=scheme,
            times=tuple(times),
            pieces=pieces,
            gradient=check_ode_gradient(gradient, scheme, None if event is not None else pieces),
            accuracy=check_accuracy(rtol, atol, limits, layout, flat.detach()),
            mass=check_mass(mass, layout, flat.detach(), scheme, pieces is None),
            stop_at_limit=stop,
            watch=event,
            open_end=event is not None,
            layout=layout,
            func=func,
            parameters=check_parameters(func, params),
            peers=peers,
            options_prefix=check_prefix(options_prefix),
            stats=Stats(scheme.name),
            autocast=autocast_now(flat.device),
        )
        moving = t if isinstance(t, Tensor) and t.requires_grad else None
        if moving is not None and mass is not None and repeats.rows is not None:
            raise ValueError("t requires a gradient and has repeated times, which mass does not have: pass t.detach()")
        return problem, repeats, flat, moving, extra

    problem, repeats, flat, moving, extra = peers.call(prepare)
    needed, how = problem.needs_gradient(flat, moving), problem.gradient
    peers.same(
        {
            "method": problem.scheme.name,
            "t, with step_size": (problem.times, problem.pieces, repeats.rows, moving is None),
            "gradient": how.signature if isinstance(how, Discrete) else repr(how),
            "rtol and atol": [x for x in (rtol, atol) if isinstance(x, int | float)],
            "the dtype of y0": flat.dtype,
            "the kind of device of y0": flat.device.type,
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "whether y0, t or a parameter requires a gradient": (needed, flat.requires_grad, moving is not None),
            "options": (extra, problem.accuracy.limits),
            "options_prefix": options_prefix,
        }
    )
    if rests(repeats, problem.layout):
        y = stay(problem, problem.make_function(problem.func, flat, None, None), flat, repeats, (moving,))
    else:
        with solver_options(extra, options_prefix, peers) as prefix, problem.autocast.suspended():
            problem = replace(problem, private_prefix=prefix)
            try:
                y = _differentiable(problem, flat, None if moving is None else repeats.own(moving), needed)
            except StepLimitError as error:
                if isinstance(error.y, Tensor):
                    error.y = problem.layout.unflatten(error.y)
                raise
    y = repeats.expand(y)
    if moving is not None and torch.is_grad_enabled():
        y = repeats.move(y, moving, slope_of(problem.make_function(problem.func, flat, None, None)))
    limit = problem.found.get("limit")
    reached = t[: len(y)] if limit is not None else t
    return Solution(reached, problem.layout.finish(y), problem.stats, "completed" if limit is None else "limit")


def _differentiable(problem: OrdinaryProblem, y0: Tensor, t: Tensor | None, needed: bool) -> Tensor:
    """y at the output times, (T, d) or (T, *shape), with whatever graph is called for."""
    function = problem.make_function(problem.func, y0, None, None)
    if torch.is_grad_enabled():
        problem = look(problem, function, y0, problem.times[0])
    if not needed:
        looked = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():  # Newton's method needs graphs of its own
            y0 = y0.clone() if y0.is_inference() else y0
            if not looked:
                problem = look(problem, function, y0, problem.times[0])
            return problem.integrate(y0, None)[0]
    if isinstance(problem.gradient, Backprop):
        return problem.backprop(y0, t)
    solvable = ContinuousProblem(problem) if isinstance(problem.gradient, Continuous) else problem
    return Solve.apply(solvable, 2, y0, t, *problem.parameters)


def _native(
    func: Func,
    y0: Any,
    t: Any,
    method: str,
    rtol: Any,
    atol: Any,
    step_size: float | None,
    params: Sequence[Tensor] | None,
    options: Mapping[str, Any] | None,
    options_prefix: str,
    peers: Peers,
) -> Solution:
    """One of PETSc's own integrators."""

    def prepare() -> tuple[NativeProblem, Tensor]:
        check_surroundings()
        native = parse_native(method)
        layout, flat = check_state(y0)
        if not peers.alone:
            require_entries(layout, _WHERE)
        times = repeats.times
        if isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(f"t requires a gradient, which method {method!r} does not have: pass t.detach()")
        if step_size is not None:
            check_pieces(times, step_size, check_ode_method(None))
        flat = flat.clone() if flat.is_inference() else flat
        problem = NativeProblem(
            method=native,
            func=func,
            layout=layout,
            times=tuple(times),
            parameters=check_parameters(func, params),
            step_size=step_size,
            rtol=_one_number("rtol", rtol, method),
            atol=_one_number("atol", atol, method),
            options_prefix=prefix,
            peers=peers,
            stats=stats,
            dtype=flat.dtype,
            device=flat.device,
            autocast=autocast_now(flat.device),
        )
        return problem, flat

    stats, grad, extra = Stats(method), torch.is_grad_enabled(), peers.call(check_options, options)
    peers.call(check_prefix, options_prefix)
    peers.same({"options": extra, "options_prefix": options_prefix})
    repeats = distinct(peers.call(check_monotone, t))
    still = rests(repeats, peers.call(check_state, y0)[0])
    with (
        nullcontext("") if still else solver_options(extra, options_prefix, peers, private=True) as prefix,
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
    ):
        problem, flat = peers.call(prepare)
        layout, parameters = problem.layout, problem.parameters
        needed = problem.needs_gradient(flat)
        peers.same(
            {
                "t, with step_size": (problem.times, step_size, repeats.rows),
                "rtol and atol": (problem.rtol, problem.atol),
                "the dtype of y0": flat.dtype,
                "the kind of device of y0": flat.device.type,
                "torch.is_grad_enabled()": torch.is_grad_enabled(),
                "whether y0 or a parameter requires a gradient": (needed, flat.requires_grad),
            }
        )
        function = TorchFunction(
            func, layout, parameters, flat.dtype, flat.device, None, peers, autocast=problem.autocast
        )
        draws = peers.call(draws_numbers, stats, function, flat, problem.times[0])
        if peers.largest(int(draws)):
            raise ValueError(
                f"func draws random numbers, which method {method!r} would draw anew at each of PETSc's calls: use a "
                "method of pfde's own, or draw the numbers outside func"
            )
        with problem.autocast.suspended():
            if still:
                y = rest(flat, len(repeats.times), parameters)
            elif needed:
                y = Solve.apply(problem, 1, flat, *parameters)
            else:
                y = problem.integrate(flat)
    return Solution(t, layout.finish(repeats.expand(y)), stats, "completed")


def _one_number(name: str, value: Any, method: str) -> float:
    if isinstance(value, Tensor | Sequence) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise ValueError(f"{name} must be one number for method {method!r}: got {describe(value)}")
    return as_number(name, value)


@opaque
def odeint_event(
    func: Func,
    y0: Any,
    t0: float | Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    t_max: float | None = None,
    method: str | None = "dopri5",
    rtol: float | Tensor | Sequence[Any] = 1e-7,
    atol: float | Tensor | Sequence[Any] = 1e-9,
    step_size: float | None = None,
    gradient: Gradient | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
) -> tuple[Tensor, Any]:
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
    search = EventSearch(event_fn, t0, reverse_time=reverse_time, t_max=t_max)
    if isinstance(gradient, Continuous):
        raise ValueError("gradient=pfde.Continuous() has no events: use pfde.Discrete() or pfde.Symplectic()")
    solution = solve_ode(
        func,
        y0,
        search.times(y0),
        method=method,
        rtol=rtol,
        atol=atol,
        step_size=step_size,
        gradient=gradient,
        params=params,
        options=options,
        options_prefix=options_prefix,
        event=search,
    )
    return search.finish(solution.y)
