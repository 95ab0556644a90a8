"""The one ruler. Every method and baseline, under every protocol, on the same held-out tokens, in one pass over them.

    single   one layer replaced (a row per layer), the others intact; codes of a clean pass
    frozen   all layers replaced, codes of a clean pass
    free     all layers replaced, codes follow the stream that the replacements produce

    ΔCE = CE − CE_original                                CE recovered = (CE_ablated − CE) / (CE_ablated − CE_original)
    FVU = E‖y − ŷ‖² / E‖y − E y‖²                         y: what the original model's MLP wrote, under every protocol
    bits per token = Σ_parts H(p) + 8 Σ_modules L0        H(p) = −p log₂ p − (1 − p) log₂(1 − p), p: firing frequency

The original model runs once per batch and serves every replacement; logits live no longer than their batch. A run begins
with the first layer it replaces, on the stream that the original model gave it: nothing before it differs. Rows that
mean the same run (a baseline's `frozen` and `free`; `single` of a one-layer replacement and its `frozen`) share it.
CE is over predicted tokens and KL over positions; FVU, L0 and firing leave each sequence's first position out, which
`replaced` leaves to the model. Intervals are 95 % percentile bootstraps over sequences, the same draws for every row.

    python -m evaluation CHECKPOINT… --target tiny                      checkpoints of this project, SPD's included
    python -m evaluation FOLDER… --target gpt2 --format saelens         dictionaries in another library's format
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from checkpoints import CONFIG, Checkpoint, TrainingRecord, check_target, load_checkpoint, load_spd, resolve
from config import Site
from logs import git_commit
from memory import give_back_memory
from pareto import LayerPoint, ParetoPoint, markdown_table, read_layers, read_points, write_layers, write_points
from replacement import SPD, Active, Identity, Mean, Module, Observer, Origin, Pass, Replacement, Zero, replaced
from target_models import Captured, TargetModel, at_site, kept_streams, load_target, resumed

Protocol = Literal["single", "frozen", "free"]
PROTOCOLS: tuple[Protocol, ...] = ("single", "frozen", "free")
RESAMPLES = 1000
VALUE_BITS = 8  # stands for an active value until a measured quantisation replaces it
BATCH_LOGITS = 2**26  # logits of a batch: bounds the memory of large vocabularies


class Measurement(NamedTuple):
    points: list[ParetoPoint]
    layers: list[LayerPoint]  # the detail behind them


class _Run(NamedTuple):
    """One forward pass per batch; rows of the table that mean the same share it."""

    replacement: int  # index
    clean_codes: bool
    layers: tuple[int, ...]


class _Error(NamedTuple):
    """Sums over one layer's tokens."""

    squared: list[Tensor]  # Σ‖y − ŷ‖², one number per batch
    ratio: list[Float[Tensor, "token"]]  # ‖y − ŷ‖ / ‖y‖


class _Count(NamedTuple):
    """One module's activity, summed over tokens."""

    histogram: Int[Tensor, "l0"]  # tokens by their number of active parts
    fired: Int[Tensor, "part"]  # tokens on which each part was active


def _zeros(n: int, device: torch.device) -> Int[Tensor, "n"]:
    return torch.zeros(n, dtype=torch.int64, device=device)


class _Tally:
    """What one run adds up over the batches."""

    def __init__(self, modules: Sequence[Module], layers: Sequence[int], device: torch.device) -> None:
        self.modules = modules
        self.ce: list[Float[Tensor, "sequence"]] = []
        self.kl: list[Float[Tensor, "sequence"]] = []
        self.errors = {layer: _Error([], []) for layer in layers}
        self.counts = {
            (m.layer, m.name): _Count(_zeros(m.n_parts + 1, device), _zeros(m.n_parts, device)) for m in modules
        }

    def add_error(self, layer: int, y: Float[Tensor, "batch seq d"], y_hat: Float[Tensor, "batch seq d"]) -> None:
        y = y[:, 1:].float()
        e = (y - y_hat[:, 1:].float()).square().sum(-1)
        self.errors[layer].squared.append(e.sum(dtype=torch.float64))
        self.errors[layer].ratio.append((e / y.square().sum(-1).clamp_min(1e-30)).sqrt().flatten().cpu())

    def add_activity(self, active: dict[tuple[int, str], Active], batch: int, seq: int) -> None:
        for key, count in self.counts.items():
            rows, cols = active[key]
            cols = cols[rows % seq != 0]
            l0 = torch.bincount(rows, minlength=batch * seq).view(batch, seq)[:, 1:].flatten()
            count.histogram.add_(torch.bincount(l0, minlength=len(count.histogram)))
            count.fired.add_(torch.bincount(cols, minlength=len(count.fired)))


class _Original(NamedTuple):
    """The original model on one batch."""

    logits: Float[Tensor, "batch seq vocab"]
    p: Float[Tensor, "batch seq vocab"]  # softmax of the logits
    log_z: Float[Tensor, "batch seq"]  # log Σ exp of the logits
    ce: Float[Tensor, "batch"]
    activations: Captured
    streams: dict[int, Any]  # what each layer was given by the block before it


def _nothing(layer: int, y_hat: Tensor) -> None:
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
        logits = replaced(target, tokens, Watch(Identity(layers), None), layers, _nothing).float()
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
        replacements: what to measure. CE recovered against mean ablation needs a `Mean` of the same layers among them.
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
    zero = next((r for r in covering if isinstance(r, Zero)), Zero(sorted(replaced_layers)))
    mean = next((r for r in covering if isinstance(r, Mean)), None)
    everything = [*replacements, *(r for r in (zero, mean) if r is not None and all(r is not q for q in replacements))]

    def run_of(replacement: Replacement, protocol: Protocol, layers: tuple[int, ...]) -> _Run:
        return _Run(
            next(i for i, r in enumerate(everything) if r is replacement),
            protocol != "free" and replacement.has_codes,
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
    tallies = {run: _Tally(everything[run.replacement].modules(run.layers), run.layers, target.device) for run in runs}
    moments = _Moments(all_layers)
    ce_original: list[Tensor] = []
    batch = batch or max(1, min(16, BATCH_LOGITS // (tokens.shape[1] * target.vocab_size)))
    with torch.inference_mode():
        for sequences in tqdm(tokens.split(batch), desc=f"{len(runs)} passes", unit="batch", mininterval=1.0):
            _measure_batch(target, everything, sequences.to(target.device), all_layers, tallies, moments, ce_original)
            give_back_memory()
    reference = torch.cat(ce_original)
    draws = torch.randint(len(reference), (RESAMPLES, len(reference)), generator=torch.Generator().manual_seed(seed))
    original, commit = reference.mean().item(), git_commit()
    points: list[ParetoPoint] = []
    details: list[LayerPoint] = []
    for (replacement, protocol, layers), run in zip(rows, wanted):
        tally = tallies[run]
        summary = _summarise(tally, moments, replacement, layers)
        ce, kl = torch.cat(tally.ce), torch.cat(tally.kl)
        low, high = bootstrap_interval(ce - reference, draws)
        recovered = [
            _recovered(ce.mean().item(), original, torch.cat(tallies[run_of(r, "free", layers)].ce).mean().item())
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
                fvu=_mean([d.fvu for d in summary.details if d.fvu is not None]),
                mse=_mean([d.mse for d in summary.details if d.mse is not None]),
                dead=summary.dead,
                train_tokens=replacement.origin.train_tokens or None,
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
    tallies: dict[_Run, _Tally],
    moments: "_Moments",
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
                return replaced(target, tokens, pass_, layers, observe)

        if run.clean_codes:
            pass_ = clean_pass[run.replacement]
        else:
            pass_ = replacement.free(captured, lambda p, forward=forward: forward(p, _nothing))

        def observe(layer: int, y_hat: Tensor, tally: _Tally = tally) -> None:
            tally.add_error(layer, original.activations.outputs[all_layers.index(layer)], y_hat)

        logits = forward(pass_, observe)
        ce, kl = _compare(original, logits, tokens)
        tally.ce.append(ce)
        tally.kl.append(kl)
        tally.add_activity(pass_.active, *tokens.shape)


# --------------------------------------------------------------------------------------------------------- summing up


class _Moments:
    """Σ y and Σ‖y‖² of what the original's MLPs wrote, first positions left out."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)
        self.n = 0
        self.total: Tensor | float = 0.0
        self.squared: Tensor | float = 0.0

    def add(self, y: Float[Tensor, "layer batch seq d"]) -> None:
        kept = y[:, :, 1:].flatten(1, 2).double()
        self.n += kept.shape[1]
        self.total = self.total + kept.sum(1)
        self.squared = self.squared + kept.square().sum((1, 2))
        self.d = y.shape[-1]

    def variance(self, layer: int) -> float:
        i = self.layers.index(layer)
        return (self.squared[i] / self.n - (self.total[i] / self.n).square().sum()).item()  # type: ignore[index]


class _Detail(NamedTuple):
    layer: int
    module: str
    l0: float | None
    l0_median: int | None
    l0_p95: int | None
    fired: float | None
    fvu: float | None
    mse: float | None
    tail_p999: float | None
    tail_max: float | None


class _Summary(NamedTuple):
    l0: float | None
    l0_p95: float | None
    l0_per_mlp: float | None
    active_params: float | None
    bits_per_token: float | None
    dead: float | None
    details: list[_Detail]


def _summarise(tally: _Tally, moments: _Moments, replacement: Replacement, layers: Sequence[int]) -> _Summary:
    n = moments.n
    histograms = {key: count.histogram.cpu() for key, count in tally.counts.items()}
    l0 = {key: (h * torch.arange(len(h))).sum().item() / n for key, h in histograms.items()}
    fired = {key: count.fired.cpu().double() / n for key, count in tally.counts.items()}
    details: list[_Detail] = []
    for m in tally.modules or [Module(layer, "", 0, 1, 0) for layer in layers]:
        key, activity = (m.layer, m.name), (None, None, None, None)
        if key in l0:
            median, p95 = (_quantile(histograms[key], q) for q in (0.5, 0.95))
            activity = (l0[key], median, p95, (fired[key] > 0).double().mean().item())
        details.append(_Detail(m.layer, m.name, *activity, *_reconstruction(tally, moments, m.layer)))
    if not tally.modules:
        dense = replacement.dense_parameters(layers)
        return _Summary(None, None, None, float(dense) if dense else None, None, None, details)
    bits = sum(binary_entropy(p).sum().item() for p in fired.values()) + VALUE_BITS * sum(l0.values())
    silent = torch.cat([p == 0 for p in fired.values()]).double().mean().item()
    return _Summary(
        l0=_mean(list(l0.values())),
        l0_p95=_mean([float(_quantile(h, 0.95)) for h in histograms.values()]),
        l0_per_mlp=sum(l0[m.layer, m.name] * m.writes for m in tally.modules) / len(layers),
        active_params=replacement.active_parameters(l0, layers),
        bits_per_token=bits,
        dead=silent if n >= 1_000_000 else replacement.dead(),
        details=details,
    )


def _reconstruction(
    tally: _Tally, moments: _Moments, layer: int
) -> tuple[float, float, float, float] | tuple[None, None, None, None]:
    """FVU, MSE and the residual's tail of one layer; void where it is read but not replaced."""
    if layer not in tally.errors:
        return None, None, None, None
    squared = torch.stack(tally.errors[layer].squared).sum().item() / moments.n
    ratio = torch.cat(tally.errors[layer].ratio)
    rank = max(1, -(-len(ratio) * 999 // 1000))  # the smallest value that 99.9 % of the tokens do not exceed
    variance = moments.variance(layer)
    return squared / variance, squared / moments.d, ratio.kthvalue(rank).values.item(), ratio.max().item()


def _quantile(histogram: Int[Tensor, "value"], q: float) -> int:
    """The smallest value that a share q of the tokens do not exceed."""
    return int(torch.searchsorted(histogram.cumsum(0).double(), q * histogram.sum().item()).item())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _recovered(ce: float, original: float, ablated: float) -> float | None:
    """None where the ablation costs nothing, so that there is nothing to recover."""
    return (ablated - ce) / (ablated - original) if ablated != original else None


def binary_entropy(p: Float[Tensor, "part"]) -> Float[Tensor, "part"]:
    """−p log₂ p − (1 − p) log₂(1 − p), in bits; 0 at 0 and 1."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(torch.tensor(2.0, dtype=p.dtype))


def bootstrap_interval(
    values: Float[Tensor, "sequence"], draws: Int[Tensor, "resample sequence"]
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentiles of the mean over resampled sequences."""
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


# ----------------------------------------------------------------------------------------------------- command line


def _is_spd(reference: str) -> bool:
    file = resolve(reference) / CONFIG
    return file.exists() and json.loads(file.read_text()).get("config", {}).get("class") == "SPDConfig"


def _load(reference: str, target: TargetModel, form: str, layer: int | None, site: Site | None) -> list[Checkpoint]:
    """One checkpoint, or every dictionary of a folder in another library's format, on the target's device."""
    if form:
        from interop import Place, import_dictionaries

        record = TrainingRecord(reference, target.name, "", 0, 0.0, 0, "")
        coders = [entry.coder for entry in import_dictionaries(form, reference, Place(layer, site))]
        loaded = [Checkpoint(coder.to(target.device).eval(), record, reference) for coder in coders]
    else:
        loaded = [load_checkpoint(reference, str(target.device))]
    for checkpoint in loaded:
        check_target(checkpoint, target)
        config = checkpoint.coder.config
        if outside := [i for i in config.layers if not 0 <= i < target.n_layers]:
            raise ValueError(f"{reference} is for layer {outside[0]}: {target.name!r} has {target.n_layers} from 0 on")
        if {config.d_in, config.d_out} != {target.d_model}:
            raise ValueError(f"{reference} reads {config.d_in} dimensions: {target.name!r} has {target.d_model}")
    return loaded


def main(
    checkpoints: tuple[str, ...],
    target: str = "tiny",
    tokens: int = 100_000,
    protocols: tuple[Protocol, ...] = PROTOCOLS,
    top_k: tuple[int, ...] = (),
    neurons: tuple[int, ...] = (),
    format: str = "",
    layer: int | None = None,
    site: Site | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    points: Path = Path("output/evaluation/points.csv"),
) -> None:
    """Measure dictionaries on a target's held-out text, beside the baselines; print the table and add it to a CSV.

    Args:
        checkpoints: Folders or W&B artifacts; per-layer coders of one kind, rule and size are measured together.
        target: tiny, pile, simplestories, gpt2, smollm2, hf:NAME or tl:NAME.
        tokens: Held-out tokens to measure on.
        protocols: single, frozen and free, or some of them.
        top_k: Measure each coder also at these numbers of active latents, imposed in place of its rule.
        neurons: Numbers of neurons to measure beside.
        format: upstream, saelens, sparsify, dictionary_learning, circuit-tracer or crosslayer-coding; empty: our own.
        layer: Layer of a foreign dictionary whose files do not say it.
        site: What a foreign SAE reads, where its files do not say.
        device: cpu, cuda, cuda:1, …
        points: Rows are added to this file and its layers.csv; a row measured anew replaces the old one.
    """
    from study import as_replacements, baselines, held_out_tokens  # the command line stands above the ruler

    if not checkpoints:
        raise ValueError("name at least one checkpoint to measure: a folder or a W&B artifact")
    model = load_target(target, device)
    coders: list[Checkpoint] = []
    replacements: list[Replacement] = []
    for reference in checkpoints:
        if not format and _is_spd(reference):
            components, record = load_spd(reference, model)
            origin = Origin(record.seed, record.train_tokens, record.train_seconds, reference)
            replacements += [SPD(model, components, t, origin=origin) for t in (0.0, 0.5)]
            replacements += [SPD(model, components, top_k=k, origin=origin) for k in top_k]
        else:
            coders += _load(reference, model, format, layer, site)
    sites = {getattr(checkpoint.coder.config, "site", "mlp_out") for checkpoint in coders} or {"mlp_out"}
    if len(sites) > 1 or (replacements and sites != {"mlp_out"}):
        raise ValueError(
            f"these dictionaries stand at several sites ({', '.join(sorted(sites))}): measure each by itself"
        )
    model = at_site(model, sites.pop())
    replacements += [r for k in (None, *top_k) for r in as_replacements(coders, k)]
    layers = sorted({layer for r in replacements for layer in r.layers})
    replacements += baselines(model, layers, neurons)
    measured = evaluate(model, replacements, held_out_tokens(model, tokens), protocols)
    _append(points, measured)
    print(markdown_table(measured.points))


def _append(path: Path, measured: Measurement) -> None:
    """Add rows to points.csv and layers.csv, in place of older ones of the same name."""

    def key(row: ParetoPoint | LayerPoint) -> tuple[object, ...]:
        return row.target, row.method, row.layers, row.k, row.seed, row.protocol, row.checkpoint

    new = {key(p) for p in measured.points}
    detail = path.with_name("layers.csv")
    old_points = read_points(path) if path.exists() else []
    old_layers = read_layers(detail) if detail.exists() else []
    write_points(path, [p for p in old_points if key(p) not in new] + measured.points)
    write_layers(detail, [d for d in old_layers if key(d) not in new] + measured.layers)


def command_line(arguments: Sequence[str] | None = None) -> None:
    """`main` with arguments from the command line; what is wrong with them is said in one line."""
    import tyro

    try:
        tyro.cli(main, args=arguments, prog="python -m evaluation", config=(tyro.conf.PositionalRequiredArgs,))
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    command_line()
