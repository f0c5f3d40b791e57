"""Ordinary equations: pfde's gradients against the floor and against other libraries, where these can be imported.

Each case of `ode_cases.py` is a process of its own (`python benchmarks/ode.py JOB` prints a JSON object), one thread,
CPU time. Its memory is taken in its first full-size run, as `measure.py` does. Then floor, case and rival take turns,
and the ratios are medians of the ratios side by side: the rival of a case of pfde is another library's solver of the
same steps, that of a loss on all outputs is the same solve with a loss on two.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import MB
from measure import Peak, limit_memory, timed
from ode_cases import PACKAGES, STAGES, STATE, OdeCase, OdeProblem, ode_cases, ode_solver
from report import memory, table
from solves import WARM_STEPS, warm
from torch import Tensor

TARGETS = {
    "graph time": 1.0,  # of torchdiffeq's odeint
    "state time": 1.4,
    "state memory": 1 / 20,
    "stages floor": 1.1,
    "stages time": 0.8,  # of PNODE's
    "symplectic time": 0.6,  # of torch_symplectic_adjoint's
    "outputs": 1.3,  # every output read, of the time for two
}
COUNT_STEPS = 64  # a power of two, as every N: sums of 1/N are exact, and no solver adds a sliver of a step
PFDE_AGREES = 1e-10
TORCHDIFFEQ_AGREES = 1e-8
RIVALS = {"torchdiffeq": "torchdiffeq direct", "symplectic": "the symplectic package", "pnode": "PNODE"}


# -- in a process of its own -----------------------------------------------------------------------------------------


class Pass:
    """One forward and backward pass of a case, with its CPU seconds."""

    def __init__(self, case: OdeCase, problem: OdeProblem) -> None:
        self._solve, self._problem, self._outputs = ode_solver(case, problem), problem, case.outputs
        self._y_bar: Tensor | None = None
        self.forward = self.backward = 0.0

    def prepare(self, steps: int) -> None:
        """Make the cotangent of several outputs, which is the caller's and not the solver's."""
        if self._outputs != "last":
            count = steps + 1 if self._outputs == "every" else 2
            self._y_bar = self._problem.y0.new_ones(count, *self._problem.y0.shape)

    def __call__(self, steps: int) -> float:
        self._problem.clear()
        start = time.process_time()
        y = self._solve(steps)
        middle = time.process_time()
        if self._y_bar is None:
            y.square().sum().backward()
        else:
            y.backward(self._y_bar)
        end = time.process_time()
        self.forward, self.backward = middle - start, end - middle
        return end - start


def ready(case: OdeCase, problem: OdeProblem) -> Pass:
    """A pass of a case, after short solves. Raises ImportError."""
    run = Pass(case, problem)
    warm(run)  # type: ignore[arg-type]
    problem.clear()
    run.prepare(case.steps)
    return run


def evaluations(run: Pass, problem: OdeProblem) -> float:
    """Evaluations of f, forward and backward, per step: what shows that a library takes N steps."""
    count = [0]
    hook = problem.f.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    steps = COUNT_STEPS
    run.prepare(steps)
    run(steps)
    hook.remove()
    return count[0] / steps


def measure(case: OdeCase, repeats: int, budget: float, gradient_to: Path) -> dict[str, Any]:
    """Memory first, in the first full-size run, then time."""
    problem, steps = OdeProblem(), case.steps
    problem.floor(WARM_STEPS[0])
    run = ready(case, problem)
    peak = Peak()
    first = run(steps)
    result: dict[str, Any] = {
        "peak_bytes": peak.grown(),
        "peak_by": peak.method,
        "output_bytes": (steps + 1) * STATE if case.outputs == "every" else 0,
    }
    torch.save(problem.gradient(), gradient_to)
    result["evaluations"] = evaluations(run, problem)
    run.prepare(steps)

    rival = None
    if case.rival is not None:
        try:
            rival = ready(case.rival, problem)
            rival(steps)
        except ModuleNotFoundError as error:
            if error.name != PACKAGES.get(case.rival.library):
                raise
    samples = []
    for _ in range(repeats or max(5, min(20, int(budget / max(first, 1e-9))))):
        gc.collect()
        floor = timed(lambda: problem.floor(STAGES[case.method] * steps))
        gc.collect()  # none of the three pays for what another one left
        total = run(steps)
        gc.collect()
        samples.append((floor, run.forward, run.backward, total, rival(steps) if rival is not None else 0.0))

    def median(value: Callable[[Any], float]) -> float:
        return statistics.median(map(value, samples))

    result |= {
        "repeats": len(samples),
        "floor_s": median(lambda s: s[0]),
        "forward_s": median(lambda s: s[1]),
        "backward_s": median(lambda s: s[2]),
        "total_s": median(lambda s: s[3]),
        "ratio": median(lambda s: s[3] / s[0]),
        "ratio_min": min(s[3] / s[0] for s in samples),
        "ratio_max": max(s[3] / s[0] for s in samples),
    }
    if rival is not None:
        result["rival_s"] = median(lambda s: s[4])
        result["rival_ratio"] = median(lambda s: s[3] / s[4])
    return result


# -- what runs them --------------------------------------------------------------------------------------------------


class Measurements:
    """The ordinary cases that were asked for, and what was found, by name."""

    def __init__(self, quick: bool, only: list[str] | None) -> None:
        self.cases = [c for c in ode_cases(quick) if not only or any(text in c.name for text in only)]
        self.results: dict[str, dict[str, Any]] = {}
        self.verdicts: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """What --only is matched against."""
        return [c.name for c in self.cases]

    def run(self, settings: dict[str, Any], run_job: Callable[[dict[str, Any]], dict[str, Any]]) -> list[str]:
        """Measure; `run_job` starts the process, `settings` goes to each. What failed."""
        failures = []
        with tempfile.TemporaryDirectory() as folder:
            for i, case in enumerate(self.cases):
                print(f"[{i + 1}/{len(self.cases)}] {case.name} ... ", end="", flush=True)
                target = {"case": dataclasses.asdict(case), "gradient_to": str(Path(folder) / f"{case.name}.pt")}
                result = self.results[case.name] = run_job(settings | target)
                if "error" in result:
                    failures.append(f"{case.name}: {result['error']}")
                    print("ERROR")
                elif "skipped" in result:
                    print(f"skipped: {result['skipped']}")
                else:
                    against = f", {result['rival_ratio']:.2f} x {_rival(case)}" if "rival_ratio" in result else ""
                    print(f"{result['total_s']:.3f} s, {result['ratio']:.2f} x floor{against}, {_mb(result)} MB")
            return failures + self._compare(Path(folder))

    def _compare(self, folder: Path) -> list[str]:
        """Add `gradient_error`, against Backprop of the same steps where measured; what should agree and does not."""
        wrong = []
        for case in self.cases:
            same = [c for c in self.cases if c.library == "pfde" and (folder / f"{c.name}.pt").exists()]
            same = [c for c in same if (c.method, c.steps, c.outputs) == (case.method, case.steps, case.outputs)]
            same.sort(key=lambda c: c.gradient != "backprop")
            own = folder / f"{case.name}.pt"
            if not own.exists() or not same or same[0] == case:
                continue
            reference = torch.load(folder / f"{same[0].name}.pt")
            error = float((torch.load(own) - reference).norm() / reference.norm())
            self.results[case.name]["gradient_error"] = error
            exact = case.library == "torchdiffeq" and case.gradient == "direct"
            limit = PFDE_AGREES if case.library == "pfde" else TORCHDIFFEQ_AGREES if exact else float("inf")
            if not error <= limit:
                wrong.append(f"{case.name}: the gradient differs from that of {same[0].name} by {error:.1e}")
        return wrong

    def report(self) -> None:
        """Tables, and the verdict of each target."""
        rows = []
        for case in self.cases:
            r = self.results[case.name]
            if "skipped" in r or "error" in r:
                continue
            numbers = [r[f"{part}_s"] * 1e3 for part in ("floor", "forward", "backward", "total")]
            row = [_label(case), str(case.steps), *(f"{x:.0f}" for x in numbers), f"{r['ratio']:.2f}"]
            row += [f"{r['ratio_min']:.2f}..{r['ratio_max']:.2f}", str(r["repeats"])]
            row += [f"{r['rival_ratio']:.2f}" if "rival_ratio" in r else "", _rival(case) if case.rival else ""]
            row += [_mb(r), f"{memory(r) / case.steps / STATE:.1f}", f"{r['evaluations']:.2f}"]
            row += [f"{r['gradient_error']:.0e}" if "gradient_error" in r else ""]
            rows.append(row)
        header = ["", "N", "floor ms", "forward", "backward", "total", "/ floor", "range", "runs", "/ rival", "rival"]
        header += ["peak MB", "states/N", "f/N", "gradient"]
        table("Ordinary equations: CPU time, one thread; memory above a warmed-up state; float64", header, rows)
        if rows:
            print(
                "  states/N: the peak in states of 64 KiB a step; f/N: evaluations of f a step, forward and backward;"
            )
            print(
                "  gradient: relative difference from Backprop (pnode's rk4 is the classical formula, not the 3/8 rule)"
            )
        skipped: dict[str, list[str]] = {}
        for name, r in self.results.items():
            if "skipped" in r:
                skipped.setdefault(r["skipped"], []).append(name)
        for reason, names in skipped.items():
            print(f"  skipped: {', '.join(names)}: {reason}")
        for case in self.cases:
            self._judge(case)
        if self.verdicts:
            print("\nTargets, ordinary equations")
        for text, word in self.verdicts.items():
            print(f"  {word}  {text}")

    def _judge(self, case: OdeCase) -> None:
        r, rival = self.results[case.name], case.rival
        found = []  # (target, value, of what)
        if "rival_ratio" in r:
            if case.outputs == "every":
                found.append(("outputs", r["rival_ratio"], "the time of two outputs"))
            else:
                found.append((f"{case.gradient} time", r["rival_ratio"], f"{_rival(case)}'s time"))
        if case.outputs == "last" and case.library == "pfde" and "ratio" in r:
            found.append((f"{case.gradient} floor", r["ratio"], "floor"))
            other = self.results.get(rival.name if rival is not None else "", {})
            if "peak_bytes" in other:
                found.append((f"{case.gradient} memory", memory(r) / max(1, memory(other)), f"{_rival(case)}'s memory"))
        for target, value, of in found:
            if (most := TARGETS.get(target)) is not None:
                number, bound = (
                    (f"{value:.2f}", f"{most:g}") if most > 0.1 else (f"1/{1 / value:.1f}", f"1/{1 / most:g}")
                )
                self.verdicts[f"{case.name}: {number} x {of}, at most {bound}"] = (
                    "met   " if value <= most else "missed"
                )


def _label(case: OdeCase) -> str:
    kinds = {"graph": "Discrete, graph", "state": "Discrete, state", "stages": "Discrete, stages"}
    kinds |= {"symplectic": "Symplectic", "backprop": "Backprop", "adjoint": "its adjoint"}
    outputs = ", loss on all outputs" if case.outputs == "every" else ""
    return f"{case.library} {case.method}, {kinds.get(case.gradient, case.gradient)}{outputs}"


def _rival(case: OdeCase) -> str:
    assert case.rival is not None
    return "two outputs" if case.rival.library == "pfde" else RIVALS[case.rival.library]


def _mb(result: dict[str, Any]) -> str:
    return f"{memory(result) / MB:.1f}"


def main() -> None:
    """Entry point of the subprocess."""
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    case = OdeCase(**job["case"])
    try:
        limit_memory(job["memory_limit"])
        result = measure(case, job["repeats"], job["budget"], Path(job["gradient_to"]))
    except ModuleNotFoundError as error:
        if error.name != PACKAGES.get(case.library):
            raise
        result = {"skipped": f"{error.name} is not importable: put it on PYTHONPATH, or pass --peers PATH"}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("allocate memory|bad_alloc", str(error)):
            raise
        result = {"skipped": f"needs more than the limit of {job['memory_limit'] / MB:.0f} MB"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
