"""GRPO on Qwen2.5-VL with TVG and the inversion tasks (Algorithm 1).

    python train.py --model DIR --annotations train.txt --videos DIR --output runs/x
    torchrun --nproc_per_node=8 train.py ...                        the same on eight GPUs of one node

A step: draw one task for the whole batch (Eq. 13); every process prepares its share of the prompts, samples G
completions of each, rewards them (Eq. 10, 11), normalises within the group (Eq. 3), scores them under the policy
and the frozen reference, and takes one AdamW step on the loss (Eq. 4).

Writes to --output: config.json, metrics.jsonl (a line a step), samples.jsonl (a completion of each prompt's group,
with its reward), and the trained model as a Hugging Face folder, model/.

Departures from the paper: the default learning rate (see Config), and those that grpo.py and tasks.py list.
"""
import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import grpo
import launch
import model
import rewards
import tasks
import video


@dataclass
class Config:
    model: str = field(metadata={"help": "Hugging Face folder of a Qwen2.5-VL"})
    annotations: str = field(metadata={"help": "Charades-STA text file"})
    videos: str = field(metadata={"help": "folder of the video files"})
    output: str = field(metadata={"help": "folder for logs and models"})
    steps: int = field(default=1000, metadata={"help": "optimizer steps; the paper's two epochs of Charades-STA in batches of 4 are 6,204"})
    seed: int = field(default=0, metadata={"help": "all randomness follows from it"})
    tvg_prob: float = field(default=0.8, metadata={"help": "p of Eq. 13, the paper's value"})
    tasks: list[str] = field(default_factory=lambda: list(tasks.INVERSIONS), metadata={"help": "inversion tasks to draw from; the paper's three"})
    group_size: int = field(default=8, metadata={"help": "G, completions a prompt; the paper does not say, the authors' code has 8"})
    prompts_per_step: int = field(default=4, metadata={"help": "prompts in the global batch; the paper's batch size. A multiple of the number of processes"})
    prompts_per_pass: int = field(default=0, metadata={"help": "prompts sampled and scored at once on a process, 0 for all; lower it when memory runs out, the result is the same"})
    beta: float = field(default=0.04, metadata={"help": "weight of the KL term; the paper does not say, the authors' code has 0.04. 0 needs no reference model"})
    learning_rate: float = field(default=1e-6, metadata={"help": "the paper says 5e-5, which breaks a fully fine-tuned model in a few steps; its authors' code leaves it at 1e-6"})
    warmup_steps: int = field(default=0, metadata={"help": "steps over which the learning rate rises, while Adam's averages are still noisy; 0 as in the paper"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "longer gradients are cut to this length, the usual value"})
    max_tokens: int = field(default=1024, metadata={"help": "longest completion; the authors' value"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling and scoring alike, so that what is scored is what was sampled"})
    total_pixels: int = field(default=video.TOTAL_PIXELS, metadata={"help": "pixels of all frames of a video, about the paper's 2.8 M"})
    save_every: int = field(default=0, metadata={"help": "also save the model every so many steps, 0 for only at the end"})


def check(config: Config, world: int) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    if not 0 <= config.tvg_prob <= 1:
        raise ValueError(f"--tvg_prob {config.tvg_prob} is no probability; give a value from 0 to 1")
    unknown = sorted(set(config.tasks) - set(tasks.INVERSIONS))
    if unknown or not config.tasks:
        raise ValueError(f"--tasks {' '.join(unknown)}: choose from {' '.join(tasks.INVERSIONS)}")
    if config.group_size < 2:
        raise ValueError(f"--group_size {config.group_size}: a group is compared with itself and needs at least 2")
    if config.prompts_per_step < 1 or config.prompts_per_step % world:
        raise ValueError(f"--prompts_per_step {config.prompts_per_step} must be a multiple of the {world} processes")


def main(config: Config) -> None:
    rank, world, device = launch.start_process()
    check(config, world)
    samples, rejected = data.read(config.annotations, config.videos)
    invertible = tasks.with_verb(samples) if config.tvg_prob < 1 else []
    if config.tvg_prob < 1 and not invertible:
        raise ValueError(f"{config.annotations}: no query with a verb, so no inversion task; give --tvg_prob 1")
    policy, encoder = model.load(config.model)
    reference = model.shard(copy.deepcopy(policy).requires_grad_(False)) if config.beta > 0 else None
    policy = model.shard(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0)
    load = partial(video.load, total_pixels=config.total_pixels)
    output = Path(config.output)
    if rank == 0:
        launch.write_config(config, output)
        tqdm.write(f"{len(samples)} samples, {len(rejected)} rejected, {len(samples) - len(invertible)} not for "
                   f"inversion; {world} process(es) on {device}")
        for item in rejected:
            tqdm.write(f"rejected {item.place}: {item.reason}")

    def prepare(step: int):
        """(task, this process's share of the step's prompts): every world-th of the global batch."""
        task = tasks.draw(step, config.seed, config.tvg_prob, config.tasks)
        pool = invertible if task.segment else samples
        share = range(step * config.prompts_per_step + rank, (step + 1) * config.prompts_per_step, world)
        make = partial(tasks.prepare, task=task, encoder=encoder, load=load)
        return task, [(index, *data.pick(pool, index, config.seed, make)) for index in share]

    with ThreadPoolExecutor(1) as background, open_logs(output, rank, config.group_size) as log:
        upcoming = background.submit(prepare, 0)
        for step in tqdm(range(config.steps), desc="GRPO", disable=rank > 0, dynamic_ncols=True):
            began = time.perf_counter()
            task, batch = upcoming.result()
            if step + 1 < config.steps:
                upcoming = background.submit(prepare, step + 1)     # decodes while this step computes
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1, (step + 1) / (config.warmup_steps + 1))
            numbers, completions = take_step(config, policy, reference, optimizer, encoder, task, batch, world)
            log({"step": step, "task": task.name, **numbers, "lr": optimizer.param_groups[0]["lr"]}, completions,
                time.perf_counter() - began)
            if config.save_every and (step + 1) % config.save_every == 0:
                model.save(policy, encoder, output / f"step_{step + 1:06d}")
    model.save(policy, encoder, output / "model")


def take_step(config: Config, policy, reference, optimizer, encoder, task, batch, world: int) -> tuple[dict, list[dict]]:
    """One GRPO step on this process's share of the batch, [(index in the stream, sample, prompt, errors)].

    Returns the step's numbers and all its completions, those of the other processes included.
    """
    size = config.prompts_per_pass or len(batch)
    parts, mine = [], []        # a part is what is sampled, and later scored, in one pass
    model.gathered(policy, True)
    for part in (batch[i:i + size] for i in range(0, len(batch), size)):
        generators = [torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0]))
                      for index, *_ in part]
        prompts = [prompt for _, _, prompt, _ in part]
        rollouts = grpo.rollout(policy, prompts, config.group_size, config.max_tokens, encoder.stop_ids, generators,
                                config.temperature)
        texts = encoder.decode(rollouts.completions.flatten(0, 1), rollouts.mask.flatten(0, 1))
        of = [sample for _, sample, *_ in part for _ in range(config.group_size)]
        rewards.verbs_of([rewards.answer(text) for text in texts] if task.segment else [])     # tags them in one batch
        scores = [task.reward(text, sample) for text, sample in zip(texts, of)]
        total = torch.tensor([score.total for score in scores]).view(len(part), -1)         # (B, G)
        advantage = grpo.advantages(total)
        parts.append((prompts, rollouts, advantage.to(rollouts.mask.device)))
        ended = torch.isin(rollouts.completions, torch.tensor(encoder.stop_ids, device=rollouts.mask.device)).any(-1)
        for i, (text, sample, score) in enumerate(zip(texts, of, scores)):
            mine.append({"index": part[i // config.group_size][0], "id": sample.id, "query": sample.query, "completion": text, "reward": score.total,
                         **score.parts, "advantage": advantage.flatten()[i].item(),
                         "tokens": int(rollouts.mask.flatten(0, 1)[i].sum()),
                         "truncated": not bool(ended.flatten()[i])})
    model.gathered(policy, False)
    everyone = sorted(launch.gather(mine), key=lambda row: row["index"])    # the same order for any number of processes
    mean = lambda key: float(np.mean([row[key] for row in everyone]))
    flat = np.mean([all(row["advantage"] == 0 for row in everyone[i:i + config.group_size])
                    for i in range(0, len(everyone), config.group_size)])
    numbers = {"reward": mean("reward"), **{name: mean(name) for name in scores[0].parts}, "tokens": mean("tokens"),
               "truncated": mean("truncated"), "flat": float(flat)}
    if flat == 1:       # nothing to learn from; Adam would still take a full-size step on the KL term's tiny gradient
        return {**numbers, "kl": None, "loss": None, "mismatch": None, "grad_norm": 0.0}, everyone

    sums = torch.zeros(3)
    for prompts, rollouts, advantage in parts:
        score = partial(grpo.logprobs, prompts=prompts, completions=rollouts.completions, mask=rollouts.mask,
                        temperature=config.temperature)
        with torch.no_grad():
            ref_logp = score(reference) if reference is not None else None
        logp = score(policy)                                                                # (B, G, C)
        loss, kl = grpo.loss(logp, logp.detach(), ref_logp, advantage, rollouts.mask, config.beta, len(everyone))
        (loss * world).backward()       # FSDP averages the gradients over the processes; the loss wants their sum
        mismatch = (logp.detach() - rollouts.logprobs).abs().sum() / rollouts.mask.sum() / len(parts) / world
        sums += torch.stack([loss.detach(), kl, mismatch]).cpu()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    loss, kl, mismatch = np.sum(launch.gather([sums.tolist()]), axis=0).tolist()
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return {**numbers, "kl": kl, "loss": loss, "mismatch": mismatch, "grad_norm": float(norm)}, everyone


@contextmanager
def open_logs(output: Path, rank: int, group_size: int):
    """log(numbers, completions, seconds): a console line and a metrics.jsonl line a step, and one completion of each
    group in samples.jsonl; only the first process writes."""
    if rank > 0:
        yield lambda *_: None
        return
    with open(output / "metrics.jsonl", "w") as metrics, open(output / "samples.jsonl", "w") as shown:
        def log(numbers: dict, completions: list[dict], seconds: float) -> None:
            numbers["tokens_per_second"] = sum(row["tokens"] for row in completions) / seconds
            numbers["seconds"] = seconds
            print(json.dumps(numbers), file=metrics, flush=True)
            for row in completions[::group_size]:
                print(json.dumps({"step": numbers["step"], "task": numbers["task"], **row}), file=shown, flush=True)
            tqdm.write("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                                 for key, value in numbers.items()))
        yield log


if __name__ == "__main__":
    launch.command_line(Config, main, __doc__)
