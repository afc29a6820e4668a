"""How long training waits for a checkpoint: `--background_executor process` and `thread` against `none`.

One process holds about 1 GB of fp32 state (weights and two AdamW states) on CPU and saves it through the trainer's
`CheckpointSaver`, several times with each executor in turn. The pause is the time `save` takes; with `none` that is the
whole write. While the background write goes on, a step of training (a forward and a backward pass and the update of
every tensor in place) is timed against the same step with nothing else going on. Each checkpoint is read back and must
hold the values of the moment it was asked for, although the next step has changed them since.

Prints one JSON line; the bar is a pause of at most 10 % of the synchronous one, with the default executor.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EXECUTORS = ("none", "thread", "process")
KINDS = ("master", "exp_avg", "exp_avg_sq")
BAR = 0.10
WIDTH = 1024


class State:
    """Parameters with their AdamW states, and a step that changes all of them."""

    def __init__(self, megabytes: int) -> None:
        import torch

        torch.manual_seed(0)
        count = max(1, megabytes * 10**6 // (len(KINDS) * 4 * WIDTH * WIDTH))
        self.tensors = {kind: [torch.rand(WIDTH, WIDTH) for _ in range(count)] for kind in KINDS}
        self.inputs = torch.rand(16, WIDTH)

    def pieces(self) -> list[Any]:
        """The state as the trainer hands it to a checkpoint."""
        from jllm.train.checkpoint.format import Piece
        from jllm.train.checkpoint.regions import Region

        return [
            Piece(kind=kind, name=f"layer.{i}", region=Region.of((WIDTH, WIDTH)), tensor=tensor.view(-1))
            for kind, tensors in self.tensors.items()
            for i, tensor in enumerate(tensors)
        ]

    def step(self) -> float:
        """Products as of a forward and a backward pass, and an update in place; the seconds it took."""
        started = time.perf_counter()
        for weight, mean, square in zip(*(self.tensors[kind] for kind in KINDS), strict=True):
            for _ in range(3):
                self.inputs @ weight
            mean.mul_(0.9).add_(weight, alpha=0.1)
            square.mul_(0.999).addcmul_(weight, weight, value=0.001)
            weight.addcdiv_(mean, square.sqrt().add_(1e-8), value=-1e-3)
        return time.perf_counter() - started

    def checksum(self) -> float:
        """A number that changes with every step."""
        return float(self.tensors["master"][0].sum())


def save_once(state: State, executor: str, folder: Path) -> dict[str, float]:
    """Save, make one step meanwhile, wait for the end; seconds of each."""
    import torch

    from jllm.train.checkpoint.format import RunState
    from jllm.train.checkpoint.reader import CheckpointReader
    from jllm.train.checkpoint.regions import Region
    from jllm.train.checkpoint.saver import CheckpointSaver
    from jllm.train.config import TrainConfig
    from jllm.train.data.loader import Cursor

    config = TrainConfig(
        model=folder, train_data=(str(folder),), checkpoint=folder / "checkpoints", background_executor=executor
    )
    saver = CheckpointSaver(config, rank=0, ranks=[0], barrier=lambda: None)
    run = RunState(
        step=1,
        cursor=Cursor(),
        fingerprint="",
        optimizer_steps=1,
        consumed_tokens=0,
        consumed_rows=0,
        eval_loss=None,
        rebounds=0,
        config={},
    )
    normal = statistics.median(state.step() for _ in range(3))
    before = state.checksum()
    started = time.perf_counter()
    path = saver.save(state.pieces(), {"cpu": torch.get_rng_state()}, run)
    pause = time.perf_counter() - started
    during = state.step()
    saver.is_done(wait=True)
    whole = time.perf_counter() - started
    stored = CheckpointReader(path).read("master", "layer.0", Region.of((WIDTH, WIDTH)))
    assert stored is not None
    assert float(stored.view(WIDTH, WIDTH).sum()) == before != state.checksum(), "the checkpoint is not of its moment"
    return {"pause": pause, "whole": whole, "step": during, "normal_step": normal}


def main() -> int:
    """Save with every executor in turn, several rounds, and report medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="where checkpoints are written [default: the system's temporary folder]")
    arguments = parser.parse_args()
    state = State(arguments.megabytes)
    found: dict[str, list[dict[str, float]]] = {executor: [] for executor in EXECUTORS}
    for _ in range(arguments.rounds):
        for executor in EXECUTORS:
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
                found[executor].append(save_once(state, executor, Path(folder)))
    medians = {
        executor: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for executor, rounds in found.items()
    }
    synchronous = medians["none"]["pause"]
    ratio = medians["process"]["pause"] / synchronous
    result = {
        "benchmark": "checkpoint_pause",
        "ratio": round(ratio, 4),
        "bar": BAR,
        "met": ratio <= BAR,
        "thread_ratio": round(medians["thread"]["pause"] / synchronous, 4),
        "pause_s": {executor: round(median["pause"], 3) for executor, median in medians.items()},
        "write_s": {executor: round(median["whole"], 3) for executor, median in medians.items()},
        "step_during_write_ratio": {
            executor: round(medians[executor]["step"] / medians[executor]["normal_step"], 2)
            for executor in ("thread", "process")
        },
        "normal_step_s": round(medians["none"]["normal_step"], 3),
        "state_mb": round(sum(p.tensor.numel() * 4 for p in state.pieces()) / 1e6),
    }
    print(json.dumps(result))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
