"""Can a language model good enough to decompose be trained on a laptop? The embedded target `tiny`.

A LlamaSimpleMLP of 4 layers (n_embd 192) on the Python sources of the running environment: rows of 256 tokens in random
order, each seen at most once. Hidden matrices train with Muon (torch.optim.Muon; Jordan 2024), which needs far fewer tokens
than AdamW in runs this short; the tied embedding and the norms with AdamW. Warm-up, plateau, linear decay over the second
half. An interrupted run goes on from its last state; a finished one is exported to `assets/tiny` with its card.

    python experiments/exp_000_train_tiny_target/train_tiny_target.py    # offline

Expected: at most 1.25 bits per byte on held-out files.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from corpus_tokens import tokenise, train_tokenizer
from jaxtyping import Int
from target_card import HeldOut, export
from torch import Tensor
from tqdm import trange

from checkpoints import CHECKPOINTS, load_tensors, save_tensors
from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise
from logs import errors_in_one_line, write_settings
from python_corpus import HELD_OUT
from study import check_counts
from target_loaders import ASSETS


@dataclass(frozen=True, kw_only=True)
class Settings:
    tokens: int = 13_000_000  # training tokens
    batch: int = 32  # sequences per step
    layers: int = 4
    vocab: int = 4096
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    tokenizer_files: int = 4000  # training files the byte-pair encoding is learnt from
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0
    state: Path = CHECKPOINTS / "exp_000"  # the tokenizer, and what an interrupted run goes on from
    model: Path = ASSETS / "tiny"  # where the finished model goes
    output: Path = Path(__file__).parent / "output"


def rows(tokens: Int[Tensor, "token"], which: Int[Tensor, "batch"], seq: int) -> tuple[Tensor, Tensor]:
    index = which[:, None] * seq + torch.arange(seq)
    return tokens[index].long(), tokens[index + 1].long()


@torch.inference_mode()
def held_out_nats(model: LlamaSimpleMLP, tokens: Int[Tensor, "token"], limit: int) -> float:
    """Mean cross-entropy per token over the first `limit` rows, spread over the split."""
    seq, n = model.config.block_size, (len(tokens) - 1) // model.config.block_size
    chosen = torch.arange(0, n, max(1, n // limit))
    total = 0.0
    for which in chosen.split(32):
        x, y = (t.to(model.lm_head.weight.device) for t in rows(tokens, which, seq))
        total += model(x, y)[1].item() * len(which)
    return total / len(chosen)


def train(
    s: Settings, tokens: Int[Tensor, "token"], val: Int[Tensor, "token"]
) -> tuple[LlamaSimpleMLP, list[dict[str, float]]]:
    config = LlamaSimpleMLPConfig(256, s.vocab, s.layers, n_head=6, n_embd=192, n_intermediate=768, n_key_value_heads=6)
    model, generator = LlamaSimpleMLP(config), torch.Generator().manual_seed(s.seed)
    initialise(model, generator)
    model.to(s.device)
    order = torch.randperm((len(tokens) - 1) // 256, generator=generator)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "wte" not in name]
    other = [p for name, p in model.named_parameters() if p.ndim == 1 or "wte" in name]
    muon = torch.optim.Muon(hidden, lr=s.muon_lr, momentum=0.95, weight_decay=0.01)
    adamw = torch.optim.AdamW(other, lr=s.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps, start, log, spent = s.tokens // (s.batch * 256), 0, [], 0.0
    if (s.state / "state.pt").exists():
        state = load_tensors(s.state / "state.pt", s.device)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adamw.load_state_dict(state["adamw"])
        start, log, spent = state["step"], state["log"], state["seconds"]
    began = time.perf_counter() - spent
    for step in trange(start, steps, initial=start, total=steps, unit="step", mininterval=1.0):
        factor = min(1.0, (step + 1) / 100) * min(1.0, (steps - step) / (0.5 * steps))
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = s.muon_lr * factor, s.adamw_lr * factor
        x, y = (t.to(s.device) for t in rows(tokens, order[step * s.batch : (step + 1) * s.batch], 256))
        with torch.autocast(s.device, torch.bfloat16):
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in (muon, adamw):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            assert math.isfinite(loss.item()), f"loss {loss.item()} at step {step}"
            seconds = time.perf_counter() - began
            log.append({"tokens": (step + 1) * s.batch * 256, "loss": loss.item(), "seconds": seconds})
        if step % 200 == 199 or step == steps - 1:
            log[-1]["held_out"] = held_out_nats(model, val, 256)
            state = {
                "model": model.state_dict(), "muon": muon.state_dict(), "adamw": adamw.state_dict(), "step": step + 1,
                "log": log, "seconds": time.perf_counter() - began,
            }  # fmt: skip
            save_tensors(s.state / "state.pt", state)
    return model, log


def main(s: Settings) -> None:
    tokenizer_file = s.state / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(tokenizer_file, vocab=s.vocab, files=s.tokenizer_files)
    (tokens, train_bytes), (val, val_bytes) = (tokenise(tokenizer_file, splits) for splits in (("train",), HELD_OUT))
    model, log = train(s, tokens, val)
    held_out = HeldOut(held_out_nats(model.eval(), val, 10**9), len(val), val_bytes)
    export(
        model, log, held_out, tokenizer_file=tokenizer_file, train_bytes=train_bytes, device=s.device, folder=s.model,
        output=s.output,
    )  # fmt: skip
    write_settings(s.output, s, s.device)


if __name__ == "__main__":
    errors_in_one_line()
    settings = tyro.cli(Settings, description=__doc__)
    check_counts(settings)
    main(settings)
