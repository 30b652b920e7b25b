"""`incremental.Step` in shapes that stay as they are, so that torch.compile makes one program of all its layers; on a
GPU with the options of mode="reduce-overhead", which records it as a graph. It has not run on a GPU yet.

Prompts are padded to one of a few lengths, tokens that a row does not have yet are excluded, and rows that have
stopped go on with the others. A program belongs to its shapes: another number of prompts or rows, or another padded
length, takes compiling again, and beyond PROGRAMS of them runs uncompiled.

A recorded graph reads and writes where it did when it was recorded. So keys and values lie in memory that stays with
the decoder from one rollout to the next; only larger shapes take more. Before each token, torch.compile looks at the
shapes of what it is given and at nothing else: a decoder's modules, other than the values of their weights, may not
change after its first rollout.
"""
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from support.attention import Packed
from support.folders import brief
from support.incremental import Layer, Step, through

PROGRAMS = 64       # of a decoder at most
KEPT: WeakKeyDictionary[nn.Module, tuple[Callable, dict]] = WeakKeyDictionary()     # a decoder's program and memory


class Static(Step):
    """A Step that is compiled."""
    fixed = True

    def __init__(self, decoder: nn.Module, packed: Packed, rows: int, start: Tensor, most: int):
        super().__init__(decoder, packed, rows, start, most)
        (_, groups, key_heads, longest, d), length = self.prompts[0].shape, padded(self.prompts[0].shape[3])
        if decoder not in KEPT:
            KEPT[decoder] = compiled(self.table.is_cuda), {}
        self.program, kept = KEPT[decoder]
        kept_as = lambda name, *shape: place(kept, name, shape, self.table)
        for layer, prompt in enumerate(self.prompts):
            self.prompts[layer] = kept_as(f"prompt {layer}", 2, groups * key_heads, length, d)
            self.prompts[layer][:, :, :longest] = prompt.flatten(1, 2)
        for number, block in enumerate(decoder.layers):
            modules = [getattr(block.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
            if all(type(module) is nn.Linear for module in modules):
                weight = torch.cat([module.weight for module in modules])
                weight = kept_as(f"weight {number}", *weight.shape).copy_(weight)
                bias = kept_as(f"bias {number}", len(weight)).copy_(torch.cat([module.bias for module in modules]))
                self.layers[number] = self.layers[number]._replace(qkv=side_by_side(weight, bias))
        self.own = [kept_as(f"own {layer}", 2, groups * key_heads * rows, most, d) for layer in range(len(self.layers))]
        hidden = torch.full((groups, length + most), -torch.inf).to(self.table)
        hidden[:, :longest] = 0 if self.bias is None else self.bias
        self.bias = hidden.repeat_interleave(key_heads * rows, 0)[:, None]                      # (B k R, 1, P + T)
        self.at = torch.zeros(1, dtype=torch.long, device=self.table.device)
        self.flat, self.length = None, length

    @staticmethod
    def parts(block: nn.Module, attention: nn.Module, mlp: nn.Module) -> Layer:
        return Layer(lambda x: norm(block.input_layernorm, x),
                     lambda x: torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], 1),
                     lambda x, y: x + attention.o_proj(y), lambda x: norm(block.post_attention_layernorm, x),
                     mlp.gate_proj, mlp.up_proj, mlp.act_fn, lambda x, y: x + mlp.down_proj(y))

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        if self.at.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        self.bias[:, :, self.length + self.tokens] = 0
        rotary = self.table.index_select(0, self.offset)
        try:
            out = self.program(self.decoder, self.layers, token, rotary, self.prompts, self.own, self.bias, self.at,
                               self.heads[0])
        except TorchDynamoException as error:
            raise ValueError(f"--compile: torch.compile failed ({brief(error)}); leave the flag out") from error
        self.offset += 1
        self.at += 1
        self.tokens += 1
        return out


def check(wanted: bool) -> None:
    """Raise ValueError, naming the flag, where --compile has nothing to compile with."""
    if wanted and torch.cuda.is_available() and not has_triton():
        raise ValueError("--compile: on a GPU torch.compile needs triton; pip install triton, or leave the flag out")
    try:
        if wanted:
            get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("--compile: torch.compile needs a C++ compiler, and there is none that works; install g++, or "
                         "give the path of one in the environment variable CXX, or leave the flag out") from error


def side_by_side(weight: Tensor, bias: Tensor) -> Callable:
    return lambda x: torch.addmm(bias, x, weight.t())


def padded(longest: int) -> int:
    """The least of 64, 96, 128, 192, 256, 384, ... that is no less: a few lengths are all, and a third is added at
    most."""
    power = max(64, 1 << (longest - 1).bit_length())
    return power * 3 // 4 if power > 64 and longest <= power * 3 // 4 else power


def place(kept: dict[str, Tensor], name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, always in the same place unless there is too little of it."""
    size = torch.Size(shape).numel()
    if name not in kept or len(kept[name]) < size or kept[name].dtype != like.dtype:
        kept[name] = like.new_empty(size)
    found = kept[name][:size].view(shape).zero_()
    if found.is_cuda:
        torch._dynamo.mark_static_address(found)
    return found


def norm(module: nn.Module, x: Tensor) -> Tensor:
    return torch.rms_norm(x, tuple(module.weight.shape), module.weight, module.variance_epsilon)


def run(decoder: nn.Module, layers: list[Layer], token: Tensor, rotary: Tensor, prompts: list[Tensor],
        own: list[Tensor], bias: Tensor, at: Tensor, heads: int) -> Tensor:
    """What is compiled: the last layer's output (B * R, H). Of each layer prompts (2, B k, P, d) and own
    (2, B k R, T, d); at (1,): the place of the new token among T; rotary (B * R, 2, heads + k, d)."""
    x = decoder.embed_tokens(token)
    for layer, prompt, buffer in zip(layers, prompts, own):
        def write(new: Tensor) -> None:
            (_, pairs, _, d), (_, all_pairs, *_) = prompt.shape, buffer.shape
            key_heads, rows = new.shape[1] // 2, all_pairs // pairs
            new = new.view(-1, rows, 2, key_heads, d).permute(2, 0, 3, 1, 4).reshape(2, all_pairs, 1, d)
            buffer.index_copy_(2, at, new)
        x = through(layer, x, rotary.unbind(1), heads, prompt[0].mT, prompt[1], buffer[0].mT, buffer[1], bias, write)
    return norm(decoder.norm, x)


def compiled(graph: bool) -> Callable:
    """`run` as a program, in C++ where no graph is recorded. It looks at the shapes of tensors alone: checking hundreds
    of modules at every token would take as long as their work."""
    options = torch._inductor.list_mode_options("reduce-overhead") if graph else {"cpp_wrapper": True}
    return torch.compile(run, dynamic=False, recompile_limit=PROGRAMS, isolate_recompiles=True,
                         options={**options, "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe})
