"""Rows of `benchmarks.kernels` that are more than one product: the expert layer of Qwen3-30B-A3B and the log-prob head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Bar, Report, Row
from benchmarks.timing import Ceilings, Work, against, device, free, peak_bytes
from qarl import formats
from qarl.config import LearnerConfig
from qarl.kernels.dispatch import choose

FORMATS = ("w4a16", "w8a8_int8", "w8a8_fp8")
TRAIN_EXPERTS = Bar("w4a16 expert layer forward + backward", "ratio", 1.08)
INFER_EXPERTS = Bar("w8a8 expert layer forward", "ratio", 1 / 1.2)
HEAD_TIME = Bar("head: time / dense", "ratio", 1.3)
HEAD_MEMORY = Bar("head: memory above inputs and gradients / dense", "memory_ratio", 1 / 8)


@cache
def preferred(name: str) -> str:
    """The backend a learner gets from `auto`. On CPU `emulated`, which is all that is measured there."""
    if device().type != "cuda":
        return "emulated"
    try:
        return choose(name, "auto", "cuda", torch.bfloat16)
    except ModuleNotFoundError:  # a backend that is not there: its own rows say so
        return "fused"


def contenders(names: Sequence[str], emulated: bool = False) -> Iterator[tuple[str, str]]:
    """(format, backend) to measure here."""
    for name in names:
        if device().type == "cuda" and name.startswith("w8a8"):
            yield name, "engine"
        if device().type == "cuda":
            yield name, "fused"
        if emulated or device().type == "cpu":
            yield name, "emulated"


def arithmetic(name: str, backend: str) -> Any:
    """For bf16 inputs. Raises `ConfigError` where the backend does not run here."""
    from qarl.kernels.linear import Arithmetic

    choose(name, backend, device().type, torch.bfloat16)
    return Arithmetic(name, formats.get(name).group, backend, torch.bfloat16)


def experts(report: Report, ceilings: Ceilings, tiny: bool) -> None:
    """The block (routing, both products, activation, weighted sum) and each product alone, by a random and a skewed router.

    The block in bf16 is measured twice, as transformers has it and as ours with products in bf16: bars judge against the faster.
    """
    n_experts, hidden, width, tokens, top_k = (8, 128, 128, 12, 2) if tiny else (128, 2048, 768, 16384, 8)
    rows = tokens * top_k
    for case in ("random", "skewed"):
        index = _routes(case, tokens, n_experts, top_k)
        build = partial(_moe_model, n_experts, hidden, width, top_k)
        floors = partial(
            _floors, ceilings, tokens, hidden, hidden, 3 * n_experts * hidden * width, 6.0 * rows * hidden * width
        )
        at = {"case": case, "layer": "block", "m": tokens}
        _compare(report, at, ("transformers", "ours"), partial(_block, build, index), floors)
        free()
        offsets = torch.bincount(index.flatten(), minlength=n_experts).cumsum(0, dtype=torch.int32)
        for layer, (n, k) in {"gate_up": (2 * width, hidden), "down": (hidden, width)}.items():
            given = leaf(rows, k), leaf(n_experts, n, k), leaf(rows, n).detach()
            floors = partial(_floors, ceilings, rows, n, k, n_experts * n * k, 2.0 * rows * n * k)
            at = {"case": case, "layer": layer, "m": rows}
            _compare(report, at, ("torch",), partial(_product, given, offsets), floors)
            del given
            free()


def _compare(
    report: Report,
    at: Row,
    baselines: tuple[str, ...],
    work: Callable[[str, str, bool], Work],
    floors: Callable[[str, bool], Row],
) -> None:
    """Rows of bf16, by each of `baselines`, and of every format beside them, forward and forward + backward."""
    for training in (False, True):
        row = {"group": "experts", **at, "pass": "fwd+bwd" if training else "fwd"}
        bf16: dict[str, Work] = {}
        for backend in baselines:
            measure = partial(kept, bf16, backend, partial(work, "bf16", backend, training), floors("bf16", training))
            report.add({**row, "format": "bf16", "backend": backend}, measure)
        for name, backend in contenders(FORMATS):
            bar = TRAIN_EXPERTS if training else INFER_EXPERTS
            judged = at["layer"] == "block" and backend == preferred(name) and training == (name == "w4a16")
            measure = partial(_beside, partial(work, name, backend, training), bf16, floors(name, training))
            report.add({**row, "format": name, "backend": backend}, measure, *((bar,) if judged else ()))


def kept(works: dict[str, Work], name: str, make: Callable[[], Work], floors: Row) -> Row:
    """A baseline's own row; it stays in `works` to be run beside the others."""
    row = {**against(work := make(), {}), **floors}
    works[name] = work
    return row


def _beside(make: Callable[[], Work], baselines: dict[str, Work], floors: Row) -> Row:
    free()
    return {**against(make(), baselines), **floors}


def _block(build: Callable[[], Any], index: Tensor, name: str, backend: str, training: bool) -> Work:
    """The module of experts: in bf16 transformers' own by grouped products or ours, else aligned."""
    from qarl.trainer.aligned import AlignedModel, move_plain_experts

    model = build()
    module = model.model.layers[0].mlp.experts
    if backend == "ours":
        move_plain_experts(model)
    elif name != "bf16":
        AlignedModel(model, formats.get(name), backend, device().type, torch.bfloat16)
    x = leaf(len(index), module.hidden_dim)
    weights = torch.rand(index.shape, device=x.device, dtype=x.dtype).requires_grad_()
    dy = torch.randn_like(x)
    learned = (x, weights, module.gate_up_proj, module.down_proj)
    return _work(lambda: module(x, index, weights), learned, dy, training)


def _product(given: tuple[Tensor, Tensor, Tensor], offsets: Tensor, name: str, backend: str, training: bool) -> Work:
    """One grouped product: torch's, or aligned with codes made once."""
    from qarl.kernels.linear import aligned_experts

    x, weight, dy = given
    if name == "bf16":
        return _work(lambda: torch._grouped_mm(x, weight.transpose(1, 2), offs=offsets), (x, weight), dy, training)
    by = arithmetic(name, backend)
    prepared = by.prepare(weight.detach())
    return _work(lambda: aligned_experts(x, weight, offsets, by, prepared), (x, weight), dy, training)


def _work(forward: Callable[[], Tensor], learned: tuple[Tensor, ...], dy: Tensor, training: bool) -> Work:
    """One set of inputs is enough: the experts' weights are far larger than the cache."""

    def run() -> object:
        if training:
            return torch.autograd.grad(forward(), learned, dy)
        with torch.no_grad():
            return forward()

    return Work(run, [()])


def _moe_model(n_experts: int, hidden: int, width: int, top_k: int) -> Any:
    """One layer of Qwen3-MoE with random weights, on the device, its experts by `torch._grouped_mm`."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from qarl.trainer.attention import PACKED

    shape: dict[str, Any] = dict(
        vocab_size=128,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=n_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        norm_topk_prob=True,
    )
    with device():
        model: Any = AutoModelForCausalLM.from_config(
            Qwen3MoeConfig(**shape), dtype=torch.bfloat16, attn_implementation=PACKED
        )
    model.set_experts_implementation("grouped_mm")
    return model


def _routes(case: str, tokens: int, n_experts: int, top_k: int) -> Tensor:
    """Experts of each token [T, top_k]: different ones at random, or the same `top_k` for all tokens, in random order."""
    allowed = n_experts if case == "random" else top_k
    return torch.rand(tokens, allowed, device=device()).topk(top_k).indices


def _floors(ceilings: Ceilings, m: int, n: int, k: int, weights: int, flop: float, name: str, training: bool) -> Row:
    """x [M, K] and codes in, y [M, N] out; backward: dy, codes and x in, dx and dweight out. Only w8a8 forwards run in 8 bits."""
    codes = weights * formats.get(name).bits_per_weight((n, k)) / 8
    n_bytes = 2 * m * (k + n) + codes
    if training:
        n_bytes += 2 * m * (n + 2 * k) + codes + 2 * weights
    low = name.startswith("w8a8")
    return ceilings.floors(n_bytes, flop * (2 * training + (not low)), flop * low)


def head(report: Report, ceilings: Ceilings, tiny: bool) -> None:
    """Log-probs of a vocabulary with their gradients, and entropies without, as the learner asks for them."""
    from qarl.kernels.logprob import chunked_logprobs

    vocabulary, hidden, chunk = (301, 64, 8) if tiny else (151936, 4096, LearnerConfig().logprob_chunk)
    chunked = partial(chunked_logprobs, temperature=1.0, chunk=chunk)
    for m in (20,) if tiny else (8192, 16384):
        inputs = (leaf(m, hidden), leaf(vocabulary, hidden), torch.randint(vocabulary, (m,), device=device()))
        floors = ceilings.floors(6.0 * (m + vocabulary) * hidden, 6.0 * m * vocabulary * hidden)
        row = {"group": "head", "m": m, "pass": "fwd+bwd"}
        works: dict[str, Work] = {}
        dense = report.add({**row, "format": "bf16"}, partial(_scored, _dense_logprobs, inputs, floors, works, {}))
        measure = partial(_scored, chunked, inputs, floors, works, dense)
        report.add({**row, "format": "chunked"}, measure, HEAD_TIME, HEAD_MEMORY)
        del inputs, measure, works
        free()


def _scored(
    score: Callable[..., tuple[Tensor, Tensor]], inputs: tuple, floors: Row, works: dict[str, Work], dense: Row
) -> Row:
    """Beside those in `works`, of which it is one from then on; `dense`: the row to compare memory with."""
    d_logprobs = torch.randn(len(inputs[2]), device=device())

    def run(x: Tensor, weight: Tensor, targets: Tensor) -> object:
        logprobs, entropies = score(x, weight, targets)
        return torch.autograd.grad(logprobs, (x, weight), d_logprobs), entropies

    work = Work(run, [inputs])
    row: Row = {**against(work, works), **floors}
    works["dense"] = work
    if device().type == "cuda":
        row["peak_gb"] = peak_bytes(run, inputs) / 1e9
        row["working_gb"] = row["peak_gb"] - (inputs[0].nbytes + inputs[1].nbytes) / 1e9  # without the two gradients
    if "peak_gb" in row and "peak_gb" in dense:
        row["memory_ratio"] = row["working_gb"] / dense["working_gb"]
        row["peak_ratio"] = row["peak_gb"] / dense["peak_gb"]
    return row


def _dense_logprobs(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes without chunks: whole float32 logits, and their log-softmax."""
    logp = F.linear(x, weight).float().log_softmax(-1)
    with torch.no_grad():
        entropies = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropies


def leaf(*shape: int) -> Tensor:
    """Random, bf16, with a gradient."""
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16).requires_grad_()
