"""A dropped term, an off-by-one, a wrong sign in the transposed steps of `odeint` is noticed by the gradient tests.

A mutant is one function of pfde whose source has one passage exchanged, as in `support.mutants`. The oracle must
notice it in at least one way of keeping what the backward pass needs ("state", "stages", "graph", `Symplectic`), for
every method named, with an error far above the tolerance: 1e-6, where rounding is 1e-14.
When a mutant no longer applies because the passage has changed, give it the new one.
"""

from functools import cache

import pytest
import torch

import pfde
from pfde.one_step.adjoint import AdjointSweep
from pfde.one_step.methods.additive import Additive
from pfde.one_step.methods.base import TimeBars
from pfde.one_step.methods.diagonally_implicit import DiagonallyImplicit
from pfde.one_step.methods.runge_kutta import RungeKutta
from pfde.one_step.times import StepTimes
from pfde.system.mass import Mass
from support.mutants import NOTICED, Mutant, mutate, sources
from support.one_step import GRADIENTS, LOOSE, MASSES, Algebraic, Grid, by_oracle, by_pfde, cotangent, model, state

KINDS = [kind for kind in GRADIENTS if kind != "backprop"]
GRIDS = {
    "fixed": Grid((1.0, 0.8, 0.7), (2, 1), {"step_size": 0.1}),
    "adaptive": Grid((0.1, 0.3, 0.4, 1.1), None, LOOSE),
    "mass": Grid((1.0, 0.8), (2,), {"step_size": 0.1, "mass": MASSES["full"]}),
}


STAGES = ("midpoint", "rk4", "dopri5", "dopri8")
COUPLED = ("sdirk4", "esdirk3")
ALL = ("rk4", "esdirk3", "ark3")  # one of each family
PAIRS = ("dopri5", "esdirk3", "ark3")
ARK = ("ark2", "ark3")

MUTANTS = {
    # explicit steps, stage by stage
    "b for a": Mutant(
        RungeKutta, "adjoint", "accumulate(v, h * a, u_j)", "accumulate(v, h * self.tableau.weights[i], u_j)", STAGES
    ),
    "h missing before b": Mutant(
        RungeKutta, "adjoint", "accumulate(v, h * b, lam)", "accumulate(v, b, lam)", ("euler", "rk4")
    ),
    "h missing before a": Mutant(RungeKutta, "adjoint", "accumulate(v, h * a, u_j)", "accumulate(v, a, u_j)", STAGES),
    "later stages dropped": Mutant(RungeKutta, "adjoint", "if (u_j := u[j]) is not None:", "if False:", STAGES),
    "first stage dropped": Mutant(
        RungeKutta, "adjoint", "range(self._end - 1, -1, -1)", "range(self._end - 1, 0, -1)", ("euler", "rk4")
    ),
    "c_i missing": Mutant(TimeBars, "add", "self._nodes[i] * self._theta_bar.time", "self._theta_bar.time", STAGES),
    "slope dropped from h_bar": Mutant(TimeBars, "add", "inner(v, f.value) / self._at.h", "0.0", STAGES),
    "h missing in h_bar": Mutant(TimeBars, "add", "inner(v, f.value) / self._at.h", "inner(v, f.value)", STAGES),
    "t_bar with the wrong sign": Mutant(
        TimeBars, "add", "self.t += self._theta_bar.time", "self.t -= self._theta_bar.time", ("euler", "rk4")
    ),
    "identity dropped": Mutant(
        RungeKutta, "adjoint", "add_lost(start, terms, carry)", "add_lost(0 * start, terms, carry)", ("euler", "rk4")
    ),
    "slope at the end dropped": Mutant(
        RungeKutta,
        "adjoint",
        "lam = lam + terms[0]",
        "terms.clear()",
        ("dopri5", "dopri8"),
        "adaptive",
    ),
    "slope at the end linearised at y_n": Mutant(
        RungeKutta,
        "stages",
        "[*step.states, y1]",
        "[*step.states, y]",
        ("dopri5", "dopri8"),
        "adaptive",
    ),
    # diagonally implicit steps
    "stage solved without transposing": Mutant(
        DiagonallyImplicit, "adjoint", "solve_transpose(", "solve_tangent(", ("beuler", "cn", *COUPLED)
    ),
    "M for M^T": Mutant(
        DiagonallyImplicit, "adjoint", "system.mass_transpose(below)", "system.mass(below)", ("cn", "sdirk4"), "mass"
    ),
    "M^T dropped": Mutant(
        DiagonallyImplicit, "adjoint", "system.mass_transpose(below)", "below", ("cn", "sdirk4"), "mass"
    ),
    "M^T not transposed": Mutant(
        Mass, "apply_transpose", "rows @ self._matrix)", "rows @ self._matrix.T)", ("cn", "implicit_midpoint"), "mass"
    ),
    "y_n's own part dropped": Mutant(
        DiagonallyImplicit, "adjoint", "lam * self._rest, None", "lam * 0, None", ("implicit_midpoint",)
    ),
    "d dropped": Mutant(DiagonallyImplicit, "adjoint", "lam * d if d", "lam if d", ("implicit_midpoint",)),
    "h a_ii without h": Mutant(
        DiagonallyImplicit, "adjoint", "accumulate(v, h * a, u_i)", "accumulate(v, a, u_i)", ("beuler", *COUPLED)
    ),
    "a_ii for a_ji": Mutant(
        DiagonallyImplicit,
        "adjoint",
        "accumulate(v, h * a, u_j)",
        "accumulate(v, h * self._diagonal[i], u_j)",
        ("cn", *COUPLED),
    ),
    "J^T dropped": Mutant(
        DiagonallyImplicit, "adjoint", "product = f.vjp(v, retain=True)", "product = v.clone()", COUPLED
    ),
    "explicit stage dropped": Mutant(
        DiagonallyImplicit,
        "adjoint",
        "total.add_(products[-1])",
        "pass",
        ("cn", "esdirk3"),
    ),
    "c_i missing from implicit stages": Mutant(
        TimeBars, "add", "self._nodes[i] * self._theta_bar.time", "self._theta_bar.time", ("cn", *COUPLED)
    ),
    "slope dropped from h_bar of implicit stages": Mutant(
        TimeBars,
        "add",
        "inner(v, f.value) / self._at.h + self._nodes[i]",
        "self._nodes[i]",
        ("beuler", *COUPLED),
    ),
    "stage taken to be y_{n+1}": Mutant(
        DiagonallyImplicit, "_between", "(y1 - self._rest * y) / self._d[-1]", "y1", ("implicit_midpoint",)
    ),
    # additive steps
    "nonstiff slope dropped from its stage": Mutant(
        Additive, "adjoint", "product if b is None else b + product", "product", ARK
    ),
    "h missing before b of both parts": Mutant(
        Additive, "adjoint", "accumulate(v, h * b, lam)", "accumulate(v, b, lam)", ARK
    ),
    "implicit a for the explicit one": Mutant(Additive, "adjoint", "gather(s + i)", "gather(i)", ARK),
    "nonstiff part dropped from theta_bar": Mutant(Additive, "adjoint", "g.vjp(w, theta_bar)", "g.vjp(w)", ARK),
    "nonstiff part dropped from the times": Mutant(Additive, "adjoint", "bars.add(i, w, g)", "pass", ARK),
    "identity dropped from additive steps": Mutant(
        Additive, "adjoint", "add_lost(lam, terms, carry)", "add_lost(0 * lam, terms, carry)", ARK
    ),
    "stiff stage solved without transposing": Mutant(Additive, "adjoint", "solve_transpose(", "solve_tangent(", ARK),
    # the sweep
    "cotangent of the first output dropped": Mutant(
        AdjointSweep, "finish", "self._add(self._y_bar[output", "(self._y_bar[output", ALL
    ),
    "cotangent of an output halved": Mutant(
        AdjointSweep, "_step", "self._add(self._y_bar[output", "self._add(0.5 * self._y_bar[output", ALL
    ),
    "y_n dropped from an output inside": Mutant(
        AdjointSweep, "_step", "self._add(self._y_bar[index])", "pass", PAIRS, "adaptive"
    ),
    "h missing from the dense output": Mutant(
        AdjointSweep, "_step", "at.h * b, self._y_bar[index]", "b, self._y_bar[index]", PAIRS, "adaptive"
    ),
    "output's time dropped": Mutant(AdjointSweep, "_place", "self._t_bar[index] += rate", "pass", PAIRS, "adaptive"),
    "theta does not move with t": Mutant(AdjointSweep, "_place", "t_bar -= rate", "pass", PAIRS, "adaptive"),
    "theta does not move with h": Mutant(AdjointSweep, "_place", "h_bar -= theta * rate", "pass", PAIRS, "adaptive"),
    "theta moves with h as with t": Mutant(
        AdjointSweep, "_place", "h_bar -= theta * rate", "h_bar -= rate", PAIRS, "adaptive"
    ),
    # the times
    "h_bar with the wrong sign": Mutant(
        StepTimes, "pull", "(1.0 - r) * t_bar - q * h_bar", "(1.0 - r) * t_bar + q * h_bar", ALL
    ),
    "t_bar not shared": Mutant(StepTimes, "pull", "bars[j] += r * t_bar + q", "bars[j] += q", ALL),
    "share of the step after": Mutant(
        StepTimes, "_shares", "(n - 1 - self._starts[i]) / m", "(n - self._starts[i]) / m", ALL
    ),
    "h as long as the interval": Mutant(StepTimes, "_shares", "/ m, 1.0 / m", "/ m, 1.0", ALL),
    "share of the step's end": Mutant(
        StepTimes, "_shares", "(t - self.t0) / span", "(t1 - self.t0) / span", PAIRS, "adaptive"
    ),
}

SOURCES = sources(MUTANTS)


@cache
def reference(method, case):
    """(model, y0, cotangent, the oracle's gradient), by pfde as it is where the steps are pfde's own."""
    where = GRIDS[case]
    func, y0 = (Algebraic() if case == "mass" else model(method)), state()
    steps, append = [], StepTimes.append
    if case == "adaptive":
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(StepTimes, "append", lambda self, t: (steps.append(t), append(self, t)))
            pfde.odeint(func, y0, where.times(), method=method, **LOOSE)
    v = cotangent(len(where.t))
    mass = torch.block_diag(*[MASSES["full"]] * 2) if case == "mass" else None
    return func, y0, v, by_oracle(method, where, func, v, steps, y0=y0, mass=mass)


def error(method, case, kind):
    """The largest relative error of the gradient's groups."""
    func, y0, v, exact = reference(method, case)
    found = by_pfde(method, GRIDS[case], GRADIENTS[kind], func, v, y0)
    pairs = ((getattr(found, name), getattr(exact, name)) for name in ("y0", "theta", "t"))
    return max(float((x - ref).norm() / ref.norm()) for x, ref in pairs)


@pytest.mark.parametrize(
    ("method", "case"), sorted({(method, mutant.case) for mutant in MUTANTS.values() for method in mutant.methods})
)
def test_the_oracle_accepts_the_transposed_steps_as_they_are(method, case):
    """Not to rounding: with graphs the adaptive steps may be others, by as much as their control loses digits."""
    assert max(error(method, case, kind) for kind in KINDS) <= 1e-9


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(monkeypatch, name):
    mutant = MUTANTS[name]
    for method in mutant.methods:
        reference(method, mutant.case)  # before pfde is another
    mutate(monkeypatch, mutant, SOURCES)
    for method in mutant.methods:
        noticed = []
        for kind in KINDS:
            noticed.append(error(method, mutant.case, kind))
            if noticed[-1] > NOTICED:
                break
        else:
            raise AssertionError(f"{method}: {noticed}")
