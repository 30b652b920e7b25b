"""The whole method on a made-up world, on a laptop: writes videos, annotations and a tiny model, then runs the scripts.

    python toy.py               the paper in miniature
    python toy.py --steps 5     a smoke run of all of it, which learns nothing
    python toy.py --weakness verbs --steps 100      wrong verbs in all tasks: what TVG and the inversion tasks mend
    python toy.py --steps 0     only the world and its warm start, from which experiments.py trains

The world: a coloured circle or square rests, rises, falls, grows, shrinks, spins or blinks, and in most videos does
both a thing and its opposite. The model: a Qwen2.5-VL of 1.1 million weights. Its warm start imitates a teacher with a
--weakness (see WEAKNESSES); the rewards come from the annotations, which are right, so GRPO has something to mend, and
the table at the end tells whether it did, in the answers and in the thoughts. Nothing outside this file knows that the
world is made up.
"""
import json
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data
import evaluate
import model
import rewards
import sft
import tasks
import train
from engine import files, flags, lora, plot, scores, video
from engine.flags import flag
from engine.run import occupied, one_run

SIZE, FPS = 28, 4                       # pixels, frames a second
SECONDS = 12                            # of every video; see `write_model`
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 240), "yellow": (230, 210, 40)}
SHAPES = ("circle", "square")
VERBS = {"rising": "falling", "falling": "rising", "growing": "shrinking", "shrinking": "growing",
         "spinning": "blinking", "blinking": "spinning"}    # verb: its opposite
BACKGROUND = 115                        # near the mean that Qwen subtracts, so that only what is drawn has an effect
LATE = 0.6                              # chance that a teacher of late edges marks a start or an end a second late
MAX_TOKENS = {True: 56, False: 16}      # of a completion with and without thoughts; the longest demonstrations have 45
                                        # and 9 with their stop token
WEAKNESSES = {      # late edges in TVG?, chances that a verb is taken for its opposite, in which tasks
    "edges": (True, {}, ()),
    "verbs": (False, {"rising": 0.7, "growing": 0.7, "blinking": 0.7}, tuple(tasks.TASKS)),
    "both": (True, {"blinking": 0.75}, tasks.INVERSIONS),
    "none": (False, {}, ())}
TOLD = ("narrated", "opposite", "rest", "other", "missing")                     # see `narrated`
COLUMNS = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "right_event", "same_answer", *tasks.INVERSIONS, *TOLD)


def draw_frame(colour: str, shape: str, verb: str, second: float) -> np.ndarray:
    """One frame (28, 28, 3) of an object that does `verb` ('resting' for nothing). The motion starts anew each second,
    so that the two frames of one video token show it, and a bar at the bottom tells the time."""
    phase = second % 1
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    y, x = y - 13, x - 14
    y = y + {"rising": 16 * phase - 4, "falling": 4 - 16 * phase}.get(verb, 0)
    radius = {"growing": 4 + 6 * phase, "shrinking": 7 - 6 * phase}.get(verb, 5)
    angle = np.pi * phase if verb == "spinning" else 0
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    inside = (u ** 2 + v ** 2 < radius ** 2) if shape == "circle" else (np.maximum(abs(u), abs(v)) < radius * 0.9)
    if verb == "blinking" and phase >= 0.5:
        inside[:] = False
    frame = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)
    frame[inside] = COLOURS[colour]
    frame[inside & (abs(u) < 1) & (v < 0)] = BACKGROUND                         # a notch, so that spinning shows
    frame[-2:, : int(second / SECONDS * SIZE + 0.5)] = 255
    return frame


@dataclass(frozen=True)
class Story:
    """One video: who does what in each second."""
    name: str
    colour: str
    shape: str
    verbs: tuple[str, ...]              # one a second

    def events(self) -> list[tuple[int, int, str]]:
        """(start, end, verb) of everything that is not rest."""
        edges = [0, *(s for s in range(1, len(self.verbs)) if self.verbs[s] != self.verbs[s - 1]), len(self.verbs)]
        return [(a, b, self.verbs[a]) for a, b in zip(edges, edges[1:]) if self.verbs[a] != "resting"]

    def sentence(self, verb: str) -> str:
        return f"the {self.colour} {self.shape} is {verb}."


def tell(rng: np.random.Generator, name: str, seconds: int = SECONDS) -> Story:
    """A random story: a verb, in 70 % of the videos its opposite, in 30 % a third one, in any order, of 2 to 4 s each,
    with a rest of 0 to 5 s before the first and of 0 to 3 s before the others, as long as there is time. So one answer
    for all videos scores little, and one for all queries of a video is often wrong."""
    first, verbs = str(rng.choice(list(VERBS))), []
    third = rng.choice([verb for verb in VERBS if verb not in (first, VERBS[first])])
    chosen = [first] + [VERBS[first]] * (rng.random() < 0.7) + [third] * (rng.random() < 0.3)
    for number, verb in enumerate(rng.permutation(chosen)):
        verbs += ["resting"] * int(rng.integers(0, 4 if number else 6))
        verbs += [str(verb)] * int(rng.integers(2, 5)) if len(verbs) < seconds - 1 else []
    verbs = (verbs + ["resting"] * seconds)[:seconds]
    return Story(name, str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), tuple(verbs))


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


def demonstrate(story: Story, start: int, end: int, verb: str, task: str, weakness: str,
                rng: np.random.Generator) -> str:
    """What the teacher of the warm start says of one event: it narrates second by second, then answers.

    In TVG it says behind each second whether that is meant. The mark follows the verb, so it is a look-up of a word in
    the query; before the verb it would be a comparison of a picture with a word, which so small a model does not learn.

    The faults, which the rewards do not share: edges a second late, as people who press a key do, and verbs taken for
    their opposites. Then it means the first event that it believes is the asked one, or else the opposite of it."""
    late, confused, where = WEAKNESSES[weakness]
    believe = lambda v: VERBS[v] if task in where and rng.random() < confused.get(v, 0) else v
    believed = [(a, b, believe(v)) for a, b, v in story.events()]
    if task == "TVG":
        begin, stop, _ = next(event for v in (verb, VERBS[verb]) for event in believed if event[2] == v)
        if late:
            begin, stop = begin + int(rng.random() < LATE), min(stop + int(rng.random() < LATE), len(story.verbs))
        said = {second: v for a, b, v in believed for second in range(a, b)}
        thought = " ".join(f"{second} {said.get(second, 'resting')} {'yes' if begin <= second < stop else 'no'}"
                           for second in range(len(story.verbs)))
        return f"<think>{thought}</think> <answer>{begin} to {stop}</answer>"
    said = next(v for a, _, v in believed if a == start)
    answer = said if task == "AR" else story.sentence(said)
    thought = " ".join(f"{second} {said}" for second in range(end - start))
    return f"<think>{thought}</think> <answer>{answer}</answer>"


def write_world(folder: Path, seed: int, train_videos: int, test_videos: int,
                weakness: str = "both") -> dict[str, Story]:
    """Videos, train.txt and test.txt (Charades-STA), and for sft.py the teacher's demonstrations.jsonl and right.jsonl,
    those of a teacher without a weakness, as far as they are not there. Returns the stories by name."""
    rng, stories = np.random.default_rng(seed), {}
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train_videos), ("test", test_videos)):
        lines, demonstrations, right = [], [], []
        for number in range(count):
            name = f"{split}{number:04d}"
            story = stories[name] = tell(rng, name)
            film(story, folder / "videos" / f"{name}.mp4")
            for start, end, verb in story.events():
                lines.append(f"{name} {start:.1f} {end:.1f}##{story.sentence(verb)}\n")
                for teacher, rows in ((weakness, demonstrations), ("none", right)):
                    rows += [{"id": f"{name}:{len(lines)}", "task": task,
                              "completion": demonstrate(story, start, end, verb, task, teacher, rng)}
                             for task in ("TVG", "TVG", "VC", "AR", "VD")]
        texts = {f"{split}.txt": "".join(lines)}
        if split == "train":
            for kind, rows in (("demonstrations", demonstrations), ("right", right)):
                texts[f"{kind}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
        for name, text in texts.items():
            if not (folder / name).exists():
                files.write_whole(folder / name, text)
    return stories


def write_model(folder: Path, world: Path, seed: int) -> None:
    """A tiny Qwen2.5-VL with random weights, and a byte-pair tokenizer, made from what is said in the world, with
    Qwen's special tokens.

    On the time axis a second of video is as long as the three tokens that a thought has for it (number, verb, mark),
    and all videos are equally long. So what a thought is about always lies at the same distance before it. Measured at
    step 200 of warm starts: of the changes of verb 87 to 100 % were told right so, 33 to 41 % in videos of 10 to 16 s.
    """
    samples, _ = data.read(str(world / "train.txt"), str(world / "videos"))
    texts = [json.loads(line)["completion"] for line in open(world / "demonstrations.jsonl")]
    texts += ["user\n", "assistant\n"] + [task.prompt(s) for s in samples for task in tasks.TASKS.values()]
    special = [*model.STOP_TOKENS, "<|im_start|>", *model.VISION_TOKENS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>", "<answer>", "</answer>")])
    bpe.train_from_iterator(texts * 2, trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=special,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=special)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    ids = dict(zip(("vision_start", "vision_end", "image", "video"),
                   tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                                                    "<|video_pad|>"])))
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[4, 6, 6])),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
                           fullatt_block_indexes=[1], tokens_per_second=3),
        tie_word_embeddings=True, **{f"{name}_token_id": value for name, value in ids.items()})
    torch.manual_seed(seed)
    qwen = Qwen2_5_VLForConditionalGeneration(config)
    for module in qwen.modules():           # transformers' 0.02 is far too small for such widths
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim ** -0.5)
    encoder = model.Encoder(tokenizer, 3)
    model.save(model.Policy(qwen, []), encoder, folder)


@dataclass
class Config:
    output: str = flag("runs/toy", "where the world, the models and the pictures go")
    seed: int = flag(0, "of the world, the warm start and GRPO")
    weakness: str = flag("both", "of the teacher: edges (late in TVG), verbs (taken for their opposites in all tasks), "
                                 "both (late in TVG, one wrong verb in the inversion tasks) or none")
    steps: int = flag(40, "GRPO steps; below 20, everything else is cut down as well; 0: none, the rest in full size")
    tvg_prob: float = flag(0.8, "p of Eq. 13; 1 trains TVG alone")
    learning_rate: float = flag(1e-4, "of GRPO: a hundred times that of a model of 3 billion weights")
    lora_rank: int = flag(0, "rank of adapters that GRPO trains instead of all weights, with --learning_rate 1e-3; 0: "
                             "none. The warm start trains all weights")
    beta: float = flag(0.005, "weight of the KL term: little, since the reference is what is to be mended")
    prompts_per_step: int = flag(16, "prompts in a GRPO step")
    warm_start: str = flag("", "model folder to start from, such as another run's runs/toy/model; empty: make one")
    warm_steps: int = flag(400, "SFT steps of a new warm start")
    invert_sft: bool = flag(True, "false: the warm start imitates TVG alone, as without Invert-SFT (Figure 6)")
    think: bool = flag(True, "false: no thoughts, so no narration, in warm start, GRPO and evaluation")
    eval_every: int = flag(0, "score 200 test queries every so many GRPO steps; 0: not")
    resume: bool = flag(False, "go on with the run in --output that was stopped or killed")


@one_run
def main(config: Config) -> dict[str, dict]:
    """World, warm start, evaluation, GRPO, evaluation, table and pictures. Returns the scores of the table's rows."""
    flags.check_numbers(config, "learning_rate", "prompts_per_step", "warm_steps")
    lora.check_rank(config.lora_rank)
    if config.weakness not in WEAKNESSES:
        raise ValueError(f"--weakness {config.weakness}: choose from {', '.join(WEAKNESSES)}")
    if config.warm_start:
        lora.check(config.warm_start)
    world, small = Path(config.output), 0 < config.steps < 20
    if occupied(world):
        if not config.resume:
            raise ValueError(f"--output {world} is not empty; give --resume to go on with the run in it, or another "
                             "folder")
        before = files.read_config(world / "config.json")
        for name in files.changed_flags(vars(config), before, {"output", "resume"}):
            raise ValueError(f"--{name}: {world} was made with {before.get(name)}; give the same flags to --resume")
    files.write_config(config, world)
    print(f"1. writing videos and annotations to {world}/", flush=True)
    stories = write_world(world, config.seed, 60 if small else 1000, 20 if small else 300, config.weakness)
    common = dict(annotations=str(world / "train.txt"), videos=str(world / "videos"), cache=str(world / "cache"),
                  think=config.think)
    longest = MAX_TOKENS[config.think]
    start = world / "model"
    if config.warm_start:
        print(f"2. taking the warm start from {config.warm_start}", flush=True)
        source = Path(config.warm_start)
    else:
        print("2. making a warm start: Invert-SFT and TVG, from a teacher's demonstrations", flush=True)
        source = world / "sft" / "model"
        if not (world / "random").exists():
            write_model(world / "random", world, config.seed)
        shown = world / "demonstrations.jsonl"
        if not config.invert_sft:
            rows = [row for row in shown.read_text().splitlines() if json.loads(row)["task"] == "TVG"]
            files.write_whole(shown := world / "tvg.jsonl", "\n".join(rows) + "\n")
        if not source.exists():
            sft.main(sft.Config(model=str(world / "random"), output=str(world / "sft"), batch_size=16, seed=config.seed,
                                steps=min(config.warm_steps, 60) if small else config.warm_steps, learning_rate=1e-3,
                                demonstrations=str(shown), resume=config.resume, **common))
    if not start.exists():
        shutil.copytree(source, world / "model.tmp", dirs_exist_ok=True)
        (world / "model.tmp").rename(start)

    print("3. evaluating the warm start on held-out videos, then blind", flush=True)
    common["annotations"] = str(world / "test.txt")

    def test(name: str, folder: Path, **flags) -> dict[str, float]:
        found = evaluate.main(evaluate.Config(model=str(folder), output=str(world / name), batch_size=256,
                                              max_tokens=longest, **flags, **common))
        answers = read_answers(world / name)
        told = [{"id": i, "video": row["video"], **narrated([row], stories)} for i, row in answers.items()]
        files.write_whole(world / name / "narrated.jsonl", "".join(json.dumps(row) + "\n" for row in told))
        return {**found, **narrated(list(answers.values()), stories)}

    fixed = evaluate.main(evaluate.Config(annotations=common["annotations"], fixed_answer=str(world / "train.txt")))
    rows = {"best fixed answer": fixed, "warm start, blind": test("test_blind", start, blind=True),
            "warm start": test("test_warm_start", start)}
    if not config.steps:
        return rows

    print(f"4. GRPO, p = {config.tvg_prob}", flush=True)
    common["annotations"] = str(world / "train.txt")
    if not (world / "grpo" / "model").exists():
        train.main(train.Config(model=str(start), output=str(world / "grpo"), steps=config.steps, seed=config.seed,
                                tvg_prob=config.tvg_prob, prompts_per_step=config.prompts_per_step, beta=config.beta,
                                learning_rate=config.learning_rate, max_tokens=longest, resume=config.resume,
                                eval_annotations=str(world / "test.txt") if config.eval_every else "",
                                eval_every=config.eval_every, lora_rank=config.lora_rank, **common))
    common["annotations"] = str(world / "test.txt")
    rows[f"GRPO, p = {config.tvg_prob}"] = test("test_grpo", world / "grpo" / "model")

    print(f"\n{rows['warm start']['queries']} held-out queries")
    for name, values in {"": dict(zip(COLUMNS, COLUMNS)), **rows}.items():
        cells = [values.get(c, "-") for c in COLUMNS]
        print(f"{name:<18}" + "".join(f"{cell if isinstance(cell, str) else f'{cell:.3f}':>{max(len(c), 6) + 1}}"
                                      for c, cell in zip(COLUMNS, cells)))
    before, after = (read_answers(world / name) for name in ("test_warm_start", "test_grpo"))
    print("mIoU gained by GRPO: %+.3f, 95 %% interval %+.3f to %+.3f" %
          scores.difference(list(before.values()), list(after.values())))
    plot.curves(world / "grpo", world / "curves.png")
    draw_examples(world, before, after)
    files.write_whole(world / "table.json", json.dumps(rows, indent=2) + "\n")
    print(f"\npictures: {world / 'curves.png'}, {world / 'examples.png'}, {world / 'method.png'}")
    return rows


def narrated(rows: list[dict], stories: dict[str, Story]) -> dict[str, float]:
    """How the thoughts of TVG rows tell the seconds of events: shares with the right verb ("narrated"), its opposite,
    rest, another verb, and none at all ("missing"). The IoU reward does not see it: an answer may be right and its
    thought wrong."""
    told = Counter()
    for row in rows:
        said = dict(re.findall(r"(\d+) ([a-z]+)", re.split("</think>|<answer>", row["completion"])[0]))
        for second, verb in enumerate(stories[Path(row["video"]).stem].verbs):
            if verb != "resting":
                kinds = {verb: "narrated", VERBS[verb]: "opposite", "resting": "rest", None: "missing"}
                told[kinds.get(said.get(str(second)), "other")] += 1
    return {name: told[name] / told.total() for name in TOLD}


def read_answers(folder: Path, task: str = "TVG") -> dict[str, dict]:
    """The rows of an evaluation in a task, by sample id."""
    rows = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    return {row["id"]: row for row in rows if row["task"] == task}


def draw_examples(world: Path, before: dict[str, dict], after: dict[str, dict]) -> None:
    """Queries of six test videos before and after GRPO: the two most improved, two in the middle, the two that lost
    most. Of the first of each two, two queries: whether the model tells them apart shows there only. And the most
    improved query with its inversion, method.png."""
    samples = {s.id: s for s in data.read(str(world / "test.txt"), str(world / "videos"))[0]}
    of_video = defaultdict(list)
    for i, row in before.items():
        of_video[row["video"]].append(i)
    several = [ids for ids in of_video.values() if len(ids) > 1]
    several.sort(key=lambda ids: np.mean([before[i]["iou"] - after[i]["iou"] for i in ids]))
    middle = len(several) // 2
    chosen = [*several[:2], *several[middle:middle + 2], *several[-2:]]

    def row(i: str) -> dict:
        found = {"before": before[i], "after": after[i]}
        span = lambda answer: (answer["start"], answer["end"]) if answer["start"] is not None else None
        return {"clip": video.load(samples[i].video), "query": samples[i].query,
                "truth": (samples[i].start, samples[i].end),
                "answers": {name: span(answer) for name, answer in found.items()},
                "iou": {name: answer["iou"] for name, answer in found.items()}}

    plot.examples([row(i) for number, ids in enumerate(chosen) for i in ids[:2 - number % 2]], world / "examples.png")
    of = {name: [read_answers(world / folder, name) for folder in ("test_warm_start", "test_grpo")]
          for name in tasks.INVERSIONS}
    gains = {i: sum(two[i][tasks.TASKS[name].part] - one[i][tasks.TASKS[name].part] for name, (one, two) in of.items())
             for i in before}
    best, told = max(before, key=lambda i: (after[i]["iou"] - before[i]["iou"] + gains[i])), {}
    for name, both in of.items():
        asked = tasks.TASKS[name].prompt(samples[best]).partition(" Reply as ")[0]
        said = [f"{when}: {rewards.answer(rows[best]['completion'])}" for when, rows in zip(("before", "after"), both)]
        told[name] = "   ".join([asked, *said])
    chosen = row(best)
    plot.method(chosen, chosen["clip"].cut(*chosen["truth"]), told, world / "method.png")


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
