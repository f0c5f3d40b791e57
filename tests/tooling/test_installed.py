"""What `import pfde` finds in a user's script: the install, also where a folder called pfde lies beside the script.

Python takes a folder without __init__.py for a package (a namespace, without names) only if no regular package of the
name is found anywhere on sys.path. So a clone is harmless as long as the install is found on sys.path: as the wheel's
and that of an editable install by a .pth file are. One by an import hook is asked too late.
"""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python as a user runs it: nothing of pfde's on PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120)


def script(folder: Path) -> Path:
    """A user's script: says where its pfde comes from, and uses a name of it that needs no torch."""
    path = folder / "script.py"
    path.write_text("import pfde\nprint(pfde.__file__)\nprint(pfde.PfdeError.__module__)\n")
    return path


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_clone_beside_the_script_does_not_shadow_the_install(
    interpreter: Callable[[str], Path], beside_a_clone: Path, kind: str
) -> None:
    python = interpreter(kind)
    place = ROOT if kind == "editable" else python.parent.parent
    for started in ([str(script(beside_a_clone))], ["-c", script(beside_a_clone).read_text()]):
        done = run(python, *started, cwd=beside_a_clone)
        assert done.returncode == 0, done.stderr
        found, module = done.stdout.splitlines()
        assert Path(found).is_relative_to(place) and module.startswith("pfde."), done.stdout
        assert not Path(found).is_relative_to(beside_a_clone)


def test_any_other_folder_of_the_name_does_not_either(interpreter: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "pfde" / "results").mkdir(parents=True)
    (tmp_path / "pfde" / "notes.txt").write_text("runs with pfde\n")
    done = run(interpreter("wheel"), str(script(tmp_path)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_an_install_python_says_what_the_readme_explains(
    interpreter: Callable[[str], Path], beside_a_clone: Path
) -> None:
    """Nothing of pfde's runs then: the words are Python's. The README has them, with what to do."""
    readme = (ROOT / "README.md").read_text()
    for code, error, explained in (
        ("import pfde; pfde.fdeint", "module 'pfde' has no attribute 'fdeint'", "module 'pfde' has no attribute"),
        ("from pfde import fdeint", "cannot import name 'fdeint' from 'pfde' (unknown location)", "(unknown location)"),
    ):
        done = run(interpreter("none"), "-c", code, cwd=beside_a_clone)
        assert done.returncode == 1
        assert error in done.stderr
        assert explained in readme


def test_an_editable_install_is_a_path_and_no_hook(build: Callable[[str], Path]) -> None:
    """What mypy, pyright and the tests above depend on: a line of a .pth file that starts with "import" is code."""
    with zipfile.ZipFile(build("build_editable")) as wheel:
        files = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert len(files) == 1 and files[0].endswith(".pth"), files
        assert [Path(line) for line in wheel.read(files[0]).decode().split()] == [ROOT]


def test_nothing_at_the_top_makes_a_package_of_the_repository() -> None:
    """With an __init__.py there a clone called pfde would be a package, which goes before the install."""
    assert not (ROOT / "__init__.py").exists() and not (ROOT / "__init__.pyi").exists()


def test_a_wheel_has_the_package_and_nothing_else(build: Callable[[str], Path]) -> None:
    with zipfile.ZipFile(build("build_wheel")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "pfde").rglob("*.py")} | {"pfde/py.typed"}
    assert names == here


def test_the_install_of_this_environment_is_found_in_another_folder(tmp_path: Path) -> None:
    """The environment that runs the tests, as `make setup` leaves it; only PYTHONPATH may stand for an install."""
    done = subprocess.run([sys.executable, "-c", "import pfde; print(pfde.__file__)"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and Path(done.stdout.strip()).is_file(), done.stdout + done.stderr
