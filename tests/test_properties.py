"""What holds for any input, not only for the examples of the other tests."""
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import data
import grpo
import rewards
import tasks
from engine import plot
from engine.sampling import draw_token

settings.register_profile("house", max_examples=50, deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile("house")

PIECES = ["<think>", "</think>", "<answer>", "</answer>", "12.5 to 17", "3 and 4", "9 to 2", "1e9 to 2", " ", "\n",
          "[", "]", "opens", "the door", "0", ".", "-", "s", "\ud800", "\0", "é", "٣ to ٤", "9" * 400]
completions = st.one_of(st.text(st.characters(codec=None), max_size=60),
                        st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
                        st.text(max_size=20).map("<think>{0}</think> <answer>{0}</answer>".format))
SAMPLE = data.Sample("a:1", "a.mp4", "a person opens the door and laughs", 3.0, 9.0, 20.0)
forms = st.builds(tasks.in_form, st.sampled_from(list(tasks.TASKS.values())), st.booleans(), st.booleans())


@settings(max_examples=100)
@given(completions, forms)
@example("<think></think><answer>" + "9" * 400 + " to 3</answer>", tasks.TASKS["TVG"])
def test_rewards_are_within_their_bounds_for_any_text(text, task):
    reward, = task.reward([text], [SAMPLE])
    assert list(reward.parts) == ["format", task.part]
    assert reward.parts["format"] in (0.0, 1.0) and 0 <= reward.parts[task.part] <= 1


queries = st.sampled_from(["a person opens the door and laughs", "person open door.", "the kitchen", "he opens it", ""])
answers = st.sampled_from(["he opens the door, laughing", "a person open door", "opens", "3 to 8", "a dress", ""])
batches = st.lists(st.tuples(answers.map("<think>a</think> <answer>{}</answer>".format) | completions, queries),
                   min_size=1, max_size=6)


@settings(max_examples=40)
@given(batches, st.integers(0, 6), forms)
def test_rewards_do_not_depend_on_what_else_is_in_the_batch(batch, cut, task):
    """A batch pays what its two parts do, completion by completion; nothing is remembered from one to the other."""
    def pay(pairs):
        rewards._cache.clear()
        return task.reward([text for text, _ in pairs], [replace(SAMPLE, query=query) for _, query in pairs])

    assert pay(batch) == pay(batch[:cut]) + pay(batch[cut:])


@given(completions)
def test_any_query_can_be_masked_and_asked(query):
    """Of a sentence only verbs change, and the prompt holds it, whatever is in it."""
    masked, end_before = "", 0
    for start, end, _ in rewards.find_verbs([query])[0]:
        assert end_before <= start < end <= len(query)
        masked += query[end_before:start] + "[]"
        end_before = end
    masked += query[end_before:]
    assert tasks.mask_verbs(query) == masked
    sample = replace(SAMPLE, query=query)
    assert query in tasks.TASKS["TVG"].prompt(sample) and masked in tasks.TASKS["VC"].prompt(sample)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["", "s", " sec", " seconds"]),
       st.sampled_from(["to", "and"]))
def test_what_is_written_is_read(start, end, unit, word):
    text = f"so <answer>{start / 100}{unit} {word} {end / 100}{unit}</answer>"
    assert rewards.segment(text) == (start / 100, end / 100)


spans = st.tuples(*[st.floats(0, 1e6) | st.floats()] * 2)


@settings(max_examples=300)
@given(spans, spans)
@example((0.0, 5e-324), (0.0, 5e-324))
@example((0.0, 1e308), (-1e308, 1e308))
def test_iou_is_symmetric_bounded_and_1_only_for_equal_spans(a, b):
    value = rewards.iou(a, b)
    assert 0 <= value <= 1 and value == rewards.iou(b, a)
    proper = all(map(math.isfinite, (*a, 2 * (a[1] - a[0])))) and a[0] < a[1]
    assert rewards.iou(a, a) == float(proper)
    if value == 1.0:        # as far as numbers of 53 bits can tell spans apart
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12 * (a[1] - a[0]))


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())
rows = st.dictionaries(st.sampled_from(["step", "task", "part", "reward", "iou"]), values)


@given(st.binary(max_size=100) | st.lists(rows, max_size=4).map(lambda logged: "".join(
    json.dumps({"step": 1, **row}) + "\n" for row in logged).encode()))
@example(b'{"step": 1, "reward": NaN, "kl": 1e999}\n')
@example(b'{"step": 1e999}\n')
def test_any_log_gives_steps_or_one_error(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    try:
        steps = plot.read_metrics(tmp_path)
    except ValueError as error:
        assert "metrics.jsonl" in str(error) and "\n" not in str(error)
    else:
        assert steps and all(type(step["step"]) is int and "task" in step for step in steps)


groups = st.integers(2, 8).flatmap(lambda g: st.lists(st.lists(st.floats(0, 2, width=32), min_size=g, max_size=g),
                                                      min_size=1, max_size=4))


@given(groups, st.floats(-5, 5, width=32))
def test_advantages_are_centred_and_know_neither_level_nor_order(rewards, level):
    rewards = torch.tensor(rewards, dtype=torch.float64)        # (B, G)
    advantages = grpo.advantages(rewards)
    assert advantages.shape == rewards.shape and advantages.isfinite().all()
    assert advantages.mean(-1).abs().max() < 1e-9 and (advantages.std(-1) <= 1).all()
    torch.testing.assert_close(grpo.advantages(rewards + level), advantages, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grpo.advantages(rewards.flip(1)), advantages.flip(1), rtol=1e-9, atol=1e-9)
    assert ((rewards[:, :, None] > rewards[:, None]) <= (advantages[:, :, None] >= advantages[:, None])).all()
    flat = rewards[:, :1].float().expand_as(rewards)            # whose mean in fp32 need not be their value
    assert (grpo.advantages(flat) == 0).all()


@given(st.lists(st.floats(-30, 30, width=32) | st.just(-math.inf), min_size=2, max_size=12),
       st.floats(0, 1, exclude_max=True))
@example([0.0, 0.0, -math.inf], math.nextafter(1, 0))
@example([-math.inf, 0.0], 0.0)
def test_only_what_has_a_probability_is_sampled(logits, uniform):
    assume(max(logits) > -math.inf)
    logits = torch.tensor([logits])
    token = draw_token(logits, torch.tensor([uniform], dtype=torch.float64)).item()
    assert 0 <= token < logits.shape[1] and logits[0, token] > -math.inf
    assert logits[0, draw_token(logits, None)] == logits.max()
