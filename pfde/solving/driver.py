"""The driver: a sweep runs to its end in a real PETSc TS.

So -ts_monitor, -snes_*, -ksp_*, -log_view and an options prefix work on a torch model as on any PETSc program. The
context of that TS, `SweepTS`, is that of the PETSc API too (`pfde.ts.FractionalTS`).

    with Driver(peers, y0, prefix) as driver:        a TS of its own: its SNES and a Vec of the state
        ...                                          the system and the sweep are built with these
        driver.run(SweepTS(sweep, ...), t0, h)       and handed over
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import Tensor

from ..errors import PfdeError
from ..system.peers import Peers
from ..system.petsc_options import database_in_use, refuse_options
from ..system.start import PETSc
from ..system.torch_function import TorchFunction
from ..system.vectors import state_vec, write
from .checkpoints import CheckpointedSweep
from .sweep import Record

R = TypeVar("R", bound=Record)


class SweepTS(Generic[R]):
    """The context of a TS of type python that advances a sweep: what the torch API's forward passes run in.

    Parameters
    ----------
    sweep : that advances
    time : n -> t_n, asked for steps that have been taken
    title : what -ts_view says
    on_step : sees (n, y_n) after every step
    shows_state : whether somebody may look at the TS's solution between steps
    """

    def __init__(
        self,
        sweep: CheckpointedSweep[R] | None,
        time: Callable[[int], float],
        title: str,
        on_step: Callable[[int, Tensor], None] | None = None,
        *,
        shows_state: bool = True,
    ) -> None:
        self.sweep, self.time, self.title, self.on_step = sweep, time, title, on_step
        self._shows_state = shows_state
        self._error: BaseException | None = None

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
            if self.sweep is not None and self.sweep.ended:
                ts.setConvergedReason(PETSc.TS.ConvergedReason.CONVERGED_TIME)
        except BaseException as error:  # PETSc turns it into an error code: `Driver.run` raises the original
            self._error = error
            raise

    def _step(self, ts: PETSc.TS) -> Tensor:
        """Advance the sweep, show the state to PETSc, and return it."""
        sweep = self.sweep
        assert sweep is not None
        y = sweep.advance(sweep.n + 1)
        if self.on_step is not None:
            self.on_step(sweep.n, y)
        if self._shows_state:
            write(ts.getSolution(), y)
        ts.setTime(self.time(sweep.n))
        return y

    def take_error(self) -> BaseException | None:
        """What a step has raised, once: its traceback holds the TS, the TS its context, and no collector sees it."""
        error, self._error = self._error, None
        return error

    def view(self, _ts: PETSc.TS, viewer: PETSc.Viewer) -> None:
        """-ts_view."""
        viewer.printfASCII(f"  {self.title}\n")

    def reset(self, _ts: PETSc.TS) -> None:
        """Forget the solve."""
        self.sweep = self.on_step = None


class Driver:
    """A TS of its own for one forward pass, new for each, because an exception inside a step leaves a TS locked.

    Parameters
    ----------
    peers : the ranks that share the state
    y0 : (d,)
    options_prefix : of the TS and its solvers

    Attributes
    ----------
    snes : of the TS, so that the options of the TS reach it
    vec : of the state
    is_observed : whether an option of this TS, a monitor say, may look at its solution between steps; nobody else can

    Collective.
    """

    def __init__(self, peers: Peers, y0: Tensor, options_prefix: str) -> None:
        self._prefix, self._y0 = options_prefix, y0
        comm = petsc_comm(peers)
        self.vec = state_vec(y0.numel(), y0.device, comm)
        self._ts = PETSc.TS().create(comm)
        self._ts.setOptionsPrefix(options_prefix)
        self.snes = self._ts.getSNES()
        self.is_observed = any(name.startswith(f"{options_prefix}ts_") for name in PETSc.Options().getAll())

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ts.destroy()

    def run(self, context: SweepTS[Any], t0: float, h: float, *, adaptive: bool = False) -> None:
        """Run a sweep to its end. What a callback raises comes out as it was raised. Collective.

        t0, h : where the TS starts, and its time step, for those who look at it
        adaptive : whether the sweep chooses its step sizes
        """
        ts, sweep = self._ts, context.sweep
        assert sweep is not None
        ts.setType(PETSc.TS.Type.PYTHON)
        ts.setPythonContext(context)
        context.create(ts)
        write(self.vec, self._y0)
        error: BaseException | None = None
        try:
            with database_in_use:
                refuse_options(self._prefix, adaptive=adaptive)
                ts.setFromOptions()
            ts.setTime(t0)
            ts.setTimeStep(h)
            ts.setMaxTime(1e300)  # the sweep itself says when it is over
            ts.setMaxSteps(2**31 - 2)
            ts.solve(self.vec)
        except PETSc.Error as caught:
            error = context.take_error() or caught
        finally:
            context.reset(ts)  # at once: what Python drops while PETSc collects its garbage is lost, and leaks
            ts.destroy()
        try:
            if error is not None:
                raise error
        finally:
            del error
        if not sweep.ended:
            raise PfdeError(f"the TS stopped after step {sweep.n}: a hook of its options ended it")


def bare_solver(function: TorchFunction, options_prefix: str, *, implicit: bool) -> tuple[PETSc.SNES | None, PETSc.Vec]:
    """A SNES for the stages of an implicit method, and a Vec of the state, outside any TS. Collective."""
    comm = petsc_comm(function.peers)
    snes = None
    if implicit:
        snes = PETSc.SNES().create(comm)
        snes.setOptionsPrefix(options_prefix)
    return snes, state_vec(function.layout.size, function.device, comm)


def petsc_comm(peers: Peers) -> PETSc.Comm:
    """The communicator of the ranks that share the state. Collective.

    On several ranks PETSc only notes which objects Python has dropped, because destroying them is collective: here,
    where all ranks meet, the objects of earlier solves go.
    """
    if peers.comm is None:
        return PETSc.COMM_SELF
    comm = PETSc.Comm(peers.comm)
    PETSc.garbage_cleanup(comm)
    return comm
