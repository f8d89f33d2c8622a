"""The page pool on its own: every page is owned once or free, whatever happens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from dmc.cache.storage.pages import NULL_PAGE, Layout, PagePool, PoolExhausted

LAYOUT = Layout({"marks": (torch.int32, (2, 3)), "bytes": (torch.uint8, (5,)), "halves": (torch.bfloat16, (3,))})


class PoolMachine(RuleBasedStateMachine):
    """Takes and gives pages in any order, marks each, and checks that no mark is ever lost."""

    batches = Bundle("batches")

    @initialize(limit=st.one_of(st.none(), st.integers(1, 40)))
    def start(self, limit):
        self.pool, self.owned, self.mark = PagePool(LAYOUT.nbytes, limit=limit), {}, 0

    @rule(target=batches, count=st.integers(0, 30))
    def take(self, count):
        if self.pool.limit is not None and count > self.pool.free:
            before = self.pool.free
            with pytest.raises(PoolExhausted):
                self.pool.take(count)
            assert self.pool.free == before
            return ()
        pages = self.pool.take(count)
        for page in pages.tolist():
            assert page not in self.owned and page != NULL_PAGE
            self.mark += 1
            self.owned[page] = self.mark
            views = self.pool.views(LAYOUT)
            views["marks"][page], views["bytes"][page], views["halves"][page] = self.mark, self.mark % 256, 0.5
        return tuple(pages.tolist())

    @rule(batch=consumes(batches))
    def give(self, batch):
        self.pool.give(torch.tensor(batch, dtype=torch.int64))
        for page in batch:
            del self.owned[page]

    @invariant()
    def every_page_is_owned_once_or_free(self):
        if not hasattr(self, "pool"):
            return
        free = self.pool.free_pages().tolist()
        assert sorted(free + list(self.owned)) == list(range(1, self.pool.capacity + 1))
        assert self.pool.used == len(self.owned) and self.pool.free == len(free)

    @invariant()
    def nothing_is_overwritten(self):
        if not hasattr(self, "pool"):
            return
        assert not self.pool.memory[NULL_PAGE].any()
        pages = torch.tensor(list(self.owned), dtype=torch.int64)
        copy = LAYOUT.views(self.pool.read(pages))
        for views, index in ((self.pool.views(LAYOUT), pages), (copy, torch.arange(len(pages)))):
            expected = torch.tensor(list(self.owned.values()), dtype=torch.int32)
            assert torch.equal(views["marks"][index, 1, 2], expected)
            assert torch.equal(views["bytes"][index, 4], (expected % 256).byte())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_layout_packs_fields_and_keeps_them_aligned():
    assert LAYOUT.nbytes == 40  # 24 + 6 + 5, up to a multiple of 8
    views = LAYOUT.views(torch.zeros(3, 40, dtype=torch.uint8))
    assert {name: tuple(view.shape) for name, view in views.items()} == {"marks": (3, 2, 3), "bytes": (3, 5), "halves": (3, 3)}


FIELDS = st.tuples(
    st.sampled_from([torch.uint8, torch.int8, torch.bfloat16, torch.int32, torch.float32, torch.float64]),
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
)


@given(st.dictionaries(st.text("abcdef", min_size=1), FIELDS, min_size=1, max_size=9))
def test_fields_begin_where_their_size_lets_them_be_read_widely(fields):
    """None overlaps another, each begins at a multiple of its dtype, and of 16 bytes if its own size is one."""
    layout, end = Layout(fields), 0
    for offset, size, dtype, shape in sorted(layout.fields.values(), key=lambda field: (field[0], field[1])):
        assert offset >= end and size == dtype.itemsize * torch.Size(shape).numel()
        assert offset % dtype.itemsize == 0 and (size % 16 or offset % 16 == 0)
        end = offset + size
    assert end <= layout.nbytes < end + 8
    assert set(layout.views(torch.zeros(2, layout.nbytes, dtype=torch.uint8))) == set(fields)
