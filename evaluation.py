"""The one ruler: every method and baseline, under every protocol, on the same held-out tokens, in one pass over them.

    single   one layer replaced (a row per layer), the others intact; codes of a clean pass
    frozen   all layers replaced, codes of a clean pass
    free     all layers replaced, codes follow the stream that the replacements produce

    ΔCE = CE − CE_original,   KL = KL(original ‖ replaced);   what else a row says: metrics.py

The original model runs once per batch and serves every replacement; logits live no longer than their batch. A run begins
with the first layer it replaces, on the stream that the original model gave it: nothing before it differs. Rows that
mean the same run (a baseline's `frozen` and `free`; `single` of a one-layer replacement and its `frozen`) share it.
CE is over predicted tokens and KL over positions; FVU, L0 and firing leave each sequence's first position out, which
`replaced_logits` leaves to the model. Every row's bootstrap draws the same sequences.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from baselines import IdentityReplacement, MeanReplacement, ZeroReplacement
from devices import give_back_memory
from logs import git_commit
from metrics import Moments, Tally, average, bootstrap_interval, ce_recovered, summarise
from pareto import LayerPoint, ParetoPoint
from patching import Captured, kept_streams, resumed
from replacement import Observer, Pass, Replacement, replaced_logits
from target_models import TargetModel
from token_stream import TokenStream, take_tokens

Protocol = Literal["single", "frozen", "free"]
PROTOCOLS: tuple[Protocol, ...] = ("single", "frozen", "free")
RESAMPLES = 1000
BATCH_LOGITS = 2**26  # logits of a batch: bounds the memory of large vocabularies


class Measurement(NamedTuple):
    points: list[ParetoPoint]
    layers: list[LayerPoint]  # the detail behind them


class _Run(NamedTuple):
    """One forward pass per batch; rows of the table that mean the same share it."""

    replacement: int  # index
    clean_codes: bool
    layers: tuple[int, ...]


class _Original(NamedTuple):
    """The original model on one batch."""

    logits: Float[Tensor, "batch seq vocab"]
    p: Float[Tensor, "batch seq vocab"]  # softmax of the logits
    log_z: Float[Tensor, "batch seq"]  # log Σ exp of the logits
    ce: Float[Tensor, "batch"]
    activations: Captured
    streams: dict[int, Any]  # what each layer was given by the block before it


def ignore(layer: int, y_hat: Tensor) -> None:
    """Observes nothing."""


def _original(target: TargetModel, tokens: Int[Tensor, "batch seq"], layers: Sequence[int]) -> _Original:
    """Logits and every MLP's input and output, from one forward pass."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    class Watch(Pass):
        def __call__(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
            seen[layer] = (x, y)
            return y

    resumable = layers if target.site == "mlp_out" else []  # elsewhere a site is not inside its block
    with kept_streams(target, resumable) as streams:
        logits = replaced_logits(target, tokens, Watch(IdentityReplacement(layers), None), layers, ignore).float()
    log_z = logits.logsumexp(-1)
    ce = _cross_entropy(logits, log_z, tokens).cpu()
    inputs, outputs = (torch.stack([seen[layer][i] for layer in layers]) for i in range(2))
    return _Original(logits, logits.softmax(-1), log_z, ce, Captured(inputs, outputs), streams)


def _cross_entropy(
    logits: Float[Tensor, "batch seq vocab"], log_z: Float[Tensor, "batch seq"], tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch"]:
    """Each sequence's mean CE: log Z − the next token's logit."""
    correct = logits[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return (log_z[:, :-1] - correct).double().mean(1)


def _compare(
    original: _Original, logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Each sequence's CE and KL(original ‖ replaced), on the CPU; few logits at a time, which stay in a CPU's cache.

    KL = Σ p (log p − log q) = log Z_q − log Z_p − Σ p (logit_q − logit_p): one exponential per logit, 0 where q is p.
    """
    at_once = max(1, (2**20 if logits.device.type == "cpu" else 2**25) // logits[0].numel())
    ce, kl = [], []
    for i in range(0, len(tokens), at_once):
        part = slice(i, i + at_once)
        q = logits[part].float()
        log_z = q.logsumexp(-1)
        ce.append(_cross_entropy(q, log_z, tokens[part]))
        shift = torch.linalg.vecdot(original.p[part], q - original.logits[part])
        kl.append((log_z - original.log_z[part] - shift).double().mean(1))
    return torch.cat(ce).cpu(), torch.cat(kl).cpu()


def _pick(captured: Captured, all_layers: Sequence[int], layers: Sequence[int]) -> Captured:
    where = [all_layers.index(layer) for layer in layers]
    if where == list(range(where[0], where[0] + len(where))):
        return Captured(*(kept[where[0] : where[0] + len(where)] for kept in captured))
    return Captured(*(kept[where] for kept in captured))


def evaluate(
    target: TargetModel,
    replacements: Sequence[Replacement],
    tokens: Int[Tensor, "sequence seq"],
    protocols: Sequence[Protocol] = PROTOCOLS,
    batch: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Measure every replacement under every protocol on held-out `tokens`.

    Args:
        target: the model whose MLPs are replaced; it is left as it was, also when something fails.
        replacements: what to measure. CE recovered against mean ablation needs a `MeanReplacement` of the same layers among them.
        tokens: held-out sequences without padding.
        protocols: which rows to make; `single` makes one per layer.
        batch: sequences per forward pass; None: 16, or as few as keep a batch's logits within 256 MiB.
        seed: of the bootstrap.
    Returns: rows in the order of `replacements`, then protocols, then layers; losses in nats. Nothing is mutated.
    """
    assert tokens.ndim == 2 and tokens.shape[1] >= 2, f"tokens must be (sequence ≥ 1, seq ≥ 2): {tuple(tokens.shape)}"
    if len(tokens) == 0:
        raise ValueError("no held-out sequences to measure on: give at least one sequence of two tokens")
    replaced_layers = {layer for r in replacements for layer in r.layers}
    all_layers = sorted(replaced_layers.union(*(r.reads for r in replacements)))
    covering = [r for r in replacements if replaced_layers.issubset(r.layers)]
    zero = next((r for r in covering if isinstance(r, ZeroReplacement)), ZeroReplacement(sorted(replaced_layers)))
    mean = next((r for r in covering if isinstance(r, MeanReplacement)), None)
    everything = [*replacements, *(r for r in (zero, mean) if r is not None and all(r is not q for q in replacements))]

    def run_of(replacement: Replacement, protocol: Protocol, layers: tuple[int, ...]) -> _Run:
        return _Run(
            next(i for i, r in enumerate(everything) if r is replacement),
            protocol != "free" and replacement.follows_stream,
            layers,
        )

    rows = [
        (replacement, protocol, layers)
        for replacement in replacements
        for protocol in protocols
        for layers in ([(layer,) for layer in replacement.layers] if protocol == "single" else [replacement.layers])
    ]
    wanted = [run_of(*row) for row in rows]
    ablations = [run_of(r, "free", layers) for _, _, layers in rows for r in (zero, mean) if r is not None]
    runs = sorted(set(wanted + ablations))
    tallies = {
        run: Tally(everything[run.replacement].part_groups(run.layers), run.layers, target.device) for run in runs
    }
    moments = Moments(all_layers)
    ce_original: list[Tensor] = []
    batch = batch or max(1, min(16, BATCH_LOGITS // (tokens.shape[1] * target.vocab_size)))
    with torch.inference_mode():
        for sequences in tqdm(tokens.split(batch), desc=f"{len(runs)} passes", unit="batch", mininterval=1.0):
            _measure_batch(target, everything, sequences.to(target.device), all_layers, tallies, moments, ce_original)
            give_back_memory()
    reference = torch.cat(ce_original)
    draws = torch.randint(len(reference), (RESAMPLES, len(reference)), generator=torch.Generator().manual_seed(seed))
    original, commit = reference.mean().item(), git_commit() or ""
    points: list[ParetoPoint] = []
    details: list[LayerPoint] = []
    for (replacement, protocol, layers), run in zip(rows, wanted):
        tally = tallies[run]
        summary = summarise(tally, moments, replacement, layers)
        ce, kl = torch.cat(tally.ce), torch.cat(tally.kl)
        low, high = bootstrap_interval(ce - reference, draws)
        recovered = [
            ce_recovered(ce.mean().item(), original, torch.cat(tallies[run_of(r, "free", layers)].ce).mean().item())
            if r is not None else None
            for r in (zero, mean)
        ]  # fmt: skip
        elsewhere = replacement.site is None and target.site != "mlp_out"  # a baseline of another site says of which
        method = f"{replacement.method}-{target.site}" if elsewhere else replacement.method
        identity = {
            "target": target.name, "method": method, "layers": layers, "k": replacement.k,
            "seed": replacement.origin.seed, "protocol": protocol, "checkpoint": replacement.origin.checkpoint,
        }  # fmt: skip
        points.append(
            ParetoPoint(
                **identity,
                tokens=tokens.shape[0] * (tokens.shape[1] - 1),
                l0=summary.l0,
                l0_p95=summary.l0_p95,
                l0_per_mlp=summary.l0_per_mlp,
                active_params=summary.active_params,
                bits_per_token=summary.bits_per_token,
                ce=ce.mean().item(),
                ce_degradation=(ce - reference).mean().item(),
                ce_low=low,
                ce_high=high,
                ce_recovered_zero=recovered[0],
                ce_recovered_mean=recovered[1],
                kl=kl.mean().item(),
                fvu=average([d.fvu for d in summary.details if d.fvu is not None]),
                mse=average([d.mse for d in summary.details if d.mse is not None]),
                dead=summary.dead,
                train_tokens=replacement.origin.train_tokens,
                gate_params=replacement.gate_parameters(layers),
                train_seconds=replacement.origin.train_seconds or None,
                commit=commit,
                tail_p999=max(d.tail_p999 for d in summary.details if d.tail_p999 is not None),
                tail_max=max(d.tail_max for d in summary.details if d.tail_max is not None),
            )
        )
        details += [LayerPoint(**identity, **detail._asdict()) for detail in summary.details]
    return Measurement(points, details)


def _measure_batch(
    target: TargetModel,
    replacements: Sequence[Replacement],
    tokens: Int[Tensor, "batch seq"],
    all_layers: Sequence[int],
    tallies: dict[_Run, Tally],
    moments: Moments,
    ce_original: list[Tensor],
) -> None:
    original = _original(target, tokens, all_layers)
    ce_original.append(original.ce)
    moments.add(original.activations.outputs)
    clean_pass: dict[int, Pass] = {}
    for run, tally in tallies.items():
        replacement = replacements[run.replacement]
        captured = _pick(original.activations, all_layers, replacement.reads)
        if run.clean_codes and run.replacement not in clean_pass:  # one for all rows: codes are computed once
            clean_pass = {run.replacement: replacement.frozen(captured)}

        def forward(pass_: Pass, observe: Observer, layers: tuple[int, ...] = run.layers) -> Tensor:
            first = min(layers) if min(layers) in original.streams else 0
            with resumed(target, first, original.streams.get(first)):
                return replaced_logits(target, tokens, pass_, layers, observe)

        if run.clean_codes:
            pass_ = clean_pass[run.replacement]
        else:
            pass_ = replacement.free(captured, lambda p, forward=forward: forward(p, ignore))

        def observe(layer: int, y_hat: Tensor, tally: Tally = tally) -> None:
            tally.add_error(layer, original.activations.outputs[all_layers.index(layer)], y_hat)

        logits = forward(pass_, observe)
        ce, kl = _compare(original, logits, tokens)
        tally.ce.append(ce)
        tally.kl.append(kl)
        tally.add_activity(pass_.active, *tokens.shape)


def held_out_tokens(target: TargetModel, n_tokens: int) -> Int[Tensor, "sequence seq"]:
    """The first tokens of the validation split; every study measures on the same."""
    stream = TokenStream(target.data, target.tokenizer, "val", batch=32, seq=target.context)
    return take_tokens(stream, n_tokens).to(target.device)
