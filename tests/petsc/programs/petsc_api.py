"""Runs of the PETSc API that need a process of their own, started by test_petsc_api: `help`, or `ranks`."""

import sys
import weakref

import petsc4py
from mpi4py import MPI  # noqa: F401  before PETSc, which would start MPI so that waiting ranks keep their cores

petsc4py.init(sys.argv)
import torch  # noqa: E402
from petsc4py import PETSc  # noqa: E402

import pfde  # noqa: E402
from pfde.ts import FractionalTS, adjoint_solve  # noqa: E402

COMM = PETSc.COMM_WORLD


def rhs(ts, t, u, f):
    f.setArray(-u.array_r)


def failing(ts, t, u, f):
    if COMM.rank == 0 and t > 0.25:
        raise RuntimeError("on one rank")
    rhs(ts, t, u, f)


def jacobian(ts, t, u, matrix, preconditioner):
    for i in range(*preconditioner.getOwnershipRange()):
        preconditioner.setValue(i, i, -1.0)
    preconditioner.assemble()


def solve(ts, function=rhs, *, adjoint=False):
    u = PETSc.Vec().createMPI(6, comm=COMM)
    u.set(1.0)
    matrix = PETSc.Mat().createAIJ((6, 6), nnz=1, comm=COMM)
    matrix.setUp()
    ts.setRHSFunction(function, u.duplicate())
    ts.setRHSJacobian(jacobian, matrix, matrix)
    ts.setTime(0.0)
    ts.setTimeStep(0.25)
    ts.setMaxTime(1.0)
    ts.setFromOptions()
    ts.solve(u)
    if adjoint:
        ts.setCostGradients([u.copy()])
        adjoint_solve(ts)


def show_help():
    for _ in range(2):
        solve(PETSc.TS().create(COMM))
        y0 = torch.ones(2, dtype=torch.float64)
        pfde.fdeint(lambda t, y: -y, y0, torch.linspace(0, 1, 5), 0.5, options_prefix="model_")


def ranks():
    contexts = []
    for method in ("euler", "trapezoid"):
        for k in range(4):
            ts = PETSc.TS().createPython(FractionalTS(0.6, method), comm=COMM)
            contexts.append(weakref.ref(ts.getPythonContext()))
            solve(ts, adjoint=k % 2 == 1)
            if k < 2:
                ts.destroy()
            del ts  # collected by PETSc, with other garbage
    PETSc.garbage_cleanup(COMM)
    lines = [f"{COMM.rank} alive {sum(c() is not None for c in contexts)}"]
    try:
        solve(PETSc.TS().createPython(FractionalTS(0.6, "euler"), comm=COMM), failing)
    except PETSc.Error as error:
        while error.__cause__ is not None:
            error = error.__cause__
        text = f": {error}" if isinstance(error, RuntimeError) and COMM.rank == 0 else ""
        lines.append(f"{COMM.rank} raised {type(error).__name__}{text}")
    PETSc.Sys.syncPrint("\n".join(lines), comm=COMM, flush=True)


if __name__ == "__main__":
    {"help": show_help, "ranks": ranks}[sys.argv[1]]()
