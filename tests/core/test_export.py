"""An exported policy holds the learner's own codes, under the names that other libraries read."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3Config, Qwen3MoeConfig

from qarl import checkpoint, formats
from qarl.build import to_mapping
from qarl.compressed import read_tensors, write_checkpoint
from qarl.errors import ConfigError
from qarl.export import ExportConfig, export, parse
from qarl.kernels.dispatch import quantizer
from qarl.trainer.pocket import build_tokenizer

QUANTIZED = ("w4a16", "w4a16_g32", "w8a8_fp8", "w8a8_int8")
SHAPE: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 2,
}
CONFIGS = {
    "dense": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "moe": Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, tie_word_embeddings=False
    ),
}
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("policies")
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / kind)
        build_tokenizer(256).save_pretrained(root / kind)
    return {kind: root / kind for kind in CONFIGS}


@pytest.fixture(scope="module")
def exported(policies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`exported("moe", "w4a16")` -> the folder, made once."""
    root = tmp_path_factory.mktemp("exports")

    def make(kind: str, format: str) -> Path:
        out = root / f"{kind}-{format}"
        if not out.exists():
            export(ExportConfig(model=str(policies[kind]), format=format, out=str(out)))
        return out

    return make


def on_grid(weight: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as the learner computes with it."""
    group, kernel = formats.get(format).group, quantizer(format, "cpu")
    return kernel.dequantize(kernel.quantize(weight, group), group, dtype)


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Every weight of an export, by the compressed-tensors library."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    compressor: Any = BaseCompressor.get_value_from_registry(settings["format"])
    stored = dict(read_tensors(folder))
    modules = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    weights = {}
    for module in modules:
        parts = {name.rpartition(".")[2]: stored.pop(name) for name in list(stored) if name.startswith(f"{module}.")}
        weights[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return stored | weights


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_library_decompresses_to_what_the_learner_computes_with(kind, format, policies, exported):
    found = decompressed(exported(kind, format))
    source = dict(read_tensors(policies[kind]))
    assert found.keys() == source.keys()
    n_quantized = 0
    for name, weight in source.items():
        if formats.get(format).covers(name, tuple(weight.shape)):
            n_quantized += 1
            assert torch.equal(found[name].float(), on_grid(weight, format)), name
        else:
            assert torch.equal(found[name], weight), name
    assert n_quantized == 2 * (4 + 3 * (4 if kind == "moe" else 1))


@pytest.mark.parametrize(
    ("kind", "format"),
    [("dense", format) for format in ("bf16", *QUANTIZED)]
    + [("moe", format) for format in ("bf16", "w4a16", "w4a16_g32", "w8a8_fp8")],
    # INT8 experts are read by vLLM alone: transformers looks for packed ones whatever the format says.
)
def test_transformers_loads_the_learners_weights(kind, format, policies, exported):
    """In the dtype in which its decompression rounds as the grid says: it multiplies in that of the model it loads."""
    dtype = torch.float32 if format.startswith("w8a8") else torch.bfloat16
    options: dict[str, Any] = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)} if format != "bf16" else {}
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        exported(kind, format), dtype=dtype, output_loading_info=True, **options
    )
    model, report = loaded
    assert not any(report.values()), report
    found = dict(model.named_parameters())
    for name, weight in AutoModelForCausalLM.from_pretrained(policies[kind]).named_parameters():
        covered = formats.get(format).covers(name, tuple(weight.shape))
        rounded = torch.bfloat16 if weight.ndim == 3 else dtype  # it decompresses experts to bfloat16 whatever is asked
        expected = on_grid(weight, format, rounded) if covered else weight.to(dtype)
        assert torch.equal(found[name].float(), expected.float()), name


def test_bf16_is_a_plain_checkpoint(exported):
    folder = exported("moe", "bf16")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["dtype"] == "bfloat16" and "quantization_config" not in settings
    assert {tensor.dtype for _, tensor in read_tensors(folder)} == {torch.bfloat16}


def test_names_and_dtypes_are_those_of_the_loaders(exported):
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read_tensors(exported("moe", "w4a16_g32"))}
    gate = "model.layers.1.mlp.experts.3.gate_proj"
    assert stored[f"{gate}.weight_packed"] == (torch.int32, (128, 16))
    assert stored[f"{gate}.weight_scale"] == (torch.bfloat16, (128, 4))
    assert stored[f"{gate}.weight_shape"] == (torch.int64, (2,))
    assert "model.layers.1.mlp.gate.weight" in stored and "lm_head.weight" in stored
    stored = {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read_tensors(exported("dense", "w8a8_int8"))
    }
    q = "model.layers.0.self_attn.q_proj"
    assert stored[f"{q}.weight"] == (torch.int8, (128, 128))
    assert stored[f"{q}.weight_scale"] == (torch.float32, (128, 1))
    assert "lm_head.weight" not in stored  # tied


def test_tokenizer_and_generation_settings_come_along(policies, exported):
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert kept <= {file.name for file in exported("dense", "w4a16").iterdir()}
    for name in kept:
        assert (exported("dense", "w4a16") / name).read_bytes() == (policies["dense"] / name).read_bytes()


def test_shards_hold_the_same_tensors(policies, exported, tmp_path):
    format = formats.get("w8a8_int8")
    write_checkpoint(policies["moe"], tmp_path / "out", format, {}, shard_bytes=100_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) < 110_000
    whole = dict(read_tensors(exported("moe", "w8a8_int8")))
    found = dict(read_tensors(tmp_path / "out"))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("format", ["bf16", "w4a16"])
def test_packed_experts_are_written_one_by_one(format, policies, exported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policies["moe"])
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text((policies["moe"] / "config.json").read_text())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights
    save_file(weights, tmp_path / "packed" / "model.safetensors")
    write_checkpoint(tmp_path / "packed", tmp_path / "out", formats.get(format), {})
    found, whole = dict(read_tensors(tmp_path / "out")), dict(read_tensors(exported("moe", format)))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_run_is_exported_from_its_newest_checkpoint_at_its_own_format(policies, composed, tmp_path):
    config = composed("recipe=quickstart", "rollout.format=w8a8_int8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    for step, scale in ((10, 2.0), (20, 3.0)):

        def write(folder: Path, scale: float = scale) -> None:
            model = AutoModelForCausalLM.from_pretrained(policies["dense"])
            model.model.norm.weight.data.fill_(scale)
            model.save_pretrained(folder / "policy")

        checkpoint.save(tmp_path / "run" / "checkpoints", {"step": step}, write, keep=5)
    export(parse([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]))
    found = dict(read_tensors(tmp_path / "out"))
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert torch.equal(found["model.norm.weight"], torch.full((128,), 3.0))


def test_a_group_that_does_not_divide_is_refused_and_nothing_is_left(tmp_path):
    narrow = Qwen3Config(**(SHAPE | {"intermediate_size": 192}))
    AutoModelForCausalLM.from_config(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"divisible by 128, but model.layers.0.mlp.down_proj.weight"):
        export(ExportConfig(model=str(tmp_path / "narrow"), format="w4a16", out=str(tmp_path / "out")))
    assert [entry.name for entry in tmp_path.iterdir()] == ["narrow"]


def test_what_is_quantized_already_is_refused(exported, tmp_path):
    with pytest.raises(ConfigError, match="quantized already"):
        export(ExportConfig(model=str(exported("dense", "w4a16")), format="w4a16", out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=a", "model=b", "format=bf16", "out=c"], "give exactly one"),
        (["format=bf16", "out=c"], "give exactly one"),
        (["model=b", "out=c"], "format: must be given"),
        (["model=b", "format=w4a61", "out=c"], "did you mean 'w4a16'"),
        (["model=b", "format=bf16"], "out: must name"),
        (["model=b", "format=bf16", "out=/"], "exists already"),
        (["modle=b", "format=bf16", "out=c"], "did you mean 'model'"),
        (["model"], "not key=value"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)


def test_sources_that_are_none_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no run's folder"):
        export(ExportConfig(run=str(tmp_path), out=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="no folder with config.json"):
        export(ExportConfig(model=str(tmp_path), format="bf16", out=str(tmp_path / "out")))


def test_the_command_says_a_mistake_without_torch_and_without_a_traceback():
    code = "import sys, runpy; sys.argv = ['export', 'format=bf16']\n"
    code += "try: runpy.run_module('qarl.export', run_name='__main__')\n"
    code += "except SystemExit as end: assert end.code == 2 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("ConfigError: run, model: give exactly one"), done.stderr
