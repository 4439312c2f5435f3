"""The report of runs: every chart there, well-formed, nothing of what a model wrote breaks out, runs overlaid."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from opd_engine.cli import main
from opd_engine.report.charts import HEIGHT, WIDTH, Chart, Line, number
from opd_engine.report.figures import _PLANS
from opd_engine.report.page import render, standalone_svg
from opd_engine.report.runs import read_run, read_runs
from opd_engine.report.samples import BOUNDS, shown_samples
from opd_engine.report.text import visible
from ranks import ROOT
from report_runs import HOSTILE, write_run

XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
ANCHORS = [plan.anchor for plan in _PLANS] + ["shares"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def page(*folders: Path) -> tuple[str, ElementTree.Element]:
    """The page of these runs, as text and as parsed XML."""
    text = render(read_runs(folders))
    text.encode("utf-8")
    return text, ElementTree.fromstring(text)


def figures(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {figure.get("id"): figure for figure in root.iter(f"{XHTML}figure")}


def words(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def lines(figure: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of every line of a figure, and all of them on its canvas."""
    found = []
    for svg in figure.iter(f"{SVG}svg"):
        _, _, wide, high = map(float, svg.get("viewBox").split())
        for path in svg.findall(f"{SVG}g/{SVG}path"):
            if path.get("class") == "line" and " h" not in path.get("d"):
                points = [
                    tuple(map(float, pair.split(","))) for pair in re.findall(r"[-\d.e]+,[-\d.e]+", path.get("d"))
                ]
                assert points and all(0 <= x <= wide and 0 <= y <= high for x, y in points)
                found.append(points)
    return found


@pytest.mark.parametrize("backend", ["hf", "megatron"])
def test_every_chart_is_there_with_title_units_and_a_line_for_every_teacher(tmp_path, backend):
    _, root = page(write_run(tmp_path / "run", backend=backend))
    found = figures(root)
    assert set(found) == {*ANCHORS, *(["plan"] if backend == "megatron" else [])}
    contents = [link.get("href") for link in root.iter(f"{XHTML}a")]
    assert contents[: len(found)] == [f"#{anchor}" for anchor in found], "the table of figures is in their order"
    for plan in _PLANS:
        figure = found[plan.anchor]
        assert plan.title in words(figure.find(f"{XHTML}h3"))
        assert [svg.find(f"{SVG}title").text for svg in figure.iter(f"{SVG}svg")] == [plan.title]
        labels = [text.text for text in figure.iter(f"{SVG}text") if text.get("class") == "label"]
        assert labels == ["optimizer step", plan.y_label]
        keys = [text.text for text in figure.iter(f"{SVG}text") if text.get("class") == "key"]
        drawn = lines(figure)
        assert len(drawn) == len(keys) == len(set(keys)) == len(list(figure.iter(f"{XHTML}tr"))) - 1
        if any(prefix.endswith("/") for prefix, _ in plan.prefixes):
            assert all(any(name in key for key in keys) for name in ("math", "code"))
    parts = [
        part.get("title") for part in found["shares"].iter(f"{XHTML}div") if part.get("class", "").startswith("part ")
    ]
    assert [part.split(":")[0] for part in parts] == ["rollout", "score", "update", "evaluate"]
    assert all("25%" in part for part in parts)
    if backend == "megatron":
        ranks = [cell.text for cell in found["plan"].iter(f"{XHTML}th")][2:]
        assert ranks[:2] == ["run, rank 11, planned", "run, rank 11, measured"] and len(ranks) == 16
        assert [cell.text for cell in found["plan"].iter(f"{XHTML}td")][:2] == ["5", "15"]
    assert f"backend{backend}" in words(root).replace("\n", "")
    assert "1 optimizer steps left out for a gradient that was not finite" in words(root)


def test_values_land_where_they_belong(tmp_path):
    chart = Chart("t", "step", "y", [Line("a", [(0, 0.0), (50, 1.0), (100, 2.0)])], y_bounds=(0.0, 4.0))
    drawing = chart.drawn()
    x, y = {label: at for at, label in drawing.x.ticks}, {label: at for at, label in drawing.y.ticks}
    points = re.findall(r"([\d.]+),([\d.]+)", drawing.paths[0].d)
    assert [float(a) for a, _ in points] == [x["0"], pytest.approx((x["0"] + x["100"]) / 2, abs=0.01), x["100"]]
    assert [float(b) for _, b in points] == [y["0"], y["1"], y["2"]] and y["0"] > y["1"] > y["2"] > y["4"]
    logarithmic = Chart(
        "t", "k", "y", [Line("a", [(8, 1.0), (64, 100.0), (1024, 1e4), (9, 0.0)])], log_x=True, log_y=True
    )
    drawing = logarithmic.drawn()
    x, y = {label: at for at, label in drawing.x.ticks}, {label: at for at, label in drawing.y.ticks}
    points = [(float(a), float(b)) for a, b in re.findall(r"([\d.]+),([\d.]+)", drawing.paths[0].d)]
    assert points == [(x["8"], y["1"]), (x["64"], y["100"]), (x["1024"], y["10k"])]


def test_a_long_line_is_its_mean_and_range_and_ends_where_the_run_ends():
    points = [(step, 1.0 if step != 5000 else 9.0) for step in range(1, 10_001)]
    drawing = Chart("t", "step", "y", [Line("a", points)]).drawn()
    path = drawing.paths[0]
    assert path.d.count("L") < 200 and path.band
    xs = [float(x) for x, _ in re.findall(r"([\d.]+),([\d.]+)", path.d)]
    assert xs == sorted(xs) and xs[-1] == drawing.right < WIDTH
    heights = [float(y) for _, y in re.findall(r"([\d.]+),([\d.]+)", path.band)]
    assert max(heights) - min(heights) > HEIGHT / 2, "the one high value is in the range"
    assert len(path.marks) < 10


class Reader(HTMLParser):
    """What a lenient HTML parser makes of a page: tags, attributes, text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.text += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Runs in which every text there is wants to break out."""
    folder = tmp_path_factory.mktemp("hostile")
    names = ("<b>math</b>", 'co"de\' onload="x')
    write_run(folder / "one", teachers=names, tokens=HOSTILE)
    write_run(folder / "two &amp; <i>", teachers=names, tokens=HOSTILE, lr=2e-3)
    return folder


def test_what_a_model_wrote_stays_text(hostile):
    for folders in ((hostile / "one",), (hostile / "one", hostile / "two &amp; <i>")):
        text, root = page(*folders)
        tokens = [
            s.text or "" for p in root.iter(f"{XHTML}p") if p.get("class") == "tokens" for s in p if s.get("title")
        ]
        for wanted in HOSTILE[:3] + HOSTILE[7:8]:
            assert wanted in tokens
        assert "␀␛[31m␡⟨U+0085⟩␍" in tokens and "⟨U+D800⟩ alone ⟨U+DFFF⟩" in tokens
        assert "⟨U+202E⟩right to left⟨U+2066⟩" in tokens and "日本語 🦙 ↵\n→\t" in tokens and "∅" in tokens
        read = Reader(text)
        assert not {"script", "img", "b", "i", "link", "iframe", "object"} & set(read.tags)
        assert not [name for name, value in read.attributes if name.startswith("on") or value is None]
        outside = [v for name, v in read.attributes if name in ("href", "src") and not v.startswith("#")]
        assert outside == [] and "url(" not in text and "@import" not in text
        assert "<script>document.title='taken'</script>" in read.text
        assert "49" not in [s for s in tokens if "7 * 7" in s]
        assert "<b>math</b>" in read.text and 'co"de\' onload="x' in read.text
        # The same tree in both readings.
        assert len(list(root.iter())) == len(read.tags)


def test_characters_that_xml_forbids_are_named_and_others_left_alone():
    forbidden = [chr(code) for code in (*range(9), *range(11, 32), 0x7F, 0x80, 0x9F, 0xD800, 0xDFFF, 0xFFFE, 0x10FFFF)]
    for character in forbidden:
        shown = visible(f"a{character}b")
        assert character not in shown and len(shown) > 2
        ElementTree.fromstring(f"<p>{shown}</p>".encode())
    for text in ("a\tb\n", "é 日本 🦙 ا", "\u200d"):
        assert visible(text) == text
    assert visible(7) == 7


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no browser of the Chromium family here (Debian: apt-get install chromium)")
    return found


def browse(page: Path, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[bytes]:
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,2000", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120)


def test_a_browser_shows_every_chart_and_runs_nothing(hostile, tmp_path):
    browser()
    out = tmp_path / "report.html"
    assert main(["report", str(hostile / "one"), "--out", str(out)]) == 0
    _, root = page(hostile / "one")
    seen = browse(out, tmp_path, "--dump-dom").stdout.decode()
    assert seen.count("<figure") == len(ANCHORS) and seen.count("<svg") == len(list(root.iter(f"{SVG}svg")))
    assert "<title>Run one</title>" in seen and "<script" not in seen and "<img" not in seen
    assert len(Reader(seen).tags) == len(list(root.iter()))
    image = pytest.importorskip("matplotlib.image", reason="matplotlib reads the screenshot")
    for scheme, ground in ((1, "#f3f5f7"), (0, "#0c1015")):
        shot = tmp_path / f"{scheme}.png"
        browse(out, tmp_path, f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
        pixels = (image.imread(shot)[..., :3] * 255).round().astype(int).reshape(-1, 3)
        colours = {tuple(row) for row in pixels[::7].tolist()}
        css = (ROOT / "opd_engine" / "report" / "chart.css").read_text()
        wanted = [re.findall(rf"--c{place}: #(\w+)", css)[1 - scheme] for place in (0, 1)]
        for colour in (ground, *wanted):
            code = colour.lstrip("#")
            assert tuple(int(code[at : at + 2], 16) for at in (0, 2, 4)) in colours, (scheme, colour)


def test_several_runs_are_overlaid_and_what_differs_is_said(tmp_path):
    first = write_run(tmp_path / "a" / "run")
    second = write_run(
        tmp_path / "b" / "run", backend="megatron", lr=5e-4, teachers=("math", "law"), steps=20, planned=60
    )
    (second / "summary.json").unlink()
    _, root = page(first, second)
    assert "a/run" in words(root) and "b/run" in words(root)
    found = figures(root)
    assert set(found) == set(ANCHORS)
    panels = {svg.find(f"{SVG}title").text: svg for svg in found["teachers"].iter(f"{SVG}svg")}
    assert list(panels) == [f"Training divergence by teacher: {name}" for name in ("math", "code", "law")]
    keys = {
        title: [text.text for text in svg.iter(f"{SVG}text") if text.get("class") == "key"]
        for title, svg in panels.items()
    }
    assert list(keys.values()) == [["a/run", "b/run"], ["a/run"], ["b/run"]]
    ends = [points[-1][0] for points in lines(found["loss"])]
    assert ends[1] < ends[0], "a run of fewer steps ends earlier on the same axis"
    table = root.find(f".//{XHTML}table[@class='settings']")
    differing = {
        row.find(f"{XHTML}th").text: [cell.text for cell in row.iter(f"{XHTML}td")] for row in table.iter(f"{XHTML}tr")
    }
    assert differing["optimizer.lr ≠"] == ["0.001", "0.0005"] and differing["run.backend ≠"] == ['"hf"', '"megatron"']
    assert "teachers.law ≠" in differing and not any("seed" in key for key in differing)
    assert "unfinished: step 20 of 60" in words(root) and "finished" in words(root)


def test_an_unfinished_run_is_drawn_as_far_as_it_came(tmp_path):
    half = write_run(tmp_path / "half", steps=15, planned=100, finished=False)
    with open(half / "metrics.jsonl", "a") as metrics, open(half / "samples.jsonl", "a") as samples:
        metrics.write('{"step": 16, "kind": "tra')
        samples.write('{"step": 16, "tok')
    _, root = page(half)
    assert "unfinished: step 15 of 100" in words(root) and set(figures(root)) == set(ANCHORS)
    _, root = page(write_run(tmp_path / "killed at its end", finished=False))
    assert "unfinished: step 40 of 40" in words(root)
    bare = write_run(tmp_path / "bare", finished=False)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (bare / name).unlink()
    _, root = page(bare)
    assert "not begun: no step in the metrics yet" in words(root) and figures(root) == {}
    assert "Nothing was measured for" in words(root) and "No samples in this run's folder" in words(root)
    assert "optimizer.lr" in words(root)


def test_what_is_no_run_is_refused_by_name(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text("[tool]\nname = 3\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.toml").write_text("[run\n")
    for folder, reason in (
        ("empty", "it holds no config.toml"),
        ("missing", "there is no such folder"),
        ("run/config.toml", "it is a file"),
        ("other", "its config.toml has no section [opd]"),
        ("broken", "not TOML"),
    ):
        assert main(["report", str(tmp_path / "run"), str(tmp_path / folder), "--out", str(tmp_path / "x.html")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("opd-engine: error: RUN: wanted the folder of a run") and reason in said
        assert said.count("\n") == 1
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "empty" / ".." / "run")]) == 2
    assert "wanted each run once" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "no" / "x.html")]) == 1
    assert "cannot write the report" in capsys.readouterr().err


def test_the_command_writes_beside_the_run_and_says_where(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--title", "A <title>"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "<title>A &lt;title&gt;</title>" in (run / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "second")
    assert main(["report", "run", "second"]) == 0
    assert (tmp_path / "report.html").is_file()


def test_samples_are_bounded_and_their_classes_follow_the_divergence(tmp_path):
    run = read_run(write_run(tmp_path / "run", tokens=tuple("ab" * 5000)), "run")
    steps, sampled = shown_samples(run)
    assert [step for step, _ in steps] == [0, 20, 39] and sampled == 4
    sample = steps[0][1][0]
    assert len(sample.tokens) == 1200 and sample.left_out == 8800
    assert [place for place, _, _ in sample.tokens[:5]] == [
        sum(10.0**power >= bound for bound in BOUNDS) for power in (-3, -2, -1, 0, 1)
    ]
    run.samples[0]["divergence"][:2] = ["inf", "nan"]
    tokens = shown_samples(run)[0][0][1][0].tokens[:2]
    assert [(place, says) for place, _, says in tokens] == [(len(BOUNDS), "inf nats"), (0, "not measured")]
    assert sample.tokens[3][2] == "1 nats" and sample.furthest.startswith("10 nats at token 5")


def test_many_teachers_are_split_into_panels_of_eight(tmp_path):
    names = tuple(f"teacher{index}" for index in range(16))
    _, root = page(write_run(tmp_path / "run", teachers=names))
    panels = list(figures(root)["teachers"].iter(f"{SVG}svg"))
    assert len(panels) == 2 and all(len(svg.findall(f"{SVG}g[@class]")) >= 8 for svg in panels)
    classes = [g.get("class") for g in panels[1].findall(f"{SVG}g") if g.get("class", "").startswith("series")]
    assert classes == [f"series s{place}" for place in range(8)]


def test_a_chart_of_its_own_is_a_whole_svg_file():
    svg = standalone_svg(Chart("A & B", "k", "bytes", [Line("<x>", [(1, 2), (2, 4)])]), "plot")
    root = ElementTree.fromstring(svg)
    assert root.find(f"{SVG}title").text == "A & B" and "prefers-color-scheme: dark" in root.find(f"{SVG}style").text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.123456, "0.1235"), (12345.6, "12,346"), (1e-7, "1e-07"), (3e12, "3e+12"), (float("inf"), "inf")],
)
def test_numbers_are_written_for_readers(value, text):
    assert number(value) == text
