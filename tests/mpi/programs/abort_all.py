"""Import me: an exception that nobody catches on one rank ends all ranks at once, not at the time limit.

(`python -m mpi4py` aborts at exit only, after PETSc has waited for the other ranks in its own end.)
"""

import sys
import traceback
from types import TracebackType

from mpi4py import MPI


def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(1)


sys.excepthook = abort
