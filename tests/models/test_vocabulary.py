"""The layout of a vocabulary of text, tags and codes."""

from __future__ import annotations

import json

import pytest

from millrace.core.errors import UserError
from millrace.models.vocabulary import NOTHING, Vocabulary, tags

TAGS = {tag: 50 + number for number, tag in enumerate(tags(["image", "audio"]))}


def test_segments_lie_end_to_end_and_share_no_id() -> None:
    made = Vocabulary.lay_out(50, TAGS, {"image": 16, "audio": 12})
    segments = [set(made.segment(name)) for name in made.modalities] + [set(TAGS.values())]
    assert made.modalities == ["text", "image", "audio"]
    assert [len(segment) for segment in segments] == [50, 16, 12, 5]
    assert set.union(*segments) == set(range(83)) and made.size == 83
    assert NOTHING in made.tags


def test_tags_that_the_text_has_already_take_no_room() -> None:
    made = Vocabulary.lay_out(55, TAGS, {"image": 16, "audio": 12})
    assert made.codes["image"] == range(55, 71) and made.size == 83


def test_it_survives_a_file() -> None:
    made = Vocabulary.lay_out(50, TAGS, {"image": 16, "audio": 12})
    assert Vocabulary.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("codes", "why"),
    [
        ({"image": range(40, 60), "audio": range(60, 70)}, "codes of image have the ids 40 to 59, but ids below 55"),
        ({"image": range(60, 80), "audio": range(79, 90)}, "codes of audio have the ids 79 to 89, but ids below 80"),
        ({"image": range(60, 60)}, "codes of image"),
        ({"video": range(60, 70)}, r"has no tag <\|video\|>, <\|/video\|>"),
    ],
)
def test_what_overlaps_is_refused(codes: dict[str, range], why: str) -> None:
    with pytest.raises(UserError, match=why):
        Vocabulary(50, TAGS, codes)


def test_two_tags_of_one_id_are_refused() -> None:
    with pytest.raises(UserError, match="two tags have the same id"):
        Vocabulary(50, TAGS | {NOTHING: 50}, {})


def test_a_model_that_is_too_small_is_refused() -> None:
    made = Vocabulary.lay_out(50, TAGS, {"image": 16, "audio": 12})
    made.check_fits(83)
    with pytest.raises(UserError, match="55 ids, and with 16 codes of image, 12 codes of audio that is 83.*has 82"):
        made.check_fits(82)
