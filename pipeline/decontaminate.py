"""Training rows that hold prompts of a benchmark: found, shown, and taken out.

    python -m pipeline.decontaminate --test gsm8k=gsm8k/test.jsonl math=math500.jsonl:problem \\
        --train sft.jsonl pairs.jsonl:5000 --out clean_data

The rule is Tülu 3's (arXiv 2411.15124, section 3.2), with the words of its code (open-instruct, decontamination/): in
lower case, cut at white space, punctuation and backslashes. A word of a benchmark's prompt is *matched* by a training
row if it is one of 8 words in a row (an n-gram) that a user's turn of it has, too. A row *hits* a prompt if it matches
more than half of its words. A source is *contaminated* if its rows hit more than 2 % of a benchmark's prompts.

OLMo 3 refines it (arXiv 2512.13961, section 4.2.1), and so does --rule olmo3: n-grams do not count if more than half of
them are words of one character, or belong to the benchmark's form ("write a function to"). Prompts that are too short,
or have too few n-grams that count, are compared whole: a row that holds all of one hits it. --rule tulu3 does neither.

--out gets report.md (look at its matches before you delete anything), matches.tsv, and for each source clean/ (without
the rows that hit) and random/ (without as many, drawn at random: train on both to see what removing costs).
"""

import json
import re
import shutil
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import common
from pipeline.look import evenly
from pipeline.shapes import texts

SEPARATORS = re.compile(r"[\s,.?!:;()\"\\-]+")
FORM, FEWEST = 0.05, 5  # a form is what more than this share of a benchmark's prompts have in common, and so many
KEY = 3  # words by which prompts are looked up that are compared whole


@dataclass
class Args:
    test: list[str]  # NAME=SOURCE[:COLUMN] ..., the benchmarks; by default the column of the prompt; A+B joins two
    train: list[str]  # SOURCE[:AMOUNT] ..., as for the scripts; no row is taken twice
    out: str  # folder to write; it is there when all is done
    ngram: int = 8  # words of an n-gram
    threshold: float = 0.5  # share of a prompt's words above which a row hits it
    contaminated: float = 0.02  # share of a benchmark's prompts hit above which a source is contaminated
    text: Literal["prompt", "answer", "both"] = "prompt"  # turns of training rows: the user's, the assistant's
    rule: Literal["olmo3", "tulu3"] = "olmo3"  # whether some n-grams do not count, and short prompts do: see above
    ignore: str | None = None  # file of phrases, one a line, in place of the forms that are found by counting
    max_skip_frac: float = 0.01  # share of a source's rows that may have no text to search
    seed: int = 1  # decides which rows an AMOUNT takes, and which are drawn at random


Prompt = namedtuple("Prompt", "test row text words")
Match = namedtuple("Match", "prompt share run row text")  # run: the longest run of words that both have
Source = namedtuple("Source", "name rows hit skipped matches")  # a count, a set, {row: why}, {benchmark: matches}


def main(args):
    """Writes --out and prints its report. Raises RunError."""
    common.check_ranges(args, common.RANGES | {"ngram": (4, 100), "threshold": (0, 0.999), "contaminated": (0, 1)})
    if args.ignore is not None and args.rule == "tulu3":
        raise common.RunError("--ignore is for --rule olmo3: tulu3 ignores nothing")
    out = Path(args.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise common.RunError(f"--out {out} is there already: delete it, or choose another")
    tests = dict(read_test(spec) for spec in args.test)
    if len(tests) < len(args.test):
        raise common.RunError("--test: two benchmarks have one name")
    index = Index(tests, args)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    for kind in ("clean", "random"):
        (unfinished / kind).mkdir(parents=True)
    try:
        sources = [search(number, index, unfinished, args) for number in range(len(args.train))]
        report = "\n".join(report_lines(index, sources, args)) + "\n"
        (unfinished / "report.md").write_text(report, encoding="utf-8")
        (unfinished / "matches.tsv").write_text("".join(match_lines(index, sources)), encoding="utf-8")
        common.sync_to_disk(unfinished)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(report)


class Index:
    """Where the n-grams of all prompts stand. tests: {benchmark: its prompts}."""

    def __init__(self, tests, args):
        self.tests, self.ngram, self.threshold = tests, args.ngram, args.threshold
        self.prompts = [prompt for prompts in tests.values() for prompt in prompts]
        self.forms = {name: form_of(prompts, args) for name, prompts in tests.items()}
        self.grams = {}  # n words: [(number of a prompt, position in it), ...], of n-grams that count
        self.whole = {}  # KEY words: [numbers of prompts that begin so and are compared whole]
        self.counts = Counter()  # (benchmark, "compared whole" or "too short to be found"): prompts
        for number, prompt in enumerate(self.prompts):
            covered = set()
            for position, gram in enumerate(windows(prompt.words, self.ngram)):
                if args.rule == "tulu3" or matters(gram, self.forms[prompt.test]):
                    self.grams.setdefault(gram, []).append((number, position))
                    covered.update(range(position, position + self.ngram))
            if len(covered) <= self.threshold * len(prompt.words):  # n-grams would not even find its copy
                is_whole = args.rule == "olmo3" and prompt.words
                self.counts[prompt.test, "compared whole" if is_whole else "too short to be found"] += 1
                if is_whole:  # with under KEY words this is all of them, and a row's turn has to be just that
                    self.whole.setdefault(tuple(prompt.words[:KEY]), []).append(number)

    def search(self, turns):
        """Yields (prompt, share, run) of the prompts that a row with these turns hits."""
        covered = defaultdict(set)  # number of a prompt → positions of its matched words
        turns = [split(turn) for turn in turns]
        for words in turns:
            for gram in windows(words, self.ngram):
                for number, position in self.grams.get(gram, ()):
                    covered[number].update(range(position, position + self.ngram))
            for begin, key in enumerate([*windows(words, KEY)] if len(words) >= KEY else [tuple(words)]):
                for number in self.whole.get(key, ()):
                    whole = self.prompts[number].words
                    covered[number].update(range(len(whole)) if words[begin : begin + len(whole)] == whole else ())
        for number in sorted(covered):
            prompt = self.prompts[number]
            share = len(covered[number]) / len(prompt.words)
            if share > self.threshold:
                run = SequenceMatcher(None, prompt.words, sum(turns, []), autojunk=False).find_longest_match()
                yield prompt, share, prompt.words[run.a : run.a + run.size]


def matters(gram, form):
    """Whether at least half of an n-gram's words have several characters, and at least half are not of the form."""
    in_form = set()  # positions
    for size in {len(phrase) for phrase in form}:
        for position, words in enumerate(windows(gram, size)):
            in_form.update(range(position, position + size) if words in form else ())
    return max(len(in_form), sum(len(word) == 1 for word in gram)) <= len(gram) / 2


def form_of(prompts, args):
    """{phrase: prompts with it} of a benchmark: frequent phrases of half an n-gram, or --ignore's. Raises RunError."""
    if args.rule == "tulu3":
        return {}
    if args.ignore is None:
        each = (dict.fromkeys(windows(prompt.words, args.ngram // 2)) for prompt in prompts)  # each once
        found = Counter(phrase for phrases in each for phrase in phrases)
        return {phrase: n for phrase, n in found.most_common() if n >= FEWEST and n > FORM * len(prompts)}
    try:
        lines = Path(args.ignore).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise common.RunError(f"--ignore {args.ignore} cannot be read: {common.first_line(error)}") from None
    return {tuple(split(line)): 0 for line in lines if split(line)}


def split(text):
    """Words of a text, without what separates them."""
    return [word for word in SEPARATORS.split(text.lower()) if word]


def windows(words, size):
    """All tuples of so many words in a row."""
    return zip(*(words[i:] for i in range(size)), strict=False)


def read_test(spec):
    """(NAME, [Prompt, ...]) of NAME=SOURCE[:COLUMN]. Raises RunError."""
    match = re.fullmatch(r"([\w-]+)=(.+?)(?::([A-Za-z_][\w+]*))?", spec, re.DOTALL)
    if match is None:
        raise common.RunError(f"--test {spec}: expected NAME=SOURCE[:COLUMN]")
    name, source, column = match.groups()
    prompts = []
    for number, row in texts.rows([source], 0, seed=1):
        try:
            text = texts.column(row, column) if column else "\n".join(texts.turns(row))
        except ValueError as error:
            raise common.DataError(source, number, f"{error}; --test {name}={source}:COLUMN names a column") from None
        prompts.append(Prompt(name, number, text, split(text)))
    return name, prompts


def search(number, index, folder, args):
    """The Source of a number; writes its rows, into clean/ and random/. Raises DataError if too many have no text."""
    spec, rows, matches, skipped = args.train[number], 0, [], {}
    name = re.sub(r"(\.jsonl?|\.parquet)?(\.[a-z]+)?(:[\d.]+)?$", "", Path(spec).name)
    while (folder / "clean" / f"{name}.jsonl").exists():  # of another source that ends alike
        name += "_2"
    with open(folder / "clean" / f"{name}.jsonl", "w") as file:
        for row_number, row in texts.rows(args.train, number, args.seed):
            try:
                line, turns = json.dumps(row), texts.turns(row, args.text)
            except (TypeError, ValueError) as error:  # TypeError: dates and bytes, of .parquet
                skipped[row_number] = str(error)
                continue
            found = [Match(*hit, row_number, " ".join(turns)[:1000]) for hit in index.search(turns)]
            file.write("" if found else line + "\n")
            matches += found
            rows += 1
    if len(skipped) > args.max_skip_frac * (rows + len(skipped)):
        why = f"{len(skipped)} of {rows + len(skipped)} rows cannot be searched, more than --max_skip_frac allows"
        raise common.DataError(spec, min(skipped), f"{skipped[min(skipped)]}; {why}")
    hit = {match.row for match in matches}
    drawn = set(np.random.default_rng([args.seed, number]).choice(rows, len(hit), replace=False).tolist())
    searched = (row for at, row in texts.rows(args.train, number, args.seed) if at not in skipped)
    with open(folder / "random" / f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for place, row in enumerate(searched) if place not in drawn)
    matches.sort(key=lambda match: (-match.share, match.prompt.row, match.row))
    by_test = {name: [match for match in matches if match.prompt.test == name] for name in index.tests}
    return Source(spec, rows, hit, skipped, by_test)


def match_lines(index, sources):
    """Lines of matches.tsv."""
    yield "test\ttest_row\ttrain\ttrain_row\tshare\tlongest_run\n"
    for source in sources:
        for name in index.tests:
            for prompt, share, run, row, _ in source.matches[name]:
                yield f"{name}\t{prompt.row}\t{source.name}\t{row}\t{share:.3f}\t{len(run)}\n"


def report_lines(index, sources, args):
    """Lines of report.md: verdicts, what does not count, and matches to look at."""
    yield f"Rule {args.rule}: {args.ngram}-grams, a share above {args.threshold:g}, text: {args.text}.\n"
    yield f"| benchmark | prompts | source | rows | prompts hit | share | rows hit | verdict |\n{'|---' * 8}|"
    for name, prompts in index.tests.items():
        for source in sources:
            hit = len({match.prompt.row for match in source.matches[name]})
            rows = len({match.row for match in source.matches[name]})
            share = hit / len(prompts)
            verdict = "contaminated" if share > args.contaminated else "below the limit" if hit else "clean"
            cells = (name, len(prompts), source.name, source.rows, hit, f"{share:.1%}", rows, verdict)
            yield f"| {' | '.join(map(str, cells))} |"
    for name, form in index.forms.items():
        yield f"\n## {name}\n"
        yield from (f"- {n} prompts are {what}" for (test, what), n in index.counts.items() if test == name)
        yield from (f"- form, in {n} prompts: {' '.join(phrase)}" for phrase, n in form.items())
    for source in sources:
        yield f"\n## {source.name}\n\n{source.rows} rows searched, {len(source.hit)} taken out.\n"
        yield from (f"- {n} left out: {why}" for why, n in Counter(source.skipped.values()).most_common())
        for name in index.tests:
            for i in evenly(np.arange(len(source.matches[name])), 5):
                prompt, share, run, row, text = source.matches[name][i]
                yield f"- {name} row {prompt.row}, row {row}: share {share:.2f}, {len(run)} words: {' '.join(run)}"
                yield f"  - {name}: {' '.join(prompt.text.split())[:300]}\n  - row: {' '.join(text.split())[:300]}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True, prog="python -m pipeline.decontaminate"))
    except common.RunError as error:
        sys.exit(f"error: {error}")
