"""What it costs to compare f with the forward pass: gradients with and without `pfde.solving.marks`, in turns.

    python benchmarks/marks.py [--repeats 15]

CPU time of forward and backward pass together, one thread, medians of paired runs in one process; 1 is without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pfde
from pfde.solving import replay

CASES = {  # width of the state, rows, hidden units; None is Lotka-Volterra, three operations
    "Lotka-Volterra, 1 row": (2, 1, None),
    "network, 1 row of 4": (4, 1, 16),
    "network, 128 rows of 64, float32": (64, 128, 64),
}
METHODS = ("euler", "pece", "trapezoid", "rk4", "dopri5", "cn")


class Net(nn.Module):
    """A small network, or Lotka-Volterra's equations."""

    def __init__(self, width: int, hidden: int | None) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.7, 0.5]))
        self.net = (
            None if hidden is None else nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y)."""
        if self.net is not None:
            return self.net(y) + 0.0 * self.rate.sum()
        return self.rate * y * (1.0 - y.flip(-1)) * torch.tensor([1.0, -1.0], dtype=y.dtype)


class NoMarks(replay.Marks):
    """Keeps nothing, and compares nothing."""

    def keep(self, *_: object, **__: object) -> None:
        """Nothing."""

    def compare(self, *_: object, **__: object) -> None:
        """Nothing."""


def gradient(method: str, func: nn.Module, y0: Tensor, steps: int) -> Callable[[], None]:
    """A forward and a backward pass."""
    t = torch.linspace(0.0, 1.0, 2, dtype=torch.float64)

    def run() -> None:
        if method in ("rk4", "dopri5", "cn"):
            y = pfde.odeint(func, y0, t, method=method, step_size=1.0 / steps)
        else:
            y = pfde.fdeint(func, y0, t, 0.7, method=method, step_size=1.0 / steps, history=pfde.Exact())
        y[-1].sum().backward()

    return run


def seconds(run: Callable[[], None]) -> float:
    """CPU time of one run."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def ratio(run: Callable[[], None], repeats: int) -> tuple[float, float]:
    """With marks over without, and milliseconds without."""
    marks, pairs = replay.Marks, []
    for _ in range(repeats + 1):
        replay.Marks = NoMarks  # type: ignore[misc]
        without = seconds(run)
        replay.Marks = marks  # type: ignore[misc]
        pairs.append((seconds(run), without))
    pairs = pairs[1:]
    return statistics.median(a / b for a, b in pairs), 1e3 * statistics.median(b for _, b in pairs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'with / without':36}" + "".join(f"{name:>18}" for name in METHODS))
    for name, (width, rows, hidden) in CASES.items():
        torch.manual_seed(0)
        dtype = torch.float32 if "float32" in name else torch.float64
        func = Net(width, hidden).to(dtype)
        y0 = torch.rand(rows, width, dtype=dtype).add_(0.5).requires_grad_()
        cells = []
        for method in METHODS:
            found, ms = ratio(gradient(method, func, y0, given.steps), given.repeats)
            cells.append(f"{found:10.3f} {ms:5.0f}ms")
        print(f"{name:36}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
