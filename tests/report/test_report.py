from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import browser
import matplotlib
import pytest
import summaries
from matplotlib.figure import Figure

from nsphere import report
from nsphere.report import drawing, html_parts, pictures, verdict
from nsphere.report.curves import headline_ratios, ratio_curve

PICTURED = {
    "loss-tokens": 1,
    "loss-seconds": 1,
    "ratio-tokens": 1,
    "ratio-seconds": 1,
    "final-loss": 1,
    "step-time": 1,
    "lr-sweep": 1,
    "eigen-lr": 2,
    "scales": 6,
    "condition-numbers": 7,
    "attention-logits": 1,
}
IN_WORDS = {"best-lr", "norm-deviation"}


class Text(HTMLParser):
    """The page's text by the figure it is in ("" outside), its table cells, every element's name and attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.cell = False
        self.where, self.texts, self.tags, self.attributes, self.cells = "", {}, [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "figure":
            self.where = dict(attrs)["id"]
        if tag in ("td", "th"):
            self.cells.append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag == "figure":
            self.where = ""
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data):
        self.texts[self.where] = self.texts.get(self.where, "") + data
        if self.cell:
            self.cells[-1] += data


def written(made, folder) -> str:
    path = folder / "report.html"
    report.write_report(made, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory):
    made = summaries.summary(seeds=3)
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(made, path)
    return made, path


@pytest.fixture
def no_svg(monkeypatch):
    """Everything is drawn but not laid out and written as SVG, which takes most of the time."""

    def draw_only(name, label, width, height, draw):
        draw(Figure().add_subplot())
        return f'<svg role="img" aria-label="{label}"></svg>'

    monkeypatch.setattr(pictures, "picture", draw_only)


class TestAnswer:
    """The first sentence, whichever way the comparison went."""

    def test_fewer_tokens_and_seconds(self):
        made = summaries.summary()
        sentence, remarks = verdict.answer(made)
        assert sentence == (
            f"nGPT needed {made['tokens_ratio']:.2f}× the tokens and {made['seconds_ratio']:.2f}× the seconds"
            " to reach GPT + QK-norm’s final loss."
        )
        assert "its final loss is 1.202 nats per token" in remarks[0]
        assert "ended at 1.162 after 2.46 M tokens" in remarks[0]
        assert "One seed" in remarks[-1]

    def test_fewer_tokens_but_more_seconds(self):
        made = summaries.summary() | {"tokens_ratio": 0.95, "seconds_ratio": 1.1}
        assert "0.95× the tokens but 1.10× the seconds" in verdict.answer(made)[0]

    def test_tokens_without_seconds(self):
        made = summaries.summary() | {"seconds_ratio": None, "seconds_ratio_reason": "no step times"}
        sentence, remarks = verdict.answer(made)
        assert "seconds" not in sentence and "In seconds: no step times." in remarks

    def test_never_reached(self):
        made = summaries.summary(final={"ngpt": 1.25})
        sentence, remarks = verdict.answer(made)
        assert sentence == ("nGPT did not reach GPT + QK-norm’s final loss of 1.202 nats per token; it ended at 1.250.")
        assert remarks[0].startswith(
            f"GPT + QK-norm reached nGPT’s final loss with {made['reverse_tokens_ratio']:.2f}× the tokens"
        )

    def test_seeds_that_overlap_are_said(self):
        made = summaries.summary(seeds=3, final={"ngpt": 1.198})
        assert "final losses overlap" in verdict.answer(made)[1][-1]
        assert "final losses overlap" not in verdict.answer(summaries.summary(seeds=3))[1][-1]

    def test_seeds_that_never_got_there_are_counted(self):
        made = summaries.summary(seeds=3) | {"tokens_ratio_by_seed": {"0": 0.7, "1": None, "2": 0.8}}
        last = verdict.answer(made)[1][-1]
        assert "between 0.70 and 0.80" in last and "In 1 of 3 seeds nGPT did not get there" in last

    def test_an_optimum_at_the_edge_is_said(self):
        made = summaries.summary()
        made["arms"]["gpt"]["lr_sweep"]["best_inside_grid"] = False
        assert "learning rate of GPT lies at the edge" in verdict.answer(made)[1][-1]

    def test_a_variant_of_ngpt_answers_where_ngpt_is_not_there(self):
        made = summaries.summary()
        made["arms"]["ngpt,s_qk=fixed"] = made["arms"].pop("ngpt")
        made |= {"tokens_ratio": None, "seconds_ratio": None, "tokens_ratio_reason": "no arm 'ngpt'"}
        expected = verdict.answer(summaries.summary())[0].replace("nGPT", "ngpt,s_qk=fixed")
        assert verdict.answer(made)[0] == expected

    def test_no_ratio_has_its_reason(self):
        made = summaries.summary()
        for seed in made["arms"]["gpt-qknorm"]["seeds"].values():
            seed.pop("curve")
        made |= headline_ratios(made["arms"], "gpt-qknorm")
        sentence, remarks = verdict.answer(made)
        assert sentence == "This run gives no ratio between nGPT and GPT + QK-norm."
        assert remarks[0] == "gpt-qknorm has no validation curve with finite losses."

    def test_nothing_to_compare(self):
        sentence, _ = verdict.answer(summaries.summary(arms=("gpt", "gpt-qknorm")))
        assert sentence == (
            "No nGPT arm was measured, so there is no comparison; GPT + QK-norm ended at 1.202 nats per token."
        )
        sentence, _ = verdict.answer(summaries.summary(arms=("ngpt",)))
        assert sentence.startswith("No GPT arm was measured") and "nGPT ended at 1.162" in sentence


class TestPage:
    def test_the_answer_comes_first(self, three_seeds):
        made, path = three_seeds
        html = path.read_text(encoding="utf-8")
        assert f"<h1>{verdict.answer(made)[0]}</h1>" in html
        assert html.index("<h1>") < html.index("<table")

    def test_every_chart_has_its_picture_explanation_and_label(self, three_seeds):
        html = three_seeds[1].read_text(encoding="utf-8")
        assert browser.charts(html) == PICTURED | dict.fromkeys(IN_WORDS, 0)
        for figure in re.findall(r"<figure.*?</figure>", html, re.S):
            assert re.search(r"<figcaption><h3>[^<]+</h3><p>[^<]{20,}</p></figcaption>", figure)
            for label in re.findall(r'role="img" aria-label="([^"]*)"', figure):
                assert re.search(r"\d", label) and len(label) > 30

    def test_the_table_has_the_summarys_numbers(self, three_seeds):
        made, path = three_seeds
        arms = made["arms"].values()
        cells = Text(path.read_text(encoding="utf-8")).cells
        width = len(arms) + 1

        def row(name):
            start = next(i for i, cell in enumerate(cells) if cell.startswith(name))
            return cells[start + 1 : start + width]

        assert row("final validation loss") == [
            f"{arm['final_val_loss']:.4f}{arm['final_val_loss'] - 0.008:.3f}–{arm['final_val_loss'] + 0.008:.3f}"
            for arm in arms
        ]
        assert row("bits per byte") == [f"{arm['bits_per_byte']:.4f}" for arm in arms]
        assert row("tokens to reach") == ["never", "1.00", f"{made['tokens_ratio']:.2f}"]
        assert row("seconds to reach") == ["never", "1.00", f"{made['seconds_ratio']:.2f}"]
        assert row("learning rate") == ["0.001", "0.0006", "0.002"]
        assert row("parameters") == ["3,279,104", "3,279,104", "3,289,344"]
        assert row("peak memory") == ["1.12 GB", "1.12 GB", "1.18 GB"]
        assert row("tokens per second") == [f"{arm['tokens_per_second']:,.0f}" for arm in arms]
        assert row("training, wall time with compiling") == ["2 min 22 s", "2 min 26 s", "2 min 35 s"]

    def test_how_to_repeat_it_is_there(self, three_seeds):
        made, path = three_seeds
        text = "".join(Text(path.read_text(encoding="utf-8")).texts.values())
        for key in ("command", "torch", "platform", "cpu", "data_sha256", "git_commit", "dtype"):
            assert made["environment"][key] in text
        for limit in made["limits"]:
            assert limit in text

    def test_loads_nothing_and_runs_nothing(self, three_seeds):
        html = three_seeds[1].read_text(encoding="utf-8")
        parsed = Text(html)
        assert not {"script", "img", "link", "iframe", "object", "embed", "image"} & set(parsed.tags)
        assert all(value.startswith("#") for _, name, value in parsed.attributes if name in ("href", "src"))
        assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
        assert set(re.findall(r"url\((.)", html)) == {"#"}
        assert "@import" not in html and "http://" not in html and "https://" not in html
        assert "default-src 'none'" in html

    def test_ids_are_unique_and_every_reference_has_its_target(self, three_seeds):
        parsed = Text(three_seeds[1].read_text(encoding="utf-8"))
        ids = [value for tag, name, value in parsed.attributes if name == "id"]
        # The same swatch stands in several legends; it refers to nothing outside itself.
        counted = {i: ids.count(i) for i in ids}
        assert not [i for i, n in counted.items() if n > 1 and not i.startswith("swatch")]
        targets = [value[1:] for _, name, value in parsed.attributes if name == "href"]
        targets += [value[5:-1] for _, name, value in parsed.attributes if name == "clip-path"]
        assert targets and set(targets) <= set(ids)

    def test_same_summary_same_bytes(self, three_seeds, tmp_path):
        made, path = three_seeds
        assert written(json.loads(json.dumps(made)), tmp_path) == path.read_text(encoding="utf-8")


class TestHostileText:
    HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)> & \" ' $x^2$ é 漢"

    def made(self):
        made = summaries.summary(inspection=False, sweep=False)
        arm = made["arms"]["ngpt"]
        arm |= {"sample": self.HOSTILE, "sample_prompt": "</b>", "description": self.HOSTILE}
        arm["lr_source"] = self.HOSTILE
        made["environment"] |= {"command": self.HOSTILE, "cpu": self.HOSTILE, self.HOSTILE: "x"}
        made["config"][self.HOSTILE] = self.HOSTILE
        made["limits"].append(self.HOSTILE)
        return made

    def test_is_shown_as_it_is(self, tmp_path):
        parsed = Text(written(self.made(), tmp_path))
        assert "script" not in parsed.tags and "img" not in parsed.tags
        assert "".join(parsed.texts.values()).count("<script>document.title='owned'</script>") >= 6

    def test_an_arms_name_is_text_in_pictures_too(self, tmp_path):
        made = summaries.summary(sweep=False)
        made["arms"]["<b>x$y$</b>"] = made["arms"]["gpt"]
        html = written(made, tmp_path)
        assert "<b>x$" not in html
        assert re.search(r"<text[^>]*>&lt;b&gt;x\$y\$&lt;/b&gt;</text>", html)
        assert "b" not in Text(html.split("What the arms write")[0]).tags

    def test_what_utf8_and_html_cannot_hold_is_marked(self, tmp_path):
        made = summaries.summary(inspection=False, sweep=False)
        made["arms"]["gpt"]["sample"] = "a\x00b\x1b[31mc\ud800d\ufffee\n\tf"
        assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde\n\tf" in written(made, tmp_path)


@pytest.mark.usefixtures("no_svg")
class TestMissingPieces:
    """Each missing piece leaves a sentence at its place, and the rest of the page."""

    def words(self, made, folder):
        json.dumps(made)
        return Text(written(made, folder)).texts

    def test_no_sweep(self, tmp_path):
        texts = self.words(summaries.summary(sweep=False), tmp_path)
        assert "Not available: no learning rates were swept in this run." in texts["lr-sweep"]
        assert "tuned beforehand, see docs/demo-sweep.md" in texts["best-lr"]

    def test_no_sphere(self, tmp_path):
        texts = self.words(summaries.summary(arms=("gpt", "gpt-qknorm")), tmp_path)
        for chart in ("eigen-lr", "scales", "norm-deviation"):
            assert "Not available" in texts[chart]
        assert "Not available" not in texts["condition-numbers"] + texts["ratio-tokens"]

    def test_only_the_sphere(self, tmp_path):
        texts = self.words(summaries.summary(arms=("ngpt",)), tmp_path)
        assert "Not available" in texts["ratio-tokens"] and "Not available" in texts["ratio-seconds"]
        assert "Not available" not in texts["loss-tokens"]

    def test_no_inspection(self, tmp_path):
        texts = self.words(summaries.summary(inspection=False), tmp_path)
        assert "no model was inspected" in "".join(texts.values()) and "eigen-lr" not in texts

    def test_no_timing(self, tmp_path):
        made = summaries.summary()
        for arm in made["arms"].values():
            arm |= {"tokens_per_second": None, "step_time_ms_median": None, "step_time_ms_spread": None}
        made |= {"seconds_ratio": None, "seconds_ratio_reason": "no step times"}
        made["ratio_curve"] = ratio_curve(made["arms"], made["best_gpt_arm"])
        texts = self.words(made, tmp_path)
        for chart in ("loss-seconds", "ratio-seconds", "step-time"):
            assert "Not available" in texts[chart]
        assert "Not available" not in texts["loss-tokens"] + texts["ratio-tokens"]

    def test_one_evaluation(self, tmp_path):
        made = summaries.summary()
        for arm in made["arms"].values():
            for seed in arm["seeds"].values():
                seed["curve"] = {"step": [600], "tokens": [2457600], "val_loss": [seed["final_val_loss"]]}
        made["ratio_curve"] = ratio_curve(made["arms"], made["best_gpt_arm"])
        texts = self.words(made, tmp_path)
        assert "Not available" in texts["loss-tokens"] and "Not available" not in texts["final-loss"]

    def test_a_diverged_arm(self, tmp_path):
        made = summaries.summary()
        arm = made["arms"]["gpt"]
        arm |= {"final_val_loss": math.nan, "bits_per_byte": math.nan, "seeds": {"0": {"final_val_loss": math.nan}}}
        arm["lr_sweep"]["val_loss"] = [math.nan] * 6
        made["arms"]["ngpt"]["inspection"]["layers"][1]["condition_numbers"]["W_q"] = math.inf
        parsed = Text(written(made, tmp_path))
        assert "nan" not in "".join(parsed.cells) and "Not available" not in parsed.texts["loss-tokens"]

    def test_empty(self, tmp_path):
        assert "there is no comparison" in written({"arms": {}}, tmp_path)

    @pytest.mark.parametrize("key", sorted(summaries.summary()["arms"]["ngpt"]))
    def test_any_key_of_an_arm_may_be_missing(self, key, tmp_path):
        made = summaries.summary(layers=1)
        for arm in made["arms"].values():
            arm.pop(key)
        if key == "seeds":
            made["ratio_curve"] = ratio_curve(made["arms"], made["best_gpt_arm"])
        assert "<h1>" in written(made, tmp_path)

    @pytest.mark.parametrize("key", sorted(set(summaries.summary()) - {"arms"}))
    def test_any_key_of_the_summary_may_be_missing(self, key, tmp_path):
        made = summaries.summary(layers=1, inspection=False)
        made.pop(key)
        assert "<h1>" in written(made, tmp_path)


class TestWriting:
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        path = tmp_path / "report.html"
        path.write_text("old")

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            report.write_report(summaries.summary(inspection=False, sweep=False), path)
        assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "old"

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            report.write_report(summaries.summary(inspection=False), tmp_path / "no" / "report.html")

    def test_inspection_alone(self, tmp_path):
        path = tmp_path / "inspection.html"
        report.write_inspection(summaries.inspection("ngpt", 3), "runs/<demo>", path)
        html = path.read_text(encoding="utf-8")
        assert "<h1>runs/&lt;demo&gt;</h1>" in html
        inside = ("eigen-lr", "scales", "condition-numbers", "attention-logits")
        assert browser.charts(html) == {name: PICTURED[name] for name in inside} | {"norm-deviation": 0}
        assert "2.4·10⁻⁷" in html and "within" in html

    def test_inspection_of_a_gpt(self, tmp_path):
        path = tmp_path / "inspection.html"
        report.write_inspection(summaries.inspection("gpt", 2), "runs/gpt", path)
        texts = Text(path.read_text(encoding="utf-8")).texts
        assert "only nGPT has eigen learning rates" in texts["eigen-lr"]

    def test_a_row_off_the_sphere_is_said(self, tmp_path):
        path = tmp_path / "inspection.html"
        off = summaries.inspection("ngpt", 2) | {"max_norm_deviation": 3.2e-5}
        report.write_inspection(off, "x", path)
        assert "above the limit" in Text(path.read_text(encoding="utf-8")).texts["norm-deviation"]


class TestPictures:
    def points(self, svg, css, least=3):
        """The corners of the first line in an arm's colour, in the picture's coordinates."""
        for d, style in re.findall(r'<path d="([^"]*)"[^>]*? style="([^"]*)"', svg):
            if "fill: none" in style and css in style and d.count("L") >= least - 1:
                return [tuple(map(float, p)) for p in re.findall(r"[ML] (\S+) (\S+)", d)]
        raise AssertionError(f"no line in {css}")

    def test_the_loss_line_is_the_data(self):
        made = summaries.summary()
        curve = made["arms"]["gpt"]["seeds"]["0"]["curve"]
        drawn = self.points(pictures.loss_picture(made, "tokens"), "--arm-sky")
        shown = list(zip(curve["tokens"], curve["val_loss"], strict=True))[-9:]
        self.assert_same_shape(drawn[-9:], shown)

    def test_the_seconds_line_is_tokens_over_speed(self):
        made = summaries.summary()
        svg = pictures.loss_picture(made, "seconds")
        ends = {}
        for name, css in (("gpt", "--arm-sky"), ("ngpt", "--arm-vermilion")):
            ends[name] = self.points(svg, css)[-1][0]
        other = self.points(svg, "--arm-sky")[-2][0]
        gpt, ngpt = (made["arms"][name]["tokens_per_second"] for name in ("gpt", "ngpt"))
        pixels_per_second = (ends["gpt"] - other) / (50 * 4096 / gpt)
        assert ends["ngpt"] - ends["gpt"] == pytest.approx(
            (600 * 4096 / ngpt - 600 * 4096 / gpt) * pixels_per_second, rel=1e-3
        )

    def test_layers_on_a_logarithmic_axis(self):
        values = [10.0, 1000.0, 30.0, 200.0]
        drawn = self.points(pictures.layers_picture("x", "x", {"ngpt": values}, log=True), "--arm-vermilion")
        self.assert_same_shape(drawn, [(i, math.log(v)) for i, v in enumerate(values)])

    def test_the_ratio_line_is_the_ratio(self):
        made = summaries.summary()
        ratios = made["ratio_curve"]
        drawn = self.points(pictures.ratio_picture(ratios, "tokens", made["arms"]), "--arm-vermilion")
        points = [
            (x, math.log(y))
            for x, y in zip(ratios["tokens"], ratios["arms"]["ngpt"]["tokens_ratio"], strict=True)
            if y is not None
        ]
        self.assert_same_shape(drawn, points)

    def assert_same_shape(self, drawn, data):
        """The picture's coordinates are one affine map of the data per axis (y upwards in data, down in pixels)."""
        assert len(drawn) == len(data)
        for axis in (0, 1):
            low, high = (
                min(range(len(data)), key=lambda i: data[i][axis]),
                max(range(len(data)), key=lambda i: data[i][axis]),
            )
            scale = (drawn[high][axis] - drawn[low][axis]) / (data[high][axis] - data[low][axis])
            assert scale > 0 if axis == 0 else scale < 0
            for p, q in zip(drawn, data, strict=True):
                assert p[axis] == pytest.approx(drawn[low][axis] + scale * (q[axis] - data[low][axis]), abs=0.02)

    def test_arms_differ_without_colour(self):
        styles = list(drawing.arm_styles(["gpt", "gpt-qknorm", "gpt-qknorm-muon", "ngpt", "x", "y", "z"]).values())
        for a, b in itertools.combinations(styles, 2):
            assert a.dashes != b.dashes and a.marker != b.marker and a.css != b.css
        lightness = sorted(luminance(style.colour) for style in styles[:2] + styles[3:4])
        assert lightness[1] / lightness[0] > 1.5 and lightness[2] / lightness[1] > 1.5

    def test_ink_can_be_read_on_paper(self):
        for colours in (html_parts.LIGHT, html_parts.DARK):
            for ink in ("--ink", "--muted"):
                a, b = sorted(luminance(colours[name]) for name in (ink, "--paper"))
                assert (b + 0.05) / (a + 0.05) >= 4.5  # WCAG AA

    def test_dark_page_has_every_colour(self):
        assert set(html_parts.DARK) == set(html_parts.LIGHT)

    def test_unknown_arms_get_spare_styles(self):
        styles = drawing.arm_styles(["ngpt", "mine", "yours"])
        assert styles["mine"].title == "mine" and styles["mine"].css != styles["yours"].css

    def test_many_layers(self, tmp_path):
        html = written(summaries.summary(layers=36, sweep=False), tmp_path)
        assert browser.charts(html)["scales"] == 6

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0"), (2457600, "2.46 M"), (999.96, "1 k"), (64e9, "64 G"), (1.5e12, "1.5 T"), (12, "12")],
    )
    def test_count(self, value, text):
        assert drawing.count(value) == text

    @pytest.mark.parametrize(
        ("value", "text"), [(1000, "10³"), (0.0003, "3·10⁻⁴"), (10, "10"), (0.1, "0.1"), (2e5, "2·10⁵"), (0, "0")]
    )
    def test_power_of_ten(self, value, text):
        assert drawing.power_of_ten(value) == text

    def test_matplotlib_is_left_as_it_was(self):
        before = copy.deepcopy(dict(matplotlib.rcParams))
        pictures.loss_picture(summaries.summary(), "tokens")
        assert dict(matplotlib.rcParams) == before

    def test_no_pyplot(self):
        check = "import sys, nsphere.report; print(sorted({'matplotlib.pyplot'} & set(sys.modules)))"
        run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "[]"


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `#rrggbb`."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@browser.needs_chromium
class TestInABrowser:
    def test_no_console_message_and_every_chart(self, three_seeds, tmp_path):
        opened = browser.open_page(three_seeds[1], tmp_path)
        assert opened.console == []
        assert browser.charts(opened.dom) == PICTURED | dict.fromkeys(IN_WORDS, 0)

    @pytest.mark.parametrize("width", [1400, 390])
    def test_layout(self, width, three_seeds, tmp_path):
        made = browser.layout(three_seeds[1], tmp_path, width)
        assert made["width"] == width and made["overflow"] <= 0
        assert made["answer_bottom"] < 400  # the answer is on the first screen
        assert {name: len(panels) for name, panels in made["charts"].items() if panels} == PICTURED
        for name, panels in made["charts"].items():
            for panel in panels:
                assert panel["width"] > 150 and panel["height"] > 100, name
                assert panel["clipped"] == [] and panel["font"] > 8, name

    @pytest.mark.parametrize("width", [1400, 390])
    def test_layout_of_many_arms_and_layers(self, width, tmp_path):
        made = summaries.summary(arms=tuple(summaries.SHAPES), layers=24, final={"ngpt": 1.25})
        written(made, tmp_path)
        laid_out = browser.layout(tmp_path / "report.html", tmp_path, width)
        assert laid_out["overflow"] <= 0
        assert [p["clipped"] for panels in laid_out["charts"].values() for p in panels if p["clipped"]] == []

    def test_hostile_text_does_nothing(self, tmp_path):
        written(TestHostileText().made(), tmp_path)
        opened = browser.open_page(tmp_path / "report.html", tmp_path)
        assert opened.console == [] and "<title>owned" not in opened.dom

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            ("<script>undefined_function()</script>", "Content Security Policy"),
            ('<img src="https://example.invalid/x.png">', "Content Security Policy"),
        ],
    )
    def test_a_script_or_a_request_would_be_seen(self, broken, message, three_seeds, tmp_path):
        """The tests above can fail: what the page must not do shows on the console."""
        path = tmp_path / "broken.html"
        path.write_text(three_seeds[1].read_text(encoding="utf-8") + broken, encoding="utf-8")
        assert any(message in line for line in browser.open_page(path, tmp_path).console)

    def test_a_failing_script_would_be_seen(self, tmp_path):
        path = tmp_path / "broken.html"
        path.write_text("<!doctype html><script>undefined_function()</script>")
        assert "undefined_function is not defined" in browser.open_page(path, tmp_path).console[0]

    def test_a_lost_or_empty_chart_would_be_seen(self, three_seeds, tmp_path):
        html = three_seeds[1].read_text(encoding="utf-8")
        figure = re.search(r'<figure id="loss-tokens">.*?</figure>', html, re.S)[0]
        svg = re.search(r'<svg[^>]*role="img".*?</svg>', figure, re.S)[0]
        for broken in ("", re.sub(r"<g>.*</g>", "", svg, flags=re.S)):
            path = tmp_path / "broken.html"
            path.write_text(html.replace(svg, broken), encoding="utf-8")
            assert browser.charts(browser.open_page(path, tmp_path).dom)["loss-tokens"] == 0

    def test_overflow_and_clipped_text_would_be_seen(self, three_seeds, tmp_path):
        html = three_seeds[1].read_text(encoding="utf-8")
        wide = tmp_path / "wide.html"
        wide.write_text(html.replace("<h2>", '<div style="width:900px">x</div><h2>', 1), encoding="utf-8")
        assert browser.layout(wide, tmp_path, 390)["overflow"] > 400
        clipped = tmp_path / "clipped.html"
        clipped.write_text(html.replace(">tokens trained on<", ">" + "tokens trained on " * 9 + "<"), encoding="utf-8")
        assert browser.layout(clipped, tmp_path, 1400)["charts"]["loss-tokens"][0]["clipped"]


def test_the_recipes_are_told(tmp_path) -> None:
    told = summaries.summary(("gpt", "ngpt"))
    told["arms"]["gpt"] |= {"recipe": {"weight_decay": 0.1}, "model": {"d_model": 256, "qk_norm": "<b>"}}
    told["arms"]["ngpt"] |= {"recipe": {"weight_decay": 0.0}, "model": {"d_model": 256, "s_z_init": 10.0}}
    report.write_report(told, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    recipes = page[page.index("The recipes") :].partition("</details>")[0]
    assert '<th scope="row">weight_decay</th><td>0.1</td><td>0</td>' in recipes
    assert '<th scope="row">s_z_init</th><td>–</td><td>10</td>' in recipes
    assert "&lt;b&gt;" in recipes and "<b>" not in recipes
    assert "d_model" not in recipes


def test_untuned_learning_rates_are_said_beside_the_headline() -> None:
    told = summaries.summary(("gpt", "ngpt"))
    assert "--sweep-lr" not in " ".join(verdict.answer(told)[1])
    told["arms"]["gpt"]["lr_source"] = "tuned for gpt at the demo preset's settings, not for these"
    assert "learning rate of GPT was not tuned for these settings" in " ".join(verdict.answer(told)[1])
    told["arms"]["ngpt"]["lr_source"] = "a usual value, not tuned"
    assert "learning rate of GPT and nGPT was not tuned" in " ".join(verdict.answer(told)[1])
