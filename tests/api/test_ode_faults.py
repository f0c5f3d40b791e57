"""Bad input and faults at the door `odeint`: every mistake is an error that says what to do, and no fault spoils the
solve after it.

The counterpart of `test_faults` for ordinary equations; what adaptive steps do about NaN, limits and stages that do not
converge is tested here too.
"""

import contextlib
import gc
import math
import re
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import pfde
from pfde.caputo.schemes import METHODS
from pfde.one_step.methods import METHODS as ODE_METHODS
from support.solution import solve_ode

D = torch.float64
T = torch.linspace(0, 1, 6, dtype=D)
NAN = float("nan")
LOOSE = {"rtol": 1e-4, "atol": 1e-6}
# One form of each kind: explicit and implicit, adaptive and fixed, and implicit-explicit.
FORMS = {
    "dopri5": {"method": "dopri5", **LOOSE},
    "dopri5 fixed": {"method": "dopri5", "step_size": 0.2},
    "rk4": {"method": "rk4"},
    "cn": {"method": "cn"},
    "sdirk4": {"method": "sdirk4", "rtol": 1e-2, "atol": 1e-3},
    "ark2": {"method": "ark2", "rtol": 1e-2, "atol": 1e-3},
    "ark3 fixed": {"method": "ark3", "step_size": 0.2},
}
GRADIENTS = {
    "state": pfde.Discrete(),
    "stages": pfde.Discrete(store="stages"),
    "graph": pfde.Discrete(store="graph"),
    "online": pfde.Discrete(schedule=pfde.Online(1, leaf=2)),
    "symplectic": pfde.Symplectic(),
}


class Field(nn.Module):
    """f = sin(a y) + t, which calls `hook(k)` at its k-th evaluation, k = 1, 2, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=D))
        self.calls = 0
        self.hook: Callable[[int], object] = lambda _: None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.hook(self.calls)
        return torch.sin(self.a * y) + t


def start(*values: float, grad: bool = True) -> Tensor:
    return torch.tensor(values or (1.0, 2.0, -0.5), dtype=D, requires_grad=grad)


def decay(_t: Tensor, y: Tensor) -> Tensor:
    return -y / (1 + y * y)


def rest(_t: Tensor, y: Tensor) -> Tensor:
    return -0.1 * y


def split(f: Callable, keywords: dict) -> Callable:
    """f, for the methods that need two parts with a second one that is smooth."""
    return pfde.Split(f, rest) if str(keywords["method"]).startswith("ark") else f


def solve(f: Callable, y0: Tensor, form: str, **keywords: object) -> Tensor:
    return pfde.odeint(split(f, FORMS[form]), y0, T, **(FORMS[form] | keywords))


def gradients(form: str, **keywords: object) -> list[Tensor]:
    """d(sum of squares of all outputs)/d(y0, a) of a fresh solve."""
    f, y0 = Field(), start()
    y = solve(f, y0, form, **keywords)
    return list(torch.autograd.grad(y.square().sum(), (y0, f.a)))


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b), f"got {a}, expected bitwise {b}"


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -- the arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dopri9", "", "DOPRI5", 5, ["dopri5"], "petsc", "adams", "scipy_solver"])
def test_an_unknown_method(method: object) -> None:
    message = rf"method must be one of euler, .*dopri5.*, or 'petsc:\.\.\.': got {re.escape(repr(method))}$"
    with pytest.raises(ValueError, match=message):
        pfde.odeint(decay, start(), T, method=method)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(ODE_METHODS)))
def test_a_method_of_fractional_equations(method: str) -> None:
    with pytest.raises(ValueError, match=f"got '{method}'; '{method}' is a method of pfde.fdeint"):
        pfde.odeint(decay, start(), T, method=method)


def test_no_method_is_dopri5() -> None:
    y0 = start(grad=False)
    default = pfde.odeint(decay, y0, T)
    assert torch.equal(pfde.odeint(decay, y0, T, method=None), default)
    assert torch.equal(pfde.odeint(decay, y0, T, method="dopri5"), default)
    assert solve_ode(decay, y0, T, method=None).stats.method == "dopri5"


def test_none_is_the_default() -> None:
    nothing = dict.fromkeys(("step_size", "gradient", "params", "mass", "options", "comm"))
    assert_same(gradients("dopri5", **nothing), gradients("dopri5"))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "cn", "petsc:rk:5dp"])
@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([0.0, 0.5, 0.4, 1.0], ValueError, r"increasing or decreasing .*: got .*t\[1\]=0.5, t\[2\]=0.4"),
        ([0.0, 0.0, 0.5, 0.4, 1.0], ValueError, r"increasing or decreasing .*: got .*t\[2\]=0.5, t\[3\]=0.4"),
        ([1.0, 0.5, 0.6, 0.0], ValueError, r"increasing or decreasing .*: got .*t\[1\]=0.5, t\[2\]=0.6"),
        ([0.3, 0.4, 0.3], ValueError, r"increasing or decreasing .*: got t\[0\]=0.3, t\[0\]=0.3, t\[1\]=0.4"),
        ([-1.7e308, 1.7e308], ValueError, r"t\[-1\] - t\[0\] must be finite .*: got t\[0\]=-1.7e\+308"),
        ([0.0, NAN, 1.0], ValueError, r"t must be finite: got \[0.0, nan, 1.0\]"),
        ([0.0, math.inf], ValueError, r"t must be finite: got \[0.0, inf\]"),
        ([], ValueError, r"at least one time.*: got shape \(0,\)"),
        ([[0.0, 1.0]], ValueError, r"t must be one-dimensional with at least one time.*: got shape \(1, 2\)"),
    ],
)
def test_times(t: list, error: type[Exception], message: str, method: str) -> None:
    with pytest.raises(error, match=message):
        pfde.odeint(decay, start(), torch.tensor(t, dtype=D), method=method)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0, 1]), r"t must be floating point: got torch.int64; use t.double\(\)"),
        (None, "t must be a one-dimensional tensor of times: got NoneType"),
        ("0..1", "t must be a one-dimensional tensor of times: got str"),
    ],
)
def test_times_of_another_kind(t: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pfde.odeint(decay, start(), t)


@pytest.mark.parametrize("by", ["keyword", "options"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "cn"])
@pytest.mark.parametrize(
    ("step_size", "error", "message"),
    [
        (0.3, ValueError, r"a whole number of steps: got .*with step_size=0.3, .*choose a step_size that divides it"),
        (0.5, ValueError, r"not be longer than an interval of t: got t\[1\] - t\[0\] = 0.2 with step_size=0.5; reduce"),
        (0.0, ValueError, "step_size must be positive, for decreasing t too: got 0"),
        (-0.1, ValueError, "step_size must be positive, for decreasing t too: got -0.1"),
        (NAN, ValueError, "step_size must be positive, for decreasing t too: got nan"),
        (math.inf, ValueError, "step_size must be finite: got inf"),
        ("0.1", TypeError, "step_size must be a number: got str"),
        (True, TypeError, "step_size must be a number: got bool"),
    ],
)
def test_step_size(step_size: object, error: type[Exception], message: str, method: str, by: str) -> None:
    keywords = {"step_size": step_size} if by == "keyword" else {"options": {"step_size": step_size}}
    with pytest.raises(error, match=message):
        pfde.odeint(decay, start(), T, method=method, **keywords)


def test_step_size_given_twice() -> None:
    with pytest.raises(ValueError, match=r"step_size is given twice: step_size=0.1, options={'step_size': 0.2}"):
        pfde.odeint(decay, start(), T, method="rk4", step_size=0.1, options={"step_size": 0.2})
    y = pfde.odeint(decay, start(), T, method="rk4", step_size=0.1, options={"step_size": 0.1})
    assert torch.equal(y, pfde.odeint(decay, start(), T, method="rk4", step_size=0.1))


def test_a_step_size_need_not_divide_unevenly_spaced_times_alike() -> None:
    """Each interval has a whole number of steps of its own."""
    t = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=D)
    solution = solve_ode(decay, start(), t, method="rk4", step_size=0.1)
    assert solution.stats.steps == 10


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1e-3, ValueError, "must be finite and not negative: got -0.001"),
        (NAN, ValueError, "must be finite and not negative: got nan"),
        (math.inf, ValueError, "must be finite and not negative: got inf"),
        (torch.tensor([1e-3, -1e-3, 1e-3]), ValueError, "must not be negative: got -0.001"),
        (torch.tensor([1e-3, 1e-3]), ValueError, r"must broadcast to y0's shape \(3,\): got \(2,\)"),
        (torch.full((2, 3), 1e-3), ValueError, r"must broadcast to y0's shape \(3,\): got \(2, 3\)"),
        ((1e-3, 1e-3), ValueError, "must have one entry for each part of y0, 1: got 2"),
        ("tight", TypeError, "must be a number: got str"),
        (True, TypeError, "must be a number: got bool"),
        (None, TypeError, "must be a number: got NoneType"),
        (("tight",), TypeError, "must be"),
    ],
)
def test_tolerances(name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name} {message}"):
        pfde.odeint(decay, start(), T, **{name: value})


@pytest.mark.parametrize("zero", [0.0, torch.zeros(3, dtype=D), (0.0,)], ids=["number", "tensor", "tuple"])
def test_tolerances_that_are_both_zero(zero: object) -> None:
    for rtol, atol in ((zero, 0.0), (0.0, zero)):
        with pytest.raises(ValueError, match="rtol and atol must not both be 0: no step would be accepted"):
            pfde.odeint(decay, start(), T, rtol=rtol, atol=atol)
    pfde.odeint(decay, start(), T, rtol=0.0, atol=1e-5)
    pfde.odeint(decay, start(), T, rtol=1e-5, atol=0.0)


def test_tolerances_of_a_tuple_state() -> None:
    y0 = (start(grad=False), torch.ones(2, 2, dtype=D))
    f = lambda t, y: tuple(-x for x in y)  # noqa: E731
    with pytest.raises(ValueError, match="atol must have one entry for each part of y0, 2: got 3"):
        pfde.odeint(f, y0, T, atol=(1e-6, 1e-6, 1e-6))
    with pytest.raises(ValueError, match=r"rtol must broadcast to y0's shape \(2, 2\): got \(3,\)"):
        pfde.odeint(f, y0, T, rtol=(1e-6, torch.full((3,), 1e-6)))
    one = pfde.odeint(f, y0, T, rtol=1e-6, atol=1e-7)
    each = pfde.odeint(f, y0, T, rtol=(1e-6, torch.full((2,), 1e-6, dtype=D)), atol=(1e-7, 1e-7))
    assert_same(list(each), list(one))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nonsense": 1}, ValueError, "options: 'nonsense' does not apply"),
        ({"first_stp": 1}, ValueError, "options: 'first_stp' does not apply"),
        ({"ts_rtol": 1e-3}, ValueError, "ts_rtol"),
        ({3: 1}, ValueError, "options: names are PETSc's without the dash.*: got 3"),
        ("fast", TypeError, "options must be a mapping of names to values: got str"),
        ({"first_step": 0.0}, ValueError, "options: 'first_step' must be positive: got 0"),
        ({"first_step": -1.0}, ValueError, "options: 'first_step' must be positive: got -1"),
        ({"first_step": "big"}, TypeError, "options: 'first_step' must be a number: got str"),
        ({"max_step": 0}, ValueError, "options: 'max_step' must be positive: got 0"),
        ({"max_step": NAN}, ValueError, "options: 'max_step' must be positive: got nan"),
        ({"min_step": -1}, ValueError, r"options: 'min_step' must be in \[0, max_step=inf\]: got -1"),
        ({"min_step": 1.0, "max_step": 0.5}, ValueError, r"'min_step' must be in \[0, max_step=0.5\]: got 1"),
        ({"max_num_steps": 0}, ValueError, "options: 'max_num_steps' must be positive: got 0"),
        ({"max_num_steps": NAN}, ValueError, "options: 'max_num_steps' must be a whole number: got nan"),
        ({"max_num_steps": math.inf}, ValueError, "options: 'max_num_steps' must be a whole number: got inf"),
        ({"max_num_steps": 2.5}, ValueError, "options: 'max_num_steps' must be a whole number: got 2.5"),
        ({"safety": 0.0}, ValueError, "options: 'safety' must be positive: got 0"),
        ({"dfactor": 1.0}, ValueError, r"options: 'dfactor' must be in \(0, 1\): got 1"),
        ({"dfactor": 0.0}, ValueError, r"options: 'dfactor' must be in \(0, 1\): got 0"),
        ({"ifactor": 1.0}, ValueError, "options: 'ifactor' must be above 1: got 1"),
        ({"on_limit": "stop"}, ValueError, "options: 'on_limit' must be 'raise' or 'return': got 'stop'"),
        ({"snes_rtol": 1e-3}, ValueError, "options: 'snes_rtol' does not apply to method 'dopri5', which is explicit"),
    ],
)
def test_options(options: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.odeint(decay, start(), T, options=options)
    assert_same(gradients("dopri5"), gradients("dopri5"))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "esdirk3"])
@pytest.mark.parametrize("name", ["norm", "jump_t", "step_t", "grid_points", "perturb", "interp", "grid_constructor"])
def test_options_of_torchdiffeq_that_are_not_implemented(name: str, method: str) -> None:
    with pytest.raises(ValueError, match=f"options: '{name}' is not implemented: remove it"):
        pfde.odeint(decay, start(), T, method=method, options={name: None})


@pytest.mark.parametrize(
    "name", ["first_step", "min_step", "max_step", "max_num_steps", "safety", "ifactor", "dfactor", "on_limit"]
)
@pytest.mark.parametrize("keywords", [{"method": "rk4"}, {"method": "dopri5", "step_size": 0.2}, {"method": "cn"}])
def test_limits_do_not_apply_to_fixed_steps(name: str, keywords: dict) -> None:
    value = "return" if name == "on_limit" else 0.5
    with pytest.raises(ValueError, match=f"options: '{name}' does not apply to fixed steps .*: remove it"):
        pfde.odeint(decay, start(), T, options={name: value}, **keywords)


EYE = torch.eye(3, dtype=D)


@pytest.mark.parametrize(
    ("mass", "keywords", "error", "message"),
    [
        (EYE, {"method": "rk4"}, ValueError, "mass does not apply to method 'rk4': use an implicit one, such as 'cn'"),
        (EYE, {"method": "dopri5"}, ValueError, "mass does not apply to method 'dopri5'"),
        (EYE, {"method": "ark3", "step_size": 0.2}, ValueError, "mass does not apply to method 'ark3'"),
        (EYE, {"method": "esdirk4"}, ValueError, "mass needs fixed steps, .*'esdirk4' .*: give step_size"),
        (torch.eye(2), {"method": "cn"}, ValueError, r"mass must be \(3, 3\) or \(3,\), .* of y0: got \(2, 2\)"),
        (torch.ones(4), {"method": "cn"}, ValueError, r"mass must be \(3, 3\) or \(3,\), .* of y0: got \(4,\)"),
        (2.0, {"method": "cn"}, TypeError, "mass must be a tensor: got float"),
        (EYE.clone().requires_grad_(), {"method": "cn"}, ValueError, r"mass requires a gradient.*pass mass.detach\(\)"),
        (EYE, {"method": "petsc:beuler"}, ValueError, "no mass"),
    ],
)
def test_mass(mass: object, keywords: dict, error: type[Exception], message: str) -> None:
    f = pfde.Split(decay, rest) if keywords["method"] == "ark3" else decay
    with pytest.raises(error, match=message):
        pfde.odeint(f, start(), T, mass=mass, **keywords)


@pytest.mark.parametrize("y0", [torch.tensor(1.0, dtype=D), (start(), start()), torch.ones(3, dtype=torch.complex128)])
def test_mass_is_for_one_real_tensor(y0: object) -> None:
    f = lambda t, y: tuple(-x for x in y) if isinstance(y, tuple) else -y  # noqa: E731
    with pytest.raises(ValueError, match="mass needs y0 to be one real tensor with at least one dimension"):
        pfde.odeint(f, y0, T, method="cn", mass=EYE)


@pytest.mark.parametrize("method", ["ark2", "ark3", "ark4"])
def test_implicit_explicit_methods_need_two_parts(method: str) -> None:
    message = rf"method '{method}' needs func in two parts: give pfde.Split\(stiff, nonstiff\), or use another method"
    with pytest.raises(TypeError, match=message):
        pfde.odeint(decay, start(), T, method=method)


def test_the_parts_of_a_split() -> None:
    with pytest.raises(TypeError, match=r"stiff must be callable as stiff\(t, y\): got float"):
        pfde.Split(1.0, decay)
    with pytest.raises(TypeError, match=r"nonstiff must be callable as nonstiff\(t, y\): got NoneType"):
        pfde.Split(decay, None)


def test_a_part_of_a_split_that_returns_another_shape() -> None:
    for stiff, nonstiff in ((lambda t, y: y[:2], rest), (rest, lambda t, y: y[:2])):
        with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
            pfde.odeint(pfde.Split(stiff, nonstiff), start(), T, method="ark3")
        with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
            pfde.odeint(pfde.Split(stiff, nonstiff), start(), T, method="ark3")


@pytest.mark.parametrize("method", ["dopri5", "sdirk4"])
def test_schedules_that_need_the_number_of_steps(method: str) -> None:
    from checkpoint_schedules import MultistageCheckpointSchedule

    message = r"needs to know the number of steps, which adaptive steps do not: use pfde.Online\(snapshots=\.\.\.\), or"
    for schedule in (pfde.Revolve(memory="1MB"), MultistageCheckpointSchedule(5, 2, 0)):
        with pytest.raises(ValueError, match=message):
            pfde.odeint(decay, start(), T, method=method, gradient=pfde.Discrete(schedule=schedule))
    foreign = MultistageCheckpointSchedule(5, 2, 0)  # five steps: the intervals of T
    y0 = start()
    y = pfde.odeint(decay, y0, T, method=method, step_size=0.2, gradient=pfde.Discrete(schedule=foreign))
    plain = pfde.odeint(decay, y0, T, method=method, step_size=0.2)
    assert_same(*([torch.autograd.grad(z.square().sum(), y0)[0]] for z in (y, plain)))


def test_revolve_becomes_online_under_adaptive_steps() -> None:
    y0 = start()
    keywords = {"rtol": 1e-9, "atol": 1e-9}
    solution = solve_ode(decay, y0, T, gradient=pfde.Discrete(schedule=pfde.Revolve(3, leaf=2)), **keywords)
    assert solution.stats.schedule == repr(pfde.Online(3, leaf=2))
    (got,) = torch.autograd.grad(solution.y.square().sum(), y0)
    assert 1 <= solution.stats.snapshots_peak <= 3
    (expected,) = torch.autograd.grad(pfde.odeint(decay, y0, T, **keywords).square().sum(), y0)
    assert torch.equal(got, expected)
    fixed = solve_ode(decay, y0, T, method="rk4", gradient=pfde.Discrete(schedule=pfde.Revolve(3)))
    assert fixed.stats.schedule == repr(pfde.Revolve(3))


@pytest.mark.parametrize("gradient", ["adjoint", pfde.Discrete, pfde.Symplectic, 1])
def test_gradient_of_another_kind(gradient: object) -> None:
    message = r"gradient must be pfde.Discrete\(\), pfde.Symplectic\(\), pfde.Continuous\(\) or pfde.Backprop\(\): got"
    with pytest.raises(TypeError, match=message):
        pfde.odeint(decay, start(), T, gradient=gradient)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"atol": NAN}, ValueError, "atol"),
        ({"method": "nope"}, ValueError, "method must be one of"),
        ({"method": "gl"}, ValueError, "method must be one of"),
        ({"step_size": -0.1}, ValueError, "step_size must"),
    ],
)
def test_settings_of_the_continuous_adjoint_are_checked_before_the_solve(
    settings: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pfde.odeint(decay, start(), T, gradient=pfde.Continuous(**settings))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"params": start()}, TypeError, r"params must be a sequence of tensors, such as \(a, b\): got a tensor of"),
        ({"params": [None]}, TypeError, "params must be a sequence of tensors: got NoneType in it"),
        ({"options_prefix": 3}, TypeError, "options_prefix must be a string: got int"),
        ({"options_prefix": "-a_"}, ValueError, "options_prefix must be without dash and spaces.*: got '-a_'"),
        ({"comm": 1}, TypeError, "comm must be an mpi4py communicator or None: got int"),
        ({"stepsize": 0.1}, TypeError, "unexpected keyword argument 'stepsize'"),
        ({"method": "cn", "options": {"snes_rtol": "tight"}}, ValueError, "PETSc does not take .*'tight'"),
        ({"method": "cn", "options": {"fde_jacobian": "sparse"}}, ValueError, "fde_jacobian must be .*: got 'sparse'"),
    ],
)
def test_keywords(keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.odeint(decay, start(), T, **keywords)


@pytest.mark.parametrize(
    ("y0", "error", "message"),
    [
        (torch.tensor([1, 2]), TypeError, r"y0 must be float32 or float64, or complex: got torch.int64; use y0.double"),
        ((), ValueError, "y0 must hold at least one tensor: got an empty tuple"),
        (1.0, TypeError, "y0 must be a tensor or a tuple of tensors: got float"),
        ((torch.ones(2), torch.ones(2, dtype=D)), TypeError, "the tensors of y0 must share precision and device"),
    ],
)
def test_initial_state(y0: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.odeint(lambda t, y: y, y0, T)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"method": "petsc:magic"}, ValueError, "method must be one of petsc:rk:TYPE"),
        ({"method": "petsc:rk:17"}, ValueError, "method petsc:rk:TYPE must have one of the types"),
        ({"gradient": pfde.Symplectic()}, ValueError, r"'petsc:rk:5dp' has .* one gradient only, PETSc's: leave"),
        ({"rtol": torch.full((3,), 1e-3)}, (TypeError, ValueError), "rtol must"),
        ({"atol": (1e-3,)}, (TypeError, ValueError), "atol must"),
        ({"t": T.clone().requires_grad_()}, ValueError, r"t requires a gradient.*pass t.detach\(\)"),
        ({"step_size": 0.3}, ValueError, "step_size"),
    ],
)
def test_native_methods(keywords: dict, error: type[Exception], message: str) -> None:
    keywords = {"t": T, "method": "petsc:rk:5dp"} | keywords
    with pytest.raises(error, match=message):
        pfde.odeint(decay, start(), **keywords)


# -- what func returns, and what it writes -----------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda y: y[:2], ValueError, r"func must return the shape of y, \(3,\): got \(2,\)"),
        (lambda y: y.float(), TypeError, "func must return the dtype of y, torch.float64: got torch.float32; convert"),
        (lambda y: None, TypeError, "func must return a tensor like y: got NoneType"),
        (lambda y: (y,), TypeError, "func must return a tensor like y: got tuple"),
    ],
)
def test_what_func_returns(result: Callable, error: type[Exception], message: str, form: str, grad: bool) -> None:
    if form.startswith("ark"):  # at t[0] the sum of the parts is looked at, where torch may refuse first
        error, message = (ValueError, RuntimeError, TypeError), ".*"  # type: ignore[assignment]
    for func in (lambda t, y: result(y), lambda t, y: result(y) if t > 0.5 else -y):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            solve(func, start(grad=grad), form)


@pytest.mark.parametrize("gradient", [*GRADIENTS, "backprop"])
@pytest.mark.parametrize("form", FORMS)
def test_func_changes_y_in_place(form: str, gradient: str) -> None:
    how = GRADIENTS.get(gradient, pfde.Backprop())

    def late(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            y.detach()[0] = 0.0
        return -y

    def always(t: Tensor, y: Tensor) -> Tensor:
        y += 1
        return -y

    for func in (late, always):
        for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
            y0 = start(grad=context is contextlib.nullcontext)
            with context(), pytest.raises(RuntimeError, match=r"write y = y \+ \.\.\. instead of y \+= \.\.\. in func"):
                solve(func, y0 * 1.0, form, gradient=how)


CHANGED = "modified by an inplace operation"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", ["state", "symplectic", "continuous"])
@pytest.mark.parametrize("which", ["theta", "y0"])
def test_an_input_changed_in_place_before_the_backward_pass(form: str, gradient: str, which: str) -> None:
    f, y0 = Field(), start()
    y = solve(f, y0, form, gradient=GRADIENTS.get(gradient, pfde.Continuous()))
    with torch.no_grad():
        (f.a if which == "theta" else y0).mul_(0.9)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.sum().backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_result_may_be_changed_in_place(form: str, gradient: str) -> None:
    """It shares no memory with what is kept."""
    f, y0 = Field(), start()
    y = solve(f, y0, form, gradient=GRADIENTS[gradient])
    kept = y.detach().clone()
    y.detach().zero_()
    assert_same(list(torch.autograd.grad(y, (y0, f.a), 2 * kept)), gradients(form, gradient=GRADIENTS[gradient]))


# -- gradients that would be lost --------------------------------------------------------------------------------------

CLOSURE = r"func uses a tensor of shape \(3,\) that requires grad but is none of its parameters.*pass params="


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["leaf", "inner", "module", "y0"])
def test_a_closure_that_would_get_none(form: str, kind: str) -> None:
    leaf, y0, module = start(), start(), Field()
    inner = leaf * 2
    func = {
        "leaf": lambda t, y: y * leaf,
        "inner": lambda t, y: y * inner,
        "module": lambda t, y: module(t, y),
        "y0": lambda t, y: y0 - y,
    }[kind]
    for gradient in (None, pfde.Symplectic(), pfde.Continuous(), pfde.Backprop()):
        with pytest.raises(ValueError, match=CLOSURE):
            solve(func, y0, form, gradient=gradient)
    with torch.no_grad():
        solve(func, y0, form)  # no gradient is asked for: nothing is lost


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", ["state", "symplectic", "continuous"])
def test_a_closure_that_appears_late(form: str, gradient: str) -> None:
    w, y0 = start(), start()
    func = lambda t, y: y * w if 0.55 < t < 0.95 else y * w.detach()  # noqa: E731
    y = solve(func, y0, form, gradient=GRADIENTS.get(gradient, pfde.Continuous()))
    with pytest.raises(ValueError, match=CLOSURE):
        y.sum().backward()
    assert y0.grad is None


def test_closures_given_as_params_get_their_gradient() -> None:
    w, y0 = start(), start()
    for params in ((w,), iter([w])):
        y = pfde.odeint(lambda t, y: y * w, y0, T, params=params)
        (w_bar,) = torch.autograd.grad(y[-1].sum(), w)
        assert torch.allclose(w_bar, (y0 * w.exp()).detach(), rtol=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_double_backward_is_refused(form: str) -> None:
    y0 = start()
    for gradient in (None, pfde.Symplectic(), pfde.Continuous()):
        y = solve(decay, y0, form, gradient=gradient)
        with pytest.raises(RuntimeError, match=r"double backward \(create_graph=True\) .* not implemented: use"):
            torch.autograd.grad(y.square().sum(), y0, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
def test_double_backward_through_backprop(form: str) -> None:
    """Explicit methods give it, on their frozen steps; implicit ones refuse."""
    y0 = start(0.4, 0.3, 0.2)

    def slope(y0: Tensor) -> Tensor:
        y = solve(decay, y0, form, gradient=pfde.Backprop())
        return torch.autograd.grad(y[-1].sum(), y0, create_graph=True)[0]

    if form not in ("dopri5", "dopri5 fixed", "rk4"):
        with pytest.raises(RuntimeError, match=r"double backward .* implicit method is not implemented: use an explic"):
            slope(y0)
        return
    (curvature,) = torch.autograd.grad(slope(y0).sum(), y0)
    observed = (slope(y0 + 1e-5) - slope(y0 - 1e-5)) / 2e-5  # f acts on each entry alone
    assert torch.allclose(curvature, observed, rtol=1e-6 if "fixed" in form or form == "rk4" else 1e-3)


def test_transforms_of_torch_func_are_refused() -> None:
    y0 = start(grad=False)
    for method in ("dopri5", "rk4", "petsc:rk:5dp"):
        with pytest.raises(RuntimeError, match=r"a solve inside torch.func .* not implemented"):
            torch.vmap(lambda y, method=method: pfde.odeint(decay, y, T, method=method))(y0.expand(2, 3))


# -- NaN ---------------------------------------------------------------------------------------------------------------


def stiff(t: Tensor, y: Tensor) -> Tensor:
    """y' = -50 (y - cos t), which is NaN where a step that is too large leads."""
    return torch.where(y.abs() < 1.5, -50 * (y - torch.cos(t)), NAN)


@pytest.mark.smoke
@pytest.mark.parametrize("method", ["bosh3", "fehlberg", "dopri5", "tsit5", "dopri8"])
def test_nan_in_a_step_that_is_tried_rejects_it(method: str) -> None:
    y0 = start(1.0, 0.5)
    t = torch.tensor([0.0, 0.7, 1.0], dtype=D)
    keywords = {"method": method, "rtol": 1e-5, "atol": 1e-7, "options": {"first_step": 1.0}}
    solution = solve_ode(stiff, y0, t, **keywords)
    assert solution.stats.rejected > 0
    end = (2500 * torch.cos(t[1:]) + 50 * torch.sin(t[1:])) / 2501  # e^-35 is gone
    assert torch.allclose(solution.y[1:], end[:, None].expand(2, 2), atol=2e-5)
    got = torch.autograd.grad(solution.y.square().sum(), y0)
    y = pfde.odeint(stiff, y0, t, gradient=pfde.Backprop(), **keywords)
    assert torch.allclose(got[0], torch.autograd.grad(y.square().sum(), y0)[0], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("method", ["sdirk4", "esdirk3", "esdirk4"])
def test_nan_in_newtons_method_rejects_a_step_that_is_tried(method: str) -> None:
    """y' = 200 log(2.2 - y): Newton's first iterate is beyond 2.2 where the step is too large."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return 200 * torch.log(2.2 - y)

    y0 = start(-20.0, -10.0)
    t = torch.tensor([0.0, 0.02, 1.0], dtype=D)
    keywords = {"method": method, "rtol": 1e-3, "atol": 1e-4, "options": {"first_step": 1.0}}
    solution = solve_ode(func, y0, t, **keywords)
    assert solution.stats.rejected > 0
    with torch.no_grad():
        expected = pfde.odeint(func, y0, t, rtol=1e-6, atol=1e-6)
    assert torch.allclose(solution.y, expected, rtol=1e-2, atol=5e-2)
    got = torch.autograd.grad(solution.y.square().sum(), y0)
    y = pfde.odeint(func, y0, t, gradient=pfde.Backprop(), **keywords)
    assert torch.allclose(got[0], torch.autograd.grad(y.square().sum(), y0)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("form", ["dopri5", "sdirk4", "ark2"])
def test_nan_that_no_step_size_helps_against(form: str, bad: float) -> None:
    func = lambda t, y: torch.where(t > 0.5, bad, -y)  # noqa: E731
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(pfde.StepLimitError, match=r"at t=0\.5, .*NaN or inf") as got:
            solve(func, start(grad=grad), form)
        assert got.value.t == pytest.approx(0.5, abs=1e-9)
    assert_same(gradients(form), gradients(form))


@pytest.mark.parametrize("form", FORMS)
def test_nan_at_the_start(form: str) -> None:
    with pytest.raises(pfde.NonFiniteError, match=r"NaN or inf at t=0, step 0"):
        solve(lambda t, y: y * NAN, start(), form)


@pytest.mark.parametrize(
    ("form", "where"),
    [
        ("rk4", r"t=0\.4 and t=0\.6, step 3"),
        ("dopri5 fixed", r"t=0\.4 and t=0\.6, step 3"),
        ("cn", "t=0.6, step 3"),
        ("ark3 fixed", "t=0"),
    ],
)
def test_nan_with_fixed_steps_names_t_and_step(form: str, where: str) -> None:
    func = lambda t, y: torch.where(t > 0.5, NAN, -y)  # noqa: E731
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(pfde.NonFiniteError, match=f"NaN or inf (at|between) {where}"):
            solve(func, start(grad=grad), form)
        with torch.set_grad_enabled(grad), pytest.raises(pfde.NonFiniteError, match="step 3: reduce step_size, use an"):
            solve(func, start(grad=grad), form)
    assert_same(gradients(form), gradients(form))


def test_a_solution_that_ends() -> None:
    """y' = y^2, y(0) = 1 ends at t = 1."""
    t = torch.tensor([0.0, 2.0], dtype=D)
    with pytest.raises(pfde.StepLimitError, match=r"the step size fell to \S+ at t=1, below") as caught:
        pfde.odeint(lambda t, y: y * y, start(1.0), t, rtol=1e-8, atol=1e-8)
    assert caught.value.t == pytest.approx(1.0, abs=1e-6)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dopri5", "sdirk4", "ark2"])
def test_too_many_steps(form: str) -> None:
    func = lambda t, y: -y  # noqa: E731
    y0 = start().detach().reshape(3, 1).requires_grad_()
    options = {"max_num_steps": 4, "first_step": 1e-4, "max_step": 1e-2}
    with pytest.raises(
        pfde.StepLimitError, match=r"4 steps were tried and t=\S+ reached: raise .*max_num_st"
    ) as caught:
        solve(func, y0, form, options=options)
    error = caught.value
    assert error.t is not None
    assert 0 < error.t < 0.05
    assert f"t={error.t:.6g}" in str(error)
    rate = 1.1 if form == "ark2" else 1.0
    expected = y0.detach() * math.exp(-rate * error.t)
    assert isinstance(error.y, Tensor)
    assert not error.y.requires_grad
    assert torch.allclose(error.y.reshape(3, 1), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("y0", "shapes"),
    [
        (torch.ones(2, 3, dtype=D), [(2, 3)]),
        (torch.tensor(1.0, dtype=D), [()]),
        ((torch.ones(2, dtype=D), torch.ones(1, 3, dtype=D)), [(2,), (1, 3)]),
        (torch.ones(2, dtype=torch.complex128), [(2,)]),
    ],
)
def test_what_a_limit_reached_is_of_y0s_shape(y0: object, shapes: list) -> None:
    f = lambda t, y: tuple(-x for x in y) if isinstance(y, tuple) else -y  # noqa: E731
    with pytest.raises(pfde.StepLimitError) as caught:
        pfde.odeint(f, y0, T, options={"max_num_steps": 2})
    y = caught.value.y
    assert isinstance(y, tuple) == isinstance(y0, tuple)
    parts, given = (y, y0) if isinstance(y, tuple) else ((y,), (y0,))
    assert [tuple(part.shape) for part in parts] == shapes
    assert [part.dtype for part in parts] == [part.dtype for part in given]


def test_min_step() -> None:
    message = r"the step size fell to \S+ at t=0, below 0.5, min_step: the error estimate asks for less; use"
    with pytest.raises(pfde.StepLimitError, match=message):
        pfde.odeint(lambda t, y: torch.sin(50 * y), start(), T, options={"min_step": 0.5, "first_step": 0.5})
    y = pfde.odeint(lambda t, y: -y, start(), T, options={"min_step": 1e-6})
    assert torch.equal(y, pfde.odeint(lambda t, y: -y, start(), T))


EARLY = "the forward pass ended early, so it has no gradient"
HOW = {**GRADIENTS, "backprop": pfde.Backprop(), "continuous": pfde.Continuous()}


@pytest.mark.parametrize("gradient", HOW)
@pytest.mark.parametrize("method", ["dopri5", "sdirk4"])
def test_a_limit_may_return_what_was_reached(method: str, gradient: str) -> None:
    f, y0 = Field(), start()
    options = {"max_step": 0.15, "first_step": 0.1, "max_num_steps": 4, "on_limit": "return"}
    keywords = {"method": method, "gradient": HOW[gradient], **LOOSE}
    solution = solve_ode(f, y0, T, options=options, **keywords)
    assert solution.status == "limit"
    assert torch.equal(solution.t, T[: len(solution.t)])
    assert len(solution.t) == 3  # t = 0.55 was reached
    assert solution.y.shape == (3, 3)
    whole = solve_ode(f, y0, T, options={"max_step": 0.15, "first_step": 0.1}, **keywords)
    assert whole.status == "completed"
    assert torch.allclose(solution.y, whole.y[:3], rtol=1e-12)
    with pytest.raises(pfde.PfdeError, match=EARLY):
        solution.y.sum().backward()
    assert y0.grad is None
    y = pfde.odeint(f, y0, T, options=options, **keywords)
    assert len(y) == 3
    with pytest.raises(pfde.PfdeError, match=EARLY):
        (y.square().sum() + y0.sum()).backward()
    with torch.no_grad():
        assert len(pfde.odeint(f, y0, T, options=options, **keywords)) == 3
    pfde.odeint(f, y0, T, **keywords).sum().backward()  # the next one works


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    y0 = start()
    solution = solve_ode(decay, y0, T, options={"on_limit": "return"})
    assert solution.status == "completed"
    solution.y.sum().backward()
    assert torch.equal(solution.y, pfde.odeint(decay, y0, T))


def test_a_step_that_becomes_too_small_may_return() -> None:
    func = lambda t, y: torch.where(t > 0.5, NAN, -y)  # noqa: E731
    solution = solve_ode(func, start(), T, options={"on_limit": "return"})
    assert solution.status == "limit"
    assert torch.allclose(solution.y[:, 0], torch.exp(-T[:3]), rtol=1e-6)
    assert solution.stats.rejected > 0


# -- stages that do not converge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sdirk4", "esdirk3", "esdirk4"])
def test_a_stage_that_does_not_converge_shrinks_an_adaptive_step(method: str) -> None:
    """y = tan(t / 2): a stage y = r + w (y^2 + 1) / 2 has no real solution for large w."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (y * y + 1) * 0.5

    y0, t = start(0.0), torch.tensor([0.0, 2.8], dtype=D)
    solution = solve_ode(func, y0, t, method=method, rtol=1e-6, atol=1e-8, options={"first_step": 2.8})
    assert solution.stats.rejected > 0
    assert torch.allclose(solution.y[-1], torch.tan(t[-1:] / 2), rtol=1e-3)
    (slope,) = torch.autograd.grad(solution.y[-1].sum(), y0)
    assert torch.allclose(slope, 1 / torch.cos(t[-1:] / 2) ** 2, rtol=1e-2)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", ["beuler", "cn", "implicit_midpoint", "sdirk4", "esdirk3", "esdirk4"])
def test_a_stage_that_does_not_converge_with_fixed_steps(method: str, grad: bool) -> None:
    """y = r + w K (y^2 + 1) has no real solution for large K."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (y * y + 1) * (1e3 if t > 0.65 else 0.01)

    message = r"the stage equation did not converge at t=0\.[678]\d*, step 4: DIVERGED_\w+ after .*reduce step_size"
    with torch.set_grad_enabled(grad), pytest.raises(pfde.ConvergenceError, match=message):
        pfde.odeint(func, start(grad=grad), T, method=method, step_size=0.2)
    assert_same(gradients("cn"), gradients("cn"))


def test_an_adjoint_system_that_does_not_converge() -> None:
    """The forward pass stays in an eigenspace of A, where GMRES needs one iteration; its transpose does not."""
    A = torch.tensor([[-1.0, 2.0], [0.0, -3.0]], dtype=D)
    y0 = start(1.0, 0.0)
    y = pfde.odeint(
        lambda t, y: A @ y, y0, T, method="cn", options={"fde_jacobian": "matrix_free", "adjoint_ksp_max_it": 1}
    )
    with pytest.raises(pfde.ConvergenceError, match=r"adjoint system did not converge at t=1, step 5: DIVERGED_\w+"):
        y[:, 0].sum().backward()
    assert y0.grad is None


# -- exceptions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["state", "graph", "online", "symplectic", "continuous", "backprop"])
@pytest.mark.parametrize("form", ["dopri5", "rk4", "cn", "sdirk4", "ark3 fixed"])
def test_an_exception_in_func(form: str, gradient: str) -> None:
    """Forward and backward, at the first, some middle and the last evaluation: it comes out as it was raised."""
    keywords = {"gradient": HOW[gradient]}
    error = ValueError("boom") if gradient in ("state", "backprop") else KeyboardInterrupt("ctrl-c")
    expected = gradients(form, **keywords)
    f, y0 = Field(), start()
    y = solve(f, y0, form, **keywords)
    forward = f.calls
    y.square().sum().backward()
    last = f.calls
    for k in {1, 3, forward // 2, forward, forward + 1, (forward + last) // 2, last} & set(range(1, last + 1)):
        f = Field()

        def hook(call: int, k: int = k) -> None:
            if call == k:
                raise error

        f.hook, y0, stage = hook, start(), "forward"
        with pytest.raises(type(error)) as caught:
            y = solve(f, y0, form, **keywords)
            stage = "backward"
            y.square().sum().backward()
        assert caught.value is error
        assert error.__cause__ is None
        assert stage == ("forward" if k <= forward else "backward")
        assert y0.grad is None
    assert_same(gradients(form, **keywords), expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_backward_pass_after_a_failed_one(form: str, gradient: str) -> None:
    """The failed one has overwritten some of what was kept: the next computes it anew and gives the same bits."""
    keywords = {"gradient": GRADIENTS[gradient]}
    expected = gradients(form, **keywords)
    f, y0, stop = Field(), start(), [0]
    loss = solve(f, y0, form, **keywords).square().sum()

    def hook(k: int) -> None:
        if k == stop[0]:
            raise KeyboardInterrupt

    f.hook = hook
    stop[0] = f.calls + (2 if gradient != "graph" else 0)
    with contextlib.suppress(KeyboardInterrupt):
        torch.autograd.grad(loss, (y0, f.a), retain_graph=True)
    stop[0] = 0
    assert_same(list(torch.autograd.grad(loss, (y0, f.a))), expected)


@pytest.mark.parametrize("gradient", [*GRADIENTS, "continuous"])
@pytest.mark.parametrize("form", FORMS)
def test_backward_twice(form: str, gradient: str) -> None:
    f, y0, keywords = Field(), start(), {"gradient": HOW[gradient]}
    loss = solve(f, y0, form, **keywords).square().sum()
    first = torch.autograd.grad(loss, (y0, f.a), retain_graph=True)
    second = torch.autograd.grad(loss, (y0, f.a))
    assert_same(list(second), list(first))
    assert_same(list(first), gradients(form, **keywords))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (y0, f.a))


@pytest.mark.parametrize("form", FORMS)
def test_two_solves_pending(form: str) -> None:
    expected, solves = gradients(form), []
    for _ in range(2):
        f, y0 = Field(), start()
        solves.append((solve(f, y0, form).square().sum(), (y0, f.a)))
    for loss, inputs in solves:
        assert_same(list(torch.autograd.grad(loss, inputs)), expected)


def test_a_solve_inside_func_of_another() -> None:
    inner_t = torch.tensor([0.0, 0.5], dtype=D)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return pfde.odeint(decay, y, inner_t, **LOOSE)[-1] - 1.5 * y

    for method in ("dopri5", "cn"):
        y0 = start()
        (y0_bar,) = torch.autograd.grad(pfde.odeint(func, y0, T, method=method, rtol=1e-4, atol=1e-6)[-1].sum(), y0)
        assert torch.isfinite(y0_bar).all()


# -- modes of torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_no_grad_and_inference_mode(form: str) -> None:
    f = Field()
    expected = solve(f, start(), form).detach()
    for context in (torch.no_grad, torch.inference_mode):
        for gradient in (None, pfde.Backprop(), pfde.Continuous()):
            with context():
                y = pfde.odeint(split(f, FORMS[form]), start(grad=False), T.clone(), gradient=gradient, **FORMS[form])
            assert not y.requires_grad
            assert torch.equal(y, expected)


def test_inference_mode_with_native_methods() -> None:
    with torch.no_grad():
        expected = pfde.odeint(decay, start(), T, method="petsc:rk:5dp", step_size=0.1)
    with torch.inference_mode():
        y = pfde.odeint(decay, start(grad=False), T.clone(), method="petsc:rk:5dp", step_size=0.1)
    assert torch.equal(y, expected)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", HOW)
@pytest.mark.parametrize("form", FORMS)
def test_a_solve_is_freed_with_its_result(form: str, gradient: str) -> None:
    """Without the garbage collector: f (what it holds may be large) goes with the last reference to y."""
    for keep_graph in (True, False):
        with without_collector():
            f = Field()
            alive = weakref.ref(f)
            y = solve(f, start(), form, gradient=HOW[gradient])
            if not keep_graph:
                y.sum().backward()
            del f
            del y
            assert alive() is None, f"keep_graph={keep_graph}"


@pytest.mark.parametrize("fault", ["forward", "backward", "limit", "returned limit", "nan"])
@pytest.mark.parametrize("form", ["dopri5", "sdirk4", "ark2", "rk4", "cn"])
def test_a_solve_is_freed_after_an_error(form: str, fault: str) -> None:
    if form in ("rk4", "cn") and "limit" in fault:
        pytest.skip("fixed steps have no limits")

    class Failing(Field):
        stop = 0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            if self.stop == self.calls:
                raise ZeroDivisionError
            value = super().forward(t, y)
            return value * NAN if fault == "nan" and t > 0.3 else value

    def attempt(f: Failing) -> None:
        keywords = {}
        if "limit" in fault:
            keywords = {"options": {"max_num_steps": 1} | ({"on_limit": "return"} if "returned" in fault else {})}
        f.stop = 6 if fault == "forward" else -1
        y = solve(f, start(), form, **keywords)
        f.stop = f.calls + 2 if fault == "backward" else -1
        y.sum().backward()

    with without_collector():
        f = Failing()
        alive = weakref.ref(f)
        failed = False
        try:
            attempt(f)
        except (ZeroDivisionError, pfde.PfdeError):
            failed = True
        assert failed
        del f
        assert alive() is None
