"""Invert-SFT (Appendix D): supervised fine-tuning on what a model should say, the warm start before GRPO.

    python sft.py --model DIR --annotations train.txt --videos DIR --output runs/warm

Without --demonstrations the model learns to describe each annotated segment with its query: the VD task, with the
query as answer. With it, it learns from a JSON-lines file of completions for any of the four tasks, one a line, such
as a stronger model's or one's own:

    {"id": "AO8RW:1", "task": "TVG", "completion": "<think>...</think> <answer>0.0 to 6.9</answer>"}

where id is "<video>:<line in the annotation file>". The loss is the mean negative log-probability of the completions'
tokens, the stop token included. Writes config.json, metrics.jsonl and model/ to --output.
"""
import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import grpo
import launch
import model
import tasks
import video


@dataclass
class Config:
    model: str = field(metadata={"help": "Hugging Face folder of a Qwen2.5-VL"})
    annotations: str = field(metadata={"help": "Charades-STA text file"})
    videos: str = field(metadata={"help": "folder of the video files"})
    output: str = field(metadata={"help": "folder for logs and the model"})
    demonstrations: str = field(default="", metadata={"help": "JSON lines of id, task, completion; empty: VD with the query as answer"})
    steps: int = field(default=1000, metadata={"help": "optimizer steps; the paper does not say"})
    seed: int = field(default=0, metadata={"help": "all randomness follows from it"})
    batch_size: int = field(default=32, metadata={"help": "completions a step, over all processes"})
    per_pass: int = field(default=0, metadata={"help": "completions a forward pass on a process, 0 for all; lower it when memory runs out"})
    learning_rate: float = field(default=1e-5, metadata={"help": "a usual value for full fine-tuning; falls linearly to a tenth of it"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "longer gradients are cut to this length"})
    total_pixels: int = field(default=video.TOTAL_PIXELS, metadata={"help": "pixels of all frames of a video"})


def read_demonstrations(path: str, samples: list[data.Sample]) -> list[tuple[data.Sample, tasks.Task, str]]:
    """(sample, task, completion) of every line of a demonstrations file, or the Invert-SFT ones when path is empty."""
    if not path:
        return [(s, tasks.TASKS["VD"], f"<think>{s.query}</think> <answer>{s.query}</answer>") for s in samples]
    by_id, found = {sample.id: sample for sample in samples}, []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found.append((by_id[row["id"]], tasks.TASKS[row["task"]], row["completion"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no demonstration ({error!r}); it needs the id of a sample, a task "
                             f"({', '.join(tasks.TASKS)}) and a completion") from error
    return found


def main(config: Config) -> None:
    rank, world, _ = launch.start_process()
    if config.batch_size < 1 or config.batch_size % world:
        raise ValueError(f"--batch_size {config.batch_size} must be a multiple of the {world} processes")
    samples, _ = data.read(config.annotations, config.videos)
    rows = read_demonstrations(config.demonstrations, samples)
    policy, encoder = model.load(config.model)
    policy = model.shard(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    load, output = partial(video.load, total_pixels=config.total_pixels), Path(config.output)
    make = lambda row: tasks.prepare(row[0], row[1], encoder, load)
    if rank == 0:
        launch.write_config(config, output)
        (output / "metrics.jsonl").write_text("")
    for step in (bar := tqdm(range(config.steps), desc="SFT", disable=rank > 0, dynamic_ncols=True)):
        began = time.perf_counter()
        share = range(step * config.batch_size + rank, (step + 1) * config.batch_size, world)
        batch = [data.pick(rows, index, config.seed, make)[:2] for index in share]
        targets = [encoder.tokenizer(row[2] + model.STOP_TOKENS[0])["input_ids"] for row, _ in batch]
        total = sum(launch.gather([sum(map(len, targets))]))                    # tokens, over all processes
        size, mean = config.per_pass or len(batch), 0.0
        for i in range(0, len(batch), size):
            tokens = [torch.tensor(t) for t in targets[i:i + size]]
            completions = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)[:, None]            # (B, 1, C)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)[:, None]
            logp = grpo.logprobs(policy, [prompt for _, prompt in batch[i:i + size]], completions, mask)
            loss = -logp.sum() / total
            (loss * world).backward()                                           # FSDP averages, the loss wants the sum
            mean += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - 0.9 * step / config.steps)
        optimizer.step()
        optimizer.zero_grad()
        mean = sum(launch.gather([mean]))
        if rank == 0:
            bar.set_postfix(loss=f"{mean:.3f}")
            with open(output / "metrics.jsonl", "a") as log:
                print(json.dumps({"step": step, "loss": mean, "lr": optimizer.param_groups[0]["lr"],
                                  "seconds": time.perf_counter() - began}), file=log)
    model.save(policy, encoder, output / "model")


if __name__ == "__main__":
    launch.command_line(Config, main, __doc__)
