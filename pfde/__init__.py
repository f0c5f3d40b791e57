"""pfde: differentiate through fractional and ordinary differential equations, exactly and in bounded memory.

Importing this package loads neither torch nor PETSc nor MPI; names are resolved when first used (PEP 562), so that
`petsc4py.init(sys.argv)` still works after it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ConvergenceError, NonFiniteError, PeerError, PfdeError, ReplayError, SnapshotError
    from .gradients import Backprop, Discrete
    from .grids import graded
    from .history import Exact, ShortMemory, SumOfExponentials
    from .schedules import Online, Revolve, StoreAll
    from .solving import Solution, fdeint, solve
    from .system.peers import raise_together

_HOME = {
    "Backprop": "gradients",
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
    "Solution": "solving",
    "SumOfExponentials": "history",
    "StoreAll": "schedules",
    "fdeint": "solving",
    "graded": "grids",
    "raise_together": "system.peers",
    "solve": "solving",
}

__all__ = [
    "Backprop",
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
    "StoreAll",
    "SumOfExponentials",
    "__version__",
    "fdeint",
    "graded",
    "raise_together",
    "solve",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in ("nn", "testing", "ts"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'pfde' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "nn", "testing", "ts"])
