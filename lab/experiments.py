"""The paper's tables and figures, and some of our own: many runs, compared over seeds.

    python -m lab.experiments                   all of them on the made-up world of toy.py, hours; --jobs 2 side by side
    python -m lab.experiments table2 figure5 --worlds verbs --seeds 3       two of them
    python -m lab.experiments table2 --model Qwen/Qwen2.5-VL-3B-Instruct --annotations charades_sta_train.txt \\
        --test charades_sta_test.txt --videos Charades_v1_480 --launch "torchrun --nproc_per_node=8" --seeds 1 \\
        --train_flags "--prompts_per_step 8 --steps 3102 --gradient_checkpointing"      on real data
    python -m lab.experiments ... --dry         prints the commands and estimates their cost, runs none
    python -m lab.experiments --report          RESULTS.md and its pictures from results.csv alone

A run is what one would type: train.py, then evaluate.py. ARMS says with which flags, EXPERIMENTS what is compared with
what, CLAIMS what the paper says of it. Runs of one world and seed share videos, warm start and test set, so they are
compared in pairs.

Writes to --output: results.csv with one row per run, RESULTS.md and pictures made from results.csv, and for each run a
folder and a log. A run that has a row is not run again, and a run that was stopped goes on: give the same command.
"""
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path

import evaluate
import sft
import tasks
import toy
import train
from engine import flags as flag_parser
from engine import logs, plot, video
from engine.flags import check_numbers, command_line, flag
from engine.run import one_run
from lab import jobs, plan, report
from lab.jobs import Job
from lab.report import START, Claim, Experiment

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "sft.py": sft, "toy.py": toy}
DATA = "data"       # the world of --annotations
# GRPO steps on the made-up worlds, which are named by the weakness of their teacher
STEPS = {"verbs": 100, "edges": 40, "both": 40}


@dataclass(frozen=True)
class Arm:
    """How a run differs from the paper's method with this project's defaults."""
    flags: str = ""         # of its script, behind those that all runs have
    script: str = "train"   # or sft; empty: only a start
    start: str = ""         # flags of toy.py for a warm start of its own
    think: bool = True
    watched: bool = False   # is evaluated while it trains

    @property
    def toy_only(self) -> bool:
        return bool(self.start) or self.script != "train"


ALL, TVG, TVG_STEPS = "TVG + VC, AR, VD", "TVG alone", "TVG alone, as many TVG steps"
ARMS = {
    START: Arm(script=""),
    "start without Invert-SFT": Arm(start="--invert_sft false", script=""),
    "start, answers alone": Arm(start="--think false", script="", think=False),
    ALL: Arm(watched=True),
    TVG: Arm("--tvg_prob 1", watched=True),
    "TVG + VC": Arm("--tasks VC"),
    "TVG + AR": Arm("--tasks AR"),
    "TVG + VD": Arm("--tasks VD"),
    "TVG + AR, VD": Arm("--tasks AR VD"),
    "TVG + VC, AR": Arm("--tasks VC AR"),
    "TVG + VC, VD": Arm("--tasks VC VD"),
    "p = 0.9": Arm("--tvg_prob 0.9"),
    "p = 0.6": Arm("--tvg_prob 0.6"),
    "p = 0.4": Arm("--tvg_prob 0.4"),
    "p = 0.2": Arm("--tvg_prob 0.2"),
    "p = 0": Arm("--tvg_prob 0"),
    TVG_STEPS: Arm("--tvg_prob 1 --steps {tvg_steps}"),
    "cosine rewards": Arm("--cosine_rewards"),
    "without Invert-SFT": Arm(start="--invert_sft false", watched=True),
    "answers alone": Arm("--think false", start="--think false", think=False),
    "bnpo": Arm("--loss_type bnpo"),
    "dr_grpo": Arm("--loss_type dr_grpo"),
    "no std": Arm("--scale_rewards none"),
    "2 updates": Arm("--num_iterations 2"),
    "4 updates": Arm("--num_iterations 4"),
    "beta 0": Arm("--beta 0"),
    "beta 0.04": Arm("--beta 0.04"),
    "G = 4": Arm("--group_size 4"),
    "G = 16": Arm("--group_size 16"),
    "LoRA 16": Arm("--lora_rank 16 --learning_rate 1e-3"),
    "SFT, right narration": Arm("", script="sft"),
    "SFT, answers alone": Arm("--think false", script="sft", think=False)}
SINGLE = ("TVG + VD", "TVG + AR", "TVG + VC")
PAIRS = ("TVG + AR, VD", "TVG + VC, AR", "TVG + VC, VD")
PROBABILITIES = {TVG: 1.0, "p = 0.9": 0.9, ALL: 0.8, "p = 0.6": 0.6, "p = 0.4": 0.4,
                 "p = 0.2": 0.2, "p = 0": 0.0}
OTHERS = tuple(arm for arm in PROBABILITIES if arm != ALL)

PREMISE = ("verbs", "edges")        # the paper's premise, wrong verbs; and a world with right verbs
BOTH = ("both",)
EXPERIMENTS = {
    "table2": Experiment(
        "Table 2: which inversion tasks",
        "Does each inversion task help grounding, and all together the most?",
        (START, TVG, *SINGLE, *PAIRS, ALL), TVG, PREMISE),
    "steps": Experiment(
        "At equal TVG steps",
        "With p = 0.8 a fifth of the steps is not TVG. What if TVG alone takes as many TVG steps, "
        "and no other?",
        (TVG, TVG_STEPS, ALL), TVG_STEPS, PREMISE),
    "figure1": Experiment(
        "Figure 1, right: action understanding",
        "Does TVG alone lose it, and does Invert4TVG keep it?",
        (START, TVG, ALL), START, PREMISE),
    "figure5": Experiment(
        "Figure 5: how often TVG", "Which p is best?",
        tuple(PROBABILITIES), TVG, PREMISE),
    "table3": Experiment(
        "Table 3: binary or cosine rewards",
        "Are rewards of 0 or 1 better than similarities?",
        (ALL, "cosine rewards"), "cosine rewards", BOTH),
    "figure6": Experiment(
        "Figure 6: Invert-SFT",
        "Does a start without inversion tasks end at the same mIoU?",
        (START, "start without Invert-SFT", ALL, "without Invert-SFT"), "without Invert-SFT", BOTH),
    "thoughts": Experiment(
        "Thoughts or answers alone", "What is a thought worth?",
        (ALL, "answers alone"), ALL, BOTH),
    "sft": Experiment(
        "Reinforcement or imitation",
        "Does SFT on demonstrations made from the same annotations, as many steps of as many "
        "completions, do as well?",
        (START, ALL, "SFT, right narration", "SFT, answers alone"), ALL, BOTH),
    "loss": Experiment(
        "The loss's open choices",
        "Which mean over tokens, and with or without the division by std?",
        (ALL, "bnpo", "dr_grpo", "no std"), ALL, BOTH),
    "updates": Experiment(
        "Updates per rollout", "Does clipped reuse of a rollout pay?",
        (ALL, "2 updates", "4 updates"), ALL, BOTH),
    "kl": Experiment(
        "The KL term", "How much should the policy be held?",
        ("beta 0", ALL, "beta 0.04"), ALL, BOTH),
    "group": Experiment(
        "Completions per prompt", "What is a larger group worth?",
        ("G = 4", ALL, "G = 16"), ALL, BOTH),
    "lora": Experiment(
        "Adapters or all weights", "Does LoRA do as well?",
        (ALL, "LoRA 16"), ALL, BOTH)}

CLAIMS = [
    Claim("Table 2", "TVG with all three grounds better than TVG alone", (ALL,), (TVG,), PREMISE),
    Claim("Table 2", "all three are better than any one of them", (ALL,), SINGLE, PREMISE),
    Claim("Table 2", "all three are better than any two of them", (ALL,), PAIRS, PREMISE),
    Claim("ours", "so it is at equal TVG steps", (ALL,), (TVG_STEPS,), PREMISE),
    Claim("Figure 1", "TVG alone loses action understanding",
          (START,), (TVG,), PREMISE, tasks.INVERSIONS),
    Claim("Figure 1", "with the inversion tasks it is higher than with TVG alone",
          (ALL,), (TVG,), PREMISE, tasks.INVERSIONS),
    Claim("Figure 5", "p = 0.8 is better than any other p", (ALL,), OTHERS, PREMISE),
    Claim("Figure 5", "with p = 0.4 and 0.2, grounding is worse than with TVG alone",
          (TVG,), ("p = 0.4", "p = 0.2"), PREMISE),
    Claim("Figure 5", "the inversion tasks alone are worst",
          (TVG, ALL, "p = 0.9", "p = 0.6", "p = 0.4", "p = 0.2"), ("p = 0",), PREMISE),
    Claim("Table 3", "binary rewards are better than cosine rewards",
          (ALL,), ("cosine rewards",), BOTH),
    Claim("Figure 6", "Invert-SFT costs the start a little mIoU",
          ("start without Invert-SFT",), (START,), BOTH, ("mIoU",)),
    Claim("Figure 6", "after training, Invert-SFT makes no difference",
          (ALL,), ("without Invert-SFT",), BOTH, ("mIoU",), same=True),
    Claim("ours", "thoughts ground better than answers alone",
          (ALL,), ("answers alone",), BOTH, ("mIoU",)),
    Claim("ours", "reinforcement grounds better than imitating right narrations",
          (ALL,), ("SFT, right narration",), BOTH, ("mIoU",)),
    Claim("ours", "reinforcement grounds better than imitating answers",
          (ALL,), ("SFT, answers alone",), BOTH, ("mIoU",))]


@dataclass(kw_only=True)
class Config:
    """experiments"""
    experiments: list[str] = flag([], "which ones, all without any; also as plain words before the "
                                      "flags: " + ", ".join(EXPERIMENTS))
    output: str = flag("runs/experiments", "folder for runs, results.csv, RESULTS.md and pictures")
    worlds: list[str] = flag([], "of those that each experiment has, all without any: "
                                 + ", ".join(STEPS))
    seeds: int = flag(5, "how many: 0, 1, ...; an interval needs two, a useful one five")
    jobs: int = flag(0, "runs side by side; 0: one per core on made-up worlds, one on real data")
    model: str = flag("", "real data: the model to start from, and with it the next three; empty: "
                          "the made-up worlds")
    annotations: str = flag("", "to train on")
    test: str = flag("", "annotations to evaluate on")
    videos: str = flag("", "folder of the videos of both")
    launch: str = flag("python", "what starts a script, such as torchrun --nproc_per_node=8")
    train_flags: str = flag("", "more flags for every train.py")
    test_flags: str = flag("", "more flags for every evaluate.py")
    dry: bool = flag(False, "print the commands, with an estimate of their cost; run none")
    report: bool = flag(False, "only write RESULTS.md and its pictures again from results.csv")


@dataclass
class Run(Job):
    """A warm start, or an arm with its evaluation."""
    key: tuple[str, int, str, str] = ()     # world, seed, arm and its flags: report.KEY
    answers: str = "test"                   # folder of its evaluation


@dataclass
class Setting:
    """What training and evaluation get, made-up world or real data."""
    model: str | Path
    annotations: str | Path
    test: str | Path
    shared_flags: list[str]
    train_flags: list[str]
    test_flags: list[str]
    steps: int


def make_runs(config: Config) -> list[Run]:
    """Every run of the chosen experiments once, behind the start that it needs, seed by seed."""
    runs = {}
    for name in config.experiments or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        worlds = [world for world in experiment.worlds if world in (config.worlds or STEPS)]
        arms = experiment.arms
        if config.model:
            worlds = [DATA]
            arms = [arm for arm in arms if not ARMS[arm].toy_only]
        for world in worlds:
            for seed in range(config.seeds):
                for arm in arms:
                    start = start_run(config, world, seed, ARMS[arm].start)
                    start = runs.setdefault(start.name, start)
                    if ARMS[arm].script:
                        run = arm_run(config, start, world, seed, arm)
                        runs.setdefault(run.name, run)
    return list(runs.values())


def start_run(config: Config, world: str, seed: int, toy_flags: str) -> Run:
    """The start of runs: on a made-up world its videos and its warm start, else the evaluation of --model."""
    arm = next(name for name, arm in ARMS.items() if not arm.script and arm.start == toy_flags)
    folder = Path(config.output, world, str(seed), slug(arm))
    run = Run(f"{world} {seed}: {arm}", folder, [], key=(world, seed, arm, toy_flags))
    if config.model:
        words = flags(model=config.model, annotations=config.test, videos=config.videos,
                      output=folder / "test")
        run.commands = [["evaluate.py", *words, *shlex.split(config.test_flags)]]
    else:
        words = flags(output=folder, seed=seed, weakness=world, steps=0)
        run.commands = [["toy.py", *words, *shlex.split(toy_flags), "--resume"]]
        run.answers = "test_warm_start"
    return run


def arm_run(config: Config, start: Run, world: str, seed: int, name: str) -> Run:
    """Training of an arm and its evaluation."""
    arm, folder = ARMS[name], start.folder.parent / slug(name)
    setting = data_setting(config) if config.model else toy_setting(start.folder, world, arm)
    trained = folder / "train"
    own = flags(model=setting.model, annotations=setting.annotations, output=trained, seed=seed)
    own += setting.shared_flags + setting.train_flags
    if arm.watched:
        every = max(setting.steps // 5, 1)
        own += flags(eval_annotations=setting.test, eval_every=every, eval_samples=100)
    arm_flags = arm.flags
    if "{tvg_steps}" in arm_flags:
        kinds = list(tasks.INVERSIONS)
        drawn = [tasks.draw(step, seed, 0.8, kinds).name for step in range(setting.steps)]
        arm_flags = arm_flags.format(tvg_steps=drawn.count("TVG"))
    own += shlex.split(arm_flags)
    test = flags(model=trained / "model", annotations=setting.test, output=folder / "test")
    test += setting.shared_flags + setting.test_flags
    commands = [[f"{arm.script}.py", *own, "--resume"], ["evaluate.py", *test]]
    all_flags = f"{config.train_flags} {arm.flags}".strip()
    return Run(f"{world} {seed}: {name}", folder, commands, start,
               key=(world, seed, name, all_flags))


def data_setting(config: Config) -> Setting:
    train_flags = shlex.split(config.train_flags)
    required = ["--model=", "--annotations=", "--videos=", "--output="]
    steps = parse(["train.py", *required, *train_flags]).steps
    return Setting(config.model, config.annotations, config.test, flags(videos=config.videos),
                   train_flags, shlex.split(config.test_flags), steps)


def toy_setting(world_folder: Path, world: str, arm: Arm) -> Setting:
    steps, longest = STEPS[world], toy.MAX_TOKENS[arm.think]
    train_flags = flags(steps=steps, save_every=50)
    if arm.script == "sft":     # the same number of completions per step
        train_flags += flags(demonstrations=world_folder / "right.jsonl", batch_size=128,
                             micro_batch_size=16, learning_rate=1e-3)
    else:
        train_flags += flags(max_tokens=longest, learning_rate=toy.Config.learning_rate,
                             beta=toy.Config.beta, prompts_per_step=toy.Config.prompts_per_step)
    test_flags = flags(batch_size=256, max_tokens=longest)
    if not arm.think:
        test_flags += flags(think="false")
    shared = flags(videos=world_folder / "videos", cache=world_folder / "cache", workers=1)
    return Setting(world_folder / "sft" / "model", world_folder / "train.txt",
                   world_folder / "test.txt", shared, train_flags, test_flags, steps)


def slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^\w.]+", "_", name)


def flags(**values: object) -> list[str]:
    """flags(steps=3) is ["--steps", "3"]."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def typed(config: Config, command: list[str]) -> list[str]:
    """A command as it is run: behind what starts it, with the path of the script."""
    launch = [sys.executable if word == "python" else word for word in shlex.split(config.launch)]
    return [*launch, str(ROOT / command[0]), *command[1:]]


def read_lines(path: Path) -> list[dict]:
    """The objects in a JSON-lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(run: Run) -> dict:
    """The row of a finished run."""
    world, seed = run.key[:2]
    scores = json.loads((run.folder / run.answers / "scores.json").read_text())
    steps = read_lines(run.folder / "train" / "metrics.jsonl")
    evaluations = read_lines(run.folder / "train" / "evaluations.jsonl")
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout
    row = dict(zip(report.KEY, run.key))
    row["steps"] = len(steps)
    row["seconds"] = round(sum(step["seconds"] for step in steps), 1)
    row["commit"] = commit.strip()
    row["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    row["curve"] = row["confusion"] = ""
    if evaluations:
        row["curve"] = json.dumps([[each["step"], round(each["mIoU"], 4)] for each in evaluations])
    if world != DATA:
        predictions = read_lines(run.folder / run.answers / "predictions.jsonl")
        stories = toy.write_world((run.needs or run).folder, seed, 1000, 300, world)
        scores |= toy.narrated([each for each in predictions if each["task"] == "TVG"], stories)
        row["confusion"] = json.dumps(confusion(predictions))
    row |= {name: round(scores[name], 5) for name in report.MEASURES if name in scores}
    return row


def confusion(predictions: list[dict]) -> dict[str, dict[str, int]]:
    """{true verb: {verb that AR answered, or "other": count}} on a made-up world."""
    counts = {verb: Counter() for verb in toy.VERBS}
    for row in predictions:
        if row["task"] == "AR":
            true = re.findall(r"[a-z]+", row["query"])[-1]
            answer = re.search(r"<answer>\s*([a-z]+)", row["completion"])
            verb = answer[1] if answer and answer[1] in toy.VERBS else "other"
            counts[true][verb] += 1
    return {verb: dict(answers) for verb, answers in counts.items()}


def run_all(config: Config, runs: list[Run], path: Path) -> list[str]:
    """Do what has no row yet, and give it one. Returns the names of those that failed."""
    rows = {}
    for row in report.read(path).to_dict("records"):
        rows[tuple(row[name] for name in report.KEY)] = row
    names = {run.name for run in runs if run.key not in rows}
    for run in runs:    # a start that has a row may be gone from the disk, or in another folder
        start = run.needs
        if start and run.name in names and not (start.folder / start.answers).exists():
            names.add(start.name)
    todo = [run for run in runs if run.name in names]

    def finish(run: Run) -> str:
        rows[run.key] = collect(run)
        report.write(path, list(rows.values()))
        return f"mIoU {rows[run.key]['mIoU']:.3f}"

    for run in todo:
        run.commands = [typed(config, command) for command in run.commands]
    cores = os.cpu_count()
    if config.model:
        parallel, threads = config.jobs or 1, 0
    else:
        parallel = config.jobs or cores
        threads = max(cores // parallel, 1)
    logs.say(f"{len(todo)} of {len(runs)} runs to do, {parallel} side by side")
    return jobs.run(todo, parallel, threads, finish)


def show(config: Config, runs: list[Run]) -> None:
    """Print the commands; on real data each behind what it is estimated to cost."""
    for run in runs:
        title, parsed = f"# {run.name}", parse(run.commands[0])
        if config.model and isinstance(parsed, train.Config):
            title += f": {cost(config, parsed)}"
        print(title)
        for command in run.commands:
            print(shlex.join([*shlex.split(config.launch), *command]))
    print(f"# {len(runs)} runs")


def parse(command: list[str]) -> object:
    """The Config that a command gives its script. Raises ValueError for flags that it does not have."""
    return flag_parser.parse(SCRIPTS[command[0]].Config, command[1:], script=command[0])


def cost(config: Config, training: train.Config) -> str:
    """Memory and hours of a training run, estimated by lab.plan. Raises ValueError where it cannot tell."""
    known = {field.name for field in fields(plan.Config)}
    values = {name: value for name, value in vars(training).items() if name in known}
    gpus = re.search(r"--nproc[-_]per[-_]node[= ](\d+)", config.launch)        # as torchrun is told
    values["gpus"] = int(gpus[1]) if gpus else 1
    values["samples"] = training.steps * training.prompts_per_step
    estimated = plan.estimate(plan.Config(**values))
    fits = "fits" if estimated.peak <= estimated.room else "DOES NOT FIT"
    return (f"estimated, not measured: {estimated.peak / 1e9:.2f} GB per GPU ({fits} into "
            f"{plan.Config.gpu_memory:g} GB), {estimated.hours:.0f} hours")


def draw_cases(runs: list[Run], world: str, path: Path) -> None:
    """Queries of seed 0 by rule: the two that inversion tasks helped most, beside TVG alone, two in the middle, the two
    that they harmed most; with what both thought. Nothing where a run is not on this disk."""
    answers = {}
    for title, arm in (("TVG alone", TVG), ("with inversion", ALL)):
        folders = [run.folder / run.answers for run in runs if run.key[:3] == (world, 0, arm)]
        if not folders or not (folders[0] / "scores.json").exists():
            return
        answers[title] = toy.read_answers(folders[0])
    alone, both = answers.values()
    order = sorted(alone, key=lambda i: both[i]["iou"] - alone[i]["iou"])
    middle = len(order) // 2
    chosen = [order[-1], order[-2], *order[middle:middle + 2], *order[:2]]
    clips = [video.load(alone[i]["video"]) for i in chosen]
    rows = [{title: predictions[i] for title, predictions in answers.items()} for i in chosen]
    plot.examples(clips, rows, path, thoughts=True)


def check_flags(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    check_numbers(config, "seeds")
    known = {"experiments": EXPERIMENTS, "worlds": STEPS}
    for name, names in known.items():
        unknown = [value for value in getattr(config, name) if value not in names]
        if unknown:
            raise ValueError(f"--{name} {' '.join(unknown)}: choose from {', '.join(names)}")
    needed = ("model", "annotations", "test", "videos")
    missing = [name for name in needed if not getattr(config, name)]
    if missing and len(missing) < len(needed):
        raise ValueError("real data needs --model, --annotations, --test and --videos; there is no "
                         f"--{missing[0]}")


@one_run
def main(config: Config) -> None:
    check_flags(config)
    runs, path, failed = make_runs(config), Path(config.output, "results.csv"), []
    for run in runs:
        for command in run.commands:
            parse(command)      # a wrong flag is not found after hours
    if config.dry:
        show(config, runs)
        return
    if not config.report:
        failed = run_all(config, runs, path)
    rows = report.read(path)
    if rows.empty:
        reason = f"; failed: {', '.join(failed)}" if failed else ""
        raise ValueError(f"{path}: has no runs yet{reason}")
    for world in PREMISE:
        draw_cases(runs, world, Path(config.output, f"cases_{world}.png"))
    watched = [name for name, arm in ARMS.items() if arm.watched]
    report.write_report(Path(config.output), rows, EXPERIMENTS, CLAIMS, PROBABILITIES, watched)
    if failed:
        logs.say(f"failed: {', '.join(failed)}; the same command tries them again")
        sys.exit(1)


if __name__ == "__main__":
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    if names:
        sys.argv.insert(1, "--experiments")
    command_line(Config, main, __doc__)
