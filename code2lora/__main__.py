"""`python -m code2lora`: the command without its script, as launchers start it."""

from code2lora.cli import main

main()
