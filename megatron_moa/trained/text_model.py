"""Defines what a trained model is used for: logits, text drawn from it, the loss of a text.

:class:`TextModel` is what models from any folder have in common; ``megatron_moa/trained/from_megatron.py`` has the
model of a Megatron checkpoint, ``megatron_moa/hf/loading.py`` that of a Hugging Face folder, and
``megatron_moa/load.py`` takes either.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_moa.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_NUMBERS = "the model's logits are NaN or infinite: its weights are, or overflow; take an earlier checkpoint"


@dataclass(frozen=True)
class Continuation:
    """What a model wrote behind a prompt.

    Attributes:
        prompt: as it was given; None where it was given as tokens.
        text: what comes behind it; None where the model has no tokenizer.
        tokens: of the text, without the one that ends a document.
        ended: ``document`` if the model ended it there, ``length`` after so many tokens as were asked for, ``context``
            where the model's context was full before.
    """

    prompt: str | None
    text: str | None
    tokens: list[int]
    ended: str


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts a text.

    Attributes:
        loss: nats, of all tokens together.
        tokens: that were predicted.
        bytes: of the text in UTF-8.
    """

    loss: float
    tokens: int
    bytes: int

    def __add__(self, other: TextLoss) -> TextLoss:
        return TextLoss(self.loss + other.loss, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss_per_token(self) -> float:
        """Nats a token."""
        return self.loss / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Does not depend on the tokenizer: models of different ones compare by it."""
        return self.loss / self.bytes / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()

    @property
    def byte_perplexity(self) -> float:
        """2 to the power of the bits per byte."""
        return 2.0**self.bits_per_byte


class TextModel(ABC):
    """A model in evaluation mode with its tokenizer."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model is."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Without what only pads the vocabulary."""

    @property
    @abstractmethod
    def context(self) -> int:
        """How many tokens the model takes at once."""

    @property
    @abstractmethod
    def end(self) -> int | None:
        """The token between documents; None if there is none."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Returns the tokens that end what the model writes.

        These are the one between documents, and others of models tuned elsewhere.
        """
        return () if self.end is None else (self.end,)

    @property
    def before_text(self) -> list[int]:
        """Returns the tokens that the tokenizer puts in front of every text, in training too, such as Llama's."""
        return []

    @property
    def first(self) -> int | None:
        """The token in front of a text, as in training.

        It is what the tokenizer puts there, else the token between documents.
        """
        return (self.before_text or [self.end])[-1]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The text's tokens, without those that a tokenizer puts around a text."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The tokens' text."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Computes logits [b, t, vocabulary] for tokens [b, t] on the model's device.

        Every row is seen from its left end on.
        """

    @abstractmethod
    def _continued(self, rows: list[list[int]], steps: int, choose_next: Callable[[Tensor], Tensor]) -> list[list[int]]:
        """At most ``steps`` new tokens of each row, the first of ``ends`` included; after it comes anything."""

    def start(self, text: str) -> list[int]:
        """The tokens a model is given for a prompt: for an empty one the start of a document.

        Raises:
            UserError: it is empty, and the model has no token between documents.
        """
        tokens = [*self.before_text, *(self.encode(text) if text else [])]
        if not tokens and self.first is None:
            raise UserError("the prompt is empty, and the model has no token that begins a document; give a text")
        return tokens or [self.first]

    @torch.inference_mode()
    def logits(self, text: str | Sequence[int] | Tensor) -> Tensor:
        """Logits of the token behind every position.

        Args:
            text: a text, its tokens, or a batch of them, [b, t].

        Returns:
            [t, vocabulary] float32, [b, t, vocabulary] for a batch.

        Raises:
            UserError: longer than the context, or a token that is not in the vocabulary.
        """
        tokens = torch.as_tensor(self.start(text) if isinstance(text, str) else text, device=self.device)
        self._check_tokens(tokens, 0, "the text")
        logits = self.forward(tokens.view(-1, tokens.shape[-1])).float()
        return logits.view(*tokens.shape, -1)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        num_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1,
    ) -> list[Continuation]:
        """Continues prompts, all in one batch.

        Args:
            prompts: texts, or tokens; a single text, too. An empty text is the start of a document.
            num_tokens: at most; fewer where the model ends the document or the longest prompt fills the context.
            temperature, top_k, top_p: of :func:`choose`; 0, the default, takes the likeliest token.
            seed: of the sampling. The same prompts, seed and model give the same text, from checkpoint and export.

        Raises:
            UserError: a prompt that fills the context, an empty one where there is no token to start with, a token that
                is not in the vocabulary, or a model that gives no numbers.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self.start(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        if not rows:
            return []
        for number, row in enumerate(rows, 1):
            if not row:
                raise UserError(f"prompt {number} has no tokens; give at least one, or an empty text")
            self._check_tokens(torch.tensor(row), 1, f"prompt {number}")
        steps = min(num_tokens, self.context - max(map(len, rows)))
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.inference_mode():
            new = self._continued(rows, steps, lambda logits: choose(logits, temperature, top_k, top_p, generator))
        return [
            self._continuation(prompt if isinstance(prompt, str) else None, tokens, steps < num_tokens)
            for prompt, tokens in zip(prompts, new, strict=True)
        ]

    def _continuation(self, prompt: str | None, tokens: list[int], context_full: bool) -> Continuation:
        ended = "context" if context_full else "length"
        last = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        if last is not None:
            tokens, ended = tokens[:last], "document"
        return Continuation(prompt, self._text_behind(prompt or "", tokens), tokens, ended)

    def _text_behind(self, prompt: str, tokens: list[int]) -> str | None:
        """Behind the prompt: some tokenizers leave out the space before the first token that they decode."""
        if not self.has_tokenizer:
            return None
        given = self.encode(prompt) if prompt else []
        before, whole = self.decode(given), self.decode([*given, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self.decode(tokens)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one that makes texts of tokens."""
        return True

    @torch.inference_mode()
    def text_loss(
        self,
        text: str,
        stride: int | None = None,
        window: int | None = None,
        advance: Callable[[int], object] = lambda size: None,
    ) -> TextLoss:
        """The loss of a text of any length, as one document.

        The token :attr:`first` stands before the text, as in training, and is no part of what is predicted; nothing is
        predicted behind the text. A window of as many tokens as the context moves on by ``stride`` and counts the
        tokens that none before it has counted: all but those near the start see ``window - stride`` tokens or more.

        Args:
            text: not empty.
            stride: default half a window. As large as the window it is lm-eval's rolling log-likelihood.
            window: in tokens; default the model's context.
            advance: is told after each window of how many of the text's bytes it was, about.

        Raises:
            UserError: no text, a stride or window out of range, a model without a token that begins a document, or one
                that gives no numbers.
        """
        window = self.context if window is None else window
        stride = max(1, window // 2) if stride is None else stride
        if not 1 <= window <= self.context:
            raise UserError(f"--window {window}: out of range; give 1 to {self.context}, the model's context")
        if not 1 <= stride <= window:
            raise UserError(f"--stride {stride}: out of range; give 1 to {window}, the window")
        if self.first is None:
            raise UserError("the model has no token that begins a document; its loss of a whole text is not defined")
        tokens = self.encode(text)
        if not tokens:
            raise UserError("the text is empty; give one with at least one token")
        given = torch.tensor([self.first, *tokens], device=self.device)  # one ahead of what is predicted
        loss, done, size = 0.0, 0, len(text.encode())
        while done < len(tokens):
            last = min(done + (stride if done else window), len(tokens))
            first = max(0, last - window)
            logits = self.forward(given[None, first:last])[0, done - first :].float()
            losses = torch.nn.functional.cross_entropy(logits, given[done + 1 : last + 1], reduction="none")
            loss += losses.double().sum().item()
            advance(size * last // len(tokens) - size * done // len(tokens))
            done = last
        if not math.isfinite(loss):
            raise UserError(_NO_NUMBERS)
        return TextLoss(loss, len(tokens), size)

    def _check_tokens(self, tokens: Tensor, further: int, what: str) -> None:
        """Raises UserError where ``tokens`` [..., t] and so many further ones are not for this model."""
        length = tokens.shape[-1] + further
        if length > self.context:
            behind = " with a token behind it" if further else ""
            raise UserError(f"{what}{behind} has {length} tokens, the model's context {self.context}; shorten it")
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(outside):
            raise UserError(f"{what} has a token {outside[0]}; the model's are 0 to {self.vocab_size - 1}")


def tokens_before_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns what a tokenizer of transformers puts in front of every text.

    It may put something behind, too.
    """
    whole, text = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    starts = [place for place in range(len(whole)) if text and whole[place : place + len(text)] == text]
    return whole[: starts[0]] if starts else []


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """The next token of each sequence.

    Args:
        logits: [b, vocabulary].
        temperature: 0 takes the likeliest token.
        top_k: sample among that many; 0 among all.
        top_p: sample among the fewest likeliest tokens whose probabilities reach this sum.

    Returns:
        [b] int64

    Raises:
        UserError: logits that are no numbers.
    """
    if not logits.max(-1).values.isfinite().all():
        raise UserError(_NO_NUMBERS)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / max(temperature, 1e-30)  # nearer to 0 the quotients overflow, and nothing else is drawn
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities, tokens = logits.softmax(-1).sort(descending=True)
    reached_before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((reached_before > 0) & (reached_before >= top_p), 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)
