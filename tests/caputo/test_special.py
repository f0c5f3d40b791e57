"""The sequences of pfde.caputo.special against 50-digit mpmath, values and derivatives in the order, in both modes."""

import math

import mpmath
import pytest
import torch
from mpmath import mpf

from pfde.caputo import special

ALPHAS = [1e-3, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0]
LAGS = [*range(41), 63, 64, 65, 100, 127, 128, 129, 10**3, 10**4, 10**5, 10**6]
DERIVATIVE_LAGS = [0, 1, 2, 3, 15, 16, 128, 10**3, 10**5]


def exact_first(k, p):
    return mpf(k + 1) ** p - mpf(k) ** p if k else mpf(1)


def exact_second(k, p):
    if k < 2:
        return mpf(2) ** p - 2 if k else mpf(1)
    return mpf(k + 1) ** p - 2 * mpf(k) ** p + mpf(k - 1) ** p


def exact_starting(n, alpha):
    if n < 2:
        return alpha * n
    return mpf(n - 1) ** (alpha + 1) - (n - 1 - alpha) * mpf(n) ** alpha


def exact_binomial(k, alpha):
    if k < 42:
        return mpmath.fprod((j - 1 - alpha) / j for j in range(1, k + 1))
    return mpmath.gamma(k - alpha) * mpmath.rgamma(-alpha) * mpmath.rgamma(k + 1)


# Tolerances on values. An entry is a product of at most 4 elementary functions, each within 1 ulp (2.2e-16), a few
# half-ulp roundings and a sum of terms of one sign: 2e-15 is their worst case (measured: 7e-16). The first binomial
# coefficients are products of up to 15 factors with 2 roundings each: 30 * 1.1e-16 < 4e-15 (measured: 7e-16).
CASES = {
    "first": (special.first_difference, exact_first, [0.0, *ALPHAS, 2.0], 2e-15),
    "second, trapezoid": (special.second_difference, exact_second, [1 + alpha for alpha in ALPHAS], 2e-15),
    "second, L1": (special.second_difference, exact_second, [1 - alpha for alpha in ALPHAS], 2e-15),
    "starting": (special.starting_difference, exact_starting, ALPHAS, 2e-15),
    "binomial": (special.binomial_coefficients, exact_binomial, ALPHAS, 4e-15),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(50):
        yield


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def error(computed, exact, scale=None):
    """|computed - exact| relative to ``scale`` (the exact value by default), absolute where that is zero."""
    scale = abs(exact) if scale is None else scale
    return float(abs(mpf(computed) - exact) / (scale or 1))


def forward_derivative(function, count, p):
    return torch.func.jvp(lambda q: function(count, q), (p,), (torch.ones_like(p),))[1]


@every_case
def test_values(case):
    function, exact, orders, tolerance = CASES[case]
    table = function(LAGS[-1] + 1, tensor(orders))
    assert table.shape == (LAGS[-1] + 1, len(orders)) and table.dtype == torch.float64
    errors = {(k, p): error(table[k, g].item(), exact(k, mpf(p))) for g, p in enumerate(orders) for k in LAGS}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{case}: relative error {errors[worst]:.2e} at (k, order) = {worst}"


@every_case
def test_last_of_ten_million(case):
    function, exact, orders, tolerance = CASES[case]
    p, k = orders[3], 10**7 - 1
    assert error(function(k + 1, tensor([p]))[k].item(), exact(k, mpf(p))) <= tolerance


@every_case
def test_derivative_in_the_order(case):
    """d/dp of k^p S(p) is ln k times the entry plus k^p S'. Where the two nearly cancel only their size bounds the
    rounding, so besides 1e-12 of the derivative, 1e-14 (the values' 2e-15, a few times) of that size is asked."""
    function, exact, orders, _ = CASES[case]
    table = forward_derivative(function, DERIVATIVE_LAGS[-1] + 1, tensor(orders))
    for g, p in enumerate(orders):
        for k in DERIVATIVE_LAGS:
            with mpmath.workdps(60):
                derivative = mpmath.diff(lambda q, k=k: exact(k, q), mpf(p))
            if abs(derivative) < mpf(10) ** -50:  # the difference quotient of a constant
                derivative = mpf(0)
            size = abs(derivative) + abs(exact(k, mpf(p))) * math.log(k + 2)
            relative, scaled = error(table[k, g].item(), derivative), error(table[k, g].item(), derivative, size)
            assert relative <= 1e-12 and scaled <= 1e-14, f"{case}, k={k}, order={p}: {relative:.1e}, {scaled:.1e}"


@every_case
def test_reverse_mode_is_the_transpose_of_forward_mode(case):
    """The two sum the same 20000 products in different order: 1e-13 of the sum of their sizes is 4 eps sqrt(20000)."""
    function, _, orders, _ = CASES[case]
    p = tensor(orders).requires_grad_()
    table = function(20000, p)
    cotangent = torch.randn(table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (reverse,) = torch.autograd.grad(table, p, cotangent)
    products = cotangent * forward_derivative(function, 20000, p.detach())
    assert torch.isfinite(reverse).all() and torch.isfinite(products).all()
    assert ((reverse - products.sum(0)).abs() <= 1e-13 * products.abs().sum(0)).all()


@every_case
def test_second_derivatives_and_jacobians_agree(case):
    """Forward over forward (jacfwd, under vmap) and reverse over forward against reverse over reverse.

    At the ends of the range too, where a factor of every later coefficient vanishes.
    """
    function, _, orders, _ = CASES[case]

    def loss(p):
        return (1 + function(200, p)).square().sum()

    p = tensor(orders)
    by_forward = torch.func.jacfwd(torch.func.jacfwd(loss))(p)
    by_reverse = torch.autograd.functional.hessian(loss, p)
    mixed = torch.func.jacrev(torch.func.jacfwd(loss))(p)
    torch.testing.assert_close(by_forward, by_reverse, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed, by_reverse, rtol=1e-10, atol=1e-10)


@every_case
def test_bits_depend_on_the_lag_and_the_order_only(case):
    """Not on the number of orders, on the count, or on the threads (NOTE 2 of the module)."""
    function, _, orders, _ = CASES[case]
    count = 70001
    together = function(count, tensor(orders[:3]))
    alone = [function(count, tensor([p])) for p in orders[:3]]
    assert torch.equal(together, torch.cat(alone, dim=1))
    for shorter in (0, 1, 2, 3, 17, 1000, 16385):
        assert torch.equal(function(shorter, tensor(orders[:3])), together[:shorter])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(function(count, tensor(orders[:3])), together)
    finally:
        torch.set_num_threads(threads)


def test_ends_of_the_range_are_exact():
    """At alpha = 1 the equation is an ODE: no memory in the derivative forms, and 1/(k(k-1)) as dg_k/dalpha."""
    one, zero = tensor([1.0]), tensor([0.0])
    assert not special.binomial_coefficients(1000, one)[2:].any()
    assert not special.first_difference(1000, zero)[1:].any()
    assert (
        special.first_difference(1000, zero)[0] == 1 and forward_derivative(special.first_difference, 9, zero)[0] == 0
    )
    assert not special.second_difference(1000, one)[1:].any()
    assert special.starting_difference(2, tensor([0.3])).flatten().tolist() == [0.0, 0.3]
    k = torch.arange(2, 1000, dtype=torch.float64)
    slope = forward_derivative(special.binomial_coefficients, 1000, one)[2:, 0]
    torch.testing.assert_close(slope, 1 / (k * (k - 1)), rtol=4e-15, atol=0)


def test_reciprocal_gamma():
    """One lgamma of size below 0.13 and 4 roundings: 1e-15. The derivative -psi/Gamma has a zero, so its error is taken
    relative to 1, its size on the interval (measured: 8e-16; digamma near its zero has an absolute error)."""
    x = torch.cat([torch.linspace(0, 4, 161, dtype=torch.float64), tensor(ALPHAS), 2 - tensor(ALPHAS)])
    derivative = torch.func.jvp(special.reciprocal_gamma, (x,), (torch.ones_like(x),))[1]
    leaf = x.clone().requires_grad_()
    value = special.reciprocal_gamma(leaf)
    for i, point in enumerate(x.tolist()):
        assert error(value[i].item(), mpmath.rgamma(mpf(point))) <= 1e-15, point
        assert error(derivative[i].item(), mpmath.diff(mpmath.rgamma, mpf(point)), 1) <= 1e-14, point
    (reverse,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(reverse, derivative, rtol=1e-14, atol=1e-15)
    assert special.reciprocal_gamma(tensor([0.0, 1.0, 2.0])).tolist() == [0.0, 1.0, 1.0]
