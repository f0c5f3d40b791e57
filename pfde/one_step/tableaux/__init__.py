"""The Runge-Kutta tableaux by name. What one is: `tableau`; coefficients: `explicit`, `implicit`, any other file here.

A tableau is made, and its order conditions checked, when it is first asked for.
"""

from ...registry import discover
from .tableau import ADDITIVE, TABLEAUX, AdditiveTableau, Tableau

__all__ = ["ADDITIVE", "TABLEAUX", "AdditiveTableau", "Tableau"]

discover(__name__, __path__)
