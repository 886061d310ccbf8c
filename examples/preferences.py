"""Preferences without annotators: which docstring belongs to this function? From Python's standard library.

The question is the source of a function without its docstring, the best answer its own docstring. The others are worse
by construction: the docstring with words of another one mixed in, another function's docstring, and that one in
disorder. They are not what people would call bad answers, but nobody has to be asked which one is better.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import LEFT_OUT, write_corpus

QUESTION = "Which docstring does this function have?\n\n{}\n\n"


def documented_functions(longest: int = 1200) -> Iterator[tuple[str, str]]:
    """(source without docstring, docstring) of functions of the standard library, in the order of their names.

    Read with `ast`: nothing is imported or run. Those with more than `longest` characters of either are left out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not LEFT_OUT.isdisjoint(path.relative_to(library).with_suffix("").parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 40 and len(node.body) > 1:
                node.body = node.body[1:]
                source = ast.unparse(node)
                if max(len(source), len(docstring)) <= longest:
                    yield source, docstring


def answers(number: int, docstrings: list[str], chance: random.Random) -> list[str]:
    """Four answers to question `number`, the best first."""
    own = docstrings[number].split(" ")
    other = docstrings[(number + chance.randrange(1, len(docstrings))) % len(docstrings)].split(" ")
    mixed = [chance.choice(other) if chance.random() < 0.5 else word for word in own]
    disordered = chance.sample(other, len(other))
    return [" ".join(words) for words in (own, mixed, other, disordered)]


def write_preferences(folder: Path, ranks: tuple[int, ...], vocabulary: int, limit: int = 0) -> None:
    """Write `preferences.json` and `preferences-dev.json` (every tenth) in PaddleNLP's format, and `tokenizer.json`.

    `ranks` says which of the four answers are given; those of one question are in random order. `limit` keeps the first
    so many questions of a random order, which is the same each time; 0 keeps all.
    """
    chance = random.Random(0)
    functions = list(documented_functions())
    if len(functions) < 20:
        raise RuntimeError(f"no docstrings under {sysconfig.get_path('stdlib')}: is Python's library stripped of them?")
    chance.shuffle(functions)
    functions = functions[: limit or None]
    docstrings = [docstring for _, docstring in functions]
    lines: list[str] = []
    for number, (source, _) in enumerate(functions):
        given = answers(number, docstrings, chance)
        chosen = [(given[rank], len(given) - rank) for rank in ranks if given[rank].strip()]
        chance.shuffle(chosen)
        if len({text for text, _ in chosen}) < len(ranks):
            continue  # a docstring that two functions share, or of one word
        texts, sort = zip(*chosen, strict=True)
        lines.append(json.dumps({"src": [QUESTION.format(source)], "tgt": [], "response": texts, "sort": sort}) + "\n")
    write_corpus(folder, vocabulary, limit)
    for name, part in (("preferences-dev", lines[::10]), ("preferences", [x for i, x in enumerate(lines) if i % 10])):
        (folder / f"{name}.json").write_text("".join(part), encoding="utf-8")


def preference_files(folder: Path, data_args: Any, example_args: Any, ranks: tuple[int, ...]) -> dict[str, str]:
    """The data arguments that name files. Without any, preferences are written to `folder`/data and named by them."""
    if data_args.train_dataset_path is None:
        if data_args.dev_dataset_path is not None:
            raise SystemExit(
                "--dev_dataset_path without --train_dataset_path: expected both, or neither (then both are written); "
                f"got {data_args.dev_dataset_path}"
            )
        if example_args.max_samples == 1:
            raise SystemExit(
                "--max_samples without --train_dataset_path must be 0 (all) or at least 2, because a worse answer is "
                "that of another question; got 1"
            )
        data = folder / "data"
        data_args.train_dataset_path = str(data / "preferences.json")
        data_args.dev_dataset_path = str(data / "preferences-dev.json")
        if not data.exists():
            print("Reading functions and docstrings of Python's standard library", flush=True)
            write_preferences(data, ranks, example_args.vocab_size, example_args.max_samples)
    names = ("train_dataset_path", "dev_dataset_path")
    return {name: getattr(data_args, name) for name in names if getattr(data_args, name)}
