"""Several processes (gloo, on CPUs) against one: the same losses, gradients and weights, and no hang."""
import json
import multiprocessing
import os
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data
import grpo
import launch
import model
import rewards
import train
import video
from video import Clip

LIMIT = 60      # seconds that a job of several processes may take; what hangs fails then
start = multiprocessing.get_context("forkserver")
start.set_forkserver_preload(["test_distributed"])      # imported once for all processes,
rewards.spacy_model()                                   # and spaCy's model loaded


def together(folder, processes, per_node, job, *args) -> list:
    """What job(*args) returns in each of `processes` processes, in nodes of `per_node`, as torchrun would start them."""
    folder.mkdir()
    children = [start.Process(target=child, args=(folder, rank, processes, per_node, job, args))
                for rank in range(processes)]
    for one in children:
        one.start()
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


def train_recorded(settings) -> list[list]:
    """Run train.main; returns the gradients of all weights at each step, as they were cut to --max_grad_norm."""
    gradients = []

    class Recorder(torch.optim.AdamW):
        def __init__(self, weights, lr, **_):
            super().__init__(weights, lr=lr, eps=0.1)       # 1e-8 would make a full step of a rounding error

        def step(self):
            gradients.append([whole(weight.grad) for group in self.param_groups for weight in group["params"]])
            super().step()

    here = lambda limit, cache, cache_gb, **options: partial(video.load, **options)     # no process to decode: faster
    with mock.patch.object(torch.optim, "AdamW", Recorder), mock.patch.object(video, "Loader", here):
        train.main(settings)
    return gradients


@pytest.fixture(scope="module")
def settings(folder, warm, tmp_path_factory):
    """Two steps of four prompts, where the videos of every second prompt, so all of some processes, are broken."""
    files = tmp_path_factory.mktemp("some_broken")
    settings = train.Config(
        model=str(warm), annotations=str(folder / "train.txt"), videos=str(files), output="", steps=2, seed=1,
        prompts_per_step=4, group_size=4, max_tokens=48, tvg_prob=1, beta=1.0, learning_rate=0.02, max_grad_norm=0.1)
    samples, _ = data.read(settings.annotations, str(folder / "videos"))
    bad = {data.pick(samples, index, settings.seed, lambda sample: None)[0].video for index in range(1, 8, 2)}
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
    gradients = train_recorded(replace(settings, output=str(output)))
    shown, metrics = lines(output, "samples.jsonl"), lines(output, "metrics.jsonl")
    frames = {len(video.load(f"{settings.videos}/{row['id'].split(':')[0]}.mp4").frames) for row in shown[:4]}
    assert len(frames) > 1 and len({row["tokens"] for row in shown[:4]}) > 1            # prompts and rollouts differ
    assert all(row["bad_videos"] >= 2 and row["grad_norm"] > settings.max_grad_norm for row in metrics)
    assert len(gradients) == 2 and metrics[-1]["kl"] > 1e-4                             # the reference matters
    return output, gradients


@pytest.mark.parametrize("processes, per_node, per_pass", [(2, 2, 1), (4, 2, 0)], ids=["one_node", "two_nodes"])
def test_training_is_that_of_one_process(settings, alone, tmp_path, processes, per_node, per_pass):
    """On one node in passes of a single prompt, whose gradients add up."""
    output, gradients = alone
    here = replace(settings, output=str(tmp_path / "run"), prompts_per_pass=per_pass)
    for theirs in together(tmp_path / "job", processes, per_node, train_recorded, here):
        for ours, other in zip(gradients, theirs, strict=True):
            for a, b in zip(ours, other, strict=True):
                assert (a - b).norm() <= 1e-4 * a.norm() + 1e-8
    for a, b in zip(lines(output, "metrics.jsonl"), lines(tmp_path / "run", "metrics.jsonl"), strict=True):
        for key in a.keys() - {"seconds", "tokens_per_second", "mismatch"}:
            assert a[key] == (pytest.approx(b[key], rel=1e-4, abs=1e-6) if isinstance(a[key], float) else b[key]), key
    assert [row["completion"] for row in lines(output, "samples.jsonl")] == \
        [row["completion"] for row in lines(tmp_path / "run", "samples.jsonl")]
    before, one, many = (load_file(path / "model.safetensors") for path in
                         (Path(settings.model), output / "model", tmp_path / "run" / "model"))
    change = lambda weights: torch.cat([(weights[name] - before[name]).flatten() for name in before])
    assert (change(one) - change(many)).norm() <= 1e-3 * change(one).norm() and change(one).norm() > 0.01


def step_by_hand(folder, compute=None, frozen=False, checkpointed=False) -> dict:
    """A forward and backward pass over this process's share of four prompts of different lengths, whose completions
    have from 1 to 9 tokens, and an AdamW step."""
    rank, world, _ = launch.start_process()
    policy, encoder = model.load(str(folder / "model"))
    policy.qwen.model.visual.requires_grad_(not frozen)
    policy = model.shard(model.checkpoint_activations(policy) if checkpointed else policy, compute)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[9, 8], [1, 1], [5, 2], [3, 4]])
    share, prompts = slice(rank, None, world), []
    for text, (t, h, w) in zip(("when?", "describe", "a red circle", "what"), ((4, 28, 56), (6, 56, 28), (2, 28, 28), (8, 28, 84))):
        frames = torch.randint(0, 256, (t, 3, h, w), dtype=torch.uint8, generator=generator)
        prompts.append(encoder.encode(text, Clip(frames, 2.0)))
    completions = torch.randint(20, 200, (4, 2, 9), generator=generator)
    mask = (torch.arange(9) < lengths[..., None]).long()                                    # (4, 2, 9)
    weight = torch.randn(mask.shape, generator=generator)
    logp = grpo.logprobs(policy, prompts[share], completions[share], mask[share])
    ((logp * weight[share]).sum() * world).backward()
    gradients = {name: whole(value.grad) for name, value in policy.named_parameters()}
    trained = [value for value in policy.parameters() if value.requires_grad]
    norm = launch.whole(torch.nn.utils.clip_grad_norm_(trained, 1.0))
    torch.optim.AdamW(trained, lr=1e-3).step()
    model.gathered(policy, True)
    sampled = grpo.rollout(policy, prompts[share], 2, 8 + 4 * rank, [], [torch.Generator().manual_seed(1)] * len(prompts[share]))
    model.gathered(policy, False)
    with torch.no_grad():
        scored = grpo.logprobs(policy, prompts[share], sampled.completions, sampled.mask)
    return {"logp": logp.detach(), "gradients": gradients, "norm": norm,
            "mismatch": (scored - sampled.logprobs).abs(), "dtypes": {value.dtype for value in policy.parameters()},
            "weights": {name: whole(value.data) for name, value in policy.named_parameters()}}


@pytest.fixture(scope="module")
def by_hand(folder):
    return step_by_hand(folder)


def test_frozen_vision_tower_and_checkpointing(folder, by_hand, tmp_path):
    untouched, _ = model.load(str(folder / "model"))
    untouched = dict(untouched.named_parameters())
    for rank, theirs in enumerate(together(tmp_path / "job", 2, 2, step_by_hand, folder, None, True, True)):
        torch.testing.assert_close(theirs["logp"], by_hand["logp"][rank::2], rtol=0, atol=1e-5)
        for name, gradient in theirs["gradients"].items():
            if ".visual." in name:
                assert gradient is None and torch.equal(theirs["weights"][name], untouched[name])
            else:
                assert (gradient - by_hand["gradients"][name]).norm() <= 1e-4 * gradient.norm() + 1e-8
                assert not torch.equal(theirs["weights"][name], untouched[name])
        squares = [gradient.square().sum() for gradient in theirs["gradients"].values() if gradient is not None]
        assert theirs["norm"] == pytest.approx(sum(squares).sqrt().item(), rel=1e-5)


def test_bf16_compute_keeps_fp32_weights(folder, by_hand, tmp_path):
    for rank, theirs in enumerate(together(tmp_path / "job", 2, 2, step_by_hand, folder, torch.bfloat16)):
        difference = (theirs["logp"] - by_hand["logp"][rank::2]).abs()
        print("bf16", difference.mean(), difference.max(), theirs["mismatch"].mean(), theirs["mismatch"].max(), by_hand["mismatch"].max(), theirs["norm"], by_hand["norm"])
        ours, other = (torch.cat([g.flatten() for g in result["gradients"].values()]) for result in (by_hand, theirs))
        print(torch.cosine_similarity(ours, other, dim=0), (ours-other).norm()/ours.norm(), theirs["logp"].dtype, other.dtype)


def nodes_of_different_size() -> str:
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + dist.get_rank())
    with pytest.raises(ValueError) as error:
        model.mesh()
    return str(error.value)


def test_nodes_of_different_size_are_an_error(tmp_path):
    first, second = together(tmp_path / "job", 2, 2, nodes_of_different_size)
    assert first == second and "--nproc_per_node" in first and "\n" not in first


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
        model.checkpoint_activations(policy)
    (plain, *expected), (checkpointed, *found) = results
    torch.testing.assert_close(found, expected)
    print(plain, checkpointed)
    assert checkpointed < plain / 4
