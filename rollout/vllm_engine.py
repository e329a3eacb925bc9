"""vLLM as the sampler, in this process: started without weights at the wanted format, refilled by the learner.

vLLM's engine core is driven directly. Its own front end builds Python objects for every token of every sequence, which
costs more than the forward pass of a small model.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qarl.config import RolloutConfig
from qarl.errors import EngineError
from qarl.formats import QuantFormat
from qarl.records import Completion, Prompt, Sampling
from qarl.rollout import proof
from qarl.rollout.capability import require_format
from qarl.rollout.engine import Engine
from qarl.rollout.text import Text

#: Read by vLLM when it is imported or started. In one process, workers share the learner's view of devices and die with it.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines bound to the same core would starve each other
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by one token; `Engine` checks the context itself
}


class VllmEngine(Engine):
    """See `Engine`."""

    def __init__(
        self, config: RolloutConfig, path: str | Path, dtype: str, max_tokens: int, tile_tolerance: float = 0.02
    ) -> None:
        super().__init__(config, path, max_tokens, tile_tolerance)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._eager = config.eager or not torch.cuda.is_available()  # compiling for a CPU takes longer than it saves
        self.text = Text(path)
        self._core = self._start(config, str(path), dtype)
        executor = self._core.engine_core.model_executor
        self._model = executor.driver_worker.worker.model_runner.model
        self._n_requests = 0

    def _start(self, config: RolloutConfig, path: str, dtype: str) -> Any:
        set_num_threads = torch.set_num_threads
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core_client import InprocClient
        from vllm.v1.executor import Executor

        require_format(self.format, path, dtype)
        _register_here(path)
        on_gpu = torch.cuda.is_available()
        args = EngineArgs(
            model=path,
            dtype=dtype,  # type: ignore[arg-type]
            hf_overrides=quantization_override(self.format),
            load_format="dummy",  # the first refill brings every weight
            max_model_len=self.max_tokens + 1,  # to score a sequence, vLLM wants room to write one more token
            max_num_seqs=config.max_sequences,
            kv_cache_memory_bytes=None if on_gpu else int(config.kv_cache_gb * 2**30),
            gpu_memory_utilization=config.gpu_memory,
            enforce_eager=self._eager,
            # A chunk of a seeded prompt would rewind the request's generator, which CPU generators cannot do.
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=None if on_gpu else max(self.max_tokens, 8192),
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature applied
            generation_config="vllm",  # the model's own sampling defaults must not mix with ours
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )
        gc.freeze()  # vLLM collects garbage five times while it starts; a third of a second each over all its modules
        vllm_config = args.create_engine_config()
        core = InprocClient(vllm_config, Executor.get_class(vllm_config), log_stats=False)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by nothing, for the whole process
        return core

    def contract_hash(self) -> str:
        from qarl.rollout import refill

        return refill.contract_hash(self._model, self.format)

    def _expected(self) -> Mapping[str, proof.Parts]:
        from qarl.rollout import refill

        return refill.expected(self._model)

    def _load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        from qarl.rollout import refill

        refill.load(self._model, tensors)
        self._forget()

    def _served_columns(self, tensor: str, columns: np.ndarray) -> np.ndarray:
        from qarl.rollout import refill

        return refill.served_columns(self._model, tensor, columns)

    def _forget(self) -> None:
        """Drop cached prefixes: of other weights after a refill; of other calls before a batch, so that it repeats."""
        if not self._core.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache: requests are still running")

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Completion]:
        from vllm import SamplingParams

        requests = []
        for prompt, of_prompt in zip(prompts, seeds, strict=True):
            tokens = prompt.tokens.tolist()
            for seed in of_prompt:
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    seed=int(seed),
                    max_tokens=min(sampling.max_tokens, self.max_tokens - len(tokens)),
                    stop_token_ids=list(self.text.eos),
                    logprobs=0,  # of the sampled token alone
                    detokenize=False,
                )
                requests.append((tokens, params))
        written = self._run(requests, sampling.stop)
        texts = self.text.decode([w.tokens for w in written])
        n = seeds.shape[1]
        return [
            Completion(
                prompt=prompts[i // n].id,
                sample=i % n,
                tokens=np.array(w.tokens, dtype=np.int32),
                logprobs=np.array(w.logprobs, dtype=np.float32),
                text=text,
                finish=w.finish,
                version=self.version,  # type: ignore[arg-type]
            )
            for i, (w, text) in enumerate(zip(written, texts, strict=True))
        ]

    def _score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        written = self._run([(tokens.tolist(), params) for tokens in sequences], ())
        return [w.prompt_logprobs[n - 1 :] for w, n in zip(written, prompt_lengths, strict=True)]

    def _run(self, requests: Sequence[tuple[list[int], Any]], stop: tuple[str, ...]) -> list[_Written]:
        """Run requests to their end, all at once; vLLM schedules them."""
        from vllm.v1.engine import EngineCoreRequest

        self._forget()
        written: dict[str, _Written] = {}
        for tokens, params in requests:
            self._n_requests += 1
            name = str(self._n_requests)
            written[name] = _Written()
            self._core.add_request(
                EngineCoreRequest(
                    request_id=name,
                    prompt_token_ids=tokens,
                    mm_features=None,
                    sampling_params=params,
                    pooling_params=None,
                    arrival_time=0.0,
                    lora_request=None,
                    cache_salt=None,
                    data_parallel_rank=None,
                )
            )
        running = set(written)
        stance = "force_eager" if self._eager else "default"  # else vLLM compiles a helper that counts ranks: seconds
        try:
            with torch.compiler.set_stance(stance):
                while running:
                    self._step(written, running, stop)
        finally:
            self._core.abort_requests(sorted(running))
        return list(written.values())

    def _step(self, written: dict[str, _Written], running: set[str], stop: tuple[str, ...]) -> None:
        stopped = []
        for output in self._core.get_output().outputs:
            name = output.request_id
            if name not in running:  # stopped by us, while vLLM had its next token under way
                continue
            one = written[name]
            one.tokens.extend(output.new_token_ids)
            if output.new_logprobs is not None:
                one.logprobs.extend(output.new_logprobs.logprobs[:, 0].tolist())
            if output.new_prompt_logprobs_tensors is not None:
                one.prompt_logprobs = output.new_prompt_logprobs_tensors.logprobs[:, 0].numpy()
            if output.finish_reason is not None:
                one.finish = str(output.finish_reason)
                running.discard(name)
                if one.finish not in ("stop", "length"):
                    raise EngineError(f"vLLM ended a request with {one.finish!r}")
            if stop and one.finish != "stop" and self.text.ends_with_stop(one.tokens, stop):
                if one.finish == "":
                    stopped.append(name)
                one.finish = "stop"
                running.discard(name)
        self._core.abort_requests(stopped)

    def close(self) -> None:
        """Ends vLLM's process groups too, which all engines of a process share: close them together."""
        self._refusal = "it was closed"
        self._core.shutdown()
        del self._core, self._model


class _Written:
    """What one request has produced so far."""

    __slots__ = ("finish", "logprobs", "prompt_logprobs", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.prompt_logprobs = np.empty(0, np.float32)
        self.finish = ""


def _register_here(path: str) -> None:
    """Let vLLM look at the model class in this process. It starts another one for that, which takes as long as it does to
    import vLLM, so that CUDA stays untouched before it forks; we never fork."""
    from transformers import AutoConfig
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in AutoConfig.from_pretrained(path).architectures or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


_SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"format": "int-quantized", "num_bits": 8, "type": "int"},
    "e4m3": {"format": "float-quantized", "num_bits": 8, "type": "float"},
    "int4": {"format": "pack-quantized", "num_bits": 4, "type": "int"},
}


def quantization_override(format: QuantFormat) -> dict[str, Any]:
    """What a compressed-tensors checkpoint at this format would say in its `config.json`; nothing for `bf16`."""
    if not format.quantizes:
        return {}
    scheme = dict(_SCHEMES[format.weight])
    layout = scheme.pop("format")
    weights = scheme | {"symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": format.group} if format.group else {"strategy": "channel"}
    inputs = None
    if format.activation != "none":
        inputs = {"num_bits": 8, "type": scheme["type"], "strategy": "token", "symmetric": True, "dynamic": True}
    # Norms and embeddings are no `Linear` and need no mention.
    ignored = ["lm_head", "re:.*\\.gate$"]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "ignore": ignored,
            "config_groups": {"group_0": group},
        }
    }
