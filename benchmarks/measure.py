"""The time and the memory of one case, in a process of its own (`job`).

Time is CPU time of the process, one thread. Floor and case take turns (floor, case, floor, case, ...), so that both see
the same machine; the ratio is the median of the ratios side by side. Memory is how far the peak of the resident set
rises above its value after short solves, which have loaded lazily loaded code and started thread pools; freed memory
is given back before, so that the allocator's reserves do not hide what a case needs. It is taken twice: in the first
full-size run, with all that the allocator adds to it (the peak, which the target is about), and once more after asking
malloc to map blocks of 8 KiB or more one by one (the second figure).

NOTE 1. The second figure is an indication, not the bytes in use: malloc still serves a block from free heap where it
can. For `euler`, N = 32, torch's profiler counted 79 states (32 KiB each) of live tensors for Discrete(), 113 for
Backprop(); the second figure was 84 and about 300, the peak 95 and about 400. Fragmentation is the likely cause of
the difference; it has not been shown.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import ROW, Case, Problem
from solves import WARM_STEPS, Run, warm

M_MMAP_THRESHOLD = -3  # of mallopt
LONG = 5.0  # seconds: a case that takes longer is timed in its first run


class Peak:
    """The growth of the peak resident set since the object was made, in bytes."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        self._resettable = True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._resettable = False
        self._before = self._resident() if self._resettable else self._lifetime_peak()

    @property
    def method(self) -> str:
        """How it is measured."""
        return "VmHWM" if self._resettable else "ru_maxrss"

    def grown(self) -> int:
        """Bytes."""
        now = self._status("VmHWM") if self._resettable else self._lifetime_peak()
        return max(0, now - self._before)

    @staticmethod
    def _status(field: str) -> int:
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    @classmethod
    def _resident(cls) -> int:
        """The resident set; smaps counts pages where status may lag by a few."""
        try:
            found = re.search(r"Rss:\s*(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
        except OSError:
            found = None
        return 1024 * int(found[1]) if found else cls._status("VmRSS")

    @staticmethod
    def _lifetime_peak() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(function: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def blocks_in_use(run: Run, steps: int) -> int | None:
    """The peak of one more run with each block on pages of its own, bytes; None without glibc. Do it last."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not library.mallopt(M_MMAP_THRESHOLD, 8192):
        return None
    peaks = []
    for _ in range(3 if steps < 1000 else 1):  # the kernel counts pages in batches: half a megabyte either way
        peak = Peak()
        run(steps)
        peaks.append(peak.grown())
    return statistics.median_low(peaks)


def measure(case: Case, repeats: int, budget: float, gradient_to: Path | None) -> dict[str, Any]:
    """Memory first, in the first full-size run, then time."""
    problem = Problem()
    run = Run(case, problem)
    problem.floor(WARM_STEPS[0])  # the first autograd.grad imports for a quarter of a second; not every case calls it
    warm(run)
    problem.clear()
    run.prepare(case.steps)
    peak = Peak()
    first = run(case.steps)
    result: dict[str, Any] = {
        "peak_bytes": peak.grown(),
        "peak_by": peak.method,
        "output_bytes": (case.steps + 1) * ROW if case.outputs == "all" else 0,
        "buffer_bytes": case.buffers * case.steps * ROW,
    }
    if gradient_to is not None:
        torch.save(problem.gradient(), gradient_to)

    evaluations = case.evaluations * case.steps
    samples = []
    if first > LONG:
        floor = min(timed(lambda: problem.floor(evaluations)) for _ in range(2))
        samples.append((floor, run.forward, run.backward))
    else:
        count = repeats or max(5, min(40, int(budget / max(first, 1e-9))))
        for _ in range(count):
            gc.collect()  # neither of the two pays for what the other left
            floor = timed(lambda: problem.floor(evaluations))
            run(case.steps)
            samples.append((floor, run.forward, run.backward))
    ratios = [(forward + backward) / floor for floor, forward, backward in samples]
    result |= {
        "repeats": len(samples),
        "floor_s": statistics.median(s[0] for s in samples),
        "forward_s": statistics.median(s[1] for s in samples),
        "backward_s": statistics.median(s[2] for s in samples),
        "total_s": statistics.median(s[1] + s[2] for s in samples),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "blocks_bytes": blocks_in_use(run, case.steps) if first < LONG else None,
        "stats": dataclasses.asdict(run.stats) if run.stats is not None else None,
    }
    return result


def limit_memory(limit: int) -> None:
    """Let allocations fail beyond `limit` bytes more than now, instead of the machine."""
    data = re.search(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert data is not None
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(data[1]) + limit, resource.RLIM_INFINITY))
