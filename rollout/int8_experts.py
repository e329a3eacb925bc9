"""int8 experts whose rows are int8 too, in vLLM 0.26, which would leave them in bfloat16 (`patches`)."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache  # one class, not one a layer
def int8_experts_class(triton_experts: type[Any]) -> type:
    """Of vLLM's `triton_experts`, whose weights are int8 codes: a class that quantizes rows too."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.model_executor.layers.fused_moe.utils import _resize_cache
    from vllm.triton_utils import tl

    class Int8Experts(triton_experts):
        """vLLM's Triton experts on int8 rows: its kernel and its schedule, without LoRA."""

        expects_unquantized_inputs = True  # they are quantized below

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: torch.Tensor | None,
            a1q_scale: torch.Tensor | None,
            a2_scale: torch.Tensor | None,
            workspace13: torch.Tensor,
            workspace2: torch.Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            n_experts, n_tokens, n, k, top_k = self.moe_problem_size(hidden_states, w1, w2, topk_ids)
            if global_num_experts == -1:
                global_num_experts = n_experts
            name = self.quant_config.config_name(hidden_states.dtype)
            config = fused_moe.try_get_optimal_moe_config(w1.size(), w2.size(), top_k, name, n_tokens, block_shape=None)
            sorted_ids, expert_ids, n_padded = fused_moe._prepare_expert_assignment(
                topk_ids, config, n_tokens, top_k, global_num_experts, expert_map
            )

            def product(
                x: torch.Tensor, w: torch.Tensor, scale: Any, out: torch.Tensor, each: int, weigh: bool
            ) -> None:
                codes, x_scale, _ = ops.scaled_int8_quant(x)
                fused_moe.invoke_fused_moe_triton_kernel(
                    codes,
                    w,
                    out,
                    x_scale,
                    scale,
                    topk_weights if weigh else None,
                    sorted_ids,
                    expert_ids,
                    n_padded,
                    weigh,
                    each,
                    config,
                    compute_type=tl.bfloat16,
                    use_fp8_w8a8=False,
                    use_int8_w8a8=True,
                    use_int8_w8a16=False,
                    use_int4_w4a16=False,
                    per_channel_quant=True,
                    block_shape=None,
                )

            gate_up = _resize_cache(workspace2, (n_tokens, top_k, n))
            inner = _resize_cache(workspace13, (n_tokens * top_k, self.adjust_N_for_activation(n, activation)))
            down = _resize_cache(workspace2, (n_tokens, top_k, k))
            product(hidden_states, w1, self.w1_scale, gate_up, top_k, False)
            self.activation(activation, inner, gate_up.view(-1, n))
            product(inner, w2, self.w2_scale, down, 1, not apply_router_weight_on_input)
            ops.moe_sum(down, output)

    return Int8Experts
