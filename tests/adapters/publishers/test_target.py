"""The line of git configuration that names a publisher, and what it may not say."""

from __future__ import annotations

from typing import Any

import pytest

from code2lora.adapters.publishers.target import Target, parse
from code2lora.errors import UserError

VALID = [
    {"kind": "vllm", "destination": "http://127.0.0.1:8000", "name": "app"},
    {
        "kind": "mistralrs",
        "destination": "https://[::1]:1234/base/",
        "name": "app.v2",
        "key_env": "MY_KEY",
    },
    {
        "kind": "vllm",
        "destination": "http://gpu.lan:8000",
        "name": "app",
        "host": "gpu.lan",
        "key_file": "/home/ada/my key",
    },
    {
        "kind": "llamacpp",
        "destination": "http://localhost:8080",
        "name": "app",
        "preset": "/home/ada/it's.ini",
        "model": "/models/mini.gguf",
        "keep": 7,
    },
    {
        "kind": "ollama",
        "destination": "http://127.0.0.1:11434",
        "name": "app",
        "model": "qwen2.5-coder:1.5b-base",
    },
    {"kind": "directory", "destination": "/srv/my adapters", "name": "app", "format": "gguf"},
]


@pytest.mark.parametrize("values", VALID, ids=lambda v: v["kind"])
def test_a_line_says_all_and_reads_back(values: dict[str, Any]) -> None:
    target = Target(**values)
    assert parse(target.text) == target
    assert "\n" not in target.text


def test_the_shortest_line() -> None:
    assert Target(**VALID[0]).text == "vllm http://127.0.0.1:8000 name=app"


WRONG = [
    ("vllm", "is not KIND DESTINATION"),
    ("vllm 'http://127.0.0.1", "is not KIND DESTINATION"),
    ("scp http://127.0.0.1 name=a", "the kind is 'scp', expected one of: vllm, mistralrs,"),
    ("vllm http://127.0.0.1", "has no name="),
    ("vllm http://127.0.0.1 name=../up", "the name is '../up'"),
    ("vllm http://127.0.0.1 name=a color=red", "'color' is not an option"),
    ("vllm http://127.0.0.1 name=a keep=many", "keep is 'many'"),
    ("vllm http://127.0.0.1 name=a keep=0", "keep is 0"),
    ("vllm ftp://127.0.0.1 name=a", "is not a URL such as"),
    ("vllm 127.0.0.1:8000 name=a", "is not a URL"),
    ("vllm http://127.0.0.1:many name=a", "is not a URL"),
    ("vllm http://example.com name=a", "example.com is another machine"),
    ("vllm http://example.com name=a host=other.com", "example.com is another machine"),
    ("vllm http://127.0.0.1.evil.com name=a", "127.0.0.1.evil.com is another machine"),
    ("vllm http://127.0.0.1@evil.com name=a", "holds a user or a password"),
    ("vllm http://user:secret@127.0.0.1 name=a", "holds a user or a password"),
    ("vllm http://127.0.0.1 name=a key-env=sk-secret", "key-env is not the name of an env"),
    ("vllm http://127.0.0.1 name=a key-file=relative", "key-file is 'relative'"),
    ("vllm http://127.0.0.1 name=a format=gguf", "vllm has no option format"),
    ("vllm http://127.0.0.1 name=a preset=/a.ini", "vllm has no option preset"),
    ("llamacpp http://127.0.0.1 name=a", "needs the router's preset file"),
    ("llamacpp http://127.0.0.1 name=a preset=a.ini", "preset is 'a.ini'"),
    ("llamacpp http://127.0.0.1 name=a 'preset=/a;b.ini'", "begin a comment"),
    ("ollama http://127.0.0.1 name=a", "ollama needs the name of the base"),
    ("directory relative name=a", "the directory is 'relative'"),
    ("directory /srv name=a format=onnx", "the format is 'onnx'"),
    ("directory /srv name=a key-env=K", "directory has no option key-env"),
    ("directory '/srv\n/x' name=a", "expected printable text"),
]


@pytest.mark.parametrize(("line", "complaint"), WRONG, ids=lambda value: value[:40])
def test_what_a_line_may_not_say(line: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(line)
    assert complaint in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("line", [line for line, _ in WRONG if "secret" in line])
def test_a_key_that_was_put_in_the_line_is_not_repeated(line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(line)
    assert "secret" not in caught.value.message + str(caught.value.hint)
