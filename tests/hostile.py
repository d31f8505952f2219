r"""Completions made to hang, crash or fool a verifier, and a generator of more. Plain data: nothing here is run."""

import random


def boxed(formula: str) -> str:
    return rf"The answer is \boxed{{{formula}}}."


def nested(opening: str, closing: str, depth: int, core: str = "1") -> str:
    return opening * depth + core + closing * depth


SLOW_FORMULAS = [  # each is more than a second of sympy, or of its parser, or a gigabyte
    "9^{9^{9^{9}}}",
    "9^{9^{9^{9^{9}}}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "10^{10^{10}}",
    "(1+i)^{10^{9}}",
    "7^{10^{8}} - 7^{10^{8}} + 1",
    "((9!)!)!",
    "(10^9)!",
    "1000000!",
    r"\binom{10^9}{5\cdot10^8}",
    r"\binom{10^{7}}{10^{6}}",
    r"\sum_{k=1}^{10^9} \frac{1}{k^2+1}",
    r"\prod_{k=1}^{10^8} (k+\frac{1}{k})",
    r"\int_0^1 \frac{\sin(x^7)\cos(e^x)}{\sqrt{1+x^5}} dx",
    r"(a+b+c+d+e+f)^{60}",
    r"\prod_{k=1}^{200} (x+k)",
    r"\sqrt{2}^{\sqrt{2}^{\sqrt{2}^{\sqrt{2}^{\sqrt{2}}}}}",
    r"\frac{d^{50}}{dx^{50}} \tan(x)",
    r"\lim_{x \to 0} \frac{\sin(\tan(x)) - \tan(\sin(x))}{x^7}",
    nested(r"\frac{1}{1+", "}", 1000),
    nested(r"\sqrt{", "}", 2000),
    nested("(", ")", 2000),
    nested("{", "}", 2000),
    nested("x^{", "}", 500, "2"),
    nested(r"\left(", r"\right)", 600),
    "+".join(f"x_{{{i}}}" for i in range(600)),
    ",".join(map(str, range(1000))),
    r"\{" + ",".join(map(str, range(1000))) + r"\}",
    "(" + ",".join(map(str, range(1000))) + ")",
    "1+" * 1500 + "1",
    "1*" * 1500 + "1",
    "x*" * 1500 + "x",
    "9" * 4000,
    "9" * 1000 + "^" + "{" + "9" * 1000 + "}",
    "0." + "0" * 3000 + "1",
    r"\begin{pmatrix}" + r"\\".join("&".join("1" for _ in range(30)) for _ in range(30)) + r"\end{pmatrix}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{10^9}",
    r"\int \int \int \int x^x dx dx dx dx",
    r"\log_{2}(3^{10^{10}})",
    r"\gcd(10^{1000}, 10^{999}+1)",
    r"x^{10^6}+x^{10^5} = (x+1)^{10^6}",
    r"\sin(10^{10^{8}})",
    r"e^{e^{e^{e^{e}}}}",
    r"\phi(10^{200}+1)",
    r"\overline{" + "9" * 3000 + "}",
    "12345_" * 800,
    "2^" * 500 + "2",
    "!" * 2000,
    "5" + "!" * 50,
    "|" * 2000 + "x" + "|" * 2000,
    r"\cdots" * 700,
    r"\pm 1" * 400,
]

INJECTIONS = [
    "__import__('os').system('touch PWNED')",
    "eval('1+1')",
    "exec('import os')",
    "(lambda: 5)()",
    "().__class__.__bases__[0].__subclasses__()",
    r"\text{__import__('os').system('touch PWNED')}",
    r"\operatorname{__import__}('os').system('touch PWNED')",
    "x_{__import__('os').getcwd()}",
    "open('PWNED','w')",
    "5 if __import__('os').system('touch PWNED') else 6",
    "[i for i in range(10**12)]",
    "'5'.__len__()",
    "5 # the rest is a comment",
    "5'); import os; os.system('touch PWNED'); ('",
    "{0.__class__}",
    "%s%s%s%n",
    "${7*7}",
    "{{7*7}}",
    r"\input{/etc/passwd}",
    r"\write18{touch PWNED}",
    r"\def\x{\x\x}\x",
    "$(touch PWNED)",
    "`touch PWNED`",
]

HEDGES = [  # none may pass for 5
    boxed("4,5,6"),
    boxed(r"5 \text{ or } 6"),
    boxed("x=4=5"),
    boxed(r"4\boxed{5}"),
    boxed("5") + boxed("6"),
    boxed(r"\{4,5,6\}"),
    boxed("[4,6]"),
    boxed(r"5 \neq 5"),
    boxed("5, 5, 6"),
    boxed(r"4 < x < 6"),
    boxed(r"\pm 5"),
    boxed(r"5 \lor 6"),
    "The answer is 5 or 6.",
    r"$5$ is in the question, so $6$",
]

TEXTS = [
    "",
    " ",
    "\0",
    "\0" * 10_000,
    "\ud800",
    boxed("\ud800\udfff"),
    boxed("5\0"),
    boxed(""),
    boxed(" "),
    r"\boxed",
    r"\boxed{",
    r"\boxed{5",
    r"\boxed{" * 50_000,
    "}" * 100_000,
    r"\boxed{}" * 20_000,
    "a" * 1_000_000,
    " " * 1_000_000,
    "$" * 1_000_000,
    "\n" * 1_000_000,
    "1" * 1_000_000,
    "1 " * 500_000,
    "1," * 500_000,
    "1.1." * 250_000,
    "-" * 1_000_000,
    "\\" * 1_000_000,
    r"\[" * 5_000,
    r"\(" * 500_000,
    "*" * 1_000_000,
    "**" + "a*" * 300_000,
    "```" * 300_000,
    "```python\n" * 100_000,
    "<<" * 300_000,
    "[" * 300_000,
    '"' * 300_000,
    "the answer is " * 70_000,
    "</think>" * 100_000,
    "<think>" * 100_000,
    "<think> 5",
    "Z" + "\u0301" * 100_000,
    "\u202e5\u202c",
    "５",
    "٥",
    "🧮" * 200_000,
    "\ufdfa" * 50_000,
    "İ" * 100_000,
    "ß" * 300_000,
    "{" * 100_000 + "}" * 100_000,
    '{"a":' * 50_000,
    "P.S." * 100_000,
    "* a\n" * 200_000,
    "Section 1\n" * 100_000,
    "\r\n" * 300_000,
    "\u2028" * 100_000,
]


def completions() -> list[str]:
    return [boxed(text) for text in SLOW_FORMULAS + INJECTIONS] + HEDGES + TEXTS


PIECES = (
    r"\boxed{ } { ( ) [ ] ^ _ ^{ \frac{ \sqrt{ \binom{ \sum_{k=1}^{ \int \left( \right) \text{ \{ \} \pm \infty \pi $ $$ \( \)"
    " + - * / = < > , . ! % & | 0 1 2 5 9 10 99 3.14 1,000 -7 1e9 x y i e n \n \\\\ \\ \" ' ` ``` ```python\n # < > </think> <think>"
    " the answer is: Answer: def f(x): return print(1) import os while True: * ** << >> [a] P.S. \ud800 \0 \u202e ５ é 日本 🧮 ß"
).split(" ")


def fuzzed(count: int, seed: int) -> list[str]:
    """Random pieces in random order, some of them in a box or in a code block."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        text = rng.choice(("", " ")).join(rng.choices(PIECES, k=rng.choice((1, 3, 10, 30, 100))))
        texts.append(rng.choice((text, text, boxed(text), f"```python\n{text}\n```", text * 20)))
    return texts
