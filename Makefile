# casync-updater: everything that is done with this tree. `make help` lists it.
#
# All tools come from Debian (12 or newer) by apt; nothing is taken from anywhere else, but
# for the `venv` target, which is for developers only.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.NOTPARALLEL:
MAKEFLAGS   += --no-print-directory

# Debian's own interpreter by name: another python3 on PATH lacks Debian's modules.
PYTHON      := /usr/bin/python3
# A folder for temporary files that rm clears afterwards: pytest's own clearing, in later runs,
# gives up on the very deep trees that some tests make. Its closing line is the last output.
PYTEST      := scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	TMPDIR="$$scratch" $(PYTHON) -m pytest
RUFF        := 0.17.6
ATHERIS     := 3.0.0
WORKERS     ?= 2

export PYTHONDONTWRITEBYTECODE := 1
export LC_ALL := C.UTF-8

ROOT        := $(filter 0,$(shell id -u))
SUDO        := $(if $(ROOT),,sudo)
# Root inside of a container may still not be allowed to make one: what counts is whether the
# system tests could get their namespaces and loop devices.
SYSTEM      := $(if $(ROOT),$(shell unshare --mount --net test -w /dev/loop-control 2>/dev/null \
	&& echo yes))

RUN_PACKAGES := ca-certificates casync gpgv python3 python3-configobj python3-debian \
	python3-icmplib python3-netifaces python3-requests python3-systemd python3-tqdm \
	python3-zstandard
BUILD_PACKAGES := build-essential debhelper dh-python lintian \
	pybuild-plugin-pyproject python3-all python3-setuptools
CHECK_PACKAGES := bash-completion gpg gpg-agent python3-hypothesis python3-pytest
TEST_PACKAGES := $(CHECK_PACKAGES) e2fsprogs man-db mypy procps python3-pytest-xdist \
	python3-typeshed python3-yaml shellcheck
DEMO_PACKAGES := gpg gpg-agent nginx-light python3-urllib3
BENCH_PACKAGES := iproute2 mmdebstrap nginx-light ostree procps rsync time
SYSTEM_PACKAGES := apt-utils btrfs-progs debian-archive-keyring iproute2 mmdebstrap nftables \
	python3-pyfuse3 qemu-system-common systemd-container xfsprogs
# Virtual machines, other architectures, images: for what takes minutes.
LONG_PACKAGES := $(SYSTEM_PACKAGES) arch-test cpio debootstrap debos dosfstools exfatprogs fdisk \
	kmod mtools qemu-system-arm qemu-system-x86 qemu-user-static

# Installs what is missing of the packages named; asks apt only when something is.
define install
	missing=$$(comm -23 \
		<(printf '%s\n' $(1) | sort -u) \
		<(dpkg-query -W -f '$${Package} $${db:Status-Status}\n' $(1) 2>/dev/null \
			| sed -n 's/ installed$$//p' | sort -u))
	if [ -n "$$missing" ]; then
		echo "installing:" $$missing
		if [ -n "$(SUDO)" ] && ! command -v sudo >/dev/null; then
			echo "This takes root: install these packages, or sudo, and try again." >&2
			exit 1
		fi
		apt_get() {
			$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq \
				-o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$$@" </dev/null
		}
		apt_get update
		apt_get install --yes --no-install-recommends $$missing >/dev/null
	fi
endef

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## Install what running, building and testing take (apt only)
	@$(call install,$(RUN_PACKAGES) $(BUILD_PACKAGES) $(TEST_PACKAGES) $(if $(SYSTEM),$(SYSTEM_PACKAGES)))

# One run of pytest, so that its closing line counts everything and is the last that is printed.
.PHONY: test
test: deps lint ## Types, unit, integration and the short system tests, side by side
	@if [ -z "$(SYSTEM)" ]; then
		echo "Without root and namespaces of its own this leaves out tests/system." >&2
	fi
	$(PYTEST) -n $(WORKERS) --dist loadgroup -q -m "$(if $(SYSTEM),not long,not system)" tests

.PHONY: unit
unit: ## The unit tests alone
	@$(PYTEST) -n $(WORKERS) -q tests/unit

.PHONY: test-system
test-system: deps ## Every system test, the long ones too (root; half an hour, the first time more)
	@if [ -z "$(SYSTEM)" ]; then
		echo "The system tests boot containers: that takes root." >&2
		exit 1
	fi
	$(call install,$(LONG_PACKAGES))
	$(PYTEST) -n $(WORKERS) --dist loadgroup -q -m system tests

.PHONY: online-table
online-table: deps ## From a usable interface to the first request, 40 times; the idle daemon's cost
	@PYTHONPATH=src ONLINE_FLAPS=10 ONLINE_IDLE_SECONDS=60 $(PYTEST) -q -s -k "table or idle" \
		tests/system/test_online_daemon.py

.PHONY: lint
lint: ## mypy (strict), and ruff where it is installed
	@$(PYTHON) -m mypy
	ruff=$$(command -v build/venv/bin/ruff || command -v ruff || true)
	if [ -n "$$ruff" ]; then
		"$$ruff" check src tests
		"$$ruff" format --check src tests
	else
		echo "ruff is not installed (Debian 12 has none): 'make venv' gets it." >&2
	fi

.PHONY: venv
venv: ## For developers: the pinned ruff in build/venv (from PyPI)
	@$(call install,python3-venv)
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip install --quiet ruff==$(RUFF)

.PHONY: demo
demo: deps ## A publisher, a web server and a client, working together before your eyes
	@$(call install,$(DEMO_PACKAGES))
	PYTHONPATH=src $(PYTHON) tests/demo/demo.py

# The long forms; short ones are among the tests. SEED and COUNT choose another run.
SEED        ?= 1
campaign     = PYTHONPATH=src:tests $(PYTHON) tests/campaigns/$(1).py --seed $(SEED) \
	--count $(or $(COUNT),$(2))

.PHONY: campaign-kill
campaign-kill: deps ## SIGKILL at every step by name, then at random instants
	@$(call campaign,kill,2000)

.PHONY: campaign-power
campaign-power: deps ## Power cuts on a disk that remembers its writes (root; qemu-system-common)
	@$(call campaign,power,200)

.PHONY: campaign-vm
campaign-vm: deps ## Power cuts of a virtual machine with the package (root)
	@$(call install,$(LONG_PACKAGES))
	$(call campaign,vm,100)

.PHONY: campaign-errors
campaign-errors: deps ## EIO, ENOSPC, EROFS at each write, in every place (root; FUSE)
	@$(call campaign,errors,500)

.PHONY: campaign-enospc
campaign-enospc: deps ## Full disks, before and in the middle of updates (root)
	@$(call campaign,space,120)

.PHONY: campaign-server
campaign-server: deps ## A web server that fails half of all requests
	@$(call campaign,server,44)

.PHONY: campaign-mutations
campaign-mutations: deps ## Mutations of valid drives and sites (about half an hour)
	@$(call campaign,mutations,10000)

# Coverage-guided, with atheris from PyPI: Debian has no such fuzzer for Python.
SECONDS_EACH ?= 180
TARGETS     ?=

.PHONY: fuzz
fuzz: deps ## For developers: fuzz every parser (TARGETS, SECONDS_EACH, SEED; an hour for all)
	@$(call install,iproute2 python3-venv)
	test -x build/fuzz/bin/pip || $(PYTHON) -m venv --system-site-packages build/fuzz
	build/fuzz/bin/pip install --quiet atheris==$(ATHERIS)
	PYTHONPATH=src:tests build/fuzz/bin/python -m fuzz.run $(TARGETS) \
		--seconds $(SECONDS_EACH) --seed $(SEED)

.PHONY: campaign-carry
campaign-carry: deps ## One drive and ten devices of different ages, in random order
	@$(call campaign,carry,50)

.PHONY: campaign-drives
campaign-drives: deps ## USB drives pulled out of a virtual machine, COUNT times each (root; long)
	@$(call install,$(LONG_PACKAGES))
	USB_PULLS=$(or $(COUNT),20) $(PYTEST) -q tests/system/test_usb.py

.PHONY: bench
bench: deps ## Measure downloads, times and memory beside casync, rsync and OSTree (root)
	@$(call install,$(BENCH_PACKAGES))
	PYTHONPATH=src:tests $(PYTHON) tests/bench/bench.py

# dpkg-buildpackage leaves its results beside the source, hence the copy; and another Python on
# PATH would be taken for Debian's, hence the clean environment.
.PHONY: deb
deb: ## Build the Debian packages into build/deb
	@$(call install,$(RUN_PACKAGES) $(BUILD_PACKAGES) $(CHECK_PACKAGES))
	rm -rf build/deb
	mkdir -p build/deb/source
	tar --exclude-vcs --exclude=./build --exclude='.*_cache' --exclude=__pycache__ \
		--exclude='*.egg-info' -c . | tar -x -C build/deb/source
	cd build/deb/source
	env -i HOME="$$HOME" PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
		$${DEB_BUILD_OPTIONS:+DEB_BUILD_OPTIONS="$$DEB_BUILD_OPTIONS"} \
		dpkg-buildpackage --unsigned-source --unsigned-changes --build=full
	cd ..
	rm -rf source
	ls -1

.PHONY: clean
clean: ## Remove everything that was built (the base systems of the tests stay cached)
	@rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .pybuild
	find src tests -name __pycache__ -prune -exec rm -rf {} +
