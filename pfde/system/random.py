"""Random numbers in f: each step draws its own, the same at every evaluation.

A function with dropout is f_n(t, y) with numbers that belong to step n: the stages of a step, Newton's iterations, the
backward pass and every replay evaluate it with the same ones. They come from torch's default generators as they stand
when step n is first evaluated; the states (5 kB each on the CPU) are kept for the steps of the current leaf, and in
every snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def generator_states(device: torch.device) -> list[Tensor]:
    """The states of torch's default generators: the CPU's, and the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_generator_states(device: torch.device, states: list[Tensor]) -> None:
    """Set them again."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were."""
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(device, states)


class Draws:
    """The random states with which the steps of one solve begin."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: dict[int, list[Tensor]] = {}

    def enter(self, n: int) -> None:
        """f is about to be evaluated at step n."""
        states = self._begin.get(n)
        if states is None:
            self._begin[n] = generator_states(self._device)
        else:
            set_generator_states(self._device, states)

    def now(self) -> list[Tensor]:
        """The present states."""
        return generator_states(self._device)

    def leaf(self, first: int, last: int) -> list[Tensor]:
        """The states with which the steps first+1..last began, (steps, bytes), for each generator; see `load`."""
        now = self.now()  # stands for a step at which f was not evaluated: the last of an explicit method
        steps = [self._begin.get(n, now) for n in range(first + 1, last + 1)]
        return [torch.stack(states) for states in zip(*steps, strict=True)]

    def load(self, first: int, leaf: list[Tensor]) -> None:
        """Let the steps after `first` draw what they drew when this was their `leaf`."""
        for i, states in enumerate(zip(*leaf, strict=True)):
            self._begin[first + 1 + i] = list(states)

    def restart(self, states: list[Tensor]) -> None:
        """Go on from here: steps to come draw anew."""
        self._begin = {n: begin for n, begin in self._begin.items() if n == 0}
        set_generator_states(self._device, states)

    def forget(self, n: int) -> None:
        """Drop the states of the steps 1..n."""
        self._begin = {k: begin for k, begin in self._begin.items() if k == 0 or k > n}
