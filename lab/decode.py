"""What a new token costs in sampling, here and with transformers' `generate`.

`python -m lab.bench --decode` runs this, with the same weights and prompts, in turns and in one process. Both decode
greedily, and nothing stops a row. A token's time is that between two calls of the head, so prompts do not count.

- Overhead: 36 layers so narrow that they compute hardly anything, on one thread. On a CPU this is the thread's own
  time, which other work on the machine disturbs less than the clock.
- Arithmetic: the shape of bench.py's flags.
- Kernels: operations that PyTorch dispatches for one more layer and token, views aside, seen by a TorchDispatchMode;
  their number depends on no machine. `generate` gets the same rows and the same positions.
"""
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from lab.ways import DEVICE, Sizes, as_published, build, generate, make_prompts, wait

NARROW = dict(hidden=64, layers=36, vision_hidden=64, vision_depth=1, vocabulary=512, grids=4,
              side=56, text=16, prompts=1, group_size=8, max_tokens=64, model="")
NO_KERNEL = ("aten::_unsafe_view", "aten::lift_fresh", "aten::detach")      # they do not say so
ROUNDS = 5          # of the ways' turns


class Decoders:
    """The ways to decode `tokens` tokens behind the prompts of `sizes`: functions that return them, (B, G, tokens)."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.policy, self.published = sizes, build(sizes), build(sizes)
        self.prompts = make_prompts(sizes, self.policy.qwen.config)
        as_published(self.published.qwen)
        self.ways = {"ours": self.ours, "generate": self.generate}

    def ours(self, tokens: int) -> Tensor:
        rollouts = grpo.sample(self.policy, self.prompts, self.sizes.group_size, tokens, [-1])
        return rollouts.completions

    def generate(self, tokens: int) -> Tensor:
        never = [self.published.qwen.config.video_token_id]
        output = generate(self.published, self.prompts, self.sizes.group_size, tokens, never)
        return output[:, -tokens:].view(len(self.prompts), -1, tokens)

    def time(self, way: str, clock: Callable[[], float]) -> tuple[list[float], Tensor]:
        """(milliseconds between a token and the next, what was decoded)."""
        stamps = []

        def stamp(*_) -> None:
            wait()
            stamps.append(clock())

        heads = self.policy.qwen.lm_head, self.published.qwen.lm_head
        hooks = [head.register_forward_hook(stamp) for head in heads]
        completions = self.ways[way](self.sizes.max_tokens)
        for hook in hooks:
            hook.remove()
        return (np.diff(stamps) * 1e3).tolist(), completions


class Counter(TorchDispatchMode):
    """Counts what is dispatched, views aside."""
    kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:      # in inference mode, operations that are made of others come as a whole
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if not function.is_view and function.name() not in NO_KERNEL:
            self.kernels += 1
        return function(*args, **kwargs)


def kernels_per_layer(sizes: Sizes) -> dict[str, int]:
    """Of each way, what one more layer adds to what one more token adds to all that is dispatched."""
    per_token = {}              # {way: [with 2 layers, with 3 layers]}
    for layers in (2, 3):
        decoders = Decoders(replace(sizes, layers=layers, grids=2, group_size=2))
        for way, decode in decoders.ways.items():
            totals = []
            for tokens in (3, 4):
                with Counter() as counter:
                    decode(tokens)
                totals.append(counter.kernels)
            per_token.setdefault(way, []).append(totals[1] - totals[0])
    return {way: three - two for way, (two, three) in per_token.items()}


def compare(sizes: Sizes, clock: Callable[[], float]) -> dict:
    """Of each way the median milliseconds per token and the range of the rounds' medians; the median of the rounds'
    ratios of ours to `generate`; the share of equal tokens."""
    decoders = Decoders(sizes)
    for decode in decoders.ways.values():
        decode(3)               # warms up
    medians = {way: [] for way in decoders.ways}
    completions = {}
    for _ in range(ROUNDS):
        for way in decoders.ways:
            milliseconds, completions[way] = decoders.time(way, clock)
            medians[way].append(float(np.median(milliseconds)))
    ratios = np.divide(medians["ours"], medians["generate"])
    return {"milliseconds": {way: float(np.median(each)) for way, each in medians.items()},
            "ranges": {way: f"{min(each):.2f}-{max(each):.2f}" for way, each in medians.items()},
            "ratio": float(np.median(ratios)),
            "same": (completions["ours"] == completions["generate"]).float().mean().item()}


def measure(sizes: Sizes) -> dict:
    """What `--decode` reports."""
    threads, narrow = torch.get_num_threads(), replace(sizes, **NARROW)
    torch.set_num_threads(1)
    try:
        kernels = kernels_per_layer(narrow)
        overhead = compare(narrow, time.perf_counter if DEVICE == "cuda" else time.thread_time)
    finally:
        torch.set_num_threads(threads)
    arithmetic = compare(sizes, time.perf_counter)
    table = pd.DataFrame({"overhead": overhead["milliseconds"], "overhead, range": overhead["ranges"],
                          "arithmetic": arithmetic["milliseconds"],
                          "arithmetic, range": arithmetic["ranges"], "kernels per layer": kernels})
    print(table.rename_axis("ms per token").to_string(float_format="%.2f"))
    microseconds = 1e3 * overhead["milliseconds"]["ours"] / narrow.layers / kernels["ours"]
    return {"overhead_ratio": overhead["ratio"],
            "decode_ratio": arithmetic["ratio"],
            "kernels_per_layer": kernels["ours"],
            "kernels": kernels,
            "microseconds_per_kernel": microseconds,
            "overhead": overhead,
            "arithmetic": arithmetic}
