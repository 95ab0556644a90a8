"""Write the embedded model as a folder that `transformers` opens: the same weights as an Arcee model, under its names.

    python examples/hf_folder.py FOLDER

Arcee is Llama with an MLP that has no gate; with a GELU in it, it is the embedded LlamaSimpleMLP. The logits are compared.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.arcee import ArceeConfig, ArceeForCausalLM

from target_models import load_target

NAMES = {"rms_1": "input_layernorm", "rms_2": "post_attention_layernorm", "attn": "self_attn", "c_fc": "up_proj"}


def main(folder: Path) -> None:
    target = load_target("tiny", "cpu")
    c = target.model.config
    config = ArceeConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_intermediate, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_key_value_heads, max_position_embeddings=c.block_size,
        rms_norm_eps=c.rms_norm_eps, rope_theta=c.rotary_base, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=target.tokenizer.eos_token_id,
    )  # fmt: skip
    model = ArceeForCausalLM(config)
    renamed = {
        "wte.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "ln_f.weight": "model.norm.weight",
    }
    for name in target.model.state_dict().keys() - renamed.keys():
        parts = [NAMES.get(part, part) for part in name.split(".")]
        renamed[name] = ".".join(["model", "layers", *parts[1:]])
    model.load_state_dict({renamed[name]: value for name, value in target.model.state_dict().items()})
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=target.tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    written, tokens = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder)("import numpy as np\n"),
    )
    with torch.no_grad():
        ids = torch.tensor([tokens["input_ids"]])
        torch.testing.assert_close(written(ids).logits, target.logits(ids), atol=1e-3, rtol=1e-3)
    print(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
