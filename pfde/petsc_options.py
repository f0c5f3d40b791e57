"""PETSc options of one solve: into the database for its duration, and those that the arguments decide refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .system.peers import Peers
from .system.start import PETSc

_REFUSED = (
    *("ts_type", "ts_dt", "ts_max_time", "ts_max_steps", "ts_init_time", "ts_rtol", "ts_atol", "ts_max_reject"),
    *(f"ts_adapt_{name}" for name in ("type", "dt_min", "dt_max", "safety", "reject_safety", "clip", "always_accept")),
)
_BAD_OPTION = (60, 62, 63, 86)  # PETSC_ERR_ARG_SIZ, _WRONG, _OUTOFRANGE, PETSC_ERR_UNKNOWN_TYPE


@contextmanager
def solver_options(options: Mapping[str, Any], prefix: str, peers: Peers) -> Iterator[None]:
    """Have these PETSc options in the database while a solve is set up and run; then restore what was there.

    Raises ValueError, on every rank, for an option that no object of the solve has asked for.
    """
    database = PETSc.Options()
    names = {name: prefix + name for name in options}
    before = {full: database.getString(full) for full in names.values() if database.hasName(full)}
    try:
        for name, full in names.items():
            database.setValue(full, options[name])
        try:
            yield
        except PETSc.Error as error:
            if not options or error.ierr not in _BAD_OPTION:
                raise
            reason = str(error).splitlines()[-1].partition("] ")[2]
            raise ValueError(f"options: PETSc does not take {dict(options)}: {reason}") from error
        unused = [name for name, full in names.items() if not database.used(full)]
        if unused:
            peers.agree(
                ValueError(
                    f"options: {', '.join(map(repr, unused))} does not apply to this solve (no PETSc object of it has "
                    "such an option); explicit methods have no snes_ and ksp_ options"
                )
            )
    finally:
        for full in names.values():
            database.delValue(full)
        for full, value in before.items():
            database.setValue(full, value)


def refuse_options(prefix: str) -> None:
    """Raise ValueError for TS options that the arguments of the torch door decide."""
    options = PETSc.Options(prefix)
    for name in _REFUSED:
        if options.hasName(name):
            raise ValueError(
                f"PETSc option -{prefix}{name} does not apply here: t, step_size and method, or rtol and atol, say it; "
                "if it belongs to another TS of the program, give this solve an options_prefix"
            )
