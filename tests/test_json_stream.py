from __future__ import annotations

import json

import pytest
from feature_files import write_items
from hypothesis import given, settings
from hypothesis import strategies as st

from files import json_stream
from files.atomic_io import DataError
from files.features import load_features
from files.json_stream import read_pairs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object; .* empty"),
        ("[1]", ""),
        ('{"1": {"100": 1}', "truncated or not JSON"),
        ('{"1": {"100": 1},}', ""),
        ('{"1" {}}', ""),
        ('{1: {"100": 1}}', ""),
        ('{"1": {}} x', ""),
        ('{"1": {}}{', ""),
        ('{"1": {"100": "abc', "truncated or not JSON"),
        ('{"1": {"100": ' + "9" * 5000 + "}}", "Exceeds the limit"),
        ("[" * 100_000, ""),
        ('{"1": ' + "[" * 100_000, "recursion"),
    ],
)
def test_broken_json_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(DataError, match=rf"item_feat_dict\.json: .*{message}"):
        load_features(write_items(tmp_path, text), "item", 5)


def test_a_broken_file_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "BLOCK", 10)
    monkeypatch.setattr(json_stream, "LONGEST_PAIR", 100)
    path, pair, parsed = tmp_path / "broken.json", json_stream._pair, []
    path.write_text('{"1": {"100": 1,}, ' + '"2": {"100": 1}, ' * 1000)

    def recorded(text: str, at: int):
        parsed.append(len(text))
        return pair(text, at)

    monkeypatch.setattr(json_stream, "_pair", recorded)
    with pytest.raises(DataError, match="truncated or not JSON"):
        list(read_pairs(path))
    assert 50 < max(parsed) <= 110


@pytest.mark.parametrize("raw", [b'{"1": {"100": "\xff"}}', '{"1": {}}'.encode("utf-16")])
def test_text_that_is_not_utf8_is_refused_by_name(tmp_path, raw):
    (write_items(tmp_path) / "item_feat_dict.json").write_bytes(raw)
    with pytest.raises(DataError, match=r"item_feat_dict\.json"):
        load_features(tmp_path, "item", 5)


def test_a_folder_in_place_of_a_file_is_refused_by_name(tmp_path):
    (write_items(tmp_path) / "item_feat_dict.json").unlink()
    (tmp_path / "item_feat_dict.json").mkdir()
    with pytest.raises(DataError, match=r"item_feat_dict\.json: cannot be read"):
        load_features(tmp_path, "item", 5)


def test_a_byte_order_mark_is_accepted(tmp_path):
    (write_items(tmp_path) / "item_feat_dict.json").write_bytes(b'\xef\xbb\xbf{"1": {"100": 4}}')
    assert load_features(tmp_path, "item", 1)["100"].values.tolist() == [0, 4]


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    value=st.dictionaries(st.text(max_size=5), NESTED, max_size=6),
    block=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3, "\t"]),
    separators=st.sampled_from([(",", ":"), (" ,\n", "  :\r\n\t"), (", ", ": ")]),
)
def test_streaming_yields_what_json_load_does(
    tmp_path_factory, value, block, ascii_only, indent, separators
):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent, separators=separators)
    path.write_text(f" \n{text}\t", encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "BLOCK", block + 3)  # the head `\s*{\s*}` is read at once
        found = list(read_pairs(path))
    assert found == list(json.loads(text).items())
