"""From a problem to y: what the engines of pfde's own methods do alike once they have made one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..system.petsc_options import solver_options
from .autograd import P, Solvable, differentiated
from .initial_value import InitialValueProblem
from .repeats import Repeats, rests, stay
from .request import Request


def require_same(
    request: Request, problem: InitialValueProblem, options: Mapping[str, Any], others: Mapping[str, Any]
) -> None:
    """Raise ValueError on every rank where the ranks have been asked for different solves. Collective.

    options : of PETSc
    others : what the engine has beside what all have, by what an error is to call it
    """
    request.peers.same(
        {
            "gradient": problem.gradient.signature,
            "the dtype of y0": request.flat.dtype,
            "the kind of device of y0": request.flat.device.type,
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "options": dict(options),
            "options_prefix": request.options_prefix,
            **others,
        }
    )


def execute(
    problem: P,
    y0: Tensor,
    inputs: tuple[Tensor | None, ...],
    repeats: Repeats,
    options: Mapping[str, Any],
    *,
    solvable: Callable[[P], Solvable] | None = None,
) -> Tensor:
    """y at the distinct times, (T, d) or (T, *shape), on the graph that is called for. Collective.

    inputs : beside y0
    options : of PETSc, for this solve
    solvable : see `differentiated`
    """
    if rests(repeats, problem.layout):
        return stay(problem, y0, repeats, inputs)
    with solver_options(options, problem.options_prefix, problem.peers) as prefix, problem.autocast.suspended():
        return differentiated(replace(problem, private_prefix=prefix), y0, *inputs, solvable=solvable)
