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

from transformers import Qwen2_5_VLConfig

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
LIBRARIES = 1.5e9       # bytes of a GPU that CUDA, its libraries and the gaps between tensors take; a guess
TFLOPS = 60.0           # TFLOP/s that a GPU reaches, about a fifth of an A100's peak; an assumption
BANDWIDTH = 1e12        # bytes per second at which decoding reads weights, half to two thirds of what such GPUs have
KERNELS = 27            # launched per layer and token, as bench.py --decode counts
LAUNCH = 4e-6           # seconds that each takes at least, as bench.py --decode measures with very narrow layers
LARGEST_GROUP = 256     # larger groups are not tried


@dataclass(kw_only=True)
class Config(AnswerFlags):
    """what is estimated; flags that train.py has, too, have its defaults"""
    model: str = flag(MISSING, "folder of a Qwen2.5-VL or its name on the hub; only its config.json is read")
    gpus: int = flag(8, "GPUs per node; with more nodes, each holds the same")
    gpu_memory: float = flag(80.0, "GB of each")
    tflops: float = flag(TFLOPS, "TFLOP/s that each reaches, about a fifth of an A100's peak; an assumption")
    group_size: int = flag(8, "G, completions per prompt")
    prompts_per_step: int = flag(4, "prompts in the global batch")
    micro_batch_size: int = flag(0, "prompts sampled and scored at once on a GPU, 0 for all")
    total_pixels: int = flag(flags.TOTAL_PIXELS, "pixels of all frames of a video")
    beta: float = flag(0.04, "weight of the KL term; 0 needs no reference model")
    num_iterations: int = flag(1, "AdamW steps per rollout")
    freeze_vision: bool = flag(False, "leave the vision tower as it is")
    lora_rank: int = flag(0, "train adapters of this rank beside frozen weights; 0: train all weights")
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass and compute it again")
    samples: int = flag(12404, "of an epoch; those of Charades-STA")
    seconds: float = flag(30.0, "length of a video, of 480 x 360 pixels, as in Charades")
    text_tokens: int = flag(100, "tokens of a prompt beside its video's, about")


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


@dataclass(frozen=True)
class Estimate:
    """What a step costs, and an epoch."""
    qwen: Qwen2_5_VLConfig
    step: Step
    prompts: int                                # per step and GPU
    memory: dict[str, dict[str, float]]         # see `memory`
    operations: dict[str, dict[str, int]]       # of one prompt; see `operations`
    seconds: dict[str, float]                   # by phase
    peak: float                                 # bytes of a GPU
    room: float                                 # bytes of a GPU without LIBRARIES
    hours: float                                # per epoch


def key_width(qwen: Qwen2_5_VLConfig) -> int:
    """Numbers in the keys of one token and layer; its values have as many."""
    text = qwen.text_config
    return text.hidden_size // text.num_attention_heads * text.num_key_value_heads


def patch_width(qwen: Qwen2_5_VLConfig) -> int:
    """Numbers in one patch of a video."""
    vision = qwen.vision_config
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2


def parameters(qwen: Qwen2_5_VLConfig) -> dict[str, int]:
    """Number of weights by component; "layer" is one decoder layer, "layers" all of them. "total" counts tied
    embeddings once."""
    text, vision = qwen.text_config, qwen.vision_config
    h, kv = text.hidden_size, key_width(qwen)
    queries, keys, output = h * h + h, h * kv + kv, h * h
    layer = 2 * h + queries + 2 * keys + output + 3 * h * text.intermediate_size
    d, inner = vision.hidden_size, vision.intermediate_size
    merged = d * vision.spatial_merge_size ** 2
    block = 2 * d + 4 * (d * d + d) + 3 * d * inner + 2 * inner + d
    merger = d + merged * (merged + 1) + (merged + 1) * vision.out_hidden_size
    embeddings = text.vocab_size * h
    head = 0 if qwen.tie_word_embeddings else embeddings
    counts = {"vision": patch_width(qwen) * d + vision.depth * block + merger, "embeddings": embeddings,
              "layers": text.num_hidden_layers * layer + h, "head": head}
    return {**counts, "total": sum(counts.values()), "layer": layer}


def adapter_parameters(qwen: Qwen2_5_VLConfig, rank: int) -> int:
    """Number of weights of the adapters of one decoder layer: `rank` times the widths in and out of its seven linear
    layers."""
    h, kv, inner = qwen.text_config.hidden_size, key_width(qwen), qwen.text_config.intermediate_size
    queries_and_output = 2 * (h + h)
    keys_and_values = 2 * (h + kv)
    return rank * (queries_and_output + keys_and_values + 3 * (h + inner))


def windows(qwen: Qwen2_5_VLConfig, grid: tuple[int, int, int]) -> list[int]:
    """Patches in each of the vision tower's windows of a video of `grid` (t, h, w) patches."""
    vision = qwen.vision_config
    merge = vision.spatial_merge_size
    side = vision.window_size // vision.patch_size // merge         # of a window, in merged tokens
    height, width = grid[1] // merge, grid[2] // merge
    sizes = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            tokens = min(side, height - top) * min(side, width - left)
            sizes.append(tokens * merge ** 2)
    return sizes * grid[0]


def forward_operations(qwen: Qwen2_5_VLConfig, step: Step) -> dict[str, int]:
    """Operations of one forward pass over a prompt and its completions, each of which sees the prompt and itself."""
    text, vision = qwen.text_config, qwen.vision_config
    d, merge = vision.hidden_size, vision.spatial_merge_size ** 2
    patches, frame = math.prod(step.grid), step.grid[1] * step.grid[2]
    block = 2 * patches * (4 * d * d + 3 * d * vision.intermediate_size)    # linear layers of a block
    full = len(vision.fullatt_block_indexes)
    pairs_full = step.grid[0] * frame ** 2                                  # (query, key) pairs of a block
    pairs_windows = sum(size ** 2 for size in windows(qwen, step.grid))
    pairs = full * pairs_full + (vision.depth - full) * pairs_windows
    merger = 2 * patches // merge * d * merge * (d * merge + vision.out_hidden_size)

    h, kv, prompt, tokens = text.hidden_size, key_width(qwen), step.prompt, step.tokens
    weights = parameters(qwen)["layer"] - 3 * h - 2 * kv                    # without norms and biases
    linear = 2 * text.num_hidden_layers * weights                           # per token
    attention = 4 * text.num_hidden_layers * h                              # per (query, key) pair
    completions = step.group_size * tokens                                  # tokens of all completions
    pairs_completions = completions * (2 * prompt + tokens + 1) // 2
    return {"vision": 2 * patches * patch_width(qwen) * d + vision.depth * block + 4 * d * pairs + merger,
            "prompt": prompt * linear + attention * prompt * (prompt + 1) // 2,
            "completions": completions * linear + attention * pairs_completions,
            "logits": 2 * completions * h * text.vocab_size}


def operations(qwen: Qwen2_5_VLConfig, step: Step) -> dict[str, dict[str, int]]:
    """{phase: {component: operations}} of a GRPO step on one prompt.

    A backward pass costs two forward ones, with adapters one, since frozen weights have no gradients; the operations of
    adapters themselves, about a percent, are left out. What a frozen vision tower makes of a video while sampling
    serves for reference and policy, too. The policy is scored once per AdamW step.
    """
    once = forward_operations(qwen, step)
    decoded = forward_operations(qwen, replace(step, tokens=step.tokens - 1))   # nothing follows the last token
    scored = dict(once)
    if step.frozen_tower:
        del scored["vision"]
    passes = (2 if step.lora_rank else 3) * step.num_iterations
    phases = {"prefill": {"vision": once["vision"], "prompt": once["prompt"]},
              "decode": {"completions": decoded["completions"], "logits": once["logits"]}}
    if step.reference:
        phases["reference"] = scored
    phases["policy"] = {component: passes * count for component, count in scored.items()}
    return phases


def cache_bytes(qwen: Qwen2_5_VLConfig, step: Step) -> int:
    """Keys and values of one prompt while sampling: the prompt's once, and each completion's at its full length."""
    positions = step.prompt + step.group_size * step.tokens
    return 2 * step.number_bytes * qwen.text_config.num_hidden_layers * key_width(qwen) * positions


def joined_bytes(qwen: Qwen2_5_VLConfig, number_bytes: int = 2) -> int:
    """The copies of each layer's query, key and value weights side by side, made for sampling (engine.sampling)."""
    h = qwen.text_config.hidden_size
    return number_bytes * qwen.text_config.num_hidden_layers * h * (h + 2 * key_width(qwen))


def work_bytes(qwen: Qwen2_5_VLConfig, prompt: int) -> int:
    """What a layer works with while a prompt of so many tokens runs: its widest tensor, four times, in bf16."""
    return 2 * 4 * prompt * qwen.text_config.intermediate_size


def prompts_that_fit(qwen: Qwen2_5_VLConfig, step: Step, room: float) -> int:
    """How many prompts with their completions can be sampled at once in `room` bytes, which the weights have left."""
    one_prompt = cache_bytes(qwen, step) + work_bytes(qwen, step.prompt)
    left = int(room - joined_bytes(qwen))
    return max(left, 0) // one_prompt


def token_seconds(qwen: Qwen2_5_VLConfig) -> float:
    """Seconds for one token of any number of rows, as far as they are few enough: the weights are read, and kernels
    are launched one by one. The two are added, as if they did not overlap."""
    reading = 2 * parameters(qwen)["total"] / BANDWIDTH
    launching = qwen.text_config.num_hidden_layers * KERNELS * LAUNCH
    return reading + launching


def layer_bytes(qwen: Qwen2_5_VLConfig, step: Step) -> int:
    """What a decoder layer keeps of a prompt and its completions for its backward pass. Numbers have
    step.number_bytes, 4 in the input of a norm."""
    h, kv, inner = qwen.text_config.hidden_size, key_width(qwen), qwen.text_config.intermediate_size
    size, rank = step.number_bytes, step.lora_rank
    own = step.group_size * step.tokens                                     # tokens of the completions
    n = step.prompt + own
    norms = 2 * n * h * (4 + 2 * size)                                      # of both: in, normalised, out
    attention = size * (n * (3 * h + 2 * kv) + own * h)                     # q, k, v, results
    prefixes = size * 2 * kv * step.group_size * (step.prompt + step.tokens)    # k, v of prompt and completion
    mlp = size * 4 * n * inner                                              # gate, its silu, up, their product
    adapters = size * n * (7 * rank - 2 * h) if rank else 0     # A x of each; not what norms normalised: no gradient
    return norms + attention + prefixes + mlp + adapters


def tower_bytes(qwen: Qwen2_5_VLConfig, step: Step) -> tuple[int, int]:
    """(what the vision tower keeps of a video for its backward pass, what one of its blocks keeps); 0 where frozen."""
    if step.frozen_tower:
        return 0, 0
    vision, size, patches = qwen.vision_config, step.number_bytes, math.prod(step.grid)
    d = vision.hidden_size
    block = patches * (2 * d * (4 + 2 * size) + size * (5 * d + 4 * vision.intermediate_size))
    if step.gradient_checkpointing:
        blocks = vision.depth * patches * d * size
    else:
        blocks = vision.depth * block + len(vision.fullatt_block_indexes) * 2 * patches * d * size
    ends = patches * (patch_width(qwen) * size + d * (4 + 4 * size))        # patches and merger
    return blocks + ends, block


def activation_bytes(qwen: Qwen2_5_VLConfig, step: Step) -> tuple[int, int]:
    """(bytes that the forward pass over a prompt keeps for the backward one, logits aside; bytes that the backward pass
    of one layer works with). With gradient checkpointing only the input of every layer is kept."""
    text, size = qwen.text_config, step.number_bytes
    completions = step.group_size * step.tokens
    n = step.prompt + completions
    layer, (tower, block) = layer_bytes(qwen, step), tower_bytes(qwen, step)
    kept_per_layer = n * text.hidden_size * size if step.gradient_checkpointing else layer
    last = n * text.hidden_size * (4 + size) + completions * text.hidden_size * size
    kept = text.num_hidden_layers * kept_per_layer + tower + last
    temporaries = 2 if step.lora_rank else 3
    at_work = layer + temporaries * size * n * text.intermediate_size
    block_at_work = block + 3 * size * math.prod(step.grid) * qwen.vision_config.intermediate_size
    return kept, max(at_work, block_at_work)


def memory(qwen: Qwen2_5_VLConfig, step: Step) -> dict[str, dict[str, float]]:
    """{phase: {component: bytes}} on one GPU. "always" adds to each of the others."""
    sizes, gpus = parameters(qwen), step.gpus
    total = sizes["total"]
    if step.lora_rank:
        largest_unit, root_unit = adapter_parameters(qwen, step.lora_rank), 0
        spread = trained = qwen.text_config.num_hidden_layers * largest_unit
        always = {"frozen weights, bf16": 2 * total, "adapters, fp32": 4 * spread / gpus}
    else:
        spread, trained, root_unit = total, total, sizes["embeddings"] + sizes["head"]
        largest_unit = max(sizes["layer"], root_unit, sizes["vision"])      # of what FSDP gathers as one
        if step.freeze_vision:
            trained = total - sizes["vision"]
            largest_unit = max(sizes["layer"], root_unit)
        always = {"master weights, fp32": 4 * spread / gpus}
    always["AdamW states, fp32"] = 8 * trained / gpus
    always["gradients, fp32"] = 4 * trained / gpus
    if step.reference and not step.lora_rank:
        always["reference, bf16"] = 2 * total / gpus

    sampling = {"gathered weights, bf16": 2 * spread, "KV cache": step.prompts * cache_bytes(qwen, step)}
    if not step.lora_rank:
        sampling["q, k, v weights joined"] = joined_bytes(qwen, step.number_bytes)
    sampling["one layer at work"] = step.prompts * work_bytes(qwen, step.prompt)

    kept, layer_at_work = activation_bytes(qwen, step)
    logits = step.prompts * step.group_size * step.tokens * qwen.text_config.vocab_size
    after = 3 * 4 * min(logits, model.LOGITS_AT_ONCE)           # log-softmax and two gradients
    if step.gradient_checkpointing:
        after = max(after, step.prompts * layer_at_work)        # later, a layer's own
    scoring = {"activations": step.prompts * kept, "logits, then a layer": after,
               "gathered units, bf16": 2 * (root_unit + 2 * largest_unit),
               "largest unit's gradient": 6 * largest_unit}
    return {"always": always, "sampling": sampling, "scoring": scoring,
            "optimizer": {"AdamW's temporaries": 4 * trained / gpus}}


def peak(components: dict[str, dict[str, float]]) -> float:
    """Bytes of the phase that needs most, of what `memory` gives."""
    sums = {phase: sum(sizes.values()) for phase, sizes in components.items()}
    always = sums.pop("always")
    return always + max(sums.values())


def largest_group(estimate: Estimate, gradient_checkpointing: bool) -> str:
    """The largest group that fits, in words."""
    step = replace(estimate.step, gradient_checkpointing=gradient_checkpointing)
    largest = 0
    for size in range(2, LARGEST_GROUP + 1):
        if peak(memory(estimate.qwen, replace(step, group_size=size))) <= estimate.room:
            largest = size
    if largest == LARGEST_GROUP:
        return f"{largest} or more"
    return str(largest) if largest else "none"


def check_flags(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    flags.check_numbers(config, "gpus", "gpu_memory", "tflops", "prompts_per_step", "max_tokens", "total_pixels",
                        "samples", "seconds", "num_iterations")
    if config.group_size < 2:
        raise ValueError(f"--group_size {config.group_size}: a group is compared with itself and needs at least 2")
    lora.check_rank(config.lora_rank)


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
    qwen = config_of(config.model)
    prompt, grid = usual_prompt(config.seconds, config.total_pixels, config.text_tokens)
    prompts = math.ceil(config.prompts_per_step / config.gpus)
    at_once = min(config.micro_batch_size or prompts, prompts)
    step = Step(prompt, grid, config.group_size, config.max_tokens, at_once, config.gpus, config.beta > 0,
                config.freeze_vision, config.lora_rank, config.gradient_checkpointing, config.num_iterations)
    phases, components = operations(qwen, step), memory(qwen, step)
    seconds = {}
    for phase, counts in phases.items():
        seconds[phase] = prompts * sum(counts.values()) / (config.tflops * 1e12)
    batches = math.ceil(prompts / at_once)
    seconds["decode"] = max(seconds["decode"], batches * config.max_tokens * token_seconds(qwen))
    if config.gradient_checkpointing:                       # one more forward pass
        seconds["policy"] *= 1 + 1 / (2 if config.lora_rank else 3)
    hours = sum(seconds.values()) * config.samples / config.prompts_per_step / 3600
    room = config.gpu_memory * 1e9 - LIBRARIES
    return Estimate(qwen, step, prompts, components, phases, seconds, peak(components), room, hours)


def report_memory(config: Config, estimated: Estimate) -> list[str]:
    """Lines: memory per GPU by component, GB of 10^9 bytes, the largest group, and how much can be sampled at once."""
    lines = ["GB per GPU"]
    for phase, sizes in estimated.memory.items():
        for component, size in sizes.items():
            lines.append(f"  {phase:10} {component:26}{size / 1e9:8.2f}")
    lines.append(f"  {'at most':10} {'always + largest phase':26}{estimated.peak / 1e9:8.2f}, "
                 f"and {LIBRARIES / 1e9:g} for CUDA")
    verdict = "fits" if estimated.peak <= estimated.room else "DOES NOT FIT"
    verdict += f" into {config.gpu_memory:g} GB; the largest group that fits: "
    verdict += largest_group(estimated, config.gradient_checkpointing)
    if not config.gradient_checkpointing:
        verdict += f", with --gradient_checkpointing {largest_group(estimated, True)}"
    lines.append(verdict)
    qwen, step, sizes = estimated.qwen, estimated.step, estimated.memory
    weights = sum(sizes["always"].values()) + sizes["sampling"]["gathered weights, bf16"]
    prompts = prompts_that_fit(qwen, step, estimated.room - weights)
    weights_alone = 2 * parameters(qwen)["total"]
    queries = prompts_that_fit(qwen, replace(step, group_size=1), estimated.room - weights_alone)
    lines.append(f"beside the weights {prompts * config.group_size} rows can be sampled at once, {prompts} prompts of "
                 f"{config.group_size} (scoring may need more); in evaluation {queries} queries, if as long")
    return lines


def report(config: Config) -> str:
    """What it is estimated to take to train `config.model`, as text: memory, the largest group, operations, hours."""
    estimated = estimate(config)
    qwen, step, sizes = estimated.qwen, estimated.step, parameters(estimated.qwen)
    weights = f"{sizes['total'] / 1e9:.2f} billion weights, {sizes['vision'] / 1e9:.2f} in the vision tower"
    if step.lora_rank:
        learned = qwen.text_config.num_hidden_layers * adapter_parameters(qwen, step.lora_rank)
        weights += f"; {learned / 1e6:.1f} million in adapters of rank {step.lora_rank}, the only ones that learn"
    frames, height, width = 2 * step.grid[0], step.grid[1] * model.PATCH, step.grid[2] * model.PATCH
    lines = [f"{config.model}: {weights}",
             f"{step.gpus} GPU(s), {step.prompts} prompt(s) of {step.prompt} tokens at once ({config.seconds:g} s of "
             f"video, {frames} frames of {width} x {height}), G = {step.group_size}, up to {step.tokens} tokens per "
             "completion"]
    if config.prompts_per_step % step.gpus:
        lines.append(f"train.py needs a --prompts_per_step that is a multiple of the GPUs, "
                     f"{estimated.prompts * step.gpus} instead of {config.prompts_per_step}")
    lines += ["estimated from these shapes; nothing was run", "", *report_memory(config, estimated)]
    count = sum(sum(counts.values()) for counts in estimated.operations.values()) * config.prompts_per_step
    phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in estimated.seconds.items())
    lines += ["", f"{count / 1e12:.0f} TFLOP per step, {phases}",
              f"{estimated.hours:.0f} hours per epoch of {config.samples} samples, at {config.tflops:g} TFLOP/s per GPU, "
              f"weights read once per token at {BANDWIDTH / 1e12:g} TB/s (both assumed, not measured: an A100 has at "
              f"most 312 and 1.6 to 2), and {KERNELS} kernels per layer and token launched in {LAUNCH * 1e6:g} us each "
              "(measured on a CPU)"]
    return "\n".join(lines)


def main(config: Config) -> None:
    print(report(config))


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
