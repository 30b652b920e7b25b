"""Group relative policy optimisation as plain functions: advantages and loss (Eq. 3, 4), rollouts, log-probabilities.

A group is G completions of one prompt, and the prompt is mostly video. So the prompt is computed once wherever it
appears:

- `rollout` runs the prompts once, then samples B * G rows in one loop; the G rows of a prompt share its keys and
  values, and rows that have stopped are dropped;
- `logprobs` scores one packed sequence of all prompts and all their completions, without padding. Each completion sees
  its prompt and itself (engine/attention.py), and its positions continue from the prompt's end, so every token gets
  the same log-probability and gradient as in a sequence of its own.

Choices the paper leaves open, or departures from it:
1. std is the unbiased one, with 1e-4 added, as in the authors' code; or none (Dr. GRPO).
2. KL is the k3 estimator, exp(ref - lp) - (ref - lp) - 1: unbiased, never negative.
3. The loss is the mean over a completion's tokens, then over completions (Eq. 3 sums over the group; the factor G
   is the learning rate's), as GRPO was published; or the mean over all tokens of the batch (bnpo), or their sum over a
   constant (dr_grpo).
4. The ratio is clipped as in PPO, which the paper leaves out for simplicity. With one update a rollout pi_old is pi
   itself, the ratio is 1 and there is nothing to clip; the ratio stays in the loss because its gradient is the policy
   gradient.
"""
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import Packed
from engine.sampling import draw_token, rows_to_keep
from model import Policy, Prompt, pack, see


def advantages(rewards: Float[Tensor, "*B G"], scale: bool = True) -> Float[Tensor, "*B G"]:
    """Rewards normalised within their group (Eq. 3), without `scale` less its mean only. A group whose rewards are all
    equal gets zeros."""
    rewards = rewards - rewards[..., :1]    # so that equal ones are 0 exactly: their fp32 mean may differ from them
    above = rewards - rewards.mean(-1, keepdim=True)
    return above / (rewards.std(-1, keepdim=True) + 1e-4) if scale else above


def loss(logp: Float[Tensor, "B G C"], old_logp: Float[Tensor, "B G C"], ref_logp: Float[Tensor, "B G C"] | None,
         advantage: Float[Tensor, "B G"], mask: Int[Tensor, "B G C"], beta: float, total: int,
         tokens: float | None = None, clip: float = math.inf,
         ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """The negative of Eq. 4, the KL in it, and the share of its tokens whose gain is clipped, each a mean over a
    completion's tokens, then over completions.

    `total` is how many completions there are in the whole batch, over all passes and processes, so that their losses
    and gradients add up. With `tokens` the loss alone is the sum over all tokens divided by that: by the tokens of the
    whole batch (bnpo), or by `total` times the longest completion (dr_grpo). ref_logp None: no KL.
    """
    ratio = torch.exp(logp - old_logp)                                                      # (B, G, C)
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    gain, least = (r * advantage[..., None] for r in (ratio, ratio.clamp(1 - clip, 1 + clip)))
    per_token = torch.minimum(gain, least) - beta * kl                                      # Eq. 4
    share = mask / (mask.sum(-1, keepdim=True) * total)
    weight = share if tokens is None else mask / tokens
    return -(per_token * weight).sum(), (kl * share).sum().detach(), ((least < gain) * share).sum()


@dataclass(frozen=True)
class Rollouts:
    completions: Int[Tensor, "B G C"]   # token ids; 0 after the end
    mask: Int[Tensor, "B G C"]          # 1 up to and including the stop token
    logprobs: Float[Tensor, "B G C"]    # log-probability of each token as it was sampled; 0 after the end


@torch.no_grad()
def rollout(policy: Policy, prompts: list[Prompt], group_size: int, max_tokens: int, stop_ids: list[int],
            generators: list[torch.Generator] | None = None, temperature: float = 1.0) -> Rollouts:
    """Sample G completions of each of B prompts, or decode greedily when there are no `generators`.

    A prompt's completions depend on its own generator (one a prompt, on the CPU) and not on what else is in the
    batch. A completion ends with the first of `stop_ids`, or unfinished after `max_tokens`.
    """
    prompts = see(policy, prompts)
    batch, lengths = pack(policy, prompts), [len(p.ids) for p in prompts]
    device, rows = batch["ids"].device, len(prompts) * group_size
    layout = Packed(lengths, keep=True, device=device)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    logits = policy.logits(**batch, layout=layout, at=ends, temperature=temperature).repeat_interleave(group_size, 0)
    start = torch.stack([p.positions.max() + 1 for p in prompts]).to(device).repeat_interleave(group_size)
    step = policy.start_decoding(layout, group_size, start, max_tokens)
    uniform = None
    if generators is not None:
        uniform = torch.cat([torch.rand(group_size, max_tokens, generator=g) for g in generators]).to(device)
    completions = torch.zeros(rows, max_tokens, dtype=torch.long, device=device)            # (B * G, C)
    mask, logprobs = torch.zeros_like(completions), torch.zeros(rows, max_tokens, device=device)
    stop = torch.tensor(stop_ids, device=device)
    row = torch.arange(rows, device=device)     # rows that are still computed, as many of each prompt
    running = torch.ones(rows, dtype=torch.bool, device=device)                             # of these
    for c in range(max_tokens):
        token = draw_token(logits, None if uniform is None else uniform[row, c]) * running
        completions[row, c], mask[row, c] = token, running.long()
        logprob = logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1).float()
        logprobs[row, c] = logprob.masked_fill(~running, 0)
        running = running & ~torch.isin(token, stop)
        if c + 1 == max_tokens or not running.any():
            break
        kept = None if step.fixed else rows_to_keep(running.view(-1, step.rows))
        if kept is not None:
            groups, chosen = kept
            step.keep(groups, chosen)
            row, running, token = row[chosen], running[chosen], token[chosen]
        logits = policy.next_logits(step, token, temperature)
    return Rollouts(*(x[:, :c + 1].view(len(prompts), group_size, c + 1) for x in (completions, mask, logprobs)))


def logprobs(policy: Policy, prompts: list[Prompt], completions: Int[Tensor, "B G C"], mask: Int[Tensor, "B G C"],
             temperature: float = 1.0) -> Float[Tensor, "B G C"]:
    """log pi(o_t | prompt, o_<t) of completions, 0 where the mask is 0, as it may be only behind a completion's end.
    Logits only where the mask is 1.
    """
    batch, lengths, sizes = pack(policy, prompts), [len(p.ids) for p in prompts], mask.sum(-1)      # sizes (B, G)
    device = batch["ids"].device
    completions, chosen = completions.to(device), mask.to(device).bool()
    layout = Packed(lengths, sizes.tolist(), device=device)
    after = torch.stack([p.positions.max() + 1 for p in prompts]).to(device)                # (B,)
    after = (after[:, None, None] + torch.arange(mask.shape[-1], device=device)).expand(mask.shape)[chosen]
    targets = completions[chosen]                                                           # (n,), all groups'
    batch["ids"] = torch.cat([batch["ids"], targets])                                       # (N,)
    batch["positions"] = torch.cat([batch["positions"], after.expand(3, -1)], dim=1)        # (3, N)

    # A completion's first token is predicted behind the prompt, the others behind the token before them.
    before = torch.zeros_like(completions)
    before[chosen] = torch.arange(len(targets), device=device) + sum(lengths) - 1
    before[..., 0] = torch.tensor(lengths, device=device).cumsum(0)[:, None] - 1
    scores = policy.logprobs(**batch, layout=layout, at=before[chosen], targets=targets, temperature=temperature)
    return torch.zeros(mask.shape, dtype=scores.dtype, device=device).masked_scatter(chosen, scores)
