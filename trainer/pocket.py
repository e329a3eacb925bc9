"""The pocket model: a Qwen3 of half a million weights that learns to add, made on the spot in about a minute.

It is what `recipe=quickstart` trains, and what tests and benchmarks use where a real architecture matters and its size does not.
No download: the tokenizer is one token per character, the weights start random, and a short supervised warm start on
procedural arithmetic (`chain_sum` of reasoning-gym) teaches two ways to answer the same prompt,

    4 - 1 - 7 + 2 + 9 =      direct   \\boxed{7}
                             worked   4-1=3 3-7=-4 -4+2=-2 -2+9=7 \\boxed{7}

The direct way is shown more often, so greedy decoding takes it, and is mostly wrong: a model this small cannot add so many numbers
at one glance. The worked way is mostly right. Nothing in the warm start says so; that is what RL finds out from the reward.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qarl.config import PocketConfig

PAD, UNK, END = "<|pad|>", "<|unk|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
BOXED = "\\boxed{"  # one token, so that the marker of the answer costs as much as a digit
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100  # label of a position without loss, as in torch's cross_entropy

Progress = Callable[[int, int, float], None]  # (step, steps, loss)


def pocket_model(
    spec: PocketConfig, cache: Path, held_out: Collection[str] = (), progress: Progress | None = None
) -> Path:
    """Folder of the warm-started model in Hugging Face layout, made now or found in `cache`.

    `held_out`: prompts (after the template) that no demonstration may show. They are part of the cache key, as are this file
    and the versions of the libraries that make weights and data.
    """
    folder = Path(cache) / f"pocket-{_fingerprint(spec, held_out)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = build_tokenizer(spec.context)
        model = build_model(spec, tokenizer)
        losses = warm_start(model, tokenizer, spec, demonstrations(spec, held_out))
        for step, loss in enumerate(losses, start=1):
            if progress is not None:
                progress(step, spec.steps, loss)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)  # mkdtemp's 0o700 would hide the model from other users of the cache
        os.rename(draft, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process made the same model first, and the rename found it there
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline, `\\boxed{`, the roles, end and pad; anything else is unknown."""
    specials = [PAD, UNK, END, *ROLES]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))
    tokenizer.decoder = decoders.Fuse()  # without it decoding puts spaces between the characters
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken(BOXED, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def build_model(spec: PocketConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A float32 Qwen3, or Qwen3-MoE where `experts` is set, with random weights that depend on the seed alone."""
    shape: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.context,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        initializer_range=spec.init_std,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        if not spec.experts:
            return Qwen3ForCausalLM(Qwen3Config(**shape))
        routing: dict[str, Any] = dict(
            num_experts=spec.experts,
            num_experts_per_tok=spec.experts_per_token,
            moe_intermediate_size=spec.intermediate_size,
        )
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **routing, norm_topk_prob=True))


def demonstration(item: dict[str, Any], worked: bool) -> str:
    """The answer to one chain_sum item: boxed at once, or after the running totals, each written as an equation."""
    first, *rest = item["metadata"]["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total}{sign}{term}={result} ")
        total = result
    assert str(total) == item["answer"]
    return ("".join(steps) if worked else "") + f"{BOXED}{total}}}"


def demonstrations(spec: PocketConfig, held_out: Collection[str]) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) pairs, none of whose prompts is held out."""
    import reasoning_gym  # here, because it takes seconds to import and a found model needs none of it

    rng = random.Random(spec.seed)
    held_out = frozenset(held_out)
    while True:
        terms = dict(min_terms=spec.min_terms, max_terms=spec.max_terms, min_digits=1, max_digits=spec.max_digits)
        items = reasoning_gym.create_dataset("chain_sum", seed=rng.getrandbits(48), size=4096, **terms)
        for item in items:
            prompt = spec.template.format(**item)
            if prompt not in held_out:
                yield prompt, demonstration(item, worked=rng.random() < spec.worked_share)


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: PocketConfig,
    stream: Iterator[tuple[str, str]],
) -> Iterator[float]:
    """Supervised training in place, on the model's device: cross entropy of the answers alone, linear warm-up and decay of both
    learning rates. Yields the loss of every step; whoever stops listening stops the training."""
    optimizers = _optimizers(model, spec)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, spec.steps)) for optimizer in optimizers]
    model.train()
    for _ in range(spec.steps):
        pairs = sorted((next(stream) for _ in range(spec.batch_size)), key=lambda pair: len(pair[1]))
        halves = [pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]]  # short and long apart: a third less padding
        batches = [[part.to(model.device) for part in padded(tokenizer, half)] for half in halves if half]
        count = sum((labels != IGNORED).sum() for _, labels in batches)
        model.zero_grad()
        loss = torch.zeros((), device=model.device)
        for tokens, labels in batches:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, L-1, V]
            part = (
                cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
                / count
            )
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        yield loss.item()
    model.eval()


def _optimizers(model: torch.nn.Module, spec: PocketConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the linear layers, AdamW for everything else."""
    matrices = [
        module.weight for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"
    ]
    taken = {id(weight) for weight in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return [
        torch.optim.Muon(matrices, lr=spec.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=spec.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rate(steps: int, step: int) -> float:
    """Learning rate at `step`, as a share of its peak."""
    return min(1.0, (step + 1) / 20) * max(0.05, 1 - step / max(steps, 1))


def tokenized(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Tokens of each (prompt, answer): the prompt in its template, the answer with its end."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt, _ in pairs
    ]
    prompts = tokenizer(chats, add_special_tokens=False)["input_ids"]
    answers = tokenizer([answer + str(tokenizer.eos_token) for _, answer in pairs], add_special_tokens=False)[
        "input_ids"
    ]
    return list(zip(prompts, answers, strict=True))


def padded(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each [B, longest], padded on the right; the labels of prompts and padding are IGNORED.

    Not every tokenizer has a token for padding, and any will do: attention is causal.
    """
    rows = tokenized(tokenizer, pairs)
    tokens = [torch.tensor(prompt + answer) for prompt, answer in rows]
    labels = [torch.tensor([IGNORED] * len(prompt) + answer) for prompt, answer in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(tokens, True), pad(labels, True, float(IGNORED))


def _fingerprint(spec: PocketConfig, held_out: Collection[str]) -> str:
    """Short hash of everything that determines the weights."""
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers", "reasoning-gym")}
    source = Path(__file__).read_text(encoding="utf-8")
    parts = json.dumps([asdict(spec), sorted(held_out), libraries, source])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]
