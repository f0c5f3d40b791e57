"""Measure or profile one case, in a process of its own: `python benchmarks/job.py JOB` (JSON) prints a JSON object."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from cases import MB, Case
from measure import limit_memory, measure
from phases import profile


def main() -> None:
    """Entry point of the subprocess."""
    job = json.loads(sys.argv[1])
    case = Case(**job["case"])
    torch.set_num_threads(1)
    try:
        limit_memory(job["memory_limit"])
        if job["profile"]:
            result = profile(case, job["repeats"])
        else:
            target = job["gradient_to"]
            result = measure(case, job["repeats"], job["budget"], Path(target) if target else None)
    except ModuleNotFoundError as error:
        if case.library != "torchfde" or error.name != "torchfde":
            raise
        result = {"skipped": "torchfde is not importable: put it on PYTHONPATH, or pass --torchfde PATH"}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("allocate memory|bad_alloc", str(error)):
            raise
        result = {"skipped": f"needs more than the limit of {job['memory_limit'] / MB:.0f} MB"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
