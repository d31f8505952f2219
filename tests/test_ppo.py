"""PPO: advantages and losses against the equations and CleanRL's loop, and runs: what changes nothing, what is learned."""

import dataclasses
import json
import math
import sys

import lawless  # noqa: F401 (registers verifiers)
import numpy as np
import pytest
import rl
import torch
from conftest import ROOT, TOKENIZERS, tokenizer_folder, user, write_jsonl
from forked import forked
from launch import call, metrics, run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

import common
import grpo
import ppo_rlvr
import sft
from common import RunError
from rewards import Verdict
from rewards.environment import rollout_metrics

sys.path.insert(0, str(ROOT / "demo"))
import show_tokens  # noqa: E402

ARGS = ppo_rlvr.Args(model="", data=[], out="", max_new_tokens=16)


# ------------------------------------------------------------------------------------------------- rewards, advantages


def ragged(seed, most=12, count=9):
    """(rewards, values, lengths) of completions end to end, in float64."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most + 1, count)
    lengths[rng.integers(count)] = 1
    return rng.normal(0, 3, lengths.sum()), rng.normal(0, 5, lengths.sum()), lengths.tolist()


def gae_of_each(rewards, values, lengths, gamma, lam):
    """ppo_rlvr.gae of completions that lie end to end."""
    cuts = np.cumsum(lengths)[:-1]
    pairs = zip(np.split(rewards, cuts), np.split(values, cuts), strict=True)
    return np.concatenate([ppo_rlvr.gae(r, v, gamma, lam) for r, v in pairs])


def sum_of_errors(rewards, values, gamma, lam):
    """Equation (1) literally, for one completion: each advantage a sum over all that follows."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


def cleanrl(rewards, values, gamma, lam):
    """The loop of CleanRL's ppo.py for one environment that is done behind the last step."""
    n, lastgaelam = len(rewards), 0.0
    advantages, next_value, next_done = [0.0] * n, 123.0, 1.0  # the value behind the end does not count
    for t in reversed(range(n)):
        nextnonterminal = 1.0 - next_done if t == n - 1 else 1.0
        nextvalues = next_value if t == n - 1 else values[t + 1]
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * lam * nextnonterminal * lastgaelam
    return advantages


@pytest.mark.parametrize("reference", [sum_of_errors, cleanrl])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("seed", range(5))
def test_gae(seed, gamma, lam, reference):
    rewards, values, lengths = ragged(seed, most=(1, 5, 12, 40, 200)[seed])
    cuts = np.cumsum(lengths)[:-1]
    pairs = list(zip(np.split(rewards, cuts), np.split(values, cuts), strict=True))
    expected = [a for r, v in pairs for a in reference(r.tolist(), v.tolist(), gamma, lam)]
    np.testing.assert_allclose(gae_of_each(rewards, values, lengths, gamma, lam), expected, rtol=1e-12, atol=1e-12)


def test_lambda_1_is_what_came_and_0_is_one_step():
    rewards, values, lengths = np.array([1.0, 2, 4, 8, 16]), np.array([1.0, 1, 1, 1, 1]), [3, 2]
    assert gae_of_each(rewards, values, lengths, 1.0, 1.0).tolist() == [6, 5, 3, 23, 15]
    assert gae_of_each(rewards, values, lengths, 1.0, 0.0).tolist() == [1, 2, 3, 8, 15]


def sample(reward=0.0, ended=True, old=(0.0, 0.0, 0.0), ref=(0.0, 0.0, 0.0), **numbers):
    """A judged completion of three tokens (or as many as `old`), behind a prompt of two."""
    n = len(old)
    made = ppo_rlvr.Sample(
        position=0, row=0, begun=0, input_ids=np.arange(2 + n), trained=np.arange(2 + n) >= 2, behaviour_logprobs=np.array(old),
        ended=ended, text="", reward=reward, verdict=Verdict(reward, "right", ""), old_logprobs=np.array(old), ref_logprobs=np.array(ref),
    )  # fmt: skip
    for name, values in numbers.items():
        setattr(made, name, np.array(values))
    return made


@pytest.mark.parametrize(
    ("flags", "made", "score", "rewards"),
    [
        ({}, sample(1.0), 10.0, [0, 0, 10]),
        ({}, sample(0.0), 0.0, [0, 0, 0]),
        ({}, sample(0.25), 2.5, [0, 0, 2.5]),
        ({}, sample(1.0, ended=False), -10.0, [0, 0, -10]),
        ({}, sample(0.0, ended=False), -10.0, [0, 0, -10]),
        ({"no_eos_score": None}, sample(1.0, ended=False), 10.0, [0, 0, 10]),
        ({"no_eos_score": 0.0}, sample(1.0, ended=False), 0.0, [0, 0, 0]),
        ({"reward_scale": 1.0}, sample(1.0), 1.0, [0, 0, 1]),
        ({"kl_beta": 0.5}, sample(1.0, old=(-1.0, -2, -3), ref=(-2.0, -2, -1)), 10.0, [-0.5, 0, 11]),
        ({"kl_beta": 0.5}, sample(1.0, False, (-1.0, -2, -3), (-2.0, -2, -1)), -10.0, [-0.5, 0, -9]),
        ({"kl_beta": 0.0}, sample(1.0, old=(-1.0, -2, -3), ref=(-2.0, -2, -1)), 10.0, [0, 0, 10]),
        ({"reward_model_coef": 2.0}, sample(1.0, rm_scores=[7.0, 8, 0.5]), 11.0, [0, 0, 11]),
        ({"reward_model_coef": 2.0}, sample(1.0, False, rm_scores=[7.0, 8, 0.5]), -10.0, [0, 0, -10]),
        ({}, sample(1.0, old=(-1.0,), ref=(-3.0,)), 10.0, [9.9]),
    ],
)
def test_reward_of_each_token(flags, made, score, rewards):
    ppo_rlvr.set_rewards(dataclasses.replace(ARGS, **flags), made)
    assert made.score == score
    assert made.rewards.tolist() == pytest.approx(rewards, abs=1e-12)


def test_advantages_are_whitened_over_the_whole_batch_and_returns_are_not():
    rewards, values, lengths = ragged(3)
    cuts = np.cumsum(lengths)[:-1]
    samples = [
        sample(old=[0.0] * len(r), ref=[0.0] * len(r), rewards=r, values=v)
        for r, v in zip(np.split(rewards, cuts), np.split(values, cuts), strict=True)
    ]
    ppo_rlvr.set_advantages(ARGS, samples)
    plain = [a for s in samples for a in cleanrl(s.rewards.tolist(), s.values.tolist(), 1.0, 0.95)]
    mean = sum(plain) / len(plain)
    variance = sum((a - mean) ** 2 for a in plain) / len(plain)
    whitened = np.concatenate([s.advantages for s in samples])
    np.testing.assert_allclose(whitened, [(a - mean) / math.sqrt(variance + 1e-8) for a in plain], rtol=1e-12)
    assert abs(whitened.mean()) < 1e-12 and abs(whitened.std() - 1) < 1e-9
    np.testing.assert_allclose(np.concatenate([s.returns for s in samples]), np.array(plain) + values, rtol=1e-12)
    assert [len(s.advantages) for s in samples] == lengths
    constant = [sample(rewards=[0.0, 0, 0], values=[0.0, 0, 0]) for _ in range(2)]
    ppo_rlvr.set_advantages(ARGS, constant)
    assert not np.concatenate([s.advantages for s in constant]).any()


def test_summary_of_values():
    """Hand-made: what came is 3, 3 | -10, -10, -10; V has half of it right."""
    a = sample(1.0, old=(0.0, -1.0), ref=(0.0, -2.0), values=[3.0, 3.0])
    b = sample(0.0, ended=False, old=(0.0, 0.0, 0.0), ref=(-1.0, 0.0, 0.0), values=[0.0, 0.0, 0.0])
    for s, rewards, score in ((a, [0.0, 3.0], 4.0), (b, [0.0, 0.0, -10.0], -9.0)):
        s.rewards, s.score, s.kls = np.array(rewards), score, s.old_logprobs - s.ref_logprobs
    ppo_rlvr.set_advantages(dataclasses.replace(ARGS, gae_lambda=1.0), [a, b])
    found = {**rollout_metrics([[a], [b]], [[a], [b]], 0), **ppo_rlvr.value_metrics([a, b])}
    target, value = np.array([3, 3, -10, -10, -10.0]), np.array([3, 3, 0, 0, 0.0])
    expected = 1 - np.var(target - value) / np.var(target)
    assert found["explained_variance"] == found["explained_variance_mc"] == pytest.approx(expected)
    assert found["return"] == pytest.approx(target.mean()) and found["value"] == pytest.approx(value.mean())
    assert (found["score"], found["kl_spent"], found["kl_reward"]) == pytest.approx((-2.5, 1.0, -3.5 + 2.5))
    assert found["ref_kl"] == pytest.approx(2 * (math.exp(-1) - 1 + 1) / 5)
    assert found["eos_rate"] == 0.5 and found["reward"] == 0.5


# ---------------------------------------------------------------------------------------------------------- the losses


def batch(seed):
    """A packed microbatch with random numbers in float64, and log-probabilities and values near the old ones."""
    rng = np.random.default_rng(seed)
    names = ["behaviour_logprobs", "old_logprobs", "advantages", "values", "returns", "loss_weight"]
    sequences = []
    for prompt, completion in ((3, 2), (5, 4), (2, 6), (4, 1)):
        trained = np.arange(prompt + completion) >= prompt
        arrays = [np.where(trained, rng.normal(0, 1.0, len(trained)), 0) for _ in names]
        arrays[1] = (arrays[0] + rng.normal(0, 0.3, len(trained))) * trained
        sequences.append((rng.integers(0, 9, len(trained)), trained, *arrays))
    microbatch = common.pack(sequences, "cpu", *names)
    microbatch.extras = {name: values.double() for name, values in microbatch.extras.items()}
    microbatch.extras["loss_weight"] = microbatch.extras["loss_weight"].abs()
    trained = (microbatch.targets != common.IGNORE).double()
    near = {name: microbatch.extras[name] + torch.from_numpy(rng.normal(0, 0.3, len(trained))) for name in ("old_logprobs", "values")}
    return microbatch, (near["old_logprobs"] * trained).requires_grad_(), near["values"].requires_grad_()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flags", [{}, {"tis_cap": 0.0}, {"clip_low": 0.1, "clip_high": 0.3, "tis_cap": 1.1}], ids=str)
def test_policy_loss_is_equation_4(flags, seed):
    args = dataclasses.replace(ARGS, **flags)
    microbatch, logprobs, _ = batch(seed)
    losses, found = ppo_rlvr.policy_loss(args, logprobs, microbatch)
    (losses * microbatch.extras["loss_weight"]).sum().backward()
    x = {name: values.tolist() for name, values in microbatch.extras.items()}
    bound = 0
    for t, logprob in enumerate(logprobs.tolist()):
        if microbatch.targets[t] == common.IGNORE:
            assert losses[t] == logprobs.grad[t] == 0
            continue
        rho, a = math.exp(logprob - x["old_logprobs"][t]), x["advantages"][t]
        w = min(math.exp(x["old_logprobs"][t] - x["behaviour_logprobs"][t]), args.tis_cap) if args.tis_cap else 1.0
        clipped = min(max(rho, 1 - args.clip_low), 1 + args.clip_high) * a
        binds = clipped < rho * a
        bound += binds
        assert losses[t].item() == pytest.approx(-w * min(rho * a, clipped), rel=1e-12)
        assert logprobs.grad[t].item() == pytest.approx(0.0 if binds else -w * rho * a * x["loss_weight"][t], rel=1e-12)
    assert found["clipfrac"].sum() == bound > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("value_clip", [0.2, 0.05, 0.0])
def test_value_loss_is_equation_6(value_clip, seed):
    microbatch, _, values = batch(seed)
    losses, found = ppo_rlvr.value_loss(dataclasses.replace(ARGS, value_clip=value_clip), values, microbatch)
    (losses * microbatch.extras["loss_weight"]).sum().backward()
    bound = 0
    for t, new in enumerate(values.tolist()):
        if microbatch.targets[t] == common.IGNORE:
            assert losses[t] == values.grad[t] == 0
            continue
        old, target, weight = (microbatch.extras[name][t].item() for name in ("values", "returns", "loss_weight"))
        clipped = min(max(new, old - value_clip), old + value_clip) if value_clip else new
        binds = (clipped - target) ** 2 > (new - target) ** 2
        bound += binds
        assert losses[t].item() == pytest.approx(0.5 * max((new - target) ** 2, (clipped - target) ** 2), rel=1e-12)
        assert values.grad[t].item() == pytest.approx(0.0 if binds else (new - target) * weight, rel=1e-12)
    assert found["value_clipfrac"].sum() == bound and (bound > 0) == (value_clip > 0)


def test_policy_loss_is_that_of_grpo():
    """Where the two overlap: ratios of tokens, no KL in the loss."""
    microbatch, logprobs, _ = batch(7)
    ours, _ = ppo_rlvr.policy_loss(ARGS, logprobs, microbatch)
    flags = {name: getattr(ARGS, name) for name in ("clip_low", "clip_high", "tis_cap")}
    theirs, _ = grpo.policy_loss(grpo.Args(model="", data=[], out="", **flags), logprobs, microbatch)
    assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Flags of a small run, whose reward model is smaller than its policy."""
    folder = tmp_path_factory.mktemp("ppo")
    flags, config, tokenizer = rl.small_run(folder)
    config.num_hidden_layers, config.num_labels, config.pad_token_id = 1, 1, None
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return flags | {
        "value_model": str(folder / "rm"), "batch_size": 12, "value_lr": 1e-3, "minibatches": 2, "passes": 2, "no_eos_score": None,
        "value_clip": 2.0,
    }  # fmt: skip


COURSE = ("policy_loss", "value_loss", "grad_norm", "value_grad_norm", "reward", "score", "kl_spent", "entropy", "explained_variance", "return")  # fmt: skip


def trajectory(out):
    return [[line[name] for name in COURSE] for line in metrics(out) if line["step"]]


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    call(ppo_rlvr, out=out, eval_data=[start["data"][0].replace("train", "test")], eval_every=3, **start)
    return out


def test_a_run_writes_what_it_promises(start, reference):
    lines = metrics(reference)
    assert [line["step"] for line in lines] == list(range(7))
    wanted = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "reward", "completion_tokens", "eos_rate", "entropy",
              "ratio", "clipfrac", "approx_kl", "behaviour_kl", "ref_kl", "policy_loss", "value_loss", "explained_variance", "kl_reward",
              "kl_spent", "score", "value", "return", "value_clipfrac", "value_grad_norm", "explained_variance_mc"}  # fmt: skip
    assert all(wanted <= set(line) for line in lines[1:])
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 3, 6]
    assert abs(lines[1]["kl_spent"]) < 1e-6 < lines[6]["ref_kl"]  # the reference is the start
    for line in lines[1:]:
        assert line["loss"] == pytest.approx(line["policy_loss"] + 0.1 * line["value_loss"])
        assert line["kl_reward"] == pytest.approx(-0.05 * line["kl_spent"], abs=1e-9)
    AutoModelForCausalLM.from_pretrained(reference / "model")
    value_model = AutoModelForSequenceClassification.from_pretrained(reference / "value_model")
    before = AutoModelForSequenceClassification.from_pretrained(start["value_model"])
    assert not torch.equal(value_model.score.weight, before.score.weight)
    AutoTokenizer.from_pretrained(reference / "value_model")


def test_samples_tell_what_was_thought_of_each_token(reference):
    """Their numbers fit equation (1), and their tokens are the completion's."""
    shown = [json.loads(line) for line in open(reference / "samples.jsonl")]
    trained = [line for line in shown if not line["held_out"]]
    tokenizer = AutoTokenizer.from_pretrained(reference / "model")
    assert len(trained) == 6 * 4 and len(shown) == 6 * 4 + 3 * 4
    for line in trained:
        n = len(line["token_ids"])
        assert {len(line[name]) for name in ("values", "advantages", "returns", "rewards", "kls")} == {n}
        rewards = [-0.05 * kl for kl in line["kls"]]
        rewards[-1] += 10 * line["reward"]
        np.testing.assert_allclose(line["rewards"], rewards, atol=2e-4)
        advantages = cleanrl(line["rewards"], line["values"], 1.0, 0.95)
        np.testing.assert_allclose(line["returns"], np.add(advantages, line["values"]), atol=2e-3)
        assert tokenizer.decode(line["token_ids"][: n - line["ended"]], skip_special_tokens=True) == line["completion"]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_each_token_has_its_text(kind):
    """Together they are the text; random tokens, whose bytes are no characters, only must not stop anything."""
    tokenizer = TOKENIZERS[kind]()
    backend, rng = tokenizer.backend_tokenizer, np.random.default_rng(0)
    for text in ("Natalia sold 48/2 = 24 clips.", "a 你好 😀 b", "</script>"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert "".join(show_tokens.texts(backend, ids)).strip() == tokenizer.decode(ids).strip()
    for _ in range(300):
        ids = rng.integers(0, len(tokenizer), 60).tolist()
        assert len(list(show_tokens.texts(backend, ids))) == 60


def test_the_page_of_tokens_holds_the_samples(reference, tmp_path):
    chosen = show_tokens.show(reference, tmp_path / "page.html", steps=3)
    page = (tmp_path / "page.html").read_text()
    assert chosen == [2, 4, 6] and page.count("</script>") == 1
    samples = json.loads(page.split("const samples = ")[1].split(";\n")[0].replace("<\\/", "</"))
    assert len(samples) == 3 * 4 and all(len(s["tokens"]) == len(s["values"]) for s in samples)
    with pytest.raises(SystemExit, match="holds no values"):
        (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
        show_tokens.show(tmp_path, tmp_path / "none.html")


@pytest.mark.parametrize(
    "flags",
    [
        {"tokens_per_microbatch": 1}, pytest.param({"tokens_per_microbatch": 100}, marks=pytest.mark.slow), {"slots": 3},
        {"activation_checkpointing": False},
    ],
    ids=str,
)  # fmt: skip
def test_how_it_is_computed_changes_nothing(start, reference, tmp_path, flags):
    call(ppo_rlvr, out=tmp_path / "run", **start | flags)
    np.testing.assert_allclose(trajectory(tmp_path / "run"), trajectory(reference), rtol=5e-4, atol=1e-5)


def test_values_and_scores_are_those_of_transformers(start, tmp_path, monkeypatch):
    """V before each token, log π of both policies, and the reward model's score, recomputed one sequence at a time."""
    seen, set_rewards = [], ppo_rlvr.set_rewards

    def watched(args, sample):
        set_rewards(args, sample)
        seen.append(sample)

    monkeypatch.setattr(ppo_rlvr, "set_rewards", watched)
    call(ppo_rlvr, out=tmp_path / "run", **start | {"steps": 2, "reward_model_coef": 0.5})
    policy = AutoModelForCausalLM.from_pretrained(start["model"], dtype=torch.float64)
    reward_model = AutoModelForSequenceClassification.from_pretrained(start["value_model"], dtype=torch.float64)
    with torch.no_grad():
        for i, sample in enumerate(seen):
            first, ids = i < 12, torch.from_numpy(sample.input_ids)[None]
            logprobs = policy(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
            scores = reward_model.score(reward_model.model(ids).last_hidden_state)[0, :, 0].numpy()
            n = len(sample.values)
            np.testing.assert_allclose(sample.ref_logprobs, logprobs[-n:], atol=1e-5)  # in the second step too
            np.testing.assert_allclose(sample.rm_scores, scores[-n:], atol=1e-5)
            assert np.allclose(sample.old_logprobs, logprobs[-n:], atol=1e-5) == first
            assert np.allclose(sample.values, scores[-n - 1 : -1], atol=1e-5) == first
            assert sample.score == pytest.approx(10 * sample.reward + 0.5 * scores[-1], abs=1e-5)


def test_a_new_head_and_a_head_of_zeros(start, tmp_path):
    """Without --value_model it is the policy with a head of its own; with --zero_value_head it expects nothing at first."""
    call(ppo_rlvr, out=tmp_path / "new", **start | {"value_model": None, "steps": 1})
    (new,) = metrics(tmp_path / "new")
    call(ppo_rlvr, out=tmp_path / "zero", **start | {"zero_value_head": True, "steps": 2})
    zero, later = metrics(tmp_path / "zero")
    assert new["value"] != 0 == zero["value"] and later["value"] != 0
    assert zero["reward"] == new["reward"]


def test_each_model_has_its_learning_rate(start, tmp_path):
    call(ppo_rlvr, out=tmp_path / "run", **start | {"value_lr": 0.0, "steps": 1})
    for folder, loader, source in (("model", AutoModelForCausalLM, "model"), ("value_model", AutoModelForSequenceClassification, "value_model")):
        before, after = (loader.from_pretrained(path).state_dict() for path in (start[source], tmp_path / "run" / folder))
        assert all(torch.equal(before[name], after[name]) for name in before) == (folder == "value_model")


def test_value_coef_scales_the_gradient(start, tmp_path):
    """AdamW hides it; the norm before clipping does not."""
    flags = start | {"steps": 1, "minibatches": 1, "passes": 1}
    call(ppo_rlvr, out=tmp_path / "once", **flags)
    call(ppo_rlvr, out=tmp_path / "twice", **flags | {"value_coef": 0.2})
    (once,), (twice,) = metrics(tmp_path / "once"), metrics(tmp_path / "twice")
    assert twice["value_grad_norm"] == pytest.approx(2 * once["value_grad_norm"], rel=1e-5)
    assert twice["grad_norm"] == once["grad_norm"] and twice["loss"] - once["loss"] == pytest.approx(0.1 * once["value_loss"])


def test_value_warm_up_leaves_the_policy(start, reference, tmp_path):
    call(ppo_rlvr, out=tmp_path / "run", **start | {"value_warmup_steps": 2, "weight_decay": 0.1, "steps": 3})
    first, second, third = metrics(tmp_path / "run")
    assert (first["lr"], second["lr"]) == (0, 0) and third["lr"] > 0
    assert first["value"] != second["value"] and abs(third["kl_spent"]) < 1e-6
    assert first["reward"] == metrics(reference)[1]["reward"]
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (start["model"], tmp_path / "run" / "model"))
    assert not all(torch.equal(before[name], after[name]) for name in before)  # step 3 has moved it
    call(ppo_rlvr, out=tmp_path / "still", **start | {"value_warmup_steps": 2, "weight_decay": 0.1, "steps": 2})
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "still" / "model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "flags", [{"group_size": 3, "forks": ("sequence_mean",), "tis_cap": 0.0}, {"inflight": 4, "max_staleness": 2}, {"kl_beta": 0.0, "gamma": 0.9}], ids=str
)
def test_flags_train(start, tmp_path, flags):
    flags = dict(flags)
    call(forked(*flags.pop("forks", ()), base="ppo_rlvr.py"), out=tmp_path / "run", **start | {"steps": 3} | flags)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 3 and all(math.isfinite(line["loss"]) for line in lines)
    assert (max(line["staleness"] for line in lines) > 0) == ("inflight" in flags)
    assert lines[0]["sampled_tokens"] > 0 and lines[0]["groups"] == 12


def test_interrupted_runs_continue_bit_for_bit(start, reference, tmp_path):
    """Stopped by an exception behind a checkpoint; and by SIGTERM in the middle of a rollout. The same numbers come out."""
    out, flags = tmp_path / "run", start | {"save_every": 2}
    rl.stop_twice(ppo_rlvr, out, flags, decode_calls=6)
    call(ppo_rlvr, out=out, **flags)
    assert trajectory(out) == trajectory(reference)
    for folder, loader in (("model", AutoModelForCausalLM), ("value_model", AutoModelForSequenceClassification)):
        ours, theirs = (loader.from_pretrained(path / folder).state_dict() for path in (out, reference))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    texts = [[json.loads(line)["values"] for line in open(path / "samples.jsonl") if "values" in line] for path in (out, reference)]
    assert texts[0] == texts[1]


def test_a_stopped_run_goes_on_bit_for_bit(start, tmp_path):
    """Stopped twice, with some prompts solved; completions that end with a stop string are no cut-off ones."""
    flags = start | {"solved": 0.5, "stop_strings": ["e"], "no_eos_score": -1.0, "batch_size": 6, "steps": 5, "log_samples": 99}
    call(ppo_rlvr, out=tmp_path / "whole", **flags)
    for stop in (2, 4, None):
        call(ppo_rlvr, out=tmp_path / "run", **flags | {"stop_step": stop})
        assert metrics(tmp_path / "run")[-1]["step"] == (stop or 5)
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    solved = [line["solved_prompts"] for line in lines]
    assert solved == [line["solved_prompts"] for line in metrics(tmp_path / "run")]
    assert 0 < solved[1] < solved[3] < 32, solved
    shown = [json.loads(line) for line in open(tmp_path / "whole" / "samples.jsonl")]
    for line in shown:
        assert line["ended"] or "e" not in line["completion"]
        assert line["rewards"][-1] + 0.05 * line["kls"][-1] == pytest.approx(10 * line["reward"] if line["ended"] else -1, abs=2e-4)
    assert {line["ended"] for line in shown} == {True, False}


TEACHING = {"batch_size": 64, "minibatches": 4, "passes": 4, "steps": 15, "lr": 5e-3, "value_lr": 5e-3, "eval_samples": 4, "eval_every": 100,
            "epochs": 99, "value_clip": 0.0}  # fmt: skip


def test_rewards_teach(start, tmp_path):
    """Rewarded for small letters, the reward rises beyond the intervals, and the value model knows what to expect."""
    data = [f"{start['data'][0]}:2.0"]  # twice: a batch has 64 different rows
    call(ppo_rlvr, out=tmp_path / "small", **start | TEACHING | {"data": data, "eval_data": start["data"]})
    first, *_, last = metrics(tmp_path / "small")
    assert last["eval_reward_low"] > first["eval_reward_high"]
    assert abs(last["value"] - last["return"]) < 0.2 * abs(last["return"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_rewards_teach_nothing(start, tmp_path, seed):
    """Negative control: trained on a hash of the text, measured by small letters."""
    data = [f"{rl.rewarded_at_random(tmp_path)[0]}:2.0"]
    flags = start | TEACHING | {"eval_data": start["data"], "eval_samples": 8, "data": data}
    call(ppo_rlvr, out=tmp_path / "coin", **flags | {"seed": seed})
    first, *_, last = metrics(tmp_path / "coin")
    assert last["eval_reward_low"] < first["eval_reward_high"]


OUT_OF_RANGE = {
    "value_clip": (-0.1,), "value_coef": (-0.1,), "value_lr": (-1e-3,), "value_warmup_steps": (-1,), "gamma": (-0.1, 1.1),
    "gae_lambda": (-0.1, 1.1), "reward_scale": (0.0, -1.0), "reward_model_coef": (-0.1,), "group_size": (0, -1), "temperature": (0.0, -1.0),
    "clip_low": (0.0, -0.1, 1.5), "clip_high": (0.0, -0.2), "tis_cap": (-1.0,), "kl_beta": (-0.1,), "minibatches": (0, -1, 13),
    "passes": (0, -1), "max_new_tokens": (0, -1, 64, 99), "solved": (0.0, -0.5, 1.5), "slots": (0, -1), "sample_tp": (0, -1), "inflight": (-1,),
    "max_staleness": (0, -1), "max_logprob_gap": (0.0, -1.0), "verifier_workers": (0, -1), "eval_samples": (0, -1),
    "eval_temperature": (-0.1,), "log_samples": (-1,), "pass_threshold": (0.0, -0.5, 1.5),
}  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in OUT_OF_RANGE.items() for value in values])
def test_flags_out_of_range_are_named(start, flag, value):
    args = ppo_rlvr.Args(**{**start, "model": "", "out": "", flag: value})
    with pytest.raises(RunError, match=rf"^--{flag} {value} is out of range: (at least|above|at most) \d+$"):
        ppo_rlvr.check_flags(args)


def test_flags_at_the_edge_of_their_range_are_right(start):
    edges = {"value_clip": 0.0, "value_coef": 0.0, "value_lr": 0.0, "gamma": 0.0, "gae_lambda": 1.0, "group_size": 1, "minibatches": 12,
             "max_new_tokens": 63, "clip_low": 1.0, "tis_cap": 0.0, "kl_beta": 0.0, "solved": 1.0, "slots": 1, "eval_temperature": 0.0}  # fmt: skip
    ppo_rlvr.check_flags(ppo_rlvr.Args(**{**start, "model": "", "out": "", **edges}))


def test_every_flag_of_reinforcement_learning_has_a_range():
    """But for those that every script has, which are checked for all, and those without a range."""
    shared = {field.name for field in dataclasses.fields(sft.Args)}
    own = {field.name for field in dataclasses.fields(ppo_rlvr.Args)} - shared
    without = {"value_model", "zero_value_head", "no_eos_score", "stop_strings", "sandbox", "rewards", "verifier", "audit"}
    assert own - OUT_OF_RANGE.keys() == without


def test_no_reward_at_all_is_said_once(start, tmp_path, capfd):
    """It is no error: the KL and --no_eos_score are something to learn from."""
    rows = [{"messages": [user(f"{i}?")], "dataset": "exact", "ground_truth": "impossible"} for i in range(12)]
    call(ppo_rlvr, out=tmp_path / "run", **start | {"data": [write_jsonl(tmp_path / "rows.jsonl", rows)], "steps": 3})
    said = [line for line in "".join(capfd.readouterr()).splitlines() if "nothing to learn from" in line]
    assert len(said) == 1 and "step 1: nothing to learn from: in each of 12 groups all rewards are the same (0 in the mean)" in said[0]
    assert [(line["reward"], line["groups"]) for line in metrics(tmp_path / "run")] == [(0.0, 12)] * 3


def test_errors_name_their_cause(start, tmp_path):
    other = tmp_path / "other"
    tokenizer = common.load_tokenizer(tokenizer_folder("unigram"), "tulu")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    for flags, message in (
        ({"value_model": str(other)}, f"--value_model {other} has another vocabulary than --model"),
        ({"value_model": str(tmp_path)}, f"model {tmp_path}: "),
        ({"value_model": None, "reward_model_coef": 1.0}, "--reward_model_coef needs a reward model as --value_model"),
        ({"max_logprob_gap": 1e-12}, "sampled and recomputed log-probabilities differ"),
    ):
        with pytest.raises(RunError, match=message):
            call(ppo_rlvr, out=tmp_path / "run", **start | flags)


def test_a_value_that_is_not_finite_stops_the_run(start, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_rlvr, "value_loss", lambda args, values, batch: (values * math.nan, {}))
    with pytest.raises(RunError, match="step 1: loss nan, gradient norm nan; stopped before the update"):
        call(ppo_rlvr, out=tmp_path / "run", **start)


# ------------------------------------------------------------------------------------------- processes of their own


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """(flags of a run that a process of its own can make, its folder)."""
    folder = tmp_path_factory.mktemp("alone")
    flags = rl.rewarded_by_a_built_in(folder, start) | {"reward_model_coef": 0.1}
    run("ppo_rlvr.py", out=folder / "run", **flags)
    return flags, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_nothing(alone, tmp_path, processes):
    """Ranks sample, judge, value and train other shares, and the batch is the same, up to rounding (which grows with the steps)."""
    flags, reference = alone
    run("ppo_rlvr.py", processes, out=tmp_path / "run", **flags)
    np.testing.assert_allclose(trajectory(tmp_path / "run"), trajectory(reference), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_continue_bit_for_bit(alone, tmp_path, processes):
    """kill -9 five times, at any moment; with the samples in flight too."""
    flags, _ = alone
    flags = flags | {"inflight": 4}
    run("ppo_rlvr.py", processes, out=tmp_path / "whole", **flags)
    rl.kill_five_times("ppo_rlvr.py", processes, tmp_path / "run", flags)
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
