"""What a new token costs in sampling, and whether waiting queries should take the place of rows that have stopped.

`python -m lab.bench --decode` runs this: ours, ours through torch.compile, ours through transformers' layers (plain:
the oracle of the tests), and transformers' `generate` on the same weights and prompt, in turns and in one process. All
decode greedily, and nothing stops a row. A token's time is that between two calls of the head, so prompts do not count.

- Overhead: 36 layers so narrow that they compute hardly anything, on one thread. On a CPU this is the thread's own
  time, which other work on the machine disturbs less than the clock.
- Arithmetic: the shape of bench.py's flags.
- Kernels: operations that PyTorch dispatches for one more layer and token, views aside, seen by a TorchDispatchMode;
  they depend on no machine. `generate` gets no more rows and no other positions than the others.
"""
import heapq
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from engine.sampling import rows_to_keep
from engine.video import TOTAL_PIXELS
from lab import plan
from lab.ways import DEVICE, Sizes, as_published, build, make_prompts, plainly, repeat, shape

NARROW = dict(hidden=64, layers=36, vision_hidden=64, vision_depth=1, vocabulary=512, grids=4, side=56, text=16,
              prompts=1, group_size=8, max_tokens=64, model="")
NO_KERNEL = ("aten::_unsafe_view", "aten::lift_fresh", "aten::detach")      # beside what says itself that it is a view
ROUNDS = 5          # of the ways' turns
QUERIES, LENGTHS = 256, (10, 200)       # of the simulated test set, and the tokens of its answers
THE_3B = Sizes(hidden=2048, layers=36, vocabulary=151936, vision_hidden=1280, vision_depth=32)


class Decoders:
    """The ways to decode `tokens` tokens behind the prompts of `sizes`: functions that return them, (B, G, tokens)."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.policy, self.published = sizes, build(sizes), build(sizes)
        self.prompts = make_prompts(sizes, self.policy.qwen.config)
        as_published(self.published.qwen)
        self.ways = {"ours": self.ours, "plain": self.plain, "generate": self.generate}

    def ours(self, tokens: int) -> Tensor:
        return grpo.rollout(self.policy, self.prompts, self.sizes.group_size, tokens, [-1]).completions

    def plain(self, tokens: int) -> Tensor:
        plainly(self.policy)
        try:
            return self.ours(tokens)
        finally:
            del self.policy.start_decoding

    @torch.no_grad()
    def generate(self, tokens: int) -> Tensor:
        inputs, qwen = repeat(self.prompts, self.sizes.group_size), self.published.qwen
        never = qwen.config.video_token_id
        ids = qwen.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=tokens,
                            do_sample=False, eos_token_id=never, pad_token_id=0,
                            suppress_tokens=self.published.forbidden)
        return ids[:, -tokens:].view(len(self.prompts), -1, tokens)

    def time(self, way: str, clock: Callable[[], float]) -> tuple[list[float], Tensor]:
        """(milliseconds between a token and the next, what was decoded)."""
        stamps = []

        def stamp(*_) -> None:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            stamps.append(clock())

        hooks = [each.qwen.lm_head.register_forward_hook(stamp) for each in (self.policy, self.published)]
        found = self.ways[way](self.sizes.max_tokens)
        for hook in hooks:
            hook.remove()
        return (np.diff(stamps) * 1e3).tolist(), found


class Counter(TorchDispatchMode):
    """Counts what is dispatched, views aside."""
    kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:      # in inference mode some that are made of others come as a whole
            parts = function.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        self.kernels += not (function.is_view or function.name() in NO_KERNEL)
        return function(*args, **(kwargs or {}))


def kernels_per_layer(sizes: Sizes) -> dict[str, int]:
    """Of each way, what one more layer adds to what one more token adds to all that is dispatched."""
    totals = {}
    for layers in (2, 3):
        decoders = Decoders(replace(sizes, layers=layers, grids=2, group_size=2))
        for way in ("ours", "plain", "generate"):
            for tokens in (3, 4):
                with Counter() as counter:
                    decoders.ways[way](tokens)
                totals[way, layers, tokens] = counter.kernels
    of = lambda way, layers: totals[way, layers, 4] - totals[way, layers, 3]
    return {way: of(way, 3) - of(way, 2) for way in ("ours", "plain", "generate")}


def compare(sizes: Sizes, clock: Callable[[], float]) -> dict:
    """Of each way the median milliseconds a token and the range of the rounds' medians, the median of the rounds'
    ratios to `generate`, and seconds of compiling; whether all ways decode the same tokens."""
    decoders, first = Decoders(sizes), {}
    for way in decoders.ways:
        began = time.perf_counter()
        decoders.ways[way](3 if way == "generate" else sizes.max_tokens)       # compiles for that length
        first[way] = time.perf_counter() - began
    rounds, answers = [], {}
    for _ in range(ROUNDS):
        found = {way: decoders.time(way, clock) for way in decoders.ways}
        answers = {way: tokens for way, (_, tokens) in found.items()}
        rounds.append({way: float(np.median(times)) for way, (times, _) in found.items()})
    of = {way: [each[way] for each in rounds] for way in decoders.ways}
    return {"milliseconds": {way: float(np.median(times)) for way, times in of.items()},
            "ranges": {way: [min(times), max(times)] for way, times in of.items()},
            "ratios": {way: float(np.median([each[way] / each["generate"] for each in rounds])) for way in of},
            "compile_seconds": first["compiled"] - first["ours"],
            "same": {way: (tokens == answers["ours"]).float().mean().item() for way, tokens in answers.items()}}


def rows_in_batches(lengths: np.ndarray, size: int) -> list[int]:
    """How many rows each step of decoding has when answers of so many tokens are sampled `size` at a time, and rows
    are dropped as grpo.rollout drops them."""
    found = []
    for i in range(0, len(lengths), size):
        left = torch.as_tensor(lengths[i:i + size])
        while len(left):
            found.append(len(left))
            left = left - 1
            kept = rows_to_keep((left > 0)[:, None]) if (left > 0).any() else (torch.tensor([], dtype=torch.long),)
            left = left if kept is None else left[kept[0]]
    return found


def rows_in_a_queue(lengths: np.ndarray, size: int) -> list[int]:
    """The same when the next query takes the place of each row that has stopped."""
    ends = []                       # when each row of the `size` is done
    for length in lengths.tolist():
        heapq.heappush(ends, length + (heapq.heappop(ends) if len(ends) == size else 0))
    return [sum(end > step for end in ends) for step in range(max(ends))]


def queueing(sizes: Sizes) -> dict:
    """How many times less decoding, and evaluation, would take if waiting queries took the place of rows that have
    stopped: with steps that cost as measured here for a few numbers of rows, and with the 3B model's as plan.py
    reckons them, where 16 rows cost what one does."""
    lengths = np.random.default_rng(sizes.seed).integers(LENGTHS[0], LENGTHS[1] + 1, QUERIES)
    counts, costs = (1, 4, 16), []
    for prompts in counts:
        decoders = Decoders(replace(sizes, prompts=prompts, group_size=1, max_tokens=24))
        decoders.ours(2)
        began = time.perf_counter()
        decoders.ours(1)
        prompt = (time.perf_counter() - began) / prompts                # seconds a prompt
        costs.append(float(np.median(decoders.time("ours", time.perf_counter)[0])) / 1e3)
    cost = lambda rows: np.interp(rows, counts, costs).sum()
    ways = lambda size: (rows_in_batches(lengths, size), rows_in_a_queue(lengths, size))
    gain = lambda before, after, fixed: {"decoding": before / after, "evaluation": (before + fixed) / (after + fixed)}
    found = {"here, 16 rows": gain(*map(cost, ways(16)), prompt * QUERIES)}
    qwen = shape(THE_3B)
    tokens, grid = plan.usual_prompt(30.0, TOTAL_PIXELS, 100)
    prompt = sum(plan.operations(qwen, tokens, grid, 1, 2)["prefill"].values()) / (plan.TFLOPS * 1e12)
    for size in (16, 128):
        found[f"3B as planned, {size} rows"] = gain(*(len(rows) * plan.token_seconds(qwen) for rows in ways(size)),
                                                    prompt * QUERIES)
    return {"gains": found, "seconds_by_rows": dict(zip(counts, costs))}


def measure(sizes: Sizes, narrow: Sizes | None = None) -> dict:
    """What `--decode` reports; `narrow` is the shape in which overhead is measured, by default NARROW."""
    narrow = narrow or replace(sizes, **NARROW)
    threads, caches = torch.get_num_threads(), torch._inductor.config.force_disable_caches
    torch._inductor.config.force_disable_caches = True      # else compiling costs nothing the second time
    try:
        torch.set_num_threads(1)
        kernels = kernels_per_layer(narrow)
        overhead = compare(narrow, time.perf_counter if DEVICE == "cuda" else time.thread_time)
        torch.set_num_threads(threads)
        arithmetic = compare(sizes, time.perf_counter)
    finally:
        torch.set_num_threads(threads)
        torch._inductor.config.force_disable_caches = caches
    print(f"{'ms a token':12}{'overhead':>10}{'range':>16}{'arithmetic':>12}{'range':>16}{'kernels a layer':>17}")
    for way in overhead["milliseconds"]:
        print(f"{way:12}" + "".join(f"{of['milliseconds'][way]:{width}.2f}{of['ranges'][way][0]:9.2f}-"
                                    f"{of['ranges'][way][1]:<6.2f}" for of, width in ((overhead, 10), (arithmetic, 12)))
              + f"{kernels.get(way, '-'):>17}")
    found = queueing(sizes)
    for name, gains in found["gains"].items():
        print(f"a queue instead of batches, {name}: " + ", ".join(f"{k} {v:.2f} times" for k, v in gains.items()))
    return {"overhead_ratio": overhead["ratios"]["ours"], "overhead_ratio_compiled": overhead["ratios"]["compiled"],
            "kernels_per_layer": kernels["ours"], "kernels": kernels, "decode_ratio": arithmetic["ratios"]["ours"],
            "microseconds_a_kernel": 1e3 * overhead["milliseconds"]["ours"] / narrow.layers / kernels["ours"],
            "overhead": overhead, "arithmetic": arithmetic, "queue": found}
