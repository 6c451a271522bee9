# Everything from a clean clone: each target makes the environments it needs, pinned by locks/*.txt.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/lock.stamp
PEERS := engine modelopt autoround llmcompressor templates lmeval
export TOKENIZERS_PARALLELISM := false
unexport PYTHONDONTWRITEBYTECODE # every start of an engine would compile its thousands of modules anew

.PHONY: demo test check soak engine bench tiny clean

demo: $(STAMP)
	$(VENV)/bin/mtpress demo

# Two files at a time, a thread each; meanwhile the peers' environments are made, and a test that needs one waits for it.
test: check
	@for env in $(PEERS); do $(VENV)/bin/python locks/make_env.py $$env > /dev/null; done & \
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25; \
	code=$$?; wait; exit $$code

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# What has a longer form than `make test` gives it: hundreds of kills, every broken class in the engine.
soak: $(STAMP)
	MTPRESS_SOAK=1 $(VENV)/bin/python -m pytest -q -s tests/soak tests/oracles/test_transformers_path.py tests/oracles/test_modelopt_parity.py \
		tests/engine/test_acceptance.py tests/engine/test_server.py tests/engine/test_check_engine.py tests/engine/test_second_hand.py \
		tests/engine/test_refusals.py tests/engine/test_matching.py tests/engine/test_linears.py tests/repairs/test_fine_tunes_broken.py tests/rules/test_any_config.py

engine: $(STAMP)
	$(VENV)/bin/python locks/make_env.py engine

bench: $(STAMP)
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(VENV)/bin/python $$script || exit 1; done

tiny: $(STAMP)
	$(VENV)/bin/python tiny/train.py build/mtpress-tiny
	$(VENV)/bin/python tiny/evaluate.py build/mtpress-tiny

$(STAMP): locks/dev.txt pyproject.toml setup.py $(wildcard src/mtpress/formats/*.[ch])
	$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) (about 1 GB, a minute or two)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r locks/dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
