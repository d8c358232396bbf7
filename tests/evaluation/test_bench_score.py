"""The ways to read attention, against loops over heads, pixels and tokens."""

from __future__ import annotations

import math

import pytest
import torch

from devtools.pack import load_pack, pack_module

load_pack()
bench_score = pack_module("evaluation.bench_score")


def map_value(name: str, head: torch.Tensor, pixel: int, token: int) -> float:
    """One head's [pixels, text] raw scores: what a pixel says of a token."""
    row = [float(value) for value in head[pixel]]
    total = sum(math.exp(value) for value in row)
    return {
        "released": row[token],
        "raw": row[token],
        "probability": math.exp(row[token]) / total,
        "log-probability": row[token] - math.log(total),
        "contrast": row[token] - row[0],
    }[name]


def literal(name: str, blocks: list[torch.Tensor], tokens: list[int], hole: list[bool]) -> float:
    """The score of one picture; each block is [heads, pixels, text]."""
    score = 0.0
    for token in tokens:
        of_pixels = []
        for pixel in range(len(hole)):
            values = [map_value(name, head, pixel, token) for block in blocks for head in block]
            of_pixels.append(sum(values) / len(values))
        if name == "released":
            # Equation 9, with the signs and the shift of the released code.
            for value, is_hole in zip(of_pixels, hole, strict=True):
                probability = 1 / (1 + math.exp(-(value - 1)))
                score += math.log(probability if is_hole else 1 - probability) / len(hole)
            continue
        inside = [value for value, is_hole in zip(of_pixels, hole, strict=True) if is_hole]
        outside = [value for value, is_hole in zip(of_pixels, hole, strict=True) if not is_hole]
        score += sum(inside) / max(len(inside), 1) - sum(outside) / max(len(outside), 1)
    return score


@pytest.mark.quick
@pytest.mark.parametrize("name", list(bench_score.READINGS))
def test_each_reading_is_its_formula(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = [2 * torch.randn(3, 2, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    tokens = torch.tensor(
        [[False, True, True, False, False], [False, True, False, False, True], [False, True, True, True, True]]
    )
    hole = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    way = bench_score.READINGS[name]
    maps = torch.stack([way.of_block(block) for block in blocks]).mean(dim=0)
    found = way.score(maps, tokens, hole)
    for picture in range(3):
        own = tokens[picture].nonzero().flatten().tolist()
        right = literal(name, [block[picture] for block in blocks], own, hole[picture].tolist())
        assert float(found[picture]) == pytest.approx(right, rel=1e-9)
