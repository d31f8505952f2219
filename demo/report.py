"""What a finished demo has shown, as one page, as Markdown and as JSON, with the figures.

Reads the runs in OUT and writes OUT/report.html (one file, which loads nothing), OUT/REPORT.md, OUT/results.json, the
figures OUT/*.png and OUT/ppo_tokens.html. demo/run.py ends with it, and draws a finished demo again; the text is in
report.html and report.md beside this file.
"""

import base64
import html
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import safetensors  # noqa: E402

import plot  # noqa: E402
import show_tokens  # noqa: E402
import task  # noqa: E402
from common import replace_text  # noqa: E402
from pipeline.estimates import wilson  # noqa: E402

# {folder of the model: how figures and tables call it}
STAGES = {
    "base": "random weights",
    "sft": "after sft.py",
    "dpo": "then dpo.py",
    "grpo": "or grpo.py",
    "ppo": "or ppo_rlvr.py",
}


def write(out, commands):
    """Writes everything, and returns what results.json holds. commands: {name: what one might do next}."""
    results = collect(out)
    draw(out, results)
    replace_text(Path(out, "results.json"), json.dumps(results, indent=1) + "\n")
    show_tokens.show(f"{out}/ppo", f"{out}/ppo_tokens.html", slip=task.slip)
    facts = results | {
        "out": out,
        "samples": show_tokens.as_script(show_tokens.read(f"{out}/ppo", slip=task.slip)),
        "commands": commands,
        "image": lambda name: "data:image/png;base64," + base64.b64encode(Path(out, name).read_bytes()).decode(),
    }
    for template, name in (("report.html", "report.html"), ("report.md", "REPORT.md")):
        text = show_tokens.TEMPLATES.get_template(template).render(facts)
        replace_text(Path(out, name), text if text.endswith("\n") else text + "\n")
    return results


# ---------------------------------------------------------------- numbers


def collect(out):
    """The numbers of results.json, from the files of a demo."""
    record = json.loads(Path(out, "demo.json").read_text())
    config = json.loads(Path(out, "sft", "config.json").read_text())
    return {
        "seed": record["seed"],
        "date": config["date"],
        "commit": config["commit"],
        "versions": {"python": platform.python_version(), **config["versions"]},
        "processor": processor(),
        "cores": os.cpu_count(),
        **record["total"],
        "seconds_of_stages": record["stages"],
        "parameters": count_parameters(f"{out}/base"),
        "problems": lines_in(f"{out}/held_out_prompts.jsonl"),
        "accuracy": {name: accuracy(out, folder) for folder, name in STAGES.items()},
        "reward_model": ranked(out),
        "costs": costs(out, record),
        "example": example(out),
    }


def accuracy(out, name):
    """{"sampled": {mean, low, high, ...}, "greedy": likewise} of a model, as pipeline.evaluate has found them."""
    found = {}
    for kind in ("sampled", "greedy"):
        [result] = json.loads(Path(out, "eval", f"{name}_{kind}", "results.json").read_text())["results"]
        found[kind] = result["pass@1"]
    return found


def ranked(out):
    """{mean, low, high, total}: the share of held-out pairs that the reward model ranks right."""
    share = plot.read(f"{out}/rm")[-1]["eval_accuracy"]
    total = lines_in(f"{out}/held_out_pairs.jsonl")
    low, high = wilson(share * total, total)
    return {"mean": share, "low": low, "high": high, "total": total}


def costs(out, record):
    """[{stage, told, samples, steps, seconds}, ...]: what each stage was told, and what it took.

    samples: completions that the model gave for it. seconds: of the steps, as metrics.jsonl has them; of the pairs, of
    the stage.
    """
    pairs = f"{lines_in(f'{out}/pairs.jsonl'):,} pairs: this answer is better than that one"
    told = {
        "sft": f"{lines_in(f'{out}/train.jsonl'):,} demonstrations, of which three in five have a slip",
        "rm": pairs,
        "dpo": pairs,
        "grpo": "right or wrong, for each answer that it gave",
        "ppo": "right or wrong, for each answer that it gave; and the reward model to begin the value model with",
    }
    rows = []
    for name, what in told.items():
        steps = [row for row in plot.read(f"{out}/{name}") if "seconds" in row]
        samples = max(plot.samples_seen(steps).values())
        script = json.loads(Path(out, name, "config.json").read_text())["script"]
        seconds = sum(row["seconds"] for row in steps)
        rows.append({"stage": script, "told": what, "samples": samples, "steps": len(steps), "seconds": seconds})
    samples = rows_of(f"{out}/samples.jsonl") + rows_of(f"{out}/held_out_samples.jsonl")
    made = {
        "stage": "generate, curate",
        "told": "right or wrong, for each answer: a right one and a wrong one are a pair",
        "samples": sum(len(row["completions"]) for row in samples),
        "steps": None,
        "seconds": record["stages"]["pairs"],
    }
    return [rows[0], made, *rows[1:]]


def example(out):
    """One problem at every stage: {problem, working, answers: [{stage, how, text, right, slip}, ...]}.

    Of the held-out problems that the fine-tuned model, sampled, gets wrong, it is the first that most stages after it
    get right. slip: the index of the first wrong character, or None.
    """
    names = ("base_sampled", "sft_sampled", "sft_greedy", "dpo_sampled", "grpo_sampled", "ppo_sampled")
    answers = {}
    for name in names:
        rows = rows_of(f"{out}/eval/{name}/additions.jsonl")
        answers[name] = {row["messages"][0]["content"]: row["completions"][0] for row in rows}
    problem = choose(answers["sft_sampled"], [answers[name] for name in names[3:]])
    shown = []
    for name in names:
        folder, how = name.split("_")
        text = answers[name][problem]
        right, slip = task.is_right(problem, text), task.slip(problem, text)
        shown.append({"stage": STAGES[folder], "how": how, "text": text, "right": right, "slip": slip})
    return {"problem": problem, "working": task.demonstrate(problem, None, slip=False), "answers": shown}


def choose(first, later):
    """The first problem that `first` gets wrong and most of `later` get right; each is {problem: completion}."""
    wrong = [problem for problem in first if not task.is_right(problem, first[problem])]
    return max(wrong or first, key=lambda problem: sum(task.is_right(problem, answers[problem]) for answers in later))


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def lines_in(path):
    return len(Path(path).read_text(encoding="utf-8").splitlines())


def count_parameters(model):
    """Of a model folder with one file of weights."""
    with safetensors.safe_open(f"{model}/model.safetensors", framework="np") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())


def processor():
    """The name of the processor; Linux and macOS each have a place of their own for it."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return asked.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- figures and text


def draw(out, results):
    """The figures: OUT/*.png. That of accuracy against KL is pipeline.kl's, OUT/kl/kl.png."""
    accuracy, pairs = results["accuracy"], results["reward_model"]["total"]
    ceiling = accuracy[STAGES["sft"]]["greedy"]["mean"]
    plot.plot_stages(accuracy, f"{out}/stages.png", results["problems"])
    lowest = task.lowest_loss(f"{out}/train.jsonl")
    plot.plot(f"{out}/sft", f"{out}/loss.png", "Supervised fine-tuning on sloppy additions", lowest)
    plot.plot_accuracy(f"{out}/rm", f"{out}/reward_model.png", pairs=pairs)
    plot.plot_logprobs([f"{out}/dpo"], f"{out}/dpo.png")
    plot.plot_reward([f"{out}/grpo"], f"{out}/grpo.png", ceiling=ceiling)
    plot.plot_reward([f"{out}/ppo"], f"{out}/ppo.png", ceiling=ceiling)
    plot.plot_reward([f"{out}/grpo", f"{out}/ppo"], f"{out}/rewards.png", ceiling=ceiling)


def marked(answer, before="<mark>", after="</mark>"):
    """An answer as HTML, in which the first wrong character is marked."""
    slip, text = answer["slip"], answer["text"]
    if slip is None:
        return html.escape(visible(text))
    wrong = visible(text[slip]) if slip < len(text) else "(ends here)"
    rest = html.escape(visible(text[slip + 1 :]))
    return html.escape(visible(text[:slip])) + before + html.escape(wrong) + after + rest


def visible(text):
    return text.replace("\n", "⏎").replace(" ", "␣")


show_tokens.TEMPLATES.filters |= {
    "marked": marked,
    "share": lambda share: f"{share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]",
}
