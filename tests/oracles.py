"""The plain forms that this project's fast forms have to equal, the published losses, and models of random shapes.

`distributions` is the plain form of scoring and of sampling: every completion stands in a sequence of its own, behind
its own copy of the prompt and the video, and goes through transformers' own forward pass. A sampled completion is right
when each of its tokens is what its random number draws from the distribution behind the tokens before it.
"""
import random

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import model


def distributions(qwen, prompt, completions, forbidden, temperature=1.0):
    """Log-softmax (G, C, V) from which each token of completions (G, C) came. At the end of a shorter completion are
    tokens that nothing reads."""
    rows, longest = completions.shape
    start = prompt.position_ids.max() + 1
    positions = torch.cat([prompt.position_ids, (start + torch.arange(longest)).expand(3, -1)], 1)
    ids = torch.cat([prompt.input_ids.expand(rows, -1), completions], 1)                # (G, P + C)
    logits = qwen(input_ids=ids, attention_mask=torch.ones_like(ids),
                  position_ids=positions[:, None].expand(-1, rows, -1),
                  pixel_values_videos=prompt.pixel_values_videos.repeat(rows, 1).to(qwen.dtype),
                  video_grid_thw=prompt.video_grid_thw.expand(rows, -1)).logits
    logits = logits[:, len(prompt.input_ids) - 1:-1] / temperature                      # (G, C, V)
    return logits.index_fill(-1, torch.tensor(forbidden), -torch.inf).log_softmax(-1)


def repeated_logprobs(policy, prompts, completions, mask, temperature=1.0, qwen=None):
    """What grpo.logprobs gives, (B, G, C), by the policy's model or by another one."""
    scores = []
    for prompt, rows in zip(prompts, completions, strict=True):
        logprobs = distributions(qwen or policy.qwen, prompt, rows, policy.forbidden, temperature)
        scores.append(logprobs.gather(-1, rows[..., None])[..., 0])
    return torch.stack(scores).masked_fill(mask == 0, 0)


def published_loss(loss_type, logprobs, old, ref, advantages, lengths, beta, epsilon, max_tokens):
    """(loss, KL, clip fraction) of completions (B, G, C) of the given lengths (B, G).

    GRPO: the mean over i of 1/|o_i| sum_t; token-level: 1/sum |o_i| sum_it; Dr. GRPO: the mean over i of
    1/max_tokens sum_t. The gain is PPO's: beyond 1 + epsilon a ratio earns a positive advantage no more, below
    1 - epsilon it costs a negative one no more."""
    mask = torch.arange(logprobs.shape[-1]) < lengths[..., None]                        # (B, G, C)
    ratio = (logprobs - old).exp()
    k3 = (ref - logprobs).exp() - (ref - logprobs) - 1
    is_good = advantages[..., None] > 0
    bounded = torch.where(is_good, ratio.clamp(max=1 + epsilon), ratio.clamp(min=1 - epsilon))
    losses = ((beta * k3 - bounded * advantages[..., None]) * mask).sum(-1)                 # (B, G)
    loss = {"grpo": (losses / lengths).mean(), "bnpo": losses.sum() / lengths.sum(),
            "dr_grpo": (losses / max_tokens).mean()}[loss_type]
    kl, clip_fraction = (((x * mask).sum(-1) / lengths).mean() for x in (k3, bounded != ratio))
    return loss, kl.detach(), clip_fraction


def random_policy(seed=0, heads=(4, 2), layers=2, vocabulary=90, tied=True, dtype=torch.float64):
    """A policy with random weights and `heads`: attention heads and key heads of width 16. Weights are large enough for
    what the decoder reads to matter."""
    query_heads, key_heads = heads
    width = 16 * query_heads
    ids = {"vision_start_token_id": 86, "vision_end_token_id": 87,
           "image_token_id": 88, "video_token_id": 89}
    text = dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
                num_hidden_layers=layers, num_attention_heads=query_heads,
                num_key_value_heads=key_heads, max_position_embeddings=512,
                bos_token_id=None, eos_token_id=None, tie_word_embeddings=tied,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    vision = dict(depth=1, hidden_size=32, num_heads=4, intermediate_size=64, out_hidden_size=width,
                  fullatt_block_indexes=[], tokens_per_second=2)
    torch.manual_seed(seed)
    qwen = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids))
    for module in qwen.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    nn.init.normal_(qwen.get_input_embeddings().weight, std=width ** -0.5)
    if not tied:
        nn.init.normal_(qwen.lm_head.weight, std=width ** -0.5)
    for layer in qwen.model.language_model.layers:
        attention = layer.self_attn
        for weight in (layer.input_layernorm.weight, layer.post_attention_layernorm.weight,
                       attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias):
            nn.init.normal_(weight)
    return model.Policy(qwen.to(dtype), [88, 89])


def random_prompts(count, seed=0):
    """Prompts of different lengths for a `random_policy`: random text and patches, videos of different sizes."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(count):
        grid = torch.tensor([rng.randint(1, 3), 2 * rng.randint(1, 2), 2])
        before = torch.randint(86, (rng.randint(3, 9),), generator=generator)
        after = torch.randint(86, (rng.randint(3, 9),), generator=generator)
        pads = torch.full((int(grid.prod()) // 4,), 89)
        ids = torch.cat([before, pads, after])
        patches = torch.randn(4 * len(pads), 1176, generator=generator)
        prompts.append(model.Prompt(ids, model.place(ids, 89, grid, 1.0, 2), patches, grid))
    return prompts
