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
PetscName = Literal[
    "petsc:rk:1fe",
    "petsc:rk:2a",
    "petsc:rk:2b",
    "petsc:rk:4",
    "petsc:rk:3bs",
    "petsc:rk:3",
    "petsc:rk:5f",
    "petsc:rk:5dp",
    "petsc:rk:5bs",
    "petsc:rk:6vr",
    "petsc:rk:7vr",
    "petsc:rk:8vr",
    "petsc:arkimex:1bee",
    "petsc:arkimex:a2",
    "petsc:arkimex:l2",
    "petsc:arkimex:ars122",
    "petsc:arkimex:2c",
    "petsc:arkimex:2d",
    "petsc:arkimex:2e",
    "petsc:arkimex:prssp2",
    "petsc:arkimex:3",
    "petsc:arkimex:bpr3",
    "petsc:arkimex:ars443",
    "petsc:arkimex:4",
    "petsc:arkimex:5",
    "petsc:theta:0.5",
    "petsc:theta:1.0",
    "petsc:beuler",
    "petsc:cn",
]
"""A theta method of another theta: `pfde.extend.petsc_method("petsc:theta:0.6")`."""

CaputoMethod = CaputoName | Scheme
OrdinaryMethod = OneStepName | PetscName | OneStep | Tableau | AdditiveTableau | PetscMethod
Method = CaputoMethod | OrdinaryMethod
