"""The checksum's kernel, against the definition in numpy: on tensors of any kind, and what both must see.

Without a GPU the kernel runs in Triton's interpreter. Inputs are new in every run; a failure prints their seed.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from qarl.kernels import checksum as module
from qarl.kernels import checksum_fused
from qarl.kernels.checksum import checksum, collect, pending

PROGRAM = 8 * checksum_fused._BLOCK * checksum_fused._STEPS
"""Bytes that one program reads."""


@pytest.fixture(autouse=True)
def seed() -> None:
    seed = time.time_ns() % 2**32
    print("seed", seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _kernel_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pending` of a tensor on the CPU takes the kernel too."""
    monkeypatch.setattr(module, "_add_words", checksum_fused.add_words)


def random_bytes(n: int, device: str) -> Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, device=device)


def defined(tensor: Tensor) -> int:
    """The definition: numpy's uint64 wraps as it should."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    x = np.pad(data, (0, -len(data) % 8)).view(np.uint64)
    x = x + np.arange(len(x), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(multiplier)
    return (int(x.sum(dtype=np.uint64)) + len(data) * 0xD6E8FEB86659FD93) % 2**64


BLOCK = 8 * checksum_fused._BLOCK
SIZES = [0, 1, 7, 8, 9, 1000, BLOCK - 1, BLOCK, BLOCK + 8, PROGRAM - 8, PROGRAM, PROGRAM + 1, 3 * PROGRAM + 40]


@pytest.mark.parametrize("n", SIZES)
def test_any_number_of_bytes(n: int, device: str) -> None:
    data = random_bytes(n, device)
    assert checksum(data) == defined(data)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float8_e4m3fn]
)
def test_any_dtype_and_shape(dtype: torch.dtype, device: str) -> None:
    data = random_bytes(8 * 3 * 5 * 41, device).view(dtype)
    assert checksum(data) == checksum(data.view(3, 5, -1)) == defined(data)
    assert checksum(data[:0].view(0, 7)) == 0
    assert checksum(data[0]) == defined(data[0])  # a scalar
    assert checksum(data[-3:]) == defined(data[-3:])


@pytest.mark.parametrize("start", range(1, 17))
def test_any_offset(start: int, device: str) -> None:
    data = random_bytes(PROGRAM + 48, device)
    for end in (None, start + 800, start + 3):  # 800 bytes are whole words, if not aligned ones
        assert checksum(data[start:end]) == defined(data[start:end])


def test_any_strides(device: str) -> None:
    tensor = torch.randn(3, 34, 65, device=device).bfloat16()
    for view in (tensor.transpose(1, 2), tensor[:, ::2], tensor[..., 1:], tensor[1].t(), tensor[:1].expand(4, 34, 65)):
        assert checksum(view) == defined(view)
    assert checksum(torch.nn.Parameter(tensor)) == defined(tensor)
    assert checksum(tensor > 0) == defined(tensor > 0)


@pytest.mark.parametrize("fill", [0, 255, 128])
def test_words_of_one_value(fill: int, device: str) -> None:
    data = torch.full((PROGRAM + 80,), fill, dtype=torch.uint8, device=device)
    assert checksum(data) == defined(data)
    assert len({checksum(data[:n]) for n in range(40)}) == 40  # padding is told from zeros


def test_a_flipped_bit_is_seen(device: str) -> None:
    data = random_bytes(2 * PROGRAM + 5, device)
    before = checksum(data)
    for place in (0, len(data) - 1, *torch.randint(0, len(data), (20,)).tolist()):
        bit = 1 << int(torch.randint(0, 8, ()))
        data[place] ^= bit
        assert checksum(data) != before
        data[place] ^= bit
    assert checksum(data) == before


def test_swapped_rows_and_words_are_seen(device: str) -> None:
    """Also such as lie at the same place of two programs, or of two steps of one."""
    words = random_bytes(3 * PROGRAM, device).view(torch.int64)
    before = checksum(words)
    step, program = checksum_fused._BLOCK, PROGRAM // 8
    for i, j in ((0, 1), (0, step), (5, 5 + program), (7, len(words) - 1), (3, 3 + 2 * step)):
        swapped = words.clone()
        swapped[[i, j]] = words[[j, i]]
        assert checksum(swapped) != before
    rows = words.view(-1, step)
    for i, j in ((0, 1), (0, 4), (2, 11)):
        swapped = rows.clone()
        swapped[[i, j]] = rows[[j, i]]
        assert checksum(swapped) != before


@pytest.mark.parametrize("bit", [0, 31, 32, 33, 62, 63])
def test_a_lone_bit_counts_by_its_place(bit: int, device: str) -> None:
    words = torch.zeros(3 * PROGRAM // 8, dtype=torch.int64, device=device)
    places = torch.randperm(len(words))[:20].tolist()
    sums = []
    for place in places:
        words.zero_()
        words[place] = 1 << bit if bit < 63 else -(1 << 63)
        sums.append(pending(words))
    assert len(set(collect(sums))) == 20


def test_the_kernel_adds_to_what_is_there_and_reads_no_further(device: str) -> None:
    words = random_bytes(8 * 300, device).view(torch.int64)
    total = torch.tensor([1, -5, 2], device=device)
    checksum_fused.add_words(words[:100], total[1])
    words[100:] = 0
    assert total[1] - checksum_fused.add_words(words[:100], torch.zeros((), dtype=torch.int64, device=device)) == -5
    assert (total[0], total[2]) == (1, 2)


def test_pending_sums_are_int64_where_the_tensor_is_and_are_collected_in_order(device: str) -> None:
    tensors = [random_bytes(n, device) for n in (0, 3, 8, 1000, PROGRAM + 1)] + [torch.randn(7, 9, device=device).t()]
    sums = [pending(tensor) for tensor in tensors]
    assert {(s.dtype, s.shape, s.device.type) for s in sums} == {(torch.int64, (), device)}
    collected = collect(sums)
    assert collected == [checksum(tensor) for tensor in tensors] == [defined(tensor) for tensor in tensors]
    assert all(type(value) is int and 0 <= value < 2**64 for value in collected)
    assert collect(tuple(sums)) == collected and collect([]) == []


def test_sums_beyond_the_sign_bit_are_collected_unsigned(device: str) -> None:
    sums = [torch.tensor(value, device=device) for value in (-1, -(2**63), 2**63 - 1, 0)]
    assert collect(sums) == [2**64 - 1, 2**63, 2**63 - 1, 0]


@pytest.mark.gpu
def test_pending_waits_for_nothing() -> None:
    tensors = [random_bytes(10_001, "cuda"), torch.randn(64, 65, device="cuda").t()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = [pending(tensor) for tensor in tensors]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert collect(sums) == [defined(tensor) for tensor in tensors]


@pytest.mark.gpu
def test_the_same_in_every_run() -> None:
    data = torch.randn(5120, 4096, device="cuda", dtype=torch.bfloat16)
    assert set(collect([pending(data) for _ in range(20)])) == {defined(data)}


@pytest.mark.gpu
def test_more_than_two_to_the_31_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (2**31 + 5,), device="cuda")
    fused = checksum(words), checksum(words[3:-1])
    monkeypatch.undo()
    total = torch.zeros(2, dtype=torch.int64, device="cuda")
    module._add_words(words, total[0])
    module._add_words(words[3:-1], total[1])
    lengths = (8 * len(words), 8 * (len(words) - 4))
    assert fused == tuple((s + n * module._LENGTH) % 2**64 for s, n in zip(total.tolist(), lengths, strict=True))


def test_tensors_that_stay_are_summed_together(device: str) -> None:
    """In one launch; each as alone, also empty ones, ones of several programs, and once their bytes have changed."""
    sizes = (0, 1, 7, 4096, 4097, 9000, 2 * 4096)
    tensors = [torch.randint(-(2**62), 2**62, (n,), dtype=torch.int64, device=device) for n in sizes]
    tensors.append(torch.randn(33, 16, device=device).bfloat16())
    tables = module._tables(tensors)
    for _ in range(2):
        pointers, counts, owners, firsts, terms = tables
        totals = checksum_fused.add_tables(pointers, counts, owners, firsts, terms.clone())
        assert [total % 2**64 for total in totals.tolist()] == [defined(t) for t in tensors]
        assert module.Fixed(tensors).pending().tolist() == totals.tolist()
        tensors[3][5] += 1


def test_tensors_of_odd_bytes_are_summed_all_the_same(device: str) -> None:
    tensors = [torch.arange(n, dtype=torch.uint8, device=device) for n in (3, 8, 0)]
    assert [total % 2**64 for total in module.Fixed(tensors).pending().tolist()] == [defined(t) for t in tensors]
    assert module.Fixed([]).pending().tolist() == []
