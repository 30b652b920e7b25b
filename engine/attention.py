"""Attention for groups of completions that share a prompt, and for the vision tower's windows.

Tokens are packed without any padding into one sequence, all prompts first, then all completions,

    [prompt_1] ... [prompt_B] [o_11] ... [o_1G] ... [o_B1] ... [o_BG]

so that every layer that works token by token works on real tokens only. Attention is the one place where tokens meet:
a prompt sees itself, a completion sees its prompt and itself. So the cost of attention grows with
P^2 / 2 + G C (P + C / 2), not with (P + G C)^2 as it would under one mask for the whole sequence; that mask is never
made. The G completions of a prompt are a batch for sdpa, in which the prompt's keys and values stand G times.

transformers' layers call `attention` through transformers' registry of attention functions. A `Packed` in place of the
mask says which tokens see which; with any other mask, `attention` is transformers' own sdpa.
"""
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class Packed:
    """Attention of B prompts and the completions of each, packed as above. With `keep`, keys and values stay."""

    def __init__(self, prompts: list[int], completions: list[list[int]] = (), keep: bool = False,
                 device: torch.device | str = "cpu"):
        """Lengths of the B prompts, and of the G completions of each of them."""
        self.kept = {} if keep else None        # layer: its keys and values
        self.prompts = prompts
        self.lengths = [*prompts, *map(sum, completions)]
        # per prompt: (G, C), and how its n completion tokens lie in a matrix of that shape
        self.groups = []
        for lengths in completions:
            is_token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (G, C)
            # the token at each place of the matrix; behind a short completion any token, which
            # nothing reads
            token_at = (is_token.flatten().cumsum(0) - 1).clamp(min=0)  # (G * C,)
            place_of = is_token.flatten().nonzero()[:, 0]           # (n,)
            self.groups.append((is_token.shape, token_at.to(device), place_of.to(device)))

    def attend(self, query: Float[Tensor, "1 heads N d"], key: Float[Tensor, "1 key_heads N d"],
               value: Float[Tensor, "1 key_heads N d"], scale: float,
               layer: int) -> Float[Tensor, "1 N heads d"]:
        """One layer's attention of all tokens, prompts and completions."""
        if self.kept is not None:
            self.kept[layer] = key, value
        # B prompts, then B groups
        queries, keys, values = (x.split(self.lengths, 2) for x in (query, key, value))
        outputs = []
        for b in range(len(self.prompts)):
            outputs.append(F.scaled_dot_product_attention(
                queries[b], keys[b], values[b], is_causal=True, scale=scale,
                enable_gqa=True))                                   # (1, heads, P, d)
        for b, layout in enumerate(self.groups):
            group = b + len(self.prompts)
            outputs.append(attend_to_prompt(
                queries[group], keys[group], values[group], keys[b], values[b], layout, scale))
        return torch.cat(outputs, 2).transpose(1, 2)


def attend_to_prompt(q: Float[Tensor, "1 heads n d"], k: Float[Tensor, "1 key_heads n d"],
                     v: Float[Tensor, "1 key_heads n d"],
                     prompt_keys: Float[Tensor, "1 key_heads P d"],
                     prompt_values: Float[Tensor, "1 key_heads P d"], layout: tuple,
                     scale: float) -> Float[Tensor, "1 heads n d"]:
    """Attention of the G completions of one prompt, n tokens in all, each to the prompt and to itself."""
    shape, token_at, place_of = layout
    apart = [x[0].index_select(1, token_at).unflatten(1, shape).transpose(0, 1) for x in (q, k, v)]
    q, k, v = apart                                                 # (G, heads, C, d)
    k = torch.cat([prompt_keys.expand(len(k), -1, -1, -1), k], 2)   # (G, key_heads, P + C, d)
    v = torch.cat([prompt_values.expand(len(v), -1, -1, -1), v], 2)
    mask = causal_lower_right(q.shape[2], k.shape[2])   # the last query sees all keys
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return out.transpose(0, 1).flatten(1, 2).index_select(1, place_of)[None]  # (1, heads, n, d)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
              attention_mask: Packed | Tensor | None,
              scaling: float, **kwargs) -> tuple[Tensor, None]:
    """What a decoder layer calls; `attention_mask` decides."""
    if hasattr(attention_mask, "attend"):
        return attention_mask.attend(query, key, value, scaling, module.layer_idx), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                  **kwargs)


def windows(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_, scaling: float,
            cu_seq_lens_q: Tensor, **kwargs) -> tuple[Tensor, None]:
    """What a block of the vision tower calls: tokens (1, heads, N, d) -> (1, N, heads, d). The tokens of each of the
    windows that end at `cu_seq_lens_q` see each other. There are hundreds of windows, but only a few lengths, so the
    windows of one length run together."""
    lengths = cu_seq_lens_q.diff()                                  # (windows,)
    different_lengths = lengths.unique().tolist()
    qkv = [query[0], key[0], value[0]]                              # (heads, N, d) each
    order = None
    if len(different_lengths) > 1:      # bring windows of one length together
        order = lengths.repeat_interleave(lengths).argsort(stable=True)  # (N,)
        qkv = [x.index_select(1, order) for x in qkv]
    counts = [int((lengths == length).sum()) for length in different_lengths]
    sizes = [count * length for count, length in zip(counts, different_lengths)]
    outputs = []
    for count, length, *parts in zip(counts, different_lengths, *(x.split(sizes, 1) for x in qkv)):
        # (count, heads, length, d)
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))           # (count * length, heads, d)
    out = torch.cat(outputs)                                        # (N, heads, d)
    if order is not None:
        out = out.index_select(0, order.argsort())
    return out[None], None


# "flash" in the name: transformers then hands over all windows at once, with their ends, instead of
# one by one.
TEXT, VISION = "shared_prefix", "flash_like_windows"
AttentionInterface.register(TEXT, attention)
AttentionInterface.register(VISION, windows)
AttentionMaskInterface.register(TEXT, sdpa_mask)
