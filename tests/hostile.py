"""Texts that a model might write and that must neither run, nor hang, nor count as right: seeded, any number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

TRAP = "knapsack_rl_trap"
"""Name of the file that code among the texts would make in the working folder."""

CODE = (
    f"__import__('pathlib').Path('{TRAP}').touch()",
    f"open('{TRAP}', 'w')",
    f"exec(\"open('{TRAP}','w')\")",
    f"__import__('os').system('touch {TRAP}')",
    f"$(touch {TRAP})",
    f"`touch {TRAP}`",
    f"'; touch {TRAP}; '",
    f"f(open(chr(107)+chr(110),chr(119)))",  # noqa: F541 - one of the family
    f"{{{{ cycler.__init__.__globals__.os.popen('touch {TRAP}') }}}}",
    f"().__class__.__base__.__subclasses__()",  # noqa: F541
    f"\\input{{|touch {TRAP}}}",
    f"\\immediate\\write18{{touch {TRAP}}}",
    "eval(compile('while 1: pass','','exec'))",
    "lambda: (yield)",
    "raise SystemExit",
)
FORMULAS = (
    "9^{9^{9^{9^{9}}}}",
    "10^{10^{10}}!",
    "99999!",
    "((((99!)!)!)!)",
    "\\prod_{k=1}^{10^9} k^k",
    "\\sum_{k=1}^{10^{12}} \\frac{1}{k!}",
    "\\int_0^1 x^{x^{x^{x^{x}}}} dx",
    "\\operatorname{zeros}(99999,99999)",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\sqrt[10^9]{2^{10^9}}",
    "\\lim_{n\\to\\infty} \\prod_{k=1}^{n} \\sin(k)^{k!}",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}^{10^9}",
    "(1+x)^{99999}",
    "\\gcd(10^{10^7},3^{10^7})",
)
FORMATS = ("%s%s%n%x", "{0.__class__}", "%(a)s", "{", "}", "${7*7}", "\\N{BULLET}", "{!r:>999999999}", "%99999999d")
DIGITS = ("１２３", "٤٢", "४२", "²³", "Ⅷ", "½", "四十二", "𝟜𝟚", "①", "৪২")
CONTROL = "".join(map(chr, [*range(9), 11, 12, *range(14, 32), 127, 0x85, 0x200B, 0x202E, 0x2028, 0xFEFF]))


def _nested(rng: random.Random) -> str:
    opening, closing = rng.choice(
        [("(", ")"), ("{", "}"), ("[", "]"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("\\left(", "\\right)")]
    )
    depth = rng.choice([1, 30, 60, 500, 5000])
    return opening * depth + "x" + closing * rng.choice([depth, depth - 1, 0])


def _digits(rng: random.Random) -> str:
    number = rng.choice("123456789") * rng.choice([65, 400, 4299, 4301, 50_000])
    return rng.choice(["{}", "{}.5", "0.{}", "1/{}", "{}/1", "-{}", "1,{}", "$ {}", "{}%"]).format(number)


def _exponent(rng: random.Random) -> str:
    power = rng.choice([100, 309, 10**6, 10**9, 10**18])
    return rng.choice(["1e{}", "1E+{}", "1e-{}", "10^{{{}}}", "2**{}", "1.5e{}", "0e{}", "1e{}/3"]).format(power)


def _noise(rng: random.Random) -> str:
    return "".join(
        chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0xD800, 0xE000)]))
        for _ in range(rng.randrange(80))
    )


def _control(rng: random.Random) -> str:
    return "".join(rng.choice(CONTROL + "+-") for _ in range(rng.randrange(1, 60)))


def _long(rng: random.Random) -> str:
    piece = rng.choice(["a", "1,", "1 ", "####", "\\boxed{", "{", "-", ".", "1/", ",111", "\n", "\x00", "e1", "$"])
    return piece * (rng.choice([200_000, 1_000_000]) // len(piece))


def _many(rng: random.Random) -> str:
    piece = rng.choice(
        ["1,", "1 ", "####", "\\boxed{", "\\boxed{}", "{", "-", ".", "1/", ",111", "+-", "e1", "$", "\\frac{"]
    )
    return piece * (90_000 // len(piece))


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _nested,
    _digits,
    _exponent,
    _noise,
    _control,
    _many,
    lambda rng: rng.choice(CODE),
    lambda rng: rng.choice(FORMULAS),
    lambda rng: rng.choice(FORMATS) * rng.choice([1, 50]),
    lambda rng: rng.choice(DIGITS),
    lambda rng: rng.choice(["nan", "inf", "-inf", "NaN", "Infinity", "1_000", "0x2a", "0b1", "None", "True", "1j", ""]),
)
FRAMES = ("{}", "#### {}", "\\boxed{{{}}}", "The answer is ${}$.", "{}\n", "\\boxed{{{}", "####{}\n#### ", "$$ {} $$")


def texts(number: int, seed: int = 0) -> Iterator[str]:
    """Hostile completions. None of them ends in :data:`RIGHT` or in anything equal to it."""
    rng = random.Random(seed)
    for k in range(number):
        kind = _long if k % 500 == 499 else rng.choice(KINDS)  # a megabyte now and then
        text = kind(rng)
        if rng.random() < 0.1:
            text += rng.choice(KINDS)(rng)
        yield rng.choice(FRAMES).replace("{}", text).replace("{{", "{").replace("}}", "}")


RIGHT = "-8675309.125"
"""A right answer that no generated text can contain: no generator writes these digits."""

TRICKS: dict[str, tuple[str, ...]] = {
    "42": ("4_2", "0x2a", "0b101010", "0o52", "４２", "٤٢", "४२", "𝟜𝟚", "42e999", "4²", "042e1", "4 2", "4,2"),
    "1": ("True", "nan", "inf/inf", "¹", "①", "Ⅰ", "1e-400"),
    "0": ("False", "None", "-", "nan", "1e-9999", "0/0", "", "०", "⓪", "1/1e999"),
    "1000": ("1e3e0", "1_000", "1 000 0", "10^2", "1,00,0,0", "１０００", "M", "0x3e8"),
}
"""Right numbers, and texts that Python's own conversions, or a careless reading, would take for them."""

NEARLY = (
    ("3.14159", "\\pi"),
    ("\\frac{22}{7}", "\\pi"),
    ("\\sqrt{2}+10^{-9}", "\\sqrt{2}"),
    ("\\text{the right answer}", "\\sqrt{2}"),
    ("0.0", "2^{-30}"),
    ("0.000000001", "2^{-30}"),
    ("10^{-12}", "0.0"),
    ("x=x", "x^2+1"),
    ("\\infty-\\infty", "y"),
    ("\\frac{0}{0}", "z"),
    ("\\text{nan}", "\\frac{\\pi}{2}"),
)
"""Formulas that are not equal, for the comparison of formulas: (given, right)."""
