"""What is written holds: README's example runs and is right, docstrings match signatures, references lead somewhere."""

import ast
import importlib.util
import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch

import opd_engine
from ranks import ROOT


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
PUBLIC = [name for name in opd_engine.__all__ if not name.startswith("__")]


def tracked(*patterns: str) -> list[Path]:
    """Files of this checkout, without what was built."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    found = {path for pattern in patterns for path in ROOT.rglob(pattern)}  # an unpacked archive, no git
    return sorted(path for path in found if not {".venv", "build", "site", "runs"} & set(path.parts))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_the_example_in_the_readme_runs_and_is_right():
    (example,) = code_blocks((ROOT / "README.md").read_text(), "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)

    logits = names["student_logits"].detach().double().requires_grad_()
    ids = logits.topk(64, dim=-1).indices
    buckets = []
    for side in (logits, names["teacher_logits"].double()):
        probs = side.softmax(-1)
        off = torch.ones_like(probs).scatter(-1, ids, 0.0)
        buckets.append(torch.cat([probs.gather(-1, ids), (probs * off).sum(-1, keepdim=True)], -1))
    q, p = buckets
    expected = (q * (q.log() - p.log())).sum(-1)
    expected.mean().backward()
    torch.testing.assert_close(names["loss"].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(names["student_logits"].grad.double(), logits.grad, rtol=1e-4, atol=1e-8)


def test_the_readme_leads_from_the_loss_to_the_kernel_in_at_most_five_files():
    section = (ROOT / "README.md").read_text().split("## Files to read first")[1]
    steps = re.findall(r"^\d+\. \[`([^`]+)`\]", section, re.M)
    assert 2 <= len(steps) <= 5
    assert "def distill_loss" in (ROOT / steps[0]).read_text()
    assert steps[-1].startswith("csrc/kernels/")
    # Each step holds the same op: called, differentiated, checked, launched, computed.
    for step in steps:
        assert re.search(r"bucket_divergence[(\"]", (ROOT / step).read_text()), f"{step} is off the path"


def parameters(target) -> list[str]:
    names = inspect.signature(target).parameters
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_names_every_parameter_in_order(name):
    target = getattr(opd_engine, name)
    prose, entries = HOOKS.parse_docstring(inspect.getdoc(target) or "")
    assert prose, f"{name} has no docstring"
    described = [
        part.strip().lstrip("*") for entry, _ in entries if entry not in HOOKS.SECTIONS for part in entry.split(",")
    ]
    assert described == parameters(target)
    if not inspect.isclass(target) and parameters(target):
        assert {"Returns", "Raises"} <= {entry for entry, _ in entries}


def test_a_docstring_that_forgets_a_parameter_is_seen():
    """The parser must not be so lenient that the test above cannot fail."""
    text = "Sum.\n\na: [T], float32\nb, c: [T]\n    and more\nReturns: [T]. Mutates: nothing.\nRaises: never"
    prose, entries = HOOKS.parse_docstring(text)
    assert prose == "Sum."
    assert [name for name, _ in entries] == ["a", "b, c", "Returns", "Mutates", "Raises"]
    assert dict(entries)["b, c"] == "[T]\nand more"


def test_every_name_of_the_reference_leads_to_a_docstring():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert len(names) == len(set(names)) >= 20
    for name in names:
        assert HOOKS.parse_docstring(inspect.getdoc(HOOKS.resolve(name)) or "")[0], f"{name} has no docstring"
        assert "```python" in HOOKS.reference(name)
    exported = [f"opd_engine.{name}" for name in PUBLIC]
    assert [name for name in exported if name not in names] == []


def test_a_page_of_the_reference_shows_signature_options_and_prose():
    page = HOOKS.reference("opd_engine.distillation.OPDConfig")
    assert "`state_weight_cap`\n:   weights a row by" in page, "the help of a setting is its documentation"
    page = HOOKS.reference("opd_engine.teachers.TeacherPool.route")
    assert ") -> Tensor\n" in page and "`teacher_weights`" in page and "A sample names one teacher" in page
    page = HOOKS.reference("opd_engine.topk_log_probs")
    assert "\n) -> TokenScores\n" in page and "[(6)](math.md#eq-6)" in page


def equations_defined() -> set[int]:
    numbers = re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs/math.md").read_text())
    assert len(numbers) == len(set(numbers)), "an equation number is used twice"
    return {int(number) for number in numbers}


def equations_cited(text: str) -> set[int]:
    """Numbers in brackets after `docs/math.md`, to the sentence's end; `(2) to (9)` cites what lies between too."""
    cited: set[int] = set()
    for passage in re.findall(r"docs/math\.md((?:[\s#,*/;]|and|to|[a-z]+(?= )|\(\d+\)|\.\.\.)*)", text):
        numbers = [int(number) for number in re.findall(r"\((\d+)\)", passage)]
        cited.update(numbers)
        for first, last in re.findall(r"\((\d+)\) (?:to|\.\.\.) \((\d+)\)", passage):
            cited.update(range(int(first), int(last) + 1))
    return cited


def test_equation_numbers_run_without_gaps():
    defined = equations_defined()
    assert defined == set(range(1, max(defined) + 1))


def test_every_equation_that_the_code_cites_exists():
    defined = equations_defined()
    wrong, total = [], 0
    for path in tracked("*.py", "*.cpp", "*.h", "*.cuh", "*.cu"):
        if path == Path(__file__).resolve():
            continue  # its examples are wrong on purpose
        cited = equations_cited(path.read_text(encoding="utf-8"))
        total += len(cited)
        wrong += [f"{path.relative_to(ROOT)} cites ({number})" for number in sorted(cited - defined)]
    assert wrong == []
    assert total > 20, "the citations were not found: has their form changed?"
    assert equations_cited("docs/math.md (2) to (4), backward (77)") == {2, 3, 4, 77}


def test_no_placeholder_is_left_where_an_equation_number_belongs():
    left = [str(path.relative_to(ROOT)) for path in tracked("*.py") if re.search(r"math\.md \(@", path.read_text())]
    assert [path for path in left if path != "python_tests/project/test_docs.py"] == []


def broken_links(path: Path) -> list[str]:
    broken = []
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target) and not (path.parent / target.split("#")[0]).exists():
            broken.append(f"{path.relative_to(ROOT)} -> {target}")
    return broken


def test_links_between_files_lead_somewhere():
    pages = tracked("*.md")
    assert len(pages) >= 6
    assert [link for page in pages for link in broken_links(page)] == []


def test_paths_in_the_map_of_the_readme_exist():
    table = (ROOT / "README.md").read_text().split("## Map")[1].split("##")[0]
    paths = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+)", table, re.M)
    named = [path for cell in paths for path in re.findall(r"`([^`]+)`", cell)]
    assert len(named) >= 8
    assert [path for path in named if not (ROOT / path).exists()] == []


def names_that_do_not_exist(text: str) -> list[str]:
    """Paths of this repository and dotted names of this package, in prose or comments, that lead nowhere."""
    paths = re.findall(r"\b((?:opd_engine|csrc|python_tests|docs|examples|cmake|benchmarks)/[\w./-]*\w)", text)
    gone = [path for path in paths if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}*"))]
    for name in re.findall(r"(?<![\w./-])opd_engine(?:\.[A-Za-z_]\w*)+", text):
        try:
            HOOKS.resolve(name)
        except (ImportError, AttributeError):
            gone.append(name)
    return gone


def test_what_comments_and_pages_name_exists():
    # Histories name what there was, these two tests what there must not be; what a build makes is not there yet.
    kept, made = (
        {"CHANGELOG.md", "test_floors.py", "test_docs.py"},
        ("opd_engine/_C", "benchmarks/results/", "docs/site"),
    )
    wrong = []
    for path in tracked("*.md", "opd_engine/*.py", "python_tests/*.py", "csrc/*", "Makefile"):
        if path.name in kept or path.suffix == ".jsonl":
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = "\n".join([*re.findall(r"#.*", text), *re.findall(r'"""(.*?)"""', text, re.S)])
        elif path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            text = "\n".join(re.findall(r"//.*", text))
        found = [name for name in names_that_do_not_exist(text) if not name.startswith(made)]
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in found]
    assert wrong == []
    assert names_that_do_not_exist(
        "see opd_engine/gone.py and opd_engine.functional.gone, `csrc/kernels/params.h`"
    ) == [
        "opd_engine/gone.py",
        "opd_engine.functional.gone",
    ]


def test_files_are_named_after_what_they_hold():
    banned = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert [str(path.relative_to(ROOT)) for path in tracked("*.py") if path.name in banned] == []


def test_every_source_says_what_it_is():
    silent = []
    for path in tracked("opd_engine/*.py", "python_tests/*.py"):
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text())):
            silent.append(str(path.relative_to(ROOT)))
    for path in tracked("csrc/*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh") and not path.read_text().startswith("//"):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []
