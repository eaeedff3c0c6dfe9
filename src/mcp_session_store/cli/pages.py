"""Lists that are printed a page at a time, or page after page: their options, how they are read, where they go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["LARGE_PAGE", "all_option", "cursor_option", "limit_option", "page_size", "pages", "print_pages"]

PAGE: Final = 50
"""Lines on a page, unless --limit says otherwise."""
LARGE_PAGE: Final = 500
"""Lines on a page where all pages are read: each is a query."""

limit_option = click.option(
    "--limit", type=click.IntRange(1, 10_000), metavar="N", help=f"Lines on a page. Default: {PAGE}."
)
all_option = click.option("--all", "all_pages", is_flag=True, help="Print all pages, one after the other.")
cursor_option = click.option("--after", metavar="CURSOR", help="Go on after a page, with the cursor that it printed.")


class Page(Protocol):
    """Part of a list."""

    @property
    def next(self) -> str | int | None:
        """Where the next page begins; `None` after the last page."""


_Page = TypeVar("_Page", bound=Page)


def page_size(limit: int | None, *, all_pages: bool) -> int:
    """Return the number of lines on a page."""
    return limit or (LARGE_PAGE if all_pages else PAGE)


async def pages(read: Callable[[Any], Awaitable[_Page]], after: str | int | None = None) -> AsyncIterator[_Page]:
    """Yield the pages of a list, at least one.

    Args:
        read: Reads the page that begins at a position.
        after: The position of the first page; `None`: the beginning of the list.
    """
    while True:
        page = await read(after)
        yield page
        if page.next is None:
            return
        after = page.next


async def print_pages(
    pages: AsyncIterator[_Page], print_page: Callable[[_Page, bool], int], *, all_pages: bool, as_json: bool
) -> int:
    """Print one page, or all, and return the number of lines.

    Args:
        pages: The list.
        print_page: Prints a page, and returns the number of its lines; the argument says whether they come first.
        all_pages: Whether to go on after the first page.
        as_json: Whether programs read it: where the list goes on is in the document then.
    """
    count = 0
    async for page in pages:
        count += print_page(page, count == 0)
        if not all_pages:
            if page.next is not None and not as_json:
                click.echo(f"there are more: --after {page.next}", err=True)
            break
    return count
