"""vLLM's own front end on a checkpoint: where a refill is in doubt, it says what the numbers would be without one.

Set up as our engine sets it up, so that kernels are the same; but the weights come from files, by vLLM's own loaders.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qarl.formats import QuantFormat
from qarl.records import Completion, Prompt, Sampling
from qarl.rollout import patches
from qarl.rollout.text import Text
from qarl.rollout.vllm_settings import ENVIRONMENT, gpu_settings

MAX_SEQUENCES = 32
MOST_TOKENS = 8192


class StockEngine:
    """See above."""

    def __init__(
        self, folder: Path, format: QuantFormat, dtype: str, max_tokens: int, gpu_memory: float, cache_gb: float
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        patches.apply()
        self.eos = Text(folder).eos
        on_gpu = torch.cuda.is_available()
        settings = gpu_settings(format, MAX_SEQUENCES, MOST_TOKENS) if on_gpu else {"enforce_eager": True}
        self.llm = LLM(
            str(folder),
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=max_tokens + 1,  # to score a sequence, vLLM wants room for one token more
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=MOST_TOKENS,
            gpu_memory_utilization=gpu_memory,
            kv_cache_memory_bytes=int(cache_gb * 2**30),
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,
            **settings,
        )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Completion]:
        from vllm import SamplingParams

        asked = [(p, n, int(seed)) for p, row in zip(prompts, seeds, strict=True) for n, seed in enumerate(row)]
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                seed=seed,
                max_tokens=sampling.max_tokens,
                stop_token_ids=sorted(self.eos),
                logprobs=0,
                detokenize=False,
            )
            for *_, seed in asked
        ]
        inputs: Any = [{"prompt_token_ids": p.tokens.tolist()} for p, *_ in asked]
        results: Any = self.llm.generate(inputs, params, use_tqdm=False)
        written = [result.outputs[0] for result in results]
        return [
            Completion(
                prompt=p.id,
                sample=n,
                tokens=np.array(output.token_ids, np.int32),
                logprobs=np.array(
                    [at[t].logprob for t, at in zip(output.token_ids, output.logprobs, strict=True)], np.float32
                ),
                text="",
                finish=str(output.finish_reason),
                version=0,
            )
            for (p, n, _), output in zip(asked, written, strict=True)
        ]

    def score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        inputs: Any = [{"prompt_token_ids": s.tolist()} for s in sequences]
        results: Any = self.llm.generate(inputs, params, use_tqdm=False)
        return [
            np.array([r.prompt_logprobs[i][int(s[i])].logprob for i in range(n, len(s))], np.float32)
            for r, s, n in zip(results, sequences, prompt_lengths, strict=True)
        ]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
