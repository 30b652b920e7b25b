"""The whole method on a made-up world, on a laptop: writes videos, annotations and a tiny model, then runs the scripts.

    python toy.py               the paper in miniature
    python toy.py --steps 5     a smoke run of all of it, which learns nothing
    python toy.py --weakness verbs --steps 100      wrong verbs in all tasks: what TVG and the inversion tasks mend
    python toy.py --steps 0     only the world and its warm start, from which lab/experiments.py trains

The world: a coloured circle or square rests, rises, falls, grows, shrinks, spins or blinks, and in most videos does
both a thing and its opposite. The model: a Qwen2.5-VL of 1.1 million weights. Its warm start imitates a teacher with a
--weakness (see WEAKNESSES); the rewards come from the annotations, which are right, so GRPO has something to mend, and
the table at the end tells whether it did, in the answers and in the thoughts. Nothing outside this file knows that the
world is made up.
"""
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import data
import evaluate
import model
import rewards
import sft
import tasks
import train
from engine import files, flags, logs, lora, plot, scores, video
from engine.flags import flag
from engine.run import occupied, one_run

SIZE, FPS = 28, 4                       # pixels, frames per second
SECONDS = 12                            # of every video; see `write_model`
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 240),
           "yellow": (230, 210, 40)}
SHAPES = ("circle", "square")
VERBS = {"rising": "falling", "falling": "rising", "growing": "shrinking", "shrinking": "growing",
         "spinning": "blinking", "blinking": "spinning"}    # verb: its opposite
BACKGROUND = 115    # near the mean that Qwen subtracts, so that only what is drawn has an effect
LATE = 0.6          # chance that a teacher of late edges marks a start or an end a second late
# Of a completion with and without thoughts; the longest demonstrations have 45 and 9 with their stop token
MAX_TOKENS = {True: 56, False: 16}
# Late edges in TVG?, chances that a verb is taken for its opposite, in which tasks
WEAKNESSES = {
    "edges": (True, {}, ()),
    "verbs": (False, {"rising": 0.7, "growing": 0.7, "blinking": 0.7}, tuple(tasks.TASKS)),
    "both": (True, {"blinking": 0.75}, tasks.INVERSIONS),
    "none": (False, {}, ())}
NARRATIONS = ("narrated", "opposite", "rest", "other", "missing")       # see `narrated`
COLUMNS = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "right_event", "same_answer", *tasks.INVERSIONS,
           *NARRATIONS)
CHAT_TEMPLATE = (   # Qwen's, without its system turn
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def draw_frame(colour: str, shape: str, verb: str, second: float) -> np.ndarray:
    """One frame (28, 28, 3) of an object that does `verb` ('resting' for nothing). The motion starts anew each second,
    so that the two frames of one video token show it, and a bar at the bottom tells the time."""
    phase = second % 1
    rise = {"rising": 16 * phase - 4, "falling": 4 - 16 * phase}.get(verb, 0)
    radius = {"growing": 4 + 6 * phase, "shrinking": 7 - 6 * phase}.get(verb, 5)
    angle = np.pi * phase if verb == "spinning" else 0
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    x = x - 14                          # distances from the middle of the object
    y = y - 13 + rise
    u = np.cos(angle) * x + np.sin(angle) * y           # the same, along axes that turn with it
    v = np.cos(angle) * y - np.sin(angle) * x
    if shape == "circle":
        inside = np.hypot(u, v) < radius
    else:
        inside = np.maximum(abs(u), abs(v)) < radius * 0.9
    if verb == "blinking" and phase >= 0.5:
        inside[:] = False
    notch = inside & (abs(u) < 1) & (v < 0)             # so that spinning shows
    frame = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)
    frame[inside] = COLOURS[colour]
    frame[notch] = BACKGROUND
    frame[-2:, :int(second / SECONDS * SIZE + 0.5)] = 255
    return frame


@dataclass(frozen=True)
class Story:
    """One video: who does what in each second."""
    name: str
    colour: str
    shape: str
    verbs: tuple[str, ...]              # one for each second

    def events(self) -> list[tuple[int, int, str]]:
        """(start, end, verb) of everything that is not rest."""
        events, start = [], 0
        for verb, seconds in groupby(self.verbs):
            end = start + len(list(seconds))
            if verb != "resting":
                events.append((start, end, verb))
            start = end
        return events

    def sentence(self, verb: str) -> str:
        return f"the {self.colour} {self.shape} is {verb}."


def tell(rng: np.random.Generator, name: str, seconds: int = SECONDS) -> Story:
    """A random story: a verb, in 70 % of the videos its opposite, in 30 % a third one, in any order, of 2 to 4 s each,
    with a rest of 0 to 5 s before the first and of 0 to 3 s before the others, as long as there is time. So one answer
    for all videos scores little, and one for all queries of a video is often wrong."""
    first = str(rng.choice(list(VERBS)))
    third = str(rng.choice([verb for verb in VERBS if verb not in (first, VERBS[first])]))
    chosen = [first]
    if rng.random() < 0.7:
        chosen.append(VERBS[first])
    if rng.random() < 0.3:
        chosen.append(third)
    verbs = []
    for verb in rng.permutation(chosen):
        longest_rest = 3 if verbs else 5
        verbs += ["resting"] * int(rng.integers(0, longest_rest + 1))
        if len(verbs) < seconds - 1:
            verbs += [str(verb)] * int(rng.integers(2, 5))
    verbs += ["resting"] * seconds
    colour = str(rng.choice(list(COLOURS)))
    return Story(name, colour, str(rng.choice(SHAPES)), tuple(verbs[:seconds]))


def film(story: Story, path: Path) -> None:
    """Write the mp4 of a story, unless it is there."""
    if path.exists():
        return
    unfinished = path.with_suffix(".tmp")
    with av.open(str(unfinished), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "10", "preset": "ultrafast"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for i in range(len(story.verbs) * FPS):
            image = draw_frame(story.colour, story.shape, story.verbs[i // FPS], i / FPS)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    unfinished.replace(path)


def demonstrate(story: Story, event: tuple[int, int, str], task: str, weakness: str,
                rng: np.random.Generator) -> str:
    """The completion that the teacher of the warm start gives for one event: a narration, second by second, and then
    the answer.

    In TVG the teacher writes behind each second whether that second is meant. The mark follows the verb, so the model
    only has to look up a word in the query; a mark before the verb would compare a picture with a word, which so small
    a model does not learn.

    The teacher has faults, which the rewards do not share: edges a second late, as of people who press a key, and verbs
    taken for their opposites. The teacher then means the first event that it takes for the one in the query, or else
    for the opposite of it."""
    late, confused, confused_in = WEAKNESSES[weakness]
    believed = []
    for start, end, verb in story.events():
        if task in confused_in and rng.random() < confused.get(verb, 0):
            verb = VERBS[verb]
        believed.append((start, end, verb))
    start, end, verb = event
    if task != "TVG":
        verb = next(seen for begin, _, seen in believed if begin == start)
        thought = " ".join(f"{second} {verb}" for second in range(end - start))
        answer = verb if task == "AR" else story.sentence(verb)
        return f"<think>{thought}</think> <answer>{answer}</answer>"
    meant = [seen for seen in believed if seen[2] == verb]
    if not meant:
        meant = [seen for seen in believed if seen[2] == VERBS[verb]]
    start, end, _ = meant[0]
    if late and rng.random() < LATE:
        start += 1
    if late and rng.random() < LATE:
        end = min(end + 1, len(story.verbs))
    narration = ["resting"] * len(story.verbs)
    for begin, stop, seen in believed:
        narration[begin:stop] = [seen] * (stop - begin)
    seconds = []
    for second, seen in enumerate(narration):
        mark = "yes" if start <= second < end else "no"
        seconds.append(f"{second} {seen} {mark}")
    return f"<think>{' '.join(seconds)}</think> <answer>{start} to {end}</answer>"


def write_world(folder: Path, seed: int, train_videos: int, test_videos: int,
                weakness: str = "both") -> dict[str, Story]:
    """Write videos, train.txt and test.txt (Charades-STA), and for sft.py the teacher's demonstrations.jsonl, and
    right.jsonl, those of a teacher without a weakness. A file that is there stays. Returns the stories by name."""
    rng = np.random.default_rng(seed)
    stories = {}
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train_videos), ("test", test_videos)):
        annotations, demonstrations, right = [], [], []
        for number in range(count):
            name = f"{split}{number:04d}"
            story = tell(rng, name)
            stories[name] = story
            film(story, folder / "videos" / f"{name}.mp4")
            for event in story.events():
                start, end, verb = event
                annotations.append(f"{name} {start:.1f} {end:.1f}##{story.sentence(verb)}")
                for teacher, rows in ((weakness, demonstrations), ("none", right)):
                    for task in ("TVG", "TVG", "VC", "AR", "VD"):
                        completion = demonstrate(story, event, task, teacher, rng)
                        id = f"{name}:{len(annotations)}"
                        rows.append(json.dumps({"id": id, "task": task, "completion": completion}))
        write_lines(folder / f"{split}.txt", annotations)
        if split == "train":
            write_lines(folder / "demonstrations.jsonl", demonstrations)
            write_lines(folder / "right.jsonl", right)
    return stories


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file, unless it is there."""
    if not path.exists():
        files.write_whole(path, "".join(f"{line}\n" for line in lines))


def write_model(folder: Path, world: Path, seed: int) -> None:
    """A tiny Qwen2.5-VL with random weights, and a tokenizer made from what is said in the world.

    On the time axis a second of video is as long as the three tokens that a thought has for it (number, verb, mark),
    and all videos are equally long. So the second that a thought is about always lies at the same distance before the
    thought. Measured at step 200 of warm starts: 87 to 100 % of the changes of verb were narrated right; in videos of
    10 to 16 s, 33 to 41 %.
    """
    samples, _ = data.read(str(world / "train.txt"), str(world / "videos"))
    texts = [json.loads(line)["completion"] for line in open(world / "demonstrations.jsonl")]
    texts += ["user\n", "assistant\n"]
    texts += [task.prompt(sample) for sample in samples for task in tasks.TASKS.values()]
    tokenizer = train_tokenizer(texts)
    id_of = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[4, 6, 6])),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
            fullatt_block_indexes=[1], tokens_per_second=3),
        tie_word_embeddings=True,
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"))
    torch.manual_seed(seed)
    qwen = Qwen2_5_VLForConditionalGeneration(config)
    for module in qwen.modules():           # transformers' 0.02 is far too small for such widths
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim ** -0.5)
    model.save(model.Policy(qwen, []), model.Encoder(tokenizer, 3), folder)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of 600 tokens, with Qwen's special tokens and the tags of the format."""
    special = [*model.STOP_TOKENS, "<|im_start|>", *model.VISION_TOKENS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in model.TAGS])
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=special,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>", additional_special_tokens=special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass
class Config:
    output: str = flag("runs/toy", "where the world, the models and the pictures go")
    seed: int = flag(0, "of the world, the warm start and GRPO")
    weakness: str = flag("both", "of the teacher: edges (late in TVG), verbs (taken for their "
                                 "opposites in all tasks), both (late in TVG, one wrong verb in the "
                                 "inversion tasks) or none")
    steps: int = flag(40, "GRPO steps; below 20, everything else is cut down as well; 0: none, the "
                          "rest in full size")
    tvg_prob: float = flag(0.8, "p of Eq. 13; 1 trains TVG alone")
    learning_rate: float = flag(1e-4, "of GRPO: a hundred times that of the 3B model")
    lora_rank: int = flag(0, "rank of adapters that GRPO trains instead of all weights, with "
                             "--learning_rate 1e-3; 0: none. The warm start trains all weights")
    beta: float = flag(0.005, "weight of the KL term: small, since the reference is to be mended")
    prompts_per_step: int = flag(16, "prompts in a GRPO step")
    warm_steps: int = flag(400, "SFT steps of the warm start")
    invert_sft: bool = flag(True, "false: the warm start imitates TVG alone, as without Invert-SFT "
                                  "(Figure 6)")
    think: bool = flag(True, "false: no thoughts, so no narration, in warm start, GRPO and "
                             "evaluation")
    resume: bool = flag(False, "go on with the run in --output that was stopped or killed")


@one_run
def main(config: Config) -> dict[str, dict]:
    """World, warm start, evaluation, GRPO, evaluation, table and pictures. Returns the scores of the table's rows."""
    check_flags(config)
    world = Path(config.output)
    files.write_config(config, world)
    logs.say(f"1. writing videos and annotations to {world}/")
    videos = (60, 20) if is_small(config) else (1000, 300)
    stories = write_world(world, config.seed, *videos, config.weakness)
    logs.say("2. making a warm start: Invert-SFT and TVG, from a teacher's demonstrations")
    start = imitate(config)

    logs.say("3. evaluating the warm start on held-out videos, then blind")
    rows = {"best fixed answer": score_fixed_answer(world),
            "warm start, blind": test(config, start, "test_blind", stories, blind=True),
            "warm start": test(config, start, "test_warm_start", stories)}
    if config.steps == 0:
        return rows

    logs.say(f"4. GRPO, p = {config.tvg_prob}")
    trained = reinforce(config, start)
    rows[f"GRPO, p = {config.tvg_prob}"] = test(config, trained, "test_grpo", stories)

    before, after = read_answers(world / "test_warm_start"), read_answers(world / "test_grpo")
    logs.say(f"{len(before)} held-out queries")
    print_table(rows)
    gain, low, high = scores.difference(list(before.values()), list(after.values()))
    logs.say(f"mIoU gained by GRPO: {gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    files.write_whole(world / "table.json", json.dumps(rows, indent=2) + "\n")
    plot.curves(world / "grpo", world / "curves.png")
    draw_examples(world, before, after)
    draw_method(world, before, after)
    logs.say(f"pictures: {world}/curves.png, {world}/examples.png, {world}/method.png")
    return rows


def check_flags(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work, or with which --output was not begun."""
    flags.check_numbers(config, "learning_rate", "prompts_per_step", "warm_steps")
    lora.check_rank(config.lora_rank)
    if config.weakness not in WEAKNESSES:
        raise ValueError(f"--weakness {config.weakness}: choose from {', '.join(WEAKNESSES)}")
    world = Path(config.output)
    if not occupied(world):
        return
    if not config.resume:
        raise ValueError(f"--output {world} is not empty; give --resume to go on with the run in "
                         "it, or another folder")
    before = files.read_config(world / "config.json")
    for name in files.changed_flags(vars(config), before, {"output", "resume"}):
        raise ValueError(f"--{name}: {world} was made with {before.get(name)}; give the same flags "
                         "to --resume")


def is_small(config: Config) -> bool:
    """Whether this is a smoke run, in which everything is cut down."""
    return 0 < config.steps < 20


def data_flags(config: Config, split: str) -> dict[str, str | bool]:
    """The flags by which sft.py, train.py and evaluate.py get the data of "train" or "test"."""
    world = config.output
    return dict(annotations=f"{world}/{split}.txt", videos=f"{world}/videos",
                cache=f"{world}/cache", think=config.think)


def imitate(config: Config) -> Path:
    """Run sft.py on the teacher's demonstrations, unless that is done. Returns the folder of the warm start."""
    world = Path(config.output)
    demonstrations = world / "demonstrations.jsonl"
    if not config.invert_sft:
        lines = demonstrations.read_text().splitlines()
        demonstrations = world / "tvg.jsonl"
        write_lines(demonstrations, [line for line in lines if json.loads(line)["task"] == "TVG"])
    if not (world / "random").exists():
        write_model(world / "random", world, config.seed)
    start = world / "sft" / "model"
    steps = min(config.warm_steps, 60) if is_small(config) else config.warm_steps
    if not start.exists():
        sft.main(sft.Config(
            model=f"{world}/random", output=f"{world}/sft", demonstrations=str(demonstrations),
            steps=steps, batch_size=16, learning_rate=1e-3, seed=config.seed, resume=config.resume,
            **data_flags(config, "train")))
    return start


def reinforce(config: Config, start: Path) -> Path:
    """Run train.py from the warm start, unless that is done. Returns the folder of the trained model."""
    output = Path(config.output, "grpo")
    if not (output / "model").exists():
        train.main(train.Config(
            model=str(start), output=str(output), steps=config.steps, seed=config.seed,
            tvg_prob=config.tvg_prob, prompts_per_step=config.prompts_per_step, beta=config.beta,
            learning_rate=config.learning_rate, lora_rank=config.lora_rank,
            max_tokens=MAX_TOKENS[config.think], resume=config.resume,
            **data_flags(config, "train")))
    return output / "model"


def test(config: Config, folder: Path, name: str, stories: dict[str, Story],
         blind: bool = False) -> dict[str, float]:
    """Run evaluate.py on a model's folder and the test videos. Returns its scores with those of `narrated`, which are
    also in narrated.jsonl, query by query."""
    output = Path(config.output, name)
    measured = evaluate.main(evaluate.Config(
        model=str(folder), output=str(output), batch_size=256, blind=blind,
        max_tokens=MAX_TOKENS[config.think], **data_flags(config, "test")))
    answers = list(read_answers(output).values())
    lines = []
    for row in answers:
        shares = narrated([row], stories)
        lines.append(json.dumps({"id": row["id"], "video": row["video"], **shares}) + "\n")
    files.write_whole(output / "narrated.jsonl", "".join(lines))
    return {**measured, **narrated(answers, stories)}


def score_fixed_answer(world: Path) -> dict[str, float]:
    """The scores of one answer for all test queries, the best for those of training: so much is reached without video
    and query."""
    truths = [(query.start, query.end) for query in data.read(str(world / "train.txt"), None)[0]]
    spans = combinations(range(SECONDS + 1), 2)
    best = max(spans, key=lambda span: sum(rewards.iou(span, truth) for truth in truths))
    rows = []
    for query in data.read(str(world / "test.txt"), None)[0]:
        row = {**vars(query), "task": "TVG", "truth": (query.start, query.end)}
        row["start"], row["end"] = best
        row["iou"] = rewards.iou(best, row["truth"])
        rows.append(row)
    return evaluate.summarise(rows)


def print_table(rows: dict[str, dict]) -> None:
    """A line for each row's scores, under the names of COLUMNS."""
    print(" " * 18, *(column.rjust(6) for column in COLUMNS))
    for name, values in rows.items():
        cells = []
        for column in COLUMNS:
            cell = f"{values[column]:.3f}" if column in values else "-"
            cells.append(cell.rjust(max(len(column), 6)))
        print(f"{name:18}", *cells)


def narrated(rows: list[dict], stories: dict[str, Story]) -> dict[str, float]:
    """How the thoughts of TVG rows narrate the seconds of events: shares with the right verb ("narrated"), its
    opposite, rest, another verb, and none at all ("missing"). The IoU reward does not see the thought: an answer may be
    right and its thought wrong."""
    counts = dict.fromkeys(NARRATIONS, 0)
    for row in rows:
        thought = re.split("</think>|<answer>", row["completion"])[0]
        narration = dict(re.findall(r"(\d+) ([a-z]+)", thought))
        for second, verb in enumerate(stories[Path(row["video"]).stem].verbs):
            if verb != "resting":
                kinds = {verb: "narrated", VERBS[verb]: "opposite", "resting": "rest",
                         None: "missing"}
                counts[kinds.get(narration.get(str(second)), "other")] += 1
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def read_answers(folder: Path, task: str = "TVG") -> dict[str, dict]:
    """The rows of an evaluation in a task, by sample id."""
    rows = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    return {row["id"]: row for row in rows if row["task"] == task}


def draw_examples(world: Path, before: dict[str, dict], after: dict[str, dict]) -> None:
    """examples.png: two queries each of three test videos, before and after GRPO: of the video that gained most, of one
    in the middle, and of the one that lost most. Whether the model tells events apart shows in two queries only."""
    videos = defaultdict(list)          # the ids of each video's queries
    for id, row in before.items():
        videos[row["video"]].append(id)
    several = [ids for ids in videos.values() if len(ids) > 1]
    several.sort(key=lambda ids: np.mean([before[id]["iou"] - after[id]["iou"] for id in ids]))
    clips, rows = [], []
    for ids in (several[0], several[len(several) // 2], several[-1]):
        for id in ids[:2]:
            clips.append(video.load(before[id]["video"]))
            rows.append({"before": before[id], "after": after[id]})
    plot.examples(clips, rows, world / "examples.png")


def draw_method(world: Path, before: dict[str, dict], after: dict[str, dict]) -> None:
    """method.png: the test query whose answer gained most, with its inversion."""
    best = max(before, key=lambda id: after[id]["iou"] - before[id]["iou"])
    row = before[best]
    sample = data.Sample(best, row["video"], row["query"], *row["truth"], None)
    notes = {}
    for name in tasks.INVERSIONS:
        texts = [tasks.TASKS[name].prompt(sample).partition(" Reply as ")[0]]
        for when, folder in (("before", "test_warm_start"), ("after", "test_grpo")):
            completion = read_answers(world / folder, name)[best]["completion"]
            texts.append(f"{when}: {rewards.answer(completion)}")
        notes[name] = "   ".join(texts)
    clip = video.load(sample.video)
    segment = clip.cut(sample.start, sample.end)
    plot.method(clip, {"before": row, "after": after[best]}, segment, notes, world / "method.png")


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
