"""Solutions that are known in closed form at any N: constant f, zero f, and the classical methods at alpha = 1."""

import mpmath
import pytest
import torch

import pfde
from pfde.caputo.schemes import METHODS

# Product integration integrates a constant f exactly: N weights of one sign, each good to 4e-15, sum to their exact
# sum within 4e-15 but for the additions, N eps / 2 = 2e-14 at N = 200. Allowed: 1e-13.
RTOL = 1e-13
INTEGRAL = [name for name, scheme in METHODS.items() if scheme.form == "integral"]
every_method = pytest.mark.parametrize("method", METHODS)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.smoke
@pytest.mark.parametrize("method", INTEGRAL)
@pytest.mark.parametrize("steps", [1, 2, 7, 200])
def test_constant_f_is_integrated_exactly_with_its_derivatives(method, steps):
    """y(T) - y_0 = theta T^alpha / Gamma(1 + alpha), d/dtheta and d/dalpha, at T = 1.7 and alpha = 0.3, 0.6, 1."""
    T, orders = 1.7, [0.3, 0.6, 1.0]
    theta, alpha = double(2.0, -1.5, 0.7).requires_grad_(), double(*orders).requires_grad_()
    y0 = torch.zeros(3, dtype=torch.float64)
    t = double(0.0, T)
    y = pfde.fdeint(lambda t, y: theta * 1, y0, t, alpha, method=method, step_size=T / steps, params=[theta])[-1]
    bars = torch.autograd.grad(y.sum(), [theta, alpha])
    for i, a in enumerate(orders):
        with mpmath.workdps(30):
            value = mpmath.mpf(T) ** a * mpmath.rgamma(1 + mpmath.mpf(a))
            slope = value * (mpmath.log(T) - mpmath.digamma(1 + mpmath.mpf(a)))
        exact = [float(theta[i].item() * value), float(value), float(theta[i].item() * slope)]
        for found, expected in zip((y[i], bars[0][i], bars[1][i]), exact, strict=True):
            assert abs(found.item() - expected) <= RTOL * abs(expected)


@every_method
def test_a_constant_solution_stays_constant(method):
    """f = 0: y = y_0 bit for bit, dy_n / dy_0 = 1, no derivative in alpha."""
    y0, alpha = double(0.3, -7.1).requires_grad_(), double(0.4, 0.9).requires_grad_()
    y = pfde.fdeint(
        lambda t, y: torch.zeros_like(y), y0, torch.linspace(0, 1, 41, dtype=torch.float64), alpha, method=method
    )
    assert torch.equal(y.detach(), y0.detach().expand(41, 2))
    bars = torch.autograd.grad(y[-1].sum(), [y0, alpha])
    # in the derivative form the rows of 1 and the -X_bar cancel: sums of N terms of size 1
    assert torch.allclose(bars[0], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-13)
    assert not bars[1].any()


@every_method
def test_zero_dynamics_at_a_fixed_point_stay_there(method):
    """f(y_0) = 0 with J != 0: y = y_0 to rounding."""
    y0 = double(1.0, 2.0)
    y = pfde.fdeint(lambda t, y: y0 - y, y0, torch.linspace(0, 1, 31, dtype=torch.float64), 0.5, method=method)
    assert float((y - y0).abs().max()) <= 1e-15


def f(t, y, theta):
    return theta * torch.sin(y) + torch.cos(3 * t)


def implicit(r, w, t, theta, guess):
    """y = r + w f(t, y): Newton's method, the last step on the graph."""
    y = guess.detach()
    for i in range(30):
        slope = (w * theta * torch.cos(y)).detach()
        residual = y - r - w * f(t, y, theta)
        y = y - residual / (1 - slope)
        if i < 29:
            y = y.detach()
    return y


def classical(method, y0, theta, t, h):
    """The methods of alpha = 1, as in a textbook."""
    ys, integral = [y0], 0
    for n in range(1, len(t)):
        y, t0, t1 = ys[-1], t[n - 1], t[n]
        if method == "euler":
            new = y + h * f(t0, y, theta)
        elif method == "pece":  # Adams-Bashforth-Moulton summed from t_0: Heun's method for n = 1, and of its order
            integral = integral + h * f(t0, y, theta)
            new = y0 + integral - h / 2 * f(t[0], y0, theta) + h / 2 * f(t1, y0 + integral, theta)
        elif method == "trapezoid":
            new = implicit(y + h / 2 * f(t0, y, theta), h / 2, t1, theta, y)
        elif method == "bdf2":
            # (3/2 y_1 - 3/2 y_0) / h = f_1 + f_0 / 2, then 3/2 y_n - 2 y_{n-1} + 1/2 y_{n-2} = h f_n
            if n == 1:
                new = implicit(y + h / 3 * f(t0, y, theta), 2 * h / 3, t1, theta, y)
            else:
                new = implicit((4 * y - ys[-2]) / 3, 2 * h / 3, t1, theta, y)
        else:  # beuler, gl, l1: backward Euler
            new = implicit(y, h, t1, theta, y)
        ys.append(new)
    return torch.stack(ys)


@every_method
@pytest.mark.parametrize("alpha", [1.0, torch.ones(2, dtype=torch.float64)])
def test_order_one_is_the_classical_method(method, alpha):
    """Values and gradients. History form and one-step form round differently, N = 40 times: 1e-12 is generous."""
    t = torch.linspace(0.0, 2.0, 41, dtype=torch.float64)
    v = torch.randn(41, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for by_pfde in (True, False):
        y0, theta = double(0.5, -1.0).requires_grad_(), double(-2.0, 1.5).requires_grad_()
        if by_pfde:
            y = pfde.fdeint(lambda t, y, theta=theta: f(t, y, theta), y0, t, alpha, method=method, params=[theta])
        else:
            y = classical(method, y0, theta, t, 0.05)
        found.append([y.detach(), *torch.autograd.grad((v * y).sum(), [y0, theta])])
    for x, ref in zip(*found, strict=True):
        assert float((x - ref).norm() / ref.norm()) <= 1e-12
