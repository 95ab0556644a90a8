"""Theorems about the primary target's architecture."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file

from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, config_from_yaml, initialise, load_target_run
from losses import cross_entropy


def small_llama() -> LlamaSimpleMLP:
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(32, 64, 2, 4, 32, 64, n_key_value_heads=2))
    initialise(model, torch.Generator().manual_seed(0))
    return model


def test_it_is_transformers_llama_with_another_mlp() -> None:
    """Attention, norms and RoPE agree with `transformers`' Llama when its MLP is given ours."""
    ours = small_llama()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    names = {"rms_1": "input_layernorm", "rms_2": "post_attention_layernorm", "attn": "self_attn"}
    state = {
        "model.embed_tokens.weight": ours.wte.weight,
        "model.norm.weight": ours.ln_f.weight,
        "lm_head.weight": ours.wte.weight,
    }
    for key, value in ours.state_dict().items():
        if key.startswith("h.") and ".mlp." not in key:
            for old, new in names.items():
                key = key.replace(f".{old}.", f".{new}.")
            state[key.replace("h.", "model.layers.", 1)] = value
    theirs.load_state_dict(state, strict=False)
    for block, layer in zip(ours.h, theirs.model.layers):
        layer.mlp = block.mlp
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=1e-4)


def test_the_future_is_not_seen_and_the_loss_is_cross_entropy() -> None:
    model = small_llama()
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 10:] = 0
    assert torch.equal(model(tokens)[0][:, :10], model(changed)[0][:, :10])
    logits, loss = model(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, cross_entropy(model(tokens)[0], tokens).mean())


def test_state_dict_names_are_those_of_the_runs() -> None:
    inner = ["rms_1", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "rms_2", "mlp.c_fc", "mlp.down_proj"]
    expected = ["wte", *(f"h.{i}.{name}" for i in range(2) for name in inner), "ln_f", "lm_head"]
    assert set(small_llama().state_dict()) == {f"{name}.weight" for name in expected}


CONFIG = {
    "model_type": "LlamaSimpleMLP", "block_size": 32, "vocab_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32,
    "n_intermediate": 64, "mlp_bias": False, "attn_bias": False, "n_ctx": 32, "n_key_value_heads": 2, "rotary_dim": 8,
    "rotary_adjacent_pairs": False, "use_grouped_query_attention": True, "rms_norm_eps": 1e-6, "flash_attention": True,
}  # fmt: skip


def write_run(folder: Path, config: dict, state: dict, step: int = 1000) -> None:
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    torch.save(state, folder / f"model_step_{step}.pt")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_a_run_directory_loads_its_latest_step(tmp_path: Path, prefix: str) -> None:
    model = small_llama()
    (tmp_path / "model_config.yaml").write_text("")
    with pytest.raises(ValueError, match="not a training run"):
        load_target_run(tmp_path)
    write_run(tmp_path, CONFIG, {"wte.weight": torch.zeros(1)}, 900)
    write_run(tmp_path, CONFIG, {f"{prefix}{k}": v for k, v in model.state_dict().items()})
    tokens = torch.arange(10)[None]
    assert torch.equal(load_target_run(tmp_path)(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_a_run_of_safetensors_has_no_head_of_its_own(tmp_path: Path, prefix: str) -> None:
    """That of the highest step is read whatever its kind, and before a .pt of the same step."""
    model, other, tokens = small_llama(), small_llama(), torch.arange(10)[None]
    with torch.no_grad():
        other.wte.weight.mul_(2)
    write_run(tmp_path, CONFIG, other.state_dict(), 900)
    untied = {f"{prefix}{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(untied, tmp_path / "model_step_1000.safetensors")
    assert torch.equal(load_target_run(tmp_path)(tokens)[0], model(tokens)[0])
    write_run(tmp_path, CONFIG, other.state_dict(), 1000)
    assert torch.equal(load_target_run(tmp_path)(tokens)[0], model(tokens)[0])
    write_run(tmp_path, CONFIG, other.state_dict(), 1001)
    assert torch.equal(load_target_run(tmp_path)(tokens)[0], other(tokens)[0])
    save_file(untied | {f"{prefix}extra": torch.zeros(1)}, tmp_path / "model_step_2000.safetensors")
    with pytest.raises(ValueError, match="^[^\n]*model_step_2000.safetensors: tensor 'extra' is missing, extra[^\n]*$"):
        load_target_run(tmp_path)
    (tmp_path / "model_step_2000.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="^[^\n]*model_step_2000.safetensors is truncated[^\n]*$"):
        load_target_run(tmp_path)


def test_an_absent_key_has_the_formats_default(tmp_path: Path) -> None:
    required = ("vocab_size", "n_layer", "n_head", "n_embd", "n_intermediate", "n_key_value_heads")
    for length in ("block_size", "n_ctx"):
        brief = {key: CONFIG[key] for key in (*required, length)}
        assert config_from_yaml(yaml.safe_dump(brief)) == small_llama().config
    alone = {key: CONFIG[key] for key in required if key != "n_key_value_heads"} | {"n_ctx": 32}
    assert config_from_yaml(yaml.safe_dump(alone | {"use_grouped_query_attention": False})).n_key_value_heads == 4


WRONG_CONFIGS = {
    "rotary_adjacent_pairs: true": "rotary_adjacent_pairs is True: only False is known here",
    "rotary_dim: 4": "rotary_dim is 4: only a whole head, 8, is known here",
    "rotary_dim: null": "rotary_dim is None: only a whole head",
    "model_type: LlamaModel": "model_type is 'LlamaModel': only 'LlamaSimpleMLP' is known here",
    "mlp_bias: true": "mlp_bias is True",
    "attn_bias: true": "attn_bias is True",
    "rope_scaling: {factor: 2}": "unknown key 'rope_scaling'",
    "n_head: 5": "n_embd 32, n_head 5 and n_key_value_heads 2 do not fit each other",
    "n_key_value_heads: 3": "n_head 4 and n_key_value_heads 3 do not fit",
    "n_layer: two": "n_layer is 'two', not a positive whole number",
    "n_ctx: 0": "n_ctx is 0, not a positive whole number",
    "rotary_base: -1": "rotary_base is -1, not a positive number",
    "rms_norm_eps: null": "rms_norm_eps is None, not a positive number",
    "n_layer: 3": "tensor 'h.2.attn.k_proj.weight' is missing, extra or misshapen",
    "n_intermediate: 65": "tensor 'h.0.mlp.c_fc.weight' is missing, extra or misshapen",
}


@pytest.mark.parametrize("line", WRONG_CONFIGS)
def test_a_configuration_of_another_function_is_refused_by_name(tmp_path: Path, line: str) -> None:
    write_run(tmp_path, CONFIG | yaml.safe_load(line), small_llama().state_dict())
    with pytest.raises(ValueError, match=f"^[^\n]*{WRONG_CONFIGS[line]}[^\n]*$"):
        load_target_run(tmp_path)


def test_damaged_runs_are_refused_in_one_line(tmp_path: Path) -> None:
    state = small_llama().state_dict()
    for text, message in (
        ("{", "no YAML"),
        ("- 1", "holds a list"),
        ("", "holds a NoneType"),
        ("a: \xff\x00", "no YAML"),
    ):
        write_run(tmp_path, CONFIG, state)
        (tmp_path / "model_config.yaml").write_text(text, encoding="latin1")
        with pytest.raises(ValueError, match=f"^model_config.yaml [^\n]*{message}[^\n]*$"):
            load_target_run(tmp_path)
    without = {key: value for key, value in CONFIG.items() if key not in ("n_ctx", "block_size")}
    write_run(tmp_path, without, state)
    with pytest.raises(ValueError, match="^model_config.yaml has neither n_ctx nor block_size[^\n]*$"):
        load_target_run(tmp_path)
    nan = {key: value.clone() for key, value in state.items()} | {"ln_f.weight": torch.full((32,), torch.nan)}
    untied = state | {"lm_head.weight": state["wte.weight"] + 1}
    for wrong, message in (
        (nan, "'ln_f.weight' holds NaN"), (untied, "lm_head.weight differs"), ({"model": state}, "other than named tensors"),
        ({"extra": torch.zeros(1)} | state, "'extra' is missing, extra or misshapen"),
    ):  # fmt: skip
        write_run(tmp_path, CONFIG, wrong)
        with pytest.raises(ValueError, match=f"^[^\n]*model_step_1000.pt[^\n]*{message}[^\n]*$"):
            load_target_run(tmp_path)
    whole = (tmp_path / "model_step_1000.pt").read_bytes()
    for length in (0, 10, len(whole) // 2):
        (tmp_path / "model_step_1000.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="^[^\n]*model_step_1000.pt is truncated[^\n]*$"):
            load_target_run(tmp_path)
