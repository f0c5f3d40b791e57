"""What the tests of the packaging share: interpreters with pfde installed, each in its own way, and users' folders.

An install is what pip makes of the wheel that the build backend gives: its files in the site-packages of a virtual
environment, beside those that this interpreter has. No registry is asked.
"""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a hook of the build backend (build_wheel, build_editable, build_sdist) makes of this repository."""
    pytest.importorskip("hatchling", reason="the build backend, of the extra 'test', is not installed")

    def made(hook: str) -> Path:
        folder = tmp_path_factory.mktemp(hook)
        code = f"import sys, hatchling.build; hatchling.build.{hook}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, timeout=120)
        (result,) = folder.iterdir()
        return result

    return made


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory, build: Callable[[str], Path]) -> Callable[[str], Path]:
    """The Python of a fresh environment with pfde: "wheel", "editable" (of this repository) or "none"."""
    made: dict[str, Path] = {}

    def python(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            venv.EnvBuilder(symlinks=True).create(folder)
            packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
            if kind != "none":
                with zipfile.ZipFile(build(f"build_{kind}")) as wheel:
                    wheel.extractall(packages)
                # After what pip installs. The .pth files there are not read: an editable pfde among them is not seen.
                (packages / "zz_outside.pth").write_text("\n".join(path for path in sys.path if "-packages" in path))
            made[kind] = folder / "bin" / "python"
        return made[kind]

    return python


@pytest.fixture
def beside_a_clone(tmp_path: Path) -> Path:
    """A user's folder, in which a clone of this repository, under the name pfde, lies beside the user's files."""
    clone = tmp_path / "pfde"
    for name in ("pfde", "tests", "docs"):
        (clone / name).mkdir(parents=True)
    (clone / "README.md").write_text("# pfde\n")
    (clone / "pfde" / "__init__.py").write_text('"""The clone\'s: not what is installed."""\n')
    return tmp_path
