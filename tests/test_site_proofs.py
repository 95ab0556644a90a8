"""What a target's other sites are is proven as its MLPs are: of every family, and refused where it does not hold."""

from collections.abc import Callable

import pytest
import torch
from small import make_tiny, some_tokens, word_tokenizer
from test_target_models import BEHIND_A_NORM_OR_FACTOR, FAMILIES, TOKENS, family_model
from torch import nn

from patching import capture, patched
from target_models import Loaded, TargetModel, at_site, make_target, written
from token_stream import DatasetSpec


def family_target(name: str) -> TargetModel:
    return make_target(name, Loaded(family_model(name), word_tokenizer(), 16, DatasetSpec("python")), "cpu")


def without_mlps(target: TargetModel):
    return patched(target, {layer: lambda _x, y: torch.zeros_like(y) for layer in range(target.n_layers)})


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_zeroed_attention_takes_its_output_from_the_stream(family: str) -> None:
    """Or what a norm or factor behind it makes of that; nothing is left then of a block whose MLP is zeroed too."""
    target = family_target(family)
    view = at_site(target, "attn_out")
    with without_mlps(target):
        layers = written(view)
    for before, (_, y, stream, added) in zip([None, *layers], layers):
        assert y.abs().max() > 0.01
        assert torch.allclose(added, y, atol=1e-5) == (family not in BEHIND_A_NORM_OR_FACTOR)
        if before is not None:
            torch.testing.assert_close(stream - added, before.stream)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_stream_captured_is_what_the_next_block_is_given(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_BF16", "off")
    target, given = family_target(family), []
    path = target.mlps[1].read.rpartition(".")[0]
    handle = target.model.get_submodule(path).register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    captured = capture(at_site(target, "resid"), TOKENS, [0])
    target.logits(TOKENS)
    handle.remove()
    assert torch.equal(given[-1], captured.outputs[0])


def attention_that_adds_the_stream(block: nn.Module) -> None:
    """As BLOOM's does."""
    own, stream = block.attn.forward, []
    block.attn.forward = lambda x: own(x) + stream[-1]

    def forward(h: torch.Tensor) -> torch.Tensor:
        stream.append(h)
        s = block.attn(block.rms_1(h))
        return s + block.mlp(block.rms_2(s))

    block.forward = forward


def attention_that_multiplies(block: nn.Module) -> None:
    block.forward = lambda h: (s := h * (1 + block.attn(block.rms_1(h)))) + block.mlp(block.rms_2(s))


def attention_beside_another_branch(block: nn.Module) -> None:
    block.forward = lambda h: (s := h + block.attn(block.rms_1(h)) + 0.1 * h.tanh()) + block.mlp(block.rms_2(s))


def attention_that_adds_over_positions(block: nn.Module) -> None:
    block.forward = lambda h: (s := h + block.attn(block.rms_1(h)).cumsum(1)) + block.mlp(block.rms_2(s))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (attention_that_adds_the_stream, "h.1.attn does not write what its block adds to the residual stream"),
        (attention_beside_another_branch, "h.1.attn does not write what its block adds to the residual stream"),
        (attention_that_multiplies, "h.1.attn does not add what it writes to the residual stream"),
        (attention_that_adds_over_positions, "h.1.attn does not add what it writes to the residual stream"),
    ],
)
def test_a_block_that_uses_its_attention_otherwise_is_refused(break_it: Callable[[nn.Module], None], says: str) -> None:
    target = make_tiny()
    break_it(target.model.h[1])
    with pytest.raises(ValueError, match=f"^{says}: this block's layout is not supported$"):
        at_site(target, "attn_out")
    at_site(target, "resid")


def test_blocks_with_something_between_them_are_refused() -> None:
    target = make_tiny()
    whole = target.model.forward

    def forward(tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        h = target.model.wte(tokens)
        for block in target.model.h:
            h = 1.5 * block(h)
        return target.model.lm_head(target.model.ln_f(h)), None

    target.model.forward = forward
    assert target.logits(some_tokens()).shape == whole(some_tokens())[0].shape
    for site in ("attn_out", "resid"):
        with pytest.raises(ValueError, match="^h.1 is not given what the block before it writes: [^\\n]*$"):
            at_site(target, site)


def test_a_proof_leaves_no_hook_behind() -> None:
    target = make_tiny()
    for site in ("attn_out", "resid"):
        at_site(target, site)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.model.modules())
