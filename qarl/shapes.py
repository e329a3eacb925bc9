"""Parameter names and shapes of a model, from its `config.json` alone: what a plan needs before anything is loaded. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qarl.config import ModelConfig, PocketConfig
from qarl.errors import ConfigError
from qarl.formats import QuantFormat

Shape = tuple[int, ...]

MODEL_TYPES = ("llama", "qwen3", "qwen3_moe")


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name -> shape of every parameter, as transformers 5 names and packs them.

    Raises `ConfigError` for a model type that is not in `MODEL_TYPES`.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ConfigError(f"model.path: model type {kind!r} is not one of {list(MODEL_TYPES)}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.self_attn.q_proj.weight"] = (heads * head, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv_heads * head, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv_heads * head, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * head)
        if kind != "llama":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head,)
        if kind == "qwen3_moe":
            experts = n_experts(config)
            width = config["moe_intermediate_size"]
            shapes[f"{layer}.mlp.gate.weight"] = (experts, hidden)
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * width, hidden)
            shapes[f"{layer}.mlp.experts.down_proj"] = (experts, hidden, width)
        else:
            width = config["intermediate_size"]
            shapes[f"{layer}.mlp.gate_proj.weight"] = (width, hidden)
            shapes[f"{layer}.mlp.up_proj.weight"] = (width, hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, width)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def n_experts(config: Mapping[str, Any]) -> int:
    """Experts a layer, 0 where it is dense. transformers 5 writes another name than it used to."""
    return config.get("num_experts") or config.get("num_local_experts") or 0


def check_ranks(config: Mapping[str, Any], format: QuantFormat, ranks: int) -> None:
    """Raise `ConfigError` where an engine of so many ranks cannot share a model of this `config.json`: each has whole heads, and of
    the inputs that ranks cut, whole groups of the format."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or config["hidden_size"] // heads
    width = "moe_intermediate_size" if n_experts(config) else "intermediate_size"
    whole = {"num_attention_heads": heads, width: config[width]}
    if kv_heads > 1:  # ranks may hold the same one
        whole["num_key_value_heads"] = kv_heads
    for name, count in whole.items():
        if count % ranks:
            raise ConfigError(f"rollout.tensor_parallel: {ranks} ranks cannot share {name} = {count}")
    for name, inputs in {"num_attention_heads x head_dim": heads * head, width: config[width]}.items():
        if format.group and inputs // ranks % format.group:
            raise ConfigError(
                f"rollout.tensor_parallel: {ranks} ranks take {inputs // ranks} of {name} = {inputs} inputs each, which groups of "
                f"{format.group} (rollout.format={format.name}) do not divide"
            )


def architecture(model: ModelConfig) -> Mapping[str, Any] | None:
    """The `config.json` of the policy, or `None` where only loading the model would tell (hub names, GGUF files)."""
    if model.pocket:
        return pocket_architecture(model.pocket)
    file = Path(model.path) / "config.json"
    if model.path and file.exists():
        return json.loads(file.read_text())
    return dict(model.architecture) or None


def pocket_architecture(pocket: PocketConfig) -> dict[str, Any]:
    """The pocket model's `config.json`; `trainer/pocket.py` makes the model of the same numbers."""
    return {
        "model_type": "qwen3_moe" if pocket.experts else "qwen3",
        "vocab_size": 103,
        "hidden_size": pocket.hidden_size,
        "intermediate_size": pocket.intermediate_size,
        "moe_intermediate_size": pocket.intermediate_size,
        "num_hidden_layers": pocket.layers,
        "num_attention_heads": pocket.heads,
        "num_key_value_heads": pocket.kv_heads,
        "head_dim": pocket.head_dim,
        "num_experts": pocket.experts,
        "tie_word_embeddings": False,
    }
