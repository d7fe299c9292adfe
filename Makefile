# `make` alone lists what there is. Everything happens in .venv; a fresh clone needs only python3
# and a C++20 compiler.

PYTHON ?= python3
BIN := .venv/bin
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)
SPREAD := --numprocesses auto --maxprocesses 8 --dist worksteal
# GPU images carry an older Triton than .venv: kernels have to compile well under both.
OLD_TRITON := build/triton-3.6.0
TYPED := $(wildcard w2s_fast/*) kernels

ALPACA := build/alpaca
LM_EVAL := build/lm-eval
# `make real ACCEPT_GEMMA_TERMS=1`: you have read and accept them. YES=1: do not ask before downloading.
MODELS :=
FETCH := fetch-models $(MODELS) $(if $(ACCEPT_GEMMA_TERMS),--accept-gemma-terms) $(if $(YES),--yes)

.PHONY: help demo serve real test real-test thorough cluster alpaca image-steps aot lint bench demo-models real-adapter clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/installed ## steer the bundled models, show the table and a search tree
	$(BIN)/w2s-fast demo

serve: .venv/installed ## serve the bundled models, with a page to look at, on port 8000
	$(BIN)/w2s-fast serve

real: .venv/installed ## fetch real models (it asks first), steer them, show table and trees
	$(BIN)/w2s-fast $(FETCH)
	$(BIN)/w2s-fast eval sentiment --real --short --tree --count 8 --out build/real --resume

# Every worker would compile all test files anew where bytecode is not to be written.
test: export PYTHONDONTWRITEBYTECODE =
test: $(OLD_TRITON)/installed $(LM_EVAL)/installed
test: .venv/installed ## run the tests, on all cores (at most 8)
	W2S_FAST_BACKEND=interpret $(BIN)/pytest $(SPREAD) -m "not thorough" tests/interpret
	W2S_FAST_INTERPRETED=1 $(BIN)/pytest $(SPREAD) -m "not (every_gpu or thorough or cluster)"
	@# Another process, with the older Triton first on its path.
	PYTHONPATH=$(OLD_TRITON) $(BIN)/pytest $(SPREAD) -m "not every_gpu" -k 90-bf16 \
		tests/kernels/test_aot.py

thorough: export PYTHONDONTWRITEBYTECODE =
thorough: .venv/installed ## what `make test` leaves out: it takes long, and seldom fails alone
	W2S_FAST_BACKEND=interpret $(BIN)/pytest $(SPREAD) -m thorough tests/interpret
	W2S_FAST_INTERPRETED=1 $(BIN)/pytest $(SPREAD) -m thorough

cluster: .venv/installed ## what takes minutes on Ray: two nodes, killed drivers, deadly prompts
	$(BIN)/pytest -m cluster tests/ray

real-test: .venv/installed ## fetch real models (it asks first), and run the tests on them
	$(BIN)/w2s-fast $(FETCH)
	$(BIN)/pytest -m real

alpaca: $(ALPACA)/installed ## let alpaca_eval's own code read our answers to instructions
	$(BIN)/pytest tests/cli/test_eval_alpaca.py

image-steps: .venv/installed ## take the steps of deploy/Dockerfile in a folder of their own
	W2S_FAST_IMAGE=1 $(BIN)/pytest tests/serve/test_deploy.py

aot: $(OLD_TRITON)/installed ## compile all kernels for every GPU, with both Tritons
	$(BIN)/pytest $(SPREAD) tests/kernels/test_aot.py
	PYTHONPATH=$(OLD_TRITON) $(BIN)/pytest $(SPREAD) tests/kernels/test_aot.py

lint: .venv/linters ## ruff, and mypy in strict mode
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# kernels/ is w2s_fast.kernels once installed (setup.py): show mypy the tree as it will be.
	rm -rf build/typing && mkdir -p build/typing/w2s_fast
	ln -s $(addprefix $(CURDIR)/,$(TYPED)) build/typing/w2s_fast/
	cd build/typing && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p w2s_fast

bench: .venv/installed ## time the parts and whole searches, and the search against its baselines
	mkdir -p bench/results
	$(BIN)/pytest bench/ --benchmark-autosave --benchmark-json bench/results/bench.json \
		--benchmark-columns min,median,iqr,rounds --benchmark-sort name
	$(BIN)/python -m bench.search --repeats 2 --released 1 --out bench/results/search.json
	$(BIN)/python -m bench.remote --out bench/results/remote.json

demo-models: .venv/installed ## train the bundled models anew (about 20 minutes on 2 cores)
	$(BIN)/python -m w2s_fast.demo.train --out w2s_fast/demo

real-adapter: .venv/installed ## train the bundled adapter anew (about 30 minutes on 2 cores)
	$(BIN)/w2s-fast fetch-models smollm2-135m-instruct $(if $(YES),--yes)
	$(BIN)/python -m w2s_fast.demo.tune --out w2s_fast/demo/adapter

clean: ## remove everything that was built, .venv included
	rm -rf .venv build dist *.egg-info w2s_fast/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first, pinned: a looser request would fetch gigabytes of CUDA libraries. The build tools of
# pyproject.toml come along, so that the tests can build a wheel, too.
.venv/installed: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0 setuptools wheel pybind11
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable ".[test]"
	touch $@

# Only compiles: torch and all else are those of .venv.
$(OLD_TRITON)/installed: | .venv/installed
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) "triton==3.6.0; sys_platform == 'linux'"
	touch $@

# Far too much for one test, and it needs the setuptools of its time.
$(ALPACA)/installed: | .venv/installed
	rm -rf $(@D)
	$(BIN)/pip install --quiet --target $(@D) alpaca-eval==0.6.6 "setuptools<81"
	touch $@

# A client of the server, in tests/serve; by itself, for it brings its own of much that .venv has.
$(LM_EVAL)/installed: | .venv/installed
	rm -rf $(@D)
	$(BIN)/pip install --quiet --target $(@D) "lm_eval[api]==0.4.13"
	touch $@

.venv/linters: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable ".[lint]"
	touch $@
