"""The losses of dpo.py and reward_model.py against TRL's trainers, where TRL is installed (requirements-bench.txt)."""

import json

import pytest
import torch
from conftest import write_jsonl
from launch import call, metrics
from test_preferences import hh_pairs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import dpo
import reward_model

trl = pytest.importorskip("trl", reason="TRL is not installed (requirements-bench.txt)")

STEPS, BATCH = 4, 4


@pytest.fixture(scope="module")
def start(tiny_model, tmp_path_factory):
    """(language model, reward model, file of pairs, their ids as TRL takes them), for runs of 4 steps of 4 pairs."""
    folder = tmp_path_factory.mktemp("trl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})  # TRL scores the last token that is not padding
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1).save_pretrained(folder / "reward")
    for name in ("model", "reward"):
        tokenizer.save_pretrained(folder / name)
    chat = common.ChatFormat(common.load_tokenizer(folder / "model"))
    encode, pairs, ids = common.PairEncoder(chat, len(tokenizer), 400, "drop"), [], []
    for number, pair in enumerate(map(json.loads, open(hh_pairs(folder, 60)))):
        try:
            encoded = encode(pair)
        except common.Skip:
            continue
        if len(pairs) < STEPS * BATCH:
            n, begin = encoded["chosen_length"], encoded["trained"].index(True)
            sides = encoded["input_ids"][:n], encoded["input_ids"][n:]
            assert sides[0][:begin] == sides[1][:begin]
            pairs.append(pair | {"margin": number % 3 / 2})
            ids.append([sides[0][:begin], sides[0][begin:], sides[1][begin:], number % 3 / 2])
    order = [i for s in range(STEPS) for i in common.batch_indices(len(pairs), BATCH, 1, s, len(pairs))]
    return folder, write_jsonl(folder / "pairs.jsonl", pairs), [ids[i] for i in order]


def train_with_trl(trainer, config, model, rows, out, **special):
    """Losses and gradient norms of TRL's steps on the rows in the order given."""
    from datasets import Dataset

    class Encoded(trainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # ids already

    special = {"per_device_train_batch_size": BATCH} | special
    settings = config(
        output_dir=str(out), max_steps=STEPS, max_length=None,
        train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False, use_cpu=True,
        learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"}, **special,
    )  # fmt: skip
    run = Encoded(str(model), args=settings, train_dataset=Dataset.from_list(rows))
    run.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in run.state.log_history if "loss" in entry]


OURS = {"batch_size": BATCH, "lr": 1e-4, "lr_schedule": "constant", "warmup_ratio": 0.0, "save_every": 0}


def assert_equal(out, theirs):
    ours = [(entry["loss"], entry["grad_norm"]) for entry in metrics(out)]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"beta": 0.1}, {"beta": 0.1, "loss_type": ["sigmoid"]}),
        ({"beta": 5.0, "length_normalize": True}, {"beta": 5.0, "loss_type": ["sigmoid_norm"]}),
    ],
)
def test_dpo_equals_trl(start, ours, theirs, tmp_path):
    folder, pairs, ids = start
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r, _ in ids]
    losses = train_with_trl(trl.DPOTrainer, trl.DPOConfig, folder / "model", rows, tmp_path / "trl", **theirs)
    call(dpo, model=folder / "model", data=[pairs], out=tmp_path / "run", max_length=400, **OURS, **ours)
    assert_equal(tmp_path / "run", losses)


def test_dpo_with_nll_equals_trl_one_pair_at_a_time(start, tmp_path):
    """--nll_coef is a mean over pairs (RPO), TRL's "sft" one over the tokens of its microbatch: the same for one pair."""
    folder, pairs, ids = start
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r, _ in ids]
    losses = train_with_trl(
        trl.DPOTrainer, trl.DPOConfig, folder / "model", rows, tmp_path / "trl", beta=0.1, loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.5], per_device_train_batch_size=1, gradient_accumulation_steps=BATCH,
    )  # fmt: skip
    call(dpo, model=folder / "model", data=[pairs], out=tmp_path / "run", max_length=400, beta=0.1, nll_coef=0.5, **OURS)
    assert_equal(tmp_path / "run", losses)


@pytest.mark.parametrize("centering, margin", [(0.0, False), (0.01, True)])
def test_reward_model_equals_trl(start, centering, margin, tmp_path):
    folder, pairs, ids = start
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r} | ({"margin": m} if margin else {}) for p, c, r, m in ids]
    if not margin:
        pairs = write_jsonl(tmp_path / "pairs.jsonl", [json.loads(line) | {"margin": 0} for line in open(pairs)])
    losses = train_with_trl(
        trl.RewardTrainer, trl.RewardConfig, folder / "reward", rows, tmp_path / "trl",
        center_rewards_coefficient=centering,
    )  # fmt: skip
    call(reward_model, model=folder / "reward", data=[pairs], out=tmp_path / "run", max_length=400, centering=centering,
         **OURS)  # fmt: skip
    assert_equal(tmp_path / "run", losses)
