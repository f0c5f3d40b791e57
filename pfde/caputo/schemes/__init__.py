"""Time-stepping schemes: convolution weights and one step, with the step's tangent and transpose.

`METHODS` maps the names that `method=` takes to the schemes; tests and the documentation's tables iterate it. To add
a scheme, write its class in a file here, with `@METHODS.register(name)` above it.
"""

from ...registry import discover
from .base import METHODS, Scheme

__all__ = ["METHODS", "Scheme"]

discover(__name__, __path__)
