"""Points for a student's directory, from this checkout's tests: of the student's files only the
bodies of the exercises are taken, and the functions, imports and constants that they need.

Exercise k is graded on the pristine file with the student's body of exercise k alone: a mistake in
one exercise costs no other, and they can be done in any order. What is not Python in a file costs
the exercises that live in that file. An exercise has all its points or none.

The code runs as the user who grades, in a process of its own (runner.py), which is protection
against accidents and idle tricks, not a sandbox: it could read this checkout and delete files.
Where that matters, grade in a container.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.coursework import splice
from tests.coursework.exercises import EXERCISES, SECONDS, Exercise
from tests.coursework.mistakes import MISTAKES, Mistake

ROOT = Path(__file__).parent.parent.parent
START = 120.0  # seconds for torch to be imported
LATE = 10.0  # seconds that a job may be late: its own process is killed before
MAX_FILE = 2**20
KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # what starting torch may need


@dataclass(frozen=True)
class Grade:
    exercise: int
    title: str
    points: int
    of: int
    failed: str | None  # in one line; None: nothing


def read_student(directory: Path, file: str) -> str:
    path = directory / file
    if not path.is_file():
        raise ValueError(f"{file} is missing")
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{file} has {path.stat().st_size:,} bytes; {MAX_FILE:,} are read")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no UTF-8 text") from None


def job(exercise: Exercise, spliced: splice.Spliced) -> dict:
    return dict(
        file=exercise.file, module=exercise.module, tests=exercise.tests,
        source=spliced.text, origin=spliced.origin,
    )  # fmt: skip


def run(jobs: list[dict], seconds: float = SECONDS) -> list[dict]:
    """What happened in each job (runner.py), all of them from one process; a job that ends or stops
    that process is one that failed, and another process goes on after it."""
    results: list[dict] = []
    while len(results) < len(jobs):
        results += run_some(jobs[len(results) :], seconds)
    return results


def run_some(jobs: list[dict], seconds: float) -> list[dict]:
    """The results of all jobs, or of those up to the first that the process did not survive."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.coursework.runner import"
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as given:
        json.dump([jobs, seconds], given)
        given.seek(0)
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= dict(HOME=empty, TMPDIR=empty, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", f"{start} main; main()"], cwd=empty, env=environment,
            stdin=given, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            if not line_of(process, START):
                raise RuntimeError("the grader's own process failed")
            for job in jobs:
                line = line_of(process, job.get("seconds", seconds) + LATE)
                ended = dict(ended="ended or stopped the grader's process")
                results.append(json.loads(line) if line else ended)
                if not line:
                    break
        finally:
            process.kill()
            process.communicate()
    return results


def line_of(process: subprocess.Popen, seconds: float) -> str:
    """The next line that the process writes; "" where it ends before, or is killed for its time."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    return line if line.endswith("\n") else ""


def failures_of(mistakes: Sequence[Mistake], seconds: float = SECONDS) -> dict[Mistake, list]:
    """Of known mistakes, which tests fail and with which numbers."""
    exercises = {exercise.number: exercise for exercise in EXERCISES}
    jobs = {}
    for mistake in mistakes:
        exercise = exercises[mistake.exercise]
        text = (ROOT / exercise.file).read_text()
        wrong = splice.edited(text, mistake.function, mistake.edits)
        jobs[mistake] = job(exercise, splice.Spliced(wrong, []))
    results = run(list(jobs.values()), seconds)
    return {mistake: result.get("failed") for mistake, result in zip(jobs, results)}


def explained(
    exercise: Exercise, result: dict, known: dict[Mistake, list] | None = None
) -> str | None:
    """What failed, in one line: the claim, what came of it and, where the same tests fail with the
    same numbers as with a known mistake, its hint."""
    if "ended" in result:
        return result["ended"]
    if not result["failed"]:
        return None
    name, message, _ = result["failed"][0]
    if message.startswith(f"exercise {exercise.number}:"):
        return f"not written yet ({message})"
    line = f"{len(result['failed'])} of {result['tests']} tests fail; {claim(name)}: {message}"
    for mistake, fails in (known or {}).items():
        if mistake.exercise == exercise.number and fails == result["failed"]:
            return f"{line}. Hint: {mistake.hint}"
    return line


def claim(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def printable(text: str) -> str:
    """What a student's code says may be no text, or text that moves the terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def graded(exercise: Exercise, failed: str | None) -> Grade:
    points, failed = 0 if failed else exercise.points, failed and printable(failed)
    return Grade(exercise.number, exercise.title, points, exercise.points, failed)


def grade(directory: Path, seconds: float = SECONDS) -> list[Grade]:
    """A grade for each exercise, in order."""
    broken: dict[int, str] = {}
    jobs: dict[int, dict] = {}
    for exercise in EXERCISES:
        pristine = (ROOT / exercise.file).read_text()
        try:
            text = read_student(directory, exercise.file)
            names = exercise.functions
            jobs[exercise.number] = job(
                exercise, splice.transplant(pristine, text, names, exercise.file)
            )
        except ValueError as error:
            others = [e.number for e in EXERCISES if e.file == exercise.file]
            shared = f" (exercises in this file: {', '.join(map(str, others))})"
            broken[exercise.number] = f"{error}{shared if len(others) > 1 else ''}"
    results = dict(zip(jobs, run(list(jobs.values()), seconds)))
    # A wrong value, and not code that broke or was not written, may be a known mistake.
    wrong = {n for n, result in results.items() if any(w for *_, w in result.get("failed", ()))}
    made = [mistake for mistake in MISTAKES if mistake.exercise in wrong]
    known = failures_of(made, seconds)
    return [
        graded(e, broken.get(e.number) or explained(e, results[e.number], known)) for e in EXERCISES
    ]


def as_json(grades: list[Grade]) -> str:
    total = dict(points=sum(g.points for g in grades), of=sum(g.of for g in grades))
    rows = [asdict(grade) for grade in grades]
    return json.dumps(total | dict(exercises=rows), indent=1)


def write_json(grades: list[Grade], path: Path) -> None:
    """All of it or, where that fails, what was there before."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        new = Path(directory) / path.name
        new.write_text(as_json(grades) + "\n", "utf-8")
        os.replace(new, path)


def as_text(grades: list[Grade]) -> str:
    rows = [f"{g.exercise:2}  {g.points:2} of {g.of:2}  {g.title}" for g in grades]
    rows = [f"{row}\n       {g.failed}" if g.failed else row for row, g in zip(rows, grades)]
    total = f"    {sum(g.points for g in grades)} of {sum(g.of for g in grades)} points"
    return "\n".join([*rows, total])
