# Run `just` for what CI checks; `just --list` for the rest. (`pip install rust-just`)

default: lint test

# Everything that is not a test
lint:
    ruff check .
    ruff format --check .
    mypy
    lint-imports

# The default tier; `just test -m slow` for the long one
test *ARGS:
    pytest {{ARGS}}

# Mend what can be mended by machine
fix:
    ruff check --fix .
    ruff format .

# Write docs/reference/ again from the code
docs:
    python docs/generate_reference.py
