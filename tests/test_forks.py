"""Forks: the gradient of each against its paper's equation, written down once more; and what make.py refuses."""

import ast
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import forked, forks
from readability import flags, no_dead_flag, sources

import common

LONGEST, BUFFER, CLIP = 16, 4, (0.05, 0.1)


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
    constant (arXiv 2503.20783), DAPO's penalty (arXiv 2503.14476, equation 13); all else is grpo.py's."""
    if name not in (None, "gspo", "sequence_mean", "dr_grpo", "overlong_penalty"):
        pytest.fail(f"there is no equation for the fork {name} here: write it down")
    logprobs = [values.clone().requires_grad_() for values in logprobs]
    total, tokens = 0.0, sum(len(values) for values in logprobs)

    def reward(sample):
        over = max(0, int(sample.trained.sum()) - (LONGEST - BUFFER)) / BUFFER
        return sample.reward - (over if name == "overlong_penalty" else 0)

    for sample, logp in zip(made, logprobs, strict=True):
        group = [reward(other) for other in made if other.position == sample.position]
        advantage = reward(sample) - sum(group) / len(group)
        old, behaviour, ref = (torch.from_numpy(x) for x in (sample.old_logprobs, sample.behaviour_logprobs, sample.ref_logprobs))
        ratio = (logp - old).exp()
        if name == "gspo":
            ratio = (logp.exp().prod() / old.exp().prod()) ** (1 / len(logp)) * torch.ones(len(logp), dtype=torch.float64)
        for t in range(len(logp)):
            clipped = min(max(ratio[t].item(), 1 - CLIP[0]), 1 + CLIP[1]) * advantage
            objective = ratio[t] * advantage if ratio[t].item() * advantage <= clipped else torch.tensor(clipped)
            w = min((old[t] - behaviour[t]).exp().item(), args.tis_cap)
            kl = (ref[t] - logp[t]).exp() - (ref[t] - logp[t]) - 1
            share = {"sequence_mean": 1 / (len(made) * len(logp)), "dr_grpo": 1 / (len(made) * LONGEST)}.get(name, 1 / tokens)
            total = total + share * (-w * objective + args.kl_beta * kl)
    total.backward()
    return torch.cat([values.grad for values in logprobs])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [None, *forks.names()])
def test_gradient_is_the_papers(name, seed):
    script = forked(*([name] if name else []))
    args = script.Args(max_new_tokens=LONGEST, clip_low=CLIP[0], clip_high=CLIP[1], kl_beta=0.1)
    if name == "overlong_penalty":
        args.overlong_buffer = BUFFER
    made = samples(script, seed)
    rng = np.random.default_rng(seed + 100)
    logprobs = [torch.from_numpy(sample.old_logprobs + rng.normal(0, 0.1, len(sample.old_logprobs))) for sample in made]
    ours, papers = gradient_of_script(script, args, made, logprobs), gradient_of_equation(name, args, made, logprobs)
    torch.testing.assert_close(ours, papers, rtol=1e-5, atol=1e-8)  # numbers are packed in float32
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("names", [[name] for name in forks.names()] + [["gspo", "sequence_mean"]], ids=str)
def test_what_is_made_is_one_of_our_scripts(names):
    """Same sections, no flag and no function without use, its own folder for runs, and the papers' sources on top."""
    made = forks.make(names)
    assert not forks.unused(made) and not no_dead_flag({**sources(), "grpo.py": made})
    assert flags(made)["out"][1] == f"'runs/{'_'.join(names)}'"
    docstring = ast.get_docstring(ast.parse(made))
    assert "arXiv" in docstring and "Group relative policy optimisation" in docstring
    command = [sys.executable, ROOT / "forks" / "make.py", *names]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpso"], r"error: no fork is named gpso; there are dr_grpo, gspo"),
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
