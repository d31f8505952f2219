"""Models that are only read: a sampler of one, and a reward model."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common
import kernels.attention  # noqa: F401  (registers the attention function of RewardModel)
from kernels.memory import free_bytes
from kernels.sampler import Sampler, footprint
from pipeline.ranks import gather, in_turn, own_device
from rewards.environment import MOST_SLOTS, SLOTS_ON_CPU, USABLE

TOKENS = 8192  # that a reward model reads at a time


class Weights:
    """{name: tensor} of a model, as Sampler.sync reads a policy: a module that has them."""

    def __init__(self, weights):
        self.weights = weights

    def named_modules(self):
        return [("", self)]

    def named_parameters(self, prefix):
        return [(f"model.{name}", tensor) for name, tensor in self.weights.items()]

    def named_buffers(self, prefix):
        return []


def open_sampler(args, model, config, chat):
    """A Sampler of a model, with its weights; it ends completions and leaves ids out as that of the rollouts does.

    args: has slots, sample_tp, max_length. RunError if it cannot be opened or has no room. All ranks call it together.
    """
    try:
        slots = args.slots or fitting_slots(args, config)
        group = dist.new_subgroups(args.sample_tp)[0] if args.sample_tp > 1 else None
        sampler = Sampler(config, slots, args.max_length, chat.stop_ids, own_device(), group)
        in_turn(lambda: sampler.sync(Weights(common.read_weights(model, config, AutoModelForCausalLM))))
    except ValueError as error:
        raise common.RunError(f"model {model}: {common.first_line(error)}") from None
    sampler.forbid(set(range(config.vocab_size)) - set(chat.tokenizer.get_vocab().values()))
    return sampler


def fitting_slots(args, config):
    """How many sequences can be sampled at a time, on every rank; ValueError if none."""
    if own_device().type == "cpu":
        return SLOTS_ON_CPU
    weights, slot = footprint(config, args.max_length, torch.bfloat16, args.sample_tp)
    fitting = int((USABLE * min(gather([free_bytes(own_device())])) - weights) // slot)
    if fitting < 1:
        raise ValueError(f"weights of {weights / 2**30:.1f} GiB leave no room for a sequence: raise --sample_tp")
    return min(fitting, MOST_SLOTS)


class RewardModel:
    """Scores conversations, in its own chat template, by a model that reward_model.py has trained.

    Args:
        folder: of the model. content_tokens: as in its training; those that its tokenizer does not have are left out.

    Raises:
        RunError: it cannot be opened, is no reward model, or its template cannot render answers.
    """

    def __init__(self, folder, content_tokens=()):
        self.folder = folder
        config = common.load_config(SimpleNamespace(model=folder, max_length=1))
        if "ForSequenceClassification" not in str(config.architectures):
            raise common.RunError(f"--reward_model {folder} is no reward model: reward_model.py trains one")
        config.num_labels = 1
        dtype = torch.bfloat16 if own_device().type == "cuda" else torch.float32
        self.longest = getattr(config, "max_position_embeddings", None) or 10**9
        tokenizer = common.load_tokenizer(folder)
        known = tokenizer.get_added_vocab()
        self.chat = common.ChatFormat(tokenizer, [token for token in content_tokens if token in known])
        if self.chat.untrainable:
            raise common.RunError(f"--reward_model {folder}: {self.chat.untrainable}")
        with torch.device("meta"):
            make = AutoModelForSequenceClassification.from_config
            self.model = make(config, attn_implementation="packed", dtype=dtype).eval()
        self.model.to_empty(device=own_device())
        self.model.tie_weights()
        in_turn(lambda: self.fill(common.read_weights(folder, config, AutoModelForSequenceClassification)))

    @torch.no_grad()
    def fill(self, weights):
        """Copies weights, {name: tensor}, into the model."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            tensor.copy_(weights[name])

    def __str__(self):
        return str(self.folder)

    @torch.no_grad()
    def scores(self, row, answers):
        """(scores, reasons) of answers (texts) to a row's prompt.

        A score is None where both are longer than the model's positions ("too_long"), or where its template does not
        take the conversation ("rejected"). An answer that was cut off is scored as if it had ended.
        """
        sequences, scores, reasons = {}, [None] * len(answers), ["score"] * len(answers)
        for i, answer in enumerate(answers):
            messages = [*row["messages"], {"role": "assistant", "content": answer}]
            try:
                ids, _ = self.chat.encode(messages, common.parse_tools(row), options=common.read_options(row))
            except ValueError:
                reasons[i] = "rejected"
                continue
            if len(ids) > self.longest:
                reasons[i] = "too_long"
                continue
            sequences[i] = np.array(ids), np.zeros(len(ids), dtype=bool)
        numbers = list(sequences)
        [parts] = common.deal([len(sequences[i][0]) for i in numbers], TOKENS) if numbers else [[]]
        for places in filter(None, parts):
            part = [numbers[place] for place in places]
            microbatch = common.pack([sequences[i] for i in part], own_device())
            hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
            last = hidden[microbatch.cu_seqlens[1:].long() - 1].float()  # (S, H), as in reward_model.py
            for i, score in zip(part, (last @ self.model.score.weight[0].float()).tolist(), strict=True):
                scores[i] = score
        return scores, reasons
