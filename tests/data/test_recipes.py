"""The Python interface: what the documentation shows runs as it is shown, and makes the command's rows."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data import recipes
from tests.data.raw2ids_runs import documents, reference_stream, stacked

ROOT = Path(__file__).parents[2]
MODEL = "models/Qwen3-8B"


def example_of(text: str) -> str:
    """The indented example that imports `jllm.data.recipes`."""
    found = re.search(
        r"^(?:    import .*\n)*    from jllm\.data\.recipes import .*(?:\n(?:    .*)?)*", text, re.MULTILINE
    )
    assert found is not None
    return re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


@pytest.mark.parametrize("where", ["docs", "docstring"])
def test_the_example_runs_as_it_is_shown(
    byte_tokenizer: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The docstring's takes its batches from whoever calls it, the page's from a file."""
    text = (ROOT / "docs" / "raw2ids.md").read_text(encoding="utf-8") if where == "docs" else recipes.__doc__ or ""
    example = example_of(text)
    assert MODEL in example
    texts = documents(400)
    batches = [pa.RecordBatch.from_pydict({"text": [*texts[i : i + 90], None, " "]}) for i in range(0, 400, 90)]
    names: dict[str, Any] = {"batches": batches} if where == "docstring" else {}
    pq.write_table(pa.Table.from_batches(batches), tmp_path / "corpus.parquet")
    monkeypatch.chdir(tmp_path)
    exec(example.replace(MODEL, str(byte_tokenizer)), names)
    rows = [row for batch in names["rows"] for row in batch.to_pylist()]
    wanted, boundaries = stacked(reference_stream(byte_tokenizer, texts), 2048)
    assert [row["input_ids"] for row in rows] == wanted
    assert [row["cu_seqlens"] for row in rows] == boundaries


def test_the_interface_is_what_it_lists() -> None:
    assert recipes.__all__ == sorted(recipes.__all__)
    assert all(hasattr(recipes, name) for name in recipes.__all__)
