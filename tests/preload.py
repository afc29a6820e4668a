"""What processes of tests would import and find out; the process that they are forked from does it once."""

import contextlib
import gc
import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (imports the compiler, which takes seconds)
import torch
from deepspeed import ops
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import jllm.data.shuffle.data_set
import jllm.data.shuffle.repartition
import jllm.train.trainer  # noqa: F401
from jllm.errors import UserError
from jllm.train.distributed import operators

FAMILIES = ("gemma2", "llama", "mixtral", "phi3", "qwen2", "qwen3")
LATE = (
    "bitsandbytes",
    "deepspeed.module_inject.auto_ep_layer",
    "jllm.models.adapters.lora",
    "jllm.models.adapters.lora_products",
    "jllm.models.adapters.peft_folder",
    "peft.tuners.lora.bnb",
    "tensorboard.summary.writer.record_writer",
    *(f"transformers.models.{name}.modeling_{name}" for name in FAMILIES),
)
"""What a run imports when it comes to it, where it is installed."""
for name in LATE:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
get_checkpoint_conversion_mapping("llama")  # transformers makes it of all families at once
assert ops.__compatible_ops__  # each rank would have to start compilers
torch.set_num_threads(1)
with contextlib.suppress(UserError):  # the ranks will say it themselves
    operators.compile_for_cpu()
gc.freeze()  # the collector of a rank need not look at any of this
