"""vLLM's CUDA ops as a learner calls them: against vLLM's own layers, and `fused` against both.

int8 is equal bit for bit, and experts of e4m3 are. A matrix of e4m3 torch multiplies nearly as vLLM, with scales in another order.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from qarl.kernels import w8a8_fp8, w8a8_fp8_engine, w8a8_int8, w8a8_int8_engine
from qarl.kernels.dispatch import load

ENGINES = [w8a8_int8_engine, w8a8_fp8_engine]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def on_hopper() -> None:
    for engine in ENGINES:
        if reason := engine.refusal("cuda", torch.bfloat16):
            pytest.skip(reason)


@pytest.mark.parametrize("engine", ENGINES)
def test_cuda_is_refused_without_vllm_for_it(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    engine._engine_refusal.cache_clear()
    try:
        assert engine.refusal("cuda", torch.bfloat16) == "vLLM is not installed"
    finally:
        engine._engine_refusal.cache_clear()


def test_fp8_has_no_engine_on_cpu() -> None:
    assert "not for cpu" in str(w8a8_fp8_engine.refusal("cpu", torch.bfloat16))
    with pytest.raises(ValueError, match="w8a8_fp8 cannot use backend 'engine'"):
        w8a8_fp8_engine.prepare(w8a8_fp8.quantize(torch.randn(16, 32)), None, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("engine", ENGINES)
def test_cuda_is_refused_where_there_is_none(engine: ModuleType) -> None:
    assert engine.refusal("cuda", torch.bfloat16) is not None


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("engine", ENGINES)
def test_cuda_takes_bfloat16_only(engine: ModuleType) -> None:
    assert "torch.bfloat16" in str(engine.refusal("cuda", torch.float32))


def tokens(m: int, k: int) -> Tensor:
    """bfloat16 rows over 60 powers of ten, some zero, some with one large value."""
    x = torch.randn(m, k, device="cuda") * 10 ** (torch.rand(m, 1, device="cuda") * 60 - 30)
    x[::7] = 0
    x[1::7, k // 2] = 65504
    return x.bfloat16()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("k", [16, 768, 4096, 16384, 20000])
def test_tokens_equal_vllms_ops(k: int) -> None:
    from vllm import _custom_ops as ops

    x = tokens(300, k)
    for ours, (codes, scale, *_) in (
        (w8a8_int8_engine.quantize_tokens(x), ops.scaled_int8_quant(x)),
        (w8a8_fp8_engine.quantize_tokens(x), ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)),
    ):
        assert torch.equal(ours[0].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(ours[1], scale)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (50, 6144, 4096), (300, 512, 768), (4096, 6144, 4096)])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_engine_fused_and_definition_are_one(shape: tuple[int, int, int], biased: bool) -> None:
    from qarl.kernels import w8a8_int8_fused

    m, n, k = shape
    codes, x = w8a8_int8_fused.quantize(torch.randn(n, k, device="cuda")), torch.randn(m, k, device="cuda").bfloat16()
    bias = torch.randn(n, device="cuda").bfloat16() if biased else None
    engine, fused, definition = (
        module.product(x, module.prepare(codes, None, torch.bfloat16), bias)
        for module in (w8a8_int8_engine, w8a8_int8_fused, w8a8_int8)
    )
    assert torch.equal(engine, definition)
    assert torch.equal(fused, definition)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_int8_engine_follows_vllms_layer_call_for_call() -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassInt8ScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig

    names = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
    config = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)
    layer, codes = torch.nn.Module(), w8a8_int8.quantize(torch.randn(96, 64, device="cuda"))
    layer.logical_widths = [32, 32, 32]  # type: ignore[assignment]
    for name in names:
        value = codes.get(name)
        parameter = None if value is None else torch.nn.Parameter(value.clone(), requires_grad=False)
        layer.register_parameter(name, parameter)
    theirs = CutlassInt8ScaledMMLinearKernel(config, names)
    theirs.process_weights_after_loading(layer)
    x, bias = torch.randn(7, 64, device="cuda").bfloat16(), torch.randn(96, device="cuda").bfloat16()
    operand = w8a8_int8_engine.prepare(codes, None, torch.bfloat16)
    assert torch.equal(w8a8_int8_engine.product(x, operand), theirs.apply_weights(layer, x))
    assert torch.equal(w8a8_int8_engine.product(x, operand, bias), theirs.apply_weights(layer, x, bias))
    assert w8a8_int8_engine.product(x[:0], operand).shape == (0, 96)


@pytest.mark.gpu  # on a CPU it is the definition
@pytest.mark.parametrize("format_name", ["w8a8_int8", "w8a8_fp8"])
def test_engine_quantizes_as_the_definition_on_a_gpu(format_name: str) -> None:
    engine, definition = load(format_name, "engine"), load(format_name, "emulated")
    weight = torch.randn(3, 40, 48, device="cuda")
    ours, expected = engine.quantize(weight), definition.quantize(weight)
    assert torch.equal(ours["weight"].float(), expected["weight"].float())
    assert torch.equal(ours["weight_scale"], expected["weight_scale"])
    back = definition.dequantize(expected, None, torch.bfloat16)
    assert torch.equal(engine.dequantize(ours, None, torch.bfloat16), back)


#: (M, N, K, warps) of a tile. Those of vLLM's default table for e4m3, which swap the operands up to 32 rows; then others
#: that its tuned tables hold.
TILES = [(16, 64, 128, 4), (32, 64, 128, 4), (32, 128, 128, 4), (64, 128, 128, 8), (128, 128, 128, 8)]
TILES += [(16, 128, 256, 8), (64, 64, 64, 4), (64, 128, 32, 4), (128, 256, 128, 8)]


def vllms_experts(
    x: Tensor,
    x_scale: Tensor,
    weight: dict[str, Tensor],
    expert: Tensor,
    row_weights: Tensor | None,
    tile: tuple[int, int, int, int] = (64, 64, 128, 4),
) -> Tensor:
    """`fused_moe_kernel` on codes x [M, K], with one expert per token, whose rows are sorted already."""
    from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.triton_utils import tl

    experts, n, _ = weight["weight"].shape
    config = dict(zip(("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps"), tile, strict=True))
    config |= {"GROUP_SIZE_M": 8, "SPLIT_K": 1, "num_stages": 3}
    rows, owners, padded = moe_align_block_size(expert[:, None].int(), tile[0], experts)
    y = torch.empty(len(x), 1, n, dtype=torch.bfloat16, device="cuda")
    invoke_fused_moe_triton_kernel(
        x,
        weight["weight"],
        y,
        x_scale,
        weight["weight_scale"],
        None if row_weights is None else row_weights[:, None],
        rows,
        owners,
        padded,
        row_weights is not None,
        1,
        config,
        compute_type=tl.bfloat16,
        use_fp8_w8a8=x.dtype != torch.int8,
        use_int8_w8a8=x.dtype == torch.int8,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=True,
        block_shape=None,
    )
    return y[:, 0]


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("m", [40, 3000])
def test_int8_experts_equal_vllms_kernel(m: int, weighted: bool) -> None:
    from vllm import _custom_ops as ops

    from qarl.kernels import w8a8_int8_fused

    experts, n, k = 8, 384, 512
    codes = w8a8_int8.quantize(torch.randn(experts, n, k, device="cuda"))
    x = torch.randn(m, k, device="cuda").bfloat16()
    expert = torch.randint(0, experts - 1, (m,), device="cuda").sort().values
    offsets = torch.bincount(expert, minlength=experts).cumsum(0)
    row_weights = torch.rand(m, device="cuda") if weighted else None
    theirs = vllms_experts(*ops.scaled_int8_quant(x)[:2], codes, expert, row_weights)
    for module in (w8a8_int8_engine, w8a8_int8_fused, w8a8_int8):
        y = module.grouped_product(x, module.prepare(codes, None, torch.bfloat16), offsets, row_weights)
        assert torch.equal(y, theirs)


def assert_as_near_as_tensor_cores_are(a: Tensor, b: Tensor, magnitude: Tensor) -> None:
    """One unit of bfloat16, and 2^-11 of the sum of the products' magnitudes."""
    assert ((a.double() - b.double()).abs() <= 2**-7 * b.double().abs() + 2**-11 * magnitude).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("shape", [(1, 96, 64), (50, 6144, 4096), (300, 33, 17), (4096, 6144, 4096)])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_engine_and_fused_against_the_definition(shape: tuple[int, int, int], biased: bool) -> None:
    from qarl.kernels import w8a8_fp8_fused

    m, n, k = shape
    codes, x = w8a8_fp8_fused.quantize(torch.randn(n, k, device="cuda")), torch.randn(m, k, device="cuda").bfloat16()
    bias = torch.randn(n, device="cuda").bfloat16() if biased else None
    engine, fused = (
        module.product(x, module.prepare(codes, None, torch.bfloat16), bias)
        for module in (w8a8_fp8_engine, w8a8_fp8_fused)
    )
    x_codes, x_scale = w8a8_fp8.quantize_tokens(x)
    x_hat, w_hat = x_codes.double() * x_scale, codes["weight"].double() * codes["weight_scale"]
    exact, magnitude = x_hat @ w_hat.t(), x_hat.abs() @ w_hat.abs().t()
    if bias is not None:
        exact = exact + bias.double()
    assert_as_near_as_tensor_cores_are(engine, exact, magnitude)
    assert_as_near_as_tensor_cores_are(fused, exact, magnitude)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("n, k", [(6144, 4096), (4096, 12288), (24576, 4096), (576, 576), (1536, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_engine_gives_a_row_the_same_bits_however_many_there_are(n: int, k: int, biased: bool) -> None:
    """Through every kernel that vLLM chooses by the number of rows, but for those that padding leaves out."""
    weight, x = torch.randn(n, k, device="cuda").bfloat16(), torch.randn(8192, k, device="cuda").bfloat16()
    bias = torch.randn(n, device="cuda").bfloat16() if biased else None
    operand = w8a8_fp8_engine.prepare(w8a8_fp8_engine.quantize(weight), None, torch.bfloat16)
    whole = w8a8_fp8_engine.product(x[:4096], operand, bias)
    for m in (1, 16, 33, 64, 65, 128, 129, 300, 8192):
        rows = w8a8_fp8_engine.product(x[:m], operand, bias)
        assert rows.shape == (m, n)
        different = (rows[:4096] != whole[:m]).sum().item()
        assert different == 0, f"{different} values of {m} rows"


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("counts", [[3, 0, 5, 0], [0, 0, 0, 700], [300, 1, 0, 0, 90]])
@pytest.mark.parametrize("shape", [(384, 512), (1536, 2048), (2048, 768)])
@pytest.mark.parametrize("weighted", [False, True])
def test_fp8_experts_equal_vllms_kernel(
    tile: tuple[int, int, int, int], counts: list[int], shape: tuple[int, int], weighted: bool
) -> None:
    """In whatever tile vLLM takes, so a decoded token's are those of a sequence."""
    from vllm import _custom_ops as ops

    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).cuda()
    codes = w8a8_fp8.quantize(torch.randn(len(counts), *shape, device="cuda"))
    x = torch.randn(sum(counts), shape[1], device="cuda").bfloat16()
    row_weights = torch.rand(len(x), device="cuda") if weighted else None
    operand = w8a8_fp8_engine.prepare(codes, None, torch.bfloat16)
    offsets = torch.tensor(counts, device="cuda").cumsum(0)
    y = w8a8_fp8_engine.grouped_product(x, operand, offsets, row_weights)
    x_codes, x_scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    theirs = vllms_experts(x_codes, x_scale, codes, expert, row_weights, tile)
    different = (y != theirs).sum().item()
    assert different == 0, f"{different} of {y.numel()} values"
