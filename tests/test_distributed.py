"""Several processes (gloo, on CPUs) against one: the same draws, losses, gradients and weights, and no hang."""
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import (
    assert_close_figures,
    outcome,
    random_clip,
    random_completions,
    seeded,
    together,
    train_config,
    whole,
)
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import grpo
import model
import rewards
import tasks
import train
from engine import distributed


def pay(texts, samples):
    """A reward that depends on the text, so that no group is flat."""
    return [rewards.Reward({"format": len(text) % 5 / 4, "iou": 0.0}) for text in texts]


def train_recorded(config) -> tuple[list[list], list]:
    """Run train.main; returns the gradients of all weights at each step, and the ranks that share a weight."""
    gradients, ranks = [], []

    def record(optimizer, *_):
        group, = optimizer.param_groups
        group["eps"] = 0.1          # 1e-8 would make a full step of a rounding error
        gradients.append([whole(weight.grad) for weight in group["params"]])
        if dist.is_initialized():
            ranks[:] = group["params"][0].device_mesh.mesh.tolist()

    hook = register_optimizer_step_pre_hook(record)
    task = replace(tasks.TASKS["TVG"], reward=pay)
    with mock.patch.dict(tasks.TASKS, TVG=task), mock.patch.object(model, "LOGITS_AT_ONCE", 5000):
        train.main(config)
    hook.remove()
    return gradients, ranks


@pytest.mark.processes
@pytest.mark.parametrize("processes, mesh, flags", [
    (2, [0, 1], {"loss_type": "bnpo", "micro_batch_size": 1}),
    (4, [[0, 1], [2, 3]], {"freeze_vision": True, "gradient_checkpointing": True})],
    ids=["one_node", "two_nodes"])
def test_training_is_that_of_one_process(folder, warm, tmp_path, processes, mesh, flags):
    """On one node with a single prompt at a time, whose gradients add up; on two, each of which has all weights. Only
    one process has something to evaluate: a query without a verb is for TVG alone."""
    (tmp_path / "held_out.txt").write_text("test0000 0.0 3.0##the table over there\n")
    config = train_config(folder, tmp_path / "one", steps=2, prompts_per_step=4, tvg_prob=1.0,
                          beta=1.0, learning_rate=0.02, max_tokens=48,
                          eval_annotations=str(tmp_path / "held_out.txt"), **flags)
    gradients, _ = train_recorded(replace(config, micro_batch_size=0, gradient_checkpointing=False))
    many = replace(config, output=str(tmp_path / "many"))
    for theirs, ranks in together(tmp_path / "job", processes, 2, train_recorded, many):
        assert ranks == mesh
        for ours, other in zip(gradients, theirs, strict=True):
            for one, two in zip(ours, other, strict=True):
                assert (one - two).norm() <= 1e-4 * one.norm() + 1e-8
    assert_close_figures(tmp_path / "one", tmp_path / "many", rel=1e-4)
    evaluations = [outcome(tmp_path / name)["evaluations.jsonl"] for name in ("one", "many")]
    assert evaluations[0][0] == evaluations[1][0] and len(evaluations[1]) == 2
    before, one, two = (load_file(path / "model.safetensors")
                        for path in (warm, tmp_path / "one" / "model", tmp_path / "many" / "model"))
    difference, change = 0.0, 0.0
    for name in before:
        difference += (one[name] - two[name]).square().sum()
        change += (one[name] - before[name]).square().sum()
    assert difference.sqrt() <= 1e-3 * change.sqrt() and change.sqrt() > 0.01


def step_by_hand(folder, compute=None) -> dict:
    """A step on this process's share of two prompts of different lengths, and then rollouts, of another length on each
    process, as they were sampled and scored."""
    rank, world, _ = distributed.start_process()
    policy, encoder = model.load(str(folder / "model"))
    completions, mask = random_completions(policy, [[9, 1], [5, 2]])
    weight = torch.randn(mask.shape, generator=seeded(1)[0])
    policy = distributed.shard(policy, compute)
    share, generator = slice(rank, None, world), torch.Generator().manual_seed(0)
    clips = random_clip(generator, 4, 3, 28, 56), random_clip(generator, 8, 3, 28, 84)
    prompts = [encoder.encode("when?", clip) for clip in clips]

    logprobs = grpo.logprobs(policy, prompts[share], completions[share], mask[share])
    ((logprobs * weight[share]).sum() * world).backward()
    gradients = torch.cat([whole(value.grad).flatten() for value in policy.parameters()])
    torch.optim.AdamW(policy.parameters(), lr=1e-3).step()
    weights = torch.cat([whole(value.detach()).flatten() for value in policy.parameters()])
    rollouts = grpo.rollout(policy, prompts[share], 2, seeded(2)[share], [], 8 + 4 * rank)
    with torch.no_grad():
        scored = grpo.logprobs(policy, prompts[share], rollouts.completions, rollouts.mask)
    return {"logprobs": logprobs.detach(), "gradients": gradients, "weights": weights,
            "mismatch": (scored - rollouts.logprobs).abs()}


@pytest.mark.processes
def test_bf16_compute_keeps_fp32_weights(folder, tmp_path):
    ours = step_by_hand(folder)
    results = together(tmp_path / "job", 2, 2, step_by_hand, folder, torch.bfloat16)
    for rank, theirs in enumerate(results):
        difference = (theirs["logprobs"] - ours["logprobs"][rank::2]).abs().mean()
        assert 1e-4 < difference < 0.02         # else it was no bf16
        assert (ours["gradients"] - theirs["gradients"]).norm() < 0.05 * ours["gradients"].norm()
        weights = theirs["weights"]
        assert weights.dtype == theirs["gradients"].dtype == torch.float32
        assert (weights != weights.bfloat16()).float().mean() > 0.9
        assert theirs["mismatch"].mean() < 0.02 and theirs["mismatch"].max() < 0.1


def layout() -> tuple[list, list]:
    return distributed.mesh().mesh.tolist(), distributed.gather([dist.get_rank()] * 2)


def test_the_processes_of_a_node_share_a_model(tmp_path):
    for processes, per_node, mesh in ((2, 2, [0, 1]), (4, 2, [[0, 1], [2, 3]]), (3, 1, [0, 1, 2])):
        ranks = [rank for rank in range(processes) for _ in range(2)]
        results = together(tmp_path / f"{processes}", processes, per_node, layout)
        assert results == [(mesh, ranks)] * processes
    assert distributed.gather([1, 2]) == [1, 2]         # one process gathers itself


def nodes_of_different_size() -> str:
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + dist.get_rank())
    with pytest.raises(ValueError) as error:
        distributed.mesh()
    return str(error.value)


@pytest.mark.processes
def test_nodes_of_different_size_are_an_error(tmp_path):
    first, second = together(tmp_path / "job", 2, 2, nodes_of_different_size)
    assert first == second and "--nproc_per_node" in first and "[1, 2]" in first


def test_checkpointing_keeps_less(tiny, prompts):
    policy, _ = tiny
    completions, mask = random_completions(policy, [[7, 7, 7], [7, 7, 7]])
    results = []
    for _ in range(2):
        kept = []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs = grpo.logprobs(policy, prompts, completions, mask)
        logprobs.square().sum().backward()
        gradients = [weight.grad.clone() for weight in policy.parameters()]
        results.append((sum(kept), [logprobs.detach(), *gradients]))
        policy.zero_grad()
        distributed.gradient_checkpointing(policy)
    (plain, expected), (checkpointed, recomputed) = results
    torch.testing.assert_close(recomputed, expected)
    assert checkpointed < plain / 4
