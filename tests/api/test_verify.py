"""`pfde.testing` and `python -m pfde verify`: what is right passes, what is wrong is said, the exit code tells."""

import math
import re
import subprocess
import sys

import pytest
import torch

import pfde
from pfde import __main__ as command
from pfde import testing
from pfde.caputo.schemes import METHODS
from pfde.caputo.schemes.base import ImplicitScheme
from pfde.one_step.methods import METHODS as ODE_METHODS

T = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
Y0 = torch.tensor([0.5, -0.3], dtype=torch.float64)


def test_the_command_prints_a_row_for_every_method_and_exits_with_0():
    command_line = [sys.executable, "-m", "pfde", "verify", "--steps", "3"]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    number, slope = r"\d\.\de[+-]\d\d", r"[12]\.\d{4}"
    ordinary = [name for name in ODE_METHODS if name not in METHODS]  # there is no alpha to differentiate in
    for method in (*METHODS, *ordinary):
        errors = rf"{number} +{number} +" + ("" if method in ordinary else rf"{number} +")
        row = rf"^{method} +{errors}{number} +{slope} +{slope} +pass$"
        assert re.search(row, done.stdout, re.MULTILINE), done.stdout
    count = len(METHODS) + len(ordinary)
    assert f"{count} of {count} methods passed" in done.stdout and done.stderr == ""


def test_the_command_exits_with_1_when_a_gradient_is_wrong(monkeypatch, capsys):
    right = ImplicitScheme.step_adjoint

    def wrong(self, system, at, *rest):
        step = right(self, system, at, *rest)
        return step._replace(r_bar=tuple(r * (1 + 1e-9) for r in step.r_bar))

    monkeypatch.setattr(ImplicitScheme, "step_adjoint", wrong)
    assert command.main(["verify", "--steps", "4", "--method", "euler", "--method", "gl"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^euler .* pass$", out, re.MULTILINE) and re.search(r"^gl .* FAIL$", out, re.MULTILINE)
    assert "1 of 2 methods passed" in out


@pytest.mark.smoke
@pytest.mark.parametrize("store", ["stages", "graph"])
def test_the_command_takes_a_method_and_a_store(store, capsys):
    assert command.main(["verify", "--method", "pece", "--store", store, "--steps", "5", "--seed", "2"]) == 0
    out = capsys.readouterr().out
    assert "pece" in out and "trapezoid" not in out and f"store='{store}'" in out


@pytest.mark.parametrize(
    "arguments", [["verify", "--method", "rk5"], ["verify", "--steps", "0"], ["verify", "--bogus"], [], ["prove"]]
)
def test_bad_arguments_exit_with_2_and_say_what_is_allowed(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m pfde" in capsys.readouterr().err


def test_help_names_the_methods(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["verify", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(method in out for method in METHODS) and "xit code 1" in out


class WrongSquare(torch.autograd.Function):
    """x^2 with the derivative x: the mistake of a user's own operation."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, bar):
        return bar * ctx.saved_tensors[0]


@pytest.mark.parametrize("method", ["euler", "pece"])
def test_a_wrong_gradient_in_the_users_model_is_noticed_by_taylor(method):
    """Autograd through the steps makes the same mistake, and tangent and adjoint stay each other's transpose: only the
    Taylor test looks at values."""
    weight = torch.tensor([0.8, -0.6], dtype=torch.float64, requires_grad=True)
    report = testing.verify(
        lambda t, y: weight * WrongSquare.apply(y), Y0, T, 0.7, method=method, params=[weight]
    )  # fmt: skip
    assert report.gradient.worst < 1e-12
    assert not report.passed and abs(report.slopes.first[-1] - 1) < 0.1
    assert "FAIL" in str(report)


def test_a_report_reads_as_a_table():
    report = testing.verify(lambda t, y: -y.sin(), Y0, T, torch.tensor([0.5, 0.9]).double(), method="trapezoid")
    assert report.passed, report
    assert report.gradient.theta is None and report.steps == 8 and report.dtype == torch.float64
    lines = str(report).splitlines()
    assert lines[0] == "method trapezoid, 8 steps, torch.float64"
    assert len(lines) == 6 and all(line.endswith("pass") for line in lines[1:])


def test_float32_models_are_held_to_float32_rounding():
    weight = torch.tensor([0.8, -0.6], requires_grad=True)
    keywords = dict(method="trapezoid", params=[weight])
    f = lambda t, y: weight * torch.sin(y + t)  # noqa: E731
    error = testing.gradient_error(f, Y0.float(), T.float(), 0.7, **keywords)
    assert 0 < error.worst <= 4500 * torch.finfo(torch.float32).eps
    product = testing.dot_product_error(f, Y0.float(), T.float(), 0.7, **keywords)
    assert product <= 50 * torch.finfo(torch.float32).eps * math.sqrt(8)


def test_the_battery_takes_a_loss_of_the_users_and_a_step_size():
    report = testing.verify(
        lambda t, y: torch.cos(y), Y0, T[::4], 0.6, method="bdf2", step_size=0.125, loss=lambda y: y[-1].pow(3).sum()
    )
    assert report.passed, report
    with pytest.raises(ValueError, match="loss must return a 0-d tensor"):
        testing.gradient_error(lambda t, y: -y, Y0, T, 0.6, loss=lambda y: y)


def test_loosened_newton_tolerances_show_in_the_report():
    report = testing.verify(lambda t, y: -(y**3), Y0, T, 0.6, method="beuler", options={"snes_atol": 1e-4})
    assert not report.passed and report.gradient.worst < 1e-2


def test_the_battery_leaves_the_model_as_it_was():
    """Values bit for bit, no .grad, requires_grad, the graphs of pending solves, torch's random generator."""
    net = torch.nn.Linear(2, 2).double()
    before, generator = [p.detach().clone() for p in net.parameters()], torch.get_rng_state()
    pending = pfde.fdeint(lambda t, y: torch.tanh(net(y)), Y0, T, 0.6, method="pece", params=tuple(net.parameters()))
    testing.taylor_slopes(lambda t, y: torch.tanh(net(y)), Y0, T, 0.6, method="pece", params=tuple(net.parameters()))
    pending.sum().backward()
    net.zero_grad()
    for p, value in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.grad is None and p.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_battery_restores_parameters_when_the_model_fails():
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def f(t, y):
        if not torch.equal(weight.detach(), torch.ones(2, dtype=torch.float64)):
            raise RuntimeError("moved")
        return weight * y

    with pytest.raises(RuntimeError, match="moved"):
        testing.taylor_slopes(f, Y0, T, 0.6, method="euler", params=[weight])
    assert torch.equal(weight.detach(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("keywords, message", [({"halvings": 0}, "halvings"), ({"first_step": 0.9}, "first_step")])
def test_taylor_says_which_argument_is_wrong(keywords, message):
    with pytest.raises(ValueError, match=message):
        testing.taylor_slopes(lambda t, y: -y, Y0, T, 0.6, **keywords)


def test_nan_never_passes():
    errors = testing.GradientErrors(math.nan, None, 0.0)
    slopes = testing.TaylorSlopes((1.0, math.nan), (2.0, 2.0))
    report = testing.Report("euler", 1, torch.float64, errors, 0.0, slopes, 1e-12, 1e-12)
    assert math.isnan(errors.worst) and math.isnan(slopes.worst) and not report.passed
    assert [passed for *_, passed in report.checks()] == [False, True, True, False, True]
