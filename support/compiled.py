"""`incremental.Step` in shapes that stay as they are, so that torch.compile makes one program of all its layers; on a
GPU with mode="reduce-overhead", which records it as a graph.

Prompts are padded to one of a few lengths, tokens that a row does not have yet are excluded by their scores, and rows
that have stopped go on with the others. A program belongs to its shapes: another number of prompts or rows, or another
padded length, takes compiling again. It holds modules, whose weights torch.compile knows to stay where they are.
"""
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from support.incremental import Layer, Step, through

PROGRAMS = 64       # torch compiles at most so many


class Static(Step):
    """A Step that is compiled."""
    fixed = True

    def __init__(self, decoder: nn.Module, *args):
        super().__init__(decoder, *args)
        groups, key_heads, (size, d) = *self.prompts[0].shape[1:3], self.own.shape[3:]
        # A tensor a layer: in place, a program changes whole tensors only.
        self.own = [torch.zeros(2, groups, key_heads, self.rows, size, d, dtype=self.own.dtype, device=self.own.device)
                    for _ in self.layers]
        self.at = torch.zeros(1, dtype=torch.long, device=self.offset.device)
        bias = self.table.new_zeros(groups, self.prompts[0].shape[3]) if self.bias is None else self.bias
        self.bias = bias.repeat_interleave(key_heads, 0)[:, None].contiguous()                  # (B k, 1, P)
        if self.at.is_cuda:         # a recorded graph reads and writes them where they are
            for tensor in (*self.own, *self.flat[0], *self.flat[1], self.bias):
                torch._dynamo.mark_static_address(tensor)

    def padded(self, longest: int) -> int:
        """The least of 64, 96, 128, 192, 256, 384, ... that is no less: a few lengths are all, and a third is added at
        most."""
        power = max(64, 1 << (longest - 1).bit_length())
        return power * 3 // 4 if power > 64 and longest <= power * 3 // 4 else power

    @staticmethod
    def parts(block: nn.Module, attention: nn.Module, mlp: nn.Module) -> Layer:
        return Layer(lambda x: norm(block.input_layernorm, x),
                     lambda x: torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], 1),
                     lambda x, y: x + attention.o_proj(y), lambda x: norm(block.post_attention_layernorm, x),
                     mlp.gate_proj, mlp.up_proj, mlp.act_fn, lambda x, y: x + mlp.down_proj(y))

    def __call__(self, token: Tensor) -> Tensor:
        if self.at.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        rotary = self.table.index_select(0, self.offset)
        out = program(self.at.is_cuda)(self.decoder, self.layers, token, rotary, self.own, self.flat, self.bias,
                                       self.at, self.heads[0], self.scale)
        self.offset += 1
        self.at += 1
        return out


def norm(module: nn.Module, x: Tensor) -> Tensor:
    return torch.rms_norm(x, tuple(module.weight.shape), module.weight, module.variance_epsilon)


def run(decoder: nn.Module, layers: list[Layer], token: Tensor, rotary: Tensor, own: list[Tensor],
        flat: tuple[list[Tensor], list[Tensor]], bias: Tensor, at: Tensor, heads: int, scale: float) -> Tensor:
    """What is compiled: the last layer's output (B * R, H). own: of each layer (2, B, k, R, T, d); at (1,): the place
    of the new token among T; rotary (B * R, 2, 1, d)."""
    _, groups, key_heads, rows, size, d = own[0].shape
    x = decoder.embed_tokens(token)
    later = torch.arange(size, device=at.device) > at
    own_bias = torch.zeros_like(later, dtype=x.dtype).masked_fill(later, -torch.inf)            # (T,)
    for layer, buffer, *prompt in zip(layers, own, *flat):
        def write(new: Tensor) -> None:
            buffer.index_copy_(4, at, new.view(groups, rows, 2, key_heads, 1, d).permute(2, 0, 3, 1, 4, 5))
        x = through(layer, x, rotary.unbind(1), heads, scale, *prompt, bias, 1, write, buffer[0].flatten(0, 2).mT,
                    buffer[1].flatten(0, 2), own_bias, 1)
    return norm(decoder.norm, x)


@cache
def program(graph: bool) -> Callable:
    torch._dynamo.config.recompile_limit = PROGRAMS
    return torch.compile(run, dynamic=False, fullgraph=True, mode="reduce-overhead" if graph else None)
