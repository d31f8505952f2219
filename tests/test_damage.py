"""Folders of runs that a disk, an editor or a script has damaged: the same result from an older step, or one clear line."""

import json
import os
import random
import re
import shutil
from collections import Counter

import pytest
from launch import quick
from test_kills import course, small_runs, weights

STEPS = {"sft.py": 12, "grpo.py": 8}


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """{script: (flags, folder of the finished run)}"""
    folder = tmp_path_factory.mktemp("damage")
    flags = small_runs(folder, tiny_model)
    for script in STEPS:
        code, *texts = quick(script, out=folder / script, **flags[script])
        assert code == 0, texts
    return {script: (flags[script], folder / script) for script in STEPS}


def interrupted(reference, out):
    """A copy of a finished run that was killed just before it published its model."""
    shutil.copytree(reference, out, symlinks=True)
    shutil.rmtree(out / "model")
    return out


def steps_of(out):
    """{step: folder}, newest first."""
    names = [path.name for path in out.glob("checkpoints/step_*") if re.fullmatch("step_[1-9][0-9]*", path.name)]
    folders = {int(name[5:]): out / "checkpoints" / name for name in names}
    return {step: folders[step] for step in sorted(folders, reverse=True)}


def contents(folder):
    """What is in a folder, links followed: {name: bytes, or what it is if it is no file}."""
    if not folder.is_dir():
        return "no folder"
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes() if os.access(path, os.R_OK) else "unreadable"
        elif not path.is_dir() or path.is_symlink():
            found[str(path.relative_to(folder))] = "neither file nor folder"
    return found


# ---------------------------------------------------------------------------------------------- damaged checkpoints


def a_file(folder, rng):
    """One of its files: of the small ones as likely as of the large."""
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def important(folder, rng):
    names = ("state/.metadata", "states.pt", "sums.json", "model/config.json", "model/model.safetensors")
    return folder / rng.choice(names)


def flip(folder, rng, choose=a_file):
    path = choose(folder, rng)
    data = bytearray(path.read_bytes() or b"\0")
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_important(folder, rng):
    flip(folder, rng, important)


def overwrite(folder, rng):
    path = a_file(folder, rng)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(rng.randrange(size))
        file.write(rng.choice([bytes(16), rng.randbytes(16)]))


def truncate(folder, rng, choose=a_file):
    path = choose(folder, rng)
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, size // 2, max(size - 1, 0)]))


def truncate_important(folder, rng):
    truncate(folder, rng, important)


def append(folder, rng):
    with open(a_file(folder, rng), "ab") as file:
        file.write(rng.choice([b"\0", rng.randbytes(100)]))


def delete(folder, rng):
    rng.choice([a_file, important])(folder, rng).unlink()


def delete_a_folder(folder, rng):
    shutil.rmtree(folder / rng.choice(["state", "model"]))


def delete_all(folder, rng):
    shutil.rmtree(folder)


def empty(folder, rng):
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)


def add_a_file(folder, rng):
    path = folder / rng.choice(["notes.txt", "state/__1_0.distcp", "model/model-00002.safetensors", ".nfs0001", "new/x"])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(rng.choice([b"", b"something"]))


def become_a_folder(folder, rng):
    path = rng.choice([a_file, important])(folder, rng)
    path.unlink()
    path.mkdir()


def become_a_link(folder, rng):
    path = rng.choice([a_file, important])(folder, rng)
    target = rng.choice(["/nowhere/at/all", path.name, "/etc/hostname", ".."])  # dangling, a loop, a foreign file, a folder
    path.unlink()
    path.symlink_to(target)


def become_a_pipe(folder, rng):
    path = rng.choice([a_file, important])(folder, rng)
    path.unlink()
    os.mkfifo(path)


def become_unreadable(folder, rng):
    a_file(folder, rng).chmod(0)


def another(folder, rng):
    return rng.choice([path for path in steps_of(folder.parent.parent).values() if path != folder and path.is_dir()])


def swap(folder, rng):
    other = another(folder, rng)
    name = str(a_file(folder, rng).relative_to(folder))
    (folder / name).rename(folder / "swapped")
    (other / name).rename(folder / name)
    (folder / "swapped").rename(other / name)


def swap_folders(folder, rng):
    """A whole checkpoint under another's name: its own sums fit."""
    other = another(folder, rng)
    folder.rename(folder.with_suffix(".swapping"))
    other.rename(folder)
    folder.with_suffix(".swapping").rename(other)


def forge(folder, rng):
    """sums.json that is JSON, but not of checksums."""
    values = ["{}", "[]", "null", "3", '"x"', '[["a", "b"]]', '{"states.pt": 3}', '{"sums.json": "x"}', "[" * 100_000]
    (folder / "sums.json").write_text(rng.choice(values))


def become_a_file(folder, rng):
    shutil.rmtree(folder)
    folder.write_bytes(b"not a folder")


def become_a_foreign_link(folder, rng):
    """The folder lies elsewhere, whole, and only a link is here: as good as the folder."""
    elsewhere = folder.parent.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    folder.rename(elsewhere / folder.name)
    folder.symlink_to(elsewhere / folder.name)


DAMAGES = [
    flip, flip_important, overwrite, truncate, truncate_important, append, delete, delete_a_folder, delete_all, empty,
    add_a_file, become_a_folder, become_a_link, become_a_pipe, become_unreadable, swap, swap_folders, forge, become_a_file,
    become_a_foreign_link,
]  # fmt: skip


def add_neighbours(out, rng):
    """Names beside checkpoints that are none of ours. Returns {path: contents}."""
    newest = next(iter(steps_of(out).values()))
    names = ["step_22_backup", "step_20.bak", "step_007", "step_8 (copy)", "step_", "step_-2", "step_0", "step_٣", "old"]
    paths = [newest.with_name(name) for name in rng.sample(names, 3)]
    for path in paths:
        shutil.copytree(newest, path)
    (newest.parent / "notes.txt").write_text("mine")
    return {path: contents(path) for path in paths}


def end_of(text):
    return "\n".join(text.splitlines()[-4:])[-800:]


def one_line(code, stdout, stderr):
    """Why this end is not an exit with 1 and one line of error; None if it is."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if code == 1 and len(errors) == 1 and stderr.splitlines()[-1:] == errors and "Traceback" not in stdout + stderr:
        return None
    return f"exit code {code}, {len(errors)} lines of error\n{end_of(stdout)}\n{end_of(stderr)}"


def damage_and_continue(runs, script, kinds, seed, out):
    """Damages some checkpoints of a run and gives its command again.

    Returns (outcome, None), or (None, what is wrong with it).
    """
    flags, reference = runs[script]
    rng = random.Random(seed)
    interrupted(reference, out)
    before = {step: contents(folder) for step, folder in steps_of(out).items()}
    neighbours = add_neighbours(out, rng)
    chosen = [step for i, step in enumerate(before) if i == 0 or rng.random() < 0.4]  # the newest, and others
    if rng.random() < 0.15:
        chosen = list(before)
    for step in chosen:
        folder = out / "checkpoints" / f"step_{step}"
        if folder.is_dir() and not folder.is_symlink() and contents(folder) == before[step]:
            rng.choice(kinds)(folder, rng)
    after = {step: contents(folder) for step, folder in steps_of(out).items()}
    whole = max((step for step, found in after.items() if found == before[step]), default=0)
    damaged = [step for step in after if step > whole]  # and still there
    code, stdout, stderr = quick(script, out=out, timeout=45, **flags)
    about = f"seed {seed}, {script}: steps {chosen} hit, {damaged} damaged, {whole} whole\n"
    for path, found in neighbours.items():
        if contents(path) != found:
            return None, f"{about}{path.name} was touched"
    if not whole and damaged:
        problem = one_line(code, stdout, stderr)
        return (None, about + problem) if problem else ("one line of error", None)
    if code or "Traceback" in stdout + stderr:
        return None, f"{about}exit code {code}\n{end_of(stdout)}\n{end_of(stderr)}"
    if not whole and "has no checkpoint: the run begins anew" not in stdout:
        return None, f"{about}it does not say that it begins anew\n{stdout}"
    if f"step {whole + bool(whole)} of" not in stdout:  # the first line that is printed
        return None, f"{about}it did not go on from step {whole}\n{stdout}"
    warnings = [line for line in stdout.splitlines() if line.startswith("WARNING")]
    named = [step for step in damaged if any(f"step_{step} is damaged" in line for line in warnings)]
    if named != damaged or len(warnings) != len(damaged):
        return None, f"{about}its warnings are {warnings}"
    if course(out) != course(reference):
        return None, f"{about}its metrics or samples are others"
    if weights(out / "model") != weights(reference / "model"):
        return None, f"{about}its weights are others"
    return f"identical, {f'{len(damaged)} set aside' if damaged else 'nothing damaged that is there'}", None


def check(runs, draws, folder):
    """Does all these damages; fails with a list of what went wrong. Prints how often what happened."""
    outcomes, wrong = Counter(), []
    for script, kinds, seed in draws:
        out = folder / "run"
        try:
            outcome, problem = damage_and_continue(runs, script, kinds, seed, out)
        except AssertionError as error:  # it hangs
            outcome, problem = None, f"seed {seed}, {script}: {error}"
        outcomes[outcome or "WRONG"] += 1
        if problem:
            wrong.append(f"{'/'.join(kind.__name__ for kind in kinds[:2])}, {problem}")
        for path in (out, folder / "elsewhere"):
            shutil.rmtree(path, ignore_errors=True)
    print(f"{len(draws)} damaged:", dict(outcomes), flush=True)
    assert not wrong, f"{len(wrong)} of {len(draws)}\n" + "\n\n".join(wrong)


def test_damaged_checkpoints(runs, tmp_path):
    """One damage of each kind. Bit for bit the same from the newest whole checkpoint, whose damaged successors are
    named and set aside; one line where none is whole; what is not ours stays untouched."""
    check(runs, [("sft.py" if i % 8 else "grpo.py", [kind], f"ci {i}") for i, kind in enumerate(DAMAGES)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_two_hundred_damaged_checkpoints(runs, tmp_path, part):
    script = "grpo.py" if part == 3 else "sft.py"
    draws = [(script, [kind], f"{part} {i}") for i, kind in enumerate(DAMAGES)] + [
        (script, DAMAGES, f"{part} {i}") for i in range(len(DAMAGES), 50)
    ]
    check(runs, draws, tmp_path)


# ------------------------------------------------------------------------------------------ damaged configuration, logs


def lines_changed(change):
    """A damage that changes the list of a file's lines."""

    def damage(path, rng):
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines, rng)
        path.write_bytes(b"".join(lines))

    return damage


def in_a_line(text):
    def change(lines, rng):
        lines[rng.randrange(1, len(lines) - 1)] = text + b"\n"

    return lines_changed(change)


def as_first_line(text):
    def change(lines, rng):
        lines[0] = text + b"\n"

    return lines_changed(change)


def written(data):
    return lambda path, rng: path.write_bytes(data)


def become_an_empty_folder(path, rng):
    path.unlink()
    path.mkdir()


WHOLE_FILES = {
    "empty": written(b""),
    "missing": lambda path, rng: path.unlink(),
    "a folder": become_an_empty_folder,
    "a dangling link": lambda path, rng: (path.unlink(), path.symlink_to("/nowhere/at/all")),
    "{}": written(b"{}\n"),
    "[]": written(b"[]\n"),
    "null": written(b"null\n"),
    "garbage": written(b"garbage\n"),
    "zeros": written(bytes(300)),
    "not UTF-8": written(b'{"step": 1, "loss": "\xff\xfe"}\n'),
    "half": lambda path, rng: os.truncate(path, path.stat().st_size // 2),
    "without its last byte": lambda path, rng: os.truncate(path, path.stat().st_size - 1),
    "deep": written(b"[" * 100_000 + b"}\n"),
}
LOGS = WHOLE_FILES | {
    "line {}": in_a_line(b"{}"),
    "line []": in_a_line(b"[]"),
    "line of garbage": in_a_line(b"@@@@@}"),
    "line of zeros": in_a_line(bytes(20)),
    "half a line inside": in_a_line(b'{"step": 3, "lo'),
    "line not UTF-8": in_a_line(b'{"step": 3, "loss": "\xff"}'),
    "step is text": in_a_line(b'{"step": "x"}'),
    "step is null": in_a_line(b'{"step": null}'),
    "step is infinite": in_a_line(b'{"step": Infinity}'),
    "loss is text": as_first_line(b'{"step": 0, "loss": "x", "reward": "x", "eval_loss": "x"}'),
    "loss is a list": as_first_line(b'{"step": 0, "loss": [1], "reward": [1], "eval_loss": [1]}'),
    "first half is gone": lines_changed(lambda lines, rng: lines.__delitem__(slice(0, len(lines) // 2))),
    "a line is gone": lines_changed(lambda lines, rng: lines.pop(3)),
    "a line twice": lines_changed(lambda lines, rng: lines.insert(3, lines[3])),
    "lines in another order": lines_changed(lambda lines, rng: lines.reverse()),
    "an empty line": lines_changed(lambda lines, rng: lines.insert(3, b"\n")),
    "half a line at the end": lines_changed(lambda lines, rng: lines.append(b'{"step": 99, "lo')),
    "Windows line ends": lambda path, rng: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
}
# What a run cannot tell, or need not: a value that has changed in a log is as good as another.
HARMLESS = {
    "metrics.jsonl": {"half a line at the end", "an empty line", "loss is text", "loss is a list"},
    "config.json": set(),
}
HARMLESS["samples.jsonl"] = set(LOGS)  # a log for people: what is read of it is the step of each line


def config_with(**entries):
    def damage(path, rng):
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return damage


def config_without(name):
    def damage(path, rng):
        config = json.loads(path.read_text())
        del config[name]
        path.write_text(json.dumps(config))

    return damage


CONFIGS = WHOLE_FILES | {
    "types": written(b'{"script": 1, "data": 1, "args": 1}'),
    "data: []": config_with(data=[]),
    "data: {}": config_with(data={}),
    "data: null": config_with(data=None),
    "args: []": config_with(args=[]),
    "args: null": config_with(args=None),
    "args: {}": config_with(args={}),
    "date: 5": config_with(date=5),
    "date: text": config_with(date="yesterday"),
    "date: []": config_with(date=[]),
    "steps: text": config_with(steps="x"),
    "steps: null": config_with(steps=None),
    "no steps": config_without("steps"),
    "no date": config_without("date"),
    "no versions": config_without("versions"),
    "process: []": config_with(process=[]),
    "a learning rate of another run": lambda path, rng: path.write_text(path.read_text().replace('"lr": 0.001', '"lr": 0.002')),
}  # fmt: skip
CASES = [("config.json", kind, damage, finished) for kind, damage in CONFIGS.items() for finished in (False, True)]
CASES += [(name, kind, damage, False) for name in ("metrics.jsonl", "samples.jsonl") for kind, damage in LOGS.items()]
DEBRIS = {
    "a file": written(b"something"),
    "a folder": lambda path, rng: path.mkdir(),
    "a dangling link": lambda path, rng: path.symlink_to("/nowhere/at/all"),
}
NAMES = ("model.tmp", "config.tmp", "metrics.tmp", "checkpoints/step_12.tmp", "checkpoints/step_4.trash", "checkpoints/mine")
CASES += [(name, kind, damage, False) for name in NAMES for kind, damage in DEBRIS.items()]
CI = [case for i, case in enumerate(CASES) if i % 8 == 1]


@pytest.mark.parametrize("cases", [pytest.param(CI, id="some"), pytest.param(CASES, id="all", marks=pytest.mark.slow)])
def test_damaged_configuration_and_logs(runs, tmp_path, cases):
    """The weights of the run, and its log or a warning; or one line that names the file. Debris of any kind, too."""
    outcomes, wrong = Counter(), []
    for name, kind, damage, finished in cases:
        flags, reference = runs["grpo.py" if name == "samples.jsonl" else "sft.py"]
        out = tmp_path / "run"
        (shutil.copytree if finished else interrupted)(reference, out)
        damage(out / name, random.Random(kind))
        try:
            code, stdout, stderr = quick("grpo.py" if name == "samples.jsonl" else "sft.py", out=out, timeout=45, **flags)
            outcome = judge(name, kind, out, reference, code, stdout, stderr)
        except AssertionError as error:
            outcome = f"WRONG: {error}"
        if outcome.startswith("WRONG"):
            wrong.append(f"{name}, {kind}, {'finished' if finished else 'interrupted'}: {outcome}")
        outcomes[outcome[:5] if outcome.startswith("WRONG") else outcome] += 1
        shutil.rmtree(out)
    print(f"{len(cases)} damaged files:", dict(outcomes), flush=True)
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n\n".join(wrong)


def judge(name, kind, out, reference, code, stdout, stderr):
    """What a run made of its damaged file, in words; they begin with WRONG if it is nothing it may."""
    if code:
        problem = one_line(code, stdout, stderr)
        problem = problem or ("" if name in stderr or "another run" in stderr else f"it does not name the file: {stderr}")
        return f"WRONG: {problem}" if problem else "one line of error"
    if "Traceback" in stdout + stderr:
        return f"WRONG: a traceback\n{end_of(stderr)}"
    if weights(out / "model") != weights(reference / "model"):
        return "WRONG: other weights"
    if "WARNING" in stdout:
        return "identical weights, and a warning"
    if course(out) == course(reference):
        return "identical"
    return "identical weights, other samples" if kind in HARMLESS.get(name, ()) else f"WRONG: in silence, {name} is another\n{stdout}"
