"""Kahneman-Tversky optimisation (KTO, arXiv 2402.01306): answers that are good or bad, without pairs.

    h(x, y) = log [π(y | x) / π_ref(y | x)]
    z       = max(0, mean over the batch of h(x_i, y_j)),  y_j an answer to another prompt: stands for KL(π || π_ref)
    L       = mean over rows of  λ_D (1 - σ(β (h - z))) if good,  λ_U (1 - σ(β (z - h))) if bad        in place of (3)

No gradient flows through z. It is a mean over the whole batch, all ranks and microbatches, so a step has a forward pass
over the mismatched answers before the one that learns. y_j is the answer of the row half the data further on. The
equations and defaults are those of the authors' code (ContextualAI/HALOs, train/trainers.py, KTOTrainer), which takes z
over a microbatch of all ranks and makes mismatched answers within it.

A row is {"prompt" or "messages", "completion", "label": true or false}; without a completion, the answer is the last of
the messages. Where one kind of rows is rare, its weight λ can make up for it.

    python forks/make.py kto > my_kto.py
"""

from dataclasses import dataclass

import datasets
import numpy as np
import torch

import common

BASE = "dpo.py"
# ruff: noqa: F821 (what is not defined here, the script defines)

LINES = {
    "common.PairEncoder(": "UnpairedEncoder(",
    "total_rows = math": (
        "rows, eval_rows = (data and UnpairedRows(**vars(data)) for data in (rows, eval_rows))\ntotal_rows = math"
    ),
    "deal(rows.lengths[missing]": "deal(2 * rows.lengths[missing]",
    # A step: z first, then the answers themselves.
    "total_rows)  # the batch's pairs": "total_rows)\nz = batch_kl(args, policy, rows, indices, ref_logprobs, device)",
    "= common.pack(rows.sequences(pairs), device)": "= common.pack(rows.sequences(pairs)[0::2], device)",
    "losses, metrics = preference_loss(args, answer_logprobs, answer_lengths, ref)": (
        "losses, metrics = kto_loss(args, answer_logprobs, ref, rows.labels(pairs), z)"
    ),
    # The same in `evaluate`, where z is that of all rows.
    "policy.eval()": "policy.eval()\nz = batch_kl(args, policy, rows, np.arange(len(rows)), ref_logprobs, device)",
    "policy(common.pack(rows.sequences(pairs), device))": "policy(common.pack(rows.sequences(pairs)[0::2], device))",
    "_, metrics = preference_loss(args, answer_logprobs, answer_lengths, ref)": (
        "_, metrics = kto_loss(args, answer_logprobs, ref, rows.labels(pairs), z)"
    ),
}


@dataclass
class Args:
    desirable_weight: float = 1.0  # λ_D: weight of good answers
    undesirable_weight: float = 1.0  # λ_U: weight of bad answers


class UnpairedEncoder(common.Encoder):
    """Row {messages, or prompt, and completion; label} → one sequence whose last answer is trained, and its label."""

    features = {**common.Encoder.features, "label": datasets.Value("bool")}

    def __call__(self, row):
        """Raises ValueError and Skip."""
        if not isinstance(row.get("label"), bool):
            raise ValueError(f"label is {row.get('label')!r}, expected true or false")
        if row.get("completion") is not None and row.get("prompt") is None:
            row = {"prompt" if name == "messages" else name: value for name, value in row.items()}
        messages = common.read_conversation(row)
        if messages[-1]["role"] != "assistant":
            raise ValueError("there is no answer: neither a completion nor a last message of the assistant")
        ids, trained, notes = common.encode_conversation(self, messages, row, last_turn_only=True)
        return {"input_ids": ids, "trained": trained, "label": row["label"], "notes": notes}


class UnpairedRows(common.Rows):
    """Rows of two sequences each: (x_i, y_i), and (x_i, y_j) for z, cut to the longest row."""

    def labels(self, indices):
        return torch.tensor(self.table.select(indices)["label"][:], dtype=torch.bool)  # (B,)

    def sequences(self, indices):
        others = super().sequences((np.array(indices) + len(self) // 2) % len(self))
        found = []
        for own, other in zip(super().sequences(indices), others, strict=True):
            begins = own[1].argmax(), other[1].argmax()  # where their answers begin
            mismatched = [np.concatenate([a[: begins[0]], b[begins[1] :]]) for a, b in zip(own, other, strict=True)]
            found += [own, tuple(array[: self.lengths.max()] for array in mismatched)]
        return found


@torch.no_grad()
def batch_kl(args, policy, rows, indices, ref_logprobs, device):
    """z over the rows at `indices`, of all ranks."""
    sequences = rows.sequences(indices)[1::2]  # (x_i, y_j)
    lengths = [len(ids) for ids, _ in sequences]
    total = 0.0
    for places in common.deal(lengths, args.tokens_per_microbatch, dist.get_world_size())[dist.get_rank()]:
        logprobs, _ = policy(common.pack([sequences[i] for i in places], device))
        total += (logprobs[: len(places)].cpu() - ref_logprobs[indices[places], 1]).sum()
    return max(0.0, all_sum(total)[0] / len(indices))


def kto_loss(args, answer_logprobs, ref_logprobs, is_good, z):
    """KTO's loss of each of B rows: from log π(y_i | x_i), (B, 2) log π_ref of y_i and y_j, labels (B,), and z."""
    sign = is_good.to(ref_logprobs.device).double() * 2 - 1  # (B,) 1 or -1
    logratios = answer_logprobs[: len(sign)] - ref_logprobs[:, 0]  # (B,) h
    margin = args.beta * sign * (logratios - z)  # (B,)
    weights = torch.where(sign > 0, args.desirable_weight, args.undesirable_weight)  # (B,)
    losses = weights * (1 - margin.sigmoid())  # (B,)                                                            (3)
    metrics = {"loss": losses, "accuracy": margin > 0, "margin": margin, "kl": torch.full_like(losses, z)}
    return losses, metrics


def check_flags(args):
    """Raises RunError for flags with which the loss would not be KTO's."""
    if args.beta <= 0 or min(args.desirable_weight, args.undesirable_weight) < 0:
        raise common.RunError("--beta has to be above 0, --desirable_weight and --undesirable_weight at least 0")
