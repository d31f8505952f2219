"""LoRA (Hu et al., arXiv 2106.09685, section 4.1): all weights stay as they are, pairs of thin matrices are trained.

    W x + (α / r) B A x         A (r, in) is random at first, B (out, r) is 0: training starts at the model as it is

in place of W x, for matrices W (out, in) of the decoder layers. Only A and B have gradients and AdamW's two moments.
OUT/model has W + (α / r) B A in the place of W, and opens without peft. A score head, which may be new, is trained too.

    pip install peft
    python forks/make.py lora > my_sft.py                    and --base dpo.py, grpo.py, reward_model.py, ppo_rlvr.py
"""

from dataclasses import dataclass

import torch

import common

BASE = "sft.py"

LINES = {
    "weights = {}": "weights = {}\nmodel_class = WithAdapters(args, model_class)",
    "return module.train()": "show_merged(args, model.base_model.layers)\nreturn module.train()",
    "args.model, model, weights, chat)": "args.model, model, merge(args, weights), chat)",
}


@dataclass
class Args:
    lora_rank: int = 16  # r, rows of A and columns of B
    lora_alpha: float = 32.0  # α: B A is multiplied by α / r
    lora_targets: str = "all-linear"  # matrices with A and B: all, or a regular expression of names: ".*[qv]_proj"


class WithAdapters:
    """A class of models as `load_model` knows it, which adds A and B to those of `model_class` and freezes the rest."""

    def __init__(self, args, model_class):
        try:
            import peft
        except ImportError as error:
            raise common.RunError(f"LoRA needs the package peft ({error}): pip install peft") from None
        self.args = args
        self.model_class = model_class
        self.peft = peft

    def from_config(self, config, **options):
        return self.adapt(self.model_class.from_config(config, **options))

    def from_pretrained(self, path, **options):
        model, info = self.model_class.from_pretrained(path, **options)
        return self.adapt(model), info

    def adapt(self, model):
        settings = self.peft.LoraConfig(
            r=self.args.lora_rank,
            lora_alpha=self.args.lora_alpha,
            target_modules=self.args.lora_targets,
            exclude_modules="embed_tokens",
        )
        torch.manual_seed(self.args.seed)  # A is random
        self.peft.inject_adapter_in_model(settings, model.base_model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "lora_" in name or name.startswith("score.")
        return model


def merge(args, tensors):
    """{name as in the source model: tensor}, W + (α / r) B A for W, from tensors by their names in peft's model."""
    merged = {}
    for name, tensor in tensors.items():
        if name.endswith("base_layer.weight"):
            A, B = (tensors[name.replace("base_layer", f"lora_{which}.default")] for which in "AB")
            tensor = tensor + args.lora_alpha / args.lora_rank * B @ A
        if "lora_" not in name:
            merged[name.replace(".base_layer", "")] = tensor
    return merged


def show_merged(args, layers):
    """Makes each layer list its parameters as the source model's does, merged: kernels/sampler.py copies them."""
    for layer in layers:
        peft_names = layer.named_parameters
        layer.named_parameters = lambda *a, of=peft_names, **b: merge(args, dict(of(*a, **b))).items()
