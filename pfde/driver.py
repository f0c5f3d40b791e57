"""The driver of the torch door: a sweep runs to its end in a real PETSc TS.

So -ts_monitor, -snes_*, -ksp_*, -log_view and an options prefix work on a torch model as on any PETSc program. The
context of that TS, `SweepTS`, is that of the PETSc door too (`pfde.ts.FractionalTS`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .errors import PfdeError
from .petsc_options import database_in_use, refuse_options
from .sweeps.checkpoints import CheckpointedSweep
from .system.start import PETSc
from .system.torch_function import TorchFunction
from .system.torch_system import TorchSystem
from .system.vectors import state_vec, write


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

    def setUp(self, ts: PETSc.TS) -> None:
        """Called by PETSc before the first step: a TSTrajectory would write files that nobody reads."""
        ts.removeTrajectory()

    def step(self, ts: PETSc.TS) -> None:
        """One step, and the end of the solve behind the last one."""
        try:
            self._step(ts)
            if self.run is not None and self.run.ended:
                ts.setConvergedReason(PETSc.TS.ConvergedReason.CONVERGED_TIME)
        except BaseException as error:  # PETSc turns it into an error code: `drive` raises the original
            self.error = error
            raise

    def _step(self, ts: PETSc.TS) -> Tensor:
        """Advance the sweep, show the state to PETSc, and return it."""
        run = self.run
        assert run is not None
        y = run.advance(run.n + 1)
        if self.on_step is not None:
            self.on_step(run.n, y)
        if self.watched:
            write(ts.getSolution(), y)
        ts.setTime(self.time(run.n))
        return y

    def view(self, _ts: PETSc.TS, viewer: PETSc.Viewer) -> None:
        """-ts_view."""
        viewer.printfASCII(f"  {self.title}\n")

    def reset(self, _ts: PETSc.TS) -> None:
        """Forget the solve."""
        self.run = self.on_step = None


def drive(
    start: Callable[[PETSc.SNES, PETSc.Vec], tuple[SweepTS, TorchSystem]],
    function: TorchFunction,
    y0: Tensor,
    t0: float,
    h: float,
    *,
    options_prefix: str,
    adaptive: bool = False,
) -> tuple[CheckpointedSweep, TorchSystem]:
    """Run a sweep to its end in a TS of its own.

    Parameters
    ----------
    start : (the TS's SNES, a Vec of the state) -> the context with its sweep, and the system
    function : f; its peers are the ranks that share the state
    y0 : (d,)
    t0, h : where the TS starts, and its time step, for those who look at it
    options_prefix : of the TS and its solvers
    adaptive : whether the sweep chooses its step sizes

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
    try:
        with database_in_use:
            refuse_options(options_prefix, adaptive=adaptive)
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
