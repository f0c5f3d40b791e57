"""pfde: differentiate through fractional and ordinary differential equations, exactly and in bounded memory.

Importing this package loads neither torch nor PETSc nor MPI; names are resolved when first used (PEP 562), so that
`petsc4py.init(sys.argv)` still works after it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import nn as nn
    from . import testing as testing
    from . import ts as ts
    from .errors import (
        ConvergenceError,
        NonFiniteError,
        PeerError,
        PfdeError,
        ReplayError,
        SnapshotError,
        StepLimitError,
    )
    from .gradients import Backprop, Continuous, Discrete, Symplectic
    from .grids import graded
    from .history import Exact, ShortMemory, SumOfExponentials
    from .initial_value import Solution
    from .ordinary import odeint, odeint_event
    from .ordinary_problem import Split
    from .schedules import Online, Revolve, StoreAll
    from .solving import fdeint, solve
    from .system.peers import raise_together

_HOME = {
    "Backprop": "gradients",
    "Continuous": "gradients",
    "ConvergenceError": "errors",
    "Discrete": "gradients",
    "Exact": "history",
    "NonFiniteError": "errors",
    "Online": "schedules",
    "PeerError": "errors",
    "PfdeError": "errors",
    "ReplayError": "errors",
    "Revolve": "schedules",
    "ShortMemory": "history",
    "SnapshotError": "errors",
    "Solution": "initial_value",
    "Split": "ordinary_problem",
    "StepLimitError": "errors",
    "SumOfExponentials": "history",
    "StoreAll": "schedules",
    "Symplectic": "gradients",
    "fdeint": "solving",
    "graded": "grids",
    "odeint": "ordinary",
    "odeint_event": "ordinary",
    "raise_together": "system.peers",
    "solve": "solving",
}

__all__ = [
    "Backprop",
    "Continuous",
    "ConvergenceError",
    "Discrete",
    "Exact",
    "NonFiniteError",
    "Online",
    "PeerError",
    "PfdeError",
    "ReplayError",
    "Revolve",
    "ShortMemory",
    "SnapshotError",
    "Solution",
    "Split",
    "StepLimitError",
    "StoreAll",
    "SumOfExponentials",
    "Symplectic",
    "__version__",
    "fdeint",
    "graded",
    "odeint",
    "odeint_event",
    "raise_together",
    "solve",
]
__version__ = "0.1.0"


if not TYPE_CHECKING:  # to a type checker it would say that every name exists, pfde.odeintt too

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(f".{_HOME[name]}", __name__), name)
            globals()[name] = value
            return value
        if name in ("nn", "testing", "ts", "ordinary"):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module 'pfde' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "nn", "testing", "ts"])
