"""The house stands where it should: no foreign module wins, every module is installed, imports run downwards."""

import ast
import graphlib
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TREES = {file.stem: ast.parse(file.read_text()) for file in sorted(REPOSITORY.glob("*.py"))}
OPTIONAL = {"wandb", "datasets", "tyro", "triton", "matplotlib", "transformers", "transformer_lens", "sparse_triton"}


def test_top_level_modules_are_the_repositorys_own() -> None:
    for file in REPOSITORY.glob("*.py"):
        module = importlib.import_module(file.stem)
        assert Path(module.__file__).resolve() == file.resolve(), f"{file.stem} was imported from {module.__file__}"


def test_every_module_is_installed() -> None:
    listed = (REPOSITORY / "pyproject.toml").read_text()
    missing = [file.stem for file in REPOSITORY.glob("*.py") if f'"{file.stem}"' not in listed]
    assert not missing, f"py-modules in pyproject.toml lacks {missing}"


def imported(node: ast.AST) -> Iterator[str]:
    """First names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        yield str(node.module).split(".")[0]


def test_imports_run_downwards() -> None:
    """No circle: every module stands on a floor above all that it imports, also inside functions."""
    below = {
        m: {name for node in ast.walk(tree) for name in imported(node)} & TREES.keys() for m, tree in TREES.items()
    }
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError, which names the circle


def test_imports_stand_at_the_top() -> None:
    """Inside functions only what is optional or slow to import."""
    inside = {
        f"{module}.{function.name} imports {name}"
        for module, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        for name in imported(node)
        if name not in OPTIONAL
    }
    assert not inside, f"{sorted(inside)}"


def test_hooks_are_registered_in_one_file() -> None:
    found = {module for module in TREES if "register_forward" in (REPOSITORY / f"{module}.py").read_text()}
    assert found == {"patching"}, f"{found=}"


def test_no_public_name_is_defined_twice() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for module, tree in TREES.items():
        for node in tree.body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            for name in [*names, *([node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [])]:
                places[name].add(module)
    twice = {name: sorted(where) for name, where in places.items() if len(where) > 1 and not name.startswith("_")}
    assert twice.keys() <= {"main"}, f"{twice=}"  # every command line has its own `main`
