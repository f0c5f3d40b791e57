"""Checkpoint schedules, in the vocabulary of the library checkpoint_schedules, and where their snapshots are kept."""

from .base import Schedule, Sizes, Stream, forward_steps
from .foreign import Foreign, adopt
from .online import Online
from .revolve import Plan, Revolve
from .snapshot_file import Snapshot
from .storage import SnapshotStore
from .store_all import StoreAll

__all__ = [
    "Foreign",
    "Online",
    "Plan",
    "Revolve",
    "Schedule",
    "Sizes",
    "Snapshot",
    "SnapshotStore",
    "StoreAll",
    "Stream",
    "adopt",
    "forward_steps",
]
