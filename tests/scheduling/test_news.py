"""News: a bell rings for whoever listens, and hangs no longer than somebody does."""

from __future__ import annotations

from w2s_fast.scheduling.news import News


def test_what_is_told_within_is_heard() -> None:
    news = News()
    news.tell()
    with news.heard() as one, news.heard() as other:
        assert one.empty()
        news.tell()
        assert (one.get(timeout=5), other.qsize()) == (None, 1)
    news.tell()
    assert one.empty() and other.qsize() == 1


def test_a_bell_is_gone_where_its_block_never_began() -> None:
    news = News()
    heard = news.heard()
    bell = heard.__enter__()  # and an interrupt before the next line
    del heard
    news.tell()
    assert bell.empty()
