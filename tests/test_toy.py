"""The made-up world is what it says, and `python toy.py` runs through."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import read_rows

import data
import rewards
import tasks
import toy
from engine import video


@pytest.fixture
def sizes(monkeypatch):
    """(train videos, test videos, weakness) that were asked for; the worlds that are written are smaller."""
    asked, write_world = [], toy.write_world

    def write_small_world(folder, seed, *sizes):
        asked.append(sizes)
        return write_world(folder, seed, 12, 6, sizes[-1])

    monkeypatch.setattr(toy, "write_world", write_small_world)
    return asked


@pytest.mark.parametrize("verb", toy.VERBS)
def test_spacy_reads_every_sentence_as_meant(verb):
    assert toy.VERBS[toy.VERBS[verb]] == verb != toy.VERBS[verb]
    for colour in toy.COLOURS:
        for shape in toy.SHAPES:
            sentence = toy.Story("x", colour, shape, (verb,)).sentence(verb)
            assert rewards.verbs([sentence]) == [rewards.base_forms(verb)] and len(rewards.base_forms(verb)) == 1
            assert tasks.mask_verbs(sentence) == f"the {colour} {shape} is []."


def test_a_video_token_shows_what_happens():
    """The two frames that the model merges (0 and 0.5 s into a second) tell all verbs and rest apart."""
    seen = {verb: np.stack([toy.draw_frame("red", "square", verb, t) for t in (3.0, 3.5)]).astype(int)
            for verb in (*toy.VERBS, "resting")}
    for a in seen:
        assert all(abs(seen[a] - seen[b]).max() > 100 for b in seen if b != a)


def test_written_video_has_its_events(folder):
    """What is annotated is what moves: outside the annotated segments the object does not change."""
    samples, rejected = data.read(str(folder / "train.txt"), str(folder / "videos"))
    assert not rejected
    segments = {}
    for sample in samples:
        segments.setdefault(sample.video, []).append((sample.start, sample.end))
    for path in segments:
        clip = video.load(path)
        assert clip.fps == pytest.approx(2.0) and clip.frames.shape[2:] == (28, 28)
        assert clip.duration == len(clip.frames) / 2
        picture = clip.frames[:, :, :25].float()                            # without the clock
        for second in range(int(clip.duration)):
            moves = (picture[2 * second] - picture[2 * second + 1]).abs().max() > 30
            assert moves == any(start <= second < end for start, end in segments[path]), (path, second)


@pytest.mark.parametrize("weakness", toy.WEAKNESSES)
def test_demonstrations_have_the_format_and_the_teacher_s_faults(tmp_path, monkeypatch, weakness):
    monkeypatch.setattr(toy, "film", lambda story, path: None)
    late_edges, confused, confused_in = toy.WEAKNESSES[weakness]
    stories = toy.write_world(tmp_path, seed=0, train_videos=120, test_videos=120, weakness=weakness)
    assert [stories[f"train{i:04}"].verbs for i in range(120)] != [stories[f"test{i:04}"].verbs for i in range(120)]
    samples = {sample.id: sample for sample in data.read(str(tmp_path / "train.txt"), None)[0]}
    late, wrong = [], {(timed, verb): [] for timed in (True, False) for verb in (*toy.VERBS, "resting")}
    for row in read_rows(tmp_path / "demonstrations.jsonl"):
        sample, task = samples[row["id"]], tasks.TASKS[row["task"]]
        reward, = task.reward([row["completion"]], [sample])
        assert reward.parts["format"] == 1
        if row["task"] == "TVG":
            start, end = rewards.segment(row["completion"])
            late += [start - sample.start, end - sample.end]
            assert end <= toy.SECONDS
            narration = re.findall(r"(\d+) (\w+) (yes|no)", row["completion"])
            for second, verb in enumerate(stories[Path(sample.video).stem].verbs):
                assert narration[second][::2] == (str(second), "yes" if start <= second < end else "no")
                assert narration[second][1] in (verb, toy.VERBS.get(verb))
                wrong[True, verb].append(narration[second][1] != verb)
        else:
            wrong[False, re.search(r"is (\w+)\.", sample.query)[1]].append(1 - reward.parts[task.part])
    if weakness != "verbs":
        assert set(late) <= {0, 1} and np.mean(late) == pytest.approx(toy.LATE * late_edges, abs=0.1)
    del wrong[False, "resting"]
    for (timed, verb), mistakes in wrong.items():
        expected = confused.get(verb, 0) if ("TVG" in confused_in if timed else confused_in) else 0
        assert np.mean(mistakes) == pytest.approx(expected, abs=0.15)
    for row in read_rows(tmp_path / "right.jsonl"):       # what a teacher without a weakness says earns everything
        reward, = tasks.TASKS[row["task"]].reward([row["completion"]], [samples[row["id"]]])
        assert reward.total == 2


def test_the_random_model_follows_from_the_seed(folder, tmp_path):
    for seed in (3, 4):
        toy.write_model(tmp_path / str(seed), folder, seed)
    before, again, other = ((path / "model.safetensors").read_bytes() for path in (
        folder / "model", tmp_path / "3", tmp_path / "4"))
    assert before == again != other


def test_a_start_of_tvg_alone(tmp_path, monkeypatch, sizes):
    """--invert_sft false shows the warm start TVG only; --steps 0 ends behind its evaluation, in full size."""
    shown = []

    def imitate(config):
        shown.extend(row["task"] for row in read_rows(Path(config.demonstrations)))
        shutil.copytree(config.model, tmp_path / "toy" / "sft" / "model")

    monkeypatch.setattr(toy.sft, "main", imitate)
    monkeypatch.setattr(toy.train, "main", None)
    rows = toy.main(toy.Config(output=str(tmp_path / "toy"), steps=0, invert_sft=False, weakness="edges"))
    assert set(shown) == {"TVG"} and sizes == [(1000, 300, "edges")] and rows["warm start"]["queries"] > 0
    assert {row["task"] for row in read_rows(tmp_path / "toy" / "demonstrations.jsonl")} == set(tasks.TASKS)


def test_narrated_by_hand():
    verbs = "resting", "rising", "rising", "growing", "spinning", "blinking", "rising"
    story = toy.Story("a", "red", "circle", verbs)
    thought = ("<think>0 rising no 1 rising yes 2 falling no 3 resting no 4 rising no 6 rising</think> "
               "<answer>5 blinking")
    shares = toy.narrated([{"video": "x/a.mp4", "completion": thought}], {"a": story})
    assert shares == {"narrated": 2 / 6, "opposite": 1 / 6, "rest": 1 / 6, "other": 1 / 6, "missing": 1 / 6}


def test_unknown_weakness(tmp_path):
    with pytest.raises(ValueError, match="--weakness colours: choose from edges, verbs, both, none"):
        toy.main(toy.Config(output=str(tmp_path / "toy"), weakness="colours"))


def test_a_run_and_one_that_is_stopped(tmp_path, monkeypatch, capsys, sizes):
    """The table has what each model answers to the test queries. Stopped between two stages, what is finished is not
    done again, and the table is that of an unbroken run."""
    handed_on = dict(steps=2, prompts_per_step=2, learning_rate=2e-4, beta=0.01, tvg_prob=0.5)
    flags = dict(warm_steps=10, **handed_on)
    world, again = tmp_path / "whole", tmp_path / "run"
    whole = toy.main(toy.Config(output=str(world), **flags))
    printed = capsys.readouterr().out
    used = json.loads((world / "grpo" / "config.json").read_text())
    assert used.items() >= handed_on.items()
    assert used["annotations"] == f"{world}/train.txt" and used["model"] == f"{world}/sft/model"
    for name, folder, tested in (("warm start, blind", "test_blind", "sft"), ("warm start", "test_warm_start", "sft"),
                                 ("GRPO, p = 0.5", "test_grpo", "grpo")):
        used = json.loads((world / folder / "config.json").read_text())
        assert used["model"] == f"{world}/{tested}/model" and used["annotations"] == f"{world}/test.txt"
        assert used["blind"] == (folder == "test_blind")
        scores = json.loads((world / folder / "scores.json").read_text())
        narrated = toy.narrated(list(toy.read_answers(world / folder).values()), toy.write_world(world, 0, "both"))
        assert whole[name] == {**scores, **narrated} and len(read_rows(world / folder / "narrated.jsonl")) > 6
        assert re.search(rf"^{name} +{scores['mIoU']:.3f} ", printed, re.MULTILINE)
    assert whole["best fixed answer"]["same_answer"] == 1 and len(whole) == 4 and sizes[0] == (60, 20, "both")
    for picture in ("curves.png", "examples.png", "method.png"):
        assert (world / picture).stat().st_size > 10_000

    def stop(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toy.train, "main", stop)
        with pytest.raises(KeyboardInterrupt):
            toy.main(toy.Config(output=str(again), **flags))
    with pytest.raises(ValueError, match="is not empty; give --resume"):
        toy.main(toy.Config(output=str(again), **flags))
    with pytest.raises(ValueError, match="--seed.*was made with 0"):
        toy.main(toy.Config(output=str(again), seed=1, resume=True, **flags))
    monkeypatch.setattr(toy.sft, "main", None)
    assert toy.main(toy.Config(output=str(again), resume=True, **flags)) == whole
