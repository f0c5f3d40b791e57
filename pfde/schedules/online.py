"""Checkpointing of a solve whose number of steps is not known before it ends, as with adaptive steps.

The forward pass advances block by block, of M steps each, and holds at most c snapshots. Once the solve has ended after
n blocks with snapshots p_0 = 0 < p_1 < ... < p_{k-1}, every gap g_i between neighbours is reversed as is optimal
with the c - i snapshots that are then free (Griewank, Walther 2000, doi:10.1145/347837.347846), the last gap without
its last block, whose data are at hand. With F(n, c) of base.forward_steps, F(0, c) = 0, this takes

    T(p, n) = n + sum_i F(g_i, c - i),     g_i = p_{i+1} - p_i,   p_k = n - 1,                                      (1)

advances over a block. The freedom is which snapshot to give up for one at the present block n. Stumm and Walther (2010,
doi:10.1137/080742439) tabulate optimal choices up to about C(c + 2, c) blocks, Wang, Moin and Iaccarino (2009,
doi:10.1137/080727890) keep the number of repetitions least for any n. The rule here is neither: since (1) has a closed
form, all c candidates are compared by it, as if the solve were to end with the next block but one, and the cheapest is
taken.

NOTE 1. Why not the published rules: over n = 1..300 and c = 2..20 that of Wang, Moin and Iaccarino, as we implemented
it, takes 6 to 9 per cent more advances than the optimum for known n on average (29 at worst), this one 0.3 to 2.6 (18
at worst, c = 2, n = 15). For c >= 4 the worst is one advance too many, at n = c + 2. No proof is known to us. The tests
assert for n = 1..300, c = 1..20 that T <= (1 + 1/(2 c + 1)) F(n, c), with equality T = F for c = 1, and T <= F + n: on
average at most one repetition more than the optimum. The first bound was measured to hold up to n = 5000 for nine c
from 2 to 50. A single block may be advanced more often than that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from checkpoint_schedules import (
    CheckpointAction,
    Copy,
    EndForward,
    EndReverse,
    Forward,
    Move,
    MultistageCheckpointSchedule,
    Reverse,
    StorageType,
)

from .base import Schedule, Sizes, Stream, check_count, check_tiers, forward_steps, in_steps
from .store_all import StoreAll

_LEAF = 64


@dataclass(frozen=True)
class Online(Schedule):
    """At most `snapshots` in memory and `on_disk` more on disk, for a solve of any number of steps.

    `leaf` is the number of steps of a block, by default 64 (more where a snapshot weighs more than 64 rows); a solve of
    one block needs no step twice. Takes at most
    1 + 1/(2 c + 1) times the advances that Revolve would with the same c snapshots and blocks (measured, NOTE 1 of the
    module), and never holds more than these. The rows of every block are kept until the next block begins, since any
    block may be the last: the memory is c snapshots and one leaf, as with Revolve. By default a leaf weighs no less
    than a snapshot, so that this is never more than the rows of all steps, one snapshot and one leaf; where the number
    of steps is known and those rows take less, they are all kept, as with StoreAll.
    """

    snapshots: int
    _: KW_ONLY
    on_disk: int = 0
    directory: str | os.PathLike[str] | None = None
    leaf: int | None = None

    def __post_init__(self) -> None:
        check_count("snapshots", self.snapshots, 0)
        check_tiers(self.snapshots, self.on_disk, self.directory, self.leaf)

    def stream(self, sizes: Sizes) -> Stream:
        """The actions of one solve; sizes.steps tells no more than whether the rows of all steps take less memory."""
        if self.leaf is None and sizes.all_rows_are_less_than(self.memory_bytes(sizes)):
            return StoreAll().stream(sizes)
        return _OnlineStream(self.snapshots, self.on_disk, self._leaf(sizes))

    def _leaf(self, sizes: Sizes) -> int:
        """The steps of a block: as given, or a multiple of 64 whose rows weigh no less than a snapshot."""
        if self.leaf is not None:
            return self.leaf
        return -(-sizes.state_bytes // (_LEAF * max(1, sizes.row_bytes))) * _LEAF or _LEAF

    def memory_bytes(self, sizes: Sizes) -> int:
        """Of the snapshots in memory and one leaf, for this number of steps."""
        leaf = self._leaf(sizes)
        snapshots = min(self.snapshots, -(-sizes.steps // leaf))
        return snapshots * sizes.snapshot_bytes(leaf) + min(leaf, sizes.steps) * sizes.row_bytes


class _OnlineStream:
    """The state of one solve: the blocks that have a snapshot, in order, and the tier of each."""

    def __init__(self, in_memory: int, on_disk: int, leaf: int) -> None:
        self.c, self.in_memory, self.leaf = in_memory + on_disk, in_memory, leaf
        self.tier: dict[int, StorageType] = {}
        self.positions: list[int] = []
        self.block = 0  # the block being advanced
        self.steps: int | None = None
        self._actions = self._all()

    def __next__(self) -> CheckpointAction:
        return next(self._actions)

    def finalize(self, n: int) -> None:
        """The solve ended within the block advanced last, which this cuts short."""
        if self.steps is not None or not self.block * self.leaf < n <= (self.block + 1) * self.leaf:
            raise ValueError(
                f"the solve must end within the block advanced last, of steps {self.block * self.leaf} to "
                f"{(self.block + 1) * self.leaf}: got n={n}; call finalize once, as soon as the solve has ended"
            )
        self.steps = n

    def _all(self) -> Iterator[CheckpointAction]:
        while self.steps is None:
            yield from self._keep()
            n0 = self.block * self.leaf
            yield Forward(n0, n0 + self.leaf, False, True, StorageType.WORK)
            self.block += self.steps is None
        yield EndForward()
        n0 = self.block * self.leaf
        yield Reverse(self.steps, n0, True)
        end = self.block
        while self.positions:
            start = self.positions[-1]
            if start < end:
                yield from self._reverse(start, end, self.steps)
            else:  # kept for the last block, whose data were at hand
                yield self._drop(start)
            self.positions.pop()
            end = start
        yield EndReverse()

    def _keep(self) -> Iterator[CheckpointAction]:
        """A snapshot at the present block, if there is room or the cheapest set of snapshots contains it."""
        if len(self.positions) == self.c:
            i = _dispensable(self.positions, self.block, self.c)
            if i is None:
                return
            yield self._drop(self.positions.pop(i))
        self.positions.append(self.block)
        n0 = self.block * self.leaf
        # Of no steps: the snapshot alone. Its tier and that of the leaf that follows cannot be said in one action.
        yield Forward(n0, n0, True, False, self._take(self.block))

    def _reverse(self, start: int, end: int, steps: int) -> Iterator[CheckpointAction]:
        """Reverse the blocks from the snapshot at `start` to `end`, the last snapshot; it is gone thereafter."""
        free = self.c - len(self.positions) + 1  # with the one at start
        for action in MultistageCheckpointSchedule(end - start, free, 0):
            if isinstance(action, EndForward | EndReverse):
                continue
            if isinstance(action, Forward) and action.n0 == 0 and action.write_ics:  # which there is already
                yield Copy(start * self.leaf, self.tier[start], StorageType.WORK)
                action = Forward(0, action.n1, False, False, StorageType.WORK)
            elif isinstance(action, Forward) and action.write_ics:
                tier = self._take(start + action.n0)
                action = Forward(action.n0, action.n1, True, False, tier)
            elif isinstance(action, Forward) and end - start == 1:
                yield Move(start * self.leaf, self.tier.pop(start), StorageType.WORK)
            elif isinstance(action, Copy):
                action = Copy(action.n, self.tier[start + action.n], StorageType.WORK)
            elif isinstance(action, Move):
                action = Move(action.n, self.tier.pop(start + action.n), StorageType.WORK)
            yield in_steps(action, self.leaf, steps, start=start)

    def _take(self, block: int) -> StorageType:
        """A tier with a free place: disk first in the forward pass, as early snapshots are read least often."""
        held = list(self.tier.values())
        memory = held.count(StorageType.RAM) < self.in_memory
        disk = held.count(StorageType.DISK) < self.c - self.in_memory
        prefer_disk = self.steps is None
        self.tier[block] = StorageType.DISK if disk and (prefer_disk or not memory) else StorageType.RAM
        return self.tier[block]

    def _drop(self, block: int) -> CheckpointAction:
        return Move(block * self.leaf, self.tier.pop(block), StorageType.NONE)


def _dispensable(positions: list[int], n: int, c: int) -> int | None:
    """Index of the snapshot to give up for one at block n, or None to do without; cost O(c r).

    Formula (1), less its first term, for a solve that ends with block n + 1 (n + 2 blocks in all).
    """

    def F(blocks: int, free: int) -> int:
        return forward_steps(blocks, free) if blocks else 0

    gaps = [b - a for a, b in zip(positions, [*positions[1:], n], strict=True)]
    as_now = [F(g, c - i) for i, g in enumerate(gaps)]
    shifted = [0] + [F(g, c - i) for i, g in enumerate(gaps[1:])]  # gap i + 1 becomes gap i
    best, least = None, sum(as_now[:-1]) + F(gaps[-1] + 1, 1)
    before, after = 0, sum(shifted[1:])
    for i in range(1, c):
        after -= shifted[i]
        cost = before + F(gaps[i - 1] + gaps[i], c - i + 1) + after + F(1, 1)
        if cost < least:
            best, least = i, cost
        before += as_now[i - 1]
    return best
