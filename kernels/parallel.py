"""Tensor-parallel sampling: one copy of a model over a group of t ranks, by dividing its configuration.

Each rank builds an unmodified transformers model that has a t-th of the heads and of the MLP's inner width, and takes
its part of the policy's weights. The parts of the ranks r add up to a layer's attention and MLP,

    attention(x) = Σ_r O_r attend(Q_r x, K_r x, V_r x)          r has a part of the heads                        (1)
    mlp(x) = Σ_r D_r (act(G_r x) · U_r x)                       r has a part of the inner width                  (2)

so a layer needs two sums over the group, behind o_proj and down_proj (Megatron-LM, arXiv 1909.08053, section 3). A norm
over all heads together, as OLMo 2 and 3 have it of q and k, gets the whole vector and gives back the rank's part.
Embeddings and head are whole on every rank, and so are hidden states and logits.
"""

import copy

import torch
import torch.distributed as dist

DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # of the configuration
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # linear layers with a part of the outputs
ROW_PARALLEL = ("o_proj", "down_proj")  # linear layers that read a part of the inputs, and compute a term of a sum


def divide(config, t):
    """A copy of the configuration, for one of t ranks.

    Raises:
        ValueError: a number that has to be divided by t cannot be.
    """
    config = copy.deepcopy(config)
    if t == 1:
        return config
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    for name in DIVIDED:
        number = getattr(config, name, None)
        if number is None or number % t:
            raise ValueError(f"--sample_tp {t} does not divide the model's {name}, {number}")
        setattr(config, name, number // t)
    return config


def connect(model, whole, group):
    """Makes the parts of a group compute together what the whole model computes; in place.

    Args:
        model: of a divided configuration. whole: of the undivided one; both may be on meta.
        group: the process group. Its ranks have to run the model in lockstep, with the same inputs.

    Raises:
        ValueError: as `divided_modules`.
    """
    for path, how in divided_modules(model, whole).items():
        if how == "sum":
            _sum_outputs(model.get_submodule(path), group)
        else:
            model.set_submodule(path, _with_whole_input(whole.get_submodule(path), group))


def divided_modules(model, whole):
    """{name of a module: "sum" or "norm"} of those that need the other ranks; `model`, `whole` as for `connect`.

    Raises:
        ValueError: a weight that got smaller is in none of the layers named above, or a layer has no o_proj to sum.
    """
    parts = dict(model.named_parameters())
    found = {}
    for name, parameter in whole.named_parameters():
        path, _, leaf = name.rpartition(".")
        kind = path.rpartition(".")[2]
        if name in parts and (parts[name].shape == parameter.shape or kind in COLUMN_PARALLEL):
            continue
        if kind in ROW_PARALLEL and leaf == "weight":
            found[path] = "sum"
        elif type(whole.get_submodule(path)).__name__.endswith("Norm") and parameter.ndim == 1:
            found[path] = "norm"
        else:
            raise ValueError(f"--sample_tp cannot divide this model's {name}")
    if sum(path.endswith("o_proj") for path in found) != whole.config.num_hidden_layers:
        raise ValueError("--sample_tp cannot divide this model's attention")
    return found


def _sum_outputs(linear, group):
    """A linear layer of ROW_PARALLEL: its outputs are added up over the group, with one rank's bias."""
    if dist.get_rank(group) > 0:
        linear.bias = None

    def add_up(module, inputs, output):
        dist.all_reduce(output, group=group)
        return output

    linear.register_forward_hook(add_up)


def _with_whole_input(norm, group):
    """A norm of the whole model, with a rank's part of its input and of its output, (..., width / t)."""
    t = dist.get_world_size(group)
    rank = dist.get_rank(group)

    def gather(module, inputs):
        parts = [torch.empty_like(inputs[0]) for _ in range(t)]
        dist.all_gather(parts, inputs[0].contiguous(), group=group)
        return (torch.cat(parts, dim=-1),)

    norm.register_forward_pre_hook(gather)
    norm.register_forward_hook(lambda module, inputs, output: output.chunk(t, dim=-1)[rank])
    return norm


def own_part(tensor, shape, group):
    """A rank's part of a whole tensor: that of this shape, which is shorter in at most one dimension."""
    for dim, (length, part) in enumerate(zip(tensor.shape, shape, strict=True)):
        if length != part:
            return tensor.chunk(length // part, dim)[dist.get_rank(group)]
    return tensor


def agree(tokens, group):
    """In place: where ranks have drawn different tokens (n,), by a rounding, all get the one with the largest id."""
    dist.all_reduce(tokens, dist.ReduceOp.MAX, group=group)


def any_of(flag, group):
    """Whether the flag is set on any rank of the group."""
    flags = torch.tensor([bool(flag)], dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return bool(flags)
