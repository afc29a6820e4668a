"""Options of the trainer: what is recomputed to save memory."""

import dataclasses

from jllm.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What is recomputed to save memory."""

    checkpoint_grad_interval: int = option(
        0, group="Memory", help="keep activations of every k-th layer, recompute the rest; 0 off"
    )
    checkpoint_grad_attention: bool = option(False, help="recompute the attention of each layer only")
    checkpoint_grad_offload: bool = option(False, help="keep the checkpointed activations in host memory")
    no_checkpoint_grad_step: int = option(0, help="after this step activations are no longer recomputed; 0: always")
