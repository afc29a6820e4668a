"""Engines: the fast one is used only where it is equal, and a difference found later makes the run start over."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.data.dataset.manifest import read_manifest
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.run import prepare
from jllm.data.tokenizer import checked_engine as engines
from jllm.data.tokenizer.backend import encoding_of, with_short_merges
from jllm.data.tokenizer.checked_engine import CheckedEngine, EngineMismatchError, open_engine, sample_of
from jllm.data.tokenizer.engines import FastEngine, ReferenceEngine
from jllm.data.tokenizer.facts import PROBES, load_tokenizer
from jllm.errors import UserError
from tests.data.raw2ids_runs import documents, reference_stream, rows_of, stacked, write_jsonl
from tests.data.tokenizers_for_tests import CORPUS, asset_tokenizers

ADVERSARIAL = [*PROBES[1:], *(f"{a}{b}{a}" for a in PROBES[3:12] for b in ("<|im_end|>", "</s>", " ", "\n"))]


def save(tokenizer: Any, folder: Path, **config: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def sentencepiece_like(folder: Path, scheme: str, *, split: bool = False) -> Path:
    """A BPE tokenizer with byte fallback and a Metaspace pre-tokenizer, as transformers makes of Llama 2."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    value = json.loads(trained.to_str())
    value["model"].update(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    value["added_tokens"] = value["added_tokens"][:3]
    value["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    tokenizer = Tokenizer.from_str(json.dumps(value))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return save(tokenizer, folder, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_is_rewritten_exactly(tmp_path: Path, scheme: str) -> None:
    folder = sentencepiece_like(tmp_path / "tokenizer", scheme)
    facts = load_tokenizer(str(folder))
    chosen = open_engine(facts)
    assert len(facts.prefix) == 1
    reference = open_engine(facts, "hf")
    for parse_special in (False, True):
        wanted = reference.encode(ADVERSARIAL, parse_special=parse_special)
        given = chosen.encode(ADVERSARIAL, parse_special=parse_special)
        assert all(np.array_equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert chosen.name == "fastokens"


@pytest.mark.parametrize("choice", ["auto", "hf"])
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_conversations_of_sentencepiece_like_tokenizers(tmp_path: Path, scheme: str, choice: str) -> None:
    from tests.data.chats import CONVERSATIONS, Chat

    facts = load_tokenizer(str(sentencepiece_like(tmp_path / "tokenizer", scheme)))
    template = "{%- for m in messages %}{{- m.role + ': ' + m.content + eos_token + '\\n' }}{%- endfor %}"
    chat = Chat(facts, open_engine(facts, choice, inert=True), template)
    for messages in CONVERSATIONS:
        ids, labels, bad = chat.encode([{"messages": messages}])
        assert not bad
        whole = "".join(f"{m['role']}: {m['content']}</s>\n" for m in messages)
        assert ids[0] == chat.reference.encode(whole, add_special_tokens=False).ids
        trained = "".join(text_of(chat, labels[0]).split())
        answers = "".join(m["content"] + "</s>" for m in messages if m["role"] == "assistant")
        assert trained == "".join(answers.split())


def text_of(chat: Any, labels: list[int]) -> str:
    """The trained tokens as text, put together from the vocabulary."""
    data = b""
    for index in labels:
        token = chat.reference.id_to_token(index) if index >= 0 else ""
        is_byte = len(token) == 6 and token.startswith("<0x")
        data += bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()
    return data.decode()


def test_what_the_fast_engine_refuses_runs_on_hf(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    folder = save(tokenizer, tmp_path / "unigram", unk_token="<unk>")
    facts = load_tokenizer(str(folder))
    assert open_engine(facts).name == "hf"
    with pytest.raises(UserError, match="fastokens"):
        open_engine(facts, "fastokens")


def test_real_tokenizers_are_equal() -> None:
    folders = asset_tokenizers()
    if not folders:
        pytest.skip("no real tokenizers: set JLLM_ASSETS")
    for folder in folders:
        facts = load_tokenizer(str(folder))
        chosen, reference = open_engine(facts), open_engine(facts, "hf")
        assert chosen.name == "fastokens"
        given, wanted = chosen.encode(ADVERSARIAL), reference.encode(ADVERSARIAL)
        assert all(np.array_equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_a_difference_found_on_the_way_starts_over(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = FastEngine.encode

    def lie(self: FastEngine, texts: list[str], *, parse_special: bool = False) -> Any:
        ids, offsets = encode(self, texts, parse_special=parse_special)
        return (ids ^ 1 if any("alpha" in text for text in texts) else ids), offsets

    monkeypatch.setattr(FastEngine, "encode", lie)
    texts = documents(100)
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    values: dict[str, Any] = {"input": (str(source),), "tokenizer": str(byte_tokenizer), "type": "pretrain"}
    values |= {"stack": True, "max_len": 65}
    prepare(Raw2IdsConfig(**values, output=tmp_path / "out"))
    assert "starting over with the hf engine" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == stacked(reference_stream(byte_tokenizer, texts), 65)[0]
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.extra["engine"]["name"] == "hf"
    assert "differs" in manifest.extra["engine"]["reason"]
    with pytest.raises(UserError, match="--engine auto or hf"):
        prepare(Raw2IdsConfig(**values, output=tmp_path / "forced", engine="fastokens"))


def test_a_difference_found_in_a_conversation_starts_over(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[{"user": text[:90]}, {"assistant": text[-90:]}] for text in documents(400)]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"input": (str(source),), "tokenizer": str(byte_tokenizer), "chat_template": "chatml"}
    prepare(Raw2IdsConfig(**values, output=tmp_path / "wanted", engine="hf"))
    encode = FastEngine.encode

    def lie(self: FastEngine, texts: list[str], *, parse_special: bool = False) -> Any:
        ids, offsets = encode(self, texts, parse_special=parse_special)
        return (ids ^ 1 if len(texts) > 500 else ids), offsets  # right in its proof, wrong in a block

    monkeypatch.setattr(FastEngine, "encode", lie)
    prepare(Raw2IdsConfig(**values, output=tmp_path / "out"))
    assert "starting over with the hf engine" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "wanted")
    with pytest.raises(UserError, match="--engine auto or hf"):
        prepare(Raw2IdsConfig(**values, output=tmp_path / "forced", engine="fastokens"))
    assert not list((tmp_path / "forced").glob("*.parquet"))


def test_checks_compare_with_the_reference(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    good = open_engine(facts)
    assert good.check(["some text", "more"]) == 2
    assert good.check([]) == 0
    reference = ReferenceEngine(facts.backend)

    class Wrong(FastEngine):
        def encode(self, texts: list[str], *, parse_special: bool = False) -> Any:
            ids, offsets = super().encode(texts, parse_special=parse_special)
            return ids + 1, offsets

    wrong = CheckedEngine(Wrong(facts.backend), reference, reason="", probes=0)
    with pytest.raises(EngineMismatchError):
        wrong.check(["some text"])
    assert sum(map(len, sample_of(["x" * 100_000]))) == engines.CHECK_CHARACTERS


def test_spellings_of_one_backend_mean_the_same(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    file = json.loads((byte_tokenizer / "tokenizer.json").read_text())
    file["model"]["merges"] = [" ".join(merge) for merge in file["model"]["merges"]]
    file["decoder"] = None
    assert encoding_of(json.dumps(file)) == encoding_of(facts.backend)
    file["normalizer"] = None
    assert encoding_of(json.dumps(file)) != encoding_of(facts.backend)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("odd", [",", '","', "],[", '"', "\\", "merges", '"merges":[[', "é"])
def test_short_merges_are_the_same_merges(byte_tokenizer: Path, odd: str, indent: int | None) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    value = json.loads(facts.backend)
    value["model"]["vocab"][odd] = len(value["model"]["vocab"])
    value["model"]["merges"] += [[odd, odd], [odd, "a"], ["a", odd]]
    short = json.loads(with_short_merges(json.dumps(value, indent=indent, ensure_ascii=indent is None)))
    assert all(isinstance(merge, str) for merge in short["model"]["merges"])
    short["model"]["merges"] = [merge.split(" ") for merge in short["model"]["merges"]]
    assert short == value


def test_merges_that_cannot_be_short_stay(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    value = json.loads(facts.backend)
    for last in (["a b", "c"], ["", "a b"], ["a"], "a b"):
        text = json.dumps({**value, "model": {**value["model"], "merges": [["a", "b"], last]}})
        assert with_short_merges(text) == text
    behind = json.dumps({"model": value["model"], "behind": [1]})
    assert with_short_merges(behind) == behind
    assert with_short_merges(json.dumps(value["added_tokens"])) == json.dumps(value["added_tokens"])
