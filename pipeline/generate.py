"""Samples of a model for the prompts of a data source, judged: rows for `curate`, `evaluate`, and your own eyes.

    python -m pipeline.generate --model M --data prompts.jsonl --n 8 --out samples.jsonl
    torchrun --nproc_per_node 8 -m pipeline.generate … -n 8 …        one file from all (torchrun would take --n itself)
    python -m pipeline.generate --model STRONG WEAK --data prompts.jsonl --n 1 --out both.jsonl    for delta pairs
    python -m pipeline.generate --model M --score_only --data samples.jsonl --out scored.jsonl     given answers
    python -m pipeline.generate --model M --from_header 1000 --out invented.jsonl    prompts that the model makes up

A row is what grpo.py reads. Written is the row, without a last answer (that is in `reference` then), and of each of its
n completions: `completions` (texts), `rewards` (null: not judged), `reasons`, `answers` (what the verifier has read),
`ended`, `tokens`, `token_ids`, `logprobs` (at --temperature); and `model`, `temperature`, `top_p`, `seed`. Verifiers
judge, or with --reward_model a model's score is the reward. A row without a verifier is sampled and not judged.

Killed, the same command goes on. What is sampled does not depend on the number of processes, nor on --slots.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import common
import kernels.attention  # noqa: F401  (registers the attention function of RewardModel)
from kernels.sampler import Completion
from pipeline.generator import Generator, Sampling
from pipeline.ranks import on_rank0, own_device, run, say
from rewards.environment import StopStrings, texts

RANGES = {"n": (1, 1e6), "max_new_tokens": (1, 1e9), "temperature": (0, 100), "top_p": (1e-6, 1), "slots": (1, 1e6),
          "sample_tp": (1, 1e6), "verifier_workers": (1, 1e6), "from_header": (1, 1e9)}  # fmt: skip
TOKENS = 8192  # that a reward model reads at a time


@dataclass(kw_only=True)
class Args(Sampling):
    model: list[str]  # folder or Hub id; of several, one after the other answers all prompts
    out: str  # JSON lines to write; there once all is done
    data: list[str] = field(default_factory=list)  # prompts: SOURCE[:AMOUNT] ..., as --data of the scripts
    reward_model: str | None = None  # folder or Hub id of a reward model, whose scores are the rewards
    per_token: bool = False  # log-probabilities of each token, not their sum
    score_only: bool = False  # log-probabilities and rewards of given `completions`, or else of the last answer
    from_header: int | None = None  # instead of --data: so many prompts, sampled behind the header of a user's turn


def main(args):
    """Writes --out. Raises RunError."""
    common.check_ranges(args, common.RANGES | RANGES)
    out = Path(args.out)
    if out.exists():
        raise common.RunError(f"--out {out} is there already: delete it, or choose another")
    if bool(args.data) == bool(args.from_header):
        raise common.RunError("give --data, or --from_header N")
    if args.score_only and args.from_header:
        raise common.RunError("--score_only is for rows with answers, which --from_header does not have")
    if len(set(args.model)) < len(args.model):
        raise common.RunError("--model names a model twice")
    if args.from_header:
        args = replace(args, n=1)
    kind = Scorer if args.score_only else Inventor if args.from_header else Generator
    scorer = RewardModel(args.reward_model) if args.reward_model else None
    parts = []
    for model in args.model:
        generator = kind(args, model, scorer)
        parts.append(generator.write_part(generator.load(args.data), out))
        generator.close()
    on_rank0(lambda: publish(parts, out))


def publish(parts, out):
    """Makes one file of several, and says what is in it."""
    whole = out.with_name(f".{out.name}.whole")
    with open(whole, "wb") as file:
        for part in parts:
            with open(part, "rb") as lines:
                shutil.copyfileobj(lines, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(whole, out)
    for part in parts:
        part.unlink()
    say(account(out))


def account(path):
    """One line on the completions in a file: how many, rewards, ends, lengths."""
    rewards, reasons, tokens, ended = [], Counter(), [], 0
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            rewards += [reward for reward in row.get("rewards", []) if reward is not None]
            reasons.update(row.get("reasons", []))
            tokens += row.get("tokens", [])
            ended += sum(row.get("ended", []))
    if not tokens:
        return f"{path}: written"
    mean = f"mean reward {np.mean(rewards):.4f}, " if rewards else ""
    found = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    lengths = f"{np.mean(tokens):.1f} tokens in the mean, {ended / len(tokens):.1%} ended"
    return f"{path}: {len(tokens)} completions, {mean}{lengths} ({found})"


class RewardModel:
    """Scores conversations, in its own chat template, by a model that reward_model.py has trained.

    Raises RunError if it cannot be opened or is no reward model.
    """

    def __init__(self, folder):
        self.folder = folder
        config = common.load_config(SimpleNamespace(model=folder, max_length=1))
        if "ForSequenceClassification" not in str(config.architectures):
            raise common.RunError(f"--reward_model {folder} is no reward model: reward_model.py trains one")
        config.num_labels = 1
        dtype = torch.bfloat16 if own_device().type == "cuda" else torch.float32
        self.longest = getattr(config, "max_position_embeddings", None) or 10**9
        self.chat = common.ChatFormat(common.load_tokenizer(folder))
        weights = common.read_weights(folder, config, AutoModelForSequenceClassification)
        with torch.device("meta"):
            make = AutoModelForSequenceClassification.from_config
            self.model = make(config, attn_implementation="packed", dtype=dtype).eval()
        self.model.to_empty(device=own_device())
        self.model.tie_weights()
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(weights[name])

    def __str__(self):
        return str(self.folder)

    @torch.no_grad()
    def scores(self, row, answers):
        """A float for each answer (a text) to the row's prompt; None where both are longer than the model's positions.

        An answer that was cut off is scored as if it had ended.
        """
        prompt = common.read_conversation(row, needs_answer=False)
        sequences = []
        for answer in answers:
            messages = [*prompt, {"role": "assistant", "content": answer}]
            ids, _ = self.chat.encode(messages, common.parse_tools(row), options=common.read_options(row))
            sequences.append((np.array(ids), np.zeros(len(ids), dtype=bool)))
        scores = [None] * len(answers)
        fitting = [i for i, (ids, _) in enumerate(sequences) if len(ids) <= self.longest]
        [parts] = common.deal([len(sequences[i][0]) for i in fitting], TOKENS)
        for part in ([fitting[place] for place in places] for places in parts):
            microbatch = common.pack([sequences[i] for i in part], own_device())
            hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
            last = hidden[microbatch.cu_seqlens[1:].long() - 1].float()  # (S, H), as in reward_model.py
            for i, score in zip(part, (last @ self.model.score.weight[0].float()).tolist(), strict=True):
                scores[i] = score
        return scores


class Scorer(Generator):
    """Reads given answers instead of sampling: their log-probabilities under the model, and verdicts."""

    def complete(self, rows, mine, on_end):
        """As Generator.complete. RunError for a row without an answer, or with one that cannot be scored."""
        groups = []
        for i, line in zip(mine, rows.table.select(mine)["line"], strict=True):
            row, where = json.loads(line), rows.where(i)
            try:
                groups.append([self.read(i, k, row, answer) for k, answer in enumerate(given(row))])
            except (ValueError, TypeError) as error:
                raise common.DataError(*where.rsplit(", row ", 1), f"--score_only: {error}") from None
        whole = [np.concatenate([c.prompt_ids, c.token_ids]) for group in groups for c in group]
        try:
            scores = iter(self.sampler.score(whole, self.args.temperature))
        except ValueError as error:
            raise common.RunError(f"--score_only: {error}") from None
        for completion in (c for group in groups for c in group):
            completion.logprobs = next(scores)[len(completion.prompt_ids) - 1 :]
            on_end(completion)
        return groups

    def read(self, i, k, row, answer):
        """The Completion of answer number k of row i. Its tokens are as given, if they are of this tokenizer."""
        text, token_ids, ended = answer
        messages = common.read_conversation({**row, "completion": None}, needs_answer=False)
        tools, options = common.parse_tools(row), common.read_options(row)
        prompt = np.array(self.chat.prompt(messages, tools, options))
        ids = np.array(token_ids or [], dtype=np.int64)
        is_own = len(ids) and 0 <= ids.min() and ids.max() < self.sampler.config.vocab_size
        completion = Completion(0, i, k, prompt, ids, np.zeros(len(ids)), bool(ended), True)
        if not is_own or texts(completion, self.chat.tokenizer, self.sampler.eos_ids)[0] != text:
            answer = {"role": "assistant", "content": text}
            whole, trained = self.chat.encode([*messages, answer], tools, last_turn_only=True, options=options)
            first, *_, last = np.flatnonzero(trained)
            last -= not ended  # without the end token, which was not sampled
            completion.prompt_ids, completion.token_ids = np.array(whole[:first]), np.array(whole[first : last + 1])
        return completion

    def row(self, row, group, verdicts):
        """As Generator.row; the texts are as they were given, and the verdicts too, where nobody judges."""
        names = ["completions"] if self.scorer or any(verdicts) else ["completions", "rewards", "reasons", "answers"]
        kept = {"completions": [row.get("reference")]} | {name: row[name] for name in names if name in row}
        return super().row(row, group, verdicts) | kept


def given(row):
    """[(text, token ids or None, ended), ...] of the answers in a row: `completions`, or else the `reference`."""
    if row.get("completions") is None:
        if row.get("reference") is None:
            raise ValueError("no `completions`, and no answer behind the prompt")
        return [(row["reference"], None, True)]
    texts, count = row["completions"], len(row["completions"])
    return list(zip(texts, row.get("token_ids") or [None] * count, row.get("ended") or [True] * count, strict=True))


class Inventor(Generator):
    """Samples what a user would say, behind the header of a user's turn: what prompts was the model trained on?"""

    def load(self, sources):
        """So many prompts that end with the header. RunError if the template writes none."""
        mark = "POSTCARD"
        view = self.chat.template.view([{"role": "user", "content": mark}])
        text, _ = self.chat.template.render(view, add_generation_prompt=True)
        header, found, tail = text.partition(mark)
        if not found or not header or not tail.strip():
            raise common.RunError(f"the chat template of {self.model} does not write a header before a user's turn")
        self.tail = tail.strip().splitlines()[0]  # what ends the turn
        [ids] = self.chat.controls.encode([header])[0:1]
        count = self.args.from_header
        columns = {"input_ids": [ids] * count, "trained": [[False] * len(ids)] * count, "job": ["null"] * count}
        table = Dataset.from_dict({**columns, "line": ["{}"] * count})
        lengths = np.full(count, len(ids))
        return common.Rows(table, ["--from_header"], lengths, 0 * lengths, [], header)

    def params(self, **more):
        """As Generator.params: one completion, which also ends where the template would end the turn."""
        ends = StopStrings(self.chat.tokenizer, [self.tail, *self.args.stop_strings])
        return replace(super().params(**more), n=1, find_end=ends)

    def row(self, row, group, verdicts):
        """The invented prompt as a row."""
        row = super().row(row, group, verdicts)
        text = row["completions"][0].partition(self.tail)[0]
        return {"messages": [{"role": "user", "content": text.strip()}]} | row


if __name__ == "__main__":
    run(main, Args, __doc__)
