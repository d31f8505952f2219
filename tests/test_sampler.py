"""Rollouts: tokens against `generate`, log-probabilities against plain forward passes, and what a sample may depend on.

What is exact: state restored → the same bits; `sync` → the same weights, bit for bit; the noise is a function of integers.
What is only almost certain: that another number of slots samples the same tokens. Products of other shapes round
differently, so two candidates within about 1e-6 of each other could change places. The models here are float32 and the
seeds fixed, so a test does not flicker on one machine; on another it could fail. Of 40,000 tokens sampled from stories260K with
7 and with 64 slots, none differed.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import shared, tokenizer_folder
from launch import run
from safetensors.torch import load_file, save_file
from test_kernels import tiny_config
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, StableLmConfig

import common
import kernels.sampler
from kernels.head import linear_logprobs
from kernels.sampler import Sampler, SamplingParams

FAMILIES = ("llama", "qwen3", "olmo3", "gemma2", "gemma3")
V = 128


class Policy(torch.nn.Module):
    """What scripts train: it has the transformers model as .model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch, temperature):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]
        weight, softcap = self.model.get_output_embeddings().weight, getattr(self.model.config, "final_logit_softcapping", None)
        return linear_logprobs(hidden, weight, microbatch.targets, temperature, softcap)[0] * 1  # FSDP2 wants no view


def make(config, attn="eager", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attn).eval()


def make_sampler(model, slots=8, max_length=128, eos_ids=(2,)):
    sampler = Sampler(model.config, slots, max_length, eos_ids, "cpu")
    sampler.sync(Policy(model))
    return sampler


def make_prompts(lengths, vocab_size=V, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(3, vocab_size, length).tolist() for length in lengths]


def tokens(completions):
    return {(c.step, c.index, c.sample): c.token_ids.tolist() for c in completions}


def bits(completions):
    return [(c.step, c.index, c.sample, c.token_ids.tolist(), c.logprobs.tobytes(), c.ended) for c in completions]


@torch.no_grad()
def recompute(model, completion, temperature):
    """The log-probabilities of a completion's tokens by one plain forward pass."""
    ids = torch.from_numpy(np.concatenate([completion.prompt_ids, completion.token_ids]))
    logp = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
    return logp[len(completion.prompt_ids) - 1 : -1].gather(1, torch.from_numpy(completion.token_ids)[:, None])[:, 0]


@pytest.fixture(scope="module")
def llama():
    return make(tiny_config("llama", V, True))


def generate(model, prompt, max_new_tokens, eos_ids):
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids), pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


# ------------------------------------------------------------------------------- against transformers and training


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family):
    """Greedy: generate's tokens. Sampled at 0.7: log-probabilities equal one plain forward pass, and the training path
    (packed, `linear_logprobs`), to 1e-5. Lengths beyond the sliding windows of 16; prompts of 1 to 60 tokens."""
    model = make(tiny_config(family, V, True))
    prompts, eos = make_prompts([1, 60, 5, 17, 16, 33]), [2, 9, 11]
    sampler = make_sampler(model, slots=4, eos_ids=eos)
    greedy = sampler.sample(prompts, SamplingParams(max_new_tokens=40, temperature=0))
    assert [c.token_ids.tolist() for c in greedy] == [generate(model, p, 40, eos) for p in prompts]
    sampled = sampler.sample(prompts, SamplingParams(n=2, max_new_tokens=40, temperature=0.7, seed=3))
    for completion, temperature in [(c, 1) for c in greedy] + [(c, 0.7) for c in sampled]:
        torch.testing.assert_close(
            torch.from_numpy(completion.logprobs), recompute(model, completion, temperature), rtol=0, atol=1e-5
        )
    assert {c.ended for c in sampled} == {True, False}
    policy = Policy(make(tiny_config(family, V, True), "packed"))
    policy.load_state_dict(Policy(model).state_dict())
    microbatch = common.pack([sequence(c) for c in sampled], "cpu")
    with torch.no_grad():
        logprobs = policy(microbatch, 0.7)[microbatch.targets != -100]
    torch.testing.assert_close(logprobs, torch.from_numpy(np.concatenate([c.logprobs for c in sampled])), rtol=0, atol=1e-5)


def sequence(completion):
    """(input_ids, trained), as scripts pack it."""
    ids = np.concatenate([completion.prompt_ids, completion.token_ids])
    return ids, np.arange(len(ids)) >= len(completion.prompt_ids)


@pytest.mark.parametrize("name, eos", [("stories260k", [1]), ("tinystories-656k", [2])])
def test_real_models_equal_generate(name, eos):
    """Greedy stories from four beginnings, to their end or 100 tokens."""
    folder = shared("models", name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = common.load_tokenizer(folder, "tulu")
    texts = ["Once upon a time", "Lily had a dog", "One day, a big red ball was in the park and Tom"]
    prompts = [[eos[0]] if name == "tinystories-656k" else [1]] + [tokenizer(text).input_ids for text in texts]
    completions = make_sampler(model, 3, 256, eos).sample(prompts, SamplingParams(max_new_tokens=100, temperature=0))
    assert [c.token_ids.tolist() for c in completions] == [generate(model, p, 100, eos) for p in prompts]
    for c in completions:
        torch.testing.assert_close(torch.from_numpy(c.logprobs), recompute(model, c, 1), rtol=0, atol=1e-5)


def test_ids_trained_are_ids_sampled(llama):
    """1,000 rollouts: the targets of the packed batch are the sampled ids, in order, and nothing else."""
    sampler = make_sampler(llama, 64, eos_ids=range(2, 12))
    completions = sampler.sample(make_prompts([4] * 250), SamplingParams(n=4, max_new_tokens=16))
    assert len(completions) == 1000
    targets = common.pack([sequence(c) for c in completions], "cpu").targets
    assert targets[targets != -100].tolist() == np.concatenate([c.token_ids for c in completions]).tolist()


# ---------------------------------------------------------------------------------------------- a model in a folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "olmo3", "gemma2"])
def test_from_pretrained(family, tied, tmp_path):
    """A folder in bf16, in several files: `generate`'s tokens, and bit for bit those of a sampler synced from a policy."""
    saved = make(tiny_config(family, V, tied)).to(torch.bfloat16)
    saved.generation_config.eos_token_id = [2, 9]
    saved.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    sampler, synced = Sampler.from_pretrained(tmp_path, slots=4, device="cpu"), make_sampler(model, 4, 512, [2, 9])
    assert sampler.eos_ids == {2, 9} and sampler.max_length == 512
    head, embedding = (f().weight for f in (sampler.model.get_output_embeddings, sampler.model.get_input_embeddings))
    assert (head is embedding) == tied
    prompts = make_prompts([1, 60, 5, 17])
    greedy = sampler.sample(prompts, SamplingParams(max_new_tokens=40, temperature=0))
    assert [c.token_ids.tolist() for c in greedy] == [generate(model, p, 40, [2, 9]) for p in prompts]
    params = SamplingParams(n=2, max_new_tokens=20, temperature=0.7, seed=3)
    assert bits(sampler.sample(prompts, params)) == bits(synced.sample(prompts, params))


def test_from_pretrained_finds_all_end_tokens(llama, tmp_path):
    """The generation config's, one or several or none, and the tokenizer's: one that is there, and none made up."""
    gpt2 = make(GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=7))
    gpt2.save_pretrained(tmp_path / "gpt2")
    assert Sampler.from_pretrained(tmp_path / "gpt2").eos_ids == {7}  # AutoTokenizer would invent token 0
    for number, (eos, expected) in enumerate([(None, set()), (5, {5}), ([5, 6], {5, 6})]):
        model, folder = copy.deepcopy(llama), tmp_path / str(number)
        model.config.eos_token_id = model.generation_config.eos_token_id = eos
        model.save_pretrained(folder)
        assert Sampler.from_pretrained(folder, slots=2, max_length=32).eos_ids == expected
        tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), "tulu")
        tokenizer.save_pretrained(folder)
        assert Sampler.from_pretrained(folder, slots=2, max_length=32).eos_ids == expected | {tokenizer.eos_token_id}


def test_from_pretrained_refuses_what_is_no_whole_model(llama, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="beyond the 512 positions"):
        Sampler.from_pretrained(tmp_path / "model", max_length=1024)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights .*model.norm.weight"):
        Sampler.from_pretrained(tmp_path / "model")
    with pytest.raises(OSError):
        Sampler.from_pretrained(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------- what a sample depends on


def test_noise_is_exponential_and_depends_on_every_integer():
    """Mean and variance 1, P(e < x) = 1 - exp(-x) down to x = 1e-5; uncorrelated between keys, positions and tokens."""
    keys = torch.randint(-(2**31), 2**31, (100, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    e = kernels.sampler._waiting_times(keys, torch.arange(100, dtype=torch.int32), 50_000).double()  # 5 million
    assert e.min() > 0 and abs(e.mean() - 1) < 5 / math.sqrt(e.numel()) and abs(e.var() - 1) < 5 * math.sqrt(8 / e.numel())
    for x in (1e-5, 1e-3, 0.1, 1, 5):
        p = -math.expm1(-x)
        assert abs((e < x).double().mean() - p) < 5 * math.sqrt(p / e.numel()), x
    change = torch.zeros(4, 2, dtype=torch.int32)
    change[1, 0] = change[2, 1] = 1
    e = kernels.sampler._waiting_times(change, torch.tensor([7, 7, 7, 8], dtype=torch.int32), 100_000)
    e = torch.cat([e, e.roll(1, dims=1)])
    correlation = torch.corrcoef(e) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)


def test_waiting_times_of_all_hashes_are_finite():
    """At both ends of the 31 bits that count, whatever the sign, against float64."""
    ends = [0, 1, 2, 3, *range(2**31 - 130, 2**31)]
    x = torch.tensor(ends, dtype=torch.int64)
    e = kernels.sampler._exponential(torch.cat([x, x - 2**31]).to(torch.int32))  # with the sign bit, and without
    assert torch.equal(e[: len(ends)], e[len(ends) :]) and e.isfinite().all() and e.min() > 0
    exact = -((2.0**31 - 0.5 - x.double()) / 2**31).log()
    torch.testing.assert_close(e[:4].double(), exact[:4], rtol=1e-6, atol=0)
    large, rounded = e[4 : len(ends) - 64], e[-64:]
    assert (large.diff() > -1e-5).all() and ((large.double() - exact[4:-64]).abs() < 0.7).all()  # steps of 2^-24 in u
    assert (rounded == kernels.sampler.LONGEST_WAIT).all() and large.max() < kernels.sampler.LONGEST_WAIT
    assert abs(exact[-64:].mean() - kernels.sampler.LONGEST_WAIT) < 0.1


@pytest.mark.parametrize("rare", [-60.0, -200.0])
def test_a_certain_token_is_drawn_at_every_hash(rare):
    """These keys give token 0 one of the 64 hashes whose uniform number float32 rounds to 1."""
    keys, position = torch.tensor([[16858922, 12345]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert kernels.sampler._waiting_times(keys, position, 2)[0, 0] == kernels.sampler.LONGEST_WAIT
    for logits in ([0.0, rare], [rare, 0.0]):
        rules = kernels.sampler.Rules(temperature=1.0, softcap=None, eos=None, never=())
        token, logprob = kernels.sampler._draw(torch.tensor([logits]), keys, position, rules)
        assert logits[int(token)] == 0 and logprob == 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies(llama, temperature):
    """Chi-square of 10,000 first and second tokens against exact probabilities; fixed seed, threshold at p = 1e-4."""
    prompt = make_prompts([6])[0]
    params = SamplingParams(n=20, max_new_tokens=2, temperature=temperature, seed=5)
    completions = make_sampler(llama, 512, eos_ids=[]).sample([prompt] * 500, params)
    with torch.no_grad():
        first = (llama(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(0)
        context = torch.tensor([prompt + [token] for token in range(V)])
        second = first @ (llama(context).logits[:, -1].double() / temperature).softmax(1)  # marginal
    for position, exact in enumerate((first, second)):
        counts = np.bincount([c.token_ids[position] for c in completions], minlength=V)
        expected = exact.numpy() * len(completions)
        rare = expected < 10  # in one bin, as the test's approximation asks for
        counts, expected = (np.append(x[~rare], x[rare].sum()) if rare.any() else x for x in (counts, expected))
        chi2, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
        bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
        assert freedom > 20 and chi2 < bound, (position, chi2, bound)


@pytest.mark.parametrize("family", ["llama", "olmo3"])
def test_slots_and_company_change_nothing(family):
    """1, 3, 8 and 64 slots, with refills and groups, or each prompt by itself: the same tokens for every sample."""
    model = make(tiny_config(family, V, True))
    prompts = make_prompts([1, 50, 2, 30, 7, 7, 20, 3, 64])
    params = SamplingParams(n=3, max_new_tokens=18, temperature=1.0, seed=7)
    eos = list(range(2, 8))
    results = [make_sampler(model, slots, eos_ids=eos).sample(prompts, params, step=3) for slots in (64, 8, 3, 1)]
    assert all(tokens(result) == tokens(results[0]) for result in results)
    assert len({len(c.token_ids) for c in results[0]}) > 5  # ragged, so slots were refilled at all times
    alone = make_sampler(model, 2, eos_ids=eos)
    for i in (8, 1, 0):
        assert tokens(alone.sample([prompts[i]], params, step=3, indices=[i])).items() <= tokens(results[0]).items()


def test_many_refills_at_once(llama):
    """All completions are cut off together, and groups of three straddle 32 slots: the copies come from the right slot."""
    prompts, params = make_prompts(range(2, 42)), SamplingParams(n=3, max_new_tokens=5)
    together = make_sampler(llama, 32, eos_ids=[]).sample(prompts, params)
    assert tokens(together) == tokens(make_sampler(llama, 120, eos_ids=[]).sample(prompts, params))  # no refill


def test_every_integer_changes_the_sample(llama):
    sampler, prompt = make_sampler(llama, eos_ids=[]), make_prompts([5])
    base = {"params": SamplingParams(n=2, max_new_tokens=12, seed=1), "step": 1, "indices": [0]}
    seen = [c.token_ids.tolist() for c in sampler.sample(prompt, **base)]
    other_seed = SamplingParams(n=2, max_new_tokens=12, seed=2)
    for change in ({"params": other_seed}, {"step": 2}, {"indices": [1]}):
        seen += [c.token_ids.tolist() for c in sampler.sample(prompt, **base | change)]
    assert len(set(map(tuple, seen))) == 8
    assert [c.token_ids.tolist() for c in sampler.sample(prompt, **base)] == seen[:2]


# --------------------------------------------------------------------------------------------------- ends and edges


def test_stops_at_every_end_token_and_at_the_limits(llama):
    prompts, params = make_prompts([1, 3]), SamplingParams(n=2, max_new_tokens=20, seed=1)
    free = make_sampler(llama, eos_ids=[]).sample(prompts, params)
    assert all(len(c.token_ids) == 20 and not c.ended for c in free)
    once = SamplingParams(n=2, max_new_tokens=1, seed=1)
    assert [len(c.token_ids) for c in make_sampler(llama).sample(prompts, once)] == [1] * 4
    ends = [int(free[0].token_ids[0]), int(free[1].token_ids[5]), int(free[2].token_ids[9])]  # the first: at once
    for whole, c in zip(free, make_sampler(llama, eos_ids=ends).sample(prompts, params), strict=True):
        stop = next((i for i, token in enumerate(whole.token_ids) if token in ends), None)
        assert c.ended == (stop is not None)
        assert c.token_ids.tolist() == whole.token_ids[: None if stop is None else stop + 1].tolist()
    tight = make_sampler(llama, max_length=4, eos_ids=[]).sample(prompts, params)  # prompts of 1 and 3 tokens
    assert [c.token_ids.tolist() for c in tight] == [c.token_ids[:k].tolist() for c, k in zip(free, [3, 3, 1, 1], strict=True)]
    single = SamplingParams(max_new_tokens=20, seed=1)
    last = make_sampler(llama, eos_ids=[int(free[0].token_ids[19])]).sample(prompts[:1], single)[0]
    assert last.ended  # an end token as the last permitted one is an end


def first_end(ids, seen):
    """A stand-in for stop strings: two even tokens one after the other end a completion."""
    for length in range(max(2, seen + 1), len(ids) + 1):
        if ids[length - 2] % 2 == ids[length - 1] % 2 == 0:
            return length
    return None


def look_every(steps, monkeypatch):
    """Lets the host look only after so many decode steps, as on CUDA."""
    run = Sampler._run
    monkeypatch.setattr(Sampler, "_run", lambda self, temperature: [run(self, temperature) for _ in range(steps)])


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("slots", [2, 5, 64])
def test_completions_are_cut_where_find_end_says(llama, monkeypatch, slots, steps):
    """Whenever the host looks: the first of an end token, find_end's end and the limit, as in whole samples cut by hand."""
    prompts, ends = make_prompts([4, 9, 1, 20, 6, 12]), [3, 5, 7, 9]
    whole = make_sampler(llama, eos_ids=[]).sample(prompts, SamplingParams(n=4, max_new_tokens=18, seed=1))
    look_every(steps, monkeypatch)
    params = SamplingParams(n=4, max_new_tokens=18, seed=1, find_end=first_end)
    cut = make_sampler(llama, slots, eos_ids=ends).sample(prompts, params)
    kinds = set()
    for full, c in zip(whole, cut, strict=True):
        ids = full.token_ids.tolist()
        of_token = next((i + 1 for i, token in enumerate(ids) if token in ends), 99)
        of_text = first_end(ids, 0) or 99
        length = min(of_token, of_text, 18)
        assert c.token_ids.tolist() == ids[:length] and c.done
        torch.testing.assert_close(c.logprobs, full.logprobs[:length], rtol=0, atol=1e-5)
        assert c.ended == (min(of_token, of_text) <= 18)
        kinds.add((of_token == length, of_text == length, length == 18))
    assert len(kinds) >= 3


def test_kept_sequences_are_cut_where_find_end_says(llama, monkeypatch):
    """In flight: the samples are those of one call, and no token is looked at twice."""
    look_every(2, monkeypatch)
    prompts, looked = make_prompts([3, 40, 8, 1, 20, 5, 11, 30]), []

    def watched(ids, seen):
        looked.append(len(ids) - seen)
        return first_end(ids, seen)

    whole = SamplingParams(n=3, max_new_tokens=30, seed=2, find_end=first_end)
    expected = tokens(make_sampler(llama, 6, eos_ids=range(3, 9)).sample(prompts, whole))
    params = SamplingParams(n=3, max_new_tokens=30, seed=2, find_end=watched)
    sampler, collected = make_sampler(llama, 6, eos_ids=range(3, 9)), []
    for indices in (range(5), range(5, 8), (), ()):
        collected += sampler.sample([prompts[i] for i in indices], params, indices=indices, enough=2)
    assert tokens(collected) == expected and not sampler.groups
    assert 0 < max(looked) <= 2


def test_errors_name_the_cause(llama):
    sampler = Sampler(llama.config, 2, 32, [2], "cpu")
    with pytest.raises(ValueError, match="sync"):
        sampler.sample([[1]], SamplingParams(max_new_tokens=4))
    sampler.sync(Policy(llama))
    for arguments, message in [
        ({"prompts": [[3] * 32]}, "prompt 0 has 32 tokens.*--max_length 32"),
        ({"prompts": [[]]}, "prompt 0 has 0 tokens"),
        ({"prompts": [[3], [V]], "indices": [7, 8]}, "prompt 8 has token ids outside the vocabulary of 128"),
        ({"prompts": [[3], [4]], "indices": [5, 5]}, "prompt 5 of step 0 is there twice"),
    ]:
        sampler.groups.clear()
        with pytest.raises(ValueError, match=message):
            sampler.sample(**{"prompts": [[3]], "params": SamplingParams(max_new_tokens=4)} | arguments)
    for arguments, message in [({"temperature": -1}, "temperature"), ({"max_new_tokens": 0}, "max_new_tokens")]:
        with pytest.raises(ValueError, match=message):
            SamplingParams(**{"max_new_tokens": 4} | arguments)
    with pytest.raises(ValueError, match="lower --slots 10000000"):
        Sampler(llama.config, 10**7, 512, [2], "cpu")
    with pytest.raises(ValueError, match="beyond the 512 positions"):
        Sampler(llama.config, 2, 1024, [2], "cpu")
    scaled, stretched = copy.deepcopy(llama.config), copy.deepcopy(llama.config)
    scaled.logit_scale = 0.5
    stretched.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for config, message in [(scaled, "logit_scale"), (stretched, "dynamic")]:
        with pytest.raises(ValueError, match=message):
            Sampler(config, 2, 64, [2], "cpu")
    broken = make(llama.config)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        make_sampler(broken).sample([[3]], SamplingParams(max_new_tokens=4))


@pytest.mark.parametrize("shape", ["samples", "prompts", "kept"])
def test_the_hosts_work_is_linear(llama, monkeypatch, shape):
    """Of one prompt with many samples, of many prompts, and of many that are kept: twice as many, twice the work."""
    counts, amounts = [], (400, 800)

    class Counted(kernels.sampler.Completion):
        @property
        def done(self):
            reads.append(1)
            return self._done

        @done.setter
        def done(self, value):
            self._done = value

    class Groups(dict):
        def __iter__(self):
            reads.extend([1] * len(self))
            return super().__iter__()

        def items(self):
            reads.extend([1] * len(self))
            return super().items()

    monkeypatch.setattr(kernels.sampler, "Completion", Counted)
    for amount in amounts:
        reads = []
        sampler = make_sampler(llama, 64, eos_ids=[])
        sampler.groups = Groups()
        prompts, n = (make_prompts([3]), amount) if shape == "samples" else (make_prompts([3] * amount), 1)
        params = SamplingParams(n=n, max_new_tokens=2)
        done = sampler.sample(prompts, params, enough=amount // 2 if shape == "kept" else None)
        if shape == "kept":
            done += sampler.sample([], params)
        assert len(done) == amount
        counts.append(len(reads))
    assert counts[0] >= amounts[0] and counts[1] < 2.2 * counts[0], counts


def test_prompts_are_prefilled_once(llama, monkeypatch):
    """Eight samples of each of five prompts through three slots: every prompt's tokens but the last pass once."""
    sampler, seen = make_sampler(llama, 3), []
    prefill = sampler._prefill
    monkeypatch.setattr(sampler, "_prefill", lambda sequences: seen.extend(len(ids) for _, ids in sequences) or prefill(sequences))
    sampler.sample(make_prompts([4, 9, 1, 20, 6]), SamplingParams(n=8, max_new_tokens=10))
    assert seen == [3, 8, 0, 19, 5]


# -------------------------------------------------------------------------------------------- kept between two calls


@pytest.mark.parametrize("family", ["olmo3", "gemma3"])
def test_samples_of_a_prompt_that_come_late_find_it_whole(family):
    """In a ring, the first sample may have overwritten the prompt before the last one gets a slot."""
    model = make(tiny_config(family, V, True))
    prompts, params = make_prompts([30, 9, 16]), SamplingParams(n=5, max_new_tokens=30, seed=3)
    few, many = (make_sampler(model, slots).sample(prompts, params) for slots in (2, 15))
    assert tokens(few) == tokens(many)
    for completion in few:
        expected = recompute(model, completion, 1.0)
        torch.testing.assert_close(torch.from_numpy(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_samples_that_were_not_begun_do_not_share_what_others_have_written(llama):
    """Two of three samples were begun, and have gone on beyond the ring; the third needs the prompt."""
    model = make(tiny_config("olmo3", V, True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    params = SamplingParams(n=3, max_new_tokens=40, seed=1)
    kept = make_sampler(model, slots=2, max_length=96, eos_ids=[])
    looks = iter(range(100))
    kept.sample(make_prompts([10]), params, stop=lambda: next(looks) == 30)
    sampler = make_sampler(model, slots=4, max_length=96, eos_ids=[])
    sampler.load_state_dict(kept.state_dict())
    for completion in sampler.sample([], params, step=1):
        expected = recompute(model, completion, 1.0)
        torch.testing.assert_close(torch.from_numpy(completion.logprobs), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("config", "message"), [
    (MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2), "mamba: not every layer keeps keys and values"),
    (StableLmConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4), "does not support stablelm"),
])  # fmt: skip
def test_models_without_keys_in_slots_are_refused(config, message):
    """What they sample would be silently wrong."""
    with pytest.raises(ValueError, match=message):
        Sampler(config, 2, 32, [2], "cpu")


def test_windows_have_rings(llama):
    """Of a sliding window of 16, 16 places, whatever max_length; a layer that sees all has max_length."""
    for family, lengths in [("llama", [96] * 3), ("olmo3", [16, 96, 16]), ("gemma3", [16, 96, 16])]:
        sampler = Sampler(tiny_config(family, V, True), 3, 96, [2], "cpu")
        assert [module.slot_keys.shape[2] for module in sampler.cache.layers] == lengths


@pytest.mark.parametrize("tied", [True, False])
def test_release_gives_all_memory_back(tied):
    """Weights and slots have none; what is kept goes on after the next `sync` as if nothing had been released."""
    model = make(tiny_config("gemma3", V, tied))
    prompts, params = make_prompts([5, 30, 12]), SamplingParams(n=2, max_new_tokens=30, seed=3)
    results = []
    for releases in (False, True):
        sampler = make_sampler(model, slots=3)
        completions = sampler.sample(prompts, params, enough=1)
        tensors = [*sampler.model.parameters(), *sampler.model.buffers(), *sampler.cache.buffers()]
        if releases:
            sampler.release()
            assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0
            sampler.release()  # twice is no error
            with pytest.raises(ValueError, match="sync"):
                sampler.sample([], params)
        sampler.sync(Policy(model))
        completions += sampler.sample([], params)
        assert len(completions) == 6
        results.append(bits(completions))
        same = [*sampler.model.parameters(), *sampler.model.buffers(), *sampler.cache.buffers()]
        assert all(a is b for a, b in zip(tensors, same, strict=True))  # what was compiled for them still holds
    assert results[0] == results[1]


def test_enough_keeps_the_rest_and_goes_on(llama):
    """In-flight: with unchanged weights the samples are those of one call; no prompt is lost or returned twice."""
    prompts, eos = make_prompts([3, 40, 8, 1, 20, 5, 11, 30]), range(2, 8)
    params = SamplingParams(n=3, max_new_tokens=30, seed=2)
    expected = tokens(make_sampler(llama, 6, eos_ids=eos).sample(prompts, params))
    sampler, collected, calls = make_sampler(llama, 6, eos_ids=eos), [], []
    for part in (prompts[:5], prompts[5:], [], []):
        start = sum(calls)
        calls.append(len(part))
        got = sampler.sample(part, params, indices=range(start, start + len(part)), enough=2)
        assert len(got) == 6 and len({c.index for c in got}) == 2 and all(c.done for c in got)
        collected += got
    assert tokens(collected) == expected and not sampler.groups


def test_begun_is_the_step_whose_weights_sampled_the_first_token(llama):
    """Not the step that asked: prompts that have waited for a slot are begun when they get one."""
    sampler, params = make_sampler(llama, 4, eos_ids=[]), SamplingParams(n=2, max_new_tokens=6)
    first = sampler.sample(make_prompts([4] * 6), params, step=7, enough=2)  # four slots: two prompts, all at once
    assert {(c.step, c.begun) for c in first} == {(7, 7)}
    assert {c.begun for group in sampler.groups.values() for c in group} == {None}
    restored = make_sampler(llama, 4, eos_ids=[])
    restored.load_state_dict(sampler.state_dict())
    for each in (sampler, restored):
        assert {(c.step, c.begun) for c in each.sample([], params, step=9, enough=2)} == {(7, 9)}
        *rest, last = each.sample(make_prompts([5]), params, step=10, indices=[6], enough=2), each.sample([], params, step=11)
        assert {(c.step, c.begun) for c in rest[0]} == {(7, 10)} and {(c.step, c.begun) for c in last} == {(10, 11)}


def test_max_staleness_waits_for_what_was_begun_and_not_for_what_was_queued(llama):
    """A long completion, begun in step 0, is waited for in step 2 and not before; the queue behind it never is."""
    ends = lambda ids, seen: 1 if ids[0] != long.token_ids[0] else None  # noqa: E731 (all but one have one token)
    prompts = make_prompts([4, 9, 5, 6, 7, 3, 8, 2, 10, 11])
    whole = SamplingParams(max_new_tokens=30)
    long, *others = make_sampler(llama, 4, eos_ids=[]).sample(prompts, whole)
    assert all(c.token_ids[0] != long.token_ids[0] for c in others)  # of these weights and prompts
    params = SamplingParams(max_new_tokens=30, max_staleness=2, find_end=ends)
    sampler, found, queued = make_sampler(llama, 2, eos_ids=[]), [], []
    for step in range(4):
        found.append({c.index for c in sampler.sample(prompts if step == 0 else [], params, step=step, enough=2)})
        queued.append([c for group in sampler.groups.values() for c in group if c.begun is None])
    assert 0 not in found[0] | found[1] and 0 in found[2] and all(len(indices) == 2 for indices in found)
    assert queued[0]  # asked for in step 0 and not begun in it
    late = SamplingParams(max_new_tokens=30, find_end=ends)
    sampler = make_sampler(llama, 2, eos_ids=[])
    without = [{c.index for c in sampler.sample(prompts if step == 0 else [], late, step=step, enough=2)} for step in range(4)]
    assert 0 not in set().union(*without)
    sampler = make_sampler(llama, 1, eos_ids=[])
    for step in (0, 2, 4):  # one slot: the others have waited for it since step 0, and go on waiting
        sampler.sample(prompts[:5] if step == 0 else [], SamplingParams(max_new_tokens=5, max_staleness=2), step=step, enough=1)
    assert [c.begun for group in sampler.groups.values() for c in group] == [None, None]


def test_kept_sequences_continue_under_new_weights(llama):
    """After `sync`, each token's log-probability is that under the weights that sampled it."""
    other = make(llama.config, seed=1)
    sampler = make_sampler(llama, 8, eos_ids=range(2, 5))
    params = SamplingParams(n=2, max_new_tokens=40, temperature=0.9)
    first = sampler.sample(make_prompts([9, 4, 30, 1, 5, 6]), params, enough=1)
    kept = {id(c): len(c.token_ids) for group in sampler.groups.values() for c in group if not c.done}
    assert sum(length > 0 for length in kept.values()) > 3
    sampler.sync(Policy(other))
    rest = sampler.sample([], params)
    assert len(first) + len(rest) == 12
    mixed = 0
    for c in first + rest:
        switch = kept.get(id(c), len(c.token_ids))
        logprobs = torch.cat([recompute(llama, c, 0.9)[:switch], recompute(other, c, 0.9)[switch:]])
        torch.testing.assert_close(torch.from_numpy(c.logprobs), logprobs, rtol=0, atol=1e-5)
        mixed += 0 < switch < len(c.token_ids)
    assert mixed > 3


def test_new_weights_need_a_new_prefill(llama):
    """A group that had begun when the weights changed: its next samples do not copy keys and values of the old ones."""
    other = make(llama.config, seed=1)
    sampler = make_sampler(llama, 2, eos_ids=[])
    params = SamplingParams(n=3, max_new_tokens=5)
    sampler.sample(make_prompts([9, 12]), params, enough=1)  # all cut off together: of the second prompt one is done
    sampler.sync(Policy(other))
    done, *new = sampler.sample([], params)
    for completion, model in [(done, llama), *((c, other) for c in new)]:
        torch.testing.assert_close(torch.from_numpy(completion.logprobs), recompute(model, completion, 1), rtol=0, atol=1e-5)


def test_state_round_trip_is_exact(llama, tmp_path):
    """Saved between two calls and loaded into another sampler: the same bits follow as without the interruption."""
    other, prompts = make(llama.config, seed=1), make_prompts([9, 4, 30, 1, 12, 12])
    params = SamplingParams(n=2, max_new_tokens=40, temperature=0.9)

    def start():
        sampler = make_sampler(llama, 4, eos_ids=range(2, 6))
        sampler.sample(prompts[:4], params, step=np.int64(1), indices=np.arange(4), enough=2)
        return sampler

    def finish(sampler):
        sampler.sync(Policy(other))
        completions = sampler.sample(prompts[4:], params, step=2, enough=2) + sampler.sample([], params)
        return bits(completions)

    torch.save(start().state_dict(), tmp_path / "state.pt")
    restored = make_sampler(llama, 4, eos_ids=range(2, 6))
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert finish(restored) == finish(start())


# ---------------------------------------------------------------------------------------------------------- sharded


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_world_of_one(family):
    """A process alone under FSDP2: copied bit for bit, before and after a step, and training goes on."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = Policy(make(tiny_config(family, V, True), "packed"))
        sampler = Sampler(policy.model.config, 4, 64, [2], "cpu")
        for layer in policy.model.base_model.layers:
            fully_shard(layer)
        optimizer = torch.optim.SGD(fully_shard(policy).parameters(), lr=0.1)
        for _ in range(2):
            sampler.sync(policy)
            copies = dict(sampler.model.named_parameters())
            for name, tensor in policy.model.named_parameters():
                assert torch.equal(tensor.full_tensor(), copies.pop(name)), name
            assert not copies
            completions = sampler.sample(make_prompts([4, 9]), SamplingParams(n=2, max_new_tokens=8))
            policy(common.pack([sequence(c) for c in completions], "cpu"), 1.0).sum().backward()
            optimizer.step()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # two processes that import everything: 14 to 22 s
def test_sharded_policies_are_copied_whole(tmp_path):
    """On two processes with FSDP2: the copy equals the full weights bit for bit, before and after training steps; ranks
    decode different lengths without collectives; the samples are those of one process."""
    stdout, _ = run("tests/rollouts.py", 2, positional=[tmp_path])
    assert stdout.count("agree") == 2


# ---------------------------------------------------------------------------------------------- scores and top-p


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_a_plain_forward_pass(family):
    model = make(tiny_config(family, V, tied=False))
    sampler = make_sampler(model, slots=3)
    sequences = make_prompts([5, 2, 40, 17, 9, 33, 2])
    for temperature in (1.0, 0.7):
        for ids, scores in zip(sequences, sampler.score(sequences, temperature), strict=True):
            logits = model(torch.tensor([ids])).logits[0, :-1].double() / temperature
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert np.abs(scores - expected.detach().numpy()).max() < 2e-5


def test_score_returns_what_sampling_has_returned():
    sampler = make_sampler(make(tiny_config("gemma2", V, tied=True)), slots=4)
    completions = sampler.sample(make_prompts([4, 9, 3]), SamplingParams(n=3, max_new_tokens=30, temperature=0.8))
    before = [c.token_ids for c in completions]
    scores = sampler.score([np.concatenate([c.prompt_ids, c.token_ids]) for c in completions], 0.8)
    for c, score in zip(completions, scores, strict=True):
        assert np.abs(score[len(c.prompt_ids) - 1 :] - c.logprobs).max() < 1e-4
    again = sampler.sample(make_prompts([4, 9, 3]), SamplingParams(n=3, max_new_tokens=30, temperature=0.8))
    assert all((a == c.token_ids).all() for a, c in zip(before, again, strict=True))  # scoring leaves nothing behind


@pytest.mark.parametrize("sequence", [[5], list(range(3, 100)) * 2, [5, V], [5, -1]])
def test_score_refuses(sequence):
    with pytest.raises(ValueError, match="sequence 1 has"):
        make_sampler(make(tiny_config("llama", V, tied=True))).score([[5, 6], sequence])


def test_top_p_draws_from_the_nucleus_alone():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04]).log().repeat(4000, 1)
    keys = torch.arange(8000, dtype=torch.int32).view(4000, 2)
    rules = kernels.sampler.Rules(1.0, None, torch.tensor([0]), torch.tensor([], dtype=torch.int64))
    for top_p, share in {0.3: [1], 0.5: [1], 0.6: [5 / 9, 2 / 9, 2 / 9], 0.95: [0.5, 0.2, 0.2, 0.06]}.items():
        p = torch.tensor([*share, 0, 0, 0, 0][:5]) / sum(share)
        positions = torch.zeros(4000, dtype=torch.int32)
        tokens, logprobs = kernels.sampler._draw(logits, keys, positions, rules._replace(top_p=top_p))
        counts = tokens.bincount(minlength=5) / 4000
        assert (counts[p == 0] == 0).all()
        assert (counts - p).abs().max() < 4 * 0.5 / 4000**0.5
        assert (logprobs - logits[0, tokens]).abs().max() < 1e-6  # of the whole distribution
    whole, _ = kernels.sampler._draw(logits, keys, positions, rules)
    sampler = make_sampler(make(tiny_config("llama", V, tied=True)))
    greedy = sampler.sample(make_prompts([4]), SamplingParams(max_new_tokens=20, temperature=0))[0].token_ids
    nucleus = sampler.sample(make_prompts([4]), SamplingParams(max_new_tokens=20, top_p=1e-6))[0].token_ids
    assert (greedy == nucleus).all() and set(whole.tolist()) == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(max_new_tokens=1, top_p=0)
