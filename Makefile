# Every target does its own set-up: a .venv, installed once.
PYTHON := .venv/bin/python

# What ruff looks at: not a forker's own scripts beside ours.
OURS := common.py sft.py reward_model.py dpo.py grpo.py ppo_rlvr.py kernels rewards pipeline forks tests demo benchmarks studies

.PHONY: demo test test-slow test-cuda

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.venv/transformers4: .venv/installed  # an older transformers, which has to read what we write: tests/test_export.py
	.venv/bin/pip install --quiet --upgrade --no-deps --target $@ \
		transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	touch $@

demo: .venv/installed  ## the pipeline on a tiny model and task, on a laptop's CPU
	$(PYTHON) demo/run.py

test: .venv/installed .venv/transformers4  ## what CI runs
	$(PYTHON) -m ruff check $(OURS)
	$(PYTHON) tests/readability.py
	$(PYTHON) -m pytest -n 2 --dist loadfile

test-slow: .venv/installed .venv/transformers4  ## many more kills, torch.compile, two processes: run by hand
	$(PYTHON) -m pytest -m slow

test-cuda: .venv/installed  ## what needs a CUDA device; with PyTorch for CUDA in the .venv
	CUDA_TESTS=1 $(PYTHON) -m pytest tests/test_cuda.py tests/test_head.py tests/test_slots.py
