# SPDX-License-Identifier: GPL-2.0-only
#
# The targets; `make help` lists them.

# Options for pytest, such as ARGS='--log-mode dirty-ring --iterations 100'
ARGS ?=
# How many cells run at once; auto: one per CPU, 8 at most
WORKERS ?= auto
# What check-kernel boots: bzImage, build tree, .deb, unpacked package, installed release, or debian:6.12
KERNEL ?=
# Parameters of its KVM modules, such as 'kvm.tdp_mmu=0 kvm_amd.npt=0'
KVM_PARAMS ?=
# What the matrix is made of
MATRIX ?= matrix.toml
# A built dirty_log_test, for `make bench` to compare with
C_TEST ?=

# The results folders of runs that `make compare` compares, or the kernels of `make check-regression`
BASE ?=
NEW ?=
# The bug, a folder below bugs/, that `make prove-fix` is about
BUG ?=

# The results folder of a run that `make rejudge` judges anew
RESULTS ?=

# The results folders that `make report` is about, and the file that it writes
RUNS ?=
OUTPUT ?= report.html

# The hosts that `make hosts` runs the suite on, by the names that ssh takes
HOSTS ?=

# What makes the virtual environment; without it, python3 does, and one that works stays
PYTHON ?=

VENV := .venv
PYTEST := $(VENV)/bin/python -m runner.suite_pytest
# The tests that boot a kernel know the inside of 6.12's
FETCH = $(VENV)/bin/python -m runner.fetch $(or $(KERNEL),debian:6.12)

# The matrix as `make test` runs it: everything, but small
SHORT := --test-mem 64M --iterations 8 --ring-count 4096

# What a user's own Python and pytest are set up with could keep the suite's from finding its modules and plugins.
unexport PYTHONPATH PYTHONHOME PYTHONSAFEPATH PYTHONOPTIMIZE PYTEST_PLUGINS PYTEST_DISABLE_PLUGIN_AUTOLOAD

.DEFAULT_GOAL := help
.PHONY: help run check-kernel matrix unit test test-all kill-matrix prove-fix coverage compare rejudge check-regression hosts report fetch standalone lint guest_code bench perf clean

help: ## list the targets
	@sed -n 's/^\([a-z_-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26
	@echo "Options of run and test: ARGS='...' (docs/options.md), WORKERS=N"

run: $(VENV)/run ## the mode matrix on this host's KVM, at the kernel test's own sizes; without KVM, emulated
	$(PYTEST) -o testpaths=selftests/matrix/test_dirty_log.py -n $(WORKERS) --kernel auto $(ARGS)

check-kernel: $(VENV)/run ## the suite in another kernel: KERNEL=..., KVM_PARAMS='kvm_amd.npt=0'
	@$(VENV)/bin/python runner/check_kernel.py "$(KERNEL)" --kvm-params "$(KVM_PARAMS)" $(ARGS)

check-regression: $(VENV)/analysis ## two kernels compared, verdicts and times: BASE=debian:6.1 NEW=~/linux; fails if there is a regression
	@$(VENV)/bin/python runner/check_regression.py "$(BASE)" "$(NEW)" $(ARGS)

matrix: $(VENV)/run ## kernels against parameter sets, from the file MATRIX=matrix.toml
	@$(VENV)/bin/python runner/kernel_matrix.py "$(MATRIX)" $(ARGS)

unit: $(VENV)/run ## the quick unit tests, which need no KVM
	$(PYTEST) -n $(WORKERS) -m "not kvm and not boots and not mutants and not slow" selftests/unit $(ARGS)

test: $(VENV)/dev lint ## lint, the KVM tests at small sizes, and the quick unit tests
	$(PYTEST) -n $(WORKERS) --kernel auto $(SHORT) -m "not unit or not (boots or mutants or slow)" $(ARGS)

test-all: $(VENV)/dev lint ## everything: also unit tests with planted faults, and those that boot a kernel
	@$(FETCH) || echo "the tests that boot a kernel will not run"
	$(PYTEST) -n $(WORKERS) --kernel auto $(SHORT) $(ARGS)

kill-matrix: $(VENV)/run ## run each contract test under each planted fault; compare with the kill matrix, and add new kills
	@PYTHONPATH=lib $(VENV)/bin/python -m selftests.unit.mutants.record $(ARGS)

prove-fix: $(VENV)/run ## build and boot a kernel with and without a patch: BUG=a folder below bugs/; 10 minutes, 2 GB
	@$(VENV)/bin/python -m runner.prove_fix "$(BUG)"

coverage: $(VENV)/run ## which of KVM's code the suite executes: KERNEL=a build tree with GCOV; up to an hour
	@$(VENV)/bin/python runner/coverage.py "$(KERNEL)" "$(KVM_PARAMS)" $(ARGS)

# Only times, of which several runs are needed, need more than what the suite runs with.
SEVERAL_RUNS = $(wildcard $(BASE:=/*/results.json) $(NEW:=/*/results.json))
compare: $(VENV)/$(if $(SEVERAL_RUNS),analysis,run) ## two runs or more: BASE=results/a NEW='results/b results/c'; fails if there is a regression
	@PYTHONPATH=lib $(VENV)/bin/python -m harness.compare $(ARGS) -- "$(BASE)" $(NEW)

rejudge: $(VENV)/run ## the verdicts of a run by the known bugs of today: RESULTS=results/a; fails if it is bad
	@PYTHONPATH=lib $(VENV)/bin/python -m harness.compare --rejudge $(ARGS) -- "$(RESULTS)"

hosts: export HOSTS := $(HOSTS)
hosts: $(VENV)/run ## the mode matrix on other hosts, by ssh: HOSTS='root@a b'; ARGS='test selftests/interface' for other tests
	@$(VENV)/bin/python runner/hosts.py "$$HOSTS" $(ARGS)

report: $(VENV)/report ## one HTML file about one run or several: RUNS='results/a results/b'; OUTPUT=report.html
	@PYTHONPATH=lib $(VENV)/bin/python -m harness.report --output "$(OUTPUT)" -- $(RUNS)

fetch: $(VENV)/run ## a QEMU and a kernel (KERNEL=debian:6.12) into build/, for machines without network
	@$(FETCH)

standalone: $(VENV)/run ## one executable file that runs the suite where there is only Python: build/dirty-tracking
	@$(VENV)/bin/python -m runner.standalone build/dirty-tracking

lint: $(VENV)/dev ## ruff, mypy and codespell
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

guest_code: $(VENV)/run ## assemble the guest programs
	PYTHONPATH=lib $(VENV)/bin/python -c 'from kvm_util.guest_program import assemble_all; assemble_all()'

bench: $(VENV)/run ## inner loops beside C, growth of runs; with C_TEST=path whole runs beside the C test
	PYTHONPATH=.:lib $(VENV)/bin/python -m bench.bench $(if $(C_TEST),--c-test "$(C_TEST)") $(ARGS)

perf: $(VENV)/run ## what dirty logging costs on this host: the phases of dirty_log_perf_test, for rings too
	@PYTHONPATH=.:lib $(VENV)/bin/python -m bench.perf $(ARGS)

clean: ## remove what was built; results stay
	rm -rf build $(VENV) .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python that is named is looked at each time; so is an environment whose Python is gone, or was upgraded.
RENEW := $(if $(PYTHON),renew,$(shell $(VENV)/bin/python -c 'import _pytest' 2>/dev/null || echo renew))
.PHONY: renew

$(VENV)/run: requirements.txt make_venv.sh $(RENEW)
	@PYTHON="$(PYTHON)" ./make_venv.sh $(VENV) requirements.txt
	@touch $@

$(VENV)/report: requirements.txt requirements-report.txt make_venv.sh $(RENEW)
	@PYTHON="$(PYTHON)" ./make_venv.sh $(VENV) requirements-report.txt
	@touch $(VENV)/run $@

$(VENV)/analysis: requirements.txt requirements-analysis.txt make_venv.sh $(RENEW)
	@PYTHON="$(PYTHON)" ./make_venv.sh $(VENV) requirements-analysis.txt
	@touch $(VENV)/run $@

$(VENV)/dev: requirements.txt requirements-report.txt requirements-analysis.txt requirements-dev.txt make_venv.sh $(RENEW)
	@PYTHON="$(PYTHON)" ./make_venv.sh $(VENV) requirements-dev.txt
	@touch $(VENV)/run $(VENV)/report $(VENV)/analysis $@

# What was given is looked at before anything is done.
#
# The variables that each target uses. All others are refused: a kernel that is named and not tested would pass.
TAKES_run := ARGS WORKERS
TAKES_check-kernel := KERNEL KVM_PARAMS ARGS
TAKES_matrix := MATRIX ARGS
TAKES_unit := ARGS WORKERS
TAKES_test := ARGS WORKERS
TAKES_test-all := ARGS WORKERS
TAKES_kill-matrix := ARGS
TAKES_prove-fix := BUG
TAKES_coverage := KERNEL KVM_PARAMS ARGS
TAKES_fetch := KERNEL
TAKES_bench := C_TEST ARGS
TAKES_perf := ARGS
TAKES_compare := BASE NEW ARGS
TAKES_check-regression := BASE NEW ARGS
TAKES_rejudge := RESULTS ARGS
TAKES_report := RUNS OUTPUT
TAKES_hosts := HOSTS ARGS
VARIABLES := ARGS WORKERS KERNEL KVM_PARAMS MATRIX C_TEST BASE NEW BUG RESULTS RUNS OUTPUT HOSTS PYTHON

GOALS := $(or $(MAKECMDGOALS),help)
origin_is = $(findstring $(1),$(origin $(2)))
GIVEN := $(sort $(foreach name,$(.VARIABLES),$(if $(call origin_is,command line,$(name)),$(name))))
# The environment may have variables of these names for something else: only a run that seems to be of another kernel counts.
GIVEN += $(if $(filter run unit test test-all,$(GOALS)),$(foreach name,KERNEL KVM_PARAMS,$(if $(call origin_is,environment,$(name)),$(name))))
UNKNOWN := $(filter-out $(VARIABLES),$(GIVEN))
# run and test refuse what another goal uses, too: after `fetch run KERNEL=...` that kernel would seem to be tested.
REFUSING := $(or $(filter run unit test test-all,$(GOALS)),$(GOALS))
NEEDLESS := $(filter-out PYTHON $(UNKNOWN) $(foreach goal,$(REFUSING),$(TAKES_$(goal))),$(GIVEN))
takers = $(strip $(foreach goal,run check-kernel check-regression hosts matrix unit test test-all kill-matrix prove-fix coverage compare rejudge report fetch bench perf,$(if $(filter $(1),$(TAKES_$(goal))),$(goal))))

ifneq ($(UNKNOWN),)
$(error no such variable: $(UNKNOWN) (there are $(VARIABLES)))
endif
ifneq ($(NEEDLESS),)
name := $(firstword $(NEEDLESS))
$(error '$(name)=$($(name))' means nothing to 'make $(REFUSING)': $(name) is for $(call takers,$(name)))
endif
ifneq ($(filter run unit test test-all,$(GOALS)),)
ifneq ($(shell case "$(WORKERS)" in (auto|logical) ;; (''|*[!0-9]*) echo wrong ;; esac),)
$(error WORKERS: '$(WORKERS)' is neither a number nor auto)
endif
endif
ifneq ($(filter check-kernel,$(GOALS)),)
ifeq ($(strip $(KERNEL)),)
$(error make check-kernel: no kernel is named: KERNEL=debian:6.12, a bzImage, a build tree, ... (docs/kernels.md))
endif
endif
ifneq ($(filter coverage,$(GOALS)),)
ifeq ($(strip $(KERNEL)),)
$(error make coverage: KERNEL names no build tree of a kernel with GCOV (docs/coverage.md))
endif
endif
ifneq ($(filter compare,$(GOALS)),)
ifeq ($(and $(strip $(BASE)),$(strip $(NEW))),)
$(error make compare: BASE and NEW name the results folders of runs: BASE=results/a NEW=results/b)
endif
endif
ifneq ($(filter rejudge,$(GOALS)),)
ifeq ($(strip $(RESULTS)),)
$(error make rejudge: RESULTS names the results folder of a run: RESULTS=results/a)
endif
endif
ifneq ($(filter report,$(GOALS)),)
ifeq ($(and $(strip $(RUNS)),$(strip $(OUTPUT))),)
$(error make report: RUNS names the results folders of runs, the base first: RUNS='results/a results/b'; OUTPUT is a file)
endif
endif
ifneq ($(filter check-regression,$(GOALS)),)
ifeq ($(and $(strip $(BASE)),$(strip $(NEW))),)
$(error make check-regression: BASE and NEW name two kernels: BASE=debian:6.1 NEW=~/linux (docs/kernels.md))
endif
endif
ifneq ($(filter hosts,$(GOALS)),)
ifeq ($(strip $(HOSTS)),)
$(error make hosts: HOSTS names no host: HOSTS='root@a root@b', as ssh takes them (docs/hosts.md))
endif
endif
ifneq ($(filter prove-fix,$(GOALS)),)
ifeq ($(strip $(BUG)),)
$(error make prove-fix: BUG names no bug: BUG=ring-reset-interrupted, or another folder below bugs/)
endif
endif
ifneq ($(filter matrix,$(GOALS)),)
ifeq ($(strip $(MATRIX)),)
$(error make matrix: MATRIX names no file)
endif
endif
