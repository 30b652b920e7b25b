"""The paper's tables and figures, and some of our own: many runs, compared over seeds.

    python experiments.py                       all of them on the made-up world of toy.py, hours; --jobs 2 at once
    python experiments.py table2 figure5 --worlds verbs --seeds 3           some of them
    python experiments.py table2 --model Qwen/Qwen2.5-VL-3B-Instruct --annotations charades_sta_train.txt \\
        --test charades_sta_test.txt --videos Charades_v1_480 --launch "torchrun --nproc_per_node=8" --seeds 1 \\
        --train_flags "--prompts_per_step 8 --steps 3102 --gradient_checkpointing"      on real data
    python experiments.py ... --dry             prints and plans the commands, runs none
    python experiments.py --report              RESULTS.md and its pictures from results.csv alone

A run is what one would type: train.py, then evaluate.py. ARMS says with which flags, EXPERIMENTS what is compared with
what, CLAIMS what the paper says of it. Runs of one world and seed share videos, warm start and test set, so they are
compared in pairs. Writes to --output: results.csv, a row a run, RESULTS.md and pictures from it, and a folder and a log
a run. What has a row is not run again, what was stopped goes on: give the same command.
"""
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product, takewhile
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
from lab import jobs, report
from lab.jobs import Job
from lab.report import START, Claim, Experiment

ROOT = Path(__file__).parent.parent
DATA = "data"       # the world of --annotations
STEPS = {"verbs": 100, "edges": 40, "both": 40}     # of GRPO on the made-up worlds: what teachers are weak in


@dataclass(frozen=True)
class Arm:
    """How a run differs from the paper's method with this project's defaults."""
    flags: str = ""         # of its script, behind those that all runs have
    script: str = "train"   # or sft
    start: str = ""         # flags of toy.py for a warm start of its own
    think: bool = True
    watched: bool = False   # is evaluated while it trains

    @property
    def toy_only(self) -> bool:
        return bool(self.start) or self.script != "train"


ALL, TVG = "TVG + VC, AR, VD", "TVG alone"
ARMS = {
    START: Arm(script=""),
    "start without Invert-SFT": Arm(start="--invert_sft false", script=""),
    "start, answers alone": Arm(start="--think false", script="", think=False),
    ALL: Arm(watched=True),
    TVG: Arm("--tvg_prob 1", watched=True),
    **{f"TVG + {name}": Arm(f"--tasks {name}") for name in tasks.INVERSIONS},
    **{f"TVG + {a}, {b}": Arm(f"--tasks {a} {b}") for a, b in (("AR", "VD"), ("VC", "AR"), ("VC", "VD"))},
    **{f"p = {p}": Arm(f"--tvg_prob {p}") for p in (0.9, 0.6, 0.4, 0.2, 0)},
    "TVG alone, as many TVG steps": Arm("--tvg_prob 1 --steps {tvg_steps}"),
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
PROBABILITIES = {TVG: 1.0, "p = 0.9": 0.9, ALL: 0.8, "p = 0.6": 0.6, "p = 0.4": 0.4, "p = 0.2": 0.2, "p = 0": 0.0}
PREMISE = ("verbs", "edges")        # the paper's premise, wrong verbs; and a world in which verbs are right
SINGLE = tuple(f"TVG + {name}" for name in ("VD", "AR", "VC"))
PAIRS = tuple(f"TVG + {names}" for names in ("AR, VD", "VC, AR", "VC, VD"))
EXPERIMENTS = {
    "table2": Experiment("Table 2: which inversion tasks", "Does each inversion task help grounding, and all together "
                         "the most?", (START, TVG, *SINGLE, *PAIRS, ALL), TVG, PREMISE),
    "steps": Experiment("At equal TVG steps", "With p = 0.8 a fifth of the steps is not TVG. What if TVG alone takes "
                        "as many TVG steps, and no other?", (TVG, "TVG alone, as many TVG steps", ALL),
                        "TVG alone, as many TVG steps", PREMISE),
    "figure1": Experiment("Figure 1, right: action understanding", "Does TVG alone lose it, and does Invert4TVG keep "
                          "it?", (START, TVG, ALL), START, PREMISE),
    "figure5": Experiment("Figure 5: how often TVG", "Which p is best?", tuple(PROBABILITIES), TVG, PREMISE),
    "table3": Experiment("Table 3: binary or cosine rewards", "Are rewards of 0 or 1 better than similarities?",
                         (ALL, "cosine rewards"), "cosine rewards", ("both",)),
    "figure6": Experiment("Figure 6: Invert-SFT", "Does a start without inversion tasks end at the same mIoU?",
                          (START, "start without Invert-SFT", ALL, "without Invert-SFT"), "without Invert-SFT",
                          ("both",)),
    "thoughts": Experiment("Thoughts or answers alone", "What is a thought worth?", (ALL, "answers alone"),
                           ALL, ("both",)),
    "sft": Experiment("Reinforcement or imitation", "Does SFT on demonstrations made from the same annotations, as "
                      "many steps of as many completions, do as well?",
                      (START, ALL, "SFT, right narration", "SFT, answers alone"), ALL, ("both",)),
    "loss": Experiment("The loss's open choices", "Which mean over tokens, and with or without the division by std?",
                       (ALL, "bnpo", "dr_grpo", "no std"), ALL, ("both",)),
    "updates": Experiment("Updates a rollout", "Does clipped reuse of a rollout pay?", (ALL, "2 updates", "4 updates"),
                          ALL, ("both",)),
    "kl": Experiment("The KL term", "How much should the policy be held?", ("beta 0", ALL, "beta 0.04"), ALL,
                     ("both",)),
    "group": Experiment("Completions a prompt", "What is a larger group worth?", ("G = 4", ALL, "G = 16"), ALL,
                        ("both",)),
    "lora": Experiment("Adapters or all weights", "Does LoRA do as well?", (ALL, "LoRA 16"), ALL, ("both",))}
OTHERS = tuple(arm for arm in PROBABILITIES if arm != ALL)
CLAIMS = [
    Claim("Table 2", "TVG with all three grounds better than TVG alone", (ALL,), (TVG,), PREMISE),
    Claim("Table 2", "all three are better than any one of them", (ALL,), SINGLE, PREMISE),
    Claim("Table 2", "all three are better than any two of them", (ALL,), PAIRS, PREMISE),
    Claim("ours", "so it is at equal TVG steps", (ALL,), ("TVG alone, as many TVG steps",), PREMISE),
    Claim("Figure 1", "TVG alone loses action understanding", (START,), (TVG,), PREMISE, tasks.INVERSIONS),
    Claim("Figure 1", "with the inversion tasks it is higher than with TVG alone", (ALL,), (TVG,), PREMISE,
          tasks.INVERSIONS),
    Claim("Figure 5", "p = 0.8 is better than any other p", (ALL,), OTHERS, PREMISE),
    Claim("Figure 5", "with p = 0.4 and 0.2, grounding is worse than with TVG alone", (TVG,), ("p = 0.4", "p = 0.2"),
          PREMISE),
    Claim("Figure 5", "the inversion tasks alone are worst", (TVG, ALL, "p = 0.9", "p = 0.6", "p = 0.4", "p = 0.2"),
          ("p = 0",), PREMISE),
    Claim("Table 3", "binary rewards are better than cosine rewards", (ALL,), ("cosine rewards",), ("both",)),
    Claim("Figure 6", "Invert-SFT costs the start a little mIoU", ("start without Invert-SFT",), (START,), ("both",),
          ("mIoU",)),
    Claim("Figure 6", "after training, Invert-SFT makes no difference", (ALL,), ("without Invert-SFT",), ("both",),
          ("mIoU",), same=True),
    Claim("ours", "thoughts ground better than answers alone", (ALL,), ("answers alone",), ("both",), ("mIoU",)),
    Claim("ours", "reinforcement grounds better than imitating right narrations", (ALL,), ("SFT, right narration",),
          ("both",), ("mIoU",)),
    Claim("ours", "reinforcement grounds better than imitating answers", (ALL,), ("SFT, answers alone",), ("both",),
          ("mIoU",))]

PLANNED = ("group_size", "prompts_per_step", "micro_batch_size", "think", "max_tokens", "total_pixels", "beta",
           "num_iterations", "freeze_vision", "lora_rank", "gradient_checkpointing")     # what lab.plan asks of a run


@dataclass
class Config:
    experiments: list[str] = flag([], "which ones, all without any; also as plain words before the flags: "
                                      + ", ".join(EXPERIMENTS))
    output: str = flag("runs/experiments", "folder for runs, results.csv, RESULTS.md and pictures")
    worlds: list[str] = flag([], "of those that each experiment has, all without any: " + ", ".join(STEPS))
    seeds: int = flag(5, "how many: 0, 1, ...; an interval needs two, a useful one five")
    jobs: int = flag(0, "runs side by side; 0: one a core on the made-up worlds, one on real data")
    model: str = flag("", "real data: the model to start from, and with it the next four; empty: the made-up worlds")
    annotations: str = flag("", "to train on")
    test: str = flag("", "annotations to evaluate on")
    videos: str = flag("", "folder of the videos of both")
    launch: str = flag("python", "what starts a script, such as torchrun --nproc_per_node=8")
    train_flags: str = flag("", "more flags for every train.py")
    test_flags: str = flag("", "more flags for every evaluate.py")
    dry: bool = flag(False, "print the commands, with what they are planned to cost; run none")
    report: bool = flag(False, "only write RESULTS.md and its pictures again from results.csv")


@dataclass
class Run(Job):
    """A warm start, or an arm with its evaluation."""
    key: tuple[str, int, str, str] = ()     # world, seed, arm and its flags: report.KEY
    answers: str = "test"                   # folder of its evaluation


def plan_runs(config: Config) -> list[Run]:
    """Every run of the chosen experiments once, behind the start that it needs, seed by seed."""
    runs = {}
    add = lambda run: runs.setdefault(run.name, run)
    for experiment in (EXPERIMENTS[name] for name in config.experiments or EXPERIMENTS):
        worlds = [DATA] if config.model else [w for w in experiment.worlds if w in (config.worlds or STEPS)]
        for world, seed, arm in product(worlds, range(config.seeds), experiment.arms):
            if not (config.model and ARMS[arm].toy_only):
                start = add(start_run(config, world, seed, ARMS[arm].start))
                if ARMS[arm].script:
                    add(arm_run(config, start, world, seed, arm))
    return list(runs.values())


def start_run(config: Config, world: str, seed: int, kind: str) -> Run:
    """The start of runs: on a made-up world its videos and its warm start, else the evaluation of --model."""
    arm = next(name for name, arm in ARMS.items() if not arm.script and arm.start == kind)
    folder = Path(config.output, world, str(seed), slug(arm))
    if config.model:
        return Run(f"{world} {seed}: {arm}", folder, [["evaluate.py", *flags(
            model=config.model, annotations=config.test, videos=config.videos, output=folder / "test"),
            *shlex.split(config.test_flags)]], key=(world, seed, arm, kind))
    return Run(f"{world} {seed}: {arm}", folder, [["toy.py", *flags(
        output=folder, seed=seed, weakness=world, steps=0), *shlex.split(kind), "--resume"]],
        key=(world, seed, arm, kind), answers="test_warm_start")


def arm_run(config: Config, start: Run, world: str, seed: int, name: str) -> Run:
    """Training of an arm and its evaluation."""
    arm, place, folder = ARMS[name], start.folder, start.folder.parent / slug(name)
    if config.model:
        common, own, test = dict(videos=config.videos), shlex.split(config.train_flags), shlex.split(config.test_flags)
        source, learn, judged = config.model, config.annotations, config.test
        steps = int((re.findall(r"--steps[= ](\d+)", config.train_flags) or [train.Config.steps])[-1])
    else:
        steps, longest = STEPS[world], toy.MAX_TOKENS[arm.think]
        common = dict(videos=place / "videos", cache=place / "cache", workers=1)
        source, learn, judged = place / "model", place / "train.txt", place / "test.txt"
        own = flags(steps=steps, save_every=50, keep=1)
        if arm.script == "sft":
            own += flags(demonstrations=place / "right.jsonl", batch_size=128, micro_batch_size=16, learning_rate=1e-3)
        else:
            own += flags(max_tokens=longest, **{key: getattr(toy.Config, key) for key in (
                "learning_rate", "beta", "prompts_per_step")})
        test = flags(batch_size=256, max_tokens=longest, think="" if arm.think else "false")
    if arm.watched:
        own += flags(eval_annotations=judged, eval_every=max(steps // 5, 1), eval_samples=100)
    tvg = sum(tasks.draw(step, seed, 0.8, list(tasks.INVERSIONS)).name == "TVG" for step in range(steps))
    trained = folder / "train"
    return Run(f"{world} {seed}: {name}", folder, [
        [f"{arm.script}.py", *flags(model=source, annotations=learn, **common, output=trained, seed=seed), *own,
         *shlex.split(arm.flags.format(tvg_steps=tvg)), "--resume"],
        ["evaluate.py", *flags(model=trained / "model", annotations=judged, **common, output=folder / "test"), *test]],
        start, key=(world, seed, name, " ".join(filter(None, (config.train_flags, arm.flags)))))


def slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^\w.]+", "_", name)


def flags(**values: object) -> list[str]:
    """{"steps": 3} as a command line has it; empty values are left out."""
    return [word for name, value in values.items() if value != "" for word in (f"--{name}", str(value))]


def typed(config: Config, command: list[str]) -> list[str]:
    """A command as it is run: behind what starts it, with the path of the script."""
    first = [sys.executable if word == "python" else word for word in shlex.split(config.launch)]
    return [*first, str(ROOT / command[0]), *map(str, command[1:])]


def collect(run: Run) -> dict:
    """The row of a finished run."""
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found, rows = (run.folder / run.answers / "scores.json"), read(run.folder / run.answers / "predictions.jsonl")
    found, (world, seed, *_) = json.loads(found.read_text()), run.key
    steps, evaluations = (read(run.folder / "train" / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    if world != DATA:
        stories = toy.write_world((run.needs or run).folder, seed, 1000, 300, world)
        found |= toy.narrated([row for row in rows if row["task"] == "TVG"], stories)
        found["confusion"] = json.dumps(confusion(rows))
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {**found, **dict(zip(report.KEY, run.key)), "steps": len(steps), "commit": git.stdout.strip(),
            "seconds": round(sum(step["seconds"] for step in steps), 1),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "curve": json.dumps([[row["step"], round(row["mIoU"], 4)] for row in evaluations]) if evaluations else "",
            **{name: round(found[name], 5) for name in report.MEASURES if name in found}}


def confusion(rows: list[dict]) -> dict[str, dict[str, int]]:
    """{true verb: {verb that AR answered, or "other": count}} on a made-up world."""
    said = {verb: Counter() for verb in toy.VERBS}
    for row in rows:
        if row["task"] == "AR":
            true = re.findall(r"[a-z]+", row["query"])[-1]
            answer = re.search(r"<answer>\s*([a-z]+)", row["completion"])
            said[true][answer[1] if answer and answer[1] in toy.VERBS else "other"] += 1
    return {verb: dict(counts) for verb, counts in said.items()}


def run_all(config: Config, runs: list[Run], path: Path) -> list[str]:
    """Do what has no row yet, and give it one. Returns the names of those that failed."""
    rows = {tuple(row[name] for name in report.KEY): row for row in report.read(path)}
    todo = [run for run in runs if run.key not in rows]
    # a start that has a row may be gone from the disk, or in another folder
    begun = [run.needs for run in todo if run.needs and not (run.needs.folder / run.needs.answers).exists()]
    todo = [run for run in runs if run in todo or run in begun]

    def finish(run: Run) -> str:
        rows[run.key] = collect(run)
        report.write(path, list(rows.values()))
        return f"mIoU {rows[run.key]['mIoU']:.3f}"

    for run in todo:
        run.commands = [typed(config, command) for command in run.commands]
    at_once = config.jobs or (1 if config.model else os.cpu_count())
    logs.say(f"{len(todo)} of {len(runs)} runs to do, {at_once} at once")
    return jobs.run(todo, at_once, 0 if config.model else max(os.cpu_count() // at_once, 1), finish)


def show(config: Config, runs: list[Run]) -> None:
    """Print the commands; on real data each behind what lab.plan says of it."""
    costs = {}
    for run in runs:
        note, parsed = "", parse(run.commands[0])
        if config.model and isinstance(parsed, train.Config):
            asked = tuple(flags(model=config.model, samples=parsed.steps * parsed.prompts_per_step,
                                gpus=processes(config), **{name: getattr(parsed, name) for name in PLANNED}))
            costs[asked] = costs.get(asked) or cost(asked)
            note = f": {costs[asked]}"
        print(f"# {run.name}{note}", *(shlex.join([*shlex.split(config.launch), *map(str, command)])
                                       for command in run.commands), sep="\n")
    print(f"# {len(runs)} runs")


def parse(command: list[str]) -> object:
    """The Config that a command gives its script. Raises ValueError for flags that it does not have."""
    script = {"train.py": train, "evaluate.py": evaluate, "sft.py": sft, "toy.py": toy}[command[0]]
    return flag_parser.parse(script.Config, list(map(str, command[1:])), script=command[0])


def processes(config: Config) -> int:
    """GPUs a node, as torchrun is told."""
    found = re.search(r"--nproc[-_]per[-_]node[= ](\d+)", config.launch)
    return int(found[1]) if found else 1


def cost(asked: tuple[str, ...]) -> str:
    """Memory and hours of a run, by lab.plan. Raises ValueError with its message where it cannot tell."""
    done = subprocess.run([sys.executable, "-m", "lab.plan", *asked], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip() or "lab.plan failed").splitlines()[-1])
    memory = re.search(r"at most .*?([\d.]+), and", done.stdout)[1]
    fits, hours = re.search(r"^(fits|DOES NOT FIT) into \S+ GB", done.stdout, re.M)[0], re.search(
        r"^(\d+) hours", done.stdout, re.M)[1]
    return f"planned, not measured: {memory} GB a GPU ({fits}), {hours} hours"


def draw_cases(runs: list[Run], world: str, path: Path) -> None:
    """Queries of seed 0 by rule: the two that inversion tasks helped most, beside TVG alone, two in the middle, the two
    that they harmed most; with what both thought."""
    found = {run.key[2]: run.folder / run.answers for run in runs if run.key[:2] == (world, 0)}
    folders = {name: found.get(arm) for name, arm in (("TVG alone", TVG), ("with inversion", ALL))}
    if any(folder is None or not (folder / "scores.json").exists() for folder in folders.values()):
        return
    answers = {name: toy.read_answers(folder) for name, folder in folders.items()}
    one, other = answers.values()
    order = sorted(one, key=lambda i: other[i]["iou"] - one[i]["iou"])
    middle, rows = len(order) // 2, []
    for i in (*order[:-3:-1], *order[middle:middle + 2], *order[:2]):
        of = {name: rows_of[i] for name, rows_of in answers.items()}
        rows.append({
            "clip": video.load(one[i]["video"]), "query": one[i]["query"], "truth": one[i]["truth"],
            "answers": {name: None if row["start"] is None else (row["start"], row["end"]) for name, row in of.items()},
            "iou": {name: row["iou"] for name, row in of.items()},
            "notes": [f"{name}: {row['completion']}" for name, row in of.items()]})
    plot.examples(rows, path)


def check_flags(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    check_numbers(config, "seeds")
    for name, known in (("experiments", EXPERIMENTS), ("worlds", STEPS)):
        if wrong := [value for value in getattr(config, name) if value not in known]:
            raise ValueError(f"{' '.join(wrong)}: no such {name[:-1]}; choose from {', '.join(known)}")
    given = {name: bool(getattr(config, name)) for name in ("model", "annotations", "test", "videos")}
    if any(given.values()) and not all(given.values()):
        raise ValueError(f"real data needs --model, --annotations, --test and --videos; there is no "
                         f"--{next(name for name, there in given.items() if not there)}")


@one_run
def main(config: Config) -> None:
    check_flags(config)
    runs, path, failed = plan_runs(config), Path(config.output, "results.csv"), []
    for command in (command for run in runs for command in run.commands):
        parse(command)      # a wrong flag is not found after hours
    if config.dry:
        return show(config, runs)
    if not config.report:
        failed = run_all(config, runs, path)
    rows = report.read(path)
    if not rows:
        raise ValueError(f"{path}: has no runs yet" + "".join(f"; failed: {name}" for name in failed))
    for world in PREMISE:
        draw_cases(runs, world, Path(config.output, f"cases_{world}.png"))
    watched = [name for name, arm in ARMS.items() if arm.watched]
    report.write_report(Path(config.output), rows, EXPERIMENTS, CLAIMS, PROBABILITIES, watched)
    if failed:
        logs.say(f"failed: {', '.join(failed)}; the same command tries them again")
        sys.exit(1)


if __name__ == "__main__":
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    sys.argv[1:1] = ["--experiments"] * bool(names)
    command_line(Config, main, __doc__)
