"""What the processes of a run tell each other beside the pipeline: facts about the data, and about each step.

Only readers know the data. Before training, the first of them tells the others what it found, or which mistake it met,
so that every process stops with the same line. At each step all processes learn the length of their pipeline's
micro-batches and the number of trained tokens in the whole world, which the loss is divided by.

Where slices of the first stage share its work, all of them get the micro-batches of their pipeline's reader.

Cost: one gather of a few integers for each step, and one broadcast of a step among those that share the first stage, on
the CPU, so no accelerator is waited for.
"""

import dataclasses
import functools
import operator
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from jllm.errors import UserError
from jllm.models.attention import DocumentBounds
from jllm.models.pipeline.bundle import READ
from jllm.parallel.collectives import Collectives
from jllm.parallel.mesh import Mesh
from jllm.train.data.collate import as_numbers, from_numbers
from jllm.train.data.loader import Cursor, ReadAhead, Step
from jllm.train.lifecycle.ending import StoppedError
from jllm.train.lifecycle.requests import Request
from jllm.train.records.throughput import DevicesUse, DeviceUse

NOTHING_USED = DeviceUse()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFacts:
    """One step, as every process knows it.

    Attributes:
        waited: seconds that this process waited for its reader.
        length: S of this process's pipeline.
        tokens: inputs that are not padding, in the whole world.
        trained_tokens: targets in the whole world.
        rows: rows of the global batch that are not filling.
        epoch: the epoch the step belongs to, from 0.
        rows_before: rows of that epoch consumed before the step.
        request: what any process asks of all.
        devices: what each stage uses.
        room: tokens that the micro-batches of the whole world could hold.
        documents: of any micro-batch of this process's pipeline, where they are kept apart.
        pairs: preference pairs in the whole world; 0 where rows are no pairs.
    """

    waited: float
    length: int
    tokens: int
    trained_tokens: int
    rows: int
    epoch: int
    rows_before: int
    request: Request
    devices: DevicesUse
    room: int
    documents: DocumentBounds | None = None
    pairs: int = 0

    @property
    def terms(self) -> int:
        """What the loss is a mean over: pairs, or trained tokens."""
        return self.pairs or self.trained_tokens

    @property
    def rows_after(self) -> int:
        return self.rows_before + self.rows


class Agreement(Collectives):
    """The processes of one run; every method is called by all of them together.

    Args:
        mesh: of the run.
        planes: the names of those that a reader's micro-batches have.
    """

    def __init__(self, mesh: Mesh, planes: tuple[str, ...] = READ) -> None:
        super().__init__(mesh)
        self._planes = planes
        self._first_stage = None
        if mesh.sequence * mesh.tensor > 1:
            for ranks in mesh.groups("sequence", "tensor"):  # every process takes part in making every group
                group = dist.new_group(list(ranks), backend="gloo")
                if self.rank in ranks and self.place.pipe == 0:
                    self._first_stage = group

    def step(
        self,
        steps: Iterator[Step] | ReadAhead | None,
        request: Request = Request.NOTHING,
        device: DeviceUse = NOTHING_USED,
    ) -> tuple[Step | None, StepFacts]:
        """Read one step, which only readers do, and share it, and what this process asks for and uses.

        Raises:
            StoppedError: on every process: a reader cannot read on, or readers are at different places of their data.
        """
        step, mistake = None, None
        started = time.perf_counter()
        try:
            step = next(steps) if steps is not None else None
        except UserError as error:
            mistake = str(error)
        waited = time.perf_counter() - started
        mine, numbers = [0] * 11, None
        if step is not None:
            start, known = step.start, step.documents
            mine = [step.length, step.tokens, step.trained_tokens, step.rows, start.epoch, start.rows, step.room]
            mine += [step.pairs, *((known.most, known.longest) if known is not None else (0, 0))]
            if self._first_stage is not None:
                numbers = as_numbers(step.micro_batches)
            mine.append(numbers.numel() if numbers is not None else 0)
        everyone = self.gather_numbers([*mine, int(request), int(mistake is not None), *device.numbers()])
        if everyone[:, 12].any():
            raise StoppedError(next(each for each in self.gather(mistake) if each is not None))
        readers = everyone[list(self.mesh.readers)]
        views = readers[:, 3:6].unique(dim=0).tolist()
        if len(views) > 1:
            one, other = (f"epoch {view[1]} row {view[2]} with {view[0]} rows" for view in views[:2])
            raise StoppedError(
                f"data out of sync: one reader is at {one}, another at {other}; give all nodes the same data"
            )
        rows, epoch, rows_before = views[0]
        most, longest = everyone[self.place.reader, 8:10].tolist()
        documents = DocumentBounds(most=most, longest=longest) if most else None
        if self._first_stage is not None:
            if numbers is None:
                numbers = torch.empty(int(everyone[self.place.reader, 9]), dtype=torch.int64)
            dist.broadcast(numbers, src=self.place.reader, group=self._first_stage)
            if step is None:
                length, tokens, trained_tokens, _, _, _, room, pairs = everyone[self.place.reader, :8].tolist()
                step = Step(
                    micro_batches=from_numbers(numbers, self._planes),
                    rows=rows,
                    tokens=tokens,
                    trained_tokens=trained_tokens,
                    length=length,
                    start=Cursor(epoch=epoch, rows=rows_before),
                    room=room,
                    pairs=pairs,
                    documents=documents,
                )
        return step, StepFacts(
            waited=waited,
            length=int(everyone[self.place.reader, 0]),
            tokens=int(readers[:, 1].sum()),
            trained_tokens=int(readers[:, 2].sum()),
            rows=rows,
            epoch=epoch,
            rows_before=rows_before,
            request=functools.reduce(operator.or_, map(Request, everyone[:, 11].tolist())),
            devices=DevicesUse.of(self.mesh.by_stage(everyone[:, 13:].tolist())),
            room=int(readers[:, 6].sum()),
            pairs=int(readers[:, 7].sum()),
            documents=documents,
        )

    def sees_one_folder(self, folder: Path) -> bool:
        """Whether `folder` is the same one on all nodes; it is made where it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        # Of this run alone: another one may ask the same at the same time.
        token = folder / f".shared-by-all-nodes-{self.from_first_reader(lambda: uuid.uuid4().hex)}"
        if self.place.is_first:
            token.touch()
        self.barrier()
        # A network file system may show a new file late to a process that looked before; a listing asks anew.
        seen = all(self.gather(token.name in os.listdir(folder)))
        if self.place.is_first:
            token.unlink()
        return seen
