from __future__ import annotations

from code2lora.training.evaluation.contexts import Chunks, Definitions, definitions, words

FILES = {
    "shop/cart.py": (
        "from shop.money import Price\n\n\n"
        "def total_price(cart, discount):\n    return sum(cart) - discount\n\n\n"
        "def empty(cart):\n    cart.clear()\n"
    ),
    "shop/money.py": "class Price:\n    def in_euro(self):\n        return 1\n\n\nRATE = 3\n",
    "garden/money.py": "class Price:\n    seeds = 2\n",
    "docs/tomatoes.md": "Tomatoes like sun and water.\n",
}


def encode(text: str) -> list[int]:
    """One token a word, so that budgets can be counted by hand."""
    return [len(word) for word in text.split()]


def test_words_of_identifiers() -> None:
    assert words("parseURL_of(x2, HTTPServer)") == ["parse", "url", "of", "x", "http", "server"]


def test_the_best_chunk_stands_next_to_the_prefix() -> None:
    chunks = Chunks(FILES, encode, chunk_tokens=8, k=2)

    found = chunks.retrieve("print(total_price(my_cart, ", path="main.py", max_tokens=100)

    blocks = found.split("# ")[1:]
    assert len(blocks) == 2
    assert blocks[-1].startswith("shop/cart.py\n") and "def total_price" in blocks[-1]
    assert "Tomatoes" not in found


def test_nothing_in_common_gives_nothing() -> None:
    assert Chunks(FILES, encode).retrieve("zzz = qqq(", path="a.py", max_tokens=99) == ""
    assert Chunks({}, encode).retrieve("cart", path="a.py", max_tokens=99) == ""


def test_a_context_keeps_to_its_tokens() -> None:
    chunks, resolved = Chunks(FILES, encode, chunk_tokens=30), Definitions(FILES, encode)
    prefix = "from shop.money import Price\ntotal_price(cart, discount) - RATE * Price("
    for most in range(0, 40, 3):
        for context in (chunks, resolved):
            assert len(encode(context.retrieve(prefix, path="a.py", max_tokens=most))) <= most


def test_what_the_prefix_shows_is_not_retrieved_again() -> None:
    prefix = FILES["shop/cart.py"] + "\ntotal_price(cart, "
    found = Chunks(FILES, encode).retrieve(prefix, path="shop/cart.py", max_tokens=200)
    assert "def total_price" not in found
    assert "def total_price" not in Definitions(FILES, encode).retrieve(
        prefix, path="shop/cart.py", max_tokens=200
    )


def test_an_import_decides_between_definitions_of_one_name() -> None:
    resolved = Definitions(FILES, encode)

    shop = resolved.retrieve("from shop.money import Price\nPrice(", path="a.py", max_tokens=99)
    garden = resolved.retrieve("from .money import Price\nPrice(", path="a.py", max_tokens=99)

    assert "in_euro" in shop and "seeds" not in shop
    assert "# garden/money.py" in garden  # a relative import fits both: the first by path


def test_names_that_are_defined_everywhere_say_nothing() -> None:
    files = {f"m{i}.py": "def main():\n    pass\n" for i in range(4)}
    assert Definitions(files, encode).retrieve("main(", path="a.py", max_tokens=99) == ""


def test_definitions_of_python() -> None:
    text = (
        "@cache\ndef one(a):\n    return a\n\nclass Two:\n    LIMIT = 3\n    def three(self): ...\n"
    )
    assert definitions("a.py", text) == [
        ("one", "@cache\ndef one(a):\n    return a"),
        ("Two", "class Two:\n    LIMIT = 3\n    def three(self): ..."),
        ("LIMIT", "    LIMIT = 3"),
        ("three", "    def three(self): ..."),
    ]


def test_definitions_of_other_languages_and_of_broken_python() -> None:
    text = "import x\nexport function add(a, b) {\n  return a + b\n}\nconst LIMIT = 3\n"
    assert definitions("a.js", text) == [
        ("add", "export function add(a, b) {\n  return a + b\n}"),
        ("LIMIT", "const LIMIT = 3"),
    ]
    assert definitions("a.py", "def fine(a):\n    return a\n\ndef broken(:\n") == [
        ("fine", "def fine(a):\n    return a"),
        ("broken", "def broken(:"),
    ]


def test_the_same_files_give_the_same_context() -> None:
    backwards = dict(reversed(FILES.items()))
    prefix = "total_price(cart, Price("
    for kind in (Chunks, Definitions):
        first = kind(FILES, encode).retrieve(prefix, path="a.py", max_tokens=60)
        assert first == kind(backwards, encode).retrieve(prefix, path="a.py", max_tokens=60)
        assert first
