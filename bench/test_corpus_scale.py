"""The bench of large corpora, on a small one."""

import warnings

import corpus_scale
from ekfac_fast.errors import Notice


def test_every_step_is_measured(tmp_path):
    corpus_scale.write(tmp_path, 300, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        found = corpus_scale.measured(tmp_path)
    assert [*found][1:4] == ["open", "check and fingerprint", "plan"]
    assert [x.split()[0] for x in found][-2:] == ["100", "TF-IDF:"]
    for row in found.values():
        assert row["seconds"] >= 0
        assert 0 < row["own"] <= row["with files"]
