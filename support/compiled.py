"""`incremental.Step` with shapes that stay as they are, so that torch.compile makes one program of all its layers; on a
GPU mode="reduce-overhead", which records it as a graph.

Prompts are padded to one of a few lengths, a row has room for all its tokens from the first on, and rows that have
stopped go on with the others. A program belongs to these shapes: another number of prompts or rows, or another padded
length, compiles one more.
"""
import torch
from jaxtyping import Int
from torch import Tensor, nn

from support.attention import Packed
from support.incremental import Layer, Step, through

PROGRAMS = 64       # torch compiles at most so many


def padded(longest: int) -> int:
    """The least of 64, 96, 128, 192, 256, 384, ... that is no less: at most half is added, a few lengths are all."""
    power = max(64, 1 << (longest - 1).bit_length())
    return power * 3 // 4 if power > 64 and longest <= power * 3 // 4 else power


def norm(module: nn.Module):
    return lambda x: torch.rms_norm(x, tuple(module.weight.shape), module.weight, module.variance_epsilon)


def layer_of(block: nn.Module) -> Layer:
    """A decoder layer as its modules, whose weights torch.compile knows to stay where they are."""
    attention, mlp = block.self_attn, block.mlp
    return Layer(norm(block.input_layernorm),
                 lambda x: torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], 1),
                 lambda x, y: x + attention.o_proj(y), norm(block.post_attention_layernorm),
                 mlp.gate_proj, mlp.up_proj, mlp.act_fn, lambda x, y: x + mlp.down_proj(y))


def go_on(decoder: nn.Module, token: Tensor, own: list[Tensor], flat: tuple[list[Tensor], list[Tensor]], bias: Tensor,
          table: Tensor, offset: Tensor, at: Tensor, shape: tuple[int, ...], scale: float) -> Tensor:
    """What is compiled: all layers of a Step. own: of each layer (2, B, key heads, R, T, d). at (1,): the place of the
    new token among T; those behind it are excluded."""
    groups, key_heads, rows, heads = shape
    x = decoder.embed_tokens(token)
    cos, sin = table.index_select(0, offset).unsqueeze(2).unbind(1)
    later = torch.arange(own[0].shape[4], device=at.device) > at                            # (T,)
    own_bias = torch.zeros(later.shape, dtype=x.dtype, device=at.device).masked_fill(later, -torch.inf)
    for block, buffer, keys, values in zip(decoder.layers, own, *flat):
        def write(new: Tensor) -> None:
            new = new.view(groups, rows, 2, key_heads, 1, -1).permute(2, 0, 3, 1, 4, 5)
            buffer.index_copy_(4, at, new)
        x = through(layer_of(block), x, cos, sin, heads, scale, keys, values, bias, 1, write,
                    buffer[0].flatten(0, 2).mT, buffer[1].flatten(0, 2), own_bias, 1)
    return norm(decoder.norm)(x)
