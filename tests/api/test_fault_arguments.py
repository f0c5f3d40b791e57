"""Arguments that are not accepted: what is wrong, once, with the error that every API that takes it gives.

`EVERY` API: fdeint, odeint (fixed, adaptive and PETSc's own methods), solve for both kinds of equation, and the blocks,
which may notice when they are made or when they are called. What only one of them has is in caputo and one_step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import pfde
from support.faults import NAN, D, Field, T, assert_same, decay, gradients, start

FRACTIONAL: dict[str, Callable] = {
    "fdeint": lambda func, y0, t, alpha=0.6, **k: pfde.fdeint(func, y0, t, alpha, **k),
    "solve": lambda func, y0, t, alpha=0.6, **k: pfde.solve(func, y0, t, alpha, **({"method": "trapezoid"} | k)),
    "FDEBlock": lambda func, y0, t, alpha=0.6, **k: pfde.nn.FDEBlock(func, alpha=alpha, t=t, **k)(y0),
}
ORDINARY: dict[str, Callable] = {
    "odeint": lambda func, y0, t, **k: pfde.odeint(func, y0, t, **({"method": "cn"} | k)),
    "odeint, adaptive": lambda func, y0, t, **k: pfde.odeint(func, y0, t, **({"method": "dopri5"} | k)),
    "solve, ordinary": lambda func, y0, t, **k: pfde.solve(func, y0, t, **({"method": "rk4"} | k)),
    "ODEBlock": lambda func, y0, t, **k: pfde.nn.ODEBlock(func, t=t, **({"method": "cn"} | k))(y0),
}
NATIVE: dict[str, Callable] = {
    "odeint, petsc": lambda func, y0, t, **k: pfde.odeint(func, y0, t, **({"method": "petsc:cn"} | k)),
}
OURS = FRACTIONAL | ORDINARY
EVERY = OURS | NATIVE
SOLVING = {
    name: EVERY[name] for name in ("fdeint", "solve", "FDEBlock", "odeint", "ODEBlock")
}  # with an implicit method


@dataclass(frozen=True)
class Wrong:
    """The arguments that are wrong (the others are right), the error, what its message says, and who says it."""

    arguments: dict
    error: type[Exception]
    message: str
    apis: dict[str, Callable]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())


def wrong(name: str, *rows: tuple[object, type[Exception], str], apis: dict[str, Callable] = EVERY) -> Sequence[Wrong]:
    return [Wrong({name: value}, error, message, apis) for value, error, message in rows]


def double(*times: float) -> torch.Tensor:
    return torch.tensor(times, dtype=D)


IN_ORDER = "t must be increasing"
ORDER, SHAPE = r"alpha must be in \(0, 1\]: got", r"alpha must broadcast to y0's shape \(3,\): got"
NUMBER = "alpha must be a number or a tensor, or an array or a sequence of numbers: got"

TIMES = [
    *wrong(
        "t",
        (double(0.0, 0.5, 0.4, 1.0), ValueError, rf"{IN_ORDER}.*: got .*t\[1\]=0.5, t\[2\]=0.4"),
        (double(0.0, 0.0, 0.5, 0.4, 1.0), ValueError, rf"{IN_ORDER}.*: got .*t\[2\]=0.5, t\[3\]=0.4"),
        (double(-1.7e308, 1.7e308), ValueError, r"t\[-1\] - t\[0\] must be finite .*: got t\[0\]=-1.7e\+308"),
        (double(0.0, NAN, 1.0), ValueError, r"t must be finite: got \[0.0, nan, 1.0\]"),
        (double(0.0, math.inf), ValueError, r"t must be finite: got \[0.0, inf\]"),
        (double(), ValueError, r"at least one time.*: got shape \(0,\)"),
        (torch.tensor(1.0), ValueError, r"t must be one-dimensional with at least one time.*: got shape \(\)"),
        (torch.zeros(2, 2), ValueError, r"t must be one-dimensional with at least one time.*: got shape \(2, 2\)"),
        (torch.tensor([0, 1]), TypeError, r"t must be floating point: got torch.int64; use t.double\(\)"),
        (None, TypeError, "t must be a one-dimensional tensor of times: got NoneType"),
        ("0..1", TypeError, "t must be a one-dimensional tensor of times: got str"),
    ),
    *wrong("t", ((), ValueError, "at least one time"), apis={"FDEBlock": FRACTIONAL["FDEBlock"]}),
    *wrong("t", (double(1.0, 0.0), ValueError, rf"{IN_ORDER} \(.*: got t\[0\]=1, t\[1\]=0"), apis=FRACTIONAL),
    *wrong(
        "t",
        (double(1.0, 0.5, 0.6, 0.0), ValueError, r"increasing or decreasing .*: got .*t\[1\]=0.5, t\[2\]=0.6"),
        (double(0.3, 0.4, 0.3), ValueError, r"increasing or decreasing .*: got t\[0\]=0.3, t\[0\]=0.3, t\[1\]=0.4"),
        apis=ORDINARY | NATIVE,
    ),
    *wrong(
        "t",
        (double(0.0, 0.0).requires_grad_(), ValueError, r"all its times are t\[0\].*: pass t.detach\(\)"),
        (
            double(0.0, 0.3, 1.0).requires_grad_(),
            ValueError,
            r"t requires a gradient, which a nonuniform grid does not have: pass t.detach\(\), or a uniform grid",
        ),
        apis={"fdeint": FRACTIONAL["fdeint"]},
    ),
]
STEPS = [
    *wrong(
        "step_size",
        (-0.1, ValueError, r"step_size must be (in \(0, .*|positive, for decreasing t too): got -0.1"),
        (NAN, ValueError, r"step_size must be (in \(0, .*|positive, for decreasing t too): got nan"),
        (math.inf, ValueError, r"step_size must be (in \(0, .*|finite): got inf"),
        (0.0, ValueError, r"step_size must be (in \(0, .*|positive, for decreasing t too): got 0"),
        (0.3, ValueError, r"a whole number of steps.*with step_size=0.3, .*choose a step_size that divides it"),
        ("0.1", TypeError, "step_size must be a number: got str"),
        (True, TypeError, "step_size must be a number: got bool"),
        (start(0.1), ValueError, r"step_size requires a gradient.*pass float\(step_size\)"),
    ),
    *wrong(
        "step_size",
        (0.5, ValueError, r"must be a whole number of steps: got t\[1\] - t\[0\] = 0.2 with step_size=0.5, 0.4 steps"),
        (2.0, ValueError, r"step_size must be in \(0, t\[-1\] - t\[0\] = 1\]: got 2"),
        apis=FRACTIONAL,
    ),
    *wrong(
        "step_size",
        (0.5, ValueError, r"not be longer than an interval of t: got t\[1\] - t\[0\] = 0.2 with step_size=0.5; reduce"),
        (2.0, ValueError, r"not be longer than an interval of t: got t\[1\] - t\[0\] = 0.2 with step_size=2; reduce"),
        apis=ORDINARY,
    ),
]
STATES = wrong(
    "y0",
    (torch.tensor([1, 2]), TypeError, r"y0 must be float32 or float64, or complex: got torch.int64; use y0.double\(\)"),
    (torch.eye(2).to_sparse(), TypeError, r"y0 must be dense: got torch.sparse_coo; use y0.to_dense\(\)"),
    ((), ValueError, "y0 must hold at least one tensor: got an empty tuple"),
    (1.0, TypeError, "y0 must be a tensor or a tuple of tensors: got float"),
    (None, TypeError, "y0 must be a tensor or a tuple of tensors: got NoneType"),
    ((torch.ones(2), 1.0), TypeError, "y0 must be a tensor or a tuple of tensors: got float"),
    ((torch.ones(2), double(1.0)), TypeError, "the tensors of y0 must share precision and device: got torch.fl"),
    ((torch.ones(2), (torch.ones(2),)), TypeError, "y0 must be a tensor or a tuple of tensors: got tuple of 1"),
)
FUNCTIONS = wrong(
    "func", *((x, TypeError, r"func must be callable as func\(t, y\): got") for x in (None, 3, torch.ones(3)))
)
METHODS = [
    *wrong(
        "method",
        ("dopri9", ValueError, "method must be one of .*: got 'dopri9'"),
        ("", ValueError, "method must be one of .*: got ''"),
        ("DOPRI5", ValueError, "method must be one of .*: got 'DOPRI5'"),
        ("petsc", ValueError, "method must be one of .*: got 'petsc'"),
        ("adams", ValueError, "method must be one of .*: got 'adams'"),
        ("scipy_solver", ValueError, "method must be one of .*: got 'scipy_solver'"),
        (5, ValueError, "method must be one of .*: got 5"),
        (["euler"], ValueError, r"method must be one of .*: got \['euler'\]"),
    ),
    *wrong(
        "method",
        (None, ValueError, "method must be one of .*: got None"),
        ("rk4", ValueError, "method must be one of euler, pece, .*bdf2: got 'rk4'"),
        apis={name: FRACTIONAL[name] for name in ("fdeint", "FDEBlock")},
    ),
    *wrong(
        "method",
        ("dopri9", ValueError, r"method must be one of euler, .*dopri5.*, or 'petsc:\.\.\.': got 'dopri9'$"),
        apis={"odeint": ORDINARY["odeint"], "ODEBlock": ORDINARY["ODEBlock"]},
    ),
    *wrong(
        "method",
        ("rk4", ValueError, "alpha must be the number 1 for method 'rk4'"),
        apis={"solve": FRACTIONAL["solve"]},
    ),
]
GRADIENTS = [
    *wrong(
        "gradient",
        *(
            (value, TypeError, r"gradient must be pfde.Discrete\(\).* or pfde.Backprop\(\): got")
            for value in ("adjoint", pfde.Discrete, 1, pfde.Symplectic)
        ),
        apis=OURS,
    ),
    *wrong(
        "gradient",
        (pfde.Symplectic(), TypeError, r"gradient must be pfde.Discrete\(\) or pfde.Backprop\(\): got"),
        apis=FRACTIONAL,
    ),
]
HISTORIES = wrong(
    "history",
    ("fft", TypeError, r"history must be pfde.Exact\(\) or pfde.SumOf.* or pfde.Short.*: got 'fft'"),
    (pfde.Exact, TypeError, r"history must be pfde.Exact\(\) or pfde.SumOf.* or pfde.Short.*: got <c"),
    apis=FRACTIONAL,
)
PARAMETERS = wrong(
    "params",
    (start(), TypeError, r"params must be a sequence of tensors, such as \(a, b\): got a tensor of"),
    (nn.Linear(1, 1), TypeError, r"params must be a sequence of tensors.*: got Linear"),
    (3, TypeError, r"params must be a sequence of tensors.*: got int"),
    ([None], TypeError, "params must be a sequence of tensors: got NoneType in it"),
)
OPTIONS = [
    *wrong(
        "options",
        ("-snes_monitor", TypeError, "options must be a mapping of (PETSc option )?names to values: got str"),
        ({"-snes_rtol": 1}, ValueError, "names are PETSc's without the dash.*: got '-snes_rtol'"),
        ({3: 1}, ValueError, "names are PETSc's without the dash.*: got 3"),
    ),
    *wrong(
        "options",
        ({"snes_rtol": None}, TypeError, "a value must be a number, a string or a bool: got 'snes_rtol': N"),
        ({"snes_rtoll": 1}, ValueError, "options: 'snes_rtoll' does not apply"),
        ({"snes_rtol": "tight"}, ValueError, r"options: PETSc does not take .*'tight'.*: .*tight"),
        ({"ksp_type": "magic"}, ValueError, r"options: PETSc does not take .*'magic'.*: .*magic"),
        ({"fde_jacobian": "sparse"}, ValueError, "fde_jacobian must be auto, dense, .*: got 'sparse'"),
        ({"ts_dt": 0.1}, ValueError, "PETSc option -ts_dt does not apply here: t, step_size and method"),
        apis=SOLVING,
    ),
    *wrong(
        "options_prefix",
        (3, TypeError, "options_prefix must be a string: got int"),
        ("-a_", ValueError, "options_prefix must be without dash and spaces.*: got '-a_'"),
    ),
]
OTHERS = [
    *wrong("comm", (1, TypeError, "comm must be an mpi4py communicator or None: got int")),
    *wrong("stepsize", (0.1, TypeError, "unexpected keyword argument 'stepsize'")),
]
ORDERS = wrong(
    "alpha",
    (0.0, ValueError, f"{ORDER} 0"),
    (-0.5, ValueError, f"{ORDER} -0.5"),
    (1.2, ValueError, f"{ORDER} 1.2; orders above 1"),
    (NAN, ValueError, f"{ORDER} nan"),
    (math.inf, ValueError, f"{ORDER} inf"),
    ([0.5, 1.5, 0.5], ValueError, f"{ORDER} 1.5"),
    (torch.tensor([0.5, 0.5, 1.5]), ValueError, f"{ORDER} 1.5"),
    (torch.tensor([0.5, 0.6]), ValueError, rf"{SHAPE} \(2,\)"),
    ([0.5, 0.6], ValueError, rf"{SHAPE} \(2,\)"),
    (torch.full((2, 3), 0.5), ValueError, rf"{SHAPE} \(2, 3\)"),
    (torch.ones(0), ValueError, rf"{SHAPE} \(0,\)"),
    (torch.tensor(1), TypeError, r"alpha must be floating point: got torch.int64; use alpha.double\(\)"),
    (torch.tensor(True), TypeError, "alpha must be floating point: got torch.bool"),
    (torch.tensor(0.5 + 0j), TypeError, "alpha must be floating point: got torch.complex64"),
    (True, TypeError, f"{NUMBER} bool"),
    ("0.5", TypeError, f"{NUMBER} str"),
    (None, TypeError, f"{NUMBER} NoneType"),
    ([], TypeError, NUMBER),
    ([0.5, True], TypeError, f"{NUMBER} bool"),
    ([0.5, "a"], TypeError, f"{NUMBER} str"),
    ([0.5, [0.6, 0.7]], ValueError, "alpha must be rectangular"),
    (np.array([True]), TypeError, NUMBER),
    (np.array(["a"]), TypeError, NUMBER),
    apis=FRACTIONAL,
)
TABLE = [
    *(*TIMES, *STEPS, *STATES, *FUNCTIONS, *METHODS, *GRADIENTS, *HISTORIES, *PARAMETERS, *OPTIONS, *OTHERS, *ORDERS)
]


@pytest.mark.smoke
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_it_is_refused_with_what_to_do_instead(row: Wrong) -> None:
    arguments = {"func": decay, "y0": start(), "t": T} | row.arguments
    for name, call in row.apis.items():
        try:
            with pytest.raises(row.error, match=row.message):
                call(**arguments)
        except BaseException as error:
            error.add_note(f"by {name}")
            raise
    with torch.no_grad(), pytest.raises(row.error, match=row.message.replace(" requires a gradient", ".*")):
        next(iter(row.apis.values()))(**arguments)


@pytest.mark.parametrize("row", [row for row in STEPS if row.apis is not FRACTIONAL], ids=str)
@pytest.mark.parametrize("method", ["rk4", "dopri5", "cn"])
def test_a_step_size_among_torchdiffeqs_options_too(row: Wrong, method: str) -> None:
    with pytest.raises(row.error, match=row.message):
        pfde.odeint(decay, start(), T, method=method, options=row.arguments)


@pytest.mark.parametrize("form", ["trapezoid", "euler", "dopri5", "cn"])
def test_none_is_the_default(form: str) -> None:
    """And nothing that was refused has left anything behind."""
    nothing = dict.fromkeys(("gradient", "params", "options", "comm", "step_size"))
    nothing |= {"history": None} if form in ("trapezoid", "euler") else {"mass": None}
    before = gradients(form)
    assert_same(gradients(form, **nothing), before)
    for row in (*OPTIONS, *PARAMETERS):
        with pytest.raises(row.error):
            (FRACTIONAL["fdeint"] if form in ("trapezoid", "euler") else ORDINARY["odeint"])(
                func=Field(), y0=start(), t=T, **row.arguments
            )
    assert_same(gradients(form), before)
