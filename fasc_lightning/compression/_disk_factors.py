"""Finished factors on disk, for calibrations whose moments fill the memory: all factors together are larger."""

from __future__ import annotations

from tempfile import NamedTemporaryFile, gettempdir

import torch

from fasc_lightning._utils import amount
from fasc_lightning.solvers import Factorization


def offload_to_disk(factorization: Factorization) -> Factorization:
    """Return the factorisation with memory-mapped factors in a file, so factors that are not read use no RAM.

    The file has no name and disappears with the tensors.

    Raises:
        OSError: If the disk has no room for it.
    """
    size = factorization.left.nbytes + factorization.right.nbytes
    with NamedTemporaryFile(prefix="fasc-", suffix=".pt") as file:
        try:
            torch.save((factorization.left.cpu(), factorization.right.cpu()), file)
            file.flush()
        except (OSError, RuntimeError) as error:  # torch's writer has errors of its own
            raise OSError(
                f"Expected room for {amount(size, 'B')} of factors in {gettempdir()} but: {error}. Factors of layers "
                "wait there for the last pass, 2 to 3 times the layers' weights in all. HINT: the environment variable "
                "TMPDIR names another folder."
            ) from error
        left, right = torch.load(file.name, mmap=True, weights_only=True)
    return Factorization(left, right, factorization.losses)
