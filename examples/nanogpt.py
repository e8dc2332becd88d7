"""Trains a small GPT whose feed-forward layers mix activations, in plain PyTorch: what to read first.

    python examples/nanogpt.py                           # MoA: about two minutes on 2 CPU cores
    python examples/nanogpt.py --feed-forward swiglu     # the usual layer, to compare with; or la

It learns the bytes of Python's standard library, without a download, and shows the loss on other files of it, a text
that it writes, and what its gates do. It takes a GPU where there is one.
"""

import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_moa import MixedFeedForward, MixtureConfig
from megatron_moa.command_line.numbers import positive, seed
from megatron_moa.errors import OneLineParser, UserError, one_line_errors


# ---- The mixture: what MixedFeedForward computes, by hand (bi-sided MoA, its default) --------------------------------
def mixture_by_hand(layer: MixedFeedForward, x: Tensor) -> Tensor:
    """Computes by hand what a layer that mixes activations computes, [tokens, h] -> [tokens, h].

    SwiGLU is fc2(silu(y) * z); a mixture takes the place of silu(y) and of z.
    """
    activations = (F.gelu, F.silu, lambda v: F.relu(v) ** 2, F.leaky_relu, torch.tanh, F.relu, lambda v: v)
    y, z = layer.fc1(x).chunk(2, dim=-1)  # the two branches, [tokens, f] each
    gates = torch.sigmoid(x @ layer.coefficients.weight.T)  # 14 numbers a token, the same for all f hidden units
    c, d = gates[..., None].chunk(2, dim=1)  # one for each activation of either branch: [tokens, 7, 1]
    mixed_y = sum(c[:, k] * activation(y) for k, activation in enumerate(activations))
    mixed_z = sum(d[:, k] * activation(z) for k, activation in enumerate(activations))
    return layer.fc2(mixed_y * mixed_z)


def mixture(feed_forward: str, form: str | None) -> MixtureConfig:
    """Returns the mixture's settings for a kind of feed-forward layer: moa, la or swiglu.

    The coefficients come from gates (moa), are trained numbers (la), or stay what makes the layer SwiGLU.
    """
    if feed_forward != "swiglu":
        return MixtureConfig(kind=feed_forward, form=form or "bi-sided")
    if form is not None:
        raise UserError(f"--form {form}: SwiGLU is no mixture; drop the flag, or take --feed-forward moa or la")
    return MixtureConfig("la", "one-sided", ("identity",), freeze=True)  # silu(y) * (1 * z) is SwiGLU itself


# ---- The model: any small GPT but for self.feed_forward --------------------------------------------------------------
BYTES, CONTEXT, WIDTH, HEADS, LAYERS = 256, 128, 128, 4, 4


class Block(nn.Module):  # causal attention, then a feed-forward layer; each adds to what came in
    def __init__(self, mixture: MixtureConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH, False), nn.Linear(WIDTH, WIDTH, False)
        inner = 8 * WIDTH // 3 if mixture.gated else 4 * WIDTH  # two branches, or one with as many parameters
        self.feed_forward = MixedFeedForward(WIDTH, inner, mixture, init_std=WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)  # [batch, heads, tokens, head size]
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):  # bytes [batch, tokens] -> logits of the byte behind each of them
    def __init__(self, mixture: MixtureConfig) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(BYTES, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(mixture) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, BYTES, False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.positions.weight[: ids.shape[1]])))

    def loss(self, windows: Tensor) -> Tensor:  # text [batch, CONTEXT + 1] -> cross-entropy in nats a byte
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


# ---- The text, the training, and what came of it ---------------------------------------------------------------------
def windows_of_text(held_out: bool, device: str) -> Tensor:
    """All windows of CONTEXT + 1 bytes; every tenth file of the library is held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path.read_bytes() for i, path in enumerate(sorted(folder.glob("*.py"))) if (i % 10 == 9) == held_out]
    if not files:
        raise UserError(f"{folder}: has no source text of Python's library to train on; take a Python that has it")
    return torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8).to(device).unfold(0, CONTEXT + 1, 1)


def train(model: GPT, steps: int, seed: int, device: str, peak: float = 4e-3, batch: int = 16) -> None:
    """Trains a model with AdamW, and prints its loss on held-out text.

    The rate goes up in a line, then down to peak / 20 along a cosine. Norms and LA's numbers are not decayed.
    """
    source, held_out = windows_of_text(False, device), windows_of_text(True, device)[:: 40 * CONTEXT].long()
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], weight_decay=0.1)
    draw, start, warm_up = torch.Generator().manual_seed(seed), time.monotonic(), max(1, steps // 10)
    for step in range(steps):
        progress = max(0, step - warm_up) / max(1, steps - warm_up)
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / warm_up, 0.525 + 0.475 * math.cos(math.pi * progress))
        model.loss(source[torch.randint(len(source), (batch,), generator=draw)].long()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % warm_up == 0 or step + 1 == steps:
            with torch.no_grad():
                print(
                    f"step {step + 1:4}   held-out loss {model.loss(held_out):.4f}   {time.monotonic() - start:4.0f} s"
                )


@torch.no_grad()
def sample(model: GPT, prompt: str, length: int, device: str) -> str:
    """What the model goes on with, drawn at temperature 0.8."""
    ids = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(length):
        ids = torch.cat((ids, (model(ids[:, -CONTEXT:])[:, -1] / 0.8).softmax(-1).multinomial(1)), dim=1)
    return bytes(ids[0].tolist()).decode(errors="replace")


@torch.no_grad()
def show_coefficients(model: GPT, ids: Tensor) -> None:
    """A layer's coefficients on text: their spread over tokens, mean, and mean over three kinds of bytes."""
    layer, seen = model.blocks[1].feed_forward, []
    with layer.coefficients.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        model(ids)
    space, letter = (ids == 32) | (ids == 10), ((ids | 32) >= 97) & ((ids | 32) <= 122)
    print(f"\nCoefficients, second layer {'spread':>8}{'mean':>8}{'space':>8}{'letter':>8}{'other':>8}")
    for name, v in zip(layer.mixture.coefficient_names, seen[0].expand(*ids.shape, -1).unbind(-1), strict=True):
        columns = [v.std(), v.mean(), *(v[kind].mean() for kind in (space, letter, ~(space | letter)))]
        print(f"{name:27}" + "".join(f"{number:8.3f}" for number in columns))


def main(arguments: list[str] | None = None) -> None:
    """Trains one model and shows it; a mistake in the flags is one line and exit code 2."""
    parser = OneLineParser(prog="nanogpt.py", description=__doc__.splitlines()[0])
    parser.add_argument("--feed-forward", choices=("swiglu", "la", "moa"), default="moa", help="default: moa")
    parser.add_argument("--form", choices=("type1", "one-sided", "bi-sided", "quadratic"), help="default: bi-sided")
    parser.add_argument("--steps", type=positive, default=600, metavar="N", help="of 2048 bytes; default: 600")
    parser.add_argument("--seed", type=seed, default=1, metavar="S", help="of weights, data and sample; default: 1")
    options = parser.parse_args(arguments)
    with one_line_errors("nanogpt.py", "nothing is kept"):
        torch.manual_seed(options.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = GPT(mixture(options.feed_forward, options.form)).to(device)
        print(model.blocks[0].feed_forward, f"{sum(p.numel() for p in model.parameters()):,} parameters", sep="\n")
        train(model, options.steps, options.seed, device)
        print("\nThe model writes:", sample(model, "def ", 200, device), sep="\n")
        show_coefficients(model, windows_of_text(True, device)[: 64 * CONTEXT : CONTEXT, :-1].long())


if __name__ == "__main__":
    main()
