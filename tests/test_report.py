"""From rows of runs to means, intervals, verdicts and RESULTS.md."""
import math

import matplotlib.image
import pytest

from lab import report
from lab.report import Claim, Experiment


def row(world, seed, arm, steps=3, **scores):
    return {"world": world, "seed": seed, "arm": arm, "flags": "", "steps": steps, "seconds": 7.5, "commit": "abc",
            "machine": "a laptop", "curve": "", "confusion": "", **dict.fromkeys(report.MEASURES), **scores}


def runs(arm, values, world="w", measure="mIoU"):
    return [row(world, seed, arm, **{measure: value}) for seed, value in enumerate(values)]


def test_interval_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, t of 2 degrees of freedom 4.303."""
    mean, low, high = report.interval([1, 2, 3])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5))
    assert report.interval([0.5]) == (0.5, -math.inf, math.inf)
    assert math.isnan(report.interval([])[0])


def test_quantiles_go_on_smoothly():
    """t of 0.975 for 10, 20 and 60 degrees of freedom is 2.228, 2.086, 2.000."""
    for freedom, quantile in ((9, 2.262), (10, 2.228), (20, 2.086), (60, 2.000)):
        values = [0.0] * freedom + [1.0]
        mean, low, _ = report.interval(values)
        deviation = (sum((v - mean) ** 2 for v in values) / freedom) ** 0.5
        assert (mean - low) / (deviation / (freedom + 1) ** 0.5) == pytest.approx(quantile, abs=0.002)


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than arms do; a seed that only one arm has does not count, nor does the rows' order."""
    rows = runs("a", [0.11, 0.2, 0.52, 0.93]) + [row("w", seed, "b", mIoU=mIoU) for seed, mIoU in (
        (3, 0.90), (0, 0.10), (2, 0.50))]
    mean, low, high = report.difference(rows, "w", "a", "b", "mIoU")
    assert mean == pytest.approx(0.02) and high - low == pytest.approx(2 * 4.303 * 0.01 / 3 ** 0.5)


@pytest.mark.parametrize("values, verdict", [
    ([0.6, 0.7, 0.8], "holds"), ([0.4, 0.5, 0.6], "does not hold"), ([0.4, 0.6, 0.9], "cannot be told")])
def test_a_claim_of_more(values, verdict):
    rows = runs("ours", values) + runs("theirs", [0.5, 0.61, 0.69])
    claim = Claim("Table 9", "ours is better", ("ours",), ("theirs",), ("w",), ("mIoU",))
    said, figures = report.judge(claim, rows, "w")
    assert said == verdict and figures.startswith("ours - theirs, mIoU ")


def test_one_comparison_the_other_way_refutes_a_claim_of_two():
    rows = runs("ours", [0.6, 0.7, 0.8]) + runs("weak", [0.5, 0.61, 0.69]) + runs("strong", [0.7, 0.81, 0.89])
    claim = Claim("Table 9", "ours is the best", ("ours",), ("weak", "strong"), ("w",), ("mIoU",))
    assert report.judge(claim, rows, "w")[0] == "does not hold"


@pytest.mark.parametrize("values, verdict", [
    ([0.5, 0.61, 0.7], "holds"), ([0.6, 0.71, 0.79], "does not hold"), ([0.4, 0.7, 0.69], "cannot be told")])
def test_a_claim_of_no_difference(values, verdict):
    rows = runs("with", values) + runs("without", [0.5, 0.61, 0.69])
    claim = Claim("Figure 9", "no difference", ("with",), ("without",), ("w",), ("mIoU",), same=True)
    assert report.judge(claim, rows, "w")[0] == verdict


def test_what_has_not_run_is_said():
    claim = Claim("Table 9", "x", ("ours",), ("theirs",), ("w",), ("mIoU",))
    assert report.judge(claim, runs("ours", [0.5, 0.6]), "w") == ("not run", "")
    assert report.judge(claim, runs("ours", [0.5]) + runs("theirs", [0.1]), "w")[0] == "cannot be told"    # one seed


def test_results_are_read_as_written(tmp_path):
    rows = [row("w", 1, "b, c", mIoU=0.25, confusion='{"rising": {"falling": 3}}'), row("w", 0, "a", VC=1.0)]
    report.write(tmp_path / "results.csv", rows)
    assert report.read(tmp_path / "results.csv") == rows[::-1]
    assert report.read(tmp_path / "none.csv") == []


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "world,seed,arm,flags,steps,seconds,mIoU\nw,one,a,,3,1,0.5\n"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match=r"results.csv:2: is no row of experiments.py"):
        report.read(tmp_path / "results.csv")


def test_report_has_every_table_and_picture(tmp_path):
    """Each arm with its means, the claim with its verdict, and the pictures that are named are there."""
    rows = []
    for seed in range(3):
        for arm, gain in (("start", 0.0), ("TVG", 0.2), ("all", 0.3)):
            rows.append(row("w", seed, arm, steps=0 if arm == "start" else 3, **dict.fromkeys(
                report.MEASURES, 0.1 + gain + 0.01 * seed), curve=f"[[0, 0.1], [3, {0.1 + gain}]]",
                confusion='{"rising": {"rising": 3, "falling": 1}, "falling": {"falling": 4}}'))
    experiments = {"figure5": Experiment("Figure 5", "Which p?", ("TVG", "all"), "TVG", ("w",)),
                   "figure6": Experiment("Figure 6", "How fast?", ("TVG", "all"), "TVG", ("w",)),
                   "figure1": Experiment("Figure 1", "Which verbs?", ("start", "all"), "start", ("w",)),
                   "table9": Experiment("Table 9", "Not run", ("x", "y"), "x", ("w",))}
    claims = [Claim("Table 2", "all is better", ("all",), ("TVG",), ("w",), ("mIoU",))]
    (tmp_path / "notes.md").write_text("## Why\n\nThree seeds, since two told nothing.\n")
    report.write_report(tmp_path, rows, experiments, claims, {"TVG": 1.0, "all": 0.8}, ["TVG", "all"])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| Table 2 | all is better | w | **holds** | all - TVG, mIoU +0.100 (+0.100 to +0.100) |" in text
    assert "6 runs of 3 seeds and 3 warm starts" in text and "Table 9" not in text
    assert "| all | 0.410 |" in text
    assert text.endswith("\n\n## Why\n\nThree seeds, since two told nothing.\n")
    drawn = "figure5_w", "figure5_w_p", "figure6_w", "figure6_w_steps", "figure1_w", "figure1_w_verbs"
    named = {name for name in drawn if f"]({name}.png)" in text}
    assert len(named) == 6
    for name in named:
        assert matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.01


def test_half_a_comparison_is_not_shown(tmp_path):
    """It says what is lacking, and draws nothing; a claim that rests on it has not been run."""
    rows = runs("a", [0.1, 0.2, 0.4]) + runs("b", [0.2, 0.3, 0.6])
    experiment = Experiment("Figure 5", "Which p?", ("a", "b", "c"), "a", ("w",))
    claim = Claim("Figure 5", "a is best", ("a",), ("b", "c"), ("w",), ("mIoU",))
    report.write_report(tmp_path, rows, {"figure5": experiment}, [claim], {"a": 1.0, "b": 0.8, "c": 0.6}, [])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Not run yet: c." in text and "| a | 0.2" not in text and "**not run**" in text
    assert [path.name for path in tmp_path.iterdir()] == ["RESULTS.md"]
