"""`loratools push`: its arguments, its messages, its pages; the Hub itself is in tests/hub."""

import pytest

from loratools.commands.push_plan import ordered
from loratools.errors import LoratoolsError
from tests.hub_fixture import unset

SECRET = "hf_" + "kQ7XwV9NmL2OiU5TrE8QaSdF4HjKl6CxvB"


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """Nobody is logged in: what needs a token, or the network, is refused before it is asked."""
    unset(monkeypatch)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))


def plan(run, *arguments):
    return run("push", "a", "org/style", "--dry-run", "--card", "none", *arguments)


# ------------------------------------------------------------------------------- path, repository


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "org/style"), ("org/style", "a"), ("./a", "hf://org/style"),
     ("https://huggingface.co/org/style", "a"), ("a", "org/style/")],
)  # fmt: skip
def test_the_one_on_disk_is_the_path(here, one, other):
    found = ordered(one, other)
    assert (found.path.resolve(), found.repo) == (here / "a", "org/style")


def test_where_both_are_on_disk_the_first_is_the_path(here):
    (here / "org" / "style").mkdir(parents=True)
    assert ordered("a", "org/style").repo == "org/style"
    # An address that is a folder too, and a second word that can only be a path.
    assert ordered("org/style", "./a").path.name == "a"


def test_an_address_may_name_its_revision_and_a_folder(here):
    found = ordered("a", "org/style@dev:lora/v2")
    assert (found.repo, found.revision, found.inside) == ("org/style", "dev", "lora/v2")
    assert found.again(None) == ("loratools push a org/style --revision dev --path-in-repo lora/v2")
    with pytest.raises(LoratoolsError, match="--revision"):
        ordered("a", "org/style@dev", revision="main2")


def test_a_name_without_an_owner_is_a_name(here):
    assert ordered("a", "style").repo == "style"


@pytest.mark.parametrize("name", ["a/b/c", "datasets/x", "~/x", "org/x y", "../up", "org/\x1b[31m"])
def test_what_no_repository_is_called(here, run, name):
    ended = run("push", "a", name)
    assert ended.status == 2
    assert "ORG/NAME was expected" in ended.err
    assert "\x1b[31m" not in ended.err


def test_neither_is_on_disk(here, run):
    ended = run("push", "nowhere", "org/style")
    assert ended.status == 10
    assert "neither nowhere nor org/style is on disk: loratools push PATH ORG/NAME" in ended.err


# ------------------------------------------------------------------------------- options


def test_a_token_on_the_command_line_is_answered_and_not_repeated(here, run):
    for words in (["--token", SECRET], [f"--token={SECRET}"]):
        ended = run("push", "a", "org/style", *words)
        assert ended.status == 2
        assert "hf auth login" in ended.err
        assert SECRET not in ended.err + ended.out
    assert "Not taken here" in run("push", "--help").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--public", "--private"], "exclude each other"),
        (["--create-pr", "--revision", "dev"], "--revision refs/pr/N"),
        (["--create-branch"], "--create-branch needs --revision"),
        (["--create-branch", "--revision", "refs/pr/1"], "no name of a branch"),
        (["--create-branch", "--revision", "a..b"], "--revision a..b: git has no such name"),
        (["--revision", "refs/pr/abc"], "expected a branch, or refs/pr/N"),
        (["--tag", "two words"], "--tag two words: git has no such name"),
        (["--create-pr", "--tag", "v1"], "not of a pull request"),
        (["--commit-message", " "], "three characters"),
        (["--path-in-repo", "../up"], "--path-in-repo"),
        (["--include", "nothing*"], "--include nothing* matches no file"),
    ],
)
def test_options_that_contradict_each_other(here, run, words, message):
    ended = plan(run, *words)
    assert ended.status == 2
    assert message in ended.err


def test_nobody_is_logged_in(here, run):
    ended = run("push", "a", "org/style")
    assert ended.status == 9
    assert "hf auth login" in ended.err


def test_a_token_of_ci_that_cannot_be_had(here, run, monkeypatch):
    monkeypatch.setenv("HF_OIDC_RESOURCE", "org/style")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    ended = run("push", "a", "org/style")
    assert ended.status == 9, ended.err
    assert "HF_OIDC_RESOURCE" in ended.err


def test_a_key_that_is_not_there(here, run):
    assert plan(run, "--sign-key", "nowhere.pem").status == 10


# ------------------------------------------------------------------------------- what is shown


def test_the_plan_has_a_line_for_each_file_and_says_what_stays(here, run):
    (here / "a" / "optimizer.pt").write_bytes(b"x")
    (here / "a" / "scheduler.pt").write_bytes(b"x")
    ended = plan(run)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "push: adapter -> org/style (dry run)"
    assert lines[2].split() == ["file", "size", "stored", "sha256", "change"]
    assert [line.split()[0] for line in lines[3:5]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "  stays here: optimizer.pt, scheduler.pt (left over from training)" in lines
    assert (
        "  not compared with the Hub: nobody is logged in to the Hub: run `hf auth login`" in lines
    )
    assert lines[-1] == "Nothing was sent."
    assert all(len(line) <= 100 for line in lines)


def test_a_plan_shows_the_card(here, run):
    ended = run("push", "a", "org/style", "-n", "--license", "mit", "--base-model", "org/base")
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert "README.md" in lines
    assert "  license: mit" in lines
    assert "  base_model: org/base" in lines


def test_the_json_of_a_plan_is_one_object(here, run):
    table = run("push", "org/style", "a", "-n", "--card", "none", "--json").json
    assert table["repo"] == "org/style"
    assert table["visibility"] is None
    assert not table["compared"]
    assert [f["path"] for f in table["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert table["remote_only"] == []


def test_all_that_is_missing_for_a_card_is_said_at_once(here, run):
    ended = run("push", "a", "org/style", "-n")
    assert ended.status == 5
    assert "error[base_unnamed]" in ended.err
    assert "error[license]" in ended.err
    assert ended.err.splitlines()[-1] == "2 errors; nothing was sent"


def test_quiet_says_nothing(here, run):
    ended = plan(run, "--quiet")
    assert (ended.status, ended.out, ended.err) == (0, "", "")


def test_a_hostile_file_name_does_not_reach_the_terminal(here, run):
    (here / "a" / "x\x1b[31m.json").write_text("{}")
    ended = plan(run)
    assert "\x1b[31m" not in ended.out + ended.err
