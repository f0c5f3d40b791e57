"""Every method of `odeint` converges at its order, its dense output at its own, and stiff methods damp as they say.

Two problems with known solutions are the components of one state, so that each is solved on the steps of the other:

    autonomous       y' = 3 y (1 - y)               y = 1 / (1 + 4 exp(-3 t))
    non-autonomous   y' = 6 cos(2 t) y (1 - y)      y = 1 / (1 + 4 exp(-3 sin 2 t)),      y(0) = 1/5

The error is the 2-norm over the times 0.5, 1, 1.5, 2 (at one time alone it may happen to change sign) on N, 2N
steps; the observed order is log2 of the ratio and must be within 0.2 of theory. N is chosen by order: terms of the
next order, which bend the observed one by about their ratio, must be small (those of dopri5 and tsit5, whose principal
error is small, bend it by 0.17 at 192 steps), and rounding, 1e-15 or so, a hundredth of the last error at most.
"""

import math
from itertools import pairwise

import pytest
import torch

import pfde
from pfde.one_step.methods import METHODS as ODE_METHODS
from pfde.one_step.tableaux import ADDITIVE

ADAPTIVE = [name for name in ODE_METHODS if ODE_METHODS[name].adaptive]
IMPLICIT = [name for name in ODE_METHODS if ODE_METHODS[name].implicit]
GRIDS = {1: (120, 240), 2: (64, 128), 3: (48, 96), 4: (48, 96), 5: (96, 192), 8: (16, 32)}
TIMES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
START = torch.tensor([0.2, 0.2], dtype=torch.float64)


def decay(t):
    """exp(-3 s), s = t and sin 2 t."""
    return torch.exp(-3 * torch.stack([t, torch.sin(2 * t)], dim=-1))


def exact(t):
    return 1 / (1 + 4 * decay(t))


def speed(t):
    return torch.stack([torch.full_like(t, 3.0), 6 * torch.cos(2 * t)])


def quadratic(t, y):
    return -speed(t) * y**2


def linear(t, y):
    return speed(t) * y


def problem(method):
    """f, or the two parts that add up to it."""
    return pfde.Split(quadratic, linear) if method in ADDITIVE else lambda t, y: quadratic(t, y) + linear(t, y)


def rates(errors):
    """log2 of successive ratios, component by component, of (times, 2) errors."""
    norms = [[float(e[:, i].norm()) for e in errors] for i in range(2)]
    return [[math.log2(a / b) for a, b in pairwise(column)] for column in norms], norms


def check(errors, expected, what):
    observed, norms = rates(errors)
    for column, sizes in zip(observed, norms, strict=True):
        text = ", ".join(f"{x:.3f}" for x in column) + "; errors " + ", ".join(f"{x:.2e}" for x in sizes)
        assert abs(column[-1] - expected) <= 0.2, f"{what}: expected {expected}, observed {text}"


@pytest.mark.parametrize("method", ODE_METHODS)
def test_order_with_fixed_steps(method):
    order = ODE_METHODS[method].order
    with torch.no_grad():
        errors = [
            pfde.odeint(problem(method), START, TIMES, method=method, step_size=2 / steps)[1:] - exact(TIMES)[1:]
            for steps in GRIDS[order]
        ]
    check(errors, order, method)


@pytest.mark.parametrize("method", ["rk4", "fehlberg", "cn"])
def test_order_of_the_gradient(method):
    """That of dy(2)/dy_0, componentwise: the discrete gradient converges to that of the solution."""
    order = ODE_METHODS[method].order
    t = TIMES[[0, -1]]
    limit = decay(t[1]) / (START * (1 + 4 * decay(t[1]))) ** 2
    errors = []
    for steps in GRIDS[order]:
        y0 = START.clone().requires_grad_()
        y = pfde.odeint(problem(method), y0, t, method=method, step_size=2 / steps)
        errors.append((torch.autograd.grad(y[-1].sum(), y0)[0] - limit)[None])
    check(errors, order, method)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_order_of_the_dense_output(method):
    """Single steps of length h, which no tolerance cuts, from the solution at 8 times: the error inside them, at 0.15,
    0.35, 0.6, 0.85 of h, is of the order dense_order + 1."""
    order, errors = ODE_METHODS[method].dense_order, []
    parts = torch.tensor([0.0, 0.15, 0.35, 0.6, 0.85, 1.0], dtype=torch.float64)
    for k in range(3):
        h = (0.2 if order > 4 else 0.1) / 2**k
        found = []
        for start in torch.linspace(0.1, 1.7, 8, dtype=torch.float64):
            t = start + h * parts
            with torch.no_grad():
                y = pfde.odeint(
                    problem(method), exact(start), t, method=method, rtol=1e6, atol=1e6, options={"first_step": h}
                )
            found.append((y - exact(t))[1:-1])
        errors.append(torch.cat(found))
    check(errors, order + 1, method)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_error_of_adaptive_steps_follows_the_tolerance(method):
    """The error of a step is controlled, and a few dozen steps add up: 30 rtol at most. A hundredth of rtol makes
    (1/100)^(q/(q+1)) of the error, q the embedded order, once the steps are small: 0.05 for q = 2, allowed is 0.3."""
    low = ODE_METHODS[method].order <= 3
    errors = []
    for rtol in (1e-2, 1e-4) if low else (1e-3, 1e-5):
        with torch.no_grad():
            y = pfde.odeint(problem(method), START, TIMES, method=method, rtol=rtol, atol=rtol)
        errors.append(float((y - exact(TIMES)).abs().max()))
        assert errors[-1] <= 30 * rtol, errors
    assert all(b <= 0.3 * a for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("method", IMPLICIT)
def test_l_stable_methods_damp_a_stiff_transient_in_one_step(method):
    """y' = -1e6 (y - cos t), y(0) = 2, h = 0.1: L-stable ones are at cos h then, A-stable ones as far off as before."""
    scheme = ODE_METHODS[method]

    def relax(t, y):
        return -1e6 * (y - torch.cos(t))

    f = pfde.Split(relax, lambda t, y: torch.zeros_like(y)) if method in ADDITIVE else relax
    t = torch.tensor([0.0, 0.1], dtype=torch.float64)
    with torch.no_grad():
        y = pfde.odeint(f, torch.tensor([2.0], dtype=torch.float64), t, method=method, step_size=0.1)
    distance = abs(float(y[-1]) - math.cos(0.1))
    if "L-stable" in scheme.stability:
        assert distance <= 1e-3, distance
    else:
        assert method in ("cn", "implicit_midpoint") and 0.9 <= distance <= 1.1, distance
