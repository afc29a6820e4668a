"""Options of the trainer: what is trained on, and how it is read."""

import dataclasses

from jllm.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is trained on, and how it is read."""

    train_data: tuple[str, ...] = option(
        (),
        group="Data",
        metavar="FOLDER[=WEIGHT]",
        help="folder of shards to train on, or a JSONL or text file, converted first; may be given several times; an"
        " epoch has the rows WEIGHT times: 2.5 is twice, and a half of them a third time",
    )
    dist_data: bool = option(False, help="each node has a part of its own of --train_data, under the same name")
    seq_len: int | None = option(
        None,
        least=1,
        most=1 << 30,
        help="longest sequence given to the model; rows may have one token more [default: what the data needs]",
    )
    block_mask: bool = option(False, help="documents packed in one row do not attend to each other")
    no_shuf: bool = option(False, help="read the rows in the order of the files in every epoch")
    seed: int = option(1234, help="seed of the data order and of --init")
    num_workers: int = option(
        1, may_differ=True, most=1 << 16, help="threads that read ahead on the first stage; 0 reads between the steps"
    )
    skip_train_steps: str = option("", help='steps whose data is consumed without training on it: "3,4"')
