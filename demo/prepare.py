"""Makes what the demo starts from: a tokenizer, a model with random weights, and demonstrations to learn from.

    python demo/prepare.py --out runs/demo

    runs/demo/base              model and tokenizer, opens with from_pretrained (0.17M parameters, knows nothing)
    runs/demo/train.jsonl       demonstrations, three in five with a slip (see task.py)
    runs/demo/held_out.jsonl    the same for problems that train.jsonl does not contain
    runs/demo/prompts.jsonl     the problems alone, with their sums, and some held-out ones; and held_out_prompts.jsonl
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import task

logging.disable_progress_bar()  # one file of weights is written at once

LEAKED = 40  # held-out problems among the prompts, for pipeline.decontaminate to find
CONTROL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
CHARACTERS = [*map(chr, range(32, 127)), "\n"]  # printable ASCII

# What the model has to produce itself, its answer and the end token, stands between the generation marks.
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|assistant|>' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{ '<|user|>' + message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def make_tokenizer():
    """One token a character, and the control tokens."""
    vocabulary = {token: i for i, token in enumerate(CONTROL + CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<|unknown|>"))
    tokenizer.decoder = decoders.Fuse()  # decoded tokens are joined without spaces
    tokenizer.add_special_tokens(CONTROL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", unk_token="<|unknown|>"
    )
    tokenizer.pad_token = tokenizer.eos_token  # training never pads; generate() wants one
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, seed):
    """A small Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.08,  # wider than the usual 0.02, which is for widths of thousands: learns twice as fast
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def prepare(out, seed=1, count=6400):
    """Writes base/, train.jsonl (`count` rows), held_out.jsonl and their problems' prompts under `out`.

    Among the prompts to train on are LEAKED held-out ones, as happens.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    model.save_pretrained(f"{out}/base")
    tokenizer.save_pretrained(f"{out}/base")
    train, held_out = task.problems()
    task.write_demonstrations(f"{out}/train.jsonl", train, count, seed)
    task.write_demonstrations(f"{out}/held_out.jsonl", held_out, 500, seed)
    task.write_prompts(f"{out}/prompts.jsonl", train + held_out[:LEAKED])
    task.write_prompts(f"{out}/held_out_prompts.jsonl", held_out)
    return model.num_parameters()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", help="folder to write to")
    parser.add_argument("--seed", type=int, default=1, help="decides the weights and the demonstrations")
    args = parser.parse_args()
    parameters = prepare(args.out, args.seed)
    print(f"{args.out}: model of {parameters:,} parameters, train.jsonl, held_out.jsonl, prompts of both")
