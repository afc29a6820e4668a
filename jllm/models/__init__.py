"""Models: transformers' own classes, cut into pipeline stages, with their weights in Hugging Face format.

Here is what is done to a whole model or stage: attention kernels, what trains, recomputation, router balance, and the
catalogue of families. Imports torch, transformers, `jllm.parallel` and the ground; never `jllm.train`, and nothing here
imports in a circle.
"""

import logging

# transformers imports torchao where it is installed, which then tells of operators that this machine has no use for,
# and of PyTorch's plans for its enumerations: nothing to somebody who trains.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
