"""What mypy and pyright say of a user's file: they find pfde where it is installed, and see its mistakes.

The file lies in a folder of the user's beside a clone, pfde is installed editable: both checkers must look through the
clone and follow the install. Each runs once over the whole file. To say more of pfde's types, add a line to USES.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKERS = ("mypy", "pyright")


class Use(NamedTuple):
    """A line of a user's file.

    code : after START
    error : a pattern that both checkers' error must match; None where the line is right
    shown : the type in both checkers' words, for a line `reveal_type(...)`
    later : why error or shown is not so yet; the test fails as soon as it is, so that this is taken away
    """

    code: str
    error: str | None = None
    shown: str | None = None
    later: str | None = None


START = """\
from typing import reveal_type

import torch

import pfde
import pfde.nn

y0 = torch.ones(2)
t = torch.linspace(0.0, 1.0, 3)


def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


"""
USES = (
    # right
    Use('pfde.odeint(f, y0, t, method="rk4")'),
    Use('pfde.fdeint(f, y0, t, 0.5, method="l1", step_size=0.1)'),
    Use('pfde.solve(f, y0, t, 0.5, method="euler", gradient=pfde.Discrete(schedule=pfde.Revolve(5))).stats'),
    Use("pfde.nn.FDEBlock(torch.nn.Linear(2, 2), alpha=0.7)"),
    Use("pfde.ts.FractionalTS"),
    Use('pfde.odeint(f, y0, t, method="petsc:rk:5dp")'),
    Use('pfde.odeint(f, y0, t, method=pfde.extend.petsc_method("petsc:theta:0.6"))'),
    Use("pfde.fdeint(f, y0, t, 0.5, method=pfde.extend.Scheme)", error="Scheme"),
    # names
    Use("pfde.odeintt", error="odeintt"),
    Use("pfde.nn.FDEBlokk", error="FDEBlokk"),
    Use("pfde.Revolv(5)", error="Revolv"),
    # arguments
    Use('pfde.odeint(f, y0, t, metod="rk4")', error="metod"),
    Use("pfde.odeint(f, y0)", error='(?i)missing.*"t"'),
    Use('pfde.odeint(f, y0, t, method="rk5")', error="rk5"),
    Use('pfde.fdeint(f, y0, t, 0.5, method="rk4")', error="rk4"),
    # what comes back
    Use('reveal_type(pfde.odeint(f, y0, t, method="rk4"))', shown="Tensor"),
    Use("reveal_type(pfde.fdeint(f, y0, t, 0.5))", shown="Tensor"),
    Use("reveal_type(pfde.odeint(f, (y0, y0), t))", shown="tuple[Tensor, ...]"),
    Use("reveal_type(pfde.solve(f, y0, t).y)", shown="Tensor"),
    Use("reveal_type(pfde.__version__)", shown="str"),
)

Said = dict[int, list[tuple[str, str]]]  # by line: (severity, message)


def mypy(python: Path, file: Path) -> Said:
    """With the configuration of `make lint`, and its cache: only so is torch not analysed once more (half a minute)."""
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    output = run([sys.executable, "-m", "mypy", *options, "--python-executable", str(python), file.name], file.parent)
    said: Said = {}
    for line, severity, message in re.findall(rf"^{file.name}:(\d+): (\w+): (.*)$", output, re.MULTILINE):
        said.setdefault(int(line), []).append((severity, message))
    assert said, output
    return said


def pyright(python: Path, file: Path) -> Said:
    """With pyright's own defaults."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(python), file.name]
    output = run(command, file.parent)
    said: Said = {}
    for found in json.loads(output[output.index("{") :])["generalDiagnostics"]:
        line = found["range"]["start"]["line"] + 1
        said.setdefault(line, []).append((found["severity"], found["message"]))
    assert said, output
    return said


def run(command: list[str], folder: Path) -> str:
    """The output of a checker, which finds errors and so ends with 1; only the interpreter leads it to pfde."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    environment["PYRIGHT_PYTHON_IGNORE_WARNINGS"] = "1"  # that there is a newer one
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def differs(use: Use, here: list[tuple[str, str]]) -> str | None:
    """What is not as it should be with a line, of which a checker has said this; None if all is."""
    errors = [message for severity, message in here if severity == "error"]
    if use.error is None and errors:
        return "is right, but called an error"
    if use.error is not None and not any(re.search(use.error, message) for message in errors):
        return f"has no error {use.error!r}"
    if use.shown is not None:
        types = [re.search(r'(?:Revealed type is|Type of ".*" is) "(.*)"$', message) for _, message in here]
        # "builtins.str" and "torch._tensor.Tensor" in mypy's words
        if [re.sub(r"(?:\w+\.)+(?=\w)", "", match[1]) for match in types if match] != [use.shown]:
            return f"is not shown as {use.shown}"
    return None


@pytest.mark.parametrize("checker", CHECKERS)
def test_what_a_checker_says_of_a_users_file(checker: str, interpreter: Callable[[str], Path], tmp_path: Path) -> None:
    """One test for all lines: with one for each, every process of pytest-xdist would run the checkers."""
    if find_spec(checker) is None:
        pytest.skip(f"{checker}, of the extra 'lint', is not installed")
    (tmp_path / "pfde" / "pfde").mkdir(parents=True)
    (tmp_path / "pfde" / "pfde" / "__init__.py").write_text("")  # a clone, in which there is none of the names
    file = tmp_path / "user.py"
    file.write_text(START + "\n".join(use.code for use in USES) + "\n")
    said = {"mypy": mypy, "pyright": pyright}[checker](interpreter("editable"), file)

    first = START.count("\n") + 1
    wrong = [f"line {n}, outside USES: {what}" for n, what in said.items() if n < first]  # torch or pfde not found
    for n, use in enumerate(USES, first):
        trouble = differs(use, said.get(n, []))
        if use.later is not None and trouble is None:
            wrong.append(f"{use.code}\n    is as it should be: take its later= ({use.later}) away")
        elif use.later is None and trouble is not None:
            wrong.append(f"{use.code}\n    {trouble}; {checker} says {said.get(n, 'nothing')}")
    assert not wrong, "\n".join(["", *wrong])
