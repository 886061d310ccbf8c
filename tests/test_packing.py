"""SFT packing: which samples share a row, and what a batch of rows holds."""

import gzip
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_flashmask.paddlenlp import (
    PackedDataset,
    PackingCollator,
    encode_pair,
    pack_lengths,
    read_pairs,
    read_preferences,
)
from paddle_flashmask.paddlenlp.packing import IGNORE

lengths_and_room = st.integers(1, 64).flatmap(
    lambda room: st.tuples(st.lists(st.integers(1, room), max_size=60), st.just(room))
)


def sample(*tokens, labels=None):
    return {"input_ids": list(tokens), "labels": list(tokens if labels is None else labels)}


class TestPackLengths:
    @pytest.mark.parametrize("strategy", ["greedy", "in_order"])
    @given(case=lengths_and_room)
    def test_every_sample_once_and_no_row_too_long(self, strategy, case):
        lengths, room = case
        rows = pack_lengths(lengths, room, strategy)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[index] for index in row) <= room for row in rows)
        assert all(row == sorted(row) for row in rows)

    @given(case=lengths_and_room)
    def test_greedy_is_within_its_bound(self, case):
        # Best fit opens a row only for a sample that fits in none, so at most one row is half full or less.
        lengths, room = case
        rows = pack_lengths(lengths, room, "greedy")
        used = sorted(sum(lengths[index] for index in row) for row in rows)
        assert all(tokens > room / 2 for tokens in used[1:])

    def test_in_order(self):
        assert pack_lengths([5, 5, 1, 10, 3], 10, "in_order") == [[0, 1], [2], [3], [4]]

    def test_greedy(self):
        assert pack_lengths([6, 7, 4, 3, 1, 9], 10, "greedy") == [[0, 2], [1, 3], [4, 5]]
        assert pack_lengths([6, 7, 1, 10, 3, 3, 4], 10, "greedy") == [[0, 4], [1, 2], [3], [5, 6]]

    def test_nothing(self):
        assert pack_lengths([], 10) == []

    def test_a_million_tokens_take_no_time(self):
        random = np.random.default_rng(0)
        lengths = random.integers(1, 2048, 20_000)
        rows = pack_lengths(lengths, 2048)
        assert len(rows) <= 1.03 * lengths.sum() / 2048

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (([1, 11], 10), ValueError, r"lengths\[1\]=11"),
            (([0], 10), ValueError, r"lengths\[0\]=0"),
            (([[1]], 10), TypeError, r"lengths must be a list of integers, got int64 of shape \[1, 1\]"),
            (([3, 2.7], 10), TypeError, "lengths must be a list of integers, got float64"),
            ((np.array([3.0, 2.0]), 10), TypeError, "lengths must be a list of integers, got float64"),
            (([True, False], 10), TypeError, "lengths must be a list of integers, got bool"),
            ((["3"], 10), TypeError, "lengths must be a list of integers, got"),
            (([2**63], 10), ValueError, rf"lengths\[0\]={2**63}"),
            (([1], 0), ValueError, "max_length must be at least 1, got 0"),
            (([1], 2.5), TypeError, "max_length must be an integer, got float"),
            (([1], 10, "best"), ValueError, "strategy must be one of greedy, in_order, got 'best'"),
        ],
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            pack_lengths(*arguments)


class TestPackedDataset:
    def test_row(self):
        dataset = PackedDataset([sample(1, 2, 3), sample(4, 5, labels=[IGNORE, 6]), sample(7, 8, 9)], 6, "in_order")
        assert len(dataset) == 2
        row = dataset[0]
        assert row["input_ids"].tolist() == [1, 2, 3, 4, 5]
        assert row["labels"].tolist() == [1, 2, 3, IGNORE, 6]
        assert row["position_ids"].tolist() == [0, 1, 2, 0, 1]
        assert row["lengths"].tolist() == [3, 2]

    def test_too_long_raises(self):
        with pytest.raises(ValueError, match=r"samples\[1\] has 5 tokens, more than max_length=4"):
            PackedDataset([sample(1, 2), sample(1, 2, 3, 4, 5)], 4)

    def test_too_long_is_skipped_counted_and_logged(self, caplog):
        with caplog.at_level(logging.WARNING):
            dataset = PackedDataset([sample(1, 2), sample(*range(9)), sample(*range(7)), sample(3)], 4, too_long="skip")
        assert dataset.skipped == 2
        assert dataset.stats().samples == 2
        assert "skipped 2 of 4 samples" in caplog.text
        assert "longest has 9 tokens" in caplog.text
        assert sorted(dataset[0]["input_ids"].tolist()) == [1, 2, 3]

    def test_stats(self):
        stats = PackedDataset([sample(1, 2, 3), sample(4, 5)], 10).stats()
        assert (stats.samples, stats.skipped, stats.rows, stats.tokens) == (2, 0, 1, 5)
        assert stats.fill == pytest.approx(0.5)
        assert stats.attended == pytest.approx((6 + 3) / 100)

    def test_stats_in_words(self):
        stats = PackedDataset([sample(*range(n)) for n in (3, 9, 4, 2, 8)], 8, too_long="skip").stats()
        assert str(stats) == (
            "4 samples (1 were too long); tokens shortest/median/longest: 2/3/8\n"
            "3 rows of 8 tokens, 70.8% filled; the mask skips 71.4% of the scores"
        )

    @pytest.mark.parametrize(
        ("samples", "error", "message"),
        [
            ([], ValueError, "at least one sample"),
            ([sample(1), sample()], ValueError, r"samples\[1\] has no tokens"),
            (
                [sample(1, 2, labels=[1])],
                ValueError,
                r"samples\[0\] must have as many labels as input_ids, got 1 and 2",
            ),
            ([sample(1, 2, labels=[IGNORE] * 2)], ValueError, r"samples\[0\] has nothing to learn"),
            ([{"input_ids": [1]}], TypeError, r"samples\[0\] must be a mapping with input_ids and labels"),
            ([[1, 2]], TypeError, r"samples\[0\] must be a mapping.*got list"),
            ([sample(1.5)], TypeError, r"samples\[0\]\['input_ids'\] must be a list of integers"),
            ([sample([1], [2, 3])], TypeError, r"samples\[0\]\['input_ids'\] must be a list of integers, got list"),
            ([sample(None)], TypeError, r"samples\[0\]\['input_ids'\] must be a list of integers, got object"),
            ([sample(2**63)], ValueError, rf"\[0\]\['input_ids'\] must be token ids .* got {2**63} at place 0"),
            ([sample(1, 2**64)], TypeError, r"samples\[0\]\['input_ids'\] must be a list of integers, got object"),
            ([sample(2**31)], ValueError, rf"\['input_ids'\] must be token ids from 0 to 2\*\*31 - 1; got {2**31} at"),
            (
                [sample(1), sample(1, -5)],
                ValueError,
                r"\[1\]\['input_ids'\] must be token ids .* got -5 at place 1",
            ),
            ([sample(1, labels=[-1])], ValueError, r"\['labels'\] must be token ids .*, or -100; got -1 at place 0"),
            ([sample([1, 2])], TypeError, r"samples\[0\]\['input_ids'\] must be a list of integers"),
        ],
    )
    def test_bad_samples(self, samples, error, message):
        with pytest.raises(error, match=message):
            PackedDataset(samples, 8)

    def test_bad_strategy_is_told_before_the_samples_are_made(self):
        with pytest.raises(ValueError, match="strategy must be one of greedy, in_order, got 'gredy'"):
            PackedDataset((pytest.fail("a sample was made") for _ in range(1)), 8, strategy="gredy")

    def test_bad_too_long(self):
        with pytest.raises(ValueError, match="too_long must be one of error, skip"):
            PackedDataset([sample(1)], 8, too_long="truncate")


class TestPackingCollator:
    rows = PackedDataset([sample(1, 2, 3), sample(4, 5), sample(6, 7, 8, 9)], 5, "in_order")

    def test_flashmask_batch(self):
        batch = PackingCollator(7, pad_token_id=99)([self.rows[0], self.rows[1]])
        assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
            "input_ids": (np.int64, (2, 7)),
            "labels": (np.int64, (2, 7)),
            "position_ids": (np.int64, (2, 7)),
            "attn_mask_startend_row_indices": (np.int32, (2, 1, 7)),
        }
        assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 99, 99], [6, 7, 8, 9, 99, 99, 99]]
        assert batch["labels"].tolist() == [[1, 2, 3, 4, 5, IGNORE, IGNORE], [6, 7, 8, 9, IGNORE, IGNORE, IGNORE]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 0, 0, 0]]
        assert batch["attn_mask_startend_row_indices"].tolist() == [[[3, 3, 3, 5, 5, 0, 0]], [[4, 4, 4, 4, 0, 0, 0]]]

    @given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), padding=st.integers(0, 5))
    def test_both_masks_say_the_same(self, lengths, padding):
        room = sum(lengths) + padding
        dataset = PackedDataset([sample(*range(1, n + 1)) for n in lengths], room, "in_order")
        sparse = PackingCollator(room, mask="flashmask")([dataset[0]])
        dense = PackingCollator(room, mask="dense")([dataset[0]])
        for key in ("input_ids", "labels", "position_ids"):
            np.testing.assert_array_equal(sparse[key], dense[key])
        i, j = np.arange(room)[:, None], np.arange(room)[None, :]
        allowed = (j <= i) & (i < sparse["attn_mask_startend_row_indices"][0, 0][None, :])
        assert dense["attention_mask"].dtype == bool
        np.testing.assert_array_equal(dense["attention_mask"][0, 0], allowed)
        document = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), np.full(padding, -1)])
        np.testing.assert_array_equal(allowed, (j <= i) & (document[:, None] == document[None, :]) & (document >= 0))

    def test_same_rows_as_paddlenlp_zero_padding(self):
        zero_padding = pytest.importorskip("paddlenlp.datasets.zero_padding_dataset").ZeroPaddingMapDataset
        features = []
        for tokens in ([1, 2, 3], [4, 5], [6, 7, 8, 9]):
            n = len(tokens)
            features.append(
                {**sample(*tokens), "position_ids": list(range(n)), "attn_mask_startend_row_indices": [n] * n}
            )
        theirs = zero_padding(features, None, 5)
        batch = PackingCollator(5)([self.rows[0], self.rows[1]])
        for index in range(2):
            used = len(theirs[index]["input_ids"])
            for key in ("input_ids", "labels", "position_ids"):
                assert batch[key][index, :used].tolist() == theirs[index][key]
            assert (
                batch["attn_mask_startend_row_indices"][index, 0, :used].tolist()
                == (theirs[index]["attn_mask_startend_row_indices"])
            )

    def test_errors(self):
        with pytest.raises(ValueError, match=r"rows\[0\] has 5 tokens, more than max_length=4"):
            PackingCollator(4)([self.rows[0]])
        with pytest.raises(ValueError, match="at least one row"):
            PackingCollator(4)([])
        with pytest.raises(ValueError, match="mask must be one of flashmask, dense, got 'sparse'"):
            PackingCollator(4, mask="sparse")
        with pytest.raises(TypeError, match=r"pad_token_id must be an integer, got NoneType.*tokenizer\.eos_token_id"):
            PackingCollator(4, pad_token_id=None)
        with pytest.raises(TypeError, match=r"pad_token_id must be an integer, got str$"):
            PackingCollator(4, pad_token_id="<pad>")
        for wrong in (-1, 2**31):
            with pytest.raises(ValueError, match=rf"pad_token_id must be a token id .*, got {wrong}\. .*eos_token_id"):
                PackingCollator(4, pad_token_id=wrong)
        with pytest.raises(ValueError, match="max_length must be at least 1"):
            PackingCollator(0)

    def test_rows_of_something_else(self):
        row = dict(self.rows[0])
        del row["position_ids"]
        with pytest.raises(TypeError, match=r"rows\[1\] must be a row of PackedDataset, with position_ids; got \["):
            PackingCollator(7)([self.rows[0], row])
        with pytest.raises(TypeError, match=r"rows\[0\] must be a row of PackedDataset, with .*lengths; got list"):
            PackingCollator(7)([[1, 2]])

    @pytest.mark.parametrize("mask", ["flashmask", "dense"])
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"lengths": [3, 1]},
                ValueError,
                r"'lengths'\] must .* the row's 5 tokens, got \[3, 1\], in all 4",
            ),
            ({"lengths": [3, 3]}, ValueError, r"'lengths'\] must .* got \[3, 3\], in all 6"),
            ({"lengths": [6, -1]}, ValueError, r"'lengths'\] must be at least 1 each .* got \[6, -1\]"),
            ({"lengths": [5, 0]}, ValueError, r"'lengths'\] must be at least 1 each .* got \[5, 0\]"),
            ({"lengths": [3.0, 2.0]}, TypeError, r"'lengths'\] must be a list of integers, got float64"),
            ({"labels": [7]}, ValueError, r"'labels'\] must have as many as the 5 input_ids, got 1"),
            ({"labels": [7.5] * 5}, TypeError, r"'labels'\] must be a list of integers, got float64 of shape \[5\]"),
            ({"labels": [[7] * 5]}, TypeError, r"'labels'\] must be a list of integers, got int64 of shape \[1, 5\]"),
            ({"position_ids": range(6)}, ValueError, r"'position_ids'\] must have as many as the 5 input_ids, got 6"),
            ({"input_ids": [[1], [2, 3]]}, TypeError, r"'input_ids'\] must be a list of integers, got list"),
            ({"input_ids": None}, TypeError, r"'input_ids'\] must be a list of integers, got object"),
        ],
    )
    def test_rows_that_do_not_add_up(self, mask, change, error, message):
        with pytest.raises(error, match=r"rows\[1\]\[" + message):
            PackingCollator(7, mask=mask)([self.rows[0], {**self.rows[0], **change}])

    @pytest.mark.parametrize("mask", ["flashmask", "dense"])
    @pytest.mark.parametrize("make", [np.ndarray.tolist, lambda array: array.astype(np.uint64)])
    def test_rows_of_other_integers(self, make, mask):
        row = {key: make(value) for key, value in self.rows[0].items()}
        expected = PackingCollator(7, mask=mask)([self.rows[0]])
        for key, value in PackingCollator(7, mask=mask)([row]).items():
            np.testing.assert_array_equal(value, expected[key])

    def test_a_dense_mask_that_the_environment_drops(self, monkeypatch):
        monkeypatch.setenv("USE_CASUAL_MASK", "True")
        with pytest.raises(ValueError, match=r'mask="dense" with USE_CASUAL_MASK=True.*Unset USE_CASUAL_MASK'):
            PackingCollator(7, mask="dense")
        PackingCollator(7)
        monkeypatch.setenv("USE_CASUAL_MASK", "False")
        PackingCollator(7, mask="dense")


class Tokenizer:
    """One token per character, 1 before and (if `closes`) 2 after a text with special tokens."""

    eos_token_id = 2

    def __init__(self, closes=False):
        self.closes = closes

    def __call__(self, text, add_special_tokens):
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *ids, *([2] if self.closes else [])] if add_special_tokens else ids}


class TestEncodePair:
    @pytest.mark.parametrize("closes", [False, True])
    def test_labels_are_the_next_tokens_of_the_answer(self, closes):
        got = encode_pair(Tokenizer(closes), "ab", "xy")
        a, b, x, y = map(ord, "abxy")
        assert got["input_ids"] == [1, a, b, x, y]
        assert got["labels"] == [IGNORE, IGNORE, x, y, 2]

    @pytest.mark.parametrize("closes", [False, True])
    @pytest.mark.parametrize(("prompt", "ids"), [("ab\x02", [97, 98, 2]), ("\x02", [2]), ("a\x02\x02", [97, 2, 2])])
    def test_an_eos_of_the_prompt_itself_stays(self, closes, prompt, ids):
        """A chat template may end a turn in it; see Qwen2's <|im_end|>."""
        assert encode_pair(Tokenizer(closes), prompt, "x")["input_ids"] == [1, *ids, ord("x")]
        turns = encode_pair(Tokenizer(closes), [prompt] * 2, ["x", "y"])
        assert turns["input_ids"] == [1, *ids, ord("x"), 2, *ids, ord("y")]

    @pytest.mark.parametrize(("prompt", "ids"), [("ab", [97, 98]), ("ab\x02", [97, 98, 2]), ("", [])])
    def test_an_eos_that_is_added_once(self, prompt, ids):
        """As T5's tokenizers do: none behind one that is there."""

        class Once(Tokenizer):
            def __call__(self, text, add_special_tokens):
                ids = super().__call__(text, add_special_tokens=False)["input_ids"]
                return {"input_ids": [1, *ids, *([2] if ids[-1:] != [2] else [])] if add_special_tokens else ids}

        assert encode_pair(Once(), prompt, "x")["input_ids"] == [1, *ids, ord("x")]

    @pytest.mark.parametrize("closes", [False, True])
    def test_one_token_for_begin_and_end(self, closes):
        class Same(Tokenizer):
            def __call__(self, text, add_special_tokens):
                ids = super().__call__(text, add_special_tokens)["input_ids"]
                return {"input_ids": [2, *ids[1:]] if add_special_tokens else ids}

        for prompt, ids in (("", []), ("\x02", [2]), ("a", [97]), ("a\x02", [97, 2])):
            assert encode_pair(Same(closes), prompt, "x")["input_ids"] == [2, *ids, ord("x")]

    def test_turns(self):
        a, x, b, y = map(ord, "axby")
        got = encode_pair(Tokenizer(), ["a", "b"], ["x", "y"])
        assert got["input_ids"] == [1, a, x, 2, b, y]
        assert got["labels"] == [IGNORE, x, 2, IGNORE, y, 2]

    def test_long_answers_are_whole(self):
        got = encode_pair(Tokenizer(), "a", "x" * 5000)
        assert len(got["labels"]) == 5002
        assert got["labels"][-2:] == [ord("x"), 2]

    @pytest.mark.parametrize(
        ("source", "target", "error", "message"),
        [
            ("a", "", ValueError, "target must not be empty, got '' in turn 0"),
            (["a", "b"], ["x"], ValueError, "equally many turns, at least 1; got 2 and 1"),
            ([], [], ValueError, "at least 1"),
            (None, "x", TypeError, "source"),
            ("a", ["x", "y\ud83d"], ValueError, "target must be Unicode text, got a lone surrogate at character 1"),
            ("a\udc80", "x", ValueError, "source must be Unicode text, got a lone surrogate at character 1"),
            ("a", [3], TypeError, "target must be a string or a list of strings, got a list with int"),
        ],
    )
    def test_bad_pairs(self, source, target, error, message):
        with pytest.raises(error, match=message):
            encode_pair(Tokenizer(), source, target)

    def test_tokenizer_without_eos(self):
        tokenizer = Tokenizer()
        tokenizer.eos_token_id = None
        with pytest.raises(ValueError, match="eos_token"):
            encode_pair(tokenizer, "a", "x")


class TestReadPairs:
    def read(self, tmp_path, *lines):
        path = tmp_path / "train.json"
        path.write_text("\n".join(lines), encoding="utf-8")
        return list(read_pairs(path))

    def test_strings_and_turns(self, tmp_path):
        got = self.read(tmp_path, '{"src": "a", "tgt": "ü"}', "", '{"src": ["b", "c"], "tgt": ["x", "y"], "more": 1}')
        assert got == [(["a"], ["ü"]), (["b", "c"], ["x", "y"])]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not JSON"),
            ("[1]", "expected an object.*got list"),
            ('{"src": "a"}', "tgt must be a string or a list of strings, got null"),
            ('{"src": [], "tgt": []}', "src must be a string or a list of strings"),
            ('{"src": [1], "tgt": "a"}', r"src must be a string or a list of strings, got \[1\]"),
            ('{"src": ["a", "b"], "tgt": ["x"]}', "src has 2 turns and tgt 1"),
            ('{"src": "a", "tgt": " "}', "tgt has an empty answer"),
            (r'{"src": "a", "tgt": ["b\ud83d"]}', "tgt must be Unicode text, got a lone surrogate at character 1"),
            pytest.param('{"src": "a", "tgt": ' + "1" * 5000 + "}", "not JSON .*4300 digits", id="digits"),
            pytest.param("[" * 100_000, "nested too deeply", id="nested"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path, line, message):
        with pytest.raises(ValueError, match=rf"train\.json, line 2: .*{message}"):
            self.read(tmp_path, '{"src": "a", "tgt": "b"}', line)

    @pytest.mark.parametrize("read", [read_pairs, read_preferences])
    @pytest.mark.parametrize(
        ("line", "byte"),
        [
            ('{"src": "你好"}'.encode("gbk"), "0xc4 at byte 9"),
            ('{"src": "a"}'.encode("utf-16"), "0xff at byte 0"),
            (gzip.compress(b"{}", mtime=0), "0x8b at byte 1"),
        ],
        ids=["gbk", "utf-16", "gzip"],
    )
    def test_what_is_not_utf8(self, tmp_path, read, line, byte):
        path = tmp_path / "train.json"
        path.write_bytes(b"\n\r\n" + line + b"\n")
        with pytest.raises(ValueError, match=rf"train\.json, line 3: not UTF-8 \(.*{byte}\)"):
            list(read(path))

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_ends_of_lines(self, tmp_path, end):
        """Unicode's other ones are part of a text."""
        path = tmp_path / "train.json"
        path.write_bytes(f'{{"src": "a\u2028b", "tgt": "c\x85"}}{end}{{"src": "d", "tgt": "e"}}{end}[]'.encode())
        read = read_pairs(path)
        assert [next(read), next(read)] == [(["a\u2028b"], ["c\x85"]), (["d"], ["e"])]
        with pytest.raises(ValueError, match=r"train\.json, line 3: expected an object"):
            next(read)

    def test_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "train.json"
        path.write_text('{"src": "a", "tgt": "b"}', encoding="utf-8-sig")
        with pytest.raises(ValueError, match=r"train\.json, line 1: not JSON .*BOM"):
            list(read_pairs(path))
