"""The steps of PETSc's own integrators, written by hand on autograd's graph."""

from fractions import Fraction
from itertools import pairwise

import torch

from support.integrators import DOUBLE, STEP

# The same steps by hand


def tableau(*rows):
    n = max(len(row.split()) for row in rows)
    return [[float(Fraction(x)) for x in row.split()] + [0.0] * (n - len(row.split())) for row in rows]


DORMAND_PRINCE = (
    tableau(
        "0 0 0 0 0 0",
        "1/5",
        "3/40 9/40",
        "44/45 -56/15 32/9",
        "19372/6561 -25360/2187 64448/6561 -212/729",
        "9017/3168 -355/33 46732/5247 49/176 -5103/18656",
    ),
    tableau("35/384 0 500/1113 125/192 -2187/6784 11/84")[0],
)
EXPLICIT = {
    "1fe": (tableau("0"), [1.0]),
    "2a": (tableau("0 0", "1"), [0.5, 0.5]),
    "3bs": (tableau("0 0 0", "1/2", "0 3/4"), tableau("2/9 1/3 4/9")[0]),
    "4": (tableau("0 0 0 0", "1/2", "0 1/2", "0 0 1"), tableau("1/6 1/3 1/3 1/6")[0]),
    "5dp": DORMAND_PRINCE,
}
ARS443 = (  # Ascher, Ruuth, Spiteri (1997): implicit, explicit
    tableau("0 0 0 0 0", "0 1/2", "0 1/6 1/2", "0 -1/2 1/2 1/2", "0 3/2 -3/2 1/2 1/2"),
    tableau("0 0 0 0 0", "1/2", "11/18 1/18", "5/6 -5/6 1/2", "1/4 7/4 3/4 -7/4 0"),
)


def runge_kutta(A, b):
    def step(f, t, h, y):
        slopes = []
        for row in A:
            stage = y + h * sum(a * k for a, k in zip(row, slopes, strict=False))
            slopes.append(f(torch.tensor(t + h * sum(row), dtype=DOUBLE), stage))
        return y + h * sum(w * k for w, k in zip(b, slopes, strict=True))

    return step


def implicit_stage(f, t, r, w, guess):
    """y = r + w f(t, y), with the derivative of the implicit function: a Newton step on the graph at the solution."""
    t = torch.tensor(t, dtype=DOUBLE)
    y = guess.detach()
    for _ in range(12):
        with torch.no_grad():
            A = torch.eye(len(y), dtype=DOUBLE) - w * torch.autograd.functional.jacobian(lambda z: f(t, z), y)
            y = y - torch.linalg.solve(A, y - r - w * f(t, y))
    A = (torch.eye(len(y), dtype=DOUBLE) - w * torch.autograd.functional.jacobian(lambda z: f(t, z), y)).detach()
    return y - torch.linalg.solve(A, y - r - w * f(t, y))


def one_stage_theta(theta):
    def step(f, t, h, y):
        return y + (implicit_stage(f, t + theta * h, y, theta * h, y) - y) / theta

    return step


def crank_nicolson(f, t, h, y):
    return implicit_stage(f, t + h, y + h / 2 * f(torch.tensor(t, dtype=DOUBLE), y), h / 2, y)


def imex(At, A):
    def step(f, t, h, y):
        stage, implicit, explicit = y, [], []
        for row, row_ex in zip(At, A, strict=True):
            i = len(implicit)
            r = y + h * sum(a * k for a, k in zip(row[:i], implicit, strict=True))
            r = r + h * sum(a * k for a, k in zip(row_ex[:i], explicit, strict=True))
            s = t + h * sum(row)
            stage = implicit_stage(f.stiff, s, r, h * row[i], stage) if row[i] else r
            s = torch.tensor(s, dtype=DOUBLE)
            implicit.append(f.stiff(s, stage))
            explicit.append(f.nonstiff(s, stage))
        # PETSc takes one b for both parts, where the paper's explicit part ends with the last row of its A.
        return y + h * sum(a * (k + g) for a, k, g in zip(At[-1], implicit, explicit, strict=True))

    return step


BY_HAND = {f"petsc:rk:{name}": runge_kutta(*pair) for name, pair in EXPLICIT.items()} | {
    "petsc:theta:0.5": one_stage_theta(0.5),
    "petsc:theta:0.8": one_stage_theta(0.8),
    "petsc:theta:1": one_stage_theta(1.0),
    "petsc:beuler": one_stage_theta(1.0),
    "petsc:cn": crank_nicolson,
    "petsc:arkimex:ars443": imex(*ARS443),
}


def by_hand(method, f, y, times, step_size=STEP):
    outputs, step = [y], BY_HAND[method]
    for a, b in pairwise(times):
        count = round(abs(b - a) / step_size)
        h = (b - a) / count
        for i in range(count):
            y = step(f, a + i * h, h, y)
        outputs.append(y)
    return torch.stack(outputs)


def allowed(method):
    return 1e-12 if ":rk:" in method else 1e-10


ARKIMEX = ["1bee", "a2", "l2", "ars122", "2c", "2d", "2e", "prssp2", "3", "bpr3", "ars443", "4", "5"]
RK = ["1fe", "2a", "2b", "3", "3bs", "4", "5f", "5dp", "5bs", "6vr", "7vr", "8vr"]
