"""pipeline.chat: what it says is what Sampler.sample samples, as it comes, and the conversation is what was said."""

import io
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOKENIZERS, assistant, tokenizer_folder, user
from transformers import AutoModelForCausalLM, LlamaConfig

import common
from kernels.sampler import Sampler, SamplingParams
from pipeline import chat
from pipeline.chat import Args
from pipeline.look import token_texts


@pytest.fixture(autouse=True)
def handler():
    """main takes Ctrl-C for itself: give it back to pytest."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model, the same one in every run."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), "tulu")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def known(folder):
    """(ChatFormat, Sampler) of the model."""
    return common.ChatFormat(common.load_tokenizer(folder)), Sampler.from_pretrained(folder, slots=1)


def sampled(known, messages, step, **params):
    """What Sampler.sample itself makes of a conversation, as text."""
    format, sampler = known
    params = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1} | params
    [completion] = sampler.sample([format.prompt(messages)], SamplingParams(**params), step=step)
    assert not completion.ended  # of 12 random tokens none ends it, with the seeds of these tests
    return text_of(format, completion.token_ids)


def text_of(format, ids):
    """As text; a last character that is not whole is left out."""
    text = "".join(token_texts(format.tokenizer, ids))
    assert format.tokenizer.decode(ids).startswith(text)
    return text


def talk(monkeypatch, capsys, lines, *args, **flags):
    """What the program prints for lines of standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat.main(Args(*args, **{"max_new_tokens": 12} | flags))
    return capsys.readouterr().out


class Terminal(io.StringIO):
    """Standard output that is a terminal, and calls `at_write` before everything that is written."""

    def __init__(self, at_write=lambda text: None):
        super().__init__()
        self.at_write = at_write

    def isatty(self):
        return True

    def write(self, text):
        self.at_write(text)
        return super().write(text)


# ----------------------------------------------------------------------------------------------- with a real sampler


@pytest.mark.parametrize("flags", [{"seed": 7}, {"temperature": 0.0}, {"system": "Be brief.", "temperature": 0.5}])
def test_one_answer(monkeypatch, capsys, folder, known, flags):
    params = {name: value for name, value in flags.items() if name != "system"}
    system = [{"role": "system", "content": flags["system"]}] if "system" in flags else []
    expected = sampled(known, [*system, user("What is 2 + 3?")], 0, **params).strip()
    assert talk(monkeypatch, capsys, [], folder, "What is 2 + 3?", **flags) == f"{expected}\n"
    expected = sampled(known, [*system, user("Two lines\nof input\n")], 0, **params).strip()
    assert talk(monkeypatch, capsys, ["Two lines", "of input"], folder, "-", **flags) == f"{expected}\n"


def test_a_conversation(monkeypatch, capsys, folder, known):
    out = talk(monkeypatch, capsys, ["Hi.", "", " And you? ", "/reset", "Hi.", "/exit", "more"], folder)
    first = sampled(known, [user("Hi.")], 0)
    second = sampled(known, [user("Hi."), assistant(first.strip()), user("And you?")], 2)  # the third line
    again = sampled(known, [user("Hi.")], 4)
    assert len({first, second, again}) == 3
    assert out == f"> {first}\n> > {second}\n> > {again}\n> "


def test_answers_stream(monkeypatch, folder):
    steps = []
    run = Sampler._run
    monkeypatch.setattr(Sampler, "_run", lambda self, params: (steps.append(1), run(self, params))[1])
    seen = []
    screen = Terminal()
    screen.flush = lambda: seen.append(len(steps))
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi.\n/exit\n"))
    chat.main(Args(folder, max_new_tokens=12))
    assert len(steps) == 12 and set(range(1, 13)) <= set(seen)  # it is flushed after every token


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, folder, known):
    first = sampled(known, [user("Hi.")], 0)
    tokens = 0

    def press(text):
        nonlocal tokens
        tokens += text not in ("> ", "\n")
        if tokens == 5:
            signal.raise_signal(signal.SIGINT)

    screen = Terminal(press)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi.\nAnd you?\n/exit\n"))
    chat.main(Args(folder, max_new_tokens=12))
    stopped, second = screen.getvalue().removeprefix("> ").removesuffix("\n> ").split("\n> ")
    assert first.startswith(stopped) and 0 < len(stopped) < len(first)
    assert second == sampled(known, [user("Hi."), assistant(stopped.strip()), user("And you?")], 1)


def test_a_stop_id_of_the_template_ends_the_answer(monkeypatch, capsys, folder, known):
    format, sampler = known
    params = SamplingParams(max_new_tokens=12, seed=1)
    ids = sampler.sample([format.prompt([user("Hi.")])], params)[0].token_ids.tolist()
    fifth = next(i for i in range(4, 12) if ids[i] not in ids[:i])
    make = common.ChatFormat.__init__

    def with_another_end(self, *args):
        make(self, *args)
        self.stop_ids = [*self.stop_ids, ids[fifth]]

    monkeypatch.setattr(common.ChatFormat, "__init__", with_another_end)
    expected = text_of(format, ids[:fifth])
    assert talk(monkeypatch, capsys, ["Hi.", "/exit"], folder) == f"> {expected}\n> "


def test_no_room(monkeypatch, capsys, folder):
    with pytest.raises(ValueError, match="prompt 0 has .* tokens: .*room for its completion within --max_length 20$"):
        talk(monkeypatch, capsys, [], folder, "Hi. " * 20, max_length=20)
    out = talk(monkeypatch, capsys, ["Hi. " * 20, "Hi.", "/exit"], folder, max_length=60)
    refusal, answer, end = out.split("\n")
    assert refusal.startswith("> prompt 0 has ") and refusal.endswith("--max_length 60; /reset begins anew")
    assert answer.startswith("> ") and len(answer) > 4 and end == "> "  # the long question is forgotten


def test_longest_conversation_is_what_the_model_knows(monkeypatch, capsys, folder):
    with pytest.raises(ValueError, match="within --max_length 512$"):  # by default --max_length is more
        talk(monkeypatch, capsys, [], folder, "Hi. " * 600)


# ------------------------------------------------------------------------------------- thoughts, with a scripted one


class Scripted:
    """A sampler whose answers are given; `prompts` are those it was asked."""

    def __init__(self, answers):
        self.answers, self.prompts = list(answers), []
        self.groups, self.eos_ids = {}, set()

    def sample(self, prompts, params, step, stop):
        self.prompts += prompts
        ids = self.answers.pop(0)
        for seen in range(0, len(ids), 3):  # three tokens between two looks
            if params.find_end(ids[: seen + 3], seen) is not None or stop():
                break


@pytest.fixture
def scripted(monkeypatch, folder):
    """Function: what is on the screen after a conversation with given answers, pieces of text that are tokens each."""

    def scripted(answers, questions, **flags):
        tokenizer = common.load_tokenizer(folder)

        def ids(pieces):
            return [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]

        sampler = Scripted([ids(pieces) for pieces in answers])
        monkeypatch.setattr(chat, "Sampler", SimpleNamespace(from_pretrained=lambda *_, **__: sampler))
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in [*questions, "/exit"])))
        chat.main(Args(folder, **flags))
        return screen.getvalue(), [tokenizer.decode(prompt) for prompt in sampler.prompts]

    return scripted


def dimmed(screen):
    """(dimmed text, other text) of a screen."""
    parts = screen.split("\033[2m")
    behind = [part.split("\033[0m") for part in parts[1:]]
    return "".join(dim for dim, _ in behind), parts[0] + "".join(rest for _, rest in behind)


def test_thoughts_are_dimmed_and_not_kept(scripted):
    thinking = ["<think>", "2 and 3", "</think>", "\n\nIt is 5.", "</s>", "never"]
    screen, prompts = scripted([thinking, ["Yes", "</s>"]], ["What is 2 + 3?", "Sure?"])
    assert dimmed(screen) == ("<think>2 and 3</think>", "> \n\nIt is 5.\n> Yes\n> ")
    assert "It is 5.</s>" in prompts[1] and "think" not in prompts[1] and "Sure?" in prompts[1]


def test_marks_of_several_tokens(scripted):
    thinking = ["<", "think", ">", "2 and 3", "<", "/", "think", ">", "It is 5.", "</s>"]
    screen, prompts = scripted([thinking, ["</s>"]], ["What is 2 + 3?", "Sure?"])
    dim, plain = dimmed(screen)
    assert dim.endswith("2 and 3</think>") and plain.endswith("It is 5.\n> \n> ") and "think" not in prompts[1]


def test_thoughts_that_the_template_begins(scripted, tmp_path):
    template = (ROOT / "chat_templates" / "tulu.jinja").read_text()
    begin = "{%- if add_generation_prompt %}{{ '<|assistant|>\\n"
    assert begin in template
    (tmp_path / "thinking.jinja").write_text(template.replace(begin, begin + "<think>\\n"))
    flags = {"chat_template": str(tmp_path / "thinking.jinja")}
    screen, prompts = scripted([["2 and 3", "</think>", "It is 5.", "</s>"], ["</s>"]], ["A?", "B?"], **flags)
    assert prompts[0].endswith("<think>\n") and "It is 5." in prompts[1] and "2 and 3" not in prompts[1]
    assert dimmed(screen)[0] == "2 and 3</think>"
    screen, _ = scripted([["2 and 3", "</think>", "It is 5.", "</s>"]], [], question="A?", **flags)
    assert screen == "It is 5.\n"
    screen, prompts = scripted([["2 and 3"], ["</s>"]], ["A?", "B?"], **flags)  # stopped before it said anything
    assert "A?" not in prompts[1]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_pieces_add_up(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer("It is 5. Natalia sold 48 clips", add_special_tokens=False).input_ids
    assert "".join(token_texts(tokenizer, ids)).strip() == tokenizer.decode(ids).strip()


@pytest.mark.slow
def test_command(folder, known):
    def command(*args, **settings):
        return subprocess.run([sys.executable, "-m", "pipeline.chat", *args], cwd=ROOT, capture_output=True, text=True, **settings)

    flags = ["--model", folder, "--max_new_tokens", "12"]
    done = command(*flags, "-", input="Hi.")
    assert (done.returncode, done.stdout) == (0, sampled(known, [user("Hi.")], 0).strip() + "\n")
    assert command(*flags, input="Hi.\n").stdout == f"> {sampled(known, [user('Hi.')], 0)}\n> "  # Ctrl-D, without /exit
    for wrong in (["--model", "nowhere/b", "Hi."], [*flags, "--temperature", "-1", "Hi."]):
        done = command(*wrong)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
