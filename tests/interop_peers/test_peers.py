"""Our exports through the other libraries' own loaders, and what they save through ours.

Each test is skipped where its library is missing, unless NN_PEERS says that all must be there: `bash .ci/interop` makes an
environment with all (requirements-interop.txt) and runs them so.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from interop_cases import GATED, RULES, B, D, F, N, assert_same, clt, exported, imported, inputs, ours, sae, transcoder
from small import WORDS, word_tokenizer

import interop
from checkpoints import load_checkpoint
from coder import Coder
from config import BatchTopK, JumpReLU, Relu, Rule, TopK

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its decoder on a CPU
THRESHOLDED = [RULES[0], *RULES[2:]]  # every rule but TopK


def peer(name: str) -> Any:
    return importlib.import_module(name) if "NN_PEERS" in os.environ else pytest.importorskip(name)


# -------------------------------------------------------------------------------------------------------------- SAELens

SAELENS_CASES = [(sae, rule) for rule in (*RULES, GATED)]
SAELENS_CASES += [(lambda rule: transcoder(rule, d_out=4), rule) for rule in THRESHOLDED]
SAELENS_CASES += [(lambda rule: transcoder(rule, skip=True), rule) for rule in THRESHOLDED]


@pytest.mark.parametrize(("make", "rule"), SAELENS_CASES)
def test_saelens_opens_ours_and_we_open_what_it_saves(
    tmp_path: Path, make: Callable[[Rule], Coder], rule: Rule
) -> None:
    sae_lens = peer("sae_lens")
    coder = make(rule)
    theirs = sae_lens.SAE.load_from_disk(exported("saelens", tmp_path, coder))
    x = inputs(coder)
    with torch.no_grad():
        assert_same((theirs.encode(x), theirs(x)), ours(coder))
    assert theirs.cfg.metadata.model_name == "org/model" and ".1." in theirs.cfg.metadata.hook_name
    theirs.save_model(tmp_path / "saved")
    assert_same(ours(imported("saelens", tmp_path / "saved", tmp_path / "back")), ours(coder))


def test_saelens_batch_topk_arrives_as_a_threshold(tmp_path: Path) -> None:
    sae_lens = peer("sae_lens")
    cfg = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=3, rescale_acts_by_decoder_norm=False)
    cfg.metadata = type(cfg.metadata)(model_name="gpt2", hook_name="blocks.1.hook_mlp_out")
    training = sae_lens.BatchTopKTrainingSAE(cfg)
    training.topk_threshold.fill_(0.4)
    training.save_inference_model(tmp_path / "saved")
    back = imported("saelens", tmp_path / "saved", tmp_path / "back")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "saved")
    with torch.no_grad():
        assert_same((theirs.encode(inputs(back)), theirs(inputs(back))), ours(back))
    assert isinstance(back.config.rule, JumpReLU) and back.config.site == "mlp_out"


def test_saelens_hooks_our_sae_into_a_model(tmp_path: Path) -> None:
    sae_lens = peer("sae_lens")
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=16, d_head=3, n_heads=2, d_vocab=20, act_fn="gelu", d_mlp=12, device="cpu"
    )
    model = sae_lens.HookedSAETransformer(config)
    coder = sae(BatchTopK(3))
    theirs = sae_lens.SAE.load_from_disk(exported("saelens", tmp_path, coder))
    tokens = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    _, clean = model.run_with_cache(tokens)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[theirs])
    x = clean[theirs.cfg.metadata.hook_name].flatten(0, 1)
    with torch.no_grad():
        expected = coder(x).y_hat
    reconstruction = cache[f"{theirs.cfg.metadata.hook_name}.hook_sae_output"].flatten(0, 1)
    torch.testing.assert_close(reconstruction, expected, rtol=1e-4, atol=1e-4)


def test_saelens_evaluates_our_sae_from_its_configuration_alone(tmp_path: Path) -> None:
    """The path its dashboards and SAEBench take: cfg.json names the hook, the context and what precedes a text."""
    sae_lens = peer("sae_lens")
    from datasets import Dataset
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoTokenizer

    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=256, d_head=3, n_heads=2, d_vocab=len(WORDS) + 2, act_fn="gelu", d_mlp=12,
        device="cpu", default_prepend_bos=False,
    )  # fmt: skip
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # TransformerLens reads tokenizers from folders
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    model = sae_lens.HookedSAETransformer(config, tokenizer=tokenizer)
    coder = sae(TopK(3))
    theirs = sae_lens.SAE.load_from_disk(exported("saelens", tmp_path, coder))
    text = Dataset.from_dict({"text": [" ".join(WORDS[i % 7 :: 2]) for i in range(200)]})
    store = sae_lens.ActivationsStore.from_sae(model, theirs, text, streaming=False)
    settings = EvalConfig(
        batch_size_prompts=2, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, compute_kl=True,
        compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
    )  # fmt: skip
    metrics, _ = run_evals(theirs, store, model, ActivationScaler(), settings)
    assert 0 < metrics["sparsity"]["l0"] <= 3
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0


# ------------------------------------------------------------------------------------------------------------- sparsify


@pytest.mark.parametrize("make", [sae, transcoder, lambda rule: transcoder(rule, skip=True)])
def test_sparsify_opens_ours_and_we_open_what_it_saves(tmp_path: Path, make: Callable[[Rule], Coder]) -> None:
    sparsify = peer("sparsify")
    coder = make(TopK(3))
    (name, theirs), *others = sparsify.SparseCoder.load_many(
        str(exported("sparsify", tmp_path, coder)), local=True
    ).items()
    assert not others
    with torch.no_grad():
        out = theirs(inputs(coder))
    acts = torch.zeros(B, F).scatter(1, out.latent_indices, out.latent_acts)
    assert_same((acts, out.sae_out), ours(coder))
    theirs.save_to_disk(tmp_path / "saved" / name)
    assert_same(ours(imported("sparsify", tmp_path / "saved" / name, tmp_path / "back")), ours(coder))


# -------------------------------------------------------------------------------------------------- dictionary_learning


@pytest.mark.parametrize("rule", RULES)
def test_dictionary_learning_opens_ours_and_we_open_what_it_saves(tmp_path: Path, rule: Rule) -> None:
    dictionary = peer("dictionary_learning.dictionary")
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    coder = sae(rule)
    folder = exported("dictionary_learning", tmp_path, coder) / "trainer_0"
    load: dict[type, Callable[[Path], Any]] = {
        Relu: lambda path: dictionary.AutoEncoder.from_pretrained(path, normalize_decoder=False),
        TopK: AutoEncoderTopK.from_pretrained,
        BatchTopK: BatchTopKSAE.from_pretrained,
        JumpReLU: dictionary.JumpReluAutoEncoder.from_pretrained,
    }
    theirs = load[type(rule)](folder / "ae.pt")
    x = inputs(coder)
    with torch.no_grad():
        assert_same((theirs.encode(x), theirs(x)), ours(coder))
    torch.save(theirs.state_dict(), folder / "ae.pt")
    assert_same(ours(imported("dictionary_learning", folder, tmp_path / "back")), ours(coder))


# ------------------------------------------------------------------------------------------------------- circuit-tracer


def circuit_tracer_transcoders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library's hub loader, with the folder standing in for the hub's snapshot."""
    hub = peer("circuit_tracer.utils.hf_utils")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_args, **_kw: str(folder))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"repo_id": "org/name", "scan": "org/name"}
    return hub.load_transcoders(config, torch.device("cpu"), torch.float32, lazy_decoder=False)


@pytest.mark.parametrize("rule", THRESHOLDED)
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_opens_our_transcoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Rule, skip: bool
) -> None:
    coders = [transcoder(rule, skip, layer) for layer in range(N)]
    theirs = circuit_tracer_transcoders(exported("circuit-tracer", tmp_path, *coders), monkeypatch)
    x = torch.stack([inputs(coder) for coder in coders])
    with torch.no_grad():
        acts = theirs.encode(x)
        y_hat = theirs.decode(acts, x)
    for i, coder in enumerate(coders):
        assert_same((acts[i], y_hat[i]), ours(coder))
    (tmp_path / "saved").mkdir()
    theirs.to_safetensors(str(tmp_path / "saved"))
    (tmp_path / "saved" / "config.yaml").write_text((tmp_path / "circuit-tracer" / "config.yaml").read_text())
    interop.main(["import", "circuit-tracer", str(tmp_path / "saved"), str(tmp_path / "back")])
    for i, coder in enumerate(coders):
        assert_same(ours(load_checkpoint(str(tmp_path / "back" / f"layer_{i}"), "cpu").coder), ours(coder))


@pytest.mark.parametrize("rule", THRESHOLDED)
def test_circuit_tracer_opens_our_clt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Rule) -> None:
    coder = clt(rule)
    folder = exported("circuit-tracer", tmp_path, coder)
    theirs = circuit_tracer_transcoders(folder, monkeypatch)
    with torch.no_grad():
        acts = theirs.encode(inputs(coder))
        assert_same((acts, theirs.decode(acts)), ours(coder))
    theirs.to_safetensors(str(tmp_path / "saved"))
    (tmp_path / "saved" / "config.yaml").write_text((folder / "config.yaml").read_text())
    assert_same(ours(imported("circuit-tracer", tmp_path / "saved", tmp_path / "back")), ours(coder))


@pytest.mark.parametrize("kind", ["transcoders", "skip transcoders", "clt"])
def test_circuit_tracer_builds_an_attribution_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Its nodes are our active latents (it zeroes position 0), and effects reach the logits."""
    circuit_tracer = peer("circuit_tracer")
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens import HookedTransformerConfig

    rule = BatchTopK(3)
    coders = [clt(rule)] if kind == "clt" else [transcoder(rule, kind != "transcoders", i) for i in range(N)]
    folder = exported("circuit-tracer", tmp_path, *coders)
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=N, d_model=D, n_ctx=16, d_head=3, n_heads=2, d_vocab=len(WORDS) + 2, act_fn="gelu", d_mlp=12,
        normalization_type="LN", device="cpu", model_name="small",
    )  # fmt: skip
    model = TransformerLensReplacementModel.from_config(
        config, circuit_tracer_transcoders(folder, monkeypatch), tokenizer=word_tokenizer()
    )
    graph = circuit_tracer.attribute("<eos> w1 w2 w3 w4", model, max_n_logits=3)
    n_logits, tokens = len(graph.logit_targets), len(graph.input_tokens)
    n_nodes = len(graph.selected_features) + N * tokens + tokens + n_logits
    assert graph.adjacency_matrix.shape == (n_nodes, n_nodes)
    assert graph.adjacency_matrix.isfinite().all() and graph.adjacency_matrix[-n_logits:].abs().sum() > 0
    features = graph.active_features
    layer, position, latent = features[0].tolist()
    with torch.no_grad():
        _, cache = model.run_with_cache(graph.input_tokens[None])
        x = torch.stack([cache[f"blocks.{i}.mlp.hook_in"][0] for i in range(N)])
        codes = [coders[0].encode_layer(i, x[i]) if kind == "clt" else coders[i].encode(x[i]) for i in range(N)]
    ours_active = {
        (i, row, col) for i, c in enumerate(codes) for row, col in zip(c.rows.tolist(), c.cols.tolist()) if row > 0
    }
    assert {tuple(feature) for feature in features.tolist()} == ours_active  # position 0 is zeroed there
    assert (layer, position, latent) in ours_active
