"""The wiring of training: what train.main and sft.main do with their flags and files, computed a second time.

A run is watched from outside: what `grpo.rollout` got and gave, weights and gradients at each step of the optimizer,
the files. Each of its steps is then computed in another way: prompts from the paper's sentences and from videos whose
grey tells the time; log-probabilities by transformers' own forward pass, with prompt and video repeated for each
completion; advantages and losses by hand.
"""
import json
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import read_rows
from oracles import distributions, published_loss, repeated_logprobs
from torch.optim import optimizer as optim
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import data
import grpo
import model
import rewards
import sft
import tasks
import train
from engine import run as engine_run
from engine import video

FILM_FPS, LONGEST = 8, 16       # frames per second; seconds in which their grey rises from 0 to 255
PIXELS = 16 * 28 * 28           # of a whole video that is worth cutting down
MASKED = {"Person closed the door": "Person [] the door",      # the paper's example
          "the red circle is spinning.": "the red circle is [].",
          "the square grows.": "the square [].",
          "a person opens the door and walks away.": "a person [] the door and [] away."}
CLOSE, SPIN, GROW, OPEN = MASKED
SILENT = ("the table over there", "the sky over there", "a red ball on the floor")     # no verb
# of VC, AR and VD the paper's
SENTENCES = {"TVG": 'the event "{query}" happen in the video, in seconds',
             "VC": 'Add a verb for the event "{masked}" based on the video',
             "AR": "Use a verb to describe the event based on the video",
             "VD": "Describe what people have done based on the video"}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])        # of Qwen's pixels
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])

# Two runs, in which every flag has another value than the default; p off by 0.02, another seed, other tasks each change
# what the first one draws.
RUNS = {
    "updates": dict(
        steps=4, seed=2654, tvg_prob=0.55, tasks=["VD", "AR"], group_size=4, prompts_per_step=3,
        micro_batch_size=2, beta=0.5, learning_rate=1e-3, loss_type="bnpo", num_iterations=2,
        epsilon=0.1, vd_max_verbs=3, max_tokens=24, temperature=0.7, total_pixels=PIXELS),
    "frozen": dict(
        steps=2, seed=5, tvg_prob=0.0, tasks=["VC"], group_size=3, prompts_per_step=2, beta=0.0,
        learning_rate=1e-3, loss_type="dr_grpo", scale_rewards="none", cosine_rewards=True,
        think=False, max_tokens=40, total_pixels=PIXELS, freeze_vision=True)}
# tested in other files
ELSEWHERE = {"annotations", "eval_annotations", "eval_samples", "lora_rank", "model"}


def film(path, seconds, side):
    with av.open(str(path), "w") as file:
        options = {"crf": "5", "preset": "ultrafast"}
        stream = file.add_stream("libx264", rate=FILM_FPS, options=options)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for i in range(seconds * FILM_FPS):
            grey = np.full((side, side, 3), round(255 * i / FILM_FPS / LONGEST), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos of 28 and of 140 pixels; annotations with and without a part of the file and a verb, two of them alike."""
    folder = tmp_path_factory.mktemp("wiring")
    (folder / "videos").mkdir()
    film(folder / "videos" / "clock.mp4", 12, 28)
    film(folder / "videos" / "big.mp4", 6, 140)
    annotations = [("clock", SPIN, 1.0, 5.0, 2.0, 10.0), ("clock", SPIN, 1.0, 5.0, 2.0, 10.0),
                   ("clock", OPEN, 6.0, 9.0, 0.0, 12.0), ("big", CLOSE, 1.0, 4.0, 1.0, 5.0),
                   ("clock", GROW, 1.3, 3.9, 3.0, 6.9)]
    annotations += [("clock", query, 1.0, 3.0, 4.0, 8.0) for query in SILENT]
    entries = []
    for name, query, start, end, begin, stop in annotations:
        entry = {"video": f"{name}.mp4", "sentence": query, "timestamp": [start, end],
                 "duration": stop - begin}
        if begin:
            entry |= {"video_start": begin, "video_end": stop}
        entries.append(entry)
    (folder / "train.json").write_text(json.dumps(entries))
    return folder


def worth(text, query):
    """(format, own part) of a completion: a reward for any babble, so that no group is flat, by text and sample."""
    return len(text) % 4 / 3, (len(text) + len(query)) % 3 / 2


def watch(script, world, warm, name, **flags):
    """Run script.main with `worth` as every task's reward. Returns its config, samples by id, metrics and rows of
    samples.jsonl; of each step the rollouts; of each step of the optimizer its weights before, the gradient, and the
    weights after; and of each task the options of its reward."""
    config = script.Config(model=str(warm), annotations=str(world / "train.json"),
                           videos=str(world / "videos"), output=str(world / name),
                           cache=str(world / "cache"), workers=1, **flags)
    steps, moves, given_options, rollout = [], [], {}, grpo.rollout

    def watched_rollout(*args):
        steps.append(rollout(*args))
        return steps[-1]

    def pay(task, completions, samples, **given):
        given_options[task.name] = given
        paid = []
        for text, sample in zip(completions, samples, strict=True):
            if not config.think:        # a task without thoughts pays what is behind an empty one
                text = text.removeprefix("<think></think>")
            form, own = worth(text, sample.query)
            paid.append(rewards.Reward({"format": form, task.part: own}))
        return paid

    def copies(optimizer, attribute):
        weights = optimizer.param_groups[0]["params"]
        return [getattr(weight, attribute).clone() for weight in weights]

    def before(optimizer, *_):
        group = optimizer.param_groups[0]
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        moves.append({"optimizer": {"class": type(optimizer).__name__, **options},
                      "before": copies(optimizer, "data"), "gradient": copies(optimizer, "grad")})

    def after(optimizer, *_):
        moves[-1]["after"] = copies(optimizer, "data")

    hooks = [optim.register_optimizer_step_pre_hook(before),
             optim.register_optimizer_step_post_hook(after)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "rollout", watched_rollout)
        patch.setattr(tasks, "TASKS", {name: replace(task, reward=partial(pay, task))
                                       for name, task in tasks.TASKS.items()})
        try:
            script.main(config)
        finally:
            for hook in hooks:
                hook.remove()
    output = Path(config.output)
    rows = read_rows(output / "samples.jsonl") if steps else []
    samples = {sample.id: sample for sample in data.read(config.annotations, config.videos)[0]}
    metrics = read_rows(output / "metrics.jsonl")
    return SimpleNamespace(config=config, samples=samples, metrics=metrics, rows=rows, steps=steps,
                           moves=moves, options=given_options)


@pytest.fixture(scope="module", params=RUNS)
def run(request, world, warm):
    return watch(train, world, warm, request.param, **RUNS[request.param])


@pytest.fixture(scope="module")
def plain(warm):
    """plain(weights): transformers' own model and which tokens it may not say, as a policy has them, and its weights
    that learn, with the values `weights` if given."""
    _, forbidden = forbidden_tokens(warm)

    def make(weights=(), frozen=False, folder=warm):
        qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32)
        qwen.model.visual.requires_grad_(not frozen)
        learning = [weight for weight in qwen.parameters() if weight.requires_grad]
        for old, new in zip(learning, weights, strict=bool(weights)):
            old.data.copy_(new)
        return SimpleNamespace(qwen=qwen, forbidden=forbidden), learning

    return make


def forbidden_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    return tokenizer, tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])


@pytest.fixture(scope="module")
def tokenizer(warm):
    return forbidden_tokens(warm)[0]


def assert_adamw(moves, rates, weights):
    """The optimizer is AdamW as it should be, at these rates; it began with `weights`, and nothing else moves one."""
    options = {"class": "AdamW", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for move, rate in zip(moves, rates, strict=True):
        assert move["optimizer"] == options | {"lr": rate}
        assert all(map(torch.equal, move["before"], weights))
        assert not any(map(torch.equal, move["before"], move["after"]))
        weights = move["after"]


def assert_gradient(learning, given):
    """The gradient that the optimizer was given is that of `learning`, cut to length 1. Returns its whole length."""
    norm = torch.cat([weight.grad.flatten() for weight in learning]).norm()
    for weight, gradient in zip(learning, given, strict=True):
        expected = weight.grad * min(1.0, 1 / norm)
        assert (gradient - expected).norm() <= 2e-3 * expected.norm() + 1e-6
    return norm.item()


def test_every_flag_is_in_one_of_the_runs():
    """Every flag that a resumed run may not change has another value than the default in one of the runs."""
    for flag in fields(train.Config):
        if flag.name in engine_run.MAY_CHANGE | ELSEWHERE:
            continue
        default = flag.default if flag.default_factory is MISSING else flag.default_factory()
        assert any(run.get(flag.name, default) != default for run in RUNS.values()), flag.name


def test_tasks_of_a_run(run):
    """A run draws with its own seed, p and tasks, its log says so, and its rewards have the options of its flags."""
    config = run.config

    def drawn(seed, p, names):
        return [tasks.draw(step, seed, p, names).name for step in range(config.steps)]

    expected = drawn(config.seed, config.tvg_prob, config.tasks)
    assert [(row["step"], row["task"]) for row in run.metrics] == list(enumerate(expected))
    assert [row["lr"] for row in run.metrics] == [config.learning_rate] * config.steps
    if config.tvg_prob:
        assert set(expected) == {"TVG", "VD", "AR"}
        assert run.options == {"TVG": {}, "AR": {}, "VD": {"max_verbs": 3}}
        for others in ((0, 0.55, ["VD", "AR"]), (2654, 0.53, ["VD", "AR"]),
                       (2654, 0.57, ["VD", "AR"]), (2654, 0.55, ["VC", "AR", "VD"])):
            assert drawn(*others) != expected
    else:
        assert run.options == {"VC": {"by_cosine": True}}


def test_prompts_of_a_run(run, tokenizer):
    """A prompt has its task's words. TVG sees all of the annotated part of the file, an inversion task its segment,
    which counts from the part's beginning; a query without a verb is for TVG only. On the time axis are two positions
    per second, whatever the rate of the frames, and no more pixels than the flag says."""
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    rows = iter(run.rows)
    for metrics, rollouts in zip(run.metrics, run.steps, strict=True):
        assert len(rollouts.prompts) == run.config.prompts_per_step
        for prompt in rollouts.prompts:
            sample, task = run.samples[next(rows)["id"]], metrics["task"]
            is_pad = prompt.input_ids == pad
            text = tokenizer.decode(prompt.input_ids[~is_pad])
            sentences = {name: words.format(query=sample.query, masked=MASKED.get(sample.query))
                         for name, words in SENTENCES.items()}
            assert [name for name, words in sentences.items() if words in text] == [task]
            assert (sample.query in text) == (task == "TVG")
            assert ("<think>" in text) == run.config.think
            assert task == "TVG" or sample.query in MASKED
            pairs, *size = prompt.video_grid_thw.tolist()
            assert size == ([8, 8] if "big" in sample.video else [2, 2])

            begin, length = sample.video_start or 0.0, sample.duration or 12.0
            rate = int(2 * length + 1e-3) // 2 * 2 / length             # frames per second
            first, last = (0.0, length) if task == "TVG" else (sample.start, sample.end)
            assert pairs == round((last - first) * rate / 2)
            pixels = prompt.pixel_values_videos.view(pairs, -1, 3, 2, 14 * 14).mean((1, 4))
            grey = (pixels.transpose(1, 2) * STD + MEAN).mean(-1).flatten()     # (T,)
            expected = begin + first + torch.arange(len(grey)) / rate
            assert (grey * LONGEST - expected).abs().max() < 0.3        # seconds
            # a pair of frames takes 2 / rate s, and the toy model has 3 positions per second
            time = prompt.position_ids[0, is_pad].view(pairs, -1)
            expected = (torch.arange(pairs) * 2 * 3 / rate + 1e-3).floor()
            assert (time - time[0, 0] == expected[:, None]).all()


def advantages_by_hand(run, rollouts, rows, tokenizer):
    """Of the completions of a step, (B, G). Checks the rows of samples.jsonl, which are the first of each group."""
    advantages = []
    for row, ids, mask in zip(rows, rollouts.completions, rollouts.mask, strict=True):
        kept = [completion[keep == 1] for completion, keep in zip(ids, mask)]
        texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
        paid = torch.tensor([sum(worth(text, row["query"])) for text in texts]).double()
        centred = paid - paid.mean()
        scale = paid.std() + 1e-4 if run.config.scale_rewards == "std" else 1
        advantages.append(centred / scale)
        assert row["completion"] == texts[0] and row["tokens"] == len(kept[0])
        assert row["reward"] == pytest.approx(paid[0].item())
        assert row["advantage"] == pytest.approx(advantages[-1][0].item(), abs=1e-5)
    return torch.stack(advantages).float()


def test_steps_are_those_of_the_equations(run, plain, tokenizer):
    """Advantages (Eq. 3), log-probabilities at the flag's temperature, KL to the model that training began with, loss
    (Eq. 4), the gradient: what is logged, and what the optimizer gets."""
    config, moves = run.config, iter(run.moves)
    reference, _ = plain()
    all_lengths = []
    for step, (metrics, rollouts) in enumerate(zip(run.metrics, run.steps, strict=True)):
        rows = run.rows[step * config.prompts_per_step:][:config.prompts_per_step]
        advantages = advantages_by_hand(run, rollouts, rows, tokenizer)
        lengths, old = rollouts.mask.sum(-1), None
        assert advantages.shape == (config.prompts_per_step, config.group_size)
        all_lengths += lengths.flatten().tolist()

        def score(policy):
            return repeated_logprobs(policy, rollouts.prompts, rollouts.completions, rollouts.mask,
                                     config.temperature)

        with torch.no_grad():
            ref_logprobs = score(reference)
        for _ in range(config.num_iterations):
            move = next(moves)
            policy, learning = plain(move["before"], config.freeze_vision)
            logprobs = score(policy)
            if old is None:
                old = logprobs.detach()
                torch.testing.assert_close(rollouts.logprobs, old, rtol=1e-3, atol=1e-4)
            loss, kl, clip_fraction = published_loss(
                config.loss_type, logprobs, old, ref_logprobs, advantages, lengths, config.beta,
                config.epsilon, config.max_tokens)
            loss.backward()
            norm = assert_gradient(learning, move["gradient"])
        assert metrics["loss"] == pytest.approx(loss.item(), rel=5e-3, abs=1e-5)
        assert metrics["kl"] == pytest.approx(kl.item() if config.beta else 0.0, rel=5e-3, abs=1e-6)
        assert metrics["clipped"] == pytest.approx(clip_fraction.item(), abs=1e-3)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=2e-3)
        assert metrics["updates"] == config.num_iterations and metrics["mismatch"] < 1e-4
        first = rows[0]
        assert first["logprob"] == pytest.approx(old[0, 0].sum().item() / first["tokens"], rel=1e-3)
    assert next(moves, None) is None and kl > 1e-4
    assert min(all_lengths) < max(all_lengths) == config.max_tokens


def test_weights_move_by_adamw(run, plain):
    """From those of --model on, and what comes out is written as model/; a frozen tower is not among them."""
    frozen = run.config.freeze_vision
    assert_adamw(run.moves, [1e-3] * len(run.moves), plain(frozen=frozen)[1])
    _, learned = plain(frozen=frozen, folder=Path(run.config.output, "model"))
    assert all(map(torch.equal, learned, run.moves[-1]["after"]))


def test_sft_by_hand(world, warm, plain, tokenizer):
    """Two steps of sft.py on all demonstrations: mean loss over all tokens, those that end a completion included; AdamW
    at a rate that falls linearly to a tenth."""
    texts = [("clock:0", "TVG", "<answer>1 to 5</answer>"), ("clock:2", "AR", "opens, then walks"),
             ("big:3", "VD", "rising."), ("clock:4", "VC", "the square grows."),
             ("clock:5", "TVG", "from 1 to 3")]
    rows = [{"id": id, "task": task, "completion": text} for id, task, text in texts]
    path = world / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = watch(sft, world, warm, "sft", steps=2, batch_size=5, micro_batch_size=2,
                learning_rate=1e-3, demonstrations=str(path), total_pixels=PIXELS)
    _, encoder = model.load(str(warm))
    load = partial(video.load, total_pixels=PIXELS)
    assert_adamw(run.moves, [1e-3, pytest.approx(0.55e-3)], plain()[1])
    for move, metrics in zip(run.moves, run.metrics, strict=True):
        policy, learning = plain(move["before"])
        losses = []
        for id, task, text in texts:
            prompt = tasks.prepare(run.samples[id], tasks.TASKS[task], encoder, load)
            target = torch.tensor([tokenizer(text + "<|im_end|>")["input_ids"]])
            logprobs = distributions(policy.qwen, prompt, target, policy.forbidden)
            losses.append(-logprobs.gather(-1, target[..., None]).flatten())
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = assert_gradient(learning, move["gradient"])
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 1
