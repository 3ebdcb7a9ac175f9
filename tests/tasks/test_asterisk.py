"""Asterisk's prompts: transcripts, choices of like length, and the clips themselves where the package is at hand."""

from __future__ import annotations

from collections import Counter

import numpy as np

from loraloom.tasks.asterisk import near, transcripts


def test_transcripts_are_plain_words():
    text = "; Prompts\n\nhello: Hello  there.\ndir/one: One, two: three...\nbeep: [a tone]\nnothing:   \nno colon\n"
    assert transcripts(text) == {"hello": "hello there", "dir/one": "one, two: three"}


def test_neither_order_nor_length_tells_the_right_choice():
    texts = sorted((f"{'ab'[i % 2] * (i // 7)} {i}" for i in range(400)), key=len)
    places, ranks = Counter(), Counter()
    for at, text in enumerate(texts[4:-4], start=4):
        choices = near(texts, at)
        assert len(set(choices)) == 4 and text in choices and list(choices) == sorted(choices)
        places[choices.index(text)] += 1
        ranks[sorted(range(4), key=lambda i: texts.index(choices[i])).index(choices.index(text))] += 1
    assert min(places.values()) > 60 and min(ranks.values()) > 60
    assert near(texts, 0)[0] in texts[:4] and near(texts, len(texts) - 1)
    assert set(near(texts, 0)) == set(texts[:4]) and set(near(texts, 399)) == set(texts[-4:])


def test_a_clip_becomes_16_khz(tmp_path):
    from scipy.io import wavfile

    from loraloom.tasks.asterisk import _samples

    tone = (np.sin(np.arange(8000) * 2 * np.pi * 300 / 8000) * 16000).astype(np.int16)
    wavfile.write(tmp_path / "clip.wav", 8000, tone)
    samples = _samples(tmp_path / "clip.wav")
    expected = np.sin(np.arange(16000) * 2 * np.pi * 300 / 16000) * 16000 / 2**15
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples[200:-200], expected[200:-200], atol=2e-3)
