"""Run a script on several ranks with a hard limit: a hang is a failure, and leaves no process behind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_IN_VENV = Path(sys.executable).parent / "mpiexec"
MPIEXEC = str(_IN_VENV) if _IN_VENV.exists() else shutil.which("mpiexec")

ROOT = Path(__file__).resolve().parents[2]

needs_mpiexec = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec beside this Python or on PATH")


def environment(**more: str) -> dict[str, str]:
    """Of what tests start: this process's, one thread, this pfde."""
    return (
        os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        # MPICH waits busily: with more ranks than cores those that wait are to let the others go on
        | {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}
        | more
    )


def start(ranks: int, script: Path, *arguments: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
    """`mpiexec -n ranks python script arguments`, in a process group of its own, its output unbuffered."""
    if MPIEXEC is None:
        pytest.skip("no mpiexec beside this Python or on PATH")
    return subprocess.Popen(
        [MPIEXEC, "-n", str(ranks), sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # to be signalled as a terminal does, and killed as a whole
    )


def finish(process: subprocess.Popen[str], limit: float) -> tuple[int, str]:
    """The exit status and output; fails, and kills the whole group, when it has not ended within `limit` seconds."""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(map(str, process.args))}: no end after {limit:.0f} s\n{output}")
    return process.returncode, output


def launch(ranks: int, script: Path, *arguments: str, limit: float = 120.0) -> str:
    """The output of a script on some ranks, which must succeed within `limit` seconds."""
    code, output = finish(start(ranks, script, *arguments), limit)
    assert code == 0, f"{script.name} {' '.join(arguments)} on {ranks} ranks:\n{output}"
    return output
