"""Every Triton kernel once at awkward sizes, for a memory checker to watch: `make memcheck`.

Each tensor has an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a read or write one element beyond it is
seen. Sizes are no multiples of any block; offsets leave experts empty and rows over.
"""

import torch

from qarl.kernels import (
    activation,
    checksum,
    marlin_fused,
    norm_fused,
    routing,
    w4a16_fused,
    w8a8_fp8_fused,
    w8a8_int8_fused,
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def weights_and_tokens() -> None:
    for shape in ((3, 40), (7, 5, 136), (130, 776), (2, 12304), (1, 20008)):
        weight = random(*shape)
        for module, group in ((w4a16_fused, 8), (w8a8_int8_fused, None), (w8a8_fp8_fused, None)):
            module.dequantize(module.quantize(weight, group), group, torch.bfloat16)
    for module in (w8a8_int8_fused, w8a8_fp8_fused):
        for shape in ((1, 24), (67, 776), (5, 12296)):
            module.quantize_tokens(random(*shape))


def layouts() -> None:
    for shape in ((64, 2), (128, 38), (3, 192, 66)):
        codes = torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int32)
        packed = marlin_fused.pack(codes)
        marlin_fused.unpack(packed)
        marlin_fused.pending_checksum(packed)


def checksums() -> None:
    for n in (1, 8, 1001, 32_769, 70_008):
        data = torch.randint(0, 256, (n,), device="cuda", dtype=torch.uint8)
        checksum.collect([checksum.pending(data), checksum.pending(data[1:])])
    checksum.Fixed([random(n) for n in (4, 12, 1004, 70_008)]).pending()  # whole words: else each would be summed alone


def products() -> None:
    offsets = torch.tensor([0, 5, 5, 70, 131], device="cuda", dtype=torch.int32)
    for m, n, k in ((1, 8, 16), (77, 200, 48), (300, 136, 272)):
        operand = w8a8_int8_fused.prepare(w8a8_int8_fused.quantize(random(n, k)), None, torch.bfloat16)
        w8a8_int8_fused.product(random(m, k), operand, random(n))
    x, row_weights = random(140, 48), torch.rand(140, device="cuda")
    for module, group in ((w8a8_int8_fused, None), (w8a8_fp8_fused, None), (w4a16_fused, 8)):
        operand = module.prepare(module.quantize(random(5, 200, 48), group), group, torch.bfloat16)
        module.grouped_product(x, operand, offsets, row_weights)
        module.grouped_product(x, operand, offsets)
    for group in (32, 128):
        int4 = w4a16_fused.prepare(w4a16_fused.quantize(random(5, 200, 256), group), group, torch.bfloat16)
        w4a16_fused.grouped_product(random(70, 256), int4, offsets.clamp(max=66), row_weights)
        w4a16_fused.grouped_product(random(70, 256), int4, offsets.clamp(max=66))


def experts_and_norms() -> None:
    hidden = random(37, 200).requires_grad_()
    to = routing.route(torch.randint(0, 5, (37, 3), device="cuda"), 5)
    weights = routing.row_weights(torch.rand(37, 3, device="cuda"), to)
    rows = routing.spread(hidden, to)
    routing.collect(activation.silu_and_multiply(rows), to).sum().backward()
    routing.weigh(rows.detach(), rows.detach(), weights)
    routing.clear_after(rows.detach().clone(), to.offsets - 3)
    for width in (40, 128, 2056):
        weight, x, residual = random(width), random(13, width), random(13, width)
        norm_fused.rms_norm(x, weight, 1e-6)
        norm_fused.add_rms_norm(x, residual, weight, 1e-6)
        norm_fused.rms_norm(random(13, 3 * width).view(13, 3, width)[:, :2], weight, 1e-6)


def log_probs() -> None:
    from qarl.kernels.logprob import chunked_logprobs

    for rows, vocabulary in ((1, 5), (19, 1003), (6, 40_001)):
        hidden, weight = random(rows, 64).requires_grad_(), random(vocabulary, 64).requires_grad_()
        targets = torch.randint(0, vocabulary, (rows,), device="cuda")
        logprobs, entropies = chunked_logprobs(hidden, weight, targets, 0.7, 4)
        (logprobs.sum() + entropies.sum()).backward()


if __name__ == "__main__":
    assert torch.cuda.is_available(), "a GPU is what is checked"
    for part in (weights_and_tokens, layouts, checksums, products, experts_and_norms, log_probs):
        part()
        torch.cuda.synchronize()
        print(part.__name__, "done", flush=True)
