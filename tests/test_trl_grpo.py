"""The loss and gradient of grpo.py and its forks against TRL's GRPOTrainer, where TRL is installed (requirements-bench.txt).

All of TRL's computation is TRL's: a trainer on a tiny model is handed completions, their sampled log-probabilities and
rewards, by its `rollout_func` and reward function. It makes advantages, log-probabilities and batches of them
(`_prepare_inputs`) and the loss (`compute_loss`), before (`several` false) or after the policy has moved. All that is
pretended is that vLLM has sampled, so that it corrects for that. Both compute in float32.

TRL 1.16's names for our flags, and where its definitions are others:

    loss_type                       grpo: forks/sequence_mean.py; dapo and bnpo: grpo.py; dr_grpo: forks/dr_grpo.py. bnpo
                                    averages over each forward pass, and is the same for one pass in a step only
    epsilon, epsilon_high           --clip_low, --clip_high; by default 0.2 both
    importance_sampling_level       token: grpo.py; sequence: forks/gspo.py
    scale_rewards                   True, its default: --normalize_std. The same ddof of 1, and 1e-4 added to the std
    beta                            --kl_beta, but by default TRL multiplies k3 by the ratio (use_bias_correction_kl),
                                    and the gradient is another one even where the ratio is 1. We have GRPO's k3
    vllm_importance_sampling_mode   token_truncate: --tis_cap. Its default, sequence_mask, leaves out whole completions

Groups whose rewards are equal stay in TRL's batch and its denominators, as in ours with --active_sampling 0 only. Of
several minibatches of a batch TRL makes each from completions of all groups, and dapo divides by their mean number of
tokens; ours hold whole groups, and each is divided by its own number. These are not compared, nor is `batch` of
scale_rewards.
"""

import copy
import dataclasses
from itertools import groupby

import numpy as np
import pytest
import torch
from conftest import ALONE
from forked import forked
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
import grpo

trl = pytest.importorskip("trl", reason="TRL is not installed (requirements-bench.txt)")

GROUPS, SIZE, LONGEST = 4, 4, 12
FORK = {"grpo": ["sequence_mean"], "bnpo": [], "dapo": [], "dr_grpo": ["dr_grpo"]}  # of a loss_type
MAIN = grpo.Args(model="", data=[], out="", max_new_tokens=LONGEST + 4, group_size=SIZE, tis_cap=0.0)


@pytest.fixture(scope="module")
def start(tiny_model, tmp_path_factory):
    """Folder of the reference model, weights of π_old and π, and samples: prompts, completions and rewards."""
    folder, random = tmp_path_factory.mktemp("trl_grpo"), np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.get_input_embeddings().weight.data *= 10  # far from uniform, so that ratios get out of their bounds
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = [model.state_dict()]
    for _ in range(2):
        weights.append({k: v + 0.3 * (v.std() + 0.01) * torch.randn_like(v) for k, v in weights[-1].items()})
    samples = []
    for group in range(GROUPS):
        prompt = random.integers(3, 500, random.integers(2, 9))
        for _ in range(SIZE):
            completion = random.integers(3, 500, random.integers(1, LONGEST + 1))
            ids, trained = np.concatenate([prompt, completion]), np.arange(len(prompt) + len(completion)) >= len(prompt)
            reward = 1.0 if group == 2 else float(random.integers(0, 5)) / 4  # group 2 has nothing to learn from
            samples.append(grpo.Sample(group, group, 0, ids, trained, 0 * ids, True, "", reward, None))
    policy = load(folder, weights[1])
    set_logprobs(MAIN, samples, "behaviour_logprobs", policy)
    for s in samples:
        s.behaviour_logprobs = s.behaviour_logprobs + random.normal(0, 0.5, s.trained.sum())
    return folder, weights, samples


def load(folder, weights):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="packed")
    model.load_state_dict(weights)
    return grpo.Policy(model)


def set_logprobs(args, samples, name, policy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "dist", ALONE)
        grpo.annotate(args, samples, name, lambda batch: policy(batch, args.temperature)[0], "cpu")


def loss_of_ours(start, script, args, several, monkeypatch):
    """(loss, {name: gradient}, [tokens clipped below, above, at --tis_cap]) of grpo.py, or of what forks make of it."""
    monkeypatch.setattr(script, "dist", ALONE)
    folder, (first, old, new), samples = start
    policy, reference = load(folder, old), load(folder, first)
    samples = copy.deepcopy(samples)
    for _, group in groupby(samples, lambda sample: sample.position):
        script.set_advantages(args, list(group))
    script.set_loss_weights(args, samples)
    extras = ["behaviour_logprobs", "advantages", "loss_weight"]
    if several:
        extras += ["old_logprobs"]
        set_logprobs(args, samples, "old_logprobs", policy)
        policy.model.load_state_dict(new)
    if args.kl_beta:
        extras += ["ref_logprobs"]
        set_logprobs(args, samples, "ref_logprobs", reference)
    total, bounded = 0.0, np.zeros(3)
    for indices in script.deal(args, samples):
        microbatch = common.pack([samples[i].columns(*extras) for i in indices], "cpu", *extras)
        logprobs, _ = policy(microbatch, args.temperature)
        losses, metrics = script.policy_loss(args, logprobs, microbatch)
        loss = (losses * microbatch.extras["loss_weight"]).sum()
        loss.backward()
        total += loss.item()
        clipped, advantage = metrics["clipfrac"], microbatch.extras["advantages"]
        bounds = clipped * (advantage < 0), clipped * (advantage > 0), metrics["tis_capped"]
        bounded += [values.sum().item() for values in bounds]
    return total, {name: p.grad for name, p in policy.model.named_parameters()}, bounded


def loss_of_trl(start, args, level, several, passes, out, **special):
    """(loss, {name: gradient}) of GRPOTrainer. passes: gradient accumulation steps."""
    from datasets import Dataset

    folder, (_, old, new), samples = start
    prompts = [[int(i) for i in s.input_ids[~s.trained]] for s in samples]

    def rollout(texts, trainer):
        assert texts == rows["prompt"]
        completions = [[int(i) for i in s.input_ids[s.trained]] for s in samples]
        logprobs = [s.behaviour_logprobs.tolist() for s in samples]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": logprobs}

    def reward(prompts, **_):
        return [s.reward for s in samples]

    rows = {"prompt": [f"{s.position}" for s in samples]}
    config = trl.GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=len(samples) // passes, gradient_accumulation_steps=passes,
        num_iterations=2 if several else 1, num_generations=SIZE, max_completion_length=args.max_new_tokens, beta=args.kl_beta,
        epsilon=args.clip_low, epsilon_high=args.clip_high, importance_sampling_level=level,
        scale_rewards="group" if args.normalize_std else "none", temperature=args.temperature,
        use_bias_correction_kl=False, vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=args.tis_cap or 2.0, bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to="none", model_init_kwargs={"dtype": "float32"}, **special,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        str(folder), reward, args=config, train_dataset=Dataset.from_dict(rows), rollout_func=rollout
    )
    trainer.use_vllm, trainer._last_loaded_step = bool(args.tis_cap), trainer.state.global_step
    trainer.current_gradient_accumulation_steps = passes  # as the training loop does
    trainer.model.load_state_dict(old)
    trainer.model.train()
    generated, total = [{"prompt": text} for text in rows["prompt"]], 0.0
    for trainer._step in range(passes):
        inputs = trainer._prepare_inputs(generated)
        assert ("old_per_token_logps" in inputs) == (several or bool(args.tis_cap))
        assert ("importance_sampling_ratio" in inputs) == bool(args.tis_cap)
        if several and trainer._step == 0:
            trainer.model.load_state_dict(new)
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in trainer.model.named_parameters()}


CASES = [
    {"loss_type": form, "several": several, "ratio": ratio, "kl_beta": beta}
    for form in ("grpo", "dapo", "dr_grpo")
    for several in (False, True)
    for ratio in ("token", "sequence")
    for beta in (0.0, 0.3)
]
for several in (False, True):
    CASES += [{"loss_type": form, "several": several, "tis_cap": 1.3} for form in FORK]
    CASES += [{"loss_type": form, "several": several, "passes": 4} for form in ("grpo", "dapo", "dr_grpo")]
CASES += [{"loss_type": "grpo", "several": True, "ratio": "sequence", "tis_cap": 1.3, "kl_beta": 0.3}]
CASES += [{"loss_type": form, "several": True, "normalize_std": True} for form in FORK]
CASES += [{"loss_type": form, "several": True, "temperature": 0.7, "kl_beta": 0.3} for form in ("grpo", "dapo")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()))
def test_grpo_equals_trl(start, case, tmp_path, monkeypatch):
    case = {"passes": 1} | case
    form, several, passes = case.pop("loss_type"), case.pop("several"), case.pop("passes")
    level = case.pop("ratio", "token")
    script = forked(*FORK[form], *(["gspo"] if level == "sequence" else []))
    clip = {"clip_low": 0.03, "clip_high": 0.05} if level == "sequence" else {}
    packing = {"tokens_per_microbatch": 8192 if passes == 1 else 50}
    args = dataclasses.replace(MAIN, **clip, **packing, **case)
    loss, gradient, (below, above, capped) = loss_of_ours(start, script, args, several, monkeypatch)
    loss_trl, gradient_trl = loss_of_trl(start, args, level, several, passes, tmp_path, loss_type=form)
    assert (min(below, above) >= 5) if several else (below == above == 0)
    assert capped >= 5 or not args.tis_cap
    assert loss == pytest.approx(loss_trl, rel=1e-5, abs=5e-8)  # grpo's first is 0: advantages add up to that
    assert gradient.keys() == gradient_trl.keys()
    errors = {
        name: ((g - gradient_trl[name]).norm() / gradient_trl[name].norm()).item() for name, g in gradient.items()
    }
    assert max(errors.values()) <= 1e-5, errors
