"""PETSc, started without taking the program's signals.

PETSc's handlers would replace the program's own (a checkpoint on SIGTERM is lost), turn a closed pipe into MPI_Abort,
and print a banner wherever a process is ended by a signal, as `multiprocessing.Pool` ends its workers. So where pfde is
the one that starts PETSc, PETSc installs none, and what MPI has replaced is put back. The command line is not read;
PETSC_OPTIONS and .petscrc are. A program that has started PETSc, by `petsc4py.init(sys.argv)` or by importing
`petsc4py.PETSc`, has decided this itself: nothing is changed then.

Every module of pfde takes PETSc from here.

NOTE. MPI's transport UCX takes SIGHUP, and MPICH takes SIGUSR1, which tells it that another rank has died. What the
program had set is put back, and so is the default of SIGHUP; a handler of MPI's where the program had none stays. The
actions are copied as the system has them: Python does not know those of faulthandler, and sets its own in the main
thread only.
"""

from __future__ import annotations

import ctypes
import signal
import sys

import petsc4py

_ACTION = 512  # bytes in which a struct sigaction of any system fits
_OWN = "-no_signal_handler"


def _start() -> None:
    """Initialise PETSc; nothing where it runs already."""
    if "petsc4py.PETSc" in sys.modules:
        return
    actions = _actions()
    petsc4py.init([_OWN])
    for number, action in actions.items():
        ctypes.CDLL(None).sigaction(number, action, None)


def _actions() -> dict[int, ctypes.Array[ctypes.c_char]]:
    """What the system does at each of the signals that are to stay as they are (NOTE)."""
    found = {}
    for number in signal.valid_signals():
        if number == signal.SIGHUP or signal.getsignal(number) != signal.SIG_DFL:
            action = ctypes.create_string_buffer(_ACTION)
            if ctypes.CDLL(None).sigaction(int(number), None, action) == 0:
                found[int(number)] = action
    return found


_start()

from petsc4py import PETSc  # noqa: E402

__all__ = ["PETSc"]
