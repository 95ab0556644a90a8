"""Goodfire's run directories, written here in their exact layout at small size, read back for every kind of gate."""

from pathlib import Path

import pytest
import torch
import yaml

from config import GateConfig, SPDConfig
from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise
from spd_model import ComponentModel
from spd_runs import latest_checkpoint, load_spd_run

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


def current(model: ComponentModel, prefix: str = "") -> dict[str, torch.Tensor]:
    """Names of the main branch; with `ci_fn.` before the gates, those of dev."""
    own = {k if k.startswith("_components") else prefix + k: v for k, v in model.state_dict().items()}
    return own | {f"target_model.{k}": v for k, v in model.target_model.state_dict().items()}


def legacy(model: ComponentModel) -> dict[str, torch.Tensor]:
    own = {k.replace("_ci_fns.", "_gates."): v for k, v in model.state_dict().items()}
    weights = model.target_model.state_dict().items()
    return own | {f"patched_model.{k.replace('c_fc.weight', 'c_fc.original.weight')}": v for k, v in weights}


def write_run(folder: Path, state: dict[str, torch.Tensor], gate: GateConfig, step: int = 400) -> Path:
    folder.mkdir(exist_ok=True)
    ci = {"mode": "global" if not gate.local else "layerwise", "fn_type": gate.kind, "hidden_dims": list(gate.hidden)}
    ci["transformer_cfg"] = {"d_model": gate.d_model, "n_blocks": gate.blocks, "attn_config": {"n_heads": gate.heads}}
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"seed": 0, "ci_config": ci}))
    torch.save(state, folder / f"model_{step}.pth")
    return folder


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
@pytest.mark.parametrize("layout", ["main", "dev", "legacy"])
def test_every_gate_and_layout_is_read_back(tmp_path: Path, gate: GateConfig, layout: str) -> None:
    model = ComponentModel(target(), SPDConfig(components=PATTERNS, gate=gate), torch.Generator().manual_seed(2))
    state = legacy(model) if layout == "legacy" else current(model, "ci_fn." if layout == "dev" else "")
    loaded = load_spd_run(str(write_run(tmp_path / "run", state, gate)), target())
    assert loaded.config.gate == gate and loaded.sizes == model.sizes
    ours, theirs = (m.importance_logits(m.inputs_capture(TOKENS)[0]) for m in (model, loaded))
    for path in ours:
        torch.testing.assert_close(theirs[path], ours[path], atol=0, rtol=0)
        torch.testing.assert_close(loaded.components[path].U, model.components[path].U, atol=0, rtol=0)


def test_latest_checkpoint_is_that_of_the_largest_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write_run(tmp_path, {}, GATES[0], step)
    assert latest_checkpoint(tmp_path).name == "model_100.pth"


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
    odd = {k.replace("_ci_fns.", "_global_ci_fn._reader."): v for k, v in current(model).items()}
    with pytest.raises(ValueError, match="kind of gate"):
        load_spd_run(str(write_run(tmp_path / "odd", odd, GATES[0])), target())
