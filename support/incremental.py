"""One new token a row: what `Policy.hidden` computes with a `Decoding`, in as few kernels as PyTorch's operators allow.

A token of a deep model costs tens of milliseconds of Python and kernel launches, whatever the arithmetic. So here the
decoder's layers are gone through without transformers' code:

- rotary tables of all positions are made once a rollout; queries and keys are rotated together, in place;
- keys and values go into a buffer in place, the prompt's and the row's own scores into one that a step makes once;
- the scale is a factor of the product, the residual its summand, and a norm one operator (six kernels on a CPU).

`Static` has shapes that never change, for torch.compile and on a GPU captured graphs.

Linear modules are called, not read, so that what is put around them (LoRA) counts; only a plain nn.Linear is fused
with its residual. Under FSDP the weights have to be gathered already, as they are behind the prompts' own pass inside
sharding.gathered: no hook runs here.
"""
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from support.attention import Packed

ROOM = 64       # tokens that a row's buffer has room for at first


def norm(module: nn.Module, x: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
    """transformers' RMS norm as one operator."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def add_product(x: Float[Tensor, "n H"], linear: nn.Module, y: Float[Tensor, "n I"]) -> Float[Tensor, "n H"]:
    """x + linear(y)."""
    if type(linear) is nn.Linear and linear.bias is None:
        return torch.addmm(x, y, linear.weight.t())
    return x + linear(y)


class Step:
    """The state of B prompts with R rows of completions each; a call goes on by one token a row."""

    def __init__(self, decoder: nn.Module, packed: Packed, rows: int, start: Int[Tensor, " BR"], most: int):
        """`decoder`: transformers' language model. `packed` kept the prompts' keys and values, and gives them up.
        `start`: the first position behind each row's prompt. `most`: new tokens a row at most."""
        self.decoder, self.rows, self.tokens, self.most = decoder, rows, 0, most
        lengths = torch.tensor(packed.prompts)
        first = packed.kept[0][0]                                                               # (1, key heads, N, d)
        width = self.width(int(lengths.max()))
        beyond = torch.arange(width) >= lengths[:, None]                                        # (B, P) padding
        self.bias = None        # (B, 1, P), added to the scores: 0 or -inf
        if beyond.any():
            self.bias = torch.zeros(beyond.shape, dtype=first.dtype).masked_fill(beyond, -torch.inf)[:, None]
            self.bias = self.bias.to(first.device)
        self.prompts, self.own = [], []     # of each layer (2, B, key heads, P or room, d), keys and values
        for layer in range(len(decoder.layers)):
            parts = [x[0].transpose(0, 1).split(packed.prompts) for x in packed.kept.pop(layer)]    # B of (P, heads, d)
            both = torch.stack([pad_sequence(part, batch_first=True).transpose(1, 2) for part in parts])
            self.prompts.append(F.pad(both, (0, 0, 0, width - both.shape[3])))
            self.own.append(first.new_zeros(2, len(lengths), first.shape[1], rows, self.room(most), first.shape[3]))
        self.offset = start - start.min()                                                       # (B * R,)
        positions = torch.arange(int(self.offset.max()) + most, device=start.device) + start.min()
        cos, sin = decoder.rotary_emb(first, positions.expand(3, 1, -1))                        # (1, positions, d)
        sin = torch.cat([-sin[..., :sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2:]], -1)    # x is rolled, not turned
        self.table = torch.stack([cos[0], sin[0]], 1)                                           # (positions, 2, d)

    def width(self, longest: int) -> int:
        return longest

    def room(self, most: int) -> int:
        return min(ROOM, most)

    def __call__(self, token: Int[Tensor, " BR"]) -> Float[Tensor, "BR H"]:
        """The last layer's output at a new token a row."""
        room = self.own[0].shape[4]
        if self.tokens == room:
            self.own = [F.pad(x, (0, 0, 0, min(room, self.most - room))) for x in self.own]
        (_, groups, heads, length, d), config = self.prompts[0].shape, self.decoder.config
        repeats = config.num_attention_heads // heads
        # The scores of a layer, (B * key heads, R * repeats, P) and (B * key heads * R, repeats, c) of one tensor.
        scores = self.table.new_empty(groups * heads * self.rows * repeats, length + self.tokens + 1)
        parts = []
        for x in (scores, weights := torch.empty_like(scores)):
            to_prompt, to_own = x[:, :length], x[:, length:]
            parts += [to_prompt.view(groups * heads, -1, length), to_own.view(-1, repeats, self.tokens + 1)]
        bias, beta = parts[0], 0
        if self.bias is not None:
            bias, beta = self.bias.repeat_interleave(heads, 0).expand_as(parts[0]), 1

        def attend(layer: int, q: Tensor, new: Tensor, scale: float) -> Tensor:
            own, (keys, values) = self.own[layer], self.prompts[layer].flatten(1, 2)            # (B * heads, P, d)
            own.select(4, self.tokens).copy_(new)
            own_keys, own_values = own.narrow(4, 0, self.tokens + 1).flatten(1, 3)
            torch.baddbmm(bias, q, keys.mT, beta=beta, alpha=scale, out=parts[0])
            q = q.view(-1, repeats, d)
            torch.baddbmm(parts[1], q, own_keys.mT, beta=0, alpha=scale, out=parts[1])
            torch.softmax(scores, 1, out=weights)       # in fp32 inside, whatever the scores are
            out = torch.bmm(parts[2], values).view_as(q)
            return out.baddbmm_(parts[3], own_values)

        out = go_through(self.decoder, token, self.table.index_select(0, self.offset), groups, attend)
        self.offset += 1
        self.tokens += 1
        return out

    def keep(self, groups: Int[Tensor, " kept"], rows: Int[Tensor, " chosen"]) -> None:
        """Go on with the prompts `groups` (B',) and, of the B * R rows so far, with `rows` (B' * R',)."""
        b, r = rows // self.rows, rows % self.rows
        self.rows = len(rows) // len(groups)
        for layer, own in enumerate(self.own):
            chosen = own[:, b, :, r].unflatten(0, (-1, self.rows))                              # (B', R', 2, heads, T, d)
            self.own[layer] = chosen.permute(2, 0, 3, 1, 4, 5).contiguous()
            if len(groups) < self.prompts[layer].shape[1]:
                self.prompts[layer] = self.prompts[layer][:, groups]
        self.offset = self.offset[rows]
        if self.bias is not None:
            self.bias = self.bias[groups]


def go_through(decoder: nn.Module, token: Int[Tensor, " BR"], rotary: Float[Tensor, "BR 2 d"], groups: int,
               attend) -> Float[Tensor, "BR H"]:
    """All layers. attend(layer, q, new, scale) writes keys and values `new` (2, B, key heads, R, d) and returns the
    attention (B * key heads * R, repeats, d) of q (B * key heads, R * repeats, d)."""
    x = decoder.embed_tokens(token)                                                             # (B * R, H)
    cos, sin = rotary.unsqueeze(2).unbind(1)                                                    # (B * R, 1, d)
    d = cos.shape[-1]
    for layer, block in enumerate(decoder.layers):
        attention, mlp = block.self_attn, block.mlp
        y = norm(block.input_layernorm, x)
        y = torch.cat([attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)], 1).view(len(y), -1, d)
        heads, key_heads = decoder.config.num_attention_heads, decoder.config.num_key_value_heads
        turned = y[:, :heads + key_heads]
        rolled = turned.roll(d // 2, 2)
        turned.mul_(cos).addcmul_(rolled, sin)
        q = y[:, :heads].view(groups, -1, key_heads, heads // key_heads, d).transpose(1, 2)     # (B, heads, R, rep, d)
        new = y[:, heads:].view(groups, -1, 2, key_heads, d).permute(2, 0, 3, 1, 4)
        y = attend(layer, q.reshape(groups * key_heads, -1, d), new, attention.scaling)
        y = y.view(q.shape).transpose(1, 2).reshape(len(x), -1)                                 # (B * R, heads * d)
        x = add_product(x, attention.o_proj, y)
        y = norm(block.post_attention_layernorm, x)
        x = add_product(x, mlp.down_proj, mlp.act_fn(mlp.gate_proj(y)).mul_(mlp.up_proj(y)))
    return norm(decoder.norm, x)
