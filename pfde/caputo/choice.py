"""history=None: which history a solve gets, from what each costs.

Microseconds per step and direction, fitted to forward passes over N = 64 .. 4096 rows of d = 1 .. 8192 entries, float32
and float64, one core of an EPYC 9004, with s kilobytes a row and Q modes (on a nonuniform grid the set-up, too):

                    uniform grid                       several orders                    nonuniform grid
    exact           10 + s (0.52 + 0.43 log2(N/64))    45 + s (3 + N/500), or 1500 (*)    45 + N/50 + s N/180
    exponentials    12 + s (0.3 + 0.018 Q)             25 + 4 s                          48 + 2200/N + s (0.3 + 0.018 Q)

    (*) for orders of more than a sixteenth of the components, d > 512

and rows of memory, with those of a gradient: exact N or, in the integral form, 2 N; exponentials 3 Q + N (`pece`:
2 N). Under a checkpoint schedule, which can bound the memory of a compressed history only, memory decides: exponentials
then hold what the schedule keeps, where a snapshot weighs Q + 2 rows, and Q + 33 + 32 C for each of the two directions
(docs/memory.md), more than the exact history has for few steps. Exponentials are taken at rounding level, 1e-13 in
float64 and 1e-7 in float32, where the compressed scheme is the exact one to rounding; a looser tolerance is the user's
to ask for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..schedules import Schedule, Sizes
from .grid import Grid
from .history import Exact, SumOfExponentials
from .history.bounded import BLOCK
from .schemes import Scheme

TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-13}
SLOWER, SMALLER = 1.5, 0.75  # up to so much more time is taken where memory falls below this part


class Choice(NamedTuple):
    """A history, and why."""

    history: Exact | SumOfExponentials
    reason: str


def choose_history(
    scheme: Scheme, grid: Grid, orders: int, width: int, dtype: torch.dtype, *, schedule: Schedule | None
) -> Choice:
    """The history for a state of `width` entries with `orders` different orders.

    It is the same with and without a gradient, so that a model gives the same values in training and evaluation.
    schedule : one that is to bound the memory, or None
    """
    compressed = SumOfExponentials(TOLERANCE[dtype])
    steps, size = grid.steps, torch.finfo(dtype).bits / 8e3 * width
    modes = (math.log(steps) + 4.2) * math.log(2 / compressed.tolerance) / math.pi**2
    exact_rows = steps * (2 if scheme.form == "integral" else 1)
    if schedule is not None:
        bounded = _rows_under(schedule, steps, math.ceil(modes), scheme.channels, round(1e3 * size))
        if bounded is None or bounded < exact_rows:
            return Choice(compressed, "the schedule can bound the memory of a compressed history only")
        return Choice(
            Exact(), f"under {schedule!r} exponentials would take about {bounded} rows, the exact history {exact_rows}"
        )
    several = orders > 1
    if grid.points is not None:
        exact_time = 45 + steps / 50 + size * steps / 180
        time = 48 + 2200 / steps + size * (0.3 + 0.018 * modes)
    elif several:
        many = orders * 16 > width
        exact_time, time = 45 + (1500 if many and width > 512 else size * (3 + steps / 500)), 25 + 4 * size
    else:
        exact_time = 10 + size * (0.52 + 0.43 * max(0.0, math.log2(steps / 64)))
        time = 12 + size * (0.3 + 0.018 * modes)
    rows = 3 * modes + steps * scheme.channels
    figures = (
        f"{steps} steps of {width} entries: exact about {exact_time:.0f} us a step and "
        f"{exact_rows * size / 1e3:.2g} MB, exponentials {time:.0f} us and {rows * size / 1e3:.2g} MB"
    )
    if time < exact_time or (time < SLOWER * exact_time and rows < SMALLER * exact_rows):
        return Choice(compressed, figures)
    return Choice(Exact(), figures)


def _rows_under(schedule: Schedule, steps: int, modes: int, channels: int, row: int) -> int | None:
    """Rows of a compressed history and its gradient under a schedule; None where it does not say or has no plan.

    row : bytes of one
    """
    direction = modes + BLOCK + 1 + BLOCK * channels
    sizes = Sizes(steps, (modes + 2) * row, channels * row, BLOCK, (BLOCK - 1) * row, direction * row)
    try:
        kept = schedule.memory_bytes(sizes)
    except ValueError:
        return None
    if kept is None:
        return None
    return direction * (1 if kept == steps * channels * row else 2) + kept // row
