"""A creep law fitted to a million-step load record: the gradient keeps a few numbers a step, and no states.

    python examples/long_memory.py                  # a million steps: twenty minutes on one core, 2 GB
    python examples/long_memory.py --quick          # two thousand: half a minute
    python examples/long_memory.py --steps 100000   # between the two

Specimens of a polymer, each at a load level of its own, are loaded by the same irregular record u(t) for 100 hours.
Their strains y obey a fractional Kelvin-Voigt law, a springpot beside a stiffening spring:

    eta D^alpha y = level u(t) - E (1 + beta y^2) y,      y(0) = 0,      D^alpha the Caputo derivative.

The springpot remembers the whole record, so that the last strain depends on a million loads before it.  From a hundred
noisy observations of each specimen the script finds alpha, eta, E and beta: by L-BFGS on a record averaged to N/1000
steps, then on N/100, N/10 and N by quasi-Newton steps that begin with the coarse record's Hessian, so that the full
record takes a gradient or two.  They are exact gradients of the discrete solution, with a compressed history
(`SumOfExponentials`) and a few snapshots instead of all states (`Revolve`).

Every gradient of the table runs in a process of its own: the growth of the peak resident set over the warmed-up
process, and CPU time.  `StoreAll()` keeps a state a step, `Backprop()` autograd's graph; the latter ends where its
memory or its time does.  The script fails unless the parameters are the true ones to four standard errors, the
gradients of Revolve and StoreAll are equal to the bit, and Revolve's memory stays below 16 MB and 100 bytes a step: a
few numbers each, weights and their derivatives mostly, whatever the size of the state.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import pfde

HOURS = 100.0
OBSERVATIONS = 100  # a specimen
NOISE = 0.01  # standard deviation; strains are about 1
NAMES = ("alpha", "eta", "E", "beta")
TRUE = (0.6, 4.0, 1.0, 0.3)
GUESS = (0.8, 2.0, 2.0, 0.1)
BYTES_A_STEP, BYTES = 100, 16e6  # what Revolve's memory may take: the first times N, and the second
MB = 1e6


# The model ------------------------------------------------------------------------------------------------------------


def to_free(parameters: tuple[float, ...]) -> Tensor:
    """logit alpha and the logarithms of the others: what is optimised, without bounds."""
    alpha, *others = parameters
    return torch.tensor([math.log(alpha / (1 - alpha)), *map(math.log, others)], dtype=torch.float64)


def from_free(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, eta, E, beta."""
    return torch.sigmoid(z[0]), z[1].exp(), z[2].exp(), z[3].exp()


def load_record(steps: int, seed: int) -> Tensor:
    """u, (steps,): periods of load and of rest, from seconds to hours long, on a slow drift."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linspace(0, 2 * math.pi, steps, dtype=torch.float64).sin_().mul_(0.2).add_(0.8)
    length = steps // 4
    while length >= 1:  # on or off, for about `length` steps each
        switches = torch.rand(steps, generator=generator) < 1 / length
        u += 0.3 * (2.0 * (switches.cumsum(0) % 2) - 1)
        length //= 8
    return u


def strains(
    record: Tensor,
    steps: int,
    specimens: int,
    z: Tensor,
    gradient: pfde.Discrete | pfde.Backprop | None,
    on_evaluation: Callable[[], object],
) -> pfde.Solution:
    """The strains at the observations, (OBSERVATIONS + 1, specimens), of the record averaged to so many steps."""
    alpha, eta, E, beta = from_free(z)
    level = torch.linspace(0.4, 1.6, specimens, dtype=torch.float64)
    # D^alpha y = drive u - rate y - hardening y^3; a coefficient a specimen spares each step a sum over them
    drive, rate, hardening = level / eta, (E / eta).expand(specimens), (E * beta / eta).expand(specimens)
    load = record.view(steps, -1).mean(1)
    step_size = HOURS / steps

    def slope(t: Tensor, y: Tensor) -> Tensor:
        on_evaluation()
        u = load[min(round(float(t) / step_size), steps - 1)]
        return torch.addcmul(drive * u, y, torch.addcmul(rate, hardening, y * y), value=-1)

    t = torch.linspace(0, HOURS, OBSERVATIONS + 1, dtype=torch.float64)
    y0 = torch.zeros(specimens, dtype=torch.float64)
    parameters = [x for x in (drive, rate, hardening) if x.requires_grad]
    return pfde.solve(
        slope,
        y0,
        t,
        alpha,
        method="euler",
        step_size=step_size,
        history=pfde.SumOfExponentials(1e-8),
        gradient=gradient,
        params=parameters,
    )


# One gradient, and what it takes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A gradient to compute; method: "revolve", "store-all" or "backprop"."""

    folder: str  # of the record and the observations
    steps: int
    method: str
    z: list[float]
    snapshots: int
    seconds: float  # CPU seconds allowed to backprop
    memory: float  # bytes allowed to it

    def gradient(self) -> pfde.Discrete | pfde.Backprop:
        if self.method == "backprop":
            return pfde.Backprop()
        return pfde.Discrete(schedule=pfde.Revolve(self.snapshots) if self.method == "revolve" else pfde.StoreAll())


@dataclass
class Result:
    """What a job found, and what it took beyond the warmed-up process."""

    loss: float  # half of chi^2: the sum of (residual / noise)^2 / 2
    gradient: list[float]
    bytes: int
    cpu: float
    history_error: float
    snapshots: int


def loss_and_gradient(
    job: Job, record: Tensor, observed: Tensor, steps: int, bar: tqdm
) -> tuple[Tensor, Tensor, pfde.Solution]:
    """The loss at job.z, its gradient, and the solution."""
    z = torch.tensor(job.z, dtype=torch.float64, requires_grad=True)
    solution = strains(record, steps, observed.shape[1], z, job.gradient(), bar.update)
    loss = ((solution.y - observed)[1:] / NOISE).square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient, solution


def work(job: Job) -> Result:
    """Compute a job, in the process that `measured` started for it."""
    torch.set_num_threads(1)
    record, observed = torch.load(Path(job.folder) / "data.pt", weights_only=True)
    loss_and_gradient(job, record[: 2 * OBSERVATIONS], observed, 2 * OBSERVATIONS, progress_bar("", 1, silent=True))
    if job.method == "backprop":
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_DATA, allocated() + int(job.memory))
        limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + job.seconds))
    evaluations = {"backprop": 1, "store-all": 2, "revolve": 3}[job.method] * job.steps  # about
    with progress_bar(f"N = {job.steps}, {job.method}", evaluations) as bar:
        before, start = peak_memory(), time.process_time()
        loss, gradient, solution = loss_and_gradient(job, record, observed, job.steps, bar)
        cpu, grown = time.process_time() - start, peak_memory() - before
    stats = solution.stats
    return Result(float(loss), gradient.tolist(), grown, cpu, stats.history_error, stats.snapshots_peak)


def measured(job: Job) -> Result | str:
    """Compute a job in a fresh process; why not, if it was more than was allowed."""
    command = [sys.executable, __file__, "--work", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode == 0:
        return Result(**json.loads(done.stdout))
    if done.returncode in (OUT_OF_MEMORY, -signal.SIGKILL, -signal.SIGABRT) and job.method == "backprop":
        return f"needs more than {job.memory / MB:.0f} MB"
    if done.returncode == -signal.SIGXCPU:
        return f"needs more than {job.seconds:.0f} s"
    raise RuntimeError(f"{job} failed with exit code {done.returncode}: see above")


OUT_OF_MEMORY = 3


def peak_memory() -> int:
    """The peak of this process's resident set, bytes."""
    try:  # Linux; ru_maxrss there includes the parent's
        return 1024 * status_kb("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def allocated() -> int:
    """The data of this process, as RLIMIT_DATA counts it, bytes; 0 where that is unknown."""
    try:
        return 1024 * status_kb("VmData")
    except OSError:
        return 0


def status_kb(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


# The fit --------------------------------------------------------------------------------------------------------------


def fit_coarse(
    record: Tensor, observed: Tensor, steps: int, guess: Tensor, snapshots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """z, the loss there and its Hessian (from differences of gradients), of the coarsest record."""

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        job = Job("", steps, "revolve", z.tolist(), snapshots, 0.0, 0.0)
        loss, gradient, _ = loss_and_gradient(job, record, observed, steps, bar)
        return loss, gradient

    z = guess.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=60, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        loss, z.grad = evaluate(z.detach())
        return loss

    with progress_bar(f"N = {steps}, L-BFGS", None) as bar:
        optimizer.step(closure)
        best = z.detach()
        step = 1e-4
        columns = []
        for direction in torch.eye(len(z), dtype=torch.float64):
            ahead, behind = evaluate(best + step * direction)[1], evaluate(best - step * direction)[1]
            columns.append((ahead - behind) / (2 * step))
        loss, _ = evaluate(best)
    hessian = torch.stack(columns)
    return best, loss, (hessian + hessian.T) / 2


def updated(hessian: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """The Hessian after a step that changed the gradient by `change` (BFGS)."""
    old = hessian @ step
    return hessian + change.outer(change) / (change @ step) - old.outer(old) / (step @ old)


def say_level(steps: int, gradients: str, loss: float, count: int, z: Tensor) -> None:
    values = "  ".join(f"{name} {value:.5f}" for name, value in zip(NAMES, map(float, from_free(z)), strict=True))
    print(f"N = {steps:<8} {gradients:<12} chi^2 / observations {2 * loss / count:<8.4f}  {values}", flush=True)


# Table, picture, terminal ---------------------------------------------------------------------------------------------


def print_table(results: dict[tuple[int, str], Result | str]) -> None:
    print(f"\n{'N':>9}  {'method':<10}  {'peak MB':>8}  {'bytes/step':>10}  {'CPU s':>8}  {'us/step':>8}")
    for (steps, method), result in sorted(results.items(), key=lambda item: (METHODS.index(item[0][1]), item[0][0])):
        if isinstance(result, str):
            print(f"{steps:>9}  {method:<10}  {result}: stopped here")
        else:
            memory = f"{result.bytes / MB:>8.1f}  {result.bytes / steps:>10.0f}"
            print(f"{steps:>9}  {method:<10}  {memory}  {result.cpu:>8.2f}  {1e6 * result.cpu / steps:>8.0f}")


METHODS = ("backprop", "store-all", "revolve")


def draw(results: dict[tuple[int, str], Result | str], path: Path) -> None:
    """Memory and CPU time against N."""
    from matplotlib.figure import Figure  # here: the processes of the single gradients start sooner without it

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for method, colour in zip(METHODS, ("tab:red", "tab:orange", "tab:blue"), strict=True):
        points = sorted((n, r) for (n, m), r in results.items() if m == method and isinstance(r, Result))
        steps = [n for n, _ in points]
        memory.loglog(steps, [r.bytes / MB for _, r in points], "o-", color=colour, label=method)
        seconds.loglog(steps, [r.cpu for _, r in points], "o-", color=colour, label=method)
    memory.set(xlabel="steps N", ylabel="MB", title="peak memory of one gradient")
    seconds.set(xlabel="steps N", ylabel="CPU seconds", title="time of one gradient")
    for axes in (memory, seconds):
        axes.grid(True, which="both", alpha=0.2)
    memory.legend()
    figure.savefig(path, dpi=150)


def progress_bar(title: str, total: int | None, silent: bool = False) -> tqdm:
    """A bar of evaluations of the model."""
    return tqdm(
        desc=title, total=total, unit=" f", unit_scale=True, mininterval=0.5, ncols=90, leave=False, disable=silent
    )


# The program ----------------------------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--steps", type=int, default=1_000_000, help="N, a multiple of 1000 [1000000]")
    add("--specimens", type=int, default=64, help="the size of the state [64]")
    add("--snapshots", type=int, default=20, help="that Revolve keeps [20]")
    add("--seed", type=int, default=0, help="of the record and the noise [0]")
    add("--quick", action="store_true", help="N = 2000, and a second for backprop")
    add("--backprop-seconds", type=float, default=60.0, help="CPU time allowed to one gradient by backprop [60]")
    add("--backprop-mb", type=float, default=2000.0, help="memory allowed to it [2000]")
    add("--out", type=Path, default=Path("results"), help="folder of long_memory.png and long_memory.json [results]")
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.backprop_seconds = 2000, min(args.backprop_seconds, 1.0)
    if args.steps < 1000 or args.steps % 1000:
        parser.error(f"--steps must be a positive multiple of 1000: got {args.steps}")
    for name in ("specimens", "snapshots"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more: got {getattr(args, name)}")
    return args


def main() -> int:
    args = parse_options()
    if args.work:
        try:
            print(json.dumps(dataclasses.asdict(work(Job(**json.loads(args.work))))))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not re.search("allocate memory|bad_alloc", str(error)):
                raise
            return OUT_OF_MEMORY
        return 0
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    levels = [args.steps // 10**k for k in (3, 2, 1, 0)]
    levels = [n for n in levels if n >= 2 * OBSERVATIONS and n % OBSERVATIONS == 0 and args.steps % n == 0]
    with tempfile.TemporaryDirectory() as folder:
        return run(args, levels, folder)


def run(args: argparse.Namespace, levels: list[int], folder: str) -> int:
    """Make the data, fit, measure, report."""
    true = to_free(TRUE)
    record = load_record(args.steps, args.seed)
    with progress_bar("data", args.steps) as bar, torch.no_grad():
        clean = strains(record, args.steps, args.specimens, true, None, bar.update).y
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(args.seed + 1), dtype=torch.float64)
    observed = clean + NOISE * noise
    count = OBSERVATIONS * args.specimens
    torch.save((record, observed), Path(folder) / "data.pt")
    print(f"{args.steps} loads, {args.specimens} specimens, {count} observations, noise {NOISE:g}", flush=True)

    results: dict[tuple[int, str], Result | str] = {}

    def gradient(steps: int, method: str, z: Tensor) -> Result | str:
        job = Job(folder, steps, method, z.tolist(), args.snapshots, args.backprop_seconds, args.backprop_mb * MB)
        results[steps, method] = result = measured(job)
        return result

    def loss_and_slope(steps: int, z: Tensor) -> tuple[float, Tensor]:
        """By Revolve: the first of each N is the table's, further ones need no process of their own."""
        if (steps, "revolve") not in results:
            result = gradient(steps, "revolve", z)
            assert isinstance(result, Result), result
            return result.loss, torch.tensor(result.gradient, dtype=torch.float64)
        job = Job("", steps, "revolve", z.tolist(), args.snapshots, 0.0, 0.0)
        with progress_bar(f"N = {steps}, revolve", 3 * steps) as bar:
            loss, slope, _ = loss_and_gradient(job, record, observed, steps, bar)
        return float(loss), slope

    coarsest, *finer = levels
    z, loss, hessian = fit_coarse(record, observed, coarsest, to_free(GUESS), args.snapshots)
    starts = {coarsest: z}
    say_level(coarsest, "L-BFGS", float(loss), count, z)
    for steps in finer:
        starts[steps] = z
        step = slope = None
        for taken in range(1, 7):
            before = slope
            loss, slope = loss_and_slope(steps, z)
            if step is not None:
                hessian = updated(hessian, step, slope - before)
            step = -torch.linalg.solve(hessian, slope)
            fall = -float(slope @ step) / 2  # of the loss, in the quadratic model
            z = z + step
            say_level(steps, f"{taken} gradient" + "s" * (taken > 1), loss - fall, count, z)
            if fall < FALL:
                break
    error = torch.linalg.inv(hessian).diagonal().sqrt()  # half of chi^2: the inverse Hessian is the covariance

    levels = [n for n in levels if n >= 1000]
    for steps in levels:
        for method in ("revolve", "store-all"):
            if (steps, method) not in results:
                gradient(steps, method, starts[steps])
    for steps in levels:
        if isinstance(gradient(steps, "backprop", starts[steps]), str):
            break

    print_table(results)
    draw(results, args.out / "long_memory.png")
    verdict = report(args, levels, results, z, true, error)
    print(f"written: {args.out / 'long_memory.png'}, {args.out / 'long_memory.json'}")
    return 0 if verdict else 1


# A level ends with a step that gains less: its z was then within 0.3 standard errors of the minimum, and what is
# left, a part of that (the Hessian is nearly the level's own), is far below the noise.
FALL = 0.05


def report(
    args: argparse.Namespace,
    levels: list[int],
    results: dict[tuple[int, str], Result | str],
    z: Tensor,
    true: Tensor,
    error: Tensor,
) -> bool:
    """Check what the example claims, line by line, and write it all to the JSON file."""
    found = {key: result for key, result in results.items() if isinstance(result, Result)}
    off = ((z - true) / error).abs()
    print("\nparameter      found    true   standard errors off")
    for name, value, exact, distance in zip(NAMES, map(float, from_free(z)), TRUE, off.tolist(), strict=True):
        print(f"{name:<10} {value:>9.5f} {exact:>7g} {distance:>10.2f}")
    finest = levels[-1]
    revolve, stored = found[finest, "revolve"], found[finest, "store-all"]
    allowed = BYTES + BYTES_A_STEP * finest
    same = all(found[n, "revolve"].gradient == found[n, "store-all"].gradient for n in levels)
    checks = {
        f"parameters found within four standard errors (largest: {float(off.max()):.2f})": bool((off < 4).all()),
        "gradients of revolve and store-all equal to the bit": same,
        f"revolve at N = {finest}: {revolve.bytes / MB:.1f} MB of at most {allowed / MB:.1f}, "
        f"store-all {stored.bytes / MB:.1f}": revolve.bytes <= allowed,
    }
    print(f"\nrelative error of the compressed kernel, certified: {revolve.history_error:.1e}")
    for text, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED'}: {text}")
    rows = [
        {"steps": n, "method": m} | ({"stopped": r} if isinstance(r, str) else dataclasses.asdict(r))
        for (n, m), r in results.items()
    ]
    document = {
        "options": {name: str(value) if name == "out" else value for name, value in vars(args).items()},
        "parameters": dict(zip(NAMES, map(float, from_free(z)), strict=True)),
        "true": dict(zip(NAMES, TRUE, strict=True)),
        "standard_errors_off": dict(zip(NAMES, off.tolist(), strict=True)),
        "checks": checks,
        "gradients": rows,
    }
    (args.out / "long_memory.json").write_text(json.dumps(document, indent=1) + "\n")
    return all(checks.values())


if __name__ == "__main__":
    sys.exit(main())
