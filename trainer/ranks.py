"""DeepSpeed in one place: its environment, its configuration, and how ranks meet."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from qarl.config import LearnerConfig

# Before the import. Without a GPU DeepSpeed searches for one of nine accelerators and warns that it found none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

# On a CPU DeepSpeed would try its compiler on every op of its own (seconds), and on its first start build an all-reduce for
# inference that is never used here (minutes); one killed meanwhile leaves a lock for which every later start waits for ever.
if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__ = {}


_TIMEOUT = timedelta(hours=4)
"""Of a collective: rank 0 writes whole models while the others wait for it. A rank that died is told of by Ray, not by this."""


def join(rank: int, world: int, init_method: str | None, threads: int | None) -> torch.device:
    """Meet the other ranks at `init_method` ("file://…" or "tcp://host:port"; `None`: nobody to meet). Returns the device.

    A process that joined before stays in its group: DeepSpeed and torch know only one.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    set_threads(threads, world)
    n_devices = torch.cuda.device_count()
    local = rank % n_devices if n_devices else 0  # an actor usually sees one GPU, its own
    os.environ["LOCAL_RANK"] = str(local)
    device = torch.device("cuda", local) if n_devices else torch.device("cpu")
    if n_devices:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        if init_method is None:
            if world != 1:
                raise ValueError(f"{world} ranks need an init_method")
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(_comm(device), store=store, rank=0, world_size=1)
        else:
            torch.distributed.init_process_group(
                _comm(device), init_method=init_method, rank=rank, world_size=world, timeout=_TIMEOUT
            )
    deepspeed.init_distributed(_comm(device), auto_mpi_discovery=False, verbose=False, dist_init_required=True)
    return device


def set_threads(threads: int | None, world: int) -> None:
    """`threads`, or OMP_NUM_THREADS, which torch has read, or a share of the cores."""
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max((os.cpu_count() or 1) // world, 1))


def engine_config(config: LearnerConfig, dtype: str) -> dict:
    """DeepSpeed's own configuration. The learner drives gradient accumulation: its micro-batches vary in number."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # A plain optimizer (ZeRO 0) leaves its norm nowhere to be read, so the learner clips there itself.
        "gradient_clipping": config.optimizer.grad_clip if config.zero else 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        # At stage 1 DeepSpeed would round what it added up to the model's dtype before it reduces, on one rank too.
        **({"communication_data_type": "fp32"} if config.zero == 1 else {}),
        "zero_optimization": {
            "stage": config.zero,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def _comm(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
