"""Group relative policy optimisation: rollouts, advantages, log-probabilities, loss, as plain functions (Eq. 3, 4).

A group is G completions of one prompt, and the prompt is mostly video. So the prompt is computed once wherever it
appears:

- `rollout` runs the prompts once, repeats their key-value cache G times and then samples B * G rows in one loop;
- `logprobs` scores one packed sequence [prompt][o_1]...[o_G] a group. A mask lets each completion see the prompt and
  itself, and each completion's positions continue from the prompt's end, so every token gets the same
  log-probability and gradient as in a sequence of its own.

Choices the paper leaves open, or departures from it:
1. std is the unbiased one, with 1e-4 added, as in the authors' code.
2. KL is the k3 estimator, exp(ref - lp) - (ref - lp) - 1: unbiased, never negative.
3. The loss is the mean over a completion's tokens, then over completions (Eq. 3 sums over the group; the factor G
   is the learning rate's).
4. One update per rollout, so pi_old is pi itself, the ratio is 1 and there is nothing to clip; the ratio stays in
   the loss because its gradient is the policy gradient.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from model import Policy, Prompt


@dataclass(frozen=True)
class Rollouts:
    completions: Tensor     # (B, G, C) token ids; 0 after the end
    mask: Tensor            # (B, G, C) 1 up to and including the stop token
    logprobs: Tensor        # (B, G, C) log-probability of each token as it was sampled; 0 after the end


def left_pad(prompts: list[Prompt], device) -> dict[str, Tensor]:
    """Prompts of different lengths as one batch that ends at the same column P: ids (B, P), positions (3, B, P),
    valid (B, P), and all videos' patches one after the other."""
    length = max(len(p.ids) for p in prompts)
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    positions = torch.zeros(3, len(prompts), length, dtype=torch.long)
    valid = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, p in enumerate(prompts):
        ids[row, -len(p.ids):], positions[:, row, -len(p.ids):], valid[row, -len(p.ids):] = p.ids, p.positions, True
    batch = dict(ids=ids, positions=positions, valid=valid, patches=torch.cat([p.patches for p in prompts]),
                 grid=torch.stack([p.grid for p in prompts]))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def sample(logits: Tensor, uniform: Tensor | None) -> Tensor:
    """One token a row of logits (rows, V): the inverse of the cumulated softmax at uniform (rows,) in [0, 1), so
    that a row's token depends on its own random number only; the likeliest token where `uniform` is None."""
    if uniform is None:
        return logits.argmax(-1)
    cumulated = logits.double().softmax(-1).cumsum(-1)                                      # (rows, V)
    token = torch.searchsorted(cumulated, uniform[:, None].double() * cumulated[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)            # V where logits are not numbers: train.py sees that later


@torch.no_grad()
def rollout(policy: Policy, prompts: list[Prompt], group_size: int, max_tokens: int, stop_ids: list[int],
            generators: list[torch.Generator] | None = None, temperature: float = 1.0) -> Rollouts:
    """Sample G completions of each of B prompts, or decode greedily when there are no `generators`.

    A prompt's completions depend on its own generator (one a prompt, on the CPU) and not on what else is in the
    batch. A completion ends with the first of `stop_ids`, or unfinished after `max_tokens`.
    """
    device = next(policy.parameters()).device
    batch = left_pad(prompts, device)
    valid, length = batch.pop("valid"), batch["ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    looks = causal & valid[:, None] | torch.eye(length, dtype=torch.bool, device=device)    # (B, P, P)
    cache = DynamicCache(config=policy.qwen.config.text_config)
    logits = policy(**batch, mask=looks[:, None], cache=cache, temperature=temperature)     # (B, V)

    cache.batch_repeat_interleave(group_size)
    logits = logits.repeat_interleave(group_size, 0)                                        # (B * G, V)
    valid = valid.repeat_interleave(group_size, 0)                                          # (B * G, P)
    position = (batch["positions"].amax((0, 2)) + 1).repeat_interleave(group_size)          # (B * G,)
    rows = len(prompts) * group_size
    uniform = None
    if generators is not None:
        uniform = torch.cat([torch.rand(group_size, max_tokens, generator=g) for g in generators]).to(device)
    completions = torch.zeros(rows, max_tokens, dtype=torch.long, device=device)            # (B * G, C)
    mask, logprobs = torch.zeros_like(completions), torch.zeros(rows, max_tokens, device=device)
    stop = torch.tensor(stop_ids, device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    for c in range(max_tokens):
        token = sample(logits, None if uniform is None else uniform[:, c]) * running
        completions[:, c], mask[:, c] = token, running
        logprobs[:, c] = logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1).masked_fill(~running, 0)
        running = running & ~torch.isin(token, stop)
        if c + 1 == max_tokens or not running.any():
            break
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)                    # (B * G, P + c + 1)
        logits = policy(token[:, None], (position + c).expand(3, -1)[..., None], valid[:, None, None], cache=cache,
                        temperature=temperature)
    return Rollouts(*(x[:, :c + 1].view(len(prompts), group_size, c + 1) for x in (completions, mask, logprobs)))


def advantages(rewards: Tensor) -> Tensor:
    """Group-normalised rewards (Eq. 3): (B, G) -> (B, G). A group whose rewards are all equal gets zeros."""
    rewards = rewards - rewards[..., :1]    # so that equal ones are 0 exactly: their fp32 mean may differ from them
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)


def logprobs(policy: Policy, prompts: list[Prompt], completions: Tensor, mask: Tensor,
             temperature: float = 1.0) -> Tensor:
    """log pi(o_t | prompt, o_<t) of completions (B, G, C) -> (B, G, C), 0 where mask (B, G, C) is 0.

    One packed sequence of P + G * C tokens a group; logits only where the mask is 1.
    """
    (groups, size, tokens), device = completions.shape, next(policy.parameters()).device
    batch = left_pad(prompts, device)
    valid, length = batch.pop("valid"), batch["ids"].shape[1]
    completions, mask = completions.to(device), mask.to(device)

    # The token at column P + g * C + c belongs to completion g + 1; prompt tokens belong to 0.
    owner = torch.cat([torch.zeros(length, dtype=torch.long), torch.arange(size).repeat_interleave(tokens) + 1])
    owner = owner.to(device)                                                                # (P + G * C,)
    same = (owner[:, None] == owner) | (owner == 0)                                         # may i look at j at all?
    causal = torch.ones_like(same).tril()
    real = torch.cat([valid, mask.flatten(1).bool()], dim=1)                                # (B, P + G * C)
    looks = same & causal & real[:, None] | torch.eye(len(owner), dtype=torch.bool, device=device)
    start = batch["positions"].amax((0, 2))[:, None] + 1                                    # (B, 1)
    after = start + torch.arange(tokens, device=device).repeat(size)                        # (B, G * C)
    batch["ids"] = torch.cat([batch["ids"], completions.flatten(1)], dim=1)                 # (B, P + G * C)
    batch["positions"] = torch.cat([batch["positions"], after.expand(3, -1, -1)], dim=2)    # (3, B, P + G * C)

    # A completion's first token is predicted at the prompt's last column, the others one column before their own.
    at = length - 1 + torch.arange(size * tokens, device=device).view(size, tokens)         # (G, C)
    at[:, 0] = length - 1
    at = at + len(owner) * torch.arange(groups, device=device)[:, None, None]               # (B, G, C), flat
    chosen = mask.bool()
    scores = policy(**batch, mask=looks[:, None], at=at[chosen], targets=completions[chosen], temperature=temperature)
    return torch.zeros(mask.shape, dtype=scores.dtype, device=device).masked_scatter(chosen, scores)


def loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantage: Tensor, mask: Tensor, beta: float,
         completions: int) -> tuple[Tensor, Tensor]:
    """The negative of Eq. 4 and the KL in it, each a mean over a completion's tokens, then over completions.

    logp, old_logp, ref_logp, mask (B, G, C); advantage (B, G). `completions` is how many there are in the whole
    batch, over all micro-batches and processes, so that their losses and gradients add up. ref_logp None: no KL.
    """
    ratio = torch.exp(logp - old_logp)                                                      # (B, G, C)
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    per_token = ratio * advantage[..., None] - beta * kl                                    # Eq. 4
    share = mask / (mask.sum(-1, keepdim=True) * completions)
    return -(per_token * share).sum(), (kl * share).sum().detach()
