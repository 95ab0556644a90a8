"""What the parts that a method calls inactive can be made to do: one attack, on one box, for every method and baseline.

Each replacement is written as parts behind gates, and a remainder:

    out(x) = b + Σ_i m_i c_i(x) + m_Δ r(x),   m_i = g_i + (1 − g_i) s_i,   r(x) = MLP(x) − b − Σ_i c_i(x)

c_i is what part i would write were it active, g_i whether the clean pass makes it active (constant, as in protocol `gates`); c
and r are those of the running stream. The adversary chooses s and m_Δ in [0, 1], one number for each part and each remainder,
the same at every token. At s = m_Δ = 0 the replacement is the deployed one, at s = m_Δ = 1 it is the original model, whatever
the method. Of SPD each weight matrix has parts and a remainder, of the others each MLP.

    s ← clamp(s + η · sign ∂KL/∂s, 0, 1),   s_0 ~ U(0, 1);   the worst s met within 20, 40, 80 and 160 steps counts

KL is that of the output, original ‖ attacked, on the attacked text; what the same s does on text that it was not chosen on is
told too. Control: gates dealt at random to the parts that are alive on the attacked text, as many open at each token; how
many times worse that is than a method's own gates is what its gates are worth.

A latent of a ReLU coder whose pre-activation is negative would write nothing: it cannot be used, nor attacked, but
through the remainder. So compare a method's levels with its own controls before comparing them with another method's.
The box is that of goodfire-ai/param-decomp for SPD, whose steps and step size these are; for others it is ours.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from evaluation import CleanPass, clean_pass, ignore
from losses import Original, sequence_losses
from patching import resumed
from replacement import Key, Pass, Replacement, Sources, replaced_logits
from target_models import TargetModel

LADDER = (20, 40, 80, 160)  # steps of ascent
STEP_SIZE = 0.1


class Rung(NamedTuple):
    """The worst sources that so many steps met, and what they cost each sequence, in nats."""

    steps: int
    sources: Sources
    attacked: "Costs"  # on the text that they were chosen on
    transferred: "Costs"  # on other text


class Costs(NamedTuple):
    ce: Float[Tensor, "sequence"]  # CE less the original model's
    kl: Float[Tensor, "sequence"]


class Batch(NamedTuple):
    """Some sequences, and what the original model makes of them."""

    tokens: Int[Tensor, "batch seq"]
    clean: CleanPass
    original: Original


class Attack:
    """A replacement under attack on one text; `deltas` False keeps every m_Δ at 0, `dealt` deals gates at random."""

    def __init__(
        self, target: TargetModel, replacement: Replacement, text: Int[Tensor, "sequence seq"], *, deltas: bool,
        dealt: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        assert replacement.reads == replacement.layers, f"{replacement.method} reads layers that it does not replace"
        self.target, self.replacement, self.deltas = target, replacement, deltas
        self.batches = prepared(target, replacement, text)
        generator = torch.Generator().manual_seed(seed)
        surface = replacement.surface(replacement.layers)
        draw = lambda *shape: torch.rand(shape, generator=generator).to(target.device)  # noqa: E731
        self.start = Sources(
            {key: draw(n) for key, n in surface.items()},
            {key: draw() if deltas else torch.zeros((), device=target.device) for key in surface},
        )
        if dealt:
            order = {key: dealt_among(fired, generator).to(target.device) for key, fired in self.firing().items()}
            self.start = self.start._replace(dealt=order)

    @torch.no_grad()
    def firing(self) -> dict[Key, Int[Tensor, "part"]]:
        """On how many tokens of the text each part is active."""
        counts = {
            key: torch.zeros(n, dtype=torch.int64)
            for key, n in self.replacement.surface(self.replacement.layers).items()
        }
        for batch in self.batches:
            pass_ = self._pass(self.start, batch)
            self._logits(pass_, batch)
            for key, active in pass_.active.items():
                counts[key] += torch.bincount(active.cols, minlength=len(counts[key])).cpu()
        return counts

    def run(self, elsewhere: Sequence[Batch], ladder: Sequence[int] = LADDER) -> tuple[list[Rung], float]:
        """The rungs of one ascent, and the seconds it took; no rung's KL is below one before it."""
        began, sources, best, worst = time.perf_counter(), self.start, self.start, -torch.inf
        found: list[tuple[int, Sources]] = []
        for step in tqdm(range(max(ladder) + 1), desc=self.replacement.method, unit="step", mininterval=1.0):
            kl, gradient = self.ascent(sources)
            if kl > worst:
                best, worst = sources, kl
            if step in ladder:
                found.append((step, best))
            sources = moved(sources, gradient)
        seconds = time.perf_counter() - began
        return [self.rung(steps, own, elsewhere) for steps, own in found], seconds

    def rung(self, steps: int, sources: Sources, elsewhere: Sequence[Batch]) -> Rung:
        """What these sources cost on the attacked text and on another one."""
        return Rung(steps, sources, self.costs(sources, self.batches), self.costs(sources, elsewhere))

    def ascent(self, sources: Sources) -> tuple[float, list[Tensor]]:
        """KL with these sources, in nats per token, and its gradient in them."""
        leaves = [leaf.requires_grad_() for leaf in copied(sources)]
        own, total, gradient = with_tensors(sources, leaves), 0.0, [torch.zeros_like(leaf) for leaf in leaves]
        n = sum(len(batch.tokens) for batch in self.batches)
        for batch in self.batches:
            kl = self._losses(own, batch)[1].sum() / n
            wanted = torch.autograd.grad(kl, leaves, allow_unused=True)
            gradient = [sum_ if new is None else sum_ + new for sum_, new in zip(gradient, wanted)]
            total += kl.item()
        return total, gradient if self.deltas else without_deltas(sources, gradient)

    @torch.no_grad()
    def costs(self, sources: Sources, batches: Sequence[Batch]) -> Costs:
        losses = [self._losses(sources, batch) for batch in batches]
        ce = [ce - batch.original.ce for (ce, _), batch in zip(losses, batches)]
        return Costs(torch.cat(ce).cpu(), torch.cat([kl for _, kl in losses]).cpu())

    def _losses(self, sources: Sources, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self._logits(self._pass(sources, batch), batch)
        return sequence_losses(batch.original, logits, batch.tokens)

    def _pass(self, sources: Sources, batch: Batch) -> Pass:
        return self.replacement.attacked(batch.clean.activations, sources)

    def _logits(self, pass_: Pass, batch: Batch) -> Float[Tensor, "batch seq vocab"]:
        layers = self.replacement.layers
        with resumed(self.target, *batch.clean.stream(layers)):
            return replaced_logits(self.target, batch.tokens, pass_, layers, ignore)


def prepared(
    target: TargetModel, replacement: Replacement, text: Int[Tensor, "sequence seq"], batch: int = 16
) -> list[Batch]:
    """What the original model makes of a text, a few sequences at a time, with all that the replacement reads of it."""
    made = []
    with torch.no_grad():
        for tokens in text.to(target.device).split(batch):
            clean = clean_pass(target, tokens, replacement.layers, replacement.watches)
            made.append(Batch(tokens, clean, Original.of(clean.logits, tokens)))
    return made


def dealt_among(fired: Int[Tensor, "part"], generator: torch.Generator) -> Int[Tensor, "part"]:
    """A random order of the parts that fired; the others stay where they are."""
    order, alive = torch.arange(len(fired)), fired.nonzero()[:, 0]
    order[alive] = alive[torch.randperm(len(alive), generator=generator)]
    return order


def copied(sources: Sources) -> list[Tensor]:
    return [source.detach().clone() for part in (sources.parts, sources.deltas) for source in part.values()]


def with_tensors(sources: Sources, tensors: Sequence[Tensor]) -> Sources:
    """Sources of the same keys, given in the same order."""
    given = iter(tensors)
    parts, deltas = ({key: next(given) for key in part} for part in (sources.parts, sources.deltas))
    return sources._replace(parts=parts, deltas=deltas)


def without_deltas(sources: Sources, gradient: list[Tensor]) -> list[Tensor]:
    n = len(sources.parts)
    return gradient[:n] + [torch.zeros_like(g) for g in gradient[n:]]


def moved(sources: Sources, gradient: Sequence[Tensor]) -> Sources:
    """One step of sign ascent within the box."""
    stepped = [(s + STEP_SIZE * g.sign()).clamp(0, 1) for s, g in zip(copied(sources), gradient)]
    return with_tensors(sources, stepped)


def constant_sources(replacement: Replacement, value: float, device: torch.device) -> Sources:
    """All of s and m_Δ at one value: 0 is the deployed replacement, 1 the original model."""
    surface: dict[Key, int] = replacement.surface(replacement.layers)
    return Sources(
        {key: torch.full((n,), value, device=device) for key, n in surface.items()},
        {key: torch.tensor(value, device=device) for key in surface},
    )
