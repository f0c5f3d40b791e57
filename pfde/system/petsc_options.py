"""PETSc options of one solve: in the database for its duration, and those that the arguments decide refused.

PETSc's database is one for the process, and its objects read it by their prefix, some of them as late as in a solve. So
the objects of a solve that has options of its own get a prefix of their own, under which the database has those and
what it had for the prefix that the user named: no other solve, in another thread or inside func, sees them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .interrupts import as_raised
from .peers import Peers
from .prefixes import PRIVATE, private_prefix, shown
from .start import PETSc

_REFUSED = (
    *("ts_type", "ts_dt", "ts_time_step", "ts_max_time", "ts_final_time", "ts_max_steps", "ts_run_steps"),
    *("ts_init_time", "ts_time_span", "ts_eval_times", "ts_rtol", "ts_atol", "ts_max_reject"),
    *("ts_max_step_rejections", "ts_adjoint_solve", "ts_convergence_estimate", "ts_fd_color"),
    *(f"ts_adapt_{name}" for name in ("type", "dt_min", "dt_max", "safety", "reject_safety", "clip", "always_accept")),
)
_BAD_OPTION = (60, 62, 63, 86)  # PETSC_ERR_ARG_SIZ, _WRONG, _OUTOFRANGE, PETSC_ERR_UNKNOWN_TYPE
_SHARED = "ts_trajectory_"  # PETSc reads these without a prefix

# Held, for a moment and without calling anything of the user's, by who puts an option under a prefix that others read
# too, and by who reads such a prefix as a whole. Re-entrant, since a signal's handler may solve as well.
database_in_use = threading.RLock()


class Entries:
    """Options in the database, until `remove`; then what was there.

    Ctrl-C may interrupt `remove`, too: what it has not done is done when this is dropped.
    """

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        self._before: dict[str, tuple[bool, str | None]] = {}
        self._database = PETSc.Options()
        everything = self._database.getAll()
        self._before = {name: (name in everything, everything.get(name)) for name in wanted}
        for name, value in wanted.items():
            self._database.setValue(name, value)

    def remove(self) -> None:
        """Put back what was there."""
        while self._before:
            name, (was, value) = next(iter(self._before.items()))
            if was:
                self._database.setValue(name, value)
            else:
                self._database.delValue(name)
            self._before.pop(name, None)

    def __del__(self) -> None:
        if hasattr(self, "_before"):  # not where Ctrl-C came before
            self.remove()


@contextmanager
def solver_options(options: Mapping[str, Any], prefix: str, peers: Peers, *, private: bool = False) -> Iterator[str]:
    """Have these PETSc options in the database while a solve is set up and run; gives the prefix of its objects.

    private : whether that is to be one of its own even where there are no options

    Raises ValueError, on every rank, for an option that no object of the solve has asked for. What a callback raised,
    and PETSc has made an error of its own of, comes out as it was raised.
    """
    if not options and not private:
        with as_raised():
            yield prefix
        return
    database, own = PETSc.Options(), private_prefix(prefix)
    names = {name: name if name.startswith(_SHARED) else own + name for name in options}
    with database_in_use:
        everything = database.getAll()
        users = {
            own + full[len(prefix) :]: full
            for full in everything
            if full.startswith(prefix) and not PRIVATE.search(full)
        }
        wanted = {copy: everything[full] for copy, full in users.items()}
        entries = Entries(wanted | {full: options[name] for name, full in names.items()})
    try:
        try:
            with as_raised():
                yield own
        except PETSc.Error as error:
            if not options or error.ierr not in _BAD_OPTION:
                raise
            reason = shown(str(error).splitlines()[-1].partition("] ")[2])
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
        for copy, full in users.items():
            if database.used(copy):
                database.hasName(full)  # counts as its use, for -options_left
        entries.remove()


def refuse_options(prefix: str, *, adaptive: bool) -> None:
    """Raise ValueError for TS options that the arguments of the torch API decide.

    adaptive : whether the solve chooses its step sizes; else -ts_adapt_type none is what it does
    """
    options = PETSc.Options(prefix)
    for name in _REFUSED:
        if options.hasName(name) and not (name == "ts_adapt_type" and permits_adapt_type(prefix, adaptive=adaptive)):
            raise ValueError(
                f"PETSc option -{shown(prefix)}{name} does not apply here: t, step_size and method, or rtol and atol, "
                "say it; if it belongs to another TS of the program, give this solve an options_prefix"
            )


def permits_adapt_type(prefix: str, *, adaptive: bool) -> bool:
    """Whether -ts_adapt_type is `none` and the steps are fixed. Raises ValueError for `none` with adaptive ones."""
    none = bool(PETSc.Options(prefix).getString("ts_adapt_type", "") == "none")
    if none and adaptive:
        raise ValueError(
            f"PETSc option -{shown(prefix)}ts_adapt_type none asks for fixed steps, and this solve adapts them: pass "
            "step_size, or give this solve an options_prefix if the option belongs to another TS of the program"
        )
    return none
