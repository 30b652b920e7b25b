"""The decoding step against transformers' own layers, on models of random shapes: the same tokens, fewer kernels."""
import gc
import json
import random
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

import evaluate
import ground
import grpo
import model
import train
from engine import compiled, lora
from engine.sampling import Step
from lab import ways

HEADS = [(2, 1), (4, 2), (4, 4), (6, 2), (3, 1)]        # attention heads and key heads


def policy_of(seed, dtype=torch.float64):
    """A policy of random shape; its decoder's weights are large enough for what it reads to matter."""
    rng = random.Random(seed)
    heads, key_heads = rng.choice(HEADS)
    sizes = ways.Sizes(hidden=16 * heads, layers=rng.choice([1, 2, 3]), vocabulary=rng.choice([90, 300]),
                       vision_hidden=32, vision_depth=1, seed=seed)
    shaped, tied = ways.shape(sizes), rng.random() < 0.5
    shaped.text_config.num_key_value_heads, shaped.tie_word_embeddings = key_heads, tied
    shaped.text_config.tie_word_embeddings = tied
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "shape", lambda _: shaped)
        policy = ways.build(sizes).to(dtype)
    for layer in policy.qwen.model.language_model.layers:
        for weight in (layer.input_layernorm.weight, layer.post_attention_layernorm.weight, layer.self_attn.q_proj.bias,
                       layer.self_attn.v_proj.bias):
            nn.init.normal_(weight)
    assert (policy.qwen.lm_head.weight is policy.qwen.get_input_embeddings().weight) == tied
    return policy


def prompts_of(policy, seed, count):
    """Prompts of different lengths, with videos of different lengths."""
    rng, found = random.Random(seed), []
    for i in range(count):
        sizes = ways.Sizes(grids=rng.randint(1, 3), side=28 * rng.randint(1, 2), text=rng.randint(8, 15), seed=seed + i)
        found += ways.make_prompts(sizes, policy.qwen.config)
    return found


def both(policy, prompts, *args, **named):
    """Rollouts of the step and of the plain path."""
    seeded = lambda: [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    fast = grpo.rollout(policy, prompts, *args, generators=seeded(), **named)
    ways.plainly(policy)
    plain = grpo.rollout(policy, prompts, *args, generators=seeded(), **named)
    del policy.start_decoding
    return fast, plain


def equal(fast, plain, **tolerance):
    assert torch.equal(fast.completions, plain.completions) and torch.equal(fast.mask, plain.mask)
    torch.testing.assert_close(fast.logprobs, plain.logprobs, **tolerance)


@pytest.mark.parametrize("seed", range(6))
def test_a_step_is_the_plain_path(seed):
    """Several prompts of different lengths, rows that stop and are dropped, a temperature."""
    policy, rng = policy_of(seed), random.Random(seed)
    prompts = prompts_of(policy, seed, rng.randint(1, 3))
    size, temperature = rng.randint(1, 5), rng.choice([1.0, 0.7])
    fast, plain = both(policy, prompts, size, 20, [], temperature=temperature)
    assert len(fast.completions.unique()) > 10
    equal(fast, plain, rtol=1e-5, atol=1e-5)                # transformers' norms compute in fp32
    stops = fast.completions.flatten(0, 1)[::2, 3].tolist()
    fast, plain = both(policy, prompts, size, 20, stops, temperature=temperature)
    equal(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("count, size", [(1, 1), (1, 4), (2, 1), (3, 2)])
def test_every_grouping_of_heads_and_rows(monkeypatch, heads, count, size):
    """Also heads with keys of their own behind a single prompt, whose queries lie otherwise in memory."""
    monkeypatch.setattr("test_incremental.HEADS", [heads])
    policy = policy_of(4)
    fast, plain = both(policy, prompts_of(policy, 4, count), size, 5, [])
    equal(fast, plain, rtol=1e-5, atol=1e-5)


def test_in_half_precision_the_step_is_no_farther_off():
    """In bf16 the step and the plain path both round; neither is nearer to fp64 by more than a third."""
    exact, half = policy_of(1), policy_of(1, torch.bfloat16)
    prompts = prompts_of(exact, 1, 2)
    fast, plain = both(half, prompts, 4, 12, [])
    off = []
    for found in (fast, plain):
        with torch.no_grad():
            wanted = grpo.logprobs(exact, prompts, found.completions, found.mask)
        off.append((found.logprobs - wanted).abs().mean().item())
    assert off[0] < 1.33 * off[1] and off[1] < 1.33 * off[0]


class Adapted(nn.Module):
    """A linear layer with a low-rank one beside it, as LoRA has it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["o_proj", "down_proj"],
                                   ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]])
def test_what_is_around_a_linear_layer_counts(names):
    policy = policy_of(2)
    prompts = prompts_of(policy, 2, 2)
    before, _ = both(policy, prompts, 3, 10, [])
    torch.manual_seed(0)
    for layer in policy.qwen.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in names:
                if hasattr(part, name):
                    setattr(part, name, Adapted(getattr(part, name)))
    fast, plain = both(policy, prompts, 3, 10, [])
    equal(fast, plain, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before.logprobs, fast.logprobs)


def test_logits_that_are_not_finite_end_strict_sampling(monkeypatch):
    policy = policy_of(0)
    policy.strict = True
    prompts = prompts_of(policy, 0, 1)
    grpo.rollout(policy, prompts, 2, 5, [])
    go_on = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, token: go_on(self, token) * torch.nan)
    with pytest.raises(model.ModelError, match="not finite"):
        grpo.rollout(policy, prompts, 2, 5, [])


def compilations() -> int:
    """How many programs torch.compile has made since it was last asked; all of a piece."""
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"].pop("unique_graphs", 0)


def test_the_compiled_step_is_the_plain_path():
    """Also when prompts have other lengths; compiled once for all of up to 64 tokens, and again for other rows."""
    policy = policy_of(1)
    policy.compiled = True
    compilations()
    for seed, expected in ((1, 1), (5, 0)):
        prompts = prompts_of(policy, seed, 2)
        fast, plain = both(policy, prompts, 3, 12, [])
        equal(fast, plain, rtol=1e-5, atol=1e-5)
        assert compilations() == expected and len(fast.completions.unique()) > 10
        stops = fast.completions[:, :, 3].flatten().tolist()
        equal(*both(policy, prompts, 3, 12, stops), rtol=1e-5, atol=1e-5)
    with torch.no_grad():       # weights that training has changed
        policy.qwen.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    changed, plain = both(policy, prompts, 3, 12, [])
    equal(changed, plain, rtol=1e-5, atol=1e-5)
    assert not torch.equal(changed.logprobs, fast.logprobs) and compilations() == 0
    equal(*both(policy, prompts[:1], 3, 12, []), rtol=1e-5, atol=1e-5)
    assert compilations() == 1
    decoder = weakref.ref(policy.qwen.model.language_model)
    del policy
    gc.collect()
    assert decoder() is None        # neither program nor memory outlives it


def test_the_compiled_step_with_adapters(monkeypatch):
    policy = policy_of(3, torch.float32)
    lora.attach(policy.qwen, "", 2)
    for weight in lora.adapters(policy).values():
        nn.init.normal_(weight, std=0.3)
    prompts, policy.compiled = prompts_of(policy, 3, 2), True
    compilations()
    fast, plain = both(policy, prompts, 2, 10, [])
    assert compilations() == 1
    equal(fast, plain, rtol=1e-4, atol=1e-4)
    with lora.reference(policy):
        assert (grpo.logprobs(policy, prompts, fast.completions, fast.mask) - fast.logprobs).abs().max() > 0.1


@pytest.fixture
def programs(monkeypatch):
    """How often a program was called, while it runs as it is written, uncompiled."""
    calls = []
    monkeypatch.setattr(compiled, "compiled", lambda graph: lambda *args: calls.append(args[0]) or compiled.run(*args))
    return calls


def test_the_flag_of_evaluate_and_ground(folder, warm, tmp_path, programs, capsys):
    answers, given = {}, {}
    for on in (False, True):
        evaluate.main(evaluate.Config(model=str(warm), annotations=str(folder / "test.txt"), max_tokens=24, compile=on,
                                      videos=str(folder / "videos"), output=str(tmp_path / str(on)), tasks=["TVG"]))
        answers[on] = [json.loads(line)["completion"] for line in open(tmp_path / str(on) / "predictions.jsonl")]
        assert bool(programs) == on
        programs.clear()
        given[on] = ground.main(ground.Config(str(next((folder / "videos").iterdir())), ["it spins", "it rests"],
                                              str(warm), max_tokens=24, compile=on))
        assert bool(programs) == on
        programs.clear()
    assert answers[False] == answers[True] and given[False] == given[True] and len(set(answers[True])) > 1


def test_the_flag_of_train(folder, warm, tmp_path, programs):
    """The same steps with it as without, and a run may go on with the flag changed."""
    numbers, options = {}, dict(model=str(warm), annotations=str(folder / "train.txt"), videos=str(folder / "videos"),
                                prompts_per_step=2, group_size=4, max_tokens=64, learning_rate=1e-4, tvg_prob=0.5,
                                seed=1)
    for on in (False, True):
        train.main(train.Config(output=str(tmp_path / str(on)), steps=2, compile=on, **options))
        numbers[on] = [json.loads(line) for line in open(tmp_path / str(on) / "metrics.jsonl")]
        assert bool(programs) == on
    for plain, static in zip(*numbers.values(), strict=True):
        for key in ("reward", "tokens", "kl", "loss", "grad_norm"):
            assert static[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-5)
    programs.clear()
    train.main(train.Config(output=str(tmp_path / "True"), steps=3, resume=True, **options))
    assert not programs


@pytest.mark.parametrize("longest, wanted", [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (1880, 2048)])
def test_padded_lengths(longest, wanted):
    assert compiled.padded(longest) == wanted


def test_without_a_compiler_a_line_says_so(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no_such_compiler",))
    compiled.check(False)
    with pytest.raises(ValueError, match="--compile.*install g"):
        compiled.check(True)


def test_compiling_that_fails_ends_with_a_line(monkeypatch):
    def fail(*_):
        raise TorchDynamoException("no room\nat all")
    monkeypatch.setattr(compiled, "compiled", lambda _: fail)
    policy = policy_of(0)
    policy.compiled = True
    with pytest.raises(ValueError, match="--compile: torch.compile failed .no room"):
        grpo.rollout(policy, prompts_of(policy, 0, 1), 2, 5, [])
