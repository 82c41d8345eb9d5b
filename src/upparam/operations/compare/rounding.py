"""What rounding alone explains: how far two equal deltas may lie apart, and how far the best multiplier of one may be from the true one."""

from __future__ import annotations

from math import hypot, sqrt

from upparam.algorithms.relation import Pair, Relation

ROUNDINGS = 1.5
"""How many times further apart than one rounding of every factor of both is expected to bring them two equal deltas may lie.

The expectation takes the largest relative error for every element, where it is three quarters of that on average: room for three roundings.
"""
SWAYS = 6.0
"""Standard deviations of the best multiplier of two deltas, as rounding scatters it around the true one, beyond which it is another number."""
ARITHMETIC = 16 * 2.0**-24
"""The relative error of factors that were computed in float32 (another gauge, a scale put into them), sums of some hundred products."""
EQUAL_CAP = 0.02
"""Relative distance beyond which deltas are not called equal however coarsely they are stored: rounding could then hide training."""


def allowance(relation: Relation, multiplier: float = 1.0) -> float:
    """The distance of multiplier * A from B that rounding can explain: of the stored factors of both, and of float32 arithmetic."""
    size, largest = abs(multiplier), max(abs(multiplier) * relation.norms[0], relation.norms[1])
    rounded = hypot(size * relation.noise[0], relation.noise[1])  # the errors of the two are independent
    computed = ARITHMETIC * (size * relation.spread[0] + relation.spread[1])
    return min(ROUNDINGS * rounded + computed + relation.floor, EQUAL_CAP * largest)


def certainty(relation: Relation, pair: Pair | None, shape: tuple[int, int], enough: float | None = None) -> tuple[float, bool]:
    """How far, relatively, rounding can move the best multiplier of two deltas that are multiples of each other: far less than it moves
    the deltas, since errors average out.

    Errors also make the norm of what has them larger, which pulls the multiplier down by the square of their share. Over how many elements
    errors average out takes products of the factors; with `enough` the least that it can be is given where that is no less than `enough`, and True.
    """
    size = abs(relation.multiplier or 0.0)
    largest = max(size * relation.norms[0], relation.norms[1])
    if not largest:
        return 0.0, False
    noise = hypot(size * relation.noise[0], relation.noise[1]) / largest
    computed = ARITHMETIC * (size * relation.spread[0] + relation.spread[1]) / largest
    products = relation.floor**2 / (relation.norms[0] * relation.norms[1])  # squared, a floor is what the squares may be off
    fixed = computed + products + (allowance(relation, size) / largest) ** 2
    if pair is None:
        return fixed + SWAYS * noise / sqrt(max(min(shape), 1)), False
    least = fixed + SWAYS / 2 * noise / sqrt(max(pair.one.up.shape[1] * sum(shape), 1))
    return (least, True) if enough is not None and enough <= least else (fixed + SWAYS * pair.sway(), False)
