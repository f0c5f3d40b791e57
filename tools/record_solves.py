"""Record some hundred solves bit for bit, and compare them with what the package does now.

    python tools/record_solves.py record FILE.json      write what every case gives
    python tools/record_solves.py compare FILE.json     do the same again; print every difference, exit 1 for one
    ... --only TEXT                                     the cases whose names contain it

It is for a restructuring that is to change nothing. A case records hashes of its values and of every gradient, all of
`Solution.stats`, the warnings, the state of torch's random generator afterwards, and, where it is meant to raise,
the error. The cases (`solve_cases`, `solve_mistakes`) use the public interface only, so that the inside of the package
may be moved and renamed. Bits hold for one machine and one build of torch and PETSc: record and compare on the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from petsc4py import PETSc
from solve_cases import door, fractional, long_memory, modules, ordinary, ordinary_doors
from solve_mistakes import mistakes
from solve_runs import Record, digest

MISSING = "(nothing)"


def plain(value: Any, folder: str) -> Any:
    """As JSON has it, without what differs from process to process: addresses and the folder of snapshots."""
    if isinstance(value, dict):
        return {str(key): plain(entry, folder) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, folder) for entry in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"0x[0-9a-f]+", "0x...", value.replace(folder, "FOLDER"))
    return re.sub(r"pfde-[\w.-]+-\d+-[\w*]+", "pfde-...", value)


def first_cause(error: BaseException) -> BaseException:
    """What was raised in a callback of PETSc, which hands on an error code."""
    while isinstance(error, PETSc.Error) and error.__cause__ is not None:
        error = error.__cause__
    return error


def run(case: Callable[[], Any], folder: str) -> Record:
    """What a case gives; it starts with torch's generator at a seed."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = case()
        except Exception as error:
            cause = first_cause(error)
            found = {"error": f"{type(cause).__name__}: {cause}"}
    if not isinstance(found, dict):
        found = {"returned": repr(found)}
    if mine := sorted(str(w.message) for w in caught if w.category is UserWarning):  # torch announces deprecations
        found["warnings"] = mine
    return json.loads(json.dumps(plain(found | {"random": digest(torch.get_rng_state())}, folder)))


def run_all(only: str) -> dict[str, Record]:
    """All cases by name. Raises RuntimeError where snapshots are left on disk."""
    cases = chain(fractional(), long_memory(), door(), ordinary(), ordinary_doors(), modules(), mistakes())
    found: dict[str, Record] = {}
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        for name, case in cases:
            if name in found:
                raise RuntimeError(f"two cases have the name {name!r}")
            if only in name:
                found[name] = run(case, folder)
        tempfile.tempdir = None
        gc.collect()  # an error that was caught may hold a solve in a cycle
        left = [name for name in os.listdir(folder) if name.startswith("pfde-")]
    if left:
        raise RuntimeError(f"snapshots were left on disk: {left}")
    return found


def unexpected(found: dict[str, Record]) -> list[str]:
    """The cases that raise and are not meant to, or are and do not."""
    return [
        f"{name}: {record.get('error', 'raises nothing')}"
        for name, record in found.items()
        if ("error" in record) != name.startswith("wrong ")
    ]


def differences(before: Any, now: Any, where: str) -> list[str]:
    """One line for each entry that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        pairs = ((before.get(key, MISSING), now.get(key, MISSING), f"{where} | {key}") for key in keys)
        return [line for pair in pairs for line in differences(*pair)]
    return [] if before == now else [f"{where}\n    before {before}\n    now    {now}"]


def main() -> int:
    """Parse the command line and run it; return the exit code."""
    parser = argparse.ArgumentParser(description="Record solves bit for bit, and compare with the record.")
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose names contain it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started, used = time.perf_counter(), time.process_time()
    made_with = {"machine": platform.machine(), "torch": torch.__version__, "PETSc": list(PETSc.Sys.getVersion())}
    found = run_all(given.only)
    lines = [f"not as meant: {line}" for line in unexpected(found)]
    if given.command == "record":
        given.file.write_text(json.dumps({"made with": made_with, "cases": found}, indent=1) + "\n")
    else:
        recorded = json.loads(given.file.read_text())
        lines += differences(recorded["made with"], made_with, "made with")
        before = {name: record for name, record in recorded["cases"].items() if given.only in name}
        for name in dict.fromkeys([*before, *found]):
            lines += differences(before.get(name, MISSING), found.get(name, MISSING), name)
    print(*lines, sep="\n", end="\n" if lines else "")
    seconds = f"{time.perf_counter() - started:.0f} s, {time.process_time() - used:.0f} s of them computing"
    print(f"{len(found)} cases, {len(lines)} differences or faults: {seconds}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
