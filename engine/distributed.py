"""Several processes: their start, what they tell each other, one model spread over them (FSDP2), and less memory for
its backward pass.

A policy here is a `model.Policy`: decoder layers in qwen.model.language_model.layers, a vision tower in
qwen.model.visual, and in FORWARDS the names of the methods that compute with its weights.
"""
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from engine import lora


def start_process() -> tuple[int, int, str]:
    """(rank, number of processes, device) of this process. torchrun sets the environment; without it one process
    works alone, and on a GPU still through FSDP2, so that its weights are kept in fp32 and used in bf16."""
    device, backend = "cpu", "gloo"
    if torch.cuda.is_available():
        device, backend = f"cuda:{os.environ.get('LOCAL_RANK', 0)}", "nccl"
    if not dist.is_initialized():
        if device != "cpu":
            torch.cuda.set_device(device)
        if "RANK" in os.environ:
            # evaluation meets only at its end
            dist.init_process_group(backend, timeout=timedelta(hours=4))
        elif device != "cpu":
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not dist.is_initialized():
        return 0, 1, device
    return dist.get_rank(), dist.get_world_size(), device


def gather(mine: list) -> list:
    """The lists of all processes as one, in the order of their ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, mine)
    return list(chain.from_iterable(lists))


def full_norm(norm: torch.Tensor) -> float:
    """A gradient norm that may be spread over the processes, as a number."""
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return float(norm)


@cache      # the policy and the reference share its groups of processes
def mesh() -> DeviceMesh:
    """Which processes share a model: all of them, or on several nodes of several processes each (replicate, shard) the
    processes of a node, so that weights travel over the node's fast links and only gradients between nodes.

    Raises ValueError when the nodes differ in size."""
    world = dist.get_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = gather([int(os.environ.get("LOCAL_WORLD_SIZE", world))])     # torchrun's
    if len(set(sizes)) > 1:
        raise ValueError(f"--nproc_per_node differs between nodes ({sorted(set(sizes))}); "
                         "give every node's torchrun the same number")
    if 1 < sizes[0] < world:
        return init_device_mesh(device, (world // sizes[0], sizes[0]),
                                mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (world,))


def shard(policy: nn.Module, compute: torch.dtype | None = None) -> nn.Module:
    """Spread a policy's weights, gradients and optimizer states over the processes of `mesh`: each decoder layer, the
    vision tower and the root is a unit of its own, gathered only while it computes. Gradients are averaged over all
    processes. Computes in `compute`, by default bf16 on GPUs and fp32 on CPUs; weights and gradients keep the
    precision that the policy was loaded in. One CPU process stays as it is.

    The policy comes on the CPU and reaches the GPU a unit at a time, so that none holds it whole in fp32. Of one that
    learns adapters these are spread; its frozen weights lie whole on every GPU, as they do while sampling anyway."""
    if not dist.is_initialized():
        return policy
    if compute is None and torch.cuda.is_available():
        compute = torch.bfloat16
    precision = MixedPrecisionPolicy()
    if compute is not None:
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    frozen = lora.frozen(policy)
    if frozen:
        policy.to(mesh().device_type)
    for unit in (*policy.qwen.model.language_model.layers, policy.qwen.model.visual, policy):
        fully_shard(unit, mesh=mesh(), mp_policy=precision, reshard_after_forward=True,
                    ignored_params=frozen or None)
    # so that each gathers the root's weights, as a call of forward would
    for method in policy.FORWARDS:
        register_fsdp_forward_method(policy, method)
    return policy


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """Keep the weights gathered, while sampling: ranks then sample different lengths without waiting for each other,
    and no layer is fetched again for every token. Afterwards, and after an error, they are spread again."""
    sharded = hasattr(policy, "set_reshard_after_forward")
    if sharded:
        policy.set_reshard_after_forward(False, recurse=True)
    try:
        yield
    finally:
        if sharded:
            policy.set_reshard_after_forward(True, recurse=True)
            for unit in policy.modules():
                if hasattr(unit, "reshard"):
                    unit.reshard()


def gradient_checkpointing(policy: nn.Module) -> nn.Module:
    """Keep only the input of each decoder layer and vision block, and compute the rest again in the backward pass: less
    memory, and up to a third more time. Sampling, which has no backward pass, is as it was."""
    for block in (*policy.qwen.model.language_model.layers, *policy.qwen.model.visual.blocks):
        block.forward = partial(recomputed, block.forward)      # inside the hooks of FSDP2
    return policy


def recomputed(forward: Callable, *args, **kwargs) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # there is no dropout
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
