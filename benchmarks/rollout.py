"""Rollouts: our sampler against transformers' `generate` and its continuous batching. Same model, prompts and lengths.

    pip install -r requirements-bench.txt
    python benchmarks/rollout.py                     table, and benchmarks/results/rollout_DEVICE.json

A Llama with random weights samples one completion of each prompt at temperature 1, without top-k or top-p. Lengths are
ragged as in reinforcement learning and set beforehand, the same for everybody: a completion goes on until its own
number of tokens (exponential, cut off at --max_new_tokens). So all produce the same number of useful tokens. Before
anything is timed, all decode greedily once, and the tokens have to be identical (on CPU; in bf16 they cannot be).

    ours                    slots refilled as sequences end; returns log-probabilities
    generate                batches of as many prompts as we have slots, padded left, until the last sequence has ended
    generate, all           one batch of all prompts: three times the memory for keys and values
    continuous, default     the engine of `generate_batch`, with log-probabilities and a length for each request, set up
                            as by its defaults; on a CPU much of its time is the set-up of a cache as large as memory
    continuous, tuned       with a small cache, few tokens a batch and as many requests at a time as we have slots: the
                            fastest of five settings tried

The contestants take turns in one process; the median over rounds counts. Useful tokens per second on the wall and per
second of the process's CPU time, which is the fairer on a shared machine.

A model of 1.5B parameters on a GPU, as a share of the time to read its weights once: benchmarks/gpu.py.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sft_vs_trl import environment
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, StoppingCriteria, StoppingCriteriaList

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels.sampler import LIMIT, Sampler, SamplingParams  # noqa: E402


@dataclass
class Args:
    requests: int = 192
    """prompts, with one completion each"""
    slots: int = 64
    """our slots, and generate's batch"""
    mean: float = 52.0
    """mean of the exponential lengths before they are cut off"""
    max_new_tokens: int = 128
    """longest completion"""
    prompt_lengths: tuple[int, int] = (8, 64)
    """shortest and longest prompt"""
    hidden: int = 256
    """model's hidden size"""
    layers: int = 4
    """its layers"""
    vocabulary: int = 4096
    """its vocabulary"""
    rounds: int = 3
    """timed runs of each contestant"""
    threads: int = 1
    """PyTorch threads on CPU"""
    out: str | None = None
    """result file; by default benchmarks/results/rollout_cpu.json or rollout_cuda.json"""


class Policy(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


class FixedLengths(Sampler):
    """Completion i goes on for lengths[i] tokens."""

    def _refill(self, *args):
        super()._refill(*args)
        for slot in self._used():
            c = self.active[slot]
            self.state[slot, LIMIT] = len(c.prompt_ids) + int(self.lengths[c.index]) - 1


class Ended(StoppingCriteria):
    """Row i of a batch has ended when it has lengths[i] tokens after the prompt."""

    def __init__(self, lengths, start):
        self.lengths, self.start = torch.tensor(lengths), start

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids.shape[1] - self.start >= self.lengths).to(input_ids.device)


# Each takes (args, model, sampler, prompts, lengths, greedy) and returns the completions.


def ours(args, model, sampler, prompts, lengths, greedy):
    sampler.lengths = lengths
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=0.0 if greedy else 1.0)
    completions = sampler.sample(prompts, params)
    return [c.token_ids.tolist() for c in completions]


def generate(args, model, sampler, prompts, lengths, greedy, batch=None):
    results, batch = [], batch or args.slots
    for start in range(0, len(prompts), batch):
        rows, ends = prompts[start : start + batch], lengths[start : start + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        config = GenerationConfig(
            do_sample=not greedy, max_new_tokens=args.max_new_tokens, pad_token_id=0, eos_token_id=None, top_k=0
        )
        stop = StoppingCriteriaList([Ended(ends, width)])
        output = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stop)
        results += [row[width : width + end].tolist() for row, end in zip(output, ends, strict=True)]
    return results


def generate_all(args, *rest):
    return generate(args, *rest, batch=args.requests)


def continuous(args, model, sampler, prompts, lengths, greedy, **options):
    from transformers import ContinuousBatchingConfig

    config = GenerationConfig(
        do_sample=not greedy, max_new_tokens=args.max_new_tokens, pad_token_id=0, eos_token_id=-1, top_k=0
    )
    batching, results = ContinuousBatchingConfig(return_logprobs=True, **options), {}
    with model.continuous_batching_context_manager(config, continuous_batching_config=batching) as manager:
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=int(length), eos_token_id=-1)
        while len(results) < len(prompts):
            result = manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(f"continuous batching failed: {result and result.error}")
            if result.is_finished():
                results[int(result.request_id)] = result.generated_tokens
    return [results[i] for i in range(len(prompts))]


def continuous_tuned(args, *rest):
    options = {"num_blocks": 1024, "page_size": 32, "max_batch_tokens": 128, "allow_block_sharing": False}
    return continuous(args, *rest, max_requests_per_batch=args.slots, **options)


CONTESTANTS = {
    "ours": ours, "generate": generate, "generate, all": generate_all, "continuous, default": continuous,
    "continuous, tuned": continuous_tuned,
}  # fmt: skip


def seconds(function):
    """(wall, CPU) seconds of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def compare(args, device):
    random = np.random.default_rng(0)
    heads = max(1, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=args.layers,
        max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    sizes = random.integers(*args.prompt_lengths, args.requests, endpoint=True)
    prompts = [random.integers(3, args.vocabulary, size).tolist() for size in sizes]
    lengths = np.ceil(random.exponential(args.mean, args.requests)).clip(1, args.max_new_tokens).astype(int)
    sampler = FixedLengths(config, args.slots, args.prompt_lengths[1] + args.max_new_tokens, [], device)
    sampler.sync(Policy(model))
    inputs = (args, model, sampler, prompts, lengths)
    greedy = {name: function(*inputs, True) for name, function in CONTESTANTS.items()}  # also the warm-up
    same = {name: sum(a == b for a, b in zip(tokens, greedy["ours"], strict=True)) for name, tokens in greedy.items()}
    print(f"completions identical to ours, greedily, of {args.requests}: {same}")
    if device == "cpu" and min(same.values()) < args.requests:
        sys.exit("error: the contestants do not compute the same thing")
    times = {name: [] for name in CONTESTANTS}
    for _ in range(args.rounds):
        for name, function in CONTESTANTS.items():
            times[name].append(seconds(lambda function=function: function(*inputs, False)))
    useful = int(lengths.sum())
    results = {}
    for name, runs in times.items():
        wall, cpu = (statistics.median(x) for x in zip(*runs, strict=True))
        results[name] = {"tokens_per_second": useful / wall, "tokens_per_cpu_second": useful / cpu, "seconds": runs}
    for r in results.values():
        for key in ("tokens_per_second", "tokens_per_cpu_second"):
            r[f"ours_over_it_{key}"] = results["ours"][key] / r[key]
    facts = {"useful_tokens": useful, "mean_length": useful / args.requests, "identical_greedy": same}
    return facts | {"results": results}


def main(args):
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {"ragged": compare(args, device)}
    print(f"{'':20} tokens/s  ours/it | tokens per CPU second  ours/it")
    for name, r in facts["ragged"]["results"].items():
        print(f"{name:20} {r['tokens_per_second']:8.0f} {r['ours_over_it_tokens_per_second']:8.2f} |"
              f" {r['tokens_per_cpu_second']:21.0f} {r['ours_over_it_tokens_per_cpu_second']:8.2f}")  # fmt: skip
    facts = environment("rollout.py", "kernels") | {"device": device, "settings": asdict(args)} | facts
    path = Path(args.out or ROOT / "benchmarks" / "results" / f"rollout_{device}.json")
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__, use_underscores=True))
