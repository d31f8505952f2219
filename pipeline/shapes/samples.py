"""Rows of pipeline.generate, gathered by prompt: all that was sampled for it, by one model or several."""

import json
import random
from collections import Counter, namedtuple

import common

EACH = "completions reasons ended tokens".split()  # columns that are read, beside `rewards`
ADDED = [*EACH, *"rewards answers token_ids logprobs model temperature top_p seed".split()]  # `reference`: an answer

Group = namedtuple("Group", "key messages rows samples")  # rows: [(number in its file, JSON without ADDED), ...]
Sample = namedtuple("Sample", "reward text reason ended tokens model number")  # numbers tell equal ones apart


def read_groups(args):
    """The Groups of all files, whose order does not matter; prints their size. Raises DataError."""
    groups, models = {}, Counter()
    for source in args.data:
        for number, row in common.read_rows(source):
            try:
                messages = common.read_conversation(row, needs_answer=False)
                rewards = [reward if reward is None else round(reward, 6) for reward in row["rewards"]]
                others = [row[name] for name in EACH]
                if not all(isinstance(text, str) for text in row["completions"]):
                    raise TypeError("completions has what is no text")
                samples = list(zip(rewards, *others, [row["model"]] * len(rewards), strict=True))
            except (KeyError, TypeError, ValueError) as error:
                why = f"no field {error}" if isinstance(error, KeyError) else error
                raise common.DataError(source, number, f"not a file of pipeline.generate: {why}") from None
            messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            judges = [] if is_delta(args) else [row.get("dataset"), row.get("ground_truth")]
            key = json.dumps([messages, row.get("tools"), row.get("chat_template_kwargs"), *judges], sort_keys=True)
            group = groups.setdefault(key, Group(key, messages, [], []))
            group.rows.append((number, json.dumps({name: row[name] for name in row if name not in ADDED})))
            for sample in samples:
                group.samples.append(Sample(*sample, len(group.samples)))
            models[row["model"]] += len(samples)
    print(f"{len(groups)} prompts, completions: {', '.join(f'{models[name]} of {name}' for name in sorted(models))}")
    return sorted(groups.values(), key=lambda group: min(group.rows))


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


def answered(group, sample):
    return [*group.messages, {"role": "assistant", "content": sample.text}]


def columns(group, without=()):
    """The row as it came to generate, with `reference`: the first of its rows, whatever the order of the files."""
    return {name: value for name, value in json.loads(min(group.rows)[1]).items() if name not in without}


def gap(a, b):
    return round(a.reward - b.reward, 6)


def print_histogram(before, after):
    """How many prompts have which pass rate, by eighths, and how many of them are kept. Lists of rates, or None."""
    for eighth in range(9) if before else ():
        count, kept = (sum(rate is not None and int(8 * rate) == eighth for rate in rates) for rates in (before, after))
        title = "1" if eighth == 8 else f"from {eighth / 8:g}"
        print(f"  pass rate {title:<10} {count:>8} prompts {kept:>8} kept {'#' * (40 * kept // len(before))}")
