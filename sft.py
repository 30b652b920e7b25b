"""Invert-SFT (Appendix D): supervised fine-tuning on what a model should say, the warm start before GRPO.

    python sft.py --model DIR --annotations train.txt --videos DIR --output runs/warm

Without --demonstrations the model learns to describe each annotated segment with its query: the VD task, with the
query as answer. With --demonstrations it learns from a JSON-lines file of completions for any of the four tasks, one
per line, for example by a stronger model or by hand:

    {"id": "AO8RW:1", "task": "TVG", "completion": "<think>...</think> <answer>0.0 to 6.9</answer>"}

where id is "<video>:<line in the annotation file>". The loss is the mean negative log-probability of the completions'
tokens, the stop token included. Writes config.json, metrics.jsonl, checkpoints/ and model/ to --output; --resume
continues as in train.py.
"""
import json
import re
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import grpo
import model
import tasks
from engine import lora
from engine.batches import Batches
from engine.distributed import full_norm, gather, shard, start_process
from engine.files import not_finite
from engine.flags import VideoFlags, check_numbers, command_line, flag
from engine.loader import Loader
from engine.run import Run, one_run, stop_signals


@dataclass(kw_only=True)
class Config(VideoFlags):
    """fine-tuning"""
    model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL")
    annotations: str = flag(MISSING, "annotation file of any of the formats that data.py lists")
    videos: str = flag(MISSING, "folder of the video files")
    output: str = flag(MISSING, "folder for logs and the model")
    demonstrations: str = flag("", "JSON lines of id, task, completion; empty: VD with the query "
                                   "as answer")
    think: bool = flag(True, "thoughts before the answer; false: prompts ask for the answer alone, "
                             "and <think>...</think> is left out of the demonstrations")
    steps: int = flag(1000, "optimizer steps; the paper does not say")
    seed: int = flag(0, "all randomness follows from it")
    batch_size: int = flag(32, "completions per step, over all processes")
    micro_batch_size: int = flag(0, "completions per forward pass of a process, 0 for all; lower "
                                    "it when memory runs out")
    learning_rate: float = flag(1e-5, "a usual value for full fine-tuning; falls linearly to a "
                                      "tenth of it")
    lora_rank: int = flag(0, "train adapters of this rank beside frozen weights (LoRA, alpha 2 * "
                             "rank, no dropout), such as 16, with a --learning_rate ten times as "
                             "large or more. 0: train all weights")
    save_every: int = flag(1000, "write a checkpoint every so many steps, 0 for only at the end "
                                 "and when stopped; one takes 12 bytes per weight, 45 GB for the "
                                 "3B model, and two are kept")
    resume: bool = flag(False, "continue from the newest checkpoint in --output, or begin where "
                               "there is none")


@dataclass(frozen=True)
class Demonstration:
    sample: data.Sample
    task: tasks.Task
    completion: str


def read_demonstrations(path: str, samples: list[data.Sample]) -> list[Demonstration]:
    """The demonstrations of a file, or those of Invert-SFT when `path` is empty. A demonstration of a task that cannot
    use its sample is left out. Raises ValueError, which names the line."""
    demonstrations = []
    if path:
        by_id = {sample.id: sample for sample in samples}
        text = Path(path).read_text(encoding="utf-8", errors="replace").rstrip("\n")
        for number, line in enumerate(text.split("\n"), 1):     # not splitlines(): see data.parse
            try:
                row = json.loads(line)
                sample, task = by_id[row["id"]], tasks.TASKS[row["task"]]
                demonstrations.append(Demonstration(sample, task, data.text(row["completion"])))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: no demonstration ({error!r}); it needs the id "
                                 f"of a sample, a task ({', '.join(tasks.TASKS)}) and a "
                                 "completion") from error
    else:
        for sample in samples:
            completion = f"<think>{sample.query}</think> <answer>{sample.query}</answer>"
            demonstrations.append(Demonstration(sample, tasks.TASKS["VD"], completion))
    usable = {name: tasks.usable(samples, task) for name, task in tasks.TASKS.items()}
    ids = {name: {sample.id for sample in usable[name]} for name in usable}
    return [each for each in demonstrations if each.sample.id in ids[each.task.name]]


def answer_only(each: Demonstration) -> Demonstration:
    """The demonstration without its thought, for the task that asks for no thought."""
    completion = re.sub(r"<think>.*?</think>\s*", "", each.completion, flags=re.DOTALL)
    return replace(each, task=tasks.in_form(each.task, think=False), completion=completion)


@one_run
def main(config: Config) -> None:
    rank, world, device = start_process()
    check_flags(config, world)
    run = Run(config)       # raises, before anything is loaded, when the folder cannot be continued
    samples, rejected = data.read(config.annotations, config.videos)
    demonstrations = read_demonstrations(config.demonstrations, samples)
    if not config.think:
        demonstrations = [answer_only(each) for each in demonstrations]
    if not demonstrations:
        raise ValueError(f"{config.demonstrations or config.annotations}: nothing to learn from, "
                         "no query has a verb; give demonstrations of TVG, or other annotations")
    dtype = torch.float32
    if config.lora_rank and device != "cpu":
        dtype = torch.bfloat16              # of weights that are never updated
    policy, encoder = model.load(config.model, dtype=dtype, lora_rank=config.lora_rank,
                                 seed=config.seed)
    policy = shard(policy)
    learning = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=config.learning_rate, weight_decay=0.0)
    run.restore(policy, optimizer)
    run.announce(f"{len(demonstrations)} demonstrations of {len(samples)} samples, {len(rejected)} "
                 f"rejected, {len(data.missing(samples))} videos missing", rejected)
    loader = Loader(config.total_pixels, config.video_timeout, config.cache, config.cache_gb,
                    config.workers)

    def prepare(each: Demonstration, task: None) -> tuple[model.Prompt, torch.Tensor]:
        """A prompt, and the tokens of its completion."""
        target = encoder.tokenizer(each.completion + model.STOP_TOKENS[0])["input_ids"]
        return tasks.prepare(each.sample, each.task, encoder, loader), torch.tensor(target)

    batches = Batches(range(run.step, config.steps), config.batch_size, config.seed, rank, world,
                      lambda step: (None, demonstrations), prepare, loader)
    with stop_signals(run.stop), batches:
        for step in run.steps("SFT"):
            batch = batches.next()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - 0.9 * step / config.steps)
            metrics = update(policy, optimizer, batch.prompts, config.micro_batch_size, world)
            run.log(step, metrics, batch)
            run.save_if_due(step)
        model.save(policy, encoder, run.output / "model")


def check_flags(config: Config, world: int) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    if config.batch_size < 1 or config.batch_size % world:
        raise ValueError(f"--batch_size {config.batch_size} must be a multiple of the {world} "
                         "processes")
    check_numbers(config, "steps", "learning_rate")
    lora.check(config.model)
    lora.check_flags(config)


def update(policy: model.Policy, optimizer: torch.optim.Optimizer,
           batch: list[tuple[model.Prompt, torch.Tensor]], micro_batch_size: int,
           world: int) -> dict[str, float]:
    """One AdamW step on (prompt, target tokens) of all processes; left out when loss or gradient is not finite."""
    num_tokens = sum(gather([sum(len(target) for _, target in batch)]))     # over all processes
    size = micro_batch_size or len(batch)
    mean_loss = 0.0
    for i in range(0, len(batch), size):
        prompts, targets = zip(*batch[i:i + size])
        ones = [torch.ones_like(target) for target in targets]
        completions = pad_sequence(targets, batch_first=True)[:, None]          # (B, 1, C)
        mask = pad_sequence(ones, batch_first=True)[:, None]                    # (B, 1, C)
        loss = -grpo.logprobs(policy, list(prompts), completions, mask).sum() / num_tokens
        (loss * world).backward()       # FSDP averages over processes; the loss wants the sum
        mean_loss += loss.item()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), grpo.MAX_GRAD_NORM)
    metrics = {"loss": sum(gather([mean_loss])), "grad_norm": full_norm(grad_norm)}
    if not not_finite(metrics):
        optimizer.step()
    optimizer.zero_grad()
    return metrics


if __name__ == "__main__":
    command_line(Config, main, __doc__)
