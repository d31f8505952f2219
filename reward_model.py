"""Reward modelling: turn comparisons of two answers into one number that says how good an answer is.

For a prompt x with a chosen answer y_c and a rejected one y_r, the Bradley–Terry model says that y_c is preferred with
probability σ(r(x, y_c) - r(x, y_r)). The loss is its negative log-likelihood,

    L = mean over pairs of  -log σ(r(x, y_c) - r(x, y_r) - margin)  +  centering (r(x, y_c) + r(x, y_r))²        (1)

with margin 0 unless the data says how much better y_c is (Llama 2, arXiv 2307.09288, equation 2), and centering 0 by
default; it keeps scores around 0, which the likelihood leaves open (Eisenstein et al., arXiv 2312.09244). r is read at
the last token of the conversation by a linear head, which starts as N(0, 1/(H+1)) on a language model (Stiennon et al.,
arXiv 2009.01325).

Defaults are Tülu 3's (arXiv 2411.15124, section 6), with one difference: gradients are clipped at norm 1.

    python reward_model.py --model DIR --data pairs.jsonl --out runs/rm                       one process, CPU or GPU
    torchrun --nproc_per_node 8 reward_model.py --model runs/sft/model --data pairs.jsonl --eval_data test.jsonl ...

OUT/model opens with AutoModelForSequenceClassification. A run killed at any moment continues exactly where it was when
the same command is given again.

Shapes:  T tokens in a packed microbatch, S sequences in it, B pairs (S = 2B: chosen, rejected, chosen, …), H hidden
size, N pairs in the data.
"""

import copy
import dataclasses
import faulthandler
import gc
import hashlib
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
import torch.nn.functional as F
import tyro
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, GenerationConfig

import common
import kernels.attention  # noqa: F401  (registers the attention functions that --attn names)


@dataclass
class Args:
    model: str
    """model folder or Hub id to start from"""
    data: list[str]
    """training data: SOURCE[:AMOUNT] ...; SOURCE is a .jsonl/.json/.parquet file or a Hub id (name, name@split);
    AMOUNT a fraction of its rows ("0.5", "2.0" repeats) or a count ("1000")"""
    out: str
    """folder of the run; the same command with the same folder continues an interrupted run"""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """held-out data, in the same form"""
    chat_template: str | None = None
    """tulu, chatml or a Jinja file; by default the tokenizer's own"""
    content_tokens: list[str] = dataclasses.field(default_factory=list)
    """control tokens that assistant content may hold as tokens ("<think>" "</think>"); all others there are text"""
    max_length: int = 2048
    """longest sequence, in tokens"""
    overlong: Literal["truncate", "drop"] = "drop"
    """what happens to longer ones (either way they are counted)"""
    max_skip_frac: float = 0.01
    """refuse to start when a larger share of a source's rows is unusable"""
    batch_size: int = 256
    """rows (conversations, pairs or prompts) per step, over all ranks and microbatches"""
    tokens_per_microbatch: int = 8192
    """tokens packed into one forward pass of one rank; 1 means one sequence at a time; does not change the loss"""
    centering: float = 0.0
    """weight of the squared sum of a pair's scores, which keeps scores around 0; 0.01 is usual"""
    lr: float = 3e-6
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
    track: bool = False
    """log to Weights & Biases (offline unless logged in)"""


class RewardModel(torch.nn.Module):
    """A language model that maps a packed microbatch to the score of each sequence."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
        last = hidden[microbatch.cu_seqlens[1:].long() - 1]  # (S, H)
        return last.float() @ self.model.score.weight[0].float()  # (S,) float32, also where H is bf16


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


def ranking_loss(args, scores, margins):
    """Equation (1) for B pairs, before the mean.

    Args:
        scores: (2B,) r of chosen, rejected, chosen, …; margins: (B,) how much better the chosen answer is.

    Returns:
        losses (B,), and {metric: (B,)}.
    """
    scores = scores[: 2 * len(margins)]  # B is 0 where a rank has no sequences
    chosen, rejected = scores[0::2], scores[1::2]  # (B,)
    losses = -F.logsigmoid(chosen - rejected - margins) + args.centering * (chosen + rejected) ** 2  # (B,)
    metrics = {"loss": losses, "accuracy": chosen > rejected, "margin": chosen - rejected}
    return losses, metrics | {"chosen_score": chosen, "rejected_score": rejected}


@torch.no_grad()
def evaluate(args, model, rows, device):
    """Loss and accuracy over all of `rows`; where they have subsets, also of each subset, with 95 % intervals."""
    model.eval()
    margins = torch.tensor(rows.table["margin"][:], device=device)  # (N,)
    results = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)  # loss, whether right
    for pairs in common.deal(rows.lengths, args.tokens_per_microbatch, dist.get_world_size())[dist.get_rank()]:
        losses, metrics = ranking_loss(args, model(common.pack(rows.sequences(pairs), device)), margins[pairs])
        results[pairs] = torch.stack([losses, metrics["accuracy"]], dim=1).double()
    model.train()
    dist.all_reduce(results)  # each rank has filled in its own rows
    loss, accuracy = results.mean(dim=0).tolist()
    entry, names = {"eval_loss": loss, "eval_accuracy": accuracy}, np.array(rows.table["subset"][:])
    if len(set(names)) > 1:
        right = {name: results[(names == name).nonzero()[0], 1] for name in sorted(set(names))}
        entry["eval_subsets"] = {name: wilson_interval(x.sum().item(), len(x)) for name, x in right.items()}
        entry["eval_subsets_mean"] = sum(x.mean().item() for x in right.values()) / len(right)
    return entry


def wilson_interval(right, total, z=1.96):
    """A share and its 95 % interval by Wilson's formula, which also holds near 0 and 1."""
    share, scale = right / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return {"share": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "total": total}


def main(args):
    # 1. processes
    device, mesh = setup_distributed(args)
    rank, world = dist.get_rank(), dist.get_world_size()
    signals = []  # SIGTERM: finish the step, save, exit
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))

    # 2. data
    config = load_config(args)
    chat = common.ChatFormat(common.load_tokenizer(args.model, args.chat_template), args.content_tokens)
    config.update({name: 0.0 for name in config.to_dict() if "dropout" in name})  # off: scores should not be noisy
    config.num_labels = 1
    if config.pad_token_id == chat.end_of_turn:  # transformers scores the last token that is not padding
        config.pad_token_id = None
    encode = common.PairEncoder(chat, config.vocab_size, args.max_length, args.overlong)
    rows = common.load_rows(args.data, encode, args.seed, args.max_skip_frac)
    eval_rows = common.load_rows(args.eval_data, encode, args.seed, args.max_skip_frac) if args.eval_data else None
    margins = torch.tensor(rows.table["margin"][:], device=device)  # (N,)
    if len(rows) < args.batch_size:
        raise common.RunError(f"--data has {len(rows)} usable rows, fewer than --batch_size {args.batch_size}")
    num_rows = math.ceil(args.epochs * len(rows))  # rows seen in the whole run
    num_steps = min(math.ceil(num_rows / args.batch_size), args.steps or num_rows)
    if rank == 0:
        print("\n".join(rows.report + (eval_rows.report if eval_rows else [])))
        print("\n".join(common.show_example(chat.tokenizer, *sequence) for sequence in rows.sequences([0])))
    first_step = on_rank0(lambda: start_run(args, [rows.fingerprint, eval_rows and eval_rows.fingerprint]))
    if first_step is None:
        return print(f"{args.out} is finished: its model is {args.out}/model")

    # 3. model
    model = load_model(args, config, ScoreModel, RewardModel, device, mesh)

    # 4. optimizer
    optimizer = make_optimizer(args, model)

    # 5. resume
    if first_step:
        load_checkpoint(args, model, optimizer, first_step)
    log = start_logging(args, first_step, num_steps)
    if eval_rows and not first_step:
        log({"step": 0} | evaluate(args, model, eval_rows, device))

    for step in range(first_step, num_steps):
        # batch → microbatches
        started = time.perf_counter()
        indices = common.batch_indices(len(rows), args.batch_size, args.seed, step, num_rows)
        microbatches = common.deal(rows.lengths[indices], args.tokens_per_microbatch, world)[rank]

        # forward, loss, backward
        sums = 0
        for microbatch in microbatches:
            pairs = indices[microbatch]
            scores = model(common.pack(rows.sequences(pairs), device))  # (2B,)
            losses, metrics = ranking_loss(args, scores, margins[pairs])  # (B,) (1)
            (losses.sum() / len(indices) * world).backward()  # FSDP averages gradients over ranks: undo its 1 / world
            sums += torch.stack([values.detach().sum() for values in metrics.values()])

        # clip, update
        *sums, stop = all_sum(*sums, len(signals))
        means = {name: value / len(indices) for name, value in zip(metrics, sums, strict=True)}
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        grad_norm = grad_norm.full_tensor().item()
        check_finite(args, step, means["loss"], grad_norm, rows, indices)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, num_steps)
        optimizer.step()
        optimizer.zero_grad()

        # log, evaluate, save
        step, seconds, tokens = step + 1, time.perf_counter() - started, int(rows.lengths[indices].sum())
        entry = {"step": step} | means | {"lr": group["lr"], "grad_norm": grad_norm, "tokens": tokens}
        entry |= {"tokens_per_second": tokens / seconds, "seconds": seconds}
        if eval_rows and (step % args.eval_every == 0 or step == num_steps):
            entry |= evaluate(args, model, eval_rows, device)
        log(entry)
        if step < num_steps and (stop or (args.save_every and step % args.save_every == 0)):
            save_checkpoint(args, model, optimizer, chat, step)
            if stop:
                sys.exit(128 + signal.SIGTERM)  # 143: the same command continues

    # export
    finish_run(args, model, chat)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except common.RunError as error:
        sys.exit(f"error: {error}")
