"""The claim itself: at INT8 the learner computes the very log-probs that the vLLM engine serves, in a deep model too."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from qarl.batching import pack_to_score
from qarl.config import RolloutConfig
from qarl.formats import get
from qarl.kernels.dispatch import backends
from qarl.rollout.engine import open_engine
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.model import load_model
from qarl.trainer.pocket import build_tokenizer
from qarl.trainer.policy import Policy, to_tensors
from qarl.trainer.publish import model_update

INT8 = get("w8a8_int8")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Twelve layers with weights large enough that a rounding in one layer moves all after it."""
    folder = tmp_path_factory.mktemp("deep")
    tokenizer = build_tokenizer(256)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(
    backends("w8a8_int8", "cpu", torch.float32)["engine"] is not None, reason="this machine's vLLM has no CPU ops"
)
def test_engine_backend_gives_the_engines_logprobs_and_an_unaligned_learner_does_not(deep):
    """What is left is the head's float32 product, whose rows are summed in another order: 1e-6 nats. Rounding chains make the
    float learner's gap about the size of the quantization error, tenths of a nat here."""
    engine = open_engine(RolloutConfig(format=INT8.name, eager=True, kv_cache_gb=0.1), deep, "float32", 256)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(6, 100, n).astype(np.int32) for n in (2, 30, 129, 140)]
    engine.refill(model_update(load_model(deep, torch.float32), INT8, 0, 2))
    served = np.concatenate(engine.score(sequences, [1] * len(sequences)))
    gaps = {}
    for backend in ("none", "engine"):
        model = load_model(deep, torch.float32)
        AlignedModel(model, INT8, backend, "cpu", torch.float32)
        batch, order = pack_to_score(sequences, 1, 4096)
        with torch.no_grad():
            logprobs, _ = Policy(model, 1.0, 512)(to_tensors(batch.ranks[0][0], torch.device("cpu")))
        mine = np.concatenate(order.unpack([[logprobs.numpy()]]))
        gaps[backend] = float(np.abs(mine - served).mean())
    engine.close()
    assert gaps["engine"] < 2e-5, gaps
    assert gaps["none"] > 1000 * gaps["engine"], gaps
