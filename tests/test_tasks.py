"""The draw, the masks, the prompts, and what each task sees."""
import json
import subprocess
import sys
from collections import Counter

import pytest

import evaluate
import tasks
import train
from data import Sample
from engine import plot, video

SAMPLE = Sample("x:1", "x.mp4", "a person opens the door and walks away.", 1.0, 3.0, None)


@pytest.mark.parametrize("p, names", [(0.8, tasks.INVERSIONS), (0.0, ("AR", "VD")), (1.0, ("VC",)), (0.3, ("VC",))])
def test_draw_has_the_paper_s_frequencies(p, names):
    n = 4000
    counts = Counter(tasks.draw(step, 7, p, names).name for step in range(n))
    assert set(counts) <= {"TVG", *names}
    for name, expected in {"TVG": p, **{name: (1 - p) / len(names) for name in names}}.items():
        assert abs(counts[name] / n - expected) <= 4 * (expected * (1 - expected) / n) ** 0.5


def test_draw_depends_on_seed_and_step_only():
    draws = lambda seed: [tasks.draw(step, seed, 0.5, tasks.INVERSIONS).name for step in range(50)]
    assert draws(1) == draws(1) != draws(2)


@pytest.mark.parametrize("query, masked", [
    ("a person opens the door and walks away.", "a person [] the door and [] away."),
    ("Person closed the door", "Person [] the door"),
    ("the red circle spins.", "the red circle []."),
    ("a person is undressing.", "a person is []."),
    ("the sky over there", "the sky over there"),
])
def test_mask_hides_every_verb_and_nothing_else(query, masked):
    assert tasks.mask_verbs(query) == masked


def test_prompts():
    texts = {name: task.prompt(SAMPLE) for name, task in tasks.TASKS.items()}
    assert SAMPLE.query in texts["TVG"] and "a person [] the door and [] away." in texts["VC"]
    for name, text in texts.items():
        assert "<think>" in text and "<answer>" in text and "{" not in text
        if name != "TVG":
            assert "opens" not in text and "walks" not in text                  # the verb is what is asked for
    assert "door" not in texts["AR"] + texts["VD"]


def test_a_sample_in_all_tasks(capsys):
    """`python tasks.py` prints every task's prompt, an answer and what that earns: all that it can but in TVG, whose
    answer overlaps the truth by 3.3 of 4 s, and in VC, which says another verb."""
    assert tasks.main([]) == 0
    blocks = [block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n")[1:]]
    earned = {block[0].split()[0]: json.loads(block[-1]) for block in blocks}
    assert [block[1] for block in blocks] == [task.prompt(tasks.EXAMPLE) for task in tasks.TASKS.values()]
    assert earned["TVG"] == {"format": 1.0, "iou": pytest.approx(3.3 / 4.0), "total": pytest.approx(1.825)}
    assert (earned["VC"]["total"], earned["AR"]["total"], earned["VD"]["total"]) == (1.0, 2.0, 2.0)


def test_queries_without_verb_are_not_for_inversion():
    samples = [SAMPLE, Sample("x:2", "x.mp4", "the table over there", 0.0, 1.0, None)]
    for name, task in tasks.TASKS.items():
        assert tasks.usable(samples, task) == (samples if name == "TVG" else [SAMPLE])


def test_inversion_sees_the_segment_only(folder, tiny):
    path = next((folder / "videos").glob("train*.mp4"))
    sample = Sample("x:1", str(path), "the red circle spins.", 2.0, 5.0, None)
    part = Sample("x:2", str(path), "the red circle spins.", 2.0, 5.0, 6.0, video_start=1.0, video_end=7.0)
    assert tasks.prepare(part, tasks.TASKS["TVG"], tiny[1], video.load).grid[0] == 6      # only the part that is meant
    grids = {name: tasks.prepare(sample, task, tiny[1], video.load).grid.tolist() for name, task in tasks.TASKS.items()}
    assert grids["TVG"][0] == len(video.load(path).frames) // 2
    assert grids["VC"] == grids["AR"] == grids["VD"] == [3, 2, 2]


def test_a_new_task_is_one_place(folder, warm, tmp_path, monkeypatch):
    """The object of the action, OBJ, as anybody would add it: a reward and a Task. It is trained, logged, evaluated and
    drawn under the name of its part."""
    source = '''
def objects(completions, samples):
    """1 if the answer is the noun that the query speaks of, else 0."""
    return [Reward({"format": rewards.format_reward(text, timed=False),
                    "noun": float((rewards.answer(text) or "") in sample.query.split())})
            for text, sample in zip(completions, samples, strict=True)]


OBJ = Task("OBJ", "What moves? " + FORM.format("one noun"), "noun", objects)
'''
    assert len([line for line in source.splitlines() if line.strip()]) <= 15
    names = {**vars(tasks)}
    exec(source, names)
    monkeypatch.setitem(tasks.TASKS, "OBJ", names["OBJ"])
    monkeypatch.setattr(tasks, "INVERSIONS", (*tasks.INVERSIONS, "OBJ"))
    common = dict(annotations=str(folder / "train.txt"), videos=str(folder / "videos"), max_tokens=8, model=str(warm))
    train.main(train.Config(output=str(tmp_path / "run"), steps=2, prompts_per_step=1, group_size=2, tvg_prob=0.0,
                            tasks=["OBJ"], **common))
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert all(row["task"] == "OBJ" and row["part"] == "noun" and 0 <= row["noun"] <= 1 for row in rows)
    scores = evaluate.main(evaluate.Config(output=str(tmp_path / "test"), tasks=["OBJ"], steps=1, batch_size=2,
                                           **common))
    assert 0 <= scores["OBJ"] <= 1
    plot.curves(tmp_path / "run", tmp_path / "curves.png")
    assert [step["own"] for step in plot.read_metrics(tmp_path / "run")] == [row["noun"] for row in rows]
    assert tasks.main(["OBJ", "the circle spins", "<think>a</think> <answer>circle</answer>"]) == 0


def test_a_reader_that_goes_away_ends_nothing():
    """As with `python tasks.py | head -1`."""
    run = subprocess.Popen([sys.executable, tasks.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 0
