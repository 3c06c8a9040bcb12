"""The student's copy of the repository, its README, and its handout: a page for each exercise, made
from the source (signature, docstring, equations), its tests (their names are claims) and
exercises.py. An equation stands in the source, above the code that computes it, and nowhere else.
"""

import ast
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from tests.coursework import splice
from tests.coursework.exercises import EXERCISES, SECONDS, Exercise

ROOT = Path(__file__).parent.parent.parent
# Of the checkout, where models, runs and grades may lie as well.
COPIED = ("*.py", "LICENSE", "pyproject.toml", ".gitignore", "data", "kernels", "runtime", "tests")
# Of its tests: the others need the bodies, or give them away.
COPIED_TESTS = ("conftest.py", "coursework")
GRADER = ("__main__.py", "grade.py", "handout.py", "mistakes.py", "runner.py", "splice.py")
SOURCES = ("R1", "V3", "DeepSeekMath", "DAPO", "Dr. GRPO", "RoFormer", "PagedAttention",
           "Nucleus sampling", "Inversion", "FlashAttention", "Online softmax")  # fmt: skip
# A comment that names its source; it goes on in lines that are further in.
EQUATION = re.compile(rf"# *((?:{'|'.join(map(re.escape, SOURCES))})\b.*(?:\n *#  +.*)*)")
OPTIONS = """addopts = "-m 'not slow and not gpu'"\n"""  # of pytest, in pyproject.toml


def make(out: Path) -> None:
    """Raises FileExistsError where OUT has something in it already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: give a directory that is new")

    def left_out(directory: str, names: list[str]) -> set[str]:
        place = Path(directory)
        wanted = {ROOT: COPIED, ROOT / "tests": COPIED_TESTS}.get(place, ("*",))
        kept = {name for name in names if any(fnmatch(name, pattern) for pattern in wanted)}
        dropped = {"__pycache__", "README.md", *(GRADER if place.name == "coursework" else ())}
        return {n for n in names if n not in kept or n in dropped or place / n == out.resolve()}

    shutil.copytree(ROOT, out, ignore=left_out, dirs_exist_ok=True)
    for file in dict.fromkeys(exercise.file for exercise in EXERCISES):
        (out / file).write_text(blanked(file))
    project = (ROOT / "pyproject.toml").read_text()
    if OPTIONS not in project:
        raise ValueError(f"pyproject.toml has no line {OPTIONS!r}: change OPTIONS in handout.py")
    # A file that is no Python stops the tests that import it, and no others.
    options = OPTIONS.replace("gpu'", "gpu' --continue-on-collection-errors")
    (out / "pyproject.toml").write_text(project.replace(OPTIONS, options))
    (out / "README.md").write_text(readme())
    write_handout(out / "handout")


def blanked(file: str) -> str:
    """The file without the bodies of its exercises."""
    notes = {}
    for exercise in EXERCISES:
        if exercise.file == file:
            page = f"handout/{exercise.page}"
            note = f"Exercise {exercise.number} ({page}). {exercise.shapes}"
            error = f"exercise {exercise.number}: {exercise.title}"
            notes |= {name: (wrapped(note), error) for name in exercise.functions}
    return splice.blank((ROOT / file).read_text(), notes)


def wrapped(text: str, width: int = 90) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def write_handout(directory: Path) -> None:
    directory.mkdir()
    (directory / "README.md").write_text(index())
    for exercise in EXERCISES:
        (directory / exercise.page).write_text(page(exercise))


def where(exercise: Exercise) -> str:
    return f"`{exercise.file}`: {', '.join(f'`{name}`' for name in exercise.functions)}"


def index() -> str:
    rows = [
        f"| {e.number} | [{e.title}]({e.page}) | {where(e)} | {e.paper} | {e.points} |"
        for e in EXERCISES
    ]
    total = sum(exercise.points for exercise in EXERCISES)
    return "\n".join([
        "# Coursework", "",
        "Each exercise is a function of this repository whose body is missing. They can be done"
        " in any order: the tests of one need no other. Read the file's docstring first.",
        "", "| | exercise | where | paper | points |", "|---|---|---|---|---|", *rows,
        f"| | | | | {total} |", "",
        *START, "",
        "**How it is graded.** The instructor's tests, which are those in `tests/coursework`, run"
        " on the instructor's files with only your body of the exercise in them, and with what you"
        " added at the top level of the same file (functions, classes, constants, imports; an `if`"
        " or `try` around them comes along) and your body uses. Keep names and arguments as they"
        " are; new files and changes elsewhere are not read. A file that is no Python costs all"
        " exercises in that file, and no other. An exercise has all its points or none,"
        f" {SECONDS:g} seconds, and 1 GB beyond what torch takes.", "",
        "**What is different when you run pytest here.** All of your files are imported, so one"
        " that is no Python stops the tests of each file that imports it (`grpo.py` imports"
        f" `model.py`, `sample.py` and `rewards.py`). Each test has {SECONDS:g} seconds, and no"
        " limit of memory.", "",
    ])  # fmt: skip


START = (
    "```bash",
    "pip install -e . pytest           # once; a CPU is enough",
    "python -m pytest -m exercise_3    # one exercise",
    "python -m pytest                  # all",
    "```",
)  # fmt: skip


def readme() -> str:
    return "\n".join([
        "# nanoR1: coursework", "",
        f"DeepSeek-R1 from scratch in PyTorch, in which {len(EXERCISES)} exercises are left to you:"
        " functions without a body, from the group advantages of GRPO to flash attention. Begin"
        " with [the handout](handout/README.md): it lists them, and has a page for each.", "",
        *START, "",
        "Every `raise NotImplementedError` names its exercise and its page. An exercise has all of"
        f" its points or none. Each test has {SECONDS:g} seconds here; in grading, an exercise has"
        " them for all of its tests. Read `model.py`, `sample.py`, `rewards.py` and `grpo.py` with"
        " the paper (arXiv 2501.12948) open; shapes are in the names, and the legend is at the top"
        " of `model.py`. Benchmarks, logs and the other tests of nanoR1 are not part of this copy.",
        "",
    ])  # fmt: skip


def equations(exercise: Exercise) -> list[str]:
    """Those that stand in the bodies, as comments; one may have several lines."""
    text = (ROOT / exercise.file).read_text()
    bodies = "\n".join(splice.body(text, name) for name in exercise.functions)
    return [re.sub(r"\n *# *", "\n    ", found) for found in EQUATION.findall(bodies)]


def claims(exercise: Exercise) -> list[str]:
    tree = ast.parse(Path(__file__).with_name(exercise.tests).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [n.removeprefix("test_").replace("_", " ") for n in names if n.startswith("test_")]


def page(exercise: Exercise) -> str:
    text = (ROOT / exercise.file).read_text()
    signatures = []
    for name in exercise.functions:
        docstring = ast.get_docstring(splice.find(splice.tree_of(text), name))
        quoted = [f'"""{docstring}"""'.replace("\n", "\n    ")] if docstring else []
        owner = [f"# of {name.rpartition('.')[0]}"] if "." in name else []
        lines = [*owner, "\n    ".join([splice.signature(text, name), *quoted])]
        signatures.append("\n".join(line.rstrip() for line in "\n".join(lines).splitlines()))
    points = f"{exercise.points} points"
    return "\n".join([
        f"# Exercise {exercise.number}: {exercise.title} ({points})", "",
        f"{where(exercise)}. In the paper: {exercise.paper}.", "",
        exercise.text.strip(), "",
        *(["What the source says above the code:", "", "```", *equations(exercise), "```", ""]
          if equations(exercise) else []),
        f"**Shapes.** {exercise.shapes} The letters are those at the top of `model.py`.", "",
        "```python", "\n\n".join(signatures), "```", "",
        "**What everyone gets wrong**", "", *[f"- {hint}" for hint in exercise.hints], "",
        f"**How it is graded.** `python -m pytest -m exercise_{exercise.number}` runs the tests."
        " Each is a claim; all must hold:", "",
        *[f"- {claim}" for claim in claims(exercise)], "",
    ])  # fmt: skip
