"""All-reduced statistics of the tokens that a process is given; run as one of several processes of a script."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fasc_lightning.statistics import Accumulator, CalibrationMoments, LayerSketches, Sketch
from fasc_lightning.statistics._layer_moments import NEEDS

SHAPES = {"q": (3, 4), "k": (2, 4)}
SKETCHES = {"q": LayerSketches(Sketch(4, 2), Sketch(3, 1)), "k": LayerSketches(Sketch(4, 2))}


def gather(parts: range, sketched: bool = False) -> CalibrationMoments:
    """Moments of some of four sequences of unequal lengths; only the last one meets k without q."""
    moments = CalibrationMoments(SHAPES, torch.float64, needs=NEEDS, sketches=SKETCHES if sketched else None)
    for part in parts:
        generator = torch.Generator().manual_seed(part)
        tokens = 3 + part
        x = torch.randn(tokens, 4, dtype=torch.float64, generator=generator)
        names = ["k"] if part == 3 else ["q", "k"]
        moments.add_inputs(names, x)
        for name in names:
            h = torch.randn(tokens, SHAPES[name][0], dtype=torch.float64, generator=generator)
            moments.add_gradients(name, h)
            moments.add_pairs(name, x, h, [2, tokens - 2], g=h @ torch.ones(SHAPES[name], dtype=torch.float64))
    return moments


def refusal(rank: int, what: str) -> str:
    """What is said of moments that differ between the processes: of their sketches' seeds, or of one layer."""
    if what == "seeds":
        moments = CalibrationMoments({"q": (3, 4)}, sketches={"q": LayerSketches(Sketch(4, 2, seed=rank))})
    else:
        moments = CalibrationMoments({"q": (3, 4 + rank)})
    try:
        moments.all_reduce_()
    except ValueError as error:
        return str(error)
    return "nothing"


def streams(moments: CalibrationMoments) -> list[Accumulator]:
    """All streams in an order that does not depend on which layers a process met first."""
    held = (moments.inputs, moments.gradients, moments.couplings)
    return [group[key] for group in held for key in sorted(group)]


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=2)
    exact, sketched = (gather(range(2) if rank == 0 else range(2, 4), sketched) for sketched in (False, True))
    exact.all_reduce_()
    sketched.all_reduce_()
    torch.save({name: vars(exact.layer(name)) for name in SHAPES}, folder / f"{rank}.pt")
    torch.save([stream.sums for stream in streams(sketched)], folder / f"{rank}.sketched.pt")
    (folder / f"{rank}.refused.json").write_text(json.dumps([refusal(rank, what) for what in ("seeds", "layers")]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
