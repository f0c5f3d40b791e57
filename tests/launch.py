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

needs_mpiexec = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec beside this Python or on PATH")


def launch(ranks: int, script: Path, *arguments: str, limit: float = 120.0) -> str:
    """The output of `mpiexec -n ranks python script arguments`.

    Fails when it exits non-zero or not within `limit` seconds.
    """
    if MPIEXEC is None:
        pytest.skip("no mpiexec beside this Python or on PATH")
    process = subprocess.Popen(
        [MPIEXEC, "-n", str(ranks), sys.executable, str(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, to be killed as a whole
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{script.name} {' '.join(arguments)} on {ranks} ranks: no end after {limit:.0f} s\n{output}")
    assert process.returncode == 0, f"{script.name} {' '.join(arguments)} on {ranks} ranks:\n{output}"
    return output
