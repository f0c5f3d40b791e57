"""The types of the API's arguments, for type checkers and editors: names of methods, states.

The names are those that the registries have; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch import Tensor

from ..caputo.schemes import Scheme
from ..one_step.methods import OneStep
from ..one_step.tableaux import AdditiveTableau, Tableau
from ..petsc.setting import PetscMethod

State = TypeVar("State", Tensor, tuple[Tensor, ...])
"""y0, and what is returned: a tensor, or a tuple of tensors."""

Func = Callable[[Tensor, Any], Any]
Loss = Callable[[Any], Tensor]

CaputoName = Literal["euler", "pece", "bdf2", "beuler", "gl", "l1", "trapezoid"]
OneStepName = Literal[
    "euler",
    "midpoint",
    "heun2",
    "ralston",
    "bosh3",
    "rk4",
    "rk4_classic",
    "fehlberg",
    "dopri5",
    "tsit5",
    "dopri8",
    "beuler",
    "cn",
    "implicit_midpoint",
    "sdirk4",
    "esdirk3",
    "esdirk4",
    "ark2",
    "ark3",
    "ark4",
]
PetscName = Literal["petsc:beuler", "petsc:cn"]

CaputoMethod = CaputoName | Scheme
OrdinaryMethod = OneStepName | PetscName | OneStep | Tableau | AdditiveTableau | PetscMethod
Method = CaputoMethod | OrdinaryMethod
