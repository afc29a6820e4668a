"""The walls of the house: which package may import which, no circles, files of one subject, tests that mirror it."""

import ast
import collections
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES, MOST_FILES = 450, 16

GROUND = (
    *(
        "jllm",
        "jllm.atomic",
        "jllm.children",
        "jllm.errors",
        "jllm.forks",
        "jllm.machine",
        "jllm.options",
        "jllm.ranges",
    ),
    *("jllm.guards", "jllm.guards.caches", "jllm.guards.notation", "jllm.guards.tensors", "jllm.guards.typed"),
)
"""What everything may import, and what imports nothing of ours but itself."""
ARROWS = {
    "jllm.data.dataset": (),
    "jllm.data.sources": (),
    "jllm.data.tokenizer": ("jllm.data.dataset", "jllm.data.sources"),
    "jllm.data.packing": ("jllm.data.dataset",),
    "jllm.data.shuffle": ("jllm.data.dataset",),
    "jllm.data.chat": ("jllm.data.dataset", "jllm.data.packing", "jllm.data.sources", "jllm.data.tokenizer"),
    "jllm.data": ("jllm.data",),
    "jllm.parallel": (),
    "jllm.models": ("jllm.parallel",),
    "jllm.train": ("jllm.models", "jllm.parallel", "jllm.data"),
    "jllm.commands": ("jllm.train", "jllm.models", "jllm.data"),
}
"""Package → the packages that it may import beside itself and the ground. The nearest package of a module counts."""
FACES = ("jllm.commands", "jllm.cli", "jllm.__main__")
"""What nothing may import but `jllm.cli` and the modules that people call by name."""


def tracked(pattern: str) -> list[str]:
    listing = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name): name for name in tracked("*.py")}
COMMAND_FACES = {module_of(name) for name in tracked("jllm/commands/*.py")}


def imports_of(module: str) -> Iterator[str]:
    """Our modules that `module` imports: also in functions, and for types alone."""
    for node in ast.walk(ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else node.module for name in inside]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        yield from (name for name in found if name in MODULES)


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def package_of(module: str) -> str | None:
    return max((package for package in ARROWS if is_within(module, (package,))), key=len, default=None)


def test_arrows_between_packages_point_one_way() -> None:
    wrong = []
    for module in MODULES:
        package = package_of(module)
        for imported in imports_of(module):
            if module in GROUND:
                allowed = imported in GROUND
            elif package is not None:
                allowed = imported in GROUND or is_within(imported, (package, *ARROWS[package]))
            else:
                allowed = True
            if is_within(imported, FACES):
                by_name = MODULES[module].startswith("jllm/") and MODULES[module].count("/") == 1
                allowed = by_name or module.startswith("tests.")
            if not allowed:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    """Not in a function and not for types alone either: what is needed both ways belongs into a module below both."""
    arrows = {module: set(imports_of(module)) - {module} for module in MODULES if module.startswith("jllm")}
    while True:  # a module that imports nothing that is left is in no circle
        free = [module for module, imported in arrows.items() if not imported & arrows.keys()]
        if not free:
            break
        for module in free:
            del arrows[module]
    assert not arrows, {module: sorted(imported & arrows.keys()) for module, imported in arrows.items()}


def test_every_package_says_what_lives_there() -> None:
    folders = {str(PurePosixPath(name).parent) for name in tracked("jllm/*.py")}
    for folder in sorted(folders):
        text = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text))
        assert docstring, f"{folder}/__init__.py: no docstring"


def test_files_are_short_and_folders_small() -> None:
    long = {
        name: count
        for name in tracked("*.py")
        if (count := (ROOT / name).read_text(encoding="utf-8").count("\n")) > MOST_LINES
    }
    assert not long
    files = collections.Counter(
        str(PurePosixPath(name).parent)
        for name in tracked("jllm/*.py")
        # The names that people call have no subject of their own: each is two lines, and its face is in jllm.commands.
        if not name.endswith("__init__.py") and not set(imports_of(module_of(name))) & COMMAND_FACES
    )
    assert not {folder: count for folder, count in files.items() if count > MOST_FILES}


def test_a_class_name_has_one_meaning() -> None:
    places = collections.defaultdict(list)
    for module, name in MODULES.items():
        if name.startswith("jllm/"):
            for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places[node.name.lstrip("_")].append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def test_tests_mirror_the_package() -> None:
    """A folder of tests is one of the package, and its test files are named after modules or packages there."""
    for name in tracked("tests/**/test_*.py"):
        folder = PurePosixPath(name).parent.relative_to("tests")
        if str(folder) != "." and folder.parts[0] not in BESIDE_THE_PACKAGE:
            assert (ROOT / "jllm" / folder).is_dir(), f"{name}: there is no jllm/{folder}"


def test_every_module_has_a_test_of_its_name() -> None:
    missing = []
    for module, name in MODULES.items():
        path = PurePosixPath(name)
        if not name.startswith("jllm/") or path.name == "__init__.py" or name in TESTED_ELSEWHERE:
            continue
        if path.parts[1] == "commands" or len(path.parts) == 2:
            continue  # the faces and the ground: tests/test_*.py and the tests of what they call
        if path.parent == PurePosixPath("jllm/train/options"):
            continue  # declarations: tests/train/test_config.py, and the tests of what each of them is for
        test = ROOT / "tests" / path.relative_to("jllm").parent / f"test_{path.name}"
        if not test.is_file():
            missing.append(module)
    assert not missing


BESIDE_THE_PACKAGE = ("distributed", "pages", "security", "spark")
"""Folders of tests that are about several packages at once."""
TESTED_ELSEWHERE: dict[str, str] = {
    # What hostile folders show.
    "jllm/models/remote_code.py": "tests/security/test_code.py",
    "jllm/models/weight_index.py": "tests/security/test_names.py",
    # What calls them.
    "jllm/models/kernels/programs.py": "tests/models/kernels/test_packed_attention.py",
    # What only a run of several processes shows.
    "jllm/train/checkpoint/export.py": "tests/distributed/test_run.py",
    "jllm/train/checkpoint/state.py": "tests/distributed/test_resume.py",
    "jllm/train/distributed/profiling.py": "tests/distributed/test_trace.py",
    "jllm/train/lifecycle/clean.py": "tests/distributed/test_run.py",
    "jllm/train/lifecycle/run_folders.py": "tests/distributed/test_run_folders.py",
    "jllm/train/checkpoint/random_state.py": "tests/distributed/test_resume.py",
    "jllm/train/checkpoint/weights_alone.py": "tests/train/checkpoint/test_resume.py",
    "jllm/train/checkpoint/run_saver.py": "tests/distributed/test_endings.py",
    "jllm/train/exporting.py": "tests/distributed/test_endings.py",
    "jllm/train/limits.py": "tests/train/test_config.py",
    "jllm/train/data/open.py": "tests/distributed/test_data_path.py",
    "jllm/train/distributed/agreement.py": "tests/distributed/test_data_path.py",
    "jllm/train/distributed/tracing.py": "tests/distributed/test_trace.py",
    "jllm/train/evaluate.py": "tests/distributed/test_run.py",
    "jllm/train/setup.py": "tests/distributed/test_model_options.py",
    "jllm/train/trainer.py": "tests/distributed/test_run.py",
    "jllm/parallel/sequence/exchange.py": "tests/models/sequence_parallel/test_attention.py",
    "jllm/parallel/sequence/group.py": "tests/models/sequence_parallel/test_attention.py",
    # Drawn into one file by its only caller.
    "jllm/train/records/svg.py": "tests/train/records/test_curves.py",
}
"""Module → the test file where it is tested, where a test of its own name would say less."""


def test_helpers_of_tests_live_in_no_test_file() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module in MODULES
        if module.startswith("tests.")
        for imported in imports_of(module)
        if imported.rsplit(".", 1)[-1].startswith("test_") or imported.endswith(".conftest")
    ]
    assert not wrong
