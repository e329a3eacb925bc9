"""The two engines that `benchmarks.rollout` times, and the random weights both are given."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from qarl.formats import QuantFormat

GPU_MEMORY = 0.9
KV_CACHE_GB = 0.2
"""On a CPU."""


class Engine(Protocol):
    """What is asked of either."""

    def __init__(self, folder: str, format: QuantFormat, max_sequences: int, max_tokens: int) -> None: ...

    @staticmethod
    def environment() -> dict[str, str]:
        """Read by vLLM when it is imported."""

    def generate(self, prompts: np.ndarray, n_tokens: int) -> int:
        """One completion of each prompt, int32 [n, P], at temperature 1; returns how many tokens came with a log-prob."""


class Qarl:
    """The product's engine. Filled with random weights instead of a policy's, so it would refuse to generate."""

    def __init__(self, folder: str, format: QuantFormat, max_sequences: int, max_tokens: int) -> None:
        import torch

        from qarl.config import RolloutConfig
        from qarl.rollout.vllm_engine import VllmEngine

        cache = None if torch.cuda.is_available() else KV_CACHE_GB
        config = RolloutConfig(
            format=format.name, gpu_memory=GPU_MEMORY, max_sequences=max_sequences, kv_cache_gb=cache
        )
        self.engine = VllmEngine(config, folder, "bfloat16", max_tokens)
        randomize(self.engine._refill.model)
        self.engine.version, self.engine._refusal = 0, None
        self.engine.text.eos = frozenset()

    @staticmethod
    def environment() -> dict[str, str]:
        from qarl.rollout.vllm_settings import ENVIRONMENT

        return ENVIRONMENT

    def generate(self, prompts: np.ndarray, n_tokens: int) -> int:
        from qarl.records import Prompt, Sampling

        asked = [Prompt(id=i, text="", tokens=tokens, answer="") for i, tokens in enumerate(prompts)]
        written = self.engine.generate(asked, Sampling(max_tokens=n_tokens), np.arange(len(prompts))[:, None])
        return sum(len(completion.logprobs) for completion in written)


class Stock:
    """vLLM's own front end and defaults, but for what a benchmark needs: random weights, no tokenizer, room for the batch."""

    def __init__(self, folder: str, format: QuantFormat, max_sequences: int, max_tokens: int) -> None:
        import torch
        from vllm import LLM

        from qarl.rollout.vllm_settings import quantization_override

        on_cpu: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": int(KV_CACHE_GB * 2**30)}
        self.llm = LLM(
            folder,
            dtype="bfloat16",
            hf_overrides=quantization_override(format),
            load_format="dummy",
            max_model_len=max_tokens,
            max_num_seqs=max_sequences,
            gpu_memory_utilization=GPU_MEMORY,
            skip_tokenizer_init=True,
            generation_config="vllm",
            **({} if torch.cuda.is_available() else on_cpu),
        )
        self.llm.apply_model(randomize)

    @staticmethod
    def environment() -> dict[str, str]:
        # Its engine computes in another process, which is handed `randomize`.
        return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

    def generate(self, prompts: np.ndarray, n_tokens: int) -> int:
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=1.0, seed=i, max_tokens=n_tokens, ignore_eos=True, logprobs=0, detokenize=False)
            for i in range(len(prompts))
        ]
        inputs: Any = [{"prompt_token_ids": tokens.tolist()} for tokens in prompts]
        written: Any = self.llm.generate(inputs, params, use_tqdm=False)
        return sum(len(one.outputs[0].logprobs) for one in written)


BACKENDS: dict[str, type[Engine]] = {"qarl": Qarl, "stock": Stock}


def randomize(model: Any) -> None:
    """Weights of a running model as training leaves their size, so that routers spread tokens over experts and nothing overflows.
    vLLM's own are so small that no token tells experts apart, and its integer codes are whatever lay in memory."""
    import torch

    hidden = model.config.hidden_size
    deviation = {torch.int8: 74.0, torch.int32: 4.6, torch.float8_e4m3fn: 100.0}
    codes = {p.dtype for p in model.parameters() if p.dtype in deviation}
    scale = 1 / (math.sqrt(hidden) * deviation[codes.pop()]) if codes else 1.0
    for name, parameter in model.named_parameters():
        values, leaf = parameter.data, name.rpartition(".")[2]
        if values.dtype == torch.int8:
            values.random_(-127, 128)
        elif values.dtype == torch.float8_e4m3fn:
            for part in values if values.ndim > 2 else [values]:  # float32 of all experts would be too much at a time
                part.copy_(torch.randn(part.shape, device=part.device).mul_(deviation[values.dtype]).clamp_(-448, 448))
        elif values.dtype == torch.int32:
            if "packed" in leaf:
                values.random_(-(2**31), 2**31)
        elif "scale" in leaf:
            values.fill_(scale)
        elif values.ndim > 1:
            values.normal_(0.0, 1.0 if "embed" in name else 1 / math.sqrt(hidden))
        else:
            values.fill_(1.0)
