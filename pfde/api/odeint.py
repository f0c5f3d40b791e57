"""`odeint`: M y'(t) = f(t, y(t), theta), y(t_0) = y_0, M the identity unless `mass` is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..solving.engine import solve_as
from ..solving.gradients import Gradient
from . import engines as engines
from .opaque import opaque
from .types import Func, OrdinaryMethod, State


@opaque
def odeint(
    func: Func,
    y0: State,
    t: Tensor,
    *,
    method: OrdinaryMethod | None = "dopri5",
    rtol: float | Tensor | Sequence[Any] = 1e-7,
    atol: float | Tensor | Sequence[Any] = 1e-9,
    step_size: float | None = None,
    gradient: Gradient | None = None,
    params: Sequence[Tensor] | None = None,
    mass: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
    comm: Any | None = None,
) -> State:
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
        "esdirk4"; implicit-explicit: "ark2", "ark3", "ark4"; PETSc's own: "petsc:rk:5dp" and the like. docs/odes.md.
        Or a tableau of your own (`pfde.extend.Tableau`)
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
    y: State = solve_as(
        "odeint",
        func=func,
        y0=y0,
        t=t,
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
    return y
