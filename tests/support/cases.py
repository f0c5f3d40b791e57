"""What property-based tests draw histories, schedules and stores from, and how many examples they take."""

import os

from hypothesis import HealthCheck, settings

import pfde

MANY = int(os.environ.get("PFDE_PROPERTY_EXAMPLES", "0"))
SCHEDULES = {
    "store all": lambda: None,
    "revolve": lambda: pfde.Revolve(2),
    "revolve, leaves": lambda: pfde.Revolve(2, leaf=2),
    "revolve, every step": lambda: pfde.Revolve(1, leaf=1),
    "revolve, disk": lambda: pfde.Revolve(1, on_disk=1, leaf=2),
    "memory": lambda: pfde.Revolve(memory="1MB"),
    "online": lambda: pfde.Online(2, leaf=2),
}
HISTORIES = {
    "chosen": lambda: None,
    "exact": pfde.Exact,
    "exponentials": lambda: pfde.SumOfExponentials(1e-6),
    "short": lambda: pfde.ShortMemory(0.5),
}
STORES = ["state", "stages", "graph"]


def bounded(examples):
    """These examples, or as many as the environment asks for."""
    return settings(
        max_examples=MANY or examples,
        deadline=None,
        derandomize=not MANY,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
