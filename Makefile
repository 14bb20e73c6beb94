# make demo   the main job on a clip made here          make test   the whole test suite
# make bench  speed and memory, with the tables in benchmarks/
# Each sets up .venv first. REQUIREMENTS=... or PYTHON=... choose another build of torch or another Python.
PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
PY = .venv/bin/python

.PHONY: demo test bench clean

CLIP = results/demo-clip

demo: .venv/ready
	$(PY) tests/clip.py $(CLIP)
	$(PY) propagate.py --video $(CLIP)/clip.mp4 --mask $(CLIP)/f0.png --out results/default/demo --overwrite
	$(PY) evaluate.py --data $(CLIP) --predictions results/default --out results/default
	@echo "Look at results/default/demo/overlay.mp4 and contact_sheet.jpg beside it; the scores are in results/default/report.html"

test: .venv/tests
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

bench: .venv/ready
	$(PY) benchmarks/propagation.py
	$(PY) benchmarks/export.py
	$(PY) benchmarks/training.py
	$(PY) benchmarks/training_uvc.py

.venv/ready: requirements.txt
	@echo "Setting up .venv: PyTorch with CUDA is some GB (README: a smaller one), so this takes minutes."
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install -r $(REQUIREMENTS)
	touch $@

.venv/tests: .venv/ready tests/requirements.txt
	-$(PY) -m pip install --quiet -r tests/requirements.txt  # without it the tests of TensorRT and timm skip
	touch $@

clean:
	rm -rf .venv results/default $(CLIP)
