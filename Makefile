# Two commands matter: `make demo` and `make test`. Both set up everything in .venv.
PYTHON ?= python3
PY := .venv/bin/python
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-oldest test-newest test-colab check notebooks sync world bench bench-gpu bench-first-look bench-lora experiments-small experiments clean

.venv/.run: settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.run
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.run            ## the tiny world: partition, DPO, stepwise DPO, report
	$(PY) -m sdpo_nb.cli demo --folder runs/demo

test: check                 ## drift, every notebook, tests/
	$(PY) -m pytest -q -n 2 --dist worksteal tests

test-oldest: .venv-oldest/.dev ## the suite with the lower bounds of settings.ini (PYTHON=python3.11: newer ones lack wheels); without TRL, which wants more
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal -rs tests

test-newest:                ## the suite with whatever pip finds today
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q -U --upgrade-strategy eager -e '.[dev]'
	.venv-newest/bin/python -m pytest -q -n 2 --dist worksteal -W default tests

test-colab: .venv-colab/.dev ## every notebook alone in an empty folder, the package as a wheel, with Colab's versions (NB=nbs/03_loss.ipynb for one)
	.venv-colab/bin/python .ci/colab.py install
	.venv-colab/bin/python .ci/colab.py run $(NB)

.venv-colab/.dev: constraints-colab.txt
	$(PYTHON) -m venv --clear .venv-colab
	.venv-colab/bin/python -m pip install -q -r constraints-colab.txt
	touch $@

.venv-oldest/.dev: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	sed -nE 's/^(peft_|eval_)?requirements = //p' settings.ini | tr ' ' '\n' | sed 's/>=/==/' > .venv-oldest/bounds.txt
	sed -n 's/^dev_requirements = //p' settings.ini | tr ' ' '\n' | grep -v '^trl' > .venv-oldest/tools.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/bounds.txt -r .venv-oldest/tools.txt -e .
	touch $@

check: .venv/.dev           ## notebooks, modules, twins and README say the same
	$(PY) .ci/book.py check

notebooks: .venv/.dev       ## run notebooks (NB=nbs/00_world.ipynb for one) and store their outputs
	$(PY) .ci/book.py run $(NB)

sync: .venv/.dev            ## after an edit of a notebook: clean, export, twin, README
	$(PY) .ci/book.py sync

world: .venv/.run           ## rebuild the tiny world and compare it with data/
	$(PY) -m sdpo_nb.world

bench: .venv/.dev           ## chapter 04 against padding and TRL, on a real model (SDPO_MODEL, SDPO_DATA); an hour or two
	$(PY) tests/bench_packing.py all

bench-gpu: .venv/.dev       ## chapter 04 on a graphics card, at most eight minutes (needs runs/gpu_ids.parquet: tests/bench_gpu.py prepare)
	$(PY) tests/bench_gpu.py all

bench-first-look: .venv/.run ## chapter 06: false alarms and wrong tables, on a real model (SDPO_MODEL, SDPO_DATA); hours on a CPU, goes on where it stopped
	$(PY) tests/bench_first_look.py run

bench-lora: .venv/.dev      ## chapter 09: adapters beside full training, on a real model (SDPO_MODEL, SDPO_DATA); some minutes
	$(PY) tests/bench_lora.py all

experiments-small: .venv/.run ## every method of the experiments once, on few pairs
	$(PY) -m sdpo_nb.experiments small

experiments: .venv/.run      ## the grids of the experiments: hours, goes on where it stopped
	$(PY) -m sdpo_nb.experiments

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-colab runs _proc build dist *.egg-info
