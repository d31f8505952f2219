"""The environment of reinforcement learning: prompts in, judged groups of completions out. What Gym is to CleanRL.

    jobs = RowJobs(args.rewards, args.verifier, args.audit)                    who judges a row, for PromptEncoder
    rollouts = Rollouts(args, chat, rows, eval_rows, Sample, run.signals)      starts the verifiers, checks every row
    rollouts.make_sampler(config, device, policy)
    rollouts.sync(policy)                                                      copies the weights, after every update
    groups, sampled = rollouts.sample_batch(step)                              [[Sample, ...] of a prompt, ...], twice

Each rank samples and judges a share of the prompts, without waiting for the others; then every rank gets the groups of
all. What is learned from them (advantages, losses, updates) is the scripts' business. With --sample_tp T neighbouring
ranks, T of them, sample a share together, and each judges a part of it. Sampling has memory from `sync` to the end of
`sample_batch` or `evaluate`, and then none: training has it.

A completion is judged as soon as it ends, while others are still being sampled. One that could not be judged (its
reward is NaN) is counted and logged, and leaves its group: nothing is learned from it, and no mean contains it.

Prompts come from a *stream*: the rows of the data, shuffled anew in each epoch (`common.stream`). A *position* in it
names a prompt, and what is sampled for a position is a function of (seed, step, position, number of the sample), so
neither the number of ranks nor that of slots decides about it. A *group* is the completions of one position.

Shapes:  L tokens of a sample, of which the last N are its completion.
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import traceback
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from kernels.memory import count_model, free_bytes, training_bytes
from kernels.sampler import Sampler, SamplingParams, footprint
from rewards.audit import audit, code_job, reference, report
from rewards.jobs import GATE, failure_rates, read_weight, split_job
from rewards.pool import Pool
from rewards.verifiers import VERIFIERS, Verdict, load, registered_name

PATIENCE = timedelta(minutes=30)  # with a process that does not come to a meeting of all
ROUNDING = 1e-6  # rewards no further apart are equal: 0.1 + 0.2 and 0.3
MOST_PROMPTS = 4  # asked for in one round of sampling, as a multiple of --batch_size
REMEMBERED = 4  # groups of which the share with a signal is measured, likewise
LONG_AUDIT = 1000  # rows; then it is said that it takes time
MOST_EMPTY_STEPS = 20  # in a row, without one group to learn from; then the run stops
MOST_SLOTS = 256  # by default; with more a step's products take longer than reading the weights does
SLOTS_ON_CPU = 64  # by default
USABLE = 0.93  # of the free memory of a GPU; the rest is for NCCL, and what cannot be used because it lies in pieces


@dataclass
class JudgedCompletion:
    """A completion of N tokens behind its prompt, together L tokens, and the verdict on it."""

    position: int  # of its prompt in the stream; its group has the same
    row: int  # of its prompt in the data
    begun: int  # the step in which its first token was sampled: the oldest weights behind it are of then
    input_ids: np.ndarray  # (L,) prompt and completion
    trained: np.ndarray  # (L,) true in the completion
    behaviour_logprobs: np.ndarray  # (N,) of its tokens when they were sampled, temperature included
    ended: bool  # with an end token or a stop string; otherwise it was cut off
    text: str
    reward: float  # NaN if it could not be judged
    verdict: Verdict
    highest: float = 1.0  # reward that its verifiers can give

    @property
    def is_judged(self):
        """Whether there is a reward."""
        return not math.isnan(self.reward)

    def passes(self, threshold):
        """Whether it has earned that share of the highest reward."""
        return self.reward >= threshold * self.highest - ROUNDING

    def columns(self, *names):
        """For common.pack: input_ids, trained, and of each name its numbers, 0 in the prompt; all (L,).

        A name is an attribute that holds (N,) numbers, or one number for every token of the completion.
        """
        columns = [self.input_ids, self.trained]
        for name in names:
            column = np.zeros(len(self.trained))
            column[self.trained] = getattr(self, name)
            columns.append(column)
        return columns

    def to_log(self):
        """What a script adds to this sample's line in samples.jsonl: {key: value}."""
        return {}


CONVERSATION = {"messages", "prompt", "conversations", "dataset", "ground_truth", "weights"}  # the other columns: `row`


class RowJobs:
    """Who judges a row, and what they want of it: [verifier, ground truth, weight, context], for common.PromptEncoder.

    Every row is judged by the verifiers of `verifier`, if there are any. Otherwise its column `dataset` names them, and
    where there is no such column all that `sources` define judge it, with a ground truth or without.

    Args:
        sources: files (.py) and modules that define verifiers; they are imported here, and in the processes that judge.
        verifier: NAME, NAME:WEIGHT or NAME:gate of each. audit: code rows keep their reference solutions for it.

    Raises:
        RunError: a source cannot be imported or defines none, or there is no verifier of that name.
    """

    def __init__(self, sources=(), verifier=(), audit=False):
        self.defined = list(dict.fromkeys(flatten(_load(source) for source in sources)))
        self.chosen = [_name_and_weight(text) for text in verifier]
        self.audit = audit
        self.wants = {name.lower(): entry.wants for name, entry in VERIFIERS.items() if entry.wants}
        source = hashlib.sha256(inspect.getsource(RowJobs).encode()).hexdigest()
        self.key = json.dumps([self.defined, self.chosen, audit, self.wants, source])

    def __call__(self, row, messages):
        """Raises ValueError if nobody judges the row, or there is no ground truth for those that `dataset` names."""
        chosen = self.chosen
        if not chosen and row.get("dataset") is None:
            chosen = [(name, 1.0) for name in self.defined]
        if chosen:
            names, weights = map(list, zip(*chosen, strict=True))
            job = [names, [_single_ground_truth(row)] * len(names), weights]
        else:
            job = common.row_job(row)
            names = job[0]
        names = _names(names)
        wanted = set(flatten(self.wants.get(name, ()) for name in names))
        context = {}
        if "prompt" in wanted:
            context["prompt"] = messages
        if "row" in wanted:
            context["row"] = {name: value for name, value in row.items() if name not in CONVERSATION}
        if self.audit and code_job(*job):
            context["reference"] = reference(row)
        return [*job, json.loads(json.dumps(context, default=str))] if context else job


def _names(verifiers):
    """In small letters: rows may name verifiers in any case."""
    return [str(name).lower() for name in (verifiers if isinstance(verifiers, list) else [verifiers])]


def _single_ground_truth(row):
    """The ground truth for verifiers that the row does not name: itself, where the row has it in a list of one."""
    ground_truth = row.get("ground_truth")
    if isinstance(row.get("dataset"), list) and isinstance(ground_truth, list) and len(ground_truth) == 1:
        return ground_truth[0]
    return ground_truth


def _load(source):
    """The names of the verifiers in a file or module, which is imported. RunError if there are none."""
    old = dict(VERIFIERS)
    if source.endswith(".py") and not Path(source).is_file():
        raise common.RunError(f"--rewards {source}: there is no such file")
    try:
        names = load(source)
    except (Exception, SystemExit) as error:
        path = str(Path(source).resolve())
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = f", line {frames[-1].lineno}" if frames else ""
        what = f"{type(error).__name__}: {common.first_line(error)}"
        raise common.RunError(f"--rewards {source}{line} cannot be imported: {what}") from None
    if not names:
        raise common.RunError(f"--rewards {source} defines no verifier: a function with the decorator @verifier(NAME)")
    if _rank() == 0:
        shown = [f"{name} (in place of another)" if name in old else name for name in names]
        tqdm.write(f"--rewards {source}: {', '.join(shown)}")
    return names


def _name_and_weight(text):
    """(verifier, weight) of "NAME" or "NAME:WEIGHT". RunError if there is no such verifier."""
    name, _, weight = text.rpartition(":")
    weight = read_weight(weight)
    if not name or weight is None:  # a name with a colon, or without
        name, weight = text, 1.0
    if registered_name(name) is None:
        raise common.RunError(f"--verifier {text}: no verifier has this name; there are {', '.join(VERIFIERS)}")
    return registered_name(name), weight


class StopStrings:
    """Finds the token with which a completion's text first has one of `strings`; for SamplingParams.find_end.

    Looks at the text of the last tokens up to each: enough to hold every string, even if each token is one byte of it.
    So the end depends on the tokens alone, and a token of a long completion costs no more than one of a short one.
    """

    def __init__(self, tokenizer, strings):
        self.tokenizer = tokenizer
        self.strings = strings
        self.most_tokens = 1 + max(len(string.encode()) for string in strings)  # 1: the first may lose its space

    def __call__(self, token_ids, seen):
        """How many tokens of `token_ids` end the completion, or None; it has been called with `seen` of them before."""
        for length in range(seen + 1, len(token_ids) + 1):
            if self._has_string(token_ids[max(0, length - self.most_tokens) : length]):
                return length
        return None

    def _has_string(self, token_ids):
        """Whether the text of these tokens has one, or that of the last where the first are parts of a character."""
        for start in range(len(token_ids)):
            text = self.tokenizer.decode(token_ids[start:], clean_up_tokenization_spaces=False)
            if any(string in text for string in self.strings):
                return True
            if "\ufffd" not in text:
                return False
        return False


class Rollouts:
    """Completions of the prompts in `rows`, judged.

    Args:
        args: has batch_size, group_size, max_new_tokens, temperature, stop_strings, solved, inflight, max_staleness,
            slots, sample_tp, max_length, seed, out, verifier_workers, sandbox, audit, max_logprob_gap, log_samples,
            eval_samples, eval_temperature, pass_threshold, tokens_per_microbatch, activation_checkpointing, compile.
        chat: the common.ChatFormat. rows: common.Rows of a common.PromptEncoder. eval_rows: likewise, or None.
        sample_class: JudgedCompletion, or a dataclass made from it. signals: a list; once there is something in it,
            sampling ends early.

    With --audit, code rows whose tests are worth no reward are taken out of `rows` and `eval_rows`.

    Raises:
        RunError: on every rank, if a verifier does not exist or cannot use the ground truth of a row, or if fewer rows
            than a batch pass the audit.
    """

    def __init__(self, args, chat, rows, eval_rows=None, sample_class=JudgedCompletion, signals=()):
        self.args = args
        self.chat = chat
        self.rows = rows
        self.sample_class = sample_class
        self.signals = signals
        self.cursor = 0  # the next position in the stream
        self.solved = set()  # rows that are not drawn again
        self.surplus = []  # groups to learn from that did not fit into the batch: they begin the next
        self.recent = [0.0, 0.0]  # of the last groups, how many there were and how many had a signal; see _remember
        self.empty_steps = 0  # steps in a row that have found nothing to learn from
        self.rounds = 0  # of sampling, in the last step
        self.find_end = StopStrings(chat.tokenizer, args.stop_strings) if args.stop_strings else None
        self.tp = args.sample_tp  # ranks that sample a share of the prompts together
        self.copies = _world() // self.tp  # shares
        self.gloo = dist.new_group(backend="gloo") if dist.is_initialized() else None  # for _gather
        self.pool = Pool(args.verifier_workers, args.sandbox)
        self.tickets = {}  # of completions that have ended: _number → pool's ticket, text, first verifier, weights
        self.asks = False  # whether any row is judged by a model
        self.judge_tokens = 0  # of this rank's judges, when they were last counted
        self._check(rows)
        if eval_rows:
            self._check(eval_rows)
        if args.audit:
            self._audit(rows, args.batch_size)
        if args.audit and eval_rows:
            self._audit(eval_rows, 1)

    def make_sampler(self, config, device, *trained):
        """Makes the sampler, without memory: `sync` gives it some. RunError if it cannot be, or something has no room.

        Args:
            config: of the policy. trained: the models in training, the policy first; they have no gradients yet.
        """
        args = self.args
        group = dist.new_subgroups(self.tp)[0] if self.tp > 1 else None
        slots = args.slots or SLOTS_ON_CPU
        try:
            if device.type == "cuda":
                free = min(self._gather([free_bytes(device)]))  # the same on all ranks, so that all raise or none
                own = max(self._gather([_own_parameters(trained)]))
                self._check_training(free, own, trained)
                slots = self._choose_slots(config, free - 8 * own)  # AdamW's moments are there from the first update on
            self.sampler = Sampler(config, slots, args.max_length, self.chat.stop_ids, device, group)
        except ValueError as error:
            raise common.RunError(str(error)) from None
        # Ids without a token, where a vocabulary is padded: they decode to nothing, so no verifier would see them.
        self.sampler.forbid(set(range(config.vocab_size)) - set(self.chat.tokenizer.get_vocab().values()))

    def _check_training(self, free, own, trained):
        """Raises RunError if the first backward needs more than the free bytes; the sampler has no memory then.

        Args:
            own: parameters of all `trained` models that a rank has.
        """
        args = self.args
        tokens = max(args.tokens_per_microbatch, args.max_length)  # of the longest row, which goes alone
        work = 0
        for module, head in zip(trained, ("logprobs", "token_scores"), strict=False):
            model = count_model(module.model.config, head, compiled=args.compile)
            shards = next(module.parameters()).device_mesh.size(-1)
            work = max(work, training_bytes(model, tokens, shards, args.activation_checkpointing).work)
        needed = 12 * own + work  # gradients and AdamW's two moments in float32
        if needed > free:
            parts = f"{_gib(12 * own)} for gradients and AdamW, {_gib(work)} for a microbatch of {tokens} tokens"
            raise common.RunError(
                f"training needs {_gib(needed)} more on each GPU ({parts}), {_gib(free)} are free: lower "
                "--tokens_per_microbatch and --max_length, give --activation_checkpointing, or take more GPUs"
            )

    def _choose_slots(self, config, free):
        """How many sequences are sampled at a time: --slots, or as many as there are and fit. RunError if none does."""
        args = self.args
        weights, slot = footprint(config, args.max_length, torch.bfloat16, self.tp)
        fitting, slots = slots_for(args, self.copies, USABLE * free - weights, slot)
        parts = f"{_gib(weights)} for weights and {_gib(slot)} for each sequence of {args.max_length} tokens"
        said = f"sampling needs {parts}, {_gib(free)} are free on each GPU beside what training keeps"
        if not 1 <= slots <= fitting:
            raise common.RunError(
                f"{said}, so that {fitting} sequences fit: lower --slots or --max_length, raise --sample_tp "
                f"(it is {self.tp}), or take more GPUs"
            )
        if _rank() == 0:
            tqdm.write(f"{said}: {slots} sequences at a time, {fitting} would fit")
        return slots

    def sync(self, policy):
        """Copies the policy's weights to the sampler. All ranks call it together."""
        self.sampler.sync(policy)

    def sample_batch(self, step, has_signal=None, most_rounds=0):
        """Groups to learn from in a step, at most --batch_size. All ranks call it together, and get the same.

        Args:
            has_signal: group → whether there is something to learn from it; by default, whether it has any reward.
            most_rounds: sample until a batch of groups has a signal, in at most so many rounds (active sampling). A
                round asks for as many prompts as should suffice, by the share of the last groups that had one. What is
                then too much begins the next batch. 0: one round, and every group is kept, with a signal or without.

        Returns:
            (groups, sampled): those to learn from, without the completions that could not be judged, and all that were
            sampled in this step. A group is left out if none of it was judged. After a signal to stop, and when all
            prompts are solved, there may be fewer.

        Raises:
            RunError: not one completion was judged; or no group to learn from, in the 20th step in a row.
        """
        has_signal = has_signal or _has_reward
        size = self.args.batch_size
        groups = self.surplus
        sampled = []
        self.rounds = 0
        while len(groups) < size and self.rounds < max(1, most_rounds) and not self._is_stopping():
            missing = size - len(groups)
            found = self.sample(step, self._how_many(missing) if most_rounds > 1 else missing)
            judged = judged_only(found)
            with_signal = [group for group in judged if has_signal(group)]
            self._remember(len(judged), len(with_signal))
            sampled += found
            groups = groups + (with_signal if most_rounds else judged)
            self.rounds += 1
            if found and not judged and not self._is_stopping():
                _fail_if_none_is_judged(found, f"step {step + 1}")
        self.sampler.release()
        self.surplus = groups[size:]
        groups = groups[:size]
        if not self._is_stopping():
            self._say_what_is_missing(step, groups, sampled, any(map(has_signal, groups)))
        return groups, sampled

    def sample(self, step, missing):
        """Groups for `missing` prompts of the stream, in its order. All ranks call it together.

        With --inflight F, there are F prompts more on their way than are missing, and a rank returns once its share of
        `missing` is answered, whichever prompts these are. What is unfinished then goes on in the next call, under the
        weights of then; but a prompt that was begun --max_staleness steps ago is waited for. After a signal to stop
        there may be fewer.

        With --solved, a prompt of which a group has earned that share of the most that it could is not drawn again.
        When all are solved, nothing is.
        """
        args = self.args
        in_flight = sum(self._gather([len(self.sampler.groups)])) // self.tp  # over all ranks; they are on T of them
        new = max(0, missing + args.inflight - in_flight)
        positions = self._draw(new)
        enough = None  # all
        if args.inflight:
            enough = len(self._my_prompts(range(missing)))
        mine = self._my_prompts(positions)
        params = SamplingParams(
            n=args.group_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            find_end=self.find_end,
            on_end=lambda completion: self._submit(self.rows, completion, self._row(completion.index)),
            max_staleness=args.max_staleness,
        )
        completions = self.sampler.sample(
            self._prompts(self.rows, [self._row(position) for position in mine]),
            params,
            step=step,
            indices=mine,
            enough=enough,
            stop=self._look,
        )
        groups = self._judge(self.rows, completions, [self._row(c.index) for c in completions])
        self.solved.update(group[0].row for group in judged_only(groups) if self._is_solved(group))
        return groups

    def are_all_solved(self):
        """Whether no prompt is left to draw, by --solved, and no group to learn from. Rank 0 says so."""
        if len(self.solved) < len(self.rows) or self.surplus:
            return False
        if _rank() == 0:
            tqdm.write(f"all {len(self.rows)} prompts are solved, by --solved {self.args.solved}: the run ends here")
        return True

    def sample_all(self, rows):
        """Groups of --eval_samples for every one of other `rows`. What is in flight waits meanwhile."""
        args = self.args
        waiting = self.sampler.state_dict()
        self.sampler.load_state_dict({"completions": []})
        mine = self._my_prompts(range(len(rows)))
        params = SamplingParams(
            n=args.eval_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.eval_temperature,
            seed=args.seed,
            find_end=self.find_end,
            on_end=lambda completion: self._submit(rows, completion, completion.index),
        )
        step = -1  # its noise is no training step's
        completions = self.sampler.sample(
            self._prompts(rows, mine),
            params,
            step=step,
            indices=mine,
            stop=self.pool.work,  # which returns None
        )
        self.sampler.load_state_dict(waiting)
        return self._judge(rows, completions, [c.index for c in completions])

    def evaluate(self, policy, rows, done):
        """Metrics of held-out `rows`, under the policy's weights after so many steps; prints some completions."""
        self.sync(policy)
        groups = self.sample_all(rows)
        self.sampler.release()
        for line in self.write(done, groups, rows)[:3]:
            reward = "  none" if line["reward"] is None else f"{line['reward']:6.2f}"
            tqdm.write(f"{reward} {line['reason']:9}{line['prompt'][-60:]!r} {line['completion'][:120]!r}")
        metrics = held_out_metrics(groups, self.args.pass_threshold) | rewards_by_source(groups, rows)
        if _rank() == 0:
            low, high = metrics["eval_reward_low"], metrics["eval_reward_high"]
            tqdm.write(f"step {done}: held-out reward {metrics['eval_reward']:.3f} [{low:.3f}, {high:.3f}]")
        return metrics

    def write(self, done, groups, held_out_rows=None):
        """On rank 0, appends the first --log_samples completions to samples.jsonl. Returns these lines, as dicts."""
        if _rank() != 0:
            return []
        rows = held_out_rows or self.rows
        lines = []
        for sample in flatten(groups)[: self.args.log_samples]:
            prompt_ids = sample.input_ids[: sample.trained.argmax()]
            line = {
                "step": done,
                "row": rows.where(sample.row),
                "prompt": self.chat.tokenizer.decode(prompt_ids, skip_special_tokens=True),
                "completion": sample.text,
                "reward": sample.reward if sample.is_judged else None,
                "reason": sample.verdict.reason,
                "answer": sample.verdict.answer,
                "ended": sample.ended,
                "held_out": held_out_rows is not None,
                **sample.to_log(),
            }
            lines.append(line)
        common.append_samples(self.args.out, lines)
        return lines

    def check_gap(self, samples, step):
        """Whether sampler and trainer agree: compares `behaviour_logprobs` with `old_logprobs`, of the same weights.

        Raises RunError if they differ by more than --max_logprob_gap on average over tokens. (Their largest difference
        grows with the number of tokens, by rounding alone.) Samples begun before `step` do not count: other weights
        sampled them.
        """
        gaps = [np.abs(s.old_logprobs - s.behaviour_logprobs) for s in samples if s.begun == step]
        if not gaps:
            return
        gaps = np.concatenate(gaps)
        gap = gaps.mean()
        bound = self.args.max_logprob_gap
        if bound is None:
            bound = 0.05 if self.sampler.device.type == "cuda" else 1e-4  # it computes in bf16 there
        said = f"sampled and recomputed log-probabilities differ by {gap:.2e} on average, {gaps.max():.2e} at most"
        if _rank() == 0:
            tqdm.write(said)
        if not gap <= bound:
            raise common.RunError(f"{said}: the average is more than --max_logprob_gap {bound}")

    def counts(self):
        """Metrics of the last step's sampling, beside those of the groups. All ranks call it together."""
        counts = {
            "solved_prompts": len(self.solved),
            "surplus_groups": len(self.surplus),
            "sampling_rounds": self.rounds,
        }
        if self.asks:  # read and written by judges since the last step, evaluation included
            before = self.judge_tokens
            self.judge_tokens = self.pool.judges.tokens if self.pool.judges else 0
            counts["judge_tokens"] = sum(self._gather([self.judge_tokens - before]))
        return counts

    def state_dict(self):
        """What this rank needs to go on, as plain tensors, numbers and text."""
        surplus = self.surplus if _rank() == 0 else []  # the same on all ranks
        return {
            "cursor": self.cursor,
            "solved": sorted(self.solved),
            "recent": list(self.recent),
            "empty_steps": self.empty_steps,
            "surplus": [[_plain(sample) for sample in group] for group in surplus],
            "sampler": self.sampler.state_dict(),  # the same on ranks that share a copy
            "sample_tp": self.tp,
        }

    def load_state_dicts(self, states):
        """Goes on from the `state_dict` of every rank of then; of no ranks, from the beginning.

        On as many ranks as then, with the same --sample_tp, each gets its own back. Otherwise the groups in flight are
        dealt anew.
        """
        if not states:
            return
        self.cursor = states[0]["cursor"]  # the same on all ranks, as are the next three
        self.solved = set(states[0]["solved"])
        self.recent = list(states[0]["recent"])
        self.empty_steps = states[0]["empty_steps"]
        surplus = flatten(state["surplus"] for state in states)
        self.surplus = [[_from_plain(self.sample_class, fields) for fields in group] for group in surplus]
        completions = [state["sampler"]["completions"] for state in states]  # of each rank
        tp = states[0].get("sample_tp", 1)
        if (len(states), tp) == (_world(), self.tp):
            mine = completions[_rank()]
        else:
            groups = _grouped(flatten(completions[::tp]), lambda c: (c["step"], c["index"]))
            mine = flatten(self._my_prompts(groups))
        self.sampler.load_state_dict({"completions": mine})

    def close(self):
        """Ends the processes that judge."""
        self.pool.close()

    def _judge(self, rows, completions, row_numbers):
        """The groups of all ranks, by position, from this rank's completions and the rows of their prompts."""
        both = [(c, row) for c, row in zip(completions, row_numbers, strict=True) if self._is_mine(c)]
        completions, row_numbers = zip(*both, strict=True) if both else ((), ())
        submitted = []
        for completion, row in zip(completions, row_numbers, strict=True):
            if _number(completion) not in self.tickets:  # it has ended before the run was stopped
                self._submit(rows, completion, row)
            submitted.append(self.tickets.pop(_number(completion)))
        verdicts = self.pool.collect([ticket for ticket, *_ in submitted])
        samples = []
        for completion, row, kept, verdict in zip(completions, row_numbers, submitted, verdicts, strict=True):
            _, text, verifier, weights = kept
            if not verdict.parts and weights[0] != 0:
                verdict = verdict._replace(parts=((verifier, verdict.reward / weights[0]),))
            input_ids = np.concatenate([completion.prompt_ids, completion.token_ids])
            sample = self.sample_class(
                position=completion.index,
                row=row,
                begun=completion.begun,
                input_ids=input_ids,
                trained=np.arange(len(input_ids)) >= len(completion.prompt_ids),
                behaviour_logprobs=completion.logprobs,
                ended=completion.ended,
                text=text,
                reward=verdict.reward,
                verdict=verdict,
                highest=highest_reward(weights),
            )
            samples.append((completion.sample, sample))
        samples = sorted(self._gather(samples), key=lambda numbered: numbered[0])
        return _grouped([sample for _, sample in samples], lambda sample: sample.position)

    def _submit(self, rows, completion, row):
        """Hands a completion that has ended to those who judge. `_judge` collects the verdict."""
        if not self._is_mine(completion):
            return
        text, judged = texts(completion, self.chat.tokenizer, self.sampler)
        # One row, 0.06 ms. A column (0.4 ms) and `select` (1.9 ms) copy all that the table knows of itself first.
        verifier, ground_truth, weights, context = _job(rows.table[int(row)]["job"])
        job = verifier, judged, ground_truth, weights, context
        parts, weights = split_job(*job)
        self.tickets[_number(completion)] = self.pool.submit(job), text, parts[0][0], weights

    def _look(self):
        """Called between steps of sampling: those who judge get on. Returns whether to stop."""
        self.pool.work()
        return bool(self.signals)

    def _is_stopping(self):
        """Whether any rank was sent a signal. All ranks ask together."""
        return sum(self._gather([len(self.signals)])) > 0

    def _how_many(self, missing):
        """Prompts to ask for so that, five times in six, as many groups as are missing have a signal.

        If a share p of all groups has one, the number it takes until the n-th has the mean n / p and the standard
        deviation √(n (1 - p)) / p. At the start of a run p is 1: the first round asks for a batch.
        """
        seen, with_signal = self.recent
        p = (with_signal + 1) / (seen + 1)  # never 0
        wanted = (missing + math.sqrt(missing * (1 - p))) / p
        return min(math.ceil(wanted), MOST_PROMPTS * self.args.batch_size)

    def _remember(self, found, with_signal):
        """Counts these groups; what was counted fades, so that it weighs no more than REMEMBERED batches."""
        limit = REMEMBERED * self.args.batch_size
        seen = self.recent[0] + found
        keep = min(1.0, limit / max(seen, 1))
        self.recent = [keep * seen, keep * (self.recent[1] + with_signal)]

    def _say_what_is_missing(self, step, groups, sampled, is_useful):
        """Rank 0 says it if a step has nothing to learn from, once, or a small batch; RunError if this does not end."""
        size = self.args.batch_size
        if not groups and not sampled:
            return  # all are solved
        if 0 < len(groups) < size and _rank() == 0:
            rounds = f"after {self.rounds} round{'s' * (self.rounds > 1)} of sampling"
            share = f"{len(groups)} of {size} groups to learn from {rounds}"
            tqdm.write(f"step {step + 1}: {share}; its learning rate is {len(groups) / size:.3g} of what it would be")
        if is_useful:
            self.empty_steps = 0
            return
        self.empty_steps += 1
        mean = np.mean([sample.reward for sample in flatten(judged_only(sampled))])
        message = (
            f"step {step + 1}: nothing to learn from: in each of {len(sampled)} groups all rewards are the same "
            f"({mean:.3g} in the mean). Read {self.args.out}/samples.jsonl: are verifier, prompts and chat template "
            "the right ones? Then the prompts are too hard for this model, or too easy"
        )
        if not groups and self.empty_steps == MOST_EMPTY_STEPS:
            raise common.RunError(f"{message}; so were the {MOST_EMPTY_STEPS - 1} steps before")
        if self.empty_steps == 1 and _rank() == 0:
            tqdm.write(message)

    def _check(self, rows):
        """Raises RunError, on every rank, if a verifier does not exist or cannot use the ground truth of a row."""
        mine = self._my_share(range(len(rows)))
        jobs = []
        for verifier, ground_truth, weights, _ in _jobs(rows, mine):
            jobs.append((verifier, None, ground_truth, weights))
        problems = [(mine[i], message) for i, message in self.pool.check(jobs).items()]
        problems = sorted(self._gather(problems))
        if problems:
            row, message = problems[0]
            raise common.RunError(f"{rows.where(row)}: {message}")
        self.asks = any(self._gather([self.asks or self.pool.judges is not None]))

    def _audit(self, rows, at_least):
        """Leaves out the rows that fail the audit, the same on every rank, and the same when the run goes on."""
        mine = []
        jobs = []
        share = self._my_share(range(len(rows)))
        for row, row_job in zip(share, _jobs(rows, share), strict=True):
            if job := code_job(*row_job):
                mine.append(row)
                jobs.append(job)
        total = sum(self._gather([len(jobs)]))
        if not total:
            return
        path = Path(self.args.out, "audit.json")  # {fingerprint: {row: reason}}: kept, since time limits play a part
        known = self._gather([json.loads(path.read_text()) if path.exists() else {}])[0]
        if rows.fingerprint in known:
            problems = [(int(row), reason) for row, reason in known[rows.fingerprint].items()]
        else:
            if _rank() == 0 and total >= LONG_AUDIT:
                tqdm.write(f"audit of {total} code rows: {total / 10:.0f} s of processor time, about; see --no_audit")
            problems = [(mine[i], reason) for i, reason in audit(self.pool, jobs).items()]
            problems = sorted(self._gather(problems))
        problems = dict(problems)
        if _rank() == 0:
            try:
                common.replace_text(path, json.dumps(known | {rows.fingerprint: problems}))
            except OSError as error:
                raise common.RunError(f"writing {path} failed: {error}") from None
            numbers = {row: rows.where(row).rpartition("row ")[2] for row in problems}
            if len(rows.sources) > 1:
                numbers = {row: f"{number} of {rows.where(row).rpartition(',')[0]}" for row, number in numbers.items()}
            tqdm.write(report(problems, numbers, total))
        left = [row for row in range(len(rows)) if row not in problems]
        if len(left) < at_least:
            raise common.RunError(f"only {len(left)} of {len(rows)} rows pass the audit; --no_audit takes them all")
        if problems:
            rows.keep(left)

    def _prompts(self, rows, row_numbers):
        """Their token ids."""
        if not row_numbers:
            return []
        return [input_ids for input_ids, _ in rows.sequences(row_numbers)]

    def _draw(self, count):
        """The next so many positions of the stream whose prompts are not solved; none if all are."""
        positions = []
        while len(positions) < count and len(self.solved) < len(self.rows):
            if self._row(self.cursor) not in self.solved:
                positions.append(self.cursor)
            self.cursor += 1
        return positions

    def _is_solved(self, group):
        """Whether the completions of a prompt have earned, in the mean, the share --solved of the most they could."""
        if self.args.solved is None:
            return False
        return np.mean([sample.reward for sample in group]) >= self.args.solved * group[0].highest

    def _row(self, position):
        """The row at a position of the stream."""
        return int(common.stream(len(self.rows), self.args.seed, [position])[0])

    def _my_share(self, items):
        """Every world-th, beginning with this rank's."""
        return list(items)[_rank() :: _world()]

    def _my_prompts(self, items):
        """The same for all ranks that sample together."""
        return list(items)[_rank() // self.tp :: self.copies]

    def _is_mine(self, completion):
        """Whether this rank judges it, of those that have sampled it."""
        return (completion.index // self.copies + completion.sample) % self.tp == _rank() % self.tp

    def _gather(self, items):
        """The lists of all ranks, one behind the other. All ranks call it together."""
        if not dist.is_initialized():
            return items
        try:
            dist.monitored_barrier(self.gloo, PATIENCE, wait_all_ranks=True)  # tells who is missing
        except RuntimeError as error:
            raise common.RunError(f"a process hangs, maybe in a verifier: {common.first_line(error)}") from None
        lists = [None] * _world()
        dist.all_gather_object(lists, items)
        return flatten(lists)


def texts(completion, tokenizer, sampler):
    """(text of a Completion without its end token, the text that is judged: of an opened thought from its <think> on).

    sampler: has eos_ids, the ids of end tokens.
    """
    answer = completion.token_ids
    if completion.ended and len(answer) and answer[-1] in sampler.eos_ids:
        answer = answer[:-1]  # without the end token
    text = tokenizer.decode(answer, skip_special_tokens=True)
    # Where the template opens a thought, the verifier has to know that the completion begins inside of it.
    is_thinking = tokenizer.decode(completion.prompt_ids[-4:]).rstrip().endswith("<think>")
    return text, "<think>" + text if is_thinking else text


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _world():
    return dist.get_world_size() if dist.is_initialized() else 1


def slots_for(args, copies, room, slot):
    """(how many slots of so many bytes fit, how many there are): --slots, or what a copy's share of a batch needs."""
    fitting = max(0, int(room // slot))
    there_are = math.ceil((args.batch_size + args.inflight) / copies) * args.group_size
    return fitting, args.slots or min(fitting, there_are, MOST_SLOTS)


def _own_parameters(modules):
    """How many parameters that are trained, of sharded modules, this rank has."""
    every = [parameter for module in modules for parameter in module.parameters()]
    return sum(parameter.to_local().numel() for parameter in every if parameter.requires_grad)


def _gib(number):
    """Bytes as text."""
    return f"{number / 2**30:.2f} GiB"


def _jobs(rows, row_numbers):
    """The jobs of rows, as `_job` gives them."""
    return map(_job, rows.table["job"][list(row_numbers)])


def _job(text):
    """(verifiers, ground truths, weights or None, context or None) of the text that an encoder made; see jobs.py."""
    job = json.loads(text)
    return (*job, None) if len(job) == 3 else tuple(job)


def _number(completion):
    return completion.step, completion.index, completion.sample


def _grouped(items, key):
    """[[item, ...] of one key, ...], by key; those of one key in the order in which they came."""
    return [list(group) for _, group in itertools.groupby(sorted(items, key=key), key)]


def _plain(sample):
    """{field: value} of a JudgedCompletion, arrays as tensors and the verdict as a list: what torch.load may read."""
    fields = {}
    for field in dataclasses.fields(JudgedCompletion):
        value = getattr(sample, field.name)
        fields[field.name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    fields["verdict"] = list(sample.verdict)
    return fields


def _from_plain(sample_class, fields):
    """The sample of which `_plain` was made."""
    arrays = {name: value.numpy() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    return sample_class(**{**fields, **arrays, "verdict": Verdict(*fields["verdict"])})


def _has_reward(group):
    return any(sample.reward != 0 for sample in group)


def _fail_if_none_is_judged(groups, where):
    """Raises RunError if there are completions, and none of them was judged: nothing can be said of the policy."""
    samples = flatten(groups)
    if samples and not any(sample.is_judged for sample in samples):
        reasons = Counter(sample.verdict.reason for sample in samples)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        example = next((sample.verdict.answer for sample in samples if sample.verdict.answer), "")
        message = f"{where}: none of {len(samples)} completions could be judged ({counts}) {example}"
        raise common.RunError(message.strip())


def flatten(lists):
    """[item of a list, ...]."""
    return list(itertools.chain.from_iterable(lists))


def judged_only(groups):
    """The groups without the completions that could not be judged; without those of which none was."""
    groups = [[sample for sample in group if sample.is_judged] for group in groups]
    return [group for group in groups if group]


def highest_reward(weights):
    """The most that verifiers with these weights can give."""
    return sum(max(0.0, weight) for weight in weights if weight != GATE)


def differ(numbers):
    """Whether they are further apart than by rounding."""
    return max(numbers) - min(numbers) > ROUNDING


def rewards_differ(group):
    """Whether the verifiers' rewards of a group differ by more than rounding: by DAPO's equation (11), its signal."""
    return differ([sample.reward for sample in group])


def rollout_metrics(groups, sampled, step):
    """Metrics of the groups that are learned from in a step, and of all that were sampled in it.

    Means of rewards are over the completions that were judged; of lengths, ends and failures over all.
    """
    samples = flatten(sampled)
    lengths = [int(sample.trained.sum()) for sample in samples]
    metrics = {"groups": len(groups), "sampled_tokens": sum(lengths)}
    if groups:
        metrics["staleness"] = float(np.mean([step - sample.begun for sample in flatten(groups)]))
    if not sampled:  # the batch is what the steps before have left over
        return metrics
    judged = judged_only(sampled)
    means = {
        "reward": np.mean([sample.reward for sample in flatten(judged)]),
        "reward_std": np.mean([np.std([sample.reward for sample in group]) for group in judged]),
        "zero_std_groups": np.mean([not rewards_differ(group) for group in judged]),
        "completion_tokens": np.mean(lengths),
        "eos_rate": np.mean([sample.ended for sample in samples]),
        "unjudged_rate": np.mean([not sample.is_judged for sample in samples]),
        **failure_rates([sample.verdict for sample in samples]),
        **rewards_by_verifier(samples, "reward"),
    }
    metrics.update({name: float(value) for name, value in means.items()})
    return metrics


def rewards_by_verifier(samples, prefix):
    """{prefix/verifier: mean of its own rewards, without weight, over the completions that it has judged}."""
    rewards = {}
    for sample in samples:
        for name, reward in sample.verdict.parts:
            if not math.isnan(reward):
                rewards.setdefault(f"{prefix}/{name}", []).append(reward)
    return {name: np.mean(numbers) for name, numbers in sorted(rewards.items())}


def rewards_by_source(groups, rows):
    """{"eval_reward/SOURCE": the mean reward over its prompts} of held-out rows that have several sources.

    A source that is called as a verifier is has " (source)" behind its name.
    """
    means = {sample.row: np.mean([each.reward for each in group]) for group in judged_only(groups) for sample in group}
    sources = {name: [means[row] for row in members if row in means] for name, members in rows.by_source().items()}
    verifiers = {name for sample in flatten(groups) for name, _ in sample.verdict.parts}
    shown = {name: f"{name} (source)" if name in verifiers else name for name in sources}
    several = len(sources) > 1
    return {f"eval_reward/{shown[name]}": float(np.mean(each)) for name, each in sources.items() if each and several}


def held_out_metrics(groups, pass_threshold=1.0):
    """Mean reward, with its 95 % interval over prompts, pass@1 and pass@k, of one group for each held-out prompt.

    A completion passes with that share of the highest reward. One that could not be judged is in none of these.
    """
    _fail_if_none_is_judged(groups, "evaluation")
    k = max(len(group) for group in groups)
    groups = judged_only(groups)
    means = np.array([np.mean([sample.reward for sample in group]) for group in groups])
    half = math.inf  # of the interval
    if len(means) > 1:
        half = 1.96 * means.std(ddof=1) / math.sqrt(len(means))
    passes = [[sample.passes(pass_threshold) for sample in group] for group in groups]
    metrics = {
        "eval_reward": means.mean(),
        "eval_reward_low": means.mean() - half,
        "eval_reward_high": means.mean() + half,
        "eval_pass_at_1": np.mean([np.mean(group) for group in passes]),
        f"eval_pass_at_{k}": np.mean([np.max(group) for group in passes]),
        **rewards_by_verifier(flatten(groups), "eval_reward"),
    }
    return {name: float(value) for name, value in metrics.items()}
