"""Several processes (gloo, on CPUs) against one: the same losses, gradients and weights, and no hang."""
import json
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import FORKS, fork
from safetensors.torch import load_file

import data
import grpo
import model
import rewards
import tasks
import train
from engine import distributed, video
from engine.loader import Loader
from engine.video import Clip

LIMIT = 120     # seconds, twenty times what a job of several processes takes; what hangs fails then


def together(folder, processes, per_node, job, *args) -> list:
    """What job(*args) returns in each of `processes` processes, on nodes of `per_node`, as torchrun starts them."""
    folder.mkdir()
    children = [FORKS.Process(target=child, args=(folder, rank, processes, per_node, job, args))
                for rank in range(processes)]
    fork(children)
    deadline = time.monotonic() + LIMIT
    while any(one.exitcode is None for one in children) and not any(one.exitcode for one in children) \
            and time.monotonic() < deadline:
        time.sleep(0.02)
    codes = [one.exitcode for one in children]
    for one in children:        # of a job that failed or hangs
        one.kill()
        one.join()
    assert codes == [0] * processes, f"exit codes {codes}; None: it did not end"
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def child(folder, rank, processes, per_node, job, args) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank % per_node),
                      LOCAL_WORLD_SIZE=str(per_node))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes,
                            timeout=timedelta(seconds=LIMIT))
    torch.save(job(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def whole(tensor):
    """A copy of a tensor that may be spread over the processes; a collective."""
    return None if tensor is None else (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def train_recorded(settings) -> tuple[list[list], list | None]:
    """Run train.main; returns the gradients of all weights at each step, as they were cut to --max_grad_norm, and the
    ranks that share a weight. Rewards depend on the texts, so that no group is flat."""
    gradients, ranks = [], []

    class Recorder(torch.optim.AdamW):
        def __init__(self, weights, lr, **_):
            super().__init__(weights, lr=lr, eps=0.1)       # 1e-8 would make a full step of a rounding error

        def step(self):
            weights = [weight for group in self.param_groups for weight in group["params"]]
            gradients.append([whole(weight.grad) for weight in weights])
            ranks[:] = weights[0].device_mesh.mesh.tolist() if dist.is_initialized() else []
            super().step()

    class Decoder(Loader):        # in this process, so sooner
        def __call__(self, *part):
            return video.load(*part, total_pixels=self.options["total_pixels"])

    task = replace(tasks.TASKS["TVG"], reward=lambda texts, samples: [
        rewards.Reward({"format": len(text) % 5 / 4, "iou": 0.0}) for text in texts])
    with mock.patch.object(torch.optim, "AdamW", Recorder), mock.patch.object(train, "Loader", Decoder), \
            mock.patch.object(model, "LOGITS_AT_ONCE", 5000), \
            mock.patch.dict(tasks.TASKS, TVG=task):
        train.main(settings)
    return gradients, ranks


@pytest.fixture(scope="module")
def settings(folder, warm, tmp_path_factory):
    """Two steps of four prompts. The videos of every second prompt are broken: all that some processes pick first."""
    files = tmp_path_factory.mktemp("some_broken")
    settings = train.Config(
        model=str(warm), annotations=str(folder / "train.txt"), videos=str(files), output="", steps=2, seed=1,
        prompts_per_step=4, group_size=4, max_tokens=48, tvg_prob=1, beta=1.0, learning_rate=0.02, max_grad_norm=0.1)
    samples, _ = data.read(settings.annotations, str(folder / "videos"))
    bad = {batches.pick(samples, index, settings.seed, lambda sample: None).item.video for index in range(1, 8, 2)}
    for path in {sample.video for sample in samples}:
        name = os.path.basename(path)
        (files / name).write_bytes(b"not a video") if path in bad else (files / name).symlink_to(path)
    return settings


def lines(folder, name):
    return [json.loads(line) for line in open(folder / name)]


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """(folder, gradients) of a run of one process."""
    output = tmp_path_factory.mktemp("alone")
    gradients, _ = train_recorded(replace(settings, output=str(output)))
    shown, metrics = lines(output, "samples.jsonl")[:4], lines(output, "metrics.jsonl")
    frames = {len(video.load(f"{settings.videos}/{row['id'].split(':')[0]}.mp4").frames) for row in shown}
    assert len(frames) > 1 and len({row["tokens"] for row in shown}) > 1                # prompts and rollouts differ
    assert all(row["bad_videos"] >= 2 and row["flat"] == 0 for row in metrics)
    assert all(row["grad_norm"] > settings.max_grad_norm for row in metrics)
    assert len(gradients) == 2 and metrics[1]["kl"] > 1e-4                              # so the reference matters
    return output, gradients


@pytest.mark.processes
@pytest.mark.parametrize("processes, per_node, micro_batch_size", [(2, 2, 1), (4, 2, 0)], ids=["one_node", "two_nodes"])
def test_training_is_that_of_one_process(settings, alone, tmp_path, processes, per_node, micro_batch_size):
    """On one node in passes of a single prompt, whose gradients add up."""
    output, gradients = alone
    here = replace(settings, output=str(tmp_path / "run"), micro_batch_size=micro_batch_size)
    for theirs, ranks in together(tmp_path / "job", processes, per_node, train_recorded, here):
        assert ranks == ([0, 1] if processes == per_node else [[0, 1], [2, 3]])     # repeated on every node
        for ours, other in zip(gradients, theirs, strict=True):
            for a, b in zip(ours, other, strict=True):
                assert (a - b).norm() <= 1e-4 * a.norm() + 1e-8
    for a, b in zip(lines(output, "metrics.jsonl"), lines(tmp_path / "run", "metrics.jsonl"), strict=True):
        for key, value in a.items():
            if not key.startswith(("seconds", "tokens_per_second", "mismatch")):
                assert b[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), key
    assert [row["completion"] for row in lines(output, "samples.jsonl")] == \
        [row["completion"] for row in lines(tmp_path / "run", "samples.jsonl")]
    before, one, many = (load_file(path / "model.safetensors") for path in
                         (Path(settings.model), output / "model", tmp_path / "run" / "model"))
    change = lambda weights: torch.cat([(weights[name] - before[name]).flatten() for name in before])
    assert (change(one) - change(many)).norm() <= 1e-3 * change(one).norm() and change(one).norm() > 0.01


def step_by_hand(folder, compute=None, frozen=False, checkpointed=False) -> dict:
    """A step on this process's share of four prompts of different lengths, with completions of 1 to 9 tokens, and then
    rollouts, of another length on each process, as they were sampled and scored."""
    rank, world, _ = distributed.start_process()
    policy, encoder = model.load(str(folder / "model"))
    policy.qwen.model.visual.requires_grad_(not frozen)
    policy = distributed.shard(distributed.gradient_checkpointing(policy) if checkpointed else policy, compute)
    random, share = torch.Generator().manual_seed(0), slice(rank, None, world)
    sizes = {"when?": (4, 28, 56), "a red circle": (6, 56, 28), "it": (2, 28, 28), "who": (8, 28, 84)}
    prompts = [encoder.encode(text, Clip(torch.randint(0, 256, (t, 3, h, w), dtype=torch.uint8, generator=random), 2.0))
               for text, (t, h, w) in sizes.items()]
    lengths = torch.tensor([[9, 8], [1, 1], [5, 2], [3, 4]])
    mask = (torch.arange(9) < lengths[..., None]).long()                                    # (4, 2, 9)
    completions = torch.randint(20, 200, mask.shape, generator=random)
    weight = torch.randn(mask.shape, generator=random)

    logp = grpo.logprobs(policy, prompts[share], completions[share], mask[share])
    ((logp * weight[share]).sum() * world).backward()
    trained = [value for value in policy.parameters() if value.requires_grad]
    gradients = {name: whole(value.grad) for name, value in policy.named_parameters()}
    norm = distributed.full_norm(torch.nn.utils.clip_grad_norm_(trained, 1.0))
    torch.optim.AdamW(trained, lr=1e-3).step()
    weights = {name: whole(value.detach()) for name, value in policy.named_parameters()}
    generators = [torch.Generator().manual_seed(1) for _ in prompts[share]]
    with distributed.gathered(policy):
        sampled = grpo.rollout(policy, prompts[share], 2, 8 + 4 * rank, [], generators)
    with torch.no_grad():
        scored = grpo.logprobs(policy, prompts[share], sampled.completions, sampled.mask)
    return {"logp": logp.detach(), "gradients": gradients, "norm": norm, "weights": weights,
            "mismatch": (scored - sampled.logprobs).abs()}


@pytest.fixture(scope="module")
def by_hand(folder):
    return step_by_hand(folder)


@pytest.mark.processes
def test_frozen_vision_tower_and_checkpointing(folder, by_hand, tmp_path):
    before = dict(model.load(str(folder / "model"))[0].named_parameters())
    for rank, theirs in enumerate(together(tmp_path / "job", 2, 2, step_by_hand, folder, None, True, True)):
        torch.testing.assert_close(theirs["logp"], by_hand["logp"][rank::2], rtol=0, atol=1e-5)
        squares = 0.0
        for name, gradient in theirs["gradients"].items():
            if ".visual." in name:
                assert gradient is None and torch.equal(theirs["weights"][name], before[name])
            else:
                expected = by_hand["gradients"][name]
                assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-8
                assert not torch.equal(theirs["weights"][name], before[name])
                squares += expected.square().sum().item()
        assert theirs["norm"] == pytest.approx(squares ** 0.5, rel=1e-4)
        assert theirs["mismatch"].max() < 1e-4


@pytest.mark.processes
def test_bf16_compute_keeps_fp32_weights(folder, by_hand, tmp_path):
    flat = lambda tensors: torch.cat([tensor.flatten() for tensor in tensors.values()])
    for rank, theirs in enumerate(together(tmp_path / "job", 2, 2, step_by_hand, folder, torch.bfloat16)):
        assert 1e-4 < (theirs["logp"] - by_hand["logp"][rank::2]).abs().mean() < 0.02       # else it was no bf16
        ours, other = flat(by_hand["gradients"]), flat(theirs["gradients"])
        assert other.dtype == torch.float32 and (ours - other).norm() < 0.05 * ours.norm()
        assert flat(theirs["weights"]).dtype == torch.float32
        assert (flat(theirs["weights"]) != flat(theirs["weights"]).bfloat16()).float().mean() > 0.9
        assert theirs["mismatch"].mean() < 0.02 and theirs["mismatch"].max() < 0.1


def layout() -> list:
    return distributed.mesh().mesh.tolist()


def test_a_node_shares_a_model(tmp_path):
    for processes, per_node, ranks in ((2, 2, [0, 1]), (6, 3, [[0, 1, 2], [3, 4, 5]]), (3, 1, [0, 1, 2])):
        assert together(tmp_path / f"{processes}", processes, per_node, layout) == [ranks] * processes


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
    completions = torch.randint(20, 200, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    results = []
    for _ in range(2):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            logp = grpo.logprobs(policy, prompts, completions, torch.ones_like(completions))
        logp.square().sum().backward()
        results.append((sum(kept), logp.detach(), [weight.grad.clone() for weight in policy.parameters()]))
        policy.zero_grad()
        distributed.gradient_checkpointing(policy)
    (plain, *expected), (checkpointed, *found) = results
    torch.testing.assert_close(found, expected)
    assert checkpointed < plain / 4
