"""Where a rollout's time goes, counted without a card: the sampler's own schedule, and a cost for each decode step.

    python benchmarks/schedule.py                    tables, and benchmarks/results/schedule.json; minutes, on any CPU

The schedule is the real one: `Sampler.sample` of kernels/sampler.py gives slots, refills them, closes gaps, looks every
16 steps and returns once `enough` prompts are answered. Only its model is replaced: a sequence ends at a length that
was set beforehand. The ranks sample 64 prompts a step, 8 completions of each, and a step lasts as long as its slowest
rank. With --inflight so many prompts are on their way beyond those, as in rewards/environment.py; the first steps do
not count. Lengths are exponential and cut off; those of a prompt's completions are independent of each other. What
would not fit the card is left out.

A decode step of n slots costs

    layers x a  +  n x parameters x b  +  (bytes of weights and of the keys and values that it reads) / c

where a (launches), b (arithmetic) and c (copying) are fitted to the steps that gpu.py measured on a card (--measured).
To that come assumed costs of a look, a prefill and a copy. So these are counts for that card, with the weights whole on
each rank, and no measurement of a rollout. The kernel reads the keys and values of sequences that go on. What it would
cost to read all of the first n slots, as it once did, is counted too (`all keys`).

Sizes: a decode step takes all slots, a quarter, a sixteenth ... (`quarters`, which is what the sampler does), or all, a
half, a quarter ... (`halves`). Each size is compiled once, and captured again after each release of the memory.

Tail: the part of a step after 80 % of its completions were done, on the slowest rank.
"""

import itertools
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sft_vs_trl import ROOT, environment
from transformers import LlamaConfig

sys.path.insert(0, str(ROOT))

from kernels.sampler import LIVE, LOOK_EVERY, POSITION, Sampler, SamplingParams  # noqa: E402


@dataclass
class Args:
    measured: str = "benchmarks/results/gpu_h200_sft_sampler.json"
    """result file of gpu.py --parts sampler"""
    ranks: tuple[int, ...] = (8, 1)
    """cards, each with a sampler of its own"""
    prompts: int = 64
    """prompts of a step, over all ranks"""
    group_size: int = 8
    """completions of each"""
    prompt_length: int = 200
    """tokens of each prompt"""
    lengths: tuple[str, ...] = ("600,2048", "8000,32768")
    """mean and cap of completions"""
    slots: tuple[int, ...] = (16, 64, 128, 256)
    """slots of a rank"""
    inflight: tuple[int, ...] = (0, 16, 32, 64, 128)
    """--inflight, over all ranks"""
    max_staleness: int = 4
    """steps after which a prompt is waited for"""
    steps: int = 10
    """steps that count, after as many as --max_staleness that do not"""
    seeds: int = 3
    """of the lengths"""
    look_microseconds: float = 200.0
    """assumed: the host looks at what has ended"""
    prefill_milliseconds: float = 15.0
    """assumed: a prefill, whatever it holds; to that comes its arithmetic, at half the rate of large products"""
    copy_milliseconds: float = 0.5
    """assumed: keys and values from slot to slot"""
    out: str = "benchmarks/results/schedule.json"
    """result file"""


# Parameters (embedding read once, as the head), layers, bytes of keys and values of a token.
MODELS = {"1.5B": (1.543e9, 28, 28 * 2 * 2 * 128 * 2), "8B": (7.505e9, 32, 32 * 2 * 8 * 128 * 2)}
TINY = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TINY |= {"max_position_embeddings": 2**20}


class Scheduled(Sampler):
    """The sampler without a model. `costs` has a row for each stretch of decode steps, with the numbers in NUMBERS."""

    # Decode steps; rows decoded in them, by quarters and by halves; keys of live sequences, and of all these rows.
    NUMBERS = ["steps", "rows_quarters", "rows_halves", "keys_live", "keys_all"]
    NUMBERS += ["tokens", "prefills", "prefilled", "copies", "done"]  # prefilled: tokens; done: completions

    def __init__(self, args, slots, mean, cap, seed):
        super().__init__(LlamaConfig(**TINY), slots, args.prompt_length + cap, [], "cpu")
        self.synced, self.costs, self.row = True, [], dict.fromkeys(self.NUMBERS, 0)
        self.halves = sorted(size for size in (slots >> i for i in range(20)) if size >= min(self.sizes))
        self.mean, self.cap, self.seed, self.ends = mean, cap, seed, {}

    def _end(self, completion):
        """Position of a completion's last token."""
        if completion not in self.ends:
            random = np.random.default_rng([self.seed, completion.index, completion.sample])
            length = min(int(np.ceil(random.exponential(self.mean))), self.cap)
            self.ends[completion] = len(completion.prompt_ids) + length - 1
        return self.ends[completion]

    def _prefill(self, sequences):
        self.row["prefills"] += bool(sequences)
        self.row["prefilled"] += sum(len(ids) for _, ids in sequences)

    def _copy(self, sources, targets):
        self.row["copies"] += bool(sources)

    def _run(self, temperature):
        """All steps until a sequence ends, and on to the next look: before that, a look changes nothing."""
        used = self._used()
        state = self.state.numpy()
        starts = state[:, POSITION].astype(np.int64)  # (B,)
        ends = starts.copy()  # (B,) a slot without a sequence stays where it is
        ends[used] = [self._end(self.active[slot]) for slot in used]
        remaining = ends - starts
        J = LOOK_EVERY * int(np.ceil(remaining[used].min() / LOOK_EVERY))
        sampled = np.minimum(remaining, J)
        live = sampled * (starts + 1) + sampled * (sampled - 1) // 2  # step j of a live sequence reads start + j + 1
        keys = live + (J - sampled) * (ends + 1)
        for name, sizes in (("quarters", self.sizes), ("halves", self.halves)):
            n = next(size for size in sizes if size > used[-1])
            self.row[f"rows_{name}"] = n * J
            if sizes is self.sizes:
                self.row["keys_all"] = int(keys[:n].sum())
        state[:, POSITION] = starts + sampled
        state[used, LIVE] = sampled[used] < remaining[used]
        done = len(used) - int(state[used, LIVE].sum())
        self.row |= {"steps": J, "keys_live": int(live.sum()), "tokens": int(sampled.sum()), "done": done}
        self.costs.append(self.row)
        self.row = dict.fromkeys(self.row, 0)


def fit(path):
    """(seconds of a layer's launches, seconds of a row and parameter, bytes per second, largest error, the card)."""
    facts = json.loads(Path(path).read_text())
    decode = next(r["decode"] for r in facts["results"] if (r["part"], r["name"]) == ("sampler", "ours"))
    parameters, layers, _ = MODELS["1.5B"]
    matrix = np.array([[layers, parameters * d["batch"], d["floor_bytes"]] for d in decode])
    seconds = np.array([d["step_seconds"] for d in decode])
    scale = matrix.max(axis=0)
    solution = np.linalg.lstsq(matrix / scale, seconds, rcond=None)[0] / scale
    error = np.abs(matrix @ solution / seconds - 1).max()
    return solution[0], solution[1], 1 / solution[2], error, facts["card"]


def seconds(args, model, fitted, costs, sizes, keys):
    """(n,) seconds of each row of costs."""
    parameters, layers, token_bytes = MODELS[model]
    launches, arithmetic, rate, _, card = fitted
    c = {name: np.array([row[name] for row in costs], dtype=float) for name in costs[0]}
    total = c["steps"] * (layers * launches + 2 * parameters / rate)
    total += c[f"rows_{sizes}"] * parameters * arithmetic + c[f"keys_{keys}"] * token_bytes / rate
    total += c["steps"] / LOOK_EVERY * args.look_microseconds * 1e-6 + c["copies"] * args.copy_milliseconds * 1e-3
    total += c["prefills"] * args.prefill_milliseconds * 1e-3
    return total + c["prefilled"] * 2 * parameters / (card["flops_per_second"] / 2)


def run(args, world, slots, inflight, mean, cap, seed):
    """The costs of each rank in each step that counts: [[costs, ...], ...]."""
    ranks = [Scheduled(args, slots, mean, cap, seed) for _ in range(world)]
    prompt, position, result = np.zeros(args.prompt_length, dtype=np.int64), 0, []
    params = SamplingParams(n=args.group_size, max_new_tokens=cap, max_staleness=args.max_staleness)
    for step in range(args.max_staleness + args.steps):
        new = args.prompts + inflight - sum(len(sampler.groups) for sampler in ranks)
        positions = list(range(position, position + new))
        position += new
        result.append([])
        for rank, sampler in enumerate(ranks):
            mine, sampler.costs = positions[rank::world], []
            enough = args.prompts // world if inflight else None
            sampler.sample([prompt] * len(mine), params, step=step, indices=mine, enough=enough)
            result[-1].append(sampler.costs)
    return result[args.max_staleness :]


def describe(slots, steps, costed):
    """Means over steps. costed: costs → (n,) seconds."""
    walls, tails, tokens, live = [], [], 0, 0.0
    for ranks in steps:
        times = [costed(costs) if costs else np.zeros(1) for costs in ranks]
        slowest = max(range(len(ranks)), key=lambda i: times[i].sum())
        ends, finished = times[slowest].cumsum(), np.cumsum([row["done"] for row in ranks[slowest]])
        walls.append(ends[-1])
        tails.append(1 - ends[np.searchsorted(finished, 0.8 * finished[-1])] / ends[-1])
        rows = [row for costs in ranks for row in costs]
        tokens += sum(row["tokens"] for row in rows)
        live += sum(row["tokens"] for row in rows) / (slots * sum(row["steps"] for row in rows))
    return {"seconds": statistics.mean(walls), "tokens_per_second": tokens / sum(walls) / len(steps[0]),
            "live_share": live / len(steps), "tail": statistics.mean(tails)}  # fmt: skip


VARIANTS = {  # sizes, keys read; the first is what the sampler does
    "quarters": ("quarters", "live"), "halves": ("halves", "live"), "all keys": ("quarters", "all"),
}  # fmt: skip


def main(args):
    fitted = fit(ROOT / args.measured)
    print(f"launches {fitted[0] * 1e6:.1f} µs a layer, arithmetic {fitted[1] * 1e15:.2f} µs a row of 1e9 parameters,"
          f" bytes {fitted[2] / 1e12:.2f} TB/s; off by {fitted[3]:.2%} at most from the steps measured")  # fmt: skip
    rows = []
    for world, workload, slots, inflight in itertools.product(args.ranks, args.lengths, args.slots, args.inflight):
        mean, cap = map(int, workload.split(","))
        runs = [run(args, world, slots, inflight, mean, cap, seed) for seed in range(args.seeds)]
        for model, (name, variant) in itertools.product(MODELS, VARIANTS.items()):
            each = [describe(slots, steps, lambda costs, m=model, v=variant: seconds(args, m, fitted, costs, *v))
                    for steps in runs]  # fmt: skip
            row = {"ranks": world, "lengths": workload, "model": model, "slots": slots, "inflight": inflight}
            row |= {"variant": name} | {key: statistics.mean(x[key] for x in each) for key in each[0]}
            row["seconds_of_seeds"] = [x["seconds"] for x in each]
            row["kv_gigabytes"] = slots * (args.prompt_length + cap) * MODELS[model][2] / 1e9
            if 1e9 * row["kv_gigabytes"] + 2 * MODELS[model][0] < fitted[4]["memory"]:  # else it cannot run there
                rows.append(row)
    show(rows)
    facts = environment("schedule.py", "kernels", packages=("torch", "transformers")) | {"settings": asdict(args)}
    facts |= {"fitted": dict(zip(("launches", "arithmetic", "bytes_per_second", "error", "card"), fitted, strict=True))}
    Path(args.out).write_text(json.dumps(facts | {"results": rows}, indent=1) + "\n")
    print(f"written to {args.out}")


def show(rows):
    """One table. saved: seconds less, by halves, and by not reading all keys; gain: tokens/s over --inflight 0."""
    keys = ("ranks", "lengths", "model", "slots", "inflight")
    table = {(*(row[key] for key in keys), row["variant"]): row for row in rows}
    names = "cards, mean and cap, model, slots, KV GB, inflight, s a step (of seeds), tokens/s of a card, live, tail"
    names = names.split(", ") + ["halves would save", "live keys save", "gain"]
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        if row["variant"] != "quarters":
            continue
        where = tuple(row[key] for key in keys)
        halves = 1 - table[(*where, "halves")]["seconds"] / row["seconds"]
        live = 1 - row["seconds"] / table[(*where, "all keys")]["seconds"]
        gain = row["tokens_per_second"] / table.get((*where[:4], 0, "quarters"), row)["tokens_per_second"]
        times = f"{row['seconds']:.2f} ({min(row['seconds_of_seeds']):.2f}-{max(row['seconds_of_seeds']):.2f})"
        print(f"| {' | '.join(map(str, where[:4]))} | {row['kv_gigabytes']:.0f} | {where[4]} | {times} |"
              f" {row['tokens_per_second']:,.0f} | {row['live_share']:.2f} | {row['tail']:.2f} | {halves:.1%} |"
              f" {live:.1%} | {gain:.2f} |")  # fmt: skip


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__, use_underscores=True))
