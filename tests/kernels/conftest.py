"""Where kernel tests run."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The GPU, where there is one; else the CPU, on which Triton's kernels run in its interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
