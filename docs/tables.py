"""Writes the tables that are made of committed results: what a page has between <!-- table NAME --> and <!-- end -->.

    python docs/tables.py

Each function below is a table; its docstring says what its numbers are, and the page which command measured them.
tests/test_docs.py fails where a page and the results differ.
"""

import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"<!-- table (\w+) -->\n.*?<!-- end -->", re.DOTALL)


@cache
def results(name):
    """benchmarks/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head, rows):
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def demo():
    """Right of 1,000 held-out problems at each stage of `make demo`, with 95 % intervals."""

    def shown(share):
        return f"{share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"

    rows = [[re.sub(r"(\w+\.py)", r"`\1`", name), shown(share["sampled"]), shown(share["greedy"])]
            for name, share in results("demo")["accuracy"].items()]  # fmt: skip
    return markdown(["", "sampled at temperature 1", "greedy"], rows)


def cards():
    """The fewest 80 GB cards that each script takes by the count of benchmarks/memory.py, of 8, 16, 32 and 64."""
    entries = results("memory")["entries"]
    scripts = list(dict.fromkeys(entry["script"] for entry in entries))
    rows = []
    for model in dict.fromkeys(entry["model"] for entry in entries):
        fitting = {}
        for entry in entries:
            if entry["model"] == model and entry["fits"] and entry["script"] not in fitting:
                fitting[entry["script"]] = str(entry["gpus"])
        rows.append([model, *(fitting.get(script, "more than 64") for script in scripts)])
    return markdown(["model", *(f"`{script}.py`" for script in scripts)], rows)


def speed():
    """How many times as many tokens a second as TRL 1.16: as its flags suggest, and at the fastest of its settings."""
    cpu = "one CPU thread, tiny Llama"

    def rate(name, key):
        return results(name)["results"][key]["cpu_tokens_per_second"]

    def against(name, ours, usual, others):
        fastest = max(rate(name, other) for other in others)
        return [f"{rate(name, ours) / rate(name, usual):.2f}", f"{rate(name, ours) / fastest:.2f}"]

    sft = [key for key in results("sft_vs_trl")["results"] if key.startswith("trl")]
    pairs = list(results("preference_vs_trl")["results"])
    dpo, rm = ([key for key in pairs if key.startswith(f"trl_{kind}")] for kind in ("dpo", "reward"))
    ragged = results("grpo_vs_trl_cpu")["results"]["ragged"]
    grpo = ragged["postcard"]["cpu_tokens_per_second"] / ragged["trl_8"]["cpu_tokens_per_second"]
    rows = [["`sft.py`", cpu, *against("sft_vs_trl", "postcard", "trl_padded", sft)],
            ["`dpo.py`", cpu, *against("preference_vs_trl", "postcard_dpo", "trl_dpo_live", dpo)],
            ["`reward_model.py`", cpu, *against("preference_vs_trl", "postcard_reward", "trl_reward", rm)],
            ["`grpo.py`, ragged lengths", cpu, f"{grpo:.2f}", ""]]  # fmt: skip
    for name, file, part, theirs, what in (
        ("`sft.py --compile`", "gpu_h200_sft_sampler", "sft", "trl_liger", ", with its packing and Liger"),
        ("`dpo.py --compile`", "gpu_h200_dpo_head", "dpo", "trl", ""),
    ):
        found = {r["name"]: r.get("tokens_per_second") for r in results(file)["results"]
                 if r["part"] == part and r["size"] == "1.5b"}  # fmt: skip
        rows.append([name, f"one H200, 1.5B{what}", f"{found['ours_compiled'] / found[theirs]:.2f}", ""])
    return markdown(["", "on", "as its flags suggest", "its fastest setting"], rows)


def instruct_runs():
    """{method: its runs, one for each seed} of studies/instruct.py, in the order of its results."""
    text = (ROOT / "studies" / "results" / "instruct.json").read_text(encoding="utf-8")
    seeds = json.loads(text)["results"].values()
    names = dict.fromkeys(name for seed in seeds for name in seed)
    return {name: [seed[name] for seed in seeds if name in seed] for name in names}


def spread(numbers, digits):
    """The mean; of several seeds also the lowest and the highest."""
    mean = f"{sum(numbers) / len(numbers):.{digits}f}"
    return mean if len(set(numbers)) == 1 else f"{mean} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def instruct():
    """What each method has made of SmolLM2-135M-Instruct: means over seeds; differences to the start, seed by seed."""
    rows = []
    for name, runs in instruct_runs().items():
        last, less, plain = ([run[part] for run in runs] for part in ("steps", "less_start", "plain"))
        last = [steps[-1] for steps in last]
        differences = [f"{each['mean']:+.2f} [{each['low']:+.2f}, {each['high']:+.2f}]" for each in less if each["low"]]
        rows.append([
            f"`{name}`", str(len(runs)), spread([each["reward"] for each in last], 3),
            "; ".join(differences), *(spread([run[key] for run in runs], 2) for key in ("hard_to_hack", "bare")),
            *(spread([each[key] for each in last], digits) for key, digits in
              (("kl", 2), ("tokens", 0), ("ended", 2), ("ref_logprob_per_token", 2))),
            *(spread([each[key] for each in plain], digits) for key, digits in (("kl", 2), ("tokens", 0))),
        ])  # fmt: skip
    head = ["", "seeds", "followed", "less the start's", "of those hard to hack", "only the phrase", "KL", "tokens"]
    return markdown([*head, "ended", "log π_start a token", "plain questions: KL", "tokens"], rows)


def instruct_short():
    """The same: the primary metric, and what it has cost."""
    rows = []
    for name, runs in instruct_runs().items():
        last = [run["steps"][-1] for run in runs]
        columns = (("reward", 2), ("kl", 1), ("ended", 2))
        rows.append([f"`{name}`", *(spread([each[key] for each in last], digits) for key, digits in columns)])
    return markdown(["", "constraints followed", "KL to the start, nats an answer", "answers that end"], rows)


def instruct_answers():
    """Three held-out prompts as the first seed's models answer them; cut after 200 characters."""
    shown = ("start", "dpo", "grpo", "grpo_kl", "grpo_judge")
    runs = {name: found[0] for name, found in instruct_runs().items() if name in shown}

    def cell(text):
        text = " ⏎ ".join(text.split("\n")).replace("⏎  ⏎", "⏎")
        text = text if len(text) <= 200 else f"{text[:200].rstrip()} …"
        return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("*", "&#42;")

    questions = [cell(question) for question, _ in runs["start"]["answers"]]
    return markdown(["", *questions], [[f"`{name}`", *(cell(answer) for _, answer in run["answers"])]
                                       for name, run in runs.items()])  # fmt: skip


TABLES = {function.__name__: function for function in (demo, cards, speed, instruct, instruct_short, instruct_answers)}


def renewed(text):
    """The text of a page with its tables as the results have them. Raises KeyError for a table that there is not."""
    return TABLE.sub(lambda match: "\n".join([match[0].splitlines()[0], *TABLES[match[1]](), "<!-- end -->"]), text)


if __name__ == "__main__":
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if renewed(old) != old:
            page.write_text(renewed(old), encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables written anew")
