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
	$(PY) propagate.py --video $(CLIP)/clip.mp4 --mask $(CLIP)/f0.png --out results/demo --overwrite
	$(PY) evaluate.py --data $(CLIP) --predictions results --out results/demo
	@echo "Look at results/demo/overlay.mp4 and results/demo/contact_sheet.jpg"

test: .venv/tests
	$(PY) -m pytest

bench: .venv/ready
	$(PY) benchmarks/propagation.py
	$(PY) benchmarks/export.py
	$(PY) benchmarks/training.py
	$(PY) benchmarks/training_uvc.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r $(REQUIREMENTS)
	touch $@

.venv/tests: .venv/ready tests/requirements.txt
	-$(PY) -m pip install --quiet -r tests/requirements.txt  # without it the tests of TensorRT and timm skip
	touch $@

clean:
	rm -rf .venv results/demo $(CLIP)
