"""torch.autocast around f, and around nothing else of a solve.

Under autocast f computes in a lower precision; the sums of a solve must not. So a solve suspends it, and every call of
f has it back, in the backward pass as in the forward pass. Its cache of converted weights stays off: filled where
gradients are disabled, it would hand converted weights without a graph to whoever asks next.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Autocast:
    """The state of torch.autocast for one kind of device."""

    kind: str
    enabled: bool
    dtype: torch.dtype | None = None

    def active(self) -> AbstractContextManager[None]:
        """f is called."""
        if not self.enabled:
            return _NOTHING
        return torch.autocast(self.kind, self.dtype, cache_enabled=False)

    def suspended(self) -> AbstractContextManager[None]:
        """The rest of the solve."""
        return torch.autocast(self.kind, enabled=False) if self.enabled else _NOTHING


_NOTHING = nullcontext()
NO_AUTOCAST = Autocast("cpu", False)


def autocast_now(device: torch.device) -> Autocast:
    """What holds where this is called, for tensors on this device."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return Autocast(kind, False)
    return Autocast(kind, True, torch.get_autocast_dtype(kind))
