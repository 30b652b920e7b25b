"""The experiments are what one would type, each run once, and what has run is not run again."""
import json
import sys
from dataclasses import replace

import pytest

import tasks
import toy
from lab import experiments, report
from lab.experiments import ALL, ARMS, CLAIMS, EXPERIMENTS, TVG, TVG_STEPS, Config, parse


@pytest.fixture(scope="module")
def runs():
    return experiments.make_runs(Config(seeds=2))


def test_every_run_stands_once_behind_its_start(runs):
    assert len({run.key for run in runs}) == len({run.folder for run in runs}) == len(runs) > 80
    for run in runs:
        assert run.needs is None or runs.index(run.needs) < runs.index(run)


def test_published_rows_are_not_run_again(runs):
    """The rows of results/results.csv have the keys that today's flags give."""
    rows = report.read(experiments.ROOT / "results" / "results.csv")
    assert {run.key for run in runs} <= set(rows[report.KEY].itertuples(index=False, name=None))


def test_a_start_has_the_world_of_its_seed(runs):
    for run in runs:
        if run.needs is None:
            config, arm = parse(run.commands[0]), run.key[2]
            assert (config.weakness, config.seed) == run.key[:2] and config.output == str(run.folder)
            assert config.steps == 0            # the start alone: a flag of value 0 is not left out
            assert config.invert_sft == ("Invert-SFT" not in arm) and config.think == ("answers" not in arm)


def test_an_arm_learns_from_train_txt_and_is_judged_on_test_txt(runs):
    """In its start's world and with its seed; the model that is judged is the trained one."""
    for run in runs:
        if run.needs:
            world, (training, evaluation) = run.needs.folder, map(parse, run.commands)
            assert training.model == str(world / "sft" / "model") and training.annotations == str(world / "train.txt")
            assert evaluation.model == str(run.folder / "train" / "model") == training.output + "/model"
            assert evaluation.annotations == str(world / "test.txt") and evaluation.think == training.think
            assert training.seed == run.key[1] and training.resume
            if ARMS[run.key[2]].watched:
                assert training.eval_annotations == str(world / "test.txt")
            if run.key[2].startswith("SFT"):    # demonstrations of a teacher without a weakness
                assert training.demonstrations == str(world / "right.jsonl")


def test_arms_differ_from_the_method_in_what_their_name_says(runs):
    """Beside the folders, an arm's config differs from that of ALL in its flags only."""
    by_arm = {run.key[2]: run for run in runs if run.key[0] == "both" or run.key[:2] == ("verbs", 0)}
    base = vars(parse(by_arm[ALL].commands[0]))
    expected = {
        TVG: {"tvg_prob": 1.0}, "TVG + VC, AR": {"tasks": ["VC", "AR"]}, "p = 0": {"tvg_prob": 0.0},
        "cosine rewards": {"cosine_rewards": True}, "G = 16": {"group_size": 16}, "beta 0": {"beta": 0.0},
        "LoRA 16": {"lora_rank": 16, "learning_rate": 1e-3}, "no std": {"scale_rewards": "none"},
        "4 updates": {"num_iterations": 4}, "bnpo": {"loss_type": "bnpo"}, "without Invert-SFT": {},
        "answers alone": {"think": False, "max_tokens": toy.MAX_TOKENS[False]}}
    for arm, changes in expected.items():
        config = vars(parse(by_arm[arm].commands[0]))
        changed = {name for name in changes if config[name] != base[name]}
        assert changed == set(changes) and {name: config[name] for name in changes} == changes, arm
    starts = [by_arm[arm].needs.key[2] for arm in ("without Invert-SFT", "answers alone", "G = 16")]
    assert starts == ["start without Invert-SFT", "start, answers alone", "start"]


def test_as_many_tvg_steps_are_counted_from_the_draw(runs):
    for run in runs:
        if run.key[0] == "verbs" and run.key[2] == TVG_STEPS:
            config = parse(run.commands[0])
            drawn = [tasks.draw(step, config.seed, 0.8, list(tasks.INVERSIONS)).name for step in range(100)]
            assert config.steps == drawn.count("TVG") < 100 and config.tvg_prob == 1


def test_every_claim_rests_on_runs_of_its_worlds(runs):
    there = {(run.key[0], run.key[2]) for run in runs}
    for claim in CLAIMS:
        for world in claim.worlds:
            assert {(world, arm) for arm in claim.better + claim.others} <= there, claim
    for experiment in EXPERIMENTS.values():
        assert experiment.against in experiment.arms


@pytest.mark.parametrize("flags, message", [
    (dict(experiments=["table7"]), "--experiments table7: choose from table2, "),
    (dict(worlds=["mars"]), "--worlds mars: choose from verbs, edges, both"),
    (dict(model="m"), "real data needs --model, --annotations, --test and --videos; there is no --annotations"),
    (dict(seeds=0), "--seeds 0: give a number above 0"),
    (dict(model="m", annotations="a", test="b", videos="v", train_flags="--stpes 3"), "--stpes"),
    (dict(model="m", annotations="a", test="b", videos="v", test_flags="--bach 3"), "--bach"),
    (dict(report=True), "results.csv: has no runs yet")])
def test_wrong_flags(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        experiments.main(Config(output=str(tmp_path / "x"), **flags))
    assert not (tmp_path / "x").exists()


def on_data(folder, output, *names, **flags):
    train_flags = "--steps 2 --prompts_per_step 2 --group_size 2 --max_tokens 16 --tvg_prob 0.5"
    config = Config(experiments=list(names), output=str(output), seeds=1, model=str(folder / "sft" / "model"),
                    annotations=str(folder / "train.txt"), test=str(folder / "test.txt"),
                    videos=str(folder / "videos"), train_flags=train_flags, test_flags="--max_tokens 16")
    return replace(config, **flags)


def test_flags_of_real_data_reach_their_scripts(folder, tmp_path):
    """And the train flags belong to a row's key: with others it is another run."""
    config = on_data(folder, tmp_path, "figure1")
    start, alone, _ = experiments.make_runs(config)
    training, evaluation = map(parse, alone.commands)
    assert training.steps == 2 and training.eval_every == 1
    assert training.annotations == config.annotations
    assert evaluation.max_tokens == parse(start.commands[0]).max_tokens == 16
    assert evaluation.annotations == parse(start.commands[0]).annotations == training.eval_annotations == config.test
    assert alone.key[3] == config.train_flags + " --tvg_prob 1"


def test_dry_estimates_real_data(folder, warm, tmp_path, capsys, monkeypatch):
    asked, estimate = [], experiments.plan.estimate
    monkeypatch.setattr(experiments.plan, "estimate", lambda config: asked.append(config) or estimate(config))
    experiments.main(on_data(folder, tmp_path / "x", "table2", dry=True, launch="torchrun --nproc_per_node=2"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# data 0: start" and lines[-1] == "# 9 runs" and not (tmp_path / "x").exists()
    assert sum(line.startswith("torchrun --nproc_per_node=2 train.py --model") for line in lines) == 8
    estimates = [line for line in lines if ": estimated, not measured: " in line]
    assert len(estimates) == 8 and all(" GB per GPU (fits into 80 GB), 0 hours" in line for line in estimates)
    assert (asked[0].gpus, asked[0].samples, asked[0].group_size, asked[0].max_tokens) == (2, 4, 2, 16)


@pytest.mark.processes
def test_runs_on_data_once(folder, warm, tmp_path, capsys):
    """The whole way, with real processes: start, training, evaluation, rows, report. The first time `python` stands for
    a program that fails whenever it is to train with p = 1: that run alone is done the second time, and none the third.
    """
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\ncase \"$*\" in *tvg_prob\\ 1*) echo no luck; exit 3;; esac\n"
                       f"exec {sys.executable} \"$@\"\n")
    program.chmod(0o755)
    config = on_data(folder, tmp_path / "x", "figure1")
    with pytest.raises(SystemExit) as stopped:
        experiments.main(replace(config, launch=str(program)))
    printed = capsys.readouterr().out
    assert stopped.value.code == 1 and "data 0: TVG alone: FAILED with exit code 3: no luck" in printed
    assert "3 of 3 runs to do" in printed and "failed: data 0: TVG alone; the same command" in printed
    assert len(report.read(tmp_path / "x" / "results.csv")) == 2
    experiments.main(config)
    text = (tmp_path / "x" / "RESULTS.md").read_text()
    experiments.main(config)
    printed = capsys.readouterr().out
    assert "1 of 3 runs to do" in printed and "0 of 3 runs to do" in printed
    rows = report.read(tmp_path / "x" / "results.csv").to_dict("records")
    assert [(row["arm"], row["steps"], row["seconds"] > 0) for row in rows] == [
        (ALL, 2, True), (TVG, 2, True), ("start", 0, False)]
    for row in rows:
        scores, = (tmp_path / "x" / "data" / "0").glob(f"{experiments.slug(row['arm'])}/test/scores.json")
        assert row["mIoU"] == pytest.approx(json.loads(scores.read_text())["mIoU"], abs=1e-5)
    assert json.loads(rows[0]["curve"])[0][0] == 0
    assert "## Figure 1, right: action understanding" in text and (tmp_path / "x" / "RESULTS.md").read_text() == text


def test_a_row_tells_what_its_world_and_thoughts_were(tmp_path, monkeypatch):
    """The stories are those of the run's seed and start; what AR answers is counted by true verb."""
    start, run = experiments.make_runs(Config(output=str(tmp_path), experiments=["kl"], seeds=4))[-4:-2]
    (run.folder / "test").mkdir(parents=True)
    (run.folder / "test" / "scores.json").write_text('{"mIoU": 0.1234567, "other": 2}')
    predictions = []
    for task, verb in (("AR", "rising"), ("AR", "falling"), ("AR", "falling"), ("AR", "a lot"), ("VD", "rising")):
        completion = f"<answer>{verb}</answer>"
        predictions.append({"task": task, "query": "the red circle is rising.", "completion": completion})
    (run.folder / "test" / "predictions.jsonl").write_text("\n".join(map(json.dumps, predictions)))
    asked = []
    monkeypatch.setattr(toy, "write_world", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(toy, "narrated", lambda rows, stories: {"narrated": 0.75, "missing": 0.1})
    row = experiments.collect(run)
    assert asked == [(start.folder, 3, 1000, 300, "both")]
    assert (row["mIoU"], row["narrated"]) == (0.12346, 0.75) and set(row) <= set(report.COLUMNS)
    assert json.loads(row["confusion"])["rising"] == {"rising": 1, "falling": 2, "other": 1}
