"""Dictionaries that were not learnt: each trained transcoder with every direction it reads and writes drawn afresh.

    python examples/random_directions.py MODEL FOLDER CHECKPOINT…

Norms stay, and so does what it writes without an active latent; the threshold is set again, so that as many latents are active
as before on average. What such a coder scores is what a score says of nothing.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from checkpoints import load_checkpoint, save_checkpoint
from evaluation import held_out
from patching import capture
from target_models import load_target


def drawn_afresh(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of the same norms in other directions."""
    return normalize(torch.randn(rows.shape, generator=generator), dim=-1) * rows.norm(dim=-1, keepdim=True)


def main(model: str, folder: Path, references: list[str]) -> None:
    target, generator = load_target(f"hf:{model}", "cpu"), torch.Generator().manual_seed(0)
    tokens = held_out(target, 8_192, "tuning").tokens
    for reference in references:
        checkpoint = load_checkpoint(reference, "cpu")
        coder = checkpoint.coder
        with torch.no_grad():
            for rows in (coder.encoder.W_enc, coder.W_dec):
                rows.copy_(drawn_afresh(rows, generator))
        coder.calibrate(
            [capture(target, some, coder.config.layers).inputs[0].flatten(0, 1) for some in tokens.split(8)]
        )
        name = f"random_{checkpoint.record.name}"
        record = replace(checkpoint.record, name=name, train_tokens=0, train_seconds=0.0, recipe="random directions")
        save_checkpoint(folder / name, coder, record)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
