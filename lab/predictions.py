"""Score anybody's answers to the TVG queries of an annotation file, whatever form they give a span of time.

    python -m lab.predictions FILE --annotations test.txt [--output DIR]

A line of FILE, of JSON lines, names the query and gives the answer, or an "error" (the query failed, IoU 0). The
predictions.jsonl that evaluate.py writes is such a file, and so is the output of ground.py --json:

    {"id": "AO8RW:1", "start": 0.4, "end": 6.5}     an id as data.py gives it, or "qid": 9769 of QVHighlights
    {"video": "AO8RW", "query": "a person is putting a book on a shelf.", "completion": "<answer>0.4 to 6.5</answer>"}

Prints the scores that evaluate.py has, and how many lines fit no query ("unmatched") or one that has an answer already
("duplicates", the last one counts), how many queries have no line ("missing") or an error ("failed"). With --output
the scores are also in scores.json there, and in predictions.jsonl what `python -m lab.compare` reads.

A completion is first read as training reads it (rewards.segment). For what that reader does not read, `lenient` knows
the forms that other models are asked for or fall into; "lenient" counts the answers that needed it. The last span
counts, of the last answer block, else of what follows the thoughts, else of the whole text.

    an answer says                                                      it is read as
    3.2 TO 9.1, 3.2 until 9.1 (till, through), **3.2** to **9.1**       3.2 to 9.1
    12.5s - 17.8s, 12.5–17.8, 12.5 ~ 17.8 sec, 12,5s to 17,8s           12.5 to 17.8
    [3.2, 9.1], (3.2; 9.1), and "3.2, 9.1" if it is the whole answer    3.2 to 9.1
    00:12 to 00:17, 0:01:12.5 - 0:01:20                                 12 to 17, 72.5 to 80
    1 to 2 minutes, 1 min 5 s to 1m20s, 0.5 to 1 hour                   60 to 120, 65 to 80, 1800 to 3600
    {"start": 3.2, "end": "9.1"} (begin, stop, finish; from, to)        3.2 to 9.1
    {"timestamp": [3.2, 9.1]}, {"time": "3.2 - 9.1"}                    3.2 to 9.1
    it starts at 3.2 s and ends at 9.1 s; end: 9.1, start: 3.2          3.2 to 9.1
    10 to 20 %, 24 to 48 frames, 2 to 3 steps, 1,200 to 1,300,          nothing: it is not seconds, or may not be
    1 min to 2, -3 to 5, 2024-05-12, 3 to 4e5, a moment alone
"""
import json
import math
import re
from collections import defaultdict
from dataclasses import MISSING, dataclass
from pathlib import Path

import data
import evaluate
import rewards
from engine import files
from engine.files import read_text
from engine.flags import command_line, flag
from engine.run import occupied


@dataclass(kw_only=True)
class Config:
    """answers to score"""
    file: str = flag(MISSING, "JSON lines of answers", positional=True)
    annotations: str = flag(MISSING, "annotation file of any of the formats that data.py lists")
    output: str = flag("", "new folder for scores and predictions; empty: scores are only printed")


def main(config: Config) -> evaluate.Metrics:
    """Print and return the scores."""
    if config.output:
        files.check_output(config.output)
        if occupied(config.output):
            raise ValueError(f"--output {config.output} is not empty; give another folder")
    samples, rejected = data.read(config.annotations, None)
    unusable = [item.sample for item in rejected if item.sample]
    answers, counts = match(read(config.file), samples + unusable)
    predictions = []
    for sample in samples:
        row = answers.get(sample.id, {"start": None, "end": None, "error": "missing"})
        truth = sample.start, sample.end
        predictions.append({**row, "id": sample.id, "task": "TVG", "video": sample.video,
                            "query": sample.query, "truth": truth,
                            "iou": evaluate.iou(row, truth)})
    qids = {sample.id: sample.qid for sample in samples}
    metrics = evaluate.summarise(predictions, unusable, qids)
    without_answer = metrics.pop("unreadable")              # here "missing" or "failed"
    missing = sum(sample.id not in answers for sample in samples)
    metrics |= {**counts, "missing": missing, "failed": without_answer - missing,
                "lenient": sum(row.get("lenient", False) for row in predictions),
                "rejected": len(rejected), "rejected_as_0": len(unusable)}
    if config.output:
        lines = [json.dumps(row) + "\n" for row in predictions]
        files.write_config(config, config.output)
        files.write_whole(Path(config.output) / "predictions.jsonl", "".join(lines))
        files.write_whole(Path(config.output) / "scores.json", json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics))
    return metrics


def match(rows: list[dict],
          samples: list[data.Sample]) -> tuple[dict[str, dict], dict[str, int]]:
    """({id of a sample: its row}, counts of what fits nothing or comes twice). A row belongs to the sample with its id,
    else to the windows of its qid, else to those with its video (folder and extension do not matter) and query (white
    space and case do not). The last row of a sample counts."""
    index = defaultdict(list)
    for sample in samples:
        for key in {sample.id, sample.qid or sample.id, (bare(sample.video), plain(sample.query))}:
            index[key].append(sample)
    answers, counts = {}, {"unmatched": 0, "duplicates": 0}
    for row in rows:
        fitting = fitting_samples(row, index)
        if not fitting:
            counts["unmatched"] += 1
        if any(sample.id in answers for sample in fitting):
            counts["duplicates"] += 1
        for sample in fitting:
            answers[sample.id] = row
    return answers, counts


def fitting_samples(row: dict, index: dict[str | tuple, list[data.Sample]]) -> list[data.Sample]:
    """The samples that a row is about. An id that stands for several queries, or for another query than the row has, is
    of another file."""
    keys = [str(row[name]) for name in ("id", "qid") if name in row]
    if "video" in row and "query" in row:
        keys.append((bare(row["video"]), plain(row["query"])))
    for key in keys:
        queries = {plain(sample.query) for sample in index.get(key, ())}
        if "query" in row:
            queries.add(plain(row["query"]))
        if key in index and len(queries) == 1:
            return index[key]
    return []


def bare(video: str) -> str:
    """The name of a video without folder and extension; x_510.0 stays as it is."""
    return re.sub(r"\.[A-Za-z]\w{1,3}$", "", Path(str(video)).name)


def plain(query: str) -> str:
    return " ".join(str(query).split()).casefold()


def read(path: str) -> list[dict]:
    """The TVG rows of a JSON-lines file, with start and end in seconds, or None where there is no answer, and
    `lenient`: whether only `lenient` could read the completion. Where start and end are given, null means that there is
    no answer.

    Raises OSError, or ValueError, which names the file and the line, for what is no prediction."""
    try:
        lines = re.split(r"\r*\n|\r", read_text(path, "replace"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a file of JSON lines") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("task", "TVG") == "TVG":
                rows.append(with_span(row))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: no prediction ({error}); mend or remove the "
                             "line") from error
    return rows


def with_span(row: dict) -> dict:
    """A row with its answer as start, end and lenient. Raises ValueError or TypeError for what is no prediction."""
    has_span = "start" in row and "end" in row
    if not ("id" in row or "qid" in row or "video" in row and "query" in row):
        raise ValueError("neither id, nor qid, nor video and query")
    if not (has_span or "completion" in row or "error" in row):
        raise ValueError("neither start and end, nor completion, nor error")
    span, needed_lenient = None, False
    if row.get("start") is not None and row.get("end") is not None:
        span = float(row["start"]), float(row["end"])
    elif row.get("completion"):
        span = rewards.segment(row["completion"])
        if span is None and not has_span:
            span = lenient(row["completion"])
            needed_lenient = span is not None and not row.get("error")
    if span is None or row.get("error") or not all(map(math.isfinite, span)):
        span = None, None
    start, end = span
    return {**row, "start": start, "end": end, "lenient": needed_lenient}


# The lenient reader


def time_pattern(number: str) -> str:
    """The pattern of one time, of which `number` is the pattern of a number: 7, 7.5 s, 0:07, 1 min 5 s, 1h."""
    second_unit = "s(?:ec(?:ond)?s?)?"
    word_end = r"(?![^\W\d_])"
    seconds = rf"{number} ?{second_unit}{word_end}"
    minutes = rf"{number} ?m(?:in(?:ute)?s?)?{word_end}"
    hours = rf"{number} ?h(?:(?:ou)?rs?)?{word_end}"
    gap = ",? ?(?:and )?"
    clock = rf"(?:[0-9]+:)?[0-9]+:[0-9][0-9](?:[.,][0-9]+)?(?: ?{second_unit}(?!\w))?"
    forms = (clock,
             f"{hours}(?:{gap}{minutes})?(?:{gap}{seconds})?",
             rf"{minutes} ?[0-9]+(?!\w)",
             f"{minutes}(?:{gap}{seconds})?",
             seconds,
             number)
    return f"(?:{'|'.join(forms)})"


# a number is not the rest of another one, nor negative
BEFORE = r"(?<![\w.,:/-])"
AFTER = r"(?!\w|[.,:/][0-9]|-\w)"
TIME = time_pattern(r"[0-9]+(?:\.[0-9]+|,[0-9]{1,2}(?![0-9]))?")
TIME_IN_LIST = time_pattern(r"[0-9]+(?:\.[0-9]+)?")         # where a comma is between two
START = r"""(?:start|begin|["']from["'])"""
END = r"""(?:end|stop|finish|["']to["'])"""
FAR = r"[^0-9-]{0,40}?"
SPAN_FORMS = (
    rf"{BEFORE}(?P<from_0>{TIME})\s?(?:-|to|until|till|through|and)\s?(?P<to_0>{TIME}){AFTER}",
    rf"""[\[(]\s?["']?(?P<from_1>{TIME_IN_LIST})["']?\s?[,;]"""
    rf"""\s?["']?(?P<to_1>{TIME_IN_LIST})["']?\s?[\])]""",
    rf"{START}{FAR}{BEFORE}(?P<from_2>{TIME}){FAR}{END}{FAR}{BEFORE}(?P<to_2>{TIME}){AFTER}",
    rf"{END}{FAR}{BEFORE}(?P<to_3>{TIME}){FAR}{START}{FAR}{BEFORE}(?P<from_3>{TIME}){AFTER}",
    rf"\A\s?(?P<from_4>{TIME_IN_LIST})[,;]\s(?P<to_4>{TIME_IN_LIST})\.?\s?\Z")
SPANS = re.compile("|".join(SPAN_FORMS))
# Behind a span without a unit: %, or what it counts, which is any word but these.
NOT_COUNTED = ("about|after|and|approximately|as|at|based|because|before|but|by|during|for|he|if|"
               "in|into|it|on|or|she|since|so|the|then|there|they|this|until|we|when|where|which|"
               "while|with")
COUNTED_BEHIND = re.compile(rf"\s?%| ?\(?(?!(?:{NOT_COUNTED})\b)[^\W\d_]")
COUNTED_BEFORE = re.compile(r"(?:frame|step|percent)s?\b[ :]*$"
                            r"|[0-9]\s?(?:[mh]|minutes?|mins?|hours?|hrs?) (?:and )?$")
COUNTED_WITHIN = re.compile("frame|step|percent|%")
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}                # in one of each unit
MARKUP = re.compile(r"[*`]|(?<![^\W_])_+|_+(?![^\W_])")     # but start_time stays as it is
DASHES = re.compile("[–—−‒―~→]|->|=>")


def lenient(completion: str) -> tuple[float, float] | None:
    """The span in seconds of an answer in any of the forms in the table above; None if there is none. It may be
    inverted. Takes time linear in the text."""
    text = completion.rpartition("</think>")[2]
    if "<answer>" in completion:
        text = completion.rpartition("<answer>")[2].partition("</answer>")[0]
    text = DASHES.sub("-", MARKUP.sub("", text).lower())
    text = "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())
    last = None
    for match in SPANS.finditer(text):
        groups = {name: value for name, value in match.groupdict().items() if value}
        (_, start), (_, end) = sorted(groups.items())       # from_... comes before to_...
        end, unit = to_seconds(end, "")
        start, start_unit = to_seconds(start, unit)
        before = text[max(0, match.start() - 20):match.start()]
        is_counted = COUNTED_WITHIN.search(match[0]) or COUNTED_BEFORE.search(before)
        if not unit:
            is_counted = is_counted or COUNTED_BEHIND.match(text, match.end())
        is_mixed = start_unit in ("m", "h") and not unit    # 1 min to 2
        if not is_counted and not is_mixed:
            last = start, end
    return last


def to_seconds(text: str, unit: str) -> tuple[float, str]:
    """(seconds, unit of its last number) of a match of `time_pattern`; a number alone has `unit`."""
    if ":" in text:
        numbers = [to_number(number) for number in re.findall(r"[0-9]+(?:[.,][0-9]+)?", text)]
        return sum(number * 60.0**i for i, number in enumerate(reversed(numbers))), "s"
    pairs = re.findall(r"([0-9]+(?:[.,][0-9]+)?) ?([smh]?)", text)
    if len(pairs) > 1:
        return sum(to_number(number) * SECONDS[name or "s"] for number, name in pairs), "s"
    number, name = pairs[0]
    return to_number(number) * SECONDS[name or unit or "s"], name or unit


def to_number(text: str) -> float:
    return float(text.replace(",", "."))


if __name__ == "__main__":
    command_line(Config, main, __doc__)
