"""The Runge-Kutta tableaux by name. What one is: `tableau`; coefficients: `explicit_tableaux`, `implicit_tableaux`.

A tableau is made, and its order conditions checked, when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from . import explicit_tableaux, implicit_tableaux
from .tableau import AdditiveTableau, Tableau

__all__ = ["ADDITIVE", "TABLEAUX", "AdditiveTableau", "Tableau", "additive_tableau", "tableau"]

T = TypeVar("T")


class _Lazy(Mapping[str, T], Generic[T]):
    """Names and what they stand for, which is made, and checked, when it is first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], T]]) -> None:
        self._makers = MappingProxyType(dict(makers))
        self._made: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers  # Mapping's own would make it

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


TABLEAUX: Mapping[str, Tableau] = _Lazy({**explicit_tableaux.EXPLICIT, **implicit_tableaux.IMPLICIT})
"""The methods by name; each is made when it is first asked for, names are free."""

ADDITIVE: Mapping[str, AdditiveTableau] = _Lazy(implicit_tableaux.ADDITIVE)
"""The additive methods by name."""


def tableau(name: str) -> Tableau:
    """The tableau of that name; ValueError where there is none."""
    if name not in TABLEAUX:
        raise ValueError(f"method must be one of {', '.join(TABLEAUX)}: got {name!r}")
    return TABLEAUX[name]


def additive_tableau(name: str) -> AdditiveTableau:
    """The additive tableau of that name; ValueError where there is none."""
    if name not in ADDITIVE:
        raise ValueError(f"method must be one of {', '.join(ADDITIVE)}: got {name!r}")
    return ADDITIVE[name]
