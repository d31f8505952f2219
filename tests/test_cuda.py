"""What only CUDA exercises: compiled kernels, varlen attention, CUDA graphs, bf16 under FSDP2. `make test-cuda` runs them.

Elsewhere they are skipped. `CUDA_TESTS=dry` runs them on the CPU all the same, which proves nothing about a GPU but finds
what would stop them there.
"""

import copy
import os
import re

import lawless  # noqa: F401 (registers verifiers)
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import assistant, tokenizer_folder, user, write_jsonl
from launch import call, metrics
from test_kernels import tiny_config
from test_sampler import make_prompts, sequence
from test_slots import definition, definition_as_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

import common
import grpo
import kernels.attention
import kernels.slots
import ppo_rlvr
import sft
from kernels.head import linear_cross_entropy, linear_logprobs
from kernels.sampler import Sampler, SamplingParams

DRY = os.environ.get("CUDA_TESTS") == "dry"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not DRY, reason="needs CUDA: make test-cuda")
BF16 = torch.bfloat16


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize(("heads", "shared"), [(8, 8), (8, 2)])
def test_varlen_attention_and_its_gradient(heads, shared, window):
    """bf16 varlen against the loop over sequences in float64, with grouped queries and sliding windows."""
    torch.manual_seed(0)
    lengths = [1, 3, 64, 65, 130]
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)
    query, key, value = (torch.randn(1, n, sum(lengths), 64, device=DEVICE, dtype=BF16) for n in (heads, shared, shared))
    results = []
    for function, dtype in ((kernels.attention.packed_attention, BF16), (kernels.attention.packed_attention_loop, torch.float64)):
        tensors = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        output, _ = function(None, *tensors, sliding_window=window, cu_seq_lens_q=starts, max_length_q=max(lengths))
        output.float().square().sum().backward()
        results.append([output.detach(), *(x.grad for x in tensors)])
    assert all(relative(a, b) < 2e-2 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma2", "gemma3"])
def test_whole_models_in_bf16(family):
    """Hidden states of packed attention as near to float64's as those of eager attention in bf16 are."""
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(tiny_config(family, 128, True), attn_implementation="packed_loop").double().to(DEVICE)
    sequences = [(np.arange(n) % 128, np.ones(n, dtype=bool)) for n in (40, 7, 23)]
    inputs = common.pack(sequences, DEVICE).model_inputs()
    outputs = []
    for attention in ("packed", "packed_loop"):
        config = copy.deepcopy(exact.config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=BF16).to(DEVICE)
        model.load_state_dict(exact.state_dict())
        outputs.append(model.base_model(**inputs).last_hidden_state)
    truth = exact.base_model(**inputs).last_hidden_state
    errors = [relative(output, truth) for output in outputs]
    assert errors[0] < 1.5 * errors[1] + 1e-3 and errors[1] < 0.1


@pytest.mark.parametrize("V", [128, 5003, 100278, 128256, 128264])
def test_the_compiled_head(V):
    """Large vocabularies, one no multiple of anything: bf16 operands, float64 truth; untrained tokens cost nothing."""
    torch.manual_seed(0)
    hidden = (torch.randn(96, 256, device=DEVICE) * 3).to(BF16).requires_grad_()
    weight = (torch.randn(V, 256, device=DEVICE) / 16).to(BF16).requires_grad_()
    targets = torch.randint(V, (96,), device=DEVICE)
    targets[::3] = -100
    trained = targets != -100
    logits = hidden[trained].double() @ weight.double().T
    expected = logits.log_softmax(-1).gather(1, targets[trained, None])[:, 0]
    exact = torch.autograd.grad(-expected.sum(), (hidden, weight))
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    assert (logprobs[trained].double() - expected).abs().max() < 1e-4 and not logprobs[~trained].any()
    exact_entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    assert (entropy[trained].double() - exact_entropy).abs().max() < 1e-3
    for loss in (-logprobs.sum(), linear_cross_entropy(hidden, weight, targets)):
        assert loss.item() == pytest.approx(-expected.sum().item(), rel=1e-5)
        assert all(relative(a, b) < 1e-2 for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True))


# ------------------------------------------------------------------------------------------------------------- sampler


def check_gap(policy, completion):
    """Sampled log-probabilities equal those of one packed pass, up to bf16's rounding."""
    logprobs, _ = policy(common.pack([sequence(completion)], DEVICE), 1.0)
    gap = np.abs(logprobs[logprobs != 0].float().detach().cpu().numpy() - completion.logprobs).max()
    assert gap < (0.2 if DEVICE == "cuda" else 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma2", "gemma3"])
def test_graphs_sample_what_the_model_would(family):
    """Log-probabilities out of the graph equal those of one packed pass; other slots change hardly any token."""
    torch.manual_seed(0)
    config = tiny_config(family, 128, True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=BF16 if DEVICE == "cuda" else None).to(DEVICE)
    policy, prompts, found = grpo.Policy(model), make_prompts([5, 30, 1, 12, 12, 40, 2]), []
    params = SamplingParams(n=3, max_new_tokens=40, seed=1)
    for slots in (3, 16):
        sampler = Sampler(config, slots, 128, [2], DEVICE)
        for again in range(3):  # the second time the graphs are there, the third time they are captured again
            if again == 2:
                sampler.release()
            sampler.sync(policy)
            completions = sampler.sample(prompts, params)
        found.append({(c.index, c.sample): c.token_ids.tolist() for c in completions})
        for c in completions:
            check_gap(policy, c)
    same = np.mean([found[0][key][0] == found[1][key][0] for key in found[0]])
    assert same > 0.8  # in bf16 near ties may fall either way


@pytest.mark.parametrize(("n", "Hq", "Hkv", "D"), [(64, 12, 2, 128), (3, 32, 8, 128), (256, 16, 16, 64)])
def test_attention_over_slots_at_real_shapes(n, Hq, Hkv, D):
    """The compiled kernel with one and many splits, against float64 over the same slots."""
    n, L = (2, 70) if DRY else (n, 700)
    torch.manual_seed(0)
    query = torch.randn(n, Hq, D, device=DEVICE, dtype=BF16)
    keys, values = torch.randn(2, n, Hkv, L, D, device=DEVICE, dtype=BF16)
    positions = torch.randint(L, (n,), device=DEVICE)
    function = definition_as_kernel if DRY else kernels.slots._partial_attention
    for window in (None, 33):
        expected = definition(*(x.cpu() for x in (query, keys, values, positions)), D**-0.5, window, None)
        q, k, v = (x.float() if DRY else x for x in (query, keys, values))
        partial, logsumexp = function(q, [k, v], positions, D**-0.5, window or L, 0.0)
        assert relative((partial * logsumexp.softmax(2)[..., None]).sum(2).cpu(), expected) < 1e-2


def test_graphs_are_few_and_follow_new_weights():
    """After `sync`, graphs that were captured before it decode with the new weights: buffers stay where they are."""
    config = tiny_config("llama", 128, True)
    prompts, sampler = make_prompts([5, 30, 1, 12]), Sampler(config, 64, 128, [], DEVICE)
    for seed in range(3):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=BF16 if DEVICE == "cuda" else None)
        policy = grpo.Policy(model.to(DEVICE))
        sampler.sync(policy)
        for c in sampler.sample(prompts, SamplingParams(n=8, max_new_tokens=20, seed=seed)):
            check_gap(policy, c)
    assert DEVICE == "cpu" or len(sampler.graphs) <= len(sampler.sizes) == 2


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), "tulu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, attention_dropout=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"messages": [user(f"{i} + {i}?"), assistant(f"It is {2 * i}.")]} for i in range(64)]
    return {
        "model": folder / "model", "data": [write_jsonl(folder / "train.jsonl", rows)], "max_length": 64, "batch_size": 8, "lr": 3e-3,
        "steps": 12, "epochs": 9, "save_every": 0,
    }  # fmt: skip


def losses(out):
    return [line["loss"] for line in metrics(out) if line["step"]]


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """Attention dropout needs the loop; it is what the CUDA random state is for."""
    out = tmp_path_factory.mktemp("reference") / "run"
    call(sft, out=out, **start | {"attn": "packed_loop"})
    return out


def test_a_run_learns_and_exports(reference):
    assert losses(reference)[-1] < 0.75 * losses(reference)[0]
    exported = AutoModelForCausalLM.from_pretrained(reference / "model")
    assert exported.dtype == torch.float32 and all(p.isfinite().all() for p in exported.parameters())


def test_master_weights_are_float32_and_computation_is_bf16(start, monkeypatch):
    seen = []

    def watched(self, microbatch):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state
        seen.append((hidden.dtype, self.model.get_output_embeddings().weight.dtype))
        return linear_cross_entropy(hidden[0], self.model.get_output_embeddings().weight, microbatch.targets)

    monkeypatch.setattr(sft.Policy, "forward", watched)
    args = sft.Args(**{k: str(v) if k == "model" else v for k, v in start.items()}, out="", attn="packed_loop")
    device, mesh = sft.setup_distributed(args)
    try:
        policy = sft.load_model(args, common.load_config(args), AutoModelForCausalLM, sft.Policy, device, mesh)
        optimizer = sft.make_optimizer(args, policy)
        policy(common.pack([(np.arange(9), np.arange(9) > 3)], device)).backward()
        optimizer.step()
        assert sft.all_sum(torch.ones((), device=device), 2) == [1.0, 2.0]  # a world of one, over NCCL on CUDA
        assert set(seen) == {(BF16, BF16) if DEVICE == "cuda" else (torch.float32, torch.float32)}
        assert {p.dtype for p in policy.parameters()} == {p.grad.dtype for p in policy.parameters()} == {torch.float32}
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    finally:
        dist.destroy_process_group()


@pytest.fixture
def without_dropout(start, tmp_path):
    """The same start, from a model that has none."""
    AutoModelForCausalLM.from_pretrained(start["model"], attention_dropout=0.0).save_pretrained(tmp_path / "model")
    common.load_tokenizer(start["model"]).save_pretrained(tmp_path / "model")
    return start | {"model": tmp_path / "model"}


@pytest.mark.parametrize("flags", [{"activation_checkpointing": True}, {"tokens_per_microbatch": 100}, {"compile": True}], ids=str)
def test_how_it_is_computed_changes_little(without_dropout, tmp_path, flags):
    """bf16: the first losses agree to its rounding. Without dropout, which other microbatches would draw anew."""
    if DRY and "compile" in flags:
        pytest.skip("compiling takes minutes on a CPU; the slow suite has it")
    call(sft, out=tmp_path / "plain", **without_dropout)
    call(sft, out=tmp_path / "run", **without_dropout | flags)
    np.testing.assert_allclose(losses(tmp_path / "run")[:4], losses(tmp_path / "plain")[:4], rtol=1e-2)


@pytest.mark.skipif(DRY, reason="tests/test_rehearsal.py has what a CPU can show of it")
def test_compiled_layers_have_no_break_and_few_shapes(without_dropout, tmp_path):
    """Microbatches of many lengths under FSDP2: few graphs serve them all, so torch.compile does not give up."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    call(sft, out=tmp_path / "run", **without_dropout | {"compile": True, "tokens_per_microbatch": 60})
    assert not counters["graph_break"] and 0 < counters["stats"]["unique_graphs"] <= 3


def test_a_run_continues_with_its_dropout(start, reference, tmp_path, monkeypatch):
    """Stopped after step 6 and continued: the course of the run that was not, dropout included, up to atomics."""
    save = sft.Run.save

    def stops(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(sft.Run, "save", stops)
    flags = start | {"attn": "packed_loop", "save_every": 6}
    with pytest.raises(KeyboardInterrupt):
        call(sft, out=tmp_path / "run", **flags)
    monkeypatch.setattr(sft.Run, "save", save)
    call(sft, out=tmp_path / "run", **flags)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(reference), rtol=1e-3)


@pytest.mark.parametrize("script", [grpo, ppo_rlvr])
def test_reinforcement_learning(start, tmp_path, script, capfd):
    """Rollouts by graphs, the reference out of host memory, several updates: finite, on-policy, and a known gap."""
    rows = [{"messages": [user(f"{i}?")], "dataset": "small", "ground_truth": "5"} for i in range(32)]
    flags = start | {"data": [write_jsonl(tmp_path / "train.jsonl", rows)], "max_new_tokens": 16, "steps": 4, "minibatches": 2, "kl_beta": 0.05,
                     "verifier_workers": 1, "batch_size": 16, "lr": 1e-3}  # fmt: skip
    flags |= {"value_model": None, "zero_value_head": True} if script is ppo_rlvr else {"active_sampling": 0}
    call(script, out=tmp_path / "run", **flags)
    lines = metrics(tmp_path / "run")
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert abs(lines[0]["ref_kl"]) < 1e-2 and lines[0]["behaviour_kl"] < 1e-2
    gap = float(re.search(r"recomputed log-probability: (\S+)", "".join(capfd.readouterr())).group(1))
    assert gap < (0.2 if DEVICE == "cuda" else 1e-4)


def test_weights_change_places_and_come_back(start):
    """`other_weights`: other weights inside, the very same afterwards; also where a forward has gathered the outermost ones."""
    args = ppo_rlvr.Args(**{k: str(v) if k == "model" else v for k, v in start.items()}, out="")
    device, mesh = ppo_rlvr.setup_distributed(args)
    try:
        policy = ppo_rlvr.load_model(args, common.load_config(args), AutoModelForCausalLM, ppo_rlvr.Policy, device, mesh).eval()
        other = [shard + 1.0 for shard in ppo_rlvr.weights_on_host(policy)]
        before, microbatch = ppo_rlvr.weights_on_host(policy), common.pack([(np.arange(9), np.arange(9) > 3)], device)
        with torch.no_grad():
            first, _ = policy(microbatch, 1.0)
            with ppo_rlvr.other_weights(policy, other):
                inside, _ = policy(microbatch, 1.0)
            again, _ = policy(microbatch, 1.0)
        policy.reshard()
        assert torch.equal(first, again) and not torch.equal(first, inside)
        assert all(torch.equal(a, b) for a, b in zip(before, ppo_rlvr.weights_on_host(policy), strict=True))
    finally:
        dist.destroy_process_group()
