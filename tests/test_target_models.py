"""For every family: the identity in an MLP's place changes no logit, and a captured input gives the captured output."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import make_small_target, word_tokenizer
from torch import nn

from target_models import (
    ATTENTIONS,
    Parts,
    TargetModel,
    at_site,
    capture,
    likes_bf16,
    load_target,
    make_target,
    patched,
)
from token_stream import DatasetSpec

SIZES = {"vocab_size": 62, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = SIZES | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
FAMILIES: dict[str, tuple[type[tf.PretrainedConfig], dict]] = {
    "llama": (tf.LlamaConfig, GATED),
    "mistral": (tf.MistralConfig, GATED),
    "qwen2": (tf.Qwen2Config, GATED),
    "qwen3": (tf.Qwen3Config, GATED),
    "gemma": (tf.GemmaConfig, GATED),
    "gemma2": (tf.Gemma2Config, GATED),
    "neox": (tf.GPTNeoXConfig, SIZES | {"intermediate_size": 24, "use_parallel_residual": False}),
    "neox_parallel": (tf.GPTNeoXConfig, SIZES | {"intermediate_size": 24, "use_parallel_residual": True}),
    "gpt2": (tf.GPT2Config, {"vocab_size": 62, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "gpt_neo": (
        tf.GPTNeoConfig,
        {"vocab_size": 62, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    ),
    "opt": (tf.OPTConfig, SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}),
    "phi_parallel": (tf.PhiConfig, SIZES | {"intermediate_size": 24}),
    "gptj_parallel": (tf.GPTJConfig, {"vocab_size": 62, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
}
TOKENS = torch.arange(2, 22).view(2, 10)


def family_target(name: str) -> TargetModel:
    torch.manual_seed(0)
    kind, sizes = FAMILIES[name]
    model = tf.AutoModelForCausalLM.from_config(kind(**sizes)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and norms too, so that none of them can be forgotten
    return make_target(name, Parts(model, word_tokenizer(), 16, DatasetSpec("python")), "cpu")


@pytest.fixture(params=[*FAMILIES, "llama_simple_mlp"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> TargetModel:
    return make_small_target(tmp_path) if request.param == "llama_simple_mlp" else family_target(request.param)


def everything(target: TargetModel, function) -> dict:
    return {layer: function for layer in range(target.n_layers)}


@torch.inference_mode()
def test_identity_replacement_preserves_logits(target: TargetModel) -> None:
    tokens = TOKENS % target.vocab_size
    original = target.logits(tokens)
    with patched(target, everything(target, lambda x, y: y)):
        assert torch.equal(target.logits(tokens), original)
    with patched(target, everything(target, lambda x, y: torch.zeros_like(y))):
        assert not torch.allclose(target.logits(tokens), original)
    assert torch.equal(target.logits(tokens), original)


@torch.inference_mode()
def test_captured_input_gives_captured_output(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("target_models.likes_bf16", lambda device: False)
    found = capture(target, TOKENS % target.vocab_size, [0, 1])
    assert found.inputs.shape == found.outputs.shape == (2, 2, 10, 16)
    for layer in (0, 1):
        torch.testing.assert_close(target.mlp(layer, found.inputs[layer]), found.outputs[layer])


@torch.inference_mode()
def test_the_mlp_ends_with_its_down_projection(target: TargetModel) -> None:
    x = torch.randn(3, target.d_model, generator=torch.Generator().manual_seed(0))
    h, down = target.hidden(1, x), target.model.get_submodule(target.sites[1].down)
    assert h.shape == (3, target.d_mlp) and target.down_weight(1).shape == (target.d_model, target.d_mlp)
    bias = 0 if down.bias is None else down.bias
    torch.testing.assert_close(h @ target.down_weight(1).T + bias, target.mlp(1, x))


@pytest.mark.parametrize("site", ["resid", "attn_out"])
@torch.inference_mode()
def test_another_site_is_captured_and_patched_where_it_says(target: TargetModel, site, monkeypatch) -> None:
    monkeypatch.setattr("target_models.likes_bf16", lambda device: False)
    tokens = TOKENS % target.vocab_size
    view, original = at_site(target, site), target.logits(tokens)
    block = target.model.get_submodule(target.sites[1].read.rpartition(".")[0])
    module = block if site == "resid" else next(m for n, m in block.named_children() if n in ATTENTIONS)
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    target.logits(tokens)
    handle.remove()
    found = capture(view, tokens, [0, 1])
    assert torch.equal(found.inputs, found.outputs) and torch.equal(found.outputs[1], seen[0])
    with patched(view, everything(view, lambda x, y: y)):
        assert torch.equal(view.logits(tokens), original)
    moved = torch.randn(found.outputs[1].shape, generator=torch.Generator().manual_seed(0))
    with patched(view, {1: lambda x, y: y + moved}):
        assert torch.equal(capture(view, tokens, [0]).outputs[0], found.outputs[0])  # upstream of it nothing moves
        handle = module.register_forward_hook(
            lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        shifted = view.logits(tokens)
        handle.remove()
    torch.testing.assert_close(seen[1], seen[0] + moved)
    assert not torch.allclose(shifted, original) and torch.equal(target.logits(tokens), original)
    with pytest.raises(ValueError, match="no MLP"):
        view.hidden(0, found.inputs[0])


def test_capture_stops_before_the_logits(small_target: TargetModel) -> None:
    reached: list[str] = []
    head = small_target.model.get_submodule("lm_head")
    assert isinstance(head, nn.Module)
    head.register_forward_hook(lambda *_: reached.append("lm_head"))
    small_target.model.get_submodule("h.1.mlp").register_forward_hook(lambda *_: reached.append("layer 1"))
    capture(small_target, TOKENS, [0])
    assert reached == []


def test_every_layer_gets_its_own_function(small_target: TargetModel) -> None:
    called: list[int] = []

    def note(layer: int):
        return lambda x, y: (called.append(layer), y)[1]

    with torch.inference_mode(), patched(small_target, {layer: note(layer) for layer in (0, 1)}):
        small_target.logits(TOKENS)
    assert called == [0, 1]


def test_a_failure_inside_leaves_the_model_unpatched(small_target: TargetModel) -> None:
    def fail(x, y):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), patched(small_target, {0: fail}):
        small_target.logits(TOKENS)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in small_target.model.modules())


def test_the_embedded_target_loads_and_predicts_python() -> None:
    target = load_target("tiny", "cpu")
    assert (target.n_layers, target.d_model, target.d_mlp) == (4, 192, 768)
    text = "import os\nimport sys\n\n\nclass Foo:\n    def __init__(self, value):\n        self.value = value\n"
    tokens = torch.tensor([target.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        loss = nn.functional.cross_entropy(target.logits(tokens)[0, :-1], tokens[0, 1:])
    assert loss < 3.0, f"{loss=} nats per token on plain Python"
    assert not any(p.requires_grad for p in target.model.parameters()) and not target.model.training


def test_bad_names_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="unknown target 'nothing'.*tiny"):
        load_target("nothing", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device.*--device cpu"):
            load_target("tiny", "cuda")


def test_no_network_points_to_the_embedded_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NN_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--target tiny"):
        load_target("hf:no-such-organisation/no-such-model", "cpu")


def test_bf16_is_only_for_devices_that_have_it() -> None:
    assert likes_bf16(torch.device("cuda"))


@pytest.mark.real_model
def test_smollm2() -> None:
    target = load_target("smollm2", "cpu")
    assert (target.n_layers, target.d_model, target.d_mlp) == (30, 576, 1536)
    tokens = torch.tensor([target.tokenizer("The capital of France is the city of")["input_ids"]])
    with torch.inference_mode():
        original = target.logits(tokens)
        with patched(target, everything(target, lambda x, y: y)):
            assert torch.equal(target.logits(tokens), original)
    assert target.tokenizer.decode(original[0, -1].argmax()).strip() == "Paris"
