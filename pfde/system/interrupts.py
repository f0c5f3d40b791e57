"""What Python code raises inside PETSc comes out of it as it was raised.

A callback that raises makes PETSc's C return with an error code, of which petsc4py makes a `PETSc.Error` with the
exception as its cause. Callbacks guard what they call (`base.Failure`), but Ctrl-C, or any signal whose handler raises,
may come between two lines outside of the guard: in the callback itself, or where PETSc destroys a Python context.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import PfdeError
from .start import PETSc


@contextmanager
def as_raised() -> Iterator[None]:
    """Raise, for an error that PETSc has made of another exception, that exception."""
    handled = sys.exc_info()[1]  # the caller may be handling an exception, which is none of ours
    original: BaseException | None = None
    try:
        yield
    except (PETSc.Error, PfdeError) as error:
        original = origin(error, handled)
        if original is error:
            raise
    try:
        if original is not None:
            raise original
    finally:
        del original  # else it and its traceback would keep each other, and all the solve holds, alive


def origin(error: BaseException, handled: BaseException | None) -> BaseException:
    """The exception behind an error of PETSc's, or of ours raised from one of PETSc's; else the error itself."""
    found: BaseException = error
    while isinstance(found, PETSc.Error) or (isinstance(found, PfdeError) and isinstance(found.__cause__, PETSc.Error)):
        before = found.__cause__ or found.__context__
        if before is None or before is handled:
            return error
        found = before
    return found
