"""--control_class: each document has the class of its file, random ones by what they say, whoever runs and kills."""

import json
from pathlib import Path

import numpy as np
import pytest

from jllm.data.dataset.manifest import read_manifest
from jllm.data.packing.documents import Documents
from jllm.data.prepare.control_classes import RANDOM, classes_of, parsed, random_classes
from jllm.data.sources.inputs import resolve
from jllm.errors import UserError
from tests.data.raw2ids_runs import documents, raw2ids, rows_of, tree, write_jsonl


@pytest.mark.parametrize("wrong", ["", "a", "=1", "*=", "*=2", "*=plus", "*=+0", "1"])
def test_mistakes(wrong: str) -> None:
    with pytest.raises(
        UserError, match=r"^--control_class .*: write GLOB=CLASS, the class being \+1, -1, 0 or random$"
    ):
        parsed([wrong])


def test_the_first_glob_that_fits_counts(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("good", "bad", "other", "x=y"):
        write_jsonl(tmp_path / f"in/{name}.jsonl", ["a"])
    sources = resolve([str(tmp_path / "in")])
    assert [source.stem for source in sources] == ["bad", "good", "other", "x=y"]
    assert classes_of(["bad*=-1", "good.jsonl=+1", "x=y*=0", "*=random"], sources) == (-1, 1, RANDOM, 0)
    assert classes_of([f"{tmp_path}/in/*=1"], sources) == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"^--control_class: no glob fits other.jsonl; give its class too"):
        classes_of(["bad*=-1", "good*=+1", "x*=0"], sources)
    with pytest.raises(UserError, match=r"^--control_class worse\*=-1: fits none of the 4 input files"):
        classes_of(["*=0", "worse*=-1"], sources)
    assert classes_of(["*.jsonl=1", "*=0"], sources) == (1, 1, 1, 1), "nothing is left for the last"
    for covered in (["*=0", "bad*=-1"], ["b*=1", "bad*=-1", "*=0"], ["bad*=1", "bad*=-1", "*=0"]):
        with pytest.raises(UserError, match=r"^--control_class bad\*=-1: a glob before it fits every file"):
            classes_of(covered, sources)


def test_random_is_half_of_each_and_by_the_document_alone() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 40, 4000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    drawn = Documents(ids=rng.integers(0, 300, int(offsets[-1])).astype(np.int32), offsets=offsets)
    classes = random_classes(drawn)
    assert set(classes.tolist()) == {-1, 1}
    assert 0.47 < float((classes == 1).mean()) < 0.53
    order = rng.permutation(4000)
    assert random_classes(drawn.take(order)).tolist() == classes[order].tolist()


@pytest.mark.parametrize("more", [["--stack"], ["--packing", "best_fit"], [], ["--stack", "--eval_fraction", "0.3"]])
def test_each_token_has_its_documents_class(tmp_path: Path, byte_tokenizer: Path, more: list[str]) -> None:
    """Documents are told apart by the number they end with; two runs are the same bytes."""
    (tmp_path / "in").mkdir()
    texts = {name: [f"{name} {text} {name}" for text in documents(40, seed=seed)]
             for seed, name in enumerate(("AAA", "BBB", "CCC"))}  # fmt: skip
    for name, each in texts.items():
        write_jsonl(tmp_path / f"in/{name}.jsonl", each)
    line = ["-i", tmp_path / "in", "--tokenizer", byte_tokenizer, "-t", "pretrain", "--max_len", 65, "--doc_suffix", "",
            "--control_class", "AAA*=+1", "--control_class", "B*=-1", "--control_class", "*=0", *more]  # fmt: skip
    raw2ids(*line, "-o", tmp_path / "out")
    raw2ids(*line, "-o", tmp_path / "again", "--cores", 1)
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "again").keys()
    parts = {name: data for name, data in tree(tmp_path / "out").items() if name.endswith(".parquet")}
    assert all(tree(tmp_path / "again")[name] == data for name, data in parts.items())
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.further.types == {"control_class": "list<int32>"}
    for folder in [tmp_path / "out", *([tmp_path / "_eval/out"] if "--eval_fraction" in more else [])]:
        named = {path.parent.name: path for path in folder.glob("*/*.parquet")}
        assert {name[:3] for name in named} == {"AAA", "BBB", "CCC"}
        for row, classes in zip(rows_of(folder), rows_of(folder, "control_class"), strict=True):
            assert len(row) == len(classes)
        for stem, kind in (("AAA", 1), ("BBB", -1), ("CCC", 0)):
            found = [set(each) for path in folder.glob(f"{stem}*") for each in _classes(path)]
            assert found
            assert all(each == {kind} for each in found)


def _classes(folder: Path) -> list[list[int]]:
    import pyarrow.parquet as pq

    return [row for path in folder.glob("*.parquet") for row in pq.read_table(path)["control_class"].to_pylist()]


def test_chats_and_a_dry_run(tmp_path: Path, byte_tokenizer: Path) -> None:
    records = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
               for text in documents(30)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    line = ["-i", tmp_path / "a.jsonl", "--tokenizer", byte_tokenizer, "--chat_template", "chatml", "--max_len", 400,
            "--pad_to_multiple_of", 16, "--control_class", "*=random", "-o", tmp_path / "out"]  # fmt: skip
    dry = json.loads(raw2ids(*line, "--dry_run", "--json").stdout)
    raw2ids(*line)
    rows = list(zip(rows_of(tmp_path / "out"), rows_of(tmp_path / "out", "cu_seqlens"),
                    rows_of(tmp_path / "out", "control_class"), strict=True))  # fmt: skip
    firsts = [classes[0] for _, _, classes in rows]
    assert {-1: firsts.count(-1), 1: firsts.count(1)} == {
        -1: dry["control_classes"]["-1"],
        1: dry["control_classes"]["+1"],
    }
    for _, (*_, end), classes in rows:
        assert len(set(classes[:end])) == 1
        assert set(classes[end:]) <= {0}
    refused = raw2ids(*line[:-2], "-o", tmp_path / "other", "--control_class", "nothing*=1", check=False)
    assert refused.returncode == 2
    assert "fits none of the 1 input files" in refused.stderr
