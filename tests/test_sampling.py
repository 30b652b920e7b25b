"""Sampled tokens against transformers' own forward pass, on models of random shapes; rows that are dropped."""
import math
import random

import pytest
import torch
from conftest import seeded
from oracles import distributions, random_policy, random_prompts
from peft import LoraConfig, inject_adapter_in_model

import grpo
from engine.sampling import Decoding, draw_token, rows_to_keep

HEADS = [(2, 1), (4, 2), (4, 4), (6, 2), (3, 1)]        # attention heads and key heads


def assert_sampled_from(policy, prompts, rollouts, generators=None, temperature=1.0, max_tokens=20,
                        stops=()):
    """Assert that each token up to and including the first stop token is what its own random number draws from the
    distribution that transformers' own forward pass gives behind the tokens before it, or the likeliest one without
    generators; and that nothing was computed after the last row had stopped."""
    completions, mask = rollouts.completions, rollouts.mask.bool()
    is_stop = torch.isin(completions, torch.tensor(stops)) & mask
    has_stopped = (is_stop.cumsum(-1) - is_stop.long()).bool()
    assert torch.equal(mask, ~has_stopped) and mask[..., -1].any()
    _, rows, longest = mask.shape
    for b, prompt in enumerate(prompts):
        uniform = None
        if generators:
            uniform = torch.rand(rows, max_tokens, generator=generators[b])[:, :longest].flatten()
        with torch.no_grad():
            logprobs = distributions(policy.qwen, prompt, completions[b], policy.forbidden,
                                     temperature)                                       # (R, C, V)
        tokens = draw_token(logprobs.flatten(0, 1), uniform).view(rows, longest)
        assert torch.equal(completions[b], tokens * mask[b])
        expected = logprobs.gather(-1, tokens[..., None])[..., 0] * mask[b]
        torch.testing.assert_close(rollouts.logprobs[b], expected.float(), rtol=1e-5, atol=1e-5)


def test_draws_follow_the_softmax():
    logits = torch.tensor([-torch.inf, 0.0, math.log(3.0), math.log(4.0)])
    uniform = (torch.arange(8000) + 0.5) / 8000
    counts = torch.bincount(draw_token(logits.expand(8000, -1), uniform), minlength=4)
    assert counts.tolist() == [0, 1000, 3000, 4000]
    edges = torch.tensor([0.0, 1 - 2 ** -24])   # the smallest and the largest that torch.rand gives
    assert draw_token(logits.expand(2, -1), edges).tolist() == [1, 3]
    assert draw_token(logits[None], None).tolist() == [3]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_are_drawn_from_the_model(seed):
    """Of prompts of different lengths, with rows that stop and are dropped, and a temperature."""
    rng = random.Random(seed)
    policy = random_policy(seed, rng.choice(HEADS), layers=rng.randint(1, 3),
                           tied=rng.random() < 0.5)
    count, rows, temperature = rng.randint(1, 3), rng.randint(1, 5), rng.choice([1.0, 0.7])
    prompts = random_prompts(count, seed)
    free = grpo.sample(policy, prompts, rows, 20, [], seeded(count), temperature)
    assert len(free.completions.unique()) > 10
    assert_sampled_from(policy, prompts, free, seeded(count), temperature)
    stops = free.completions.flatten(0, 1)[::2, 3].tolist()
    rollouts = grpo.sample(policy, prompts, rows, 20, stops, seeded(count), temperature)
    assert rollouts.mask.sum() < free.mask.sum()
    assert_sampled_from(policy, prompts, rollouts, seeded(count), temperature, stops=stops)


@pytest.mark.parametrize("heads", HEADS)
def test_every_grouping_of_heads_and_rows(heads):
    """Also heads with keys of their own behind a single prompt, whose queries lie otherwise in memory."""
    policy = random_policy(4, heads)
    for count, rows in ((1, 1), (1, 4), (2, 1), (3, 2)):
        prompts = random_prompts(count, seed=4)
        rollouts = grpo.sample(policy, prompts, rows, 5, [], seeded(count))
        assert_sampled_from(policy, prompts, rollouts, seeded(count), max_tokens=5)


def test_greedy_tokens_are_the_likeliest():
    policy, prompts = random_policy(5), random_prompts(3)
    rollouts = grpo.sample(policy, prompts, 1, 9, [])
    assert_sampled_from(policy, prompts, rollouts)


def test_in_half_precision_sampling_is_no_farther_off_than_scoring():
    """In bf16 both round; neither is farther from fp64 by more than a third."""
    exact, rounded = random_policy(1), random_policy(1, dtype=torch.bfloat16)
    prompts = random_prompts(2)
    rollouts = grpo.sample(rounded, prompts, 8, 20, [], seeded(2))
    tokens = rollouts.completions, rollouts.mask
    with torch.no_grad():
        expected, scored = (grpo.logprobs(each, prompts, *tokens) for each in (exact, rounded))
    sampling, scoring = ((each - expected).abs().mean() for each in (rollouts.logprobs, scored))
    assert 0.75 < sampling / scoring < 1.33


@pytest.mark.parametrize("names", ["q_proj v_proj", "o_proj down_proj",
                                   "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"])
def test_what_is_around_a_linear_layer_counts(names):
    """Such as LoRA's adapters."""
    policy, prompts = random_policy(2), random_prompts(2)
    before = grpo.sample(policy, prompts, 3, 10, [], seeded(2))
    adapters = LoraConfig(r=2, target_modules=names.split(), init_lora_weights=False)
    inject_adapter_in_model(adapters, policy.qwen.model.language_model)
    policy.double()
    rollouts = grpo.sample(policy, prompts, 3, 10, [], seeded(2))
    assert_sampled_from(policy, prompts, rollouts, seeded(2), max_tokens=10)
    assert not torch.equal(before.logprobs, rollouts.logprobs)


def test_rows_to_keep_by_hand():
    running = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool()
    prompts, rows = rows_to_keep(running)
    assert prompts.tolist() == [0, 2] and rows.tolist() == [0, 2, 3, 10, 8, 9]
    assert rows_to_keep(torch.tensor([[True] * 4, [True, False, False, False]])) is None


def test_stopped_rows_are_not_computed(monkeypatch):
    policy, prompts = random_policy(), random_prompts(2)
    free = grpo.sample(policy, prompts, 4, 12, [], seeded(2))
    stops = [*free.completions[0, :, 1].tolist(), *free.completions[1, :2, 3].tolist()]
    counts, decode = [], Decoding.__call__

    def counted(self, token):
        counts.append(len(token))
        return decode(self, token)

    monkeypatch.setattr(Decoding, "__call__", counted)
    rollouts = grpo.sample(policy, prompts, 4, 12, stops, seeded(2))
    assert counts[0] == 8 and counts[-1] < 8
    assert_sampled_from(policy, prompts, rollouts, seeded(2), max_tokens=12, stops=stops)
