"""What is measured: one problem, and the cases, each one solver in one setting.

    D^alpha y = f(y),   f = Linear(64, 64) - tanh - Linear(64, 64),   batch 128, float32, alpha = 0.6, t in [0, 1]

A case runs forward and backward once: from y0 and the parameters to a loss and its gradient in both. Its *floor* is
what no solver that keeps states only can go below, evaluations x steps x (f without graph + f with graph + its vjp in
y and the parameters); its *buffers* are the N x d arrays that the case is promised to need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, WIDTH = 128, 64
ROW = BATCH * WIDTH * 4  # bytes of one state
ALPHA = 0.6
MEMORY_TARGET = 1.3  # of the buffers
LONG_STEPS = 1024  # from here on the time target is the stricter one
TOLERANCE = 1e-7  # of the compressed history, rounding level in float32
SNAPSHOTS = 20
MB = 1e6


class VectorField(nn.Module):
    """f(t, y) of the benchmark."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y)))


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    library : "pfde", or "torchfde" (imported where it can be)
    method : as in `method=`
    gradient : pfde: "state", "stages", "graph" (of Discrete), "backprop"; torchfde: "backprop", "adjoint"
    steps : N
    outputs : the loss reads "last", or "all" N + 1 outputs, through a given cotangent
    learn_alpha : whether alpha requires a gradient
    evaluations : of f per step, for the floor
    buffers : the N x d arrays of the memory promise, 0 where nothing is promised
    target : whether time and memory have one
    history : "default" (history=None), or "exponentials", SumOfExponentials(TOLERANCE)
    schedule : "store-all", or "revolve", Revolve(SNAPSHOTS)
    """

    library: str
    method: str
    gradient: str
    steps: int
    outputs: str = "last"
    learn_alpha: bool = False
    evaluations: int = 1
    buffers: int = 0
    target: bool = False
    history: str = "default"
    schedule: str = "store-all"

    @property
    def time_target(self) -> float:
        """The CPU time it may take, in floors: issue 2's, and from N = 1024 on issue 3's."""
        return 1.25 if self.steps >= LONG_STEPS else 2.0

    @property
    def name(self) -> str:
        """Unique; what --only is matched against."""
        extras = [*(["alpha"] if self.learn_alpha else []), *(["all"] if self.outputs == "all" else [])]
        extras += [x for x in (self.history, self.schedule) if x not in ("default", "store-all")]
        return "-".join([self.library, self.method, self.gradient, *extras, str(self.steps)])

    @property
    def equals(self) -> tuple[object, ...]:
        """Cases that agree in this compute the same gradient, to rounding."""
        return self.method, self.steps, self.outputs


def all_cases(quick: bool) -> list[Case]:
    """The rows of the tables; with `quick` a small part that touches every kind."""
    cases: list[Case] = []
    for steps in (32,) if quick else (32, 128, 1024):
        for method, evaluations in (("euler", 1), ("pece", 2)):
            # store="stages" differs from "state" for pece only
            for gradient, buffers in (("state", 2), ("stages", 3), ("graph", 0), ("backprop", 0)):
                if gradient != "stages" or method == "pece":
                    promised = gradient in ("state", "stages")
                    cases.append(
                        Case("pfde", method, gradient, steps, evaluations=evaluations, buffers=buffers, target=promised)
                    )
            cases.append(Case("pfde", method, "state", steps, learn_alpha=True, evaluations=evaluations, buffers=2))
            cases.append(Case("torchfde", method, "backprop", steps, evaluations=evaluations))
            if method == "euler":
                cases.append(Case("torchfde", method, "adjoint", steps))
    for steps in (32,) if quick else (1000,):
        for method, evaluations in (("euler", 1), ("pece", 2)):
            for gradient, buffers in (("state", 2), ("backprop", 0)):
                cases.append(Case("pfde", method, gradient, steps, "all", evaluations=evaluations, buffers=buffers))
    for steps in (8,) if quick else (32, 128):
        cases.append(Case("pfde", "trapezoid", "state", steps, buffers=2))
    for steps in (256,) if quick else (10_000,):
        # A compressed history keeps its own rows: the trajectory is a buffer of states, for pece one of predictors too.
        for method, evaluations in (("euler", 1), ("pece", 2)):
            where = ("pfde", method, "state", steps, "last", False, evaluations)
            cases.append(Case(*where, buffers=2, target=not quick))
            cases.append(Case(*where, buffers=evaluations, target=not quick, history="exponentials"))
            cases.append(Case(*where, history="exponentials", schedule="revolve"))
    return cases


class Problem:
    """f, y0 and what a solve of a case is, ready to run."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.f = VectorField()
        self.y0 = torch.randn(BATCH, WIDTH).requires_grad_()
        self.parameters = tuple(self.f.parameters())
        self._time = torch.zeros(())
        self._v = torch.randn(BATCH, WIDTH)

    def floor(self, evaluations: int) -> None:
        """evaluations x (f without graph + f with graph + its vjp in y and the parameters)."""
        f, time, v, parameters = self.f, self._time, self._v, self.parameters
        y0 = self.y0.detach()
        for _ in range(evaluations):
            with torch.no_grad():
                f(time, y0)
            y = y0.detach().requires_grad_()
            torch.autograd.grad(f(time, y), (y, *parameters), v)

    def gradient(self) -> Tensor:
        """dL/d(y0, parameters) of the last backward pass, flat."""
        return torch.cat([x.grad.flatten() for x in (self.y0, *self.parameters) if x.grad is not None])

    def clear(self) -> None:
        """Forget the gradients."""
        self.y0.grad = None
        self.f.zero_grad()


def solver(case: Case, problem: Problem) -> Callable[[int], tuple[Tensor, object]]:
    """steps -> (y, stats): the forward pass. y is the last state, or all outputs. Raises ImportError."""
    if case.library == "torchfde":
        return _torchfde(case, problem)
    import pfde

    gradient: Any = pfde.Backprop()
    if case.gradient != "backprop":
        schedule = pfde.Revolve(SNAPSHOTS) if case.schedule == "revolve" else pfde.StoreAll()
        gradient = pfde.Discrete(store=case.gradient, schedule=schedule)
    history = pfde.SumOfExponentials(TOLERANCE) if case.history == "exponentials" else None
    alpha = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True) if case.learn_alpha else ALPHA

    def solve(steps: int) -> tuple[Tensor, object]:
        every = case.outputs == "all"
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64) if every else torch.tensor([0.0, 1.0])
        solution = pfde.solve(
            problem.f,
            problem.y0,
            t,
            alpha,
            method=case.method,
            step_size=1 / steps,
            history=history,
            gradient=gradient,
        )
        return (solution.y if every else solution.y[-1]), solution.stats

    return solve


def _torchfde(case: Case, problem: Problem) -> Callable[[int], tuple[Tensor, object]]:
    import torchfde

    # its names: direct backprop through "predictor" (euler here) and "corrector" (pece); adjoint of "predictor-f"
    adjoint = case.gradient == "adjoint"
    method = "predictor-f" if adjoint else {"euler": "predictor", "pece": "corrector"}[case.method]
    integrate = torchfde.fdeint_adjoint if adjoint else torchfde.fdeint

    def solve(steps: int) -> tuple[Tensor, object]:
        return integrate(problem.f, problem.y0, ALPHA, t=1.0, step_size=1 / steps, method=method), None

    return solve
