"""What this machine's vLLM runs, and the refusal of what it does not."""

import os

import pytest
import torch

from qarl import formats
from qarl.errors import ConfigError
from qarl.rollout.capability import require_format, supported_formats
from qarl.rollout.vllm_settings import ENVIRONMENT, set_environment

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about CPUs")


def test_every_format_gets_an_answer_and_bf16_and_int8_run_on_a_cpu():
    for dtype in ("float32", "bfloat16"):
        found = supported_formats(dtype)
        assert set(found) == set(formats.FORMATS)
        assert found["bf16"] is None and found["w8a8_int8"] is None


def test_w4a16_is_refused_in_float32_by_name_with_what_runs_instead(model_folder):
    with pytest.raises(ConfigError) as error:
        require_format(formats.get("w4a16"), model_folder("qwen3"), "float32")
    message = str(error.value)
    assert message.startswith("rollout.format: 'w4a16' does not run in this machine's vLLM with model.dtype=float32")
    assert "'bf16'" in message and "'w8a8_int8'" in message and "rollout.engine=torch runs every format" in message


def test_quantized_experts_are_refused_also_where_vllm_has_some(start):
    with pytest.raises(
        ConfigError, match=r"rollout.format: 'w8a8_int8' .* no int8 experts .* proved\); it runs \['bf16'\]"
    ):
        start("vllm", "w8a8_int8", "qwen3_moe")


def test_a_context_beyond_the_models_is_refused(model_folder):
    from qarl.config import RolloutConfig
    from qarl.rollout.engine import open_engine

    with pytest.raises(ConfigError, match="model.max_tokens: 257 is beyond the model's context of 256"):
        open_engine(RolloutConfig(engine="torch", format="bf16"), model_folder("qwen3"), "float32", 257)


def test_a_variable_that_changes_vllms_numbers_is_refused_by_name(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # put back afterwards
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    set_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ConfigError, match="environment variable VLLM_USE_V2_MODEL_RUNNER: '1' .* choose '0'"):
        set_environment()
