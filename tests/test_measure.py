"""`python measure.py`: any dictionary, one command, one table."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from run_layouts import LAYOUTS, write_run
from small import D, clt, make_small_target, transcoders, word_tokenizer, write_corpus

import features
import interop
import measure
import spd_runs
from checkpoints import TrainingRecord, load_spd, save_checkpoint
from config import BatchTopK, EncoderConfig, GateConfig, Relu, SAEConfig, SPDConfig, TopK
from foreign_files import Place, hook_points
from foreign_formats import load_coders
from interop import export, import_
from logs import command_line
from pareto import read_layers, read_points
from pareto_figure import base
from sae import build_sae
from spd_model import ComponentModel
from target_models import Loaded, TargetModel, make_target
from token_stream import DatasetSpec
from transcoder import build_transcoder


def record(target: TargetModel, fingerprint: str | None = None) -> TrainingRecord:
    return TrainingRecord(
        name="n",
        target=target.name,
        target_fingerprint=fingerprint or target.fingerprint,
        train_tokens=512,
        train_seconds=1.0,
        seed=3,
        commit="c",
    )


@pytest.fixture
def small_target(tmp_path: Path) -> TargetModel:
    """With enough text for the baselines' training tokens."""
    (tmp_path / "corpus").mkdir()
    return make_small_target(write_corpus(tmp_path / "corpus", documents=1200))


@pytest.fixture
def checkpoints(small_target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A transcoder per layer, a CLT and an SPD of the small target; the command line finds that target as `tiny`."""
    for command in (measure, interop, features):
        monkeypatch.setattr(command, "load_target", lambda name, device: small_target)
    monkeypatch.setitem(interop.TARGETS, "small", interop.TARGETS["tiny"])
    folders = {name: str(tmp_path / "checkpoints" / name) for name in ("plt0", "plt1", "clt", "spd")}
    for name, coder in zip(folders, [*transcoders(range(2), BatchTopK(4)), clt(range(2))]):
        save_checkpoint(Path(folders[name]), coder, record(small_target))
    config = SPDConfig(components=(("h.*.mlp.*", 12),), gate=GateConfig(kind="shared_mlp", hidden=(8,)))
    model = ComponentModel(small_target.model, config, torch.Generator().manual_seed(0))
    save_checkpoint(Path(folders["spd"]), model, record(small_target))
    return folders


def test_our_checkpoints_are_measured_together_and_added_to_the_table(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = tmp_path / "points.csv"
    plts = (checkpoints["plt0"], checkpoints["plt1"])
    measure.main(plts, tokens=320, protocols=("free",), points=points)
    assert [p.method for p in read_points(points)] == ["transcoder", "affine", "identity", "zero", "mean"]
    both = (*plts, checkpoints["clt"], checkpoints["spd"])
    measure.main(both, tokens=320, protocols=("free",), top_k=(2,), neurons=(4,), points=points)
    rows = read_points(points)
    assert sorted(p.method for p in rows) == sorted(
        ["transcoder", "transcoder-topk", "clt", "clt-topk", "spd", "spd-0.5", "spd-topk", "neurons", "neurons-joint", "affine",
         "identity", "zero", "mean"]
    )  # fmt: skip
    assert all(p.layers == (0, 1) and p.tokens == 20 * 15 for p in rows)
    (plt,) = [p for p in rows if p.method == "transcoder"]
    assert (plt.k, plt.seed, plt.train_tokens, plt.train_seconds, plt.checkpoint) == (4, 3, 512, 2.0, " ".join(plts))
    assert {d.module for d in read_layers(tmp_path / "layers.csv")} == {"latents", "neurons", "c_fc", "down_proj", ""}
    assert "| transcoder |" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_goodfire_run_is_measured_by_one_command_and_equals_ours(
    checkpoints: dict[str, str], small_target: TargetModel, tmp_path: Path, layout: str
) -> None:
    """In every layout of its repository, all protocols; only our own checkpoint says how long it was trained."""
    model, _ = load_spd(checkpoints["spd"], small_target)
    run = str(write_run(tmp_path / "run", LAYOUTS[layout](model), model.config.gate))
    for reference, name in ((checkpoints["spd"], "a.csv"), (run, "b.csv")):
        command_line(measure.main, "measure.py", [reference, "--tokens", "320", "--points", str(tmp_path / name)])
    ours, theirs = (
        [(p.method, p.protocol, p.layers, p.ce, p.l0, p.active_params) for p in read_points(tmp_path / name)]
        for name in ("a.csv", "b.csv")
    )
    assert theirs == ours and {row[0] for row in ours} >= {"spd", "spd-0.5"}


def test_a_run_of_an_unproven_target_is_measured_on_the_users_word(
    checkpoints: dict[str, str], small_target: TargetModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_spd(checkpoints["spd"], small_target)
    run = str(write_run(tmp_path / "run", model.state_dict(), model.config.gate))
    asked = [run, "--tokens", "320", "--protocols", "frozen", "--points", str(tmp_path / "points.csv")]
    with pytest.raises(ValueError, match=r"^[^\n]*cannot prove[^\n]*--unproven-target[^\n]*$"):
        command_line(measure.main, "measure.py", asked)
    command_line(measure.main, "measure.py", [*asked, "--unproven-target"])
    assert "cannot prove" in capsys.readouterr().err and read_points(tmp_path / "points.csv")[0].method == "spd"


def test_a_run_on_wandb_is_fetched_and_measured(
    checkpoints: dict[str, str], small_target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_spd(checkpoints["spd"], small_target)
    run = write_run(tmp_path / "run", LAYOUTS["dev"](model), model.config.gate)
    asked: list[str] = []
    monkeypatch.setattr(spd_runs, "download_run_files", lambda name, *_: asked.append(name) or run)
    measure.main(("wandb:goodfire/spd/runs/s-1",), tokens=320, protocols=("frozen",), points=tmp_path / "points.csv")
    point = read_points(tmp_path / "points.csv")[0]
    assert set(asked) == {"goodfire/spd/s-1"} and (point.method, point.train_tokens) == ("spd", None)
    assert point.checkpoint == "wandb:goodfire/spd/runs/s-1"


@pytest.mark.parametrize("run_id", ["s-55ea3f9b", "s-275c8f21"])
def test_a_published_run_is_measured_under_every_protocol_by_one_command(
    small_target: TargetModel, checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_id: str
) -> None:
    """As the published ones: attention decomposed too, one bidirectional gate that norms what it reads, which is told of one."""
    gate = GateConfig(kind="global_shared_transformer", hidden=(8,), d_model=8, blocks=1, heads=2, causal=False)
    config = SPDConfig(components=(("h.*.mlp.*", 12), ("h.*.attn.?_proj", 4)), gate=gate)
    model = ComponentModel(small_target.model, config, torch.Generator().manual_seed(0))
    own = str(tmp_path / "checkpoints" / "own")
    save_checkpoint(Path(own), model, record(small_target))
    run = write_run(tmp_path / f"goodfire--spd--{run_id}", LAYOUTS["dev"](model), gate)
    monkeypatch.setattr(spd_runs, "download_run_files", lambda *_: run)
    asked = [f"wandb:goodfire/spd/runs/{run_id}", "--target", "pile", "--tokens", "320", "--points"]
    if run_id != "s-55ea3f9b":
        with pytest.raises(ValueError, match=r"^[^\n]*--gate-inputs normed [^\n]* or raw$"):
            command_line(measure.main, "measure.py", [*asked, str(tmp_path / "theirs.csv")])
        asked = [*asked[:-1], "--gate-inputs", "normed", "--points"]
    command_line(measure.main, "measure.py", [own, "--tokens", "320", "--points", str(tmp_path / "ours.csv")])
    command_line(measure.main, "measure.py", [*asked, str(tmp_path / "theirs.csv")])
    ours, theirs = (
        [(p.method, p.protocol, p.layers, p.ce, p.l0, p.gate_params) for p in read_points(tmp_path / f"{name}.csv")]
        for name in ("ours", "theirs")
    )
    assert theirs == ours and {row[1] for row in ours if row[0] == "spd"} == {"single", "frozen", "gates", "free"}


@pytest.mark.parametrize(
    ("format", "names", "options"),
    [
        ("upstream", ("plt1",), ("--layer", "1")),
        ("saelens", ("plt1",), ()),
        ("sparsify", ("topk",), ()),
    ],
)
def test_foreign_dictionaries_are_measured_by_one_command_and_equal_ours(
    checkpoints: dict[str, str], small_target: TargetModel, tmp_path: Path, format: str, names: tuple[str, ...],
    options: tuple[str, ...],
) -> None:  # fmt: skip
    checkpoints["topk"] = str(tmp_path / "topk")
    save_checkpoint(tmp_path / "topk", transcoders(range(2), TopK(4))[1], record(small_target))
    own = [checkpoints[name] for name in names]
    export(format, tuple(own), tmp_path / "foreign")
    settings = ("--tokens", "320", "--protocols", "free", "--points")
    command_line(measure.main, "measure.py", [*own, *settings, str(tmp_path / "a.csv")])
    foreign = (str(tmp_path / "foreign"), "--format", format, *options)
    command_line(measure.main, "measure.py", [*foreign, *settings, str(tmp_path / "b.csv")])
    ours, theirs = (read_points(tmp_path / name)[0] for name in ("a.csv", "b.csv"))
    assert (base(theirs.method), theirs.layers, theirs.train_tokens) == (base(ours.method), ours.layers, None)
    assert theirs.ce == pytest.approx(ours.ce, abs=1e-5) and theirs.l0 == pytest.approx(ours.l0, abs=1e-3)


def test_every_dictionary_of_one_layer_has_a_row(
    checkpoints: dict[str, str], small_target: TargetModel, tmp_path: Path
) -> None:
    """Two seeds of layer 1 and one of layer 0, in folders: the first of each layer stand together."""
    run, own = tmp_path / "run", transcoders(range(2), TopK(4))
    for layer, seeds in ((0, [0]), (1, [0, 1])):
        save_checkpoint(tmp_path / f"own_{layer}", own[layer], record(small_target))
        for seed in seeds:
            export("sparsify", (str(tmp_path / f"own_{layer}"),), tmp_path / f"made_{layer}_{seed}")
            made = tmp_path / f"made_{layer}_{seed}" / f"layers.{layer}.mlp"
            shutil.copytree(made, run / f"layers.{layer}.mlp" / f"seed{seed}")
    points = tmp_path / "points.csv"
    measure.main((str(run),), tokens=320, protocols=("free",), format="sparsify", points=points)
    rows = [p for p in read_points(points) if p.method == "transcoder-per_token"]
    assert [(p.layers, p.checkpoint) for p in rows] == [
        ((0, 1), f"{run}/layers.0.mlp/seed0 {run}/layers.1.mlp/seed0"), ((1,), f"{run}/layers.1.mlp/seed1"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["{}", "[]", '{"config": []}', "{", '{"trainer": {"dict_class": "AutoEncoder"}}'])
def test_a_foreign_folder_without_its_format_is_said_in_one_line(
    checkpoints: dict[str, str], tmp_path: Path, text: str
) -> None:
    (tmp_path / "trainer_0").mkdir()
    (tmp_path / "trainer_0" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"name its --format|not a configuration|no JSON") as refusal:
        measure.main((str(tmp_path / "trainer_0"),), tokens=320, points=tmp_path / "points.csv")
    assert "\n" not in str(refusal.value)


def random_target(kind: type[tf.PretrainedConfig]) -> TargetModel:
    sizes = {"vocab_size": 62, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(
        kind(**sizes, num_key_value_heads=1, intermediate_size=24, pad_token_id=0)
    )
    with torch.no_grad():
        for p in model.float().eval().parameters():
            p.add_(0.1 * torch.randn_like(p))
    return make_target(kind.__name__, Loaded(model, word_tokenizer(), 16, DatasetSpec("python")), "cpu")


def test_a_hook_that_is_another_tensor_on_this_target_is_refused_in_and_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens reads hook_mlp_out behind Gemma 2's norm; the same file fits a Llama, and its imported form too."""
    llama, gemma2 = random_target(tf.LlamaConfig), random_target(tf.Gemma2Config)
    monkeypatch.setattr(interop, "load_target", lambda name, device: {"hf:llama": llama, "hf:gemma2": gemma2}[name])
    config = SAEConfig(layer=1, site="mlp_out", d_in=16, d_dict=32, rule=BatchTopK(4))
    for name, target in (("llama", llama), ("gemma2", gemma2)):
        own = dataclasses.replace(record(target), target=f"hf:{name}")
        sae, transcoder = build_sae(config, torch.Generator()), transcoders([0], Relu(0.0))[0]
        for kind, coder in (("sae", sae), ("transcoder", transcoder)):
            if kind == "sae":
                coder.encoder.threshold.fill_(0.1)
            save_checkpoint(tmp_path / name / kind, coder, own)
    for format, kind in (("saelens", "sae"), ("saelens", "transcoder"), ("circuit-tracer", "transcoder")):
        export(format, (str(tmp_path / "llama" / kind),), tmp_path / format / kind)
        for checkpoint, named in (("gemma2", ""), ("llama", "hf:gemma2")):
            with pytest.raises(
                ValueError, match=r"^('blocks.\d.hook_mlp_out' of 'Gemma2Config' holds what|[^\n]* was trained on)"
            ):
                export(format, (str(tmp_path / checkpoint / kind),), tmp_path / "refused", named)
    export("dictionary_learning", (str(tmp_path / "gemma2" / "sae"),), tmp_path / "dl")  # names the module itself
    import_("dictionary_learning", str(tmp_path / "dl"), tmp_path / "nobody's")
    with pytest.raises(
        ValueError, match="^saelens names hooks, which are other tensors on some models: name the --target"
    ):
        export("saelens", (str(tmp_path / "nobody's"),), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(interop, "load_target", None)
    import_("saelens", str(tmp_path / "saelens" / "sae"), tmp_path / "back")
    export("saelens", (str(tmp_path / "back"),), tmp_path / "again")  # by the names that it came with
    for reference, form in ((str(tmp_path / "saelens" / "sae"), "saelens"), (str(tmp_path / "back"), "")):
        assert len(load_coders(reference, llama, form, Place())) == 1
        with pytest.raises(
            ValueError, match="'blocks.1.hook_mlp_out' of 'Gemma2Config' holds what comes behind a norm"
        ) as line:
            load_coders(reference, gemma2, form, Place())
        assert "\n" not in str(line.value)


@pytest.mark.parametrize("kind", [tf.LlamaConfig, tf.Gemma2Config])
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_of_the_normalised_stream_takes_in_the_norms_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[tf.PretrainedConfig], skip: bool
) -> None:
    """Where its hook_mlp_out is the MLP's own; measured as it lies there and imported, it computes the same on x = gain ⊙ h."""
    target = random_target(kind)
    theirs = transcoders([1], Relu(0.0), skip=skip)[0]
    save_checkpoint(tmp_path / "own", theirs, dataclasses.replace(record(target), hooks=hook_points(theirs.config)))
    export("saelens", (str(tmp_path / "own"),), tmp_path / "saelens")
    file = tmp_path / "saelens" / "cfg.json"
    file.write_text(file.read_text().replace("blocks.1.mlp.hook_in", "blocks.1.ln2.hook_normalized"))
    monkeypatch.setattr(interop, "load_target", lambda name, device: target)
    reference = str(tmp_path / "saelens")
    if kind is tf.Gemma2Config:
        with pytest.raises(ValueError, match="hook_mlp_out' of 'Gemma2Config' holds what comes behind a norm"):
            import_("saelens", reference, tmp_path / "back", target="here")
        return
    with pytest.raises(ValueError, match="lacks the norm's gain: name the --target that has it$"):
        import_("saelens", reference, tmp_path / "back")
    import_("saelens", reference, tmp_path / "back", target="here")
    gain = target.model.get_submodule(target.mlps[1].read).weight
    h = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(h).y_hat
        for found in (
            load_coders(reference, target, "saelens", Place()),
            load_coders(str(tmp_path / "back"), target, "", Place()),
        ):
            torch.testing.assert_close(found[0].coder(gain * h).y_hat, expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(found[0].coder(h).y_hat, expected, atol=0.01)
        target.model.get_submodule(target.mlps[1].read).weight[3] = 0
    with pytest.raises(ValueError, match="^1 gains of the norm before layer 1's MLP are 0: what it normalised is lost"):
        load_coders(reference, target, "saelens", Place())


def test_what_does_not_fit_is_refused_in_one_line(
    checkpoints: dict[str, str], small_target: TargetModel, tmp_path: Path
) -> None:
    deep = build_transcoder(EncoderConfig(layer=7, d_in=D, d_out=D, d_dict=32, rule=BatchTopK(4)), torch.Generator())
    wide = build_transcoder(
        EncoderConfig(layer=0, d_in=D + 1, d_out=D + 1, d_dict=32, rule=BatchTopK(4)), torch.Generator()
    )
    for name, coder, fingerprint in (("deep", deep, None), ("wide", wide, None), ("other", deep, "elsewhere")):
        save_checkpoint(tmp_path / name, coder, record(small_target, fingerprint))
    for name, message in (
        ("deep", "is for layer 7"), ("wide", "reads 17 dimensions"), ("other", "was trained on"), ("none", "holds no"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            measure.main((str(tmp_path / name),), tokens=320, points=tmp_path / "points.csv")
    with pytest.raises(ValueError, match="at least one checkpoint"):
        measure.main((), points=tmp_path / "points.csv")
    assert not (tmp_path / "points.csv").exists()


def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "load_target", None)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    plt = checkpoints["plt0"]
    for names, options, says in (
        ((plt, plt), {}, "was named 2 times"), ((plt,), {"layer": 1}, "--layer and --site are of foreign dictionaries"),
        ((plt,), {"site": "resid"}, "--layer and --site are of foreign dictionaries"),
        ((plt,), {"top_k": (4, 0)}, "--top-k 0: a token needs"), ((plt,), {"points": tmp_path}, "is a folder: name a file in it"),
        ((plt,), {"points": tmp_path / "other.csv"}, "column 'a' of a ParetoPoint is unknown"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            measure.main(names, **{"points": tmp_path / "points.csv"} | options)


def test_a_protocol_named_twice_is_measured_once(checkpoints: dict[str, str], tmp_path: Path) -> None:
    points = tmp_path / "points.csv"
    measure.main((checkpoints["plt0"],), tokens=320, protocols=("free", "free"), points=points)
    assert [p.method for p in read_points(points)] == ["transcoder", "affine", "identity", "zero", "mean"]


def test_the_command_line_says_one_line_and_fails() -> None:
    with pytest.raises(ValueError, match=r"^unknown target 'nonesuch': use one of [^\n]*$"):
        command_line(measure.main, "measure.py", ["nowhere", "--target", "nonesuch"])


def test_what_is_measured_can_be_looked_at(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours, decompositions and foreign dictionaries are on one page each, all units of them."""
    page, folder = tmp_path / "features.html", tmp_path / "foreign"
    command_line(features.main, "features.py", [*checkpoints.values(), "--tokens", "320", "--output", str(page)])
    ours = page.read_text(encoding="utf-8")
    groups = [("transcoder k=4", "latents", 32)] * 2 + [("clt k=4", "latents", 32)] * 2
    assert shown(ours) == groups + [("spd", "c_fc", 12), ("spd", "down_proj", 12)] * 2
    assert "open it in a browser" in capsys.readouterr().out
    export("circuit-tracer", (checkpoints["clt"],), folder, "tiny")
    command_line(
        features.main,
        "features.py",
        [str(folder), "--format", "circuit-tracer", "--tokens", "320", "--output", str(page)],
    )
    assert [(part, n) for _, part, n in shown(page.read_text(encoding="utf-8"))] == [("latents", 32)] * 2
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        features.main((checkpoints["clt"],), output=tmp_path)


def shown(page: str) -> list[tuple[str, str, int]]:
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    return [(group["method"], group["part"], group["n"]) for group in json.loads(data)["groups"]]
