"""Sampling: a token drawn from logits, the rows that go on, and one new token per row in few kernels.

`Decoding` computes what the model's own pass over one new token per row computes. For a deep model, such a token costs
tens of milliseconds of Python and kernel launches, whatever the arithmetic. So transformers' layers are not called:

- rotary tables are made once per rollout; queries and keys are rotated together and in place;
- keys and values are written into a buffer of fixed size;
- the query, key and value projections are one product; a residual is added inside the product before it;
- a norm is one operator.

Linear modules that are no plain nn.Linear, such as LoRA's, are called as they are, so that what is around them counts.
No hooks of FSDP run here, so the weights must be gathered already, as they are behind the prompts' own pass inside
distributed.gathered.

In shapes: B prompts, R rows (completions) per prompt, n = B * R, k key heads, g query heads per key head, d their
width, P tokens of the longest prompt, c tokens that a row has so far.
"""
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from engine.attention import Packed


def draw_token(logits: Float[Tensor, "rows V"],
               uniform: Float[Tensor, " rows"] | None) -> Int[Tensor, " rows"]:
    """One token per row: the inverse of the cumulated softmax at `uniform`, in [0, 1), so that a row's token depends on
    that row's random number only; the likeliest token where `uniform` is None."""
    if uniform is None:
        return logits.argmax(-1)
    cumulated = logits.double().softmax(-1).cumsum(-1)              # (rows, V)
    threshold = uniform[:, None].double() * cumulated[:, -1:]
    token = torch.searchsorted(cumulated, threshold, right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)            # V where logits are not numbers


def rows_to_keep(running: Bool[Tensor, "B R"],
                 ) -> tuple[Int[Tensor, " kept"], Int[Tensor, " rows"]] | None:
    """(prompts, rows among all B * R) that go on: the prompts with a running row, and of each of them as many rows as
    the prompt with the most running rows needs. None while more than 3/4 of the rows would stay, since dropping rows
    copies keys and values."""
    running_per_prompt = running.sum(1)
    kept = running_per_prompt.nonzero()[:, 0]
    rows_per_prompt = int(running_per_prompt.max())
    if len(kept) * rows_per_prompt > 0.75 * running.numel():
        return None
    running_first = running[kept].long().argsort(dim=1, descending=True, stable=True)
    # (kept, rows per prompt)
    rows = running_first[:, :rows_per_prompt] + kept[:, None] * running.shape[1]
    return kept, rows.flatten()


class Decoding:
    """The state of B prompts with R rows of completions each. A call goes on by one token per row."""

    def __init__(self, decoder: nn.Module, packed: Packed, rows: int, start: Int[Tensor, " n"],
                 max_tokens: int):
        """`decoder` is transformers' language model. `packed` kept the prompts' keys and values, and gives them up.
        `rows` is R, `start` the first position behind each row's prompt, `max_tokens` the most new tokens per row."""
        self.decoder = decoder
        self.rows = rows
        self.tokens = 0                                             # c, without the new token
        self.heads = decoder.config.num_attention_heads
        self.layers = [Layer(block) for block in decoder.layers]
        self.norm = rms_norm(decoder.norm)
        first_keys = packed.kept[0][0]                              # (1, k, N, d)
        _, self.key_heads, _, d = first_keys.shape
        # Each layer's keys and values of the rows, in the order (B, k, R), with room for all tokens
        self.own = first_keys.new_zeros(                            # (layers, 2, B k R, T, d)
            len(self.layers), 2, len(start) * self.key_heads, max_tokens, d)
        self.prompts = []                                           # per layer (2, B, k, P, d)
        for layer in range(len(self.layers)):
            keys, values = packed.kept.pop(layer)
            padded = [by_prompt(x, packed.prompts) for x in (keys, values)]
            self.prompts.append(torch.stack(padded))
        lengths = torch.tensor(packed.prompts)                      # (B,)
        places = torch.arange(int(lengths.max()))                   # (P,)
        is_padding = places >= lengths[:, None]                     # (B, P)
        self.bias = None                                    # added to products of queries and keys
        if is_padding.any():
            self.bias = first_keys.new_zeros(is_padding.shape)
            self.bias.masked_fill_(is_padding.to(first_keys.device), -torch.inf)
        self.make_rotary_table(start, max_tokens, first_keys)
        self.flatten_prompts()

    def make_rotary_table(self, start: Int[Tensor, " n"], max_tokens: int, like: Tensor) -> None:
        """Cosines and sines of all positions that a new token can have, one row of the table per position. The sines'
        first half is negated, so that rotating is x * cos + roll(x) * sin; queries are scaled, too."""
        self.offset = start - start.min()  # (n,) rows of the table for the next token
        num_positions = int(self.offset.max()) + max_tokens
        positions = torch.arange(num_positions, device=start.device) + start.min()
        cos, sin = self.decoder.rotary_emb(like, positions.expand(3, 1, -1))
        cos, sin = cos[0], sin[0]                                   # (positions, d)
        middle = sin.shape[1] // 2
        sin = torch.cat([-sin[:, :middle], sin[:, middle:]], 1)
        scale_of_queries = [self.decoder.layers[0].self_attn.scaling] * self.heads
        scale = sin.new_tensor(scale_of_queries + [1.0] * self.key_heads)  # (heads + k,)
        table = torch.stack([cos, sin], 1)                          # (positions, 2, d)
        self.table = table[:, :, None] * scale[:, None]             # (positions, 2, heads + k, d)

    def flatten_prompts(self) -> None:
        """Put the prompts' keys and values into the shape that all further tokens need, and their bias."""
        self.prompt_keys = [keys.flatten(0, 1).mT               # (B k, d, P) per layer
                            for keys, _ in self.prompts]
        self.prompt_values = [values.flatten(0, 1)              # (B k, P, d) per layer
                              for _, values in self.prompts]
        if self.bias is not None:
            per_head = self.bias.repeat_interleave(self.key_heads * self.rows, 0)
            self.padding = per_head[:, None]                        # (B k R, 1, P)

    @torch.inference_mode()
    def __call__(self, token: Int[Tensor, " n"]) -> Float[Tensor, "n H"]:
        """The last layer's output at one new token per row."""
        batch, d = self.prompts[0].shape[1], self.own.shape[-1]
        own = self.own.narrow(2, 0, batch * self.key_heads * self.rows)
        slots = own.select(3, self.tokens)                          # (layers, 2, B k R, d)
        slots = slots.view(-1, 2, batch, self.key_heads, self.rows, d).unbind()
        own_keys, own_values = own.narrow(3, 0, self.tokens + 1).unbind(1)  # (layers, B k R, c, d)
        own_keys, own_values = own_keys.mT.unbind(), own_values.unbind()
        cos, sin = self.table.index_select(0, self.offset).unbind(1)  # (n, heads + k, d)
        bias = None
        if self.bias is not None:
            bias = nn.functional.pad(self.padding, (0, self.tokens + 1))  # (B k R, 1, P + c)
        x = self.decoder.embed_tokens(token)                        # (n, H)
        for i, layer in enumerate(self.layers):
            # one projection; queries and keys rotated in place; new keys and values written
            qkv = layer.qkv(layer.attention_norm(x)).view(len(x), -1, d)  # (n, heads + 2 k, d)
            queries_and_keys = qkv.narrow(1, 0, self.heads + self.key_heads)
            rolled = queries_and_keys.roll(d // 2, 2)
            queries_and_keys.mul_(cos).addcmul_(rolled, sin)
            queries, new = qkv.split((self.heads, 2 * self.key_heads), 1)
            new = new.view(batch, self.rows, 2, self.key_heads, d)
            slots[i].copy_(new.permute(2, 0, 3, 1, 4))              # (2, B, k, R, d)
            attended = self.attend(queries, self.prompt_keys[i], self.prompt_values[i],
                                   own_keys[i], own_values[i], bias)
            x = layer.add_out(x, attended)
            y = layer.mlp_norm(x)
            gated = layer.act(layer.gate(y)).mul_(layer.up(y))
            x = layer.add_down(x, gated)
        self.offset += 1
        self.tokens += 1
        return self.norm(x)

    def attend(self, queries: Float[Tensor, "n heads d"], prompt_keys: Float[Tensor, "Bk d P"],
               prompt_values: Float[Tensor, "Bk P d"], own_keys: Float[Tensor, "BkR d c"],
               own_values: Float[Tensor, "BkR c d"],
               bias: Float[Tensor, "BkR 1 Pc"] | None) -> Float[Tensor, "n width"]:
        """Attention of the new tokens to their prompt, whose keys and values the R rows share, and to their own row."""
        n, heads, d = queries.shape
        batch, length, shared = n // self.rows, prompt_keys.shape[2], heads // self.key_heads
        q = queries.view(batch, self.rows, self.key_heads, shared, d).transpose(1, 2)
        q = q.reshape(len(prompt_keys), -1, d)                      # (B k, R g, d)
        to_prompt = torch.bmm(q, prompt_keys)                       # (B k, R g, P)
        q = q.reshape(-1, shared, d)                                # (B k R, g, d)
        to_own = torch.bmm(q, own_keys)                             # (B k R, g, c)
        to_prompt_by_row = to_prompt.view(-1, shared, length)       # (B k R, g, P)
        scores = torch.cat((to_prompt_by_row, to_own), 2)           # (B k R, g, P + c)
        if bias is not None:
            scores.add_(bias)
        weights = scores.softmax(2)                                             # computed in fp32
        of_prompt, of_own = weights.split((length, own_values.shape[1]), 2)
        of_prompt = of_prompt.view(to_prompt.shape)                 # (B k, R g, P)
        out = torch.bmm(of_prompt, prompt_values).view(q.shape)     # (B k R, g, d)
        out.baddbmm_(of_own, own_values)
        out = out.view(batch, self.key_heads, self.rows, shared, d).transpose(1, 2)
        return out.reshape(n, heads * d)

    def keep(self, kept: Int[Tensor, " kept"], rows: Int[Tensor, " rows"]) -> None:
        """Go on with the prompts `kept`, and of the B * R rows so far with `rows`, as many of each of these prompts."""
        rows_before = self.rows
        self.rows = len(rows) // len(kept)
        self.offset = self.offset[rows]
        prompt, row = rows // rows_before, rows % rows_before
        first = prompt * self.key_heads * rows_before + row         # place of the first head
        first = first.view(-1, 1, self.rows)                        # (kept, 1, R)
        heads = torch.arange(self.key_heads, device=rows.device)[:, None]           # (k, 1)
        places = (first + heads * rows_before).flatten()            # (kept k R,)
        for layer, own in enumerate(self.own):      # in place, with a copy of one layer at a time
            own[:, :len(places), :self.tokens] = own[:, places, :self.tokens]
            if len(kept) < self.prompts[layer].shape[1]:
                self.prompts[layer] = self.prompts[layer][:, kept]
        if self.bias is not None:
            self.bias = self.bias[kept]
        self.flatten_prompts()


def by_prompt(x: Float[Tensor, "1 k N d"], lengths: list[int]) -> Float[Tensor, "B k P d"]:
    """Keys or values of packed prompts, one prompt apart from the other, padded with zeros."""
    parts = x[0].transpose(0, 1).split(lengths)                     # B times (P, k, d)
    return nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2)


class Layer:
    """The parts of one decoder layer, as functions of x (n, H); `add_...` takes x and y and gives x + product of y."""

    def __init__(self, block: nn.Module):
        attention, mlp = block.self_attn, block.mlp
        self.attention_norm = rms_norm(block.input_layernorm)
        self.qkv = joined_product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.add_out = product_added(attention.o_proj)
        self.mlp_norm = rms_norm(block.post_attention_layernorm)
        self.gate = product(mlp.gate_proj)
        self.up = product(mlp.up_proj)
        self.act = mlp.act_fn.forward
        self.add_down = product_added(mlp.down_proj)


def rms_norm(module: nn.Module) -> Callable:
    """transformers' RMS norm as one operator. CPUs make six kernels of that operator in fp32, so there it is four."""
    shape, weight, epsilon = tuple(module.weight.shape), module.weight, module.variance_epsilon
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return lambda x: torch.rms_norm(x, shape, weight, epsilon)
    scaled_weight = weight * shape[0] ** 0.5
    smallest = weight.new_tensor((shape[0] * epsilon) ** 0.5)

    def norm(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return (x / torch.hypot(length, smallest)).mul_(scaled_weight)
    return norm


def product(module: nn.Module) -> Callable:
    """x -> module(x); of a plain linear module without bias, the matrix product alone."""
    if type(module) is not nn.Linear or module.bias is not None:
        return module
    weight = module.weight.t()
    return lambda x: torch.mm(x, weight)


def product_added(module: nn.Module) -> Callable:
    """(x, y) -> x + module(y)."""
    if type(module) is not nn.Linear or module.bias is not None:
        return lambda x, y: x + module(y)
    weight = module.weight.t()
    return lambda x, y: torch.addmm(x, y, weight)


def joined_product(*modules: nn.Module) -> Callable:
    """x -> all module(x) side by side; the weights of plain linear modules with bias are joined once."""
    if any(type(module) is not nn.Linear or module.bias is None for module in modules):
        return lambda x: torch.cat([module(x) for module in modules], 1)
    weight = torch.cat([module.weight for module in modules]).t()
    bias = torch.cat([module.bias for module in modules])
    return lambda x: torch.addmm(bias, x, weight)
