"""The statistics of evaluations: pure functions of numbers, without a model and without files.

    N prompts; prompt i has n_i judged completions, of which c_i pass, and the score s_i = c_i / n_i

Prompts are taken as drawn from all that could have been asked, alone or in clusters (questions on one text, say).
What is averaged are prompts, so completions of one prompt are never counted as independent. Source of the errors and of
the paired comparison: "Adding error bars to evals", arXiv 2411.00640; of pass@k: Codex, arXiv 2107.03374.

A number that is undefined for lack of prompts is None.
"""

import math

import numpy as np

Z = 1.959964  # of an interval of 95 %
POWER = 2.8  # Z and 0.84: a difference of so many standard errors is found in 80 % of experiments
ROUNDING = 1e-12  # standard errors below it are 0


def pass_at_k(n, c, k):
    """The probability that of k completions, drawn from n of which c pass, at least one passes: 1 - C(n-c, k)/C(n, k).

    Unbiased for that of k new completions. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} completions, {c} of which pass")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def standard_error(scores, clusters=None):
    """Of the mean of scores (N,): sqrt(C/(C-1)) sqrt(Σ_clusters (Σ_(i in it) (s_i - mean))²) / N, of C clusters.

    Args:
        clusters: N labels; without, each prompt is its own, which gives the usual σ/√N. None if there is only one.
    """
    scores = np.asarray(scores, dtype=float)
    _, of = np.unique(range(len(scores)) if clusters is None else clusters, return_inverse=True)
    sums = np.bincount(of, scores - scores.mean())
    if len(sums) < 2:
        return None
    return root(len(sums) / (len(sums) - 1) * (sums**2).sum() / len(scores) ** 2)


def root(variance):
    """The standard error; 0.0 for one that is nothing but rounding."""
    error = math.sqrt(variance)
    return error if error > ROUNDING else 0.0


def estimate(scores, clusters=None):
    """{mean, se, low, high} of scores (N,), the last two the interval of 95 %: ± 1.96 se."""
    return with_interval(float(np.mean(scores)), standard_error(scores, clusters))


def with_interval(mean, se):
    """{mean, se, low, high}."""
    low, high = (None, None) if se is None else (mean - Z * se, mean + Z * se)
    return {"mean": mean, "se": se, "low": low, "high": high}


def bounded(result, lowest=-math.inf, highest=math.inf):
    """The same with its interval cut at bounds; without one if se is 0: equal scores do not say how sure they are."""
    low, high = (max(lowest, result["low"]), min(highest, result["high"])) if result["se"] else (None, None)
    return result | {"low": low, "high": high}


def share(scores, clusters=None):
    """As `estimate`, of scores from 0 to 1. Where all are 0 or 1 and alone, the interval is Wilson's."""
    result = bounded(estimate(scores, clusters), 0.0, 1.0)
    if clusters is None and set(np.unique(scores)) <= {0.0, 1.0}:
        result["low"], result["high"] = wilson(float(np.sum(scores)), len(scores))
    return result


def wilson(right, total):
    """The interval of 95 % of a share, (low, high); by Wilson's formula, which also holds near 0 and 1."""
    p, scale = right / total, 1 + Z * Z / total
    centre = (p + Z * Z / (2 * total)) / scale
    half = Z / scale * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def macro(scores, subsets, clusters=None):
    """The mean over subsets of their means, each with the same weight: {mean, se, low, high, subsets: {name: ...}}.

    se = sqrt(Σ_clusters (Σ_(i in it) e_i)²) with e_i = sqrt(C/(C-1)) (s_i - mean) / (N S), where mean, C and N are of
    the subset of i, and S is the number of subsets. Where no cluster is in two subsets, these are the errors of their
    means, independent of each other. A subset of one cluster does not show how its scores vary; how far they are from
    the mean of the other subsets stands in for that: e_i = (s_i - mean of the others) / (N S), too much on average.

    Args:
        scores: (N,), from 0 to 1. subsets: N names. clusters: N labels, as in `standard_error`.
    """
    scores, subsets = np.asarray(scores, dtype=float), list(subsets)
    labels = np.arange(len(scores)) if clusters is None else np.asarray(clusters)
    inside = {name: np.array([subset == name for subset in subsets]) for name in dict.fromkeys(subsets)}
    parts = {name: share(scores[i], None if clusters is None else labels[i]) for name, i in inside.items()}
    mean = float(np.mean([part["mean"] for part in parts.values()]))
    errors = np.zeros(len(scores))
    for name, i in inside.items():
        parts[name]["prompts"] = int(i.sum())
        count, own = len(set(labels[i])), parts[name]["mean"]
        if count > 1:
            deviations = math.sqrt(count / (count - 1)) * (scores[i] - own)
        else:
            deviations = scores[i] - (len(parts) * mean - own) / max(1, len(parts) - 1)
        errors[i] = deviations / (i.sum() * len(parts))
    _, of = np.unique(labels, return_inverse=True)
    sums = np.bincount(of, errors)
    se = root((sums**2).sum()) if len(sums) > 1 else None
    return bounded(with_interval(mean, se), 0.0, 1.0) | {"subsets": parts}


def variance_of_sampling(passes):
    """How much another sampling of the same prompts would change the mean: {within_prompt_variance, deviation}.

    Args:
        passes: of each prompt (n_i,) booleans or rewards.

    Returns:
        The mean over prompts of the unbiased variance of their completions, and the standard deviation of the mean that
        follows, sqrt(Σ variance_i / n_i) / N. Prompts with one completion say nothing about it and are left out; {} if
        there are no others.
    """
    several = [np.asarray(each, dtype=float) for each in passes if len(each) > 1]
    if not several:
        return {}
    variances = np.array([each.var(ddof=1) for each in several])
    sizes = np.array([len(each) for each in several])
    deviation = math.sqrt((variances / sizes).sum()) / len(several)
    return {"within_prompt_variance": float(variances.mean()), "deviation_of_sampling": deviation}


def spread(means):
    """{mean, low, high, deviation} of several runs or models: the lowest, the highest, and the standard deviation."""
    deviation = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return {"mean": float(np.mean(means)), "low": min(means), "high": max(means), "deviation": deviation}


def compare(a, b, clusters=None):
    """Of two models on the same prompts, in the same order: is the mean of a - b something else than 0?

    Args:
        a, b: (N,) scores. clusters: N labels, as in `standard_error`.

    Returns:
        {mean, se, low, high} of the differences; p, two-sided, by the normal distribution; correlation of a and b;
        detectable, the difference that so many prompts show with a probability of 80 %: 2.8 se. Differences that are
        all the same show no error: p and detectable are None then, or 1 and 0 if there is no difference at all.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    result = bounded(estimate(a - b, clusters))
    mean, se = result["mean"], result["se"]
    result |= {"p": None, "correlation": None, "detectable": None}
    if se:
        result |= {"p": math.erfc(abs(mean) / se / math.sqrt(2)), "detectable": POWER * se}
    elif se == 0 and np.abs(a - b).max() < ROUNDING:
        result |= {"p": 1.0, "detectable": 0.0}
    if a.std() and b.std():
        result["correlation"] = float(np.corrcoef(a, b)[0, 1])
    return result


def is_difference(result):
    """Whether the interval of a comparison is there, and does not hold 0."""
    return result["low"] is not None and not result["low"] <= 0 <= result["high"]
