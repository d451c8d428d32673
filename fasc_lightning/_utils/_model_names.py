"""Names of models, checked before a hub client reads them: a folder, or an id on the hub."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from fasc_lightning._utils._near import did_you_mean

#: Seconds to wait for the hub's answer whether it has a model.
_HUB_SECONDS = 10


def checked_model_name(
    name: str | PathLike[str],
    expected: str = "a model folder or a hub id",
    *,
    file: str = "config.json",
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    token: str | bool | None = None,
) -> str:
    """Return a folder or a hub id that exists. Without this check transformers tries a download for half a minute.

    Args:
        name: A folder, or an id on the hub.
        expected: What may be named, for messages.
        file: A file of the model; a model whose file is in the cache is not asked for.
        revision: Branch, tag or commit on the hub; None for the main branch.
        cache_dir: Folder of downloads; None for the hub's own.
        token: Token of the hub, as for ``from_pretrained``.

    Raises:
        FileNotFoundError: If there is no such folder and no such model, or if the hub cannot be reached.
    """
    folder = checked_model_path(name, expected)
    if not Path(folder).is_dir():
        _check_hub(folder, expected, file, revision, cache_dir, token)
    return folder


def checked_model_path(name: str | PathLike[str], expected: str = "a model folder or a hub id") -> str:
    """Return a folder that exists, or a name that may be a hub id. The hub is not asked.

    Args:
        name: A folder, or an id on the hub. A ``Path`` is a folder.
        expected: What may be named, for messages.

    Raises:
        FileNotFoundError: If the name is a path and no folder.
    """
    path, text = Path(name).expanduser(), os.fspath(name)
    if text and path.is_dir():
        return str(path)
    # A hub id is "name" or "organisation/name".
    id_like = isinstance(name, str) and text.count("/") < 2 and all(text.split("/"))
    if path.exists() or path.is_absolute() or text.startswith((".", "~")) or not id_like:
        beside = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, beside)
        raise FileNotFoundError(f"Expected {expected}, but got {text!r}: {path.absolute()} is not a folder.{near}")
    return text


def model_not_found(name: str, expected: str, error: Exception) -> FileNotFoundError:
    """Return the error for a name that is neither a folder nor on the hub, with the first line of its cause."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return FileNotFoundError(
        f"Expected {expected}, but got {name!r}: there is no such folder, and the hub gave no such model ({reason})"
    )


def _check_hub(
    name: str,
    expected: str,
    file: str,
    revision: str | None,
    cache_dir: str | PathLike[str] | None,
    token: str | bool | None,
) -> None:
    """Refuse a hub id that is neither in the cache nor on the hub, without the many tries of a download.

    Raises:
        FileNotFoundError: If the hub has no such model or cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cached = None if cache_dir is None else Path(cache_dir)
    try:
        if isinstance(try_to_load_from_cache(name, file, cache_dir=cached, revision=revision), str):
            return
        HfApi(token=token).model_info(name, revision=revision, timeout=_HUB_SECONDS)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        if not isinstance(error, GatedRepoError):  # transformers says how to get access
            raise model_not_found(name, expected, error) from error
    except HfHubHTTPError:
        return  # a mirror without this request: the download decides
    except OSError as error:  # of the network, or offline mode
        raise model_not_found(name, expected, error) from error
    except Exception as error:
        if "Connect" not in type(error).__name__ and "Timeout" not in type(error).__name__:
            raise
        raise model_not_found(name, expected, error) from error  # the HTTP client's, which depend on the hub's version
