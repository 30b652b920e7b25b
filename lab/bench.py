"""What a GRPO step costs: this project's, that of TRL's GRPOTrainer, and the floor, side by side in one run.

    python -m lab.bench                       the table, and as the last line one json object; 5 minutes on two cores
    python -m lab.bench --only ours           this project's step alone
    python -m lab.bench --sweep               how this project's step grows with G, P and C, fitted
    python -m lab.bench --logits              memory of scoring with Qwen's vocabulary, in chunks and whole
    python -m lab.bench --decode              milliseconds and kernels per token, against `generate`
    python -m lab.bench --evaluate --model DIR --annotations test.txt --videos DIR    against one `generate` per query

The model has random weights, fp32 on a CPU and bf16 on a GPU, by default in the proportions of the 3B at 32 million.
Nothing stops a completion before max_tokens, so that the work is fixed. lab/ways.py has the two ways. The floor is the
operations that lab/plan.py counts over the rate of the machine's matrix products, measured in the same run; decoding,
bound by memory and overhead, cannot reach it.

Each way runs in processes of its own, in turns, with the same weights, video and scored completions. Prefill is timed
as a rollout of one token, decode as the rest of a whole rollout. Peak memory is the process's; on a GPU, what torch
holds.
"""
import json
import platform
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import data
import evaluate
import grpo
import model
import tasks
from engine import flags
from engine.flags import flag
from engine.loader import Loader
from lab import decode, plan, ways
from lab.ways import DEVICE, DTYPE, WAYS, Sizes, shape, timed

PARTS = ["data", "prefill", "decode", "rewards", "reference", "forward", "backward", "optimizer"]
SCORING = ["reference", "forward", "backward"]
WORDS = "a person opens closes holds the door book then walks and sits on takes red bag puts".split()
SAMPLE = data.Sample("0", "video.mp4", "a person opens the door", 0.0, 1.0, None)
GB = 2 ** 30
AXES = {"group_size": [2, 4, 8, 16],        # of --sweep
        "grids": [10, 25, 50, 75],
        "max_tokens": [32, 64, 128, 256]}


@dataclass(kw_only=True)
class Config(Sizes):
    """what is measured"""
    repeats: int = flag(1, "runs of each way; medians are given, and the range")
    only: str = flag("", "run only this way: ours or repeated")
    sweep: bool = flag(False, "fit the time of a step against G, P and C instead")
    logits: bool = flag(False, "measure the memory of scoring instead: vocabulary 151,936, G 8, "
                               "C 256, a tiny model")
    decode: bool = flag(False, "measure single tokens instead; see lab/decode.py")
    evaluate: bool = flag(False, "measure evaluation instead, on the TVG queries of --annotations")
    annotations: str = flag("", "annotation file for --evaluate")
    videos: str = flag("", "folder of its videos")
    inside: str = flag("", "what a process that this script started measures; for its own use")


def memory_used() -> tuple[int, int]:
    """Bytes in use now, and the most that were in use at once since this process began."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status = Path("/proc/self/statm")
    if not status.exists():
        return highest, highest
    return int(status.read_text().split()[1]) * resource.getpagesize(), highest


def reward(completions: Tensor) -> None:
    """Pay completions (B, G, C) as VD does, read as words."""
    texts = []
    for row in completions.flatten(0, 1).tolist():
        text = " ".join(WORDS[i % len(WORDS)] for i in row)
        texts.append(f"<think>{text}</think> <answer>{text[-99:]}</answer>")
    tasks.TASKS["VD"].reward(texts, [SAMPLE] * len(texts))


def step(config: Config, way: str, policy: model.Policy, reference: model.Policy,
         optimizer: torch.optim.Optimizer) -> dict:
    """One GRPO step in one of the WAYS: seconds by part, memory before it, and by what ways are compared."""
    rollout, logprobs = WAYS[way]
    generator, seconds = torch.Generator().manual_seed(config.seed), {}
    size = config.prompts, config.group_size, config.max_tokens
    vocabulary = policy.qwen.config.text_config.vocab_size
    completions = torch.randint(vocabulary // 2, size, generator=generator)         # (B, G, C)
    mask = torch.ones_like(completions)
    before, _ = memory_used()
    prompts = ways.make_prompts(config, policy.qwen.config, seconds)
    for name, tokens in (("prefill", 1), ("decode", config.max_tokens)):
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(config.prompts)]
        with timed(seconds, name):
            sampled = rollout(policy, prompts, config.group_size, tokens, generators)
    seconds["decode"] -= seconds["prefill"]
    with timed(seconds, "rewards"):
        reward(sampled)
        rewards = torch.randn(size[:2], generator=generator)        # (B, G), alike in all ways
        advantages = grpo.advantages(rewards).to(DEVICE)
    with timed(seconds, "reference"), torch.no_grad():
        ref_logprobs = logprobs(reference, prompts, completions, mask)
    with timed(seconds, "forward"):
        new_logprobs = logprobs(policy, prompts, completions, mask)
        loss, *_ = grpo.loss(new_logprobs, new_logprobs.detach(), ref_logprobs, advantages,
                             mask.to(DEVICE), beta=0.04, num_completions=rewards.numel())
    with timed(seconds, "backward"):
        loss.backward()
    with timed(seconds, "optimizer"):
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": seconds,
            "before": before,
            "loss": loss.item(),
            "grad_norm": grad_norm.item(),
            "logprobs": new_logprobs.flatten().tolist(),
            "prompt": len(prompts[0].input_ids),
            "grid": prompts[0].video_grid_thw.tolist()}


def set_up(config: Config, way: str) -> tuple[model.Policy, model.Policy, torch.optim.Optimizer]:
    """Policy, reference, and optimizer with its states; everything warmed up by a small step."""
    policy = ways.build(config)
    reference = ways.build(config).requires_grad_(False)
    for weight in reference.parameters():       # so that there is a KL term
        weight.mul_(1.01)
    if way == "repeated":
        ways.as_published(policy.qwen)
        ways.as_published(reference.qwen)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0)
    small = replace(config, grids=2, prompts=1, group_size=2, max_tokens=2)
    step(small, way, policy, reference, optimizer)
    return policy, reference, optimizer


def score_large_vocabulary(config: Config, whole: bool) -> dict:
    """Scoring alone, with a vocabulary like Qwen's and hardly any model; logits as train.py makes them, or all at
    once. Gives the memory before it."""
    if whole:
        model.LOGITS_AT_ONCE = 2 ** 62
    config = replace(config, grids=2, hidden=128, layers=1, vision_hidden=64, vision_depth=1,
                     vocabulary=151936, group_size=8, max_tokens=256, prompts=1, model="")
    policy = ways.build(config)
    completions = torch.arange(8 * 256).view(1, 8, 256)             # (B, G, C)
    prompts = ways.make_prompts(config, policy.qwen.config)
    before, _ = memory_used()
    logprobs = grpo.logprobs(policy, prompts, completions, torch.ones_like(completions))
    logprobs.sum().backward()
    return {"before": before}


def matrix_rate() -> float:
    """Operations per second of large square matrix products, the best of six."""
    size, seconds = (8192 if DEVICE == "cuda" else 3072), {}
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=DTYPE)
    for i in range(6):
        with timed(seconds, i):
            a @ b
    return 2 * size ** 3 / min(seconds.values())


def measure(config: Config, what: str) -> dict:
    """Time and peak memory in this process, and the machine's rate: of one step in one of the WAYS, or of scoring
    with logits in "chunks" or "whole"."""
    if what in WAYS:
        result = step(config, what, *set_up(config, what))
    else:
        result = score_large_vocabulary(config, what == "whole")
    _, result["peak"] = memory_used()
    result["rate"] = matrix_rate()
    return result


def child(config: Config, what: str) -> dict:
    """`measure` in a process of its own."""
    words = [sys.executable, "-m", "lab.bench", "--inside", what]
    for field, value in asdict(config).items():
        if not isinstance(value, bool) and field != "inside":
            words += [f"--{field}", str(value)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:     # -9: the system ran out of memory
        raise ValueError(f"measuring {what} ended with code {done.returncode}; a smaller "
                         "--group_size needs less memory")
    return json.loads(done.stdout.splitlines()[-1])


def compare(config: Config) -> dict:
    """Run the ways in turns and print the table; returns the numbers for the last line."""
    ways = [config.only] if config.only else list(WAYS)
    runs = {way: [] for way in ways}
    for _ in range(config.repeats):
        for way in ways:
            runs[way].append(child(config, way))
    first = runs[ways[0]][0]
    every = pd.concat({way: pd.DataFrame(each) for way, each in runs.items()}, names=["way", None])
    memory = every.groupby("way", sort=False)[["peak", "before"]].max() / GB
    rate = float(every["rate"].max())
    seconds = pd.DataFrame(every["seconds"].tolist(), every.index)
    seconds["scoring"] = seconds[SCORING].sum(axis=1)
    seconds["step"] = seconds[PARTS].sum(axis=1)
    by_way = seconds.groupby("way", sort=False)
    medians = by_way.median().T                                     # (parts, ways)
    floor = floor_seconds(config, first["prompt"], first["grid"], rate)
    lowest, highest = by_way.min().T.add_suffix(", lowest"), by_way.max().T.add_suffix(", highest")
    table = pd.concat([medians, lowest, highest], axis=1)
    table["floor"] = floor
    print(table.rename_axis("seconds").to_string(float_format="%.2f", na_rep=""))
    print(memory.rename_axis("GB").to_string(float_format="%.2f"))
    report = {}
    if len(ways) == 2:
        ratios = medians["repeated"] / medians["ours"]
        report["ratio_step"], report["ratio_scoring"] = ratios["step"], ratios["scoring"]
        report["ratio_memory"] = memory["peak"]["repeated"] / memory["peak"]["ours"]
        report["differences"] = differences(first, runs["repeated"][0])
    if "ours" in ways:
        report["of_floor"] = floor["step"] / medians["ours"]["step"]
        report["of_floor_scoring"] = floor["scoring"] / medians["ours"]["scoring"]
    return {**report,
            "seconds": medians.to_dict(),
            "steps": by_way["step"].apply(list).to_dict(),
            "memory_gb": memory.to_dict("index"),
            "gflops_matmul": rate / 1e9,
            "B": config.prompts,
            "P": first["prompt"],
            "G": config.group_size,
            "C": config.max_tokens,
            "grid": first["grid"],
            "parameters": plan.shape_of(shape(config)).total}


def floor_seconds(config: Config, prompt: int, grid: list[int], rate: float) -> dict[str, float]:
    """Seconds by part that the operations of a step take at `rate` operations per second."""
    step = plan.Step(prompt, grid, config.group_size, config.max_tokens)
    floor = {}
    for phase, counts in plan.operations(plan.shape_of(shape(config)), step).items():
        floor[phase] = config.prompts * sum(counts.values()) / rate
    policy, total = floor["policy"], sum(floor.values())
    floor["forward"] = policy / 3
    floor["backward"] = policy / 3 * 2
    floor["scoring"] = floor["reference"] + policy
    floor["step"] = total
    return floor


def differences(ours: dict, theirs: dict) -> dict[str, float]:
    """By how much two steps differ in log-probabilities, loss and, relatively, gradient norm; printed, too.

    Raises ValueError when that is more than rounding in fp32."""
    logprobs = np.subtract(ours["logprobs"], theirs["logprobs"])
    off = {"logprob": float(np.abs(logprobs).max()),
           "loss": abs(ours["loss"] - theirs["loss"]),
           "grad_norm": abs(ours["grad_norm"] / theirs["grad_norm"] - 1)}
    print("largest differences:", ", ".join(f"{name} {value:.1e}" for name, value in off.items()))
    if DTYPE == torch.float32 and max(off.values()) > 1e-3:
        raise ValueError("the two ways score differently, so their times say nothing")
    return off


def sweep(config: Config) -> dict:
    """Time steps of different G, P, C and fit t = a + b P + c C + d G C + e G P; returns the fit and the points."""
    changes = [{name: value} for name, values in AXES.items() for value in values]
    changes.append({"group_size": 16, "grids": 10})     # these two tell G C from G P
    changes.append({"group_size": 2, "grids": 75})
    state = set_up(config, "ours")
    points = []
    for change in changes:
        shaped = replace(config, **change)
        result = step(shaped, "ours", *state)
        total = sum(result["seconds"].values())
        points.append((shaped.group_size, result["prompt"], shaped.max_tokens, total))
        print("G {:3}  P {:5}  C {:4}  {:7.2f} s".format(*points[-1]))
    g, p, c, seconds = np.array(points).T                           # (points,) each
    terms = {"constant": np.ones(len(p)), "P": p, "C": c, "GC": g * c, "GP": g * p}
    matrix = np.stack(list(terms.values()), axis=1)                 # (points, 5)
    fit, *_ = np.linalg.lstsq(matrix, seconds, rcond=None)
    residual = float(abs(matrix @ fit - seconds).max())
    return {"fit": dict(zip(terms, fit.tolist())), "residual": residual, "points": points}


def measure_logits(config: Config) -> dict:
    """Memory of scoring with logits in chunks and whole, GB."""
    report = {}
    for what in ("chunks", "whole"):
        result = child(config, what)
        report[what] = {"peak": result["peak"] / GB, "before": result["before"] / GB}
    report["ratio_logits"] = report["whole"]["peak"] / report["chunks"]["peak"]
    return report


def measure_evaluation(config: Config) -> dict:
    """Seconds that evaluate.py takes, and one `generate` per query with this project's positions and forbidden tokens;
    both greedy, model loading included, the videos decoded before."""
    samples, _ = data.read(config.annotations, config.videos)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        options = evaluate.Config(
            annotations=config.annotations, model=config.model, videos=config.videos,
            output=f"{folder}/test", tasks=["TVG"], max_tokens=config.max_tokens,
            cache=f"{folder}/frames")
        load = Loader(options.total_pixels, options.video_timeout, options.cache)
        for sample in samples:
            load(sample.video, sample.video_start, sample.video_end)
        with timed(seconds, "generate"):
            answers = generate_answers(config, samples, load)
        with timed(seconds, "evaluate"):
            evaluate.main(options)
        rows = pd.read_json(f"{folder}/test/predictions.jsonl", lines=True)
    same = (rows["completion"] == rows["id"].map(answers)).mean()
    ratio = seconds["generate"] / seconds["evaluate"]
    return {"ratio_evaluate": ratio, "same": same, "n": len(rows), **seconds}


def generate_answers(config: Config, samples: list[data.Sample], load: Loader) -> dict[str, str]:
    """{id of the sample: transformers' greedy completion}, one query at a time."""
    policy, encoder = model.load(config.model, DEVICE, DTYPE)
    ways.as_published(policy.qwen)
    answers = {}
    for sample in samples:
        prompt = tasks.prepare(sample, tasks.TASKS["TVG"], encoder, load)
        output = ways.generate(policy, [prompt], 1, config.max_tokens, encoder.stop_ids)
        completion = output[:, len(prompt.input_ids):]              # (1, at most C)
        answers[sample.id] = encoder.decode(completion, torch.ones_like(completion))[0]
    return answers


def main(config: Config) -> None:
    if config.only not in ("", *WAYS):
        raise ValueError(f"--only {config.only}: choose from {' '.join(WAYS)}")
    if config.inside:
        report = measure(config, config.inside)
    elif config.evaluate:
        report = measure_evaluation(config)
    elif config.decode:
        report = decode.measure(config)
    elif config.sweep:
        report = sweep(config)
    elif config.logits:
        report = measure_logits(config)
    else:
        report = compare(config)
    report["device"] = f"{platform.machine()} CPU"
    if DEVICE == "cuda":
        report["device"] = torch.cuda.get_device_name()
    report |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "seed": config.seed}
    print(json.dumps(report))


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
