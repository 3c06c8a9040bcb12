"""report.html: what it shows is what the run left, and what a policy wrote stays text."""

import json
import random
import re
import sys
from base64 import b64decode
from html.parser import HTMLParser
from urllib.parse import quote

import chromium
import pytest

import rewards
from bench import audit
from runtime import parallel, report
from runtime.flags import UserError

WORDS = rewards.REFLECTIVE, rewards.REFLECTIVE_ZH
HOSTILE = (
    "</script><img src=x onerror=alert(1)><script>alert(2)</script><!-- <script> \u2028 DATA HASH"
)
ANSWER = [" <think>", " wait", " 3", " </think>", " <answer>", " 3", " </answer>", "<|end|>"]


def output(tokens=ANSWER, reward=1.0, advantage=1.0, finished=True, **more):
    text = "".join(tokens[:-1] if finished else tokens)
    logprobs = [-i / 8 for i in range(len(tokens))]
    return dict(reward=reward, advantage=advantage, text=text, finished=finished, tokens=tokens,
                logprobs=logprobs, ref_logprobs=[x - 0.25 for x in logprobs], **more)  # fmt: skip


def group(step, *outputs, phase="rl", question="1 + 2 ?", answer="3", checker="math"):
    return dict(phase=phase, step=step, question=question, answer=answer, checker=checker, level=2,
                outputs=outputs)  # fmt: skip


def line(step, phase="rl", **more):
    return dict(phase=phase, step=step, loss=step / 8, reward=0.5, by_level={"2": 0.5}, **more)


def written(out, groups=None, metrics=(line(1), line(2)), **files) -> str:
    """A run's files, and the page of it."""
    out.mkdir(exist_ok=True)
    for name, rows in (("rollouts", groups), ("metrics", metrics)):
        if rows is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (out / f"{name}.jsonl").write_text(text)
    for name, value in files.items():
        (out / f"{name}.json").write_text(json.dumps(value))
    return report.write_report(out, rewards.is_right, *WORDS).read_text()


def data(page: str) -> dict:
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def tokens(content: dict, row: dict) -> list[str]:
    ids = b64decode(row["tokens"])
    ids = [int.from_bytes(ids[i : i + 3], "little") for i in range(0, len(ids), 3)]
    return [content["vocabulary"][i] for i in ids]


def thousandths(text: str) -> list[int]:
    raw = b64decode(text)
    return [int.from_bytes(raw[i : i + 2], "little", signed=True) for i in range(0, len(raw), 2)]


def test_the_page_has_every_group_token_and_number(tmp_path):
    wrong = output(ANSWER[:5] + [" 4", " </answer>", "<|end|>"], 0.0, -1.0)
    cut = output(ANSWER[:4], 0.0, -1.0, finished=False)
    groups = [group(1, output(), wrong), group(1, cut, cut), group(3, output(), cut)]
    content = data(written(tmp_path, groups, config={"lr": 0.1}, result={"base": {"pass@1": 1}}))
    assert [(g["step"], len(g["outputs"])) for g in content["groups"]] == [(1, 2), (1, 2), (3, 2)]
    first, second = content["groups"][0]["outputs"]
    assert tokens(content, first) == ANSWER and first["count"] == 8
    assert thousandths(first["logprobs"])[:3] == [0, -125, -250]
    assert thousandths(first["ratios"]) == [250] * 8
    assert [first["right"], second["right"]] == [True, False]
    assert content["groups"][1]["outputs"][0]["right"] is False  # it was cut off
    assert content["config"] == {"lr": 0.1} and content["result"] == {"base": {"pass@1": 1}}
    assert content["left_out"] == dict(updates=0, of_updates=2, groups=0, of_groups=3)


def test_curves_are_kept_by_phase_and_none_is_a_gap(tmp_path):
    gap = {"phase": "dev2", "step": 2, "loss": None, "kl": 0.1234567}
    metrics = [line(20, phase="dev1"), line(1, phase="dev2"), gap, line(3, phase="dev2")]
    groups = [group(1, output(), phase="dev2"), group(2, output(), phase="r1")]
    content = data(written(tmp_path, groups, metrics))
    first, second = content["phases"]
    assert (first["name"], second["name"]) == ("dev1", "dev2") and second["steps"] == [1, 2, 3]
    assert second["series"]["loss"] == [0.125, None, 0.375]
    assert second["series"]["kl"] == [None, 0.123457, None]
    assert second["series"]["by_level/2"] == [0.5, None, 0.5]
    assert {g["phase"] for g in content["groups"]} == {"dev2", "r1"}


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_what_a_policy_wrote_is_never_markup(tmp_path):
    evil = output([HOSTILE, "\ud83d", "<|end|>"])
    hostile = group(1, evil, question=HOSTILE, answer=HOSTILE, phase=HOSTILE)
    metrics = [line(1, phase=HOSTILE), line(2, phase=HOSTILE)]
    page = written(tmp_path, [hostile], metrics, config={HOSTILE: HOSTILE, "eps": float("inf")})
    harmless = written(tmp_path / "other", [group(1, output())])
    assert Elements(page).found == Elements(harmless).found
    assert page.split('id="data">')[1].split("</script>")[0].isascii()  # no U+2028
    content = data(page)
    assert tokens(content, content["groups"][0]["outputs"][0]) == [HOSTILE, "\ud83d", "<|end|>"]
    assert content["groups"][0]["question"] == HOSTILE and content["config"]["eps"] == "inf"


def test_the_page_asks_for_nothing_and_makes_no_markup_from_strings():
    page = report.PAGE.read_text()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    addresses = set(re.findall(r"https?://[^\s\"']+|url\(|@import|fetch\(", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name
    scripts = [attributes for tag, attributes in Elements(page).found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert page.count("HASH") == page.count("DATA") == 1


def test_an_old_run_without_outputs_has_its_curves(tmp_path):
    content = data(written(tmp_path, result={"zero": {"pass@1": 0.5}}))
    assert content["groups"] == [] and len(content["phases"]) == 1 and content["config"] is None
    assert data(written(tmp_path / "empty", metrics=None))["phases"] == []
    bare = output()
    del bare["ref_logprobs"]  # beta = 0: there is no reference
    content = data(written(tmp_path, [group(1, bare)]))
    assert "ratios" not in content["groups"][0]["outputs"][0]


def test_a_run_that_goes_on_may_have_half_a_line(tmp_path):
    written(tmp_path, [group(1, output())])
    for name in ("rollouts", "metrics"):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write('{"phase": "rl", "st')
    content = data(report.write_report(tmp_path, rewards.is_right, *WORDS).read_text())
    assert len(content["groups"]) == 1 and content["phases"][0]["steps"] == [1, 2]


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("metrics", "what", r"metrics.jsonl:3: Expecting value.*Delete that line"),
        ("metrics", "[]", r"metrics.jsonl:3: .*expected an object with a phase and a step"),
        ("metrics", '{"phase": "rl"}', r"metrics.jsonl:3: found no 'step'"),
        ("rollouts", "{", r"rollouts.jsonl:2: Expecting"),
        ("rollouts", "7", r"rollouts.jsonl:2: "),
        ("rollouts", '{"phase": "rl", "step": 1, "question": ""}', r":2: found no 'outputs'"),
        ("rollouts", json.dumps(group(1, {"tokens": ["a"]})), r":2: found no 'logprobs'"),
        ("rollouts", json.dumps(group(1, dict(output(), logprobs=[1]))), "8 tokens have 1 log-p"),
        ("rollouts", json.dumps(group(1, output(), answer=" ")), r":2: gold is ' '"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, row, message):
    written(tmp_path, [group(1, output())])
    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(row + "\n")
    before = (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=message):
        report.write_report(tmp_path, rewards.is_right, *WORDS)
    assert (tmp_path / "report.html").read_text() == before


def test_where_there_is_too_much_evenly_spaced_updates_are_left_and_counted(tmp_path, monkeypatch):
    groups = [group(step, output(), output()) for step in range(1, 102) for _ in range(4)]
    monkeypatch.setattr(report, "MOST_TOKENS", 25 * 4 * 16)
    content = data(written(tmp_path, groups))
    steps = sorted({g["step"] for g in content["groups"]})
    apart = {b - a for a, b in zip(steps, steps[1:])}
    assert steps[0] == 1 and steps[-1] == 101 and 20 <= len(steps) <= 25 and apart <= {4, 5}
    left = content["left_out"]
    assert left["of_updates"] == 101 and left["updates"] == 101 - len(steps)
    assert left["of_groups"] == 404 and left["groups"] == 404 - 4 * len(steps)
    # Where few would fit whole, there are more updates with fewer groups.
    monkeypatch.setattr(report, "MOST_TOKENS", 20 * 16)
    content = data(written(tmp_path, groups))
    steps = [g["step"] for g in content["groups"]]
    assert 12 <= len(steps) <= 20 and len(set(steps)) == len(steps) and {1, 101} <= set(steps)
    monkeypatch.setattr(report, "MOST_TOKENS", 1)
    assert [g["step"] for g in data(written(tmp_path, groups))["groups"]] == [1, 101]


def test_characters_over_several_tokens_are_put_together():
    broken = "\ufffd"
    assert report.mended(["a", broken, broken, " b", "<|end|>"], "a語 b") == \
        ["a", "語", "", " b", "<|end|>"]  # fmt: skip
    assert report.mended([broken, broken, "<|end|>"], "語") == ["語", "", "<|end|>"]
    assert report.mended(["x", broken], "<think>x語") == ["x", "語"]
    assert report.mended([broken, "，", broken, "!"], "語，好!") == ["語", "，", "好", "!"]
    assert report.mended([broken, "a"], "�a") == [broken, "a"]
    assert report.mended([broken, "a"], "nothing like it") != []
    assert report.mended([], "") == []


def test_what_is_no_number_has_a_sign_of_its_own(tmp_path):
    lost = dict(output(), reward=None, advantage=None)
    lost |= dict(logprobs=[None, -50.0] + [0.0] * 6)
    row = data(written(tmp_path, [group(1, lost)]))["groups"][0]["outputs"][0]
    assert thousandths(row["logprobs"])[:2] == [-(2**15), -(2**15) + 1] and row["reward"] is None
    assert thousandths(row["ratios"])[0] == -(2**15)


def test_verdicts_are_the_runs_own_and_others_are_reached_for_a_limited_time(tmp_path, monkeypatch):
    asked, now = [], [0.0]

    def is_right(*output):
        asked.append(output)
        now[0] += 10.0  # as long as a program takes that does not end
        return True

    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    kept = [output(right=False), output(right=None), output(right=True)]
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(group(1, *kept, checker="code")) + "\n")
    page = report.write_report(tmp_path, is_right, *WORDS).read_text()
    rows = data(page)["groups"][0]["outputs"]
    assert [row["right"] for row in rows] == [False, None, True] and not asked
    assert all(row["then"] for row in rows)
    with (tmp_path / "rollouts.jsonl").open("a") as file:  # and some lines of an older run
        file.write(json.dumps(group(2, *[output()] * 5, checker="code")) + "\n")
    page = report.write_report(tmp_path, is_right, *WORDS).read_text()
    rows = data(page)["groups"][1]["outputs"]
    assert [row["right"] for row in rows] == [True] * 3 + ["not judged"] * 2 and len(asked) == 3
    assert not any(row["then"] for row in rows)


def test_rewards_py_writes_it_and_refuses_what_is_no_run(tmp_path, monkeypatch, capsys):
    written(tmp_path / "run", [group(1, output())])
    (tmp_path / "run" / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["rewards.py", "--report", str(tmp_path / "run")])
    audit.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").exists()
    monkeypatch.setattr(sys, "argv", ["rewards.py", "--report", str(tmp_path)])
    with pytest.raises(SystemExit, match="no metrics.jsonl there"):
        audit.main()


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    assert report.write_report(tmp_path, rewards.is_right, *WORDS) is None
    assert not list(tmp_path.iterdir())


# ---- in a browser --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.PROGRAM is None:
        pytest.skip("there is no Chromium")
    try:
        page = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    except (AssertionError, OSError) as error:
        pytest.skip(f"Chromium does not start here: {error}")
    yield page
    page.close()


def text_of(selector):
    return f"document.querySelector({selector!r}).textContent"


@pytest.fixture
def long_run(tmp_path):
    """The page of a run of 80 rollouts, two updates after each, with four questions of each."""
    groups = [group(step, output([f" s{step}q{q}", *ANSWER]), output(ANSWER[1:], 0.0, -1.0),
                    question=f"step {step}, question {q}?")
              for step in range(1, 161, 2) for q in (1, 2, 3, 4)]  # fmt: skip
    result = {"base": {"pass@1": 0.1}, "zero": {"pass@1": 0.9, "by_level": {"2": {"pass@1": 1}}}}
    more = dict.fromkeys(("kl", "tokens", "entropy", "format", "grad_norm", "truncated"), 0.5)
    written(tmp_path, groups, [line(step, **more) for step in range(1, 161)], result=result)
    return f"file://{tmp_path}/report.html"


def test_any_group_is_found_and_read_within_three_clicks(browser, long_run):
    browser.look(1280)
    browser.open(long_run)
    assert "step 159, question 1?" in browser.js(text_of("#group"))  # the newest
    width = browser.js("document.getElementById('update').offsetWidth")
    for place, question in ((0, 4), (3, 2), (27, 3), (62, 1), (79, 4)):  # each is 2 clicks away
        browser.click("#update", across=(8 + (width - 16) * place / 79) / width)
        browser.click(f"#questions label:nth-child({question})")
        step = 1 + 2 * place
        assert f"step {step}, question {question}?" in browser.js(text_of("#group"))
        assert f" s{step}q{question} <think> wait" in browser.js(text_of("#list"))
        assert browser.js("location.hash") == f"#rl/{step}/{question}"
    browser.click("#before")
    assert "step 157, question 4?" in browser.js(text_of("#group"))
    browser.click("#charts svg")  # in the middle of a curve, and so of the run
    assert 70 < int(browser.js("location.hash").split("/")[1]) < 90
    assert browser.js("[...document.querySelectorAll('mark')].map(m => m.textContent)")[0] == "wait"
    for address, shown in (("#rl/1/4", "step 1, question 4?"), ("#constructor/1", "step 159, q")):
        browser.open(long_run + address)
        assert shown in browser.js(text_of("#group"))
        assert not browser.problems() and browser.requests() == [long_run]
    assert "0.9" in browser.js(text_of("#results"))


def test_on_a_phone_a_group_is_no_further_than_a_screen_and_a_half(browser, long_run):
    browser.look(390)
    browser.open(long_run)
    top = "document.querySelector({!r}).getBoundingClientRect().top"
    assert browser.js(top.format("#questions")) < browser.js(top.format("#group")) < 1.5 * 844
    assert "more curves" in browser.js(text_of("#more summary"))  # they are folded, but for one
    assert browser.js("document.querySelectorAll('#charts figure').length") == 1
    browser.click("nav a[href='#outputs']")
    assert browser.until(f"{top.format('#outputs')} < 200")
    assert browser.js(top.format("#outputs")) >= 0
    browser.look(1280)  # the phone is turned, or the window made wider
    assert browser.until("document.querySelectorAll('#charts figure').length === 8")
    assert not browser.problems()


@pytest.mark.slow
def test_tokens_are_shaded_and_tell_their_numbers_and_keys_lead_on(browser, tmp_path):
    groups = [group(step, output([f" s{step}q{q}", *ANSWER]), output(ANSWER[1:], 0.0, -1.0),
                    question=f"step {step}, question {q}?")
              for step in (1, 5, 9) for q in (1, 2)]  # fmt: skip
    written(tmp_path, groups, [line(step) for step in range(1, 11)])
    browser.look(1280)
    browser.open(f"file://{tmp_path}/report.html#rl/5/2")
    shaded = "[...document.querySelectorAll('.tokens')].map(p => p.lastElementChild.className)"
    assert browser.js(shaded) == ["up5", "down5"]  # an advantage of 1, where 2 is the darkest
    browser.click("#shades label:nth-child(2)")
    assert browser.js(shaded) == ["up3", "up3"]  # 0.25 nats, where 1 is the darkest
    browser.click(".tokens span:nth-child(3)")
    told = '3: " wait", log-prob -0.250 (77.9 %), against the reference +0.250 (× 1.28)'
    assert browser.js(text_of(".output footer")) == told
    browser.click("#questions label:nth-child(2)")
    browser.key("ArrowRight")
    assert browser.js("location.hash") == "#rl/9/2"
    browser.key("ArrowLeft", shift=True)
    assert browser.js("location.hash") == "#rl/9/1"
    assert not browser.problems()


@pytest.mark.slow
def test_a_verdict_is_told_and_so_is_that_there_is_none(browser, tmp_path, monkeypatch):
    outputs = [output(right=right) for right in (True, False, None)]
    groups = [group(1, *outputs), group(1, output(), output(), checker="code")]
    monkeypatch.setattr(report, "JUDGING", 0.0)
    written(tmp_path, groups)
    browser.look(1280)
    told = "[...document.querySelectorAll('.output header b:nth-child(2)')].map(b => b.textContent)"
    browser.open(f"file://{tmp_path}/report.html#rl/1/1")
    assert browser.js(told) == ["✓ right", "✗ wrong", "no rule"]
    assert "right or wrong as the run judged" in browser.js(text_of("#group"))
    browser.open(f"file://{tmp_path}/report.html#rl/1/2")
    assert browser.js(told) == ["not judged"] * 2
    listed = browser.js(text_of("#questions"))
    assert "1/3 right, reward" in listed and listed.endswith("1 + 2 ?reward 1.00")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 320, 1280])
def test_nothing_is_wider_than_the_screen_and_hostile_text_stays_text(browser, tmp_path, width):
    evil = output([HOSTILE, "\u202e", "a" * 3000, " but"], finished=False)
    names = ["rl", "<b>/ ä"]
    groups = [group(1, evil, question=HOSTILE * 3, answer=HOSTILE, phase=name) for name in names]
    metrics = [line(step, phase=name) for name in names for step in (1, 2)]
    result = {f"a stage {i}": {"pass@1": i / 7, "interval": [0.1, 0.2]} for i in range(7)}
    written(
        tmp_path, groups, metrics, config={"eps": float("inf"), HOSTILE: HOSTILE}, result=result
    )
    browser.look(width)
    browser.open(f"file://{tmp_path}/report.html#{quote('<b>/ ä', safe='')}/1/1")
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    assert browser.js("document.querySelectorAll('img, main script, main b b').length") == 0
    assert HOSTILE.replace("\u2028", "") in browser.js(text_of("#list")).replace("\u2028", "")
    assert "[U+202E]" in browser.js(text_of("#list")) and "\u202e" not in browser.js(
        text_of("main")
    )
    assert "unfinished" in browser.js(text_of("#list"))
    small = "[...document.querySelectorAll('button, select, .chips span, nav a, summary')]" \
        ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 43.9).length"
    assert browser.js(small) == 0
    assert not browser.problems() and len(browser.requests()) == 1


@pytest.mark.slow
def test_ten_thousand_outputs_and_long_ones_do_not_stall(browser, tmp_path):
    dice = random.Random(0)
    words = [f" w{i}" for i in range(5000)]
    groups = [group(step, *(output(dice.choices(words, k=200)) for _ in range(16)))
              for step in range(1, 626)]  # fmt: skip
    groups.append(group(626, output(dice.choices(words, k=31204))))
    page = written(tmp_path, groups, [line(step) for step in range(1, 627)])
    assert len(page) < 25e6
    browser.look(1280)
    assert browser.open(f"file://{tmp_path}/report.html") < 3
    assert browser.js("document.querySelectorAll('.tokens span').length") == 800
    took = "(act => { const start = performance.now(); act(); document.body.offsetHeight;" \
        " return performance.now() - start; })"  # fmt: skip
    more = "document.querySelector('.output button')"
    assert browser.js(f"{more}.textContent") == "Show all 31,204 tokens"
    assert browser.js(f"{took}(() => {more}.click())") < 2000
    assert browser.js("document.querySelectorAll('.tokens span').length") == 31204
    assert browser.js(f"{took}(() => document.getElementById('before').click())") < 500
    find = "document.getElementById('what').value = 'a reflective word';" \
        "document.getElementById('find').click()"  # fmt: skip
    assert browser.js(f"{took}(() => {{ {find} }})") < 3000  # through all of them: there is none
    assert browser.js(text_of("#found")) == "none"
    assert not browser.problems()
