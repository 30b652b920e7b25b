"""What one sampled token costs (`python -m tools.bench --decode`): milliseconds, and kernels a layer.

Three ways on the same weights, prompts and rows, all greedy: ours (support/incremental.py), plain (this project through
transformers' layers, the oracle of its tests), and transformers' `generate`, with prompt and video once for each row.
A token's time is that of many tokens less that of few, over their difference, so that prompts do not count; the ways
take turns. At 36 narrow layers it is overhead, Python's and the launches' alone; at the bench's shape also arithmetic.

Kernels are the operations under a TorchDispatchMode that return no view, of 6 layers less those of 2, a layer: a number
that does not depend on the machine. An operator that is one kernel on a GPU may be several on a CPU.
"""
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
from tools.ways import Sizes, as_published, build, make_prompts, plainly, repeat, shared_rollout, timed

NARROW = dict(hidden=64, layers=36, vision_hidden=32, vision_depth=1, grids=2, side=56, text=12, vocabulary=300,
              prompts=1, group_size=8, model="")
FEW, MANY = 4, 36       # tokens
Way = Callable[[int], torch.Tensor]     # tokens -> completions (B * G, tokens)


class Kernels(TorchDispatchMode):
    """Counts operations that return no view of what they are given."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(of.alias_info is not None and not of.alias_info.is_write for of in function._schema.returns)
        self.count += not views
        return function(*args, **(kwargs or {}))


def ways(sizes: Sizes) -> dict[str, Way]:
    """Each way to sample, of policies with the same weights."""
    ours, plain, published = (build(sizes) for _ in range(3))
    prompts = make_prompts(sizes, ours.qwen.config)
    plainly(plain)
    as_published(published.qwen)
    return {"ours": lambda tokens: shared_rollout(ours, prompts, sizes.group_size, tokens, None).flatten(0, 1),
            "plain": lambda tokens: shared_rollout(plain, prompts, sizes.group_size, tokens, None).flatten(0, 1),
            "generate": lambda tokens: generate(published, prompts, sizes.group_size, tokens)}


@torch.no_grad()
def generate(policy: model.Policy, prompts: list[model.Prompt], group_size: int, tokens: int) -> torch.Tensor:
    """transformers' own loop, with this project's positions and forbidden tokens."""
    inputs = repeat(prompts, group_size)
    found = policy.qwen.generate(
        **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, pad_token_id=0, suppress_tokens=policy.forbidden)
    return found[:, inputs["input_ids"].shape[1]:]


def milliseconds(sizes: Sizes, repeats: int) -> dict[str, list[float]]:
    """{way: ms a token, of each repeat}; the ways give the same tokens, or it raises ValueError."""
    sample, found = ways(sizes), {}
    tokens = {name: way(MANY).tolist() for name, way in sample.items()}        # which warms up, too
    if tokens["ours"] != tokens["plain"] or tokens["ours"] != tokens["generate"]:
        raise ValueError("the ways sample different tokens")
    for _ in range(repeats):
        for name, way in sample.items():
            seconds = {}
            for count in (FEW, MANY):
                with timed(seconds, count):
                    way(count)
            found.setdefault(name, []).append(1e3 * (seconds[MANY] - seconds[FEW]) / (MANY - FEW))
    return found


def kernels(sizes: Sizes) -> dict[str, float]:
    """{way: kernels of one token of all rows, a layer}."""
    def counted(layers: int) -> dict[str, int]:
        found = {}
        for name, way in ways(replace(sizes, layers=layers)).items():
            for tokens in (3, 4):
                with Kernels() as mode:
                    way(tokens)
                found[name] = mode.count - found.get(name, 0)       # of the fourth token, once both are counted
        return found
    few, many = counted(2), counted(6)
    return {name: (many[name] - few[name]) / 4 for name in few}


def measure(sizes: Sizes, repeats: int) -> dict:
    """Print the table and return the numbers."""
    narrow, threads = replace(sizes, **NARROW), torch.get_num_threads()
    torch.set_num_threads(1)
    overhead = milliseconds(narrow, repeats)
    torch.set_num_threads(threads)
    usual, layers = milliseconds(sizes, repeats), kernels(narrow)
    shape = f"{sizes.layers} layers, width {sizes.hidden}"
    print(f"{'ms a token':12}{'36 layers, width 64':>24}{shape:>28}{'kernels a layer':>18}")
    for name in overhead:
        cells = [f"{np.median(of[name]):.2f} ({min(of[name]):.2f}-{max(of[name]):.2f})" for of in (overhead, usual)]
        print(f"{name:12}{cells[0]:>24}{cells[1]:>28}{layers[name]:>18.1f}")
    ratio = lambda of: float(np.median([a / b for a, b in zip(of["ours"], of["generate"])]))
    return {"overhead_ratio": ratio(overhead), "decode_ratio": ratio(usual), "kernels_per_layer": layers["ours"],
            "kernels": layers, "ms_overhead": overhead, "ms_usual": usual}
