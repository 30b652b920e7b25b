"""What a step costs, on paper: parameters, operations and memory of a model of given shape, without running it.

    python -m lab.plan --model Qwen/Qwen2.5-VL-3B-Instruct --gpus 8 --gpu_memory 40 --prompts_per_step 8

Of a model it reads config.json alone; the published 3B and 7B are known here, so nothing is downloaded for them.

Operations are those of matrix products, 2 a multiply-add, and only those that the method cannot do without: a prompt
once for each of sampling, reference and policy, causal attention by its half, logits only where completions are. Memory
is that of train.py under FSDP2: fp32 master weights and AdamW states, bf16 compute, all spread over the GPUs; with
--lora_rank, frozen weights in bf16, whole on every GPU, and the adapters spread. The figures for activations and for
keys and values are checked against measured ones in test_plan.py, FSDP2's are not; with --lora_rank, the peak of whole
steps of one process is.
"""
import math
import os
from dataclasses import MISSING, dataclass

from transformers import Qwen2_5_VLConfig

import model
from engine import flags, lora, model_folder, video
from engine.flags import flag

VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
PUBLISHED = {"Qwen/Qwen2.5-VL-3B-Instruct": dict(
                 text_config=dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16,
                                  num_hidden_layers=36, num_key_value_heads=2, vocab_size=151936),
                 vision_config=VISION | dict(out_hidden_size=2048), tie_word_embeddings=True),
             "Qwen/Qwen2.5-VL-7B-Instruct": dict(
                 text_config=dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                                  num_hidden_layers=28, num_key_value_heads=4, vocab_size=152064),
                 vision_config=VISION | dict(out_hidden_size=3584), tie_word_embeddings=False)}
LIBRARIES = 1.5e9       # bytes of a GPU that CUDA, its libraries and the gaps between tensors take; a guess
TFLOPS = 60.0           # TFLOP/s that a GPU reaches, about a fifth of an A100's peak; an assumption
BANDWIDTH = 1e12        # bytes a second that decoding reads weights at, half to two thirds of what such GPUs have
KERNELS = 27            # launched for a layer and token, as bench.py --decode counts
LAUNCH = 4e-6           # seconds that each takes at least, measured there with layers that compute hardly anything


@dataclass
class Config:
    model: str = flag(MISSING, "folder of a Qwen2.5-VL or its name on the hub; only its config.json is read")
    gpus: int = flag(8, "GPUs of a node; with more nodes, each holds the same")
    gpu_memory: float = flag(80.0, "GB of each")
    tflops: float = flag(TFLOPS, "TFLOP/s that each reaches, about a fifth of an A100's peak; an assumption")
    group_size: int = flag(8, "G, and so on: flags of train.py, with its defaults")
    prompts_per_step: int = flag(4, "prompts in the global batch")
    micro_batch_size: int = flag(0, "prompts sampled and scored at once on a GPU, 0 for all")
    think: bool = flag(True, "thoughts before the answer")
    max_tokens: int = flag(None, "longest completion, by default 1024, without thoughts 64; all count as that long")
    total_pixels: int = flag(video.TOTAL_PIXELS, "pixels of all frames of a video")
    beta: float = flag(0.04, "weight of the KL term; 0 needs no reference model")
    num_iterations: int = flag(1, "AdamW steps a rollout")
    freeze_vision: bool = flag(False, "leave the vision tower as it is")
    lora_rank: int = flag(0, "train adapters of this rank beside frozen weights; 0: train all weights")
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass and compute it again")
    samples: int = flag(12404, "of an epoch; those of Charades-STA")
    seconds: float = flag(30.0, "length of a video, of 480 x 360 pixels, as in Charades")
    text_tokens: int = flag(100, "tokens of a prompt beside its video's, about")

    def __post_init__(self) -> None:
        if self.max_tokens is None:
            self.max_tokens = flags.LONGEST[self.think]


def parameters(config: Qwen2_5_VLConfig) -> dict[str, int]:
    """Number of weights by part; `layer` is one decoder layer, `layers` all. `total` counts tied embeddings once."""
    text, vision = config.text_config, config.vision_config
    h, kv = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * h + (h * h + h) + 2 * (h * kv + kv) + h * h + 3 * h * text.intermediate_size
    d, inner, merged = vision.hidden_size, vision.intermediate_size, vision.hidden_size * vision.spatial_merge_size ** 2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    block = 2 * d + 4 * (d * d + d) + 3 * d * inner + 2 * inner + d
    merger = d + merged * (merged + 1) + (merged + 1) * vision.out_hidden_size
    parts = {"vision": patch * d + vision.depth * block + merger, "embeddings": text.vocab_size * h,
             "layers": text.num_hidden_layers * layer + h,
             "head": 0 if config.tie_word_embeddings else text.vocab_size * h}
    return {**parts, "total": sum(parts.values()), "layer": layer}


def adapter_parameters(config: Qwen2_5_VLConfig, rank: int) -> int:
    """Number of weights of the adapters of one decoder layer: `rank` times the widths in and out of its seven linear
    layers."""
    text = config.text_config
    h, kv = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return rank * (2 * 2 * h + 2 * (h + kv) + 3 * (h + text.intermediate_size))


def windows(config: Qwen2_5_VLConfig, grid: tuple[int, int, int]) -> list[int]:
    """Patches in each of the vision tower's windows of a video of `grid` (t, h, w) patches."""
    merge = config.vision_config.spatial_merge_size
    side = config.vision_config.window_size // config.vision_config.patch_size // merge     # in merged tokens
    rows, columns = ([min(side, n // merge - i) for i in range(0, n // merge, side)] for n in grid[1:])
    return [r * c * merge ** 2 for r in rows for c in columns] * grid[0]


def forward_operations(config: Qwen2_5_VLConfig, prompt: int, grid: tuple[int, int, int], rows: int,
                       tokens: int) -> dict[str, int]:
    """Operations of one forward pass over a prompt of so many tokens, with a video of `grid` patches, and `rows`
    completions of `tokens` tokens, each of which sees the prompt and itself."""
    text, vision = config.text_config, config.vision_config
    sizes, n, frame = parameters(config), math.prod(grid), grid[1] * grid[2]
    d, merge = vision.hidden_size, vision.spatial_merge_size ** 2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    block = 2 * n * (4 * d * d + 3 * d * vision.intermediate_size)                          # of a block, linear
    full = len(vision.fullatt_block_indexes)
    pairs = full * grid[0] * frame ** 2 + (vision.depth - full) * sum(size ** 2 for size in windows(config, grid))
    h = text.hidden_size
    kv = h // text.num_attention_heads * text.num_key_value_heads
    linear = 2 * text.num_hidden_layers * (sizes["layer"] - 3 * h - 2 * kv)                 # of a token, without biases
    attention = 4 * text.num_hidden_layers * h                                              # of a (query, key) pair
    return {"vision": 2 * n * patch * d + vision.depth * block + 4 * d * pairs
            + 2 * n // merge * d * merge * (d * merge + vision.out_hidden_size),
            "prompt": prompt * linear + attention * prompt * (prompt + 1) // 2,
            "completions": rows * tokens * linear + attention * rows * tokens * (2 * prompt + tokens + 1) // 2,
            "logits": 2 * rows * tokens * h * text.vocab_size}


def operations(config: Qwen2_5_VLConfig, prompt: int, grid: tuple[int, int, int], group_size: int, tokens: int,
               reference: bool = True, freeze_vision: bool = False, lora: bool = False,
               updates: int = 1) -> dict[str, dict[str, int]]:
    """{phase: {part: operations}} of a GRPO step on one prompt. A backward pass costs two forward ones, or with `lora`
    one, since frozen weights have no gradients; those of the adapters, about a percent, are left out. What a frozen
    vision tower sees while sampling serves for reference and policy, too. Each of the `updates` scores the policy."""
    once = forward_operations(config, prompt, grid, group_size, tokens)
    decoded = forward_operations(config, prompt, grid, group_size, tokens - 1)              # nothing follows the last
    phases = {"prefill": {"vision": once["vision"], "prompt": once["prompt"]},
              "decode": {"completions": decoded["completions"], "logits": once["logits"]}}
    scored = {part: count for part, count in once.items() if part != "vision" or not freeze_vision}
    if reference:
        phases["reference"] = scored
    phases["policy"] = {part: (2 if lora else 3) * updates * count for part, count in scored.items()}
    return phases


def cache_bytes(config: Qwen2_5_VLConfig, prompt: int, rows: int, tokens: int, size: int = 2) -> int:
    """Keys and values while sampling, in numbers of `size` bytes: the prompt's once, and each row's in room for its
    longest completion; `prompt` and `tokens` are lengths."""
    text = config.text_config
    kv = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return 2 * size * text.num_hidden_layers * kv * (prompt + rows * tokens)


def joined_bytes(config: Qwen2_5_VLConfig, size: int = 2) -> int:
    """The copies of each layer's query, key and value weights side by side, made for sampling (engine.sampling)."""
    text = config.text_config
    kv = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return size * text.num_hidden_layers * text.hidden_size * (text.hidden_size + 2 * kv)


def work_bytes(config: Qwen2_5_VLConfig, prompt: int) -> int:
    """What a layer works with while a prompt runs: its widest part, four times, in bf16."""
    return 2 * 4 * prompt * config.text_config.intermediate_size


def prompts_that_fit(config: Qwen2_5_VLConfig, room: float, prompt: int, rows: int, tokens: int) -> int:
    """How many prompts of so many tokens, with `rows` completions each, can be sampled at once in `room` bytes, which
    the weights have left."""
    one = cache_bytes(config, prompt, rows, tokens) + work_bytes(config, prompt)
    return max(0, int(room - joined_bytes(config)) // one)


def token_seconds(config: Qwen2_5_VLConfig) -> float:
    """A token of any number of rows, as far as they are few enough: the weights are read, and kernels are
    launched one by one; added, as if the two did not overlap."""
    launches = config.text_config.num_hidden_layers * KERNELS * LAUNCH
    return 2 * parameters(config)["total"] / BANDWIDTH + launches


def activation_bytes(config: Qwen2_5_VLConfig, prompt: int, grid: tuple[int, int, int], group_size: int, tokens: int,
                     size: int = 2, freeze_vision: bool = False, recompute: bool = False,
                     rank: int = 0) -> tuple[int, int]:
    """(bytes that the forward pass keeps for the backward one, logits aside; bytes that a layer's backward pass works
    with). Numbers have `size` bytes, 4 in the input of a norm. `recompute` keeps only the input of every layer. With
    `rank`, of adapters, all other weights are frozen."""
    text, vision, n, patches = config.text_config, config.vision_config, prompt + group_size * tokens, math.prod(grid)
    h, kv = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * n * h * (4 + 2 * size)                                          # both norms: in, normalised, out
    layer += size * (n * (3 * h + 2 * kv) + group_size * tokens * h)            # q, k, v, attention's results
    layer += size * 2 * kv * group_size * (prompt + tokens)                     # k, v of prompt and completion together
    layer += size * 4 * n * text.intermediate_size                              # gate, its silu, up, their product
    if rank:
        layer += size * n * (7 * rank - 2 * h)      # A x of each linear layer; not what norms normalised: no gradient
    d, full = vision.hidden_size, len(vision.fullatt_block_indexes)
    block = 0 if freeze_vision else patches * (2 * d * (4 + 2 * size) + size * (5 * d + 4 * vision.intermediate_size))
    layers, blocks = text.num_hidden_layers * layer, vision.depth * block + full * 2 * patches * d * size
    if recompute:
        layers, blocks = text.num_hidden_layers * n * h * size, vision.depth * patches * d * size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    tower = 0 if freeze_vision else blocks + patches * (patch * size + d * (4 + 4 * size))      # patches, merger
    return layers + tower + n * h * (4 + size) + group_size * tokens * h * size, \
        max(layer + (2 if rank else 3) * size * n * text.intermediate_size,
            block + 3 * size * patches * vision.intermediate_size)


def memory(config: Qwen2_5_VLConfig, prompt: int, grid: tuple[int, int, int], group_size: int, tokens: int, gpus: int,
           prompts: int = 1, reference: bool = True, freeze_vision: bool = False, recompute: bool = False,
           size: int = 2, rank: int = 0) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes}} on each of `gpus` GPUs with `prompts` prompts a pass; "always" adds to each other.
    `size`: bytes of the numbers that are computed with; `rank`: of adapters, 0 trains all weights."""
    sizes, text = parameters(config), config.text_config
    spread = sizes["total"]                                                                 # over the GPUs by FSDP
    trained = spread - (sizes["vision"] if freeze_vision else 0)
    root = sizes["embeddings"] + sizes["head"]
    largest = max(sizes["layer"], root, 0 if freeze_vision else sizes["vision"])            # unit of FSDP
    if rank:
        root, largest = 0, adapter_parameters(config, rank)
        spread = trained = text.num_hidden_layers * largest
    logits = min(prompts * group_size * tokens * text.vocab_size, model.LOGITS_AT_ONCE)
    kept, layer = activation_bytes(config, prompt, grid, group_size, tokens, size, freeze_vision or rank > 0,
                                   recompute, rank)
    return {
        "always": {"frozen weights, bf16": 2 * sizes["total"] if rank else 0,
                   "adapters, fp32" if rank else "master weights, fp32": 4 * spread / gpus,
                   "AdamW states, fp32": 8 * trained / gpus, "gradients, fp32": 4 * trained / gpus,
                   "reference, bf16": 2 * sizes["total"] / gpus if reference and not rank else 0},
        "sampling": {"gathered weights, bf16": 2 * spread,
                     "KV cache": prompts * cache_bytes(config, prompt, group_size, tokens, size),
                     "q, k, v weights joined": 0 if rank else joined_bytes(config, size),
                     "one layer at work": prompts * work_bytes(config, prompt)},
        "scoring": {"activations": prompts * kept,      # then log-softmax and two gradients, later a layer's own
                    "logits, then a layer": max(3 * 4 * logits, prompts * layer * recompute),
                    "gathered units, bf16": 2 * (root + 2 * largest), "largest unit's gradient": 6 * largest},
        "optimizer": {"AdamW's temporaries": 4 * trained / gpus}}


def peak(parts: dict[str, dict[str, float]]) -> float:
    """Bytes of the phase that needs most."""
    need = {phase: sum(of.values()) for phase, of in parts.items()}
    return need.pop("always") + max(need.values())


def check_flags(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    flags.check_numbers(config, "gpus", "gpu_memory", "tflops", "prompts_per_step", "max_tokens", "total_pixels",
                         "samples", "seconds", "num_iterations")
    if config.group_size < 2:
        raise ValueError(f"--group_size {config.group_size}: a group is compared with itself and needs at least 2")
    lora.check_rank(config.lora_rank)
    config_of(config.model)


def config_of(name: str) -> Qwen2_5_VLConfig:
    """The config of a model of PUBLISHED, or of a folder or another name. Raises ModelError where it has none that can
    be used."""
    if name.partition("@")[0] in PUBLISHED and not os.path.exists(name):
        return Qwen2_5_VLConfig(**PUBLISHED[name.partition("@")[0]])
    return model_folder.read_config(lora.base(model_folder.local_folder(name, config_only=True)))


def usual_prompt(seconds: float, total_pixels: int, text: int) -> tuple[int, tuple[int, int, int]]:
    """(tokens, grid) of a prompt of so many tokens beside its video, one of 480 x 360 pixels and so many seconds."""
    frames = video.frame_count(seconds, 10 ** 9)
    height, width = video.frame_size(360, 480, frames, total_pixels)
    grid = frames // 2, height // model.PATCH, width // model.PATCH
    return math.prod(grid) // model.MERGE ** 2 + text, grid


def report(config: Config) -> str:
    """What it takes to train `config.model`, as text: memory a GPU by part (GB of 10^9 bytes), the largest group that
    fits into it, operations, hours."""
    gpus, tokens, beta, rank = config.gpus, config.max_tokens, config.beta, config.lora_rank
    freeze = config.freeze_vision or rank > 0
    qwen = config_of(config.model)
    prompt, grid = usual_prompt(config.seconds, config.total_pixels, config.text_tokens)
    mine = math.ceil(config.prompts_per_step / gpus)
    at_once = min(config.micro_batch_size or mine, mine)
    room = config.gpu_memory * 1e9 - LIBRARIES
    need = lambda size, recompute: memory(qwen, prompt, grid, size, tokens, gpus, at_once, beta > 0, freeze, recompute,
                                          rank=rank)

    def largest(recompute: bool) -> str:
        fits = [size for size in range(2, 257) if peak(need(size, recompute)) <= room]
        return f"{fits[-1]}{' or more' if fits[-1] == 256 else ''}" if fits else "none"

    parts, sizes = need(config.group_size, config.gradient_checkpointing), parameters(qwen)
    total = peak(parts)
    lines = [f"{config.model}: {sizes['total'] / 1e9:.2f} billion weights, {sizes['vision'] / 1e9:.2f} in the vision "
             "tower",
             f"{gpus} GPU(s), {at_once} prompt(s) of {prompt} tokens a pass ({config.seconds:g} s of video, "
             f"{2 * grid[0]} frames of {grid[2] * model.PATCH} x {grid[1] * model.PATCH}), G = {config.group_size}, up "
             f"to {tokens} tokens a completion", "",
             "GB a GPU"]
    if rank:
        learned = qwen.text_config.num_hidden_layers * adapter_parameters(qwen, rank)
        lines[0] += f"; {learned / 1e6:.1f} million in adapters of rank {rank}, the only ones that learn"
    if config.prompts_per_step % gpus:
        lines.insert(2, f"train.py needs a --prompts_per_step that is a multiple of the GPUs, {mine * gpus} instead of "
                        f"{config.prompts_per_step}")
    for phase, of in parts.items():
        lines += [f"  {phase:10} {part:26}{size / 1e9:8.2f}" for part, size in of.items() if size]
    lines += [f"  {'at most':10} {'always + largest phase':26}{total / 1e9:8.2f}, and {LIBRARIES / 1e9:g} for CUDA",
              f"{'fits' if total <= room else 'DOES NOT FIT'} into {config.gpu_memory:g} GB; the largest group that "
              f"fits: {largest(config.gradient_checkpointing)}"
              + ("" if config.gradient_checkpointing else f", with --gradient_checkpointing {largest(True)}")]
    weights = sum(parts["always"].values()) + parts["sampling"]["gathered weights, bf16"]
    fit = lambda used, size: prompts_that_fit(qwen, room - used, prompt, size, tokens)
    prompts, queries = fit(weights, config.group_size), fit(2 * sizes["total"], 1)
    lines.append(f"beside the weights {prompts * config.group_size} rows can be sampled at once, {prompts} prompts of "
                 f"{config.group_size} (scoring may need more); in evaluation {queries} queries, if as long")
    phases = operations(qwen, prompt, grid, config.group_size, tokens, beta > 0, freeze, rank > 0, config.num_iterations)
    work = {phase: mine * sum(of.values()) / (config.tflops * 1e12) for phase, of in phases.items()}        # seconds
    work["decode"] = max(work["decode"], math.ceil(mine / at_once) * tokens * token_seconds(qwen))
    work["policy"] *= 1 + 1 / (2 if rank else 3) if config.gradient_checkpointing else 1
    hours = sum(work.values()) * config.samples / config.prompts_per_step / 3600
    flop = sum(sum(of.values()) for of in phases.values()) * config.prompts_per_step
    lines += ["", f"{flop / 1e12:.0f} TFLOP a step, "
              + ", ".join(f"{phase} {value:.1f} s" for phase, value in work.items()),
              f"{hours:.0f} hours an epoch of {config.samples} samples, at {config.tflops:g} TFLOP/s a GPU, and "
              f"weights read once a token at {BANDWIDTH / 1e12:g} TB/s (both assumed, not measured: an A100 has at "
              "most 312 and 1.6 to 2)"]
    lines[-1] += f", and {KERNELS} kernels a layer and token launched in {LAUNCH * 1e6:g} us each (measured on a CPU)"
    return "\n".join(lines)


def main(config: Config) -> None:
    check_flags(config)
    print(report(config))


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
