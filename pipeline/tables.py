"""What evaluate says of the prompts of a data set: numbers, for results.json, and lines of tables."""

import json
from collections import Counter

import numpy as np

import common
from pipeline import estimates
from pipeline.scores import SETTINGS
from rewards.environment import flatten

SUBSET = "subset"  # column


def measure(name, model, table, ks, args):
    """What results.json has of a data set and a model: {key: a number, or what a function of estimates.py returns}.

    Args:
        table: {prompt: Prompt}. ks: of pass@k. args: has cluster and subset.

    Raises RunError if nothing was judged, or a prompt has fewer than k completions.
    """
    prompts = [prompt for prompt in table.values() if prompt.judged]
    completions = flatten(prompt.completions for prompt in table.values())
    reasons = Counter(completion.reason for completion in completions)
    if not prompts:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise common.RunError(f"{name}: none of {len(completions)} completions was judged ({counts})")
    tokens = sum(completion.tokens for completion in completions)
    return {
        "data": name,
        "model": model,
        **{key: prompts[0].row[key] for key in SETTINGS},
        "prompts": len(prompts),
        "prompts_not_judged": len(table) - len(prompts),
        "completions": len(completions),
        "not_judged": sum(completion.reward is None for completion in completions),
        **(passes(name, prompts, ks, args) if all(prompt.highest is not None for prompt in prompts) else {}),
        "reward": estimates.bounded(estimates.estimate(means(prompts, "reward"), clusters(prompts, args))),
        "ended": sum(completion.ended for completion in completions) / len(completions),
        **{reason: reasons[reason] / len(completions) for reason in ("unparsed", "timeout", "crash")},
        "distinct_answers": float(np.mean([len({c.answer for c in prompt.judged} - {""}) for prompt in prompts])),
        "tokens": tokens / len(completions),
        "logprob_per_token": sum(completion.logprob for completion in completions) / tokens,
    }


def passes(name, prompts, ks, args):
    """pass@k, the second reading, the mean over subsets, and what changes from one sampling to another."""
    scores = means(prompts, "passes")
    result = {"pass@1": estimates.share(scores, clusters(prompts, args))}
    for k in sorted(set(ks) - {1}):
        fewest = min(len(prompt.completions) for prompt in prompts)
        if k > fewest:
            raise common.RunError(f"{name}: --k {k}, but there are prompts with {fewest} completions")
        enough = [prompt for prompt in prompts if len(prompt.judged) >= k]
        if enough:
            passed = [prompt.values("passes") for prompt in enough]
            at_k = [estimates.pass_at_k(len(each), sum(each), k) for each in passed]
            result[f"pass@{k}"] = estimates.share(at_k, clusters(enough, args)) | {"prompts": len(enough)}
    for reading in sorted({prompt.second for prompt in prompts} - {None}):
        read_so = [prompt for prompt in prompts if prompt.second == reading and prompt.values("passes_second")]
        if read_so:
            result[reading] = estimates.share(means(read_so, "passes_second"), clusters(read_so, args))
    if all(prompt.row.get(args.subset) is not None for prompt in prompts):
        subsets = [str(prompt.row[args.subset]) for prompt in prompts]
        result["macro"] = estimates.macro(scores, subsets, clusters(prompts, args))
    result |= estimates.variance_of_sampling([prompt.values("passes") for prompt in prompts])
    seeds = list(dict.fromkeys(completion.seed for prompt in prompts for completion in prompt.judged))
    if len(seeds) > 1:
        runs = [[np.mean(p.values("passes", seed)) for p in prompts if p.values("passes", seed)] for seed in seeds]
        result["runs"] = estimates.spread([float(np.mean(run)) for run in runs]) | {"seeds": seeds}
    return result


def means(prompts, name):
    """Of each prompt the mean of its completions' `name`, those that have it."""
    return [float(np.mean(prompt.values(name))) for prompt in prompts]


def check_columns(data, args):
    """Raises RunError where a row has no --cluster, or where --subset is in all rows of no data set.

    data: {data set: [(file and row, row), ...]}. A `subset` that nobody has asked for may be missing.
    """
    for where, row in flatten(data.values()) if args.cluster else ():
        if row.get(args.cluster) is None:
            raise common.RunError(f"{where}: no {args.cluster!r}, which --cluster asks for")
    has_subsets = [all(row.get(args.subset) is not None for _, row in rows) for rows in data.values()]
    if args.subset != SUBSET and not any(has_subsets):
        raise common.RunError(f"--subset {args.subset}: no data set has this column in all rows")


def clusters(prompts, args):
    """The labels of --cluster, one for each prompt; None without it."""
    return [json.dumps(prompt.row[args.cluster]) for prompt in prompts] if args.cluster else None


def over_models(results):
    """Of data sets with several models, as of several trained seeds: {data set: mean and range of their pass@1}."""
    found = {}
    for result in results:
        found.setdefault(result["data"], []).append(result.get("pass@1", result["reward"])["mean"])
    return {name: estimates.spread(each) | {"models": len(each)} for name, each in found.items() if len(each) > 1}


# ---------------------------------------------------------------- two models


def compare(a, b, args):
    """A list of what results.json has of each data set. a, b: of `read`. Raises RunError if they are of other data."""
    sides = []
    for tables in (a, b):
        sides.append({name: (model, table) for (name, model), table in tables.items()})
        if len(sides[-1]) < len(tables):
            raise common.RunError("--compare: a side has several models; --results gives their mean and range")
    if sides[0].keys() != sides[1].keys():
        names = [", ".join(sorted(side)) for side in sides]
        raise common.RunError(f"--compare: one side has {names[0]}, the other {names[1]}: NAMEs have to be the same")
    rows = {name: [(each.where, each.row) for each in table.values()] for name, (_, table) in sides[0].items()}
    check_columns(rows, args)
    results = []
    for name in sides[0]:
        models, tables = zip(*(side[name] for side in sides), strict=True)
        check_same(name, *tables)
        keys = [key for key in tables[0] if all(table[key].judged for table in tables)]
        if not keys:
            raise common.RunError(f"{name}: no prompt is judged on both sides")
        prompts = [[table[key] for key in keys] for table in tables]
        of = "passes" if all(prompt.highest is not None for prompt in flatten(prompts)) else "reward"
        scores = [means(each, of) for each in prompts]
        result = {"data": name, "of": of, "prompts": len(keys), "left_out": len(tables[0]) - len(keys)}
        for i, side in enumerate("ab"):
            result[side] = {"model": models[i], **{key: prompts[i][0].row[key] for key in SETTINGS}}
            result[side]["mean"] = float(np.mean(scores[i]))
        results.append(result | estimates.compare(*scores, clusters(prompts[0], args)))
    return results


def check_same(name, a, b):
    """Raises RunError unless two tables have the same prompts."""
    for here, there in ((a, b), (b, a)):
        for prompt in [here[key] for key in here if key not in there]:
            raise common.RunError(f"{name}: the other side does not have the prompt and ground truth of {prompt.where}")


# ---------------------------------------------------------------- lines


def table_of_results(results, over_models):
    """Yields lines of what `measure` has returned."""
    keys = {key for result in results for key in result}
    passes = sorted((key for key in keys if key.startswith("pass@")), key=lambda key: int(key.removeprefix("pass@")))
    estimates = [*passes, *(key for key in ("strict", "loose", "macro", "reward") if key in keys)]
    shares = ["ended", "unparsed", "timeout", "crash"]
    several = ["model"] if over_models else []
    header = ["data", *several, "prompts", "n", *estimates, *shares, "not judged", "answers", "tokens", "log p"]
    rows = []
    for result in results:
        n = result["completions"] / (result["prompts"] + result["prompts_not_judged"])
        cells = [result[key] for key in ("data", *several, "prompts")]
        cells += [f"{n:g}", *(with_interval(result.get(key)) for key in estimates)]
        cells += [*(f"{result[share]:.1%}" for share in shares), result["not_judged"]]
        measures = f"{result['distinct_answers']:.2f}", f"{result['tokens']:.0f}", f"{result['logprob_per_token']:.3f}"
        rows.append([*cells, *measures])
    yield from markdown(header, rows)
    for result in results:
        if "runs" in result:
            yield f"{result['data']}: {spread_line(result['runs'])} over {len(result['runs']['seeds'])} seeds"
    for name, each in over_models.items():
        yield f"{name}: {spread_line(each)} over {each['models']} models"


def table_of_comparison(results):
    """Yields lines of what `compare` has returned. A difference whose interval does not hold 0 gets a star."""
    header = ["data", "of", "prompts", "left out", "A", "B", "A - B", "p", "correlation", "detectable"]
    rows = []
    for result in results:
        star = " *" if estimates.is_difference(result) else ""
        cells = [result["data"], result["of"], result["prompts"], result["left_out"]]
        cells += [f"{result[side]['mean']:.3f}" for side in "ab"] + [with_interval(result) + star]
        rows.append([*cells, *("-" if (x := result[key]) is None else f"{x:.3g}" for key in header[-3:])])
    yield from markdown(header, rows)
    for side in "ab":
        yield f"{side.upper()}: {', '.join(dict.fromkeys(result[side]['model'] for result in results))}"
    for result in results:
        for key in SETTINGS:
            a, b = result["a"][key], result["b"][key]
            if a != b:
                yield f"WARNING {result['data']}: sampled with {key} {a:g} and {b:g}"


def with_interval(estimate):
    """mean [low, high] as text; - for None."""
    if estimate is None:
        return "-"
    known = estimate.get("low") is not None
    return f"{estimate['mean']:.3f}" + (f" [{estimate['low']:.3f}, {estimate['high']:.3f}]" if known else "")


def spread_line(each):
    """Of estimates.spread."""
    return f"mean {each['mean']:.3f}, from {each['low']:.3f} to {each['high']:.3f}, deviation {each['deviation']:.4f}"


def markdown(header, rows):
    """Yields the lines of a table."""
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(map(str, row))} |"
