"""Reports and plots as files: what is in them, what they need, and what is refused."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import PROGRAM, Browser, browser
from made import analyzed, comparison, finished, line, run, steps

from peptrain.cli.app import main
from peptrain.errors import CheckpointError, ConfigError
from peptrain.figures.catalogue import FIGURES
from peptrain.figures.read import read
from peptrain.reporting.plot import plot
from peptrain.reporting.report import report
from peptrain.reporting.tables import (
    Table,
    by_domain,
    common,
    differing,
    evaluations,
    in_pairs,
    judged,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind, and a comparison of forty."""
    made = tmp_path_factory.mktemp("made")
    for n in range(10):
        finished(made / f"ten-{n}", train_seed=n % 2, method_name=f"m{n // 2}")
    analyzed(finished(made / "one"))
    run(made / "row", steps(2))
    last = {"event": "diverged", "step": 20, "error": "step 20: the loss is nan"}
    run(made / "crashed", [*steps(20), last])
    comparison(made / "forty")
    return made


class Page(HTMLParser):
    """What a page names: its tags, what they refer to, ids, and the text outside of tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            assert not key.startswith("on"), key
            if key in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.links.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def contained(file: Path) -> Page:
    """Check that a page needs no other file, runs nothing, and that its references lead within."""
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {*page.tags}
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert len(set(page.ids)) == len(page.ids)
    for link in page.links:
        assert link.startswith("data:") or link.removeprefix("#") in page.ids, link
    for name in re.findall(r"url\(#([^)]*)\)", text):
        assert name in page.ids
    return page


def test_a_report_of_a_run_has_everything_and_needs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (("condition", "weight"), ("per", "from_start"))
    monkeypatch.setattr("peptrain.reporting.report.DYNAMICS", few)
    page = contained(report([folder / "one"], tmp_path / "out" / "report.html"))
    for title in (
        "Curves",
        "Learning dynamics",
        "Memory and throughput",
        "Held-out results",
    ):
        assert title in page.text
    assert page.tags.count("figure") == page.tags.count("details") - 1 == page.text.count("Numbers")
    assert "finished at step 40" in page.text and "optim.lr" in page.text
    assert not list(tmp_path.glob("out/.*"))


def test_the_results_of_eval_have_a_table_of_each_kind(tmp_path: Path) -> None:
    made = run(tmp_path / "a", steps(4))
    domains = {"wiki": {"loss": 3.5, "tokens": 640}}
    test = {"difference": 0.1, "difference_stderr": 0.05, "mcnemar_p": 0.04, "items": 60}
    entries = [
        {"step": 4, "loss": 3.25, "perplexity": 25.79, "tokens": 1280, "data": "0123"},
        {"step": 4, "task": "piqa", "items": 60, "acc": 0.55, "acc_stderr": 0.064, "acc_norm": 0.5},
        {"step": 4, "domains": domains, "macro_loss": 3.5, "macro_perplexity": 33.1},
        {"step": 4, "against": "b@4", "tests": {"piqa": test}},
        {"step": 4, "task": "blimp", "acc": None, "domains": 3, "tests": [7]},
    ]
    (made / "eval.json").write_text(json.dumps(entries))
    source = read([made])
    assert evaluations(source).rows == [["a", "4", "3.25", "25.79", "1,280", "0123", "no"]]
    assert judged(source).rows == [
        ["a", "4", "piqa", "acc", "0.55", "0.064", "60"],
        ["a", "4", "piqa", "acc_norm", "0.5", "–", "60"],
    ]
    of_wiki, mean, *_ = by_domain(source).rows
    assert (of_wiki, mean) == (["a", "4", "wiki", "3.5", "640"], ["a", "4", "mean", "3.5", "–"])
    assert in_pairs(source).rows == [["a", "4", "b@4", "piqa", "0.1", "0.05", "0.04", "60"]]
    assert "acc_norm" in contained(report([made], tmp_path / "report.html")).text


def test_the_settings_that_differ_are_first_with_the_longer_list_downwards(
    tmp_path: Path,
) -> None:
    made = [run(tmp_path / name, optim_lr=lr) for name, lr in (("a", 1e-3), ("b", 0.5))]
    assert differing(read(made)) == Table(["run", "optim.lr"], [["a", "0.001"], ["b", "0.5"]])
    other = run(tmp_path / "c", optim_lr=1e-3, optim_kind="sgd", train_seed=3, optim_x=True)
    assert differing(read([made[0], other])) == Table(
        ["setting", "a", "c"],
        [["train.seed", "0", "3"], ["optim.kind", "–", "sgd"], ["optim.x", "–", "true"]],
    )
    same = read([made[0], run(tmp_path / "d")])
    assert differing(same).heads == ["run"] and common(same).rows[0] == ["method.name", "full"]


def test_long_values_that_differ_are_shortened_where_they_stay_distinct(tmp_path: Path) -> None:
    place, middle = f"/data/{'x' * 40}/{{}}", f"{'a' * 30}{{}}{'b' * 30}"
    made = [run(tmp_path / n, data_path=place.format(n), init_x=middle.format(n)) for n in "pq"]
    assert differing(read(made)) == Table(
        ["run", "data.path", "init.x"],
        [[n, f"/data/xxxxxx…xxxxxxxxxx/{n}", middle.format(n)] for n in "pq"],
    )
    page = contained(report(made, tmp_path / "report.html"))
    assert all(place.format(n) in page.text for n in "pq")
    assert "What differs, with whole values" in page.text


@pytest.mark.slow
def test_a_report_of_a_comparison_of_forty(folder: Path, tmp_path: Path) -> None:
    page = contained(report([folder / "forty"], tmp_path / "report.html"))
    assert "loro rank=<8>" in page.text and "at the highest rate tried" in page.text
    assert page.text.index("What differs") < page.text.index("Curves")
    assert "3.005 ± 0.060" in page.text and "0.008 (highest)" in page.text


@pytest.mark.parametrize(
    "name, state",
    [
        ("row", "unfinished: step 2 of 40"),
        pytest.param("crashed", "diverged at step 20", marks=pytest.mark.slow),
    ],
)
def test_a_report_of_a_run_that_has_not_ended(
    name: str, state: str, folder: Path, tmp_path: Path
) -> None:
    page = contained(report([folder / name], tmp_path / "report.html"))
    assert state in page.text and "Loss over training tokens" in page.text
    assert "not measured: train with --train.observe dynamics" in page.text


def test_a_run_without_a_row_has_a_report_that_says_so_once(tmp_path: Path) -> None:
    page = contained(report([run(tmp_path / "new")], tmp_path / "report.html"))
    assert page.text.count("loss: metrics.jsonl has no row with a loss yet (new)") == 1


def test_a_report_of_lines_between_models_has_nothing_else(tmp_path: Path) -> None:
    made = [line(tmp_path / name, (3.0, 8.0, 3.5)) for name in ("loro-full", "full-full")]
    page = contained(report(made, tmp_path / "report.html"))
    assert "loro-full, full-full" in page.text and "Perplexity along the line" in page.text
    assert page.tags.count("figure") == 1 and "Curves" not in page.text


def test_runs_that_share_nothing_are_said_to(tmp_path: Path) -> None:
    one = run(tmp_path / "one", steps(4), data="a")
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "config.toml").write_text('[extra]\nsetting = "b"\n')
    (tmp_path / "other" / "env.json").write_text('[{"data": "b"}]')
    page = contained(report([one, tmp_path / "other"], tmp_path / "report.html"))
    assert "trained on different text: their losses can't be compared" in page.text
    assert "other: no row with a loss over training tokens" in page.text
    assert "extra.setting" in page.text


def test_names_of_strangers_stay_text(tmp_path: Path) -> None:
    odd = run(tmp_path / "<img src=x onerror=alert(1)>", steps(4, events=True),
              method_name="<b>\u202e&amp;")  # fmt: skip
    other = run(tmp_path / "=1+1", steps(4))
    page = contained(report([odd, other], tmp_path / "report.html"))
    assert "img" not in page.tags and "b" not in page.tags
    assert r"<b>\u202e&amp;" in page.text
    drawn = plot([odd, other], tmp_path / "a.svg")
    lines = {row["line"] for row in csv.DictReader(drawn.with_suffix(".csv").open())}
    assert lines == {"<img src=x onerror=alert(1)>", "'=1+1"}


def test_a_run_in_training_is_read_while_it_holds_its_lock(tmp_path: Path) -> None:
    made = run(tmp_path / "run", steps(8))
    (made / "lock").write_text("host 1 now machine token\n")
    with (made / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 10, "lo')
    page = contained(report([made], tmp_path / "report.html"))
    assert "unfinished: step 8 of 40" in page.text
    assert (made / "lock").read_text() == "host 1 now machine token\n"


@pytest.mark.parametrize(
    "suffix, start",
    [
        ("svg", b"<?xml"),
        pytest.param("png", b"\x89PNG", marks=pytest.mark.slow),
        pytest.param("pdf", b"%PDF", marks=pytest.mark.slow),
    ],
)
def test_a_plot_is_of_the_kind_of_its_name_and_the_same_each_time(
    suffix: str, start: bytes, folder: Path, tmp_path: Path
) -> None:
    given = [str(folder / "one"), "-o", str(tmp_path / f"a.{suffix}"), "--x", "steps"]
    assert main(["plot", *given]) == 0
    first = (tmp_path / f"a.{suffix}").read_bytes()
    plot([folder / "one"], tmp_path / f"b.{suffix}", x="steps")
    assert first.startswith(start) and first == (tmp_path / f"b.{suffix}").read_bytes()
    assert (tmp_path / "a.csv").read_text().startswith("panel,x_axis,y_axis,mark,line,x,y")


def test_of_a_comparison_the_rates_are_plotted(folder: Path, tmp_path: Path) -> None:
    plot([folder / "forty"], tmp_path / "a.svg")
    assert "loss over learning rate" in (tmp_path / "a.csv").read_text()


def test_an_x_axis_for_a_figure_that_has_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.svg"
    with pytest.raises(
        ConfigError, match="--x: must be left out with rates, whose x axis is fixed"
    ):
        plot([folder / "forty"], out, x="steps")
    assert not out.exists()
    plot([folder / "forty"], out, x="steps", figure="loss")
    assert "steps" in out.with_suffix(".csv").read_text()


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].removeprefix("error: ")


def test_what_can_not_be_drawn_is_one_line_with_its_repair(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = str(folder / "one"), str(tmp_path / "a.svg")
    assert said(capsys, "plot", one, "-o", "a.jpg").startswith("--out: must be a name that ends")
    assert "config.toml is missing" in said(capsys, "plot", str(tmp_path), "-o", out)
    assert "given twice" in said(capsys, "plot", one, one, "-o", out)
    assert "is drawn alone" in said(capsys, "plot", one, str(folder / "forty"), "-o", out)
    row = str(folder / "row")
    assert "take --x tokens" in said(capsys, "plot", row, "-o", out, "--x", "flops")
    assert "is of a comparison" in said(capsys, "plot", one, "-o", out, "--figure", "frontier")
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "a.svg")
    assert "can't be written: " in said(capsys, "plot", one, "-o", inside)
    page = inside.replace(".svg", ".html")
    assert "can't be written: " in said(capsys, "report", one, "-o", page)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_no_file_of_a_run_or_comparison_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = analyzed(run(tmp_path / "run", steps(4)))
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    for name in ("metrics.jsonl", "config.toml"):
        assert "ends in .html" in said(capsys, "report", str(made), "-o", str(made / name))
    table = str(made / "analysis" / "40.svg")
    assert "40.csv is not the numbers of a figure" in said(capsys, "plot", str(made), "-o", table)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before
    for _ in range(2):
        plot([made], tmp_path / "again.svg")


@pytest.mark.parametrize(
    "name, content",
    [
        ("eval.json", "{}"),
        ("env.json", "["),
        ("config.toml", "="),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str | bytes, tmp_path: Path) -> None:
    made = analyzed(run(tmp_path / "run", steps(4)))
    (made / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(f"{made / name}: ")):
        report([made], tmp_path / "report.html")


@pytest.mark.parametrize("name", ["40.csv", "40.spectra.csv"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table.write_bytes(b""),
        lambda table: table.write_bytes(b"\xff\xfe\n"),
        lambda table: table.write_text("run,step\n1,2,3\n"),
        lambda table: table.write_bytes(table.read_bytes()[:-9]),
        lambda table: table.write_text(table.read_text().replace(",40,1,", ",40,2,")),
        lambda table: table.with_name("40.json").unlink(),
        lambda table: table.with_name("40.json").write_text("null"),
        lambda table: table.with_name("40.json").write_text('{"sha256": null}'),
    ],
    ids=["empty", "no text", "foreign", "cut", "changed", "no json", "null", "no checksum"],
)
def test_a_damaged_table_of_an_analysis_is_named_and_left_out(
    damage: Callable[[Path], object], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = analyzed(run(tmp_path / "a run", steps(4)))
    assert not read([made]).warnings and read([made]).runs[0].analysis
    damage(made / "analysis" / name)
    report([made], tmp_path / "report.html")
    said = [line for line in caplog.messages if line.startswith(f"{made / 'analysis' / name}: ")]
    assert len(said) == 1 and said[0].endswith(
        f"; repeat `peptrain analyze '{made}'`, or delete it"
    )
    found = read([made]).runs[0]
    left = found.spectra if "spectra" in name else found.analysis
    assert {row["step"] for row in left} == {20}


def test_tables_of_other_weights_than_a_checkpoint_has_are_left_out(tmp_path: Path) -> None:
    made = analyzed(run(tmp_path / "run", steps(4)))
    file = made / "analysis" / "40.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": "those of then"}))
    assert not read([made]).warnings, "the checkpoint is not kept"
    checkpoint = made / "checkpoints" / "step-00000040"
    checkpoint.mkdir()
    (checkpoint / "SHA256SUMS").write_text("those of now")
    stale, *_ = read([made]).warnings
    assert stale.startswith(f"{made / 'analysis' / '40.csv'}: left out: of other weights")


@pytest.mark.parametrize(
    "content",
    ["[]", '{"runs": 3, "configurations": 4}', '{"runs": [3], "configurations": [{"label": 1}]}',
     '{"runs": [{"run": "../../x"}], "configurations": [{"label": "a", "rates": 3}]}'],
)  # fmt: skip
def test_a_damaged_comparison_is_one_error_or_an_empty_report(content: str, tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(content)
    try:
        contained(report([tmp_path], tmp_path / "report.html"))
    except CheckpointError as error:
        assert "runs.json: " in str(error)


def test_a_comparison_reads_no_run_outside_of_it(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "runs").mkdir(parents=True)
    (made / "runs" / "x").symlink_to(folder / "one")
    trial = {"run": "runs/x", "configuration": "a", "lr": 1e-3, "seed": 0, "state": "finished"}
    (made / "runs.json").write_text(json.dumps({"runs": [trial], "configurations": []}))
    page = contained(report([made], tmp_path / "report.html"))
    assert f"x: leads out of {made}, and is not read" in page.text
    assert "finished at step" not in page.text


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_extra_one_line_names_it(
    missing: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, missing, None)
    wanted = f"needs? the package {missing}; install it with: pip install 'peptrain[report]'"
    wanted = re.escape(wanted).replace(re.escape("needs?"), "needs?")
    command = "plot" if missing == "matplotlib" else "report"
    line = said(capsys, command, str(folder / "one"), "-o", str(tmp_path / "a.svg"))
    assert re.search(wanted.replace("needs?", "need"), line)


def test_the_names_of_figures_are_known_without_matplotlib() -> None:
    code = (
        "import sys; from peptrain.cli.reading import plot_command; plot_command();"
        "print([m for m in ('matplotlib', 'torch', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_the_page_of_the_documentation_names_every_figure() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w-]+)`", page, re.MULTILINE))
    assert rows - {"--figure"} == set(FIGURES)


needs_browser = pytest.mark.skipif(
    PROGRAM is None, reason="needs Chromium (Debian's package chromium)"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as page:
        yield page


@pytest.fixture(scope="module")
def reports(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports")
    for name in ("one", "row", "crashed", "forty"):
        report([folder / name], out / f"{name}.html")
    report(sorted(folder.glob("ten-*")), out / "ten.html")
    return out


@pytest.mark.browser
@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", ["one", "row", "crashed", "ten", "forty"])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_a_word_or_a_request(
    name: str, width: int, scheme: str, reports: Path, chromium: Browser
) -> None:
    assert chromium.open(reports / f"{name}.html", width, scheme) == []
    seen: Any = chromium.value(SEEN)
    assert seen["wide"] <= width and seen["figures"] > 0
    assert seen["smallest"] >= 10, "pixels of the letters in figures"
    light = scheme == "light"
    assert seen["page"] == ("rgb(255, 255, 255)" if light else "rgb(20, 23, 28)")
    assert seen["paper"] == seen["page"]
    assert seen["ink"] == ("rgb(31, 35, 40)" if light else "rgb(230, 237, 243)")


SEEN = """(() => {
  const style = (selector, key) => getComputedStyle(document.querySelector(selector))[key];
  const texts = [...document.querySelectorAll("figure svg text")];
  const scale = t => t.ownerSVGElement.getBoundingClientRect().width
      / t.ownerSVGElement.viewBox.baseVal.width;
  return {
    wide: document.documentElement.scrollWidth,
    figures: document.querySelectorAll("figure svg").length,
    smallest: Math.min(...texts.map(t => parseFloat(t.style.fontSize) * scale(t))),
    page: style("body", "backgroundColor"),
    paper: style("figure svg path", "fill"),
    ink: style("figure svg text", "fill"),
  };
})()"""
