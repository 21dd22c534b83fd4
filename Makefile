# `make demo` and `make test` need Python 3.10 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
UV_VERSION = 0.13.9
BIN = .venv/bin

# Threads that spin while they wait make shared machines several times slower.
export OMP_WAIT_POLICY = passive
export GOMP_SPINCOUNT = 0

.PHONY: demo demo-segment demo-detect test test-all results faults lint format pin clean

demo: .venv/installed
	@$(BIN)/python -m nextvit.demo runs/demo

# Segmentation, from the weights that `make demo` leaves; where there are none, that runs first.
demo-segment: .venv/installed runs/demo/model.safetensors
	@$(BIN)/python -m nextvit.demo_segment runs/demo/model.safetensors runs/segment

# Detection, likewise.
demo-detect: .venv/installed runs/demo/model.safetensors
	@$(BIN)/python -m nextvit.demo_detect runs/demo/model.safetensors runs/detect

runs/demo/model.safetensors: | .venv/installed
	@$(BIN)/python -m nextvit.demo runs/demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0 -m "not slow"

test-all: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0

# The paper's tables on this machine, into a folder of its own: RESULTS=... Hours on two cores; what is there is not
# measured again.
RESULTS ?= docs/results
results: .venv/installed
	$(BIN)/nextvit reproduce all --output $(RESULTS)
	for table in table1 table7 table8 table9; do \
		$(BIN)/nextvit reproduce $$table --costs --train demo --task classify,segment --output $(RESULTS) || exit 1; \
	done
	$(BIN)/python benchmarks/fit.py --output $(RESULTS)/fit.csv
	for model in timm:resnet50 timm:swin_tiny_patch4_window7_224 nextvit_small; do \
		run=$(RESULTS)/runs/figure5-$${model#*:}; test -f $$run/model.safetensors || { rm -rf $$run; \
			$(BIN)/nextvit train demo --model $$model --recipe proxy --set images.size=96 \
			--set schedule.steps_per_epoch=150 --set drop_path=null --output $$run; } || exit 1; \
	done
	$(BIN)/nextvit explain $(RESULTS)/runs/figure5-nextvit_small/model.safetensors src/nextvit/data/demo/backgrounds/val \
		--beside $(RESULTS)/runs/figure5-resnet50/model.safetensors \
		--beside $(RESULTS)/runs/figure5-swin_tiny_patch4_window7_224/model.safetensors --output $(RESULTS)/figure5
	$(BIN)/nextvit reproduce table4 --costs --output $(RESULTS)

# What goes wrong on purpose: expected and found, row by row.
faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0 -m fault -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Choose the versions of requirements.txt anew.
pin: .venv/installed
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --upgrade \
		--no-emit-index-url --no-annotate --no-header --output-file requirements.txt

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; set PYTHON=..."; exit 1; }
	@echo "installing into .venv (several GB, a few minutes at most) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv runs build dist
