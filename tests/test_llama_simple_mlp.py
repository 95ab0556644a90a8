"""Theorems about the primary target's architecture."""

from pathlib import Path

import pytest
import torch
import transformers

from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise, load_target_run
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


def test_a_run_directory_loads_its_latest_step(tmp_path: Path) -> None:
    model = small_llama()
    (tmp_path / "model_config.yaml").write_text(
        "model_type: LlamaSimpleMLP\nblock_size: 32\nvocab_size: 64\nn_layer: 2\nn_head: 4\nn_embd: 32\nn_intermediate: 64\n"
        "mlp_bias: false\nattn_bias: false\nn_ctx: 32\nn_key_value_heads: 2\n"
        "use_grouped_query_attention: true\nrms_norm_eps: 1.0e-6\n"
    )
    with pytest.raises(ValueError, match="not a training run"):
        load_target_run(tmp_path)
    torch.save({"wte.weight": torch.zeros(1)}, tmp_path / "model_step_900.pt")
    torch.save({f"_orig_mod.{k}": v for k, v in model.state_dict().items()}, tmp_path / "model_step_1000.pt")
    tokens = torch.arange(10)[None]
    assert torch.equal(load_target_run(tmp_path)(tokens)[0], model(tokens)[0])
