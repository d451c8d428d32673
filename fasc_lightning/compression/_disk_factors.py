"""Finished factors on the disk, for calibrations whose moments do not fit: all factors would take more than they do."""

from __future__ import annotations

from tempfile import NamedTemporaryFile, gettempdir

import torch

from fasc_lightning.solvers import Factorization


def offload_to_disk(factorization: Factorization) -> Factorization:
    """Return the same with its factors in a file, mapped into memory: what is not read of them takes none.

    The file has no name and goes with the tensors.

    Raises:
        OSError: If there is no room for it.
    """
    size = factorization.left.nbytes + factorization.right.nbytes
    with NamedTemporaryFile(prefix="fasc-", suffix=".pt") as file:
        try:
            torch.save((factorization.left.cpu(), factorization.right.cpu()), file)
            file.flush()
        except (OSError, RuntimeError) as error:  # torch's writer has errors of its own
            raise OSError(
                f"Expected room for {size / 1e9:.2f} GB of factors in {gettempdir()} but: {error}. Factors of layers "
                "wait there for the last pass, 2 to 3 times the layers' weights in all. HINT: the environment variable "
                "TMPDIR names another folder."
            ) from error
        left, right = torch.load(file.name, mmap=True, weights_only=True)
    return Factorization(left, right, factorization.losses)
