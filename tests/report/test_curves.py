from __future__ import annotations

import math

import pytest
import summaries
from hypothesis import given
from hypothesis import strategies as st

from nsphere.report import curves

LOSSES = st.integers(32, 640).map(lambda i: i / 64)


def arm(losses, tokens=None, rate=100.0, architecture="gpt", **seeds):
    """An arm with one seed "0" of these losses at 0, 10, 20, ... tokens, or with the seeds given by name."""
    runs = {seed: values for seed, values in ({"0": losses} | seeds).items() if values is not None}
    made = {
        seed: {"curve": {"tokens": tokens or [10 * i for i in range(len(values))], "val_loss": values}}
        for seed, values in runs.items()
    }
    finals = [values[-1] for values in runs.values()]
    return {
        "architecture": architecture,
        "final_val_loss": sum(finals) / len(finals),
        "tokens_per_second": rate,
        "seeds": made,
    }


class TestTokensToReach:
    def test_interpolates_between_evaluations(self):
        assert curves.tokens_to_reach([0, 100, 300], [5.0, 3.0, 2.0], 2.25) == pytest.approx(250.0)

    def test_an_evaluation_itself_is_exact(self):
        assert curves.tokens_to_reach([0, 100, 300], [5.0, 3.0, 2.0], 3.0) == 100
        assert curves.tokens_to_reach([0, 100, 300], [5.0, 3.0, 2.0], 2.0) == 300

    def test_the_start_may_be_low_enough(self):
        assert curves.tokens_to_reach([7, 100], [5.0, 3.0], 6.0) == 7

    def test_never(self):
        assert curves.tokens_to_reach([0, 100], [5.0, 3.0], 2.999) is None
        assert curves.tokens_to_reach([], [], 2.0) is None

    def test_the_first_crossing_counts_though_the_curve_rises_again(self):
        assert curves.tokens_to_reach([0, 10, 20, 30], [4.0, 2.0, 5.0, 1.0], 2.5) == pytest.approx(7.5)

    def test_after_a_rise_the_crossing_lies_on_the_segment_that_falls(self):
        # 1.5 is first met on the way from 5.0 to 1.0, not on a line drawn from the earlier minimum 2.0.
        assert curves.tokens_to_reach([0, 10, 20, 30], [4.0, 2.0, 5.0, 1.0], 1.5) == pytest.approx(28.75)

    def test_an_unmeasured_evaluation_is_left_out(self):
        expected = curves.tokens_to_reach([0, 20], [4.0, 2.0], 3.0)
        for missing in (None, math.nan, math.inf):
            assert curves.tokens_to_reach([0, 10, 20], [4.0, missing, 2.0], 3.0) == expected

    def test_refuses_what_is_not_a_curve(self):
        with pytest.raises(ValueError, match="one loss per x; received 2 x and 1 losses"):
            curves.tokens_to_reach([0, 1], [1.0], 1.0)
        with pytest.raises(ValueError, match="must increase; received 10 followed by 10"):
            curves.tokens_to_reach([0, 10, 10], [3.0, 2.0, 1.0], 1.0)
        with pytest.raises(ValueError, match="finite"):
            curves.tokens_to_reach([0, 10], [3.0, 2.0], math.nan)

    @given(st.lists(LOSSES, min_size=2, max_size=12), LOSSES)
    def test_agrees_with_a_dense_walk_along_the_curve(self, losses, target):
        """The truth by brute force: walk along the interpolated curve, stop at the first point low enough."""
        steps = 512  # a power of two: with LOSSES the walk is exact, and needs no tolerance
        walked = None
        for i in range((len(losses) - 1) * steps + 1):
            k, part = divmod(i, steps)
            here = losses[k] + (losses[min(k + 1, len(losses) - 1)] - losses[k]) * part / steps
            if here <= target:
                walked = i / steps
                break
        reached = curves.tokens_to_reach(list(range(len(losses))), losses, target)
        if walked is None:
            assert reached is None
        else:
            assert walked - 1 / steps < reached <= walked + 1e-9

    @given(st.lists(LOSSES, min_size=2, max_size=12), LOSSES, LOSSES)
    def test_a_lower_loss_never_takes_fewer_tokens(self, losses, a, b):
        xs = list(range(len(losses)))
        high, low = (curves.tokens_to_reach(xs, losses, t) for t in (max(a, b), min(a, b)))
        assert low is None or (high is not None and high <= low)


class TestMeanCurve:
    def test_mean_and_range_over_seeds(self):
        made = curves.mean_curve(arm([4.0, 2.0, 1.0], s1=[6.0, 2.5, 1.5]))
        assert made == {
            "tokens": [0, 10, 20],
            "val_loss": [5.0, 2.25, 1.25],
            "low": [4.0, 2.0, 1.0],
            "high": [6.0, 2.5, 1.5],
            "num_seeds": 2,
        }

    def test_only_evaluations_that_all_seeds_have(self):
        made = curves.mean_curve(arm([4.0, 2.0, None, 1.0], s1=[6.0, 2.5, 9.0, 1.5]) | {"final_val_loss": 1.25})
        assert made["tokens"] == [0, 10, 30]
        assert made["val_loss"] == [5.0, 2.25, 1.25]

    def test_no_seeds(self):
        assert curves.mean_curve({"seeds": {}})["tokens"] == []


def test_running_minimum():
    assert curves.running_minimum([3.0, 2.0, 2.5, 1.0]) == [3.0, 2.0, 2.0, 1.0]
    assert curves.running_minimum([]) == []


def test_best_gpt_arm_is_the_lowest_gpt_and_never_the_sphere():
    arms = {"a": arm([5, 1.3]), "b": arm([5, 1.2]), "ngpt": arm([5, 1.0], architecture="ngpt")}
    assert curves.best_gpt_arm(arms) == "b"
    arms["b"]["final_val_loss"] = math.nan
    assert curves.best_gpt_arm(arms) == "a"
    assert curves.best_gpt_arm({"ngpt": arms["ngpt"]}) is None


class TestRatioCurve:
    def arms(self):
        # ngpt's curve is the GPT's with half the tokens; it trains at 80% of the GPT's tokens per second.
        losses = [5.0, 3.0, 2.0, 1.5, 1.25]
        return {
            "gpt": arm(losses, tokens=[0, 10, 20, 30, 40], rate=100.0),
            "ngpt": arm(losses, tokens=[0, 5, 10, 15, 20], rate=80.0, architecture="ngpt"),
        }

    def test_a_curve_with_half_the_tokens_has_ratio_one_half_everywhere(self):
        made = curves.ratio_curve(self.arms(), "gpt")
        assert made["loss"] == [3.0, 2.0, 1.5, 1.25]
        assert made["tokens"] == pytest.approx([10, 20, 30, 40])
        assert made["seconds"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert made["arms"]["ngpt"]["tokens_ratio"] == pytest.approx([0.5] * 4)
        assert made["arms"]["ngpt"]["seconds_ratio"] == pytest.approx([0.625] * 4)
        assert made["arms"]["ngpt"]["lowest_loss"] == 1.25
        assert "gpt" not in made["arms"]

    def test_levels_are_the_evaluations_of_all_arms_within_the_best_gpt_arms_range(self):
        arms = self.arms()
        arms["ngpt"]["seeds"]["0"]["curve"]["val_loss"] = [5.0, 3.5, 2.5, 1.4, 1.0]
        made = curves.ratio_curve(arms, "gpt")
        assert made["loss"] == [3.0, 2.5, 2.0, 1.5, 1.4, 1.25]
        assert made["arms"]["ngpt"]["tokens_ratio"][1] == pytest.approx(10 / 15)

    def test_what_is_reached_before_the_first_evaluation_has_no_ratio(self):
        """There the crossing would lie on a straight line from the untrained model."""
        arms = self.arms()
        arms["ngpt"]["seeds"]["0"]["curve"]["val_loss"] = [5.0, 2.5, 2.0, 1.4, 1.0]
        made = curves.ratio_curve(arms, "gpt")
        assert made["loss"][:3] == [3.0, 2.5, 2.0]
        assert made["arms"]["ngpt"]["tokens_ratio"][:3] == [None, pytest.approx(5 / 15), pytest.approx(0.5)]

    def test_what_is_never_reached_has_no_ratio(self):
        arms = self.arms()
        arms["ngpt"]["seeds"]["0"]["curve"]["val_loss"] = [5.0, 3.0, 2.0, 1.8, 1.75]
        made = curves.ratio_curve(arms, "gpt")
        reached = dict(zip(made["loss"], made["arms"]["ngpt"]["tokens_ratio"], strict=True))
        assert reached[1.5] is None and reached[1.25] is None and reached[1.75] is not None
        assert made["arms"]["ngpt"]["lowest_loss"] == 1.75

    def test_without_timing_there_are_tokens_but_no_seconds(self):
        arms = self.arms()
        arms["ngpt"]["tokens_per_second"] = None
        made = curves.ratio_curve(arms, "gpt")["arms"]["ngpt"]
        assert made["seconds_ratio"] == [None] * 4 and None not in made["tokens_ratio"]

    def test_nothing_to_divide_by(self):
        assert curves.ratio_curve(self.arms(), None)["loss"] == []
        untrained = self.arms() | {"gpt": arm([5.0])}
        assert curves.ratio_curve(untrained, "gpt")["loss"] == []


class TestHeadlineRatios:
    def test_ratio_at_the_best_gpt_arms_final_loss(self):
        arms = {
            "gpt": arm([5.0, 3.0, 2.0], rate=100.0),
            "ngpt": arm([5.0, 2.5, 1.5], rate=80.0, architecture="ngpt"),
        }
        made = curves.headline_ratios(arms, "gpt")
        # ngpt is at 2.0 half way from 10 to 20 tokens; gpt at 20.
        assert made["target_loss"] == 2.0
        assert made["tokens_ratio"] == pytest.approx(15 / 20)
        assert made["seconds_ratio"] == pytest.approx((15 / 80) / (20 / 100))
        assert made["tokens_ratio_by_seed"] == {"0": pytest.approx(0.75)}
        assert made["tokens_ratio_reason"] is None and made["seconds_ratio_reason"] is None
        assert made["reverse_tokens_ratio"] is None

    def test_both_arms_are_read_by_the_same_rule(self):
        """Where the best GPT arm's loss rose again, its own first crossing counts too."""
        arms = {
            "gpt": arm([5.0, 3.0, 2.0, 2.5]),
            "ngpt": arm([5.0, 2.5, 1.5, 1.5], architecture="ngpt"),
        }
        assert curves.headline_ratios(arms, "gpt")["tokens_ratio"] == pytest.approx(10 / 15)

    def test_never_reached_says_so_and_gives_the_reverse(self):
        arms = {
            "gpt": arm([5.0, 2.5, 1.5], rate=100.0),
            "ngpt": arm([5.0, 3.0, 2.0], rate=80.0, architecture="ngpt"),
        }
        made = curves.headline_ratios(arms, "gpt")
        assert made["tokens_ratio"] is None and made["seconds_ratio"] is None
        assert made["tokens_ratio_reason"] == (
            "ngpt never reaches gpt's final loss 1.5000 in 20 tokens (its lowest is 2.0000)"
        )
        assert made["seconds_ratio_reason"] == made["tokens_ratio_reason"]
        assert made["reverse_tokens_ratio"] == pytest.approx(0.75)
        assert made["reverse_seconds_ratio"] == pytest.approx((15 / 100) / (20 / 80))

    def test_by_seed_each_pair_has_its_own_target(self):
        arms = {
            "gpt": arm([5.0, 3.0, 2.0], s1=[5.0, 3.0, 1.0]),
            "ngpt": arm([5.0, 2.0, 1.0], s1=[5.0, 2.0, 1.5], architecture="ngpt"),
        }
        assert curves.headline_ratios(arms, "gpt")["tokens_ratio_by_seed"] == {"0": 0.5, "s1": None}

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda arms: arms.pop("ngpt"), "no arm 'ngpt'"),
            (lambda arms: arms["ngpt"].update(seeds={}), "ngpt has no validation curve"),
            (lambda arms: arms["gpt"].update(seeds={}), "gpt has no validation curve"),
            (
                lambda arms: arms["gpt"]["seeds"].update({"0": arm([1.0])["seeds"]["0"]}),
                "nothing to divide by",
            ),
        ],
    )
    def test_no_answer_has_its_reason(self, change, reason):
        arms = {"gpt": arm([5.0, 2.0]), "ngpt": arm([5.0, 1.0], architecture="ngpt")}
        change(arms)
        made = curves.headline_ratios(arms, "gpt")
        assert made["tokens_ratio"] is None and reason in made["tokens_ratio_reason"]
        assert made["seconds_ratio"] is None and reason in made["seconds_ratio_reason"]

    def test_no_gpt_arm_and_no_timing(self):
        arms = {"ngpt": arm([5.0, 1.0], architecture="ngpt")}
        assert "no GPT arm" in curves.headline_ratios(arms, None)["tokens_ratio_reason"]
        arms["gpt"] = arm([5.0, 2.0], rate=None)
        made = curves.headline_ratios(arms, "gpt")
        assert made["tokens_ratio"] == pytest.approx(0.75)
        assert made["seconds_ratio"] is None and "not measured" in made["seconds_ratio_reason"]

    def test_the_end_of_the_ratio_curve_is_the_headline(self):
        made = summaries.summary(seeds=3)
        ratios = made["ratio_curve"]["arms"]["ngpt"]
        assert ratios["tokens_ratio"][-1] == pytest.approx(made["tokens_ratio"], rel=1e-12)
        assert ratios["seconds_ratio"][-1] == pytest.approx(made["seconds_ratio"], rel=1e-12)
        assert 0.4 < made["tokens_ratio"] < 0.95
