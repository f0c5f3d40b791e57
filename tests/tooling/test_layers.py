"""The house as the design draws it: imports point down, PETSc stays in its places, importing pfde starts nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "pfde"
FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))

# From the ground up; a part may import parts of lower numbers. Parts of one number do not know each other.
FLOOR = {
    "errors": -1,
    "opaque": -1,
    "special": 0,
    "intervals": 0.5,
    "grids": 0,
    "schedules": 0,
    "history": 0,
    "system": 0,
    "gradients": 1,
    "schemes": 1,
    "sweeps": 2,
    "choice": 2.5,
    "petsc_options": 0.5,
    "driver": 2.8,
    "ts": 3,
    "native_setting": 3,
    "native_function": 3.05,
    "native_callbacks": 3.1,
    "native_solvers": 3.15,
    "native": 3.2,
    "initial_value": 3.5,
    "repeats": 3.6,
    "problem": 4,
    "ordinary_problem": 4.5,
    "autograd": 5,
    "arguments": 5,
    "ordinary_arguments": 5.2,
    "events": 5.5,
    "continuous": 5.5,
    "ordinary": 5.8,
    "solving": 6,
    "nn": 7,
    "testing": 7,
    "__main__": 8,
}
# Narrower than the floors: what a scheme may know of the system, and what the foundations may know at all.
ONLY = {"schemes": {"system.base", "special"}, "gradients": {"schedules"}}
# Folders whose files are alternatives to each other: each sees what all share, its base first, and none its neighbours.
FAMILIES = {
    "schemes": [
        *("base", "rooted_trees", "coefficients", "tableau", "explicit_tableaux", "implicit_tableaux", "tableaux"),
        *("sums_of_slopes", "one_step", "stage_guess", "runge_kutta", "diagonally_implicit"),
    ],
    "history": ["base", "skeleton", "nodes", "bounded"],
    "schedules": ["base", "snapshot_file", "storage", "store_all"],
}


def module_of(path):
    """ "sweeps.adjoint" for pfde/sweeps/adjoint.py; "schemes" for its __init__.py."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """(module within pfde or None, top-level name of an outside package, line) of every import in the file."""
    package = path.relative_to(ROOT.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                inside = alias.name.startswith("pfde.")
                yield (alias.name[5:] if inside else None), alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            else:
                base = (node.module or "").split(".")
            base = [part for part in base if part]
            if base[0] != "pfde":
                yield None, base[0], node.lineno
                continue
            inside = ".".join(base[1:])
            for alias in node.names:
                full = f"{inside}.{alias.name}" if inside else alias.name
                is_module = (ROOT / Path(*full.split("."))).with_suffix(".py").exists() or (
                    ROOT / Path(*full.split("."))
                ).is_dir()
                yield (full if is_module else inside), "pfde", node.lineno


def part(module):
    return module.split(".")[0]


def test_every_part_has_its_floor():
    parts = {part(module_of(path)) for path in FILES} - {""}
    assert parts == set(FLOOR)


@pytest.mark.smoke
@every_file
def test_imports_point_down(path):
    module = module_of(path)
    if not module:
        return  # pfde/__init__.py resolves its names lazily
    for target, _, line in imports_of(path):
        if target is None or part(target) == part(module):
            continue
        where = f"{path.name}:{line} imports {target}"
        assert FLOOR[part(target)] < FLOOR[part(module)], where
        if part(module) in ONLY:
            allowed = ONLY[part(module)]
            assert any(target == a or target.startswith(a + ".") for a in allowed), where


@every_file
def test_the_members_of_a_family_see_only_their_base(path):
    module = module_of(path)
    if part(module) not in FAMILIES or "." not in module:
        return
    family = part(module)
    shared = [f"{family}.{name}" for name in FAMILIES[family]]
    below = shared[: shared.index(module)] if module in shared else shared
    for target, _, line in imports_of(path):
        if target is not None and part(target) == family:
            assert target in below, f"line {line}: {target}"


@every_file
def test_petsc_and_mpi_appear_only_where_solves_are_driven(path):
    """And PETSc comes from the one file that starts it, since it is the first import that decides about signals."""
    outside = {name for _, name, _ in imports_of(path)}
    inside = {target for target, _, _ in imports_of(path)}
    if outside & {"petsc4py", "mpi4py"}:
        assert module_of(path) == "system.start"
    if "system.start" in inside:
        assert (
            module_of(path)
            in (
                *("driver", "petsc_options", "ts"),
                *("native", "native_callbacks", "native_function", "native_setting", "native_solvers"),
            )
            or part(module_of(path)) == "system"
        )


@every_file
def test_imports_stand_at_the_top_of_the_file(path):
    """None inside functions: the usual way around a cycle of imports."""
    tree = ast.parse(path.read_text())
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        inner = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not inner, f"{function.name}, line {inner[0].lineno}"


def test_importing_pfde_starts_nothing():
    code = "import sys, pfde; dir(pfde); assert not {'petsc4py', 'mpi4py', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_petsc_can_still_be_initialised_after_importing_pfde():
    code = (
        "import pfde, petsc4py; petsc4py.init(['x', '-pfde_layer_test', '3']); import pfde.ts; pfde.fdeint\n"
        "from petsc4py import PETSc; assert PETSc.Options().getInt('pfde_layer_test') == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def documented_methods(path):
    """The names of the documented methods of a file's classes."""
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = [node for c in classes for node in c.body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in methods if ast.get_docstring(node)}


@every_file
def test_every_function_is_annotated_and_what_is_public_is_documented(path):
    """A method may leave its docstring to the one it overrides, in its folder's base or in its own file."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"
    bases = [path.parent / "base.py", path.parent / "one_step.py", path]
    inherited = set().union(*map(documented_methods, bases))

    def visit(node, public):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visible = public and not child.name.startswith("_")
                assert not visible or ast.get_docstring(child), f"class {child.name} has no docstring"
                visit(child, visible)
            elif isinstance(child, ast.FunctionDef):
                a = child.args
                arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
                bare = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
                assert not bare and child.returns is not None, f"{child.name}, line {child.lineno}: {bare or 'return'}"
                visible = public and not child.name.startswith("_")
                if isinstance(node, ast.ClassDef) and child.name in inherited:
                    visible = False
                assert not visible or ast.get_docstring(child), f"{child.name}, line {child.lineno}, has no docstring"
                visit(child, False)
            else:
                visit(child, public)

    visit(tree, True)
