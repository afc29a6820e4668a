"""Two versions of jllm do the same: the one of a commit, and the one beside this script.

    python tools/compare_versions.py COMMIT
    python tools/compare_versions.py COMMIT --work FOLDER --only train

Runs both in processes of their own, by the commands that a user types, on the same inputs, and compares all that they
write. Nothing of the package is imported here; checkpoints of format 1 and 2 are read by a reader of this script's own.

    raw2ids-...    documents stacked and packed, chats unpacked and packed, each with a held-out part
    shuffle-mix    shuffle_datasets --mix
    repartition    the same shuffled folder, dealt
    train-...      runs on CPU, 2 stages: packed rows and tied embeddings (fp32), chats on two pipelines (bf16, ZeRO 1),
                   a mixture of experts and two weighted sets (fp32), dropout and recomputed activations (bf16)

Files must have the same names and bytes. Of a run, every record, the checkpoints in its middle and at its end, and the
exported folder must be the same to the bit; then the new version goes on from the old one's checkpoint in the middle,
and must arrive at the same. What is not compared stands in the `IGNORED_...` constants: versions, and how long things
took. Random states are compared where a run goes on: a fresh run draws those of dropout anew each time, so that the
run with dropout is compared from its middle on only. Both versions run on this machine; runs have data of the old one.

Prints a JSON line a comparison, progress goes to standard error. Exit code: 0 all is equal, 1 something differs, 2 it
could not begin. Needs a git checkout, and the tokenizers of `tools/get_assets.py`. Real text is taken from
`$JLLM_DATA`, where that has c4_demo.jsonl, tinyshakespeare.txt, chatalpaca-1k.jsonl, glaive_toolcall_en_demo.json;
otherwise from the help topics that every Python carries.

With `--work`, all that was made stays there, and what the old version made is used again by the next call, as long as
commit, inputs, packages and this script are the same. Cost: some minutes on two cores.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("JLLM_ASSETS") or Path.home() / ".cache" / "jllm-assets")
PACKAGES = ("torch", "transformers", "deepspeed", "tokenizers", "fastokens", "pyarrow", "numpy", "safetensors")
MARKER = ".compare_versions"
"""Says that a work folder is this script's, which may remove what is in it."""
MANIFEST_NAME = "_manifest.json"
IGNORED_MANIFEST = ("made_by.version",)
"""Everything else that a manifest says is compared; nothing in it is derived from the version, or from the time."""
IGNORED_METRICS = ("seconds", "tokens_per_second", "mfu", "data_wait", "memory_mib")
IGNORED_INDEX = ("format", "tensors")
"""Where tensors lie is each format's own business; what is in them is compared by name."""
RNG = "rng/"
MOST_SHOWN = 5
LONGEST_COMMAND = 900.0
STEPS, MIDDLE = 6, 3


class BrokenError(Exception):
    """A command failed, or what it left cannot be read: the comparison it belongs to fails."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two versions: where its code is, and where it works."""

    name: str
    source: Path
    folder: Path

    def environment(self) -> dict[str, str]:
        """For a command: this version alone, its own caches, and threads that do not depend on the machine."""
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        prefix = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
        extensions = caches / "jllm" / "torch_extensions" / prefix  # DeepSpeed's, which take a minute to build
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        return {
            "TORCH_EXTENSIONS_DIR": str(extensions),
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(self.source),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TQDM_DISABLE": "1",
        }

    def run(self, case: str, arguments: Sequence[str]) -> None:
        """A command in the folder of a case.

        Raises:
            BrokenError: it failed.
        """
        folder = self.folder / case
        folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "logs" / f"{case}.log"
        log.parent.mkdir(exist_ok=True)
        began = time.monotonic()
        with log.open("ab") as output:
            command = subprocess.Popen(
                arguments,
                cwd=folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = command.wait(LONGEST_COMMAND)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(command.pid, signal.SIGKILL)
                command.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise BrokenError(f"{self.name}: took longer than {LONGEST_COMMAND:.0f} s; see {log}") from None
                raise
        say(f"{case}: {self.name} took {time.monotonic() - began:.1f} s")
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line and line[:3] != "[20"]
            raise BrokenError(f"{self.name}: exit code {code}: {' | '.join(lines[-3:])}; see {log}")

    def once(self, name: str, work: Callable[[], None]) -> None:
        """Do something, unless it was done here completely before."""
        done = self.folder / "done" / name
        if not done.is_file():
            shutil.rmtree(self.folder / name, ignore_errors=True)
            work()
            done.parent.mkdir(exist_ok=True)
            done.touch()


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Both versions, what they work on, and what came out."""

    old: Side
    new: Side
    inputs: Path
    differing: list[str] = field(default_factory=list)

    @property
    def prepared(self) -> Path:
        """Data sets made by the old version, for the cases that need some."""
        return self.old.folder / "prepared"

    def report(self, name: str, compare: Callable[[], Iterable[str]]) -> None:
        """Make a comparison and print what came out."""
        try:
            differences = list(compare())
        except BrokenError as error:
            differences = [str(error)]
        except Exception as error:  # whatever a file that was written otherwise makes of its readers
            differences = [f"{type(error).__name__}: {error}"]
        if differences:
            self.differing.append(name)
        shown = differences[:MOST_SHOWN]
        if len(differences) > MOST_SHOWN:
            shown.append(f"... {len(differences)} in all")
        print(json.dumps({"name": name, "equal": not differences, "differences": shown}), flush=True)


@dataclass(frozen=True, kw_only=True)
class DataCase:
    """A data command. `{inputs}`, `{prepared}` and `{assets}` stand in its arguments for folders.

    Attributes:
        name: what it is called, and the folder it works in.
        module: the command.
        arguments: its options.
        copied: a prepared folder that is copied there first, for commands that change one in place.
    """

    name: str
    module: str
    arguments: str
    copied: str = ""

    def make(self, versions: Versions, side: Side) -> None:
        if self.copied:
            shutil.copytree(versions.prepared / self.copied, side.folder / self.name / self.copied)
        side.run(self.name, [sys.executable, "-m", self.module, *filled(self.arguments, versions)])

    def compare(self, versions: Versions) -> None:
        def differences() -> Iterator[str]:
            versions.old.once(self.name, lambda: self.make(versions, versions.old))
            self.make(versions, versions.new)
            yield from compare_folders(versions.old.folder / self.name, versions.new.folder / self.name)

        versions.report(self.name, differences)


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """A training run.

    Attributes:
        name: what it is called, and the folder it works in.
        model: its `config.json`, beside `MODEL`.
        processes: how many.
        arguments: options of the trainer, beside `TRAIN`.
        repeats: whether two fresh runs are the same, which those with dropout are not.
    """

    name: str
    model: dict[str, Any]
    processes: int
    arguments: str
    repeats: bool = True

    def make(self, versions: Versions, side: Side, *, resumed: bool = False) -> None:
        """Run it, from the start or from the old version's checkpoint in the middle."""
        case = f"{self.name}-resumed" if resumed else self.name
        model = side.folder / case / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({**MODEL, **self.model}), encoding="utf-8")
        launcher = ["--num_gpus", str(self.processes), "--master_port", str(free_port()), "--module", "jllm.train_pipe"]
        more = []
        if resumed:
            more = ["--resume_ckpt", str(versions.old.folder / self.name / "run"), "--tag", step_folder(MIDDLE)]
        side.run(case, ["deepspeed", *launcher, *filled(f"{TRAIN} {self.arguments}", versions), *more])

    def compare(self, versions: Versions) -> None:
        old, new = (side.folder / self.name for side in (versions.old, versions.new))
        resumed = versions.new.folder / f"{self.name}-resumed"
        middle, last = (Path("run", step_folder(step)) for step in (MIDDLE, STEPS))

        def from_the_start() -> Iterator[str]:
            versions.old.once(self.name, lambda: self.make(versions, versions.old))
            self.make(versions, versions.new)
            yield from compare_metrics(old, new, after=-1)

        def from_the_middle() -> Iterator[str]:
            versions.old.once(self.name, lambda: self.make(versions, versions.old))
            self.make(versions, versions.new, resumed=True)
            yield from compare_metrics(old, resumed, after=MIDDLE)

        if self.repeats:
            versions.report(f"{self.name}/metrics", from_the_start)
            versions.report(f"{self.name}/middle", lambda: compare_checkpoints(old / middle, new / middle))
            versions.report(f"{self.name}/last", lambda: compare_checkpoints(old / last, new / last))
            versions.report(f"{self.name}/export", lambda: compare_folders(old / "export", new / "export"))
        versions.report(f"{self.name}/resumed/metrics", from_the_middle)
        versions.report(
            f"{self.name}/resumed/last", lambda: compare_checkpoints(old / last, resumed / last, resumed=True)
        )
        versions.report(f"{self.name}/resumed/export", lambda: compare_folders(old / "export", resumed / "export"))


LLAMA2, QWEN3 = "{assets}/tokenizers/llama2", "{assets}/tokenizers/qwen3"
RAW2IDS, CHAT = "jllm.raw2ids", "--date 2026-01-31"
SPLIT = "-n 80 --batch_size 120 --eval_fraction 0.1 --quiet"

PREPARED = (
    "-i {inputs}/documents.jsonl -o sets/stacked -t pretrain --stack -n 80",
    "-i {inputs}/paragraphs.txt -o sets/packed -t pretrain --packing best_fit -n 80",
    f"-i {{inputs}}/chats.jsonl -o chats --chat_template llama-2 {CHAT} -n 80",
    "-i {inputs}/few.jsonl -o held -t pretrain --packing best_fit --max_rows 9",
)
PREPARED_ROWS = f"--tokenizer {LLAMA2} --max_len 129 --quiet"
MIX = "-d {prepared}/sets -o shuffled --mix stacked=1.5 --mix packed=0.5 -n 5"

DATA_CASES = (
    DataCase(
        name="raw2ids-stacked",
        module=RAW2IDS,
        arguments=f"-i {{inputs}}/documents.jsonl -i {{inputs}}/paragraphs.txt -o data/set --tokenizer {LLAMA2}"
        f" -t pretrain --stack --max_len 257 {SPLIT}",
    ),
    DataCase(
        name="raw2ids-best-fit",
        module=RAW2IDS,
        arguments=f"-i {{inputs}}/documents.jsonl -i {{inputs}}/paragraphs.txt -o data/set --tokenizer {QWEN3}"
        f" -t pretrain --packing best_fit --max_len 513 {SPLIT}",
    ),
    DataCase(
        name="raw2ids-chats",
        module=RAW2IDS,
        arguments=f"-i {{inputs}}/chats.jsonl -o data/set --tokenizer {LLAMA2} --chat_template llama-2 {CHAT}"
        f" --max_len 257 {SPLIT}",
    ),
    DataCase(
        name="raw2ids-chats-packed",
        module=RAW2IDS,
        arguments=f"-i {{inputs}}/chats.jsonl -i {{inputs}}/tools.json -o data/set --tokenizer {QWEN3} {CHAT}"
        f" --packing best_fit --filter --max_len 1024 {SPLIT}",
    ),
    DataCase(name="shuffle-mix", module="jllm.shuffle_datasets", arguments=MIX),
    DataCase(name="repartition", module="jllm.repartition", arguments="-d shuffled -n 2", copied="shuffled"),
)

MODEL = {
    "vocab_size": 32000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
TRAIN = (
    "--model model --init --pipe_parallel_size 2 --gradient_accumulation_steps 2 --per_device_train_batch_size 2"
    f" --max_steps {STEPS} --steps_per_checkpoint {MIDDLE} --steps_per_eval {MIDDLE} --eval_data held={{prepared}}/held"
    " --optimizer adamw --learning_rate 1e-2 --weight_decay 0.1 --num_warmup_steps 2 --checkpoint run -o export"
)
TRAIN_CASES = (
    TrainCase(
        name="train-packed",
        model={**LLAMA, "tie_word_embeddings": True},
        processes=2,
        arguments="--train_data {prepared}/sets/packed --block_mask --precision fp32",
    ),
    TrainCase(
        name="train-chats",
        model={**LLAMA, "tie_word_embeddings": False},
        processes=4,
        arguments="--train_data {prepared}/chats --precision bf16 --zero_stage 1",
    ),
    TrainCase(
        name="train-experts",
        model=EXPERTS,
        processes=2,
        arguments="--train_data {prepared}/sets/stacked --train_data {prepared}/sets/packed=1.5 --precision fp32"
        " --router_aux_loss_coef 0.02",
    ),
    TrainCase(
        name="train-dropout",
        model={**LLAMA, "tie_word_embeddings": True, "attention_dropout": 0.1},
        processes=2,
        arguments="--train_data {prepared}/chats --precision bf16 --checkpoint_grad_interval 1",
        repeats=False,
    ),
)
CASES: tuple[DataCase | TrainCase, ...] = (*DATA_CASES, *TRAIN_CASES)


def main() -> int:
    """Compare, and print; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", metavar="START_COMMIT", help="the version to compare with")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder for all that is made  [default: a temporary one]"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="cases whose name begins so; may be repeated")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("JLLM_DATA"),
        metavar="DIR",
        help="folder of real text  [default: $JLLM_DATA, else what Python carries]",
    )
    options = parser.parse_args()
    chosen = [case for case in CASES if case.name.startswith(tuple(options.only or [""]))]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)}: there are {', '.join(case.name for case in CASES)}")
    if not all((ASSETS / "tokenizers" / name).is_dir() for name in ("llama2", "qwen3")):
        parser.error(f"no tokenizers in {ASSETS}; get them with: python tools/get_assets.py --only tokenizers")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    with contextlib.ExitStack() as stack:
        if options.work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jllm-compare-")))
        else:
            work = options.work.resolve()
            if work.is_dir() and any(work.iterdir()) and not (work / MARKER).is_file():
                parser.error(f"--work {options.work}: there is something else in it; give a new folder")
        try:
            versions = set_up(work, options.commit, options.data)
        except BrokenError as error:
            parser.error(str(error))
        began = time.monotonic()
        for case in chosen:
            case.compare(versions)
        say(f"{time.monotonic() - began:.0f} s; differing: {', '.join(versions.differing) or 'nothing'}")
        return 1 if versions.differing else 0


def set_up(work: Path, commit: str, data: Path | None) -> Versions:
    """Both versions with empty folders, but for what the old one made earlier of the same things.

    Raises:
        BrokenError: there is no such commit, or the old version cannot make the data.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / MARKER).touch()
    for name in ("inputs", "new"):
        shutil.rmtree(work / name, ignore_errors=True)
    write_inputs(work / "inputs", data)
    revision = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").decode().strip()
    stamp = stamp_of(revision, work / "inputs")
    old_folder = work / "old"
    if not (old_folder / "stamp").is_file() or (old_folder / "stamp").read_text() != stamp:
        shutil.rmtree(old_folder, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", revision, "jllm"))) as archive:
            archive.extractall(old_folder / "source", filter="data")
        (old_folder / "stamp").write_text(stamp)
    versions = Versions(
        old=Side(name="old", source=old_folder / "source", folder=old_folder),
        new=Side(name="new", source=ROOT, folder=work / "new"),
        inputs=work / "inputs",
    )
    for side in (versions.old, versions.new):
        side.folder.mkdir(exist_ok=True)
        check_source(side)

    def prepare() -> None:
        for arguments in PREPARED:
            versions.old.run(
                "prepared", [sys.executable, "-m", RAW2IDS, *filled(f"{arguments} {PREPARED_ROWS}", versions)]
            )
        versions.old.run("prepared", [sys.executable, "-m", "jllm.shuffle_datasets", *filled(MIX, versions)])

    versions.old.once("prepared", prepare)
    return versions


def git(*arguments: str) -> bytes:
    """What git says of the repository that this script is in."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise BrokenError(f"git {' '.join(arguments)} failed: {done.stderr.decode().strip() or 'no such commit'}")
    return done.stdout


def stamp_of(revision: str, inputs: Path) -> str:
    """What decides what the old version makes."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(inputs.iterdir()):
        digest.update(path.read_bytes())
    found = {name: installed(name) for name in PACKAGES}
    return json.dumps({"commit": revision, "script and inputs": digest.hexdigest(), **found})


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_source(side: Side) -> None:
    """Raises:
    BrokenError: its commands would import another jllm.
    """
    command = [sys.executable, "-c", "import jllm; print(jllm.__file__)"]
    done = subprocess.run(command, cwd=side.folder, env=side.environment(), capture_output=True, text=True, check=False)
    if done.returncode or not Path(done.stdout.strip()).is_relative_to(side.source):
        raise BrokenError(
            f"{side.name}: jllm is imported from {done.stdout.strip() or done.stderr}, not from {side.source}"
        )


def write_inputs(folder: Path, data: Path | None) -> None:
    """The input files: real data where it is there, else what Python carries."""
    from pydoc_data.topics import topics  # type: ignore[import-not-found]

    folder.mkdir()
    texts: list[str] = [topics[name] for name in sorted(topics)]
    paragraphs = [part.strip() for text in texts for part in text.split("\n\n") if len(part) > 40]

    def real(name: str) -> str | None:
        path = data / name if data is not None else None
        if path is None or not path.is_file():
            say(f"{name} is not there: its part is made of help topics")
            return None
        return path.read_text(encoding="utf-8")

    web, plays = real("c4_demo.jsonl"), real("tinyshakespeare.txt")
    chats, calls = real("chatalpaca-1k.jsonl"), real("glaive_toolcall_en_demo.json")
    documents = web.splitlines() if web else [json.dumps({"text": text}) for text in texts]
    write_lines(folder / "documents.jsonl", documents[:240])
    write_lines(folder / "few.jsonl", documents[-4:])
    write_lines(folder / "paragraphs.txt", plays[:200_000].splitlines() if plays else ["\n\n".join(paragraphs[:900])])
    made = generated_chats(paragraphs, 240)
    write_lines(folder / "chats.jsonl", chats.splitlines()[:240] if chats else [json.dumps(chat) for chat in made])
    people = {"user": "human", "assistant": "gpt"}
    other = [
        {"conversations": [{"from": people[turn["role"]], "value": turn["content"]} for turn in chat["messages"]]}
        for chat in made
    ]
    write_lines(folder / "tools.json", [json.dumps((json.loads(calls) if calls else other)[:160])])


def generated_chats(paragraphs: Sequence[str], count: int) -> list[dict[str, list[dict[str, str]]]]:
    """Conversations of one to four turns, the same ones each time."""
    draw = random.Random(7)
    found = []
    for _ in range(count):
        messages = []
        for _ in range(draw.randint(1, 4)):
            answer = draw.choice(paragraphs)
            question = f"What does the manual say after: {' '.join(answer.split()[:6])}?"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found.append({"messages": messages})
    return found


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def filled(arguments: str, versions: Versions) -> list[str]:
    """Words of a command line, folders put in; those may have spaces."""
    folders = {"inputs": versions.inputs, "prepared": versions.prepared, "assets": ASSETS}
    return [word.format(**folders) for word in arguments.split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Comparing: each gives one line a difference.


def compare_folders(old: Path, new: Path) -> Iterator[str]:
    """All files below two folders: names, and bytes, or for manifests what they say."""
    names = [{path.relative_to(side).as_posix() for path in side.rglob("*") if path.is_file()} for side in (old, new)]
    if not names[0]:
        raise BrokenError(f"old: nothing was written to {old}")
    yield from only_in(*names)
    for name in sorted(names[0] & names[1]):
        contents = [(side / name).read_bytes() for side in (old, new)]
        if contents[0] == contents[1]:
            continue
        if Path(name).name == MANIFEST_NAME:
            values = [json.loads(content) for content in contents]
            yield from (f"{name}: {line}" for line in compare_values(*values, ignored=IGNORED_MANIFEST))
        else:
            sizes = [len(content) for content in contents]
            pairs = enumerate(zip(*contents, strict=False))
            first = next((place for place, (left, right) in pairs if left != right), min(sizes))
            yield f"{name}: differs from byte {first} on; {sizes[0]} and {sizes[1]} bytes"


def only_in(old: Iterable[str], new: Iterable[str]) -> Iterator[str]:
    """Names that one side has alone."""
    yield from (f"{name}: only in old" for name in sorted(set(old) - set(new)))
    yield from (f"{name}: only in new" for name in sorted(set(new) - set(old)))


def compare_values(old: Any, new: Any, *, ignored: Sequence[str] = (), place: str = "") -> Iterator[str]:
    """JSON values; `ignored` are places in them, such as "made_by.version"."""
    if place in ignored:
        return
    prefix = f"{place}." if place else ""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [[key for key in value if f"{prefix}{key}" not in ignored] for value in (old, new)]
        yield from (f"{prefix}{line}" for line in only_in(*names))
        for key in names[0]:
            if key in new:
                yield from compare_values(old[key], new[key], ignored=ignored, place=f"{prefix}{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from compare_values(left, right, ignored=ignored, place=f"{prefix}{index}")
    elif repr(old) != repr(new):  # floats to the last bit, and 1 is not 1.0 or true
        yield f"{place}: {old!r:.120} and {new!r:.120}"


def compare_metrics(old: Path, new: Path, *, after: int) -> Iterator[str]:
    """The records of two runs, in order, of the steps after one."""
    records = [
        [record for record in map(json.loads, lines.splitlines()) if record["step"] > after]
        for lines in ((side / "run" / "log" / "metrics.jsonl").read_text(encoding="utf-8") for side in (old, new))
    ]
    ours = records[0]
    evaluations = sum("eval_loss" in record for record in ours)
    wanted = STEPS - max(after, 0)
    if len(ours) - evaluations != wanted or evaluations < wanted // MIDDLE:
        raise BrokenError(
            f"old: {len(ours)} records, {evaluations} of them evaluations, are not those of {wanted} steps"
        )
    if len(records[0]) != len(records[1]):
        yield f"{len(records[0])} and {len(records[1])} records"
    for left, right in zip(*records, strict=False):
        kind = f"evaluation {left['name']}" if "eval_loss" in left else "training"
        for line in compare_values(left, right, ignored=IGNORED_METRICS):
            yield f"step {left['step']}, {kind}: {line}"


def compare_checkpoints(old: Path, new: Path, *, resumed: bool = False) -> Iterator[str]:
    """Two checkpoints: what their indices say of the run, and every tensor by name. A new index may say more.

    `resumed`: the new one's run went on from one of the old's. Its options say so and are not compared, but the random
    states are.
    """
    import torch

    (index, tensors), (new_index, new_tensors) = read_checkpoint(old), read_checkpoint(new)
    said = {key: value for key, value in new_index.items() if key in index}
    yield from compare_values(index, said, ignored=(*IGNORED_INDEX, *(("config",) if resumed else ())))
    if not resumed:
        tensors, new_tensors = ({k: t for k, t in found.items() if RNG not in k} for found in (tensors, new_tensors))
    kinds = {key.split("/")[0] for key in tensors}
    if not {"weight", "exp_avg", "exp_avg_sq"} <= kinds:
        raise BrokenError(f"old: a checkpoint of AdamW has more than {sorted(kinds)}")
    yield from only_in(tensors, new_tensors)
    for key in sorted(tensors.keys() & new_tensors.keys()):
        left, right = tensors[key], new_tensors[key]
        if left.shape != right.shape or left.dtype != right.dtype:
            yield f"{key}: {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}"
            continue
        flat, other = left.reshape(-1), right.reshape(-1)
        size = left.element_size()
        unequal = (flat.view(torch.uint8) != other.view(torch.uint8)).reshape(-1, size).any(1).nonzero()
        if len(unequal):
            first = int(unequal[0])
            values = f"{flat[first].item()!r} and {other[first].item()!r}"
            yield f"{key}: {len(unequal)} of {flat.numel()} elements differ; the first is {first}: {values}"


# The one place that knows how checkpoints lie on disk.


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The index of a checkpoint, and its whole tensors by "<kind>/<name>", with "rank-...: rng/..." beside them.

    Format 1: a part is the elements [start, stop) of the flattened tensor. Format 2: a part is a rectangle, at
    `offset` with `extent`, and of its elements, row by row, those of [start, stop). Format 1 is format 2 with the whole
    tensor for a rectangle.

    Raises:
        BrokenError: another format; elements that no part has; parts that do not agree, or are not as long as they say.
    """
    import torch
    from safetensors import safe_open

    if not (folder / "index.json").is_file():
        raise BrokenError(f"there is no checkpoint {folder}")
    index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if index["format"] not in (1, 2):
        raise BrokenError(f"{folder}: checkpoint format {index['format']}")
    tensors: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {
            path.name: stack.enter_context(safe_open(path, framework="pt")) for path in folder.glob("*.safetensors")
        }
        for key, entry in index["tensors"].items():
            shape = entry["shape"]
            whole = filled_in = torch.empty(0)
            for number, part in enumerate(entry["parts"]):
                content = files[part["file"]].get_tensor(part.get("key", key))
                if number == 0:
                    whole = torch.zeros(shape, dtype=content.dtype)
                    filled_in = torch.zeros(shape, dtype=torch.bool)
                offset, extent = (part["offset"], part["extent"]) if index["format"] == 2 else ([0] * len(shape), shape)
                run = slice(part["start"], part["stop"])
                place = tuple(slice(first, first + size) for first, size in zip(offset, extent, strict=True))
                values, present = whole[place].flatten(), filled_in[place].flatten()
                if content.dim() != 1 or values[run].shape != content.shape or content.dtype != whole.dtype:
                    raise BrokenError(f"{folder}: {key}: {part['file']} has {list(content.shape)} for {part}")
                both = present[run]
                if not torch.equal(values[run][both], content[both]):
                    raise BrokenError(f"{folder}: {key}: {part['file']} and another part do not agree")
                values, present = values.clone(), present.clone()  # flatten may have given a view
                values[run], present[run] = content, True
                whole[place], filled_in[place] = values.view(extent), present.view(extent)
            if not entry["parts"] or not bool(filled_in.all()):
                raise BrokenError(f"{folder}: {key}: {int((~filled_in).sum())} elements are in no part")
            tensors[key] = whole
        for name, file in files.items():
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.startswith(RNG):
                    tensors[f"{name}: {key}"] = file.get_tensor(key)
    return index, tensors


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


if __name__ == "__main__":
    sys.exit(main())
