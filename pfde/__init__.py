"""pfde: differentiate through fractional and ordinary differential equations, exactly and in bounded memory.

Importing this package loads neither torch nor PETSc nor MPI; names are resolved when first used (PEP 562), so that
`petsc4py.init(sys.argv)` still works after it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import extend as extend
    from . import nn as nn
    from . import testing as testing
    from . import ts as ts
    from .api.event import odeint_event
    from .api.fdeint import fdeint
    from .api.odeint import odeint
    from .api.solve import solve
    from .caputo.graded import graded
    from .caputo.history import Exact, ShortMemory, SumOfExponentials
    from .errors import (
        ConvergenceError,
        NonFiniteError,
        PeerError,
        PfdeError,
        ReplayError,
        SnapshotError,
        StepLimitError,
    )
    from .one_step.split import Split
    from .schedules import Online, Revolve, StoreAll
    from .solving.gradients import Backprop, Continuous, Discrete, Symplectic
    from .solving.stats import Solution
    from .system.peers import raise_together

_HOME = {
    "Backprop": "solving.gradients",
    "Continuous": "solving.gradients",
    "ConvergenceError": "errors",
    "Discrete": "solving.gradients",
    "Exact": "caputo.history",
    "NonFiniteError": "errors",
    "Online": "schedules",
    "PeerError": "errors",
    "PfdeError": "errors",
    "ReplayError": "errors",
    "Revolve": "schedules",
    "ShortMemory": "caputo.history",
    "SnapshotError": "errors",
    "Solution": "solving.stats",
    "Split": "one_step.split",
    "StepLimitError": "errors",
    "SumOfExponentials": "caputo.history",
    "StoreAll": "schedules",
    "Symplectic": "solving.gradients",
    "fdeint": "api.fdeint",
    "graded": "caputo.graded",
    "odeint": "api.odeint",
    "odeint_event": "api.event",
    "raise_together": "system.peers",
    "solve": "api.solve",
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
        if name in ("nn", "testing", "ts", "extend"):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module 'pfde' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "extend", "nn", "testing", "ts"])
