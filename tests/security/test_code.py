"""Nothing that lies in the working folder, and nothing that a folder's files name, is run."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm import children
from jllm.commands.convert import main as convert
from jllm.errors import UserError
from jllm.models.legacy.rewriting import convert_checkpoint
from jllm.models.remote_code import check_no_fetched_code, check_no_remote_code
from jllm.models.weights.source import read_config
from tests.security.hostile import configured, plant_modules, what_ran

ROOT = Path(__file__).resolve().parents[2]
FETCHED = "kernels-community/flash-attn"
LEGACY = {"intermediate_size": 8, "num_key_value_heads": 2, "bias": False, "rms_norm_eps": 1e-5, "rope_theta": 1e4}


def run(folder: Path, *arguments: str, search: str = str(ROOT)) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": search}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("search", [str(ROOT), f"{ROOT}{os.pathsep}"], ids=["plain", "an empty entry"])
@pytest.mark.parametrize("way", ["python -m jllm", "python -m jllm.raw2ids", "jllm"])
def test_commands_run_nothing_of_the_working_folder(tmp_path: Path, way: str, search: str) -> None:
    folder = plant_modules(tmp_path / "downloaded")
    (folder / "sitecustomize.py").unlink()  # which an empty entry makes Python run before anything of ours is there
    (folder / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 3, encoding="utf-8")
    if way == "jllm":
        script = tmp_path / "bin" / "jllm"
        script.parent.mkdir()
        script.write_text("from jllm.cli import main\nmain()\n", encoding="utf-8")
        start = [sys.executable, str(script), "raw2ids"]
    else:
        start = [sys.executable, *way.split()[1:], *(["raw2ids"] if way.endswith("jllm") else [])]
    done = run(
        folder, *start, "-i", "in.jsonl", "-o", "out", "--tokenizer", ".", "--type", "ft", "--cores", "2", search=search
    )
    assert what_ran(folder) == ""
    assert done.returncode == 2, done.stderr
    assert "--tokenizer ." in done.stderr  # which the child that loads it says


@pytest.mark.parametrize("search", ["", os.pathsep, f"{ROOT}{os.pathsep}", f"{os.pathsep}{os.pathsep}{ROOT}"])
def test_children_run_nothing_of_the_working_folder(tmp_path: Path, search: str) -> None:
    folder = plant_modules(tmp_path)
    environment = children.environment({**os.environ, "PYTHONPATH": search})
    script = "import json, subprocess, sys, jllm; print(jllm.__file__)\n"
    grandchild = f"import sys, os; os.execv(sys.executable, [sys.executable, '-c', {script!r}])"
    for command in (children.python("-c", script), children.python("-c", grandchild)):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == str(ROOT / "jllm/__init__.py"), done.stderr
    assert what_ran(folder) == ""


@given(st.lists(st.sampled_from(["", ".", "a", "/b", str(ROOT)]), max_size=5))
def test_the_search_path_of_children_has_no_empty_entry(entries: list[str]) -> None:
    found = children.environment({"PYTHONPATH": os.pathsep.join(entries)})
    assert found["PYTHONSAFEPATH"] == "1"
    named = found["PYTHONPATH"].split(os.pathsep)
    assert all(map(os.path.isabs, named))
    assert named.count(str(ROOT)) >= 1
    assert [entry for entry in named if entry != str(ROOT)] == [
        os.path.abspath(entry) for entry in entries if entry and os.path.abspath(entry) != str(ROOT)
    ]


def test_all_child_interpreters_are_started_by_one_module() -> None:
    """Nothing else of the package and the tools names the interpreter in a list, or spawns one."""
    wrong = []
    for path in sorted([*(ROOT / "jllm").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        text = path.read_text(encoding="utf-8")
        if path == ROOT / "jllm/children/__init__.py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.List | ast.Tuple) and any(map(_is_interpreter, node.elts)):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
        if '"spawn"' in text:
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong


def _is_interpreter(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "executable"


def test_code_of_the_folder_is_allowed_or_refused_wherever_transformers_loads() -> None:
    """Every call that could run it says whether it may: left out, transformers asks on standard input."""
    wrong = []
    for place in ("jllm", "tools", "benchmarks", "spark_jobs"):
        for path in (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                loads = node.func.attr == "from_pretrained" and ast.unparse(node.func.value).startswith(
                    ("Auto", "transformers.Auto")
                )
                keywords = {keyword.arg for keyword in node.keywords}
                if loads and not keywords & {"trust_remote_code", None}:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": FETCHED},
        {"_attn_implementation": f"{FETCHED}@v1:forward"},
        {"experts_implementation": "someone/experts"},
        {"text_config": {"_experts_implementation_internal": "someone/experts"}},
        {"attn_implementation": {"": "sdpa", "text_config": FETCHED}},
        {"attn_implementation": f"paged|{FETCHED}"},
    ],
)
def test_implementations_that_would_be_fetched_are_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    folder = configured(tmp_path, **fields)
    with pytest.raises(UserError, match=r"_implementation\w* is .*code from the hub"):
        read_config(folder)
    with pytest.raises(UserError, match="code from the hub"):
        check_no_remote_code(folder)


@given(st.recursive(st.sampled_from(["sdpa", "eager", 1, None]), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["a", "attn_implementation"]), inner)))  # fmt: skip
def test_implementations_are_found_at_any_depth(value: object) -> None:
    check_no_fetched_code(value, Path("config.json"))
    with pytest.raises(UserError, match="code from the hub"):
        check_no_fetched_code({"x": [value, {"experts_implementation": "a/b"}]}, Path("config.json"))


@pytest.mark.parametrize("tool", ["ask", "evaluate"])
def test_tools_run_no_code_of_the_folder(tmp_path: Path, tool: str) -> None:
    folder = configured(tmp_path / "model", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    more = {"ask": ["--prompt", "a"], "evaluate": ["--data", str(tmp_path)]}[tool]
    command = [sys.executable, str(ROOT / f"tools/{tool}.py"), "--model", str(folder), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input="y\ny\n", env=environment, capture_output=True, text=True, check=False)
    assert not (tmp_path / "ran").exists()
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_command_advises_an_option_that_it_has_not(tmp_path: Path) -> None:
    folder = configured(tmp_path, model_type="own", auto_map={"AutoConfig": "own.C"})
    with pytest.raises(UserError) as caught:
        read_config(folder, trust_remote_code=None)
    assert "trust_remote_code" not in str(caught.value)
    done = run(tmp_path, sys.executable, "-m", "jllm.convert", "-m", str(folder), "-o", str(tmp_path / "new"))
    assert done.returncode == 2
    assert "trust_remote_code" not in done.stderr
    assert json.loads((folder / "config.json").read_text())["model_type"] == "own"


@pytest.mark.parametrize("fields", [{"model_type": "own", "auto_map": {}}, {}, {"model_type": "internlm2", **LEGACY}])
def test_convert_advises_options_of_its_own(tmp_path: Path, fields: dict[str, object]) -> None:
    """Also for a folder without weights, which the trainer could start without."""
    with pytest.raises(UserError) as caught:
        convert_checkpoint(configured(tmp_path / "old", **fields), tmp_path / "new")
    known = {flag for parameter in convert.params for flag in parameter.opts}
    assert set(re.findall(r"--\w+", str(caught.value))) <= known


def test_no_kernel_of_the_hub_comes_with_a_package(tmp_path: Path) -> None:
    """Where the package `kernels` is installed, bitsandbytes would fetch one as soon as it is imported."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[adapters]")
    (tmp_path / "kernels.py").write_text(
        f"from pathlib import Path\ndef get_kernel(*given, **more): Path({str(tmp_path / 'fetched')!r}).touch()\n"
    )
    script = (
        "from jllm.machine import require_package; import sys;"
        " require_package('bitsandbytes', 'a test', 'adapters'); assert 'kernels' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "fetched").exists()
    assert "Failed to load" not in done.stderr
