"""The documentation: its Python runs, its links lead somewhere, and its tables of methods are the registry's.

Blocks that open with ```python are run, one after the other in one process, each in a fresh namespace (a traceback
names page and line). A block whose first line is a comment with its command line is a program and runs as that line
says.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pfde.caputo.schemes import METHODS
from pfde.one_step.methods import METHODS as ODE_METHODS
from pfde.one_step.methods.base import OneStep
from pfde.one_step.tableaux import ADDITIVE, TABLEAUX
from support.launch import environment

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"# ((?:mpiexec -n \d+ )?python (\w+\.py).*)\n")
LIMIT = 240  # seconds for one process; all of them take about 20, on a core that is busy elsewhere a minute

# Global state of torch is not part of a namespace: it is put back between blocks.
DRIVER = """
import pathlib, sys, torch
for path in sys.argv[1:]:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    exec(compile(pathlib.Path(path).read_text(), path, "exec"), {"__name__": "__main__"})
"""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of the Python blocks of a page."""
    text = page.read_text()
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in BLOCK.finditer(text)]


PROGRAMS = [(page, line, code) for page in PAGES for line, code in blocks(page) if COMMAND.match(code)]


def run(command: list[str], folder: Path) -> None:
    """Run a command in this folder with one thread; its output is the failure's message."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        timeout=LIMIT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"


def test_what_is_promised_is_tested() -> None:
    """Every row of the tables of promises names test files that there are."""
    rows = [line for line in (ROOT / "docs" / "promises.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        cells = row.strip("|").split("|")
        if cells[-1].strip() in ("tested", ""):
            continue
        names = re.findall(r"`(\w+/test_\w+\.py)`", cells[-1])
        assert names or "---" in row, row
        assert all((ROOT / "tests" / name).exists() for name in names), row


def test_blocks_run(tmp_path: Path) -> None:
    paths = []
    for page in PAGES:
        for line, code in blocks(page):
            if not COMMAND.match(code):
                paths.append(tmp_path / f"{page.stem}_line_{line}.py")
                paths[-1].write_text(code)
    assert paths
    run([sys.executable, "-W", "error::UserWarning", "-c", DRIVER, *map(str, paths)], tmp_path)


@pytest.mark.mpi
@pytest.mark.parametrize(("page", "line", "code"), PROGRAMS, ids=[f"{name_of(p)}:{line}" for p, line, _ in PROGRAMS])
def test_programs_run_as_their_command_line_says(page: Path, line: int, code: str, tmp_path: Path) -> None:
    match = COMMAND.match(code)
    assert match is not None
    (tmp_path / match[2]).write_text(code)
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else "mpiexec"
    command = match[1].replace("mpiexec", mpiexec, 1).replace("python", sys.executable, 1)
    run(shlex.split(command), tmp_path)


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.smoke
@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target} names a file that does not exist"
        assert path.is_relative_to(ROOT), f"{page.name}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}: the headings are {sorted(anchors(path))}"


@pytest.mark.smoke
def test_files_named_in_the_architecture_exist() -> None:
    for name in re.findall(r"`(pfde/[\w/.]+)`", (ROOT / "docs" / "architecture.md").read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.smoke
def test_the_table_of_methods_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (integral|derivative) \| (explicit|implicit) \|.* \| (\d)[^|]*\|$",
                      (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)  # fmt: skip
    expected = [
        (s.name, s.form, "implicit" if s.implicit else "explicit", "2" if s.form == "integral" else "1")
        for s in METHODS.values()
    ]
    assert rows == expected


def properties(name: str) -> list[str]:
    """What the table of one-step methods says of one, but for its description."""
    scheme: OneStep = ODE_METHODS[name]
    tableau = ADDITIVE[name].implicit if name in ADDITIVE else TABLEAUX[name]
    solves = sum(1 for i, row in enumerate(tableau.A) if row[i])
    cost = f"{solves} solve{'s' if solves > 1 else ''}" if scheme.implicit else f"{scheme.evaluations} f"
    return [
        f"`{name}`",
        "split" if scheme.split else "implicit" if scheme.implicit else "explicit",
        str(scheme.order),
        "" if scheme.embedded_order is None else str(scheme.embedded_order),
        str(scheme.dense_order),
        str(tableau.stages),
        f"{cost}, {tableau.stages} f" if scheme.split else cost,
        scheme.stability,
    ]


@pytest.mark.smoke
def test_the_table_of_ode_methods_is_the_registry() -> None:
    page = (ROOT / "docs" / "odes.md").read_text()
    section = page.partition("## The methods\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    assert [[row[0], *row[2:]] for row in rows] == [properties(name) for name in ODE_METHODS]


@pytest.mark.smoke
def test_every_page_is_in_the_table_of_contents() -> None:
    configuration = (ROOT / "docs" / "conf.py").read_text()
    listed = re.findall(r'"(\w+)"', re.findall(r"^PAGES = \((.*?)\)", configuration, re.MULTILINE | re.DOTALL)[0])
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert set(listed) == pages - {"index"}
    index = (ROOT / "docs" / "index.md").read_text()
    assert all(f"]({name}.md)" in index for name in listed)
