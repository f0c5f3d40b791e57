"""The PETSc API says what it does not do; and which PETSc options a stage can be solved with, at every API.

A TS is made in this process, and PETSc's options are put into its database, as from the command line.
"""

import gc
import re
import resource
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from petsc4py import PETSc

import pfde
from pfde.ts import FractionalTS, adjoint_solve
from support.launch import environment, launch, needs_mpiexec

PROGRAM = Path(__file__).parent / "programs" / "petsc_api.py"
ALPHA = 0.6


@contextmanager
def command_line(**options):
    """PETSc's database with these options in it."""
    database = PETSc.Options()
    for name, value in options.items():
        database.setValue(name, value)
    try:
        yield
    finally:
        for name in options:
            database.delValue(name)


def rhs(ts, t, u, f):
    f.setArray(-u.array_r)


def jacobian(ts, t, u, matrix, preconditioner):
    first, last = preconditioner.getOwnershipRange()
    for i in range(first, last):
        preconditioner.setValue(i, i, -1.0)
    preconditioner.assemble()


def diagonal(size):
    matrix = PETSc.Mat().createAIJ((size, size), nnz=1, comm=PETSc.COMM_SELF)
    matrix.setUp()
    return matrix


def relaxation(method="trapezoid", *, size=3, function=rhs, with_jacobian=True, context=True):
    """(TS, u) of D^alpha u = -u, u(0) = 1, ten steps to t = 1."""
    u = PETSc.Vec().createSeq(size)
    u.set(1.0)
    ts = PETSc.TS().create(PETSc.COMM_SELF)
    if context:
        ts.createPython(FractionalTS(ALPHA, method), comm=PETSc.COMM_SELF)
    if function is not None:
        ts.setRHSFunction(function, u.duplicate())
    if with_jacobian:
        matrix = diagonal(size)
        ts.setRHSJacobian(jacobian, matrix, matrix)
    ts.setTime(0.0)
    ts.setTimeStep(0.1)
    ts.setMaxTime(1.0)
    return ts, u


def solve(ts, u):
    """(u(1), du(1)/du(0)) of the first component."""
    ts.setFromOptions()
    ts.solve(u)
    bar = u.duplicate()
    bar.set(1.0)
    ts.setCostGradients([bar])
    adjoint_solve(ts)
    return u.array_r[0], bar.array_r[0]


def cause(error):
    """What was raised first: PETSc hands on an error code, with the error as its cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def refusal(ts, u):
    """How a solve ends that must not work."""
    with pytest.raises((PETSc.Error, ValueError, pfde.PfdeError)) as caught:
        solve(ts, u)
    return cause(caught.value)


def expected(method):
    """u(1) from the torch API; the equation is linear, so that du(1)/du(0) is the same number."""
    y = pfde.fdeint(lambda t, y: -y, torch.ones(1).double(), torch.linspace(0, 1, 11).double(), ALPHA, method=method)
    return y[-1].item()


# -- what a TS can be given ----------------------------------------------------------------------------------------


def nothing(*arguments):
    """A callback that is never to be called."""
    raise AssertionError("called")


def give_quadrature(ts, u):
    ts.createQuadratureTS(True).setRHSFunction(nothing, PETSc.Vec().createSeq(1))


def give_split(ts, u):
    ts.setRHSSplitIS("slow", PETSc.IS().createStride(3))
    ts.setRHSSplitRHSFunction("slow", nothing, u.duplicate())


GIVEN = {
    "IFunction": (
        lambda ts, u: ts.setIFunction(nothing, u.duplicate()),
        r"an IFunction: write the equation as D\^alpha",
    ),
    "IJacobian": (lambda ts, u: ts.setIJacobian(nothing, diagonal(3)), "an IJacobian: write"),
    "IJacobianP": (
        lambda ts, u: ts.setIJacobianP(nothing, diagonal(3)),
        "IJacobianP: give dG/dp in ts.setRHSJacobianP",
    ),
    "I2Function": (lambda ts, u: ts.setI2Function(nothing, u.duplicate()), "an I2Function: equations of second order"),
    "I2Jacobian": (lambda ts, u: ts.setI2Jacobian(nothing, diagonal(3)), "an I2Jacobian: equations of second order"),
    "RHSSplit": (give_split, r"split functions \(ts.setRHSSplit...\): write"),
    "TimeSpan": (
        lambda ts, u: ts.setTimeSpan([0.0, 0.5, 1.0]),
        "output times .*: choose a time step that divides them",
    ),
    "events": (
        lambda ts, u: ts.setEventHandler([0], [False], nothing, nothing),
        "event handlers .*; for alpha = 1 use pfde.odeint_event",
    ),
    "quadrature": (give_quadrature, "quadrature .*: adjoint_solve differentiates costs of the final state"),
}


@pytest.mark.parametrize("method", ["euler", "trapezoid"])
@pytest.mark.parametrize("name", GIVEN)
def test_what_a_ts_is_given_in_vain_is_refused(name, method):
    give, words = GIVEN[name]
    ts, u = relaxation(method)
    give(ts, u)
    assert re.search(f"^ValueError: FractionalTS does not use {words}", refusal(ts, u)) or (
        name == "IJacobianP" and re.search(words, refusal(ts, u))
    )
    assert u.array_r[0] == 1.0  # nothing was solved


@pytest.mark.parametrize("method", ["euler", "trapezoid"])
def test_without_a_right_hand_side_there_is_nothing_to_solve(method):
    """PETSc's own methods take an IFunction alone, or take u' = 0."""
    alone = relaxation(method, function=None)
    alone[0].setIFunction(nothing, alone[1].duplicate())
    assert "does not use an IFunction" in refusal(*alone)
    assert "needs a RHSFunction: write the equation as D^alpha u = G(t, u)" in refusal(
        *relaxation(method, function=None)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ts_adapt_type": "basic"}, "does not use -ts_adapt_type basic: its steps are uniform, as with none"),
        ({"ts_adjoint_solve": ""}, r"call pfde.ts.adjoint_solve\(ts\) after the solve"),
        ({"ts_fd_color": ""}, "give the Jacobian in ts.setRHSJacobian"),
        ({"ts_convergence_estimate": ""}, "make a TS for each time step"),
        ({"ts_time_span": "0,1"}, "output times"),
        ({"snes_mf_operator": ""}, r"-snes_mf_operator does not apply .*; leave it out \(RHSJacobian\)"),
        ({"snes_fd": ""}, "one and the same Jacobian, without differences"),
        ({"snes_type": "ksponly"}, "-snes_type must be one of newtonls, .*: got ksponly"),
        ({"snes_convergence_test": "skip"}, "a wrong value; loosen snes_rtol"),
    ],
)
def test_options_with_which_petsc_would_do_something_else(options, words):
    with command_line(**options):
        assert re.search(words, refusal(*relaxation()))


def test_options_that_do_no_harm():
    """The value and the gradient are those without them. With an assembled Jacobian every preconditioner will do."""
    value = expected("trapezoid")
    harmless = (
        *(
            {},
            {"ts_adapt_type": "none"},
            {"ts_adapt_monitor": ""},
            {"ts_save_trajectory": ""},
            {"snes_type": "newtontr"},
        ),
        *({"pc_type": "jacobi"}, {"pc_type": "none"}, {"pc_type": "lu", "ksp_type": "preonly"}),
    )
    for options in harmless:
        with command_line(**options):
            assert solve(*relaxation()) == pytest.approx((value, value), rel=1e-12), options


@pytest.mark.parametrize("how", ["call", "option"])
def test_petsc_writes_no_trajectory(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ts, u = relaxation()
    with command_line(**{"ts_save_trajectory": ""} if how == "option" else {}):
        if how == "call":
            ts.setSaveTrajectory()
        value = expected("trapezoid")  # an option of the program reaches the torch API's TS too
        wanted = by_torch("petsc:cn", options_prefix="mine_")
        assert all(map(torch.equal, by_torch("petsc:cn"), wanted))
        with torch.no_grad():
            pfde.odeint(lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 5), method="petsc:rk:4", step_size=0.25)
        assert solve(ts, u) == pytest.approx((value, value), rel=1e-12)
    assert not list(tmp_path.iterdir())


def test_hooks_may_look_and_not_touch():
    ts, u = relaxation()
    seen = []

    def look(ts):
        seen.append(ts.getSolution().array[0])  # as if to write: it raises the Vec's state
        ts.setTimeStep(ts.getTimeStep())

    ts.setPostStep(look)
    value = expected("trapezoid")
    assert solve(ts, u) == pytest.approx((value, value), rel=1e-12)
    assert len(seen) == 10
    touches = {
        "the solution": lambda ts: ts.getSolution().scale(0.5),
        "the time step": lambda ts: ts.setTimeStep(0.05),
        "the time": lambda ts: ts.setTime(ts.getTime() + 0.01),
    }
    for name, touch in touches.items():
        ts, u = relaxation()
        ts.setPostStep(touch)
        assert f"PfdeError: {name} of the TS changed between two steps, at t=0.1" in refusal(ts, u)


def test_a_solve_can_be_started_anew():
    """After its end, with another kind of method; after a part of it, which is not taken for a part of the new one."""
    ts, u = relaxation("euler")
    assert solve(ts, u)[0] == pytest.approx(expected("euler"), rel=1e-12)
    for limit in (4, 100):
        with command_line(fde_method="trapezoid"):
            ts.setStepNumber(0)
            ts.setTime(0.0)
            ts.setMaxSteps(limit)
            ts.setFromOptions()
            u.set(1.0)
            ts.solve(u)
    assert u.array_r[0] == pytest.approx(expected("trapezoid"), rel=1e-12)


# -- memory --------------------------------------------------------------------------------------------------------


def failing(ts, t, u, f):
    if t > 0.25:
        raise RuntimeError("here")
    rhs(ts, t, u, f)


@pytest.mark.parametrize("method", ["euler", "pece", "trapezoid"])
@pytest.mark.parametrize("how", ["forward", "adjoint", "options", "error", "reset", "dropped"])
def test_a_destroyed_ts_leaves_nothing(method, how):
    """Not its context nor what that holds, and at once: a cycle through C is one that no garbage collector sees."""
    gc.collect()
    gc.disable()
    try:
        ts, u = relaxation(method, function=failing if how == "error" else rhs, context=how != "options")
        program = {
            "ts_type": "python",
            "ts_python_type": "pfde.ts.FractionalTS",
            "fde_method": method,
            "fde_alpha": 0.6,
        }
        with command_line(**program if how == "options" else {}):
            ts.setFromOptions()
        context = ts.getPythonContext()
        if how == "error":
            with pytest.raises(PETSc.Error) as caught:
                ts.solve(u)
            assert cause(caught.value) == "RuntimeError: here"
            del caught
        elif how == "forward":
            ts.solve(u)
        else:
            solve(ts, u)
        held = [weakref.ref(x) for x in (context, context.system, context.sweep, context.discretisation)]
        del context
        if how == "reset":
            ts.reset()
            assert [x() is None for x in held] == [False, True, True, True]
        if how == "dropped":
            del ts
        else:
            ts.destroy()
        if how == "error":
            gc.collect()  # the traceback's frames, which pytest has seen
        assert [x() for x in held] == [None] * 4
    finally:
        gc.enable()


def test_large_states_without_a_jacobian_and_again_and_again():
    """n = 2e5: a dense Jacobian would be 320 GB, and what a solve holds is more than 30 MB."""
    size, resident = 200_000, []

    def once():
        ts, u = relaxation("euler", size=size, with_jacobian=False)
        ts.setFromOptions()
        ts.solve(u)
        bar = u.duplicate()
        ts.setCostGradients([bar])
        with pytest.raises(ValueError, match=r"the adjoint needs the Jacobian of the TS: call ts.setRHSJacobian"):
            adjoint_solve(ts)
        ts.destroy()
        return u.array_r[0]

    for _ in range(12):
        assert once() == pytest.approx(expected("euler"), rel=1e-12)
        resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # MB, the peak so far
    assert resident[-1] - resident[2] < 100, resident  # nine solves


def test_the_jacobian_may_come_after_the_forward_pass():
    ts, u = relaxation("euler", with_jacobian=False)
    ts.setFromOptions()
    ts.solve(u)
    bar, matrix = u.duplicate(), diagonal(3)
    bar.set(1.0)
    ts.setCostGradients([bar])
    with pytest.raises(ValueError, match="needs the Jacobian"):
        adjoint_solve(ts)
    ts.setRHSJacobian(jacobian, matrix, matrix)
    adjoint_solve(ts)
    assert bar.array_r[0] == pytest.approx(expected("euler"), rel=1e-12)


# -- the torch APIs -----------------------------------------------------------------------------------------------

SIZE = 20  # beyond the size at which the Newton matrix is assembled unasked
COUPLING = torch.linspace(-1, 1, SIZE * SIZE).double().reshape(SIZE, SIZE).sin() / 5


def by_torch(method, options=None, **keywords):
    """(y(1), d|y(1)|^2/d(y0, p))."""
    p = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    y0 = torch.linspace(0.5, 1.5, SIZE).double().requires_grad_()

    def f(t, y):
        return -p[0] * y - p[1] * y**3 + torch.sin(y @ COUPLING)

    t = torch.linspace(0, 1, 5).double()
    keywords |= {"method": method, "params": [p], "options": options}
    y = pfde.fdeint(f, y0, t, 0.7, **keywords) if method == "trapezoid" else pfde.odeint(f, y0, t, **keywords)
    y[-1].square().sum().backward()
    return y[-1].detach(), torch.cat([y0.grad, p.grad])


ENTRIES = "needs the entries of the Newton matrix.*'fde_jacobian': 'dense' or 'blocks'.*or pc_type none or python"
DIFFERENCES = "one and the same Jacobian, without differences"
REFUSED = {
    **{("pc_type", kind): ENTRIES for kind in ("jacobi", "gamg", "ilu", "lu", "sor", "bjacobi", "asm", "cholesky")},
    ("pc_type", "python"): r" python needs -.*pc_python_type module\.Class",
    **{(name, ""): DIFFERENCES for name in ("snes_mf_operator", "snes_mf", "snes_fd", "snes_fd_color")},
    **{("snes_type", kind): f"got {kind}" for kind in ("ksponly", "ksptransposeonly", "qn", "fas", "ngs", "newtonal")},
    ("snes_convergence_test", "skip"): "without a look at its residual is a wrong value",
    ("snes_norm_schedule", "none"): "without a look at its residual is a wrong value",
}


@pytest.mark.parametrize("method", ["trapezoid", "cn", "petsc:cn"])
@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_solvers_that_would_not_solve_a_stage_are_refused(method, name, value):
    words = REFUSED[name, value]
    with pytest.raises(ValueError, match=f"^PETSc option -.*{words}"):
        by_torch(method, {name: value})
    with command_line(**{name: value}), pytest.raises(ValueError, match=f"^PETSc option -{name}.*{words}"):
        by_torch(method)


def test_a_prefix_keeps_out_of_the_way_of_other_solvers():
    with command_line(pc_type="gamg", snes_type="fas", snes_mf_operator=""):
        for method in ("trapezoid", "petsc:cn"):
            by_torch(method, options_prefix="mine_")
        by_torch("rk4")  # has no stages to solve


def test_a_dense_newton_matrix_takes_no_other_preconditioner_and_backprop_asks_too():
    for keywords in ({"gradient": pfde.Backprop()}, {}):
        with pytest.raises(ValueError, match=ENTRIES):
            by_torch("trapezoid", {"fde_jacobian": "dense", "pc_type": "lu"}, **keywords)


@pytest.mark.parametrize("method", ["trapezoid", "cn", "petsc:cn"])
@pytest.mark.parametrize(
    "options",
    [
        *({"snes_type": "newtontr"}, {"snes_type": "newtontrdc"}, {"snes_type": "ngmres"}, {"snes_type": "anderson"}),
        *({"pc_type": "none"}, {"pc_type": "python", "pc_python_type": "support.identity.Identity"}),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_solvers_that_are_taken_give_the_value_and_the_gradient(method, options):
    """A stage's tolerance is that of the default: 1e-10 is far above it, and far below one iteration too few."""
    for got, wanted in zip(by_torch(method, options), by_torch(method), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["trapezoid", "rk4", "cn", "petsc:cn", "petsc:rk:4"])
def test_no_step_control_is_what_fixed_steps_have(method):
    fixed = {"step_size": 0.25} if method == "petsc:rk:4" else {}
    wanted = by_torch(method, **fixed)
    for options in ({"ts_adapt_type": "none"}, None):
        with command_line(**{} if options else {"ts_adapt_type": "none"}):
            for got, value in zip(by_torch(method, options, **fixed), wanted, strict=True):
                assert torch.equal(got, value)
    with pytest.raises(ValueError, match="ts_adapt_type does not apply here"):
        by_torch(method, {"ts_adapt_type": "basic"}, **fixed)


@pytest.mark.parametrize("method", ["dopri5", "petsc:rk:5dp"])
def test_no_step_control_is_not_for_adaptive_steps(method):
    with command_line(ts_adapt_type="none"):
        with pytest.raises(ValueError, match=r"-ts_adapt_type none asks for fixed steps.*: pass step_size, or give"):
            by_torch(method)
        by_torch(method, step_size=0.25)
        by_torch(method, options_prefix="mine_")


@pytest.mark.parametrize("option", ["ts_time_step", "ts_final_time", "ts_run_steps", "ts_time_span"])
def test_new_names_of_what_the_arguments_decide_are_refused(option):
    """-ts_time_step is PETSc's new name of -ts_dt: it would be read, and then overwritten."""
    for method in ("trapezoid", "petsc:cn"):
        with pytest.raises(ValueError, match=f"{option} does not apply here"):
            by_torch(method, {option: "1"})


# -- programs ------------------------------------------------------------------------------------------------------


def test_help_lists_the_options_of_pfde_once():
    """In PETSc's form, for two TS and two torch models."""
    options = ["-help", "-fde_alpha", "0.25", "-ts_python_type", "pfde.ts.FractionalTS", "-ts_type", "python"]
    result = subprocess.run(
        [sys.executable, str(PROGRAM), "help", *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith(("  -fde_", "  -model_fde_"))]
    names = [line.split(":")[0] for line in lines]
    assert names == ["  -fde_alpha", "  -fde_method", "  -fde_tolerance", "  -fde_snapshots", "  -model_fde_jacobian"]
    assert lines[0].startswith("  -fde_alpha: <now 0.25 : formerly 1>: Order of the Caputo derivative, in (0, 1]")
    assert "euler pece beuler trapezoid" in lines[1] and "auto dense blocks matrix_free" in lines[4]


@pytest.mark.mpi
@needs_mpiexec
def test_two_ranks_leave_nothing_and_fail_together():
    """Contexts of destroyed and of dropped TS, explicit and implicit; a callback that raises on one rank only."""
    out = launch(2, PROGRAM, "ranks").splitlines()
    assert sorted(out) == ["0 alive 0", "0 raised RuntimeError: on one rank", "1 alive 0", "1 raised PeerError"]
