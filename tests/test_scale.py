"""What counts at scale: the host does not wait for the GPU, nodes exchange gradients once an update, bits can be had again."""

import importlib
import os

import launch
import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import call
from safetensors.torch import load_file
from test_kernels import tiny_config
from test_kills import SCRIPTS, assert_same, small_runs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common
import dpo
import grpo
import kernels.attention
import ppo_rlvr
import reward_model
import sft
from kernels import rows

# ------------------------------------------------------------------------------------------- the host waits for no GPU

GPU = torch.device("meta")  # stands in for one: what is on it has no values that the host could look at


class HostWaits(TorchDispatchMode):
    """Notes each operation at which the host would wait for the GPU, and goes on with some result."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().split(".")[0].removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.dim() or x.device == GPU}
        if name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device:
            is_pinned = getattr(args[0], "is_in_pinned_memory", False)
            if not (is_pinned and kwargs.get("non_blocking")):
                self.found.append(f"copy of {tuple(args[0].shape)}")
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype), device=kwargs["device"])
        if len(devices) > 1:
            self.found.append(f"{name} with a tensor of the host")
            args = [[x if x is None else x.to(GPU) for x in a] if isinstance(a, list) else a for a in args]
        if GPU not in devices:
            return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.found.append("item")
            return 1
        if name == "nonzero":
            self.found.append("nonzero")
            return torch.empty(len(args[0]), 1, dtype=torch.int64, device=GPU)
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.found.append("index by a mask")
            return args[0][:0]
        if name == "segment_reduce" and not kwargs.get("unsafe"):
            self.found += ["check of the smallest length", "check of the sum of lengths"]
        if name == "_assert_async":
            return None  # the GPU itself looks
        return function(*args, **kwargs)


class NoKernel:
    """In the place of a Triton kernel: it is launched and computes nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def gpu(monkeypatch):
    """Code that looks takes GPU for a CUDA device."""

    def pin_memory(tensor):
        tensor.is_in_pinned_memory = True
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device == GPU))
    monkeypatch.setattr(rows, "use_triton", lambda logits: True)
    for kernel in ("_statistics_kernel", "_gradient_kernel"):
        monkeypatch.setattr(rows, kernel, NoKernel(), raising=False)
    monkeypatch.setattr(kernels.attention, "_loop", lambda *args: pytest.fail("_loop is for a CPU"))


def sequences(*names):
    """Three of them, with numbers for each of these names."""
    return [(np.arange(n) % 100, np.arange(n) > 2, *(np.ones(n) for _ in names)) for n in (9, 14, 5, 7)]


def sft_microbatch(policy, sums):
    loss = policy(common.pack(sequences(), GPU)) / 9
    loss.backward()
    sums.add(loss=loss)


def reward_model_microbatch(model, sums):
    margins = torch.zeros(8)
    scores = model(common.pack(sequences(), GPU))
    losses, metrics = reward_model.ranking_loss(reward_model.Args(), scores, common.to_device(margins[[3, 5]], GPU))
    losses.sum().backward()
    sums.add(**metrics)


def dpo_microbatch(policy, sums):
    ref_logprobs = torch.zeros(8, 2, dtype=torch.float64)
    answer_logprobs, answer_lengths = policy(common.pack(sequences(), GPU))
    ref = common.to_device(ref_logprobs[[3, 5]], GPU)
    losses, metrics = dpo.preference_loss(dpo.Args(), answer_logprobs, answer_lengths, ref)
    losses.sum().backward()
    sums.add(**metrics)


def rl_microbatch(script, policy, sums, *names):
    names = ["behaviour_logprobs", "old_logprobs", "advantages", "loss_weight", *names]
    microbatch = common.pack(sequences(*names), GPU, *names)
    logprobs, entropy = policy(microbatch, 1.0)
    losses, metrics = script.policy_loss(script.Args(), logprobs, microbatch)
    (losses * microbatch.extras["loss_weight"]).sum().backward()
    sums.add(trained_tokens=microbatch.targets != common.IGNORE, entropy=entropy, **metrics)
    return microbatch


def grpo_microbatch(policy, sums):
    rl_microbatch(grpo, policy, sums, "ref_logprobs")


def ppo_microbatch(models, sums):
    microbatch = rl_microbatch(ppo_rlvr, models[0], sums, "values", "returns")
    losses, metrics = ppo_rlvr.value_loss(ppo_rlvr.Args(), models[1](microbatch), microbatch)
    (losses * microbatch.extras["loss_weight"]).sum().backward()
    sums.add(**metrics)


def on_gpu(module_class, model_class, family):
    config = tiny_config(family, 100, True)
    config.num_labels = 1
    with GPU:
        return module_class(model_class.from_config(config, attn_implementation="packed", dtype=torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma3"])
def test_the_host_waits_for_the_gpu_nowhere_in_a_microbatch(gpu, family):
    """From packing to the sums, in each script: the three waits of a step are for the sums and the gradient's norm."""
    lm, scorer = AutoModelForCausalLM, AutoModelForSequenceClassification
    policy = on_gpu(grpo.Policy, lm, family)
    models = {
        sft_microbatch: on_gpu(sft.Policy, lm, family),
        reward_model_microbatch: on_gpu(reward_model.RewardModel, scorer, family),
        dpo_microbatch: on_gpu(dpo.Policy, lm, family),
        grpo_microbatch: policy,
        ppo_microbatch: (policy, on_gpu(ppo_rlvr.TokenScores, scorer, family)),
    }
    found = {}
    for function, model in models.items():
        with HostWaits() as waits:
            function(model, sft.Sums())
        found[function.__name__] = waits.found
    assert not any(found.values()), found


# ------------------------------------------------------------------------------- nodes exchange gradients once an update


@pytest.mark.filterwarnings("ignore:.*backward hook")  # of CommDebugMode
def test_hybrid_reduces_between_nodes_once_an_update(tiny_model):
    """Two nodes of four processes, of which this one plays the first: all-reduces in the last of three backwards alone."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
        args = sft.Args(model=str(tiny_model), max_length=64)
        config = common.load_config(args)
        policy = sft.load_model(args, config, AutoModelForCausalLM, sft.Policy, torch.device("cpu"), mesh)
        reduced, scattered = [], []
        for part in sft.reduce_once([sequences()] * 3, policy):
            with CommDebugMode() as communication:
                policy(common.pack(part, "cpu")).backward()
            counts = {function.__name__: count for function, count in communication.get_comm_counts().items()}
            reduced.append(counts.get("allreduce_", 0) + counts.get("all_reduce", 0))
            scattered.append(sum(count for name, count in counts.items() if "scatter" in name))
    finally:
        dist.destroy_process_group()
    groups = config.num_hidden_layers + 1  # each layer, and all the rest
    assert reduced == [0, 0, groups] and scattered == [groups] * 3


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """Small runs whose updates take several microbatches."""
    runs = small_runs(tmp_path_factory.mktemp("scale"), tiny_model)
    for flags in runs.values():
        flags.update(steps=1, save_every=0, eval_every=0, eval_data=[], tokens_per_microbatch=64)
        flags["data"] = [flags["data"]] if isinstance(flags["data"], str) else flags["data"]
    runs["grpo.py"].update(inflight=0, active_sampling=0)
    runs["ppo_rlvr.py"].update(inflight=0)
    return runs


@pytest.mark.parametrize("script", [*SCRIPTS[:3], *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[3:])])
def test_the_last_microbatch_of_an_update_reduces(script, runs, tmp_path, monkeypatch):
    """In each script, for every model that it trains."""
    asked, updates = {}, []  # {id of a model: what it was told before each backward}, of this update; of all
    set_requires, norm = FSDPModule.set_requires_all_reduce, torch.nn.utils.clip_grad_norm_

    def tell(model, is_last):
        asked.setdefault(id(model), []).append(is_last)
        set_requires(model, is_last)

    def clip(*args):
        updates.append({model: told.copy() for model, told in asked.items()})
        asked.clear()
        return norm(*args)

    monkeypatch.setattr(FSDPModule, "set_requires_all_reduce", tell)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    call(importlib.import_module(script[:-3]), out=tmp_path / "run", shard="hybrid", **runs[script])
    models = 2 if script == "ppo_rlvr.py" else 1
    updates = [told for told in updates if told]  # the second of two models is clipped at once after the first
    assert updates and all(len(told) == models for told in updates)
    for told in (told for update in updates for told in update.values()):
        assert len(told) > 1 and told == [False] * (len(told) - 1) + [True]


# -------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("script", ["sft.py", *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:])])
def test_deterministic_changes_no_bit_on_a_cpu(script, runs, tmp_path):
    """It is switched on, no operation of the run lacks a deterministic form, and the course and the weights are the same."""
    module = importlib.import_module(script[:-3])
    call(module, out=tmp_path / "plain", **runs[script])
    try:
        call(module, out=tmp_path / "deterministic", deterministic=True, **runs[script])
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(tmp_path / "deterministic", tmp_path / "plain")


# ------------------------------------------------------------------------------------------------ two nodes, in earnest


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft.py", "ppo_rlvr.py"])
def test_hybrid_equals_full_sharding(script, runs, tmp_path):
    """Four processes on two nodes, several microbatches an update: the course and the weights are those of --shard full."""
    flags = runs[script] | {"steps": 4, "batch_size": 16}
    launch.run(script, 4, out=tmp_path / "full", **flags)
    agents = [launch.start(script, 2, nodes=2, node=node, out=tmp_path / "hybrid", shard="hybrid", **flags) for node in (0, 1)]
    for agent in agents:
        stdout, stderr = agent.communicate(timeout=500)
        assert agent.returncode == 0, f"{stdout}\n{stderr}"
    full, hybrid = (launch.metrics(tmp_path / name) for name in ("full", "hybrid"))
    for a, b in zip(full, hybrid, strict=True):
        for name in a.keys() - launch.MEASURED:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (name, a, b)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("full", "hybrid"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
