"""An implicit stage is done when each component is at its own rounding floor: float32 against float64, by component.

A step rounds y and what it is made of a few times, each time by eps/2 of its size: N steps may be N times a small
multiple of eps off. What follows is judged by 4 or 8 N eps, relative to each component's own largest value.
"""

import math

import pytest
import torch

import pfde
from pfde.caputo.schemes import METHODS
from support.covering import pairs

FRACTIONAL = [name for name, scheme in METHODS.items() if scheme.implicit]
ONE_STEP = ["beuler", "cn", "implicit_midpoint", "sdirk4", "esdirk3", "esdirk4"]
NATIVE = ["petsc:beuler", "petsc:cn", "petsc:arkimex:3"]
EPS32 = torch.finfo(torch.float32).eps


def solve(f, y0, end, method, steps, dtype, options=None, **keywords):
    """y at the end, (d,) of float64."""
    t = torch.tensor([0.0, end], dtype=dtype)
    keywords |= {"method": method, "step_size": end / steps, "options": options or {}}
    if method in FRACTIONAL and method not in ONE_STEP:
        return pfde.fdeint(f, y0.to(dtype), t, 1.0, **keywords)[-1].double()
    return pfde.odeint(f, y0.to(dtype), t, **keywords)[-1].double()


def assert_close_by_component(low, high, size, bound):
    """|low - high| <= bound * size in every component."""
    error = ((low - high).abs() / size).max().item()
    assert error <= bound, (error, bound, low, high)


def epidemic(t, y):
    """1e6 susceptible, a handful infected, few recovered."""
    new = 3e-6 * y[0] * y[1]
    return torch.stack([-new, new - y[1], y[1]])


def chemistry(t, y):
    """A trace species of 1e-12 beside ones of order 1."""
    made = 1e-12 * y[0] * y[2]
    return torch.stack([-0.5 * y[0], made - 2.0 * y[1] - 1e11 * y[1] * y[1], 0.5 * y[0] - 0.1 * y[2]])


@pytest.mark.parametrize("method", [*FRACTIONAL, *(m for m in ONE_STEP if m not in FRACTIONAL), *NATIVE])
def test_small_increments_are_not_lost(method):
    """y' = -1e-3 y in float32, 50 steps of 1e-3: an increment is 8 eps of y."""
    y = solve(lambda t, y: -1e-3 * y, torch.ones(1), 0.05, method, 50, torch.float32)
    exact = solve(lambda t, y: -1e-3 * y, torch.ones(1), 0.05, method, 50, torch.float64)
    assert abs(float(exact) - math.exp(-5e-5)) < 1e-7
    assert_close_by_component(y, exact, 1.0, 2 * 50 * EPS32)
    assert float(y) < 1 - 2.5e-5


@pytest.mark.parametrize(
    ("method", "model", "form"),
    pairs(
        [*FRACTIONAL, "cn", "sdirk4", "esdirk4", *NATIVE],
        ["epidemic", "chemistry"],
        ["auto", "matrix_free"],
        valid=lambda method, _, form: method not in NATIVE or form == "auto",  # petsc: methods have one form
    ),
)
def test_float32_agrees_with_float64_component_by_component(method, model, form):
    f, y0 = {
        "epidemic": (epidemic, torch.tensor([1e6, 5.0, 0.0])),
        "chemistry": (chemistry, torch.tensor([1.0, 1e-12, 0.3])),
    }[model]
    options = {} if method in NATIVE else {"fde_jacobian": form}
    steps = 10
    low, high = (solve(f, y0, 1.0, method, steps, d, options) for d in (torch.float32, torch.float64))
    # The derivative form convolves y - y_0, and what is small beside y_0 is known to eps |y_0| only.
    size = torch.maximum(high.abs(), y0.double()) if method in FRACTIONAL else high.abs()
    assert_close_by_component(low, high, size, 8 * steps * EPS32)


@pytest.mark.parametrize("form", ["auto", "matrix_free", "dense"])
@pytest.mark.parametrize("method", ["cn", "sdirk4", "trapezoid"])
def test_a_component_far_below_the_others_moves(method, form):
    """(1e5, 1e-8) with y_1 at rest: y_2 decays as if it were alone."""

    def f(t, y):
        return torch.stack([0 * y[0], -y[1]])

    both = solve(
        f, torch.tensor([1e5, 1e-8], dtype=torch.float64), 1.0, method, 10, torch.float64, {"fde_jacobian": form}
    )
    alone = solve(lambda t, y: -y, torch.tensor([1e-8], dtype=torch.float64), 1.0, method, 10, torch.float64)
    assert abs(float(both[1] / alone[0]) - 1) < 1e-14


def test_adaptive_steps_of_a_small_component():
    """(1000, 1) in float32, the second decaying: right at each tolerance, not worse at the tighter."""
    y0, t = torch.tensor([1e3, 1.0]), torch.tensor([0.0, 1.0])
    for rtol in (1e-4, 1e-5, 1e-6):
        y = pfde.odeint(lambda t, y: torch.stack([0 * y[0], -y[1]]), y0, t, method="sdirk4", rtol=rtol)
        assert abs(float(y[-1, 1]) - math.exp(-1)) < 1e-4


@pytest.mark.parametrize("form", ["blocks", "matrix_free"])
def test_one_system_of_a_batch_moves_while_the_others_rest(form):
    y0 = torch.ones(1024, 4)
    y0[7] = 1.5
    options = {"fde_jacobian": form}
    t = torch.tensor([0.0, 1.0])
    y = pfde.odeint(lambda t, y: 1 - y, y0, t, method="cn", step_size=0.1, options=options)
    alone = pfde.odeint(lambda t, y: 1 - y, y0[7:8].double(), t.double(), method="cn", step_size=0.1)
    assert_close_by_component(y[-1, 7].double(), alone[-1, 0], 1.0, 4 * 10 * EPS32)
    assert torch.equal(y[-1, 8], torch.ones(4))


def test_a_step_that_is_zero_does_not_end_a_component_that_others_still_move():
    """y_2' = 1e3 (y_1^2 - y_2) from y_1 = 0: Newton's first step leaves y_2 where it was, exactly."""

    def f(t, y):
        return torch.stack([1 + 0 * y[0], 1e3 * (y[0] ** 2 - y[1])])

    y = solve(f, torch.zeros(2, dtype=torch.float64), 0.1, "beuler", 1, torch.float64)
    assert abs(float(y[1]) - 1e2 * 0.01 / 101) < 1e-15


@pytest.mark.parametrize("form, k", [("dense", 1e11), ("matrix_free", 1e6)])
def test_coupling_with_large_terms_that_cancel_ends(form, k):
    """f_2 = k (y_1 - y_2): the floor of G_2 is k h eps, far above that of its small terms."""

    def f(t, y):
        return torch.stack([-y[0] + 1e-3 * y[2], k * (y[0] - y[1]), k * (y[1] - y[0]) - y[2]])

    y0 = torch.tensor([1.0, 1.0, 1e-3], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"fde_jacobian": form}
    solution = pfde.solve(f, y0, t, method="beuler", alpha=1.0, step_size=0.1, options=options)
    assert abs(float(solution.y[-1, 1] / solution.y[-1, 0]) - 1) < 10 / k
    assert solution.stats.newton_iterations <= 8 * 10


def test_values_that_underflow_end():
    """y falls by 1e-11 in each step, to the smallest floats and below."""
    y = solve(lambda t, y: -1e12 * y, torch.tensor([0.5]), 1.0, "esdirk4", 10, torch.float32)
    assert abs(float(y)) < torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("diagonal", [True, False])
def test_rows_without_y(diagonal):
    """A singular M: y_1' = -y_1, 0 = y_1 + y_2 - 1e3, in float32."""
    mass = torch.tensor([1.0, 0.0]) if diagonal else torch.diag(torch.tensor([1.0, 0.0]))

    def f(t, y):
        return torch.stack([-y[0], y[0] + y[1] - 1e3])

    y = {}
    for dtype in (torch.float32, torch.float64):
        y0, t = torch.tensor([1.0, 999.0], dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)
        y[dtype] = pfde.odeint(f, y0, t, method="esdirk3", step_size=0.1, mass=mass.to(dtype))[-1].double()
    assert_close_by_component(y[torch.float32], y[torch.float64], y[torch.float64].abs(), 4 * 10 * EPS32)


@pytest.mark.parametrize("seed", range(12))
def test_stages_of_reaction_networks_end(seed):
    """Random mass action with rates over ten decades, matrix-free: species that vanish keep no stage from its end."""
    g = torch.Generator().manual_seed(seed)
    d = int(torch.randint(2, 9, (1,), generator=g))
    rates = 10 ** (torch.rand(2 * d, generator=g, dtype=torch.float64) * 10 - 4)
    taken, with_it, made = (torch.randint(d, (2 * d,), generator=g) for _ in range(3))
    second_order = torch.rand(2 * d, generator=g) < 0.5
    change = torch.zeros(2 * d, d, dtype=torch.float64)
    change[torch.arange(2 * d), taken] -= 1
    change[torch.arange(2 * d), made] += 1

    def f(t, y):
        return (rates * y[taken] * torch.where(second_order, y[with_it], 1.0)) @ change

    y0 = torch.rand(d, generator=g, dtype=torch.float64) * 10 ** (-4 * torch.rand(d, generator=g, dtype=torch.float64))
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"fde_jacobian": "matrix_free"}
    y = pfde.solve(f, y0, t, 1.0, method="beuler", step_size=0.1, options=options).y
    assert abs(float(y[-1].sum() - y0.sum())) < 1e-12  # nothing is lost


def test_newton_counts_where_nothing_is_small():
    """A network of moderate size: the steps of Newton's method are those that a norm would ask for."""
    torch.manual_seed(0)
    A, B = torch.randn(32, 32, dtype=torch.float64) / 6, torch.randn(32, 32, dtype=torch.float64) / 8
    y0, t = torch.randn(8, 32, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    solution = pfde.solve(lambda t, y: torch.tanh(y @ A) @ B - y, y0, t, 1.0, method="trapezoid", step_size=0.05)
    assert solution.stats.newton_iterations <= 3 * 20 + 2


@pytest.mark.parametrize("dtype, most", [(torch.float64, 2.5), (torch.float32, 1.5)])
def test_later_stages_start_near_their_solutions(dtype, most):
    """Lotka-Volterra, 50 steps of esdirk4's five implicit stages; from the stage before they take 3 and 2 each."""

    def f(t, y):
        return torch.stack([1.1 * y[0] - 0.4 * y[0] * y[1], 0.1 * y[0] * y[1] - 0.4 * y[1]])

    y0, t = torch.tensor([10.0, 5.0], dtype=dtype), torch.tensor([0.0, 5.0])
    solution = pfde.solve(f, y0, t, 1.0, method="esdirk4", step_size=0.1)
    assert solution.stats.newton_iterations <= most * 5 * 50


def test_given_tolerances_are_petscs():
    """-snes_atol, in a norm and from the first iterate on; -snes_force_iteration; -snes_convergence_test default."""
    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)

    def newton(**options):
        keywords = {"method": "beuler", "step_size": 0.1, "options": options}
        return pfde.solve(lambda t, y: -(y**3), y0, t, 1.0, **keywords).stats.newton_iterations

    default = newton()
    assert newton(snes_atol=10.0) == 0
    assert newton(snes_atol=10.0, snes_force_iteration=True) == 10
    assert 10 <= newton(snes_rtol=1e-2) < default
    assert 10 <= newton(snes_stol=1e-1) < default
    assert newton(snes_convergence_test="default") >= 10
    with pytest.raises(pfde.ConvergenceError, match="DIVERGED_MAX_IT after 1 Newton"):
        newton(snes_max_it=1)


@pytest.mark.parametrize("method", ["gl", "l1", "bdf2", "cn", "implicit_midpoint"])
def test_the_value_and_gradient_of_backprop_at_any_stiffness(method):
    """lambda = -1e12 in float32: r + w f(y) has no digits left, y has all."""
    found = []
    for gradient in (pfde.Discrete(), pfde.Backprop()):
        y0 = torch.tensor([0.5], requires_grad=True)
        t = torch.tensor([0.0, 1.0])
        keywords = {"method": method, "step_size": 0.25, "gradient": gradient}
        if method in FRACTIONAL:
            y = pfde.fdeint(lambda t, y: -1e12 * y, y0, t, 0.6, **keywords)
        else:
            y = pfde.odeint(lambda t, y: -1e12 * y, y0, t, **keywords)
        y[-1].sum().backward()
        found.append((y[-1].item(), y0.grad.item()))
    (value, slope), (value_b, slope_b) = found
    assert value != 0 and abs(value_b / value - 1) < 1e-5
    assert abs(slope_b / slope - 1) < 1e-4 and abs(slope / (value / 0.5) - 1) < 1e-4  # f is linear


def test_float32_gradients_near_a_blow_up():
    """y' = -b y |y| backward in time, to y = 1 from 1/2: the amplification is 4."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        b, y0 = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in ([1.0], [0.5]))
        t = torch.tensor([0.0, -1.0], dtype=dtype)
        y = pfde.odeint(lambda t, y, b=b: -b * y * y.abs(), y0, t, method="cn", step_size=0.05, params=[b])
        y[-1].sum().backward()
        found[dtype] = torch.cat([y[-1].detach(), y0.grad, b.grad]).double()
    low, high = found[torch.float32], found[torch.float64]
    assert_close_by_component(low, high, high.abs(), 4 * 20 * EPS32)
