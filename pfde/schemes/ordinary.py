"""The methods of `odeint` by name; each is constructed, and its tableau checked, when it is first asked for."""

from __future__ import annotations

from functools import cache

from .diagonally_implicit import Additive, DiagonallyImplicit
from .one_step import OneStep
from .runge_kutta import RungeKutta
from .tableaux import ADDITIVE, TABLEAUX

ODE_METHODS: tuple[str, ...] = (*TABLEAUX, *ADDITIVE)


@cache
def one_step_method(name: str) -> OneStep:
    """The method of this name, one of ODE_METHODS."""
    if name in ADDITIVE:
        return Additive(ADDITIVE[name])
    tableau = TABLEAUX[name]
    return RungeKutta(tableau) if tableau.explicit else DiagonallyImplicit(tableau)
