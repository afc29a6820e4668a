"""Whether compiled decoder layers of a family have the loss and every gradient of the layers as they are."""

from pathlib import Path

import torch
from transformers.configuration_utils import PretrainedConfig

from jllm.models.compiled import BACKEND, Shape, compile_layers
from jllm.models.families import NAMED
from jllm.models.pipeline.structure import count_layers
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch, worst_gradient
from tests.models.family_check import LIMIT, takes_packed_rows

TRACED = "aot_eager_decomp_partition"
"""The graphs of forward and backward passes that inductor is given, run operation after operation."""
USUAL = Shape(2, 24)


def how_compiled(folder: Path, config: PretrainedConfig) -> str:
    """`Family.compiled` of the model in `folder`; named families are compiled as in a run, which takes a minute."""
    by_inductor = config.model_type in NAMED
    is_equal = compiles(folder, config, BACKEND if by_inductor else TRACED)
    return "no" if not is_equal else "inductor" if by_inductor else "traced"


def compiles(folder: Path, config: PretrainedConfig, backend: str) -> bool:
    """Whether all layers are compiled, and right: rows of the usual shape, rows of another, packed where possible."""
    torch._dynamo.reset()
    stages = load_chain(folder, [0, count_layers(config)])
    vocab = config.get_text_config(decoder=True).vocab_size
    packed = takes_packed_rows(stages[0].model)
    batches = [packed_batch(vocab, packed=False), packed_batch(vocab, batch=3, length=20, packed=packed)]
    expected = []
    for batch in batches:
        torch.manual_seed(0)
        expected.append(chained_loss_and_gradients(stages, *batch))
    lines: list[str] = []
    state = compile_layers(stages[0].model, stages[0].span, usual=USUAL, warn=lines.append, tell=str, backend=backend)
    for batch, (loss, gradients) in zip(batches, expected, strict=True):
        torch.manual_seed(0)
        try:
            found = chained_loss_and_gradients(stages, *batch)
        except Exception:  # whatever it is, such a run would end in a traceback
            return False
        if lines or not state.kinds:
            return False
        if (found[0] - loss).abs() > LIMIT or worst_gradient(gradients, found[1])[0] > LIMIT:
            return False
    return True
