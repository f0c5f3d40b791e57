"""The PETSc door: Caputo time stepping as a TS of type python, and the driver that the torch door uses.

A PETSc program with its own callbacks integrates D^alpha u = G(t, u) by options alone,

    -ts_type python -ts_python_type pfde.ts.FractionalTS -fde_alpha 0.6 -fde_method trapezoid
    [-fde_tolerance 1e-10 -fde_snapshots 20]

where G is the TS's RHSFunction, with RHSJacobian for the implicit methods and the adjoint. The time at which the solve
starts is the Caputo base point; the time step must divide the interval, and the final time is hit exactly. After the
solve `adjoint_solve(ts)` fills the vectors of TSSetCostGradients as TSAdjointSolve does for PETSc's own types (a TS of
type python has no adjoint step): lambda = dL/du_0, mu += dL/dp.

The torch door runs its first forward pass in the same context class (`integrate`), so that -ts_monitor, -snes_*,
-ksp_*, -log_view and an options prefix work on a torch model as on any PETSc program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from .choice import choose_history
from .errors import PfdeError
from .gradients import Discrete
from .history import Bounded, Exact, SumOfExponentials
from .schedules import Revolve, Schedule, StoreAll
from .schemes import METHODS, Scheme
from .schemes.base import check_order
from .sweeps.adjoint import AdjointSweep
from .sweeps.checkpoints import CheckpointedSweep
from .sweeps.discretisation import Discretisation
from .sweeps.forward import ForwardSweep
from .sweeps.grid import Grid, Orders
from .sweeps.trajectory import Trajectory
from .system.base import System
from .system.peers import Peers
from .system.petsc_callbacks import CallbackSystem, VecBar
from .system.torch_function import TorchFunction
from .system.torch_system import TorchSystem
from .system.vectors import load, require_device, state_vec, write


class SweepTS:
    """The context of a TS of type python that advances a sweep: what the torch door's forward passes run in.

    Parameters
    ----------
    run : the sweep
    time : n -> t_n, asked for steps that have been taken
    title : what -ts_view says
    on_step : sees (n, y_n) after every step
    """

    def __init__(
        self,
        run: CheckpointedSweep | None,
        time: Callable[[int], float],
        title: str,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.run, self.time, self.title, self.on_step = run, time, title, on_step
        self.error: BaseException | None = None
        self.watched = True  # whether somebody may look at the TS's solution between steps

    def create(self, ts: PETSc.TS) -> None:
        """Called by PETSc when the type is set: TSSolve insists on a choice, and every step size hits the end."""
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)

    def step(self, ts: PETSc.TS) -> None:
        """One step, and the end of the solve behind the last one."""
        try:
            if self._step(ts).ended:
                ts.setConvergedReason(PETSc.TS.ConvergedReason.CONVERGED_TIME)
        except BaseException as error:  # PETSc turns it into an error code: `drive` raises the original
            self.error = error
            raise

    def _step(self, ts: PETSc.TS) -> CheckpointedSweep:
        """Advance the sweep, show the state to PETSc."""
        run = self.run
        assert run is not None
        y = run.advance(run.n + 1)
        if self.on_step is not None:
            self.on_step(run.n, y)
        if self.watched:
            write(ts.getSolution(), y)
        ts.setTime(self.time(run.n))
        return run

    def view(self, _ts: PETSc.TS, viewer: PETSc.Viewer) -> None:
        """-ts_view."""
        viewer.printfASCII(f"  {self.title}\n")

    def reset(self, _ts: PETSc.TS) -> None:
        """Forget the solve."""
        self.run = self.on_step = None


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
            bounded = not isinstance(self.schedule, StoreAll)
            history = choose_history(scheme, grid, 1, width, y0.dtype, bounded=bounded).history
        discretisation = Discretisation(scheme, grid, orders, history, y0.numel(), y0.dtype, y0.device)
        self.discretisation = discretisation
        trajectory = Trajectory(discretisation, y0, "state")
        sweep = ForwardSweep(trajectory, self.system)
        self.run = CheckpointedSweep(sweep, trajectory, self.system, self.schedule, peers)

    def view(self, ts: PETSc.TS, viewer: PETSc.Viewer) -> None:
        """-ts_view."""
        viewer.printfASCII(f"  {title(METHODS[self.method])}\n  alpha = {self.alpha:g}\n")
        if self.discretisation is not None:
            viewer.printfASCII(f"  history {self.discretisation.history}\n")

    def reset(self, ts: PETSc.TS) -> None:
        """Forget the solve."""
        super().reset(ts)
        self.system = self.discretisation = None


def title(scheme: Scheme) -> str:
    """What -ts_view says of a method with a history."""
    return f"Caputo equation, method {scheme.name} (order {scheme.order}; {scheme.stability})"


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
            run = again(run, system, context.schedule, peers)
        y_bar = {run.steps: load(lam, torch.float64)}
        assert isinstance(run.trajectory, Trajectory)
        cotangents = run.reverse(AdjointSweep(run.trajectory, system, y_bar, VecBar(mu), alpha=alpha))
        write(lam, cotangents.y0)
        if cotangents.alpha is not None:
            alpha_bars.append(peers.sum(float(cotangents.alpha[0])))
    return alpha_bars if alpha else None


def again(run: CheckpointedSweep, system: System, schedule: Schedule, peers: Peers) -> CheckpointedSweep:
    """Do a spent run anew: the same steps without a TS, so without monitors and hooks."""
    system.silence()
    system.restore_generators(0, run.generators)
    spent = run.trajectory
    assert isinstance(spent, Trajectory)
    fresh = Trajectory(spent.discretisation, spent.y0, spent.store)
    new = CheckpointedSweep(ForwardSweep(fresh, system), fresh, system, schedule, peers, run.fingerprints)
    new.advance(new.steps)
    return new


def integrate(
    discretisation: Discretisation,
    y0: Tensor,
    gradient: Discrete | None,
    function: TorchFunction,
    on_step: Callable[[int, Tensor], None],
    *,
    options_prefix: str = "",
) -> tuple[CheckpointedSweep, TorchSystem]:
    """The forward pass in a TS of its own; the driver of the torch door.

    Parameters
    ----------
    discretisation : the scheme on its grid
    y0 : (d,) the initial state
    gradient : what is kept for the backward pass; None without gradient
    function : f; its peers are the ranks that share the state
    on_step : sees (n, y_n) after every step
    options_prefix : of the TS and its solvers

    Collective. What a callback raises comes out as it was raised.
    """
    grid, scheme = discretisation.grid, discretisation.scheme

    def start(snes: PETSc.SNES, vec: PETSc.Vec) -> tuple[SweepTS, TorchSystem]:
        system = TorchSystem(function, snes if scheme.implicit else None, vec)
        trajectory = Trajectory(discretisation, y0, None if gradient is None else gradient.store)
        sweep, plan = ForwardSweep(trajectory, system), None if gradient is None else gradient.plan
        run = CheckpointedSweep(sweep, trajectory, system, plan, function.peers)
        description = f"{title(scheme)}\n  history {discretisation.history}"
        return SweepTS(run, grid.time, description, on_step), system

    return drive(start, function, y0, grid.t0, grid.h, options_prefix=options_prefix)


def drive(
    start: Callable[[PETSc.SNES, PETSc.Vec], tuple[SweepTS, TorchSystem]],
    function: TorchFunction,
    y0: Tensor,
    t0: float,
    h: float,
    *,
    options_prefix: str,
) -> tuple[CheckpointedSweep, TorchSystem]:
    """Run a sweep to its end in a TS of its own.

    Parameters
    ----------
    start : (the TS's SNES, a Vec of the state) -> the context with its sweep, and the system
    function : f; its peers are the ranks that share the state
    y0 : (d,)
    t0, h : where the TS starts, and its time step, for those who look at it
    options_prefix : of the TS and its solvers

    Collective. The TS is new for each solve, because an exception inside a step leaves a TS locked.
    """
    comm = petsc_comm(function)
    vec = state_vec(y0.numel(), y0.device, comm)
    ts = PETSc.TS().create(comm)
    ts.setOptionsPrefix(options_prefix)
    context, system = start(ts.getSNES(), vec)
    run = context.run
    assert run is not None
    # This TS is seen by nobody but its options' monitors: without such an option its Vec need not follow.
    context.watched = any(name.startswith(f"{options_prefix}ts_") for name in PETSc.Options().getAll())
    ts.setType(PETSc.TS.Type.PYTHON)
    ts.setPythonContext(context)
    context.create(ts)
    write(vec, y0)
    error: BaseException | None = None
    _refuse_options(options_prefix)
    try:
        ts.setFromOptions()
        ts.setTime(t0)
        ts.setTimeStep(h)
        ts.setMaxTime(1e300)  # the sweep itself says when it is over
        ts.setMaxSteps(2**31 - 2)
        ts.solve(vec)
    except PETSc.Error as caught:
        # Moved out of the context: the traceback holds the TS, the TS its context, and no garbage collector sees it.
        error, context.error = context.error or caught, None
    finally:
        context.reset(ts)  # at once: what Python drops while PETSc collects its garbage is lost, and leaks
        ts.destroy()
    try:
        if error is not None:
            raise error
    finally:
        del error
    if not run.ended:
        raise PfdeError(f"the TS stopped after step {run.n}: a hook of its options ended it")
    return run, system


_REFUSED = (
    *("ts_type", "ts_dt", "ts_max_time", "ts_max_steps", "ts_init_time", "ts_rtol", "ts_atol", "ts_max_reject"),
    *(f"ts_adapt_{name}" for name in ("type", "dt_min", "dt_max", "safety", "reject_safety", "clip", "always_accept")),
)
_BAD_OPTION = (60, 62, 63, 86)  # PETSC_ERR_ARG_SIZ, _WRONG, _OUTOFRANGE, PETSC_ERR_UNKNOWN_TYPE


@contextmanager
def solver_options(options: Mapping[str, Any], prefix: str, peers: Peers) -> Iterator[None]:
    """Have these PETSc options in the database while a solve is set up and run; then restore what was there.

    Raises ValueError, on every rank, for an option that no object of the solve has asked for.
    """
    database = PETSc.Options()
    names = {name: prefix + name for name in options}
    before = {full: database.getString(full) for full in names.values() if database.hasName(full)}
    try:
        for name, full in names.items():
            database.setValue(full, options[name])
        try:
            yield
        except PETSc.Error as error:
            if not options or error.ierr not in _BAD_OPTION:
                raise
            reason = str(error).splitlines()[-1].partition("] ")[2]
            raise ValueError(f"options: PETSc does not take {dict(options)}: {reason}") from error
        unused = [name for name, full in names.items() if not database.used(full)]
        if unused:
            peers.agree(
                ValueError(
                    f"options: {', '.join(map(repr, unused))} does not apply to this solve (no PETSc object of it has "
                    "such an option); explicit methods have no snes_ and ksp_ options"
                )
            )
    finally:
        for full in names.values():
            database.delValue(full)
        for full, value in before.items():
            database.setValue(full, value)


def bare_system(
    function: TorchFunction,
    make: Callable[[PETSc.SNES | None, PETSc.Vec], TorchSystem] | None = None,
    *,
    implicit: bool,
    options_prefix: str = "",
) -> TorchSystem:
    """f with a stage solver of its own, outside any TS: what autograd through the steps uses.

    make : (SNES, Vec of the state) -> system; None for one of f alone
    """
    comm = petsc_comm(function)
    snes = None
    if implicit:
        snes = PETSc.SNES().create(comm)
        snes.setOptionsPrefix(options_prefix)
    vec = state_vec(function.layout.size, function.device, comm)
    return TorchSystem(function, snes, vec) if make is None else make(snes, vec)


def petsc_comm(function: TorchFunction) -> PETSc.Comm:
    """The communicator of the ranks that share the state. Collective.

    On several ranks PETSc only notes which objects Python has dropped, because destroying them is collective: here,
    where all ranks meet, the objects of earlier solves go.
    """
    if function.peers.comm is None:
        return PETSc.COMM_SELF
    comm = PETSc.Comm(function.peers.comm)
    PETSc.garbage_cleanup(comm)
    return comm


def _refuse_options(prefix: str) -> None:
    """Raise ValueError for TS options that the arguments of the torch door decide."""
    options = PETSc.Options(prefix)
    for name in _REFUSED:
        if options.hasName(name):
            raise ValueError(
                f"PETSc option -{prefix}{name} does not apply here: t, step_size and method, or rtol and atol, say it; "
                "if it belongs to another TS of the program, give this solve an options_prefix"
            )
