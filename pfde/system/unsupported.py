"""What a PETSc TS can be given that the steps D^alpha u = G(t, u) have no place for: refused, not ignored.

The right-hand side is the RHSFunction alone. The history knows all steps from the base point on, on one uniform grid,
so a step can be neither cut nor undone, which PETSc needs for events and for output times of its own.
"""

from __future__ import annotations

from typing import Any

from .start import PETSc

_USER_ERROR = 83  # PETSC_ERR_USER: a TS without any function
_INSTEAD = "write the equation as D^alpha u = G(t, u), with G in ts.setRHSFunction and dG/du in ts.setRHSJacobian"
_CALLBACKS = {  # petsc4py's own names of what was set
    "__ifunction__": f"an IFunction: {_INSTEAD} (a mass matrix or u' cannot enter it)",
    "__ijacobian__": f"an IJacobian: {_INSTEAD}",
    "__ijacobianp__": "an IJacobianP: give dG/dp in ts.setRHSJacobianP",
    "__i2function__": f"an I2Function: equations of second order are not solved; {_INSTEAD}",
    "__i2jacobian__": f"an I2Jacobian: equations of second order are not solved; {_INSTEAD}",
    "__rhssplit__": f"split functions (ts.setRHSSplit...): {_INSTEAD}",
    "__indicator__": (  # ts.getNumEvents() reads what is not there when there is no handler
        "event handlers (ts.setEventHandler), which cut and undo steps: look at each step with ts.setMonitor or "
        "ts.setPostStep; for alpha = 1 use pfde.odeint_event, or another type of TS"
    ),
}
_OPTIONS = {
    "ts_adjoint_solve": "a TS of type python has no adjoint step: call pfde.ts.adjoint_solve(ts) after the solve",
    "ts_fd_color": "it makes an IJacobian: give the Jacobian in ts.setRHSJacobian",
    "ts_convergence_estimate": "it solves several times on one TS: make a TS for each time step and compare",
}


def require_supported(ts: PETSc.TS) -> None:
    """Raise ValueError for what the TS has been given and would not get, and where there is no RHSFunction.

    Not collective.
    """
    attributes: dict[str, Any] = ts.getDict()
    for name, what in _CALLBACKS.items():
        if attributes.get(name) is not None:
            raise ValueError(f"FractionalTS does not use {what}")
    output_times = ts.getEvaluationTimes if hasattr(ts, "getEvaluationTimes") else ts.getTimeSpan  # before 3.23
    if len(output_times()):
        raise ValueError(
            "FractionalTS does not use output times (ts.setTimeSpan, ts.setEvaluationTimes, -ts_time_span): choose a "
            "time step that divides them, take the states in ts.setMonitor, and reset what has been set (ts.reset)"
        )
    if ts.getQuadratureTS()[1].handle:
        raise ValueError(
            "FractionalTS does not use quadrature (ts.createQuadratureTS): adjoint_solve differentiates costs of the "
            "final state; for alpha = 1 make the integral one more component of the state"
        )
    prefix = ts.getOptionsPrefix() or ""
    for name, remedy in _OPTIONS.items():
        if PETSc.Options().hasName(prefix + name):
            raise ValueError(f"FractionalTS does not use -{prefix}{name}: {remedy}")
    adapt = PETSc.Options().getString(f"{prefix}ts_adapt_type", "none")
    if adapt != "none":
        raise ValueError(
            f"FractionalTS does not use -{prefix}ts_adapt_type {adapt}: its steps are uniform, as with none; set the "
            "time step, or give the other TS of the program a prefix (ts.setOptionsPrefix)"
        )


def require_explicit_form(ts: PETSc.TS, vec: PETSc.Vec) -> None:
    """Raise ValueError where PETSc has an IFunction that petsc4py does not name, being set from C, or no function.

    Collective. PETSc's F(t, u, u') without an IFunction is u' itself.
    """
    slope, value = vec.duplicate(), vec.duplicate()
    slope.set(1.0)
    try:
        ts.computeIFunction(ts.getTime(), vec, slope, value, imex=True)
        value.axpy(-1.0, slope)
        absent = value.norm(PETSc.NormType.INFINITY) == 0.0
    except PETSc.Error as error:
        if error.ierr == _USER_ERROR:
            raise ValueError(f"FractionalTS needs a RHSFunction: {_INSTEAD}") from None
        absent = False
    finally:
        slope.destroy()
        value.destroy()
    if not absent:
        raise ValueError(f"FractionalTS does not use {_CALLBACKS['__ifunction__']}")
