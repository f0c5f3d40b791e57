"""Checkpoint schedules, in the vocabulary of the library checkpoint_schedules."""

from .base import Schedule
from .store_all import StoreAll

__all__ = ["Schedule", "StoreAll"]
