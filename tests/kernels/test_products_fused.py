"""Products of 8-bit codes in Triton: int8 and e4m3, a matrix and experts, against float64, bit for bit.

Without a GPU the kernels run in Triton's interpreter, which truncates where a GPU rounds to bfloat16: what is compared
there is the float32 before that step.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qarl.kernels.epilogue import rescale, rescale_experts
from qarl.kernels.products_fused import hopper_refusal, multiply, multiply_grouped, pad

GRIDS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> torch.dtype:
    return GRIDS[request.param]


def random_codes(grid: torch.dtype, *shape: int, device: str) -> Tensor:
    """e4m3: small integers, whose sums a tensor core holds too, in 13 bits after the first."""
    limit = 127 if grid == torch.int8 else 4
    return torch.randint(-limit, limit + 1, shape, device=device).to(torch.float32).to(grid)


def random_scales(*shape: int, device: str) -> Tensor:
    return torch.rand(*shape, 1, device=device) + 0.1


def exact_sum(x: Tensor, w: Tensor) -> Tensor:
    return (x.double() @ w.double().t()).float()


def experts_reference(
    codes: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, offsets: Tensor, row_weights: Tensor | None
) -> Tensor:
    y = torch.zeros(len(codes), weight.shape[1], device=codes.device)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        rows = slice(start, end)
        weights = None if row_weights is None else row_weights[rows]
        acc = exact_sum(codes[rows], weight[expert])
        y[rows] = rescale_experts(acc, scale[rows], w_scale[expert], weights, torch.float32)
        start = end
    return y


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 33), (70, 130, 256), (130, 40, 300), (64, 128, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_product_is_the_exact_sum_rescaled(
    grid: torch.dtype, shape: tuple[int, int, int], biased: bool, device: str
) -> None:
    m, n, k = shape
    codes, weight = random_codes(grid, m, k, device=device), random_codes(grid, n, k, device=device)
    scale, w_scale = random_scales(m, device=device), random_scales(n, device=device)
    bias = torch.randn(n, device=device).bfloat16() if biased else None
    y = multiply(codes, scale, pad(weight), w_scale, bias, torch.float32)
    assert torch.equal(y, rescale(exact_sum(codes, weight), scale, w_scale, bias, torch.float32))


def test_a_sum_of_integers_is_exact_beyond_what_float32_holds(device: str) -> None:
    """Codes of one sign near 127: sums beyond 2^24, odd among them."""
    weight = torch.randint(120, 128, (20, 4112), dtype=torch.int8, device=device)
    codes = torch.randint(120, 128, (10, 4112), dtype=torch.int8, device=device)
    one = torch.ones(20, 1, device=device)
    y = multiply(codes, one[:10], weight, one, None, torch.float32)
    assert torch.equal(y, exact_sum(codes, weight)) and y.max() > 2**24


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("counts", "after"),
    [([3, 0, 5, 0], 2), ([0, 0, 0, 70], 0), ([130, 1, 0, 0, 7], 5), ([0, 0], 4), ([9], 0), ([64, 64, 64], 0)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_experts_are_exact_sums_rescaled(
    grid: torch.dtype, counts: list[int], after: int, weighted: bool, offset_dtype: torch.dtype, device: str
) -> None:
    offsets = torch.tensor(counts, device=device).cumsum(0).to(offset_dtype)
    m, experts = sum(counts) + after, len(counts)
    codes, weight = random_codes(grid, m, 40, device=device), random_codes(grid, experts, 20, 40, device=device)
    scale, w_scale = random_scales(m, device=device), random_scales(experts, 20, device=device)
    scale[sum(counts) :] = float("nan")  # of no expert: their rows are 0 all the same
    row_weights = torch.rand(m, device=device) if weighted else None
    y = multiply_grouped(codes, scale, pad(weight), w_scale, offsets, row_weights, torch.float32)
    assert torch.equal(y, experts_reference(codes, scale, weight, w_scale, offsets, row_weights))


def test_no_experts_give_zeros(grid: torch.dtype, device: str) -> None:
    codes, weight = random_codes(grid, 3, 32, device=device), random_codes(grid, 0, 16, 32, device=device)
    offsets = torch.empty(0, dtype=torch.int32, device=device)
    scale, w_scale = random_scales(3, device=device), random_scales(0, 16, device=device)
    y = multiply_grouped(codes, scale, weight, w_scale, offsets, None, torch.float32)
    assert torch.equal(y, torch.zeros(3, 16, device=device))


def test_padding_adds_zeros_and_copies_nothing_where_there_is_none_to_add(grid: torch.dtype, device: str) -> None:
    whole, odd = random_codes(grid, 2, 33, 48, device=device), random_codes(grid, 2, 33, 17, device=device)
    assert pad(whole).data_ptr() == whole.data_ptr() and pad(whole, rows=True).shape == (2, 48, 48)
    for padded, shape in ((pad(odd), (2, 33, 32)), (pad(odd, rows=True), (2, 48, 32))):
        assert padded.shape == shape and padded.dtype == grid
        assert torch.equal(padded[:, :33, :17].float(), odd.float())
        assert padded.float().abs().sum() == odd.float().abs().sum()


def test_it_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hopper_refusal("cpu", torch.bfloat16) == "its Triton kernels run on cuda only"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hopper_refusal("cuda", torch.bfloat16) == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert "need Hopper" in str(hopper_refusal("cuda", torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "not torch.float32" in str(hopper_refusal("cuda", torch.float32))
    assert hopper_refusal("cuda", torch.bfloat16) is None
