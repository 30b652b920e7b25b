"""What plan.py counts, against real modules: parameters, operations, and memory as torch's profiler sees it."""
import json
import re
from dataclasses import MISSING, fields, replace

import pytest
import torch
from test_distributed import together
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import grpo
import model
import train
from engine import attention, distributed, lora, sampling
from lab import plan, ways

SHAPES = {"wide": ways.Sizes(hidden=256, layers=2, vision_hidden=64, vision_depth=4, vocabulary=4000, grids=6,
                             side=112, group_size=6, max_tokens=30, text=20),
          "deep": ways.Sizes(hidden=128, layers=5, vision_hidden=128, vision_depth=5, vocabulary=9000, grids=4,
                             side=168, group_size=3, max_tokens=70, text=40, prompts=2)}
PUBLISHED = {   # as the 3B and 7B folders have it, and as older transformers wrote it: the decoder's fields at the top
    "3B": dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_hidden_layers=36,
               num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)}


def write(folder, name):
    shape = PUBLISHED[name]
    (folder / "config.json").write_text(json.dumps(dict(
        shape, model_type="qwen2_5_vl", rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, window_size=112,
                           out_hidden_size=shape["hidden_size"], fullatt_block_indexes=[7, 15, 23, 31]))))
    return str(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_need_no_folder(tmp_path, monkeypatch, name):
    """By name the same plan as from their config.json, and nothing is looked for on the hub."""
    monkeypatch.setattr(plan.model_folder, "local_folder", pytest.fail)
    found = plan.report(plan.Config(f"Qwen/Qwen2.5-VL-{name}-Instruct")).splitlines()
    monkeypatch.undo()
    assert found[1:] == plan.report(plan.Config(write(tmp_path, name))).splitlines()[1:]


@pytest.fixture(params=SHAPES)
def small(request):
    """(config, policy, prompts, completions) of two models of different proportions."""
    config = SHAPES[request.param]
    policy = ways.build(config)
    prompts = ways.make_prompts(config, policy.qwen.config)
    return config, policy, prompts, torch.ones(config.prompts, config.group_size, config.max_tokens, dtype=torch.long)


def most(work) -> int:
    """The most bytes at once that torch allocated on the CPU during work()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(changes.cumsum(0).max())


@pytest.mark.parametrize("name, total", [("3B", 3754622976), ("7B", 8292166656)])
def test_parameters_are_the_real_model_s(name, total, tmp_path):
    config = Qwen2_5_VLConfig.from_pretrained(write(tmp_path, name))
    with torch.device("meta"):
        qwen = Qwen2_5_VLForConditionalGeneration(config)
    qwen.tie_weights()
    count = lambda module: sum(weight.numel() for weight in module.parameters())
    sizes = plan.parameters(config)
    assert sizes["total"] == count(qwen) == total
    assert sizes["vision"] == count(qwen.model.visual) and sizes["layer"] == count(qwen.model.language_model.layers[0])


def test_operations_are_those_that_torch_counts(small):
    """The plain forward pass of one sequence; its attention is not halved, and it has all logits."""
    _, policy, prompts, _ = small
    policy.qwen.set_attn_implementation("eager")
    inputs, config = ways.repeat(prompts[:1], 1), policy.qwen.config
    length, grid, text = len(prompts[0].ids), prompts[0].grid.tolist(), config.text_config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.qwen(**inputs)
    counted = plan.forward_operations(config, length, grid, 0, 0)
    upper = 2 * text.num_hidden_layers * text.hidden_size * length * (length - 1)
    expected = counted["vision"] + counted["prompt"] + upper + 2 * length * text.hidden_size * text.vocab_size
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_a_lone_completion_is_a_longer_prompt():
    config = ways.shape(SHAPES["deep"])
    whole = plan.forward_operations(config, 130, (2, 4, 4), 0, 0)
    parts = plan.forward_operations(config, 100, (2, 4, 4), 1, 30)
    assert parts["prompt"] + parts["completions"] == whole["prompt"] and parts["vision"] == whole["vision"]
    group = plan.forward_operations(config, 100, (2, 4, 4), 8, 30)
    assert group["completions"] == 8 * parts["completions"] and group["logits"] == 8 * parts["logits"]
    phases = plan.operations(config, 100, (2, 4, 4), 8, 30, reference=False, freeze_vision=True)
    assert phases["policy"] == {part: 3 * cost for part, cost in group.items() if part != "vision"}
    again = plan.operations(config, 100, (2, 4, 4), 8, 30, False, True, updates=3)      # only the policy is scored anew
    assert again == {**phases, "policy": {part: 3 * cost for part, cost in phases["policy"].items()}}
    assert phases["prefill"]["vision"] == group["vision"]
    assert "reference" not in phases and phases["decode"]["completions"] < group["completions"]


@pytest.mark.parametrize("dtype, recompute, freeze", [(torch.bfloat16, False, False), (torch.float32, False, True),
                                                      (torch.float32, True, False)])
def test_memory_of_scoring_is_as_measured(small, monkeypatch, dtype, recompute, freeze):
    """Peak of forward and backward pass, beside weights and gradients, with attention as on GPUs."""
    monkeypatch.setattr(attention, "MERGED", ())
    config, policy, prompts, completions = small
    policy.to(dtype)
    policy.qwen.model.visual.requires_grad_(not freeze)
    if recompute:
        distributed.gradient_checkpointing(policy)
    for weight in policy.parameters():
        weight.grad = torch.zeros_like(weight)
    measured = most(lambda: grpo.logprobs(policy, prompts, completions, completions).sum().backward())
    parts = plan.memory(policy.qwen.config, len(prompts[0].ids), prompts[0].grid.tolist(), config.group_size,
                        config.max_tokens, 1, config.prompts, True, freeze, recompute, dtype.itemsize)["scoring"]
    assert parts["activations"] + parts["logits, then a layer"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("grids, rows", [(2, 64), (12, 16)])
def test_memory_of_the_cache_is_as_measured(grids, rows):
    """Peak of rollouts in which keys and values, and weights side by side, are nearly everything."""
    config = ways.Sizes(hidden=128, layers=24, vision_hidden=64, vision_depth=1, vocabulary=300, grids=grids,
                        side=112, text=10)
    policy = ways.build(config)
    prompts = ways.make_prompts(config, policy.qwen.config)
    measured = most(lambda: grpo.rollout(policy, prompts, rows, 3, [-1]))
    counted = plan.cache_bytes(policy.qwen.config, len(prompts[0].ids), rows, 3, 4)
    counted += plan.joined_bytes(policy.qwen.config, 4)
    assert counted == pytest.approx(measured, rel=0.15)


def lora_step(name, dtype, recompute) -> tuple[int, float]:
    """(the most bytes at once of two steps with adapters, as train.py takes them on one GPU, what plan.py says)."""
    attention.MERGED = ()
    config, rank = SHAPES[name], 16
    policy = ways.build(config)
    lora.attach(policy.qwen, "", rank)
    for weight in lora.frozen(policy):
        weight.data = weight.data.to(dtype)
    if recompute:
        distributed.gradient_checkpointing(policy)
    policy, prompts = distributed.shard(policy, dtype), ways.make_prompts(config, policy.qwen.config)
    completions = torch.ones(config.prompts, config.group_size, config.max_tokens, dtype=torch.long)
    optimizer = torch.optim.AdamW(lora.adapters(policy).values())

    def work():
        with distributed.gathered(policy):
            seen = model.see(policy, prompts)
            grpo.rollout(policy, seen, config.group_size, config.max_tokens, [-1])
        score = lambda: grpo.logprobs(policy, seen, completions, completions).sum()
        with torch.no_grad(), lora.reference(policy):
            score()
        score().backward()
        optimizer.step()
        optimizer.zero_grad()

    weights = sum(weight.nbytes for weight in policy.parameters())
    parts = plan.memory(policy.qwen.config, len(prompts[0].ids), prompts[0].grid.tolist(), config.group_size,
                        config.max_tokens, 1, config.prompts, recompute=recompute, size=dtype.itemsize, rank=rank)
    parts["always"]["frozen weights, bf16"] *= dtype.itemsize / 2       # they are fp32 where that is computed with
    return weights + most(lambda: [work(), work()]), plan.peak(parts)


@pytest.mark.processes
@pytest.mark.parametrize("dtype, recompute", [(torch.bfloat16, True), (torch.float32, False)])
def test_memory_of_a_step_with_adapters_is_as_measured(tmp_path, dtype, recompute):
    """All of it, in a process of its own, for two models of different proportions."""
    for name in SHAPES:
        (measured, planned), = together(tmp_path / name, 1, 1, lora_step, name, dtype, recompute)
        assert planned == pytest.approx(measured, rel=0.15), name


def test_adapters(tmp_path, small):
    """Their number; a whole model on each GPU but nothing else, no second one, and two thirds of the operations."""
    _, policy, *_ = small
    lora.attach(policy.qwen, "", 8)
    count = sum(weight.numel() for weight in lora.adapters(policy).values())
    config = policy.qwen.config
    assert count == config.text_config.num_hidden_layers * plan.adapter_parameters(config, 8)
    one, eight = (plan.memory(config, 100, (6, 8, 8), 8, 64, gpus, rank=8)["always"] for gpus in (1, 8))
    assert sum(one.values()) == 2 * plan.parameters(config)["total"] + 16 * count
    assert sum(eight.values()) == 2 * plan.parameters(config)["total"] + 2 * count
    frozen, adapters = (plan.operations(config, 100, (6, 8, 8), 8, 64, freeze_vision=True, lora=on)["policy"]
                        for on in (False, True))
    assert {part: 2 * cost for part, cost in frozen.items()} == {part: 3 * cost for part, cost in adapters.items()}
    for name, memory in (("3B", 16), ("7B", 24)):
        settings = plan.Config(write(tmp_path, name), gpus=1, gpu_memory=memory, max_tokens=256, prompts_per_step=1,
                               gradient_checkpointing=True)
        less = plan.report(replace(settings, lora_rank=16))
        assert "DOES NOT FIT" in plan.report(settings) and "DOES NOT" not in less
    assert "40.4 million in adapters of rank 16" in less


def test_shards_and_options(tmp_path):
    config = Qwen2_5_VLConfig.from_pretrained(write(tmp_path, "3B"))
    one, eight = (plan.memory(config, 1500, (30, 16, 12), 8, 512, gpus) for gpus in (1, 8))
    total = 3754622976
    assert sum(one["always"].values()) == (4 + 8 + 4 + 2) * total
    assert sum(eight["always"].values()) == sum(one["always"].values()) / 8
    assert eight["sampling"] == one["sampling"]
    frozen = plan.memory(config, 1500, (30, 16, 12), 8, 512, 1, freeze_vision=True, reference=False)
    assert sum(one["always"].values()) - sum(frozen["always"].values()) == 12 * 668684288 + 2 * total
    assert frozen["scoring"]["activations"] < one["scoring"]["activations"]
    less = plan.memory(config, 1500, (30, 16, 12), 8, 512, 1, recompute=True)
    assert less["scoring"]["activations"] < one["scoring"]["activations"] / 8


def test_report_of_other_ways_to_train(tmp_path):
    """TFLOP a step: without thoughts completions are a sixteenth as long; each update more scores the policy again."""
    folder = write(tmp_path, "3B")
    flop = lambda **flags: int(re.search(r"(\d+) TFLOP a step", plan.report(plan.Config(folder, **flags)))[1])
    assert plan.Config(folder).max_tokens == 1024 and plan.Config(folder, think=False).max_tokens == 64
    assert flop(think=False) == flop(max_tokens=64) < flop() / 3 and flop(updates=2) > 1.4 * flop()


def test_report(tmp_path, capsys):
    """A folder with nothing but config.json; the largest group it names fits and the next does not."""
    config = plan.Config(write(tmp_path, "3B"), gpus=8, gpu_memory=80, prompts_per_step=8, max_tokens=256)
    plan.main(config)
    text = capsys.readouterr().out
    assert "3.75 billion weights" in text and "fits into 80 GB" in text and "hours an epoch" in text
    assert "multiple of the GPUs" not in text
    largest = int(text.split("largest group that fits: ")[1].split(",")[0])
    again = lambda size: plan.report(replace(config, group_size=size))
    assert "DOES NOT" not in again(largest) and "DOES NOT FIT" in again(largest + 1)
    assert "group that fits: none" in plan.report(plan.Config(config.model, gpus=1, gpu_memory=24, max_tokens=256))
    recomputed = plan.report(replace(config, gradient_checkpointing=True))
    assert int(recomputed.split("largest group that fits: ")[1].split()[0]) > largest
    assert "16 instead of 12" in plan.report(replace(config, prompts_per_step=12))


def test_rows_that_fit_beside_the_weights(tmp_path):
    """As many prompts as the report names fill what the weights leave, and one more is too many."""
    config, qwen = plan.Config(write(tmp_path, "3B"), gpus=8), Qwen2_5_VLConfig.from_pretrained(str(tmp_path))
    rows, prompts, queries = (int(n) for n in re.search(r"(\d+) rows can be .*, (\d+) prompts of 8 .* (\d+) queries",
                                                        plan.report(config)).groups())
    tokens = int(re.search(r"prompt\(s\) of (\d+) tokens", plan.report(config))[1])
    assert rows == 8 * prompts and 40 < prompts < 300 and queries > prompts
    weights = 2 * plan.parameters(qwen)["total"] + plan.joined_bytes(qwen)
    one = plan.cache_bytes(qwen, tokens, 1, 1024) + plan.work_bytes(qwen, tokens)
    assert weights + queries * one <= 80e9 - plan.LIBRARIES < weights + (queries + 1) * one
    assert "0 rows" in plan.report(replace(config, gpu_memory=5.0))
    more = plan.report(replace(config, compile=True))
    assert "KV cache, compiled" in more and int(re.search(r"(\d+) rows", more)[1]) < rows


def test_a_token_takes_reading_and_launching(tmp_path):
    config, qwen = plan.Config(write(tmp_path, "3B")), Qwen2_5_VLConfig.from_pretrained(str(tmp_path))
    read = 2 * 3754622976 / plan.BANDWIDTH
    launch = 36 * plan.KERNELS * plan.LAUNCH
    assert plan.token_seconds(qwen) == pytest.approx(read + launch) and plan.token_seconds(qwen, True) == read
    seconds = lambda **flags: float(re.search(r"decode ([\d.]+) s", plan.report(replace(config, **flags)))[1])
    assert seconds() == pytest.approx(1024 * (read + launch), abs=0.1)
    assert seconds(compile=True) == pytest.approx(1024 * read, abs=0.1)
    assert "launched" in plan.report(config) and "launched" not in plan.report(replace(config, compile=True))


@pytest.mark.parametrize("total, expected", [(80e9, 64), (24e9, 13), (8e9, 1), (1000e9, 256)])
def test_queries_at_once(tmp_path, monkeypatch, total, expected):
    """By the memory of a made-up GPU, of a folder and of adapters whose model it is; 16 without a GPU."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, "3B")
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(int(7.5e9))       # a hole
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (adapters / "adapter_model.safetensors").write_bytes(b"0" * 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total // 3, total))
    at_once = lambda name, compile=False, device="cuda:0": sampling.queries_at_once(str(name), 1024, 2809856, compile,
                                                                                    device)
    assert at_once(folder) == at_once(adapters) == pytest.approx(expected, rel=0.2)
    assert at_once(folder, device="cpu") == 16
    assert at_once(folder, True) < at_once(folder) or expected in (1, 256)


def test_its_flags_are_train_s():
    """With the same defaults; the rest is of plan.py alone."""
    trained = {field.name: field.default for field in fields(train.Config)}
    mine = {field.name: field.default for field in fields(plan.Config)}
    assert {name: trained.get(name) for name in mine.keys() & trained.keys()} == \
        {name: mine[name] for name in mine.keys() & trained.keys()} and mine["model"] is MISSING
    assert mine.keys() - trained.keys() == {"gpus", "gpu_memory", "tflops", "samples", "seconds", "text_tokens"}


@pytest.mark.parametrize("flags, named", [
    ("--gpus 0", "--gpus 0"), ("--gpu_memory nan", "--gpu_memory nan"), ("--tflops 0", "--tflops 0"),
    ("--group_size 1", "--group_size 1"), ("--prompts_per_step 0", "--prompts_per_step 0"),
    ("--seconds -1", "--seconds -1"), ("--model nowhere", "nowhere"), ("--gpu 8", "--gpu 8")])
def test_wrong_flags_end_with_one_line(flags, named, tmp_path, monkeypatch, capsys):
    """As `python -m lab.plan` parses them, and exit code 2."""
    monkeypatch.setattr("sys.argv", ["plan.py", "--model", write(tmp_path, "3B"), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        flags.command_line(plan.Config, plan.main, plan.__doc__)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and named in lines[0]


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "hidden_size": 64}')
    with pytest.raises(ValueError, match="qwen3_vl.*--model"):
        plan.main(plan.Config(str(tmp_path)))
