"""What a run counts, and when it fails for what is bad."""

import json
import re
from pathlib import Path

from tests.data.raw2ids_runs import documents, raw2ids


def test_bad_records_are_counted_and_refused(tmp_path: Path, byte_tokenizer: Path) -> None:
    lines = [json.dumps({"text": text}) for text in documents(100)]
    lines[20:31] = ["{bad"] * 11
    source = tmp_path / "some.jsonl"
    source.write_text("\n".join(lines))
    arguments = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", "--stack"]
    refused = raw2ids(*arguments, check=False)
    assert refused.returncode == 2
    assert re.search(r"11 of 100 records.*some\.jsonl:21", refused.stderr)
    stopped = raw2ids(*arguments, "--on_error", "stop", "-C", check=False)
    assert stopped.returncode == 2
    assert "some.jsonl:21" in stopped.stderr
    raw2ids(*arguments, "--on_error", "skip")
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["documents"] == 89
    assert manifest["bad_records"]["bad JSON"]["count"] == 11
    assert len(manifest["bad_records"]["bad JSON"]["examples"]) == 5
