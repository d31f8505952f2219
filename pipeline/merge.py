"""Weighted averages of models, tensor by tensor; and a base model's own tensors put back.

    python -m pipeline.merge --models runs/a/model runs/b/model --out soup                the mean of both
    python -m pipeline.merge --models A B C --weights 3 1 1 --out soup                    three fifths of A
    python -m pipeline.merge --models A --base B0 --restore "model.layers.31.*" --out restored
    python -m pipeline.merge --models A B C --weights 1 1 -1 --no_normalize --out sum     A + (B - C)

A tensor θ of the result is, with θ_k for the same tensor of model k,

    θ = Σ_k w_k θ_k / Σ_k w_k,         or, with --no_normalize,  θ = Σ_k w_k θ_k                                 (1)

summed in float32 and rounded once, to the precision of the first model ("Model soups", arXiv 2203.05482, section 2).
Tülu 3 (table 14) averages seeds so, and OLMo 3's 32B Think is the mean of two learning rates. --restore is selective
layer restoration (arXiv 2602.06665): layers of the pre-trained model return to the post-trained one.

Written to --out, whole or not at all: weights in files of at most 5 GB, SHA256SUMS, the first model's configuration,
tokenizer, chat template and generation settings, and merge.json, which says what was merged. Memory has to hold one
file that is written, and one tensor of each model.
"""

import fnmatch
import json
import math
import re
import reprlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils import cached_file

from common import RunError, first_line, hash_file, read_source, sync_to_disk, weight_files

FILE_SIZE = "5GB"  # of weights, at most
FAR = 0.5  # ‖A - B‖ / ‖A‖ of a block; it is √2 for tensors of equal norm that have nothing in common
COPIED = """config.json generation_config.json tokenizer*.* special_tokens_map.json added_tokens.json vocab.json
    merges.txt chat_template.json *.jinja additional_chat_templates/*.jinja""".split()  # of the first, if it has them


@dataclass
class Args:
    """What is merged, and where to."""

    models: list[str]  # model folders or Hub ids; what is no weight comes from the first
    out: str  # new folder to write
    weights: list[float] = field(default_factory=list)  # one for each model; by default all are equal
    no_normalize: bool = False  # take the weights as they are, instead of dividing them by their sum
    base: str | None = None  # model folder or Hub id from which --restore takes tensors
    restore: list[str] = field(default_factory=list)  # names of tensors; * stands for any characters


def main(args):
    """Merges, and prints how far the models are apart. Raises RunError."""
    out, weights = Path(args.out), final_weights(args)
    if out.exists():
        raise RunError(f"--out {out} exists: choose a new folder, or delete it")
    names = args.models + ([args.base] if args.base else [])
    models = [tensor_files(name) for name in names]
    for i in range(1, len(names)):
        check_tensors(names[0], models[0], names[i], models[i])
        check_vocabularies(names[0], names[i], with_template=i < len(args.models))
    found = {pattern: fnmatch.filter(models[0], pattern) for pattern in args.restore}
    for pattern in [pattern for pattern in found if not found[pattern]]:
        raise RunError(f"--restore {pattern} fits no tensor; one of them is {next(iter(models[0]))}")
    restored = sorted(set().union(*found.values()))
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    try:
        unfinished.mkdir(parents=True)
        copy_rest(names[0], unfinished)
        squares = write_weights(unfinished, models, weights, restored)
        apart = {block: [math.sqrt(b / (a or 1)) for b in others] for block, (a, *others) in squares.items()}
        record = {"models": args.models, "weights": weights[: len(args.models)], "base": args.base}
        record |= {"restored": restored, "apart": apart}
        (unfinished / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        sync_to_disk(unfinished)
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:  # of a disk that is full, for one
        raise RunError(f"--out {out} cannot be written: {first_line(error)}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{out}: ‖A - B‖ / ‖A‖ of A = {names[0]} and B = {', '.join(names[1:])}")
    for block, ratios in apart.items():
        print(f"  {block:<32}" + "".join(f" {ratio:10.4g}" for ratio in ratios))
    far = [block for block, ratios in apart.items() if max(ratios) > FAR]
    if far:
        print(f"WARNING {len(far)} blocks are far apart, as {far[0]}: were the models trained from the same one?")


def final_weights(args):
    """What each model is multiplied by; the base, which is the last, by 0. Raises RunError."""
    if bool(args.base) != bool(args.restore) or (len(args.models) < 2 and not args.base):
        raise RunError("nothing to merge: give two or more --models, or --base together with --restore, or both")
    weights = args.weights or [1.0] * len(args.models)
    if len(weights) != len(args.models) or not all(map(math.isfinite, weights)):
        raise RunError(f"--weights: give one finite number for each of the {len(args.models)} models")
    total = 1.0 if args.no_normalize else math.fsum(weights)
    if abs(total) < 1e-6 or not any(weights):
        raise RunError("--weights add up to 0: only --no_normalize takes such weights, and not all may be 0")
    return [weight / total for weight in weights] + ([0.0] if args.base else [])


def tensor_files(model):
    """{tensor's name: file that holds it}, layers in order; a tied weight has one name. Raises RunError."""
    config = read_source(model)[0]
    paths = [Path(path) for path in weight_files(model) if path.endswith(".safetensors")]
    if getattr(config, "quantization_config", None):
        raise RunError(f"model {model}: quantized weights have no average: give the model before quantization")
    if not paths:
        raise RunError(f"model {model}: its weights are no safetensors: load it, and save_pretrained makes some")
    sums = paths[0].with_name("SHA256SUMS")
    for line in sums.read_text().splitlines() if sums.is_file() else ():
        digest, _, name = line.partition("  ")
        if name in [path.name for path in paths] and hash_file(sums.with_name(name)) != digest:
            raise RunError(f"{sums} does not fit {name}: it is damaged, or if changed on purpose, delete SHA256SUMS")
    files = {tensor: path for path in paths for tensor in read(path)}
    head = "lm_head.weight"
    if getattr(config, "tie_word_embeddings", False) and head in files:
        values = read(files[head], head)
        if any(tensor != head and torch.equal(values, read(path, tensor)) for tensor, path in files.items()):
            del files[head]  # the embedding under a second name; whoever loads the model ties them
    return dict(sorted(files.items(), key=lambda item: re.sub(r"\d+", lambda digits: digits[0].zfill(9), item[0])))


def read(path, tensor=None):
    """A tensor of a file of weights; without its name the names of all. Raises RunError."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(tensor) if tensor else file.keys()
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: {first_line(error)}") from None


def check_tensors(name, files, other_name, other_files):
    """Raises RunError unless two models have the same tensors, of the same shapes."""
    if files.keys() != other_files.keys():
        tensor = min(files.keys() ^ other_files.keys())
        raise RunError(f"models {name} and {other_name}: only one of them has the tensor {tensor}")
    for tensor, path in files.items():
        shapes = tuple(read(path, tensor).shape), tuple(read(other_files[tensor], tensor).shape)
        if shapes[0] != shapes[1]:
            raise RunError(f"models {name} and {other_name}: {tensor} is {shapes[0]} and {shapes[1]}")


def check_vocabularies(name, other, with_template):
    """Raises RunError for the first difference of tokenizers and, unless the other has none, of chat templates."""
    here, there = vocabulary(name), vocabulary(other)
    if not with_template or not there["chat template"]:
        there["chat template"] = here["chat template"]
    if here != there:
        raise RunError(f"models {name} and {other} differ in {difference(here, there)}")


def vocabulary(model):
    """tokenizer.json as today's library writes it, and the lines of the chat template. Raises RunError."""
    try:
        settings = json.loads(Tokenizer.from_file(cached_file(model, "tokenizer.json")).to_str())
        template = AutoTokenizer.from_pretrained(model).chat_template
    except Exception as error:  # of tokenizers, transformers and the Hub's client: no common class
        raise RunError(f"model {model}: its tokenizer.json cannot be read: {first_line(error)}") from None
    settings |= dict.fromkeys(("truncation", "padding", "version"))  # are no part of the vocabulary
    if isinstance(template, str):  # of several templates it is a dict
        template = {f"line {number}": line for number, line in enumerate(template.splitlines(), 1)}
    return {"tokenizer.json": settings, "chat template": template}


def difference(a, b):
    """Where two values of JSON first differ, and how."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return f"{reprlib.repr(a)} and {reprlib.repr(b)}"
    key = next(key for key in a | b if key not in a or key not in b or a[key] != b[key])
    return f"{key}: {difference(a.get(key), b.get(key))}"


def copy_rest(model, folder):
    """Copies what is no weight."""
    source = Path(model if Path(model).is_dir() else huggingface_hub.snapshot_download(model, allow_patterns=COPIED))
    for path in sorted(path for pattern in COPIED for path in source.glob(pattern)):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def write_weights(folder, models, weights, restored):
    """Writes the merged weights, file by file. Returns {block: [‖A‖², and ‖A - B‖² for each other model B]}."""
    squares = {}
    only_base = [0.0] * (len(models) - 1) + [1.0]
    sizes = {name: torch.empty_like(read(path, name), device="meta") for name, path in models[0].items()}
    plan = huggingface_hub.split_torch_state_dict_into_shards(sizes, max_shard_size=FILE_SIZE)
    sums = ""
    for file, names in plan.filename_to_tensors.items():
        merged = {}
        for name in names:
            tensors = [read(files[name], name) for files in models]
            merged[name] = average(name, tensors, only_base if name in restored else weights)
            add_squares(squares, name, tensors)
        save_file(merged, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # by the umask; safetensors makes it private
        sums += f"{hash_file(folder / file)}  {file}\n"
    (folder / "SHA256SUMS").write_text(sums)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    return squares


def average(name, tensors, weights):
    """(1), in the precision of the first tensor. Raises RunError."""
    dtype = tensors[0].dtype
    if not dtype.is_floating_point:
        if not all(tensor.dtype == dtype and torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise RunError(f"{name} holds {dtype}, which has no average, and is not the same in all models")
        return tensors[0]
    wide = torch.promote_types(dtype, torch.float32)
    terms = [(weight, tensor.to(wide)) for weight, tensor in zip(weights, tensors, strict=True) if weight]
    if math.isclose(math.fsum(weights), 1) and all(torch.equal(tensor, terms[0][1]) for _, tensor in terms):
        total = terms[0][1]  # to the bit; the sum would be rounded
    else:
        total = sum(weight * tensor for weight, tensor in terms)
    total = total.to(dtype)
    if not total.isfinite().all():
        raise RunError(f"{name} has values that are not finite, in a model or beyond the range of {dtype}")
    return total


def add_squares(squares, name, tensors):
    """Adds a tensor's squares to those of its block: a layer, or a module beside the layers."""
    block = re.match(r".*?\.\d+(?=\.)|.*(?=\.)|.*", name)[0]  # up to the layer's number, or without .weight
    sums = squares.setdefault(block, [0.0] * len(tensors))
    first = tensors[0].float()
    for i, tensor in enumerate(tensors):
        part = first - tensor.float() if i else first
        sums[i] += torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True, prog="python -m pipeline.merge"))
    except RunError as error:
        sys.exit(f"error: {error}")
