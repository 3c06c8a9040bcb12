"""Function bodies, cut out of a file and put into another, by their place in the text: whatever
stands around them, comments and layout, stays as it is.

    blank(text, {name: (docstring, error)})    a student's file
    transplant(pristine, student, names)       the file that is graded: all the instructor's, but
                                               for these bodies and what they need
    edited(text, name, edits)                  a body with a known mistake

A function is named as in `grpo_loss` or `Gate.forward`.
"""

import ast
import json
import re
from dataclasses import dataclass
from functools import lru_cache

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Spliced:
    text: str
    origin: list[int | None]  # of each line: its number in the student's file, if it is from there


tree_of = lru_cache(64)(ast.parse)


def lines_of(text: str) -> list[str]:
    """As ast counts them; str.splitlines would split at form feeds and U+2028 too."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def parse(text: str, file: str) -> ast.Module:
    """Raises ValueError, in one line, for what is no Python."""
    try:
        return tree_of(text)
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # NUL bytes; nested too deeply
        raise ValueError(f"{file} can't be read: {type(error).__name__}: {error}") from None


def find(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The last definition of that name, which is the one that Python would use."""
    node = tree
    for part in name.split("."):
        found = [n for n in node.body if isinstance(n, DEFINITIONS) and n.name == part]
        if not found:
            return None
        node = found[-1]
    return node if isinstance(node, ast.FunctionDef) else None


def span(text: str, node: ast.FunctionDef) -> tuple[int, int]:
    """Where in the text, in characters, the body begins and ends; the comments above its first
    statement belong to it."""
    starts = [0]
    for line in lines_of(text):
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:  # ast counts columns in UTF-8 bytes
        start = starts[line - 1]
        encoded = text[start : starts[line]].encode()
        return start + len(encoded[:column].decode())

    first, last = node.body[0], node.body[-1]
    begin, end = place(first.lineno, first.col_offset), place(last.end_lineno, last.end_col_offset)
    above = text[starts[first.lineno - 1] : begin]
    if above.strip():  # `def f(x): return x`
        return begin, end
    line = first.lineno - 1
    while text[starts[line - 1] : starts[line]].strip().startswith("#"):
        line -= 1
    return starts[line], end


def body(text: str, name: str) -> str:
    return text[slice(*span(text, find(tree_of(text), name)))]


def signature(text: str, name: str) -> str:
    """`def ...:` as it stands in the file, without the body."""
    node = find(tree_of(text), name)
    lines = text.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    while lines[-1].strip().startswith("#"):
        lines.pop()
    lines = [line[node.col_offset :].replace("  # fmt: skip", "") for line in lines]
    return "\n".join(lines).rstrip()


def arguments(node: ast.FunctionDef) -> list[str]:
    a = node.args
    named = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return [argument.arg for argument in named if argument is not None]


def replace(text: str, name: str, new: str) -> str:
    begin, end = span(text, find(tree_of(text), name))
    return text[:begin] + new + text[end:]


def blank(text: str, notes: dict[str, tuple[str, str]]) -> str:
    """Each named body becomes its docstring, continued by a note, and an error."""
    for name, (note, error) in notes.items():
        node = find(tree_of(text), name)
        indent = " " * (node.col_offset + 4)
        known = ast.get_docstring(node)
        note = "\n".join(part and indent + part for part in note.splitlines())
        docstring = f"\n{indent}".join(known.splitlines()) if known else ""
        docstring = "\n".join(line.rstrip() for line in docstring.splitlines())
        opening = f"{docstring}\n\n{note}" if known else note.lstrip()
        quotes = 'r"""' if "\\" in opening else '"""'
        lines = (f"{quotes}{opening}", '"""', f"raise NotImplementedError({json.dumps(error)})")
        text = replace(text, name, "\n".join(indent + line for line in lines))
    return text


def edited(text: str, name: str, edits: tuple[tuple[str, str], ...]) -> str:
    """The text with a mistake in one body. Each edit's first part must stand there exactly once."""
    new = body(text, name)
    for old, wrong in edits:
        if not old:  # all of it
            new = wrong
            continue
        if new.count(old) != 1:
            raise ValueError(
                f"{old!r} stands {new.count(old)} times in {name}, not once: the source has"
                " changed; change the edit in mistakes.py with it"
            )
        new = new.replace(old, wrong)
    return replace(text, name, new)


def bound(node: ast.stmt) -> set[str]:
    """The names that a top-level statement gives a meaning to; one such as `if` or `try`: all that
    the statements in it do."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = [*getattr(node, "targets", []), getattr(node, "target", None)]
    targets += [item.optional_vars for item in getattr(node, "items", [])]  # with ... as
    names = {n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)}
    parts = ("body", "orelse", "finalbody", "handlers", "cases")
    nested = [inner for part in parts for inner in getattr(node, part, [])]
    return names.union(*[bound(inner) for inner in nested])


def used(nodes: list[ast.stmt]) -> set[str]:
    names = [
        n for node in nodes for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))
    ]
    return {n.id if isinstance(n, ast.Name) else n.attr for n in names}


def carried(pristine: list[ast.stmt], student: list[ast.stmt], names: set[str]) -> list[ast.stmt]:
    """What the student added at the top of the file (or of the class) and the bodies reach."""
    known = {name for node in pristine for name in bound(node)}
    added = [node for node in student if bound(node) - known]
    kept: list[ast.stmt] = []
    while more := [n for n in added if n not in kept and bound(n) & names]:
        kept += more
        names |= used(more)
    return [node for node in student if node in kept]


def transplant(pristine: str, student: str, names: tuple[str, ...], file: str) -> Spliced:
    """The pristine file with the student's bodies of these functions, and with the functions,
    classes, imports and constants that the student added and these bodies use. Raises ValueError
    where a function is missing or has other arguments."""
    ours, theirs = tree_of(pristine), parse(student, file)
    nodes = {name: find(theirs, name) for name in names}
    for name, node in nodes.items():
        if node is None:
            raise ValueError(f"{file} has no function {name}: keep its name and its place")
        if arguments(node) != arguments(find(ours, name)):
            raise ValueError(
                f"{name} takes {', '.join(arguments(node))}; keep its arguments:"
                f" {', '.join(arguments(find(ours, name)))}"
            )
    bodies = list(nodes.values())
    helpers = carried(ours.body, theirs.body, used(bodies))
    pieces: list[tuple[int, int, str, int]] = []  # where, up to where, what, the student's line
    for name, node in nodes.items():
        begin, end = span(student, node)
        own_line = student[:begin].rpartition("\n")[2].strip() == ""
        new = student[begin:end] if own_line else " " * 8 + student[begin:end]
        first = student.count("\n", 0, begin) + 1
        at, upto = span(pristine, find(ours, name))
        pieces.append((at, upto, new, first))
    lines = lines_of(student)

    def add(helper: ast.stmt, at: int, before: str) -> None:
        first = min([helper.lineno] + [d.lineno for d in getattr(helper, "decorator_list", [])])
        pieces.append((at, at, before, 0))
        pieces.append((at, at, "".join(lines[first - 1 : helper.end_lineno]) + "\n", first))

    for helper in helpers:
        add(helper, before_first(pristine, ours, names), "")
    for owner in {name.rpartition(".")[0] for name in names} - {""}:
        ours_class, theirs_class = (
            next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
            for tree in (ours, theirs)
        )
        methods = [n for n in theirs_class.body if isinstance(n, ast.FunctionDef)]
        mine = [node for name, node in nodes.items() if name.startswith(owner + ".")]
        end = "".join(lines_of(pristine)[: ours_class.end_lineno])
        for method in carried(ours_class.body, methods, used(mine)):
            add(method, len(end), "\n")
    return joined(pristine, sorted(pieces, key=lambda piece: piece[:2]))


def before_first(text: str, tree: ast.Module, names: tuple[str, ...]) -> int:
    """Where the first top-level definition begins that has one of these functions in it."""
    tops = {name.partition(".")[0] for name in names}
    node = next(n for n in tree.body if isinstance(n, DEFINITIONS) and n.name in tops)
    first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    return len("".join(lines_of(text)[: first - 1]))


def joined(text: str, pieces: list[tuple[int, int, str, int]]) -> Spliced:
    new, origin, done = "", [None], 0
    for at, upto, piece, line in pieces:
        between = text[done:at]
        new += between + piece
        origin += [None] * between.count("\n")
        if line:
            origin[-1] = line
        origin += [line and line + i + 1 for i in range(piece.count("\n"))]
        if piece.endswith("\n"):
            origin[-1] = None
        done = upto
    rest = text[done:]
    return Spliced(new + rest, origin + [None] * (rest.count("\n") + 1))
