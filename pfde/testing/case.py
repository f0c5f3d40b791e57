"""A model under test: its solve, gradient and tangent as functions of y_0, the parameters and alpha."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from ..arguments import check_alpha, check_grid, check_method, check_options, check_parameters, check_state, check_times
from ..driver import bare_system
from ..gradients import Backprop, Discrete
from ..history import Bounded, Exact
from ..initial_value import Stats
from ..ordinary_arguments import check_monotone, check_ode_method, check_pieces
from ..ordinary_problem import Accuracy, OrdinaryProblem
from ..petsc_options import solver_options
from ..problem import Problem
from ..repeats import distinct, require_entries
from ..solving import is_ordinary, require_ordinary, solve
from ..sweeps.control import Limits
from ..sweeps.tangent import tangent_sweep
from ..sweeps.times import StepTimes
from ..sweeps.trajectory import Trajectory
from ..system.base import System
from ..system.peers import Peers
from ..system.torch_function import TorchFunction

Func = Callable[[Tensor, Any], Any]
Loss = Callable[[Any], Tensor]


def _distinct(times: list[float]) -> list[float]:
    """The times. Raises ValueError where one is repeated, or alone: the tangent has one output at each."""
    if distinct(times).rows is not None or len(times) == 1:
        raise ValueError(f"t must have two or more times, all different, to verify a gradient: got {times[:8]}")
    return times


class Case:
    """One model with the arguments of its solve, differentiable in y0, the parameters and, where there is one, alpha.

    A method of `odeint` has no alpha (it must be 1), and its steps must be fixed, so that they do not change with what
    a Taylor test perturbs.
    """

    def __init__(
        self,
        func: Func,
        y0: Any,
        t: Any,
        alpha: Any,
        method: str,
        step_size: float | None,
        history: Exact | Bounded | None,
        params: Sequence[Tensor] | None,
        options: Mapping[str, Any] | None,
        loss: Loss | None,
        seed: int,
    ) -> None:
        self.func, self.t, self.loss, self.seed = func, torch.as_tensor(t), loss, seed
        self.history, self.options = history, options
        self.layout, flat = check_state(y0)
        require_entries(self.layout, "to verify a gradient")
        self.y0 = [part.detach() for part in (y0 if self.layout.is_tuple else (y0,))]
        self.dtype = flat.dtype
        self.parameters = check_parameters(func, params)
        self.alpha: Tensor | None = None
        self._keywords: dict[str, Any] = dict(
            method=method, step_size=step_size, history=history, params=params, options=options
        )
        if is_ordinary(method):
            require_ordinary(alpha, history, method)
            self._one_step = check_ode_method(method)
            times = _distinct(check_monotone(self.t))
            pieces = check_pieces(times, step_size, self._one_step)
            if pieces is None:
                raise ValueError(
                    f"step_size must be given for method {method!r} here: adaptive steps would change with the inputs"
                )
            self._times, self._pieces = StepTimes(times, pieces), pieces
            self.steps = self._times.steps
        else:
            self.scheme = check_method(method)
            self.grid, self.outputs = check_grid(_distinct(check_times(self.t)), step_size, self.scheme)
            order, self.group = check_alpha(alpha, self.layout, flat.device)
            self.alpha, self.steps = order.detach().double(), self.grid.steps

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh leaves with the values of y0 (its parts), and of alpha where there is one."""
        alpha = [] if self.alpha is None else [self.alpha]
        return [x.clone().requires_grad_() for x in self.y0], [x.clone().requires_grad_() for x in alpha]

    def groups(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The values of the inputs: y0, theta, alpha."""
        return self.y0, [p.detach() for p in self.parameters], [] if self.alpha is None else [self.alpha]

    def solve(self, y0: list[Tensor], alpha: list[Tensor], gradient: Discrete | Backprop) -> Any:
        """y as `fdeint` or `odeint` returns it."""
        state = tuple(y0) if self.layout.is_tuple else y0[0]
        order = alpha[0] if alpha else 1.0
        return solve(self.func, state, self.t, order, gradient=gradient, **self._keywords).y

    def functional(self, y: Any) -> Tensor:
        """J(y)."""
        if self.loss is None:
            rows = rows_of(y)
            return (random_like(rows, torch.Generator().manual_seed(self.seed)) * (rows + rows.square() / 2)).sum()
        value = self.loss(y)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"loss must return a 0-d tensor: got {value!r}; reduce it with .sum() or .mean()")
        return value

    def gradient(self, gradient: Discrete | Backprop) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """dJ by group, with zeros for what J does not depend on."""
        y0, alpha = self.leaves()
        inputs = [*y0, *self.parameters, *alpha]
        with torch.enable_grad():
            value = self.functional(self.solve(y0, alpha, gradient))
        bars = torch.autograd.grad(value, inputs, allow_unused=True)
        full = [torch.zeros_like(x) if bar is None else bar for x, bar in zip(inputs, bars, strict=True)]
        last = len(full) - len(alpha)
        return full[: len(y0)], full[len(y0) : last], full[last:]

    def value(self, u: list[list[Tensor]], e: float) -> float:
        """J(y(p + e u))."""
        y0 = [x + e * d for x, d in zip(self.y0, u[0], strict=True)]
        alpha = [] if self.alpha is None else [self.alpha + e * u[2][0]]
        with torch.no_grad(), _moved(self.parameters, u[1], e):
            return float(self.functional(self.solve(y0, alpha, Discrete())))

    def moves(self, u: list[list[Tensor]], e: float) -> list[list[Tensor]]:
        """What `value` adds to p, by group: e u, rounded as p + e u is."""
        return [
            [(x + e * d) - x for x, d in zip(group, directions, strict=True)]
            for group, directions in zip(self.groups(), u, strict=True)
        ]

    def tangent(self, y0_dot: list[Tensor], theta_dot: list[Tensor], alpha_dot: list[Tensor]) -> Tensor:
        """y' u at the outputs, (T, d)."""
        flat, flat_dot = (torch.cat([_real(x).reshape(-1) for x in parts]) for parts in (self.y0, y0_dot))
        peers = Peers(None)
        with torch.no_grad(), solver_options(check_options(self.options), "", peers) as prefix:
            if self.alpha is None:
                return self._steps_tangent(flat, flat_dot, theta_dot, peers, prefix)
            return self._history_tangent(flat, flat_dot, theta_dot, alpha_dot[0], peers, prefix)

    def _steps_tangent(self, y: Tensor, y_dot: Tensor, theta_dot: list[Tensor], peers: Peers, prefix: str) -> Tensor:
        problem = OrdinaryProblem(
            scheme=self._one_step,
            times=tuple(self._times.anchors),
            pieces=self._pieces,
            gradient=Discrete(),
            accuracy=Accuracy(0.0, 0.0, Limits()),
            layout=self.layout,
            func=self.func,
            parameters=self.parameters,
            peers=peers,
            options_prefix=prefix,
            stats=Stats(self._one_step.name),
        )
        system, found = cast(System, problem.bare_system(y)), {0: y_dot}
        for n in range(1, self.steps + 1):
            at = self._times.interval(n)
            step = self._one_step.step(system, at, y)
            sources = self._one_step.stages(system, at, y, step.y, dense=False, graphs=False, rows=None)
            y, y_dot = step.y, self._one_step.tangent(system, at, sources, y_dot, theta_dot)
            found[n] = y_dot
        return torch.stack([found[n] for n in accumulate(self._pieces, initial=0)])

    def _history_tangent(
        self, flat: Tensor, flat_dot: Tensor, theta_dot: list[Tensor], alpha_dot: Tensor, peers: Peers, prefix: str
    ) -> Tensor:
        assert self.alpha is not None
        function = TorchFunction(self.func, self.layout, self.parameters, flat.dtype, flat.device, self.grid, peers)
        problem = Problem(
            scheme=self.scheme,
            grid=self.grid,
            outputs=self.outputs,
            history=self.history,
            gradient=Discrete(),
            group=self.group,
            layout=self.layout,
            func=self.func,
            parameters=self.parameters,
            peers=peers,
            options_prefix=prefix,
            stats=Stats(self.scheme.name),
        )
        found = tangent_sweep(
            Trajectory(problem.prepare(self.alpha, flat), flat, None),
            bare_system(function, implicit=self.scheme.implicit, options_prefix=prefix),
            flat_dot,
            alpha_dot.cpu().reshape(-1),
            theta_dot,
            self.outputs,
        )
        return torch.stack([found[n] for n in self.outputs])


@contextmanager
def _moved(parameters: Sequence[Tensor], directions: Sequence[Tensor], e: float) -> Iterator[None]:
    """The parameters at p + e u, and back at p bit for bit."""
    before = [p.data for p in parameters]
    try:
        for p, data, direction in zip(parameters, before, directions, strict=True):
            p.data = data + e * direction  # other storage: what the caller's graphs have saved stays valid
        yield
    finally:
        for p, data in zip(parameters, before, strict=True):
            p.data = data


def rows_of(y: Any) -> Tensor:
    """What fdeint or odeint returns as (T, d), real."""
    parts = y if isinstance(y, tuple) else (y,)
    return torch.cat([_real(part).reshape(len(part), -1) for part in parts], dim=1)


def _real(x: Tensor) -> Tensor:
    """x, a complex one as pairs of numbers."""
    return torch.view_as_real(x) if x.is_complex() else x


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of like's shape, drawn on the CPU so that a device gets the same."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
