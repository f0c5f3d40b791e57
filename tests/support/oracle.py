"""A second implementation of the seven schemes, dense and slow, to hold pfde's solutions and gradients against.

It shares nothing with pfde. Every scheme is written down in its matrix form (numerics, section 1)

    sum_{j<=n} A_nj Y_j = sum_{j<=n} B_nj F_j,     F_j = f(t_j, Y_j),     n = 1..N

with full (N+1) x (N+1) matrices, h^alpha included. Their entries, alike along diagonals but in column 0, are the
textbook formulas, taken literally in 60-digit arithmetic, where cancellation is harmless; their derivatives in alpha
are central differences in 60 digits (step 1e-20, error 1e-40). A tensor alpha enters as A(alpha_0) + A'(alpha_0)
(alpha - alpha_0): exact in value and gradient. An implicit row is solved by Newton's method with the dense Jacobian,
and differentiated by one more Newton step from the solution, whose Jacobian is held fixed: by the implicit function
theorem its derivative is exact.
"""

from functools import cache

import mpmath
import torch
from mpmath import mpf

DIGITS = 60


def rectangle(k, a):
    """b_k of product integration with piecewise constant f."""
    return (mpf(k + 1) ** a - mpf(k) ** a) / mpmath.gamma(a + 1)


def trapezoid(k, a):
    """a_k of product integration with piecewise linear f."""
    if k == 0:
        return 1 / mpmath.gamma(a + 2)
    return (mpf(k + 1) ** (a + 1) - 2 * mpf(k) ** (a + 1) + mpf(k - 1) ** (a + 1)) / mpmath.gamma(a + 2)


def trapezoid_start(n, a):
    """The weight of F_0 in row n of the product trapezoid."""
    return (mpf(n - 1) ** (a + 1) - (n - 1 - a) * mpf(n) ** a) / mpmath.gamma(a + 2)


def l1(k, a):
    """c_k of L1; 0^(1-a) is 0 for a = 1 too."""
    return (mpf(k + 1) ** (1 - a) - (mpf(k) ** (1 - a) if k else 0)) / mpmath.gamma(2 - a)


def power_of_polynomial(p, a, count):
    """Miller's recursion for the coefficients of (p_0 + p_1 x + ...)^a."""
    omega = [mpf(p[0]) ** a]
    for n in range(1, count):
        terms = (((a + 1) * i - n) * p[i] * omega[n - i] for i in range(1, min(n, len(p) - 1) + 1))
        omega.append(mpmath.fsum(terms) / (n * p[0]))
    return omega


def integral_kernel(kind, a, h, steps):
    """B of the integral form (A is the identity on Y - Y_0): its diagonals, and its column 0 in the rows 0..N."""
    scale, zero = mpf(h) ** a, mpf(0)
    if kind == "trapezoid":
        b = [scale * trapezoid(k, a) for k in range(steps)]
        return b, [zero, *(scale * trapezoid_start(n, a) for n in range(1, steps + 1))]
    b = [scale * rectangle(k, a) for k in range(steps)]
    return ([zero, *b], [zero, *b]) if kind == "euler" else (b, [zero] * (steps + 1))


def derivative_kernel(kind, a, h, steps):
    """A of the derivative form, acting on Y: its diagonals, and its column 0 in the rows 0..N."""
    scale, zero = mpf(h) ** -a, mpf(0)
    if kind == "l1":  # c_{n-1-j} (y_{j+1} - y_j)
        c = [scale * l1(k, a) for k in range(steps)]
        return [c[0], *(c[k] - c[k - 1] for k in range(1, steps))], [zero, *(-x for x in c)]
    polynomial = [mpf(1), mpf(-1)] if kind == "gl" else [mpf(3) / 2, mpf(-2), mpf(1) / 2]
    omega = [scale * w for w in power_of_polynomial(polynomial, a, steps)]  # omega_{n-j} (y_j - y_0)
    start = [zero]
    for w in omega:
        start.append(start[-1] - w)
    return omega, start


def dense(diagonals, start):
    """(N+1, N+1); row 0 is empty."""
    steps = len(start) - 1
    kernel = torch.tensor([float(x) for x in diagonals], dtype=torch.float64)
    lag = torch.arange(steps + 1)[:, None] - torch.arange(steps + 1)
    matrix = torch.where((lag >= 0) & (lag < len(kernel)), kernel[lag.clamp(0, len(kernel) - 1)], 0.0)
    matrix[:, 0] = torch.tensor([float(x) for x in start], dtype=torch.float64)
    matrix[0] = 0.0
    return matrix


INTEGRAL = {"euler": ["euler"], "pece": ["trapezoid", "euler"], "beuler": ["beuler"], "trapezoid": ["trapezoid"]}


@cache
def matrices(method, a, h, steps):
    """(value, derivative in alpha) of each matrix of the method at one order, as float64 tensors."""
    build = integral_kernel if method in INTEGRAL else derivative_kernel
    found = []
    with mpmath.workdps(DIGITS):
        e = mpf(10) ** -20
        for kind in INTEGRAL.get(method, [method]):
            value, up, down = (build(kind, mpf(a) + shift, h, steps) for shift in (0, e, -e))
            slope = [[(u - d) / (2 * e) for u, d in zip(*pair, strict=True)] for pair in zip(up, down, strict=True)]
            found.append((dense(*value), dense(*slope)))
    return found


def on_graph(method, alpha, h, steps):
    """The method's matrices on alpha's graph, (N+1, N+1, d) or (N+1, N+1, 1); alpha is (d,) or (1,)."""
    count = len(INTEGRAL.get(method, [method]))
    columns = [[] for _ in range(count)]
    for a in alpha:
        for column, (value, slope) in zip(columns, matrices(method, a.item(), h, steps), strict=True):
            column.append(value + slope * (a - a.detach()))
    return [torch.stack(column, dim=2) for column in columns]


def newton(a, b, rhs, f, y, chord=None):
    """Solve a y - b f(y) = rhs, differentiably in a, b, rhs and what f uses; y and the inverse Jacobian there.

    chord : the inverse Jacobian at a solution nearby, since Jacobians are dear
    """

    def residual(y):
        return a * y - b * f(y) - rhs

    def inverse(y):
        jacobian = torch.autograd.functional.jacobian(f, y)
        return torch.linalg.inv(torch.diag(a.expand(len(y))) - b.expand(len(y))[:, None] * jacobian)

    y = y.detach()
    with torch.no_grad():
        chord = inverse(y) if chord is None else chord
        for _ in range(100):
            step = chord @ residual(y)
            y = y - step
            if step.norm() <= 1e-14 * (1 + y.norm()):
                break
        else:
            raise AssertionError("the oracle's Newton iteration did not converge")
        fixed = inverse(y)
    return y - fixed @ residual(y), fixed


def solve(method, f, y0, alpha, t0, h, steps):
    """Y_0..Y_N, (N+1, d), on the graph of y0 (d,), alpha ((1,) or (d,)) and what f(t, y) uses."""
    form = on_graph(method, alpha, h, steps)

    def at(n):
        return lambda y: f(times[n], y)

    times = [t0 + n * h for n in range(steps + 1)]
    ys, fs, chord = [y0], [f(times[0], y0)], None
    for n in range(1, steps + 1):
        if method in INTEGRAL:
            rows = [y0 + (B[n, :n] * torch.stack(fs)).sum(0) for B in form]
            one = torch.ones((), dtype=y0.dtype)
            if method == "euler":
                y = rows[0]
            elif method == "pece":
                y = rows[0] + form[0][n, n] * f(times[n], rows[1])
            else:
                y, chord = newton(one, form[0][n, n], rows[0], at(n), ys[-1], chord)
        else:
            (A,) = form
            rhs = -(A[n, :n] * torch.stack(ys)).sum(0)
            if method == "bdf2" and n == 1:
                rhs = rhs + fs[0] / 2
            one = torch.ones_like(A[n, n])
            y, chord = newton(A[n, n], one, rhs, at(n), ys[-1], chord)
        ys.append(y)
        fs.append(f(times[n], y))
    return torch.stack(ys)
