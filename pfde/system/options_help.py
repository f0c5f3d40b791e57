"""What -help says of pfde's own options, in the form of PETSc's own help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .start import PETSc

_shown: set[tuple[str, str]] = set()  # PETSc too says it once for each class and prefix


class Entry(NamedTuple):
    """One option.

    Attributes
    ----------
    name : without dash and prefix
    now, before : its value, and the one that it has without the option
    text : what it says, and what is allowed
    manual : where the manual has it
    """

    name: str
    now: object
    before: object
    text: str
    manual: str


def show_help(title: str, prefix: str, entries: Sequence[Entry], comm: PETSc.Comm) -> None:
    """Print the options, once, when the program was started with -help. Collective."""
    if not PETSc.Options().hasName("help") or (title, prefix) in _shown:
        return
    _shown.add((title, prefix))
    lines = [
        f"  -{prefix}{e.name}: <now {_value(e.now)} : formerly {_value(e.before)}>: {e.text} ({e.manual})"
        for e in entries
    ]
    PETSc.Sys.Print("\n".join([f"{title}:", *lines]), comm=comm)


def _value(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
