"""Tensors as bytes: nothing lost, nothing copied on arrival, every change found."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from qarl.errors import SyncError
from qarl.formats import get
from qarl.kernels.dispatch import load
from qarl.records import WeightUpdate
from qarl.transfer import HostDelivery
from qarl.wire import Spec, from_wire, published_specs, to_wire

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (2, 3, 4)], ids=str)
def test_a_tensor_survives_the_trip_with_dtype_shape_and_bits(dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = (torch.randn(shape) * 5).to(dtype)
    wire = pickle.loads(pickle.dumps(to_wire(tensor)))
    back = from_wire(wire)
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


@pytest.mark.parametrize("broken", [{"data": np.zeros(23, np.uint8)}, {"dtype": "float31"}, {"shape": (7,)}])
def test_bytes_that_do_not_fit_are_named(broken: dict):
    tensors = {"w": {"weight": replace(to_wire(torch.randn(2, 3)), **broken)}}
    with pytest.raises(SyncError, match=r"w \(weight\) did not arrive whole"):
        list(HostDelivery(WeightUpdate(0, "bf16", "", tensors, {"w": {"weight": 0}})).buckets())


@pytest.mark.parametrize("name", ["bf16", "w8a8_int8", "w4a16_g32"])
def test_what_a_model_publishes_is_known_before_it_is_quantized(name: str):
    format = get(name)
    shapes = {
        "layer.q_proj.weight": (8, 64),
        "layer.k_proj.weight": (4, 64),
        "layer.v_proj.weight": (4, 64),
        "layer.norm.weight": (64,),
    }
    weight = torch.randn(16, 64)
    codes = load(name, "emulated").quantize(weight, format.group) if format.quantizes else {"weight": weight.half()}
    expected = {part: Spec.of(code) for part, code in codes.items()}
    assert published_specs(shapes, format, torch.float16) == {
        "layer.qkv_proj": expected,
        "layer.norm": {"weight": Spec(torch.float16, (64,))},
    }
