"""The pickle walker: every opcode, every global that is not allowed, every way to grow."""

import io
import pickletools
import re

import pytest
import torch

from loratools.containers import pickle_walk, torch_zip
from loratools.errors import MalformedError
from tests.containers.torch_bytes import (
    DOUBLED,
    HONEST,
    NESTED,
    ORDERED,
    Op,
    archive,
    built,
    called,
    named,
    old,
    pickled,
    put,
    read,
    refused,
    stored,
    tensor,
)  # fmt: skip

HOSTILE = {
    "os.system": called(named("os", "system"), "touch canary"),
    "posix.system": called(named("posix", "system"), "touch canary"),
    "builtins.eval": called(named("builtins", "eval"), "open('canary', 'w')"),
    "builtins.getattr": called(named("builtins", "getattr"), ORDERED, "x"),
    "pydoc.locate": called(named("pydoc", "locate"), "os.system"),
    "ctypes.CDLL": called(named("ctypes", "CDLL"), "libc.so.6"),
    "timeit.timeit": called(named("timeit", "timeit"), "open('canary', 'w')"),
    "numpy.testing._private.utils.runstring": called(
        named("numpy.testing._private.utils", "runstring"), "open('canary', 'w')", {}
    ),
    "torch.hub.load": called(named("torch.hub", "load"), "a/b", "c"),
    "torch.hub._load_local": called(named("torch.hub", "_load_local"), ".", "c"),
    "torch.storage._load_from_bytes": called(named("torch.storage", "_load_from_bytes"), "x"),
    "torch.nn.modules.linear.Linear": named("torch.nn.modules.linear", "Linear"),
    "numpy.core.multiarray.scalar": called(named("numpy.core.multiarray", "scalar"), 1),
    "nowhere.Thing": called(named("nowhere", "Thing")),
    "collections.OrderedDict.__init__": named("collections", "OrderedDict.__init__"),
    "builtins.set": called(named("builtins", "set"), [1]),
}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A folder that must stay empty: what runs in a pickle would leave a file there."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def test_the_canary_sings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = built({"w": HOSTILE["os.system"]})
    torch.load(io.BytesIO(raw), weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("name", HOSTILE)
def test_every_other_global_is_refused_by_name(name):
    for raw in (old({"w": HOSTILE[name]}), pickled([HOSTILE[name]])):
        refused(raw, "hostile", f"pickle asks for {name},")
    for value in (HOSTILE[name], {"w": tensor(), "x": [HOSTILE[name]]}):
        refused(built(value), "hostile", f"pickle asks for {name},")
        # Cut off or spoilt behind the call, as pickles are that hide from scanners.
        for spoilt in (pickled(value)[:-1], pickled(value)[:-1] + b"\xff\xff."):
            refused(built(spoilt), "hostile", f"pickle asks for {name},")


def memoised(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def text4(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


CODE = b"c__main__\nCode\n"

PICKLES = {
    "asked for by protocol 4": (
        memoised(text4("os"), b"\x94", text4("system"), b"\x94\x93", text4("x"), b"\x85R"),
        "hostile",
        "os.system",
    ),
    "INST": (b"\x80\x02(X\x01\x00\x00\x00xios\nsystem\n.", "hostile", "os.system"),
    "INST of an allowed class": (b"\x80\x02(icollections\nOrderedDict\n.", "hostile", "INST"),
    "OBJ": (b"\x80\x02(" + ORDERED + b"o.", "malformed", "opcode OBJ"),
    "NEWOBJ": (b"\x80\x02" + ORDERED + b")\x81.", "malformed", "opcode NEWOBJ"),
    "EXT1": (b"\x80\x02\x82\x01.", "malformed", "opcode EXT1"),
    "no opcode": (b"\x80\x02\xff.", "malformed", "opcode 0xff"),
    "BUILD on a class": (b"\x80\x02" + ORDERED + b"}b.", "hostile", "sets attributes"),
    "BUILD on another class": (b"\x80\x02" + CODE + b"}b.", "hostile", "__main__.Code"),
    "BUILD on a dict": (b"\x80\x02}}b.", "hostile", "sets attributes"),
    "BUILD of other attributes": (
        b"\x80\x02" + called(ORDERED) + put({"__class__": 1}) + b"b.",
        "hostile",
        "sets attributes",
    ),
    "a call of text": (pickled(called(Op(put("x")))), "hostile", "calls a value of type str"),
    "a call of a storage": (pickled(called(named("torch", "FloatStorage"))), "hostile", "calls"),
    "a call without a tuple": (b"\x80\x02" + ORDERED + b"]R.", "hostile", "calls"),
    "a function as value": (pickled({"f": ORDERED}), "malformed", '"f" is a storage or a function'),
    "a storage as value": (pickled([stored()]), "malformed", "is a storage or a function"),
    "no STOP": (pickled(tensor())[:-1], "truncated", "without STOP"),
    "empty": (b"", "truncated", "without STOP"),
    "two objects": (pickled(1) + pickled(2), "malformed", "6 bytes follow"),
    "values left over": (b"\x80\x02NN.", "malformed", "left over"),
    "a mark left over": (b"\x80\x02(N.", "malformed", "left over"),
    "nothing on the stack": (b"\x80\x02.", "malformed", "left over"),
    "an empty stack": (b"\x80\x02aN.", "malformed", "empty stack"),
    "below the mark": (b"\x80\x02N(\x85.", "malformed", "empty stack"),
    "no mark": (b"\x80\x02Nt.", "malformed", "empty stack"),
    "an absent memo": (b"\x80\x02h\x07.", "malformed", "memo"),
    "protocol 6": (b"\x80\x06N.", "malformed", "protocol"),
    "protocol 1": (b"\x80\x01N.", "malformed", "protocol"),
    "protocol twice": (b"\x80\x02\x80\x02N.", "malformed", "protocol"),
    "a long frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "truncated", "frame"),
    "long text": (b"\x80\x04\x8d" + b"\xff" * 8 + b"N.", "truncated", "bytes early"),
    "long bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00N.", "truncated", "bytes early"),
    "text of half a surrogate": (b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.", "malformed", "UTF-8"),
    "a global without end": (b"\x80\x02cos" + b"x" * 600 + b"\n.", "malformed", "no end"),
    "a module that is no text": (b"\x80\x04K\x01\x8c\x01x\x93.", "malformed", "no text"),
    "a global that is no text": (b"\x80\x04\x8c\x01xK\x02\x93.", "malformed", "no text"),
    "a global in colours": (
        pickled(named("os", "\x1b[31msystem")), "hostile", "os.\\x1b[31msystem"
    ),
    "a key twice": (b"\x80\x02}K\x01NsK\x01Ns.", "duplicate", "key 1 stands twice"),
    "a key twice in pairs": (
        pickled(called(ORDERED, [["a", 1], ["a", 2]])), "malformed", "the key a twice"
    ),
    "pairs with a number as key": (pickled(called(ORDERED, [[1, 2]])), "malformed", "is no text"),
    "pairs that are none": (pickled(called(ORDERED, [[1]])), "malformed", "list of pairs"),
    "a list as key": (b"\x80\x02}]Ns.", "malformed", "is a key"),
    "a tuple as key": (b"\x80\x02})Ns.", "malformed", "is a key"),
    "a huge number as key": (b"\x80\x02}" + put(1 << 61) + b"Ns.", "malformed", "is a key"),
    "half a pair": (b"\x80\x02}(Nu.", "malformed", "sets keys"),
    "keys of a list": (b"\x80\x02]NNs.", "malformed", "sets keys"),
    "appended to a tuple": (b"\x80\x02)Na.", "malformed", "appends"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "hostile", "nest deeper"),
    **{name: (raw, "hostile", "nest deeper") for name, raw in NESTED.items()},
    **{name: (raw, "hostile", "unfolds") for name, raw in DOUBLED.items()},
}  # fmt: skip


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_refused(name):
    raw, code, message = PICKLES[name]
    refused(built(raw), code, message)


def test_every_opcode_is_known_or_refused_by_its_name():
    for opcode in pickletools.opcodes:
        raw = b"\x80\x05" + opcode.code.encode("latin1") + b"N" * 9 + b"."
        with pytest.raises(MalformedError) as caught:
            pickle_walk.walk(raw, 0, "x", names={})
        spelt = re.search("uses the opcode (\\S+),", caught.value.message)
        assert spelt is None or spelt[1] == opcode.name


def test_a_pickle_of_too_many_steps_is_refused(monkeypatch):
    raw = built({"w": [0] * 1000})
    assert read(raw) == {"w": [0] * 1000}
    monkeypatch.setattr(pickle_walk, "STEPS", 1000)
    refused(raw, "hostile", "more than 1000 steps")


def test_calls_that_copy_count_as_steps(monkeypatch):
    """An argument taken from the memo costs two bytes, whatever its length."""
    pairs = put([[str(i), 0] for i in range(300)]) + b"q\x00"
    again = ORDERED + b"q\x01h\x00\x85R" + b"h\x01h\x00\x85R" * 99
    raw = built(b"\x80\x02(" + pairs + again + b"t.")
    assert len(read(raw)) == 101
    monkeypatch.setattr(pickle_walk, "STEPS", 10_000)
    refused(raw, "hostile", "more than 10000 steps")


def test_a_pickle_beyond_the_limit_is_refused_unread(monkeypatch):
    monkeypatch.setattr(torch_zip, "LIMIT", 100)
    refused(archive(*HONEST), "malformed", "at most 100 are read")
