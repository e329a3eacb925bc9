"""Random models small enough for seconds, their weights published, and engines that serve them."""

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qarl import formats
from qarl.compressed import write_checkpoint
from qarl.config import RolloutConfig
from qarl.kernels.dispatch import load
from qarl.records import WeightUpdate
from qarl.rollout.engine import Engine, open_engine
from qarl.rollout.vllm_settings import quantization_override
from qarl.trainer.pocket import build_tokenizer
from qarl.trainer.publish import model_update

CONTEXT = 256


def _config(kind: str, tokenizer) -> PreTrainedConfig:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.1,  # so that answers depend on prompts
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    if kind.startswith("wide"):  # sizes that GPU kernels take: FlashAttention, CUTLASS, Marlin
        shape |= {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}
    if kind == "wide":
        return Qwen3Config(**shape, tie_word_embeddings=True)
    if kind in ("wide_moe", "wide_moe_of_two"):  # the latter for two ranks: each has 128 inputs of w2
        width = 128 if kind == "wide_moe" else 256
        return Qwen3MoeConfig(
            **shape, tie_word_embeddings=False, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=width
        )
    if kind == "qwen3":
        return Qwen3Config(**shape, tie_word_embeddings=True)
    if kind == "one_kv_head":
        return LlamaConfig(**shape | {"num_key_value_heads": 1}, tie_word_embeddings=False)
    if kind == "llama":
        return LlamaConfig(**shape, tie_word_embeddings=False)
    if kind == "qwen2":  # has biases on q, k and v
        return Qwen2Config(**{k: v for k, v in shape.items() if k != "head_dim"}, tie_word_embeddings=True)
    return Qwen3MoeConfig(
        **shape, tie_word_embeddings=False, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder("qwen3")`: a folder with a random model (tied embeddings; `llama` and `qwen3_moe` are untied)."""
    root = tmp_path_factory.mktemp("models")
    classes = {"qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            tokenizer = build_tokenizer(CONTEXT)
            torch.manual_seed(0)
            config = _config(kind, tokenizer)
            model = classes[kind](config) if kind in classes else AutoModelForCausalLM.from_config(config)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def weights(model_folder) -> Callable[..., PreTrainedModel]:
    """`weights("qwen3", seed=1)`: the model in float32 with other random weights; norms and biases random too."""

    def make(kind: str, seed: int = 0) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(model_folder(kind), dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.1 if parameter.ndim > 1 else 1 + noise * 0.2)
        return model

    return make


@pytest.fixture(scope="session")
def published() -> Callable[..., WeightUpdate]:
    """`published(model, "w8a8_int8", version=3)`: what a learner with that model publishes, every tensor with a tile."""

    def make(model: PreTrainedModel, format: str, version: int = 0, n_tiles: int = 64) -> WeightUpdate:
        return model_update(model, formats.get(format), version, n_tiles)

    return make


@pytest.fixture(scope="session")
def start(model_folder) -> Iterator[Callable[..., Engine]]:
    """`start("vllm", "w8a8_int8", "qwen3")`: an engine without weights, closed with the session."""
    engines: list[Engine] = []

    def make(engine: str, format: str, kind: str, dtype: str = "float32", tile_tolerance: float = 0.02) -> Engine:
        config = RolloutConfig(engine=engine, format=format, kv_cache_gb=0.05, max_sequences=64)  # type: ignore[arg-type]
        engines.append(open_engine(config, model_folder(kind), dtype, CONTEXT, tile_tolerance))
        return engines[-1]

    yield make
    with patch("gc.collect"):  # vLLM collects twice an engine, a second each in a process as full as this one
        for engine in engines:
            engine.close()


def export(model: PreTrainedModel, format: str, policy: Path, out: Path) -> Path:
    """A checkpoint of the model in that format, beside the tokenizer of `policy`, as stock vLLM loads it."""
    plain = out / "policy"
    model.save_pretrained(plain)
    for file in policy.glob("tokenizer*"):
        (plain / file.name).write_bytes(file.read_bytes())
    found = formats.get(format)
    write_checkpoint(plain, out / "export", found, quantization_override(found))
    return out / "export"


@pytest.fixture(scope="session")
def exported() -> Callable[..., Path]:
    """See `export`."""
    return export


class Pair:
    """Two processes, each a rank of one engine, that are asked together; see `rank.py`."""

    def __init__(self, folder: Path) -> None:
        listeners = [Listener(str(folder / f"rank{rank}")) for rank in range(2)]
        self.processes = []
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        for rank, listener in enumerate(listeners):
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices[rank % len(devices)]}
            command = [sys.executable, str(Path(__file__).parent / "rank.py"), str(listener.address)]
            self.processes.append(subprocess.Popen(command, env=environment))
        self._connections = [listener.accept() for listener in listeners]

    def open(self, how: str, config: RolloutConfig, path: Path, dtype: str) -> list[str]:
        """An engine, `refilled` or `stock`; the contract of each rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            meeting = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        arguments = {"config": config, "path": path, "dtype": dtype, "max_tokens": CONTEXT, "meeting": meeting}
        return self._answers([(f"open_{how}", (), {**arguments, "rank": rank}) for rank in range(2)])

    def __call__(self, name: str, *arguments: Any) -> list[Any]:
        """Both ranks' answers. Raises what both raise; where one raises alone, it is an answer."""
        return self._answers([(name, arguments, {})] * 2)

    def one(self, rank: int, name: str, *arguments: Any) -> Any:
        """One rank's answer. The other is not asked."""
        self._connections[rank].send((name, arguments, {}))
        return self._connections[rank].recv()

    def _answers(self, asked: list[Any]) -> list[Any]:
        for connection, message in zip(self._connections, asked, strict=True):
            connection.send(message)
        found = [connection.recv() for connection in self._connections]
        if all(isinstance(answer, Exception) for answer in found):
            raise ExceptionGroup("of both ranks", found)
        return found

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("pair"))
    yield made
    made.close()


Reference = Callable[[PreTrainedModel, str, Tensor], Tensor]


@pytest.fixture(scope="session")
def reference_logits() -> Reference:
    """`reference_logits(model, format, tokens [T]) -> [T, V]`: transformers in float32 with every linear layer that the
    format covers rewritten in plain torch: dequantized by the compressed-tensors library, inputs rounded per token."""

    def dequantized(format: formats.QuantFormat, codes: dict[str, Tensor]) -> Tensor:
        if format.weight == "int4":
            packed, scale = codes["weight_packed"], codes["weight_scale"]
            shape = torch.Size((*packed.shape[:-1], packed.shape[-1] * 8))
            rows = unpack_from_int32(
                packed.reshape(-1, packed.shape[-1]), 4, torch.Size((shape[:-1].numel(), shape[-1]))
            )
            return (rows.reshape(shape).to(scale.dtype) * scale.repeat_interleave(format.group or 1, dim=-1)).float()
        return codes["weight"].float() * codes["weight_scale"]

    def rounded(format: formats.QuantFormat, x: Tensor) -> Tensor:
        if format.activation == "none":
            return x
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (127 if format.activation == "int8" else 448)
        codes = x * (1 / scale)  # written as vLLM computes it: another rounding would turn into whole codes
        return (codes.round() if format.activation == "int8" else codes.to(torch.float8_e4m3fn).float()) * scale

    @torch.no_grad()
    def logits(model: PreTrainedModel, format_name: str, tokens: Tensor) -> Tensor:
        format = formats.get(format_name)
        model = copy.deepcopy(model)
        for name, parameter in model.named_parameters():
            if format.covers(name, tuple(parameter.shape)):
                parameter.copy_(dequantized(format, load(format.name, "emulated").quantize(parameter, format.group)))
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and format.covers(f"{name}.weight", tuple(module.weight.shape)):
                module.register_forward_pre_hook(lambda _, inputs: (rounded(format, inputs[0]),))
        return model(tokens[None].long()).logits[0]

    return logits
