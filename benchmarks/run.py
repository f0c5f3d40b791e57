"""Speed and memory of pfde against the floor: tables on the terminal, results/bench.json and results/bench.png.

    make bench                                   # everything, about an hour on one core
    make bench ARGS="--full"                     # the long-memory part at its full size, 10^6 steps, and repeated
    make bench ARGS="--only long"                # that part alone
    make bench ARGS="--only ode --peers ~/src"   # ordinary equations alone, beside the libraries in that folder
    make bench ARGS="--quick"                    # a small part of every kind, two minutes
    make bench ARGS="--only pece-state"          # the cases whose name contains this
    make bench ARGS="--only pfde-euler-state --profile"   # where their time goes
    make bench ARGS="--torchfde ~/src/torchfde"  # beside torchfde, which is not on PyPI

The exit code says whether everything ran, not whether the targets are met.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import long
import ode
import torch
from cases import MB, MEMORY_TARGET, Case, all_cases
from report import Results, plot, print_profile, print_tables, print_targets

HERE = Path(__file__).resolve().parent
GRADIENTS_AGREE = 1e-3  # float32; pfde's cases of one scheme and grid differ by rounding only


def memory_limit() -> int:
    """Bytes a case may take: 60 % of what the machine, or the control group, has free."""
    free = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free.append(1024 * int(line.split()[1]))
    try:
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no limit
    return int(0.6 * min(free))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What every case is told."""
    return {
        "repeats": args.repeats,
        "budget": 0.5 if args.quick else 4.0,
        "memory_limit": int(args.memory_limit * MB) if args.memory_limit else memory_limit(),
    }


def run_case(case: Case, args: argparse.Namespace, gradient_to: Path) -> dict[str, Any]:
    """Measure a case in a subprocess of its own."""
    job = settings(args) | {
        "case": dataclasses.asdict(case),
        "profile": args.profile,
        "gradient_to": str(gradient_to),
    }
    return run_script("job.py", job, args.torchfde, args.timeout)


def run_script(script: str, job: dict[str, Any], beside: str | None, timeout: float) -> dict[str, Any]:
    """What the script prints for the job, in a process of its own; why not, as "skipped" or "error".

    beside : where it may import from, too
    """
    path = [beside, os.environ.get("PYTHONPATH")]
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, str(HERE / script), json.dumps(job)]
    try:
        done = subprocess.run(command, env=os.environ | one, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"skipped": f"took longer than {timeout:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode == -9:
        return {"skipped": "was killed by the system (out of memory?)"}
    return {"error": f"exit code {done.returncode}\n" + "\n".join(done.stderr.strip().splitlines()[-8:])}


def compare_gradients(cases: list[Case], results: Results, files: dict[str, Path]) -> list[str]:
    """Add `gradient_error`, against Backprop of the same scheme where measured; what should agree and does not."""
    wrong = []
    for case in cases:
        same = [c for c in cases if c.equals == case.equals and c.library == "pfde" and files[c.name].exists()]
        same.sort(key=lambda c: (c.gradient != "backprop", c.name == case.name))
        if not files[case.name].exists() or not same or same[0].name == case.name:
            continue
        reference = torch.load(files[same[0].name])
        error = float((torch.load(files[case.name]) - reference).norm() / reference.norm())
        results[case.name]["gradient_error"] = error
        if case.library == "pfde" and not error < GRADIENTS_AGREE:
            wrong.append(f"{case.name}: the gradient differs from that of {same[0].name} by {error:.1e}")
    return wrong


def parse() -> argparse.Namespace:
    """The command line."""
    description, _, _ = (__doc__ or "").partition("\n\n    make")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small part of every kind, few repeats")
    parser.add_argument("--full", action="store_true", help="long memory at its full size, repeated: 40 minutes more")
    parser.add_argument("--steps", type=int, metavar="N", help="of the long-memory part, instead of its own sizes")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name contains TEXT (repeatable)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and exit")
    parser.add_argument("--repeats", type=int, default=0, help="pairs (floor, case) of each case; default by duration")
    parser.add_argument("--profile", action="store_true", help="print where the time of the pfde cases goes, instead")
    parser.add_argument("--torchfde", metavar="PATH", help="folder that contains the package torchfde")
    parser.add_argument(
        "--peers",
        action="append",
        metavar="PATH",
        help="folder that contains torchdiffeq, torch_symplectic_adjoint or pnode, for the ordinary part (repeatable)",
    )
    parser.add_argument("--memory-limit", type=float, metavar="MB", help="of a case; default 60 %% of what is free")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of a case (default 600)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder to write to (results/)")
    args = parser.parse_args()
    if args.repeats < 0:
        parser.error(f"--repeats must be positive: got {args.repeats}")
    if args.steps is not None and args.steps < 1000:
        parser.error(f"--steps must be at least 1000: got {args.steps}")
    if args.quick and args.full:
        parser.error("--quick and --full exclude each other")
    return args


def main() -> int:
    """Run the benchmark; 0 unless something failed."""
    args = parse()
    cases = [c for c in all_cases(args.quick) if not args.only or any(text in c.name for text in args.only)]
    if args.profile:
        wanted = ("state", "stages", "graph") if args.only else ("state",)
        cases = [c for c in cases if c.library == "pfde" and c.gradient in wanted]
        if not args.only:
            cases = [c for c in cases if c.target]
    scale = "quick" if args.quick else "full" if args.full else "bench"
    measurements = long.Measurements(scale, args.only, args.steps)
    ordinary = ode.Measurements(args.quick, args.only)
    if args.list:
        print("\n".join([*(c.name for c in cases), *measurements.names, *ordinary.names]))
        return 0
    if not cases and (args.profile or not (measurements.names or ordinary.names)):
        print(f"no case's name contains any of {args.only}: --list shows the names", file=sys.stderr)
        return 2
    results: Results = {}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        files = {c.name: Path(folder) / f"{c.name}.pt" for c in cases}
        for i, case in enumerate(cases):
            print(f"[{i + 1}/{len(cases)}] {case.name} ... ", end="", flush=True)
            result = results[case.name] = run_case(case, args, files[case.name])
            if "error" in result:
                failures.append(f"{case.name}: {result['error']}")
                print("ERROR")
            elif "skipped" in result:
                print(f"skipped: {result['skipped']}")
            elif args.profile:
                print(f"{result['total_us']:.0f} us a step")
            else:
                print(f"{result['total_s']:.3f} s, {result['ratio']:.2f} x floor, {result['peak_bytes'] / MB:.1f} MB")
        failures += compare_gradients(cases, results, files)
    if args.profile:
        for case in cases:
            if "pieces" in results[case.name]:
                print_profile(case, results[case.name])
    else:
        print_tables(cases, results)
        verdicts = print_targets(cases, results)
        failures += measurements.run(
            lambda job: run_script("long.py", dataclasses.asdict(job), None, 10 * args.timeout)
        )
        measurements.report()
        peers = os.pathsep.join(args.peers or [])
        failures += ordinary.run(settings(args), lambda job: run_script("ode.py", job, peers, args.timeout))
        ordinary.report()
        args.out.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__},
            "targets": {
                "time_over_floor": {c.name: c.time_target for c in cases if c.target},
                "memory_over_buffers": MEMORY_TARGET,
                "long": long.TARGETS,
                "ode": ode.TARGETS,
                "verdicts": verdicts | measurements.verdicts | ordinary.verdicts,
            },
            "cases": [dataclasses.asdict(c) | {"name": c.name} | results[c.name] for c in cases],
            "long": measurements.results,
            "ode": [dataclasses.asdict(c) | {"name": c.name} | ordinary.results[c.name] for c in ordinary.cases],
        }
        (args.out / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
        if cases:
            plot(cases, results, args.out / "bench.png")
        print(f"\nwritten to {args.out}: bench.json{', bench.png' if cases else ''}")
    for failure in failures:
        print(f"\nERROR {failure}", file=sys.stderr)
    return 1 if failures else 0


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
