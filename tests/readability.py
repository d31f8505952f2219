"""What a reader has to read, measured: `python tests/readability.py` prints the table.

Two kinds of rules. Gates hold what a reader relies on: the order of the sections, plumbing that is the same everywhere,
first pages whose diff is the algorithm. The others measure how much there is to read, in Python tokens (counted lines
made lines fat). They are printed, and complain only 15 % above the value at the top of this file: nobody should have to
buy a number with denser code, and a pull request of a few lines passes.

Every rule is a function from sources to complaints, so that its own test can show it a source that breaks it. Only files
of the project are looked at, not what a forker has beside them.
"""

import ast
import difflib
import io
import subprocess
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ("sft.py", "reward_model.py", "dpo.py", "grpo.py", "ppo_rlvr.py")
TOP_LEVEL = {*SCRIPTS, "common.py"}

# Functions and classes that bear the same name in several scripts and differ, with the reason. All others are identical.
MAY_DIFFER = {
    "main": "the algorithm",
    "Policy": "its forward returns what the algorithm's loss is made of",
    "evaluate": "the algorithm's loss and metrics over held-out data",
    "Sample": "the numbers of its tokens that the algorithm's loss needs",
    "set_advantages": "of a group, or of a value model",
    "set_loss_weights": "its docstring names the equations",
    "policy_loss": "GRPO's has a KL term, and may do without π_old",
    "check_flags": "the flags of each algorithm's own loss",
    "mean_of_updates": "GRPO may have no update in a step",
}
# Flags whose default is the paper's for that algorithm, or what fits 80 GB; type and help are the same everywhere.
OWN_DEFAULTS = {
    "lr", "lr_schedule", "warmup_ratio", "batch_size", "epochs", "max_length", "weight_decay", "overlong", "group_size",
    "clip_high", "kl_beta", "passes", "model", "data", "out", "slots", "activation_checkpointing", "no_eos_score",
    "save_every",
}  # fmt: skip

PLUMBING = "# Plumbing: optimizer, sums, processes, models, files. Nobody has to read it: the same text in every script, by design."
MAX_PLUMBING = 400  # raw lines
MAX_DIFF = {  # sft.py answers held-out prompts, which reward_model.py cannot
    ("sft.py", "dpo.py"): 200, ("sft.py", "reward_model.py"): 205, ("grpo.py", "ppo_rlvr.py"): 300
}  # fmt: skip
MAX_LINE, MAX_NESTING, MAX_PARAMETERS = 120, 3, 6

# As measured when this file was written. A complaint comes at 15 % more.
LOOP_AT = {"sft.py": 147, "reward_model.py": 198, "dpo.py": 208, "grpo.py": 261, "ppo_rlvr.py": 327}  # raw line
FIRST_PAGE = {"sft.py": 1059, "reward_model.py": 1427, "dpo.py": 1464, "grpo.py": 1997, "ppo_rlvr.py": 2677}  # tokens
FIRST_PAGE_DENSITY = 9.0  # tokens a code line
DENSITY = 10.5
ROOM = 1.15


def sources():
    """{name: text} of the product's Python files."""
    paths = [ROOT / name for name in sorted(TOP_LEVEL)]
    for folder in ("kernels", "rewards", "forks"):
        paths += sorted((ROOT / folder).glob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def scripts(files):
    return {name: files[name] for name in SCRIPTS}


@cache
def parse(text):
    return ast.parse(text)


@cache
def code_tokens(text):
    """Tokens of code: no comments, docstrings, line ends and indentation."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    documentation = set()
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documentation.update(range(node.lineno, node.end_lineno + 1))  # and the strings after fields
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [t for t in tokens if t.type not in skipped and t.start[0] not in documentation]


def code_lines(tokens):
    """Numbers of the lines that hold them."""
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}


def density(tokens):
    return len(tokens) / max(1, len(code_lines(tokens)))


def main_of(text):
    return next(node for node in parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "main")


def first_page(text):
    """From the top to the end of `main`."""
    return "\n".join(text.splitlines()[: main_of(text).end_lineno]) + "\n"


def loop_line(text):
    """Where the training loop begins."""
    loops = [node for node in ast.walk(main_of(text)) if isinstance(node, ast.For)]
    return next(node.lineno for node in loops if ast.unparse(node.target) == "step")


def changed_lines(a, b):
    """Raw lines that `diff` prints of two texts."""
    changed = [line for line in difflib.unified_diff(a.splitlines(), b.splitlines(), n=0) if line[0] in "+-"]
    return max(0, len(changed) - 2)


# ------------------------------------------------------------------------------------------------------------- gates


def newspaper_order(files):
    """Docstring, imports, Args, model, what the equations need, main; then what is shared, and plumbing last."""
    complaints = []
    for name, text in scripts(files).items():
        tree = parse(text)
        if ast.get_docstring(tree) is None or "(1)" not in ast.get_docstring(tree):
            complaints.append(f"{name} does not begin with its equations")
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        page = names[: names.index("main") + 1]
        expected = [word for word in ("Args", "Policy", "RewardModel", "evaluate", "main") if word in page]
        if page[0] != "Args" or [word for word in page if word in expected] != expected:
            complaints.append(f"{name}: its first page is {', '.join(page)}")
        if isinstance(tree.body[-1], ast.If) and "__main__" not in ast.unparse(tree.body[-1].test):
            complaints.append(f"{name} does not end with its entry")
        if not 0 < text.find("def main") < text.find(PLUMBING):
            complaints.append(f"{name}: the plumbing is not last")
    return complaints


def plumbing(files):
    """The end of every script is the same to the letter, and short."""
    ends = {name: text[text.find(PLUMBING) :] for name, text in scripts(files).items()}
    complaints = [f"the end of {name} differs from {SCRIPTS[0]}'s" for name in ends if ends[name] != ends[SCRIPTS[0]]]
    lines = ends[SCRIPTS[0]].count("\n")
    if lines > MAX_PLUMBING:
        complaints.append(f"{lines} lines of plumbing, limit {MAX_PLUMBING}")
    return complaints


def same_name_same_source(files):
    """What scripts share is identical to the letter."""
    seen, complaints = {}, []
    for name, text in scripts(files).items():
        for node in parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in {"Args", *MAY_DIFFER}:
                first, source = seen.setdefault(node.name, (name, ast.get_source_segment(text, node)))
                if source != ast.get_source_segment(text, node):
                    complaints.append(f"{node.name} differs between {first} and {name}")
    return complaints


def differences(files):
    """The diff of two first pages is short enough to be read."""
    complaints = []
    for (a, b), limit in MAX_DIFF.items():
        changed = changed_lines(first_page(files[a]), first_page(files[b]))
        if changed > limit:
            complaints.append(f"diff of the first pages of {a} and {b}: {changed} lines, limit {limit}")
    return complaints


def flags(text):
    """{flag: (type, default, help)} of a script's Args. The help is behind the field, or a string after it."""
    body = next(node.body for node in parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    lines = text.splitlines()
    fields = {}
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            _, _, help_text = lines[field.lineno - 1].partition("  # ")
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                help_text = after.value.value
            default = ast.unparse(field.value) if field.value else None
            fields[field.target.id] = ast.unparse(field.annotation), default, help_text
    return fields


def same_flag_same_meaning(files):
    """One flag has one type and one help, and one default unless it is the paper's."""
    seen, complaints = {}, []
    for name, text in scripts(files).items():
        for flag, (kind, default, help_text) in flags(text).items():
            if not help_text:
                complaints.append(f"{name}: --{flag} has no help")
            if default is None:
                complaints.append(f"{name}: --{flag} has no default")
            known = (kind, help_text, None if flag in OWN_DEFAULTS else default)
            if seen.setdefault(flag, known) != known:
                complaints.append(f"{name}: --{flag} differs from another script's")
    return complaints


def attributes(tree, owner):
    """Names read of `owner`, or of an attribute of that name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if ast.unparse(node.value).split(".")[-1] == owner}


def no_dead_flag(files):
    """Every flag is read, by the script or by what it hands `args` to, and none is overwritten."""
    complaints = []
    read_elsewhere = {name: attributes(parse(files[name]), "args") for name in ("common.py", "rewards/environment.py")}
    for name, text in scripts(files).items():
        uses = [n for n in ast.walk(parse(text)) if isinstance(n, ast.Attribute) and ast.unparse(n.value).endswith("args")]
        read = {n.attr for n in uses if isinstance(n.ctx, ast.Load)} | read_elsewhere["common.py"]
        if "Rollouts(args" in text:
            read |= read_elsewhere["rewards/environment.py"]
        complaints += [f"{name}: --{flag} is never read" for flag in flags(text) if flag not in read]
        complaints += [f"{name}: args.{n.attr} is overwritten" for n in uses if not isinstance(n.ctx, ast.Load)]
    return complaints


def plain_first_page(files):
    """No walrus, no |= and | on dicts, no text times a bool, no packed assignment of unlike things, no rebound step."""
    complaints = []
    for name, text in scripts(files).items():
        tree, end = parse(text), main_of(text).end_lineno
        for node in ast.walk(tree):
            if getattr(node, "lineno", end + 1) > end:
                continue
            packed = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            packed = packed and isinstance(node.value, ast.Tuple)
            merged = isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr)
            merged |= isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and isinstance(node.right, ast.Dict)
            repeated = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
            repeated = repeated and any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right))
            rebound = isinstance(node, ast.Assign | ast.AugAssign) and "step" in ast.unparse(node).split(" ")[0].split(",")
            if packed or merged or repeated or rebound or isinstance(node, ast.NamedExpr):
                complaints.append(f"{name}:{node.lineno}: {ast.unparse(node)[:60]}")
    return complaints


def imported(name, text, files):
    """The project's files that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Import):
            found.update(f"{alias.name.replace('.', '/')}.py" for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = node.module.replace(".", "/")
            for alias in node.names:  # from a package: a module of it, or a name in its __init__
                submodule = f"{module}/{alias.name}.py"
                found.update({submodule} if submodule in files else {f"{module}.py", f"{module}/__init__.py"})
    return (found & files.keys()) - {name}


def imports(files):
    """A script imports common, rewards and kernels, never another script; and there is no circle."""
    graph = {name: imported(name, text, files) for name, text in files.items()}
    complaints = [f"{name} imports {other}" for name in graph for other in graph[name] if other in SCRIPTS]
    for start in graph:
        reached, fresh = set(), set(graph[start])
        while fresh:
            reached |= fresh
            fresh = set().union(*(graph[name] for name in fresh)) - reached
        if start in reached:
            complaints.append(f"{start} is in a circle of imports")
    return complaints


def top_level(files):
    """`ls` shows the five algorithms, common.py and folders. What git does not know is a forker's own business."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = {*listed, *files}
    return [f"{name} stands beside the scripts" for name in sorted(names) if "/" not in name and name not in TOP_LEVEL]


def public_docstrings(files):
    """Every public function and class of the shared files says what it takes, returns and raises."""
    complaints = []
    for name, text in files.items():
        if name in SCRIPTS or name.startswith("forks/"):
            continue
        for node in parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                documentation = ast.get_docstring(node) or ""
                if not documentation:
                    complaints.append(f"{name}: {node.name} has no docstring")
                raises = any(isinstance(n, ast.Raise) for n in ast.walk(node)) and isinstance(node, ast.FunctionDef)
                if raises and "raise" not in documentation.lower() and "errors" not in documentation:
                    complaints.append(f"{name}: the docstring of {node.name} does not say what it raises")
    return complaints


# What runs a model's program, and the tests of a row, in the fenced processes of the sandbox: `exec` is what they are for.
FENCED = ("rewards/sandbox.py", "rewards/remote.py", "rewards/harness.py")


def banned(files):
    """Nothing that runs what it reads: no pickle, eval, exec, shell, remote code, or torch.load beyond weights."""
    complaints = []
    for name, text in files.items():
        if name in FENCED:
            continue
        for node in ast.walk(parse(text)):
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            found = function in ("eval", "exec", "os.system") or "shell=True" in call or "trust_remote_code=True" in call
            found |= function == "torch.load" and "weights_only=True" not in call
            found |= isinstance(node, ast.Import) and any(alias.name in ("pickle", "dill") for alias in node.names)
            if found:
                complaints.append(f"{name}:{node.lineno}: {ast.unparse(node)[:60]}")
    return complaints


# --------------------------------------------------------------------------------------------------------- measures


def amount(files):
    """What there is to read before the loop ends, and how dense it is."""
    complaints = []
    for name, text in scripts(files).items():
        page = code_tokens(first_page(text))
        complaints += [
            f"{name}: {what} {value:.4g}, it was {limit}"
            for what, value, limit in (
                ("the loop begins at line", loop_line(text), LOOP_AT[name]),
                ("tokens of the first page:", len(page), FIRST_PAGE[name]),
                ("tokens a code line of the first page:", density(page), FIRST_PAGE_DENSITY),
            )
            if value > ROOM * limit
        ]
    for name, text in files.items():
        if density(code_tokens(text)) > ROOM * DENSITY:
            complaints.append(f"{name}: {density(code_tokens(text)):.1f} tokens a code line, limit {DENSITY}")
    return complaints


def parameters(node):
    """How many parameters a function has, self, cls and ctx aside; 0 where others have decided about it."""
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    arguments = [arg.arg for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
    if "triton.jit" in decorators or "custom_op" in decorators or "register_fake" in decorators:
        return 0  # tensors and sizes, one by one
    if arguments[:4] == ["module", "query", "key", "value"]:
        return 0  # the interface of transformers' attention functions
    return len([name for name in arguments if name not in ("self", "cls", "ctx")])


def nesting(node, depth=0):
    """Deepest nesting of for, while, if, with and try below a function."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        block = isinstance(child, ast.For | ast.While | ast.If | ast.With | ast.Try)
        is_elif = block and isinstance(child, ast.If) and isinstance(node, ast.If) and child in node.orelse
        deepest = max(deepest, nesting(child, depth + (block and not is_elif)))
    return deepest


def sizes(files):
    """Lines, parameters and nesting."""
    complaints = []
    for name, text in files.items():
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > MAX_LINE:
                complaints.append(f"{name}:{number}: {len(line)} characters")
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.FunctionDef):
                if parameters(node) > MAX_PARAMETERS:
                    complaints.append(f"{name}: {node.name} has {parameters(node)} parameters, limit {MAX_PARAMETERS}")
                if nesting(node) > MAX_NESTING:
                    complaints.append(f"{name}: {node.name} nests {nesting(node)} deep, limit {MAX_NESTING}")
    return complaints


RULES = (
    newspaper_order, plumbing, same_name_same_source, differences, same_flag_same_meaning, no_dead_flag,
    plain_first_page, imports, top_level, public_docstrings, banned, amount, sizes,
)  # fmt: skip


def table(files):
    """Lines for people."""
    for name, text in scripts(files).items():
        page = code_tokens(first_page(text))
        yield (
            f"{name:16} the loop begins at line {loop_line(text):4} of {text.count(chr(10)):4}; first page: "
            f"{len(page):5,} tokens, {density(page):4.1f} a code line"
        )
    for a, b in MAX_DIFF:
        yield f"diff of the first pages of {a} and {b}: {changed_lines(first_page(files[a]), first_page(files[b]))} lines"
    end = files[SCRIPTS[0]]
    yield f"plumbing: {end[end.find(PLUMBING) :].count(chr(10))} lines"
    for name, text in files.items():
        tokens = code_tokens(text)
        functions = [node for node in ast.walk(parse(text)) if isinstance(node, ast.FunctionDef)]
        most = max((parameters(node) for node in functions), default=0)
        yield f"{name:24} {len(tokens):6,} tokens, {density(tokens):4.1f} a code line, at most {most} parameters"


if __name__ == "__main__":
    files = sources()
    print("\n".join(table(files)))
    for rule in RULES:
        print(f"{rule.__name__}: {rule(files) or 'ok'}")
