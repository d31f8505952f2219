"""Supervised fine-tuning: teach a language model to answer by showing it answers.

The loss of a batch of conversations is the mean negative log-likelihood of its trained tokens (the assistant's turns):

    L = - Σ_t m_t log π(y_t | y_<t)  /  Σ_t m_t                                                                  (1)

with m_t = 1 where token t is trained on and the sums over the whole batch: all sequences, ranks and microbatches. How
the batch is cut into packed microbatches and dealt to ranks changes nothing but rounding. `Policy.forward` computes the
numerator of (1) for a microbatch; the loop in `main` divides it by the denominator.

Defaults are Tülu 3 8B's (arXiv 2411.15124, section 4), with one difference: Tülu trained on the *sum* over tokens, here
it is the mean (1), whose gradient does not grow with the batch. docs/sft.md says how to have the sum.

    torchrun --nproc_per_node 8 sft.py                                            Tülu 3 8B on eight GPUs, by FSDP2
    python sft.py --model DIR --data rows.jsonl --out runs/mine                   one process, CPU or GPU

A run that was killed goes on from its last checkpoint when the same command is given again.

Shapes:  T tokens of a microbatch, whose sequences lie end to end without padding; H hidden size, V vocabulary size.
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
from transformers import AutoModelForCausalLM

import common
import kernels.attention  # noqa: F401  (registers the attention functions that --attn names)
from kernels.greedy import greedy
from kernels.head import linear_cross_entropy


@dataclass
class Args:
    # the algorithm
    lr: float = 5e-6  # peak learning rate
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # decay to 0 after the warm-up, or none
    warmup_ratio: float = 0.03  # share of the steps over which the learning rate rises from 0
    adam_betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay rates of the gradient's mean and square
    adam_eps: float = 1e-8  # AdamW's ε, added to the root of that mean square
    weight_decay: float = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: float = 1.0  # clip the gradient to this norm; 0 does not clip
    batch_size: int = 128  # rows (conversations, pairs or prompts) per step, over all ranks and microbatches
    batch_tokens: int | None = None  # tokens per step, in place of --batch_size: as many rows as they take
    epochs: float = 2.0  # passes over the training data
    steps: int | None = None  # stop after this many steps, if that is sooner
    max_length: int = 4096  # longest sequence, in tokens
    overlong: Literal["truncate", "drop"] = "truncate"  # what happens to longer ones (either way they are counted)
    train_turns: Literal["all", "last"] = "all"  # the assistant's; last: for templates that drop thoughts before it
    answers: int = 3  # held-out prompts that are answered at each evaluation, in samples.jsonl; 0: none

    # the run: every script has these
    model: str = "meta-llama/Llama-3.1-8B"  # model folder or Hub id to start from
    data: list[str] = field(default_factory=lambda: ["allenai/tulu-3-sft-mixture"])
    """training data: SOURCE[:AMOUNT] ...; SOURCE is a .jsonl/.json/.parquet/.csv file, a folder or Hub id, and @split;
    AMOUNT a fraction of its rows ("0.5", "2.0" repeats) or a count ("1000")"""
    eval_data: list[str] = field(default_factory=list)  # held-out data, in the same form
    out: str = "runs/sft"  # folder of the run; the same command continues an interrupted run in it
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


class Policy(torch.nn.Module):
    """A causal language model that maps a packed microbatch straight to its summed loss, without logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
        head = self.model.get_output_embeddings().weight  # (V, H)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2 has one
        # The sum of -log π(y_t | y_<t) over all targets. Where m_t = 0 there is none (common.IGNORE).
        return linear_cross_entropy(hidden, head, microbatch.targets, softcap, microbatch.trained)  # ()             (1)


@torch.no_grad()
def evaluate(args, policy, rows, device):
    """Equation (1) over all of `rows`, and over those of each source; each rank on its share of them."""
    policy.eval()
    sums = Sums()
    for source, indices in common.deal_by_source(rows, args.tokens_per_microbatch):
        sums.add(**{f"loss/{source}": policy(common.pack(rows.sequences(indices), device))})
    policy.train()
    return common.means_by_source(sums.over_ranks(), rows, rows.trained)  # each sum divided by its Σ_t m_t      (1)


def main(args):
    # Processes, data, model. What is neither imported nor defined above is defined below.
    device, mesh = setup_distributed(args)
    rank = dist.get_rank()
    world = dist.get_world_size()
    config = common.load_config(args)
    template = args.chat_template
    if template is None and args.model == Args.model:
        template = "tulu"  # the default model is a base model, which has none of its own
    tokenizer = common.load_tokenizer(args.model, template)
    day = on_rank0(lambda: common.start_date(args.out))  # for templates that print it: a run keeps that of its start
    chat = common.ChatFormat(tokenizer, args.content_tokens, day)
    encode = common.SftEncoder(chat, config.vocab_size, args.max_length, args.overlong, args.train_turns)
    rows, eval_rows = common.load_data(args, encode, at_least=1 if args.batch_tokens else args.batch_size)
    total_rows = math.ceil(args.epochs * len(rows))  # rows seen in the whole run
    edges = batch_edges(args, rows, total_rows)  # step s takes the rows edges[s] to edges[s + 1] of their stream
    num_steps = len(edges) - 1
    if args.steps is not None:
        num_steps = min(num_steps, args.steps)
    run = Run(args, chat, rows, eval_rows, num_steps)
    if run.is_finished:
        return
    policy = load_model(args, config, AutoModelForCausalLM, Policy, device, mesh)
    optimizer = make_optimizer(args, policy)
    run.resume(policy, optimizer)
    if run.is_eval_due(0):
        show_answers(args, run, policy, 0)
        run.log({"step": 0, **evaluate(args, policy, eval_rows, device)})

    for step in range(run.first_step, run.end_step):  # to the last, or to --stop_step
        run.begin(step)  # starts the clock, seeds what is random
        indices = common.stream(len(rows), args.seed, range(edges[step], edges[step + 1]))  # the batch's rows
        num_trained = int(rows.trained[indices].sum())  # Σ_t m_t, of all ranks and microbatches                 (1)

        # Each rank takes its share of the batch, in as many microbatches as every other rank (FSDP2 needs that), and
        # adds up the gradients of their losses. reduce_once: with --shard hybrid, nodes exchange them after the last.
        sums = Sums()
        for places in reduce_once(common.deal(rows.lengths[indices], args.tokens_per_microbatch, world)[rank], policy):
            microbatch = common.pack(rows.sequences(indices[places]), device)
            loss = policy(microbatch) / num_trained  # () this microbatch's part of L                            (1)
            (loss * world).backward()  # FSDP averages gradients over ranks: undo its 1 / world
            sums.add(loss=loss)
        totals = sums.over_ranks()  # of the parts of all microbatches and ranks: totals["loss"] is L

        # Update.
        lr = learning_rate(args, step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = clip_gradient(args, policy)  # before clipping
        run.check_finite(step, totals["loss"], grad_norm, indices)  # if not, the run stops
        optimizer.step()
        optimizer.zero_grad()

        # Log, evaluate, save.
        entry = {"step": step + 1, **totals, "lr": lr, "grad_norm": grad_norm, "trained_tokens": num_trained}
        entry.update(run.speed(rows.lengths[indices].sum()))
        if run.is_eval_due(step + 1):
            show_answers(args, run, policy, step + 1)
            entry.update(evaluate(args, policy, eval_rows, device))
        run.log(entry)
        run.save_if_due(step + 1, policy, optimizer)

    run.finish(policy)  # publishes OUT/model, but not at --stop_step


# ---------------------------------------------------------------------------------------------------------------------
# Answers to look at; batches of rows, or of so many tokens.


def show_answers(args, run, policy, done):
    """Prints and logs the likeliest answers to --answers held-out prompts, control tokens and all."""
    prompts = common.some_prompts(run.eval_rows, args.answers)
    answers = greedy(policy, [ids for _, ids in prompts], 64, run.chat.stop_ids)  # at most 64 tokens each
    if dist.get_rank() == 0:
        for line in common.write_answers(run.out, done, run.eval_rows, prompts, answers, run.chat):
            tqdm.write(f"step {done}: {line['prompt'][-60:]!r} {line['completion']!r}")


def batch_edges(args, rows, total_rows):
    """Where in the endless stream of shuffled rows the batches begin, and where the last one ends: (steps + 1,).

    With --batch_tokens B, step s has the rows that begin with one of the tokens sB … (s + 1)B - 1 of the stream.
    """
    if args.batch_tokens is None:
        return np.append(np.arange(0, total_rows, args.batch_size), total_rows)
    longest = rows.lengths.max()
    if longest > args.batch_tokens:
        raise common.RunError(f"--batch_tokens {args.batch_tokens} is less than the longest row has: {longest}")
    lengths = rows.lengths[common.stream(len(rows), args.seed, range(total_rows))]  # (total_rows,)
    first_tokens = np.cumsum(lengths) - lengths  # (total_rows,) where in the stream of tokens each row begins
    starts = np.searchsorted(first_tokens, np.arange(0, first_tokens[-1] + 1, args.batch_tokens))  # no batch is empty
    return np.append(starts, total_rows)


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
