"""Advantages and loss by hand and against their published forms; log-probabilities against repeated prompts; rollouts;
updates computed a second time."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import random_completions, seeded
from jaxtyping import TypeCheckError
from oracles import published_loss, random_policy, random_prompts, repeated_logprobs

import grpo
import model


@pytest.fixture
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(2)


# Advantages, Eq. 3

def test_advantages_by_hand():
    """Each group on its own: mean 3 and unbiased std; a group of equal rewards, whose fp32 mean is another number."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [1.6153846] * 4])
    std = math.sqrt((4 + 1 + 0 + 9) / 3)
    expected = torch.tensor([[(reward - 3) / (std + 1e-4) for reward in (1, 2, 3, 6)], [0] * 4])
    torch.testing.assert_close(grpo.advantages(rewards), expected)
    unscaled = torch.tensor([[-2.0, -1, 0, 3], [0] * 4])
    torch.testing.assert_close(grpo.advantages(rewards, scale=False), unscaled)
    assert (grpo.advantages(torch.full((1, 8), 1.6153846)) == 0).all()


# The loss, Eq. 4

def k3(log_ratio):
    return math.exp(log_ratio) - log_ratio - 1


def test_loss_by_hand():
    logprobs = torch.tensor([[[-1.0, -2.0], [-0.5, 9.0]]])                  # the 9 is padding
    old = torch.tensor([[[-1.2, -2.0], [-0.5, 7.0]]])
    ref = torch.tensor([[[-1.0, -1.5], [-0.7, 3.0]]])
    mask, advantages = torch.tensor([[[1, 1], [1, 0]]]), torch.tensor([[2.0, -1.0]])
    first = ((math.exp(0.2) * 2 - 0.1 * k3(0.0)) + (1 * 2 - 0.1 * k3(0.5))) / 2
    second = 1 * -1 - 0.1 * k3(-0.2)
    loss, kl, clip_fraction = grpo.loss(logprobs, old, ref, advantages, mask, beta=0.1,
                                        num_completions=2)
    assert loss.item() == pytest.approx(-(first + second) / 2, rel=1e-6)
    assert kl.item() == pytest.approx(((k3(0.0) + k3(0.5)) / 2 + k3(-0.2)) / 2, rel=1e-6)
    assert clip_fraction == 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_losses_equal_their_published_forms(loss_type):
    """Values and gradients, with tokens that are clipped on both sides; two parts, of a prompt each, add up."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old, ref = torch.randn(3, 2, 3, 5, generator=generator, dtype=torch.float64)
    logprobs.requires_grad_()
    advantages = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([[5, 1, 3], [2, 4, 5]])
    mask = (torch.arange(5) < lengths[..., None]).long()
    normalizer = {"grpo": None, "bnpo": 20.0, "dr_grpo": 12 * 6.0}[loss_type]
    parts = []
    for b in (slice(0, 1), slice(1, 2)):
        parts.append(grpo.loss(logprobs[b], old[b], ref[b], advantages[b], mask[b], 0.04, 6,
                               normalizer, 0.2))
    ours = [sum(column) for column in zip(*parts)]
    theirs = published_loss(loss_type, logprobs, old, ref, advantages, lengths, 0.04, 0.2, 12)
    torch.testing.assert_close(ours, list(theirs), check_dtype=False)
    assert 0.1 < ours[2] < 0.9
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (ours[0], theirs[0])]
    torch.testing.assert_close(*gradients)


def test_shapes_are_checked_while_tests_run():
    logprobs, old, mask = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2, 3).long()
    with pytest.raises(TypeCheckError, match="old_logprobs"):
        grpo.loss(logprobs, old, None, torch.zeros(1, 2), mask, 0.0, 2)


# Log-probabilities

@pytest.mark.parametrize("temperature, chunk", [(1.0, model.LOGITS_AT_ONCE), (0.7, 700)])
def test_shared_prefix_equals_repeated(policy, prompts, temperature, chunk, monkeypatch):
    """Values and all gradients; logits in one piece, and those of seven tokens at a time."""
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", chunk)
    completions, mask = random_completions(policy, [[5, 1, 7], [2, 6, 3]])
    weight = torch.randn(mask.shape, dtype=torch.float64, generator=seeded(1)[0])
    values, gradients = [], []
    for form in (grpo.logprobs, repeated_logprobs):
        policy.zero_grad()
        logprobs = form(policy, prompts, completions, mask, temperature)
        (logprobs * weight).sum().backward()
        values.append(logprobs.detach())
        gradients.append({name: each.grad for name, each in policy.named_parameters()})
    assert (values[0][mask == 0] == 0).all()
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)  # transformers' norms compute in fp32
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9, name


# Rollouts

@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprob_equals_scored(policy, prompts, temperature):
    rollouts = grpo.sample(policy, prompts, 4, 12, [5, 6, 7], seeded(2), temperature)
    with torch.no_grad():
        scored = grpo.logprobs(policy, prompts, rollouts.completions, rollouts.mask, temperature)
    torch.testing.assert_close(scored.float(), rollouts.logprobs, rtol=1e-4, atol=1e-5)
    assert not torch.isin(rollouts.completions, torch.tensor(policy.forbidden)).any()


def test_sampling_depends_on_the_prompts_own_generator_only(policy, prompts):
    both = grpo.sample(policy, prompts, 3, 8, [], seeded(2))
    for b, prompt in enumerate(prompts):
        alone = grpo.sample(policy, [prompt], 3, 8, [], [seeded(2)[b]])
        assert torch.equal(alone.completions[0], both.completions[b])
    same_prompt = grpo.sample(policy, [prompts[0]] * 2, 3, 8, [], seeded(2))
    different = {tuple(row) for row in same_prompt.completions.flatten(0, 1).tolist()}
    assert len(different) == 6


def test_micro_batches_sample_what_one_batch_samples(policy):
    """In three parts of different lengths; `split` gives each part back, as long as its own longest completion."""
    prompts = random_prompts(5)
    free = grpo.sample(policy, prompts, 2, 9, [], seeded(5), 0.7)
    stops = [*free.completions[:2, :, 1].flatten().tolist(), *free.completions[2, :, 4].tolist()]
    whole = grpo.sample(policy, prompts, 2, 9, stops, seeded(5), 0.7)
    joined = grpo.rollout(policy, prompts, 2, seeded(5), stops, 9, 0.7, micro_batch_size=2)
    assert joined.prompts == prompts
    assert torch.equal(joined.completions, whole.completions)
    assert torch.equal(joined.mask, whole.mask)
    torch.testing.assert_close(joined.logprobs, whole.logprobs)

    parts = joined.split(2)
    assert [len(part.prompts) for part in parts] == [2, 2, 1]
    lengths = [part.mask.shape[-1] for part in parts]
    assert lengths == [int(part.mask.sum(-1).max()) for part in parts] and len(set(lengths)) > 1
    again = grpo.join(parts)
    for name in ("completions", "mask", "logprobs"):
        assert torch.equal(getattr(again, name), getattr(joined, name))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_tower_sees_each_video_once(policy, prompts, frozen):
    """Sampling, scoring and an update. A tower that learns sees it in each, and gets a gradient."""
    prompts = [replace(prompts[0], key=("a",)), replace(prompts[1], key=("b",)),
               replace(prompts[0], key=("a",))]
    next(policy.qwen.model.visual.parameters()).requires_grad_(False)
    assert not policy.vision_is_frozen      # as long as one of its weights learns
    policy.qwen.model.visual.requires_grad_(not frozen)
    assert policy.vision_is_frozen == frozen
    grids = []
    policy.qwen.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: grids.append(len(kwargs["grid_thw"])), with_kwargs=True)
    rollouts = grpo.rollout(policy, prompts, 2, seeded(3), [], 4)
    advantages = torch.tensor([[1.0, -1.0]] * 3)
    before = copy.deepcopy(policy.qwen.model.visual.state_dict())
    update(policy, rollouts, advantages)
    after = policy.qwen.model.visual.state_dict()
    assert grids == ([2] if frozen else [2, 3])
    assert all(torch.equal(before[name], after[name]) for name in before) == frozen


# Updates

DEFAULTS = dict(beta=0.0, loss_type="grpo", epsilon=0.2, num_iterations=1, max_tokens=8,
                temperature=1.0, micro_batch_size=0)
LENGTHS = torch.tensor([[5, 1, 8], [2, 6, 3]])
ADVANTAGES = torch.tensor([[1.5, -0.5, -1.0], [0.2, 0.6, -0.8]])


def update(policy, rollouts, advantages=ADVANTAGES, reference=None, **settings):
    """grpo.update with an optimizer that moves the weights by minus their gradient, so that this can be seen."""
    learning = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1.0)
    metrics = grpo.update(policy, reference, optimizer, rollouts, advantages,
                          **(DEFAULTS | settings))
    assert all(weight.grad is None for weight in learning)
    return metrics


@pytest.fixture
def rollouts(policy, prompts):
    """As if each token had been sampled with a log-probability that is 0.25 too high."""
    completions, mask = random_completions(policy, LENGTHS)
    with torch.no_grad():
        sampled = repeated_logprobs(policy, prompts, completions, mask).float() + 0.25 * mask
    return grpo.Rollouts(prompts, completions, mask, sampled)


def repeated(policy, rollouts, temperature=1.0):
    completions, mask = rollouts.completions, rollouts.mask
    return repeated_logprobs(policy, rollouts.prompts, completions, mask, temperature)


def step_by_hand(policy, loss):
    """Minus the gradient, cut to the length 1, added to the weights; returns its length before."""
    loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in policy.parameters()]).norm()
    with torch.no_grad():
        for weight in policy.parameters():
            weight -= weight.grad / max(norm, 1.0)
    policy.zero_grad()
    return norm.item()


def assert_same_weights(one, other, before):
    """And that they have changed."""
    for name, weight in one.state_dict().items():
        change, expected = weight - before[name], other.state_dict()[name] - before[name]
        assert (change - expected).norm() <= 1e-4 * expected.norm() + 1e-9, name
    assert any(not torch.equal(weight, before[name]) for name, weight in one.state_dict().items())


def test_first_step_is_the_policy_gradient(policy, rollouts):
    """The gradient is that of minus the mean of A * log pi, over the tokens up to and including the last one, then over
    completions. The ratio is 1, so the loss is minus the mean advantage, and nothing is clipped."""
    by_hand, before = copy.deepcopy(policy), copy.deepcopy(policy.state_dict())
    metrics = update(policy, rollouts)
    mean_logprobs = repeated(by_hand, rollouts).sum(-1) / LENGTHS                           # (B, G)
    norm = step_by_hand(by_hand, -(ADVANTAGES * mean_logprobs).mean())
    assert_same_weights(policy, by_hand, before)
    expected = {"updates": 1, "kl": 0, "loss": -ADVANTAGES.mean().item(), "clipped": 0,
                "mismatch": 0.25, "grad_norm": norm}
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert norm > 1     # so the gradient is cut


@pytest.mark.parametrize("loss_type, micro_batch_size, temperature",
                         [("grpo", 0, 1.0), ("grpo", 1, 0.7), ("bnpo", 1, 1.0),
                          ("dr_grpo", 1, 1.0)])
def test_updates_are_those_of_the_equations(policy, rollouts, loss_type, micro_batch_size,
                                            temperature):
    """Three updates on one rollout, with a reference that differs. The ratio is to the policy before the first one. The
    metrics are the last one's."""
    reference = random_policy()
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.1 * weight.abs().mean() * torch.randn(weight.shape, generator=seeded(1)[0])
        ref_logprobs = repeated(reference, rollouts, temperature)
        old = repeated(policy, rollouts, temperature)
    by_hand, before = copy.deepcopy(policy), copy.deepcopy(policy.state_dict())
    metrics = update(policy, rollouts, reference=reference.requires_grad_(False), beta=0.3,
                     loss_type=loss_type, num_iterations=3, micro_batch_size=micro_batch_size,
                     temperature=temperature)
    for _ in range(3):
        logprobs = repeated(by_hand, rollouts, temperature)
        loss, kl, clip_fraction = published_loss(
            loss_type, logprobs, old, ref_logprobs, ADVANTAGES, LENGTHS, 0.3, 0.2, 8)
        norm = step_by_hand(by_hand, loss)
    assert_same_weights(policy, by_hand, before)
    assert kl > 0.01 and clip_fraction > 0.1
    expected = {"updates": 3, "kl": kl.item(), "loss": loss.item(), "clipped": clip_fraction.item(),
                "grad_norm": norm, "mismatch": metrics["mismatch"]}
    assert metrics == pytest.approx(expected, rel=1e-4)
    if temperature == 1:
        assert metrics["mismatch"] == pytest.approx(0.25, rel=1e-4)


def other_process(monkeypatch, *messages):
    """A second process, which says these things one after the other."""
    left = list(messages)
    monkeypatch.setattr(grpo, "gather", lambda mine: [*mine, left.pop(0)])


@pytest.mark.parametrize("loss_type, divisor",
                         [("grpo", 6 + 3), ("bnpo", 25 + 40), ("dr_grpo", 8 * (6 + 3))])
def test_all_processes_count(policy, rollouts, monkeypatch, loss_type, divisor):
    """Their completions and tokens: this process has 6 completions of 25 tokens, another one 3 of 40. FSDP averages the
    gradients of two processes, so each is twice its share."""
    other_process(monkeypatch, (3, 40, False), [0.5, 1.0, 0.25, 10.0])
    by_hand, before = copy.deepcopy(policy), copy.deepcopy(policy.state_dict())
    metrics = update(policy, rollouts, loss_type=loss_type)
    weight = ADVANTAGES if loss_type == "grpo" else ADVANTAGES * LENGTHS                    # (B, G)
    mean_logprobs = repeated(by_hand, rollouts).sum(-1) / LENGTHS
    norm = step_by_hand(by_hand, -2 * (weight * mean_logprobs).sum() / divisor)
    assert_same_weights(policy, by_hand, before)
    expected = {"updates": 1, "loss": 0.5 - weight.sum().item() / divisor, "kl": 1.0,
                "clipped": 0.25, "mismatch": (0.25 * 25 + 10) / 65, "grad_norm": norm}
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_only_a_flat_batch_makes_no_update(policy, rollouts, monkeypatch):
    """A process whose groups are flat takes part in the step of another one; one flat group of two changes nothing."""
    before = copy.deepcopy(policy.state_dict())
    flat = torch.zeros(2, 3)
    metrics = update(policy, rollouts, flat, reference=random_policy(1), beta=0.1)
    assert metrics["updates"] == 0 and metrics["loss"] is None and metrics["grad_norm"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    half = torch.stack([flat[0], ADVANTAGES[1]])
    assert update(copy.deepcopy(policy), rollouts, half)["updates"] == 1
    other_process(monkeypatch, (3, 40, True), [0.0] * 4)
    assert update(policy, rollouts, flat)["updates"] == 1


@pytest.mark.parametrize("bad_iteration", [0, 1])
def test_no_step_when_not_finite(policy, rollouts, monkeypatch, bad_iteration):
    """From the first metric on that is not finite, wherever it is: here on another process."""
    sums = [[0.0] * 4 for _ in range(3)]
    sums[bad_iteration][1] = math.nan
    other_process(monkeypatch, (3, 40, True), *sums)
    expected = copy.deepcopy(policy)
    metrics = update(policy, rollouts, num_iterations=3)
    assert metrics["updates"] == bad_iteration and math.isnan(metrics["kl"])
    if bad_iteration:
        other_process(monkeypatch, (3, 40, True), sums[0])
        update(expected, rollouts)
    weights = expected.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in policy.state_dict().items())
