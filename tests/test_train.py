"""Training end to end, on real mp4 files and a tiny real model: what a run writes, what changes it and what does not,
and how it goes on. tests/test_wiring.py computes a run a second time, tests/test_run.py kills some."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_close_figures,
    assert_same,
    figures,
    finish,
    full_disk,
    outcome,
    read_rows,
    start,
    train_config,
)
from safetensors.torch import load_file

import data
import evaluate
import grpo
import model
import rewards
import tasks
import train
from engine import run


def weights(folder):
    return load_file(Path(folder, "model.safetensors"))


def test_the_paper_s_values():
    """Defaults: p and batch and pixels are the paper's, the others those of docs/method.md's table."""
    config = train.Config(model="", annotations="", videos="", output="")
    assert (config.tvg_prob, config.tasks, config.prompts_per_step) == (0.8, ["VC", "AR", "VD"], 4)
    assert (config.group_size, config.beta, config.learning_rate) == (8, 0.04, 1e-6)
    assert (config.max_tokens, config.temperature) == (1024, 1.0)
    assert config.total_pixels == 3584 * 28 * 28
    assert (config.loss_type, config.scale_rewards, config.num_iterations) == ("grpo", "std", 1)
    assert (config.freeze_vision, config.lora_rank, config.micro_batch_size) == (False, 0, 0)
    assert grpo.MAX_GRAD_NORM == 1.0


# What a run writes

def test_a_run_says_what_it_did(unbroken):
    """Also that no reward has gone to another's completion."""
    output = Path(unbroken.output)
    assert json.loads((output / "config.json").read_text()) == vars(unbroken)
    assert not list(output.rglob("*.tmp")) and not (output / run.LOCK).exists()
    metrics, rows = figures(output)
    for step, row in enumerate(metrics):
        task = tasks.draw(step, unbroken.seed, unbroken.tvg_prob, unbroken.tasks)
        assert (row["step"], row["task"], row["part"]) == (step, task.name, task.part)
        assert row["reward"] == pytest.approx(row["format"] + row[task.part])
        assert row["tokens"] <= 64 and 0 <= row["flat"] <= 1 and 0 <= row["truncated"] <= 1
        assert row["mismatch"] < 1e-5           # what is scored is what was sampled
    assert abs(metrics[0]["kl"]) < 1e-9         # the policy is the reference
    assert metrics[-1]["kl"] > 1e-4
    samples = {sample.id: sample for sample in data.read(unbroken.annotations, unbroken.videos)[0]}
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for row in rows:
        reward, = tasks.TASKS[row["task"]].reward([row["completion"]], [samples[row["id"]]])
        assert row["reward"] == reward.total


def test_held_out_scores_are_those_of_evaluate(unbroken, tmp_path):
    """Before the first step of --model, and in best/ of the step with the highest mIoU; of the same queries, whatever
    the seed."""
    output, scores = Path(unbroken.output), []
    chosen = evaluate.read_held_out(unbroken)
    assert chosen == evaluate.read_held_out(replace(unbroken, seed=9)) and len(chosen) == 3
    lines = Path(unbroken.eval_annotations).read_text().splitlines()
    kept = [lines[int(sample.id.split(":")[1]) - 1] for sample in chosen]
    (tmp_path / "chosen.txt").write_text("\n".join(kept) + "\n")
    for name, folder in (("start", unbroken.model), ("best", output / "best")):
        config = evaluate.Config(annotations=str(tmp_path / "chosen.txt"), model=str(folder),
                                 videos=unbroken.videos, output=str(tmp_path / name), max_tokens=64,
                                 cache=unbroken.cache)
        scores.append(evaluate.main(config))
    rows = outcome(output)["evaluations.jsonl"]
    assert [row["step"] for row in rows] == [0, 3, 5]
    best = max(rows, key=lambda row: row["mIoU"])
    for row, score in zip((rows[0], best), scores):
        assert {key: row[key] for key in row if key != "step"} == {
            key: score[key] for key in score if not key.startswith("rejected")}
    assert read_rows(output / "best" / "evaluation.jsonl")[0]["step"] == best["step"]


def test_a_broken_video_is_replaced_counted_and_named_once(folder, warm, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for i, path in enumerate(sorted((folder / "videos").iterdir())):
        (videos / path.name).symlink_to(path if i % 2 else __file__)
    train.main(train_config(folder, tmp_path / "run", videos=str(videos), group_size=2,
                            max_tokens=8, steps=4, workers=1))
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("replaced by another sample: ")]
    metrics, samples = figures(tmp_path / "run")
    assert sum(row["bad_videos"] for row in metrics) >= len(named) > 0
    assert len(named) == len(set(named)) and all(str(videos) in line for line in named)
    assert len(samples) == 4 * 2


# What changes a run, and what does not

def train_two_steps(config, output, **flags):
    """The first steps of another run, without its evaluation."""
    train.main(replace(config, output=str(output), steps=2, eval_annotations="", eval_every=0,
                       **flags))


def test_evaluation_and_checkpointed_activations_change_no_bit(unbroken, tmp_path):
    train_two_steps(unbroken, tmp_path, gradient_checkpointing=True)
    assert figures(tmp_path) == figures(unbroken.output, 2)
    assert not (tmp_path / "best").exists() and not (tmp_path / "evaluations.jsonl").exists()


def test_micro_batches_are_one_batch(unbroken, tmp_path, monkeypatch):
    sizes, logprobs = [], grpo.logprobs

    def watched(policy, prompts, *args):
        sizes.append(len(prompts))
        return logprobs(policy, prompts, *args)

    monkeypatch.setattr(grpo, "logprobs", watched)
    train_two_steps(unbroken, tmp_path, micro_batch_size=1)
    assert_close_figures(unbroken.output, tmp_path, rel=1e-3, steps=2)
    assert sizes == [1] * 8                     # policy and reference, of two prompts, in two steps


def test_two_processes_are_one(unbroken, tmp_path):
    """Same draws, completions, rewards, losses and held-out scores, with two gloo processes (sharded) as with one."""
    config = replace(unbroken, output=str(tmp_path / "run"), steps=3)
    assert finish(start("train", config, tmp_path / "log", 2)) == [0, 0]
    assert_close_figures(unbroken.output, tmp_path / "run", rel=1e-3, steps=3)
    evaluations = outcome(tmp_path / "run")["evaluations.jsonl"]
    assert [row["step"] for row in evaluations] == [0, 3]
    assert evaluations[0] == outcome(unbroken.output)["evaluations.jsonl"][0]


def test_a_frozen_tower_stays_as_it_is_and_sees_a_video_once(unbroken, tmp_path, monkeypatch):
    """And not thrice, for sampling, the reference and the policy."""
    calls, embed = [], model.embed_patches

    def watched(embedding, patches):
        calls.append(len(patches))
        return embed(embedding, patches)

    monkeypatch.setattr(model, "embed_patches", watched)
    train_two_steps(unbroken, tmp_path, freeze_vision=True)
    assert len(calls) == 2
    before, after = weights(unbroken.model), weights(tmp_path / "model")
    tower = {name for name in before if "visual." in name}
    assert tower and {name for name in before if torch.equal(before[name], after[name])} == tower
    assert figures(tmp_path)[1][:2] == figures(unbroken.output)[1][:2]


# How it goes on

def copy_of(unbroken, output, without=()):
    shutil.copytree(unbroken.output, output)
    for name in without:
        shutil.rmtree(output / name)
    return replace(unbroken, output=str(output), resume=True)


def test_a_resumed_run_is_unbroken(unbroken, tmp_path):
    """From the checkpoint before the last, as if it was killed after the last evaluation. Its line is written once, and
    best/ stays."""
    output = tmp_path / "run"
    config = copy_of(unbroken, output, without=("checkpoints/step_000005", "model"))
    train.main(config)
    assert_same(outcome(output), outcome(unbroken.output))
    best = read_rows(Path(unbroken.output, "best", "evaluation.jsonl"))
    assert read_rows(output / "best" / "evaluation.jsonl") == best


def test_a_finished_run_writes_its_model_again_or_keeps_the_old_one(unbroken, tmp_path):
    output = tmp_path / "run"
    config = copy_of(unbroken, output)
    before = outcome(output)
    error = "run/model: could not be written .*File too large"
    with full_disk(1_000_000), pytest.raises(OSError, match=error):
        train.main(config)
    assert_same(outcome(output), before)
    shutil.rmtree(output / "model")
    train.main(config)
    assert_same(outcome(output), before)


# Steps that are not finite

def test_a_step_that_is_not_finite_changes_nothing(folder, warm, tmp_path, monkeypatch, capsys):
    faults = {1: "reward", 2: "loss", 4: "grad_norm"}
    update, loss, clip, changed = grpo.update, grpo.loss, torch.nn.utils.clip_grad_norm_, []

    def fault():
        return faults.get(len(changed))

    def poisoned_reward(completions, samples):
        values = [float("inf") if fault() == "reward" else 1.0, *range(1, len(completions))]
        return [rewards.Reward({"format": value, "iou": 0.0}) for value in values]

    def poisoned_loss(*args):
        value, *others = loss(*args)
        return value * (float("nan") if fault() == "loss" else 1), *others

    def poisoned_clip(weights, length):
        norm = clip(weights, length)
        return norm * (float("inf") if fault() == "grad_norm" else 1)

    def watched_update(policy, *args, **kwargs):
        before = [weight.detach().clone() for weight in policy.parameters()]
        metrics = update(policy, *args, **kwargs)
        assert all(weight.grad is None for weight in policy.parameters())
        changed.append(not all(map(torch.equal, before, policy.parameters())))
        return metrics

    monkeypatch.setitem(tasks.TASKS, "TVG", replace(tasks.TASKS["TVG"], reward=poisoned_reward))
    monkeypatch.setattr(grpo, "update", watched_update)
    monkeypatch.setattr(grpo, "loss", poisoned_loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned_clip)
    train.main(train_config(folder, tmp_path, steps=6, tvg_prob=1.0, max_tokens=8))
    assert changed == [step not in faults for step in range(6)]
    metrics, _ = figures(tmp_path)
    assert [row["bad_steps"] for row in metrics] == [0, 1, 2, 2, 3, 3]
    lines = [line for line in capsys.readouterr().out.splitlines() if "changes nothing" in line]
    for line, (step, name) in zip(lines, faults.items(), strict=True):
        assert line.startswith(f"step {step} changes nothing: ") and name in line
        assert metrics[step][name] is None
