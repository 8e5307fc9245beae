import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from revdeq_lightning.cli.main import main
from revdeq_lightning.report.page import write_report
from tests.reporting.run_folders import FOLDER_STEPS as STEPS, training_rows, whole_run, write_metrics as metrics


class Elements(HTMLParser):
    """Open and closed elements of a page, attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f" {data}"

    def values(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.found if name in attrs]


def page_of(*folders) -> Elements:
    elements = Elements(write_report(folders).read_text())
    assert elements.open == []
    elements.text = " ".join(elements.text.split())
    return elements


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every file there is, and its page."""
    folder = whole_run(tmp_path_factory.mktemp("runs") / "small" / "v")
    return folder, page_of(folder)


def titles(page: Elements) -> list[str]:
    return page.values("aria-label")


def test_the_page_needs_no_other_file_and_its_links_lead_to_what_is_there(whole):
    folder, page = whole
    assert (folder / "report.html").is_file()
    assert {tag for tag, _ in page.found} & {"script", "iframe", "object"} == set()
    assert all(address.startswith("data:") for address in page.values("src"))
    links = [address for address in page.values("href") if not address.startswith(("data:", "#"))]
    assert {unquote(link) for link in links} >= {"metrics.csv", "checkpoints/best 1.ckpt", "depth_sweep.csv"}
    assert all((folder / unquote(link)).exists() for link in links)
    assert "<script>alert(1)</script>" in page.text  # as text, not as an element
    for address in re.findall(r"url\(([^)]*)\)", (folder / "report.html").read_text()):
        assert address.startswith("#")


def test_the_figures_on_top_are_those_of_the_files(whole):
    folder, page = whole
    for words in (
        "small/v",
        "Language model: solver reversible, max_steps 4, beta 0.8. Started 2026-01-02T03:04:05Z",
        "bits per byte (test) 1.605 1.4567 nats per token, 6,418 per word",
        "gradients certified exact 100 of 100",
        "forward + backward 4 + 4 800 up to step 100",
        "time of training 50 s 100 steps, 7,054 tokens a second, 300 MiB at most",
        "2 4 1.25 as trained",
        "packages.torch 2.13 earlier_starts [2025-12-31]",
    ):
        assert words in page.text
    assert not re.search(r'class="[^"]*\bbad', (folder / "report.html").read_text())


def test_every_key_has_a_panel_or_a_place_in_the_figures(whole):
    assert titles(whole[1]) == [
        "loss [nats per token]",
        "bits per byte",
        "relative residual at the end of the solve",
        "evaluations of f a step",
        "fraction of samples converged",
        "gradients not certified exact, of all so far",
        "relative error of the gradient",
        "spectral radius of df/dz",
        "peak memory [MiB]",
        "tokens a second",
        "seconds a step",
        "model FLOP utilization",
        "relative residual along the iteration",
        "loss [nats per token] with other numbers of evaluations",
        "gradient_error/bptt/.../cosine",
        "my/own metric",
    ]


def test_gradients_that_are_not_exact_are_bad_news(tmp_path):
    folder = metrics(tmp_path / "v", training_rows(**{"equilibrium/num_certified_gradients": 9.0}))
    page = page_of(folder)
    assert "gradients certified exact 9 of 100" in page.text
    assert "tile bad" in page.values("class")


@pytest.mark.parametrize(
    ("rows", "words", "panels"),
    [
        ([], "Nothing was logged.", []),
        ([{"step": 9, "train/loss": 2.5}], "nats per sample (training, newest) 2.5000", ["loss [nats per sample]"]),
        ([{"step": 9, "val/accuracy": 0.25}], "accuracy (validation, newest) 25.00%", ["accuracy"]),
        ([{"step": 9, "train/loss": "nan"}], "train/loss: 1 of 1 values are not finite, the first at step 10", []),
        ([{"step": 9, "val/loss": "nan"}, {"step": 19, "val/loss": 2}], "best loss 2.0000, at step 20", None),
    ],
)
def test_a_run_with_little_in_its_folder(tmp_path, rows, words, panels):
    page = page_of(metrics(tmp_path / "v", rows))
    assert words in page.text
    assert panels is None or titles(page) == panels


@pytest.mark.parametrize("rows", [[{"step": 9, "remark": "slow"}], [{"step": 9, "loss": 1}, {"loss": 2}]])
def test_values_that_are_no_numbers_or_have_no_step_are_told(tmp_path, rows):
    folder = metrics(tmp_path / "v", rows)
    with pytest.raises(ValueError, match=r"v/metrics\.csv is not a table of numbers by their step: "):
        write_report([folder])


def test_runs_side_by_side_show_what_differs(tmp_path):
    runs = [whole_run(tmp_path / "small" / name, beta) for name, beta in (("a", 0.8), ("b", 0.5))]
    rows = [{k: v for k, v in row.items() if "seconds_per_step" not in k} for row in training_rows()]
    metrics(runs[1], [{**row, "test/bits_per_byte": 1.5} if "test/loss" in row else row for row in rows])
    page = page_of(*runs)
    assert (tmp_path / "small" / "comparison.html").is_file()
    assert "bits per byte (test) 1.605 1.4567 nats per token, 6,418 per word 1.5 1.4567" in page.text
    assert "time of training 50 s 100 steps, 7,054 tokens a second, 300 MiB at most not logged" in page.text
    assert "Settings that differ a b model.solver.beta 0.8 0.5 All settings" in page.text
    assert "a/checkpoints/best%201.ckpt" in page.values("href")
    assert "seconds a step" in titles(page)


@pytest.mark.parametrize("other", ["{}/b/w", "../b/w"])
def test_the_comparison_lies_above_all_runs_however_they_are_given(tmp_path, monkeypatch, other):
    for name in ("a/v", "b/w"):
        metrics(tmp_path / name, training_rows())
    monkeypatch.chdir(tmp_path / "a")
    assert write_report(["v", other.format(tmp_path)]) == tmp_path / "comparison.html"
    assert "a/v/metrics.csv" in (tmp_path / "comparison.html").read_text()


def test_the_command_writes_the_page_without_torch(tmp_path):
    folder = whole_run(tmp_path / "v")
    program = (
        "import sys; from revdeq_lightning.cli.main import main; main(['report', *sys.argv[1:]])\n"
        "assert not {'torch', 'lightning', 'wandb'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(folder), "--output", str(tmp_path / "pages" / "p.html")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"Report in {tmp_path}/pages/p.html\n"
    assert "../v/metrics.csv" in Elements((tmp_path / "pages" / "p.html").read_text()).values("href")


def test_what_cannot_be_shown_is_told_in_one_line(tmp_path, capsys):
    language, images = (tmp_path / "runs" / name for name in ("language", "images"))
    metrics(language, training_rows())
    metrics(images, [{"step": STEPS[0], "val/accuracy": 0.5}])
    broken = metrics(tmp_path / "broken", training_rows())
    (broken / "depth_sweep.csv").write_text("steps,forward_nfe,loss\n1,2,many\n")
    for arguments, words in (
        ([], "the following arguments are required: RUN"),
        ([language, images], f"runs of different tasks have no figure in common, got: {language} is a language model"),
        ([tmp_path / "runs"], f"no run in {tmp_path}/runs: it holds no metrics.csv (the newest run below it: "),
        ([language, language], f"the run {language} is given twice"),
        ([broken], "depth_sweep.csv is not a table of numbers: could not convert string to float: 'many'"),
        ([language, "--outptu=x"], "did you mean output?"),
    ):
        with pytest.raises(SystemExit):
            main(["report", *map(str, arguments)])
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert words in error
