"""Which pages of the pools are in use, and by how many owners."""


class OutOfPages(Exception):
    """No page is free."""


class Pages:
    """Reference counts of the pages 0 .. count - 1.

    A page may be written by the owner that took it, and only where no other owner reads.
    """

    def __init__(self, count: int) -> None:
        self._references = [0] * count
        self._free = [*reversed(range(count))]

    @property
    def count(self) -> int:
        """Number of pages."""
        return len(self._references)

    @property
    def free(self) -> int:
        """Number of pages without an owner."""
        return len(self._free)

    def references(self, page: int) -> int:
        """Number of owners of a page."""
        return self._references[page]

    def take(self) -> int:
        """Take a free page, whose content is undefined.

        Raises:
          OutOfPages: there is none.
        """
        if not self._free:
            raise OutOfPages(f"all {len(self._references)} pages are in use")
        page = self._free.pop()
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add an owner to a page that has one."""
        assert self._references[page], f"page {page} is free and cannot be shared"
        self._references[page] += 1

    def drop(self, page: int) -> None:
        """Remove an owner; without any, the page is free."""
        assert self._references[page], f"page {page} is already free"
        self._references[page] -= 1
        if not self._references[page]:
            self._free.append(page)
