"""The continuous adjoint, discretised: what torchdiffeq's odeint_adjoint computes, for comparison.

    y' = f(t, y, theta),   lambda' = -(df/dy)^T lambda,   theta_bar' = -(df/dtheta)^T lambda     from t_T back to t_0

with lambda(t_i) += y_bar_i at every output, y started anew from the stored output there, theta_bar(t_T) = 0, and
t_bar_i = <y_bar_i, f(t_i, y_i)>, t_bar_0 = <y_bar_0, f> - <lambda(t_0), f(t_0, y_0)> (Chen et al. 2018,
arXiv:1806.07366). It is the gradient of no discrete solution. Memory: the outputs, and one graph of f.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..solving.gradients import Continuous, Discrete
from ..solving.initial_value import Bars
from ..system.layout import StateLayout
from ..system.parameter_bar import ParameterBar
from ..system.peers import Peers
from ..system.real import real
from ..system.torch_function import TorchFunction
from .arguments import check_method, check_steps_between
from .control import Accuracy
from .methods.sums_of_slopes import inner
from .problem import OneStepRun, OrdinaryProblem, refuse_early_end


@dataclass(frozen=True, eq=False)
class _Outputs:
    """What the backward pass needs: the outputs, and whether the forward pass came to its end."""

    y: Tensor
    run: OneStepRun


@dataclass(frozen=True, eq=False)
class ContinuousProblem:
    """An ordinary problem whose backward pass is the continuous adjoint: `autograd.Solvable`."""

    problem: OrdinaryProblem

    @property
    def func(self) -> Callable[..., Any]:
        """The user's callable."""
        return self.problem.func

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What func uses and what requires a gradient."""
        return self.problem.parameters

    @property
    def peers(self) -> Peers:
        """The ranks that share the state."""
        return self.problem.peers

    @property
    def layout(self) -> StateLayout:
        """Of the state."""
        return self.problem.layout

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """A module's parameters that require no gradient."""
        return self.problem.frozen

    def forward(self, y0: Tensor, t: Tensor | None) -> tuple[Tensor, _Outputs]:
        """The outputs, (T, d), which are also all that the backward pass needs."""
        y, run = self.problem.solved(y0)
        return y, _Outputs(y.clone(), run)  # the caller may change y

    def backward(self, run: _Outputs, y_bar: Tensor, needed: Sequence[bool]) -> tuple[Bars, Bars]:
        """The cotangents of (y0, t) and of the parameters, by integration backwards. Collective."""
        problem, y = self.problem, run.y
        refuse_early_end(run.run)
        times, parameters = problem.times, problem.parameters
        function = problem.function(y[0])
        adjoint = _Adjoint(function)
        lam = torch.zeros_like(y[0])
        thetas = [torch.zeros_like(real(p), dtype=y.dtype) for p in parameters]
        t_bar = [0.0] * len(times)
        for i in range(len(times) - 1, 0, -1):
            lam = lam + y_bar[i]
            if needed[1]:
                t_bar[i] += inner(y_bar[i], function.evaluate(0, times[i], y[i]))
            _, lam, *thetas = self._back(adjoint, times[i], times[i - 1], (y[i], lam, *thetas))
        if needed[1]:
            t_bar[0] -= inner(lam, function.evaluate(0, times[0], y[0]))
        problem.stats.count("backward", function.evaluations)
        bars = [bar.view_as(real(p)).to(real(p)) for bar, p in zip(thetas, parameters, strict=True)]
        theta_bars: Bars = [
            torch.view_as_complex(bar) if p.is_complex() else bar for bar, p in zip(bars, parameters, strict=True)
        ]
        return [lam + y_bar[0], torch.tensor(t_bar, dtype=torch.float64) if needed[1] else None], theta_bars

    def _back(self, adjoint: _Adjoint, t1: float, t0: float, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The augmented state at t0 from that at t1."""
        problem, how = self.problem, self.problem.gradient
        assert isinstance(how, Continuous)
        scheme = problem.scheme
        if how.method is not None or scheme.implicit:
            scheme = check_method(how.method)
        flat = torch.cat([x.reshape(-1) for x in state])
        size = how.step_size
        if size is None and problem.steps_between is not None:  # as many steps as forward took there
            i = problem.times.index(t0)
            steps_between: tuple[int, ...] | None = (problem.steps_between[i],)
        else:
            steps_between = check_steps_between([t1, t0], size, scheme)
        accuracy = problem.accuracy
        rtol, atol = (
            mine if mine is not None else (theirs if isinstance(theirs, float) else float(theirs.min()))
            for mine, theirs in ((how.rtol, accuracy.rtol), (how.atol, accuracy.atol))
        )
        layout = StateLayout(tuple(x.shape for x in state), True)
        back = OrdinaryProblem(
            scheme=scheme,
            times=(t1, t0),
            steps_between=steps_between,
            gradient=Discrete(),
            accuracy=Accuracy(rtol, atol, accuracy.limits._replace(first_step=None)),
            layout=layout,
            func=adjoint,
            parameters=(),
            peers=problem.peers,
            options_prefix=problem.options_prefix,
            stats=replace(problem.stats),
        )
        with torch.no_grad():
            parts: tuple[Tensor, ...] = layout.unflatten(back.integrate(flat)[-1])
        return parts


class _Adjoint:
    """(t, (y, lambda, theta_bar...)) -> its derivative."""

    def __init__(self, function: TorchFunction) -> None:
        self._function = function

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, lam = state[:2]
        f = self._function.linearise(0, float(t), y)
        theta_bar = ParameterBar(len(self._function.parameters))
        y_bar = f.vjp(lam, theta_bar)
        parameter_bars = theta_bar.finish(self._function.parameters)
        bars = [
            torch.zeros_like(like) if bar is None else -real(bar).to(like)
            for bar, like in zip(parameter_bars, state[2:], strict=True)
        ]
        return f.value, -y_bar, *bars
