"""Source files rewritten as a reader meets them: an interface, then its implementation (or the other way round).

A guide of a module takes its definitions in order, a page's worth at a time, and shows each page twice: as a
reference (signatures and docstrings) and as source. The second half of a page repeats names, signatures and
docstrings of the first from hundreds of tokens away: text in which far tokens matter, which plain code files of
this size hardly are for a small model, and on which a truncated cache therefore costs something.
"""

from __future__ import annotations

import ast

PAGE_CHARACTERS = 2200  # of source a page; with its reference about 1,000 tokens of the base model's tokenizer


def guide(name: str, source: str) -> str:
    """The guide of a module.

    Args:
        name: of the module, for the headings.
        source: its text.

    Returns:
        The text, empty if the module has no definitions or does not parse.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    lines = source.splitlines()
    pages: list[list[ast.stmt]] = []
    size = PAGE_CHARACTERS
    for node in (n for top in tree.body for n in _pieces(top)):
        length = len(_text(lines, node))
        if size + length > PAGE_CHARACTERS:
            pages.append([])
            size = 0
        pages[-1].append(node)
        size += length
    parts = []
    for number, page in enumerate(pages):
        reference = "\n".join(_reference(lines, node) for node in page)
        halves = [f"# {name}: reference\n\n{reference}\n", f"# {name}: source\n\n{_joined(lines, page)}\n"]
        parts += halves if number % 2 == 0 else halves[::-1]
    return "\n".join(parts)


def _pieces(node: ast.stmt) -> list[ast.stmt]:
    """Functions and methods; a class comes as its methods when it is longer than a page."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node]
    if isinstance(node, ast.ClassDef):
        methods: list[ast.stmt] = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        rows = (node.end_lineno or node.lineno) - node.lineno
        return [node] if rows * 36 < PAGE_CHARACTERS else methods
    return []


def _first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


def _text(lines: list[str], node: ast.stmt) -> str:
    return "\n".join(lines[_first_line(node) - 1 : node.end_lineno])


def _joined(lines: list[str], page: list[ast.stmt]) -> str:
    return "\n\n".join(_text(lines, node) for node in page)


def _reference(lines: list[str], node: ast.stmt) -> str:
    """Signature and docstring as they stand in the source; of a class also those of its methods."""
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    body = node.body
    documented = (
        isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str)
    )
    stop = body[0].end_lineno if documented else max(node.lineno, _first_line(body[0]) - 1)
    parts = ["\n".join(lines[_first_line(node) - 1 : stop])]
    if isinstance(node, ast.ClassDef):
        methods = (n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
        parts += [_reference(lines, method) for method in methods]
    return "\n".join(parts)
