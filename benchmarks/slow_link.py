"""`--schedule overlapped` against `1f1b` on a link between two machines: seconds of a step, two stages.

The machines are two network namespaces of this one, with a link that is shaped to 1 and to 10 Gbit/s in both directions
(root and `tc` are needed; "skipped" elsewhere), each with one core; a Llama of wide rows and few operations, so that
what crosses takes about as long as a forward pass at the lower rate. Each kind runs `--rounds` times, in turn; the
medians count, and the losses have to be the same to the last bit. Prints one JSON line: for each rate the seconds of
both, and `ratio`, 1f1b / overlapped.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jllm.parallel.ports import free_port  # noqa: E402
from tests.distributed.launched import Run  # noqa: E402
from tests.distributed.namespaces import ADDRESSES, Namespaces, why_not  # noqa: E402
from tests.distributed.nodes import node_command  # noqa: E402
from tests.distributed.runs import records  # noqa: E402
from tests.fixtures import write_rows  # noqa: E402

STEPS, WARM_UP, LENGTH, ROWS, MICRO_BATCHES = 8, 2, 256, 4, 8
RATES = ("1gbit", "10gbit")


def make(folder: Path) -> None:
    """The model's folder and the data."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(0, 256, (ROWS * MICRO_BATCHES * STEPS, LENGTH + 1)).tolist()
    write_rows(folder / "data", [{"input_ids": row} for row in ids])


def run(namespaces: Namespaces, folder: Path, kind: str, log: Path) -> tuple[list[float], list[float]]:
    """Seconds of the steps after warm-up, and all losses."""
    port = free_port()
    line = ["--pipe_parallel_size", "2", "--precision", "fp32", "--model", "model", "--init", "--train_data", "data"]
    line += ["--micro_batch_size", str(ROWS), "--gradient_accumulation_steps", str(MICRO_BATCHES)]
    line += ["--max_steps", str(STEPS), "--seq_len", str(LENGTH), "--schedule", kind, "--log_dir", str(log)]
    line += ["--partition_method", "uniform"]
    runs = []
    for node in (0, 1):
        core = ["taskset", "-c", str(node)]
        command = namespaces.inside(node, [*core, *node_command(node, port=port, address=ADDRESSES[0]), *line])
        runs.append(Run(command, folder, environment=namespaces.environment(node)))
    for each in runs:
        output = each.output(600)
        if each.returncode:
            raise SystemExit(output[-3000:])
    found = records(log)
    return [each["seconds"] for each in found[WARM_UP:]], [each["loss"] for each in found]


def main() -> None:
    """Measure both on each rate, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "slow_link"}
    if (reason := why_not()) is not None:
        print(json.dumps({**found, "skipped": reason}))
        return
    with tempfile.TemporaryDirectory() as name, Namespaces() as namespaces:
        folder = Path(name)
        make(folder)
        for rate in RATES:
            shaping = ("tbf", "rate", rate, "burst", "4mb", "latency", "100ms")
            if not all(namespaces.shape(*shaping, node=node) for node in (0, 1)):
                print(json.dumps({**found, "skipped": "this kernel shapes no links"}))
                return
            times: dict[str, list[float]] = {"1f1b": [], "overlapped": []}
            losses = []
            for number in range(options.rounds):
                for kind, seconds in times.items():
                    more, lost = run(namespaces, folder, kind, folder / f"log-{rate}-{kind}-{number}")
                    seconds += more
                    losses.append(lost)
            assert all(each == losses[0] for each in losses), "losses differ"
            medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
            found[rate] = {f"{kind}_s": round(each, 3) for kind, each in medians.items()}
            found[rate]["ratio"] = round(medians["1f1b"] / medians["overlapped"], 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
