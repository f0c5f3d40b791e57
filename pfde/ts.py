"""The PETSc door: Caputo time stepping as a TS of type python.

A PETSc program with its own callbacks integrates D^alpha u = G(t, u) by options alone,

    -ts_type python -ts_python_type pfde.ts.FractionalTS -fde_alpha 0.6 -fde_method trapezoid
    [-fde_tolerance 1e-10 -fde_snapshots 20]

where G is the TS's RHSFunction, with RHSJacobian for the implicit methods and the adjoint. The time at which the solve
starts is the Caputo base point; the time step must divide the interval, and the final time is hit exactly. After the
solve `adjoint_solve(ts)` fills the vectors of TSSetCostGradients as TSAdjointSolve does for PETSc's own types (a TS of
type python has no adjoint step): lambda = dL/du_0, mu += dL/dp.

The torch door runs its forward passes in the same kind of context (`driver`).
"""

from __future__ import annotations

from typing import Any

import torch
from petsc4py import PETSc

from .choice import choose_history
from .driver import SweepTS
from .errors import PfdeError
from .history import Bounded, Exact, SumOfExponentials
from .schedules import Revolve, Schedule, StoreAll
from .schemes import METHODS
from .schemes.base import check_order
from .sweeps.adjoint import AdjointSweep
from .sweeps.checkpoints import CheckpointedSweep
from .sweeps.discretisation import Discretisation
from .sweeps.forward import ForwardSweep, take_again
from .sweeps.grid import Grid, Orders
from .sweeps.trajectory import Trajectory
from .system.peers import Peers
from .system.petsc_callbacks import CallbackSystem, VecBar
from .system.vectors import load, require_device, write


class FractionalTS(SweepTS):
    """The context of a TS of type python that steps a Caputo equation with the TS's own callbacks.

    Options (with the TS's prefix): -fde_alpha, the order, in (0, 1] (default 1); -fde_method, one of
    `pfde.schemes.METHODS` (default trapezoid); -fde_tolerance, of a compressed history (`pfde.SumOfExponentials`;
    default: chosen as for history=None); -fde_snapshots, how many snapshots `adjoint_solve` may use (`pfde.Revolve`;
    default: all states are kept). All can be given here instead, as in
    `PETSc.TS().createPython(FractionalTS(alpha=0.6))`.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        method: str = "trapezoid",
        history: Exact | Bounded | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.alpha, self.method, self.history, self.schedule = alpha, method, history, schedule or StoreAll()
        super().__init__(None, self._time, "")
        self._tolerance: float | None = None
        self._snapshots: int | None = None
        self.system: Any = None
        self.discretisation: Discretisation | None = None

    def _time(self, n: int) -> float:
        assert self.discretisation is not None
        return self.discretisation.grid.time(n)

    def setFromOptions(self, ts: PETSc.TS) -> None:
        """Read the -fde_ options."""
        options = PETSc.Options(ts.getOptionsPrefix() or "")
        self.alpha = options.getReal("fde_alpha", self.alpha)
        self.method = options.getString("fde_method", self.method)
        self._tolerance = options.getReal("fde_tolerance") if options.hasName("fde_tolerance") else None
        self._snapshots = options.getInt("fde_snapshots") if options.hasName("fde_snapshots") else None

    def setUp(self, ts: PETSc.TS) -> None:
        """Check the options and take the TS's callbacks and solver."""
        if self.method not in METHODS:
            raise ValueError(f"-fde_method must be one of {', '.join(METHODS)}: got {self.method!r}")
        check_order("-fde_alpha", [self.alpha])
        if self._tolerance is not None:
            self.history = SumOfExponentials(self._tolerance)
        if self._snapshots is not None:
            self.schedule = Revolve(self._snapshots)
        vec = ts.getSolution()
        require_device(torch.device("cuda" if "cuda" in vec.getType() else "cpu"))
        self.system = CallbackSystem(ts, vec, implicit=METHODS[self.method].implicit)

    def step(self, ts: PETSc.TS) -> None:
        """One step, the first of which sets up the solve."""
        self._start_if_new(ts)
        self._step(ts)

    def _start_if_new(self, ts: PETSc.TS) -> None:
        t, run = ts.getTime(), self.run
        if run is not None and run.n < run.steps:
            return
        if run is not None and ts.getStepNumber() > 0:
            raise PfdeError(
                f"the Caputo solve ended at t={t:.6g} and cannot be continued: set the final time before the solve, or "
                "call ts.setStepNumber(0) and ts.setTime(t0) to start a new one"
            )
        y0 = load(ts.getSolution(), torch.float64)
        scheme = METHODS[self.method]
        orders = Orders(torch.tensor([self.alpha], dtype=torch.float64), None)
        peers, grid, history = Peers(ts.comm.tompi4py()), grid_of(ts), self.history
        if history is None:
            width = ts.getSolution().getSize() // ts.comm.getSize()
            schedule = None if isinstance(self.schedule, StoreAll) else self.schedule
            history = choose_history(scheme, grid, 1, width, y0.dtype, schedule=schedule).history
        discretisation = Discretisation(scheme, grid, orders, history, y0.numel(), y0.dtype, y0.device)
        self.discretisation = discretisation
        trajectory = Trajectory(discretisation, y0, "state")
        sweep = ForwardSweep(trajectory, self.system)
        self.run = CheckpointedSweep(sweep, trajectory, self.system, self.schedule, peers)

    def view(self, ts: PETSc.TS, viewer: PETSc.Viewer) -> None:
        """-ts_view."""
        viewer.printfASCII(f"  {METHODS[self.method].title}\n  alpha = {self.alpha:g}\n")
        if self.discretisation is not None:
            viewer.printfASCII(f"  history {self.discretisation.history}\n")

    def reset(self, ts: PETSc.TS) -> None:
        """Forget the solve."""
        super().reset(ts)
        self.system = self.discretisation = None


def grid_of(ts: PETSc.TS) -> Grid:
    """The uniform grid from a TS's time, time step, final time and step limit. Raises ValueError."""
    t0, h, t1 = ts.getTime(), ts.getTimeStep(), ts.getMaxTime()
    limit = ts.getMaxSteps()
    span = (t1 - t0) / h
    if span > limit:  # stopped by the number of steps, as TS_CONVERGED_ITS
        return Grid(t0, h, limit, t0 + limit * h)
    steps = round(span)
    if steps < 1 or abs(span - steps) > 1e-8 * steps:
        raise ValueError(
            f"the time step must divide the interval: got -ts_dt {h:g} on [{t0:g}, {t1:g}], {span:g} steps; "
            f"use -ts_dt {(t1 - t0) / max(1, round(span)):.17g}"
        )
    return Grid(t0, (t1 - t0) / steps, steps, t1)


def adjoint_solve(ts: PETSc.TS, *, jacobian_p: PETSc.Mat | None = None, alpha: bool = False) -> list[float] | None:
    """Fill the cost gradients of a TS of type `FractionalTS` after its solve, by the discrete adjoint.

    For every pair (lambda, mu) of `ts.setCostGradients(lambda, mu)`: lambda goes in as dL/du(T) and comes out as
    dL/du(t_0); mu comes out with dL/dp added (mu may be None). The gradient is that of the discrete scheme, to
    rounding and to the tolerance of the transposed KSP solves.

    Parameters
    ----------
    ts : after `ts.solve`
    jacobian_p : a Mat for the callback of setRHSJacobianP to fill; default an AIJ matrix of matching sizes
    alpha : whether to return dL/dalpha for each cost

    Collective. Raises ValueError when cost gradients, RHSJacobian or RHSJacobianP are missing; PfdeError when the
    forward solve has not reached its end. Further costs after the first compute the trajectory again.
    """
    # Asking a TS of another type for its Python context reads memory that is not one.
    context = ts.getPythonContext() if ts.getType() == PETSc.TS.Type.PYTHON else None
    if not isinstance(context, FractionalTS):
        raise TypeError(
            f"adjoint_solve needs a TS of type python with FractionalTS: got {ts.getType()}; use ts.adjointSolve"
        )
    run = context.run
    if run is None or run.n < run.steps:
        raise PfdeError("adjoint_solve needs a completed forward solve: call ts.solve(u) to the final time first")
    lambdas, mus = ts.getCostGradients()
    if not lambdas:
        raise ValueError("adjoint_solve needs cost gradients: call ts.setCostGradients(lambda, mu) first")
    system: CallbackSystem = context.system
    peers, alpha_bars = Peers(ts.comm.tompi4py()), []
    for i, lam in enumerate(lambdas):
        mu = mus[i] if mus else None
        if mu is not None:
            system.use_jacobian_p(jacobian_p, mu)
        if run.trajectory.spent:
            run = take_again(run, system, context.schedule, peers)
        y_bar = {run.steps: load(lam, torch.float64)}
        assert isinstance(run.trajectory, Trajectory)
        cotangents = run.reverse(AdjointSweep(run.trajectory, system, y_bar, VecBar(mu), alpha=alpha))
        write(lam, cotangents.y0)
        if cotangents.alpha is not None:
            alpha_bars.append(peers.sum(float(cotangents.alpha[0])))
    return alpha_bars if alpha else None
