"""The PETSc API: Caputo time stepping as a TS of type python.

A PETSc program with its own callbacks integrates D^alpha u = G(t, u) by options alone,

    -ts_type python -ts_python_type pfde.ts.FractionalTS -fde_alpha 0.6 -fde_method trapezoid
    [-fde_tolerance 1e-10 -fde_snapshots 20]

where G is the TS's RHSFunction, with RHSJacobian for the implicit methods and the adjoint. The time at which the solve
starts is the Caputo base point; the time step must divide the interval, and the final time is hit exactly. After the
solve `adjoint_solve(ts)` fills the vectors of TSSetCostGradients as TSAdjointSolve does for PETSc's own types (a TS of
type python has no adjoint step): lambda = dL/du_0, mu += dL/dp. What it needs is kept by the context, until the TS is
reset or destroyed: a TSTrajectory (TSSetSaveTrajectory) is given up. What else a TS can be given that has no place
here, an IFunction, events, quadrature, is refused (`system.unsupported`).

The torch API runs its forward passes in the same kind of context (`solving.driver`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..caputo.adjoint import AdjointSweep
from ..caputo.choice import choose_history
from ..caputo.discretisation import Discretisation
from ..caputo.forward import ForwardSweep
from ..caputo.grid import Grid, Orders
from ..caputo.history import History, SumOfExponentials
from ..caputo.schemes import METHODS, Scheme
from ..caputo.schemes.base import check_order
from ..caputo.trajectory import Trajectory
from ..errors import PfdeError
from ..schedules import Revolve, Schedule, StoreAll
from ..solving.checkpoints import CheckpointedSweep
from ..solving.driver import SweepTS
from ..solving.replay import Replay
from ..system.options_help import Entry, show_help
from ..system.peers import Peers
from ..system.petsc_callbacks import CallbackSystem, VecBar
from ..system.start import PETSc
from ..system.unsupported import require_explicit_form, require_supported
from ..system.vectors import load, read, require_device, write


class _Shown(NamedTuple):
    """What PETSc was shown after a step, which nobody else may change: y_n, the state of its Vec, t_n, h."""

    y: Tensor
    state: int
    t: float
    h: float


class FractionalTS(SweepTS[Trajectory]):
    """The context of a TS of type python that steps a Caputo equation with the TS's own callbacks.

    Options (with the TS's prefix): -fde_alpha, the order, in (0, 1] (default 1); -fde_method, one of
    those of `pfde.fdeint` (default trapezoid); -fde_tolerance, of a compressed history (`pfde.SumOfExponentials`;
    default: chosen as for history=None); -fde_snapshots, how many snapshots `adjoint_solve` may use (`pfde.Revolve`;
    default: all states are kept). All can be given here instead, as in
    `PETSc.TS().createPython(FractionalTS(alpha=0.6))`, and `method` a scheme of your own. -help lists them.

    The context does not hold its TS, which holds it.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        method: str | Scheme = "trapezoid",
        history: History | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.alpha, self.method, self.history, self.schedule = alpha, method, history, schedule or StoreAll()
        super().__init__(None, no_step_yet, "")
        self._tolerance: float | None = None
        self._snapshots: int | None = None
        self.system: Any = None
        self.discretisation: Discretisation | None = None
        self._shown: _Shown | None = None
        self._peers = Peers()  # the ranks of the TS, from the set-up on

    @property
    def _scheme(self) -> Scheme:
        return self.method if isinstance(self.method, Scheme) else METHODS[self.method]

    @property
    def _name(self) -> str:
        return self.method.name if isinstance(self.method, Scheme) else self.method

    def setFromOptions(self, ts: PETSc.TS) -> None:
        """Read the -fde_ options, and say what they are under -help."""
        prefix = ts.getOptionsPrefix() or ""
        options, before = PETSc.Options(prefix), (self.alpha, self._name)
        self.alpha = options.getReal("fde_alpha", self.alpha)
        if options.hasName("fde_method"):
            self.method = options.getString("fde_method")
        self._tolerance = options.getReal("fde_tolerance") if options.hasName("fde_tolerance") else None
        self._snapshots = options.getInt("fde_snapshots") if options.hasName("fde_snapshots") else None
        entries = (
            Entry("fde_alpha", self.alpha, before[0], "Order of the Caputo derivative, in (0, 1]", "pfde.ts"),
            Entry("fde_method", self._name, before[1], f"Scheme (one of) {' '.join(METHODS)}", "pfde.ts"),
            Entry("fde_tolerance", self._tolerance, None, "Relative error of a compressed history's kernel", "pfde.ts"),
            Entry("fde_snapshots", self._snapshots, None, "States that pfde.ts.adjoint_solve may keep", "pfde.ts"),
        )
        show_help("Caputo equation (pfde.ts.FractionalTS) options", prefix, entries, ts.comm)

    def setUp(self, ts: PETSc.TS) -> None:
        """Check the options and take the TS's callbacks and solver."""
        super().setUp(ts)
        comm = ts.comm
        if comm.getSize() > 1:
            PETSc.garbage_cleanup(comm)  # what Python has dropped of earlier solves: destroying it is collective
        self._peers = Peers(comm.tompi4py())
        self._peers.call(self._check, ts)
        vec = ts.getSolution()
        require_explicit_form(ts, vec)
        require_device(torch.device("cuda" if "cuda" in vec.getType() else "cpu"))
        self._take_callbacks(ts)

    def _check(self, ts: PETSc.TS) -> None:
        """Raise ValueError for options and callbacks that do not go together. Not collective."""
        if not isinstance(self.method, Scheme) and self.method not in METHODS:
            raise ValueError(f"-fde_method must be one of {', '.join(METHODS)}: got {self.method!r}")
        check_order("-fde_alpha", [self.alpha])
        if self._tolerance is not None:
            self.history = SumOfExponentials(self._tolerance)
        if self._snapshots is not None:
            self.schedule = Revolve(self._snapshots)
        require_supported(ts)

    def _take_callbacks(self, ts: PETSc.TS) -> None:
        """The system of the TS, for the method that is chosen by now."""
        implicit = self._scheme.implicit
        if self.system is None or self.system.implicit != implicit:
            self._drop_system()
            self.system = CallbackSystem(ts, ts.getSolution(), implicit=implicit)

    def _drop_system(self) -> None:
        system, self.system = self.system, None
        if system is not None:
            system.destroy()

    def step(self, ts: PETSc.TS) -> None:
        """One step, the first of which sets up the solve."""
        if self._starts(ts):
            self._start(ts)
        with self.system.using(ts):
            self._require_untouched(ts)
            y = self._step(ts)
            self._shown = _Shown(y, ts.getSolution().stateGet(), ts.getTime(), ts.getTimeStep())

    def _starts(self, ts: PETSc.TS) -> bool:
        """Whether this step is the first of a solve. Raises PfdeError where it would continue one."""
        sweep = self.sweep
        if sweep is None or ts.getStepNumber() == 0:
            return True
        if sweep.n == sweep.steps:
            raise PfdeError(
                f"the Caputo solve ended at t={ts.getTime():.6g} and cannot be continued: set the final time before "
                "the solve, or call ts.setStepNumber(0) and ts.setTime(t0) to start a new one"
            )
        return False

    def _start(self, ts: PETSc.TS) -> None:
        """Set up a solve. Collective."""
        ts.removeTrajectory()  # one may have been asked for since the set-up
        self._peers.call(self._check, ts)  # as with other options and callbacks
        self._take_callbacks(ts)
        self.sweep = self._shown = None  # at once: two solves' buffers are twice the memory
        y0 = load(ts.getSolution(), torch.float64)
        scheme = self._scheme
        orders = Orders(torch.tensor([self.alpha], dtype=torch.float64), None)
        grid, history = grid_of(ts), self.history
        if history is None:
            width = ts.getSolution().getSize() // ts.comm.getSize()
            schedule = None if isinstance(self.schedule, StoreAll) else self.schedule
            history = choose_history(scheme, grid, 1, width, y0.dtype, schedule=schedule).history
        discretisation = Discretisation(scheme, grid, orders, history, y0.numel(), y0.dtype, y0.device)
        self.discretisation, self.time = discretisation, grid.time
        replay = Replay(self.schedule, alone=self._peers.alone)
        with self.system.using(ts):
            sweep = ForwardSweep(Trajectory(discretisation, y0, "state"), self.system, replay)
        self.sweep = CheckpointedSweep(sweep, self.system, self.schedule, self._peers, replay)

    def _require_untouched(self, ts: PETSc.TS) -> None:
        """Raise PfdeError where a hook has changed what the history already knows. Collective."""
        shown = self._shown
        if shown is None:
            return
        vec, changed = ts.getSolution(), []
        if vec.stateGet() != shown.state and not torch.equal(read(vec), shown.y):  # who only looks raises it too
            changed.append("the solution")
        if ts.getTime() != shown.t:
            changed.append("the time")
        if abs(ts.getTimeStep() - shown.h) > 1e-8 * shown.h:  # PETSc cuts the last one by rounding
            changed.append("the time step")
        error = None
        if changed:
            error = PfdeError(
                f"{' and '.join(changed)} of the TS changed between two steps, at t={shown.t:.6g}: the history of a "
                "Caputo equation knows the steps as they were; leave them alone in ts.setPreStep, setPostStep and "
                "setMonitor"
            )
        self._peers.agree(error)

    def view(self, ts: PETSc.TS, viewer: PETSc.Viewer) -> None:
        """-ts_view."""
        viewer.printfASCII(f"  {self._scheme.title}\n  alpha = {self.alpha:g}\n")
        if self.discretisation is not None:
            viewer.printfASCII(f"  history {self.discretisation.history}\n")

    def reset(self, ts: PETSc.TS) -> None:
        """Forget the solve. Collective."""
        super().reset(ts)
        self._drop_system()
        self.discretisation, self._shown, self.time = None, None, no_step_yet

    def destroy(self, ts: PETSc.TS) -> None:
        """Called by PETSc when the TS goes, for which it does not call `reset`. Collective."""
        self.reset(ts)


def no_step_yet(n: int) -> float:
    """The time of a step before there is a grid."""
    raise AssertionError(f"step {n} has no time before the solve has begun")


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
    sweep = context.sweep
    if sweep is None or sweep.n < sweep.steps:
        raise PfdeError("adjoint_solve needs a completed forward solve: call ts.solve(u) to the final time first")
    if not ts.getCostGradients()[0]:
        raise ValueError("adjoint_solve needs cost gradients: call ts.setCostGradients(lambda, mu) first")
    system: CallbackSystem = context.system
    with system.using(ts):
        system.require_jacobian("the adjoint")  # before the trajectory is spent
        return _reverse(ts, system, sweep, jacobian_p, alpha=alpha)


def _reverse(
    ts: PETSc.TS,
    system: CallbackSystem,
    sweep: CheckpointedSweep[Trajectory],
    jacobian_p: PETSc.Mat | None,
    *,
    alpha: bool,
) -> list[float] | None:
    """The adjoint sweeps of `adjoint_solve`, one for each cost."""
    peers, alpha_bars = Peers(ts.comm.tompi4py()), []
    lambdas, mus = ts.getCostGradients()
    for i, lam in enumerate(lambdas):
        mu = mus[i] if mus else None
        if mu is not None:
            system.use_jacobian_p(jacobian_p, mu)
        if sweep.trajectory.spent:
            sweep = sweep.again()
        y_bar = {sweep.steps: load(lam, torch.float64)}
        adjoint = AdjointSweep(sweep.trajectory, system, y_bar, VecBar(mu), alpha=alpha, marks=sweep.marks)
        cotangents = sweep.reverse(adjoint)
        write(lam, cotangents.y0)
        if cotangents.alpha is not None:
            alpha_bars.append(peers.sum(float(cotangents.alpha[0])))
    return alpha_bars if alpha else None
