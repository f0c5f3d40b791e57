"""`fdeint`: D^alpha y(t) = f(t, y(t), theta), y(t_0) = y_0, 0 < alpha <= 1 (Caputo; alpha = 1 is an ODE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..caputo.history import History
from ..solving.engine import solve_as
from ..solving.gradients import Backprop, Discrete
from . import engines as engines
from .opaque import opaque
from .types import CaputoMethod, Func, State


@opaque
def fdeint(
    func: Func,
    y0: State,
    t: Tensor,
    alpha: Any,
    *,
    method: CaputoMethod = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | Backprop | None = None,
    history: History | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    options_prefix: str = "",
    comm: Any | None = None,
) -> State:
    """Integrate the Caputo equation D^alpha y = func(t, y), y(t[0]) = y0, differentiably.

    Parameters
    ----------
    func : nn.Module or callable, (t, y) -> dy of y's shape and dtype; t is a 0-d tensor of y's dtype
    y0 : tensor, float32 or float64, of any shape; or a tuple of tensors
    t : (T,) increasing output times; t[0] is the Caputo base point. A repeated time is one more output there, and no
        step. Where t requires a gradient, the uniform grid moves with its ends: t[0] and t[-1] carry all of it
    alpha : order in (0, 1]: a number, a 0-d tensor, or a tensor that broadcasts to y0 (one order a component), or an
        array or a sequence of numbers in place of one; a tensor may require a gradient
    method : "euler", "pece" (explicit); "beuler", "trapezoid", "gl", "l1", "bdf2" (implicit); see docs/methods.md. Or a
        scheme of your own (`pfde.extend.Scheme`)
    step_size : uniform step; every t[i] - t[0] must be a whole number of steps. None: t itself is the grid, which may
        be nonuniform (`pfde.graded`) for "euler", "pece", "beuler" and "trapezoid"
    gradient : `pfde.Discrete()` (default) or `pfde.Backprop()`
    history : how the memory term is evaluated: `pfde.Exact()`; `pfde.SumOfExponentials(tolerance)`, O(1) memory and
        work a step; `pfde.ShortMemory(length)`; one of your own (`pfde.extend.Bounded`); None takes the cheaper of the
        first two, at rounding level (`Solution.stats` says which, and why)
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
    y: State = solve_as(
        "fdeint",
        func=func,
        y0=y0,
        t=t,
        alpha=alpha,
        method=method,
        step_size=step_size,
        gradient=gradient,
        history=history,
        params=params,
        options=options,
        options_prefix=options_prefix,
        comm=comm,
    ).y
    return y
