"""What a tokenizer is, without importing torch or transformers into the process that uses it.

The truth about a tokenizer is what `AutoTokenizer.from_pretrained(folder)` does: for some models that differs from the
`tokenizer.json` beside it. Importing AutoTokenizer takes seconds and, where torch is installed, imports torch. So a
short-lived child process loads it, with torch hidden, and hands back its serialised backend together with
everything else that the data commands need (`TokenizerFacts`), including the ids that it gives for difficult strings,
which the engines of `jllm.data.tokenizer.checked_engine` are held to.

Guarantees: the hash is that of the serialised backend; nothing is read from `tokenizer.json` directly.
Cost: some seconds and some hundred MB in the child, while this process is free to do something else.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllm import children
from jllm.data.tokenizer import cache, fast_json
from jllm.data.tokenizer.broken_files import broken_file
from jllm.errors import UserError
from jllm.guards import notation

if TYPE_CHECKING:
    from jllm.data.dataset import manifest

HUB_TIMEOUT = 4.0

PROBES: tuple[str, ...] = (
    "",
    " ",
    "\n",
    "a",
    " a",
    "  two  spaces  ",
    "The quick brown fox jumps over the lazy dog. 1234567890 3.14159 1,000,000",
    "def f(x):\n\treturn x ** 2  # comment\n\n\n    if x:\r\n        pass\n",
    "I'm you're WE'VE he'LL they'd don't l'été ’s ‘quoted’ “text”",
    "e\u0301 é a\u0308\u0323 \u1100\u1161\u11a8 각 ﬁ Å \u212b \u0958 \u2126",
    "a\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308b",
    "x\U0001e8d0y \U00010d6d z\u1ace \u0898",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪🇫🇷 ❤️ 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "日本語の文章です。中文没有空格，한국어 문장입니다。ไทย ไม่มี ช่องว่าง",
    "العربية نص عادي עברית हिन्दी বাংলা தமிழ் ქართული ελληνικά кириллица",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f",
    "\u00a0\u1680\u2000\u2003\u2009\u200b\u200c\u200e\u2028\u2029\u202f\u205f\u2060\u3000\ufeff",
    "a" * 300,
    " " * 300,
    "\n" * 300,
    "\t" * 77 + " \t" * 50,
    "=" * 300,
    "ab" * 150,
    "é" * 300,
    "漢" * 300,
    "0" * 300,
    "!?" * 150,
    "▁▁a▁ b ▁",
    "Ġa Ċ âĢĻ <0x0A> <0xFF> ##a @@ </w>",
    "\ufffd\ufffe\uffff\U0010ffff\ue000",
    "https://example.com/a?b=c&d=%20#e user@example.org C:\\dir\\file.txt",
    '{"key": [1, 2.5e-3, null, true], "nested": {"a": "\\u00e9\\n"}}',
    "<div class='a'>&nbsp;</div><!-- x --> [INST] <<SYS>> ### User: <s > < /s>",
    "mixedCASE camelCase snake_case kebab-case SCREAMING_CASE iPhone15Pro",
)
"""Strings on which tokenizer engines are known to differ; strings made of the tokenizer's own tokens are added to
them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What the data commands need to know about a tokenizer.

    Attributes:
        name: base name of the folder, or the hub name.
        path: what was given to AutoTokenizer.
        backend: the serialised fast backend (the text of a tokenizer.json), or None for a tokenizer that has none.
        pre_tokenizer: of `backend`; None where there is none.
        vocab_size: number of ids, added tokens included.
        sha256: of `backend`, in hex.
        vocabulary_sha256: of the vocabulary and the added tokens, in hex.
        prefix, suffix: the ids that the tokenizer itself puts around a text.
        eos_id, pad_id: None where the tokenizer has none.
        special_tokens: name → text, such as {"bos_token": "<s>"}; what chat templates may use.
        added: added tokens as in `tokenizer.json`: content, id, special, normalized, lstrip, rstrip, single_word.
        chat_template: the tokenizer's own, the default one where there are several; or None.
        chat_templates: name → source where there are several, as transformers reads them; else empty.
        probes: difficult strings; `probe_ids` the ids of each with special tokens as ordinary text, `probe_special_ids`
            with special tokens parsed, both without prefix and suffix.
    """

    name: str
    path: str
    backend: str | None
    pre_tokenizer: dict[str, Any] | None
    vocab_size: int
    sha256: str
    vocabulary_sha256: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    eos_id: int | None
    pad_id: int | None
    special_tokens: dict[str, str]
    added: tuple[dict[str, Any], ...]
    chat_template: str | None
    probes: tuple[str, ...]
    probe_ids: tuple[tuple[int, ...], ...]
    probe_special_ids: tuple[tuple[int, ...], ...]
    transformers_version: str
    tokenizers_version: str
    chat_templates: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def for_manifest(self) -> "manifest.Tokenizer":
        from jllm.data.dataset import (
            manifest,  # which imports Arrow; the child that loads a tokenizer starts sooner without
        )

        return manifest.Tokenizer(
            name=self.name,
            vocab_size=self.vocab_size,
            sha256=self.sha256,
            vocabulary_sha256=self.vocabulary_sha256,
            probe_ids={
                text: list(ids) for text, ids in zip(self.probes, self.probe_ids, strict=True) if text in PROBES
            },
            added_tokens={token["content"]: token["id"] for token in self.added},
        )

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(token["id"] for token in self.added if token["special"])


_ASKED = tuple(field.name for field in dataclasses.fields(TokenizerFacts))


class TokenizerLoading:
    """A child process that is loading a tokenizer; `result` waits for it. Starting early hides the time it takes.

    Args:
        name: a Hugging Face folder, or the name of one on the hub.
        trust_remote_code: run the tokenizer's own Python code where its folder has some.
    """

    def __init__(self, name: str, *, trust_remote_code: bool = False) -> None:
        self.name = name
        folder = Path(name)
        if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists()):
            raise UserError(f"--tokenizer {name}: no such folder; give a Hugging Face folder or the name of one")
        try:
            self._key, self._entry = _look_up(name, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise UserError(f"--tokenizer {name}: {error.filename}: {error.strerror}") from None
        if self._key in _loaded:
            return
        arguments = json.dumps({"name": name, "trust_remote_code": trust_remote_code})
        self._child = subprocess.Popen(
            children.python("-c", "from jllm.data.tokenizer import facts; facts.serve()", arguments),
            env=children.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def result(self) -> TokenizerFacts:
        """The facts.

        Raises:
            UserError: there is no such tokenizer, or it cannot be loaded; the message names the file that is broken,
                or is the library's last line.
        """
        if self._key in _loaded:
            return _loaded[self._key]
        output, errors = self._child.communicate()
        if self._child.returncode != 0 or not output:
            lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
            reason = lines[-1] if lines else f"the loader ended with code {self._child.returncode}"
            folder = Path(self.name)
            broken = broken_file(folder) if folder.is_dir() else None
            if broken is not None:
                raise UserError(f"--tokenizer {self.name}: {broken[:400]}; copy the file again")
            others = [path.name for path in folder.glob("*.model")] if not (folder / "tokenizer.json").is_file() else []
            hint = f"; {others[0]} alone may need: pip install sentencepiece tiktoken" if others else ""
            raise UserError(
                f"--tokenizer {self.name}: cannot be loaded; give a folder with a tokenizer that"
                f" AutoTokenizer.from_pretrained reads, or its name on the hub ({reason[:300]}){hint}"
            )
        facts = _facts_of(fast_json.loads(output))
        if self._entry is not None:
            cache.write(self._entry, output)
        if self._key is not None:
            _loaded[self._key] = facts
        return facts

    @property
    def known(self) -> TokenizerFacts | None:
        """The facts, where they are there already."""
        return _loaded.get(self._key)

    def cancel(self) -> None:
        """End the child; for a caller that failed before it needed the result."""
        if self._key not in _loaded and self._child.poll() is None:
            self._child.kill()
            self._child.communicate()


def _facts_of(values: dict[str, Any]) -> TokenizerFacts:
    """Facts out of JSON, which has lists where they have tuples."""
    values = dict(values)
    for key in ("prefix", "suffix", "added", "probes"):
        values[key] = tuple(values[key])
    for key in ("probe_ids", "probe_special_ids"):
        values[key] = tuple(tuple(ids) for ids in values[key])
    return TokenizerFacts(**values)


def _known_facts(values: dict[str, Any]) -> TokenizerFacts | None:
    """Facts out of the cache; None where they are not what this version keeps: other fields, or of other types."""
    try:
        facts = _facts_of(values)
        are_texts = all(isinstance(values[key], str) for key in ("name", "path", "sha256", "vocabulary_sha256"))
        return facts if are_texts and all(fits(values[key]) for key, fits in _FITS.items()) else None
    except (TypeError, KeyError, ValueError, RecursionError):
        return None


_FITS: dict[str, Callable[[Any], bool]] = {
    "backend": lambda value: value is None or isinstance(value, str),
    "pre_tokenizer": lambda value: value is None or isinstance(value, dict),
    "vocab_size": lambda value: type(value) is int and value >= 0,
    "special_tokens": lambda value: isinstance(value, dict),
    "chat_template": lambda value: value is None or isinstance(value, str),
    "chat_templates": lambda value: isinstance(value, dict),
    "added": lambda value: all(isinstance(token, dict) for token in value),
    **{key: lambda value: value is None or type(value) is int for key in ("eos_id", "pad_id")},
    **{key: lambda value: all(type(each) is int for each in value) for key in ("prefix", "suffix")},
    **{
        key: lambda value: all(type(each) is int for ids in value for each in ids)
        for key in ("probe_ids", "probe_special_ids")
    },
}


_loaded: dict[Any, TokenizerFacts] = {}
"""What this process has loaded, by the state of the folder."""


def _look_up(name: str, *, trust_remote_code: bool) -> tuple[Any, Path | None]:
    """What stands for a tokenizer in `_loaded`, where it is afterwards if an earlier command kept it; and where it is
    kept.

    Raises:
        OSError: a file of it cannot be read.
    """
    folder = Path(name)
    key = _state_of(folder, trust_remote_code)
    if key in _loaded or key is None or trust_remote_code:
        return key, None
    entry = cache.entry_of(folder, (PROBES, _ASKED))
    kept = cache.read(entry) if entry is not None else None
    known = _known_facts(kept) if kept is not None else None
    if known is not None:
        _loaded[key] = dataclasses.replace(known, name=base_name(name), path=name)
    return key, entry


def known_facts(name: str) -> TokenizerFacts | None:
    """The facts about the tokenizer in a folder, where an earlier command kept them; a mistake is told by who loads
    it."""
    try:
        return _loaded.get(_look_up(name, trust_remote_code=False)[0])
    except OSError:
        return None


def _state_of(folder: Path, trust_remote_code: bool) -> Any:
    """Stands for the content of a tokenizer's folder; None for a name on the hub, which is looked up each time."""
    if not folder.is_dir():
        return None
    files = [path for path in cache.files_of(folder) if path.suffix not in (".safetensors", ".bin")]
    states = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return str(folder.resolve()), tuple(states), trust_remote_code


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> TokenizerFacts:
    """The facts about a tokenizer; see `TokenizerLoading`."""
    return TokenizerLoading(name, trust_remote_code=trust_remote_code).result()


def base_name(name: str) -> str:
    """What people call a tokenizer: the last part of its folder or hub name."""
    folder = Path(name)
    return folder.resolve().name if folder.is_dir() else name.rstrip("/").rsplit("/", 1)[-1]


def serve() -> None:
    """The child: print the facts about the tokenizer named on the command line, as JSON."""
    request = notation.loads(sys.argv[1])
    if not request["trust_remote_code"]:
        # A module that is None counts as not installed: the tokenizers need none of torch, and importing it takes 2-4
        # s.
        sys.modules["torch"] = None  # type: ignore[assignment]
    _be_quick_where_there_is_no_hub(request["name"])
    facts = _facts(request["name"], request["trust_remote_code"])
    sys.stdout.buffer.write(fast_json.dumps(dataclasses.asdict(facts)).encode())
    sys.stdout.flush()


def _be_quick_where_there_is_no_hub(name: str) -> None:
    """Look in the local cache only when the hub does not answer: its client would retry for most of a minute."""
    if Path(name).is_dir():
        return
    import http.client
    import urllib.error
    import urllib.request

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(f"{hub}/{name}/resolve/main/tokenizer_config.json", timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answers; let its client say what is wrong
    except (OSError, ValueError, http.client.HTTPException):
        os.environ["HF_HUB_OFFLINE"] = "1"


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """What transformers notices about a tokenizer stays out of the lines of a command: its notices are about settings
    that concern none of them, or are said by jllm itself."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


def auto_tokenizer(name: str, *, trust_remote_code: bool) -> Any:
    """What AutoTokenizer makes of a folder or hub name, without a word."""
    import transformers

    with without_notices():
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def _facts(name: str, trust_remote_code: bool) -> TokenizerFacts:
    import tokenizers
    import transformers

    tokenizer = auto_tokenizer(name, trust_remote_code=trust_remote_code)
    backend = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "backend_tokenizer", None) else None
    parsed: dict[str, Any] = fast_json.loads(backend) if backend else {"pre_tokenizer": None}
    added = tuple(parsed["added_tokens"]) if backend else _added_of_slow(tokenizer)
    probes = PROBES + _probes_of(added)
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    template = tokenizer.chat_template
    named: dict[str, str] = template if isinstance(template, dict) else {}
    if named:
        template = named.get("default")
    if not isinstance(template, str):
        template = None

    def encoded(ordinary: bool) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=ordinary).input_ids) for text in probes
        )

    specials = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return TokenizerFacts(
        name=base_name(name),
        path=name,
        backend=backend,
        pre_tokenizer=parsed["pre_tokenizer"],
        vocab_size=len(tokenizer),
        sha256=hashlib.sha256((backend or _identity_of_slow(tokenizer)).encode()).hexdigest(),
        vocabulary_sha256=_identity_of_vocabulary(tokenizer, added),
        prefix=tuple(whole[:start]),
        suffix=tuple(whole[start + len(bare) :]),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        special_tokens=specials,
        added=added,
        chat_template=template,
        chat_templates=named,
        probes=probes,
        probe_ids=encoded(True),
        probe_special_ids=encoded(False),
        transformers_version=transformers.__version__,
        tokenizers_version=tokenizers.__version__,
    )


def _probes_of(added: tuple[dict[str, Any], ...]) -> tuple[str, ...]:
    """Strings made of a tokenizer's own added tokens: alone, in words, among spaces, doubled, cut short."""
    probes: list[str] = []
    for content in [token["content"] for token in added[:8] + added[-8:]]:
        probes += [content, f"x{content}y", f" {content} ", f"{content}{content}\n{content[:-1]}", f"a {content}\n\n b"]
    return tuple(dict.fromkeys(probes))


def _added_of_slow(tokenizer: Any) -> tuple[dict[str, Any], ...]:
    """The added tokens of a tokenizer without a fast backend, in the form of `tokenizer.json`."""
    names = ("content", "special", "normalized", "lstrip", "rstrip", "single_word")
    return tuple(
        {"id": index, **{name: getattr(token, name) for name in names}}
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    )


def _identity_of_vocabulary(tokenizer: Any, added: tuple[dict[str, Any], ...]) -> str:
    """sha256 of which text has which id, and which of them are added or special, whatever the library's version."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    marked = sorted((token["id"], token["content"], bool(token["special"])) for token in added)
    return hashlib.sha256(json.dumps([vocabulary, marked]).encode()).hexdigest()


def _identity_of_slow(tokenizer: Any) -> str:
    """Stands for the serialised backend of a tokenizer that has none: its class, vocabulary and added tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return json.dumps([type(tokenizer).__name__, vocabulary, _added_of_slow(tokenizer)])
