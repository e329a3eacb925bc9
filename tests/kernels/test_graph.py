"""A recording: launched again, it computes from what its inputs hold by then, however much memory came and went meanwhile."""

import gc

import pytest
import torch

from qarl.kernels.graph import Recording

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _doubled_and_shifted(x: torch.Tensor) -> Recording[torch.Tensor]:
    shift = torch.arange(1 << 16, device="cuda", dtype=torch.float32)  # known to the closure alone
    return Recording(lambda: 2 * x + shift)


def test_it_reads_its_inputs_anew_and_what_its_function_alone_knew_is_still_there():
    x = torch.zeros(1 << 16, device="cuda")
    recording = _doubled_and_shifted(x)
    expected = torch.arange(1 << 16, dtype=torch.float32)
    for value in (1.0, -3.0, 0.5):
        gc.collect()
        torch.full((1 << 22,), torch.nan, device="cuda")  # in the place of what was freed, and freed itself
        torch.cuda.empty_cache()
        x.fill_(value)
        torch.testing.assert_close(recording.replay().cpu(), 2 * value + expected, rtol=0, atol=0)


def test_every_replay_writes_the_same_tensors():
    x = torch.ones(8, device="cuda")
    recording = Recording(lambda: (x + 1, x - 1))
    first = recording.replay()
    x.fill_(5.0)
    second = recording.replay()
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    assert first[0].tolist() == [6.0] * 8 and first[1].tolist() == [4.0] * 8


def test_garbage_that_holds_a_graph_is_not_freed_while_another_is_captured():
    x = torch.ones(8, device="cuda")

    def with_garbage() -> torch.Tensor:
        for _ in range(2000):  # the collector looks after some hundred new containers
            cycle: list[object] = []
            cycle.append(cycle)
        return x + 1

    cycle: list[object] = [Recording(lambda: x * 2)]
    cycle.append(cycle)
    del cycle
    assert Recording(with_garbage).replay().tolist() == [2.0] * 8
    assert gc.isenabled()
