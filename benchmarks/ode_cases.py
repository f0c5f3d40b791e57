"""What the ordinary part measures: the network of `cases.py` in float64, and each solver of y' = f(y) in one setting.

    y' = f(y),   f = Linear(64, 64) - tanh - Linear(64, 64),   batch 128, float64, t in [0, 1], N equal steps

The *floor* is stages x steps x (f without graph + f with graph + its vjp in y and the parameters).

All libraries take the same N steps of 1/N, of the same formula where they have it:

    pfde         step_size=1/N; rk4 is the 3/8 rule
    torchdiffeq  rk4 (the 3/8 rule): options step_size=1/N. dopri5 is adaptive only: first_step=1/N, ifactor=1 and
                 tolerances of 1, so that every step is accepted and none grows; it still estimates the error and fits
                 its interpolant in every step, which fixed steps of pfde do not
    symplectic   torch_symplectic_adjoint. rk38: one step an interval of t, so t has N + 1 times. dopri5: as torchdiffeq
    pnode        rk4 is PETSc's "4", the classical formula; dopri5 its "5dp". -ts_adapt_type none fixes the steps, and
                 the stages are kept in memory as its README advises (-ts_trajectory_type memory, solution_only 0)

NOTE 1. t = [1.0] instead of [0.0, 1.0] for pnode: a method of petsc4py that it calls for two or more times
(getTimeSpanSolutions) is gone from the PETSc that pfde uses. One time is integrated to from 0, and is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import BATCH, WIDTH, Problem
from torch import Tensor

STATE = BATCH * WIDTH * 8  # bytes of one state
STAGES = {"rk4": 4, "dopri5": 6}  # evaluations of f in a step; the seventh of dopri5 is the first of the next step
OUTPUT_STEPS = 1024
PACKAGES = {"torchdiffeq": "torchdiffeq", "symplectic": "torch_symplectic_adjoint", "pnode": "pnode"}  # to import

Solve = Callable[[int], Tensor]  # steps -> y at the outputs that the loss reads


@dataclass(frozen=True)
class OdeCase:
    """One row of the tables.

    library : "pfde", "torchdiffeq", "symplectic" or "pnode"
    method : "rk4", "dopri5"
    gradient : pfde: "graph", "state", "stages" (of Discrete), "symplectic", "backprop"; torchdiffeq: "direct",
        "adjoint"; symplectic and pnode: "adjoint"
    steps : N
    outputs : the loss reads the "last" state, or all of "two" (the ends) or of "every" (N + 1) outputs
    """

    library: str
    method: str
    gradient: str
    steps: int
    outputs: str = "last"

    @property
    def name(self) -> str:
        """Unique; what --only is matched against."""
        outputs = [] if self.outputs == "last" else [self.outputs]
        return "-".join(["ode", self.library, self.method, self.gradient, *outputs, str(self.steps)])

    @property
    def rival(self) -> OdeCase | None:
        """What it takes turns with, besides the floor."""
        if self.outputs == "every":
            return OdeCase(self.library, self.method, self.gradient, self.steps, "two")
        if self.library != "pfde" or self.outputs != "last":
            return None
        library = {"stages": "pnode", "symplectic": "symplectic"}.get(self.gradient, "torchdiffeq")
        return OdeCase(library, self.method, "direct" if library == "torchdiffeq" else "adjoint", self.steps)


def ode_cases(quick: bool) -> list[OdeCase]:
    """The rows of the tables."""
    kinds = [("pfde", kind) for kind in ("graph", "state", "stages", "symplectic", "backprop")]
    kinds += [("torchdiffeq", "direct"), ("torchdiffeq", "adjoint"), ("symplectic", "adjoint"), ("pnode", "adjoint")]
    cases = []
    for method in ("rk4",) if quick else ("rk4", "dopri5"):
        for steps in (32,) if quick else (32, 128, 512):
            cases += [OdeCase(library, method, kind, steps) for library, kind in kinds]
    every = 64 if quick else OUTPUT_STEPS
    return [*cases, *(OdeCase("pfde", "rk4", kind, every, "every") for kind in ("state", "stages"))]


class OdeProblem(Problem):
    """The network and y0 in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.f.double()
        self.y0 = self.y0.detach().double().requires_grad_()
        self._time, self._v = self._time.double(), self._v.double()


def ode_solver(case: OdeCase, problem: OdeProblem) -> Solve:
    """The forward pass of a case. Raises ImportError."""
    return {"pfde": _pfde, "torchdiffeq": _torchdiffeq, "symplectic": _symplectic, "pnode": _pnode}[case.library](
        case, problem
    )


def _times(case: OdeCase, steps: int) -> Tensor:
    """Output times, float64."""
    return torch.linspace(0, 1, steps + 1 if case.outputs == "every" else 2, dtype=torch.float64)


def _pfde(case: OdeCase, problem: OdeProblem) -> Solve:
    import pfde

    gradients: dict[str, Any] = {"symplectic": pfde.Symplectic, "backprop": pfde.Backprop}
    make = gradients.get(case.gradient)
    gradient = pfde.Discrete(store=case.gradient) if make is None else make()  # type: ignore[arg-type]

    def solve(steps: int) -> Tensor:
        t = _times(case, steps)
        y = pfde.odeint(problem.f, problem.y0, t, method=case.method, step_size=1 / steps, gradient=gradient)
        return y[-1] if case.outputs == "last" else y

    return solve


def _frozen_steps(steps: int) -> dict[str, Any]:
    """Arguments that make an adaptive method of torchdiffeq, or of what descends from it, take steps of 1/N."""
    return {"rtol": 1.0, "atol": 1.0, "options": {"first_step": 1 / steps, "ifactor": 1.0}}


def _torchdiffeq(case: OdeCase, problem: OdeProblem) -> Solve:
    import torchdiffeq

    integrate = torchdiffeq.odeint if case.gradient == "direct" else torchdiffeq.odeint_adjoint

    def solve(steps: int) -> Tensor:
        extra = {"options": {"step_size": 1 / steps}} if case.method == "rk4" else _frozen_steps(steps)
        if case.gradient == "adjoint" and case.method != "rk4":
            extra |= {"adjoint_rtol": 1e6, "adjoint_atol": 1e6}  # theta_bar has errors beyond 1
        y = integrate(problem.f, problem.y0, _times(case, steps), method=case.method, **extra)
        return y[-1] if case.outputs == "last" else y

    return solve


def _symplectic(case: OdeCase, problem: OdeProblem) -> Solve:
    from torch_symplectic_adjoint import odeint_symplectic_adjoint

    def solve(steps: int) -> Tensor:
        if case.method == "rk4":
            t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            return odeint_symplectic_adjoint(problem.f, problem.y0, t, method="rk38")[-1]
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return odeint_symplectic_adjoint(problem.f, problem.y0, t, method=case.method, **_frozen_steps(steps))[-1]

    return solve


def _pnode(case: OdeCase, problem: OdeProblem) -> Solve:
    from petsc4py import PETSc
    from pnode import petsc_adjoint

    fixed = {"ts_adapt_type": "none", "ts_trajectory_type": "memory", "ts_trajectory_solution_only": "0"}
    solvers: dict[int, Any] = {}  # set up once for a step size, as a training loop does
    t = torch.tensor([1.0], dtype=torch.float64)  # NOTE 1

    def make(steps: int) -> Any:
        options = PETSc.Options()
        for name, value in fixed.items():
            options[name] = value
        ode = petsc_adjoint.ODEPetsc()
        ode.setupTS(problem.y0, problem.f, step_size=1 / steps, method=case.method)
        for name in fixed:
            options.delValue(name)  # pfde reads the same database
        return ode

    def solve(steps: int) -> Tensor:
        if steps not in solvers:
            solvers[steps] = make(steps)
        return solvers[steps].odeint_adjoint(problem.y0, t)[-1]

    return solve
