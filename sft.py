"""Invert-SFT (Appendix D): supervised fine-tuning on what a model should say, the warm start before GRPO.

    python sft.py --model DIR --annotations train.txt --videos DIR --output runs/warm

Without --demonstrations the model learns to describe each annotated segment with its query: the VD task, with the
query as answer. With it, it learns from a JSON-lines file of completions for any of the four tasks, one a line, such
as a stronger model's or one's own:

    {"id": "AO8RW:1", "task": "TVG", "completion": "<think>...</think> <answer>0.0 to 6.9</answer>"}

where id is "<video>:<line in the annotation file>". The loss is the mean negative log-probability of the completions'
tokens, the stop token included. Writes config.json, metrics.jsonl, checkpoints/ and model/ to --output; --resume
continues as in train.py.
"""
import json
import re
import sys
import time
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import grpo
import model
import tasks
from engine import batches, checkpoint, distributed, files, flags, logs, lora
from engine.flags import VideoFlags, flag
from engine.loader import Loader
from engine.run import one_run, stop_signals


@dataclass(kw_only=True)
class Config(VideoFlags):
    """fine-tuning"""
    model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL")
    annotations: str = flag(MISSING, "annotation file of any of the formats that data.py lists")
    videos: str = flag(MISSING, "folder of the video files")
    output: str = flag(MISSING, "folder for logs and the model")
    demonstrations: str = flag("", "JSON lines of id, task, completion; empty: VD with the query as answer")
    think: bool = flag(True, "thoughts before the answer; false: prompts ask for the answer alone, and "
                             "<think>...</think> is left out of the demonstrations")
    steps: int = flag(1000, "optimizer steps; the paper does not say")
    seed: int = flag(0, "all randomness follows from it")
    batch_size: int = flag(32, "completions a step, over all processes")
    micro_batch_size: int = flag(0, "completions a forward pass on a process, 0 for all; lower it when memory runs out")
    learning_rate: float = flag(1e-5, "a usual value for full fine-tuning; falls linearly to a tenth of it")
    max_grad_norm: float = flag(1.0, "longer gradients are cut to this length, the usual value")
    lora_rank: int = flag(0, "train adapters of this rank beside frozen weights (LoRA, alpha 2 * rank, no dropout), "
                             "such as 16, with a --learning_rate ten times as large or more. 0: train all weights")
    save_every: int = flag(1000, "write a checkpoint every so many steps, 0 for only at the end and when stopped; one "
                                 "takes 12 bytes a weight, 45 GB for the 3B model")
    keep: int = flag(2, "checkpoints kept, the newest ones")
    resume: bool = flag(False, "continue from the newest checkpoint in --output, or begin where there is none")
    max_bad_steps: int = flag(10, "stop after so many steps in a row whose loss or gradient is not finite; such steps "
                                  "change nothing")


@dataclass(frozen=True)
class Demonstration:
    sample: data.Sample
    task: tasks.Task
    completion: str


def read_demonstrations(path: str, samples: list[data.Sample]) -> list[Demonstration]:
    """Every line of a demonstrations file, or the Invert-SFT ones when path is empty; without those of a task that
    cannot use their sample. Raises ValueError, which names the line."""
    usable = {name: {sample.id for sample in tasks.usable(samples, task)} for name, task in tasks.TASKS.items()}
    if not path:
        return [Demonstration(s, tasks.TASKS["VD"], f"<think>{s.query}</think> <answer>{s.query}</answer>")
                for s in samples if s.id in usable["VD"]]
    by_id, found = {sample.id: sample for sample in samples}, []
    content = Path(path).read_text(encoding="utf-8", errors="replace").rstrip("\n")
    for number, line in enumerate(content.split("\n"), 1):      # not splitlines(): see data.parse
        try:
            row = json.loads(line)
            found.append(Demonstration(by_id[row["id"]], tasks.TASKS[row["task"]], data.text(row["completion"])))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: no demonstration ({error!r}); it needs the id of a sample, a task "
                             f"({', '.join(tasks.TASKS)}) and a completion") from error
    return [each for each in found if each.sample.id in usable[each.task.name]]


def answer_only(each: Demonstration) -> Demonstration:
    """Without the thought, and of a task that asks for none."""
    completion = re.sub(r"<think>.*?</think>\s*", "", each.completion, flags=re.DOTALL)
    return replace(each, task=tasks.in_form(each.task, think=False), completion=completion)


@one_run
def main(config: Config) -> None:
    rank, world, device = distributed.start_process()
    if config.batch_size < 1 or config.batch_size % world:
        raise ValueError(f"--batch_size {config.batch_size} must be a multiple of the {world} processes")
    flags.check_numbers(config, "steps", "learning_rate", "max_grad_norm", "total_pixels", "cache_gb", "video_timeout",
                         "workers", "keep", "max_bad_steps")
    lora.check(config.model)
    lora.check_flags(config)
    run = checkpoint.Run(config)        # before anything is loaded
    samples, rejected = data.read(config.annotations, config.videos)
    demonstrations = read_demonstrations(config.demonstrations, samples)
    if not config.think:
        demonstrations = [answer_only(each) for each in demonstrations]
    if not demonstrations:
        raise ValueError(f"{config.demonstrations or config.annotations}: nothing to learn from, no query has a verb; "
                         "give demonstrations of TVG, or other annotations")
    half = torch.bfloat16 if config.lora_rank and device != "cpu" else torch.float32     # of what is never updated
    policy, encoder = model.load(config.model, dtype=half, lora_rank=config.lora_rank, seed=config.seed)
    policy = distributed.shard(policy)
    optimizer = torch.optim.AdamW([weight for weight in policy.parameters() if weight.requires_grad],
                                  lr=config.learning_rate, weight_decay=0.0)
    run.restore(policy, optimizer)
    load = Loader(config.total_pixels, config.video_timeout, config.cache, config.cache_gb, config.workers)
    steps = range(run.step, config.steps)       # none when only model/ is to be written
    if rank == 0:
        if steps:
            files.write_config(config, run.output)
        logs.rewind(run.output / "metrics.jsonl", run.step)
        logs.say(f"{len(demonstrations)} demonstrations of {len(samples)} samples, {len(rejected)} rejected, "
                   f"{len(data.missing(samples))} videos missing")
        for note in (*(f"rejected {item}" for item in rejected), *run.notes):
            logs.say(note)

    def tokenize(each: Demonstration) -> tuple[model.Prompt, torch.Tensor]:
        target = encoder.tokenizer(each.completion + model.STOP_TOKENS[0])["input_ids"]
        return tasks.prepare(each.sample, each.task, encoder, load), torch.tensor(target)

    def draw_batch(step: int) -> list[batches.Picked]:
        share = range(step * config.batch_size + rank, (step + 1) * config.batch_size, world)
        return batches.pick_all(demonstrations, share, config.seed, tokenize, config.workers)

    with stop_signals() as stop, batches.prefetched(draw_batch, steps, load) as upcoming:
        began = time.perf_counter()
        for step, batch in (bar := tqdm(upcoming, "SFT", initial=run.step, total=config.steps, disable=rank > 0,
                                        dynamic_ncols=True)):
            bad = distributed.gather([str(error) for picked in batch for error in picked.errors])
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - 0.9 * step / config.steps)
            numbers = run.count(step, take_step(config, policy, optimizer, [picked.made for picked in batch], world))
            if rank == 0:
                bar.set_postfix(loss=f"{numbers['loss']:.3f}")
                for error in bad:
                    logs.say(f"replaced by another sample: {error}")
                files.append(run.output / "metrics.jsonl", [{
                    "step": step, **numbers, "bad_videos": len(bad), "lr": optimizer.param_groups[0]["lr"],
                    "seconds": time.perf_counter() - began}])
            if run.finish(step, policy, optimizer, stop):
                sys.exit(0)
            began = time.perf_counter()
        model.save(policy, encoder, run.output / "model")


def take_step(config: Config, policy: model.Policy, optimizer: torch.optim.Optimizer,
              batch: list[tuple[model.Prompt, torch.Tensor]], world: int) -> dict[str, float]:
    """One AdamW step on (prompt, target tokens) of all processes; left out when loss or gradient is not finite."""
    total = sum(distributed.gather([sum(len(target) for _, target in batch)]))       # tokens, over all processes
    size, mean = config.micro_batch_size or len(batch), 0.0
    for some in (batch[i:i + size] for i in range(0, len(batch), size)):
        prompts, targets = zip(*some)
        completions = pad_sequence(targets, batch_first=True)[:, None]                                      # (B, 1, C)
        mask = pad_sequence([torch.ones_like(target) for target in targets], batch_first=True)[:, None]
        loss = -grpo.logprobs(policy, list(prompts), completions, mask).sum() / total
        (loss * world).backward()       # FSDP averages, the loss wants the sum
        mean += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    numbers = {"loss": sum(distributed.gather([mean])), "grad_norm": distributed.full_norm(norm)}
    if not files.not_finite(numbers):
        optimizer.step()
    optimizer.zero_grad()
    return numbers


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
