"""Preference data: the file format and its errors, tokens, packed rows, batches."""

import itertools
import json
import logging

import numpy as np
import pytest

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask import masks

GOOD = {"src": ["q"], "tgt": [], "response": ["better", "worse"], "sort": [1, 0]}
LENGTH = 40


class Characters:
    """One token a character, 1 at the start of a text, 2 as eos."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_read(tmp_path):
    several = {"src": ["q", "r"], "tgt": "a", "response": ["x", "y", "z"], "sort": [0, 2.5, 2.5]}
    file = write(tmp_path / "train.json", {**GOOD, "src": "q"}, "", several)
    first, second = flashmask_nlp.read_preferences(file)
    assert first == GOOD
    assert second == {**several, "tgt": ["a"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object with src, tgt, response and sort, got list"),
        ({"src": None}, "src must be a string or a list of strings, got null"),
        ({"src": ...}, "src must be a string or a list of strings, got nothing"),
        ({"src": []}, "src must have one turn more than tgt, got 0 and 0"),
        ({"tgt": ["a"]}, "src must have one turn more than tgt, got 1 and 1"),
        ({"src": ["q", "r"], "tgt": [" "]}, "tgt has an empty answer"),
        ({"response": "better"}, "response must be a list of strings"),
        ({"response": ...}, "response must be a list of strings, got nothing"),
        ({"response": ["better", 5]}, "response must be a list of strings"),
        ({"response": ["better"], "sort": [1]}, "response must hold 2 answers, got 1"),
        ({"response": ["a", "b", "c"], "sort": [1, 2, 3]}, "response must hold 2 answers, got 3"),
        ({"response": ["better", " \n"]}, "response has an empty answer, number 1"),
        ({"response": ["same", "same"]}, "the same answer twice"),
        ({"sort": [1]}, "sort must have a number for each response, got 1 for 2"),
        ({"sort": [1, 1]}, "sort must tell better from worse"),
        ({"sort": ["1", "0"]}, "sort must be a list of numbers"),
        ({"sort": [1, float("nan")]}, "sort must be a list of numbers"),
        ({"sort": [1, 10**400]}, "sort must be a list of numbers, got [1, 1000"),
        ({"sort": [1, True]}, "sort must be a list of numbers"),
        ({"response": ["x", "y\ud83d"]}, "response must be Unicode text, got a lone surrogate at character 1"),
        ({"src": ["\ud83d"]}, "src must be Unicode text, got a lone surrogate at character 0"),
        pytest.param(json.dumps(GOOD).replace("0", "1" * 5000), "not JSON (Exceeds the limit (4300", id="digits"),
        pytest.param("[" * 100_000, "nested too deeply", id="nested"),
        ({"sort": ...}, "sort must be a list of numbers, got null"),
    ],
)
def test_errors_name_file_and_line(tmp_path, change, message):
    record = change
    if isinstance(change, dict):
        record = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    file = write(tmp_path / "train.json", GOOD, "", record)
    with pytest.raises(ValueError, match=r"train\.json, line 3: .*") as caught:
        list(flashmask_nlp.read_preferences(file, responses=2))
    assert message in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        next(flashmask_nlp.read_preferences(tmp_path / "none.json"))


def test_encode():
    sample = {"src": ["ab", "c"], "tgt": ["d"], "response": ["w", "best", "z"], "sort": [0, 2, 0]}
    encoded = flashmask_nlp.encode_preference(Characters(), sample)
    a, b, c, d = map(ord, "abcd")
    assert encoded["prompt"] == [1, a, b, d, 2, c]
    assert encoded["responses"] == [[*map(ord, text), 2] for text in ("best", "w", "z")]
    assert encoded["sort"] == [2, 0, 0]


def test_an_eos_of_the_prompt_itself_stays():
    encoded = flashmask_nlp.encode_preference(Characters(), {**GOOD, "src": ["q\x02"]})
    assert encoded["prompt"] == [1, ord("q"), 2]


def test_encode_wants_eos():
    tokenizer = Characters()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="eos"):
        flashmask_nlp.encode_preference(tokenizer, GOOD)


def sample(prompt, *responses, start=10):
    """Tokens `start`, `start` + 1, ...: a prompt and answers of the given lengths, ranked as they come."""
    tokens = list(range(start, start + prompt + sum(responses)))
    cuts = np.cumsum([prompt, *responses])
    return {
        "prompt": tokens[:prompt],
        "responses": [tokens[a:b] for a, b in itertools.pairwise(cuts)],
        "sort": list(range(len(responses), 0, -1)),
    }


def batch(samples, task, mask, rows=None, **settings):
    dataset = flashmask_nlp.PreferenceDataset(samples, LENGTH, task, strategy="in_order", **settings)
    collator = flashmask_nlp.PreferenceCollator(LENGTH, task, pad_token_id=7, mask=mask)
    return collator([dataset[index] for index in range(len(dataset))][:rows])


def test_reward_batch():
    made = batch([sample(5, 3, 4, 2), sample(2, 6, 5, start=50), sample(9, 9, 20, start=100)], "reward", "flashmask")
    expected, _ = masks.share_question([[[5, 3, 4, 2], [2, 6, 5]], [[9, 9, 20]]], LENGTH)
    np.testing.assert_array_equal(made["attn_mask_startend_row_indices"], expected[..., 0])
    assert made["attn_mask_startend_row_indices"].dtype == np.int32
    assert made["input_ids"][0].tolist() == [*range(10, 24), *range(50, 63)] + [7] * 13
    first = [*range(5), 5, 6, 7, 5, 6, 7, 8, 5, 6]
    second = [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6]
    assert made["position_ids"][0].tolist() == first + second + [0] * 13
    # Row, last token, prompt in the batch.
    places = [[0, 7, 0], [0, 11, 0], [0, 13, 0], [0, 21, 1], [0, 26, 1], [1, 17, 2], [1, 37, 2]]
    assert made["response_indexs"].tolist() == places
    assert made["response_sort"].tolist() == [2, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "sort",
    [
        [2**24 + 1, 2**24, 2**24],  # the same as float32
        [2**53 + 1, 2**53, 2**53],  # the same as float64
        [1.0000000001, 1.0, 1.0],
        [2e39, 1e39, 1e39],  # infinite as float32
        [1e-50, -1e-50, -1e-50],  # 0 as float32
        np.array([7, -3, -3]),
        np.array([7, 0, 0], np.uint8),
    ],
)
def test_ranks_that_differ_are_no_ties(sort):
    text = {"src": ["q"], "tgt": [], "response": ["x", "y", "z"], "sort": list(sort)[::-1]}
    encoded = flashmask_nlp.encode_preference(Characters(), text) if isinstance(sort, list) else {}
    for given in ({**sample(5, 3, 4, 2), "sort": sort}, *([encoded] if encoded else [])):
        made = batch([given], "reward", "flashmask")
        assert made["response_sort"].dtype == np.float32
        assert made["response_sort"].tolist() == [1, 0, 0]


def test_dpo_batch():
    made = batch([sample(5, 3, 4), sample(1, 2, 2, start=50)], "dpo", "flashmask")
    # The prompt's last token, 14, stands in front of each answer; an answer's last token is a label only.
    assert made["input_ids"][0, :11].tolist() == [10, 11, 12, 13, 14, 15, 16, 14, 18, 19, 20]
    assert made["position_ids"][0, :11].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    assert made["chosen_labels"][0].tolist() == [0] * 4 + [15, 16, 17] + [0] * 4 + [51, 52] + [0] * 27
    assert made["rejected_labels"][0].tolist() == [0] * 7 + [18, 19, 20, 21] + [0] * 2 + [53, 54] + [0] * 25
    assert made["response_indexs"].tolist() == [[0, 4, 7, 11], [0, 11, 13, 15]]
    # A prompt of one token leaves nothing to share: its branches begin with it.
    ends = [11] * 4 + [7] * 3 + [11] * 4 + [13] * 2 + [15] * 2 + [0] * 25
    assert made["attn_mask_startend_row_indices"][0, 0].tolist() == ends


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_both_masks_say_the_same(task):
    samples = [sample(5, 3, 4), sample(2, 6, 5), sample(9, 9, 10)]
    rows = batch(samples, task, "flashmask")
    dense = batch(samples, task, "dense")
    expected = masks.to_dense(rows.pop("attn_mask_startend_row_indices")[..., None], True, LENGTH)
    mask = dense.pop("attention_mask")
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)
    assert rows.keys() == dense.keys()
    for key in rows:
        np.testing.assert_array_equal(rows[key], dense[key], err_msg=key)


def test_the_same_rows_as_paddlenlp(tmp_path):
    """PaddleNLP's own preprocessing, zero padding and collation give this batch, mask and all, to the integer."""
    trl = pytest.importorskip("paddlenlp.trl")
    from types import SimpleNamespace

    from paddlenlp.datasets import ZeroPaddingMapDataset

    class Encodes(Characters):
        chat_template = None

        def encode(self, text, add_special_tokens=True):
            return self(text, add_special_tokens)

    texts = [("abcd", "xyz", "uvwt"), ("q", "no", "yes"), ("what", "ten", "a")]
    records = [{"src": [q], "tgt": [], "response": [a, b], "sort": [0, 1]} for q, a, b in texts]
    arguments = SimpleNamespace(max_seq_len=LENGTH, max_prompt_len=LENGTH), SimpleNamespace(flash_mask=True)
    theirs = [trl.preprocess_preference_data(json.loads(json.dumps(r)), Encodes(), *arguments) for r in records]
    packed = ZeroPaddingMapDataset(theirs, tokenizer=None, max_length=LENGTH)
    expected = trl.preference_collate_fn([packed[index] for index in range(len(packed))], max_seq_len=LENGTH)

    dataset = flashmask_nlp.PreferenceDataset(
        [flashmask_nlp.encode_preference(Encodes(), r) for r in records], LENGTH, "dpo", strategy="in_order"
    )
    made = flashmask_nlp.PreferenceCollator(LENGTH, "dpo")([dataset[index] for index in range(len(dataset))])
    assert made.keys() == expected.keys()
    visible = [
        masks.to_dense(each.pop("attn_mask_startend_row_indices")[..., None], True, LENGTH) for each in (made, expected)
    ]
    np.testing.assert_array_equal(*visible)
    for key in expected:
        np.testing.assert_array_equal(made[key], expected[key], err_msg=key)


def test_each_answer_with_a_copy_of_its_prompt():
    made = batch([sample(5, 3, 4)], "reward", "flashmask", share_prompt=False)
    expected, _ = masks.causal_document([[8, 9]], LENGTH)
    np.testing.assert_array_equal(made["attn_mask_startend_row_indices"], expected[..., 0])
    assert made["input_ids"][0, :17].tolist() == [*range(10, 18), *range(10, 15), *range(18, 22)]
    assert made["position_ids"][0, :17].tolist() == [*range(8), *range(9)]
    assert made["response_indexs"].tolist() == [[0, 7, 0], [0, 16, 0]]


@pytest.mark.parametrize(("limit", "skipped"), [({}, 1), ({"max_prompt_length": 4}, 2)])
def test_too_long_is_refused_or_skipped_and_counted(limit, skipped, caplog):
    samples = [sample(3, 2, 2), sample(5, 3, 4), sample(3, 20, 18)]
    with pytest.raises(ValueError, match=r"samples\[\d\] has .* tokens.*, more than max_"):
        flashmask_nlp.PreferenceDataset(samples, LENGTH, "reward", **limit)
    with caplog.at_level(logging.WARNING, "paddle_flashmask"):
        dataset = flashmask_nlp.PreferenceDataset(samples, LENGTH, "reward", too_long="skip", **limit)
    assert f"skipped {skipped} of 3 samples" in caplog.text
    assert dataset.stats().skipped == skipped
    assert dataset.stats().samples == 3 - skipped
    with pytest.raises(ValueError, match="at least one sample"):
        flashmask_nlp.PreferenceDataset(samples[2:], LENGTH, "reward", too_long="skip")


def test_nothing_is_truncated():
    samples = [sample(3, 2, 2), sample(5, 3, 4)]
    made = flashmask_nlp.PreferenceDataset(samples, 16, "reward")
    tokens = np.concatenate([made[index]["input_ids"] for index in range(len(made))])
    given = [token for each in samples for part in (each["prompt"], *each["responses"]) for token in part]
    assert sorted(tokens.tolist()) == sorted(given)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        ([1, 2], TypeError, r"samples\[1\] must be a mapping with prompt, responses and sort, got list"),
        ({"prompt": [1]}, TypeError, r"samples\[1\] must be a mapping"),
        ({**sample(2, 2, 2), "prompt": []}, ValueError, r"samples\[1\]\['prompt'\] has no tokens"),
        ({**sample(2, 2, 2), "prompt": ["a"]}, TypeError, r"samples\[1\]\['prompt'\] must be a list of integers"),
        ({**sample(2, 2, 2), "responses": [[1], []]}, ValueError, r"samples\[1\]\['responses'\]\[1\] has no tokens"),
        (sample(2, 2), ValueError, r"samples\[1\] must have 2 responses, got 1"),
        (sample(2, 2, 2, 2), ValueError, r"samples\[1\] must have 2 responses, got 3"),
        ({**sample(2, 2, 2), "sort": [1]}, ValueError, r"samples\[1\]\['sort'\] must have a number for each"),
        (
            {**sample(2, 2, 2), "prompt": [[1], [2, 3]]},
            TypeError,
            r"samples\[1\]\['prompt'\] must be a list of integers",
        ),
        (
            {**sample(2, 2, 2), "prompt": [2**63]},
            ValueError,
            rf"samples\[1\]\['prompt'\] must be token ids .* {2**63} at",
        ),
        (
            {**sample(2, 2, 2), "responses": [[1, 2], [3, -4]]},
            ValueError,
            r"samples\[1\]\['responses'\]\[1\] must be token ids from 0 to 2\*\*31 - 1; got -4 at place 1",
        ),
        (
            {**sample(2, 2, 2), "responses": None},
            TypeError,
            r"samples\[1\]\['responses'\] must be a list.*got NoneType",
        ),
        ({**sample(2, 2, 2), "responses": "ab"}, TypeError, r"samples\[1\]\['responses'\]\[0\] must be a list"),
        ({**sample(2, 2, 2), "sort": None}, TypeError, r"samples\[1\]\['sort'\] must be a list.*got NoneType"),
        *(
            ({**sample(2, 2, 2), "sort": sort}, ValueError, r"samples\[1\]\['sort'\] must have a number for each of 2")
            for sort in (
                ["b", "a"],
                ["10", "9"],
                [None, 1],
                [float("nan"), 1],
                [10**400, 1],
                [True, False],
                [[1], [2, 3]],
            )
        ),
        ({**sample(2, 2, 2), "sort": [1, 1]}, ValueError, r"samples\[1\]\['sort'\] must tell better from worse"),
    ],
)
def test_bad_samples(broken, error, message):
    with pytest.raises(error, match=message):
        flashmask_nlp.PreferenceDataset([sample(2, 2, 2), broken], LENGTH, "dpo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"task": "ppo"}, "task must be one of dpo, reward"),
        ({"too_long": "cut"}, "too_long must be one of error, skip"),
        ({"strategy": "sorted"}, "strategy must be one of"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1"),
        ({"share_prompt": False}, 'share_prompt=False needs task="reward"'),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        flashmask_nlp.PreferenceDataset([sample(2, 2, 2)], **{"max_length": LENGTH, "task": "dpo", **settings})


def test_bad_collator():
    dataset = flashmask_nlp.PreferenceDataset([sample(2, 2, 2)], LENGTH, "dpo")
    with pytest.raises(ValueError, match="at least one row"):
        flashmask_nlp.PreferenceCollator(LENGTH, "dpo")([])
    with pytest.raises(ValueError, match=r"rows\[0\] has 5 tokens, more than max_length=4"):
        flashmask_nlp.PreferenceCollator(4, "dpo")([dataset[0]])
    with pytest.raises(TypeError, match=r"pad_token_id must be an integer, got NoneType.*tokenizer\.eos_token_id"):
        flashmask_nlp.PreferenceCollator(LENGTH, "dpo", pad_token_id=None)
    with pytest.raises(ValueError, match=r"pad_token_id must be a token id .*, got -1\. .*tokenizer\.eos_token_id"):
        flashmask_nlp.PreferenceCollator(LENGTH, "dpo", pad_token_id=-1)
    row = dict(dataset[0])
    del row["position_ids"]
    with pytest.raises(TypeError, match=r'row of PreferenceDataset\(task="dpo"\), with position_ids; got \['):
        flashmask_nlp.PreferenceCollator(LENGTH, "dpo")([row])


@pytest.mark.parametrize(("task", "other", "lacks"), [("dpo", "reward", "labels"), ("reward", "dpo", "sort")])
def test_rows_of_the_other_task(task, other, lacks):
    """Their layouts differ: DPO would learn nothing from them, and a reward model would read other tokens' scores."""
    mine, theirs = (flashmask_nlp.PreferenceDataset([sample(2, 2, 2)], LENGTH, each)[0] for each in (task, other))
    collator = flashmask_nlp.PreferenceCollator(LENGTH, task)
    message = rf'rows\[1\] must be a row of PreferenceDataset\(task="{task}"\), with {lacks}; got \['
    with pytest.raises(TypeError, match=message):
        collator([mine, theirs])


def changed(key, change):
    """A row with prompts of 3 and 2 tokens, two answers each, changed in `key`."""

    def make(task):
        row = flashmask_nlp.PreferenceDataset([sample(3, 2, 2), sample(2, 4, 3)], LENGTH, task, "in_order")[0]
        return {**row, key: change(np.array(row[key]))}

    return make


def put(place, value):
    def change(array):
        array[place] = value
        return array

    return change


@pytest.mark.parametrize("task", ["dpo", "reward"])
@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            changed("input_ids", lambda a: a[:-1]),
            ValueError,
            r"\['position_ids'\] must have as many as the \d+ input_ids",
        ),
        (changed("position_ids", lambda a: a[:-1]), ValueError, r"\['position_ids'\] must have as many as the .*, got"),
        (changed("ends", lambda a: a[:-1]), ValueError, r"\['ends'\] must have as many as the \d+ input_ids, got"),
        (
            changed("input_ids", lambda a: a + 0.5),
            TypeError,
            r"\['input_ids'\] must be a list of integers, got float64",
        ),
        (changed("ends", put(0, 1)), ValueError, r"\['ends'\] must be .*; expected \d+ at place 0, got 1$"),
        (changed("ends", put(-1, 99)), ValueError, r"\['ends'\] must be .*; expected \d+ at place \d+, got 99$"),
        (
            changed("branches", lambda a: a[:0]),
            ValueError,
            r"\['branches'\] must be \[start, end, prompt\] .*; got \[\]$",
        ),
        (changed("branches", lambda a: a[:-1]), ValueError, r"\['branches'\] must be"),
        (changed("branches", lambda a: a[:, :2]), ValueError, r"\['branches'\] must be"),
        (changed("branches", lambda a: a + 0.0), ValueError, r"\['branches'\] must be"),
        (changed("branches", lambda a: a[[1, 0, 2, 3]]), ValueError, r"\['branches'\] must be"),
        (changed("branches", put((0, 0), -1)), ValueError, r"\['branches'\] must be"),
        (changed("branches", put((3, 1), 40)), ValueError, r"\['branches'\] must be"),
        (changed("branches", put((1, 0), 6)), ValueError, r"\['branches'\] must be"),
        (changed("branches", put((slice(2, 4), 2), 2)), ValueError, r"\['branches'\] must be"),
        (changed("branches", put((slice(0, 2), 2), -1)), ValueError, r"\['branches'\] must be"),
    ],
)
def test_rows_that_do_not_add_up(task, row, error, message):
    good = flashmask_nlp.PreferenceDataset([sample(2, 2, 2)], LENGTH, task)[0]
    with pytest.raises(error, match=r"^rows\[1\]" + message):
        flashmask_nlp.PreferenceCollator(LENGTH, task)([good, row(task)])


def test_rows_that_lack_a_part_of_their_task():
    with pytest.raises(ValueError, match=r"^rows\[0\]\['labels'\] must have as many as the \d+ input_ids"):
        flashmask_nlp.PreferenceCollator(LENGTH, "dpo")([changed("labels", lambda a: a[1:])("dpo")])
    with pytest.raises(
        ValueError, match=r"^rows\[0\]\['sort'\] must be a number for each of 4 answers, got shape \[3\]"
    ):
        flashmask_nlp.PreferenceCollator(LENGTH, "reward")([changed("sort", lambda a: a[1:])("reward")])
    three = flashmask_nlp.PreferenceDataset([sample(2, 2, 2, 2), sample(2, 2, 2, 2)], LENGTH, "reward")[0]
    with pytest.raises(ValueError, match=r"^rows\[0\]\['branches'\] must be .* of two answers for each prompt"):
        flashmask_nlp.PreferenceCollator(LENGTH, "dpo")([{**three, "labels": three["input_ids"]}])


@pytest.mark.parametrize("share_prompt", [True, False])
def test_every_row_of_a_dataset_is_taken(share_prompt):
    random = np.random.default_rng(11)
    samples = [sample(int(random.integers(1, 5)), *random.integers(1, 4, random.integers(2, 4))) for _ in range(200)]
    for task in ("reward", "dpo") if share_prompt else ("reward",):
        mine = [each for each in samples if task == "reward" or len(each["responses"]) == 2]
        dataset = flashmask_nlp.PreferenceDataset(mine, LENGTH, task, share_prompt=share_prompt)
        rows = [dataset[index] for index in range(len(dataset))]
        made = flashmask_nlp.PreferenceCollator(LENGTH, task)(rows)
        for row, ends in zip(rows, made["attn_mask_startend_row_indices"][:, 0], strict=True):
            np.testing.assert_array_equal(ends[: len(row["ends"])], row["ends"])


def test_a_dense_mask_that_the_environment_drops(monkeypatch):
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    with pytest.raises(ValueError, match=r'mask="dense" with USE_CASUAL_MASK=True.*Unset USE_CASUAL_MASK'):
        flashmask_nlp.PreferenceCollator(LENGTH, "dpo", mask="dense")
    flashmask_nlp.PreferenceCollator(LENGTH, "dpo")


def test_bad_strategy_is_told_before_the_samples_are_made():
    samples = (pytest.fail("a sample was made") for _ in range(1))
    with pytest.raises(ValueError, match="strategy must be one of greedy, in_order, got 'gredy'"):
        flashmask_nlp.PreferenceDataset(samples, LENGTH, "dpo", strategy="gredy")


def test_stats_against_the_masks(capsys):
    random = np.random.default_rng(3)
    samples = [sample(p, *random.integers(2, 9, 4)) for p in random.integers(4, 13, 60)]
    dataset = flashmask_nlp.PreferenceDataset(samples, 128, "reward")
    collator = flashmask_nlp.PreferenceCollator(128, "reward", mask="dense")
    made = collator([dataset[index] for index in range(len(dataset))])
    stats = dataset.stats()
    assert stats.attended == pytest.approx(made["attention_mask"].mean())
    used = (made["attention_mask"].sum(axis=-1) > 0).sum()
    assert stats.tokens == used
    assert stats.fill == pytest.approx(used / made["input_ids"].size)
    copies = flashmask_nlp.PreferenceDataset(samples, 128, "reward", share_prompt=False).stats()
    assert stats.unshared_tokens == copies.tokens == copies.unshared_tokens
    assert stats.tokens < 0.7 * copies.tokens, "four answers share a prompt"
    assert stats.rows < copies.rows
    saved = 1 - stats.tokens / copies.tokens
    assert f"save {saved:.1%} of the tokens" in str(stats)
    assert f"the mask skips {1 - stats.attended:.1%} of the scores" in str(stats)
    with capsys.disabled():
        print(f"\n  reward, 4 answers a prompt: {stats.tokens} tokens in {stats.rows} rows, "
              f"{copies.tokens} in {copies.rows} with copies of the prompt: {saved:.0%} saved")  # fmt: skip
