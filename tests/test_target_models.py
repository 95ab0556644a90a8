"""For every family: the identity in an MLP's place changes no logit, and a captured input gives the captured output."""

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import save
from small import make_small_target, transcoders, word_tokenizer
from torch import nn

from baselines import NeuronsReplacement
from config import Relu
from devices import bf16_is_fast
from foreign_files import fitted, same_site
from patching import capture, kept_streams, patched, resumed
from target_models import (
    ATTENTIONS,
    Loaded,
    TargetModel,
    at_site,
    load_target,
    make_target,
    mlp_matrices,
    weights_fingerprint,
    writer_parameters,
    written,
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
    "gemma3": (tf.Gemma3TextConfig, GATED),
    "granite": (tf.GraniteConfig, GATED | {"residual_multiplier": 0.22}),
    "glm4": (tf.Glm4Config, GATED),
    "stablelm_parallel": (tf.StableLmConfig, GATED | {"use_parallel_residual": True}),
    "falcon_parallel": (tf.FalconConfig, SIZES | {"new_decoder_architecture": False, "parallel_attn": True}),
    "falcon": (tf.FalconConfig, SIZES | {"new_decoder_architecture": False, "parallel_attn": False, "bias": True}),
}
BEHIND_A_NORM_OR_FACTOR = {"gemma2", "gemma3", "granite", "glm4"}
TOKENS = torch.arange(2, 22).view(2, 10)


def family_model(name: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    kind, sizes = FAMILIES[name]
    model = tf.AutoModelForCausalLM.from_config(kind(**sizes)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and norms too, so that none of them can be forgotten
    return model


def saved(folder: Path, model: tf.PreTrainedModel) -> Path:
    """A folder as the hub would serve it: weights, configuration, tokenizer."""
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=[*FAMILIES, "tl:gpt2", "tl:llama", "tl:neox_parallel", "llama_simple_mlp"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> TargetModel:
    if request.param == "llama_simple_mlp":
        return make_small_target(tmp_path)
    if request.param.startswith("tl:"):
        return load_target(f"tl:{saved(tmp_path / 'model', family_model(request.param[3:]))}", "cpu")
    parts = Loaded(family_model(request.param), word_tokenizer(), 16, DatasetSpec("python"))
    return make_target(request.param, parts, "cpu")


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
def test_a_pass_resumed_on_the_stream_of_another_gives_its_logits(target: TargetModel) -> None:
    tokens, calls = TOKENS % target.vocab_size, []
    with kept_streams(target, [0, 1]) as streams:
        original = target.logits(tokens)
    handle = target.model.get_submodule(target.mlps[0].write).register_forward_hook(lambda *_: calls.append(0))
    with resumed(target, 1, streams[1]):
        assert torch.equal(target.logits(tokens), original)
    assert not calls, "block 0 was computed"
    for layer, begun in streams.items():
        with resumed(target, layer, begun), patched(target, {layer: lambda x, y: torch.ones_like(y)}):
            changed = target.logits(tokens)
        with patched(target, {layer: lambda x, y: torch.ones_like(y)}):
            assert torch.equal(target.logits(tokens), changed)
    calls.clear()
    assert torch.equal(target.logits(tokens), original) and calls
    handle.remove()


def test_what_runs_twice_in_a_block_is_computed_again(small_target: TargetModel) -> None:
    """As a dropout after attention and after the MLP, which gives another value each time."""
    block, scale = small_target.model.h[0], torch.nn.Tanh()
    block.scale = scale
    block.forward = lambda h: (
        (between := h + scale(block.attn(block.rms_1(h)))) + scale(block.mlp(block.rms_2(between)))
    )
    tokens = torch.arange(12).view(2, 6)
    with torch.inference_mode(), kept_streams(small_target, [0]) as streams:
        original = small_target.logits(tokens)
        assert scale not in streams[0].ran and block.attn in streams[0].ran
        with resumed(small_target, 0, streams[0]):
            assert torch.equal(small_target.logits(tokens), original)


@torch.inference_mode()
def test_an_mlp_read_at_first_positions_alone_gives_the_same_there(target: TargetModel) -> None:
    tokens = TOKENS % target.vocab_size
    wholes, firsts = [], []
    with patched(target, everything(target, lambda x, y: wholes.append(y) or torch.ones_like(x))):
        expected = target.logits(tokens)
    with patched(target, everything(target, lambda x, y: firsts.append(y) or torch.ones_like(x)), first_only=True):
        torch.testing.assert_close(target.logits(tokens), expected)
    for whole, first in zip(wholes, firsts):
        torch.testing.assert_close(first[:, :1], whole[:, :1])


@torch.inference_mode()
def test_captured_input_gives_captured_output(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_BF16", "off")
    found = capture(target, TOKENS % target.vocab_size, [0, 1])
    assert found.inputs.shape == found.outputs.shape == (2, 2, 10, 16)
    for layer in (0, 1):
        torch.testing.assert_close(target.mlp(layer, found.inputs[layer]), found.outputs[layer])


@torch.inference_mode()
def test_what_a_function_is_given_stays_as_it_was(target: TargetModel) -> None:
    """Falcon's blocks add attention to the MLP's output in place, OPT's hand over positions as rows."""
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: int):
        return lambda x, y: (kept.__setitem__(layer, (x, y)), y)[1]

    with patched(target, {layer: keep(layer) for layer in (0, 1)}):
        target.logits(TOKENS % target.vocab_size)
    for layer, (x, y) in kept.items():
        assert x.shape == y.shape == (2, 10, 16)
        torch.testing.assert_close(target.mlp(layer, x), y)


@torch.inference_mode()
def test_a_zeroed_mlp_takes_its_output_from_the_stream(target: TargetModel, request: pytest.FixtureRequest) -> None:
    """Or what a norm or factor behind it makes of that: then TransformerLens' hook holds something else."""
    family = request.node.callspec.params["target"].removeprefix("tl:")
    for layer, (_, y, _, added) in enumerate(written(target)):
        plain = family not in BEHIND_A_NORM_OR_FACTOR
        assert torch.allclose(added, y, atol=1e-5) == plain
        if plain:
            assert same_site(target, f"blocks.{layer}.hook_mlp_out") is None
        else:
            with pytest.raises(ValueError, match="holds what comes behind a norm or factor"):
                same_site(target, f"blocks.{layer}.hook_mlp_out")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "granite", "gpt2", "neox_parallel"])
@torch.inference_mode()
def test_a_hook_counts_as_ours_where_transformer_lens_holds_our_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("NN_BF16", "off")
    target = load_target(f"tl:{saved(tmp_path / 'model', family_model(family))}", "cpu")
    target.model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    found, attention = (capture(view, TOKENS, [1]) for view in (target, at_site(target, "attn_out")))
    x, y, attn = found.inputs[0], found.outputs[0], attention.outputs[0]
    _, cache = target.model.run_with_cache(TOKENS)
    for name, own in {
        "mlp.hook_in": x, "ln2.hook_out": x, "ln2.hook_normalized": x, "mlp.hook_out": y, "hook_mlp_out": y,
        "attn.hook_out": attn, "hook_attn_out": attn,
    }.items():  # fmt: skip
        hook = f"blocks.1.{name}"
        if name in ("hook_mlp_out", "hook_attn_out") and family in BEHIND_A_NORM_OR_FACTOR:
            assert not torch.allclose(cache[hook], own, atol=0.01)
            with pytest.raises(ValueError, match=f"^'{hook}' of .* holds what comes behind a norm or factor[^\n]*$"):
                same_site(target, hook)
        elif name == "ln2.hook_normalized":
            scale = same_site(target, hook)
            torch.testing.assert_close(scale.gain * cache[hook] + scale.bias, own, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(cache[hook], own, atol=0.01)
            theirs = transcoders([1], Relu(0.0), skip=True)[0]
            y_hat = fitted(theirs, [hook], target)(own[0]).y_hat
            torch.testing.assert_close(y_hat, theirs(cache[hook][0]).y_hat, atol=1e-3, rtol=1e-3)
        else:
            assert torch.equal(cache[hook], own) and same_site(target, hook) is None
    with pytest.raises(ValueError, match="is of layer 2"):
        same_site(target, "blocks.2.hook_mlp_out")
    with pytest.raises(ValueError, match="name the layer"):
        same_site(target, "ln2.hook_normalized")
    for place, site in (("hook_resid_post", "resid"), ("hook_resid_pre", "resid")):
        own = capture(at_site(target, site), TOKENS, [0]).outputs[0]
        hook = f"blocks.{0 if place == 'hook_resid_post' else 1}.{place}"
        torch.testing.assert_close(cache[hook], own)
        assert same_site(target, hook) is None
    with pytest.raises(ValueError, match="^'blocks.1.hook_mlp_in' is no place that the project reads or writes"):
        same_site(target, "blocks.1.hook_mlp_in")


def block_with_another_input(block: nn.Module) -> None:
    block.forward = lambda h: h + block.attn(block.rms_1(h)) + block.mlp(block.rms_2(h) + h)


def block_that_multiplies(block: nn.Module) -> None:
    block.forward = lambda h: h + block.attn(block.rms_1(h)) * (1 + block.mlp(block.rms_2(h)))


def mlp_with_a_memory(block: nn.Module) -> None:
    own, calls = block.mlp.forward, []
    block.mlp.forward = lambda x: own(x) * (calls.append(1) or len(calls))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (block_with_another_input, "read the output of h.1.rms_2 alone"),
        (mlp_with_a_memory, "write a function of what it reads"),
        (block_that_multiplies, "add what it writes to the residual stream"),
    ],
)
def test_a_block_that_uses_its_mlp_otherwise_is_refused(small_target: TargetModel, break_it, message: str) -> None:
    break_it(small_target.model.h[1])
    with pytest.raises(ValueError, match=f"^h.1.mlp does not {message}: this block's layout is not supported$"):
        make_target("broken", Loaded(small_target.model, word_tokenizer(), 16, DatasetSpec("python")), "cpu")


@pytest.mark.parametrize(
    ("runs", "says"), [(2, "runs its 2 blocks more than once each"), (0.5, "ran 1 of its 2 blocks")]
)
def test_a_model_that_does_not_run_its_blocks_once_each_is_refused(
    small_target: TargetModel, runs: float, says: str
) -> None:
    model = small_target.model

    def forward(tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        h = model.wte(tokens)
        for block in (*model.h, *model.h) if runs == 2 else model.h[:1]:
            h = block(h)
        return model.lm_head(model.ln_f(h)), None

    model.forward = forward
    with pytest.raises(ValueError, match=f"^the model {says}[^\n]*: its layout is not supported$"):
        make_target("looped", Loaded(model, word_tokenizer(), 16, DatasetSpec("python")), "cpu")


def test_two_weights_exchanged_change_the_fingerprint_and_threads_do_not(small_target: TargetModel) -> None:
    model, weight = small_target.model, small_target.model.h[1].mlp.c_fc.weight
    before, threads = weights_fingerprint(model), torch.get_num_threads()
    assert before == small_target.fingerprint
    torch.set_num_threads(threads + 1)
    assert weights_fingerprint(model) == before
    torch.set_num_threads(threads)
    with torch.no_grad():
        weight[-1, -1], weight[-1, -2] = weight[-1, -2].item(), weight[-1, -1].item()
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(model.bfloat16()) not in (before, weights_fingerprint(model.half()))


@torch.inference_mode()
def test_all_neurons_together_have_the_mlps_weights(target: TargetModel, request: pytest.FixtureRequest) -> None:
    """Two vectors each, three of a gated MLP; what chooses them are all matrices but the last."""
    neurons = NeuronsReplacement(target, [0], 4)
    (group,) = neurons.part_groups([0])
    *inner, last = (target.model.get_submodule(path).weight.numel() for path in mlp_matrices(target, 0))
    assert group.n_parts * group.part_parameters == sum(inner) + last == writer_parameters(target, 0)
    assert group.part_parameters in (2 * target.d_model, 3 * target.d_model)
    assert (
        last == target.d_mlp * target.d_model
        and sum(inner) <= neurons.gate_parameters([0]) <= sum(inner) + 2 * target.d_mlp
    )
    if "llama" in request.node.callspec.id and "simple" not in request.node.callspec.id:
        assert group.part_parameters == 3 * target.d_model


def test_the_mlp_ends_with_its_down_projection(target: TargetModel) -> None:
    x = torch.randn(3, target.d_model, generator=torch.Generator().manual_seed(0))
    h, down = target.hidden(1, x), target.model.get_submodule(target.mlps[1].down)
    assert h.shape == (3, target.d_mlp) and target.down_weight(1).shape == (target.d_model, target.d_mlp)
    bias = 0 if down.bias is None else down.bias
    torch.testing.assert_close(h @ target.down_weight(1).T + bias, target.mlp(1, x))


@pytest.mark.parametrize("site", ["resid", "attn_out"])
@torch.inference_mode()
def test_another_site_is_captured_and_patched_where_it_says(target: TargetModel, site, monkeypatch) -> None:
    monkeypatch.setenv("NN_BF16", "off")
    tokens = TOKENS % target.vocab_size
    view, original = at_site(target, site), target.logits(tokens)
    block = target.model.get_submodule(target.mlps[1].read.rpartition(".")[0])
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


@pytest.mark.parametrize("prefix", ["hf:", "tl:"])
@torch.inference_mode()
def test_a_model_loads_by_name_with_its_tokenizer(tmp_path: Path, prefix: str) -> None:
    model = family_model("llama")
    target = load_target(f"{prefix}{saved(tmp_path / 'model', model)}", "cpu")
    assert (target.n_layers, target.d_model, target.d_mlp, target.vocab_size) == (2, 16, 24, 62)
    torch.testing.assert_close(target.logits(TOKENS), model(TOKENS).logits)
    assert target.tokenizer("w0 w3")["input_ids"] == [2, 5]
    weights = [target.model.get_submodule(path).weight.shape for path in mlp_matrices(target, 0)]
    assert weights == [(24, 16), (24, 16), (16, 24)]


@pytest.mark.parametrize("prefix", ["hf:", "tl:"])
def test_a_context_is_no_longer_than_the_model_has_positions(tmp_path: Path, prefix: str) -> None:
    for family, context in (("gpt2", 32), ("llama", 256)):
        target = load_target(f"{prefix}{saved(tmp_path / family, family_model(family))}", "cpu")
        assert target.context == context
        target.logits(torch.zeros(1, target.context, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "repository", "family", "context", "dataset"),
    [
        ("gpt2", "openai-community/gpt2", "gpt2", 256, "Skylion007/openwebtext"),
        ("simplestories", "SimpleStories/SimpleStories-35M", "llama", 512, "SimpleStories/SimpleStories"),
    ],
)
@torch.inference_mode()
def test_hub_targets_load_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str, family: str, context: int, dataset: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, revision, model = tmp_path / f"models--{repository.replace('/', '--')}", "0" * 40, family_model(family)
    saved(folder / "snapshots" / revision, model)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    target = load_target(name, "cpu")
    assert torch.equal(target.logits(TOKENS), model(TOKENS).logits)
    assert (target.name, target.context, target.data.path) == (name, context, dataset)
    assert target.tokenizer("w0 w3")["input_ids"] == [2, 5]


class WandbFile(NamedTuple):
    """A file of a W&B run, as its client lists it."""

    name: str
    content: bytes

    def download(self, root: str) -> None:
        Path(root).mkdir(exist_ok=True)
        (Path(root) / self.name).write_bytes(self.content)


def wandb_run(model: nn.Module, suffix: str, tokenizer: bool) -> list[WandbFile]:
    """What such a run holds: two configurations, weights of several steps, perhaps a tokenizer; a .pt may be compiled."""
    config = dataclasses.asdict(model.config) | {
        "model_type": "LlamaSimpleMLP", "mlp_bias": False, "attn_bias": False, "n_ctx": 16, "flash_attention": True,
        "use_grouped_query_attention": True, "rotary_dim": 8, "rotary_adjacent_pairs": False,
    }  # fmt: skip
    buffer, state = io.BytesIO(), model.state_dict()
    torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, buffer)
    untied = {key: value for key, value in state.items() if key != "lm_head.weight"}
    settings = {"train_dataset_config": {"hf_tokenizer_path": "EleutherAI/gpt-neox-20b", "n_ctx": 513}}
    files = {
        "final_config.yaml": yaml.safe_dump(settings).encode(), "model_config.yaml": yaml.safe_dump(config).encode(),
        f"model_step_900.{suffix}": b"an older step", "output.log": b"not needed",
        f"model_step_1000.{suffix}": buffer.getvalue() if suffix == "pt" else save(untied),
    }  # fmt: skip
    files |= {"tokenizer.json": word_tokenizer().backend_tokenizer.to_str().encode()} if tokenizer else {}
    return [WandbFile(name, content) for name, content in files.items()]


@pytest.mark.parametrize(
    ("name", "run_id", "suffix", "data"),
    [
        ("pile", "t-9d2b8f02", "safetensors", "danbraunai/pile-uncopyrighted-tok-shuffled"),
        ("pile-32d1bb3b", "t-32d1bb3b", "pt", "danbraunai/pile-uncopyrighted-tok"),
    ],
)
@pytest.mark.parametrize("tokenizer", [True, False])
@torch.inference_mode()
def test_pile_targets_are_fetched_once_from_the_files_of_their_wandb_runs(
    small_target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: bool, name: str, run_id: str,
    suffix: str, data: str,
) -> None:  # fmt: skip
    files, asked = wandb_run(small_target.model, suffix, tokenizer), []
    run = SimpleNamespace(files=lambda: files)
    api = SimpleNamespace(run=lambda path: (asked.append(path), run)[1])
    monkeypatch.setattr("logs._wandb_api", lambda reference: api)
    monkeypatch.setattr("target_loaders._hub_tokenizer", lambda name: (asked.append(name), word_tokenizer())[1])
    monkeypatch.setenv("NN_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        target = load_target(name, "cpu")
    assert torch.equal(target.logits(TOKENS), small_target.logits(TOKENS))
    assert asked == [f"goodfire/spd/{run_id}"] + ([] if tokenizer else 2 * ["EleutherAI/gpt-neox-20b"])
    assert target.data == DatasetSpec(data, "input_ids", True, "train", "val")
    assert target.tokenizer("w0 w3")["input_ids"] == [2, 5] and target.context == 512
    assert not list(tmp_path.rglob("output.log")) and not list(tmp_path.rglob("*_900.*"))  # nor an older step


def test_blocks_of_an_unknown_layout_are_refused_in_one_line(tmp_path: Path) -> None:
    tokenizer, data = word_tokenizer(), DatasetSpec("python")
    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=62, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match=r"^MambaForCausalLM has no stack of blocks with an MLP after a norm[^\n]*$"):
        make_target("mamba", Loaded(mamba, tokenizer, 16, data), "cpu")
    mixtral = tf.MixtralForCausalLM(tf.MixtralConfig(**GATED, num_local_experts=2))
    with pytest.raises(ValueError, match=r"^[^\n]*down projection cannot be told$"):
        make_target("mixtral", Loaded(mixtral, tokenizer, 16, data), "cpu")
    olmo2 = tf.Olmo2ForCausalLM(tf.Olmo2Config(**GATED))
    with pytest.raises(ValueError, match=r"^[^\n]*layers.0.mlp does not read the output [^\n]* not supported$"):
        make_target("olmo2", Loaded(olmo2, tokenizer, 16, data), "cpu")
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=62, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(
        ValueError, match=r"^[^\n]*h.0.mlp does not read the output of [^\n]* alone: [^\n]* not supported$"
    ):
        make_target("bloom", Loaded(bloom, tokenizer, 16, data), "cpu")  # its module is given the stream too
    late = tf.OPTForCausalLM(tf.OPTConfig(**FAMILIES["opt"][1], do_layer_norm_before=False))
    for name, model in {"opt": family_model("opt"), "late": late, "bloom": bloom}.items():
        prefix = "hf:" if name == "late" else "tl:"  # the bridge runs no mlp of OPT's
        with pytest.raises(ValueError, match=r"^[^\n]*this block's layout is not supported$"):
            load_target(f"{prefix}{saved(tmp_path / name, model)}", "cpu")


def test_bad_names_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="unknown target 'nothing'.*tiny"):
        load_target("nothing", "cpu")
    for device in ("banana", "cpu:3", "cuda:first", ""):
        with pytest.raises(ValueError, match=f"^unknown device '{device}': use cpu, cuda or cuda:NUMBER$"):
            load_target("tiny", device)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device.*--device cpu"):
            load_target("tiny", "cuda")


def test_no_network_points_to_the_embedded_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NN_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--target tiny"):
        load_target("hf:no-such-organisation/no-such-model", "cpu")


def test_bf16_is_for_devices_that_multiply_it_fast_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("NN_BF16", raising=False)
    for kind in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, kind, lambda: False)
    assert bf16_is_fast(cuda) and not bf16_is_fast(cpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert bf16_is_fast(cpu)
    for word, answer in (("on", True), ("off", False)):
        monkeypatch.setenv("NN_BF16", word)
        assert bf16_is_fast(cpu) == bf16_is_fast(cuda) == answer
    monkeypatch.setenv("NN_BF16", "yes")
    with pytest.raises(ValueError, match="^NN_BF16 is 'yes': set it to on or off"):
        bf16_is_fast(cpu)


def test_what_is_captured_is_bf16_where_that_is_fast_and_float32_elsewhere(small_target, monkeypatch) -> None:
    tokens = torch.arange(10)[None]
    monkeypatch.setenv("NN_BF16", "on")
    assert capture(small_target, tokens, [0, 1]).outputs.dtype == torch.bfloat16
    monkeypatch.setenv("NN_BF16", "off")
    assert capture(small_target, tokens, [0, 1]).outputs.dtype == torch.float32


def test_a_job_of_several_processes_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^2 processes were started.*without torchrun$"):
        load_target("tiny", "cpu")


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
