"""Tensors as bytes: nothing lost, nothing copied on arrival, every change found."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from qarl.errors import SyncError
from qarl.wire import from_wire, to_wire, verify

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (2, 3, 4)], ids=str)
def test_a_tensor_survives_the_trip_with_dtype_shape_and_bits(dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = (torch.randn(shape) * 5).to(dtype)
    wire = pickle.loads(pickle.dumps(to_wire(tensor)))
    back = verify("w", "weight", wire)
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_strided_tensor_is_sent_in_order():
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).t()
    assert torch.equal(from_wire(to_wire(tensor)), tensor)


def test_arriving_copies_nothing_even_from_read_only_memory(recwarn):
    wire = to_wire(torch.arange(8, dtype=torch.float32))
    wire.data.flags.writeable = False
    assert from_wire(wire).data_ptr() == wire.data.__array_interface__["data"][0]
    assert not [w for w in recwarn if "writable" in str(w.message)]


@pytest.mark.parametrize("bit", [0, 77, 8 * 4 * 6 - 1])
def test_any_flipped_bit_is_found_and_named(bit: int):
    wire = to_wire(torch.randn(2, 3))
    data = wire.data.copy()
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SyncError, match=r"layer.7 \(weight_scale\) was changed on the way"):
        verify("layer.7", "weight_scale", replace(wire, data=data))


@pytest.mark.parametrize("broken", [{"data": np.zeros(23, np.uint8)}, {"dtype": "float31"}, {"shape": (7,)}])
def test_bytes_that_do_not_fit_are_named(broken: dict):
    with pytest.raises(SyncError, match=r"w \(weight\) did not arrive whole"):
        verify("w", "weight", replace(to_wire(torch.randn(2, 3)), **broken))
