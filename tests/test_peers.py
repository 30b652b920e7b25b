"""This project's GRPO against TRL's own GRPOTrainer (1.16): equal from rewards to AdamW. Needs requirements-peers.txt.

TRL runs its own code on the tiny Qwen2.5-VL in fp32, as transformers has it. It gets the completions and their rewards
from its rollout_func. What TRL has no way for is put into its model: videos and positions by a hook, and a bias of the
logits that gives vision tokens probability 0, as Policy does. TRL's own path for images rests.

TRL's defaults are others: loss_type "dapo", beta 0, and a KL that is multiplied by the ratio.
"""
import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
import model

pytestmark = pytest.mark.peers
LENGTHS = torch.tensor([[5, 1, 9, 3], [2, 7, 4, 12]])       # of the completions: 2 prompts, 4 of each
REWARDS = torch.tensor([[1.5, 0.2, 0.2, 2.0], [0.0, 1.0, 0.7, 0.1]])
BETA, RATE, NORM = 0.5, 1e-3, 1.0                           # the gradient's norm is about 10, so it is clipped


@pytest.fixture
def ours(folder):
    """(policy, reference, completions, mask) in fp32. The policy is the reference with noise on it."""
    (policy, _), (reference, _) = (model.load(str(folder / "model")) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
    allowed = torch.tensor([i for i in range(policy.qwen.lm_head.out_features) if i not in policy.forbidden])
    mask = (torch.arange(int(LENGTHS.max())) < LENGTHS[..., None]).long()
    completions = allowed[torch.randint(len(allowed), mask.shape, generator=generator)] * mask
    return policy, reference, completions, mask


@pytest.fixture
def peer(folder, tmp_path, tiny, prompts, ours, monkeypatch):
    """peer(rewards, **settings): a GRPOTrainer with our policy's weights. Its reference it loads by itself."""
    # Imported here, since tests are collected without requirements-peers.txt, too.
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")     # rollout_func is experimental
    monkeypatch.setattr(GRPOTrainer, "_send_telemetry", lambda trainer: None)       # else each one tells the Hub
    policy, _, completions, mask = ours

    def show(trunk, args, kwargs):
        """Put the video and the positions of each row there, by the prompt that it begins with."""
        ids, real = kwargs["input_ids"], kwargs["attention_mask"].bool()
        positions, shown = torch.zeros(3, *ids.shape, dtype=torch.long), []
        for row in range(len(ids)):
            tokens = ids[row, real[row]]
            prompt = next(p for p in prompts if torch.equal(tokens[:len(p.ids)], p.ids))
            after = prompt.positions.max() + 1 + torch.arange(len(tokens) - len(prompt.ids))
            positions[:, row, real[row]] = torch.cat([prompt.positions, after.expand(3, -1)], 1)
            shown.append(prompt)
        return args, {**kwargs, "position_ids": positions, "video_grid_thw": torch.stack([p.grid for p in shown]),
                      "pixel_values_videos": torch.cat([p.patches for p in shown])}

    def make(rewards=REWARDS, **changes):
        qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
        qwen.load_state_dict(policy.qwen.state_dict())

        def rollout(texts, trainer):        # the n-th time that it asks for the text "1": completion n of prompt 1
            rows = [(int(text), texts[:i].count(text)) for i, text in enumerate(texts)]
            return {"prompt_ids": [prompts[b].ids.tolist() for b, _ in rows], "logprobs": None,
                    "completion_ids": [completions[row][mask[row].bool()].tolist() for row in rows],
                    "earned": [rewards[row].item() for row in rows]}

        settings = dict(loss_type="grpo", beta=BETA, use_bias_correction_kl=False, num_generations=4,
                        per_device_train_batch_size=8, learning_rate=RATE, lr_scheduler_type="constant",
                        max_grad_norm=NORM, optim="adamw_torch", bf16=False, use_cpu=True, gradient_checkpointing=False,
                        save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = GRPOTrainer(
            qwen, lambda earned, **_: earned, GRPOConfig(str(tmp_path), **{**settings, **changes}),
            Dataset.from_dict({"prompt": ["0", "1"]}), processing_class=tiny[1].tokenizer, rollout_func=rollout)
        for each in (trainer.model, trainer.ref_model):
            if each is not None:
                each.model.register_forward_pre_hook(show, with_kwargs=True)
                bias = torch.zeros(each.lm_head.out_features).index_fill(0, torch.tensor(policy.forbidden), -1e4)
                each.lm_head.bias = nn.Parameter(bias, requires_grad=False)
        return trainer

    return make


def batch_of(trainer):
    """What TRL makes of the prompts before its loss: tokens, masks, advantages, the reference's log-probabilities."""
    return trainer._generate_and_score_completions([{"prompt": text} for text in "00001111"])


def their_logprobs(trainer, batch):
    """(B, G, C)"""
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    kept = batch["completion_ids"].shape[1]
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept)[0].view(2, 4, -1)


def their_loss(trainer, **changes):
    """(loss, gradients by name)"""
    loss = trainer.compute_loss(trainer.model, {**batch_of(trainer), **changes})
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def our_loss(prompts, ours, pieces=1, scale=True, old_logp=None, **flags):
    """(loss, gradients by name), in one pass or in two, of a prompt each. `flags` of grpo.loss; old_logp None: pi's."""
    policy, reference, completions, mask = ours
    policy.zero_grad()
    advantage, losses = grpo.advantages(REWARDS, scale), []
    for rows in torch.arange(2).chunk(pieces):
        some = [[prompts[b] for b in rows], completions[rows], mask[rows]]
        with torch.no_grad():
            ref_logp = grpo.logprobs(reference, *some)
        logp = grpo.logprobs(policy, *some)
        old = logp.detach() if old_logp is None else old_logp[rows]
        losses.append(grpo.loss(logp, old, ref_logp, advantage[rows], mask[rows], BETA, 8, **flags)[0])
        losses[-1].backward()
    return sum(losses).detach(), {name: p.grad for name, p in policy.qwen.named_parameters() if p.grad is not None}


def apart(ours, theirs):
    """The distance of two dictionaries of tensors, relative to the length of the second."""
    assert ours.keys() == theirs.keys() and len(ours) > 30
    length = lambda tensors: torch.stack([tensor.norm() for tensor in tensors]).norm()
    return float(length(ours[name] - theirs[name] for name in ours) / length(theirs.values()))


def furthest(ours, theirs):
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("rewards", [REWARDS, torch.tensor([[0.5] * 4, [3.0, 0.0, 0.0, 0.0]])])
def test_advantages(peer, rewards):
    """Equal to TRL's by its default, not to those without the division by std."""
    theirs, others = (batch_of(peer(rewards, **change))["advantages"].view(2, 4)
                      for change in ({}, {"scale_rewards": "none"}))
    assert furthest(grpo.advantages(rewards), theirs) < 1e-6
    assert furthest(grpo.advantages(rewards), others) > 0.3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs(peer, prompts, ours, temperature):
    """Of policy and reference, whose differ by more than 1."""
    policy, reference, completions, mask = ours
    trainer = peer(temperature=temperature)
    batch = batch_of(trainer)
    with torch.no_grad():
        logp, ref_logp = (grpo.logprobs(each, prompts, completions, mask, temperature) for each in (policy, reference))
    assert furthest(logp, their_logprobs(trainer, batch)) < 3e-5
    assert furthest(ref_logp, batch["ref_per_token_logps"].view(2, 4, -1)) < 3e-5
    assert furthest(logp, ref_logp) > 1


@pytest.mark.parametrize("fault", ["pixel_values_videos", "position_ids", "bias"])
def test_logprobs_of_another_input_differ(peer, prompts, ours, fault):
    """Patches or axes of positions in another order, or vision tokens that have a probability."""
    policy, _, completions, mask = ours
    trainer = peer()
    if fault == "bias":
        trainer.model.lm_head.bias = None
    else:
        flip = lambda trunk, args, kwargs: (args, {**kwargs, fault: kwargs[fault].flip(0)})
        trainer.model.model.register_forward_pre_hook(flip, with_kwargs=True)
    with torch.no_grad():
        logp = grpo.logprobs(policy, prompts, completions, mask)
    assert furthest(logp, their_logprobs(trainer, batch_of(trainer))) > 5e-3


def test_loss_and_gradients(peer, prompts, ours):
    """With a KL to a reference that differs; the gradient as a whole, and of each parameter."""
    (loss, gradients), (their, their_gradients) = our_loss(prompts, ours), their_loss(peer())
    assert abs(loss - their) < 5e-7 and loss > 0.01
    assert apart(gradients, their_gradients) < 2e-5
    for name, gradient in gradients.items():
        assert (gradient - their_gradients[name]).norm() < 3e-5 * gradient.norm(), name


@pytest.mark.parametrize("kind, scale", [("bnpo", True), ("dr_grpo", True), ("grpo", False), ("dr_grpo", False)])
def test_other_losses_and_gradients(peer, prompts, ours, kind, scale):
    """--loss_type and --scale_rewards, in two passes of a prompt each."""
    trainer = peer(loss_type=kind, scale_rewards="group" if scale else "none")
    tokens = {"grpo": None, "bnpo": float(LENGTHS.sum()), "dr_grpo": 8.0 * trainer.args.max_completion_length}[kind]
    (loss, gradients), (their, their_gradients) = our_loss(prompts, ours, 2, scale, tokens=tokens), their_loss(trainer)
    assert abs(loss - their) < 5e-7 and abs(loss) > 1e-4 and apart(gradients, their_gradients) < 2e-5


@pytest.mark.parametrize("kind", ["grpo", "bnpo"])
def test_clipping(peer, prompts, ours, kind):
    """A policy that has moved since it sampled, so that tokens are clipped on both sides; not so without --epsilon."""
    policy, _, completions, mask = ours
    trainer, tokens = peer(loss_type=kind), float(LENGTHS.sum()) if kind == "bnpo" else None
    with torch.no_grad():
        logp = grpo.logprobs(policy, prompts, completions, mask)
    old = logp + 0.3 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(2)) * mask
    their, their_gradients = their_loss(trainer, old_per_token_logps=old.flatten(0, 1))
    loss, gradients = our_loss(prompts, ours, 2, old_logp=old, tokens=tokens, clip=0.2)
    assert abs(loss - their) < 5e-7 and apart(gradients, their_gradients) < 2e-5
    assert apart(our_loss(prompts, ours, 2, old_logp=old, tokens=tokens)[1], their_gradients) > 0.01


@pytest.mark.parametrize("change", [{"loss_type": "bnpo"}, {"loss_type": "dapo"}, {"use_bias_correction_kl": True},
                                    {"beta": 0.0}, {"scale_rewards": "none"}])
def test_another_loss_has_another_gradient(peer, prompts, ours, change):
    """Measured: 96 %, 96 %, 8 %, 20 % and 38 %."""
    assert apart(our_loss(prompts, ours)[1], their_loss(peer(**change))[1]) > 0.03


def step(peer, prompts, ours, steps=1, pieces=1, **change):
    """Distances of our AdamW and TRL's whole training loop: of what it moved the weights by, and of its averages of
    gradients. The same completions in each step; the gradients in so many pieces, TRL's of rows that it shuffles."""
    policy = ours[0]
    trainer = peer(max_steps=steps, gradient_accumulation_steps=pieces, per_device_train_batch_size=8 // pieces,
                   **change)
    start = {name: weight.detach().clone() for name, weight in policy.qwen.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    trainer.train()
    for _ in range(steps):
        our_loss(prompts, ours, pieces)
        nn.utils.clip_grad_norm_(policy.parameters(), NORM)
        optimizer.step()
    moved, averages = [], []
    for module, of in ((policy.qwen, optimizer), (trainer.model, trainer.optimizer)):
        weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        moved.append({name: weight.detach() - start[name] for name, weight in weights.items()})
        averages.append({name: of.state[weight]["exp_avg"] for name, weight in weights.items()})
    return apart(*moved), apart(*averages)


@pytest.mark.parametrize("steps, pieces, tolerance", [(1, 1, 2e-5), (1, 2, 2e-5), (2, 2, 5e-5)])
def test_steps(peer, prompts, ours, steps, pieces, tolerance):
    """AdamW divides a gradient by its size + 1e-8, so it enlarges the rounding of those that are about as small."""
    moved, averages = step(peer, prompts, ours, steps, pieces)
    assert moved < 1e-3 and averages < tolerance


@pytest.mark.parametrize("change", [{"max_grad_norm": 2.0}, {"weight_decay": 0.5}, {"loss_type": "bnpo"}])
def test_another_step_differs(peer, prompts, ours, change):
    assert max(step(peer, prompts, ours, **change)) > 0.01
