"""Training end to end on real mp4 files and a tiny real model: GRPO and SFT, on one process and on two."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import finish, start
from safetensors.torch import load_file

import data
import model
import rewards
import sft
import tasks
import train


def rows(path):
    return [json.loads(line) for line in open(path)]


def config(folder, output, **flags):
    common = dict(model=str(folder / "sft" / "model"), annotations=str(folder / "train.txt"), steps=3,
                  videos=str(folder / "videos"), prompts_per_step=2, group_size=4, max_tokens=64,
                  learning_rate=1e-4, tvg_prob=0.5, seed=1, cache=str(folder / "cache"))
    return train.Config(output=str(output), **{**common, **flags})


def assert_about_same_weights(before, one, other):
    """Whether two runs changed the weights `before` alike; Adam enlarges tiny differences."""
    assert one.keys() == other.keys() == before.keys()
    change = lambda weights: torch.cat([(weights[name] - before[name]).flatten() for name in before])
    assert change(one).abs().max() > 5e-5                   # else the next line would compare the start
    assert (change(one) - change(other)).norm() < 0.02 * change(one).norm()


def test_two_processes_are_one(folder, warm, tmp_path):
    """Same draws, completions, rewards, losses and weights, with two gloo processes (sharded) as with one."""
    train.main(config(folder, tmp_path / "one"))
    assert finish(start("train", config(folder, tmp_path / "two"), tmp_path / "log", 2)) == [0, 0]
    one, two = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3 and any(row["grad_norm"] > 0 for row in one)
    for a, b in zip(one, two):
        for key in a.keys() - {"seconds", "tokens_per_second", "mismatch"}:
            assert a[key] == (pytest.approx(b[key], rel=1e-3, abs=1e-5) if isinstance(a[key], float) else b[key]), key
    texts = [[row["completion"] for row in rows(tmp_path / name / "samples.jsonl")] for name in ("one", "two")]
    assert texts[0] == texts[1] and len(texts[0]) == 3 * 2
    assert_about_same_weights(*(load_file(path / "model.safetensors") for path in
                                (warm, tmp_path / "one" / "model", tmp_path / "two" / "model")))


def test_same_seed_same_run_for_any_number_of_workers(folder, warm, tmp_path):
    """With broken videos among them, which are replaced alike."""
    files = tmp_path / "videos"
    files.mkdir()
    for number, path in enumerate(sorted((folder / "videos").iterdir())):
        (files / path.name).symlink_to(path if number % 3 else __file__)
    for name, seed, workers in (("first", 1, 1), ("again", 1, 3), ("other", 2, 2)):
        train.main(config(folder, tmp_path / name, videos=str(files), steps=2, prompts_per_step=3, seed=seed,
                          workers=workers, cache=""))
    first, again, other = ((tmp_path / name / "samples.jsonl").read_text() for name in ("first", "again", "other"))
    assert first == again != other
    one, three = (rows(tmp_path / name / "metrics.jsonl") for name in ("first", "again"))
    assert [{**row, "seconds": 0, "tokens_per_second": 0} for row in one] == \
        [{**row, "seconds": 0, "tokens_per_second": 0} for row in three]
    assert sum(row["bad_videos"] for row in one) > 0 and any(row["grad_norm"] > 0 for row in one)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_micro_batches_are_one_batch(folder, warm, tmp_path):
    for name, size in (("whole", 0), ("parts", 1)):
        train.main(config(folder, tmp_path / name, micro_batch_size=size, steps=2))
    whole, parts = (rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert any(row["grad_norm"] > 0 for row in whole)
    for a, b in zip(whole, parts):
        assert a["reward"] == b["reward"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_run_says_what_it_did(folder, warm, tmp_path):
    settings = config(folder, tmp_path / "run")
    train.main(settings)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == vars(settings)
    for step, row in enumerate(rows(tmp_path / "run" / "metrics.jsonl")):
        task = tasks.draw(step, 1, 0.5, settings.tasks)
        assert row["part"] == task.part and row["step"] == step and row["task"] == task.name
        assert row["reward"] == pytest.approx(row["format"] + row[task.part])
        assert row["tokens"] <= 64 and 0 <= row["flat"] <= 1 and 0 <= row["truncated"] <= 1
        assert row["mismatch"] is None or row["mismatch"] < 1e-5        # what is scored is what was sampled
    assert any(row["mismatch"] is not None for row in rows(tmp_path / "run" / "metrics.jsonl"))
    samples = {sample.id: sample for sample in data.read(settings.annotations, settings.videos)[0]}
    shown = rows(tmp_path / "run" / "samples.jsonl")
    assert len(shown) == settings.steps * settings.prompts_per_step
    for row in shown:                                                   # no reward has gone to another's completion
        assert row["reward"] == tasks.TASKS[row["task"]].reward([row["completion"]], [samples[row["id"]]])[0].total
    first = rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["kl"] is None or abs(first["kl"]) < 1e-9               # policy = reference


def test_checkpointed_activations_and_a_frozen_tower(folder, warm, tmp_path, monkeypatch):
    """The first change no figure. A frozen tower keeps its weights, and sees each video once a step instead of thrice:
    for sampling, reference and policy."""
    seen, embed = [], model.embed_patches
    monkeypatch.setattr(model, "embed_patches", lambda *args: seen.append(len(args[1])) or embed(*args))
    runs = {"plain": {}, "recomputed": {"gradient_checkpointing": True}, "frozen": {"freeze_vision": True}}
    calls = {}
    for name, flags in runs.items():
        seen.clear()
        train.main(config(folder, tmp_path / name, steps=2, tvg_prob=1.0, **flags))
        calls[name] = len(seen)
    figures = [[{key: row[key] for key in row.keys() - {"seconds", "tokens_per_second"}} for row in
                rows(tmp_path / name / "metrics.jsonl")] for name in runs]
    stepped = sum(row["grad_norm"] > 0 for row in figures[0])       # the others are flat
    assert figures[0] == figures[1] and stepped
    for key in ("reward", "tokens"):
        assert figures[2][0][key] == pytest.approx(figures[0][0][key], abs=1e-5)
    assert calls == {"plain": 2 + 2 * stepped, "recomputed": 2 + 2 * stepped, "frozen": 2}
    before, plain, recomputed, frozen = (load_file(path / "model.safetensors") for path in (
        warm, *(tmp_path / name / "model" for name in runs)))
    same = lambda one, other: {name for name in before if torch.equal(one[name], other[name])}
    tower = {name for name in before if ".visual." in name or name.startswith("visual.")}
    assert same(plain, recomputed) == set(before) and same(frozen, before) == tower != set()
    assert same(plain, before) == set()


def test_flat_groups_change_nothing(folder, warm, tmp_path, monkeypatch):
    alike = lambda part: lambda texts, samples: [rewards.Reward({"format": 0.6153846, part: 0.0}) for _ in texts]
    same = lambda task: replace(task, reward=alike(task.part))
    monkeypatch.setattr(tasks, "TASKS", {name: same(task) for name, task in tasks.TASKS.items()})
    train.main(config(folder, tmp_path / "flat"))
    before, after = (load_file(path / "model.safetensors") for path in (warm, tmp_path / "flat" / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(row["flat"] == 1 and row["grad_norm"] == 0 for row in rows(tmp_path / "flat" / "metrics.jsonl"))


def test_vd_verbs_is_the_limit_of_the_reward(folder, warm, tmp_path, monkeypatch):
    limits = []

    def reward(texts, samples, limit=0):
        limits.append(limit)
        return [rewards.Reward({"format": 0.0, "vd": 0.0}, {"verbs_said": 2}) for _ in texts]

    monkeypatch.setitem(tasks.TASKS, "VD", replace(tasks.TASKS["VD"], reward=reward))
    for number in (0, 3):
        train.main(config(folder, tmp_path / f"{number}", tasks=["VD"], tvg_prob=0.0, steps=1, vd_max_verbs=number))
    assert limits == [0, 3] and rows(tmp_path / "3" / "metrics.jsonl")[0]["verbs_said"] == 2


def test_cosine_is_the_reward_of_table_3(folder, warm, tmp_path):
    """Inversion steps are paid similarities, TVG as ever."""
    samples = {sample.id: sample for sample in data.read(str(folder / "train.txt"), str(folder / "videos"))[0]}
    train.main(config(folder, tmp_path / "run", tasks=["AR"], steps=4, tvg_prob=0.3, cosine=True))
    paid = {"TVG": [], "AR": []}
    for step, row in ((step, row) for step in rows(tmp_path / "run" / "metrics.jsonl")
                      for row in rows(tmp_path / "run" / "samples.jsonl") if row["step"] == step["step"]):
        reward, = (rewards.ar if step["task"] == "AR" else rewards.tvg)(
            [row["completion"]], [samples[row["id"]]], **({"by_cosine": True} if step["task"] == "AR" else {}))
        assert row["reward"] == pytest.approx(reward.total)
        paid[step["task"]].append(reward.parts.get("ar", 1.0))
    assert paid["TVG"] and any(0 < value < 1 for value in paid["AR"])


def test_broken_video_is_replaced_counted_and_named_once(folder, warm, tmp_path, capsys):
    files = tmp_path / "videos"
    files.mkdir()
    for number, path in enumerate(sorted((folder / "videos").iterdir())):
        if number % 2:
            (files / path.name).write_bytes(b"not a video")
        else:
            (files / path.name).symlink_to(path)
    train.main(config(folder, tmp_path / "run", videos=str(files), steps=4))
    assert sum(row["bad_videos"] for row in rows(tmp_path / "run" / "metrics.jsonl")) > 0
    named = [line for line in capsys.readouterr().out.splitlines() if "replaced by another sample" in line]
    assert named and len(named) == len(set(named)) and all(str(files) in line for line in named)


@pytest.mark.parametrize("flags, words", [
    ({"tvg_prob": 1.5}, "--tvg_prob 1.5"), ({"group_size": 1}, "--group_size 1"), ({"tasks": ["XX"]}, "XX.*VC AR VD"),
    ({"loss": "ppo"}, "--loss_type ppo: .*bnpo"), ({"scale_rewards": "batch"}, "--scale_rewards batch: .*std, none"),
    ({"prompts_per_step": 0}, "--prompts_per_step 0"), ({"model": "nowhere"}, "nowhere.*--model"),
    ({"annotations": "nowhere.txt"}, "nowhere.txt.*--annotations"), ({"videos": "nowhere"}, "nowhere.*--videos")])
def test_wrong_flags_are_named(folder, warm, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        train.main(config(folder, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_command_line_ends_with_one_line(folder, tmp_path):
    settings = replace(config(folder, tmp_path / "run"), model="nowhere")
    assert finish(start("train", settings, tmp_path / "log")) == [2]
    text = (tmp_path / "log.0").read_text()
    assert "Traceback" not in text and text.splitlines()[-1].startswith("train.py: nowhere: not a model folder")


def sft_config(folder, output, **flags):
    common = dict(model=str(folder / "model"), annotations=str(folder / "train.txt"), videos=str(folder / "videos"),
                  demonstrations=str(folder / "demonstrations.jsonl"), steps=6, batch_size=4,
                  learning_rate=2e-3, seed=1, cache=str(folder / "cache"))
    return sft.Config(output=str(output), **{**common, **flags})


@pytest.mark.processes
def test_sft_learns_and_two_processes_are_one(folder, tmp_path):
    sft.main(sft_config(folder, tmp_path / "one", micro_batch_size=2))
    assert finish(start("sft", sft_config(folder, tmp_path / "two"), tmp_path / "log", 2)) == [0, 0]
    one, two = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    assert one[-1]["loss"] < one[0]["loss"] - 1 and len(one) == len(two)


def test_sft_without_demonstrations_describes_the_segment(folder):
    samples, _ = data.read(str(folder / "train.txt"), str(folder / "videos"))
    demonstrations = sft.read_demonstrations("", samples)
    assert demonstrations
    for each in demonstrations:
        reward, = each.task.reward([each.completion], [each.sample])
        assert each.task.name == "VD" and reward.total == 2.0 and each.sample.query in each.completion


def test_queries_without_a_verb_are_no_demonstrations(folder):
    silent = replace(data.read(str(folder / "train.txt"), str(folder / "videos"))[0][0], query="the table over there")
    assert sft.read_demonstrations("", [silent]) == []


def test_demonstrations_are_checked(folder, tmp_path):
    samples, _ = data.read(str(folder / "train.txt"), str(folder / "videos"))
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": samples[0].id, "task": "VD", "completion": "x"}) + "\n{}\n")
    with pytest.raises(ValueError, match="d.jsonl:2: no demonstration"):
        sft.read_demonstrations(str(tmp_path / "d.jsonl"), samples)
