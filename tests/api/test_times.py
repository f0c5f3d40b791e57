"""Output times that are repeated or single, states without entries, and steps that cannot be.

Where nothing moves y is y0, and no step is taken; a repeated time is one more output. The gradient of t is compared
with the closed form, each time moved on its own.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import pfde

D = torch.float64
EPS = 2.0**-52
ODE = ["dopri5", "rk4", "cn", "esdirk3"]
APIS = ["petsc:rk:5dp", "petsc:cn", *ODE, "trapezoid", "gl", "pece"]
HOW = [
    None,
    pfde.Discrete(store="graph"),
    pfde.Discrete(schedule=pfde.Online(2), store="stages"),
    pfde.Symplectic(),
    pfde.Backprop(),
]
TIMES = [[0.0], [0.0, 0.0], [0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.5, 1.0, 1.0]]


class Decay(nn.Module):
    """y' = -a y (1 + t), entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.a * y * (1 + t)


def start() -> Tensor:
    return torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)


def solve(method: str, f: nn.Module, y0: object, t: Tensor, **keywords: object) -> object:
    """By the api that has the method."""
    if method in ("trapezoid", "gl", "pece"):
        return pfde.fdeint(f, y0, t, 0.6, method=method, **keywords)
    return pfde.odeint(f, y0, t, method=method, **keywords)


def unlike(values: Tensor) -> Tensor:
    """Cotangents that differ from row to row."""
    return torch.arange(1.0, len(values) + 1, dtype=D).unsqueeze(1).expand_as(values)


def gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, unlike(y)))


@pytest.mark.parametrize("times", TIMES, ids=str)
@pytest.mark.parametrize("method", APIS)
def test_a_repeated_time_is_one_more_output(method: str, times: list[float]) -> None:
    """Values equal to the bit those at the distinct times; y0's and the parameter's gradients get all rows."""
    f, y0 = Decay(), start()
    y = solve(method, f, y0, torch.tensor(times, dtype=D))
    assert y.shape == (len(times), 2) and torch.equal(y[0], y0)
    once = sorted(set(times))
    rows = [once.index(t) for t in times]
    bars = torch.zeros(len(once), 2, dtype=D).index_add(0, torch.tensor(rows), unlike(y))
    found = gradients(y, y0, f.a)
    if len(once) == 1:
        assert torch.equal(y, y0.expand_as(y))
        assert torch.equal(found[0], bars[0]) and found[1] == 0
        return
    plain = solve(method, f, y0, torch.tensor(once, dtype=D))
    assert torch.equal(y, plain[rows])
    expected = torch.autograd.grad(plain, (y0, f.a), bars)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-14 * b.abs().max()


@pytest.mark.parametrize("times", [*TIMES, [1.0, 1.0, 0.5, 0.0, 0.0]], ids=str)
@pytest.mark.parametrize("gradient", HOW, ids=repr)
@pytest.mark.parametrize("method", ["dopri5", "rk4", "cn"])
def test_each_output_moves_with_its_own_time(method: str, gradient: object, times: list[float]) -> None:
    """t's gradient by differences of solves at times moved apart: to the error of the solve and of the differences."""
    keywords = {"rtol": 1e-9, "atol": 1e-11} if method == "dopri5" else {"step_size": 0.0625}
    f, y0, t = Decay(), start(), torch.tensor(times, dtype=D, requires_grad=True)
    y = solve(method, f, y0, t, gradient=gradient, **keywords)
    found = gradients(y, y0, f.a, t)
    if len(times) == 1:
        assert found[2] == 0
        return
    base, exact = torch.tensor(times, dtype=D), start().detach()

    def value(moved: Tensor) -> Tensor:
        """The closed form: y(t_i) = y0 exp(-a ((t_i - t_0) + (t_i^2 - t_0^2) / 2))."""
        return exact * torch.exp(-0.5 * ((moved - moved[0]) + (moved**2 - moved[0] ** 2) / 2)).unsqueeze(1)

    expected = torch.func.vjp(value, base)[1](unlike(y))[0]
    tolerance = {"dopri5": 1e-5, "rk4": 1e-5, "cn": 2e-2}[method]  # the error of the method in y'
    assert (found[2] - expected).abs().max() < tolerance * expected.abs().max()
    same = gradients(solve(method, f, y0, t, gradient=pfde.Backprop(), **keywords), y0, f.a, t)
    for a, b in zip(found, same, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_where_it_ends_early_the_repeated_outputs_end_too() -> None:
    t = torch.tensor([0.0, 0.5, 0.5, 0.9, 2.0, 2.0], dtype=D, requires_grad=True)
    options = {"on_limit": "return"}
    solution = pfde.solve(lambda t, y: y**2, torch.ones(1, dtype=D), t, options=options)  # y = 1 / (1 - t)
    assert solution.status == "limit" and len(solution.t) == 4 and len(solution.y) == 4
    assert (solution.y.squeeze() - 1 / (1 - solution.t)).abs().max() < 1e-5


def test_the_continuous_adjoint_and_tuple_states() -> None:
    f, y0 = Decay(), (start(), start())

    def both(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(t, y[0]), f(t, y[1])

    for gradient in (None, pfde.Continuous()):
        t = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=D, requires_grad=True)
        y = pfde.odeint(both, y0, t, params=[f.a], gradient=gradient)
        assert torch.equal(y[0][2], y[0][3]) and torch.equal(y[1][0], y[1][1])
        (bar,) = torch.autograd.grad(y[0][3].sum(), t)
        assert bar[3] == pytest.approx(-0.5 * 2 * float(y[0][3].detach().sum()), rel=1e-5)
        assert bar[1] == bar[2] == 0 or abs(bar[2]) < 1e-5


@pytest.mark.parametrize("method", APIS)
def test_nothing_moves_in_one_time(method: str) -> None:
    """f is looked at once, as in every solve; y shares no memory with y0; y0 alone may require no gradient."""
    f, y0 = Decay(), start().detach()
    y = solve(method, f, y0, torch.tensor([2.0], dtype=D))
    y.sum().backward()  # on the parameter's graph, so that a training step with no data but the start runs
    assert f.a.grad == 0
    with torch.no_grad():
        y = solve(method, f, y0, torch.tensor([2.0], dtype=D))
        y.zero_()
    assert y0.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="shape"):
        solve(method, lambda t, y: y[:1], y0, torch.tensor([2.0], dtype=D))
    with torch.inference_mode():
        assert torch.equal(solve(method, f, y0, torch.tensor([2.0, 2.0], dtype=D)), y0.expand(2, 2))


def test_where_times_are_one_t_has_no_gradient_in_a_caputo_equation() -> None:
    t = torch.tensor([1.0, 1.0], dtype=D, requires_grad=True)
    with pytest.raises(ValueError, match=r"all its times are t\[0\].*infinite for alpha < 1: pass t.detach\(\)"):
        pfde.fdeint(Decay(), start(), t, 0.5)
    y = pfde.fdeint(Decay(), start(), t[:1], 0.5)
    assert torch.autograd.grad(y.sum(), t)[0].tolist() == [0.0, 0.0]


def test_a_step_size_and_repeated_times_go_together() -> None:
    f, t = Decay(), torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=D)
    y = pfde.fdeint(f, start(), t, 0.6, step_size=0.25, method="gl")
    assert torch.equal(y[1], y[2]) and not torch.equal(y[2], y[3])
    y = pfde.odeint(f, start(), t, method="rk4", step_size=0.25)
    assert torch.equal(y[1], y[2]) and not torch.equal(y[2], y[3])


# -- states without entries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0], [0.0, 0.5, 0.5]], ids=str)
@pytest.mark.parametrize("method", APIS)
def test_an_empty_batch(method: str, times: list[float]) -> None:
    net = nn.Linear(3, 3, dtype=D)
    y0 = torch.zeros(0, 3, dtype=D, requires_grad=True)
    y = solve(method, lambda t, y: torch.tanh(net(y)), y0, torch.tensor(times, dtype=D), params=net.parameters())
    assert y.shape == (len(times), 0, 3)
    found = torch.autograd.grad(y.sum(), (y0, *net.parameters()))
    assert found[0].shape == (0, 3) and all(not bar.any() for bar in found[1:])
    with pytest.raises(ValueError, match="shape"):
        solve(method, lambda t, y: y[:, :2], y0, torch.tensor(times, dtype=D))


@pytest.mark.parametrize("method", APIS)
def test_an_empty_part_of_a_tuple(method: str) -> None:
    f, y0 = Decay(), (start(), torch.zeros(0, 3, dtype=D))

    def both(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(t, y[0]), -y[1]

    y = solve(method, both, y0, torch.tensor([0.0, 1.0], dtype=D), params=[f.a])
    assert y[1].shape == (2, 0, 3)
    assert torch.equal(y[0], solve(method, f, y0[0], torch.tensor([0.0, 1.0], dtype=D)))
    y[0].sum().backward()
    assert f.a.grad.abs() > 0


def test_an_empty_state_has_no_events() -> None:
    with pytest.raises(ValueError, match=r"y0 must have entries to look for an event: got shape \(0,\)"):
        pfde.odeint_event(lambda t, y: y, torch.zeros(0), 0.0, event_fn=lambda t, y: y.sum() - t + 1)


# -- steps that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ODE)
def test_times_a_few_spacings_apart_are_one_step(method: str) -> None:
    """1 + 5 spacings: y' = -1 takes y down by as much, where y can hold it."""
    y = solve(method, lambda t, y: -torch.ones_like(y), torch.zeros(2, dtype=D), torch.tensor([1.0, 1 + 5 * EPS]).to(D))
    assert y[-1].tolist() == [0.0, 0.0]  # float32 times: one
    t = torch.tensor([1.0, 1 + 5 * EPS], dtype=D)
    y = solve(method, lambda t, y: -torch.ones_like(y), torch.zeros(2, dtype=D), t)
    assert y[-1].tolist() == pytest.approx([-5 * EPS] * 2, rel=1e-6)


def test_times_that_petsc_does_not_tell_apart() -> None:
    t = torch.tensor([1.0, 1 + 5 * EPS], dtype=D)
    with pytest.raises(ValueError, match="which PETSc's step control takes for the same time"):
        pfde.odeint(Decay(), start(), t, method="petsc:rk:5dp")


def test_a_step_that_falls_below_the_resolution_of_time_says_so() -> None:
    t = torch.tensor([1e6, 1e6 + 1.0], dtype=D)
    with pytest.raises(pfde.StepLimitError, match=r"at t=\S+, below \S+, the resolution of float64 there: the error"):
        pfde.odeint(lambda t, y: y**2, torch.full((1,), 10.0, dtype=D), t)


@pytest.mark.parametrize("method", APIS)
@pytest.mark.parametrize(
    ("step_size", "message"),
    [
        (1e300, r"step_size must (not be longer than an interval|be in \(0, t\[-1\] - t\[0\] = 1\]).*1e\+300"),
        (
            1e-300,
            r"step_size=1e-300 would make 1e\+300 steps of an interval of 1, above 2147483647.*increase step_size",
        ),
        (5e-324, r"step_size=4.94066e-324 would make inf steps .*above 2147483647"),
        (1e-10, r"step_size=1e-10 would make 1e\+10 steps"),
    ],
)
def test_step_sizes_that_cannot_be(method: str, step_size: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(method, Decay(), start(), torch.tensor([0.0, 1.0], dtype=D), step_size=step_size)


@pytest.mark.parametrize("method", APIS)
def test_a_span_that_overflows(method: str) -> None:
    with pytest.raises(ValueError, match=r"t\[-1\] - t\[0\] must be finite in float64: got t\[0\]=-1.7e\+308"):
        solve(method, Decay(), start(), torch.tensor([-1.7e308, 1.7e308], dtype=D))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"step_size": 1e-300, "t_max": 2.0}, r"would make 1e\+300 steps"),
        ({"step_size": 1e-300}, "step_size=1e-300 is too small for t0=1 in float64: 1000000 steps.*end at 1"),
        ({"step_size": 1e305}, r"step_size=1e\+305 is too large for t0=1"),
        ({"step_size": math.inf}, "step_size must be finite"),
        ({"t0": 2e300}, r"t_max must be given for t0=2e\+300"),
        ({"t0": 2e300, "reverse_time": True, "t_max": 2e300}, r"t_max must be below t0=2e\+300: got 2e\+300"),
        ({"t_max": 1.0}, "t_max must be above t0=1: got 1"),
    ],
)
def test_events_from_where_no_step_can_be_taken(keywords: dict, message: str) -> None:
    arguments = {"t0": 1.0, "method": "rk4" if "step_size" in keywords else "dopri5", **keywords}
    t0 = arguments.pop("t0")
    with pytest.raises(ValueError, match=message):
        pfde.odeint_event(Decay(), start(), t0, event_fn=lambda t, y: y[0] - 0.5, **arguments)


def test_limits_of_adaptive_steps() -> None:
    """min_step holds for the step size that pfde itself begins with; the last step, here the only one, may be less."""
    f, t = Decay(), torch.tensor([0.0, 0.1], dtype=D)
    loose = {"rtol": 1e-2, "atol": 1e-2}
    expected = pfde.odeint(f, start(), t)
    for least in (0.02, 0.5):
        y = pfde.odeint(f, start(), t, options={"min_step": least}, **loose)
        assert (y - expected).abs().max() < 1e-2
    with pytest.raises(ValueError, match=r"'first_step' must not be below min_step=0\.5: got 0\.1"):
        pfde.odeint(f, start(), t, options={"min_step": 0.5, "first_step": 0.1})
