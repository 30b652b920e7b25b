"""The experiments are what one would type, each run once, and what has run is not run again."""
import json
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import tasks
import toy
from lab import experiments, jobs, report
from lab.experiments import ALL, ARMS, CLAIMS, EXPERIMENTS, TVG, TVG_STEPS, Config, parse


@pytest.fixture(scope="module")
def runs():
    return experiments.make_runs(Config(seeds=2))


def test_every_run_stands_once_behind_its_start(runs):
    assert len({run.key for run in runs}) == len({run.folder for run in runs}) == len(runs) > 80
    for run in runs:
        assert run.needs is None or runs.index(run.needs) < runs.index(run)


def test_a_start_has_the_world_of_its_seed(runs):
    for run in runs:
        if run.needs is None:
            command, = run.commands
            config = parse(command)
            world, seed, arm, _ = run.key
            assert (config.weakness, config.seed, config.output) == (world, seed, str(run.folder))
            assert config.steps == 0            # the start alone, so a flag of value 0 counts
            assert run.answers == "test_warm_start"
            assert config.invert_sft == ("Invert-SFT" not in arm) and config.think == ("answers" not in arm)


def test_an_arm_learns_from_train_txt_and_is_judged_on_test_txt(runs):
    """In its start's world, with its seed; the model that is judged is the trained one."""
    for run in runs:
        if run.needs:
            training, evaluation = map(parse, run.commands)
            world, start = run.needs.folder, run.needs.folder / "sft" / "model"
            assert (training.model, training.annotations) == (str(start), str(world / "train.txt"))
            assert training.seed == run.key[1] and training.resume
            assert evaluation.model == training.output + "/model" == str(run.folder / "train" / "model")
            assert (evaluation.annotations, evaluation.output) == (str(world / "test.txt"), str(run.folder / "test"))
            assert evaluation.think == training.think
            if run.key[2] in (ALL, TVG, "without Invert-SFT"):
                assert training.eval_annotations == str(world / "test.txt") and training.eval_every == training.steps // 5
            if run.key[2].startswith("SFT"):    # demonstrations of a teacher without a weakness
                assert training.demonstrations == str(world / "right.jsonl")


def test_arms_differ_from_the_method_in_what_their_name_says(runs):
    """Beside the folders, an arm's config differs from that of ALL in its flags only."""
    by_arm = {run.key[2]: run for run in runs if run.key[0] in ("verbs", "both") and run.key[1] == 0}
    base = vars(parse(by_arm[ALL].commands[0]))
    expected = {
        TVG: {"tvg_prob": 1.0}, "TVG + VC, AR": {"tasks": ["VC", "AR"]}, "p = 0.4": {"tvg_prob": 0.4},
        "p = 0": {"tvg_prob": 0.0}, "cosine rewards": {"cosine_rewards": True}, "G = 16": {"group_size": 16},
        "beta 0": {"beta": 0.0}, "LoRA 16": {"lora_rank": 16, "learning_rate": 1e-3},
        "no std": {"scale_rewards": "none"}, "4 updates": {"num_iterations": 4}, "bnpo": {"loss_type": "bnpo"},
        "without Invert-SFT": {}, "answers alone": {"think": False, "max_tokens": toy.MAX_TOKENS[False]}}
    places = {"output", "model", "annotations", "videos", "cache", "eval_annotations", "eval_every", "eval_samples",
              "steps"}
    for arm, changes in expected.items():
        config = vars(parse(by_arm[arm].commands[0]))
        assert {key: config[key] for key in config if config[key] != base[key] and key not in places} == changes, arm
    starts = {arm: by_arm[arm].needs.folder for arm in ("without Invert-SFT", "answers alone", "G = 16", ALL)}
    assert starts["G = 16"] == starts[ALL] and len(set(starts.values())) == 3
    assert parse(by_arm["answers alone"].commands[1]).max_tokens == toy.MAX_TOKENS[False]


def test_as_many_tvg_steps_are_counted_from_the_draw(runs):
    by_key = {run.key[:3]: run for run in runs}
    for seed in range(2):
        drawn = Counter(tasks.draw(step, seed, 0.8, list(tasks.INVERSIONS)).name for step in range(100))
        config = parse(by_key["verbs", seed, TVG_STEPS].commands[0])
        assert config.steps == drawn["TVG"] < 100 and config.tvg_prob == 1


def test_every_claim_rests_on_runs_of_its_worlds(runs):
    there = {(run.key[0], run.key[2]) for run in runs}
    for claim in CLAIMS:
        for world in claim.worlds:
            assert {(world, arm) for arm in claim.better + claim.others} <= there, claim
    for experiment in EXPERIMENTS.values():
        assert experiment.against in experiment.arms and set(experiment.arms) <= ARMS.keys()


def test_published_rows_are_not_run_again(runs):
    """The rows of results/results.csv have the keys that today's flags give."""
    rows = report.read(experiments.ROOT / "results" / "results.csv")
    assert {run.key for run in runs} <= set(rows[report.KEY].itertuples(index=False, name=None))


@pytest.mark.parametrize("flags, message", [
    (dict(experiments=["table7"]), "table7: no such experiment; choose from table2, "),
    (dict(worlds=["mars"]), "mars: no such world; choose from verbs, edges, both"),
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
    """And the train flags are part of a row's key, so that other flags are another run."""
    start, alone, ours = experiments.make_runs(on_data(folder, tmp_path, "figure1"))
    assert parse(start.commands[0]).annotations == str(folder / "test.txt")
    training, evaluation = map(parse, ours.commands)
    assert training.steps == 2 and training.eval_every == 1 and training.annotations == str(folder / "train.txt")
    assert evaluation.max_tokens == parse(start.commands[0]).max_tokens == 16
    assert ours.key[3].startswith("--steps 2 ") and alone.key[3] == ours.key[3] + " --tvg_prob 1"


def test_dry_estimates_real_data(folder, warm, tmp_path, capsys):
    experiments.main(on_data(folder, tmp_path / "x", "table2", dry=True, launch="torchrun --nproc_per_node=2"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# data 0: start" and lines[-1] == "# 9 runs" and not (tmp_path / "x").exists()
    assert sum(line.startswith("torchrun --nproc_per_node=2 train.py --model") for line in lines) == 8
    estimates = [line for line in lines if ": estimated, not measured: " in line]
    assert len(estimates) == 8 and all(" GB per GPU (fits into 80 GB), 0 hours" in line for line in estimates)
    for line in lines:
        if not line.startswith("#"):
            parse(shlex.split(line)[2:])


def test_an_estimate_knows_the_run(monkeypatch):
    """Its GPUs, samples and what train.py shares with lab.plan."""
    asked = []
    monkeypatch.setattr(experiments.plan, "estimate", lambda config: asked.append(config) or 1 / 0)
    model = "Qwen/Qwen2.5-VL-3B-Instruct"
    command = ["train.py", "--model", model, "--annotations=", "--videos=", "--output=", "--steps", "7",
               "--prompts_per_step", "6", "--group_size", "4", "--lora_rank", "8"]
    with pytest.raises(ZeroDivisionError):
        experiments.cost(Config(launch="torchrun --nproc-per-node 3"), parse(command))
    config, = asked
    assert (config.model, config.gpus, config.samples) == (model, 3, 42)
    assert (config.group_size, config.prompts_per_step, config.lora_rank, config.max_tokens) == (4, 6, 8, 1024)


@pytest.mark.processes
def test_runs_on_data_once(folder, warm, tmp_path, capsys):
    """The whole way, with real processes: start, training, evaluation, rows, report; the second time nothing runs."""
    config = on_data(folder, tmp_path / "x", "figure1")
    experiments.main(config)
    rows = report.read(tmp_path / "x" / "results.csv").to_dict("records")
    assert [(row["arm"], row["steps"]) for row in rows] == [(ALL, 2), (TVG, 2), ("start", 0)]
    for row in rows:
        scores, = (tmp_path / "x" / "data" / "0").glob(f"{experiments.slug(row['arm'])}/test/scores.json")
        assert row["mIoU"] == pytest.approx(json.loads(scores.read_text())["mIoU"], abs=1e-5)
        assert row["seconds"] > 0 or row["arm"] == "start"
    assert json.loads(rows[0]["curve"])[0][0] == 0
    text = (tmp_path / "x" / "RESULTS.md").read_text()
    assert "## Figure 1, right: action understanding" in text
    first = capsys.readouterr().out
    experiments.main(config)
    assert "3 of 3 runs to do" in first and "0 of 3 runs to do" in capsys.readouterr().out
    assert (tmp_path / "x" / "RESULTS.md").read_text() == text


@pytest.mark.processes
def test_a_failed_run_is_named_and_the_others_go_on(folder, warm, tmp_path, capsys):
    """`python` stands for a program that fails whenever it is to train with p = 1."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\ncase \"$*\" in *tvg_prob\\ 1*) echo no luck; exit 3;; esac\n"
                       f"exec {sys.executable} \"$@\"\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit) as stopped:
        experiments.main(on_data(folder, tmp_path / "x", "figure1", launch=str(program)))
    printed = capsys.readouterr().out
    assert stopped.value.code == 1 and "data 0: TVG alone: FAILED with exit code 3: no luck" in printed
    assert "failed: data 0: TVG alone; the same command tries them again" in printed
    assert len(report.read(tmp_path / "x" / "results.csv")) == 2


def test_a_start_that_is_gone_is_made_again(tmp_path, monkeypatch):
    """Rows that are there stay, and all new ones are kept."""
    config = Config(output=str(tmp_path), experiments=["thoughts"], seeds=1)
    start, ours, other_start, other = experiments.make_runs(config)
    row = {**dict(zip(report.KEY, start.key)), "steps": 0, "seconds": 0.0, "mIoU": 0.5}
    report.write(tmp_path / "results.csv", [row])
    done = []

    def run_jobs(todo, parallel, threads, finish):
        for run in todo:
            done.append(run)
            finish(run)
        return []

    monkeypatch.setattr(jobs, "run", run_jobs)
    monkeypatch.setattr(experiments, "collect", lambda run: {**row, **dict(zip(report.KEY, run.key))})
    assert experiments.run_all(config, [start, ours, other_start, other], tmp_path / "results.csv") == []
    assert done == [start, ours, other_start, other]
    assert len(report.read(tmp_path / "results.csv")) == 4
    assert start.commands[0][:2] == [sys.executable, str(experiments.ROOT / "toy.py")]


def test_a_row_has_the_scores_and_what_the_thoughts_tell(tmp_path, monkeypatch):
    """On a made-up world, whose stories are those of the run's seed and start."""
    start, run, *_ = experiments.make_runs(Config(output=str(tmp_path), experiments=["thoughts"], worlds=["both"]))
    run = replace(run, key=("both", 4, *run.key[2:]))
    (run.folder / "test").mkdir(parents=True)
    (run.folder / "train").mkdir()
    (run.folder / "test" / "scores.json").write_text('{"mIoU": 0.1234567, "VC": 1.0, "other": 2}')
    prediction = {"task": "AR", "query": "the red circle is rising.", "completion": "<answer>falling</answer>"}
    (run.folder / "test" / "predictions.jsonl").write_text(json.dumps(prediction) + "\n")
    (run.folder / "train" / "metrics.jsonl").write_text('{"seconds": 1.5}\n{"seconds": 2.25}\n')
    (run.folder / "train" / "evaluations.jsonl").write_text('{"step": 0, "mIoU": 0.25}\n{"step": 2, "mIoU": 0.5}\n')
    asked = []
    monkeypatch.setattr(toy, "write_world", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(toy, "narrated", lambda rows, stories: {"narrated": 0.75, "missing": 0.1})
    row = experiments.collect(run)
    assert asked == [(start.folder, 4, 1000, 300, "both")]
    assert (row["mIoU"], row["VC"], row["narrated"], row["steps"], row["seconds"]) == (0.12346, 1.0, 0.75, 2, 3.8)
    assert json.loads(row["curve"]) == [[0, 0.25], [2, 0.5]]
    assert json.loads(row["confusion"])["rising"] == {"falling": 1}
    assert set(row) <= set(report.COLUMNS)


def test_what_ar_answers_is_counted_by_verb():
    rows = []
    for verb in ("rising", "falling", "falling", "a lot"):
        rows.append({"task": "AR", "query": "the red circle is rising.", "completion": f"<answer>{verb}</answer>"})
    rows.append({"task": "VD", "query": "the red circle is rising.", "completion": "<answer>rising</answer>"})
    counts = experiments.confusion(rows)
    assert counts["rising"] == {"rising": 1, "falling": 2, "other": 1} and counts["spinning"] == {}


def test_cases_are_those_of_seed_0_that_gained_and_lost_most(tmp_path, monkeypatch):
    runs = experiments.make_runs(Config(output=str(tmp_path), experiments=["figure1"], worlds=["edges"], seeds=2))
    for run in runs:
        if run.key[2] in (ALL, TVG):
            gain = run.key[2] == ALL
            (run.folder / "test").mkdir(parents=True)
            rows = [{"id": f"q{i}", "task": "TVG", "video": f"v{i}", "iou": 0.5 + gain * (i - 4) / 10 + run.key[1]}
                    for i in range(9)]
            (run.folder / "test" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
            (run.folder / "test" / "scores.json").write_text("{}")
    drawn = []
    monkeypatch.setattr(experiments.video, "load", lambda path: path)
    monkeypatch.setattr(experiments.plot, "examples", lambda clips, rows, path, thoughts: drawn.append((clips, rows)))
    experiments.draw_cases(runs, "edges", Path("x.png"))
    experiments.draw_cases(runs, "verbs", Path("x.png"))        # has no runs
    (clips, rows), = drawn
    assert clips == ["v8", "v7", "v4", "v5", "v0", "v1"]
    assert [row["with inversion"]["iou"] for row in rows] == pytest.approx([0.9, 0.8, 0.5, 0.6, 0.1, 0.2])
    assert {row["TVG alone"]["iou"] for row in rows} == {0.5}
