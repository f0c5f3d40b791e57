"""The house as docs/architecture.md draws it: two wings on one ground floor, imports down, PETSc in its places."""

import ast
import subprocess
import sys
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import pytest

import house
import pfde
from house import FILES, HOUSE, ROOT, imports_of, module_of, room, tree_of

# From the ground up; a room may import rooms of lower floors. Rooms of one floor do not know each other.
FLOOR = {
    "errors": 0,
    "registry": 0,
    "schedules": 1,
    "system": 1,
    "solving": 2,
    "caputo": 3,
    "one_step": 3,
    "petsc": 4,
    "api": 5,
    "extend": 6,
    "nn": 6,
    "testing": 6,
    "ts": 6,
    "__main__": 7,
}
MOST_FLOORS = 9
# Narrower than the floors: what the parts of a wing that know no solve may know of the house.
ONLY = {
    "caputo.schemes": {"caputo.special", "registry", "system.base"},
    "caputo.history": {"caputo.history"},
    "one_step.methods": {"one_step.tableaux", "one_step.methods", "registry", "system.base"},
    "one_step.tableaux": {"registry"},
}
# Folders whose files are alternatives to each other: each sees what all share, in this order, and none its neighbours.
FAMILIES = {
    "caputo.schemes": ["base"],
    "caputo.history": ["base", "toeplitz", "skeleton", "online_product", "nodes", "bounded"],
    "one_step.tableaux": ["rooted_trees", "coefficients", "tableau"],
    "one_step.methods": ["sums_of_slopes", "base", "stage_guess", "implicit"],
    "schedules": ["base", "snapshot_file", "storage", "store_all"],
}
PETSC = ("system", "petsc", "solving.driver")  # where PETSc's objects may be


def every_file(check: Callable[[Path], None]) -> Callable[[], None]:
    """The check of a file as a test of all: one test, which names the file that fails."""

    @wraps(check)
    def test() -> None:
        for path in FILES:
            try:
                check(path)
            except AssertionError as error:
                raise AssertionError(f"{path.relative_to(ROOT)}: {error}") from None

    del test.__wrapped__  # else pytest looks for a fixture `path`
    return test


def is_in(module: str, folders: tuple[str, ...] | set[str]) -> bool:
    return any(module == folder or module.startswith(folder + ".") for folder in folders)


def test_every_room_has_its_floor():
    assert {room(module_of(path)) for path in FILES} - {""} == set(FLOOR)
    assert len(set(FLOOR.values())) <= MOST_FLOORS


def test_the_picture_is_that_of_the_imports():
    assert house.PICTURE.read_text() == house.picture(), "run python tools/house.py"
    assert 1 + max(map(house.floor, house.rooms())) <= MOST_FLOORS


@pytest.mark.smoke
@every_file
def test_imports_point_down(path):
    """From room to room; the wings, which are on one floor, do not know each other."""
    module = module_of(path)
    if not module:
        return  # pfde/__init__.py resolves its names lazily
    for target, _, line in imports_of(path):
        if target is None or room(target) == room(module):
            continue
        assert FLOOR[room(target)] < FLOOR[room(module)], f"line {line} imports {target}"
        for part, allowed in ONLY.items():
            if is_in(module, (part,)):
                assert is_in(target, allowed), f"line {line} imports {target}"


@pytest.mark.smoke
def test_there_is_no_circle():
    """Of modules, within a room as between rooms."""
    names = {module_of(path): path for path in FILES}
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " -> ".join((*trail[trail.index(module) :], module))
        if module in state:
            return
        state[module] = 1
        path = names[module]
        for target, _, _ in imports_of(path):
            # a package's __init__ imports its files: a file of it that names the package means the files above it
            if target in names and target != module and not (path.name != "__init__.py" and is_in(module, (target,))):
                visit(target, (*trail, module))
        state[module] = 2

    for module in names:
        if module:
            visit(module, ())


@every_file
def test_the_members_of_a_family_see_only_their_base(path):
    module = module_of(path)
    family, _, name = module.rpartition(".")
    if family not in FAMILIES or path.name == "__init__.py":
        return
    shared = FAMILIES[family]
    below = shared[: shared.index(name)] if name in shared else shared
    for target, _, line in imports_of(path):
        if target is not None and is_in(target, (family,)) and target != family:
            assert target.rpartition(".")[2] in below, f"line {line}: {target}"


@every_file
def test_petsc_and_mpi_appear_only_where_solves_are_driven(path):
    """And PETSc comes from the one file that starts it, since it is the first import that decides about signals."""
    module = module_of(path)
    if {outside for _, outside, _ in imports_of(path)} & {"petsc4py", "mpi4py"}:
        assert module == "system.start"
    if "system.start" in {inside for inside, _, _ in imports_of(path)}:
        assert is_in(module, PETSC)


@every_file
def test_imports_stand_at_the_top_of_the_file(path):
    """None inside functions: the usual way around a circle of imports."""
    for function in (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef)):
        inner = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not inner, f"{function.name}, line {inner[0].lineno}"


WINGS = ("caputo", "one_step")
PASSES = {  # file: what it has in both wings
    "forward": ["ForwardSweep"],
    "adjoint": ["Cotangents", "AdjointSweep"],
    "tangent": ["tangent_sweep"],
    "backprop": ["backprop"],
    "trajectory": ["Trajectory"],
    "arguments": ["check_method"],
}
LIFE = {  # class: the methods that both wings have, in this order
    "ForwardSweep": ["steps", "advance", "retake", "close", "snapshot_bytes", "workspace_bytes", "snapshot", "restore",
                     "anew"],
    "AdjointSweep": ["reverse", "finish"],
    "Trajectory": ["spent", "spend", "graphs", "row_bytes", "open", "leaf", "load", "keeps", "record", "release"],
    "problem": ["t0", "integrate", "forward", "backprop", "tangent", "bare_system", "backward"],
}  # fmt: skip


def definitions(path: Path) -> dict[str, list[str]]:
    """The public classes of a file with their public methods, and its public functions, in their order."""
    found = {}
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            body = node.body if isinstance(node, ast.ClassDef) else []
            methods = [m.name for m in body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
            found[node.name] = methods
    return found


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", PASSES)
def test_the_wings_have_the_same_names_in_the_same_order(wing, name):
    found = definitions(HOUSE / wing / f"{name}.py")
    assert [x for x in found if x in PASSES[name]] == PASSES[name]
    for one in PASSES[name]:
        if one in LIFE:
            assert [method for method in found[one] if method in LIFE[one]] == LIFE[one], one


@pytest.mark.parametrize(("wing", "name"), [("caputo", "CaputoProblem"), ("one_step", "OrdinaryProblem")])
def test_the_problems_of_the_wings_read_in_the_same_order(wing, name):
    methods = definitions(HOUSE / wing / "problem.py")[name]
    assert [method for method in methods if method in LIFE["problem"]] == LIFE["problem"]


@every_file
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= 430, "a file past 400 lines is asking to be two"


@every_file
def test_nothing_is_cast(path):
    """The protocols of `system.base` are satisfied by those that pass for them."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "typing":
            assert "cast" not in {alias.name for alias in node.names}


def test_importing_pfde_starts_nothing():
    code = "import sys, pfde; dir(pfde); assert not {'petsc4py', 'mpi4py', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_petsc_can_still_be_initialised_after_importing_pfde():
    code = (
        "import pfde, petsc4py; petsc4py.init(['x', '-pfde_layer_test', '3']); import pfde.ts; pfde.fdeint\n"
        "from petsc4py import PETSc; assert PETSc.Options().getInt('pfde_layer_test') == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@cache
def documented() -> frozenset[str]:
    """The names of methods that some class of the house documents, from which an override may inherit its docstring."""
    found = set()
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
                found |= {m.name for m in methods if ast.get_docstring(m)}
    return frozenset(found)


@every_file
def test_every_function_is_annotated_and_what_is_public_is_documented(path):
    """A method of a class that derives from another one of the house may leave its docstring to that."""
    tree = tree_of(path)
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"

    def visit(node: ast.AST, public: bool, derived: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visible = public and not child.name.startswith("_")
                assert not visible or ast.get_docstring(child), f"class {child.name} has no docstring"
                visit(child, visible, bool(child.bases))
            elif isinstance(child, ast.FunctionDef):
                a = child.args
                arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
                bare = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
                assert not bare and child.returns is not None, f"{child.name}, line {child.lineno}: {bare or 'return'}"
                visible = public and not child.name.startswith("_")
                if isinstance(node, ast.ClassDef) and derived and child.name in documented():
                    visible = False
                assert not visible or ast.get_docstring(child), f"{child.name}, line {child.lineno}, has no docstring"
                visit(child, False, False)
            else:
                visit(child, public, derived)

    visit(tree, True, False)


def test_the_lists_of_what_pfde_exports_agree():
    """What type checkers read, what is resolved at first use, and what `import *` gives."""
    checked = {
        alias.asname or alias.name: node.module
        for condition in tree_of(HOUSE / "__init__.py").body
        if isinstance(condition, ast.If) and isinstance(condition.test, ast.Name)
        for node in condition.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert checked == pfde._HOME
    assert sorted([*checked, "__version__"]) == sorted(pfde.__all__)
    assert all(hasattr(pfde, name) for name in pfde.__all__)
