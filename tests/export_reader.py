"""What a version of transformers reads from exported folders: test_export.py calls it in 5, and as a script in 4.57.

    PYTHONPATH=.venv/transformers4 python tests/export_reader.py OUT FOLDER...

The script writes OUT.json, [version, {folder: facts}], and OUT.npz, {number of the folder: logits}.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

TEXTS = [
    "What is 2 + 3?\n\nIt is 5.",
    "<|im_start|>user\nCafé  <think>\n\n1234567</think><|im_end|>\n</s> <s> [INST] <|eot_id|><b>x</b>",
    " leading, trailing ",
]
MESSAGES = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "5"}]


def read(folder):
    """(facts, logits) of the model and the tokenizer in a folder."""
    model, logits = open_model(folder)
    facts = read_tokenizer(AutoTokenizer.from_pretrained(folder))
    facts["dtype"] = str(AutoConfig.from_pretrained(folder).dtype)
    if model.can_generate():
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "temperature", "top_p", "repetition_penalty")
        settings = model.generation_config.to_diff_dict()
        facts["generation"] = {name: settings.get(name) for name in names}
        facts["generated"] = model.generate(INPUTS[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    return facts, logits


INPUTS = torch.randint(3, 300, (2, 400), generator=torch.Generator().manual_seed(0))


def open_model(folder):
    """(model, its logits for two long sequences), in float32. Weights that are missing or left over are an error.

    Eager attention: the other kinds leave the soft cap of Gemma 2 out.
    """
    is_reward = "ForSequenceClassification" in str(AutoConfig.from_pretrained(folder).architectures)
    auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model, model.eval()(INPUTS).logits.numpy()


def read_tokenizer(tokenizer):
    """What has to be the same of a tokenizer."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side", "model_max_length")
    return {
        "ids": ids,
        "ids with special tokens": [tokenizer(text).input_ids for text in TEXTS],
        "decoded": [tokenizer.decode(row, skip_special_tokens=skip) for row in ids for skip in (True, False)],
        "chat": tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "chat ids": list(tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"]),
        "prompt": tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True),
        "inputs": sorted(tokenizer("a")),
        "special": sorted(tokenizer.all_special_tokens),
        "length": len(tokenizer),
    } | {name: getattr(tokenizer, name) for name in names}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    out, *folders = sys.argv[1:]
    readings = {folder: read(folder) for folder in folders}
    facts = {folder: facts for folder, (facts, _) in readings.items()}
    Path(out + ".json").write_text(json.dumps([transformers.__version__, facts]))
    np.savez(out + ".npz", *[logits for _, logits in readings.values()])
