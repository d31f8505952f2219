"""Exported folders: read by transformers 5 and 4.57 alike, and by other users. Sources are small random models."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import export_reader
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TOKENIZERS, shared
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import common

OLD = ROOT / ".venv" / "transformers4"

# -------------------------------------------------------------------------------------------------------------- models

PLAIN = {"rope_type": "default", "rope_theta": 700_000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 500_000.0, "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0, "attention_factor": 1.2,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 20_000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 8.0], "original_max_position_embeddings": 64,
}  # fmt: skip
LOCAL = {"rope_type": "default", "rope_theta": 3000.0}
LAYERS = {"sliding_window": 100, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
BOUNDS = {"query_pre_attn_scalar": 8, "final_logit_softcapping": 20.0, "attn_logit_softcapping": 10.0}

# Each architecture with rope settings that matter within 400 tokens, a kind of tokenizer, and entries of its own.
MODELS = {
    "llama 3.1": (LlamaConfig, LLAMA3, "byte_level", {"tie_word_embeddings": False}),
    "llama 3.2": (LlamaConfig, LLAMA3, "prefix_space", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama 2": (LlamaConfig, LINEAR, "legacy_llama", {"attention_dropout": 0.1}),
    "mistral": (MistralConfig, PLAIN, "metaspace", {"sliding_window": 100}),
    "qwen 2.5": (Qwen2Config, YARN, "byte_level", {}),
    "qwen 3": (Qwen3Config, PLAIN, "byte_level", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm 3": (SmolLM3Config, PLAIN, "byte_level", {"no_rope_layer_interval": 3}),
    "phi 3": (Phi3Config, LONG, "metaspace", {"original_max_position_embeddings": 64}),
    "olmo 2": (Olmo2Config, LINEAR, "byte_level_spaces", {}),
    "olmo 3": (Olmo3Config, {"sliding_attention": LOCAL | {"rope_theta": 500_000.0}, "full_attention": YARN}, "byte_level_spaces", LAYERS),
    "gemma 2": (Gemma2Config, PLAIN, "unigram", LAYERS | BOUNDS),
    "gemma 3": (Gemma3TextConfig, {"sliding_attention": LOCAL, "full_attention": LINEAR}, "word_level", LAYERS | {"query_pre_attn_scalar": 8}),
    "reward": (LlamaConfig, LLAMA3, "byte_level", {"num_labels": 1, "pad_token_id": 0}),
}  # fmt: skip


REAL = ["stories260k", "tinystories-656k"]
NAMES = [*MODELS, "two templates", *REAL]


def tokenizer_of(kind):
    """A tokenizer of the source, with a token for padding and one that is special for the model alone."""
    if kind == "prefix_space":
        tokenizer = TOKENIZERS["byte_level"].__wrapped__()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        tokenizer = TOKENIZERS[kind].__wrapped__()
    if kind in ("byte_level", "metaspace"):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<|eot_id|>", "<|extra|>"]})
    return tokenizer


def make_source(folder, name):
    """Writes a random bfloat16 model whose attention is sharp, so that positions matter, with a padded vocabulary."""
    config_class, rope, kind, entries = MODELS[name]
    tokenizer = tokenizer_of(kind)
    tokenizer.save_pretrained(folder)
    config = config_class(
        **{
            "vocab_size": max(len(tokenizer) + 7, 320), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
            "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
        } | entries
    )  # fmt: skip
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def export(source, folder, template="chatml"):
    """Writes the model of a folder as a run would that has not changed it. Returns its tokenizer."""
    is_reward = "ForSequenceClassification" in str(AutoConfig.from_pretrained(source).architectures)
    auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    model = auto.from_pretrained(source, dtype=torch.float32)
    tokenizer = common.load_tokenizer(source, template)
    tokenizer.padding_side = "left"  # as the classes of some models have it, whatever their files say
    common.write_model(folder, str(source), model, dict(model.named_parameters()), common.ChatFormat(tokenizer))
    return tokenizer


def edit(path, **entries):
    """Changes entries of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | entries
    removed = [key for key, value in entries.items() if value is None]
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in removed}))


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def exports(work):
    """{name: (source, export, the tokenizer that was trained with)}."""
    sources = {name: make_source(work / f"{name} source", name) for name in MODELS}
    rope = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}  # as published, before transformers 5
    edit(sources["llama 3.2"] / "config.json", rope_parameters=None, rope_theta=500_000.0, rope_scaling=rope)
    edit(sources["llama 3.2"] / "config.json", dtype=None, torch_dtype="bfloat16")
    settings = {"eos_token_id": [2, 3], "pad_token_id": 5, "temperature": 0.6, "top_p": 0.9}  # without do_sample:
    (sources["mistral"] / "generation_config.json").write_text(json.dumps(settings))  # transformers would not save it
    (sources["olmo 2"] / "generation_config.json").unlink()
    sources["two templates"] = shutil.copytree(sources["llama 3.1"], work / "two templates source")
    tokenizer = AutoTokenizer.from_pretrained(sources["two templates"])
    chatml = common.load_tokenizer(sources["two templates"], "chatml").chat_template
    tokenizer.chat_template = {"default": chatml, "tool_use": "{{ tools }}" + chatml}
    tokenizer.save_pretrained(sources["two templates"])
    sources |= {name: SHARED / "models" / name for name in REAL if (SHARED / "models" / name).exists()}
    templates = dict.fromkeys(sources, "chatml") | {"two templates": None}
    return {
        name: (source, work / name, export(source, work / name, templates[name])) for name, source in sources.items()
    }


@pytest.fixture(scope="module")
def old_readings(exports, work):
    """{name: (facts, logits)}, read by transformers 4.57 in a process of its own."""
    if not OLD.exists():
        pytest.skip("transformers 4.57 is not installed: remove .venv/installed, then make test")
    folders = [str(folder) for _, folder, _ in exports.values()]
    command = [sys.executable, ROOT / "tests" / "export_reader.py", work / "old", *folders]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(OLD)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    version, facts = json.loads((work / "old.json").read_text())
    assert version == "4.57.6" and list(facts) == folders
    return dict(zip(exports, zip(facts.values(), np.load(work / "old.npz").values(), strict=True), strict=True))


def of(readings, name):
    """What a fixture has of a name; real models may be missing."""
    if name not in readings:
        shared("models", name)
    return readings[name]


@pytest.mark.parametrize("name", NAMES)
def test_both_versions_compute_the_same_logits(exports, old_readings, name):
    """Those of the source, to rounding."""
    source, folder, _ = of(exports, name)
    _, truth = export_reader.open_model(source)
    _, logits = export_reader.open_model(folder)
    assert np.abs(logits - truth).max() < 1e-5 * truth.std()
    assert np.abs(old_readings[name][1] - truth).max() < 1e-4 * truth.std()


@pytest.mark.parametrize("name", MODELS)
def test_logits_would_show_that_rope_settings_are_lost(exports, tmp_path, name):
    """What the test above can see: without its settings a model computes something else."""
    source, folder, _ = exports[name]
    _, truth = export_reader.open_model(source)
    lost = shutil.copytree(folder, tmp_path / "lost")
    edit(lost / "config.json", rope_parameters=None, rope_theta=None, rope_scaling=None, rope_local_base_freq=None)
    assert np.abs(export_reader.open_model(lost)[1] - truth).max() > 0.5 * truth.std()


@pytest.mark.parametrize("name", NAMES)
def test_both_versions_read_the_same_tokenizer_and_settings(exports, old_readings, name):
    """Ids, special tokens, chats, generation: in both those of the tokenizer that was trained with."""
    _, folder, tokenizer = of(exports, name)
    facts, old = json.loads(json.dumps(export_reader.read(folder)[0])), dict(old_readings[name][0])
    trained = export_reader.read_tokenizer(tokenizer)
    assert {key: facts[key] for key in trained} == trained
    if name == "tinystories-656k":  # the library tokenizers 0.22 decodes its <unk> otherwise than 0.23
        del old["decoded"], facts["decoded"]
    assert old == facts


@pytest.mark.parametrize("name", NAMES)
def test_an_export_says_what_its_source_says(exports, tmp_path, name):
    """The configuration is the source's, and an export of the export has the same files."""
    source, folder, _ = of(exports, name)
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (source, folder))
    for config in (before, after):  # where it was read from, and what only 4.57 has a use for
        for key in ("_name_or_path", "transformers_version", "rope_local_base_freq", "partial_rotary_factor"):
            config.pop(key, None)
        config["rope_parameters"].pop("type", None)
    assert after == before
    export(folder, tmp_path / "again", None)
    export(tmp_path / "again", tmp_path / "once more", None)
    for file in (tmp_path / "again").rglob("*.j*"):
        name = file.relative_to(tmp_path / "again")
        assert (tmp_path / "once more" / name).read_text() == file.read_text()
        if name.name != "config.json":  # Phi 3's gets "type" in its rope_parameters
            assert (folder / name).read_text() == file.read_text()


def test_generation_ends_where_the_source_ends_and_where_turns_end(exports):
    """The end of a turn first, then the source's; its other settings are kept, valid or not."""
    _, folder, tokenizer = exports["mistral"]
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = json.loads((folder / "generation_config.json").read_text())
    expected = {"eos_token_id": [end_of_turn, 2, 3], "pad_token_id": 5, "temperature": 0.6, "top_p": 0.9}
    assert end_of_turn not in (2, 3) and expected.items() <= settings.items()
    _, folder, tokenizer = exports["olmo 2"]  # has none: the end token of its config.json
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 2]
    assert not (exports["reward"][1] / "generation_config.json").exists()
    for path in (folder / "generation_config.json" for _, folder, _ in exports.values()):
        assert not path.exists() or "_from_model_config" not in path.read_text()  # with it, 4.57 may make another


def test_how_the_tokenizer_was_loaded_stays_here(exports):
    for _, folder, _ in exports.values():
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert not {"is_local", "local_files_only", "backend", "extra_special_tokens"} & settings.keys()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(exports, tmp_path, umask):
    """All of them: safetensors writes 0600, whatever the umask."""
    before = os.umask(umask)
    try:
        export(exports["llama 3.1"][0], tmp_path / "export")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "export").rglob("*") if file.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}


def test_the_source_may_be_gone(tmp_path):
    """What an export takes from the source was read at the start."""
    source = make_source(tmp_path / "source", "llama 3.1")
    edit(source / "generation_config.json", eos_token_id=[2, 3])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), common.load_tokenizer(source, "chatml")
    common.load_config(SimpleNamespace(model=str(source), max_length=64))
    shutil.rmtree(source)
    chat = common.ChatFormat(tokenizer)
    common.write_model(tmp_path / "export", str(source), model, dict(model.named_parameters()), chat)
    assert AutoConfig.from_pretrained(tmp_path / "export").rope_parameters == LLAMA3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id[1:] == [2, 3]


def test_a_template_for_tools_stays(exports):
    """A tokenizer with one template for chats and one for chats with tools is exported with both."""
    _, folder, tokenizer = exports["two templates"]
    assert set(tokenizer.chat_template) == {"default", "tool_use"}
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
