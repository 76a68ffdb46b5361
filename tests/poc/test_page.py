"""The status page: what it says, that it needs nobody, and how a real browser shows it."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pages import OUTSIDE
from PIL import Image
from test_snapshot import (
    RELEASE,
    SITES,
    audited,
    clean,
    completed,
    draw,
    going_on,
    left_out,
    look,
    record,
    spend,
)

from custom.config import ExperimentConfig
from custom.run_folder import RoundRecord
from custom.secure_config import SecureAggregationConfig
from custom.strict import ConfigError
from poc.page import PICTURE_WIDTH, SHOWN_GRIDS, page
from poc.snapshot import Job, LedgerView, NodeState, SampleGrid, SiteState, Snapshot
from privacy.accounting import epsilon
from privacy.ledger import LEDGER_FILE

WIDTHS = (360, 1280)
HOSTILE = '"><script>alert(1)</script>&\u202e'


def sound(folder: Path, experiment: ExperimentConfig) -> Snapshot:
    """A training goes on, another is finished and audited; one site has spent something."""
    audited(folder / "runs", experiment, clean())
    completed(folder / "runs", replace(experiment, name="before"))
    going_on(folder / "runs", experiment)
    spend(folder / "sites" / "site-1")
    return look(folder, jobs=[Job(job_id="1-2-3", name="small", status="RUNNING", submitted="2026-01-31 10:00")])


def troubled(folder: Path, experiment: ExperimentConfig) -> Snapshot:
    """Everything that may go wrong, with names as long and as hostile as they may be."""
    failed = going_on(folder / "runs", replace(experiment, name="before"))
    failed.fail(f"RoundVoid: {HOSTILE} " + "x" * 300)
    run = going_on(folder / "runs", experiment)
    run.record(left_out(1, refused="site-2", silent="site-3"))
    with (run.path / "rounds.jsonl").open("a") as stream:
        stream.write("broken\n")
    (run.path / "samples" / "round_0001.png").write_bytes(b"no picture")
    for site in ("site-1", "site-2"):
        spend(folder / "sites" / site)
    (folder / "sites" / "site-2" / f"{LEDGER_FILE}.anchor").unlink()
    seen = look(
        folder,
        nodes={"site-3": NodeState(name="site-3", status="gone", detail=f"exit code -9 {HOSTILE}")},
        jobs=[Job(job_id="1" * 36, name="ct_ddpm_" + "x" * 60, status="FINISHED:EXECUTION_EXCEPTION")],
    )
    long = SiteState(node=NodeState(name="university-hospital-" + "x" * 80, status="starting"), ledger=LedgerView())
    return replace(seen, name=f"demo {HOSTILE}", sites=(*seen.sites, long))


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Written pages by name."""

    folder: Path

    def text(self, name: str) -> str:
        return (self.folder / f"{name}.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, experiment: ExperimentConfig) -> Pages:
    base = tmp_path_factory.mktemp("pages")
    seen = {
        "sound": sound(base / "a", experiment),
        "troubled": troubled(base / "b", experiment),
        "empty": look(base / "c"),
    }
    for name, snapshot in seen.items():
        (base / f"{name}.html").write_text(page(snapshot), encoding="utf-8")
    return Pages(folder=base)


each = pytest.mark.parametrize("name", ["sound", "troubled", "empty"])


# ---- what it says


class Outline(HTMLParser):
    """Tags with their attributes, and the text, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]

    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.said).split("</style>")[-1])


def said(text: str) -> str:
    return Outline(text[text.index("<body>") :]).text()


def test_what_is_clear_at_a_glance(pages: Pages) -> None:
    spent = epsilon([RELEASE], 1e-3).epsilon
    head = said(pages.text("sound")[: pages.text("sound").index("<nav")])
    for words in (
        "Training: small",
        "Nothing is wrong",
        "4 of 4 nodes ready",
        "1 of 2 rounds done; about 30 s left",
        "● site-1, site-2, site-3 ready",
        f"at most ε = {math.ceil(100 * spent) / 100:.2f} of 4 at δ = 1e-3 (site-1); nothing at the other sites",
        "● GREEN for the model of",
        "was not the one audited",
    ):
        assert words in head, words


def test_what_is_wrong_comes_first_and_in_full(pages: Pages) -> None:
    text = pages.text("troubled")
    head = said(text[: text.index("<dl>")])
    for words in (
        "things are wrong",
        "site-3 is gone",
        "Ledger of site-2 cannot be relied on",
        "site-2 was refused in round 2",
        "site-3 was silent in round 2",
        "cannot be read in full",
        "Run before/",
        "did not go through",
    ):
        assert words in head, words
    assert 'data-status="RED"' in text
    assert "round_0001.png cannot be read as a picture" in said(text)
    privacy = text[text.index('id="privacy"') :]
    row = said("<body>" + privacy[privacy.index('<th scope="row">site-2') :].split("</tr>")[0])
    assert row.count("not known") == 3
    assert "0" not in row.replace("not known", "")


def test_states_of_a_federation(tmp_path: Path, experiment: ExperimentConfig) -> None:
    def status(**changes: Any) -> tuple[str, str]:
        text = page(look(tmp_path, **changes))
        tone = re.search(r'data-status="(\w+)"', text)
        assert tone is not None
        return tone.group(1), said(text)

    def node(name: str, status: Any) -> NodeState:
        return NodeState(name=name, status=status)

    assert status()[0] == "GREEN"
    assert "Ready: no run is going on" in status()[1]
    assert "No run yet" in status()[1]
    off = {site: node(site, "stopped") for site in SITES}
    tone, text = status(server=node("server", "stopped"), nodes=off)
    assert (tone, "Stopped" in text) == ("INVALID", True)
    tone, text = status(nodes={"site-1": node("site-1", "starting")})
    assert (tone, "Starting" in text, "3 of 4 nodes ready" in text) == ("GREEN", True, True)
    assert status(nodes={"site-1": node("site-1", "stopped")})[0] == "AMBER"
    tone, text = status(server=node("server", "gone"))
    assert (tone, "The server is gone" in text) == ("RED", True)
    audited(tmp_path / "runs", experiment, clean()).path.joinpath("receipt.json").unlink()
    assert "Auditing: small_audit" in status()[1]


def test_a_completed_run(tmp_path: Path, experiment: ExperimentConfig) -> None:
    completed(tmp_path / "runs", experiment, ended_early="a budget is spent")
    text = said(page(look(tmp_path)))
    for words in (
        "● completed: a budget is spent",
        "holds: the model is the one that it vouches for",
        "held-out loss 0.2500, EffNet-KID of samples 0.1000",
        "After 2 rounds, final",
        "neither differential privacy nor masks",
        "none: no model was audited here",
    ):
        assert words in text, words


def test_what_is_withheld_is_said_so(
    tmp_path: Path, experiment: ExperimentConfig, private_experiment: ExperimentConfig
) -> None:
    quiet = {"accepted": {site: {} for site in SITES}}
    going_on(tmp_path / "a" / "runs", private_experiment, 0).record(record(0, **quiet))
    text = page(look(tmp_path / "a"))
    assert "Losses are withheld: under differential privacy" in said(text)
    assert "train-loss" not in text
    masked = replace(experiment, secure_aggregation=SecureAggregationConfig())
    going_on(tmp_path / "b" / "runs", masked, 0).record(record(0, **quiet, mean={"train_loss": 0.3}))
    text = page(look(tmp_path / "b"))
    assert "Only the mean over the sites is known" in said(text)
    assert 'id="run-0-train-loss"' in text
    going_on(tmp_path / "c" / "runs", experiment, 0).record(record(0, **quiet))
    assert "the sites let none leave" in said(page(look(tmp_path / "c")))


def test_curves_are_the_sites_own(tmp_path: Path, experiment: ExperimentConfig) -> None:
    completed(tmp_path / "runs", experiment)
    text = page(look(tmp_path))
    held_out = text.split('id="run-0-held-out-loss"')[1].split("</figure>")[0]
    for site in (*SITES, "mean over sites"):
        assert f">{site}</text>" in held_out
    assert "mean over sites: 0.2500 at 2" in held_out  # the finished model's
    assert "site-1: 0.4000 at 1" in held_out
    assert "site-1: 0.2500 at 2" in text.split('id="run-0-train-loss"')[1]


def test_many_sites_are_a_band(tmp_path: Path, experiment: ExperimentConfig) -> None:
    def round_of_ten(number: int) -> RoundRecord:
        said = {f"site-{index}": {"train_loss": 0.1 * index / number} for index in range(1, 11)}
        return record(number, asked=list(said), accepted=said)

    folder = going_on(tmp_path / "runs", experiment, 0)
    for number in (1, 2, 3):
        folder.record(round_of_ten(number))
    chart = page(look(tmp_path)).split('id="run-0-train-loss"')[1].split("</figure>")[0]
    assert "from the lowest to the highest of 10 sites" in chart
    assert chart.count("<polygon") == 1
    assert ">site-1</text>" not in chart


def test_losses_of_any_size_are_drawn(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = going_on(tmp_path / "runs", experiment, 0)
    for number, loss in enumerate((1e-12, 1e12, 0.0, -1.0, 0.5)):
        folder.record(record(number, accepted={"site-1": {"train_loss": loss}}))
    assert "NaN" not in page(look(tmp_path))
    one = going_on(tmp_path / "one" / "runs", experiment, 0)
    one.record(record(0, accepted={"site-1": {"train_loss": 1.0}}))
    assert 'id="run-0-train-loss"' in page(look(tmp_path / "one"))


def test_losses_of_two_stages_are_told_apart(tmp_path: Path, latent_experiment: ExperimentConfig) -> None:
    folder = going_on(tmp_path / "runs", latent_experiment, 0)
    folder.record(record(0, accepted={"site-1": {"train_loss": 1.0}}))
    assert "Of the first 1 round it is the autoencoder's" in said(page(look(tmp_path)))


# ---- pictures


def pictures(text: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]


def test_the_newest_grids_are_shown_small(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = going_on(tmp_path / "runs", experiment, 1)
    for rounds in range(2, SHOWN_GRIDS + 3):
        Image.effect_noise((1400, 900), 80).save(folder.path / "samples" / f"round_{rounds:04d}.png")
    draw(folder.path / "mean_image.png")
    text = page(look(tmp_path))
    shown = pictures(text)
    assert len(shown) == SHOWN_GRIDS + 1
    assert all(picture.width <= PICTURE_WIDTH for picture in shown)
    assert "2 older grids in the run's folder" in said(text)
    assert f"After {SHOWN_GRIDS + 2} rounds" in said(text)
    assert "Noisy mean image" in said(text)
    assert len(text) < 1_000_000


def test_a_picture_that_is_none_or_too_large_or_gone_is_said(tmp_path: Path, experiment: ExperimentConfig) -> None:
    going_on(tmp_path / "runs", experiment, 1)
    seen = look(tmp_path)
    huge, half, gone = (tmp_path / name for name in ("huge.png", "half.png", "gone.png"))
    Image.new("1", (5000, 5000)).save(huge)
    half.write_bytes((seen.runs[0].grids[0].file).read_bytes()[:300])
    grids = tuple(SampleGrid(rounds_done=index, file=file) for index, file in enumerate((huge, half, gone)))
    text = page(replace(seen, runs=(replace(seen.runs[0], grids=grids),)))
    assert pictures(text) == []
    assert said(text).count("cannot be read as a picture") == 3


# ---- one file, for everybody


@each
def test_it_needs_nothing_and_runs_nothing(name: str, pages: Pages) -> None:
    outline = Outline(pages.text(name))
    assert not outline.named("script", "link", "iframe", "object", "form", "base")
    addresses = [value for _, attributes in outline.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(str(address).startswith(("#", "data:image/jpeg;base64,")) for address in addresses)
    assert all(not key.startswith("on") for _, attributes in outline.tags for key in attributes)
    assert 'http-equiv="refresh"' not in pages.text(name)


def test_what_comes_from_outside_is_escaped(pages: Pages) -> None:
    text = pages.text("troubled")
    assert "<script" not in text
    assert "\u202e" not in text
    assert text.count("&lt;script&gt;") >= 4  # name of the federation, twice; a reason; a detail


@each
def test_it_can_be_heard(name: str, pages: Pages) -> None:
    outline = Outline(pages.text(name))
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [str(attributes["id"]) for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes.get("scope") in ("col", "row") for attributes in outline.named("th"))
    assert len(outline.named("caption")) == len(outline.named("table"))
    assert all(picture["alt"] for picture in outline.named("img"))
    assert {str(link["href"]).removeprefix("#") for link in outline.named("a")} <= set(ids)


def test_it_asks_to_be_read_again_if_it_is_written_again(tmp_path: Path) -> None:
    text = page(look(tmp_path), refresh_s=7)
    assert '<meta http-equiv="refresh" content="7">' in text
    assert "reads it again every 7 s" in said(text)
    for impossible in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="refresh_s"):
            page(look(tmp_path), refresh_s=impossible)  # type: ignore[arg-type]


def test_it_is_a_function_of_the_snapshot(tmp_path: Path, experiment: ExperimentConfig) -> None:
    going_on(tmp_path / "runs", experiment)
    seen = look(tmp_path, written_at=datetime.now(timezone(timedelta(hours=2))))
    assert page(seen) == page(seen)
    assert f"Written {seen.written_at:%Y-%m-%d %H:%M:%S} UTC" in page(seen)


# ---- in a browser


# Of every text, the ratio of its luminance to that of the page (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const light = (colour) => {
    const part = colour.match(/[0-9.]+/g).slice(0, 3).map(Number).map((value) => value / 255);
    const [r, g, b] = part.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll('p, dt, dd, th, td, a, strong, figcaption, svg text')].map((each) => {
    const style = getComputedStyle(each);
    const ink = light(each.closest('svg') ? style.fill : style.color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@each
def test_a_browser_shows_it(name: str, width: int, scheme: Any, browser: Any, pages: Pages) -> None:
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: complaints.extend([request.url] if request.url.startswith("http") else []))
    opened.goto((pages.folder / f"{name}.html").as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.locator("#status").is_visible()
    for section in ("sites", "privacy", "runs", "about"):
        assert opened.locator(f"#{section}").is_visible()
    loaded = "(all) => all.map((image) => image.complete && image.naturalWidth > 0 && image.clientWidth <= innerWidth)"
    assert all(opened.eval_on_selector_all("img", loaded))
    assert opened.evaluate(OUTSIDE) == []
    assert min(opened.evaluate(CONTRASTS)) >= 4.5
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    assert dark == (scheme == "dark")
    assert complaints == []
    opened.close()


def test_progress_and_charts_are_there(browser: Any, pages: Pages) -> None:
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.goto((pages.folder / "sound.html").as_uri())
    assert opened.eval_on_selector("#status progress", "(bar) => [bar.value, bar.max]") == [1, 2]
    for chart in ("run-0-held-out-loss", "run-0-train-loss", "chart-epsilon"):
        assert opened.locator(f"#{chart} svg").is_visible()
    opened.close()


@each
def test_on_paper_everything_is_open_and_dark_on_white(name: str, browser: Any, pages: Pages) -> None:
    opened = browser.new_page(viewport={"width": 718, "height": 1000}, color_scheme="dark")
    opened.goto((pages.folder / f"{name}.html").as_uri())
    opened.emulate_media(media="print")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.evaluate("document.documentElement.scrollWidth") <= 718
    assert not opened.locator("nav").is_visible()
    assert all(table.query_selector("thead th").is_visible() for table in opened.query_selector_all("table"))
    assert min(opened.evaluate(CONTRASTS)) >= 4.5
    opened.close()
