"""Rows that get completions, encoded."""

import json

import datasets

from common import PromptEncoder


class SampleEncoder(PromptEncoder):
    """Row → its prompt, what judges answers (null: nobody), and the row as it will be written, a JSON text.

    A last assistant turn of `messages` becomes `reference`. jobs: RowJobs, or None: nobody judges. prepare: is called
    with the row before all else; it has a `key`, and is picklable.
    """

    features = {**PromptEncoder.features, "line": datasets.Value("string")}

    def __init__(self, chat, vocab_size, max_length, jobs, prepare=None):
        super().__init__(chat, vocab_size, max_length, "drop", jobs)
        self.jobs = jobs
        self.make_job = self.job_or_none
        self.prepare = prepare
        self.key = json.dumps([self.key, getattr(jobs, "key", None), getattr(prepare, "key", None)])

    def __call__(self, row):
        """Raises ValueError and Skip."""
        row = self.prepare(row) if self.prepare else row
        columns = super().__call__(row)
        messages = row.get("messages")
        if isinstance(messages, list) and messages[-1]["role"] == "assistant":
            row = {**row, "messages": messages[:-1], "reference": messages[-1].get("content")}
        return {**columns, "line": json.dumps(row, default=str)}

    def job_or_none(self, row, messages):
        """As RowJobs; None for a row that names no verifier, where the flags name none either."""
        if self.jobs is None or (row.get("dataset") is None and not self.jobs.chosen and not self.jobs.defined):
            return None
        return self.jobs(row, messages)
