r"""How good is a model on benchmarks, how sure is that, and is one model better than another?

    python -m pipeline.evaluate --model runs/sft/model --data gsm8k=gsm8k/test.jsonl math=math500.jsonl --out sft_eval
    torchrun --nproc_per_node 8 -m pipeline.evaluate --preset olmo3 --model M --data aime24=aime24.jsonl --out aime_eval
    python -m pipeline.evaluate --compare sft_eval dpo_eval                          prompt by prompt
    python -m pipeline.evaluate --results gsm8k=seed_1.jsonl gsm8k=seed_2.jsonl      of samples that are there already

A row of --data is what grpo.py reads, or of a shape that pipeline.convert knows: the published files of GSM8K, MATH,
AIME, IFEval, HumanEval and MBPP serve as they are. Sampling and judging are those of pipeline.generate. A completion
passes with --pass_threshold of the highest reward; one that could not be judged is in no mean, and counted.

A second reading of the same completions stands in a column of its own: *strict* takes an answer of MATH from the last
\boxed{} alone; of GSM8K, without a box, also from the last line that begins with "####"; *loose* is IFEval's.

Errors are those of the mean over prompts; the formulas are in pipeline/estimates.py. --out gets results.json and, for
each NAME (and seed), NAME.jsonl with all completions, as generate writes them. Killed, the same command goes on.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

import common
from pipeline.generate import RANGES
from pipeline.generator import Generator, Sampling
from pipeline.ranks import on_rank0, run, say
from pipeline.scores import judge_again, read
from pipeline.shapes.benchmarks import Benchmark, read_shots
from pipeline.tables import (
    SUBSET,
    check_columns,
    compare,
    measure,
    over_models,
    table_of_comparison,
    table_of_results,
)

DEFAULTS = {"n": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 2048, "max_length": 4096, "k": [1],
            "num_shots": 8, "seeds": None}  # fmt: skip
PRESETS = {  # {how NAME begins: flags}. Tülu 3: table 24, and OLMES for HumanEval; OLMo 3: table 16, section A.8
    None: {},
    "tulu3": {"math": {"num_shots": 4}, "humaneval": {"n": 20, "temperature": 0.8, "top_p": 0.95, "k": [1, 10]}},
    "olmo3": {
        "": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 32768, "max_length": 34816, "seeds": [1, 2, 3]},
        "aime": {"n": 32},
        "humaneval": {"n": 10},
        "mbpp": {"n": 10},
    },
}


@dataclass(kw_only=True)
class Args(Sampling):
    model: str | None = None  # folder or Hub id
    data: list[str] = field(default_factory=list)  # NAME=SOURCE[:AMOUNT] ...
    results: list[str] = field(default_factory=list)  # instead: [NAME=]FILE of generate, or --out of evaluate
    compare: tuple[str, str] | None = None  # instead: two of these, A and B, for the differences A - B
    out: str | None = None  # new folder to write; --model needs it
    preset: Literal["tulu3", "olmo3"] | None = None  # the published settings, in place of the defaults named below
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n", "--group_size"])] = None
    """completions of each prompt: 1, or the preset's; behind torchrun write -n"""
    temperature: float | None = None  # of sampling: 0, which takes the likeliest token, or the preset's
    top_p: float | None = None  # draw among the likeliest tokens that have this probability: 1, or the preset's
    max_new_tokens: int | None = None  # longest completion: 2048, or the preset's
    max_length: int | None = None  # longest sequence: 4096 tokens, or the preset's
    k: list[int] | None = None  # of pass@k: 1, or the preset's
    seeds: list[int] | None = None  # repeats of the sampling, instead of one with --seed: none, or the preset's
    shots: list[str] = field(default_factory=list)  # NAME=FILE: rows whose question and answer stand before each prompt
    num_shots: int | None = None  # so many of them: 8, or the preset's
    pass_threshold: float = 1.0  # share of the highest reward with which a completion passes
    cluster: str | None = None  # column: prompts with the same value are not independent
    subset: str = SUBSET  # column: where rows have it, the mean over subsets is there, too (macro)
    max_skip_frac: float = 0.0  # refuse to start when a larger share of a benchmark's rows is unusable


def main(args):
    """Samples, reads, compares; prints a table. Raises RunError."""
    common.check_ranges(args, common.RANGES | RANGES | {"num_shots": (0, 1e6), "pass_threshold": (1e-6, 1)})
    if args.k is not None and min(args.k, default=0) < 1:
        raise common.RunError(f"--k {' '.join(map(str, args.k))}: give numbers from 1 on")
    if sum(map(bool, (args.model, args.results, args.compare))) != 1 or bool(args.model) != bool(args.data):
        raise common.RunError("give --model and --data, or --results, or --compare")
    sampled = [flag for flag in ("shots", *DEFAULTS) if getattr(args, flag) not in (None, []) and flag != "k"]
    if sampled and not args.model:
        raise common.RunError(f"--{sampled[0]} is for --model: it says how to sample")
    if args.num_shots is not None and not args.shots:
        raise common.RunError("--num_shots needs --shots")
    if args.out and Path(args.out).exists():
        raise common.RunError(f"--out {args.out} is there already: delete it, or choose another")
    if args.model and not args.out:
        raise common.RunError("--model needs --out")
    folder = Path(args.out).with_name(f".{Path(args.out).name}.unfinished") if args.out else None
    samples = sample(args, folder) if args.model else []
    on_rank0(lambda: report(args, folder, samples))


def report(args, folder, samples):
    """Computes what is asked for, prints it, and publishes it as --out, with a copy of the samples in the folder."""
    results = {"flags": asdict(args), "settings": {name: recorded(args, name) for name, *_ in samples}}
    if args.compare:
        results["differences"] = compare(*[read([side], args) for side in args.compare], args)
        lines = table_of_comparison(results["differences"])
    else:
        tables = read([f"{name}={path}" for name, _, path in samples] or args.results, args)
        check_columns({key: [(each.where, each.row) for each in tables[key].values()] for key in tables}, args)
        judge_again(tables, args)
        each = [measure(*key, table, settings(args, key[0])["k"], args) for key, table in tables.items()]
        results |= {"results": each, "over_models": over_models(each)}
        lines = table_of_results(each, results["over_models"])
    if args.out:
        whole = folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)  # of a call that was killed
        whole.mkdir(parents=True)
        for _, file, path in samples:
            shutil.copyfile(path, whole / file)  # a call that is killed here finds all samples again
        common.replace_text(whole / "results.json", json.dumps(results, indent=2) + "\n")
        common.sync_to_disk(whole)
        whole.rename(args.out)
        shutil.rmtree(folder)
    print("\n".join(lines))


# ---------------------------------------------------------------- sampling


def sample(args, folder):
    """Samples all benchmarks, with each seed, into hidden files: [(NAME, name of the file in --out, its path), ...]."""
    sources, shots = [dict(named(flag, spec) for spec in getattr(args, flag)) for flag in ("data", "shots")]
    if len(sources) < len(args.data) or not shots.keys() <= sources.keys():
        raise common.RunError("each NAME of --data may be there once, and a NAME of --shots has to be one of them")
    chosen = {name: settings(args, name) for name in sources}
    for name in sources:
        check_counts(name, **chosen[name])
        if args.preset == "tulu3" and name.lower().startswith(("gsm8k", "math")) and name not in shots:
            say(f"WARNING {name}: tulu3 has {chosen[name]['num_shots']} shots for it, and here are none: give --shots")
    generator = Generator(sampling(args, next(iter(chosen.values()))), args.model)
    rows = {}
    for name, source in sources.items():
        generator.args = sampling(args, chosen[name])
        turns = read_shots(shots[name], chosen[name]["num_shots"]) if name in shots else []
        rows[name] = generator.load([source], Benchmark(turns, bool(args.verifier or args.rewards)))
        if too_long := [line for line in rows[name].report if common.TOO_LONG in line]:
            raise common.RunError(f"{source}: {too_long[0].strip()}: raise --max_length, or lower --max_new_tokens")
    lines = {name: enumerate(rows[name].table["line"]) for name in rows}
    check_columns({name: [(rows[name].where(i), json.loads(line)) for i, line in lines[name]] for name in rows}, args)
    samples = []
    for name in sources:
        for seed in chosen[name]["seeds"]:
            file = f"{name}.jsonl" if len(chosen[name]["seeds"]) == 1 else f"{name}.seed_{seed}.jsonl"
            generator.args = sampling(args, chosen[name] | {"seed": seed})
            samples.append((name, file, generator.write_part(rows[name], folder / file)))
    generator.close()
    return samples


def settings(args, name):
    """{flag in DEFAULTS: value} for a data set: as given, else the preset's, else the default."""
    chosen = DEFAULTS | {"seeds": [args.seed]}
    for begins, values in PRESETS[args.preset].items():
        chosen |= values if name.lower().startswith(begins) else {}
    return chosen | {flag: getattr(args, flag) for flag in DEFAULTS if getattr(args, flag) is not None}


def recorded(args, name):
    """The settings as results.json has them: without --shots there are none."""
    has_shots = any(spec.startswith(f"{name}=") for spec in args.shots)
    return settings(args, name) | ({} if has_shots else {"num_shots": 0})


def check_counts(name, n, seeds, temperature, k, **_):
    """Raises RunError where more completions would all be the same, or pass@k needs more."""
    if len(set(seeds)) < len(seeds) or not 0 <= min(seeds, default=-1) <= max(seeds) <= common.RANGES["seed"][1]:
        raise common.RunError(f"--seeds {' '.join(map(str, seeds))}: give each once, and none below 0 or above 1e18")
    completions = n * len(seeds)
    if completions > 1 and temperature == 0:
        raise common.RunError(f"{name}: at temperature 0 the {completions} completions of a prompt are all the same")
    if max(k) > completions:
        raise common.RunError(f"{name}: --k {max(k)} needs as many completions; --n and --seeds make {completions}")


def sampling(args, chosen):
    """The Sampling of a benchmark."""
    return Sampling(**{flag.name: chosen.get(flag.name, getattr(args, flag.name)) for flag in fields(Sampling)})


def named(flag, spec):
    """(NAME, SOURCE) of NAME=SOURCE."""
    match = re.fullmatch(r"([\w.+-]+)=(.+)", spec, re.DOTALL)
    if match is None:
        raise common.RunError(f"--{flag} {spec}: expected NAME=FILE")
    return match.groups()


if __name__ == "__main__":
    run(main, Args, __doc__)
