"""Real text that every machine with Python has: the docstrings of the standard library, and a tokenizer for them."""

from __future__ import annotations

import ast
import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Tests, and programs that come along with the library.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
KINDS = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "coroutine", ast.ClassDef: "class"}


def docstring_pairs(shortest: int = 40) -> Iterator[tuple[str, str]]:
    """(question, docstring) of the functions and classes of Python's standard library, in the order of their names.

    Read with `ast`: nothing is imported or run. Docstrings of fewer than `shortest` characters are left out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            module = ".".join(part for part in parts if part != "__init__")
            for name, node in _definitions(tree, module):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) >= shortest:
                    yield _question(name, node), docstring


def _definitions(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in parent.body:
        if isinstance(node, Definition):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name)


def _question(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return f"What is the class {name} for?\n"
    return f"What does the {KINDS[type(node)]} {name}({ast.unparse(node.args)}) do?\n"


def write_corpus(folder: Path, vocabulary: int = 4096, limit: int = 0) -> tuple[Path, Path]:
    """Write `train.json` (PaddleNLP's src/tgt lines) and `tokenizer.json` (a byte-level BPE trained on it).

    Returns their paths. `limit` keeps the first so many pairs; 0 keeps all.
    """
    pairs = list(itertools.islice(docstring_pairs(), limit or None))
    if not pairs:
        raise RuntimeError(f"no docstrings under {sysconfig.get_path('stdlib')}: is Python's library stripped of them?")
    folder.mkdir(parents=True, exist_ok=True)
    data, tokenizer = folder / "train.json", folder / "tokenizer.json"
    data.write_text("".join(json.dumps({"src": s, "tgt": t}) + "\n" for s, t in pairs), encoding="utf-8")

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for pair in pairs for text in pair), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.save(str(tokenizer))
    return data, tokenizer
