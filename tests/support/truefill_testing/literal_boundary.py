"""Semantic boundary control (PILOT) written out: the matrix of probabilities, with zeros put in.

    P = softmax(Q K^T / sqrt(d))                                   [rows, heads, pixels, tokens]
    P[known pixels, tokens that are not the start of a text] *= 1 - strength      ours: strength 1 is the paper, 0
    out = P V                                                      nothing is normalised again

A pixel of a level is known unless the hole, resized bilinearly to the level, is exactly 1 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TEXT = 77
"""Tokens of one text; its first one is its start."""


@dataclass
class Boundary:
    """Semantic boundary control for one UNet call: `hole` [rows, 1, h, w] on the latent grid, 1 = to be filled."""

    hole: torch.Tensor
    strength: float = 1.0

    def bounded(self, probabilities: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """P [rows, heads, pixels, tokens] with what is silenced taken out."""
        rows, _, pixels, tokens = probabilities.shape
        kept = torch.ones(rows, pixels, tokens, dtype=probabilities.dtype)
        for row in range(rows):
            if not self.hole[row].any():
                continue
            known = known_pixels(self.hole[row, 0], grid)
            for token in range(tokens):
                if token % TEXT != 0:
                    kept[row, known, token] = 1.0 - self.strength
        return probabilities * kept[:, None]


def known_pixels(hole: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Hole [h, w] -> bool [grid height * grid width]."""
    height, width = hole.shape
    cells = hole.tolist()
    known = torch.ones(grid, dtype=torch.bool)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = min(max((i + 0.5) * height / grid[0] - 0.5, 0.0), height - 1.0)
            x = min(max((j + 0.5) * width / grid[1] - 0.5, 0.0), width - 1.0)
            top, left = int(y), int(x)
            # The neighbours with a weight above 0: all of them must be hole.
            rows = [top] if y == top else [top, top + 1]
            columns = [left] if x == left else [left, left + 1]
            known[i, j] = not all(cells[row][column] == 1.0 for row in rows for column in columns)
    return known.flatten()
