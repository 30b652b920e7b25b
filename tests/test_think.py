"""--think false: what is asked, paid, learned and trained without thoughts, in every script that has the flag."""
import json
from dataclasses import replace

import pytest
import test_wiring
from test_train import config, rows, sft_config

import data
import evaluate
import ground
import rewards
import sft
import tasks
import train
from data import Sample
from lab import plan

SAMPLE = Sample("x", "x.mp4", "a person opens the door and walks away.", 2.0, 6.0, None)
RIGHT = {"TVG": "2.0 to 6.0", "VC": SAMPLE.query, "AR": "walking", "VD": SAMPLE.query}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompts_and_rewards(name):
    """The prompt differs by the words about thoughts only. The format is the answer's block and nothing else, and what
    the answer earns is what it earns behind a thought."""
    plain = tasks.TASKS[name]
    task = tasks.in_form(plain, think=False)
    assert tasks.in_form(plain, think=True) is plain
    assert plain.prompt(SAMPLE).replace("<think>your thoughts</think> ", "") == task.prompt(SAMPLE)
    assert "think" not in task.prompt(SAMPLE) and "Reply as <answer>" in task.prompt(SAMPLE)
    block = f"<answer>{RIGHT[name]}</answer>"
    paid = {block: 1, f"  {block}\n": 1, f"<think>so</think> {block}": 0, f"so {block}": 0, f"{block} so": 0,
            f"{block}{block}": 0, RIGHT[name]: 0, "<answer></answer>": 0, f"<think></think>{block}": 0, "": 0,
            f"</think>{block}": 0}
    found = task.reward(list(paid), [SAMPLE] * len(paid))
    assert [reward.parts["format"] for reward in found] == list(paid.values())
    behind, = plain.reward([f"<think>so</think> {block}"], [SAMPLE])
    assert found[0].parts == behind.parts and found[0].total == 2 and list(found[0].parts) == list(behind.parts)
    half = "<answer>2 to 4</answer>"
    assert task.reward([half], [SAMPLE])[0].parts[task.part] == plain.reward([half], [SAMPLE])[0].parts[task.part]


def test_options_of_a_reward_are_passed_on():
    vd = tasks.in_form(tasks.TASKS["VD"], think=False)
    said = ["<answer>he walks, opens, runs and laughs</answer>"]
    assert [vd.reward(said, [SAMPLE], limit=limit)[0].parts["vd"] for limit in (0, 2)] == [1, 0]


@pytest.mark.parametrize("make", [
    lambda **flags: train.Config("m", "a", "v", "o", **flags), lambda **flags: evaluate.Config("a", **flags),
    lambda **flags: ground.Config("v", ["q"], "m", **flags), lambda **flags: plan.Config("m", **flags)])
def test_longest_completion_follows(make):
    assert [make(**flags).max_tokens for flags in ({}, {"think": False}, {"think": False, "max_tokens": 9})] == [
        1024, 64, 9]
    assert replace(make(), think=False).max_tokens == 1024      # given, not the default


def test_demonstrations_lose_their_thoughts(folder, tmp_path):
    samples, _ = data.read(str(folder / "train.txt"), str(folder / "videos"))
    for path in ("", str(folder / "demonstrations.jsonl")):
        for before in sft.read_demonstrations(path, samples)[:20]:
            after = sft.answer_only(before)
            assert before.completion.endswith(after.completion) and after.completion.startswith("<answer>")
            reward, = after.task.reward([after.completion], [after.sample])
            assert reward.parts["format"] == 1 and "think" not in after.task.prompt(after.sample)
            assert reward.total == before.task.reward([before.completion], [before.sample])[0].total


def test_scripts_ask_for_answers_alone(folder, warm, tmp_path, monkeypatch, capsys):
    """Each of them builds its prompts in that form; training pays what it asks for, in its evaluations, too; a run is
    gone on with in its own form only."""
    asked, encode = [], evaluate.model.Encoder.encode
    monkeypatch.setattr(evaluate.model.Encoder, "encode", lambda encoder, text, clip: asked.append(text) or encode(
        encoder, text, clip))
    common = dict(think=False, max_tokens=6)
    settings = config(folder, tmp_path / "run", steps=1, eval_annotations=str(folder / "test.txt"), eval_samples=1,
                      **common)
    train.main(settings)
    sft.main(sft_config(folder, tmp_path / "sft", steps=1, think=False))
    evaluate.main(evaluate.Config(str(folder / "test.txt"), str(warm), str(folder / "videos"), str(tmp_path / "test"),
                                  steps=1, batch_size=2, **common))
    video = next((folder / "videos").iterdir())
    ground.main(ground.Config(str(video), ["it rises"], str(warm), **common))
    assert len(asked) > 15 and all("think" not in text for text in asked if text)
    shown = rows(tmp_path / "run" / "samples.jsonl")
    assert all(row["format"] == rewards.format_reward(f"<think></think>{row['completion']}", row["task"] == "TVG")
               for row in shown)
    with pytest.raises(ValueError, match="--think True: .* was made with False"):
        train.main(replace(settings, think=True, resume=True))
    with pytest.raises(ValueError, match="holds a run with --think False"):
        evaluate.main(evaluate.Config(str(folder / "test.txt"), str(warm), str(folder / "videos"),
                                      str(tmp_path / "test"), steps=1, batch_size=2, max_tokens=6))


def test_without_the_flag_nothing_has_changed():
    """The prompts that models were trained with so far."""
    assert tasks.FORM == "Reply as <think>your thoughts</think> <answer>{}</answer>"
    assert set(test_wiring.SENTENCES) == set(tasks.TASKS)
    assert json.dumps(tasks.LONGEST) == '{"true": 1024, "false": 64}'
