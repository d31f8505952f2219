"""Reward modelling: turn comparisons of two answers into one number that says how good an answer is.

For a prompt x with a chosen answer y_c and a rejected one y_r, the Bradley–Terry model says that y_c is preferred with
probability σ(r(x, y_c) - r(x, y_r)). The loss is its negative log-likelihood,

    L = mean over pairs of  -log σ(r(x, y_c) - r(x, y_r) - margin)  +  centering (r(x, y_c) + r(x, y_r))²        (1)

with margin 0 unless the data says how much better y_c is (Llama 2, arXiv 2307.09288, equation 2), and centering 0 by
default; it keeps scores around 0, which the likelihood leaves open (Eisenstein et al., arXiv 2312.09244). r is read at
the last token of the conversation by a linear head, which starts as N(0, 1/(H+1)) on a language model (Stiennon et al.,
arXiv 2009.01325). The mean is over the pairs of the whole batch: all ranks and microbatches. `RewardModel.forward` has
r, `ranking_loss` the terms of (1), and `main` takes the mean.

Defaults are Tülu 3's (arXiv 2411.15124, section 6), but for AdamW: there --adam_eps 1e-5 --weight_decay 0.01.

    torchrun --nproc_per_node 8 reward_model.py                                   Tülu 3 8B on eight GPUs, by FSDP2
    python reward_model.py --model DIR --data pairs.jsonl --out runs/mine         one process, CPU or GPU

OUT/model opens with AutoModelForSequenceClassification. A run that was killed goes on from its last checkpoint when the
same command is given again.

Shapes:  T tokens of a microbatch. It holds B pairs as 2B sequences (chosen, rejected, chosen, …), end to end without
padding. H hidden size, N pairs in the data.
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
import torch.nn.functional as F
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

import common
import kernels.attention  # noqa: F401  (registers the attention functions that --attn names)


@dataclass
class Args:
    # the algorithm
    centering: float = 0.0  # weight of a pair's squared sum of scores, which keeps scores around 0; 0.01 is usual
    lr: float = 3e-6  # peak learning rate
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # decay to 0 after the warm-up, or none
    warmup_ratio: float = 0.0  # share of the steps over which the learning rate rises from 0
    adam_betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay rates of the gradient's mean and square
    adam_eps: float = 1e-8  # AdamW's ε, added to the root of that mean square
    weight_decay: float = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: float = 1.0  # clip the gradient to this norm; 0 does not clip
    batch_size: int = 256  # rows (conversations, pairs or prompts) per step, over all ranks and microbatches
    epochs: float = 1.0  # passes over the training data
    steps: int | None = None  # stop after this many steps, if that is sooner
    max_length: int = 2048  # longest sequence, in tokens
    overlong: Literal["truncate", "drop"] = "drop"  # what happens to longer ones (either way they are counted)

    # the run: every script has these
    model: str = "allenai/Llama-3.1-Tulu-3-8B-SFT"  # model folder or Hub id to start from
    data: list[str] = field(default_factory=lambda: ["allenai/llama-3.1-tulu-3-8b-preference-mixture"])
    """training data: SOURCE[:AMOUNT] ...; SOURCE is a .jsonl/.json/.parquet/.csv file, a folder or Hub id, and @split;
    AMOUNT a fraction of its rows ("0.5", "2.0" repeats) or a count ("1000")"""
    eval_data: list[str] = field(default_factory=list)  # held-out data, in the same form
    out: str = "runs/reward_model"  # folder of the run; the same command continues an interrupted run in it
    chat_template: str | None = None  # tulu, chatml or a Jinja file; by default the tokenizer's own
    content_tokens: list[str] = field(default_factory=list)
    """control tokens that stay tokens where assistant content has them ("<think>" "</think>"); others become text"""
    max_skip_frac: float = 0.01  # refuse to start when a larger share of a source's rows is unusable
    seed: int = 1  # decides the order of the data and everything else that is random
    eval_every: int = 100  # steps between evaluations on --eval_data (also before the first and after the last)
    save_every: int = 500  # steps between checkpoints; 0 saves none but the final model
    stop_step: int | None = None  # save and stop after this many steps; the same command without it goes on
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    best: str | None = None  # held-out metric, "eval_loss": OUT/best has the model where it was best, too
    tokens_per_microbatch: int = 8192  # most in a forward pass of one rank; a longer row goes alone; same loss
    activation_checkpointing: bool = False  # recompute each layer in the backward: less memory, about a quarter slower
    compile: bool = False  # torch.compile each decoder layer
    attn: Literal["packed", "packed_fa", "packed_loop"] = "packed"  # PyTorch's, flash-attn's, one sequence at a time
    deterministic: bool = False  # PyTorch's deterministic algorithms, for the same bits again on a GPU too; slower
    shard: Literal["full", "hybrid"] = "full"  # parameters over all ranks, or within a node and replicated over nodes
    track: bool = False  # log to Weights & Biases (offline unless logged in)


class RewardModel(torch.nn.Module):
    """A language model that maps a packed microbatch to the score r of each sequence."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
        last = hidden[microbatch.cu_seqlens[1:].long() - 1]  # (2B, H)
        head = self.model.score.weight[0]  # (H,)
        return last.float() @ head.float()  # (2B,) r, in float32 also where hidden states are bf16


class ScoreModel(AutoModelForSequenceClassification):
    """AutoModelForSequenceClassification that also opens a plain language model: its score head is then new."""

    @classmethod
    def from_pretrained(cls, path, **options):
        model, info = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **options)
        if "score.weight" in info["missing_keys"]:
            generator = torch.Generator().manual_seed(torch.initial_seed())  # --seed, on the rank that loads
            model.score.weight.data.normal_(0, (model.config.hidden_size + 1) ** -0.5, generator=generator)
            info["missing_keys"].remove("score.weight")
            info["unexpected_keys"].discard("lm_head.weight")
        return model, info


def ranking_loss(args, scores, margins):
    """Equation (1), one loss for each of B pairs.

    Args:
        scores: (2B,) r of chosen, rejected, chosen, …
        margins: (B,) how much better the chosen answer is.

    Returns:
        losses (B,), and {metric: (B,)}.
    """
    # Every rank runs the same number of microbatches. One without pairs has a token that stands for nothing: then B is
    # 0, the slice is empty, and so the loss is 0.
    scores = scores[: 2 * len(margins)]  # (2B,)
    chosen = scores[0::2]  # (B,)
    rejected = scores[1::2]  # (B,)
    likelihood = F.logsigmoid(chosen - rejected - margins)  # (B,) its logarithm
    losses = -likelihood + args.centering * (chosen + rejected) ** 2  # (B,)                                     (1)
    metrics = {
        "loss": losses,
        "accuracy": chosen > rejected,
        "margin": chosen - rejected,
        "chosen_score": chosen,
        "rejected_score": rejected,
    }
    return losses, metrics


@torch.no_grad()
def evaluate(args, model, rows, device):
    """Loss and accuracy over all of `rows`, over each source, and over each subset, with 95 % intervals."""
    model.eval()
    margins = torch.tensor(rows.table["margin"][:])  # (N,)
    results = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)  # loss, whether right
    for pairs in common.deal(rows.lengths, args.tokens_per_microbatch, dist.get_world_size())[dist.get_rank()]:
        scores = model(common.pack(rows.sequences(pairs), device))  # (2B,)
        losses, metrics = ranking_loss(args, scores, common.to_device(margins[pairs], device))  # (B,)
        results[pairs] = torch.stack([losses, metrics["accuracy"]], dim=1).double()
    model.train()
    dist.all_reduce(results)  # each rank has filled in its own rows
    return {**means_of_sources(rows, results), **subset_accuracy(rows, results[:, 1])}


def main(args):
    # Processes, data, model. What is neither imported nor defined above is defined below.
    device, mesh = setup_distributed(args)
    rank = dist.get_rank()
    world = dist.get_world_size()
    check_flags(args)
    config = common.load_config(args)
    config.update({name: 0.0 for name in config.to_dict() if "dropout" in name})  # off: scores should not be noisy
    config.num_labels = 1
    tokenizer = common.load_tokenizer(args.model, args.chat_template)
    day = on_rank0(lambda: common.start_date(args.out))  # for templates that print it: a run keeps that of its start
    chat = common.ChatFormat(tokenizer, args.content_tokens, day)
    if config.pad_token_id in chat.stop_ids:  # transformers scores the last token that is not padding
        config.pad_token_id = None
    encode = common.PairEncoder(chat, config.vocab_size, args.max_length, args.overlong)
    rows, eval_rows = common.load_data(args, encode, at_least=args.batch_size)
    margins = torch.tensor(rows.table["margin"][:])  # (N,)
    total_rows = math.ceil(args.epochs * len(rows))  # pairs seen in the whole run
    num_steps = math.ceil(total_rows / args.batch_size)
    if args.steps is not None:
        num_steps = min(num_steps, args.steps)
    run = Run(args, chat, rows, eval_rows, num_steps)
    if run.is_finished:
        return
    model = load_model(args, config, ScoreModel, RewardModel, device, mesh)
    optimizer = make_optimizer(args, model)
    run.resume(model, optimizer)
    if run.is_eval_due(0):
        run.log({"step": 0, **evaluate(args, model, eval_rows, device)})

    for step in range(run.first_step, run.end_step):  # to the last, or to --stop_step
        run.begin(step)  # starts the clock, seeds what is random
        indices = common.batch_indices(len(rows), args.batch_size, args.seed, step, total_rows)  # the batch's pairs

        # Each rank takes its share of the batch, in as many microbatches as every other rank (FSDP2 needs that), and
        # adds up the gradients of their losses. reduce_once: with --shard hybrid, nodes exchange them after the last.
        sums = Sums()
        for places in reduce_once(common.deal(rows.lengths[indices], args.tokens_per_microbatch, world)[rank], model):
            pairs = indices[places]  # (B,)
            microbatch = common.pack(rows.sequences(pairs), device)
            scores = model(microbatch)  # (2B,)
            losses, metrics = ranking_loss(args, scores, common.to_device(margins[pairs], device))  # (B,)
            loss = losses.sum() / len(indices)  # () this microbatch's part of the mean                          (1)
            (loss * world).backward()  # FSDP averages gradients over ranks: undo its 1 / world
            sums.add(**metrics)
        means = sums.over_ranks(len(indices))  # over the pairs of all ranks: means["loss"] is L

        # Update.
        lr = learning_rate(args, step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = clip_gradient(args, model)  # before clipping
        run.check_finite(step, means["loss"], grad_norm, indices)  # if not, the run stops
        optimizer.step()
        optimizer.zero_grad()

        # Log, evaluate, save.
        entry = {"step": step + 1, **means, "lr": lr, "grad_norm": grad_norm}
        entry.update(run.speed(rows.lengths[indices].sum()))
        if run.is_eval_due(step + 1):
            entry.update(evaluate(args, model, eval_rows, device))
        run.log(entry)
        run.save_if_due(step + 1, model, optimizer)

    run.finish(model)  # publishes OUT/model, but not at --stop_step


# ---------------------------------------------------------------------------------------------------------------------
# Held-out accuracy by subset, as RewardBench reports it.


def check_flags(args):
    """Raises RunError for a flag of reward models alone that is out of range."""
    if args.centering < 0:
        raise common.RunError(f"--centering {args.centering} has to be at least 0: below, scores would run away from 0")


def means_of_sources(rows, results):
    """Means of the loss and of what is right over all rows and over each source. results: (N, 2)."""
    sums = {}
    for source, members in rows.by_source().items():
        sums[f"loss/{source}"], sums[f"accuracy/{source}"] = results[members].sum(dim=0).tolist()
    return common.means_by_source(sums, rows, np.ones(len(rows)))


def subset_accuracy(rows, right):
    """Metrics of each value of the rows' column `subset`, where there are several. right: (N,) 1.0 or 0.0."""
    subset_of_row = np.array(rows.table["subset"][:])
    names = sorted(set(subset_of_row))
    if len(names) < 2:
        return {}
    intervals = {}
    means = []
    for name in names:
        places = (subset_of_row == name).nonzero()[0]
        intervals[name] = wilson_interval(right[places].sum().item(), len(places))
        means.append(right[places].mean().item())
    return {"eval_subsets": intervals, "eval_subsets_mean": sum(means) / len(means)}


def wilson_interval(right, total, z=1.96):
    """A share and its 95 % interval by Wilson's formula, which also holds near 0 and 1."""
    share = right / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    variance = share * (1 - share) / total + z * z / (4 * total * total)
    half = z / scale * math.sqrt(variance)
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return {"share": share, "low": low, "high": high, "total": total}


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
