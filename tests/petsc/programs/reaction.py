"""A PETSc program that knows nothing of torch, with ghosted neighbours on a DMDA.

    D^alpha u_i = -p_0 u_i - p_1 u_i^3 + sin t + w (u_{i-1} - 2 u_i + u_{i+1}),      cost |u(T)|^2 / 2

Everything about the scheme comes from the options database: -fde_alpha, -fde_method; with -methods a,b,c it solves once
for each. Arguments --set="OPTIONS" follow, each with options for further solves, which replace those of the scheme.

It prints a JSON list, of the command line and of each --set an object by method: cost, dL/du_0, dL/dp, dL/dalpha.
"""

import json
import sys

import petsc4py
from mpi4py import MPI  # noqa: F401  before PETSc, which would start MPI so that waiting ranks keep their cores

SETS = [word.removeprefix("--set=") for word in sys.argv if word.startswith("--set=")]
petsc4py.init([word for word in sys.argv if not word.startswith("--set=")])
import numpy as np  # noqa: E402
from petsc4py import PETSc  # noqa: E402

from pfde.ts import adjoint_solve  # noqa: E402

SIZE, COUPLING = 7, 0.3


class Reaction:
    """The callbacks, with a ghosted exchange between neighbours."""

    def __init__(self, parameters, comm):
        self.p = parameters
        self.da = PETSc.DMDA().create([SIZE], dof=1, stencil_width=1, comm=comm)
        self.local = self.da.createLocalVec()

    def function(self, ts, t, u, f):
        self.da.globalToLocal(u, self.local)
        (first, last), (ghost, _) = self.da.getRanges()[0], self.da.getGhostRanges()[0]
        padded = np.zeros(SIZE + 2)  # zero beyond both ends
        local = self.local.getArray(readonly=1)
        padded[ghost + 1 : ghost + 1 + len(local)] = local
        y, left, right = padded[first + 1 : last + 1], padded[first:last], padded[first + 2 : last + 2]
        f.setArray(-self.p[0] * y - self.p[1] * y**3 + np.sin(t) + COUPLING * (left - 2 * y + right))

    def jacobian(self, ts, t, u, matrix, preconditioner):
        y = u.getArray(readonly=1)
        first, last = preconditioner.getOwnershipRange()
        for i in range(first, last):
            preconditioner.setValue(i, i, -self.p[0] - 3 * self.p[1] * y[i - first] ** 2 - 2 * COUPLING)
            for j in (i - 1, i + 1):
                if 0 <= j < SIZE:
                    preconditioner.setValue(i, j, COUPLING)
        preconditioner.assemble()
        if matrix.handle != preconditioner.handle:
            matrix.assemble()

    def jacobian_p(self, ts, t, u, matrix):
        y = u.getArray(readonly=1)
        first, last = matrix.getOwnershipRange()
        for i in range(first, last):
            matrix.setValue(i, 0, -y[i - first])
            matrix.setValue(i, 1, -(y[i - first] ** 3))
        matrix.assemble()


def everywhere(vec):
    """All entries of a Vec, on every rank."""
    scatter, copy = PETSc.Scatter.toAll(vec)
    scatter.scatter(vec, copy, False, PETSc.Scatter.Mode.FORWARD)
    return copy.array.copy()


def solve(parameters, start, comm=PETSc.COMM_WORLD):
    """The cost and its derivatives."""
    problem = Reaction(parameters, comm)
    u = problem.da.createGlobalVec()
    first, last = u.getOwnershipRange()
    u.setArray(start[first:last])
    matrix = problem.da.createMat()
    ts = PETSc.TS().create(comm)
    ts.setRHSFunction(problem.function, u.duplicate())
    ts.setRHSJacobian(problem.jacobian, matrix, matrix)
    ts.setRHSJacobianP(problem.jacobian_p)
    ts.setTime(0.5)
    ts.setTimeStep(0.125)
    ts.setMaxTime(1.5)
    ts.setFromOptions()
    ts.solve(u)
    assert ts.getTime() == 1.5 and ts.getStepNumber() == 8
    cost = 0.5 * u.norm() ** 2
    # two costs: the second, twice the first, makes the adjoint compute the spent trajectory again
    lambdas = [u.copy(), 2 * u]
    mus = [PETSc.Vec().createMPI(2, comm=comm) for _ in lambdas]
    ts.setCostGradients(lambdas, mus)
    alphas = adjoint_solve(ts, alpha=True)
    assert np.allclose(2 * everywhere(lambdas[0]), everywhere(lambdas[1]), rtol=1e-10)
    assert np.allclose(2 * everywhere(mus[0]), everywhere(mus[1]), rtol=1e-10)
    return {
        "cost": cost,
        "u": everywhere(lambdas[0]).tolist(),
        "p": everywhere(mus[0]).tolist(),
        "alpha": alphas[0],
    }


def by_method():
    """The solves that the options ask for."""
    results = {}
    for method in options.getString("methods", options.getString("fde_method", "default")).split(","):
        if method != "default":
            options["fde_method"] = method
        results[method] = solve([2.0, 0.5], np.linspace(0.5, 1.5, SIZE))
    return results


if __name__ == "__main__":
    options = PETSc.Options()
    results = [by_method()]
    for words in SETS:
        for name in options.getAll():
            if name.startswith(("fde_", "methods")):
                options.delValue(name)
        options.insertString(words)
        results.append(by_method())
    if PETSc.COMM_WORLD.rank == 0:
        print(json.dumps(results), flush=True)
