"""Arguments that only `odeint` has: methods, tolerances, options, mass, parts and schedules that it refuses."""

import math

import pytest
import torch

import pfde
from pfde.caputo.schemes import METHODS
from pfde.one_step.methods import METHODS as ODE_METHODS
from support.faults import NAN, D, T, assert_same, decay, gradients, rest, start
from support.solution import solve_ode


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
        ({"method": "petsc:magic"}, ValueError, "method must be one of petsc:rk:TYPE"),
        ({"method": "petsc:rk:17"}, ValueError, "method petsc:rk:TYPE must have one of the types"),
        ({"gradient": pfde.Symplectic()}, ValueError, r"'petsc:rk:5dp' has .* one gradient only, PETSc's: leave"),
        ({"rtol": torch.full((3,), 1e-3)}, (TypeError, ValueError), "rtol must"),
        ({"atol": (1e-3,)}, (TypeError, ValueError), "atol must"),
        ({"t": T.clone().requires_grad_()}, ValueError, r"t requires a gradient.*pass t.detach\(\)"),
        ({"step_size": 0.3}, ValueError, "step_size"),
    ],
)
def test_petscs_methods(keywords: dict, error: type[Exception], message: str) -> None:
    keywords = {"t": T, "method": "petsc:rk:5dp"} | keywords
    with pytest.raises(error, match=message):
        pfde.odeint(decay, start(), **keywords)
