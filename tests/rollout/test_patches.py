"""What we change in vLLM, as far as a CPU can tell: layouts, and the refusal of a vLLM that the changes are not for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qarl.errors import ConfigError
from qarl.rollout import patches


def test_a_vllm_that_quantizes_the_rows_of_int8_experts_by_itself_is_refused_by_its_version(monkeypatch):
    import vllm
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as method,
    )

    monkeypatch.setattr(
        method, "make_int8_moe_quant_config", lambda *_, **__: SimpleNamespace(use_int8_w8a8=True), raising=True
    )
    monkeypatch.setattr(vllm, "__version__", "0.30.1")
    before = method.select_int8_moe_backend
    with pytest.raises(ConfigError, match=r"rollout.engine: vllm 0.30.1 .* install vllm==0.26"):
        patches._int8_experts()
    assert method.select_int8_moe_backend is before


def test_a_vllm_of_another_series_is_refused_before_anything_is_patched(monkeypatch):
    import vllm

    patches.require_version(patches.ON_CPU)  # the one that is installed
    for version in ("0.27.0", "0.260.1", "1.26.0"):
        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(ConfigError, match=f"rollout.engine: vllm {version} is not the 0.26 .* vllm==0.26"):
            patches.require_version(patches.ON_GPU)


@pytest.mark.parametrize(("inputs", "intermediate"), [(256, 128), (128, 256), (256, 256), (128, 128)])
def test_scales_of_int4_experts_lie_in_the_order_of_their_own_number_of_groups(monkeypatch, inputs, intermediate):
    """Marlin reads several groups in blocks of 64 columns, transposed as 8 x 8, and a single group in blocks of 32,
    4 x 4 x 2 with the first two transposed. vLLM names the intermediate size as w13's inputs, whatever they are."""
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16 as oracle

    group, n_outputs = 128, 2 * intermediate
    monkeypatch.setattr(oracle, "marlin_moe_permute_scales", oracle.marlin_moe_permute_scales)  # put back afterwards
    patches._int4_experts()
    scales = torch.rand(3, inputs // group, n_outputs)
    served = oracle.marlin_moe_permute_scales(s=scales, size_k=intermediate, size_n=n_outputs, group_size=group)
    if inputs > group:
        expected = scales.unflatten(-1, (-1, 8, 8)).mT.flatten(-3)
    else:
        expected = scales.unflatten(-1, (-1, 4, 4, 2)).transpose(-3, -2).flatten(-4)
    assert torch.equal(served, expected)


@pytest.fixture
def fp8_kernel(monkeypatch):
    """vLLM's class, patched, and put back afterwards."""
    from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel as kernel

    for name in ("apply_scaled_mm", "get_output_padding"):
        monkeypatch.setattr(kernel, name, getattr(kernel, name))
    patches._fp8_rows()
    return kernel


@pytest.mark.parametrize("shape", [(1,), (64,), (65,), (300,), (0,), (2, 5)])
def test_few_rows_in_e4m3_are_multiplied_as_many(monkeypatch, fp8_kernel, shape):
    from vllm import _custom_ops as ops

    k, n, rows = 16, 30, int(torch.tensor(shape).prod())
    weight, weight_scale = torch.randint(-8, 8, (k, n)).float(), torch.rand(n, 1)  # sums are exact, in any order
    given = []

    def cutlass_scaled_mm(a, b, scale_a, scale_b, out_dtype, bias=None):
        given.append(len(a))
        return ((a @ b) * scale_b.t() * scale_a).to(out_dtype)

    monkeypatch.setattr(ops, "cutlass_scaled_mm", cutlass_scaled_mm)
    kernel = object.__new__(fp8_kernel)
    kernel.logical_output_size = n - 3  # the rest is vLLM's own padding
    padded = max(rows, kernel.get_output_padding())
    x, scale = torch.full((padded, k), float("nan")), torch.full((padded, 1), float("nan"))  # as memory may be
    x[:rows], scale[:rows] = torch.randint(-8, 8, (rows, k)).float(), torch.rand(rows, 1)
    y = kernel.apply_scaled_mm(
        A=x,
        B=weight,
        out_dtype=torch.float32,
        As=scale,
        Bs=weight_scale,
        bias=None,
        output_shape=[*shape, n],
    )
    assert given == [padded] and padded >= 65
    expected = (x[:rows] @ weight) * weight_scale.t() * scale[:rows]
    assert torch.equal(y, expected[:, : n - 3].reshape(*shape, n - 3))


@pytest.mark.parametrize("dtype, columns", [("fp8_w8a8", 64), (None, 32), ("int4_w4a16", 32)])
def test_no_tile_of_e4m3_experts_is_multiplied_as_float16(monkeypatch, dtype, columns):
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    tile = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 256, "num_warps": 4}
    monkeypatch.setattr(triton_moe, "try_get_optimal_moe_config", lambda *_, **__: tile)
    patches._fp8_experts()
    chosen = triton_moe.try_get_optimal_moe_config((8, 64, 32), (8, 32, 32), 2, dtype, 4, block_shape=None)
    assert chosen == tile | {"BLOCK_SIZE_N": columns} and tile["BLOCK_SIZE_N"] == 32


@pytest.mark.parametrize("heads, declared", [(64, {1: 65, 64: 65, 65: 65, 900: 900}), (128, {1: 1, 64: 64, 900: 900})])
def test_narrow_heads_declare_a_query_that_is_not_short(monkeypatch, heads, declared):
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder as builder

    given: list[Any] = []
    monkeypatch.setattr(builder, "build", lambda self, *arguments: given.extend(arguments))
    patches._narrow_heads()
    one = torch.ones(1, dtype=torch.int32)
    for longest, expected in declared.items():
        common = CommonAttentionMetadata(
            query_start_loc=one,
            query_start_loc_cpu=one,
            seq_lens=one,
            num_reqs=1,
            num_actual_tokens=1,
            max_query_len=longest,
            max_seq_len=7,
            block_table_tensor=one,
            slot_mapping=one,
        )
        made: Any = SimpleNamespace(headdim=heads)
        builder.build(made, common_prefix_len=3, common_attn_metadata=common, fast_build=True)
        prefix, seen, fast = given[-3:]
        assert (prefix, fast, seen.max_query_len, seen.max_seq_len) == (3, True, expected, 7)
        assert seen.seq_lens is one and common.max_query_len == longest


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n, k", [(576, 576), (1536, 576), (6144, 4096)])
def test_the_engines_e4m3_product_is_the_learners_for_any_number_of_rows(fp8_kernel, n, k, biased):
    """And a row of it does not depend on how many there are, with graphs or without."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym

    from qarl.kernels import w8a8_fp8_engine as learner

    if reason := learner.refusal("cuda", torch.bfloat16):
        pytest.skip(reason)
    torch.manual_seed(0)
    codes = learner.quantize(torch.randn(n, k, device="cuda").bfloat16())
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(codes["weight"].t(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(codes["weight_scale"].clone(), requires_grad=False)
    layer.input_scale = layer.input_scale_ub = None
    config = VllmConfig()
    config.compilation_config.custom_ops = ["all"]
    with set_current_vllm_config(config):
        kernel = fp8_kernel(
            FP8ScaledMMLinearLayerConfig(
                weight_quant_key=kFp8StaticChannelSym,
                activation_quant_key=kFp8DynamicTokenSym,
                weight_shape=(n, k),
                input_dtype=torch.bfloat16,
                out_dtype=torch.bfloat16,
            ),
            ["weight", "weight_scale", "input_scale", "input_scale_ub"],
        )
        kernel.process_weights_after_loading(layer)
    x = torch.randn(300, k, device="cuda").bfloat16()
    bias = torch.randn(n, device="cuda").bfloat16() if biased else None
    whole = learner.product(x, learner.prepare(codes, None, torch.bfloat16), bias)
    for rows in (1, 16, 17, 64, 65, 300):
        assert torch.equal(kernel.apply_weights(layer, x[:rows], bias), whole[:rows])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.apply_weights(layer, x[:3], bias)
    graph.replay()
    assert torch.equal(captured, whole[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 4096])
def test_the_engines_norm_is_the_learners(width):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    from qarl.kernels.norm import fused_rms_norm

    patches._norms()
    config = VllmConfig()
    config.compilation_config.custom_ops = ["all"]
    with set_current_vllm_config(config):
        layer = RMSNorm(width, 1e-6, dtype=torch.bfloat16).cuda()
    layer.weight.data.uniform_(0.5, 1.5)
    x, residual = torch.randn(2, 37, width, device="cuda").bfloat16()
    total = residual + x
    expected = fused_rms_norm(total, layer.weight, 1e-6)
    assert torch.equal(layer(total), expected)
    y, kept = layer(x.clone(), residual.clone())
    assert torch.equal(y, expected) and torch.equal(kept, total)


@pytest.mark.parametrize(("dtype", "takes"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_float32_model_keeps_onednn_where_vllm_would_take_its_kernel_for_amx(monkeypatch, dtype, takes):
    import vllm.config
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    monkeypatch.setattr(cpu, "check_cpu_sgl_kernel", lambda n, k, dtype: k % 32 == 0)  # as where there is AMX
    running = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: running)
    patches._int8_in_float32()
    assert cpu.check_cpu_sgl_kernel(16, 64, torch.int8) is takes
    assert cpu.check_cpu_sgl_kernel(16, 33, torch.int8) is False
