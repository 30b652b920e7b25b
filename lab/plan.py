"""What a GRPO step costs, estimated from the shapes of a model: parameters, operations, memory. Nothing is run.

    python -m lab.plan --model Qwen/Qwen2.5-VL-3B-Instruct --gpus 8 --gpu_memory 40 --prompts_per_step 8

Only a model's config.json is read; the published 3B and 7B are known here, so nothing is downloaded for them.

Operations are those of matrix products, 2 per multiply-add, and only those that the method cannot do without: each
prompt once for sampling, once for the reference and once for the policy; half of the causal attention; logits only
where completions are.

Memory is that of train.py under FSDP2: fp32 master weights and AdamW states, bf16 compute, all spread over the GPUs.
With --lora_rank, frozen weights are whole on every GPU in bf16, and the adapters are spread. The figures for
activations, for keys and values, and for whole steps with --lora_rank in one process are checked against measured ones
in tests/test_plan.py; those of FSDP2 are not.
"""
import math
import os
from dataclasses import MISSING, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import model
from engine import flags, lora, model_folder, video
from engine.flags import AnswerFlags, flag

VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": dict(
        text_config=dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16,
                         num_hidden_layers=36, num_key_value_heads=2, vocab_size=151936),
        vision_config=VISION | dict(out_hidden_size=2048), tie_word_embeddings=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": dict(
        text_config=dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                         num_hidden_layers=28, num_key_value_heads=4, vocab_size=152064),
        vision_config=VISION | dict(out_hidden_size=3584), tie_word_embeddings=False)}
# Assumed, not measured:
LIBRARIES = 1.5e9       # bytes of a GPU that CUDA, its libraries and the gaps between tensors take
TFLOPS = 60.0           # TFLOP/s that a GPU reaches, about a fifth of an A100's peak
BANDWIDTH = 1e12        # bytes of weights that decoding reads per second; an A100 has 1.6e12 to 2e12
# Measured on a CPU by bench.py --decode:
KERNELS = 27            # launched per layer and token
LAUNCH = 4e-6           # seconds that each takes at least

LARGEST_GROUP = 256     # larger groups are not tried


@dataclass(kw_only=True)
class Config(AnswerFlags):
    """what is estimated; flags that train.py has, too, have its defaults"""
    model: str = flag(MISSING, "folder of a Qwen2.5-VL or its name on the hub; only its "
                               "config.json is read")
    gpus: int = flag(8, "GPUs per node; with more nodes, each holds the same")
    gpu_memory: float = flag(80.0, "GB of each")
    tflops: float = flag(TFLOPS, "TFLOP/s that each reaches, about a fifth of an A100's peak; assumed")
    group_size: int = flag(8, "G, completions per prompt")
    prompts_per_step: int = flag(4, "prompts in the global batch")
    micro_batch_size: int = flag(0, "prompts sampled and scored at once on a GPU, 0 for all")
    total_pixels: int = flag(flags.TOTAL_PIXELS, "pixels of all frames of a video")
    beta: float = flag(0.04, "weight of the KL term; 0 needs no reference model")
    num_iterations: int = flag(1, "AdamW steps per rollout")
    freeze_vision: bool = flag(False, "leave the vision tower as it is")
    lora_rank: int = flag(0, "train adapters of this rank beside frozen weights; 0: all weights")
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass, compute it again")
    samples: int = flag(12404, "of an epoch; those of Charades-STA")
    seconds: float = flag(30.0, "length of a video, of 480 x 360 pixels, as in Charades")
    text_tokens: int = flag(100, "tokens of a prompt beside its video's, about")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its cost depends on. Weights are counted in transformers' own modules."""
    text: Any               # its config's text_config
    vision: Any             # and vision_config
    total: int              # weights of the whole model, tied embeddings counted once
    tower: int              # in the vision tower
    root: int               # in embeddings and head
    layer: int              # in one decoder layer
    layer_matrices: int     # in the linear layers of one decoder layer, without biases
    layer_widths: int       # numbers that go into and come out of these linear layers, per token
    tower_matrices: int     # in the vision tower's linear layers that work on patches
    merger_matrices: int    # in those that work on merged patches
    keys: int               # numbers in the keys of one token and layer; its values have as many
    patch: int              # numbers in one patch of a video


@dataclass(frozen=True)
class Step:
    """A GRPO step on one GPU, as far as its cost depends on it. Every completion counts as long as the longest."""
    prompt: int                         # tokens of a prompt
    grid: tuple[int, int, int]          # patches of its video: t, h, w
    group_size: int                     # completions per prompt
    tokens: int                         # of each completion
    prompts: int = 1                    # sampled and scored at once
    gpus: int = 1
    reference: bool = True
    freeze_vision: bool = False
    lora_rank: int = 0                  # of adapters; 0 trains all weights
    gradient_checkpointing: bool = False
    num_iterations: int = 1             # AdamW steps per rollout
    number_bytes: int = 2               # of the numbers that are computed with

    @property
    def frozen_tower(self) -> bool:
        return self.freeze_vision or self.lora_rank > 0

    @property
    def completions(self) -> int:
        """Tokens of a prompt's completions."""
        return self.group_size * self.tokens


@dataclass(frozen=True)
class Estimate:
    """What a step costs, and an epoch."""
    shape: Shape
    step: Step
    prompts: int                                # per step and GPU
    memory: dict[str, dict[str, float]]         # see `memory`
    operations: dict[str, dict[str, int]]       # of one prompt; see `operations`
    seconds: dict[str, float]                   # by phase
    peak: float                                 # bytes of a GPU
    room: float                                 # bytes of a GPU without LIBRARIES
    hours: float                                # per epoch


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers."""
    return [each.weight for each in module.modules() if isinstance(each, nn.Linear)]


def count_matrices(module: nn.Module) -> int:
    return sum(weight.numel() for weight in matrices(module))


def shape_of(config: Qwen2_5_VLConfig) -> Shape:
    """The Shape of a config; nothing takes memory on the device "meta"."""
    with torch.device("meta"):
        qwen = Qwen2_5_VLForConditionalGeneration(config)
    qwen.tie_weights()
    text, vision, tower = config.text_config, config.vision_config, qwen.model.visual
    layer = qwen.model.language_model.layers[0]
    total, in_tower = count(qwen), count(tower)
    root = total - in_tower - count(qwen.model.language_model.layers) - text.hidden_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    embed_patches = patch * vision.hidden_size
    return Shape(
        text, vision, total, in_tower, root, count(layer),
        layer_matrices=count_matrices(layer),
        layer_widths=sum(sum(weight.shape) for weight in matrices(layer)),
        tower_matrices=count_matrices(tower.blocks) + embed_patches,
        merger_matrices=count_matrices(tower.merger),
        keys=text.hidden_size // text.num_attention_heads * text.num_key_value_heads,
        patch=patch)


def windows(shape: Shape, grid: tuple[int, int, int]) -> list[int]:
    """Patches in each of the vision tower's windows of a video of `grid` (t, h, w) patches."""
    merge = shape.vision.spatial_merge_size
    side = shape.vision.window_size // shape.vision.patch_size // merge     # in merged tokens
    height, width = grid[1] // merge, grid[2] // merge
    sizes = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            tokens = min(side, height - top) * min(side, width - left)
            sizes.append(tokens * merge ** 2)
    return sizes * grid[0]


def forward_operations(shape: Shape, step: Step) -> dict[str, int]:
    """Operations of one forward pass over a prompt and its completions, each of which sees the prompt and itself."""
    text, vision = shape.text, shape.vision
    patches, frame = math.prod(step.grid), step.grid[1] * step.grid[2]
    full = len(vision.fullatt_block_indexes)                    # blocks that attend to whole frames
    pairs_full = step.grid[0] * frame ** 2                      # (query, key) pairs of a block
    pairs_windows = sum(size ** 2 for size in windows(shape, step.grid))
    pairs = full * pairs_full + (vision.depth - full) * pairs_windows
    merged = patches // vision.spatial_merge_size ** 2
    tower = 2 * patches * shape.tower_matrices + 2 * merged * shape.merger_matrices
    tower += 4 * vision.hidden_size * pairs

    prompt, completions = step.prompt, step.completions
    linear = 2 * text.num_hidden_layers * shape.layer_matrices  # per token
    attention = 4 * text.num_hidden_layers * text.hidden_size   # per (query, key) pair
    pairs_prompt = prompt * (prompt + 1) // 2
    pairs_completions = completions * (2 * prompt + step.tokens + 1) // 2
    return {"vision": tower,
            "prompt": prompt * linear + attention * pairs_prompt,
            "completions": completions * linear + attention * pairs_completions,
            "logits": 2 * completions * text.hidden_size * text.vocab_size}


def operations(shape: Shape, step: Step) -> dict[str, dict[str, int]]:
    """{phase: {component: operations}} of a GRPO step on one prompt.

    A backward pass costs two forward ones, with adapters one, since frozen weights have no gradients; the operations of
    adapters themselves, about a percent, are left out. What a frozen vision tower makes of a video while sampling
    serves for reference and policy, too. The policy is scored once per AdamW step.
    """
    once = forward_operations(shape, step)
    but_last = replace(step, tokens=step.tokens - 1)            # nothing follows the last token
    decoded = forward_operations(shape, but_last)
    scored = dict(once)
    if step.frozen_tower:
        del scored["vision"]
    passes = (2 if step.lora_rank else 3) * step.num_iterations
    phases = {"prefill": {"vision": once["vision"], "prompt": once["prompt"]},
              "decode": {"completions": decoded["completions"], "logits": once["logits"]}}
    if step.reference:
        phases["reference"] = scored
    phases["policy"] = {component: passes * number for component, number in scored.items()}
    return phases


def cache_bytes(shape: Shape, step: Step) -> int:
    """Keys and values of one prompt while sampling: the prompt's once, and each completion's at its full length."""
    per_token = 2 * shape.keys * shape.text.num_hidden_layers
    return step.number_bytes * per_token * (step.prompt + step.completions)


def joined_bytes(shape: Shape, number_bytes: int = 2) -> int:
    """The copies of each layer's query, key and value weights side by side, made for sampling (engine.sampling)."""
    h = shape.text.hidden_size
    return number_bytes * shape.text.num_hidden_layers * h * (h + 2 * shape.keys)


def work_bytes(shape: Shape, prompt: int) -> int:
    """What a layer works with while a prompt of so many tokens runs: its widest tensor, four times, in bf16."""
    return 2 * 4 * prompt * shape.text.intermediate_size


def queries_that_fit(shape: Shape, step: Step, room: float) -> int:
    """How many queries, of one completion each, can be evaluated at once on a GPU with `room` bytes."""
    left = room - 2 * shape.total - joined_bytes(shape)
    one_query = cache_bytes(shape, replace(step, group_size=1)) + work_bytes(shape, step.prompt)
    return max(0, int(left // one_query))


def token_seconds(shape: Shape) -> float:
    """Seconds for one token of any number of rows, as far as they are few enough: the weights are read, and kernels
    are launched one by one. The two are added, as if they did not overlap."""
    reading = 2 * shape.total / BANDWIDTH
    launching = shape.text.num_hidden_layers * KERNELS * LAUNCH
    return reading + launching


def layer_bytes(shape: Shape, step: Step) -> int:
    """What a decoder layer keeps of a prompt and its completions for its backward pass. Numbers have
    step.number_bytes, 4 in the input of a norm."""
    size, h = step.number_bytes, shape.text.hidden_size
    n = step.prompt + step.completions
    both_norms = 2 * h * (4 + 2 * size)                         # in, normalised, out; all per token
    attention = size * (3 * h + 2 * shape.keys)                 # q, k, v, results
    mlp = size * 4 * shape.text.intermediate_size               # gate, its silu, up, their product
    adapters = 0
    if step.lora_rank:      # A x of each linear layer; not what norms normalised, which learn nothing
        adapters = size * (7 * step.lora_rank - 2 * h)
    per_token = both_norms + attention + mlp + adapters
    # keys and values of prompt and completion side by side
    prefixes = size * 2 * shape.keys * step.group_size * (step.prompt + step.tokens)
    return n * per_token + prefixes + size * step.completions * h


def tower_bytes(shape: Shape, step: Step) -> tuple[int, int]:
    """(what the vision tower keeps of a video for its backward pass, what one of its blocks keeps); 0 where frozen."""
    if step.frozen_tower:
        return 0, 0
    size, vision, d = step.number_bytes, shape.vision, shape.vision.hidden_size
    both_norms = 2 * d * (4 + 2 * size)                         # all per patch
    block = both_norms + size * (5 * d + 4 * vision.intermediate_size)
    if step.gradient_checkpointing:
        blocks = vision.depth * d * size
    else:
        blocks = vision.depth * block + len(vision.fullatt_block_indexes) * 2 * d * size
    ends = shape.patch * size + d * (4 + 4 * size)              # patches and merger
    patches = math.prod(step.grid)
    return patches * (blocks + ends), patches * block


def activation_bytes(shape: Shape, step: Step) -> tuple[int, int]:
    """(bytes that the forward pass over a prompt keeps for the backward one, logits aside; bytes that the backward pass
    of one layer works with). With gradient checkpointing only the input of every layer is kept."""
    size, h = step.number_bytes, shape.text.hidden_size
    n = step.prompt + step.completions
    layer = layer_bytes(shape, step)
    tower, block = tower_bytes(shape, step)
    kept_per_layer = n * h * size if step.gradient_checkpointing else layer
    last = n * h * (4 + size) + step.completions * h * size
    temporaries = 2 if step.lora_rank else 3
    layer += temporaries * size * n * shape.text.intermediate_size
    block += 3 * size * math.prod(step.grid) * shape.vision.intermediate_size
    return shape.text.num_hidden_layers * kept_per_layer + tower + last, max(layer, block)


def memory(shape: Shape, step: Step) -> dict[str, dict[str, float]]:
    """{phase: {component: bytes}} on one GPU. "always" adds to each of the others."""
    if step.lora_rank:
        root, unit = 0, step.lora_rank * shape.layer_widths     # FSDP gathers a layer's adapters
        spread = trained = shape.text.num_hidden_layers * unit
        always = {"frozen weights, bf16": 2 * shape.total, "adapters, fp32": 4 * spread / step.gpus}
    else:
        root, unit = shape.root, max(shape.layer, shape.root, shape.tower)
        spread = trained = shape.total
        if step.freeze_vision:
            trained -= shape.tower
            unit = max(shape.layer, shape.root)
        always = {"master weights, fp32": 4 * spread / step.gpus}
    always["AdamW states, fp32"] = 8 * trained / step.gpus
    always["gradients, fp32"] = 4 * trained / step.gpus
    if step.reference and not step.lora_rank:
        always["reference, bf16"] = 2 * shape.total / step.gpus

    sampling = {"gathered weights, bf16": 2 * spread,
                "KV cache": step.prompts * cache_bytes(shape, step)}
    if not step.lora_rank:
        sampling["q, k, v weights joined"] = joined_bytes(shape, step.number_bytes)
    sampling["one layer at work"] = step.prompts * work_bytes(shape, step.prompt)

    kept, layer_at_work = activation_bytes(shape, step)
    logits = step.prompts * step.completions * shape.text.vocab_size
    after = 3 * 4 * min(logits, model.LOGITS_AT_ONCE)           # log-softmax and two gradients
    if step.gradient_checkpointing:
        after = max(after, step.prompts * layer_at_work)        # later, a layer's own
    scoring = {"activations": step.prompts * kept, "logits, then a layer": after,
               "gathered units, bf16": 2 * (root + 2 * unit), "largest unit's gradient": 6 * unit}
    return {"always": always, "sampling": sampling, "scoring": scoring,
            "optimizer": {"AdamW's temporaries": 4 * trained / step.gpus}}


def peak(components: dict[str, dict[str, float]]) -> float:
    """Bytes of the phase that needs most, of what `memory` gives."""
    sums = {phase: sum(sizes.values()) for phase, sizes in components.items()}
    always = sums.pop("always")
    return always + max(sums.values())


def largest_group(estimated: Estimate, gradient_checkpointing: bool) -> str:
    """The largest group that fits, in words."""
    step = replace(estimated.step, gradient_checkpointing=gradient_checkpointing)
    for size in range(LARGEST_GROUP, 1, -1):
        if peak(memory(estimated.shape, replace(step, group_size=size))) <= estimated.room:
            return f"{size} or more" if size == LARGEST_GROUP else str(size)
    return "none"


def check_flags(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    flags.check_numbers(config, "gpus", "gpu_memory", "tflops", "prompts_per_step", "max_tokens",
                        "total_pixels", "samples", "seconds", "num_iterations")
    if config.group_size < 2:
        raise ValueError(f"--group_size {config.group_size}: a group is compared with itself and "
                         "needs at least 2")
    lora.check_rank(config.lora_rank)


@lru_cache
def shape_of_model(name: str) -> Shape:
    return shape_of(config_of(name))


def config_of(name: str) -> Qwen2_5_VLConfig:
    """The config of a model of PUBLISHED, or of a folder or another name. Raises ModelError where it has none that can
    be used."""
    published = name.partition("@")[0]
    if published in PUBLISHED and not os.path.exists(name):
        return Qwen2_5_VLConfig(**PUBLISHED[published])
    folder = lora.base(model_folder.local_folder(name, config_only=True))
    return model_folder.read_config(folder)


def usual_prompt(seconds: float, total_pixels: int, text: int) -> tuple[int, tuple[int, int, int]]:
    """(tokens, grid) of a prompt of so many tokens beside its video, one of 480 x 360 pixels and so many seconds."""
    frames = video.frame_count(seconds, 10 ** 9)
    height, width = video.frame_size(360, 480, frames, total_pixels)
    grid = frames // 2, height // model.PATCH, width // model.PATCH
    return math.prod(grid) // model.MERGE ** 2 + text, grid


def estimate(config: Config) -> Estimate:
    """All that `report` says of a training run. Raises ValueError for flags or a model that cannot be used."""
    check_flags(config)
    shape = shape_of_model(config.model)
    prompt, grid = usual_prompt(config.seconds, config.total_pixels, config.text_tokens)
    prompts = math.ceil(config.prompts_per_step / config.gpus)
    at_once = min(config.micro_batch_size or prompts, prompts)
    step = Step(prompt, grid, config.group_size, config.max_tokens,
                prompts=at_once,
                gpus=config.gpus,
                reference=config.beta > 0,
                freeze_vision=config.freeze_vision,
                lora_rank=config.lora_rank,
                gradient_checkpointing=config.gradient_checkpointing,
                num_iterations=config.num_iterations)
    phases, components = operations(shape, step), memory(shape, step)
    seconds = {}
    for phase, counts in phases.items():
        seconds[phase] = prompts * sum(counts.values()) / (config.tflops * 1e12)
    tokens = math.ceil(prompts / at_once) * config.max_tokens
    seconds["decode"] = max(seconds["decode"], tokens * token_seconds(shape))
    if config.gradient_checkpointing:                       # one more forward pass
        seconds["policy"] *= 1 + 1 / (2 if config.lora_rank else 3)
    hours = sum(seconds.values()) * config.samples / config.prompts_per_step / 3600
    room = config.gpu_memory * 1e9 - LIBRARIES
    return Estimate(shape, step, prompts, components, phases, seconds, peak(components), room,
                    hours)


def report_memory(config: Config, estimated: Estimate) -> list[str]:
    """Lines: memory per GPU by component, GB of 10^9 bytes, the largest group, and what evaluation has room for."""
    lines = ["GB per GPU"]
    for phase, sizes in estimated.memory.items():
        for component, size in sizes.items():
            lines.append(f"  {phase:10} {component:26}{size / 1e9:8.2f}")
    lines.append(f"  {'at most':10} {'always + largest phase':26}{estimated.peak / 1e9:8.2f}, "
                 f"and {LIBRARIES / 1e9:g} for CUDA")
    verdict = "fits" if estimated.peak <= estimated.room else "DOES NOT FIT"
    groups = largest_group(estimated, config.gradient_checkpointing)
    if not config.gradient_checkpointing:
        groups += f", with --gradient_checkpointing {largest_group(estimated, True)}"
    queries = queries_that_fit(estimated.shape, estimated.step, estimated.room)
    lines.append(f"{verdict} into {config.gpu_memory:g} GB; the largest group that fits: {groups}")
    lines.append(f"evaluate.py has room for --batch_size {queries} of such prompts and completions")
    return lines


def report(config: Config) -> str:
    """What it is estimated to take to train `config.model`, as text: memory, the largest group, operations, hours."""
    estimated = estimate(config)
    shape, step = estimated.shape, estimated.step
    t, h, w = step.grid
    lines = ["estimated from a model's shape; nothing was run",
             f"{config.model}: {shape.total / 1e9:.2f} billion weights, "
             f"{shape.tower / 1e9:.2f} in the vision tower"]
    if step.lora_rank:
        learned = shape.text.num_hidden_layers * step.lora_rank * shape.layer_widths
        lines[-1] += (f"; {learned / 1e6:.1f} million in adapters of rank {step.lora_rank}, "
                      "the only ones that learn")
    lines.append(f"{step.gpus} GPU(s), {step.prompts} prompt(s) of {step.prompt} tokens at once "
                 f"({config.seconds:g} s of video, {2 * t} frames of "
                 f"{w * model.PATCH} x {h * model.PATCH}), "
                 f"G = {step.group_size}, up to {step.tokens} tokens per completion")
    if config.prompts_per_step % step.gpus:
        lines.append(f"train.py needs a --prompts_per_step that is a multiple of the GPUs, "
                     f"{estimated.prompts * step.gpus} instead of {config.prompts_per_step}")
    number = sum(sum(counts.values()) for counts in estimated.operations.values())
    tflop = number * config.prompts_per_step / 1e12
    phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in estimated.seconds.items())
    lines += ["", *report_memory(config, estimated), "", f"{tflop:.0f} TFLOP per step, {phases}"]
    lines.append(f"{estimated.hours:.0f} hours per epoch of {config.samples} samples, at "
                 f"{config.tflops:g} TFLOP/s per GPU, weights read once per token at "
                 f"{BANDWIDTH / 1e12:g} TB/s (both assumed, not measured: an A100 has at most 312 "
                 f"and 1.6 to 2), and {KERNELS} kernels per layer and token launched in "
                 f"{LAUNCH * 1e6:g} us each (measured on a CPU)")
    return "\n".join(lines)


def main(config: Config) -> None:
    print(report(config))


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
