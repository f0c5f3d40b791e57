"""Promise 7: a dropped term, an off-by-one, a wrong sign in the adjoint is noticed by the gradient battery.

A mutant is one function of pfde whose source has one passage exchanged. Both checks that the battery makes of a
gradient must notice it, with an error far above their tolerance: 1e-6, where rounding is 1e-14.
When a mutant no longer applies because the passage has changed, give it the new one.
"""

import pytest
import torch

from pfde import testing
from pfde.caputo.adjoint import AdjointSweep, _Predictors
from pfde.caputo.grid import Orders
from pfde.caputo.operators import ExactLags
from pfde.caputo.schemes.base import ExplicitScheme, ImplicitScheme
from pfde.caputo.schemes.product_integration import PredictorCorrector
from pfde.errors import ReplayError
from support.covering import some
from support.models import Net
from support.mutants import EVERY, NOTICED, Mutant, mutate, sources

IMPLICIT_INTEGRAL, DERIVATIVE = ("beuler", "trapezoid"), ("gl", "l1", "bdf2")
WITH_START = ("euler", "pece", "trapezoid", "bdf2")
MUTANTS = {
    # the sweep
    "history one lag late": Mutant(
        ExactLags,
        "convolution",
        "self._arrange(self._kernel, entries, scale)",
        "self._arrange(self._kernel, entries, scale).roll(int(reverse), dims=2)",
        EVERY,
    ),
    "cotangent stored in the row before": Mutant(
        AdjointSweep,
        "_step",
        "self._history.push(n, step.r_bar)",
        "self._history.push(max(n - 1, 1), step.r_bar)",
        EVERY,
    ),
    "X_bar of y - y_0 with the wrong sign": Mutant(
        AdjointSweep, "_step", "y0_bar.sub_(x_bar)", "y0_bar.add_(x_bar)", DERIVATIVE
    ),
    "X_bar of y - y_0 dropped": Mutant(AdjointSweep, "_step", "y0_bar.sub_(x_bar)", "pass", DERIVATIVE),
    "sum of r_bar without the predictor's": Mutant(
        AdjointSweep,
        "_step",
        "y0_bar.add_(r_bar)",
        "y0_bar.add_(r_bar if c == 0 else 0 * r_bar)",
        ("pece",),
    ),
    "cotangent of the first output dropped": Mutant(
        AdjointSweep, "finish", "y0_bar.add_(self._y_bar[0])", "pass", EVERY
    ),
    "start column dropped": Mutant(AdjointSweep, "_step", "self._discretisation.weights.add_start(", "(", WITH_START),
    "start column one row early": Mutant(
        AdjointSweep, "_step", "add_start(c, n, slope_bar", "add_start(c, n - 1, slope_bar", WITH_START
    ),
    "start column of the corrector for the predictor": Mutant(
        AdjointSweep, "_step", "add_start(c, n, slope_bar", "add_start(0, n, slope_bar", ("pece",)
    ),
    "J_0^T F0_bar dropped from y0_bar": Mutant(
        AdjointSweep,
        "finish",
        "y0_bar.add_(f.vjp(self._slope_bar.total().to(y0_bar.dtype), self._theta_bar))",
        "f.vjp(self._slope_bar.total().to(y0_bar.dtype), self._theta_bar)",
        WITH_START,
    ),
    "F0_bar dropped from theta_bar": Mutant(
        AdjointSweep, "finish", "y0_bar.dtype), self._theta_bar)", "y0_bar.dtype))", WITH_START
    ),
    # the orders
    "start column dropped from alpha_bar": Mutant(
        AdjointSweep, "finish", "torch.addcmul(alpha_bar, ", "(lambda a, *_: a)(alpha_bar, ", WITH_START
    ),
    "start column's derivative one row early": Mutant(
        AdjointSweep,
        "_add_alpha",
        "add_start(c, n, slope_dot",
        "add_start(c, n - 1, slope_dot",
        ("euler", "pece", "trapezoid"),
    ),
    "w_bar dropped from alpha_bar": Mutant(
        AdjointSweep, "_add_alpha", "step.w_bar is not None", "False", ("pece", *IMPLICIT_INTEGRAL, *DERIVATIVE)
    ),
    "history dropped from alpha_bar": Mutant(AdjointSweep, "_add_alpha", "if z is not None", "if False", EVERY),
    "w_bar with the wrong sign": Mutant(
        ImplicitScheme, "step_adjoint", "f.value * r_bar, (", "-f.value * r_bar, (", (*IMPLICIT_INTEGRAL, *DERIVATIVE)
    ),
    "orders exchanged": Mutant(
        Orders, "collect", "index_add_(0, self.group,", "index_add_(0, len(self.alpha) - 1 - self.group,", EVERY
    ),
    # the steps
    "local weight applied once too little": Mutant(
        ImplicitScheme, "step_adjoint", "f_bar = r_bar * at.w", "f_bar = r_bar", (*IMPLICIT_INTEGRAL, *DERIVATIVE)
    ),
    "theta_bar of the last step dropped": Mutant(
        ImplicitScheme,
        "step_adjoint",
        "else f_bar + x_bar, theta_bar)",
        "else f_bar + x_bar, None if at.last else theta_bar)",
        (*IMPLICIT_INTEGRAL, *DERIVATIVE),
    ),
    "history dropped from theta_bar": Mutant(
        ImplicitScheme, "step_adjoint", "else f_bar + x_bar, theta_bar)", "else f_bar, theta_bar)", IMPLICIT_INTEGRAL
    ),
    "stage solved without transposing": Mutant(
        ImplicitScheme, "step_adjoint", "solve_transpose(", "solve_tangent(", (*IMPLICIT_INTEGRAL, *DERIVATIVE)
    ),
    "Jacobian missing before X_bar": Mutant(
        ImplicitScheme,
        "step_adjoint",
        "f.vjp(x_bar, retain=True) if integral else x_bar",
        "x_bar",
        IMPLICIT_INTEGRAL,
    ),
    "output's cotangent dropped": Mutant(
        ExplicitScheme, "step_adjoint", "plus(f.vjp(x_bar, theta_bar), y_bar)", "f.vjp(x_bar, theta_bar)", ("euler",)
    ),
    "predictor's weight dropped": Mutant(
        PredictorCorrector, "step_adjoint", "corrector_bar * at.w", "corrector_bar", ("pece",)
    ),
    "predictor's cotangent dropped": Mutant(
        PredictorCorrector, "step_adjoint", "(corrector_bar, p_bar)", "(corrector_bar, 0 * p_bar)", ("pece",)
    ),
    "predictor linearised at y": Mutant(
        PredictorCorrector, "step_adjoint", "self._at_predictor(", "linearised(", ("pece",)
    ),
    "channels exchanged": Mutant(
        PredictorCorrector, "step_adjoint", "(corrector_bar, p_bar)", "(p_bar, corrector_bar)", ("pece",)
    ),
    "predictor rebuilt without F_0": Mutant(
        _Predictors, "get", "add_start(1, n, p, trajectory.slope)", "add_start(1, n, p, None)", ("pece",)
    ),
}
SOURCES = sources(MUTANTS)


T = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
Y0 = torch.tensor([0.4, -0.9], dtype=torch.float64)
ALPHAS = torch.tensor([0.45, 0.8], dtype=torch.float64), 0.6
CHECKS = {
    "against autograd": lambda method, alpha: testing.gradient_error(Net(), Y0, T, alpha, method=method).worst,
    "dot product": lambda method, alpha: testing.dot_product_error(Net(), Y0, T, alpha, method=method),
}


@pytest.mark.smoke
@pytest.mark.parametrize("method", EVERY)
def test_the_battery_accepts_the_adjoint_as_it_is(method):
    assert max(check(method, alpha) for check in CHECKS.values() for alpha in ALPHAS) <= 1e-13


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(monkeypatch, name):
    mutant = MUTANTS[name]
    mutate(monkeypatch, mutant, SOURCES)
    turn = list(MUTANTS).index(name) % len(mutant.methods)
    for method in some([*mutant.methods[turn:], *mutant.methods[:turn]], 3):
        for what, check in CHECKS.items():
            try:
                noticed = any(check(method, alpha) > NOTICED for alpha in ALPHAS)  # with two orders, or else with one
            except ReplayError:  # it has f evaluated at other states
                continue
            assert noticed, (method, what)
