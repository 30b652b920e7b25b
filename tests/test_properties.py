"""What holds for any input, not only for the examples of the other tests."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

import data
import grpo
import model
import rewards
import tasks
from engine import plot, video
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


VIDEO = {"duration": 20, "timestamps": [[1, 5.5], [2, 9]], "sentences": ["a person sits", "he stands up"]}
MOMENT = {"qid": 3, "query": "a person sits", "vid": "a", "duration": 20, "relevant_windows": [[1, 5], [8, 9.5]]}
EVENT = {"video": "a.mp4", "timestamp": [1, 5], "sentence": "a person sits", "duration": 20.5, "video_start": 3.5,
         "video_end": 24}
QUESTION = {"path": "b/a.mp4", "question": "a person sits", "answer": "1-5.5", "duration": 20, "start": None}
ANNOTATIONS = {
    "Charades-STA": "a 1.0 5.5##a person sits\nb 2 9##he stands up\n",
    "ActivityNet Captions": json.dumps({"a": VIDEO, "b": VIDEO}),
    "QVHighlights": json.dumps(MOMENT) + "\n" + json.dumps({**MOMENT, "qid": 4}),
    "TimeRFT": json.dumps([EVENT, {**EVENT, "video": "b"}]),
    "TVGBench": json.dumps([QUESTION, {**QUESTION, "path": "c.mp4"}])}
DAMAGE = ["", "-", "1", "null", "true", "NaN", "1e999", '"', '"x"', "[", "]", "{}", ",", "../", "/", "\\ud800", "\\u0000",
          "\0", "\n", "##", " ", "9" * 400]


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_every_reader_returns_or_raises_its_own_error(tmp_path, name):
    """Of a file with a few characters replaced."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    path, text, readable = tmp_path / "file", ANNOTATIONS[name], []

    @settings(max_examples=100)
    @given(st.integers(0, len(text)), st.integers(0, 8), st.sampled_from(DAMAGE))
    def check(start, length, damage):
        path.write_text(text[:start] + damage + text[start + length:])
        try:
            samples, rejected = data.read(str(path), str(tmp_path / "videos"))
        except data.AnnotationError as error:
            assert "\n" not in str(error)
            return
        readable.append(data.parse(str(path))[0])
        assert samples and len({sample.id for sample in samples}) == len(samples)
        for sample in samples:
            assert 0 <= sample.start < sample.end <= (sample.duration or 1e9)
            assert sample.query == sample.query.strip() != "" and sample.video.startswith(str(tmp_path))
            assert (sample.video_start is None) == (sample.video_end is None)
        assert all("\n" not in str(item) for item in rejected)

    check()
    assert readable.count(name) > 10        # else this would say little


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


@given(st.floats(0.01, 1e5), st.integers(1, 10**6), st.integers(1, 8000), st.integers(1, 8000), st.integers(1, 10**8))
def test_sampled_frames_keep_their_budget(duration, available, height, width, total_pixels):
    n = video.frame_count(duration, available)
    assert n % 2 == 0 and 4 <= n <= max(4, min(video.MAX_FRAMES, available, duration * 2 + 1))
    h, w = video.frame_size(height, width, n, total_pixels)
    assert h % 28 == w % 28 == 0 and h >= 28 and w >= 28
    assert h * w <= max(total_pixels / n, video.MIN_PIXELS)
    assert h <= max(28, height + 14) and w <= max(28, width + 14)      # never enlarged beyond rounding


@given(st.lists(st.floats(0, 2), min_size=1, max_size=60), st.floats(0, 1), st.floats(0, 1))
def test_the_frame_on_display_never_runs_back(gaps, begin, stop):
    times = np.cumsum([0.0, *gaps])
    begin, stop = np.sort([begin, stop]) * times[-1]
    asked = np.linspace(begin, stop, 7, endpoint=False)
    index = video.on_display(times, asked)
    assert (np.diff(index) >= 0).all() and 0 <= index[0] and index[-1] < len(times)
    assert (times[index] <= asked + video.EPSILON).all()


@given(st.integers(2, 40), st.floats(0.1, 8), st.floats(-100, 1000), st.floats(-100, 1000))
def test_a_cut_has_at_least_a_pair_and_stays_inside(pairs, fps, start, end):
    clip = video.Clip(torch.arange(2 * pairs, dtype=torch.uint8)[:, None, None, None], fps)
    shown = clip.cut(start, end).frames.flatten().tolist()
    assert len(shown) >= 2 and len(shown) % 2 == 0 and shown == list(range(shown[0], shown[-1] + 1))
    if 0 <= start and start + 2 / fps <= end <= clip.duration:      # a frame and a half at most beside the annotation
        assert abs(shown[0] - start * fps) <= 1.5 and abs(shown[-1] + 1 - end * fps) <= 1.5


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 9),
       st.floats(0.05, 20), st.sampled_from([1.0, 2.0, 4.0]))
def test_positions_rise_along_text_and_start_after_the_video(t, h, w, before, after, fps, tokens_per_second):
    ids = torch.tensor([0] * before + [1] * (t * h * w) + [2] * after)
    positions = model.place(ids, 1, torch.tensor([t, 2 * h, 2 * w]), 2 / fps, tokens_per_second)
    text, (time, row, column) = positions[:, ids != 1], positions[:, ids == 1].view(3, t, h, w)
    first = [*range(before), *range(int(positions[:, ids == 1].max()) + 1, 10**6)][:before + after]
    assert (text == torch.tensor(first)).all() and positions.shape == (3, len(ids))
    assert (row == before + torch.arange(h)[:, None]).all() and (column == before + torch.arange(w)).all()
    assert time.min() == before and (time == time[:, :1, :1]).all() and (time.diff(dim=0) >= 0).all()
    if 2 / fps * tokens_per_second >= 1:        # else pairs of frames may share a place in time
        assert (time.diff(dim=0) > 0).all()


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


@settings(max_examples=4, phases=[Phase.generate])      # to shrink a failure would take minutes
@given(st.data())
def test_a_completion_s_log_probability_does_not_depend_on_its_group(tiny, prompts, data):
    """Others of any length and content beside it, in any place of the group, and another prompt in the batch."""
    policy, _ = tiny
    token = st.integers(0, policy.qwen.lm_head.out_features - 1).filter(lambda i: i not in policy.forbidden)
    group = data.draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=2, max_size=3))
    completions, mask = torch.zeros(2, 2, len(group), 4, dtype=torch.long)      # (1 + 1, B = 2, G, C)
    for i, ids in enumerate(group):
        completions[:, i, :len(ids)], mask[:, i, :len(ids)] = torch.tensor(ids), 1
    b, g = data.draw(st.integers(0, 1)), data.draw(st.integers(0, len(group) - 1))
    one = torch.tensor([[group[g]]])                                            # (1, 1, c)
    with torch.no_grad():
        together = grpo.logprobs(policy, prompts, completions, mask)            # (2, G, C)
        alone = grpo.logprobs(policy, [prompts[b]], one, torch.ones_like(one))
    torch.testing.assert_close(together[b, g, :len(group[g])], alone[0, 0], rtol=0, atol=1e-9)
    assert (together[mask == 0] == 0).all() and (together[mask == 1] < 0).all()
