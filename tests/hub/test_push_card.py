"""`push` with its card, and what a pushed output is where it is pulled again."""

import pytest
from huggingface_hub import ModelCard

import loratools
from tests.hub.pushed import NAMES, changes, commits, downloaded, held, push, refused
from tests.tiny import write_base

TOLD = {"card": "auto", "license": "mit", "base_model": ["org/base"]}
MINE = """---
license: apache-2.0
tags: [mine]
---
# My own words

Trained on a rainy day.
"""


def card(hub, repo="me/style") -> ModelCard:
    return ModelCard(held(hub, repo)["README.md"].decode())


def test_the_card_is_part_of_the_commit_and_the_library_reads_it(hub, adapter):
    result = push(adapter, **TOLD)
    assert set(held(hub)) == {*NAMES, "README.md"}
    assert commits(hub) == 1
    assert (result.uploaded, result.verified) == (3, 3)
    read = card(hub).data
    assert (read.license, read.base_model, read.library_name) == ("mit", "org/base", "peft")
    assert push(adapter, **TOLD).uploaded == 0


def test_words_of_others_on_the_hub_stay(hub, adapter):
    hub.put("me/style", {"README.md": MINE}, private=True)
    push(adapter, card="auto", base_model=["org/base"])
    assert "Trained on a rainy day." in card(hub).text
    assert card(hub).data.license == "apache-2.0"
    assert "mine" in card(hub).data.tags
    before = commits(hub)
    push(adapter, card="auto", base_model=["org/base"])
    assert commits(hub) == before


def test_a_card_that_cannot_be_kept_to_the_letter_is_not_touched(hub, adapter, tmp_path):
    hub.put("me/style", {"README.md": b"# caf\xe9\n"}, private=True)
    caught = refused("card", adapter, **TOLD)
    assert "README.md of me/style is not UTF-8" in caught.message
    assert "--card FILE" in caught.problems[0].advice
    push(adapter)
    assert held(hub)["README.md"] == b"# caf\xe9\n"
    (tmp_path / "new.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n# New\n")
    push(adapter, card=str(tmp_path / "new.md"))
    assert held(hub)["README.md"].endswith(b"# New\n")


def test_no_card_when_none_is_wanted(hub, adapter):
    hub.put("me/style", {"README.md": MINE}, private=True)
    result = push(adapter)
    assert held(hub)["README.md"] == MINE.encode()
    assert result.kept == ("README.md",)


def test_a_card_that_the_hub_refuses_stops_before_anything_is_made(hub, adapter, tmp_path):
    (tmp_path / "mine.md").write_text("---\nlicense: Nobody Knows\n---\n# x\n")
    caught = refused("card", adapter, card=str(tmp_path / "mine.md"), base_model=["org/base"])
    assert "license" in caught.message
    assert "me/style" not in hub.repos
    assert changes(hub) == []


def test_a_base_that_is_a_path_stops_it(hub, adapter):
    hub.put("me/style", {"a.txt": "x"}, private=True)
    caught = refused("base_unnamed", adapter, card="auto", license="mit", base_model=["/home/me/x"])
    assert caught.exit == 5
    assert changes(hub) == []


@pytest.mark.parametrize("signed", [False, True])
def test_a_fold_is_proved_where_it_is_pulled_again(hub, adapter, tmp_path, signed):
    from tests.hub.keys import pair

    write_base(tmp_path / "base")
    loratools.merge([adapter], tmp_path / "base", out=tmp_path / "folded")
    private, public = pair(tmp_path)
    push(tmp_path / "folded", "me/folded", **TOLD, sign_key=private if signed else None)
    elsewhere = tmp_path / "far" / "away"
    pulled = downloaded(hub, elsewhere, "me/folded")
    result = loratools.verify(pulled, key=public if signed else None)
    assert result.ok, result.mismatches
    assert result.proved == ("signature" if signed else "hashes")
    assert b"/far/away" not in hub.received
    assert str(tmp_path).encode() not in hub.received
