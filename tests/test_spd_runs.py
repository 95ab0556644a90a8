"""Goodfire's run directories, written here in their exact layout at small size, read back for every kind of gate."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from run_layouts import LAYOUTS, current, inside, legacy_settings, settings, write_run
from small import make_tiny
from torch import Tensor

import checkpoints
from checkpoints import TrainingRecord, save_checkpoint
from config import GateConfig, SPDConfig
from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise
from spd_masks import Mask
from spd_model import ComponentModel
from spd_runs import GateInputs, find_spd, latest_checkpoint, load_spd_run

GATES = [
    GateConfig(kind="mlp", hidden=(5,)),
    GateConfig(kind="vector_mlp", hidden=(5,)),
    GateConfig(kind="shared_mlp", hidden=(5, 4)),
    GateConfig(kind="global_shared_mlp", hidden=(5,)),
    GateConfig(kind="global_shared_transformer", hidden=(16,), d_model=8, blocks=2, heads=2, causal=False),
    GateConfig(
        kind="global_shared_transformer", hidden=(16,), d_model=8, blocks=2, heads=2, causal=False, norm_inputs=False
    ),
]
NORMED, RAW = GATES[-2:]
PATTERNS = (("h.*.mlp.c_fc", 6), ("h.*.mlp.down_proj", 5), ("h.1.attn.q_proj", 3))
TOKENS = torch.arange(14).view(2, 7)


def target() -> LlamaSimpleMLP:
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(8, 17, 2, 2, 8, 12, 2))
    initialise(model, torch.Generator().manual_seed(1))
    return model.requires_grad_(False).eval()


def decomposed(gate: GateConfig) -> ComponentModel:
    """With every parameter at random, biases too."""
    model = ComponentModel(target(), SPDConfig(components=PATTERNS, gate=gate), torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def word(gate: GateConfig) -> GateInputs | None:
    """What the user has to say of a run with such a gate."""
    return None if gate.kind != "global_shared_transformer" else "normed" if gate.norm_inputs else "raw"


def restated_rope(x: Tensor) -> Tensor:
    """x: (seq, head); position t turns the pair (i, i + half) by t / 10000^(i / half)."""
    seq, head = x.shape
    half = head // 2
    out = torch.empty_like(x)
    for t in range(seq):
        for i in range(half):
            angle = torch.tensor(t / 10_000 ** (i / half))
            a, b = x[t, i], x[t, i + half]
            out[t, i], out[t, i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def restated_mlp(x: Tensor, state: dict[str, Tensor], stem: str) -> Tensor:
    """x W + b and a GELU between, of the tensors `stem`0, `stem`2, … as they stand in the file."""
    last = max(int(key.removeprefix(stem).split(".")[0]) for key in state if key.startswith(stem))
    for i in range(0, last + 1, 2):
        W, b = state[f"{stem}{i}.W"], state[f"{stem}{i}.b"]
        x = x @ W + b if W.ndim == 2 else torch.einsum("...cd,cde->...ce", x, W) + b
        x = x if i == last else torch.nn.functional.gelu(x)
    return x


def restated_transformer(state: dict[str, Tensor], read: list[Tensor], gate: GateConfig) -> Tensor:
    """The gate of spd 85c6b702, and without its norm of inputs that of the days before; one sequence at a time."""
    stem, z = "ci_fn._global_ci_fn.", []
    for sequence in zip(*read):
        x = torch.cat([rms(x) if gate.norm_inputs else x for x in sequence], -1)
        x = x @ state[f"{stem}_input_projector.W"] + state[f"{stem}_input_projector.b"]
        for n in range(gate.blocks):
            block, h = f"{stem}_blocks.{n}.", rms(x)
            q, k, v = (h @ state[f"{block}attn.{name}_proj.weight"].T for name in "qkv")
            heads = []
            for own_q, own_k, own_v in zip(*(part.chunk(gate.heads, -1) for part in (q, k, v))):
                scores = restated_rope(own_q) @ restated_rope(own_k).T / own_q.shape[-1] ** 0.5
                heads.append(scores.softmax(-1) @ own_v)
            x = x + torch.cat(heads, -1) @ state[f"{block}attn.out_proj.weight"].T
            x = x + restated_mlp(rms(x), state, f"{block}mlp.")
        z.append(x @ state[f"{stem}_output_head.W"] + state[f"{stem}_output_head.b"])
    return torch.stack(z)


def restated(state: dict[str, Tensor], inputs: dict[str, Tensor], gate: GateConfig) -> dict[str, Tensor]:
    """z of every module from the tensors of a run in the layout of dev."""
    names, stem = sorted(inputs), "ci_fn._ci_fns."
    parts = {name: state[f"_components.{name.replace('.', '-')}.V"] for name in names}
    if not gate.local:
        read = [inputs[name] for name in names]
        together = restated_transformer(state, read, gate) if gate.d_model else restated_mlp(
            torch.cat(read, -1), state, "ci_fn._global_ci_fn.layers.")  # fmt: skip
        return dict(zip(names, together.split([V.shape[1] for V in parts.values()], -1)))
    z = {}
    for name, V in parts.items():
        own = f"{stem}{name.replace('.', '-')}.layers."
        x = inputs[name]
        if gate.kind == "mlp":
            x = (x @ V)[..., None]
        if gate.kind == "vector_mlp":
            x = x[..., None, :].expand(*x.shape[:-1], V.shape[1], x.shape[-1])
        out = restated_mlp(x, state, own)
        z[name] = out if gate.kind == "shared_mlp" else out[..., 0]
    return z


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.kind}-{gate.norm_inputs}")
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_gate_and_layout_is_read_as_a_plain_restatement_reads_it(
    tmp_path: Path, gate: GateConfig, layout: str
) -> None:
    """Importances, and what the target computes with its modules masked by them."""
    model, plain = decomposed(gate), target()
    state = LAYOUTS["dev"](model)
    run = write_run(tmp_path / "run", LAYOUTS[layout](model), gate)
    loaded = load_spd_run(str(run), plain, gate_inputs=word(gate))
    assert loaded.config.gate == gate and loaded.sizes == model.sizes
    inputs, _ = loaded.inputs_capture(TOKENS)
    z, expected = loaded.importance_logits(inputs), restated(state, inputs, gate)
    assert z.keys() == expected.keys() == {*model.sizes}
    for path in z:
        torch.testing.assert_close(z[path], expected[path], atol=1e-5, rtol=1e-4)
    ours = loaded.run_masked({path: Mask(loaded.lower(z[path]), None) for path in z}, TOKENS)

    def component_map(path: str):
        V, U = (state[f"_components.{path.replace('.', '-')}.{name}"] for name in "VU")
        return lambda _module, args, _output: (args[0] @ V * expected[path].clamp(0, 1)) @ U

    for path in model.paths:
        plain.get_submodule(path).register_forward_hook(component_map(path))
    torch.testing.assert_close(ours, plain(TOKENS)[0], atol=1e-5, rtol=1e-4)


def test_whether_a_gate_norms_its_inputs_is_known_or_said_and_never_guessed(tmp_path: Path) -> None:
    """The published runs are known by their id, on W&B and in a folder; the user's word counts before."""
    state = LAYOUTS["dev"](decomposed(NORMED))
    for name in ("s-275c8f21", "goodfire--spd--s-275c8f21", "run"):
        run = str(write_run(tmp_path / name, state, NORMED))
        with pytest.raises(ValueError, match=f"^nothing in {name} says [^\n]*--gate-inputs normed [^\n]* or raw$"):
            load_spd_run(run, target())
        assert load_spd_run(run, target(), gate_inputs="normed").config.gate == NORMED
        assert load_spd_run(run, target(), gate_inputs="raw").config.gate == RAW
    for name in ("s-55ea3f9b", "goodfire--spd--s-55ea3f9b", "goodfire--spd--s-266cb440"):
        run = str(write_run(tmp_path / name, state, NORMED))
        assert load_spd_run(run, target()).config.gate == NORMED
        assert load_spd_run(run, target(), gate_inputs="raw").config.gate == RAW
    local = str(write_run(tmp_path / "local", LAYOUTS["dev"](decomposed(GATES[0])), GATES[0]))
    with pytest.raises(ValueError, match="^local has no transformer gate: --gate-inputs raw says nothing of it$"):
        load_spd_run(local, target(), gate_inputs="raw")


def changed(gate: GateConfig, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Settings of a run with one value put in; a path names its sections."""
    said = settings(gate)
    section = said
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return said


CI, TRANSFORMER = "ci_config", "simple_transformer_ci_cfg"
WRONG_SETTINGS: list[tuple[GateConfig, tuple[str, ...], Any, str]] = [
    (GATES[0], ("sigmoid_type",), "normal", "sigmoid_type is 'normal': only leaky_hard and hard are known here"),
    (GATES[0], (CI, "fn_type"), "vector_mlp", "fn_type is 'vector_mlp', but the tensors are those of 'mlp'"),
    (GATES[0], (CI, "layernorm"), True, "unknown key 'layernorm' in ci_config"),
    (GATES[0], (CI,), [], r"ci_config is \[\], not a section"),
    (NORMED, (CI, TRANSFORMER), None, f"{TRANSFORMER} is None, not a section"),
    (NORMED, (CI, TRANSFORMER, "input_norm"), "layer", f"unknown key 'input_norm' in {TRANSFORMER}"),
    (NORMED, (CI, TRANSFORMER, "attn_config", "is_causal"), True, "unknown key 'is_causal' in attn_config"),
    (NORMED, (CI, TRANSFORMER, "attn_config", "rope_base"), 500.0, "rope_base is 500.0: only 10000 is known here"),
    (NORMED, (CI, TRANSFORMER, "attn_config", "n_heads"), None, "n_heads is None"),
    (
        NORMED,
        (CI, TRANSFORMER, "attn_config", "n_heads"),
        8,
        "n_heads is 8: the gate's width 8 has no so many even heads",
    ),
]


@pytest.mark.parametrize(("gate", "path", "value", "says"), WRONG_SETTINGS)
def test_settings_that_are_not_understood_are_refused_by_name(
    tmp_path: Path, gate: GateConfig, path: tuple[str, ...], value: Any, says: str
) -> None:
    state = LAYOUTS["dev"](decomposed(gate))
    run = write_run(tmp_path / "run", state, gate, said=changed(gate, path, value))
    with pytest.raises(ValueError, match=f"^final_config.yaml: [^\n]*{says}[^\n]*$"):
        load_spd_run(str(run), target(), gate_inputs=word(gate))


@pytest.mark.parametrize("gate", GATES[:3], ids=lambda gate: gate.kind)
def test_a_configuration_from_before_the_section_on_gates_is_read(tmp_path: Path, gate: GateConfig) -> None:
    state = LAYOUTS["legacy"](decomposed(gate))
    run = write_run(tmp_path / "run", state, gate, said=legacy_settings(gate))
    assert load_spd_run(str(run), target()).config.gate == gate
    run = write_run(tmp_path / "run", state, gate, said=legacy_settings(gate) | {"ci_fn_type": "odd"})
    with pytest.raises(ValueError, match="fn_type is 'odd'"):
        load_spd_run(str(run), target())


def test_tensors_that_are_not_understood_are_refused_by_name(tmp_path: Path) -> None:
    state = LAYOUTS["dev"](decomposed(NORMED))
    V, up = "_components.h-0-mlp-c_fc.V", "ci_fn._global_ci_fn._blocks.0.mlp.0.W"
    wrong: list[tuple[dict[str, Any], str]] = [
        (state | {"optimiser": torch.zeros(1)}, "'optimiser' is missing, extra or misshapen"),
        (state | {"target_model.h.0.mlp.gate.weight": torch.zeros(1)}, "'h.0.mlp.gate.weight', which the given target"),
        (state | {f"patched_model.{'wte.weight'}": torch.zeros(1)}, "holds 'target_model.wte.weight' twice"),
        ({k: v for k, v in state.items() if k != V}, f"'{V}' of the run is missing, or no matrix"),
        (state | {V: torch.zeros(3)}, f"'{V}' of the run is missing, or no matrix"),
        ({k: v for k, v in state.items() if k != up}, f"'{up.removeprefix('ci_fn.')}' of the run is missing"),
        (state | {V: torch.full_like(state[V], torch.nan)}, f"'{V}' holds NaN"),
        ({"model": state}, "something other than named tensors"),
    ]
    for i, (tensors, says) in enumerate(wrong):
        run = write_run(tmp_path / f"run_{i}", tensors, NORMED)
        with pytest.raises(ValueError, match=f"^[^\n]*{says}[^\n]*$"):
            load_spd_run(str(run), target(), gate_inputs="normed")
    constants = {
        "target_model.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "target_model.h.0.attn.rotary_sin": torch.ones(4),
    }
    run = write_run(tmp_path / "constants", state | constants, NORMED)
    assert load_spd_run(str(run), target(), gate_inputs="normed").config.gate == NORMED


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
    with pytest.raises(
        ValueError, match="c_fc.weight' differs from [^\n]*load its own target, wandb:[^\n]*t-9d2b8f02$"
    ):
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
