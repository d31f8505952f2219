"""Proximal policy optimisation with verifiable rewards: sample, judge, and ask a value model which tokens helped.

The policy samples completions, and verifiers judge them. Each token pays β for its drift from π_ref, the policy before
training, and the last one also earns the score of the completion. V_t is the return that the value model expects before
token t, and A_t how much better than that it went on (generalised advantage estimation, arXiv 1506.02438):

    r_t = -β log(π_old / π_ref)(y_t | x, y_<t)  [+ score at the last token]
    A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} - V_{t+l})              R_t = A_t + V_t                              (1)
    ρ_t = π(y_t | x, y_<t) / π_old(y_t | x, y_<t)         w_t = min(π_old / π_behaviour, C)                      (2)
    L = - Σ_t w_t min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t)  /  Σ_t 1                                   (3)
    L_V = ½ Σ_t max((V'_t - R_t)², (clip(V'_t, V_t - ε_V, V_t + ε_V) - R_t)²)  /  Σ_t 1                          (4)

with the sums over all sampled tokens of the batch. π_behaviour is the policy as the sampler computed it, in another
precision or (--inflight) with older weights, and π_old the policy before this batch's first update, recomputed; the
truncated weight w corrects for their difference.

V is the value model before the batch's first update, 0 after the last token; V' is the one in training. In (3) A is
whitened to mean 0 and variance 1 over the batch. The score is 10 times the verifiers' reward, -10 without an end token.

Defaults are Tülu 3's (arXiv 2411.15124, section 6): 4 passes over 224 completions of different prompts. There the value
model starts as the reward model: pass it as --value_model. There is no w there: --tis_cap 0 leaves it out.

    python ppo_rlvr.py --model DIR --value_model DIR --data rows.jsonl --out runs/ppo         one process, CPU or GPU
    torchrun --nproc_per_node 8 ppo_rlvr.py --model runs/dpo/model --value_model runs/rm/model --data train.jsonl ...

A row is {"messages": ..., "dataset": the verifier's name, "ground_truth": ...}; see rewards.py. A run killed at any
moment continues exactly where it was when the same command is given again.

Shapes:  T tokens in a packed microbatch, S sequences in it, H hidden size, V vocabulary size, P prompts, G group size,
L tokens of a sample, N of them its completion.
"""

import contextlib
import copy
import dataclasses
import faulthandler
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

import common
import kernels.attention  # noqa: F401  (registers the attention functions that --attn names)
from kernels.head import linear_logprobs
from kernels.sampler import Sampler
from pool import Pool, rates


@dataclass
class Args:
    model: str
    """model folder or Hub id to start from"""
    data: list[str]
    """training data: SOURCE[:AMOUNT] ...; SOURCE is a .jsonl/.json/.parquet file or a Hub id (name, name@split);
    AMOUNT a fraction of its rows ("0.5", "2.0" repeats) or a count ("1000")"""
    out: str
    """folder of the run; the same command with the same folder continues an interrupted run"""
    value_model: str | None = None
    """model folder or Hub id to start the value model from: an output of reward_model.py, or a language model, which
    gets a new score head; by default --model"""
    zero_value_head: bool = False
    """start with a score head of zeros: the value model then expects 0 of every token at first"""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """held-out data, in the same form"""
    chat_template: str | None = None
    """tulu, chatml or a Jinja file; by default the tokenizer's own"""
    content_tokens: list[str] = dataclasses.field(default_factory=list)
    """control tokens that assistant content may hold as tokens ("<think>" "</think>"); all others there are text"""
    max_length: int = 4096
    """longest sequence, in tokens"""
    max_new_tokens: int = 2048
    """longest completion, in tokens; prompts that leave no room for it within --max_length are dropped (counted)"""
    group_size: int = 1
    """completions sampled for each prompt"""
    temperature: float = 1.0
    """of sampling, and of the policy that is trained"""
    slots: int = 64
    """sequences that one rank samples at a time; does not change the samples"""
    inflight: int = 0
    """prompts sampled beyond a batch, so that nobody waits for the longest completions: they go on in the next step,
    under its weights"""
    max_staleness: int = 4
    """with --inflight: the step waits for completions that were begun so many steps ago"""
    clip_low: float = 0.2
    """ε_low of equation (3)"""
    clip_high: float = 0.2
    """ε_high of equation (3)"""
    tis_cap: float = 2.0
    """C of equation (2); 0 sets w = 1"""
    kl_beta: float = 0.05
    """weight of KL(π || π_ref), in the loss (grpo.py) or in the rewards (ppo_rlvr.py); π_ref is --model"""
    gamma: float = 1.0
    """γ of equation (1)"""
    gae_lambda: float = 0.95
    """λ of equation (1)"""
    reward_scale: float = 10.0
    """the score of a completion is this times its reward by the verifiers"""
    no_eos_score: float | None = -10.0
    """score of a completion without end token, in place of all else; None: scored like the others"""
    reward_model_coef: float = 0.0
    """add this times the reward model's score; the reward model is --value_model as it was before training"""
    value_clip: float = 0.2
    """ε_V of equation (4); 0 does not clip"""
    value_coef: float = 0.1
    """factor of L_V. AdamW nearly undoes it, but where --max_grad_norm clips (it does so to each model on its own)"""
    value_lr: float = 3e-7
    """peak learning rate of the value model, with the same schedule"""
    value_warmup_steps: int = 0
    """first steps, in which only the value model learns"""
    average: Literal["token", "sequence", "constant"] = "token"
    """divide the sum over tokens by their number; by each completion's length, and the number of completions (GRPO); or
    by --max_new_tokens and the number of completions (Dr. GRPO)"""
    overlong_buffer: int = 0
    """reward falls by up to 1 over the last so many tokens below --max_new_tokens (DAPO's overlong penalty)"""
    minibatches: int = 1
    """optimizer steps in one pass over a batch"""
    passes: int = 4
    """passes over a batch"""
    verifier_workers: int | None = None
    """processes of each rank that judge; by default its share of the cores"""
    sandbox: Literal["full", "weak"] = "full"
    """what model-written code is run in; weak: without the layers that this kernel lacks (see sandbox.py)"""
    max_logprob_gap: float | None = None
    """stop if, in the first step, a sampled log-probability differs more from the trainer's; by default 1e-3 in float32
    and 1 in bf16"""
    max_skip_frac: float = 0.01
    """refuse to start when a larger share of a source's rows is unusable"""
    batch_size: int = 224
    """rows (conversations, pairs or prompts) per step, over all ranks and microbatches"""
    tokens_per_microbatch: int = 8192
    """tokens packed into one forward pass of one rank; 1 means one sequence at a time; does not change the loss"""
    lr: float = 3e-7
    """peak learning rate"""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """decay to 0 after the warm-up, or none"""
    warmup_ratio: float = 0.0
    """share of the steps over which the learning rate rises from 0"""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and square"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only"""
    max_grad_norm: float = 1.0
    """clip the gradient to this norm; 0 does not clip"""
    epochs: float = 1.0
    """passes over the training data"""
    steps: int | None = None
    """stop after this many steps, if that is sooner"""
    seed: int = 1
    """decides the order of the data and everything else that is random"""
    eval_samples: int = 1
    """completions of each held-out prompt, for pass@k"""
    eval_temperature: float = 1.0
    """of their sampling; 0 takes the likeliest token"""
    eval_every: int = 100
    """steps between evaluations on --eval_data (also before the first and after the last)"""
    save_every: int = 500
    """steps between checkpoints; 0 saves none but the final model"""
    keep: int = 2
    """newest checkpoints kept; 0 keeps all"""
    shard: Literal["full", "hybrid"] = "full"
    """full: parameters sharded over all ranks; hybrid: within a node, replicated over nodes"""
    attn: Literal["packed", "packed_fa", "packed_loop"] = "packed"
    """packed attention by PyTorch, by flash-attn (when installed), or one sequence at a time"""
    compile: bool = False
    """torch.compile each decoder layer"""
    activation_checkpointing: bool = False
    """recompute each decoder layer in the backward pass: less memory, about a quarter slower"""
    log_samples: int = 8
    """completions of each step that are written to samples.jsonl"""
    track: bool = False
    """log to Weights & Biases (offline unless logged in)"""


class Policy(torch.nn.Module):
    """A causal language model that maps a packed microbatch to the log-probability of each target, without logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch, temperature):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
        weight = self.model.get_output_embeddings().weight  # (V, H)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        logprobs, entropy = linear_logprobs(hidden, weight, microbatch.targets, temperature, softcap)
        return logprobs.clone(), entropy.detach().clone()  # (T,), (T,); FSDP2 warns of views


class ValueModel(torch.nn.Module):
    """A language model that maps a packed microbatch to V before each target: position t holds that of token t + 1."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
        return hidden.float() @ self.model.score.weight[0].float()  # (T, H) @ (H,) → (T,), in float32 also after bf16


class ActorCritic(torch.nn.ModuleDict):
    """Both models in one module, for save_checkpoint, which exports its `.model`: the policy."""

    model = property(lambda self: self["policy"].model)


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


# ----------------------------------------------------------- plumbing: the same text in every script, by design


def setup_distributed(args):
    """Joins the processes torchrun started (or makes a world of one). Returns this rank's device and the FSDP mesh."""
    faulthandler.register(signal.SIGUSR1)  # kill -USR1 prints where a process hangs
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **alone)
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.batch_size % world:
        raise common.RunError(f"--batch_size {args.batch_size} is not divisible by the {world} processes")
    torch.manual_seed(args.seed + dist.get_rank())
    if args.shard == "hybrid":
        return device, init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    return device, init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def on_rank0(function):
    """Calls `function` on rank 0 alone. Every rank gets its result, or raises its error."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (common.RunError, OSError, ValueError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise common.RunError(box[1])
    return box[0]


def all_sum(*values):
    """Sums of scalars (numbers or tensors) over all ranks, as floats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(total)
    return total.tolist()


def load_config(args):
    """The model's configuration, checked against the flags before anything large is loaded."""
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise common.RunError(f"model {args.model}: {str(error).splitlines()[0]}") from None
    config.dtype = config.dtype or torch.float32
    limit = getattr(config, "max_position_embeddings", None)
    if limit and args.max_length > limit:
        raise common.RunError(f"--max_length {args.max_length} is beyond the {limit} positions this model knows")
    for field in ("logit_scale", "logits_scaling"):
        if getattr(config, field, None) not in (None, 1):
            raise common.RunError(f"model {args.model} transforms its logits ({field}), which is not supported")
    return config


def read_weights(args, config, model_class):
    """{name: tensor} of every parameter and buffer; raises RunError unless all are there, expected and finite."""
    try:
        source, info = model_class.from_pretrained(args.model, dtype=config.dtype, output_loading_info=True)
    except Exception as error:  # transformers and safetensors have many
        raise common.RunError(f"model {args.model}: {str(error).splitlines()[0]}") from None
    if wrong := {kind: sorted(keys)[:5] for kind, keys in info.items() if keys}:
        raise common.RunError(f"model {args.model}: weights do not fit the architecture: {wrong}")
    weights = {name: tensor.detach() for name, tensor in [*source.named_parameters(), *source.named_buffers()]}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise common.RunError(f"model {args.model}: {name} holds values that are not finite")
    return weights


def load_model(args, config, model_class, module_class, device, mesh):
    """Loads, wraps and shards a model: float32 parameters; on CUDA bf16 compute. Rank 0 alone holds a whole copy.

    Returns module_class(model), sharded by FSDP2 per decoder layer.
    """
    gc.collect()  # FSDP's hooks make cycles: a model that was dropped is still in memory
    weights = {}
    on_rank0(lambda: weights.update(read_weights(args, config, model_class)))
    with torch.device("meta"):
        model = model_class.from_config(copy.deepcopy(config), attn_implementation=args.attn, dtype=torch.float32)
    if not hasattr(model.base_model, "layers"):
        raise common.RunError(f"model {args.model}: {type(model).__name__} is not built of decoder layers (.layers)")
    module = module_class(model)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": precision if device.type == "cuda" else MixedPrecisionPolicy()}
    torch._dynamo.config.recompile_limit = 64  # graphs of a layer: kinds, shapes, gradient or none; then it gives up
    for layer in model.base_model.layers:
        if args.compile:
            layer.compile()
        fully_shard(layer, **options)
    fully_shard(module, **options)
    module.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if dist.get_rank() == 0:
                whole.copy_(weights.pop(name))
            if isinstance(tensor, DTensor):
                tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements))  # rank 0's, in shards
            else:
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)
    return module.train()


def make_optimizer(args, module):
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=args.adam_betas, fused=True)


def learning_rate(args, step, num_steps):
    """Learning rate of `step` (from 0): linear warm-up, then the schedule down to 0. A pure function of the step."""
    warmup = math.ceil(args.warmup_ratio * num_steps)
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if args.lr_schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return args.lr * (1 - progress) if args.lr_schedule == "linear" else args.lr


# Flags that may differ when a run is continued: they do not change what is computed.
RUNTIME_FLAGS = {"out", "tokens_per_microbatch", "eval_every", "save_every", "keep", "shard", "attn", "compile",
                 "activation_checkpointing", "track"}  # fmt: skip
RUNTIME_FLAGS |= {"slots", "verifier_workers", "log_samples", "max_logprob_gap", "eval_samples", "eval_temperature"}


def start_run(args, fingerprints):
    """Prepares the run's folder, or finds the run in it. Returns the step to continue from, None if it is finished.

    Raises RunError if the folder holds another run: other flags, another script or other data.
    """
    out = Path(args.out)
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "datasets")}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    config = {"script": Path(__file__).name, "data": fingerprints, "args": redact(dataclasses.asdict(args))}
    config |= {"world_size": dist.get_world_size(), "versions": versions, "commit": git.stdout.strip() or None}
    config = json.loads(json.dumps(config))
    steps = [int(path.name[5:]) for path in out.glob("checkpoints/step_*") if path.suffix == ""]
    if (out / "config.json").exists() and (steps or (out / "model").exists()):
        old = json.loads((out / "config.json").read_text())
        pairs = [(flag, old["args"].get(flag), value) for flag, value in config["args"].items()]
        pairs += [(key, old[key], config[key]) for key in ("script", "data")]
        changed = [f"{key}: {a} → {b}" for key, a, b in pairs if a != b and key not in RUNTIME_FLAGS]
        if changed:
            raise common.RunError(f"{out} holds another run ({'; '.join(changed)}): choose another --out")
    if (out / "model").exists():
        return None
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for leftover in [*out.glob("checkpoints/*.tmp"), *out.glob("checkpoints/*.trash"), *out.glob("model.tmp")]:
        shutil.rmtree(leftover)  # half written or half deleted when the run was killed
    step = max(steps, default=0)
    texts = {out / "config.json": json.dumps(config, indent=2)}
    for path in (out / "metrics.jsonl", out / "samples.jsonl"):
        lines = path.read_text().splitlines(True) if path.exists() else []
        lines = [line for line in lines if step and line.endswith("}\n") and json.loads(line)["step"] <= step]
        texts |= {path: "".join(lines)} if path.exists() else {}
    for path, text in texts.items():
        path.with_suffix(".tmp").write_text(text)
        path.with_suffix(".tmp").replace(path)
    return step


def redact(value):
    """`value` (JSON-like) with whatever looks like a secret replaced, for files that get shared."""
    secret = r"(hf_|sk-|ghp_)[\w-]{8,}|(?<=key=)[^&\s\"]+|(?<=://)[^/@\s\"]+:[^/@\s\"]+(?=@)"
    return json.loads(re.sub(secret, "[redacted]", json.dumps(value)))


def save_checkpoint(args, module, optimizer, chat, step, state=None):
    """Writes checkpoints/step_N: whole or not at all. Sharded state to resume from, and model/ to load elsewhere.

    `state`: what else this rank needs to continue, of plain values and tensors.
    """
    final = Path(args.out, "checkpoints", f"step_{step}")
    partial, rank = final.with_suffix(".tmp"), dist.get_rank()
    on_rank0(lambda: partial.mkdir())
    try:
        model_state, optimizer_state = get_state_dict(module, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial / "state")
        random = {"cpu": torch.get_rng_state(), "world_size": dist.get_world_size(), "state": state}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        torch.save(random, partial / f"random_{rank}.pt")
        export_model(args, module.model, chat, partial / "model")
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        free, reason = shutil.disk_usage(partial.parent).free, str(error).strip().splitlines()[-1]
        raise common.RunError(f"checkpoint step {step} to {final} failed, {free:,} bytes free: {reason}") from None
    sync_to_disk(partial)
    dist.barrier()

    def publish():
        partial.rename(final)
        sync_to_disk(final.parent, recursive=False)
        for old in sorted(final.parent.glob("step_*"), key=lambda path: int(path.name[5:]))[: -args.keep]:
            shutil.rmtree(old.rename(old.with_suffix(".trash")))  # renamed first: there is never half a step_N

    on_rank0(publish)


def sync_to_disk(folder, recursive=True):
    """fsync of a folder and, if recursive, everything in it."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load_checkpoint(args, module, optimizer, step):
    """Restores what was saved after `step` steps, on any number of ranks. Returns (this rank's `state`, whether it is).

    With another number of ranks than before it is rank 0's state of then.
    """
    path = Path(args.out, "checkpoints", f"step_{step}")
    if path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o002:  # torch unpickles its metadata
        raise common.RunError(f"{path} belongs to somebody else or is world-writable: it will not be loaded")
    model_state, optimizer_state = get_state_dict(module, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path / "state")
    set_state_dict(module, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    random = torch.load(path / "random_0.pt", weights_only=True)
    if same_world := random["world_size"] == dist.get_world_size():
        random = torch.load(path / f"random_{dist.get_rank()}.pt", weights_only=True)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
    elif dist.get_rank() == 0:
        print("the number of processes has changed: random states start anew (dropout will differ)")
    return random["state"], same_world


def export_model(args, model, chat, path):
    """Writes a folder that from_pretrained opens: weights in the source model's precision, tokenizer, chat template."""
    config = load_config(args)  # the source's; a reward model differs in two entries
    config.num_labels, config.pad_token_id = model.config.num_labels, model.config.pad_token_id
    weights, persistent = {}, model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # a tied head appears once
        if name in persistent:
            whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
            if dist.get_rank() == 0:
                weights[name] = whole.to("cpu", config.dtype)
    if dist.get_rank() == 0:
        with torch.device("meta"):
            skeleton = type(model)(config).to(config.dtype)
        skeleton.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=chat.end_of_turn)
        skeleton.save_pretrained(path, state_dict=weights)
        chat.tokenizer.save_pretrained(path)
        sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(path.iterdir())]
        (path / "SHA256SUMS").write_text("".join(sums))
    dist.barrier()


def finish_run(args, module, chat):
    """Publishes the final model as DIR/model, which marks the run as finished."""
    partial = Path(args.out, "model.tmp")
    export_model(args, module.model, chat, partial)
    if dist.get_rank() == 0:
        sync_to_disk(partial)
        partial.rename(Path(args.out, "model"))
    dist.destroy_process_group()


def check_finite(args, step, loss, grad_norm, rows, indices):
    """Stops before the optimizer step if the loss or the gradient is not finite; names the step and the batch."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    names = [rows.where(i) for i in indices]
    path = Path(args.out, f"not_finite_step_{step + 1}.json")
    if dist.get_rank() == 0:
        path.write_text(json.dumps(names, indent=1))
    raise common.RunError(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; stopped before the update, so the weights are as "
        f"they were. Rows of this batch: {'; '.join(names[:4])}{' …' * (len(names) > 4)} (all of them in {path})"
    )


def start_logging(args, first_step, num_steps):
    """Returns log(entry), which on rank 0 appends to metrics.jsonl, moves the progress bar and feeds W&B."""
    if dist.get_rank() != 0:
        return lambda entry: None
    bar, run = tqdm(total=num_steps, initial=first_step, unit="step"), None
    if args.track:
        import wandb

        netrc = Path.home() / ".netrc"
        logged_in = os.environ.get("WANDB_API_KEY") or (netrc.exists() and "wandb" in netrc.read_text())
        run = wandb.init(
            project="postcard",
            name=Path(args.out).name,
            id=hashlib.sha256(str(Path(args.out).resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=args.out,
            config=redact(dataclasses.asdict(args)),
            mode=os.environ.get("WANDB_MODE", "online" if logged_in else "offline"),
            settings=wandb.Settings(x_disable_meta=True, console="off"),  # command line and output may hold secrets
        )

    def log(entry):
        with open(Path(args.out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(entry) + "\n")
        shown = [key for key in ("loss", "eval_loss", "accuracy", "reward", "tokens_per_second") if key in entry]
        bar.set_postfix({key: f"{entry[key]:.4g}" for key in shown}, refresh=False)
        bar.update(entry["step"] - bar.n)
        if run:
            run.log(entry, step=entry["step"])

    return log


# ------------------------------------------------------------------------------------------------- the algorithm


@dataclass
class Sample:
    """A judged completion of N tokens, (N,), behind its prompt, together (L,)."""

    position: int  # of the prompt in the stream of prompts; its group has the same
    row: int  # of the prompt in the data
    begun: int  # the step in which it was asked for
    input_ids: np.ndarray  # (L,)
    trained: np.ndarray  # (L,); true in the completion
    behaviour_logprobs: np.ndarray  # (N,), as all that follow
    ended: bool
    text: str
    reward: float
    verdict: tuple
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    values: np.ndarray | None = None
    rm_scores: np.ndarray | None = None  # by the reward model, if any; the last one is that of the completion
    score: float = 0.0  # what the last token earns, by `reward` and the flags
    kls: np.ndarray | None = None  # log(π_old / π_ref)
    rewards: np.ndarray | None = None  # r_t
    returns: np.ndarray | None = None
    advantages: np.ndarray | None = None
    weight: float = 0.0  # of each of its tokens in the loss: 1 / Σ 1 in equation (3)

    def columns(self, *names):
        """(L,) input_ids, trained, and numbers, 0 in the prompt, for common.pack; one number stands for every token."""
        columns = np.zeros((len(names), len(self.trained)))
        for column, name in zip(columns, names, strict=True):
            column[self.trained] = getattr(self, name)
        return self.input_ids, self.trained, *columns


def sample_and_judge(args, sampler, pool, chat, rows, positions, row_of, **options):
    """Completions of the prompts at `positions` (dealt to the ranks) with their rewards, from all ranks on every rank.

    Args:
        row_of: position → row. options: of Sampler.sample. With `enough`, kept ones may come back, and others be kept.

    Returns:
        [Sample, ...], by position; those of a prompt side by side.
    """
    mine = list(positions)[dist.get_rank() :: dist.get_world_size()]
    prompts = [ids for ids, _ in rows.sequences([row_of(position) for position in mine])] if mine else []
    completions = sampler.sample(prompts, max_new_tokens=args.max_new_tokens, indices=mine, **options)
    numbers = [row_of(c.prompt) for c in completions]
    answers = [c.token_ids[: len(c.token_ids) - c.ended] for c in completions]  # without the end token
    texts = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    jobs = [json.loads(rows.table[row]["job"]) for row in numbers]
    # Where the template opens a thought, the verifier has to know that the completion begins inside of it.
    opened = [chat.tokenizer.decode(c.prompt_ids[-4:]).rstrip().endswith("<think>") for c in completions]
    judged = ["<think>" * thinks + text for thinks, text in zip(opened, texts, strict=True)]
    jobs = [(name, text, truth, weights) for (name, truth, weights), text in zip(jobs, judged, strict=True)]
    verdicts = pool.score(jobs)
    samples = []
    for c, row, text, verdict in zip(completions, numbers, texts, verdicts, strict=True):
        over = max(0, len(c.token_ids) - args.max_new_tokens + args.overlong_buffer)
        samples.append(
            Sample(
                position=c.prompt,
                row=row,
                begun=c.step,
                input_ids=np.concatenate([c.prompt_ids, c.token_ids]),
                trained=np.arange(len(c.prompt_ids) + len(c.token_ids)) >= len(c.prompt_ids),
                behaviour_logprobs=c.logprobs,
                ended=c.ended,
                text=text,
                reward=verdict.reward - (over / args.overlong_buffer if over else 0.0),
                verdict=verdict,
            )
        )
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, samples)
    return sorted(sum(everybody, []), key=lambda sample: sample.position)


def grouped(samples):
    """[[Sample, ...] of each prompt]."""
    return [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.position)]


def row_at(num_rows, seed, position):
    """The row at a position of the stream of prompts."""
    return int(common.stream(num_rows, seed, [position])[0])


def sample_round(args, sampler, pool, chat, rows, cursor, missing, step, signals):
    """Samples for `missing` prompts from the cursor on; with --inflight for more, until so many of any are answered.

    Args:
        cursor: the next position in the stream of prompts.

    Returns:
        samples, and the cursor behind their prompts. When a signal has come meanwhile, some may be missing.
    """
    rank, world, in_flight = dist.get_rank(), dist.get_world_size(), int(all_sum(len(sampler.groups))[0])
    positions = range(cursor, cursor + max(0, missing + args.inflight - in_flight))
    enough = len(range(missing)[rank::world]) if args.inflight else None
    oldest = min((begun for begun, _ in sampler.groups), default=step)
    if step - oldest >= args.max_staleness:
        enough = None  # all of this rank's
    options = {"n": args.group_size, "temperature": args.temperature, "seed": args.seed, "step": step}
    options |= {"enough": enough, "stop": lambda: bool(signals)}
    row_of = functools.partial(row_at, len(rows), args.seed)
    return sample_and_judge(args, sampler, pool, chat, rows, positions, row_of, **options), positions.stop


def load_value_config(value_args, policy_config, chat):
    """The value model's configuration; value_args.model is its folder. Raises RunError if its vocabulary differs."""
    config = load_config(value_args)
    vocabulary = common.load_tokenizer(value_args.model, "chatml").get_vocab()  # its own template plays no part
    if config.vocab_size != policy_config.vocab_size or vocabulary != chat.tokenizer.get_vocab():
        raise common.RunError(f"--value_model {value_args.model} has another vocabulary than --model")
    if value_args.reward_model_coef and "ForSequenceClassification" not in str(config.architectures):
        raise common.RunError(f"--reward_model_coef needs a reward model as --value_model; {value_args.model} is none")
    config.update({name: 0.0 for name in config.to_dict() if "dropout" in name})  # off, as in the policy
    config.num_labels = 1
    return config


def set_rewards(args, sample):
    """The reward of each token: what its drift from the reference costs, and at the last token the score."""
    sample.score = args.reward_scale * sample.reward
    if args.reward_model_coef:
        sample.score += args.reward_model_coef * sample.rm_scores[-1]
    if not sample.ended and args.no_eos_score is not None:
        sample.score = args.no_eos_score
    sample.kls = sample.old_logprobs - sample.ref_logprobs  # (N,); k1: its mean over samples of π_old is the KL
    sample.rewards = -args.kl_beta * sample.kls
    sample.rewards[-1] += sample.score


def gae(rewards, values, lengths, gamma, gae_lambda):
    """Equation (1) by CleanRL's loop, for completions end to end: (tokens,), (tokens,), (completions,) → (tokens,)."""
    lengths, ends, advantages = np.array(lengths), np.cumsum(lengths), np.zeros(len(rewards))
    next_value, next_advantage = np.zeros((2, len(lengths)))  # of each completion; 0 after its last token
    for back in range(1, lengths.max() + 1):
        on = lengths >= back  # the completions that have a token so far back
        t = ends[on] - back  # the places of these tokens
        delta = rewards[t] + gamma * next_value[on] - values[t]
        advantages[t] = delta + gamma * gae_lambda * next_advantage[on]
        next_value[on], next_advantage[on] = values[t], advantages[t]
    return advantages


def all_tokens(samples, name):
    """An (N,) attribute of every sample, concatenated."""
    return np.concatenate([getattr(sample, name) for sample in samples])


def set_advantages(args, samples):
    """Equation (1), then whitens the advantages, but not the returns, over all tokens of the batch."""
    lengths, values = [len(sample.values) for sample in samples], all_tokens(samples, "values")
    advantages = gae(all_tokens(samples, "rewards"), values, lengths, args.gamma, args.gae_lambda)  #            (1)
    whitened = (advantages - advantages.mean()) / np.sqrt(advantages.var() + 1e-8)
    for name, numbers in (("advantages", whitened), ("returns", advantages + values)):
        for sample, own in zip(samples, np.split(numbers, np.cumsum(lengths)[:-1]), strict=True):
            setattr(sample, name, own)


def deal_minibatches(args, groups):
    """Cuts groups into minibatches, sets the weight of each sample's tokens in its minibatch, and deals to ranks.

    Returns:
        this rank's share: [[[Sample, ...] of a microbatch, ...] of a minibatch, ...].
    """
    minibatches = []
    for part in np.array_split(np.arange(len(groups)), min(args.minibatches, len(groups)) or 1):
        samples = [sample for i in part for sample in groups[i]]
        lengths = [int(sample.trained.sum()) for sample in samples]
        for sample, length in zip(samples, lengths, strict=True):
            averaged = {"token": sum(lengths), "sequence": len(samples) * length}
            sample.weight = 1 / averaged.get(args.average, len(samples) * args.max_new_tokens)
        lengths = [len(sample.input_ids) for sample in samples]
        dealt = common.deal(lengths, args.tokens_per_microbatch, dist.get_world_size())[dist.get_rank()]
        minibatches.append([[samples[i] for i in microbatch] for microbatch in dealt])
    return minibatches


@torch.no_grad()
def set_numbers(args, samples, name, forward, device):
    """Sets an attribute of every sample to what `forward` says of its tokens, (N,). Ranks share the work.

    Args:
        forward: microbatch → (T,), where position t is about the token behind it.
    """
    lengths, mine, everybody = [len(sample.input_ids) for sample in samples], {}, [None] * dist.get_world_size()
    for indices in common.deal(lengths, args.tokens_per_microbatch, dist.get_world_size())[dist.get_rank()]:
        numbers = forward(common.pack([samples[i].columns() for i in indices], device))  # (T,)
        by_token = np.roll(numbers.double().cpu().numpy(), 1)
        ends = np.cumsum([lengths[i] for i in indices])
        mine |= zip(indices, np.split(by_token, ends[:-1]), strict=False)  # of no indices, pack makes one token
    dist.all_gather_object(everybody, mine)
    for i, numbers in itertools.chain(*(ranks.items() for ranks in everybody)):
        setattr(samples[i], name, numbers[samples[i].trained])


def host_copy(module):
    """This rank's shards of all parameters, in host memory."""
    shards = [parameter.detach().to_local().to("cpu", copy=True) for parameter in module.parameters()]
    return [shard.pin_memory() for shard in shards] if torch.cuda.is_available() else shards


@contextlib.contextmanager
def exchanged(module, shards):
    """Inside, the module has other weights, a `host_copy`, and that holds its own. Takes no memory but one shard."""

    def exchange():
        module.reshard()  # a forward leaves the outermost module's parameters gathered
        for parameter, other in zip(module.parameters(), shards, strict=True):
            own = parameter.detach().to_local()
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)

    exchange()
    yield
    exchange()


def policy_loss(args, logprobs, microbatch):
    """Equations (2) and (3) for T tokens, before the sum.

    Args:
        logprobs: (T,) log π(y_t | x, y_<t), with gradient. microbatch: its extras hold the other numbers.

    Returns:
        losses (T,), and {metric: (T,)}; both 0 where nothing is trained.
    """
    extras, trained = microbatch.extras, microbatch.targets != common.IGNORE  # (T,)
    old = extras["old_logprobs"]  # (T,)
    logratio = logprobs - old  # (T,)
    ratio, advantages = logratio.exp(), extras["advantages"]  # (T,)
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    w = (old - extras["behaviour_logprobs"]).exp()  # (T,)                                                       (2)
    losses = -torch.min(ratio * advantages, clipped * advantages)  # (T,)                                        (3)
    if args.tis_cap:
        losses = w.clamp(max=args.tis_cap) * losses
    binding = torch.where(advantages > 0, ratio > 1 + args.clip_high, ratio < 1 - args.clip_low) & (advantages != 0)
    metrics = {"ratio": ratio, "clipfrac": binding, "approx_kl": ratio - 1 - logratio}
    metrics |= {"behaviour_kl": w - 1 - w.log(), "tis_capped": w > (args.tis_cap or math.inf)}
    return losses * trained, {name: (values * trained).detach() for name, values in metrics.items()}


def value_loss(args, values, microbatch):
    """Equation (4) for T tokens, before the sum, as policy_loss. values: (T,) V', with gradient."""
    extras, trained = microbatch.extras, microbatch.targets != common.IGNORE  # (T,)
    old, returns = extras["values"], extras["returns"]  # (T,)
    errors = (values - returns) ** 2  # (T,)
    clipped = values.clamp(old - args.value_clip, old + args.value_clip) if args.value_clip else values
    clipped_errors = (clipped - returns) ** 2  # (T,); flat where V' has left V by more than ε_V
    losses = 0.5 * torch.max(errors, clipped_errors)  # (T,); the worse: no gain from going further              (4)
    return losses * trained, {"value_clipfrac": ((clipped_errors > errors) * trained).detach()}


def summarise(samples, groups, step):
    """Metrics of a rollout: rewards of all that was sampled, whether it is trained on or not."""
    rewards = np.array([sample.reward for sample in samples])
    every = grouped(samples)
    lengths = [int(sample.trained.sum()) for sample in samples]
    metrics = {
        "reward": rewards.mean(),
        "reward_std": np.mean([np.std([sample.reward for sample in group]) for group in every]),
        "groups": len(groups),
        "zero_std_groups": np.mean([len({sample.reward for sample in group}) == 1 for group in every]),
        "completion_tokens": np.mean(lengths),
        "eos_rate": np.mean([sample.ended for sample in samples]),
        "sampled_tokens": sum(lengths),
        "staleness": np.mean([step - sample.begun for sample in samples]),
    }
    values, returns, kls = (all_tokens(samples, name) for name in ("values", "returns", "kls"))
    outcomes = np.concatenate([s.rewards[::-1].cumsum()[::-1] for s in samples])  # R_t if λ = γ = 1: without V
    metrics |= {"value": values.mean(), "return": returns.mean(), "score": np.mean([s.score for s in samples])}
    for name, target in (("explained_variance", returns), ("explained_variance_mc", outcomes)):
        metrics[name] = 1 - (target - values).var() / max(target.var(), 1e-8)
    metrics["ref_kl"] = (np.exp(-kls) - 1 + kls).mean()  # k3 of grpo.py: as k1 in the mean, and never negative
    metrics["kl_spent"] = kls.sum() / len(samples)
    metrics["kl_reward"] = all_tokens(samples, "rewards").sum() / len(samples) - metrics["score"]
    return {name: float(value) for name, value in metrics.items()} | rates([sample.verdict for sample in samples])


def write_samples(args, step, samples, rows, chat, held_out=False):
    """On rank 0, appends the first --log_samples completions of a step to samples.jsonl, with rewards. Returns them."""
    if dist.get_rank() != 0:
        return []
    lines = []
    for sample in samples[: args.log_samples]:
        prompt = chat.tokenizer.decode(sample.input_ids[~sample.trained], skip_special_tokens=True)
        line = {"step": step, "row": rows.where(sample.row), "prompt": prompt, "completion": sample.text}
        line |= {"reward": sample.reward, "reason": sample.verdict.reason, "answer": sample.verdict.answer}
        line |= {"ended": sample.ended, "held_out": held_out}
        if not held_out:  # those have no values; demo/show_tokens.py draws these
            line["token_ids"] = sample.input_ids[sample.trained].tolist()
            for name in ("values", "advantages", "returns", "rewards", "kls"):
                line[name] = getattr(sample, name).round(4).tolist()
        lines.append(line)
    with open(Path(args.out, "samples.jsonl"), "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return lines


def evaluate(args, policy, sampler, pool, chat, rows, step):
    """Mean reward on all of `rows`, with its 95 % interval over prompts, pass@1 and pass@k; prints some completions."""
    kept = sampler.state_dict()  # what is in flight has to wait
    sampler.load_state_dict({"completions": []})
    sampler.sync(policy)
    options = {"n": args.eval_samples, "temperature": args.eval_temperature, "seed": args.seed, "step": -1}
    samples = sample_and_judge(args, sampler, pool, chat, rows, range(len(rows)), int, **options)
    sampler.load_state_dict(kept)
    groups = grouped(samples)
    means = np.array([np.mean([sample.reward for sample in group]) for group in groups])
    half = 1.96 * means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.inf
    right = np.array([[sample.verdict.reason == "right" for sample in group] for group in groups])
    for line in write_samples(args, step, samples, rows, chat, held_out=True)[:3]:
        tqdm.write(f"{line['reward']:6.2f} {line['reason']:9}{line['prompt'][-60:]!r} {line['completion'][:120]!r}")
    mean = means.mean()
    entry = {"eval_reward": mean, "eval_reward_low": mean - half, "eval_reward_high": mean + half}
    entry |= {"eval_pass_at_1": right.mean(), f"eval_pass_at_{args.eval_samples}": right.any(axis=1).mean()}
    if dist.get_rank() == 0:
        tqdm.write(f"step {step}: held-out reward {mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]")
    return {name: float(value) for name, value in entry.items()}


def check_jobs(pool, rows):
    """Raises RunError if a verifier does not exist or cannot use the ground truth of a row."""
    jobs = [json.loads(text) for text in rows.table["job"][:]]
    for i, message in pool.check([(name, "", truth, weights) for name, truth, weights in jobs]).items():
        raise common.RunError(f"{rows.where(i)}: {message}")


def check_sampler(args, gap):
    """Raises RunError if sampler and trainer disagree. gap: () this rank's largest difference of log-probabilities."""
    dist.all_reduce(gap, dist.ReduceOp.MAX)
    bound = args.max_logprob_gap or (1.0 if gap.is_cuda else 1e-3)
    if dist.get_rank() == 0:
        tqdm.write(f"largest difference of a sampled and a recomputed log-probability: {gap.item():.2e}")
    if gap.item() > bound:
        raise common.RunError(
            f"sampled and recomputed log-probabilities differ by {gap.item():.3g}, more than --max_logprob_gap {bound}"
        )


def main(args):
    # 1. processes
    device, mesh = setup_distributed(args)
    rank, world = dist.get_rank(), dist.get_world_size()
    signals = []  # SIGTERM: save, exit; a rollout is given up, an update finished
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    if args.group_size < 1 or not 0 < args.max_new_tokens < args.max_length or args.temperature <= 0:
        raise common.RunError("need --group_size >= 1, 0 < --max_new_tokens < --max_length and --temperature > 0")

    # 2. data
    config = load_config(args)
    chat = common.ChatFormat(common.load_tokenizer(args.model, args.chat_template), args.content_tokens)
    config.update({name: 0.0 for name in config.to_dict() if "dropout" in name})  # off: the sampler has none
    value_args = dataclasses.replace(args, model=args.value_model or args.model, lr=args.value_lr)  # the value model's
    value_config = load_value_config(value_args, config, chat)
    encode = common.PromptEncoder(chat, config.vocab_size, args.max_length - args.max_new_tokens, "drop")
    rows = common.load_rows(args.data, encode, args.seed, args.max_skip_frac)
    eval_rows = common.load_rows(args.eval_data, encode, args.seed, args.max_skip_frac) if args.eval_data else None
    num_rows = math.ceil(args.epochs * len(rows))  # prompts seen in the whole run
    num_steps = min(math.ceil(num_rows / args.batch_size), args.steps or num_rows)
    if rank == 0:
        print("\n".join(rows.report + (eval_rows.report if eval_rows else [])))
        print(common.show_example(chat.tokenizer, *rows.sequences([0])[0]))
    first_step = on_rank0(lambda: start_run(args, [rows.fingerprint, eval_rows and eval_rows.fingerprint]))
    if first_step is None:
        return print(f"{args.out} is finished: its model is {args.out}/model")
    pool = Pool(args.verifier_workers, args.sandbox)
    on_rank0(lambda: [check_jobs(pool, each) for each in (rows, eval_rows) if each])

    # 3. model
    policy = load_model(args, config, AutoModelForCausalLM, Policy, device, mesh)
    reference = host_copy(policy)  # π_ref; before a checkpoint is loaded
    value_model = load_model(value_args, value_config, ScoreModel, ValueModel, device, mesh)
    reward_model = host_copy(value_model) if args.reward_model_coef else None
    if args.zero_value_head:  # the reward model, copied above, keeps its head
        torch.nn.init.zeros_(value_model.model.score.weight)
    both = ActorCritic({"policy": policy, "value_model": value_model})
    try:
        eos_ids = {chat.end_of_turn, chat.tokenizer.eos_token_id} - {None}
        sampler = Sampler(config, args.slots, args.max_length, eos_ids, device)
    except ValueError as error:
        raise common.RunError(str(error)) from None

    # 4. optimizer
    optimizer = make_optimizer(args, policy)
    value_optimizer = make_optimizer(value_args, value_model)

    # 5. resume
    cursor = 0  # next position in the stream of prompts
    if first_step:
        state, same_world = load_checkpoint(args, both, [optimizer, value_optimizer], first_step)
        cursor = state["cursor"]
        if same_world:  # otherwise completions in flight are lost: other ranks had begun them
            sampler.load_state_dict(state["sampler"])
    log = start_logging(args, first_step, num_steps)
    if eval_rows and not first_step:
        log({"step": 0} | evaluate(args, policy, sampler, pool, chat, eval_rows, 0))

    for step in range(first_step, num_steps):
        # prompts → completions → rewards → groups
        started, state = time.perf_counter(), {"cursor": cursor, "sampler": sampler.state_dict()}
        sampler.sync(policy)
        sampled, cursor = sample_round(args, sampler, pool, chat, rows, cursor, args.batch_size, step, signals)
        groups = grouped(sampled)
        if all_sum(len(signals))[0]:
            if step > first_step and not (args.save_every and step % args.save_every == 0):
                save_checkpoint(args, both, [optimizer, value_optimizer], chat, step, state)
            sys.exit(128 + signal.SIGTERM)  # 143: the same command continues
        rollout_seconds = time.perf_counter() - started

        # what the loss needs to know of each token → minibatches of microbatches
        set_numbers(args, sampled, "old_logprobs", lambda batch: policy(batch, args.temperature)[0], device)
        set_numbers(args, sampled, "values", value_model, device)
        with exchanged(policy, reference):
            set_numbers(args, sampled, "ref_logprobs", lambda batch: policy(batch, args.temperature)[0], device)
        if reward_model:
            with exchanged(value_model, reward_model):  # V is read before a token, its score after: one position on
                set_numbers(args, sampled, "rm_scores", lambda batch: value_model(batch).roll(-1), device)
        for sample in sampled:
            set_rewards(args, sample)
        set_advantages(args, sampled)
        updates = deal_minibatches(args, groups) * args.passes
        extras = ["behaviour_logprobs", "old_logprobs", "advantages", "values", "returns", "weight"]

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, num_steps) * (step >= args.value_warmup_steps)  # 0: V alone learns
        for group in value_optimizer.param_groups:
            group["lr"] = learning_rate(value_args, step, num_steps)
        totals = 0.0
        for update, minibatch in enumerate(updates):
            # forward, loss, backward
            sums, gap = 0, torch.zeros((), device=device)
            for samples in minibatch:
                microbatch = common.pack([sample.columns(*extras) for sample in samples], device, *extras)
                logprobs, entropy = policy(microbatch, args.temperature)  # (T,)
                losses, metrics = policy_loss(args, logprobs, microbatch)  # (T,)
                loss = (losses * microbatch.extras["weight"]).sum()  # ()
                (loss * world).backward()  # FSDP averages gradients over ranks: undo its 1 / world
                value_losses, value_metrics = value_loss(args, value_model(microbatch), microbatch)  # (T,)
                loss_v = (value_losses * microbatch.extras["weight"]).sum()  # ()
                (args.value_coef * loss_v * world).backward()
                trained = microbatch.targets != common.IGNORE
                metrics = {"trained_tokens": trained, "entropy": entropy * trained} | metrics | value_metrics
                sums += torch.stack([loss.detach(), loss_v.detach(), *[values.sum() for values in metrics.values()]])
                gap = gap.maximum(((logprobs.detach() - microbatch.extras["behaviour_logprobs"]) * trained).abs().max())
            if step == first_step and update == 0 and min(sample.begun for sample in sampled) == step:
                check_sampler(args, gap)

            # clip, update
            sums = all_sum(*sums)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
            grad_norm = grad_norm.full_tensor().item()
            value_grad_norm = torch.nn.utils.clip_grad_norm_(value_model.parameters(), args.max_grad_norm or math.inf)
            value_grad_norm = value_grad_norm.full_tensor().item()
            indices = sorted({group[0].row for group in groups})
            check_finite(args, step, sums[0], grad_norm, rows, indices)
            check_finite(args, step, sums[1], value_grad_norm, rows, indices)
            optimizer.step()
            optimizer.zero_grad()
            value_optimizer.step()
            value_optimizer.zero_grad()
            totals += np.array([grad_norm, value_grad_norm, *sums])  # loss, loss_v, trained tokens, other metrics

        # log, evaluate, save
        step, seconds = step + 1, time.perf_counter() - started
        entry = {"step": step, "lr": optimizer.param_groups[0]["lr"]} | summarise(sampled, groups, step - 1)
        names = ("grad_norm", "value_grad_norm", "policy_loss", "value_loss")
        entry |= zip(names, (totals[:4] / len(updates)).tolist(), strict=True)
        entry["loss"] = entry["policy_loss"] + args.value_coef * entry["value_loss"]
        entry |= zip(list(metrics)[1:], (totals[5:] / totals[4]).tolist(), strict=True)
        tokens = sum(len(sample.input_ids) for sample in sampled)
        entry |= {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}
        entry |= {"rollout_seconds": rollout_seconds}
        write_samples(args, step, sampled, rows, chat)
        if eval_rows and (step % args.eval_every == 0 or step == num_steps):
            entry |= evaluate(args, policy, sampler, pool, chat, eval_rows, step)
        log(entry)
        stop = all_sum(len(signals))[0]
        if step < num_steps and (stop or (args.save_every and step % args.save_every == 0)):
            state = {"cursor": cursor, "sampler": sampler.state_dict()}
            save_checkpoint(args, both, [optimizer, value_optimizer], chat, step, state)
            if stop:
                sys.exit(128 + signal.SIGTERM)  # 143: the same command continues

    # export
    pool.close()
    value_path = Path(args.out, "value_model")
    on_rank0(lambda: shutil.rmtree(value_path, ignore_errors=True))  # half written when the run was killed
    export_model(value_args, value_model.model, chat, value_path)
    on_rank0(lambda: sync_to_disk(value_path))
    finish_run(args, policy, chat)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except common.RunError as error:
        sys.exit(f"error: {error}")
