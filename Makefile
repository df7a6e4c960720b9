.PHONY: check lint types test format bench

check: lint types test    ## everything a change has to pass

lint:
	ruff format --check .
	ruff check .

types:
	mypy

test:
	pytest

format:                   ## mends format, and what lint can mend by itself
	ruff format .
	ruff check --fix .

bench:                    ## pre-training throughput and its share of the machine's matmul peak
	python benchmarks/pretrain.py
