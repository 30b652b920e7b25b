"""Group relative policy optimisation: advantages (Eq. 3), loss (Eq. 4), rollouts, log-probabilities, the update.

A group is G completions of one prompt, and the prompt is mostly video. So the prompt is computed once wherever it
appears:

- `sample` runs the prompts once, then samples B * G rows in one loop; the G rows of a prompt share its keys and
  values, and rows that have stopped are dropped (engine/sampling.py);
- `logprobs` scores one packed sequence of all prompts and all their completions, without padding. Each completion sees
  its prompt and itself (engine/attention.py), and its positions continue from the prompt's end, so every token gets
  the same log-probability and gradient as in a sequence of its own.

In shapes: B prompts, G completions per prompt, C tokens of the longest completion.

Choices that the paper leaves open, or departures from it:
1. std is the unbiased one, with 1e-4 added, as in the authors' code; or none (Dr. GRPO).
2. KL is the k3 estimator, exp(ref - lp) - (ref - lp) - 1: unbiased, never negative.
3. The loss is the mean over a completion's tokens, then over completions (Eq. 3 sums over the group; the factor G
   belongs to the learning rate), as GRPO was published; or the mean over all tokens of the batch (bnpo), or their sum
   over a constant (dr_grpo).
4. The ratio is clipped as in PPO, which the paper leaves out for simplicity. With one update per rollout pi_old is pi
   itself, the ratio is 1 and nothing is clipped; the ratio stays in the loss because its gradient is the policy
   gradient.
5. A batch in which all rewards of each group are equal makes no update: Adam would take a step of full size on the
   tiny gradient of the KL term.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from engine import lora
from engine.attention import Packed
from engine.distributed import full_norm, gather, gathered
from engine.files import not_finite
from engine.sampling import draw_token, rows_to_keep
from model import Policy, Prompt, pack, see

MAX_GRAD_NORM = 1.0     # longer gradients are cut to this length, the usual value


def advantages(rewards: Float[Tensor, "*B G"], scale: bool = True) -> Float[Tensor, "*B G"]:
    """Rewards normalised within their group (Eq. 3); without `scale` only their mean is subtracted. A group whose
    rewards are all equal gets zeros."""
    # so that equal rewards become exactly 0: in fp32 the mean of equal numbers may differ from them
    rewards = rewards - rewards[..., :1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    if not scale:
        return centred
    return centred / (rewards.std(-1, keepdim=True) + 1e-4)


def loss(logprobs: Float[Tensor, "B G C"], old_logprobs: Float[Tensor, "B G C"],
         ref_logprobs: Float[Tensor, "B G C"] | None, advantages: Float[Tensor, "B G"],
         mask: Int[Tensor, "B G C"], beta: float, num_completions: int,
         normalizer: float | None = None, epsilon: float = math.inf,
         ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """(loss, KL, clip fraction): the negative of Eq. 4, the KL in it, and the share of tokens whose gain is clipped.

    Each is a mean over a completion's tokens, then over completions. `num_completions` is the number of completions of
    the whole batch, all micro-batches and processes together, so that losses and gradients of micro-batches add up.
    With a `normalizer` the loss (but not KL and clip fraction) is the sum over all tokens divided by `normalizer`: the
    number of tokens of the whole batch (bnpo), or num_completions times the longest completion (dr_grpo). Without
    ref_logprobs there is no KL.
    """
    advantages = advantages[..., None]                              # (B, G, 1)
    ratio = torch.exp(logprobs - old_logprobs)                      # (B, G, C)
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon)
    gain = ratio * advantages
    clipped_gain = clipped_ratio * advantages

    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        log_ratio = ref_logprobs - logprobs
        kl = torch.exp(log_ratio) - log_ratio - 1

    objective = torch.minimum(gain, clipped_gain) - beta * kl           # Eq. 4, per token

    completion_length = mask.sum(-1, keepdim=True)                  # (B, G, 1)
    weight = mask / (completion_length * num_completions)           # (B, G, C), its sum is 1
    loss_weight = weight if normalizer is None else mask / normalizer
    mean_loss = -(objective * loss_weight).sum()
    mean_kl = (kl * weight).sum().detach()
    clip_fraction = ((clipped_gain < gain) * weight).sum()
    return mean_loss, mean_kl, clip_fraction


@dataclass(frozen=True)
class Rollouts:
    prompts: list[Prompt]               # B; with video_embeds where the vision tower is frozen
    completions: Int[Tensor, "B G C"]   # token ids; 0 after the end
    mask: Int[Tensor, "B G C"]          # 1 up to and including the stop token
    logprobs: Float[Tensor, "B G C"]    # of each token as it was sampled; 0 after the end

    def split(self, size: int) -> list["Rollouts"]:
        """Micro-batches of `size` prompts; each is as long as its own longest completion."""
        parts = []
        for i in range(0, len(self.prompts), size):
            chosen = slice(i, i + size)
            longest = int(self.mask[chosen].sum(-1).max())
            tensors = (self.completions, self.mask, self.logprobs)
            parts.append(Rollouts(self.prompts[chosen],
                                  *(tensor[chosen, :, :longest] for tensor in tensors)))
        return parts


def join(parts: list[Rollouts]) -> Rollouts:
    """Micro-batches as one; shorter ones are padded with 0."""
    longest = max(part.mask.shape[-1] for part in parts)

    def padded(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(tensor, (0, longest - tensor.shape[-1])) for tensor in tensors])

    prompts = [prompt for part in parts for prompt in part.prompts]
    return Rollouts(prompts, padded("completions"), padded("mask"), padded("logprobs"))


def rollout(policy: Policy, prompts: list[Prompt], group_size: int,
            generators: list[torch.Generator],
            stop_ids: list[int], max_tokens: int, temperature: float = 1.0,
            micro_batch_size: int = 0) -> Rollouts:
    """`sample` for training: in micro-batches of so many prompts (0: all at once), and with sharded weights gathered,
    so that processes sample different lengths without waiting for each other."""
    size = micro_batch_size or len(prompts)
    parts = []
    with gathered(policy):
        for i in range(0, len(prompts), size):
            parts.append(sample(policy, prompts[i:i + size], group_size, max_tokens, stop_ids,
                                generators[i:i + size], temperature))
    return join(parts)


@torch.no_grad()
def sample(policy: Policy, prompts: list[Prompt], group_size: int, max_tokens: int,
           stop_ids: list[int],
           generators: list[torch.Generator] | None = None, temperature: float = 1.0) -> Rollouts:
    """Sample G completions of each of B prompts, or decode greedily when there are no `generators`.

    A prompt's completions depend on its own generator (one per prompt, on the CPU) and not on what else is in the
    batch. A completion ends with the first of `stop_ids`, or unfinished after `max_tokens`.
    """
    seen = see(policy, prompts)
    batch = pack(policy, seen)
    device, num_rows = batch["input_ids"].device, len(prompts) * group_size
    lengths = [len(prompt.input_ids) for prompt in seen]
    packed = Packed(lengths, keep=True, device=device)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1       # (B,)
    logits = policy.logits(**batch, layout=packed, at=ends, temperature=temperature)
    logits = logits.repeat_interleave(group_size, 0)                # (B * G, V)
    start = first_positions(seen).to(device).repeat_interleave(group_size)
    decoding = policy.start_decoding(packed, group_size, start, max_tokens)
    uniform = None
    if generators is not None:
        draws = [torch.rand(group_size, max_tokens, generator=generator)
                 for generator in generators]
        uniform = torch.cat(draws).to(device)                       # (B * G, max_tokens)

    completions = torch.zeros(num_rows, max_tokens, dtype=torch.long, device=device)
    mask = torch.zeros_like(completions)
    logprobs = torch.zeros(num_rows, max_tokens, device=device)
    stop = torch.tensor(stop_ids, device=device)
    # rows that are still computed, the same number for each prompt
    row = torch.arange(num_rows, device=device)
    # which of these have not stopped
    running = torch.ones(num_rows, dtype=torch.bool, device=device)
    for c in range(max_tokens):
        token = draw_token(logits, None if uniform is None else uniform[row, c]) * running
        logprob = logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1).float()
        completions[row, c] = token
        mask[row, c] = running.long()
        logprobs[row, c] = logprob.masked_fill(~running, 0)
        running = running & ~torch.isin(token, stop)
        if c + 1 == max_tokens or not running.any():
            break
        to_keep = rows_to_keep(running.view(-1, decoding.rows))
        if to_keep is not None:
            kept_prompts, kept_rows = to_keep
            decoding.keep(kept_prompts, kept_rows)
            row, running, token = row[kept_rows], running[kept_rows], token[kept_rows]
        logits = policy.next_logits(decoding, token, temperature)
    shape = len(prompts), group_size, max_tokens
    tensors = [tensor.view(shape)[..., :c + 1] for tensor in (completions, mask, logprobs)]
    return Rollouts(seen if policy.vision_is_frozen else prompts, *tensors)


def first_positions(prompts: list[Prompt]) -> Int[Tensor, " B"]:
    """The position behind each prompt, where its completions begin."""
    return torch.stack([prompt.position_ids.max() + 1 for prompt in prompts])


def logprobs(policy: Policy, prompts: list[Prompt], completions: Int[Tensor, "B G C"],
             mask: Int[Tensor, "B G C"], temperature: float = 1.0) -> Float[Tensor, "B G C"]:
    """log pi(o_t | prompt, o_<t) of completions; 0 where the mask is 0, which it may be only after a completion's end.
    Logits are made only where the mask is 1.
    """
    batch = pack(policy, prompts)
    lengths = [len(prompt.input_ids) for prompt in prompts]
    device = batch["input_ids"].device
    completions, is_token = completions.to(device), mask.to(device).bool()
    layout = Packed(lengths, mask.sum(-1).tolist(), device=device)
    targets = completions[is_token]                                 # (n,), all groups'
    start = first_positions(prompts).to(device)
    positions = start[:, None, None] + torch.arange(mask.shape[-1], device=device)  # (B, 1, C)
    positions = positions.expand(mask.shape)[is_token].expand(3, -1)  # (3, n), as text has them
    batch["input_ids"] = torch.cat([batch["input_ids"], targets])   # (N,)
    batch["position_ids"] = torch.cat([batch["position_ids"], positions], dim=1)  # (3, N)

    # The first token of a completion is predicted at the last token of the prompt, every other one
    # at the token before it.
    before = torch.zeros_like(completions)                          # (B, G, C)
    before[is_token] = torch.arange(len(targets), device=device) + sum(lengths) - 1
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1       # (B,)
    before[..., 0] = ends[:, None]
    scores = policy.logprobs(**batch, layout=layout, at=before[is_token], targets=targets,
                             temperature=temperature)               # (n,)
    zeros = torch.zeros(mask.shape, dtype=scores.dtype, device=device)
    return zeros.masked_scatter(is_token, scores)


def loss_normalizer(loss_type: str, num_completions: int, num_tokens: int,
                    max_tokens: int) -> float | None:
    """By what the sum over all tokens of the batch is divided; None: the mean of each completion comes first."""
    if loss_type == "grpo":
        return None
    return {"bnpo": num_tokens, "dr_grpo": num_completions * max_tokens}[loss_type]


def update(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
           rollouts: Rollouts, advantages: Float[Tensor, "B G"], *, beta: float, loss_type: str,
           epsilon: float, max_tokens: int, num_iterations: int, temperature: float,
           micro_batch_size: int) -> dict[str, float | None]:
    """`num_iterations` AdamW steps on the loss (Eq. 3, 4) of the rollouts of all processes; returns the metrics of the
    last one. A step with a metric that is not finite is not taken, and neither are the steps after it. All processes
    see the same metrics, so all stop at the same step. Without a reference there is no KL term; `max_tokens` is the
    longest completion of dr_grpo."""
    counts = gather([(advantages.numel(), int(rollouts.mask.sum()), bool(advantages.any()))])
    num_completions, num_tokens, num_learning = (sum(column) for column in zip(*counts))
    metrics = {"updates": 0, "grad_norm": 0.0,
               **dict.fromkeys(("loss", "kl", "clipped", "mismatch"))}
    if num_learning == 0:                   # departure 5
        return metrics
    normalizer = loss_normalizer(loss_type, num_completions, num_tokens, max_tokens)
    size = micro_batch_size or len(rollouts.prompts)
    micro_batches = rollouts.split(size)
    advantages = advantages.to(rollouts.mask.device).split(size)

    def score(model: Policy, part: Rollouts) -> Float[Tensor, "B G C"]:
        return logprobs(model, part.prompts, part.completions, part.mask, temperature)

    ref_logprobs = [None] * len(micro_batches)
    if reference is not None:
        with torch.no_grad(), lora.reference(reference):
            ref_logprobs = [score(reference, part) for part in micro_batches]
    old_logprobs = []                       # of pi_old, the policy before the first update
    for iteration in range(num_iterations):
        sums = torch.zeros(4)
        for i, part in enumerate(micro_batches):
            new_logprobs = score(policy, part)                      # (B, G, C)
            if iteration == 0:
                old_logprobs.append(new_logprobs.detach())
            mean_loss, kl, clip_fraction = loss(
                new_logprobs, old_logprobs[i], ref_logprobs[i], advantages[i], part.mask, beta,
                num_completions, normalizer, epsilon)
            # FSDP averages gradients over the processes; the loss wants their sum
            (mean_loss * len(counts)).backward()
            mismatch = (old_logprobs[i] - part.logprobs).abs().sum()
            sums += torch.stack([mean_loss.detach(), kl, clip_fraction, mismatch]).cpu()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        totals = [sum(column) for column in zip(*gather([sums.tolist()]))]
        metrics |= zip(("loss", "kl", "clipped", "mismatch"), totals)
        metrics["mismatch"] /= num_tokens
        metrics["grad_norm"] = full_norm(grad_norm)
        if not_finite(metrics):
            break
        optimizer.step()
        optimizer.zero_grad()
        metrics["updates"] = iteration + 1
    optimizer.zero_grad()
    return metrics
