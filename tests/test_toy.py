"""The made-up world is what it says, and `python toy.py` runs through."""
import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import data
import rewards
import tasks
import toy
from engine import video


@pytest.mark.parametrize("verb", toy.VERBS)
def test_spacy_reads_every_sentence_as_meant(verb):
    for colour in toy.COLOURS:
        for shape in toy.SHAPES:
            sentence = toy.Story("x", colour, shape, (verb,)).sentence(verb)
            assert rewards.verbs([sentence]) == [rewards.word_lemmas(verb)] and len(rewards.word_lemmas(verb)) == 1
            assert tasks.mask_verbs(sentence) == f"the {colour} {shape} is []."


def test_inverse_verbs():
    assert all(toy.VERBS[toy.VERBS[verb]] == verb != toy.VERBS[verb] for verb in toy.VERBS)


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
    by_video = {}
    for sample in samples:
        by_video.setdefault(sample.video, []).append((sample.start, sample.end))
    for path, segments in by_video.items():
        clip = video.load(path)
        assert clip.fps == pytest.approx(2.0) and clip.frames.shape[2:] == (28, 28)
        assert clip.duration == len(clip.frames) / 2
        picture = clip.frames[:, :, :25].float()                            # without the clock
        for second in range(int(clip.duration)):
            moves = (picture[2 * second] - picture[2 * second + 1]).abs().max() > 30
            assert moves == any(start <= second < end for start, end in segments), (path, second)


@pytest.mark.parametrize("weakness", toy.WEAKNESSES)
def test_demonstrations_have_the_format_and_the_teacher_s_faults(tmp_path, weakness):
    late_edges, confused, where = toy.WEAKNESSES[weakness]
    stories = toy.write_world(tmp_path, seed=0, train_videos=120, test_videos=1, weakness=weakness)
    samples = {s.id: s for s in data.read(str(tmp_path / "train.txt"), str(tmp_path / "videos"))[0]}
    late, wrong = [], {(timed, verb): [] for timed in (True, False) for verb in toy.VERBS}
    for row in map(json.loads, open(tmp_path / "demonstrations.jsonl")):
        sample = samples[row["id"]]
        task = tasks.TASKS[row["task"]]
        reward, = task.reward([row["completion"]], [sample])
        assert reward.parts["format"] == 1
        if row["task"] == "TVG":
            start, end = rewards.segment(row["completion"])
            late += [start - sample.start, end - sample.end]
            told = re.findall(r"(\d+) (\w+) (yes|no)", row["completion"])
            assert [int(second) for second, _, _ in told] == list(range(toy.SECONDS))
            assert [mark == "yes" for *_, mark in told] == [start <= second < end for second in range(toy.SECONDS)]
            for (_, said, _), verb in zip(told, stories[Path(sample.video).stem].verbs):
                assert said in (verb, toy.VERBS.get(verb))
                wrong.get((True, verb), []).append(said != verb)
        else:
            wrong[False, re.search(r"is (\w+)\.", sample.query)[1]].append(1 - reward.parts[task.part])
    if weakness != "verbs":
        assert set(late) <= {0, 1} and np.mean(late) == pytest.approx(toy.LATE * late_edges, abs=0.1)
    for (timed, verb), mistakes in wrong.items():
        expected = confused.get(verb, 0) if (timed and "TVG" in where) or (not timed and where) else 0
        assert np.mean(mistakes) == pytest.approx(expected, abs=0.15)


def test_a_start_of_tvg_alone(tmp_path, monkeypatch):
    """--invert_sft false shows the warm start TVG only; --steps 0 ends behind its evaluation, in full size."""
    shown, asked = [], []
    write = toy.write_world

    def write_world(folder, seed, *sizes):
        asked.append(sizes)
        return write(folder, seed, 3, 3, sizes[-1])

    def imitate(config):
        shown.extend(json.loads(line)["task"] for line in open(config.demonstrations))
        shutil.copytree(config.model, tmp_path / "toy" / "sft" / "model")

    monkeypatch.setattr(toy, "write_world", write_world)
    monkeypatch.setattr(toy.sft, "main", imitate)
    monkeypatch.setattr(toy.train, "main", None)
    rows = toy.main(toy.Config(output=str(tmp_path / "toy"), steps=0, invert_sft=False, weakness="edges"))
    assert set(shown) == {"TVG"} and asked == [(1000, 300, "edges")] and rows["warm start"]["queries"] > 0
    demonstrations = [json.loads(line) for line in open(tmp_path / "toy" / "demonstrations.jsonl")]
    right = [json.loads(line) for line in open(tmp_path / "toy" / "right.jsonl")]
    assert {row["task"] for row in demonstrations} == set(tasks.TASKS)
    samples = {s.id: s for s in data.read(str(tmp_path / "toy" / "train.txt"), None)[0]}
    for row in right:       # what a teacher without a weakness says earns everything
        reward, = tasks.TASKS[row["task"]].reward([row["completion"]], [samples[row["id"]]])
        assert reward.total == 2


def test_narrated_by_hand():
    verbs = "resting", "rising", "rising", "growing", "spinning", "blinking", "rising"
    story = toy.Story("a", "red", "circle", verbs)
    thought = ("<think>0 rising no 1 rising yes 2 falling no 3 resting no 4 rising no 6 rising</think> "
               "<answer>5 blinking")
    told = toy.narrated([{"video": "x/a.mp4", "completion": thought}], {"a": story})
    assert told == {"narrated": 2 / 6, "opposite": 1 / 6, "rest": 1 / 6, "other": 1 / 6, "missing": 1 / 6}


def test_unknown_weakness(tmp_path):
    with pytest.raises(ValueError, match="--weakness colours: choose from edges, verbs, both, none"):
        toy.main(toy.Config(output=str(tmp_path / "toy"), weakness="colours"))


def test_a_run_and_one_that_is_stopped(tmp_path, monkeypatch):
    """Stopped between two stages: what is finished is not done again, and the table is that of an unbroken run."""
    flags = dict(steps=2, prompts_per_step=2, warm_steps=10)
    whole = toy.main(toy.Config(output=str(tmp_path / "whole"), **flags))
    assert list(whole) == ["best fixed answer", "warm start, blind", "warm start", "GRPO, p = 0.8"]
    for picture in ("curves.png", "examples.png", "method.png"):
        assert matplotlib.image.imread(tmp_path / "whole" / picture).std() > 0.05
    assert len((tmp_path / "whole" / "grpo" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "whole" / "model" / "model.safetensors").is_file()

    def stop(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toy.train, "main", stop)
        with pytest.raises(KeyboardInterrupt):
            toy.main(toy.Config(output=str(tmp_path / "run"), **flags))
    with pytest.raises(ValueError, match="is not empty; give --resume"):
        toy.main(toy.Config(output=str(tmp_path / "run"), **flags))
    with pytest.raises(ValueError, match="--seed.*was made with 0"):
        toy.main(toy.Config(output=str(tmp_path / "run"), seed=1, resume=True, **flags))
    monkeypatch.setattr(toy.sft, "main", None)
    assert toy.main(toy.Config(output=str(tmp_path / "run"), resume=True, **flags)) == whole
