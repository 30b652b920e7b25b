"""One new token a row: what `Policy.hidden` computes with a `Decoding`, in as few kernels as PyTorch's operators allow.

A token of a deep model costs tens of milliseconds of Python and kernel launches, whatever the arithmetic. So here the
decoder's layers are gone through without transformers' code and without modules:

- rotary tables of all positions are made once a rollout; queries and keys are rotated together, in place;
- keys and values of a row's tokens go into a buffer, in place;
- scale and padding are a factor and a summand of the product, so is the residual, and a norm is one operator.

Linear modules that are no plain nn.Linear, such as LoRA's, are called, so that what is around them counts. Under FSDP
the weights have to be gathered already, as they are behind the prompts' own pass inside sharding.gathered: no hook
runs here.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from support.attention import Packed


class Layer(NamedTuple):
    """A decoder layer's parts as functions of x (n, H)."""
    norm: Callable          # of attention's input
    qkv: Callable           # (n, all heads * d)
    out: Callable           # (x, attention's result) -> x + its projection
    mlp_norm: Callable
    gate: Callable
    up: Callable
    act: Callable
    down: Callable          # (x, product) -> x + its projection


def norm(module: nn.Module) -> Callable:
    """transformers' RMS norm as one operator."""
    shape, weight, eps = tuple(module.weight.shape), module.weight, module.variance_epsilon
    return lambda x: torch.rms_norm(x, shape, weight, eps)


def linear(module: nn.Module) -> Callable:
    """x -> module(x)."""
    if type(module) is not nn.Linear:
        return module
    weight, bias = module.weight.t(), module.bias
    return (lambda x: torch.mm(x, weight)) if bias is None else (lambda x: torch.addmm(bias, x, weight))


def added(module: nn.Module) -> Callable:
    """(x, y) -> x + module(y)."""
    if type(module) is not nn.Linear or module.bias is not None:
        return lambda x, y: x + module(y)
    weight = module.weight.t()
    return lambda x, y: torch.addmm(x, y, weight)


def side_by_side(*modules: nn.Module) -> Callable:
    """x -> cat of all module(x); of plain ones, all with a bias, their weights are."""
    if all(type(module) is nn.Linear and module.bias is not None for module in modules):
        weight = torch.cat([module.weight for module in modules]).t()
        bias = torch.cat([module.bias for module in modules])
        return lambda x: torch.addmm(bias, x, weight)
    parts = [linear(module) for module in modules]
    return lambda x: torch.cat([part(x) for part in parts], 1)


def through(layer: Layer, x: Float[Tensor, "BR H"], cos: Float[Tensor, "BR 1 d"], sin: Float[Tensor, "BR 1 d"],
            heads: int, scale: float, keys: Float[Tensor, "Bk d P"], values: Float[Tensor, "Bk P d"],
            bias: Float[Tensor, "..."], beta: int, write: Callable, own_keys: Float[Tensor, "BkR d c"],
            own_values: Float[Tensor, "BkR c d"], own_bias: Float[Tensor, "..."], own_beta: int) -> Float[Tensor, "BR H"]:
    """One layer. Bk is B * key heads, c the row's own tokens, the new one among them: write(new) puts its keys and
    values, of all heads (B * R, 2 * key heads, d), there. A bias with beta 0 counts as none."""
    (n, d), repeats = (len(x), cos.shape[2]), heads * len(x) // len(own_keys)
    key_heads, groups = heads // repeats, len(keys) * repeats // heads
    y = layer.qkv(layer.norm(x)).view(n, -1, d)
    turned = y.narrow(1, 0, heads + key_heads)
    rolled = turned.roll(d // 2, 2)
    turned.mul_(cos).addcmul_(rolled, sin)
    q, new = y.split((heads, 2 * key_heads), 1)
    write(new)
    q = q.view(groups, -1, key_heads, repeats, d).transpose(1, 2).reshape(len(keys), -1, d)
    to_prompt = torch.baddbmm(bias, q, keys, beta=beta, alpha=scale)                        # (Bk, R * repeats, P)
    q = q.view(-1, repeats, d)
    to_own = torch.baddbmm(own_bias, q, own_keys, beta=own_beta, alpha=scale)               # (BkR, repeats, c)
    length = keys.shape[2]
    weights = torch.cat([to_prompt.view(-1, repeats, length), to_own], 2).softmax(2)        # in fp32 inside
    y = torch.bmm(weights[..., :length].view_as(to_prompt), values).view_as(q)
    y = y.baddbmm_(weights[..., length:], own_values).view(groups, key_heads, -1, repeats, d)
    x = layer.out(x, y.transpose(1, 2).reshape(n, heads * d))
    y = layer.mlp_norm(x)
    return layer.down(x, layer.act(layer.gate(y)).mul_(layer.up(y)))


class Step:
    """The state of B prompts with R rows of completions each; a call goes on by one token a row."""

    def __init__(self, decoder: nn.Module, packed: Packed, rows: int, start: Int[Tensor, " BR"], most: int):
        """`decoder`: transformers' language model. `packed` kept the prompts' keys and values, and gives them up.
        `start`: the first position behind each row's prompt. `most`: new tokens a row at most."""
        self.embed, self.norm, self.rows, self.tokens, self.most = decoder.embed_tokens, norm(decoder.norm), rows, 0, most
        self.scale = decoder.layers[0].self_attn.scaling
        self.layers = [Layer(norm(each.input_layernorm),
                             side_by_side(each.self_attn.q_proj, each.self_attn.k_proj, each.self_attn.v_proj),
                             added(each.self_attn.o_proj), norm(each.post_attention_layernorm),
                             linear(each.mlp.gate_proj), linear(each.mlp.up_proj), each.mlp.act_fn,
                             added(each.mlp.down_proj)) for each in decoder.layers]
        lengths, first = torch.tensor(packed.prompts), packed.kept[0][0]                        # (1, key heads, N, d)
        self.heads, size = (decoder.config.num_attention_heads, first.shape[1]), len(start) * first.shape[1]
        # Each layer's keys and values of the rows' own tokens; rows in the order (B, key heads, R)
        self.own = first.new_zeros(len(self.layers), 2, size, most, first.shape[3])
        self.prompts = []       # of each layer (2, B, key heads, P, d)
        for layer in range(len(self.layers)):
            parts = [x[0].transpose(0, 1).split(packed.prompts) for x in packed.kept.pop(layer)]    # B of (P, heads, d)
            self.prompts.append(torch.stack([pad_sequence(part, batch_first=True).transpose(1, 2) for part in parts]))
        self.bias = None        # (B, P), added to the scores: -inf at padding, or 0
        beyond = torch.arange(int(lengths.max())) >= lengths[:, None]
        if beyond.any():
            self.bias = torch.zeros(beyond.shape, dtype=first.dtype).masked_fill(beyond, -torch.inf).to(first.device)
        self.flat = self.flatten()
        self.offset = start - start.min()                                                       # (B * R,)
        positions = torch.arange(int(self.offset.max()) + most, device=start.device) + start.min()
        cos, sin = decoder.rotary_emb(first, positions.expand(3, 1, -1))                        # (1, positions, d)
        sin = torch.cat([-sin[..., :sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2:]], -1)    # halves only change places
        self.table = torch.stack([cos[0], sin[0]], 1)                                           # (positions, 2, d)

    def flatten(self) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer's keys (B * key heads, d, P) and values (B * key heads, P, d) of the prompts, views."""
        return [x[0].flatten(0, 1).mT for x in self.prompts], [x[1].flatten(0, 1) for x in self.prompts]

    def __call__(self, token: Int[Tensor, " BR"]) -> Float[Tensor, "BR H"]:
        """The last layer's output at a new token a row."""
        (_, groups, key_heads, length, d), (heads, _) = self.prompts[0].shape, self.heads
        rows = self.rows
        bias, beta = (none := self.table[0, 0, 0]), 0           # of a factor 0
        if self.bias is not None:
            bias, beta = self.bias.repeat_interleave(key_heads, 0)[:, None], 1                  # (B * key heads, 1, P)
        # Views of all layers at once
        own = self.own.narrow(2, 0, groups * key_heads * rows)
        slots = own.select(3, self.tokens).view(-1, 2, groups, key_heads, rows, d).unbind()
        own_keys, own_values = own.narrow(3, 0, self.tokens + 1).unbind(1)                      # (layers, BR heads, c, d)
        layers = zip(self.layers, *self.flat, slots, own_keys.mT.unbind(), own_values.unbind())
        x = self.embed(token)                                                                   # (B * R, H)
        cos, sin = self.table.index_select(0, self.offset).unsqueeze(2).unbind(1)               # (B * R, 1, d)
        for layer, keys, values, slot, own_keys, own_values in layers:
            write = lambda new: slot.copy_(new.view(groups, rows, 2, key_heads, d).permute(2, 0, 3, 1, 4))
            x = through(layer, x, cos, sin, heads, self.scale, keys, values, bias, beta, write, own_keys, own_values,
                        none, 0)
        self.offset += 1
        self.tokens += 1
        return self.norm(x)

    def keep(self, groups: Int[Tensor, " kept"], rows: Int[Tensor, " chosen"]) -> None:
        """Go on with the prompts `groups` (B',) and, of the B * R rows so far, with `rows` (B' * R',)."""
        key_heads, before = self.heads[1], self.rows
        self.rows = len(rows) // len(groups)
        chosen = (rows // before * key_heads * before + rows % before).view(-1, 1, self.rows)   # (B', 1, R')
        chosen = (chosen + torch.arange(key_heads, device=rows.device)[:, None] * before).flatten()     # B' heads R'
        for layer, own in enumerate(self.own):      # in place, a copy of one layer at a time
            own[:, :len(chosen), :self.tokens] = own[:, chosen, :self.tokens]
            if len(groups) < self.prompts[layer].shape[1]:
                self.prompts[layer] = self.prompts[layer][:, groups]
        self.flat, self.offset = self.flatten(), self.offset[rows]
        if self.bias is not None:
            self.bias = self.bias[groups]
