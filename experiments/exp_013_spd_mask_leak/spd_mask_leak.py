"""How well do SPD's masks alone predict the next token? A gate that sees the future can write it into its masks.

A probe (probes.py) reads which components are active (g_lo > 0, all modules) and predicts the next token among the `classes`
most frequent ones; trained on documents of the tuning text, measured on others. Beside it: masks shuffled over positions (what
frequencies alone give), the current token (what any honest gate may know, a bigram probe), and, with --gate-steps, gates trained
in place of its own, the components kept: one causal transformer and one bidirectional, as Goodfire's are. `told` is what masks
add to what the model says itself: how much the cross-entropy of the model's prediction falls where the probe has the masks too,
with a bootstrap interval over documents. The positive control is a leak that is planted: one more component, active where the
next token's class is odd; `possible` is what that bit adds to the model's prediction where it is used in full.

    python experiments/exp_013_spd_mask_leak/spd_mask_leak.py                    # the shipped decomposition of `tiny`
    python experiments/exp_013_spd_mask_leak/spd_mask_leak.py --gate-steps 400   # and both transformer gates
    … --replot draws the figure again from points.csv

Expected: a per-position gate tells next to nothing, the planted leak most of what is possible; a bidirectional gate more
than a causal one, if it leaks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from jaxtyping import Int
from probes import Positions, interval, no_features, probe, worth
from torch import Tensor
from tqdm import trange

from config import GateConfig, Lp, Recon, SPDTrainConfig
from devices import bf16_is_fast
from evaluation import held_out
from logs import atomic_path, read_csv, write_csv, write_settings
from spd_model import ComponentModel
from spd_runs import find_spd, load_decomposition
from spd_training import SPDTrainer
from study import StudySettings, run_study
from target_models import TargetModel, load_target

COLUMNS = ["gate", "probe_ce", "shuffled_ce", "current_token_ce", "model_ce", "told", "told_low", "told_high", "possible", "l0",
           "tokens", "documents", "classes", "gate_steps"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    target: str = "tiny"
    checkpoint: str | None = None  # of an SPD, a folder or a W&B artifact; None: the target's own
    eval_tokens: int = 51_200  # of the test text, that measure the probe; as many of the tuning text train it
    classes: int = 256  # most frequent next tokens; positions with others are left out
    probe_rounds: int = 200  # components that the probe may take up, at most
    gate_steps: int = 0  # steps of training each transformer gate; 0: only the decomposition's own gate
    device: Literal["cpu"] = "cpu"
    output: Path = Path(__file__).parent / "output"


def masks(model: ComponentModel, tokens: Int[Tensor, "sequence seq"]) -> Tensor:
    """Which components are active at each position but the last of each sequence: position × all components, uint8."""
    out = []
    with torch.inference_mode():
        for rows in tokens.split(16):
            z = model.importance_logits(model.inputs_capture(rows)[0])
            out.append(torch.cat([(z[path] > 0)[:, :-1].flatten(0, 1) for path in model.paths], -1).to(torch.uint8))
    return torch.cat(out)


def with_gate(own: ComponentModel, target: TargetModel, s: Settings, *, causal: bool) -> ComponentModel:
    """The same components, a transformer gate trained to serve them."""
    gate = GateConfig(kind="global_shared_transformer", hidden=(256,), d_model=128, blocks=2, heads=4, causal=causal)
    model = own.with_gate(gate, torch.Generator().manual_seed(s.seed))
    recipe = SPDTrainConfig(
        steps=s.gate_steps, lr=1e-3, recon=(Recon(coefficient=1.0),), distance="kl",
        minimality=Lp(coefficient=5e-4, p=(2.0, 0.4)),
        warmup=0.05, final=0.1,
    )  # fmt: skip
    trainer = SPDTrainer(model, recipe, autocast=bf16_is_fast(target.device))
    for components in model.components.values():
        components.requires_grad_(False)
    stream = target.stream("train", 4, s.seed)
    for _ in trange(s.gate_steps, desc="causal gate" if causal else "bidirectional gate", mininterval=2.0):
        trainer.step(next(stream))
    return model


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    own, _ = find_spd(target, ()) if s.checkpoint is None else load_decomposition(s.checkpoint, target)
    texts = [held_out(target, s.eval_tokens, split) for split in ("tuning", "test")]
    tokens, length = torch.cat([text.tokens for text in texts]), texts[0].tokens.shape[1] - 1
    nexts, current = tokens[:, 1:].flatten(), tokens[:, :-1].flatten()
    common = torch.bincount(nexts, minlength=target.vocab_size).topk(s.classes).indices
    label = torch.full((target.vocab_size,), -1).scatter(0, common, torch.arange(s.classes))[nexts]
    kept = (label >= 0).nonzero().flatten()
    documents = torch.cat([text.documents for text in texts]).repeat_interleave(length)[kept]
    of_test, y = kept >= len(texts[0].tokens) * length, label[kept]
    positions = Positions(y, ~of_test & (documents % 8 > 0), ~of_test & (documents % 8 == 0), of_test)
    with torch.inference_mode():
        logits = torch.cat([target.logits(rows)[:, :-1, common].flatten(0, 1) for rows in tokens.split(16)])[kept]
    known, nothing = logits.log_softmax(-1).clone(), torch.zeros(len(y), s.classes)

    def ce(x: Tensor, given: Tensor = nothing) -> Tensor:
        return probe(positions, x, given, rounds=s.probe_rounds)

    frequent = torch.bincount(current, minlength=target.vocab_size).topk(min(1024, target.vocab_size)).indices
    bigram = ce(current[kept, None] == frequent).mean().item()
    model_ce = ce(no_features(positions), known)
    gates = {f"{own.config.gate.kind} (its own)": own}
    for causal in (True, False) if s.gate_steps else ():
        gates[f"{'causal' if causal else 'bidirectional'} transformer"] = with_gate(own, target, s, causal=causal)
    seen = {name: masks(model, tokens)[kept] for name, model in gates.items()}
    first, odd = next(iter(seen)), (y % 2).to(torch.uint8)[:, None]
    seen[f"{first} and a planted leak"] = torch.cat([seen[first], odd], 1)
    shuffle, rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(s.seed)), []
    for name, x in seen.items():
        told = model_ce - ce(x, known)
        scores = [ce(x).mean().item(), ce(x[shuffle]).mean().item(), bigram, model_ce.mean().item(), told.mean().item(),
                  *interval(told, documents[of_test]), worth(known, positions) if name.endswith("leak") else None]  # fmt: skip
        l0, steps = x.float().sum(1).mean().item() / len(own.paths), s.gate_steps if "transformer" in name else None
        told_of = [s.eval_tokens, len(texts[1].documents.unique()), s.classes, steps]
        rows.append([name, *(v if v is None else round(v, 4) for v in scores), round(l0, 2), *told_of])
        print(dict(zip(COLUMNS, rows[-1])))
    write_csv(s.output / "points.csv", COLUMNS, rows)
    write_settings(s.output, s, s.device)
    draw(s.output)


def draw(folder: Path) -> None:
    rows = read_csv(folder / "points.csv")
    told = "told" if "told" in rows[0] else "probe_ce"  # as in tables of before it was measured
    low, middle, high = ([float(row.get(key, row[told])) for row in rows] for key in ("told_low", told, "told_high"))
    figure, axis = plt.subplots(figsize=(6.5, 2.6), layout="tight")
    spread = ([b - a for a, b in zip(low, middle)], [b - a for a, b in zip(middle, high)])
    axis.barh([row["gate"] for row in rows], middle, xerr=spread, height=0.5)
    axis.plot([float(row.get("possible") or "nan") for row in rows], range(len(rows)), "|", markersize=30, color="0.3")
    axis.set(xlabel=f"{told.replace('_', ' ')} (nats)")
    with atomic_path(folder / "mask_leak.png") as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    table = (COLUMNS, ["--"] * len(COLUMNS), *(row.values() for row in rows))
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    text = f"# What SPD's masks tell of the next token\n\n![probes](mask_leak.png)\n\n{lines}\n\n```\n{__doc__}```\n"
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    run_study(main, [Settings()], __doc__, redraw=draw)
