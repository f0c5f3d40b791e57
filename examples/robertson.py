"""Stiff kinetics learned from data: the implicit solver that can, and the explicit one that cannot.

    python examples/robertson.py            # a minute on one core
    python examples/robertson.py --quick    # half a minute: a shorter record

Robertson's three reactions (1966), A -> B slow, B + B -> C + B very fast, B + C -> A + C fast:

    y1' = -k1 y1 + k3 y2 y3,    y2' = k1 y1 - k3 y2 y3 - k2 y2^2,    y3' = k2 y2^2,    y(0) = (1, 0, 0).

From fifty noisy observations of the three concentrations, at times spaced evenly in log t from 1e-5 to 1e5, the script
finds k1 = 0.04, k2 = 3e7 and k3 = 1e4, each begun several times too large or too small.  It is the test of S. Kim,
W. Ji, S. Deng, Y. Ma, C. Rackauckas, Stiff neural ordinary differential equations (Chaos 2021,
doi:10.1063/5.0060697) and of PNODE (H. Zhang, W. Zhao, arXiv:2206.01298), with their scaling: B is never more than
4e-5, so that state and loss count concentrations in units of their largest values, (1, 3.65e-5, 1), and the rates are
learned as logarithms.  (They learn a network in place of the rate laws, which takes thousands of gradients.)

The gradients are exact for the adaptive steps of esdirk4, a diagonally implicit Runge-Kutta method whose steps are
limited by accuracy alone.  Those of dopri5, explicit, are limited by stability: |lambda| h < 3.3 with |lambda| about
1e4, whatever the accuracy asked for.  Within its budget of steps it comes a small part of the way, and then raises
`pfde.StepLimitError`; the picture shows how far, and what esdirk4 makes of all of it.

The script fails unless each logarithm is within four standard errors of the truth (and these are below 5 %), the two
solvers agree on a gradient where both work, and dopri5 raises its error within the budget.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import pfde

NAMES = ("k1", "k2", "k3")
TRUE = (0.04, 3e7, 1e4)
GUESS = (0.12, 6e6, 2e4)  # 3 times too large, 5 times too small, 2 times too large
UNITS = (1.0, 3.65e-5, 1.0)  # the largest concentrations
NOISE = 0.01  # standard deviation of the observations, in units
EASY = 1.0  # up to this time dopri5 needs a thousand steps
RTOL, ATOL = 1e-5, 1e-8

Needed = dict[float, int | pfde.StepLimitError]  # by the last time: the steps, or why the solver came no further


# The model ------------------------------------------------------------------------------------------------------------


class Reactions(nn.Module):
    """f(t, w) for the concentrations in units, y = UNITS w, with the logarithms of the rates as its parameter."""

    def __init__(self, rates: tuple[float, ...]) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.tensor(rates).log())
        stoichiometry = torch.tensor([[-1.0, 0.0, 1.0], [1.0, -1.0, -1.0], [0.0, 1.0, 0.0]])
        self.register_buffer("units", torch.tensor(UNITS))
        self.register_buffer("stoichiometry", stoichiometry / self.units[:, None])

    def forward(self, t: Tensor, w: Tensor) -> Tensor:
        y1, y2, y3 = (self.units * w).unbind()
        return self.stoichiometry @ (self.log_rates.exp() * torch.stack([y1, y2 * y2, y2 * y3]))


def concentrations(model: Reactions, t: Tensor, method: str = "esdirk4", budget: int = 100_000) -> pfde.Solution:
    """In units, at the times t, from pure A at t[0] = 0, in at most `budget` steps."""
    start = torch.tensor([1.0, 0.0, 0.0])
    # A stage is three numbers: kept, they spare the backward pass the solution of every stage's equation again.
    gradient = pfde.Discrete(store="stages")
    options = {"max_num_steps": budget}
    return pfde.solve(model, start, t, method=method, rtol=RTOL, atol=ATOL, gradient=gradient, options=options)


def times(last: float, count: int) -> Tensor:
    """0, and `count` times up to the last, spaced evenly in their logarithm."""
    return torch.cat([torch.zeros(1), torch.logspace(-5, math.log10(last), count)])


# The fit --------------------------------------------------------------------------------------------------------------


class Fit:
    """The rates that make half of chi^2 least, by L-BFGS from GUESS, and every loss and rate on the way."""

    def __init__(self, t: Tensor, observed: Tensor) -> None:
        self.t, self.observed, self.model = t, observed, Reactions(GUESS)
        self.losses: list[float] = []
        self.path: list[list[float]] = []
        self.seconds = self.steps = self.newton = 0
        with tqdm(desc="L-BFGS", unit=" gradients", ncols=90, leave=False) as self.bar:
            optimizer = torch.optim.LBFGS(
                self.model.parameters(), max_iter=40, line_search_fn="strong_wolfe", tolerance_change=1e-6
            )
            optimizer.step(self.closure)

    def closure(self) -> Tensor:
        self.path.append(self.model.log_rates.tolist())
        self.model.zero_grad()
        start = time.process_time()
        solution = concentrations(self.model, self.t)
        loss = mean_chi2(solution.y, self.observed)
        loss.backward()
        self.seconds += time.process_time() - start
        self.steps += solution.stats.steps
        self.newton += solution.stats.newton_iterations
        self.losses.append(loss.item())
        self.bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
        self.bar.update()
        return loss

    def standard_errors(self) -> Tensor:
        """Of the logarithms: from the Jacobian J of the observations, by differences, the covariance (J^T J)^-1."""
        columns, step = [], 1e-3
        with torch.no_grad():
            for direction in torch.eye(len(NAMES)):
                ends = [Reactions(tuple((self.model.log_rates + sign * step * direction).exp())) for sign in (1, -1)]
                ahead, behind = (concentrations(end, self.t).y[1:].flatten() for end in ends)
                columns.append((ahead - behind) / (2 * step * NOISE))
        jacobian = torch.stack(columns, dim=1)
        return torch.linalg.inv(jacobian.T @ jacobian).diagonal().sqrt()


def mean_chi2(w: Tensor, observed: Tensor) -> Tensor:
    """The mean of (residual / noise)^2; the start is given, not observed."""
    return ((w - observed)[1:] / NOISE).square().mean()


# The explicit solver --------------------------------------------------------------------------------------------------


def gradient_difference(observed_by: Reactions) -> float:
    """How far the gradients of dopri5 and esdirk4 are from each other at GUESS, over a time that both can do."""
    t = times(EASY, 10)
    with torch.no_grad():
        observed = concentrations(observed_by, t).y
    gradients = []
    for method in ("esdirk4", "dopri5"):
        model = Reactions(GUESS)
        mean_chi2(concentrations(model, t, method).y, observed).backward()
        gradients.append(model.log_rates.grad)
    implicit, explicit = gradients
    return float((implicit - explicit).norm() / implicit.norm())


@torch.no_grad()
def steps_to(lasts: list[float], method: str, budget: int) -> Needed:
    """The steps that the method takes to each of the times, a solve for each, up to the first error."""
    found: Needed = {}
    for last in tqdm(lasts, desc=method, unit="solve", ncols=90, leave=False):
        try:
            found[last] = concentrations(Reactions(GUESS), times(last, 2), method, budget).stats.steps
        except pfde.StepLimitError as error:
            found[last] = error
            break
    return found


# Picture, report ------------------------------------------------------------------------------------------------------


def draw(fit: Fit, needed: dict[str, Needed], budget: int, path: Path) -> None:
    """What esdirk4 learns; how the fit went; how far dopri5 comes."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    failures = [found for found in needed["dopri5"].values() if isinstance(found, pfde.StepLimitError)]
    draw_solutions(left, fit, failures)
    factors = (torch.tensor(fit.path) - torch.tensor(TRUE).log()).exp()
    for i, name in enumerate(NAMES):
        middle.semilogy(factors[:, i], "o-", markersize=3, label=f"{name} / true value")
    middle.semilogy(fit.losses, color="tab:gray", label="mean (residual / noise)^2")
    middle.axhline(1, color="black", linewidth=0.5)
    middle.set(title="the fit with esdirk4", xlabel="gradient")
    middle.legend(fontsize=8)
    for (method, found), colour in zip(needed.items(), ("tab:blue", "tab:red"), strict=True):
        points = [(last, steps) for last, steps in found.items() if isinstance(steps, int)]
        right.loglog(*zip(*points, strict=True), "o-", color=colour, label=method)
    for error in failures:
        right.plot(error.t, budget, "x", color="tab:red", markersize=12)
    right.axhline(budget, color="tab:red", linestyle="--", linewidth=1, label="dopri5's budget; x: StepLimitError")
    right.set(title="steps to the time t", xlabel="t", ylabel="steps")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def draw_solutions(axes: Any, fit: Fit, failures: list[pfde.StepLimitError]) -> None:
    """Observations and solutions, and where dopri5 came to its end."""
    t = times(float(fit.t[-1]), 100)
    learned, start = (concentrations(model, t).y[1:] for model in (fit.model, Reactions(GUESS)))
    for i, colour in enumerate(("tab:blue", "tab:orange", "tab:green")):
        axes.semilogx(t[1:], learned[:, i], color=colour, label=f"{'ABC'[i]}{f' / {UNITS[i]:g}' * (UNITS[i] != 1)}")
        axes.plot(t[1:], start[:, i], ":", color=colour)
        axes.plot(fit.t[1:], fit.observed[1:, i], "o", color=colour, markersize=3)
    for error in failures:
        axes.axvspan(error.t, float(fit.t[-1]), color="tab:red", alpha=0.08)
        axes.text(1.2 * error.t, 1.06, "beyond dopri5's budget", color="tab:red", fontsize=8)
    axes.set(title="esdirk4: data, model learned, model at the start (dotted)", xlabel="t", ylim=(-0.05, 1.12))
    axes.legend(fontsize=8, loc="center", bbox_to_anchor=(0.38, 0.45))  # where there are no data


def report(fit: Fit, difference: float, needed: dict[str, Needed], budget: int) -> bool:
    """Check what the example claims, line by line."""
    learned, errors = fit.model.log_rates.detach(), fit.standard_errors()
    off = ((learned - torch.tensor(TRUE).log()) / errors).abs()
    print("\nrate       start     learned        true   standard error   standard errors off")
    for i, name in enumerate(NAMES):
        print(
            f"{name:<4} {GUESS[i]:>11.4g} {float(learned[i].exp()):>11.4g} {TRUE[i]:>11.4g} "
            f"{100 * float(errors[i]):>14.2f} % {float(off[i]):>21.2f}"
        )
    *_, (last, failure) = needed["dopri5"].items()
    steps = list(needed["esdirk4"].values())[-1]
    print(f"\nesdirk4 to t = {float(fit.t[-1]):g}: {steps} steps")
    print(f"dopri5 to t = {last:g}: {failure}\n")
    checks = {
        f"rates within four standard errors (largest: {float(off.max()):.2f})": bool((off < 4).all()),
        f"standard errors below 5 % (largest: {100 * float(errors.max()):.2f} %)": bool((errors < 0.05).all()),
        f"mean (residual / noise)^2 {fit.losses[-1]:.3f}, between 0.7 and 1.3": 0.7 < fit.losses[-1] < 1.3,
        f"gradients of dopri5 and esdirk4 to t = {EASY:g} differ by {difference:.1e}, at most 1e-3": difference < 1e-3,
        f"dopri5 raises StepLimitError within {budget} steps, before t = {last:g}": isinstance(
            failure, pfde.StepLimitError
        ),
        f"esdirk4 takes fewer than 1000 steps: {steps}": isinstance(steps, int) and steps < 1000,
    }
    for text, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED'}: {text}")
    return all(checks.values())


# The program ----------------------------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--last", type=float, default=1e5, help="time of the last observation, 100 or more [1e5]")
    add("--observations", type=int, default=50, help="times observed [50]")
    add("--budget", type=int, default=10_000, help="steps allowed to dopri5 [10000]")
    add("--seed", type=int, default=0, help="of the noise [0]")
    add("--quick", action="store_true", help="30 observations to t = 1000, and a budget of 2000 steps")
    add("--out", type=Path, default=Path("results"), help="the folder of robertson.png [results]")
    args = parser.parse_args()
    if args.quick:
        args.last, args.observations, args.budget = 1000.0, 30, 2000
    if args.last < 100:  # dopri5 could, and k2 could not be found
        parser.error(f"--last must be 100 or more: got {args.last:g}")
    for name, least in (("observations", 10), ("budget", 1000)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more: got {getattr(args, name)}")
    return args


def main() -> int:
    args = parse_options()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    args.out.mkdir(parents=True, exist_ok=True)
    truth, t = Reactions(TRUE), times(args.last, args.observations)
    with torch.no_grad():
        clean = concentrations(truth, t).y
    observed = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(args.seed))

    fit = Fit(t, observed)
    count = len(fit.losses)
    print(
        f"esdirk4, {count} gradients: {fit.seconds:.1f} s of CPU time, {fit.steps / count:.0f} steps and "
        f"{fit.newton / count:.0f} Newton iterations each; loss {fit.losses[0]:.4g} -> {fit.losses[-1]:.4g}",
        flush=True,
    )
    lasts = [10.0**i for i in range(-3, math.ceil(math.log10(args.last)))] + [args.last]
    needed = {"esdirk4": steps_to(lasts, "esdirk4", 100_000), "dopri5": steps_to(lasts, "dopri5", args.budget)}
    draw(fit, needed, args.budget, args.out / "robertson.png")
    verdict = report(fit, gradient_difference(truth), needed, args.budget)
    print(f"written: {args.out / 'robertson.png'}")
    return 0 if verdict else 1


if __name__ == "__main__":
    sys.exit(main())
