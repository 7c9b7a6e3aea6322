"""Base decoders from scratch: permissively licensed source, a tokenizer, a small Qwen2.

It refuses to know of repositories' histories, adapters and hypernetworks.
"""
