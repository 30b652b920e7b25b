"""Scores by hand, and the evaluation of a tiny model on real files, broken ones among them."""
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import finish, start
from safetensors.torch import load_file, save_file

import data
import evaluate
import model
import tasks
from engine.loader import Loader
from engine.scores import difference, swap_queries


def row(task, **parts):
    return {"task": task, "format": 1.0, "start": 0.0, **parts}


def test_scores_by_hand():
    rows = [row("TVG", iou=0.5), row("TVG", iou=0.69), row("TVG", iou=1.0), row("TVG", iou=0.0, start=None, format=0.0),
            row("VC", vc=1.0), row("VC", vc=0.0), row("AR", ar=1.0), row("VD", vd=0.0, error="x: broken")]
    scores = evaluate.summarise(rows)
    assert scores["mIoU"] == pytest.approx((0.5 + 0.69 + 1.0) / 4) and scores["queries"] == 4
    assert [scores[f"R1@{m}"] for m in (0.3, 0.5, 0.7)] == [0.75, 0.75, 0.25]        # at the threshold counts
    assert [scores[name] for name in ("VC", "AR", "VD")] == [0.5, 1.0, 0.0]
    assert scores["unparsable"] == 1 and scores["unreadable"] == 1 and scores["format"] == pytest.approx(7 / 8)


def test_gain_and_its_interval():
    rows = lambda ious: [{"id": str(i), "video": str(i // 2), "iou": iou} for i, iou in enumerate(ious)]
    assert difference(rows([0.1] * 40), rows([0.3] * 40)) == pytest.approx((0.2, 0.2, 0.2))
    mean, low, high = difference(rows([0.5] * 400), rows([0.4, 0.4, 0.8, 0.8] * 100))
    assert mean == pytest.approx(0.1) and 0.06 < low < 0.09 and 0.11 < high < 0.14      # 0.2 / sqrt(200) * 1.96


def config(folder, output, **flags):
    return evaluate.Config(model=str(folder / "model"), annotations=str(folder / "test.txt"),
                           videos=str(folder / "videos"), output=str(output), max_tokens=10,
                           cache=str(folder / "cache"), **flags)


def predictions(folder):
    return {(r["id"], r["task"]): r for r in map(json.loads, open(folder / "predictions.jsonl"))}


def test_broken_and_missing_videos_stay_in_the_denominator(folder, tmp_path):
    files = tmp_path / "videos"
    files.mkdir()
    names = sorted(p for p in (folder / "videos").iterdir() if p.name.startswith("test"))
    for path in names[2:]:
        (files / path.name).symlink_to(path)
    (files / names[0].name).write_bytes(b"")                                # one is empty, one is missing
    lines = (folder / "test.txt").read_text().splitlines()
    lost = sum(line.split()[0] in (names[0].stem, names[1].stem) for line in lines)
    settings = config(folder, tmp_path / "out", tasks=["TVG", "AR"], batch_size=3)
    settings.videos = str(files)
    scores = evaluate.main(settings)
    assert scores["queries"] == len(lines) and scores["unreadable"] == 2 * lost > 0
    errors = [r for r in predictions(tmp_path / "out").values() if "error" in r]
    assert len(errors) == 2 * lost and all(r["video"] in r["error"] and r["format"] == 0 for r in errors)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores


def test_batches_do_not_change_answers_and_blind_does(folder, tmp_path):
    for name, flags in (("one", dict(batch_size=1)), ("many", dict(batch_size=5)), ("blind", dict(blind=True))):
        evaluate.main(config(folder, tmp_path / name, tasks=["TVG", "VC"], **flags))
    one, many, blind = ({k: r["completion"] for k, r in predictions(tmp_path / n).items()}
                        for n in ("one", "many", "blind"))
    assert one == many and one.keys() == blind.keys() and one != blind


def test_batches_are_sorted_and_a_video_is_decoded_once(folder, tmp_path, monkeypatch):
    """Longest videos first, all queries of a video together: one call of the loader, one pass of the tower each."""
    samples = data.read(str(folder / "test.txt"), str(folder / "videos"))[0]
    order = [s for _, s in evaluate.by_length(list(enumerate(samples)), tasks.TASKS["TVG"])]
    last = {video: max(s.end for s in samples if s.video == video) for video in {s.video for s in samples}}
    assert [last[s.video] for s in order] == sorted((last[s.video] for s in samples), reverse=True)
    spans = [s.end - s.start for _, s in evaluate.by_length(list(enumerate(samples)), tasks.TASKS["AR"])]
    assert spans == sorted(spans, reverse=True)

    loaded, seen, load, watch = [], [], Loader.__call__, model.Policy.watch
    monkeypatch.setattr(Loader, "__call__", lambda self, *part: loaded.append(part[0]) or load(self, *part))
    monkeypatch.setattr(model.Policy, "watch", lambda self, patches, grid: seen.append(len(grid)) or
                        watch(self, patches, grid))
    evaluate.main(config(folder, tmp_path / "out", tasks=["TVG"], batch_size=len(samples)))
    assert sorted(loaded) == sorted(last) and len(samples) > len(last)
    assert sum(seen) == len(last)


def test_unknown_task_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="--tasks XX"):
        evaluate.main(config(folder, tmp_path / "out", tasks=["XX"]))
    assert not Path(tmp_path / "out").exists()


class Stop(Exception):
    pass


def stop_after(monkeypatch, batches):
    """evaluate.answer_batch answers so many batches, then the run ends; returns how many samples each of them had."""
    answer, asked = evaluate.answer_batch, []

    def limited(config, policy, encoder, batch, prompts):
        if len(asked) == batches:
            raise Stop
        asked.append(len(batch.samples))
        return answer(config, policy, encoder, batch, prompts)

    monkeypatch.setattr(evaluate, "answer_batch", limited)
    return asked


@pytest.mark.processes
def test_two_processes_are_one_and_a_killed_run_goes_on(folder, warm, tmp_path, monkeypatch):
    flags = dict(tasks=["TVG", "AR"], batch_size=2, temperature=1.0)
    settings = lambda name: replace(config(folder, tmp_path / name, **flags), model=str(warm))
    whole = evaluate.main(settings("one"))
    text = (tmp_path / "one" / "predictions.jsonl").read_text()
    samples = data.read(str(folder / "test.txt"), str(folder / "videos"))[0]
    order = [s.id for s in samples]
    rows = [json.loads(line) for line in text.splitlines()]
    at = {(row["task"], row["id"]): i for i, row in enumerate(rows)}
    worked = [at[name, s.id] for name in ("TVG", "AR")
              for _, s in evaluate.by_length(list(enumerate(samples)), tasks.TASKS[name])]
    assert [row["id"] for row in rows] == order * 2 and len({row["completion"] for row in rows}) > 1
    batches = 2 * -(-len(order) // 2)

    # killed in its third batch, with a torn last line; another process had answered the second batch
    killed = tmp_path / "two"
    asked = stop_after(monkeypatch, 1)
    with pytest.raises(Stop):
        evaluate.main(settings("two"))
    monkeypatch.undo()
    assert asked == [2] and not (killed / "predictions.jsonl").exists() and not (killed / "scores.json").exists()
    part = killed / "predictions.rank0.jsonl"
    done = [json.loads(line) for line in part.read_text().splitlines() if line]
    part.write_text("".join(json.dumps({**row, "kept": 1}) + "\n" for row in done) + json.dumps(rows[worked[4]])[:40])
    (killed / "predictions.rank5.jsonl").write_text("".join(json.dumps({**rows[i], "kept": 1}) + "\n"
                                                            for i in worked[2:4]))

    assert finish(start("evaluate", settings("two"), tmp_path / "log", processes=2)) == [0, 0]
    resumed = [json.loads(line) for line in (killed / "predictions.jsonl").read_text().splitlines()]
    assert [i for i, row in enumerate(resumed) if row.pop("kept", None)] == sorted(worked[:4]) and resumed == rows
    assert json.loads((killed / "scores.json").read_text()) == whole
    assert sorted(p.name for p in killed.iterdir()) == ["config.json", "inputs.json", "predictions.jsonl",
                                                        "scores.json"]

    # finished: neither model nor videos are touched; half finished by two: one goes on
    asked = stop_after(monkeypatch, 0)
    assert evaluate.main(settings("two")) == whole and not asked
    monkeypatch.undo()
    (killed / "predictions.jsonl").unlink()
    lines = text.splitlines(keepends=True)
    (killed / "predictions.rank0.jsonl").write_text("".join(lines[i] for i in worked[:4]))
    half = worked[6:] + worked[4:5]                             # of the third batch one
    (killed / "predictions.rank1.jsonl").write_text("".join(lines[i] for i in half))
    asked = stop_after(monkeypatch, batches)
    assert evaluate.main(settings("two")) == whole and asked == [2]
    assert (killed / "predictions.jsonl").read_text() == text


def test_another_config_is_refused_and_another_model_starts_anew(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "model", tmp_path / "model")
    settings = replace(config(folder, tmp_path / "out", tasks=["TVG"]), model=str(tmp_path / "model"))
    first = evaluate.main(settings)
    text = (tmp_path / "out" / "predictions.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run with --max_tokens 10; "):
        evaluate.main(replace(settings, max_tokens=3))
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == text
    asked = stop_after(monkeypatch, 99)
    assert evaluate.main(settings) == first and not asked
    weights = tmp_path / "model" / "model.safetensors"
    tensors = {name: -value for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    evaluate.main(settings)
    assert sum(asked) == first["queries"] and (tmp_path / "out" / "predictions.jsonl").read_text() != text


LINES = ("A 0.0 10.0##person sits.\nA 10.0 20.0##person eats.\n"
         "B.x_1.0 0.0 10.0##Person  runs.\nC 0.0 4.0##person naps.\n"
         "D 0.0 4.0##person eats.\nE 0.0 4.0##person eats.\n")


def score(tmp_path, *rows, annotations=LINES):
    (tmp_path / "a.txt").write_text(annotations)
    (tmp_path / "p.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                                              for row in rows))
    return evaluate.main(evaluate.Config(annotations=str(tmp_path / "a.txt"), predictions=str(tmp_path / "p.jsonl")))


def test_anybody_s_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("a model was loaded"))
    scores = score(
        tmp_path,
        {"id": "A:1", "start": 0, "end": 1}, {"id": "A:1", "start": 0.0, "end": "7"},      # the last: IoU 0.7
        {"id": "17", "video": "videos/A.mp4", "query": "person  EATS. ",
         "completion": "<think>10 to 12</think> from 10 to 15"},
        "", {"video": "B.x_1.0", "query": "person runs.", "start": 0, "end": 3, "task": "TVG"},     # IoU 0.3
        {"id": "C:4", "completion": "I do not know"}, {"id": "D:5", "error": "out of memory", "start": 0, "end": 4},
        {"id": "A:2", "query": "person sits.", "start": 0, "end": 9},                      # the id of another file
        {"id": "A", "start": 0, "end": 9}, {"video": "Z", "query": "person sits.", "start": 0, "end": 9},
        {"id": "A:1", "task": "VC", "completion": "x"})
    assert scores["queries"] == 6 and scores["mIoU"] == pytest.approx((0.7 + 0.5 + 0.3) / 6)
    assert [scores[f"R1@{m}"] for m in (0.3, 0.5, 0.7)] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert [scores[f"R1>{m}"] for m in (0.3, 0.5, 0.7)] == pytest.approx([2 / 6, 1 / 6, 0])
    wrong = ("unparsable", "missing", "failed", "unmatched", "duplicates", "rejected")
    assert [scores[name] for name in wrong] == [1, 1, 1, 3, 1, 0]
    assert not any("best_window" in key for key in scores)
    assert scores["mIoU_95"][0] < scores["mIoU"] < scores["mIoU_95"][1] and scores["R1@0.7_95"][0] == 0


def test_interval_by_hand(tmp_path):
    """Two videos, all queries of one right, of the other wrong: of the draws a quarter is all wrong, one all right.
    One video says nothing of others."""
    assert "mIoU_95" not in score(tmp_path, {"id": "A:1", "start": 0, "end": 4},
                                  annotations="A 0.0 4.0##x\nA 1.0 4.0##y\n")
    lines = "".join(f"{'AB'[i // 20]} 0.0 4.0##query {i}\n" for i in range(40))
    rows = [{"id": f"{'AB'[i // 20]}:{i + 1}", "start": 0, "end": 4 if i < 20 else 0} for i in range(40)]
    assert score(tmp_path, *rows, annotations=lines)["mIoU_95"] == [0, 1]
    each = "".join(f"{i} 0.0 4.0##query\n" for i in range(400))                            # of its own video: binomial
    scores = score(tmp_path, *({"video": str(i), "query": "query", "start": 0, "end": 4 * (i % 2)} for i in range(400)),
                   annotations=each)
    assert scores["R1@0.5_95"] == pytest.approx([0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025], abs=0.005)


@pytest.mark.parametrize("key", ["qid", "id", "video", "windows"])
def test_best_window(tmp_path, key):
    """QVHighlights: query 7 has windows 0-10 and 20-30, query 8 one of 0-10."""
    annotations = "\n".join(json.dumps({"qid": qid, "query": f"query {qid}", "vid": f"v_{qid}.0_210.0", "duration": 150,
                                        "relevant_windows": windows})
                            for qid, windows in ((7, [[0, 10], [20, 30]]), (8, [[0, 10]])))
    names = {"qid": lambda qid: {"qid": qid}, "id": lambda qid: {"id": str(qid)},
             "video": lambda qid: {"video": f"v_{qid}.0_210.0", "query": f"query {qid}"}}
    if key == "windows":
        rows = [{"id": "7:0", "start": 20, "end": 30}, {"id": "7:1", "start": 0, "end": 1},
                {"id": "8:0", "start": 0, "end": 6}]
    else:
        rows = [{**names[key](7), "start": 20, "end": 30}, {**names[key](8), "start": 0, "end": 6}]
    scores = score(tmp_path, *rows, annotations=annotations)
    assert scores["queries"] == 3 and scores["missing"] == scores["unmatched"] == scores["duplicates"] == 0
    assert scores["mIoU"] == pytest.approx((0 + (1.0 if key != "windows" else 0.0) + 0.6) / 3)
    assert scores["best_window_queries"] == 2 and scores["best_window_mIoU"] == pytest.approx((1.0 + 0.6) / 2)
    assert scores["best_window_R1@0.7"] == 0.5 and scores["best_window_mIoU_95"] == pytest.approx([0.6, 1.0])


def test_two_samples_of_one_query_are_no_windows(tmp_path):
    lines = "A 0 10##he sits.\nA 20 30##he sits.\n"
    scores = score(tmp_path, {"video": "A", "query": "he sits.", "start": 20, "end": 30}, annotations=lines)
    assert scores["mIoU"] == 0.5 and scores["queries"] == 2 and not any("best_window" in key for key in scores)


BENCH = [{"path": f"{name}.mp4", "question": f"what {name} does", "answer": answer, "start": None, "end": None,
          "duration": 30.0} for name, answer in (("A", "0.0-10.0"), ("B", "5.0-5.0"), ("C", "1.0-400.0"))]


def test_unusable_queries_stay_in_the_denominator(tmp_path):
    """As those of no length in TVGBench; whoever predicts them is not told that they are unknown."""
    rows = [{"video": name, "query": f"what {name} does", "start": 0, "end": 400} for name in "ABC"]
    scores = score(tmp_path, {**rows[0], "end": 10}, *rows[1:], annotations=json.dumps(BENCH))
    assert scores["queries"] == 3 and scores["mIoU"] == scores["R1@0.5"] == pytest.approx(1 / 3)
    assert [scores[k] for k in ("rejected", "rejected_as_0", "missing", "unmatched", "unparsable", "failed")] == [
        2, 2, 0, 0, 0, 0]
    assert scores["mIoU_95"][0] == 0 and "3 videos" in scores["intervals"]
    again = score(tmp_path, {**rows[0], "end": 10}, annotations=json.dumps(BENCH))      # or leaves them out
    assert again == scores
    (tmp_path / "learn.txt").write_text("A 0 10##he sits.\n")
    fixed = evaluate.main(evaluate.Config(annotations=str(tmp_path / "a.txt"),
                                          fixed_answer=str(tmp_path / "learn.txt")))
    assert fixed["queries"] == 3 and fixed["mIoU"] == pytest.approx(1 / 3) and fixed["rejected_as_0"] == 2


def test_unusable_windows_count_as_windows_but_are_never_the_best(tmp_path):
    annotations = "\n".join(json.dumps({"qid": qid, "query": f"query {qid}", "vid": "v", "duration": 150,
                                        "relevant_windows": windows})
                            for qid, windows in ((7, [[5, 5], [20, 30]]), (8, [[6, 6]])))
    scores = score(tmp_path, {"qid": 7, "start": 20, "end": 30}, annotations=annotations)
    assert scores["queries"] == 3 and scores["mIoU"] == pytest.approx(1 / 3) and scores["rejected_as_0"] == 2
    assert not any("best_window" in key for key in scores)      # no query has several usable ones


def test_a_model_is_not_asked_unusable_queries_but_scored(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "world", symlinks=True)
    lines = (folder / "test.txt").read_text().splitlines()
    video = lines[0].split()[0]
    (tmp_path / "world" / "test.txt").write_text("\n".join([*lines[:3], f"{video} 2 2##the square spins", "junk"]))
    scores = evaluate.main(config(tmp_path / "world", tmp_path / "out", tasks=["TVG", "AR"]))
    assert scores["queries"] == 4 and scores["rejected"] == 2 and scores["rejected_as_0"] == 1
    assert len(predictions(tmp_path / "out")) == 6 and scores["unreadable"] == 0
    rows = [r for (_, name), r in predictions(tmp_path / "out").items() if name == "TVG"]
    assert scores["mIoU"] == pytest.approx(sum(r["iou"] for r in rows) / 4)
    assert scores["unparsable"] == sum(r["start"] is None for r in rows)
    some = evaluate.main(config(tmp_path / "world", tmp_path / "some", tasks=["TVG"], steps=1, batch_size=2))
    assert some["queries"] == 2 and some["rejected_as_0"] == 0


def test_lenient_answers_are_counted(tmp_path):
    scores = score(tmp_path, {"id": "A:1", "completion": "<answer>00:00 - 00:10</answer>"},
                   {"id": "A:2", "completion": "10 to 20"}, {"id": "C:4", "completion": "[0, 4]", "error": "x"},
                   {"id": "D:5", "completion": "10 to 20 %"}, {"id": "E:6", "start": None, "end": None, "completion":
                                                                "0 - 4"})
    assert scores["mIoU"] == pytest.approx(2 / 6)
    assert [scores[k] for k in ("lenient", "unparsable", "failed", "missing")] == [1, 2, 1, 1]


def test_own_predictions_score_the_same(folder, warm, tmp_path):
    settings = replace(config(folder, tmp_path / "own", tasks=["TVG", "AR"]), model=str(warm), max_tokens=64)
    own = evaluate.main(settings)
    again = evaluate.main(evaluate.Config(annotations=settings.annotations, output=str(tmp_path / "again"),
                                          predictions=str(tmp_path / "own" / "predictions.jsonl")))
    shared = {"queries", "mIoU", "mIoU_95", "R1@0.3", "R1@0.5_95", "R1>0.7", "unparsable"}
    assert {k: own[k] for k in shared} == {k: again[k] for k in shared} and again["missing"] == again["failed"] == 0
    assert json.loads((tmp_path / "again" / "scores.json").read_text()) == again


@pytest.mark.parametrize("line, words", [
    ('{"id": "A:1", "start": 0', "no prediction"), ("[1]", "no prediction"), ('{"start": 0, "end": 1}', "neither id"),
    ('{"id": "A:1"}', "neither start"), ('{"id": "A:1", "start": "x", "end": 1}', "could not convert"),
    ('{"id": "A:1", "completion": [1]}', "no prediction"), ('{"query": "q", "start": 1, "end": 2}', "neither id")])
def test_a_broken_line_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=f"p.jsonl:2: .*{words}"):
        score(tmp_path, {"id": "A:1", "start": 0, "end": 1}, line)


@pytest.mark.parametrize("flags", [dict(), dict(model="m"), dict(model="m", predictions="p"),
                                   dict(model="m", videos="v")])
def test_flags_that_do_not_belong_together(flags):
    with pytest.raises(ValueError, match="--model, with --videos and --output, or --predictions"):
        evaluate.main(evaluate.Config(annotations="a.txt", **flags))


def test_command_line_prints_the_scores(tmp_path):
    scores = score(tmp_path, {"id": "A:1", "start": 0, "end": 10})
    done = subprocess.run([sys.executable, evaluate.__file__, "--annotations", str(tmp_path / "a.txt"),
                           "--predictions", str(tmp_path / "p.jsonl")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout) == scores
    (tmp_path / "p.jsonl").unlink()
    with pytest.raises(OSError, match="p.jsonl"):
        evaluate.main(evaluate.Config(annotations=str(tmp_path / "a.txt"), predictions=str(tmp_path / "p.jsonl")))


def test_swapped_queries_are_scored_against_the_first_ones_truth(tmp_path):
    (tmp_path / "a.txt").write_text("A 0 4##he sits.\nA 5 9##he eats.\nA 3 6##he runs.\nA 5 9##he eats.\n"
                                    "B 0 4##he naps.\n")
    samples = data.read(str(tmp_path / "a.txt"), None)[0]
    swapped = swap_queries(samples)
    assert [(s.id, s.query, s.start) for s in swapped] == [
        ("A:1", "he eats.", 0), ("A:2", "he sits.", 5), ("A:4", "he sits.", 5)]     # A:3 overlaps all, B has but one
    with pytest.raises(ValueError, match="--swap_queries"):
        swap_queries(samples[4:])


def test_swapping_is_for_tvg_alone(folder, tmp_path):
    with pytest.raises(ValueError, match="--swap_queries.*--tasks TVG"):
        evaluate.main(config(folder, tmp_path / "out", swap_queries=True))
    scores = evaluate.main(config(folder, tmp_path / "out", swap_queries=True, tasks=["TVG"]))
    asked = {r["id"]: r["query"] for r in predictions(tmp_path / "out").values()}
    samples = {s.id: s for s in data.read(str(folder / "test.txt"), str(folder / "videos"))[0]}
    assert scores["queries"] == len(asked) > 0 and all(samples[i].query != query for i, query in asked.items())


def test_best_fixed_answer(tmp_path):
    """In seconds where durations are unknown, in shares of the duration where that is better for the learning set."""
    (tmp_path / "learn.txt").write_text("".join(f"V{i} 2 6##he sits.\n" for i in range(9)) + "W 8 9##he eats.\n")
    (tmp_path / "test.txt").write_text("A 2 6##he sits.\nA 6 8##he eats.\nB 2 4##he runs.\n")
    found = evaluate.main(evaluate.Config(annotations=str(tmp_path / "test.txt"),
                                          fixed_answer=str(tmp_path / "learn.txt")))
    assert found["fixed_answer"] == [2, 6] and found["mIoU"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["right_event"] == 0.5 and found["same_answer"] == 1 and found["queries"] == 3
    halves = {f"v{i}": {"duration": 10 * i, "timestamps": [[5 * i, 10 * i]], "sentences": ["he sits"]}
              for i in (1, 3, 9)}
    (tmp_path / "learn.json").write_text(json.dumps(halves))
    (tmp_path / "test.json").write_text(json.dumps({"x": {**halves["v1"], "duration": 8, "timestamps": [[4, 8]]}}))
    found = evaluate.main(evaluate.Config(annotations=str(tmp_path / "test.json"),
                                          fixed_answer=str(tmp_path / "learn.json")))
    assert found["fixed_answer"] == [0.5, 1] and found["mIoU"] == 1
    with pytest.raises(ValueError, match="either --model"):
        evaluate.main(evaluate.Config(annotations="x", fixed_answer="y", predictions="z"))


def test_predictions_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_text("A 0 4##he sits.\n")
    (tmp_path / "p.jsonl").write_text('{"id": "A:1", "start": 0, "end": 4}\n', encoding="utf-8-sig")
    scores = evaluate.main(evaluate.Config(annotations=str(tmp_path / "a.txt"), predictions=str(tmp_path / "p.jsonl")))
    assert scores["mIoU"] == 1
