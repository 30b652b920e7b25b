"""Single steps of sampling: one token a row, and which rows are worth going on with."""
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def draw_token(logits: Float[Tensor, "rows V"], uniform: Float[Tensor, " rows"] | None) -> Int[Tensor, " rows"]:
    """One token a row: the inverse of the cumulated softmax at `uniform`, in [0, 1), so that a row's token depends on
    its own random number only; the likeliest token where `uniform` is None."""
    if uniform is None:
        return logits.argmax(-1)
    cumulated = logits.double().softmax(-1).cumsum(-1)                                      # (rows, V)
    token = torch.searchsorted(cumulated, uniform[:, None].double() * cumulated[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)            # V where logits are not numbers: train.py sees that later


def rows_to_keep(running: Bool[Tensor, "B R"]) -> tuple[Int[Tensor, " kept"], Int[Tensor, " rows"]] | None:
    """(prompts, rows of all B * R) to go on with: prompts with a running row, as many rows of each as the one with
    most. None while that leaves more than 3/4 of the rows, since dropping copies the keys and values."""
    per_prompt = running.sum(1)
    groups, most = per_prompt.nonzero()[:, 0], int(per_prompt.max())
    if len(groups) * most > 0.75 * running.numel():
        return None
    chosen = running[groups].long().argsort(dim=1, descending=True, stable=True)[:, :most]      # running ones first
    return groups, (chosen + groups[:, None] * running.shape[1]).flatten()
