"""The rooms of pfde and who imports whom, from the imports themselves: `python tools/house.py` draws docs/rooms.svg.

A room is a folder of pfde/, or a file at its top. It stands one floor above the highest room that it imports. The
picture leaves out an arrow where a longer way leads to the same room.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "pfde"
PICTURE = ROOT / "docs" / "rooms.svg"
FILES = sorted(HOUSE.rglob("*.py"))
WHAT = {  # what a room is, in a few words; a room without is drawn without
    "errors": "what can go wrong",
    "registry": "names, and what they stand for",
    "schedules": "what is kept, what is taken again",
    "system": "f, its products, its stages",
    "solving": "request, problem, driver, autograd",
    "caputo": "a history: schemes, histories",
    "one_step": "no history: tableaux, methods",
    "petsc": "FractionalTS, PETSc's integrators",
    "api": "fdeint, odeint, solve",
    "nn": "blocks",
    "testing": "the gradient battery",
    "extend": "base classes for users",
    "ts": "the PETSc API",
    "__main__": "python -m pfde",
}


class Import(NamedTuple):
    """Within pfde the module, or None; the top-level name of an outside package; the line."""

    inside: str | None
    outside: str
    line: int


def module_of(path: Path) -> str:
    """ "caputo.adjoint" for pfde/caputo/adjoint.py; "caputo.schemes" for its __init__.py."""
    parts = list(path.relative_to(HOUSE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The room of a module."""
    return module.split(".")[0]


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import in the file, wherever it stands."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                inside = alias.name[5:] if alias.name.startswith("pfde.") else None
                found.append(Import(inside, alias.name.split(".")[0], node.lineno))
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            if base[0] != "pfde":
                found.append(Import(None, base[0], node.lineno))
                continue
            inside = ".".join(base[1:])
            for alias in node.names:
                full = f"{inside}.{alias.name}".strip(".")
                place = HOUSE / Path(*full.split("."))
                is_module = place.with_suffix(".py").exists() or place.is_dir()
                found.append(Import(full if is_module else inside, "pfde", node.lineno))
    return tuple(found)


@cache
def rooms() -> dict[str, frozenset[str]]:
    """Each room with the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        if (module := module_of(path)) == "":
            continue  # pfde/__init__.py resolves its names at first use
        below = found.setdefault(room(module), set())
        below |= {room(inside) for inside, _, _ in imports_of(path) if inside} - {room(module)}
    return {name: frozenset(below) for name, below in found.items()}


@cache
def floor(name: str) -> int:
    """One above the highest room that it imports. RecursionError where there is a circle."""
    return 1 + max((floor(below) for below in rooms()[name]), default=-1)


def arrows() -> Iterator[tuple[str, str]]:
    """The imports between rooms, without those that a longer way implies."""

    def reaches(start: str, end: str) -> bool:
        return start == end or any(reaches(below, end) for below in rooms()[start])

    for name, below in rooms().items():
        for target in sorted(below):
            if not any(other != target and reaches(other, target) for other in below):
                yield name, target


def picture() -> str:
    """The rooms as SVG, the highest floor on top."""
    wide, tall, gap, step = 200, 44, 24, 84
    floors: dict[int, list[str]] = {}
    for name in sorted(rooms()):
        floors.setdefault(floor(name), []).append(name)
    top, most = max(floors), max(map(len, floors.values()))
    width, height = most * (wide + gap) + gap, (top + 1) * step + gap
    place = {}
    for level, names in floors.items():
        left = (width - len(names) * (wide + gap) + gap) / 2
        for i, name in enumerate(names):
            place[name] = left + i * (wide + gap), gap + (top - level) * step
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for name, target in arrows():
        (x0, y0), (x1, y1) = place[name], place[target]
        lines.append(
            f'<line x1="{x0 + wide / 2:g}" y1="{y0 + tall:g}" x2="{x1 + wide / 2:g}" y2="{y1:g}" stroke="#888"/>'
        )
    for name, (x, y) in place.items():
        files = sum(room(module_of(path)) == name for path in FILES)
        title = name if files == 1 else f"{name}/  ({files} files)"
        lines += [
            f'<rect x="{x:g}" y="{y:g}" width="{wide}" height="{tall}" rx="4" fill="#eef3f8" stroke="#456"/>',
            f'<text x="{x + wide / 2:g}" y="{y + 18:g}" text-anchor="middle" font-size="13">{title}</text>',
            f'<text x="{x + wide / 2:g}" y="{y + 34:g}" text-anchor="middle" font-size="10" fill="#456">'
            f"{WHAT.get(name, '')}</text>",
        ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Write the picture; with --check only say whether it is the present one."""
    if "--check" in sys.argv[1:]:
        if not PICTURE.exists() or PICTURE.read_text() != picture():
            sys.exit(f"{PICTURE.name} is not that of the imports: run python tools/house.py")
        return
    PICTURE.write_text(picture())
    print(f"{PICTURE.relative_to(ROOT)}: {len(rooms())} rooms on {1 + max(map(floor, rooms()))} floors")


if __name__ == "__main__":
    main()
