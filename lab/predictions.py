"""What others wrote: text files as they come, and answers of other models, whatever form they give a span of time.

Training rewards one form only, which the prompt asks for (rewards.segment); that reader is tried first here, too. For
what it does not read, `lenient` knows the forms that other models are asked for or fall into. The last span counts, of
the last answer block, else of what follows the thoughts, else of the whole text.

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
from collections.abc import Callable
from pathlib import Path

from engine.files import read_text


def time(number: str) -> str:
    """The pattern of one time, of which `number` is the pattern of a number: 7, 7.5 s, 0:07, 1 min 5 s, 1h."""
    unit = {"s": "s(?:ec(?:ond)?s?)?", "m": "m(?:in(?:ute)?s?)?", "h": "h(?:(?:ou)?rs?)?"}
    some = {name: rf"{number} ?{pattern}(?![^\W\d_])" for name, pattern in unit.items()}
    gap = ",? ?(?:and )?"
    return (rf"(?:(?:[0-9]+:)?[0-9]+:[0-9][0-9](?:[.,][0-9]+)?(?: ?{unit['s']}(?!\w))?"
            rf"|{some['h']}(?:{gap}{some['m']})?(?:{gap}{some['s']})?"
            rf"|{some['m']} ?[0-9]+(?!\w)|{some['m']}(?:{gap}{some['s']})?|{some['s']}|{number})")


BEFORE, AFTER = r"(?<![\w.,:/-])", r"(?!\w|[.,:/][0-9]|-\w)"    # a number is not the rest of another, nor negative
TIME, PLAIN = time(r"[0-9]+(?:\.[0-9]+|,[0-9]{1,2}(?![0-9]))?"), time(r"[0-9]+(?:\.[0-9]+)?")   # PLAIN: in a list
START, END = r"""(?:start|begin|["']from["'])""", r"""(?:end|stop|finish|["']to["'])"""
FAR = r"[^0-9-]{0,40}?"
SPANS = re.compile("|".join((
    rf"{BEFORE}(?P<from_0>{TIME})\s?(?:-|to|until|till|through|and)\s?(?P<to_0>{TIME}){AFTER}",
    rf"""[\[(]\s?["']?(?P<from_1>{PLAIN})["']?\s?[,;]\s?["']?(?P<to_1>{PLAIN})["']?\s?[\])]""",
    rf"{START}{FAR}{BEFORE}(?P<from_2>{TIME}){FAR}{END}{FAR}{BEFORE}(?P<to_2>{TIME}){AFTER}",
    rf"{END}{FAR}{BEFORE}(?P<to_3>{TIME}){FAR}{START}{FAR}{BEFORE}(?P<from_3>{TIME}){AFTER}",
    rf"\A\s?(?P<from_4>{PLAIN})[,;]\s(?P<to_4>{PLAIN})\.?\s?\Z")))
# Without a unit, what a word says of a number decides; these words say nothing of it, any other is what it counts
OTHER = re.compile(r"\s?%| ?\(?(?!(?:about|after|and|approximately|as|at|based|because|before|but|by|during|for|he|if|"
                   r"in|into|it|on|or|she|since|so|the|then|there|they|this|until|we|when|where|which|while|with)\b)"
                   r"[^\W\d_]")
COUNTING = re.compile(r"(?:frame|step|percent)s?\b[ :]*$|[0-9]\s?(?:[mh]|minutes?|mins?|hours?|hrs?) (?:and )?$")
SCALE = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str, unit: str) -> tuple[float, str]:
    """(seconds, unit of its last number) of a match of `time`; a number alone has `unit`."""
    if ":" in text:
        parts = [float(part.replace(",", ".")) for part in re.findall(r"[0-9]+(?:[.,][0-9]+)?", text)]
        return sum(part * 60.0**i for i, part in enumerate(reversed(parts))), "s"
    parts = [(float(number.replace(",", ".")), name)
             for number, name in re.findall(r"([0-9]+(?:[.,][0-9]+)?) ?([smh]?)", text)]
    if len(parts) > 1:
        return sum(number * SCALE[name or "s"] for number, name in parts), "s"
    number, name = parts[0]
    return number * SCALE[name or unit or "s"], name or unit


def lenient(completion: str) -> tuple[float, float] | None:
    """The span in seconds of an answer in any of the forms in the table above; None if there is none. It may be
    inverted. Takes time linear in the text."""
    if "<answer>" in completion:
        text = completion.rpartition("<answer>")[2].partition("</answer>")[0]
    else:
        text = completion.rpartition("</think>")[2]
    text = re.sub(r"[*`]|(?<![^\W_])_+|_+(?![^\W_])", "", text).lower()           # but start_time stays as it is
    text = re.sub(r"[–—−‒―~→]|->|=>", "-", text)
    text = "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())
    found = None
    for span in SPANS.finditer(text):
        first, last = (next(value for name, value in span.groupdict().items() if value and name.startswith(side))
                       for side in ("from", "to"))
        end, unit = seconds(last, "")
        start, of_first = seconds(first, unit)
        counted = not unit and OTHER.match(text, span.end()) or re.search("frame|step|percent|%", span[0]) or \
            COUNTING.search(text[max(0, span.start() - 20):span.start()])
        if not counted and not (of_first in ("m", "h") and not unit):
            found = start, end
    return found


def read(path: str, strict: Callable[[str], tuple[float, float] | None]) -> list[dict]:
    """The TVG rows of a JSON-lines file, with start and end in seconds, or None where there is no answer, and
    `lenient`: whether `strict` could not read the completion, but `lenient` could. Where start and end are given, null
    means that there is no answer.

    Raises OSError, or ValueError, which names the file and the line, for what is no prediction."""
    rows = []
    try:
        lines = re.split(r"\r*\n|\r", read_text(path, "replace"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}); give --predictions a file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {"task": "none"}
            if row.get("task", "TVG") != "TVG":
                continue
            if not (row.keys() & {"id", "qid"} or {"video", "query"} <= row.keys()):
                raise ValueError("neither id, nor qid, nor video and query")
            if not (row.keys() & {"completion", "error"} or {"start", "end"} <= row.keys()):
                raise ValueError("neither start and end, nor completion, nor error")
            span, needed, text = (row.get("start"), row.get("end")), False, row.get("completion") or ""
            if None not in span:
                span = tuple(map(float, span))
            elif (span := strict(text)) is None and not {"start", "end"} <= row.keys():
                needed = (span := lenient(text)) is not None and not row.get("error")
            start, end = span if span and all(map(math.isfinite, span)) and not row.get("error") else (None, None)
            rows.append({**row, "start": start, "end": end, "lenient": needed})
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: no prediction ({error}); mend or remove the line") from error
    return rows


def match(rows: list[dict], samples: list) -> tuple[dict[str, dict], dict[str, int]]:
    """({id of a sample: its row}, counts of what fits nothing or comes twice). A row belongs to the sample with its id,
    else to the windows of its qid, else to those with its video (folder and extension do not matter) and query (white
    space and case do not). The last row of a sample counts."""
    plain = lambda query: " ".join(str(query).split()).casefold()
    bare = lambda path: re.sub(r"\.[A-Za-z]\w{1,3}$", "", Path(str(path)).name)      # but x_510.0 stays as it is
    index = {}
    for sample in samples:
        for key in {sample.id, sample.qid or sample.id, (bare(sample.video), plain(sample.query))}:
            index.setdefault(key, []).append(sample)
    found, counts = {}, {"unmatched": 0, "duplicates": 0}
    for row in rows:
        keys = [str(row[key]) for key in ("id", "qid") if key in row]
        keys += [(bare(row["video"]), plain(row["query"]))] if {"video", "query"} <= row.keys() else []
        said = {plain(row["query"])} if "query" in row else set()
        # an id that stands for several queries, or for another query than the row says, tells nothing
        of = next((index[key] for key in keys if key in index and
                   len({plain(sample.query) for sample in index[key]} | said) == 1), [])
        counts["unmatched"] += not of
        counts["duplicates"] += any(sample.id in found for sample in of)
        found.update((sample.id, row) for sample in of)
    return found, counts
