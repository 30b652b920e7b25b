"""The wiring of training: what train.main and sft.main do with their flags, each step computed a second time.

A run is watched from outside: what `grpo.rollout` got and gave, weights and gradients at each step of the optimizer,
the files. Its steps are then computed again in another way: prompts from the paper's sentences and from videos whose
grey tells the time; log-probabilities by transformers' own forward pass, with prompt and video repeated for each
completion; advantage, loss, clipping, warm-up and AdamW by hand.
"""
import json
from collections import Counter
from dataclasses import MISSING, fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import data
import grpo
import model
import rewards
import sft
import tasks
import train
from engine import video

FILM_FPS, LONGEST = 8, 16       # frames a second; seconds in which their grey rises from 0 to 255
PIXELS = 16 * 28 * 28           # of a whole video that is worth cutting down
MASKED = {"Person closed the door": "Person [] the door",                                   # the paper's example
          "the red circle is spinning.": "the red circle is [].", "the square grows.": "the square [].",
          "a person opens the door and walks away.": "a person [] the door and [] away."}
CLOSE, SPIN, GROW, OPEN = MASKED
SILENT = ("the table over there", "the sky over there", "a red ball on the floor")         # have no verb
SENTENCES = {"TVG": 'the event "{query}" happen in the video, in seconds',
             "VC": 'Add a verb for the event "{masked}" based on the video',        # the paper's, as the next two
             "AR": "Use a verb to describe the event based on the video",
             "VD": "Describe what people have done based on the video"}
STOPS = ["<|im_end|>", "<|endoftext|>"]
NEVER_SAID = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
MEAN, STD = (torch.tensor(x) for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))

# Two runs, every flag with another value: p off by 0.02, another seed, other tasks each change what the first one draws
ALL_FLAGS = dict(steps=4, seed=2654, tvg_prob=0.55, tasks=["VD", "AR"], group_size=4, prompts_per_step=3,
                 micro_batch_size=2, beta=0.5, learning_rate=1e-3, warmup_steps=2, max_grad_norm=0.4, max_tokens=24,
                 temperature=0.7, total_pixels=PIXELS)
FROZEN = dict(steps=2, seed=5, tvg_prob=0.0, tasks=["VC"], group_size=3, prompts_per_step=2, learning_rate=1e-3,
              max_grad_norm=1e3, max_tokens=17, total_pixels=PIXELS, freeze_vision=True, gradient_checkpointing=True)
NO_FIGURE = {"model", "annotations", "videos", "output", "allow_outside", "workers", "cache", "cache_gb", "video_timeout",
             "save_every", "keep", "resume", "max_bad_steps", "tensorboard", "eval_annotations", "eval_every",
             "eval_samples", "eval_videos", "vd_max_verbs", "loss", "scale_rewards", "updates", "clip", "think", "merge",
             "lora_rank", "cosine", "compile"}  # no say in it, or tested elsewhere


def film(path, seconds, side):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FILM_FPS, options={"crf": "5", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = side, side, "yuv420p", 1
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
    parts = [("clock", SPIN, 1.0, 5.0, 2.0, 10.0)] * 2 + [
        ("clock", OPEN, 6.0, 9.0, 0.0, 12.0), ("big", CLOSE, 1.0, 4.0, 1.0, 5.0), ("clock", GROW, 1.3, 3.9, 3.0, 6.9),
        *(("clock", query, 1.0, 3.0, 4.0, 8.0) for query in SILENT)]
    entries = [{"video": f"{name}.mp4", "sentence": query, "timestamp": [start, end], "duration": stop - begin,
                "video_start": begin or None, "video_end": stop if begin else None}
               for name, query, start, end, begin, stop in parts]
    (folder / "train.json").write_text(json.dumps(entries))
    return folder


def pay(part, texts, samples):
    """A reward for any babble, so that no group is flat: it depends on the text and on the sample."""
    return [rewards.Reward({"format": len(text) % 4 / 3, part: (len(text) + len(sample.query)) % 3 / 2})
            for text, sample in zip(texts, samples, strict=True)]


def watch(script, world, warm, name, **flags):
    """Run script.main with `pay` as every task's reward. Returns its config, its samples by id, its metrics; of each
    step a list of (row of samples.jsonl, prompt, completions, mask, logprobs), one a prompt, the last three (G, C); and
    of each step of the optimizer its moves: the weights before, the gradient, the weights after."""
    config = script.Config(model=str(warm), annotations=str(world / "train.json"), videos=str(world / "videos"),
                           output=str(world / name), cache=str(world / "cache"), workers=1, **flags)
    groups, moves, rollout, output = [], [], grpo.rollout, Path(config.output)

    def sample(policy, prompts, *args, **named):
        found = rollout(policy, prompts, *args, **named)
        assert len(prompts) <= (config.micro_batch_size or config.prompts_per_step)
        groups.extend(zip(prompts, found.completions, found.mask, found.logprobs))
        return found

    copy = lambda of, what: [getattr(w, what).clone() for group in of.param_groups for w in group["params"]]
    before = lambda of, *_: moves.append({"before": copy(of, "data"), "gradient": copy(of, "grad")})
    after = lambda of, *_: moves[-1].update(after=copy(of, "data"))
    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "rollout", sample)
        patch.setattr(tasks, "TASKS", {name: replace(task, reward=partial(pay, task.part))
                                       for name, task in tasks.TASKS.items()})
        try:
            script.main(config)
        finally:
            [hook.remove() for hook in hooks]
    metrics, rows = [[json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
                     for path in (output / "metrics.jsonl", output / "samples.jsonl")]
    groups = [(row, *group) for row, group in zip(rows, groups, strict=True)]
    size = len(groups) // config.steps
    steps = [groups[i * size:(i + 1) * size] for i in range(config.steps)]
    samples = {sample.id: sample for sample in data.read(config.annotations, config.videos)[0]}
    return SimpleNamespace(config=config, samples=samples, metrics=metrics, steps=steps, moves=moves)


@pytest.fixture(scope="module", params=[ALL_FLAGS, FROZEN], ids=["all_flags", "frozen"])
def run(request, world, warm):
    return watch(train, world, warm, f"seed{request.param['seed']}", **request.param)


@pytest.fixture(scope="module")
def plain(warm):
    """make(weights): transformers' own model, and its weights that learn, with the values `weights` if given."""
    def make(weights=(), frozen=False, folder=warm):
        qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32)
        qwen.model.visual.requires_grad_(not frozen)
        learning = [weight for weight in qwen.parameters() if weight.requires_grad]
        for old, new in zip(learning, weights, strict=bool(weights)):
            old.data.copy_(new)
        return qwen, learning
    return make


@pytest.fixture(scope="module")
def tokenizer(warm):
    return AutoTokenizer.from_pretrained(str(warm))


def distributions(qwen, tokenizer, prompt, completions, temperature):
    """Log-softmax (G, C, V) from which each token of completions (G, C) came, each row with a prompt of its own."""
    rows, after = len(completions), prompt.positions.max() + 1 + torch.arange(completions.shape[1])
    ids = torch.cat([prompt.ids.expand(rows, -1), completions], dim=1)
    positions = torch.cat([prompt.positions, after.expand(3, -1)], dim=1)[:, None].expand(-1, rows, -1)
    logits = qwen(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions,
                  pixel_values_videos=prompt.patches.repeat(rows, 1),
                  video_grid_thw=prompt.grid.expand(rows, -1)).logits[:, len(prompt.ids) - 1:-1] / temperature
    never = torch.tensor(tokenizer.convert_tokens_to_ids(NEVER_SAID))
    return logits.index_fill(-1, never, -torch.inf).log_softmax(-1)


def up_to_the_stop(tokenizer, completions):
    """1 up to and including the first stop token, (G, C)."""
    stop = torch.isin(completions, torch.tensor(tokenizer.convert_tokens_to_ids(STOPS))).long()
    return (stop.cumsum(-1) - stop == 0).long()


def assert_adamw(moves, rates, weights):
    """AdamW by hand, betas 0.9 and 0.999, eps 1e-8, no decay, from the gradients that the optimizer was given: it took
    these steps from `weights` on, and nothing else has moved a weight."""
    weights = [weight.detach() for weight in weights]
    first, second = [0.0] * len(weights), [0.0] * len(weights)
    for step, (move, rate) in enumerate(zip(moves, rates, strict=True), 1):
        assert len(move["before"]) == len(weights)
        for i, (before, gradient, after) in enumerate(zip(*(move[key] for key in ("before", "gradient", "after")))):
            assert torch.equal(before, weights[i])
            first[i] = 0.9 * first[i] + 0.1 * gradient.double()
            second[i] = 0.999 * second[i] + 0.001 * gradient.double() ** 2
            mean, size = first[i] / (1 - 0.9 ** step), (second[i] / (1 - 0.999 ** step)).sqrt()
            torch.testing.assert_close(after.double(), before - rate * mean / (size + 1e-8), rtol=0, atol=1e-3 * rate)
            weights[i] = after


def assert_gradient(learning, given, longest):
    """The gradient that the optimizer was given is that of `learning`, cut to `longest`. Returns its whole length."""
    norm = torch.cat([weight.grad.flatten() for weight in learning]).norm()
    for weight, gradient in zip(learning, given, strict=True):
        expected = weight.grad * min(1.0, longest / norm)
        assert (gradient - expected).norm() <= 2e-3 * expected.norm() + 1e-6
    return norm.item()


def test_the_paper_s_values():
    """Defaults of train.py: p, batch and pixels are the paper's, the others those of docs/method.md's table."""
    said = dict(tvg_prob=0.8, tasks=["VC", "AR", "VD"], group_size=8, prompts_per_step=4, beta=0.04, learning_rate=1e-6,
                max_tokens=1024, temperature=1.0, warmup_steps=0, max_grad_norm=1.0, freeze_vision=False,
                micro_batch_size=0, total_pixels=3584 * 28 * 28, loss="grpo", scale_rewards="std", updates=1)
    defaults = vars(train.Config("model", "annotations", "videos", "output"))
    assert {name: defaults[name] for name in said} == said


def test_every_flag_is_in_one_of_the_runs():
    """Every flag of train.py that has a say in the arithmetic has another value than the default in one of the runs."""
    for flag in fields(train.Config):
        default = flag.default if flag.default_factory is MISSING else flag.default_factory()
        assert any(run.get(flag.name, default) != default for run in (ALL_FLAGS, FROZEN)) != (
            flag.name in NO_FIGURE)


@pytest.mark.parametrize("name", SENTENCES)
def test_prompts_have_the_paper_s_sentences(name):
    """Each task asks in its own words, those of the paper; TVG alone tells the query, VC tells it without its verbs."""
    for query, masked in MASKED.items():
        text = tasks.TASKS[name].prompt(data.Sample("x", "x.mp4", query, 0.0, 1.0, None))
        found = [other for other, words in SENTENCES.items() if words.format(query=query, masked=masked) in text]
        assert found == [name] and (query in text) == (name == "TVG")


def test_rewards_are_those_of_their_task():
    """Eq. 5-8: of four answers each task pays those to its own question, under the name of its part, and the form."""
    sample = data.Sample("x", "x.mp4", OPEN, 2.0, 6.0, None)
    answers = ("2.0 to 4.0", OPEN, "walking", "He walks, opens the door and is laughing.")
    paid = {"TVG": ("iou", [0.5, 0, 0, 0]), "VC": ("vc", [0, 1, 0, 0]), "AR": ("ar", [0, 0, 1, 0]),
            "VD": ("vd", [0, 1, 0, 1])}
    for name, (part, values) in paid.items():
        task, texts = tasks.TASKS[name], [f"<think>so</think> <answer>{text}</answer>" for text in answers]
        for reward, value in zip(task.reward(texts, [sample] * 4), values, strict=True):
            assert reward.parts == {"format": name != "TVG" or value == 0.5, part: value} and task.part == part
            assert reward.total == reward.parts["format"] + value


@pytest.mark.parametrize("p", [0.8, 0.0, 0.98])
def test_draws_have_probability_p(p):
    """Eq. 13 to less than a percent: TVG with p, not p + 0.02, and the others evenly."""
    steps = 40_000
    counts = Counter(tasks.draw(step, 11, p, ["VC", "AR", "VD"]).name for step in range(steps))
    for name, expected in {"TVG": p, **dict.fromkeys(("VC", "AR", "VD"), (1 - p) / 3)}.items():
        assert abs(counts[name] / steps - expected) <= 4 * (expected * (1 - expected) / steps) ** 0.5, name


def test_tasks_of_a_run(run):
    """A run draws with its own seed, p and tasks; its log says so, step after step."""
    draws = lambda *flags: [tasks.draw(step, *flags).name for step in range(run.config.steps)]
    drawn = draws(run.config.seed, run.config.tvg_prob, run.config.tasks)
    assert [(row["step"], row["task"]) for row in run.metrics] == list(enumerate(drawn))
    if run.config.tvg_prob:     # else other flags would draw the same
        assert set(drawn) == {"TVG", "VD", "AR"} and drawn not in (
            draws(0, 0.55, ["VD", "AR"]), draws(2654, 0.57, ["VD", "AR"]), draws(2654, 0.53, ["VD", "AR"]),
            draws(2654, 0.8, ["VD", "AR"]), draws(2654, 0.55, ["VC", "AR", "VD"]))


def test_prompts_of_a_run(run, tokenizer):
    """A prompt has its task's words. TVG sees all of the annotated part of the file, an inversion task its segment,
    which counts from the part's beginning; on the time axis there are two positions a second, whatever the rate of the
    frames; no more pixels than the flag says; a query without a verb is for TVG only."""
    pad, silent, rates = tokenizer.convert_tokens_to_ids("<|video_pad|>"), set(), set()
    for numbers, groups in zip(run.metrics, run.steps, strict=True):
        assert len(groups) == run.config.prompts_per_step
        for row, prompt, *_ in groups:
            sample, task, pairs = run.samples[row["id"]], numbers["task"], int(prompt.grid[0])
            assert SENTENCES[task].format(query=sample.query, masked=MASKED.get(sample.query)) in tokenizer.decode(
                prompt.ids[prompt.ids != pad])
            assert prompt.grid.tolist()[1:] == ([8, 8] if "big" in sample.video else [2, 2])
            assert task == "TVG" or sample.query in MASKED
            silent |= {sample.query} - set(MASKED)
            begin, length = sample.video_start or 0.0, sample.duration or 12.0
            rate = int(2 * length + 1e-3) // 2 * 2 / length                                 # frames a second
            first, last = (0.0, length) if task == "TVG" else (sample.start, sample.end)
            pixels = prompt.patches.view(pairs, -1, 3, 2, 14 * 14).mean((1, 4)).transpose(1, 2)     # (t, 2, 3)
            shown = (pixels * STD + MEAN).mean(-1).flatten() * LONGEST                      # (T,) seconds
            assert pairs == round((last - first) * rate / 2)
            assert (shown - (begin + first + torch.arange(len(shown)) / rate)).abs().max() < 0.3
            time = prompt.positions[0, prompt.ids == pad].view(pairs, -1)
            # a pair of frames takes 2 / rate s, and the toy model has 3 positions a second
            assert (time - time[0, 0] == (torch.arange(pairs) * 2 * 3 / rate + 1e-3).floor()[:, None]).all()
            rates.add((task, rate))
    assert bool(silent) == (run.config.tvg_prob > 0) and (len(rates) > 3 or not run.config.tvg_prob)


def test_completions_are_sampled_from_the_policy(run, plain, tokenizer):
    """G completions a prompt, no longer than the flag says, which the policy of that moment draws at the flag's
    temperature: the sum over all tokens of log p + entropy, whose mean is 0, lies within 4 standard deviations."""
    config, surprise, variance, lengths = run.config, 0.0, 0.0, []
    for move, groups in zip(run.moves, run.steps, strict=True):
        qwen = plain(move["before"], config.freeze_vision)[0]
        for row, prompt, completions, mask, logprobs in groups:
            assert len(completions) == config.group_size and torch.equal(mask, up_to_the_stop(tokenizer, completions))
            with torch.no_grad():
                every = distributions(qwen, tokenizer, prompt, completions, config.temperature)
            logp = every.gather(-1, completions[..., None])[..., 0] * mask
            torch.testing.assert_close(logprobs, logp, rtol=1e-3, atol=1e-4)
            assert row["logprob"] == pytest.approx(logp[0].sum().item() / row["tokens"], rel=1e-3)
            assert row["tokens"] == mask[0].sum()
            p, every = every.exp(), every.clamp(min=-1e9)       # 0 * infinity is no number
            expected = (p * every).sum(-1)                      # minus the entropy
            surprise += ((logp - expected) * mask).sum().item()
            variance += (((p * every ** 2).sum(-1) - expected ** 2) * mask).sum().item()
            lengths += mask.sum(-1).tolist()
    assert abs(surprise) < 4 * variance ** 0.5 and min(lengths) < max(lengths) == config.max_tokens


def test_steps_are_those_of_the_equations(run, plain, tokenizer):
    """Reward, advantage (Eq. 3), KL to the model that training began with, loss (Eq. 4), the gradient and its length:
    what is logged, and what the optimizer gets. As the advantages of a group cancel, the loss is beta * kl."""
    config, reference = run.config, plain()[0].requires_grad_(False)
    for step, (move, numbers, groups) in enumerate(zip(run.moves, run.metrics, run.steps, strict=True)):
        (qwen, learning), kl, earned = plain(move["before"], config.freeze_vision), 0.0, []
        for row, prompt, completions, *_ in groups:
            mask = up_to_the_stop(tokenizer, completions)
            texts = tokenizer.batch_decode([ids[keep == 1] for ids, keep in zip(completions, mask)],
                                           skip_special_tokens=True)
            paid = [len(text) % 4 / 3 + (len(text) + len(row["query"])) % 3 / 2 for text in texts]
            advantage = torch.tensor((np.array(paid) - np.mean(paid)) / (np.std(paid, ddof=1) + 1e-4)).float()
            assert row["completion"] == texts[0] and row["reward"] == pytest.approx(paid[0])
            assert row["advantage"] == pytest.approx(advantage[0].item(), abs=1e-5)
            score = lambda qwen: distributions(qwen, tokenizer, prompt, completions, config.temperature).gather(
                -1, completions[..., None])[..., 0]
            ref, logp = score(reference), score(qwen)                                       # (G, C)
            k3 = (ref - logp).exp() - (ref - logp) - 1
            gain = advantage[:, None] * logp - config.beta * k3     # has the gradient of Eq. 4 where the ratio is 1
            mean = lambda x: ((x * mask).sum(-1) / mask.sum(-1)).sum() / config.prompts_per_step / config.group_size
            (-mean(gain)).backward()
            kl, earned = kl + mean(k3).item(), earned + paid
        norm = assert_gradient(learning, move["gradient"], config.max_grad_norm)
        assert numbers["kl"] == pytest.approx(kl, rel=2e-3, abs=1e-7) and (kl > 1e-4) == (step > 0)
        assert numbers["loss"] == pytest.approx(config.beta * kl, rel=2e-3, abs=1e-6) and numbers["mismatch"] < 1e-4
        assert [numbers["reward"], numbers["grad_norm"]] == pytest.approx([np.mean(earned), norm], rel=2e-3)
        assert (norm > config.max_grad_norm) == (not config.freeze_vision)      # one run cuts, the other does not


def test_weights_move_by_adamw(run, plain):
    """From the weights of --model on, at the learning rate that is logged: a third, two thirds, then all of it where
    warm-up takes 2 steps. The model that is written is what came out; a frozen tower is as it was."""
    rates = [1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3] if run.config.warmup_steps else [1e-3, 1e-3]
    assert [row["lr"] for row in run.metrics] == pytest.approx(rates)
    assert_adamw(run.moves, rates, plain(frozen=run.config.freeze_vision)[1])
    last, learned = plain(frozen=run.config.freeze_vision, folder=Path(run.config.output, "model"))
    assert all(map(torch.equal, learned, run.moves[-1]["after"]))
    for before, after in zip(plain()[0].model.visual.parameters(), last.model.visual.parameters(), strict=True):
        assert torch.equal(before, after) == run.config.freeze_vision


@pytest.fixture(scope="module")
def epochs(world, warm):
    """Every sample once a step, at a learning rate that changes nothing: two steps with one seed, in passes of a
    prompt, and one step with another seed, in one pass. Of each step its metrics and {id: completions}."""
    found = []
    for seed, steps, size in ((1, 2, 1), (17, 1, 0)):
        run = watch(train, world, warm, f"epochs{seed}", steps=steps, seed=seed, tvg_prob=1.0, prompts_per_step=8,
                    micro_batch_size=size, group_size=2, beta=0.0, learning_rate=1e-12, max_tokens=8, temperature=2.0,
                    total_pixels=PIXELS)
        found += zip(run.metrics, ({row["id"]: completions.tolist() for row, _, completions, *_ in groups}
                                   for groups in run.steps))
    return found


def test_every_sample_comes_once_an_epoch_in_an_order_of_the_seed(epochs):
    """Each epoch has all samples, in an order that differs between epochs and between seeds."""
    orders = {tuple(groups) for _, groups in epochs}
    assert all(len(set(order)) == 8 for order in orders) and len(orders) == 3


def test_noise_is_every_prompt_s_own(epochs):
    """The same prompt gets other completions from a sample that is alike, in another step, and with another seed;
    within a group they differ as well."""
    for _, groups in epochs:
        assert groups["clock:0"] != groups["clock:1"] and all(one != other for one, other in groups.values())
    for (_, one), (_, other) in combinations(epochs, 2):
        assert all(one[id] != other[id] for id in one)
    assert all(any(map(str.__eq__, epochs[0][1], groups)) for _, groups in epochs)    # at the same place of their steps


def test_without_beta_there_is_no_kl(epochs):
    """--beta 0: the loss is minus the mean advantage, which is 0; its gradient is not."""
    for row, _ in epochs:
        assert row["kl"] == 0 and abs(row["loss"]) < 1e-6 and row["grad_norm"] > 1e-3


def test_sft_by_hand(world, warm, plain, tokenizer):
    """Two steps of sft.py on all demonstrations: mean loss over all tokens, those that end a completion included;
    clipping; AdamW at a rate that falls linearly to a tenth."""
    said = [("clock:0", "TVG", "<answer>1 to 5</answer>"), ("clock:2", "AR", "opens, then walks"),
            ("big:3", "VD", "rising."), ("clock:4", "VC", "the square grows."), ("clock:5", "TVG", "from 1 to 3")]
    lines = [json.dumps({"id": id, "task": task, "completion": text}) + "\n" for id, task, text in said]
    (world / "said.jsonl").write_text("".join(lines))
    run = watch(sft, world, warm, "sft", steps=2, batch_size=5, micro_batch_size=2, learning_rate=1e-3, max_grad_norm=0.4,
                demonstrations=str(world / "said.jsonl"), total_pixels=PIXELS)
    encoder, load = model.load(str(warm))[1], partial(video.load, total_pixels=PIXELS)
    assert_adamw(run.moves, [1e-3, 0.55e-3], plain()[1])
    for move, numbers in zip(run.moves, run.metrics, strict=True):
        (qwen, learning), losses = plain(move["before"]), []
        for id, task, text in said:
            prompt = tasks.prepare(run.samples[id], tasks.TASKS[task], encoder, load)
            target = torch.tensor([tokenizer(text)["input_ids"] + tokenizer.convert_tokens_to_ids(STOPS[:1])])
            losses.append(-distributions(qwen, tokenizer, prompt, target, 1.0).gather(-1, target[..., None]).flatten())
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = assert_gradient(learning, move["gradient"], 0.4)
        assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-4) and len(set(map(len, losses))) > 3
        assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 0.4
