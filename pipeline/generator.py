"""A model that answers the prompts of data sources, on any number of ranks: what generate, evaluate and kl share.

    generator = Generator(args, model)               args: the flags of Sampling, or of a class made from it
    rows = generator.load(["prompts.jsonl:1000"])    encoded as for grpo.py, ground truths checked
    part = generator.write_part(rows, "samples.jsonl")       samples, judges, writes: to be renamed

Prompts, end tokens, stop strings, verifiers and the sampler are those of grpo.py (rewards/environment.py,
kernels/sampler.py), so a pass rate here is one that training sees. What is sampled of row i is a function of (seed, i,
number of the sample): neither the number of ranks nor that of slots decides about it.
"""

import fcntl
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

import common
from kernels.sampler import SamplingParams
from pipeline.models import open_sampler
from pipeline.ranks import gather, judges, on_rank0, rank, say, world
from pipeline.shapes.encoder import SampleEncoder
from rewards.environment import RowJobs, StopStrings, texts

ROUNDS = 8  # sequences of a slot between two writes; more lose less time at their ends, and more when killed


@dataclass(kw_only=True)
class Sampling:
    n: Annotated[int, tyro.conf.arg(aliases=["-n", "--group_size"])] = 8
    """completions of each prompt; behind torchrun write -n, because it takes --n for a flag of its own"""
    temperature: float = 1.0  # of sampling; 0 takes the likeliest token
    top_p: float = 1.0  # draw among the likeliest tokens that have this probability together; 1: among all
    max_new_tokens: int = 2048  # longest completion; a prompt without room for it in --max_length is left out (counted)
    max_length: int = 4096  # longest sequence, in tokens
    stop_strings: list[str] = field(default_factory=list)  # a completion also ends once its text has one: "</answer>"
    chat_template: str | None = None  # tulu, chatml or a Jinja file; by default the tokenizer's own
    content_tokens: list[str] = field(default_factory=list)  # control tokens that stay tokens in assistant content
    rewards: list[str] = field(default_factory=list)  # files or modules of yours that define verifiers: my_rewards.py
    verifier: list[str] = field(default_factory=list)  # NAME[:WEIGHT] of all rows; by default `dataset` names it
    max_skip_frac: float = 0.01  # refuse to start when a larger share of a source's rows is unusable
    seed: int = 1  # of the sampling, and of the rows that an AMOUNT takes
    slots: int | None = None  # sequences sampled at a time by a rank; same samples. None: what fits, on a CPU 64
    sample_tp: int = 1  # ranks that share one copy of the weights, which may be too large for one GPU
    verifier_workers: int | None = None  # processes of each rank that judge; by default its share of the cores
    sandbox: Literal["full", "weak"] = "full"  # for model-written code; weak: without what this Linux lacks


RUNTIME = {"out", "slots", "sample_tp", "verifier_workers", "sandbox"}  # flags that do not change what is written


class Generator:
    """A model with its prompts' format, its sampler and those who judge. All ranks make it together.

    Args:
        args: flags, see Sampling. model: folder or Hub id. scorer: a RewardModel that judges in place of verifiers.
        sampler: of the same model with the same flags, if another Generator has one.

    Raises:
        RunError: the model cannot be opened, sampled from, or has no room.
    """

    reads_answers = False  # of the rows, instead of sampling them

    def __init__(self, args, model, scorer=None, sampler=None):
        self.args = args
        self.model = model
        self.scorer = scorer
        config = common.load_config(SimpleNamespace(model=model, max_length=args.max_length))
        self.chat = common.ChatFormat(common.load_tokenizer(model, args.chat_template), args.content_tokens)
        self.jobs = RowJobs(args.rewards, args.verifier)
        if args.temperature == 0 and args.n > 1:
            raise common.RunError(f"at temperature 0 the {args.n} completions of a prompt would be the same: --n 1")
        if "" in args.stop_strings:
            raise common.RunError("--stop_strings has an empty string")
        if args.max_new_tokens >= args.max_length:
            what = f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_length"
            raise common.RunError(f"{what} {args.max_length}: give a smaller --max_new_tokens")
        if world() % args.sample_tp:
            raise common.RunError(f"--sample_tp {args.sample_tp} does not divide the {world()} processes")
        self.copies = world() // args.sample_tp
        self.copy, place = divmod(rank(), args.sample_tp)
        self.is_first = place == 0  # of the ranks that share a copy: the one that judges
        self.pool = None  # until a row has somebody to judge it
        self.sampler = sampler or open_sampler(args, model, config, self.chat)

    def load(self, sources, prepare=None, judged=True):
        """common.Rows of sources (SOURCE[:AMOUNT]), with an account of them printed. DataError as common.load_rows.

        prepare: as for SampleEncoder. judged: whether verifiers are asked; RunError for a ground truth they cannot use.
        """
        args, vocab_size = self.args, self.sampler.config.vocab_size
        jobs = self.jobs if judged and self.scorer is None else None
        longest = args.max_length - args.max_new_tokens
        encode = SampleEncoder(self.chat, vocab_size, longest, jobs, prepare, self.reads_answers)
        rows = common.load_rows(sources, encode, args.seed, args.max_skip_frac)
        if judged or len(rows.report) > len(sources):  # what is only read again is known
            say(common.redact("\n".join(rows.report)))
        jobs = [json.loads(text) for text in rows.table["job"]]
        asked = [i for i, job in enumerate(jobs) if job is not None]
        if self.is_first and asked:
            self.pool = judges(args.verifier_workers, args.sandbox)
        on_rank0(lambda: self._check(rows, {i: jobs[i] for i in asked}))
        return rows

    def _check(self, rows, jobs):
        """Raises RunError if a verifier does not exist or cannot use its ground truth. jobs: {row: job}."""
        problems = self.pool.check([(job[0], None, *job[1:3]) for job in jobs.values()]) if jobs else {}
        for i in sorted(problems)[:1]:
            raise common.RunError(f"{rows.where(list(jobs)[i])}: {problems[i]}")

    def write_part(self, rows, path):
        """Writes the rows with their completions and verdicts to a hidden file beside `path`, and returns its Path.

        Its name is a hash of all that decides about it: killed, the same call goes on. All ranks call it together.
        """
        part = Path(path).with_name(f".{Path(path).name}.{self._call(rows)}.unfinished.jsonl")
        size = max(1, ROUNDS * self.sampler.slots // self.args.n) * self.copies  # rows between two writes
        done = on_rank0(lambda: self._open(part, size, len(rows)))
        bar = tqdm(total=len(rows), initial=done, desc=Path(path).name, unit="row", disable=rank() > 0, delay=10)
        for first in range(done, len(rows), size):
            numbers = range(first, min(first + size, len(rows)))
            lines = sorted(gather(self.answer(rows, numbers)))
            if rank() == 0:
                self.file.writelines(line.encode() + b"\n" for _, line in lines)
                self.file.flush()
                os.fsync(self.file.fileno())
            bar.update(len(numbers))
        bar.close()
        if rank() == 0:
            self.file.close()
        return part

    def _call(self, rows):
        """A name for all that decides about the rows that are written."""
        settings = {name: value for name, value in asdict(self.args).items() if name not in RUNTIME}
        models = [self.model, *([self.scorer.folder] if self.scorer else [])]
        files = [file for model in models for file in common.weight_files(model)]
        files += [file for file in self.args.rewards if os.path.isfile(file)]
        versions = [(os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        call = [settings, str(self.model), versions, self.chat.key, rows.fingerprint, str(self.scorer)]
        return hashlib.sha256(json.dumps(call, default=str).encode()).hexdigest()[:8]

    def _open(self, part, size, total):
        """Opens an unfinished file, and returns how many of its rows stay; the first process that does so owns it.

        Whole writes stay, so that the rest is computed as without a kill. RunError if another process writes it.
        """
        part.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(part, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise common.RunError(f"another process is writing {part}") from None
        self.file.seek(0)
        lines = self.file.readlines()
        whole = sum(line.endswith(b"\n") for line in lines)
        whole = whole if whole == total else whole // size * size
        self.file.truncate(sum(map(len, lines[:whole])))
        return whole

    def answer(self, rows, numbers):
        """[(number, JSON line), ...] of this rank's share of the rows with these numbers: sampled and judged."""
        mine = numbers[self.copy :: self.copies]
        if not mine:
            return []
        jobs = {i: json.loads(text) for i, text in zip(mine, rows.table.select(mine)["job"], strict=True)}
        tickets = {}  # of completions that verifiers judge

        def submit(completion):
            job = jobs[completion.index]
            if job is not None and self.scorer is None and self.is_first:
                _, judged = texts(completion, self.chat.tokenizer, self.sampler)
                tickets[completion.index, completion.sample] = self.pool.submit((job[0], judged, *job[1:]))

        groups = self.complete(rows, mine, submit)
        if not self.is_first:
            return []
        verdicts = dict(zip(tickets, self.pool.collect(list(tickets.values())), strict=True)) if tickets else {}
        lines = []
        for i, line, group in zip(mine, rows.table.select(mine)["line"], groups, strict=True):
            judged = [verdicts.get((c.index, c.sample)) for c in group]
            lines.append((i, json.dumps(self.row(json.loads(line), group, judged))))
        return lines

    def complete(self, rows, mine, on_end):
        """[[Completion, ...] of each row of `mine`]; on_end is called with each as soon as it ends."""
        try:
            completions = self.sampler.sample(
                [ids for ids, _ in rows.sequences(mine)],
                self.params(on_end=on_end),
                indices=mine,
                stop=lambda: self.pool and self.pool.work(),  # those who judge get on; it returns None
            )
        except ValueError as error:
            raise common.RunError(f"model {self.model}: {error}") from None
        return [completions[k : k + self.args.n] for k in range(0, len(completions), self.args.n)]

    def params(self, **more):
        """The SamplingParams of the flags."""
        ends = StopStrings(self.chat.tokenizer, self.args.stop_strings) if self.args.stop_strings else None
        names = ("n", "max_new_tokens", "temperature", "top_p", "seed")
        return SamplingParams(**{name: getattr(self.args, name) for name in names}, find_end=ends, **more)

    def row(self, row, group, verdicts):
        """The row with its completions, and what was found of each."""
        args = self.args
        answers = [texts(c, self.chat.tokenizer, self.sampler)[0] for c in group]
        rewards = [None if v is None or math.isnan(v.reward) else v.reward for v in verdicts]
        reasons = ["none" if v is None else v.reason for v in verdicts]
        logprobs = [[round(float(logprob), 6) for logprob in c.logprobs] for c in group]
        if self.scorer:
            rewards, reasons = self.scorer.scores(row, answers)
        return row | {
            "completions": answers,
            "rewards": rewards,
            "reasons": reasons,
            "answers": ["" if v is None else v.answer for v in verdicts],
            "ended": [c.ended for c in group],
            "tokens": [len(c.token_ids) for c in group],
            "token_ids": [c.token_ids.tolist() for c in group],
            "logprobs": logprobs if vars(args).get("per_token") else [round(math.fsum(each), 6) for each in logprobs],
            "model": str(self.model),
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": args.seed,
        }

    def close(self):
        """Gives the model's memory back."""
        self.sampler.release()
