"""What plan.py estimates, against real modules: parameters, operations, and memory as torch's profiler sees it."""
import json
from dataclasses import fields, replace

import pytest
import torch
from conftest import together
from torch.utils.flop_counter import FlopCounterMode

import grpo
import model
import train
from engine import distributed, lora
from lab import plan, ways

SIZES = {"wide": ways.Sizes(hidden=256, layers=2, vision_hidden=64, vision_depth=4, vocabulary=4000, grids=6,
                            side=112, group_size=6, max_tokens=30, text=20),
         "deep": ways.Sizes(hidden=128, layers=5, vision_hidden=128, vision_depth=5, vocabulary=9000, grids=4,
                            side=168, group_size=3, max_tokens=70, text=40, prompts=2)}
NAME = "Qwen/Qwen2.5-VL-{}-Instruct"
TOTAL = 3754622976      # weights of the 3B, by the published folder
STEP = plan.Step(1500, (30, 16, 12), 8, 512)


def estimate(name="3B", **flags) -> plan.Estimate:
    return plan.estimate(plan.Config(model=NAME.format(name), **flags))


def step_of(sizes, prompt, **changes) -> plan.Step:
    return plan.Step(len(prompt.input_ids), prompt.video_grid_thw.tolist(), sizes.group_size, sizes.max_tokens,
                     prompts=sizes.prompts, **changes)


@pytest.fixture(params=SIZES)
def small(request):
    """(sizes, policy, prompts, completions) of two models of different proportions."""
    sizes = SIZES[request.param]
    policy = ways.build(sizes)
    prompts = ways.make_prompts(sizes, policy.qwen.config)
    shape = sizes.prompts, sizes.group_size, sizes.max_tokens
    return sizes, policy, prompts, torch.ones(shape, dtype=torch.long)


def highest(work) -> int:
    """The most bytes at once that torch allocated on the CPU during work()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(changes.cumsum(0).max())


@pytest.mark.parametrize("name, total, adapters", [("3B", TOTAL, 29933568), ("7B", 8292166656, 40370176)])
def test_the_published_models_need_no_folder(tmp_path, monkeypatch, name, total, adapters):
    """By name the same estimate as from their config.json, which has the decoder's fields at the top, as older
    transformers wrote it; nothing is looked for on the hub."""
    known = plan.PUBLISHED[NAME.format(name)]
    (tmp_path / "config.json").write_text(json.dumps({
        **known, **known["text_config"], "model_type": "qwen2_5_vl", "text_config": None,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}))
    told = plan.estimate(plan.Config(model=str(tmp_path), lora_rank=16))
    monkeypatch.setattr(plan.model_folder, "local_folder", pytest.fail)
    assert replace(told, shape=None) == replace(estimate(name, lora_rank=16), shape=None)
    assert told.shape.total == total and told.memory["always"]["adapters, fp32"] == 4 * adapters / 8


def test_of_a_model_on_the_hub_the_config_alone_is_downloaded(folder, monkeypatch):
    monkeypatch.setattr(plan.model_folder, "local_folder",
                        lambda name, config_only: {("org/tiny", True): str(folder / "model")}[name, config_only])
    assert plan.config_of("org/tiny").text_config.num_hidden_layers == 4


def test_operations_are_those_that_torch_counts(small):
    """The plain forward pass of one sequence; its attention is not halved, and it has all logits."""
    sizes, policy, prompts, _ = small
    policy.qwen.set_attn_implementation("eager")
    inputs, text = ways.repeat(prompts[:1], 1), policy.qwen.config.text_config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.qwen(**inputs)
    length = len(prompts[0].input_ids)
    alone = replace(step_of(sizes, prompts[0]), group_size=0)
    counted = plan.forward_operations(plan.shape_of(ways.shape(sizes)), alone)
    upper = 2 * text.num_hidden_layers * text.hidden_size * length * (length - 1)
    logits = 2 * length * text.hidden_size * text.vocab_size
    assert counter.get_total_flops() == pytest.approx(counted["vision"] + counted["prompt"] + upper + logits, rel=0.01)


def test_operations_of_phases():
    """A lone completion is a longer prompt. A backward pass costs two forward ones, with adapters one; a frozen vision
    tower sees a video once, and each AdamW step scores the policy again."""
    shape, step = plan.shape_of(ways.shape(SIZES["deep"])), plan.Step(100, (2, 4, 4), 8, 30)
    whole = plan.forward_operations(shape, plan.Step(130, (2, 4, 4), 0, 0))
    alone = plan.forward_operations(shape, replace(step, group_size=1))
    group = plan.forward_operations(shape, step)
    assert alone["prompt"] + alone["completions"] == whole["prompt"] and alone["vision"] == whole["vision"]
    assert group["completions"] == 8 * alone["completions"] and group["logits"] == 8 * alone["logits"]
    assert plan.operations(shape, step)["policy"] == {part: 3 * number for part, number in group.items()}
    del group["vision"]
    frozen = plan.operations(shape, replace(step, reference=False, freeze_vision=True, num_iterations=5))
    assert frozen["policy"] == {part: 15 * number for part, number in group.items()} and "reference" not in frozen
    assert frozen["prefill"]["vision"] == alone["vision"]
    assert plan.operations(shape, replace(step, lora_rank=4))["policy"] == {
        part: 2 * number for part, number in group.items()}


@pytest.mark.parametrize("dtype, recompute, freeze", [(torch.bfloat16, False, False), (torch.float32, False, True),
                                                      (torch.float32, True, False)])
def test_memory_of_scoring_is_as_measured(small, dtype, recompute, freeze):
    """Peak of forward and backward pass, beside weights and gradients."""
    sizes, policy, prompts, completions = small
    policy.to(dtype)
    policy.qwen.model.visual.requires_grad_(not freeze)
    if recompute:
        distributed.gradient_checkpointing(policy)
    for weight in policy.parameters():
        weight.grad = torch.zeros_like(weight)
    measured = highest(lambda: grpo.logprobs(policy, prompts, completions, completions).sum().backward())
    step = step_of(sizes, prompts[0], freeze_vision=freeze, gradient_checkpointing=recompute,
                   number_bytes=dtype.itemsize)
    scoring = plan.memory(plan.shape_of(ways.shape(sizes)), step)["scoring"]
    assert scoring["activations"] + scoring["logits, then a layer"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("grids, rows", [(2, 64), (12, 16)])
def test_memory_of_the_cache_is_as_measured(grids, rows):
    """Peak of rollouts in which keys and values, and weights side by side, are nearly everything."""
    sizes = ways.Sizes(hidden=128, layers=24, vision_hidden=64, vision_depth=1, vocabulary=300, grids=grids,
                       side=112, text=10, group_size=rows, max_tokens=3)
    policy = ways.build(sizes)
    prompts, shape = ways.make_prompts(sizes, policy.qwen.config), plan.shape_of(ways.shape(sizes))
    measured = highest(lambda: grpo.sample(policy, prompts, rows, 3, [-1]))
    counted = plan.cache_bytes(shape, step_of(sizes, prompts[0], number_bytes=4)) + plan.joined_bytes(shape, 4)
    assert counted == pytest.approx(measured, rel=0.15)


def lora_step(name, dtype, recompute) -> tuple[int, float]:
    """(the most bytes at once of two steps with adapters, as train.py takes them on one GPU, what plan.py says)."""
    sizes = SIZES[name]
    policy = ways.build(sizes)
    lora.attach(policy.qwen, "", 16)
    for weight in lora.frozen(policy):
        weight.data = weight.data.to(dtype)
    if recompute:
        distributed.gradient_checkpointing(policy)
    policy = distributed.shard(policy, dtype)
    prompts = ways.make_prompts(sizes, policy.qwen.config)
    completions = torch.ones(sizes.prompts, sizes.group_size, sizes.max_tokens, dtype=torch.long)
    optimizer = torch.optim.AdamW(lora.adapters(policy).values())

    def work():
        with distributed.gathered(policy):
            seen = model.see(policy, prompts)
            grpo.sample(policy, seen, sizes.group_size, sizes.max_tokens, [-1])
        with torch.no_grad(), lora.reference(policy):
            grpo.logprobs(policy, seen, completions, completions)
        grpo.logprobs(policy, seen, completions, completions).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    weights = sum(weight.nbytes for weight in policy.parameters())
    step = step_of(sizes, prompts[0], lora_rank=16, gradient_checkpointing=recompute, number_bytes=dtype.itemsize)
    parts = plan.memory(plan.shape_of(ways.shape(sizes)), step)
    parts["always"]["frozen weights, bf16"] *= dtype.itemsize / 2       # they are fp32 where that is computed with
    return weights + highest(lambda: [work(), work()]), plan.peak(parts)


@pytest.mark.processes
@pytest.mark.parametrize("dtype, recompute", [(torch.bfloat16, True), (torch.float32, False)])
def test_memory_of_a_step_with_adapters_is_as_measured(tmp_path, dtype, recompute):
    """All of it, in a process of its own, for two models of different proportions."""
    for name in SIZES:
        (measured, estimated), = together(tmp_path / name, 1, 1, lora_step, name, dtype, recompute)
        assert estimated == pytest.approx(measured, rel=0.15), name


def test_memory_is_spread_over_the_gpus():
    """Weights, two AdamW states, gradients in fp32 and the reference in bf16; what a frozen tower saves; with adapters
    a whole model on each GPU and little else."""
    shape = plan.shape_of_model(NAME.format("3B"))
    one, eight = plan.memory(shape, STEP), plan.memory(shape, replace(STEP, gpus=8))
    always = sum(one["always"].values())
    assert always == (4 + 8 + 4 + 2) * TOTAL == 8 * sum(eight["always"].values())
    assert eight["sampling"] == one["sampling"]
    frozen = plan.memory(shape, replace(STEP, freeze_vision=True, reference=False))
    assert always - sum(frozen["always"].values()) == 12 * 668684288 + 2 * TOTAL
    assert frozen["scoring"]["activations"] < one["scoring"]["activations"]
    adapters = plan.memory(shape, replace(STEP, gpus=8, lora_rank=16))["always"]
    assert sum(adapters.values()) == 2 * TOTAL + 16 * 29933568 / 8
    assert plan.peak({"always": {"a": 1, "b": 2}, "x": {"c": 3}, "y": {"d": 1, "e": 3}}) == 7


def test_seconds_and_hours():
    """Hours are of all steps of an epoch. Prompts one after the other take as many times the tokens' reading and
    launching; recomputation is one more forward pass beside three, or with adapters beside two."""
    whole = estimate(gpus=2, prompts_per_step=8)
    assert whole.hours == pytest.approx(sum(whole.seconds.values()) * 12404 / 8 / 3600)
    token = 2 * TOTAL / plan.BANDWIDTH + 36 * plan.KERNELS * plan.LAUNCH
    assert whole.seconds["decode"] == pytest.approx(1024 * token)
    halves = estimate(gpus=2, prompts_per_step=8, micro_batch_size=2)
    assert halves.seconds["decode"] == pytest.approx(2 * 1024 * token)
    assert whole.memory["sampling"]["KV cache"] == 2 * halves.memory["sampling"]["KV cache"]
    for rank, share in ((0, 4 / 3), (16, 3 / 2)):
        plain, again = (estimate(lora_rank=rank, gradient_checkpointing=on) for on in (False, True))
        assert again.seconds["policy"] == pytest.approx(share * plain.seconds["policy"])
        assert again.memory["scoring"]["activations"] < plain.memory["scoring"]["activations"] / 8
    assert estimate(think=False).operations == estimate(max_tokens=64).operations != whole.operations
    assert estimate(tflops=30.0).seconds["policy"] == 2 * estimate().seconds["policy"]


def test_report(capsys):
    """The largest group that it names fits and the next does not; as many queries as it names fill a GPU."""
    config = plan.Config(model=NAME.format("3B"), prompts_per_step=8, max_tokens=256)
    plan.main(config)
    text = capsys.readouterr().out
    assert "3.75 billion weights" in text and "\nfits into 80 GB" in text and "hours per epoch" in text
    assert "multiple of the GPUs" not in text and "estimated" in text
    largest = int(text.split("largest group that fits: ")[1].split(",")[0])
    assert "\nfits" in plan.report(replace(config, group_size=largest))
    assert "DOES NOT FIT" in plan.report(replace(config, group_size=largest + 1))
    queries = int(text.split("--batch_size ")[1].split()[0])
    told = plan.estimate(config)
    one = plan.cache_bytes(told.shape, replace(told.step, group_size=1)) + plan.work_bytes(told.shape, told.step.prompt)
    weights = 2 * TOTAL + plan.joined_bytes(told.shape)
    assert weights + queries * one <= told.room == 80e9 - plan.LIBRARIES < weights + (queries + 1) * one
    small = plan.report(plan.Config(model=config.model, gpus=1, gpu_memory=5.0, prompts_per_step=3))
    assert "group that fits: none" in small and "--batch_size 0 " in small
    assert "16 instead of 12" in plan.report(replace(config, prompts_per_step=12))


def test_its_flags_have_train_s_defaults():
    trained = {field.name: field.default for field in fields(train.Config)}
    for field in fields(plan.Config):
        assert trained.get(field.name, field.default) == field.default, field.name


@pytest.mark.parametrize("flag, value", [
    ("gpus", 0), ("gpu_memory", float("nan")), ("tflops", 0), ("group_size", 1), ("prompts_per_step", 0),
    ("seconds", -1), ("lora_rank", -1), ("model", "nowhere")])
def test_wrong_flags(flag, value):
    with pytest.raises(ValueError, match=f"--{flag}|nowhere"):
        plan.main(replace(plan.Config(model=NAME.format("3B")), **{flag: value}))


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "hidden_size": 64}')
    with pytest.raises(ValueError, match="qwen3_vl"):
        plan.main(plan.Config(model=str(tmp_path)))
