"""The loss's open choices in training: --loss_type, --scale_rewards, --num_iterations and --epsilon, computed again by hand."""
from dataclasses import replace

import pytest
import test_wiring
import torch
from conftest import finish, start
from test_train import config, rows

import grpo
import train

world, plain, tokenizer = test_wiring.world, test_wiring.plain, test_wiring.tokenizer      # fixtures
FLAGS = dict(steps=1, seed=4, tvg_prob=0.0, tasks=["AR"], group_size=3, prompts_per_step=2, micro_batch_size=1,
             beta=0.5, learning_rate=1e-3, max_grad_norm=1e3, max_tokens=30, total_pixels=test_wiring.PIXELS,
             updates=3, clip=0.1)


@pytest.mark.parametrize("kind, scale", [("grpo", "none"), ("bnpo", "std"), ("dr_grpo", "none")])
def test_updates_are_those_of_the_equations(world, warm, plain, tokenizer, kind, scale):
    """Each of three AdamW steps on one rollout: the ratio is to the policy before the first one (Eq. 3), by
    transformers' own forward pass with repeated prompts. The log has the last one's numbers."""
    run, old, kept = test_wiring.watch(train, world, warm, kind, loss=kind, scale_rewards=scale, **FLAGS), [], None
    masks = [test_wiring.up_to_the_stop(tokenizer, completions) for _, _, completions, *_ in run.steps[0]]
    tokens, eps, reference = sum(mask.sum() for mask in masks), FLAGS["clip"], plain()[0].requires_grad_(False)
    assert len(run.moves) == 3 and len({int(size) for mask in masks for size in mask.sum(-1)}) > 1
    for update, move in enumerate(run.moves):
        (qwen, learning), loss, clipped, divergence = plain(move["before"]), 0.0, 0.0, 0.0
        for i, ((row, prompt, completions, *_), mask) in enumerate(zip(run.steps[0], masks)):
            texts = tokenizer.batch_decode([ids[keep == 1] for ids, keep in zip(completions, mask)],
                                           skip_special_tokens=True)
            paid = torch.tensor([len(text) % 4 / 3 + (len(text) + len(row["query"])) % 3 / 2 for text in texts])
            advantage = (paid - paid.mean()) / (paid.std() + 1e-4 if scale == "std" else 1)
            score = lambda model: test_wiring.distributions(model, tokenizer, prompt, completions, 1.0).gather(
                -1, completions[..., None])[..., 0]
            logp, ref = score(qwen), score(reference)                                       # (G, C)
            old += [logp.detach()] * (update == 0)
            ratio, k3 = (logp - old[i]).exp(), (ref - logp).exp() - (ref - logp) - 1
            bounded = torch.where(advantage[:, None] > 0, ratio.clamp(max=1 + eps), ratio.clamp(min=1 - eps))
            gain = (advantage[:, None] * bounded - 0.5 * k3) * mask
            size = mask.sum(-1, keepdim=True)
            loss = loss - (gain / {"grpo": size * 6, "bnpo": tokens, "dr_grpo": 30 * 6}[kind]).sum()
            clipped += ((bounded != ratio) * (advantage[:, None] != 0) * mask / size / 6).sum().item()
            divergence += (k3 * mask / size / 6).sum().item()
        loss.backward()
        kept = test_wiring.assert_gradient(learning, move["gradient"], 1e3)
    row, = run.metrics
    assert [row["loss"], row["kl"], row["clipped"], row["grad_norm"]] == pytest.approx(
        [loss.item(), divergence, clipped, kept], rel=5e-3, abs=1e-5)
    assert clipped > 0.02 and row["updates"] == 3 and row["mismatch"] < 1e-4
    test_wiring.assert_adamw(run.moves, [1e-3] * 3, plain()[1])


@pytest.mark.processes
def test_two_processes_are_one(folder, warm, tmp_path):
    """Prompts one at a time on two processes: the tokens that bnpo divides by are those of all, and pi_old is each
    pass's own."""
    flags = dict(steps=2, prompts_per_step=4, loss="bnpo", updates=2, scale_rewards="none", clip=0.01, seed=6)
    train.main(config(folder, tmp_path / "one", **flags))
    two = config(folder, tmp_path / "two", micro_batch_size=1, **flags)
    assert finish(start("train", two, tmp_path / "log", 2)) == [0, 0], (tmp_path / "log.0").read_text()[-2000:]
    one, two = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert any(row["grad_norm"] > 0 for row in one)
    for a, b in zip(one, two, strict=True):
        for key in ("reward", "loss", "kl", "clipped", "grad_norm", "updates"):
            assert a[key] == (b[key] if a[key] is None else pytest.approx(b[key], rel=2e-3, abs=1e-5)), key


def test_an_update_that_is_not_finite_ends_its_step(folder, warm, tmp_path, monkeypatch, capsys):
    loss, calls = grpo.loss, []

    def poisoned(*args):
        calls.append(1)
        value, *others = loss(*args)
        return value * (float("nan") if len(calls) == 2 else 1), *others

    monkeypatch.setattr(grpo, "loss", poisoned)
    settings = config(folder, tmp_path / "run", steps=2, updates=4)
    train.main(settings)
    first, second = rows(tmp_path / "run" / "metrics.jsonl")
    assert first["updates"] == 1 and first["loss"] is None and first["bad_steps"] == 1 and second["updates"] in (0, 4)
    assert "step 0 stops after 1 update(s): loss, grad_norm not finite" in capsys.readouterr().out
    for name, value in {"loss": "bnpo", "scale_rewards": "none", "updates": 3, "clip": 0.3}.items():
        with pytest.raises(ValueError, match=f"--{name} {value}: .* give the same flag"):
            train.main(replace(settings, resume=True, **{name: value}))
