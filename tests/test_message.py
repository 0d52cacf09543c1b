"""The codec: every value comes back bit for bit, every byte is counted, hostile bytes raise CodecError only."""

import gc
import math
import mmap
import struct
import tracemalloc
import weakref
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedloom import message
from fedloom.encoding import MAX_DEPTH, Pieces, check, decode, encode, same, sizes
from fedloom.errors import CodecError, UsageError
from fedloom.message import Packed, Seed, Sparse, deliver
from fedloom.random import numpy_stream, stream
from fedloom.vector import Layout, Vector
from fedloom.wire import Reader, head, pack

DTYPES = sorted(message.DTYPES)
LAYOUT = Layout(("body.weight", "body.bias", "norm.mean"), ((2, 3), (2,), (2,)), 2)


def raw(tensor):
    """The bytes of a tensor, by a way that the codec does not take."""
    plain = tensor.detach().contiguous()
    start = plain.storage_offset() * plain.element_size()
    octets = bytes(plain.untyped_storage())[start : start + plain.nbytes]
    return tensor.dtype, tuple(tensor.shape), octets


def form(value):
    """What a value is, as plain Python: two values are the same when their forms are equal."""
    match value:
        case torch.Tensor():
            return raw(value)
        case Vector():
            return "Vector", value.layout, raw(value.flat)
        case Sparse():
            return "Sparse", value.size, raw(value.index), raw(value.values)
        case Packed():
            return "Packed", value.bits, raw(value.values)
        case float():
            return "float", struct.pack(">d", value)
        case list() | tuple():
            return type(value), [form(item) for item in value]
        case dict():
            return dict, [(type(key), key, form(item)) for key, item in value.items()]
        case _:
            return type(value), value


def tensor_of(name, *shape, seed=0):
    """Any bits that the dtype can hold: NaNs, infinities and subnormal numbers among them."""
    dtype = getattr(torch, name)
    octets = numpy_stream(seed, "octets").bytes(math.prod(shape) * dtype.itemsize)
    if not octets:
        return torch.zeros(0, dtype=torch.uint8).view(dtype).reshape(shape)
    flat = torch.frombuffer(bytearray(octets), dtype=torch.uint8)
    return (flat & 1 if name == "bool" else flat).view(dtype).reshape(shape)


def round_trip(fields):
    data = encode(fields)
    counted = sizes(fields)
    assert sum(counted.values()) == len(data)
    assert list(counted) == [*fields, "envelope"]
    back = decode(data)
    assert form(back) == form(dict(fields))
    assert encode(back) == data
    assert same(back, dict(fields))
    return back


def one(value):
    return round_trip({"value": value})["value"]


def everything():
    g = stream(0, "everything")
    return {
        "none": None,
        "flags": [True, False],
        "counts": (0, -1, 127, 128, -32, -33, 2**16, -(2**31), 2**64 - 1, -(2**63)),
        "rate": 0.1,
        "text": "Zürich",
        "octets": bytes(range(40)),
        "named": {"a": 1, 2: {"deep": [(), [], {}]}},
        "model": Vector(torch.randn(10, generator=g), LAYOUT),
        "matrix": torch.randn(3, 2, generator=g),
        "half": torch.randn(5, generator=g).bfloat16(),
        "mask": Packed(torch.rand(11, generator=g) > 0.5, 1),
        "levels": Packed(torch.randint(0, 7, (2, 3), generator=g), 3),
        "few": Sparse.of(torch.randn(1000, generator=g), torch.tensor([999, 3, 40])),
        "many": Sparse.of(torch.randn(20, 2, generator=g), torch.rand(20, generator=g) > 0.4),
        "seed": Seed(2**63 - 1),
    }


# Round trips


def test_the_first_bytes_are_those_of_the_specification():
    assert encode({"a": 1, "b": (2,)}) == b"MHM\x01" + b"\x82" + b"\xa1a\x01" + b"\xa1b\xc7\x02\x01\x91\x02"
    tensor = b"\xa5int16" + b"\x91\x02" + b"\x01\x00\xff\xff"
    assert encode({"t": torch.tensor([1, -1], dtype=torch.int16)}) == b"MHM\x01\x81\xa1t" + b"\xc7\x0c\x02" + tensor


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (0, 4), (3, 1, 2)])
def test_tensors_of_every_dtype_come_back_bit_for_bit(name, shape):
    back = one(tensor_of(name, *shape))
    back.view(-1).view(torch.uint8).fill_(1)  # writable, and no warning about it
    assert set(raw(back)[2]) <= {1}


def test_all_plain_number_types_of_this_torch_are_known():
    known = {getattr(torch, name) for name in DTYPES}
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    usable = {d for d in dtypes if str(d).split(".")[1].startswith(("float", "bfloat", "complex", "bool"))}
    assert usable <= known


def test_every_vector_dtype_comes_back_and_layouts_are_shared():
    for name in ("float16", "bfloat16", "float32", "float64", "float8_e5m2"):
        back = one(Vector(tensor_of(name, 10), LAYOUT))
        assert back.readonly
    assert back.layout is one(Vector(torch.zeros(10), LAYOUT)).layout
    big = Layout(tuple(f"layer{place}.weight" for place in range(9000)), ((1,),) * 9000, 9000)
    assert one(Vector(torch.zeros(9000), big)).layout == big
    assert one(Vector(torch.zeros(0), Layout((), (), 0))).layout.names == ()


def test_large_layouts_are_not_kept():
    """A stranger may send any number of them."""
    big = Layout(tuple(f"layer{place}.weight" for place in range(9000)), ((1,),) * 9000, 9000)
    layout = weakref.ref(one(Vector(torch.zeros(9000), big)).layout)
    gc.collect()
    assert layout() is None


def test_strides_conjugates_and_negations_are_resolved():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(one(matrix.T), matrix.T)
    assert torch.equal(one(matrix[:, ::2]), matrix[:, ::2])
    assert one(torch.ones(1).expand(4)).tolist() == [1.0] * 4
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert decode(encode({"z": z.conj()}))["z"].tolist() == [1 - 2j, 3 + 4j]
    assert decode(encode({"z": z.conj().imag}))["z"].tolist() == [-2.0, 4.0]
    alone = z[:1].conj().imag  # which lies in one piece, so that nothing else copies it
    assert alone.is_neg() and alone.is_contiguous() and decode(encode({"z": alone}))["z"].tolist() == [-2.0]
    assert one(matrix.T[:1, :1]).tolist() == [[0.0]] and one(matrix[0, ::2][1:]).tolist() == [2.0], "one at a stride"
    assert one(torch.tensor(np.zeros(0, np.uint8)).expand(3, 0)).shape == (3, 0)
    assert one(torch.tensor(np.zeros(0, np.float32))).shape == (0,)
    assert torch.equal(one(nn.Parameter(matrix, requires_grad=False).data), matrix)


KEYS = st.one_of(st.text(max_size=4), st.integers(-(2**63), 2**64 - 1))
SEEDS = st.integers(0, 2**63 - 1)
SHAPES = st.lists(st.integers(0, 4), max_size=3)
TENSORS = st.builds(
    lambda name, shape, seed: tensor_of(name, *shape, seed=seed), st.sampled_from(DTYPES), SHAPES, SEEDS
)
VECTORS = st.builds(lambda seed: Vector(tensor_of("float32", 10, seed=seed), LAYOUT), SEEDS)


@st.composite
def sparses(draw):
    size = draw(st.sampled_from([0, 1, 2, 9, 255, 256, 257, 70_000]))
    index = draw(st.sets(st.integers(0, size - 1), max_size=40)) if size else set()
    tail = draw(st.sampled_from([(), (2,), (0,)]))
    values = tensor_of(draw(st.sampled_from(["float32", "bfloat16"])), len(index), *tail)
    return Sparse(torch.tensor(sorted(index), dtype=torch.int64), values, size)


@st.composite
def packeds(draw):
    bits = draw(st.integers(1, 32))
    shape = draw(SHAPES)
    numbers = numpy_stream(draw(SEEDS), "numbers").integers(0, 1 << bits, math.prod(shape))
    return Packed(torch.tensor(numbers, dtype=torch.int64).reshape(shape), bits)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=40),
    TENSORS,
    VECTORS,
    sparses(),
    packeds(),
    SEEDS.map(Seed),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)
NAMES = st.text(max_size=6).filter(lambda name: name.isidentifier() and name != "envelope")
MESSAGES = st.dictionaries(NAMES, VALUES, max_size=4)
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")  # torch, when complex32 is copied
@QUICK
@given(MESSAGES)
def test_any_message_comes_back_is_counted_exactly_and_has_one_encoding(fields):
    round_trip(fields)
    before = form(fields)
    assert form(deliver(fields)) == form(message.copy(fields)) == before


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(KEYS, inner, max_size=8),
    max_leaves=10,
)


@QUICK
@given(st.dictionaries(NAMES, PLAIN, max_size=3))
def test_plain_messages_are_the_bytes_that_msgpack_writes(fields):
    assert encode(fields)[4:] == msgpack.packb(fields)


@pytest.mark.parametrize("length", [0, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_every_form_of_a_length_is_msgpacks(length):
    for value in ("x" * length, b"x" * length, [None] * length, dict.fromkeys(range(length))):
        data = encode({"f": value})
        assert data[4:] == msgpack.packb({"f": value})
        assert decode(data) == {"f": value}
        assert sum(sizes({"f": value}).values()) == len(data)
    code, body = msgpack.unpackb(encode({"t": torch.zeros(length, dtype=torch.uint8)})[4:])["t"]
    assert code == 2
    assert body.endswith(bytes(length))
    assert decode(encode({"f": (None,) * length})) == {"f": (None,) * length}


@pytest.mark.parametrize("edge", [2**7, 2**8, 2**16, 2**32, -(2**5), -(2**7), -(2**15), -(2**31), 2**63 - 1])
def test_every_form_of_an_int_is_msgpacks(edge):
    for number in (edge - 1, edge, edge + 1):
        assert encode({"f": number})[4:] == msgpack.packb({"f": number})
        one(number)


# Tensors of more than 4 GiB: in a file without blocks, and mapped, so that nobody needs so much memory


@pytest.fixture
def hollow(tmp_path):
    """`hollow(size, begin)`: so many bytes that may be written to, those of `begin` first; all others are zero."""

    def made(size, begin=b""):
        with (tmp_path / "hollow").open("w+b") as file:
            file.write(begin)
            file.truncate(size)
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)

    return made


WIDE = b"MHM\x01\x81\xa1w\xc1"  # a message with one field, up to the head of a wide extension


def wide(dtype, *shape):
    """The bytes of a message of one wide tensor before its numbers, with the number of those, by msgpack's own hand."""
    about = b"".join(map(msgpack.packb, (str(dtype).removeprefix("torch."), shape)))
    size = math.prod(shape) * dtype.itemsize
    return WIDE + struct.pack(">Q", len(about) + size) + b"\x02" + about, size


@pytest.mark.parametrize(("dtype", "count"), [(torch.uint8, 2**32), (torch.float32, 2**30 + 1)])
def test_a_tensor_of_more_than_4_gib_has_a_length_of_64_bits(hollow, dtype, count):
    begin, size = wide(dtype, count)
    memory = np.frombuffer(hollow(size), np.uint8)
    memory[-3:] = 1, 2, 3
    message = {"w": torch.from_numpy(memory).view(dtype)}
    pieces = Pieces(message)
    assert len(pieces) == len(begin) + size == sum(sizes(message).values())
    assert pieces.read(0, len(begin) + 5) == begin + bytes(5)
    assert pieces.read(len(pieces) - 5, 100) == bytes((0, 0, 1, 2, 3))


def test_the_longest_extension_of_32_bits_keeps_its_form(hollow):
    about = msgpack.packb("uint8") + msgpack.packb([2**32 - 1])
    most = 2**32 - 1 - len(about)
    message = {"w": torch.from_numpy(np.frombuffer(hollow(most), np.uint8))}
    assert Pieces(message).read(0, 13) == WIDE[:-1] + b"\xc9\xff\xff\xff\xff\x02"
    assert sum(sizes(message).values()) == len(WIDE) + 4 + 1 + 2**32 - 1
    message = {"w": torch.zeros(1, dtype=torch.uint8).expand(most + 1)}
    assert sum(sizes(message).values()) == len(WIDE) + 8 + 1 + 2**32


def test_a_vector_of_more_than_4_gib_is_counted_and_written_alike(hollow):
    vector = Vector(torch.from_numpy(np.frombuffer(hollow(2**32), np.float32)), Layout(("w",), ((2**30,),), 1))
    counted = sum(sizes({"w": vector}).values())
    pieces = Pieces({"w": vector})
    assert len(pieces) == counted
    assert pieces.read(0, 17) == WIDE + struct.pack(">Q", counted - len(WIDE) - 9) + b"\x03"


def test_a_tensor_of_more_than_4_gib_is_read(hollow, monkeypatch):
    # Its numbers are looked at where they lie: a copy would take the memory that this test does without.
    monkeypatch.setattr(Reader, "copy", lambda self, count: self.take(count))
    begin, size = wide(torch.float32, 2**20, 1025)
    data = memoryview(hollow(len(begin) + size, begin))
    data[-4:] = struct.pack("<f", 1.5)
    found = decode(data, limit=len(data))["w"]
    assert (found.dtype, found.shape, found[-1, -1], found[0, 0]) == (torch.float32, (2**20, 1025), 1.5, 0)
    with pytest.raises(CodecError, match=f"a message of {len(data)} bytes is over the limit of 2147483648"):
        decode(data)
    announced = struct.unpack(">Q", begin[8:16])[0]
    for short, what in (
        (1, f"byte 17: {announced} bytes are announced, {announced - 1} are left"),
        (2, f"an extension of length {announced} is announced, {announced - 1} bytes are left"),
        (2**32, f"an extension of length {announced} is announced, {announced + 1 - 2**32} bytes are left"),
    ):
        with pytest.raises(CodecError, match=what):
            decode(data[:-short], limit=len(data))
    with pytest.raises(CodecError, match=f"byte {len(data)}: 1 bytes too many"):
        decode(memoryview(hollow(len(data) + 1, begin)), limit=2 * len(data))
    lied, size = wide(torch.float32, 2**20, 1024)
    lied = lied.replace(struct.pack(">Q", len(lied) + size - 17), struct.pack(">Q", len(lied) + size - 13))
    with pytest.raises(CodecError, match=f"byte {len(lied) + size}: 4 bytes too many"):
        decode(memoryview(hollow(len(lied) + size + 4, lied)), limit=2 * len(data))


def test_of_a_mapped_message_little_is_in_memory_beside_the_tensor(tmp_path):
    path, numbers = tmp_path / "message", torch.arange(2**22, dtype=torch.int32)  # 16 MiB
    path.write_bytes(encode({"a": "b", "w": numbers}))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    before = resident("File")
    found = decode(memoryview(mapped))["w"]
    assert resident("File") - before < 2**22
    assert torch.equal(found, numbers)
    found += 1  # its own memory
    assert decode(memoryview(mapped))["w"][-1] == numbers[-1]


def test_what_was_written_to_a_mapped_message_is_not_lost(hollow):
    begin = encode({"w": torch.zeros(2**22, dtype=torch.uint8)})
    data = memoryview(hollow(len(begin), begin[:100]))
    data[2**21] = 7
    for _ in range(2):
        assert decode(data)["w"].sum() == 7


def resident(what):
    """Bytes of this process in memory: Anon, or File."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"Rss{what}:")) * 1024


# Wire types


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 9, 16, 20, 24, 31, 32])
def test_packed_numbers_stand_one_after_another_from_the_lowest_bit(bits):
    numbers = numpy_stream(1, "numbers").integers(0, 1 << bits, 13)
    expected = sum(int(number) << (place * bits) for place, number in enumerate(numbers))
    assert pack(numbers, bits) == expected.to_bytes((13 * bits + 7) // 8, "little")
    one(Packed(torch.tensor(numbers), bits))


@pytest.mark.parametrize("bits", [33, 40, 63, 64])
def test_numbers_of_up_to_64_bits_can_be_packed(bits):
    numbers = numpy_stream(1, "numbers").integers(0, 1 << bits, 13, np.uint64)
    numbers[:2] = 0, 2**bits - 1
    data = pack(numbers, bits)
    expected = sum(int(number) << (place * bits) for place, number in enumerate(numbers))
    assert data == expected.to_bytes((13 * bits + 7) // 8, "little")
    assert Reader(memoryview(data), 0, len(data), 0, iter(())).integers(13, bits).tolist() == numbers.tolist()


@pytest.mark.parametrize("name", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_packed_keeps_its_dtype(name):
    assert one(Packed(tensor_of("bool", 3, 5).to(getattr(torch, name)), 1)).values.dtype == getattr(torch, name)


def test_a_mask_is_one_bit_an_entry():
    small, large = (sizes({"mask": Packed(torch.ones(n, dtype=torch.bool), 1)})["mask"] for n in (80_000, 160_000))
    assert large - small == 10_000


@pytest.mark.parametrize(
    ("m", "size"), [(0, 600), (3, 600), (59, 600), (60, 600), (61, 600), (600, 600), (1, 1), (2, 70_000)]
)
def test_a_sparse_index_takes_the_shorter_of_a_list_and_a_mask(m, size):
    sparse = Sparse(torch.arange(m), torch.zeros(m), size)
    body = msgpack.unpackb(encode({"s": sparse})[4:])["s"].data
    header = b"".join(msgpack.packb(part) for part in (size, "float32", [m]))
    bits = max(1, math.ceil(math.log2(size)))
    assert len(body) - len(header) - 4 * m == min(math.ceil(m * bits / 8), math.ceil(size / 8))
    one(sparse)


def test_where_list_and_mask_are_equally_long_a_sparse_has_the_list():
    """Both sides must choose alike, and so must every version that writes these bytes."""
    sparse = Sparse(torch.tensor([3, 6]), torch.tensor([1.0, -2.0], dtype=torch.float16), 8)
    body = b"\x08" + b"\xa7float16" + b"\x91\x02" + bytes([0b110_011]) + b"\x00\x3c\x00\xc0"
    assert encode({"s": sparse}) == b"MHM\x01\x81\xa1s" + b"\xc7" + bytes([len(body)]) + b"\x04" + body


def test_sparse_and_dense_agree():
    g = stream(0, "sparse")
    for shape in ((50,), (50, 3)):
        dense = torch.randn(shape, generator=g)
        index = torch.randperm(50, generator=g)[:7]
        kept = torch.zeros(shape)
        for place in index.tolist():
            kept[place] = dense[place]
        mask = torch.zeros(50, dtype=torch.bool)
        mask[index] = True
        assert torch.equal(Sparse.of(dense, index).dense(), kept)
        assert torch.equal(Sparse.of(dense, mask).dense(), kept)
        doubles = Sparse.of(dense.double(), mask).dense()
        assert torch.equal(doubles, kept.double()) and doubles.dtype == torch.float64


def test_a_seed_expands_to_the_same_tensor_and_no_other():
    draw = Seed(5).expand(200, 100)
    assert torch.equal(draw, one(Seed(5)).expand(200, 100))
    assert not torch.equal(draw, Seed(6).expand(200, 100))
    assert abs(draw.mean()) < 0.03
    assert abs(draw.std() - 1) < 0.03
    assert torch.equal(Seed(5).expand(200, 100, dtype=torch.float64), draw.double()), "whatever the dtype"
    uniform = Seed(5).expand(20_000, distribution="uniform", dtype=torch.float64)
    assert uniform.dtype == torch.float64
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    sign = Seed(5).expand(20_000, distribution="sign")
    assert set(sign.tolist()) == {-1.0, 1.0}
    assert abs(sign.mean()) < 0.03
    for distribution in ("normal", "uniform", "sign"):
        assert Seed(5).expand(distribution=distribution).shape == ()
        assert Seed(5).expand(0, 3, distribution=distribution).shape == (0, 3)
    with pytest.raises(UsageError, match="unknown distribution 'normale'; did you mean 'normal'"):
        Seed(5).expand(3, distribution="normale")


def test_the_distributions_of_a_seed_are_drawn_apart():
    normal, uniform = (
        torch.tensor([Seed(seed).expand(1, distribution=name).item() for seed in range(300)])
        for name in ("normal", "uniform")
    )
    assert abs(torch.corrcoef(torch.stack([normal.abs(), uniform]))[0, 1]) < 0.25


# Counting, comparing, delivering


def test_sizes_reads_and_copies_no_tensor():
    wide = torch.zeros(1).expand(2**29)  # 2 GiB if anybody copied it
    vector = Vector(wide, Layout(("w",), ((2**29,),), 1))
    tracemalloc.start()
    assert sum(sizes({"t": wide, "v": vector, "p": Packed(torch.ones(80, dtype=torch.bool), 1)}).values()) > 2**32
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_encoding_and_decoding_hold_one_copy():
    vector = Vector(torch.zeros(600_000), Layout(("w",), ((600_000,),), 1))
    data = encode({"model": vector})
    for work in (lambda: encode({"model": vector}), lambda: decode(data)):
        tracemalloc.start()
        work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.1 * len(data)


def test_same_tells_what_equality_does_not():
    vector = Vector(torch.zeros(10), LAYOUT)
    other = Vector(torch.zeros(10), Layout(("a", "b", "c"), LAYOUT.shapes, 2))
    for a, b in [
        (1, True), (1, 1.0), (0.0, -0.0), ("a", b"a"), ((1,), [1]), ({1: 0}, {"1": 0}), ([], {}), (None, False),
        (torch.zeros(2), torch.zeros(2).double()), (torch.zeros(2), torch.zeros(1, 2)), (vector, vector.flat),
        (vector, other), (torch.zeros(1), -torch.zeros(1)), (Seed(1), 1), (torch.zeros(1), torch.zeros(())),
    ]:  # fmt: skip
        assert same(a, a)
        assert not same(a, b)
    nan = torch.tensor([float("nan")])
    assert same({"loss": nan}, {"loss": nan.clone()})
    assert same(torch.zeros(2, 3).T, torch.zeros(3, 2))


def test_deliver_shares_memory_and_copy_does_not():
    fields = everything()
    delivered, copied = deliver(fields), message.copy(fields)
    assert delivered["matrix"] is fields["matrix"]
    assert delivered["model"].flat is fields["model"].flat
    assert delivered["model"].readonly
    assert not fields["model"].readonly
    assert all(type(delivered[name]) is type(value) for name, value in fields.items())
    deep = deliver({"a": [({"b": fields["model"]},)]})["a"][0][0]["b"]
    assert deep.readonly and deep.flat is fields["model"].flat
    assert delivered["named"] is not fields["named"]
    assert delivered["named"][2]["deep"] is not fields["named"][2]["deep"]
    before = encode(fields)
    few, levels = copied["few"], copied["levels"]
    for mine in (copied["matrix"], copied["model"].flat, few.index, few.values, levels.values):
        mine.zero_()
    copied["flags"].clear()
    assert encode(fields) == before


def test_what_is_moved_stays_readonly_or_not():
    fields = {"a": [Vector(torch.zeros(10), LAYOUT, readonly=True), Vector(torch.zeros(10), LAYOUT)]}
    moved = message.moved(fields, torch.device("cpu"))["a"]
    assert [vector.readonly for vector in moved] == [True, False] and moved[0].flat is fields["a"][0].flat


def test_check_begins_with_where_and_passes_what_may_cross():
    check(everything(), "reply of client 3")
    with pytest.raises(CodecError, match=r"^reply of client 3: field 'delta' -> \[1\] -> 'x': set may not cross"):
        check({"delta": [0, {"x": {1}}]}, "reply of client 3")


# What may not cross


class Named(tuple):
    __slots__ = ()


def nested(depth, kind=list):
    value = kind()
    for _ in range(depth - 1):
        value = {0: value} if kind is dict else kind([value])
    return value


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({1}, "field 'f': set may not cross: a message holds None, bool, int"),
        ([0, ({"x": object()},)], r"field 'f' -> \[1\] -> \[0\] -> 'x': object may not cross"),
        ({3: {"y": print}}, "field 'f' -> 3 -> 'y': builtin_function_or_method may not cross"),
        (Named((1,)), "test_message.Named may not cross"),
        (np.float64(1), r"field 'f': numpy.float64 may not cross: call .item\(\) for a number"),
        (np.zeros(()), r"numpy.ndarray may not cross: call .item\(\) for a number, torch.from_numpy for an array"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear may not cross"),
        (torch.float32, "torch.dtype may not cross"),
        (2**64, r"field 'f': an int from -2\*\*63 to 2\*\*64 - 1 is expected"),
        ([1, -(2**63) - 1], r"field 'f' -> \[1\]: an int from -2\*\*63 to 2\*\*64 - 1 is expected"),
        ("\ud800", "a str with half a surrogate pair has no UTF-8"),
        ({1.5: 0}, "field 'f' -> 1.5: a key of type float; the keys of a dict are str or int"),
        ({True: 0}, "a key of type bool"),
        ({None: 0}, "a key of type NoneType"),
        ({b"k": 0}, "a key of type bytes"),
        ({np.int64(1): 0}, "a key of type numpy.int64"),
        (torch.zeros(1, requires_grad=True), "a tensor that requires grad may not cross: detach it"),
        (Vector(torch.zeros(10, requires_grad=True), LAYOUT), "a tensor that requires grad may not cross: detach it"),
        (
            Sparse(torch.zeros(1).long(), torch.zeros(1, requires_grad=True), 1),
            "requires grad may not cross: detach it",
        ),
        (torch.zeros(2, 2).to_sparse(), "a tensor of layout torch.sparse_coo on cpu may not cross: make it dense"),
        (torch.zeros(2, device="meta"), "a tensor of layout torch.strided on meta may not cross"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "a tensor of torch.bits8 may not cross"),
        (torch.zeros([1] * 65), "a tensor of 65 dimensions may not cross; the limit is 64"),
        (nested(MAX_DEPTH + 1), "more than 16 lists, tuples or dicts inside one another"),
        (nested(MAX_DEPTH + 1, tuple), "more than 16 lists, tuples or dicts inside one another"),
        (nested(MAX_DEPTH + 1, dict), "more than 16 lists, tuples or dicts inside one another"),
        (nested(5000), "more than 16 lists"),
        (bytes(2**32), r"field 'f': a value of 4294967296 bytes or items is too large.* the limit is 2\*\*32 - 1"),
        (torch.zeros(1).expand(2**62), r"field 'f': a tensor of shape \[4611686018427387904\], which no machine holds"),
        (torch.zeros(1).expand(2**20, 0, 2**60), "which no machine holds"),
    ],
)
def test_what_may_not_cross_says_where_it_stands(value, error):
    for refuse in (encode, sizes, check):
        with pytest.raises(CodecError, match=error):
            refuse({"f": value})


def test_a_tensor_has_up_to_64_dimensions():
    one(torch.zeros([1] * 64))


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_sixteen_containers_may_stand_inside_one_another(kind):
    one(nested(MAX_DEPTH, kind))


def test_a_list_that_holds_itself_is_too_deep():
    loop = []
    loop.append(loop)
    with pytest.raises(CodecError, match="more than 16 lists"):
        encode({"f": loop})


@pytest.mark.parametrize("name", ["envelope", "two words", "", "1st", 3, None])
def test_a_field_is_called_by_an_identifier(name):
    with pytest.raises(CodecError, match="a field is called by an identifier other than 'envelope', not by"):
        encode({name: 1})


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: Sparse(torch.tensor([1, 1]), torch.zeros(2), 5), "ascends strictly, from 0 to less than its size 5"),
        (lambda: Sparse(torch.tensor([2, 1]), torch.zeros(2), 5), "ascends strictly"),
        (lambda: Sparse(torch.tensor([-1, 1]), torch.zeros(2), 5), "ascends strictly"),
        (lambda: Sparse(torch.tensor([1, 5]), torch.zeros(2), 5), "ascends strictly"),
        (lambda: Sparse(torch.tensor([1, 2]), torch.zeros(3), 5), r"with 2 indices needs float values \[2, ...\]"),
        (lambda: Sparse(torch.tensor([1]), torch.zeros(1).int(), 5), "got torch.int32"),
        (lambda: Sparse(torch.tensor([1]).int(), torch.zeros(1), 5), "int64 index"),
        (lambda: Sparse(torch.tensor([0]), torch.zeros(1), 2**63), "the size of a Sparse is an int"),
        (lambda: Sparse(torch.tensor([0]), torch.zeros(1), True), "the size of a Sparse is an int"),
        (lambda: Sparse(torch.tensor([]).long(), torch.zeros(0), -1), "the size of a Sparse is an int"),
        (lambda: Sparse.of(torch.zeros(5), torch.tensor([3, 3])), "ascends strictly"),
        (lambda: Packed(torch.zeros(2), 1), "a Packed holds a dense bool or integer tensor, got torch.float32"),
        (lambda: Packed(torch.tensor([0, 4]), 2), "numbers from 0 to 4 do not fit a Packed of 2 bits"),
        (lambda: Packed(torch.tensor([-1]), 2), "numbers from -1 to -1 do not fit"),
        (lambda: Packed(torch.tensor([1]), 33), "an int from 1 to 32, got 33"),
        (lambda: Packed(torch.tensor([True]), 2), "bits of a Packed of torch.bool are an int from 1 to 1, got 2"),
        (lambda: Seed(-1), r"a Seed is an int from 0 to 2\*\*63 - 1, got -1"),
        (lambda: Seed(2**63), "a Seed is an int"),
        (lambda: Seed(True), "a Seed is an int"),
    ],
)
def test_wire_types_refuse_what_they_cannot_carry(build, error):
    with pytest.raises(CodecError, match=error):
        build()


# Hostile bytes


def mp(*values):
    return b"".join(msgpack.packb(value) for value in values)


def field(body):
    return b"MHM\x01\x81\xa1f" + body


def extension(code, body):
    return field(head("extension", len(body)) + bytes((code,)) + body)


def vector(names, shapes, parameters, dtype="float32", numbers=b""):
    return extension(3, mp(mp(names, shapes, parameters), dtype) + numbers)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "not a message: it begins with b'', expected b'MHM'"),
        (b"\x80\x04junk", "not a message"),
        (b"MHM", r"a message of version \[\], expected \[1\]"),
        (b"MHM\x02\x80", r"a message of version \[2\], expected \[1\]"),
        (b"MHM\x01", "byte 4: 1 bytes are announced, 0 are left"),
        (b"MHM\x01\x90", "byte 5: list where dict is expected"),
        (b"MHM\x01\x80\x00", "byte 5: 1 bytes too many"),
        (b"MHM\x01\x81\x01\x01", "a field is called by an identifier other than 'envelope', not by 1"),
        (b"MHM\x01\x81\xa8envelope\x01", "a field is called by an identifier other than 'envelope'"),
        (b"MHM\x01\x81\xa2a b\x01", "byte"),
        (b"MHM\x01\x82\xa1a\x01\xa1a\x01", "byte 10: 'a' is twice a key of one dict"),
        (field(b"\x82\x01\x01\x01\x01"), "1 is twice a key of one dict"),
        (field(b"\x81\xc0\x01"), "a key of type None; the keys of a dict are str or int"),
        (field(b"\x81\xc3\x01"), "a key of type bool"),
        (field(b"\xd8"), "byte 8: 0xd8 begins no value of a message"),
        (field(b"\xc1"), "byte 7: 9 bytes are announced, 1 are left"),
        (field(b"\xc1" + bytes(7) + b"\x01\x01\x90"), "extension 1 is not in its shortest form"),
        (field(b"\xc1\x00\x00\x00\x00\xff\xff\xff\xff"), "extension 4294967295 is not in its shortest form"),
        (field(b"\xc1\x00\x00\x00\x01" + bytes(7)), "an extension of length 4294967296 is announced, 3 bytes"),
        (field(b"\xc1" + b"\xff" * 8 + b"\x02"), "an extension of length 18446744073709551615 is announced, 1 bytes"),
        (field(b"\xca\x00\x00\x00\x00"), "0xca begins no value"),  # a float of 4 bytes
        (field(b"\xd4\x01\x00"), "0xd4 begins no value"),  # fixext
        (field(b"\xcb\x00"), "8 bytes are announced, 1 are left"),
        (field(b"\xcc\x05"), "int 5 is not in its shortest form"),
        (field(b"\xd1\xff\xff"), "int -1 is not in its shortest form"),
        (field(b"\xd0\x05"), "int 5 is not in its shortest form"),
        (field(b"\xd9\x01a"), "str 1 is not in its shortest form"),
        (field(b"\xc5\x00\x01a"), "bytes 1 is not in its shortest form"),
        (field(b"\xdc\x00\x00"), "list 0 is not in its shortest form"),
        (field(b"\xde\x00\x00"), "dict 0 is not in its shortest form"),
        (field(b"\xc8\x00\x01\x01\x90"), "extension 1 is not in its shortest form"),
        (field(b"\xa2\xc3\x28"), "a str is not UTF-8"),
        (field(b"\xa3\xed\xa0\x80"), "a str is not UTF-8"),  # a surrogate
        (field(b"\xdd\xff\xff\xff\xff"), "a list of length 4294967295 is announced, 0 bytes are left"),
        (field(b"\xdf\xff\xff\xff\xff\x00"), "a dict of length 4294967295 is announced, 1 bytes are left"),
        (field(b"\x82\x01\x01\x02"), "a dict of length 2 is announced, 3 bytes are left"),
        (field(b"\xdb\xff\xff\xff\xff"), "a str of length 4294967295 is announced"),
        (field(b"\xc6\xff\xff\xff\xff"), "a bytes of length 4294967295 is announced"),
        (field(b"\x91" * 100 + b"\xc0"), "more than 16 lists, tuples or dicts inside one another"),
        (field(b"\x91" * 100_000 + b"\xc0"), "more than 16 lists"),
        (field(b"\x81\x00" * 100_000 + b"\xc0"), "more than 16 lists"),
        (extension(0, b""), "an extension of unknown type 0"),
        (extension(255, b""), "an extension of unknown type 255"),
        (extension(1, b"\x80"), "dict where list is expected"),
        (extension(1, b"\x90\x90"), "1 bytes too many"),
        (extension(1, b"\x92\x90"), "a list of length 2 is announced, 1 bytes are left"),
        (extension(2, mp("float23", [1]) + bytes(4)), "unknown dtype 'float23'"),
        (extension(2, mp(b"float32", [1]) + bytes(4)), "bytes where str is expected"),
        (extension(2, mp("float32", [2]) + bytes(4)), "8 bytes are announced, 4 are left"),
        (extension(2, mp("float32", [1]) + bytes(5)), "1 bytes too many"),
        (extension(2, mp("float32", [-1]) + bytes(4)), "-1 where a size from 0"),
        (extension(2, mp("float32", [2**63]) + bytes(4)), "9223372036854775808 where a size from 0"),
        (extension(2, mp("float32", [True]) + bytes(4)), "bool where int is expected"),
        (extension(2, mp("float32", [2**40]) + bytes(4)), "4398046511104 bytes are announced, 4 are left"),
        (extension(2, mp("float32", [2**40, 2**40])), "which no machine holds"),
        (extension(2, mp("float32", [0, 2**40, 2**40])), "which no machine holds"),
        (extension(2, mp("float32", [1] * 65) + bytes(4)), "a tensor of 65 dimensions; the limit is 64"),
        (extension(2, mp("bool", [2]) + b"\x01\x02"), "a bool tensor with a byte other than 0 and 1"),
        (vector(["w"], [[2]], 1, numbers=bytes(4)), "8 bytes are announced, 4 are left"),
        (vector(["w"], [[1]], 1, numbers=bytes(8)), "4 bytes too many"),
        (vector(["w"], [[1]], 1, "int32", bytes(4)), "a Vector of torch.int32; its numbers are floating point"),
        (vector(["w", "w"], [[], []], 1, numbers=bytes(8)), r"2 names \(1 different\), 2 shapes and 1 parameters"),
        (vector(["w"], [], 1), "a layout of 1 names"),
        (vector(["w"], [[1]], 2, numbers=bytes(4)), "contradicts itself"),
        (vector(["w"], [[-1]], 1), "-1 where a size from 0"),
        (vector(["w"], [[2**62]], 1), "which no machine holds"),
        (vector([b"w"], [[1]], 1), "bytes where str is expected"),
        (extension(3, mp(mp([], [], 0) + b"\x00", "float32")), "byte 3: 1 bytes too many"),
        (extension(4, mp(600, "float32", [2]) + pack(np.array([7, 5]), 10) + bytes(8)), "ascends strictly"),
        (extension(4, mp(600, "float32", [2]) + pack(np.array([7, 600]), 10) + bytes(8)), "ascends strictly"),
        (extension(4, mp(9, "float32", [9]) + b"\xfe\x01" + bytes(36)), "a Sparse with 8 indices needs float values"),
        (extension(4, mp(9, "float32", [9]) + b"\xff\x03" + bytes(36)), "the bits after the last number are not zero"),
        (extension(4, mp(9, "int32", [9]) + b"\xff\x01" + bytes(36)), "got torch.int32"),
        (extension(4, mp(1, "float32", [2]) + b"\x01" + bytes(8)), r"a Sparse of size 1 with values of shape \[2\]"),
        (extension(4, mp(1, "float32", []) + bytes(4)), r"a Sparse of size 1 with values of shape \[\]"),
        (extension(4, mp(2**62, "float32", [0])), "over the limit of 2147483648 bytes as a dense tensor"),
        (extension(5, mp("float32", 1, [8]) + b"\x00"), "a Packed of torch.float32 with 1 bits"),
        (extension(5, mp("int64", 33, [1]) + bytes(5)), "a Packed of torch.int64 with 33 bits"),
        (extension(5, mp("int64", 0, [2**40])), "a Packed of torch.int64 with 0 bits"),
        (extension(5, mp("int64", 1, [2**40]) + bytes(9)), "over the limit of 2147483648 bytes in memory"),
        (extension(5, mp("int64", 3, [2]) + b"\x40"), "the bits after the last number are not zero"),
        (extension(5, mp("int8", 8, [1]) + b"\x80"), "a Packed holds 128, too much for its torch.int8"),
        (extension(5, mp("bool", 2, [1]) + b"\x01"), "bits of a Packed of torch.bool are an int from 1 to 1"),
        (extension(6, mp(-1)), "-1 where a size from 0"),
        (extension(6, mp(2**63)), "9223372036854775808 where a size"),
        (extension(6, mp("7")), "str where int is expected"),
    ],
)
def test_hostile_bytes_are_refused_before_anything_large_is_made(data, error):
    tracemalloc.start()
    with pytest.raises(CodecError, match=error):
        decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_nested_tuples_are_too_deep_too():
    body = b"\x90"
    for _ in range(40):
        body = b"\x91" + head("extension", len(body)) + b"\x01" + body
    with pytest.raises(CodecError, match="more than 16 lists"):
        decode(extension(1, body))


def test_the_limits_come_first():
    data = encode({"t": torch.zeros(100)})
    assert decode(data, limit=len(data))
    with pytest.raises(CodecError, match=f"a message of {len(data)} bytes is over the limit of {len(data) - 1}"):
        decode(data, limit=len(data) - 1)
    mask = encode({"m": Packed(torch.ones(100, dtype=torch.int64), 1)})
    assert decode(mask, expanded=800)
    with pytest.raises(CodecError, match=r"a Packed of shape \[100\] is over the limit of 799 bytes in memory"):
        decode(mask, expanded=799)
    few = encode({"s": [(Sparse(torch.tensor([7]), torch.zeros(1, 3).bfloat16(), 100),)]})
    assert decode(few, expanded=600)
    with pytest.raises(CodecError, match="a Sparse of size 100 is over the limit of 599 bytes as a dense tensor"):
        decode(few, expanded=599)


@pytest.mark.parametrize("empty", [[], {}, (), Seed(1), torch.zeros(0)], ids=str)
def test_a_message_has_so_many_parts_and_no_more(empty):
    data = encode({"a": [empty] * 100})  # of which the list and the message are two, and a header may hold a list
    assert decode(data, parts=1_000)
    with pytest.raises(CodecError, match="more lists, tuples, dicts and tensors than a message may have"):
        decode(data, parts=101)


def test_parts_inside_a_tuple_count_too():
    data = encode({"a": ([],) * 100})
    assert decode(data, parts=110)
    with pytest.raises(CodecError, match="more lists, tuples, dicts and tensors than a message may have"):
        decode(data, parts=90)


def test_a_small_message_of_empty_lists_takes_no_more_memory_than_a_large_one():
    def bomb(dicts):
        return b"MHM\x01\x81\xa1a" + head("list", dicts) + b"\x80" * dicts

    with pytest.raises(CodecError, match="than a message may have"):
        decode(bomb(2**20 + 1))
    tracemalloc.start()
    with pytest.raises(CodecError, match="than a message may have"):
        decode(bomb(100_000), parts=1_000)
    assert tracemalloc.get_traced_memory()[1] < 1e6, "of 7 MB without a bound"
    tracemalloc.stop()


def test_a_view_of_any_buffer_is_read_and_left_alone():
    data = encode(everything())
    buffer = bytearray(b"xx" + data + b"yy")
    back = decode(memoryview(buffer)[2:-2])
    buffer[:] = bytes(len(buffer))
    assert encode(back) == data


def test_every_truncation_is_refused():
    data = encode(everything())
    for end in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:end])


def test_mutated_messages_are_refused_or_encode_to_the_same_bytes():
    rng = numpy_stream(0, "fuzz")
    fields = everything()
    corpus = [encode({name: value}) for name, value in fields.items()] + [encode(fields)]
    telling = np.frombuffer(bytes(range(0xC0, 0xE0)) + b"\x00\x01\x7f\x80\x90\xa0\xff", np.uint8)
    accepted = 0
    for case in range(12_000):
        data = bytearray(corpus[case % len(corpus)])
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(4, len(data)))
            match rng.integers(6):
                case 0:
                    data[place] ^= 1 << int(rng.integers(8))
                case 1:
                    data[place] = int(rng.integers(256))
                case 2:
                    data[place] = int(rng.choice(telling))
                case 3:
                    data[place:place] = rng.bytes(int(rng.integers(1, 5)))
                case 4:
                    del data[place : place + int(rng.integers(1, 5))]
                case 5:
                    other = corpus[int(rng.integers(len(corpus)))]
                    start = int(rng.integers(len(other)))
                    data[place:place] = other[start : start + int(rng.integers(1, 40))]
            if len(data) < 6:
                break
        try:
            back = decode(bytes(data))
        except CodecError:
            continue
        accepted += 1
        assert encode(back) == bytes(data)
        assert sum(sizes(back).values()) == len(data)
    assert accepted > 1000  # the mutations are subtle enough to reach the inside


@settings(QUICK, max_examples=1000)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_encode_to_the_same_bytes(tail):
    data = b"MHM\x01" + tail
    try:
        back = decode(data)
    except CodecError:
        return
    assert encode(back) == data


PARTS = {"w": torch.arange(1000.0), "n": 3, "none": torch.zeros(0), "mask": Packed(torch.ones(9, dtype=torch.bool), 1)}


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_pieces_are_the_bytes_from_any_place_on(size):
    pieces, whole = Pieces(PARTS), encode(PARTS)
    assert bytes(pieces) == whole == b"".join(pieces) and len(pieces) == len(whole)
    for start in (0, 1, 5, 50, len(whole) - 1, len(whole), len(whole) + 5, *range(0, len(whole), 97)):
        assert pieces.read(start, size) == whole[start : start + size]


def test_pieces_of_a_large_tensor_are_no_copy_of_it():
    large = torch.zeros(10**6)
    tracemalloc.start()
    pieces = Pieces({"w": large})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10**5
    large[5] = 1.0
    assert decode(bytes(pieces))["w"][5] == 1.0
