"""`--schedule overlapped`: what crosses stages travels while they compute.

DeepSpeed's schedule (`1f1b`) sends and receives between its passes, and keeps no more micro-batches than a pipeline
without communication needs: with a link on which a micro-batch takes c seconds each way, a stage waits about 2 c for
every one. Here sends return at once, the next receive is asked for before the stage computes, and each stage but the
last begins with about twice as many forward passes (`micro_batches_in_flight`), so that a transfer may take as long as
a forward pass before anybody waits.

Guarantees: the same passes of the same micro-batches in the same order within each direction, so bit-identical losses,
gradients and weights. Activations and gradients have a process group, and with NCCL a stream, of their own each, so
neither waits for the other. Costs: the activations of up to P - 1 - s more micro-batches on stage s of P, and one
received micro-batch more. The first micro-batch after a change of length is sent as DeepSpeed does it, with its shape.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from torch import Tensor
from torch import distributed as dist

from jllm.models.pipeline.partition import micro_batches_in_flight
from jllm.parallel.mesh import Place


class OverlappedSchedule(schedule.TrainSchedule):  # type: ignore[misc]
    """The instructions of one stage for one step: receive, compute, send at once; more forward passes ahead."""

    @property
    def ahead(self) -> int:
        """Forward passes before the first backward pass."""
        return micro_batches_in_flight(self.stage_id, self.stages, self.micro_batches, overlaps=True)

    def num_pipe_buffers(self) -> int:
        """One for each micro-batch between its two passes."""
        return self.ahead

    def steps(self) -> Iterator[list[Any]]:
        """Forward passes ahead, then one backward and one forward pass in turn, then the rest."""
        for number in range(self.ahead):
            yield self._forward(number)
        for number in range(self.micro_batches):
            yield self._backward(number)
            if number + self.ahead < self.micro_batches:
                yield self._forward(number + self.ahead)
        yield [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]

    def _forward(self, number: int) -> list[Any]:
        buffer = number % self.ahead
        found = [schedule.RecvActivation(buffer)] if self._valid_stage(self.prev_stage) else []
        if self.stage_id in (0, self.stages - 1):
            found.append(schedule.LoadMicroBatch(buffer))
        found.append(schedule.ForwardPass(buffer))
        return [*found, schedule.SendActivation(buffer)] if self._valid_stage(self.next_stage) else found

    def _backward(self, number: int) -> list[Any]:
        buffer = number % self.ahead
        found = [schedule.RecvGrad(buffer)] if self._valid_stage(self.next_stage) else []
        found.append(schedule.BackwardPass(buffer))
        return [*found, schedule.SendGrad(buffer)] if self._valid_stage(self.prev_stage) else found


class Transfers:
    """What a stage has under way to its neighbours, and from them.

    Every process of a run makes one, at the same time.
    """

    def __init__(self, place: Place) -> None:
        stages = place.group("pipe")
        self._before = stages[place.pipe - 1] if place.pipe else None
        self._after = stages[place.pipe + 1] if place.pipe + 1 < len(stages) else None
        groups = [[dist.new_group(list(ranks)) for _ in range(2)] for ranks in place.mesh.groups("pipe")]
        self._activations, self._gradients = groups[place.mesh.groups("pipe").index(stages)]
        self._sent: dict[str, deque[list[tuple[dist.Work, Tensor]]]] = {"activations": deque(), "gradients": deque()}
        self._unanswered = 0
        self._awaited: dict[str, deque[list[tuple[dist.Work, Tensor]]]] = {"activations": deque(), "gradients": deque()}
        self._expected: dict[str, int] = {}

    def begin(self, micro_batches: int) -> None:
        """A step with so many micro-batches."""
        assert not any(self._awaited.values())
        self._expected = {"activations": micro_batches, "gradients": micro_batches}
        self._unanswered = 0

    def end(self) -> None:
        """Wait until everything is sent."""
        for kind in self._sent:
            self._keep(kind, 0)

    def has_arrived(self, kind: str) -> None:
        """One was received in another way."""
        self._expected[kind] -= 1

    def send_activation(self, tensors: tuple[Tensor, ...]) -> None:
        """To the next stage; what was sent must not change until the step is over."""
        self._send("activations", tensors, self._after, self._activations)
        self._unanswered += 1

    def send_gradient(self, tensor: Tensor) -> None:
        """To the stage before."""
        self._send("gradients", (tensor,), self._before, self._gradients)

    def receive_activation(self, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From the stage before; `like` has the shapes and types."""
        return self._receive("activations", lambda: self._ask(like, self._before, self._activations))

    def receive_gradient(self, like: Tensor) -> Tensor:
        """From the next stage."""
        [found] = self._receive("gradients", lambda: self._ask((like,), self._after, self._gradients))
        # The next stage has what it answers, which gloo's sends never say by themselves. The first may have gone in
        # another way.
        self._unanswered -= 1
        self._keep("activations", self._unanswered + 1)
        return found

    def expect_activation(self, like: tuple[Tensor, ...]) -> None:
        """Ask for the next one, if there is one in this step, before it is needed."""
        self._expect("activations", lambda: self._ask(like, self._before, self._activations))

    def _send(self, kind: str, tensors: tuple[Tensor, ...], to: int | None, group: Any) -> None:
        sent = self._sent[kind]
        while sent and all(work.is_completed() for work, _ in sent[0]):
            sent.popleft()
        begun = []
        for tensor in tensors:
            held = tensor.detach().contiguous()
            work = dist.isend(held, to, group=group)
            assert work is not None
            begun.append((work, held))
        sent.append(begun)

    def _keep(self, kind: str, most: int) -> None:
        """Wait until no more than so many micro-batches of what was sent are under way."""
        while len(self._sent[kind]) > most:
            for work, _ in self._sent[kind].popleft():
                work.wait()

    def _receive(self, kind: str, ask: Callable[[], list[tuple[dist.Work, Tensor]]]) -> tuple[Tensor, ...]:
        awaited = self._awaited[kind]
        if not awaited:
            self._expect(kind, ask)
        found = awaited.popleft()
        self._expect(kind, ask)
        for work, _ in found:
            work.wait()
        return tuple(tensor for _, tensor in found)

    def _expect(self, kind: str, ask: Callable[[], list[tuple[dist.Work, Tensor]]]) -> None:
        if self._expected[kind]:
            self._expected[kind] -= 1
            self._awaited[kind].append(ask())

    @staticmethod
    def _ask(like: tuple[Tensor, ...], of: int | None, group: Any) -> list[tuple[dist.Work, Tensor]]:
        found = []
        for each in like:
            tensor = torch.empty(each.shape, dtype=each.dtype, device=each.device)
            work = dist.irecv(tensor, of, group=group)
            assert work is not None
            found.append((work, tensor))
        return found
