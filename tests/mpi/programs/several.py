"""Worker: other workers one after the other, in one launch, since starting the ranks takes seconds each time.

usage: several.py "NAME ARGUMENT..." ...
"""

import runpy
import sys
from pathlib import Path

from mpi4py import MPI

for command in sys.argv[1:]:
    name, *arguments = command.split()
    path = Path(__file__).with_name(f"{name}.py")
    sys.argv = [str(path), *arguments]
    if MPI.COMM_WORLD.Get_rank() == 0:
        print(f"== {command}", flush=True)
    runpy.run_path(str(path), run_name="__main__")
