"""A second implementation of the one-step methods, on autograd's graph, to hold pfde's solutions and gradients against.

It imports nothing of pfde: a method is its coefficients as plain numbers, with slopes K_i = f(t_n + c_i h, Y_i) of

    M Y_i = M y_n + h sum_j a_ij K_j (+ h sum_j a^E_ij G_j),      y_{n+1} = y_n + h sum_i b_i (K_i + G_i),
    y(t_n + theta h) = y_n + h sum_i b_i(theta) (K_i + G_i),      b_i(theta) = sum_k P_ik theta^(k+1)

and G_i = g(t_n + c_i h, Y_i) the nonstiff slopes of an additive method. Nothing is transposed by hand: everything, the
step times t_n and theta = (t_out - t_n) / h among it, is on the graph of y0, t and what f uses. An implicit stage is
solved by a Newton iteration with the dense Jacobian at its start, off the graph, and differentiated by one more step
from the solution, with the Jacobian there held fixed: by the implicit function theorem its derivative is exact. With a
mass matrix, which may be singular, y_{n+1} is the combination of y_n and the stages that A^T d = b gives.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Coefficients:
    """a, b, c and P as rows of floats; of an additive method also a and b of its explicit half."""

    a: tuple
    b: tuple
    c: tuple
    P: tuple
    explicit_a: tuple | None = None
    explicit_b: tuple | None = None


def fixed_times(t, pieces):
    """(t_0, ..., t_N), 0-d tensors on t's graph: every interval of t in so many equal parts."""
    times = [t[0]]
    for i, m in enumerate(pieces):
        times += [t[i] + (t[i + 1] - t[i]) * (k / m) for k in range(1, m)] + [t[i + 1]]
    return times


def frozen_times(t, recorded):
    """The recorded step times on t's graph: they move with t's ends as a rubber band does."""
    start, end = recorded[0], recorded[-1]
    fractions = [(x - start) / (end - start) for x in recorded]
    return [t[0] + r * (t[-1] - t[0]) for r in fractions]


def newton(mass, w, rhs, f, y):
    """Solve M y - w f(y) = rhs, differentiably in w, rhs and what f uses."""

    def residual(y):
        return mass @ y - w * f(y) - rhs

    def matrix(y):
        return mass - w.item() * torch.autograd.functional.jacobian(f, y)

    y = y.detach()
    with torch.no_grad():
        chord = matrix(y)
        for _ in range(100):
            step = torch.linalg.solve(chord, residual(y))
            y = y - step
            if step.norm() <= 1e-15 * (1 + y.norm()):
                break
        else:
            raise AssertionError("the oracle's iteration did not converge")
        fixed = matrix(y)
    return y - torch.linalg.solve(fixed, residual(y))


def weighted(y, h, weights, slopes):
    """y + h sum_i w_i K_i."""
    for w, k in zip(weights, slopes, strict=False):
        if w:
            y = y + (h * w) * k
    return y


def stages(method, f, g, t, h, y, mass):
    """The stages Y_i, the slopes K_i and, where there is g, the slopes G_i of the step from (t, y)."""
    ys, ks, gs = [], [], []
    for i, row in enumerate(method.a):
        time = t + method.c[i] * h
        rhs = weighted(mass @ y, h, row[:i], ks)
        if g is not None:
            rhs = weighted(rhs, h, method.explicit_a[i][:i], gs)
        if row[i]:
            stage = newton(mass, h * row[i], rhs, lambda x, time=time: f(time, x), ys[-1] if ys else y)
        else:
            stage = y if i == 0 else rhs
        ys.append(stage)
        ks.append(f(time, stage))
        if g is not None:
            gs.append(g(time, stage))
    return ys, ks, gs


def combination(method, y, ys):
    """y_{n+1} = (1 - sum_i d_i) y_n + sum_i d_i Y_i, A^T d = b; d is the last unit vector where b is A's last row."""
    if method.a[-1] == method.b:
        return ys[-1]
    d = torch.linalg.solve(torch.tensor(method.a, dtype=y.dtype).T, torch.tensor(method.b, dtype=y.dtype))
    return (1 - d.sum()) * y + sum(d[i] * stage for i, stage in enumerate(ys))


def solve(method, f, y0, times, outputs, *, g=None, mass=None):
    """y at the outputs, (T, d), on the graph of y0 (d,), the times and what f(t, y) and g(t, y) use.

    times : t_0, ..., t_N, on the graph of the output times
    outputs : the T output times, the first one t_0; each at one of the times, or inside a step, on its dense output
    mass : (d, d); then no output is inside a step
    """
    matrix = torch.eye(len(y0), dtype=y0.dtype) if mass is None else mass
    sign = 1.0 if times[-1].item() > times[0].item() else -1.0
    y, found = y0, [y0]
    for n in range(len(times) - 1):
        t, h = times[n], times[n + 1] - times[n]
        ys, ks, gs = stages(method, f, g, t, h, y, matrix)
        y1 = weighted(y, h, method.b, ks)
        if g is not None:
            y1 = weighted(y1, h, method.explicit_b, gs)
        if mass is not None:
            y1 = combination(method, y, ys)
        while len(found) < len(outputs):
            rest = sign * (times[n + 1] - outputs[len(found)]).item()
            if rest < -1e-12:
                break
            if rest <= 1e-12:
                found.append(y1)
                continue
            if len(method.P) > len(ks):
                ks.append(f(times[n + 1], y1))
                if g is not None:
                    gs.append(g(times[n + 1], y1))
            theta = (outputs[len(found)] - t) / h
            b = [sum(p * theta ** (k + 1) for k, p in enumerate(row)) for row in method.P]
            value = y
            for i, w in enumerate(b):
                value = value + (h * w) * (ks[i] + gs[i] if g is not None else ks[i])
            found.append(value)
        y = y1
    return torch.stack(found)
