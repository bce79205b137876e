"""docs/assignments: right answers get all points, wrong ones lose just theirs, and a hostile one gains nothing."""
import ast
import json
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest

from wrong_answers import WRONG

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs/assignments"))
import assignments
import exercises
from exercises import EXERCISES, MODULES

RIGHT = (ROOT / "tests/wrong_answers.py").read_text()
SEED = 7


def written(name: str) -> str:
    """The source that holds the right answer of an exercise."""
    exercise = EXERCISES[name]
    return RIGHT if exercise.functions[0] in assignments.definitions(RIGHT) else (ROOT / f"{exercise.module}.py").read_text()


def spoil(name: str, fragment: str, instead: str) -> str:
    """A source in which the exercise's functions are wrong."""
    source, found = written(name), 0
    functions = assignments.definitions(source)
    lines = source.split("\n")
    for function in EXERCISES[name].functions:
        first, last = functions[function].lineno - 1, functions[function].end_lineno
        body = "\n".join(lines[first:last]) + "\n"
        found += body.count(fragment)
        source = source.replace(body, body.replace(fragment, instead))
    assert found == 1, f"{fragment!r} stands {found} times in the answer to {name}: mend the list of wrong ones"
    return source


@cache
def reference(name: str, seed: int) -> list:
    return [assignments.plain(fact.answer()) for fact in EXERCISES[name].facts(exercises.Draw(seed, name))]


def problems(name: str, source: str, seed: int = SEED) -> str:
    """What the grader would say, found in this process: the first fact that fails."""
    want = reference(name, seed)
    kept = {module: dict(vars(module)) for module in MODULES.values()}
    try:
        assignments.put_in(EXERCISES[name], source)
        for fact, right in zip(EXERCISES[name].facts(exercises.Draw(seed, name)), want):
            try:
                line = json.dumps({"value": assignments.plain(fact.answer())})
            except Exception as e:
                return f"{fact.text}: {assignments.describe(e, source, EXERCISES[name].module + '.py')}"
            found = assignments.compare(line.encode(), right)
            if found:
                return f"{fact.text}: {found}"
        return ""
    finally:
        for module, names in kept.items():
            vars(module).update(names)


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_unlike_the_reference_hold_and_wrong_ones_fail(name):
    assert problems(name, written(name)) == ""
    assert len(WRONG[name]) >= 3
    for what, fragment, instead in WRONG[name]:
        assert problems(name, spoil(name, fragment, instead)), what


# ---------------------------------------------------------------------------------- through the real isolation


@pytest.fixture(scope="module")
def grader():
    with assignments.Grader() as grader:
        yield grader


def returns_with(body: str) -> str:
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    return f'def returns(rewards, horizon, gamma):\n    """Hostile."""\n{lines}'


HOSTILE = {
    "an exception": "raise KeyboardInterrupt",
    "the end of its process": "import os\nos._exit(0)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "an endless loop": "while True: pass",
    "all memory": "return bytearray(10 ** 12)",
    "a flood": "import os\nwhile True: os.write(3, b'\\n' * 2 ** 20)",
    "lines that it writes itself": (
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'{\"value\": true}\\n{\"error\": \"\"}\\n{}\\n')\n"
        "  except OSError: pass\nos._exit(0)"),
    "an error of no words": "import json\njson.dumps = lambda *a, **k: '{\"error\": \"\"}'\nreturn rewards",
    "an equality that always holds": (
        "import math, torch\nmath.isclose = torch.allclose = torch.equal = lambda *a, **k: True\n"
        "torch.Tensor.tolist = lambda self: float('nan')\nreturn rewards"),
    "another grader in this process": (
        "import sys\nmain = sys.modules['__main__']\nmain.difference = main.compare = lambda *a: ''\n"
        "main.describe = lambda *a: ''\nmain.plain = lambda value: {}\nreturn rewards"),
    "a process": "import subprocess\nsubprocess.run(['true'])",
    "a fork": "import os\nos.fork()",
    "the end of the server": "import os\nos.kill(os.getppid(), 9)",
    "the reference's source": f"exec(open({str(ROOT / 'estep.py')!r}).read(), globals())\nreturn returns(rewards, horizon, gamma)",
    "the reference's bytecode": "import importlib\nimport estep\nimportlib.reload(estep)\nreturn estep.returns(rewards, horizon, gamma)",
    "the reference in memory": (
        "import gc\n[found] = [f for f in gc.get_objects() if type(f) is type(returns)\n"
        "           and f.__name__ == 'returns' and f is not returns]\nreturn found(rewards, horizon, gamma)"),
    "nesting": "import json\njson.dumps = lambda *a, **k: '[' * 10 ** 6\nreturn rewards",
}


def test_a_hostile_answer_gains_nothing_and_costs_that_exercise_only(grader, tmp_path):
    file, mark = tmp_path / "estep.py", tmp_path / "mark"
    bodies = HOSTILE | {"a file": f"open({str(mark)!r}, 'w')"}
    for what, body in bodies.items():
        file.write_text(returns_with(body))
        assert grader.grade(tmp_path, "returns", SEED), what
    source = RIGHT + f"\nopen({str(mark)!r}, 'w')\n"                      # what stands outside of functions
    for module in ("estep", "elbo", "torch", "json", "exercises", "sitecustomize"):
        (tmp_path / f"{module}.py").write_text(source)
    (tmp_path / "docs/assignments").mkdir(parents=True)
    (tmp_path / "docs/assignments/assignments.py").write_text(source)     # an edited grader
    assert grader.grade(tmp_path, "returns", SEED) == ""
    assert not mark.exists()


def test_what_is_not_there_is_said(grader, tmp_path):
    assert "estep.py" in grader.grade(tmp_path, "returns", SEED)
    for source, said in {"x = 1": "estep.py has no function returns", "def returns(:\n": "line 1 of estep.py",
                         returns_with("return rewards[9]"): "(line 3 of estep.py: return rewards[9])",
                         returns_with("return None"): "the answer is None, should be 2 entries",
                         returns_with("return -rewards"): "the answer[0][0][0] is "}.items():
        (tmp_path / "estep.py").write_text(source)
        problem = grader.grade(tmp_path, "returns", SEED)
        assert said in problem and EXERCISES["returns"].hint in problem


def test_a_copy_lacks_just_the_exercises(tmp_path):
    assignments.make_copy(tmp_path / "mine")
    with pytest.raises(ValueError, match="exists"):
        assignments.make_copy(tmp_path / "mine")
    for module in MODULES:
        ours, theirs = (ast.parse((folder / f"{module}.py").read_text()) for folder in (ROOT, tmp_path / "mine"))
        blanked = {f for exercise in EXERCISES.values() if exercise.module == module for f in exercise.functions}
        for a, b in zip(ours.body, theirs.body, strict=True):
            if getattr(a, "name", "") in blanked:
                assert ast.get_docstring(a) == ast.get_docstring(b) and ast.unparse(a.args) == ast.unparse(b.args)
                assert len(b.body) == 2 and ast.unparse(b.body[1]).startswith("raise NotImplementedError(")
            else:
                assert ast.dump(a) == ast.dump(b)
    assert (tmp_path / "mine/base/model.safetensors").exists() and not (tmp_path / "mine/tests").exists()


def test_each_wrong_answer_costs_its_own_points_in_the_file_for_gradescope(grader, tmp_path, capsys, monkeypatch):
    """Wrong in four of the seven functions of estep.py and a bench.py left blank: each costs its own points."""
    assignments.make_copy(tmp_path / "mine")
    for module in MODULES.keys() - {"bench", "estep"}:
        (tmp_path / f"mine/{module}.py").write_text(RIGHT)
    wrong = ["returns", "advantages", "reinforce", "anchor"]
    source = written("e_update")
    for name in wrong:
        _, fragment, instead = WRONG[name][0]
        functions = assignments.definitions(spoil(name, fragment, instead))
        source += "\n\n" + "\n\n".join(ast.unparse(functions[f]) for f in EXERCISES[name].functions)   # the last one counts
    (tmp_path / "mine/estep.py").write_text(source)
    graded = assignments.grade(grader, tmp_path / "mine", list(EXERCISES), 3)
    lost = [test["name"] for test in graded["tests"] if not test["score"]]
    assert lost == [*wrong, "pass_at_k"]
    assert graded["score"] == 100 - sum(EXERCISES[name].points for name in lost)
    assert [test["max_score"] for test in graded["tests"]] == [e.points for e in EXERCISES.values()]
    assert f"{graded['score']:3} of 100; inputs of seed 3" in capsys.readouterr().out
    assert "NotImplementedError" in graded["tests"][-2]["output"]
    monkeypatch.setattr(assignments, "Grader", lambda: nullcontext(grader))
    file = tmp_path / "results.json"
    assignments.main(["grade", str(tmp_path / "mine"), "--only", "pack", "--json", str(file), "--seed", "3"])
    test = dict(name="pack", score=6, max_score=6, output="all facts hold")
    assert json.loads(file.read_text()) == dict(score=6, tests=[test], output="inputs of seed 3")


def test_the_handout_lists_the_exercises():
    text = (ROOT / "docs/assignments/README.md").read_text()
    for name, exercise in EXERCISES.items():
        functions = ", ".join(f"`{f}`" for f in exercise.functions)
        assert f"| [{name}](#{name}) | `{exercise.module}` | {functions} | {exercise.points} | {exercise.minutes} |" in text
        assert f"\n## {name}\n" in text
    assert sum(exercise.points for exercise in EXERCISES.values()) == 100
    assert f"{assignments.BUDGET:,} tokens" in text


def test_the_leaderboard_counts_all_that_led_to_an_arm(tmp_path):
    log = [{"phase": "estep", "step": 0, "tokens": 7}, {"key": "cost/estep", "tokens": 100}, {"key": "cost/infuse", "tokens": 10},
           {"key": "cost/ra3", "tokens": 200}, {"key": "cost/ra3.2", "tokens": 30}, {"key": "cost/ntp", "tokens": 50},
           {"key": "cost/ntp-long", "tokens": 999}, {"key": "cost/rlvr-ra3", "tokens": 400}, {"key": "eval/ra3", "pass@1": 0.8},
           {"key": "eval/ntp", "pass@1": 0.5}, {"key": "eval/rlvr-ra3", "pass@1": 0.9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    row = "| " + tmp_path.name
    assert assignments.leaderboard(tmp_path, 740) == f"{row} | rlvr-ra3 | 90.0% | 740 |"
    assert assignments.leaderboard(tmp_path, 739) == f"{row} | ra3 | 80.0% | 340 |"
    assert assignments.leaderboard(tmp_path, 339) == f"{row} | ntp | 50.0% | 50 |"
    with pytest.raises(ValueError, match="no arm"):
        assignments.leaderboard(tmp_path, 49)
