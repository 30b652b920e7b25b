"""What a run tells: on the console, in its files, on TensorBoard."""
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import read_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import files, logs
from rewards import Reward

OTHERS = ("lr", "kl", "loss", "clipped", "mismatch", "grad_norm", "updates", "bad_steps")


def metrics(step, task="VC", **changes):
    part = {"TVG": "iou", "VC": "vc"}[task]
    return {"step": step, "task": task, "part": part, "reward": 1.125, "format": 0.875, part: 0.25,
            "tokens": 41.2, "flat": 0.5, **dict.fromkeys(OTHERS, 0.0031), **changes}


def completions():
    """Two groups of two."""
    return [{"index": i // 2, "completion": text, "tokens": 4} for i, text in enumerate("abcd")]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(logs, "say", lines.append)
    return lines


def test_completions_are_described_and_summarised():
    """Two groups of two completions, of which the second group is flat."""
    samples = [SimpleNamespace(id=name, query=f"{name} sits") for name in "ab"]
    picked = [SimpleNamespace(index=8 + i, sample=sample) for i, sample in enumerate(samples)]
    rollouts = SimpleNamespace(
        completions=torch.tensor([[[5, 9, 0], [5, 5, 5]], [[9, 0, 0], [5, 9, 0]]]),
        mask=torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]]]),
        logprobs=torch.tensor([[[-1.0, -3, 0], [-1, -1, -4]], [[-2, 0, 0], [-1, -1, 0]]]))
    earned = (0.5, 0.0, 0.25, 0.25)
    rewards = [Reward({"format": 1.0, "vd": vd}, {"verbs_said": 3}) for vd in earned]
    advantages = torch.tensor([[0.0, -1.0], [0.0, 0.0]])
    rows = logs.describe(SimpleNamespace(picked=picked), rollouts, ["w", "x", "y", "z"], rewards,
                         advantages, [9])
    assert rows[1] == {"index": 8, "id": "a", "query": "a sits", "completion": "x", "reward": 1.0,
                       "format": 1.0, "vd": 0.0, "verbs_said": 3, "advantage": -1.0, "tokens": 3,
                       "logprob": -2.0, "truncated": True}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert columns["id"] == ["a", "a", "b", "b"]
    assert columns["completion"] == ["w", "x", "y", "z"]
    assert columns["tokens"] == [2, 3, 1, 2]
    assert columns["truncated"] == [False, True, False, False]
    assert columns["logprob"] == [-2.0, -2.0, -2.0, -1.0]
    assert logs.summarise("vd", rows) == {
        "reward": 1.25, "format": 1.0, "vd": 0.25, "tokens": 2.0, "logprob": -1.75,
        "truncated": 0.25, "verbs_said": 3.0, "flat": 0.5}


def test_a_step_is_one_short_line(tmp_path, said):
    log = logs.Logs(tmp_path, 0, 0)
    log.step(metrics(12), completions(), [], 8.0)
    log.step(metrics(13, kl=None), completions(), [], 8.0)
    start = "VC   reward 1.12 = format 0.875 + vc 0.25"
    assert said == [f"step 12  {start}  kl 0.0031  tokens 41.2  seconds 8",
                    f"step 13  {start}  kl -  tokens 41.2  seconds 8"]
    assert max(map(len, said)) < 100
    first = read_rows(tmp_path / "metrics.jsonl")[0]
    assert first == metrics(12) | {"bad_videos": 0, "seconds": 8.0, "tokens_per_second": 2.0}
    samples = read_rows(tmp_path / "samples.jsonl")
    assert samples[0] == {"step": 12, "task": "VC", "index": 0, "completion": "a", "tokens": 4}
    assert [row["completion"] for row in samples] == ["a", "c"] * 2     # the first of each group
    assert not (tmp_path / "tensorboard").exists()


def test_the_first_process_writes_alone(tmp_path, said):
    log = logs.Logs(tmp_path / "run", 1, 0, tensorboard=True)
    log.step(metrics(0), completions(), ["a.mp4: torn"], 8.0)
    assert not (tmp_path / "run").exists()
    assert not said


def test_what_went_wrong_is_said_once(tmp_path, said):
    log = logs.Logs(tmp_path, 0, 0)
    torn, gone = "a.mp4: torn", "b.mp4: gone"
    log.step(metrics(0, loss=float("nan"), updates=0), completions(), [torn, torn], 1.0)
    log.step(metrics(1, loss=float("inf"), updates=2), completions(), [torn, gone], 1.0)
    assert [line for line in said if "reward" not in line] == [
        "step 0 changes nothing: loss not finite", f"replaced by another sample: {torn}",
        "step 1 stops after 2 update(s): loss not finite", f"replaced by another sample: {gone}"]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [None, None]
    assert [row["bad_videos"] for row in rows] == [2, 2]


def scalars(folder):
    """{tag: [(step, value), ...]} of a TensorBoard folder."""
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    values = {}
    for tag in board.Tags()["scalars"]:
        values[tag] = [(event.step, round(event.value, 4)) for event in board.Scalars(tag)]
    return values


def test_tensorboard_has_the_metrics_of_the_files_once(tmp_path, said):
    log = logs.Logs(tmp_path, 0, 0, tensorboard=True)
    log.step(metrics(0, "TVG", reward=0.0, kl=0.5), completions(), [], 4.0)
    log.step(metrics(1, "VC", reward=0.5, kl=None), completions(), [], 4.0)
    log.step(metrics(2, "TVG", reward=1.0, kl=0.5), completions(), [], 4.0)
    evaluation = {"step": 2, "mIoU": 0.25, "mIoU_95": [0.1, 0.3]}
    log.evaluation(evaluation)
    files.append(tmp_path / "evaluations.jsonl", [evaluation])
    board = scalars(tmp_path)
    assert board["TVG/reward"] == [(0, 0.0), (2, 1.0)]
    assert board["VC/reward"] == [(1, 0.5)]
    assert board["VC/vc"] == [(1, 0.25)]
    assert board["step/kl"] == [(0, 0.5), (2, 0.5)]
    assert board["step/seconds"] == [(0, 4.0), (1, 4.0), (2, 4.0)]
    assert board["held_out/mIoU"] == [(2, 0.25)]
    assert len(board) == 2 * 5 + len(OTHERS) + 3 + 1

    log = logs.Logs(tmp_path, 0, 2, tensorboard=True)          # a run that goes on from step 2
    log.step(metrics(2, "TVG", reward=0.75), completions(), [], 4.0)
    board = scalars(tmp_path)
    assert board["TVG/reward"] == [(0, 0.0), (2, 0.75)]
    assert board["held_out/mIoU"] == [(2, 0.25)]


def test_where_tensorboard_is_missing_one_line_tells_how_to_get_it(monkeypatch):
    logs.check_board()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard .*pip install tensorboard$"):
        logs.check_board()


@pytest.mark.parametrize("step, kept", [(0, 0), (2, 2), (3, 3), (9, 3)])
def test_a_log_loses_what_will_be_written_again(tmp_path, step, kept):
    path = tmp_path / "log"
    rows = [json.dumps({"step": i}) + "\n" for i in range(3)]
    path.write_text("".join(rows) + '{"step": 3, "los')                     # torn by a kill
    logs.rewind(path, step)
    assert path.read_text() == "".join(rows[:kept])
    path.write_bytes(rows[0].encode() + b"\0\0\xff\n" + rows[1].encode())   # after a power cut
    logs.rewind(path, step)
    assert path.read_text() == "".join(rows[:min(kept, 1)])
    logs.rewind(tmp_path / "none", step)
    assert (tmp_path / "none").read_text() == ""


def test_missing_lines_of_a_log_are_named(tmp_path, said):
    path = tmp_path / "log"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    logs.rewind(path, 2)
    logs.rewind(path, 5, gaps=True)
    assert not said
    logs.rewind(path, 5)
    assert said == [f"{path}: has no lines of steps 2 to 4, which the checkpoint is behind"]


def test_control_characters_are_shown_and_not_obeyed(capsys):
    logs.say("id \x1b[2J\x07 ok é\u202e")
    assert capsys.readouterr().out == "id \\x1b[2J\\x07 ok é\\u202e\n"


def test_a_reader_that_goes_away_ends_nothing(monkeypatch):
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))
    mine = sys.stdout, sys.stderr
    with logs.surviving_output():
        for i in range(3000):
            print("x" * 50, flush=i % 7 == 0)
            print("y" * 50, file=sys.stderr)
    assert (sys.stdout, sys.stderr) == mine
    for stream in mine:
        stream.close()          # what is still buffered raises nothing
