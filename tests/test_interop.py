"""x ↦ (activations, ŷ) is one function in our checkpoints and in the foreign files; bad files are refused."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from interop_cases import (
    GATED,
    RULES,
    B,
    D,
    F,
    N,
    assert_same,
    clt,
    exported,
    imported,
    inputs,
    ours,
    random_coder,
    sae,
    save,
    transcoder,
    upstream_folder,
    write_crosslayer_coding,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from torch import Tensor

import interop
from checkpoints import build_coder, load_checkpoint
from coder import Coder
from config import BatchTopK, EncoderConfig, JumpReLU, Relu, Rule, SAEConfig, TopK
from folding import build, fold
from foreign_files import Place
from foreign_formats import FORMATS, Dictionary
from sparse_ops import to_dense

# ----------------------------------------------------------------------------------------- the same function, both ways


@pytest.mark.parametrize("rule", [*RULES, GATED])
@pytest.mark.parametrize("make", [sae, transcoder, lambda rule: transcoder(rule, skip=True), clt])
def test_folding_the_scales_changes_neither_activations_nor_outputs(make: Callable[[Rule], Coder], rule: Rule) -> None:
    coder = make(rule)
    plain = build(coder.config, fold(coder))
    assert (plain.x_scale == 1).all() and (plain.y_scale == 1).all() and (coder.x_scale != 1).all()
    assert_same(ours(plain), ours(coder))


def act(rule: Rule, pre: Tensor, theta: Tensor | float = 0.0) -> Tensor:
    """An independent statement of the rules on dense pre-activations."""
    if isinstance(rule, TopK):
        top = pre.topk(rule.k)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    return torch.where(pre > theta, pre, 0.0).relu()


@pytest.mark.parametrize("rule", RULES)
def test_upstream_transcoder(tmp_path: Path, rule: Rule) -> None:
    coder = transcoder(rule, d_out=4)
    folder = exported("upstream", tmp_path, coder)
    t, x = torch.load(folder / "encoder.pt", weights_only=True), inputs(coder)
    theta = t["jumprelu.log_threshold"].exp() if "jumprelu.log_threshold" in t else 0.0
    a = act(rule, x @ t["W_enc"] + t["b_enc"], theta)
    assert_same((a, a @ t["W_dec"] + t["b_dec"]), ours(coder))
    back = imported("upstream", folder, tmp_path / "back", "--layer", "1")
    assert_same(ours(back), ours(coder))
    assert back.config.layers == (1,)


@pytest.mark.parametrize("rule", RULES)
def test_upstream_clt(tmp_path: Path, rule: Rule) -> None:
    coder = clt(rule)
    folder = exported("upstream", tmp_path, coder)
    t, x = torch.load(folder / "encoder.pt", weights_only=True), inputs(coder)
    thetas = [t[f"jumprelu_log_thresholds.{i}"].exp() if f"jumprelu_log_thresholds.{i}" in t else 0.0 for i in range(N)]
    a = [act(rule, x[i] @ t[f"W_enc.{i}"] + t[f"b_enc.{i}"], thetas[i]) for i in range(N)]
    y = [sum(a[i] @ t[f"W_dec.{i}"][j - i] for i in range(j + 1)) + t[f"b_dec.{j}"] for j in range(N)]
    assert_same((torch.stack(a), torch.stack(y)), ours(coder))
    assert_same(ours(imported("upstream", folder, tmp_path / "back")), ours(coder))


SAELENS_CASES = [(sae, rule) for rule in RULES] + [(make, rule) for rule in (RULES[0], *RULES[2:]) for make in (
    lambda rule: transcoder(rule, d_out=4), lambda rule: transcoder(rule, skip=True))]  # fmt: skip


@pytest.mark.parametrize(("make", "rule"), SAELENS_CASES)
def test_saelens(tmp_path: Path, make: Callable[[Rule], Coder], rule: Rule) -> None:
    coder = make(rule)
    folder = exported("saelens", tmp_path, coder)
    t, x = load_file(folder / "sae_weights.safetensors"), inputs(coder)
    cfg = json.loads((folder / "cfg.json").read_text())
    assert ("threshold" in t) == ("jumprelu" in cfg["architecture"]) == isinstance(rule, BatchTopK | JumpReLU)
    z = x - t["b_dec"] if cfg["apply_b_dec_to_input"] else x
    a = act(rule, z @ t["W_enc"] + t["b_enc"], t.get("threshold", 0.0))
    skip = x @ t["W_skip"].T if "W_skip" in t else 0.0
    assert_same((a, a @ t["W_dec"] + t["b_dec"] + skip), ours(coder))
    back = imported("saelens", folder, tmp_path / "back")
    assert_same(ours(back), ours(coder))
    assert type(back.config) is type(coder.config) and back.config.layers == coder.config.layers
    assert type(back.config.rule) is type(rule)
    assert load_checkpoint(str(tmp_path / "back"), "cpu").record.target == "org/model"


@pytest.mark.parametrize("centred", [True, False])
def test_saelens_gated(tmp_path: Path, centred: bool) -> None:
    """Also one whose encoder does not subtract b_dec from what it reads."""
    folder = exported("saelens", tmp_path, coder := sae(GATED))
    t, x = load_file(folder / "sae_weights.safetensors"), inputs(coder)
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == "gated" and cfg["apply_b_dec_to_input"]
    assert set(t) == {"W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"}
    (folder / "cfg.json").write_text(json.dumps(cfg | {"apply_b_dec_to_input": centred}))
    z = x - t["b_dec"] if centred else x
    a = (z @ t["W_enc"] + t["b_gate"] > 0) * (z @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    back = imported("saelens", folder, tmp_path / "back")
    assert_same((a, a @ t["W_dec"] + t["b_dec"]), ours(back))
    assert back.config == coder.config
    if centred:
        assert_same(ours(back), ours(coder))


def test_saelens_topk_that_ranks_by_decoder_norm(tmp_path: Path) -> None:
    folder = exported("saelens", tmp_path, sae(TopK(3)))
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg |= {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    back = imported("saelens", folder, tmp_path / "back")
    t, x = load_file(folder / "sae_weights.safetensors"), inputs(back)
    norm = t["W_dec"].norm(dim=1)
    a = act(TopK(3), (x @ t["W_enc"] + t["b_enc"]) * norm)
    assert_same(ours(back), (a, (a / norm) @ t["W_dec"] + t["b_dec"]))


@pytest.mark.parametrize("make", [sae, transcoder, lambda rule: transcoder(rule, skip=True)])
def test_sparsify(tmp_path: Path, make: Callable[[Rule], Coder]) -> None:
    coder = make(TopK(3))
    run = exported("sparsify", tmp_path, coder)
    folder = run / ("layers.1" if isinstance(coder.config, SAEConfig) else "layers.1.mlp")
    t, cfg, x = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text()), inputs(coder)
    pre = (x if cfg["transcode"] else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    top = pre.relu().topk(cfg["k"])
    y = torch.einsum("bk,bkd->bd", top.values, t["W_dec"][top.indices]) + t["b_dec"]
    y = y + x @ t["W_skip"].T if cfg["skip_connection"] else y
    assert_same((act(TopK(3), pre), y), ours(coder))
    back = imported("sparsify", run, tmp_path / "back")
    assert_same(ours(back), ours(coder))
    assert back.config == coder.config


def test_sparsify_derives_the_number_of_latents_when_it_says_zero(tmp_path: Path) -> None:
    coder = random_coder(SAEConfig(layer=2, site="mlp_out", d_in=D, d_dict=4 * D, rule=TopK(2)))
    folder = exported("sparsify", tmp_path, coder) / "layers.2.mlp"
    cfg = json.loads((folder / "cfg.json").read_text()) | {"num_latents": 0}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert imported("sparsify", folder, tmp_path / "back").config == coder.config


@pytest.mark.parametrize("rule", RULES)
def test_dictionary_learning(tmp_path: Path, rule: Rule) -> None:
    coder = sae(rule)
    run = exported("dictionary_learning", tmp_path, coder)
    t, x = torch.load(run / "trainer_0" / "ae.pt", weights_only=True), inputs(coder)
    if isinstance(rule, JumpReLU):
        a = act(rule, x @ t["W_enc"] + t["b_enc"], t["threshold"])
        y = a @ t["W_dec"] + t["b_dec"]
    else:
        bias = t["bias"] if isinstance(rule, Relu) else t["b_dec"]
        a = act(rule, (x - bias) @ t["encoder.weight"].T + t["encoder.bias"], t.get("threshold", 0.0))
        y = a @ t["decoder.weight"].T + bias
    assert_same((a, y), ours(coder))
    back = imported("dictionary_learning", run, tmp_path / "back")
    assert_same(ours(back), ours(coder))
    assert back.config == coder.config


@pytest.mark.parametrize("rule", [RULES[0], *RULES[2:]])
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_transcoders(tmp_path: Path, rule: Rule, skip: bool) -> None:
    coders = [transcoder(rule, skip, layer) for layer in range(N)]
    folder = exported("circuit-tracer", tmp_path, *coders)
    interop.main(["import", "circuit-tracer", str(folder), str(tmp_path / "back")])
    for i, coder in enumerate(coders):
        t, x = load_file(folder / f"layer_{i}.safetensors"), inputs(coder)
        a = act(rule, x @ t["W_enc"].T + t["b_enc"], t.get("activation_function.threshold", 0.0))
        assert_same((a, a @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0.0)), ours(coder))
        back = load_checkpoint(str(tmp_path / "back" / f"layer_{i}"), "cpu").coder
        assert_same(ours(back), ours(coder))
        assert back.config.layers == (i,)


@pytest.mark.parametrize("rule", [RULES[0], *RULES[2:]])
def test_circuit_tracer_clt(tmp_path: Path, rule: Rule) -> None:
    coder = clt(rule)
    folder = exported("circuit-tracer", tmp_path, coder)
    t = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    x, y = inputs(coder), torch.stack([t[f"b_dec_{j}"].expand(B, D) for j in range(N)])
    acts = [act(rule, x[i] @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"], t.get(f"threshold_{i}", 0.0)) for i in range(N)]
    for i, a in enumerate(acts):
        y[i:] += torch.einsum("bf,fjd->jbd", a, t[f"W_dec_{i}"])
    assert_same((torch.stack(acts), y), ours(coder))
    assert_same(ours(imported("circuit-tracer", folder, tmp_path / "back")), ours(coder))


@pytest.mark.parametrize("rule", [RULES[0], RULES[3]])
def test_crosslayer_coding(tmp_path: Path, rule: Rule) -> None:
    coder = clt(rule)
    folder = write_crosslayer_coding(tmp_path / "theirs", coder)
    assert_same(ours(imported("crosslayer-coding", folder, tmp_path / "back")), ours(coder))


def test_a_batch_topk_code_of_the_foreign_file_ignores_neighbours(tmp_path: Path) -> None:
    coder = transcoder(BatchTopK(3))
    back = imported("upstream", exported("upstream", tmp_path, coder), tmp_path / "back", "--layer", "0")
    x = inputs(coder)
    with torch.no_grad():
        torch.testing.assert_close(to_dense(back.encode(x[:1])), to_dense(back.encode(x))[:1])


# ----------------------------------------------------------------------------------------- upstream's own peculiarities


def test_upstream_device_is_overridden_and_b_enc_honoured(tmp_path: Path) -> None:
    back = imported("upstream", upstream_folder(tmp_path, device="cuda:3"), tmp_path / "back", "--layer", "0")
    assert {p.device.type for p in back.parameters()} == {"cpu"} and back.encoder.b_enc.abs().min() > 0
    assert_same(ours(back), ours(transcoder(TopK(3))))


def test_upstream_batch_topk_has_no_threshold_and_becomes_topk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = imported("upstream", upstream_folder(tmp_path, "batchtopk"), tmp_path / "back", "--layer", "0")
    assert back.config.rule == TopK(3) and "no threshold" in capsys.readouterr().out


def test_dictionary_learning_refuses_a_threshold_that_was_never_set(tmp_path: Path) -> None:
    folder = exported("dictionary_learning", tmp_path, sae(BatchTopK(3))) / "trainer_0"
    state = torch.load(folder / "ae.pt", weights_only=True) | {"threshold": torch.tensor(-1.0)}
    torch.save(state, folder / "ae.pt")
    with pytest.raises(ValueError, match="threshold is -1, never set"):
        imported("dictionary_learning", folder, tmp_path / "back")


@pytest.mark.parametrize("layer", ["3", -1, 1.5])
def test_dictionary_learning_refuses_a_layer_that_is_no_number_of_one(tmp_path: Path, layer: Any) -> None:
    folder = exported("dictionary_learning", tmp_path, sae(TopK(3))) / "trainer_0"
    blob = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"trainer": blob["trainer"] | {"layer": layer}}))
    with pytest.raises(ValueError, match="name it with --layer"):
        imported("dictionary_learning", folder, tmp_path / "back")
    assert imported("dictionary_learning", folder, tmp_path / "back", "--layer", "1").config.layer == 1


def test_dictionary_learning_refuses_no_active_latents(tmp_path: Path) -> None:
    folder = exported("dictionary_learning", tmp_path, sae(TopK(3))) / "trainer_0"
    torch.save(torch.load(folder / "ae.pt", weights_only=True) | {"k": torch.tensor(0)}, folder / "ae.pt")
    with pytest.raises(ValueError, match="k is 0, not a positive whole number"):
        imported("dictionary_learning", folder, tmp_path / "back")


# ------------------------------------------------------------------------------------------------------------ bad input

FILES: dict[str, tuple[Callable[[Path], Path], str, str]] = {  # format → folder with files, tensor file, configuration
    "upstream": (upstream_folder, "encoder.pt", "config.json"),
    "saelens": (lambda p: exported("saelens", p, sae(RULES[3])), "sae_weights.safetensors", "cfg.json"),
    "sparsify": (lambda p: exported("sparsify", p, sae(TopK(3))) / "layers.1", "sae.safetensors", "cfg.json"),
    "dictionary_learning": (
        lambda p: exported("dictionary_learning", p, sae(TopK(3))) / "trainer_0", "ae.pt", "config.json"),
    "circuit-tracer": (
        lambda p: exported("circuit-tracer", p, transcoder(RULES[3], layer=0)), "layer_0.safetensors", "config.yaml"),
    "crosslayer-coding": (
        lambda p: write_crosslayer_coding(p / "cc", clt(RULES[3])), "clt_checkpoint_latest.safetensors", "cfg.json"),
}  # fmt: skip


class Payload:
    """Unpickling it would leave a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def put(path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def spoil(how: str, path: Path) -> None:
    if how in ("truncated", "pickle"):
        path.write_bytes(path.read_bytes()[:-20] if how == "truncated" else pickle.dumps({"W_enc": Payload()}))
        return
    if how == "object":
        torch.save({"W_enc": Payload()}, path)
        return
    if how == "empty":
        path.write_bytes(b"")
        return
    if how == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("README", "a zip file, as torch's are, that torch did not write")
        return
    if how == "numbered":
        torch.save({0: torch.zeros(1)}, path)
        return
    state = tensors_of(path)
    name = next(key for key in state if key.endswith(("W_enc", "encoder.weight", "encoders.0.weight")))
    match how:
        case "extra":
            state["b_gate"] = torch.zeros(F)
        case "missing":
            del state[name]
        case "shape":
            state[name] = state[name][:, 1:].contiguous()
        case "nan":
            state[name][0, 0] = torch.nan
    put(path, state)


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "archive", "pickle", "object", "numbered", "extra", "missing", "shape", "nan"]
)
@pytest.mark.parametrize("format", FILES)
def test_bad_tensors_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, tensors, _ = FILES[format]
    folder = make(tmp_path / "made")
    spoil(how, folder / tensors)
    with pytest.raises(ValueError) as refusal:
        interop.main(["import", format, str(folder), str(tmp_path / "dest"), "--layer", "0"])
    assert "\n" not in str(refusal.value) and tensors in str(refusal.value)
    assert not (tmp_path / "dest").exists() and not Path("unpickled").exists()


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("text", ["{", "[1]", "{}", "\x00"])
def test_bad_configurations_are_refused_in_one_line(tmp_path: Path, format: str, text: str) -> None:
    make, _, config = FILES[format]
    folder = make(tmp_path / "made")
    (folder / config).write_text(text)
    with pytest.raises(ValueError) as refusal:
        interop.main(["import", format, str(folder), str(tmp_path / "dest"), "--layer", "0"])
    assert "\n" not in str(refusal.value) and config in str(refusal.value) and not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("format", "changes", "says"),
    [
        ("upstream", {"theta": 1.0}, "unknown key 'theta'"),
        ("upstream", {"input_unit_norm": True}, "oracle"),
        ("upstream", {"pre_enc_bias": True}, "pre_enc_bias"),
        ("upstream", {"encoder_type": "gated"}, "use one of"),
        ("upstream", {"top_k": F + 1}, "exceeds d_dict"),
        ("upstream", {"top_k": "3"}, "not a positive whole number"),
        ("upstream", {"layers": "[2, 1]"}, "not ascending numbers"),
        ("saelens", {"architecture": "temporal"}, "use one of"),
        ("saelens", {"normalize_activations": "layer_norm"}, "fold its normalisation"),
        ("saelens", {"metadata": None}, "SAELens 6"),
        ("saelens", {"metadata": {"hook_name": "blocks.0.attn.hook_z"}}, "--site"),
        ("saelens", {"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "embedding"),
        ("sparsify", {"activation": "groupmax"}, "only topk"),
        ("sparsify", {"skip_connection": True}, "rebuilds nothing"),
        ("circuit-tracer", {"feature_input_hook": "hook_resid_mid"}, "MLP's own input"),
        ("circuit-tracer", {"activation": "topk"}, "relu and jump_relu"),
        ("crosslayer-coding", {"activation_fn": "batchtopk"}, "spans all layers"),
        ("crosslayer-coding", {"decoder_tying": "per_source"}, "untied"),
        ("crosslayer-coding", {"normalization_method": "mean_std"}, "not in the checkpoint"),
    ],
)
def test_what_a_file_asks_and_no_coder_does_is_refused(
    tmp_path: Path, format: str, changes: dict[str, Any], says: str
) -> None:
    make, _, config = FILES[format]
    path = make(tmp_path / "made") / config
    path.write_text(json.dumps(yaml.safe_load(path.read_text()) | changes))
    layer = [] if format == "saelens" else ["--layer", "0"]
    with pytest.raises(ValueError, match=says):
        interop.main(["import", format, str(path.parent), str(tmp_path / "dest"), *layer])
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("format", "coder", "says"),
    [
        ("upstream", lambda: sae(TopK(3)), "upstream has no TopK SAE"),
        ("upstream", lambda: transcoder(TopK(3), skip=True), "no TopK skip transcoder"),
        ("saelens", lambda: transcoder(TopK(3)), "no TopK transcoder"),
        ("saelens", lambda: clt(Relu(0.0)), "no Relu cross-layer transcoder"),
        ("sparsify", lambda: sae(BatchTopK(3)), "no BatchTopK SAE"),
        ("sparsify", lambda: transcoder(TopK(3), d_out=4), "equally wide"),
        ("dictionary_learning", lambda: transcoder(Relu(0.0)), "no Relu transcoder"),
        ("circuit-tracer", lambda: transcoder(TopK(3), layer=0), "no TopK transcoder"),
        ("circuit-tracer", lambda: transcoder(Relu(0.0), layer=1), "each layer from 0"),
        ("upstream", lambda: transcoder(GATED), "upstream has no Gated transcoder"),
        ("upstream", lambda: clt(GATED), "upstream has no Gated cross-layer transcoder"),
        ("saelens", lambda: transcoder(GATED), "saelens has no Gated transcoder"),
        ("sparsify", lambda: sae(GATED), "sparsify has no Gated SAE"),
        ("dictionary_learning", lambda: sae(GATED), "dictionary_learning has no Gated SAE"),
        ("circuit-tracer", lambda: transcoder(GATED, layer=0), "circuit-tracer has no Gated transcoder"),
        ("circuit-tracer", lambda: clt(GATED), "circuit-tracer has no Gated cross-layer transcoder"),
        ("crosslayer-coding", lambda: clt(Relu(0.0)), "read, not written"),
        ("gguf", lambda: clt(Relu(0.0)), "unknown format"),
    ],
)
def test_what_a_format_cannot_say_is_not_written(
    tmp_path: Path, format: str, coder: Callable[[], Coder], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        exported(format, tmp_path, coder())
    assert not (tmp_path / format).exists()


def test_a_batch_topk_without_threshold_is_not_exported(tmp_path: Path) -> None:
    coder = build_coder(EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=F, rule=BatchTopK(3)), torch.Generator())
    with pytest.raises(ValueError, match="calibrate"):
        exported("saelens", tmp_path, coder)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = upstream_folder(tmp_path / "made")
    for _ in range(2):
        before = sorted(tmp_path.rglob("*"))
        if (tmp_path / "back").exists():
            with pytest.raises(ValueError, match="not empty"):
                imported("upstream", folder, tmp_path / "back", "--layer", "0")
            assert sorted(tmp_path.rglob("*")) == before
        else:
            imported("upstream", folder, tmp_path / "back", "--layer", "0")


@pytest.mark.parametrize("task", ["export", "import"])
def test_of_several_dictionaries_all_are_written_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """A folder with two of three would be read as a whole one."""
    coders, calls = [transcoder(TopK(3), layer=i) for i in range(3)], []
    folder = exported("sparsify", tmp_path, *coders)
    writer = {"export": "save_file", "import": "save_checkpoint"}[task]
    write = getattr(interop, writer)

    def write_until_killed(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(interop, writer, write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        if task == "export":
            exported("sparsify", tmp_path / "again", *coders)
        else:
            interop.main(["import", "sparsify", str(folder), str(tmp_path / "back")])
    assert len(calls) == 3 and not (tmp_path / "back").exists() and not (tmp_path / "again" / "sparsify").exists()


def test_what_is_exported_is_something_and_has_names_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^name at least one checkpoint to export$"):
        interop.export("saelens", (), tmp_path / "none")
    same = [save(tmp_path / str(i), transcoder(TopK(3), layer=i)) for i in range(2)]
    with pytest.raises(ValueError, match="^several dictionaries are called 'coder', each needs a folder"):
        interop.export("upstream", tuple(same), tmp_path / "same")
    assert not (tmp_path / "none").exists() and not (tmp_path / "same").exists()


def test_a_transcoder_without_a_layer_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--layer"):
        imported("upstream", upstream_folder(tmp_path / "made"), tmp_path / "back")


@pytest.mark.parametrize(
    ("config", "page"),
    [
        (SAEConfig(layer=3, site="resid", d_in=D, d_dict=F, rule=TopK(3)), "3-nnd-res-20"),
        (SAEConfig(layer=3, site="mlp_out", d_in=D, d_dict=F, rule=TopK(3)), "3-nnd-mlp-20"),
        (SAEConfig(layer=3, site="attn_out", d_in=D, d_dict=F, rule=TopK(3)), "3-nnd-att-20"),
        (EncoderConfig(layer=3, d_in=D, d_out=D, d_dict=F, rule=Relu(0.0)), "3-nnd-transcoder-20"),
    ],
)
def test_neuronpedia_tells_the_coders_of_one_layer_apart(config: SAEConfig | EncoderConfig, page: str) -> None:
    for target, model in (("gpt2", "gpt2-small"), ("hf:org/name", "name"), ("smollm2", "SmolLM2-135M-Instruct")):
        (_, blob), _ = sorted(FORMATS["saelens"].write([Dictionary("x", target, random_coder(config))]).items())
        assert blob["metadata"]["neuronpedia_id"] == f"{model}/{page}"


@pytest.mark.parametrize(
    ("hook", "place"),
    [("blocks.3.hook_resid_post", (3, "resid")), ("blocks.3.hook_resid_pre", (2, "resid")),
     ("layers.7.mlp", (7, "mlp_out")), ("layers.12", (12, "resid")), ("resid_post_layer_4", (4, "resid")),
     ("h.1.attn", (1, "attn_out")), ("blocks.2.hook_attn_out", (2, "attn_out")), ("transformer.h.5", (5, "resid"))],
)  # fmt: skip
def test_places(hook: str, place: tuple[int, str]) -> None:
    from foreign_files import find_place

    assert find_place(Path("cfg.json"), hook, Place()) == place


# -------------------------------------------------------------------------------------------------------------- the hub


def test_upload_sends_the_folder_with_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    api = SimpleNamespace(
        create_repo=lambda repo_id, **kw: sent.append({"repo_id": repo_id} | kw),
        upload_folder=lambda **kw: sent.append(kw),
    )
    monkeypatch.setattr(interop, "HfApi", lambda: api)
    folder = exported("saelens", tmp_path, transcoder(BatchTopK(3)))
    interop.main(["upload", str(folder), "org/name", "--dry-run"])
    monkeypatch.setattr(interop, "get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        interop.main(["upload", str(folder), "org/name"])
    assert sent == []
    monkeypatch.setattr(interop, "get_token", lambda: "token")
    interop.main(["upload", str(folder), "org/name"])
    assert sent[0] == {"repo_id": "org/name", "private": False, "exist_ok": True}
    assert sent[1:] == [{"repo_id": "org/name", "folder_path": folder}]
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "org/model" and "BatchTopK(k=3)" in body


def test_upload_writes_the_card_of_a_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, clt(TopK(3)))
    interop.main(["upload", folder, "org/name", "--dry-run"])
    assert "| coder | CLT | 0, 1, 2 |" in (Path(folder) / "README.md").read_text()
