"""What coders lose on the model's output: the KL that replacing MLPs costs, under the ruler's protocols, with gradients.

    loss = Σ_runs KL(original ‖ replaced) + Σ_coders [local · FVU + what the rule adds + aux · AuxK],   means over tokens

    single   one run per layer, that layer replaced alone         coders read the clean stream
    frozen   one run, all layers replaced                         coders read the clean stream
    free     one run, all layers replaced                         coders read the running stream: later ones teach earlier ones
    mixed    one run; which layers, and which stream, are drawn   see `config.Mixed`

A run is the ruler's: the same replacement, its coders in train mode, in the same patched forward pass, which begins with the
first layer that it replaces on the stream that the original model gave it. What is selected is a constant, and so is the
clean stream. FVU compares with what the original model's MLPs wrote there, as the ruler's does. First positions are left to
the model and enter nothing but the mean of the KL, which is over all positions.

One clean pass serves all sets of coders that train on a stream and all their runs. Of what is as wide as the vocabulary, log p
alone is held, where the head is a module of its own (`unembedding`); else the logits of the clean pass and of a run, too.
Where coders read the clean stream, the graph of each run ends at what they write, and its gradient goes on to
them once, when all runs are over.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from coder import frozen
from coder_replacements import CoderReplacement
from config import Mixed, Output, TrainConfig
from devices import bf16_is_fast
from evaluation import CleanPass, clean_pass, ignore, pick
from losses import auxk, fvu, kl_through_head, log_probabilities
from patching import Captured, after, resumed, without
from replacement import CodedPass, replaced_logits
from sparse_ops import Codes
from sparsity import TrainingCodes
from target_models import TargetModel, few_tokens
from training import CoderRun

# ------------------------------------------------------------------------------------------------------------ runs


class Run(NamedTuple):
    """One forward pass with layers replaced."""

    layers: tuple[int, ...]
    follows: bool  # codes of the replaced layers follow the stream; False: all codes are those of the clean pass


def planned(objective: Output, layers: tuple[int, ...], generator: torch.Generator) -> list[Run]:
    """The runs of a batch; the generator decides those of a mixed objective."""
    match objective.protocol:
        case "single":
            return [Run((layer,), False) for layer in layers]
        case "frozen":
            return [Run(layers, False)]
        case "free":
            return [Run(layers, True)]
        case mixed:
            return [_drawn(mixed, layers, generator)]


def _drawn(mixed: Mixed, layers: tuple[int, ...], generator: torch.Generator) -> Run:
    """A layer alone; or some, every number and every set of so many equally likely; or all."""
    which, running = torch.rand(2, generator=generator).tolist()
    order, n = torch.randperm(len(layers), generator=generator).tolist(), len(layers)
    if which < mixed.alone:
        return Run((layers[order[0]],), False)
    if which < mixed.alone + mixed.some and n > 2:
        n = int(torch.randint(2, n, (1,), generator=generator))
    return Run(tuple(sorted(layers[i] for i in order[:n])), running < mixed.running)


# ---------------------------------------------------------------------------------------------------------- passes


class TrainingPass(CodedPass):
    """Forward passes with coders in training at every position but the first.

    Layers of `follows` read the running stream, others the clean one, whatever runs are made.
    """

    replacement: CoderReplacement
    clean: Captured

    def __init__(self, replacement: CoderReplacement, clean: Captured, follows: Sequence[int]) -> None:
        super().__init__(replacement, clean)
        self.follows = frozenset(follows)
        self.inputs: dict[int, Float[Tensor, "token d_in"]] = {}  # what each layer's encoder read
        self.trained: dict[int, TrainingCodes] = {}
        self.written: dict[int, Float[Tensor, "token d_out"]] = {}
        self.rebuilt: dict[int, Float[Tensor, "token d_out"]] = {}  # what the gates would write, were they codes
        self._ends: list[tuple[Tensor, Tensor]] = []  # what was written, and the leaf that a run sees in its place

    @property
    def reads_y(self) -> bool:
        return self.replacement.reads_y and bool(self.follows)

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch own d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        own = (self._tokens(x), self._tokens(y)) if layer in self.follows else self.original(layer)
        with torch.autocast(x.device.type, enabled=False):
            self.written[layer] = self.replacement.write(self, layer, *own)
            if self.trained[layer].gates is not None:
                with frozen(self.replacement.reading(layer, *own).coder):
                    self.rebuilt[layer] = self.replacement.write(_GatesPass(self), layer, *own)
        seen = rearrange(self._end(self.written[layer]), "(batch seq) d -> batch seq d", batch=len(x))
        return torch.cat([y[:, :1], seen.to(y.dtype)], dim=1)

    def _tokens(self, x: Float[Tensor, "batch own d"]) -> Float[Tensor, "token d"]:
        """All positions but the first, as rows in the coders' precision."""
        return rearrange(x[:, 1:], "batch seq d -> (batch seq) d").to(self.replacement.members[0].b_dec.dtype)

    def original(self, layer: int) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]:
        """What the MLP of a layer was given and wrote in the clean pass."""
        i = self.replacement.reads.index(layer)
        return self._tokens(self.clean.inputs[i]), self._tokens(self.clean.outputs[i])

    def encode(self, layer: int, x: Tensor | None = None, y: Tensor | None = None) -> Codes:
        if layer not in self.codes:
            if layer not in self.follows:
                x, y = self.original(layer)
            assert x is not None and y is not None, f"layer {layer} is read before the running stream came by"
            self.inputs[layer] = self.replacement.reading(layer, x, y).x
            self.trained[layer] = self.replacement.training_codes(layer, x, y)
            self.codes[layer] = self.trained[layer].codes
        return self.codes[layer]

    def _end(self, written: Float[Tensor, "token d_out"]) -> Float[Tensor, "token d_out"]:
        """Where the graph of a run ends, unless layers follow the stream: then there is one run, and one graph."""
        if self.follows:
            return written
        leaf = written.detach().requires_grad_()
        self._ends.append((written, leaf))
        return leaf

    def join(self, rest: Sequence[Float[Tensor, ""]]) -> None:
        """Backward through what no run went through: `rest`, and all that was written on the clean stream."""
        roots = [(root, None) for root in rest if root.requires_grad]
        ends = [(written, leaf.grad) for written, leaf in self._ends if leaf.grad is not None and written.requires_grad]
        if roots or ends:
            tensors, gradients = zip(*roots, *ends)
            torch.autograd.backward(tensors, gradients)


class _GatesPass(CodedPass):
    """A pass whose codes are the gates of another one."""

    def __init__(self, pass_: TrainingPass) -> None:
        super().__init__(pass_.replacement, None)
        self.codes = {layer: own.gates for layer, own in pass_.trained.items() if own.gates is not None}


def unembedding(target: TargetModel) -> nn.Module:
    """The module that turns the last stream into the logits, found by its output; an identity where more comes after it.

    Raises ValueError where the model gives no logits over its vocabulary.
    """
    written: list[tuple[nn.Module, Tensor]] = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in target.model.modules():
            if not any(module.children()):
                stack.enter_context(after(module, lambda _a, out, module=module: written.append((module, out))))
        logits = _logits_or_none(target)
    if logits is None or logits.shape[-1] != target.vocab_size:
        raise ValueError(
            f"{target.name!r} gives no logits over its vocabulary of {target.vocab_size}, as if it were cut before its "
            "output: load all of it, or train on what its layers write, with Local()"
        )
    same = [module for module, out in written if isinstance(out, Tensor) and _equal(out, logits)]
    return same[0] if same else nn.Identity()


def _logits_or_none(target: TargetModel) -> Tensor | None:
    out = target.model(few_tokens(target))
    out = out[0] if isinstance(out, tuple) else out
    return out if isinstance(out, Tensor) else getattr(out, "logits", None)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


class Frame(NamedTuple):
    """One batch, and what the original model makes of it."""

    target: TargetModel
    head: nn.Module  # what turns the last stream into logits
    tokens: Int[Tensor, "batch seq"]
    layers: tuple[int, ...]  # whose activations `clean` holds
    clean: CleanPass
    log_p: Float[Tensor, "token vocab"]

    def captured(self, replacement: CoderReplacement) -> Captured:
        return pick(self.clean.activations, self.layers, replacement.reads)

    def last_stream(self, pass_: TrainingPass, layers: Sequence[int]) -> Float[Tensor, "batch seq d"]:
        """What the head would read with `layers` replaced."""
        with resumed(self.target, *self.clean.stream(layers)), without(self.head), _in_bf16(self.target):
            return replaced_logits(self.target, self.tokens, pass_, layers, ignore)

    def kl(self, pass_: TrainingPass, layers: Sequence[int]) -> Float[Tensor, ""]:
        """KL(original ‖ replaced) in nats, mean over positions."""
        return kl_through_head(self.log_p, self.last_stream(pass_, layers), self.head)


def _in_bf16(target: TargetModel) -> torch.autocast:
    """The target's blocks in bf16 where the device is fast at it, as in harvesting; coders and logits stay as they are."""
    return torch.autocast(target.device.type, torch.bfloat16, enabled=bf16_is_fast(target.device))


@torch.no_grad()
def frame_of(target: TargetModel, head: nn.Module, tokens: Int[Tensor, "batch seq"], layers: tuple[int, ...]) -> Frame:
    """The clean pass that serves all sets of coders."""
    with without(head), _in_bf16(target):
        clean = clean_pass(target, tokens, layers)
    return Frame(target, head, tokens, layers, clean, log_probabilities(clean.logits, head))


# ------------------------------------------------------------------------------------------------------------ loss


@dataclass
class CoderSet:
    """Coders that replace MLPs together, and what the training of each owns."""

    replacement: CoderReplacement
    members: list[CoderRun]

    @property
    def name(self) -> str:
        others = len(self.members) - 1
        return self.members[0].name + (f" and {others} more" if others else "")


class Gradients(NamedTuple):
    """What a batch left behind in the gradients of coders."""

    members: list[CoderRun]  # the coders that the plan called on
    codes: dict[int, Codes]  # of every layer that encoded
    readings: Float[Tensor, "4"]  # (loss, KL, FVU, L0 per layer), on the device


def backward(coders: CoderSet, frame: Frame, plan: Sequence[Run], *, config: TrainConfig) -> Gradients:
    """The gradient of the plan's loss in all that the coders learn which it calls on."""
    objective = config.objective
    assert isinstance(objective, Output), f"{objective=}"
    called = {layer for run in plan for layer in run.layers}
    following = [layer for run in plan if run.follows for layer in run.layers]
    pass_ = TrainingPass(coders.replacement, frame.captured(coders.replacement), following)
    at_work = [member for member in coders.members if called.intersection(member.coder.config.layers)]
    kl, unread = frame.log_p.new_zeros(()), []
    for run in plan:
        loss = frame.kl(pass_, run.layers)
        unread.append(loss) if run.follows else loss.backward()
        kl += loss.detach()
    error, of_gates = (
        torch.stack([_fvu(member, pass_, kind) for member in at_work]) for kind in (pass_.written, pass_.rebuilt)
    )
    beside = [_penalty(member, pass_) + _auxk(member, pass_, config) for member in at_work]
    rest = torch.stack(beside).sum() + of_gates.sum() + (objective.local * error.sum() if objective.local else 0.0)
    pass_.join([*unread, rest])
    codes = {layer: trained.codes for layer, trained in pass_.trained.items()}
    l0 = torch.stack([(own.values > 0).sum() / own.n_rows for own in codes.values()]).mean()
    return Gradients(at_work, codes, torch.stack([kl + rest, kl, error.mean(), l0]).detach())


def _fvu(member: CoderRun, pass_: TrainingPass, written: Mapping[int, Tensor]) -> Float[Tensor, ""]:
    """FVU of what was written in place of what the MLPs wrote, mean over the coder's layers that were replaced."""
    errors = [
        fvu(pass_.original(layer)[1], written[layer], member.variance.reshape(-1)[i])
        for i, layer in enumerate(member.coder.config.layers)
        if layer in written
    ]
    return torch.stack(errors).mean() if errors else pass_.clean.outputs.new_zeros(())


def _penalty(member: CoderRun, pass_: TrainingPass) -> Float[Tensor, ""]:
    """What the rule adds, mean over the layers that the coder encoded."""
    own = [layer for layer in member.coder.config.layers if layer in pass_.trained]
    return torch.stack([pass_.trained[layer].penalty for layer in own]).mean()


def _auxk(member: CoderRun, pass_: TrainingPass, config: TrainConfig) -> Float[Tensor, ""]:
    """AuxK of the layers that were replaced, as in local training; what dead latents read is a constant."""
    coder, own = member.coder, member.coder.config.layers
    if not coder.n_dead:
        return coder.b_dec.new_zeros(())
    e_hat = coder.aux_reconstruction(as_read(member, pass_.inputs), config.dead_after)
    e_hat, variance = e_hat.view(len(own), -1, coder.config.d_out), member.variance.reshape(-1)
    aux = [
        auxk(pass_.original(layer)[1], pass_.written[layer], e_hat=e_hat[i], variance=variance[i])
        for i, layer in enumerate(own)
        if layer in pass_.written
    ]
    return config.aux * torch.stack(aux).mean()


def as_read(member: CoderRun, inputs: Mapping[int, Float[Tensor, "token d_in"]]) -> Float[Tensor, "*layer token d_in"]:
    """What a coder's encoders read, in the shape that the coder takes; zeros for a layer that did not encode."""
    some = next(iter(inputs.values()))
    own = torch.stack([inputs.get(layer, torch.zeros_like(some)).detach() for layer in member.coder.config.layers])
    return member.coder.view(own, own, range(len(own)))[0]
