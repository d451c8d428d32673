"""Saving of a compressed model to a folder with its model card, whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from fasc_lightning._utils import whole_folder
from fasc_lightning.compression import CompressionReport
from fasc_lightning.layers import SCALE_DTYPE, is_compressed
from fasc_lightning.models._attach import attach_config
from fasc_lightning.models._card import model_card
from fasc_lightning.models._compressed_tensors import is_read_elsewhere, obstacle, save_packed
from fasc_lightning.models._folder_checks import add_checksums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Files of weights from an earlier save. Beside new files they would be loaded instead: transformers prefers a single
#: file to shards, and does not remove it when it writes shards.
OLD_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?)")

#: End of the names of the scales of few bits, which have their own type.
SCALE = ".weight_scale"

#: Formats of folders. "auto" is compressed-tensors wherever other libraries read the model in it, and fasc elsewhere.
Format = Literal["auto", "fasc", "compressed-tensors"]


def save_compressed(
    model: PreTrainedModel,
    path: str | PathLike[str],
    *,
    report: CompressionReport | Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    license: str | None = None,
    calibration: str | Sequence[str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    max_shard_size: int | str | None = None,
    format: Format = "auto",
) -> Path:
    """Save a compressed model with its tokenizer and its model card, whole or not at all.

    ``model.save_pretrained(path)`` writes the same weights and configuration, but straight into ``path`` and without a
    card. This function first writes everything beside ``path``, so a failure (a full disk, a read-only folder) leaves
    an earlier folder unchanged. Other files in an earlier folder stay there. If several processes hold the model, one
    of them saves it.

    ``huggingface_hub.upload_folder(folder_path=path, repo_id=...)`` uploads the folder as it is. ``push_to_hub`` of
    transformers, also as an option of ``save_pretrained``, uploads the same weights. It keeps the card of a repository
    that has one, as ``model_card(model, report).push_to_hub(repo_id)`` writes it. A new repository gets the empty card
    of transformers with this model's tags, and so does the folder of ``save_pretrained``, in place of its card.

    A model whose compressed layers are all dense layers with matrices of few bits can be written in the format of
    compressed-tensors: transformers reads it if that library is installed, and so does vLLM, without this package.
    transformers makes its weights dense. vLLM, by its source, takes 4 and 8 bits (newer versions take others, too) in
    groups of 32, 64 or 128 inputs or one group an output. It joins q_proj, k_proj and v_proj, and gate_proj and
    up_proj, which therefore need one grid. :func:`load_compressed` reads both formats into the same layers.

    Args:
        model: The compressed model.
        path: The folder: new, empty, or with an earlier saved model.
        report: The report of the compression; see :func:`~fasc_lightning.models.model_card`.
        tokenizer: A tokenizer to save with the model.
        base_model: Hub id or folder of the model that was compressed.
        licence: Licence of the base model.
        license: Another name of ``licence``.
        calibration: The calibration data.
        evaluation: Perplexity and facts before and after.
        max_shard_size: Largest size of a file of weights, in bytes or as "5GB"; by default that of ``save_pretrained``.
        format: "fasc" holds every compressed model. "compressed-tensors" holds models without layers of low rank,
            rounded inputs, experts, Conv1D or groups that do not divide a layer's inputs. "auto" takes it if it holds
            the model and transformers reads it, which it does (5.23, with compressed-tensors 0.20.1) if all grids are
            symmetric, or all layers have one grid.

    Returns:
        The folder.

    Raises:
        TypeError: If the model is not a transformers model.
        ValueError: If it has no compressed layers, adapters that are not merged, or mixed floating-point types, or if
            the report belongs to another model, or the format does not hold the model.
        FileExistsError: If the folder holds files, but no saved model.
        OSError: If a file could not be written.

    Example:
        >>> report = compress(model, batches, keep=0.8)  # doctest: +SKIP
        >>> save_compressed(model, "compressed", report=report, tokenizer=tokenizer)  # doctest: +SKIP
    """
    from safetensors import SafetensorError

    if format not in get_args(Format):
        raise ValueError(f"Expected `format` to be one of {', '.join(map(repr, get_args(Format)))} but got {format!r}.")
    check_model(model)
    check_folder(path)
    attach_config(model)  # the layers may have been changed by hand
    chosen = _chosen_format(model, format)
    card = model_card(
        model,
        report,
        base_model=base_model,
        licence=licence,
        license=license,
        calibration=calibration,
        evaluation=evaluation,
        format=chosen,
    )
    sharding: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    try:
        with whole_folder(Path(path), lambda name: OLD_WEIGHTS.fullmatch(name) is not None) as folder:
            if chosen == "fasc":
                model.save_pretrained(folder, **sharding)
            else:
                save_packed(model, folder, **sharding)
            add_checksums(folder, _dtype(model))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            card.save(folder / "README.md")
    except SafetensorError as error:
        raise OSError(f"Could not write the weights to {path}: {error}. Earlier files are unchanged.") from error
    return Path(path)


def _chosen_format(model: Any, format: Format) -> Literal["fasc", "compressed-tensors"]:
    """Return the format of a model's folder.

    Raises:
        ValueError: If the format does not hold the model.
    """
    if format == "fasc" or not is_compressed(model):  # the model card refuses dense models
        return "fasc"
    reason = obstacle(model)
    if format == "auto":
        return "compressed-tensors" if reason is None and is_read_elsewhere(model) else "fasc"
    if reason is not None:
        raise ValueError(
            f"Expected a model that format='compressed-tensors' holds, but {reason}. Save it with format='fasc', which "
            "holds every compressed model."
        )
    return format


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the floating-point type of a model, which is not that of its scales."""
    types = (t.dtype for n, t in model.state_dict().items() if t.is_floating_point() and not _has_own_type(model, n))
    return next(types, model.dtype)


def check_model(model: Any) -> None:
    """Refuse a model that a folder cannot hold.

    Raises:
        TypeError: If it is not a transformers model.
        ValueError: If its floating-point types are mixed, its scales are trained, or it carries adapters.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Expected a transformers model but got {type(model).__name__}. Of a LightningModule save the model inside "
            "(`module.model`), or the module itself with `trainer.save_checkpoint`."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "Expected a model without adapters but it carries some, which transformers would save in its place. Merge "
            "them, or save them with `model.save_pretrained` to a folder of their own and `model.delete_adapter` them."
        )
    example: dict[torch.dtype, str] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(SCALE) and tensor.dtype != SCALE_DTYPE:
            raise ValueError(
                f"Expected scales of {SCALE_DTYPE} but got {tensor.dtype} ({name!r}), in which they are trained. A "
                "reload would round them: end the training, or round them with `narrow_scales()` of the layer's matrix."
            )
        if tensor.is_floating_point() and not _has_own_type(model, name):
            example.setdefault(tensor.dtype, name)
    if len(example) > 1:
        held = " and ".join(f"{dtype} ({name!r})" for dtype, name in example.items())
        raise ValueError(
            f"Expected a model of one floating-point type but got {held}. A folder has one, and a reload would round "
            "the others: convert the model first, `model.to(torch.bfloat16)`."
        )


def _has_own_type(model: PreTrainedModel, name: str) -> bool:
    """Return whether a weight is loaded in a type of its own: in that of scales, or in float32 by transformers."""
    if name.endswith(SCALE):
        return True
    kept = set(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return not kept.isdisjoint(name.split("."))


def check_folder(path: str | PathLike[str]) -> None:
    """Refuse a folder with other files than a saved model's, because this package must not move them.

    Raises:
        NotADirectoryError: If the path is a file.
        FileExistsError: If the folder holds other files.
        ValueError: If it is the working directory or holds it.
    """
    folder = Path(path).resolve()
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"Expected a folder to save to, but {path} is a file.")
    if any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise FileExistsError(
            f"Expected a new or an empty folder, or one with a saved model, but {path} holds other files. Save to a "
            "folder inside of it."
        )
    if Path.cwd().is_relative_to(folder):
        raise ValueError(
            f"Expected a folder to replace, but {path} is the working directory, or holds it. Change to another."
        )
