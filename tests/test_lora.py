"""LoRA: adapters learn what all weights would, are nothing when off, and are a folder that peft reads."""
import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from conftest import finish, start
from safetensors.torch import load_file, save_file
from test_distributed import together, whole
from test_resume import assert_same, lines, rows, survive
from test_train import config, sft_config
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import evaluate
import ground
import grpo
import model
import sft
import train
from engine import distributed, lora
from engine.attention import Packed
from engine.video import Clip

LINEAR = [f"model.language_model.layers.{i}.{name}_proj" for i in range(4)
          for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")]


def build(folder, rank=4, seed=1, noise=0.05, dtype=torch.float32):
    """(policy, encoder) that learns adapters, which noise has moved away from those that change nothing."""
    policy, encoder = model.load(str(folder), dtype=dtype, lora_rank=rank, seed=seed)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in lora.adapters(policy).values():
            weight += noise * torch.randn(weight.shape, generator=random)
    return policy, encoder


@pytest.fixture
def scored(prompts):
    """score(policy): log-probabilities of completions of two prompts."""
    completions = torch.randint(20, 200, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    return lambda policy: grpo.logprobs(policy, prompts, completions, torch.ones_like(completions))


def test_all_linear_layers_of_the_language_model_learn_and_nothing_else(folder):
    policy, _ = model.load(str(folder / "model"), lora_rank=3)
    learning = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    assert {name.partition(".lora_")[0] for name in learning} == {f"qwen.{name}" for name in LINEAR}
    assert learning.keys() == lora.adapters(policy).keys() and len(learning) == 2 * len(LINEAR)
    for name, layer in policy.qwen.named_modules():
        if name in LINEAR:
            assert isinstance(layer.base_layer, nn.Linear) and layer.scaling["default"] == 2
            assert layer.lora_A["default"].weight.shape == (3, layer.in_features)


@pytest.mark.parametrize("start", [[], ["start"]], ids=["fresh", "from adapters"])
def test_the_reference_is_the_model_that_training_began_with(folder, tmp_path, scored, start):
    """With the adapters off, to the bit; before anything is learned, with them on, too. None and others are left as
    they are."""
    source = folder / "model"
    if start:
        model.save(*build(source, 4, 5, 0.1), tmp_path / "start")
        source = tmp_path / "start"
    policy, _ = model.load(str(source), lora_rank=4, seed=3)
    # of a start of adapters, the same numbers are to be had without merging only
    plain = policy if start else model.load(str(source))[0]
    with torch.no_grad():
        expected = scored(plain)
        assert torch.equal(scored(policy), expected)
        for name, weight in lora.adapters(policy).items():
            weight += 0.1
        changed = scored(policy)
        with lora.reference(policy), lora.reference(None):
            assert torch.equal(scored(policy), expected)
        assert (changed - expected).abs().max() > 0.1 and torch.equal(scored(policy), changed)
        other, _ = model.load(str(source))
        merged = scored(other)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
        with lora.reference(other):
            assert torch.equal(scored(other), merged)
    with pytest.raises(KeyError), lora.reference(policy):
        raise KeyError
    assert torch.equal(scored(policy).detach(), changed)


def test_the_seed_alone_draws_a(folder):
    draw = lambda seed: lora.adapters(model.load(str(folder / "model"), lora_rank=8, seed=seed)[0])
    torch.manual_seed(5)
    one = draw(1)
    torch.manual_seed(6)
    again, other = draw(1), draw(2)
    for name, weight in one.items():
        assert torch.equal(weight, again[name]) and torch.equal(weight, other[name]) == (".lora_B." in name)
        if ".lora_A." in name:
            bound = weight.shape[1] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound and weight.std().item() == \
                pytest.approx(bound / 3 ** 0.5, rel=0.1)


def test_full_rank_learns_what_all_weights_would(folder, scored):
    """One step of gradient descent on B moves the merged weights along the gradient of a full update, where the rank
    is that of the widest layer and A's columns are orthonormal: the change is -lr s^2 G A^T A, and A^T A = 1."""
    policy, _ = model.load(str(folder / "model"), lora_rank=384)
    full, _ = model.load(str(folder / "model"))
    weight = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
    (scored(full) * weight).sum().backward()
    for name, part in lora.adapters(policy).items():
        if ".lora_A." in name:
            nn.init.orthogonal_(part)
    before = {name: value.clone() for name, value in policy.qwen.state_dict().items()}
    (scored(policy) * weight).sum().backward()
    with torch.no_grad():
        for name, part in lora.adapters(policy).items():
            if ".lora_B." in name:
                part -= 1e-3 * part.grad
    old, new = (lora.merge(policy.qwen, state) for state in (before, policy.qwen.state_dict()))
    for name, value in full.qwen.named_parameters():
        change = new[name] - old[name]
        if name.removesuffix(".weight") in LINEAR:
            torch.testing.assert_close(change, -4e-3 * value.grad, rtol=0, atol=2e-3 * 4e-3 * value.grad.abs().max())
            assert torch.cosine_similarity(change.flatten(), -value.grad.flatten(), 0) > 0.9999, name
        else:
            assert not change.any()


def test_peft_reads_what_is_saved(folder, tmp_path, prompts):
    """The same logits in peft, in transformers, merged on disk and merged in memory; only adapters are stored."""
    policy, encoder = build(folder / "model")
    model.save(policy, encoder, tmp_path / "adapters")
    model.save(policy, encoder, tmp_path / "whole", merge=True)
    names = lambda path: {file.name for file in path.iterdir()}
    assert names(tmp_path / "whole") == names(folder / "model")
    stored = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(stored) == 2 * len(LINEAR) and all(".lora_" in name for name in stored)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "adapters").iterdir()} == {"0o644"}
    assert not (tmp_path / "adapters" / "config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "adapters").chat_template == encoder.tokenizer.chat_template
    plain = lambda path: Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    policy.eval()
    prompt = prompts[0]
    with torch.no_grad():
        theirs = [qwen(input_ids=prompt.ids[None], position_ids=prompt.positions[:, None],
                       attention_mask=torch.ones(1, len(prompt.ids)), pixel_values_videos=prompt.patches,
                       video_grid_thw=prompt.grid[None]).logits[0] for qwen in (
            peft.PeftModel.from_pretrained(plain(folder / "model"), tmp_path / "adapters"),
            AutoModelForImageTextToText.from_pretrained(tmp_path / "adapters", dtype=torch.float32),
            plain(tmp_path / "whole"), plain(folder / "model"))]
        batch = prompt.ids, prompt.positions, Packed([len(prompt.ids)]), prompt.patches, prompt.grid[None]
        ours = [each.logits(*batch) for each in (
            policy, model.load(str(tmp_path / "adapters"))[0], model.load(str(tmp_path / "adapters"), lora_rank=4)[0])]
    possible = ours[0].isfinite()
    for logits in (*theirs[:3], *ours[1:]):
        torch.testing.assert_close(logits[possible], ours[0][possible], rtol=0, atol=1e-4)
    assert (theirs[3] - theirs[0]).abs().max() > 0.1
    memory, disk = (model.load(str(tmp_path / name))[0].state_dict() for name in ("adapters", "whole"))
    assert memory.keys() == disk.keys() and all(torch.equal(value, disk[name]) for name, value in memory.items())


def test_in_bf16_adapters_stay_beside_the_weights(folder, tmp_path, scored):
    """Merged, a small change would be lost: it is less than half a step of bf16 for most of the weights."""
    policy, encoder = build(folder / "model", noise=1e-4)
    model.save(policy, encoder, tmp_path / "adapters")
    half, _ = model.load(str(tmp_path / "adapters"), dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert not lora.adapters(half) and len(lora.adapters(half, "start")) == 2 * len(LINEAR)
    flat = lambda weights: torch.cat([weights[f"{name}.weight"].flatten() for name in LINEAR])
    before = flat(model.load(str(folder / "model"))[0].qwen.state_dict())
    delta = flat(lora.merge(policy.qwen, policy.qwen.state_dict())) - before
    published = before.bfloat16()
    assert ((published + delta).bfloat16() == published).float().mean() > 0.9 and delta.count_nonzero() > 0
    with torch.no_grad():
        assert (scored(half) - scored(policy)).abs().mean() < 0.05


def test_another_s_adapters_are_taken(folder, tmp_path, scored):
    """A folder that peft wrote, with a part of the layers, the vision tower among them, and another scale."""
    qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    theirs = peft.get_peft_model(qwen, peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "visual.blocks.0.mlp.up_proj"],
        alpha_pattern={"layers.1.self_attn.q_proj": 7}, init_lora_weights=False, lora_dropout=0.1))
    theirs.save_pretrained(tmp_path / "theirs")
    assert peft.PeftConfig.from_pretrained(tmp_path / "theirs").base_model_name_or_path == str(folder / "model")
    ours, _ = model.load(str(tmp_path / "theirs"))
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in ours.qwen.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="other weights than the adapters"):
        model.load(str(tmp_path / "theirs"), lora_rank=3)


def spoil(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


WRONG = {
    "the base is gone": (lambda f: spoil(f, base_model_name_or_path="/nowhere/qwen"), "'/nowhere/qwen', is not there"),
    "a name on the hub": (lambda f: spoil(f, base_model_name_or_path="org/gone"), "hf download org/gone"),
    "no base": (lambda f: spoil(f, base_model_name_or_path=None), "None, is not there"),
    "its own base": (lambda f: spoil(f, base_model_name_or_path=str(f)) or (f / "config.json").write_text("{}"),
                     "is not there"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "no LoRA": (lambda f: spoil(f, peft_type="IA3"), "is of 'IA3', not 'LORA'"),
    "cut short": (lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-8]), "adapter_model.safetensors cannot be read"),
    "pickled only": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "cannot be read"),
    "whole numbers": (lambda f: rewrite(f, lambda w: {n: v.to(torch.int8) for n, v in w.items()}), "I8"),
    "a weight is missing": (lambda f: rewrite(f, lambda w: dict(list(w.items())[1:])), "has other weights"),
    "DoRA": (lambda f: rewrite(f, lambda w: w | {next(iter(w)).replace("lora_A.weight", "lora_magnitude_vector"):
                                                 torch.ones(3)}), "has other weights"),
    "another rank": (lambda f: spoil(f, r=5), "has other weights"),
    "no rank": (lambda f: spoil(f, r="many"), "adapter_config.json cannot be used"),
    "a rank below 0": (lambda f: spoil(f, r=-1), "adapter_config.json cannot be used"),
    "for another model": (lambda f: rewrite(f, lambda w: {n.replace("layers.0.", "layers.9."): v
                                                          for n, v in w.items()}), "adapter")}


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
    model.save(*build(folder / "model"), tmp_path_factory.mktemp("stored") / "adapters")
    return next(tmp_path_factory.getbasetemp().glob("stored*")) / "adapters"


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_adapter_folder_is_said_in_one_line(stored, tmp_path, what):
    """As evaluate.py, ground.py, sft.py and train.py say it, which all load a model in this way."""
    folder, (change, named) = shutil.copytree(stored, tmp_path / "adapters"), WRONG[what]
    change(folder)
    with pytest.raises(model.ModelError) as error:
        model.load(str(folder))
    said = str(error.value)
    assert named in said and said.startswith(f"{folder}: ") and "\n" not in said and ";" in said, said


def test_flags_that_cannot_work_are_named(stored, folder, tmp_path):
    settings = config(folder, tmp_path / "run", model=str(folder / "model"))
    for change, named in ((dict(lora_rank=-1), "--lora_rank -1"), (dict(merge=True), "--merge"),
                          (dict(lora_rank=8, model=str(stored)), "--lora_rank 8: the adapters in .* have rank 4")):
        for script in (train, sft):
            given = replace(settings, **change) if script is train else sft_config(folder, tmp_path / "run", **change)
            with pytest.raises(ValueError, match=named):
                script.main(given)


def step(source, dtype=torch.float32) -> dict:
    """On this process's share of two prompts, computed in dtype: log-probabilities with adapters on and off,
    gradients, weights after a step, and the mismatch of sampling, of another length on each process, and scoring."""
    rank, world, _ = distributed.start_process()
    policy, encoder = build(source, dtype=dtype, noise=0.02)
    policy = distributed.shard(policy, dtype)
    random, share = torch.Generator().manual_seed(0), slice(rank, None, world)
    prompts = model.see(policy, [encoder.encode(text, Clip(torch.randint(
        0, 256, (t, 3, 28, 28), dtype=torch.uint8, generator=random), 2.0)) for text, t in (("when", 4), ("red", 6))])
    completions = torch.randint(20, 200, (2, 2, 9), generator=random)
    weight = torch.randn(completions.shape, generator=random)
    mask = torch.ones_like(completions)
    score = lambda: grpo.logprobs(policy, prompts[share], completions[share], mask[share])
    with torch.no_grad(), lora.reference(policy):
        off = score()
    logp = score()
    ((logp * weight[share]).sum() * world).backward()
    learning = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    gradients = {name: whole(value.grad) for name, value in learning.items()}
    norm = distributed.full_norm(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
    torch.optim.AdamW(learning.values(), lr=1e-2).step()
    with distributed.gathered(policy):
        sampled = grpo.rollout(policy, prompts[share], 2, 8 + 4 * rank, [], [torch.Generator().manual_seed(1)] * len(
            prompts[share]))
    with torch.no_grad():
        again = grpo.logprobs(policy, prompts[share], sampled.completions, sampled.mask)
    whole_here = {value.dtype for value in policy.parameters() if not hasattr(value, "device_mesh")}
    return {"on": logp.detach().float(), "off": off.float(), "gradients": gradients, "norm": norm,
            "whole_here": whole_here, "learned": {name: whole(value.detach()) for name, value in learning.items()},
            "mismatch": (again - sampled.logprobs).abs().max().item()}


def test_as_on_gpus(folder, tmp_path):
    """Two processes, frozen weights in bf16, whole on both, and fp32 adapters, spread, which are computed with in
    bf16: about the log-probabilities and gradients of one process in fp32, and weights that are no bf16."""
    source, flat = str(folder / "model"), lambda tensors: torch.cat([tensor.flatten() for tensor in tensors.values()])
    alone = step(source)
    for rank, theirs in enumerate(together(tmp_path / "job", 2, 2, step, source, torch.bfloat16)):
        for name in ("on", "off"):
            assert 1e-4 < (theirs[name] - alone[name][rank::2]).abs().mean() < 0.05
        ours, other = flat(alone["gradients"]), flat(theirs["gradients"])
        assert (ours - other).norm() < 0.2 * ours.norm() and theirs["norm"] == pytest.approx(alone["norm"], rel=0.1)
        assert other.dtype == flat(theirs["learned"]).dtype == torch.float32
        assert (flat(theirs["learned"]) != flat(theirs["learned"]).bfloat16()).float().mean() > 0.9
        assert theirs["gradients"].keys() == theirs["learned"].keys() and len(theirs["learned"]) == 2 * len(LINEAR)
        assert theirs["mismatch"] < 0.3 and theirs["whole_here"] == {torch.bfloat16}


@pytest.fixture(scope="module")
def unbroken(folder, warm, tmp_path_factory):
    """The settings of a run with adapters that nobody disturbs, and its folder."""
    output = tmp_path_factory.mktemp("lora") / "run"
    settings = config(folder, output, steps=3, save_every=1, tvg_prob=1, lora_rank=4,
                      learning_rate=1e-2, gradient_checkpointing=True)
    train.main(settings)
    return settings, output


def outcome(output):
    logs = [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}
            for row in rows(output / "metrics.jsonl")]
    return logs, (output / "samples.jsonl").read_text(), load_file(output / "model" / "adapter_model.safetensors")


def test_a_run_learns_adapters_and_keeps_nothing_else(unbroken, warm):
    settings, output = unbroken
    logs, _, learned = outcome(output)
    assert logs[0]["kl"] == 0 and logs[-1]["kl"] > 1e-4 and all(row["grad_norm"] > 0 for row in logs)
    assert max(row["mismatch"] for row in logs) < 1e-4
    kept = {}
    for file in (output / "checkpoints" / "step_000003").glob("*.safetensors"):
        kept |= load_file(file)
    assert {name.removesuffix(end) for name in kept for end in (".step", ".exp_avg", ".exp_avg_sq") if
            name.endswith(end)} == {name for name in kept if name.endswith(".weight")}
    assert all(".lora_" in name for name in kept) and len(learned) == 2 * len(LINEAR)
    assert any(weight.any() for name, weight in learned.items() if "lora_B" in name)
    config = json.loads((output / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(warm) and config["r"] == 4 and config["lora_alpha"] == 8
    before, after = (model.load(str(path))[0].state_dict() for path in (warm, output / "model"))
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {f"qwen.{name}.weight" for name in LINEAR}


def test_killed_and_resumed_is_unbroken(unbroken, tmp_path):
    """To the bit; another rank is refused, and a finished run writes its model merged when it is asked to."""
    settings = replace(unbroken[0], output=str(tmp_path / "run"))
    assert survive(settings, "train", [(9, lambda output: lines(output / "metrics.jsonl") == 2)], tmp_path / "log") == 1
    assert_same(outcome(tmp_path / "run"), outcome(unbroken[1]))
    with pytest.raises(ValueError, match="--lora_rank 8: .* was made with 4"):
        train.main(replace(settings, resume=True, lora_rank=8))
    train.main(replace(settings, resume=True, merge=True))
    one, other = (model.load(str(path / "model"))[0].state_dict() for path in (unbroken[1], tmp_path / "run"))
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.processes
def test_a_run_of_two_processes_is_that_of_one(unbroken, tmp_path):
    settings = replace(unbroken[0], output=str(tmp_path / "run"), micro_batch_size=1)
    assert finish(start("train", settings, tmp_path / "log", 2)) == [0, 0], (tmp_path / "log.0").read_text()[-2000:]
    (one, said, learned), (two, also, theirs) = outcome(unbroken[1]), outcome(tmp_path / "run")
    assert said.count("completion") == also.count("completion") and len(one) == len(two)
    for a, b in zip(one, two):
        for key in a.keys() - {"mismatch"}:
            assert a[key] == (pytest.approx(b[key], rel=1e-2, abs=1e-4) if isinstance(a[key], float) else b[key]), key
    flat = lambda weights: torch.cat([weights[name].flatten() for name in sorted(weights) if "lora_B" in name])
    assert (flat(learned) - flat(theirs)).norm() < 0.05 * flat(learned).norm()


def test_every_script_takes_an_adapter_folder(unbroken, folder, tmp_path, capsys):
    """Training goes on with the adapters, or merges them; evaluation names both folders in what its answers depend
    on."""
    settings, output = unbroken
    adapters = str(output / "model")
    sft.main(sft_config(folder, tmp_path / "sft", model=adapters, lora_rank=4, steps=2))
    train.main(replace(settings, model=str(tmp_path / "sft" / "model"), output=str(tmp_path / "more"), steps=2))
    first, *_, last = rows(tmp_path / "more" / "metrics.jsonl")
    assert first["kl"] == 0 and last["kl"] > 0      # so the reference has the adapters that it began with
    for name in ("sft", "more"):
        chain = json.loads((tmp_path / name / "model" / "adapter_config.json").read_text())
        assert chain["base_model_name_or_path"] == settings.model
    train.main(replace(settings, model=adapters, output=str(tmp_path / "all"), steps=1, lora_rank=0))
    assert (tmp_path / "all" / "model" / "model.safetensors").exists()
    found = evaluate.main(evaluate.Config(
        model=adapters, annotations=str(folder / "test.txt"), videos=str(folder / "videos"), tasks=["TVG"], steps=1,
        batch_size=4, max_tokens=8, output=str(tmp_path / "test")))
    assert found["queries"] == 4
    inputs = json.loads((tmp_path / "test" / "inputs.json").read_text())
    assert {f"{adapters}/adapter_model.safetensors", f"{settings.model}/model.safetensors"} <= inputs.keys()
    ground.main(ground.Config(video=str(next((folder / "videos").iterdir())), queries=["it spins"], model=adapters,
                              max_tokens=8))
    assert "it spins" in capsys.readouterr().out
