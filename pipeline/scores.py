"""Files of samples, as generate writes them → prompts with all their completions, and which of these pass."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import common
from pipeline.ranks import judges
from pipeline.shapes.files import lines_of
from pipeline.shapes.samples import FIELDS, asked, check_fields, prompt_key
from rewards.environment import ROUNDING, RowJobs, highest_reward
from rewards.jobs import split_job
from rewards.mathematics import last_box
from rewards.verifiers import after_thinking

SETTINGS = ("temperature", "top_p")  # of the sampling, in each row
COLUMNS = "completions rewards reasons answers ended tokens logprobs".split()
NO_VERIFIER = {"none", "score", "too_long", "rejected"}  # reasons where nobody, or a reward model, has judged


def boxed(text):
    r"""The last \boxed{...} of a text, or ""."""
    box = last_box(after_thinking(text))
    return rf"\boxed{{{box}}}" if box else ""


def boxed_or_marked(text):
    r"""The last \boxed{...} of a text, or without one the last line that begins with "####", or ""."""
    lines = re.findall("^####.*", after_thinking(text), re.MULTILINE)
    return boxed(text) or (lines[-1] if lines else "")


SECOND_READING = {  # verifier: (name of the other reading, the verifier by which it is judged, what that one is shown)
    "gsm8k": ("strict", "gsm8k", boxed_or_marked),
    "math": ("strict", "math", boxed),  # whose verifier does not know "####"
    "ifeval": ("loose", "ifeval_loose", str),
}


@dataclass
class Completion:
    text: str
    reward: float | None  # None: not judged
    reason: str
    answer: str
    ended: bool
    tokens: int
    logprob: float  # sum over its tokens
    seed: int
    passes: bool | None = None  # None: not judged, or there is no highest reward
    passes_second: bool | None = None  # by the other reading; None: not judged, or there is none


@dataclass
class Prompt:
    where: str  # file and row
    firsts: dict  # {seed: where its first row is}
    row: dict  # the first with this prompt
    verifier: str | None  # if that is one
    ground_truth: object  # for it
    highest: float | None  # reward; None where no verifier gives it
    completions: list[Completion]

    @property
    def judged(self):
        """The completions that are."""
        return [completion for completion in self.completions if completion.reward is not None]

    def values(self, name, seed=None):
        """The attribute `name` of its completions, of one seed or of all; those that have it."""
        found = [getattr(each, name) for each in self.completions if seed in (None, each.seed)]
        return [value for value in found if value is not None]

    def add(self, other):
        """Takes the completions of another row with this prompt. Raises ValueError if they are here already."""
        first = self.firsts.setdefault(other.row["seed"], other.where)
        if first.rpartition(", row ")[0] != other.where.rpartition(", row ")[0]:
            raise ValueError(f"the seed, the model and the prompt are those of {first}")
        if any(self.row[name] != other.row[name] for name in SETTINGS):
            raise ValueError(f"the prompt is that of {self.where}, but not the {' and '.join(SETTINGS)}")
        self.completions += other.completions

    @property
    def second(self):
        """The name of the other reading, or None."""
        return SECOND_READING.get(self.verifier, [None])[0]


def read(specs, args):
    """{(data set, model): {key of a prompt: Prompt}} of files and folders; rows with equal prompts are put together.

    Prompts are equal if their messages, tools, verifiers and ground truths are.

    Args:
        specs: [NAME=]FILE or FOLDER. A file without a name, or in a folder, is called as it is, without .jsonl and the
            .seed_S that evaluate writes. args: has rewards, verifier, pass_threshold.

    Raises:
        DataError: a row is not one of generate or evaluate. RunError: nothing to read, or a file twice.
    """
    jobs = RowJobs(args.rewards, args.verifier)
    files = [file for spec in specs for file in files_of(spec)]
    for i, (name, path) in enumerate(files):
        if (name, os.path.realpath(path)) in [(other, os.path.realpath(file)) for other, file in files[:i]]:
            raise common.RunError(f"{path} is there twice for {name}: its completions would count twice")
    tables = {}
    for name, path in files:
        for number, row in lines_of(path):
            try:
                key, prompt = as_prompt(f"{path}, row {number}", row, jobs, args)
                known = tables.setdefault((name, row["model"] or "unknown"), {}).setdefault(key, prompt)
                if known is not prompt:
                    known.add(prompt)
            except (TypeError, ValueError, common.RunError) as error:
                reason = f"not usable as a row of generate: {common.first_line(error)}"
                raise common.DataError(path, number, reason) from None
    if not tables:
        raise common.RunError(f"no rows in {', '.join(map(str, specs))}: what evaluate or generate wrote is wanted")
    return tables


def files_of(spec):
    """[(NAME, path), ...] of one entry of `read`."""
    path = Path(spec)
    if not path.exists() and "=" in str(spec):
        name, _, file = str(spec).partition("=")
        return [(name, Path(file))]
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [(re.sub(r"(\.seed_\d+)?\.jsonl$", "", file.name), file) for file in files]


def as_prompt(where, row, jobs, args):
    """(key, Prompt) of a row. Raises ValueError, TypeError or RunError for one that is none."""
    check_fields(row, FIELDS)
    messages = asked(row)
    parts, highest = [], None
    if not NO_VERIFIER & set(row["reasons"]):
        names, *rest = jobs(row, messages)
        parts, weights = split_job(names, None, *rest[:2])
        highest = highest_reward(weights)
    verifier, ground_truth = (parts[0][0], parts[0][2]) if len(parts) == 1 else (None, None)
    completions = []
    for text, reward, reason, answer, ended, tokens, logprobs in zip(*(row[name] for name in COLUMNS), strict=True):
        logprob = sum(logprobs) if isinstance(logprobs, list) else logprobs
        passes = None
        if reward is not None and highest is not None:
            passes = reward >= args.pass_threshold * highest - ROUNDING
        completions.append(Completion(text, reward, reason, answer, ended, tokens, logprob, row["seed"], passes))
    prompt = Prompt(where, {row["seed"]: where}, row, verifier, ground_truth, highest, completions)
    return prompt_key(row, messages), prompt


def judge_again(tables, args):
    """Sets `passes_second` of the completions that have a second reading, and a first one that was judged."""
    jobs, judged = [], []
    for prompt in [prompt for table in tables.values() for prompt in table.values()]:
        if prompt.second:
            _, verifier, shown = SECOND_READING[prompt.verifier]
            for completion in prompt.judged:
                text = "" if completion.reason == "unparsed" else shown(completion.text)  # "": a thought without an end
                completion.passes_second = False
                if text:
                    jobs.append((verifier, text, prompt.ground_truth))
                    judged.append(completion)
    if not jobs:
        return
    verdicts = judges(args.verifier_workers, args.sandbox).score(jobs)
    for completion, verdict in zip(judged, verdicts, strict=True):
        completion.passes_second = verdict.reward >= args.pass_threshold - ROUNDING if verdict.is_judged else None
