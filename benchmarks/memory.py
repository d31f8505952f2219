"""Does it fit? Memory of each GPU for a model, a script and its flags, counted on any computer in a few seconds.

    python benchmarks/memory.py --model 32B --gpus 16 --script grpo --sample_tp 2 --max_length 16384
    python benchmarks/memory.py --all

--model is a folder, a config.json, a Hub id, or one of the shapes in MODELS below. All other flags are the script's
own, with its defaults. The first table says what the memory is for, the second what other flags and GPUs would change.
--all prints models by numbers of GPUs for all scripts, by their defaults, and writes benchmarks/results/memory.json.

Counted by `kernels/memory.py` (training) and `kernels.sampler.footprint` (sampling), which say how; a simulation in
tests/test_memory.py agrees with the first. In reinforcement learning the sampler has memory while it samples, and gives
it back before the update, so the peak is the larger of

    training     parameters, gradients, AdamW's moments; and a microbatch, of the model that needs most
    sampling     parameters and moments; the sampler's copy of the weights; its slots, the keys and values of a sequence
                 each. They come after the copy, for which FSDP2 gathers parameters: the largest group, if that is more

ppo_rlvr.py trains two models, and has the states of both; its value model is counted as large as the policy. Not
counted are a reward model beside them (--reward_model of grpo.py), π_ref (it is in the memory of the host), what a
prefill or a decode step needs for a moment (up to 2 GiB), scores of attention with a soft-cap (Gemma 2), CUDA's
context, NCCL, and memory that lies in pieces: --limit_gib leaves room for these.
"""

import importlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import tyro
from sft_vs_trl import environment
from transformers import AutoConfig, LlamaConfig, Olmo3Config, Qwen2Config, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from kernels.memory import count_model, training_bytes  # noqa: E402
from kernels.sampler import footprint  # noqa: E402
from rewards.environment import slots_for  # noqa: E402

GIB = 2**30
SCRIPTS = ("sft", "reward_model", "dpo", "grpo", "ppo_rlvr")
HEADS = {  # of the models that a script trains, as in kernels/memory.py
    "sft": ["cross_entropy"],
    "reward_model": ["sequence_scores"],
    "dpo": ["logprobs"],
    "grpo": ["logprobs"],
    "ppo_rlvr": ["logprobs", "token_scores"],
}
GPUS = (8, 16, 32, 64)
SAMPLE_TPS = (1, 2, 4, 8)
FEW = 16  # sequences at a time below which sampling is no longer worth its name

MODELS = {
    "1.5B": Qwen2Config(  # Qwen2.5-1.5B
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(  # Llama-3.1-8B
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072, tie_word_embeddings=False,
    ),
    "32B": Qwen3Config(  # Qwen3-32B
        vocab_size=151_936, hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=False,
    ),
    "70B": LlamaConfig(  # Llama-3.1-70B
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072, tie_word_embeddings=False,
    ),
    "OLMo-3-7B": Olmo3Config(
        vocab_size=100_278, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=65_536, sliding_window=4096,
    ),
    "OLMo-3-32B": Olmo3Config(
        vocab_size=100_278, hidden_size=5120, intermediate_size=27_648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, max_position_embeddings=65_536, sliding_window=4096,
    ),
}  # fmt: skip


@dataclass
class Args:
    model: str = "8B"
    """folder, config.json, Hub id, or 1.5B, 8B, 32B, 70B, OLMo-3-7B, OLMo-3-32B"""
    gpus: int = 8
    """how many in all"""
    script: Literal["sft", "reward_model", "dpo", "grpo", "ppo_rlvr"] = "grpo"
    """what is run on them"""
    gpus_per_node: int = 8
    """for --shard hybrid, and the most that share a copy of the sampler's weights"""
    card_gib: float = 79.6
    """memory of a GPU"""
    limit_gib: float = 74.0
    """what of it may be used up by what is counted"""
    all: bool = False
    """all models and scripts instead, with the scripts' defaults"""


@dataclass
class Need:
    """Bytes on a GPU. `rollout` and what it is made of are None in scripts that do not sample."""

    parameters: int
    gradients: int
    moments: int
    work: int  # a microbatch
    copy: int | None = None  # the sampler's weights
    gathered: int | None = None  # while they are copied
    slot: int | None = None  # keys and values of one sequence
    fitting: int | None = None  # slots that fit
    slots: int | None = None  # of these, how many are there

    @property
    def training(self):
        return self.parameters + self.gradients + self.moments + self.work

    @property
    def rollout(self):
        if self.slot is None:
            return None
        return self.parameters + self.moments + self.copy + max(self.slots * self.slot, self.gathered)

    def fits(self, limit):
        return max(self.training, self.rollout or 0) <= limit


def load_config(name):
    if name in MODELS:
        return MODELS[name]
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {name}: {common.first_line(error)}; by name there are {', '.join(MODELS)}")


def script_args(args):
    """The script's Args class."""
    return importlib.import_module(args.script).Args


@cache
def counted(name, head, compiled):
    return count_model(load_config(name), head, compiled)


@cache
def sampler_bytes(name, max_length, tp):
    """(copy, slot). ValueError if the model cannot be divided so, or the sampler does not take it."""
    return footprint(load_config(name), max_length, torch.bfloat16, tp)


def need(args, flags):
    """The Need of a script with `flags`, its Args. ValueError if this model, or these GPUs, cannot have them."""
    shards = args.gpus
    if flags.shard == "hybrid":
        shards = min(args.gpus, args.gpus_per_node)
    longest = flags.max_length  # of a row, which is not cut
    if args.script in ("dpo", "reward_model"):
        longest *= 2  # a pair
    tokens = max(flags.tokens_per_microbatch, longest)
    models = [counted(args.model, head, flags.compile) for head in HEADS[args.script]]
    each = [training_bytes(model, tokens, shards, flags.activation_checkpointing) for model in models]
    result = Need(
        parameters=sum(training.parameters for training in each),
        gradients=sum(training.gradients for training in each),
        moments=sum(training.moments for training in each),
        work=max(training.work for training in each),
    )
    if args.script not in ("grpo", "ppo_rlvr"):
        return result
    tp = flags.sample_tp
    if args.gpus % tp or tp > args.gpus_per_node:
        raise ValueError(f"--sample_tp {tp} does not divide the {args.gpus} GPUs, or those of a machine")
    result.copy, result.slot = sampler_bytes(args.model, flags.max_length, tp)
    result.gathered = 2 * 2 * max(models[0].outside, models[0].layer)  # bf16; in a buffer, and copied out of it
    room = args.limit_gib * GIB - result.parameters - result.moments - result.copy
    result.fitting, slots = slots_for(flags, args.gpus // tp, room, result.slot)
    result.slots = max(1, slots)
    return result


def try_need(args, flags):
    """A Need, or None."""
    try:
        return need(args, flags)
    except ValueError:
        return None


def gib(size):
    return f"{size / GIB:.1f}"


def show(args, flags):
    """The tables of one configuration. flags: the script's Args."""
    n = need(args, flags)
    print(f"\n{command(args, flags)}\n\n| on each GPU | GiB |\n|---|---|")
    rows = [("parameters, float32", n.parameters), ("gradients, float32", n.gradients), ("AdamW's moments", n.moments)]
    rows += [("a microbatch: activations, gathered parameters, head", n.work), ("**training, peak**", n.training)]
    if n.slot is not None:
        rows += [("sampler's copy of the weights", n.copy), (f"a slot of {flags.max_length:,} tokens", n.slot)]
        rows += [(f"{n.slots} slots, of {n.fitting} that fit", n.slots * n.slot)]
        rows += [("or gathered, before, while weights are copied", n.gathered), ("**sampling, peak**", n.rollout)]
    for name, size in rows:
        print(f"| {name} | {gib(size)} |")
    peak = max(n.training, n.rollout or 0)
    verdict = "It fits" if n.fits(args.limit_gib * GIB) else "It does not fit"
    print(f"\n{verdict}: {gib(peak)} GiB of {args.limit_gib} that may be used of {args.card_gib}.\n")
    show_others(args, flags)


def command(args, flags):
    given = [f"--{name} {getattr(flags, name)}" for name in ("tokens_per_microbatch", "max_length")]
    given += [f"--{name}" for name in ("activation_checkpointing", "compile") if getattr(flags, name)]
    if flags.shard == "hybrid":
        given.append("--shard hybrid")
    if getattr(flags, "sample_tp", 1) > 1:
        given.append(f"--sample_tp {flags.sample_tp}")
    return f"{args.model} on {args.gpus} GPUs: {args.script}.py {' '.join(given)}"


WAYS = {  # to train: what differs from nothing
    "no flag": {"activation_checkpointing": False, "compile": False},
    "`--compile`": {"activation_checkpointing": False, "compile": True},
    "`--activation_checkpointing`": {"activation_checkpointing": True, "compile": False},
}


def show_others(args, flags):
    """The same model and script on other numbers of GPUs and with other flags."""
    samples = args.script in ("grpo", "ppo_rlvr")
    columns = [f"training, {way}" for way in WAYS]
    if samples:
        columns += [f"slots, `--sample_tp {tp}`" for tp in SAMPLE_TPS]
    print(f"| GPUs | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for gpus in sorted({*GPUS, args.gpus}):
        other = replace(args, gpus=gpus)
        cells = []
        for way in WAYS.values():
            n = need(other, replace(flags, **way, **({"sample_tp": 1} if samples else {})))
            cells.append(marked(n.training, args))
        for tp in SAMPLE_TPS if samples else ():
            n = try_need(other, replace(flags, sample_tp=tp))
            cells.append("–" if n is None else f"{n.fitting:,}" if n.fitting else "none")
        print(f"| {gpus} | {' | '.join(map(str, cells))} |")
    print(f"\nGiB; ✗ is more than {args.limit_gib}.", "Slots: of GPUs that share a copy, together." if samples else "")


def marked(size, args):
    return f"{gib(size)}{'' if size <= args.limit_gib * GIB else ' ✗'}"


def cheapest(args):
    """(flags that were added, Need) of the first way in which it fits; of the last one, and False, if in none."""
    flags = script_args(args)()
    ways = [replace(flags, **way) for name, way in WAYS.items() if name != "no flag"]
    ways = [flags] + [way for way in ways if way.activation_checkpointing >= flags.activation_checkpointing]
    for way in ways:
        for tp in SAMPLE_TPS if hasattr(flags, "sample_tp") else (None,):
            if tp:
                way = replace(way, sample_tp=tp)
            n = try_need(args, way)
            if n and n.fits(args.limit_gib * GIB) and (not tp or n.fitting >= FEW):
                return way, n, True
    return way, n, False


def show_all(args):
    """Models by numbers of GPUs for all scripts; and the result file."""
    entries = []
    print("| model | GPUs | " + " | ".join(f"{script}.py" for script in SCRIPTS) + " |\n|" + "---|" * 7)
    for model in MODELS:
        for gpus in GPUS:
            cells = []
            for script in SCRIPTS:
                one = replace(args, model=model, gpus=gpus, script=script)
                flags, n, fits = cheapest(one)
                cells.append(cell(script_args(one)(), flags, n, fits))
                entry = {"model": model, "gpus": gpus, "script": script, "fits": fits}
                chosen = ("activation_checkpointing", "compile", "sample_tp", "max_length", "tokens_per_microbatch")
                entry |= {name: getattr(flags, name) for name in chosen if hasattr(flags, name)}
                if n:
                    entry |= asdict(n) | {"training": n.training, "rollout": n.rollout}
                entries.append(entry)
            print(f"| {model} | {gpus} | {' | '.join(cells)} |", flush=True)
    print(f"\nGiB at the peak on each GPU, and what is added to the defaults. ✗: above {args.limit_gib} in every way.")
    facts = environment("memory.py", "kernels", packages=("torch", "transformers")) | {"settings": asdict(args)}
    path = ROOT / "benchmarks" / "results" / "memory.json"
    path.write_text(json.dumps(facts | {"entries": entries}, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def cell(default, flags, n, fits):
    if not n:
        return "✗"
    peak = gib(max(n.training, n.rollout or 0))
    if not fits:
        return f"{peak} ✗"
    added = [flag for flag in ("activation_checkpointing", "compile") if getattr(flags, flag) != getattr(default, flag)]
    if getattr(flags, "sample_tp", 1) > 1:
        added.append(f"sample_tp {flags.sample_tp}")
    return " ".join([peak, *(f"`--{flag}`" for flag in added)])


def main(words=None):
    """words: of the command line; by default this process's."""
    args, rest = tyro.cli(Args, args=words, description=__doc__, use_underscores=True, return_unknown_args=True)
    flags = tyro.cli(script_args(args), args=rest, use_underscores=True)
    try:
        common.check_ranges(args, {"gpus": (1, 1e6), "gpus_per_node": (1, 1e6)})
        common.check_ranges(flags, common.RANGES | dict.fromkeys(("slots", "sample_tp", "group_size"), (1, 1e9)))
        show_all(args) if args.all else show(args, flags)
    except (common.RunError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
