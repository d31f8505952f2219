"""Each script as typed, without a flag or with the one that README types: its Tülu 3 stage, from a cache of the Hub.

Nothing is downloaded: the cache is made here, and holds tiny models and rows under the real names.
"""

import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pytest
import torch
from conftest import assistant, tokenizer_folder, user
from datasets.naming import camelcase_to_snakecase
from launch import ROOT, metrics
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import common

REVISION = "0" * 40
LETTERS = [{"letter": letter, "let_frequency": 1, "let_relation": "at least"} for letter in "ae,"]
IFEVAL = {"instruction_id_list": ["keywords:letter_frequency"] * 3, "kwargs": LETTERS}
PAIRS = [
    {"chosen": [user(f"{i}?"), assistant(f"{i}.")], "rejected": [user(f"{i}?"), assistant("No idea.")]} for i in range(256)
]
PROMPTS = [{"messages": [user(f"{i}?")], "dataset": "gsm8k", "ground_truth": f"{i}"} for i in range(60)]
PROMPTS += [{"messages": [user(f"{i}?")], "dataset": "MATH", "ground_truth": f"{i}"} for i in range(60)]
PROMPTS += [{"messages": [user(f"{i}!")], "dataset": "ifeval", "ground_truth": json.dumps(IFEVAL)} for i in range(120)]
ROWS = {
    "allenai/tulu-3-sft-mixture": [{"messages": [user(f"{i}?"), assistant(f"It is {i}.")]} for i in range(128)],
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": PAIRS,
    "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints": PROMPTS,
}


def add_model(hub, name, model, tokenizer):
    """A model's files as the Hub's client caches them."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for part in (model, tokenizer):
        part.save_pretrained(repository / "snapshots" / REVISION)


def add_rows(cache, name, rows):
    """Rows as `datasets` caches a data set of the Hub."""
    owner, short = name.split("/")
    short = camelcase_to_snakecase(short)
    folder = cache / f"{owner}___{short}" / "default" / "0.0.0" / REVISION
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list(rows)
    with pa.OSFile(str(folder / f"{short}-train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.data.schema) as out:
        out.write_table(table.data.table)
    split = datasets.SplitInfo("train", num_bytes=1, num_examples=len(rows), dataset_name=short)
    splits = datasets.SplitDict({"train": split})
    about = {"builder_name": "parquet", "dataset_name": short, "config_name": "default", "version": "0.0.0"}
    datasets.DatasetInfo(features=table.features, splits=splits, **about).write_to_directory(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder for HF_HOME. The models end a completion after some tokens, as random ones would not."""
    home = tmp_path_factory.mktemp("hub")
    base = common.load_tokenizer(tokenizer_folder("byte_level"), "tulu")
    config = LlamaConfig(
        vocab_size=len(base), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8192, tie_word_embeddings=False,
        bos_token_id=base.bos_token_id, eos_token_id=base.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # what all embeddings share survives the layers, and the end token's head looks for it
        policy.get_input_embeddings().weight += 1.0
        policy.get_output_embeddings().weight[base.eos_token_id] += 0.15
    config.num_labels = 1
    reward_model = AutoModelForSequenceClassification.from_config(config)
    for stage in ("SFT", "DPO"):
        add_model(home / "hub", f"allenai/Llama-3.1-Tulu-3-8B-{stage}", policy, base)
    add_model(home / "hub", "allenai/Llama-3.1-Tulu-3-8B-RM", reward_model, base)
    base.chat_template = None  # as base models have none
    add_model(home / "hub", "meta-llama/Llama-3.1-8B", policy, base)
    for name, rows in ROWS.items():
        add_rows(home / "datasets", name, rows)
    return home


def type_in(command, home, folder):
    """Runs it as a user would who stands in `folder`. Returns (exit code, output)."""
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_DATASETS_CACHE", None)
    program, *rest = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run").split(" ")
    rest = [str(ROOT / word) if word.endswith(".py") else word for word in rest]
    done = subprocess.run([program, *rest], env=environment, cwd=folder, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "out", "steps"),
    [
        ("torchrun --nproc_per_node 2 sft.py", "runs/sft", 2),
        pytest.param("torchrun --nproc_per_node 2 reward_model.py", "runs/reward_model", 1, marks=pytest.mark.slow),
        pytest.param("torchrun --nproc_per_node 8 dpo.py --beta 0.1", "runs/dpo", 2, marks=pytest.mark.slow),
        pytest.param("torchrun --nproc_per_node 2 grpo.py", "runs/grpo", 4, marks=pytest.mark.slow),
        pytest.param("torchrun --nproc_per_node 2 ppo_rlvr.py", "runs/ppo_rlvr", 4, marks=pytest.mark.slow),
    ],
)
def test_the_command_as_typed(hub, tmp_path, command, out, steps):
    code, output = type_in(command, hub, tmp_path)
    assert code == 0, output
    assert [line["step"] for line in metrics(tmp_path / out)] == list(range(1, steps + 1))
    AutoModelForCausalLM.from_pretrained(tmp_path / out / "model")
    config = json.loads((tmp_path / out / "config.json").read_text())
    assert config["world_size"] == int(command.split()[2]) and config["args"]["model"] in {
        "meta-llama/Llama-3.1-8B", "allenai/Llama-3.1-Tulu-3-8B-SFT", "allenai/Llama-3.1-Tulu-3-8B-DPO",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("sft.py", "meta-llama/Llama-3.1-8B"),
        pytest.param("reward_model.py", "allenai/Llama-3.1-Tulu-3-8B-SFT", marks=pytest.mark.slow),
        pytest.param("dpo.py", "allenai/Llama-3.1-Tulu-3-8B-SFT", marks=pytest.mark.slow),
        pytest.param("grpo.py", "allenai/Llama-3.1-Tulu-3-8B-DPO", marks=pytest.mark.slow),
        ("ppo_rlvr.py", "allenai/Llama-3.1-Tulu-3-8B-DPO"),
    ],
)
def test_without_network_and_cache_it_says_what_it_wanted(tmp_path, script, wanted):
    code, output = type_in(f"{sys.executable} {script}", tmp_path / "empty", tmp_path)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and wanted in errors[0], output
    assert "Traceback" not in output


def test_without_the_data_it_says_what_it_wanted(hub, tmp_path):
    """The model is there, the rows are not."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "hub").symlink_to(hub / "hub")
    code, output = type_in(f"{sys.executable} sft.py", home, tmp_path)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "allenai/tulu-3-sft-mixture" in errors[0], output
