"""Random networks of up to a dozen blocks of any kind, for property tests and ``benchmarks.random_graphs``."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.blocks import BLOCKS, WEIGHTLESS_MIXERS, width
from tests.sequence_blocks import SEQUENCE_BLOCKS

FAMILIES = (*BLOCKS, *SEQUENCE_BLOCKS)
STARTS = ("image", "sequence", "words")
MOST = 16
"""Channels above which a block that only narrows is put in."""

WORDS = 7


class Head(nn.Module):
    """What a network of images ends with: a linear map to 5."""

    def __init__(self, kind: str, c: int, s: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(c * s * s if "flatten" in kind else c, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            x = x.mean((2, 3))
        elif self.kind == "pool":
            x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        elif self.kind == "flatten":
            x = x.flatten(1)
        elif self.kind == "last_flatten":
            x = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)
        return self.linear(x)


class SequenceHead(nn.Module):
    """What a network of sequences ends with: a linear map to 5, of one step or of each."""

    def __init__(self, kind: str, w: int, t: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(w * t if "flatten" in kind else w, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            x = x.mean(1)
        elif self.kind == "pool":
            x = x[:, -1]
        elif "flatten" in self.kind:
            x = (x if self.kind == "flatten" else x.transpose(1, 2)).flatten(1)
        return self.linear(x)


HEADS = ("mean", "pool", "flatten", "last_flatten", "each")


class ToSequence(nn.Module):
    """At most nine positions of the plane, one after another."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, min(x.shape[-1], 3)).flatten(2).transpose(1, 2)


class ToImage(nn.Module):
    """Four steps against four steps."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool1d(x.transpose(1, 2), 4)
        return y[..., None] + y.sigmoid()[..., None, :]


@dataclass(frozen=True)
class Recipe:
    """Names of the blocks, the head, what the input is, and the seed of everything else."""

    blocks: tuple[str, ...]
    head: str
    seed: int
    side: int = 6
    start: Literal["image", "sequence", "words"] = "image"

    def build(self) -> nn.Sequential:
        """The network: where a block needs images and has sequences, or the other way round, a converter is put in."""
        rng = random.Random(self.seed)
        modules: list[nn.Module] = []
        image = self.start == "image"
        c, s = 3, self.side
        if self.start == "words":
            c = width(rng)
            modules.append(nn.Embedding(WORDS, c))
        names = [("plain" if image else "linear"), *self.blocks]
        for name in names:
            if (name in BLOCKS) != image:
                modules.append(ToSequence() if image else ToImage())
                s, image = (min(s, 3) ** 2 if image else 4), not image
            if c > MOST or (image and s > 12):
                narrow = nn.AdaptiveAvgPool2d(4) if image else nn.Identity()
                s = 4 if image else s
                modules += [narrow, nn.Conv2d(c, 6, 1) if image else nn.Linear(c, 6)]
                c = 6
            module, c, s = (BLOCKS if image else SEQUENCE_BLOCKS)[name](rng, c, s)
            modules.append(module)
        modules.append((Head if image else SequenceHead)(self.head_kind(image), c, s))
        return nn.Sequential(*modules)

    def head_kind(self, image: bool) -> str:
        """The head; an image of classes is not among them."""
        return "mean" if image and self.head == "each" else self.head

    def inputs(self, batch: int, seed: int) -> Tensor:
        """A batch of what the network takes."""
        generator = torch.Generator().manual_seed(seed)
        if self.start == "words":
            words = torch.randint(0, WORDS, (batch, self.side), generator=generator)
            words[0, 0] = WORDS - 1  # so that the range is that of the table
            return words
        shape = (batch, 3, self.side, self.side) if self.start == "image" else (batch, self.side, 3)
        return torch.randn(shape, generator=generator)

    def mixes(self, model: nn.Module, *, free_sums: bool = False) -> bool:
        """Whether channels are mixed without weights, so that zeroing one is not removing it.

        A sum of unlike channels does so too where a zero channel comes to it as another constant, ``sigmoid(0)``: by a
        converter, or by an activation that is not zero at zero.
        """
        kinds = (*WEIGHTLESS_MIXERS, ToImage, nn.Sigmoid, nn.Softplus) if free_sums else WEIGHTLESS_MIXERS
        return any(isinstance(m, kinds) for m in model.modules())


def recipes(
    names: tuple[str, ...] = FAMILIES, *, depth: int = 12, starts: tuple[str, ...] = STARTS
) -> st.SearchStrategy[Recipe]:
    """Hypothesis' recipes.

    Args:
        names: of the blocks that may occur.
        depth: most blocks.
        starts: what the input may be.
    """
    return st.builds(
        Recipe,
        blocks=st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=depth).map(tuple),
        head=st.sampled_from(HEADS),
        seed=st.integers(0, 2**20),
        side=st.sampled_from([4, 6, 7]),
        start=st.sampled_from(starts),
    )
