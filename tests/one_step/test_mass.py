"""Mass matrices: M y' = f against the transformed equation, and differential-algebraic equations."""

import pytest
import torch
from torch import Tensor

import pfde
from support.covering import pairs
from support.pendulum import D, close, times

IMPLICIT = ["beuler", "cn", "implicit_midpoint", "sdirk4", "esdirk3", "esdirk4"]


FULL = torch.tensor([[2.0, 0.5], [-0.3, 1.5]], dtype=D)


@pytest.mark.parametrize(
    ("method", "gradient", "kind"),
    pairs(IMPLICIT, [pfde.Discrete(), pfde.Discrete(store="graph"), pfde.Symplectic()], ["full", "diagonal"]),
)
def test_a_mass_matrix_is_the_transformed_equation(method: str, gradient: object, kind: str) -> None:
    """Diagonal and full, for each row of a state: M y' = f is y' = M^-1 f, stage by stage."""
    mass, matrix = (FULL, FULL) if kind == "full" else (times(2.0, 0.5), torch.diag(times(2.0, 0.5)))
    inverse = torch.linalg.inv(matrix)
    results = []
    for transformed in (False, True):
        y0 = torch.tensor([[1.0, 0.5], [-0.4, 0.9], [0.2, 0.1]], dtype=D, requires_grad=True)
        a = torch.tensor([0.7, -1.1], dtype=D, requires_grad=True)
        t = times(0.0, 0.5, 1.0).requires_grad_()

        def f(t: Tensor, y: Tensor, a: Tensor = a) -> Tensor:
            return torch.sin(a * y) - y.flip(1) + t

        g = (lambda t, y, f=f, inverse=inverse: f(t, y) @ inverse.T) if transformed else f
        y = pfde.odeint(
            g,
            y0,
            t,
            method=method,
            step_size=0.25,
            gradient=gradient,
            params=[a],
            mass=None if transformed else mass,
        )
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (y0, a, t))))
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-12)


def root(gradient: object, method: str, p: Tensor, a: Tensor, steps: int) -> Tensor:
    """y1' = -p y1, 0 = y1 - y2^2 from consistent values: (a e^(-p t), sqrt(a) e^(-p t / 2))."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-p * y[0], y[0] - y[1] ** 2])

    y0 = torch.stack([a, a.sqrt()])
    keywords = {"step_size": 1 / steps, "mass": times(1.0, 0.0), "params": [p], "gradient": gradient}
    return pfde.odeint(f, y0, times(0.0, 1.0), method=method, **keywords)[-1]


@pytest.mark.parametrize("method", IMPLICIT)
def test_a_differential_algebraic_equation(method: str) -> None:
    def parameters() -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(x, dtype=D, requires_grad=True) for x in (0.8, 1.3))  # type: ignore[return-value]

    weights = times(0.6, -1.7)
    p, a = parameters()
    end = torch.stack([a * torch.exp(-p), a.sqrt() * torch.exp(-p / 2)])
    exact = [end.detach(), *torch.autograd.grad(end @ weights, (p, a))]
    order = {"beuler": 1, "cn": 2, "implicit_midpoint": 2}.get(method, 3)
    errors = []
    for steps in (6, 12):
        p, a = parameters()
        y = root(None, method, p, a, steps)
        got = [y.detach(), *torch.autograd.grad(y @ weights, (p, a))]
        errors.append(max(float((x - z).abs().max()) for x, z in zip(got, exact, strict=True)))
    assert errors[1] < {1: 5e-2, 2: 5e-3, 3: 2e-5}[order], f"errors {errors}"
    assert errors[0] / errors[1] > 0.8 * 2**order or errors[0] < 1e-10, f"errors {errors}"
    for gradient in (pfde.Backprop(), pfde.Symplectic()):
        p, a = parameters()
        for x, z in zip(torch.autograd.grad(root(gradient, method, p, a, 12) @ weights, (p, a)), got[1:], strict=True):
            assert abs(x - z) < 1e-11 * max(1.0, abs(z))
    with torch.no_grad():
        for i in range(2):
            ends = []
            for sign in (1, -1):
                values = list(parameters())
                values[i] = values[i] + sign * 1e-5
                ends.append(root(None, method, *values, 12) @ weights)
            assert abs((ends[0] - ends[1]) / 2e-5 - got[1 + i]) < 1e-6


@pytest.mark.parametrize("method", ["beuler", "sdirk4"])
def test_robertsons_equations_with_a_conservation_law(method: str) -> None:
    """0 = y1 + y2 + y3 - 1 in place of the third equation: the solution of the three, and its gradient in the rates."""
    t = times(0.0, 0.1, 0.4)
    rates = times(0.04, 3e7, 1e4)

    def reactions(y: Tensor, k: Tensor) -> list[Tensor]:
        r1, r2, r3 = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
        return [r3 - r1, r1 - r2 - r3, r2]

    def algebraic(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([*reactions(y, k)[:2], y.sum() - 1])

    def differential(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack(reactions(y, k))

    found = []
    for f, keywords in (
        (algebraic, {"method": method, "step_size": 0.05, "mass": times(1.0, 1.0, 0.0)}),
        (differential, {"method": method, "step_size": 0.05}),
        (differential, {"method": "esdirk4", "rtol": 1e-5, "atol": 1e-8}),
    ):
        k, y0 = rates.clone().requires_grad_(), times(1.0, 0.0, 0.0)
        y = pfde.odeint(f, y0, t, params=[k], **keywords)
        found.append((y.detach(), torch.autograd.grad(y[-1, 2], k)[0] * rates))
    close(found[0][0], found[1][0], 1e-9)
    close(found[0][1], found[1][1], 1e-6)
    tolerance = 2e-3 if method == "beuler" else 1e-5  # y2's first layer, of 1e-4, is inside one step
    close(found[0][0], found[2][0], tolerance)
    close(found[0][1], found[2][1], 50 * tolerance)
    assert float(found[0][0].sum(dim=1).sub(1).abs().max()) < 1e-12
    assert found[2][0][-1].tolist() == pytest.approx([0.985172, 3.38640e-5, 0.0147940], rel=1e-4)  # Hairer, Wanner
