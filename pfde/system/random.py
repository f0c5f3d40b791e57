"""Random numbers in f: each step draws its own, the same at every evaluation.

A function with dropout is f_n(t, y) with numbers that belong to step n: the stages of a step, Newton's iterations, the
backward pass and every replay evaluate it with the same ones. In a forward pass they come from torch's default
generators as they stand when step n is first evaluated, as in a loop written by hand; the states (5 kB each on the CPU)
are kept for the steps of the current leaf, and in every snapshot. The backward pass leaves the generators alone.

NOTE 1. torch's default generators are those of all threads. So one evaluation of a function that draws, or of one of
which it is not known, runs at a time, in whatever thread; and where a generator is not as this solve has left it,
somebody else has drawn: the solve then goes on with a stream of its own, seeded from the generator. Its steps stay what
a replay can draw again, no generator is ever set back under the feet of another thread, and no two solves share
numbers. Numbers that another thread draws outside of pfde, while func runs, are beyond reach.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import PfdeError

T = TypeVar("T")
States = list[Tensor]

_ONE_AT_A_TIME = threading.RLock()  # NOTE 1; re-entrant: func may itself solve
_PATIENCE = 1.0  # seconds: a function that is looked at may be called by one that waits for it, in another thread
_LOOKS = 30  # at a function while other threads draw: one without their numbers is enough
_LIMIT = 300.0  # seconds after which one that draws and is to wait is taken to be so called


def generator_states(device: torch.device) -> States:
    """The states of torch's default generators: the CPU's, and the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_generator_states(device: torch.device, states: States) -> None:
    """Set them again."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def has_drawn(before: States, device: torch.device) -> bool:
    """Whether numbers have been drawn since these states; False with several threads, which may all have drawn."""
    return threading.active_count() == 1 and not _same(before, generator_states(device))


def see_whether_it_draws(call: Callable[[], T], device: torch.device, *, again: bool) -> tuple[T, bool]:
    """`call()`, and whether it draws random numbers; they can be drawn again afterwards.

    again : whether it may be called more than once, where another thread may be the one that has drawn
    """
    with _alone(_PATIENCE):
        before = generator_states(device)
        value = call()
        after = generator_states(device)
        if _same(before, after):
            return value, False
        if again and threading.active_count() > 1:
            for _ in range(_LOOKS):
                start = generator_states(device)
                value = call()
                if _same(start, generator_states(device)):
                    return value, False
            set_generator_states(device, before)
            value = call()
            if not _same(after, generator_states(device)):  # somebody else is drawing, too
                return value, True
        set_generator_states(device, before)
        return value, True


@contextmanager
def _alone(seconds: float) -> Iterator[bool]:
    """Whether it is so that no other thread evaluates a function that may draw, after waiting this long at most."""
    alone = _ONE_AT_A_TIME.acquire(timeout=seconds)
    try:
        yield alone
    finally:
        if alone:
            _ONE_AT_A_TIME.release()


class Draws:
    """The random states with which the steps of one solve begin.

    Made at the start of the forward pass; `keep_apart` ends it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: dict[int, States] = {}
        self._end = generator_states(device)  # where the last evaluation has ended
        self._apart = False  # whether the numbers are of a stream of this solve's own
        self._seeded: tuple[int, States] | None = None  # the step with which it begins, and how

    @contextmanager
    def evaluation(self, n: int) -> Iterator[None]:
        """f is evaluated at step n."""
        with _alone(_LIMIT) as alone:
            if not alone:
                raise PfdeError(
                    f"func draws random numbers and has waited {_LIMIT:.0f} s for one that does so in another thread: "
                    "does that one wait for this solve? Draw the numbers outside func, or solve in one thread"
                )
            found = generator_states(self._device)
            disturbed = not self._apart and not _same(found, self._end)
            if disturbed and n not in self._begin:
                self._seed(n)
                found = generator_states(self._device)
            apart = self._apart or disturbed
            begin = self._begin.get(n)
            if begin is None:
                seeded_here = self._seeded is not None and self._seeded[0] == n
                begin = self._begin[n] = self._seeded[1] if self._seeded and seeded_here else self._end
            if apart or begin is not self._end:
                set_generator_states(self._device, begin)
            try:
                yield
            finally:
                self._end = generator_states(self._device)
                if apart:
                    set_generator_states(self._device, found)

    def _seed(self, n: int) -> None:
        """Let step n and those after it draw from a stream of their own; a number of the generator's is its seed."""
        seed = int(torch.empty((), dtype=torch.int64).random_())
        states = [torch.Generator().manual_seed(seed).get_state()]
        if self._device.type == "cuda":
            states.append(torch.Generator(self._device).manual_seed(seed).get_state())
        self._seeded, self._apart = (n, states), True

    def keep_apart(self) -> None:
        """From now on leave torch's generators as they are: what comes are replays."""
        self._apart = True

    def now(self) -> States:
        """The states from which the next step will draw."""
        return self._end

    def leaf(self, first: int, last: int) -> States:
        """The states with which the steps first+1..last began, (steps, bytes), for each generator; see `load`."""
        now = self.now()  # stands for a step at which f was not evaluated: the last of an explicit method
        steps = [self._begin.get(n, now) for n in range(first + 1, last + 1)]
        return [torch.stack(states) for states in zip(*steps, strict=True)]

    def load(self, first: int, leaf: States) -> None:
        """Let the steps after `first` draw what they drew when this was their `leaf`."""
        for i, states in enumerate(zip(*leaf, strict=True)):
            self._begin[first + 1 + i] = list(states)

    def restart(self, states: States) -> None:
        """Go on from here, in a replay: steps to come draw anew."""
        self._begin = {n: begin for n, begin in self._begin.items() if n == 0}
        self._end, self._apart = states, True

    def forget(self, n: int) -> None:
        """Drop the states of the steps 1..n."""
        self._begin = {k: begin for k, begin in self._begin.items() if k == 0 or k > n}


class NoDraws:
    """The random numbers of a function that draws none: `base.RandomNumbers`."""

    def now(self) -> States:
        """None."""
        return []

    def restart(self, states: States) -> None:
        """Nothing to draw again."""

    def leaf(self, first: int, last: int) -> States:
        """None."""
        return []

    def load(self, first: int, leaf: States) -> None:
        """Nothing to draw again."""

    def forget(self, n: int) -> None:
        """Nothing is known of any step."""


NO_DRAWS = NoDraws()


def _same(one: States, other: States) -> bool:
    return all(map(torch.equal, one, other))
