"""pipeline.merge: the average is the average, to the bit where it can be, and what cannot be averaged is refused."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import tyro
from conftest import ROOT, tokenizer_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import common
from common import RunError
from pipeline import merge
from pipeline.merge import Args


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of three models of one kind, "a", "b" and "c", in bfloat16; b in several files."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), "tulu")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=11, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn_like(tensor))
        model.save_pretrained(folder / name, max_shard_size="10KB" if name == "b" else "1GB")
        tokenizer.save_pretrained(folder / name)
    assert len(list((folder / "b").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def run(models, tmp_path):
    """Merges models by their letters (or paths) into tmp_path / "out"; returns the tensors of the result's files."""

    def run(*names, **flags):
        paths = [str(models / name) if len(str(name)) == 1 else str(name) for name in names]
        out = tmp_path / "out"
        merge.main(Args(paths, str(out), **flags))
        return tensors(out)

    return run


@pytest.fixture
def copy(models, tmp_path):
    """A copy of a model, to be changed; its weights in one file as `change` returns them."""

    def copy(name, change=lambda tensors: tensors, config=()):
        folder = tmp_path / f"copy_of_{name}_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models / name, folder)
        new = change(tensors(folder))
        for path in folder.glob("model*"):
            path.unlink()
        save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | dict(config)))
        return folder

    return copy


def tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(bits(a[name]), bits(b[name])), name


def averaged(folder, names, weights):
    """The six lines that the merge has to agree with."""
    parts = [AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in names]
    result = {}
    for name in parts[0]:
        total = sum(weight * part[name].float() for weight, part in zip(weights, parts, strict=True))
        result[name] = total.to(parts[0][name].dtype)
    return result


# ------------------------------------------------------------------------------------------------------ the average


@pytest.mark.parametrize("weights", [[], [3, 1], [0.3, -1.5]])
def test_average(models, run, tmp_path, weights):
    run("a", "b", weights=weights)
    shares = [weight / sum(weights) for weight in weights] or [0.5, 0.5]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    assert_same_bits(merged.state_dict(), averaged(models, "ab", shares))
    parts = [AutoModelForCausalLM.from_pretrained(models / name).state_dict() for name in "ab"]
    rounded = {name: shares[0] * parts[0][name] + shares[1] * parts[1][name] for name in parts[0]}
    assert bool(weights) == any(not torch.equal(rounded[name], merged.state_dict()[name]) for name in rounded)


def test_no_normalize(models, run, tmp_path):
    run("a", "b", "c", weights=[1, 0.5, -1], no_normalize=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_same_bits(merged, averaged(models, "abc", [1, 0.5, -1]))


def test_a_model_with_itself_is_itself(models, run, copy, tmp_path):
    a = tensors(models / "a")
    assert_same_bits(run("a", "a", "a", weights=[0.1, 0.7, 0.1]), a)
    shutil.rmtree(tmp_path / "out")

    def delicate(tensors):  # float32, with a denormal number, and a zero whose sign would be lost in a sum
        tensors = {name: tensor.float() / 3 for name, tensor in tensors.items()}
        tensors["model.norm.weight"][:2] = torch.tensor([-0.0, 1e-45])
        return tensors

    folder = copy("a", delicate)
    assert_same_bits(run(folder, folder, folder, weights=[0.1, 0.7, 0.1]), tensors(folder))
    shutil.rmtree(tmp_path / "out")
    assert_same_bits(run(folder, "b", weights=[1, 0]), tensors(folder))


def test_weights_of_1_and_0(models, run, tmp_path):
    assert_same_bits(run("a", "b", weights=[1, 0]), tensors(models / "a"))
    shutil.rmtree(tmp_path / "out")
    assert_same_bits(run("a", "b", weights=[0, 5]), tensors(models / "b"))


def test_the_first_decides_the_precision(models, run, copy):
    exact = copy("b", lambda tensors: {name: tensor.float() + 1e-4 for name, tensor in tensors.items()})
    merged = run("a", exact)
    a, b = tensors(models / "a"), tensors(exact)
    assert_same_bits(merged, {name: (0.5 * a[name].float() + 0.5 * b[name]).bfloat16() for name in a})


def test_tied_weights_stand_in_the_result_once(models, run, copy):
    head = copy("a", lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert_same_bits(run("b", head), {name: (0.5 * tensors(models / "b")[name].float() + 0.5 * tensor.float()).bfloat16()
                                      for name, tensor in tensors(models / "a").items()})  # fmt: skip


def test_a_head_of_its_own_is_no_tied_one(run, copy):
    head = copy("a", lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(RunError, match="only one of them has the tensor lm_head.weight"):
        run(head, "b")
    assert "lm_head.weight" in run(head, head)


def test_integers_are_copied(run, copy, tmp_path):
    def with_buffer(value):
        return lambda tensors: tensors | {"model.layers.1.counts": torch.tensor([1, value])}

    merged = run(copy("a", with_buffer(2)), copy("b", with_buffer(2)))
    assert merged["model.layers.1.counts"].tolist() == [1, 2]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(RunError, match="model.layers.1.counts holds torch.int64, which has no average"):
        run(copy("a", with_buffer(2)), copy("b", with_buffer(3)))


def test_restore(models, run, tmp_path):
    base = str(models / "c")
    merged = run("a", "b", base=base, restore=["model.layers.1.*", "*norm.weight"])
    a, b, c = (tensors(models / name) for name in "abc")
    mean = {name: (0.5 * a[name].float() + 0.5 * b[name].float()).bfloat16() for name in a}
    restored = [name for name in a if name.startswith("model.layers.1.") or name.endswith("norm.weight")]
    assert 20 < len(restored) < len(a) and "model.layers.10.mlp.up_proj.weight" not in restored
    assert_same_bits(merged, mean | {name: c[name] for name in restored})
    assert set(json.loads((tmp_path / "out" / "merge.json").read_text())["restored"]) == set(restored)
    shutil.rmtree(tmp_path / "out")
    alone = run("a", base=base, restore=["model.layers.1.*"])
    assert_same_bits(alone, a | {name: c[name] for name in a if name.startswith("model.layers.1.")})


# ------------------------------------------------------------------------------------------------------ what is written


def test_a_large_model_is_written_in_parts(models, run, tmp_path, monkeypatch):
    whole = run("b", "a")
    (tmp_path / "out").rename(tmp_path / "whole")
    monkeypatch.setattr(merge, "FILE_SIZE", "20KB")
    assert_same_bits(run("b", "a"), whole)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 25_000 for path in files)
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_same_bits(sharded, AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict())


def test_the_rest_is_that_of_the_first(models, run, tmp_path, copy):
    first = copy("a", config={"rms_norm_eps": 0.125})
    (first / "generation_config.json").write_text('{"temperature": 0.6}')
    (first / "trainer_state.json").write_text("{}")
    run(first, "b")
    out = tmp_path / "out"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (first / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors", "SHA256SUMS", "merge.json",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(first).chat_template
    mode = (out / "model.safetensors").stat().st_mode
    assert mode == (out / "config.json").stat().st_mode and mode & 0o444 == 0o444
    config = common.read_source(str(out))[0]
    assert common.read_weights(str(out), config, AutoModelForCausalLM)  # as SHA256SUMS says
    record = json.loads((out / "merge.json").read_text())
    assert record["models"] == [str(first), str(models / "b")] and record["weights"] == [0.5, 0.5]


def test_the_same_bytes_again(run, tmp_path):
    run("a", "b")
    (tmp_path / "out").rename(tmp_path / "first")
    run("a", "b")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_whole_or_not_at_all(models, run, tmp_path, monkeypatch):
    before = set(tmp_path.iterdir())
    average = merge.average

    def interrupted(name, *rest):
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        return average(name, *rest)

    monkeypatch.setattr(merge, "average", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("a", "b")
    assert set(tmp_path.iterdir()) == before
    monkeypatch.undo()
    left = tmp_path / ".out.unfinished"  # by a kill
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_text("half")
    run("a", "b")
    assert not left.exists() and not list((tmp_path / "out").glob("model-*"))
    with pytest.raises(RunError, match="exists: choose a new folder"):
        run("a", "b")


def test_a_disk_that_is_full(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "save_file", full)
    with pytest.raises(RunError, match="out cannot be written: .*No space left on device"):
        run("a", "b")
    assert not list(tmp_path.iterdir())


def test_how_far_they_are_apart(models, run, copy, tmp_path, capsys):
    run("a", "b", "a")
    a, b = (tensors(models / name) for name in "ab")

    def apart(prefix):
        names = [name for name in a if name.startswith(prefix)]
        square = sum((a[name].double() - b[name].double()).square().sum() for name in names)
        return float((square / sum(a[name].double().square().sum() for name in names)).sqrt())

    found = json.loads((tmp_path / "out" / "merge.json").read_text())["apart"]
    layers = [f"model.layers.{i}" for i in range(11)]
    assert list(found) == ["model.embed_tokens", *layers, "model.norm"]
    for block in found:
        assert found[block] == [pytest.approx(apart(f"{block}."), rel=1e-5), 0]
    out = capsys.readouterr().out
    assert f"  model.layers.10                  {found['model.layers.10'][0]:10.4g}          0\n" in out
    far = [block for block in found if found[block][0] > merge.FAR]
    assert f"WARNING {len(far)} blocks are far apart, as model.embed_tokens: were the models trained from the same one?" in out
    shutil.rmtree(tmp_path / "out")
    run("a", copy("a", lambda tensors: {name: 1.01 * tensor for name, tensor in tensors.items()}))
    assert "WARNING" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {n: v for n, v in t.items() if "layers.10." not in n}, r"only one of them has the tensor model.layers.10.input_layernorm.weight"),
        (lambda t: t | {"model.norm.weight": torch.ones(8)}, r"model.norm.weight is \(16,\) and \(8,\)"),
        (lambda t: t | {"model.norm.weight": torch.full((16,), torch.nan)}, "model.norm.weight has values that are not finite"),
    ],
)  # fmt: skip
def test_unlike_tensors(run, copy, tmp_path, change, message):
    with pytest.raises(RunError, match=message):
        run("a", copy("a", change))
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.unfinished").exists()


def test_beyond_float16(run, copy):
    half = copy("a", lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    large = copy("b", lambda tensors: {name: tensor.float() * 1e6 for name, tensor in tensors.items()})
    with pytest.raises(RunError, match="beyond the range of torch.float16"):
        run(half, large)


def test_unlike_vocabularies(models, run, copy):
    other = copy("a")
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    word, last = list(vocabulary)[-2:]
    vocabulary[word], vocabulary[last] = vocabulary[last], vocabulary[word]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    ids = sorted(vocabulary[text] for text in (word, last))
    with pytest.raises(RunError, match=rf"differ in tokenizer.json: model: vocab: .*: ({ids[0]} and {ids[1]}|{ids[1]} and {ids[0]})$"):
        run("a", other)
    with pytest.raises(RunError, match="differ in tokenizer.json: model: vocab"):
        run("a", base=str(other), restore=["*"])
    settings["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    vocabulary[word], vocabulary[last] = vocabulary[last], vocabulary[word]
    (other / "tokenizer.json").write_text(json.dumps(settings, indent=4))
    run("a", other)  # another text, and the same tokenizer
    (other / "tokenizer.json").unlink()
    with pytest.raises(RunError, match="its tokenizer.json cannot be read"):
        merge.vocabulary(str(other))


def test_unlike_chat_templates(models, run, copy, tmp_path):
    other, none = copy("b"), copy("b")
    text = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text("{# a comment #}\n" + text)
    (none / "chat_template.jinja").unlink()
    with pytest.raises(RunError, match="differ in chat template: line 1: .* and '{# a comment #}'"):
        run("a", other)
    with pytest.raises(RunError, match="differ in chat template: None and"):
        run(none, "a")
    for flags in ({"base": str(other), "restore": ["*"]}, {"base": str(none), "restore": ["*"]}):
        run("a", **flags)  # of the base only tensors are taken
        shutil.rmtree(tmp_path / "out")
    run("a", none)  # which was trained with no other
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == text


def test_what_is_no_sound_model(models, run, copy, tmp_path):
    for settings in ({"quantization_config": {"quant_method": "fp8"}},):
        with pytest.raises(RunError, match="quantized weights have no average"):
            run("a", copy("a", config=settings))
    damaged = copy("a")
    file = damaged / "model.safetensors"
    (damaged / "SHA256SUMS").write_text(f"{common.hash_file(file)}  {file.name}\n")
    assert_same_bits(run(damaged, damaged), tensors(damaged))
    shutil.rmtree(tmp_path / "out")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="SHA256SUMS does not fit model.safetensors: it is damaged"):
        run("a", damaged)
    (damaged / "SHA256SUMS").unlink()
    file.write_bytes(content[:1000])
    with pytest.raises(RunError, match="model.safetensors: .*header"):
        run("a", damaged)
    file.rename(damaged / "pytorch_model.bin")
    with pytest.raises(RunError, match="its weights are no safetensors"):
        run("a", damaged)


@pytest.mark.parametrize(
    "names, flags, message",
    [
        ("a", {}, "nothing to merge"),
        ("ab", {"base": "c"}, "nothing to merge: give two or more --models, or --base together with --restore"),
        ("ab", {"restore": ["*"]}, "nothing to merge"),
        ("ab", {"weights": [1]}, "one finite number for each of the 2 models"),
        ("ab", {"weights": [1, float("nan")]}, "one finite number"),
        ("ab", {"weights": [1, -1]}, "add up to 0: only --no_normalize"),
        ("ab", {"weights": [0, 0], "no_normalize": True}, "not all may be 0"),
        ("a", {"base": "c", "restore": ["model.layer.1.*"]}, "--restore model.layer.1.. fits no tensor; one of them is model.embed"),
    ],
)
def test_flags_that_do_not_fit(models, run, names, flags, message):
    if "base" in flags:
        flags = flags | {"base": str(models / flags["base"])}
    with pytest.raises(RunError, match=message):
        run(*names, **flags)


# ------------------------------------------------------------------------------------------------------ the command


def test_flags_as_they_are_typed():
    line = "--models A B C --weights 1 1 -1 --no_normalize --base B0 --restore model.layers.3*.* --out O"
    args = tyro.cli(Args, args=line.split(), use_underscores=True)
    assert args == Args(["A", "B", "C"], "O", [1, 1, -1], True, "B0", ["model.layers.3*.*"])


def test_a_model_of_the_hub(models, run, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--someone--b"
    shutil.copytree(models / "b", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for module in ("transformers.utils.hub.constants", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"))
    download, asked_for = huggingface_hub.snapshot_download, []

    def recorded(model, allow_patterns):
        asked_for.extend(allow_patterns)
        return download(model, allow_patterns=allow_patterns)

    monkeypatch.setattr("huggingface_hub.snapshot_download", recorded)
    merged = run("someone/b", "a", weights=[1, 0])
    assert {"config.json", "tokenizer*.*", "*.jinja"} < set(asked_for) and not any("safetensors" in name for name in asked_for)
    assert_same_bits(merged, tensors(models / "b"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (models / "b" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


@pytest.mark.slow
def test_errors_are_one_line(models, tmp_path):
    command = [sys.executable, "-m", "pipeline.merge", "--models", str(models / "a"), "nowhere/b", "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: model nowhere/b") and done.stderr.count("\n") == 1
