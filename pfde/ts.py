"""The PETSc API: Caputo time stepping as a TS of type python, and its adjoint.

    -ts_type python -ts_python_type pfde.ts.FractionalTS -fde_alpha 0.6 -fde_method trapezoid

See `FractionalTS` and `adjoint_solve`, and docs/coming_from.md for a complete program.
"""

from .petsc.fractional_ts import FractionalTS, adjoint_solve

__all__ = ["FractionalTS", "adjoint_solve"]
