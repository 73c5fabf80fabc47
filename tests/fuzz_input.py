"""What the fuzzer feeds: numbers, ids, texts and files that are right, nearly right or not at all."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

import hostile

NUMBERS = (
    *(0, 1, -1, 2, 7, 0.5, 1e-300, 1e308, -0.0, float("nan"), float("inf"), -float("inf")),
    *(2**63, -(2**70), 10**400),
)
ODD = (None, "", "7", b"x", [], {}, [[1]], True, object(), 1j, "a" * 99, np.float32(0.3), np.array([]), ("a",))


class BytesDice(random.Random):
    """A source of random choices driven by bytes, so that a fuzzer steers them; zeros once the bytes are used up."""

    def __new__(cls, content: bytes) -> BytesDice:
        return super().__new__(cls)

    def __init__(self, content: bytes) -> None:
        super().__init__(0)
        self._rest = content

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        taken, self._rest = self._rest[:size], self._rest[size:]
        return int.from_bytes(taken.ljust(size, b"\0"), "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / 2**16


def number(dice: random.Random) -> Any:
    """Mostly a usable number."""
    kind = dice.random()
    if kind < 0.6:
        return dice.randrange(12)
    return dice.choice(NUMBERS) if kind < 0.9 else dice.choice(ODD)


def numbers(dice: random.Random, size: int) -> Any:
    """An array that is fine, nearly fine, or not at all."""
    kind = dice.random()
    if kind < 0.7:
        return [dice.choice((0.0, 1.0, dice.random())) for _ in range(size)]
    if kind < 0.9:
        return [number(dice) for _ in range(max(size + dice.choice((-1, 0, 0, 1)), 0))]
    return dice.choice(ODD)


def ids(dice: random.Random, size: int) -> Any:
    if dice.random() < 0.1:
        return [dice.choice((*ODD, *NUMBERS)) for _ in range(size)]
    pool: list[Any] = [*range(6), "a", "b", "7", "é", "\x00", "\ud800", -3, 2**65]
    return [dice.choice(pool) for _ in range(size)] if dice.random() < 0.3 else dice.sample(pool, min(size, len(pool)))


PIECES = ("####", "\\boxed{", "}", "1", "-", ",", ".", "/", "e", "%", "$", " ", "\n", "\\frac{", "{", "½")


def text(dice: random.Random) -> str:
    kind = dice.random()
    if kind < 0.3:
        return "".join(
            chr(dice.choice((dice.randrange(128), dice.randrange(0x11000)))) for _ in range(dice.randrange(40))
        )
    if kind < 0.6:
        return "".join(dice.choice(PIECES) for _ in range(dice.randrange(20)))
    if kind < 0.7:
        return next(iter(hostile.texts(1, dice.randrange(2**30))))[:2000]
    return f"#### {dice.randrange(10**6)}"


DISLIKED = (b"\x00", b"\xff\xfe", b'"', b"[" * 3000, b"9" * 5000, b"1e999", b"null", b"\n\n", b"{", b",,", b"*a", b"!!")


def mutated(dice: random.Random, whole: bytes) -> bytes:
    """A file with bytes changed, cut, doubled or replaced by what parsers dislike."""
    content = bytearray(whole)
    for _ in range(dice.choice((0, 1, 1, 2, 8))):
        at = dice.randrange(len(content) + 1)
        kind = dice.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = dice.choice(DISLIKED)
        elif kind == 3:
            content[at:at] = content[at : at + dice.randrange(200)]
        else:
            del content[at : at + dice.randrange(40)]
    return bytes(content)


def altered(dice: random.Random, value: Any) -> Any:
    """A JSON-like value in which one entry somewhere is missing or another."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        key = dice.choice(list(value))
        if dice.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: altered(dice, value[key])}
    if isinstance(value, np.ndarray) and dice.random() < 0.8:
        other = value.copy()
        if other.size and dice.random() < 0.7:
            with np.errstate(all="ignore"):
                other.reshape(-1)[dice.randrange(other.size)] = dice.choice((0, 1, 255, np.int64(2**62) % 200))
            return other
        return dice.choice((other[:-1], other.astype(np.float32), other.astype(str), other[None], np.array(None)))
    return number(dice)
