"""How rows are dealt to clients, what modifiers change and what they leave alone, and the picture of it."""

import math
import pickle  # noqa: TID251
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedloom.data import Federation, Shards, Source, Table, federate, load, natural_column, partition_figure, rules
from fedloom.data.shift import rotated
from fedloom.errors import UsageError
from fedloom.random import stream


def source(rows: int = 600, tests: int = 200, classes: int = 10, kind: str = "image", **columns) -> Source:
    """Random data whose class sizes differ; `columns` are (training, test) pairs."""
    generator = stream(0, "test", rows, tests, classes)

    def table(n: int, split: int) -> Table:
        shape = {"image": (n, 2, 6, 6), "tabular": (n, 5), "text": (n, 7)}[kind]
        x = torch.rand(shape, generator=generator)
        y = torch.cat([torch.arange(classes), (torch.rand(n - classes, generator=generator) ** 2 * classes).long()])
        return Table(x if kind != "text" else (x * 9).long(), y, {name: both[split] for name, both in columns.items()})

    return Source("random", kind, tuple(map(str, range(classes))), table(rows, 0), table(tests, 1))


SOURCE = source()
DRAWN = (
    "iid",
    "dirichlet:0.05",
    "dirichlet:1",
    "dirichlet:1e6",
    "classes:2",
    "classes:10",
    "quantity:0.2",
    "quantity:50",
)


def error(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        federate(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


def same(one: Federation, two: Federation) -> bool:
    pairs = [(getattr(one, split), getattr(two, split)) for split in ("train", "validation", "test")]
    return all(torch.equal(a.rows, b.rows) and torch.equal(a.offsets, b.offsets) for a, b in pairs)


def dealt(federation: Federation) -> list[set[int]]:
    """The training and validation rows of each client."""
    split = (federation.train, federation.validation)
    return [{int(row) for shards in split for row in shards[k]} for k in range(len(federation.train))]


def labels(federation: Federation, split: str = "train") -> torch.Tensor:
    """Rows of each client and class, `[K, C]`."""
    shards = getattr(federation, split)
    cells = shards.owners * len(federation.classes) + federation.y[shards.rows]
    return torch.bincount(cells, minlength=len(shards) * len(federation.classes)).view(len(shards), -1)


class TestShards:
    @given(st.integers(1, 9).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(-1, k - 1), max_size=40))))
    def test_each_client_gets_its_rows_in_order(self, case):
        clients, owner = case
        shards = Shards.from_owner(torch.tensor(owner, dtype=torch.int64), clients)
        assert len(shards) == clients
        for k in range(clients):
            assert shards[k].tolist() == [row for row, who in enumerate(owner) if who == k]
            assert shards.sizes[k] == len(shards[k])
        assert shards.owners.tolist() == sorted(who for who in owner if who >= 0)

    def test_a_client_is_a_view_and_there_is_none_beyond_the_last(self):
        shards = Shards.from_owner(torch.tensor([1, 0, 1]), 2)
        assert shards[1].data_ptr() == shards.rows[1:].data_ptr()
        with pytest.raises(IndexError):
            shards[2]


class TestEveryRule:
    @settings(deadline=None, max_examples=60)
    @given(
        st.sampled_from(DRAWN),
        st.sampled_from(("", "+longtail:3", "+rotation:30+flip:0.5")),
        st.integers(5, 60),
        st.floats(0, 0.9),
        st.integers(0, 5),
    )
    def test_rows_are_dealt_once_and_all_of_them(self, rule, modifiers, clients, validation, seed):
        assume(rule != "classes:10" or clients <= 20)  # every client needs a row of every class
        assume("classes" not in rule or "longtail" not in modifiers)  # which may take a client's only rows
        federation = federate(SOURCE, rule + modifiers, clients, validation, seed)
        train, held, test = (getattr(federation, split).rows for split in ("train", "validation", "test"))
        rows = torch.cat([train, held, test])
        assert len(rows.unique()) == len(rows)
        assert torch.equal(federation.global_test, torch.arange(600, 800))
        assert train.max() < 600 and (not len(held) or held.max() < 600)
        if "longtail" not in modifiers:
            assert len(train) + len(held) == 600
        sizes = federation.train.sizes + federation.validation.sizes
        assert federation.train.sizes.min() >= 1
        assert torch.equal(federation.validation.sizes, (sizes * validation + 1e-9).long())

    @pytest.mark.parametrize("rule", DRAWN)
    def test_the_seed_decides(self, rule):
        first, again, other = (federate(SOURCE, rule, 12, seed=seed) for seed in (1, 1, 2))
        assert same(first, again) and not same(first, other)

    @pytest.mark.parametrize("rule", DRAWN)
    def test_neither_more_validation_rows_nor_a_modifier_changes_the_dealing(self, rule):
        plain = federate(SOURCE, rule, 12, validation=0)
        assert same(plain, federate(SOURCE, rule + "+flip:0.5+rotation:20+noise:1+contrast:0.5", 12, validation=0))
        some, more = federate(SOURCE, rule, 12, validation=0.1), federate(SOURCE, rule, 12, validation=0.5)
        assert dealt(plain) == dealt(some) == dealt(more)
        assert set(some.validation.rows.tolist()) <= set(more.validation.rows.tolist())
        assert torch.equal(plain.test.rows, more.test.rows)

    @pytest.mark.parametrize("rule", DRAWN)
    def test_other_test_rows_change_no_training_row(self, rule):
        other = source(tests=300)
        changed = Source("other", "image", SOURCE.classes, SOURCE.train, Table(other.test.x * 7 - 3, other.test.y))
        rule += "+longtail:2+noise:1+flip:0.5"
        one, two = federate(SOURCE, rule, 12), federate(changed, rule, 12)
        assert torch.equal(one.train.rows, two.train.rows) and torch.equal(one.validation.rows, two.validation.rows)
        assert torch.equal(one.x[:600], two.x[:600]) and torch.equal(one.y[:600], two.y[:600])

    def test_the_source_is_left_as_it_was(self):
        before = SOURCE.train.x.clone(), SOURCE.train.y.clone()
        federate(SOURCE, "iid+rotation:90+noise:1+contrast:0.1+flip:1", 5)
        assert torch.equal(SOURCE.train.x, before[0]) and torch.equal(SOURCE.train.y, before[1])


class TestRules:
    def test_iid_sizes_differ_by_one_row_at_most(self):
        for clients in (1, 7, 600):
            sizes = federate(SOURCE, "iid", clients, validation=0).train.sizes
            assert sizes.max() - sizes.min() <= 1

    def test_dirichlet_is_nearly_iid_for_a_large_alpha_and_one_class_for_a_small_one(self):
        big = source(rows=20_000, tests=2_000)
        share = labels(federate(big, "dirichlet:1e6", 10)).double()
        share /= share.sum(1, keepdim=True)
        assert (share - share.mean(0)).abs().max() < 0.01
        held = labels(federate(big, "dirichlet:0.001", 10, seed=1))
        assert (held > 20).sum(1).max() <= 4 and (held.max(0).values / held.sum(0)).median() > 0.99

    def test_dirichlet_shares_have_their_distribution(self):
        """Over many draws, a client's share of a class has mean 1 / K and variance (K - 1) / (K^2 (K a + 1))."""
        big, clients, alpha = source(rows=20_000, tests=2_000), 4, 0.5
        draws = [labels(federate(big, f"dirichlet:{alpha}", clients, validation=0, seed=seed)) for seed in range(40)]
        shares = torch.stack([held.double() / held.sum(0) for held in draws])
        assert shares.mean() == pytest.approx(1 / clients, abs=1e-6)
        assert shares.var() == pytest.approx((clients - 1) / (clients**2 * (clients * alpha + 1)), rel=0.1)

    def test_a_client_is_tested_on_its_own_distribution(self):
        big = source(rows=20_000, tests=5_000)
        for rule in ("dirichlet:0.3", "quantity:0.5", "classes:3"):
            federation = federate(big, rule, 10, validation=0, seed=3)
            train, test = labels(federation).double(), labels(federation, "test").double()
            assert (train.sum(1) / train.sum() - test.sum(1) / test.sum()).abs().max() < 0.01, rule
            if rule != "quantity:0.5":
                assert (train / train.sum(0) - test / test.sum(0)).abs().max() < 0.02, rule

    @pytest.mark.parametrize(("clients", "classes"), [(5, 2), (20, 2), (33, 3), (12, 10), (10, 1), (100, 5)])
    def test_shards_give_every_client_exactly_its_number_of_classes(self, clients, classes):
        federation = federate(SOURCE, f"classes:{classes}", clients, validation=0)
        assert ((labels(federation) > 0).sum(1) == classes).all()
        assert not ((labels(federation, "test") > 0) & (labels(federation) == 0)).any()

    def test_quantity_changes_sizes_and_not_classes(self):
        held = labels(federate(source(rows=20_000, tests=2_000), "quantity:0.5", 5, seed=2)).double()
        assert held.sum(1).max() > 3 * held.sum(1).min()
        share = held / held.sum(1, keepdim=True)
        assert (share[held.sum(1) > 1000] - held.sum(0) / held.sum()).abs().max() < 0.05

    @pytest.mark.parametrize("rule", ["dirichlet", "quantity"])
    def test_a_concentration_whose_sum_over_clients_is_no_number_deals_alike(self, rule):
        sizes = federate(SOURCE, f"{rule}:1e308", 20, validation=0).train.sizes
        assert sizes.sum() == 600 and sizes.max() <= 40, "ten classes of some 60 rows, each dealt to 20"

    @pytest.mark.parametrize("rule", ["dirichlet:0.01", "quantity:0.01"])
    def test_nobody_is_left_with_too_few_rows(self, rule):
        for clients, least in ((20, 10), (50, 6), (600, 1)):
            sizes = federate(SOURCE, rule, clients, validation=0).train.sizes
            assert sizes.min() >= least and sizes.sum() == 600

    def test_rows_are_moved_only_from_the_largest_clients(self, monkeypatch):
        filled = federate(SOURCE, "quantity:0.3", 20, validation=0)
        monkeypatch.setattr(rules, "_fill", lambda *_: None)
        before, after = federate(SOURCE, "quantity:0.3", 20, validation=0).train.sizes, filled.train.sizes
        gave, got = after < before, after > before
        assert got.any() and (after[got] == 10).all() and before[got].max() < 10
        assert after[gave].min() >= after[~gave].max() - 1

    def test_digits_among_fifty_clients_with_few_classes_each(self):
        federation = federate(load("digits"), "dirichlet:0.1", 50)
        assert (federation.train.sizes + federation.validation.sizes).min() >= 10


class TestNatural:
    CLIENTS = (np.array([10, 2, 33] * 200), np.array([33, 2] * 100))

    def test_a_client_is_a_value_of_the_column_in_numerical_order(self):
        federation = federate(source(site=self.CLIENTS), "column:site", validation=0)
        assert tuple(federation.names) == ("2", "10", "33")
        assert federation.train[1].tolist() == list(range(0, 600, 3))
        assert federation.test[2].tolist() == list(range(600, 800, 2)) and len(federation.test[1]) == 0
        assert natural_column("column:site+flip:0.1") == "site" and natural_column("iid") is None

    def test_the_count_must_match_where_it_is_given(self):
        assert len(federate(source(site=self.CLIENTS), "column:site", 3).train) == 3
        assert "names 3 clients, but clients is 20" in error(source(site=self.CLIENTS), "column:site", 20)

    def test_a_client_without_training_rows_is_named(self):
        strangers = (np.array(["a", "b"] * 300), np.array(["a", "zoe"] * 100))
        assert "client 'zoe' of column 'site' has test rows but no training rows" in error(
            source(site=strangers), "column:site"
        )

    def test_missing_values_and_columns(self):
        gaps = (np.array(["a", None] * 300, dtype=object), np.array(["a"] * 200, dtype=object))
        assert "has 300 missing values" in error(source(site=gaps), "column:site")
        assert "no column 'role' to deal random by; the columns left for that are: site" in error(
            source(site=self.CLIENTS), "column:role"
        )

    def test_mnist_is_dealt_as_its_file_says(self, shared_data):
        import pyarrow.parquet

        folder = shared_data("mnist")
        tables = [pyarrow.parquet.read_table(folder / f"{split}.parquet") for split in ("train", "test")]
        train, test = (np.stack([table["client"].to_numpy(), table["label"].to_numpy()]) for table in tables)
        columns = [Table(torch.zeros(len(y), 1), torch.tensor(y), {"client": client}) for client, y in (train, test)]
        mnist = Source("mnist", "tabular", tuple("0123456789"), *columns)
        federation = federate(mnist, "column:client", validation=0)
        for split, (client, y) in (("train", train), ("test", test)):
            counts = np.zeros((20, 10), dtype=np.int64)
            np.add.at(counts, (client, y), 1)
            assert np.array_equal(labels(federation, split).numpy(), counts)
        assert tuple(federation.names) == tuple(map(str, range(20)))


class TestModifiers:
    def test_longtail_falls_exponentially_by_its_factor_and_leaves_the_test_rows(self):
        big = source(rows=30_000, tests=400)
        federation = federate(big, "iid+longtail:20", 10, validation=0)
        sizes = labels(federation).sum(0).sort(descending=True).values.double()
        assert sizes[0] / sizes[-1] == pytest.approx(20, rel=0.02)
        assert torch.allclose(sizes[1:] / sizes[:-1], torch.full((9,), 20 ** (-1 / 9), dtype=torch.float64), rtol=0.02)
        assert len(federation.global_test) == 400
        kept = set(federation.train.rows.tolist())
        plain = dealt(federate(big, "iid", 10, validation=0))
        assert [rows & kept for rows in plain] == dealt(federation)

    def test_the_first_client_is_never_shifted_and_the_others_ever_more(self):
        plain = federate(SOURCE, "iid", 9)
        for modifier in ("rotation:60", "noise:0.5", "contrast:0.2"):
            shifted = federate(SOURCE, f"iid+{modifier}", 9)
            change = [
                float(sum((shifted.x[rows] - plain.x[rows]).square().mean() for rows in (s[k] for s in splits)))
                for k in range(9)
                for splits in [(plain.train, plain.validation, plain.test)]
            ]
            assert change[0] == 0, modifier
            assert change[1] > 0 and change[2] < change[5] < change[8], modifier

    def test_a_quarter_turn(self):
        images = torch.rand(3, 2, 7, 7, generator=stream(0, "test"))
        turned = rotated(images, torch.tensor([0.0, 90.0, -90.0]))
        assert torch.allclose(turned[0], images[0], atol=1e-5)
        assert torch.allclose(turned[1], images[1].rot90(1, (1, 2)), atol=1e-5)
        assert torch.allclose(turned[2], images[2].rot90(-1, (1, 2)), atol=1e-5)

    def test_a_half_turn_of_an_image_that_is_not_square(self):
        images = torch.rand(1, 1, 5, 8, generator=stream(0, "test"))
        assert torch.allclose(rotated(images, torch.tensor([180.0])), images.flip(2, 3), atol=1e-5)
        upright = torch.zeros(1, 1, 5, 9)
        upright[..., 2, 2:7] = 1
        assert torch.allclose(rotated(upright, torch.tensor([90.0]))[0, 0, :, 4], torch.ones(5), atol=1e-5)

    def test_noise_and_contrast_have_their_size(self):
        plain, channels = federate(SOURCE, "iid", 2), (0, 2, 3)
        rows = plain.train[1]
        scale = SOURCE.train.x[plain.train.rows].std(channels, correction=0).view(2, 1, 1)
        noise = (federate(SOURCE, "iid+noise:0.3", 2).x - plain.x)[rows] * scale
        assert noise.std() == pytest.approx(0.3, rel=0.02) and noise.mean().abs() < 0.01
        pale = federate(SOURCE, "iid+contrast:0.25", 2).x[rows] * scale
        assert torch.allclose(pale.mean((1, 2, 3)), (plain.x[rows] * scale).mean((1, 2, 3)), atol=1e-5), "as bright"
        assert torch.allclose(pale.std((2, 3)).mean(), 0.25 * (plain.x[rows] * scale).std((2, 3)).mean(), rtol=0.05)

    def test_rows_of_training_and_test_have_noise_of_their_own(self):
        """Else a model could learn the noise of its test rows from its training rows."""
        plain, noisy = federate(SOURCE, "iid", 2, validation=0), federate(SOURCE, "iid+noise:0.3", 2, validation=0)
        noise = (noisy.x - plain.x).flatten(1)
        train, test = (noise[shards[1]] for shards in (plain.train, plain.test))
        alike = torch.nn.functional.cosine_similarity(train[:, None], test[None], dim=2)
        assert alike.abs().max() < 0.7, "of 30 000 pairs of independent noises in 72 dimensions"

    def test_noise_on_tables_is_in_deviations(self):
        table = source(kind="tabular")
        table.train.x.mul_(torch.tensor([1, 10, 1e3, 1e5, 1]))
        plain, noisy = federate(table, "iid", 2), federate(table, "iid+noise:0.5", 2)
        change = (noisy.x - plain.x)[plain.train[1]]
        assert torch.allclose(change.std(0), torch.full((5,), 0.5), rtol=0.15)

    def test_flipped_labels_are_a_share_of_training_and_validation_labels(self):
        plain, flipped = (federate(SOURCE, rule, 5, validation=0.2) for rule in ("iid", "iid+flip:0.4"))
        wrong = plain.y != flipped.y
        assert not wrong[600:].any()
        for k, rows in enumerate(dealt(plain)):
            assert wrong[list(rows)].sum() == round(len(rows) * 0.4 * k / 4)
        assert flipped.y.min() == 0 and flipped.y.max() == 9
        assert federate(SOURCE, "iid+flip:1", 2).y[dealt(federate(SOURCE, "iid", 2))[1].pop()] in range(10)

    def test_the_notes_say_what_was_done(self):
        notes = federate(SOURCE, "iid+rotation:60+noise:0.3+contrast:0.5+flip:0.24", 3).notes
        assert notes[0] == ""
        assert notes[1] == "rotation 30 degrees, noise 0.15, contrast 0.75, 12 % of the labels changed"

    def test_an_only_client_is_not_shifted(self):
        assert torch.equal(federate(SOURCE, "iid+rotation:60+flip:1", 1).x, federate(SOURCE, "iid", 1).x)


class TestNormalisation:
    @pytest.mark.parametrize("kind", ["image", "tabular"])
    def test_training_rows_have_mean_zero_and_deviation_one(self, kind):
        federation = federate(source(kind=kind), "dirichlet:0.5", 10, validation=0.3)
        x = federation.x[federation.train.rows]
        axes = (0, 2, 3) if kind == "image" else (0,)
        assert torch.allclose(x.mean(axes), torch.zeros(x.shape[1]), atol=1e-5)
        assert torch.allclose(x.std(axes, correction=0), torch.ones(x.shape[1]), atol=1e-5)

    def test_it_knows_the_training_rows_only(self):
        federation = federate(SOURCE, "iid", 10, validation=0.3)
        held = torch.zeros(600, dtype=torch.bool).index_fill(0, federation.validation.rows, True)
        x = SOURCE.train.x.clone()
        x[held] = 1000
        wild = federate(Source("wild", "image", SOURCE.classes, Table(x, SOURCE.train.y), SOURCE.test), "iid", 10, 0.3)
        assert torch.equal(wild.x[federation.train.rows], federation.x[federation.train.rows])

    def test_a_constant_column_becomes_zero(self):
        table = source(kind="tabular")
        table.train.x[:, 2], table.test.x[:, 2] = 0.1, 0.6
        federation = federate(table, "iid", 4)
        assert federation.x[:600, 2].abs().max() < 1e-6
        assert torch.allclose(federation.x[600:, 2], torch.tensor(0.5))

    def test_tokens_stay_tokens(self):
        text = source(kind="text")
        assert torch.equal(federate(text, "iid+flip:0.2", 4).x, torch.cat([text.train.x, text.test.x]))


class TestErrors:
    @pytest.mark.parametrize(
        ("partition", "said"),
        [
            ("dirchlet:0.3", "unknown partition 'dirchlet'; did you mean 'dirichlet'"),
            ("iid+rotate:3", "unknown partition modifier 'rotate'; did you mean 'rotation'"),
            ("dirichlet", "dirichlet needs a number above 0, as in dirichlet:0.3, but got 'dirichlet'"),
            ("dirichlet:0", "dirichlet needs a number above 0"),
            ("dirichlet:nan", "dirichlet needs a number above 0"),
            ("quantity:inf", "quantity needs a number above 0"),
            ("classes:1.5", "classes needs a whole number from 1"),
            ("column:", "column needs a column's name, as in column:client"),
            ("iid:3", "iid takes no value"),
            ("iid+longtail:0.5", "longtail needs a number from 1"),
            ("iid+contrast:0", "contrast needs a number above 0, up to 1"),
            ("iid+flip:40", "flip needs a number from 0 to 1"),
            ("rotation:30", "starts with a modifier; say first how to deal, as in iid+rotation:30"),
            ("iid+dirichlet:0.3", "has two rules, iid and dirichlet:0.3"),
            ("iid+flip:0.1+flip:0.2", "has flip twice"),
            ("", "unknown partition ''"),
        ],
    )
    def test_what_is_no_partition(self, partition, said):
        assert said in error(SOURCE, partition, 10)

    def test_clients_that_cannot_be(self):
        assert "601 clients but only 600 training rows" in error(SOURCE, "iid", 601)
        assert "needs a number of clients from 1" in error(SOURCE, "iid")
        assert "needs a number of clients from 1" in error(SOURCE, "iid", 0)

    def test_classes_that_do_not_come_out(self):
        assert "hold at most 8 of the 10 classes; take classes:3 or 5 clients" in error(SOURCE, "classes:2", 4)
        assert "only 10 classes; take at most classes:10" in error(SOURCE, "classes:11", 4)
        assert "need 5400 shards, more than the rows give" in error(SOURCE, "classes:9", 600)

    def test_a_tail_that_is_too_long(self):
        message = error(SOURCE, "iid+longtail:1000", 10)
        most = int(re.search(r"at most (\d+)", message)[1])
        assert labels(federate(SOURCE, f"iid+longtail:{most}", 5)).sum() > most
        assert "is left without training rows" in error(SOURCE, "classes:1+longtail:30", 200)
        assert "is left without training rows" in error(SOURCE, "iid+longtail:30", 500)

    def test_shifts_of_other_data(self):
        assert "rotation changes image data, but random is tabular" in error(
            source(kind="tabular"), "iid+rotation:3", 5
        )
        assert "noise changes image or tabular data" in error(source(kind="text"), "iid+noise:3", 5)

    @pytest.mark.parametrize("share", [-0.1, 1, math.nan])
    def test_validation_that_is_no_share(self, share):
        assert "expected a number from 0 to below 1" in error(SOURCE, "iid", 5, validation=share)


class TestTable:
    def test_it_counts_what_each_client_got(self):
        federation = federate(SOURCE, "dirichlet:0.3+flip:0.5", 20)
        table = federation.table()
        assert list(table) == ["partition", "classes", "population", "columns", "clients"]
        assert table["partition"] == "dirichlet:0.3+flip:0.5" and table["population"] == 20
        assert [client["labels"] for client in table["clients"]] == labels(federation).tolist()
        assert [client["id"] for client in table["clients"]] == list(range(20))
        for client in table["clients"]:
            assert list(client) == ["id", "name", "train", "validation", "test", "labels", "note"]
            assert sum(client["labels"]) == client["train"]
        assert sum(client["test"] for client in table["clients"]) == 200
        assert table["clients"][19]["note"] == "50 % of the labels changed"

    def test_it_shows_the_first_clients_of_many(self):
        federation = federate(SOURCE, "iid", 300)
        table = federation.table(limit=7)
        assert len(table["clients"]) == 7 and table["population"] == 300
        assert [client["labels"] for client in table["clients"]] == labels(federation)[:7].tolist()

    def test_a_federation_travels_to_other_processes(self):
        federation = federate(SOURCE, "iid+rotation:10", 4)
        copy = pickle.loads(pickle.dumps(federation))  # noqa: S301
        assert copy.table() == federation.table() and copy.names[-1] == "3"

    @pytest.mark.parametrize(("clients", "classes"), [(1, 2), (5, 10), (100, 10), (250, 150)])
    def test_the_picture_has_a_cell_for_every_client_and_class(self, clients, classes):
        table = federate(source(rows=1000, tests=300, classes=classes), "iid", clients).table()
        above, below = partition_figure(table).axes[:2]
        assert below.images[0].get_array().shape == (classes, clients)
        assert below.images[0].get_array().sum() == sum(client["train"] for client in table["clients"])
        assert above.get_title(loc="left") == f"iid, {clients} clients"

    def test_the_picture_is_drawn_without_a_display_or_global_state(self, tmp_path):
        import sys

        names = ("$a_b$", "\n", "a name that is far too long to stand beside an axis")
        table = federate(source(classes=3), "iid", 150).table(limit=120) | {"classes": list(names)}
        partition_figure(table).savefig(tmp_path / "clients.png")
        assert (tmp_path / "clients.png").stat().st_size > 5000
        assert "matplotlib.pyplot" not in sys.modules


def test_a_hundred_thousand_clients_cost_seconds_and_no_object_each():
    many = source(rows=100_000, tests=10_000, kind="tabular")
    federation = federate(many, "iid+flip:0.1", 100_000)
    assert len(federation.train) == 100_000 and federation.train.sizes.max() == 1
    assert federation.names[99_999] == "99999" and len(federation.notes) == 100_000


def test_public_rows_are_nobody_elses_and_as_many_of_every_class():
    source = load("digits")
    plain, shared = (federate(source, "iid", 10, 0.1, seed=3, public=share) for share in (0.0, 0.1))
    assert len(plain.public) == 0 and len(shared.public) == 10 * round(0.1 * len(source.train.y) / 10)
    assert torch.bincount(shared.y[shared.public]).unique().numel() == 1
    parts = (shared.train.rows, shared.validation.rows, shared.test.rows, shared.public)
    rows = torch.cat(parts)
    assert len(rows.unique()) == len(rows) == len(shared.y)
    assert torch.equal(shared.test.rows, plain.test.rows)
    again = federate(source, "iid", 10, 0.1, seed=3, public=0.1)
    assert torch.equal(again.public, shared.public) and torch.equal(again.train.rows, shared.train.rows)
    assert not torch.equal(federate(source, "iid", 10, 0.1, seed=4, public=0.1).public, shared.public)
