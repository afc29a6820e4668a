"""What stages own, by name: the ends of a tied model share one name, and each parameter has one owner."""

import json
from pathlib import Path

import torch

from jllm.models.pipeline.carving import published_names, structure_of
from tests.models.chain import (
    load_chain,
    tied_names,
)

torch.set_num_threads(1)


def test_tied_parameter_is_named_alike_at_both_ends(family_folder: Path) -> None:
    tied = json.loads((family_folder / "config.json").read_text())["tie_word_embeddings"]
    name = "model.embed_tokens.weight" if tied else None
    assert tied_names(load_chain(family_folder, [0, 1, 3, 4])) == [name, None, name]
    assert tied_names(load_chain(family_folder, [0, 4])) == [None]


def test_each_parameter_has_one_owner_but_a_tied_one(family_folder: Path) -> None:
    """The names of all stages together are those of the whole model; stages share nothing but the tied parameter."""
    stages = load_chain(family_folder, [0, 1, 3, 4])
    structure = structure_of(stages[0].model)
    names = [list(published_names(stage.model, stage.span).values()) for stage in stages]
    assert set().union(*names) == set(structure.parameters)
    together = [name for each in names for name in each]
    shared = {name for name in together if together.count(name) > 1}
    assert shared == {original for _, original in structure.tied}
    for stage in stages:
        assert structure_of(stage.model) == structure
        for name in published_names(stage.model, stage.span).values():
            layer = name.removeprefix(f"{structure.layers}.").split(".")[0]
            if layer.isdigit():
                assert stage.span.first_layer <= int(layer) < stage.span.end_layer
