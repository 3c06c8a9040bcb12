"""The coursework as a whole: a student's copy is made, graded, and attacked. The exercises' own
tests are in coursework/."""

import ast
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.coursework import __main__ as command
from tests.coursework import exercises, grade, handout, splice
from tests.coursework.exercises import EXERCISES
from tests.coursework.mistakes import MISTAKES

ROOT = Path(__file__).parent.parent
BY_NUMBER = {exercise.number: exercise for exercise in EXERCISES}


def source(exercise):
    return (ROOT / exercise.file).read_text()


def submitted(exercise, student):
    return grade.job(
        exercise, splice.transplant(source(exercise), student, exercise.functions, exercise.file)
    )


def wrong(mistake):
    text = source(BY_NUMBER[mistake.exercise])
    return splice.edited(text, mistake.function, mistake.edits)


def with_body(code):
    """The file of exercise 2 in which its function does this."""
    body = "\n".join(line and "    " + line for line in code.splitlines())
    return splice.replace(source(BY_NUMBER[2]), "kl_estimate", body)


FORGED = """
import os
for file in range(64):
    try:
        os.write(file, b'{"tests": 6, "failed": []}\\n')
    except OSError:
        pass
os._exit(0)"""
PATCHED = """
import tests.coursework.checks
tests.coursework.checks.close = lambda *a, **k: None
return logprobs"""
REPLACED = """
import tests.coursework.checks as checks
checks.close.__code__ = (lambda actual, wanted, claim, tolerance=1e-6: None).__code__
return logprobs"""
TOLERANT = """
import tests.coursework.checks as checks
checks.close.__defaults__ = (1e9,)
return logprobs"""
FROM_WITHIN = """
import sys
tests = sys._getframe(1).f_globals
for name in tests:
    if name.startswith("test_"):
        tests[name].__code__ = (lambda: None).__code__
return logprobs"""
EQUAL = """
class Equal:
    def __eq__(self, other): return True
    def __mul__(self, other): return self
    __rmul__ = __mul__
    def sum(self): return self
return Equal()"""
WRITES = """
import os
assert "SECRET" not in os.environ, "the environment is the grader's"
os.write(os.open("left.txt", os.O_WRONLY | os.O_CREAT), b"x")"""
# A body of kl_estimate, and what the grader says of it.
HOSTILE = (
    ("import sys; sys.exit(0)", "SystemExit: a function may not end the program"),
    ("import os; os._exit(0)", "ended before its tests were through (exit status 0)"),
    ("import os; os.kill(os.getpid(), 9)", "ended before its tests were through (signal SIGKILL)"),
    ("while True: pass", "took more than 1 s"),
    ("return bytearray(10**10)", "MemoryError"),
    ("return kl_estimate(logprobs, ref_logprobs)", "RecursionError"),
    ("print('all tests passed\\n' * 10**5)\nreturn logprobs", "tests fail"),
    (FORGED, "ended before its tests were through"),
    (PATCHED, "tests.coursework.checks.close was changed"),
    (REPLACED, "tests.coursework.checks.close was changed"),
    (TOLERANT, "tests.coursework.checks.close was changed"),
    (FROM_WITHIN, " was changed"),
    ("raise ValueError('\\ud800')", "ValueError: \ud800"),
    ("torch.Tensor.__eq__ = lambda *a: True\nreturn logprobs", "Tensor.__eq__ was changed"),
    (EQUAL, "which is no tensor"),
    (WRITES, "File too large"),
)

HELPED = with_body("x = ref_logprobs - logprobs\nreturn twice(x.exp() - x - 1) / 2").replace(
    "def token_weights",
    """try:
    import no_such_module as helpful
except ImportError:
    import numpy as helpful
if helpful:
    HALF = helpful.float64(0.5)
try:
    import no_such_module
except ValueError:
    pass


def twice(x):
    return x / HALF


def token_weights""",
)
# Right bodies that have little of the reference's.
OTHERWISE = {
    1: ("group_advantages", """
    out = torch.zeros_like(rewards_PG)
    for p, group in enumerate(rewards_PG):
        mean = group.sum() / len(group)
        std = ((group - mean) ** 2).mean().sqrt() if normalize_std else 1
        if std > 1e-9:
            out[p] = (group - mean) / std
    return out"""),
    2: ("kl_estimate", """
    return torch.expm1(ref_logprobs - logprobs) + (logprobs - ref_logprobs)"""),
    3: ("grpo_loss", """
    rho = importance_ratio(logprobs_N, old_N, output_N, ratio)
    upper = 1 + (eps_high or eps)
    cut = (advantages_N > 0) & (rho > upper) | (advantages_N < 0) & (rho < 1 - eps)
    bound = torch.where(advantages_N > 0, upper, 1 - eps)
    total = -(weights_N * torch.where(cut, bound, rho) * advantages_N).sum()
    kl = torch.zeros(())
    if ref_N is not None:
        kl = kl_estimate(logprobs_N, ref_N)
        total = total + beta * (weights_N * kl).sum()
    return total, {"clip_fraction": cut.sum(), "kl": kl.sum().detach()}"""),
    5: ("rotate", """
    c, s = rows.turn_BTr.real[:, :, None], rows.turn_BTr.imag[:, :, None]
    out, half = torch.empty_like(x_BTHR), x_BTHR.shape[-1] // 2
    even = slice(0, None, 2) if interleaved else slice(0, half)
    odd = slice(1, None, 2) if interleaved else slice(half, None)
    x, y = x_BTHR[..., even], x_BTHR[..., odd]
    out[..., even], out[..., odd] = x * c - y * s, x * s + y * c
    return out"""),
    6: ("MLA.absorbed", """
        w_uk, w_uv = self.kv_b_proj.weight.view(self.H, -1, self.C).split((self.K, self.U), 1)
        q = torch.einsum("bhk,hkc->bhc", q_BTHK[:, 0], w_uk)
        q = torch.cat((q, q_BTHR[:, 0]), 2)
        mixed = kernels.mla_decode(q, cache_ZYX, rows.table_BP, rows.seen_B, self.C, self.scale)
        return torch.einsum("bhc,huc->bhu", mixed, w_uv).reshape(len(q), 1, -1)"""),
    9: ("choose", """
    rows = []
    for logits, u in zip(logits_BV, uniform_B):
        if temperature == 0:
            rows.append((int(logits.argmax()), 0.0))
            continue
        probs = (logits / temperature).softmax(0)
        kept, total = torch.zeros_like(probs), 0.0
        for i in probs.argsort(descending=True):
            if total < top_p:
                kept[i] = probs[i]
            total += float(probs[i])
        kept = kept / kept.sum()
        token = int((kept.cumsum(0) > u).nonzero()[0])
        rows.append((token, math.log(kept[token])))
    tokens, logprobs = zip(*rows)
    return torch.tensor(tokens), torch.tensor(logprobs, dtype=logits_BV.dtype)"""),
    10: ("format_reward", """
    part = r"((?:(?!</?(?:think|answer)>).)*)"
    form = rf"\\s*<think>{part}</think>" + (rf"\\s*<answer>{part}</answer>\\s*" if tags else part)
    match = re.fullmatch(form, response, re.DOTALL)
    visible = r"[^\\s\u200b]"
    return float(bool(match) and all(re.search(visible, part) for part in match.groups()))"""),
    12: ("flash_attention", """
    out, lse = [], []
    for t, q in enumerate(q_TK):
        m, l, o = torch.tensor(float("-inf")), 0, 0
        for first in range(0, t + 1, tile):
            scores = scale * (k_TK[first : min(first + tile, t + 1)] @ q)
            new = torch.maximum(m, scores.max())
            p = torch.exp(scores - new)
            l = l * torch.exp(m - new) + p.sum()
            o = o * torch.exp(m - new) + p @ v_TU[first : min(first + tile, t + 1)]
            m = new
        out.append(o / l)
        lse.append(m + torch.log(l))
    return torch.stack(out), torch.stack(lse)"""),
    13: ("majority", """
    voters = [a for a in answers if a and a.strip()]
    sizes = [sum(bool(check(b, a)) for b in voters) for a in voters]
    return voters[sizes.index(max(sizes))] if voters else None"""),
}  # fmt: skip


def otherwise(number):
    name, body = OTHERWISE[number]
    return splice.replace(source(BY_NUMBER[number]), name, body.lstrip("\n"))


ERROR = "x = 1\n\nreturn logprobs + no_such_name"


def layouts():
    """A body on the line of the signature, indented by two, and by a tab."""
    text = source(BY_NUMBER[2])
    head = splice.signature(text, "kl_estimate")
    first, second = "x = ref_logprobs - logprobs", "return x.exp() - x - 1"
    bodies = (
        f" {first}; {second}",
        f"\n  {first}\n  {second}",
        f"\n\t# Größe\n\t{first}\n\t{second}",
    )
    return [text.replace(f"{head}\n{splice.body(text, 'kl_estimate')}", head + b) for b in bodies]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("coursework") / "student"
    handout.make(out)
    return out


@pytest.fixture(scope="module")
def ran():
    """What the grader says of everything below: torch starts once, in one process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SECRET", "1")
    blanks = {exercise.file: handout.blanked(exercise.file) for exercise in EXERCISES}
    parts = dict(
        reference=[submitted(exercise, source(exercise)) for exercise in EXERCISES],
        blank=[submitted(exercise, blanks[exercise.file]) for exercise in EXERCISES],
        alone=[written_alone(exercise, blanks[exercise.file]) for exercise in EXERCISES],
        mistakes=[submitted(BY_NUMBER[mistake.exercise], wrong(mistake)) for mistake in MISTAKES],
        hostile=[submitted(BY_NUMBER[2], with_body(code)) for code, _ in HOSTILE],
        helped=[submitted(BY_NUMBER[2], HELPED), submitted(BY_NUMBER[1], HELPED)],
        layouts=[submitted(BY_NUMBER[2], text) for text in layouts()],
        error=[submitted(BY_NUMBER[2], with_body(ERROR))],
        otherwise=[submitted(BY_NUMBER[number], otherwise(number)) for number in OTHERWISE],
    )
    for job in parts["hostile"]:
        if "while True" in job["source"]:
            job["seconds"] = 1
    results = iter(grade.run([job for part in parts.values() for job in part]))
    patch.undo()
    results = {name: [next(results) for _ in part] for name, part in parts.items()}
    known = dict(zip(MISTAKES, (result.get("failed", ()) for result in results["mistakes"])))
    by_tests = {exercise.tests: exercise for exercise in EXERCISES}
    said = {
        name: [grade.explained(by_tests[j["tests"]], r, known) for j, r in zip(part, results[name])]
        for name, part in parts.items()
    }
    return said | dict(known=known)


def written_alone(exercise, blank):
    """As the student's own pytest sees the file: nothing of it is the instructor's."""
    for name in exercise.functions:
        blank = splice.replace(blank, name, splice.body(source(exercise), name))
    return grade.job(exercise, splice.Spliced(blank, []))


def test_the_reference_has_all_points(ran):
    assert ran["reference"] == [None] * len(EXERCISES)
    assert sum(exercise.points for exercise in EXERCISES) == 100


def test_other_right_solutions_have_all_points(ran):
    assert dict(zip(OTHERWISE, ran["otherwise"])) == dict.fromkeys(OTHERWISE)


def test_a_blank_exercise_has_none_and_says_so(ran):
    for exercise, message in zip(EXERCISES, ran["blank"]):
        wanted = f"not written yet (exercise {exercise.number}: {exercise.title})"
        assert message == wanted


def test_an_exercise_needs_no_other_of_its_file(ran):
    assert ran["alone"] == [None] * len(EXERCISES)


def test_each_known_mistake_fails_its_exercise_and_is_named(ran):
    for mistake, message in zip(MISTAKES, ran["mistakes"]):
        assert message is not None, f"not found: {mistake.exercise}, {mistake.name}"
        assert mistake.caught_by in [name for name, *_ in ran["known"][mistake]], (
            f"{mistake.name}: {message}"
        )
        assert message.endswith(f"Hint: {mistake.hint}"), f"{mistake.name}: {message}"
        assert "\n" not in message


def test_each_exercise_has_two_known_mistakes():
    for exercise in EXERCISES:
        names = [mistake.name for mistake in MISTAKES if mistake.exercise == exercise.number]
        assert len(set(names)) == len(names) >= 2, f"exercise {exercise.number}: {names}"


def test_a_mistake_or_a_blank_reaches_no_other_exercise():
    """What other exercises are graded on is the pristine file itself, to the letter."""
    for mistake in {mistake.exercise: mistake for mistake in MISTAKES}.values():
        file = BY_NUMBER[mistake.exercise].file
        text = wrong(mistake)
        for other in EXERCISES:
            if other.file == file and other.number != mistake.exercise:
                assert submitted(other, text)["source"] == source(other)
    for exercise in EXERCISES:
        text = handout.blanked(exercise.file)
        assert submitted(exercise, text)["source"] != source(exercise)
        assert submitted(exercise, source(exercise))["source"] == source(exercise)


def test_the_copy_has_each_signature_and_no_body(copy):
    for exercise in EXERCISES:
        text = (copy / exercise.file).read_text()
        for name in exercise.functions:
            assert splice.signature(text, name) == splice.signature(source(exercise), name)
            docstring, raises = splice.find(ast.parse(text), name).body
            assert isinstance(raises, ast.Raise)
            assert f"Exercise {exercise.number} (handout/" in docstring.value.value
        assert max(map(len, text.splitlines())) <= 100


def test_the_copy_has_no_answers(copy):
    left = {path.name for path in (copy / "tests").rglob("*.py")}
    assert not left & {"mistakes.py", "grade.py", "runner.py", "test_grpo.py", "test_model.py"}
    assert not (copy / ".git").exists()


@pytest.mark.slow
def test_no_function_of_the_copy_is_an_answer(copy):
    """Each that takes as many arguments is pasted in, with what it needs of its own file."""
    jobs = {}
    for path in sorted(copy.rglob("*.py")):
        file = path.relative_to(copy).as_posix()
        for exercise, name in [(e, name) for e in EXERCISES for name in e.functions]:
            for given, text in pasted(path.read_text(), exercise, name, file.startswith("tests/")):
                key = exercise.number, name, file, given
                jobs[key] = submitted(exercise, text) | dict(seconds=2)
    assert len(jobs) > 1000
    for exercise, name in [(e, name) for e in EXERCISES for name in e.functions]:
        for given, text in pasted(source(exercise), exercise, name, 0):
            if given == name.rpartition(".")[2]:  # the answer itself, for comparison
                jobs[exercise.number, name] = submitted(exercise, text)
    assert (6, "MLA.absorbed", "tests/coursework/test_exercise_08_cache.py", "absorbed") in jobs
    assert (12, "flash_attention", "tests/coursework/test_exercise_12_flash.py", "expected") in jobs
    results = grade.run(list(jobs.values()))
    right = {key for key, result in zip(jobs, results) if result.get("failed") == []}
    assert right == {(e.number, name) for e in EXERCISES for name in e.functions}


def pasted(text, exercise, name, unasked):
    """From the functions of a file: the name, and the exercise's file with that as the body.
    unasked: it may do without so many of the exercise's arguments."""
    wanted = parameters(splice.find(splice.tree_of(source(exercise)), name))
    indent = "    " * (2 if "." in name else 1)
    for node in ast.walk(splice.tree_of(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        own = parameters(node)
        needed = len(own) - len(node.args.defaults) - len(node.args.kw_defaults)
        returns = [n for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
        if not own or not returns or not needed <= len(wanted) <= len(own) + unasked:
            continue
        named = [f"{a} = {b}" for a, b in zip(own, wanted)]
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = [line for part in body for line in ast.unparse(part).splitlines()]
        body = "\n".join(indent + line for line in [*named, *lines, "pass"])
        yield node.name, splice.replace(source(exercise), name, body) + "\n\n" + text


def parameters(node):
    return [name for name in splice.arguments(node) if name != "self"]


def test_the_copy_has_all_that_is_installed(copy):
    project = (ROOT / "pyproject.toml").read_text()
    for line, form in (("py-modules", "{}.py"), ("packages", "{}/__init__.py")):
        names = re.search(rf"^{line} = \[(.+)\]$", project, re.M)[1]
        for name in ast.literal_eval(f"[{names}]"):
            assert (copy / form.format(name)).exists(), name


def test_make_does_not_write_over_anything(copy):
    with pytest.raises(FileExistsError, match="not empty"):
        handout.make(copy)


def test_each_exercise_has_its_page(copy):
    index = (copy / "handout" / "README.md").read_text()
    for exercise in EXERCISES:
        page = (copy / "handout" / exercise.page).read_text()
        assert page.startswith(f"# Exercise {exercise.number}: {exercise.title} (")
        assert f"]({exercise.page})" in index and f"| {exercise.points} |" in index
        assert all(hint in page for hint in exercise.hints)
        for name in exercise.functions:
            assert splice.signature(source(exercise), name) in page
        assert (
            f"exercise_{exercise.number}\n"
            in (copy / "tests" / "coursework" / exercise.tests).read_text()
        )


def test_an_equation_stands_in_the_source_and_is_taken_from_there(copy):
    said = (ROOT / "tests/coursework/exercises.py").read_text()
    for exercise in EXERCISES:
        page = (copy / "handout" / exercise.page).read_text()
        equations = handout.equations(exercise)
        assert all(f"\n{equation}\n" in page for equation in equations)
        formulas = [line.partition(": ")[2] for e in equations for line in e.splitlines()]
        assert not [formula for formula in formulas if formula and formula in said]
        if exercise.number not in (10, 11, 13):  # of which the docstrings say all
            assert equations, exercise.title
    page = (copy / "handout/01-advantages.md").read_text()
    assert "R1 Eq. 3: A_i = (r_i - mean(r)) / std(r)" in page
    page = (copy / "handout/06-absorbed.md").read_text()
    assert "q . k = (W_UK^T q_C) . c + q_R . k_R;  o = W_UV (sum_s p_s c_s)" in page


def test_the_copys_own_readme_points_only_at_what_is_there(copy):
    for page in copy.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target
    readme = (copy / "README.md").read_text()
    assert "handout/README.md" in readme and "bench" not in readme
    assert {path.name for path in copy.glob("*.md")} == {"README.md"}


def test_a_directory_for_the_json_is_refused_before_grading(tmp_path, monkeypatch, capsys):
    def graded(directory, seconds):
        raise AssertionError("it was graded first")

    monkeypatch.setattr(command, "grade", graded)
    monkeypatch.setattr(sys, "argv", ["c", "grade", str(tmp_path), "--json", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and "is a directory; give a file in it" in capsys.readouterr().err


def test_known_mistakes_have_the_seconds_that_the_student_has(monkeypatch):
    given = []

    def run(jobs, seconds):
        given.append(seconds)
        return [{"failed": []} for _ in jobs]

    monkeypatch.setattr(grade, "run", run)
    grade.failures_of(MISTAKES[:2], 77)
    assert given == [77]


def test_readme_counts_what_is_there():
    readme = (ROOT / "README.md").read_text().split("## Coursework")[1].split("\n## ")[0]
    assert f" {len(EXERCISES)} exercises" in readme
    assert f" {len(MISTAKES)} known mistakes" in readme
    assert f" {exercises.SECONDS:g} seconds" in readme


def test_a_student_can_grade_one_exercise(copy):
    flash = BY_NUMBER[12]
    with written(copy, {flash.file: source(flash), "grpo.py": "def kl_estimate(:\n"}):
        done = run_pytest(copy, "--strict-markers", "-m", "exercise_12")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "9 passed" in done.stdout


def test_where_a_file_is_no_python_or_a_loop_has_no_end_the_other_tests_go_on(copy):
    flash, votes = BY_NUMBER[12], BY_NUMBER[13]
    text = (copy / "tests/coursework/exercises.py").read_text()
    changes = {
        flash.file: source(flash),
        votes.file: splice.replace(source(votes), "majority", "    while True: pass"),
        "grpo.py": "def kl_estimate(:\n",
        "tests/coursework/exercises.py": text.replace("SECONDS = 10.0", "SECONDS = 1.0"),
    }
    with written(copy, changes):
        done = run_pytest(copy, "-k", "exercise_12 or without_votes")
    assert "9 passed" in done.stdout and "1 failed" in done.stdout, done.stdout[-3000:]
    assert "took more than 1 s: an endless loop?" in done.stdout
    assert "grpo.py" in done.stdout and "SyntaxError" in done.stdout


@contextmanager
def written(copy, texts):
    """These files, for a while."""
    before = {file: (copy / file).read_text() for file in texts}
    for file, text in texts.items():
        (copy / file).write_text(text)
    yield
    for file, text in before.items():
        (copy / file).write_text(text)


def run_pytest(copy, *flags):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *flags], cwd=copy, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip


def test_from_the_command_line_edited_tests_and_conftests_change_nothing(copy, tmp_path):
    hostile = "import builtins, sys\nprint('points: 100')\nsys.exit(0)\n"
    for name in ("conftest.py", "sitecustomize.py", "tests/conftest.py", "pytest.py", "torch.py"):
        (copy / name).write_text(hostile)
    (copy / "tests/coursework/checks.py").write_text("def close(*a, **k): pass\nsame = close\n")
    for path in (copy / "tests/coursework").glob("test_*"):
        path.write_text("def test_nothing():\n    pass\n")
    (copy / "grpo.py").write_text("def group_advantages(rewards_PG:\n")
    (copy / "sample.py").unlink()
    lse = next(mistake for mistake in MISTAKES if mistake.name == "lse without the maximum")
    (copy / "tests/coursework/flash.py").write_text(wrong(lse))
    text = (copy / "model.py").read_text()
    unprintable = "    raise ValueError('\\ud800 \\x1b[2J \\u03c0')"
    (copy / "model.py").write_text(splice.replace(text, "rotate", unprintable))
    (copy / "rewards.py").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "tests.coursework", "grade", copy, "--json", tmp_path / "g.json"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "g.json").read_text())
    assert (result["points"], result["of"]) == (0, 100)
    failed = {row["exercise"]: row["failed"] for row in result["exercises"]}
    assert failed[9] == "sample.py is missing"
    assert failed[1].startswith("grpo.py, line 1: '(' was never closed")
    assert failed[1].endswith("(exercises in this file: 1, 2, 3, 4)")
    assert "ValueError: \\ud800 \\x1b[2J \u03c0 (model.py, line" in failed[5]
    assert failed[6] == "not written yet (exercise 6: absorbed attention of MLA)"
    assert failed[12].endswith(f"Hint: {lse.hint}")
    assert "0 of 100 points" in done.stdout


def test_hostile_bodies_get_no_points(ran):
    for said, (code, wanted) in zip(ran["hostile"], HOSTILE):
        assert said is not None and wanted in said, f"{code}\n{said}"


@pytest.mark.slow
def test_who_ends_or_stops_the_graders_process_costs_no_other(monkeypatch):
    monkeypatch.setattr(grade, "LATE", 1)
    flash = BY_NUMBER[12]
    jobs = [submitted(flash, source(flash))]
    for sent in ("SIGKILL", "SIGSTOP"):
        code = f"    import os, signal\n    os.kill(os.getppid(), signal.{sent})"
        jobs.append(submitted(flash, splice.replace(source(flash), "flash_attention", code)))
        jobs.append(submitted(flash, source(flash)))
    said = [grade.explained(flash, result) for result in grade.run(jobs)]
    ended = "ended or stopped the grader's process"
    assert said == [None, ended, None, ended, None]


def test_after_a_job_that_ends_the_graders_process_another_goes_on(monkeypatch):
    def run_some(jobs, seconds):
        last = jobs.index("killer") if "killer" in jobs else len(jobs)
        return [f"{job} ran" for job in jobs[: last + 1]]

    monkeypatch.setattr(grade, "run_some", run_some)
    assert grade.run(["a", "killer", "b"], 1) == ["a ran", "killer ran", "b ran"]


def test_a_process_that_is_silent_is_killed():
    silent = [sys.executable, "-c", "import time; print('a', flush=True); time.sleep(600)"]
    with subprocess.Popen(silent, stdout=subprocess.PIPE, text=True) as process:
        assert grade.line_of(process, 60) == "a\n"
        assert grade.line_of(process, 0.1) == ""


def test_points_as_json_replace_the_file_or_leave_it(tmp_path, monkeypatch):
    file = tmp_path / "points.json"
    grades = [grade.graded(exercise, "it's \ud800") for exercise in EXERCISES]
    grade.write_json(grades, file)
    assert json.loads(file.read_text())["exercises"][0]["failed"] == r"it's \ud800"
    monkeypatch.setattr(grade, "as_json", lambda grades: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        grade.write_json(grades, file)
    assert json.loads(file.read_text())["points"] == 0
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ([], ["FILE"]))
def test_json_is_printed_or_written(tmp_path, monkeypatch, capsys, where):
    file = tmp_path / "points.json"
    where = [str(file) for _ in where]
    graded = [grade.graded(exercise, None) for exercise in EXERCISES]
    monkeypatch.setattr(command, "grade", lambda directory, seconds: graded)
    monkeypatch.setattr(sys, "argv", ["coursework", "grade", str(tmp_path), "--json", *where])
    command.main()
    printed = capsys.readouterr().out
    assert json.loads(file.read_text() if where else printed)["points"] == 100
    assert printed.endswith("100 of 100 points\n") or not where


def test_what_a_body_needs_is_carried_along(ran):
    """And what it doesn't need is not: an import that fails costs only those who use it."""
    assert ran["helped"] == [None, None]
    text = submitted(BY_NUMBER[2], HELPED)["source"]
    assert "import numpy as helpful" in text and "import no_such_module\n" not in text


def test_a_method_that_the_student_added_is_carried_along():
    gate = BY_NUMBER[7]
    body = (
        "        return self.doubled(biased_BTE)\n\n    def doubled(self, x):\n        return 2 * x"
    )
    text = submitted(gate, splice.replace(source(gate), "Gate.select", body))["source"]
    owner = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "Gate")
    assert [n.name for n in owner.body if getattr(n, "name", "") == "doubled"] == ["doubled"]


def test_an_error_is_told_with_the_students_own_line(ran):
    line = with_body(ERROR).splitlines().index("    return logprobs + no_such_name") + 1
    (said,) = ran["error"]
    assert f"NameError: name 'no_such_name' is not defined (grpo.py, line {line})" in said


def test_other_layouts_of_a_body_are_read(ran):
    assert len({source(BY_NUMBER[2]), *layouts()}) == 4
    assert ran["layouts"] == [None] * 3


def test_other_arguments_are_refused():
    text = source(BY_NUMBER[2]).replace("def kl_estimate(logprobs", "def kl_estimate(lp", 1)
    with pytest.raises(ValueError, match="kl_estimate takes lp, ref_logprobs; keep its arguments"):
        submitted(BY_NUMBER[2], text)
    gone = source(BY_NUMBER[2]).replace("def kl_estimate(", "def kl(", 1)
    with pytest.raises(ValueError, match="grpo.py has no function kl_estimate"):
        submitted(BY_NUMBER[2], gone)


def test_what_is_no_python_is_told_in_a_line():
    for text in ("x = '\0'", "(" * 5000, "-" * 10**5 + "1"):
        with pytest.raises(ValueError, match="^grpo.py") as raised:
            submitted(BY_NUMBER[1], text)
        assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_in_the_students_copy_an_exercise_needs_no_other(tmp_path):
    """Only one is written, in all of the repository, and pytest runs it as the student does."""
    handout.make(tmp_path / "student")
    for exercise in EXERCISES:
        file = tmp_path / "student" / exercise.file
        text = blank = file.read_text()
        for name in exercise.functions:
            text = splice.replace(text, name, splice.body(source(exercise), name))
        file.write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", f"exercise_{exercise.number}"],
            cwd=tmp_path / "student", capture_output=True, text=True,
        )  # fmt: skip
        file.write_text(blank)
        assert done.returncode == 0, f"{exercise.number}: {done.stdout[-3000:]}"
