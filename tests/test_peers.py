"""This project's GRPO against TRL's own GRPOTrainer (1.16): equal from rewards to AdamW. Needs requirements-peers.txt.

TRL runs its own code on the tiny Qwen2.5-VL in fp32, as transformers has it. It gets the completions and their rewards
from its rollout_func. What TRL has no way for is put into its model: videos and positions by a hook, and a bias of the
logits that gives vision tokens probability 0, as Policy does. TRL's own path for images rests.

TRL's defaults are others: loss_type "dapo", beta 0, and a KL that is multiplied by the ratio.
"""
import pytest
import torch
from conftest import random_completions
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
import model

pytestmark = pytest.mark.peers
LENGTHS = [[5, 1, 9, 3], [2, 7, 4, 12]]         # of the completions: 2 prompts, 4 of each
REWARDS = torch.tensor([[1.5, 0.2, 0.2, 2.0], [0.0, 1.0, 0.7, 0.1]])
BETA, RATE = 0.5, 1e-3                          # the gradient's norm is about 10, so it is clipped


@pytest.fixture
def ours(folder):
    """(policy, reference, completions, mask) in fp32. The policy is the reference with noise on it."""
    policy, reference = (model.load(str(folder / "model"))[0] for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += 0.1 * weight.abs().mean() * noise
    return policy, reference.requires_grad_(False), *random_completions(policy, LENGTHS)


@pytest.fixture
def peer(folder, tmp_path, loaded, prompts, ours, monkeypatch):
    """peer(**settings): a GRPOTrainer with our policy's weights. Its reference it loads by itself."""
    # Imported here, since tests are collected without requirements-peers.txt, too.
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")     # rollout_func is experimental
    # else each one tells the Hub
    monkeypatch.setattr(GRPOTrainer, "_send_telemetry", lambda trainer: None)
    policy, _, completions, mask = ours

    def rollout(texts, trainer):
        """The n-th time that it asks for the text "1": completion n of prompt 1."""
        rows = [(int(text), texts[:i].count(text)) for i, text in enumerate(texts)]
        return {"prompt_ids": [prompts[b].input_ids.tolist() for b, _ in rows], "logprobs": None,
                "completion_ids": [completions[row][mask[row].bool()].tolist() for row in rows],
                "earned": [REWARDS[row].item() for row in rows]}

    def show(trunk, args, kwargs):
        return args, kwargs | videos(prompts, kwargs["input_ids"], kwargs["attention_mask"].bool())

    def make(**settings):
        qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "model", dtype=torch.float32)
        qwen.load_state_dict(policy.qwen.state_dict())
        common = dict(loss_type="grpo", beta=BETA, use_bias_correction_kl=False, num_generations=4,
                      max_completion_length=12,
                      per_device_train_batch_size=8, learning_rate=RATE,
                      lr_scheduler_type="constant", max_grad_norm=grpo.MAX_GRAD_NORM,
                      optim="adamw_torch", bf16=False, use_cpu=True, save_strategy="no",
                      gradient_checkpointing=False, report_to="none", disable_tqdm=True)
        trainer = GRPOTrainer(
            qwen, lambda earned, **_: earned, GRPOConfig(str(tmp_path), **(common | settings)),
            Dataset.from_dict({"prompt": ["0", "1"]}), processing_class=loaded[1].tokenizer,
            rollout_func=rollout)
        for each in (trainer.model, trainer.ref_model):
            if each is not None:
                each.model.register_forward_pre_hook(show, with_kwargs=True)
                bias = torch.zeros(each.lm_head.out_features)
                bias[policy.forbidden] = -1e4
                each.lm_head.bias = nn.Parameter(bias, requires_grad=False)
        return trainer

    return make


def videos(prompts, input_ids, attention_mask):
    """The video and the positions of each row, by the prompt that the row begins with."""
    positions, shown = torch.zeros(3, *input_ids.shape, dtype=torch.long), []
    for row, real in enumerate(attention_mask):
        tokens = input_ids[row, real]
        prompt = next(p for p in prompts if torch.equal(tokens[:len(p.input_ids)], p.input_ids))
        after = prompt.position_ids.max() + 1 + torch.arange(len(tokens) - len(prompt.input_ids))
        positions[:, row, real] = torch.cat([prompt.position_ids, after.expand(3, -1)], 1)
        shown.append(prompt)
    return {"position_ids": positions,
            "video_grid_thw": torch.stack([p.video_grid_thw for p in shown]),
            "pixel_values_videos": torch.cat([p.pixel_values_videos for p in shown])}


def batch_of(trainer):
    """What TRL makes of the prompts before its loss: tokens, masks, advantages, the reference's log-probabilities."""
    return trainer._generate_and_score_completions([{"prompt": text} for text in "00001111"])


def furthest(ours, theirs):
    return float((ours - theirs).abs().max())


def test_advantages(peer):
    for settings, scale in (({}, True), ({"scale_rewards": "none"}, False)):
        theirs = batch_of(peer(**settings))["advantages"].view(2, 4)
        assert furthest(grpo.advantages(REWARDS, scale), theirs) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs(peer, prompts, ours, temperature):
    """Of policy and reference, whose differ by more than 1."""
    policy, reference, completions, mask = ours
    trainer = peer(temperature=temperature)
    batch = batch_of(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    real = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        theirs, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, real, mask.shape[-1])
        logprobs, ref_logprobs = (grpo.logprobs(each, prompts, completions, mask, temperature)
                                  for each in (policy, reference))
    assert furthest(logprobs, theirs.view(mask.shape)) < 3e-5
    assert furthest(ref_logprobs, batch["ref_per_token_logps"].view(mask.shape)) < 3e-5
    assert furthest(logprobs, ref_logprobs) > 1


def distances(peer, prompts, ours, settings, num_iterations=1, scale=True, loss_type="grpo"):
    """Distances of grpo.update, a prompt at a time, and of TRL's whole training loop with its `settings`, relative to
    the latter: of what they moved the weights by, and of AdamW's averages of gradients."""
    policy, reference, completions, mask = ours
    trainer = peer(max_steps=num_iterations, num_iterations=num_iterations, **settings)
    start = {name: weight.detach().clone() for name, weight in policy.qwen.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    rollouts = grpo.Rollouts(prompts, completions, mask, torch.zeros(mask.shape))
    trainer.train()
    metrics = grpo.update(policy, reference, optimizer, rollouts, grpo.advantages(REWARDS, scale),
                          beta=BETA, loss_type=loss_type, epsilon=0.2, temperature=1.0,
                          max_tokens=12, num_iterations=num_iterations, micro_batch_size=1)
    assert metrics["updates"] == num_iterations and metrics["grad_norm"] > grpo.MAX_GRAD_NORM
    assert (metrics["clipped"] > 0.1) == (num_iterations > 1)
    moved, averages = [], []
    for qwen, adamw in ((policy.qwen, optimizer), (trainer.model, trainer.optimizer)):
        weights = {name: weight for name, weight in qwen.named_parameters() if weight.requires_grad}
        assert weights.keys() == start.keys()
        moves = [(weights[name].detach() - start[name]).flatten() for name in start]
        means = [adamw.state[weights[name]]["exp_avg"].flatten() for name in start]
        moved.append(torch.cat(moves))
        averages.append(torch.cat(means))
    return [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in (moved, averages)]


@pytest.mark.parametrize("loss_type, scale, num_iterations",
                         [("grpo", True, 1), ("grpo", False, 2), ("bnpo", True, 2),
                          ("dr_grpo", True, 2)])
def test_updates(peer, prompts, ours, loss_type, scale, num_iterations):
    """The second update clips. AdamW divides a gradient by its size + 1e-8, so it enlarges the rounding of those that
    are about as small."""
    settings = {"loss_type": loss_type, "scale_rewards": "group" if scale else "none"}
    moved, averages = distances(peer, prompts, ours, settings, num_iterations, scale, loss_type)
    assert moved < 1e-3 and averages < 5e-5


@pytest.mark.parametrize("num_iterations, change", [
    (1, {"loss_type": "bnpo"}), (1, {"loss_type": "dapo"}), (1, {"use_bias_correction_kl": True}),
    (1, {"beta": 0.0}), (1, {"scale_rewards": "none"}), (1, {"max_grad_norm": 2.0}),
    (1, {"weight_decay": 0.5}), (2, {"epsilon": 5.0})])
def test_another_update_differs(peer, prompts, ours, num_iterations, change):
    assert max(distances(peer, prompts, ours, change, num_iterations)) > 0.01
