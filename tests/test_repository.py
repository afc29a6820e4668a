"""What the repository says about itself is true: the tree, the commands in the documents, the pinned versions."""

import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def tree_of_contributing() -> list[str]:
    """The paths in CONTRIBUTING's annotated tree: two spaces of indentation are one level, folders end in a slash."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert block is not None
    paths: list[str] = []
    parents: list[str] = []
    for line in block[1].splitlines():
        indent, names = re.match(r"( *)(\S+(?:, \S+)*)", line).groups()  # type: ignore[union-attr]
        level = len(indent) // 2
        for name in names.split(", "):
            paths.append("".join(parents[:level]) + name)
        if names.endswith("/"):
            parents = [*parents[:level], names]
    return paths


def test_the_annotated_tree_is_the_repository() -> None:
    listed = tree_of_contributing()
    assert len(listed) == len(set(listed))
    missing = [path for path in listed if not (ROOT / path).exists()]
    assert not missing, f"in CONTRIBUTING.md and not there: {missing}"
    # A folder that lists nothing of its own stands for everything in it.
    whole = tuple(
        path for path in listed if path.endswith("/") and not any(p != path and p.startswith(path) for p in listed)
    )
    unlisted = [
        name
        for name in tracked()
        if name not in listed and not name.startswith(whole) and PurePosixPath(name).name != "__init__.py"
    ]
    assert not unlisted, f"not in CONTRIBUTING.md's tree: {unlisted}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def shown_commands(document: Path) -> list[str]:
    """The commands in a document's code blocks, continued lines joined."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()] + indented
    return [line.strip().removeprefix("$ ") for line in lines]


def options_of(module: str) -> set[str] | None:
    """All flags of a command's module, or None where it is no command of ours."""
    if importlib.util.find_spec(module) is None:
        return set()
    command: Any = getattr(importlib.import_module(module), "main", None)
    if not hasattr(command, "params"):
        return None
    flags = {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]}
    return flags | {"-h", "--help"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_their_flags_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in shown_commands(document):
        for target in re.findall(r"^make ([a-z-]+)", line):
            assert target in targets, line
        for script in re.findall(r"python (\w+/\w+\.py)", line):
            assert (ROOT / script).is_file(), line
        found = re.search(r"(?:python -m|--module) (jllm[.\w]*) ?(.*)", line)
        if found is None or found[1] == "jllm":
            continue
        flags = options_of(found[1])
        if flags is None:
            continue
        assert flags, f"{found[1]}: no such module, in: {line}"
        words = shlex.split(found[2].split("#")[0].split("|")[0], posix=True)
        used = {word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)}
        assert used <= flags, f"{sorted(used - flags)} in: {line}"


def setup_arguments() -> dict[str, Any]:
    """What setup.py gives to setuptools, read without running it: its constants are lists of text."""
    values: dict[str, Any] = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            name = node.targets[0].id  # type: ignore[attr-defined]
            values[name] = []
            for item in node.value.elts:
                if isinstance(item, ast.Starred):
                    values[name] += values[item.value.id]  # type: ignore[attr-defined]
                else:
                    values[name].append(ast.literal_eval(item))
    return values


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_pin_every_requirement_at_a_version_it_allows() -> None:
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for name, requirements in setup_arguments().items():
        for requirement in map(Requirement, requirements):
            if canonicalize_name(requirement.name) in ("liger-kernel", "trackio"):  # another torch, another pillow
                continue
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is not None, f"{name}: {requirement} is not in constraints.txt"
            assert requirement.specifier.contains(version), f"{name}: {requirement}, pinned {version}"


def test_constraints_are_what_these_tests_run_with() -> None:
    different = {}
    for name, version in pins().items():
        try:
            installed = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        if installed != version:
            different[name] = (version, installed)
    assert not different, "run `make setup`"


def test_nothing_names_a_machine() -> None:
    """Paths of somebody's machine, or a registry's host, mean nothing to a user."""
    pattern = re.compile(r"/(?:root|work|opt|farm|home)/[a-z._-]+|\bfile:///[a-z]|\.\./shared|[a-z.]*pythonhosted\.org")
    for name in tracked():
        if name in ("LICENSE", "tests/test_repository.py"):
            continue
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace")
        found = pattern.search(text)
        assert found is None, f"{name}: {found and found[0]}"


def test_modules_and_files_that_are_named_exist() -> None:
    """What a docstring, a comment or a document calls by its name was not moved away since."""
    names = tracked()
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in names}
    wrong = []
    for name in names:
        if not name.endswith((".py", ".md")):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        for found in re.findall(r"`(jllm(?:\.\w+)+)`", text):
            module, _, attribute = found.rpartition(".")
            defined = module in modules and re.search(rf"\b{attribute}\b", (ROOT / modules[module]).read_text("utf-8"))
            if found not in modules and not defined and found != "jllm.zip":  # a file
                wrong.append(f"{name}: {found}")
        for found in re.findall(r"[`(\[ ]((?:\w+/)*\w+\.py)\b", text):
            if not any(f"/{other}".endswith(f"/{found}") for other in names):
                wrong.append(f"{name}: {found}")
    assert not wrong


def test_modules_say_what_they_do() -> None:
    for name in tracked():
        if not name.endswith(".py"):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{name}: no module docstring"


def test_data_never_imports_torch_and_models_never_import_train() -> None:
    """The arrows between the packages, as CONTRIBUTING.md draws them."""
    forbidden = {
        "jllm/data/": ("torch", "jllm.models", "jllm.train", "jllm.parallel"),
        "jllm/models/": ("jllm.train",),
        "jllm/parallel/": ("jllm.data", "jllm.models", "jllm.train"),
        "jllm/parallel/mesh.py": ("torch",),
    }
    for name in tracked():
        for folder, modules in forbidden.items():
            if not name.startswith(folder) or not name.endswith(".py"):
                continue
            for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
                imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for module in imported:
                    wrong = [bad for bad in modules if module == bad or module.startswith(bad + ".")]
                    assert not wrong, f"{name} imports {module}"


def test_every_config_field_explains_itself() -> None:
    from jllm.train.config import TrainConfig

    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["option"].help, field.name
