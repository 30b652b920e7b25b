"""The two ways agree; table and fit come from the numbers; evaluation is compared answer by answer."""
import json
from dataclasses import replace

import pytest
import torch

from lab import bench, decode, plan, ways

SMALL = bench.Config(grids=3, side=84, text=12, group_size=3, max_tokens=5, hidden=128, layers=2, vocabulary=300,
                     vision_hidden=64, vision_depth=4)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_ways_do_the_same():
    """The same log-probabilities, loss and gradients, and all parts timed."""
    config = replace(SMALL, prompts=2)
    policy, reference, optimizer = bench.set_up(config, "ours")
    ours = bench.step(config, "ours", policy, reference, optimizer)
    for each in (policy, reference):
        ways.as_published(each.qwen)
    theirs = bench.step(config, "repeated", policy, reference, optimizer)
    torch.testing.assert_close(torch.tensor(ours["logprobs"]), torch.tensor(theirs["logprobs"]), rtol=1e-5, atol=1e-5)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and ours["loss"] != 0
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4) and ours["grad_norm"] > 1e-3
    assert len(ours["logprobs"]) == 2 * 3 * 5 and (ours["prompt"], ours["grid"]) == (12 + 3 * 9, [3, 6, 6])
    assert list(ours["seconds"]) == list(theirs["seconds"]) == bench.PARTS


def test_the_ways_sample_the_same(monkeypatch):
    """Greedily, so that no random numbers matter."""
    policy = ways.build(SMALL)
    prompts = ways.make_prompts(SMALL, policy.qwen.config)
    ours = ways.shared_rollout(policy, prompts, 2, 9, None)
    monkeypatch.setattr(torch, "multinomial", lambda chances, count: chances.argmax(-1, keepdim=True))
    ways.as_published(policy.qwen)
    theirs = ways.repeated_rollout(policy, prompts, 2, 9, None)
    assert torch.equal(ours, theirs) and ours.shape == (1, 2, 9) and len(ours.unique()) > 2


def fake(seconds, **numbers):
    return {"seconds": dict.fromkeys(bench.PARTS, seconds), "before": 2 ** 30, "peak": 2 ** 31, "rate": 1e9,
            "loss": 1.0, "grad_norm": 1.0, "logprobs": [-1.0], "prompt": 39, "grid": [3, 6, 6], **numbers}


def test_table_and_last_line(monkeypatch, capsys):
    results = {"ours": iter([fake(2.0), fake(1.0), fake(0.5)]), "repeated": iter([fake(9.0, peak=2 ** 33)] * 3)}
    monkeypatch.setattr(bench, "child", lambda config, way: next(results[way]))
    bench.main(replace(SMALL, repeats=3))
    *lines, last = capsys.readouterr().out.splitlines()
    numbers = json.loads(last)
    assert numbers["ratio_step"] == numbers["ratio_scoring"] == 9 and numbers["ratio_memory"] == 4
    assert numbers["seconds"]["ours"]["step"] == 8 and numbers["seconds"]["ours"]["scoring"] == 3
    assert numbers["steps"]["ours"] == [16, 8, 4]
    phases = plan.operations(plan.shape_of(ways.shape(SMALL)), plan.Step(39, (3, 6, 6), 3, 5))
    scoring = sum(sum(phases[name].values()) for name in ("reference", "policy"))
    assert numbers["of_floor_scoring"] == pytest.approx(scoring / 1e9 / 3)
    step, = (line.split() for line in lines if line.startswith("step "))
    assert step[1:7] == ["8.00", "72.00", "4.00", "72.00", "16.00", "72.00"]


def test_ways_that_disagree_are_refused(monkeypatch):
    monkeypatch.setattr(bench, "child", lambda config, way: fake(1.0, grad_norm=1.0 + (way == "ours")))
    with pytest.raises(ValueError, match="differently"):
        bench.main(SMALL)


def test_fit(monkeypatch, capsys):
    def step(config, *_):
        g, p, c = config.group_size, config.text + config.grids * 9, config.max_tokens
        return {"seconds": {"all": 0.5 + 1e-3 * p + 2e-3 * c + 1e-4 * g * c + 2e-5 * g * p}, "prompt": p}

    monkeypatch.setattr(bench, "step", step)
    monkeypatch.setattr(bench, "set_up", lambda *_: (None,))
    bench.main(replace(SMALL, sweep=True))
    numbers = last_line(capsys)
    assert list(numbers["fit"].values()) == pytest.approx([0.5, 1e-3, 2e-3, 1e-4, 2e-5])
    assert numbers["residual"] < 1e-6 and len(numbers["points"]) == 14


def test_evaluation_gives_the_answers_of_generate(folder, warm, capsys):
    bench.main(replace(SMALL, evaluate=True, model=str(warm), annotations=str(folder / "test.txt"),
                       videos=str(folder / "videos"), max_tokens=24))
    numbers = last_line(capsys)
    assert numbers["same"] == 1 and numbers["ratio_evaluate"] > 0


def test_tokens_are_timed_and_kernels_counted(monkeypatch, capsys):
    """Both ways decode the same; kernels are those of one layer and token, and do not depend on the shape."""
    monkeypatch.setattr(decode, "ROUNDS", 1)
    monkeypatch.setattr(decode, "NARROW", dict(hidden=64, layers=3, max_tokens=8))
    bench.main(replace(SMALL, decode=True, max_tokens=10))
    numbers = last_line(capsys)
    for part in ("overhead", "arithmetic"):
        assert numbers[part]["same"] == 1 and min(numbers[part]["milliseconds"].values()) > 0
    assert numbers["kernels_per_layer"] == plan.KERNELS < numbers["kernels"]["generate"]
    assert numbers["overhead_ratio"] > 0 and numbers["decode_ratio"] > 0
    assert decode.kernels_per_layer(replace(SMALL, hidden=256, max_tokens=9)) == numbers["kernels"]


def test_views_are_no_kernels():
    x = torch.zeros(3, 4)
    with decode.Counter() as counter:
        x.view(4, 3).t()
        assert counter.kernels == 0
        x.add_(1).mul(2)
    assert counter.kernels == 2


def test_flags_that_cannot_be():
    with pytest.raises(ValueError, match="--only theirs"):
        bench.main(replace(SMALL, only="theirs"))
