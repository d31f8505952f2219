# Every target does its own set-up: a .venv, installed once, and again when what is to be installed changes.
PYTHON := .venv/bin/python
INSTALL := .venv/bin/pip install --quiet --constraint requirements.lock

# What ruff looks at: not a forker's own scripts beside ours.
OURS := common.py sft.py reward_model.py dpo.py grpo.py ppo_rlvr.py kernels rewards pipeline forks tests demo benchmarks studies docs

.PHONY: demo test test-slow test-cuda lock

.venv/installed: requirements.txt requirements.lock
	python3 -m venv .venv
	$(INSTALL) --requirement requirements.txt
	touch $@

.venv/tests-installed: .venv/installed requirements-test.txt
	$(INSTALL) --requirement requirements-test.txt
	touch $@

.venv/transformers4: .venv/installed  # an older transformers, which has to read what we write: tests/test_export.py
	.venv/bin/pip install --quiet --upgrade --no-deps --target $@ \
		transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	touch $@

demo: .venv/installed  ## the pipeline on a tiny model and task, on a laptop's CPU
	$(PYTHON) demo/run.py

test: .venv/tests-installed .venv/transformers4  ## what CI runs
	$(PYTHON) -m ruff check $(OURS)
	$(PYTHON) tests/readability.py
	$(PYTHON) -m pytest -n 2 --dist loadfile

test-slow: .venv/tests-installed .venv/transformers4  ## many more kills, torch.compile, two processes: run by hand
	$(PYTHON) -m pytest -m slow

test-cuda: .venv/tests-installed  ## what needs a CUDA device; with PyTorch for CUDA in the .venv
	CUDA_TESTS=1 $(PYTHON) -m pytest tests/test_cuda.py tests/test_head.py tests/test_slots.py

# Keeps the versions that are there; `rm requirements.lock` before takes the newest. Without CUDA's packages, which
# differ between builds of PyTorch: each build pins its own.
lock: .venv/tests-installed  ## writes requirements.lock: the versions that are tested, for Linux and Mac
	.venv/bin/pip install --quiet uv
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
		requirements-test.txt --output-file requirements.lock
	sed -i.old -E '/^(nvidia|cuda)-/d' requirements.lock
	rm requirements.lock.old
