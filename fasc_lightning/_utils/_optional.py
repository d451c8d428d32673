"""Optional packages: one message for a missing one, with the command that installs it."""

from __future__ import annotations

import importlib.util


def require(use: str, extra: str, *packages: str, instead: str = "") -> None:
    """Refuse a use whose optional packages are not installed. Nothing is imported.

    Args:
        use: The use and its verb, as "Figures need".
        extra: The extra of this package that installs them.
        packages: Names of the packages, as they are imported.
        instead: What to do without them, as "or give a file of facts"; "" if there is no other way.

    Raises:
        ModuleNotFoundError: If a package is missing. The message names each of them and the command.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(name.replace("_", "-") for name in missing)
        raise ModuleNotFoundError(
            f"{use} {names}. Run `pip install 'fasc-lightning[{extra}]'`{f', {instead}' if instead else ''}."
        )
