"""What can go wrong while solving. Mistakes in the arguments are ValueError and TypeError instead."""

from __future__ import annotations


class PfdeError(RuntimeError):
    """Base of the errors that arise while solving."""


class ConvergenceError(PfdeError):
    """A stage equation or its adjoint did not converge; the message names t, the step and the solver's reason."""


class NonFiniteError(PfdeError, FloatingPointError):
    """f returned NaN or inf; the message names t and the step."""


class StepLimitError(PfdeError):
    """Adaptive steps became too small or too many; the message names t.

    Attributes
    ----------
    t, y : the last time that was reached, and the state there (of y0's shape); None where the solve did not tell
    """

    t: float | None = None
    y: object = None


class PeerError(PfdeError):
    """Another rank of the communicator failed; raised here so that all ranks leave together."""


class SnapshotError(PfdeError):
    """A snapshot could not be written, or is not what was written; the message names the step and the file."""


class ReplayError(PfdeError):
    """A step computed again gave another state than in the forward pass; the message names it and what to do."""
