"""LlamaSimpleMLP: a pre-norm decoder with rotary grouped-query attention and a plain GELU MLP.

    h ← h + Attn(RMS(h)),   h ← h + down_proj(gelu_tanh(c_fc(RMS(h)))),   logits = RMS(h) W_wteᵀ

    RMS(h) = h / √(mean h² + ε) · weight,  ε = 1e-6;  RoPE rotates (first half, second half) of each head, base θ.

Parameter names and configuration keys are those of Goodfire's runs (`wandb:goodfire/spd/runs/t-9d2b8f02`), so that
`model_config.yaml` + `model_step_*.safetensors` (or .pt) of such a run load as they are. No biases; the embedding is tied.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from logs import read_tensors


@dataclass(frozen=True)
class LlamaSimpleMLPConfig:
    block_size: int  # longest sequence, in tokens
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_intermediate: int
    n_key_value_heads: int
    rotary_base: float = 10_000.0
    rms_norm_eps: float = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotary_tables(
    seq: int, head: int, base: float, device: torch.device | None = None
) -> tuple[Float[Tensor, "seq head"], Float[Tensor, "seq head"]]:
    """cos and sin of position · base^(−2i/head), each repeated for the two halves of a head."""
    frequency = base ** (-torch.arange(0, head, 2, dtype=torch.float32, device=device) / head)
    angle = torch.outer(torch.arange(seq, dtype=torch.float32, device=device), frequency)
    halves = repeat(angle, "seq half -> seq (halves half)", halves=2)
    return halves.cos(), halves.sin()


def rotate(
    x: Float[Tensor, "batch heads seq head"], cos: Float[Tensor, "seq head"], sin: Float[Tensor, "seq head"]
) -> Float[Tensor, "batch heads seq head"]:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    def __init__(self, c: LlamaSimpleMLPConfig) -> None:
        super().__init__()
        assert c.n_embd % c.n_head == 0, f"{c.n_embd=} {c.n_head=}"
        assert c.n_head % c.n_key_value_heads == 0, f"{c.n_head=} {c.n_key_value_heads=}"
        self.head = c.n_embd // c.n_head
        kv_width = c.n_key_value_heads * self.head
        self.q_proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.k_proj = nn.Linear(c.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(c.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        cos, sin = rotary_tables(c.block_size, self.head, c.rotary_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        seq = x.shape[1]
        q, k, v = (
            rearrange(project(x), "batch seq (heads head) -> batch heads seq head", head=self.head)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.cos[:seq].to(x.dtype), self.sin[:seq].to(x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        z = F.scaled_dot_product_attention(q, k.to(v.dtype), v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(rearrange(z, "batch heads seq head -> batch seq (heads head)"))


class MLP(nn.Module):
    def __init__(self, c: LlamaSimpleMLPConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, c.n_intermediate, bias=False)
        self.down_proj = nn.Linear(c.n_intermediate, c.n_embd, bias=False)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return self.down_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c: LlamaSimpleMLPConfig) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(c.n_embd, c.rms_norm_eps)
        self.attn = Attention(c)
        self.rms_2 = RMSNorm(c.n_embd, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, h: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        h = h + self.attn(self.rms_1(h))
        return h + self.mlp(self.rms_2(h))


class LlamaSimpleMLP(nn.Module):
    def __init__(self, config: LlamaSimpleMLPConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(
        self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"] | None = None
    ) -> tuple[Float[Tensor, "batch seq vocab"], Float[Tensor, ""] | None]:
        """Logits and, where targets (the next tokens) are given, their mean cross-entropy in nats."""
        assert tokens.shape[1] <= self.config.block_size, f"{tokens.shape[1]=} exceeds {self.config.block_size=}"
        h = self.wte(tokens)
        for block in self.h:
            h = block(h)
        logits = self.lm_head(self.ln_f(h))
        if targets is None:
            return logits, None
        by_token = rearrange(logits, "batch seq vocab -> (batch seq) vocab").float()
        return logits, F.cross_entropy(by_token, rearrange(targets, "batch seq -> (batch seq)"))


def initialise(model: LlamaSimpleMLP, generator: torch.Generator) -> None:
    """GPT-2's recipe: N(0, 0.02²), what writes to the residual stream scaled by 1/√(2·layers)."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / (2 * model.config.n_layer) ** 0.5 if residual else 0.02
            nn.init.normal_(p, std=std, generator=generator)


# The keys of a run's `model_config.yaml` that are understood; an absent one of _FIXED, or of the rotary embedding and the
# norm, has the format's default, which is the value here or the dataclass's.
_SIZES = ("vocab_size", "n_layer", "n_head", "n_embd", "n_intermediate")
_FIXED: dict[str, object] = {
    "model_type": "LlamaSimpleMLP", "mlp_bias": False, "attn_bias": False, "rotary_adjacent_pairs": False,
}  # fmt: skip
_READ = (
    "block_size",
    "n_ctx",
    "n_key_value_heads",
    "use_grouped_query_attention",
    "rotary_dim",
    "rotary_base",
    "rms_norm_eps",
)
_HARMLESS = ("flash_attention",)  # the same function, computed otherwise


def config_from_yaml(text: str) -> LlamaSimpleMLPConfig:
    """The configuration in a run's `model_config.yaml`.

    Raises ValueError in one line for what is no YAML, for a key that is not known here or has a value that this
    architecture has not, and for sizes that do not fit each other.
    """
    raw = _mapping(text)
    if unknown := sorted(map(str, raw.keys() - {*_SIZES, *_FIXED, *_READ, *_HARMLESS})):
        raise ValueError(f"model_config.yaml: unknown key {unknown[0]!r}: it could change what the model computes")
    for key, only in _FIXED.items():
        if raw.get(key, only) != only:
            raise ValueError(f"model_config.yaml: {key} is {raw[key]!r}: only {only!r} is known here")
    sizes = {key: _positive(raw, key) for key in _SIZES}
    contexts = [_positive(raw, key) for key in ("n_ctx", "block_size") if key in raw]
    if not contexts:
        raise ValueError("model_config.yaml has neither n_ctx nor block_size: the longest sequence is not known")
    grouped = raw.get("use_grouped_query_attention", True)
    kv_heads = _positive(raw, "n_key_value_heads") if grouped else sizes["n_head"]
    head, rest = divmod(sizes["n_embd"], sizes["n_head"])
    if rest or head % 2 or sizes["n_head"] % kv_heads:
        raise ValueError(
            f"model_config.yaml: n_embd {sizes['n_embd']}, n_head {sizes['n_head']} and n_key_value_heads {kv_heads} do not "
            "fit each other"
        )
    if raw.get("rotary_dim", head) != head:
        raise ValueError(
            f"model_config.yaml: rotary_dim is {raw['rotary_dim']!r}: only a whole head, {head}, is known here"
        )
    numbers = {key: raw[key] for key in ("rotary_base", "rms_norm_eps") if key in raw}
    for key, value in numbers.items():
        if type(value) not in (int, float) or value <= 0:
            raise ValueError(f"model_config.yaml: {key} is {value!r}, not a positive number")
    return LlamaSimpleMLPConfig(block_size=contexts[0], n_key_value_heads=kv_heads, **sizes, **numbers)


def _mapping(text: str) -> dict[str, object]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError("model_config.yaml is truncated or no YAML: fetch it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"model_config.yaml holds a {type(raw).__name__}, not a configuration")
    return raw


def _positive(raw: dict[str, object], key: str) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"model_config.yaml: {key} is {value!r}, not a positive whole number")
    return value


def load_target_run(folder: Path) -> LlamaSimpleMLP:
    """The model of a run directory: `model_config.yaml` and the weights of the highest step, `model_step_*`.

    They are a .safetensors or a .pt file; of one step with both the first is read. A tied head may be left out.
    Raises ValueError in one line for another folder, a damaged file, and tensors that are not those of the configuration.
    """
    config_file = folder / "model_config.yaml"
    steps = {
        (int(found[1]), found[2]): path
        for path in folder.glob("model_step_*")
        if (found := re.fullmatch(r"model_step_(\d+)\.(pt|safetensors)", path.name))
    }
    if not config_file.exists() or not steps:
        raise ValueError(
            f"{folder} holds no model_config.yaml with a model_step_*.pt or .safetensors beside it: not a training run"
        )
    model, file = LlamaSimpleMLP(config_from_yaml(config_file.read_text(errors="replace"))), steps[max(steps)]
    state = {
        key: value.float() for key, value in read_tensors(file).items() if not re.search(r"rotary|\.(cos|sin)$", key)
    }
    state.setdefault("lm_head.weight", state.get("wte.weight", torch.empty(0)))
    expected = model.state_dict()
    for key in sorted(expected.keys() | state.keys()):
        if key not in expected or key not in state or expected[key].shape != state[key].shape:
            raise ValueError(f"{file}: tensor {key!r} is missing, extra or misshapen beside model_config.yaml")
        if not state[key].isfinite().all():
            raise ValueError(f"{file}: tensor {key!r} holds NaN or infinity")
    if not torch.equal(state["lm_head.weight"], state["wte.weight"]):
        raise ValueError(f"{file}: lm_head.weight differs from wte.weight: this architecture ties them")
    model.load_state_dict(state)
    return model
