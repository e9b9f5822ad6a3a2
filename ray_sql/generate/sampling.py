"""Samples of a model: the same ones whatever the batch, the order or the worker.

The random numbers of a draw depend on the seed, the prompt, the sample and the token's place, and
on nothing else. A number picks a token by the cumulative probabilities. So equal logits give equal
samples, and the first four of eight samples are those of four.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """Draw `samples` answers to a question."""

    samples: int
    temperature: float = 1.0
    """Divide the logits by this: below 1 draws likely tokens more often."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities reach this sum."""
    seed: int = 0

    def numbers(self, prompt: Sequence[int], length: int) -> torch.Tensor:
        """Return `[length, samples]` numbers in [0, 1) for the tokens of a prompt's samples."""
        streams = [
            self._stream(prompt, sample << 192).random(length) for sample in range(self.samples)
        ]
        return torch.from_numpy(np.stack(streams, axis=1))

    def more_numbers(
        self, prompt: Sequence[int], sample: int, place: int, count: int
    ) -> torch.Tensor:
        """Return further numbers for the token at a place of a sample."""
        stream = self._stream(prompt, (sample << 192) + ((place + 1) << 128))
        return torch.from_numpy(stream.random(count))

    def _stream(self, prompt: Sequence[int], counter: int) -> np.random.Generator:
        """Return numbers that depend on the seed, the prompt and a counter of 256 bits.

        Its upper parts keep the samples, and the tokens of a sample, apart.
        """
        content = np.asarray([self.seed, *prompt], dtype=np.int64).tobytes()
        key = int.from_bytes(hashlib.sha256(content).digest()[:16], "little")
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def draw(self, logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return the tokens `[rows, samples]` that `numbers` pick after `[rows, vocabulary]`."""
        probabilities = torch.softmax(logits.float() / self.temperature, -1)
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        wanted = numbers.to(cumulative) * cumulative[:, -1:]
        # the first token whose cumulative probability is larger: none of probability 0
        places = torch.searchsorted(cumulative, wanted, right=True)
        places = places.clamp_max(logits.shape[-1] - 1)
        return places if order is None else order.gather(-1, places)


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of `tokens` `[…, n]` under `logits` `[…, vocabulary]`.

    It is the model's own, at temperature 1, whatever the samples were drawn at.
    """
    logits = logits.float()
    return logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
