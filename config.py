"""Frozen configurations. A rule is a value: `BatchTopK(k=16)` says all there is to say about sparsity.

`to_json(config)` and `from_json(blob)` round-trip every dataclass of this file; the class name travels as `"class"`.
"""

import dataclasses
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

Site = Literal["mlp_out", "resid", "attn_out"]


def require(holds: bool, otherwise: str) -> None:
    """Raises ValueError with the text where a setting is not what it must be."""
    if not holds:
        raise ValueError(otherwise)


@dataclass(frozen=True)
class Relu:
    """a = relu(pre); penalty l1 · Σ a ‖W_dec‖ (per token, in scaled units)."""

    l1: float  # coefficient of the L1 penalty beside a loss of FVU

    def __post_init__(self) -> None:
        require(self.l1 >= 0, f"l1 must not be negative, but is {self.l1}")


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of each token, rectified. arXiv 2406.04093."""

    k: int  # active latents per token

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: a token needs at least one active latent")


@dataclass(frozen=True)
class BatchTopK:
    """The k·B largest of a batch of B tokens in training, a stored threshold when deployed. arXiv 2412.06410."""

    k: int  # active latents per token, on average over the batch

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: a token needs at least one active latent")


@dataclass(frozen=True)
class JumpReLU:
    """a = pre · [pre > θ] with a learnt θ per latent. arXiv 2407.14435; pre-activation term: Anthropic 2025."""

    l0: float  # coefficient of the tanh-free L0 penalty beside a loss of FVU, per active latent
    bandwidth: float = 0.1  # width ε of the rectangular kernel, in scaled pre-activation units
    theta: float = 0.1  # initial threshold, in scaled pre-activation units
    preact: float = 3e-6  # coefficient of Σ relu(θ − pre) ‖W_dec‖, which lets silent latents move

    def __post_init__(self) -> None:
        require(self.theta > 0, f"theta must be positive, but is {self.theta}")
        require(self.bandwidth > 0, f"bandwidth must be positive, but is {self.bandwidth}")
        require(self.l0 >= 0, f"l0 must not be negative, but is {self.l0}")
        require(self.preact >= 0, f"preact must not be negative, but is {self.preact}")


@dataclass(frozen=True)
class Gated:
    """a = [π > 0] relu(e^r ⊙ (π − b) + b_mag): a gate π decides what is active, a scaled copy of it how much.

    Penalty l1 · Σ relu(π) ‖W_dec‖, and FVU of the target rebuilt from relu(π). arXiv 2404.16014.
    """

    l1: float  # coefficient of the L1 penalty on the gates beside a loss of FVU

    def __post_init__(self) -> None:
        require(self.l1 >= 0, f"l1 must not be negative, but is {self.l1}")


Rule = Relu | TopK | BatchTopK | JumpReLU | Gated


@dataclass(frozen=True)
class Pinned:
    """A part of a coder stays at random directions or near them, so that little of it is learnt. arXiv 2602.14111.

    Configurations leave it out of their `repr`, from which a start is drawn: whatever is pinned, the encoder begins alike.
    """

    part: Literal["encoder", "decoder"]
    cosine: float = 1.0  # least cosine of a decoder's rows with the directions they were given; 1: they keep these

    def __post_init__(self) -> None:
        require(self.part in ("encoder", "decoder"), f"no part {self.part!r} of a coder: use encoder or decoder")
        require(0 < self.cosine <= 1, f"the cosine must be above 0 and at most 1, but is {self.cosine}")
        require(self.part == "decoder" or self.cosine == 1, f"an encoder is frozen or free, not within {self.cosine}")

    def __str__(self) -> str:
        """As rows and names of checkpoints say it, e.g. `soft0.8-decoder`."""
        return f"{'frozen' if self.cosine == 1 else f'soft{self.cosine:g}'}-{self.part}"


def variant_name(*words: object | None) -> str:
    """What tells a coder from the plain one of its kind, of several words that may be void."""
    return "-".join(str(word) for word in words if word)


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A sparse autoencoder of one site of one layer."""

    kind: ClassVar[str] = "sae"
    layer: int
    site: Site
    d_in: int  # width of the activation it reads and rebuilds
    d_dict: int  # latents
    rule: Rule
    pinned: Pinned | None = field(default=None, repr=False)  # None: all is learnt

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def d_out(self) -> int:
        return self.d_in

    @property
    def variant(self) -> str:
        """What tells it from the plain SAE, of MLP outputs: another site, what is pinned."""
        return variant_name("" if self.site == "mlp_out" else self.site, self.pinned)

    @property
    def family(self) -> "SAEConfig":
        """Equal for coders that can stand side by side, one per layer."""
        return dataclasses.replace(self, layer=0)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A transcoder of one layer's MLP."""

    kind: ClassVar[str] = "transcoder"
    layer: int
    d_in: int  # width of the MLP's input
    d_out: int  # width of the MLP's output
    d_dict: int  # latents
    rule: Rule
    skip: bool = False  # an affine skip y += W_skip x, initialised at zero (arXiv 2501.18823)
    pinned: Pinned | None = field(default=None, repr=False)  # None: all is learnt

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def site(self) -> Site:
        return "mlp_out"

    @property
    def variant(self) -> str:
        """What tells it from the plain transcoder: its skip, what is pinned."""
        return variant_name("skip" if self.skip else "", self.pinned)

    @property
    def family(self) -> "EncoderConfig":
        """Equal for coders that can stand side by side, one per layer."""
        return dataclasses.replace(self, layer=0)


@dataclass(frozen=True, kw_only=True)
class CLTConfig:
    """A cross-layer transcoder: layer i's latents write to every layer j ≥ i of `layers`."""

    kind: ClassVar[str] = "clt"
    layers: tuple[int, ...]  # the layers of the target it spans, in order
    d_in: int
    d_out: int
    d_dict: int  # latents per layer
    rule: Rule  # per layer: k counts one layer's latents
    rank: int | None = field(default=None, repr=False)  # of what a latent writes to later layers alone; None: any
    pinned: Pinned | None = field(default=None, repr=False)  # None: all is learnt

    def __post_init__(self) -> None:
        require(self.rank is None or self.rank >= 1, f"a decoder of rank {self.rank}: ask for 1 or more")
        require(self.rank is None or self.pinned is None, "decoders of low rank are made anew in every step: pin none")
        if not self.layers or tuple(sorted(set(self.layers))) != tuple(self.layers):
            raise ValueError(f"layers {self.layers} of a cross-layer transcoder must ascend, each named once")

    @property
    def site(self) -> Site:
        return "mlp_out"

    @property
    def variant(self) -> str:
        """What tells it from the plain CLT: decoders of low rank, what is pinned."""
        return variant_name(None if self.rank is None else f"rank{self.rank}", self.pinned)

    @property
    def family(self) -> "CLTConfig":
        """It spans its layers alone."""
        return self


CoderConfig = SAEConfig | EncoderConfig | CLTConfig


@dataclass(frozen=True)
class Local:
    """Every coder rebuilds what its own layers wrote: a loss of FVU."""

    name: ClassVar[str] = "local"


@dataclass(frozen=True)
class Mixed:
    """Which layers a batch replaces is drawn: one alone, some of them, or all, so that coders stay good alone and together."""

    alone: float = 0.25  # share of the batches in which a single layer is replaced
    some: float = 0.25  # share in which more than one but not all are; of two layers, all
    running: float = 0.5  # share of the other batches in which codes follow the stream; else a clean pass gives them

    def __post_init__(self) -> None:
        shares = (self.alone, self.some, self.alone + self.some, self.running)
        require(
            min(shares) >= 0 and max(shares) <= 1, f"the shares of {self} must lie between 0 and 1, and so their sum"
        )

    def __str__(self) -> str:
        return "mixed"


@dataclass(frozen=True)
class Output:
    """The model's output stays what it was: a loss of KL(original ‖ replaced), and `local` times the FVU of what was written.

    `single`, `frozen` and `free` are the ruler's protocols. FVU is against what the original model's MLPs wrote.
    """

    protocol: Literal["single", "frozen", "free"] | Mixed
    local: float = 0.0  # weight of the mean FVU of a coder's layers, where the KL (nats per token) has weight 1

    def __post_init__(self) -> None:
        known = isinstance(self.protocol, Mixed) or self.protocol in ("single", "frozen", "free")
        require(known, f"unknown protocol {self.protocol!r} of an objective: use single, frozen, free or Mixed()")
        require(self.local >= 0, f"the weight of the local loss must not be negative, but is {self.local}")

    @property
    def name(self) -> str:
        """As rows and names of checkpoints say it, e.g. `kl-free`."""
        return f"kl-{self.protocol}" + (f"-fvu{self.local:g}" if self.local else "")


CoderObjective = Local | Output
LOCAL = Local()


def full_kind(config: CoderConfig) -> str:
    """E.g. `transcoder-skip`: the kind of coder and what tells it from the plain one."""
    return "-".join(filter(None, [config.kind, config.variant]))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a group of coders is trained; one value serves every coder of the group."""

    objective: CoderObjective = LOCAL
    tokens: int  # training tokens seen by every coder
    lr: float | None = None  # peak learning rate of Adam; None: what `default_learning_rate` says of each coder
    warmup: float = 0.05  # fraction of the steps with a rising learning rate
    decay: float = 0.2  # fraction of the steps, at the end, in which it falls linearly to zero
    anneal: float = 0.1  # fraction of the steps in which k falls from 4k to k
    max_grad_norm: float = 1.0  # each coder's gradient is clipped to this norm
    aux: float = 1.0  # coefficient of the AuxK loss; at 1 a dead latent is taught as hard as a live one
    dead_after: int = 10_000_000  # a latent is dead after being silent for this many tokens
    betas: tuple[float, float] = (0.9, 0.999)
    metrics_every: int = 20  # steps between readings of the metrics (each reading synchronises the device once)
    checkpoint_every: int = 1000  # steps between checkpoints
    calibration_tokens: int = 65_536  # held-out tokens that set the deployed threshold
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How SPD computes causal importances. `mlp` reads a component's own activation; the other local kinds read the
    module's input at the same position; the global kinds read the inputs of all modules, or of their `taps`."""

    kind: Literal["mlp", "vector_mlp", "shared_mlp", "global_shared_mlp", "global_shared_transformer"]
    hidden: tuple[int, ...]  # hidden widths of the MLP; of a transformer gate: (width of its blocks' MLP,)
    d_model: int = 0  # transformer gate only: width of its stream
    blocks: int = 0  # transformer gate only
    heads: int = 0  # transformer gate only
    causal: bool = True  # transformer gate only: False lets a gate see future tokens (as Goodfire's do)
    norm_inputs: bool = True  # transformer gate only: what it reads of each module is RMS-normed
    taps: tuple[
        str, ...
    ] = ()  # global kinds: fnmatch patterns of the decomposed modules whose inputs are read; (): of all

    def __post_init__(self) -> None:
        kinds = ("mlp", "vector_mlp", "shared_mlp", "global_shared_mlp", "global_shared_transformer")
        if self.kind not in kinds:
            raise ValueError(f"unknown gate kind {self.kind!r}: use one of {', '.join(kinds)}")
        require(len(self.hidden) > 0, "a gate needs a hidden layer")
        require(not (self.local and self.taps), f"a {self.kind} gate reads its own module alone, not {self.taps}")
        if self.kind == "global_shared_transformer":
            sizes = f"d_model {self.d_model}, blocks {self.blocks}, heads {self.heads}"
            require(
                min(self.d_model, self.blocks, self.heads) > 0, f"a transformer gate needs positive sizes, not {sizes}"
            )

    @property
    def local(self) -> bool:
        return not self.kind.startswith("global")


@dataclass(frozen=True, kw_only=True)
class SPDConfig:
    """What is decomposed, and its gates."""

    components: tuple[tuple[str, int], ...]  # (fnmatch pattern of module paths, C) pairs
    gate: GateConfig
    tied: tuple[tuple[str, str], ...] = ()  # (path, path of the module whose weight is its transpose)
    alpha: float = 0.01  # leak of the sigmoids

    def __post_init__(self) -> None:
        for pattern, n in self.components:
            if n < 1:
                raise ValueError(f"C={n} for {pattern!r}: a module needs at least one component")


@dataclass(frozen=True, kw_only=True)
class Recon:
    """One reconstruction term: coefficient × distance(target output, output under (masks × routing)).

    `deployed` masks are the ruler's, 1 where the importance is positive and else 0, without Δ; `running` ones too, but
    their gates read the masked stream, as the ruler's `free` does (local gates alone).
    """

    coefficient: float
    source: Literal["stochastic", "pgd", "persistent", "importance", "deployed", "running", "ones"] = "stochastic"
    routing: Literal["all", "layerwise", "subset"] = "all"
    steps: int = 1  # pgd: ascent steps; persistent: extra ascents before the loss
    step_size: float = 1.0  # pgd: η; persistent: learning rate of Adam
    straight_through: bool = False  # deployed, running: an open gate has its mask's gradient, as if the mask were g

    def __post_init__(self) -> None:
        require(
            self.source != "running" or self.routing == "all", f"running gates mask all modules, not {self.routing}"
        )


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One masked pass for stochastic masks of a random subset of the modules and for an adversary on all of them.

    Each sequence is the adversary's with probability `adversarial`. The adversary is a pool of persistent sources, one
    vector across all modules each, of which every sequence draws one per step.
    """

    coefficient: float
    adversarial: float = 0.5
    particles: int = 32  # in the pool
    steps: int = 2  # ascents before the loss, whose own gradient makes one more
    step_size: float = 0.02  # learning rate of the sources' Adam


@dataclass(frozen=True, kw_only=True)
class Lp:
    """Importance minimality that makes a component of importance g cost g^p."""

    coefficient: float
    p: tuple[float, float] = (2.0, 2.0)  # at the start and at the end
    between: tuple[float, float] = (0.0, 1.0)  # fractions of the steps between which p moves linearly


@dataclass(frozen=True, kw_only=True)
class SmoothL0:
    """Importance minimality that makes a component of importance g cost g² / (g² + γ²): a count, as γ goes to 0."""

    coefficient: float
    gamma: tuple[float, float] = (1.0, 0.01)  # at the start and at the end
    between: tuple[float, float] = (0.0, 0.9)  # fractions of the steps between which γ moves linearly
    normalise_at_one: bool = True  # times 1 + γ², so that importance 1 costs 1 at every γ


@dataclass(frozen=True, kw_only=True)
class Frequency:
    """Components that are important often cost more: coefficient · Σ_c f_c log₂(1 + positions · f_c), f their mean cost."""

    coefficient: float
    positions: float  # of a reference batch, whatever the batch of the run
    half_life: float = 200.0  # steps, of the average that f is


@dataclass(frozen=True, kw_only=True)
class Locality:
    """Components should write to, or read from, few of an MLP's neurons: coefficient · a soft count of these."""

    coefficient: float
    t: tuple[float, float] = (8.0, 2.0)  # width of the count at the start and at the end, in even shares of a component
    between: tuple[float, float] = (0.0, 0.25)  # fractions of the steps between which t moves linearly


@dataclass(frozen=True, kw_only=True)
class Aim:
    """An L0, mean over modules, that minimality's coefficient moves to reach; it falls geometrically from start to end."""

    l0: tuple[float, float]
    between: tuple[float, float] = (0.0, 0.6)  # fractions of the steps between which it falls


@dataclass(frozen=True, kw_only=True)
class SPDTrainConfig:
    """How an SPD is trained. Defaults are those of the toys."""

    steps: int
    lr: float  # peak learning rate of components, and of gates without one of their own (no weight decay)
    gate_lr: float | None = None  # peak learning rate of gates; None: lr
    recon: tuple[Recon | Merged, ...]
    minimality: Lp | SmoothL0
    aim: Aim | None = None  # None: minimality's coefficient stays
    frequency: Frequency | None = None
    locality: Locality | None = None  # MLP matrices alone
    distance: Literal["mse", "kl"] = "mse"
    split: bool = False  # each recon term takes its own share of the sequences: together they cost one masked pass
    faithfulness: float = 0.0  # coefficient of Σ‖Δ‖² / Σ numel(W)
    relative: bool = False  # the mean over matrices of ‖Δ‖² / ‖W‖² in its place
    optimiser: Literal["adamw", "muon"] = "adamw"  # muon: of matrices; vectors keep AdamW
    schedule: Literal["constant", "cosine"] = "cosine"
    final: float = 0.0  # cosine: learning rate at the end, as a fraction of the peak
    warmup: float = 0.0  # fraction of the steps with a rising learning rate
    start: Literal["warm_up", "least_squares", "neurons"] = "warm_up"  # how V U comes near to W before the first step
    faithful_steps: int = 200  # warm_up: steps of faithfulness alone
    faithful_lr: float = 0.01
    faithful_decay: float = 0.1  # weight decay of the warm-up's AdamW
    clip: float | None = None  # clip the norm of the components' gradient; None leaves it
    metrics_every: int = 50
    checkpoint_every: int = 500
    seed: int = 0


def to_json(config: Any) -> Any:
    """A JSON value that `from_json` turns back into the same configuration."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"class": type(config).__name__} | fields
    if isinstance(config, tuple | list):
        return [to_json(item) for item in config]
    if isinstance(config, dict):
        return {key: to_json(value) for key, value in config.items()}
    return config


def from_json(blob: Any) -> Any:
    """Inverse of `to_json`; lists come back as tuples. Raises ValueError on an unknown class, field or kind of value."""
    if isinstance(blob, list):
        return tuple(from_json(item) for item in blob)
    if not isinstance(blob, dict):
        return blob
    fields = {key: from_json(value) for key, value in blob.items() if key != "class"}
    if "class" not in blob:
        return fields
    cls = globals().get(blob["class"]) if isinstance(blob["class"], str) else None
    if not (dataclasses.is_dataclass(cls) and isinstance(cls, type)):
        raise ValueError(f"unknown configuration class {blob['class']!r}: is the checkpoint from a newer version?")
    return from_fields(cls, fields)


def from_fields[T](cls: type[T], values: dict[str, Any]) -> T:
    """A dataclass of these values. Raises ValueError naming a field that is unknown, missing or of another type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - fields.keys())
    require(not unknown, f"{cls.__name__} has no field {unknown}: is the checkpoint from another version?")
    missing = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
    require(not missing, f"{cls.__name__} lacks {missing}: is the checkpoint from another version?")
    for name, hint in get_type_hints(cls).items():
        if name in values and not _is_a(values[name], hint):
            raise ValueError(f"{name} of {cls.__name__} is {values[name]!r}: is the checkpoint from another version?")
    return cls(**values)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value that was read is of the annotated type; a whole number is a float too, a truth value no number."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return any(_is_a(value, option) for option in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        of_each = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        return isinstance(value, tuple) and len(value) == len(of_each) and all(map(_is_a, value, of_each))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    is_from_elsewhere = dataclasses.is_dataclass(value) and type(value).__module__ != __name__  # a rule of one's own
    return isinstance(value, hint) or is_from_elsewhere
