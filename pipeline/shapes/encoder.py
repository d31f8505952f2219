"""Rows that get completions, encoded; and the rows that are written."""

import json

import datasets

from common import PromptEncoder, read_conversation, read_messages

SAMPLED = "completions rewards reasons answers ended tokens token_ids logprobs model temperature top_p seed".split()
CONVERSATION = ("messages", "conversations", "prompt", "completion", "system")  # become `messages` and `reference`


class SampleEncoder(PromptEncoder):
    """Row → its prompt, what judges answers (null: nobody), and the row as it will be written, a JSON text.

    Written is the prompt as `messages`, whatever column it was in, and a last answer as `reference`: its text, or the
    whole message if that has more. What an earlier call has written is left out, unless `given` answers are to be read.
    A column of the data's own that would be overwritten, NAME, becomes `row_NAME`.

    jobs: RowJobs, or None: nobody judges. prepare: is called with the row before all else; it has a `key`, and is
    picklable.
    """

    features = {**PromptEncoder.features, "line": datasets.Value("string")}

    def __init__(self, chat, vocab_size, max_length, jobs, prepare=None, given=False):
        super().__init__(chat, vocab_size, max_length, "drop", jobs)
        self.jobs = jobs
        self.make_job = self.job_or_none
        self.prepare = prepare
        self.given = given
        self.key = json.dumps([self.key, getattr(jobs, "key", None), getattr(prepare, "key", None), given])

    def __call__(self, row):
        """Raises ValueError and Skip."""
        row = self.prepare(row) if self.prepare else row
        columns = super().__call__(row)
        messages = read_conversation(row, needs_answer=False)
        answers = [messages.pop()] if messages[-1]["role"] == "assistant" else []
        if not answers and row.get("completion") is not None:
            answers = read_messages(row["completion"], "completion", "assistant")
        is_sampled = "completions" in row  # by an earlier call
        line = {"messages": messages}
        notes = []
        for name, value in row.items():
            if name in CONVERSATION:
                continue
            if is_sampled or name not in (*SAMPLED, "reference"):
                if self.given or name not in SAMPLED:
                    line[name] = value
            else:
                line[f"row_{name}"] = value
                notes.append(f"with a column {name!r}, which is written as 'row_{name}'")
        if answers:
            has_more = {name for name, value in answers[0].items() if value is not None} - {"role", "content"}
            line["reference"] = answers[0] if has_more else answers[0]["content"]
        return {**columns, "line": json.dumps(line, default=str), "notes": notes}

    def job_or_none(self, row, messages):
        """As RowJobs; None for a row that names no verifier, where the flags name none either."""
        if self.jobs is None or (row.get("dataset") is None and not self.jobs.chosen and not self.jobs.defined):
            return None
        return self.jobs(row, messages)
