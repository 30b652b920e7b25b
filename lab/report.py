"""From the rows of results.csv, one per run, to RESULTS.md and its pictures.

A difference between two arms is taken between runs of the same world and seed, so of the same videos, warm start and
test set. Its interval is Student's over seeds: it speaks of other seeds, unlike that of lab/compare.py, which speaks of
other videos.

The prose around the tables lies in text files: results/introduction.md of this repository stands before the tables, and
notes.md beside results.csv, where there is one, behind them.
"""
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from engine import files, logs, plot

INTRODUCTION = Path(__file__).parent.parent / "results" / "introduction.md"
MEASURES = ["mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "right_event", "same_answer",
            "VC", "AR", "VD", "narrated"]
KEY = ["world", "seed", "arm", "flags"]
COLUMNS = [*KEY, "steps", "seconds", "commit", "machine", *MEASURES, "curve", "confusion"]
TYPES = {"seed": int, "steps": int, "seconds": float, **dict.fromkeys(MEASURES, float)}
SAME = 0.02         # two scores nearer than this count as the same, where a claim is that they are
START = "start"     # the arm that is not trained
PANELS = {"mIoU": ["mIoU"], "R1@0.7": ["R1@0.7"], "mean of VC, AR and VD": ["VC", "AR", "VD"]}


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


def read(path: Path) -> pd.DataFrame:
    """The rows of a results.csv, none where there is none; a missing score is NaN. Raises ValueError, which names the
    file, for another kind of file."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)[COLUMNS]     # all as text
        rows[MEASURES] = rows[MEASURES].replace("", "nan")
        return rows.astype(TYPES)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: is no results.csv of lab.experiments ({error}); mend or "
                         "remove it") from error


def write(path: Path, rows: list[dict]) -> None:
    """Write rows whole, sorted."""
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values(KEY)
    files.write_whole(path, table.to_csv(index=False, lineterminator="\n"))


def runs_of(rows: pd.DataFrame, world: str, arm: str) -> pd.DataFrame:
    chosen = rows[(rows["world"] == world) & (rows["arm"] == arm)]
    return chosen.drop_duplicates("seed", keep="last")


def scores(rows: pd.DataFrame, world: str, arm: str, measure: str) -> pd.Series:
    """The scores of an arm's runs, by seed."""
    return runs_of(rows, world, arm).set_index("seed")[measure].dropna()


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean; unbounded for one value, NaN for none."""
    x = np.array(list(values), dtype=float)
    if len(x) == 0:
        return math.nan, math.nan, math.nan
    if len(x) == 1:
        return float(x[0]), -math.inf, math.inf
    width = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
    return float(x.mean()), float(x.mean() - width), float(x.mean() + width)


def paired(rows: pd.DataFrame, world: str, arm: str, other: str, measure: str) -> pd.Series:
    """The differences arm minus other, by seed, of the seeds that both have."""
    differences = scores(rows, world, arm, measure) - scores(rows, world, other, measure)
    return differences.dropna()


def difference(rows: pd.DataFrame, world: str, arm: str, other: str,
               measure: str) -> tuple[float, float, float]:
    """(mean, low, high) of arm minus other over the seeds that both have."""
    return interval(paired(rows, world, arm, other, measure))


def in_words(mean: float, low: float, high: float) -> str:
    """A difference with its interval; NaN: there is none yet."""
    if math.isnan(mean):
        return "-"
    interval = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "one seed"
    return f"{mean:+.3f} ({interval})"


def judge(claim: Claim, rows: pd.DataFrame, world: str) -> tuple[str, str]:
    """(verdict, the figures it rests on). A claim of several comparisons holds when all do, and does not when one is
    the other way round; an interval that includes 0 tells neither."""
    differences = {}
    for better in claim.better:
        for other in claim.others:
            for measure in claim.measures:
                name = f"{better} - {other}, {measure}"
                differences[name] = difference(rows, world, better, other, measure)
    if any(math.isnan(mean) for mean, _, _ in differences.values()):
        return "not run", ""
    lows = np.array([low for _, low, _ in differences.values()])
    highs = np.array([high for _, _, high in differences.values()])
    if claim.same:
        holds = (lows > -SAME).all() and (highs < SAME).all()
        fails = (lows > 0).any() or (highs < 0).any()
    else:
        holds = (lows > 0).all()
        fails = (highs < 0).any()
    shown, prefix = list(differences), ""
    if len(shown) > 3:
        shown.sort(key=lambda name: differences[name][0])
        prefix = f"of {len(shown)} differences the least and the greatest: "
        shown = [shown[0], shown[-1]]
    figures = "; ".join(f"{name} {in_words(*differences[name])}" for name in shown)
    if holds:
        return "holds", prefix + figures
    return "does not hold" if fails else "cannot be told", prefix + figures


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rows = [f"| {' | '.join(cells)} |" for cells in [head, *lines]]
    rows.insert(1, "|" + "---|" * len(head))
    return "\n".join(rows)


def claims_table(claims: list[Claim], rows: pd.DataFrame) -> str:
    lines = []
    for claim in claims:
        for world in claim.worlds:
            verdict, figures = judge(claim, rows, world)
            lines.append([claim.item, claim.text, world, f"**{verdict}**", figures])
    return table(["item", "claim", "world", "here", "the figures it rests on"], lines)


def scores_table(experiment: Experiment, rows: pd.DataFrame, world: str) -> str:
    """A line per arm: mean scores, the difference to the arm it is measured against, runs and seconds."""
    against = experiment.against
    runs = {arm: runs_of(rows, world, arm) for arm in experiment.arms}
    shown = pd.concat(runs.values())[MEASURES].dropna(axis=1, how="all").columns
    lines = []
    for arm, of_arm in runs.items():
        cells = [arm]
        cells += [f"{mean:.3f}" for mean in of_arm[shown].mean()]
        for measure in ("mIoU", "R1@0.7"):
            gain = in_words(*difference(rows, world, arm, against, measure))
            cells.append("-" if arm == against else gain)
        cells += [str(len(of_arm)), f"{of_arm['seconds'].mean():.0f}"]
        lines.append(cells)
    head = ["arm", *shown, f"mIoU minus {against}", "R1@0.7 minus it", "seeds", "seconds"]
    return table(head, lines)


def draw_differences(experiment: Experiment, rows: pd.DataFrame, world: str, path: Path) -> bool:
    """A point and a 95 % interval for the difference of each trained arm in mIoU, R1@0.7, the mean of VC, AR and VD; a
    dot per seed. False, and nothing drawn, where there is nothing to compare."""
    against = experiment.against
    trained = set(rows[rows["steps"] > 0]["arm"])   # beside a start the others would look the same
    arms = []
    for arm in experiment.arms:
        seeds = len(paired(rows, world, arm, against, "mIoU"))
        if arm in trained and arm != against and seeds > 1:
            arms.append(arm)
    if not arms:
        return False
    size = 11, 1.4 + 0.42 * len(arms)               # inches
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, layout="constrained")
    for axis, (title, measures) in zip(axes, PANELS.items()):
        for y, arm in enumerate(arms):
            columns = [paired(rows, world, arm, against, measure) for measure in measures]
            values = pd.concat(columns, axis=1).dropna().mean(axis=1)       # by seed
            mean, low, high = interval(values)
            axis.plot([low, high], [y, y], color=plot.COLOURS["TVG"], linewidth=2)
            axis.plot(mean, y, "o", color=plot.COLOURS["TVG"], markersize=7)
            axis.plot(values, [y] * len(values), ".", color=plot.COLOURS["before"], markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=title, yticks=range(len(arms)), yticklabels=arms)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.25)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel(f"difference to {against}", fontsize="medium")
    plot.save(figure, path)
    return True


def draw_band(axis: plt.Axes, values: pd.DataFrame, style: str, colour: str, **options) -> None:
    """The mean of runs as a line over the frame's columns, from the lowest to the highest run as a band."""
    axis.fill_between(values.columns, values.min(), values.max(), color=colour, alpha=0.15)
    axis.plot(values.columns, values.mean(), style, color=colour, **options)


def draw_by_probability(arms: dict[str, float], rows: pd.DataFrame, world: str, path: Path) -> bool:
    """Figure 5: scores over 1 - p."""
    panels = {"held-out queries, greedy": ["R1@0.3", "R1@0.5", "R1@0.7"],
              "held-out segments, greedy": ["VC", "AR", "VD"]}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (title, measures) in zip(axes, panels.items()):
        for measure, colour in zip(measures, ("TVG", "VC", "AR")):
            columns = {1 - p: scores(rows, world, arm, measure) for arm, p in arms.items()}
            values = pd.DataFrame(columns).sort_index(axis=1)           # (seeds, arms)
            draw_band(axis, values, "o-", plot.COLOURS[colour], label=measure, markersize=4)
        axis.set(title=title, xlabel="probability of an inversion task, 1 - p", ylabel="share")
        axis.set_ylim(0, 1.03)
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    plot.save(figure, path)
    return True


def draw_over_steps(arms: Iterable[str], rows: pd.DataFrame, world: str, path: Path) -> bool:
    """Figure 6: mIoU of held-out queries over steps, of the runs that were evaluated while they trained."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm, colour, style in zip(arms, plot.COLOURS.values(), ("-", "--", ":", "-.")):
        curves = runs_of(rows, world, arm)["curve"]
        curves = [dict(json.loads(curve)) for curve in curves if curve]     # {step: mIoU} of a run
        values = pd.DataFrame(curves).dropna(axis=1).sort_index(axis=1)     # (runs, common steps)
        if values.size:
            label = f"{arm} ({len(curves)} runs)"
            draw_band(axis, values, style, colour, label=label, linewidth=2)
    if not axis.lines:
        plt.close(figure)
        return False
    axis.set(title="held-out queries, greedy", xlabel="step", ylabel="mIoU", ylim=(0, 1.03))
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.25)
    plot.save(figure, path)
    return True


def confusion_shares(runs: pd.DataFrame) -> pd.DataFrame:
    """What AR answers (columns) for each true verb (rows), as shares over all runs; empty where no run tells."""
    counts = defaultdict(Counter)
    for text in runs["confusion"]:
        for verb, answers in json.loads(text or "{}").items():
            counts[verb].update(answers)
    verbs = list(counts)
    shares = pd.DataFrame(counts, dtype=float).T.reindex(verbs, columns=[*verbs, "other"]).fillna(0)
    return shares.div(shares.sum(axis=1), axis=0)


def draw_confusions(arms: Iterable[str], rows: pd.DataFrame, world: str, path: Path) -> bool:
    """What AR answers for each true verb, one panel per arm."""
    panels = {arm: confusion_shares(runs_of(rows, world, arm)) for arm in arms}
    panels = {arm: shares for arm, shares in panels.items() if shares.size}
    if not panels:
        return False
    size = 4.6 * len(panels), 4.2                   # inches
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (arm, shares) in zip(axes[0], panels.items()):
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.argwhere(shares.to_numpy() >= 0.005):
            share = shares.iat[i, j]
            text = f"{share:.2f}"[1:] if share < 0.995 else "1"
            colour = "white" if share > 0.6 else "black"
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color=colour)
        axis.set(title=arm, xlabel="verb answered", ylabel="verb shown")
        axis.set_yticks(range(len(shares)), shares.index)
        axis.set_xticks(range(shares.shape[1]), shares.columns, rotation=45, ha="right")
    plot.save(figure, path)
    return True


def worlds_of(experiment: Experiment, rows: pd.DataFrame,
              experiments: Iterable[Experiment]) -> list[str]:
    """The worlds with trained runs of an experiment: its own first, then those that no experiment names."""
    named = {world for each in experiments for world in each.worlds}
    trained = rows[rows["arm"].isin(experiment.arms) & (rows["steps"] > 0)]
    there = set(trained["world"])
    return [world for world in experiment.worlds if world in there] + sorted(there - named)


def section(name: str, experiment: Experiment, world: str, title: str, rows: pd.DataFrame,
            output: Path, probabilities: dict[str, float], watched: list[str]) -> list[str]:
    """The paragraphs of an experiment on a world; draws its pictures."""
    lacking = [arm for arm in experiment.arms if scores(rows, world, arm, "mIoU").empty]
    if lacking:         # half a comparison would look like a whole one
        return [title, f"Not run yet: {'; '.join(lacking)}."]
    paragraphs = [title, experiment.question, scores_table(experiment, rows, world)]

    def picture(ending: str, draw: Callable, what: object) -> None:
        path = output / f"{name}_{world}{ending}.png"
        if draw(what, rows, world, path):
            paragraphs.append(f"![{experiment.title}]({path.name})")

    picture("", draw_differences, experiment)
    if name == "figure5":
        picture("_p", draw_by_probability, probabilities)
    if name in ("figure6", "table2"):
        picture("_steps", draw_over_steps, [arm for arm in experiment.arms if arm in watched])
    if name == "figure1":
        picture("_verbs", draw_confusions, experiment.arms)
    return paragraphs


def counted(rows: pd.DataFrame) -> str:
    """How many runs there are, and where they come from."""
    trained = int((rows["steps"] > 0).sum())
    commits, machines = (", ".join(sorted(rows[name].unique())) for name in ("commit", "machine"))
    hours = rows["seconds"].sum() / 3600
    return (f"{trained} runs of {rows['seed'].nunique()} seeds and {len(rows) - trained} warm "
            f"starts, {hours:.1f} hours of training one after the other, on {machines};\ncode at "
            f"{commits}. Written by `python -m lab.experiments --report` from results.csv.")


def write_report(output: Path, rows: pd.DataFrame, experiments: dict[str, Experiment],
                 claims: list[Claim], probabilities: dict[str, float], watched: list[str]) -> None:
    """Write RESULTS.md and its pictures. `probabilities` are the arms of Figure 5 with their p, `watched` the arms that
    were evaluated while they trained."""
    introduction = files.read_text(INTRODUCTION).strip()
    paragraphs = ["# Results", counted(rows), introduction,
                  "## The claims", claims_table(claims, rows)]
    for name, experiment in experiments.items():
        worlds = worlds_of(experiment, rows, experiments.values())
        for world in worlds:
            title = f"## {experiment.title}"
            if len(worlds) > 1:
                title += f", on `{world}`"
            paragraphs += section(name, experiment, world, title, rows, output, probabilities,
                                  watched)
    cases = sorted(output.glob("cases_*.png"))
    if cases:
        paragraphs += ["## Cases",
                       "Of seed 0: the two queries that gained most by the inversion tasks, two in "
                       "the middle, the two that lost most; beneath each, what was said."]
        paragraphs += [f"![cases]({path.name})" for path in cases]
    if (output / "notes.md").exists():
        paragraphs.append(files.read_text(output / "notes.md").strip())
    files.write_whole(output / "RESULTS.md", "\n\n".join(paragraphs) + "\n")
    logs.say(f"written: {output / 'RESULTS.md'}")
