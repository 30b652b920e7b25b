"""Evaluation while training: it changes nothing, its scores are evaluate.py's own, best/ and its log survive a kill."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import finish, start
from safetensors.torch import load_file
from test_train import config, rows

import data
import evaluate
import train
from engine import best

CLOCK = {"seconds", "tokens_per_second"}


def scored(folder, output, **flags):
    return config(folder, output, **{**dict(steps=4, eval_annotations=str(folder / "test.txt"), eval_every=2, seed=2,
                                            eval_samples=7, save_every=1, keep=3), **flags})


def evaluations(output):
    return [{key: value for key, value in row.items() if key != "seconds"}
            for row in rows(output / "evaluations.jsonl")]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(folder, warm, tmp_path_factory):
    """A run of 4 steps that was scored after 0, 2 and 4."""
    settings = scored(folder, tmp_path_factory.mktemp("scored") / "run")
    train.main(settings)
    return settings, Path(settings.output)


def test_training_is_the_same_to_the_bit(folder, run, tmp_path, capsys):
    settings, output = run
    train.main(scored(folder, tmp_path / "run", eval_annotations="", eval_every=0))
    assert same(weights(output / "model"), weights(tmp_path / "run" / "model"))
    logs = [[{key: value for key, value in row.items() if key not in CLOCK} for row in rows(path / "metrics.jsonl")]
            for path in (output, tmp_path / "run")]
    assert logs[0] == logs[1] and any(row["grad_norm"] > 0 for row in logs[0])
    assert (output / "samples.jsonl").read_text() == (tmp_path / "run" / "samples.jsonl").read_text()
    assert not (tmp_path / "run" / "best").exists() and not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_scores_are_those_of_evaluate(folder, run, tmp_path):
    """Before the first step of --model, after the last of model/, in best/ of the step with the highest mIoU; and of
    the same queries, whatever the seed."""
    settings, output = run
    found, samples = evaluations(output), data.read(settings.eval_annotations, settings.videos)[0]
    chosen = evaluate.read_held_out(settings)
    assert chosen == evaluate.read_held_out(replace(settings, seed=9)) and len(chosen) == 7 < len(samples)
    assert [row["step"] for row in found] == [0, 2, 4] and all(row["queries"] == 7 for row in found)
    ids = {sample.id for sample in chosen}
    (tmp_path / "chosen.txt").write_text("".join(
        line + "\n" for number, line in enumerate(Path(settings.eval_annotations).read_text().splitlines(), 1)
        if any(id.endswith(f":{number}") for id in ids)))
    for row, model in ((found[0], settings.model), (found[-1], output / "model"), (None, output / "best")):
        scores = evaluate.main(evaluate.Config(
            str(tmp_path / "chosen.txt"), str(model), settings.videos, str(tmp_path / Path(model).parent.name /
                                                                           Path(model).name), max_tokens=64,
            cache=settings.cache))
        highest = max(found, key=lambda row: row["mIoU"])
        assert {key: value for key, value in (row or highest).items() if key != "step"} == {
            key: value for key, value in scores.items() if not key.startswith("rejected")}
    kept, = rows(output / "best" / "evaluation.jsonl")
    assert kept["step"] == highest["step"]


def one_batch(rank):
    """Of all that is to be answered, the first batch only: the second process has nothing to do."""
    plan = evaluate.plan_batches
    evaluate.plan_batches = lambda *args: (plan(*args)[0][:1], [("TVG", each.id) for each in plan(*args)[0][0].samples])


@pytest.mark.processes
@pytest.mark.parametrize("change", [None, one_batch])
def test_two_processes_are_one(folder, run, tmp_path, change):
    """Exactly so before the first step."""
    settings = scored(folder, tmp_path / "two", steps=1)
    assert finish(start("train", settings, tmp_path / "log", 2, change)) == [0, 0], \
        (tmp_path / "log.0").read_text()[-2000:]
    (found, last), expected = evaluations(tmp_path / "two"), evaluations(run[1])[0]
    assert (found["step"], last["step"]) == (0, 1) and last["queries"] == 7
    assert {key: found[key] for key in expected if not change or key.startswith(("mIoU", "R1"))} == {
        key: expected[key] for key in expected if not change or key.startswith(("mIoU", "R1"))}
    assert (tmp_path / "two" / "best" / "evaluation.jsonl").exists()


def test_resume_neither_loses_nor_repeats(run, tmp_path):
    """Killed after the evaluation of step 4 with a checkpoint of step 2 or 3: the lines are those of the unbroken
    run, best/ stays, and a finished run has nothing to add."""
    settings, output = run
    whole, kept = evaluations(output), weights(output / "best")
    for step in (3, 2):
        shutil.copytree(output, tmp_path / f"{step}")
        for later in range(step + 1, 5):
            shutil.rmtree(tmp_path / f"{step}" / "checkpoints" / f"step_{later:06d}")
        train.main(replace(settings, output=str(tmp_path / f"{step}"), resume=True))
        assert evaluations(tmp_path / f"{step}") == whole and same(weights(tmp_path / f"{step}" / "best"), kept)
    train.main(replace(settings, output=str(tmp_path / "3"), resume=True))
    assert evaluations(tmp_path / "3") == whole
    with pytest.raises(ValueError, match="--eval_samples 3: .* was made with 7; give the same flag"):
        train.main(replace(settings, output=str(tmp_path / "3"), resume=True, eval_samples=3))


def save_as(text):
    def save(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "model").write_text(text)
    return save


def test_best_by_hand(tmp_path):
    """The earliest of the highest mIoU, also when better ones of a branch that was left are taken out of the log."""
    kept = best.Evaluations(tmp_path, 0, every=2, steps=5)
    assert [step for step in range(7) if kept.due(step)] == [0, 2, 4, 5, 6]
    for step, score in ((0, 0.5), (2, 0.7), (4, 0.7), (5, 0.6)):
        kept.add({"step": step, "mIoU": score}, save_as(f"{step}"))
        assert not kept.due(step)
    assert (tmp_path / "best" / "model").read_text() == "2" and len(rows(tmp_path / "evaluations.jsonl")) == 4
    again = best.Evaluations(tmp_path, 1, every=0, steps=5)
    assert [row["step"] for row in rows(tmp_path / "evaluations.jsonl")] == [0] and again.best == 0.7
    assert not again.due(0) and not again.due(2) and again.due(5)
    again.add({"step": 5, "mIoU": 0.65}, save_as("worse"))
    assert (tmp_path / "best" / "model").read_text() == "2"


@pytest.mark.parametrize("left", ["best.new", "best.old"])
def test_a_kill_between_two_names_loses_nothing(tmp_path, left):
    best.Evaluations(tmp_path, 0, 1, 1).add({"step": 0, "mIoU": 0.5}, save_as("kept"))
    (tmp_path / "best").rename(tmp_path / left)
    (tmp_path / "best.new").mkdir(exist_ok=True)        # without its line: half of it
    assert best.Evaluations(tmp_path, 0, 1, 1).best == 0.5
    assert (tmp_path / "best" / "model").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "evaluations.jsonl"]


@pytest.mark.parametrize("flags, words", [
    ({"eval_annotations": "absent.txt"}, "absent.txt.*--eval_annotations"), ({"eval_samples": 0}, "--eval_samples 0"),
    ({"eval_annotations": ""}, "--eval_every 2"), ({"eval_videos": "absent"}, "absent.*--eval_videos")])
def test_wrong_flags_are_named(folder, warm, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        train.main(scored(folder, tmp_path / "run", **flags))


def test_the_line_on_the_console(tmp_path, capsys):
    row = {"step": 3, "mIoU": 0.512, "R1@0.5": 0.25, "R1>0.5": 0.2, "mIoU_95": [0.1, 0.2], "note": "few", "VC": 1.0}
    best.Evaluations(tmp_path, 0, 1, 1).add(row, save_as(""))
    assert "after 3 steps, held out: mIoU 0.512  R1@0.5 0.25  VC 1, the best so far" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == row
