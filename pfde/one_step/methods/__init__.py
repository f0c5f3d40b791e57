"""One-step methods: what a step and its transpose are (`base`), explicit and diagonally implicit Runge-Kutta methods.

`METHODS` has them by the names that `method=` takes, each made, and its tableau checked, when it is first asked for.
Tests and the documentation's tables iterate it. To add a Runge-Kutta method, register its tableau (`tableaux`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial

from ...registry import Registry
from ..tableaux import ADDITIVE, TABLEAUX, AdditiveTableau, Tableau
from .additive import Additive
from .base import OneStep
from .diagonally_implicit import DiagonallyImplicit
from .runge_kutta import RungeKutta

__all__ = ["METHODS", "OneStep", "method_of"]

METHODS: Registry[OneStep] = Registry("method")


@lru_cache(maxsize=64)
def method_of(tableau: Tableau | AdditiveTableau) -> OneStep:
    """The method of a tableau: explicit, diagonally implicit, or additive."""
    if isinstance(tableau, AdditiveTableau):
        return Additive(tableau)
    return RungeKutta(tableau) if tableau.explicit else DiagonallyImplicit(tableau)


def _named(tableaux: Mapping[str, Tableau] | Mapping[str, AdditiveTableau], name: str) -> OneStep:
    return method_of(tableaux[name])


for _tableaux in (TABLEAUX, ADDITIVE):
    for _name in _tableaux:
        METHODS.add(_name, partial(_named, _tableaux, _name))
