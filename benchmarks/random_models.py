"""Random models of true widths, cut to four layers: `python -m benchmarks.random_models NAME FOLDER [--tiny]`.

Weights keep the size of what flows through them, as training leaves it, so that a rounding moves a log-prob as it does in a
trained model: matrices have deviation 1/sqrt(K), so an MLP or an attention layer adds about as much as stands in the residual
stream (experts' outputs are averaged over eight: their last matrix is 2.5 times larger); embeddings have deviation 1; norms
1 ± 0.2. The head gives logits of deviation 4: about 4 nats of entropy over 151936 tokens. Transformers' own 0.02 would give
11.1 of at most 11.9 nats and experts that hardly count, larger logits a distribution of one token.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from qarl.trainer.pocket import build_tokenizer

LAYERS = 4
CONTEXT = 4096
_COMMON: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "head_dim": 128,
    "rope_theta": 1e6,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_DENSE: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 12288, "num_key_value_heads": 8}
_MOE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
#: name -> what the config says; of the widths of Qwen3-8B and of Qwen3-30B-A3B
NAMES = {"qwen3-8b-4l": (Qwen3Config, _DENSE), "qwen3-30b-a3b-4l": (Qwen3MoeConfig, _MOE)}


def make_model(name: str, folder: Path, tiny: bool, seed: int = 0) -> None:
    """Write the model in bfloat16 with the pocket tokenizer, whose vocabulary is a part of the model's; whole or not at all."""
    tokenizer = build_tokenizer(CONTEXT)
    config = config_of(name, tiny)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            fill(parameter, values, generator)
    draft = folder.with_name(f".{folder.name}.draft")
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.rename(folder)


def config_of(name: str, tiny: bool) -> PreTrainedConfig:
    """Of that model, narrow if `tiny`, with the special tokens of the pocket tokenizer."""
    tokenizer = build_tokenizer(CONTEXT)
    special = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    make_config, widths = NAMES[name]
    narrow = {key: value for key, value in _TINY.items() if key in {**_COMMON, **widths}} if tiny else {}
    return make_config(**{**_COMMON, **widths, **narrow, **special})


def fill(name: str, values: Tensor, generator: torch.Generator) -> None:
    if values.ndim == 1:
        values.normal_(1.0, 0.2, generator=generator)
        return
    gain = {"embed_tokens": math.sqrt(values.shape[-1]), "lm_head": 4.0, "experts.down_proj": 2.5}
    factor = next((f for part, f in gain.items() if part in name), 1.0)
    values.normal_(0.0, factor / math.sqrt(values.shape[-1]), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(NAMES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="narrow, for a CPU")
    arguments = parser.parse_args()
    make_model(arguments.name, arguments.folder, arguments.tiny)


if __name__ == "__main__":
    main()
