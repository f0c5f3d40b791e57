"""The steps of a one-step method on autograd's graph: the oracle of its discrete adjoint, and the baseline.

The steps are those of a forward sweep that has been done before, with the same times; memory is that of all stages'
graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..system.base import OneStepping
from .methods.base import OneStep
from .methods.sums_of_slopes import no_carry
from .outputs import Outputs, on_graph
from .times import StepTimes


def backprop(
    scheme: OneStep, times: StepTimes, outputs: Outputs, system: OneStepping, y0: Tensor, t: Tensor | None
) -> Tensor:
    """The outputs, (T, d), on the graph of y0, what f uses, and of the output times t, (T,) float64, where given.

    `system` evaluates f on the graph (`system.torch_system.GraphSystem`).
    """
    y, carry = y0, no_carry(y0.detach())
    found = {output.i: y0 for output in outputs.by_step.get(0, ())}
    for n in range(1, times.steps + 1):
        at = times.interval(n) if t is None else times.on_graph(n, t)
        step = scheme.step(system, at, y, carry=carry)
        inside = [output for output in outputs.by_step.get(n, ()) if output.theta is not None]
        if inside:
            step = scheme.complete(system, at, step, dense=True)
        found |= on_graph(outputs, scheme, at, y, step, None if times.open_end else t)
        y, carry = step.y, step.carry
    return torch.stack([found[i] for i in range(outputs.reached)])
