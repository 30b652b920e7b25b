"""What a GRPO step costs: this project's, the repeated-prompt way of peers, and the floor, side by side in one run.

    python bench.py                             the table, and as the last line one json object; 5 minutes on two cores
    python bench.py --only ours                 this project's step alone
    python bench.py --sweep --output sweep.png  how this project's step grows with G, P and C, fitted and drawn
    python bench.py --logits                    memory of scoring with Qwen's vocabulary, in chunks and whole
    python bench.py --evaluate --model DIR --annotations test.txt --videos DIR      against one `generate` a query

The model has random weights, fp32 on a CPU and bf16 on a GPU, by default in the proportions of the 3B at 32 million.
Nothing stops a completion before max_tokens, so that the work is fixed.

- ours: grpo.rollout and grpo.logprobs.
- repeated: `repeated_rollout` and `repeated_logprobs` below, as in trainers built on TRL: prompt and video G times in
  sampling (vision tower and prefill too) and in scoring, logits of whole sequences, transformers' own forward pass.
- floor: the operations that plan.py counts over the rate of the machine's matrix products, measured in the same run;
  decoding, bound by memory and overhead, cannot reach it.

Each way runs in processes of its own, in turns, with the same weights, video and scored completions. Prefill is timed
as a rollout of one token, decode as the rest of a whole one. Peak memory is the process's; on a GPU, what torch holds.
"""
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data
import evaluate
import grpo
import model
import tasks
from support import launch, plot, video
from support.launch import flag
from tools import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
PARTS = ("data", "prefill", "decode", "rewards", "reference", "forward", "backward", "optimizer")
WORDS = "a person opens closes holds the door book then walks and sits on takes red bag puts it down to".split()


@dataclass
class Config:
    grids: int = flag(50, "pairs of frames of the video, one a second")
    side: int = flag(168, "pixels, a multiple of 28, of its square frames; 168 make 36 tokens a grid")
    text: int = flag(80, "tokens of the prompt beside the video's")
    prompts: int = flag(1, "B, prompts at once")
    group_size: int = flag(8, "G, completions a prompt")
    max_tokens: int = flag(128, "C, tokens of every completion; with --evaluate the most")
    hidden: int = flag(512, "width of the decoder, a multiple of 128, which is that of a head")
    layers: int = flag(4, "its depth")
    vocabulary: int = flag(8192, "number of tokens")
    vision_hidden: int = flag(256, "width of the vision tower")
    vision_depth: int = flag(8, "its depth; every fourth block attends to whole frames")
    model: str = flag("", "folder whose config.json gives the model's shape instead; with --evaluate, the model itself")
    seed: int = flag(0, "of weights, video, text and completions")
    repeats: int = flag(1, "runs of each way; medians are given, and the range")
    only: str = flag("", "run only this way: ours or repeated")
    sweep: bool = flag(False, "fit the time of a step against G, P and C instead")
    output: str = flag("sweep.png", "the picture that --sweep draws")
    logits: bool = flag(False, "measure the memory of scoring instead: vocabulary 151,936, G 8, C 256, a tiny model")
    evaluate: bool = flag(False, "measure evaluation instead, on the TVG queries of --annotations")
    annotations: str = flag("", "annotation file for --evaluate")
    videos: str = flag("", "folder of its videos")
    inside: str = flag("", "what a process that this script started measures; for its own use")


def shape(config: Config) -> Qwen2_5_VLConfig:
    """The model's configuration: that of --model, or Qwen2.5-VL-3B's with the sizes that the flags give."""
    if config.model:
        return Qwen2_5_VLConfig.from_pretrained(config.model)
    ids = {f"{name}_token_id": config.vocabulary - i
           for i, name in enumerate(("vision_start", "vision_end", "image", "video"), 1)}
    text = dict(vocab_size=config.vocabulary, hidden_size=config.hidden, num_hidden_layers=config.layers,
                intermediate_size=config.hidden * 43 // 8, num_attention_heads=config.hidden // 128, bos_token_id=None,
                num_key_value_heads=min(2, config.hidden // 128), eos_token_id=None, max_position_embeddings=32768,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
    vision = dict(depth=config.vision_depth, hidden_size=config.vision_hidden, num_heads=4, tokens_per_second=2,
                  intermediate_size=config.vision_hidden * 171 // 64, out_hidden_size=config.hidden,
                  fullatt_block_indexes=list(range(3, config.vision_depth, 4)))
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def build(config: Config) -> model.Policy:
    """A policy with random weights of the usual size: with transformers' 0.02, attention in a small model is flat."""
    torch.manual_seed(config.seed)
    qwen = Qwen2_5_VLForConditionalGeneration(shape(config))
    for module in qwen.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    nn.init.normal_(qwen.get_input_embeddings().weight, std=qwen.config.text_config.hidden_size ** -0.5)
    return model.Policy(qwen.to(DEVICE, DTYPE), [qwen.config.image_token_id, qwen.config.video_token_id])


def film(config: Config, path: str) -> None:
    """Write an mp4 of drifting noise, config.grids seconds at 8 frames a second."""
    noise = np.random.default_rng(config.seed).integers(0, 256, (config.side // 7, config.side // 7, 3), np.uint8)
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = config.side, config.side, "yuv420p"
        for i in range(8 * config.grids):
            frame = np.roll(noise, i, axis=1).repeat(7, 0).repeat(7, 1)                     # (side, side, 3)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def make_prompts(config: Config, qwen: Qwen2_5_VLConfig, seconds: dict | None = None) -> list[model.Prompt]:
    """B prompts of random text and the video, decoded and cut for each; `seconds` gets how long that took."""
    found, generator, rate = [], torch.Generator().manual_seed(config.seed), qwen.vision_config.tokens_per_second
    with tempfile.TemporaryDirectory() as folder:
        film(config, path := f"{folder}/video.mp4")
        with timed({} if seconds is None else seconds, "data"):
            for _ in range(config.prompts):
                clip = video.load(path, total_pixels=2 * config.grids * config.side ** 2)
                patches, grid = model.cut_patches(clip.frames)
                text = torch.randint(qwen.text_config.vocab_size // 2, (config.text,), generator=generator)
                pads = torch.full((len(patches) // model.MERGE ** 2,), qwen.video_token_id)
                ids = torch.cat([text[:-5], pads, text[-5:]])                               # (P,)
                found.append(model.Prompt(ids, model.place(ids, pads[0], grid, 2 / clip.fps, rate), patches, grid))
    return found


def as_published(qwen: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let transformers' own code run where model.Policy put this project's."""
    qwen.set_attn_implementation("sdpa")
    del qwen.model.visual.patch_embed.forward


def repeat(prompts: list[model.Prompt], times: int) -> dict[str, torch.Tensor]:
    """Prompts of one length and their videos, each `times` over, as transformers' forward pass takes them."""
    rows = [prompt for prompt in prompts for _ in range(times)]                             # B * G
    inputs = dict(input_ids=torch.stack([row.ids for row in rows]), video_grid_thw=torch.stack([r.grid for r in rows]),
                  position_ids=torch.stack([row.positions for row in rows], dim=1),         # (3, B * G, P)
                  pixel_values_videos=torch.cat([row.patches for row in rows]).to(DTYPE))
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


@torch.no_grad()
def repeated_rollout(policy, prompts, group_size, max_tokens, stop_ids, generators) -> grpo.Rollouts:
    """The repeated-prompt way of sampling; nothing stops it."""
    inputs, tokens = repeat(prompts, group_size), []
    cache, last = DynamicCache(config=policy.qwen.config.text_config), inputs["position_ids"].amax((0, 2))   # (B * G,)
    for c in range(max_tokens):
        logits = policy.qwen(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        logits[:, policy.forbidden] = -torch.inf                                            # (B * G, V)
        tokens.append(torch.multinomial(logits.softmax(-1), 1))                             # (B * G, 1)
        inputs = dict(input_ids=tokens[-1], position_ids=(last + 1 + c).expand(3, -1)[..., None])
    completions = torch.cat(tokens, dim=1).view(len(prompts), group_size, max_tokens)
    return grpo.Rollouts(completions, torch.ones_like(completions), None)


def repeated_logprobs(policy, prompts, completions, mask) -> torch.Tensor:
    """The repeated-prompt way of scoring completions (B, G, C), all of one length: logits of whole sequences, then
    log-softmax and gather a row at a time, as in the authors' trainer."""
    inputs, (size, tokens) = repeat(prompts, completions.shape[1]), completions.shape[1:]
    after = inputs["position_ids"].amax((0, 2))[:, None] + 1 + torch.arange(tokens, device=DEVICE)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completions.flatten(0, 1).to(DEVICE)], dim=1)
    inputs["position_ids"] = torch.cat([inputs["position_ids"], after.expand(3, -1, -1)], dim=2)
    logits = policy.qwen(**inputs, use_cache=False).logits                                  # (B * G, P + C, V)
    logits[..., policy.forbidden] = -torch.inf
    scores = [row[:-1].log_softmax(-1).gather(1, ids[1:, None])[-tokens:, 0]
              for row, ids in zip(logits, inputs["input_ids"])]
    return torch.stack(scores).view(completions.shape)


WAYS = {"ours": (grpo.rollout, grpo.logprobs), "repeated": (repeated_rollout, repeated_logprobs)}


@contextmanager
def timed(seconds: dict[str, float], name: str):
    """Put the time that the block takes into seconds[name]."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    yield
    wait()
    seconds[name] = time.perf_counter() - began


def memory() -> tuple[int, int]:
    """Bytes in use now, and the most that were in use at once since this process began."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    now = Path("/proc/self/statm")
    return int(now.read_text().split()[1]) * resource.getpagesize() if now.exists() else most, most


def step(config: Config, way: str, policy, reference, optimizer) -> dict:
    """One GRPO step in one of the WAYS: seconds by part, memory before it, and by what ways are compared."""
    (rollout, logprobs), seconds = WAYS[way], {}
    generator, qwen = torch.Generator().manual_seed(config.seed), policy.qwen.config
    size = config.prompts, config.group_size, config.max_tokens
    completions = torch.randint(qwen.text_config.vocab_size // 2, size, generator=generator)    # (B, G, C)
    mask, (before, _) = torch.ones_like(completions), memory()
    prompts = make_prompts(config, qwen, seconds)
    for name, tokens in (("prefill", 1), ("decode", config.max_tokens)):
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(config.prompts)]
        with timed(seconds, name):
            sampled = rollout(policy, prompts, config.group_size, tokens, [-1], generators).completions
    seconds["decode"] -= seconds["prefill"]
    with timed(seconds, "rewards"):
        texts = [" ".join(WORDS[i % len(WORDS)] for i in row) for row in sampled.flatten(0, 1).tolist()]
        sample = data.Sample("0", "video.mp4", "a person opens the door", 0.0, 1.0, None)
        [tasks.TASKS["VD"].reward(f"<think>{t}</think> <answer>{t[-99:]}</answer>", sample) for t in texts]
        advantage = grpo.advantages(torch.randn(size[:2], generator=generator)).to(DEVICE)  # alike in all ways
    with timed(seconds, "reference"), torch.no_grad():
        ref_logp = logprobs(reference, prompts, completions, mask)
    with timed(seconds, "forward"):
        logp = logprobs(policy, prompts, completions, mask)
        loss, _ = grpo.loss(logp, logp.detach(), ref_logp, advantage, mask.to(DEVICE), 0.04, size[0] * size[1])
    with timed(seconds, "backward"):
        loss.backward()
    with timed(seconds, "optimizer"):
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": seconds, "before": before, "loss": loss.item(), "grad_norm": norm.item(),
            "logp": logp.flatten().tolist(), "prompt": len(prompts[0].ids), "grid": prompts[0].grid.tolist()}


def prepare(config: Config, way: str) -> tuple:
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
        found = step(config, way, *prepare(config, way))
    else:
        model.LOGITS_AT_ONCE = model.LOGITS_AT_ONCE if way == "chunks" else 2 ** 62
        policy = build(config := replace(config, grids=2, hidden=128, layers=1, vision_hidden=64, vision_depth=1,
                                         vocabulary=151936, group_size=8, max_tokens=256, prompts=1, model=""))
        completions = torch.arange(8 * 256).view(1, 8, 256)
        prompts, found = make_prompts(config, policy.qwen.config), {"before": memory()[0]}
        grpo.logprobs(policy, prompts, completions, torch.ones_like(completions)).sum().backward()
    most, size, times = memory()[1], (8192 if DEVICE == "cuda" else 3072), {}
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=DTYPE)
    for i in range(6):      # square matrix products: the best counts
        with timed(times, i):
            a @ b
    return {**found, "peak": most, "rate": 2 * size ** 3 / min(times.values())}


def child(config: Config, way: str) -> dict:
    """`measure` in a process of its own."""
    flags = [word for name, value in asdict(config).items() if not isinstance(value, bool) and name != "inside"
             for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "tools.bench", *flags, "--inside", way],
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
    print(f"{'seconds':10}" + "".join(f"{way:>10}{'range':>16}" for way in runs) + f"{'floor':>10}{'reached':>9}")
    for name, mine in seconds[next(iter(runs))].items():
        print(f"{name:10}" + "".join(f"{seconds[way][name]:10.2f}{min(of[name]):9.2f}-{max(of[name]):<6.2f}"
                                     for way, of in spread.items())
              + (f"{floor[name]:10.2f}{floor[name] / mine:9.0%}" if name in floor else ""))
    print(f"{'peak GB':10}" + "".join(f"{of['peak']:10.2f} ({of['before']:.2f} before)" for of in gb.values()))
    report = {}
    if len(runs) == 2:
        ours, theirs = runs["ours"][0], runs["repeated"][0]
        report = {f"ratio_{name}": seconds["repeated"][name] / seconds["ours"][name] for name in ("step", "scoring")}
        report["ratio_memory"] = gb["repeated"]["peak"] / gb["ours"]["peak"]
        off = report["differences"] = {"logprob": float(np.abs(np.subtract(ours["logp"], theirs["logp"])).max()),
                                       "loss": abs(ours["loss"] - theirs["loss"]),
                                       "grad_norm": abs(ours["grad_norm"] / theirs["grad_norm"] - 1)}
        print("largest differences:", ", ".join(f"{name} {value:.1e}" for name, value in off.items()))
        if DTYPE == torch.float32 and max(off.values()) > 1e-3:
            raise ValueError("the two ways score differently, so their times say nothing")
    if "ours" in runs:
        report["of_floor"] = floor["step"] / seconds["ours"]["step"]
        report["of_floor_scoring"] = floor["scoring"] / seconds["ours"]["scoring"]
    return {**report, "seconds": seconds, "steps": {way: of["step"] for way, of in spread.items()}, "memory_gb": gb,
            "gflops_matmul": rate / 1e9, "B": config.prompts, "P": first["prompt"], "G": config.group_size,
            "C": config.max_tokens, "grid": first["grid"], "parameters": plan.parameters(shape(config))["total"]}


def sweep(config: Config) -> dict:
    """Time steps of different G, P, C, fit t = a + b P + c C + d G C + e G P, draw; returns the fit and the points."""
    axes = {"group_size": [2, 4, 8, 16], "grids": [10, 25, 50, 75], "max_tokens": [32, 64, 128, 256]}
    corners, points = [{"group_size": 16, "grids": 10}, {"group_size": 2, "grids": 75}], {}   # tell G C from G P
    state = prepare(config, "ours")
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
        options = evaluate.Config(config.annotations, config.model, config.videos, f"{folder}/test", tasks=["TVG"],
                                  max_tokens=config.max_tokens, cache=f"{folder}/frames")
        load = video.Loader(options.video_limit, options.cache, total_pixels=options.total_pixels)
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
    launch.command_line(Config, main, __doc__)
