"""Found by Python at its start where this folder is on PYTHONPATH: torch's compiler is not imported.

torch imports it, in two seconds, at an optimizer's first step and in forward mode, to say that a function is not to be
compiled. What the tests start compiles nothing: two functions stand for the compiler, and an attempt to compile raises.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


class Uncompiled(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch._dynamo before it is looked for elsewhere, and none of its modules."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.startswith("torch._dynamo."):
            raise ImportError(f"{__file__} keeps {name} out: to compile, run without that folder on PYTHONPATH")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name == "torch._dynamo" else None

    def exec_module(self, module: ModuleType) -> None:
        module.disable = lambda function, recursive=True, *, reason=None, wrapping=True: function
        module.graph_break = lambda msg="": None


sys.meta_path.insert(0, Uncompiled())
