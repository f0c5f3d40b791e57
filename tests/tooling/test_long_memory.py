"""examples/long_memory.py at a small size: what it prints, asserts and writes, and users' mistakes."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from support.launch import environment

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 240.0  # seconds; the longest takes half a minute on an idle core


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/long_memory.py", *options]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIME_LIMIT)


def test_parameters_memory_and_picture(tmp_path: Path) -> None:
    done = run("--quick", "--out", str(tmp_path))
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert " f/s]" in done.stderr, "no progress bar"
    levels = re.findall(r"^N = (\d+) .*alpha 0\.\d+  eta \d", output, re.M)
    assert levels[0] == "200" and set(levels[1:]) == {"2000"}, output
    assert len(re.findall(r"^ok: ", output, re.M)) == 3, output
    assert "FAILED" not in output
    assert re.search(r"^ +2000  backprop +needs more than .*: stopped here$", output, re.M), output
    assert (tmp_path / "long_memory.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long_memory.json", "long_memory.png"]

    document = json.loads((tmp_path / "long_memory.json").read_text())
    assert len(document["checks"]) == 3
    assert all(document["checks"].values())
    rows = {(row["steps"], row["method"]): row for row in document["gradients"]}
    assert rows[2000, "backprop"]["stopped"]
    revolve, stored = rows[2000, "revolve"], rows[2000, "store-all"]
    assert revolve["gradient"] == stored["gradient"]
    assert 0 < revolve["snapshots"] <= 20
    assert stored["snapshots"] == 0
    assert 0 < revolve["history_error"] < 1e-8
    for name, true in document["true"].items():
        # Far outside the statistical error (0.1 %), and far inside what the guess is off.
        assert abs(document["parameters"][name] - true) < 0.02 * true, name


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The exit status with which the script ends when it reads these options."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module("long_memory")

    def ends(*options: str) -> object:
        monkeypatch.setattr("sys.argv", ["long_memory.py", *options])
        with pytest.raises(SystemExit) as caught:
            script.parse_options()
        return caught.value.code

    return ends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1500"], "--steps must be a positive multiple of 1000: got 1500"),
        (["--snapshots", "0"], "--snapshots must be 1 or more: got 0"),
        (["--step", "1000"], "unrecognized arguments: --step 1000"),
    ],
)
def test_mistakes_are_told(
    options: list[str], message: str, parse: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(*options) == 2
    assert message in capsys.readouterr().err


def test_help_explains(parse: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--help") == 0
    printed = capsys.readouterr().out
    assert "four standard errors" in printed
    assert "--steps" in printed
