# make demo: sets everything up, then shows it.    make test: every test.    make wheel: dist/*.whl
# JOBS=n limits parallel compilations.
.PHONY: setup demo test wheel format clean

setup:
	@scripts/setup.sh

demo: setup
	@scripts/demo.sh

test: setup
	@scripts/test.sh

wheel: setup
	@scripts/build_wheel.sh

format:
	@scripts/check_format.sh --fix

clean:
	rm -rf build dist .venv
