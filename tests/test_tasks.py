"""The draw, the masks, the prompts, what each task sees and pays, with thoughts and without, and a task that is new."""
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

import data
import evaluate
import ground
import rewards
import sft
import tasks
import train
from data import Sample
from engine import plot, video

SAMPLE = Sample("x:1", "x.mp4", "a person opens the door and walks away.", 2.0, 6.0, None)
RIGHT = {"TVG": "2.0 to 6.0", "VC": SAMPLE.query, "AR": "walking", "VD": SAMPLE.query}


def reply(text):
    return f"<think>so</think> <answer>{text}</answer>"


@pytest.mark.parametrize("p, names", [(0.8, tasks.INVERSIONS), (0.0, ("AR", "VD")), (1.0, ("VC",)), (0.3, ("VC",))])
def test_draw_has_the_paper_s_frequencies(p, names):
    counts = Counter(tasks.draw(step, 7, p, names).name for step in range(4000))
    expected = dict.fromkeys(names, (1 - p) / len(names)) | {"TVG": p}
    assert counts.keys() <= expected.keys()
    for name, share in expected.items():
        assert abs(counts[name] / 4000 - share) <= 4 * (share * (1 - share) / 4000) ** 0.5


def test_draw_depends_on_seed_and_step_only():
    first, again, other = ([tasks.draw(step, seed, 0.5, tasks.INVERSIONS).name for step in range(50)]
                           for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("query, masked", {
    SAMPLE.query: "a person [] the door and [] away.", "Person closed the door": "Person [] the door",
    "the red circle spins.": "the red circle [].", "a person is undressing.": "a person is [].",
    "the sky over there": "the sky over there"}.items())
def test_mask_hides_every_verb_and_nothing_else(query, masked):
    assert tasks.mask_verbs(query) == masked


def test_prompts():
    texts = {name: task.prompt(SAMPLE) for name, task in tasks.TASKS.items()}
    assert SAMPLE.query in texts["TVG"] and "a person [] the door and [] away." in texts["VC"]
    for name, text in texts.items():
        assert text.endswith("</answer>") and "Reply as <think>your thoughts</think> <answer>" in text
        assert "{" not in text
        if name != "TVG":
            assert "opens" not in text and "walks" not in text                  # the verb is what is asked for
    assert "door" not in texts["AR"] + texts["VD"]


def test_queries_without_verb_are_not_for_inversion():
    samples = [SAMPLE, Sample("x:2", "x.mp4", "the table over there", 0.0, 1.0, None)]
    for name, task in tasks.TASKS.items():
        assert tasks.usable(samples, task) == (samples if name == "TVG" else [SAMPLE])


def test_inversion_sees_the_segment_only(folder, tiny):
    path = next((folder / "videos").glob("train*.mp4"))
    sample = Sample("x:1", str(path), "the red circle spins.", 2.0, 5.0, None)
    part = replace(sample, duration=6.0, video_start=1.0, video_end=7.0)        # only the part that is meant
    seconds = {}
    for name, task in tasks.TASKS.items():
        whole, cut = (tasks.prepare(each, task, tiny[1], video.load).video_grid_thw for each in (sample, part))
        assert whole[1:].tolist() == cut[1:].tolist() == [2, 2]
        seconds[name] = whole[0].item(), cut[0].item()
    assert seconds == {"TVG": (len(video.load(path).frames) // 2, 6), "VC": (3, 3), "AR": (3, 3), "VD": (3, 3)}


# the form of a task

@pytest.mark.parametrize("name", tasks.TASKS)
def test_without_thoughts(name):
    """The prompt differs by the words about thoughts only. The format is the answer's block and nothing else, and what
    the answer earns is what it earns behind a thought."""
    plain = tasks.TASKS[name]
    task = tasks.in_form(plain, think=False)
    assert tasks.in_form(plain, think=True) == plain
    assert plain.prompt(SAMPLE).replace("<think>your thoughts</think> ", "") == task.prompt(SAMPLE)
    assert "think" not in task.prompt(SAMPLE)
    block = f"<answer>{RIGHT[name]}</answer>"
    forms = {block: 1, f"  {block}\n": 1, f"<think>so</think> {block}": 0, f"so {block}": 0, f"{block} so": 0,
             block * 2: 0, RIGHT[name]: 0, "<answer></answer>": 0, f"<think></think>{block}": 0, "": 0,
             f"</think>{block}": 0}
    paid = task.reward(list(forms), [SAMPLE] * len(forms))
    assert [reward.parts["format"] for reward in paid] == list(forms.values()) and paid[0].total == 2
    for text in (RIGHT[name], "2 to 4"):
        assert task.reward([f"<answer>{text}</answer>"], [SAMPLE]) == plain.reward([reply(text)], [SAMPLE])


@pytest.mark.parametrize("think", [True, False])
def test_options_of_a_reward(think):
    """A similarity for the tasks that have one; the limit for VD, with it and without."""
    text = "he walks. he runs. he laughs."
    completion = reply(text) if think else f"<answer>{text}</answer>"

    def paid(name, query, **options):
        task = tasks.in_form(tasks.TASKS[name], think, **options)
        return task.reward([completion], [replace(SAMPLE, query=query)])[0].parts[task.part]

    for cosine in (False, True):
        assert [paid("VD", "he runs", vd_max_verbs=limit, cosine=cosine) for limit in (0, 3, 2)] == [1, 1, 0]
        assert paid("VC", text, vd_max_verbs=1, cosine=cosine) == 1 and paid("TVG", text, cosine=cosine) == 0
    for name in ("VC", "VD"):
        assert paid(name, "she eats") == 0 < paid(name, "she eats", cosine=True) < 1


def test_demonstrations_lose_their_thoughts(folder):
    samples, _ = data.read(str(folder / "train.txt"), str(folder / "videos"))
    for path in ("", str(folder / "demonstrations.jsonl")):
        for before in sft.read_demonstrations(path, samples)[:20]:
            after = sft.answer_only(before)
            assert before.completion.endswith(after.completion) and after.completion.startswith("<answer>")
            reward, = after.task.reward([after.completion], [after.sample])
            assert [reward] == before.task.reward([before.completion], [before.sample])
            assert reward.parts["format"] == 1 and "think" not in after.task.prompt(after.sample)


def test_scripts_ask_for_answers_alone(folder, warm, tmp_path, monkeypatch):
    """Each of them builds its prompts in that form; training pays what it asks for, in its evaluations, too; a run is
    gone on with in its own form only."""
    asked, encode = [], evaluate.model.Encoder.encode

    def watched(encoder, text, clip):
        asked.append(text)
        return encode(encoder, text, clip)

    monkeypatch.setattr(evaluate.model.Encoder, "encode", watched)
    inputs = dict(model=str(warm), annotations=str(folder / "test.txt"), videos=str(folder / "videos"), steps=1,
                  think=False)
    training = train.Config(output=str(tmp_path / "run"), prompts_per_step=2, group_size=4, eval_samples=1,
                            eval_annotations=inputs["annotations"], max_tokens=6, **inputs)
    testing = evaluate.Config(output=str(tmp_path / "test"), batch_size=2, max_tokens=6, **inputs)
    train.main(training)
    sft.main(sft.Config(output=str(tmp_path / "sft"), batch_size=4, **inputs))
    evaluate.main(testing)
    path = next((folder / "videos").iterdir())
    ground.main(ground.Config(video=str(path), queries=["it rises"], model=str(warm), think=False, max_tokens=6))
    assert len(asked) > 15 and all("think" not in text for text in asked)
    for line in open(tmp_path / "run" / "samples.jsonl"):
        row = json.loads(line)
        assert row["format"] == rewards.format_reward(f"<think></think>{row['completion']}", row["task"] == "TVG")
    with pytest.raises(ValueError, match="--think True: .* was made with False"):
        train.main(replace(training, think=True, resume=True))
    with pytest.raises(ValueError, match="holds a run with --think False"):
        evaluate.main(replace(testing, think=True))


# a new task

NEW_REWARD = r'''
def obj(completions, samples):
    """1 if the answer is a word of the query, else 0."""
    rewards = []
    for completion, sample in zip(completions, samples, strict=True):
        words = re.findall(r"\w+", sample.query.lower())
        score = float((answer(completion) or "").lower() in words)
        rewards.append(Reward({"format": format_reward(completion, timed=False), "obj": score}))
    return rewards
'''
NEW_TASK = """
Task("OBJ", "Name the object in the video. " + FORM.format("one noun"), "obj", rewards.obj, needs_verb=False),
"""


def test_a_new_task_is_one_place(folder, warm, tmp_path, monkeypatch, capsys):
    """It is trained, with any option that other tasks have, logged, evaluated and drawn under the name of its part."""
    names = dict(vars(rewards))
    exec(NEW_REWARD, names)
    monkeypatch.setattr(rewards, "obj", names["obj"], raising=False)
    task, = eval(NEW_TASK.strip(), vars(tasks))
    monkeypatch.setitem(tasks.TASKS, "OBJ", task)
    monkeypatch.setattr(tasks, "INVERSIONS", (*tasks.INVERSIONS, "OBJ"))
    for text, paid in (("door", 1.0), ("Door", 1.0), ("window", 0.0), ("", 0.0)):
        for options in ([], ["--cosine_rewards"]):
            assert tasks.main(["OBJ", "a person closes the door.", reply(text), *options]) == 0
            assert json.loads(capsys.readouterr().out)["obj"] == paid
    inputs = dict(annotations=str(folder / "train.txt"), videos=str(folder / "videos"), max_tokens=8, model=str(warm),
                  tasks=["OBJ"])
    train.main(train.Config(output=str(tmp_path / "run"), steps=2, prompts_per_step=1, group_size=2, tvg_prob=0.0,
                            cosine_rewards=True, vd_max_verbs=3, **inputs))
    steps = plot.read_metrics(tmp_path / "run")
    assert [step["task"] for step in steps] == ["OBJ", "OBJ"] and all(step["own"] == step["obj"] for step in steps)
    scores = evaluate.main(evaluate.Config(output=str(tmp_path / "test"), steps=1, batch_size=2, **inputs))
    assert 0 <= scores["OBJ"] <= 1
    plot.curves(tmp_path / "run", tmp_path / "curves.png")


# the command

def test_a_sample_in_all_tasks(capsys):
    """`python tasks.py` prints every task's prompt, an answer and what that earns: all that it can but in TVG, whose
    answer overlaps the truth by 3.3 of 4 s, and in VC, which says another verb."""
    assert tasks.main([]) == 0
    blocks = [block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n")[1:]]
    earned = {block[0].split()[0]: json.loads(block[-1]) for block in blocks}
    assert [block[1] for block in blocks] == [task.prompt(tasks.EXAMPLE) for task in tasks.TASKS.values()]
    assert earned["TVG"] == {"format": 1.0, "iou": pytest.approx(3.3 / 4.0), "total": pytest.approx(1.825)}
    assert (earned["VC"]["total"], earned["AR"]["total"], earned["VD"]["total"]) == (1.0, 2.0, 2.0)


@pytest.mark.parametrize("argv, expected", [
    (["AR", SAMPLE.query, reply("walking")], {"format": 1, "ar": 1, "total": 2}),
    (["TVG", "a person laughs", reply("2 to 8"), "--segment", "2", "5"], {"format": 1, "iou": 0.5, "total": 1.5}),
    (["VC", "Person closed the door", reply("Person [opens] it")], {"format": 1, "vc": 0, "total": 1}),
    (["VD", "a person jumps", reply("jumping"), "--cosine_rewards"], {"format": 1, "vd": 1, "total": 2}),
])
def test_command_line_prints_one_json_line(argv, expected, capsys):
    assert tasks.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out) == expected


@pytest.mark.parametrize("argv, hint", [
    (["QA", "q", "c"], "TVG, VC, AR, VD"), (["TVG", "q", "c"], "--segment START END"),
    (["TVG", "q", "c", "--segment", "5", "2"], "--segment 5 2")])
def test_a_wrong_command_is_one_line_and_exit_code_2(argv, hint, capsys):
    assert tasks.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and hint in printed.err


def test_a_reader_that_goes_away_ends_nothing():
    """As with `python tasks.py | head -1`."""
    run = subprocess.Popen([sys.executable, tasks.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 0
