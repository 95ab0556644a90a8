"""What a foreign file says is read, meant as its library means it where it says nothing, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from interop_cases import (
    RULES,
    D,
    N,
    clt,
    exported,
    imported,
    inputs,
    ours,
    sae,
    transcoder,
    write_crosslayer_coding,
)  # fmt: skip
from restated import RESTATED
from safetensors.torch import load_file, save_file

import interop
from checkpoints import load_checkpoint
from coder import Coder
from foreign_files import NoSite, Place, find_place
from foreign_formats import import_dictionaries

RELU, TOPK, BATCH_TOPK, JUMPRELU = RULES


def edit_config(path: Path, drop: tuple[str, ...] = (), section: str | None = None, **changes: Any) -> None:
    blob = yaml.safe_load(path.read_text())
    inner = blob if section is None else blob[section]
    inner |= changes
    for key in drop:
        del inner[key]
    path.write_text(json.dumps(blob))


def edit_tensors(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    state = {key: changes.get(key, lambda t: t)(value) for key, value in state.items() if key not in drop}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def assert_reads_as_restated(format: str, folder: Path, destination: Path, *options: str) -> Coder:
    coder = imported(format, folder, destination, *options)
    for got, right in zip(ours(coder), RESTATED[format](folder, inputs(coder).double())):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)
    return coder


def saelens(folder: Path, coder: Coder) -> Path:
    return exported("saelens", folder, coder)


def sparsify(folder: Path, coder: Coder) -> Path:
    return next(exported("sparsify", folder, coder).glob("layers.1*"))


def trainer(folder: Path, coder: Coder) -> Path:
    return exported("dictionary_learning", folder, coder) / "trainer_0"


# ----------------------------------------------------------------------------------------- absent keys, and other ages


@pytest.mark.parametrize("rule", [RELU, TOPK, JUMPRELU])
def test_saelens_subtracts_b_dec_where_the_key_is_absent(tmp_path: Path, rule: Any) -> None:
    edit_config(saelens(tmp_path, coder := sae(rule)) / "cfg.json", drop=("apply_b_dec_to_input",))
    back = assert_reads_as_restated("saelens", tmp_path / "saelens", tmp_path / "back")
    torch.testing.assert_close(ours(back), ours(coder), rtol=1e-4, atol=1e-4)


def test_saelens_does_not_rank_by_decoder_norm_where_the_key_is_absent(tmp_path: Path) -> None:
    edit_config(saelens(tmp_path, sae(TOPK)) / "cfg.json", drop=("rescale_acts_by_decoder_norm",))
    assert_reads_as_restated("saelens", tmp_path / "saelens", tmp_path / "back")


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_saelens_latents_that_write_nothing_are_never_ranked(tmp_path: Path, size: float) -> None:
    """A row of zeros has no norm to divide by, and the square of 1e-30 is zero in float32."""
    folder = saelens(tmp_path, sae(TOPK))
    edit_config(folder / "cfg.json", rescale_acts_by_decoder_norm=True)
    edit_tensors(folder / "sae_weights.safetensors", W_dec=lambda t: torch.cat([t[:4] * size, t[4:]]))
    assert_reads_as_restated("saelens", folder, tmp_path / "back")


def test_saelens_negative_thresholds_let_no_negative_value_through(tmp_path: Path) -> None:
    folder = saelens(tmp_path, sae(JUMPRELU))
    edit_tensors(folder / "sae_weights.safetensors", threshold=lambda t: -t)
    coder = assert_reads_as_restated("saelens", folder, tmp_path / "back")
    assert ours(coder)[0].min() == 0


def test_sparsify_transcoders_of_before_february_2025_subtracted_b_dec(tmp_path: Path) -> None:
    folder = sparsify(tmp_path, transcoder(TOPK, skip=True))
    edit_config(folder / "cfg.json", drop=("transcode",))
    coder = assert_reads_as_restated("sparsify", folder, tmp_path / "back")
    assert coder.config.kind == "transcoder"


def test_sparsify_files_of_before_multi_topk_are_autoencoders(tmp_path: Path) -> None:
    """That key came in August 2024, the first transcoders in November; `signed` is older than both."""
    folder = sparsify(tmp_path, coder := sae(TOPK))
    edit_config(folder / "cfg.json", drop=("transcode", "skip_connection", "multi_topk", "activation"), signed=False)
    back = assert_reads_as_restated("sparsify", folder, tmp_path / "back")
    assert back.config.kind == "sae"
    torch.testing.assert_close(ours(back), ours(coder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", ["", "seed0"])
@pytest.mark.parametrize(
    ("settings", "kind"), [({}, "sae"), ({"transcode": False}, "sae"), ({"transcode": True}, "transcoder")]
)
def test_a_sparsify_runs_own_settings_say_whether_its_old_files_transcode(
    tmp_path: Path, settings: dict[str, bool], kind: str, seed: str
) -> None:
    """They all subtract b_dec from what they read."""
    made = sparsify(tmp_path / "made", sae(TOPK) if kind == "sae" else transcoder(TOPK))
    edit_config(made / "cfg.json", drop=("transcode", "skip_connection"))
    folder = shutil.copytree(made, tmp_path / "run" / made.name / seed)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"sae": {"k": 3}, "batch_size": 8} | settings))
    assert assert_reads_as_restated("sparsify", folder, tmp_path / "back").config.kind == kind
    (tmp_path / "run" / "config.json").write_text('{"sae": {}, "transcode": "yes"}')
    with pytest.raises(ValueError, match="config.json: transcode is 'yes': say true or false"):
        imported("sparsify", folder, tmp_path / "again")


def test_sparsify_counts_32_latents_per_dimension_where_nothing_else_is_said(tmp_path: Path) -> None:
    folder = sparsify(tmp_path, sae(TOPK))
    edit_config(folder / "cfg.json", drop=("num_latents", "expansion_factor"))
    with pytest.raises(ValueError, match=rf"expected \({32 * D},"):
        imported("sparsify", folder, tmp_path / "back")


@pytest.mark.parametrize("drop", [("threshold",), ("k",), ("threshold", "k")])
def test_dictionary_learning_topk_of_2024_has_no_threshold_and_its_k_in_the_configuration(
    tmp_path: Path, drop: tuple[str, ...]
) -> None:
    folder = trainer(tmp_path, coder := sae(TOPK))
    edit_tensors(folder / "ae.pt", drop=drop)
    back = assert_reads_as_restated("dictionary_learning", folder, tmp_path / "back")
    torch.testing.assert_close(ours(back), ours(coder), rtol=1e-4, atol=1e-4)
    edit_config(folder / "config.json", section="trainer", k=None)
    if "k" in drop:
        with pytest.raises(ValueError, match="k is None, not a positive whole number"):
            imported("dictionary_learning", folder, tmp_path / "again")


def test_dictionary_learning_refuses_two_different_k(tmp_path: Path) -> None:
    edit_config(trainer(tmp_path, sae(TOPK)) / "config.json", section="trainer", k=4)
    with pytest.raises(ValueError, match="k is 4: its tensor k is 3"):
        imported("dictionary_learning", tmp_path / "dictionary_learning", tmp_path / "back")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_compiled_and_distributed_modules_are_taken_off_where_all_names_have_them(
    tmp_path: Path, prefix: str
) -> None:
    folder = trainer(tmp_path, sae(TOPK))
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({prefix + name: tensor for name, tensor in state.items()}, folder / "ae.pt")
    assert_reads_as_restated("dictionary_learning", folder, tmp_path / "back")
    torch.save({prefix * (name != "b_dec") + name: tensor for name, tensor in state.items()}, folder / "ae.pt")
    with pytest.raises(ValueError, match="is not expected|is missing"):
        imported("dictionary_learning", folder, tmp_path / "again")


@pytest.mark.parametrize("make", [lambda p: saelens(p, sae(TOPK)), lambda p: exported("circuit-tracer", p, clt(RELU))])
def test_a_byte_order_mark_changes_nothing(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    (config,) = [*folder.glob("c*.json"), *folder.glob("*.yaml")]
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert_reads_as_restated(folder.name, folder, tmp_path / "back")


# -------------------------------------------------------------------------------------------------------- what is refused


def crosslayer(folder: Path) -> Path:
    return write_crosslayer_coding(folder / "cc", clt(JUMPRELU))


def circuit_tracer(folder: Path) -> Path:
    return exported("circuit-tracer", folder, *(transcoder(JUMPRELU, layer=i) for i in range(N)))


SETTINGS: list[tuple[str, Callable[[Path], Path], dict[str, Any], str]] = [
    ("saelens", lambda p: saelens(p, transcoder(RELU)), {"apply_b_dec_to_input": True}, "a transcoder subtracts nothing"),
    ("saelens", lambda p: saelens(p, sae(RELU)), {"rescale_acts_by_decoder_norm": True}, "standard dictionary has none"),
    ("saelens", lambda p: saelens(p, sae(RELU)), {"k": 3}, "k is 3: a standard dictionary has none"),
    ("saelens", lambda p: saelens(p, sae(RELU)), {"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
    ("saelens", lambda p: saelens(p, sae(RELU)), {"finetuning_scaling_factor": True}, "finetuning_scaling_factor is True"),
    ("saelens", lambda p: saelens(p, sae(RELU)), {"d_out": D + 1}, "an SAE rebuilds what it reads"),
    ("saelens", lambda p: saelens(p, sae(RELU)), {"gain": 2.0}, "unknown key 'gain'"),
    ("sparsify", lambda p: sparsify(p, sae(TOPK)), {"signed": True}, "top k by absolute value"),
    ("sparsify", lambda p: sparsify(p, sae(TOPK)), {"transcode": None}, "does not say whether it transcodes"),
    ("sparsify", lambda p: sparsify(p, sae(TOPK)), {"transcode": True}, "transcodes resid of layer 1"),
    ("sparsify", lambda p: sparsify(p, sae(TOPK)), {"n_targets": 4}, "unknown key 'n_targets'"),
    ("circuit-tracer", circuit_tracer, {"feature_input_hook": None}, "only transcoders of the MLP's own input"),
    ("circuit-tracer", circuit_tracer, {"feature_input_hook": "ln2.hook_normalized"}, "lacks the norm's gain"),
    ("circuit-tracer", circuit_tracer, {"feature_input_hook": "blocks.5.mlp.hook_in"}, "MLP's own input"),
    ("circuit-tracer", circuit_tracer, {"feature_output_hook": "hook_resid_post"}, "only hook_mlp_out of the same layer"),
    ("circuit-tracer", circuit_tracer, {"feature_output_hook": None}, "only hook_mlp_out of the same layer"),
    ("circuit-tracer", circuit_tracer, {"activation": "relu"}, "as the thresholds say"),
    ("circuit-tracer", circuit_tracer, {"transcoders": ["hf://a/b/c"]}, "put the files beside it"),
    ("circuit-tracer", lambda p: exported("circuit-tracer", p, clt(RELU)), {"feature_input_hook": None}, "own input"),
    ("crosslayer-coding", crosslayer, {"tl_input_template": "blocks.{}.ln2.hook_normalized"}, "and writes ''"),
    ("crosslayer-coding", crosslayer, {"tl_input_template": "blocks.{}.ln2.hook_normalized",
                                       "tl_output_template": "blocks.{}.hook_mlp_out"}, "lacks the norm's gain"),
    ("crosslayer-coding", crosslayer, {"mlp_input_template": "h.{}.attn.input"}, "only CLTs of MLPs fit"),
    ("crosslayer-coding", crosslayer, {"num_layers": 10**9}, "num_layers is 1000000000"),
    ("crosslayer-coding", crosslayer, {"skip_connection": True}, "no CLT here has a skip"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "make", "changes", "says"), SETTINGS)
def test_a_setting_that_changes_the_function_is_refused_by_name(
    tmp_path: Path, format: str, make: Callable[[Path], Path], changes: dict[str, Any], says: str
) -> None:
    folder = make(tmp_path / "made")
    (config,) = [*folder.glob("c*.json"), *folder.glob("*.yaml")]
    edit_config(config, **changes)
    with pytest.raises(ValueError, match=says) as refusal:
        interop.main(["import", format, str(folder), str(tmp_path / "back")])
    assert "\n" not in str(refusal.value) and not (tmp_path / "back").exists()


METADATA: list[tuple[Coder, dict[str, Any], str]] = [
    (transcoder(RELU), {"hook_name_out": "blocks.5.hook_resid_post"}, "only hook_mlp_out of the same layer"),
    (transcoder(RELU), {"hook_name_out": "blocks.2.hook_mlp_out"}, "only hook_mlp_out of the same layer"),
    (transcoder(RELU), {"hook_name_out": None}, "only hook_mlp_out of the same layer"),
    (transcoder(RELU), {"hook_name": None}, "only transcoders of the MLP's own input"),
    (transcoder(RELU), {"hook_name": "blocks.1.hook_resid_mid"}, "only transcoders of the MLP's own input"),
    (transcoder(RELU), {"hook_name": "blocks.1.ln2.hook_normalized"}, "lacks the norm's gain"),
    (transcoder(RELU), {"hook_layer_out": 2}, "says layer 2"),
    (sae(RELU), {"hook_name_out": "blocks.1.hook_mlp_out"}, "an SAE rebuilds what it reads"),
    (sae(RELU), {"hook_layer": 2}, "says layer 2 and 'blocks.1.hook_resid_post'"),
    (sae(RELU), {"hook_head_index": 3}, "one head is no site"),
    (sae(RELU), {"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "a processed model"),
    (sae(RELU), {"model_from_pretrained_kwargs": {"fold_ln": True}}, "a processed model"),
    (sae(RELU), {"model_from_pretrained_kwargs": {"revision": "step1000"}}, "unknown key 'revision'"),
    (sae(RELU), {"input_gain": 2}, "unknown key 'input_gain'"),
]  # fmt: skip


@pytest.mark.parametrize(("coder", "changes", "says"), METADATA)
def test_saelens_metadata_that_names_another_tensor_is_refused(
    tmp_path: Path, coder: Coder, changes: dict[str, Any], says: str
) -> None:
    folder = saelens(tmp_path, coder)
    edit_config(folder / "cfg.json", section="metadata", **changes)
    with pytest.raises(ValueError, match=says) as refusal:
        interop.main(["import", "saelens", str(folder), str(tmp_path / "back")])
    assert "\n" not in str(refusal.value) and not (tmp_path / "back").exists()


def test_what_is_known_to_be_harmless_is_read(tmp_path: Path) -> None:
    folder = saelens(tmp_path, sae(RELU))
    edit_config(folder / "cfg.json", dtype="bfloat16", l1_coefficient=5.0, unknown=None)
    kwargs = {"center_writing_weights": False, "dtype": "float32"}
    edit_config(folder / "cfg.json", section="metadata", prepend_bos=True, model_from_pretrained_kwargs=kwargs)
    assert_reads_as_restated("saelens", folder, tmp_path / "back")


def test_circuit_tracer_lets_negative_values_through_a_negative_threshold_and_we_refuse_it(tmp_path: Path) -> None:
    folder = circuit_tracer(tmp_path)
    edit_tensors(folder / "layer_1.safetensors", **{"activation_function.threshold": lambda t: -t})
    with pytest.raises(ValueError, match="negative, which lets negative values through"):
        imported("circuit-tracer", folder, tmp_path / "back")


def test_a_set_with_a_layer_missing_is_refused(tmp_path: Path) -> None:
    (circuit_tracer(tmp_path) / "layer_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds layers \['0', '2'\], not 0, 1, 2"):
        imported("circuit-tracer", tmp_path / "circuit-tracer", tmp_path / "back")


@pytest.mark.parametrize(
    ("make", "file", "tensor", "value"),
    [(lambda p: exported("upstream", p, transcoder(JUMPRELU)), "encoder.pt", "jumprelu.log_threshold", 200.0),
     (lambda p: saelens(p, sae(TOPK)), "sae_weights.safetensors", "W_enc", 3e38)],
)  # fmt: skip
def test_what_is_finite_in_the_file_and_not_after_the_arithmetic_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], file: str, tensor: str, value: float
) -> None:
    folder = make(tmp_path)
    edit_tensors(folder / file, **{tensor: lambda t: torch.full_like(t, value)})
    if folder.name == "saelens":
        edit_config(folder / "cfg.json", apply_b_dec_to_input=False)
        edit_tensors(folder / file, b_dec=lambda t: torch.full_like(t, 10.0))
    with pytest.raises(ValueError, match="exceeds float32"):
        imported(folder.name, folder, tmp_path / "back", "--layer", "1")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = trainer(tmp_path, sae(TOPK))
    edit_tensors(folder / "ae.pt", **{"encoder.weight": lambda t: t.to(dtype)})
    with pytest.raises(ValueError, match="save it as float32"):
        imported("dictionary_learning", folder, tmp_path / "back")


@pytest.mark.parametrize("text", ["1: [", "a: &x [*x", "a: 2024-13-45", "{1: 2}", "[[[" * 3000])
def test_malformed_yaml_is_said_in_one_line(tmp_path: Path, text: str) -> None:
    folder = exported("circuit-tracer", tmp_path, clt(RELU))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config.yaml") as refusal:
        imported("circuit-tracer", folder, tmp_path / "back")
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------- places and layouts


@pytest.mark.parametrize(
    ("hook", "said", "place"),
    [("resid_pre", 4, (3, "resid")), ("resid_post", 4, (4, "resid")), ("mlp_out_layer_2", 2, (2, "mlp_out")),
     ("gpt_neox.layers.3.attention", None, (3, "attn_out")), ("blocks.2.mlp.hook_out", None, (2, "mlp_out"))],
)  # fmt: skip
def test_the_layer_that_a_file_says_beside_its_hook(hook: str, said: int | None, place: tuple[int, str]) -> None:
    assert find_place(Path("config.json"), hook, Place(), said) == place


@pytest.mark.parametrize("hook", ["embed_tokens", "blocks.2.hook_resid_mid", "blocks.2.hook_resid_post.hook_sae_output",
                                  "blocks.2.attn.hook_z", "blocks.0.hook_resid_pre", "layers.3.mlp.down_proj"])  # fmt: skip
def test_what_is_no_site_here_is_none(hook: str) -> None:
    with pytest.raises(NoSite):
        find_place(Path("cfg.json"), hook, Place())


def test_a_file_that_says_two_layers_is_refused(tmp_path: Path) -> None:
    folder = trainer(tmp_path, sae(TOPK))
    edit_config(folder / "config.json", section="trainer", layer=3, submodule_name="resid_post_layer_4")
    with pytest.raises(ValueError, match="says layer 3 and 'resid_post_layer_4': name the right one with --layer"):
        imported("dictionary_learning", folder, tmp_path / "back")
    assert imported("dictionary_learning", folder, tmp_path / "back", "--layer", "3").config.layer == 3


@pytest.mark.parametrize("io", ["in", "in_and_out"])
def test_dictionary_learning_of_what_goes_into_a_submodule_is_refused(tmp_path: Path, io: str) -> None:
    folder = trainer(tmp_path, sae(TOPK))
    edit_config(folder / "config.json", buffer={"io": io, "d_submodule": D})
    with pytest.raises(ValueError, match=f"io is '{io}': only what a submodule writes"):
        imported("dictionary_learning", folder, tmp_path / "back")


def names(format: str, source: Path) -> list[tuple[str, tuple[int, ...]]]:
    return [(entry.name, entry.coder.config.layers) for entry in import_dictionaries(format, str(source), Place())]


def test_sparsify_seeds_lie_beneath_their_hookpoint_and_the_embedding_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = sparsify(tmp_path, transcoder(TOPK)), tmp_path / "run"
    for place in ("layers.1.mlp/seed0", "layers.1.mlp/seed1", "layers.10.mlp/seed0", "layers.2.mlp/seed0"):
        shutil.copytree(folder, run / place)
    shutil.copytree(sparsify(tmp_path / "sae", sae(TOPK)), run / "embed_tokens")
    (run / "config.json").write_text("{}")
    capsys.readouterr()
    assert names("sparsify", run) == [
        ("layers.1.mlp/seed0", (1,)), ("layers.1.mlp/seed1", (1,)), ("layers.2.mlp/seed0", (2,)),
        ("layers.10.mlp/seed0", (10,)),
    ]  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("passed over: ") and "embed_tokens" in said[0]
    with pytest.raises(NoSite, match="name it with --site"):
        names("sparsify", run / "embed_tokens")
    interop.main(["import", "sparsify", str(run), str(tmp_path / "back")])
    assert load_checkpoint(str(tmp_path / "back" / "layers.10.mlp" / "seed0"), "cpu").coder.config.layers == (10,)


def test_a_layer_or_site_that_the_files_know_better_is_refused(tmp_path: Path) -> None:
    """It would put every layer of a set in one place; of a lone dictionary it overrules what the file says."""
    one, two = (
        exported("saelens", tmp_path / "one", sae(RELU)),
        exported("saelens", tmp_path / "two", sae(RELU), sae(RELU, 2)),
    )
    sets = circuit_tracer(tmp_path / "three")
    (entry,) = import_dictionaries("saelens", str(one), Place(layer=5))
    assert entry.coder.config.layers == (5,)
    for form, source, given, says in (
        ("saelens", two, Place(layer=2), "--layer 2 was named, and [^\n]* is of layer 1: leave --layer out"),
        ("circuit-tracer", sets, Place(layer=1), "--layer 1 was named, and layer_0 is of layer 0: leave --layer out"),
        ("circuit-tracer", sets, Place(site="resid"), "--site resid was named, and layer_0 is a transcoder of mlp_out"),
    ):
        with pytest.raises(ValueError, match=f"^{says}$"):
            import_dictionaries(form, str(source), given)


def test_sweeps_and_releases_lie_at_any_depth(tmp_path: Path) -> None:
    folder, run = trainer(tmp_path, sae(TOPK)), tmp_path / "run"
    for place in ("resid_post_layer_1/trainer_0", "resid_post_layer_1/trainer_1", ".cache/trainer_0"):
        shutil.copytree(folder, run / place)
    (run / "resid_post_layer_1" / "trainer_0" / "checkpoints").mkdir()
    shutil.copy(folder / "config.json", run / "resid_post_layer_1" / "trainer_0" / "checkpoints")
    (run / "config.json").write_text("{}")  # of the sweep, no dictionary's
    assert names("dictionary_learning", run) == [
        ("resid_post_layer_1/trainer_0", (1,)), ("resid_post_layer_1/trainer_1", (1,)),
    ]  # fmt: skip


def test_the_hooks_that_a_file_names_stay_with_the_checkpoint(tmp_path: Path) -> None:
    imported("saelens", saelens(tmp_path, transcoder(RELU)), tmp_path / "back")
    record = load_checkpoint(str(tmp_path / "back"), "cpu").record
    assert record.hooks == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    imported("circuit-tracer", exported("circuit-tracer", tmp_path, clt(RELU)), tmp_path / "clt")
    record = load_checkpoint(str(tmp_path / "clt"), "cpu").record
    assert record.hooks[:2] == ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out") and len(record.hooks) == 2 * N
