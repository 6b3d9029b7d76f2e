"""The card says what is true, in YAML and Markdown that no name of others can turn."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import loratools
from loratools.commands import published
from loratools.hub.artefact import Artefact, artefact
from loratools.hub.card import MARKER, Card, card
from loratools.hub.facts import Facts, Parent
from loratools.hub.markdown import code, dumped, front_matter, plain, table, with_keys
from tests.tiny import write_adapter, write_base

BASE = "org/base-model_v1"
EVIL = [
    "\n---\nlicense: mit",
    "a: b # c",
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![x](https://evil.example/a.png)",
    "https://evil.example/x",
    "www.evil.example",
    "me@evil.example",
    "# heading",
    "| a | b |",
    "`code`",
    "``` fence",
    "*bold* _it_ ~~no~~",
    "&lt;b&gt; &amp;",
    "\\[x\\](y)",
    "\u202egnp.exe\u2028x\x85y\x00\x1b[31m",
    "{{ 7*7 }} {% raw %}",
    "!!python/object/apply:os.system [id]",
    "- item\n\n    code",
    "yes",
    "null",
    "1e3",
    "=",
    "  spaces  ",
    "🦙 \U0001f999",
    "<!-- loratools-card -->",
    "a" * 500,
    "",
]


class Reader(HTMLParser):
    """The elements of a page, and its text outside of code and links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.links: set[str | None] = set()
        self.inside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.add(tag)
        if tag in ("a", "img"):
            self.links.add(dict(attrs).get("href") or dict(attrs).get("src"))
        if tag in ("code", "a"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            self.inside.remove(tag)

    def handle_data(self, text: str) -> None:
        if not self.inside:
            self.text += text


def rendered(markdown: str) -> Reader:
    """Markdown as a browser gets it; nothing in its text may become a link by itself."""
    reader = Reader()
    made = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    reader.feed(made.render(markdown))
    assert not re.search(r"(?i)https?://|www\.|\S@\S", reader.text)
    return reader


def tags(markdown: str) -> set[str]:
    return rendered(markdown).found


def read_back(text: str) -> tuple[dict[str, Any], ModelCard]:
    """The metadata as YAML and as the Hub's library has it, which must be the same."""
    there = ModelCard(text)
    assert text.startswith("---\n")
    raw = text.split("\n---\n")[0].removeprefix("---\n")
    found = yaml.safe_load(raw)
    assert there.data.to_dict() == found
    return found, there


@pytest.fixture
def adapter(tmp_path: Path) -> Artefact:
    return artefact(write_adapter(tmp_path / "one", base_model_name_or_path=BASE), format="peft")


def parents(*licenses: str | None) -> tuple[Parent, ...]:
    cards = [None if one is None else {"license": one} for one in licenses]
    base = Parent("base", "base", BASE, "a" * 40, card=cards[0])
    more = [
        Parent(f"a{n}", "adapter", f"me/a{n}", weight=0.5, card=c)
        for n, c in enumerate(cards[1:], 1)
    ]
    return (base, *more)


def codes(made: Card) -> list[str]:
    return [p.code for p in made.problems if p.severity == "error"]


# ------------------------------------------------------------------------------- hostile texts


@pytest.mark.parametrize("text", EVIL)
def test_text_of_others_is_nothing_but_text(text):
    assert tags(f"Before {plain(text)} after.") - {"code"} == {"p"}
    assert tags(f"# {plain(text)}") <= {"h1", "code"}
    assert tags(f"Before {code(text)} after.") == {"p", "code"}
    rows = table(("a", "b"), [(plain(text), code(text, cell=True))])
    assert tags(rows) == {"table", "thead", "tbody", "tr", "th", "td", "code"}


@given(st.text(max_size=60))
def test_any_text_is_nothing_but_text(text):
    assert tags(f"Before {plain(text)} after.") - {"code"} == {"p"}
    assert tags(f"Before {code(text)} after.") == {"p", "code"}


VALUES = st.recursive(
    st.text(max_size=40) | st.integers() | st.booleans() | st.none() | st.sampled_from(EVIL),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(min_size=1, max_size=9), VALUES, min_size=1))
def test_metadata_comes_back_as_it_was_and_ends_nothing(values):
    text = dumped(values)
    assert yaml.safe_load(text) == values
    found, raw, rest = front_matter(f"---\n{text}---\nbody")
    assert (found, rest) == (values, "body")
    assert raw is not None


@pytest.mark.parametrize("name", EVIL)
def test_a_card_with_hostile_names_says_the_same_and_no_more(adapter, name):
    recipe = {"adapters": [{"source": name, "weight": name}], "method": name, name or "x": name}
    facts = Facts(
        parents=(Parent("b", "base", BASE), Parent(name, "adapter", None, name, name)),
        kinds={"LowRank": 1, name: 2}, dtypes={name: 1}, trigger_words=(name, name), recipe=recipe,
        versions={"loratools": name}, format="peft", task="CAUSAL_LM",
    )  # fmt: skip
    made = card(adapter, facts, license="apache-2.0", repo="me/merged")
    data, there = read_back(made.text)
    assert data == dict(made.data)
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == BASE
    assert made.text.count("\n---\n") == 1
    harmless = {
        "h1", "h2", "p", "a", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "ul",
        "li",
    }  # fmt: skip
    assert tags(there.text) <= harmless
    assert rendered(there.text).links == {f"https://huggingface.co/{BASE}"}
    blocks = [t.content for t in MarkdownIt().parse(there.text) if t.info == "yaml"]
    assert len(blocks) == 1
    yaml.safe_load(blocks[0])
    titles = [t for t in there.text.splitlines() if t.startswith("#")]
    assert titles[0] == "# merged"


def test_a_hostile_name_of_a_folder_is_only_a_title(tmp_path):
    folder = write_adapter(tmp_path / "<b>x</b> [y](z) `q`", base_model_name_or_path=BASE)
    made = card(artefact(folder), Facts(), license="mit")
    _, there = read_back(made.text)
    assert "b" not in tags(there.text)


# ------------------------------------------------------------------------------- what it says


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number in (1, 2):
        write_adapter(
            tmp_path / f"a{number}", number, base_model_name_or_path=BASE, task_type="CAUSAL_LM"
        )
    write_base(tmp_path / "base")
    return tmp_path


def made_of(folder: Path, **options: Any) -> tuple[Artefact, Card]:
    bases = options.get("base_model") or ()
    found = published.planned(folder, base_models=bases)
    return found, published.card_of(found, options, repo="me/name", ask=False)


def test_the_card_of_merged_adapters(here):
    loratools.merge(["a1", "a2"], weights=[0.7, 0.3], rank=3, out="merged")
    found, made = made_of(here / "merged", license="apache-2.0")
    assert made.problems == ()
    data, there = read_back(made.text)
    assert data == {
        "base_model": BASE, "base_model_relation": "adapter", "library_name": "peft",
        "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "merge", "loratools"],
    }  # fmt: skip
    digest = next(f.sha256() for f in found.files if f.name.endswith(".safetensors"))
    assert made.text.splitlines()[12] == MARKER
    for part in ("`a1`", "0.7", "0.3", "rank: 3", "method: linear", "truncation error", digest,
                 "loratools verify me/name", "merged from 2 adapters"):  # fmt: skip
        assert part in there.text, part
    assert "[More Information" not in made.text
    assert len(made.text.splitlines()) < 90
    assert made.text == made_of(here / "merged", license="apache-2.0")[1].text


def test_the_card_of_a_fold(here):
    loratools.merge(["a1"], "base", out="folded")
    _, made = made_of(here / "folded", license="apache-2.0", base_model=[BASE])
    assert made.problems == ()
    data, there = read_back(made.text)
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "finetune")
    assert data["library_name"] == "transformers"
    assert "update kept: 100.00%" in there.text
    assert "an adapter folded into its weights" in there.text


def test_adapters_of_the_hub_make_a_fold_a_merge(adapter):
    facts = Facts(parents=parents("mit", "mit", "mit"))
    whole = replace(adapter, kind="model", config={"architectures": ["LlamaForCausalLM"]})
    made = card(whole, facts, repo="me/x")
    data, there = read_back(made.text)
    assert data["base_model"] == [BASE, "me/a1", "me/a2"]
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "mit"
    assert data["tags"] == ["merge", "lora", "loratools"]
    assert f"`{'a' * 12}`" in there.text
    assert "org/base-model" in there.text


def test_what_parents_cards_say_is_joined_in_order_and_scores_are_not(adapter):
    cards = [
        {"license": "mit", "language": "en", "datasets": ["org/d1"], "pipeline_tag": "fill-mask"},
        {"license": "mit", "language": ["de", "en", False], "datasets": ["/srv/d", "org/d2"],
         "model-index": [{"name": "x", "results": []}], "tags": ["theirs"]},
    ]  # fmt: skip
    facts = Facts(
        parents=(Parent("b", "base", BASE, card=cards[0]), Parent("a", "adapter", card=cards[1]))
    )
    data, _ = read_back(card(adapter, facts).text)
    assert data["language"] == ["en", "de", "no"]
    assert data["datasets"] == ["org/d1", "org/d2"]
    assert data["pipeline_tag"] == "fill-mask"
    assert "model-index" not in data
    assert "theirs" not in data["tags"]


# ------------------------------------------------------------------------------- bases, licenses


def test_a_base_is_named_by_its_id_or_the_card_is_refused(tmp_path):
    local = artefact(write_adapter(tmp_path / "a", base_model_name_or_path="/srv/llama"))
    nothing = artefact(write_adapter(tmp_path / "b"))
    for found in (local, nothing):
        made = card(found, Facts(), license="mit")
        assert codes(made) == ["base_unnamed"]
        assert "/srv/llama" not in made.text
        without = card(found, Facts(), mode="none")
        assert codes(without) == (["base_unnamed"] if found is local else [])
        named = card(found, Facts(), license="mit", base_models=[BASE])
        assert codes(named) == []
        assert read_back(named.text)[0]["base_model"] == BASE
    for wrong in ("/srv/x", "./x", "a/b/c", "x\ny", ""):
        assert "base_unnamed" in codes(card(local, Facts(), license="mit", base_models=[wrong]))
    two = card(local, Facts(), license="mit", base_models=[BASE, "org/other"])
    assert codes(two) == ["base_unnamed"]


def test_a_model_that_nothing_says_was_made_from_another_needs_no_base(tmp_path):
    found = artefact(write_base(tmp_path / "m"))
    made = card(found, Facts(), license="mit")
    assert codes(made) == []
    assert "base_model" not in read_back(made.text)[0]


def test_the_license_is_that_of_all_parents_or_asked_for(adapter):
    same = card(adapter, Facts(parents=parents("mit", "mit")))
    assert read_back(same.text)[0]["license"] == "mit"
    for licenses in (("mit", "apache-2.0"), ("mit", None), (None, None)):
        made = card(adapter, Facts(parents=parents(*licenses)))
        (problem,) = made.problems
        assert problem.code == "license"
        assert "license" not in made.data
        rows = problem.message.splitlines()[1:]
        assert [r.strip().partition(": ")[0] for r in rows] == [f"base {BASE}", "adapter me/a1"]
        assert (licenses[1] or "unknown") in rows[1]
        settled = card(adapter, Facts(parents=parents(*licenses)), license="apache-2.0")
        assert codes(settled) == []
    assert codes(card(adapter, Facts())) == ["license"]


def test_other_needs_a_name_and_a_link(adapter):
    facts = Facts(parents=parents("other"))
    assert codes(card(adapter, facts)) == ["license"]
    assert codes(card(adapter, facts, license="other", license_name="x")) == ["license"]
    whole = card(adapter, facts, license="other", license_name="mine", license_link="LICENSE")
    data, _ = read_back(whole.text)
    assert (data["license_name"], data["license_link"]) == ("mine", "LICENSE")
    terms = {"license": "other", "license_name": "n", "license_link": "https://x.example/l"}
    all_same = card(adapter, Facts(parents=(Parent("b", "base", BASE, card=terms),)))
    assert {k: read_back(all_same.text)[0][k] for k in terms} == terms
    link = {"license": "other", "license_name": "x", "license_link": "javascript:alert(1)"}
    assert codes(card(adapter, facts, **link)) == ["license"]
    assert codes(card(adapter, facts, license="mit", license_name="x")) == ["license"]
    assert codes(card(adapter, facts, license_name="x")) == ["usage"]
    assert codes(card(adapter, facts, license="MIT\nx: y")) == ["license"]


def test_families_with_conditions_are_pointed_out(adapter):
    notes = card(adapter, Facts(parents=parents("llama3.1"))).notes
    assert any("Llama" in note for note in notes)
    assert not any("asks" in note for note in card(adapter, Facts(parents=parents("mit"))).notes)


def test_the_cards_of_parents_are_asked_of_the_hub_once_and_kept(hub, tmp_path):
    hub.put(BASE, {"README.md": "---\nlicense: apache-2.0\nlanguage: de\n---\n"})
    folder = write_adapter(tmp_path / "a", base_model_name_or_path=BASE)
    found = published.planned(folder)
    made = published.card_of(found, {})
    assert codes(made) == []
    data, _ = read_back(made.text)
    assert (data["license"], data["language"]) == ("apache-2.0", ["de"])
    asked = len(hub.log)
    hub.put(BASE, {"README.md": "---\nlicense: mit\n---\n"})
    offline = published.card_of(found, {}, ask=False)
    assert read_back(offline.text)[0] == data
    assert len(hub.log) == asked


def test_the_license_of_a_gated_base_is_public(hub, tmp_path):
    hub.put(BASE, {"README.md": "---\nlicense: gemma\n---\n"}, gated="manual")
    folder = write_adapter(tmp_path / "a", base_model_name_or_path=BASE)
    made = published.card_of(published.planned(folder), {})
    assert codes(made) == []
    assert read_back(made.text)[0]["license"] == "gemma"


def test_a_hub_without_these_cards_leaves_the_license_to_be_decided(hub, tmp_path):
    hub.put(BASE, {"config.json": "{}"})
    for name in (BASE, "org/nowhere"):
        folder = write_adapter(tmp_path / name, base_model_name_or_path=name)
        made = published.card_of(published.planned(folder), {})
        assert codes(made) == ["license"]
        assert name in made.problems[0].message


def test_the_card_of_a_parent_that_stands_here_is_read_if_it_is_that_parent(here):
    for number in (1, 2):
        (here / f"a{number}" / "README.md").write_text("---\nlicense: mit\n---\n")
    loratools.merge(["a1", "a2"], weights=[1, 1], out="merged")
    found = published.planned(here / "merged")
    facts = published.facts(found)
    assert [p.license for p in facts.parents] == [None, "mit", "mit"]
    write_adapter(here / "other", 9)
    shutil.copy(here / "other" / "adapter_model.safetensors", here / "a1")
    assert [p.license for p in published.facts(found).parents] == [None, None, "mit"]


# ------------------------------------------------------------------------------- cards of others

OWN = "---\nlicense: mit   # mine\ntags:\n- x\n---\n# Mine\n\nText --- `x`\n---\nend"
OWN = OWN.replace("\n", "\r\n")


def test_a_card_of_somebodys_own_is_kept_to_the_letter(adapter):
    made = card(adapter, Facts(parents=parents("apache-2.0")), existing=OWN)
    before, _, _ = made.text.partition("base_model: ")
    assert OWN.startswith(before)
    assert made.text.endswith(OWN.partition("- x\r\n")[2])
    there = ModelCard(made.text)
    assert there.data.license == "mit"
    assert there.data.tags == ["x"]
    assert there.data.base_model == BASE
    assert there.data.library_name == "peft"
    again = card(adapter, Facts(parents=parents("apache-2.0")), existing=made.text)
    assert again.text == made.text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80))
def test_a_card_without_metadata_gets_some_and_keeps_its_text(body):
    text = with_keys(body, {"license": "mit"})
    if not front_matter(body)[0]:
        assert text.endswith(body)
        assert ModelCard(text).data.license == "mit"


def test_our_card_is_written_anew_and_what_it_decided_stays(adapter):
    first = card(adapter, Facts(), license="apache-2.0")
    again = card(adapter, Facts(parents=parents("mit", None)), existing=first.text + "\nmore")
    assert codes(again) == []
    assert read_back(again.text)[0]["license"] == "apache-2.0"
    assert "more" not in again.text
    kept = card(adapter, Facts(), existing=first.text + "\nmore", mode="keep")
    assert kept.text == first.text + "\nmore"


def test_a_template_that_nobody_filled_in_is_no_card(adapter):
    template = Path(huggingface_hub.__file__).parent / "templates"
    text = (template / "modelcard_template.md").read_text()
    stock = (
        "---\nbase_model: /home/me/llama\nlicense: mit\ntags: [a]\n---\n"
        + text.partition("---\n")[2]
    )
    made = card(adapter, Facts(parents=parents("apache-2.0")), existing=stock)
    data, _ = read_back(made.text)
    assert (data["license"], data["base_model"]) == ("mit", BASE)
    assert "More Information" not in made.text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("---\nlicense: [\n---\n", "no YAML"),
        ("---\n- a\n---\n", "no mapping"),
        ("---\nbase_model: /home/me/x\n---\n", "base_model is /home/me/x"),
        ("---\ndatasets: [./d]\n---\n", "datasets"),
        ("---\nlicense: other\n---\n", "license_name"),
        ("---\na: &a [x]\nb: [*a, *a]\n---\n", "anchors"),
        ("---\na: !!python/object/apply:os.system [id]\n---\n", "no YAML"),
    ],
)
def test_a_card_that_the_hub_would_refuse_is_refused_here(adapter, tmp_path, text, part):
    facts = Facts(parents=parents("mit"))
    for made in (
        card(adapter, facts, existing=text, mode="keep"),
        card(adapter, facts, mode=str(_file(tmp_path, text))),
    ):
        assert "card" in codes(made)
        assert any(part in p.message for p in made.problems)


def _file(folder: Path, text: str) -> Path:
    (folder / "CARD.md").write_text(text)
    return folder / "CARD.md"


def test_a_file_is_sent_to_the_letter(adapter, tmp_path):
    text = f"---\nlicense: mit\nbase_model: {BASE}\n---\n# x\n"
    made = card(adapter, Facts(), mode=str(_file(tmp_path, text)))
    assert made.text == text
    assert made.problems == ()
    bare = card(adapter, Facts(), mode=str(_file(tmp_path, "# x")))
    assert [p.severity for p in bare.problems] == ["warning", "warning"]
    assert codes(card(adapter, Facts(), mode=str(tmp_path / "nothing.md"))) == ["not_found"]
    token = "hf_" + "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xYz1"
    leak = card(adapter, Facts(), mode=str(_file(tmp_path, text + token)))
    assert codes(leak) == ["secret"]
    assert token not in repr(leak.problems)
    assert card(adapter, Facts(), mode="none").text == ""


def test_ones_own_card_here_comes_before_ours_there_and_not_before_theirs(here):
    (here / "a1" / "README.md").write_text("# Mine\n")
    found = published.planned(here / "a1")
    options = {"license": "mit"}
    assert "# Mine" in published.card_of(found, options, existing=f"{MARKER}\nold", ask=False).text
    kept = published.card_of(found, options, existing="# There\n", ask=False)
    assert "# There" in kept.text
    assert any("--card README.md" in note for note in kept.notes)


# ------------------------------------------------------------------------------- results

RESULT = {
    "task_type": "text-generation", "dataset_type": "org/d", "dataset_name": "D | <b>",
    "metric_type": "accuracy", "metric_value": 0.5,
}  # fmt: skip


def test_measured_results_become_a_model_index(adapter, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([RESULT]))
    made = card(adapter, Facts(), license="mit", eval_results=path)
    there = ModelCard(made.text)
    (result,) = there.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("D | <b>", 0.5)
    assert yaml.safe_load(made.text.split("\n---\n")[0])["model-index"][0]["name"] == "one"
    assert "b" not in tags(there.text)
    path.write_text(yaml.safe_dump({"model-index": made.data["model-index"]}))
    assert card(adapter, Facts(), license="mit", eval_results=path).text == made.text


@pytest.mark.parametrize(
    "text", ["{", "[]", "a: b", "- a", json.dumps([{**RESULT, "odd": 1}]),
             json.dumps([{"task_type": "x"}]), json.dumps([{**RESULT, "metric_value": None}]),
             "model-index: [{}]"],
)  # fmt: skip
def test_results_that_are_none_are_refused(adapter, tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert codes(card(adapter, Facts(), license="mit", eval_results=path)) == ["card"]


def test_pictures_of_the_report_are_linked(here):
    (here / "a1" / "report").mkdir()
    (here / "a1" / "report" / "over lap).png").write_bytes(b"\x89PNG\r\n\x1a\n")
    _, made = made_of(here / "a1", license="mit")
    assert "![over lap)](report/over%20lap%29.png)" in made.text
    assert "img" in tags(made.text)
