"""What is said of plans that differ."""

from __future__ import annotations

from logitcache.store import Ancestor, Identity, Wording
from logitcache.store.differences import diff
from tests.store.caches import GEOMETRY, identity

WORDING = Wording(
    {"corpus.files": "--corpus", "geometry.block_length": "--block-length", "seed": "--seed"},
    follows=("corpus", "geometry"),
)


def changed(**changes: object) -> Identity:
    return identity().model_copy(update=changes)


def geometry(**changes: int) -> dict[str, object]:
    return {"geometry": GEOMETRY.model_copy(update=changes)}


def test_options_are_named_and_what_follows_is_not() -> None:
    other = changed(seed=4, corpus={"files": [{"name": "b"}], "sha256": "2" * 64}, **geometry(chunk_blocks=1))
    assert WORDING.lines(identity(), other) == [
        "--corpus (b): only this run has this file",
        "--seed: the cache has 0, this run 4",
    ]
    assert WORDING.lines(identity(), changed(**geometry(block_length=6, unit_blocks=9))) == [
        "--block-length: the cache has 5, this run 6"
    ]


def test_a_field_without_an_option_has_its_own_name() -> None:
    assert WORDING.lines(identity(), changed(vocab_size=7, **geometry(unit_blocks=9))) == [
        "vocab_size: the cache has 400, this run 7"
    ]


def test_what_follows_is_said_where_nothing_else_differs() -> None:
    """Another version may plan otherwise."""
    assert WORDING.lines(identity(), changed(**geometry(chunk_blocks=1, unit_blocks=9))) == [
        f"geometry.chunk_blocks: the cache has {GEOMETRY.chunk_blocks}, this run 1",
        f"geometry.unit_blocks: the cache has {GEOMETRY.unit_blocks}, this run 9",
    ]


def test_each_option_has_one_line() -> None:
    wording = Wording({"tokenizer": "--teacher", "teacher": "--teacher"})
    other = changed(teacher={"name": "other", "sha256": "3"}, tokenizer={"sha256": "4"})
    assert wording.lines(identity(), other) == ["--teacher (teacher.name): the cache has 'none', this run 'other'"]


def test_steps_name_what_they_were_told_and_their_sources() -> None:
    def step(parent: str, **arguments: object) -> Identity:
        return changed(ancestry=[Ancestor(operation="derive", arguments=arguments, parents=[parent * 64])])

    one = step("a", select="top-k:3", mean_tail_mass=0.1)
    wording = Wording.of_step(one)
    assert wording.lines(one, step("a", select="top-k:4", mean_tail_mass=0.2)) == [
        "--select: the cache has 'top-k:3', this run 'top-k:4'"
    ]
    other = step("b", select="top-k:3", mean_tail_mass=0.1).model_copy(update={"seed": 3})
    assert wording.lines(one, other) == [
        f"CACHE (ancestry.0.parents): the cache has {['a' * 64]}, this run {['b' * 64]}"
    ]
    assert wording.lines(one, one) == []


def test_selections_are_spelled() -> None:
    other = identity().model_copy(update={"selection": identity("logprob").selection})
    assert Wording({"selection": "--select"}).lines(identity(), other) == [
        "--select: the cache has 'sample:9', this run 'top-k:9'"
    ]


def test_a_file_is_called_by_its_name() -> None:
    """With what changed of the first one; a file before it does not make others of all that follow."""

    def files(*named: tuple[str, int, str]) -> Identity:
        listed = [{"name": name, "bytes": size, "sha256": digest} for name, size, digest in named]
        return changed(corpus={"files": listed, "sha256": "1" * 64})

    old = files(("b", 64, "x"), ("sub/c.txt", 5, "y"))
    for new, said in (
        (files(("b", 64, "x"), ("sub/c.txt", 6, "z")), "(sub/c.txt): the cache has 5 bytes of it, this run 6"),
        (files(("b", 64, "z"), ("sub/c.txt", 5, "y")), "(b): the cache has it with SHA-256 x, this run z"),
        (files(("a", 1, "a"), *[("b", 64, "x"), ("sub/c.txt", 5, "y")]), "(a): only this run has this file"),
        (files(("b", 64, "x")), "(sub/c.txt): only the cache has this file"),
        (files(), "(b): only the cache has this file; 1 more file changed"),
        (
            files(("b", 1, "v"), ("b", 2, "w")),
            "(b): the cache has 64 bytes of it, this run 1; 2 more files changed",
        ),
    ):
        assert WORDING.lines(old, new) == [f"--corpus {said}"]
        assert Wording().lines(old, new) == [f"corpus.files {said}"]


def test_objects_in_lists_are_compared_one_by_one() -> None:
    old, new = {"files": [{"a": 1, "b": 2}, {"a": 3}]}, {"files": [{"a": 1, "b": 5}, {"a": 3}]}
    assert diff(old, new) == [("files.0.b", 2, 5)]
    named = {"files": [{"name": "x", "a": 1}]}, {"files": [{"name": "x", "a": 2}]}
    assert diff(*named) == [("files.x.a", 1, 2)]
    assert diff({"blocks": [1, 2]}, {"blocks": [1]}) == [("blocks", [1, 2], [1])]
