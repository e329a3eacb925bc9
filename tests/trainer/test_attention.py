"""Packed attention against transformers' own, one unpacked sequence at a time."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qarl.kernels.attention import attention
from qarl.records import MicroBatch
from qarl.trainer.attention import PACKED, _register, packed_attention, positions
from qarl.trainer.policy import Policy, to_tensors

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


def test_a_window_shorter_than_a_sequence_is_refused():
    q = torch.zeros(1, 2, 7, 4)
    for window in (None, 4, 7):
        packed_attention(lambda q, *_: q, q, q, q, None, [3, 4], None, sliding_window=window)
    with pytest.raises(ValueError, match="no window: 3 tokens of 4"):
        packed_attention(lambda q, *_: q, q, q, q, None, [3, 4], None, sliding_window=3)


def test_a_forward_of_the_policy_hands_lengths_to_the_kernels(models, monkeypatch):
    """Made once for all layers, on the device."""
    given = []

    def spy(q, k, v, lengths, scale, cu_seqlens):
        given.append((lengths, cu_seqlens))
        return attention(q, k, v, lengths, scale)

    _register("spied", spy)
    model = AutoModelForCausalLM.from_pretrained(models["dense"], attn_implementation="spied")
    tokens, prompts = np.arange(sum(LENGTHS), dtype=np.int32), np.array([2, 1, 4, 1], np.int32)
    responses = np.zeros(sum(LENGTHS) - prompts.sum(), np.float32)
    batch = MicroBatch(tokens, np.array(LENGTHS, np.int32), prompts, responses, responses, responses)
    packed = to_tensors(batch, torch.device("cpu"))
    policy = Policy(model, 1.0, 8)
    policy(packed)
    assert len(given) == model.config.num_hidden_layers
    assert all(lengths == LENGTHS and starts is packed.cu_seqlens for lengths, starts in given)
    assert packed.cu_seqlens.tolist() == [0, 5, 6, 18, 21]
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        policy(packed, 0.0)
