"""Tokenizers, a model and files made on the spot, for every test. Nothing is downloaded, nobody's cache is touched.

`TOKENIZERS[kind]()` makes one small tokenizer of each kind that models use. All of them know the same control strings
(`CONTROLS`), some inside the model's vocabulary and some added to it, with the flags that real tokenizers have.
"""

import atexit
import gc
import json
import math
import os
import shutil
import sys
import tempfile
import time
import zlib
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CACHE = tempfile.mkdtemp(prefix="postcard-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ |= {
    "HF_DATASETS_CACHE": CACHE,
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
if not os.environ.get("CUDA_TESTS"):  # make test-cuda; all other tests expect float32 on the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The instructions that every x86-64 machine of the last ten years has: a verdict should not depend on newer ones.
    os.environ |= {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run as Python on CPU tensors

import datasets  # noqa: E402
import pytest  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast  # noqa: E402

import common  # noqa: E402

datasets.disable_progress_bars()

# Stands in for torch.distributed where a function of a script is tested outside of a run.
ALONE = SimpleNamespace(
    get_rank=lambda: 0, get_world_size=lambda: 1, all_gather_object=lambda box, value: box.__setitem__(0, value)
)


# ------------------------------------------------------------------------------------------------------- tokenizers

CORPUS = (
    """Once upon a time there was a little girl named Lily. She loved to play outside in the park with her friend Tom.
What is 2 + 3? It is 5. Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.
How many clips did Natalia sell altogether? Natalia sold 48/2 = 24 clips in May. She sold 48+24 = 72 clips. #### 72
def add(a, b):
    if a is None:
        return b

    return a + b  # the sum of both numbers

{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
You are a helpful assistant. Answer the user's question as well as you can, and keep the answer short, please.
Café, naïve, Straße, Ελλάδα, привет, 你好，世界, こんにちは, 😀 and <b>bold</b> & <i>italic</i> text, 100 % of it.
im_start im_end user assistant system tool model think eot_id s end start header turn of ( [ { < | / > } ] )
""".splitlines(keepends=True)
    * 3
)

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
INSIDE = [UNK, BOS, EOS, "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]  # special, in the model's own vocabulary
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]  # added to it
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added, but not "special"
CONTROLS = INSIDE[1:] + SPECIAL + PLAIN  # what content must never turn into


def wrap(tokenizer, special=SPECIAL, plain=PLAIN, **flags):
    """A transformers tokenizer that begins plain text with BOS. `flags`: of the added control tokens."""
    tokenizer.add_special_tokens([AddedToken(text, special=True, **{"normalized": False} | flags) for text in special])
    tokenizer.add_tokens([AddedToken(text, **{"normalized": False} | flags) for text in plain])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK)


def byte_level(**flags):
    """Byte-level BPE with NFC, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=INSIDE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, **flags)


def byte_level_spaces():
    """Byte-level BPE with runs of spaces as added tokens, as GPT-NeoX and OLMo have it; control tokens eat spaces."""
    tokenizer = byte_level(lstrip=True, rstrip=True)
    runs = [AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)]
    tokenizer.backend_tokenizer.add_tokens([*runs, AddedToken("|||EMAIL_ADDRESS|||", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )


def sentencepiece_bpe(legacy=False):
    """BPE over ▁ with byte fallback, as Llama 2 and Mistral have it. legacy: ▁ from a normalizer, in every segment."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([strip] if legacy else [])]
    )
    special = INSIDE + [f"<0x{byte:02X}>" for byte in range(256)]
    ascii = [chr(code) for code in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=ascii, limit_alphabet=95, show_progress=False
    )
    corpus = [word for line in CORPUS for word in line.split()]
    tokenizer.train_from_iterator(corpus, trainer)
    settings = json.loads(tokenizer.to_str())  # the byte tokens are ordinary entries, not added ones
    settings["added_tokens"] = [entry for entry in settings["added_tokens"] if entry["content"] in INSIDE]
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.add_tokens(["48"])  # an ordinary entry that is also an added token, as HTML tags are in Gemma
    return wrap(tokenizer)


def unigram():
    """Unigram with NFKC, as T5 and XLM-R have it; added tokens are matched in normalised text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=INSIDE, unk_token=UNK, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, normalized=True)


def word_level():
    """Whole words, split at white space: whatever is in the vocabulary is one token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=2000, special_tokens=INSIDE, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


TOKENIZERS = {
    "byte_level": lru_cache(byte_level),
    "byte_level_spaces": lru_cache(byte_level_spaces),
    "metaspace": lru_cache(sentencepiece_bpe),
    "legacy_llama": lru_cache(lambda: sentencepiece_bpe(legacy=True)),
    "unigram": lru_cache(unigram),
    "word_level": lru_cache(word_level),
}


# ------------------------------------------------------------------------------------------------- files and models


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text} | fields


def chat(question="What is 2 + 3?", answer="It is 5."):
    """A row for sft.py with one question and one answer."""
    return {"messages": [user(question), assistant(answer)]}


def write_jsonl(path, rows):
    """Writes rows, one a line; a row that is a string is written as it is. Returns the path as str."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def pytest_collection_finish():
    """What all test files import stays to the end. A full collection of garbage need not look through it (0.4 s each)."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """A fixture draws the same numbers in every run, and others than another fixture: two models are not one. Not those
    of the session, of which pytest does not ask this file."""
    torch.manual_seed(zlib.crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """A test draws the same numbers in every run, whatever ran before it: no verdict depends on its luck."""
    torch.manual_seed(zlib.crc32(item.name.encode()))


def seconds_of(call, enough=0.0):
    """Processor time of a call: the first of three that is at most `enough`, or the least. One of them may pay for a
    collection of everybody's garbage or a first import, which is not the call's own."""
    seconds = []
    while len(seconds) < 3 and min(seconds, default=math.inf) > enough:
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


def shared(*parts):
    """A path in the folder of real data and models, or the test is skipped."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return path


@lru_cache
def tokenizer_folder(kind):
    """Folder that AutoTokenizer opens, with a tokenizer of this kind and no chat template."""
    folder = Path(CACHE, "tokenizers", kind)
    TOKENIZERS[kind]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random two-layer Llama with the byte-level tokenizer and the Tülu chat template."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), "tulu")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
