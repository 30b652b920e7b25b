"""Supervised fine-tuning: it learns, on one process and on two, it goes on where it was, and its demonstrations. One
run of it is computed a second time in tests/test_wiring.py."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import assert_same, finish, outcome, read_rows, sft_config, start

import data
import sft


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory) -> sft.Config:
    """The config of a run of six steps, in its output folder."""
    output = tmp_path_factory.mktemp("sft") / "run"
    config = sft_config(folder, output, micro_batch_size=2, save_every=2)
    sft.main(config)
    return config


@pytest.mark.processes
def test_sft_learns_and_two_processes_are_one(learned, tmp_path):
    two = replace(learned, output=str(tmp_path / "two"), micro_batch_size=0)
    assert finish(start("sft", two, tmp_path / "log", 2)) == [0, 0]
    rows, others = (read_rows(Path(config.output, "metrics.jsonl")) for config in (learned, two))
    for ours, theirs in zip(rows, others, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1 and len(rows) == 6


def test_a_resumed_run_is_unbroken(learned, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(learned.output, output)
    for name in ("checkpoints/step_000006", "model"):
        shutil.rmtree(output / name)
    sft.main(replace(learned, output=str(output), resume=True))
    assert_same(outcome(output), outcome(learned.output))


@pytest.fixture(scope="module")
def samples(folder):
    return data.read(str(folder / "train.txt"), str(folder / "videos"))[0]


def test_without_demonstrations_the_query_describes_the_segment(samples):
    demonstrations = sft.read_demonstrations("", samples)
    assert [each.sample for each in demonstrations] == samples
    for each in demonstrations:
        reward, = each.task.reward([each.completion], [each.sample])
        assert each.task.name == "VD" and each.sample.query in each.completion
        assert reward.total == 2.0


def test_queries_without_a_verb_are_no_demonstrations(samples, tmp_path):
    silent = replace(samples[0], query="the table over there")
    assert sft.read_demonstrations("", [silent]) == []
    path = tmp_path / "d.jsonl"
    rows = [{"id": silent.id, "task": task, "completion": "x"} for task in ("TVG", "VD")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [each.task.name for each in sft.read_demonstrations(str(path), [silent])] == ["TVG"]


@pytest.mark.parametrize("line", [
    "", "{}", "[]", "\0", "[" * 100_000, '{"id": "b:1", "task": "VD", "completion": "x"}',
    '{"id": "ID", "task": "XX", "completion": "x"}', '{"id": "ID", "task": "VD", "completion": 3}'])
def test_a_line_that_is_no_demonstration_is_named(samples, tmp_path, line):
    path = tmp_path / "d.jsonl"
    good = {"id": samples[0].id, "task": "VD", "completion": "x"}
    lines = [json.dumps(good), line.replace("ID", samples[0].id), json.dumps(good)]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="d.jsonl:2: no demonstration .*; it needs the id of a"):
        sft.read_demonstrations(str(path), samples)
