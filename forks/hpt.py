"""Hybrid post-training (HPT, arXiv 2509.04419): a demonstration in place of a group that is not solved.

    of the G completions of a prompt more than `gate` are right:  the group is learned from, as in (4)
    otherwise:                                                    -log π of the demonstration's tokens, and no group
    L = [mean over tokens of groups as in (4)]  +  κ [mean over tokens of demonstrations]               in place of (4)

A group in which all are wrong teaches nothing; here it gives way to an answer that somebody has written. κ is
--sft_coef. The equations are those of the authors' code (TsinghuaC3I/Unify-Post-Training, mix_trainer.py and
mix_actor.py). Their scripts have the gate at 0 for Qwen and at 2 for Llama.

A row has a further column "demonstration": the answer, as text. It is taken whole, however long it is.

    python forks/make.py hpt > my_grpo.py
"""

import dataclasses
from dataclasses import dataclass

import datasets
import numpy as np
import torch

import common

BASE = "grpo.py"
# ruff: noqa: F821 (what is not defined here, the script defines)

LINES = {
    "common.PromptEncoder(": "DemonstrationEncoder(",
    "advantages: float | None = None": (
        "demonstrated: bool = False  # a demonstration: nobody has sampled it\nadvantages: float | None = None"
    ),
    "samples = flatten(groups)": (
        "groups = [demonstrate(args, rows, group, step) for group in groups]\nsamples = flatten(groups)\n"
        "demonstrations = [sample for sample in samples if sample.demonstrated]\n"
        'annotate(args, demonstrations, "behaviour_logprobs", policy_logprobs, device)  # as if π_old had sampled them'
    ),
    '"advantages", "loss_weight"]': '"advantages", "loss_weight", "demonstrated"]',
    "losses, metrics = policy_loss(": "losses, metrics = mixed_loss(",
}


@dataclass
class Args:
    gate: int = 0  # a prompt of whose completions no more are right is learned from its demonstration
    sft_coef: float = 1.0  # κ: weight of the demonstrations' mean


class DemonstrationEncoder(common.PromptEncoder):
    """As common.PromptEncoder, and the token ids of the row's `demonstration`, with its end token."""

    features = {**common.PromptEncoder.features, "demonstration": datasets.List(datasets.Value("int32"))}
    needs_mask = True

    def __call__(self, row):
        """Raises ValueError and Skip."""
        columns = super().__call__(row)
        if not isinstance(row.get("demonstration"), str):
            raise ValueError(f"demonstration is {row.get('demonstration')!r}, expected a string: the answer")
        messages = common.read_conversation(row, needs_answer=False)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        messages = [*messages, {"role": "assistant", "content": row["demonstration"]}]
        ids, trained = self.chat.encode(messages, common.parse_tools(row), True, common.read_options(row))
        begin = int(np.argmax(trained))
        if list(ids[:begin]) != list(columns["input_ids"]):
            raise common.Skip("the chat template renders the prompt otherwise when an answer follows")
        return columns | {"demonstration": ids[begin:]}


def is_unsolved(args, group):
    """Whether no more than --gate of a group are right."""
    return sum(sample.passes(1.0) for sample in group) <= args.gate


def has_signal(args, group):
    """Whether there is something to learn: from the group, or from the demonstration."""
    return is_unsolved(args, group) or (len(group) > 1 if args.reward_model else rewards_differ(group))


def demonstrate(args, rows, group, step):
    """The group; or, if it is not solved, a group of the demonstration alone."""
    if not is_unsolved(args, group):
        return group
    prompt = group[0].input_ids[~group[0].trained]
    answer = np.array(rows.table[group[0].row]["demonstration"])
    input_ids = np.concatenate([prompt, answer])
    trained = np.arange(len(input_ids)) >= len(prompt)
    return [dataclasses.replace(group[0], input_ids=input_ids, trained=trained, begun=step, demonstrated=True)]


def set_loss_weights(args, minibatch):
    """The denominators of two means, one over the tokens of groups, one over those of demonstrations."""
    for kind, coef in ((False, 1.0), (True, args.sft_coef)):
        samples = [sample for sample in minibatch if sample.demonstrated == kind]
        total = sum(sample.trained.sum() for sample in samples)
        for sample in samples:
            sample.loss_weight = coef / total  #                                                                 (4)


def mixed_loss(args, logprobs, microbatch):
    """`policy_loss`, and -log π where a token is a demonstration's."""
    losses, metrics = policy_loss(args, logprobs, microbatch)  # (T,)
    is_demonstrated = microbatch.extras["demonstrated"] > 0  # (T,)
    return torch.where(is_demonstrated, -logprobs, losses), metrics  #                                           (4)
