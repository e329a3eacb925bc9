"""Packed attention against transformers' own, one unpacked sequence at a time."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qarl.kernels.attention import attention
from qarl.trainer.attention import PACKED, packed_attention, positions

LENGTHS = [5, 1, 12, 3]


@pytest.mark.parametrize("reference", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_packed_model_equals_unpacked_transformers(models, kind, reference):
    packed = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float64, attn_implementation=PACKED)
    plain = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float64, attn_implementation=reference)
    if kind == "moe":  # grouped products have no float64
        packed.set_experts_implementation("eager")
        plain.set_experts_implementation("eager")
    tokens = torch.randint(48, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    arguments = {"position_ids": positions(LENGTHS), "sequence_lengths": LENGTHS, "use_cache": False}
    ours = packed(tokens, **arguments).logits[0]
    theirs = torch.cat([plain(part, use_cache=False).logits[0] for part in tokens.split(LENGTHS, dim=1)])
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)  # norms and rotations are float32 in both
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, a), b in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-5 * b.grad.abs().max().item(), rtol=0), name


def test_a_sequence_does_not_see_its_neighbours(models):
    model = AutoModelForCausalLM.from_pretrained(models["dense"], attn_implementation=PACKED)
    tokens = torch.arange(sum(LENGTHS))[None]
    other = tokens.clone()
    other[0, 6:18] += 1  # the third sequence
    arguments = {"position_ids": positions(LENGTHS), "sequence_lengths": LENGTHS, "use_cache": False}
    with torch.no_grad():
        a, b = (model(t, **arguments).logits[0] for t in (tokens, other))
    assert torch.equal(a[:6], b[:6]) and torch.equal(a[18:], b[18:]) and not torch.allclose(a[6:18], b[6:18])


def test_lengths_that_do_not_add_up_are_refused():
    q = torch.zeros(1, 2, 7, 4)
    with pytest.raises(ValueError, match="whole sequences"):
        packed_attention(attention, q, q, q, None, [3, 3], None)
