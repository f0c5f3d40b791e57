"""Engines: families of methods, each with its way from a request to a solution.

An engine registers itself where its folder is imported; the API asks for the one that takes a method. Three are here:
schemes with a history (`caputo`), one-step methods (`one_step`), PETSc's own integrators (`petsc`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from ..system.peers import CALL, Peers
from .gradients import Equation
from .request import Request
from .stats import Solution

Function = Literal["fdeint", "odeint"]
WHOLE_STATES = "on every rank of comm; leave ranks without a part of the state out of comm"


class Engine(ABC):
    """A family of methods.

    Class attributes
    ----------------
    function : the one of the API that takes them
    equation : what they solve
    """

    function: ClassVar[Function]
    equation: ClassVar[Equation]

    @abstractmethod
    def takes(self, method: object) -> bool:
        """Whether the method is one of these: a name, or an object."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """The names of its methods, or what they look like, for error messages."""

    @abstractmethod
    def check_method(self, method: Any) -> Any:
        """The method itself. Raises ValueError for what is none."""

    @abstractmethod
    def solve(self, request: Request) -> Solution[Any]:
        """The solution, on the graph that is called for. Collective over the request's comm."""

    def solve_event(self, request: Request, event: Any) -> tuple[Solution[Any], Any]:
        """The solution up to an event, and what has found it. Raises ValueError where the methods have no events."""
        raise ValueError(f"method {request.method!r} has no events: use a method of pfde's own, such as 'dopri5'")


ENGINES: list[Engine] = []


def register(engine: type[Engine]) -> type[Engine]:
    """Make an engine known to the API; a decorator."""
    ENGINES.append(engine())
    return engine


def engine_of(function: Function, method: object) -> Engine:
    """The engine of this function that takes the method, or the function's first, which says what it would take."""
    mine = [engine for engine in ENGINES if engine.function == function]
    return next((engine for engine in mine if engine.takes(method)), mine[0])


def solve_as(function: Function, **arguments: Any) -> Solution[Any]:
    """The solution of the request that these arguments of the API's function make. Collective over comm."""
    method = arguments["method"]
    same: dict[str, str | None] = {CALL: function}
    if sum(engine.function == function for engine in ENGINES) > 1:  # the ranks are to take the same path
        same["method"] = named(method)
    Peers(arguments["comm"]).same(same)
    return engine_of(function, method).solve(Request.together(**arguments))


def named(method: object) -> str | None:
    """The name of a method, which is the same on ranks that have been given the same one."""
    return method if method is None or isinstance(method, str) else str(getattr(method, "name", type(method).__name__))


def names_of(function: Function) -> str:
    """All that the function takes as `method`, for an error message."""
    first, *others = [", ".join(engine.names) for engine in ENGINES if engine.function == function]
    return "".join([first, *(f", or {other}" for other in others)])


def other_function(function: Function, method: object) -> Function | None:
    """The one that takes this method, if another than this does; for the hint of an error message."""
    for engine in ENGINES:
        if engine.function != function and engine.takes(method):
            return engine.function
    return None
