"""A solve as it was asked for: all arguments of the API, spelled out once.

`fdeint`, `odeint`, `odeint_event`, `solve`, the blocks and the gradient battery fill a request, an engine makes a
problem of it. What does not depend on the engine is checked when the request is made; what does, by the engine. A
request of a solve that ranks share is made with `Request.together`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..system.autocast import Autocast, autocast_now
from ..system.layout import StateLayout
from ..system.peers import Peers
from .arguments import check_parameters, check_prefix, check_state, check_surroundings


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The arguments of one solve, named as in the API, which describes them.

    least_steps : of a method with a history, where step_size is None

    Raises ValueError, TypeError or RuntimeError for what no engine takes.
    """

    func: Callable[[Tensor, Any], Any]
    y0: Any
    t: Any
    method: Any
    alpha: Any = 1.0
    step_size: Any = None
    gradient: Any = None
    history: Any = None
    params: Any = None
    rtol: Any = 1e-7
    atol: Any = 1e-9
    mass: Any = None
    options: Any = None
    options_prefix: str = ""
    comm: Any = None
    least_steps: int = 1

    def __post_init__(self) -> None:
        check_surroundings()
        _ = self.state, self.parameters
        check_prefix(self.options_prefix)

    @staticmethod
    def together(**arguments: Any) -> Request:
        """A request that all ranks of comm make, or none. Collective."""
        return Peers(arguments.get("comm")).call(Request, **arguments)

    @cached_property
    def peers(self) -> Peers:
        """The ranks that share the state."""
        return Peers(self.comm)

    @cached_property
    def state(self) -> tuple[StateLayout, Tensor]:
        """The layout of y0, and y0 flat, (d,), on its graph."""
        return check_state(self.y0)

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors of func that require a gradient."""
        return check_parameters(self.func, self.params)

    @property
    def layout(self) -> StateLayout:
        """Of the state."""
        return self.state[0]

    @property
    def flat(self) -> Tensor:
        """y0, (d,), on its graph."""
        return self.state[1]

    @property
    def autocast(self) -> Autocast:
        """torch.autocast as func is to see it."""
        return autocast_now(self.flat.device)

    @property
    def moving(self) -> Tensor | None:
        """t, where it requires a gradient."""
        return self.t if isinstance(self.t, Tensor) and self.t.requires_grad else None
