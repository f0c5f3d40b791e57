"""Promise 4: every scheme converges at the order that theory gives, on smooth solutions and on singular ones.

The error is the 2-norm over the times 0.5, 0.6, ..., 1 (at one time alone it may happen to change sign) on N, 2N, 4N
steps; the observed order is log2 of the last ratio and must be within 0.2 of theory. Terms of the next order bend the
observed one by about their ratio, h^(1 - alpha) or so: hence the 0.2, and alphas at which no two orders meet. All
problems are components of one state, each with an order of its own, none in the f of another (`fde_jacobian`).

Orders (Diethelm, Ford, Freed 2004, doi:10.1023/B:NUMA.0000027736.85078.be; Jin, Lazarov, Zhou 2016,
doi:10.1093/imanum/dru063; Jin, Li, Zhou 2017, doi:10.1137/17M1118816; Lubich 1986, doi:10.1137/0517050), in Y's
regularity:

    smooth      y = 1 + t^2 + t^3, forced                      f depends on t
    singular    y = 1 + t^alpha + t^(2 alpha) / 4, forced       f depends on t, its forcing is as singular as y
    linear      y = E_alpha(lambda t^alpha)                     autonomous
    logistic    D^alpha y = y (1 - y / 2)                       autonomous, nonlinear
    Diethelm    y = t^8 - 3 t^(4 + alpha/2) + 9/4 t^alpha       nonlinear, D^alpha y is C^2
"""

import math
from functools import cache
from itertools import pairwise

import mpmath
import pytest
import torch

import pfde
from pfde.caputo.schemes import METHODS
from support.mittag_leffler import mittag_leffler

every_method = pytest.mark.parametrize("method", METHODS)
ALPHA = torch.tensor([0.4, 0.7], dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=torch.float64)
GRIDS = (80, 160, 320)


# order(alpha) by solution; one entry for all where it is always the same
ORDERS = {
    "euler": lambda a: {"all": 1.0},
    "beuler": lambda a: {"all": 1.0},
    "gl": lambda a: {"all": 1.0},
    "l1": lambda a: {"smooth": 2 - a, "all": 1.0},
    "pece": lambda a: {"all": 1 + a},
    "trapezoid": lambda a: {"smooth": 2.0, "Diethelm": 2.0, "all": 1 + a},
    # the start correction covers F_0. A forcing ~ t^alpha is left with 1 + alpha. The first steps' errors ~ h^alpha
    # enter f'(y) - f'(y_0) ~ t^s, which makes 1 + alpha + s: s = alpha for y^2, alpha / 2 for y^(3/2) at y_0 = 0
    "bdf2": lambda a: {
        "singular": 1 + a,
        "logistic": min(2.0, 1 + 2 * a),
        "Diethelm": min(2.0, 1 + 1.5 * a),
        "all": 2.0,
    },
}


def theory(method, alpha, solution):
    orders = ORDERS[method](alpha)
    return orders.get(solution, orders["all"])


def gamma(x):
    return torch.exp(torch.lgamma(x))


def solve(method, f, y0, steps, alpha=ALPHA, params=None):
    options = {"fde_jacobian": "blocks"} if METHODS[method].implicit else None
    return pfde.fdeint(f, y0, TIMES, alpha, method=method, step_size=1 / steps, params=params, options=options)[1:]


def check(errors, expected, what):
    """errors of successive grids, each (times,)."""
    norms = [float(e.norm()) for e in errors]
    observed = [math.log2(a / b) for a, b in pairwise(norms)]
    rates, sizes = ", ".join(f"{x:.3f}" for x in observed), ", ".join(f"{x:.2e}" for x in norms)
    assert abs(observed[-1] - expected) <= 0.2, f"{what}: expected {expected:.2f}, observed {rates}; errors {sizes}"


# -- problems: f, y(0), and y at the times, None where it is not known; for each of the orders ALPHA ------------------


def forced(powers, factors):
    """f = -y + g(t) such that y = 1 + sum_k factor_k t^power_k; powers (K, 2), factors (K, 1)."""
    rate = gamma(powers + 1) / gamma(powers + 1 - ALPHA)

    def solution(t):
        return 1 + (factors * t**powers).sum(0)

    def f(t, y):
        return solution(t) - y + (factors * rate * t ** (powers - ALPHA)).sum(0)

    return f, 1.0, solution


def diethelm():
    """f = 40320/Gamma(9-a) t^(8-a) - 3 Gamma(5+a/2)/Gamma(5-a/2) t^(4-a/2) + 9/4 Gamma(a+1) + (3/2 t^(a/2) - t^4)^3
    - y^(3/2), y(0) = 0 (Diethelm, Ford, Freed 2004, section 5); |y| for y, which may round below 0 near t = 0."""
    a = ALPHA
    high = 40320 / gamma(9 - a)
    low = 3 * gamma(5 + a / 2) / gamma(5 - a / 2)

    def f(t, y):
        smooth = high * t ** (8 - a) - low * t ** (4 - a / 2) + 9 / 4 * gamma(a + 1)
        return smooth + (1.5 * t ** (a / 2) - t**4) ** 3 - y.abs() ** 1.5

    return f, 0.0, lambda t: t**8 - 3 * t ** (4 + a / 2) + 9 / 4 * t**a


PROBLEMS = {
    "smooth": forced(
        torch.tensor([[2.0], [3.0]], dtype=torch.float64).expand(2, 2), torch.ones(2, 1, dtype=torch.float64)
    ),
    "singular": forced(torch.stack([ALPHA, 2 * ALPHA]), torch.tensor([[1.0], [0.25]], dtype=torch.float64)),
    "Diethelm": diethelm(),
    "logistic": (lambda t, y: y * (1 - y / 2), 0.5, None),
}


@cache
def solutions(method):
    """Of each problem, (times, orders), on each grid."""
    names = list(PROBLEMS)
    y0 = torch.tensor([PROBLEMS[name][1] for name in names], dtype=torch.float64).repeat_interleave(2)

    def f(t, y):
        return torch.cat([PROBLEMS[name][0](t, y[2 * k : 2 * k + 2]) for k, name in enumerate(names)])

    with torch.no_grad():
        found = [solve(method, f, y0, steps, ALPHA.repeat(len(names))) for steps in GRIDS]
    return {name: [y[:, 2 * k : 2 * k + 2] for y in found] for k, name in enumerate(names)}


@every_method
@pytest.mark.parametrize("problem", PROBLEMS)
def test_order(method, problem):
    """Where no solution is known, the errors are those of successive grids against each other."""
    y, exact = solutions(method)[problem], PROBLEMS[problem][2]
    if exact is None:
        errors = [a - b for a, b in pairwise(y)]
    else:
        errors = [x - torch.stack([exact(t) for t in TIMES[1:]]) for x in y]
    for i, alpha in enumerate(ALPHA.tolist()):
        check([e[:, i] for e in errors], theory(method, alpha, problem), f"{method}, alpha={alpha}, {problem}")


@every_method
def test_relaxation_and_its_derivatives_converge_to_mittag_leffler(method):
    """Value, d/dlambda and d/dalpha at t = 0.5 and 1 of D^alpha y = lambda y.

    Where the order is 1 + alpha, d/dalpha of C h^(1+alpha) is of the size h^(1+alpha) log(1/h): its rate is smaller by
    log2(log(2N) / log(N)), 0.18 here.
    """
    lam0, rows = torch.tensor([-1.3, -0.8], dtype=torch.float64), (0, 5)
    exact = torch.empty(3, 2, 2, dtype=torch.float64)
    with mpmath.workdps(40):
        e = mpmath.mpf(10) ** -12
        for i, (alpha, lam) in enumerate(zip(ALPHA.tolist(), lam0.tolist(), strict=True)):
            for j, row in enumerate(rows):
                a, z, t = mpmath.mpf(alpha), mpmath.mpf(lam), float(TIMES[1 + row])
                exact[0, j, i] = float(mittag_leffler(a, z, t))
                exact[1, j, i] = float((mittag_leffler(a, z + e, t) - mittag_leffler(a, z - e, t)) / (2 * e))
                exact[2, j, i] = float((mittag_leffler(a + e, z, t) - mittag_leffler(a - e, z, t)) / (2 * e))
    errors = []
    for steps in GRIDS:
        lam, alpha = lam0.clone().requires_grad_(), ALPHA.clone().requires_grad_()
        y = solve(method, lambda t, y, lam=lam: lam * y, torch.ones(2, dtype=torch.float64), steps, alpha, [lam])
        bars = [torch.autograd.grad(y[row].sum(), [lam, alpha], retain_graph=row == 0) for row in rows]
        found = [y.detach()[list(rows)], torch.stack([b[0] for b in bars]), torch.stack([b[1] for b in bars])]
        errors.append(torch.stack(found) - exact)
    for k, what in enumerate(("y", "dy/dlambda", "dy/dalpha")):
        for i, alpha in enumerate(ALPHA.tolist()):
            expected = theory(method, alpha, "linear")
            if what == "dy/dalpha" and method in ("pece", "trapezoid"):
                expected -= math.log2(math.log(320) / math.log(160))
            check([e[k, :, i] for e in errors], expected, f"{method}, alpha={alpha}, {what}")
