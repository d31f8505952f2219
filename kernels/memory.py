"""How much memory training takes on one rank, counted before anything is allocated.

A rank of W holds the W-th part of the float32 parameters, gradients, and AdamW's two moments. While it works on a
microbatch of T tokens, all trained, it holds more: parameters that FSDP2 has gathered, what autograd keeps for the
backward, and what is only there for a moment. Most is held at one of these moments, in the order of a step:

    in the head         all that is kept; logits of a chunk; with `cross_entropy`, the head's gradient in float32   (1)
    behind the head     all that is kept; the head's gradient, and what its backward needs                          (2)
    in a layer's        what the layers keep; what this one makes again with checkpointing, and what its backward   (3)
    backward            needs; the gradients of the one before in float32, until they are summed over the ranks
    in the embedding's  its gradient and the head's, which become float32 for their sum over the ranks              (4)

What a layer keeps is counted: the real model runs on meta tensors, which have a shape but no memory, and autograd shows
what it keeps. So models with other norms, heads or activations need no formula of their own. Compiled layers are
counted likewise: torch.compile decides what the backward makes again, and runs here up to that decision.

Not counted: CUDA's context, NCCL's buffers, and memory that the allocator cannot use because it lies in pieces. On an
80 GB card leave five or six GiB for them. And attention with a soft-cap, whose scores are all in memory.
"""

import copy
import functools
import os
import re
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification

from kernels.attention import Options, _varlen
from kernels.head import CHUNK


def free_bytes(device):
    """What can still be allocated on a device, a torch.device. Without Linux this is a guess: half of all memory."""
    if device.type != "cuda" and sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if device.type != "cuda":
        kibibytes = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]
        return 1024 * int(kibibytes)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch keeps it for later
    return free + unused


class Model(NamedTuple):
    """A model on meta, and its numbers of parameters. Made by `count_model`."""

    module: torch.nn.Module
    head: str  # as given to count_model
    compiled: bool  # likewise
    dtype: torch.dtype  # likewise
    parameters: int  # in all
    outside: int  # of them outside of the layers: embedding, last norm, head
    layer: int  # of them in the largest layer
    embedding: int  # of them in the embedding, and so in a head over the vocabulary
    has_own_head: bool  # a head over the vocabulary that is not the embedding once more


def count_model(config, head, compiled=False, dtype=torch.bfloat16):
    """The Model of a configuration, for `training_bytes`.

    Args:
        config: the transformers configuration.
        head: what ends the model: "cross_entropy" (sft.py), "logprobs" (dpo.py, grpo.py, the policy of ppo_rlvr.py),
            "sequence_scores" (reward_model.py) or "token_scores" (the value model of ppo_rlvr.py).
        compiled: whether the layers run under torch.compile. dtype: of the computation, bfloat16 on CUDA.
    """
    config = copy.deepcopy(config)  # which from_config writes into
    is_scorer = head in ("sequence_scores", "token_scores")
    if is_scorer:
        config.num_labels = 1
    model_class = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
    with torch.device("meta"):
        module = model_class.from_config(config, attn_implementation="packed_meta", dtype=dtype)
    module.tie_weights()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in module.base_model.layers]
    embedding = module.get_input_embeddings().weight
    return Model(
        module=module,
        head=head,
        compiled=compiled,
        dtype=dtype,
        parameters=parameters,
        outside=parameters - sum(sizes),
        layer=max(sizes),
        embedding=embedding.numel(),
        has_own_head=not is_scorer and module.get_output_embeddings().weight is not embedding,
    )


class Kept(NamedTuple):
    """Bytes that autograd keeps of a microbatch, without parameters."""

    layers: int  # by all layers
    layer: int  # by the one that keeps most
    outside: int  # by embedding and last norm
    backward: int  # the most that the backward of that layer needs beyond what it keeps


@functools.cache
def _count_kept(model, tokens):
    """Runs a Model forward with so many tokens: its Kept."""
    layers = model.module.base_model.layers
    if model.compiled:
        torch._dynamo.reset()  # it compiles a function for a few shapes only
        for layer in layers:
            # This backend decides as torch.compile's usual one, inductor, but makes no kernels.
            layer.compile(backend="aot_eager_decomp_partition", dynamic=False)
    kept = [0] * (len(layers) + 1)  # by each layer; the last number: outside of them
    seen = {parameter.untyped_storage()._cdata for parameter in model.module.parameters()}
    storages = []  # keeps them alive, so that no two have the same address
    calls = []  # of each layer: (the layer, arguments, keyword arguments)
    place = -1  # in `kept`: where the model is

    def enter(*call):
        nonlocal place
        place = len(calls)
        calls.append(call)

    def leave(*_):
        nonlocal place
        place = -1

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            storages.append(storage)
            kept[place] += storage.nbytes()
        return tensor

    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(leave))
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    boundaries = torch.zeros(2, dtype=torch.int32, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.module.base_model(
            input_ids=ids,
            position_ids=ids,
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=tokens,
            max_length_k=tokens,
            use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    largest = max(range(len(layers)), key=lambda number: kept[number])
    return Kept(sum(kept[:-1]), kept[largest], kept[-1], _backward_bytes(*calls[largest]))


def _backward_bytes(layer, args, kwargs):
    """By how much memory grows in the backward of a layer, uncompiled, until what was kept is given back."""
    hidden = args[0].detach().requires_grad_()
    with LiveBytes() as live:
        output = layer.forward(hidden, *args[1:], **kwargs)  # .forward: without torch.compile
        kept = live.now
        (output if torch.is_tensor(output) else output[0]).backward(torch.empty_like(hidden))
    layer.zero_grad()
    return live.peak - kept


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of all tensors that operations make, for as long as they are alive."""

    now = 0
    peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in old:
                storage = tensor.untyped_storage()
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


class Training(NamedTuple):
    """Bytes on one rank. The first three are the states, which stay; what the work needs comes on top, at its peak."""

    parameters: int
    gradients: int
    moments: int
    work: int

    @property
    def sum(self):
        return self.parameters + self.gradients + self.moments + self.work


def training_bytes(model, tokens, shards, activation_checkpointing):
    """What one of `shards` ranks needs to train a Model on microbatches of so many tokens: a Training."""
    c = model.dtype.itemsize
    bytes_kept = _count_kept(model, tokens)
    kept = bytes_kept.layers
    one = bytes_kept.layer  # of these, given back after the first layer's backward
    again = 0  # what a layer makes again
    if activation_checkpointing:
        one = c * tokens * model.module.config.hidden_size  # a layer's input
        kept = one * len(model.module.base_model.layers)
        again = bytes_kept.layer
    gathered = c * model.outside  # from the start of the forward to the end of the backward
    layer = c * model.layer  # gathered; for the next one there is a second buffer
    summed = 4 * model.layer  # gradients in float32
    in_head, behind_head = _head_bytes(model, tokens)
    head = 0 if model.head.endswith("scores") else c * model.embedding  # gradient of the head
    both = c * model.embedding + head  # gradients of embedding and head
    if head and not model.has_own_head:
        both += head  # their sum
    last = head if model.has_own_head else 0  # of these, what is still there when the sums over ranks come
    in_layer = gathered + 2 * layer + head + again + bytes_kept.backward
    peaks = [
        kept + bytes_kept.outside + gathered + layer + in_head,  # (1)
        kept + bytes_kept.outside + gathered + layer + behind_head,  # (2)
        kept + in_layer,  # (3) the last layer
        kept - one + in_layer + summed,  # (3) the last but one
        gathered + both + summed,  # (4)
        gathered + 4 * model.outside,  # (4) no longer parameters, but gradients
        last + 4 * model.outside * (1 + 1 / shards),  # (4)
    ]
    shard = 4 * model.parameters // shards
    return Training(shard, shard, 2 * shard, int(max(peaks)))


def _head_bytes(model, tokens):
    """Bytes of the head's own: in its forward, and in its backward."""
    c = model.dtype.itemsize
    H = model.module.config.hidden_size
    states = tokens * H  # numbers in the hidden states
    if model.head.endswith("scores"):
        in_float32 = 4 * states if model.head == "token_scores" else 0
        return in_float32, c * states + 3 * 4 * states  # 3: the last norm's backward
    V = model.embedding // H
    chunk = min(tokens, CHUNK)
    padded_V = V + -V % 64
    padded = c * padded_V * H if padded_V > V else 0  # a copy of the head
    weight = c * V * H
    logits = 4 * chunk * padded_V
    if model.head == "cross_entropy":
        exact = 4 * padded_V * H  # the head's gradient in float32
        return logits + padded + exact + 2 * c * states + 2 * c * chunk * H, exact + weight + 2 * c * states
    piece = (weight + padded) / -(-tokens // CHUNK)  # a piece of the padded head, and its gradient
    return logits + padded + c * states, logits + weight + piece + (2 * c + 4) * states


def _packed_on_meta(module, query, key, value, attention_mask=None, scaling=None, sliding_window=None, **kwargs):
    """`packed` as on CUDA: elsewhere it asks how long the sequences are, which meta tensors do not know."""
    options = Options(scaling=scaling, window=sliding_window)
    return _varlen(query, key, value, kwargs["cu_seq_lens_q"], kwargs["max_length_q"], options), None


AttentionInterface.register("packed_meta", _packed_on_meta)
