"""Scores by hand, and a tiny model evaluated on real files, broken ones among them."""
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import finish, flags, read_rows, start, train_config
from safetensors.torch import load_file, save_file

import data
import evaluate
import grpo
import tasks
from data import Sample
from engine.flags import command_line
from engine.loader import Loader

# Scores by hand

def answered(number, start, end, truth, video="a", **more):
    """A prediction of TVG."""
    row = {"task": "TVG", "id": f"{video}:{number}", "video": video, "query": f"q{number}", "format": 1.0,
           "start": start, "end": end, "truth": truth}
    return row | {"iou": evaluate.iou(row, truth)} | more


def test_scores_by_hand():
    grounded = [answered(1, 0, 5, (0, 10)), answered(2, 0, 6.9, (0, 10)), answered(3, 0, 10, (0, 10), "b"),
                answered(4, None, None, (0, 10), format=0.0), answered(5, None, None, (0, 10), error="a: broken")]
    others = [{"task": "VC", "vc": 1.0}, {"task": "VC", "vc": 0.0}, {"task": "AR", "ar": 1.0},
              {"task": "VD", "vd": 0.0, "error": "a: broken"}]
    scores = evaluate.summarise(grounded + [row | {"format": 1.0} for row in others])
    assert scores["queries"] == 5 and scores["mIoU"] == pytest.approx((0.5 + 0.69 + 1.0) / 5)
    assert [scores[f"R1@{m}"] for m in (0.3, 0.5, 0.7)] == [0.6, 0.6, 0.2]      # at the threshold counts
    assert [scores[f"R1>{m}"] for m in (0.3, 0.5, 0.7)] == [0.6, 0.4, 0.2]
    assert [scores[name] for name in ("VC", "AR", "VD")] == [0.5, 1.0, 0.0]
    assert scores["unparsable"] == 1 and scores["unreadable"] == 2 and scores["format"] == pytest.approx(8 / 9)


def test_best_windows_by_hand():
    """Query 7 has two windows and is answered once, for the first; query 8 has one."""
    grounded = [answered(0, 20, 30, (0, 10)), answered(1, 0, 1, (20, 30)), answered(0, 0, 6, (0, 10), "b")]
    qids = {"a:0": "7", "a:1": "7", "b:0": "8"}
    scores = evaluate.summarise(grounded, qids=qids)
    assert scores["queries"] == 3 and scores["mIoU"] == pytest.approx(0.6 / 3)
    assert scores["best_window_queries"] == 2 and scores["best_window_mIoU"] == pytest.approx((1.0 + 0.6) / 2)
    assert scores["best_window_R1@0.7"] == 0.5 and scores["best_window_mIoU_95"] == pytest.approx([0.6, 1.0])
    # unusable windows are samples; they are no query's best window, but may be all that a query has
    unusable = [Sample(f"{qid}:9", "c", "q", 5.0, 5.0, None, qid=qid) for qid in ("7", "9")]
    scores = evaluate.summarise(grounded, unusable, qids)
    assert scores["queries"] == 5 and scores["mIoU"] == pytest.approx(0.6 / 5)
    assert scores["best_window_queries"] == 3 and scores["best_window_mIoU"] == pytest.approx(1.6 / 3)
    for one_window_each in ({"a:0": "7", "a:1": "6", "b:0": "8"}, {}):
        scores = evaluate.summarise(grounded, unusable, one_window_each)
        assert not any(name.startswith("best_window") for name in scores)


def test_swapped_queries_are_of_disjoint_events():
    """Of the same video, and of the same part of it. The truth stays that of the first event."""
    events = [("he sits.", 0, 4), ("he eats.", 5, 9), ("he runs.", 3, 6), ("he eats.", 5, 9)]
    samples = [Sample(f"A:{i}", "A", query, start, end, None) for i, (query, start, end) in enumerate(events, 1)]
    alone = [Sample("B:1", "B", "he naps.", 0, 4, None),
             Sample("B:2", "B", "he wakes.", 5, 9, None, video_start=10.0, video_end=20.0)]
    swapped = evaluate.swap_queries(samples + alone)
    assert [(each.id, each.query, each.start) for each in swapped] == [
        ("A:1", "he eats.", 0), ("A:2", "he sits.", 5), ("A:4", "he sits.", 5)]
    with pytest.raises(ValueError, match="--swap_queries"):
        evaluate.swap_queries(alone)


# A tiny model on real files

class Stop(Exception):
    pass


@pytest.fixture
def config(folder, warm, tmp_path):
    """config(name, **flags): an evaluation of the warm model, into the folder `name`."""
    def make(name, **changes):
        common = dict(model=str(warm), annotations=str(folder / "test.txt"), videos=str(folder / "videos"),
                      cache=str(folder / "cache"), max_tokens=12)
        return evaluate.Config(output=str(tmp_path / name), **(common | changes))
    return make


def predictions(settings):
    return read_rows(Path(settings.output) / "predictions.jsonl")


def completions(settings):
    evaluate.main(settings)
    return [row["completion"] for row in predictions(settings)]


def test_each_prediction_is_its_query_s(config):
    """In the order of the annotations, and rewarded as in training, but never by similarity."""
    settings = config("out", batch_size=5, max_tokens=64)
    scores = evaluate.main(settings)
    samples, _ = data.read(settings.annotations, settings.videos)
    asked = [(name, sample) for name in tasks.TASKS for sample in samples]
    for row, (name, sample) in zip(predictions(settings), asked, strict=True):
        reward, = tasks.TASKS[name].reward([row["completion"]], [sample])
        expected = {"task": name, "id": sample.id, "query": sample.query, **reward.parts}
        if name == "TVG":
            expected["truth"] = [sample.start, sample.end]
            assert row["iou"] == evaluate.iou(row, row["truth"])
        assert expected.items() <= row.items()
    assert 0 < scores["VC"] < 1 and json.loads((Path(settings.output) / "scores.json").read_text()) == scores


def test_answers_depend_on_flags_and_not_on_batches(config, folder):
    """Of a random model, which babbles about all that it sees."""
    def answers(name, **changes):
        return completions(config(name, model=str(folder / "model"), tasks=["TVG"], max_tokens=6,
                                  **changes))

    plain = answers("plain", batch_size=5)
    assert answers("one", batch_size=1) == plain != answers("blind", blind=True)
    sampled = answers("sampled", temperature=1.0)
    assert answers("again", temperature=1.0, batch_size=3) == sampled != answers("other", temperature=1.0, seed=1)


def test_videos_are_read_as_flags_say(config, monkeypatch):
    def loader(*args):
        raise Stop(*args)

    monkeypatch.setattr(evaluate, "Loader", loader)
    settings = config("out", total_pixels=10 ** 6, video_timeout=9.0, cache_gb=7.0, workers=3)
    with pytest.raises(Stop) as stop:
        evaluate.main(settings)
    assert stop.value.args == (10 ** 6, 9.0, settings.cache, 7.0, 3)


def test_batches_are_sorted_and_a_video_is_read_once(config, monkeypatch):
    """Longest videos, or segments, first; all queries of a video together."""
    settings = config("out", tasks=["TVG"], batch_size=100)
    samples, _ = data.read(settings.annotations, settings.videos)

    def in_order(name):
        return [sample for _, sample in evaluate.by_length(list(enumerate(samples)), tasks.TASKS[name])]

    length = {}
    for sample in samples:
        length[sample.video] = max(sample.end, length.get(sample.video, 0))
    lengths = [length[sample.video] for sample in in_order("TVG")]
    assert lengths == sorted(lengths, reverse=True)
    segments = [sample.end - sample.start for sample in in_order("AR")]
    assert segments == sorted(segments, reverse=True)
    read, load = [], Loader.__call__
    monkeypatch.setattr(Loader, "__call__", lambda self, *video: read.append(video[0]) or load(self, *video))
    evaluate.main(settings)
    assert sorted(read) == sorted(length) and len(samples) > len(length)


def test_broken_and_missing_videos_stay_in_the_denominator(config, folder, tmp_path):
    (tmp_path / "videos").mkdir()
    empty, absent, whole, *_ = sorted((folder / "videos").glob("test*"))
    (tmp_path / "videos" / empty.name).write_bytes(b"")
    (tmp_path / "videos" / whole.name).symlink_to(whole)
    names = empty.stem, absent.stem, whole.stem
    lines = [line for line in (folder / "test.txt").read_text().splitlines() if line.startswith(names)]
    lost = 2 * sum(line.startswith(names[:2]) for line in lines)
    (tmp_path / "test.txt").write_text("\n".join(lines))
    settings = config("out", tasks=["TVG", "AR"], batch_size=3, videos=str(tmp_path / "videos"),
                      annotations=str(tmp_path / "test.txt"))
    scores = evaluate.main(settings)
    assert scores["queries"] == len(lines) and scores["unreadable"] == lost < 2 * len(lines)
    errors = [row for row in predictions(settings) if "error" in row]
    assert len(errors) == lost and all(row["video"] in row["error"] and row["format"] == 0 for row in errors)


def test_a_model_is_not_asked_unusable_queries_but_scored(config, folder, tmp_path):
    lines = (folder / "test.txt").read_text().splitlines()
    video = lines[0].split()[0]
    (tmp_path / "test.txt").write_text("\n".join([*lines[:3], f"{video} 2 2##the square spins", "junk"]))
    settings = config("out", tasks=["TVG", "AR"], annotations=str(tmp_path / "test.txt"))
    scores = evaluate.main(settings)
    assert scores["queries"] == 4 and scores["rejected"] == 2 and scores["rejected_as_0"] == 1
    rows = predictions(settings)
    assert len(rows) == 6 and scores["unreadable"] == 0
    assert scores["mIoU"] == pytest.approx(sum(row["iou"] for row in rows if row["task"] == "TVG") / 4)
    some = evaluate.main(replace(settings, output=str(tmp_path / "some"), tasks=["TVG"], steps=1, batch_size=2))
    assert some["queries"] == 2 and some["rejected_as_0"] == 0


def test_another_event_is_asked_for(config):
    settings = config("out", swap_queries=True, tasks=["TVG"])
    evaluate.main(settings)
    swapped = evaluate.swap_queries(data.read(settings.annotations, settings.videos)[0])
    assert [row["query"] for row in predictions(settings)] == [sample.query for sample in swapped]


@pytest.mark.parametrize("changes, words", [
    (dict(tasks=["XX"]), "--tasks XX"), (dict(tasks=[]), "--tasks"), (dict(tasks=["AR", "AR"]), "--tasks AR AR"),
    (dict(swap_queries=True), "--swap_queries.*--tasks TVG")])
def test_wrong_flags_are_named(config, changes, words):
    settings = config("out", **changes)
    with pytest.raises(ValueError, match=words):
        evaluate.main(settings)
    assert not Path(settings.output).exists()


def test_command_line_prints_the_scores(config, monkeypatch, capsys):
    settings = config("out", tasks=["AR"], steps=1, batch_size=1)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags(settings)])
    command_line(evaluate.Config, evaluate.evaluate_and_print, evaluate.__doc__)
    scores = json.loads((Path(settings.output) / "scores.json").read_text())
    assert json.loads(capsys.readouterr().out) == scores


# Going on

@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n): evaluate.answer_batch answers n batches, then the run ends; returns the list of their sizes."""
    answer_batch = evaluate.answer_batch

    def limit(batches):
        sizes = []

        def answer(config, policy, encoder, batch, prompts):
            if len(sizes) == batches:
                raise Stop
            sizes.append(len(batch.samples))
            return answer_batch(config, policy, encoder, batch, prompts)

        monkeypatch.setattr(evaluate, "answer_batch", answer)
        return sizes
    return limit


def write_rows(path, rows, torn=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


@pytest.mark.processes
def test_two_processes_are_one_and_a_killed_run_goes_on(config, tmp_path, stop_after):
    common = dict(tasks=["TVG", "AR"], batch_size=2, temperature=1.0)
    settings = config("two", **common)
    whole = evaluate.main(config("one", **common))
    rows = predictions(config("one", **common))
    place = {(row["task"], row["id"]): i for i, row in enumerate(rows)}
    batches, _ = evaluate.make_batches(settings, data.read(settings.annotations, settings.videos)[0])
    first, second, third, *others = [[rows[place[name]] for name in batch.names()] for batch in batches]

    # killed in its third batch, of which it left a torn line; another process had answered the second batch
    output = tmp_path / "two"
    stop_after(1)
    with pytest.raises(Stop):
        evaluate.main(settings)
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "inputs.json", "predictions.rank0.jsonl"]
    lines = (output / "predictions.rank0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines if line] == first
    mark = {"kept": 1}
    write_rows(output / "predictions.rank0.jsonl", [row | mark for row in first], json.dumps(third[0])[:40])
    write_rows(output / "predictions.rank5.jsonl", [row | mark for row in second])
    assert finish(start("evaluate", settings, tmp_path / "log", processes=2)) == [0, 0]
    resumed = predictions(settings)
    assert [row for row in resumed if row.pop("kept", None)] == [row for row in rows if row in first + second]
    assert resumed == rows and json.loads((output / "scores.json").read_text()) == whole
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "inputs.json", "predictions.jsonl",
                                                              "scores.json"]

    # of a run that left half a batch, this batch is asked again
    (output / "predictions.jsonl").unlink()
    write_rows(output / "predictions.rank0.jsonl", first + second)
    write_rows(output / "predictions.rank1.jsonl", sum(others, third[:1]))
    sizes = stop_after(9)
    assert evaluate.main(settings) == whole and sizes == [2]
    assert predictions(settings) == rows


def test_another_config_is_refused_and_another_model_starts_anew(config, warm, tmp_path, stop_after):
    shutil.copytree(warm, tmp_path / "model")
    settings = config("out", tasks=["TVG"], model=str(tmp_path / "model"))
    before = completions(settings)
    for name, value in dict(max_tokens=3, blind=True, think=False, temperature=1.0, seed=1, batch_size=2,
                            total_pixels=10 ** 6, tasks=["AR"], swap_queries=True, steps=1).items():
        with pytest.raises(ValueError, match=f"holds a run with --{name} "):
            evaluate.main(replace(settings, **{name: value}))
    sizes = stop_after(99)
    assert completions(replace(settings, workers=1, cache="")) == before and not sizes
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, tmp_path / "model" / "model.safetensors",
              {"format": "pt"})
    assert completions(settings) != before and sum(sizes) == len(before)


# While a model is trained; tests/test_train.py has the scores

def test_a_process_without_batches_takes_part(folder, tiny, tmp_path, monkeypatch):
    """Gathering the weights needs every process, so each samples once, before its batches."""
    sampled = []
    monkeypatch.setattr(evaluate, "make_batches", lambda *_: ([], []))
    monkeypatch.setattr(grpo, "sample", lambda policy, prompts, **_: sampled.append(len(prompts)))
    settings = train_config(folder, tmp_path, eval_annotations=str(folder / "test.txt"), eval_samples=7, think=False)
    held_out = evaluate.HeldOut(settings, tmp_path, 0)
    assert len(held_out.samples) == 7 and held_out.config.think is False
    assert held_out.predict(*tiny, loader=None) == [] and sampled == [1]
