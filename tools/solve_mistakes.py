"""The cases of `record_solves` that are meant to raise: wrong arguments for every door, and solves that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from checkpoint_schedules import MultistageCheckpointSchedule, NoneCheckpointSchedule
from solve_runs import F64, block, complex_hand, event, explosion, hand, network, pair, petsc, solved, stiff
from torch import Tensor, nn

import pfde
import pfde.nn

Cases = Iterator[tuple[str, Callable[[], Any]]]

GRADED = pfde.graded(0.0, 1.0, 12, 2.0)
WIDTH = torch.ones(3, dtype=F64)


class Counting(nn.Module):
    """Keeps a count that changes its value, so that it cannot be evaluated again."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones((), dtype=F64))
        self.calls = [0]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Another f at every call."""
        self.calls[0] += 1
        return -self.rate * y * (1 + 1e-3 * self.calls[0])


def steep(t: Tensor, y: Tensor) -> Tensor:
    """Overflows in an explicit method."""
    return -(y**3) * 1e3


def mapped() -> Any:
    """A solve inside a transform of torch.func."""
    t = torch.tensor((0.0, 1.0))
    return torch.func.vmap(lambda y: pfde.fdeint(lambda t, y: -y, y, t, 0.5, step_size=0.25))(torch.ones(2, 3))


def replayed(method: str, door: Callable[..., Any], *alpha: float) -> Any:
    """func is no longer what it was when the backward pass evaluates it again."""
    t = torch.linspace(0, 1, 25, dtype=F64)
    how = pfde.Discrete(schedule=pfde.Revolve(3, leaf=5))
    door(Counting(), WIDTH.clone(), t, *alpha, method=method, gradient=how)[-1].sum().backward()


FRACTIONAL: dict[str, dict[str, Any]] = {
    "method": {"method": "nonsense"},
    "method of odeint": {"method": "rk4"},
    "alpha above 1": {"alpha": 1.2},
    "alpha 0": {"alpha": 0.0},
    "alpha learned out of range": {"alpha": 1.5, "learn": True},
    "alpha string": {"alpha": "0.5"},
    "alpha shape": {"alpha": (0.5, 0.6)},
    "alpha tuple state": {"alpha": (0.5, 0.6), "model": pair},
    "t decreasing": {"t": (0.0, 0.5, 0.25)},
    "t matrix": {"t": torch.zeros(2, 2)},
    "t whole numbers": {"t": torch.arange(3)},
    "t nan": {"t": (0.0, float("nan"))},
    "t text": {"t": "0 1"},
    "step_size does not divide": {"step_size": 0.3},
    "step_size negative": {"step_size": -0.25},
    "step_size text": {"step_size": "h"},
    "step_size too long": {"step_size": 2.0},
    "nonuniform gl": {"t": GRADED, "method": "gl", "step_size": None},
    "nonuniform moving": {"t": GRADED, "moving": True, "step_size": None},
    "nonuniform short memory": {"t": GRADED, "step_size": None, "history": pfde.ShortMemory(0.5)},
    "nonuniform algorithm": {"t": GRADED, "step_size": None, "history": pfde.Exact("fft")},
    "history kind": {"history": "exact"},
    "gradient kind": {"gradient": "discrete"},
    "gradient of odeint": {"gradient": pfde.Symplectic()},
    "option unknown": {"options": {"snes_rtool": 1e-3}},
    "option explicit": {"method": "pece", "options": {"snes_rtol": 1e-3}},
    "option with dash": {"options": {"-snes_rtol": 1e-3}},
    "option value": {"options": {"snes_rtol": [1]}},
    "options kind": {"options": "snes_rtol"},
    "option refused": {"options": {"snes_type": "ksponly"}},
    "option preconditioner": {"options": {"fde_jacobian": "matrix_free", "pc_type": "ilu"}},
    "option jacobian": {"options": {"fde_jacobian": "sparse"}},
    "option of the TS": {"options": {"ts_dt": 0.1}},
    "prefix": {"options_prefix": "-a b"},
    "params tensor": {"params": WIDTH},
    "params number": {"params": (1.0,)},
    "params forgotten": {"params": ()},
    "func": {"func": 3},
    "func shape": {"func": lambda t, y: y[0]},
    "func none": {"func": lambda t, y: None},
    "func dtype": {"func": lambda t, y: y.float()},
    "func nan": {"func": lambda t, y: y * float("nan")},
    "func raises": {"func": lambda t, y: 1 / 0},
    "y0 whole numbers": {"y0": torch.ones(3, dtype=torch.int64)},
    "y0 empty": {"y0": ()},
    "y0 text": {"y0": "y"},
    "y0 mixed": {"y0": (torch.ones(2), torch.ones(2, dtype=F64))},
    "tolerance": {"history": pfde.SumOfExponentials(1e-8), "gradient": pfde.Discrete(schedule=pfde.Revolve(memory=8))},
    "foreign for another N": {"gradient": pfde.Discrete(schedule=MultistageCheckpointSchedule(99, 3, 0))},
    "overflow": {"method": "euler", "func": steep, "t": (0.0, 3.0), "params": ()},
    "newton": {"model": stiff, "options": {"snes_max_it": 1, "snes_rtol": 1e-14}, "func": steep, "params": ()},
    "comm": {"comm": "world"},
    "rtol": {"door": pfde.solve, "method": "trapezoid", "rtol": 1e-5},
    "alpha for rk4": {"door": pfde.solve, "method": "rk4"},
    "history for rk4": {"door": pfde.solve, "method": "rk4", "alpha": 1.0, "history": pfde.Exact()},
}
ORDINARY: dict[str, dict[str, Any]] = {
    "method": {"method": "nonsense"},
    "method of fdeint": {"method": "pece"},
    "method petsc": {"method": "petsc:rosw:2p"},
    "method petsc type": {"method": "petsc:rk:9x"},
    "petsc gradient": {"method": "petsc:rk:4", "gradient": pfde.Discrete()},
    "petsc moving": {"method": "petsc:rk:4", "moving": True, "step_size": 0.25},
    "petsc option": {"method": "petsc:rk:4", "step_size": 0.25, "options": {"ts_tool": 1}},
    "split missing": {"method": "ark3"},
    "t neither": {"t": (0.0, 1.0, 0.5)},
    "step_size twice": {"method": "rk4", "step_size": 0.25, "options": {"step_size": 0.5}},
    "step_size does not divide": {"method": "rk4", "step_size": 0.3},
    "step_size too long": {"method": "rk4", "step_size": 0.5},
    "rtol negative": {"rtol": -1.0},
    "rtol and atol 0": {"rtol": 0.0, "atol": 0.0},
    "rtol shape": {"rtol": torch.ones(2)},
    "rtol parts": {"rtol": (1e-3, 1e-3)},
    "rtol requires grad": {"rtol": torch.tensor(1e-3, requires_grad=True)},
    "mass explicit": {"mass": WIDTH},
    "mass shape": {"mass": torch.ones(2), "method": "cn"},
    "mass adaptive": {"mass": WIDTH, "method": "sdirk4"},
    "mass kind": {"mass": [1.0, 1.0, 1.0], "method": "cn"},
    "mass requires grad": {"mass": WIDTH.clone().requires_grad_(), "method": "cn"},
    "mass complex": {"mass": WIDTH, "method": "cn", "model": complex_hand},
    "limits fixed": {"method": "rk4", "options": {"first_step": 0.1}},
    "limits count": {"options": {"max_num_steps": 2.5}},
    "limits order": {"options": {"min_step": 1.0, "max_step": 0.5}},
    "limits factor": {"options": {"ifactor": 0.5}},
    "on_limit": {"options": {"on_limit": "stop"}},
    "norm": {"options": {"norm": max}},
    "option unknown": {"method": "cn", "options": {"snes_rtool": 1e-3}},
    "gradient kind": {"gradient": "adjoint"},
    "gradient memory": {"gradient": pfde.Discrete(schedule=pfde.Revolve(memory="1MB"))},
    "gradient continuous": {"gradient": pfde.Continuous(method="cn")},
    "params forgotten": {"params": ()},
    "blows up": {"model": explosion, "t": (0.0, 2.0)},
    "steps": {"options": {"max_num_steps": 3}, "rtol": 1e-10},
    "overflow": {"method": "rk4", "func": steep, "t": (0.0, 1.0, 2.0, 3.0), "params": ()},
}
CLASSES: dict[str, Callable[[], Any]] = {
    "Exact": partial(pfde.Exact, "quick"),
    "SumOfExponentials": partial(pfde.SumOfExponentials, 0.0),
    "ShortMemory": partial(pfde.ShortMemory, -1.0),
    "Revolve": pfde.Revolve,
    "Revolve memory": partial(pfde.Revolve, memory="lots"),
    "Revolve leaf": partial(pfde.Revolve, 3, leaf=0),
    "Online": partial(pfde.Online, -1),
    "Discrete store": partial(pfde.Discrete, store="all"),
    "Discrete schedule": partial(pfde.Discrete, schedule=3),
    "Discrete none": partial(pfde.Discrete, schedule=NoneCheckpointSchedule()),
    "Split": partial(pfde.Split, 1, 2),
    "graded N": partial(pfde.graded, 0.0, 1.0, 0, 1.0),
    "graded r": partial(pfde.graded, 0.0, 1.0, 5, 0.5),
}


def mistakes() -> Cases:
    """Each raises; its type and its message are what is recorded."""
    for name, more in FRACTIONAL.items():
        door = {"door": pfde.fdeint, "alpha": 0.6, "step_size": 0.25}
        yield f"wrong fde {name}", partial(solved, **{"model": hand, **door, **more})
    for name, more in ORDINARY.items():
        yield f"wrong ode {name}", partial(solved, **{"model": hand, "door": pfde.odeint, **more})
    for name, made in CLASSES.items():
        yield f"wrong {name}", made
    yield "wrong vmap", mapped
    yield "wrong replay fde", partial(replayed, "euler", pfde.fdeint, 0.6)
    yield "wrong replay ode", partial(replayed, "rk4", pfde.odeint)
    disk = pfde.Discrete(schedule=pfde.Revolve(1, on_disk=2, leaf=2, directory="/nowhere/at/all"))
    more = {"alpha": 0.6, "step_size": 0.125, "history": pfde.SumOfExponentials(1e-8), "gradient": disk}
    yield "wrong directory", partial(solved, **more)
    yield "wrong event gradient", partial(event, gradient=pfde.Continuous())
    yield "wrong event t_max", partial(event, t_max=-1.0)
    yield "wrong event not found", partial(event, t_max=0.01)
    yield "wrong event function", partial(event, event_fn=3)
    yield "wrong event step", partial(event, method="rk4")
    yield "wrong block method", partial(block, pfde.nn.FDEBlock, alpha=0.5, method="dopri5")
    yield "wrong block alpha", partial(block, pfde.nn.FDEBlock, alpha=1.0, learn_alpha=True)
    yield "wrong block t", partial(block, pfde.nn.ODEBlock, network, t=(0.0, 1.0, 0.5))
    yield "wrong ts method", partial(petsc, method="rk4")
    yield "wrong ts alpha", partial(petsc, alpha=2.0)
    yield "wrong ts jacobian", partial(petsc, alpha=0.6, jacobian=False)
    yield "wrong ts jacobian p", partial(petsc, alpha=0.6, method="euler", with_p=False)
