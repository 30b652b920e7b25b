"""From the rows of results.csv, one a run, to RESULTS.md and its pictures: means over seeds, paired differences with
95 % intervals, and what they say of a claim.

A difference is taken between runs of the same world and seed, so the same videos, warm start and test set. Its interval
is Student's, over seeds: it speaks of other seeds, unlike that of tools/compare.py, which speaks of other videos.
"""
import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from engine import files, logs, plot

MEASURES = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "right_event", "same_answer", "VC", "AR", "VD", "narrated")
KEY = ("world", "seed", "arm", "flags")
COLUMNS = (*KEY, "steps", "seconds", "commit", "machine", *MEASURES, "curve", "confusion")
QUANTILE = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t of 0.975, by degrees of freedom
SAME = 0.02     # two scores nearer than this count as the same, where a claim is that they are
START = "start"     # the arm that is not trained

INTRODUCTION = """# Results

{runs} runs of {seeds} seeds and {starts} warm starts, {hours} hours of training one after the other, on {machines};
code at {commits}. Written by `python experiments.py --report` from results.csv.

Unless a section says `data`, all is on the made-up world of toy.py, with a model of 1.1 million weights. It tells
what the method as implemented here does there, not what it gains on real videos. A warm start imitates a teacher
with a weakness, which GRPO can mend:

- `verbs`: three verbs are taken for their opposites seven times in ten, in all tasks and in the thoughts of TVG:
  the paper's premise, wrong grounding from wrong verbs. 100 steps.
- `edges`: starts and ends are a second late six times in ten, the verbs right. 40 steps.
- `both`: late edges in TVG, and one verb wrong in the inversion tasks. 40 steps.

Answers are greedy, on the held-out queries of a seed's world, some 540. Differences are paired: same videos, warm
start and test set; in brackets is Student's 95 % interval over seeds. A claim **holds** here when every interval
that it rests on is on its side of 0, **does not hold** when one is on the other side, and else **cannot be
told**. Each interval is one of 95 % for itself: of twenty such about one misses, so a verdict that rests on one of
many differences is weak.

In the pictures a small dot is a seed, a large one their mean and the line its interval; bands reach from the lowest
seed to the highest."""
FAILED_WORLDS = """## Worlds that could not tell

- Thoughts that marked an event before naming its verb: mIoU rose from 0.40 to 0.69 while half of the pairs of
  queries of one video got the same answer, before and after. So small a model cannot compare a picture with a word.
- Videos of 10 to 16 s instead of 12: of the changes of verb 33 to 41 % were told right after a warm start, 87 to
  100 % in videos of one length.
- `both`, for Table 2: the warm start finds the right event already (0.97), so grounding is not at stake.
- `edges`, for Table 2: 40 steps of TVG mend the edges wherever they are taken, and verbs are right from the start; what
  is left between the arms is less than 0.02."""


@dataclass(frozen=True)
class Experiment:
    """What is compared: arms, by name, each with the one that it is measured against."""
    title: str
    question: str
    arms: tuple[str, ...]
    against: str
    worlds: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """That `better` beats each of `others` in each measure, or with `same`, that it does not differ."""
    item: str
    text: str
    better: tuple[str, ...]
    others: tuple[str, ...]
    worlds: tuple[str, ...]
    measures: tuple[str, ...] = ("R1@0.7",)
    same: bool = False


def read(path: Path) -> list[dict]:
    """The rows of a results.csv, none where there is none: text, but for seed, steps, seconds and scores, which are
    numbers or None. ValueError, naming file and line: another kind of file."""
    if not path.exists():
        return []
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    for number, row in enumerate(rows, 2):
        try:
            row.update(seed=int(row["seed"]), steps=int(row["steps"]), seconds=float(row["seconds"]))
            row.update((name, float(row[name]) if row[name] else None) for name in MEASURES)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: is no row of experiments.py ({error!r}); mend or remove it") from error
    return rows


def write(path: Path, rows: list[dict]) -> None:
    """Write rows whole, sorted."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: tuple(row[name] for name in KEY)))
    files.write_whole(path, text.getvalue())


def of_arm(rows: list[dict], world: str, arm: str, measure: str) -> dict[int, float]:
    """{seed: score} of an arm's runs."""
    return {row["seed"]: row[measure] for row in rows
            if (row["world"], row["arm"]) == (world, arm) and row[measure] is not None}


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean; unbounded for one value, NaN for none."""
    x = np.array(list(values), dtype=float)
    if len(x) < 2:
        return (float(x[0]), -math.inf, math.inf) if len(x) else (math.nan,) * 3
    freedom = len(x) - 1
    quantile = QUANTILE[freedom] if freedom < len(QUANTILE) else \
        1.96 + 2.372 / freedom + 2.82 / freedom ** 2 + 2.6 / freedom ** 3    # within 0.001
    half = quantile * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def difference(rows: list[dict], world: str, arm: str, other: str, measure: str) -> tuple[float, float, float]:
    """(mean, low, high) of arm minus other over the seeds that both have."""
    ones, others = (of_arm(rows, world, name, measure) for name in (arm, other))
    return interval(ones[seed] - others[seed] for seed in ones if seed in others)


def told(mean: float, low: float, high: float) -> str:
    """A difference with its interval; NaN: there is none yet."""
    if math.isnan(mean):
        return "-"
    return f"{mean:+.3f} " + (f"({low:+.3f} to {high:+.3f})" if math.isfinite(low) else "(one seed)")


def judge(claim: Claim, rows: list[dict], world: str) -> tuple[str, str]:
    """(verdict, the figures it rests on). A claim of several comparisons holds when all do, and does not when one is
    the other way round; an interval that includes 0 tells neither."""
    found = [(f"{better} - {other}, {measure}", difference(rows, world, better, other, measure))
             for better in claim.better for other in claim.others for measure in claim.measures]
    if any(math.isnan(mean) for _, (mean, _, _) in found):
        return "not run", ""
    if claim.same:
        holds = all(-SAME < low and high < SAME for _, (_, low, high) in found)
        fails = any(low > 0 or high < 0 for _, (_, low, high) in found) and not holds
    else:
        holds, fails = all(low > 0 for _, (_, low, _) in found), any(high < 0 for _, (_, _, high) in found)
    by_mean = sorted(found, key=lambda each: each[1][0])
    shown = found if len(found) < 4 else [by_mean[0], by_mean[-1]]
    figures = "; ".join(f"{name} {told(*values)}" for name, values in shown)
    return ("holds" if holds else "does not hold" if fails else "cannot be told",
            figures if len(found) < 4 else f"of {len(found)} differences the least and the greatest: {figures}")


def claims_table(claims: list[Claim], rows: list[dict]) -> str:
    lines = ["| item | claim | world | here | the figures it rests on |", "|---|---|---|---|---|"]
    for claim in claims:
        for world in claim.worlds:
            verdict, figures = judge(claim, rows, world)
            lines.append(f"| {claim.item} | {claim.text} | {world} | **{verdict}** | {figures} |")
    return "\n".join(lines)


def scores_table(experiment: Experiment, rows: list[dict], world: str) -> str:
    """A line an arm: mean scores, the difference to the arm it is measured against, runs and seconds."""
    shown = [m for m in MEASURES if any(of_arm(rows, world, arm, m) for arm in experiment.arms)]
    lines = [f"| arm | {' | '.join(shown)} | mIoU minus {experiment.against} | R1@0.7 minus it | seeds | seconds |",
             "|---" * (len(shown) + 5) + "|"]
    for arm in experiment.arms:
        of = [row for row in rows if (row["world"], row["arm"]) == (world, arm)]
        if not of:
            continue
        means = [f"{np.mean(list(of_arm(rows, world, arm, m).values()) or [math.nan]):.3f}" for m in shown]
        gains = ["-" if arm == experiment.against else
                 told(*difference(rows, world, arm, experiment.against, m))
                 for m in ("mIoU", "R1@0.7")]
        seconds = np.mean([row["seconds"] for row in of])
        lines.append(f"| {arm} | {' | '.join(means)} | {' | '.join(gains)} | {len(of)} | {seconds:.0f} |")
    return "\n".join(lines)


def draw_differences(experiment: Experiment, rows: list[dict], world: str, path: Path) -> bool:
    """A point and a 95 % interval for the difference of each trained arm in mIoU, R1@0.7, the mean of VC, AR and VD; a
    dot a seed. False, and nothing drawn, where there is nothing to compare."""
    seeds_of = lambda arm: of_arm(rows, world, arm, "mIoU").keys()
    trained = {row["arm"] for row in rows if row["steps"]}      # a start is so far below that the others would look one
    arms = [arm for arm in experiment.arms
            if arm in trained - {experiment.against} and len(seeds_of(arm) & seeds_of(experiment.against)) > 1]
    if not arms:
        return False
    figure, axes = plt.subplots(1, 3, figsize=(11, 1.4 + 0.42 * len(arms)), sharey=True, layout="constrained")
    for axis, (title, measures) in zip(axes, (("mIoU", ("mIoU",)), ("R1@0.7", ("R1@0.7",)),
                                              ("mean of VC, AR and VD", ("VC", "AR", "VD")))):
        for y, arm in enumerate(arms):
            pairs = [tuple(of_arm(rows, world, name, m) for name in (arm, experiment.against)) for m in measures]
            seeds = set.intersection(*(one.keys() & other.keys() for one, other in pairs))
            values = [float(np.mean([one[seed] - other[seed] for one, other in pairs])) for seed in sorted(seeds)]
            mean, low, high = interval(values)
            axis.plot([low, high], [y, y], color=plot.COLOURS["TVG"], linewidth=2)
            axis.plot(mean, y, "o", color=plot.COLOURS["TVG"], markersize=7)
            axis.plot(values, [y] * len(values), ".", color=plot.COLOURS["before"], markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=title, yticks=range(len(arms)), yticklabels=arms)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.25)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel(f"difference to {experiment.against}", fontsize="medium")
    plot.save(figure, path)
    return True


def draw_by_probability(arms: dict[str, float], rows: list[dict], world: str, path: Path) -> bool:
    """Figure 5: scores over 1 - p, means as lines and the lowest to the highest seed as bands."""
    panels = {("R1@0.3", "R1@0.5", "R1@0.7"): "held-out queries, greedy",
              ("VC", "AR", "VD"): "held-out segments, greedy"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (measures, title) in zip(axes, panels.items()):
        for colour, measure in zip((plot.COLOURS["TVG"], plot.COLOURS["VC"], plot.COLOURS["AR"]), measures):
            points = sorted((1 - p, list(of_arm(rows, world, arm, measure).values())) for arm, p in arms.items())
            points = [(x, values) for x, values in points if values]
            if not points:
                plt.close(figure)
                return False
            x = [x for x, _ in points]
            axis.fill_between(x, [min(v) for _, v in points], [max(v) for _, v in points], color=colour, alpha=0.15)
            axis.plot(x, [np.mean(v) for _, v in points], "o-", color=colour, label=measure, markersize=4)
        axis.set(title=title, xlabel="probability of an inversion task, 1 - p", ylabel="share", ylim=(0, 1.03))
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    plot.save(figure, path)
    return True


def draw_over_steps(arms: Iterable[str], rows: list[dict], world: str, path: Path) -> bool:
    """Figure 6: mIoU of held-out queries over steps, means as lines and the lowest to the highest seed as bands."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (arm, colour), style in zip(zip(arms, plot.COLOURS.values()), ("-", "--", ":", "-.")):
        curves = [dict(map(tuple, json.loads(row["curve"]))) for row in rows
                  if (row["world"], row["arm"]) == (world, arm) and row["curve"]]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if steps:
            values = np.array([[curve[step] for step in steps] for curve in curves])        # (runs, steps)
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15)
            axis.plot(steps, values.mean(0), style, color=colour, label=f"{arm} ({len(curves)} runs)", linewidth=2)
    if not axis.lines:
        plt.close(figure)
        return False
    axis.set(title="held-out queries, greedy", xlabel="step", ylabel="mIoU", ylim=(0, 1.03))
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.25)
    plot.save(figure, path)
    return True


def draw_confusions(arms: Iterable[str], rows: list[dict], world: str, path: Path) -> bool:
    """What AR answers for each true verb, as shares over all seeds, an arm a panel."""
    found = {}
    for arm in arms:
        total = {}
        for row in rows:
            if (row["world"], row["arm"]) == (world, arm) and row["confusion"]:
                for verb, said in json.loads(row["confusion"]).items():
                    for word, count in said.items():
                        total.setdefault(verb, {}).setdefault(word, 0)
                        total[verb][word] += count
        if total:
            found[arm] = total
    if not found:
        return False
    verbs = list(next(iter(found.values())))
    words = [*verbs, "other"]
    figure, axes = plt.subplots(1, len(found), figsize=(4.6 * len(found), 4.2), squeeze=False, layout="constrained")
    for axis, (arm, total) in zip(axes[0], found.items()):
        counts = np.array([[total[verb].get(word, 0) for word in words] for verb in verbs], dtype=float)
        shares = counts / counts.sum(1, keepdims=True)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.argwhere(shares >= 0.005):
            axis.text(j, i, f"{shares[i, j]:.2f}"[1:] if shares[i, j] < 0.995 else "1", ha="center", va="center",
                      fontsize=9, color="white" if shares[i, j] > 0.6 else "black")
        axis.set(title=arm, xlabel="verb answered", ylabel="verb shown", yticks=range(len(verbs)), yticklabels=verbs)
        axis.set_xticks(range(len(words)), words, rotation=45, ha="right")
    plot.save(figure, path)
    return True


def write_report(output: Path, rows: list[dict], experiments: dict[str, Experiment], claims: list[Claim],
                 probabilities: dict[str, float], watched: list[str]) -> None:
    """RESULTS.md and its pictures. `probabilities` are the arms of Figure 5 with their p, `watched` those that were
    evaluated while they trained. What notes.md in `output` says, such as why some seeds are more, stands at the end."""
    parts = []
    for name, experiment in experiments.items():
        known = {world for each in experiments.values() for world in each.worlds} - set(experiment.worlds)
        there = {row["world"] for row in rows if row["arm"] in experiment.arms and row["steps"]} - known
        for world in [*(world for world in experiment.worlds if world in there), *sorted(there - {*experiment.worlds})]:
            lacking = [arm for arm in experiment.arms if not of_arm(rows, world, arm, "mIoU")]
            if lacking:     # half a comparison would look like a whole one
                parts += [f"## {experiment.title}" + f", on `{world}`" * (len(there) > 1),
                          f"Not run yet: {'; '.join(lacking)}."]
                continue
            parts += [f"## {experiment.title}" + f", on `{world}`" * (len(there) > 1), experiment.question,
                      scores_table(experiment, rows, world)]
            drawn = {f"{name}_{world}": draw_differences(experiment, rows, world, output / f"{name}_{world}.png")}
            if name == "figure5":
                drawn[f"{name}_{world}_p"] = draw_by_probability(probabilities, rows, world,
                                                                 output / f"{name}_{world}_p.png")
            if name in ("figure6", "table2"):
                over = [arm for arm in experiment.arms if arm in watched]
                drawn[f"{name}_{world}_steps"] = draw_over_steps(over, rows, world,
                                                                 output / f"{name}_{world}_steps.png")
            if name == "figure1":
                drawn[f"{name}_{world}_verbs"] = draw_confusions(experiment.arms, rows, world,
                                                                 output / f"{name}_{world}_verbs.png")
            parts += [f"![{experiment.title}]({file}.png)" for file, there_is in drawn.items() if there_is]
    if cases := sorted(output.glob("cases_*.png")):
        parts += ["## Cases", "Of seed 0: the two queries that gained most by the inversion tasks, two in the middle, "
                  "the two that lost most; beneath each, what was said.", *(f"![cases]({path.name})" for path in cases)]
    notes = [path.read_text(encoding="utf-8").strip() for path in [output / "notes.md"] if path.exists()]
    commits, machines = (", ".join(sorted({row[key] for row in rows})) for key in ("commit", "machine"))
    head = INTRODUCTION.format(
        runs=sum(row["steps"] > 0 for row in rows), starts=sum(row["steps"] == 0 for row in rows), commits=commits,
        seeds=len({row["seed"] for row in rows}), hours=f"{sum(row['seconds'] for row in rows) / 3600:.1f}",
        machines=machines)
    files.write_whole(output / "RESULTS.md", "\n\n".join(
        [head, "## The claims", claims_table(claims, rows), *parts, FAILED_WORLDS, *notes]) + "\n")
    logs.say(f"written: {output / 'RESULTS.md'}")
