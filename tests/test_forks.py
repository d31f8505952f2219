"""Forks: the gradient of each against its paper's equation, written down once more; and what make.py refuses."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from conftest import ALONE, ROOT, assistant, tokenizer_folder, user, write_jsonl
from forked import base_of, forked, forks
from readability import SCRIPTS, flags, no_dead_flag, sources

import common

LONGEST, BUFFER, CLIP = 16, 4, (0.05, 0.1)
GROUPS = ("gspo", "sequence_mean", "dr_grpo", "overlong_penalty", "rloo", "reinforce_pp", "cispo")  # by one test below
PAIRS = ("ipo", "simpo")  # likewise
OTHERS = ("dft", "kto", "hpt", "dump")  # a test each
PARAMETERS = ("lora", "adam8bit", "calculator")  # no losses: test_forks_parameters.py


def test_every_fork_has_its_test():
    tested = [*GROUPS, *PAIRS, *OTHERS, *PARAMETERS]
    assert set(forks.names()) <= set(tested), "write its equation down here"
    here = (ROOT / "tests" / "test_forks.py").read_text()
    assert all(f'forked("{name}")' in here for name in OTHERS)


def samples(script, seed):
    """Two groups of three completions with rewards that differ, and numbers near each other, in float64."""
    rng, made = np.random.default_rng(seed), []
    for position in range(2):
        for reward, length in zip((1.0, 0.0, 0.5), rng.integers(LONGEST - BUFFER - 2, LONGEST + 1, 3), strict=True):
            behaviour = -rng.exponential(1.0, length)
            sample = script.Sample(
                position=position, row=0, begun=0, input_ids=rng.integers(0, 9, 3 + length), trained=np.arange(3 + length) >= 3,
                behaviour_logprobs=behaviour, ended=True, text="", reward=reward, verdict=None,
                old_logprobs=behaviour + rng.normal(0, 0.1, length), ref_logprobs=behaviour + rng.normal(0, 0.1, length),
            )  # fmt: skip
            made.append(sample)
    return made


def gradient_of_script(script, args, made, logprobs):
    """Gradient by the log-probabilities of each sample's tokens, through packing and the loop's lines."""
    for position in range(2):
        script.set_advantages(args, [sample for sample in made if sample.position == position])
    if hasattr(script, "whiten"):  # over the batch, in the loop
        script.whiten(made)
    script.set_loss_weights(args, made)
    names = ["behaviour_logprobs", "advantages", "loss_weight", "old_logprobs", "ref_logprobs"]
    microbatch = common.pack([sample.columns(*names) for sample in made], "cpu", *names)
    microbatch.extras = {name: values.double() for name, values in microbatch.extras.items()}
    trained = microbatch.targets != common.IGNORE
    packed = torch.zeros(len(trained), dtype=torch.float64).masked_scatter(trained, torch.cat(logprobs)).requires_grad_()
    losses, _ = script.policy_loss(args, packed, microbatch)
    (losses * microbatch.extras["loss_weight"]).sum().backward()
    return packed.grad[trained]


def gradient_of_equation(name, args, made, logprobs):
    """Literally: GSPO's ratio (arXiv 2507.18071, equation 7), GRPO's two means (arXiv 2402.03300, equation 3), Dr. GRPO's
    constant (arXiv 2503.20783), DAPO's penalty (arXiv 2503.14476, equation 13), CISPO's constant weight (arXiv 2506.13585,
    equations 4 and 5), RLOO's mean of the others, REINFORCE++'s deviation over all tokens; all else is grpo.py's."""
    logprobs = [values.clone().requires_grad_() for values in logprobs]
    total, tokens = 0.0, sum(len(values) for values in logprobs)

    def reward(sample):
        over = max(0, int(sample.trained.sum()) - (LONGEST - BUFFER)) / BUFFER
        return sample.reward - (over if name == "overlong_penalty" else 0)

    def advantage_of(sample):
        group = [reward(other) for other in made if other.position == sample.position]
        if name == "rloo":
            return reward(sample) - (sum(group) - reward(sample)) / (len(group) - 1)
        return reward(sample) - sum(group) / len(group)

    of_tokens = np.array([advantage_of(sample) for sample in made for _ in range(sample.trained.sum())])
    for sample, logp in zip(made, logprobs, strict=True):
        advantage = advantage_of(sample)
        if name == "reinforce_pp":
            advantage = (advantage - of_tokens.mean()) / (of_tokens.var() + 1e-8) ** 0.5
        old, behaviour, ref = (torch.from_numpy(x) for x in (sample.old_logprobs, sample.behaviour_logprobs, sample.ref_logprobs))
        ratio = (logp - old).exp()
        if name == "gspo":
            ratio = (logp.exp().prod() / old.exp().prod()) ** (1 / len(logp)) * torch.ones(len(logp), dtype=torch.float64)
        for t in range(len(logp)):
            clipped = min(max(ratio[t].item(), 1 - CLIP[0]), 1 + CLIP[1]) * advantage
            objective = ratio[t] * advantage if ratio[t].item() * advantage <= clipped else torch.tensor(clipped)
            if name == "cispo":
                objective = min(ratio[t].item(), 1 + CLIP[1]) * advantage * logp[t]
            w = min((old[t] - behaviour[t]).exp().item(), args.tis_cap)
            kl = (ref[t] - logp[t]).exp() - (ref[t] - logp[t]) - 1
            share = {"sequence_mean": 1 / (len(made) * len(logp)), "dr_grpo": 1 / (len(made) * LONGEST)}.get(name, 1 / tokens)
            total = total + share * (-w * objective + args.kl_beta * kl)
    total.backward()
    return torch.cat([values.grad for values in logprobs])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [None, *GROUPS])
def test_gradient_is_the_papers(name, seed):
    script = forked(*([name] if name else []))
    wanted = {"max_new_tokens": LONGEST, "clip_low": CLIP[0], "clip_high": CLIP[1], "kl_beta": 0.1, "overlong_buffer": BUFFER}
    args = script.Args(**{flag: value for flag, value in wanted.items() if hasattr(script.Args, flag)})
    made = samples(script, seed)
    rng = np.random.default_rng(seed + 100)
    logprobs = [torch.from_numpy(sample.old_logprobs + rng.normal(0, 0.1, len(sample.old_logprobs))) for sample in made]
    ours, papers = gradient_of_script(script, args, made, logprobs), gradient_of_equation(name, args, made, logprobs)
    torch.testing.assert_close(ours, papers, rtol=1e-5, atol=1e-8)  # numbers are packed in float32
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("groups", [[0], [0, 1]], ids=str)
def test_an_equal_group_and_an_empty_batch_have_no_advantages(groups):
    for name in ("rloo", "reinforce_pp"):
        script = forked(name)
        made = [sample for sample in samples(script, 0) if sample.position in groups]
        for sample in made:
            sample.reward = 0.7
        for position in groups:
            script.set_advantages(script.Args(), [sample for sample in made if sample.position == position][:1])
            script.set_advantages(script.Args(), [sample for sample in made if sample.position == position])
        if name == "reinforce_pp":
            script.whiten(made)
            script.whiten([])
        assert [sample.advantages for sample in made] == [0.0] * len(made)


def gradient(losses, *leaves):
    return torch.autograd.grad(losses.sum(), leaves)


@pytest.mark.parametrize("flags", [{}, {"nll_coef": 0.3}, {"length_normalize": True}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_gradient_of_pairs_is_the_papers(name, flags):
    """IPO (arXiv 2310.12036): (h - 1/2τ)². SimPO (arXiv 2405.14734): -log σ(β mean log π_c - β mean log π_r - γ)."""
    script = forked(name)
    if name == "simpo" and "length_normalize" in flags:
        assert not hasattr(script.Args, "length_normalize")
        return
    args = script.Args(beta=0.4, **flags)
    torch.manual_seed(0)
    logprobs = (-10 * torch.rand(8, dtype=torch.float64)).requires_grad_()
    lengths, ref = torch.tensor([3.0, 5, 2, 2, 7, 1, 4, 9]).double(), -10 * torch.rand(4, 2, dtype=torch.float64)
    losses, metrics = script.preference_loss(args, logprobs, lengths, ref)
    total = 0.0
    for b in range(4):
        chosen, rejected, long, short = logprobs[2 * b], logprobs[2 * b + 1], lengths[2 * b], lengths[2 * b + 1]
        if name == "ipo":
            scale = (long, short) if args.length_normalize else (1, 1)
            h = (chosen - ref[b, 0]) / scale[0] - (rejected - ref[b, 1]) / scale[1]
            total = total + (h - 1 / (2 * 0.4)) ** 2
        else:
            margin = 0.4 / long * chosen - 0.4 / short * rejected - 0.4 * args.gamma_beta_ratio
            total = total + (1 + (-margin).exp()).log()
        total = total - args.nll_coef * chosen / long
    torch.testing.assert_close(gradient(losses, logprobs), gradient(total, logprobs), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.sum(), total)
    none, _ = script.preference_loss(args, logprobs[:1], lengths[:1], ref[:0])  # a rank without pairs
    assert none.shape == (0,) and metrics["accuracy"].shape == (4,)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ipo", {"beta": 0.0}, "--beta 0.0"),
        ("simpo", {"beta": -1.0}, "--beta -1.0"),
        ("simpo", {"ref_model": "x"}, "--ref_model: SimPO has no reference"),
        ("ipo", {"nll_coef": -1.0}, "--nll_coef"),
        ("kto", {"undesirable_weight": -1.0}, "--undesirable_weight"),
    ],
)
def test_flags_that_make_no_sense_are_refused(name, flags, message):
    script = forked(name)
    with pytest.raises(common.RunError, match=message):
        script.check_flags(script.Args(**flags))


def test_dft_weighs_a_token_by_its_probability():
    """arXiv 2508.05629, in float64 through the head: -sg(p) log p in training, and cross-entropy when it evaluates."""
    script = forked("dft")
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    model = torch.nn.Module()
    model.base_model = lambda **_: SimpleNamespace(last_hidden_state=hidden[None])
    model.get_output_embeddings = lambda: SimpleNamespace(weight=head)
    model.config = SimpleNamespace()
    targets = torch.tensor([3, common.IGNORE, 0, 8, common.IGNORE])
    trained = torch.tensor([0, 2, 3])
    policy = script.Policy(model)
    microbatch = SimpleNamespace(model_inputs=dict, targets=targets, trained=trained)
    logp = (hidden @ head.T).log_softmax(-1)[trained, targets[trained]]
    expected = -(logp.exp().detach() * logp)
    torch.testing.assert_close(gradient(policy(microbatch), hidden, head), gradient(expected, hidden, head))
    torch.testing.assert_close(policy(microbatch), expected.sum())
    torch.testing.assert_close(policy.eval()(microbatch), -logp.sum())


# --------------------------------------------------------------------------------------------------------------- kto


@pytest.fixture(scope="module")
def chat():
    return common.ChatFormat(common.load_tokenizer(tokenizer_folder("byte_level"), "tulu"))


def test_kto_is_the_papers():
    """λ (1 - σ(±β (h - z))), and the gradient by the log-probabilities, with a microbatch that holds more than B."""
    script = forked("kto")
    args = script.Args(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    torch.manual_seed(0)
    logprobs = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(4, 2, dtype=torch.float64)
    labels = torch.tensor([True, False, False, True])
    losses, metrics = script.kto_loss(args, logprobs, ref, labels, 0.7)
    total = 0.0
    for i, good in enumerate(labels.tolist()):
        h = logprobs[i] - ref[i, 0]
        exponent = -0.3 * (h - 0.7) if good else -0.3 * (0.7 - h)
        total = total + (1.5 if good else 0.5) * (1 - 1 / (1 + exponent.exp()))
    torch.testing.assert_close(gradient(losses, logprobs), gradient(total, logprobs), rtol=1e-12, atol=0)
    assert metrics["kl"].tolist() == [0.7] * 4


def test_kto_reads_unpaired_rows(chat, tmp_path):
    encode = forked("kto").UnpairedEncoder(chat, len(chat.tokenizer), 200, "truncate")
    question = [user("What is 2 + 3?")]
    rows = [
        {"prompt": "What is 2 + 3?", "completion": "It is 5.", "label": True},
        {"prompt": question, "completion": [assistant("It is 5.")], "label": True},
        {"messages": question, "completion": "It is 5.", "label": True},
        {"messages": [*question, assistant("It is 5.")], "label": True},
    ]
    made = [encode(row) for row in rows]
    assert all(row == made[0] for row in made) and made[0]["label"] is True
    answer = [i for i, trained in zip(made[0]["input_ids"], made[0]["trained"], strict=True) if trained]
    assert chat.tokenizer.decode(answer).startswith("It is 5.")
    several = [user("Hi."), assistant("Hello."), user("2?"), assistant("3.")]
    ids, mask = (np.array(encode({"messages": several, "label": False})[key]) for key in ("input_ids", "trained"))
    assert "Hello" not in chat.tokenizer.decode(ids[mask])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2?", "completion": "3."}, "label is None, expected true or false"),
        ({"prompt": "2?", "completion": "3.", "label": 1}, "label is 1, expected true or false"),
        ({"messages": [user("2?")], "label": True}, "there is no answer"),
        ({"prompt": "2?", "label": True}, "no field 'messages'"),
        ({"completion": "3.", "label": True}, "no field 'messages'"),
    ],
)
def test_kto_refuses_other_rows(chat, row, message):
    encode = forked("kto").UnpairedEncoder(chat, len(chat.tokenizer), 200, "truncate")
    with pytest.raises(ValueError, match=message):
        encode(row)


def test_kto_reference_point_is_of_the_batch(chat, tmp_path, monkeypatch):
    """z: every prompt with the answer half the data further on, their mean over the batch however it is cut, at least 0."""
    script = forked("kto")
    monkeypatch.setattr(script, "dist", ALONE)
    monkeypatch.setattr(script, "all_sum", lambda *values: [float(value) for value in values])
    data = [{"prompt": f"{'long ' * i}{i}?", "completion": f"{'so ' * (7 - i)}{i}.", "label": i % 2 == 0} for i in range(7)]
    encode = script.UnpairedEncoder(chat, len(chat.tokenizer), 200, "truncate")
    plain = common.load_rows([write_jsonl(tmp_path / "rows.jsonl", data)], encode)
    rows = script.UnpairedRows(**vars(plain))
    assert rows.labels([0, 3, 4]).tolist() == [True, False, True]
    both = rows.sequences(range(7))
    for i, (own, other) in enumerate(zip(both[0::2], both[1::2], strict=True)):
        j = (i + 3) % 7
        assert own[0].tolist() == plain.sequences([i])[0][0].tolist()
        alone = encode(data[i] | {"completion": data[j]["completion"]})
        assert other[0].tolist() == alone["input_ids"][: plain.lengths.max()]
        assert other[1].tolist() == alone["trained"][: plain.lengths.max()]

    def policy(microbatch):  # each sequence's sum of trained ids, as its log-probability
        sums = [part[part >= 0].sum() for part in microbatch.targets.tensor_split(microbatch.cu_seqlens[1:-1].long())]
        return torch.stack(sums).double() / 100, None

    ref, indices = torch.rand(7, 2, dtype=torch.float64), np.array([5, 0, 2, 3])
    expected = np.mean([ids[1:][mask[1:]].sum() / 100 - ref[i, 1].item() for i in indices for ids, mask in [both[2 * i + 1]]])
    for budget in (1, 30, 10000):
        args = script.Args(tokens_per_microbatch=budget)
        assert script.batch_kl(args, policy, rows, indices, ref, "cpu") == pytest.approx(expected, rel=1e-12)
    assert script.batch_kl(args, policy, rows, indices, ref + 1e6, "cpu") == 0.0


# ---------------------------------------------------------------------------------------------------------- hpt, dump


def test_hpt_learns_an_unsolved_prompt_from_its_demonstration():
    """arXiv 2509.04419: GRPO's mean over tokens of the solved groups, and that of -log π over demonstrations, times κ."""
    script = forked("hpt")
    args = script.Args(gate=1, sft_coef=0.5, clip_low=CLIP[0], clip_high=CLIP[1], pass_threshold=0.5)
    made = samples(script, 0)
    for sample in made:
        sample.reward = float(sample.reward > (0.6 if sample.position else 0.0))  # of three, two are right; one
    rows = SimpleNamespace(table=[{"demonstration": [7, 8, 9, 1]}])
    groups = [[sample for sample in made if sample.position == position] for position in range(2)]
    assert [script.is_unsolved(args, group) for group in groups] == [False, True]
    assert [script.has_signal(args, group) for group in groups] == [True, True]
    groups = [script.demonstrate(args, rows, group, step=4) for group in groups]
    [demonstration] = groups[1]
    assert demonstration.input_ids.tolist() == [*made[3].input_ids[:3], 7, 8, 9, 1] and demonstration.begun == 4
    assert demonstration.trained.tolist() == [False] * 3 + [True] * 4 and demonstration.demonstrated
    rng = np.random.default_rng(0)
    demonstration.behaviour_logprobs = demonstration.old_logprobs = -rng.exponential(1.0, 4)
    minibatch = [*groups[0], demonstration]
    for group in groups:
        script.set_advantages(args, group)
    script.set_loss_weights(args, minibatch)
    names = ["behaviour_logprobs", "advantages", "loss_weight", "demonstrated", "old_logprobs"]
    microbatch = common.pack([sample.columns(*names) for sample in minibatch], "cpu", *names)
    trained = microbatch.targets != common.IGNORE
    old = microbatch.extras["old_logprobs"].double()
    logprobs = (old + torch.randn(len(old)) * 0.2 * trained).requires_grad_()
    losses, metrics = script.mixed_loss(args, logprobs, microbatch)
    [ours] = gradient(losses * microbatch.extras["loss_weight"], logprobs)
    sampled, _ = script.policy_loss(args, logprobs, microbatch)
    tokens = sum(sample.trained.sum() for sample in groups[0])
    is_demonstrated = microbatch.extras["demonstrated"] > 0
    expected = (sampled[~is_demonstrated] / tokens).sum() - 0.5 * logprobs[is_demonstrated].mean()
    torch.testing.assert_close(ours, gradient(expected, logprobs)[0], rtol=1e-6, atol=1e-9)
    assert is_demonstrated.sum() == 4 and set(metrics) == {"ratio", "clipfrac", "approx_kl", "behaviour_kl", "tis_capped"}


def test_hpt_reads_demonstrations(chat):
    encode = forked("hpt").DemonstrationEncoder(chat, len(chat.tokenizer), 200, "drop")
    row = {"messages": [user("2?")], "dataset": "exact", "ground_truth": "3", "demonstration": "It is 3."}
    made = encode(row)
    whole, mask = chat.encode([user("2?"), assistant("It is 3.")])
    assert made["input_ids"] + made["demonstration"] == list(whole[: np.flatnonzero(mask)[-1] + 1])
    with pytest.raises(ValueError, match="demonstration is None, expected a string"):
        encode(row | {"demonstration": None})


@pytest.fixture
def curriculum(monkeypatch):
    """() → the curriculum of three sources, of five, three and four rows, without what samples and judges."""
    script = forked("dump")
    for name, stub in (("__init__", start), ("state_dict", lambda _: {}), ("load_state_dicts", lambda *_: None), ("counts", lambda _: {})):
        monkeypatch.setattr(script.Rollouts, name, stub)
    rows = Table(table={"source": [0] * 5 + [1] * 3 + [2] * 4}, sources=["a", "b", "c"])
    return lambda **flags: script.CurriculumRollouts(script.Args(**flags), None, rows, None, None, ())


def start(self, args, chat, rows, *_):
    self.args, self.rows, self.solved = args, rows, set()


class Table(SimpleNamespace):
    def __len__(self):
        return len(self.table["source"])


def group_of(row, rewards):
    script = forked("dump")
    shared = {"position": 0, "row": row, "begun": 0, "input_ids": None, "trained": None, "behaviour_logprobs": None}
    return [script.Sample(**shared, ended=True, text="", verdict=None, reward=reward) for reward in rewards]


def test_dump_prefers_sources_whose_completions_differ(curriculum):
    """arXiv 2504.09710: softmax of mean |A| of the last completions and √(2 ln(n + 1) / (n_k + 1)), over τ."""
    made = curriculum(curriculum_window=6, curriculum_temperature=0.5)
    np.testing.assert_allclose(made.probabilities(), [1 / 3] * 3)
    made.watch([group_of(0, [1, 1, 0, 0]), group_of(6, [1, 1, 1, 1]), group_of(2, [0, 0, 0, 1]), group_of(9, [1, float("nan")])])
    a, n = [0.5, 0.5, 0.25, 0.25, 0.25, 0.75], np.array([8, 4, 1])  # the last six; one could not be judged
    scores = np.array([np.mean(a), 0, 0]) + np.sqrt(2 * np.log(14) / (n + 1))
    np.testing.assert_allclose(made.probabilities(), np.exp(scores / 0.5) / np.exp(scores / 0.5).sum())
    assert made.counts()["source_0"] == made.probabilities()[0]
    made.solved = {0, 1, 2, 3, 4}
    assert made.probabilities()[0] == 0 and made.probabilities().sum() == pytest.approx(1)
    assert all(made.source[made._row(position)] != 0 for position in made._draw(50))
    made.solved = set(range(12))
    assert not made._draw(5) and not made.probabilities().any()


def test_dump_draws_each_row_of_a_source_once_an_epoch_and_goes_on(curriculum):
    whole = curriculum()
    positions = whole._draw(40)
    rows = [whole._row(position) for position in positions]
    for k, size in enumerate((5, 3, 4)):
        own = [row for row in rows if whole.source[row] == k]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == whole.members[k].tolist()
    first, second = curriculum(), curriculum()
    begun = first._draw(15)
    state = first.state_dict()
    first._draw(5)  # does not change what was saved
    second.load_state_dicts([state])
    assert begun + second._draw(25) == positions
    with pytest.raises(common.RunError, match="--reward_model"):
        curriculum(reward_model="x")


@pytest.mark.parametrize("names", [[name] for name in forks.names()] + [["gspo", "sequence_mean"], ["rloo", "dr_grpo"]], ids=str)
def test_what_is_made_is_one_of_our_scripts(names):
    """Same sections, no flag and no function without use, its own folder for runs, and the papers' sources on top."""
    made, base = forks.make(names), base_of(names[0])
    others = dict.fromkeys(SCRIPTS, "class Args:\n    pass\n")  # none of them is looked at
    assert not forks.unused(made) and not no_dead_flag({**sources(), **others, base: made})
    assert flags(made)["out"][1] == f"'runs/{'_'.join(names)}'"
    docstring = ast.get_docstring(ast.parse(made))
    assert "arXiv" in docstring and ast.get_docstring(ast.parse((ROOT / base).read_text())) in docstring


def test_the_command_line_prints_what_is_made():
    command = [sys.executable, ROOT / "forks" / "make.py", "gspo", "sequence_mean"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == forks.make(["gspo", "sequence_mean"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpso"], r"error: no fork is named gpso; there are .*dr_grpo, .*gspo, "),
        (["make"], r"error: no fork is named make"),
        (["gspo", "--base", "nonsense.py"], r"error: .*nonsense.py: no such script"),
        (["gspo", "--base", "sft.py"], r"error: forks/gspo.py: nothing in sft.py reads args.minibatches"),
        (["overlong_penalty", "--base", "ppo_rlvr.py"], r"error: nothing in the result calls completion_reward"),
        (["sequence_mean", "dr_grpo"], r"error: sequence_mean and dr_grpo both change set_loss_weights"),
        (["gspo", "gspo"], r"error: gspo and gspo both change"),
    ],
)
def test_a_fork_that_does_not_fit_is_refused(arguments, message):
    command = [sys.executable, ROOT / "forks" / "make.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert re.match(message, done.stderr), done.stderr


FORK = '''"""A fork.

    L = 2 L    everywhere
"""

BASE = 'grpo.py'

SCALE = 2.0


class Args:
    first: float = 1.0  # the first
    second: list[str] = field(default_factory=list)
    """the second, of which
    there is more to say"""
    clip_low: float = (
        0.1
    )  # lines


def policy_loss(args, logprobs, microbatch):
    return logprobs * SCALE * args.first, {"second": args.second, "clip": args.clip_low}
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of forks beside a grpo.py."""
    (tmp_path / "forks").mkdir()
    (tmp_path / "grpo.py").write_text((ROOT / "grpo.py").read_text())
    monkeypatch.setattr(forks, "FORKS", tmp_path / "forks")
    return tmp_path / "forks"


def test_constants_and_flags_of_any_form_arrive_and_dead_ones_leave(folder):
    (folder / "extra.py").write_text(FORK)
    made = forks.make(["extra"])
    ast.parse(made)
    assert "SCALE = 2.0\n" in made and made.startswith('"""A fork.\n\n    L = 2 L    everywhere')
    found = flags(made)
    assert list(found)[:2] == ["first", "second"] and "more to say" in found["second"][2]
    assert found["clip_low"][1] == "0.1" and not {"clip_high", "tis_cap"} & set(found)  # the new loss reads neither
    assert "kl_beta" in found  # main does


def test_a_flag_that_nothing_reads_is_refused(folder):
    (folder / "extra.py").write_text('"""Extra."""\n\nBASE = "grpo.py"\n\n\nclass Args:\n    surplus: int = 1  # more\n')
    with pytest.raises(forks.ForkError, match="nothing in grpo.py reads args.surplus"):
        forks.make(["extra"])


def test_a_flag_that_rewards_reads_gets_another_default(folder):
    (folder / "larger.py").write_text('"""Larger."""\n\nBASE = "grpo.py"\n\n\nclass Args:\n    group_size: int = 32  # G\n')
    assert flags(forks.make(["larger"]))["group_size"][1] == "32"


LINES = '''"""Lines."""

BASE = "grpo.py"

LINES = {
    "samples = flatten(groups)": "check(groups)\\nsamples = flatten(groups)",
    "run.begin(step)  #": "pass  #",
}


def check(groups):
    return groups


def has_signal(args, group):
    return True
'''


def test_lines_are_changed_and_dead_functions_leave(folder):
    (folder / "extra.py").write_text(LINES)
    made = forks.make(["extra"])
    assert "        check(groups)\n        samples = flatten(groups)\n" in made and "        pass  # starts the clock" in made
    assert "def check(" in made and "LINES" not in made
    (folder / "extra.py").write_text(LINES.replace("        annotate", "").replace("def has_signal", "def set_advantages"))
    assert "def completion_reward" not in forks.make(["extra"])  # only set_advantages called it


def test_lines_that_do_not_fit_are_refused(folder):
    (folder / "extra.py").write_text(LINES.replace("run.begin(step)", "run.start(step)"))
    with pytest.raises(forks.ForkError, match=r"forks/extra.py: the script has 'run.start\(step\)  #' 0 times, expected once"):
        forks.make(["extra"])
    (folder / "extra.py").write_text(LINES.replace("run.begin(step)  #", "sample"))
    with pytest.raises(forks.ForkError, match="the script has 'sample' .* times, expected once"):
        forks.make(["extra"])
    (folder / "extra.py").write_text(LINES)
    (folder / "other.py").write_text(LINES.replace("def check", "def look").replace("check(", "look(").partition("def has_signal")[0])
    with pytest.raises(forks.ForkError, match="extra and other both change 'samples = flatten"):
        forks.make(["extra", "other"])


# ----------------------------------------------------------------------------------------------------------- the page


def code_lines(name):
    """Lines of a fork's functions, classes and constants, without docstrings, comments and the table LINES."""
    tree = ast.parse((ROOT / "forks" / f"{name}.py").read_text())
    ranges = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
    ranges = [node for node in ranges if not (isinstance(node, ast.Assign) and node.targets[0].id in ("BASE", "LINES"))]
    code = "\n".join(ast.unparse(without_docstrings(node)) for node in ranges)
    return len([line for line in code.splitlines() if line.strip()])


def without_docstrings(node):
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
            part.body = part.body[1:] or [ast.Pass()]
    return node


@pytest.mark.parametrize("name", forks.names())
def test_a_fork_is_short(name):
    assert code_lines(name) <= 60


PAGE = (ROOT / "docs" / "forking.md").read_text(encoding="utf-8")


def test_the_page_says_how_long_forks_are():
    """Of several forks in a row of the table, the longest."""
    table = PAGE[PAGE.index("| to change |") : PAGE.index("Lines are those")]
    shown = []
    for line in table.strip().splitlines()[2:]:
        *_, example, lines, _ = line.split("|")
        names = re.findall(r"\.\./forks/(\w+)\.py", example)
        assert int(lines) == max([code_lines(name) for name in names], default=0), names
        shown += names
    assert sorted(shown) == forks.names()


@pytest.mark.parametrize(("base", "name", "diff"), re.findall(r"<!-- diff (\S+) (\S+) -->\n```diff\n(.*?)```", PAGE, re.DOTALL))
def test_the_diffs_of_the_page_are_those_of_the_scripts(base, name, diff):
    """Each line that goes is in the script and not in what is made; each that comes, the other way round; in this order."""
    before, after = (ROOT / base).read_text().splitlines(), forks.make([name]).splitlines()
    places = {"-": [], "+": []}
    for line in diff.splitlines():
        kind, text = line[0], line[1:]
        if kind == " ":
            assert text in before and text in after, text
        else:
            here, there = (before, after) if kind == "-" else (after, before)
            assert text in here and text not in there, text
            places[kind].append(here.index(text))
    assert all(numbers == sorted(numbers) for numbers in places.values())


def test_the_diffs_are_found():
    assert PAGE.count("<!-- diff ") == 3 == PAGE.count("```diff")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_of_forks", ROOT / "benchmarks" / "forks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


def test_the_benchmark_gives_each_fork_flags_that_it_has(benchmark, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(benchmark.demo, "run_script", None)  # put back afterwards: `train` sets it
    monkeypatch.setattr(benchmark.subprocess, "run", lambda words, **_: commands.append(list(map(str, words))))
    for name, (made_of, script, _) in benchmark.FORKS.items():
        benchmark.train(str(tmp_path), 1, name)
        args = tyro.cli(forked(*made_of, base=script).Args, args=commands[-1][2:], use_underscores=True)
        assert Path(commands[-1][1]).is_file() and args.out == f"{tmp_path}/{benchmark.folder(name)}" and args.seed == 1


def test_the_table_is_that_of_the_results(benchmark):
    results = json.loads((ROOT / "benchmarks" / "results" / "forks.json").read_text())["results"]
    assert {name for forks, *_ in benchmark.FORKS.values() for name in forks} == {*forks.names()} - {*PARAMETERS}
    shown = PAGE.split("<!-- forks -->\n")[1].split("<!-- /forks -->")[0]
    assert shown.splitlines() == list(benchmark.table(results))
