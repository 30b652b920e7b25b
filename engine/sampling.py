"""One new token a row: what `Policy.hidden` computes with a `Decoding`, in as few kernels as PyTorch's operators allow.

A token costs a deep model tens of milliseconds of Python and launches, whatever the arithmetic. So transformers' layers
are not called: rotary tables are made once a rollout, queries and keys rotated together and in place, keys and values
put into a buffer of fixed size; scale, padding and residual are part of a product, a norm is one operator.

Linear modules that are no plain nn.Linear, such as LoRA's, are called, so that what is around them counts. No hooks of
FSDP run, so weights have to be gathered already, as they are behind the prompts' own pass inside sharding.gathered.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from engine.attention import Packed


class Layer(NamedTuple):
    """The parts of a decoder layer, functions of x (n, H)."""
    norm: Callable
    qkv: Callable           # (n, all heads * d)
    out: Callable           # (x, attention's result) -> x + its projection
    mlp_norm: Callable
    gate: Callable
    up: Callable
    act: Callable
    down: Callable          # (x, product) -> x + its projection


def norm(module: nn.Module) -> Callable:
    """transformers' RMS norm as one operator, or where CPUs make six kernels of that, as four."""
    shape, weight, eps = tuple(module.weight.shape), module.weight, module.variance_epsilon
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    weight, least = weight * shape[0] ** 0.5, weight.new_tensor((shape[0] * eps) ** 0.5)
    return lambda x: (x / torch.hypot(torch.linalg.vector_norm(x, dim=1, keepdim=True), least)).mul_(weight)


def product(module: nn.Module, added: bool = False) -> Callable:
    """x -> module(x), of a linear one without bias; or (x, y) -> x + module(y)."""
    if type(module) is not nn.Linear or module.bias is not None:
        return (lambda x, y: x + module(y)) if added else module
    weight = module.weight.t()
    return (lambda x, y: torch.addmm(x, y, weight)) if added else (lambda x: torch.mm(x, weight))


def side_by_side(*modules: nn.Module) -> Callable:
    """x -> cat of all module(x); the weights of plain ones are joined."""
    if any(type(module) is not nn.Linear or module.bias is None for module in modules):
        return lambda x: torch.cat([module(x) for module in modules], 1)
    weight, bias = torch.cat([module.weight for module in modules]).t(), torch.cat([module.bias for module in modules])
    return lambda x: torch.addmm(bias, x, weight)


def through(layer: Layer, x: Float[Tensor, "n H"], rotary: tuple[Tensor, Tensor], heads: int,
            keys: Float[Tensor, "Bk d P"], values: Float[Tensor, "Bk P d"], own_keys: Float[Tensor, "Bkr d c"],
            own_values: Float[Tensor, "Bkr c d"], bias: Tensor | None, write: Callable) -> Float[Tensor, "n H"]:
    """One layer, n = B * R rows; k key heads. c are a row's own tokens, among which write(new) puts the new one's keys
    and values, of all heads (n, 2 k, d). `rotary` turns queries and keys, and scales the queries; bias (Bkr, 1, P + c)
    is added to their products, -inf where there is nothing to see."""
    n, d, length, repeats = len(x), *keys.shape[1:], heads * len(x) // len(own_keys)
    key_heads, groups = heads // repeats, len(keys) * repeats // heads
    y = layer.qkv(layer.norm(x)).view(n, -1, d)
    turned = y.narrow(1, 0, heads + key_heads)
    rolled = turned.roll(d // 2, 2)
    turned.mul_(rotary[0]).addcmul_(rolled, rotary[1])
    q, new = y.split((heads, 2 * key_heads), 1)
    write(new)
    q = q.view(groups, -1, key_heads, repeats, d).transpose(1, 2).reshape(len(keys), -1, d)
    to_prompt = torch.bmm(q, keys)                                                              # (B k, R * repeats, P)
    q = q.reshape(-1, repeats, d)       # a copy where a head has keys of its own and there is one prompt
    weights = torch.cat((to_prompt.view(-1, repeats, length), torch.bmm(q, own_keys)), 2)       # (Bkr, repeats, P + c)
    weights = (weights if bias is None else weights.add_(bias)).softmax(2)                      # in fp32 inside
    of_prompt, of_own = weights.split((length, own_values.shape[1]), 2)
    y = torch.bmm(of_prompt.view(to_prompt.shape), values).view(q.shape).baddbmm_(of_own, own_values)
    x = layer.out(x, y.view(groups, key_heads, -1, repeats, d).transpose(1, 2).reshape(n, heads * d))
    y = layer.mlp_norm(x)
    return layer.down(x, layer.act(layer.gate(y)).mul_(layer.up(y)))


class Step:
    """The state of B prompts with R rows of completions each; a call goes on by one token a row."""
    fixed = False       # rows stay as many as they are: there is no `keep`

    def __init__(self, decoder: nn.Module, packed: Packed, rows: int, start: Int[Tensor, " BR"], most: int):
        """`decoder`: transformers' language model. `packed` kept the prompts' keys and values, and gives them up.
        `start`: the first position behind each row's prompt. `most`: new tokens a row at most."""
        self.decoder, self.norm, self.rows, self.tokens = decoder, norm(decoder.norm), rows, 0
        self.layers = [self.parts(block, block.self_attn, block.mlp) for block in decoder.layers]
        lengths, first = torch.tensor(packed.prompts), packed.kept[0][0]                        # (1, k, N, d)
        self.heads, longest = (decoder.config.num_attention_heads, first.shape[1]), int(lengths.max())
        # Of each layer keys and values: of the prompts (2, B, k, P, d), and of rows, in the order (B, k, R), (.., T, d)
        self.own = first.new_zeros(len(self.layers), 2, len(start) * first.shape[1], most, first.shape[3])
        self.prompts = []
        for layer in range(len(self.layers)):
            parts = [x[0].transpose(0, 1).split(packed.prompts) for x in packed.kept.pop(layer)]    # B of (P, k, d)
            parts = [nn.utils.rnn.pad_sequence(part, batch_first=True).transpose(1, 2) for part in parts]
            self.prompts.append(torch.stack(parts))
        beyond = (torch.arange(longest) >= lengths[:, None]).to(first.device)                   # (B, P) padding
        self.bias = first.new_zeros(beyond.shape).masked_fill(beyond, -torch.inf) if beyond.any() else None
        self.offset = start - start.min()                                                       # (B * R,)
        positions = torch.arange(int(self.offset.max()) + most, device=start.device) + start.min()
        cos, (sin,) = decoder.rotary_emb(first, positions.expand(3, 1, -1))                     # (positions, d)
        sin = torch.cat([-sin[:, :sin.shape[1] // 2], sin[:, sin.shape[1] // 2:]], 1)           # so that x is rolled
        scale = sin.new_tensor([decoder.layers[0].self_attn.scaling] * self.heads[0] + [1.0] * self.heads[1])
        self.table = torch.stack([cos[0], sin], 1)[:, :, None] * scale[:, None]     # (positions, 2, heads + k, d)
        self.flatten()

    @staticmethod
    def parts(block: nn.Module, attention: nn.Module, mlp: nn.Module) -> Layer:
        return Layer(norm(block.input_layernorm), side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
                     product(attention.o_proj, True), norm(block.post_attention_layernorm), product(mlp.gate_proj),
                     product(mlp.up_proj), mlp.act_fn.forward, product(mlp.down_proj, True))

    def flatten(self) -> None:
        """What all steps need of the prompts: of each layer keys (B k, d, P) and values (B k, P, d), and their bias."""
        self.flat = [x[0].flatten(0, 1).mT for x in self.prompts], [x[1].flatten(0, 1) for x in self.prompts]
        if self.bias is not None:
            self.padding = self.bias.repeat_interleave(self.heads[1] * self.rows, 0)[:, None]   # (B k R, 1, P)

    @torch.inference_mode()
    def __call__(self, token: Int[Tensor, " BR"]) -> Float[Tensor, "BR H"]:
        """The last layer's output at a new token a row."""
        (_, groups, key_heads, _, d), rows = self.prompts[0].shape, self.rows
        own = self.own.narrow(2, 0, groups * key_heads * rows)
        slots = own.select(3, self.tokens).view(-1, 2, groups, key_heads, rows, d).unbind()
        keys, values = own.narrow(3, 0, self.tokens + 1).unbind(1)                              # (layers, B k R, c, d)
        x, rotary = self.decoder.embed_tokens(token), self.table.index_select(0, self.offset).unbind(1)
        bias = None if self.bias is None else nn.functional.pad(self.padding, (0, self.tokens + 1))  # (B k R, 1, P + c)
        for layer, *prompt, slot, k, v in zip(self.layers, *self.flat, slots, keys.mT.unbind(), values.unbind()):
            write = lambda new: slot.copy_(new.view(groups, rows, 2, key_heads, d).permute(2, 0, 3, 1, 4))
            x = through(layer, x, rotary, self.heads[0], *prompt, k, v, bias, write)
        self.offset += 1
        self.tokens += 1
        return self.norm(x)

    def keep(self, groups: Int[Tensor, " kept"], rows: Int[Tensor, " chosen"]) -> None:
        """Go on with the prompts `groups` (B',) and, of the B * R rows so far, with `rows` (B' * R',)."""
        key_heads, before = self.heads[1], self.rows
        self.rows, self.offset = len(rows) // len(groups), self.offset[rows]
        chosen = (rows // before * key_heads * before + rows % before).view(-1, 1, self.rows)   # (B', 1, R')
        chosen = (chosen + torch.arange(key_heads, device=rows.device)[:, None] * before).flatten()     # (B' k R',)
        for layer, own in enumerate(self.own):      # in place, with a copy of one layer at a time
            own[:, :len(chosen), :self.tokens] = own[:, chosen, :self.tokens]
            if len(groups) < self.prompts[layer].shape[1]:
                self.prompts[layer] = self.prompts[layer][:, groups]
        self.bias = None if self.bias is None else self.bias[groups]
        self.flatten()


def draw_token(logits: Float[Tensor, "rows V"], uniform: Float[Tensor, " rows"] | None) -> Int[Tensor, " rows"]:
    """One token a row: the inverse of the cumulated softmax at `uniform`, in [0, 1), so that a row's token depends on
    its own random number only; the likeliest token where `uniform` is None."""
    if uniform is None:
        return logits.argmax(-1)
    cumulated = logits.double().softmax(-1).cumsum(-1)                                      # (rows, V)
    token = torch.searchsorted(cumulated, uniform[:, None].double() * cumulated[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)            # V where logits are not numbers: train.py sees that later


def rows_to_keep(running: Bool[Tensor, "B R"]) -> tuple[Int[Tensor, " kept"], Int[Tensor, " rows"]] | None:
    """(prompts, rows of all B * R) to go on with: prompts with a running row, as many rows of each as the one with
    most. None while that leaves more than 3/4 of the rows, since dropping copies the keys and values."""
    per_prompt = running.sum(1)
    groups, most = per_prompt.nonzero()[:, 0], int(per_prompt.max())
    if len(groups) * most > 0.75 * running.numel():
        return None
    chosen = running[groups].long().argsort(dim=1, descending=True, stable=True)[:, :most]      # running ones first
    return groups, (chosen + groups[:, None] * running.shape[1]).flatten()
