"""Walk every causal model type of the installed transformers through a pipeline and write what works.

Each type is built tiny and random, then compared whole against two and three chained stages: loss and every gradient,
with plain and with packed rows, then saved by its stages and loaded by plain transformers. Kernels that know documents
by their lengths are compared with the default one, windows and the like narrower than the rows. The head alone is
compared with the whole forward, a loss fused with it with one that is not, and compiled layers with layers as they are.
Where layers can be cut between attention and mlp is searched, and stages cut there are compared with the whole model.
So are slices on several processes, and rows that these share.
The result goes to `jllm/models/families.json` (what `jllm models` shows) and `docs/families.md`. A type that crashes or
hangs costs a worker process, not the run. Takes about half an hour on two cores, most of it for the compiler.

    python tools/test_families.py            every type; exit code 1 if one failed
    python tools/test_families.py llama opt  these only; their lines are written anew
    python tools/test_families.py --compiled [llama ...]   of types that pass, only what is compiled, anew
    python tools/test_families.py --halves [llama ...]     likewise only what half layers are shown to do; some minutes
    python tools/test_families.py --slices [llama ...]     what slices do (tensor parallelism); a quarter of an hour
    python tools/test_families.py --rows [llama ...]       what shared rows do (sequence parallelism); some minutes
    python tools/test_families.py --jobs 8   so many at a time

A type that a renewal of a column does not get to, because it is interrupted, keeps its line.
"""

import argparse
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jllm import children  # noqa: E402
from jllm.errors import UserError  # noqa: E402
from jllm.models.families import (  # noqa: E402
    CATALOGUE,
    NAMED,
    NOT_SLICED,
    REFUSED,
    VOCABULARY,
    Family,
    catalogue,
)

TIMEOUT = 600


def walk_one(model_type: str) -> Family:
    """Build, split, compare and export one type, in this process."""
    import torch
    from transformers.utils import logging

    from jllm.models.families import check_split
    from jllm.models.pipeline.costs import estimate_costs
    from jllm.models.pipeline.span import StageSpan
    from tests.models.compiled_check import how_compiled
    from tests.models.family_check import (
        compare_family,
        head_is_apart,
        head_is_plain,
        isolates_documents,
        kernels_by_lengths,
        load_whole,
        make_folder,
    )
    from tests.models.half_check import how_halved
    from tests.models.share_check import how_shared
    from tests.models.slice_check import how_sliced
    from tests.models.tiny import has_plan, tiny_config

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    plan = has_plan(model_type)

    def result(status: str, shown: str, **more: Any) -> Family:
        return Family(model_type=model_type, status=status, shown=shown, has_plan=plan, **more)

    try:
        if model_type in REFUSED:
            return result("refused", REFUSED[model_type])
        config = tiny_config(model_type)
        # Asked before the model is built: what is refused by its configuration may be too large to build.
        check_split(config, StageSpan(index=0, count=2, first_layer=0, end_layer=1))
        with tempfile.TemporaryDirectory() as folder:
            whole, saved = Path(folder) / "whole", Path(folder) / "saved"
            make_folder(config, whole)
            model = load_whole(whole)
            difference = compare_family(model, whole, saved)
            estimate_costs(config, sequence_length=16)  # the stage table of a run
            if not difference.is_equal:
                return result("failed", f"differs from the whole model: {difference}")
            isolates = isolates_documents(model)
            # Rows of the others are whole documents, for which SDPA is as good.
            by_lengths = kernels_by_lengths(model_type) if isolates else "none"
            is_apart = head_is_apart(whole, config)
            is_plain = is_apart and head_is_plain(whole, config)
            compiled = how_compiled(whole, config)
            halves, not_halved = how_halved(whole, config)
            slices = how_sliced(whole)
            rows = how_shared(whole)
    except UserError as refusal:
        return result("refused", _reason(str(refusal)))
    except Exception as error:
        return result("failed", f"{type(error).__name__}: {error}".replace("\n", " ")[:160])
    tie = "tied" if getattr(config, "tie_word_embeddings", False) else "untied"
    shown = f"2 and 3 stages = whole model, {tie}; export = source"
    heads = {"head_apart": is_apart, "plain_head": is_plain}
    facts = {"isolates_documents": isolates, "by_lengths": by_lengths, **heads, "compiled": compiled}
    facts |= {"halves": halves, "not_halved": not_halved, **slices, "shared_rows": rows}
    return result("pass", shown, **facts)


def _reason(message: str) -> str:
    """The part of a refusal that is about the model, not about this run."""
    return message.partition(": ")[2].partition("; ")[0] or message


def compile_one(known: Family) -> Family:
    """The line of a type that passes, with what its compiled layers are now shown to do."""
    from tests.models.compiled_check import how_compiled

    with _made(known.model_type) as (folder, config):
        return replace(known, compiled=how_compiled(folder, config))


def halve_one(known: Family) -> Family:
    """The same with what its half layers are shown to do."""
    from tests.models.half_check import how_halved

    with _made(known.model_type) as (folder, config):
        halves, not_halved = how_halved(folder, config)
        return replace(known, halves=halves, not_halved=not_halved)


@contextlib.contextmanager
def _made(model_type: str) -> Iterator[tuple[Path, Any]]:
    """The folder of a tiny model of a type, and its configuration."""
    import torch
    from transformers.utils import logging

    from tests.models.family_check import make_folder
    from tests.models.tiny import tiny_config

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    config = tiny_config(model_type)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(config, Path(folder) / "whole")
        yield Path(folder) / "whole", config


def slice_one(known: Family) -> Family:
    """The same with what its slices are shown to do (tensor parallelism)."""
    from tests.models.slice_check import how_sliced

    with _made(known.model_type) as (folder, _):
        return replace(known, **how_sliced(folder))


def share_one(known: Family) -> Family:
    """The same with what rows that processes share are shown to do (sequence parallelism)."""
    from tests.models.share_check import how_shared

    with _made(known.model_type) as (folder, _):
        return replace(known, shared_rows=how_shared(folder))


RENEWALS = {"compiled": compile_one, "halves": halve_one, "slices": slice_one, "rows": share_one}
"""Columns that can be renewed alone."""


def walk_many(model_types: Sequence[str], jobs: int, flags: Sequence[str]) -> Iterator[Family]:
    """The same by several workers at a time, in the order in which they come."""
    found: queue.Queue[Family | None] = queue.Queue()

    def walk(part: Sequence[str]) -> None:
        for family in walk_apart(part, flags):
            found.put(family)
        found.put(None)

    for number in range(jobs):
        threading.Thread(target=walk, args=(model_types[number::jobs],), daemon=True).start()
    left = jobs
    while left:
        family = found.get()
        if family is None:
            left -= 1
        else:
            yield family


def walk_apart(model_types: Sequence[str], flags: Sequence[str] = ()) -> Iterator[Family]:
    """All of them in a worker process, which is replaced when a type takes it down or hangs it."""
    pending = list(model_types)
    while pending:
        command = children.python(__file__, "--worker", *flags, *pending)
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as worker,
        ):
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_forward_lines, args=(worker, lines), daemon=True).start()
            try:
                while pending and (line := lines.get(timeout=TIMEOUT)):
                    if line.startswith('{"model_type"'):
                        yield Family.of(json.loads(line))
                        pending.pop(0)
                reason = "the process ended"
            except queue.Empty:
                reason = f"no result in {TIMEOUT} s"
            worker.kill()
            if pending:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [""])[-1]
                yield Family(model_type=pending.pop(0), status="failed", shown=f"{reason} {last}"[:160], has_plan=False)


def _forward_lines(worker: subprocess.Popen[str], lines: "queue.Queue[str]") -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put("")


def write_table(version: str, families: Sequence[Family]) -> None:
    """The two files that state what works."""
    stored = {"transformers": version, "families": [asdict(family) for family in families]}
    CATALOGUE.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    counts = {status: sum(family.status == status for family in families) for status in ("pass", "refused", "failed")}
    planned = [family for family in families if family.has_plan]
    lines = [
        "# Model families",
        "",
        f"Written by `make test-families` with transformers {version}: {len(families)} causal model types, "
        f"{counts['pass']} pass, {counts['refused']} refused, {counts['failed']} failed. Of the {len(planned)} with a "
        f"pipeline plan, {sum(family.status == 'pass' for family in planned)} pass. "
        f"Heads: {sum(family.head_apart for family in families)} apart, "
        f"of which {sum(family.plain_head for family in families)} plain. "
        f"Half layers: {sum(bool(family.halves) for family in families)}. "
        f"Slices: {sum(family.in_slices not in ('', NOT_SLICED) for family in families)}, of which "
        f"{sum(family.in_slices == VOCABULARY for family in families)} of the vocabulary alone. "
        f"Shared rows: {sum(family.in_rows == 'yes' for family in families)}.",
        "",
        "*Pass*: a tiny random model of the type, cut into two and into three stages, has the whole model's loss and "
        "gradients (fp32, 1e-5), with plain rows and, where the type takes them, with packed rows; what its stages "
        "save, plain `from_pretrained` loads "
        "with equal logits. *Refused*: more than one pipeline stage is an error that says why; one stage works where "
        "the type is a decoder. *Documents apart*: with `--block_mask`, a document's logits in a packed row are those "
        "that it has alone. *By lengths*: which attention kernels that build no mask, and know documents by their "
        "lengths, have the default kernel's loss and gradients (fp32, 1e-4) with plain and with packed rows, windows "
        "and the like narrower than the rows: `varlen` and flash-attn (*varlen*), flash-attn alone, where the type has "
        "soft caps or sinks or can be told to attend in both directions, by a reference of it on CPU (*flash*), or "
        "neither (*none*; also where documents are not kept apart); `--attn_implementation` takes no other. *Head*: "
        "whether the head alone, given the final hidden states, has the logits, the loss and every gradient of the "
        "whole forward, bit for bit (fp32), and the logits of a run of tokens are those among all tokens: then the "
        "loss takes a large vocabulary in chunks (*apart*), otherwise it needs all logits at once (*whole*). *Plain*: "
        "apart, and the logits are a product with the output embedding with at most a factor and a soft cap after it; "
        "a loss fused with it (`--fused_loss`) has the loss and every gradient of one that is not (fp32, 1e-5). "
        "*Layers*: whether compiled decoder layers have the loss and every gradient of the layers as they are "
        "(fp32, 1e-5): compiled as in a run, on CPU (*inductor*), by the graphs that the compiler is given (*traced*), "
        "or not shown to be right (*no*); "
        "`--compile auto` is on for the first two. "
        "*Halves*: whether decoder layers cut between attention and mlp, every layer on two stages, have the whole "
        "model's loss and every gradient (fp32, 1e-4 relative; biases, norms and factors moved away from 0 and 1), are "
        "exported whole and start from the same random weights; `--split_dlayer` takes no other, nor layers of kinds "
        "that the tiny model does not have. "
        "*Slices*: what of a model several processes can share (`--model_parallel_size`), two of them, and where that "
        "leaves less than one key and value head to each, more: then loss and every gradient are the whole model's (as "
        "for halves), and so is what they write together. Embedding and head are cut, and of decoder layers what most "
        "families have (*layers*), what transformers' plan cuts (*plan*) or nothing (*vocabulary*); a model whose "
        "layers have parameters that the tiny one has not is refused. "
        "*Norms*: the same where slices share the tokens between attention and mlp (`--sequence_sharded_norms`), of "
        "rows that they do not divide. "
        "*Rows*: two processes that share the tokens of rows (`--sequence_parallel_size`) have the whole model's loss "
        "and every gradient, in both modes (fp32, 1e-5). "
        "Types in bold are tested in every run of the tests, tied and untied.",
        "",
        "| type | plan | result | documents apart | by lengths | head | layers | halves | slices | norms | rows | shown"
        " by, or reason |",
        f"|{' --- |' * 12}",
    ]
    for family in families:
        name = f"**{family.model_type}**" if family.model_type in NAMED else family.model_type
        plan = "yes" if family.has_plan else ""
        shown = family.shown.replace("|", "/")
        known = (family.apart, family.kernels, family.head, family.layers, family.half_layers)
        facts = (name, plan, family.status, *known, family.in_slices, family.in_norms, family.in_rows, shown)
        lines.append(f"| {' | '.join(facts)} |")
    target = ROOT / "docs" / "families.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _detail(family: Family, renewal: str | None) -> str:
    return {"halves": family.not_halved, "slices": family.not_sliced}.get(renewal or "", family.shown)


def _renew(families: Sequence[Family]) -> None:
    """Write these lines anew, and leave the others."""
    renewed = {family.model_type: family for family in families}
    version, known = catalogue()
    write_table(version, [renewed.get(family.model_type, family) for family in known])


def main() -> int:
    """Parse, walk, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--compiled", action="store_true", help="renew only what compiled layers are shown to do")
    parser.add_argument("--halves", action="store_true", help="renew only what half layers are shown to do")
    parser.add_argument("--slices", action="store_true", help="renew only what slices are shown to do")
    parser.add_argument("--rows", action="store_true", help="renew only what shared rows are shown to do")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time (default: 1)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    renewal = next((name for name in RENEWALS if getattr(arguments, name)), None)
    if arguments.worker:
        lines = {family.model_type: family for family in catalogue()[1]}
        for model_type in arguments.types:
            found = RENEWALS[renewal](lines[model_type]) if renewal else walk_one(model_type)
            print(json.dumps(asdict(found)), flush=True)
        return 0
    import transformers

    from tests.models.tiny import causal_types

    wanted = arguments.types or causal_types()
    if renewal:
        wanted = [
            family.model_type for family in catalogue()[1] if family.status == "pass" and family.model_type in wanted
        ]
    families = []
    for family in walk_many(wanted, max(1, arguments.jobs), [f"--{renewal}"] if renewal else []):
        families.append(family)
        print(
            f"{family.model_type:<28} {family.status:<8} {family.kernels:<7} {family.layers:<9} {family.half_layers:<4}"
            f" {family.slices:<10} {family.shared_rows:<3} {_detail(family, renewal)}",
            flush=True,
        )
        if renewal and family.status == "pass":
            _renew([family])
    if renewal:
        return 1 if any(family.status == "failed" for family in families) else 0
    order = {name: number for number, name in enumerate(wanted)}
    families.sort(key=lambda family: order[family.model_type])
    if arguments.types and CATALOGUE.exists():
        _renew(families)
    elif not arguments.types:
        write_table(transformers.__version__, families)
    return 1 if any(family.status == "failed" for family in families) else 0


if __name__ == "__main__":
    sys.exit(main())
