"""Fractional and ordinary differential equations as torch modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .api.opaque import opaque
from .api.solve import LEAST_STEPS
from .api.types import CaputoMethod, OrdinaryMethod
from .caputo.arguments import as_order
from .caputo.history import History
from .solving.arguments import check_parameters, increasing_times, monotone_times
from .solving.engine import engine_of, named, solve_as
from .solving.gradients import Backprop, Discrete, Gradient

_Given = tuple[Tensor | int, ...] | None  # params= of a block; a number is a place in the registered ones


def _register(block: nn.Module, func: Callable[[Tensor, Any], Any], params: Sequence[Tensor] | None) -> _Given:
    """Make the nn.Parameters of params=, beyond func's own, the block's, as `params.0`, `params.1`, ..."""
    if params is None:
        return None
    if isinstance(params, Iterable) and not isinstance(params, Tensor | nn.Module):
        params = tuple(params)  # an iterator would serve one call only
    check_parameters(func, params)
    own = {id(p) for p in func.parameters()} if isinstance(func, nn.Module) else set()
    found = list({id(p): p for p in params if isinstance(p, nn.Parameter) and id(p) not in own}.values())
    if found:
        block.params = nn.ParameterList(found)
    place = {id(p): i for i, p in enumerate(found)}
    return tuple(place.get(id(p), p) for p in params if id(p) not in own)


def _params_of(block: nn.Module, given: _Given) -> tuple[Tensor, ...] | None:
    """params=, with the registered ones as they are now: those of a copy, or those torch.func.functional_call gives."""
    if given is None:
        return None
    registered: list[Tensor] = []
    if any(isinstance(p, int) for p in given):
        assert isinstance(block.params, nn.ParameterList)
        registered = list(block.params)
    return tuple(registered[p] if isinstance(p, int) else p for p in given)


_solve = opaque(solve_as)  # torch.compile calls it and does not trace it


class FDEBlock(nn.Module):
    """The map y(t_0) -> y(t_1) of D^alpha y = func(t, y): a layer of continuous depth with memory.

    Parameters
    ----------
    func : nn.Module or callable, (t, y) -> dy
    alpha : order in (0, 1], a number or a tensor (array, sequence) that broadcasts to y; the start value when it is
        learned
    learn_alpha : make the order a parameter, alpha = sigmoid(raw_alpha), so that it stays in (0, 1); alpha < 1 then
    t : (t_0, t_1) or more times
    return_all : return y at all times of t, (T, *y0.shape), and not at the last one only
    step_size : None divides the intervals of t into equal parts, as many as make it 100 steps or more
    params : as in `pfde.fdeint`; an nn.Parameter among them is registered, so that `parameters()` has it
    method, gradient, history, options, options_prefix, comm : as in `pfde.fdeint`

    The order is created in float64, in which the weights are computed, whatever the dtype of func.
    """

    raw_alpha: Tensor
    fixed_alpha: Tensor
    _given: _Given

    def __init__(
        self,
        func: Callable[[Tensor, Any], Any],
        *,
        alpha: Any,
        learn_alpha: bool = False,
        t: Sequence[float] | Tensor = (0.0, 1.0),
        return_all: bool = False,
        method: CaputoMethod = "trapezoid",
        step_size: float | None = None,
        gradient: Discrete | Backprop | None = None,
        history: History | None = None,
        params: Sequence[Tensor] | None = None,
        options: Mapping[str, Any] | None = None,
        options_prefix: str = "",
        comm: Any | None = None,
    ) -> None:
        super().__init__()
        self.func = func
        self.learn_alpha, self.return_all = learn_alpha, return_all
        self.t = increasing_times(t)
        engine_of("fdeint", method).check_method(method)
        self._keywords: dict[str, Any] = {
            "method": method,
            "step_size": step_size,
            "gradient": gradient,
            "history": history,
            "options": options,
            "options_prefix": options_prefix,
            "comm": comm,
        }
        self._given = _register(self, func, params)
        start = _start_order(alpha)
        if learn_alpha:
            if bool((start >= 1).any()):
                raise ValueError(
                    f"alpha must be below 1 to be learned as sigmoid(raw_alpha): got {float(start.max()):g}"
                )
            self.raw_alpha = nn.Parameter(torch.logit(start))
        else:
            self.register_buffer("fixed_alpha", start)

    @property
    def alpha(self) -> Tensor:
        """The order: a 0-d tensor, or one of alpha's shape; on the graph of raw_alpha when it is learned."""
        return torch.sigmoid(self.raw_alpha) if self.learn_alpha else self.fixed_alpha

    def forward(self, y0: Any) -> Any:
        """y at t_1, of y0's shape; at all times of t with `return_all`."""
        t = torch.tensor(self.t, dtype=torch.float64)
        params = _params_of(self, self._given)
        asked = {"func": self.func, "y0": y0, "t": t, "alpha": self.alpha, "params": params, **self._keywords}
        y = _solve("fdeint", **asked, least_steps=LEAST_STEPS).y
        return y if self.return_all else last_of(y)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        learned = ", learned" if self.learn_alpha else ""
        return f"alpha={self.alpha.detach().tolist()}{learned}, t={self.t}, method={named(self._keywords['method'])!r}"


def _start_order(alpha: Any) -> Tensor:
    start = as_order(alpha)
    if start.requires_grad:
        raise ValueError(
            "alpha requires a gradient, but the block makes a parameter of its own: use alpha=alpha.detach() with "
            "learn_alpha=True, or pfde.fdeint with your alpha"
        )
    return start.to(torch.float64, copy=True)


class ODEBlock(nn.Module):
    """The map y(t_0) -> y(t_1) of y' = func(t, y): a layer of continuous depth.

    Parameters
    ----------
    func : nn.Module or callable, (t, y) -> dy
    t : (t_0, t_1) or more times, increasing or decreasing
    return_all : return y at all times of t, (T, *y0.shape), and not at the last one only
    params : as in `pfde.odeint`; an nn.Parameter among them is registered, so that `parameters()` has it
    method, rtol, atol, step_size, gradient, options, options_prefix, comm : as in `pfde.odeint`
    """

    _given: _Given

    def __init__(
        self,
        func: Callable[[Tensor, Any], Any],
        *,
        t: Sequence[float] | Tensor = (0.0, 1.0),
        return_all: bool = False,
        method: OrdinaryMethod | None = "dopri5",
        rtol: Any = 1e-7,
        atol: Any = 1e-9,
        step_size: float | None = None,
        gradient: Gradient | None = None,
        params: Sequence[Tensor] | None = None,
        options: Mapping[str, Any] | None = None,
        options_prefix: str = "",
        comm: Any | None = None,
    ) -> None:
        super().__init__()
        self.func, self.return_all = func, return_all
        self.t = monotone_times(t)
        engine_of("odeint", method).check_method(method)
        self._keywords: dict[str, Any] = {
            "method": method,
            "rtol": rtol,
            "atol": atol,
            "step_size": step_size,
            "gradient": gradient,
            "options": options,
            "options_prefix": options_prefix,
            "comm": comm,
        }
        self._given = _register(self, func, params)

    def forward(self, y0: Any) -> Any:
        """y at t_1, of y0's shape; at all times of t with `return_all`."""
        t = torch.tensor(self.t, dtype=torch.float64)
        asked = {"func": self.func, "y0": y0, "t": t, "params": _params_of(self, self._given), **self._keywords}
        y = _solve("odeint", **asked).y
        return y if self.return_all else last_of(y)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"t={self.t}, method={named(self._keywords['method'])!r}"


def last_of(y: Any) -> Any:
    """The last row of y, or of each tensor in a tuple."""
    return tuple(part[-1] for part in y) if isinstance(y, tuple) else y[-1]
