import html.parser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fake_run
import pytest

from tools import report as tool
from vlp_jax.infra import metrics, report
from vlp_jax.infra.artifacts import Card, Curve, Gallery, Picture, Table
from vlp_jax.infra.report.from_metrics import metric_charts

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class _Page(html.parser.HTMLParser):
    """Tags, texts outside of scripts and styles, and whatever would leave the page."""

    VOID = frozenset({"meta", "link", "img", "input", "path", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.anchors: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [values[name] or "" for name in ("src", "href") if name in values]
        self.anchors.add(values.get("id") or "")
        if tag == "img":
            assert values["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def _report(workdir: Path) -> _Page:
    return _Page(report.write_report(workdir).read_text(encoding="utf-8"))


def _log(workdir: Path, *records: Mapping[str, float]) -> None:
    writer = metrics.JsonlWriter(workdir / metrics.METRICS_FILE)
    for step, values in enumerate(records, 1):
        writer.write(step, values)
    writer.close()


@pytest.fixture(scope="module")
def fake_workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    fake_run.write_fake_run(workdir)
    return workdir


@pytest.fixture(scope="module")
def page(fake_workdir: Path) -> _Page:
    return _report(fake_workdir)


def test_page_shows_every_part(page: _Page) -> None:
    for text in (
        "flm demo on scenes",
        "2 × NVIDIA H200",
        "step 300 of 300",
        "4 min 41 s",
        "Grounding gap by class, step 300",
        "81.8 points",
        "Accuracy shuffled",
        "unigram entropy",
        "1 non-finite value left out",
        "attention of “teal”",
        "Calibration",
        "Words by class",
        "27.0 s",
        "793,088",
        "truncated JPEG 3, empty caption 1",
        "model.image.stem",
        "--config=configs/demo.py '--workdir=a b'",
        "0.10.2",
        "0 throughout",
    ):
        assert text in page.text


def test_page_needs_nothing_from_elsewhere(fake_workdir: Path, page: _Page) -> None:
    for address in page.addresses:
        assert address.startswith(("data:", "#"))
        if address.startswith("#"):
            assert address[1:] in page.anchors
    text = (fake_workdir / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)


def test_hostile_text_stays_text(fake_workdir: Path, page: _Page) -> None:
    # In a config value, a caption, a table cell: shown, never run.
    assert page.text.count(fake_run.HOSTILE) >= 3
    text = (fake_workdir / "report.html").read_text(encoding="utf-8")
    assert fake_run.HOSTILE not in text


@pytest.mark.parametrize("place", ["name", "command", "metric", "title", "alt", "series"])
def test_hostile_names_stay_text(tmp_path: Path, place: str) -> None:
    hostile = f"\"'>{fake_run.HOSTILE}</style></title><!--"
    scripts = _scripts_of_plain_run(tmp_path / "plain")
    run = {"name": hostile, "command": hostile} if place in ("name", "command") else {}
    (tmp_path / "run.json").write_text(json.dumps(run))
    if place == "metric":
        _log(tmp_path, {f"{hostile}/loss": 1, f"{hostile}/a_loss": 1}, {f"{hostile}/loss": 2})
    root = tmp_path / "artifacts" / "a"
    if place == "title":
        Table(hostile, (hostile,), ((hostile,),), hostile).save(root)
    if place == "alt":
        picture = Picture.from_array(fake_run.scene(0), hostile)
        Gallery("g", (Card((picture,), hostile),)).save(root)
    if place == "series":
        Curve("c", hostile, hostile, {hostile: ((0.0, 1.0),), "b": ((0.0, 1.0),)}).save(root)
    page = _report(tmp_path)
    data_of_charts = {"metric": 1, "series": 1}.get(place, 0)
    assert page.tags.count("script") == scripts + data_of_charts
    assert page.tags.count("style") == 1


def _scripts_of_plain_run(workdir: Path) -> int:
    workdir.mkdir()
    (workdir / "run.json").write_text("{}")
    return _report(workdir).tags.count("script")


@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"a', '{"step": 1}\n{"step'])
def test_pieces_missing_or_damaged_leave_a_note(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    text = _report(tmp_path).text
    assert "No training metrics were logged" in text
    for other in {"config.json", "run.json"} - {name}:
        assert f"{other} is missing" in text
    if name != "metrics.jsonl" and content != "{}":
        assert f"{name} " in text
        assert "what it tells is left out" in text


def test_damaged_metrics_and_artefacts_leave_a_note(fake_workdir: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(fake_workdir, workdir)
    (workdir / "metrics.jsonl").write_text('{"step": 1, "a\n{"step": 2}\n')
    next((workdir / "artifacts" / "cloze").glob("*.png")).unlink()
    text = _report(workdir).text
    assert "metrics.jsonl, line 1" in text
    assert "The artefact cloze is left out" in text
    assert "Words by class" in text


@pytest.mark.parametrize(
    "run",
    [
        {"parameters": [["module", "shape"], ["a", [1, 2]], ["b"]], "start": "yesterday"},
        {"parameters": [1, 2], "versions": "none", "device_count": "many", "step": "three"},
        {"bad_examples": {}, "mesh": {"data": [1, {"a": None}]}, "command": 3, "end": 5},
        {"many": {str(index): {"a": index} for index in range(20)}, "flag": True, "none": None},
        {"start": "2026-01-01T00:00:00", "end": "2026-01-01T00:00:00+00:00", "status": 3},
    ],
)
def test_unexpected_facts_do_not_break_the_page(tmp_path: Path, run: dict[str, Any]) -> None:
    (tmp_path / "run.json").write_text(json.dumps(run))
    _report(tmp_path)


def test_only_non_finite_or_single_values(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    _log(tmp_path, {"train/loss": nan, "eval/accuracy": inf, "eval/gap": nan, "odd": 1.0})
    Curve("nothing", "x", "y", {"a": ((nan, 1.0),), "b": ()}).save(tmp_path / "artifacts" / "c")
    text = _report(tmp_path).text
    assert "This plot has no points" in text
    assert "Odd" in text


def test_variants_are_dashed_in_the_colour_of_their_original(tmp_path: Path) -> None:
    names = ["a/loss_shuffled", "b/loss", "a/loss", "b/loss_shuffled", "unigram_entropy"]
    values = {f"eval/{name}": float(index) for index, name in enumerate(names)}
    history = {name: [(1.0, value)] for name, value in values.items()}
    (chart,) = metric_charts("evaluator", list(history), history)
    looks = {line.label: (line.colour, line.dashed) for line in chart.lines}
    assert chart.title == "Loss"
    assert looks["a"][0] == looks["a · shuffled"][0] != looks["b"][0] == looks["b · shuffled"][0]
    assert [name for name, (_, dashed) in looks.items() if dashed] == [
        "a · shuffled",
        "b · shuffled",
        "unigram entropy",
    ]


def test_headlines_name_the_evaluator_where_needed(tmp_path: Path) -> None:
    values = {"a/gap_one": 50.0, "b/gap_one": 25.0, "b/accuracy": 0.125, "c/best_gap": 50.0}
    _log(tmp_path, values)
    text = _report(tmp_path).text
    for label in ("A · gap one 50.0 points", "B · gap one 25.0 points", "B · accuracy 12.5 %"):
        assert label in text
    assert "C · best gap" not in text


def test_report_is_replaced_and_follows_the_run(tmp_path: Path) -> None:
    _log(tmp_path, {"train/loss": 3.5})
    assert "3.500" in _report(tmp_path).text
    _log(tmp_path, {"train/loss": 3.5}, {"train/loss": 2.25})
    assert "2.250" in _report(tmp_path).text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is no run.*--workdir"):
        report.write_report(tmp_path)


def test_tool_prints_the_path(
    fake_workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main([str(fake_workdir)])
    assert capsys.readouterr().out.strip() == str(fake_workdir / "report.html")
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path)])
    assert "is no run" in capsys.readouterr().err


# Runs inside the page, before and after its own script, and posts what it finds to the frame
# around it. What lies in a box that scrolls may reach past the edge.
PROBE_FIRST = """<script>
const problems = [];
const note = (...words) => problems.push(words.join(" "));
addEventListener("error", (event) => note("error:", event.message), true);
addEventListener("unhandledrejection", (event) => note("rejected:", event.reason));
addEventListener("securitypolicyviolation", (event) => note("blocked:", event.blockedURI));
console.error = console.warn = note;
</script>"""
PROBE_LAST = """<script>
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const charts = [...document.querySelectorAll(".plot")];
  let tips = 0;
  for (const plot of charts) for (const where of [0.02, 0.5, 0.98]) {
    const box = plot.getBoundingClientRect();
    const at = { clientX: box.left + where * box.width, clientY: box.top + 5, bubbles: true };
    plot.dispatchEvent(new PointerEvent("pointermove", at));
    tips += plot.querySelector(".tip").innerText.length > 0;
    check();
  }
  const input = document.querySelector(".filter input");
  input.value = "IMAGE";
  input.dispatchEvent(new Event("input"));
  const shown = document.querySelectorAll(".config > div:not([hidden])").length;
  check();
  function check() {
    const width = document.scrollingElement.scrollWidth;
    if (width > innerWidth) note("the page is", width, "wide");
    for (const element of document.body.querySelectorAll("*")) {
      const box = element.getBoundingClientRect();
      if (element.closest(".scroll") && !element.matches(".scroll")) continue;
      if (box.right > innerWidth + 0.5 || box.left < -0.5)
        note(element.outerHTML.slice(0, 80), "reaches from", box.left, "to", box.right);
    }
  }
  const found = { width: innerWidth, plots: charts.length, tips, shown, problems };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""
FRAME = """<!doctype html>
<iframe src="PAGE" width="WIDTH" height="2000" style="border:0"></iframe>
<pre id="found"></pre>
<script>
addEventListener("message", (event) => {
  document.querySelector("#found").textContent = event.data;
});
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, CHROMIUM_NAMES)), None
    )
    if not found:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM_NAMES)} on PATH, CHROMIUM not set")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["full", "empty"])
def test_page_in_a_browser(
    fake_workdir: Path, tmp_path: Path, chromium: str, width: int, kind: str
) -> None:
    workdir = fake_workdir
    if kind == "empty":
        workdir = tmp_path
        (workdir / "config.json").write_text(json.dumps({fake_run.LONG_WORD: fake_run.LONG_WORD}))
    text = report.write_report(workdir).read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(
        text.replace("<head>", "<head>" + PROBE_FIRST, 1).replace("</body>", PROBE_LAST + "</body>")
    )
    # A window cannot be as narrow as a phone; a frame can.
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("PAGE", probed.as_uri()).replace("WIDTH", str(width)))
    found, log = _open(chromium, frame, tmp_path / "profile")
    assert found["width"] == width
    assert found["problems"] == []
    assert "CONSOLE" not in log
    assert found["tips"] == 3 * found["plots"]
    assert found["plots"] == (11 if kind == "full" else 0)
    assert found["shown"] == (4 if kind == "full" else 0)


def _open(chromium: str, page: Path, profile: Path) -> tuple[dict[str, Any], str]:
    """What the probe of ``page`` found, and the browser's log."""
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{feature}" for feature in quiet),
        f"--user-data-dir={profile}",
        "--window-size=1400,2000",
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
        "--dump-dom",
        page.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="found">(.+?)</pre>', result.stdout, re.DOTALL)
    assert match, f"the probe did not report: {result.stdout[-500:]} {result.stderr[-500:]}"
    return json.loads(html.unescape(match[1])), result.stderr
