"""The PETSc API: a PETSc program by options alone, and PETSc's run-time options on a torch model."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pfde
from pfde.caputo.schemes import METHODS
from support.launch import environment, launch, needs_mpiexec

ROOT = Path(__file__).parent
REACTION = ROOT / "programs" / "reaction.py"


def run(command, seconds=60, text=None):
    """stdout of a command, which must succeed within the time limit."""
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        input=text,
        timeout=seconds,
        env=environment(),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


FRACTIONAL = "-ts_type python -ts_python_type pfde.ts.FractionalTS -ksp_rtol 1e-13 -fde_alpha 0.6"
COMPRESSED = ["euler", "pece", "trapezoid", "gl"]
SETS = {
    "all methods": f"-fde_alpha 0.6 -methods {','.join(METHODS)}",
    "no options": "",
    "compressed": f"-fde_alpha 0.6 -methods {','.join(COMPRESSED)} -fde_tolerance 1e-2 -fde_snapshots 1",
}


@functools.cache
def reaction():
    """What programs/reaction.py prints on one rank, by what the options say and by method."""
    words = [*FRACTIONAL.split(), "-fde_method", "bdf2", *(f"--set={options}" for options in SETS.values())]
    results = json.loads(run([sys.executable, REACTION, *words]).splitlines()[-1])
    return dict(zip(["command line", *SETS], results, strict=True))


def all_methods():
    return reaction()["all methods"]


class TorchReaction(torch.nn.Module):
    """The right-hand side of programs/reaction.py."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor([2.0, 0.5], dtype=torch.float64))

    def forward(self, t, y):
        padded = torch.nn.functional.pad(y, (1, 1))
        coupling = padded[:-2] - 2 * y + padded[2:]
        return -self.p[0] * y - self.p[1] * y**3 + torch.sin(t) + 0.3 * coupling


def torch_reaction(method, alpha, history=None):
    f = TorchReaction()
    y0 = torch.linspace(0.5, 1.5, 7, dtype=torch.float64, requires_grad=True)
    order = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    y = pfde.fdeint(
        f, y0, torch.tensor([0.5, 1.5], dtype=torch.float64), order, method=method, step_size=0.125, history=history
    )
    cost = 0.5 * y[-1].square().sum()
    cost.backward()
    return {"cost": cost.item(), "u": y0.grad.tolist(), "p": f.p.grad.tolist(), "alpha": order.grad.item()}


def assert_same(result, expected, rtol):
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=rtol, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_petsc_program_gets_the_torch_apis_gradient(method):
    """Same equation, same scheme, other API: callbacks and assembled Jacobians against autograd's products."""
    assert_same(all_methods()[method], torch_reaction(method, 0.6), rtol=1e-10)


@pytest.mark.mpi
@needs_mpiexec
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_petsc_program_gets_the_same_gradient_on_more_ranks(ranks):
    """7 unknowns coupled through ghosts; a direct solver, since four ranks on two cores pay for every reduction."""
    direct = "-ksp_type preonly -pc_type redundant -options_left no"  # it has no use for -ksp_rtol
    methods = "pece,trapezoid,bdf2" if ranks == 2 else "beuler"
    output = launch(ranks, REACTION, *FRACTIONAL.split(), "-methods", methods, *direct.split())
    (results,) = json.loads(output.splitlines()[-1])
    assert list(results) == methods.split(",")
    for method, result in results.items():
        assert_same(result, all_methods()[method], rtol=1e-11)


def test_options_alone_choose_the_scheme():
    assert reaction()["command line"] == {"bdf2": all_methods()["bdf2"]}
    assert_same(reaction()["no options"]["default"], torch_reaction("trapezoid", 1.0), rtol=1e-10)


def test_a_compressed_history_and_snapshots_are_options_too():
    """At a tolerance that is seen in the gradient: it is that of the same compressed scheme behind the other API."""
    results = reaction()["compressed"]
    assert list(results) == COMPRESSED
    for method in COMPRESSED:
        assert_same(results[method], torch_reaction(method, 0.6, pfde.SumOfExponentials(1e-2)), rtol=1e-10)
    assert results["euler"]["alpha"] != pytest.approx(all_methods()["euler"]["alpha"], rel=1e-8)


# Scripts that find `ts` ready, of type FractionalTS, by name with their options; `attempt` prints an error's message.
WRONG = {
    "-fde_alpha 1.5": "ValueError: -fde_alpha must be in (0, 1]: got 1.5",
    "-fde_alpha nan": "ValueError: -fde_alpha must be in (0, 1]: got nan",
    "-fde_method rk4": "ValueError: -fde_method must be one of euler",
    "-fde_tolerance 5": "ValueError: tolerance must be in (0, 0.1], such as 1e-10: got 5",
    "-fde_snapshots 0": "ValueError: snapshots + on_disk must be at least 1: got 0",
    "-ts_dt 0.3": "ValueError: the time step must divide the interval: got -ts_dt 0.3",
}
SCRIPTS = {
    **{options: (options, "ts.setFromOptions()\nattempt(ts.solve, u)") for options in WRONG},
    "snapshots": (
        "",
        """from pfde.ts import FractionalTS, adjoint_solve
def gradient(schedule):
    ts = PETSc.TS().createPython(FractionalTS(0.6, "trapezoid", pfde.SumOfExponentials(1e-6), schedule))
    ts.setRHSFunction(rhs, u.duplicate()); ts.setRHSJacobian(jacobian, J, J)
    ts.setTime(0.0); ts.setTimeStep(0.05); ts.setMaxTime(1.0); ts.setFromOptions()
    start = u.duplicate(); start.set(1.0); ts.solve(start)
    bars = [u.duplicate(), u.duplicate()]
    bars[0].set(1.0); bars[1].setArray([1.0, -2.0, 0.5])
    ts.setCostGradients(bars)
    adjoint_solve(ts)
    return [b.array.tolist() for b in bars]
print(gradient(None) == gradient(pfde.Revolve(2, leaf=2)))
""",
    ),
    "what is missing": (
        "",
        """ts.setFromOptions()
attempt(pfde.ts.adjoint_solve, ts)
ts.solve(u)
attempt(pfde.ts.adjoint_solve, ts)
lam, mu = u.copy(), PETSc.Vec().createSeq(1)  # the TS borrows them
ts.setCostGradients([lam], [mu])
attempt(pfde.ts.adjoint_solve, ts)
other = PETSc.TS().create(); other.setType("rk")
attempt(pfde.ts.adjoint_solve, other)
""",
    ),
    "no Jacobian": (
        "",
        """bare = PETSc.TS().create()
bare.setRHSFunction(rhs, u.duplicate())
bare.setTime(0.0); bare.setTimeStep(0.1); bare.setMaxTime(1.0)
bare.setFromOptions()
attempt(bare.solve, u)
""",
    ),
    "max_steps": (
        "-ts_max_steps 4",
        """ts.setFromOptions()
ts.solve(u)
print(ts.getStepNumber(), ts.getConvergedReason() == PETSc.TS.ConvergedReason.CONVERGED_ITS, u.array[0])
lam = u.duplicate(); lam.set(1.0)
ts.setCostGradients([lam])
pfde.ts.adjoint_solve(ts)
print(lam.array[0])
""",
    ),
    "continued": (
        "-fde_alpha 0.5",
        """ts.setFromOptions()
ts.solve(u)
first = u.array[0]
ts.setMaxTime(2.0)
attempt(ts.solve, u)
ts.setStepNumber(0); ts.setTime(0.0); ts.setMaxTime(1.0)
u.set(1.0)
""",
    ),
    "again": (
        "-fde_alpha 0.5",
        """ts.setFromOptions()
ts.solve(u)
first = u.array[0]
ts.setStepNumber(0); ts.setTime(0.0); u.set(1.0)
ts.solve(u)
print(u.array[0] == first)
""",
    ),
}
DRIVER = """
import json, sys, petsc4py
petsc4py.init(sys.argv)
from petsc4py import PETSc
import pfde.ts

def message(error):
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"

def attempt(call, *args):
    try:
        return call(*args)
    except Exception as error:
        print(message(error))

def rhs(ts, t, u, f):
    f.setArray(-u.array_r)

def jacobian(ts, t, u, A, P):
    P.zeroEntries()
    for i in range(3):
        P.setValue(i, i, -1.0)
    P.assemble()

database = PETSc.Options()
for name, (options, body) in json.load(sys.stdin).items():
    print(f"== {name}")
    before = dict(database.getAll())
    if options:
        option, value = options.removeprefix("-").split()
        database[option] = value
    u = PETSc.Vec().createSeq(3); u.set(1.0)
    J = PETSc.Mat().createDense((3, 3)); J.setUp()
    ts = PETSc.TS().create()
    ts.setRHSFunction(rhs, u.duplicate())
    ts.setRHSJacobian(jacobian, J, J)
    ts.setTime(0.0); ts.setTimeStep(0.1); ts.setMaxTime(1.0)
    exec(body, globals())
    for option in set(database.getAll()) - set(before):  # PETSc may have given it its new name
        del database[option]
"""


@functools.cache
def in_petsc():
    """What these scripts print, by name; one after the other in one process, their options in PETSc's database."""
    base = ["-ts_type", "python", "-ts_python_type", "pfde.ts.FractionalTS", "-options_left", "no"]
    out = run([sys.executable, "-c", DRIVER, *base], text=json.dumps(SCRIPTS))
    parts = [part.partition("\n") for part in out.split("== ")[1:]]
    assert [name for name, *_ in parts] == list(SCRIPTS), out
    return {name: text for name, _, text in parts}


def test_snapshots_inside_a_petsc_program():
    """Leaves of two steps, so that states are computed again: bitwise the gradient that needs none, twice."""
    assert in_petsc()["snapshots"].split() == ["True"]


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_named(options):
    assert WRONG[options] in in_petsc()[options]


def test_adjoint_solve_says_what_is_missing():
    lines = in_petsc()["what is missing"].splitlines()
    assert len(lines) == 4
    assert "needs a completed forward solve" in lines[0]
    assert "needs cost gradients" in lines[1]
    assert "setRHSJacobianP" in lines[2]
    assert "needs a TS of type python with FractionalTS: got rk" in lines[3]


def test_an_implicit_method_without_jacobian_is_refused():
    assert "ValueError: an implicit method needs the Jacobian of the TS" in in_petsc()["no Jacobian"]


def test_max_steps_ends_the_solve_and_the_adjoint_is_of_what_was_solved():
    """Four of ten steps: y_4 of y' = -y by the trapezoid, and its derivative, (0.95 / 1.05)^4."""
    first, second = in_petsc()["max_steps"].splitlines()
    steps, reason, value = first.split()
    assert (steps, reason) == ("4", "True")
    assert float(value) == pytest.approx((0.95 / 1.05) ** 4, rel=1e-12)
    assert float(second) == pytest.approx((0.95 / 1.05) ** 4, rel=1e-12)


def test_a_second_solve_starts_anew_only_when_asked():
    """A Caputo solve cannot be continued without its memory: refused, not computed wrongly."""
    assert "cannot be continued" in in_petsc()["continued"]
    assert in_petsc()["again"].strip() == "True"


TORCH_MODEL = """
import sys, petsc4py
petsc4py.init(sys.argv)
import torch, pfde
torch.manual_seed(0)
f = torch.nn.Linear(3, 3).double()
y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
y = pfde.fdeint(lambda t, y: f(y).tanh(), y0, torch.tensor([0.0, 1.0]), 0.7, method={method!r}, step_size=0.25,
                params=list(f.parameters()), options_prefix="model_")
print("forward done", flush=True)
y[-1].sum().backward(retain_graph=True)
y[-1].sum().backward()
print("backward done", flush=True)
"""


@functools.cache
def watched():
    """What a torch model prints with PETSc's monitors, views and log, forward and afterwards."""
    options = ["-model_ts_monitor", "-model_snes_monitor", "-model_ts_view", "-log_view"]
    out = run([sys.executable, "-c", TORCH_MODEL.format(method="trapezoid"), *options])
    return out.split("forward done")


def test_monitors_see_the_forward_pass_and_only_that():
    """-ts_monitor and -snes_monitor with the solve's prefix; recomputation (a second backward) is silent."""
    forward, rest = watched()
    assert forward.count("TS (model_) dt 0.25 time") == 5
    assert "4 TS (model_) dt 0.25 time 1." in forward
    assert forward.count("0 SNES Function norm") == 4
    assert "TS (model_)" not in rest and "SNES Function norm" not in rest and "backward done" in rest


def test_ts_view_names_the_scheme():
    assert "Caputo equation, method trapezoid" in watched()[0]


def test_log_view_shows_forward_history_and_adjoint():
    lines = [line.split() for line in watched()[1].splitlines() if line.startswith("FDE")]
    counts = {name: int(count) for name, count, *_ in lines}
    assert counts == {"FDEForward": 8, "FDEHistory": 16, "FDEAdjoint": 8}  # two forward and two backward passes


@pytest.mark.parametrize("option", ["ts_type", "ts_dt", "ts_max_time", "ts_max_steps"])
def test_ts_options_that_the_arguments_decide_are_refused(option):
    with pytest.raises(ValueError, match=f"-{option} does not apply here"):
        pfde.fdeint(
            lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 5), 0.5, method="euler", options={option: "rk"}
        )
