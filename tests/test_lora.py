"""LoRA: adapters alone learn, are nothing when off, and are a folder that peft reads."""
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import ROOT, random_clip, read_rows, seeded, sft_config, together, train_config, whole
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

import evaluate
import ground
import grpo
import model
import sft
import train
from engine import distributed, lora

NAMES = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
LINEAR = [f"model.language_model.layers.{i}.{name}_proj" for i in range(4) for name in NAMES]


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
    """score(policy): log-probabilities of completions of two prompts, (2, 3, 7)."""
    completions = torch.randint(20, 200, (2, 3, 7), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def score(policy):
        return grpo.logprobs(policy, prompts, completions, torch.ones_like(completions))
    return score


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
    """A folder of adapters."""
    path = tmp_path_factory.mktemp("stored") / "adapters"
    model.save(*build(folder / "model"), path)
    return path


def test_all_linear_layers_of_the_language_model_learn_and_nothing_else(folder):
    policy, _ = model.load(str(folder / "model"), lora_rank=3)
    learning = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert learning == {f"qwen.{name}.lora_{matrix}.default.weight" for name in LINEAR for matrix in "AB"}
    layer = policy.qwen.get_submodule(LINEAR[0])
    assert layer.lora_A["default"].weight.shape == (3, layer.in_features) and layer.scaling["default"] == 2


@pytest.mark.parametrize("source", ["model", "adapters"])
def test_the_reference_is_the_model_that_training_began_with(folder, stored, scored, source):
    """To the bit. None, and a model without adapters that learn, are left as they are, and an error ends it, too."""
    source = str(folder / "model" if source == "model" else stored)
    policy, _ = model.load(source, lora_rank=4, seed=3)
    other, _ = model.load(source)
    expected, of_other = scored(policy), scored(other)
    # of adapters, the same numbers to the bit are to be had without merging only
    torch.testing.assert_close(of_other, expected, rtol=0, atol=1e-4 if source == str(stored) else 0)
    with torch.no_grad():
        for weight in lora.adapters(policy).values():
            weight += 0.1
    changed = scored(policy)
    assert (changed - expected).abs().max() > 0.1
    with pytest.raises(KeyError), lora.reference(policy), lora.reference(None), lora.reference(other):
        assert torch.equal(scored(policy), expected) and torch.equal(scored(other), of_other)
        raise KeyError
    assert torch.equal(scored(policy), changed)


def test_the_seed_alone_draws_a(folder):
    def draw(seed):
        return lora.adapters(model.load(str(folder / "model"), lora_rank=8, seed=seed)[0])

    one, again, other = draw(1), draw(1), draw(2)
    for name, weight in one.items():
        assert torch.equal(weight, again[name])
        if ".lora_B." in name:
            assert not weight.any()
        else:
            bound = weight.shape[1] ** -0.5         # peft's distribution is uniform
            assert 0.9 * bound < weight.abs().max() <= bound and not torch.equal(weight, other[name])
            assert weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)


def test_what_is_saved_is_a_folder_of_peft(folder, tmp_path, scored):
    """The same model in transformers, merged by the code in docs/transformers.md, and in this project."""
    policy, encoder = build(folder / "model")
    path = tmp_path / "adapters"
    model.save(policy, encoder, path)
    assert not (path / "config.json").exists() and (path / "generation_config.json").exists()
    assert {path.stat().st_mode & 0o777 for path in path.iterdir()} == {0o644}

    code = re.search(r"```python\n(import peft.*?)```", (ROOT / "docs" / "transformers.md").read_text(), re.DOTALL)[1]
    code = code.replace("runs/lora/model", str(path)).replace("runs/lora", str(tmp_path))
    exec(code.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(folder / "model")))

    in_transformers = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    merged, _ = model.load(str(tmp_path / "merged"))
    here, _ = model.load(str(path))
    learning, _ = model.load(str(path), lora_rank=4)
    expected = scored(policy)
    for each in (model.Policy(in_transformers, policy.forbidden), merged, here, learning):
        torch.testing.assert_close(scored(each), expected, rtol=0, atol=1e-4)


def test_training_that_goes_on_with_adapters_writes_the_learned_ones(stored, tmp_path):
    policy, encoder = build(stored)
    model.save(policy, encoder, tmp_path / "more")
    before = load_file(stored / "adapter_model.safetensors")
    after = load_file(tmp_path / "more" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(weight, after[name]) for name, weight in before.items())


def test_in_bf16_adapters_stay_beside_the_weights(folder, tmp_path, scored):
    """Merged, a small change would be lost: it is less than half a step of bf16 for most of the weights."""
    policy, encoder = build(folder / "model", noise=1e-4)
    model.save(policy, encoder, tmp_path / "adapters")
    in_bf16, _ = model.load(str(tmp_path / "adapters"), dtype=torch.bfloat16)
    assert {weight.dtype for weight in in_bf16.parameters()} == {torch.bfloat16}
    assert not lora.adapters(in_bf16) and len(lora.adapters(in_bf16, "start")) == 2 * len(LINEAR)
    assert (scored(in_bf16) - scored(policy)).abs().mean() < 0.05
    learning, _ = model.load(str(tmp_path / "adapters"), dtype=torch.bfloat16, lora_rank=4)
    assert {weight.dtype for weight in lora.adapters(learning).values()} == {torch.float32}


def test_another_s_adapters_are_taken(folder, tmp_path):
    """A folder that peft wrote, with a part of the layers, the vision tower among them, and another scale."""
    qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    theirs = peft.get_peft_model(qwen, peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "visual.blocks.0.mlp.up_proj"],
        alpha_pattern={"layers.1.self_attn.q_proj": 7}, init_lora_weights=False, lora_dropout=0.1))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = model.load(str(tmp_path / "theirs"))
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in ours.qwen.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="other weights than the adapters"):
        model.load(str(tmp_path / "theirs"), lora_rank=3)


def config(**changes):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return apply


def weights(change):
    def apply(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)
    return apply


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def dora(tensors):
    name = next(iter(tensors)).replace("lora_A.weight", "lora_magnitude_vector")
    return {**tensors, name: torch.ones(3)}


@pytest.mark.parametrize("harm, words", [
    (config(base_model_name_or_path="/nowhere/qwen"), "'/nowhere/qwen', is not there"),
    (config(base_model_name_or_path="org/gone"), "hf download org/gone"),
    (config(base_model_name_or_path=None), "None, is not there"),
    (lambda folder: config(base_model_name_or_path=str(folder))(folder), "that folder holds adapters, too"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    (config(peft_type="IA3"), "is of 'IA3', not 'LORA'"),
    (cut, "adapter_model.safetensors cannot be used"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be used"),
    (weights(dora), "has other weights"), (config(r=5), "has other weights"),
    (weights(lambda tensors: dict(list(tensors.items())[1:])), "has other weights"),
    (config(r=-1), "adapter_config.json cannot be used")])
def test_what_is_no_adapter_folder_is_one_line(stored, tmp_path, harm, words):
    """As evaluate.py, ground.py, sft.py and train.py say it, which all load a model in this way."""
    path = shutil.copytree(stored, tmp_path / "adapters")
    harm(path)
    with pytest.raises(model.ModelError, match=words) as error:
        model.load(str(path))
    line = str(error.value)
    assert "\n" not in line and ";" in line and line.startswith((f"{path}: ", "org/gone: "))


@pytest.mark.parametrize("main, settings", [(train.main, train_config), (sft.main, sft_config)])
@pytest.mark.parametrize("rank, words", [
    (-1, "--lora_rank -1"), (8, "--lora_rank 8: the adapters in .* have rank 4")])
def test_ranks_that_cannot_work_are_named(stored, folder, tmp_path, main, settings, rank, words):
    with pytest.raises(ValueError, match=words):
        main(settings(folder, tmp_path / "run", lora_rank=rank, model=str(stored)))


def step(source, dtype, output):
    """On this process's share of two prompts, computed in dtype: log-probabilities with the adapters on and off,
    gradients, weights after a step, which are saved, too, and how far scoring is from sampling, which has another
    length on each process."""
    rank, world, _ = distributed.start_process()
    policy, encoder = build(source, dtype=dtype, noise=0.02)
    policy = distributed.shard(policy, dtype)
    random = torch.Generator().manual_seed(0)
    prompts = [encoder.encode("when", random_clip(random, 4, 3, 28, 28)),
               encoder.encode("red", random_clip(random, 6, 3, 28, 28))][rank::world]
    completions = torch.randint(20, 200, (2, 2, 9), generator=random)[rank::world]
    weight = torch.randn((2, 2, 9), generator=random)[rank::world]
    mask = torch.ones_like(completions)
    with torch.no_grad(), lora.reference(policy):
        off = grpo.logprobs(policy, prompts, completions, mask)
    on = grpo.logprobs(policy, prompts, completions, mask)
    ((on * weight).sum() * world).backward()
    learning = lora.adapters(policy)
    gradients = {name: whole(value.grad) for name, value in learning.items()}
    torch.optim.AdamW(learning.values(), lr=1e-2).step()
    with distributed.gathered(policy):
        sampled = grpo.sample(policy, prompts, 2, 8 + 4 * rank, [], seeded(len(prompts)))
    with torch.no_grad():
        scored = grpo.logprobs(policy, prompts, sampled.completions, sampled.mask)
    learned = {name: whole(value.detach()) for name, value in learning.items()}
    model.save(policy, encoder, output)
    frozen = {value.dtype for value in lora.frozen(policy) if not hasattr(value, "device_mesh")}
    return {"on": on.detach().float(), "off": off.float(), "gradients": gradients, "learned": learned, "frozen": frozen,
            "mismatch": (scored - sampled.logprobs).abs().max().item()}


def test_two_processes_in_bf16_are_about_one_in_fp32(folder, tmp_path):
    """Frozen weights are bf16 and whole on both; the adapters are fp32, spread over both, and computed with in bf16."""
    def flat(tensors):
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

    source = str(folder / "model")
    alone = step(source, torch.float32, tmp_path / "alone")
    both_ranks = together(tmp_path / "job", 2, 2, step, source, torch.bfloat16, tmp_path / "both")
    saved = load_file(tmp_path / "both" / "adapter_model.safetensors")
    for rank, both in enumerate(both_ranks):
        for name in ("on", "off"):
            assert 1e-4 < (both[name] - alone[name][rank::2]).abs().mean() < 0.05
        assert both["gradients"].keys() == alone["gradients"].keys()
        expected = flat(alone["gradients"])
        assert (flat(both["gradients"]) - expected).norm() < 0.2 * expected.norm()
        learned = flat(both["learned"])
        assert torch.equal(learned, flat(saved))        # their names differ, but not in their order
        assert learned.dtype == torch.float32 and (learned != learned.bfloat16()).float().mean() > 0.9
        assert both["mismatch"] < 0.3 and both["frozen"] == {torch.bfloat16}


@pytest.fixture(scope="module")
def unbroken(folder, warm, tmp_path_factory):
    """The settings of a run with adapters that nobody disturbs."""
    settings = train_config(folder, tmp_path_factory.mktemp("lora") / "run", save_every=1, tvg_prob=1, lora_rank=4,
                            learning_rate=1e-2, gradient_checkpointing=True)
    train.main(settings)
    return settings


def rows(output):
    """What a run has logged, without the clock."""
    logged = read_rows(output / "metrics.jsonl")
    for row in logged:
        del row["seconds"], row["tokens_per_second"]
    return logged


def learned(output):
    return load_file(output / "model" / "adapter_model.safetensors")


def test_a_run_learns_adapters_and_keeps_nothing_else(unbroken, warm):
    output = Path(unbroken.output)
    logs = rows(output)
    assert logs[0]["kl"] == 0 and logs[-1]["kl"] > 1e-4 and all(row["grad_norm"] > 0 for row in logs)
    assert max(row["mismatch"] for row in logs) < 1e-4
    kept = {}
    for file in (output / "checkpoints" / "step_000003").glob("*.safetensors"):
        kept |= load_file(file)
    names = {name for name in kept if name.endswith(".weight")}
    assert len(names) == 2 * len(LINEAR) and all(".lora_" in name for name in names)
    assert kept.keys() - names == {f"{name}.{state}" for name in names for state in ("step", "exp_avg", "exp_avg_sq")}
    config = json.loads((output / "model" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(warm), 4, 8)


def test_interrupted_and_resumed_is_unbroken(unbroken, tmp_path):
    """To the bit; another rank is refused."""
    settings = replace(unbroken, output=str(tmp_path / "run"), steps=2)
    train.main(settings)
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match="--lora_rank 8: .* was made with 4"):
        train.main(replace(settings, resume=True, lora_rank=8))
    train.main(replace(settings, resume=True, steps=3))
    output = Path(unbroken.output)
    assert rows(tmp_path / "run") == rows(output)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (output / "samples.jsonl").read_text()
    one, other = learned(tmp_path / "run"), learned(output)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_script_takes_an_adapter_folder(unbroken, warm, folder, tmp_path, capsys):
    """Training goes on with the adapters, or merges them; evaluation names both folders in what its answers depend
    on."""
    adapters = f"{unbroken.output}/model"
    sft.main(sft_config(folder, tmp_path / "sft", model=adapters, lora_rank=4, steps=2))
    train.main(replace(unbroken, model=f"{tmp_path}/sft/model", output=str(tmp_path / "more"), steps=2))
    first, last = rows(tmp_path / "more")
    assert first["kl"] == 0 < last["kl"]        # so the reference has the adapters that training began with
    assert [lora.base(f"{tmp_path}/{name}/model") for name in ("sft", "more")] == [str(warm)] * 2
    train.main(replace(unbroken, model=adapters, output=str(tmp_path / "all"), steps=1, lora_rank=0))
    assert (tmp_path / "all" / "model" / "model.safetensors").exists()
    scores = evaluate.main(evaluate.Config(
        model=adapters, annotations=str(folder / "test.txt"), videos=str(folder / "videos"),
        output=str(tmp_path / "test"), tasks=["TVG"], steps=1, batch_size=4, max_tokens=8))
    inputs = json.loads((tmp_path / "test" / "inputs.json").read_text())
    assert scores["queries"] == 4
    assert {f"{adapters}/adapter_model.safetensors", f"{warm}/model.safetensors"} <= inputs.keys()
    video = next((folder / "videos").iterdir())
    ground.main(ground.Config(video=str(video), queries=["it spins"], model=adapters, max_tokens=8))
    assert "it spins" in capsys.readouterr().out
