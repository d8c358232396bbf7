"""Few cases in which every value of a factor meets every value of each other one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def all_pairs(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases, one value of each factor in each, that hold all pairs of values of two factors; always the same ones.

    Of the full product the case with the most new pairs is taken, again and again. Two factors give their full product.
    """
    cases = list(product(*factors))
    pairs_of = {case: set(combinations(enumerate(map(repr, case)), 2)) for case in cases}
    missing = set().union(*pairs_of.values())
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of[case] & missing)))
        missing -= pairs_of[chosen[-1]]
    return chosen
