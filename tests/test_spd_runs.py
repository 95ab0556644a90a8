"""Goodfire's run directories, written here in their exact layout at small size, read back for every kind of gate."""

import dataclasses
from pathlib import Path

import pytest
import torch
from run_layouts import LAYOUTS, current, inside, write_run
from small import make_tiny

import checkpoints
from checkpoints import TrainingRecord, save_checkpoint
from config import GateConfig, SPDConfig
from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise
from spd_model import ComponentModel
from spd_runs import find_spd, latest_checkpoint, load_spd_run

GATES = [
    GateConfig(kind="mlp", hidden=(5,)),
    GateConfig(kind="vector_mlp", hidden=(5,)),
    GateConfig(kind="shared_mlp", hidden=(5, 4)),
    GateConfig(kind="global_shared_mlp", hidden=(5,)),
    GateConfig(kind="global_shared_transformer", hidden=(16,), d_model=8, blocks=2, heads=2, causal=False),
]
PATTERNS = (("h.*.mlp.c_fc", 6), ("h.*.mlp.down_proj", 5), ("h.1.attn.q_proj", 3))
TOKENS = torch.arange(14).view(2, 7)


def target() -> LlamaSimpleMLP:
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(8, 17, 2, 2, 8, 12, 2))
    initialise(model, torch.Generator().manual_seed(1))
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gate_and_layout_is_read_back(tmp_path: Path, gate: GateConfig, layout: str) -> None:
    model = ComponentModel(target(), SPDConfig(components=PATTERNS, gate=gate), torch.Generator().manual_seed(2))
    loaded = load_spd_run(str(write_run(tmp_path / "run", LAYOUTS[layout](model), gate)), target())
    assert loaded.config.gate == gate and loaded.sizes == model.sizes
    ours, theirs = (m.importance_logits(m.inputs_capture(TOKENS)[0]) for m in (model, loaded))
    for path in ours:
        torch.testing.assert_close(theirs[path], ours[path], atol=0, rtol=0)
        torch.testing.assert_close(loaded.components[path].U, model.components[path].U, atol=0, rtol=0)


def test_latest_checkpoint_is_that_of_the_largest_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write_run(tmp_path, {}, GATES[0], step)
    assert latest_checkpoint(tmp_path).name == "model_100.pth"


def test_a_biased_module_keeps_its_bias_where_the_run_stores_components_alone(tmp_path: Path) -> None:
    def biased() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 3)).requires_grad_(False)

    own, other = biased(), biased()
    other.load_state_dict(own.state_dict())
    model = ComponentModel(own, SPDConfig(components=(("0", 5),), gate=GATES[0]), torch.Generator().manual_seed(2))
    loaded = load_spd_run(str(write_run(tmp_path, inside(model), GATES[0])), other)
    assert torch.equal(loaded.components["0"].bias, own[0].bias)


def test_a_run_without_its_targets_weights_proves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, unless it is taken at somebody's word; weights that differ are refused whatever the word."""
    model = ComponentModel(target(), SPDConfig(components=PATTERNS, gate=GATES[0]), torch.Generator().manual_seed(2))
    for name in ("all", "ln_f.weight"):
        state = {
            k: v
            for k, v in current(model).items()
            if not k.startswith("target_model.") or not (name == "all" or name in k)
        }
        run = str(write_run(tmp_path / name, state, GATES[0]))
        with pytest.raises(ValueError, match="cannot prove that it decomposes this model; --unproven-target"):
            load_spd_run(run, target())
        assert load_spd_run(run, target(), unproven=True).sizes == model.sizes
        said = capsys.readouterr().err
        assert "cannot prove" in said and said.count("\n") == 1
    other = target()
    other.h[0].mlp.c_fc.weight.add_(1)
    with pytest.raises(ValueError, match="c_fc.weight' differs"):
        load_spd_run(run, other, unproven=True)


def test_a_run_among_the_targets_checkpoints_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the layers it decomposes, and beside our own."""
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    tiny = make_tiny(2)
    here = checkpoints.checkpoint_folder(tiny.name)
    with pytest.raises(ValueError, match="there is none"):
        find_spd(tiny, [0])
    for layer in range(2):
        config = SPDConfig(components=((f"h.{layer}.mlp.*", 6),), gate=GATES[0])
        model = ComponentModel(tiny.model, config, torch.Generator().manual_seed(layer))
        if layer == 0:
            write_run(here / "s-12345678", current(model), GATES[0])
        else:
            model = ComponentModel(
                tiny.model, SPDConfig(components=tuple(model.sizes.items()), gate=GATES[0]), torch.Generator()
            )
            record = TrainingRecord.imported("own", tiny.name)
            save_checkpoint(here / "x_spd_x", model, dataclasses.replace(record, target_fingerprint=tiny.fingerprint))
    first, second = find_spd(tiny, [0]), find_spd(tiny, [1])
    assert first.model.paths == ["h.0.mlp.c_fc", "h.0.mlp.down_proj"] and first.record.train_tokens is None
    assert second.model.paths == ["h.1.mlp.c_fc", "h.1.mlp.down_proj"] and second.record.name == "own"
    with pytest.raises(ValueError, match="s-12345678"):
        find_spd(tiny, [])


def test_bad_runs_are_refused_in_one_line(tmp_path: Path) -> None:
    model = ComponentModel(target(), SPDConfig(components=PATTERNS, gate=GATES[0]), torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match="not an SPD run"):
        load_spd_run(str(tmp_path), target())
    run = write_run(tmp_path / "run", current(model), GATES[0])
    other = target()
    other.h[0].mlp.c_fc.weight.add_(1)
    with pytest.raises(ValueError, match="c_fc.weight' differs"):
        load_spd_run(str(run), other)
    with pytest.raises(ValueError, match="does not have"):
        load_spd_run(str(run), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    (run / "model_500.pth").write_bytes((run / "model_400.pth").read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        load_spd_run(str(run), target())
    (run / "model_500.pth").unlink()
    for text, says in (("{", "is no YAML"), ("", "holds no settings but None")):
        (run / "final_config.yaml").write_text(text)
        with pytest.raises(ValueError, match=says) as error:
            load_spd_run(str(run), target())
        assert "\n" not in str(error.value)
    odd = {k.replace("_ci_fns.", "_global_ci_fn._reader."): v for k, v in current(model).items()}
    with pytest.raises(ValueError, match="kind of gate"):
        load_spd_run(str(write_run(tmp_path / "odd", odd, GATES[0])), target())
