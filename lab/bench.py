"""What a GRPO step costs: this project's, that of TRL's GRPOTrainer, and the floor, side by side in one run.

    python -m lab.bench                       the table, and as the last line one json object; 5 minutes on two cores
    python -m lab.bench --only ours           this project's step alone
    python -m lab.bench --sweep --output sweep.png    how this project's step grows with G, P and C, fitted and drawn
    python -m lab.bench --logits              memory of scoring with Qwen's vocabulary, in chunks and whole
    python -m lab.bench --decode              milliseconds and kernels a token, against `generate`; 7 minutes
    python -m lab.bench --evaluate --model DIR --annotations test.txt --videos DIR    against one `generate` a query

The model has random weights, fp32 on a CPU and bf16 on a GPU, by default in the proportions of the 3B at 32 million.
Nothing stops a completion before max_tokens, so that the work is fixed. ways.py has the two ways. The floor is the
operations that plan.py counts over the rate of the machine's matrix products, measured in the same run; decoding, bound
by memory and overhead, cannot reach it.

Each way runs in processes of its own, in turns, with the same weights, video and scored completions. Prefill is timed
as a rollout of one token, decode as the rest of a whole one. Peak memory is the process's; on a GPU, what torch holds.
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
import torch
from torch import nn

import data
import evaluate
import grpo
import model
import tasks
from engine import flags, plot
from engine.flags import flag
from engine.loader import Loader
from lab import decode, plan
from lab.ways import DEVICE, DTYPE, WAYS, Sizes, as_published, build, make_prompts, repeat, shape, timed

PARTS = ("data", "prefill", "decode", "rewards", "reference", "forward", "backward", "optimizer")
WORDS = "a person opens closes holds the door book then walks and sits on takes red bag puts it down to".split()


@dataclass
class Config(Sizes):
    repeats: int = flag(1, "runs of each way; medians are given, and the range")
    only: str = flag("", "run only this way: ours or repeated")
    sweep: bool = flag(False, "fit the time of a step against G, P and C instead")
    output: str = flag("sweep.png", "the picture that --sweep draws")
    logits: bool = flag(False, "measure the memory of scoring instead: vocabulary 151,936, G 8, C 256, a tiny model")
    decode: bool = flag(False, "measure single tokens instead, also through torch.compile; see decode.py")
    evaluate: bool = flag(False, "measure evaluation instead, on the TVG queries of --annotations")
    annotations: str = flag("", "annotation file for --evaluate")
    videos: str = flag("", "folder of its videos")
    inside: str = flag("", "what a process that this script started measures; for its own use")


def memory_used() -> tuple[int, int]:
    """Bytes in use now, and the most that were in use at once since this process began."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    now = Path("/proc/self/statm")
    return int(now.read_text().split()[1]) * resource.getpagesize() if now.exists() else most, most


def step(config: Config, way: str, policy: model.Policy, reference: model.Policy,
         optimizer: torch.optim.Optimizer) -> dict:
    """One GRPO step in one of the WAYS: seconds by part, memory before it, and by what ways are compared."""
    (rollout, logprobs), seconds = WAYS[way], {}
    generator, qwen = torch.Generator().manual_seed(config.seed), policy.qwen.config
    size = config.prompts, config.group_size, config.max_tokens
    completions = torch.randint(qwen.text_config.vocab_size // 2, size, generator=generator)    # (B, G, C)
    mask, (before, _) = torch.ones_like(completions), memory_used()
    prompts = make_prompts(config, qwen, seconds)
    for name, tokens in (("prefill", 1), ("decode", config.max_tokens)):
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(config.prompts)]
        with timed(seconds, name):
            sampled = rollout(policy, prompts, config.group_size, tokens, generators)
    seconds["decode"] -= seconds["prefill"]
    with timed(seconds, "rewards"):
        texts = [" ".join(WORDS[i % len(WORDS)] for i in row) for row in sampled.flatten(0, 1).tolist()]
        sample = data.Sample("0", "video.mp4", "a person opens the door", 0.0, 1.0, None)
        tasks.TASKS["VD"].reward([f"<think>{t}</think> <answer>{t[-99:]}</answer>" for t in texts],
                                 [sample] * len(texts))
        advantage = grpo.advantages(torch.randn(size[:2], generator=generator)).to(DEVICE)  # alike in all ways
    with timed(seconds, "reference"), torch.no_grad():
        ref_logp = logprobs(reference, prompts, completions, mask)
    with timed(seconds, "forward"):
        logp = logprobs(policy, prompts, completions, mask)
        loss, *_ = grpo.loss(logp, logp.detach(), ref_logp, advantage, mask.to(DEVICE), 0.04, size[0] * size[1])
    with timed(seconds, "backward"):
        loss.backward()
    with timed(seconds, "optimizer"):
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": seconds, "before": before, "loss": loss.item(), "grad_norm": norm.item(),
            "logp": logp.flatten().tolist(), "prompt": len(prompts[0].ids), "grid": prompts[0].grid.tolist()}


def set_up(config: Config, way: str) -> tuple[model.Policy, model.Policy, torch.optim.Optimizer]:
    """Policy, reference, and optimizer with its states; everything warmed up by a small step."""
    policy, reference = build(config), build(config).requires_grad_(False)
    for weight in reference.parameters():       # so that there is a KL term
        weight.mul_(1.01)
    for part in (policy, reference) if way == "repeated" else ():
        as_published(part.qwen)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0)
    step(replace(config, grids=2, prompts=1, group_size=2, max_tokens=2), way, policy, reference, optimizer)
    return policy, reference, optimizer


def measure(config: Config, way: str) -> dict:
    """Time and peak memory of one step in this process, and the machine's rate. Ways "chunks" and "whole" only score,
    with a vocabulary like Qwen's and hardly any model, logits as train.py makes them or all at once."""
    if way in WAYS:
        found = step(config, way, *set_up(config, way))
    else:
        model.LOGITS_AT_ONCE = model.LOGITS_AT_ONCE if way == "chunks" else 2 ** 62
        policy = build(config := replace(config, grids=2, hidden=128, layers=1, vision_hidden=64, vision_depth=1,
                                         vocabulary=151936, group_size=8, max_tokens=256, prompts=1, model=""))
        completions = torch.arange(8 * 256).view(1, 8, 256)
        prompts, found = make_prompts(config, policy.qwen.config), {"before": memory_used()[0]}
        grpo.logprobs(policy, prompts, completions, torch.ones_like(completions)).sum().backward()
    most, size, times = memory_used()[1], (8192 if DEVICE == "cuda" else 3072), {}
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=DTYPE)
    for i in range(6):      # square matrix products: the best counts
        with timed(times, i):
            a @ b
    return {**found, "peak": most, "rate": 2 * size ** 3 / min(times.values())}


def child(config: Config, way: str) -> dict:
    """`measure` in a process of its own."""
    flags = [word for name, value in asdict(config).items() if not isinstance(value, bool) and name != "inside"
             for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "lab.bench", *flags, "--inside", way],
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:     # -9: the system ran out of memory
        raise ValueError(f"measuring {way} ended with code {done.returncode}; a smaller --group_size needs less memory")
    return json.loads(done.stdout.splitlines()[-1])


def compare(config: Config) -> dict:
    """Run the ways in turns and print the table; returns the numbers for the last line."""
    runs = {way: [] for way in ([config.only] if config.only else WAYS)}
    for _ in range(config.repeats):
        for way, found in runs.items():
            found.append(child(config, way))
    first = next(iter(runs.values()))[0]
    rate = max(run["rate"] for found in runs.values() for run in found)
    phases = plan.operations(shape(config), first["prompt"], first["grid"], config.group_size, config.max_tokens)
    floor = {phase: config.prompts * sum(parts.values()) / rate for phase, parts in phases.items()}     # seconds
    floor |= {"forward": floor["policy"] / 3, "backward": floor["policy"] / 3 * 2, "step": sum(floor.values()),
              "scoring": floor["reference"] + floor["policy"]}
    for took in [run["seconds"] for found in runs.values() for run in found]:
        took |= {"scoring": sum(took[p] for p in ("reference", "forward", "backward")), "step": sum(took.values())}
    spread = {way: {k: [run["seconds"][k] for run in of] for k in first["seconds"]} for way, of in runs.items()}
    seconds = {way: {name: float(np.median(times)) for name, times in of.items()} for way, of in spread.items()}
    gb = {way: {key: max(run[key] for run in of) / 2 ** 30 for key in ("peak", "before")} for way, of in runs.items()}
    print_table(spread, seconds, gb, floor)
    report = {}
    if len(runs) == 2:
        report = {f"ratio_{name}": seconds["repeated"][name] / seconds["ours"][name] for name in ("step", "scoring")}
        report["ratio_memory"] = gb["repeated"]["peak"] / gb["ours"]["peak"]
        report["differences"] = differences(runs["ours"][0], runs["repeated"][0])
    if "ours" in runs:
        report["of_floor"] = floor["step"] / seconds["ours"]["step"]
        report["of_floor_scoring"] = floor["scoring"] / seconds["ours"]["scoring"]
    return {**report, "seconds": seconds, "steps": {way: of["step"] for way, of in spread.items()}, "memory_gb": gb,
            "gflops_matmul": rate / 1e9, "B": config.prompts, "P": first["prompt"], "G": config.group_size,
            "C": config.max_tokens, "grid": first["grid"], "parameters": plan.parameters(shape(config))["total"]}


def print_table(spread: dict[str, dict[str, list[float]]], seconds: dict[str, dict[str, float]],
                gb: dict[str, dict[str, float]], floor: dict[str, float]) -> None:
    """A line a part: of each way the median of `seconds` and the range of its `spread`; then the floor, and how much of
    it the first way reaches. The last line is memory."""
    print(f"{'seconds':10}" + "".join(f"{way:>10}{'range':>16}" for way in spread) + f"{'floor':>10}{'reached':>9}")
    for name, mine in seconds[next(iter(spread))].items():
        print(f"{name:10}" + "".join(f"{seconds[way][name]:10.2f}{min(of[name]):9.2f}-{max(of[name]):<6.2f}"
                                     for way, of in spread.items())
              + (f"{floor[name]:10.2f}{floor[name] / mine:9.0%}" if name in floor else ""))
    print(f"{'peak GB':10}" + "".join(f"{of['peak']:10.2f} ({of['before']:.2f} before)" for of in gb.values()))


def differences(ours: dict, theirs: dict) -> dict[str, float]:
    """By how much two steps differ in log-probabilities, loss and, relatively, gradient norm; printed, too.

    Raises ValueError when that is more than rounding in fp32."""
    off = {"logprob": float(np.abs(np.subtract(ours["logp"], theirs["logp"])).max()),
           "loss": abs(ours["loss"] - theirs["loss"]), "grad_norm": abs(ours["grad_norm"] / theirs["grad_norm"] - 1)}
    print("largest differences:", ", ".join(f"{name} {value:.1e}" for name, value in off.items()))
    if DTYPE == torch.float32 and max(off.values()) > 1e-3:
        raise ValueError("the two ways score differently, so their times say nothing")
    return off


def sweep(config: Config) -> dict:
    """Time steps of different G, P, C, fit t = a + b P + c C + d G C + e G P, draw; returns the fit and the points."""
    axes = {"group_size": [2, 4, 8, 16], "grids": [10, 25, 50, 75], "max_tokens": [32, 64, 128, 256]}
    corners, points = [{"group_size": 16, "grids": 10}, {"group_size": 2, "grids": 75}], {}   # tell G C from G P
    state = set_up(config, "ours")
    for change in [*({name: value} for name in axes for value in axes[name]), *corners]:
        found = step(shaped := replace(config, **change), "ours", *state)
        point = shaped.group_size, found["prompt"], shaped.max_tokens, sum(found["seconds"].values())
        points.setdefault(tuple(change), []).append(point)
        print("G {:3}  P {:5}  C {:4}  {:7.2f} s".format(*point))
    columns = lambda g, p, c: np.stack([np.ones_like(p), p, c, g * c, g * p], axis=-1)
    *shapes, seconds = np.concatenate(list(points.values())).T                              # (n,) each
    fit, *_ = np.linalg.lstsq(columns(*shapes), seconds, rcond=None)
    middle = [config.group_size, config.text + config.grids * config.side ** 2 // 784, config.max_tokens]
    figure, panels = plot.plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    for i, (name, axis) in enumerate(zip(axes, panels)):
        mine = np.array(points[name,])                                                      # (4, 4)
        line = np.linspace(0, mine[:, i].max(), 50)
        at = [line if j == i else np.full(50, float(value)) for j, value in enumerate(middle)]
        axis.plot(line, columns(*at) @ fit, color=plot.COLOURS["after"], label="fit")
        axis.plot(mine[:, i], mine[:, 3], "o", color=plot.COLOURS["truth"], label="measured")
        axis.set(xlabel=("completions a prompt, G", "prompt tokens, P", "tokens a completion, C")[i], xlim=(0, None),
                 title=", ".join(f"{'GPC'[j]} = {value}" for j, value in enumerate(middle) if j != i))
        axis.grid(alpha=0.25)
    panels[0].set(ylabel="seconds a step", ylim=(0, None))
    panels[0].legend(frameon=False)
    plot.save(figure, config.output)
    return {"fit": dict(zip(("constant", "P", "C", "GC", "GP"), fit.tolist())),
            "residual": abs(columns(*shapes) @ fit - seconds).max(), "points": sum(points.values(), [])}


def measure_evaluation(config: Config) -> dict:
    """Seconds that evaluate.py takes, and one `generate` a query with this project's positions and forbidden tokens;
    both greedy, model loading included, the videos decoded before."""
    samples, _ = data.read(config.annotations, config.videos)
    seconds, answers = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        options = evaluate.Config(
            annotations=config.annotations, model=config.model, videos=config.videos, output=f"{folder}/test",
            tasks=["TVG"], max_tokens=config.max_tokens, cache=f"{folder}/frames")
        load = Loader(options.total_pixels, options.video_timeout, options.cache)
        for sample in samples:
            load(sample.video, sample.video_start, sample.video_end)
        with timed(seconds, "generate"), torch.no_grad():
            policy, encoder = model.load(config.model, DEVICE, DTYPE)
            as_published(policy.qwen)
            for sample in samples:
                inputs = repeat([tasks.prepare(sample, tasks.TASKS["TVG"], encoder, load)], 1)
                ids = policy.qwen.generate(     # (1, P + <= C)
                    **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=config.max_tokens,
                    do_sample=False, eos_token_id=encoder.stop_ids, pad_token_id=0, suppress_tokens=policy.forbidden)
                ids = ids[:, inputs["input_ids"].shape[1]:]
                answers[sample.id] = encoder.decode(ids, torch.ones_like(ids))[0]
        with timed(seconds, "evaluate"):
            evaluate.main(options)
        rows = [json.loads(line) for line in open(f"{folder}/test/predictions.jsonl")]
    same = float(np.mean([answers[row["id"]] == row["completion"] for row in rows]))
    return {"ratio_evaluate": seconds["generate"] / seconds["evaluate"], "same": same, "n": len(rows), **seconds}


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
        report = {way: {key: found[key] / 2 ** 30 for key in ("peak", "before")} for way in ("chunks", "whole")
                  for found in [child(config, way)]}
        report["ratio_logits"] = report["whole"]["peak"] / report["chunks"]["peak"]
    else:
        report = compare(config)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()} CPU"
    print(json.dumps({**report, "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "seed": config.seed}))


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
