"""The schemes' weights kappa, sigma and w against their formulas in 60 digits, up to lag 1e6, with d/dalpha.

test_special.py holds the sequences; here is what the schemes make of them, in the form in which a step uses them.

Tolerances. A weight is a product of a sequence (2e-15; 4e-15 for the binomials), 1/Gamma (1e-15) and h^alpha (one
rounding), with a rounding each: 1e-14. For L1 the order 1 - alpha, and for the trapezoid 1 + alpha, is rounded first,
which moves the weight relatively by up to 1.1e-16 (log k + 1/alpha + 1/(1-alpha)) < 5e-15 here. bdf2 is a sum of
positive and negative terms of the size of the first few, |sum| / sum|.| > 1/2: twice that. Allowed: 4e-14. In
derivatives, relative to max(|w'|, |w|), the factors' logarithms up to log 1e6 = 14 come in: 4e-13.
"""

from functools import cache

import mpmath
import pytest
import torch
from mpmath import mpf

from pfde.caputo.schemes import METHODS
from support.oracle import rectangle, trapezoid, trapezoid_start

ALPHAS = [0.1, 0.5, 0.9]
LAGS = [1, 2, 3, 5, 16, 17, 40, 100, 1000, 10**4, 10**5, 10**6]
H = 0.01
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(60):
        yield


@cache
def weights(method):
    """(kernel, start, local) and their derivatives in alpha, at all orders and 1e6 steps."""
    alpha = torch.tensor(ALPHAS, dtype=torch.float64)

    def parts(alpha):
        found = METHODS[method].weights(alpha, H, max(LAGS))
        start = torch.zeros_like(found.kernel) if found.start is None else found.start
        return found.kernel, start, found.local

    return torch.func.jvp(parts, (alpha,), (torch.ones_like(alpha),))


def binomial(k, a):
    return mpmath.gamma(k - a) * mpmath.rgamma(-a) * mpmath.rgamma(k + 1)


def l1(k, a):
    """d_k / d_0."""
    return mpf(k + 1) ** (1 - a) - 2 * mpf(k) ** (1 - a) + mpf(k - 1) ** (1 - a)


def bdf2(k, a):
    """omega_k / omega_0, by the product (1 - x)^a (1 - x/3)^a; 130 terms of the second factor reach 60 digits."""
    return mpmath.fsum(binomial(k - j, a) * binomial(j, a) * mpf(3) ** -j for j in range(min(k, 130) + 1))


EXACT = {  # method: (kernel by channel, start by channel, local), functions of (k, a) and (a)
    "euler": ([lambda k, a: rectangle(k - 1, a)], [lambda k, a: rectangle(k - 1, a)], lambda a: mpf(0)),
    "beuler": ([rectangle], None, lambda a: rectangle(0, a)),
    "trapezoid": ([trapezoid], [trapezoid_start], lambda a: trapezoid(0, a)),
    "pece": (
        [trapezoid, lambda k, a: rectangle(k - 1, a)],
        [trapezoid_start, lambda k, a: rectangle(k - 1, a)],
        lambda a: trapezoid(0, a),
    ),
    "gl": ([lambda k, a: -binomial(k, a)], None, lambda a: mpf(1)),
    "l1": ([lambda k, a: -l1(k, a)], None, lambda a: mpmath.gamma(2 - a)),
    "bdf2": (
        [lambda k, a: -bdf2(k, a)],
        [lambda k, a: mpf("0.5") * mpf("1.5") ** -a if k == 1 else mpf(0)],
        lambda a: mpf("1.5") ** -a,
    ),
}


def value_and_slope(function, a):
    """A function of alpha and its derivative: a central difference in 60 digits."""
    a, e = mpf(a), mpf(10) ** -18
    return float(function(a)), float((function(a + e) - function(a - e)) / (2 * e))


def assert_weight(found, found_dot, exact, a, what):
    value, slope = value_and_slope(exact, a)
    assert abs(found - value) <= 4e-14 * abs(value), what
    assert abs(found_dot - slope) <= 4e-13 * max(abs(slope), abs(value)), what


@every_method
def test_every_registered_scheme_is_tested_here(method):
    assert method in EXACT


@every_method
def test_weights_and_their_derivatives_equal_the_formulas_up_to_lag_1e6(method):
    (kernel, start, local), (kernel_dot, start_dot, local_dot) = weights(method)
    kernels, starts, exact_local = EXACT[method]
    scheme = METHODS[method]
    assert kernel.shape == (scheme.channels, max(LAGS) + 1, len(ALPHAS)) and kernel.dtype == torch.float64
    assert scheme.uses_initial_slope == (starts is not None)
    for i, a in enumerate(ALPHAS):
        integral = scheme.form == "integral"  # the derivative form's kernel has no h: it divides by omega_0 h^-alpha
        for c, exact in enumerate(kernels):
            for k in LAGS:

                def scaled(a, exact=exact, k=k, integral=integral):
                    return exact(k, a) * (mpf(H) ** a if integral else 1)

                assert_weight(kernel[c, k, i].item(), kernel_dot[c, k, i].item(), scaled, a, f"kernel {c}, {k}, {a}")
        for c, exact in enumerate(starts or ()):
            for k in LAGS:

                def scaled(a, exact=exact, k=k):
                    return exact(k, a) * mpf(H) ** a

                assert_weight(start[c, k, i].item(), start_dot[c, k, i].item(), scaled, a, f"start {c}, {k}, {a}")

        def scaled(a, exact=exact_local):
            return exact(a) * mpf(H) ** a

        assert_weight(local[i].item(), local_dot[i].item(), scaled, a, f"local, {a}")


@every_method
def test_integral_weights_are_exact_on_constants_and_derivative_weights_sum_to_zero(method):
    """Row n, n = 1, 2, 10, 1000, of the integral form: sigma_n + sum_{j=1}^{n-1} kappa_{n-j} + w = t_n^alpha /
    Gamma(1 + alpha) (without F_0: the same for `beuler`). Derivative form: 1 - sum_k kappa_k -> 0 as n grows, like
    n^-alpha / Gamma(1 - alpha) over omega_0."""
    (kernel, start, local), _ = weights(method)
    for i, a in enumerate(ALPHAS):
        for n in (1, 2, 10, 1000):
            for c in range(METHODS[method].channels):
                w = local[i] if c == 0 else 0.0  # the predictor's row has no local weight
                total = float(start[c, n, i] + kernel[c, 1:n, i].sum() + w)
                if METHODS[method].form == "integral":
                    exact = float((n * mpf(H)) ** mpf(a) / mpmath.gamma(1 + mpf(a)))
                    assert abs(total - exact) <= 1e-13 * exact
                elif n > 1:
                    rest = 1 - float(kernel[c, 1:n, i].sum())
                    scale = float(
                        local[i].item() * mpf(H) ** -mpf(a) * mpmath.mpf(n) ** -mpf(a) / mpmath.gamma(1 - mpf(a))
                    )
                    if n == 1000:
                        assert abs(rest - scale) <= 0.01 * scale


def test_bdf2_weights_satisfy_the_recursion_of_miller():
    """n p_0 omega_n = sum_{i=1}^2 ((alpha+1) i - n) p_i omega_{n-i}, p = (3/2, -2, 1/2), at every n to 1e6.

    Relative to the sum of the absolute terms, each term within 2e-14 of its own.
    """
    (kernel, _, _), _ = weights("bdf2")
    omega = -kernel[0].clone()
    omega[0] = 1.0
    alpha = torch.tensor(ALPHAS, dtype=torch.float64)
    n = torch.arange(2, len(omega), dtype=torch.float64)[:, None]
    terms = [1.5 * n * omega[2:], 2.0 * ((alpha + 1) - n) * omega[1:-1], -0.5 * (2 * (alpha + 1) - n) * omega[:-2]]
    defect = sum(terms).abs() / sum(term.abs() for term in terms)
    assert float(defect.max()) <= 2e-14


@every_method
def test_weights_of_fewer_steps_are_the_first_of_more(method):
    alpha = torch.tensor(ALPHAS, dtype=torch.float64)
    few = METHODS[method].weights(alpha, H, 50)
    (kernel, start, local), _ = weights(method)
    assert torch.equal(few.kernel, kernel[:, :51]) and torch.equal(few.local, local)
    assert few.start is None or torch.equal(few.start, start[:, :51])
