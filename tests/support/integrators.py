"""A model solved by PETSc's own integrators."""

import torch

from pfde.petsc.problem import PetscProblem
from pfde.petsc.setting import parse_method
from pfde.solving.autograd import Solve
from pfde.solving.stats import Stats
from pfde.system.layout import StateLayout
from pfde.system.peers import Peers

DOUBLE = torch.float64
TIMES = [0.1, 0.3, 0.6, 1.0]
STEP = 0.1
LAYOUT = StateLayout((torch.Size([3]),), False)
COTANGENT = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1], [-0.4, 1.3, 0.9], [2.0, 0.1, -0.6]], dtype=DOUBLE)


class Model:
    """f = stiff + nonstiff, nonlinear in y, dependent on t and two parameters."""

    def __init__(self, W, b):
        self.W, self.b = W, b

    def stiff(self, t, y):
        return -2 * y + torch.tanh(self.W @ y) * torch.cos(t)

    def nonstiff(self, t, y):
        return torch.sin(t) * self.b * torch.sin(y) + self.W[0]

    def __call__(self, t, y):
        return self.stiff(t, y) + self.nonstiff(t, y)


def inputs():
    torch.manual_seed(3)
    y0, W, b = torch.randn(3, dtype=DOUBLE), 0.6 * torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    return [x.requires_grad_() for x in (y0, W, b)]


def new_stats():
    return Stats("of a test")


def solve(method, func, y0, parameters=(), times=TIMES, step_size=STEP, tolerance=1e-9, layout=LAYOUT, **kwargs):
    problem = PetscProblem(
        method=parse_method(method),
        func=func,
        layout=layout,
        times=tuple(times),
        parameters=tuple(parameters),
        **{
            "step_size": step_size,
            "rtol": tolerance,
            "atol": tolerance,
            "options_prefix": "",
            "peers": Peers(None),
            "stats": new_stats(),
            "dtype": y0.dtype,
            "device": y0.device,
        }
        | kwargs,
    )
    return Solve.apply(problem, 1, y0, *parameters) if problem.needs_gradient(y0) else problem.integrate(y0)


def loss(y):
    return (COTANGENT * y).sum() + (y[-1] ** 2).sum()


def gradient(y, at, **kwargs):
    return torch.autograd.grad(loss(y), at, **kwargs)


def difference(found, expected):
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, expected, strict=True))
