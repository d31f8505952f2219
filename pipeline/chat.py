"""Talk to a model in the terminal, by the prompts of training and the sampler of the rollouts.

    python -m pipeline.chat --model runs/sft/model                       /reset begins anew, /exit or Ctrl-D ends it
    python -m pipeline.chat --model runs/sft/model "What is 2 + 3?"      the answer alone; - reads standard input

A line is a question. Its answer appears as it is sampled, thoughts dimmed; Ctrl-C stops it, and what it has said stays
in the conversation, but no thoughts (as in Qwen3). Same seed and questions, same answers. Nothing is written.
"""

import contextlib
import io
import signal
import sys
from collections import deque
from dataclasses import dataclass

import tyro

from common import ChatFormat, RunError, first_line, load_tokenizer, read_source
from kernels.sampler import Sampler, SamplingParams
from pipeline.look import token_texts


@dataclass
class Args:
    model: str  # model folder or Hub id
    question: tyro.conf.Positional[str | None] = None  # the only one, to be answered; "-" reads standard input
    system: str | None = None  # system message
    chat_template: str | None = None  # tulu, chatml or a Jinja file; by default the tokenizer's own
    temperature: float = 1.0  # of sampling; 0 takes the likeliest token
    max_new_tokens: int = 2048  # longest answer
    max_length: int = 4096  # longest conversation, in tokens; at most the positions that the model knows
    seed: int = 1  # of sampling


def main(args):
    """Answers one question, or all that come. Raises RunError; and as sampler and template ValueError and OSError."""
    with contextlib.redirect_stdout(sys.stderr):  # what loading prints is no answer
        chat = ChatFormat(load_tokenizer(args.model, args.chat_template))
        known = getattr(read_source(args.model)[0], "max_position_embeddings", None) or args.max_length
        sampler = Sampler.from_pretrained(args.model, slots=1, max_length=min(args.max_length, known))
    messages = beginning = [{"role": "system", "content": args.system}] if args.system is not None else []
    if args.question is not None:
        question = sys.stdin.read() if args.question == "-" else args.question
        print(sample_answer(args, chat, sampler, [*beginning, {"role": "user", "content": question}]))
        return
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401  input() edits its line with it
    for number, question in enumerate(iter(lambda: input("> ").strip(), "/exit")):
        if question in ("", "/reset"):
            messages = beginning if question else messages
            continue
        asked = [*messages, {"role": "user", "content": question}]
        try:
            answer = sample_answer(args, chat, sampler, asked, number)
            messages = [*asked, {"role": "assistant", "content": answer}] if answer else messages
        except ValueError as error:  # no room is left, for one
            print(f"{error}; /reset begins anew", end="")
        print()


def sample_answer(args, chat, sampler, messages, step=0):
    """What the model answers, without thoughts; in a conversation all of it is printed as it comes."""
    text = "<think>" if thinks(chat.template.opening) else ""  # the prompt ends with it
    new = deque()
    texts = token_texts(chat.tokenizer, iter(new.popleft, None))  # takes a token out of `new` for each text

    def find_end(ids, seen):
        nonlocal text
        for i in range(seen, len(ids)):
            if ids[i] in {*chat.stop_ids, *sampler.eos_ids}:
                return i + 1
            new.append(ids[i])
            piece = next(texts)
            is_dimmed = (thinks(text) or thinks(text + piece)) and sys.stdout.isatty()
            text += piece
            if args.question is None:
                print(f"\033[2m{piece}\033[0m" if is_dimmed else piece, end="", flush=True)

    limits = {name: vars(args)[name] for name in ("max_new_tokens", "temperature", "seed")}
    stopped = []
    if args.question is None:
        signal.signal(signal.SIGINT, lambda *_: stopped.append(True))  # Ctrl-C
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar would write over the answer
        sampler.sample([chat.prompt(messages)], SamplingParams(find_end=find_end, **limits), step, stop=lambda: stopped)
    sampler.groups.clear()  # it keeps what was stopped
    return "" if thinks(text) else text.rpartition("</think>")[2].strip()


def thinks(text):
    """Whether a text ends within thoughts."""
    return text.rfind("<think>") > text.rfind("</think>")


if __name__ == "__main__":
    with contextlib.suppress(EOFError):  # Ctrl-D
        try:
            main(tyro.cli(Args, description=__doc__, use_underscores=True, prog="python -m pipeline.chat"))
        except (RunError, ValueError, OSError, KeyboardInterrupt) as error:
            sys.exit(f"error: {first_line(error)}")
