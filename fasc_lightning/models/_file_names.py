"""Names of weights in files and in modules, which differ for many architectures of transformers 5.

transformers renames, splits and merges weights between a file and the modules (``attention.query`` of a ViT's file is
``q_proj`` in memory). That is made for dense weights: of a compressed layer it could merge factors of different ranks,
permute rows of one of two, or part a dense layer from its compressed neighbour. So compressed models are saved under
the names of their modules, and read without conversions. Folders that hold the names of the original files are read
with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def converted_names(model: Any, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the names that transformers gives the weights of a file, by their names there.

    Args:
        model: A transformers model, on whatever device.
        keys: Names in files.

    Returns:
        For each, one name, or, of a weight that is split, several.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)  # copies: some remember what they have seen
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, tuple[str, ...]] = {}
    for key in sorted(keys, key=dot_natural_key):  # the order in which transformers reads them
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        targets = next((each.target_patterns for each in converters if pattern in each.source_patterns), None)
        names[key] = (name,) if targets is None else tuple(name.replace(targets[0], target) for target in targets)
    return names


def holds_module_names(model: Any, keys: Iterable[str]) -> bool:
    """Whether the names in some files are those of a model's modules, rather than such as have to be converted."""
    keys = list(keys)
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    # A base model's names lack the prefix that they have in a model with a head.
    plain = {key for key in keys if not known.isdisjoint((key, key.removeprefix(prefix), prefix + key))}
    if len(plain) == len(keys) or known <= plain:
        return bool(keys)
    converted = [key for key, names in converted_names(model, keys).items() if not known.isdisjoint(names)]
    return len(plain) >= len(converted)


def name_forms(model: Any, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the names that a folder's layers may have in a model, by their names in the folder.

    A base model's lack the prefix that they have inside a model with a head. In a model of another class than was
    saved, they may be those that transformers would give the weights.
    """
    prefix = f"{model.base_model_prefix}."
    weights = {name: f"{name}.weight" for name in names}
    converted = converted_names(model, weights.values())
    return {
        name: (name, name.removeprefix(prefix), prefix + name, *(k.removesuffix(".weight") for k in converted[weight]))
        for name, weight in weights.items()
    }


def save_module_names(model: Any) -> list[Any] | None:
    """Have ``save_pretrained`` write weights under the names of their modules.

    Returns:
        The conversions with which it would write a dense model, None for the default ones. They belong on the model's
        quantizer, as ``dense_conversions``, until :func:`save_converted_names`.
    """
    held = vars(model)
    conversions: Any = held.get("_weight_conversions")
    conversions = getattr(held.get("hf_quantizer"), "dense_conversions", conversions)
    model._weight_conversions = []  # of None it would take the default ones
    return conversions


def save_converted_names(model: Any) -> None:
    """Have ``save_pretrained`` write the names that it would have written before the model was compressed."""
    quantizer: Any = vars(model).get("hf_quantizer")
    if not hasattr(quantizer, "dense_conversions"):
        return
    vars(model).pop("_weight_conversions", None)
    if quantizer.dense_conversions is not None:
        model._weight_conversions = quantizer.dense_conversions
