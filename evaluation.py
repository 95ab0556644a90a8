"""The one ruler: every method and baseline, under every protocol, on the same held-out tokens, in one pass over them.

    single   one layer replaced (a row per layer), the others intact, on the clean stream
    frozen   all layers replaced, each writes what it would on the clean stream
    gates    all layers replaced, a clean pass decides what is active; what is active reads the stream
    free     all layers replaced, everything follows the stream that the replacements produce

    ΔCE = CE − CE_original,   KL = KL(original ‖ replaced);   what else a row says: metrics.py

The original model runs once per batch and serves every replacement; logits live no longer than their batch: at most four
tensors of them, 16 · batch · seq · vocab bytes. On a CPU batches are shared out to copies of the process, and what they add up is
put together in their order. A run begins before the first MLP it replaces, with what the original model computed until then:
nothing before it differs. Rows that
mean the same run (the mean's under every protocol; `single` of a one-layer replacement and its `frozen`) share it.
CE is over predicted tokens and KL over positions; FVU, L0 and firing leave each sequence's first position out, which
`replaced_logits` leaves to the model. Every row's bootstrap draws the same documents.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from baselines import IdentityReplacement, MeanReplacement, ZeroReplacement
from devices import give_back_memory, in_processes
from logs import git_commit
from losses import Original, sequence_losses
from metrics import OriginalTally, Sums, Tally, document_draws, layer_points, pair_points, point
from pareto import Identity, LayerPoint, PairPoint, ParetoPoint
from patching import Begun, Captured, kept_inputs, kept_streams, resumed
from python_corpus import Split
from replacement import Observer, Pass, Replacement, replaced_logits
from target_models import TargetModel, writer_parameters
from token_stream import HeldOutText, held_out_text

Protocol = Literal["single", "frozen", "gates", "free"]
PROTOCOLS: tuple[Protocol, ...] = ("single", "frozen", "gates", "free")
RESAMPLES = 1000
BATCH_LOGITS = 2**26  # logits of a batch: bounds the memory of large vocabularies


class Measurement(NamedTuple):
    points: list[ParetoPoint]
    layers: list[LayerPoint]  # the detail behind them
    pairs: list[PairPoint]  # differences between them
    differences: list[Float[Tensor, "sequence"]]  # of each point: its cross-entropy less the original's, nats


class _Run(NamedTuple):
    """One forward pass per batch; rows of the table that mean the same share it."""

    replacement: Replacement
    opened: Literal["frozen", "gates", "free"]
    layers: tuple[int, ...]


class _Row(NamedTuple):
    """One row of the table."""

    replacement: Replacement
    protocol: Protocol
    layers: tuple[int, ...]

    @property
    def run(self) -> _Run:
        replacement, protocol = self.replacement, self.protocol
        if not replacement.follows_stream or (protocol == "gates" and not replacement.decides):
            return _Run(replacement, "free", self.layers)
        return _Run(replacement, "frozen" if protocol == "single" else protocol, self.layers)

    def identity(self, target: TargetModel) -> Identity:
        method, k, seed = self.replacement.method, self.replacement.k, self.replacement.origin.seed
        if self.replacement.site is None and target.site != "mlp_out":  # a baseline of another site says of which
            method = f"{method}-{target.site}"
        return Identity(
            target=target.name, method=method, layers=self.layers, k=k, seed=seed, protocol=self.protocol
        )  # fmt: skip


def _rows(replacements: Sequence[Replacement], protocols: Sequence[Protocol]) -> list[_Row]:
    """In the order of replacements, then protocols, then layers."""
    return [
        _Row(replacement, protocol, layers)
        for replacement in replacements
        for protocol in protocols
        for layers in ([(layer,) for layer in replacement.layers] if protocol == "single" else [replacement.layers])
    ]


def _covering[R: Replacement](replacements: Sequence[Replacement], kind: type[R], layers: Sequence[int]) -> R | None:
    """The first replacement of a kind that replaces all of `layers`."""
    return next((r for r in replacements if isinstance(r, kind) and set(layers) <= set(r.layers)), None)


def evaluate(
    target: TargetModel,
    replacements: Sequence[Replacement],
    text: HeldOutText,
    protocols: Sequence[Protocol] = PROTOCOLS,
    batch: int | None = None,
    seed: int = 0,
    so_far: Callable[[Measurement], None] | None = None,
) -> Measurement:
    """Measure every replacement under every protocol on held-out `text`, in nats; nothing is mutated.

    Its tokens are sequences without padding, `batch` of them (None: those of `sequences_at_once`) a forward pass; `seed` draws
    the bootstrap. Rows come by replacement, then protocol, then layer, of which `single` makes one each. CE recovered against
    mean ablation needs a `MeanReplacement` of all the layers. `so_far` is given all rows after an eighth, a quarter and a half of
    eight batches or more, on what was measured until then. Raises ValueError for no tokens.
    """
    tokens = text.tokens
    assert len(text.documents) == len(tokens), f"{len(text.documents)=} {len(tokens)=}"
    assert tokens.ndim == 2 and tokens.shape[1] >= 2, f"tokens must be (sequence ≥ 1, seq ≥ 2): {tuple(tokens.shape)}"
    if len(tokens) == 0:
        raise ValueError("no held-out sequences to measure on: give at least one sequence of two tokens")
    layers = sorted({layer for r in replacements for layer in r.layers})
    read = sorted({*layers, *(layer for r in replacements for layer in r.reads)})
    zero = _covering(replacements, ZeroReplacement, layers) or ZeroReplacement(layers)
    mean = _covering(replacements, MeanReplacement, layers)
    rows = _rows(replacements, protocols)
    ablated = [_Run(r, "free", row.layers) for row in rows for r in (zero, mean) if r is not None]
    runs = dict.fromkeys([*(row.run for row in rows), *ablated])
    batches = tokens.split(batch or sequences_at_once(target, tokens.shape[1]))

    given = {run: _computing_y(target, run) for run in runs}

    def nothing() -> tuple[OriginalTally, dict[_Run, Tally]]:
        own = {run: Tally(run.replacement, run.layers, target.device, given[run]) for run in runs}
        return OriginalTally(read), own

    def measure(sequences: Int[Tensor, "batch seq"]) -> tuple[OriginalTally, list[Sums]]:
        original, tallies = nothing()
        _measure_batch(target, sequences.to(target.device), read, tallies, original)
        give_back_memory()
        return original, [tally.sums for tally in tallies.values()]

    original, tallies = nothing()

    def summed_up() -> Measurement:
        draws, commit = document_draws(text.documents[: len(original.ce)], RESAMPLES, seed), git_commit()
        pairs = pair_points([(row.identity(target), tallies[row.run]) for row in rows], draws)
        measured = Measurement([], [], pairs, [tallies[row.run].ce - original.ce for row in rows])
        for row in rows:
            identity, tally = row.identity(target), tallies[row.run]
            free = [None if r is None else tallies[_Run(r, "free", row.layers)] for r in (zero, mean)]
            measured.points.append(point(identity, tally, original, ablated=free, draws=draws, commit=commit))
            measured.layers.extend(layer_points(identity, tally, original))
        return measured

    shown = {len(batches) // part for part in (8, 4, 2)} if len(batches) >= 8 else set()
    with torch.inference_mode():
        measured_batches = in_processes(measure, batches, target.device)
        for i, (of_original, of_runs) in enumerate(
            tqdm(measured_batches, total=len(batches), desc=f"{len(runs)} passes", unit="batch", mininterval=1.0)
        ):
            if so_far and i in shown:
                so_far(summed_up())
            original.join(of_original)
            for tally, sums in zip(tallies.values(), of_runs, strict=True):
                tally.add(sums)
    return summed_up()


def sequences_at_once(target: TargetModel, seq: int) -> int:
    """16, on a CPU 8, or as few as keep the logits of a forward pass within 256 MiB."""
    return max(1, min(8 if target.device.type == "cpu" else 16, BATCH_LOGITS // (seq * target.vocab_size)))


def _computing_y(target: TargetModel, run: _Run) -> int:
    """Parameters of the MLPs (or what else writes at the site) that a replacement needs beside itself, as it reads y."""
    return sum(writer_parameters(target, layer) for layer in run.layers) if run.replacement.reads_y else 0


class CleanPass(NamedTuple):
    """One forward pass of a batch, nothing replaced."""

    logits: Float[Tensor, "batch seq vocab"]
    activations: Captured  # of all layers that are replaced or read
    streams: dict[int, Begun]  # what was computed before each layer's MLP

    def stream(self, layers: Sequence[int]) -> tuple[int, Begun | None]:
        """The layer before whose MLP a run that replaces `layers` may begin, and what was computed until then."""
        first = min(layers) if min(layers) in self.streams else 0
        return first, self.streams.get(first)


def clean_pass(
    target: TargetModel, tokens: Int[Tensor, "batch seq"], layers: Sequence[int], watched: Sequence[str] = ()
) -> CleanPass:
    """Logits, every MLP's input and output and what the `watched` modules are given, in the precision of the weights."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    class Watch(Pass):
        def __call__(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
            seen[layer] = (x, y)
            return y

    resumable = layers if target.site == "mlp_out" else []  # elsewhere a site is not inside its block
    with kept_streams(target, resumable) as streams, kept_inputs(target.model, watched) as modules:
        logits = replaced_logits(target, tokens, Watch(IdentityReplacement(layers)), layers, ignore)
    inputs, outputs = (torch.stack([seen[layer][i] for layer in layers]) for i in range(2))
    return CleanPass(logits, Captured(inputs, outputs, modules), streams)


def ignore(layer: int, y_hat: Tensor) -> None:
    """Observes nothing."""


def pick(captured: Captured, all_layers: Sequence[int], layers: Sequence[int]) -> Captured:
    where = [all_layers.index(layer) for layer in layers]
    if where == list(range(where[0], where[0] + len(where))):
        return Captured(*(kept[where[0] : where[0] + len(where)] for kept in captured[:2]), captured.modules)
    return Captured(*(kept[where] for kept in captured[:2]), captured.modules)


def _measure_batch(
    target: TargetModel,
    tokens: Int[Tensor, "batch seq"],
    read: Sequence[int],
    tallies: dict[_Run, Tally],
    original: OriginalTally,
) -> None:
    """Every run on one batch; `read` are the layers whose clean activations serve all runs."""
    watched = list(dict.fromkeys(path for run in tallies for path in run.replacement.watches))
    clean = clean_pass(target, tokens, read, watched)
    prediction = Original.of(clean.logits, tokens)
    original.add(prediction.ce, clean.activations.outputs)
    frozen: dict[Replacement, Pass] = {}
    for run, tally in tallies.items():
        captured = pick(clean.activations, read, run.replacement.reads)
        if run.opened == "frozen" and run.replacement not in frozen:  # one for all its rows: codes are computed once
            frozen = {run.replacement: run.replacement.frozen(captured)}

        def forward(pass_: Pass, observe: Observer, layers: tuple[int, ...] = run.layers) -> Tensor:
            with resumed(target, *clean.stream(layers)):
                return replaced_logits(target, tokens, pass_, layers, observe)

        if run.opened == "frozen":
            pass_ = frozen[run.replacement]
        elif run.opened == "gates":
            pass_ = run.replacement.gated(captured)
        else:
            pass_ = run.replacement.free(captured, lambda p, forward=forward: forward(p, ignore))

        def observe(layer: int, y_hat: Tensor, tally: Tally = tally) -> None:
            tally.add_error(layer, clean.activations.outputs[read.index(layer)], y_hat)

        logits = forward(pass_, observe)
        tally.add_losses(*sequence_losses(prediction, logits, tokens))
        tally.add_activity(pass_.active, *tokens.shape)


def held_out(target: TargetModel, n_tokens: int, split: Split = "test") -> HeldOutText:
    """Text of a target that nothing was trained on, drawn over its documents; every study measures on the same."""
    return held_out_text(target.stream(split, 1), n_tokens).to(target.device)
