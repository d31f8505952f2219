"""Rows of published shapes become the rows that the scripts read, or are counted; nothing is written by halves."""

import json
import subprocess
import sys

import datasets
import pytest
from conftest import ROOT, assistant, shared, tokenizer_folder, user, write_jsonl

import common
from common import ChatFormat, DataError, RunError, load_rows, load_tokenizer
from pipeline import convert
from pipeline.convert import SHAPES, Args
from rewards import Pool


def converted(folder, rows, to=None, name="rows.jsonl", **flags):
    """What a file of `rows` becomes."""
    source = write_jsonl(folder / name, rows)
    return convert_file(folder, source, to, **flags)


def convert_file(folder, source, to=None, **flags):
    convert.main(Args([str(source)], str(folder / "out.jsonl"), to, **flags))
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def call(number, name, **arguments):
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, content=""):
    return assistant(content, tool_calls=list(calls))


def answer_of_tool(number, text):
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05d}"}


def system(text):
    return {"role": "system", "content": text}


def prompt(text, verifier, truth):
    return {"messages": [user(text)], "dataset": verifier, "ground_truth": truth}


# ------------------------------------------------------------------------------------------------------------- shapes

Q = [user("What is 2 + 3?")]
FIVE, SIX = assistant("It is 5."), assistant("6")
WEATHER = {
    "name": "weather",
    "description": "Of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER_TOOL = [{"type": "function", "function": WEATHER}]
HUMAN = "\n\nHuman: What is 2 + 3?\n\nAssistant: "
RATED = {"prompt": "What is 2 + 3?", "correctness": 4}
GLAIVE_SYSTEM = (
    f"SYSTEM: You have functions. Use them if required -\n{json.dumps(WEATHER, indent=1)}\n\n{json.dumps(WEATHER)}"
)
GLAIVE_CHAT = """USER: Rome?


ASSISTANT: Let me see. <functioncall> {"name": "weather", "arguments": '{"city": "Rome, \\'the\\' city"}'} <|endoftext|>


FUNCTION RESPONSE: {"t": 21}


ASSISTANT: It is 21 C.

Nice. <|endoftext|>


"""
HUMAN_EVAL = {
    "prompt": "def two():\n    return 2\n\n\ndef five():\n    '''5'''\n",
    "entry_point": "five",
    "test": "def check(f):\n    assert f() == two() + 3",
}

# (shape, rows of it, what they are converted to, the rows that come of it)
CASES = [
    ("GSM8K", {"question": "2 + 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "messages",
     {"messages": [user("2 + 3?"), assistant("2+3=<<2+3=5>>5\n#### 5")]}),
    ("GSM8K", {"question": "2 + 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "prompts", prompt("2 + 3?", "gsm8k", "5")),
    ("Alpaca", {"instruction": "Add.", "input": "2 3", "output": "5"}, "messages",
     {"messages": [user("Add.\n\n2 3"), assistant("5")]}),
    ("Alpaca", {"instruction": "Add 2 and 3.", "input": "", "output": "5"}, "messages",
     {"messages": [user("Add 2 and 3."), assistant("5")]}),
    ("Alpaca", {"instruction": "Add 2 and 3.", "context": "Math.", "response": "5", "category": "x"}, "messages",
     {"messages": [user("Add 2 and 3.\n\nMath."), assistant("5")]}),
    ("self-instruct", {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"input": "", "output": "3"}]},
     "messages", [{"messages": [user("Add.\n\n1"), assistant("2")]}, {"messages": [user("Add."), assistant("3")]}]),
    ("Alpaca DPO", {"instruction": "Add.", "input": "2 3", "chosen": "5", "rejected": "6", "output": "5"}, "pairs",
     {"prompt": "Add.\n\n2 3", "chosen": "5", "rejected": "6"}),
    ("HH-RLHF", {"chosen": HUMAN + "It is 5.", "rejected": HUMAN + "6"}, "pairs",
     {"chosen": [*Q, FIVE], "rejected": [*Q, SIX]}),
    ("LLMBar", {"subset": "Natural", "input": "What?", "output_1": "a", "output_2": "b", "label": 2}, "pairs",
     {"prompt": "What?", "chosen": "b", "rejected": "a", "subset": "Natural"}),
    ("Orca DPO", {"system": "Be brief.", "question": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "6"}, "pairs",
     {"prompt": [system("Be brief."), *Q], "chosen": [FIVE], "rejected": [SIX]}),
    ("Orca DPO", {"system": "", "question": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "6"}, "pairs",
     {"prompt": Q, "chosen": [FIVE], "rejected": [SIX]}),
    ("ShareGPT DPO",
     {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "What is 2 + 3?"}],
      "chosen": {"from": "gpt", "value": "It is 5."}, "rejected": {"from": "gpt", "value": "6"}}, "pairs",
     {"prompt": [system("Be brief."), *Q], "chosen": [FIVE], "rejected": [SIX]}),
    ("HelpSteer2", [RATED | {"response": "6", "helpfulness": 1}, RATED | {"response": "It is 5.", "helpfulness": 4}],
     "pairs", {"prompt": Q, "chosen": [FIVE], "rejected": [SIX], "margin": 3}),
    ("HelpSteer2",
     [{"prompt": "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nBye", "response": r, "helpfulness": n} for r, n in (("a", 2), ("b", 0))],
     "pairs", {"prompt": [user("Hi"), assistant("Hello"), user("Bye")], "chosen": [assistant("a")], "rejected": [assistant("b")], "margin": 2}),
    ("HelpSteer3", {"context": Q, "response1": "It is 5.", "response2": "6", "overall_preference": -2}, "pairs",
     {"prompt": Q, "chosen": [FIVE], "rejected": [SIX], "margin": 2}),
    ("HelpSteer3", {"context": Q, "response1": "6", "response2": "It is 5.", "overall_preference": 1}, "pairs",
     {"prompt": Q, "chosen": [FIVE], "rejected": [SIX], "margin": 1}),
    ("Nectar",
     {"prompt": HUMAN, "answers": [{"answer": "7", "rank": 2.0}, {"answer": "6", "rank": 3.0}, {"answer": "It is 5.", "rank": 1.0}]},
     "pairs", {"prompt": Q, "chosen": [FIVE], "rejected": [SIX]}),
    ("KTO", [{"prompt": "a", "completion": c, "label": c in "xy"} for c in ("x", "u", "y", "v")], "pairs",
     [{"prompt": "a", "chosen": "x", "rejected": "u"}, {"prompt": "a", "chosen": "y", "rejected": "v"}]),
    ("KTO", {"prompt": "What is 2 + 3?", "completion": "It is 5.", "label": True}, "messages", {"messages": [*Q, FIVE]}),
    ("KTO", {"prompt": Q, "completion": [FIVE], "label": True}, "messages", {"messages": [*Q, FIVE]}),
    ("glaive", {"system": "SYSTEM: You help.", "chat": "USER: hi\n\n\nASSISTANT: hello <|endoftext|>"}, "messages",
     {"messages": [system("You help."), user("hi"), assistant("hello")]}),
    ("glaive", {"system": GLAIVE_SYSTEM, "chat": GLAIVE_CHAT}, "messages",
     {"messages": [user("Rome?"), calling(call(1, "weather", city="Rome, 'the' city"), content="Let me see."),
                   answer_of_tool(1, '{"t": 21}'), assistant("It is 21 C.\n\nNice.")], "tools": WEATHER_TOOL * 2}),
    ("xLAM",
     {"query": "Rome?", "answers": json.dumps([{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time", "arguments": {}}]),
      "tools": json.dumps([{"name": "weather", "description": "Of a city", "parameters": {
          "city": {"type": "str", "description": "which"}, "days": {"type": "List[int], optional"}, "unit": {"type": "str", "default": "C"}}}])},
     "messages",
     {"messages": [user("Rome?"), calling(call(1, "weather", city="Rome"), call(2, "time"))],
      "tools": [{"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {
          "type": "object", "required": ["city"],
          "properties": {"city": {"type": "string", "description": "which"}, "days": {"type": "array"},
                         "unit": {"type": "string", "default": "C"}}}}}]}),
    ("ShareGPT",
     {"conversations": [{"from": "human", "value": "Rome?"}, {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                        {"from": "observation", "value": "21"}, {"from": "gpt", "value": "21 C"}], "tools": json.dumps([WEATHER])},
     "messages",
     {"messages": [user("Rome?"), calling(call(1, "weather", city="Rome")), answer_of_tool(1, "21"), assistant("21 C")], "tools": WEATHER_TOOL}),
    ("ShareGPT",
     {"conversations": [{"from": "human", "value": "Rome? Bonn?"},
                        {"from": "function_call", "value": '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "weather", "arguments": {"city": "Bonn"}}]'},
                        {"from": "observation", "value": "21"}, {"from": "observation", "value": "9"}, {"from": "gpt", "value": "Rome."}]},
     "messages",
     {"messages": [user("Rome? Bonn?"), calling(call(1, "weather", city="Rome"), call(2, "weather", city="Bonn")),
                   answer_of_tool(1, "21"), answer_of_tool(2, "9"), assistant("Rome.")]}),
    ("ShareGPT", {"id": "i", "conversations": [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "It is 5."}], "tools": "[]"},
     "messages", {"messages": [*Q, FIVE]}),
    ("typed parts",
     {"messages": [{"role": "user", "content": [{"type": "text", "value": "Rome?"}]},
                   {"role": "assistant", "content": [{"type": "reasoning", "value": "Ask."}, {"type": "tool_call", "value": '{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}'}]},
                   {"role": "tool", "content": [{"type": "text", "value": "21"}]},
                   {"role": "assistant", "content": [{"type": "text", "value": "21 C"}]}],
      "tools": json.dumps(WEATHER_TOOL)}, "messages",
     {"messages": [user("Rome?"), {"role": "assistant", "content": "", "reasoning_content": "Ask.", "tool_calls": [call(1, "weather", city="Rome")]},
                   answer_of_tool(1, "21"), assistant("21 C")], "tools": WEATHER_TOOL}),
    ("problem with solution", {"problem": "2 + 3?", "answer": 0, "solution": "So \\boxed{0}."}, "prompts", prompt("2 + 3?", "math", 0)),
    ("problem with solution", {"problem": "2 + 3?", "solution": "So \\boxed{5}."}, "prompts", prompt("2 + 3?", "math", "So \\boxed{5}.")),
    ("problem with solution", {"problem": "2 + 3?", "solution": "So \\boxed{5}."}, "messages",
     {"messages": [user("2 + 3?"), assistant("So \\boxed{5}.")]}),
    ("problem with solution", {"problem": "2 + 3?", "solution": "So \\boxed{5}.", "messages": [*Q, FIVE]}, "prompts",
     prompt("2 + 3?", "math", "So \\boxed{5}.")),
    ("problem with answer", {"problem": "2 + 3?", "answer": "5", "llama8b_solve_rate": 0.5}, "prompts", prompt("2 + 3?", "math", "5")),
    ("TRL's GRPO", {"prompt": Q, "solution": "5"}, "prompts", prompt("What is 2 + 3?", "math", "5")),
    ("TRL's GRPO", {"prompt": "What is 2 + 3?", "solution": "5"}, "prompts", prompt("What is 2 + 3?", "math", "5")),
    ("verl", {"data_source": "openai/gsm8k", "prompt": Q, "ability": "math", "reward_model": {"style": "rule", "ground_truth": "5"}},
     "prompts", prompt("What is 2 + 3?", "gsm8k", "5")),
    ("verl", {"data_source": "math_dapo", "prompt": Q, "reward_model": {"style": "rule", "ground_truth": ["5"]}},
     "prompts", prompt("What is 2 + 3?", "math", "5")),
    ("SVAMP", {"Body": "There are 5 pens. ", "Question": "How many?", "Answer": 5.0}, "prompts", prompt("There are 5 pens. How many?", "gsm8k", 5.0)),
    ("IFEval", {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "prompts",
     prompt("No commas.", "ifeval", '{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}')),
    ("MBPP", {"text": "Write f.", "code": "", "test_list": ["assert f() == 1", "assert f() < 2"]}, "prompts",
     prompt("Write f.\n\nYour code should pass these tests:\n\nassert f() == 1\nassert f() < 2", "code", ["assert f() == 1", "assert f() < 2"])),
    ("MBPP", {"prompt": "Write a sum.", "code": "def sum(a):\n    return a", "test_list": ["assert sum(1) == 1"]}, "prompts",
     prompt("Write a sum.\n\nYour code should pass these tests:\n\nassert sum(1) == 1", "code",
            {"tests": ["assert sum(1) == 1"], "entry_point": ["sum"]})),
    ("MBPP", {"prompt": "Write f.", "code": "", "test_imports": ["import math"], "test_list": ["assert f() == math.pi"]}, "prompts",
     prompt("Write f.\n\nYour code should pass these tests:\n\nassert f() == math.pi", "code", ["import math", "assert f() == math.pi"])),
    ("HumanEval", HUMAN_EVAL, "prompts",
     prompt("Complete this function:\n\n```python\n" + HUMAN_EVAL["prompt"].rstrip() + "\n```", "code",
            {"tests": ["def two():\n    return 2", HUMAN_EVAL["test"], "check(five)"], "entry_point": "five"})),
]  # fmt: skip


@pytest.mark.parametrize("name, rows, to, expected", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_shape(tmp_path, capsys, name, rows, to, expected):
    rows = rows if isinstance(rows, list) else [rows]
    expected = expected if isinstance(expected, list) else [expected]
    assert converted(tmp_path, rows, to) == expected
    assert f"{len(rows)} rows read ({len(rows)} of {name}), {len(expected)} {to} written" in capsys.readouterr().out


def test_every_shape_has_a_case():
    """ORZ's rows are no objects: below."""
    made = {(name, to) for name, _, to, _ in CASES} | {("ORZ", "prompts")}
    assert made == {(name, to) for name, shape in SHAPES.items() for to in convert.READERS if getattr(shape, to)}


@pytest.mark.parametrize("suffix, text", [("json", "[\n  {}\n]"), ("jsonl", "{}\n\n")])
def test_rows_that_are_lists(tmp_path, suffix, text):
    row = [{"from": "human", "value": "2 + 3?"}, {"from": "assistant", "ground_truth": {"value": "5"}}]
    source = tmp_path / f"orz.{suffix}"
    source.write_text(text.replace("{}", json.dumps(row)))
    assert convert_file(tmp_path, source) == [prompt("2 + 3?", "math", "5")]
    source.write_text(text.replace("{}", json.dumps(row) + ("," if suffix == "json" else "\n") + "7"))
    with pytest.raises(DataError, match=rf"orz.{suffix}: begins with a row that is a list, but: "):
        convert_file(tmp_path, source)


def test_parquet(tmp_path):
    rows = [
        {"question": "2 + 3?", "answer": "#### 5", "more": None},
        {"question": "1 + 1?", "answer": "#### 2", "more": "x"},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert convert_file(tmp_path, tmp_path / "rows.parquet", "prompts") == [
        prompt("2 + 3?", "gsm8k", "5"),
        prompt("1 + 1?", "gsm8k", "2"),
    ]


def test_several_files_in_order(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"problem": "2 + 3?", "answer": "5"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "1 + 1?", "solution": "2"}])
    convert.main(Args([b, a], str(tmp_path / "new" / "out.jsonl")))
    lines = (tmp_path / "new" / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["ground_truth"] for line in lines] == ["2", "5"]


def test_flags_of_prompts(tmp_path):
    gsm8k = {"question": "2 + 3?", "answer": "#### 5"}
    form = {"dataset": ["contains", "contains"], "ground_truth": ["####", "<<"], "weights": [0.5, 0.5]}
    assert converted(tmp_path, [gsm8k], "prompts", format=True) == [{"messages": [user("2 + 3?")]} | form]
    assert converted(tmp_path, [gsm8k], "prompts", verifier="exact") == [prompt("2 + 3?", "exact", "5")]
    verl = {"data_source": "kk_logic", "prompt": Q, "reward_model": {"ground_truth": "5"}}
    assert converted(tmp_path, [verl], verifier="exact") == [prompt("What is 2 + 3?", "exact", "5")]
    for rows, to, flags, message in (
        (
            [{"problem": "2 + 3?", "answer": "5"}],
            "prompts",
            {"format": True},
            "--format is for GSM8K's rows, and there are rows of problem",
        ),
        ([gsm8k], "messages", {"format": True}, "--format and --verifier are for --to prompts"),
        ([gsm8k], "prompts", {"format": True, "verifier": "math"}, "leave out --verifier"),
        ([gsm8k], None, {}, r"rows.jsonl, row 1: GSM8K rows become messages or prompts: choose with --to"),
    ):
        with pytest.raises(RunError, match=message):
            converted(tmp_path, rows, to, **flags)


# ------------------------------------------------------------------------------------------------ a table of your own

TABLE = "Question,Answer,topic\n" + "".join(f"{text} {i % 40}?,{i % 40},x\n" for i in range(120) for text in ("A", "B"))


def test_names_of_columns_in_any_case(tmp_path):
    """Where no shape has them as they are: SVAMP has a Question and an Answer of its own."""
    rows = [{" Question": "2 + 3?", "ANSWER ": "5"}, {"question": "1 + 1?", "answer": "2"}]
    assert converted(tmp_path, rows, "prompts") == [prompt("2 + 3?", "gsm8k", "5"), prompt("1 + 1?", "gsm8k", "2")]
    svamp = {"Body": "Two and three.", "Question": "How many?", "Answer": "5"}
    assert converted(tmp_path, [svamp], "prompts") == [prompt("Two and three. How many?", "gsm8k", "5")]


def test_a_question_is_held_out_in_all_its_rows(tmp_path, capsys):
    """The same questions whatever is made of them, in any order, and however many rows have them."""
    (tmp_path / "mine.csv").write_text(TABLE)
    head, *lines = TABLE.splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([head, *lines[::-1]]) + "\n")
    sides = {}
    for name, to in (("mine", "messages"), ("mine", "prompts"), ("turned", "messages")):
        flags = {"hold_out": str(tmp_path / "test.jsonl"), "hold_out_share": 0.25}
        train = convert_file(tmp_path, tmp_path / f"{name}.csv", to, **flags)
        test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
        assert len(train) + len(test) == 240 and f"{len(test)} of 240 rows are held out" in capsys.readouterr().out
        sides[name, to] = [{row["messages"][0]["content"] for row in rows} for rows in (train, test)]
    train, test = sides["mine", "messages"]
    assert not train & test and len(train | test) == 80 and 10 < len(test) < 30
    assert all(side == [train, test] for side in sides.values())


def test_nothing_to_hold_out(tmp_path):
    with pytest.raises(RunError, match="--hold_out_share 0.1 puts all 1 rows on one side"):
        converted(tmp_path, [{"question": "2 + 3?", "answer": "5"}], "messages", hold_out=str(tmp_path / "test.jsonl"))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(RunError, match="have to be different files"):
        converted(tmp_path, [{"question": "2 + 3?", "answer": "5"}], "messages", hold_out=str(tmp_path / "out.jsonl"))


def test_answers_that_the_verifier_cannot_use(tmp_path, capsys):
    """Training would refuse them. Whoever chooses a verifier of their own is told that training needs its file."""
    rows = [{"question": "Capital of Egypt?", "answer": "Cairo"}, {"question": "2 + 3?", "answer": "5"}]
    assert converted(tmp_path, rows, "prompts") == [prompt("2 + 3?", "gsm8k", "5")]
    assert "1 dropped: verifier gsm8k cannot use its ground truth: no number in 'Cairo' (--verifier chooses another)" in capsys.readouterr().out
    assert len(converted(tmp_path, rows, "prompts", verifier="exact")) == 2
    assert "WARNING" not in capsys.readouterr().out
    assert converted(tmp_path, rows, "prompts", verifier="mine")[0] == prompt("Capital of Egypt?", "mine", "Cairo")
    assert "WARNING: no verifier mine is known here: training needs its --rewards FILE" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- what becomes nothing

ALONE = RATED | {"prompt": "Alone?", "response": "a", "helpfulness": 1}
RATINGS = [(1, "a", 2), (1, "b", 2), (2, "c", 0), (2, "d", 1), (2, "e", 4)]
TURNS = [{"from": "human", "value": "Hi"}]


@pytest.mark.parametrize(
    "good, bad, to, reasons",
    [
        (
            {"context": Q, "response1": "a", "response2": "b", "overall_preference": 3},
            [{"context": Q, "response1": "a", "response2": "b", "overall_preference": 0}] * 2,
            "pairs",
            ["2 dropped: neither response is preferred (first: row 2)"],
        ),
        (
            {"prompt": "a", "completion": "x", "label": True},
            [{"prompt": "a", "completion": "y", "label": False}],
            "messages",
            ["1 dropped: labelled bad: not for supervised fine-tuning (first: row 2)"],
        ),
        (
            {"conversations": [*TURNS, {"from": "gpt", "value": "Hello"}]},
            [{"conversations": [*TURNS, {"from": "bystander", "value": "?"}]}, {"conversations": [*TURNS, {"from": "gpt"}]},
             {"conversations": [*TURNS, {"from": "function_call", "value": "weather(Rome)"}]}],
            "messages",
            ["1 dropped: a turn is from 'bystander' (first: row 2)", "1 dropped: values that ShareGPT rows do not have (KeyError: 'value') (first: row 3)",
             "1 dropped: a tool call is not JSON with a name (first: row 4)"],
        ),
        (
            {"query": "Rome?", "tools": "[]", "answers": '[{"name": "weather"}]'},
            [{"query": "Rome?", "tools": "[]", "answers": "[]"}, {"query": "Rome?", "tools": "[", "answers": '[{"name": "weather"}]'}],
            "messages",
            ["1 dropped: no call answers the question (first: row 2)", "1 dropped: values that xLAM rows do not have (JSONDecodeError"],
        ),
        (
            {"system": "", "chat": "USER: hi\n\n\nASSISTANT: hello"},
            [{"system": "", "chat": "hi"}, {"system": "", "chat": "USER: hi\n\n\nASSISTANT: <functioncall> weather"}],
            "messages",
            ["1 dropped: chat has no USER: and ASSISTANT: (first: row 2)", "1 dropped: a tool call is not JSON with a name (first: row 3)"],
        ),
        (
            {"chosen": HUMAN + "5", "rejected": HUMAN + "6"},
            [{"chosen": "5", "rejected": "6"}],
            "pairs",
            ["1 dropped: no dialogue of Human: and Assistant: (first: row 2)"],
        ),
        (
            {"prompt": HUMAN, "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
            [{"prompt": HUMAN, "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]}],
            "pairs",
            ["1 dropped: all answers have one rank (first: row 2)"],
        ),
        (
            {"data_source": "math", "prompt": Q, "reward_model": {"ground_truth": "5"}},
            [{"data_source": "kk_logic", "prompt": Q, "reward_model": {"ground_truth": "5"}},
             {"data_source": "math", "prompt": Q, "reward_model": {"ground_truth": ["5", "6"]}}],
            "prompts",
            ["1 dropped: no verifier known for data_source 'kk_logic': name it with --verifier (first: row 2)", "1 dropped: 2 ground truths (first: row 3)"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "value": "a"}]}]},
            [{"messages": [{"role": "user", "content": [{"type": "image", "value": "a"}]}]}],
            "messages",
            ["1 dropped: a part of the type 'image' (first: row 2)"],
        ),
    ],
)  # fmt: skip
def test_dropped_rows_are_counted(tmp_path, capsys, good, bad, to, reasons):
    assert len(converted(tmp_path, [good, *bad], to)) == 1
    report = capsys.readouterr().out
    for reason in reasons:
        assert f"\n  {reason}" in report
    assert f"{1 + len(bad)} rows read" in report and report.count(" dropped: ") == len(reasons)


def test_rows_of_one_prompt(tmp_path, capsys):
    """Three ratings of a prompt: the best against the worst. Every row is in a pair or counted."""
    rows = [{"prompt": f"{p}?", "response": r, "helpfulness": n} for p, r, n in RATINGS] + [ALONE]
    (pair,) = converted(tmp_path, rows)
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ([assistant("e")], [assistant("c")], 4)
    report = capsys.readouterr().out
    assert "6 rows read (6 of HelpSteer2), 1 pairs written" in report
    for reason in ("2 dropped: equally helpful (first: row 1)", "1 dropped: one answer more than the pairs of its prompt take (first: row 3)",
                   "1 dropped: the only answer to its prompt (first: row 6)"):  # fmt: skip
        assert f"\n  {reason}" in report, report


def test_labels_of_one_prompt(tmp_path, capsys):
    given = [("a", "x", True), ("b", "y", True), ("a", "z", False), ("a", "w", True), ("c", "v", False)]
    pairs = converted(
        tmp_path, [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in given], "pairs"
    )
    assert pairs == [{"prompt": "a", "chosen": "x", "rejected": "z"}]
    report = capsys.readouterr().out
    for reason in ("1 dropped: one answer more than the pairs of its prompt take (first: row 1)", "1 dropped: a prompt with no bad answer (first: row 2)",
                   "1 dropped: a prompt with no good answer (first: row 5)"):  # fmt: skip
        assert f"\n  {reason}" in report


# --------------------------------------------------------------------------------------------------------- bad input


def test_unknown_shape_is_one_line_and_nothing_is_written(tmp_path):
    """Also when it comes late: no part of the output is left."""
    rows = [{"question": "2 + 3?", "answer": "#### 5"}] * 3 + [{"wish": "x", "wisdom": "y"}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, "-m", "pipeline.convert", source, "--to", "messages", "--out", tmp_path / "out.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: {source}, row 4: no known shape has the columns wish, wisdom. A table of your own has question and answer. "
        "Known are: ShareGPT DPO ("
    )
    assert done.stderr.count("\n") == 1 and "GSM8K (question answer)" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    old = converted(tmp_path, [{"problem": "2 + 3?", "answer": "5"}])
    with pytest.raises(DataError, match=r"row 2: no known shape"):
        converted(tmp_path, [{"problem": "1 + 1?", "answer": "2"}, {"wish": "x"}])
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


@pytest.mark.parametrize(
    "rows, to, message",
    [
        (
            [{"messages": [*Q, FIVE]}],
            None,
            "rows.jsonl, row 1: nothing to convert: such rows are read as they are, by sft.py",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "pairs", "read as they are, by reward_model.py and dpo.py"),
        (
            [{"chosen": [*Q, FIVE], "rejected": [*Q, SIX]}],
            "messages",
            "read as they are, by reward_model.py and dpo.py; no messages are made",
        ),
        ([prompt("a", "math", "5")], None, "read as they are, by grpo.py and ppo_rlvr.py"),
        (
            [{"question": "2 + 3?", "answer": "#### 5"}],
            "pairs",
            "rows.jsonl, row 1: GSM8K rows become messages or prompts, not pairs",
        ),
        ([{"chosen": "5", "rejected": "6"}], None, "rows.jsonl: no row could be converted"),
        (['{"question"'], "messages", "column 12: not valid JSON"),
        ([], "messages", "rows.jsonl: no row could be converted"),
    ],
)
def test_bad_input_is_named(tmp_path, rows, to, message):
    with pytest.raises(DataError) as error:
        converted(tmp_path, rows, to)
    assert message in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_out_is_no_source(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "2 + 3?", "answer": "5"}])
    with pytest.raises(RunError, match="have to be different files"):
        convert.main(Args([source], f"{tmp_path}/./rows.jsonl"))


# -------------------------------------------------------------------------------- what comes of it is what scripts read

ENCODERS = {"messages": common.SftEncoder, "pairs": common.PairEncoder, "prompts": common.PromptEncoder}


@pytest.fixture(scope="module")
def encoders():
    """With ChatML and with its tools, which the built-in template does not show."""
    tokenizer = load_tokenizer(tokenizer_folder("byte_level"), "chatml")
    shown = "{{ '<|im_start|>system\n' ~ (tools | tojson) ~ '<|im_end|>\n' if tools }}"
    calls = "{{ message.content or '' }}{{ message.tool_calls | tojson if message.tool_calls }}{{ message.reasoning_content }}"
    tokenizer.chat_template = shown + (
        "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}" + calls + "{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = ChatFormat(tokenizer)
    return {to: encoder(chat, len(tokenizer), 100_000, "drop") for to, encoder in ENCODERS.items()}


def test_scripts_read_all_of_it(tmp_path, encoders):
    """The expected rows above, which are what comes of the shapes."""
    made = {}
    for _, _, to, expected in CASES:
        made.setdefault(to, []).extend(expected if isinstance(expected, list) else [expected])
    for to, rows in made.items():
        source = write_jsonl(tmp_path / f"{to}.jsonl", rows)
        assert len(load_rows([source], encoders[to], max_skip_frac=0.0)) == len(rows)


REAL = [  # file, what it becomes, rows of it, share that an encoder may leave out
    ("gsm8k/test.jsonl", "messages", 1319, 0),
    ("gsm8k/test.jsonl", "prompts", 1319, 0),
    ("instruct/llms_from_scratch.jsonl", "messages", 1100, 0),
    ("instruct/gpteacher_codegen_2000.jsonl", "messages", 2000, 0.01),
    ("instruct/self_instruct_seed_tasks.jsonl", "messages", 175, 0.01),
    ("chat/glaive_toolcall_300.jsonl", "messages", 300, 0),
    ("chat/reason_tool_use_50.jsonl", "messages", 50, 0),
    ("chat/identity_conversations.jsonl", "messages", 500, 0),
    ("preference/llama_factory_dpo_300.jsonl", "pairs", 300, 0.02),
    ("preference/hh_helpful_base.test.jsonl", "pairs", 500, 0.05),
    ("preference/llms_from_scratch_politeness.jsonl", "pairs", 1100, 0.01),
    ("preference/llmbar.jsonl", "pairs", 419, 0),
    ("math/math500.jsonl", "prompts", 500, 0),
    ("math/aime24.jsonl", "prompts", 30, 0),
    ("math/svamp.jsonl", "prompts", 1000, 0),
    ("ifeval/input_data.jsonl", "prompts", 541, 0),
    ("code/mbpp_sanitized.jsonl", "prompts", 427, 0),
    ("code/humaneval.jsonl", "prompts", 164, 0),
]


@pytest.mark.parametrize("name, to, count, skipped", REAL, ids=lambda value: str(value))
def test_real_files(tmp_path, encoders, name, to, count, skipped):
    """Published files become rows that the scripts read, and ground truths that their verifiers can use."""
    made = convert_file(tmp_path, shared("data", name), to)
    assert len(made) == count
    rows = load_rows([str(tmp_path / "out.jsonl")], encoders[to], max_skip_frac=skipped)
    assert len(rows) >= (1 - skipped) * count
    if to == "prompts":
        with Pool(workers=1) as pool:
            assert pool.check([(row["dataset"], None, row["ground_truth"], None) for row in made]) == {}


PUBLISHED = {  # files of one or two invented rows in published shapes → what they become
    "alpaca": "messages", "alpaca-dpo": "pairs", "big-math": "prompts", "deepscaler": "prompts", "gsm8k": "messages",
    "glaive-function-calling-v2": "messages", "hh-rlhf": "pairs", "helpsteer3-preference": "pairs", "kto__TRL_": "messages",
    "orca_dpo_pairs": "pairs", "sharegpt_conversations": "messages", "sharegpt_under_messages": "messages",
    "openthoughts3__system____think__": "messages", "trl_grpo__prompt_messages_": "prompts", "trl_grpo__prompt_string_": "prompts",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(tmp_path, encoders, name):
    made = convert_file(tmp_path, shared("data", "rows", f"{name}.jsonl"), PUBLISHED[name])
    assert len(load_rows([str(tmp_path / "out.jsonl")], encoders[PUBLISHED[name]], max_skip_frac=0.0)) == len(made) == 1


# --------------------------------------------------------------------------------------------------------------- docs


def table():
    """The table of docs/data.md."""
    lines = ["| rows | are known by | seen in | command |", "|---|---|---|---|"]
    for name, shape in SHAPES.items():
        targets = [to for to in convert.READERS if getattr(shape, to)]
        for to in targets:
            choice = f" --to {to}" if len(targets) > 1 else ""
            made = f"`python -m pipeline.convert ROWS{choice} --out FILE` → {to}"
            columns = ", ".join(f"`{column}`" for column in shape.columns.split()).replace("|", "` or `")
            lines.append(f"| {name} | {columns} | {shape.seen_in} | {made} |")
    return "\n".join(lines)


def test_the_table_of_the_docs_is_that_of_the_code():
    """Print it with: python tests/test_convert.py"""
    assert table() in (ROOT / "docs" / "data.md").read_text()


if __name__ == "__main__":
    print(table())
