"""A model under test: its solve, gradient and tangent as functions of y_0, the parameters and alpha."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..api.solve import engine_for
from ..api.types import Loss
from ..caputo.engine import prepare as prepare_caputo
from ..caputo.problem import CaputoProblem
from ..one_step.arguments import check_method
from ..one_step.engine import prepare as prepare_ordinary
from ..one_step.problem import OrdinaryProblem
from ..solving.gradients import Discrete, Gradient
from ..solving.repeats import Repeats, require_entries
from ..solving.request import Request
from ..system.peers import Peers
from ..system.petsc_options import solver_options
from ..system.real import real


class Case:
    """One model with the arguments of its solve, differentiable in y0, the parameters and, where there is one, alpha.

    A method of `odeint` has no alpha (it must be 1), and its steps must be fixed, so that they do not change with what
    a Taylor test perturbs.
    """

    def __init__(self, request: Request, loss: Loss | None, seed: int) -> None:
        require_entries(request.layout, "to verify a gradient")
        self._request, self.loss, self.seed = replace(request, t=torch.as_tensor(request.t)), loss, seed
        self.layout, self.parameters, self.dtype = request.layout, request.parameters, request.flat.dtype
        self.y0 = [part.detach() for part in (request.y0 if self.layout.is_tuple else (request.y0,))]
        self._engine = engine_for(request.alpha, request.method, request.history)
        self.alpha: Tensor | None = None
        self._problem: CaputoProblem | OrdinaryProblem
        if self._engine.equation == "ordinary":
            self.method = check_method(request.method).name  # of pfde's own: no tangent goes through another
            prepared = prepare_ordinary(self._request, None)
            self._problem, self._options = prepared.problem, prepared.options
            if prepared.problem.steps_between is None:
                raise ValueError(
                    f"step_size must be given for method {self.method!r} here: adaptive steps would change with the "
                    "inputs"
                )
            self.steps = sum(prepared.problem.steps_between)
            _require_distinct(prepared.repeats)
        else:
            asked = prepare_caputo(self._request)
            _require_distinct(asked.repeats)
            self._problem, self._options = asked.problem, asked.options
            self.method = asked.problem.scheme.name
            self.alpha, self.steps = asked.alpha.detach().double(), asked.problem.grid.steps

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh leaves with the values of y0 (its parts), and of alpha where there is one."""
        alpha = [] if self.alpha is None else [self.alpha]
        return [x.clone().requires_grad_() for x in self.y0], [x.clone().requires_grad_() for x in alpha]

    def groups(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The values of the inputs: y0, theta, alpha."""
        return self.y0, [p.detach() for p in self.parameters], [] if self.alpha is None else [self.alpha]

    def solve(self, y0: list[Tensor], alpha: list[Tensor], gradient: Gradient) -> Any:
        """y as `fdeint` or `odeint` returns it."""
        state = tuple(y0) if self.layout.is_tuple else y0[0]
        order = alpha[0] if alpha else 1.0
        return self._engine.solve(replace(self._request, y0=state, alpha=order, gradient=gradient)).y

    def functional(self, y: Any) -> Tensor:
        """J(y)."""
        if self.loss is None:
            rows = rows_of(y)
            return (random_like(rows, torch.Generator().manual_seed(self.seed)) * (rows + rows.square() / 2)).sum()
        value = self.loss(y)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"loss must return a 0-d tensor: got {value!r}; reduce it with .sum() or .mean()")
        return value

    def gradient(self, gradient: Gradient) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
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
        flat, flat_dot = (torch.cat([real(x).reshape(-1) for x in parts]) for parts in (self.y0, y0_dot))
        with torch.no_grad(), solver_options(self._options, "", Peers(None)) as prefix:
            if isinstance(self._problem, OrdinaryProblem):
                return replace(self._problem, options_prefix=prefix).tangent(flat, flat_dot, theta_dot)
            assert self.alpha is not None
            problem = replace(self._problem, options_prefix=prefix)
            return problem.tangent(flat, self.alpha, flat_dot, alpha_dot[0], theta_dot)


def _require_distinct(times: Repeats) -> None:
    """Raise ValueError where a time is repeated, or alone: the tangent has one output at each."""
    if times.rows is not None or len(times.times) == 1:
        raise ValueError(f"t must have two or more times, all different, to verify a gradient: got {times.times[:8]}")


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
    return torch.cat([real(part).reshape(len(part), -1) for part in parts], dim=1)


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of like's shape, drawn on the CPU so that a device gets the same."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
