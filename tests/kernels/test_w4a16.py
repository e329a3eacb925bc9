"""int4: packing as compressed-tensors packs, the extremes of the grid, groups, and vLLM's CPU op."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.kernels import w8a8_int8_engine
from qarl.kernels.w4a16 import dequantize, pack, prepare, product, quantize, unpack


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_packing_is_that_of_compressed_tensors(seed: int, n: int, words: int) -> None:
    codes = torch.randint(-8, 8, (n, 8 * words), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(pack(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack(pack(codes)), unpack_from_int32(pack(codes), 4, codes.shape))
    assert torch.equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("code", [-8, -1, 0, 7])
def test_words_of_one_code(code: int) -> None:
    codes = torch.full((2, 3, 16), code, dtype=torch.int8)
    assert torch.equal(pack(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack(pack(codes)), codes)


def test_both_ends_of_the_grid_are_used() -> None:
    """absmax/7.5 puts -absmax on -7.5, which rounds to -8, and +absmax on 7.5, which is cut to 7."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1] = -3.75, 3.75
    codes = quantize(weight, 32)
    assert codes["weight_scale"].item() == 0.5
    assert unpack(codes["weight_packed"])[0, :3].tolist() == [-8, 7, 0]
    assert dequantize(codes, 32, torch.float32)[0, :3].tolist() == [-4.0, 3.5, 0.0]


def test_groups_have_scales_of_their_own() -> None:
    weight = torch.ones(1, 64)
    weight[0, 32:] = 100
    assert quantize(weight, 32)["weight_scale"].tolist() == [[0.1337890625, 13.3125]]
    assert quantize(weight, 64)["weight_scale"].tolist() == [[13.3125]]


@pytest.mark.parametrize("group", [48, 12, None, 0])
def test_a_group_that_does_not_fit_is_refused(group: int | None) -> None:
    with pytest.raises(ValueError, match=f"got group {group}, K 128"):
        quantize(torch.randn(4, 128), group)


@pytest.mark.skipif(w8a8_int8_engine.refusal("cpu", torch.float32) is not None, reason="vLLM's CPU build is not here")
@pytest.mark.parametrize("group", [32, 128])
def test_dequantized_weights_are_those_of_vllms_cpu_op(group: int) -> None:
    """Read off `cpu_gemm_wna16` with an identity input: every output is one weight, in bfloat16."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("this CPU build of vLLM has no cpu_gemm_wna16 (AVX2)")
    torch.manual_seed(0)
    n, k = 64, 256
    codes = quantize(torch.randn(n, k), group)
    unsigned = (unpack(codes["weight_packed"]).to(torch.int32) + 8).t().contiguous()
    blocks = pack_quantized_values_into_int32(unsigned, scalar_types.uint4b8, 1)  # as vLLM's layer repacks
    blocks = blocks.view(k, -1, 2).permute(1, 0, 2).reshape(-1, k * 2).contiguous()
    scales = codes["weight_scale"].t().contiguous()
    theirs = ops.cpu_gemm_wna16(torch.eye(k, dtype=torch.bfloat16), blocks, scales, None, None, 8, "vec")
    assert torch.equal(theirs.t(), dequantize(codes, group, torch.bfloat16))
    # A real product, in both: float32 sums in another order, rounded to bfloat16.
    x = torch.randn(9, k).bfloat16()
    y = product(x, prepare(codes, group, torch.bfloat16))
    theirs = ops.cpu_gemm_wna16(x, blocks, scales, None, None, 8, "vec")
    assert torch.allclose(y.float(), theirs.float(), rtol=2**-7, atol=2**-7)
