"""Worker: a script of examples/ with one list of options after the other, in one launch: starting it takes seconds.

usage: runs.py SCRIPT "OPTIONS" ...

Rank 0 prints "== run" before and "== exit STATUS" after each; the last STATUS is this program's. PETSc has the options
of the first run.
"""

import runpy
import shlex
import sys
from pathlib import Path

from mpi4py import MPI


def status(error: SystemExit) -> int:
    """As the interpreter does it: a text is printed, and means 1."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr, flush=True)
    return 1


script = sys.argv[1]
sys.path.insert(0, str(Path(script).parent))
for options in sys.argv[2:]:
    sys.argv = [script, *shlex.split(options)]
    if MPI.COMM_WORLD.Get_rank() == 0:
        print("== run", flush=True)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        code = status(error)
    codes = MPI.COMM_WORLD.allgather(code)
    if MPI.COMM_WORLD.Get_rank() == 0:
        print(f"== exit {max(codes)}", flush=True)
sys.exit(max(codes))
