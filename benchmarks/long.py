"""Long memory: a gradient over N = 10^6 steps, the compressed history alone, checkpoints against all states.

    gradient   euler, SumOfExponentials(1e-8), Revolve(20), d = 64, float64, the table's f on a single state: peak
               memory, and CPU time over the floor, N x (f + f with graph + vjp), which is sampled before and after
    history    one pass of reads and pushes, d = 1024, float32, SumOfExponentials(1e-6), against the dense sum
               c_n = sum_{j<n} kappa_{n-j} X_j, a matrix-vector product a step; and the exact history's algorithms
    revolve    Revolve(20) against StoreAll(), d = 512, float64, f = Linear(512, 64) - tanh - Linear(64, 512),
               SumOfExponentials(1e-8): peak memory, CPU time, and the gradients' bits

Each measurement is a process of its own (`python benchmarks/long.py JOB` prints a JSON object), one thread, CPU time.

NOTE 1. All the dense products of N = 10^5 steps would take an hour: they are timed at steps spread evenly over 1..N,
their time (which grows in proportion to n) is summed by the midpoint rule, and the passes that they are compared with
take turns with them. The ratio rests on this integral.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import ALPHA, MB
from measure import Peak, timed
from report import table
from torch import Tensor, nn

import pfde

SNAPSHOTS = 20
SAMPLE = 2000  # steps of the floor that are timed at once
DENSE_SAMPLES = 64
WARM_STEPS = (8, 200)
# (steps, repeats) of --quick, of `make bench`, and of --full, whose steps are those of the targets
SCALES = {
    "gradient": {"quick": (2_000, 1), "bench": (100_000, 1), "full": (1_000_000, 1)},
    "history": {"quick": (5_000, 1), "bench": (100_000, 1), "full": (100_000, 3)},
    "revolve": {"quick": (2_000, 1), "bench": (100_000, 1), "full": (100_000, 3)},
}
TARGETS = {"gradient MB": 100.0, "gradient time": 5.0, "history": 100.0, "revolve memory": 1 / 20, "revolve time": 2.0}


@dataclass(frozen=True)
class Job:
    """What one process measures; kind: "gradient", "history"."""

    kind: str
    steps: int
    width: int = 64
    inner: int = 64
    schedule: str = "revolve"


class VectorField(nn.Module):
    """Linear(d, m) - tanh - Linear(m, d)."""

    def __init__(self, d: int, m: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(d, m), nn.Linear(m, d)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y)))


# -- in a process of its own -----------------------------------------------------------------------------------------


def gradient(job: Job) -> dict[str, Any]:
    """Peak memory and CPU time of one forward and backward pass, and the floor of a step."""
    torch.manual_seed(0)
    f = VectorField(job.width, job.inner).double()
    y0 = torch.randn(job.width, dtype=torch.float64).requires_grad_()
    v = torch.randn(job.width, dtype=torch.float64)
    parameters = tuple(f.parameters())
    schedule = pfde.Revolve(SNAPSHOTS) if job.schedule == "revolve" else pfde.StoreAll()
    solution: Any = None

    def solve(steps: int) -> None:
        nonlocal solution
        solution = pfde.solve(
            f,
            y0,
            torch.tensor([0.0, 1.0], dtype=torch.float64),
            ALPHA,
            method="euler",
            step_size=1 / steps,
            history=pfde.SumOfExponentials(1e-8),
            gradient=pfde.Discrete(schedule=schedule),
        )

    def clear() -> None:
        f.zero_grad()
        y0.grad = None

    def floor() -> None:
        t, start = torch.zeros((), dtype=torch.float64), y0.detach()
        for _ in range(SAMPLE):
            with torch.no_grad():
                f(t, start)
            y = start.detach().requires_grad_()
            torch.autograd.grad(f(t, y), (y, *parameters), v)

    for steps in WARM_STEPS:
        solve(steps)
        solution.y[-1].square().sum().backward()
        clear()
    solution = None
    floors = [timed(floor) for _ in range(3)][1:]
    peak = Peak()
    forward = timed(lambda: solve(job.steps))
    backward = timed(lambda: solution.y[-1].square().sum().backward())
    grown = peak.grown()
    floors += [timed(floor) for _ in range(2)]
    found = torch.cat([x.grad.flatten() for x in (y0, *parameters) if x.grad is not None])
    return {
        "peak_bytes": grown,
        "peak_by": peak.method,
        "forward_s": forward,
        "backward_s": backward,
        "floor_s": statistics.median(floors) / SAMPLE * job.steps,
        "floor_range_s": [min(floors) / SAMPLE * job.steps, max(floors) / SAMPLE * job.steps],
        "gradient": hashlib.sha256(found.numpy().tobytes()).hexdigest(),
        "stats": dataclasses.asdict(solution.stats),
    }


def history(job: Job) -> dict[str, Any]:
    """CPU seconds of one pass of each history, and the integral of the dense one's."""
    from pfde.caputo.discretisation import Discretisation
    from pfde.caputo.grid import Grid, Orders
    from pfde.caputo.schemes import METHODS

    N, d, dtype, device = job.steps, job.width, torch.float32, torch.device("cpu")
    grid = Grid(0.0, 1 / N, N, 1.0)
    orders = Orders(torch.tensor([ALPHA], dtype=torch.float64), None)
    torch.manual_seed(0)
    X = torch.randn(N, d, dtype=dtype)

    def operator(history: Any) -> Any:
        return Discretisation(METHODS["euler"], grid, orders, history, d, dtype, device).operator

    def advance(convolution: Any, n0: int, n1: int) -> None:
        for n in range(n0, n1):
            (c,) = convolution.read(n)
            convolution.push(n, (X[n - 1],))
        last[:] = [c.clone()]

    last: list[Tensor] = []
    exact = operator(pfde.Exact())
    reversed_kernel = exact.step_weights(0).kernel[0, 1:, 0].flip(0).to(dtype)  # kappa_N .. kappa_1

    def dense(n: int) -> Tensor:
        return reversed_kernel[N - n + 1 :] @ X[: n - 1]

    samples = min(DENSE_SAMPLES, N - 1)
    chunks = [round(i * N / samples) for i in range(samples + 1)]
    passes: dict[str, Callable[[], Any]] = {
        "sum of exponentials": lambda: operator(pfde.SumOfExponentials(1e-6)).forward([]),
        "exact, blocked": lambda: operator(pfde.Exact("blocked")).forward([X]),
        "exact, fft": lambda: operator(pfde.Exact("fft")).forward([X]),
    }
    reference = torch.zeros(d, dtype=torch.float64)  # c_N, in float64
    for j in range(0, N - 1, 4096):
        rows = slice(j, min(j + 4096, N - 1))
        reference += reversed_kernel[1:][rows].double() @ X[rows].double()
    result: dict[str, Any] = {"passes": {}, "error_of_last": {}}
    dense_times = []
    for name, make in passes.items():
        advance(make(), 1, min(N, 200))  # what is loaded lazily is loaded now
        gc.collect()
        start = time.process_time()
        convolution = make()  # the fit of the exponentials, the spectra
        seconds = time.process_time() - start
        for n0, n1 in itertools.pairwise(chunks):
            start = time.process_time()
            advance(convolution, n0 + 1, n1 + 1)
            seconds += time.process_time() - start
            if name == "sum of exponentials":
                start = time.process_time()
                dense((n0 + n1) // 2 + 1)
                dense_times.append(time.process_time() - start)
        result["passes"][name] = seconds
        result["error_of_last"][name] = float((last[0] - reference).norm() / reference.norm())
    return result | {"dense_s": statistics.fmean(dense_times) * N, "dense_samples": samples}


# -- what runs them --------------------------------------------------------------------------------------------------


class Measurements:
    """The measurements of a scale ("quick", "bench", "full"), and what they found, by name."""

    def __init__(self, scale: str, only: list[str] | None, steps: int | None) -> None:
        self._steps = {}
        for kind, scales in SCALES.items():
            if not only or any(text in f"long-{kind}" for text in only):
                n, repeats = scales[scale]
                self._steps[kind] = (steps or n, repeats)
        self.results: dict[str, Any] = {}
        self.verdicts: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """What --only is matched against."""
        return [f"long-{kind}" for kind in self._steps]

    def run(self, run_job: Callable[[Job], dict[str, Any]]) -> list[str]:
        """Measure; `run_job` starts the process. What failed."""
        failures = []
        for kind, (steps, repeats) in self._steps.items():
            print(f"long-{kind}, N = {steps} ... ", end="", flush=True)
            jobs = [Job(kind, steps, 1024 if kind == "history" else 64)]
            if kind == "revolve":
                jobs = [Job("gradient", steps, 512, schedule=schedule) for schedule in ("store-all", "revolve")]
            found = [[run_job(job) for job in jobs] for _ in range(repeats)]
            wrong = [x for pair in found for x in pair if "error" in x or "skipped" in x]
            if wrong:
                print(next(iter(wrong[0].values())))
                failures += [f"long-{kind}: {x['error']}" for x in wrong if "error" in x]
                continue
            print("done")
            self.results[kind] = {"steps": steps, "runs": found}
            if kind == "revolve" and any(a["gradient"] != b["gradient"] for a, b in found):
                failures.append("long-revolve: the gradients of revolve and store-all differ")
        return failures

    def report(self) -> None:
        """Tables, and the verdict of each target whose N was measured."""
        for kind, result in self.results.items():
            getattr(self, f"_{kind}")(result["steps"], result["runs"])
        if self.verdicts:
            print("\nTargets, long memory")
        for text, word in self.verdicts.items():
            print(f"  {word}  {text}")

    def _judge(self, kind: str, steps: int, text: str, met: bool) -> None:
        full = SCALES[kind]["full"][0]
        if steps == full:
            self.verdicts[text] = "met   " if met else "missed"
        else:
            self.verdicts[f"{text}, for N = {full} (--full)"] = "      "

    def _gradient(self, steps: int, runs: list[list[dict[str, Any]]]) -> None:
        rows = []
        for (r,) in runs:
            total = r["forward_s"] + r["backward_s"]
            r["ratio"] = total / r["floor_s"]
            evaluations = sum(r["stats"][f"nfe_{phase}"] for phase in ("forward", "recompute", "backward"))
            rows.append(
                [
                    f"N = {steps}",
                    f"{r['peak_bytes'] / MB:.1f}",
                    f"{r['forward_s']:.1f}",
                    f"{r['backward_s']:.1f}",
                    f"{1e6 * total / steps:.0f}",
                    f"{1e6 * r['floor_s'] / steps:.0f}",
                    f"{r['ratio']:.2f}",
                    f"{evaluations / steps:.2f}",
                    f"{r['stats']['history_error']:.0e}",
                ]
            )
        header = ["", "peak MB", "forward s", "backward s", "us/step", "floor us", "/ floor", "f per step", "kernel"]
        table(f"Gradient: d = 64, float64, SumOfExponentials(1e-8), Revolve({SNAPSHOTS})", header, rows)
        peak = statistics.median(r["peak_bytes"] for (r,) in runs) / MB
        ratio = statistics.median(r["ratio"] for (r,) in runs)
        most = TARGETS["gradient MB"]
        self._judge(
            "gradient", steps, f"gradient, N = {steps}: {peak:.1f} MB above the start, below {most:g}", peak < most
        )
        most = TARGETS["gradient time"]
        self._judge("gradient", steps, f"gradient, N = {steps}: {ratio:.2f} x floor, at most {most:g}", ratio <= most)

    def _history(self, steps: int, runs: list[list[dict[str, Any]]]) -> None:
        names = list(runs[0][0]["passes"])
        dense = statistics.median(r["dense_s"] for (r,) in runs)
        samples = runs[0][0]["dense_samples"]
        rows = [[f"dense, integrated from {samples} steps", f"{dense:.1f}", f"{1e6 * dense / steps:.0f}", "1", ""]]
        ratios = {}
        for name in names:
            seconds = statistics.median(r["passes"][name] for (r,) in runs)
            ratios[name] = statistics.median(r["dense_s"] / r["passes"][name] for (r,) in runs)
            error = max(r["error_of_last"][name] for (r,) in runs)
            rows.append([name, f"{seconds:.2f}", f"{1e6 * seconds / steps:.0f}", f"{ratios[name]:.0f}", f"{error:.0e}"])
        header = ["", "CPU s", "us/step", "times faster", "error of c_N"]
        table(f"History alone: N = {steps}, d = 1024, float32, SumOfExponentials(1e-6)", header, rows)
        least, ratio = TARGETS["history"], ratios[names[0]]
        text = f"history, N = {steps}: {ratio:.0f} times faster than the dense sum, at least {least:g}"
        self._judge("history", steps, text, ratio >= least)

    def _revolve(self, steps: int, runs: list[list[dict[str, Any]]]) -> None:
        rows = []
        for pair in runs:
            for name, r in zip(("StoreAll()", f"Revolve({SNAPSHOTS})"), pair, strict=True):
                total = r["forward_s"] + r["backward_s"]
                recomputed = r["stats"]["nfe_recompute"] / steps
                numbers = [r["peak_bytes"] / MB, r["forward_s"], r["backward_s"], total / r["floor_s"], recomputed]
                rows.append([name, *(f"{x:.2f}" for x in numbers)])
        header = ["", "peak MB", "forward s", "backward s", "/ floor", "recomputed"]
        table(f"Revolve against StoreAll: N = {steps}, d = 512, float64, SumOfExponentials(1e-8)", header, rows)
        memory = statistics.median(b["peak_bytes"] / max(1, a["peak_bytes"]) for a, b in runs)
        slower = statistics.median(
            (b["forward_s"] + b["backward_s"]) / (a["forward_s"] + a["backward_s"]) for a, b in runs
        )
        most = TARGETS["revolve memory"]
        text = f"revolve, N = {steps}: 1/{1 / max(memory, 1e-9):.1f} of StoreAll's memory, at most 1/{1 / most:g}"
        self._judge("revolve", steps, text, memory <= most)
        most = TARGETS["revolve time"]
        text = f"revolve, N = {steps}: {slower:.2f} x StoreAll's time, at most {most:g}"
        self._judge("revolve", steps, text, slower <= most)


def main() -> None:
    """Entry point of the subprocess."""
    torch.set_num_threads(1)
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps({"gradient": gradient, "history": history}[job.kind](job)))


if __name__ == "__main__":
    main()
