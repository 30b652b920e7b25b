"""From rows of runs to means, intervals, verdicts and RESULTS.md."""
import math

import matplotlib.image
import pandas as pd
import pytest

from lab import report
from lab.report import Claim, Experiment


def row(world, seed, arm, steps=3, **scores):
    return {"world": world, "seed": seed, "arm": arm, "flags": "", "steps": steps, "seconds": 7.5, "commit": "abc",
            "machine": "a laptop", "curve": "", "confusion": "", **dict.fromkeys(report.MEASURES, math.nan), **scores}


def runs(arm, values, measure="mIoU"):
    return [row("w", seed, arm, **{measure: value}) for seed, value in enumerate(values)]


def table(*rows):
    return pd.DataFrame(sum(rows, []))


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, in place of files."""
    drawn = []
    monkeypatch.setattr(report.plot, "save", lambda figure, path: drawn.append(figure))
    return drawn


def test_interval_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, t of 2 degrees of freedom 4.303."""
    mean, low, high = report.interval([1, 2, 3])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5), abs=1e-3)
    assert report.interval([0.5]) == (0.5, -math.inf, math.inf)
    assert math.isnan(report.interval([])[0])


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than arms do; a seed that only one arm has does not count, nor does the rows' order."""
    others = runs("b", [0.10, math.nan, 0.50, 0.90])[::-1]
    rows = table(runs("a", [0.11, 0.2, 0.52, 0.93]), others, [row("v", 0, "a", mIoU=0.9)])
    mean, low, high = report.difference(rows, "w", "a", "b", "mIoU")
    assert (mean, high - low) == pytest.approx((0.02, 2 * 4.303 * 0.01 / 3 ** 0.5), rel=1e-3)


@pytest.mark.parametrize("ours, others, same, verdict", [
    ([0.6, 0.7, 0.8], ["theirs"], False, "holds"),
    ([0.4, 0.5, 0.6], ["theirs"], False, "does not hold"),
    ([0.4, 0.6, 0.9], ["theirs"], False, "cannot be told"),
    ([0.6, 0.7, 0.8], ["theirs", "strong"], False, "does not hold"),    # one comparison is the other way round
    ([0.5, 0.61, 0.7], ["theirs"], True, "holds"),
    ([0.6, 0.71, 0.79], ["theirs"], True, "does not hold"),
    ([0.4, 0.7, 0.69], ["theirs"], True, "cannot be told"),
    ([0.5], ["theirs"], False, "cannot be told"),                       # one seed
    ([0.5, 0.6], ["absent"], False, "not run")])
def test_verdicts(ours, others, same, verdict):
    rows = table(runs("ours", ours), runs("theirs", [0.5, 0.61, 0.69]), runs("strong", [0.7, 0.81, 0.89]))
    claim = Claim("Table 9", "ours is better", ("ours",), tuple(others), ("w",), ("mIoU",), same)
    told, figures = report.judge(claim, rows, "w")
    assert told == verdict and figures.startswith("ours - theirs, mIoU " if verdict != "not run" else "")


def test_results_are_read_as_written(tmp_path):
    """All of them, sorted; text stays text and a missing score is NaN."""
    rows = [row("w", 1, "b, c", mIoU=0.25, confusion='{"rising": {"falling": 3}}', commit="0123e45"),
            row("w", 1, "a", steps=0, VC=1 / 3), row("w", 0, "b", mIoU=0.5)]
    report.write(tmp_path / "results.csv", rows)
    pd.testing.assert_frame_equal(report.read(tmp_path / "results.csv"),
                                  pd.DataFrame([rows[2], rows[1], rows[0]], columns=report.COLUMNS), check_dtype=False)
    assert report.read(tmp_path / "none.csv").empty
    assert (tmp_path / "results.csv").read_text().startswith("world,seed,arm,flags,steps,seconds,commit,machine,mIoU,")


@pytest.mark.parametrize("text", ["a,b\n1,2\n", ",".join(report.COLUMNS) + "\nw,one" + "," * (len(report.COLUMNS) - 2)])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match="results.csv: is no results.csv of lab.experiments"):
        report.read(tmp_path / "results.csv")


def test_each_difference_of_a_table_is_of_its_measure():
    rows = []
    for seed in range(2):
        rows += [row("w", seed, "a", mIoU=0.1, **{"R1@0.7": 0.2}), row("w", seed, "b", mIoU=0.2, **{"R1@0.7": 0.5})]
    lines = report.scores_table(Experiment("", "", ("a", "b"), "a", ("w",)), pd.DataFrame(rows), "w").splitlines()
    assert lines[0] == "| arm | mIoU | R1@0.7 | mIoU minus a | R1@0.7 minus it | seeds | seconds |"
    assert lines[1] == "|---|---|---|---|---|---|---|"
    assert lines[2] == "| a | 0.100 | 0.200 | - | - | 2 | 8 |"
    assert lines[3] == "| b | 0.200 | 0.500 | +0.100 (+0.100 to +0.100) | +0.300 (+0.300 to +0.300) | 2 | 8 |"


def test_differences_are_drawn_paired_and_in_their_panel(figures):
    """A dot per seed, and their mean; the third panel is the mean of VC, AR and VD."""
    rows = []
    for seed in range(3):
        other = {"mIoU": 0.1 * seed, "R1@0.7": 0.2 * seed, "VC": 0.1, "AR": 0.2, "VD": 0.3}
        rows.append(row("w", seed, "a", **dict.fromkeys(other, seed)))
        rows.insert(0, row("w", seed, "b", **{name: seed + value for name, value in other.items()}))
    experiment = Experiment("", "", ("a", "b"), "a", ("w",))
    assert report.draw_differences(experiment, pd.DataFrame(rows), "w", "x.png")
    dots = [sorted(axis.lines[2].get_xdata()) for axis in figures[0].axes]
    assert dots == [pytest.approx(values) for values in ([0, 0.1, 0.2], [0, 0.2, 0.4], [0.2] * 3)]
    assert not report.draw_differences(experiment, pd.DataFrame(rows[2:4]), "w", "x.png")       # one seed


def test_scores_are_drawn_over_one_minus_p(figures):
    rows = table(runs("TVG", [0.1, 0.3], "R1@0.3"), runs("all", [0.5, 0.9], "R1@0.3"))
    report.draw_by_probability({"TVG": 1.0, "all": 0.8}, rows, "w", "x.png")
    line = figures[0].axes[0].lines[0]
    assert line.get_xdata() == pytest.approx([0.0, 0.2]) and line.get_ydata() == pytest.approx([0.2, 0.7])


def test_confusions_are_shares_over_all_runs(figures):
    texts = ['{"rising": {"falling": 1}, "falling": {"falling": 4}}', '{"rising": {"rising": 2, "other": 1}}', ""]
    rows = pd.DataFrame([row("w", seed, "a", confusion=text) for seed, text in enumerate(texts)])
    assert report.draw_confusions(["a", "b"], rows, "w", "x.png")
    image, = figures[0].axes[0].images
    assert image.get_array().tolist() == [[0.5, 0.25, 0.25], [0, 1, 0]]
    assert [text.get_text() for text in figures[0].axes[0].texts] == [".50", ".25", ".25", "1"]
    assert not report.draw_confusions(["b"], rows, "w", "x.png")


def test_report_has_every_table_and_picture(tmp_path):
    """Each arm with its means, the claim with its verdict, and the pictures that are named are there."""
    rows = []
    for seed in range(3):
        for arm, steps, score in (("start", 0, 0.1), ("TVG", 3, 0.3), ("all", 3, 0.4)):
            rows.append(row("w", seed, arm, steps, **dict.fromkeys(report.MEASURES, score + 0.01 * seed),
                            curve=f"[[0, 0.1], [3, {score}]]", confusion='{"rising": {"rising": 3}}'))
    experiments = {"figure5": Experiment("Figure 5", "Which p?", ("TVG", "all"), "TVG", ("w",)),
                   "figure6": Experiment("Figure 6", "How fast?", ("TVG", "all"), "TVG", ("w",)),
                   "figure1": Experiment("Figure 1", "Which verbs?", ("start", "all"), "start", ("w",)),
                   "table9": Experiment("Table 9", "Not run", ("x", "y"), "x", ("w",))}
    claims = [Claim("Table 2", "all is better", ("all",), ("TVG",), ("w",), ("mIoU",))]
    (tmp_path / "notes.md").write_text("## Why\n\nThree seeds, since two told nothing.\n")
    report.write_report(tmp_path, pd.DataFrame(rows), experiments, claims, {"TVG": 1.0, "all": 0.8}, ["TVG", "all"])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| Table 2 | all is better | w | **holds** | all - TVG, mIoU +0.100 (+0.100 to +0.100) |" in text
    assert "6 runs of 3 seeds and 3 warm starts" in text and "Table 9" not in text
    assert "| all | 0.410 |" in text and report.INTRODUCTION.read_text().strip() in text
    assert text.endswith("\n\n## Why\n\nThree seeds, since two told nothing.\n")
    for name in ("figure5_w", "figure5_w_p", "figure6_w", "figure6_w_steps", "figure1_w", "figure1_w_verbs"):
        assert f"]({name}.png)" in text and matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.01


def test_half_a_comparison_is_not_shown(tmp_path):
    """The section says what is lacking, and nothing is drawn; a claim that rests on it has not been run. A world that
    no experiment names, such as one's own data, has a section of its own."""
    rows = table(runs("a", [0.1, 0.2, 0.4]), runs("b", [0.2, 0.3, 0.6]), [row("data", 0, "a", mIoU=0.5)])
    experiment = Experiment("Figure 5", "Which p?", ("a", "b", "c"), "a", ("w",))
    claim = Claim("Figure 5", "a is best", ("a",), ("b", "c"), ("w",), ("mIoU",))
    report.write_report(tmp_path, rows, {"figure5": experiment}, [claim], {"a": 1.0, "b": 0.8, "c": 0.6}, [])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Figure 5, on `w`\n\nNot run yet: c." in text and "on `data`\n\nNot run yet: b; c." in text
    assert "| a | 0.2" not in text and "**not run**" in text
    assert [path.name for path in tmp_path.iterdir()] == ["RESULTS.md"]
