"""Attention for groups of completions that share a prompt, and for the vision tower's windows.

Tokens are packed without any padding into one sequence, all prompts first, then all completions,

    [prompt_1] ... [prompt_B] [o_11] ... [o_1G] ... [o_B1] ... [o_BG]

so that every layer that works token by token works on real tokens only. Attention is the one place where tokens meet:
a prompt sees itself, a completion sees its prompt and itself. So its cost grows with P^2 / 2 + G C (P + C / 2), not
with (P + G C)^2 as under one mask for all, which is never stored. On CPUs a completion's two softmaxes, over the prompt
and over itself, are merged by their log-sum-exp, so that the prompt's keys and values are read once for all G;
elsewhere sdpa gets them in G copies (and in fp32 makes a mask of C x (P + C)).

transformers' layers call `attention` through its registry of attention functions; what to do is told by the object
in place of a mask: `Packed` for whole sequences, `Decoding` for one new token a row. With any other mask it is
transformers' own sdpa.
"""
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MERGED = ("cpu",)       # devices on which a completion's two softmaxes are merged


class Packed:
    """Attention of B prompts and the completions of each, packed as above. With `keep`, keys and values stay."""

    def __init__(self, prompts: list[int], completions: list[list[int]] = (), keep: bool = False,
                 device: torch.device | str = "cpu"):
        """Lengths of the prompts, B of them, and of the completions of each, B times G."""
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        self.prompts, self.lengths = prompts, [*prompts, *map(sum, completions)]
        self.groups = []
        for lengths in completions:
            real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]              # (G, C)
            columns = (real.flatten().cumsum(0) - 1).clamp(min=0).to(device)        # (G * C,), any where not real
            self.groups.append((real.shape, columns, real.flatten().nonzero()[:, 0].to(device)))

    def attend(self, query: Float[Tensor, "1 heads N d"], key: Float[Tensor, "1 key_heads N d"],
               value: Float[Tensor, "1 key_heads N d"], scale: float, layer: int) -> Float[Tensor, "1 N heads d"]:
        """A layer's attention of all tokens, prompts and completions."""
        if self.kept is not None:
            self.kept[layer] = key, value
        sdpa = F.scaled_dot_product_attention
        parts = [x.split(self.lengths, 2) for x in (query, key, value)]                     # B prompts, then B groups
        out = [sdpa(*prompt, is_causal=True, scale=scale, enable_gqa=True)
               for prompt, _ in zip(zip(*parts), self.prompts)]
        for b, (shape, columns, real) in enumerate(self.groups, len(self.prompts)):
            prompt = [x[b - len(self.prompts)] for x in parts[1:]]
            if query.device.type in MERGED:
                out.append(Merged.apply(*(x[b] for x in parts), *prompt, shape, columns, real, scale))
                continue
            q, k, v = (x[b][0].index_select(1, columns).unflatten(1, shape).transpose(0, 1) for x in parts)
            k, v = (torch.cat([x.expand(shape[0], -1, -1, -1), own], 2) for x, own in zip(prompt, (k, v)))
            seen = sdpa(q, k, v, causal_lower_right(shape[1], k.shape[2]), scale=scale, enable_gqa=True)
            out.append(seen.transpose(0, 1).flatten(1, 2).index_select(1, real)[None])      # (1, heads, n, d)
        return torch.cat(out, 2).transpose(1, 2)


class Merged(torch.autograd.Function):
    """Attention of G completions, n tokens in all, to their prompt and each to itself, on a CPU: (1, heads, n, d).

    Softmax over both is the sum of the two attentions, each times exp(its log-sum-exp - that of both). Given the
    merged result and log-sum-exp, the backward pass of either part gives its share of the gradient exactly.
    """

    @staticmethod
    def forward(ctx, q: Float[Tensor, "1 heads n d"], k: Float[Tensor, "1 key_heads n d"],
                v: Float[Tensor, "1 key_heads n d"], keys: Float[Tensor, "1 key_heads P d"],
                values: Float[Tensor, "1 key_heads P d"], shape: tuple[int, int], columns: Int[Tensor, " GC"],
                real: Int[Tensor, " n"], scale: float) -> Float[Tensor, "1 heads n d"]:
        """shape: (G, C), C the longest; columns, real: which of the n each of G * C is, and back."""
        ctx.rest = shape, columns, real, scale
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        of_prompt, sum_prompt = flash(*shared(q, keys, values), scale=scale)            # (key heads, rep, n, d)
        of_own, sum_own = flash(*rows(q, k, v, shape, columns), is_causal=True, scale=scale)    # (G, heads, C, d)
        of_own, sum_own = (together(x, real) for x in (of_own, sum_own[..., None]))             # (1, heads, n, .)
        of_prompt, sum_prompt = of_prompt.reshape(q.shape), sum_prompt.reshape(sum_own.shape)
        out = torch.lerp(of_prompt, of_own, torch.sigmoid(sum_own - sum_prompt).to(q.dtype))
        ctx.save_for_backward(q, k, v, keys, values, out, torch.logaddexp(sum_own, sum_prompt))
        return out

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "1 heads n d"]) -> tuple[Tensor | None, ...]:
        q, k, v, keys, values, out, total = ctx.saved_tensors
        shape, columns, real, scale = ctx.rest
        key_heads = k.shape[1]
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_groups = lambda x: x.view(key_heads, -1, *x.shape[2:])                               # (key heads, rep, n, .)
        dq, *dkv = back(of_groups(grad), *shared(q, keys, values), of_groups(out), of_groups(total[..., 0]), 0.0, False,
                        scale=scale)
        of_prompt = [x.sum(1)[None] for x in dkv]                                               # (1, key heads, P, d)
        grad = grad[0].index_select(1, columns)
        if len(real) < len(columns):        # what is not real gets no gradient
            grad = torch.zeros_like(grad).index_copy_(1, real, grad.index_select(1, real))
        apart = lambda x: x.unflatten(1, shape).transpose(0, 1)                                 # (G, heads, C, .)
        out, total = (x[0].index_select(1, columns) for x in (out, total))
        total = apart(total)[..., 0].contiguous()
        own, *dkv = back(apart(grad), *rows(q, k, v, shape, columns), apart(out), total, 0.0, True, scale=scale)
        dk, dv = (together(x.unflatten(1, (key_heads, -1)).sum(2), real) for x in dkv)          # (1, key heads, n, d)
        return dq.reshape(q.shape) + together(own, real), dk, dv, *of_prompt, None, None, None, None


def shared(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1, heads, n, d) as (key heads, rep, n, d), and keys and values as large without a copy."""
    q = q.view(keys.shape[1], -1, *q.shape[2:])
    return q, *(x.transpose(0, 1).expand(-1, q.shape[1], -1, -1) for x in (keys, values))


def rows(q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], columns: Tensor) -> list[Tensor]:
    """(1, heads, n, d) a row apart, (G, heads, C, d); keys and values repeated for the heads that share them."""
    repeats = q.shape[1] // k.shape[1]
    parts = [x[0].index_select(1, columns).unflatten(1, shape).transpose(0, 1) for x in (q, k, v)]
    return [parts[0], *(x.repeat_interleave(repeats, 1) for x in parts[1:])]


def together(x: Tensor, real: Tensor) -> Tensor:
    """(G, heads, C, .) -> (1, heads, n, .)."""
    return x.transpose(0, 1).flatten(1, 2).index_select(1, real)[None]


class Decoding:
    """Attention of one new token a row to its prompt and to the row's earlier tokens; R rows a prompt.

    The prompts' keys and values are those that a `Packed` kept; the R rows of a prompt share them.
    """

    def __init__(self, packed: Packed, rows: int):
        self.rows, self.tokens = rows, 0
        lengths = torch.tensor(packed.prompts)
        beyond = torch.arange(int(lengths.max())) >= lengths[:, None]                           # (B, P) padding
        self.beyond = beyond.to(packed.kept[0][0].device) if beyond.any() else None
        self.prompts, self.own = {}, {}
        for layer, kept in packed.kept.items():
            parts = [x[0].transpose(0, 1).split(packed.prompts) for x in kept]                  # B of (P, heads, d)
            self.prompts[layer] = [pad_sequence(part, batch_first=True).transpose(1, 2) for part in parts]
            self.own[layer] = [x.new_zeros(len(lengths) * rows, x.shape[1], 64, x.shape[3]) for x in kept]

    def attend(self, query: Float[Tensor, "1 heads BR d"], key: Float[Tensor, "1 key_heads BR d"],
               value: Float[Tensor, "1 key_heads BR d"], scale: float, layer: int) -> Float[Tensor, "1 BR heads d"]:
        """A layer's attention of one new token a row."""
        keys, values = self.prompts[layer]                                                      # (B, key heads, P, d)
        (groups, heads, length, d), rows = keys.shape, self.rows
        if self.tokens == self.own[layer][0].shape[2]:
            self.own[layer] = [F.pad(x, (0, 0, 0, x.shape[2])) for x in self.own[layer]]
        for own, new in zip(self.own[layer], (key, value)):
            own[:, :, self.tokens] = new[0].transpose(0, 1)
        own_keys, own_values = (x[:, :, :self.tokens + 1] for x in self.own[layer])             # (B * R, heads, c, d)
        q = query[0].view(heads, -1, groups, rows, d).permute(2, 0, 3, 1, 4)                    # (B, heads, R, rep, d)
        repeats = q.shape[3]
        to_prompt = q.flatten(2, 3) @ keys.transpose(2, 3)                                      # (B, heads, R * rep, P)
        if self.beyond is not None:
            to_prompt = to_prompt.masked_fill(self.beyond[:, None, None], -torch.inf)
        by_row = lambda x: x.unflatten(2, (rows, repeats)).transpose(1, 2).flatten(0, 1)        # (B * R, heads, rep, .)
        to_own = q.transpose(1, 2).flatten(0, 1) @ own_keys.transpose(2, 3)
        weights = (torch.cat([by_row(to_prompt), to_own], 3) * scale).softmax(3, torch.float32).to(q.dtype)
        of_prompt = weights[..., :length].unflatten(0, (groups, rows)).transpose(1, 2).flatten(2, 3) @ values
        out = by_row(of_prompt) + weights[..., length:] @ own_values                            # (B * R, heads, rep, d)
        return out.flatten(1, 2)[None]

    def keep(self, groups: Int[Tensor, " kept"], rows: Int[Tensor, " chosen"]) -> None:
        """Go on with the prompts `groups` (B',) and, of the B * R rows so far, with `rows` (B' * R',)."""
        self.rows = len(rows) // len(groups)
        for layer in self.own:
            self.own[layer] = [x[rows] for x in self.own[layer]]
            if len(groups) < len(self.prompts[layer][0]):
                self.prompts[layer] = [x[groups] for x in self.prompts[layer]]
        if self.beyond is not None:
            self.beyond = self.beyond[groups]


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
              attention_mask: Packed | Decoding | Tensor | None, scaling: float,
              **kwargs) -> tuple[Tensor, None]:
    """What a decoder layer calls: by the object in place of the mask."""
    if isinstance(attention_mask, (Packed, Decoding)):
        return attention_mask.attend(query, key, value, scaling, module.layer_idx), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def windows(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_, scaling: float, cu_seq_lens_q: Tensor,
            **kwargs) -> tuple[Tensor, None]:
    """What a block of the vision tower calls: tokens (1, heads, N, d) -> (1, N, heads, d), each of the windows that
    end at `cu_seq_lens_q` seeing itself. Windows of one length run together: there are hundreds of them, but only a
    few lengths."""
    lengths = cu_seq_lens_q.diff()
    kinds, pieces = lengths.unique().tolist(), [query[0], key[0], value[0]]                     # (heads, N, d)
    order = None
    if len(kinds) > 1:      # bring windows of one length together
        order = lengths.repeat_interleave(lengths).argsort(stable=True)
        pieces = [x.index_select(1, order) for x in pieces]
    counts = [int((lengths == kind).sum()) for kind in kinds]
    split = [x.split([n * kind for n, kind in zip(counts, kinds)], 1) for x in pieces]
    out = []
    for n, kind, q, k, v in zip(counts, kinds, *split):
        q, k, v = (x.unflatten(1, (n, kind)).transpose(0, 1) for x in (q, k, v))                # (n, heads, kind, d)
        out.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    out = torch.cat(out)                                                                        # (N, heads, d)
    return (out if order is None else out.index_select(0, order.argsort()))[None], None


# "flash" in the name: transformers then hands over all windows at once, with their ends, instead of one by one.
TEXT, VISION = "shared_prefix", "flash_like_windows"
AttentionInterface.register(TEXT, attention)
AttentionInterface.register(VISION, windows)
AttentionMaskInterface.register(TEXT, sdpa_mask)
