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
numbers = st.floats(0, 1e6) | st.floats()
spans = st.tuples(numbers, numbers)
SAMPLE = data.Sample("a:1", "a.mp4", "a person opens the door and laughs", 3.0, 9.0, 20.0)


@settings(max_examples=80)
@given(completions, st.sampled_from(list(tasks.TASKS.values())))
def test_rewards_are_within_their_bounds_for_any_text(text, task):
    reward, again = task.reward([text, text], [SAMPLE, SAMPLE])
    assert list(reward.parts) == ["format", task.part]
    assert reward.parts["format"] in (0.0, 1.0) and all(0 <= value <= 1 for value in reward.parts.values())
    assert task.name == "TVG" or list(reward.parts.values())[1] in (0.0, 1.0)
    assert 0 <= reward.total <= 2 and reward == again


@settings(max_examples=30)
@given(completions, st.sampled_from([rewards.vc, rewards.ar, rewards.vd]))
def test_cosine_rewards_are_within_their_bounds(text, reward):
    assert all(0 <= value <= 1 for value in reward([text], [SAMPLE], by_cosine=True)[0].parts.values())


queries = st.sampled_from(["a person opens the door and laughs", "person open door.", "the kitchen", "he opens it", ""])
answered = st.sampled_from(["he opens the door, laughing", "a person open door", "opens", "3 to 8", "a dress", ""])
batches = st.lists(st.tuples(answered.map("<think>a</think> <answer>{}</answer>".format) | completions, queries),
                   min_size=1, max_size=6)


@settings(max_examples=40)
@given(batches, st.lists(st.integers(0, 6)), st.sampled_from(list(tasks.TASKS.values())), st.booleans())
def test_rewards_do_not_depend_on_what_else_is_in_the_batch(batch, cuts, task, by_cosine):
    """Any split of a batch pays the same, completion by completion; nothing is remembered from one to the other."""
    options = {"by_cosine": True} if by_cosine and task.name != "TVG" else {}
    edges, found = sorted({0, len(batch), *(cut for cut in cuts if cut < len(batch))}), []
    for a, b in zip(edges, edges[1:]):
        texts, asked = zip(*batch[a:b])
        rewards._found.clear()
        found += task.reward(list(texts), [replace(SAMPLE, query=query) for query in asked], **options)
    single = []
    for text, query in batch:
        rewards._found.clear()
        single += task.reward([text], [replace(SAMPLE, query=query)], **options)
    assert found == single


@given(completions)
def test_any_query_can_be_masked_and_asked(query):
    """Of a sentence only verbs change, and the prompt holds it, whatever is in it."""
    found = rewards.find_verbs([query])[0]
    edges = [0, *(edge for start, end, _ in found for edge in (start, end)), len(query)]
    assert edges == sorted(edges) and all(start < end for start, end, _ in found)
    rest = "".join(query[a:b] for a, b in zip(edges[::2], edges[1::2]))
    assert tasks.mask_verbs(query).replace("[]", "") == rest.replace("[]", "")
    sample = data.Sample("a", "a", query, 0.0, 1.0, None)
    assert query in tasks.TASKS["TVG"].prompt(sample) and tasks.mask_verbs(query) in tasks.TASKS["VC"].prompt(sample)


@given(completions)
@example("<answer>" + "9" * 400 + " to 3</answer>")
def test_a_span_is_two_numbers_or_none(text):
    span = rewards.segment(text)
    assert span is None or len(span) == 2 and all(value >= 0 for value in span)     # maybe inverted or infinite: IoU 0
    assert 0 <= rewards.iou(span, (0.0, 1.0)) <= 1


TIMES = ["1:05", "3,5", "7.25", "2 min", "1 h 5 s", "12", "[", "]", " - ", " to ", ", ", " and ", '"start": ',
         ' "end": ', "%", " frames", "\n", "**", "<answer>", "\u2192", "~", "(", "starts at ", " ends at ",
         "-", ":", "9" * 400]


@given(st.text(st.characters(codec=None), max_size=40) | st.lists(st.sampled_from(TIMES), max_size=9).map("".join))
@example("9" * 400 + " - 3")
def test_the_lenient_reader_gives_two_numbers_or_none(text):
    span = predictions.lenient(text)
    assert span is None or len(span) == 2 and all(value >= 0 for value in span)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["", "s", " sec", " seconds"]),
       st.sampled_from(["to", "and"]))
def test_what_is_written_is_read(start, end, unit, word):
    text = f"so <answer>{start / 100}{unit} {word} {end / 100}{unit}</answer>"
    assert rewards.segment(text) == (start / 100, end / 100)


@settings(max_examples=300)
@given(spans, spans)
@example((0.0, 5e-324), (0.0, 5e-324))
@example((0.0, 1e308), (-1e308, 1e308))
def test_iou_is_symmetric_bounded_and_1_only_for_equal_spans(a, b):
    value = rewards.iou(a, b)
    assert 0 <= value <= 1 and value == rewards.iou(b, a)
    proper = all(map(math.isfinite, (*a, 2 * (a[1] - a[0])))) and a[0] < a[1]
    assert rewards.iou(a, a) == (1.0 if proper else 0.0)
    if value == 1.0:        # as far as numbers of 53 bits can tell spans apart
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12 * (a[1] - a[0]))


@given(st.floats(0, 1e4), st.floats(0.01, 1e4), st.floats(0, 1e4), st.floats(0.01, 1e4))
def test_iou_does_not_depend_on_the_unit_of_time(a, b, c, d):
    seconds, minutes = (rewards.iou((a / u, (a + b) / u), (c / u, (c + d) / u)) for u in (1, 60))
    assert seconds == pytest.approx(minutes, abs=1e-6)


leaves = st.none() | st.booleans() | st.integers(-10, 10**20) | st.floats() | st.text(max_size=5)
anything = leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=3), leaves, max_size=2)
names = st.just("a") | st.sampled_from(["x/b.mp4", "../c", "/d.mp4", "..", "", "\ud800", "a\0"]) | st.text(max_size=6)
sentences = st.sampled_from(["a person sits", " he\nsits", "a # b", ""])
segments = st.tuples(st.integers(-1, 9), st.floats(0, 30)).map(lambda pair: [pair[0], sum(pair)])


def entries(**fields):
    """Lists of objects of these fields; now and then one of the fields is anything, or there is another one."""
    change = st.dictionaries(st.sampled_from([*fields, "more"]), anything, max_size=1)
    changed = st.tuples(st.fixed_dictionaries(fields), change).map(lambda pair: {**pair[0], **pair[1]})
    return st.lists(changed, max_size=3)


lines = st.lists(st.tuples(names, segments | st.tuples(anything, anything), sentences).map(
    lambda row: f"{row[0]} {row[1][0]} {row[1][1]}##{row[2]}"), max_size=4)
activitynet = entries(duration=st.just(20), timestamps=st.lists(segments, min_size=2, max_size=2),
                      sentences=st.lists(sentences, min_size=2, max_size=2))
activitynet = activitynet.map(lambda rows: dict(zip(("a", "../b", ""), rows)))
qvhighlights = entries(qid=st.integers(0, 5), query=sentences, vid=names, duration=st.just(20),
                       relevant_windows=st.lists(segments, max_size=3))
timerft = entries(video=names, timestamp=segments, sentence=sentences, duration=st.just(20.5),
                  video_start=st.sampled_from([0, 3.5]), video_end=st.sampled_from([20.5, 24, 24, None]))
tvgbench = entries(path=names, question=sentences, answer=segments.map("{0[0]}-{0[1]:.2f}".format),
                   duration=st.just(20), start=st.none(), end=st.none())
files = {
    "Charades-STA": lines.map(lambda rows: "\n".join(rows).encode("utf-8", "replace")),
    "QVHighlights": qvhighlights.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    **{name: entries.map(json.dumps).map(str.encode) for name, entries in (
        ("ActivityNet Captions", activitynet), ("TimeRFT", timerft), ("TVGBench", tvgbench))},
    "none": st.binary(max_size=200)}


@pytest.mark.parametrize("name", files)
def test_every_reader_returns_or_raises_its_own_error(tmp_path, name):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    read = dict.fromkeys(data.FORMATS, 0)

    @settings(max_examples=60)
    @given(files[name], st.booleans())
    def check(content, allow_outside):
        (tmp_path / "file").write_bytes(content)
        for videos in (None, str(tmp_path / "videos")):
            read_or_error(tmp_path / "file", videos, allow_outside, read)

    check()
    assert name == "none" or read[name] > 5, read       # else this would say little


def read_or_error(path, videos, allow_outside, read):
    try:
        samples, rejected = data.read(str(path), videos, allow_outside)
    except data.AnnotationError as error:
        assert "\n" not in str(error)
        return
    read[data.parse(str(path))[0]] += 1
    assert samples and len({sample.id for sample in samples}) == len(samples)
    for s in samples:
        assert 0 <= s.start < s.end and (s.duration is None or s.end <= s.duration) and s.query == s.query.strip() != ""
        assert (s.video_start is None) == (s.video_end is None) and (s.video_start or 0) <= (s.video_end or 0)
        assert videos is None or allow_outside or s.video.startswith(videos + "/") and ".." not in s.video.split("/")
    assert all("\n" not in str(item) for item in rejected)


logs = st.lists(st.fixed_dictionaries({"step": st.integers(-5, 10**30) | anything}, optional={
    "task": st.sampled_from(["TVG", "XX"]) | anything, "reward": st.floats() | anything,
    "part": st.sampled_from(["iou", "reward"]) | anything, "iou": st.floats() | anything}), max_size=4)


@given(st.binary(max_size=100) | logs.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
@example(b'{"step": 1, "reward": NaN, "kl": 1e999}')
def test_any_log_gives_steps_or_one_error(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    try:
        steps = plot.read_metrics(tmp_path)
    except ValueError as error:
        assert "metrics.jsonl" in str(error) and "\n" not in str(error)
    else:
        assert steps and all(type(s["step"]) is int and type(s["task"]) is str for s in steps)
        assert all(math.isfinite(value) for s in steps for value in s.values() if not isinstance(value, str))


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
    begin, stop = sorted((begin * times[-1], stop * times[-1]))
    n = video.frame_count(stop - begin, len(times))
    index = video.on_display(times, begin + np.arange(n) * (stop - begin) / n)
    assert (np.diff(index) >= 0).all() and 0 <= index[0] and index[-1] < len(times)
    assert (times[index] <= begin + np.arange(n) * (stop - begin) / n + video.EPSILON).all()


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
    assert positions.shape == (3, len(ids))
    text, middle = positions[:, ids != 1], positions[:, ids == 1]
    assert (text == text[0]).all() and (text.diff() > 0).all() and text[0, 0] == 0
    assert middle.min() == before and (middle[0].diff() >= 0).all()
    if after:
        assert text[0, before] == middle.max() + 1
    assert (middle[1].view(t, h, w) == before + torch.arange(h)[:, None]).all()
    assert (middle[2].view(t, h, w) == before + torch.arange(w)).all()
    if 2 / fps * tokens_per_second >= 1:        # else pairs of frames may share a place in time
        assert len(set(map(tuple, positions.T.tolist()))) == len(ids)


groups = st.integers(2, 8).flatmap(lambda g: st.lists(st.lists(st.floats(0, 2, width=32), min_size=g, max_size=g),
                                                      min_size=1, max_size=4))


@given(groups, st.floats(-5, 5, width=32), st.randoms(use_true_random=False))
def test_advantages_are_centred_and_know_neither_level_nor_order(rewards, level, random):
    rewards = torch.tensor(rewards, dtype=torch.float64)        # (B, G)
    advantage = grpo.advantages(rewards)
    assert advantage.shape == rewards.shape and advantage.isfinite().all()
    assert advantage.mean(-1).abs().max() < 1e-9 and (advantage.std(-1) <= 1).all()
    torch.testing.assert_close(grpo.advantages(rewards + level), advantage, rtol=1e-6, atol=1e-6)
    order = torch.tensor(random.sample(range(rewards.shape[1]), rewards.shape[1]))
    torch.testing.assert_close(grpo.advantages(rewards[:, order]), advantage[:, order], rtol=1e-9, atol=1e-9)
    assert ((rewards[:, :, None] > rewards[:, None]) <= (advantage[:, :, None] >= advantage[:, None])).all()
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
    vocabulary = policy.qwen.lm_head.out_features
    token = st.integers(0, vocabulary - 1).filter(lambda i: i not in policy.forbidden)
    group = [data.draw(st.lists(token, min_size=1, max_size=4)) for _ in range(data.draw(st.integers(2, 3)))]
    place = data.draw(st.integers(0, len(group) - 1))
    completions, mask = torch.zeros(2, 2, len(group), 4, dtype=torch.long)      # (1 + 1, B = 2, G, C)
    for i, ids in enumerate(group):
        completions[:, i, :len(ids)], mask[:, i, :len(ids)] = torch.tensor(ids), 1
    with torch.no_grad():
        together = grpo.logprobs(policy, prompts, completions, mask)            # (2, G, C)
        size = len(group[place])
        b = data.draw(st.integers(0, 1))
        one = completions[:1, place:place + 1, :size]                           # (1, 1, c)
        alone = grpo.logprobs(policy, [prompts[b]], one, torch.ones_like(one))
    torch.testing.assert_close(together[b, place, :size], alone[0, 0], rtol=0, atol=1e-9)
    assert (together[mask == 0] == 0).all() and (together[mask == 1] < 0).all()
