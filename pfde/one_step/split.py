"""A right-hand side in two parts, for the implicit-explicit methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Split(nn.Module):
    """A right-hand side in two parts, f = stiff + nonstiff, for the implicit-explicit methods ark2, ark3, ark4.

    Parameters
    ----------
    stiff, nonstiff : nn.Module or callable, (t, y) -> dy, each with its own parameters

    Called, it is their sum, so that any method takes it.
    """

    def __init__(self, stiff: Callable[[Tensor, Any], Any], nonstiff: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        for name, part in (("stiff", stiff), ("nonstiff", nonstiff)):
            if not callable(part):
                raise TypeError(f"{name} must be callable as {name}(t, y): got {type(part).__name__}")
        self.stiff, self.nonstiff = stiff, nonstiff

    def forward(self, t: Tensor, y: Any) -> Any:
        """stiff(t, y) + nonstiff(t, y)."""
        first, second = self.stiff(t, y), self.nonstiff(t, y)
        if isinstance(first, tuple | list):
            return tuple(a + b for a, b in zip(first, second, strict=True))
        return first + second
