"""A 64-bit checksum of a tensor's bytes, computed where it lies: learner and engine compare them at every sync.

On CUDA one kernel reads the bytes once (`checksum_fused.py`); this is the definition, and what runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Words mixed at a time: on a CPU few enough to stay in its cache, elsewhere enough to fill the device.
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 14, 1 << 24
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_LENGTH = 0xD6E8FEB86659FD93


def checksum(tensor: Tensor) -> int:
    """0 … 2^64-1, of the bytes in row-major order: the same on every device and for every stride.

    The sum over 8-byte words of mix(word + key(position)), modulo 2^64. `mix` is one to one, so a change within one
    word, a flipped bit among them, is *always* seen; changes of several words (swapped rows) go unseen once in
    about 2^64.
    Views of the same bytes in another dtype or shape agree: dtype and shape travel beside the checksum.
    """
    return collect([pending(tensor)])[0]


@torch.no_grad()
def pending(tensor: Tensor) -> Tensor:
    """The same as the int64 of equal bits, [] on the tensor's device: nothing waits for it before `collect`."""
    words, n_bytes = words_of(tensor)
    total = torch.full((), length_term(n_bytes), dtype=torch.int64, device=words.device)
    if words.is_cuda:
        from qarl.kernels import checksum_fused

        return checksum_fused.add_words(words, total)
    return _add_words(words, total)


def collect(sums: Sequence[Tensor]) -> list[int]:
    """Checksums, each 0 … 2^64-1, from what `pending` gave for tensors of one device: one transfer, one wait."""
    return [value % (1 << 64) for value in torch.stack(list(sums)).tolist()] if sums else []


class Fixed:
    """The checksums of tensors that stay where they are, again and again: on CUDA all of them in one launch."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Contiguous, of one device; a view is held of each."""
        self._tensors = list(tensors)
        self._table: tuple[Tensor, ...] = ()
        if self._tensors and self._tensors[0].is_cuda and all(_is_whole(tensor) for tensor in self._tensors):
            self._table = _tables(self._tensors)

    def pending(self) -> Tensor:
        """int64 [n], as `pending` of each."""
        if not self._table:
            return (
                torch.stack([pending(tensor) for tensor in self._tensors])
                if self._tensors
                else torch.empty(0, dtype=torch.int64)
            )
        from qarl.kernels import checksum_fused

        pointers, counts, owners, firsts, terms = self._table
        return checksum_fused.add_tables(pointers, counts, owners, firsts, terms.clone())


def length_term(n_bytes: int) -> int:
    """What the length of a tensor adds to its checksum, as a signed integer: without it, zero bytes at the end would not count."""
    return _int64(n_bytes * _LENGTH)


def _is_whole(tensor: Tensor) -> bool:
    """Whether its bytes are whole words that a kernel can load 16 bytes at a time."""
    return tensor.is_contiguous() and tensor.nbytes % 8 == 0 and tensor.data_ptr() % 16 == 0


def _tables(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `checksum_fused.add_tables` takes, and the lengths' terms, on the device."""
    from qarl.kernels.checksum_fused import PER_PROGRAM

    device = tensors[0].device
    counts = torch.tensor([tensor.nbytes // 8 for tensor in tensors])
    programs = -(-counts // PER_PROGRAM)
    owners = torch.repeat_interleave(torch.arange(len(tensors), dtype=torch.int32), programs)
    before = torch.repeat_interleave(programs.cumsum(0) - programs, programs)
    firsts = (torch.arange(len(owners)) - before) * PER_PROGRAM
    pointers = torch.tensor([tensor.data_ptr() for tensor in tensors])
    terms = torch.tensor([length_term(tensor.nbytes) for tensor in tensors])
    return tuple(table.to(device) for table in (pointers, counts, owners, firsts, terms))


def words_of(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor's bytes as int64 [⌈bytes/8⌉], and their number. A view wherever such a view can be."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    n_bytes = len(data)
    if n_bytes % 8 or data.storage_offset() % 8:
        data = F.pad(data, (0, -n_bytes % 8))
    return data.view(torch.int64), n_bytes


def _add_words(words: Tensor, total: Tensor) -> Tensor:
    """total int64 [] += Σ mix(word + key(position)), words int64 [n]."""
    step = _CPU_CHUNK if words.device.type == "cpu" else _DEVICE_CHUNK
    keys = torch.arange(min(step, len(words)), device=words.device) * _int64(GOLDEN)
    for start in range(0, len(words), step):
        chunk = words[start : start + step]
        total += _mix(torch.add(chunk, keys[: len(chunk)]).add_(_int64(start * GOLDEN))).sum()
    return total


def _mix(x: Tensor) -> Tensor:
    """Two of the three rounds of MurmurHash3's 64-bit finalizer (A. Appleby, 2011), in place. One to one.

    Multiplication carries a difference upwards only, the folds carry it down: without both, words that differ in their
    highest bit could be swapped unseen.
    """
    for multiplier in MULTIPLIERS:
        x.bitwise_xor_((x >> 33).bitwise_and_((1 << 31) - 1)).mul_(_int64(multiplier))
    return x


def _int64(value: int) -> int:
    """The signed integer with the same low 64 bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value
