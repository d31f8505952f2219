"""Rows of pipeline.generate: what they have to have; and those of one prompt, by one model or several, together."""

import json
import math
import random
from collections import Counter, namedtuple

import common
from pipeline.shapes.encoder import SAMPLED

ANSWERED = "messages conversations prompt completion system chosen rejected margin".split()  # written anew

Group = namedtuple("Group", "key messages rows samples")  # rows: [(number in its file, JSON of `unsampled`), ...]
Sample = namedtuple("Sample", "reward text reason ended tokens model number")  # numbers tell equal ones apart


def is_number(value):
    return type(value) in (int, float) and not math.isnan(value)  # minus infinity is a log-probability


TEXT = "a text", lambda value: isinstance(value, str)
NUMBER = "a number", is_number
EACH = {  # of each completion: {field: what it has to be, and whether a value is that}
    "completions": TEXT,
    "rewards": ("a number or null", lambda value: value is None or is_number(value) and math.isfinite(value)),
    "reasons": TEXT,
    "answers": TEXT,
    "ended": ("true or false", lambda value: isinstance(value, bool)),
    "tokens": ("a whole number from 1 on", lambda value: type(value) is int and value > 0),
    "logprobs": ("a number or several", lambda value: all(map(is_number, value if type(value) is list else [value]))),
}
OF_ALL = {
    "model": ("a text or null", lambda value: value is None or isinstance(value, str)),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "seed": NUMBER,
}
FIELDS = EACH | OF_ALL


def check_fields(row, names):
    """Raises ValueError unless a row has these fields of FIELDS, and those of EACH with as many entries each."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found a {type(row).__name__}")
    sizes = {}
    for name in names:
        if name not in row:
            raise ValueError(f"no field {name!r}")
        if name in EACH and not isinstance(row[name], list):
            raise ValueError(f"{name}: expected a list, found {row[name]!r:.60}")
        what, is_so = FIELDS[name]
        for value in row[name] if name in EACH else [row[name]]:
            if not is_so(value):
                raise ValueError(f"{name}: expected {what}, found {value!r:.60}")
        if name in EACH:
            sizes[name] = len(row[name])
    if len(set(sizes.values())) > 1:
        raise ValueError(f"as many of each expected: {', '.join(f'{size} {name}' for name, size in sizes.items())}")


def asked(row):
    """The messages of a row's prompt. ValueError as common.read_conversation."""
    messages = common.read_conversation(row, needs_answer=False)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def prompt_key(row, messages, is_judged=True):
    """What is equal in rows of one prompt, as text; is_judged: and of one ground truth. messages: of `asked`."""
    names = ["tools", "chat_template_kwargs", *(["dataset", "ground_truth"] if is_judged else [])]
    return json.dumps([messages, *(row.get(name) for name in names)], sort_keys=True)


def read_groups(args):
    """The Groups of all files, whose order does not matter; prints their size. Raises DataError."""
    groups, models = {}, Counter()
    for source in args.data:
        for number, row in common.read_rows(source):
            try:
                messages = asked(row)
                check_fields(row, ("completions", "rewards", "reasons", "ended", "tokens", "model"))
            except ValueError as error:
                raise common.DataError(source, number, f"not usable as a row of generate: {error}") from None
            key = prompt_key(row, messages, is_judged=not is_delta(args))
            group = groups.setdefault(key, Group(key, messages, [], []))
            group.rows.append((number, json.dumps(unsampled(row))))
            rewards = [reward if reward is None else round(reward, 6) for reward in row["rewards"]]
            others = [row[name] for name in ("completions", "reasons", "ended", "tokens")]
            for sample in zip(rewards, *others, strict=True):
                group.samples.append(Sample(*sample, row["model"], len(group.samples)))
            models[row["model"] or "unknown"] += len(rewards)
    print(f"{len(groups)} prompts, completions: {', '.join(f'{models[name]} of {name}' for name in sorted(models))}")
    return sorted(groups.values(), key=lambda group: min(group.rows))


def unsampled(row):
    """The row without what generate adds, but `reference`."""
    return {name: row[name] for name in row if name not in (*SAMPLED, "scored_by")}


def is_delta(args):
    return getattr(args, "rule", None) == "delta"


def is_right(sample, args):
    return sample.reward >= round(args.min_reward, 6)


def pass_rate(group, args):
    """The share of judged completions that is right, cut off or not; None if none is judged."""
    judged = [is_right(sample, args) for sample in group.samples if sample.reward is not None]
    return sum(judged) / len(judged) if judged else None


def candidates(group, args, left_out):
    """What may be chosen, in random order; counts the rest."""
    found = []
    for sample in sorted(group.samples, key=str):  # whatever the order of the files
        if is_delta(args) and sample.model not in (args.strong, args.weak):
            left_out["completions", "neither of --strong nor of --weak"] += 1
        elif sample.reward is None and not is_delta(args):
            left_out["completions", f"not judged ({sample.reason})"] += 1
        elif not sample.ended or not sample.text.strip():
            left_out["completions", "empty" if sample.ended else "cut off before their end"] += 1
        else:
            found.append(sample)
    random.Random(f"{args.seed} {group.key}").shuffle(found)
    return found


def answered(group, answer):
    """The conversation with its answer, a text or a message."""
    return [*group.messages, answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]


def split(group):
    """(row, reference): what generate was given, without the last answer; and that answer, a text, a message or None.

    It is the first of the group's rows, whatever the order of the files. A `reference` of another type is no answer.
    """
    row = json.loads(min(group.rows)[1])
    reference = row.get("reference")
    is_answer = isinstance(reference, str) or isinstance(reference, dict) and reference.get("role") == "assistant"
    return row, row.pop("reference") if is_answer else None


def other_columns(group):
    """What stays of the row when it gets another answer."""
    row, _ = split(group)
    return {name: value for name, value in row.items() if name not in ANSWERED}


def gap(a, b):
    return round(a.reward - b.reward, 6)


def match(chosen, rejected, may):
    """Pairs that share nothing: each of `chosen`, in its order, with the first of `rejected` left that it may have."""
    pairs, used = [], set()
    for a in chosen:
        b = next((b for b in rejected if a != b and not {a, b} & used and may(a, b)), None)
        if b is not None:
            pairs.append((a, b))
            used |= {a, b}
    return pairs


def print_histogram(before, after):
    """How many prompts have which pass rate, by eighths, and how many of them are kept. Lists of rates, or None."""
    for eighth in range(9) if before else ():
        count, kept = (sum(rate is not None and int(8 * rate) == eighth for rate in rates) for rates in (before, after))
        title = "1" if eighth == 8 else f"from {eighth / 8:g}"
        print(f"  pass rate {title:<10} {count:>8} prompts {kept:>8} kept {'#' * (40 * kept // len(before))}")
