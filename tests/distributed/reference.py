"""One plain transformers process that trains on the same rows: what the pipeline has to equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jllm.data.dataset.shards import ShardReader, list_shards
from jllm.train.data.order import epoch_order


def rows_in_order(folder: Path, *, seed: int, epoch: int, shuffle: bool = True) -> list[dict[str, np.ndarray]]:
    """The rows of an epoch, worked out from the files alone."""
    from jllm.data.dataset.manifest import open_data_set

    groups, sizes = [], []
    for path in list_shards(folder):
        for batch in ShardReader(path):
            groups.append(
                [
                    {name: np.array(batch.column(name)[i].as_py()) for name in batch.schema.names}
                    for i in range(len(batch))
                ]
            )
            lists = (getattr(batch.column(name), "values", batch.column(name)) for name in batch.schema.names)
            sizes.append(4 * sum(map(len, lists)))
    order = epoch_order(
        np.array([len(group) for group in groups]),
        np.array(sizes),
        fingerprint=open_data_set(folder).manifest.fingerprint,
        seed=seed,
        epoch=epoch,
        shuffle=shuffle,
        window_bytes=32 << 20,
    )
    found = []
    for window in range(order.num_windows):
        rows = [row for group in order.groups_of_window(window) for row in groups[group]]
        found.extend(rows[i] for i in order.rows_of_window(window))
    return found


def targets_of(row: dict[str, np.ndarray]) -> np.ndarray:
    """The shifted targets of a row, by the contract's words."""
    ids = row["input_ids"]
    labels = row.get("labels", ids).copy()
    for start in row.get("cu_seqlens", np.array([0, len(ids)]))[:-1]:
        labels[start] = -100
    if "cu_seqlens" in row:
        labels[row["cu_seqlens"][-1] :] = -100
    return labels[1:]


def batches_in_order(folder: Path, *, steps: int, global_batch: int, seed: int) -> list[list[dict[str, np.ndarray]]]:
    """The rows of each step of a run, of fixed size."""
    found: list[list[dict[str, np.ndarray]]] = []
    epoch = 0
    while len(found) < steps:
        rows = rows_in_order(folder, seed=seed, epoch=epoch)
        found.extend(rows[at : at + global_batch] for at in range(0, len(rows), global_batch))
        epoch += 1
    return found[:steps]


def train_reference(
    model_folder: Path, batches: Sequence[list[dict[str, np.ndarray]]], *, options: dict[str, Any]
) -> tuple[list[float], list[float], dict[str, Any]]:
    """Losses, gradient norms before clipping, and final weights; each row is its own forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    losses, norms = train_model(model, batches, options=options)
    return losses, norms, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train_model(
    model: Any, batches: Sequence[list[dict[str, np.ndarray]]], *, options: dict[str, Any], optimizer: Any = None
) -> tuple[list[float], list[float]]:
    """Train a model in this process as a run of these options does; losses, and gradient norms before clipping."""
    import torch
    from torch.nn.functional import cross_entropy

    trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer is None and options["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(trained_parameters, lr=options["learning_rate"])
    elif optimizer is None:
        eps = options.get("adam_eps", 1e-8)
        optimizer = torch.optim.AdamW(trained_parameters, lr=options["learning_rate"], weight_decay=0.0, eps=eps)
    losses, norms = [], []
    for batch in batches:
        trained = sum(int((targets_of(row) != -100).sum()) for row in batch)
        optimizer.zero_grad()
        total = 0.0
        for row in batch:
            ids = torch.tensor(row["input_ids"][:-1])[None]
            logits = model(input_ids=ids).logits[0].float()
            loss = cross_entropy(logits, torch.tensor(targets_of(row)), ignore_index=-100, reduction="sum") / trained
            loss.backward()
            total += float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained_parameters, options["gradient_clipping"])))
        optimizer.step()
        losses.append(total)
    return losses, norms
