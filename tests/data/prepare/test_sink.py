"""Documents to files: compression, splits, and where a killed run goes on."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jllm.data.dataset.manifest import open_data_set
from jllm.data.prepare.config import CODECS
from tests.data.raw2ids_runs import documents, raw2ids, reference_stream, rows_of, write_jsonl


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_in_the_files(tmp_path: Path, byte_tokenizer: Path, codec: str) -> None:
    texts = documents(30)
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    raw2ids("-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", "-c", codec)
    (path,) = open_data_set(tmp_path / "out").paths
    assert path.name == f"some-00000-00000.{codec}.parquet"
    metadata = pq.ParquetFile(path).metadata
    found = {metadata.row_group(0).column(index).compression for index in range(metadata.num_columns)}
    assert found == {codec.upper()}
    assert rows_of(tmp_path / "out") == reference_stream(byte_tokenizer, texts)
