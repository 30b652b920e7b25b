"""GRPO on Qwen2.5-VL with TVG and the inversion tasks (Algorithm 1).

    python train.py --model DIR --annotations train.txt --videos DIR --output runs/x
    torchrun --nproc_per_node=8 train.py ...                        the same on eight GPUs of one node

A step: draw one task for the whole batch (Eq. 13); every process prepares its share of the prompts, samples G
completions of each, rewards them (Eq. 10, 11), normalises within the group (Eq. 3), scores them under the policy
and the frozen reference, and takes one AdamW step on the loss (Eq. 4).

Writes to --output: config.json, metrics.jsonl (a line a step), samples.jsonl (a completion of each prompt's group,
with its reward), checkpoints/, and at the end the trained model as a Hugging Face folder, model/
(docs/transformers.md: what other programs have to mind, such as transformers' own `generate`). With --eval_annotations
also evaluations.jsonl, scores on held-out queries meanwhile, and best/, the model that had the highest mIoU of them.

With --resume the same command continues a run that was killed, and one that has done its --steps writes model/ again:
`--resume --steps 1` makes a Hugging Face folder of the newest checkpoint at any time.

Departures from the paper: the default learning rate (see Config), no step on a batch whose groups are all flat (see
main), and those that grpo.py, tasks.py, rewards.py and engine/video.py list.
"""
import sys
import time
from dataclasses import MISSING, dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
import grpo
import model
import tasks
from engine import batches, checkpoint, distributed, files, flags, logs, lora
from engine.flags import AnswerFlags, VideoFlags, flag
from engine.loader import Loader
from engine.logs import Logs, check_board
from engine.run import one_run, stop_signals


@dataclass(kw_only=True)
class Config(VideoFlags, AnswerFlags):
    """training"""
    model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL")
    annotations: str = flag(MISSING, "annotation file of any of the formats that data.py lists")
    videos: str = flag(MISSING, "folder of the video files")
    output: str = flag(MISSING, "folder for logs, checkpoints and the trained model")
    steps: int = flag(1000, "optimizer steps; the paper's two epochs of Charades-STA in batches of 4 are 6,204")
    seed: int = flag(0, "all randomness follows from it")
    tvg_prob: float = flag(0.8, "p of Eq. 13, the paper's value")
    tasks: list[str] = flag(list(tasks.INVERSIONS), "inversion tasks to draw from; the paper's three")
    group_size: int = flag(8, "G, completions a prompt; the paper does not say, the authors' code has 8")
    prompts_per_step: int = flag(4, "prompts in the global batch, a multiple of the processes; the paper's batch size")
    micro_batch_size: int = flag(0, "prompts sampled and scored at once on a process, 0 for all; lower it when memory "
                                    "runs out, the result is the same")
    beta: float = flag(0.04, "weight of the KL term; the paper does not say, the authors' code has 0.04. 0 needs no "
                             "reference model")
    learning_rate: float = flag(1e-6, "its authors' code has 1e-6; the paper says 5e-5, fifty times what full "
                                      "fine-tuning with reinforcement learning usually takes")
    warmup_steps: int = flag(0, "steps over which the learning rate rises, while Adam's averages are noisy; 0: none")
    max_grad_norm: float = flag(1.0, "longer gradients are cut to this length, the usual value")
    loss_type: str = flag("grpo", "grpo: mean over a completion's tokens, then over completions; bnpo: over all tokens of "
                             "the batch, as in the authors' trainer; dr_grpo: sum over tokens / --max_tokens, mean")
    scale_rewards: str = flag("std", "std: advantages are divided by their group's (Eq. 3); none: they are not")
    num_iterations: int = flag(1, "AdamW steps a rollout; the paper's ratio and the clipping count from the second on")
    epsilon: float = flag(0.2, "a token whose ratio has gone further than this from 1 gains no more; PPO's usual value")
    freeze_vision: bool = flag(False, "leave the vision tower as it is: it then runs once a video and step")
    lora_rank: int = flag(0, "train adapters of this rank beside frozen weights (LoRA, alpha 2 * rank, no dropout, "
                             "--freeze_vision implied), for a fraction of the memory; such as 16, with a "
                             "--learning_rate ten times as large or more. 0: train all weights")
    merge: bool = flag(False, "write model/ with the adapters merged into the weights, instead of the adapters alone")
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass and compute it again: about a quarter "
                                               "more time in scoring, for less memory; same result")
    vd_max_verbs: int = flag(0, "a description with more different verbs earns nothing in VD; 0: any number, as Eq. 7 is "
                            "written, by which a list of 50 verbs earns 0.96 on Charades-STA")
    cosine_rewards: bool = flag(False, "pay an inversion task the similarity of its verbs in place of 0 or 1 (Table 3)")
    temperature: float = flag(1.0, "of sampling and scoring alike, so that what is scored is what was sampled")
    eval_annotations: str = flag("", "annotation file of held-out queries, on which the model is scored meanwhile; "
                                     "training is the same to the bit. Empty: none")
    eval_every: int = flag(0, "score every so many steps, 0 for only before the first one and after the last")
    eval_samples: int = flag(200, "queries of that file, always the same ones, in TVG, VC, AR and VD, greedily")
    eval_videos: str = flag("", "folder of their video files; empty: --videos")
    save_every: int = flag(100, "write a checkpoint every so many steps, 0 for only at the end and when stopped; one "
                                "takes 12 bytes a weight, 45 GB for the 3B model")
    keep: int = flag(2, "checkpoints kept, the newest ones")
    resume: bool = flag(False, "continue from the newest checkpoint in --output, or begin where there is none")
    tensorboard: bool = flag(False, "write the numbers for TensorBoard, too, to --output/tensorboard")
    max_bad_steps: int = flag(10, "stop after so many steps in a row whose loss, reward or gradient is not finite; "
                                  "such steps change nothing")


def check_flags(config: Config, world: int) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    flags.check_numbers(config, "steps", "max_tokens", "temperature", "learning_rate", "max_grad_norm", "total_pixels",
                         "cache_gb", "video_timeout", "workers", "keep", "max_bad_steps", "num_iterations", "epsilon",
                         "eval_samples")
    if config.eval_every and not config.eval_annotations:
        raise ValueError(f"--eval_every {config.eval_every}: give --eval_annotations, a file of held-out queries, too")
    for name, known in (("loss_type", ("grpo", "bnpo", "dr_grpo")), ("scale_rewards", ("std", "none"))):
        if getattr(config, name) not in known:
            raise ValueError(f"--{name} {getattr(config, name)}: choose from {', '.join(known)}")
    unknown = sorted(set(config.tasks) - set(tasks.INVERSIONS))
    if unknown or not config.tasks:
        raise ValueError(f"--tasks {' '.join(unknown)}: choose from {' '.join(tasks.INVERSIONS)}")
    if config.group_size < 2:
        raise ValueError(f"--group_size {config.group_size}: a group is compared with itself and needs at least 2")
    if config.prompts_per_step < 1 or config.prompts_per_step % world:
        raise ValueError(f"--prompts_per_step {config.prompts_per_step} must be a multiple of the {world} processes")
    if config.tensorboard:
        check_board()
    model.check_folder(config.model)
    lora.check_flags(config)


@one_run
def main(config: Config) -> None:
    rank, world, device = distributed.start_process()
    check_flags(config, world)
    run = checkpoint.Run(config)        # before anything is loaded
    samples, rejected = data.read(config.annotations, config.videos)
    drawn = ["TVG"] * (config.tvg_prob > 0) + config.tasks * (config.tvg_prob < 1)
    pools = {name: tasks.usable(samples, tasks.TASKS[name]) for name in drawn}
    for name, pool in pools.items():
        if not pool:
            raise ValueError(f"{config.annotations}: no query with a verb, so no {name}; give --tvg_prob 1")
    held_out = evaluate.read_held_out(config)
    policy, reference, encoder = load_models(config, device)
    optimizer = torch.optim.AdamW([weight for weight in policy.parameters() if weight.requires_grad],
                                  lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    run.restore(policy, optimizer)
    load = Loader(config.total_pixels, config.video_timeout, config.cache, config.cache_gb, config.workers)
    steps = range(run.step, config.steps)       # none when only model/ is to be written
    if rank == 0:
        if steps:
            files.write_config(config, run.output)
        announce(run, samples, rejected, pools, f"{world} process(es) on {device}")

    def draw_batch(step: int) -> tuple[tasks.Task, list[batches.Picked]]:
        """The step's task, and this process's share of its prompts: every world-th."""
        task = tasks.draw(step, config.seed, config.tvg_prob, config.tasks)     # Eq. 13
        task = tasks.in_form(task, config.think, config.cosine_rewards, config.vd_max_verbs)
        share = range(step * config.prompts_per_step + rank, (step + 1) * config.prompts_per_step, world)
        make = partial(tasks.prepare, task=task, encoder=encoder, load=load)
        return task, batches.pick_all(pools[task.name], share, config.seed, make, config.workers)

    with stop_signals() as stop, batches.prefetched(draw_batch, steps, load) as upcoming:
        evaluate_if_due = evaluate.while_training(config, run, held_out, policy, encoder, load)
        log = Logs(run.output, rank, config.group_size, run.step, config.tensorboard)
        evaluate_if_due(log)
        began = time.perf_counter()
        for step, (task, batch) in tqdm(upcoming, "GRPO", initial=run.step, total=config.steps, disable=rank > 0,
                                        dynamic_ncols=True):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1, (step + 1) / (config.warmup_steps + 1))
            passes, rows = sample_groups(config, policy, encoder, task, batch)
            numbers = summarise(task, rows, config.group_size)
            if numbers["flat"] < 1:
                numbers = take_step(config, policy, reference, optimizer, passes, numbers, world)
            else:   # nothing to learn: Adam would take a step of full size on the tiny gradient of the KL term
                numbers |= {**dict.fromkeys(("kl", "loss", "clipped", "mismatch")), "grad_norm": 0.0, "updates": 0}
            log.step({"step": step, "task": task.name, "part": task.part, **run.count(step, numbers),
                      "lr": optimizer.param_groups[0]["lr"]}, rows, time.perf_counter() - began)
            if run.finish(step, policy, optimizer, stop):
                sys.exit(0)
            evaluate_if_due(log)
            began = time.perf_counter()
        model.save(policy, encoder, run.output / "model", config.merge)


def announce(run: checkpoint.Run, samples: list[data.Sample], rejected: list[data.Rejected],
             pools: dict[str, list[data.Sample]], where: str) -> None:
    """Say what there is to train on, what not, and what a resumed run has to say."""
    silent = len(samples) - min(map(len, pools.values()))
    logs.say(f"{len(samples)} samples, {len(rejected)} rejected{f', {silent} without a verb' if silent else ''}, "
               f"{len(data.missing(samples))} videos missing; {where}")
    for note in (*(f"rejected {item}" for item in rejected), *run.notes):
        logs.say(note)


def load_models(config: Config, device: str) -> tuple[model.Policy, model.Policy | None, model.Encoder]:
    """(policy, reference or None, encoder), spread over the processes. With adapters one model is both."""
    reference, half = None, torch.float32 if device == "cpu" else torch.bfloat16        # of what is never updated
    if config.beta > 0 and not config.lora_rank:
        # loaded on its own and first, so that a process never holds two whole models
        reference = distributed.shard(model.load(config.model, dtype=half)[0].requires_grad_(False))
    policy, encoder = model.load(config.model, dtype=half if config.lora_rank else torch.float32,
                                 lora_rank=config.lora_rank, seed=config.seed)
    if config.freeze_vision:
        policy.qwen.model.visual.requires_grad_(False)
    if config.gradient_checkpointing:
        distributed.gradient_checkpointing(policy)
    policy = distributed.shard(policy)
    return policy, policy if config.lora_rank and config.beta > 0 else reference, encoder


@dataclass(frozen=True)
class Pass:
    """Prompts that a process samples and scores at once, and what came of them."""
    prompts: list[model.Prompt]             # B
    rollouts: grpo.Rollouts
    advantage: Float[Tensor, "B G"]


def sample_groups(config: Config, policy: model.Policy, encoder: model.Encoder, task: tasks.Task,
                  batch: list[batches.Picked]) -> tuple[list[Pass], list[dict]]:
    """Sample and reward G completions of each prompt of `batch`.

    Returns what to train on, and a row for each completion of all processes, in the order of the global batch.
    """
    size = config.micro_batch_size or len(batch)
    passes, rows = [], []
    with distributed.gathered(policy):
        for some in (batch[i:i + size] for i in range(0, len(batch), size)):
            prompts = [picked.made for picked in some]
            if config.freeze_vision or config.lora_rank:
                # policy and reference have the same tower, so what it sees serves for both
                prompts = model.see(policy, prompts)
            seeds = [np.random.SeedSequence([config.seed, picked.index]).generate_state(1)[0] for picked in some]
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
            rollouts = grpo.rollout(policy, prompts, config.group_size, config.max_tokens, encoder.stop_ids, generators,
                                    config.temperature)
            texts = encoder.decode(rollouts.completions.flatten(0, 1), rollouts.mask.flatten(0, 1))         # B * G
            rewards = task.reward(texts, [picked.item for picked in some for _ in range(config.group_size)])
            totals = torch.tensor([reward.total for reward in rewards]).view(len(some), -1)                 # (B, G)
            advantage = grpo.advantages(totals, config.scale_rewards == "std")                              # Eq. 3
            passes.append(Pass(prompts, rollouts, advantage.to(rollouts.mask.device)))
            rows += describe(some, rollouts, texts, rewards, advantage, encoder.stop_ids)
    return passes, sorted(distributed.gather(rows), key=lambda row: row["index"])


def describe(some: list[batches.Picked], rollouts: grpo.Rollouts, texts: list[str], rewards: list,
             advantage: Float[Tensor, "B G"], stop_ids: list[int]) -> list[dict]:
    """A row for each of the B * G completions of a pass: what it was, and what it earned."""
    lengths = rollouts.mask.sum(-1)                                                                         # (B, G)
    logprobs = (rollouts.logprobs.sum(-1) / lengths).tolist()
    last, lengths = rollouts.completions.gather(-1, lengths[..., None] - 1)[..., 0].tolist(), lengths.tolist()
    rows, said = [], iter(zip(texts, rewards))
    for b, picked in enumerate(some):
        for g in range(advantage.shape[1]):
            text, reward = next(said)
            rows.append({"index": picked.index, "id": picked.item.id, "query": picked.item.query, "completion": text,
                         "reward": reward.total, **reward.parts, **reward.info, "advantage": advantage[b, g].item(),
                         "tokens": lengths[b][g], "logprob": logprobs[b][g], "truncated": last[b][g] not in stop_ids,
                         "bad_videos": [str(error) for error in picked.errors] if g == 0 else []})
    return rows


def summarise(task: tasks.Task, rows: list[dict], group_size: int) -> dict[str, float]:
    """Means over the completions of a step, and `flat`, the share of groups without any advantage."""
    groups = np.array([row["advantage"] for row in rows]).reshape(-1, group_size)
    keys = [key for key in ("reward", "format", task.part, "tokens", "logprob", "truncated", "verbs_said")
            if key in rows[0]]
    return {**{key: float(np.mean([row[key] for row in rows])) for key in keys},
            "flat": float((groups == 0).all(1).mean())}


def take_step(config: Config, policy: model.Policy, reference: model.Policy | None, optimizer: torch.optim.Optimizer,
              passes: list[Pass], numbers: dict[str, float], world: int) -> dict[str, float]:
    """--num_iterations AdamW steps on all passes of all processes; returns the numbers of the step with those of the last one.
    One of whose numbers some are not finite is left out, and so are those after it: all processes see the same."""
    total = config.prompts_per_step * config.group_size
    tokens = {"grpo": None, "bnpo": numbers["tokens"] * total, "dr_grpo": float(config.max_tokens * total)}[config.loss_type]
    scores = [partial(grpo.logprobs, prompts=each.prompts, completions=each.rollouts.completions,
                      mask=each.rollouts.mask, temperature=config.temperature) for each in passes]
    with torch.no_grad(), lora.reference(reference):
        ref_logps = [score(reference) if reference is not None else None for score in scores]
    numbers, old_logps = {**numbers, "updates": 0}, []      # of pi_old, the policy before the first update
    for update in range(1, config.num_iterations + 1):
        sums = torch.zeros(4)
        for i, each in enumerate(passes):
            logp = scores[i](policy)                                                        # (B, G, C)
            old_logps += [logp.detach()] * (update == 1)
            loss, kl, clipped = grpo.loss(logp, old_logps[i], ref_logps[i], each.advantage, each.rollouts.mask,
                                          config.beta, total, tokens, config.epsilon)
            (loss * world).backward()   # FSDP averages the gradients over the processes; the loss wants their sum
            mismatch = (old_logps[i] - each.rollouts.logprobs).abs().sum()
            sums += torch.stack([loss.detach(), kl, clipped, mismatch]).cpu()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        loss, kl, clipped, mismatch = np.sum(distributed.gather([sums.tolist()]), axis=0).tolist()
        numbers |= {"kl": kl, "loss": loss, "clipped": clipped, "mismatch": mismatch / (numbers["tokens"] * total),
                    "grad_norm": distributed.full_norm(norm)}
        if files.not_finite(numbers):
            break
        optimizer.step()
        optimizer.zero_grad()
        numbers["updates"] = update
    optimizer.zero_grad()
    return numbers


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
