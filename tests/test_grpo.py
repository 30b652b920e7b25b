"""The shared-prefix forms against the plain, repeated ones; advantages and loss against the formulas by hand."""
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import grpo
import model
from engine.sampling import draw_token


def completions_of(policy, lengths, seed=1):
    """Random completions (B, G, C) and their mask, of the given lengths [[...], [...]]; no forbidden tokens."""
    lengths = torch.tensor(lengths)
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([i for i in range(policy.qwen.lm_head.out_features) if i not in policy.forbidden])
    ids = allowed[torch.randint(len(allowed), (*lengths.shape, int(lengths.max())), generator=generator)]
    mask = (torch.arange(int(lengths.max())) < lengths[..., None]).long()
    return ids * mask, mask


def repeated(policy, prompts, completions, mask, temperature):
    """The oracle: every completion in a sequence of its own behind its own copy of the prompt and the video, through
    transformers' own forward pass, log-softmax over the whole vocabulary."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b, prompt in enumerate(prompts):
        for g in range(completions.shape[1]):
            tokens = completions[b, g][mask[b, g].bool()]
            after = prompt.positions.max() + 1 + torch.arange(len(tokens))
            ids = torch.cat([prompt.ids, tokens])[None]
            logits = policy.qwen(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=prompt.patches.double(),
                position_ids=torch.cat([prompt.positions, after.expand(3, -1)], 1)[:, None],
                video_grid_thw=prompt.grid[None]).logits[0] / temperature
            logits[:, policy.forbidden] = -torch.inf
            logp = logits.log_softmax(-1)[len(prompt.ids) - 1:-1]
            out[b, g, :len(tokens)] = logp.gather(1, tokens[:, None])[:, 0]
    return out


@pytest.mark.parametrize("chunk", [model.LOGITS_AT_ONCE, 2000])     # in one piece, and a few tokens at a time
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shared_prefix_equals_repeated(tiny, prompts, chunk, temperature, monkeypatch):
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", chunk)
    policy, _ = tiny
    completions, mask = completions_of(policy, [[5, 1, 7], [2, 6, 3]])
    weight = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for form in (grpo.logprobs, repeated):
        policy.zero_grad()
        logp = form(policy, prompts, completions, mask, temperature)
        (logp * weight * mask).sum().backward()
        results.append((logp.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    (shared, shared_grads), (plain, plain_grads) = results
    assert (shared[mask == 0] == 0).all()
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)         # transformers' norms compute in fp32
    assert len(shared_grads) == len(plain_grads) > 30
    for a, b in zip(shared_grads, plain_grads):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_completion_does_not_see_its_neighbours(tiny, prompts):
    policy, _ = tiny
    completions, mask = completions_of(policy, [[5, 4], [5, 4]])
    changed = completions.clone()
    changed[:, 1, :4] = changed[:, 1, :4].flip(-1)
    with torch.no_grad():
        before, after = (grpo.logprobs(policy, prompts, c, mask) for c in (completions, changed))
    torch.testing.assert_close(before[:, 0], after[:, 0], rtol=1e-6, atol=1e-7)
    assert (before[:, 1] - after[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprob_equals_scored(tiny, prompts, temperature):
    policy, encoder = tiny
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    rollouts = grpo.rollout(policy, prompts, 4, 12, encoder.stop_ids, generators, temperature)
    with torch.no_grad():
        scored = grpo.logprobs(policy, prompts, rollouts.completions, rollouts.mask, temperature)
    torch.testing.assert_close(scored.float(), rollouts.logprobs, rtol=1e-4, atol=1e-5)
    assert not torch.isin(rollouts.completions[rollouts.mask.bool()], torch.tensor(policy.forbidden)).any()


def test_sampling_depends_on_the_prompts_own_generator_only(tiny, prompts):
    policy, encoder = tiny
    seeded = lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    both = grpo.rollout(policy, prompts, 3, 8, encoder.stop_ids, seeded())
    for row, prompt in enumerate(prompts):
        alone = grpo.rollout(policy, [prompt], 3, 8, encoder.stop_ids, [seeded()[row]])
        width = min(alone.mask.shape[-1], both.mask.shape[-1])
        assert torch.equal(alone.completions[0, :, :width], both.completions[row, :, :width])
    assert len({tuple(c.tolist()) for c in both.completions.flatten(0, 1)}) > 1      # not one completion G times


def test_sample_follows_the_softmax():
    logits = torch.tensor([0.0, -torch.inf, math.log(3.0), math.log(4.0)])
    uniform = (torch.arange(8000) + 0.5) / 8000
    counts = torch.bincount(draw_token(logits.expand(8000, -1), uniform), minlength=4)
    assert counts.tolist() == [1000, 0, 3000, 4000]
    edges = torch.tensor([0.0, 1 - 2 ** -24])                               # the least and the largest torch.rand
    assert draw_token(logits.expand(2, -1), edges).tolist() == [0, 3]
    assert draw_token(logits[None], None).tolist() == [3]


def test_greedy_equals_plain_decoding(tiny, prompts):
    """Every token is the likeliest of the whole vocabulary under transformers' own forward pass."""
    policy, encoder = tiny
    rollouts = grpo.rollout(policy, prompts, 1, 6, encoder.stop_ids)
    allowed = [i for i in range(policy.qwen.lm_head.out_features) if i not in policy.forbidden]
    for b, prompt in enumerate(prompts):
        tokens = rollouts.completions[b, 0][rollouts.mask[b, 0].bool()]
        for c in range(len(tokens)):
            ids = torch.cat([prompt.ids, tokens[:c]])[None]
            after = prompt.positions.max() + 1 + torch.arange(c)
            with torch.no_grad():
                logits = policy.qwen(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=prompt.patches.double(),
                    position_ids=torch.cat([prompt.positions, after.expand(3, -1)], 1)[:, None],
                    video_grid_thw=prompt.grid[None]).logits[0, -1]
            assert int(tokens[c]) == allowed[int(logits[allowed].argmax())]


def test_mask_ends_with_the_stop_token(tiny, prompts):
    policy, _ = tiny
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    free = grpo.rollout(policy, prompts, 4, 20, [], generators())
    assert free.mask.all() and free.mask.shape[-1] == 20
    stops = free.completions[:, :, 3].unique().tolist()                     # so that every row stops by then
    rollouts = grpo.rollout(policy, prompts, 4, 20, stops, generators())
    assert rollouts.mask.shape[-1] <= 4                                     # no work after the last row stopped
    for ids, mask in zip(rollouts.completions.flatten(0, 1), rollouts.mask.flatten(0, 1)):
        length = int(mask.sum())
        assert mask[:length].all() and ids[length - 1] in torch.tensor(stops)
        assert not torch.isin(ids[:length - 1], torch.tensor(stops)).any()


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.5, 0.5, 0.5, 0.5]])
    std = math.sqrt((4 + 1 + 0 + 9) / 3)                                    # mean 3, unbiased
    expected = [(r - 3) / (std + 1e-4) for r in (1, 2, 3, 6)]
    torch.testing.assert_close(grpo.advantages(rewards), torch.tensor([expected, [0.0] * 4]))
    assert (grpo.advantages(torch.full((1, 8), 1.6153846)) == 0).all()      # whose fp32 mean is another number


def test_advantages_without_a_scale():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.7, 0.7, 0.7, 0.7]])
    torch.testing.assert_close(grpo.advantages(rewards, scale=False), torch.tensor([[-2.0, -1, 0, 3], [0] * 4]))


def test_groups_are_normalised_on_their_own():
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    other = rewards.clone()
    other[1] += torch.arange(5)
    assert torch.equal(grpo.advantages(rewards)[[0, 2]], grpo.advantages(other)[[0, 2]])


def test_loss_by_hand():
    logp = torch.tensor([[[-1.0, -2.0], [-0.5, 9.0]]])                      # the 9 is padding
    old, ref = torch.tensor([[[-1.2, -2.0], [-0.5, 7.0]]]), torch.tensor([[[-1.0, -1.5], [-0.7, 3.0]]])
    mask, advantage = torch.tensor([[[1, 1], [1, 0]]]), torch.tensor([[2.0, -1.0]])
    k3 = lambda difference: math.exp(difference) - difference - 1
    first = ((math.exp(0.2) * 2 - 0.1 * k3(0.0)) + (1 * 2 - 0.1 * k3(0.5))) / 2
    second = 1 * -1 - 0.1 * k3(-0.2)
    loss, kl, _ = grpo.loss(logp, old, ref, advantage, mask, beta=0.1, total=2)
    assert loss.item() == pytest.approx(-(first + second) / 2, rel=1e-6)
    assert kl.item() == pytest.approx(((k3(0.0) + k3(0.5)) / 2 + k3(-0.2)) / 2, rel=1e-6)


def test_loss_equals_the_published_form():
    """TRL's loss_type="grpo": -(exp(lp - lp.detach()) * A - beta * kl), mean over tokens, then over completions."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(2, 3, 5, generator=generator).requires_grad_()
    ref, advantage = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, generator=generator)
    mask = (torch.arange(5) < torch.tensor([[5, 1, 3], [2, 4, 5]])[..., None]).long()
    flat, flat_ref, flat_mask = logp.flatten(0, 1), ref.flatten(0, 1), mask.flatten(0, 1)
    kl = torch.exp(flat_ref - flat) - (flat_ref - flat) - 1
    per_token = -(torch.exp(flat - flat.detach()) * advantage.flatten()[:, None] - 0.04 * kl)
    published = ((per_token * flat_mask).sum(1) / flat_mask.sum(1)).mean()
    ours, *_ = grpo.loss(logp, logp.detach(), ref, advantage, mask, 0.04, 6)
    gradients = [torch.autograd.grad(value, logp, retain_graph=True)[0] for value in (ours, published)]
    torch.testing.assert_close(ours, published)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo"])
def test_losses_equal_their_published_forms(kind):
    """GRPO: the mean over i of 1/|o_i| sum_t; token-level: 1/sum |o_i| sum_it; Dr. GRPO: the mean over i of sum_t / the
    longest. The gain is PPO's min(r A, clip(r) A); in two parts, of a prompt each, all add up."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(2, 3, 5, generator=generator).requires_grad_()
    old, ref = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    advantage, lengths = torch.randn(2, 3, generator=generator), torch.tensor([[5, 1, 3], [2, 4, 5]])
    mask, sums, clipped, longest, eps = (torch.arange(5) < lengths[..., None]).long(), [], [], 12, 0.2
    for b, g in [(b, g) for b in range(2) for g in range(3)]:
        size, a, tokens = lengths[b, g], advantage[b, g], []
        for t in range(size):
            r, u = (logp[b, g, t] - old[b, g, t]).exp(), ref[b, g, t] - logp[b, g, t]
            tokens.append(min(r * a, r.clamp(1 - eps, 1 + eps) * a) - 0.04 * (u.exp() - u - 1))
        sums.append(-sum(tokens))
        away = (logp - old).exp()[b, g, :size]
        clipped.append((away > 1 + eps if a > 0 else away < 1 - eps).float().mean())
    divisor = {"grpo": lengths.flatten(), "bnpo": lengths.sum() / 6, "dr_grpo": longest}[kind]
    published = (torch.stack(sums) / divisor).mean()
    tokens = {"grpo": None, "bnpo": 20.0, "dr_grpo": longest * 6.0}[kind]
    parts = [grpo.loss(logp[b], old[b], ref[b], advantage[b], mask[b], 0.04, 6, tokens, eps)
             for b in (slice(0, 1), slice(1, 2))]
    ours = sum(part[0] for part in parts)
    torch.testing.assert_close(ours, published)
    torch.testing.assert_close(*(torch.autograd.grad(value, logp, retain_graph=True)[0] for value in (ours, published)))
    assert sum(part[2] for part in parts).item() == pytest.approx(np.mean(clipped)) and 0.1 < np.mean(clipped) < 0.9


def test_clipping_changes_no_bit_of_a_first_update():
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(2, 3, 5, generator=generator).requires_grad_()
    args = None, torch.randn(2, 3, generator=generator), torch.ones(2, 3, 5).long(), 0.0, 6, None
    one, other = (grpo.loss(logp, logp.detach(), *args, clip)[0] for clip in (0.2, math.inf))
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in (one, other)]
    plain = -(torch.exp(logp - logp.detach()) * args[1][..., None] * (args[2] / (5 * 6))).sum()
    assert one == other == plain and torch.equal(*gradients)
    assert torch.equal(gradients[0], torch.autograd.grad(plain, logp)[0])


def test_first_step_is_the_policy_gradient():
    """Ratio 1: the loss is minus the mean advantage, the gradient of a token -A / (tokens * completions)."""
    logp = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[[1, 1, 1, 0], [1, 1, 0, 0]]])                     # the last 1 of a row is its stop token
    loss, kl, _ = grpo.loss(logp, logp.detach(), None, torch.tensor([[1.5, -0.5]]), mask, 0.04, 2)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.5 - 0.5) / 2, abs=1e-6) and kl.item() == 0
    expected = torch.tensor([[[-1.5 / 6, -1.5 / 6, -1.5 / 6, 0], [0.5 / 4, 0.5 / 4, 0, 0]]])
    torch.testing.assert_close(logp.grad, expected)


def test_training_on_one_batch_raises_the_rewarded_completion(tiny, prompts):
    policy, _ = tiny
    completions, mask = completions_of(policy, [[6, 4], [5, 6]])
    advantage = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * 0.7
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    old = grpo.logprobs(policy, prompts, completions, mask).detach()
    losses = []
    for _ in range(5):
        logp = grpo.logprobs(policy, prompts, completions, mask)
        loss, *_ = grpo.loss(logp, old, old, advantage, mask, 0.01, 4)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    gain = (grpo.logprobs(policy, prompts, completions, mask) - old).sum(-1)
    assert ((gain > 0) == (advantage > 0)).all()


def test_shapes_are_checked_while_tests_run():
    logp, old, mask = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2, 3).long()
    with pytest.raises(TypeCheckError, match="old_logp"):
        grpo.loss(logp, old, None, torch.zeros(1, 2), mask, 0.0, 2)
