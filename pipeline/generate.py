"""Samples of a model for the prompts of a data source, judged: rows for `curate`, `evaluate`, and your own eyes.

    python -m pipeline.generate --model M --data prompts.jsonl --n 8 --out samples.jsonl
    torchrun --nproc_per_node 8 -m pipeline.generate … -n 8 …        one file from all (torchrun would take --n itself)
    python -m pipeline.generate --model STRONG WEAK --data prompts.jsonl --n 1 --out both.jsonl    for delta pairs
    python -m pipeline.generate --model M --score_only --data samples.jsonl --out scored.jsonl     given answers
    python -m pipeline.generate --model M --from_header 1000 --out invented.jsonl    prompts that the model makes up

A row is what grpo.py reads. Written is the row, its prompt as `messages` and a last answer as `reference`, and of each
of its n completions: `completions` (texts), `rewards` (null: not judged), `reasons`, `answers` (what the verifier has
read), `ended`, `tokens`, `token_ids`, `logprobs` (at --temperature); and `model`, `temperature`, `top_p`, `seed`.
Verifiers judge, or with --reward_model a model's score is the reward. A row without a verifier is sampled and not
judged. With --score_only, `scored_by` is the model whose `logprobs` these are.

Killed, the same command goes on. What is sampled does not depend on the number of processes, nor on --slots.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

import common
from kernels.sampler import Completion
from pipeline.generator import Generator, Sampling
from pipeline.models import RewardModel
from pipeline.ranks import on_rank0, run, say
from pipeline.shapes.files import lines_of, writing
from rewards.environment import StopStrings, texts

RANGES = {"n": (1, 1e6), "max_new_tokens": (1, 1e9), "temperature": (0, 100), "top_p": (1e-6, 1), "slots": (1, 1e6),
          "sample_tp": (1, 1e6), "verifier_workers": (1, 1e6), "from_header": (1, 1e9)}  # fmt: skip


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
    scorer = RewardModel(args.reward_model, args.content_tokens) if args.reward_model else None
    parts = []
    for model in args.model:
        generator = kind(args, model, scorer)
        parts.append(generator.write_part(generator.load(args.data), out))
        generator.close()
    on_rank0(lambda: publish(parts, out))


def publish(parts, out):
    """Makes one file of several, and says what is in it."""
    with writing(out) as file:
        for part in parts:
            with open(part, encoding="utf-8") as lines:
                shutil.copyfileobj(lines, file)
    for part in parts:
        part.unlink()
    say(account(out))


def account(path):
    """One line on the completions in a file: how many, rewards, ends, lengths."""
    rewards, reasons, tokens, ended = [], Counter(), [], 0
    for _, row in lines_of(path):
        rewards += [reward for reward in row["rewards"] if reward is not None]
        reasons.update(row["reasons"])
        tokens += row["tokens"]
        ended += sum(row["ended"])
    mean = f"mean reward {np.mean(rewards):.4f}, " if rewards else ""
    names = {"none": "not judged, as no verifier is named", "score": "scored by the reward model"}
    found = ", ".join(f"{count} {names.get(reason, reason)}" for reason, count in reasons.most_common())
    lengths = f"{np.mean(tokens):.1f} tokens in the mean, {ended / len(tokens):.1%} ended"
    return f"{path}: {len(tokens)} completions, {mean}{lengths} ({found})"


class Scorer(Generator):
    """Reads given answers instead of sampling: their log-probabilities under the model, and verdicts."""

    reads_answers = True

    def complete(self, rows, mine, on_end):
        """As Generator.complete. DataError for a row without an answer, or with one that cannot be scored."""
        groups = []
        for i, line, (ids, _) in zip(mine, rows.table.select(mine)["line"], rows.sequences(mine), strict=True):
            row = json.loads(line)
            try:
                answers = given(row)
                groups.append([self.read(row, np.array(ids), *answer) for answer in answers])
            except (ValueError, TypeError, OverflowError) as error:
                raise common.DataError(*rows.where(i).rsplit(", row ", 1), f"--score_only: {error}") from None
            for k, completion in enumerate(groups[-1]):
                completion.index, completion.sample = i, k
        completions = [completion for group in groups for completion in group]
        whole = [np.concatenate([c.prompt_ids, c.token_ids]) for c in completions]
        try:
            scores = self.sampler.score([ids for ids in whole if len(ids) > 1], self.args.temperature)
        except ValueError as error:
            raise common.RunError(f"model {self.model}: {error}") from None
        scores = iter(scores)
        for ids, completion in zip(whole, completions, strict=True):
            if len(ids) > 1:
                completion.logprobs = next(scores)[len(completion.prompt_ids) - 1 :]
            on_end(completion)
        return groups

    def read(self, row, prompt, answer, token_ids, ended):
        """The Completion of an answer (a message) to a prompt (P,). Its tokens are as given, if this model has them."""
        ids = np.array(token_ids or [], dtype=np.int64)
        completion = Completion(0, 0, 0, prompt, ids, np.zeros(len(ids)), ended, True)
        is_own = len(ids) > 0 and ids.min() >= 0 and ids.max() < self.sampler.config.vocab_size
        if is_own:
            text, _ = texts(completion, self.chat.tokenizer, self.sampler)
            is_own = text == answer["content"]
        if not is_own and (ended or answer["content"]):
            tools, options = common.parse_tools(row), common.read_options(row)
            whole, trained = self.chat.encode([*row["messages"], answer], tools, True, options)
            spots = np.flatnonzero(trained)
            end = spots[-1] + bool(ended)  # or without the end token, which was not sampled
            completion.prompt_ids, completion.token_ids = np.array(whole[: spots[0]]), np.array(whole[spots[0] : end])
        if len(completion.prompt_ids) + len(completion.token_ids) > self.args.max_length:
            raise ValueError(f"prompt and answer are longer than --max_length {self.args.max_length}")
        return completion

    def row(self, row, group, verdicts):
        """As Generator.row, but what was given stays: texts, who sampled them, verdicts where nobody judges here."""
        judged = self.scorer or any(verdicts)
        kept = {"completions": [answer["content"] for answer, *_ in given(row)], "model": None} | row
        for name in ("logprobs", "tokens", "token_ids", *(("rewards", "reasons", "answers") if judged else ())):
            kept.pop(name, None)
        return super().row(row, group, verdicts) | kept | {"scored_by": str(self.model)}


def given(row):
    """[(message, token ids or None, whether it ended), ...] of `completions`, or else the `reference`. ValueError."""
    if row.get("completions") is None:
        if row.get("reference") is None:
            raise ValueError("no `completions`, and no answer behind the prompt")
        answer = row["reference"]
        return [(answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}, None, True)]
    answers, count = row["completions"], len(row["completions"])
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise ValueError("`completions` is no list of texts")
    messages = [{"role": "assistant", "content": text} for text in answers]
    return list(zip(messages, row.get("token_ids") or [None] * count, row.get("ended") or [True] * count, strict=True))


class Inventor(Generator):
    """Samples what a user would say, behind the header of a user's turn: what prompts was the model trained on?"""

    def load(self, sources):
        """So many prompts that end with the header. RunError if the template writes none."""
        mark, count = "POSTCARD", self.args.from_header
        try:
            view = self.chat.template.view([{"role": "user", "content": mark}])
            text, _ = self.chat.template.render(view, add_generation_prompt=True)
        except ValueError as error:
            raise common.RunError(f"--from_header: {error}") from None
        header, _, tail = text.partition(mark)
        ids = self.chat.controls.encode([header])[0] if header else []
        if not tail.strip() or not 0 < len(ids) <= self.args.max_length - self.args.max_new_tokens:
            why = f"a header of {len(ids)} tokens before a user's turn, and {tail.strip()[:20]!r} behind it"
            raise common.RunError(f"--from_header: the chat template writes {why}: there has to be room, and an end")
        self.tail = tail.strip().splitlines()[0]  # what ends the turn
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
