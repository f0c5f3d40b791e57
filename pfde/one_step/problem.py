"""One validated ordinary initial value problem: its forward pass in a TS, its backward pass, and what they cost.

M y' = f(t, y, theta),  y(t_0) = y_0. The inputs are (y0, t), t the output times where they require a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..errors import PfdeError, StepLimitError
from ..schedules import Online, Revolve, Schedule
from ..solving.checkpoints import CheckpointedSweep
from ..solving.driver import Driver, SweepTS, bare_solver
from ..solving.gradients import Gradient
from ..solving.initial_value import Bars, InitialValueProblem
from ..solving.replay import Replay
from ..solving.run import Run
from ..system.mass import Mass
from ..system.parameter_bar import ParameterBar
from ..system.random import generator_states, set_generator_states
from ..system.torch_function import TorchFunction
from ..system.torch_system import GraphSystem, TorchSystem
from .adjoint import AdjointSweep
from .backprop import backprop
from .control import Accuracy, Controller
from .forward import ForwardSweep, Terminal
from .methods.base import OneStep
from .outputs import Outputs
from .split import Split
from .tangent import tangent_sweep
from .times import StepTimes
from .trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class OneStepRun(Run[Trajectory]):
    """What a forward pass leaves: also where its outputs lie, and the limit that ended it early, or None."""

    outputs: Outputs
    limit: StepLimitError | None


@dataclass(frozen=True, eq=False, kw_only=True)
class OrdinaryProblem(InitialValueProblem):
    """A validated solve of M y' = f(t, y), but for the values of y0, t and the parameters, which autograd owns.

    scheme : the method
    times : of the outputs
    steps_between : two of them; None for adaptive steps
    accuracy : of adaptive steps
    mass : M, None for the identity
    stop_at_limit : whether too many or too small steps end the solve, instead of being an error
    terminal, open_end : see `ForwardSweep`, `StepTimes`; for events
    """

    scheme: OneStep
    times: tuple[float, ...]
    steps_between: tuple[int, ...] | None
    accuracy: Accuracy
    mass: Mass | None = None
    stop_at_limit: bool = False
    terminal: Terminal | None = None
    open_end: bool = False

    @property
    def t0(self) -> float:
        return self.times[0]

    @property
    def schedule(self) -> Schedule:
        """The checkpoint schedule; one that has to know the number of steps becomes `Online` for adaptive ones."""
        plan = self.gradient.plan
        if self._output_steps() is None and isinstance(plan, Revolve) and plan.snapshots is not None:
            return Online(plan.snapshots, on_disk=plan.on_disk, directory=plan.directory, leaf=plan.leaf)
        return plan

    def functions(self, y0: Tensor, *, times: bool = False, trusted: bool = False) -> list[TorchFunction]:
        """f; for a split method its stiff and its nonstiff part."""
        parts = [self.func]
        if self.scheme.split:
            assert isinstance(self.func, Split)
            parts = [self.func.stiff, self.func.nonstiff]
        draws = self.random_numbers(y0)
        return [self.function(y0, f, draws=draws, differentiates_time=times, trusted=trusted) for f in parts]

    # -- the forward pass ----------------------------------------------------------------------------------------

    def integrate(self, y0: Tensor, t: Tensor | None = None) -> Tensor:
        return self.solved(y0)[0]

    def forward(self, y0: Tensor, t: Tensor | None) -> tuple[Tensor, OneStepRun]:
        return self._integrate(y0, self.gradient, times=t is not None)

    def solved(self, y0: Tensor) -> tuple[Tensor, OneStepRun]:
        """The forward pass without a gradient, and what is known of its steps. Collective."""
        return self._integrate(y0, None)

    def _integrate(self, y0: Tensor, gradient: Gradient | None, *, times: bool = False) -> tuple[Tensor, OneStepRun]:
        """y at the outputs, and what a forward pass for this gradient, or for none, leaves.

        times : whether the cotangents of the times will be wanted
        """
        y0 = y0.detach()
        adaptive = self.steps_between is None
        # NaN in a step that is tried rejects it; an explicit step is looked at as a whole
        functions = self.functions(y0, times=times, trusted=adaptive or not self.scheme.implicit)
        begin = generator_states(y0.device)
        step_times = StepTimes(self.times, self.steps_between, open_end=self.open_end)
        outputs = Outputs(self.times, y0, self._output_steps(), open_end=self.open_end)
        controller = self._controller() if adaptive else None
        keep, plan = (None, None) if gradient is None else (gradient.keep, self.schedule)
        replay = None if plan is None else Replay(plan, alone=self.peers.alone)
        h = step_times.interval(1).h if step_times.ended else (self.times[-1] - self.times[0]) / 100
        with Driver(self.peers, y0, self.prefix) as driver:
            system = self._system(functions, driver.snes, driver.vec)
            sweep = ForwardSweep(
                Trajectory(self.scheme, step_times, y0, keep),
                system,
                replay,
                controller,
                outputs,
                reuse=not self.draws,
                terminal=self.terminal,
                stop_at_limit=self.stop_at_limit,
            )
            checkpointed = CheckpointedSweep(sweep, system, plan, self.peers, replay)
            context: SweepTS[Trajectory] = SweepTS(
                checkpointed, step_times.time, self._title(), shows_state=driver.is_observed
            )
            driver.run(context, self.times[0], float(h), adaptive=adaptive)
        run = OneStepRun(checkpointed, system, outputs, sweep.limit)
        self.finish_forward(run, functions, begin, gradient=gradient)
        self.stats.rejected = 0 if controller is None else controller.rejected
        return outputs.give_away(), run

    def _output_steps(self) -> list[int] | None:
        """The step numbers of the outputs; None where they are found on the way."""
        if self.steps_between is None or self.open_end:
            return None
        return list(accumulate(self.steps_between, initial=0))

    def _controller(self) -> Controller:
        accuracy = self.accuracy
        return Controller(self.scheme, accuracy.rtol, accuracy.atol, accuracy.limits, self.peers)

    def _system(self, functions: Sequence[TorchFunction], snes: Any, vec: Any) -> TorchSystem:
        """The system of f's parts, with a SNES, None or not to be used, and a Vec of the state."""
        nonstiff = functions[1] if len(functions) > 1 else None
        return TorchSystem(functions[0], snes if self.scheme.implicit else None, vec, self.mass, nonstiff)

    def _title(self) -> str:
        scheme = self.scheme
        return f"ordinary equation, method {scheme.name} (order {scheme.order}; {scheme.stability})"

    def backprop(self, y0: Tensor, t: Tensor | None) -> Tensor:
        """The same steps on autograd's graph; y at the outputs, (T, d). Collective.

        Adaptive steps are found first, without a graph, and frozen; f draws the same random numbers again.
        """
        limit: StepLimitError | None = None
        if (output_steps := self._output_steps()) is None:
            begin = generator_states(y0.device)
            with torch.no_grad():
                _, run = self.solved(y0.detach())
            if self.draws:
                set_generator_states(y0.device, begin)
            times, outputs, limit = run.sweep.trajectory.times, run.outputs, run.limit
        else:
            times = StepTimes(self.times, self.steps_between, open_end=self.open_end)
            outputs = Outputs(self.times, y0.detach(), output_steps, filled=True)
            self.stats.steps = times.steps
        system = self.bare_system(y0)
        anchors = None if t is None else t.double().cpu()
        y = backprop(self.scheme, times, outputs, GraphSystem(system), y0, anchors)
        self.stats.count("forward", system.evaluations)
        self.stats.count_iterations(system)
        if limit is not None and y.requires_grad:
            why = str(limit)
            y.register_hook(lambda _: _refuse_early_end(why))  # type: ignore[no-untyped-call] # a hook outlives its graph
        return y

    def tangent(self, y0: Tensor, y0_dot: Tensor, theta_dot: Sequence[Tensor]) -> Tensor:
        """The tangents of y at the outputs, (T, d), along those of y0 and the parameters; fixed steps. Collective."""
        outputs = self._output_steps()
        assert outputs is not None, "steps that are found would change with the inputs"
        times = StepTimes(self.times, self.steps_between)
        found = tangent_sweep(self.scheme, times, self.bare_system(y0), y0, y0_dot, theta_dot, outputs)
        return torch.stack([found[n] for n in outputs])

    def bare_system(self, y0: Tensor) -> TorchSystem:
        """f's parts with a solver of their own, outside any TS. Collective."""
        functions = self.functions(y0)
        return self._system(functions, *bare_solver(functions[0], self.prefix, implicit=self.scheme.implicit))

    # -- the backward pass ---------------------------------------------------------------------------------------

    def backward(self, run: OneStepRun, y_bar: Tensor, needed: Sequence[bool]) -> tuple[Bars, Bars]:
        refuse_early_end(run)
        run.system.silence()  # the TS is gone, and with it the callbacks of the SNES, which may solve stages again
        times = bool(needed[1])

        def adjoint(trajectory: Trajectory, theta_bar: ParameterBar) -> AdjointSweep:
            return AdjointSweep(
                trajectory, run.system, run.outputs, y_bar, theta_bar, times=times, marks=run.sweep.marks
            )

        bars, theta_bar = self.reverse(run, adjoint)
        t_bar = torch.tensor(bars.t, dtype=torch.float64) if times else None
        return [bars.y0, t_bar], self.peers.call(theta_bar.finish, self.parameters)


def refuse_early_end(run: OneStepRun) -> None:
    """Raise PfdeError where the forward pass did not come to its end."""
    if run.limit is not None:
        _refuse_early_end(str(run.limit))


def _refuse_early_end(why: str) -> None:
    raise PfdeError(f"the forward pass ended early, so it has no gradient: {why}; detach what it returned")
