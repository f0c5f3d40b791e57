"""The torch door: `fdeint` and `solve`. Check the arguments, choose, hand over to autograd.

D^alpha y(t) = f(t, y(t), theta),   y(t_0) = y_0,   0 < alpha <= 1   (Caputo; alpha = 1 is an ODE)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    check_alpha,
    check_ends,
    check_grid,
    check_history,
    check_kind,
    check_method,
    check_options,
    check_parameters,
    check_prefix,
    check_solver_options,
    check_state,
    check_surroundings,
    check_times,
)
from .autograd import Solve
from .gradients import Backprop, Continuous, Discrete, Symplectic
from .history import Bounded, Exact
from .initial_value import Solution, Stats, look
from .opaque import opaque
from .ordinary import solve_ode
from .petsc_options import solver_options
from .problem import Problem
from .repeats import Repeats, check_rest, distinct, require_entries, rests, stay
from .schemes import METHODS
from .schemes.ordinary import ODE_METHODS
from .system.autocast import autocast_now
from .system.peers import CALL, Peers

LEAST_STEPS = 100  # where neither a step size nor a method says how many


@opaque
def fdeint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    alpha: Any,
    *,
    method: str = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | Backprop | None = None,
    history: Exact | Bounded | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
    comm: Any | None = None,
) -> Any:
    """Integrate the Caputo equation D^alpha y = func(t, y), y(t[0]) = y0, differentiably.

    Parameters
    ----------
    func : nn.Module or callable, (t, y) -> dy of y's shape and dtype; t is a 0-d tensor of y's dtype
    y0 : tensor, float32 or float64, of any shape; or a tuple of tensors
    t : (T,) increasing output times; t[0] is the Caputo base point. A repeated time is one more output there, and no
        step. Where t requires a gradient, the uniform grid moves with its ends: t[0] and t[-1] carry all of it
    alpha : order in (0, 1]: a number, a 0-d tensor, or a tensor that broadcasts to y0 (one order a component), or an
        array or a sequence of numbers in place of one; a tensor may require a gradient
    method : "euler", "pece" (explicit); "beuler", "trapezoid", "gl", "l1", "bdf2" (implicit); see docs/methods.md
    step_size : uniform step; every t[i] - t[0] must be a whole number of steps. None: t itself is the grid, which may
        be nonuniform (`pfde.graded`) for "euler", "pece", "beuler" and "trapezoid"
    gradient : `pfde.Discrete()` (default) or `pfde.Backprop()`
    history : how the memory term is evaluated: `pfde.Exact()`; `pfde.SumOfExponentials(tolerance)`, O(1) memory and
        work a step; `pfde.ShortMemory(length)`; None takes the cheaper of the first two, at rounding level
        (`Solution.stats` says which, and why)
    params : tensors that func uses and that are to get a gradient, beyond those of an nn.Module
    options : PETSc options of this solve, such as {"snes_rtol": 1e-8, "ksp_type": "bcgs"}; and "fde_jacobian", how the
        Newton matrix is treated: "auto", "matrix_free", "dense", or "blocks" (independent systems along dimension 0)
    options_prefix : PETSc options prefix of this solve's TS, SNES and KSP
    comm : mpi4py communicator of the ranks that share one state, each holding a part of it as its y0; None: this rank
        alone. With it, forward and backward are collective, and gradients of parameters are this rank's contributions

    Returns
    -------
    (T, *y0.shape) tensor, y0 first, on y0's graph; a tuple of such for a tuple y0

    Raises
    ------
    ValueError, TypeError : a mistake in the arguments, or what func returns
    pfde.NonFiniteError : func returned NaN or inf
    pfde.ConvergenceError : an implicit step or its adjoint did not converge
    pfde.PeerError : another rank of comm failed

    Whatever func raises comes out as it was raised.

    Examples
    --------
    >>> y = pfde.fdeint(model, y0, torch.linspace(0, 1, 101), 0.7)
    >>> y[-1].square().mean().backward()
    """
    Peers(comm).same({CALL: "fdeint"})
    return solve_history(
        func, y0, t, alpha, method, step_size, gradient, history, params, options, options_prefix, comm
    ).y


@opaque
def solve(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    alpha: Any = 1.0,
    *,
    method: str | None = None,
    rtol: Any = None,
    atol: Any = None,
    step_size: float | None = None,
    gradient: Discrete | Symplectic | Continuous | Backprop | None = None,
    history: Exact | Bounded | None = None,
    params: Sequence[Tensor] | None = None,
    mass: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
    comm: Any | None = None,
) -> Solution:
    """Integrate as `fdeint` or `odeint` does and return a `Solution`: y with its times and what the solve cost.

    Arguments and errors are those of `fdeint` for its methods, with alpha = 1 by default, and those of `odeint` for
    the others, which need alpha = 1 and have no history. "euler" and "beuler" are taken as methods of `fdeint`, unless
    rtol, atol or mass, which only `odeint` has, are given.

    method : None chooses. For alpha = 1 without a history it is "dopri5", as in `odeint`; else "trapezoid", without
        step_size on the grid t with its intervals in equal parts, as many as make it 100 steps or more
    """
    least = 1
    if method is None:
        method, least = ("dopri5", 1) if is_one(alpha) and history is None else ("trapezoid", LEAST_STEPS)
    ordinary = {"rtol": rtol, "atol": atol, "mass": mass}
    given = {name: value for name, value in ordinary.items() if value is not None}
    peers = Peers(comm)
    peers.same({CALL: "solve", "method": method, "which of rtol, atol and mass are given": sorted(given)})
    if not peers.call(_is_for_odeint, alpha, method, history, given):
        return solve_history(
            func, y0, t, alpha, method, step_size, gradient, history, params, options, options_prefix, comm, least
        )
    return solve_ode(
        func,
        y0,
        t,
        method=method,
        step_size=step_size,
        gradient=gradient,
        params=params,
        options=options,
        options_prefix=options_prefix,
        comm=comm,
        **given,
    )


@opaque
def solve_history(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    alpha: Any,
    method: str,
    step_size: float | None,
    gradient: Any,
    history: Exact | Bounded | None,
    params: Sequence[Tensor] | None,
    options: Mapping[str, Any] | None,
    options_prefix: str,
    comm: Any | None,
    least: int = 1,
) -> Solution:
    """A solve by a method with a history, in at least so many steps where step_size is None."""
    peers = Peers(comm)

    def prepare() -> tuple[Problem, Repeats, Tensor, Tensor, Tensor | None, dict[str, Any]]:
        check_surroundings()
        scheme = check_method(method)
        layout, flat = check_state(y0)
        times = check_times(t)
        repeats = distinct(times)
        check_rest(repeats, len(times), t)
        grid, outputs = check_grid(repeats.times, step_size, scheme, least)
        if not peers.alone:
            require_entries(layout, "on every rank of comm; leave ranks without a part of the state out of comm")
        order, group = check_alpha(alpha, layout, flat.device)
        parameters = check_parameters(func, params)
        how = check_kind("gradient", gradient, (Discrete, Backprop), Discrete())
        past = check_history(history, grid)
        stats = Stats(scheme.name)
        prefix = check_prefix(options_prefix)
        problem = Problem(
            scheme=scheme,
            grid=grid,
            outputs=outputs,
            history=past,
            gradient=how,
            group=group,
            layout=layout,
            func=func,
            parameters=parameters,
            peers=peers,
            options_prefix=prefix,
            stats=stats,
            autocast=autocast_now(flat.device),
        )
        extra = check_options(options)
        check_solver_options(extra, scheme)
        return problem, repeats, order, flat, check_ends(t, grid), extra

    problem, repeats, order, flat, ends, extra = peers.call(prepare)
    needed = problem.needs_gradient(order, flat, ends)
    peers.same(
        {
            "method": problem.scheme.name,
            "t, with step_size": (problem.grid, problem.outputs, repeats.rows),
            "gradient": problem.gradient.signature if isinstance(problem.gradient, Discrete) else "Backprop",
            "history": problem.history,
            "the dtype of y0": flat.dtype,
            "the kind of device of y0": flat.device.type,
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "whether y0, alpha or a parameter requires a gradient": (needed, flat.requires_grad, order.requires_grad),
            "whether t requires a gradient": ends is not None,
            "options": extra,
            "options_prefix": options_prefix,
        }
    )
    if rests(repeats, problem.layout):
        y = stay(problem, problem.function(flat), flat, repeats, (order, ends))
    else:
        with solver_options(extra, options_prefix, peers) as prefix, problem.autocast.suspended():
            problem = replace(problem, private_prefix=prefix)
            y = _differentiable(problem, order, flat, ends, needed)
    return Solution(t, problem.layout.finish(repeats.expand(y)), problem.stats, "completed")


def _differentiable(problem: Problem, alpha: Tensor, y0: Tensor, ends: Tensor | None, needed: bool) -> Tensor:
    """y at the output steps, (T, d) or (T, *shape), with whatever graph is called for."""
    if torch.is_grad_enabled():
        problem = look(problem, problem.function(y0), y0, problem.grid.t0)
    if not needed:
        looked = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():  # Newton's method needs graphs of its own
            alpha, y0 = (x.clone() if x.is_inference() else x for x in (alpha, y0))
            if not looked:
                problem = look(problem, problem.function(y0), y0, problem.grid.t0)
            return problem.integrate(alpha, y0, None)[0]
    if isinstance(problem.gradient, Backprop):
        return problem.backprop(alpha, y0, ends)
    return Solve.apply(problem, 3, alpha, y0, ends, *problem.parameters)


def is_one(alpha: Any) -> bool:
    """Whether alpha is the number 1."""
    return isinstance(alpha, Real) and bool(alpha == 1)


def is_ordinary(method: Any, given: Mapping[str, Any] | None = None) -> bool:
    """Whether the method is taken as one of `odeint`, where these arguments of it are given."""
    if not isinstance(method, str):
        return False
    return method.startswith("petsc:") or (method in ODE_METHODS and (method not in METHODS or bool(given)))


def _is_for_odeint(alpha: Any, method: Any, history: Any, given: Mapping[str, Any]) -> bool:
    """Whether `odeint` is to do it. Raises ValueError for arguments that do not go together."""
    if is_ordinary(method, given):
        require_ordinary(alpha, history, method)
        return True
    for name in given:
        raise ValueError(f"{name} does not apply to method {method!r}: leave it out, or use a method of pfde.odeint")
    return False


def require_ordinary(alpha: Any, history: Any, method: str) -> None:
    """Raise ValueError unless alpha is the number 1 and no history is given."""
    if not is_one(alpha):
        value = "a tensor" if isinstance(alpha, Tensor) else f"{alpha!r}"
        raise ValueError(
            f"alpha must be the number 1 for method {method!r}, which is for ordinary equations: got {value}; use one "
            f"of {', '.join(METHODS)}"
        )
    if history is not None:
        raise ValueError(f"history does not apply to method {method!r}, which has none: leave it out")
