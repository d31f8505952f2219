"""The likeliest answers of a model in training, by whole forward passes: no cache, and no second copy of the weights.

Each token takes a pass over all that stands before it. That is slow for many or long answers, which are the sampler's
(kernels/sampler.py), and it is enough to see how a few answers change while a model learns.
"""

import math
import types

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import register_fsdp_forward_method

import common


@torch.no_grad()
def greedy(policy, prompts, max_new_tokens, stop_ids):
    """The likeliest next token, again and again, until one of `stop_ids`. All ranks call it together.

    Args:
        policy: what `load_model` of the scripts returns: sharded by FSDP2, and `policy.model` is the language model.
        prompts: S arrays of token ids.
        max_new_tokens: longest answer, or less if the model has no more positions; then it is cut off.
        stop_ids: ids that end an answer.

    Returns:
        S lists of token ids, a stop id included.
    """
    device = next(policy.parameters()).device
    longest = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    max_new_tokens = min([max_new_tokens, *(longest - len(prompt) for prompt in prompts)])
    policy.eval()
    policy.next_tokens = types.MethodType(_next_tokens, policy)
    register_fsdp_forward_method(policy, "next_tokens")  # which gathers what is sharded, as `forward` does
    answers, unfinished = [[] for _ in prompts], list(range(len(prompts)))
    for _ in range(int(max_new_tokens)):
        if not unfinished:
            break
        sequences = [np.concatenate([prompts[i], np.array(answers[i], dtype=np.int64)]) for i in unfinished]
        microbatch = common.pack([(ids, np.zeros(len(ids), dtype=bool)) for ids in sequences], device)
        tokens = policy.next_tokens(microbatch)  # (S,)
        if dist.get_world_size() > 1:
            dist.broadcast(tokens, src=0)  # rounding may differ between ranks, but their next passes must not
        for i, token in zip(unfinished, tokens.tolist(), strict=True):
            answers[i].append(token)
        unfinished = [i for i in unfinished if answers[i][-1] not in stop_ids]
    policy.train()
    return answers


def _next_tokens(policy, microbatch):
    """The likeliest token behind each of S sequences, (S,)."""
    hidden = policy.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
    last = hidden[microbatch.cu_seqlens[1:].long() - 1]  # (S, H)
    return policy.model.get_output_embeddings()(last).argmax(dim=-1)
