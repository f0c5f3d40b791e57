"""Methods and gradients with which events are sought."""

import torch
from torch import Tensor

import pfde

D = torch.float64
HOW = {
    "state": pfde.Discrete(),
    "graph": pfde.Discrete(store="graph"),
    "online": pfde.Discrete(schedule=pfde.Online(2, leaf=2)),
    "symplectic": pfde.Symplectic(),
    "backprop": pfde.Backprop(),
}
FORMS = {
    "dopri5": {"method": "dopri5"},
    "bosh3": {"method": "bosh3", "rtol": 1e-6, "atol": 1e-6},
    "dopri8": {"method": "dopri8", "options": {"first_step": 0.5}},  # the rule's first error estimate is rounding
    "rk4": {"method": "rk4", "step_size": 0.07},
    "dopri5 fixed": {"method": "dopri5", "step_size": 0.07},
    "cn": {"method": "cn", "step_size": 0.07},
    "esdirk4": {"method": "esdirk4", "rtol": 1e-5, "atol": 1e-6},
}


def number(value: float, *, grad: bool = True) -> Tensor:
    return torch.tensor(value, dtype=D, requires_grad=grad)
