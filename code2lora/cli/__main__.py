"""`python -m code2lora.cli`: the command without its script, as `demo` runs it."""

from code2lora.cli import main

main()
