"""Small problems of `odeint` with their values, and how close two results are."""

import torch
from torch import Tensor, nn

D = torch.float64
ADAPTIVE = ["bosh3", "fehlberg", "dopri5", "tsit5", "dopri8", "sdirk4", "esdirk3", "esdirk4", "ark2", "ark3", "ark4"]
C = torch.complex128
SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=D)
SPIRAL_TIMES = [0.0, 0.5, 1.0, 2.0]
SPIRAL_VALUES = torch.tensor(  # mpmath, tolerance 1e-20
    [
        [2.0, 0.0],
        [-1.71480949036211984, 0.496601093343958324],
        [0.70926174325310324, -1.50410845784038426],
        [-0.811407015625775994, 1.22311053686933908],
    ],
    dtype=D,
)


class Spiral(nn.Module):
    """torchdiffeq's example, y' = A^T y^3 with its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(SPIRAL.clone())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y**3 @ self.A


def spiral(_t: Tensor, y: Tensor) -> Tensor:
    return y**3 @ SPIRAL.to(y)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -torch.sin(y[0]) + 0.1 * torch.cos(t)])


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """In the maximum norm, relative to the largest entry."""
    error = float((got - expected).detach().abs().max() / expected.detach().abs().max())
    assert error <= tolerance, f"off by {error:.2e} (relative, of the largest entry), more than {tolerance:.0e}"


class Waves(nn.Module):
    """y' = i w y - c |y|^2 y with complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0 + 0.1j, 2.0 - 0.2j], dtype=C))
        self.c = nn.Parameter(torch.tensor(0.3 + 0.2j, dtype=C))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 1j * self.w.to(y) * y - self.c.to(y) * (y * y.conj()) * y

    def real(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.view_as_real(self(t, torch.view_as_complex(y)))


WAVE_START = torch.tensor([1.0 + 0.5j, -0.3 + 0.8j], dtype=C)
WAVE_WEIGHTS = torch.tensor([0.7 - 0.2j, 0.1 + 0.9j], dtype=C)
COMPLEX_FORMS = [
    {"method": "dopri5", "rtol": 1e-7, "atol": 1e-9},
    {"method": "rk4", "step_size": 0.1},
    {"method": "cn", "step_size": 0.25},
    {"method": "esdirk3", "rtol": 1e-3, "atol": 1e-4},
]


def wave_loss(y: Tensor) -> Tensor:
    return (y * WAVE_WEIGHTS).real.sum() + y[1].abs().square().sum()


class Clock(nn.Module):
    """The pendulum, which notes the times it is called at."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.1, dtype=D))
        self.times: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(float(t.detach()))
        return pendulum(t, y) - self.a * y
