"""torch.compile calls a solve and does not trace it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def opaque(function: F) -> F:
    """The function, which a compiled region calls as it is: `torch.compiler.disable`, once there is a compiler.

    That imports the compiler, which takes a second: not where no compiled region can be running.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    called._torchdynamo_disable = True  # type: ignore[attr-defined]
    return called  # type: ignore[return-value]
