"""Keep the data of every step: no recomputation, N rows of memory for N steps, no snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint_schedules import SingleMemoryStorageSchedule

from .base import Schedule, Sizes, Stream


@dataclass(frozen=True)
class StoreAll(Schedule):
    """One forward pass that keeps what `Discrete(store=...)` says of every step, one backward pass."""

    def stream(self, sizes: Sizes) -> Stream:
        """Forward over all steps, EndForward, Reverse(steps, 0), EndReverse; the steps need not be known."""
        stream: Stream = SingleMemoryStorageSchedule()
        return stream

    def memory_bytes(self, sizes: Sizes) -> int:
        """The rows of all steps."""
        return sizes.steps * sizes.row_bytes
