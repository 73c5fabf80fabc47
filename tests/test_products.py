"""Products in blocks are the products, and no block is one that a library would split over threads."""

from __future__ import annotations

import itertools
import math

import numpy as np

from cases import named_case
from knapsack_rl.estimation import products


def test_products_are_right() -> None:
    for rows, kind in itertools.product([0, 1, 79, 80, 81, 1000], [np.float64, np.float32]):
        with named_case(rows=rows, kind=kind):
            dice = np.random.default_rng(rows)
            a, b = dice.random((rows, 57)).astype(kind), dice.random((57, 57))
            np.testing.assert_allclose(products.product(a, b), np.einsum("ij,jk->ik", a, b), rtol=1e-12)
            np.testing.assert_allclose(products.product(a, b.T), np.einsum("ij,kj->ik", a, b), rtol=1e-12)
            np.testing.assert_allclose(products.product(a, b[0]), np.einsum("ij,j->i", a, b[0]), rtol=1e-12)
            x = dice.random(rows)
            np.testing.assert_allclose(
                products.product_of_columns(a, x), np.einsum("ij,i->j", a, x), rtol=1e-12, atol=1e-300
            )
            np.testing.assert_allclose(
                products.dot(a[:, 0], x), np.einsum("i,i->", a[:, 0], x), rtol=1e-12, atol=1e-300
            )


def test_blocks_are_small_and_cover_every_row(monkeypatch) -> None:
    seen = []
    real = np.matmul

    def watched(a, b, out):
        seen.append((a.shape, b.shape))
        return real(a, b, out=out)

    monkeypatch.setattr(np, "matmul", watched)
    products.product(np.ones((5000, 57)), np.ones((57, 128)))
    products.product(np.ones((5000, 57)), np.ones(57))
    assert sum(math.prod(a[:-1]) for a, _ in seen) == 10_000
    assert max(a[-2] * a[-1] * b[1] for a, b in seen if len(b) == 2) <= 2**18  # a stack is multiplied block by block
    assert max(a[-2] * a[-1] for a, b in seen if len(b) == 1) < 9216
