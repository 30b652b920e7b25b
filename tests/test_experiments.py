"""The experiments are what one would type, each run once, and what has run is not run again."""
import json
import shlex
import sys
from collections import Counter

import experiments
import pytest
from experiments import ALL, ARMS, CLAIMS, EXPERIMENTS, TVG, Config, parse

import tasks
import toy
from lab import report


def test_every_command_is_parsed_and_every_run_stands_once():
    runs = experiments.plan_runs(Config())
    assert len({run.key for run in runs}) == len({run.folder for run in runs}) == len(runs) > 200
    for run in runs:
        configs = [parse(command) for command in run.commands]
        assert all(config.output for config in configs)
        assert run.needs is None or runs.index(run.needs) < runs.index(run)     # what it needs comes first


def test_arms_differ_from_the_method_in_what_their_name_says():
    """Beside the folders, an arm's config differs from that of ALL in its flags only."""
    runs = {run.key[2]: run for run in experiments.plan_runs(Config(worlds=["verbs", "both"], seeds=1))}
    base = vars(parse(runs[ALL].commands[0]))
    expected = {
        TVG: {"tvg_prob": 1.0}, "TVG + VC, AR": {"tasks": ["VC", "AR"]}, "p = 0.4": {"tvg_prob": 0.4},
        "cosine rewards": {"cosine": True}, "G = 16": {"group_size": 16}, "beta 0": {"beta": 0.0},
        "LoRA 16": {"lora_rank": 16, "learning_rate": 1e-3}, "no std": {"scale_rewards": "none"},
        "4 updates": {"updates": 4}, "bnpo": {"loss": "bnpo"}, "without Invert-SFT": {},
        "answers alone": {"think": False, "max_tokens": toy.MAX_TOKENS[False]}}
    places = {"output", "model", "annotations", "videos", "cache", "eval_annotations", "eval_every", "eval_samples",
              "steps"}
    for arm, flags in expected.items():
        config = vars(parse(runs[arm].commands[0]))
        assert {key: config[key] for key in config if config[key] != base[key] and key not in places} == flags, arm
    of = {arm: runs[arm].needs.folder for arm in runs if runs[arm].needs}
    assert of["without Invert-SFT"] != of["answers alone"] != of[ALL] and of["G = 16"] != of["without Invert-SFT"]
    answers = parse(runs["answers alone"].commands[1])
    assert not answers.think and answers.max_tokens == toy.MAX_TOKENS[False]


def test_as_many_tvg_steps_are_counted_from_the_draw():
    runs = {run.key[:3]: run for run in experiments.plan_runs(Config(["steps"], worlds=["verbs"], seeds=3))}
    for seed in range(3):
        drawn = Counter(tasks.draw(step, seed, 0.8, list(tasks.INVERSIONS)).name for step in range(100))
        config = parse(runs["verbs", seed, "TVG alone, as many TVG steps"].commands[0])
        assert config.steps == drawn["TVG"] < 100 and config.tvg_prob == 1 and config.seed == seed


def test_every_claim_rests_on_runs_of_its_worlds():
    there = {(run.key[0], run.key[2]) for run in experiments.plan_runs(Config(seeds=1))}
    for claim in CLAIMS:
        for world in claim.worlds:
            assert {(world, arm) for arm in claim.better + claim.others} <= there, claim
    for experiment in EXPERIMENTS.values():
        assert experiment.against in experiment.arms and set(experiment.arms) <= ARMS.keys()


@pytest.mark.parametrize("flags, message", [
    (dict(experiments=["table7"]), "table7: no such experiment; choose from table2, "),
    (dict(worlds=["mars"]), "mars: no such world; choose from verbs, edges, both"),
    (dict(model="m"), "real data needs --model, --annotations, --test and --videos; there is no --annotations"),
    (dict(seeds=0), "--seeds 0: give a number above 0"),
    (dict(model="m", annotations="a", test="b", videos="v", train_flags="--stpes 3"), "not used.*--stpes")])
def test_wrong_flags(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        experiments.main(Config(output=str(tmp_path / "x"), **flags))
    assert not (tmp_path / "x").exists()


def on_data(folder, output, *names, **flags):
    return Config(list(names), str(output), seeds=1, model=str(folder / "sft" / "model"),
                  annotations=str(folder / "train.txt"), test=str(folder / "test.txt"), videos=str(folder / "videos"),
                  **{"train_flags": "--steps 2 --prompts_per_step 2 --group_size 2 --max_tokens 16 --tvg_prob 0.5",
                     "test_flags": "--max_tokens 16", **flags})


def test_dry_prints_and_plans_real_data(folder, warm, tmp_path, capsys):
    experiments.main(on_data(folder, tmp_path / "x", "table2", dry=True, launch="torchrun --nproc_per_node=2"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# data 0: start" and lines[-1] == "# 9 runs" and not (tmp_path / "x").exists()
    assert sum(line.startswith("torchrun --nproc_per_node=2 train.py --model") for line in lines) == 8
    planned = [line for line in lines if "planned, not measured: " in line]
    assert len(planned) == 8 and all(" GB a GPU (fits into 80 GB), 0 hours" in line for line in planned)
    for line in (line for line in lines if not line.startswith("#")):
        parse(shlex.split(line)[2:])


def test_dry_passes_on_what_cannot_be_planned(folder, warm, tmp_path):
    with pytest.raises(ValueError, match="--group_size 1: "):
        experiments.main(on_data(folder, tmp_path / "x", "figure1", dry=True, train_flags="--group_size 1"))


@pytest.mark.processes
def test_runs_on_data_once(folder, warm, tmp_path, capsys):
    """The whole way, with real processes: start, training, evaluation, rows, report; the second time nothing runs."""
    config = on_data(folder, tmp_path / "x", "figure1")
    experiments.main(config)
    rows = report.read(tmp_path / "x" / "results.csv")
    assert [(row["arm"], row["steps"]) for row in rows] == [("TVG + VC, AR, VD", 2), ("TVG alone", 2), ("start", 0)]
    for row in rows:
        scores, = (tmp_path / "x" / "data" / "0").glob(f"{experiments.slug(row['arm'])}/test/scores.json")
        assert row["mIoU"] == pytest.approx(json.loads(scores.read_text())["mIoU"], abs=1e-5)
        assert row["seconds"] > 0 or row["arm"] == "start"
    assert json.loads(rows[0]["curve"])[0][0] == 0 and rows[0]["narrated"] is None
    text = (tmp_path / "x" / "RESULTS.md").read_text()
    assert "## Figure 1, right: action understanding" in text
    first = capsys.readouterr().out
    experiments.main(config)
    assert "3 of 3 runs to do" in first and "0 of 3 runs to do" in capsys.readouterr().out
    assert (tmp_path / "x" / "RESULTS.md").read_text() == text


@pytest.mark.processes
def test_a_failed_run_is_named_and_the_rest_goes_on(folder, warm, tmp_path, capsys):
    """`python` stands for a program that fails whenever it is to train with p = 1."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\ncase \"$*\" in *tvg_prob\\ 1*) echo no luck; exit 3;; esac\n"
                       f"exec {sys.executable} \"$@\"\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit) as stopped:
        experiments.main(on_data(folder, tmp_path / "x", "figure1", launch=str(program)))
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "data 0: TVG alone: FAILED with exit code 3: no luck" in said
    assert "failed: data 0: TVG alone; the same command tries them again" in said
    assert len(report.read(tmp_path / "x" / "results.csv")) == 2


def test_what_ar_answers_is_counted_by_verb():
    rows = [{"task": "AR", "query": "the red circle is rising.", "completion": f"<answer>{said}</answer>"}
            for said in ("rising", "falling", "falling", "a lot")]
    rows.append({"task": "VD", "query": "the red circle is rising.", "completion": "<answer>rising</answer>"})
    found = experiments.confusion(rows)
    assert found["rising"] == {"rising": 1, "falling": 2, "other": 1} and found["spinning"] == {}
