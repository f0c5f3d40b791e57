"""What is said of the project in several places is said alike: versions, addresses, Pythons, commands."""

import re
import tomllib
from pathlib import Path

import pytest

import pfde

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def recipe(target: str) -> list[str]:
    """The command lines of a target of the Makefile."""
    lines = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
    return [line.removeprefix("\t") for line in lines.splitlines()]


def test_the_version_is_one() -> None:
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == [PROJECT["version"]] == [pfde.__version__]
    if ".dev" not in pfde.__version__:  # of a release the changelog speaks, or it is the first, and still to come
        sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert sections[0] == "Unreleased"
        assert sections[1:] == [] or sections[1].startswith(pfde.__version__)


def test_the_addresses_are_those_of_one_repository() -> None:
    (source,) = re.findall(r'^repository-code: "(.*)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    urls = PROJECT["urls"]
    assert set(urls) == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert urls["Source"] == source
    for url in urls.values():
        assert url.startswith(source)
        _, blob, file = url.partition("/blob/main/")
        assert not blob or (ROOT / file).is_file(), url


def test_every_declared_python_is_tested() -> None:
    declared = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", c)]
    matrix = re.findall(r'"([\d.]+)"', re.findall(r"python: \[(.*)\]", WORKFLOW)[0])
    assert matrix == declared
    assert PROJECT["requires-python"] == f">={declared[0]}"


def test_the_workflow_calls_what_ci_runs() -> None:
    commands = re.findall(r"^ *- run: (.*)$", WORKFLOW, re.MULTILINE)
    here = re.findall(r'^ *timed "(.*?)"', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert commands == here


def test_pre_commit_does_what_make_lint_does() -> None:
    hooks = re.findall(r"^ *entry: \.venv/bin/(.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    # a commit formats where `make lint` checks, and names its files where it takes all
    lint = [re.sub(r" (--check|\.)(?= |$)", "", line.removeprefix("$(BIN)/")) for line in recipe("lint")]
    assert [hook.replace(" --force-exclude", "") for hook in hooks] == lint


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_the_files_of_the_code_host_are_yaml(path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="no parser of YAML is installed")
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    for field in content.get("body", []):
        assert field["type"] == "textarea" and field["attributes"]["label"]
    assert len({field["id"] for field in content.get("body", [])}) == len(content.get("body", []))
