"""Names of weights in files and in modules; they differ in many architectures of transformers 5.

transformers renames, splits and merges weights between a file and the modules (``attention.query`` in a ViT's file is
``q_proj`` in memory). These conversions are made for dense weights. On compressed layers they could merge factors of
different ranks, permute the rows of one factor alone, or separate a dense layer from its compressed neighbour. So
compressed models are saved under the names of their modules and read without conversions. Folders with the names of the
original files are read with conversions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def converted_names(model: Any, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the names that transformers gives the weights of a file, by their names in the file.

    Args:
        model: A transformers model, on any device.
        keys: Names in files.

    Returns:
        For each, one name, or several if the weight is split.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)  # copies: some conversions store the names they met
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
    """Return whether the names in files are a model's module names and need no conversion."""
    keys = list(keys)
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    # Names of a base model lack the prefix that a model with a head adds.
    plain = {key for key in keys if not known.isdisjoint((key, key.removeprefix(prefix), prefix + key))}
    if len(plain) == len(keys) or known <= plain:
        return bool(keys)
    converted = [key for key, names in converted_names(model, keys).items() if not known.isdisjoint(names)]
    return len(plain) >= len(converted)


def name_forms(model: Any, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the possible names in a model for each name of a folder's layers.

    Names of a base model lack the prefix that a model with a head adds. In a model of another class than the saved one,
    the names may be the ones that transformers converts the weights' names to.
    """
    prefix = f"{model.base_model_prefix}."
    weights = {name: f"{name}.weight" for name in names}
    converted = converted_names(model, weights.values())
    return {
        name: (name, name.removeprefix(prefix), prefix + name, *(k.removesuffix(".weight") for k in converted[weight]))
        for name, weight in weights.items()
    }


def save_module_names(model: Any) -> list[Any] | None:
    """Make ``save_pretrained`` write weights under the names of their modules.

    Returns:
        The conversions of a dense model, None for the default ones. The caller keeps them as ``dense_conversions`` of
        the model's quantizer until :func:`save_converted_names`.
    """
    held = vars(model)
    conversions: Any = held.get("_weight_conversions")
    conversions = getattr(held.get("hf_quantizer"), "dense_conversions", conversions)
    model._weight_conversions = []  # None would mean the default ones
    return conversions


def save_converted_names(model: Any) -> None:
    """Make ``save_pretrained`` write the names that it wrote before the model was compressed."""
    quantizer: Any = vars(model).get("hf_quantizer")
    if not hasattr(quantizer, "dense_conversions"):
        return
    vars(model).pop("_weight_conversions", None)
    if quantizer.dense_conversions is not None:
        model._weight_conversions = quantizer.dense_conversions
