"""What we change in vLLM, as far as a CPU can tell: layouts, and the refusal of a vLLM that the changes are not for."""

from types import SimpleNamespace

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
