"""A calculator in several turns: the model writes a sum and "=", a tool writes the result, and the model goes on.

    37+58=   →   7+8=|15|,3+5+1=|9|#95                      between bars: what the tool has written

Sampling pauses behind every "=". If a sum of whole numbers stands before it ("3+5+1=", "12-7="), the tool adds the
tokens of the result to the completion. Verifiers read them, and they count in --max_new_tokens. But the policy has not
chosen them: no token of the tool has an advantage, and the sums of (4) leave it out. A completion that has paused is an
unfinished one for the sampler, which reads it again, with the result, and goes on.

    python forks/make.py calculator > my_grpo.py
"""

import dataclasses
import functools
import re

import numpy as np

from kernels.sampler import Sampler
from rewards import environment

BASE = "grpo.py"

LINES = {  # what annotate says of a completion stands one position before each token that is trained
    "length = samples[i].trained.sum()  # N": "begin = end - len(samples[i].input_ids)",
    "numbers[end - 1 - length : end - 1]": "numbers[begin - 1 + samples[i].trained.nonzero()[0]]",
}

SUM = re.compile(r"(?<![\d.*/+-])\d{1,15}([+-]\d{1,15})*=$")  # at the end of a text, and not a part of something longer
BY_TOOL = 1.0  # in the place of a log-probability, which is never above 0


class Rollouts(environment.Rollouts):
    """Judged completions in which a calculator has written some of the tokens."""

    def make_sampler(self, *models):
        super().make_sampler(*models)
        self.find_end = environment.StopStrings(self.chat.tokenizer, ["=", *self.args.stop_strings])
        self.sampler.sample = functools.partial(sample_in_turns, self)

    def _judge(self, *completions):
        groups = super()._judge(*completions)
        for sample in environment.flatten(groups):
            own = sample.behaviour_logprobs != BY_TOOL
            sample.trained[sample.trained] = own
            sample.behaviour_logprobs = sample.behaviour_logprobs[own]  # (N,) of N tokens that the policy has chosen
        return groups


def sample_in_turns(rollouts, prompts, params, indices, **options):
    """As Sampler.sample, but what has paused goes on."""

    def on_end(completion):
        if not use_calculator(rollouts, completion, params.max_new_tokens):
            params.on_end(completion)

    sampler = rollouts.sampler
    params_with_pauses = dataclasses.replace(params, on_end=on_end)
    completions = Sampler.sample(sampler, prompts, params_with_pauses, indices=indices, **options)
    while not all(completion.done for completion in completions):
        for completion in completions:  # finished ones too, so that groups stay whole
            sampler.groups.setdefault((completion.step, completion.index), []).append(completion)
        completions = Sampler.sample(sampler, [], params_with_pauses, indices=[], **options)
    return completions


def use_calculator(rollouts, completion, max_new_tokens):
    """Adds the result if a completion has paused behind a sum. Returns whether it goes on."""
    tokenizer = rollouts.chat.tokenizer
    text = tokenizer.decode(completion.token_ids)
    has_stopped = any(string in text for string in rollouts.args.stop_strings)
    if not completion.ended or has_stopped or completion.token_ids[-1] in rollouts.sampler.eos_ids:
        return False
    call = SUM.search(text)
    result = str(sum(map(int, re.findall(r"-?\d+", call[0])))) if call else ""
    written = tokenizer.encode(result, add_special_tokens=False)
    completion.ended = False
    completion.done = len(completion.token_ids) + len(written) >= max_new_tokens  # no room to go on: it is cut off
    if not completion.done:
        completion.token_ids = np.append(completion.token_ids, np.array(written, np.int64))
        completion.logprobs = np.append(completion.logprobs, np.full(len(written), BY_TOOL, np.float32))
    return not completion.done
