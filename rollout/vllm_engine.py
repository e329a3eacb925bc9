"""vLLM as the sampler, in this process: started without weights at the wanted format, refilled by the learner.

vLLM's engine core is driven directly. Its own front end builds Python objects for every token of every sequence, which
costs more than the forward pass of a small model.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qarl.config import RolloutConfig
from qarl.errors import EngineError
from qarl.records import Completion, Prompt, Sampling
from qarl.rollout import patches
from qarl.rollout.capability import require_format
from qarl.rollout.engine import Engine
from qarl.rollout.ranks import ALONE, Ranks
from qarl.rollout.shards import Share
from qarl.rollout.text import Text
from qarl.rollout.vllm_settings import gpu_settings, quantization_override, register_here, set_environment
from qarl.transfer import Delivery, Tensors
from qarl.wire import Specs


class VllmEngine(Engine):
    """See `Engine`.

    On a GPU vLLM runs so that a learner can follow its arithmetic, op by op. Nothing is compiled by inductor, so rotary
    embedding, SiLU and quantization are vLLM's own CUDA kernels and each rounds once; norms are the learner's kernel. Linear
    layers and experts run in named kernels (CUTLASS, Triton, Marlin), the router and lm_head in torch's product. Attention is
    FlashAttention (3 on Hopper) without splits along the keys, whatever the batch, and without cascades over shared prefixes.
    What would make a token's bits depend on its batch besides is patched (rollout/patches.py). Decoding replays
    CUDA graphs; prefill and mixed batches run as they are. `rollout.eager` turns graphs off, and with them vLLM's bound on
    splits: attention over long contexts may then sum in another order.
    """

    def __init__(
        self,
        config: RolloutConfig,
        path: str | Path,
        dtype: str,
        max_tokens: int,
        tile_tolerance: float = 0.02,
        ranks: Ranks = ALONE,
        revision: str | None = None,
    ) -> None:
        super().__init__(config, path, max_tokens, tile_tolerance, ranks, revision)
        set_environment()
        self.text, self._sleeps = Text(path, revision), config.sleep
        self._core = self._start(config, str(path), dtype, revision)
        worker = self._core.engine_core.model_executor.driver_worker.worker
        from qarl.rollout.refill import Refill
        from qarl.rollout.slots import contract_hash

        self._refill = Refill(worker.model_runner.get_model())  # without the wrapper that replays graphs
        self._replay: Any = None
        if worker.device.type == "cuda" and not config.eager and ranks.count == 1:
            from qarl.rollout.replay import Replay

            self._replay = Replay(worker.model_runner)
        self._contract = contract_hash(self._refill.slots, self.format)
        self._cuts = {name: slot.cut for name, slot in self._refill.slots.items()}
        self.device = worker.device
        self._n_requests = 0

    def _start(self, config: RolloutConfig, path: str, dtype: str, revision: str | None) -> Any:
        set_num_threads = torch.set_num_threads
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core_client import InprocClient
        from vllm.v1.executor import Executor

        require_format(self.format, path, dtype, self.ranks.count, revision)
        patches.apply()
        register_here(path, revision)
        on_gpu = torch.cuda.is_available()
        most_tokens = max(self.max_tokens + 1, 8192)
        cache = config.kv_cache_gb or (None if on_gpu else 1.0)
        args = EngineArgs(
            model=path,
            revision=revision,
            tokenizer_revision=revision,
            dtype=dtype,  # type: ignore[arg-type]
            hf_overrides=quantization_override(self.format),
            load_format="dummy",  # the first refill brings every weight
            max_model_len=self.max_tokens + 1,  # to score a sequence, vLLM wants room to write one more token
            max_num_seqs=config.max_sequences,
            kv_cache_memory_bytes=None if cache is None else int(cache * 2**30),
            gpu_memory_utilization=config.gpu_memory,
            enforce_eager=config.eager or not on_gpu,  # compiling for a CPU takes longer than it saves
            # A chunk of a seeded prompt would rewind the request's generator, which CPU generators cannot do.
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=most_tokens,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature applied
            generation_config="vllm",  # the model's own sampling defaults must not mix with ours
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            enable_sleep_mode=config.sleep,
            disable_log_stats=True,
            seed=0,
            **self.ranks.settings(),
            **(gpu_settings(self.format, config.max_sequences, most_tokens) if on_gpu else {}),
        )
        gc.freeze()  # vLLM collects garbage five times while it starts; a third of a second each over all its modules
        vllm_config = args.create_engine_config()
        core = InprocClient(vllm_config, Executor.get_class(vllm_config), log_stats=False)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by nothing, for the whole process
        return core

    def contract_hash(self) -> str:
        return self._contract

    def _expected(self) -> Specs:
        return self._refill.specs

    def _share(self, delivery: Delivery) -> Delivery:
        return Share(delivery, self._cuts) if self.ranks.count > 1 else delivery

    def _load(self, tensors: Tensors) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._core.engine_core.vllm_config):
            self._refill.load(tensors)

    def _forget_homes(self) -> None:
        self._refill.forget_homes()

    def _can_read_back(self, tensor: str) -> bool:
        return tensor in self._refill.homes

    def _read_back(self, tensors: Specs) -> Tensor:
        return self._refill.read_back(tuple(tensors))

    def _loaded(self) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._core.engine_core.vllm_config):
            self._refill.loaded()
        self._forget()

    def sleep(self) -> None:
        from qarl.rollout.sleep import remember

        if not self._sleeps:
            return super().sleep()
        if self._core.is_sleeping():
            return
        self._refusal = "it sleeps: its weights were dropped"
        self._remembered = remember(self._refill.model, self._refill.homes)
        self._core.sleep(2)

    def _wake_weights(self) -> None:
        if self._core.is_sleeping():
            from qarl.rollout.sleep import restore

            self._core.wake_up(["weights"])
            restore(self._remembered)

    def _wake_caches(self) -> None:
        if self._core.is_sleeping():
            self._core.wake_up(["kv_cache"])

    def _served_columns(self, tensor: str, columns: np.ndarray) -> Tensor:
        from qarl.rollout import probe

        return probe.served_columns(self._refill.slots, tensor, columns)

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
        self._require_same_tokens([w.tokens for w in written])
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

    def _require_same_tokens(self, mine: list[list[int]]) -> None:
        """On all ranks: those that part have summed products of different tokens."""
        if self.ranks.count > 1 and len(set(self.ranks.gather(zlib.crc32(repr(mine).encode())))) > 1:
            raise EngineError("the ranks of the engine wrote different tokens")

    def _score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        written = self._run([(tokens.tolist(), params) for tokens in sequences], ())
        return [w.prompt_logprobs[n - 1 :] for w, n in zip(written, prompt_lengths, strict=True)]

    def _score_canaries(self, canaries: Sequence[np.ndarray]) -> list[np.ndarray]:
        with self._replay.canaries() if self._replay else nullcontext():
            return super()._score_canaries(canaries)

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
        try:
            with torch.compiler.set_stance("force_eager"):  # else vLLM compiles a helper that counts ranks: seconds
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
        """Ends vLLM's process groups too, and on a GPU its and cuBLAS's workspaces, which all engines of a process share
        and their graphs hold: close them together, or one before the next starts."""
        self._refusal = "it was closed"
        self._cut_line()
        self._core.shutdown()
        del self._core, self._refill, self._replay
        if torch.cuda.is_available():
            gc.collect()  # graphs, weights and KV cache hang in cycles; vLLM collected while we still held them
            torch._C._cuda_clearCublasWorkspaces()  # one for each stream it had, 32 MiB on Hopper
            torch.cuda.empty_cache()


class _Written:
    """What one request has produced so far."""

    __slots__ = ("finish", "logprobs", "prompt_logprobs", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.prompt_logprobs = np.empty(0, np.float32)
        self.finish = ""
