"""`verify` on float32 models: right gradients pass and wrong ones fail, though rounding leaves slopes little room.

The rounding of J is measured, and a slope is judged by what it leaves: see NOTE 1 of `taylor_slopes`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pfde import __main__, testing

Y0 = torch.tensor([0.4, -0.7, 0.9], dtype=torch.float64)
T = torch.linspace(0.0, 1.0, 13, dtype=torch.float64)


class _Scaled(torch.autograd.Function):
    """The identity, with a cotangent that is off by a part."""

    @staticmethod
    def forward(ctx: object, x: Tensor, part: float) -> Tensor:
        ctx.part = part  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, bar: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return bar * (1 + ctx.part), None  # type: ignore[attr-defined]


class Model(torch.nn.Module):
    """f = tanh(W y) + b sin t - y; the gradients through it off by a part where asked for."""

    def __init__(self, dtype: torch.dtype, wrong: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.W = torch.nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64).to(dtype))
        self.b = torch.nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64).to(dtype))
        self.wrong = wrong

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        value = torch.tanh(self.W @ y) + self.b * torch.sin(t) - y
        return _Scaled.apply(value, self.wrong) if self.wrong else value


@pytest.mark.parametrize("method", ["euler", "pece", "trapezoid", "bdf2", "rk4", "dopri5", "cn"])
def test_right_float32_models_pass(method: str) -> None:
    alpha = 0.6 if method in ("euler", "pece", "trapezoid", "bdf2") else 1.0
    report = testing.verify(Model(torch.float32), Y0.float(), T, alpha, method=method, step_size=1 / 12)
    assert report.passed, report
    assert any(x < math.inf for x in report.slopes.first_allowed), "no slope was judged"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_a_gradient_off_by_a_hundredth_fails_by_its_slopes(method: str, dtype: torch.dtype) -> None:
    """Both gradients of the comparison are wrong alike, so that the Taylor remainders alone can tell."""
    alpha = 0.6 if method == "euler" else 1.0
    report = testing.verify(Model(dtype, 1e-2), Y0.to(dtype), T, alpha, method=method, step_size=1 / 12)
    failed = [name for name, *_, passed in report.checks() if not passed]
    assert "Taylor slope, first order" in failed, report


def test_float64_is_judged_as_before() -> None:
    slopes = testing.taylor_slopes(Model(torch.float64), Y0, T, 1.0, method="rk4", step_size=1 / 12)
    assert slopes.worst < 0.02 and max(slopes.first_allowed + slopes.zeroth_allowed) < 0.021


def test_rounding_alone_is_no_slope_and_nan_is_no_rounding() -> None:
    """A linear model with a linear loss: the remainder is rounding at every length, and the gradient right to it."""
    loss = torch.sum
    keywords: dict[str, Any] = dict(method="rk4", step_size=1 / 12, loss=loss)
    slopes = testing.taylor_slopes(lambda t, y: -y + t, Y0.float(), T, 1.0, **keywords)
    assert slopes.first_allowed == (math.inf,) * 3
    errors = testing.GradientErrors(0.0, None, None)
    report = testing.Report("euler", 12, torch.float32, errors, 0.0, slopes, 1e-4, 1e-4)
    assert report.passed and "rounding" in str(report)
    nan = testing.TaylorSlopes((math.nan,), (math.nan,), (math.nan,), (math.nan,))
    assert not testing.Report("euler", 12, torch.float32, errors, 0.0, nan, 1e-4, 1e-4).passed


def test_the_command_takes_a_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["verify", "--method", "rk4", "--method", "l1", "--dtype", "float32", "--steps", "8"]) == 0
    assert "float32" in capsys.readouterr().out
