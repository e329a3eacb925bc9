"""An exported checkpoint, loaded by vLLM from its files as anyone would, serves what an engine of ours was refilled with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qarl import formats
from qarl.compressed import write_checkpoint
from qarl.records import Prompt, Sampling
from qarl.rollout.vllm_settings import quantization_override

PROMPTS = [
    Prompt(id=i, text=t, tokens=np.array([ord(c) - 25 for c in t], np.int32), answer="")
    for i, t in enumerate(["2 + 2 =", "a longer prompt than the other one", "x"])
]
N_TOKENS = 24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "format", "dtype"),
    # Where there is AMX, plain vLLM's int8 takes no float32.
    [("qwen3_moe", "bf16", "float32"), ("qwen3", "w8a8_int8", "bfloat16")],
)
def test_stock_vllm_writes_the_same_greedy_tokens(
    kind, format, dtype, start, weights, published, model_folder, tmp_path
):
    engine, model = start("vllm", format, kind, dtype=dtype), weights(kind, seed=3)
    model = model.bfloat16()
    if dtype == "float32":
        model = model.float()  # what the plain checkpoint holds
    engine.refill(published(model, format))
    greedy = Sampling(temperature=0, max_tokens=N_TOKENS)
    refilled = [c.tokens.tolist() for c in engine.generate(PROMPTS, greedy, np.zeros((len(PROMPTS), 1), np.int64))]
    model.save_pretrained(tmp_path / "policy")
    settings = quantization_override(formats.get(format))
    write_checkpoint(tmp_path / "policy", tmp_path / "export", formats.get(format), settings)
    assert stock_tokens(tmp_path / "export", dtype, engine.text.eos) == refilled
    assert len({tuple(tokens) for tokens in refilled}) == len(PROMPTS)  # answers that depend on their prompts


STOCK = """
import json, sys
from vllm import LLM, SamplingParams

folder, dtype, prompts, eos, n_tokens = json.loads(sys.argv[1])
llm = LLM(folder, dtype=dtype, skip_tokenizer_init=True, generation_config="vllm", enforce_eager=True,
          max_model_len=256, kv_cache_memory_bytes=50 * 2**20)
params = SamplingParams(temperature=0, max_tokens=n_tokens, stop_token_ids=eos, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def stock_tokens(folder: Path, dtype: str, eos: frozenset[int]) -> list[list[int]]:
    """Greedy tokens of vLLM's own front end, in a process of its own: engines of one process share what they shut down."""
    asked = json.dumps([str(folder), dtype, [p.tokens.tolist() for p in PROMPTS], sorted(eos), N_TOKENS])
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, "-c", STOCK, asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("TOKENS ")[2])
