"""Binomial checkpointing of a known number of steps: the fewest steps taken again with a given number of snapshots.

N steps are cut into B = ceil(N / M) blocks of M (the last may be shorter), which are reversed as Griewank and Walther
prove optimal (2000, doi:10.1145/347837.347846): a snapshot at the start of some blocks, the others advanced again from
the nearest one, and of the block to be reversed next one row a step, the leaf. Of c snapshots those read least often
may lie on disk (Stumm, Walther 2009, doi:10.1137/080718036). Both are taken from checkpoint_schedules, block by block.
Every block but the last costs as often as it is advanced, so that the steps taken are

    T(c, M) = N + M (F(B, c) - B),          F: base.forward_steps                                                  (1)

and the memory is c snapshots and M rows. Where the snapshot is the state of a compressed history, S rows large, one
extra forward pass costs 2 sqrt(N S) rows, with c S = M = sqrt(N S); this optimum is where the choice of M starts.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

from checkpoint_schedules import CheckpointAction, MultistageCheckpointSchedule

from .base import Schedule, Sizes, Stream, check_count, check_tiers, forward_steps, in_steps

_ROUND = 64  # leaves longer than this are multiples of it, as are the blocks of a history
_EVERY = 4096  # numbers of snapshots tried one by one; beyond, in steps of a 512th
_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("b", 1000), ("ib", 1024))
}


class Plan(NamedTuple):
    """What Revolve decides for a solve: snapshots used, steps of a leaf, steps taken in all, bytes kept in memory."""

    snapshots: int
    on_disk: int
    leaf: int
    forward_steps: int
    memory: int


@dataclass(frozen=True)
class Revolve(Schedule):
    """Snapshots in memory and on disk, everything between them computed again; the number of steps must be known.

    Give `snapshots`, how many fit in memory, or `memory`, bytes as an int or like "200MB", "1.5GB", "512KiB", for
    snapshots and leaf together; `on_disk` allows more snapshots, in a folder of their own within `directory`.
    `leaf` is the number of steps whose adjoint data are kept at once. By default:

    * StoreAll's, a single leaf, where the rows of all steps take less memory than these snapshots, the leaf and the
      sweep that takes steps again: with a compressed history a snapshot weighs tens of rows, and N may be small.
    * with `snapshots`: c of them and S = state_bytes / row_bytes allow M_0 = max(c S, sqrt(N S)) steps, rounded up to
      a multiple of 64 if above 64, at most N: a leaf about as large as all snapshots, or as the optimum of one extra
      pass. Of the multiples of 64 up to M_0 (of all numbers, if M_0 <= 64; and N, if M_0 = N) the one that takes the
      fewest steps, and of those the smallest.
    * with `memory`: for every number of snapshots that fits the longest leaf that remains, shortened as far as it
      leaves the number of blocks; of these the one that takes the fewest steps, then the least memory. A solve that
      fits as one leaf needs no snapshot. What the solver itself holds is not part of it, nor is the snapshot on its
      way from disk.

    `plan` tells what a solve of given sizes will do. Planning takes milliseconds for 10^6 steps. ValueError from
    `stream` and `plan` if `memory` does not hold one snapshot and one row (one row, if there are snapshots on disk).
    """

    snapshots: int | None = None
    on_disk: int = 0
    directory: str | os.PathLike[str] | None = None
    _: KW_ONLY
    memory: str | int | None = None
    leaf: int | None = None

    def __post_init__(self) -> None:
        if (self.snapshots is None) == (self.memory is None):
            raise ValueError(
                f"exactly one of snapshots and memory must be given: got snapshots={self.snapshots!r}, "
                f"memory={self.memory!r}; write Revolve(10) or Revolve(memory='200MB')"
            )
        check_tiers(self.snapshots, self.on_disk, self.directory, self.leaf)
        if self.memory is not None:
            parse_bytes(self.memory)

    def plan(self, sizes: Sizes) -> Plan:
        """The snapshots and the leaf for a solve of these sizes, and what they cost."""
        check_count("steps", sizes.steps, 1)
        steps, state, row = sizes.steps, max(1, sizes.state_bytes), max(1, sizes.row_bytes)
        sizes = sizes._replace(state_bytes=state, row_bytes=row)
        if self.snapshots is None:
            return self._fit(sizes)
        c = self.snapshots + self.on_disk
        leaf = _leaf(c, sizes) if self.leaf is None else min(self.leaf, steps)
        plan = _plan(self.snapshots, self.on_disk, leaf, sizes)
        if self.leaf is None and sizes.all_rows_are_less_than(plan.memory):
            return _plan(0, 0, steps, sizes)
        return plan

    def _fit(self, sizes: Sizes) -> Plan:
        """The plan within `memory` that takes the fewest steps."""
        assert self.memory is not None
        memory, steps = parse_bytes(self.memory), sizes.steps
        best, c = None, 0
        while (longest := min(_longest(memory, c, sizes, self.leaf), steps, self.leaf or steps)) >= 1:
            if self.leaf is not None and longest < min(self.leaf, steps):
                break
            blocks = -(-steps // longest)
            if blocks == 1 or c + self.on_disk > 0:
                leaf = longest if self.leaf is not None else _shortened(longest, blocks, sizes)
                plan = _plan(c, self.on_disk, leaf, sizes)
                if best is None or (plan.forward_steps, plan.memory) < (best.forward_steps, best.memory):
                    best = plan
            if c + self.on_disk >= blocks - 1:
                break  # all starts of blocks are kept: more snapshots would only shorten the leaf
            c += 1 if c < _EVERY else c // 512
        if best is None:
            leaf = min(self.leaf or 1, steps)
            row, state = sizes.row_bytes, sizes.snapshot_bytes(leaf)
            least = leaf * row if self.on_disk or leaf == steps else state + leaf * row
            if self.leaf is None:
                least = min(least, steps * row)
            raise ValueError(
                f"memory must hold a snapshot of {state} bytes and a leaf of {leaf} x {row} bytes: got "
                f"{self.memory!r}; give at least {least} bytes{'' if self.on_disk else ', or snapshots on_disk'}"
            )
        return best

    def stream(self, sizes: Sizes) -> Stream:
        """The actions of one solve, as planned."""
        plan = self.plan(sizes)
        return _Blocks(plan, sizes.steps)

    def memory_bytes(self, sizes: Sizes) -> int:
        """Of the plan."""
        return self.plan(sizes).memory


class _Blocks:
    """Multistage's actions on blocks, as actions on steps."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self._steps = steps
        blocks = MultistageCheckpointSchedule(-(-steps // plan.leaf), plan.snapshots, plan.on_disk)
        self._actions: Iterator[CheckpointAction] = (in_steps(action, plan.leaf, steps) for action in blocks)

    def __next__(self) -> CheckpointAction:
        return next(self._actions)

    def finalize(self, n: int) -> None:
        """Checks that the solve had the steps it was planned for."""
        if n != self._steps:
            raise ValueError(
                f"the solve must take the steps that Revolve planned, {self._steps}: got {n}; use Online(...)"
            )


def _plan(snapshots: int, on_disk: int, leaf: int, sizes: Sizes) -> Plan:
    """The plan with at most these snapshots, of which memory keeps what it can use."""
    blocks = -(-sizes.steps // leaf)
    snapshots = min(snapshots, blocks - 1)
    on_disk = min(on_disk, blocks - 1 - snapshots)
    memory = snapshots * sizes.snapshot_bytes(leaf) + leaf * sizes.row_bytes
    return Plan(snapshots, on_disk, leaf, _steps_taken(snapshots + on_disk, leaf, sizes.steps), memory)


def _steps_taken(snapshots: int, leaf: int, steps: int) -> int:
    """Formula (1)."""
    blocks = -(-steps // leaf)
    return steps + leaf * (forward_steps(blocks, snapshots) - blocks)


def _longest(memory: int, snapshots: int, sizes: Sizes, leaf: int | None) -> int:
    """The longest leaf that memory has room for beside so many snapshots; blocks of the history are not split."""
    if leaf is not None:
        return (memory - snapshots * sizes.snapshot_bytes(leaf)) // sizes.row_bytes
    room = (memory - snapshots * sizes.state_bytes) // sizes.row_bytes
    if room >= sizes.steps:
        return sizes.steps
    whole = room - room % sizes.block
    return whole if whole > 0 else (memory - snapshots * sizes.snapshot_bytes(1)) // sizes.row_bytes


def _shortened(longest: int, blocks: int, sizes: Sizes) -> int:
    """The shortest leaf that makes no more blocks."""
    leaf = -(-sizes.steps // blocks)
    return leaf if longest % sizes.block else min(longest, -(-leaf // sizes.block) * sizes.block)


def _leaf(snapshots: int, sizes: Sizes) -> int:
    """The leaf that goes with this many snapshots; the rule is in Revolve's docstring."""
    steps, state, row = sizes.steps, sizes.state_bytes, sizes.row_bytes
    most = max(-(-snapshots * state // row), math.isqrt(steps * state // row), 1)
    if most > _ROUND:
        most = -(-most // _ROUND) * _ROUND
    if most >= steps:
        return steps
    every = _ROUND if most > _ROUND else 1
    return min(range(every, most + 1, every), key=lambda leaf: (_steps_taken(snapshots, leaf, steps), leaf))


def parse_bytes(memory: str | int) -> int:
    """A number of bytes from an int or a text such as "200MB", "1.5 GB" (powers of 1000) or "512KiB" (of 1024)."""
    example = 'write an int or a text like "200MB", "1.5GB" or "512KiB"'
    if isinstance(memory, bool) or not isinstance(memory, str | int):
        raise TypeError(f"memory must be a number of bytes or a text with a unit: got {memory!r}; {example}")
    if isinstance(memory, int):
        value = memory
    else:
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)\s*", memory)
        unit = _UNITS.get(match[2].lower() or "b") if match else None
        if match is None or unit is None:
            raise ValueError(
                f"memory must be a number and a unit B, kB, MB, GB, TB or KiB...: got {memory!r}; {example}"
            )
        value = int(float(match[1]) * unit)
    if value < 1:
        raise ValueError(f"memory must be positive: got {memory!r}; {example}")
    return value
