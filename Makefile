# The front door. Every target sets up what it needs; ARGS passes Hydra overrides:
#   make train-ldm ARGS="data=nifti data.root=DIR trainer.max_time=00:01:00:00"
PYTHON ?= python3
VENV ?= .venv
LDM = $(VENV)/bin/ldm
ARGS ?=

VERBS = check train-vae train-ldm train-gan train-segmenter train-predictor train-matcher ema import-weights train-classifier sample release edit segment \
  detect evaluate compare audit

ANOMALY = $(LDM) detect experiment=demo_anomaly/demo intensity_channel=FLAIR channels=FLAIR change=brighter smoothing=1 steps=25 batch_size=32
ANOMALY_SWEEP = tune=true "sweep.levels=[280,400]"

SEGMENTATION = runs/demo_segmentation/simulated_tumour_slices
SEGMENT = $(LDM) segment experiment=demo_segmentation/demo evaluate=true 'augment=$${data.augment}'

.PHONY: help setup demo demo-segmentation demo-anomaly $(VERBS) test lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ldm needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch>=2.10"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(VENV)/.installed ## virtual environment with the pinned dependencies

demo: $(VENV)/.installed ## simulated cohort, both stages, samples, report: about 15 minutes on 2 CPU cores
	$(LDM) check experiment=demo/demo
	$(LDM) train-vae experiment=demo/demo
	$(LDM) train-ldm experiment=demo/demo
	$(LDM) evaluate experiment=demo/demo
	@echo "Report: $(CURDIR)/runs/demo/simulated/evaluation/report.html"

demo-segmentation: $(VENV)/.installed ## simulated tumours segmented by diffusion and by a U-Net: about 15 minutes on 2 CPU cores
	$(LDM) check experiment=demo_segmentation/demo
	$(LDM) train-ldm experiment=demo_segmentation/demo
	$(LDM) train-segmenter experiment=demo_segmentation/demo
	$(SEGMENT) model=$(SEGMENTATION)/segmenter/model.safetensors out=$(SEGMENTATION)/peer
	$(SEGMENT) "beside={U-Net: $(SEGMENTATION)/peer}"
	@echo "Report: $(CURDIR)/$(SEGMENTATION)/segmentation/report.html"

demo-anomaly: $(VENV)/.installed ## simulated tumours found without masks, by two ways of guidance: about 15 minutes on 2 CPU cores
	$(LDM) check experiment=demo_anomaly/demo
	$(LDM) train-ldm experiment=demo_anomaly/demo
	$(LDM) train-classifier experiment=demo_anomaly/demo
	$(ANOMALY) $(ANOMALY_SWEEP) "sweep.scales=[30,100]" out=runs/demo_anomaly/tuning
	$(ANOMALY) out=runs/demo_anomaly/detection
	$(ANOMALY) guide=free $(ANOMALY_SWEEP) "sweep.scales=[2,4]" out=runs/demo_anomaly/tuning_free
	$(ANOMALY) guide=free out=runs/demo_anomaly/detection_free
	@echo "Numbers: $(CURDIR)/runs/demo_anomaly/detection/metrics.md, and of detection_free; pictures: panel.png beside them"

$(VERBS): $(VENV)/.installed ## the verbs, with ARGS="key=value ..."
	$(LDM) $@ $(ARGS)

test: $(VENV)/.installed-dev ## all tests
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev ## style
	$(VENV)/bin/ruff check ldm tests benchmarks
	$(VENV)/bin/ruff format --check ldm tests benchmarks

clean: ## remove runs and simulated cohorts (not the environment)
	rm -rf runs data/simulated/*mm_*
