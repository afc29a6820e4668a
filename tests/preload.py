"""What processes of tests would import; the process that they are forked from does it once."""

import contextlib
import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (imports the compiler, which takes seconds)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import jllm.data.shuffle.data_set
import jllm.data.shuffle.repartition
import jllm.train.trainer  # noqa: F401
from jllm.errors import UserError
from jllm.train.distributed import operators

torch.set_num_threads(1)
with contextlib.suppress(UserError):  # the ranks will say it themselves
    operators.compile_for_cpu()
gc.freeze()  # the collector of a rank need not look at any of this
