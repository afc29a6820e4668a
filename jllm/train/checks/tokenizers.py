"""Whether data was made with the model's tokenizer: the same text has the same ids, whatever bytes it is stored in.

Cost: the model's tokenizer is loaded in a process of its own, some seconds the first time and nothing after that.
"""

from jllm.data.dataset.manifest import DataSet
from jllm.data.tokenizer.comparison import difference
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError
from jllm.train.config import TrainConfig

FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")
"""What a folder with a tokenizer has at least one of."""


def check_tokenizer(data_set: DataSet, config: TrainConfig) -> list[str]:
    """Refuse shards that were made with another tokenizer than the model's; warnings, one line each.

    Raises:
        UserError: they differ, and where; unless `--force_tokenizer` is given.
    """
    made_with = data_set.manifest.tokenizer
    assert config.model is not None
    if made_with is None:
        return []
    if not any(path for pattern in FILES for path in config.model.glob(pattern)):
        return [
            f"--model {config.model} has no tokenizer: nobody knows whether {data_set.folder}, made with"
            f" {made_with.name}, has its ids"
        ]
    try:
        found = difference(data_set, load_tokenizer(str(config.model), trust_remote_code=config.trust_remote_code))
    except UserError as error:
        if not config.force_tokenizer:
            raise
        return [f"the model's tokenizer is not compared with that of {data_set.folder}: {error}"]
    if found is None:
        return []
    said = f"{data_set.folder} was made with the tokenizer {made_with.name}, the model has another: {found}"
    if config.force_tokenizer:
        return [f"{said}; --force_tokenizer goes on"]
    raise UserError(
        f"{said}; make the shards again with --tokenizer {config.model}, or --force_tokenizer to train on these ids"
    )
