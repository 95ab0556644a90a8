"""Experiment 018: the planted circuit computes what is said, the scores tell its path from a lookup, and the script runs."""

import itertools
import runpy
import sys
from pathlib import Path

import pytest
import torch
from path_methods import CoderMethod, Method, Reading, TargetMethod
from path_scores import PathScores, matched, run, scores
from planted_circuit import BITS, GATES, INPUTS, OUTPUT, PlantedBatches, PlantedStack, activity
from planted_controls import exact_transcoders, lookup_clt
from planted_training import CODERS, Budget, train_coders
from torch import Tensor

from coder_replacements import CLTReplacement, TranscoderReplacement
from config import BatchTopK, JumpReLU
from logs import read_csv

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_018_planted_paths" / "planted_paths.py"


@pytest.fixture(scope="module")
def target() -> PlantedStack:
    return PlantedStack([3])


@pytest.fixture(scope="module")
def inputs(target: PlantedStack) -> Tensor:
    return next(PlantedBatches(target, 2048, 1))


def of_coders(replacement: TranscoderReplacement | CLTReplacement, target: PlantedStack) -> CoderMethod:
    return CoderMethod(replacement, target.basis[0, OUTPUT])


def test_the_circuit_computes_its_gates_on_every_input(target: PlantedStack) -> None:
    bits = torch.zeros(1, 2**BITS, INPUTS)
    bits[0, :, :BITS] = torch.tensor(list(itertools.product((0.0, 1.0), repeat=BITS)))
    true = activity(target, target.embed(bits))
    b = bits[0, :, :BITS].bool()
    xors = b[:, 0::2] ^ b[:, 1::2]
    ands = xors[:, 0::2] & xors[:, 1::2]
    for layer, gates in enumerate((xors, ands, ands.all(1, keepdim=True))):
        on = true.outputs[layer] @ target.basis[0, list(GATES[layer])].T
        assert torch.allclose(on, gates.float(), atol=1e-5)
    assert torch.allclose(target(target.embed(bits))[0], true.inputs[2] + true.outputs[2], atol=1e-5)


def faithful(own: PathScores) -> bool:
    return (
        own.mediation == pytest.approx(1, abs=1e-4)
        and own.bypass == pytest.approx(0, abs=1e-4)
        and own.one_hop == pytest.approx(0, abs=1e-4)
    )


def test_an_exact_dictionary_is_faithful_and_recalls_every_neuron(target: PlantedStack, inputs: Tensor) -> None:
    for method in (
        TargetMethod(target),
        of_coders(TranscoderReplacement(exact_transcoders(target)), target),
    ):
        own = scores(method, target, inputs)
        assert faithful(own) and own.fvu < 1e-8 and own.accuracy == 1 and own.local_fvu < 1e-8
        assert own.recall == own.deep_recall == 1
        assert own.l0 == pytest.approx((2 + 0.5 + 1 / 16 + 6 / 16) / 3, abs=0.05)


def test_a_lookup_behaves_as_well_and_is_not_faithful(target: PlantedStack, inputs: Tensor) -> None:
    own = scores(of_coders(CLTReplacement(lookup_clt(target)), target), target, inputs)
    assert own.fvu < 1e-8 and own.accuracy == 1 and own.local_fvu < 1e-8
    assert own.one_hop == pytest.approx(1, abs=1e-6) and own.bypass == pytest.approx(1, abs=1e-4)
    assert max(abs(own.mediation_0), abs(own.mediation_1)) < 1e-6
    assert own.recall == pytest.approx(8 / 11) and own.deep_recall == 0


class Mixed(Method):
    """A share of y by lookup, the rest by the path: what the scores must tell apart by degree."""

    def __init__(self, target: PlantedStack, share: float) -> None:
        u_y = target.basis[0, OUTPUT]
        lookup = of_coders(CLTReplacement(lookup_clt(target)), target)
        self.methods, self.u_y, self.share = (TargetMethod(target), lookup), u_y, share

    def begin(self):
        path, lookup = (method.begin() for method in self.methods)

        def read(layer: int, r: Tensor) -> Reading:
            a, b = path(layer, r), lookup(layer, r)
            blend = torch.lerp(a.y_hat, b.y_hat, self.share) if layer == 2 else a.y_hat
            return Reading(blend, torch.lerp(a.direct, b.direct, self.share), a.fires, a.l0)

        return read


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_scores_move_with_the_share_that_is_looked_up(share: float, target: PlantedStack, inputs: Tensor) -> None:
    own = scores(Mixed(target, share), target, inputs)
    assert own.fvu < 1e-8
    assert own.mediation == pytest.approx(1 - share**2, abs=1e-4)  # Δ is 1 − share of what it should be
    assert own.bypass == pytest.approx(share, abs=1e-4) and own.one_hop == pytest.approx(share, abs=1e-4)


def test_setting_gates_changes_nothing_else(target: PlantedStack, inputs: Tensor) -> None:
    method, r = TargetMethod(target), inputs[0]
    z = activity(target, inputs).outputs[0] @ target.basis[0, list(GATES[0])].T
    assert torch.allclose(run(method, target, r, 0, z).y, run(method, target, r).y, atol=1e-5)
    none = run(method, target, r, 0, torch.zeros_like(z))
    assert none.y.abs().max() < 1e-5 and torch.equal(none.readings[0].y_hat, run(method, target, r).readings[0].y_hat)


def test_a_part_is_matched_to_one_neuron_alone() -> None:
    neurons = torch.tensor([[1, 1], [1, 1], [0, 0], [0, 0]]).bool()
    assert matched(neurons[:, :1], neurons) == 1 and matched(neurons, neurons) == 2
    assert matched(torch.tensor([[1], [0], [0], [0]]).bool(), neurons) == 0  # F1 ⅔


SMALL = "--method exact lookup transcoder clt-own_layer spd --seeds 2 --steps 12 --spd-steps 2 --inputs 256".split()
ASKED = "--l0-penalty 0.1 --top-k 4 --minimality 1e-4".split()


@pytest.mark.slow
def test_it_runs_from_its_command_line_and_measures_what_the_table_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--output", str(tmp_path)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return read_csv(tmp_path / "points.csv")

    rows = call(*SMALL, *ASKED)
    sets = [(row["method"], row["rule"]) for row in rows if row["seed"] == "0"]
    assert sets == [("exact", "by hand"), ("lookup", "by hand"), ("transcoder", "l0 0.1"), ("transcoder", "k 4"),
                    ("clt-own_layer", "l0 0.1"), ("spd", "minimality 0.0001")]  # fmt: skip
    assert [row["seed"] for row in rows] == ["0", "1"] * 6
    more = call(*SMALL, *ASKED[:4], "--minimality", "1e-3")
    assert more[:12] == rows and [row["rule"] for row in more[12:]] == ["minimality 0.001"] * 2
    readme = (tmp_path / "README.md").read_text()
    assert readme.count("| exact | by hand | 2 |") == 1
    (tmp_path / "paths.png").unlink()
    call("--replot")
    assert (tmp_path / "README.md").read_text() == readme
    assert {file.name for file in tmp_path.iterdir()} == {"points.csv", "settings.json", "paths.png", "README.md"}


def test_decoders_to_later_layers_stay_zero_in_training(target: PlantedStack) -> None:
    rule = JumpReLU(l0=0.1, bandwidth=2.0)
    method = train_coders("clt-own_layer", rule, target, Budget(steps=3), 0)
    assert isinstance(method, CoderMethod) and isinstance(method.replacement, CLTReplacement)
    for W_dec in method.replacement.coder.W_dec:
        assert W_dec[:, :64].abs().max() > 0 and not W_dec[:, 64:].any()


def test_encoders_that_are_frozen_stay_what_they_were_drawn_as(target: PlantedStack) -> None:
    rule, budget = BatchTopK(4), Budget(steps=3)
    (before,), method = (
        CODERS["clt-frozen_encoder"](rule, budget, 0),
        train_coders("clt-frozen_encoder", rule, target, budget, 0),
    )
    after = method.replacement.coder  # type: ignore[attr-defined]
    assert all(torch.equal(a.W_enc, b.W_enc) for a, b in zip(before.encoders, after.encoders))
    assert all(W_dec.any() for W_dec in after.W_dec)
