"""The command line that shows what units say: one HTML file that opens anywhere, without a server or a network.

    python features.py CHECKPOINT… --target tiny                     checkpoints of this project, SPD's included
    python features.py assets/spd_tiny                               the shipped decomposition
    python features.py FOLDER… --target gpt2 --format saelens        dictionaries in another library's format
    python features.py wandb:ENTITY/PROJECT/runs/ID --target pile    an SPD run of Goodfire's, or the folder of one

A list to search and sort, and of each latent or component: held-out text in which it is active, how often and how strongly,
the tokens that it makes more and less likely, where it writes, and the units most like it. What these mean: `units.py`,
`unit_activity.py`. The page is `features_page.html` with the data in it: numbers as typed arrays, each token's text once.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from coder_replacements import CoderReplacement, as_replacements
from config import Site
from evaluation import clean_pass, held_out, pick, sequences_at_once
from foreign_files import Place
from foreign_formats import Named
from logs import atomic_path, command_line
from spd_replacement import SPDReplacement
from spd_runs import GateInputs
from target_models import TargetModel, load_target
from unit_activity import BEFORE, BINS, QUARTERS, SPAN, Example, UnitActivity
from units import LogitEffects, Related, UnitGroup, Units, logit_effects, logit_jacobian, nearest, units_of

TEMPLATE = Path(__file__).with_name("features_page.html")
TOKENS, RELATED = 8, 6  # promoted and suppressed tokens, and related units, of each unit
SEQUENCES, POSITIONS = 4, 9  # of the text at which the last norm is linearised
UNITS = 8192  # on a page: about a kilobyte each


class Findings(NamedTuple):
    """All that a page says, unit by unit in the order of the groups."""

    groups: list[UnitGroup]
    counts: Int[Tensor, "unit"]
    peaks: Tensor  # largest |a|
    effects: LogitEffects  # of the mean activation
    nearest: Related
    partners: list[Related]  # of each group, counted through all groups
    histogram: Int[Tensor, "unit bin"]
    ends: Tensor  # where the histogram ends
    examples: list[list[Example]]  # spans relative to the peak


def find(
    target: TargetModel,
    read_at: TargetModel,
    replacements: Sequence[CoderReplacement | SPDReplacement],
    tokens: Int[Tensor, "sequence seq"],
    most: int = UNITS,
) -> Findings:
    """One pass over the text; `read_at` is the target at the site of the dictionaries.

    Of more than `most` units in all, a sample is drawn: the same number of each layer or matrix.
    """
    n_groups = sum(len(r.part_groups(r.layers)) for r in replacements)
    every = [units_of(replacement, max(1, most // n_groups)) for replacement in replacements]
    activities = gather(read_at, every, tokens)
    groups = [group for units in every for group in units.groups]
    sums, sizes, counts, peaks = (
        torch.cat([getattr(activity, name) for activity in activities]) for name in ("sums", "sizes", "counts", "peaks")
    )
    sign = torch.where(sums < 0, -1.0, 1.0)
    directions = torch.cat([group.directions for group in groups]) * sign[:, None].to(target.device)
    means = (sizes / counts.clamp_min(1)).float().to(target.device)
    jacobian = logit_jacobian(target, tokens[:SEQUENCES, :POSITIONS])
    examples = [own for activity in activities for own in activity.examples()]
    return Findings(
        groups=groups,
        counts=counts,
        peaks=peaks,
        effects=logit_effects(directions * means[:, None], jacobian, TOKENS),
        nearest=nearest(directions, counts.to(target.device), RELATED),
        partners=_partners(every, sign),
        histogram=torch.cat([activity.histogram for activity in activities]),
        ends=torch.cat([torch.exp2(activity.exponents.float()) for activity in activities]),
        examples=[[e._replace(span=e.span * (s / peak)) for e in own] for own, s, peak in zip(examples, sign, peaks)],
    )


def _partners(every: Sequence[Units], sign: Float[Tensor, "unit"]) -> list[Related]:
    """Of each group, counted through all groups; cosines are of units whose signs are those that the page shows."""
    found, before = [], 0
    for units in every:
        own = before
        for group, (ids, cosines) in zip(units.groups, units.partners(RELATED)):
            signs = sign[own : own + len(group.numbers), None] * sign[ids + before]
            found.append(Related(ids + before, cosines * signs))
            own += len(group.numbers)
        before = own
    return found


def gather(target: TargetModel, every: Sequence[Units], tokens: Int[Tensor, "sequence seq"]) -> list[UnitActivity]:
    """What each group's units do on the text, in one pass of the model over it."""
    activities = [[UnitActivity(len(group.numbers), tokens.shape[1]) for group in units.groups] for units in every]
    read = sorted({layer for units in every for layer in units.replacement.reads})
    watched = list(dict.fromkeys(path for units in every for path in units.replacement.watches))
    batch, first = sequences_at_once(target, tokens.shape[1]), 0
    with torch.no_grad():
        for sequences in tqdm(tokens.split(batch), desc="activations", unit="batch", mininterval=1.0):
            clean = clean_pass(target, sequences.to(target.device), read, watched).activations
            for units, own in zip(every, activities):
                for activity, events in zip(own, units.events(pick(clean, read, units.replacement.reads))):
                    activity.add(events, first)
            first += sequences.numel()
    return [activity for own in activities for activity in own]


# ---------------------------------------------------------------------------------------------------------- the page


def token_texts(target: TargetModel, ids: Sequence[int]) -> list[str]:
    """The text of each token within a line: some tokenizers drop a space before the first token of all."""
    decode = target.tokenizer.decode
    return [decode([i, i])[len(decode([i])) :] for i in ids]


def packed(values: Any, kind: str) -> dict[str, str]:
    """Numbers as the page reads them: a little-endian typed array in base64."""
    return {"type": kind, "base64": base64.b64encode(np.ascontiguousarray(values, np.dtype(kind)).tobytes()).decode()}


def page_data(
    target: TargetModel, found: Findings, tokens: Int[Tensor, "sequence seq"], title: str
) -> dict[str, Any]:  # fmt: skip
    """What the page's script reads: numbers of a unit stand side by side in arrays over all units."""
    text = tokens.cpu().flatten()
    effect_ids = torch.cat([found.effects.promoted, found.effects.suppressed], dim=1).cpu()
    vocabulary, compact = torch.cat([text, effect_ids.flatten()]).unique(return_inverse=True)
    ids = "<u2" if len(vocabulary) <= 2**16 else "<u4"
    effects = torch.cat([found.effects.promotion, found.effects.suppression], dim=1).cpu()
    examples = [example for own in found.examples for example in own]
    spans = torch.stack([example.span for example in examples]) if examples else torch.zeros(0, SPAN)
    groups, first = [], 0
    for group, partners in zip(found.groups, found.partners):
        shown = {"method": group.method, "layer": group.layer, "part": group.part, "total": group.total}
        places = {"first": first, "n": len(group.numbers), "targets": group.targets}
        related = {"partner": packed(partners.units, "<u4"), "partnerCosine": packed(partners.cosines, "<f4")}
        sizes = [] if group.target_sizes is None else group.target_sizes.cpu()
        groups.append(shown | places | related | {"targetSizes": packed(sizes, "<f4")})
        first += len(group.numbers)
    arrays = {
        "text": packed(compact[: len(text)], ids),
        "number": packed(torch.cat([group.numbers for group in found.groups]).cpu(), "<u4"),
        "count": packed(found.counts, "<u4"),
        "peak": packed(found.peaks, "<f4"),
        "effectToken": packed(compact[len(text) :], ids),
        "effect": packed(effects, "<f4"),
        "near": packed(found.nearest.units.cpu(), "<u4"),
        "nearCosine": packed(found.nearest.cosines.cpu(), "<f4"),
        "histogram": packed(found.histogram, "<u4"),
        "histogramEnd": packed(found.ends, "<f4"),
        "exampleFirst": packed(np.cumsum([0, *map(len, found.examples)]), "<u4"),
        "place": packed([example.place for example in examples], "<u4"),
        "quarter": packed([example.quarter for example in examples], "<u1"),
        "span": packed((spans * 127).round(), "<i1"),
    }
    sizes = {"before": BEFORE, "span": SPAN, "bins": BINS, "effects": TOKENS, "quarters": QUARTERS}
    return {
        "title": title, "target": target.name, "tokens": len(text), "seq": tokens.shape[1], "sizes": sizes,
        "counted": len(text) - len(tokens), "related": found.nearest.units.shape[1],
        "vocabulary": token_texts(target, vocabulary.tolist()), "groups": groups, "arrays": arrays,
    }  # fmt: skip


def page(data: dict[str, Any]) -> str:
    """The template with the data in it. A "<" of a token is written so that no text can end the script or begin a tag."""
    template, marker = TEMPLATE.read_text(encoding="utf-8"), "{{data}}"
    assert template.count(marker) == 1, f"{TEMPLATE} needs {marker} once"
    return template.replace(marker, json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def write_page(
    path: Path,
    target: TargetModel,
    replacements: Sequence[CoderReplacement | SPDReplacement],
    tokens: Int[Tensor, "sequence seq"],
    read_at: TargetModel | None = None,
) -> None:
    """The page of these replacements' units; `read_at`: the target at the site of the dictionaries, if it is another."""
    found = find(target, read_at or target, replacements, tokens)
    methods = ", ".join(dict.fromkeys(group.method for group in found.groups))
    with atomic_path(path) as temporary:
        temporary.write_text(page(page_data(target, found, tokens, f"{methods} of {target.name}")), encoding="utf-8")


def main(
    checkpoints: tuple[str, ...],
    target: str = "tiny",
    tokens: int = 131_072,
    format: str = "",
    layer: int | None = None,
    site: Site | None = None,
    unproven_target: bool = False,
    gate_inputs: GateInputs | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    output: Path = Path("output/features.html"),
) -> None:
    """Write one HTML file that shows the units of dictionaries and decompositions on a target's held-out text.

    Args:
        checkpoints: Folders, W&B artifacts or Goodfire's SPD runs, wandb:ENTITY/PROJECT/runs/ID.
        target: tiny, pile, pile-32d1bb3b, simplestories, gpt2, smollm2, hf:NAME or tl:NAME.
        tokens: Held-out tokens in which examples are looked for.
        format: upstream, saelens, sparsify, dictionary_learning, circuit-tracer or crosslayer-coding; empty: our own.
        layer: Layer of a foreign dictionary whose files do not say it.
        site: What a foreign SAE reads, where its files do not say.
        unproven_target: Show a Goodfire run also where it lacks the weights that prove which model it decomposes.
        gate_inputs: Whether the transformer gate of a Goodfire run norms what it reads, where nothing else says it.
        device: cpu, cuda, cuda:1, …
        output: The file that is written.
    """
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file in it, such as {output / 'features.html'}")
    named = Named(checkpoints, format, Place(layer, site))
    named.check()
    model = load_target(target, device)
    found = named.open(model, unproven=unproven_target, gate_inputs=gate_inputs)
    replacements = [
        *as_replacements(found.coders),
        *(SPDReplacement(model, components) for components, _ in found.decompositions.values()),
    ]
    write_page(output, model, replacements, held_out(model, tokens).tokens, found.target)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    command_line(main, "features.py")
