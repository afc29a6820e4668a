"""What the processes of a run tell each other beside the pipeline: facts about the data, and about each step.

Only readers know the data. Before training, the first of them tells the others what it found, or which mistake it met,
so that every process stops with the same line. At each step all processes learn the length of their pipeline's
micro-batches and the number of trained tokens in the whole world, which the loss is divided by.

Where slices or runs of rows share the work of the first stage, all of them get the micro-batches of their pipeline's
reader.

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
from typing import NamedTuple

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


class _StepNumbers(NamedTuple):
    """What one process tells all others of a step, in the order in which the numbers travel.

    Attributes:
        length, tokens, trained_tokens, rows, room, pairs, epoch, rows_before: of the step it read, or 0.
        most, longest: bounds of the documents; 0 where they are not kept apart.
        shared: numbers of the step's broadcast.
        request: what it asks of all.
        mistake: whether it could not read on.
    """

    length: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    rows: int = 0
    room: int = 0
    pairs: int = 0
    epoch: int = 0
    rows_before: int = 0
    most: int = 0
    longest: int = 0
    shared: int = 0
    request: int = 0
    mistake: int = 0

    @classmethod
    def of(cls, step: Step, shared: int) -> "_StepNumbers":
        """Of a step that was read, whose broadcast has `shared` numbers."""
        known = step.documents
        return cls(
            length=step.length,
            tokens=step.tokens,
            trained_tokens=step.trained_tokens,
            rows=step.rows,
            room=step.room,
            pairs=step.pairs,
            epoch=step.start.epoch,
            rows_before=step.start.rows,
            most=known.most if known is not None else 0,
            longest=known.longest if known is not None else 0,
            shared=shared,
        )


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
        mine, numbers = _StepNumbers(), None
        if step is not None:
            if self._first_stage is not None:
                numbers = as_numbers(step.micro_batches)
            mine = _StepNumbers.of(step, numbers.numel() if numbers is not None else 0)
        mine = mine._replace(request=int(request), mistake=int(mistake is not None))
        everyone = self.gather_numbers([*mine, *device.numbers()])
        told = [_StepNumbers(*row) for row in everyone[:, : len(mine)].tolist()]
        if any(each.mistake for each in told):
            raise StoppedError(next(each for each in self.gather(mistake) if each is not None))
        readers = [told[rank] for rank in self.mesh.readers]
        views = sorted({(each.epoch, each.rows_before, each.rows) for each in readers})
        if len(views) > 1:
            one, other = (f"epoch {epoch} row {before} with {rows} rows" for epoch, before, rows in views[:2])
            raise StoppedError(
                f"data out of sync: one reader is at {one}, another at {other}; give all nodes the same data"
            )
        read = told[self.place.reader]
        documents = DocumentBounds(most=read.most, longest=read.longest) if read.most else None
        if self._first_stage is not None:
            if numbers is None:
                numbers = torch.empty(read.shared, dtype=torch.int64)
            dist.broadcast(numbers, src=self.place.reader, group=self._first_stage)
            if step is None:
                step = Step(
                    micro_batches=from_numbers(numbers, self._planes),
                    rows=read.rows,
                    tokens=read.tokens,
                    trained_tokens=read.trained_tokens,
                    length=read.length,
                    start=Cursor(epoch=read.epoch, rows=read.rows_before),
                    room=read.room,
                    pairs=read.pairs,
                    documents=documents,
                )
        return step, StepFacts(
            waited=waited,
            length=read.length,
            tokens=sum(each.tokens for each in readers),
            trained_tokens=sum(each.trained_tokens for each in readers),
            rows=read.rows,
            epoch=read.epoch,
            rows_before=read.rows_before,
            request=functools.reduce(operator.or_, (Request(each.request) for each in told)),
            devices=DevicesUse.of(self.mesh.by_stage(everyone[:, len(mine) :].tolist())),
            room=sum(each.room for each in readers),
            pairs=sum(each.pairs for each in readers),
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
