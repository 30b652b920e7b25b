"""GRPO on Qwen2.5-VL with TVG and the inversion tasks (Algorithm 1).

    python train.py --model DIR --annotations train.txt --videos DIR --output runs/x
    torchrun --nproc_per_node=8 train.py ...                        the same on eight GPUs of one node

The loop of `main` is the algorithm: draw one task for the whole batch (Eq. 13), sample G completions of each prompt,
reward them (Eq. 5-11), normalise within the group (Eq. 3), and take an AdamW step on the loss (Eq. 4). Every process
prepares its share of the prompts.

Writes to --output: config.json, metrics.jsonl (one line per step), samples.jsonl (one completion of each group, with
its reward), checkpoints/, and at the end the trained model as a Hugging Face folder, model/ (docs/transformers.md: what
to know before other programs load it). With --eval_annotations it also writes evaluations.jsonl, the scores on held-out
queries during training, and best/, the model with the highest of these mIoUs.

With --resume the same command continues a run that was killed. A run that has taken all its --steps only writes model/
again; so `--resume --steps 1` turns the newest checkpoint into a Hugging Face folder at any time.

Departures from the paper: the default learning rate (see Config), and those that grpo.py, tasks.py, rewards.py and
engine/video.py list.
"""
from dataclasses import MISSING, dataclass

import torch

import data
import evaluate
import grpo
import model
import tasks
from engine import lora
from engine.batches import Batches
from engine.distributed import gradient_checkpointing, shard, start_process
from engine.flags import AnswerFlags, VideoFlags, check_numbers, command_line, flag
from engine.loader import Loader
from engine.logs import check_board, describe
from engine.run import Run, one_run, stop_signals

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo")


@dataclass(kw_only=True)
class Config(VideoFlags, AnswerFlags):
    """training"""
    model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL, or the name of one on the hub")
    annotations: str = flag(MISSING, "annotation file of any of the formats that data.py lists")
    videos: str = flag(MISSING, "folder of the video files")
    output: str = flag(MISSING, "folder for logs, checkpoints and the trained model")
    steps: int = flag(1000, "optimizer steps; the paper's two epochs of Charades-STA in batches of "
                            "4 are 6,204")
    seed: int = flag(0, "all randomness follows from it")
    tvg_prob: float = flag(0.8, "p of Eq. 13, the paper's value")
    tasks: list[str] = flag(list(tasks.INVERSIONS),
                            "inversion tasks to draw from; the paper's three")
    group_size: int = flag(8, "G, completions per prompt; the paper does not say, the authors' "
                              "code has 8")
    prompts_per_step: int = flag(4, "prompts in the global batch, a multiple of the processes; the "
                                    "paper's batch size")
    micro_batch_size: int = flag(0, "prompts that a process samples and scores at once, 0 for all; "
                                    "lower it when memory runs out, the result is the same")
    beta: float = flag(0.04, "weight of the KL term; the paper does not say, the authors' code has "
                             "0.04. 0 needs no reference model")
    learning_rate: float = flag(1e-6, "the authors' code has 1e-6; the paper says 5e-5, fifty "
                                      "times what full fine-tuning with reinforcement learning "
                                      "usually takes")
    loss_type: str = flag("grpo", "grpo: mean over a completion's tokens, then over completions; "
                                  "bnpo: over all tokens of the batch, as in the authors' trainer; "
                                  "dr_grpo: sum over tokens / --max_tokens, mean")
    scale_rewards: str = flag("std",
                              "std: advantages are divided by the standard deviation of their "
                                     "group's rewards (Eq. 3); none: they are not divided")
    num_iterations: int = flag(1, "AdamW steps per rollout; ratio and clipping have an effect from "
                                  "the second step on")
    epsilon: float = flag(0.2, "a token whose ratio differs from 1 by more than this gains no "
                               "more; PPO's usual value")
    cosine_rewards: bool = flag(False, "pay an inversion task the similarity of its verbs in place "
                                       "of 0 or 1 (Table 3)")
    vd_max_verbs: int = flag(0, "a description with more different verbs than this earns nothing "
                                "in VD; 0: no limit, as in Eq. 7, under which a list of 50 verbs "
                                "earns 0.96 on Charades-STA")
    temperature: float = flag(1.0, "of sampling and scoring alike, so that what is scored is what "
                                   "was sampled")
    freeze_vision: bool = flag(False, "leave the vision tower as it is: it then runs once per "
                                      "video and step")
    lora_rank: int = flag(0, "train adapters of this rank beside frozen weights (LoRA, alpha 2 * "
                             "rank, no dropout, --freeze_vision implied), for a fraction of the "
                             "memory; such as 16, with a --learning_rate ten times as large or "
                             "more. 0: train all weights")
    gradient_checkpointing: bool = flag(False, "keep fewer activations for the backward pass and "
                                               "compute the others again: less memory, about a "
                                               "quarter more time in scoring, the same result")
    eval_annotations: str = flag("", "annotation file of held-out queries, on which the model is "
                                     "scored during training; training is the same to the bit. "
                                     "Empty: none")
    eval_every: int = flag(0, "score every so many steps, 0 for only before the first one and "
                              "after the last")
    eval_samples: int = flag(200, "queries of that file, always the same ones, in TVG, VC, AR and "
                                  "VD, greedily")
    save_every: int = flag(100, "write a checkpoint every so many steps, 0 for only at the end and "
                                "when stopped; one takes 12 bytes per weight, 45 GB for the 3B "
                                "model, and two are kept")
    resume: bool = flag(False, "continue from the newest checkpoint in --output, or begin where "
                               "there is none")
    tensorboard: bool = flag(False,
                             "write the metrics for TensorBoard, too, to --output/tensorboard")


@one_run
def main(config: Config) -> None:
    rank, world, device = start_process()
    check_flags(config, world)
    run = Run(config)       # raises, before anything is loaded, when the folder cannot be continued
    samples, rejected = data.read(config.annotations, config.videos)
    pools = samples_by_task(config, samples)
    held_out = evaluate.HeldOut(config, run.output, run.step)
    policy, reference, encoder = load_models(config, device)
    optimizer = make_optimizer(policy, config.learning_rate)
    run.restore(policy, optimizer)
    without_verb = len(samples) - min(map(len, pools.values()))
    run.announce(f"{len(samples)} samples, {len(rejected)} rejected, {without_verb} without verb, "
                 f"{len(data.missing(samples))} videos missing", rejected)
    loader = Loader(config.total_pixels, config.video_timeout, config.cache, config.cache_gb,
                    config.workers)

    def choose(step: int) -> tuple[tasks.Task, list[data.Sample]]:
        """The step's task, and the samples that can be drawn for it."""
        task = tasks.draw(step, config.seed, config.tvg_prob, config.tasks)
        task_in_form = tasks.in_form(task, config.think, config.cosine_rewards, config.vd_max_verbs)
        return task_in_form, pools[task.name]

    def prepare(sample: data.Sample, task: tasks.Task) -> model.Prompt:
        return tasks.prepare(sample, task, encoder, loader)

    batches = Batches(range(run.step, config.steps), config.prompts_per_step, config.seed, rank,
                      world, choose, prepare, loader)
    with stop_signals(run.stop), batches:
        held_out.evaluate_if_due(run, policy, encoder, loader)
        for step in run.steps("GRPO"):
            batch = batches.next()                          # one task for the whole batch, Eq. 13
            rollouts = grpo.rollout(                        # G completions per prompt
                policy, batch.prompts, config.group_size, batch.generators(), encoder.stop_ids,
                config.max_tokens, config.temperature, config.micro_batch_size)
            texts = encoder.decode(rollouts.completions, rollouts.mask)
            rewards = batch.task.reward(texts, batch.repeated(config.group_size))   # Eq. 5-11
            totals = torch.tensor([reward.total for reward in rewards])             # (B * G,)
            advantages = grpo.advantages(                   # Eq. 3, (B, G)
                totals.view(-1, config.group_size), scale=config.scale_rewards == "std")
            metrics = grpo.update(                          # AdamW on the loss, Eq. 4
                policy, reference, optimizer, rollouts, advantages, beta=config.beta,
                loss_type=config.loss_type, epsilon=config.epsilon, max_tokens=config.max_tokens,
                num_iterations=config.num_iterations, temperature=config.temperature,
                micro_batch_size=config.micro_batch_size)
            completions = describe(batch, rollouts, texts, rewards, advantages, encoder.stop_ids)
            run.log(step, metrics, batch, completions)
            run.save_if_due(step)
            held_out.evaluate_if_due(run, policy, encoder, loader)
        model.save(policy, encoder, run.output / "model")


def check_flags(config: Config, world: int) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    check_numbers(config, "steps", "temperature", "learning_rate", "num_iterations", "epsilon",
                  "eval_samples")
    if config.eval_every and not config.eval_annotations:
        raise ValueError(f"--eval_every {config.eval_every}: give --eval_annotations, a file of "
                         "held-out queries, too")
    if config.loss_type not in LOSS_TYPES:
        raise ValueError(f"--loss_type {config.loss_type}: choose from {', '.join(LOSS_TYPES)}")
    if config.scale_rewards not in ("std", "none"):
        raise ValueError(f"--scale_rewards {config.scale_rewards}: choose from std, none")
    unknown = sorted(set(config.tasks) - set(tasks.INVERSIONS))
    if unknown or not config.tasks:
        raise ValueError(f"--tasks {' '.join(unknown)}: choose from {' '.join(tasks.INVERSIONS)}")
    if config.group_size < 2:
        raise ValueError(f"--group_size {config.group_size}: a group is compared with itself and "
                         "needs at least 2")
    if config.prompts_per_step < 1 or config.prompts_per_step % world:
        raise ValueError(f"--prompts_per_step {config.prompts_per_step} must be a multiple of the "
                         f"{world} processes")
    if config.tensorboard:
        check_board()
    lora.check(config.model)
    lora.check_flags(config)


def samples_by_task(config: Config, samples: list[data.Sample]) -> dict[str, list[data.Sample]]:
    """{task: the samples that the task can use}, for each task that may be drawn. Raises ValueError when there are
    none."""
    names = list(config.tasks) if config.tvg_prob < 1 else []
    if config.tvg_prob > 0:
        names.append("TVG")
    pools = {name: tasks.usable(samples, tasks.TASKS[name]) for name in names}
    for name, pool in pools.items():
        if not pool:
            raise ValueError(f"{config.annotations}: no query with a verb, so no {name}; give "
                             "--tvg_prob 1")
    return pools


def load_models(config: Config,
                device: str) -> tuple[model.Policy, model.Policy | None, model.Encoder]:
    """(policy, reference or None, encoder), spread over the processes. With adapters the policy is its own
    reference."""
    # of weights that are never updated
    frozen_dtype = torch.float32 if device == "cpu" else torch.bfloat16
    reference = None
    if config.beta > 0 and not config.lora_rank:
        # loaded on its own and first, so that a process never holds two whole models
        reference, _ = model.load(config.model, dtype=frozen_dtype)
        reference = shard(reference.requires_grad_(False))
    policy, encoder = model.load(config.model,
                                 dtype=frozen_dtype if config.lora_rank else torch.float32,
                                 lora_rank=config.lora_rank, seed=config.seed)
    if config.freeze_vision:
        policy.qwen.model.visual.requires_grad_(False)
    if config.gradient_checkpointing:
        gradient_checkpointing(policy)
    policy = shard(policy)
    if config.lora_rank and config.beta > 0:
        reference = policy
    return policy, reference, encoder


def make_optimizer(policy: model.Policy, learning_rate: float) -> torch.optim.AdamW:
    """AdamW of all weights that learn, as the paper has it."""
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8,
                             weight_decay=0.0)


if __name__ == "__main__":
    command_line(Config, main, __doc__)
