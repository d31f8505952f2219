"""A real instruct model of 135M parameters, improved on a laptop: what works, what it costs, and how it cheats.

    python -m pipeline.from_gguf --out models/smollm2            SmolLM2-135M-Instruct, once
    python studies/instruct.py --model models/smollm2 --out runs/instruct --seeds 1 2

Prompts ask for something and for one constraint that a program verifies (studies/constraints.py); 20 topics of 100 are
held out. From the start each method may have 768 completions of at most 80 tokens judged, as in equal_samples.py:

    sft_best, sft_random     8 completions of each of 96 prompts: one that follows the constraint, or any
    dpo                      pairs of one that does and one that does not, of the same completions
    grpo                     12 steps of 8 prompts in the band of difficulty (0 < pass rate <= 0.625), 8 of each
    grpo_kl                  the same with --kl_beta 0.05
    grpo_slow                at a third of the learning rate
    grpo_floor               the same prompts, which also ask for at least 30 words
    grpo_judge               plus the score of a reward model of fluency: of answers at temperature 0.7 against 1.5
    ppo                      12 steps of 64 prompts, one of each, in 4 minibatches; the value model is made of a reward
                             model of dpo's pairs

Primary metric, chosen before anything was trained: the share of 160 held-out prompts whose constraint is followed, one
completion each at temperature 0.7. Beside it what must not get worse: length and ends of answers, their likelihood
under the start, KL on 100 plain questions; with --ifeval also the 541 prompts of IFEval. A call goes on where an
earlier one was stopped.
"""

import argparse
import json
import shutil
from pathlib import Path

from arithmetic import IMAGES, demo, write

import plot
from pipeline.shapes.files import lines_of
from studies import constraints

# At temperature 1 many answers of this model are no sense.
SAMPLING = {"max_length": 320, "max_new_tokens": 80, "temperature": 0.7}
HELD_OUT = 160  # prompts; if paired differences have a deviation of 0.55, one of 0.12 is found in 80 % of experiments
PROMPTS = 96  # that SFT and DPO have samples of, 8 each
TRIED = 256  # of which the band of difficulty is found, 4 samples each
STEPS = 12
GRPO = {
    "grpo": {},
    "grpo_kl": {"kl_beta": 0.05},
    "grpo_slow": {"lr": 2e-5},
    "grpo_floor": {"data": "{out}/floor_band.jsonl"},
    "grpo_judge": {"reward_model": "{out}/judge/model", "reward_model_coef": 0.2},
}
PATHS = ("data", "reward_model")  # flags above that name files
HARD = tuple(constraints.KINDS)[7:]  # the kinds that a few words do not follow
ENDING = "startend:end_checker"  # the answer has to end with a phrase, of at most 40 characters
SHOWN = ("detectable_format:title", "punctuation:no_comma", ENDING)  # one answer of each
METHODS = ("sft_best", "sft_random", "dpo", "ppo", *GRPO)


def once(path, name, *words, **flags):
    """A command of pipeline/ whose --out is `path`, unless that is there."""
    if not Path(path).exists():
        demo.run_pipeline(name, *words, **flags, out=path)


def prepare(model, out, data, seed):
    """What the methods learn from: OUT/samples, best, random, pairs, band, floor_band, judge_pairs (.jsonl)."""
    shared = {"model": model, "seed": seed, **SAMPLING}
    once(f"{out}/samples.jsonl", "generate", data=f"{data}/constraints/train.jsonl:{PROMPTS}", n=8, **shared)
    curated = {"data": f"{out}/samples.jsonl", "seed": seed}
    once(f"{out}/best.jsonl", "curate", "sft", control=f"{out}/random.jsonl", **curated)
    once(f"{out}/pairs.jsonl", "curate", "pairs", rule="right_wrong", per_prompt=2, **curated)
    tried = {"data": f"{data}/constraints/train.jsonl:{TRIED}", "n": 4, "seed": seed + 100}
    once(f"{out}/tried.jsonl", "generate", **shared | tried)
    once(f"{out}/band.jsonl", "curate", "prompts", data=f"{out}/tried.jsonl")
    if not Path(out, "floor_band.jsonl").exists():
        floor = {question(row): row for row in rows_of(f"{data}/floor/train.jsonl")}
        rows = [floor[question(row)] for row in rows_of(f"{out}/band.jsonl")]
        Path(out, "floor_band.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for temperature in (0.7, 1.5):
        path = f"{out}/plain_{temperature}.jsonl"
        flags = shared | {"temperature": temperature, "data": f"{data}/constraints/train.jsonl:{PROMPTS}", "n": 1}
        once(path, "generate", **flags)
    if not Path(out, "judge_pairs.jsonl").exists():
        both = zip(rows_of(f"{out}/plain_0.7.jsonl"), rows_of(f"{out}/plain_1.5.jsonl"), strict=True)
        with open(f"{out}/judge_pairs.jsonl", "w") as file:
            for good, bad in both:
                answers = {"chosen": good["completions"][0], "rejected": bad["completions"][0]}
                file.write(json.dumps({"prompt": good["messages"], **answers}) + "\n")


def question(row):
    """What a row asks for, without its constraint: topic, kind, and how the question begins."""
    return row["topic"], row["subset"], row["messages"][0]["content"][:24]


def rows_of(path):
    """The rows of a file of JSON lines."""
    return [row for _, row in lines_of(path)]


def train(model, out, seed, only):
    """The runs of a seed; those that are finished are left."""
    shared = {"seed": seed, "save_every": 0, "max_length": SAMPLING["max_length"], "no_activation_checkpointing": True}
    from_start = shared | {"model": model, "batch_size": 8, "tokens_per_microbatch": 2048}
    rl = {**SAMPLING, "lr": 6e-5, "steps": STEPS, "epochs": 99, "save_every": STEPS // 2, "keep": 0, "slots": 64}
    for kind in ("best", "random"):
        if f"sft_{kind}" in only:
            flags = {"data": f"{out}/{kind}.jsonl", "out": f"{out}/sft_{kind}", "lr": 1e-4, "epochs": 4}
            demo.run_script("sft.py", **from_start | flags)
    if "dpo" in only:
        flags = {"data": f"{out}/pairs.jsonl", "out": f"{out}/dpo", "lr": 5e-5, "beta": 0.1, "epochs": 2}
        demo.run_script("dpo.py", **from_start | flags, nll_coef=0.2)
    models = {"rm": ("pairs", "ppo"), "judge": ("judge_pairs", "grpo_judge")}
    for name, (pairs, user) in models.items():
        if user in only:
            flags = {"data": f"{out}/{pairs}.jsonl", "out": f"{out}/{name}", "lr": 1e-5, "overlong": "drop"}
            demo.run_script("reward_model.py", **from_start | flags)
    for name, changed in GRPO.items():
        if name in only:
            changed = {flag: value.format(out=out) if flag in PATHS else value for flag, value in changed.items()}
            flags = {"data": f"{out}/band.jsonl", "out": f"{out}/{name}", "batch_size": 8, "group_size": 8}
            flags |= {"normalize_std": True, "active_sampling": 0}
            demo.run_script("grpo.py", **from_start | rl | flags | changed)
    if "ppo" in only:
        flags = {"data": f"{out}/band.jsonl", "out": f"{out}/ppo", "value_model": f"{out}/rm/model", "batch_size": 64}
        flags |= {"value_lr": 6e-5, "minibatches": 4, "passes": 1, "value_clip": 0, "tokens_per_microbatch": 1024}
        demo.run_script("ppo_rlvr.py", **from_start | rl | flags)
    for state in Path(out).glob("*/checkpoints/step_*/state"):  # only to go on from: 1.6 GB each
        if (state.parents[2] / "model").exists():
            shutil.rmtree(state)


def measure(model, out, data, only, ifeval=None):
    """Reward, KL, length: of all checkpoints on held-out prompts, of the final model also on what else is asked."""
    for name in only:
        run, final = (model, model) if name == "start" else (f"{out}/{name}", f"{out}/{name}/model")
        held_out, plain = f"{data}/constraints/held_out.jsonl:{HELD_OUT}", f"{data}/constraints/plain.jsonl"
        once(f"{out}/kl_held_out_{name}", "kl", ref=model, model=run, data=held_out, **SAMPLING)
        once(f"{out}/kl_plain_{name}", "kl", ref=model, model=final, data=plain, **SAMPLING)
        if ifeval:
            flags = SAMPLING | {"max_length": 1024}  # prompts are longer there
            once(ifeval_of(out, data, name), "evaluate", model=final, data=f"ifeval={ifeval}", **flags)


def ifeval_of(out, data, name):
    """Folder of what IFEval says of a method, or of the start: that is the same for all seeds."""
    return Path(data if name == "start" else out, f"ifeval_{name}")


def collect(out, data, measured):
    """{method: numbers} of a seed, those of the start first."""
    results = {}
    for name in ("start", *measured):
        steps, plain = (numbers_of(f"{out}/kl_{kind}_{name}/kl.tsv") for kind in ("held_out", "plain"))
        last = steps[-1]
        samples = f"{out}/kl_held_out_{name}/{last['name']}.step_{last['step']:g}.jsonl"
        if name == "start":
            samples_of_start = samples
        both = f"held_out={samples}", f"held_out={samples_of_start}"
        _, difference = compared(f"{out}/less_start_{name}", *both, cluster="topic")
        rows = rows_of(samples)
        hard = [row["rewards"][0] for row in rows if row["subset"] in HARD]
        phrases = [row["completions"][0] for row in rows if row["subset"] == ENDING]
        shown = [next(row for row in rows if row["subset"] == kind) for kind in SHOWN]
        logged = rows_of(f"{out}/{name}/metrics.jsonl") if name != "start" else []
        results[name] = {
            "seconds": sum(row["seconds"] for row in logged if row["step"]),  # of training
            "steps": steps,
            "plain": plain[-1],
            "less_start": difference,
            "hard_to_hack": sum(hard) / len(hard),
            "bare": sum(len(text) <= 45 for text in phrases) / len(phrases),  # the phrase at the end, and no answer
            "answers": [[row["messages"][-1]["content"], row["completions"][0]] for row in shown],
        }
        found, start = (ifeval_of(out, data, method) for method in (name, "start"))
        if found.exists():
            followed, difference = compared(f"{out}/ifeval_less_start_{name}", found, start)
            results[name]["ifeval"] = {"followed": followed, "less_start": difference}
    return results


def compared(path, a, b, **flags):
    """The share of prompts that A passes, and evaluate's difference to B's; `path` is the folder of its report."""
    once(path, "evaluate", compare=[a, b], **flags)
    [found] = json.loads(Path(path, "results.json").read_text())["differences"]
    return found["a"]["mean"], {key: found[key] for key in ("mean", "low", "high", "p", "prompts")}


def numbers_of(path):
    """The rows of kl.tsv: {column: number}, and `name`."""
    rows = demo.table_of(path)
    return [{key: text if key == "name" else float(text or "nan") for key, text in row.items()} for row in rows]


def draw(results, path):
    """Against KL: constraints followed, lengths, likelihood under the start; of each run a line through its steps."""
    figure, columns = plot.plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    titles = {"reward": "followed", "tokens": "tokens an answer", "ref_logprob_per_token": "log π_start a token"}
    for i, name in enumerate(METHODS):
        for number, result in enumerate(result for result in results.values() if name in result):
            steps = [result["start"]["steps"][-1], *result[name]["steps"]]
            for axes, (key, title) in zip(columns, titles.items(), strict=True):
                label = name if number == 0 else None
                points = [(step["kl"], step[key]) for step in steps]
                axes.plot(*zip(*points, strict=True), marker="osvD^P*Xhp"[i], color=f"C{i}", alpha=0.8, label=label)
                axes.set_title(title, loc="left")
                axes.set_xlabel("KL to the start (nats an answer)")
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    plot.save(figure, path)


def main(model, out, seeds, only, ifeval=None):
    data, results = Path(out, "data"), {}
    if not (data / "floor").exists():
        constraints.main(constraints.Args(out=str(data / "constraints")))
        constraints.main(constraints.Args(out=str(data / "floor"), floor=30))
    for seed in seeds:
        folder = Path(out, str(seed))
        folder.mkdir(parents=True, exist_ok=True)
        prepare(model, folder, data, seed)
        measure(model, folder, data, ["start"], ifeval)
        for method in only:
            train(model, folder, seed, [method])
            measure(model, folder, data, [method], ifeval)
        results[seed] = collect(folder, data, [name for name in METHODS if (folder / f"kl_plain_{name}").exists()])
    write("instruct", {"seeds": seeds, "results": results})
    draw(results, IMAGES / "study_instruct.png")
    print("python docs/tables.py writes the tables of docs/studies.md and README")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2", help="the start")
    parser.add_argument("--out", default="runs/instruct", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, help="methods; all by default")
    parser.add_argument("--ifeval", help="IFEval's published file, input_data.jsonl: tries the models on it, too")
    args = parser.parse_args()
    main(args.model, args.out, args.seeds, args.only, args.ifeval)
