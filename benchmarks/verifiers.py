"""What verdicts cost, and how many are right, beside open-instruct's and TRL's: benchmarks/results/verifiers.json.

    python benchmarks/verifiers.py                                                  ours alone
    python benchmarks/verifiers.py --open_instruct FOLDER --packages FOLDER         10 minutes

--open_instruct is a checkout of allenai/open-instruct; --packages has what it needs and we do not: pip install --target
FOLDER antlr4-python3-runtime==4.11 immutabledict nltk absl-py fastapi uvicorn. TRL is that of requirements-bench.txt,
perhaps on PYTHONPATH. A contestant that cannot be imported is listed with the reason.

Contestants judge the same completions against the same ground truths, one after the other in each round, each in a
process of its own that is new in every round (nothing is cached from the round before), all on the same core. Rates are
verdicts per second of processor time, of the process and of all that it starts, because other work on the machine does
not change that much; the median of the rounds counts. Starting and the first verdict of each kind are not counted.

    postcard              a Pool of one worker, as the scripts have it: from completions to verdicts
    postcard_in_process   rewards.judge, without the process that can be killed
    open_instruct         its verifiers, called in the main thread, where the five seconds that it gives sympy hold.
                          Programs go to its own server, in one process on the same core
    open_instruct_threads the same by `async_call`, as its `apply_verifiable_reward` asks them: in threads, where its
                          limit of five seconds raises an exception that counts as "not equal", so that sympy is never
                          asked and texts decide alone
    trl                   accuracy_reward, which is for mathematics; a ground truth becomes `$ground truth$`, since its
                          parser wants formulas

Completions: the solutions of four models to GSM8K's test questions, which end in "A: 18" (no formula, and so no answer
for TRL's parser); MATH-500's solutions, each against its own answer and against the next problem's (right only if the
two are the same text); assistants' turns of Open Assistant for IFEval's prompts (few follow them: only time counts);
the reference programs of MBPP and HumanEval for their tests, and each for another row's. What open-instruct raises an
exception for (IFEval's sentences and words need a model of nltk's) is left out of the times for everybody.

Verdicts: the triples of shared/data/verdicts, made from complaints about verifiers, ours above all, which were mended
on them: they say what those of others do with the same cases, not who is better on new ones.

Then of ours alone: ordinary and hostile answers, one at a time; programs and the audit of code rows.
"""

import hashlib
import json
import logging
import os
import select
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import hostile  # noqa: E402
from sft_vs_trl import environment  # noqa: E402

from rewards import Pool, judge, sandbox  # noqa: E402
from rewards.audit import audit  # noqa: E402

SOURCES = ("rewards", "benchmarks/verifiers.py")
PATIENCE = 60.0  # seconds on the clock for one triple; then the contestant is killed and started anew


@dataclass
class Args:
    data: str = "../shared/data"  # a folder with gsm8k, math, ifeval, code, chat, verdicts
    open_instruct: str | None = None  # a checkout of allenai/open-instruct
    packages: str = ""  # only for it: its ANTLR is another than ours
    rounds: int = 3
    amount: int = 400  # completions, about; ten times as many of GSM8K, a fifth for programs
    ours_too: bool = True  # the measurements of ours alone: two minutes
    contestant: str | None = None  # judges what comes on stdin: this file starts such processes
    out: str = "benchmarks/results/verifiers.json"


# ---------------------------------------------------------------- what is judged: (verifier, completion, ground truth)


def lines(args, name):
    path = Path(args.data, name)
    if not path.is_file():
        sys.exit(f"error: {path}: no such file; --data is a folder with gsm8k, math, ifeval, code and chat")
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def gsm8k(args):
    for row in lines(args, "gsm8k/model_solutions.jsonl"):
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            answer = row["ground_truth"].rpartition("A: ")[2].replace(",", "")
            yield "gsm8k", row[model]["solution"], answer, row[model]["is_correct"]


def math_500(args):
    rows = list(lines(args, "math/math500.jsonl"))
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        yield "math", row["solution"], row["answer"], True
        yield "math", row["solution"], other["answer"], row["answer"] == other["answer"]


def ifeval(args):
    threads = list(lines(args, "chat/oasst_en_threads.jsonl"))
    for i, row in enumerate(lines(args, "ifeval/input_data.jsonl")):
        gold = {name: row[name] for name in ("instruction_id_list", "kwargs")}
        yield "ifeval", threads[i % len(threads)]["messages"][-1]["content"], gold, None


def code(args):
    mbpp = [
        (row["code"], ["\n".join([*row["test_imports"], test]) for test in row["test_list"]])
        for row in lines(args, "code/mbpp_sanitized.jsonl")
    ]
    human_eval = [
        (row["prompt"] + row["canonical_solution"], [f"{row['test']}\ncheck({row['entry_point']})"])
        for row in lines(args, "code/humaneval.jsonl")
    ]
    rows = [row for pair in zip(mbpp, human_eval, strict=False) for row in pair]
    for (program, tests), (_, other) in zip(rows, rows[2:] + rows[:2], strict=True):
        yield "code", f"```python\n{program}\n```", tests, True
        yield "code", f"```python\n{program}\n```", other, False


KINDS = {"gsm8k": gsm8k, "math": math_500, "ifeval": ifeval, "code": code}
SHARES = {"gsm8k": 10, "math": 1, "ifeval": 1, "code": 0.2}  # of --amount; processor time is known to 0.01 s
FIRST = [  # of each kind one, before the time counts
    ("gsm8k", "5", "5"),
    ("math", r"$\boxed{\frac{1}{2}}$", "0.5"),
    ("ifeval", "It is so.", {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "en"}]}),
    ("code", "```python\ndef f(x):\n    return x\n```", ["assert f(1) == 1", "assert f(2) == 2"]),
]


# ---------------------------------------------------------------- contestants, each in a process of its own


class Postcard:
    kinds = ("gsm8k", "math", "ifeval", "code", "exact", "contains")

    def __init__(self, args):
        self.pool = Pool(1, max_failed=1.0)

    def judge(self, jobs):
        return self.scores(self.pool.score(jobs))

    def scores(self, verdicts):
        return [verdict.reward if verdict.is_judged else verdict.reason for verdict in verdicts]


class PostcardInProcess(Postcard):
    def __init__(self, args):
        pass

    def judge(self, jobs):
        return self.scores(judge(*job) for job in jobs)


class OpenInstruct:
    kinds = ("gsm8k", "math", "ifeval", "code")

    def __init__(self, args):
        from unittest.mock import MagicMock

        if not args.open_instruct:
            raise ImportError("no --open_instruct FOLDER")
        path = [args.open_instruct, args.packages]
        sys.path[:0] = path
        # What these load (ray, vLLM, litellm ...) the verifiers below do not use.
        for name in ("utils", "context_window_checker", "rubrics", "rubrics.prompts", "rubrics.run_utils"):
            sys.modules[f"open_instruct.{name}"] = MagicMock()
        from open_instruct import ground_truth_utils as module

        port = 20000 + os.getpid() % 20000
        command = [sys.executable, "-m", "uvicorn", "open_instruct.code_utils.api:app", "--port", str(port)]
        self.server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)})
        address = f"http://127.0.0.1:{port}"
        self.wait_for(f"{address}/health")
        self.verifiers = {
            "gsm8k": module.GSM8KVerifier(),
            "math": module.MathVerifier(),
            "ifeval": module.IFEvalVerifier(),
            "code": module.CodeVerifier(module.CodeVerifierConfig(f"{address}/test_program", 1.0, 0.0, False)),
            "stdio": module.CodeVerifier(module.CodeVerifierConfig(f"{address}/test_program_stdio", 1.0, 0.0, False)),
        }

    def wait_for(self, address):
        import requests

        while self.server.poll() is None:
            with suppress(requests.ConnectionError):
                requests.get(address)
                return
            time.sleep(0.2)
        raise ImportError("its server of programs does not start")

    def question(self, kind, completion, ground_truth):
        """(verifier, arguments)"""
        if kind == "ifeval":
            ids, arguments = ground_truth["instruction_id_list"], ground_truth["kwargs"]
            ground_truth = repr([{"instruction_id": ids, "kwargs": arguments}])
        if kind == "code":
            tests = ground_truth
            with suppress(ValueError, TypeError):
                tests = json.loads(tests)
            if isinstance(tests, list) and tests and isinstance(tests[0], dict):
                kind = "stdio"
        return self.verifiers[kind], ([], completion, ground_truth)

    def judge(self, jobs):
        scores = []
        for job in jobs:
            try:
                verifier, arguments = self.question(*job)
                scores.append(verifier(*arguments).score)
            except Exception as error:
                scores.append(type(error).__name__)
        return scores


class OpenInstructThreads(OpenInstruct):
    def judge(self, jobs):
        import asyncio

        async def ask_all():
            questions = [self.question(*job) for job in jobs]
            calls = [verifier.async_call(*arguments) for verifier, arguments in questions]
            return await asyncio.gather(*calls, return_exceptions=True)

        return [type(got).__name__ if isinstance(got, Exception) else got.score for got in asyncio.run(ask_all())]


class Trl:
    kinds = ("gsm8k", "math")

    def __init__(self, args):
        from trl.rewards import accuracy_reward

        self.function = accuracy_reward

    def judge(self, jobs):
        scores = []
        for _, completion, ground_truth in jobs:
            try:
                (score,) = self.function([[{"content": completion}]], [f"${ground_truth}$"])
                scores.append("unparsed ground truth" if score is None else score)
            except Exception as error:
                scores.append(type(error).__name__)
        return scores


CONTESTANTS = {
    "postcard": Postcard,
    "postcard_in_process": PostcardInProcess,
    "open_instruct": OpenInstruct,
    "open_instruct_threads": OpenInstructThreads,
    "trl": Trl,
}


def serve(args):
    """The main program of a contestant: a line of jobs in, a line of scores out. A score may be what went wrong."""
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what the libraries print
    os.dup2(null, 2)
    logging.disable()
    try:
        contestant = CONTESTANTS[args.contestant](args)
        contestant.judge([job for job in FIRST if job[0] in contestant.kinds])
    except Exception as error:
        replies.write(json.dumps({"error": str(error).partition("\n")[0]}) + "\n")
        return
    replies.write(json.dumps({"kinds": contestant.kinds}) + "\n")
    replies.flush()
    for line in sys.stdin:
        start = time.perf_counter()
        scores = contestant.judge([tuple(job) for job in json.loads(line)])
        replies.write(json.dumps({"scores": scores, "seconds": time.perf_counter() - start}) + "\n")
        replies.flush()


class Process:
    """A contestant's process. `error`: why it cannot take part, or None."""

    def __init__(self, name, args):
        command = [sys.executable, __file__, "--contestant", name, "--data", args.data]
        if args.open_instruct:
            command += ["--open_instruct", str(Path(args.open_instruct).resolve())]
            command += ["--packages", str(Path(args.packages).resolve())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        said = self.read()
        self.error = said.get("error")
        self.kinds = said.get("kinds")

    def read(self, patience=None):
        """Its next line; None if that does not come in time."""
        if not select.select([self.process.stdout], [], [], patience)[0]:
            return None
        return json.loads(self.process.stdout.readline() or '{"error": "it has died"}')

    def judge(self, jobs, patience=None):
        """Its reply with "cpu_seconds" of it and all that it has started; None if that does not come in time."""
        before = self.cpu_seconds()
        self.process.stdin.write(json.dumps([job[:3] for job in jobs]).encode() + b"\n")
        self.process.stdin.flush()
        reply = self.read(patience)
        return reply and {**reply, "cpu_seconds": self.cpu_seconds() - before}

    def cpu_seconds(self):
        total = 0.0
        for pid in sandbox.family(self.process.pid):
            with suppress(OSError):  # it has just ended, and its parent counts it
                total += sandbox.processor_time(pid)
        return total

    def close(self):
        for pid in reversed(sandbox.family(self.process.pid)):
            with suppress(OSError):
                os.kill(pid, 9)
        self.process.wait()


# ---------------------------------------------------------------- the contest


def contest(args):
    """(times of each kind, verdicts on the triples, {contestant: why it did not take part})"""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    jobs = {kind: list(islice(make(args), int(args.amount * SHARES[kind]))) for kind, make in KINDS.items()}
    absent = {}
    left_out = {}
    for name in CONTESTANTS:
        process = Process(name, args)
        if process.error:
            absent[name] = process.error
        elif name == "open_instruct":
            for kind, those in jobs.items():
                scores = process.judge(those)["scores"]
                jobs[kind] = [job for job, score in zip(those, scores, strict=True) if not isinstance(score, str)]
                left_out[kind] = len(those) - len(jobs[kind])
        process.close()
    names = [name for name in CONTESTANTS if name not in absent]
    replies = {kind: {name: [] for name in names} for kind in KINDS}
    for _ in range(args.rounds):
        for name in names:
            process = Process(name, args)
            for kind in process.kinds:
                if kind in jobs:
                    replies[kind][name].append(process.judge(jobs[kind]))
            process.close()
    times = {}
    for kind, by_name in replies.items():
        times[kind] = by_name = {name: rates(jobs[kind], got) for name, got in by_name.items() if got}
        ours = by_name["postcard"]["verdicts per second and core"]
        for result in by_name.values():
            result["postcard is faster by"] = ours / result["verdicts per second and core"]
        by_name["completions"] = len(jobs[kind])
        by_name["left out"] = left_out.get(kind, 0)
    return times, {name: triples(name, args) for name in names}, absent


def rates(jobs, replies):
    """What the rounds of one contestant and kind come to; right verdicts where the right one is known."""
    cpu = max(0.01, statistics.median(reply["cpu_seconds"] for reply in replies))
    known = [(job[3], score) for job, score in zip(jobs, replies[0]["scores"], strict=True) if job[3] is not None]
    return {
        "verdicts per second and core": len(jobs) / cpu,
        "cpu seconds": [reply["cpu_seconds"] for reply in replies],
        "seconds": [reply["seconds"] for reply in replies],
        "right verdicts": f"{sum((score == 1) == right for right, score in known)} of {len(known)}" if known else None,
    }


def triples(name, args):
    """{kind: what a contestant makes of the triples}. Not judged: it raises, is killed, or gives no reward."""
    if not Path(args.data, "verdicts/cases.jsonl").is_file():
        return {}
    counts = {}
    process = Process(name, args)
    for case in lines(args, "verdicts/cases.jsonl"):
        if case["verifier"] not in process.kinds:
            continue
        count = counts.setdefault(case["verifier"], {"right": 0, "not judged": 0, "of": 0})
        reply = process.judge([(case["verifier"], case["completion"], case["ground_truth"])], PATIENCE)
        if reply is None or "error" in reply:
            process.close()
            process = Process(name, args)
            reply = {"scores": ["killed"]}
        (score,) = reply["scores"]
        count["of"] += 1
        count["not judged"] += isinstance(score, str)
        count["right"] += not isinstance(score, str) and (score == 1) == case["right"]
    process.close()
    return counts


def table(times, verdicts, absent):
    """The same as markdown."""
    names = [name for name in CONTESTANTS if name not in absent]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for kind, by_name in times.items():
        row = [f"{kind}, {by_name['completions']} completions: verdicts per CPU second (right)"]
        for name in names:
            got = by_name.get(name)
            right = f" ({got['right verdicts']})" if got and got["right verdicts"] else ""
            row.append(f"{got['verdicts per second and core']:,.0f}{right}" if got else "no verifier")
        rows.append(row)
    for kind in KINDS:
        row = [f"{kind}, triples: right (not judged) of"]
        for name in names:
            got = verdicts[name].get(kind)
            row.append(f"{got['right']} ({got['not judged']}) of {got['of']}" if got else "no verifier")
        rows.append(row)
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return text + "".join(f"\n{name}: not run: {reason}" for name, reason in absent.items())


# ---------------------------------------------------------------- of ours alone


def problems(args):
    return [(row["solution"], row["answer"]) for row in lines(args, "math/math500.jsonl")]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def ordinary(pairs):
    """In this process, for the time of each; then by a pool, for false timeouts and the rate."""
    logging.disable()  # math-verify warns that nobody times it
    judge("math", r"\boxed{1}", "1")
    times = {}
    for name, shift in (("right", 0), ("wrong", 1)):
        times[name] = []
        for (solution, _), (_, answer) in zip(pairs, pairs[shift:] + pairs[:shift], strict=True):
            start = time.process_time()
            judge("math", solution, answer)
            times[name].append(time.process_time() - start)
    with Pool() as pool:
        jobs = [("math", solution, answer) for solution, answer in pairs]
        pool.score(jobs[:20])
        start = time.perf_counter()
        reasons = [verdict.reason for verdict in pool.score(jobs + jobs)]
        rate = len(reasons) / (time.perf_counter() - start)
        workers = len(pool.workers)
    quantiles = {name: statistics.quantiles(values, n=100) for name, values in times.items()}
    return {
        "verdicts per second and core, right": len(pairs) / sum(times["right"]),
        "verdicts per second and core, wrong": len(pairs) / sum(times["wrong"]),
        "milliseconds, median": {name: 1000 * q[49] for name, q in quantiles.items()},
        "milliseconds, 99 %": {name: 1000 * q[98] for name, q in quantiles.items()},
        f"verdicts per second by {workers} workers, right": rate,
        "false timeouts": reasons.count("timeout"),
    }


def hostile_texts():
    with Pool(1, max_failed=1.0) as pool:
        pool.score([("math", r"\boxed{1}", "1")])
        before, times, reasons = resident(), [], []
        for text in hostile.completions():
            start = time.perf_counter()
            reasons += [verdict.reason for verdict in pool.score([("math", text, "5")])]
            times.append(time.perf_counter() - start)
        right = pool.score([("math", rf"\boxed{{{i}}}", str(i)) for i in range(100)])
        return {
            "texts": len(times),
            "killed": reasons.count("timeout"),
            "crashed": reasons.count("crash"),
            "seconds, worst": max(times),
            "seconds, all": sum(times),
            "growth of the caller, MiB": resident() - before,
            "right of 100 right answers afterwards": sum(verdict.reward for verdict in right),
        }


def programs(args):
    run = [seconds(sandbox.run, "print(int(input()) + 1)", "1\n") for _ in range(50)]
    test = [seconds(sandbox.test, "def f(x): return x + 1", ["assert f(1) == 2"], ["f"]) for _ in range(50)]
    median = statistics.median
    rows = [(tests, completion) for _, completion, tests, is_right in code(args) if is_right][:30]
    audits = {}
    for name in ("without reference", "with reference"):
        with Pool(1) as pool:
            pool.score([FIRST[-1]])
            took = seconds(audit, pool, [
                ("code", completion.strip("`").removeprefix("python\n") if name == "with reference" else None, tests)
                for tests, completion in rows
            ])  # fmt: skip
        audits[f"milliseconds, audit of a row {name}"] = 1000 * took / len(rows)
    return {"milliseconds, script": 1000 * median(run), "milliseconds, functions": 1000 * median(test), **audits}


def main(args):
    results = {}
    if args.ours_too:
        results |= {
            "ordinary answers": ordinary(problems(args)),
            "hostile answers": hostile_texts(),
            "programs": programs(args),
        }
    times, verdicts, absent = contest(args)
    print(table(times, verdicts, absent))
    results |= {"times": times, "verdicts on triples": verdicts, "not run": absent}
    if args.open_instruct:
        file = Path(args.open_instruct, "open_instruct/ground_truth_utils.py")
        if file.is_file():
            results["sha256 of open_instruct/ground_truth_utils.py"] = hashlib.sha256(file.read_bytes()).hexdigest()
    results["missing layers of the sandbox"] = sandbox.missing_layers()
    results["environment"] = environment("verifiers.py", *SOURCES, packages=("math-verify", "sympy", "trl"))
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    import tyro

    args = tyro.cli(Args, description=__doc__, use_underscores=True)
    if args.contestant:
        serve(args)
    else:
        main(args)
