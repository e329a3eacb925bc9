"""The learner: one rank of the policy being trained. Score, update, publish, save, load; a plain class, no Ray.

Every method is a collective: all ranks call it together, with equally many micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qarl import carriers
from qarl.algorithm import Objective
from qarl.config import LearnerConfig
from qarl.errors import DivergenceError
from qarl.formats import QuantFormat
from qarl.fusion import covered_shapes
from qarl.kernels.dispatch import Codes
from qarl.objectives import SUMS, combine, surrogate
from qarl.records import MicroBatch, UpdateStats, WeightUpdate
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.canary import Canary, Scores
from qarl.trainer.checkpoint import Shards, load_state, save_policy, save_state
from qarl.trainer.model import load_model
from qarl.trainer.optimizer import lr_at, make_optimizer
from qarl.trainer.policy import FILLER, Policy, to_tensors
from qarl.trainer.publish import make_update, publish
from qarl.trainer.ranks import deepspeed, engine_config, join
from qarl.transfer import Address, Door, Outlet, PeerLost, Plan
from qarl.wire import published_specs


class Learner:
    """One rank. Owns the master weights and the optimizer's state, or its shard of them."""

    def __init__(
        self,
        config: LearnerConfig,
        model_path: Path | str,
        dtype: str,
        format: QuantFormat,
        objective: Objective,
        temperature: float,
        total_updates: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        init_method: str | None = None,
        revision: str | None = None,
        engine_ranks: int = 1,
    ) -> None:
        """`init_method`: where ranks meet, as torch understands it; `total_updates`: the schedule's length; `engine_ranks`: those
        of one engine, whose sums an aligned forward repeats."""
        self.config, self.format, self.objective = config, format, objective
        self.total_updates = total_updates
        self.rank, self.world, self.updates = rank, world, 0
        self.model_path, self.revision = model_path, revision
        torch.manual_seed(seed)
        self.device = join(rank, world, init_method, config.threads)
        model = load_model(model_path, getattr(torch, dtype), revision)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        self.model = model
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.aligned = AlignedModel(
            model, format, config.backend, self.device.type, getattr(torch, dtype), engine_ranks
        )
        policy = Policy(model, temperature, config.logprob_chunk)
        self._canary = Canary(policy, self.aligned, self.device)
        self.optimizer = make_optimizer(model.named_parameters(), config.optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=self.optimizer, config=engine_config(config, dtype), dist_init_required=False
        )
        self.optimizer.register_step_pre_hook(self._before_weights_change)
        self._grad_norm = math.nan
        self.dtype = getattr(torch, dtype)
        self._outlet: Outlet | None = None
        self._staging: Sequence[Tensor] = ()
        """Kept for the next lines: memory that an engine mapped and died with would not come back."""

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, as in the transformers model; tied parameters once."""
        return dict(self.shapes)

    def contract_hash(self) -> str:
        return self.format.contract_hash(covered_shapes(self.shapes, self.format))

    def score(self, micro_batches: Sequence[MicroBatch], temperature: float | None = None) -> list[np.ndarray]:
        """Log-probs of each micro-batch's response tokens under the weights as they are: float32 [R], nats.

        `temperature`: the sampler's, where none is given.
        """
        scores = []
        with torch.no_grad():
            for batch in micro_batches:
                logprobs, _ = self.engine(to_tensors(batch, self.device), temperature)
                scores.append(logprobs.float().cpu().numpy()[: batch.n_response_tokens])
        return scores

    def update(self, micro_batches: Sequence[MicroBatch], n_sequences: int, n_tokens: int) -> UpdateStats:
        """One optimizer step on the sum of all micro-batches' losses over all ranks.

        `n_sequences`, `n_tokens`: of the whole mini-batch, all ranks. Raises `DivergenceError`, weights unchanged, where the
        gradient is not finite.
        """
        seconds = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        sums = []
        for i, batch in enumerate(micro_batches):
            started = self._now()
            loss, batch_sums = self._loss(batch, n_sequences, n_tokens)
            sums.append(batch_sums)
            seconds["forward"] += self._now() - started
            started = self._now()
            self.engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            # DeepSpeed averages over ranks; the loss is normalised by global counts already, so it has to be the sum.
            self.engine.backward(loss * self.world, scale_wrt_gas=False)
            seconds["backward"] += self._now() - started
        started = self._now()
        lr = self._step()
        seconds["optimizer"] = self._now() - started
        return UpdateStats(self._over_ranks(combine(sums)), self._grad_norm, lr, seconds)

    def publish(self, version: int, n_tiles: int) -> WeightUpdate | None:
        """The policy as this learner computes with it, on rank 0; `None` on the others, which take part in gathering."""
        gathered = self._gathered()
        if self.rank == 0:
            return make_update(
                gathered, self.shapes, self.format, version, self.device, self.dtype, n_tiles, self._kept_codes
            )
        _exhaust(gathered)
        return None

    def open_door(self, host: str) -> Address:
        """Where engines may call, once `answer` waits for them. `host`: a name of this node that they can reach."""
        self._door = Door(host)
        return self._door.address

    def answer(self, carrier: str, n_engines: int) -> None:
        """Hold lines to engines, which call at the same time. Older lines are cut."""
        self._hang_up()
        plan = Plan.of(published_specs(self.shapes, self.format, self.dtype))
        try:
            self._staging = self._staging or carriers.staging(plan.capacity, self.device)
            self._outlet = carriers.answer(self._door, carrier, n_engines, plan, self._staging)
        finally:
            self._door.close()

    def publish_to_line(
        self, version: int, n_tiles: int, canaries: Sequence[MicroBatch]
    ) -> tuple[int, dict[str, float], list[np.ndarray]]:
        """`publish` over this rank's lines, as the weights are gathered; a rank without lines takes part in gathering.

        Returns bytes to each engine, seconds by stage, and the log-probs of the canaries at temperature 1, computed meanwhile
        (under ZeRO-3, whose forward gathers the weights itself, while engines read on). Where an engine is gone the lines are cut:
        the engines that are left serve nothing until another version arrives.
        """
        gathered, outlet, seconds = self._gathered(), self._outlet, dict[str, float]()
        scores: Scores | None = None
        try:
            if outlet:  # engines look at the contract while codes are made
                outlet.begin(version, self.format.name, self.contract_hash())
            if self.config.zero != 3:
                scores = self._canary.start(canaries)
            if outlet:
                manifest, seconds = publish(
                    gathered, self.shapes, self.format, version, n_tiles, outlet, self._kept_codes
                )
                outlet.announce(manifest)
        except PeerLost:
            self._hang_up()
        except BaseException:
            self._hang_up()  # else the engine would wait for more
            raise
        _exhaust(gathered)
        scored = scores() if scores else self.score(canaries, temperature=1.0)
        if outlet and self._outlet:
            try:
                outlet.finish()
            except PeerLost:
                self._hang_up()
            seconds["transfer"] = outlet.wait_s
        return outlet.plan.n_bytes if outlet else 0, seconds, scored

    def _kept_codes(self, name: str, weight: Tensor) -> Codes | None:
        """Under ZeRO-3 weights are whole for a moment, and so are their codes."""
        return None if self.config.zero == 3 else self.aligned.codes(name, weight)

    def _hang_up(self) -> None:
        if self._outlet:
            self._outlet.close()
        self._outlet = None

    def make_room(self) -> None:
        """Give back to the GPU what torch keeps of it for the next update: an engine that sleeps there has to wake."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def save(self, folder: Path) -> None:
        """Policy, masters, moments and counters into `folder`; rank 0 writes. See `trainer/checkpoint.py`."""
        weights = {name: weight.cpu().clone() for name, weight in self._gathered() if self.rank == 0}
        if self.rank == 0:
            save_policy(folder / "policy", self.model, weights, self.model_path, self.revision)
        state = {"updates": self.updates, "optimizer": self.config.optimizer.name}
        save_state(folder / "learner", self._shards(), state, writes=self.rank == 0)
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, at any world size and ZeRO stage. Raises `CheckpointError`."""
        self._allocate_state()
        state = load_state(folder / "learner", self._shards(), self.config.optimizer.name)
        self.updates = state["updates"]
        for parameter_state in self.optimizer.state.values():
            if "step" in parameter_state:  # AdamW's own count, for its bias correction: a tensor or an int
                parameter_state["step"] = parameter_state["step"] * 0 + self.updates
        self.aligned.invalidate()

    def _now(self) -> float:
        """Seconds, once the device has done all it was given: a GPU's work outlasts the call that starts it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _shards(self) -> Shards:
        return Shards(dict(self.model.named_parameters()), self.optimizer, self.engine.optimizer)

    def _allocate_state(self) -> None:
        """A step of rate zero on a gradient of zero: changes nothing, and every ZeRO stage allocates and links its state."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        filler = to_tensors(FILLER, self.device)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(self.engine(filler)[0].sum() * 0.0, scale_wrt_gas=False)
        self.engine.step()

    def _loss(self, batch: MicroBatch, n_sequences: int, n_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        def tensor(values: np.ndarray | None) -> Tensor:
            if values is None:
                raise ValueError("a micro-batch to learn from needs old_logprobs: score it first")
            return torch.as_tensor(values, device=self.device)

        packed = to_tensors(batch, self.device)
        logprobs, entropies = self.engine(packed)
        n = batch.n_response_tokens  # 0 in a filler, whose dummy token has a log-prob all the same
        loss, sums = surrogate(
            logprobs[:n],
            old_logprobs=tensor(batch.old_logprobs),
            sampler_logprobs=tensor(batch.sampler_logprobs),
            advantages=tensor(batch.advantages),
            errors=None if batch.errors is None else tensor(batch.errors),
            sequence=packed.sequence[:n],
            n_sequences=batch.n_sequences,
            batch_sequences=n_sequences,
            batch_tokens=n_tokens,
            objective=self.objective,
            entropies=(entropies if self.objective.entropy_coefficient else entropies.detach())[:n],
        )
        return loss + logprobs[n:].sum() * 0.0, sums

    def _step(self) -> float:
        lr = lr_at(self.updates, self.config.optimizer, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if getattr(self.engine.optimizer, "overflow", False):  # DeepSpeed met a non-finite norm and skipped the step
            raise DivergenceError(f"optimizer step {self.updates}: the gradient is not finite; weights are unchanged")
        self.updates += 1
        self.aligned.invalidate()
        return lr

    def _before_weights_change(self, *unused: object) -> None:
        """Hook of the optimizer's step, which sees summed gradients and, under ZeRO, the norm that DeepSpeed clips by."""
        if hasattr(self.engine.optimizer, "_global_grad_norm"):
            self._grad_norm = float(self.engine.optimizer._global_grad_norm)
        else:  # ZeRO 0: a plain optimizer on whole gradients
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            self._grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.grad_clip))
        if not math.isfinite(self._grad_norm):
            raise DivergenceError(f"optimizer step {self.updates}: the gradient is not finite; weights are unchanged")

    def _over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        """`SUMS` of this rank -> of all ranks."""
        everyone = torch.zeros(self.world, len(SUMS), dtype=torch.float64, device=self.device)
        everyone[self.rank] = torch.tensor([sums[name] for name in SUMS], dtype=torch.float64)
        dist.all_reduce(everyone)
        return combine([dict(zip(SUMS, row, strict=True)) for row in everyone])

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole weight), one after another; under ZeRO-3 each exists only until the next is asked for."""
        for name, parameter in self.model.named_parameters():
            gather = deepspeed.zero.GatheredParameters([parameter]) if self.config.zero == 3 else nullcontext()
            with gather:
                yield name, parameter.data


def _exhaust(gathered: Iterator[tuple[str, Tensor]]) -> None:
    """Gathering is collective: each rank asks for every weight, whether it has a use for it or not."""
    for _ in gathered:
        pass
