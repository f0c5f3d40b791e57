"""Events for PETSc's -log_view: where a solve's time goes, by forward sweep, history and adjoint sweep."""

from __future__ import annotations

from functools import cache
from typing import Any

from .start import PETSc


@cache
def event(name: str) -> Any:
    """The PETSc log event of this name, a context manager."""
    return PETSc.Log.Event(name)
