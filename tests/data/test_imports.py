"""The arrows between the packages of `jllm.data` point one way, and no modules import each other in a circle.

Imports inside functions and for type checkers count.
"""

import ast
import graphlib
from collections import Counter
from pathlib import Path

import jllm

ROOT = Path(jllm.__file__).parent
MAY_IMPORT = {
    "sources": set(),
    "tokenizer": {"dataset"},
    "packing": {"dataset"},
    "chat": {"sources", "tokenizer", "packing", "dataset"},
    "prepare": {"sources", "tokenizer", "packing", "dataset", "chat"},
}
GROUND = {"jllm", "jllm.atomic", "jllm.errors", "jllm.machine", "jllm.options"}


def modules() -> dict[str, ast.Module]:
    """All modules of `jllm.data`, parsed."""
    found = {}
    for path in (ROOT / "data").rglob("*.py"):
        name = ".".join(("jllm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports_of(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of ours that a module imports; of a name out of a package, the package or the module of that name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jllm":
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inner or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "jllm"}
    return found


def test_no_circles() -> None:
    trees = modules()
    arrows = {name: imports_of(tree, set(trees)) for name, tree in trees.items()}
    assert all(name not in arrows[name] for name in arrows)
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names them


def test_packages_import_what_they_may() -> None:
    trees = modules()
    for name, tree in trees.items():
        package = name.split(".")[2] if name.count(".") > 2 else ""
        if package not in MAY_IMPORT:
            continue
        for imported in imports_of(tree, set(trees)) - GROUND:
            assert imported.startswith("jllm.data."), f"{name} imports {imported}"
            other = imported.split(".")[2]
            assert other == package or other in MAY_IMPORT[package], f"{name} imports {imported}"


def test_every_class_has_a_name_of_its_own() -> None:
    names = Counter(
        node.name
        for name, tree in modules().items()
        if name.split(".")[2:3] and name.split(".")[2] in MAY_IMPORT
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]
