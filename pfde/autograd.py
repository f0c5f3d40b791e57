"""The bridge to torch.autograd: one Function whose forward is a TS solve and whose backward is the adjoint sweep.

    forward:  (alpha, y0, t, theta) -> y at the output steps  TS.solve -> forward sweep -> trajectory, snapshots
    backward: y_bar -> (alpha_bar, y0_bar, t_bar, theta_bar)  adjoint sweep, with what the schedule computes again

The run belongs to the graph node of one solve: two pending solves share nothing. A backward pass spends it; a
second one (retain_graph=True) computes it anew, by the same steps, so that its gradient is bitwise the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gradients import Discrete
from .problem import Problem


class FractionalSolve(torch.autograd.Function):
    """y at the output steps, (len(outputs), d), as a differentiable function of (alpha, y0, ends, *parameters).

    ends : (2,), t_0 and t_N, between which the grid is uniform; None where t requires no gradient
    """

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, alpha: Tensor, y0: Tensor, ends: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        """Solve, and keep what the backward pass needs."""
        assert isinstance(problem.gradient, Discrete)
        y, ctx.run, ctx.system = problem.integrate(alpha, y0, problem.gradient, ends=ends is not None)
        ctx.problem = problem
        ctx.ends = None if ends is None else ends.detach()
        ctx.save_for_backward(alpha, y0, *parameters, *problem.frozen)  # torch refuses if one is changed in place
        kind = y0.device.type
        ctx.autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        return y

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        """The adjoint sweep."""
        problem: Problem = ctx.problem
        alpha = problem.peers.call(_saved_alpha, ctx)
        with ctx.autocast:  # f is evaluated as in the forward pass
            alpha_bar, y0_bar, ends_bar, theta_bar = problem.reverse(
                ctx.run, ctx.system, y_bar, alpha=ctx.needs_input_grad[1], ends=ctx.needs_input_grad[3]
            )
        if alpha_bar is not None:
            alpha_bar = alpha_bar.to(alpha).reshape(alpha.shape)
        if ends_bar is not None:
            ends_bar = ends_bar.to(ctx.ends)
        return None, alpha_bar, y0_bar, ends_bar, *theta_bar


def _saved_alpha(ctx: Any) -> Tensor:
    """alpha, once it is sure that the backward pass may run. Raises RuntimeError."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through pfde.Discrete is not implemented: use "
            "gradient=pfde.Backprop() with an explicit method"
        )
    return ctx.saved_tensors[0]
