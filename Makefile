# Every target makes .venv when it is missing. `make help` lists the targets.
VENV := .venv
PY := $(VENV)/bin/python
# Re-made when the install files change, or when .venv is gone.
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: help bench-inference setup gpu-bundle demo demo-pp4 demo-longctx bench-ema study-moments demo-sft demo-rl bench-pipeline bench-zigzag bench-convert bench-dispatch bench-placement bench-planner bench-train bench-fp8 study-fp8 accumulation-fp8 test test-all test-nccl test-te test-oldest test-gpu kernels lint lint-imports clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv and install the package, editable, with what the tests need

$(STAMP): setup.py pyproject.toml scripts/find_python.sh
	@python=$$(bash scripts/find_python.sh) || exit 1; \
	test -x $(PY) || { echo "creating $(VENV) with $$python"; "$$python" -m venv $(VENV); }
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install -e '.[test,dev]'
	@touch $@

demo: setup  ## train a small DeepSeek-V3 on real text, DualPipe in four processes (resumes when run again)
	$(PY) -m dsv3_megatron.demo

demo-pp4: setup  ## the same on four pipeline ranks, in eight processes
	$(PY) -m dsv3_megatron.demo --run-dir runs/demo-pp4 --layout cpu_pp4_ep2 micro_batch_size=1

demo-sft: setup  ## fine-tune the demo's model on signatures from docstrings (runs the demo first where it has not been)
	$(PY) -m dsv3_megatron.studies.sft

demo-rl: setup  ## a base model trained here learns to count from rewards alone, three seeds and a control (resumes)
	$(PY) -m dsv3_megatron.studies.rl

test: setup  ## the default tests, under 20 minutes on two cores
	$(PY) -m pytest tests -n 2 --dist loadfile

test-all: setup  ## the slow tests too
	$(PY) -m pytest tests -m 'not gpu and not te'

bench-ema: setup  ## what the average of the weights costs a step, with stages that sleep
	$(PY) -m dsv3_megatron.studies.ema_cost

demo-longctx: setup  ## a tiny model extended to eight times its context, with YaRN and without (resumes when run again)
	$(PY) -m dsv3_megatron.studies.longctx

study-moments: setup  ## bf16 against fp32 moments: the loss over 1000 steps of the demo (resumes when run again)
	$(PY) -m dsv3_megatron.studies.moments

test-nccl: setup  ## the DualPipe tests with gloo made to behave as NCCL does (blocking first use, order, waits)
	DSV3_TEST_LIKE_NCCL=1 $(PY) -m pytest tests/dualpipe tests/pipeline/test_runner.py

# The parts that know torch and Triton best: stand-ins, patches, layers, optimizer, formats and kernels, p2p, a training run.
OLDEST_TESTS := tests/cpu/test_replacements.py tests/cpu/test_record.py tests/patching tests/backends \
	tests/optimizer/test_adamw.py tests/fp8/test_tiles.py tests/fp8/test_e5m6.py tests/pipeline/test_runner.py \
	tests/train/test_weight_gradients.py

test-oldest: setup  ## part of the tests on the oldest torch that is claimed (2.11, in an environment beside .venv)
	@python=$$(bash scripts/oldest_torch.sh $(PY) 2.11 3.6) || exit 1; \
	PYTHONPATH=$(CURDIR) $$python -m pytest $(OLDEST_TESTS) -p no:cacheprovider

test-te: setup  ## Transformer Engine's real modules, constructed on CPU (builds TE's extension the first time: ~12 minutes)
	bash scripts/install_te.sh $(PY)
	DSV3_TEST_TE=1 $(PY) -m pytest tests -m te

test-gpu: setup  ## the GPU tests on all visible GPUs (1, 2, 4 or 8; under 90 minutes), with a report in runs/gpu_report
	$(PY) -m tests.gpu.run

gpu-bundle: setup  ## gpu_bundle/: the GPU tests for a machine without a network (TE=1: Transformer Engine's part too)
	$(PY) -m tests.gpu.bundle $(if $(TE),--te)

bench-pipeline: setup  ## executed against simulated time of every pipeline schedule, in eight sleeping processes
	$(PY) -m dsv3_megatron.studies.pipeline_speed

bench-zigzag: setup  ## a zigzag dealt by nominal and by measured times, on uneven sleeping stages
	$(PY) -m dsv3_megatron.studies.zigzag_costs

bench-dispatch: setup  ## the two hops of dispatch beside each other, over links that sleep
	$(PY) -m dsv3_megatron.studies.two_hop_speed

bench-placement: setup  ## what moving all experts to other ranks costs beside a step
	$(PY) -m dsv3_megatron.studies.placement_cost

bench-convert: setup  ## throughput and memory of checkpoint conversion beside cp and sync of the same files (20 GB of disk)
	$(PY) -m dsv3_megatron.studies.convert_speed

bench-inference: setup  ## tokens per second of the engine beside transformers' generate, on the CPU
	OMP_NUM_THREADS=1 $(PY) -m dsv3_megatron.studies.inference_speed

bench-train: setup  ## training throughput of the demo's model, DualPipe against Megatron's 1F1B
	$(PY) -m dsv3_megatron.studies.throughput --rounds 3

kernels: setup  ## compile the FP8 kernels for sm_90 without a GPU; registers, spills, shared memory, rooflines
	$(PY) -m dsv3_megatron.fp8.kernels.compile

bench-planner: setup  ## the planner's error table: predicted against published runs, costs, schedules
	$(PY) -m dsv3_megatron.studies.planner_error

study-fp8: setup  ## FP8 against BF16 on the demo's model, with noise floor and ablations (resumes; about an hour)
	$(PY) -m dsv3_megatron.studies.fp8

bench-fp8: setup  ## an emulated FP8 step against a BF16 step on CPU
	$(PY) -m dsv3_megatron.studies.fp8_speed

accumulation-fp8: setup  ## picture of the error of sums in 14 bits, with and without promotion
	$(PY) -m dsv3_megatron.studies.accumulation

lint: setup  ## ruff, mypy and the law of the floors, as pre-commit and CI run them
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@$(MAKE) --no-print-directory lint-imports

lint-imports: setup  ## the law of the floors alone (contracts in pyproject.toml)
	$(PY) -c "from importlinter.cli import lint_imports_command as lint; lint()" --no-logo

clean:  ## remove what runs and tests left behind (not .venv)
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
