"""How well do SPD's masks alone predict the next token? A gate that sees the future can write it into its masks.

A linear softmax probe reads which components are active (g_lo > 0, all modules) and predicts the next token among the
`classes` most frequent ones; trained on one stretch of held-out text, measured on another. Beside it: masks shuffled
over positions (what frequencies alone give), the current token (what any honest gate may know, a bigram probe), and,
with --gate-steps, gates trained in place of its own, the components kept: one causal transformer and one
bidirectional, as Goodfire's are.

    python experiments/exp_013_spd_mask_leak/spd_mask_leak.py                    # the shipped decomposition of `tiny`
    python experiments/exp_013_spd_mask_leak/spd_mask_leak.py --gate-steps 400   # and both transformer gates
    … --replot draws the figure again from points.csv

Expected: a per-position gate predicts about as well as, or less well than, the model itself; a bidirectional one better
than any causal predictor could, if it leaks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import trange

from config import GateConfig, Recon, SPDTrainConfig
from devices import bf16_is_fast
from evaluation import held_out
from logs import atomic_path, read_csv, write_csv, write_settings
from spd_model import ComponentModel
from spd_runs import find_spd, load_decomposition
from spd_training import SPDTrainer
from study import StudySettings, run_study
from target_models import TargetModel, load_target
from token_stream import TokenStream

COLUMNS = ["gate", "probe_ce", "shuffled_ce", "current_token_ce", "model_ce", "l0", "tokens", "classes", "gate_steps"]


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    target: str = "tiny"
    checkpoint: str | None = None  # of an SPD, a folder or a W&B artifact; None: the target's own
    eval_tokens: int = 102_400  # half of them, in sequences drawn at random, train the probe; the others measure it
    classes: int = 256  # most frequent next tokens; positions with others are left out
    probe_steps: int = 1000
    probe_lr: float = 1e-2
    gate_steps: int = 0  # steps of training each transformer gate; 0: only the decomposition's own gate
    device: Literal["cpu"] = "cpu"
    output: Path = Path(__file__).parent / "output"


def probe(x: Float[Tensor, "position feature"], y: Int[Tensor, "position"], s: Settings) -> float:
    """Held-out cross-entropy (nats) of a linear softmax classifier trained on the first half."""
    half, generator = len(x) // 2, torch.Generator().manual_seed(s.seed)
    W = torch.zeros(x.shape[1], s.classes, requires_grad=True)
    frequency = torch.bincount(y[:half], minlength=s.classes) + 1.0
    b = frequency.div(frequency.sum()).log().requires_grad_()
    optimiser = torch.optim.Adam([W, b], lr=s.probe_lr)
    best = float("inf")
    for step in range(s.probe_steps + 1):
        if step % 50 == 0:  # the best of a few readings: an early stop, the same rule for every probe
            with torch.no_grad():
                best = min(best, F.cross_entropy(x[half:].float() @ W + b, y[half:]).item())
        rows = torch.randint(half, (1024,), generator=generator)
        F.cross_entropy(x[rows].float() @ W + b, y[rows]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return best


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
        steps=s.gate_steps, lr=1e-3, recon=(Recon(coefficient=1.0),), minimality=5e-4, distance="kl", p=(2.0, 0.4),
        warmup=0.05, final=0.1,
    )  # fmt: skip
    trainer = SPDTrainer(model, recipe, autocast=bf16_is_fast(target.device))
    for components in model.components.values():
        components.requires_grad_(False)
    stream = TokenStream(target.data, target.tokenizer, "train", 4, target.context, s.seed)
    for _ in trange(s.gate_steps, desc="causal gate" if causal else "bidirectional gate", mininterval=2.0):
        trainer.step(next(stream))
    return model


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    own, _ = find_spd(target, ()) if s.checkpoint is None else load_decomposition(s.checkpoint, target)
    tokens = held_out(target, s.eval_tokens).tokens
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(s.seed))]
    nexts, current = tokens[:, 1:].flatten(), tokens[:, :-1].flatten()
    common = torch.bincount(nexts, minlength=target.vocab_size).topk(s.classes).indices
    label = torch.full((target.vocab_size,), -1).scatter(0, common, torch.arange(s.classes))[nexts]
    kept = (label >= 0).nonzero().flatten()
    frequent = torch.bincount(current, minlength=target.vocab_size).topk(min(1024, target.vocab_size)).indices
    y = label[kept]
    bigram = probe((current[kept, None] == frequent).to(torch.uint8), y, s)
    with torch.inference_mode():
        logits = torch.cat([target.logits(rows)[:, :-1, common].flatten(0, 1) for rows in tokens.split(16)])[kept]
    model_ce = F.cross_entropy(logits[len(y) // 2 :], y[len(y) // 2 :]).item()
    gates = {f"{own.config.gate.kind} (its own)": own}
    for causal in (True, False) if s.gate_steps else ():
        gates[f"{'causal' if causal else 'bidirectional'} transformer"] = with_gate(own, target, s, causal=causal)
    shuffle = torch.randperm(len(y), generator=torch.Generator().manual_seed(s.seed))
    rows = []
    for name, model in gates.items():
        x = masks(model, tokens)[kept]
        scores = [round(v, 4) for v in (probe(x, y, s), probe(x[shuffle], y, s), bigram, model_ce)]
        l0 = x.float().sum(1).mean().item() / len(model.paths)
        rows.append([name, *scores, round(l0, 2), s.eval_tokens, s.classes, s.gate_steps if model is not own else None])
        print(dict(zip(COLUMNS, rows[-1])))
    write_csv(s.output / "points.csv", COLUMNS, rows)
    write_settings(s.output, s, s.device)
    draw(s.output)


def draw(folder: Path) -> None:
    rows = read_csv(folder / "points.csv")
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="tight")
    axis.bar([row["gate"] for row in rows], [float(row["probe_ce"]) for row in rows], width=0.4)
    for key, style in (("shuffled_ce", ":"), ("current_token_ce", "--"), ("model_ce", "-")):
        axis.axhline(float(rows[0][key]), linestyle=style, color="0.3", label=key.removesuffix("_ce").replace("_", " "))
    axis.set(ylabel="cross-entropy of the next token (nats)", title="What masks alone tell of the next token")
    axis.legend(fontsize=7)
    with atomic_path(folder / "mask_leak.png") as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    table = (COLUMNS, ["--"] * len(COLUMNS), *(row.values() for row in rows))
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    text = f"# What SPD's masks tell of the next token\n\n![probes](mask_leak.png)\n\n{lines}\n\n```\n{__doc__}```\n"
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    run_study(main, [Settings()], __doc__, redraw=draw)
