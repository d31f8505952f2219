"""Group relative policy optimisation with verifiable rewards: sample, judge, and make the better answers likelier.

For a prompt x the policy samples a group of G completions y, and verifiers give each a reward r, from 0 to 1. With
--reward_model_coef, that times a reward model's score is added; with --no_eos_score, a completion without end token
gets that instead; one that could not be judged leaves its group. The advantage of a completion is how much its reward
exceeds the group's mean. It is the advantage A_t of all its tokens:

    A_i = r_i - mean_j r_j                     A_t = A_i for the tokens y_t of completion i                      (1)
    ρ_t = π(y_t | x, y_<t) / π_old(y_t | x, y_<t)                                                                (2)
    w_t = min(π_old(y_t | x, y_<t) / π_behaviour(y_t | x, y_<t), C)                                              (3)
    L = Σ_t [ -w_t min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t)  +  β KL_t ]  /  Σ_t 1                     (4)
    KL_t = π_ref / π - log(π_ref / π) - 1                                       (k3 of Schulman 2020)            (5)

π_old is the policy before the first update of the batch. π_behaviour is what the tokens were sampled from: π_old with
the sampler's rounding or, with --inflight, an older policy; w corrects for that, up to C. All policies are at
--temperature.

Both sums run over the completion tokens of a minibatch, on all ranks; a minibatch is a part, by default all, of the
groups that are kept. By default a batch gets one update. Then π is π_old, ρ is 1, the gradient of ρ is that of log π,
and the clip never acts. --minibatches and --passes above 1 give several updates. π_ref is --model.

A group whose rewards by the verifiers are all equal is left out (not with --reward_model, whose scores differ), and
sampling goes on until the batch is full, for at most --active_sampling rounds. If it is not full then, the step's
learning rate is as much smaller. With --active_sampling 0 such groups stay, and their tokens count in the sums of (4).

`set_advantages` has (1); `policy_loss` (2), (3), (5) and the terms of (4); `set_loss_weights` the denominator of (4),
and `main` its sum.

The objective and its numbers are OLMo 3's (arXiv 2512.13961), which are GRPO (arXiv 2402.03300) without its division by
the group's standard deviation (as Dr. GRPO, arXiv 2503.20783) and without its KL term, and with the higher ε_high,
token-level mean and active sampling of DAPO (arXiv 2503.14476). Model and prompts are those of Tülu 3.1, meant
for eight 80 GB cards. Tülu 3.1's objective: --normalize_std --kl_beta 0.01 --clip_high 0.2 --tis_cap 0
--active_sampling 0 --batch_size 48 --group_size 16 --minibatches 2 --lr 5e-7.

    torchrun --nproc_per_node 8 grpo.py                                           Tülu 3.1 8B on eight GPUs, by FSDP2
    python grpo.py --model DIR --data rows.jsonl --out runs/mine                  one process, CPU or GPU

A row is {"messages": ..., "dataset": the verifier's name, "ground_truth": ...}; see rewards/. A run that was
killed goes on from its last checkpoint when the same command is given again.

Shapes:  T tokens of a microbatch, whose sequences lie end to end without padding; H hidden size, V vocabulary size, G
group size, N tokens of a completion.
"""

import contextlib
import copy
import ctypes
import dataclasses
import faulthandler
import functools
import gc
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common
import kernels.attention  # noqa: F401  (registers the attention functions that --attn names)
from kernels.head import linear_logprobs
from rewards.environment import JudgedCompletion, Rollouts, RowJobs, differ, flatten, rewards_differ, rollout_metrics


@dataclass
class Args:
    # the algorithm
    no_eos_score: float | None = None  # score of a completion without end token; None: scored like the others
    reward_model: str | None = None  # folder or Hub id of a reward model; needs --reward_model_coef
    reward_model_coef: float = 0.0  # adds this times a reward model's score; in ppo_rlvr.py by --value_model as loaded
    group_size: int = 8  # G, completions sampled for each prompt
    temperature: float = 1.0  # of sampling, and of the policy that is trained
    normalize_std: bool = False  # divide advantages by the standard deviation of the group's rewards
    active_sampling: int = 8  # most rounds of sampling to fill a batch with groups that differ; 0: one round, keep all
    clip_low: float = 0.2  # ε_low of equation (4)
    clip_high: float = 0.272  # ε_high of equation (4)
    tis_cap: float = 2.0  # C of equation (3), of truncated importance sampling; 0 sets w = 1
    kl_beta: float = 0.0  # β of the KL to π_ref, which is --model: in the loss (grpo.py), in the rewards (ppo_rlvr.py)
    minibatches: int = 1  # optimizer steps in one pass over a batch
    passes: int = 1  # passes over a batch
    lr: float = 1e-6  # peak learning rate
    lr_schedule: Literal["linear", "cosine", "constant"] = "constant"  # decay to 0 after the warm-up, or none
    warmup_ratio: float = 0.0  # share of the steps over which the learning rate rises from 0
    adam_betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay rates of the gradient's mean and square
    adam_eps: float = 1e-8  # AdamW's ε, added to the root of that mean square
    weight_decay: float = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: float = 1.0  # clip the gradient to this norm; 0 does not clip
    batch_size: int = 64  # rows (conversations, pairs or prompts) per step, over all ranks and microbatches
    epochs: float = 1.0  # passes over the training data
    steps: int | None = None  # stop after this many steps, if that is sooner
    max_length: int = 4096  # longest sequence, in tokens
    max_new_tokens: int = 2048  # longest completion; a prompt without room for it in --max_length is dropped (counted)
    stop_strings: list[str] = field(default_factory=list)  # a completion also ends once its text has one: "</answer>"

    # sampling and judging
    solved: float | None = None  # a prompt is not drawn again once its group earns this share of the highest reward
    slots: int | None = None  # sequences sampled at a time by a rank; same samples. None: what fits, on a CPU 64
    sample_tp: int = 1  # ranks that share one copy of the weights for sampling, which may be too large for one GPU
    inflight: int = 0  # prompts begun beyond a batch; what is unfinished when a batch is full goes on in the next step
    max_staleness: int = 4  # with --inflight: a step does wait for what was begun so many steps ago
    max_logprob_gap: float | None = None  # most mean |sampler's - trainer's log π| at first; None: 1e-4, 0.05 in bf16
    rewards: list[str] = field(default_factory=list)  # files or modules of yours that define verifiers: my_rewards.py
    verifier: list[str] = field(default_factory=list)
    """NAME[:WEIGHT] of the verifiers of all rows; by default a row's column `dataset` names them, or if it has none, it
    is judged by all that --rewards defines"""
    audit: bool = True  # leave out code rows whose tests a program that does nothing passes, or their solution fails
    verifier_workers: int | None = None  # processes of each rank that judge; by default its share of the cores
    sandbox: Literal["full", "weak"] = "full"  # for model-written code; weak: without what this Linux lacks
    eval_samples: int = 1  # completions of each held-out prompt, for pass@k
    eval_temperature: float = 1.0  # of held-out completions; 0 takes the likeliest token
    pass_threshold: float = 1.0  # share of the highest reward with which a held-out completion passes, for pass@k
    log_samples: int = 8  # completions of each step that are written to samples.jsonl

    # the run: every script has these
    model: str = "allenai/Llama-3.1-Tulu-3-8B-DPO"  # model folder or Hub id to start from
    data: list[str] = field(default_factory=lambda: ["allenai/RLVR-GSM-MATH-IF-Mixed-Constraints"])
    """training data: SOURCE[:AMOUNT] ...; SOURCE is a .jsonl/.json/.parquet/.csv file, a folder or Hub id, and @split;
    AMOUNT a fraction of its rows ("0.5", "2.0" repeats) or a count ("1000")"""
    eval_data: list[str] = field(default_factory=list)  # held-out data, in the same form
    out: str = "runs/grpo"  # folder of the run; the same command continues an interrupted run in it
    chat_template: str | None = None  # tulu, chatml or a Jinja file; by default the tokenizer's own
    content_tokens: list[str] = field(default_factory=list)
    """control tokens that stay tokens where assistant content has them ("<think>" "</think>"); others become text"""
    max_skip_frac: float = 0.01  # refuse to start when a larger share of a source's rows is unusable
    seed: int = 1  # decides the order of the data and everything else that is random
    eval_every: int = 100  # steps between evaluations on --eval_data (also before the first and after the last)
    save_every: int = 25  # steps between checkpoints; 0 saves none but the final model
    stop_step: int | None = None  # save and stop after this many steps; the same command without it goes on
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    best: str | None = None  # held-out metric, "eval_loss": OUT/best has the model where it was best, too
    tokens_per_microbatch: int = 8192  # most in a forward pass of one rank; a longer row goes alone; same loss
    activation_checkpointing: bool = True  # recompute each layer in the backward: less memory, about a quarter slower
    compile: bool = False  # torch.compile each decoder layer
    attn: Literal["packed", "packed_fa", "packed_loop"] = "packed"  # PyTorch's, flash-attn's, one sequence at a time
    deterministic: bool = False  # PyTorch's deterministic algorithms, for the same bits again on a GPU too; slower
    shard: Literal["full", "hybrid"] = "full"  # parameters over all ranks, or within a node and replicated over nodes
    track: bool = False  # log to Weights & Biases (offline unless logged in)


class Policy(torch.nn.Module):
    """A causal language model that maps a packed microbatch to the log-probability of each target, without logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch, temperature):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
        head = self.model.get_output_embeddings().weight  # (V, H)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2 has one
        logprobs, entropy = linear_logprobs(hidden, head, microbatch.targets, temperature, softcap, microbatch.trained)
        return logprobs.clone(), entropy.detach().clone()  # (T,), (T,) 0 without a target; FSDP2 warns of views


@dataclass
class Sample(JudgedCompletion):  # has reward, ended, behaviour_logprobs (N,), and trained: where its N tokens are
    """A judged completion of N tokens, and what the loss needs to know of them."""

    old_logprobs: np.ndarray | None = None  # (N,) log π_old
    ref_logprobs: np.ndarray | None = None  # (N,) log π_ref
    rm_scores: np.ndarray | None = None  # (N,) by the reward model, if any; the last is that of the completion
    advantages: float | None = None  # A_i; packing repeats it for each of the N tokens
    loss_weight: float = 0.0  # of each of its tokens in the sum of (4): 1 / Σ_t 1

    def to_log(self):  # in samples.jsonl
        return {"advantage": self.advantages}


def completion_reward(args, sample):
    """r of a completion."""
    if args.no_eos_score is not None and not sample.ended:
        return args.no_eos_score
    if args.reward_model_coef:
        return sample.reward + args.reward_model_coef * sample.rm_scores[-1]
    return sample.reward


def has_signal(args, group):
    """Whether the rewards of a group differ. Those of a reward model always do."""
    return len(group) > 1 if args.reward_model else rewards_differ(group)


def set_advantages(args, group):
    """Equation (1) for the G samples of a prompt."""
    rewards = np.array([completion_reward(args, sample) for sample in group])  # (G,)
    advantages = rewards - rewards.mean()  # (G,)                                                                (1)
    if not differ(rewards):
        advantages[:] = 0  # exactly: equal numbers, and their mean, may be off by a rounding
    elif args.normalize_std:
        advantages /= rewards.std(ddof=1) + 1e-4
    for sample, advantage in zip(group, advantages, strict=True):
        sample.advantages = advantage


def set_loss_weights(args, minibatch):
    """The denominator of equation (4). minibatch: its samples, of all ranks."""
    total = sum(sample.trained.sum() for sample in minibatch)  # Σ_t 1                                           (4)
    for sample in minibatch:
        sample.loss_weight = 1 / total  # packing repeats it for each token of the completion


def policy_loss(args, logprobs, microbatch):
    """Equations (2) to (5) for T tokens, before the sum.

    Args:
        logprobs: (T,) log π(y_t | x, y_<t), with gradient.
        microbatch: its extras hold the other numbers, (T,) each, 0 where nothing is trained.

    Returns:
        losses (T,), and {metric: (T,)}; both 0 where nothing is trained.
    """
    trained = microbatch.targets != common.IGNORE  # (T,)
    advantages = microbatch.extras["advantages"]  # (T,)
    if "old_logprobs" in microbatch.extras:
        old_logprobs = microbatch.extras["old_logprobs"]  # (T,)
    else:
        old_logprobs = logprobs.detach()  # (T,) the only update of a batch: π is π_old
    logratio = logprobs - old_logprobs  # (T,)
    ratio = logratio.exp()  # (T,)                                                                               (2)
    behaviour_ratio = (old_logprobs - microbatch.extras["behaviour_logprobs"]).exp()  # (T,)
    w = behaviour_ratio.clamp(max=args.tis_cap) if args.tis_cap else 1.0  # (T,)                                 (3)
    clipped_ratio = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)  # (T,)
    losses = -w * torch.min(ratio * advantages, clipped_ratio * advantages)  # (T,)                              (4)
    # Where the clip acts, and the term of (4) has no gradient.
    too_high = (advantages > 0) & (ratio > 1 + args.clip_high)  # (T,)
    too_low = (advantages < 0) & (ratio < 1 - args.clip_low)  # (T,)
    metrics = {
        "ratio": ratio,
        "clipfrac": too_high | too_low,
        "approx_kl": ratio - 1 - logratio,  # KL(π_old || π), by k3 as in (5)
        "behaviour_kl": behaviour_ratio - 1 - behaviour_ratio.log(),
        "tis_capped": behaviour_ratio > (args.tis_cap or math.inf),
    }
    if "ref_logprobs" in microbatch.extras:
        log_ref_ratio = microbatch.extras["ref_logprobs"] - logprobs  # (T,) log(π_ref / π)
        kl = log_ref_ratio.exp() - log_ref_ratio - 1  # (T,) ≥ 0; its mean over samples of π is KL(π || π_ref)   (5)
        losses = losses + args.kl_beta * kl  # (T,)                                                              (4)
        metrics["ref_kl"] = kl
    return losses * trained, {name: (values * trained).detach() for name, values in metrics.items()}


def main(args):
    # Processes, data, models. What is neither imported nor defined above is defined below.
    device, mesh = setup_distributed(args)
    world = dist.get_world_size()
    check_flags(args)
    config = common.load_config(args)
    config.update({name: 0.0 for name in config.to_dict() if "dropout" in name})  # off: the sampler has none
    tokenizer = common.load_tokenizer(args.model, args.chat_template)
    day = on_rank0(lambda: common.start_date(args.out))  # for templates that print it: a run keeps that of its start
    chat = common.ChatFormat(tokenizer, args.content_tokens, day)
    jobs = RowJobs(args.rewards, args.verifier, args.audit)  # who judges a row
    encode = common.PromptEncoder(chat, config.vocab_size, args.max_length - args.max_new_tokens, "drop", jobs)
    rows, eval_rows = common.load_data(args, encode, at_least=args.batch_size)
    total_rows = math.ceil(args.epochs * len(rows))  # prompts of the run; active sampling takes more of the data
    num_steps = math.ceil(total_rows / args.batch_size)
    if args.steps is not None:
        num_steps = min(num_steps, args.steps)
    run = Run(args, chat, rows, eval_rows, num_steps)
    if run.is_finished:
        return
    rollouts = Rollouts(args, chat, rows, eval_rows, Sample, run.signals)
    policy = load_model(args, config, AutoModelForCausalLM, Policy, device, mesh)
    reference = weights_on_host(policy) if args.kl_beta else None  # π_ref: before run.resume loads other weights
    reward_model = load_reward_model(args, config, chat, device, mesh) if args.reward_model else None
    rollouts.make_sampler(config, device, policy)  # after the models, because it looks how much memory is left
    optimizer = make_optimizer(args, policy)
    rollouts.load_state_dicts(run.resume(policy, optimizer))
    if run.is_eval_due(0):
        run.log({"step": 0, **rollouts.evaluate(policy, eval_rows, 0)})

    def policy_logprobs(microbatch):
        return policy(microbatch, args.temperature)[0]  # (T,)

    for step in range(run.first_step, run.end_step):  # to the last, or to --stop_step
        if rollouts.are_all_solved():
            break  # nothing is left to learn from: the run is finished
        run.begin(step)  # starts the clock, seeds what is random

        # Sample groups (prompts → completions → rewards) until a batch of them has rewards that differ, by more than
        # rounding. All ranks get the same: `groups` to learn from, and all that were `sampled`.
        state_before = rollouts.state_dict()
        rollouts.sync(policy)
        groups, sampled = rollouts.sample_batch(step, functools.partial(has_signal, args), args.active_sampling)
        if run.is_stopping():  # the rollout is given up; the same command makes it again
            run.leave(step, policy, optimizer, state_before)  # exits
        rollout_seconds = run.speed(0)["seconds"]

        # What the loss needs to know of each token: A, 1 / Σ_t 1 and, where needed, log π_old and log π_ref.
        samples = flatten(groups)
        if reward_model:
            # A score stands at the token itself, and is read one position before it: there the token is predicted.
            annotate(args, samples, "rm_scores", lambda microbatch: reward_model(microbatch).roll(-1), device)
        for group in groups:
            set_advantages(args, group)
        minibatches = [flatten(part) for part in split(groups, args.minibatches)]  # lists of samples
        for minibatch in minibatches:
            set_loss_weights(args, minibatch)
        names = ["behaviour_logprobs", "advantages", "loss_weight"]
        several_updates = args.passes * len(minibatches) > 1
        if several_updates:  # otherwise π is π_old
            names.append("old_logprobs")
        if several_updates or step == run.first_step:
            annotate(args, samples, "old_logprobs", policy_logprobs, device)
        if step == run.first_step:
            rollouts.check_gap(samples, step)  # do sampler and trainer agree about log π?
        if reference:
            names.append("ref_logprobs")
            with other_weights(policy, reference):
                annotate(args, samples, "ref_logprobs", policy_logprobs, device)

        # Learn: one update for each minibatch in each pass. Each rank takes its share of it, in as many microbatches as
        # every other rank (FSDP2 needs that), and adds up the gradients of their losses. reduce_once: with
        # --shard hybrid, nodes exchange them after the last.
        share = len(groups) / args.batch_size  # AdamW's step is no smaller for a smaller batch: its learning rate is
        lr = learning_rate(args, step, num_steps) * share
        for group in optimizer.param_groups:
            group["lr"] = lr
        updates = []  # metrics of each
        for minibatch in minibatches * args.passes:  # the same ones in every pass
            sums = Sums()
            for places in reduce_once(deal(args, minibatch), policy):  # places in the minibatch: one microbatch
                # Their tokens end to end, T in all. Of each name, microbatch.extras has a number for each token.
                microbatch = common.pack([minibatch[i].columns(*names) for i in places], device, *names)
                logprobs, entropy = policy(microbatch, args.temperature)  # (T,), (T,)
                losses, metrics = policy_loss(args, logprobs, microbatch)  # (T,)
                loss = (losses * microbatch.extras["loss_weight"]).sum()  # () part of L                         (4)
                (loss * world).backward()  # FSDP averages gradients over ranks: undo its 1 / world
                trained = microbatch.targets != common.IGNORE  # (T,)
                sums.add(loss=loss, trained_tokens=trained, entropy=entropy, **metrics)
            update = sums.over_ranks()  # the sums of all parts: update["loss"] is L
            update["grad_norm"] = clip_gradient(args, policy)
            row_numbers = [sample.row for sample in minibatch]
            run.check_finite(step, update["loss"], update["grad_norm"], row_numbers)
            optimizer.step()
            optimizer.zero_grad()
            updates.append(update)

        # Log, evaluate, save.
        entry = {"step": step + 1, "lr": lr, **rollouts.counts()}
        entry.update(rollout_metrics(groups, sampled, step))
        entry.update(mean_of_updates(updates))
        entry.update(run.speed(sum(len(sample.input_ids) for sample in flatten(sampled))))
        entry["rollout_seconds"] = rollout_seconds
        if reward_model and samples:
            entry["rm_score"] = float(np.mean([sample.rm_scores[-1] for sample in samples]))
        rollouts.write(step + 1, sampled)
        if run.is_eval_due(step + 1):
            entry.update(rollouts.evaluate(policy, eval_rows, step + 1))
        run.log(entry)
        run.save_if_due(step + 1, policy, optimizer, rollouts.state_dict())

    rollouts.close()
    run.finish(policy)  # publishes OUT/model, but not at --stop_step


# ---------------------------------------------------------------------------------------------------------------------
# Around the loss.


def check_flags(args):
    """Raises RunError for flags of reinforcement learning that are out of range, or cannot work together."""
    most = common.LARGEST
    ranges = {
        "group_size": (2, most),  # one has nothing to be compared with
        **dict.fromkeys(("passes", "slots", "sample_tp", "max_staleness"), (1, most)),
        **dict.fromkeys(("verifier_workers", "eval_samples"), (1, most)),
        **dict.fromkeys(("reward_model_coef", "active_sampling", "tis_cap", "kl_beta"), (0, most)),
        **dict.fromkeys(("inflight", "eval_temperature", "log_samples"), (0, most)),
        "minibatches": (1, args.batch_size), "max_new_tokens": (1, args.max_length - 1),
        "clip_low": (0, 1), "solved": (0, 1), "pass_threshold": (0, 1),
    }  # fmt: skip
    above_zero = {"temperature", "clip_low", "clip_high", "solved", "pass_threshold", "max_logprob_gap"}
    common.check_ranges(args, ranges, above_zero)
    if args.sample_tp > 1 and dist.get_world_size() % args.sample_tp:
        raise common.RunError(f"--sample_tp {args.sample_tp} does not divide the {dist.get_world_size()} processes")
    if bool(args.reward_model) != bool(args.reward_model_coef):
        raise common.RunError("--reward_model and --reward_model_coef go together: the folder, and a factor above 0")
    if "" in args.stop_strings:
        raise common.RunError("--stop_strings has an empty string, which every completion has")


def split(items, parts):
    """Lists of nearly one length, so many or, of fewer items, as many as there are items."""
    cuts = np.array_split(np.arange(len(items)), parts)
    return [[items[i] for i in cut] for cut in cuts if len(cut)]


def deal(args, samples):
    """This rank's share of the samples: a list of microbatches, each a list of places in `samples`."""
    lengths = [len(sample.input_ids) for sample in samples]
    return common.deal(lengths, args.tokens_per_microbatch, dist.get_world_size())[dist.get_rank()]


@torch.no_grad()
def annotate(args, samples, name, forward, device):
    """Sets an attribute of every sample to what `forward` says of its N tokens, (N,). Ranks share the work.

    Args:
        forward: packed microbatch → (T,). As in the loss, position t is about the token that comes after it.
    """
    mine = {}  # place in `samples`: (N,)
    for places in deal(args, samples):
        microbatch = common.pack([samples[i].columns() for i in places], device)
        numbers = forward(microbatch).double().cpu().numpy()  # (T,)
        end = 0  # of a sample in the microbatch
        for i in places:
            end += len(samples[i].input_ids)
            length = samples[i].trained.sum()  # N
            mine[i] = numbers[end - 1 - length : end - 1]  # each one position before its token
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    for share in everybody:
        for i, numbers in share.items():
            setattr(samples[i], name, numbers)


def weights_on_host(module):
    """This rank's shards of all parameters, in host memory, which is pinned where there is a GPU."""
    shards = [parameter.detach().to_local() for parameter in module.parameters()]
    is_pinned = torch.cuda.is_available()  # each at once: a copy that is not would take as much memory again
    return [torch.empty_like(shard, device="cpu", pin_memory=is_pinned).copy_(shard) for shard in shards]


@contextlib.contextmanager
def other_weights(module, shards):
    """Inside, the module has the weights of `weights_on_host`, which holds the module's meanwhile.

    They change places one shard at a time, so it takes the memory of one shard.
    """

    def exchange():
        module.reshard()  # a forward leaves the outermost module's parameters gathered
        for parameter, shard in zip(module.parameters(), shards, strict=True):
            own = parameter.detach().to_local()
            kept = own.clone()
            own.copy_(shard)
            shard.copy_(kept)

    exchange()
    yield
    exchange()


def mean_of_updates(updates):
    """Metrics of a step: losses and gradient norms as means over its updates, all others as means over their tokens."""
    if not updates:  # no group was kept: there is nothing to learn from
        return {"loss": 0.0, "grad_norm": 0.0}
    tokens = sum(update["trained_tokens"] for update in updates)
    means = {}
    for name in updates[0]:
        total = sum(update[name] for update in updates)
        is_of_update = name.endswith("loss") or name.endswith("grad_norm")
        means[name] = total / (len(updates) if is_of_update else tokens)
    del means["trained_tokens"]
    return means


class TokenScores(torch.nn.Module):
    """A model with a score head, for rewards or values: position t, with the tokens up to t read, holds its number."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
        head = self.model.score.weight[0]  # (H,)
        return hidden.float() @ head.float()  # (T,) in float32 also where hidden states are bf16


def load_reward_model(args, policy_config, chat, device, mesh):
    """The model of --reward_model. Raises RunError if it is no reward model, or has another vocabulary than --model."""
    args = dataclasses.replace(args, model=args.reward_model)
    config = common.load_config(args)
    vocabulary = common.load_tokenizer(args.model, "chatml").get_vocab()  # its own template plays no part
    if config.vocab_size != policy_config.vocab_size or vocabulary != chat.tokenizer.get_vocab():
        raise common.RunError(f"--reward_model {args.model} has another vocabulary than --model")
    if "ForSequenceClassification" not in str(config.architectures):
        raise common.RunError(f"--reward_model {args.model} is no reward model: reward_model.py trains one")
    config.update({name: 0.0 for name in config.to_dict() if "dropout" in name})  # off, as in the policy
    config.num_labels = 1
    return load_model(args, config, AutoModelForSequenceClassification, TokenScores, device, mesh)


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: optimizer, sums, processes, models, files. Nobody has to read it: the same text in every script, by design.


def make_optimizer(args, module):
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=args.adam_betas, eps=args.adam_eps, fused=True)


def learning_rate(args, step, num_steps):
    """Learning rate of `step` (from 0): linear warm-up, then the schedule down to 0. A pure function of the step."""
    warmup = math.ceil(args.warmup_ratio * num_steps)
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    shapes = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    return args.lr * shapes[args.lr_schedule]


def reduce_once(microbatches, *modules):
    """The microbatches of an update. Only in the last one's backward --shard hybrid adds up gradients between nodes."""
    for number, microbatch in enumerate(microbatches, 1):
        for module in modules:
            module.set_requires_all_reduce(number == len(microbatches))
        yield microbatch


def clip_gradient(args, module):
    """Clips the gradient, over all ranks, to --max_grad_norm. Returns its norm before."""
    return torch.nn.utils.clip_grad_norm_(module.parameters(), args.max_grad_norm or math.inf).full_tensor().item()


class Sums:
    """Sums of named numbers over a rank's microbatches, then over ranks. All ranks add the same names in one order."""

    def __init__(self):
        self.values = {}

    def add(self, **tensors):
        """Adds to each name the sum of its tensor, of any shape."""
        for name, tensor in tensors.items():
            self.values[name] = self.values.get(name, 0) + tensor.detach().sum()

    def over_ranks(self, count=1):
        """{name: sum / count}, as floats."""
        return {name: total / count for name, total in zip(self.values, all_sum(*self.values.values()), strict=True)}


def all_sum(*values):
    """Sums of scalars (numbers or tensors) over all ranks, as floats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(sums)
    return sums.tolist()


def leave_at_once(number, frame):
    """Signal handler for when there is nothing to save: what is on disk is whole at any moment."""
    if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
        os.write(2, b"\ninterrupted: the same command goes on from the last checkpoint\n")
    os._exit(128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM))


def setup_distributed(args):
    """Joins the processes torchrun started (or makes a world of one). Returns this rank's device and the FSDP mesh."""
    common.check_ranges(args, common.RANGES)
    faulthandler.register(signal.SIGUSR2)  # kill -USR2 prints where a process hangs
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave_at_once)
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1"
    if tasks != "1" and "RANK" not in os.environ:
        raise common.RunError(f"{tasks} tasks would be {tasks} runs: start one a node, and in it torchrun (see README)")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with torchrun, whose store still answers:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))).close()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # microbatches differ: no fragments
    if args.deterministic:
        common.make_deterministic()  # before CUDA starts
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **alone)
    world = dist.get_world_size()
    if args.batch_size % world and not vars(args).get("batch_tokens"):
        raise common.RunError(f"--batch_size {args.batch_size} is not divisible by the {world} processes")
    torch.manual_seed(args.seed)  # of a new score head; what a step draws is seeded by Run.begin
    if args.shard == "full":
        return device, init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return device, init_device_mesh(device.type, (world // node, node), mesh_dim_names=("replicate", "shard"))


def on_rank0(function):
    """Calls `function` on rank 0 alone. Every rank gets its result, or raises its error."""
    box = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (common.RunError, OSError, ValueError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise common.RunError(box[1])
    return box[0]


def load_model(args, config, model_class, module_class, device, mesh):
    """module_class(model), sharded by FSDP2: float32 parameters, on CUDA bf16 compute. Rank 0 alone reads the files."""
    gc.collect()  # FSDP's hooks make cycles: a model that was dropped is still in memory
    weights = {}
    on_rank0(lambda: weights.update(common.read_weights(args.model, config, model_class)))  # and no result
    with torch.device("meta"):
        model = model_class.from_config(copy.deepcopy(config), attn_implementation=args.attn, dtype=torch.float32)
    if args.activation_checkpointing:
        older = getattr(model, "gradient_checkpointing_enable", None)  # its name before transformers 5.2
        getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (None, None)  # compute, gradient sums
    precision = MixedPrecisionPolicy(*dtypes, cast_forward_inputs=False)  # rotary tables stay float32, as when sampling
    torch._dynamo.config.recompile_limit = 64  # graphs of a layer: kinds, shapes, gradient or none; then it gives up
    for layer in model.base_model.layers:
        if args.compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    module = fully_shard(module_class(model), mesh=mesh, mp_policy=precision)
    module.to_empty(device=device)
    model.tie_weights()
    for name, buffer in model.named_non_persistent_buffers():
        if dist.get_rank() == 0:
            buffer.copy_(weights.pop(name))
        dist.broadcast(buffer, src=0)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(model, weights, options=options)
    return module.train()


# Flags that may differ when a run is continued: they do not change what is computed.
RUNTIME_FLAGS = {"out", "eval_data", "eval_every", "eval_samples", "eval_temperature", "pass_threshold", "log_samples",
                 "track", "keep", "stop_step", "tokens_per_microbatch", "activation_checkpointing", "attn", "answers",
                 "verifier_workers", "compile", "deterministic", "shard", "save_every", "sample_tp",
                 "best"}  # fmt: skip


class Run:
    """The folder of a run: where it goes on, what it logs, what it saves. RunError if it is not this command's."""

    def __init__(self, args, chat, rows, eval_rows, num_steps):
        self.args = args
        self.chat = chat
        self.rows = rows
        self.eval_rows = eval_rows
        self.num_steps = num_steps
        self.end_step = num_steps if args.stop_step is None else min(num_steps, args.stop_step)
        self.out = Path(args.out)
        self.is_rank0 = dist.get_rank() == 0
        self.wandb, self.signals = None, []  # signals: SIGTERM, SIGUSR1: finish the step, save, exit
        self.is_finished = on_rank0(self._open)
        if not self.is_finished:
            self.first_step = self._find_whole_checkpoint()
            on_rank0(lambda: common.prepare_run(self.out, self.config, self.first_step))

    def _open(self):
        """Locks the folder while this process lives, compares it with this command. Returns whether it is finished."""
        self.lock, old = common.lock_run(self.out)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "datasets")}
        self.config = {
            "script": Path(__file__).name, "commit": commit.stdout.strip() or None, "versions": versions,
            "args": common.redact(dataclasses.asdict(self.args)), "steps": self.num_steps, "date": self.chat.date,
            **common.describe_data(self.rows, self.eval_rows),
            "world_size": dist.get_world_size(), "process": f"process {os.getpid()} on {socket.gethostname()}",
        }  # fmt: skip
        is_done = (self.out / "model" / "config.json").exists()
        if not is_done and not common.checkpoints(self.out):
            return False  # there is nothing to lose
        new = json.loads(json.dumps(self.config))  # tuples become lists, as in the file
        longer = {"epochs", "steps"} if self.args.lr_schedule == "constant" and not self.args.warmup_ratio else set()
        pairs = [("script", old["script"], new["script"]), ("data", old["data"][0], new["data"][0])]
        pairs += [(flag, old["args"].get(flag, value), value) for flag, value in new["args"].items()]
        changed = [f"{name}: {a} → {b}" for name, a, b in pairs if a != b and name not in RUNTIME_FLAGS | longer]
        reached = old["steps"] if is_done else max(common.checkpoints(self.out))
        if reached > self.num_steps:
            changed.append(f"steps: {reached} → {self.num_steps}")
        if changed:
            raise common.RunError(f"{self.out} holds another run ({'; '.join(changed)}): choose another --out")
        if is_done and reached == self.num_steps:
            print(f"{self.out} is finished: its model is {self.out}/model")
            return True
        if is_done:  # with fewer steps
            (self.out / "model").rename(self.out / f"model_of_{reached}_steps")
        return False

    def _hash(self, folder, names):
        """{name: SHA-256} of files in a folder, of the `names` of all ranks: each reads its own."""
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, {name: common.hash_file(folder / name) for name in names})
        return {name: digest for share in shares for name, digest in share.items()}

    def _find_whole_checkpoint(self):
        """The step of the newest checkpoint that is as it was written, or 0. Damaged ones become step_N.damaged."""
        for step, folder in reversed(on_rank0(lambda: common.checkpoints(self.out)).items()):
            hashes = self._hash(folder, common.files_in(folder)[dist.get_rank() :: dist.get_world_size()])
            if not on_rank0(functools.partial(common.set_aside_if_damaged, folder, hashes)):
                return step
        if any(self.out.glob("checkpoints/*.damaged")):
            raise common.RunError(f"{self.out}/checkpoints has only damaged ones: to begin anew, choose another --out")
        return 0

    def resume(self, module, optimizer):
        """Loads the newest checkpoint, on any number of ranks. Returns the `state` that each rank of then has saved."""
        self.model, states = module.model, []
        if self.first_step:
            path = common.checkpoints(self.out)[self.first_step]
            weights, moments = dcp_state.get_state_dict(module, optimizer)
            dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path / "state")
            dcp_state.set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=moments)
            states = torch.load(path / "states.pt", weights_only=True)
            if len(states) != dist.get_world_size() and self.is_rank0:
                print(f"the number of processes has changed, it was {len(states)}: what dropout draws will differ")
        self.bar = tqdm(total=self.num_steps, initial=self.first_step, disable=not (self.is_rank0 and os.isatty(2)))
        self.next_line = 0.0  # without a terminal there is no bar, but a line every ten seconds
        if self.args.track and self.is_rank0:
            self.wandb = common.start_wandb(self.out, self.config)
        return states

    def begin(self, step):
        """Starts the clock. What a step draws (dropout) is a function of (seed, step, rank): no state to save."""
        for number in (signal.SIGTERM, signal.SIGUSR1):  # until now there was nothing to save
            signal.signal(number, lambda number, frame, signals=self.signals: signals.append(number))
        self.started = time.perf_counter()
        seed = np.random.SeedSequence([self.args.seed, step, dist.get_rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))

    def speed(self, tokens):
        """Metrics of a step that has processed so many tokens until now."""
        seconds = time.perf_counter() - self.started
        metrics = {"tokens": int(tokens), "tokens_per_second": int(tokens) / seconds, "seconds": seconds}
        return metrics | common.hardware_metrics(self.model, int(tokens) / seconds / dist.get_world_size())

    def check_finite(self, step, loss, grad_norm, indices):
        """Stops before the optimizer step if the loss or the gradient is not finite; names the step and its rows."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            names = "; ".join(self.rows.where(i) for i in indices[:8])
            what = f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; stopped before the update."
            raise common.RunError(f"{what} The {len(indices)} rows of this batch begin with: {names}")
        if grad_norm == 0 and self.is_rank0:
            tqdm.write(f"WARNING step {step + 1}: the gradient is exactly 0, so nothing is learned")

    def is_eval_due(self, done):
        """Whether to evaluate after so many steps: before the first, every --eval_every steps and after the last."""
        if self.eval_rows is None or not self.args.eval_every or (done == 0 and self.first_step > 0):
            return False
        return done % self.args.eval_every == 0 or done == self.num_steps

    def log(self, entry):
        """On rank 0: appends to metrics.jsonl, moves the progress bar and feeds W&B. RunError if it is not finite."""
        common.check_entry(entry)
        if self.args.best and any(name.startswith("eval_") for name in entry):
            self._keep_if_best(entry)
        if not self.is_rank0:
            return
        with writing(self.out / "metrics.jsonl") as path, open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        text = common.progress_text(entry)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(entry["step"] - self.bar.n)
        if self.bar.disable and (time.monotonic() > self.next_line or entry["step"] == self.num_steps):
            self.next_line = time.monotonic() + 10
            print(f"step {entry['step']} of {self.num_steps}: {text}", flush=True)
        if self.wandb:
            common.log_to_wandb(self.wandb, entry, self.out)

    def _keep_if_best(self, entry):
        """Makes the model OUT/best/step_N, if --best says so of this entry."""
        if on_rank0(lambda: common.is_best(self.out, self.args.best, entry)):
            with writing(self.out / "best.tmp") as partial:
                export_model(self.args, self.model, self.chat, partial)
                on_rank0(lambda: common.publish_best(partial, self.args.best, entry))

    def is_stopping(self):
        """Whether any rank was sent SIGTERM or SIGUSR1. All ranks ask together."""
        return all_sum(len(self.signals))[0] > 0

    def save_if_due(self, done, module, optimizer, state=None):
        """After so many steps: saves every --save_every steps and at --stop_step; after SIGTERM at once, and exits."""
        if done == self.num_steps:
            return  # `finish` comes next
        if self.is_stopping():
            self.leave(done, module, optimizer, state)
        if done == self.end_step or (self.args.save_every and done % self.args.save_every == 0):
            self.save(done, module, optimizer, state)

    def leave(self, done, module, optimizer, state=None):
        """Saves what was reached after so many steps, and exits with 143: the same command continues."""
        if done > self.first_step and done not in common.checkpoints(self.out):
            self.save(done, module, optimizer, state)
        self._close()
        sys.exit(128 + signal.SIGTERM)

    def save(self, done, module, optimizer, state=None):
        """Makes checkpoints/step_N, by renaming it when it is whole and on disk: what `resume` loads, and model/."""
        final = self.out / "checkpoints" / f"step_{done}"
        umask = os.umask(0o077)  # nobody else may write what will be loaded
        with writing(final.with_suffix(".tmp")) as partial:
            on_rank0(partial.mkdir)
            weights, moments = dcp_state.get_state_dict(module, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial / "state")
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, state)
            if self.is_rank0:
                torch.save(states, partial / "states.pt")
            export_model(self.args, module.model, self.chat, partial / "model")
            hashes = self._hash(partial, common.files_of_rank(partial, dist.get_rank()))
            if self.is_rank0:
                (partial / "sums.json").write_text(json.dumps({"checkpoint": final.name, "files": hashes}))
            common.sync_to_disk(partial)
        os.umask(umask)
        dist.barrier()  # all ranks have written their files

        def publish():
            common.sync_to_disk(partial.rename(final).parent, deep=False)
            for old in list(common.checkpoints(self.out).values())[: -self.args.keep]:
                shutil.rmtree(old.rename(old.with_suffix(".trash")))  # renamed first: there is never half a step_N

        on_rank0(publish)

    def finish(self, module):
        """Publishes the final model as OUT/model, which marks the run as finished; not at --stop_step."""
        text = f"stopped at --stop_step {self.end_step}: the same command without it goes on"
        if self.end_step == self.num_steps:
            with writing(self.out / "model.tmp") as partial:
                export_model(self.args, module.model, self.chat, partial)
                if self.is_rank0:
                    common.sync_to_disk(partial)
                    partial.rename(self.out / "model")
                    text = common.summary(self.out)
        self._close()
        if self.is_rank0:
            print(text, flush=True)
            self.lock.release()
        dist.destroy_process_group()

    def _close(self):
        self.bar.close()
        if self.wandb:
            self.wandb.finish()


def export_model(args, model, chat, path):
    """Writes a folder that from_pretrained opens: weights in the source model's precision, tokenizer, chat template."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:  # which alone has them
        names = dict(model.named_parameters()) | dict(model.named_buffers())  # a tied head appears once
        weights = {name: weights[name] for name in names if name in weights}
        common.write_model(path, args.model, model, weights, chat)
    dist.barrier()


@contextlib.contextmanager
def writing(path):
    """Yields the path. Errors of the disk inside become a RunError that names it and the free space."""
    try:
        yield path
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        free = shutil.disk_usage(path.parent).free
        raise common.RunError(f"writing {path} failed, {free:,} bytes free: {reason}") from None


def parse_args():
    """Args from the command line. --help prints the docstring, and the table of flags as it stands in this file."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        table = inspect.getsource(Args).replace("field(default_factory=list)", "[]").partition("class Args:\n")[2]
        table = re.sub(r"field\(default_factory=lambda: (.*)\)$", r"\1", table, flags=re.MULTILINE)
        table = re.sub(r"^    (\w+):", r"    --\1:", table, flags=re.MULTILINE)
        print(__doc__, "Flags: --name: type = default. A bool: --no_name too. A list: --name a b.", table, sep="\n")
        sys.exit()
    if any(word.replace("-", "_").startswith("__learning_rate") for word in sys.argv):
        raise common.RunError("--learning_rate is called --lr here; --help shows all flags")
    return tyro.cli(Args, use_underscores=True, console_outputs=os.environ.get("RANK", "0") == "0")


if __name__ == "__main__":
    code = 0
    try:
        record(main)(parse_args())  # record: torchrun's summary tells the error, too
    except SystemExit as end:
        code = end.code or 0
    except (common.RunError, OSError) as error:
        code = 1
        if os.environ.get("RANK", "0") == "0":
            tqdm.write(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    if code and "RANK" in os.environ:  # torchrun ends all when one ends: rank 0 speaks first, but all may
        time.sleep(1 if os.environ["RANK"] == "0" else 3)
    os._exit(code)  # at once: while Python takes itself down, a thread of the process group now and then aborts it
