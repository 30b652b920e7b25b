"""GRPO on Qwen2.5-VL with TVG and the inversion tasks (Algorithm 1).

    python train.py --model DIR --annotations train.txt --videos DIR --output runs/x
    torchrun --nproc_per_node=8 train.py ...                        the same on eight GPUs of one node

A step: draw one task for the whole batch (Eq. 13); every process prepares its share of the prompts, samples G
completions of each, rewards them (Eq. 10, 11), normalises within the group (Eq. 3), scores them under the policy
and the frozen reference, and takes one AdamW step on the loss (Eq. 4).

Writes to --output: config.json, metrics.jsonl (a line a step), samples.jsonl (a completion of each prompt's group,
with its reward), checkpoints/, and at the end the trained model as a Hugging Face folder, model/.

With --resume the same command continues a run that was killed, and one that has done its --steps writes model/ again:
`--resume --steps 1` makes a Hugging Face folder of the newest checkpoint at any time.

Departures from the paper: the default learning rate (see Config), no step on a batch whose groups are all flat (see
take_step), and those that grpo.py, tasks.py, rewards.py and video.py list.
"""
import sys
import time
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import grpo
import model
import rewards
import tasks
from support import checkpoint, launch, video
from support.launch import flag
from tools import plan


@dataclass
class Config:
    model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL")
    annotations: str = flag("", "annotation file of any of the formats that data.py lists")
    videos: str = flag("", "folder of the video files")
    output: str = flag("", "folder for logs, checkpoints and the trained model")
    steps: int = flag(1000, "optimizer steps; the paper's two epochs of Charades-STA in batches of 4 are 6,204")
    seed: int = flag(0, "all randomness follows from it")
    tvg_prob: float = flag(0.8, "p of Eq. 13, the paper's value")
    tasks: list[str] = flag(list(tasks.INVERSIONS), "inversion tasks to draw from; the paper's three")
    group_size: int = flag(8, "G, completions a prompt; the paper does not say, the authors' code has 8")
    prompts_per_step: int = flag(4, "prompts in the global batch, a multiple of the processes; the paper's batch size")
    prompts_per_pass: int = flag(0, "prompts sampled and scored at once on a process, 0 for all; lower it when memory "
                                    "runs out, the result is the same")
    beta: float = flag(0.04, "weight of the KL term; the paper does not say, the authors' code has 0.04. 0 needs no "
                             "reference model")
    learning_rate: float = flag(1e-6, "its authors' code has 1e-6; the paper says 5e-5, fifty times what full "
                                      "fine-tuning with reinforcement learning usually takes")
    warmup_steps: int = flag(0, "steps over which the learning rate rises, while Adam's averages are noisy; 0: none")
    max_grad_norm: float = flag(1.0, "longer gradients are cut to this length, the usual value")
    freeze_vision: bool = flag(False, "leave the vision tower as it is: it then runs once a video and step")
    checkpoint_activations: bool = flag(False, "keep less for the backward pass and compute it again: about a quarter "
                                               "more time in scoring, for less memory (see --plan); the result is the same")
    max_tokens: int = flag(1024, "longest completion; the authors' value")
    temperature: float = flag(1.0, "of sampling and scoring alike, so that what is scored is what was sampled")
    total_pixels: int = flag(video.TOTAL_PIXELS, "pixels of all frames of a video, about the paper's 2.8 M")
    workers: int = flag(2, "processes that decode videos, of each process; no figure depends on it")
    allow_outside: bool = flag(False, "accept annotated paths that leave --videos, absolute ones and those with ..")
    cache: str = flag("", "folder that keeps decoded frames for later queries, epochs and runs; empty for none")
    cache_gb: float = flag(50.0, "size of that folder in GB; what was used longest ago is deleted")
    video_limit: float = flag(60.0, "seconds that decoding a video may take before it counts as unreadable")
    save_every: int = flag(100, "write a checkpoint every so many steps, 0 for only at the end and when stopped; one "
                                "takes 12 bytes a weight, 45 GB for the 3B model")
    keep: int = flag(2, "checkpoints kept, the newest ones")
    resume: bool = flag(False, "continue from the newest checkpoint in --output, or begin where there is none")
    max_bad_steps: int = flag(10, "stop after so many steps in a row whose loss, reward or gradient is not finite; "
                                  "such steps change nothing")
    plan: bool = flag(False, "only print what training would take on --gpus, from the model's config.json")
    gpus: int = flag(8, "of --plan: GPUs of a node; each node holds the same")
    gpu_memory: float = flag(80.0, "of --plan: GB of each")
    tflops: float = flag(60.0, "of --plan: TFLOP/s that each reaches, about a fifth of an A100's peak; an assumption")


def check(config: Config, world: int) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    launch.check_numbers(config, "steps", "max_tokens", "temperature", "learning_rate", "max_grad_norm", "total_pixels",
                         "cache_gb", "video_limit", "workers", "keep", "max_bad_steps", "gpus", "gpu_memory",
                         "tflops")
    unknown = sorted(set(config.tasks) - set(tasks.INVERSIONS))
    if unknown or not config.tasks:
        raise ValueError(f"--tasks {' '.join(unknown)}: choose from {' '.join(tasks.INVERSIONS)}")
    if config.group_size < 2:
        raise ValueError(f"--group_size {config.group_size}: a group is compared with itself and needs at least 2")
    if config.prompts_per_step < 1 or config.prompts_per_step % world:
        raise ValueError(f"--prompts_per_step {config.prompts_per_step} must be a multiple of the {world} processes")
    if config.plan:
        return
    for name in ("annotations", "videos", "output"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing; --help says what it is")
    launch.check_output(config.output)
    model.check(config.model)


def main(config: Config) -> None:
    rank, world, device = launch.start_process()
    check(config, world)
    if config.plan:
        print(plan.report(config.model, config.gpus, config.gpu_memory, config.group_size, config.prompts_per_step,
                          config.prompts_per_pass, config.max_tokens, config.total_pixels, config.beta,
                          config.freeze_vision, config.checkpoint_activations, config.tflops))
        return
    run = checkpoint.Run(config)        # before anything is loaded
    samples, rejected = data.read(config.annotations, config.videos, config.allow_outside)
    invertible = tasks.with_verb(samples) if config.tvg_prob < 1 else []
    if config.tvg_prob < 1 and not invertible:
        raise ValueError(f"{config.annotations}: no query with a verb, so no inversion task; give --tvg_prob 1")
    reference = None
    if config.beta > 0:     # loaded on its own and first, so that a process never holds two whole models
        half = torch.float32 if device == "cpu" else torch.bfloat16     # it is never updated
        reference = model.shard(model.load(config.model, dtype=half)[0].requires_grad_(False))
    policy, encoder = model.load(config.model)
    policy.qwen.model.visual.requires_grad_(not config.freeze_vision)
    if config.checkpoint_activations:
        model.checkpoint_activations(policy)
    policy = model.shard(policy)
    optimizer = torch.optim.AdamW([weight for weight in policy.parameters() if weight.requires_grad],
                                  lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    run.restore(policy, optimizer)
    load = video.Loader(config.video_limit, config.cache, config.cache_gb, config.workers,
                        total_pixels=config.total_pixels)
    steps = range(run.step, config.steps)       # none when only model/ is to be written
    if rank == 0:
        if steps:
            launch.write_config(config, run.output)
        without = f", {len(samples) - len(invertible)} without a verb" if config.tvg_prob < 1 else ""
        tqdm.write(f"{len(samples)} samples, {len(rejected)} rejected{without}, "
                   f"{len(data.missing(samples))} videos missing; {world} process(es) on {device}")
        for note in (*(f"rejected {item}" for item in rejected), *run.notes):
            tqdm.write(note)

    def prepare(step: int):
        """The step's task, and (index, sample, prompt, errors) of this process's share: every world-th prompt."""
        task = tasks.draw(step, config.seed, config.tvg_prob, config.tasks)
        pool = invertible if task.segment else samples
        share = range(step * config.prompts_per_step + rank, (step + 1) * config.prompts_per_step, world)
        make = partial(tasks.prepare, task=task, encoder=encoder, load=load)
        picked = data.pick_all(pool, share, config.seed, make, config.workers)
        return task, [(index, *one) for index, one in zip(share, picked)]

    with launch.stop_signals() as stop, data.prefetched(prepare, steps, load) as batches:
        log, began = open_logs(run.output, rank, config.group_size, run.step), time.perf_counter()
        for step, (task, batch) in tqdm(batches, "GRPO", initial=run.step, total=config.steps, disable=rank > 0,
                                        dynamic_ncols=True):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1, (step + 1) / (config.warmup_steps + 1))
            parts, completions = sample_step(config, policy, encoder, task, batch)
            numbers = run.count(step, take_step(config, policy, reference, optimizer, parts, completions, world))
            log({"step": step, "task": task.name, **numbers, "lr": optimizer.param_groups[0]["lr"]}, completions,
                time.perf_counter() - began)
            if run.finish(step, policy, optimizer, stop):
                sys.exit(0)
            began = time.perf_counter()
        model.save(policy, encoder, run.output / "model")


def sample_step(config: Config, policy, encoder, task: tasks.Task, batch: list) -> tuple[list, list[dict]]:
    """Sample and reward G completions of each prompt of `batch`, [(index in the stream, sample, prompt, errors)].

    Returns what to train on, a (prompts, rollouts, advantage (B, G)) for each pass of this process, and a row for
    each completion of all processes, in the order of the global batch.
    """
    size = config.prompts_per_pass or len(batch)
    passes, rows = [], []
    model.gathered(policy, True)
    for some in (batch[i:i + size] for i in range(0, len(batch), size)):
        prompts = [prompt for _, _, prompt, _ in some]
        if config.freeze_vision:        # policy and reference have the same tower, so what it sees serves for both
            prompts = grpo.see(policy, prompts)
        seeds = [np.random.SeedSequence([config.seed, index]).generate_state(1)[0] for index, *_ in some]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        rollouts = grpo.rollout(policy, prompts, config.group_size, config.max_tokens, encoder.stop_ids, generators,
                                config.temperature)
        texts = encoder.decode(rollouts.completions.flatten(0, 1), rollouts.mask.flatten(0, 1))     # B * G
        if task.segment:
            rewards.verbs_of([rewards.answer(text) for text in texts])      # one batch for spaCy, then look-ups
        repeated = [item for item in some for _ in range(config.group_size)]                        # B * G
        scores = [task.reward(text, sample) for text, (_, sample, _, _) in zip(texts, repeated)]
        advantage = grpo.advantages(torch.tensor([score.total for score in scores]).view(len(some), -1))    # (B, G)
        passes.append((prompts, rollouts, advantage.to(rollouts.mask.device)))

        lengths = rollouts.mask.sum(-1).flatten().tolist()
        logprobs = (rollouts.logprobs.sum(-1) / rollouts.mask.sum(-1)).flatten().tolist()                   # B * G
        last = rollouts.completions.gather(-1, rollouts.mask.sum(-1, keepdim=True) - 1).flatten().tolist()
        for i, ((index, sample, _, errors), text, score) in enumerate(zip(repeated, texts, scores)):
            rows.append({"index": index, "id": sample.id, "query": sample.query, "completion": text,
                         "reward": score.total, **score.parts, "advantage": advantage.flatten()[i].item(),
                         "tokens": lengths[i], "logprob": logprobs[i], "truncated": last[i] not in encoder.stop_ids,
                         "bad_videos": [str(error) for error in errors] if i % config.group_size == 0 else []})
    model.gathered(policy, False)
    return passes, sorted(launch.gather(rows), key=lambda row: row["index"])


def take_step(config: Config, policy, reference, optimizer, passes: list, rows: list[dict], world: int) -> dict:
    """One AdamW step on what `sample_step` returned; returns the numbers of the step for the log.

    When every group is flat there is nothing to learn, and no step: Adam would take one of full size on the tiny
    gradient of the KL term. Nor is there one when a number is not finite; all processes see the same numbers.
    """
    mean = lambda key: float(np.mean([row[key] for row in rows]))
    names = [name for name in ("format", "iou", "vc", "ar", "vd") if name in rows[0]]
    groups = np.array([row["advantage"] for row in rows]).reshape(-1, config.group_size)
    flat = float((groups == 0).all(1).mean())
    numbers = {"reward": mean("reward"), **{name: mean(name) for name in names}, "tokens": mean("tokens"),
               "logprob": mean("logprob"), "truncated": mean("truncated"), "flat": flat}
    if flat == 1:
        return {**numbers, "kl": None, "loss": None, "mismatch": None, "grad_norm": 0.0}

    sums = torch.zeros(3)
    for prompts, rollouts, advantage in passes:
        score = partial(grpo.logprobs, prompts=prompts, completions=rollouts.completions, mask=rollouts.mask,
                        temperature=config.temperature)
        with torch.no_grad():
            ref_logp = score(reference) if reference is not None else None
        logp = score(policy)                                                                # (B, G, C)
        loss, kl = grpo.loss(logp, logp.detach(), ref_logp, advantage, rollouts.mask, config.beta, len(rows))
        (loss * world).backward()       # FSDP averages the gradients over the processes; the loss wants their sum
        sums += torch.stack([loss.detach(), kl, (logp.detach() - rollouts.logprobs).abs().sum()]).cpu()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    loss, kl, mismatch = np.sum(launch.gather([sums.tolist()]), axis=0).tolist()
    numbers |= {"kl": kl, "loss": loss, "mismatch": mismatch / sum(row["tokens"] for row in rows),
                "grad_norm": launch.whole(norm)}
    if not launch.not_finite(numbers):
        optimizer.step()
    optimizer.zero_grad()
    return numbers


def open_logs(output: Path, rank: int, group_size: int, step: int):
    """log(numbers, rows, seconds): a console line and a metrics.jsonl line a step, one completion of each group in
    samples.jsonl, and once the name of every video that had to be replaced; only the first process writes. What an
    earlier run wrote from `step` on is taken out first."""
    if rank > 0:
        return lambda *_: None
    named = set()
    for name in ("metrics.jsonl", "samples.jsonl"):
        checkpoint.rewind(output / name, step)

    def log(numbers: dict, rows: list[dict], seconds: float) -> None:
        bad = [error for row in rows for error in row.pop("bad_videos")]
        skipped = launch.not_finite(numbers)
        numbers = {**numbers, "bad_videos": len(bad), "seconds": seconds,
                   "tokens_per_second": sum(row["tokens"] for row in rows) / seconds}
        launch.append(output / "metrics.jsonl", [numbers])
        launch.append(output / "samples.jsonl", [{"step": numbers["step"], "task": numbers["task"], **row}
                                                 for row in rows[::group_size]])
        tqdm.write("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                             for key, value in numbers.items()))
        if skipped:
            tqdm.write(f"step {numbers['step']} changes nothing: {', '.join(skipped)} not finite")
        for error in sorted(set(bad) - named):
            tqdm.write(f"replaced by another sample: {error}")
        named.update(bad)
    return log


if __name__ == "__main__":
    launch.command_line(Config, main, __doc__)
