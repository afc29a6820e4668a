"""Sizes that families' configurations share by name, also where layers have their own."""

from transformers import PretrainedConfig


def sizes_of(text: PretrainedConfig, name: str) -> list[int]:
    """What a configuration gives for a size, one number or one a layer; nothing where it has none.

    Read as it is stored, if it is: some configurations refuse to be asked for what may differ between layers.
    """
    stored = text.attribute_map.get(name, name)
    value = vars(text)[stored] if stored in vars(text) else getattr(text, name, None)
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, int)]


def size_of(text: PretrainedConfig, name: str) -> int:
    """The largest of them; 0 where there is none."""
    return max(sizes_of(text, name), default=0)
