"""The source distribution: all that git tracks, so that its tests run from it, and nothing that lies beside it."""

import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names(build: Callable[[str], Path]) -> set[str]:
    """The files of the sdist, without the folder that they lie in."""
    with tarfile.open(build("build_sdist")) as archive:
        return {member.name.partition("/")[2] for member in archive if not member.isdir()}


def test_what_the_tests_need_is_there(names: set[str]) -> None:
    for folder, pattern in (
        ("pfde", "*.py"),
        ("tests", "*.py"),
        ("examples", "*.*"),
        ("benchmarks", "*.*"),
        ("docs", "*.md"),
        ("tools", "*.sh"),
    ):
        here = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if path.is_file()}
        missing = {name for name in here if "__pycache__" not in name and "_build" not in name} - names
        assert here and not missing, missing
    top = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "pyproject.toml"}
    assert top <= names, top - names


def test_it_is_what_git_tracks(names: set[str]) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not in a git checkout: nothing to compare with")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout.split(
        "\n"
    )
    tracked = {name for name in listed if name and (ROOT / name).is_file() and not name.startswith("shared/")}
    assert names - {"PKG-INFO"} == tracked, f"more: {names - tracked}; missing: {tracked - names}"


def test_nothing_of_this_machine_is_in_it(names: set[str]) -> None:
    outside = ("shared", ".venv", ".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "build", "dist")
    assert not {name for name in names if name.split("/")[0] in outside}
    assert not {name for name in names if "__pycache__" in name or name.startswith("docs/_build")}
