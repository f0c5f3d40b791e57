"""A model under test: its solve, gradient and tangent as functions of y_0, the parameters and alpha."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import ts
from ..arguments import check_alpha, check_grid, check_method, check_options, check_parameters, check_state, check_times
from ..gradients import Backprop, Discrete
from ..history import Bounded, Exact
from ..initial_value import Stats
from ..problem import Problem
from ..solving import fdeint
from ..sweeps.tangent import tangent_sweep
from ..sweeps.trajectory import Trajectory
from ..system.peers import Peers
from ..system.torch_function import TorchFunction

Func = Callable[[Tensor, Any], Any]
Loss = Callable[[Any], Tensor]


class Case:
    """One model with the arguments of its solve, differentiable in y0, the parameters and alpha."""

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
        self.scheme, self.history, self.options = check_method(method), history, options
        self.layout, flat = check_state(y0)
        self.y0 = [part.detach() for part in (y0 if self.layout.is_tuple else (y0,))]
        self.dtype = flat.dtype
        self.grid, self.outputs = check_grid(check_times(self.t), step_size, self.scheme)
        order, self.group = check_alpha(alpha, self.layout, flat.device)
        self.alpha = order.detach().double()
        self.parameters = check_parameters(func, params)
        self._keywords: dict[str, Any] = dict(
            method=method, step_size=step_size, history=history, params=params, options=options
        )

    def leaves(self) -> tuple[list[Tensor], Tensor]:
        """Fresh leaves with the values of y0 (its parts) and alpha."""
        return [x.clone().requires_grad_() for x in self.y0], self.alpha.clone().requires_grad_()

    def groups(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The values of the inputs: y0, theta, alpha."""
        return self.y0, [p.detach() for p in self.parameters], [self.alpha]

    def solve(self, y0: list[Tensor], alpha: Tensor, gradient: Discrete | Backprop) -> Any:
        """y as `fdeint` returns it."""
        state = tuple(y0) if self.layout.is_tuple else y0[0]
        return fdeint(self.func, state, self.t, alpha, gradient=gradient, **self._keywords)

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
        inputs = [*y0, *self.parameters, alpha]
        with torch.enable_grad():
            value = self.functional(self.solve(y0, alpha, gradient))
        bars = torch.autograd.grad(value, inputs, allow_unused=True)
        full = [torch.zeros_like(x) if bar is None else bar for x, bar in zip(inputs, bars, strict=True)]
        return full[: len(y0)], full[len(y0) : -1], full[-1:]

    def value(self, u: list[list[Tensor]], e: float) -> float:
        """J(y(p + e u))."""
        y0 = [x + e * d for x, d in zip(self.y0, u[0], strict=True)]
        with torch.no_grad(), _moved(self.parameters, u[1], e):
            return float(self.functional(self.solve(y0, self.alpha + e * u[2][0], Discrete())))

    def tangent(self, y0_dot: list[Tensor], theta_dot: list[Tensor], alpha_dot: Tensor) -> Tensor:
        """y' u at the outputs, (T, d)."""
        flat = torch.cat([x.reshape(-1) for x in self.y0])
        peers = Peers(None)
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
            options_prefix="",
            stats=Stats(self.scheme.name),
        )
        discretisation = problem.prepare(self.alpha, flat)
        with torch.no_grad(), ts.solver_options(check_options(self.options), "", peers):
            found = tangent_sweep(
                Trajectory(discretisation, flat, None),
                ts.bare_system(function, implicit=self.scheme.implicit),
                torch.cat([x.reshape(-1) for x in y0_dot]),
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
    """What fdeint returns as (T, d)."""
    parts = y if isinstance(y, tuple) else (y,)
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of like's shape, drawn on the CPU so that a device gets the same."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
