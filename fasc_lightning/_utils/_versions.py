"""Versions of the libraries that a result depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that affect its results."""
    versions = {}
    for package in ("fasc-lightning", "torch", "lightning", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
