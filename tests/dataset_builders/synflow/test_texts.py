"""Raw captions: what describes is kept without its wrapping, and all else is dropped for its own reason."""

import pytest

from dataset_builders.synflow.texts import count_words, rectify, why_not_descriptive


@pytest.mark.parametrize(
    "raw, text",
    [
        ("Watch this: a red star moves left !!", "a red star moves left"),
        ("a red star moves left (official clip)", "a red star moves left"),
        ("new video a red star moves left subscribe", "a red star moves left"),
        ("A dog runs https://t.co/x #dog @dogs &amp; barks \U0001f436", "A dog runs barks"),
        ("<b>Two cats</b> play", "Two cats play"),
    ],
)
def test_wrapping_is_taken_off(raw, text):
    assert rectify(raw) == text
    assert why_not_descriptive(raw, 3, "en") is None


@pytest.mark.parametrize(
    "raw, reason",
    [
        ("", "text_empty"),
        ("  \n", "text_empty"),
        ("dog", "text_too_short"),
        ("IMG_2041.MOV", "text_file_name"),
        ("final_v2.mp4", "text_file_name"),
        ("https://example.com/watch?v=1", "text_url"),
        ("#cat #dog #fun", "text_hashtags"),
        ("Subscribe to my channel for more videos!!", "text_boilerplate"),
        ("Please like, share and subscribe, click the bell below", "text_boilerplate"),
        ("Directed by John Smith. Music by Jane Doe", "text_credits"),
        ("cat cat cat cat cat cat cat cat cat", "text_repetitive"),
        ("une étoile rouge glisse vers la gauche dans la forêt", "text_language"),
        ("собака бежит по пляжу с мячом", "text_language"),
    ],
)
def test_what_describes_nothing_is_dropped_for_its_reason(raw, reason):
    assert why_not_descriptive(raw, 3, "en") == reason


@pytest.mark.parametrize("raw", ["A man cooks pasta in a kitchen", "timelapse of Tokyo at night", "a red star"])
def test_descriptions_are_kept(raw):
    assert why_not_descriptive(raw, 3, "en") is None


def test_other_languages_are_kept_where_the_recipe_takes_all():
    assert why_not_descriptive("une étoile rouge glisse vers la gauche", 3, None) is None


def test_words_are_what_blanks_part():
    assert count_words("a two-year-old, smiling") == 3
