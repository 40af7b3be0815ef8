"""The record format: what is read, kept, written, and refused with a line that says where."""

import json
from pathlib import Path

import pytest
import torch
import zstandard

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.records import check_columns, read_trees, to_records, write_trees
from stepcredit.forest.types import Problem, Segment, Tree


def record(**changes):
    """A tree of two completions, with changes to the tree."""
    segments = [{"token_ids": [7, 2], "reward": 1.0}, {"token_ids": [8, 9, 2], "reward": 0.0}]
    return {"version": 1, "id": "p0", "prompt_ids": [1, 5], "segments": segments} | changes


def second(**changes):
    """The record with changes to its second segment."""
    changed = record()
    changed["segments"][1] |= changes
    return changed


def written(path: Path, *lines) -> str:
    """A file of records; text stands as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return str(path)


def read(path: Path, *lines) -> list[Tree]:
    return list(read_trees(written(path, *lines)))


def forest_of(*trees: Tree) -> Forest:
    return Forest.from_trees(trees)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.zst"])
def test_round_trip(tmp_path, name):
    """What is written is read back: ids, prompts, columns, rewards, flags, structure."""
    columns = {"old_logprobs": [0.0, -2.0], "entropy": [0.125, 2.0]}
    first = Tree(
        Problem("zwölf ?", "18", "a"),
        [1, 5],
        [
            Segment([7, 2], finish="cut", columns={"old_logprobs": [-0.5, -0.25], "entropy": [0.5, 1.5]}),
            Segment([3], 0, "length", False, columns={"old_logprobs": [-1.0], "entropy": [0.0]}),
            Segment([4, 2], 0, reward=0.75, rewards={"x": 0.5, "y": None}, columns=columns),
        ],
    )
    other = Tree(Problem("b ?", None, "b"), [1], [Segment([9], columns={"old_logprobs": [-3.0], "entropy": [1.0]})])
    path = tmp_path / name
    write_trees(path, forest_of(first, other), iteration=7)
    back = list(read_trees(str(path)))
    assert [tree.extra for tree in back] == [{"iteration": 7}] * 2
    for tree, wanted in zip(back, (first, other), strict=True):
        assert (tree.problem.question, tree.problem.answer, tree.problem.id) == (
            wanted.problem.question,
            wanted.problem.answer,
            wanted.problem.id,
        )
        assert tree.prompt_ids == wanted.prompt_ids
        assert tree.segments == wanted.segments


def test_zst_is_compressed(tmp_path):
    write_trees(tmp_path / "r.jsonl.zst", forest_of(*read(tmp_path / "a.jsonl", record())))
    assert (tmp_path / "r.jsonl.zst").read_bytes()[:4] == b"\x28\xb5\x2f\xfd"


def test_unknown_fields_are_kept(tmp_path):
    """Fields of a tree and of a segment that nothing here knows come out as they went in."""
    given = second(mine={"a": [1, None]}) | {"source": "lab", "iteration": 3}
    (out,) = to_records(forest_of(*read(tmp_path / "a.jsonl", given)))
    assert (out["source"], out["iteration"]) == ("lab", 3)
    assert out["segments"][1]["mine"] == {"a": [1, None]}
    assert "mine" not in out["segments"][0]


def test_alias_logprobs(tmp_path):
    (tree,) = read(tmp_path / "a.jsonl", second(logprobs=[-1, -2, -3]))
    assert tree.segments[1].columns == {"rollout_logprobs": [-1.0, -2.0, -3.0]}


def test_defaults(tmp_path):
    """Without finish a leaf stopped and an inner segment was cut; tokens are sampled; no version means this one."""
    child = {"token_ids": [8], "parent": 0}
    segments = [{"token_ids": [7]}, child, child | {"finish": "length"}]
    (tree,) = read(tmp_path / "a.jsonl", {"segments": segments})
    assert [segment.finish for segment in tree.segments] == ["cut", "stop", "length"]
    assert all(segment.sampled and segment.reward is None for segment in tree.segments)
    assert (tree.prompt_ids, tree.problem.id) == ([], "line 1")


def test_null_reward_is_unjudged(tmp_path):
    (tree,) = read(tmp_path / "a.jsonl", second(reward=None))
    assert [segment.reward for segment in tree.segments] == [1.0, None]
    (out,) = to_records(forest_of(tree))
    assert "reward" not in out["segments"][1]


def test_credit_is_written_and_not_read_as_input(tmp_path):
    """Advantages stand in the output; a scored file can be scored anew."""
    forest = forest_of(*read(tmp_path / "a.jsonl", record())).with_token(advantages=torch.arange(5.0))
    write_trees(tmp_path / "scored.jsonl", forest)
    out = json.loads((tmp_path / "scored.jsonl").read_text())
    assert [segment["advantages"] for segment in out["segments"]] == [[0, 1], [2, 3, 4]]
    (tree,) = read_trees(str(tmp_path / "scored.jsonl"))
    assert all(segment.columns == {} and segment.extra == {} for segment in tree.segments)


def test_blank_lines_count_but_are_skipped(tmp_path):
    assert len(read(tmp_path / "a.jsonl", "", record(), "   ", record())) == 2
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: "):
        read(tmp_path / "a.jsonl", "", record(), "{")


BAD = {
    "not JSON": ("{", ["not JSON"]),
    "a number": ("7", ["segments"]),
    "no segments": ({"id": "x"}, ["segments"]),
    "empty segments": (record(segments=[]), ["segments"]),
    "wrong version": (record(version=2), ["version 2", "version 1"]),
    "prompt ids text": (record(prompt_ids="1 5"), ["prompt_ids"]),
    "negative prompt id": (record(prompt_ids=[1, -5]), ["prompt_ids"]),
    "segment no object": (record(segments=[[7, 2]]), ["segment 0", "token_ids"]),
    "no token ids": (record(segments=[{"reward": 1.0}]), ["segment 0", "token_ids"]),
    "no tokens": (second(token_ids=[]), ["segment 1", "token_ids"]),
    "negative id": (second(token_ids=[8, -9, 2]), ["segment 1", "token_ids", "negative"]),
    "boolean id": (second(token_ids=[8, True, 2]), ["segment 1", "token_ids"]),
    "fraction id": (second(token_ids=[8, 1.5, 2]), ["segment 1", "token_ids"]),
    "missing parent": (second(parent=5), ["segment 1", "parent 5 does not exist"]),
    "own parent": (second(parent=1), ["segment 1", "parent 1"]),
    "below prompt": (second(parent=-2), ["segment 1", "parent -2"]),
    "boolean parent": (second(parent=False), ["segment 1", "parent False"]),
    "list parent": (second(parent=[0]), ["segment 1", "parent"]),
    "sampled number": (second(sampled=1), ["segment 1", "sampled"]),
    "finish": (second(finish="eos"), ["segment 1", "finish 'eos'"]),
    "NaN reward": (second(reward=float("nan")), ["segment 1", "reward", "nan"]),
    "inf reward": (second(reward=float("inf")), ["segment 1", "reward", "inf"]),
    "boolean reward": (second(reward=True), ["segment 1", "reward", "True"]),
    "text reward": (second(reward="1"), ["segment 1", "reward", "'1'"]),
    "huge reward": (second(reward=10**400), ["segment 1", "reward"]),
    "short column": (second(old_logprobs=[-1.0, -2.0]), ["segment 1", "old_logprobs", "2 values for 3 tokens"]),
    "column no list": (second(ref_logprobs=-1.0), ["segment 1", "ref_logprobs"]),
    "NaN log-prob": (second(old_logprobs=[-1, float("nan"), -1]), ["segment 1", "old_logprobs[1]", "nan"]),
    "inf log-prob": (second(logprobs=[-1, -1, float("-inf")]), ["segment 1", "logprobs[2]", "-inf"]),
    "boolean log-prob": (second(entropy=[True, 0, 0]), ["segment 1", "entropy[0]", "True"]),
    "text token reward": (second(token_rewards=["0", 0, 0]), ["segment 1", "token_rewards[0]"]),
    "column and alias": (second(logprobs=[-1] * 3, rollout_logprobs=[-1] * 3), ["segment 1", "logprobs", "both"]),
    "rewards list": (second(rewards=[1.0]), ["segment 1", "rewards"]),
}


@pytest.mark.parametrize("line, words", BAD.values(), ids=BAD)
def test_bad_record(tmp_path, line, words):
    """The message names the file, the line, and the segment and field at fault."""
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.jsonl", record(), line)
    message = str(caught.value)
    assert f"{tmp_path / 'a.jsonl'}, line 2" in message
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_reward_on_inner_segment(tmp_path):
    given = record(segments=[{"token_ids": [7], "reward": 1.0}, {"token_ids": [8], "parent": 0, "reward": 1.0}])
    with pytest.raises(UserError, match=r"line 1.*segment 0.*reward"):
        read(tmp_path / "a.jsonl", given)


def packed(count: int) -> bytes:
    trees = [record(id=f"p{number}", prompt_ids=[number * 7919 % 4001, number]) for number in range(count)]
    return zstandard.ZstdCompressor().compress("".join(json.dumps(tree) + "\n" for tree in trees).encode())


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated_zst(tmp_path, kept):
    """A file that breaks off is an error, never a shorter file."""
    whole = packed(400)
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(whole)
    assert len(list(read_trees(str(path)))) == 400
    path.write_bytes(whole[: max(3, int(len(whole) * kept))])
    with pytest.raises(UserError, match=r"r\.jsonl\.zst"):
        list(read_trees(str(path)))


@pytest.mark.parametrize("name, content", [("r.jsonl.zst", b"plain text"), ("r.jsonl", b"\xff\xfe{}\n")])
def test_not_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        list(read_trees(str(tmp_path / name)))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        list(read_trees(str(tmp_path / "gone.jsonl")))


def test_check_columns_names_the_closest(tmp_path):
    trees = read(tmp_path / "a.jsonl", second(old_logprobs=[-1, -1, -1]))
    check_columns("a.jsonl", trees, ["old_logprobs"])
    with pytest.raises(UserError, match=r"a\.jsonl.*'ref_logprobs'.*found: old_logprobs"):
        check_columns("a.jsonl", trees, ["ref_logprobs"])


def test_column_of_some_segments_only(tmp_path):
    """A log-probability column that one segment lacks is an error that names the segment."""
    with pytest.raises(UserError, match=r"'p0'.*segment 0.*old_logprobs"):
        forest_of(*read(tmp_path / "a.jsonl", second(old_logprobs=[-1, -1, -1])))


def test_a_masked_segment_stays_masked(tmp_path):
    """What a shaper took out of the loss has no weight when the record is read again."""
    trees = [Tree(Problem(id="a"), [1], [Segment([5, 2], reward=1.0, masked=True), Segment([6, 2], reward=0.0)])]
    write_trees(tmp_path / "a.jsonl", Forest.from_trees(trees))
    again = Forest.from_trees(list(read_trees(str(tmp_path / "a.jsonl"))))
    assert again.segment["mask"].tolist() == [False, True]
    assert again.active.tolist() == [False, False, True, True]
